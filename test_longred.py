"""Every claim of this repository, on a CPU.

    python -m pytest -q test_longred.py

Sections follow the source files. Without a GPU the rotary kernel runs in Triton's interpreter,
which must be chosen before the first import; with one, the very same tests run the compiled
kernel. Comparisons with the real weights use ../shared and skip where it is absent. Oracles:
float64, transformers, or the paper's formula written out by hand.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import rope_kernels
from rope_kernels import apply_rope, apply_rope_torch, ntk_theta, rope_frequencies

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
STORIES = SHARED / "weights" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"real weights: no {STORIES}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
rope_kernels.interpret_on_cpu = False  # what is not about the kernel shall not pay for it
torch.set_num_threads(2)

# -------------------------------------------------------------------------------- rope_kernels.py

NO_TRITON = pytest.mark.skipif(rope_kernels.triton is None, reason="triton is not installed")
PATHS = [pytest.param("kernel", marks=NO_TRITON), "torch"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, N, K, H): grouped, one head, H no power of two, odd T, H at the limit
SHAPES = [(2, 7, 6, 2, 64), (1, 5, 1, 1, 8), (2, 3, 3, 1, 80), (1, 5, 6, 2, 128), (1, 2, 5, 5, 256)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rotate(path, q, k, position_ids, inv_freq, attention_factor=1.0):
    """apply_rope through the kernel, interpreted where there is no GPU, or apply_rope_torch."""
    if path == "torch":
        return apply_rope_torch(q, k, position_ids, inv_freq, attention_factor)
    rope_kernels.interpret_on_cpu = rope_kernels.INTERPRETED
    try:
        return apply_rope(q, k, position_ids, inv_freq, attention_factor)
    finally:
        rope_kernels.interpret_on_cpu = False


def random_qk(shape, dtype=torch.float32, seed=0):
    """q (B, T, N, H), k (B, T, K, H), skipped ids (B, T) up to a million, inv_freq (H/2,)."""
    batch, n_tokens, n_heads, n_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_tokens, n_heads, head_dim, generator=generator)
    k = torch.randn(batch, n_tokens, n_kv_heads, head_dim, generator=generator)
    ids = torch.randint(2**20 + 1, (batch, n_tokens), generator=generator).sort().values
    q, k = (x.to(DEVICE, dtype).requires_grad_() for x in (q, k))
    return q, k, ids.to(DEVICE), rope_frequencies(head_dim, 500_000.0)[0].to(DEVICE)


def assert_rotated(out, x, position_ids, inv_freq, attention_factor=1.0):
    """out is x times e^(i angle) in float64 and complex numbers, up to out's own rounding."""
    first, second = x.detach().double().chunk(2, dim=-1)
    angle = position_ids.double()[..., None, None] * inv_freq  # (B, T, 1, H/2)
    turned = torch.complex(first, second) * torch.polar(angle * 0 + attention_factor, angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    # Rounding to nearest costs half of eps; the interpreter cuts bf16 off, which costs all of it.
    cut = DEVICE == "cpu" and out.dtype == torch.bfloat16
    limits = torch.finfo(out.dtype)
    size = (first.abs() + second.abs()).repeat(1, 1, 1, 2) * attention_factor
    bound = 5e-7 * size + limits.eps * expected.abs() / (1 if cut else 2) + limits.tiny
    assert out.shape == x.shape and out.dtype == x.dtype
    assert ((out.detach().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation_and_its_gradient_match_float64(path, dtype, shape):
    q, k, ids, inv_freq = random_qk(shape, dtype)
    rotated = rotate(path, q, k, ids, inv_freq, 1.25)
    grads_out = [torch.randn_like(x) for x in rotated]
    grads = torch.autograd.grad(rotated, (q, k), grads_out)
    for x, out, grad_out, grad in zip((q, k), rotated, grads_out, grads, strict=True):
        assert_rotated(out, x, ids, inv_freq, 1.25)
        assert_rotated(grad, grad_out, -ids, inv_freq, 1.25)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("theta", [1e4, 5e5, 2e7, 1e9])
def test_cos_and_sin_are_exact_to_1e_6_at_a_million_positions(path, theta):
    inv_freq = rope_frequencies(128, theta)[0].to(DEVICE)
    ids = torch.cat((torch.arange(512), torch.arange(0, 2**20, 1021), 2**20 - torch.arange(512)))
    ones = torch.cat((torch.ones(1, len(ids), 1, 64), torch.zeros(1, len(ids), 1, 64)), dim=-1)
    ids, ones = ids.to(DEVICE), ones.to(DEVICE)
    cos, sin = rotate(path, ones, ones, ids, inv_freq)[0][0, :, 0].double().chunk(2, dim=-1)
    angle = ids.double()[:, None] * inv_freq
    assert (cos - angle.cos()).abs().max() < 1e-6
    assert (sin - angle.sin()).abs().max() < 1e-6
    usual = (ids.float()[:, None] * inv_freq.float()).cos()
    assert (usual - angle.cos()).abs().max() > 1e-3  # what the 64-bit turn is for


@NO_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_and_torch_agree_bit_for_bit(dtype):
    q, k, ids, inv_freq = random_qk((2, 9, 6, 2, 80), dtype)
    kernel, plain = (rotate(path, q, k, ids, inv_freq, 1.1386) for path in ("kernel", "torch"))
    grads_out = [torch.randn_like(x) for x in plain]
    kernel += torch.autograd.grad(kernel, (q, k), grads_out)
    plain += torch.autograd.grad(plain, (q, k), grads_out)
    assert all(torch.equal(a, b) for a, b in zip(kernel, plain, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_skipped_ids_give_the_products_of_the_full_sequence(path):
    q, k, _, inv_freq = random_qk((1, 48, 6, 2, 64))
    ids = torch.tensor([0, 1, 5, 6, 19, 30, 47], device=DEVICE)
    full_q, full_k = rotate(path, q, k, torch.arange(48, device=DEVICE), inv_freq)
    some_q, some_k = rotate(path, q[:, ids], k[:, ids], ids, inv_freq)
    full = torch.einsum("btnh,bskh->bnkts", full_q, full_k)
    some = torch.einsum("btnh,bskh->bnkts", some_q, some_k)
    torch.testing.assert_close(some, full[..., ids[:, None], ids], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_ids_may_be_one_row_for_all_and_int32(path):
    q, k, ids, inv_freq = random_qk((3, 7, 6, 2, 8))
    expected = rotate(path, q, k, ids[1].expand(3, 7).contiguous(), inv_freq)
    for same in (ids[1], ids[1:2], ids[1].int(), ids[1].repeat_interleave(2)[::2]):
        result = rotate(path, q, k, same, inv_freq)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["fused qkv", "heads before tokens", "last stride 2"])
def test_strided_views_rotate_as_contiguous_tensors_do(path, layout):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    if layout == "fused qkv":
        fused = torch.cat((q, k, torch.full_like(k, torch.nan)), dim=2).detach()  # v: never read
        views = fused[:, :, :6], fused[:, :, 6:8]
    elif layout == "heads before tokens":
        views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    else:
        views = [x.detach().repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k)]
    assert not any(view.is_contiguous() for view in views)
    for out, expected in zip(
        rotate(path, *views, ids, inv_freq), rotate(path, q, k, ids, inv_freq), strict=True
    ):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("path", PATHS)
def test_offsets_beyond_two_to_the_31_are_reached(path):
    far = 2**30 + 8  # between tokens, in numbers; the memory between is never touched
    storage = torch.empty(2 * far + 8, dtype=torch.float16, device=DEVICE)
    view = storage.as_strided((1, 3, 1, 8), (0, far, 0, 1))
    ids, inv_freq = torch.arange(3, device=DEVICE), rope_frequencies(8, 1e4)[0].to(DEVICE)
    near = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(0)).to(view)
    view.copy_(near)
    q, k = rotate(path, view, near, ids, inv_freq)
    assert torch.equal(q, k)


@pytest.mark.parametrize("path", PATHS)
def test_expanded_gradients_are_read_and_nothing_given_is_written(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    one = torch.ones((), device=DEVICE)
    grads_out = [one.expand(q.shape), one.expand(k.shape)]  # what .sum() sends: every stride 0
    given = [q, k, ids, inv_freq, one]
    before = [x.detach().clone() for x in given]
    grads = torch.autograd.grad(rotate(path, q, k, ids, inv_freq), (q, k), grads_out)
    for grad, grad_out in zip(grads, grads_out, strict=True):
        assert_rotated(grad, grad_out, -ids, inv_freq)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@NO_TRITON
def test_kernel_saves_ids_and_frequencies_only():
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rotate("kernel", q, k, ids, inv_freq)
    assert sorted(x.data_ptr() for x in saved) == sorted((ids.data_ptr(), inv_freq.data_ptr()))


def test_float64_inputs_pass_gradcheck():
    q, k, ids, inv_freq = random_qk((1, 3, 2, 1, 8), torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, ids, inv_freq, 1.1), (q, k))
    angle = ids.double()[0, :, None] * inv_freq
    unit = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).to(q).expand(1, 3, 1, 8)
    assert (
        apply_rope(unit, unit, ids, inv_freq)[0][0, :, 0, 0] - angle[:, 0].cos()
    ).abs().max() < 1e-9


@NO_TRITON
def test_gradient_of_the_gradient_is_the_rotation_itself():
    q, k, ids, inv_freq = random_qk((1, 3, 2, 1, 8))
    rotated = rotate("kernel", q, k, ids, inv_freq)
    grads_out = [torch.randn_like(x, requires_grad=True) for x in rotated]
    grads = torch.autograd.grad(rotated, (q, k), grads_out, create_graph=True)
    back = torch.autograd.grad(grads, grads_out, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(back, rotated, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_compiles_as_one_graph_forward_and_backward(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    # On a CPU inductor adds a C++ compiler and half a minute; graph and gradient are the same.
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    def score(q, k):
        q, k = rotate(path, 2 * q, 2 * k, ids, inv_freq, 1.1)
        return (q[:, :, :2] * k).square().sum() + q.square().sum()

    compiled = torch.compile(score, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(score(q, k), (q, k))
    grads = torch.autograd.grad(compiled(q, k), (q, k))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_checkpointing_changes_no_bit(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))

    def score(q, k):
        q, k = rotate(path, q.sin(), k.sin(), ids, inv_freq)
        return q.square().sum() + (q[:, :, :2] * k).sum()

    kept = torch.autograd.grad(score(q, k), (q, k))
    again = torch.utils.checkpoint.checkpoint(score, q, k, use_reentrant=False)
    again = torch.autograd.grad(again, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


POSITION = st.integers(0, 2**20)
CASES = {"path": st.sampled_from(["torch"] + ["kernel"] * (rope_kernels.triton is not None))}
CASES |= {"half": st.sampled_from([1, 4, 20, 32, 40]), "seed": st.integers(0, 999)}
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


@PROPERTY
@given(ids=st.lists(POSITION, min_size=1, max_size=9), **CASES)
def test_norms_of_planes_are_kept_and_the_gradient_rotates_back(ids, path, half, seed):
    q, k, _, inv_freq = random_qk((1, len(ids), 3, 1, 2 * half), seed=seed)
    ids = torch.tensor(ids, device=DEVICE)
    rotated, _ = rotate(path, q, k, ids, inv_freq)
    norm, kept = (x.unflatten(-1, (2, half)).norm(dim=-2) for x in (q, rotated))
    torch.testing.assert_close(kept, norm, rtol=2e-6, atol=1e-9)
    (back,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(back, q, rtol=0, atol=4e-6)


@PROPERTY
@given(first=POSITION, second=POSITION, shift=POSITION, **CASES)
def test_only_relative_position_matters(first, second, shift, path, half, seed):
    q, k, _, inv_freq = random_qk((1, 1, 1, 1, 2 * half), seed=seed)

    def product(q_position, k_position):
        ids = torch.tensor([[q_position], [k_position]], device=DEVICE)  # (2, 1): q's row, k's row
        both = rotate(path, q.expand(2, 1, 1, -1), k.expand(2, 1, 1, -1), ids, inv_freq)
        return (both[0][0] * both[1][1]).sum()

    size = (q.norm() * k.norm()).item()
    moved = product(first + shift, second + shift)
    assert abs((product(first, second) - moved).item()) < 3e-6 * size


@PROPERTY
@given(batch=st.integers(1, 4), n_tokens=st.integers(1, 9), heads=st.integers(1, 5), **CASES)
def test_batch_rows_are_independent(batch, n_tokens, heads, path, half, seed):
    q, k, ids, inv_freq = random_qk((batch, n_tokens, heads, 1, 2 * half), seed=seed)
    together = rotate(path, q, k, ids, inv_freq)
    for b in range(batch):
        alone = rotate(path, q[b : b + 1], k[b : b + 1], ids[b], inv_freq)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        YARN,
        YARN | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        YARN | {"original_max_position_embeddings": 65_536},  # the ramp ends past the last plane
        LLAMA3,
    ],
    ids=lambda scaling: "-".join(list(scaling)[:1] + [scaling["rope_type"], str(len(scaling))]),
)
@pytest.mark.parametrize("head_dim, theta", [(64, 1e4), (128, 5e5), (80, 2e7)])
def test_scalings_match_transformers(scaling, head_dim, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    inv_freq, attention_factor = rope_frequencies(head_dim, theta, scaling | {"rope_theta": theta})
    assert inv_freq.dtype == torch.float64 and inv_freq.shape == (head_dim // 2,)
    torch.testing.assert_close(inv_freq, expected.double(), rtol=3e-6, atol=0)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-9)


def test_ntk_slows_the_slowest_plane_by_exactly_the_factor():
    plain, _ = rope_frequencies(64, 1e4)
    scaled, attention_factor = rope_frequencies(64, 1e4, {"type": "ntk", "factor": 8.0})
    folded, _ = rope_frequencies(64, ntk_theta(64, 1e4, 8.0))
    assert attention_factor == 1.0 and torch.equal(scaled, folded)
    assert scaled[0] == plain[0] and (plain[-1] / scaled[-1]).item() == pytest.approx(
        8.0, rel=1e-12
    )


@pytest.mark.parametrize(
    "words, head_dim, theta, scaling",
    [
        ("rope_type: got 'dynamic'", 64, 1e4, {"rope_type": "dynamic", "factor": 2.0}),
        ("factor: got none, need a number for linear", 64, 1e4, {"rope_type": "linear"}),
        ("factor: got 0.5", 64, 1e4, {"type": "linear", "factor": 0.5}),
        ("factor: got inf", 64, 1e4, {"rope_type": "ntk", "factor": float("inf")}),
        ("factor: got '4'", 64, 1e4, {"rope_type": "yarn", "factor": "4"}),
        ("original_max_position_embeddings: got none", 64, 1e4, {"type": "yarn", "factor": 2.0}),
        ("high_freq_factor: got 1.0", 64, 1e4, LLAMA3 | {"high_freq_factor": 1.0}),
        ("low_freq_factor: got none", 64, 1e4, LLAMA3 | {"low_freq_factor": None}),
        ("partial_rotary_factor: got 0.5", 64, 1e4, {"partial_rotary_factor": 0.5}),
        ("head_dim: got 63", 63, 1e4, None),
        ("head_dim: got 2, need 4 or more", 2, 1e4, {"rope_type": "ntk", "factor": 2.0}),
        ("rope_theta: got -1.0", 64, -1.0, None),
        ("rope_theta: got nan", 64, float("nan"), None),
    ],
)
def test_wrong_frequencies_are_refused_in_one_line(words, head_dim, theta, scaling):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        rope_frequencies(head_dim, theta, scaling)
    assert "\n" not in str(error.value) and ", try " in str(error.value)


@pytest.mark.parametrize("path", PATHS)
def test_wrong_tensors_are_refused_in_one_line(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    for words, arguments in {
        "q and k: got (2, 5, 6, 64)": (q, k[:, :4], ids, inv_freq),
        "of one dtype": (q, k.bfloat16(), ids, inv_freq),
        "need (B, T, N, H)": (q.flatten(2), k, ids, inv_freq),
        "position_ids: got torch.float32": (q, k, ids.float(), inv_freq),
        "position_ids: got shape (2, 4), need (2, 5)": (q, k, ids[:, :4], inv_freq),
        "inv_freq: got (64,) for head_dim 64": (q, k, ids, inv_freq.repeat(2)),
        "need one, try .to(q.device)": (q, k, ids.to("meta"), inv_freq),
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            rotate(path, *arguments)
        assert "\n" not in str(error.value) and ", try " in str(error.value)


def compiled_launch(monkeypatch, capability, shape, dtype):
    """What Triton's own launcher compiles for views of a fused qkv of this shape; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = get_current_stream = lambda self, device=None: 0
        get_current_target = lambda self: GPUTarget("cuda", capability, 32)  # noqa: E731

    class CompileOnly(JITFunction):
        def __getitem__(self, grid):
            return lambda *a, **options: compiled.append(self.warmup(*a, grid=grid, **options))

    compiled = []
    for name in ("_rope_kernel", "_cos_kernel", "_rotate_kernel"):
        jit = CompileOnly if name == "_rope_kernel" else JITFunction
        monkeypatch.setattr(rope_kernels, name, jit(getattr(rope_kernels, name).fn))
    monkeypatch.setattr(rope_kernels, "INTERPRETED", False)
    monkeypatch.setattr(rope_kernels.triton.runtime.driver, "_active", Driver())
    batch, n_tokens, n_heads, n_kv_heads, head_dim = shape
    heads = n_heads, n_kv_heads, n_kv_heads
    qkv = torch.empty(batch, n_tokens, sum(heads), head_dim, dtype=dtype, device="meta")
    ids = torch.empty(batch, n_tokens, dtype=torch.int64, device="meta")
    inv_freq = torch.empty(head_dim // 2, dtype=torch.float64, device="meta")
    rope_kernels._launch(*qkv.split(heads, dim=2)[:2], ids, inv_freq, 1.0, 1.0)
    return compiled[0]


@NO_TRITON
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 32768, 32, 8, 128), torch.bfloat16),  # Llama-3-8B
        ((1, 32768, 32, 8, 128), torch.float32),
        ((2, 512, 9, 3, 64), torch.bfloat16),  # SmolLM2-135M: heads no power of two
        ((1, 4096, 32, 32, 80), torch.float16),
    ],
    ids=str,
)
def test_machine_code_loads_16_bytes_and_uses_no_local_memory(
    monkeypatch, capability, shape, dtype
):
    kernel = compiled_launch(monkeypatch, capability, shape, dtype)
    ptx = kernel.asm["ptx"]
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(store.endswith(".v4.b32") for store in stores)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == len(stores)  # q and k; ids are apart
    assert ".local" not in ptx and "fma.rn.f32" not in ptx and not kernel.metadata.enable_fp_fusion
    assert "0d3FC45F306DC9C883" in ptx  # 1 / 2 pi to all the bits of float64


def test_without_triton_the_module_imports_and_rotates_in_torch():
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import torch, rope_kernels
q, ids = torch.randn(1, 3, 2, 8, requires_grad=True), torch.arange(3)
inv_freq, _ = rope_kernels.rope_frequencies(8, 1e4)
rotated, _ = rope_kernels.apply_rope(q, q, ids, inv_freq)
rotated.sum().backward()
assert torch.equal(rotated, rope_kernels.apply_rope_torch(q, q, ids, inv_freq)[0])
print(rope_kernels.rope_backend("cpu"), "|", rope_kernels.rope_backend("cuda"))
"""
    folder = os.path.dirname(rope_kernels.__file__)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.stdout.strip() == " | ".join(2 * ["torch (triton is not installed)"]), (
        result.stderr
    )


@NO_TRITON
def test_the_chosen_path_is_told(monkeypatch):
    kernel = "triton (interpreted)" if rope_kernels.INTERPRETED else "triton"
    assert rope_kernels.rope_backend("cpu") == "torch (no GPU)"
    assert rope_kernels.rope_backend("cuda:1") == kernel
    monkeypatch.setattr(rope_kernels, "interpret_on_cpu", rope_kernels.INTERPRETED)
    assert rope_kernels.rope_backend(DEVICE) == kernel
