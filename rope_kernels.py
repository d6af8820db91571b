"""Rotary position embedding: frequencies, exact angles, and one Triton kernel.

The H elements of a head form H/2 planes; position p rotates plane i by p * inv_freq[i]. Plane i is
the pair (x[i], x[i + H/2]), the half-split convention of HF checkpoints. (Meta's own files pair the
neighbours x[2i] and x[2i + 1]; such weights are permuted once, when they are loaded.)

    forward     out[i]       = x[i] cos - x[i + H/2] sin
                out[i + H/2] = x[i + H/2] cos + x[i] sin
    backward    the same with sin negated: a rotation's transpose is the rotation back

Exact angles
------------
The usual float32(p) * inv_freq keeps 24 bits of the angle. At 100,000 radians that leaves an error
of 0.004, and cos is wrong in the third digit, although only the fraction of a turn matters. So we
count in turns, and divide a turn into 2^64 units of a 64-bit integer: p * frequency is then a
product of integers, and integer overflow drops exactly the whole turns. The remainder is the angle,
in [-1/2, 1/2) of a turn. One reflection,

    cos(t) = sin(1/4 turn - |t|)        sin(t) = cos(t - 1/4 turn)

maps it to [-1/4, 1/4], where five terms of a polynomial give the sine. Errors at p = 2^20:

    inv_freq / 2 pi in float64, at most 0.16 turns: p * 0.16 * 2^-52 turns     2e-10 radians
    frequency truncated to units: p * 2^-64 turns                              4e-13 radians
    five terms instead of the sine, coefficients in float32                    5e-8
    float32 rounding of the reflected angle and of the five terms              2e-7

Together they are under 3e-7 (2.1e-7 measured) and almost independent of p. Every product and sum is
rounded by itself (no fused multiply-add), so that kernel, interpreter and plain PyTorch agree bit
for bit.

Memory traffic
--------------
A rotation does three operations on each element it moves, so it is memory-bound. Llama-3-8B in
bf16 moves (32 query + 8 kv heads) * 128 * 2 bytes * (read + write) = 20,480 B a token, and 8 B of
position id. At T = 32768 that is 640 MiB a layer, or 156 us at 4.3 TB/s. The plain formula in eager
mode (negate, concatenate, two products, a sum) moves 5 times as much, and tables of cos and sin.

Shape letters: B batch, T tokens, N query heads, K kv heads, H head_dim.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no wheel for macOS and Windows, where plain PyTorch runs
    triton, tl = None, SimpleNamespace(constexpr=None)

# -------------------------------------------------------------------------------------- frequencies

ROPE_TYPES = ("default", "linear", "yarn", "llama3", "ntk")


def rope_frequencies(
    head_dim: int, rope_theta: float, scaling: dict | None = None
) -> tuple[Tensor, float]:
    """Compute the angle per position of each plane, with the scaling for a longer window applied.

    head_dim: even. rope_theta: base of the geometric series (ABF simply uses a larger one).
    scaling: None or a dict in transformers' form, {"rope_type": one of ROPE_TYPES, "factor": ...};
        "type" is the older name of "rope_type"; a "rope_theta" inside is ignored.
    Returns inv_freq: (H/2,) float64 on the CPU, radians per position, and attention_factor, which
    multiplies cos and sin (1.0 for all but yarn). Raises ValueError, naming the wrong value.
    """
    scaling = scaling or {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ValueError(f"rope_type: got {rope_type!r:.60}, need one of {known}, try 'default'")
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim!r}, need an even number above 0, try 64 or 128")
    partial = scaling.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor: got {partial!r:.60}, need 1.0 (partial rotation is not "
            "supported), try a checkpoint that rotates whole heads"
        )
    theta = _number("rope_theta", rope_theta, 1.0, "10000 or 500000", above=True)

    # (H/2,) from 0 to just under 1. On the CPU explicitly: models are built under device("meta").
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    inv_freq = theta**-exponent
    if rope_type == "default":
        return inv_freq, 1.0
    factor = _required(scaling, rope_type, "factor", 1.0, "target / original length")
    if rope_type == "linear":  # position interpolation: every position divided by factor
        return inv_freq / factor, 1.0
    if rope_type == "ntk":
        return ntk_theta(head_dim, theta, factor) ** -exponent, 1.0
    # The window of the original training, in tokens.
    original = _required(scaling, rope_type, "original_max_position_embeddings", 1.0, "8192")
    if rope_type == "llama3":
        return _llama3(inv_freq, scaling, factor, original), 1.0
    return _yarn(inv_freq, scaling, factor, original, head_dim, theta)


def ntk_theta(head_dim: int, rope_theta: float, factor: float) -> float:
    """Return the theta that is equivalent to "ntk" scaling: theta * factor^(H/(H-2)).

    The slowest plane's frequency, theta^(-(H-2)/H), is divided by exactly `factor`; the fastest's
    is unchanged. transformers has no such type, so an export writes this theta instead.
    """
    if head_dim < 4:
        raise ValueError(f"head_dim: got {head_dim}, need 4 or more for ntk, try rope_type linear")
    return rope_theta * factor ** (head_dim / (head_dim - 2))


def _llama3(inv_freq, scaling, factor, original):
    """Llama 3.1: long waves are divided by factor, short ones kept, with a linear blend between."""
    low = _required(scaling, "llama3", "low_freq_factor", 0.0, "1.0", above=True)
    high = _required(scaling, "llama3", "high_freq_factor", low, "4.0", above=True)
    turns = original * inv_freq / (2 * math.pi)  # rotations completed within the original window
    undivided = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (undivided + (1 - undivided) / factor)


def _yarn(inv_freq, scaling, factor, original, head_dim, theta):
    """YaRN (arXiv 2309.00071): a blend as in llama3, but linear in the index of the plane.

    Planes that complete more than beta_fast turns within the original window are kept, those that
    complete fewer than beta_slow are divided by factor. attention_factor, 0.1 ln(factor) + 1,
    sharpens the attention.
    """

    def optional(key, default):
        value = scaling.get(key)
        return _number(key, value, 1e-30, str(default)) if value else default

    def plane(turns):  # fractional index of the plane that completes this many turns
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def temperature(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0

    low, high = plane(optional("beta_fast", 32.0)), plane(optional("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # The last plane is H/2 - 1, but transformers caps at H - 1, and checkpoints were trained so.
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    divided = ((index - low) / (high - low or 0.001)).clamp(0, 1)

    attention_factor = temperature(1.0)
    mscale, mscale_all_dim = optional("mscale", None), optional("mscale_all_dim", None)
    if mscale and mscale_all_dim:  # DeepSeek's form
        attention_factor = temperature(mscale) / temperature(mscale_all_dim)
    if scaling.get("attention_factor") is not None:
        attention_factor = _number("attention_factor", scaling["attention_factor"], 0.0, "1.0")
    return inv_freq * (1 - divided + divided / factor), attention_factor


def _required(scaling, rope_type, key, least, example, above=False):
    if scaling.get(key) is None:
        raise ValueError(f"{key}: got none, need a number for {rope_type}, try {example}")
    return _number(key, scaling[key], least, example, above)


def _number(name, value, least, example, above=False):
    """Return value as a float; `above` excludes least. Up to 1e30 no later power overflows."""
    number = isinstance(value, (int, float)) and least <= value <= 1e30
    if not number or (above and value == least):
        bound = f"above {least:g}" if above else f"of {least:g} or more"
        raise ValueError(f"{name}: got {value!r:.60}, need a finite number {bound}, try {example}")
    return float(value)


# ------------------- plain PyTorch: the specification, the CPU path, the reference for kernel tests

QUARTER = 1 << 62  # a quarter of a turn; a turn is 2^64 units


def apply_rope_torch(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Do what apply_rope does in plain PyTorch, on any device, with the same results and errors.

    Arithmetic in float32 (float64 for float64 inputs), rounded once, at the end.
    """
    position_ids = _checked_ids(q, k, position_ids, inv_freq)
    fraction = inv_freq.double() * 0.15915494309189535  # 1 / 2 pi
    fraction = fraction - torch.floor(fraction + 0.5)  # whole turns per position change nothing
    frequency = (fraction * 2.0**64).long()
    turns = position_ids.long()[:, :, None, None] * frequency  # (B or 1, T, 1, H/2), wraps
    # One call computes both: at small sizes the number of tensor operations is the cost.
    both = torch.stack((turns, turns - QUARTER))
    cos, sin = _cos(both, torch.promote_types(q.dtype, torch.float32)) * attention_factor
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _cos(turns, dtype):
    """Return the cosine of an angle in units of 2^-64 turn."""
    x = (QUARTER - turns.abs()).to(dtype) * 2.0**-62  # in [-1, 1]: quarter turns
    if dtype == torch.float64:
        return torch.sin(x * (math.pi / 2))
    # sin(pi/2 x) / x in powers of x^2, fitted for the least maximum error: 3e-9, or 5e-8 after the
    # coefficients are rounded to the nearest float32 numbers.
    y = x * x
    y = (((0.00015082056 * y - 0.004672228) * y + 0.07968848) * y - 0.6459634) * y + 1.5707963
    return y * x


def _rotate(x, cos, sin):
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (B, T, heads, H/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _checked_ids(q, k, position_ids, inv_freq):
    """Return position_ids as (B, T) or (1, T), after all checks that need no device sync."""
    if q.ndim != 4 or k.shape != (*q.shape[:2], *k.shape[2:3], q.shape[3]) or k.dtype != q.dtype:
        got = f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        raise ValueError(
            f"q and k: got {got}, need (B, T, N, H) and (B, T, K, H) of one dtype, "
            "try q.view(B, T, N, H) or k.to(q.dtype)"
        )
    batch, n_tokens, _, head_dim = q.shape
    if inv_freq.shape != (head_dim // 2,) or head_dim % 2:
        raise ValueError(
            f"inv_freq: got {tuple(inv_freq.shape)} for head_dim {head_dim}, need (head_dim / 2,), "
            "try rope_frequencies(head_dim, rope_theta)"
        )
    if position_ids.dtype not in (torch.int64, torch.int32):  # bf16 cannot represent 257
        got = position_ids.dtype
        raise ValueError(f"position_ids: got {got}, need int64 or int32, try position_ids.long()")
    if position_ids.shape not in ((n_tokens,), (1, n_tokens), (batch, n_tokens)):
        got, need = tuple(position_ids.shape), (batch, n_tokens)
        raise ValueError(
            f"position_ids: got shape {got}, need {need}, try torch.arange({n_tokens})"
        )
    devices = [tensor.device for tensor in (q, k, position_ids, inv_freq)]
    if devices.count(q.device) != 4:
        got = ", ".join(map(str, devices))
        raise ValueError(
            f"devices of q, k, position_ids, inv_freq: got {got}, need one, try .to(q.device)"
        )
    return position_ids if position_ids.ndim == 2 else position_ids[None]


# ------------------------------------------------------------------------------------------- triton

jit = triton.jit if triton else lambda function: function


@jit
def _rope_kernel(
    q, q_stride_b, q_stride_t, q_stride_n, q_stride_h, out_q,
    k, k_stride_b, k_stride_t, k_stride_n, k_stride_h, out_k,
    position_ids, ids_stride_b, ids_stride_t, inv_freq,
    n_tokens, attention_factor, sign,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_T tokens of one sequence, every head of q and of k; sign -1 rotates back.

    Grid: B * ceil(T / BLOCK_T). Outputs are (B, T, heads, H) without gaps, arithmetic in float32.
    BLOCK_* are powers of two, as Triton requires, and masked beyond the real sizes. Offsets are
    int64: q of Llama-3-8B reaches 2^31 elements at 524,288 tokens. 16-byte loads need a last
    stride of 1 and everything else in multiples of 16 bytes; other layouts are only slower.
    """
    blocks = (n_tokens + BLOCK_T - 1) // BLOCK_T
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token, plane = token[:, None], tl.arange(0, BLOCK_H).to(tl.int64)[None, :]
    mask = (token < n_tokens) & (plane < HALF)  # (BLOCK_T, BLOCK_H)
    n = tl.arange(0, BLOCK_N).to(tl.int64)[None, :, None]
    m = tl.arange(0, BLOCK_K).to(tl.int64)[None, :, None]
    q_mask, k_mask = mask[:, None, :] & (n < N), mask[:, None, :] & (m < K)

    q += row * q_stride_b + token * q_stride_t
    k += row * k_stride_b + token * k_stride_t
    q_first, q_second = _load_kernel(q, n, plane, q_mask, q_stride_n, q_stride_h, HALF)
    k_first, k_second = _load_kernel(k, m, plane, k_mask, k_stride_n, k_stride_h, HALF)
    tl.debug_barrier()  # issue all loads before waiting for any

    # From here on the operations are those of apply_rope_torch. Ids and frequencies are loaded as
    # full tiles: Triton recomputes values from smaller ones in every thread that uses them.
    position_ids += row * ids_stride_b + token * ids_stride_t
    position = tl.load(tl.broadcast_to(position_ids, mask.shape), mask=mask, other=0).to(tl.int64)
    fraction = tl.load(tl.broadcast_to(inv_freq + plane, mask.shape), mask=mask, other=0.0)
    fraction = fraction * 0.15915494309189535
    fraction = fraction - tl.floor(fraction + 0.5)
    turns = position * (fraction * 2.0**64).to(tl.int64)  # wraps
    cos = _cos_kernel(turns) * attention_factor
    sin = _cos_kernel(turns - (1 << 62)) * attention_factor * sign
    token += row * n_tokens
    out_q += token[:, None, :] * (2 * N * HALF) + n * (2 * HALF)
    out_k += token[:, None, :] * (2 * K * HALF) + m * (2 * HALF)
    _rotate_kernel(q_first, q_second, cos, sin, out_q, plane, q_mask, HALF)
    _rotate_kernel(k_first, k_second, cos, sin, out_k, plane, k_mask, HALF)


@jit
def _cos_kernel(turns):
    """_cos, operation for operation. (A kernel cannot read Python globals, so literals repeat.)"""
    x = ((1 << 62) - tl.abs(turns)).to(tl.float32) * 2.0**-62
    y = x * x
    y = (((0.00015082056 * y - 0.004672228) * y + 0.07968848) * y - 0.6459634) * y + 1.5707963
    return y * x


@jit
def _load_kernel(x, head, plane, mask, stride_n, stride_h, HALF: tl.constexpr):
    """Load both halves of a tile of (tokens, heads, planes); x points at its tokens."""
    x = x[:, None, :] + head * stride_n + plane[:, None, :] * stride_h
    return tl.load(x, mask=mask), tl.load(x + HALF * stride_h, mask=mask)


@jit
def _rotate_kernel(first, second, cos, sin, out, plane, mask, HALF: tl.constexpr):
    """Do _rotate on a tile from _load_kernel; out points at its tokens and heads."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    cos, sin, out = cos[:, None, :], sin[:, None, :], out + plane[:, None, :]
    tl.store(out, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


# True if TRITON_INTERPRET=1 was set before this import: the kernel then runs through NumPy.
INTERPRETED = triton is not None and not isinstance(_rope_kernel, triton.runtime.JITFunction)
# Whether apply_rope gives CPU tensors to the interpreter. Tests of other things than the kernel may
# disable it, because an interpreted program costs milliseconds.
interpret_on_cpu = INTERPRETED


def _launch(q, k, position_ids, inv_freq, attention_factor, sign):
    """Return rotated copies of q and k from one launch; any strides, 0 too (expanded gradients)."""
    batch, n_tokens, n_heads, head_dim = q.shape
    n_kv_heads, half = k.shape[2], head_dim // 2
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    block_n, block_k, block_h = map(triton.next_power_of_2, (n_heads, n_kv_heads, half))
    # 32 planes of q per thread: 8 loads of 16 bytes in flight. Beyond 32 heads 64: otherwise there
    # would be more threads than angles. (An interpreted program's cost hardly depends on its size.)
    planes = 2**15 if INTERPRETED else 1024
    block_t = max(1, min(triton.next_power_of_2(n_tokens), planes // (block_n * block_h)))
    n_warps = block_t * block_n * block_h // (1024 if block_n <= 32 else 2048)
    grid = (batch * -(-n_tokens // block_t),)
    # Triton launches on the current GPU, which need not be q's. (On the CPU this does nothing.)
    with torch.cuda.device_of(q):
        _rope_kernel[grid](
            q, *q.stride(), out_q, k, *k.stride(), out_k,
            position_ids, *position_ids.expand(batch, -1).stride(), inv_freq.double().contiguous(),
            n_tokens, attention_factor, sign,
            n_heads, n_kv_heads, half, block_t, block_n, block_k, block_h,
            num_warps=min(16, max(1, n_warps)), enable_fp_fusion=False,
        )  # fmt: skip
    return out_q, out_k


# The launch as an operator: one opaque node to torch.compile, which traces neither device guard nor
# interpreter. It adds 3 us per eager call; torch.library.custom_op would add 26 us (measured on a
# CPU with an empty launch, 2026-11-25).
_library = torch.library.Library("longred", "FRAGMENT")
_library.define(
    "rope(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, float attention_factor, "
    "float sign) -> (Tensor, Tensor)"
)
_library.impl("rope", _launch, "CompositeExplicitAutograd")


@torch.library.register_fake("longred::rope")
def _rope_shapes(q, k, position_ids, inv_freq, attention_factor, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rope(torch.autograd.Function):
    """The kernel with its gradient. Backward needs only ids and frequencies, neither q nor k."""

    @staticmethod
    def forward(ctx, q, k, position_ids, inv_freq, attention_factor, sign):
        ctx.save_for_backward(position_ids, inv_freq)
        ctx.scalars = attention_factor, sign
        return torch.ops.longred.rope(q, k, position_ids, inv_freq, attention_factor, sign)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        attention_factor, sign = ctx.scalars
        grads = _Rope.apply(grad_q, grad_k, *ctx.saved_tensors, attention_factor, -sign)
        return *grads, None, None, None, None


# --------------------------------------------------------------------------------------- public API


def rope_backend(device: torch.device | str) -> str:
    """Return what apply_rope uses: "triton", "triton (interpreted)" or "torch (the reason)"."""
    if triton is None:
        return "torch (triton is not installed)"
    if torch.device(device).type != "cuda" and not interpret_on_cpu:
        return "torch (no GPU)"
    return "triton (interpreted)" if INTERPRETED else "triton"


def apply_rope(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions, in one pass over memory on a GPU.

    q: (B, T, N, H), k: (B, T, K, H), one floating dtype, any strides (views of a fused qkv too).
    position_ids: (B, T) or (T,) int64 or int32, >= 0, any order, any gaps.
    inv_freq: (H/2,) float64 on q's device, attention_factor: float; both from rope_frequencies.
    Returns new (B, T, N, H) and (B, T, K, H), differentiable in q and k; inputs are never written.
    Raises ValueError if shapes, dtypes or devices do not fit together.
    """
    on_triton = triton is not None and (q.is_cuda or interpret_on_cpu)
    if not on_triton or q.dtype == torch.float64:  # the kernel computes in float32
        return apply_rope_torch(q, k, position_ids, inv_freq, attention_factor)
    position_ids = _checked_ids(q, k, position_ids, inv_freq)
    return _Rope.apply(q, k, position_ids, inv_freq, float(attention_factor), 1.0)
