"""The claims of the method, on a CPU, in the order of the source files.

    python -m pytest -q test_longred.py

Oracles: float64, transformers, or the paper's formula written out by hand. What makes a run
survive, fit and be judged has its tests in tests/ (python -m pytest -q runs all). Without a GPU the
rotary kernel runs in Triton's interpreter; with one, the very same tests run the compiled kernel.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # chosen before the first import of rope_kernels

import data
import longred
import model as model_module
import rope_kernels
from longred import (
    cosine_distance,
    cross_entropy,
    default_theta,
    plan_streams,
    select_distill_layers,
    short_text_distillation,
    short_to_long_distillation,
)
from machine import formats, memory, run
from machine.corpus import DEFAULT_LONG, DEFAULT_SHORT, tokenize
from machine.formats import load_checkpoint, load_config, rescaled, save_checkpoint
from machine.plan import Policy
from machine.run import train
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from machine.states import newest_state
from machine.tokenizer import load_tokenizer
from measure import pcd as pcd_module
from model import (
    Llama,
    ModelConfig,
    attention_kl,
    next_token_kl,
    next_token_loss,
)
from rope_kernels import apply_rope, apply_rope_torch, ntk_theta, rope_frequencies
from tests import conftest
from tests.conftest import (
    DEVICE,
    LLAMA3,
    NO_TRITON,
    PROPERTY,
    STORIES,
    distance_by_hand,
    documents,
    hf_model,
    made_corpus,
    needs_stories,
    read_log,
    rel,
    same_first_update,
    tiny_config,
    tiny_llama,
    tiny_run,
    tokens,
)

ckpt, pairs, tk = conftest.ckpt, conftest.pairs, conftest.tk  # fixtures

# ---------------------------------------------------------------------------------- rope_kernels.py

PATHS = [pytest.param("kernel", marks=NO_TRITON), "torch"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, N, K, H): grouped, one head, H no power of two, odd T, H at the limit
SHAPES = [(2, 7, 6, 2, 64), (1, 5, 1, 1, 8), (2, 3, 3, 1, 80), (1, 5, 6, 2, 128), (1, 2, 5, 5, 256)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


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


@pytest.mark.parametrize("path", PATHS)
def test_composes_with_compile_as_one_graph_and_with_checkpointing(path):
    q, k, ids, inv_freq = random_qk((2, 5, 6, 2, 64))
    # On a CPU inductor adds a C++ compiler and half a minute; graph and gradient are the same.
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"

    def score(q, k):
        q, k = rotate(path, q.sin(), k.sin(), ids, inv_freq, 1.1)
        return (q[:, :, :2] * k).square().sum() + q.square().sum()

    expected = torch.autograd.grad(score(q, k), (q, k))
    recomputed = torch.utils.checkpoint.checkpoint(score, q, k, use_reentrant=False)
    recomputed = torch.autograd.grad(recomputed, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))
    compiled = torch.compile(score, fullgraph=True, backend=backend)
    grads = torch.autograd.grad(compiled(q, k), (q, k))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-4)


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


POSITION = st.integers(0, 2**20)
CASES = {"path": st.sampled_from(["torch"] + ["kernel"] * (rope_kernels.triton is not None))}
CASES |= {"half": st.sampled_from([1, 4, 20, 32, 40]), "seed": st.integers(0, 999)}


@PROPERTY
@given(ids=st.lists(POSITION, min_size=1, max_size=9), **CASES)
def test_norms_of_planes_are_kept_and_the_gradient_rotates_back(ids, path, half, seed):
    q, k, _, inv_freq = random_qk((1, len(ids), 3, 1, 2 * half), seed=seed)
    ids = torch.tensor(ids, device=DEVICE)
    rotated, _ = rotate(path, q, k, ids, inv_freq)
    before, after = (x.unflatten(-1, (2, half)).norm(dim=-2) for x in (q, rotated))
    torch.testing.assert_close(after, before, rtol=2e-6, atol=1e-9)
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


# ----------------------------------------------------------------------------------------- model.py


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


def test_rotary_frequencies_survive_casts_of_the_module():
    model = tiny_llama().to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float64
    assert torch.equal(model.inv_freq, rope_frequencies(16, 500.0)[0])


@pytest.mark.parametrize("rows, copied", [(5, 512), (66, 512), (1000, 7)])
def test_chunked_cross_entropy_equals_the_plain_one(rows, copied, monkeypatch):
    monkeypatch.setattr("model.LSE_ROWS", copied)
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


def test_cross_entropy_and_kl_never_hold_all_logits():
    class Largest(TorchDispatchMode):
        numel = copied = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.logsumexp.default:  # copies what it is given
                self.copied = max(self.copied, args[0].shape[0])
            for t in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(1, 1024, 8, requires_grad=True), torch.randn(500, 8)
    with Largest() as largest:
        total, _ = next_token_loss(hidden, weight, tokens(1, 1024, 500))
        total.backward()
    with Largest() as of_kl:
        total, _ = next_token_kl(hidden, weight, hidden.detach() / 2, weight)
        total.backward()
    assert 128 * 500 <= of_kl.numel < 1024 * 500 // 4
    assert 256 * 500 <= largest.numel < 1024 * 500 // 2
    with Largest() as of_many_rows:
        next_token_loss(hidden, weight, tokens(1, 1024, 500), chunk_rows=1024)
    assert of_many_rows.copied == 512


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [5, 66, 1000, None])
def test_chunked_kl_and_its_gradient_match_float64(rows, dtype, tolerance):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    inputs = [draw(2, 33, 48), draw(96, 48) / 3, draw(2, 33, 32), draw(96, 32) / 3]
    exact = [t.double().requires_grad_() for t in inputs]
    h, head, teacher_h, teacher_head = exact
    log_q, log_p = (h @ head.T).log_softmax(-1), (teacher_h @ teacher_head.T).log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum()
    want = torch.autograd.grad(3 * plain, exact[:2])
    ours = [t.requires_grad_() for t in inputs]
    total, count = next_token_kl(*ours, chunk_rows=rows)
    got = torch.autograd.grad(3 * total, ours, allow_unused=True)
    assert count == 66 and total.dtype == torch.float32
    assert rel(total, plain) < tolerance
    assert rel(got[0], want[0]) < tolerance and rel(got[1], want[1]) < tolerance
    assert got[2] is None and got[3] is None  # the teacher is no part of what is learnt
    same, _ = next_token_kl(ours[0], ours[1], ours[0], ours[1])
    assert abs(same.item()) < 1e-4 * total.item()


def test_kl_between_two_vocabularies_is_refused():
    hidden = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="vocabularies of 96 .teacher. and 97 .student."):
        next_token_kl(hidden, torch.randn(97, 8), hidden, torch.randn(96, 8))


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


def test_a_cache_is_read_whatever_the_blocks_run_by_while_gradients_are_on():
    model, ids = tiny_llama(), tokens()
    want = model(ids)[0][:, -1]
    memory.apply_policy(model, Policy(mlp_rows=7))
    cache = model.new_cache(2, 33)
    parts = [model(part, cache=cache)[0] for part in (ids[:, :20], ids[:, 20:])]
    assert rel(parts[1][:, -1], want) < 1e-5


@pytest.mark.parametrize(("length", "temperature"), [(0, 0.0), (3, -1.0)])
def test_generation_without_a_prompt_or_below_zero_is_refused(length, temperature):
    with pytest.raises(ValueError, match=f"got {length} tokens at temperature {temperature}"):
        tiny_llama().generate(tokens(1, length), 2, temperature)


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


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"beta": 20.0, "gamma": 4, "base_ratio": 1e-2}], ids=str)
def test_pcd_equals_two_separate_models_without_a_cache(changes, qk_norm):
    near, far = tiny_llama(qk_norm=qk_norm), tiny_llama(qk_norm=qk_norm)
    ids = tokens(length=17)
    pcd = {"alpha": 0.2, "beta": 2.5, "base_ratio": 1e-4, "gamma": 30} | changes
    for j in range(1, 9):  # H = 16: planes 1 .. 8
        keep = 2 - math.exp(pcd["alpha"] * 2 * j / 16)
        slow = near.inv_freq[j - 1] * pcd["base_ratio"] ** (-2 * (j - 1) / 16)
        far.inv_freq[j - 1] = keep * near.inv_freq[j - 1] + (1 - keep) * slow
    want = pcd_by_hand(near, far, ids, 24, pcd["beta"], pcd["gamma"])
    assert torch.equal(pcd_module.generate(near, ids, 24, changes, chunk_len=5), want)
    assert not torch.equal(near.generate(ids, 24), want)


def test_pcds_slowest_plane_turns_1918_times_faster_in_llama_3():
    own = rope_frequencies(128, 5e5)[0]
    ratio = pcd_module.local_frequencies(own, 0.2, 1e-4) / own
    assert ratio[0] == pytest.approx(1.0) and ratio[-1].item() == pytest.approx(1918, abs=0.5)


def test_a_misspelt_pcd_setting_is_refused():
    with pytest.raises(ValueError, match="pcd: got betta, need some of alpha, beta"):
        pcd_module.generate(tiny_llama(), tokens(), 1, {"betta": 1.0})


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


def test_shards_are_read_as_transformers_writes_them_and_written_as_it_reads_them(
    tmp_path, monkeypatch
):
    config = transformers.LlamaConfig(**formats.config_to_hf(tiny_config()), initializer_range=0.2)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, ids = load_checkpoint(tmp_path / "theirs"), tokens()
    monkeypatch.setattr(formats, "SHARD_SIZE", 60_000)
    save_checkpoint(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    reread = load_checkpoint(tmp_path / "ours")
    for (name, a), b in zip(model.named_parameters(), reread.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert rel(model.logits(model(ids)[0]), theirs(ids).logits) < 1e-4
    assert rel(hf_model(tmp_path / "ours")(ids).logits, theirs(ids).logits) < 1e-4


def test_two_scalings_on_top_of_each_other_are_refused(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    save_checkpoint(tiny_llama(rope_scaling=linear), tmp_path / "hf")
    with pytest.raises(ValueError, match="already scaled"):
        load_checkpoint(tmp_path / "hf", rope_scaling=linear)
    assert load_checkpoint(tmp_path / "hf", rope_theta=9e3).config.rope_scaling == linear
    removed = load_checkpoint(tmp_path / "hf", rope_scaling={"rope_type": "default"})
    assert removed.config.rope_scaling is None


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


@pytest.mark.parametrize("head_dim", [2, 8, 16])
def test_narrow_heads_on_a_cpu_attend_as_torch_does(head_dim):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 33, n, head_dim, generator=generator) for n in (6, 2, 2))
    outputs = []
    for attend in (model_module.causal_attention, plain_attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves)
        out.square().sum().backward()
        outputs += [[out.detach(), *(t.grad for t in leaves)]]
    for ours, theirs in zip(*outputs, strict=True):
        assert rel(ours, theirs) < 1e-5


def plain_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


# ------------------------------------------------------------------------------- longred.py: losses


def test_cosine_distance_by_hand():
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]]])
    teacher = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [1.0, 0.0]]])
    assert cosine_distance(student, teacher).item() == pytest.approx((0 + 0.2 + 2) / 3, abs=1e-6)
    assert cosine_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_identical_teacher_and_student_have_no_distillation_loss():
    teacher, student = tiny_llama(), tiny_llama()
    batch, c = data.Batch.whole(tokens()), Config(distill_layers=[1, 2, 3])
    short = short_text_distillation(student, teacher, batch, c)
    s2l = short_to_long_distillation(student, teacher, batch, c)
    assert abs(short.item()) < 1e-6 and abs(s2l.item()) < 1e-6


def reads(ids, student_positions=None):
    """A batch of all T tokens of ids (B, T), without labels."""
    padded = F.pad(ids, (0, 1))
    return data.Batch.whole(padded, student_positions)


@pytest.mark.parametrize("which", ["long", "short", "s2l"])
def test_losses_and_gradients_equal_those_from_transformers(pairs, which):
    (teacher, student), (hf_teacher, hf_student) = pairs
    ids = tokens(length=34)
    skipped = torch.from_numpy(data.uniform_positions(np.random.default_rng(0), 2, 34, 200))
    loss = {
        "long": cross_entropy,
        "short": short_text_distillation,
        "s2l": short_to_long_distillation,
    }[which]
    batch = data.Batch.whole(ids) if which == "long" else reads(ids, skipped)
    got = loss(student, teacher, batch, Config(distill_layers=[1, 3]))
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


# --------------------------------------------------------------------------------- data.py: streams


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
    assert 0.01 < share <= 0.1
    if n_docs >= 100:  # by document: whole ones
        starts, lengths = corpus.segments(held_out=True)
        assert set(lengths[lengths > 0]) <= set(np.diff(corpus.doc_starts))


def parts(corpus, held_out):
    """(document's checksum, place in it) of every token of that side."""
    pairs = zip(*corpus.segments(held_out=held_out), strict=True)
    begins = zip(pairs, corpus.doc_checksums, corpus.doc_starts[:-1], strict=True)
    return {(int(c), i) for (s, n), c, first in begins for i in range(s - first, s - first + n)}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_held_out_is_at_most_a_tenth_and_held_out_of_all_streams(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2**32, 60)
    size = {
        int(k): int(n)
        for k, n in zip(kinds, rng.integers(1, 10 ** rng.integers(2, 5, 60)), strict=True)
    }
    corpora = []
    for _ in range(3):  # of 1 to 300 documents, some of them copies, some in several streams
        n = rng.choice([1, 2, 12, 60, 300])
        chosen = rng.choice(kinds[: rng.integers(1, 61)], n)
        corpora.append(made_corpus([size[int(k)] for k in chosen], chosen))
    data.share_held_out(corpora)
    held, seen = ([parts(c, side) for c in corpora] for side in (True, False))
    assert not set.union(*held) & set.union(*seen)
    for corpus in corpora:
        starts, lengths = corpus.segments(held_out=True)
        assert lengths.sum() <= len(corpus.tokens) / 10
        if len(corpus.tokens) > 10_000:
            assert corpus.segments()[1].sum() > 0.5 * len(corpus.tokens)


def test_one_book_among_notes_and_copies_of_one_text_give_their_ends():
    corpus = made_corpus([20] * 119 + [100_000], [*range(101, 220), 20])  # whole, by its 20
    assert corpus.segments(held_out=True)[1][-1] == 5000
    assert corpus.segments()[1][-1] == 95_000
    copies = made_corpus([1000] * 120, [20] * 100 + [*range(1, 20), 21])
    held = copies.segments(held_out=True)[1]
    assert set(held[:100]) == {50} and not held[100:].any()  # counted together: rule 2, not 3
    corpus = made_corpus([20] * 19 + [100_000], [*range(101, 120), 20])
    assert corpus.describe_held_out() == "5,000 held out: the ends of 1"


def test_nobody_trains_on_the_end_of_a_document_of_4096_tokens_or_more():
    long, short = 1, 2
    corpus = made_corpus([4096, 4095, *[1000] * 200], [long, short, *range(20, 220)])
    assert corpus.segments()[1][:2].tolist() == [4096 - 204, 4095]
    assert not corpus.segments(held_out=True)[1][:2].any()


def test_a_stream_of_too_little_or_too_much_held_out_gives_all_its_ends():
    none = made_corpus(
        [1000] * 30, [*range(1, 20), *range(21, 32)]
    )  # no checksum is a multiple of 20
    assert set(none.segments(held_out=True)[1]) == {50}
    much = made_corpus([1000] * 30, [20, 40, 60, 80, *range(1, 20), *range(21, 28)])  # 4 of 30
    assert set(much.segments(held_out=True)[1]) == {50}
    few = made_corpus([1000] * 30, [20, 40, 60, *range(1, 20), *range(21, 29)])  # just a tenth
    assert few.segments(held_out=True)[1].tolist() == [1000] * 3 + [0] * 27
    data.share_held_out([few, much])  # which share documents: none of them may be trained on
    assert set(few.segments(held_out=True)[1][:3]) == {50}


def test_no_batch_of_an_epoch_shows_what_another_stream_holds_out():
    book = 30_000  # alone in one stream, one of many in another, where its checksum is of 20
    long = made_corpus([book], [40])
    short = made_corpus([book] * 300, [40, *range(1000, 1299)])
    data.share_held_out([long, short])
    held = {int(i) for i in data.held_out(long, 10**6, 1).ravel()}
    assert held == set(range(28_500, 30_000))
    stream = data.Stream(short, "short", 0, 8, 1024)
    for i in range(stream.n_sequences // 8 + 1):
        assert not held & set(stream.batch(i).ravel().tolist())
    assert short.segments(held_out=True)[1][0] == 1500  # and the first stream trains on the rest


def test_the_same_document_is_held_out_in_every_stream(tk, tmp_path):
    texts = [f"text {i} " * 9 for i in range(300)]
    for name, chosen in (("a", texts[:200]), ("b", texts[90:] + texts[90:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in chosen)
        )
    held = []
    for name in "ab":
        corpus = tokenize([tmp_path / f"{name}.jsonl"], tk, tmp_path / "cache")
        out = corpus.segments(held_out=True)[1] > 0
        held.append({tk.decode(d[:-1]) for d, o in zip(documents(corpus), out, strict=True) if o})
    assert held[0] & set(texts[90:200]) == held[1] & set(texts[90:200]) != set()
    assert not held[1] & {t for t, o in zip(texts[90:] * 2, ~out, strict=True) if o}


def test_held_out_sequences_are_spread_evenly_and_too_few_is_an_error():
    corpus = made_corpus([10_000])
    rows = data.held_out(corpus, 4, 50)
    assert rows[:, 0].tolist() == [9500, 9649, 9799, 9949] and rows[-1, -1] == 9999
    assert data.held_out(corpus, 99, 50).shape == (9, 51)  # no more than there are
    with pytest.raises(
        ValueError, match="500 held-out tokens, one sequence needs 601 .*the ends of 1"
    ):
        data.held_out(corpus, 1, 600)


def test_text_too_short_for_one_sequence_is_an_error():
    corpus = made_corpus([100, 200])
    assert data.Stream(corpus, "long", 0, 1, 284).n_sequences == 1  # 95 + 190 tokens
    with pytest.raises(
        ValueError, match="too short: 285 tokens .*15 held out: the ends of 2.* needs 286"
    ):
        data.Stream(corpus, "long", 0, 1, 285)


def test_describe_counts_documents_tokens_and_epochs_and_warns():
    corpus = made_corpus([500, 3000, 40_000])
    stream = data.Stream(corpus, "long", 0, 2, 128)
    line = stream.describe(n_batches=150)
    held_out = "2,500 held out: 1 whole documents and the ends of 1"
    assert f"2 documents, 41,000 tokens to train on, {held_out}" in line
    assert "<4K 7%, <128K 93%; 300 sequences of 128 are 0.94 epochs" in line
    assert "WARNING long: the same text 4.7 times over" in stream.describe(n_batches=750)


# ------------------------------------------------------------------------------- data.py: positions

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
    repeated = draw(np.random.default_rng(seed), 3, seq_len, seq_len + more)
    assert (p == repeated).all()


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
        if pos[0, t - 17] < t * f - 17:  # head = tail = 16: the ends of each k are distinct
            last, mid = pos[:, t - 17], t - 32  # of the middle chunk
            k = np.ceil((last - 16 - 99) / (mid - 1) * 2).astype(int)
            assert (last >= 16 + (mid - 1) * k // 2).all() and (last <= k * t // 2 - 17).all()
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
    rng, last = np.random.default_rng(0), {10: [], 16: []}  # of the middle chunk, by head
    for _ in range(200):
        p = data.uniform_positions(rng, 100, 30, 72)  # head = tail = 10 or int(4 x 2.4) = 9
        head = int(np.argmax(p[0] != np.arange(30)))
        last.setdefault(head, []).extend(p[:, 29 - head])
    for head in (9, 10):
        low, high = 30 - head, 72 - head - 1
        counts = np.bincount(last[head], minlength=high + 1)
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


def test_sentences_end_where_any_tokenizer_says(ckpt):
    for folder, text in [(ckpt[0], "Is 1.5 it?\nNo! Yes"), (STORIES, "He ran. Why? Oh!\nHm")]:
        if folder.is_dir():
            tokenizer = load_tokenizer(folder)
            ids = np.array(tokenizer.encode_batch([text])[0])
            starts = data.sentence_starts(ids, data.sentence_ends(tokenizer))
            cuts = [*starts[1:], len(ids)]
            parts = [tokenizer.decode(ids[a:b]) for a, b in zip(starts, cuts, strict=True)]
            want = re.split(r"(?<=[.!?\n])", text)
            assert [p.strip() for p in parts] == [w.strip() for w in want]


# --------------------------------------------------------- longred.py: a step of train, written out


def test_one_step_of_train_equals_the_formula_written_out(ckpt, tmp_path):
    c = tiny_run(ckpt, tmp_path / "run", steps=1, distill_layers=[2, 3], eval_tokens=0)
    exported = load_checkpoint(train(c))
    folder, long, short = ckpt
    teacher = load_checkpoint(folder)
    student = load_checkpoint(folder, rope_theta=3000.0).train()
    tok, cache = load_tokenizer(folder), tmp_path / "tokens"
    long = tokenize([str(long)], tok, cache, "long")
    short = tokenize([str(short)], tok, cache, "short")
    long_ids = torch.cat([data.Stream(long, "long", c.seed, 1, 256).batch(m) for m in (0, 1)])
    short_ids = data.Stream(short, "short", c.seed, 3, 64).batch(0)[:, :-1]
    s2l_ids = data.Stream(long, "s2l", c.seed, 2, 64).batch(0)[:, :-1]
    rng = np.random.default_rng([c.seed, 0x52, 0])
    skipped = torch.from_numpy(data.cream_positions(rng, 2, 64, 256))
    long, short, s2l = data.Batch.whole(long_ids), reads(short_ids), reads(s2l_ids, skipped)
    total = (
        8 / 16 * cross_entropy(student, None, long, c)
        + 6 / 16 * 5 * short_text_distillation(student, teacher, short, c)
        + 2 / 16 * 10 * short_to_long_distillation(student, teacher, s2l, c)
    )
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
    torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), 1e-8, 0.1).step()
    line = read_log(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    same_first_update(exported, student)


@pytest.mark.parametrize("method, alpha_kl", [("soft_replay", None), ("longred", 2.0)])
def test_one_step_with_kl_equals_the_formula_written_out(ckpt, tmp_path, method, alpha_kl):
    c = tiny_run(ckpt, tmp_path / "run", steps=1, eval_tokens=0, method=method, alpha_kl=alpha_kl)
    c.distill_layers = [2, 3] if method == "longred" else None
    exported = load_checkpoint(train(c))
    folder, long, short = ckpt
    teacher = load_checkpoint(folder)
    student = load_checkpoint(folder, rope_theta=3000.0).train()
    texts = {
        name: tokenize([str(path)], load_tokenizer(folder), tmp_path / "tokens", name)
        for name, path in (("long", long), ("short", short))
    }
    long_ids = torch.cat(
        [data.Stream(texts["long"], "long", c.seed, 1, 256).batch(m) for m in (0, 1)]
    )
    short_ids = data.Stream(texts["short"], "short", c.seed, 3, 64).batch(0)[:, :-1]
    s2l_ids = data.Stream(texts["long"], "s2l", c.seed, 2, 64).batch(0)[:, :-1]

    def kl(ids):  # over whole vocabularies, in float64
        log_p, log_q = (m.logits(m(ids)[0]).double().log_softmax(-1) for m in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    loss = 8 / 16 * cross_entropy(student, None, data.Batch.whole(long_ids), c)
    want = {}
    if method == "soft_replay":
        want |= {"loss_short": kl(short_ids), "loss_s2l": kl(s2l_ids)}
        loss = loss + 6 / 16 * want["loss_short"] + 2 / 16 * want["loss_s2l"]
    else:
        skipped = data.cream_positions(np.random.default_rng([c.seed, 0x52, 0]), 2, 64, 256)
        want["loss_kl"] = kl(short_ids)
        want["loss_short"] = short_text_distillation(student, teacher, reads(short_ids), c)
        s2l = reads(s2l_ids, torch.from_numpy(skipped))
        want["loss_s2l"] = short_to_long_distillation(student, teacher, s2l, c)
        loss = loss + 6 / 16 * (5 * want["loss_short"] + 2 * want["loss_kl"])
        loss = loss + 2 / 16 * 10 * want["loss_s2l"]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
    torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), 1e-8, 0.1).step()
    line = read_log(tmp_path / "run")[0]
    for name, value in (want | {"loss": loss}).items():
        assert line[name] == pytest.approx(value.item(), rel=1e-5), name
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    same_first_update(exported, student)


METHODS = "longred", "soft_replay", "mix_cpt", "long_cpt", "longrecipe"
GIVEN = dict(alpha_short=7.0, alpha_s2l=7.0, alpha_kl=7.0, distill_layers=[1, 3])
GIVEN |= dict(n_distill_layers=2, position_scheme="cream_truncated")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_changes_a_methods_streams_or_is_refused(ckpt, tmp_path, method, name):
    assert [*GIVEN] == longred.ABOUT_ONE_LOSS.split()
    original, asked = load_config(ckpt[0]), tiny_run(ckpt, tmp_path, method=method)
    plain = longred.resolve(asked, original, "tiny")
    given = dataclasses.replace(asked, **{name: GIVEN[name]})
    if name in longred.UNREAD.get(method, ()):
        assert getattr(plain, name) is None
        with pytest.raises(ValueError, match=f"--{name} .* with --method {method}, which does not"):
            longred.resolve(given, original, "tiny")
        return
    c = longred.resolve(given, original, "tiny")

    def learnt(c):  # all that a loss reads of the settings is c.distill_layers
        rows = [(s.name, s.weights, s.loss, s.position_scheme) for s in plan_streams(c).values()]
        return rows, c.distill_layers or c.n_distill_layers

    assert learnt(c) != learnt(plain)


def test_mix_cpt_weighs_its_streams(ckpt, tmp_path):
    original = load_config(ckpt[0])
    c = longred.resolve(tiny_run(ckpt, tmp_path, method="mix_cpt"), original, "tiny")
    assert {n: s.weights[n] for n, s in plan_streams(c).items()} == {
        "long": 8 / 16,
        "short": 6 / 16,
        "s2l": 2 / 16,
    }
    c = dataclasses.replace(c, alpha_short=2.0, alpha_s2l=0.5)
    weights = {n: s.weights[n] for n, s in plan_streams(c).items()}
    assert weights == {"long": 8 / 16, "short": 12 / 16, "s2l": 1 / 16}


def test_soft_replay_weighs_both_of_its_short_streams(ckpt, tmp_path):
    asked = tiny_run(ckpt, tmp_path, method="soft_replay", alpha_kl=3.0)
    streams = plan_streams(longred.resolve(asked, load_config(ckpt[0]), "tiny"))
    weights = {n: s.weights[n] for n, s in streams.items()}
    assert weights == {"long": 8 / 16, "short": 18 / 16, "s2l": 6 / 16}


def test_layers_are_chosen_by_how_the_original_drifts_on_texts_of_its_window(
    ckpt, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(longred, "select_distill_layers", lambda *a: seen.append(a) or [1, 3])
    train(tiny_run(ckpt, tmp_path / "run", steps=1, short_len=32, eval_tokens=0))
    ((teacher, student, ids, n),) = seen
    original = load_checkpoint(ckpt[0])
    extended = load_checkpoint(ckpt[0], rope_theta=3000.0)
    assert torch.equal(teacher.inv_freq, original.inv_freq)
    assert torch.equal(student.inv_freq, extended.inv_freq)
    assert ids.shape == (16, 64) and n == 6  # the old window, not --short_len


def test_the_teacher_is_frozen_and_kept_out_of_everything(ckpt, tmp_path, monkeypatch):
    loaded, optimized = [], []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        run, "load_checkpoint", lambda *a: loaded.append(load_checkpoint(*a)) or loaded[-1]
    )
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, **k: optimized.extend(p := list(p)) or adamw(p, **k)
    )
    train(tiny_run(ckpt, tmp_path / "run", steps=3, save_every=1))
    teacher, student = loaded[-2:]  # before them one to choose the layers by
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    ours = {id(p) for p in student.parameters()}
    assert {id(p) for p in optimized} == ours and not ours & {id(p) for p in teacher.parameters()}
    for a, b in zip(teacher.parameters(), load_checkpoint(ckpt[0]).parameters(), strict=True):
        assert torch.equal(a, b)
    (state,) = newest_state(tmp_path / "run").glob("*.safetensors")
    kinds = "model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq"
    expected = {f"{kind}.{name}" for kind in kinds for name, _ in student.named_parameters()}
    assert load_file(state).keys() == expected


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


def test_a_step_does_not_depend_on_how_it_is_cut_into_units(ckpt, tmp_path):
    losses = []
    changes = dict(steps=2, long_micro=1, long_batch=2, long_position_scheme="pose", eval_tokens=0)
    for units in (64, 32768):
        out = tmp_path / f"units{units}"
        train(tiny_run(ckpt, out, unit_tokens=units, **changes))
        losses.append([(line["loss"], line["grad_norm"]) for line in read_log(out)])
    assert np.allclose(*losses, rtol=1e-5)


# --------------------------------------------------------------------- longred.py: layers to distil


def test_layers_are_chosen_by_attention_drift_and_the_last_is_among_them(pairs):
    teacher, student = pairs[0]
    kl = attention_kl(teacher, student, tokens()).mean(1)
    most = int(kl[:2].argmax()) + 1
    assert select_distill_layers(teacher, student, tokens(), 1) == [3]
    assert select_distill_layers(teacher, student, tokens(), 2) == [most, 3]
    assert select_distill_layers(teacher, student, tokens(), 9) == [1, 2, 3]


@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0}], ids=str)
def test_other_frequencies_on_the_same_weights_are_a_second_model_bit_for_bit(tmp_path, scaling):
    teacher = load_checkpoint(save_checkpoint(tiny_llama(), tmp_path / "hf"))
    student = load_checkpoint(tmp_path / "hf", 9000.0, scaling)
    new = rescaled(teacher.config, 9000.0, scaling)
    frequencies = rope_frequencies(new.head_dim, new.rope_theta, new.rope_scaling)
    view, own = teacher.with_frequencies(*frequencies), teacher.inv_freq
    assert torch.equal(view(tokens())[0], student(tokens())[0])
    kl = attention_kl(teacher, view, tokens())
    assert torch.equal(kl, attention_kl(teacher, student, tokens())) and kl.min() > 0
    assert view.embed_tokens is teacher.embed_tokens and teacher.inv_freq is own


# ---------------------------------------------------------------- longred.py: the method's variants


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


@pytest.mark.parametrize("scheme", ["pose", "longrecipe"])
def test_one_step_of_longrecipe_is_cross_entropy_under_its_positions(ckpt, tmp_path, scheme):
    c = tiny_run(ckpt, tmp_path / "run", method="longrecipe", steps=2, eval_tokens=0, lr=1e-9)
    train(c := replace(c, long_position_scheme=scheme, long_batch=3))
    student = load_checkpoint(ckpt[0], rope_theta=3000.0)
    tok = load_tokenizer(ckpt[0])
    corpus = tokenize(c.long_data, tok, c.cache_dir, "long")
    text, log = data.Stream(corpus, "long", c.seed, 3, 77), read_log(tmp_path / "run")  # 0.3 x 256
    sentence_end = tok.encode_batch([".!?\n"])[0]
    for step in (0, 1):
        losses = []
        for index in (2 * step, 2 * step + 1):  # two micro-batches
            ids, rng = text.batch(index), np.random.default_rng([c.seed, 0x4C, index])
            if scheme == "pose":
                positions = data.pose_positions(rng, 3, 77, 256)
            else:
                cuts = [[i + 1 for i in range(76) if row[i] in sentence_end] for row in ids]
                positions = [data.longrecipe_positions(rng, np.array(b), 77, 256) for b in cuts]
            positions = torch.as_tensor(np.stack(positions))
            batch = data.Batch.whole(ids, positions)
            losses.append(cross_entropy(student, None, batch, c).item())
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
    student, tok = load_checkpoint(ckpt[0], rope_theta=3000.0), load_tokenizer(ckpt[0])
    corpus = tokenize(c.replay_data, tok, c.cache_dir, "replay")
    text = data.Stream(corpus, "replay", c.seed, 2, 64)  # the old window
    for line in replay:
        index = 2 * (line["step"] - 1)  # two micro-batches a step
        ids = torch.cat([text.batch(index), text.batch(index + 1)])
        want = cross_entropy(student, None, data.Batch.whole(ids), c).item()
        assert line["loss_replay"] == pytest.approx(want, rel=1e-5)
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


# ----------------------------------------------------------------------------- the paper's settings


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
    assert (bare.long_data, bare.short_data) == (DEFAULT_LONG, DEFAULT_SHORT)
    assert (bare.s2l_data, at_32k.s2l_data) == (DEFAULT_SHORT, [os.path.abspath("x")])
    far = resolve(dataclasses.replace(asked, target_len=131072), model, ckpt[0])
    assert (far.rope_theta, far.alpha_short, far.alpha_s2l) == (1e8, 2, 15)
    assert (far.n_distill_layers, far.position_scheme) == (3, "uniform")
    for length, like in ((32000, at_32k), (128000, far)):  # the paper's own round numbers
        as_written = resolve(dataclasses.replace(asked, target_len=length), model, ckpt[0])
        for key in ("rope_theta", "alpha_short", "n_distill_layers", "position_scheme"):
            assert getattr(as_written, key) == getattr(like, key), key
    cpt = resolve(dataclasses.replace(asked, target_len=32768, method="long_cpt"), model, ckpt[0])
    assert {n: s.tokens for n, s in plan_streams(cpt).items()} == {"long": 2097152}
