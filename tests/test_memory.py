"""machine/memory.py: 8B parameters on one GPU, proved on a CPU."""

import collections
import contextlib
import functools
import gc
import json
import os
import re
import shutil
import sys
import warnings
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch._dynamo.testing
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import longred
from longred import cosine_distance, fill, main, plan_streams
from machine import memory, plan, run
from machine.formats import load_checkpoint, save_checkpoint
from machine.plan import (
    GIB,
    Policy,
    Unit,
    activation_bytes,
    activation_memory,
    available_memory,
    make_plan,
    model_flops,
    parameter_count,
)
from machine.run import train
from machine.settings import MachineConfig as Config
from measure import timing
from model import Attention, Llama, ModelConfig, next_token_loss
from tests.conftest import DEVICE, killed_after_two, read_log, same_run, tiny_config, tiny_run

# -------------------------------------------------------------------------------------------- AdamW


ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


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


def accumulated(model, host_gradients, steps=3):
    """Steps of three micro-batches, clipped; the last step's train no LM head. Norms, bits."""
    settings = dict(host=True, chunk=1000, host_gradients=host_gradients)
    optimizer = memory.AdamW(model.parameters(), 0.01, (0.9, 0.95), 1e-8, 0.1, **settings)
    norms = []
    for step in range(steps):
        for micro in range(3):
            ids = torch.randint(96, (2, 21), generator=torch.Generator().manual_seed(micro))
            hidden, _ = model(ids[:, :-1])
            loss = hidden.float().square().mean() * (1 + micro)
            if step + 1 < steps:
                loss = next_token_loss(hidden, model.lm_head_weight, ids[:, 1:])[0] / 10
            loss.backward()
        assert all(p.grad is None for p in model.parameters()) == host_gradients
        norms.append(torch.nn.utils.clip_grad_norm_(optimizer.with_gradients(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    bits = [p.detach().view(torch.int16) for p in model.parameters()]
    return norms, bits + optimizer.state_dict()["state"]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_summed_in_host_memory_have_the_bits_of_those_that_stay(tied):
    (norms, stayed), (away_norms, away) = (
        accumulated(tiny(dtype=torch.bfloat16, tie_embeddings=tied), host) for host in (False, True)
    )
    assert norms == away_norms and min(norms) > 1  # all were clipped
    assert all(map(torch.equal, stayed, away))


def test_no_more_than_a_bound_of_gradients_waits_on_its_way_to_the_host(monkeypatch):
    monkeypatch.setattr(memory, "IN_FLIGHT", 4 * 48 * 96)
    model = tiny(dtype=torch.bfloat16)
    settings = dict(host=True, host_gradients=True)
    optimizer = memory.AdamW(model.parameters(), 0.01, (0.9, 0.95), 1e-8, 0.1, **settings)
    gradients = optimizer.gradients
    for p in model.parameters():  # hooks run in order: after the gradient was taken
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(g.nbytes for g, _ in gradients.leaving))
        )
    held = []
    model(torch.arange(20)[None])[0].sum().backward()
    assert 0 < max(held) <= memory.IN_FLIGHT and len(held) == len([*model.parameters()]) - 1
    assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------- activations

POLICIES = {
    "recomputed": Policy(mlp_rows=10),
    "attention kept": Policy(attention=2, mlp_rows=10),
    "some kept whole": Policy(keep_all=1, attention=1, mlp_rows=10),
    "offloaded": Policy(attention=2, offload=True, mlp_rows=10),
    "all at once": Policy(keep_all=1, attention=2, offload=True, mlp_rows=7),
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
    last, hidden = model(ids, layers=(0, 2, 5))
    sum((h.float() * h.float().roll(1, -1)).sum() for h in (last, *hidden.values())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_activation_policy_gives_the_gradients_without_any(policy):
    ids = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))
    model = tiny()
    expected = gradients(model, ids)
    offload = memory.Offload(5, 2 * 33 * 48 * 4, torch.device("cpu")) if policy.offload else None
    memory.apply_policy(model, policy, offload)
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


@pytest.mark.parametrize("n_kept", [0, 3])
def test_recomputing_stops_before_the_mlp_and_repeats_no_attention_that_was_kept(n_kept):
    ids = torch.randint(96, (1, 32), generator=torch.Generator().manual_seed(1))
    model = tiny()
    memory.apply_policy(model, Policy(attention=n_kept, mlp_rows=32))
    last, _ = model(ids)
    with CountOps() as backward:
        last.sum().backward()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert backward.counts[attention] == 5 - n_kept
    # Per block: recomputed q, k, v, o, gate, up: 6. Gradients of 7 weights and 7 inputs: 14.
    products = sum(n for op, n in backward.counts.items() if "mm" in op.name())
    assert products == 5 * (6 + 14)


def test_offloaded_inputs_leave_the_device_and_come_back_unchanged():
    model, ids = tiny(), torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    offload = memory.Offload(5, 2 * 16 * 48 * 4, torch.device("cpu"))
    memory.apply_policy(model, Policy(keep_all=1, offload=True), offload)
    taps = (0, 1, 2, 3)  # the inputs of blocks 0 to 3
    _, hidden = model(ids, layers=taps)
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
    policy = Policy(1, 2, offload=True, mlp_rows=20, compile=True)
    memory.apply_policy(model, policy, memory.Offload(5, 2 * 33 * 48 * 4, torch.device("cpu")))
    got = [gradients(model, ids) for _ in range(2)][1]
    assert graphs.frame_count == 3  # recomputed, recomputed but for attention, kept whole
    assert_same(got, expected)


def test_chunked_hidden_distance_is_the_mean_over_tokens_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 11, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    grads = []
    whole, chunked = cosine_distance.__wrapped__, functools.partial(cosine_distance, rows=7)
    for distance in (whole, chunked):
        leaf = a.clone().requires_grad_()
        loss = distance(leaf, b)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------ one GPU


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
            _, target = teacher(ids[:, :-1], layers=(2, 5))
        _, hidden = student(ids[:, :-1], layers=(2, 5))
        loss = sum(compare(hidden[i], target[i]) for i in (2, 5))
        loss.backward()
        losses += (nll / count).item(), loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def test_the_whole_small_memory_path_trains_like_plain_fp32():
    adamw = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    student, teacher = (tiny(seed).bfloat16().float() for seed in (0, 1))
    reference = torch.optim.AdamW(student.parameters(), **adamw)
    plain = run_losses(student, teacher, reference, lambda name: None, cosine_distance)
    lean, teacher = tiny(0, torch.bfloat16), tiny(1, torch.bfloat16).requires_grad_(False)
    passes = [Unit("long", 2, 40), Unit("short", 2, 40, hidden_states=2, heads=0)]
    plan = make_plan(lean.config, passes, 8 * GIB, 8 * GIB)
    policy = Policy(1, 2, offload=True, mlp_rows=32)
    plan = replace(plan, host_state=True, teacher_resident=False, slot_bytes=2 * 40 * 48 * 2)
    machine = memory.OneGPU(
        replace(plan, policies=dict(long=policy, short=policy)), lean, teacher, **adamw
    )
    compare = functools.partial(cosine_distance, rows=30)
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
    stops = [home[name] + p.nbytes for name, p in params.items()]
    assert all(0 <= b - a < 64 for a, b in zip(stops, [*home.values()][1:], strict=False))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **__: t.clone())  # in place of a GPU
    visitor.come()
    assert [n for n, p in params.items() if p.data_ptr() == home[n]] == ["lm_head.weight"]
    here = params["norm.weight"].data_ptr()
    visitor.come(lm_head=True)  # adds what is missing, and only that
    assert not {p.data_ptr() for p in params.values()} & set(home.values())
    assert params["norm.weight"].data_ptr() == here
    assert all(map(torch.equal, params.values(), before))
    visitor.leave()
    assert {n: p.data_ptr() for n, p in params.items()} == home


@pytest.fixture
def small_memory(monkeypatch):
    """Makes train take the GPU's path on a CPU: bf16 weights, host state, visiting teacher.

    The dict that it gives may be filled: changes of the plan.
    """
    changes = {}

    def check_as_on_a_gpu(self, streams):
        check(self, streams)
        units = [replace(Unit.of(s, self.c, 1), count=1) for s in streams.values()]
        units = [replace(u, hidden_states=min(2, u.hidden_states)) for u in units]
        plan = make_plan(self.original, units, 8 * GIB, 8 * GIB)
        policy = Policy(1, 1, offload=True, mlp_rows=50)
        plan.policies = dict.fromkeys(plan.units, policy)
        plan.host_state, plan.teacher_resident = True, False
        plan.slot_bytes = 2 * self.original.d_model * max(u.tokens for u in units)
        plan = replace(plan, **changes)
        self.plan, self.compute, self.stored = plan, torch.bfloat16, torch.bfloat16
        self.sequences = {name: unit.batch for name, unit in plan.units.items()}

    check = run.Run.fit_to_machine
    monkeypatch.setattr(run.Run, "fit_to_machine", check_as_on_a_gpu)
    return changes


def test_the_small_memory_path_logs_what_fp32_does(ckpt, tmp_path, request):
    train(tiny_run(ckpt, tmp_path / "fp32", steps=4))
    request.getfixturevalue("small_memory")
    train(tiny_run(ckpt, tmp_path / "bf16", steps=4))
    for a, b in zip(read_log(tmp_path / "fp32"), read_log(tmp_path / "bf16"), strict=True):
        assert b["loss_long"] == pytest.approx(a["loss_long"], rel=2**-8)  # a bf16 half step
        for name in ("loss_short", "loss_s2l"):  # 1 - cos, near 0: bf16 leaves noise of its own
            assert b[name] == pytest.approx(a[name], rel=0.1, abs=2e-4)


def test_a_run_whose_gradients_go_to_the_host_is_the_same_run(ckpt, tmp_path, small_memory):
    settings = dict(save_every=2, grad_clip=0.05, eval_tokens=0)
    train(tiny_run(ckpt, tmp_path / "stay", **settings))
    small_memory["host_gradients"] = True
    train(tiny_run(ckpt, tmp_path / "leave", **settings))
    assert min(line["grad_norm"] for line in read_log(tmp_path / "leave")) > 0.05  # all clipped
    assert same_run(tmp_path / "stay", tmp_path / "leave")
    # A state knows nothing of where gradients were.
    main(["--resume", str(killed_after_two(tmp_path / "stay", tmp_path / "parts"))])
    assert same_run(tmp_path / "stay", tmp_path / "parts")


BF16_RUN = dict(original_len=128, target_len=256, save_every=2, eval_tokens=0)
BF16_RUN |= dict(long_micro=1, s2l_micro=0, short_batch=1, distill_layers=[1, 3])


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels of a real GPU round otherwise")
def test_bf16_on_a_cpu_has_the_bits_of_one_gpus_path(ckpt, tmp_path, a_gpu):
    states = []
    for name, where in {"gpu": dict(device="cuda"), "cpu": dict(dtype="bf16")}.items():
        train(tiny_run(ckpt, tmp_path / name, **BF16_RUN, **where))
        last = tmp_path / name / "checkpoints" / "step-000004"
        states.append(load_file(last / "shard-00000.safetensors"))
    assert same_run(tmp_path / "gpu", tmp_path / "cpu")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # masters, too
    moved = killed_after_two(tmp_path / "gpu", tmp_path / "moved")
    main(["--resume", str(moved), "--device", "cpu", "--dtype", "bf16", "--resume_anyway"])
    assert same_run(tmp_path / "cpu", moved)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_bf16_on_a_cpu_stays_near_fp32_resumes_to_the_bit_and_keeps_the_exports_dtype(
    ckpt, tmp_path, stored, capsys
):
    folder = shutil.copytree(ckpt[0], tmp_path / "original")
    save_checkpoint(load_checkpoint(folder).to(stored), folder, tokenizer_from=ckpt[0])
    for name, more in {"fp32": {}, "bf16": dict(dtype="bf16", recompute=True)}.items():
        train(tiny_run((folder, *ckpt[1:]), tmp_path / name, **BF16_RUN, **more))
        exported = load_file(tmp_path / name / "hf" / "model.safetensors").values()
        assert {t.dtype for t in exported} == {stored}
    printed = capsys.readouterr().out
    assert "memory plan" not in printed  # which is a GPU's
    rounded = "weights stored as float32 are rounded to bfloat16" in printed
    assert rounded == (stored == torch.float32)
    logs = [read_log(tmp_path / name) for name in ("fp32", "bf16")]
    for a, b in zip(*logs, strict=True):
        assert b["loss_long"] == pytest.approx(a["loss_long"], rel=2**-8)  # a bf16 half step
    assert logs[0][-1]["loss_long"] < 0.98 * logs[0][0]["loss_long"]  # it does train
    killed = killed_after_two(tmp_path / "bf16", tmp_path / "killed")
    main(["--resume", str(killed)])
    assert same_run(tmp_path / "bf16", killed)


# ----------------------------------------------------------------------------------------- plan.py


SHORT, S2L = timing.FULL.steps[32768].units[1:]


def units(length):
    """One step of the paper with long passes of this length."""
    return [Unit("long", 1, length, 2**20 // length), SHORT, S2L]


class TracedNorm(torch.nn.RMSNorm):
    def forward(self, x):  # one kernel on a GPU, which saves its input
        return x * self.weight


class TracedAttention(Attention):
    def qkv(self, x, rope):  # the rotary kernel makes q and k anew and saves neither
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q * 1.0, k * 1.0, v


TRACED = {torch.nn.RMSNorm: TracedNorm, Attention: TracedAttention}


LOSSES = {  # by whether hidden states are compared, and how many LM heads run
    (False, 1): longred.cross_entropy,
    (True, 0): longred.short_text_distillation,
    (True, 2): longred.distillation_and_kl,
    (False, 2): longred.kl_distillation,
}


def fake_student(config):
    """Weights in bf16 and gradients in fp32 that take no memory, under FakeTensorMode."""
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast in place
    student = Llama(config)
    torch.set_default_dtype(torch.float32)
    for module in student.modules():
        module.__class__ = TRACED.get(type(module), type(module))
    for p in student.parameters():
        p.grad_dtype = torch.float32
        p.grad = torch.zeros(p.shape)
    return student


def traced_peak(config, unit, policy):
    """Bytes that one unit adds at its worst to weights and gradients, counted on fake tensors.

    The code that trains runs here at full size in seconds, without memory or GPU: blocks under
    their policy, losses, backward. Rotary and RMSNorm, of many operations on a CPU, are replaced by
    one that allocates what their GPU kernel does.
    """
    offload = memory.Offload(config.n_layers, 0, torch.device("cpu"))  # gets its room below
    hidden = torch.Size((unit.batch, unit.seq_len, config.d_model))

    def teacher(_ids, _positions, layers=(), **_):
        made = {i: torch.zeros(hidden, dtype=torch.bfloat16) for i in layers}
        last = made.get(config.n_layers)
        return torch.zeros(hidden, dtype=torch.bfloat16) if last is None else last, made

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Offload compares addresses, here all 0
        student = fake_student(config)
        teacher.lm_head_weight = student.lm_head_weight.detach()
        offload.slot_bytes = 2 * hidden.numel()
        offload.host = torch.empty(config.n_layers * offload.slot_bytes, dtype=torch.uint8)
        memory.apply_policy(student, policy, offload)
        student.loss_rows = policy.loss_rows
        batch = data.Batch.whole(torch.zeros(unit.batch, unit.seq_len + 1, dtype=torch.int64))
        c = Config(distill_layers=list(range(config.n_layers + 1))[-unit.hidden_states :])
        weights, mlp = list(student.parameters()), student.layers[0].mlp
        fp32_sums = {w.shape for w in (*mlp.parameters(), student.lm_head_weight)}
        with timing.CountBytes(
            [offload.host, *weights, *(w.grad for w in weights)], fp32_sums
        ) as count:
            losses = LOSSES[unit.hidden_states > 0, unit.heads](student, teacher, batch, c)
            (sum(losses.values()) if isinstance(losses, dict) else losses).backward()
    return count.peak


@pytest.mark.parametrize("length", [32768, 131072])
@pytest.mark.parametrize("gib", [79, 139])
def test_planned_activations_are_within_a_tenth_of_those_the_code_allocates(length, gib):
    plan = make_plan(timing.LLAMA3_8B, units(length), gib * GIB, 120 * GIB)
    config = replace(timing.LLAMA3_8B, n_layers=6)  # every block is like its neighbours
    short = plan.units["short"]
    with_kl = [replace(short, heads=2), replace(short, hidden_states=0, heads=2)]
    for unit in [*plan.units.values(), *with_kl]:
        p = plan.policies[unit.name]
        policy = replace(p, keep_all=p.keep_all // 6, attention=min(p.attention, 3))
        traced = traced_peak(config, unit, policy)
        planned = sum(activation_memory(config, unit, policy).values())
        assert 0.95 < planned / traced < 1.15, (unit, policy)


def test_kl_takes_no_more_room_than_the_cross_entropy():
    nll, kl = (timing.counted_peak(f"next_token_{name}") for name in ("loss", "kl"))
    full = 8192 * timing.LLAMA3_8B.vocab_size * 4  # all logits once, in fp32
    assert kl <= 1.1 * nll and 0 < nll < 2 * full


def test_planner_meets_the_targets_and_more_memory_is_never_slower():
    def peak(plan):
        return max(sum(terms.values()) for terms in plan.gpu.values())

    def plan(length, gib, host=120, moments=torch.float32):
        room = int(gib * GIB), host * GIB
        return make_plan(timing.LLAMA3_8B, units(length), *room, moments=moments)

    at_80gb = plan(32768, 80e9 / 2**30)
    assert peak(at_80gb) < 74 * GIB and at_80gb.host_state
    for length in (131072, 262144):
        assert peak(plan(length, 139)) < 139 * GIB
    assert plan(393216, 139, moments=torch.bfloat16).policies["long"].offload
    seconds = [plan(32768, gib).seconds for gib in (66, 72, 80, 100, 139, 200, 400)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    roomy = plan(32768, 1000)
    assert not roomy.host_state and roomy.teacher_resident
    assert all(p.keep_all == 32 for p in roomy.policies.values())


LLAMA_3B = replace(timing.LLAMA3_8B, d_model=3072, n_layers=28, n_heads=24, d_ff=8192)
LLAMA_3B = replace(LLAMA_3B, tie_embeddings=True)
CARDS = {  # model, window, GiB that are free; whether gradients have to leave the GPU
    "3B 32K on 48 GB": (LLAMA_3B, 32768, 47.4, False),
    "8B 32K on 80 GB": (timing.LLAMA3_8B, 32768, 79.1, False),
    "8B 128K on 141 GB": (timing.LLAMA3_8B, 131072, 139.0, False),
    "3B 16K on 24 GB": (LLAMA_3B, 16384, 23.5, True),
    "8B 16K on 48 GB": (timing.LLAMA3_8B, 16384, 47.4, True),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_plan_leaves_room_for_the_gaps_of_the_allocator(name):
    config, length, gib, host_gradients = CARDS[name]
    for expandable, gaps in ((True, 0.5 * (1 + 0.5 * host_gradients) * GIB), (False, None)):
        found = make_plan(config, units(length), int(gib * GIB), 120 * GIB, expandable=expandable)
        for unit in found.units:
            allocated = sum(found.gpu[unit].values())
            assert found.reserved(unit) == int(allocated + (gaps or 0.13 * allocated))
            assert found.reserved(unit) < gib * GIB
        assert found.host_gradients == host_gradients or not expandable
        assert ("fixed segments" in found.table()) != expandable


CHOICES = {  # length, GiB of GPU and of host, moments -> seconds of a step; of each unit the
    # sequences in a pass, blocks kept whole, attention outputs kept, whether inputs are offloaded
    (32768, 79.1, 120, torch.float32): (232.7, (1, 3, 29, 0), (4, 32, 0, 0), (1, 15, 17, 0)),
    (32768, 139.0, 0, torch.bfloat16): (225.5, (1, 2, 30, 0), (8, 32, 0, 0), (1, 32, 0, 0)),
    (131072, 79.1, 128, torch.float32): (431.2, (1, 0, 19, 1), (4, 32, 0, 0), (1, 15, 17, 0)),
    (262144, 139.0, 120, torch.float32): (713.5, (1, 0, 10, 0), (32, 28, 4, 0), (4, 29, 1, 0)),
}


@pytest.mark.parametrize("asked", CHOICES, ids=str)
def test_the_planner_chooses_for_8b_what_its_table_of_seconds_says(asked):
    """A change of the planner that changes these has to say why."""
    (length, gpu, host, moments), (seconds, *choices) = asked, CHOICES[asked]
    room = int(gpu * GIB), host * GIB
    found = make_plan(timing.LLAMA3_8B, units(length), *room, moments=moments)
    assert found.seconds == pytest.approx(seconds, rel=1e-3)
    for name, choice in zip(("long", "short", "s2l"), choices, strict=True):
        p = found.policies[name]
        assert (found.units[name].batch, p.keep_all, p.attention, p.offload) == choice, name


LLAMA_70B = replace(timing.LLAMA3_8B, d_model=8192, n_layers=80, n_heads=64, d_ff=28672)
LLAMA_1B = replace(timing.LLAMA3_8B, d_model=2048, n_layers=16, head_dim=64, d_ff=8192)
LLAMA_1B = replace(LLAMA_1B, tie_embeddings=True)


def remedies(text: str) -> list[str]:
    return text.partition("; it fits with ")[2].split(", or ")


def shorter(length):
    """The step with its long passes cut to this length."""
    return [replace(units(131072)[0], seq_len=length), SHORT, S2L]


def tried(remedy, config, length, gpu, host, processes=1) -> str:
    """The table of the plan with a remedy taken, as its words say. ValueError: it does not fit."""
    moments = torch.bfloat16 if "--moments bf16" in remedy else torch.float32
    if found := re.search(r"--target_len (\d+)", remedy):
        length = int(found[1])
    if found := re.search(r"(\d+) GiB of free host memory", remedy):
        host = int(found[1])
    if found := re.search(r"a GPU of (\d+) GB", remedy):
        gpu = int(found[1]) * 0.98
    context = re.search(r"--context (\d+)", remedy)
    more = re.search(r"(\d+) GPUs .torchrun", remedy)
    processes = int(more[1]) if more else 1 if "alone" in remedy else processes
    room = int(gpu * GIB), host * GIB
    if processes == 1:
        return make_plan(config, shorter(length), *room, moments=moments).table()
    many = dict(processes=processes, context=int(context[1]) if context else 1)
    return make_plan(config, shorter(length), *room, **many).table()


@pytest.mark.parametrize(
    "gpu, host, length, some",
    [
        (20, 120, 32768, ["a GPU of 48 GB"]),
        (79, 100, 131072, ["--moments bf16", "--target_len 90112", "112 GiB of free host memory"]),
        (40, 60, 32768, ["120 GiB of free host memory"]),
        (79, 60, 393216, []),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_what_would(gpu, host, length, some):
    with pytest.raises(ValueError, match="this does not fit") as refused:
        make_plan(timing.LLAMA3_8B, shorter(length), gpu * GIB, host * GIB)
    said = str(refused.value)
    assert "weights take 15.0 GiB of the GPU" in said and "\n" not in said
    assert set(some) <= set(remedies(said))
    for remedy in remedies(said):
        assert "GPU peak" in tried(remedy, timing.LLAMA3_8B, length, gpu, host)


def test_no_length_is_advised_that_a_run_would_refuse():
    with pytest.raises(ValueError) as refused:
        make_plan(timing.LLAMA3_8B, [Unit("long", 1, 131072)], 60 * GIB, 48 * GIB)
    assert "--target_len" not in str(refused.value) and "host memory" in str(refused.value)
    only_long, room = [Unit("long", 1, 131072)], (47 * GIB, 104 * GIB)
    with pytest.raises(ValueError, match=r"--train_len 8192\b|--train_len \d+"):
        make_plan(timing.LLAMA3_8B, only_long, *room, length=("--train_len", 0))
    with pytest.raises(ValueError) as refused:
        make_plan(timing.LLAMA3_8B, only_long, *room, length=("--target_len", 131071))
    assert "--target_len" not in str(refused.value)


def test_several_gpus_get_a_table_of_what_each_holds():
    plan = make_plan(
        timing.LLAMA3_8B, units(32768), int(79.1 * GIB), 500 * GIB, processes=8, context=1
    )
    n, rows = 8.03e9, dict(re.findall(r"^  (.{36}) +([\d.]+)", plan.table(), re.M))
    rows = {name.strip(): float(x) for name, x in rows.items()}
    spread = ["weights, fp32", "gradients, fp32", "AdamW's state", "teacher, bf16"]
    for name, each in zip(spread, (4, 4, 8, 2), strict=True):
        assert rows[name] == pytest.approx(each * n / 8 / GIB, abs=0.01)
    assert rows["inputs of recomputed blocks"] == 8.0 and "of each of 8" in plan.table()
    assert 34 < rows["GPU peak, allocated"] < rows["GPU peak, reserved"] < 38
    assert plan.host == {"export, first process": 8 * parameter_count(timing.LLAMA3_8B)}
    halves = make_plan(
        timing.LLAMA3_8B, units(32768), int(79.1 * GIB), 500 * GIB, processes=8, context=2
    )
    assert halves.gpu["long"]["inputs of recomputed blocks"] == 4 * GIB
    assert "1 x 16,384 of 32,768 tokens a pass" in halves.table()
    # Fewer sequences a pass, where it would not fit otherwise.
    tight = make_plan(timing.LLAMA3_8B, units(32768), 38 * GIB, 500 * GIB, processes=8)
    assert tight.units["short"].batch < plan.units["short"].batch


def test_a_run_on_several_gpus_prints_its_plan_and_reads_as_it_says(monkeypatch, capsys, tmp_path):
    machine = run.Run()
    machine.processes = mock.Mock(size=8, total=lambda values, op: values)
    machine.once, machine.original = lambda check: None, timing.LLAMA3_8B
    machine.compute, machine.stored, machine.source = torch.bfloat16, torch.float32, "x"
    c = Config(target_len=32768, original_len=8192, train_len=32768, device="cuda", context=1)
    fill(c, long_micro=8, long_batch=4, s2l_batch=16, short_batch=128, short_len=1024)
    fill(c, n_distill_layers=6, alpha_short=5.0, alpha_s2l=10.0)
    machine.c, streams, machine.out_dir = c, plan_streams(c), tmp_path
    for gib, batch in ((79.1, 32), (38, 16)):
        monkeypatch.setattr(plan, "gpu_room", lambda gib=gib: gib * GIB)
        monkeypatch.setattr(plan, "available_memory", lambda: 500 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
        machine.fit_to_machine(streams)
        assert machine.sequences["short"] == batch and "each of 8" in capsys.readouterr().out
    assert machine.plan is None  # of one GPU
    loaded = []
    monkeypatch.setattr(run, "load_checkpoint", lambda *args: loaded.append(args[4]))
    monkeypatch.setattr(memory, "empty_cache", lambda device: None)
    machine.load(), machine.load(3000.0)
    assert loaded == [torch.bfloat16, torch.float32]  # the teacher, and the student


@pytest.mark.parametrize(
    "config, gpu, host, remedy",
    [
        (timing.LLAMA3_8B, 23.5, 120, "16 GPUs (torchrun) and --context 4"),
        (LLAMA_70B, 79.1, 1800, "32 GPUs (torchrun) and --context 4"),
        (timing.LLAMA3_8B, 47.4, 128, "8 GPUs (torchrun)"),
    ],
)
def test_what_does_not_fit_several_gpus_is_refused_with_what_would(config, gpu, host, remedy):
    processes = 8 if config is LLAMA_70B else 2
    with pytest.raises(ValueError, match=f"does not fit {processes} GPUs with {gpu}") as refused:
        make_plan(config, units(32768), int(gpu * GIB), host * GIB, processes=processes)
    said = remedies(str(refused.value))
    assert remedy in said
    for remedy in said:
        assert "GPU peak" in tried(remedy, config, 32768, gpu, host, processes)


def test_a_tied_head_counts_twice_at_its_gradient_on_several_gpus():
    gpu = int(23.5 * GIB)
    plan = make_plan(LLAMA_1B, units(32768), gpu, 60 * GIB, processes=2)
    assert max(sum(terms.values()) for terms in plan.gpu.values()) < 21 * GIB
    once = 4 * LLAMA_1B.vocab_size * LLAMA_1B.d_model
    long = Unit("long", 1, 262144)  # so long that a block's backward is the worst moment
    tied, separate = (
        activation_memory(replace(LLAMA_1B, tie_embeddings=tie), long, Policy())
        for tie in (True, False)
    )
    assert {k for k in tied if "block's backward" in k} == {k for k in separate if "block's" in k}
    assert sum(tied.values()) - sum(separate.values()) == once
    with pytest.raises(ValueError, match="export takes 9.2 GiB"):
        make_plan(LLAMA_1B, units(32768), gpu, 12 * GIB, processes=2)


def test_the_floor_of_a_step_is_the_cards_own_where_it_is_known():
    def plan(card):
        return make_plan(LLAMA_1B, units(32768), 79 * GIB, 100 * GIB, card=card)

    h200, a100, other = map(plan, ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Quadro X"))
    assert 2.5 < a100.seconds / h200.seconds < 989 / 312 + 0.1
    assert "s at least on one A100-SXM4-80GB" in a100.table()
    assert other.seconds == h200.seconds and "were this an H200" in other.table()


def test_fewer_rows_of_logits_where_nothing_else_fits_and_the_loss_takes_them():
    plan = make_plan(LLAMA_1B, units(32768), 9 * GIB, 60 * GIB)
    assert plan.policies["long"].loss_rows == 1024 and "1024 rows of logits" in plan.table()
    whole = replace(plan.policies["long"], loss_rows=4096)
    room = 9 * GIB * 0.97 - GIB
    for policy, fits in ((plan.policies["long"], True), (whole, False)):
        made = activation_memory(LLAMA_1B, plan.units["long"], policy)
        fixed = sum(plan.gpu["long"].values()) - sum(
            activation_memory(LLAMA_1B, plan.units["long"], plan.policies["long"]).values()
        )
        assert (fixed + sum(made.values()) <= room) == fits
    student, teacher = tiny(0, torch.bfloat16), tiny(1, torch.bfloat16).requires_grad_(False)
    small = make_plan(student.config, [Unit("long", 1, 64)], 8 * GIB, 8 * GIB)
    small = replace(small, policies={"long": Policy(loss_rows=1024)})
    machine = memory.OneGPU(small, student, teacher, **ADAMW)
    machine.ready("long")
    assert student.loss_rows == 1024
    machine.finish()
    assert student.loss_rows is None


def test_flops_are_those_of_the_roofline():
    expected = {"long": 74.24e15, "s2l": 16.89e15, "short": 44.75e15}  # one step of the paper
    for unit in units(32768):
        total = unit.count * model_flops(timing.LLAMA3_8B, unit)
        assert total == pytest.approx(expected[unit.name], rel=2e-3)


def test_the_memory_estimate_knows_recomputation_and_the_container():
    one, few = (activation_bytes(tiny_config(), 1000, recompute) for recompute in (0, 1))
    assert few < one / 2
    if sys.platform == "linux":
        assert 2**20 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_estimate_is_what_a_pass_keeps(dtype):
    smollm2 = dict(d_model=576, n_layers=6, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536)
    config = replace(tiny_config(), **smollm2)
    model, kept = Llama(config).to(dtype), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(1, 512, dtype=torch.int64))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    estimate = activation_bytes(config, 512, False, dtype == torch.bfloat16)
    assert estimate == pytest.approx(found, rel=0.03)


def test_bf16_on_a_cpu_is_charged_its_own_bytes(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("machine.plan.check_memory", lambda *bytes: asked.append(bytes))
    n, options = plan.parameter_count(tiny_config()), dict(device="cpu", out_dir=str(tmp_path))
    for settings in ({}, {"dtype": "bf16"}, {"dtype": "bf16", "moments": "bf16"}):
        c = Config(keep=0, context=1, recompute=False, **options, **settings)
        plan.preflight(c, tiny_config(), [Unit("long", 1, 512)], processes=1, freed=0)
    both = [activation_bytes(tiny_config(), 512, False, bf16) for bf16 in (False, True)]
    assert asked == [(20 * n, both[0]), (18 * n, both[1]), (14 * n, both[1])]


def test_many_processes_are_charged_their_part_of_a_sequence_recomputed(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("machine.plan.check_memory", lambda weights, more: asked.append(more))
    c = Config(device="cpu", out_dir=str(tmp_path), keep=0, recompute=False)
    for processes, c.context in ((1, 1), (2, 1), (2, 2)):
        units = [Unit("long", 2, 512)]
        plan.preflight(c, tiny_config(), units, processes=processes, freed=0)
    whole = activation_bytes(tiny_config(), 1024, False)
    parts = [2 * activation_bytes(tiny_config(), n, True) for n in (1024, 512)]
    assert asked == [whole, *parts]


def control_groups(root, own: str, files: dict[str, str]):
    """A system of 100 GiB, of which 90 are available, seen from the group `own`."""
    files = {"proc/meminfo": f"MemTotal: {100 * 2**20} kB\nMemAvailable: {90 * 2**20} kB"} | files
    for name, text in ({"proc/self/cgroup": own} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return available_memory(root) / GIB


def stat(anon=0, **rest):
    """A group's memory.stat, in GiB; what it has of files can be dropped."""
    lines = {"anon": anon, "file": 50, "shmem": 0, "slab_unreclaimable": 0} | rest
    return "\n".join(f"{name} {int(gib * GIB)}" for name, gib in lines.items())


V2 = "sys/fs/cgroup"
SLICE = f"{V2}/user.slice"
CONTAINERS = {  # /proc/self/cgroup, files, GiB that can still be taken
    "no limit": ("0::/", {}, 90),
    "v2, its own": (
        "0::/job",
        {f"{V2}/job/memory.max": str(64 * GIB), f"{V2}/job/memory.stat": stat(4, shmem=1)},
        59,
    ),
    "v2, its parent's": (  # where a neighbour has taken 20
        "0::/user.slice/job/step",
        {f"{SLICE}/memory.max": str(40 * GIB), f"{SLICE}/memory.stat": stat(25)}
        | {f"{SLICE}/job/memory.max": str(64 * GIB), f"{SLICE}/job/memory.stat": stat(5)}
        | {f"{SLICE}/job/step/memory.max": "max", f"{SLICE}/job/step/memory.stat": stat(5)},
        15,
    ),
    "v2, where it is throttled": (
        "0::/job",
        {f"{V2}/job/memory.max": "max", f"{V2}/job/memory.high": str(30 * GIB)}
        | {f"{V2}/job/memory.stat": stat(10)},
        20,
    ),
    "v2, a container's root": (  # its path is the host's, and not there
        "0::/docker/1234",
        {f"{V2}/memory.max": str(32 * GIB), f"{V2}/memory.stat": stat(2)},
        30,
    ),
    "v1, which is not read": ("4:memory:/job", {}, 90),
    "more than the system has": (
        "0::/job",
        {f"{V2}/job/memory.max": str(500 * GIB), f"{V2}/job/memory.stat": stat(4)},
        90,
    ),
    "overdrawn": (
        "0::/job",
        {f"{V2}/job/memory.max": str(4 * GIB), f"{V2}/job/memory.stat": stat(6)},
        0,
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_free_host_memory_is_the_least_along_the_path_of_control_groups(name, tmp_path):
    own, files, left = CONTAINERS[name]
    assert control_groups(tmp_path, own, files) == pytest.approx(left)


def test_more_memory_than_there_is_is_refused_or_where_it_may_grow_warned_of(capsys):
    with pytest.raises(ValueError, match="--gpu_gib 120: 60.0 GiB are free"):
        plan.asked("--gpu_gib", 120, 60 * GIB)
    with pytest.raises(ValueError, match="pass --host_gib"):
        plan.asked("--host_gib", None, None)
    assert plan.asked("--host_gib", 40.5, 60 * GIB, grows=True) == 40.5 * GIB
    assert plan.asked("--host_gib", None, 7) == 7 and plan.asked("--host_gib", 2, None) == 2 * GIB
    assert not capsys.readouterr().out
    assert plan.asked("--host_gib", 120, 60 * GIB, grows=True) == 120 * GIB
    assert re.fullmatch("warning: --host_gib 120.* 60.0 GiB .*\n", capsys.readouterr().out)


def away(plan: plan.Plan) -> plan.Plan:
    """The plan made to use all the host memory that it can."""
    policies = dict.fromkeys(plan.units, Policy(1, 1, offload=True, mlp_rows=50))
    slot = max(2 * 48 * u.tokens for u in plan.units.values())
    where = dict(host_state=True, host_gradients=True, teacher_resident=False)
    return replace(plan, policies=policies, slot_bytes=slot, host={"all": 10**6}, **where)


def test_host_memory_that_is_gone_is_refused_before_it_is_touched_unless_it_was_given(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    student, teacher = tiny(0, torch.bfloat16), tiny(1, torch.bfloat16).requires_grad_(False)
    found = away(make_plan(student.config, [Unit("long", 1, 40)], 8 * GIB, 8 * GIB))
    with pytest.raises(memory.HostMemoryRefused, match="plan for less with --host_gib"):
        memory.OneGPU(found, student, teacher, **ADAMW)
    memory.OneGPU(replace(found, host_given=True), student, teacher, **ADAMW).finish()


def test_a_kernel_that_knows_no_advice_on_big_pages_locks_memory_all_the_same(monkeypatch):
    class Map(memory.mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    assert len(memory.host_buffer(1000, pin=False)) == 1000


def test_a_refused_lock_leaves_no_error_to_the_next_kernel(cuda_runtime):
    cuda_runtime.refuse_after = 0
    with pytest.raises(memory.HostMemoryRefused, match="refuses to lock .*CUDA error 2"):
        memory.host_buffer(2**20, pin=True)
    torch.ones(3, device="cuda").sum()


def test_locked_memory_is_unmapped_only_after_cuda_has_let_go_of_it(cuda_runtime, capsys):
    """CudaRuntime looks whether it is."""
    buffers = [memory.host_buffer(2**20, pin=True) for _ in range(3)]
    assert len(cuda_runtime.locked) == 3
    del buffers
    memory.free_host_buffers()
    assert not cuda_runtime.locked and not memory._LOCKED
    lost = memory.host_buffer(2**20, pin=True)
    (size,) = [cuda_runtime.locked.pop(lost.data_ptr())]  # so that the runtime refuses
    memory.free_host_buffers()
    assert "does not unlock" in capsys.readouterr().out and len(memory._LOCKED) == 1
    cuda_runtime.locked[lost.data_ptr()] = size
    lost.add_(1)  # the error was taken away


@pytest.mark.parametrize("locks", range(4))  # of teacher, block inputs, state, gradients
def test_a_refused_lock_leaves_both_models_as_they_were(cuda_runtime, locks):
    student, teacher = tiny(0, torch.bfloat16), tiny(1, torch.bfloat16).requires_grad_(False)
    before = [(p, p.clone()) for m in (student, teacher) for p in m.parameters()]
    found = away(make_plan(student.config, [Unit("long", 1, 40)], 8 * GIB, 8 * GIB))
    cuda_runtime.refuse_after = locks
    with pytest.raises(memory.HostMemoryRefused):
        memory.OneGPU(found, student, teacher, **ADAMW)
    assert not cuda_runtime.locked and all(torch.equal(p, old) for p, old in before)
    alone = replace(found, host_state=False, host_gradients=False, teacher_resident=True)
    alone = replace(alone, slot_bytes=0, policies={"long": Policy()})
    machine = memory.OneGPU(alone, student, teacher, **ADAMW)
    machine.ready("long")
    student(torch.arange(40)[None])[0].sum().backward()
    assert all(p.grad is not None for p in student.layers.parameters())


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_run_whose_host_memory_cannot_be_locked_goes_on_without(
    ckpt, tmp_path, monkeypatch, capsys, cuda_runtime, moments
):
    """moments: what fits the GPU alone."""
    made = plan.make_plan

    def make_plan(*args, host_bytes, **more):
        if host_bytes:
            return away(made(*args, host_bytes=host_bytes, **more))
        if moments == "bf16" and more["moments"] == torch.float32:
            raise ValueError("this does not fit")
        return made(*args, host_bytes=0, **more)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    cuda_runtime.refuse_after = 1
    sizes = dict(original_len=128, target_len=256, train_len=256, device="cuda", steps=1)
    sizes |= dict(long_micro=1, s2l_batch=1, short_batch=2)
    train(tiny_run(ckpt, tmp_path / "run", **sizes, eval_tokens=0))
    said = capsys.readouterr().out
    assert said.count("the system refuses to lock") == 1
    assert f"going on without, AdamW's moments in {moments}" in said
    assert len(read_log(tmp_path / "run")) == 1
    record = json.loads((tmp_path / "run" / "longred.json").read_text())
    assert record["config"]["moments"] == moments


@pytest.mark.parametrize("works", [True, False])
def test_expandable_segments_are_tried_in_a_child_before_they_are_set(monkeypatch, works):
    for name in plan.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    tried = []

    def run(command, **_):
        tried.append(os.environ["PYTORCH_ALLOC_CONF"])
        return mock.Mock(returncode=0 if works else 1)

    monkeypatch.setattr(plan.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan.expand_segments()
    assert tried == ["expandable_segments:True"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == f"expandable_segments:{works}"
    plan.expand_segments()  # set by now: the user's, or a parent's
    assert len(tried) == 1


@pytest.mark.parametrize("host_gradients", [False, True])
def test_host_memory_is_free_before_the_export(
    ckpt, tmp_path, small_memory, monkeypatch, host_gradients
):
    maps, alive, save = [], [], run.save_checkpoint

    class Map(memory.mmap.mmap):
        def __init__(self, file, *_, **__):
            if file == -1:  # memory, not a file of tokens
                maps.append(weakref.ref(self))

    def save_then(*args, **kwargs):
        gc.collect()
        alive.extend(len(m()) for m in maps if m() is not None)
        return save(*args, **kwargs)

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    monkeypatch.setattr(run, "save_checkpoint", save_then)
    small_memory["host_gradients"] = host_gradients
    train(tiny_run(ckpt, tmp_path / "run", steps=1, eval_tokens=0))
    # The state, the gradients, the blocks' inputs are gone; the teacher's came home: a CPU's.
    assert len(maps) == 3 + host_gradients and len(alive) == 1
    weights = sum(p.numel() for p in load_checkpoint(ckpt[0]).parameters())
    assert 2 * weights <= alive[0] < 2.2 * weights


# -------------------------------------------------------------------------------------------- races


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
                    span = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
                    weakref.finalize(storage, self.free, *span, self.now)
                writes = new or id(t) in written
                if function is not torch.ops.aten.detach.default and not function.is_view:
                    span = t.data_ptr(), t.data_ptr() + t.nbytes
                    self.access(*span, writes, self.now, str(function))
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


@pytest.mark.parametrize("sizes", [(70, 5, 31), (7,)])  # (7,): the next pass's is the next piece
def test_gradients_on_their_way_to_the_host_have_no_race(races, monkeypatch, sizes):
    monkeypatch.setattr(memory, "IN_FLIGHT", 100)
    weights = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in sizes]
    settings = dict(host=True, chunk=10, host_gradients=True)
    optimizer = memory.AdamW(weights, 0.1, (0.9, 0.95), 1e-8, 0.0, **settings)
    with races:
        for _ in range(2):
            for _ in range(3):
                sum(w.sum() * w.sum() for w in weights).backward()
            torch.nn.utils.clip_grad_norm_(optimizer.with_gradients(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert races.accesses and not races.races


def test_offloaded_inputs_have_no_race(races):
    ids = torch.randint(96, (1, 8), generator=torch.Generator().manual_seed(1))
    model = tiny()
    policy = Policy(keep_all=1, offload=True)
    memory.apply_policy(model, policy, memory.Offload(5, 8 * 48 * 4, torch.device("cpu")))
    with races:
        for _ in range(2):
            model(ids)[0].sum().backward()
    assert races.accesses and not races.races
