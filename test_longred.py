"""Every claim of this repository, on a CPU.

    python -m pytest -q test_longred.py

Sections follow the source files. Without a GPU the rotary kernel runs in Triton's interpreter,
which must be chosen before the first import; with one, the very same tests run the compiled
kernel. Comparisons with the real weights use ../shared and skip where it is absent. Oracles:
float64, transformers, or the paper's formula written out by hand.
"""

import base64
import collections
import contextlib
import dataclasses
import datetime
import functools
import gzip
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import bench
import data
import evaluate
import longred
import memory
import model as model_module
import rope_kernels
import runs
from longred import (
    Config,
    cosine_distance,
    default_theta,
    long_text_loss,
    main,
    plan_streams,
    resolve,
    select_distill_layers,
    short_text_distillation,
    short_to_long_distillation,
    train,
    write_byte_tokenizer,
)
from model import (
    Llama,
    ModelConfig,
    attention_kl,
    load_checkpoint,
    load_config,
    next_token_loss,
    resolve_checkpoint,
    save_checkpoint,
)
from rope_kernels import apply_rope, apply_rope_torch, ntk_theta, rope_frequencies

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
STORIES = SHARED / "weights" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"real weights: no {STORIES}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
rope_kernels.interpret_on_cpu = False  # what is not about the kernel shall not pay for it
torch.set_num_threads(1)  # tiny shapes: threads would mostly wait for each other

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


LAYOUTS = {
    "part of a fused qkv": lambda x: torch.cat((x, x * torch.nan), dim=2)[:, :, : x.shape[2]],
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views_rotate_as_contiguous_tensors_do(path, layout):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    views = [LAYOUTS[layout](x.detach()) for x in (q, k)]
    assert not any(view.is_contiguous() for view in views)
    got, want = rotate(path, *views, ids, inv_freq), rotate(path, q, k, ids, inv_freq)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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
def test_composes_with_compile_as_one_graph_and_with_checkpointing(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    # On a CPU inductor adds a C++ compiler and half a minute; graph and gradient are the same.
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    def score(q, k):
        q, k = rotate(path, q.sin(), k.sin(), ids, inv_freq, 1.1)
        return (q[:, :, :2] * k).square().sum() + q.square().sum()

    expected = torch.autograd.grad(score(q, k), (q, k))
    again = torch.utils.checkpoint.checkpoint(score, q, k, use_reentrant=False)
    again = torch.autograd.grad(again, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    compiled = torch.compile(score, fullgraph=True, backend=backend)
    grads = torch.autograd.grad(compiled(q, k), (q, k))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)


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
        ("factor: got 1000000", 64, 1e4, {"rope_type": "ntk", "factor": 10**400}),
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


def hf_model(folder):
    """The folder as transformers reads it, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
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
    last, hidden = model(ids, positions, taps)
    want = theirs(ids, position_ids=positions, output_hidden_states=True)
    assert rel(model.logits(last), want.logits) < 1e-4
    for i in taps:
        assert rel(hidden[i], want.hidden_states[i]) < 1e-4, i
    assert last is hidden[3]


def test_shards_are_read_as_transformers_writes_them_and_written_as_it_reads_them(
    tmp_path, monkeypatch
):
    config = transformers.LlamaConfig(**tiny_config().to_hf(), initializer_range=0.2)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, ids = load_checkpoint(tmp_path / "theirs"), tokens()
    monkeypatch.setattr(model_module, "SHARD_SIZE", 60_000)
    save_checkpoint(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    again = load_checkpoint(tmp_path / "ours")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert rel(model.logits(model(ids)[0]), theirs(ids).logits) < 1e-4
    assert rel(hf_model(tmp_path / "ours")(ids).logits, theirs(ids).logits) < 1e-4


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


def test_cached_generation_equals_uncached_and_transformers(tmp_path):
    model, ids = tiny_llama(), tokens(length=7)
    got = model.generate(ids, 20)
    slow = ids
    for _ in range(20):
        new = model.logits(model(slow)[0][:, -1]).argmax(-1, keepdim=True)
        slow = torch.cat([slow, new], 1)
    assert torch.equal(got, slow)
    theirs = hf_model(save_checkpoint(model, tmp_path / "hf"))
    theirs.generation_config.eos_token_id = None
    assert torch.equal(got, theirs.generate(ids, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("chunk_len", [1, 5, 32])
def test_a_prompt_read_in_chunks_continues_token_for_token(chunk_len):
    model, ids = tiny_llama(), tokens()
    assert torch.equal(model.generate(ids, 12, chunk_len=chunk_len), model.generate(ids, 12))


def test_generation_applies_the_lm_head_to_last_positions_only(monkeypatch):
    model, seen = tiny_llama(), []
    logits = Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda m, h: seen.append(h.shape) or logits(m, h))
    model.generate(tokens(), 3, chunk_len=8)
    assert seen == [(2, 48)] * 3


def test_sampling_follows_its_generator_and_temperature():
    model, ids = tiny_llama(), tokens(1, 5).expand(400, -1)
    a, b = (model.generate(ids, 1, 2.0, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(a, b) and len(a[:, -1].unique()) > 3
    p = (model.logits(model(ids[:1])[0][0, -1]) / 2.0).softmax(-1)
    seen = torch.bincount(a[:, -1], minlength=96) / 400
    assert (seen - p).abs().max() < 4 * (0.25 / 400) ** 0.5  # four standard errors


def pcd_by_hand(near, far, ids, n_new, beta, gamma):
    """Contrastive decoding with two models, no cache, one row at a time."""
    rows = []
    for row in ids:
        for _ in range(n_new):
            logits, local = (m.logits(m(row[None])[0][0, -1]) for m in (near, far))
            allowed = logits.argsort(descending=True)[:gamma]
            scores = (1 + beta) * logits[allowed] - beta * local[allowed]
            row = torch.cat([row, allowed[scores.argmax()][None]])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"beta": 20.0, "gamma": 4, "base_ratio": 1e-2}], ids=str)
def test_pcd_equals_two_separate_models_without_a_cache(changes):
    near, far, ids = tiny_llama(), tiny_llama(), tokens(length=17)
    pcd = {"alpha": 0.2, "beta": 2.5, "base_ratio": 1e-4, "gamma": 30} | changes
    for j in range(1, 9):  # H = 16: planes 1 .. 8
        keep = 2 - math.exp(pcd["alpha"] * 2 * j / 16)
        slow = near.inv_freq[j - 1] * pcd["base_ratio"] ** (-2 * (j - 1) / 16)
        far.inv_freq[j - 1] = keep * near.inv_freq[j - 1] + (1 - keep) * slow
    want = pcd_by_hand(near, far, ids, 24, pcd["beta"], pcd["gamma"])
    assert torch.equal(near.generate(ids, 24, pcd=changes, chunk_len=5), want)
    assert not torch.equal(near.generate(ids, 24), want)


def test_pcds_slowest_plane_turns_1918_times_faster_in_llama_3():
    own = rope_frequencies(128, 5e5)[0]
    ratio = model_module.local_frequencies(own, 0.2, 1e-4) / own
    assert ratio[0] == pytest.approx(1.0) and ratio[-1].item() == pytest.approx(1918, abs=0.5)


def test_a_misspelt_pcd_setting_is_refused():
    with pytest.raises(ValueError, match="pcd: got betta, need some of alpha, beta"):
        tiny_llama().generate(tokens(), 1, pcd={"betta": 1.0})


def test_attention_kl_equals_transformers_attention_maps(tmp_path, monkeypatch):
    save_checkpoint(tiny_llama(), tmp_path / "hf")
    a, b = load_checkpoint(tmp_path / "hf"), load_checkpoint(tmp_path / "hf", rope_theta=9000.0)
    save_checkpoint(b, tmp_path / "b")
    ids = tokens()
    maps = [hf_model(tmp_path / f)(ids, output_attentions=True).attentions for f in ("hf", "b")]
    terms = [torch.special.xlogy(p, p / q.clamp_min(1e-38)) for p, q in zip(*maps, strict=True)]
    want = torch.stack([t.sum(-1).mean((0, 2)) for t in terms])
    assert want.shape == (3, 6) and want.min() > 1e-4
    for numbers in (model_module.KL_NUMBERS, 2 * 6 * 33 * 5):  # all rows at once; 5 at a time
        monkeypatch.setattr(model_module, "KL_NUMBERS", numbers)
        assert rel(attention_kl(a, b, ids), want) < 1e-3
        assert attention_kl(a, a, ids).abs().max() == 0
    one_token = attention_kl(a, b, ids[:, :1])
    assert one_token.abs().max() < 1e-6  # attends to itself in both


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensor.*model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown 1 tensor.*extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).char()}), "norm.weight is I8"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 48)}), r"lm_head.* F32 \[3, 48\]"),
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
    embedding = load_checkpoint(tmp_path / "hf").embed_tokens.weight
    assert torch.equal(embedding, tiny_llama(5).embed_tokens.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "thesis"]


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_weights_are_never_twice_in_memory(tmp_path, kind):
    model = tiny_llama(d_model=1024, vocab_size=30_000, d_ff=4096, std=0.02)
    size = sum(p.numel() * 4 for p in model.parameters())
    if kind == "hf":
        save_checkpoint(model, tmp_path / "it")
    else:
        meta_folder(tmp_path / "it", model, 2)
    code = """
import resource, sys, model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
m = model.load_checkpoint(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "it"], cwd=HERE, capture_output=True, text=True
    )
    grown = int(out.stdout)
    largest = 30_000 * 1024 * 4
    assert size > 3e8 and grown < size + largest + 40e6, (grown, size)


FAMILIES = {
    "llama": dict(rope_theta=500.0),
    "llama 3.2": dict(
        rope_theta=5000.0,
        tie_word_embeddings=True,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32},
    ),
    "llama biased": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=None, rope_theta=1000.0),
    "qwen2": dict(use_sliding_window=False, rope_theta=1000.0),
}
EXTENSIONS = {
    "none": {},
    "theta": {"rope_theta": 9000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 4.0}},
}


def family_folder(folder, family):
    """A tiny random checkpoint of that family, written by transformers."""
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[family.split()[0]]
    shape = tiny_config().to_hf() | dict(rope_scaling=None, head_dim=8, initializer_range=0.2)
    shape = {k: v for k, v in shape.items() if k not in ("architectures", "model_type")}
    config = getattr(transformers, f"{kind}Config")(**(shape | FAMILIES[family]))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):  # zeros would hide a bias that is not read
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers_both_ways_after_each_extension(tmp_path, family):
    theirs, ids = family_folder(tmp_path / "hf", family), tokens(length=101)
    for name, extension in EXTENSIONS.items():
        if family == "llama 3.2" and "rope_scaling" in extension:
            with pytest.raises(ValueError, match="already scaled"):
                load_checkpoint(tmp_path / "hf", **extension)
            continue
        ours = load_checkpoint(tmp_path / "hf", **extension)
        ours.config.max_position_embeddings = 256
        again = hf_model(save_checkpoint(ours, tmp_path / name))
        reread = load_checkpoint(tmp_path / name)
        got, before = ours.logits(ours(ids)[0]), theirs(ids).logits
        assert rel(got, again(ids).logits) < 1e-4, name
        assert rel(reread.logits(reread(ids)[0]), got) < 1e-5, name
        assert (rel(got, before) < 1e-4) == (name == "none"), name
        assert type(again) is type(theirs) and again.config.max_position_embeddings == 256
        assert again.config.tie_word_embeddings == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spellings_of_transformers_4_and_5_read_alike(tmp_path, family):
    family_folder(tmp_path, family)
    five, four = (json.loads((tmp_path / "config.json").read_text()) for _ in range(2))
    rope = four.pop("rope_parameters")
    four |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": four.pop("dtype")}
    four["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    older = four | {"rope_scaling": rope | {"type": rope["rope_type"]}}
    older["rope_scaling"].pop("rope_type")  # as before 4.43
    read = [ModelConfig.from_hf(hf) for hf in (five, four, older)]
    assert [c.stored_dtype() for c in read] == [torch.float32] * 3
    assert len({str(dataclasses.replace(c, hf={})) for c in read}) == 1
    assert "rope_parameters" not in read[0].to_hf() and read[0].to_hf()["rope_theta"]


def meta_folder(folder, model, shards, embedding_dim=0, **params):
    """The model as Meta's own files: other names, neighbours paired, cut across `shards` files."""
    c = model.config
    folder.mkdir()
    state = {}
    for name, t in model.state_dict().items():
        name = name.replace("self_attn.", "attention.").replace("mlp.", "feed_forward.")
        for ours, theirs in zip(
            "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj embed_tokens lm_head "
            "input_layernorm post_attention_layernorm".split(),
            "wq wk wv wo w1 w2 w3 tok_embeddings output attention_norm ffn_norm".split(),
            strict=True,
        ):
            name = name.replace(ours, theirs)
        if name.endswith(("wq.weight", "wk.weight")):
            rows = [h * c.head_dim + j + half * c.head_dim // 2 for h in range(len(t) // c.head_dim)
                    for j in range(c.head_dim // 2) for half in (0, 1)]  # fmt: skip
            t = t[rows]
        state[name] = t.to(torch.bfloat16)
    for i in range(shards):
        part = {"rope.freqs": torch.ones(c.head_dim // 2)}
        for name, t in state.items():
            rowwise = name.endswith(("wo.weight", "w2.weight"))
            dim = embedding_dim if "tok_emb" in name else int(rowwise)
            part[name] = t if t.ndim == 1 else t.chunk(shards, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    known = dict(dim=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, norm_eps=c.norm_eps)
    known |= dict(n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size, rope_theta=c.rope_theta)
    known |= {} if c.d_model == c.n_heads * c.head_dim else {"head_dim": c.head_dim}
    (folder / "params.json").write_text(json.dumps(known | params))
    return folder


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_metas_shards_give_the_logits_of_the_same_weights(tmp_path, shards, embedding_dim):
    shape = dict(n_heads=16, n_kv_heads=8, head_dim=4, d_model=64, n_layers=2)
    model = tiny_llama(**shape).to(torch.bfloat16)
    # Llama 2 leaves the vocabulary to the tokenizer
    params = {} if embedding_dim == 0 else {"vocab_size": -1}
    folder = meta_folder(tmp_path / "meta", model, shards, embedding_dim, **params)
    ours = load_checkpoint(folder)
    for (name, want), got in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(want.float(), got), name
    assert ours.config.max_position_embeddings is None
    assert ours.config.stored_dtype() == torch.bfloat16
    theirs = hf_model(save_checkpoint(ours, tmp_path / "hf"))
    assert rel(theirs(tokens()).logits, ours.logits(ours(tokens())[0])) < 1e-4


def test_metas_window_and_scaling_follow_the_generation(tmp_path):
    shape = dict(vocab_size=128256, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=8)
    model = tiny_llama(**shape, n_layers=1)
    model.lm_head.weight.data.mul_(2.0)
    llama3 = load_config(meta_folder(tmp_path / "3", model, 1))
    assert (llama3.max_position_embeddings, llama3.rope_scaling) == (8192, None)
    scaled = load_config(meta_folder(tmp_path / "3.1", model, 1, use_scaled_rope=True))
    assert scaled.max_position_embeddings == 131072 and scaled.rope_scaling == LLAMA3
    assert not scaled.tie_embeddings
    model.lm_head.weight.data.copy_(model.embed_tokens.weight)
    tied = load_checkpoint(meta_folder(tmp_path / "3.2", model, 1, use_scaled_rope=True))
    assert tied.config.tie_embeddings and tied.config.rope_scaling["factor"] == 32.0


def tiktoken_file(path, text, merges=300):
    """Ranks as in Meta's Llama 3 tokenizer.model: the bytes, then BPE's merges, learnt on text."""
    ranks = {bytes([i]): i for i in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(r" ?\S+|\s+", text)]
    for rank in range(256, 256 + merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        left, right = max(pairs, key=lambda p: (pairs[p], p))
        ranks[left + right] = rank
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    path.write_text("\n".join(lines) + "\n")


def sentencepiece_file(path, text):
    """As in Llama 2: BPE with byte fallback, spaces written as U+2581, one put in front."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=written, model_type="bpe",
        vocab_size=500, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(written.getvalue())


MIXED = "I'll re-read 12,345.67 caf\u00e9s\n\n\tdef f(x):  return x['a']  # \u4e16\u754c "
MIXED += "\U0001f600 WE'RE "


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_metas_tokenizer_is_exported_as_one_that_encodes_alike(tmp_path, kind):
    prose = (HERE / "longred.py").read_text()[:20000] + MIXED * 5
    model = tiny_llama(vocab_size=812, n_layers=1)
    folder = meta_folder(tmp_path / "meta", model, 1)
    write = tiktoken_file if kind == "tiktoken" else sentencepiece_file
    write(folder / "tokenizer.model", prose)
    out = save_checkpoint(load_checkpoint(folder), tmp_path / "hf", tokenizer_from=folder)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    meta, rng = data.load_tokenizer(folder), random.Random(0)
    texts = [prose, MIXED] + ["".join(rng.choices(prose + MIXED * 9, k=60)) for _ in range(200)]
    for text, ids in zip(texts, meta.encode_batch(texts), strict=True):
        assert theirs(text).input_ids == [meta.bos_id, *ids], text
        assert theirs(text, add_special_tokens=False).input_ids == list(ids), text
    assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (meta.bos_id, meta.eos_id)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (meta.bos_id, meta.eos_id)
    assert (out / "tokenizer.model").exists() == (kind == "sentencepiece")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "consolidated.01.pth").unlink(), "asks for|a file is missing"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "need consolidated.00.pth"),
        (lambda f: (f / "params.json").write_text("{}"), "params.json: num_hidden_layers is None"),
        (lambda f: (f / "consolidated.01.pth").write_bytes(b"PK"), "01.pth is truncated, damaged"),
        (lambda f: torch.save([1], f / "consolidated.01.pth"), "01.pth is no plain dict"),
    ],
)
def test_a_damaged_meta_folder_is_refused_in_one_line(tmp_path, damage, said):
    folder = meta_folder(tmp_path / "meta", tiny_llama(), 2)
    damage(folder)
    with pytest.raises(ValueError, match=said) as e:
        load_checkpoint(folder)
    assert "\n" not in str(e.value)


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a download asks for; some/model is the folder `files`."""

    files, asked = None, []

    def log_message(self, *args):
        pass

    def do_GET(self):
        _, *parts = self.path.split("?")[0].split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        status, error = {
            "meta-llama/Meta-Llama-3-8B": (401, "GatedRepo"),
            "some/broken": (500, ""),
            "some/model": (200, ""),
        }.get(repo, (404, "RepoNotFound"))
        sha, body = "a" * 40, b""
        names = sorted(p.relative_to(self.files) for p in self.files.rglob("*"))
        if status == 200 and "tree" in parts:
            body = [dict(type="file", path=str(n), oid="b" * 40, size=1) for n in names]
        elif status == 200 and parts[0] == "api":
            siblings = [{"rfilename": str(n)} for n in names]
            body = {"id": repo, "sha": sha, "private": False, "siblings": siblings}
        elif status == 200:
            self.asked.append("/".join(parts[4:]))
            body = (self.files / self.asked[-1]).read_bytes()
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{zlib.crc32(self.path.encode())}"')
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_the_hub_is_asked_for_what_is_needed_and_refusals_are_explained(tmp_path):
    folder = save_checkpoint(tiny_llama(), tmp_path / "files")
    for name in ("original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"much")
    Hub.files, Hub.asked = folder, []
    said = {
        "some/model": "loaded",
        "llama3-8b": "licence must be accepted at .*Meta-Llama-3-8B, and you are not logged in",
        "some/broken": "out of reach .*500.* you are not logged in",
        "no/body": "no such repository",
    }
    code = """
import json, sys, model
for name in sys.argv[1:]:
    try: print(model.load_checkpoint(name).config.n_layers and "loaded")
    except ValueError as e: print(e)
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, *said]
    done = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for (name, want), got in zip(said.items(), lines, strict=True):
        assert re.search(want, got), (name, got)
        assert got == "loaded" or ("hf auth login" in got and "hf download" in got), got
    assert sorted(set(Hub.asked)) == ["config.json", "model.safetensors"]


def test_an_export_carries_what_stood_beside_the_weights(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    source = save_checkpoint(tiny_llama(), tmp_path / "source", tmp_path / "tokenizer")
    (source / "generation_config.json").write_text(
        '{"top_p": 0.9, "max_length": 4, "eos_token_id": [3, 5]}'
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "eos_token": "b",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_checkpoint(source, rope_theta=9e3)
    model.config.max_position_embeddings = 4096
    out = save_checkpoint(model, tmp_path / "out", tokenizer_from=source)
    theirs, tokenizer = hf_model(out), transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.generation_config.top_p == 0.9 and theirs.generation_config.max_length != 4
    assert len({file.stat().st_mode for file in (out / "config.json", *out.glob("*.safe*"))}) == 1
    assert theirs.generation_config.eos_token_id == [3, 5]
    assert theirs.config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert tokenizer.eos_token == "b" and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.decode(tokenizer("it's 7 o'clock").input_ids) == "it's 7 o'clock"


CAN_TAKE = 200e6  # bytes beyond the file's own size that a hostile one may cost


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {HERE / 'pwned'}",)


def forged(header: str, data=b"", size=None) -> bytes:
    raw = header.encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + data


TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
WEIGHTS = {
    "header of 2^60 bytes": forged("{}", size=2**60),
    "header of a million tensors": forged(
        "{" + ",".join(f'"{i}":{TENSOR % (0, 0)}' for i in range(10**6)) + "}"
    ),
    "shape of 2^60": forged(f'{{"a":{TENSOR % (0, 8)}}}'.replace("[2]", f"[{2**60}]"), b"0" * 8),
    "overlap": forged(f'{{"a":{TENSOR % (0, 8)},"b":{TENSOR % (4, 12)}}}', b"0" * 12),
    "name twice": forged(f'{{"a":{TENSOR % (0, 8)},"a":{TENSOR % (0, 8)}}}', b"0" * 8),
    "nested": forged("[" * 10**6),
}
NUMBERS = {
    "num_key_value_heads": (4, "num_attention_heads 6 is not a multiple"),
    "num_hidden_layers": (2**31 - 1, "num_hidden_layers is 2147483647, need"),
    "hidden_size": (2**20, r"embed_tokens.weight is F32 \[96, 48\]"),
    "vocab_size": (2**31 - 1, "vocab_size is 2147483647, need"),
    "rope_theta": (10**4000, "rope_theta: got 1000"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps is nan"),
    "rope_scaling": ({"rope_type": "spiral"}, "rope_type: got 'spiral'"),
    "model_type": ([], "model_type is \\[\\]"),
    "intermediate_size": (True, "intermediate_size is True"),
    "quantization_config": ({"bits": 4}, "quantization_config is .* does not compute"),
    "sliding_window": (64, "sliding_window is 64"),
}


def hostile(root):
    """{name: (folder, what is said of it)}"""
    good = save_checkpoint(tiny_llama(), root / "good")
    whole = (good / "model.safetensors").read_bytes()
    weights = WEIGHTS | {"truncated": whole[: len(whole) // 2]}
    config = json.loads((good / "config.json").read_text())
    sys.set_int_max_str_digits(5000)
    numbers = {k: (json.dumps(config | {k: v}), said) for k, (v, said) in NUMBERS.items()}
    texts = {"deep": "[" * 10**6, "large": " " * 2**23 + "{}", "list": "[]"}
    texts = {k: (text, "config.json .*(damaged|holds a list)") for k, text in texts.items()}
    cases = {}
    for name, raw in weights.items():
        cases[name] = shutil.copytree(good, root / name), "safetensors is missing, truncated or dam"
        (root / name / "model.safetensors").write_bytes(raw)
    for name, (text, said) in (numbers | texts).items():
        cases[name] = shutil.copytree(good, root / name), said
        (root / name / "config.json").write_text(text)
    for name in ("config.json", "model.safetensors"):
        folder = shutil.copytree(good, root / f"{name} loop")
        (folder / name).unlink()
        (folder / name).symlink_to(name)
        cases[folder.name] = folder, "holds no config.json|holds neither model.safetensors"
    (root / "loop").symlink_to("loop")
    cases["loop"] = root / "loop", "no checkpoint .*loop"
    for i, content in enumerate((Bomb(), {"tok_embeddings.weight": Bomb()})):
        folder = meta_folder(root / f"bomb{i}", tiny_llama(), 1)
        torch.save(content, folder / "consolidated.00.pth")
        cases[folder.name] = folder, "never run"
    unpacked = io.BytesIO()
    torch.save({"a": "0" * 200_000_000}, unpacked)
    folder = meta_folder(root / "packed", tiny_llama(), 1)
    cases["packed"] = folder, "never run"
    packed = zipfile.ZipFile(folder / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED)
    with packed, zipfile.ZipFile(unpacked) as plain:  # 200 KB that unpack to 200 MB, held thrice
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    return cases


def test_hostile_checkpoints_end_in_one_line_and_take_no_memory(tmp_path):
    cases = hostile(tmp_path)
    code = """
import json, resource, sys, model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model.load_checkpoint(sys.argv[1]); before = peak()
for folder in sys.argv[2:]:
    try: model.load_checkpoint(folder); said = "loaded"
    except ValueError as e: said = str(e)
    print(json.dumps([said, peak() - before]))
"""
    folders = [str(folder) for folder, _ in cases.values()]
    command = [sys.executable, "-c", code, tmp_path / "good", *folders]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (name, (folder, said)), (message, grown) in zip(cases.items(), results, strict=True):
        assert re.search(said, message), (name, message[:500])
        assert "\n" not in message and len(message) < 600, (name, message[:1000])
        sizes = (
            [f.stat().st_size for f in folder.iterdir() if f.is_file()] if folder.is_dir() else []
        )
        assert grown < sum(sizes) + CAN_TAKE, (name, grown)
    assert not (HERE / "pwned").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
SCALING = st.dictionaries(
    st.sampled_from(["rope_type", "factor", "rope_theta", "low_freq_factor", "beta_fast"]),
    st.sampled_from(["yarn", "llama3", "ntk", "linear", 1e300, 10**400, 1, 2.0]) | JSON,
)
ENTRIES = sorted(tiny_config().to_hf()) + ["rope_parameters", "layer_types", "sliding_window"]


@settings(PROPERTY, max_examples=100)
@given(st.dictionaries(st.sampled_from(ENTRIES), JSON | SCALING, max_size=4))
def test_any_config_is_read_or_refused_with_one_line(changes):
    try:
        config = ModelConfig.from_hf(tiny_config().to_hf() | changes)
    except ValueError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
    else:
        assert ModelConfig.from_hf(config.to_hf()).to_hf() == config.to_hf()


@settings(PROPERTY, max_examples=200)
@given(
    st.binary(max_size=40)
    | st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 80), st.binary(max_size=80)).map(
        lambda x: x[0].to_bytes(8, "little") + x[1]
    )
    | st.dictionaries(st.text(max_size=3), JSON, max_size=3).map(lambda d: forged(json.dumps(d)))
)
def test_any_bytes_as_safetensors_are_read_or_refused_with_one_line(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(raw)
    try:
        assert isinstance(model_module._weight_files(folder), dict)
    except ValueError as e:
        assert "\n" not in str(e) and len(str(e)) < 800


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
    want = theirs(ids, position_ids=skipped).logits
    assert rel(ours.logits(ours(ids, skipped)[0]), want) < 1e-4


# ---------------------------------------------------------------------------------------- data.py

TEXTS = SHARED / "texts"


def byte_tokenizer(folder):
    """A folder with a tokenizer.json of 256 bytes and an end-of-text token, 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tk = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(["<|end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tk.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return data.load_tokenizer(folder)


def bpe(pattern=None):
    """A byte-level BPE of 600 tokens, trained on English and Python."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tk = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern or data.LLAMA3_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tk.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tk.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tk.train_from_iterator([prose(), Path(__file__).read_text()], trainer)
    return tk


def tiktoken_folder(folder, tk):
    """The same BPE as Meta writes it: base64 of each token's bytes, and its rank."""
    bs = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in bs}
    rest = (b for b in range(256) if b not in bs)
    byte_of.update({chr(256 + i): b for i, b in enumerate(rest)})
    ranks = sorted((i, bytes(byte_of[c] for c in t)) for t, i in tk.get_vocab().items())
    folder.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(token) + f" {i}\n".encode() for i, token in ranks)
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return data.load_tokenizer(folder)


def prose():
    from pydoc_data.topics import topics

    return "\n\n".join(topics[k] for k in sorted(topics))


def documents(corpus):
    return [ids.tolist() for ids in np.split(corpus.tokens, corpus.doc_starts[1:-1])]


def made_corpus(lengths, checksums=None, sources=None):
    """A corpus in memory whose every token is different."""
    starts = np.append(0, np.cumsum(lengths))
    n = len(lengths)
    checksums = np.arange(n) if checksums is None else np.asarray(checksums)
    sources = np.zeros(n, np.int64) if sources is None else np.asarray(sources)
    return data.Corpus("made", np.arange(starts[-1]), starts, checksums, sources, "", Path())


def run_python(code, *args, before=(), **env):
    command = [*before, sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(HERE), **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def tk(tmp_path):
    """byte_tokenizer of the folder tmp_path / "tk"."""
    return byte_tokenizer(tmp_path / "tk")


# ---------------------------------------------------------------------------- data: tokenizers


@needs_stories
def test_real_tokenizer_is_read_with_its_habits():
    tk = data.load_tokenizer(STORIES)
    assert (tk.vocab_size, tk.bos_id, tk.eos_id, tk.add_bos) == (512, 1, 2, True)
    assert tk.encode_batch(["Once upon a time"]) == [[403, 407, 261, 378]]
    assert tk.decode(np.array([403, 407, 261, 378])) == "Once upon a time"
    tk.check_fits(512)
    with pytest.raises(ValueError, match="ids go up to 511, the model has 300"):
        tk.check_fits(300)
    assert not {0, 1, 2} & set(tk.encode_batch(["<s> a </s><unk>"])[0])  # markup is plain text


def test_add_bos_token_of_the_config_overrules_the_post_processor(tmp_path):
    byte_tokenizer(tmp_path)
    config = {"bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>"}
    for adds in (True, False):
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**config, "add_bos_token": adds}))
        assert data.load_tokenizer(tmp_path).add_bos is adds
    path.unlink()
    assert data.load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    assert data.load_tokenizer(tmp_path).eos_id == 256


def test_meta_tokenizer_gives_the_ids_of_the_same_bpe(tmp_path):
    tk = bpe()
    meta = tiktoken_folder(tmp_path, tk)
    texts = [prose()[:50_000], "it's 1999\r\n\r\n  \tx <|end_of_text|> naive cafe", "\n\n a\n"]
    assert meta.encode_batch(texts) == [e.ids for e in tk.encode_batch(texts)]
    assert meta.decode(meta.encode_batch(texts)[1]) == texts[1]
    assert (meta.vocab_size, meta.bos_id, meta.eos_id) == (856, 600, 601)
    names = data.llama3_special_tokens(128_000)
    assert names["<|eot_id|>"] == 128_009 and names["<|reserved_special_token_4|>"] == 128_008
    assert names["<|reserved_special_token_250|>"] == 128_255 and len(names) == 256


def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json and tokenizer\.model"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="cannot use .*tokenizer.json"):
        data.load_tokenizer(tmp_path)


def test_a_million_blanks_do_not_kill_the_tokenizer(tmp_path):
    tk = tiktoken_folder(tmp_path / "tk", bpe())
    text = "a" + " " * 1_000_000 + "b\n"
    (tmp_path / "a.txt").write_text(text)
    corpus = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    assert tk.decode(documents(corpus)[0][1:-1]) == text


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("which", ["llama3", "gpt2", "tiktoken", "sentencepiece"])
@given(st.lists(st.sampled_from([" ", "\n", "a", "Be", "\r\n", "'s", "1", ",", "\t", "e\u0301"])))
@settings(max_examples=60, deadline=None)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(which, parts):
    tk = cutters(which)
    text = "".join(parts) * 3
    sizes, data.PIECE = data.PIECE, 2
    try:
        assert tk.cut is not None
        pieces = [piece for piece, _ in data._split([text], tk.cut)]
    finally:
        data.PIECE = sizes
    assert [i for ids in tk.encode_batch(pieces) for i in ids] == tk.encode_batch([text])[0]


@functools.cache
def cutters(which):
    import tempfile

    if which == "sentencepiece":
        if not STORIES.is_dir():
            pytest.skip(f"real weights: no {STORIES}")
        return data.load_tokenizer(STORIES)
    with tempfile.TemporaryDirectory() as folder:
        if which == "tiktoken":
            return tiktoken_folder(Path(folder), bpe())
        bpe(GPT2 if which == "gpt2" else None).save(f"{folder}/tokenizer.json")
        return data.load_tokenizer(folder)


# ---------------------------------------------------------------------------- data: tokenising

DOCS = ["first \u00e9 text", "second,\r\nlonger \ud55c text\n\n", "third"]


def test_every_kind_of_file_gives_the_same_documents(tk, tmp_path):
    lines = "".join(json.dumps({"body": d, "id": i}) + "\n" for i, d in enumerate(DOCS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    for name in ("b.jsonl.gz", "c.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines))
    for i, text in enumerate(DOCS):
        (tmp_path / f"d{i}.weird").write_bytes(text.encode())
    expected = [[*ids, 256] for ids in tk.encode_batch(DOCS)]
    assert [len(ids) - 1 for ids in expected] == [len(text.encode()) for text in DOCS]
    for spec in ("a.jsonl#body", "b.jsonl.gz#body", "c.json.gz#body", "d?.weird"):
        assert documents(data.tokenize([tmp_path / spec], tk, tmp_path / "cache")) == expected


def test_zstd_and_parquet_are_read_where_installed(tk, tmp_path):
    zstandard, pq = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode()
    pack = zstandard.compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(lines[:30]) + pack(lines[30:]))  # two frames
    pq.write_table(pyarrow.table({"text": DOCS, "x": [1, 2, 3]}), tmp_path / "b.parquet")
    for name in ("a.jsonl.zst", "b.parquet"):
        corpus = data.tokenize([tmp_path / name], tk, tmp_path / "cache")
        assert [tk.decode(d[:-1]) for d in documents(corpus)] == DOCS
    with pytest.raises(ValueError, match="b.parquet:1: .*no 'nope' in"):
        data.tokenize([f"{tmp_path}/b.parquet#nope"], tk, tmp_path / "cache")


@pytest.mark.parametrize("name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_optional_package_is_named(tk, tmp_path, monkeypatch, name, package):
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name} takes one more package: pip install {package}"):
        data.tokenize([tmp_path / name], tk, tmp_path / "cache")


@needs_stories
def test_real_books_are_stored_whole_with_bos_and_eos(tmp_path):
    if not TEXTS.is_dir():
        pytest.skip(f"real text: no {TEXTS}")
    tk = data.load_tokenizer(STORIES)
    corpus = data.tokenize([TEXTS], tk, tmp_path)
    for path, ids in zip(sorted(TEXTS.iterdir()), documents(corpus), strict=True):
        text = path.read_bytes().decode("utf-8-sig")
        assert ids == [1, *tk.encode_batch([text])[0], 2]
    assert corpus.tokens.dtype == np.uint16 and isinstance(corpus.tokens, np.memmap)


def test_a_second_run_reads_no_text_and_tokenises_nothing(tk, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    os.utime(path, (1, 1))
    monkeypatch.setattr(data, "_stat", lambda p: (os.stat(p).st_size, 1, 1))
    first = data.tokenize([path], tk, tmp_path / "cache")
    tk.encode = None
    monkeypatch.setattr(data, "_hash", None)
    again = data.tokenize([path], tk, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint and documents(again) == documents(first)


@pytest.mark.parametrize("clock", ["long ago", "within a tick"])
def test_a_changed_file_is_tokenised_anew_even_with_its_old_time_and_size(
    tk, tmp_path, monkeypatch, clock
):
    now = time.time_ns()
    if clock == "long ago":  # files are remembered, the second one by its ctime told apart
        monkeypatch.setattr(data.time, "time_ns", lambda: now + 10**11)
    else:
        monkeypatch.setattr(data, "_stat", lambda path: (3, now, now))
    for text in ("one", "two"):
        (tmp_path / "a.txt").write_text(text)
        os.utime(tmp_path / "a.txt", (1, 1))
        corpus = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
        assert tk.decode(documents(corpus)[0][:-1]) == text


def test_a_file_that_changes_while_it_is_read_is_an_error(tk, tmp_path):
    path, encode = tmp_path / "a.txt", tk.encode
    path.write_text("some text")

    def meanwhile(texts):
        path.write_text("other text")
        return encode(texts)

    tk.encode = meanwhile
    with pytest.raises(ValueError, match="a.txt changed while it was read: run again"):
        data.tokenize([path], tk, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens-*[!k]"))


@pytest.mark.parametrize("harm", ["tokens.bin", "documents.bin", "meta.json"])
def test_a_damaged_cache_is_built_anew_and_never_read(tk, tmp_path, harm):
    lines = []
    (tmp_path / "a.txt").write_text("some text")
    corpus = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    expected = documents(corpus)
    os.truncate(corpus.folder / harm, (corpus.folder / harm).stat().st_size - 1)
    again = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache", log=lines.append)
    assert documents(again) == expected and any("is damaged" in line for line in lines)


def test_options_and_tokenizer_have_their_own_caches(tk, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with_end = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    tk.add_eos = False
    without = data.tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    assert len(with_end.tokens) == len(without.tokens) + 1


SLOW_BUILD = """
import random, sys, time, data
data.PIECE, data.BATCH, data.SHARD = 64, 256, 4
tk = data.load_tokenizer(sys.argv[1])
def slow(texts, encode=tk.encode):
    time.sleep(float(sys.argv[4]) * 2 * random.random())  # batches overtake each other
    return encode(texts)
tk.encode = slow
data.tokenize([sys.argv[2]], tk, sys.argv[3], log=lambda line: print(line, flush=True))
"""


def test_a_killed_run_goes_on_after_its_last_shard_and_loses_nothing(tk, tmp_path):
    texts = [f"document {i} " * (i % 40 + 1) for i in range(200)]
    text = "".join(json.dumps({"text": t} if i % 9 else {}) + "\n" for i, t in enumerate(texts))
    good = [t for i, t in enumerate(texts) if i % 9]
    (tmp_path / "a.jsonl").write_text(text)
    code = SLOW_BUILD.replace("log=", "skip_bad_lines=True, log=")
    args = [code, tmp_path / "tk", tmp_path / "a.jsonl", tmp_path / "cache"]
    for _ in range(2):
        run, began = run_python(*args, 0.05), time.time_ns()
        while not [p for p in tmp_path.glob("c*/*/meta.json") if p.stat().st_mtime_ns > began]:
            time.sleep(0.01)
        time.sleep(0.2)  # into the next shard
        os.kill(run.pid, signal.SIGKILL)
        assert b"tokens in" not in run.communicate()[0]
        for name in ("tokens.bin", "documents.bin"):  # half a shard more
            with open(next(tmp_path.glob(f"c*/*.part/{name}")), "ab") as stream:
                stream.write(b"torn")
        assert not list((tmp_path / "cache").glob("tokens-*[!kt]"))  # but .lock and .part
    out = run_python(*args, 0).communicate()[0].decode()
    assert "going on after" in out and "23 bad records left out" in out
    folder = next(p for p in (tmp_path / "cache").glob("tokens-*") if p.is_dir())
    stored = np.fromfile(folder / "tokens.bin", np.uint16)
    assert stored.tolist() == [i for t in good for i in [*tk.encode_batch([t])[0], 256]]


def test_the_tokenizer_has_a_second_batch_in_hand(tk, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH", 1)  # each document is one
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(str(i))
    both, encode = threading.Barrier(2, timeout=30), tk.encode
    tk.encode = lambda texts: both.wait() < 2 and encode(texts)
    corpus = data.tokenize([tmp_path / "?.txt"], tk, tmp_path / "cache")
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["0", "1", "2", "3"]


def test_two_runs_at_once_build_one_whole_cache(tk, tmp_path):
    (tmp_path / "a.txt").write_text(prose()[:9_000])
    args = [SLOW_BUILD, tmp_path / "tk", tmp_path / "a.txt", tmp_path / "cache", 0.05]
    runs = [run_python(*args) for _ in range(2)]
    outs = [run.communicate()[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert sum("M/s" in out for out in outs) == 1
    assert not list((tmp_path / "cache").glob("*.part"))


FULL_DISK = """
import sys, data, subprocess, resource, signal
if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=256k", "t", sys.argv[3]]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (262144, -1))  # the next best thing
data.SHARD, data.BATCH = 1, 1 << 15
tk = data.load_tokenizer(sys.argv[1])
try:
    data.tokenize([sys.argv[2]], tk, sys.argv[3])
except ValueError as error:
    print("ERROR", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
subprocess.call(["mount", "-o", "remount,size=8m", sys.argv[3]])
print("THEN", data.tokenize([sys.argv[2]], tk, sys.argv[3]).tokens.sum())
"""


def test_a_full_disk_is_one_line_and_costs_no_finished_shard(tk, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "a.txt").write_text(prose())
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    can = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    args = [FULL_DISK, tmp_path / "tk", tmp_path / "a.txt", tmp_path / "cache"]
    out = run_python(*args, before=alone if can else ()).communicate()[0].decode()
    error = next(line for line in out.splitlines() if line.startswith("ERROR"))
    assert "disk is full, free" in error and "run again" in error
    assert "going on after" in out
    assert int(out.split("THEN ")[1]) == sum(tk.encode_batch([prose()])[0]) + 256


BAD = {
    "*.nope": (None, "no file at .*nope: need a text file, folder, glob"),
    "empty.txt": (b"", "only empty files at .*empty.txt: need a text file"),
    "binary.txt": (b"text\0text", "binary.txt is not UTF-8 text .binary, with a zero byte at 4"),
    "latin.txt": ("caf\u00e9 au lait".encode("latin1"), "latin.txt is not UTF-8 text .*iconv"),
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', r"line.jsonl:2: not a record with text"),
    "field.jsonl": (b'{"body": "a"}\n', r"field.jsonl:1: .*no 'text' in {'body': 'a'}.*PATH#FIELD"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "half.jsonl:1: .*surrogates"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: not a record with text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot read .*cut.jsonl.gz"),
    "no.gz": (b"this is not gzip", "cannot read .*no.gz.*[Nn]ot a gzipped file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_it(tk, tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.tokenize([tmp_path / name], tk, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens-*/meta.json"))


def test_skip_bad_lines_leaves_out_and_counts(tk, tmp_path):
    lines = []
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\nnonsense\n\n{"text": "b"}\n{"text": 3}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    corpus = data.tokenize(
        [tmp_path / "?.*"], tk, tmp_path / "c", skip_bad_lines=True, log=lines.append
    )
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["a", "b"]
    assert "2 bad records left out" in lines[-1] and any("left out: " in line for line in lines)


def test_20000_small_files_are_each_read_once(tk, tmp_path):
    for i in range(20_000):
        folder = tmp_path / "many" / str(i % 20)
        if i < 20:
            folder.mkdir(parents=True)
        (folder / f"{i}.txt").write_text(str(i) if i % 100 else "")  # 200 are empty
    specs = [tmp_path / "many", tmp_path / "many/*/*.txt"]
    corpus = data.tokenize(specs, tk, tmp_path / "cache")
    texts = sorted(int(tk.decode(d[:-1])) for d in documents(corpus))
    assert texts == [i for i in range(20_000) if i % 100]
    assert set(corpus.doc_sources) == {0}


class DatasetHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as listing and fetching a dataset needs."""

    files = {
        "README.md": b"# a data set",
        "en/train-0.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
        "en/validation-0.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
        "raw/books.txt": b"four",
    }

    def answer(self, body, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def do_GET(self):
        name = self.path.split("/resolve/c0ffee/")[-1]
        if self.path.startswith("/api/datasets/me/texts"):
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            info = {"id": "me/texts", "sha": "c0ffee", "siblings": siblings}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        elif name in self.files:
            self.answer(self.files[name], ETag=f'"{name}"', X_Repo_Commit="c0ffee")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_hub_datasets_are_fetched_once_and_stay_as_they_were(tk, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if True:
        import sys, data
        tk = data.load_tokenizer(sys.argv[1])
        for spec in ("hf:me/texts", "hf:me/texts/en:validation#text", "hf:me/texts/raw/*.txt"):
            c = data.tokenize([spec], tk, sys.argv[2], log=lambda line: None)
            print(*[tk.decode(c.tokens[a:b - 1]) for a, b in zip(c.doc_starts, c.doc_starts[1:])])
        try:
            data.tokenize(["hf:me/texts/fr/*.gz"], tk, sys.argv[2])
        except ValueError as error:
            print(error)
    """
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = env["HF_HUB_DISABLE_XET"] = "1"
    for network in (True, False):
        out = run_python(code, tmp_path / "tk", tmp_path / "cache", **env).communicate()[0].decode()
        assert out.split("\n")[:3] == ["one two", "three", "four"], out
        assert ("no file 'fr/*.gz' in me/texts" if network else "cannot list hf:me") in out
        server.shutdown()
        server.server_close()


def test_the_default_data_names_files_that_need_no_optional_package():
    specs = data.DEFAULT_LONG + data.DEFAULT_SHORT
    assert all(data._kind(spec) == "jsonl" and not spec.endswith(".zst") for spec in specs)


# ---------------------------------------------------------------------------- data: streams


def test_batch_is_a_pure_function_of_seed_name_and_index():
    corpus = made_corpus([1000] * 5)
    stream = data.Stream(corpus, "long", 1, 3, 10)
    backwards = [stream.batch(i) for i in reversed(range(400))][::-1]
    fresh = [data.Stream(corpus, "long", 1, 3, 10).batch(i) for i in range(400)]
    assert all((a == b).all() for a, b in zip(backwards, fresh, strict=True))
    for other in (data.Stream(corpus, "short", 1, 3, 10), data.Stream(corpus, "long", 2, 3, 10)):
        assert (other.batch(0) != fresh[0]).any()
    sizes = data.Stream(corpus, "long", 1, 1, 10)
    rows = np.concatenate([sizes.batch(i) for i in range(12)])
    assert (np.concatenate(fresh[:4]) == rows).all()  # the batch size does not matter either


def test_an_epoch_predicts_every_training_token_once_and_epochs_differ():
    corpus = made_corpus([100, 3, 57, 1, 250])
    stream = data.Stream(corpus, "long", 0, 1, 7)
    n = stream.n_sequences
    epochs = [np.concatenate([stream.batch(e * n + i) for i in range(n)]) for e in range(2)]
    starts, lengths = corpus.segments()
    train = np.concatenate([np.arange(s, s + k) for s, k in zip(starts, lengths, strict=True)])
    assert n == (len(train) - 1) // 7
    for epoch in epochs:
        assert sorted(epoch[:, 1:].ravel()) == list(train[1 : 1 + n * 7])
    assert (epochs[0] != epochs[1]).any()
    wide = data.Stream(corpus, "long", 0, 4, 7)
    rows = np.concatenate([wide.batch(i) for i in range(n // 2)])[: 2 * n]
    assert (rows == np.concatenate(epochs)[: len(rows)]).all()  # batches run on across epochs


@pytest.mark.parametrize("n_docs", [1, 40, 99, 100, 400])
def test_no_held_out_token_is_in_any_training_batch(n_docs):
    rng = np.random.default_rng(n_docs)
    corpus = made_corpus(rng.integers(40, 300, n_docs), rng.integers(0, 2**32, n_docs))
    stream = data.Stream(corpus, "long", 0, 1, 5)
    seen = np.concatenate([stream.batch(i) for i in range(3 * stream.n_sequences)])
    held = data.held_out(corpus, 10**6, 1).numpy()
    assert not set(seen.ravel()) & set(held.ravel())
    share = sum(corpus.segments(held_out=True)[1]) / len(corpus.tokens)
    assert 0.02 < share < 0.09
    if n_docs >= 100:  # by document: whole ones
        starts, lengths = corpus.segments(held_out=True)
        assert set(lengths[lengths > 0]) <= set(np.diff(corpus.doc_starts))


def test_the_same_document_is_held_out_in_every_stream(tk, tmp_path):
    texts = [f"text {i} " * 9 for i in range(300)]
    for name, chosen in (("a", texts[:200]), ("b", texts[90:] + texts[90:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in chosen)
        )
    held = []
    for name in "ab":
        corpus = data.tokenize([tmp_path / f"{name}.jsonl"], tk, tmp_path / "cache")
        out = corpus.segments(held_out=True)[1] > 0
        held.append({tk.decode(d[:-1]) for d, o in zip(documents(corpus), out, strict=True) if o})
    assert held[0] & set(texts[90:200]) == held[1] & set(texts[90:200]) != set()
    assert not held[1] & {t for t, o in zip(texts[90:] * 2, ~out, strict=True) if o}


def test_held_out_sequences_are_spread_evenly_and_too_few_is_an_error():
    corpus = made_corpus([10_000])
    rows = data.held_out(corpus, 4, 50)
    assert rows[:, 0].tolist() == [9500, 9649, 9799, 9949] and rows[-1, -1] == 9999
    assert data.held_out(corpus, 99, 50).shape == (9, 51)  # no more than there are
    with pytest.raises(ValueError, match="500 held-out tokens, one sequence needs 601"):
        data.held_out(corpus, 1, 600)


def test_text_too_short_for_one_sequence_is_an_error():
    corpus = made_corpus([100, 200])
    assert data.Stream(corpus, "long", 0, 1, 284).n_sequences == 1  # 95 + 190 tokens
    with pytest.raises(ValueError, match="long: text too short: 285 tokens .* needs 286"):
        data.Stream(corpus, "long", 0, 1, 285)
    with pytest.raises(ValueError, match="0 tokens to train on in documents of at least 300"):
        data.Stream(corpus, "long", 0, 1, 10, min_doc_len=300)


def test_min_doc_len_leaves_out_shorter_documents():
    corpus = made_corpus([100, 20, 100])
    stream = data.Stream(corpus, "long", 0, 1, 10, min_doc_len=100)
    seen = {int(i) for k in range(stream.n_sequences) for i in stream.batch(k).ravel()}
    assert not seen & set(range(100, 120)) and max(seen) > 120


def test_length_upsample_favours_long_documents_and_keeps_each_source_its_share():
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(4000) < 0.1, 1000, 100)
    sources = np.arange(4000) % 2
    corpus = made_corpus(lengths, rng.integers(0, 2**32, 4000), sources)
    _, train = corpus.segments()
    chosen = data._upsample(corpus, train, 1000, 3.0)
    for source in (0, 1):
        before, after = train * (sources == source), train[chosen] * (sources[chosen] == source)
        assert after.sum() == pytest.approx(before.sum(), rel=0.05)
        long = [w[w == 1000].sum() / w.sum() for w in (before, after)]
        assert long[1] / (1 - long[1]) == pytest.approx(3 * long[0] / (1 - long[0]), rel=0.15)
    assert np.diff(chosen).min() < 0 and not (np.diff(chosen) == 0).any()  # copies far apart
    stream = data.Stream(corpus, "long", 0, 1, 1000, length_upsample=3.0)
    assert abs(stream.n_sequences * 1000 / train.sum() - 1) < 0.05


def test_describe_counts_documents_tokens_and_epochs_and_warns():
    corpus = made_corpus([500, 3000, 40_000])
    stream = data.Stream(corpus, "long", 0, 2, 128)
    line = stream.describe(n_batches=150)
    assert "3 documents, 41,325 tokens to train on, 2,175 held out at documents' ends" in line
    assert "<1K 1%, <4K 7%, <128K 92%; 300 sequences of 128 are 0.93 epochs" in line
    assert "WARNING long: the same text 4.7 times over" in stream.describe(n_batches=750)


# ---------------------------------------------------------------------------- data: positions

SCHEMES = ["uniform", "cream", "cream_truncated", "pose"]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(st.integers(1, 300), st.integers(0, 5000), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_positions_rise_from_0_and_stay_in_the_window(scheme, seq_len, more, seed):
    draw = getattr(data, f"{scheme}_positions")
    if 0 < more and seq_len < 3 and scheme != "pose":
        with pytest.raises(ValueError, match="need 3"):
            draw(np.random.default_rng(seed), 3, seq_len, seq_len + more)
        return
    p = draw(np.random.default_rng(seed), 3, seq_len, seq_len + more)
    assert p.shape == (3, seq_len) and p.dtype == np.int64
    assert (p[:, 0] == 0).all() and (np.diff(p) > 0).all() and p.max() < seq_len + more
    assert more or (p == np.arange(seq_len)).all()
    again = draw(np.random.default_rng(seed), 3, seq_len, seq_len + more)
    assert (p == again).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_window_shorter_than_the_sequence_is_refused(scheme):
    with pytest.raises(ValueError, match="cannot spread 8 tokens over 7 positions"):
        getattr(data, f"{scheme}_positions")(np.random.default_rng(0), 1, 8, 7)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities / probabilities.sum()
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("scheme", ["cream", "cream_truncated"])
def test_cream_draws_k_with_exactly_the_clamped_or_truncated_gaussian(scheme):
    t, f = 900, 4
    normal = [0.5 * (1 + math.erf((x - 1 - f) / 5 / 2**0.5)) for x in range(2, 2 * f + 1)]
    p = np.append(np.diff(normal), 0.0)  # P(k = 2 .. 2f)
    if scheme == "cream":
        p[0] += normal[0]
        p[-1] = 1 - normal[-1]
        assert p[0] == pytest.approx(0.345, abs=5e-4) and p[-1] == pytest.approx(0.274, abs=5e-4)
    counts, rng = np.zeros(2 * f + 1), np.random.default_rng(3)
    for _ in range(40):
        pos = getattr(data, f"{scheme}_positions")(rng, 1000, t, t * f)
        if pos[0, t - 17] < t * f - 17:  # head = tail = 16: the ends of each k lie apart
            ends, mid = pos[:, t - 17], t - 32
            k = np.ceil((ends - 16 - 99) / (mid - 1) * 2).astype(int)
            assert (ends >= 16 + (mid - 1) * k // 2).all() and (ends <= k * t // 2 - 17).all()
            counts += np.bincount(k, minlength=9)
    assert counts.sum() > 10_000 and (scheme == "cream" or counts[-1] == 0)
    keep = p > 0
    assert chi_square(counts[2:][keep], p[keep]) < 24  # 6 degrees of freedom: 1 in 2,000


def test_head_is_a_third_or_4f_by_a_fair_coin_per_batch():
    rng, thirds = np.random.default_rng(0), 0
    for _ in range(400):
        p = data.uniform_positions(rng, 4, 300, 1200)
        heads = {int(np.argmax(row != np.arange(300))) for row in p}
        tails = {int(np.argmax(row[::-1] != np.arange(1199, 899, -1))) for row in p}
        assert heads in ({100}, {16}) and (tails == heads or min(tails) >= min(heads))
        thirds += heads == {100}
    assert abs(thirds - 200) < 45  # 4.5 sigma


def test_uniform_ends_are_uniform_and_reach_both_ends():
    rng, ends = np.random.default_rng(0), {10: [], 16: []}
    for _ in range(200):
        p = data.uniform_positions(rng, 100, 30, 72)  # head = tail = 10 or int(4 x 2.4) = 9
        head = int(np.argmax(p[0] != np.arange(30)))
        ends.setdefault(head, []).extend(p[:, 29 - head])
    for head in (9, 10):
        low, high = 30 - head, 72 - head - 1
        counts = np.bincount(ends[head], minlength=high + 1)
        assert counts[:low].sum() == 0 and len(counts) == high + 1
        assert chi_square(counts[low:], np.ones(high + 1 - low)) < 85  # 41 degrees of freedom


def test_cream_with_k_2_joins_the_head_and_uniform_never_does():
    rng = np.random.default_rng(0)
    cream, uniform = (f(rng, 500, 90, 360) for f in (data.cream_positions, data.uniform_positions))
    assert 120 < (cream[:, 30] == 30).sum() and (uniform[:, 30] > 30).all()


def test_pose_moves_the_second_chunk_by_a_uniform_distance():
    p = data.pose_positions(np.random.default_rng(0), 20_000, 5, 9)
    moved, first = p[:, -1] - 4, (p == np.arange(5)).sum(1)
    assert chi_square(np.bincount(moved), np.ones(5)) < 20
    assert chi_square(np.bincount(first[moved > 0], minlength=4)[1:4], np.ones(3)) < 15


@given(st.integers(1, 200), st.integers(0, 900), st.lists(st.integers(0, 199)), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_longrecipe_skips_only_at_sentence_starts(seq_len, more, starts, seed):
    starts = [s for s in starts if s < seq_len]
    rng = np.random.default_rng(seed)
    p = data.longrecipe_positions(rng, np.array(starts), seq_len, seq_len + more)
    assert p.shape == (seq_len,) and p.dtype == np.int64
    assert p[0] == 0 and (np.diff(p) > 0).all() and p[-1] < seq_len + more
    assert set(np.flatnonzero(np.diff(p) > 1) + 1) <= set(starts)


def test_longrecipe_slots_are_a_uniform_choice():
    rng, counts = np.random.default_rng(0), {}
    for _ in range(6000):
        p = data.longrecipe_positions(rng, [0, 2, 3], 4, 6)
        counts[tuple(p)] = counts.get(tuple(p), 0) + 1
    assert len(counts) == 6  # 2 skipped positions before, between, or after 2 sentences
    assert chi_square(np.array(list(counts.values())), np.ones(6)) < 21
    with pytest.raises(ValueError, match="outside 0 .. 3"):
        data.longrecipe_positions(rng, [0, 4], 4, 6)


# -------------------------------------------------------------------------------------- memory.py


def optimizer_pair(host, moments=torch.float32, chunk=100, weight_decay=0.1):
    """The same parameters under torch.optim.AdamW in fp32 and under ours; odd sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 23), (501,), (3, 5, 7), (1,)]
    theirs = [torch.randn(s, generator=generator).bfloat16().float() for s in shapes]
    ours = [torch.nn.Parameter(p.bfloat16()) for p in theirs]
    theirs = [torch.nn.Parameter(p) for p in theirs]
    rest = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, foreach=False, fused=False, **rest)
    optimizer = memory.AdamW(ours, **rest, host=host, moments_dtype=moments, chunk=chunk)
    return theirs, reference, ours, optimizer


def masters(optimizer):
    """(parameter, its fp32 master) one by one, rebuilt from the pieces of AdamW's state."""
    for p in optimizer.param_groups[0]["params"]:
        parts = [
            memory.join_master(p.data.view(-1)[a:b], optimizer._fields(state, b - a)[2])
            for (q, a, b), state in zip(optimizer.pieces, optimizer.state, strict=True)
            if q is p
        ]
        yield p, torch.cat(parts).view(p.shape)


def train_pair(theirs, reference, ours, optimizer, steps, clip=1.0):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10 ** (step % 5 - 2)
            b.grad.copy_(a.grad)
        norms = [torch.nn.utils.clip_grad_norm_(p, clip) for p in (theirs, ours)]
        assert torch.equal(*norms)
        for group in (*reference.param_groups, *optimizer.param_groups):
            group["lr"] = 0.01 / (1 + step)
        reference.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_master_has_the_bits_of_torchs_after_100_steps(host, weight_decay):
    pair = optimizer_pair(host, weight_decay=weight_decay)
    theirs, reference, ours, optimizer = pair
    train_pair(*pair, steps=100)
    for a, b, (p, master) in zip(theirs, ours, masters(optimizer), strict=True):
        assert p is b and torch.equal(master.view(torch.int32), a.data.view(torch.int32))
        assert torch.equal(b.data, memory.split_master(a.data)[0])
    moments = [
        memory.AdamW._fields(optimizer, s, e - a)
        for (_, a, e), s in zip(optimizer.pieces, optimizer.state, strict=True)
    ]
    for i, name in enumerate(("exp_avg", "exp_avg_sq")):
        expected = torch.cat([reference.state[p][name].flatten() for p in theirs])
        assert torch.equal(torch.cat([f[i] for f in moments]), expected)


def test_split_master_rounds_half_up_and_loses_no_bit():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).int()
    ties = (bits[:50_000] & -65536) | 0x8000  # exactly half way, to even and to odd
    x = torch.cat([bits, ties]).view(torch.float32)
    x = x[x.isfinite()]
    weight, remainder = memory.split_master(x)
    assert torch.equal(memory.join_master(weight, remainder).view(torch.int32), x.view(torch.int32))
    magnitude = x.view(torch.int32).long() & 0x7FFFFFFF
    expected = (magnitude + 0x8000) // 65536
    assert torch.equal(weight.view(torch.int16).long() & 0x7FFF, expected)
    assert (remainder == -32768).any()  # a tie went up


def test_adamw_starts_from_fp32_weights_without_rounding_them():
    weight = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(weight.clone())
    optimizer = memory.AdamW([p], 0.1, (0.9, 0.95), 1e-8, 0.0, host=True, chunk=50)
    assert p.dtype == torch.bfloat16 and p.grad.dtype == torch.float32
    assert torch.equal(next(masters(optimizer))[1], weight)


def test_adamw_gradients_accumulate_in_fp32():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    memory.AdamW([p], 0.1, (0.9, 0.95), 1e-8, 0.0, host=False)
    for _ in range(1000):  # in bf16 the sum would stop at 256
        p.sum().backward()
    assert torch.equal(p.grad, torch.full((4,), 1000.0))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_resumes_bit_for_bit_whatever_the_placement(moments, tmp_path):
    pair = optimizer_pair(True, moments)
    train_pair(*pair, steps=3)
    torch.save({"weights": pair[2], "optimizer": pair[3].state_dict()}, tmp_path / "state.pt")
    other = optimizer_pair(False, moments)
    saved = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    for p, weight in zip(other[2], saved["weights"], strict=True):
        p.data.copy_(weight)
    other[3].load_state_dict(saved["optimizer"])
    for pair_ in (pair, (*pair[:2], *other[2:])):
        reference = torch.optim.AdamW(pair_[0], foreach=False)
        train_pair(pair_[0], reference, *pair_[2:], steps=2)
    for a, b in zip(masters(pair[3]), masters(other[3]), strict=True):
        assert torch.equal(a[1], b[1])


def test_bf16_moments_stay_near_fp32_ones_and_refuse_decays_they_cannot_hold():
    exact, rounded = optimizer_pair(False), optimizer_pair(False, torch.bfloat16)
    for pair in (exact, rounded):
        train_pair(*pair, steps=20)
    for (_, a), (_, b) in zip(masters(exact[3]), masters(rounded[3]), strict=True):
        assert (a - b).norm() / a.norm() < 5e-3 and not torch.equal(a, b)
    with pytest.raises(ValueError, match="betas"):
        memory.AdamW(exact[0], 0.1, (0.9, 0.999), 1e-8, 0.0, False, torch.bfloat16)


POLICIES = {
    "recomputed": memory.Policy(mlp_rows=10),
    "attention kept": memory.Policy(attention=2, mlp_rows=10),
    "some unchecked": memory.Policy(unchecked=1, attention=1, mlp_rows=10),
    "offloaded": memory.Policy(attention=2, offload=True, mlp_rows=10),
    "all at once": memory.Policy(unchecked=1, attention=2, offload=True, mlp_rows=7),
}


def tiny(seed=0, dtype=torch.float32, n_layers=5, **changes) -> Llama:
    shape = dict(d_model=48, n_layers=n_layers, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=80)
    config = ModelConfig(**(shape | dict(vocab_size=96, rope_theta=500.0) | changes))
    model = Llama(config).init_weights(0.2, torch.Generator().manual_seed(seed))
    return model.to(dtype)


def assert_same(got, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=2e-5, atol=2e-5 * grad.abs().max().item())


def gradients(model, ids):
    model.zero_grad()
    last, hidden = model(ids, taps=(0, 2, 5))
    sum((h.float() * h.float().roll(1, -1)).sum() for h in (last, *hidden.values())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_activation_policy_gives_the_unchecked_gradients(policy):
    ids = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))
    model = tiny()
    expected = gradients(model, ids)
    offload = memory.Offload(5, 2 * 33 * 48 * 4, torch.device("cpu")) if policy.offload else None
    memory.use(model, policy, offload)
    for _ in range(2):  # twice: slots and events are used again
        got = gradients(model, ids)
    assert_same(got, expected)


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [0, 3])
def test_recomputing_stops_before_the_mlp_and_repeats_no_attention_that_was_kept(kept):
    ids = torch.randint(96, (1, 32), generator=torch.Generator().manual_seed(1))
    model = tiny()
    memory.use(model, memory.Policy(attention=kept, mlp_rows=32))
    last, _ = model(ids)
    with CountOps() as backward:
        last.sum().backward()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert backward.counts[attention] == 5 - kept
    # Per block: recomputed q, k, v, o, gate, up: 6. Gradients of 7 weights and 7 inputs: 14.
    products = sum(n for op, n in backward.counts.items() if "mm" in op.name())
    assert products == 5 * (6 + 14)


def test_offloaded_inputs_leave_the_device_and_come_back_unchanged():
    model, ids = tiny(), torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    offload = memory.Offload(5, 2 * 16 * 48 * 4, torch.device("cpu"))
    memory.use(model, memory.Policy(unchecked=1, offload=True), offload)
    taps = (0, 1, 2, 3)  # the inputs of blocks 0 to 3
    _, hidden = model(ids, taps=taps)
    assert set(offload.on_gpu) == {2, 3}  # the others were let go
    for i in taps:
        assert torch.equal(offload._slot(i, (2, 16, 48), torch.float32), hidden[i])
    hidden[3].sum().backward()


def test_compiled_blocks_share_graphs_and_give_the_same_gradients(monkeypatch):
    ids = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))
    model = tiny()
    expected = gradients(model, ids)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(memory._graph, dynamic=False, fullgraph=True, backend=graphs)
    monkeypatch.setattr(memory, "_compiled", lambda: run)
    policy = memory.Policy(1, 2, offload=True, mlp_rows=20, compile=True)
    memory.use(model, policy, memory.Offload(5, 2 * 33 * 48 * 4, torch.device("cpu")))
    got = [gradients(model, ids) for _ in range(2)][1]
    assert graphs.frame_count == 3  # recomputed, recomputed but for attention, unchecked
    assert_same(got, expected)


def units(length):
    """One step of the paper with long passes of this length."""
    return [memory.Unit("long", 1, length, 2**20 // length), *bench.UNITS[1:]]


def run_losses(student, teacher, optimizer, ready, compare):
    """Four optimizer steps of a long and a short micro-batch; every loss."""
    losses = []
    for step in range(4):
        ids = torch.randint(96, (2, 41), generator=torch.Generator().manual_seed(step))
        ready("long")
        hidden, _ = student(ids[:, :-1])
        nll, count = next_token_loss(hidden, student.lm_head_weight, ids[:, 1:])
        (nll / count).backward()
        ready("short")
        with torch.no_grad():
            _, target = teacher(ids[:, :-1], taps=(2, 5))
        _, hidden = student(ids[:, :-1], taps=(2, 5))
        loss = sum(compare(hidden[i], target[i]) for i in (2, 5))
        loss.backward()
        losses += (nll / count).item(), loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def test_the_whole_small_memory_path_trains_like_plain_fp32():
    adamw = 3e-3, (0.9, 0.95), 1e-8, 0.1
    student, teacher = (tiny(seed).bfloat16().float() for seed in (0, 1))
    reference = torch.optim.AdamW(student.parameters(), *adamw)
    plain = run_losses(student, teacher, reference, lambda name: None, cosine_distance)
    lean, teacher = tiny(0, torch.bfloat16), tiny(1, torch.bfloat16).requires_grad_(False)
    passes = [memory.Unit("long", 2, 40), memory.Unit("short", 2, 40, taps=2)]
    plan = memory.make_plan(lean.config, passes, 8 * memory.GIB, 8 * memory.GIB)
    policy = memory.Policy(1, 2, offload=True, mlp_rows=32)
    plan = replace(plan, host_state=True, teacher_resident=False, slot_bytes=2 * 40 * 48 * 2)
    machine = memory.Machine(
        replace(plan, policies=dict(long=policy, short=policy)), lean, teacher, *adamw
    )
    compare = functools.partial(memory.in_chunks, cosine_distance, rows=30)
    losses = run_losses(lean, teacher, machine.optimizer, machine.ready, compare)
    assert plain[::2].diff().abs().min() > 0.02  # it does train
    torch.testing.assert_close(losses, plain, rtol=2**-7, atol=0)  # one bf16 step
    for (_, master), p in zip(masters(machine.optimizer), student.parameters(), strict=True):
        assert (master - p).norm() < 0.02 * p.norm()


def test_a_visiting_teacher_lives_in_one_host_buffer(monkeypatch):
    teacher = tiny(dtype=torch.bfloat16).requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    visitor = memory.Visitor(teacher, torch.device("cpu"))
    params = dict(teacher.named_parameters())
    home = {name: p.data_ptr() for name, p in params.items()}
    ends = [home[name] + p.nbytes for name, p in params.items()]
    assert all(0 <= b - a < 64 for a, b in zip(ends, [*home.values()][1:], strict=False))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: t.clone())  # stands for a GPU
    visitor.come()
    assert [n for n, p in params.items() if p.data_ptr() == home[n]] == ["lm_head.weight"]
    here = params["norm.weight"].data_ptr()
    visitor.come(lm_head=True)  # brings what is missing, and only that
    assert not {p.data_ptr() for p in params.values()} & set(home.values())
    assert params["norm.weight"].data_ptr() == here
    assert all(map(torch.equal, params.values(), before))
    visitor.leave()
    assert {n: p.data_ptr() for n, p in params.items()} == home


def test_chunked_hidden_distance_is_the_mean_over_tokens_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 11, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    grads = []
    for distance in (cosine_distance, functools.partial(memory.in_chunks, cosine_distance, rows=7)):
        leaf = a.clone().requires_grad_()
        loss = distance(leaf, b)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("length", [32768, 131072])
@pytest.mark.parametrize("gib", [79, 139])
def test_planned_activations_are_within_a_tenth_of_those_the_code_allocates(length, gib):
    plan = memory.make_plan(bench.LLAMA3_8B, units(length), gib * memory.GIB, 120 * memory.GIB)
    config = replace(bench.LLAMA3_8B, n_layers=6)  # every block is like its neighbours
    for unit in plan.units.values():
        p = plan.policies[unit.name]
        policy = replace(p, unchecked=p.unchecked // 6, attention=min(p.attention, 3))
        traced = bench.traced_peak(config, unit, policy)
        planned = sum(memory.activation_memory(config, unit, policy).values())
        assert 0.95 < planned / traced < 1.15, (unit, policy)


def test_planner_meets_the_targets_and_more_memory_is_never_slower():
    def peak(plan):
        return max(sum(terms.values()) for terms in plan.gpu.values())

    def plan(length, gib, host=120, moments=torch.float32):
        args = bench.LLAMA3_8B, units(length), int(gib * memory.GIB), host * memory.GIB, moments
        return memory.make_plan(*args)

    at_80gb = plan(32768, 80e9 / 2**30)
    assert peak(at_80gb) < 74 * memory.GIB and at_80gb.host_state
    for length in (131072, 262144):
        assert peak(plan(length, 139)) < 139 * memory.GIB
    assert plan(393216, 139, moments=torch.bfloat16).policies["long"].offload
    seconds = [plan(32768, gib).seconds for gib in (66, 72, 80, 100, 139, 200, 400)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    roomy = plan(32768, 1000)
    assert not roomy.host_state and roomy.teacher_resident
    assert all(p.unchecked == 32 for p in roomy.policies.values())


def test_a_plan_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(ValueError) as no_gpu:
        memory.make_plan(bench.LLAMA3_8B, units(32768), 40 * memory.GIB, 120 * memory.GIB)
    assert "44.9 GiB of the GPU" in str(no_gpu.value) and "no length fits" in str(no_gpu.value)
    with pytest.raises(ValueError) as no_host:
        memory.make_plan(bench.LLAMA3_8B, units(131072), 79 * memory.GIB, 100 * memory.GIB)
    assert "--moments bf16 saves 29.9 GiB, and fits" in str(no_host.value)
    assert "--target_len" in str(no_host.value)


def test_flops_are_those_of_the_roofline():
    expected = {"long": 74.24e15, "s2l": 16.89e15, "short": 44.75e15}  # one step of the paper
    for unit in units(32768):
        total = unit.count * memory.model_flops(bench.LLAMA3_8B, unit)
        assert total == pytest.approx(expected[unit.name], rel=2e-3)


class Stream:
    """A GPU stream's order of events: what of every other stream is certain to have finished."""

    def __init__(self):
        self.clock = collections.Counter()

    def wait_event(self, event):
        self.clock |= event  # the larger count of each

    def wait_stream(self, other):
        self.wait_event(other.clock)

    def record_event(self):
        return self.clock.copy()


class RaceDetector(TorchDispatchMode):
    """Stands in for torch.cuda and checks that streams and events order every tensor operation.

    What it reads must have been written, what it writes or frees must be out of use."""

    def __init__(self):
        super().__init__()
        self.now, self.Stream = Stream(), Stream
        self.accesses, self.owned, self.races = [], set(), []

    def current_stream(self):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def synchronize(self):
        pass

    def access(self, first, last, writes, stream, what):
        for a, b, wrote, other, tick, _ in self.accesses:
            if a < last and first < b and (writes or wrote) and stream.clock[other] < tick:
                self.races.append(what)
        self.accesses.append((first, last, writes, stream, stream.clock[stream], what))

    def free(self, first, last, stream):
        stream.clock[stream] += 1
        self.access(first, last, True, stream, "free")
        self.accesses = [a for a in self.accesses if not (a[0] < last and first < a[1])]
        self.owned.discard(first)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.now.clock[self.now] += 1
        out = function(*args, **(kwargs or {}))
        written = {
            id(a)
            for a, s in zip(args, function._schema.arguments, strict=False)
            if s.alias_info is not None and s.alias_info.is_write
        }
        for t in [*tree_leaves((args, kwargs)), *tree_leaves(out)]:
            if isinstance(t, torch.Tensor) and t.nbytes:
                storage = t.untyped_storage()
                new = storage.data_ptr() not in self.owned
                if new:
                    self.owned.add(storage.data_ptr())
                    ends = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
                    weakref.finalize(storage, self.free, *ends, self.now)
                writes = new or id(t) in written
                if function is not torch.ops.aten.detach.default and not function.is_view:
                    ends = t.data_ptr(), t.data_ptr() + t.nbytes
                    self.access(*ends, writes, self.now, str(function))
        return out


@pytest.fixture
def races(monkeypatch):
    detector = RaceDetector()
    monkeypatch.setattr(torch, "get_device_module", lambda device: detector)
    return detector


def test_streamed_optimizer_state_has_no_race(races):
    p = torch.nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    optimizer = memory.AdamW([p], 0.1, (0.9, 0.95), 1e-8, 0.0, host=True, chunk=10)
    with races:
        for _ in range(2):
            p.grad.fill_(1.0)
            optimizer.step()
    assert races.accesses and not races.races


def test_offloaded_inputs_have_no_race(races):
    ids = torch.randint(96, (1, 8), generator=torch.Generator().manual_seed(1))
    model = tiny()
    policy = memory.Policy(unchecked=1, offload=True)
    memory.use(model, policy, memory.Offload(5, 8 * 48 * 4, torch.device("cpu")))
    with races:
        for _ in range(2):
            model(ids)[0].sum().backward()
    assert races.accesses and not races.races


# ------------------------------------------------------------------------------------- longred.py

WORDS = "the a red long short cat dog runs reads window of in to and 7 42 on, is. was; it\n".split(
    " "
)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A tiny byte-level checkpoint, window 64, with text beside it: (folder, long, short)."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_llama(vocab_size=256, std=0.1)
    write_byte_tokenizer(root / "tokenizer")
    folder = save_checkpoint(model, root / "original", tokenizer_from=root / "tokenizer")
    rng = random.Random(0)
    for name in ("long", "short"):
        (root / f"{name}.txt").write_text(" ".join(rng.choices(WORDS, k=12_000)))
    return folder, root / "long.txt", root / "short.txt"


def tiny_run(ckpt, out_dir, **changes) -> Config:
    folder, long, short = ckpt
    settings = dict(ckpt=str(folder), target_len=256, out_dir=str(out_dir), rope_theta=3000.0)
    settings |= dict(long_data=[str(long)], short_data=[str(short)], steps=4, lr=1e-3)
    settings |= dict(long_micro=2, long_batch=1, short_micro=1, short_batch=3, s2l_micro=1)
    settings |= dict(
        s2l_batch=2, cache_dir=str(out_dir.parent / "tokens"), eval_tokens=512, device="cpu"
    )
    return Config(**(settings | changes))


def read_log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def same_run(a, b):
    """Two runs ended with the same bits and logged the same steps."""
    one, two = (load_file(folder / "hf" / "model.safetensors") for folder in (a, b))
    logs = [[(x["step"], x["loss"], x["grad_norm"]) for x in read_log(f)] for f in (a, b)]
    return logs[0] == logs[1] and all(torch.equal(one[name], two[name]) for name in one)


def killed_after_two(whole, out):
    """A copy of a run of 4 steps as it was somewhere after its state of step 2 was saved."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "hf")
    shutil.rmtree(out / "checkpoints" / "step-000004")
    return out


def test_cosine_distance_by_hand():
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]]])
    teacher = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [1.0, 0.0]]])
    assert cosine_distance(student, teacher).item() == pytest.approx((0 + 0.2 + 2) / 3, abs=1e-6)
    assert cosine_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_identical_teacher_and_student_have_no_distillation_loss():
    teacher, student = tiny_llama(), tiny_llama()
    short = short_text_distillation(student, teacher, tokens(), [1, 2, 3])
    positions = torch.arange(33).expand(2, -1)
    s2l = short_to_long_distillation(student, teacher, tokens(), positions)
    assert abs(short.item()) < 1e-6 and abs(s2l.item()) < 1e-6


@pytest.fixture
def pairs(tmp_path):
    """The same teacher and student, ours and transformers': student with another theta."""
    original = save_checkpoint(tiny_llama(), tmp_path / "original")
    student = load_checkpoint(original, rope_theta=9000.0).train()
    extended = save_checkpoint(student, tmp_path / "extended")
    return (load_checkpoint(original), student), (hf_model(original), hf_model(extended))


def distance_by_hand(a, b):
    dot = (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())
    return (1 - dot).mean()


@pytest.mark.parametrize("which", ["long", "short", "s2l"])
def test_losses_and_gradients_equal_those_from_transformers(pairs, which):
    (teacher, student), (hf_teacher, hf_student) = pairs
    ids = tokens(length=34)
    skipped = torch.from_numpy(data.uniform_positions(np.random.default_rng(0), 2, 34, 200))
    got = {
        "long": lambda: long_text_loss(student, ids),
        "short": lambda: short_text_distillation(student, teacher, ids, [1, 3]),
        "s2l": lambda: short_to_long_distillation(student, teacher, ids, skipped),
    }[which]()
    with torch.no_grad():
        target = hf_teacher(ids, output_hidden_states=True).hidden_states
    positions = skipped if which == "s2l" else None
    out = hf_student(ids, position_ids=positions, output_hidden_states=True)
    want = {
        "long": lambda: F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        "short": lambda: sum(distance_by_hand(out.hidden_states[i], target[i]) for i in (1, 3)),
        "s2l": lambda: distance_by_hand(out.hidden_states[3], target[3]),
    }[which]()
    assert rel(got, want) < 1e-5 and want > 1e-3
    got.backward()
    want.backward()
    theirs = {n.removeprefix("model."): p.grad for n, p in hf_student.named_parameters()}
    for name, p in student.named_parameters():
        if theirs[name] is None:
            assert p.grad is None, name  # no LM head in a distillation
        else:
            assert rel(p.grad, theirs[name]) < 1e-4, name


def test_layers_are_chosen_by_attention_drift_and_the_last_is_among_them(pairs):
    teacher, student = pairs[0]
    kl = attention_kl(teacher, student, tokens()).mean(1)
    most = int(kl[:2].argmax()) + 1
    assert select_distill_layers(teacher, student, tokens(), 1) == [3]
    assert select_distill_layers(teacher, student, tokens(), 2) == [most, 3]
    assert select_distill_layers(teacher, student, tokens(), 9) == [1, 2, 3]


def test_one_step_of_train_equals_the_formula_written_out(ckpt, tmp_path):
    c = tiny_run(ckpt, tmp_path / "run", steps=1, distill_layers=[2, 3], eval_tokens=0)
    exported = load_checkpoint(train(c))
    folder, long, short = ckpt
    teacher = load_checkpoint(folder)
    student = load_checkpoint(folder, rope_theta=3000.0).train()
    tok, cache = data.load_tokenizer(folder), tmp_path / "tokens"
    long = data.tokenize([str(long)], tok, cache, "long")
    short = data.tokenize([str(short)], tok, cache, "short")
    long_ids = torch.cat([data.Stream(long, "long", c.seed, 1, 256).batch(m) for m in (0, 1)])
    short_ids = data.Stream(short, "short", c.seed, 3, 64).batch(0)[:, :-1]
    s2l_ids = data.Stream(long, "s2l", c.seed, 2, 64).batch(0)[:, :-1]
    rng = np.random.default_rng([c.seed, 0x52, 0])
    skipped = torch.from_numpy(data.cream_positions(rng, 2, 64, 256))
    total = (
        8 / 16 * long_text_loss(student, long_ids)
        + 6 / 16 * 5 * short_text_distillation(student, teacher, short_ids, [2, 3])
        + 2 / 16 * 10 * short_to_long_distillation(student, teacher, s2l_ids, skipped)
    )
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
    torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), 1e-8, 0.1).step()
    line = read_log(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for (name, a), b in zip(exported.named_parameters(), student.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-5, name  # lr / 50: Adam's first step is lr * sign


def test_the_teacher_is_frozen_and_kept_out_of_everything(ckpt, tmp_path, monkeypatch):
    loaded, optimized = [], []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        longred,
        "load_checkpoint",
        lambda *a, **k: loaded.append(load_checkpoint(*a, **k)) or loaded[-1],
    )
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, *a: optimized.extend(p := list(p)) or adamw(p, *a)
    )
    train(tiny_run(ckpt, tmp_path / "run", steps=3, save_every=1))
    teacher, student = loaded
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    ours = {id(p) for p in student.parameters()}
    assert {id(p) for p in optimized} == ours and not ours & {id(p) for p in teacher.parameters()}
    for a, b in zip(teacher.parameters(), load_checkpoint(ckpt[0]).parameters(), strict=True):
        assert torch.equal(a, b)
    state = torch.load(runs.newest_state(tmp_path / "run") / "state.pt")
    named = dict(student.named_parameters()).keys()
    assert state["model"].keys() == named and state["optimizer"].keys() == named


def test_every_step_takes_the_learning_rate_that_it_logs(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(longred, "learning_rate", lambda c, step: 0.0)
    still = load_checkpoint(train(tiny_run(ckpt, tmp_path / "run", steps=2, eval_tokens=0)))
    assert [line["lr"] for line in read_log(tmp_path / "run")] == [0.0, 0.0]
    for a, b in zip(still.parameters(), load_checkpoint(ckpt[0]).parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss_and_exports_the_new_window(ckpt, tmp_path):
    exported = train(tiny_run(ckpt, tmp_path / "run", steps=12, lr=3e-3))
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 13))
    assert log[-1]["loss_long"] < log[0]["loss_long"] - 0.3
    config = json.loads((exported / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["rope_theta"] == 3000.0
    theirs, ours = hf_model(exported), load_checkpoint(tmp_path / "run")  # OUT_DIR is a --ckpt too
    ids = tokens(1, 200, 256)
    with torch.no_grad():
        assert rel(ours.logits(ours(ids)[0]), theirs(ids).logits) < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(exported)("ab").input_ids
    assert "| longred |" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("method, absent", [("long_cpt", {"short", "s2l"}), ("mix_cpt", set())])
def test_baselines_come_from_the_same_loop(ckpt, tmp_path, method, absent):
    train(tiny_run(ckpt, tmp_path / "run", method=method, steps=1, eval_tokens=0))
    line = read_log(tmp_path / "run")[0]
    for name in ("short", "s2l"):
        assert (line[f"loss_{name}"] is None) == (name in absent)
    shares = {"long": 1.0} if absent else {"long": 8 / 16, "short": 6 / 16, "s2l": 2 / 16}
    want = sum(share * line[f"loss_{name}"] for name, share in shares.items())
    assert line["loss"] == pytest.approx(want)
    assert absent or line["loss_short"] > 4  # cross-entropy over 256 bytes, not a distance


def test_a_report_that_finds_no_short_text_says_so_and_ends_the_run_well(ckpt, tmp_path, capsys):
    train(tiny_run(ckpt, tmp_path / "run", method="long_cpt", short_data=["nowhere"], steps=1))
    assert "not measured: " in capsys.readouterr().out
    assert "| long_cpt |" in (tmp_path / "run" / "report.md").read_text()


def test_sentences_end_where_any_tokenizer_says(ckpt):
    for folder, text in [(ckpt[0], "Is 1.5 it?\nNo! Yes"), (STORIES, "He ran. Why? Oh!\nHm")]:
        if folder.is_dir():
            tokenizer = data.load_tokenizer(folder)
            ids = np.array(tokenizer.encode_batch([text])[0])
            starts = data.sentence_starts(ids, data.sentence_ends(tokenizer))
            cuts = [*starts[1:], len(ids)]
            parts = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, cuts, strict=True)]
            want = re.split(r"(?<=[.!?\n])", text)
            assert [p.strip() for p in parts] == [w.strip() for w in want]


@pytest.mark.parametrize("scheme", ["pose", "longrecipe"])
def test_one_step_of_longrecipe_is_cross_entropy_under_its_positions(ckpt, tmp_path, scheme):
    c = tiny_run(ckpt, tmp_path / "run", method="longrecipe", steps=2, eval_tokens=0, lr=1e-9)
    train(c := replace(c, long_position_scheme=scheme, long_batch=3))
    student = load_checkpoint(ckpt[0], rope_theta=3000.0)
    tok = data.load_tokenizer(ckpt[0])
    corpus = data.tokenize(c.long_data, tok, c.cache_dir, "long")
    text, log = data.Stream(corpus, "long", c.seed, 3, 77), read_log(tmp_path / "run")  # 0.3 x 256
    ends = tok.encode_batch([".!?\n"])[0]
    for step in (0, 1):
        losses = []
        for index in (2 * step, 2 * step + 1):  # two micro-batches
            ids, rng = text.batch(index), np.random.default_rng([c.seed, 0x4C, index])
            if scheme == "pose":
                at = data.pose_positions(rng, 3, 77, 256)
            else:
                cuts = [[i + 1 for i in range(76) if row[i] in ends] for row in ids]
                at = [data.longrecipe_positions(rng, np.array(b), 77, 256) for b in cuts]
            at = torch.as_tensor(np.stack(at))
            losses.append(long_text_loss(student, ids, at).item())
        assert log[step]["loss_long"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert log[step]["loss"] == log[step]["loss_long"] and log[step]["loss_short"] is None


def test_longred_may_use_the_cheap_long_stream(ckpt, tmp_path):
    logs = []
    for scheme in ("ordinary", "longrecipe"):
        c = tiny_run(ckpt, tmp_path / scheme, long_position_scheme=scheme, steps=1, eval_tokens=0)
        train(c)
        logs.append(read_log(tmp_path / scheme)[0])
    assert logs[0]["tokens"] - logs[1]["tokens"] == 2 * (256 - 77)
    assert logs[0]["loss_short"] == logs[1]["loss_short"] > 0
    assert logs[0]["loss_s2l"] == logs[1]["loss_s2l"] > 0
    assert logs[0]["loss_long"] != logs[1]["loss_long"]


def test_replay_follows_at_ordinary_positions_with_its_rate_to_zero(ckpt, tmp_path):
    c = tiny_run(ckpt, tmp_path / "run", method="longrecipe", steps=1, replay_steps=4, lr=1e-9)
    c = replace(c, replay_data=[str(ckpt[2])], replay_batch=2, eval_tokens=0)
    train(c)
    first, *replay = read_log(tmp_path / "run")
    assert [line["lr"] for line in replay] == pytest.approx([1e-10, 7.5e-11, 5e-11, 2.5e-11])
    assert first["lr"] == 1e-9 and first["loss_replay"] is None
    student, tok = load_checkpoint(ckpt[0], rope_theta=3000.0), data.load_tokenizer(ckpt[0])
    corpus = data.tokenize(c.replay_data, tok, c.cache_dir, "replay")
    text = data.Stream(corpus, "replay", c.seed, 2, 64)  # the old window
    for line in replay:
        at = 2 * (line["step"] - 1)  # two micro-batches a step
        ids = torch.cat([text.batch(at), text.batch(at + 1)])
        assert line["loss_replay"] == pytest.approx(long_text_loss(student, ids).item(), rel=1e-5)
        assert line["loss"] == line["loss_replay"] and line["loss_long"] is None
        assert line["tokens"] == 2 * 2 * 64


def test_merge_averages_original_and_trained_weights_on_export_only(ckpt, tmp_path):
    weights = [load_file(ckpt[0] / "model.safetensors")]
    for merge in (0.0, 0.25):
        c = tiny_run(ckpt, tmp_path / f"{merge}", method="long_cpt", steps=2, merge=merge)
        weights.append(load_file(train(replace(c, lr=0.1)) / "model.safetensors"))
        config = json.loads((Path(c.out_dir) / "hf" / "config.json").read_text())
        assert config["rope_theta"] == 3000.0 and config["max_position_embeddings"] == 256
    original, trained, merged = weights
    for name in trained:
        assert torch.allclose(merged[name], 0.25 * original[name] + 0.75 * trained[name], atol=1e-6)
        assert (merged[name] - trained[name]).abs().max() > 1e-3
    assert read_log(tmp_path / "0.25")[1]["loss"] == read_log(tmp_path / "0.0")[1]["loss"]


RECIPE = dict(method="longrecipe", steps=2, replay_steps=2)


@pytest.mark.parametrize("recipe", [{}, RECIPE], ids=["longred", "longrecipe"])
def test_a_stopped_run_resumes_bit_for_bit(ckpt, tmp_path, monkeypatch, recipe):
    recipe = recipe and recipe | {"replay_data": [str(ckpt[2])], "replay_batch": 2}
    train(tiny_run(ckpt, tmp_path / "whole", save_every=100, **recipe))
    print_step = longred.print_step

    def stop_after_three(c, line, eta):
        print_step(c, line, eta)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers do

    monkeypatch.setattr(longred, "print_step", stop_after_three)
    with pytest.raises(SystemExit) as stop:
        train(tiny_run(ckpt, tmp_path / "parts", save_every=2, **recipe))
    assert stop.value.code == 143
    monkeypatch.setattr(longred, "print_step", print_step)
    main(["--resume", str(tmp_path / "parts")])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_step_does_not_depend_on_how_it_is_cut_into_units(ckpt, tmp_path):
    losses = []
    changes = dict(steps=2, long_micro=1, long_batch=2, long_position_scheme="pose", eval_tokens=0)
    for units in (64, 32768):
        out = tmp_path / f"units{units}"
        train(tiny_run(ckpt, out, unit_tokens=units, **changes))
        losses.append([(line["loss"], line["grad_norm"]) for line in read_log(out)])
    assert np.allclose(*losses, rtol=1e-5)


def test_default_theta_is_the_papers_where_it_has_one():
    assert default_theta(5e5, 8192, 32768) == default_theta(5e5, 8192, 32000) == 2e7
    assert default_theta(5e5, 8192, 131072) == default_theta(5e5, 8192, 128000) == 1e8
    assert default_theta(1e6, 32768, 131072) == 2e7
    new = default_theta(1e4, 512, 2048)  # the rule: as many frequencies complete a turn
    turns = [
        (w / (2 * math.pi) > base ** (torch.arange(64) / 64)).sum()
        for w, base in ((512, 1e4), (2048, new))
    ]
    assert turns[0] == turns[1] and 1e5 < new < 1e6


def test_the_papers_settings_are_the_defaults(ckpt):
    model = ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, rope_theta=5e5)
    asked = Config(ckpt="llama3-8b", long_data=["x"], short_data=["y"], device="cpu")
    at_32k = resolve(dataclasses.replace(asked, target_len=32768), model, ckpt[0])
    assert (at_32k.rope_theta, at_32k.alpha_short, at_32k.alpha_s2l) == (2e7, 5, 10)
    assert (at_32k.n_distill_layers, at_32k.position_scheme, at_32k.short_len) == (6, "cream", 1024)
    assert {n: s.tokens for n, s in plan_streams(at_32k).items()} == {
        "long": 1048576,
        "short": 786432,
        "s2l": 262144,
    }
    assert (at_32k.steps, at_32k.lr, at_32k.weight_decay, at_32k.beta2) == (512, 2e-5, 0.1, 0.95)
    assert at_32k.out_dir == "out/llama3-8b-32768"
    bare = resolve(Config(ckpt="x", target_len=32768, device="cpu"), model, ckpt[0])  # two flags
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU, and 8.0B parameters"):
            resolve(Config(ckpt="x", target_len=32768), model, ckpt[0])
    assert (bare.long_data, bare.short_data) == (data.DEFAULT_LONG, data.DEFAULT_SHORT)
    assert (bare.s2l_data, at_32k.s2l_data) == (data.DEFAULT_SHORT, ["x"])
    far = resolve(dataclasses.replace(asked, target_len=131072), model, ckpt[0])
    assert (far.rope_theta, far.alpha_short, far.alpha_s2l) == (1e8, 2, 15)
    assert (far.n_distill_layers, far.position_scheme) == (3, "uniform")
    for length, like in ((32000, at_32k), (128000, far)):  # the paper's own round numbers
        as_written = resolve(dataclasses.replace(asked, target_len=length), model, ckpt[0])
        for key in ("rope_theta", "alpha_short", "n_distill_layers", "position_scheme"):
            assert getattr(as_written, key) == getattr(like, key), key
    cpt = resolve(dataclasses.replace(asked, target_len=32768, method="long_cpt"), model, ckpt[0])
    assert {n: s.tokens for n, s in plan_streams(cpt).items()} == {"long": 2097152}


def test_metas_folder_is_extended_and_its_export_is_a_checkpoint(ckpt, tmp_path):
    folder = meta_folder(tmp_path / "meta", tiny_llama(vocab_size=612, n_layers=2, std=0.1), 2)
    tiktoken_file(folder / "tokenizer.model", ckpt[1].read_text()[:4000], merges=20)
    run = tiny_run(ckpt, tmp_path / "out", steps=1, distill_layers=[2], eval_tokens=0)
    run.ckpt = str(folder)
    with pytest.raises(ValueError, match="--original_len is missing: .* 4096 for Llama 2"):
        train(run)
    train(dataclasses.replace(run, original_len=64))
    exported = load_config(resolve_checkpoint(tmp_path / "out"))
    assert exported.max_position_embeddings == 256 and exported.rope_theta == 3000.0
    assert exported.stored_dtype() == torch.bfloat16
    again = tiny_run(ckpt, tmp_path / "again", target_len=512, steps=1, eval_tokens=0)
    again.ckpt = str(tmp_path / "out")
    assert load_config(train(again)).max_position_embeddings == 512


def test_the_memory_estimate_knows_recomputation_and_the_container():
    one, few = (runs.activation_bytes(tiny_config(), 1000, recompute) for recompute in (0, 1))
    assert few < one / 2
    if sys.platform == "linux":
        assert 2**20 < runs.available_memory() <= os.sysconf("SC_PHYS_PAGES") * 4096


@pytest.mark.parametrize("keep, states", [(2, 3), (0, 0)])
def test_the_disk_must_hold_the_export_and_keep_and_one_more_states(
    ckpt, tmp_path, monkeypatch, keep, states
):
    model, there = load_config(ckpt[0]), tmp_path / "run" / "checkpoints" / "step-000001"
    c = resolve(tiny_run(ckpt, tmp_path / "run", keep=keep, device="cpu"), model, ckpt[0])
    weights = sum(p.numel() for p in load_checkpoint(ckpt[0]).parameters())
    need = int(weights * (4 + states * 12))  # fp32; a state: weights and two moments
    there.mkdir(parents=True)
    (there / "state.pt").write_bytes(bytes(10_000))  # goes as new ones come
    for free, enough in ((0.95 * need, False), (1.05 * need, True)):
        usage = shutil._ntuple_diskusage(0, 0, free - 10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        refused = contextlib.nullcontext() if enough else pytest.raises(ValueError, match="--keep")
        with refused:
            longred.preflight(c, model)


def test_lengths_that_a_gpus_attention_cannot_take_are_refused(ckpt):
    model = ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, rope_theta=5e5)
    asked = Config(ckpt="x", target_len=32768, short_len=1000, device="cuda")
    with pytest.raises(ValueError, match="--short_len 1000: .* multiple of 128, try 896"):
        resolve(asked, model, ckpt[0])


# What is wrong: flags changed in a good command line (@: in the test's folder), what is said
BAD_INPUTS = {
    "unknown flag": ({"--target_length": 9}, "unrecognized arguments: --target_length"),
    "unknown ckpt": ({"--ckpt": "lama3"}, "no checkpoint 'lama3'.*llama3-8b"),
    "missing file": ({"--long_data": "nowhere.txt"}, "no file at nowhere.txt"),
    "truncated weights": ({"--ckpt": "@cut"}, "cut/model.safetensors is missing, truncated"),
    "tokenizer misfit": ({"--ckpt": "@misfit"}, "ids go up to 256, the model has 256"),
    "text too short": ({"--long_data": "@tiny.txt"}, "long: text too short"),
    "target not above": ({"--target_len": 64}, "64 is not above the original window of 64"),
    "train above target": ({"--train_len": 257}, "257 is above --target_len 256"),
    "replay of nothing": ({"--replay_steps": 2}, "need both or none"),
    "merge of all": ({"--merge": 1}, "from 0 to below 1"),
    "no such layer": ({"--distill_layers": 4}, "hidden states 1 to 3"),
    "loss not finite": ({"--lr": "1e30"}, "step 3: .*2 steps in a row not finite"),
    "out of range": ({"--steps": 0}, "--steps 0: need at least 1"),
    "no such device": ({"--device": "gpu"}, "--device gpu: need cpu or cuda"),
    "uphill": ({"--grad_clip": -1}, "--grad_clip -1.0: need at least 0"),
    "not a number": ({"--steps": "many"}, "--steps: invalid int value: 'many'"),
    "resume and more": ({"--resume": "@void"}, "--resume takes its run's own"),
    "no checkpoint": ({"--ckpt": None}, "--[a-z_0-9]+ needs --ckpt"),
    "disk too small": ({}, "needs 0.0 GB .*its disk has 0.0 GB free"),
    "memory too small": ({}, "memory: about 0.0 GB needed .*--recompute"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_in_one_line_with_nothing_half_written(ckpt, tmp_path, case, monkeypatch):
    folder, long, short = ckpt
    change, said = BAD_INPUTS[case]
    if case == "truncated weights":
        cut = shutil.copytree(folder, tmp_path / "cut") / "model.safetensors"
        cut.write_bytes(cut.read_bytes()[:-100])
    if case == "tokenizer misfit":
        path = shutil.copytree(folder, tmp_path / "misfit") / "tokenizer.json"
        extra = {"id": 300, "content": "<x>", "special": True, "single_word": False}
        extra |= {"lstrip": False, "rstrip": False, "normalized": False}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens": [extra]}))
    if case == "disk too small":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    if case == "memory too small":
        monkeypatch.setattr(runs, "available_memory", lambda: 10**6)
    (tmp_path / "tiny.txt").write_text("too short")
    out = tmp_path / "out"
    flags = {"--ckpt": folder, "--target_len": 256, "--long_data": long, "--short_data": short}
    flags |= {"--out_dir": out, "--cache_dir": tmp_path / "tokens", "--steps": 3, "--long_micro": 1}
    flags |= {"--long_batch": 1, "--short_batch": 1, "--s2l_batch": 1, "--device": "cpu", **change}
    given = [str(x) for flag, value in flags.items() if value is not None for x in (flag, value)]
    with pytest.raises(SystemExit) as end:
        main([x.replace("@", f"{tmp_path}/") for x in given])
    message = str(end.value.code)
    assert re.search(said, message) and "\n" not in message and len(message) < 500, message
    assert not (out / "hf").exists() and not list(tmp_path.rglob("*.partial"))
    assert case == "loss not finite" or not out.exists()


def test_resume_where_no_run_is_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no longred.json there, so no run to resume"):
        main(["--resume", str(tmp_path)])


def test_missing_weights_end_with_the_ways_to_provide_them(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, HERE / "longred.py", "--ckpt", "llama3-8b", "--target_len", "32768"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "hf download meta-llama/Meta-Llama-3-8B" in done.stderr and "--ckpt /path" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("out"))


@pytest.fixture
def small_memory(monkeypatch):
    """Makes train take the GPU's path on a CPU: bf16 weights, host state, visiting teacher."""

    def plan_memory(c, model):
        streams = plan_streams(c).values()
        units = [memory.Unit(s.name, 1, s.seq_len, taps=min(2, s.taps)) for s in streams]
        plan = memory.make_plan(model, units, 8 * memory.GIB, 8 * memory.GIB)
        policy = memory.Policy(1, 1, offload=True, mlp_rows=50)
        plan.policies = dict.fromkeys(plan.units, policy)
        plan.host_state, plan.teacher_resident = True, False
        plan.slot_bytes = 2 * model.d_model * max(u.tokens for u in units)
        return plan

    monkeypatch.setattr(longred, "plan_memory", plan_memory)


def test_the_small_memory_path_logs_what_fp32_does(ckpt, tmp_path, request):
    train(tiny_run(ckpt, tmp_path / "fp32", steps=4))
    request.getfixturevalue("small_memory")
    train(tiny_run(ckpt, tmp_path / "bf16", steps=4))
    for a, b in zip(read_log(tmp_path / "fp32"), read_log(tmp_path / "bf16"), strict=True):
        assert b["loss_long"] == pytest.approx(a["loss_long"], rel=2**-8)  # a bf16 half step
        for name in ("loss_short", "loss_s2l"):  # 1 - cos, near 0: bf16 leaves noise of its own
            assert b[name] == pytest.approx(a[name], rel=0.1, abs=2e-4)


def test_the_small_memory_path_resumes_bit_for_bit(ckpt, tmp_path, small_memory):
    train(tiny_run(ckpt, tmp_path / "whole", save_every=2))
    main(["--resume", str(killed_after_two(tmp_path / "whole", tmp_path / "parts"))])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------ evaluate.py


@pytest.fixture(scope="session")
def sentences(ckpt, tmp_path_factory):
    """Sentences of 400 different words; the tiny checkpoint's tokenizer reads bytes."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("prose") / "prose.txt"
    words = sorted({"".join(rng.choices("aeioulnrst", k=rng.randint(4, 8))) for _ in range(400)})
    path.write_text(" ".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(4000)))
    return path


@pytest.fixture(scope="session")
def source(ckpt, sentences):
    tokenizer = data.load_tokenizer(ckpt[0])
    return evaluate.Source(tokenizer, np.array(tokenizer.encode_batch([sentences.read_text()])[0]))


def nll_by_hand(theirs, ids):
    """Transformers' loss on each token but the first."""
    with torch.no_grad():
        logits = theirs(ids).logits.double()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def test_what_was_kept_equals_transformers(pairs):
    ours, theirs = pairs
    ids = tokens(3, 34)
    got = evaluate.kept(*ours, ids, rows=7, attention_sequences=2)
    with torch.no_grad():
        a, b = (m(ids[:, :-1], output_hidden_states=True) for m in theirs)
    p, q = (x.logits.double().softmax(-1) for x in (a, b))
    assert got["loss"] == pytest.approx(nll_by_hand(theirs[1], ids).mean().item(), rel=1e-4)
    assert got["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert got["same_top1"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    want = [
        1 - distance_by_hand(*x).item() for x in zip(a.hidden_states, b.hidden_states, strict=True)
    ]
    assert got["cosine"] == pytest.approx(want, abs=1e-5) and want[-1] < 0.999
    heads = attention_kl(*ours, ids[:2, :-1])
    assert rel(torch.tensor(got["attention_kl"]), heads) < 1e-4
    same = evaluate.kept(ours[0], ours[0], ids)
    assert same["kl"] == 0 and same["same_top1"] == 1 and min(same["cosine"]) > 1 - 1e-6


@pytest.mark.parametrize("chunk", [5, 4096])
def test_losses_by_position_equal_transformers(pairs, chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    ids = tokens(3, 50)
    got = evaluate.position_losses(pairs[0][1], ids, rows=3)
    assert rel(got, nll_by_hand(pairs[1][1], ids).mean(0)) < 1e-5


@pytest.mark.parametrize("chunk", [5, 4096])
def test_a_cut_window_scores_each_token_from_its_own_window_only(pairs, chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    ids, window, stride = tokens(1, 50), 16, 4
    got = evaluate.position_losses(pairs[0][1], ids, window)
    for t in range(49):  # token t + 1 is predicted from start .. t
        end = min(49, window + max(0, math.ceil((t + 1 - window) / stride)) * stride)
        start = max(0, end - window)
        assert t - start < window and (t < window or t - start >= window - stride)
        want = nll_by_hand(pairs[1][1], ids[:, start : t + 2])[0, -1]
        assert got[t].item() == pytest.approx(want.item(), rel=1e-4)
    far = evaluate.position_losses(pairs[0][1], ids, 49)
    assert torch.equal(far, evaluate.position_losses(pairs[0][1], ids))


@pytest.mark.parametrize("length", [96, 512])
def test_a_passage_is_repeated_at_each_depth_and_new_in_the_control(length):
    text, depths = np.arange(1000), [0.0, 0.3, 1.0]  # every token differs: a match is a copy
    rows, passage = evaluate.repeat_sequences(text, length, depths, n=2, seed=0)
    assert rows.shape == (8, length) and passage == min(64, length // 8)
    for i, row in enumerate(rows.tolist()):
        again, before = row[-passage:], row[:-passage]
        found = [at for at in range(length - 2 * passage + 1) if before[at:][:passage] == again]
        want = [*(round(d * (length - 2 * passage)) for d in depths), None][i % 4]
        assert found == ([] if want is None else [want])
        assert len(set(before)) == len(before)


def test_the_loss_on_a_repeated_passage_equals_transformers(pairs, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 100)
    ids = tokens(3, 45)
    ids[:, -5:] = pairs[1][1](ids).logits[:, -6:-1].argmax(-1)  # so that some are first choices
    loss, right = evaluate.repeat_scores(pairs[0][1], ids, passage=12, cue=3).unbind(1)
    assert rel(loss, nll_by_hand(pairs[1][1], ids)[:, -9:].mean(1)) < 1e-5
    choices = pairs[1][1](ids).logits[:, -10:-1].argmax(-1)
    assert torch.equal(right, (choices == ids[:, -9:]).double().mean(1)) and right.max() > 0


def test_first_choices_on_a_passage_under_pcd_are_those_of_generate(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    model, ids = tiny_llama(), tokens(length=30)
    ids = model.generate(ids, 12, pcd={})  # all of it PCD's own choice
    ids[1, -3] = (ids[1, -3] + 1) % 96
    right = evaluate.repeat_scores(model, ids, 12, 4, pcd=model_module.PCD)[:, 1]
    assert right[0] == 1 and right[1] <= 7 / 8
    assert (evaluate.repeat_scores(model, ids, 12, 4)[:, 1] < right).any()


@pytest.mark.parametrize("length", [2048, 4999])
@pytest.mark.parametrize("task", evaluate.NIAH)
def test_needles_are_there_once_at_their_depth_and_exact_in_length(source, task, length):
    for i, depth in enumerate([0.0, 0.37, 1.0]):
        rng = np.random.default_rng([i, length])
        sample = evaluate.make_sample(source, task, length, depth, rng)
        assert len(sample.prompt) + sample.n_new == length
        text = source.tokenizer.decode(sample.prompt.tolist())
        assert [text.count(answer) for answer in sample.answers] == [1] * len(sample.answers)
        assert len(sample.answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
        if len(sample.answers) == 1:
            hay = text[text.index("\n") + 1 : text.rindex("\nWhat")]
            needle = re.search(rf" One secret \w+ of (\S+) is {sample.answers[0]}\.", hay)
            rest = len(hay) - len(needle[0])
            sentence = max(len(s) for s in hay.replace(needle[0], "").split("."))
            assert abs(needle.start() - depth * rest) <= sentence
            assert sample.depth == depth and text.endswith(f" of {needle[1]} is")
        if task == "niah_multikey_1":
            assert hay.count(" One secret number of ") == 4


def test_a_chain_of_variables_is_in_order(source):
    sample = evaluate.make_sample(source, "vt", 3000, 0.5, np.random.default_rng(0))
    text = source.tokenizer.decode(sample.prompt.tolist())
    set_to = re.findall(r" VAR (\w{6}) = (?:VAR )?(\w+)\.", text)
    assert len(sample.prompt) + sample.n_new == 3000 and len(set_to) == 5
    assert [name for name, _ in set_to] == sample.answers
    assert [value for _, value in set_to[1:]] == sample.answers[:-1]
    assert f"hold the value {set_to[0][1]} are" in text


@pytest.mark.parametrize("length, often, seldom", [(2500, 6, 1), (8192, 30, 3)])
def test_common_words_stand_as_often_as_in_ruler(source, length, often, seldom):
    sample = evaluate.make_sample(source, "cwe", length, 0.5, np.random.default_rng(0))
    assert len(sample.prompt) + sample.n_new == length
    listed = re.findall(r" (\d+)\. (\S+)", source.tokenizer.decode(sample.prompt.tolist()))
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    words = [word for _, word in listed]
    assert {words.count(w) for w in sample.answers} == {often} and len(set(sample.answers)) == 10
    assert {words.count(w) for w in set(words) - set(sample.answers)} == {seldom}


def test_frequent_words_follow_zeta(source):
    sample = evaluate.make_sample(source, "fwe", 20_000, 0.5, np.random.default_rng(0))
    assert len(sample.prompt) + sample.n_new == 20_000
    words = source.tokenizer.decode(sample.prompt.tolist()).split("\n")[1].split()
    order = sorted(set(words), key=words.count, reverse=True)
    assert order[:4] == ["...", *sample.answers]
    shares = [words.count(w) / len(words) for w in order[:4]]
    assert shares == pytest.approx([6 / math.pi**2 / k**2 for k in (1, 2, 3, 4)], rel=0.05)


@pytest.mark.parametrize("task", evaluate.RULER)
def test_a_perfect_answerer_scores_all_and_a_random_one_nothing(source, task, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 6000)
    rngs = (np.random.default_rng(i) for i in range(5))
    samples = [evaluate.make_sample(source, task, 3000, 0.5, rng) for rng in rngs]
    answers = {s.prompt.tobytes(): " " + ", ".join(s.answers) for s in samples}

    def perfect(prompts, n_new):
        said = [source.encode(answers[p.numpy().tobytes()])[:n_new] for p in prompts]
        return torch.stack([torch.from_numpy(np.pad(ids, (0, n_new - len(ids)))) for ids in said])

    def babble(prompts, n_new):
        return tokens(len(prompts), n_new, vocab=128)

    assert evaluate.ask(perfect, samples, source.tokenizer) == [1.0] * 5
    assert evaluate.ask(babble, samples, source.tokenizer) == [0.0] * 5


def test_answers_count_as_whole_words_in_any_order():
    assert evaluate.score(" are 22, and 11.", ["11", "22"]) == 1
    assert evaluate.score("11 33", ["11", "22"]) == 0.5
    assert evaluate.score("1123", ["11", "23"]) == 0  # a part of a number is another number
    assert evaluate.score("Red-Fox", ["red-fox"]) == 1 and evaluate.score("", ["x"]) == 0


@pytest.fixture
def comparison(ckpt, sentences, tmp_path, monkeypatch):
    """A command that compares two extensions, and a run that has not ended; no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, _, short = ckpt
    for i, theta in enumerate((2000.0, 9000.0)):
        extended = load_checkpoint(folder, rope_theta=theta)
        save_checkpoint(extended, tmp_path / f"run{i}" / "hf", tokenizer_from=folder)
        lines = [{"step": s, "loss_long": 3 - s, "loss_short": None, "loss_s2l": 1} for s in (1, 2)]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"run{i}" / "log.jsonl").write_text(log)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "longred.json").write_text('{"config": {"steps": 5, "replay_steps": 4}}')
    (tmp_path / "late" / "log.jsonl").write_text("{}\n{}\n")
    argv = f"--base {folder} --data {sentences} --short_data {short} --lengths 128,600 --samples 1"
    argv += " --tasks kept position repeat niah_single_2 --depths 0,1 --eval_tokens 1300"
    argv += f" --device cpu --cache_dir {tmp_path}/tokens --out_dir {tmp_path}/o"
    argv += f" --ckpt ext={tmp_path}/run0 ext={tmp_path}/run1 {tmp_path}/late"
    return argv.split(), tmp_path / "o"


def test_one_command_leaves_report_numbers_and_pictures(comparison, capsys, monkeypatch):
    argv, out = comparison
    monkeypatch.undo()  # matplotlib is back
    evaluate.main(argv)
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    assert report in printed and "late: unfinished, 2 of 9 steps" in report
    content = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["original", "ext", "ext"]
    assert "RULER's tasks at 600, % answered in full\n\n| model | niah_single_2 | mean |" in report
    assert "\n| ext | 0.000 +- 0.000 | 0.000 +- 0.000 |\n" in report
    losses = [run["kept"]["loss"] for run in content["runs"]]
    mean, spread = np.mean(losses[1:]), np.std(losses[1:], ddof=1)
    assert f"| original | {losses[0]:.3f} | 0.000 | 100.000 |" in report
    assert f"| ext | {mean:.3f} +- {spread:.3f} |" in report
    whole, cut = (content["runs"][1]["position"][n]["nll"] for n in ("whole", "cut"))
    assert len(whole) == len(cut) == 600 and whole[:64] == cut[:64] and whole[99] != cut[99]
    assert "skipped" in content["runs"][0]["niah_single_2"]["128"]
    pictures = {p.stem for p in out.glob("*.png")}
    assert pictures == {"overview", "drift", "training", "needles", "repeat"}


def test_pcd_is_one_more_row_asked_by_contrast(comparison, monkeypatch):
    argv, out = comparison
    asked, generate = [], Llama.generate
    monkeypatch.setattr(
        Llama, "generate", lambda *a, pcd=None: asked.append(pcd) or generate(*a, pcd=pcd)
    )
    evaluate.main([*argv, "--pcd"])
    rows = json.loads((out / "results.json").read_text())["runs"]
    names = [name + end for name in ("original", "ext", "ext") for end in ("", ", PCD")]
    assert [row["name"] for row in rows] == names
    assert all(set(row) == {"name", "checkpoint", "repeat", "niah_single_2"} for row in rows[1::2])
    assert all(set(row["repeat"]["600"]) == {"seen_right", "new_right"} for row in rows[1::2])
    n = len(asked) // 6
    assert asked == ([None] * n + [model_module.PCD] * n) * 3 and n > 0


def test_a_merge_is_one_more_row_of_averaged_weights(comparison, ckpt, tmp_path):
    argv, out = comparison
    evaluate.main([*argv, "--tasks", "kept", "--merge", "0.25"])
    rows = json.loads((out / "results.json").read_text())["runs"]
    names = ["original", *2 * ["ext", "ext, 0.25 original"]]
    assert [row["name"] for row in rows] == names
    edit_weights(tmp_path / "run0" / "hf", lambda w: w["model.norm.weight"].mul_(1.5))
    merged = model_module.merge_weights(
        load_checkpoint(tmp_path / "run0"), load_checkpoint(ckpt[0]), 0.25
    )
    save_checkpoint(merged, tmp_path / "by_hand", tokenizer_from=ckpt[0])
    hand = ["--ckpt", f"ext={tmp_path}/run0", f"hand={tmp_path}/by_hand"]
    evaluate.main([*argv, "--tasks", "kept", "--merge", "0.25", *hand])
    losses = [r["kept"]["loss"] for r in json.loads((out / "results.json").read_text())["runs"]]
    assert losses[2] == pytest.approx(losses[3], rel=1e-6) and len(set(losses[:3])) == 3


def count_calls(monkeypatch, done, stop_after=99):
    """Append the name of every measurement begun; Ctrl-C instead of the one after stop_after."""
    for name in ("kept", "position_losses", "repeat_scores", "ask"):
        true = getattr(evaluate, name)

        def counted(*args, name=name, true=true, **more):
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(name)
            return true(*args, **more)

        monkeypatch.setattr(evaluate, name, counted)


def test_a_stopped_comparison_goes_on_and_measures_nothing_twice(comparison, monkeypatch, capsys):
    argv, out = comparison
    done = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        count_calls(patch, done, stop_after=8)
        evaluate.main(argv)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert "| ext |" in (out / "report.md").read_text() and len(done) == 8
    count_calls(monkeypatch, done)
    evaluate.main(argv)
    each = ["kept", *2 * ["position_losses", "repeat_scores"], "ask"]
    assert sorted(done) == sorted(3 * each)
    evaluate.main(argv)
    assert len(done) == 3 * len(each)


def test_a_changed_checkpoint_is_measured_again_and_pictures_are_optional(comparison, capsys):
    argv, out = comparison
    argv += ["--tasks", "kept"]
    evaluate.main(argv)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(out.glob("*.png"))
    assert len(list((out / "cache").iterdir())) == 3
    edit_weights(out.parent / "run0" / "hf", lambda w: w["model.norm.weight"].mul_(1.01))
    evaluate.main(argv)
    assert len(list((out / "cache").iterdir())) == 4


def test_folders_of_one_name_are_two_rows_unless_named_alike(comparison):
    argv, out = comparison
    ours = shutil.copytree(out.parent / "run0" / "hf", out.parent / "a" / "original")
    evaluate.main([*argv, "--tasks", "kept", "--ckpt", str(ours), f"original={ours}"])
    names = [run["name"] for run in json.loads((out / "results.json").read_text())["runs"]]
    assert names == ["original", str(ours), "original"]


def test_pictures_of_the_demo_need_losses_only(tmp_path):
    curves = {"original": [3.0, 9.0], "LongReD": [3.1, 2.9]}
    results = [
        (name, tmp_path, {"kept": {"loss": 2.0}, "position": {"whole": {"nll": curve}}})
        for name, curve in curves.items()
    ]
    assert evaluate.draw(results, tmp_path, 256, 1024) == [tmp_path / "overview.png"]


BAD_COMPARISONS = {
    "--tasks": ("passkey", "argument --tasks: invalid choice: 'passkey'"),
    "--lengths": ("many", "argument --lengths: invalid"),
    "--depths": ("0,2", "--depths from 0 to 1"),
    "--data": ("nowhere.txt", "no file at nowhere.txt"),
    "--ckpt": ("nowhere", "no checkpoint 'nowhere'"),
    "--original_len": ("99999", "one sequence needs 100,000"),
}


@pytest.mark.parametrize("flag", BAD_COMPARISONS)
def test_bad_input_to_evaluate_ends_in_one_line(comparison, flag):
    argv, out = comparison
    value, said = BAD_COMPARISONS[flag]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*argv, flag, value])
    message = str(end.value.code)
    assert said in message and "\n" not in message and not out.exists()


def test_metas_folder_can_be_the_original(ckpt, sentences, tmp_path, capsys):
    folder = meta_folder(tmp_path / "meta", tiny_llama(vocab_size=612, n_layers=2, std=0.1), 2)
    tiktoken_file(folder / "tokenizer.model", ckpt[1].read_text()[:4000], merges=20)
    argv = ["--base", folder, "--data", sentences, "--tasks", "kept", "--device", "cpu"]
    argv += ["--eval_tokens", 600, "--cache_dir", tmp_path / "tokens", "--out_dir", tmp_path / "o"]
    with pytest.raises(SystemExit, match="--original_len is missing"):
        evaluate.main([str(x) for x in argv])
    evaluate.main([str(x) for x in [*argv, "--original_len", 64]])
    assert "| original | 6." in capsys.readouterr().out


def test_own_samples_are_text_for_training(ckpt, tmp_path):
    path = tmp_path / "own.jsonl"
    folder = shutil.copytree(ckpt[0], tmp_path / "with_eos")
    (folder / "generation_config.json").write_text('{"eos_token_id": 10}')
    argv = ["--base", folder, "--write_samples", path, "--n_samples", 3, "--length", 12]
    evaluate.main([str(x) for x in argv])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == 3 and any(texts) and all("\n" not in text for text in texts)


def test_logit_change_is_the_softmax_of_the_difference_by_hand():
    a, b, ids = tiny_llama(), tiny_llama(seed=5), tokens(1, 40)[0]
    got = evaluate.logit_change(a, b, ids, rows=7)
    with torch.no_grad():
        p, q = (m.logits(m(ids[None])[0][0]).softmax(-1) for m in (a, b))
    for t in range(39):
        rise = q[t] / p[t]  # softmax(S' - S) is p' / p, normalised
        assert got[t].item() == pytest.approx(math.log(rise[ids[t + 1]] / rise.sum()), abs=1e-4)
    assert torch.allclose(evaluate.logit_change(a, a, ids), torch.tensor(-math.log(96.0)))


def test_anchors_are_frequent_and_more_so_among_impactful_tokens():
    kinds = np.repeat([0, 1, 2, 3], [60, 15, 15, 10])
    scores = np.zeros(100)
    for start, n in [(0, 6), (60, 7), (75, 4), (90, 3)]:  # the impactful fifth, by kind
        scores[start : start + n] = 1.0
    anchors, among, overall = evaluate.anchor_kinds(scores, kinds, 4)
    assert among.tolist() == [0.3, 0.35, 0.2, 0.15] and overall.tolist() == [0.6, 0.15, 0.15, 0.1]
    assert anchors.tolist() == [1, 2]  # 0: frequent everywhere; 3: the others make up half


def test_selection_keeps_whole_sentences_densest_in_anchors_in_text_order():
    # 0 ends a sentence, 5 is an anchor
    ids = np.array([5, 9, 0, 5, 5, 0, 7, 7, 7, 0, 9, 9, 9, 5, 5, 5, 0])
    ends, is_anchor = np.arange(10) == 0, np.arange(10) == 5
    starts = data.sentence_starts(ids, ends)
    assert starts.tolist() == [0, 3, 6, 10]
    for keep, kept in [
        (0.1, "5 5 0"),
        (0.3, "5 5 0 9 9 9 5 5 5 0"),
        (1, "5 9 0 5 5 0 9 9 9 5 5 5 0"),
    ]:
        mask = evaluate.select_sentences(ids, starts, is_anchor, keep)
        assert " ".join(map(str, ids[mask])) == kept


def test_kinds_fold_case_blanks_and_numbers(ckpt):
    index, names = evaluate.token_kinds(tok := data.load_tokenizer(ckpt[0]))
    kind = {text: names[index[tok.encode_batch([text])[0][0]]] for text in "aA17.\n"}
    assert kind == {"a": "a", "A": "a", "1": "number", "7": "number", ".": ".", "\n": "\n"}


def test_select_corpus_writes_sentences_of_the_training_part(ckpt, tmp_path, capsys):
    trained = train(tiny_run(ckpt, tmp_path / "run", method="long_cpt", steps=3, eval_tokens=0))
    out = tmp_path / "selected.jsonl"
    flags = ["--base", ckpt[0], "--ckpt", trained, "--data", ckpt[1], "--select_corpus", out]
    flags += ["--cache_dir", tmp_path / "tokens", "--eval_tokens", 2048, "--device", "cpu"]
    evaluate.main([str(f) for f in flags])
    whole = ckpt[1].read_text()
    text = json.loads(out.read_text())["text"]  # one document
    sentences = re.findall(r"[^.!?\n]*[.!?\n]", text)
    assert "".join(sentences) == text and len(sentences) > 100
    at = 0
    for sentence in sentences:  # verbatim and in order
        at = whole.index(sentence, at) + len(sentence)
    assert at < 0.96 * len(whole) and 0.3 * 0.95 < len(text) / (0.95 * len(whole)) < 0.31
    assert f"kept {len(text):,} of" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- runs.py


@pytest.fixture(scope="session")
def whole(ckpt, tmp_path_factory):
    """An uninterrupted run of 4 steps, saved after 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_run(ckpt, out, save_every=2))
    return out


@pytest.fixture
def at_two(whole, tmp_path):
    return killed_after_two(whole, tmp_path / "killed")


def test_a_killed_run_resumes_bit_for_bit_with_every_step_logged_once(whole, at_two):
    with open(at_two / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # torn
    (at_two / "checkpoints" / "step-000004.partial").mkdir()
    main(["--resume", str(at_two)])
    assert same_run(whole, at_two)
    assert not list(at_two.rglob("*.partial"))


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["first byte", "middle byte", "last byte", "cut", "gone"])
def test_a_damaged_state_is_skipped_and_the_one_before_it_taken(
    whole, tmp_path, capsys, name, damage
):
    out = shutil.copytree(whole, tmp_path / "run")
    path = out / "checkpoints" / "step-000004" / name
    raw = bytearray(path.read_bytes())
    if damage.endswith("byte"):
        raw[{"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}[damage.split()[0]]] ^= 1
    path.write_bytes(raw[:-7] if damage == "cut" else raw)
    if damage == "gone":
        path.unlink()
    assert runs.newest_state(out).name == "step-000002"
    assert "step-000004 is damaged" in capsys.readouterr().err
    (out / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="none of the 1 saved states is sound; remove"):
        runs.newest_state(out)


def test_an_update_waits_for_the_state_being_saved(whole, ckpt, tmp_path, monkeypatch):
    write_state = runs.write_state
    slow = lambda *args: time.sleep(0.3) or write_state(*args)  # noqa: E731
    monkeypatch.setattr(runs, "write_state", slow)
    out = tmp_path / "run"
    train(tiny_run(ckpt, out, save_every=2))
    shutil.rmtree(out / "checkpoints" / "step-000004")
    main(["--resume", str(out)])
    assert same_run(whole, out)


def test_a_full_disk_ends_the_run_but_not_its_older_states(whole, at_two, capsys):
    size = (at_two / "checkpoints" / "step-000002" / "state.pt").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
    try:
        with pytest.raises(SystemExit, match=r"after step 4 .*takes 0.\d+ GiB, .* GiB are free"):
            main(["--resume", str(at_two)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in (at_two / "checkpoints").iterdir()] == ["step-000002"]
    main(["--resume", str(at_two)])
    assert same_run(whole, at_two)


def test_an_error_between_updates_saves_the_steps_done(whole, ckpt, tmp_path, monkeypatch):
    def fail(*args):
        if len(read_log(out)) == 3:
            raise RuntimeError("a kernel failed")
        return short_to_long_distillation(*args)

    out = tmp_path / "run"
    monkeypatch.setattr(longred, "short_to_long_distillation", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(tiny_run(ckpt, out, save_every=100))
    assert runs.newest_state(out).name == "step-000003"
    monkeypatch.setattr(longred, "short_to_long_distillation", short_to_long_distillation)
    main(["--resume", str(out)])
    assert same_run(whole, out)


def spoil(monkeypatch, out, bad_steps):
    """Make the long loss of these steps NaN, gradient and all."""

    def loss(*args):
        step = len(read_log(out)) + 1
        return long_text_loss(*args) * (math.nan if step in bad_steps else 1.0)

    monkeypatch.setattr(longred, "long_text_loss", loss)


def test_a_step_that_is_not_finite_changes_nothing_and_is_flagged(ckpt, tmp_path, monkeypatch):
    out, states = tmp_path / "run", {}
    spoil(monkeypatch, out, {3})

    def keep_state(life, step, log, bad):
        states[step] = [t.clone() for t in runs.tensors(runs.run_state(life.model, life.optimizer))]
        done(life, step, log, bad)

    done = runs.Life.done
    monkeypatch.setattr(runs.Life, "done", keep_state)
    train(tiny_run(ckpt, out, save_every=1, keep=9, eval_tokens=0))
    assert [line["flag"] for line in read_log(out)] == [None, None, "skipped", None]
    assert read_log(out)[2]["loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[3], states[4], strict=True))
    assert not (out / "checkpoints" / "step-000003").exists()


def test_bad_steps_in_a_row_end_the_run_with_the_last_good_state(ckpt, tmp_path, monkeypatch):
    out = tmp_path / "run"
    spoil(monkeypatch, out, {3, 4, 6, 7, 8})
    with pytest.raises(ValueError, match="step 8: .* 3 steps in a row not finite.* after step 5: "):
        train(tiny_run(ckpt, out, steps=20, save_every=1))
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000005"] and not (out / "hf").exists()


def test_spikes_are_flagged_against_the_median_before_them():
    watch = runs.Watch([], max_bad=3)
    steps = [dict(loss=1.0, grad_norm=1.0)] * 8 + [dict(loss=1.0, grad_norm=4.0)]
    steps += [dict(loss=9.0, grad_norm=1.0), dict(loss=2.0, grad_norm=2.0)]
    flags = [watch.flag(line) for line in steps]
    assert flags == [None] * 8 + ["spike", "spike", None] and watch.bad == 0


def changed_run(out, ckpt, part):
    about = json.loads((out / "longred.json").read_text())
    if part == "config":
        about["config"]["lr"] = 0.5  # only the saved state still knows better
    elif part == "code":
        about["code"]["model.py"] = "0"
    else:
        about[part][next(iter(about[part]))] = "0"
    (out / "longred.json").write_text(json.dumps(about))


@pytest.mark.parametrize("part", ["config", "data", "weights", "code"])
def test_resume_refuses_another_run_and_names_the_difference(at_two, ckpt, part):
    changed_run(at_two, ckpt, part)
    with pytest.raises(SystemExit, match=f"{part} [a-z_.]+ was .*, is .*--resume_anyway"):
        main(["--resume", str(at_two)])
    main(["--resume", str(at_two), "--resume_anyway"])


def test_a_resumed_run_takes_flags_that_change_no_number(at_two):
    with pytest.raises(SystemExit, match="drop --lr, or add --resume_anyway"):
        main(["--resume", str(at_two), "--lr", "0.5", "--keep", "1"])
    main(["--resume", str(at_two), "--keep", "1"])
    assert len(list((at_two / "checkpoints").iterdir())) == 1


def test_comments_do_not_change_a_codes_fingerprint(tmp_path, monkeypatch):
    before = runs.code_fingerprints()
    for name in before:
        source = (HERE / name).read_text().replace("import math", "import math  # a comment")
        (tmp_path / name).write_text("# another\n" + source.replace('"""', '"""More. ', 1))
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.code_fingerprints() == before
    (tmp_path / "data.py").write_text((HERE / "data.py").read_text() + "\nx = 1\n")
    assert runs.code_fingerprints()["data.py"] != before["data.py"]


def test_an_out_dir_that_is_not_ours_is_refused(ckpt, tmp_path, at_two):
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train(tiny_run(ckpt, at_two))
    (tmp_path / "other" / "hf").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another's hf"):
        train(tiny_run(ckpt, tmp_path / "other"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to --out_dir .*: check .*file, or"):
        train(tiny_run(ckpt, tmp_path / "file" / "run"))
    with runs.Life() as life:
        life.claim(at_two, resumed=True)
        with pytest.raises(SystemExit, match="another process is at work in"):
            main(["--resume", str(at_two)])


def test_restarted_processes_do_not_read_what_dead_ones_left_in_the_store():
    # torchrun's store outlives a restart: in three starts on one, none finds an older one's names.
    store, seen = dist.HashStore(), []
    store.set_timeout(datetime.timedelta(seconds=5))
    store.set("here/1", "of a process killed before it was answered")
    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            named = list(pool.map(lambda rank: runs.own_names(store, rank, 3), range(3)))
        assert not any(own.check(["address"]) for own in named)
        named[0].set("address", str(start))
        seen.append([own.get("address") for own in named])
    assert seen == [[str(start).encode()] * 3 for start in range(3)]


def torchrun(n, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(n), HERE / "longred.py", *flags], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_processes_that_share_sequences_and_tokens_train_as_one_does(whole, ckpt, tmp_path):
    out = tmp_path / "run"
    settings = dataclasses.asdict(tiny_run(ckpt, out, save_every=2, device="cpu"))
    default = dataclasses.asdict(Config())
    given = {k: v for k, v in settings.items() if v != default[k]} | {"context": 2}
    flags = [(f"--{k}", *(v if isinstance(v, list) else [v])) for k, v in given.items()]
    torchrun(4, [str(x) for flag in flags for x in flag])  # two share each sequence
    compare = [out]
    for n, context in ((1, 1), (2, 1)):  # resumed on others than those that saved
        compare.append(killed_after_two(out, tmp_path / f"on{n}"))
        resume = ["--resume", str(compare[-1]), "--context", str(context)]
        main(resume) if n == 1 else torchrun(n, resume)
    one = load_file(whole / "hf" / "model.safetensors")
    for folder in compare:
        for a, b in zip(read_log(whole), read_log(folder), strict=True):
            for key in ("step", "loss", "loss_long", "loss_short", "loss_s2l", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (folder.name, key)
        many = load_file(folder / "hf" / "model.safetensors")
        assert all((one[name] - many[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.parametrize("n, size", [(8, 4), (5, 4), (2, 4), (1, 1)])
def test_every_sequence_of_a_step_goes_to_one_process(n, size):
    lives = [runs.Life() for _ in range(size)]
    for rank, life in enumerate(lives):
        life.rank, life.size = rank, size
    shares = [list(life.share(n)[0]) for life in lives]
    assert len({len(share) for share in shares}) == 1  # all take part in every pass
    assert sorted(j for share in shares for j in share if j < n) == list(range(n))
