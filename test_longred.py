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
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import model as model_module
import rope_kernels
from model import (
    Llama,
    ModelConfig,
    attention_kl,
    load_checkpoint,
    load_config,
    next_token_loss,
    save_checkpoint,
)
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


# --------------------------------------------------------------------------------------- model.py


def tiny_config(**changes) -> ModelConfig:
    """A Llama whose numbers all differ: GQA 6:2, head_dim not d_model / n_heads."""
    shape = dict(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=80)
    shape |= dict(vocab_size=96, max_position_embeddings=64, rope_theta=500.0)
    return ModelConfig(**(shape | changes))


def tiny_llama(seed=0, std=0.2, **changes) -> Llama:
    """At the usual std of 0.02 attention is flat and a wrong theta hardly shows; 0.2 shows it."""
    model = Llama(tiny_config(**changes))
    return model.init_weights(std, torch.Generator().manual_seed(seed)).eval()


def tokens(batch=2, length=33, vocab=96, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def hf_model(folder, **more):
    """The folder as transformers reads it, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **more
    ).eval()


def rel(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("skipped", [False, True])
def test_logits_and_every_hidden_state_equal_transformers(tmp_path, tie, skipped):
    model = tiny_llama(tie_embeddings=tie)
    theirs = hf_model(save_checkpoint(model, tmp_path / "hf"))
    ids = tokens()
    positions = torch.arange(33) + (torch.arange(33) > 9) * 200 if skipped else torch.arange(33)
    positions = positions.expand(2, -1)
    taps = tuple(range(4))
    with torch.no_grad():
        last, hidden = model(ids, positions, taps)
        want = theirs(ids, position_ids=positions, output_hidden_states=True)
        assert rel(model.logits(last), want.logits) < 1e-4
    for i in taps:
        assert rel(hidden[i], want.hidden_states[i]) < 1e-4, i
    assert last is hidden[3]


@pytest.mark.parametrize(
    "extension",
    [
        {"rope_theta": 9000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
    ],
)
def test_transformers_opens_what_we_save_after_an_extension(tmp_path, extension):
    save_checkpoint(tiny_llama(), tmp_path / "original")
    model = load_checkpoint(tmp_path / "original", **extension)
    theirs = hf_model(save_checkpoint(model, tmp_path / "extended"))
    ours, ids = load_checkpoint(tmp_path / "extended"), tokens(length=201)
    with torch.no_grad():
        want = theirs(ids).logits
        plain = load_checkpoint(tmp_path / "original")
        assert rel(model.logits(model(ids)[0]), want) < 1e-4
        assert rel(ours.logits(ours(ids)[0]), want) < 1e-4
        assert rel(plain.logits(plain(ids)[0]), want) > 1e-2  # the extension did something


def test_we_open_what_transformers_saves_sharded_or_not(tmp_path):
    config = transformers.LlamaConfig(**tiny_config().to_hf(), initializer_range=0.2)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = tokens()
    for folder in ("one", "many"):
        ours = load_checkpoint(tmp_path / folder)
        with torch.no_grad():
            assert rel(ours.logits(ours(ids)[0]), theirs(ids).logits) < 1e-4
    assert load_config(tmp_path / "one").rope_theta == 500.0


def test_a_sharded_save_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "SHARD_SIZE", 60_000)
    model = tiny_llama()
    save_checkpoint(model, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    again = load_checkpoint(tmp_path / "hf")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert rel(hf_model(tmp_path / "hf")(tokens()).logits, model.logits(model(tokens())[0])) < 1e-4


def test_rotary_frequencies_survive_casts_of_the_module():
    model = tiny_llama().to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float64
    assert torch.equal(model.inv_freq, rope_frequencies(16, 500.0)[0])


@pytest.mark.parametrize("rows", [5, 66, 1000])
def test_chunked_cross_entropy_equals_the_plain_one(rows):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 33, 48, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(96, 48, generator=g, dtype=torch.float64).requires_grad_()
    labels = tokens().masked_fill(torch.rand(2, 33, generator=g) < 0.2, -100)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    want = torch.autograd.grad(3 * plain, (hidden, weight))
    total, count = next_token_loss(hidden.float(), weight.float(), labels, chunk_rows=rows)
    got = torch.autograd.grad(3 * total, (hidden, weight))
    assert count == (labels != -100).sum() and total.dtype == torch.float32
    assert rel(total, plain) < 1e-6
    assert rel(got[0], want[0]) < 1e-5 and rel(got[1], want[1]) < 1e-5


def test_cross_entropy_never_holds_all_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(1, 1024, 8, requires_grad=True), torch.randn(500, 8)
    with Largest() as largest:
        total, _ = next_token_loss(hidden, weight, tokens(1, 1024, 500))
        total.backward()
    assert 256 * 500 <= largest.numel < 1024 * 500 // 2


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = tiny_llama()
        model.checkpoint_blocks = recompute
        total, count = next_token_loss(model(tokens())[0], model.lm_head_weight, tokens(seed=2))
        (total / count).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_cached_generation_equals_uncached_and_transformers(tmp_path):
    model, ids = tiny_llama(), tokens(length=7)
    got = model.generate(ids, 20)
    slow = ids
    for _ in range(20):
        with torch.no_grad():
            new = model.logits(model(slow)[0][:, -1]).argmax(-1, keepdim=True)
        slow = torch.cat([slow, new], 1)
    assert torch.equal(got, slow)
    theirs = hf_model(save_checkpoint(model, tmp_path / "hf"))
    theirs.generation_config.eos_token_id = None
    assert torch.equal(got, theirs.generate(ids, max_new_tokens=20, do_sample=False))


def test_a_prompt_may_be_read_in_pieces():
    model, ids = tiny_llama(), tokens()
    cache = model.new_cache(2, 33)
    with torch.no_grad():
        pieces = [model(part, cache=cache)[0] for part in ids.split([10, 1, 22], dim=1)]
        assert rel(torch.cat(pieces, 1), model(ids)[0]) < 1e-5


def test_sampling_follows_its_generator_and_temperature():
    model, ids = tiny_llama(), tokens(1, 5).expand(400, -1)
    a, b = (model.generate(ids, 1, 1.0, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(a, b) and len(a[:, -1].unique()) > 3
    with torch.no_grad():
        p = model.logits(model(ids[:1])[0][0, -1]).softmax(-1)
    seen = torch.bincount(a[:, -1], minlength=96) / 400
    assert (seen - p).abs().max() < 4 * (0.25 / 400) ** 0.5  # four standard errors


def test_attention_kl_equals_transformers_attention_maps(tmp_path, monkeypatch):
    save_checkpoint(tiny_llama(), tmp_path / "hf")
    a, b = load_checkpoint(tmp_path / "hf"), load_checkpoint(tmp_path / "hf", rope_theta=9000.0)
    save_checkpoint(b, tmp_path / "b")
    ids, maps = tokens(), []
    for folder in ("hf", "b"):
        with torch.no_grad():
            maps.append(hf_model(tmp_path / folder)(ids, output_attentions=True).attentions)
    want = torch.stack(
        [
            torch.special.xlogy(p, p / q.clamp_min(1e-38)).sum(-1).mean((0, 2))
            for p, q in zip(*maps, strict=True)
        ]
    )
    got = attention_kl(a, b, ids)
    assert got.shape == (3, 6) and want.min() > 1e-4
    assert rel(got, want) < 1e-3
    assert attention_kl(a, a, ids).abs().max() == 0
    tokens_by_row = attention_kl(a, b, ids[:, :1])
    assert tokens_by_row.abs().max() < 1e-6  # one token attends to itself in both


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensor.*model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown 1 tensor.*extra"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 48)}), r"lm_head.weight.*\(3, 48\)"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, said):
    folder = save_checkpoint(tiny_llama(), tmp_path / "hf")
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(folder)


def test_what_old_writers_leave_in_the_file_is_ignored(tmp_path):
    folder = save_checkpoint(tiny_llama(tie_embeddings=True), tmp_path / "hf")

    def change(t):
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, change)
    assert load_checkpoint(folder).config.tie_embeddings


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights_are_named(tmp_path, damage):
    path = save_checkpoint(tiny_llama(), tmp_path / "hf") / "model.safetensors"
    raw = path.read_bytes()
    kept = {"truncated": raw[: len(raw) // 2], "header": b"\xff" * 8 + raw[8:], "empty": b""}
    path.write_bytes(kept[damage])
    with pytest.raises(ValueError, match="model.safetensors is missing, truncated or damaged"):
        load_checkpoint(path.parent)


def test_two_scalings_on_top_of_each_other_are_refused(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    save_checkpoint(tiny_llama(rope_scaling=linear), tmp_path / "hf")
    with pytest.raises(ValueError, match="already scaled"):
        load_checkpoint(tmp_path / "hf", rope_scaling=linear)
    assert load_checkpoint(tmp_path / "hf", rope_theta=9e3).config.rope_scaling == linear
    removed = load_checkpoint(tmp_path / "hf", rope_scaling={"rope_type": "default"})
    assert removed.config.rope_scaling is None


def test_a_save_replaces_only_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no checkpoint"):
        save_checkpoint(tiny_llama(), tmp_path / "thesis")
    save_checkpoint(tiny_llama(), tmp_path / "hf")
    save_checkpoint(tiny_llama(seed=5), tmp_path / "hf")
    assert torch.equal(load_checkpoint(tmp_path / "hf").norm.weight, tiny_llama(5).norm.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "thesis"]


def test_weights_are_never_twice_in_memory(tmp_path):
    model = tiny_llama(d_model=1024, vocab_size=30_000, d_ff=4096, std=0.02)
    save_checkpoint(model, tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    code = """
import resource, sys, model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
m = model.load_checkpoint(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "hf"], cwd=HERE, capture_output=True, text=True
    )
    grown = int(out.stdout)
    largest = 30_000 * 1024 * 4
    assert size > 3e8 and grown < size + largest + 40e6, (grown, size)


@needs_stories
def test_stories260k_continues_a_story_as_transformers_does():
    ours, theirs = load_checkpoint(STORIES), hf_model(STORIES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time, there was a little girl", return_tensors="pt").input_ids
    theirs.generation_config.eos_token_id = None
    got = ours.generate(ids, 200)
    assert torch.equal(got, theirs.generate(ids, max_new_tokens=200, do_sample=False))
    assert "Lily" in tokenizer.decode(got[0])
    skipped = torch.arange(ids.shape[1])[None] * 7
    with torch.no_grad():
        want = theirs(ids, position_ids=skipped).logits
        assert rel(ours.logits(ours(ids, skipped)[0]), want) < 1e-4
