"""Benchmarks against peers and against the machine's own limits, all in one run.

    python -m measure.bench rope          one GPU: the rotary kernel against its peers and a copy
    python -m measure.bench step          one GPU: a LongReD step of Llama-3-8B, part by part
    python -m measure.bench memory        one GPU: planned against measured peaks, PCIe
    python -m measure.bench kernels       one GPU: attention backends, weight sums, fusions
    python -m measure.bench loss          any machine: KL of the next token against cross-entropy
    python -m measure.bench prove         one GPU: all targets, 8 minutes, one JSON and a table
    python -m measure.bench data          any machine: tokenising against the library alone
    python -m measure.bench rope --device cpu    a smoke test; its numbers mean nothing

Every run prints a table and writes it to results/ as JSON, with device, versions, date and command.
From any other folder the command is python PATH/measure/bench.py.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tiktoken
import tokenizers
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from longred import cosine_distance
from machine import corpus, memory
from machine import plan as planner
from machine.command_line import integer
from machine.formats import config_to_hf
from machine.states import refuse_foreign, whole_file
from machine.tokenizer import LLAMA3_PATTERN, read_ranks
from model import LOSS_ROWS, Attention, Llama, ModelConfig, next_token_kl, next_token_loss
from rope_kernels import apply_rope, rope_backend, rope_frequencies

# ------------------------------------------------ Timing and bookkeeping, shared by the subcommands


def microseconds(run, sets, device) -> float:
    """Time of one run(*arguments), mean over one pass through sets, in microseconds.

    Sets are visited in turn, so that no cache holds the input of the next call. On a GPU this is
    the device's own time: it is put to sleep first, and finds all calls queued when it wakes.
    """
    if device.type == "cpu":
        return host_microseconds(run, sets, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # clock cycles, 10 ms: more than the host needs for all sets
    begin.record()
    for arguments in sets:
        run(*arguments)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / len(sets) * 1e3


def host_microseconds(run, sets, device) -> float:
    """Host time of one run(*arguments), mean over sets, whatever the device has yet to do."""
    torch.get_device_module(device).synchronize()
    start = time.perf_counter()
    for arguments in sets:
        run(*arguments)
    elapsed = time.perf_counter() - start
    torch.get_device_module(device).synchronize()
    return elapsed / len(sets) * 1e6


def describe(device) -> dict:
    """Where and with what a result was measured."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = {name: installed.get(name, "none") for name in ("torch", "triton", "liger-kernel")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "smoke_test": device.type == "cpu",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", "measure.bench", *sys.argv[1:]]),
        "versions": versions | {"python": platform.python_version(), "cuda": torch.version.cuda},
    }


def result_name(args) -> str:
    """What a subcommand's JSON is called: by what was asked where that may differ."""
    if args.name == "step" and args.gpu_gib:
        return f"step-{args.gpu_gib:g}gib"
    return "-".join(["memory", *map(str, args.lengths)]) if args.name == "memory" else args.name


def result_path(out_dir, name, smoke_test) -> Path:
    return Path(out_dir) / f"{name}{'-cpu-smoke' if smoke_test else ''}.json"


def write_result(result, out_dir, name, quiet=False):
    """Write the JSON whole, over what an earlier row left: a kill costs one row, not all."""
    path = result_path(out_dir, name, result["smoke_test"])
    with whole_file(path) as f:
        f.write(json.dumps(result, indent=1) + "\n")
    if quiet:
        return
    if result["smoke_test"]:
        print("On a CPU: this shows that the file runs, and what is planned. Not a measurement.")
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------- rope

# Llama-3-8B. Bytes that must move: q and k, read once and written once.
N_HEADS, N_KV_HEADS, HEAD_DIM, THETA = 32, 8, 128, 500_000.0
COPY, OURS = "copy of the same bytes", "longred"


def bench_rope(args):
    """Time and error of rotating q and k, forward and backward."""
    device = torch.device(args.device)
    lengths = args.lengths or ([64, 256] if device.type == "cpu" else [8192, 32768, 131072])
    result = describe(device) | {"backend": rope_backend(device), "rows": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}, path {result['backend']}")
    for n_tokens in lengths:
        try:
            rows = rope_at(n_tokens, args.rounds, device)
        except torch.OutOfMemoryError as e:
            rows = [{"T": n_tokens, "out of memory": str(e).splitlines()[0]}]
        result["rows"] += rows
        print_rope(rows, n_tokens)
        write_result(result, args.out_dir, "rope", quiet=True)
        reset_peak(device)
    result["host_us"] = rope_host(device)
    print("host time of a call, us:", {k: round(us, 1) for k, us in result["host_us"].items()})
    write_result(result, args.out_dir, "rope")


def rope_at(n_tokens, rounds, device):
    """One row for each peer and direction at one length."""
    generator = torch.Generator(device).manual_seed(0)

    def random(n_heads):
        shape = (1, n_tokens, n_heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    # (q, k, gradient of q, gradient of k): sets of at least 168 MB, each more than a cache holds;
    # two of 5.4 GB are enough at 128K, where four and every peer's graphs held 86 GB.
    n_sets = 4 if n_tokens < 131072 else 2
    sets = [[random(n) for n in (N_HEADS, N_KV_HEADS) * 2] for _ in range(n_sets)]
    flat = [(torch.cat([x.flatten() for x in one[:2]]),) for one in sets]
    target = torch.empty_like(flat[0][0])
    n_bytes = 2 * target.numel() * target.element_size()

    jobs, errors = {(COPY, "both"): (target.copy_, flat)}, {(COPY, "both"): 0.0}
    for name, rotate in rope_peers(n_tokens, device).items():
        forward, backward = [], []
        for *qk, grad_q, grad_k in sets:
            leaves = [x.clone().requires_grad_() for x in qk]  # Liger rotates what it is given
            forward.append(leaves)
            out = rotate(*leaves)
            backward.append((out, leaves, (grad_q.clone(), grad_k.clone())))
        errors[name, "forward"], errors[name, "backward"] = rope_errors(rotate, sets[0])
        jobs[name, "forward"] = rotate, forward
        jobs[name, "backward"] = functools.partial(torch.autograd.grad, retain_graph=True), backward

    times = {key: [] for key in jobs}
    for round_ in range(rounds + 2):  # peers take turns, so that a change of clocks meets all
        for key, (run, arguments) in jobs.items():
            us = microseconds(run, arguments, device)
            if round_ >= 2:  # two rounds of warming up
                times[key].append(us)
    medians = {key: statistics.median(us) for key, us in times.items()}
    return [
        {
            "peer": name,
            "direction": direction,
            "T": n_tokens,
            "us": us,
            "us_all": times[name, direction],
            "GB_per_s": n_bytes / us / 1e3,
            "percent_of_copy": 100 * medians[COPY, "both"] / us,
            "max_error": errors[name, direction],
        }
        for (name, direction), us in medians.items()
    ]


def rope_peers(n_tokens, device):
    """name -> function from q, k in (B, T, heads, H) to both rotated, in the same layout.

    Peers take tables of cos and sin, made once a step and shared by the layers, so they are not
    timed for making them; longred makes its angles inside, and is.
    """
    inv_freq, _ = rope_frequencies(HEAD_DIM, THETA)
    ids, inv_freq = torch.arange(n_tokens, device=device)[None], inv_freq.to(device)
    angle = (ids[..., None].float() * inv_freq.float()).repeat(1, 1, 2)  # (B, T, H), as peers do
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def heads_first(function):  # peers want (B, heads, T, H); both transposes are views
        def rotate(q, k):
            q, k = function(q.transpose(1, 2), k.transpose(1, 2))
            return q.transpose(1, 2), k.transpose(1, 2)

        return rotate

    def eager(q, k):
        def turned(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

        return turned(q), turned(k)

    peers = {OURS: lambda q, k: apply_rope(q, k, ids, inv_freq), "eager": heads_first(eager)}
    if device.type == "cpu":
        print("torch.compile (half a minute of C++ compiler) and Liger-Kernel: left out on a CPU")
        return peers
    torch.compiler.reset()  # each length is compiled for itself
    peers["torch.compile"] = heads_first(torch.compile(eager, dynamic=False))
    try:
        # Liger's autograd rotates q, k and their gradients in place, where it can.
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        print("Liger-Kernel: left out, not installed (pip install liger-kernel)")
    else:
        peers["Liger"] = heads_first(lambda q, k: liger_rotary_pos_emb(q, k, cos, sin))
    return peers


def rope_errors(rotate, one_set):
    """Largest distance from float64, forward and backward, over the last 1024 positions."""
    q, k, grad_q, grad_k = one_set
    inputs = [x.clone().requires_grad_() for x in (q, k)]
    given = [x.clone() for x in inputs]
    out = rotate(*given)
    grads = torch.autograd.grad(out, inputs, (grad_q.clone(), grad_k.clone()))
    forward = max(_distance(*pair, 1) for pair in zip(out, (q, k), strict=True))
    return forward, max(_distance(*pair, -1) for pair in zip(grads, (grad_q, grad_k), strict=True))


def _distance(out, x, sign):
    n_tokens, last = x.shape[1], slice(-1024, None)
    first, second = x[:, last].double().chunk(2, dim=-1)
    inv_freq = rope_frequencies(HEAD_DIM, THETA)[0].to(x.device)
    positions = torch.arange(n_tokens, device=x.device)[last, None, None].double()
    turn = torch.polar(torch.ones_like(positions * inv_freq), sign * positions * inv_freq)
    exact = torch.complex(first, second) * turn
    exact = torch.cat((exact.real, exact.imag), dim=-1)
    return (out[:, last].double() - exact).abs().max().item()


def rope_host(device):
    """Host time of a call of each peer at T = 1, without and with autograd's bookkeeping."""
    shapes = (1, 1, N_HEADS, HEAD_DIM), (1, 1, N_KV_HEADS, HEAD_DIM)
    plain = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    tracked = [x.clone().requires_grad_() for x in plain]
    host = {}
    for name, rotate in rope_peers(1, device).items():
        for arguments, mode in ((plain, ""), (tracked, ", autograd")):
            host_microseconds(rotate, [arguments] * 20, device)  # warms up
            host[name + mode] = host_microseconds(rotate, [arguments] * 200, device)
    return host


def print_rope(rows, n_tokens):
    print(f"\nT = {n_tokens}, B = 1, {N_HEADS}/{N_KV_HEADS} heads of {HEAD_DIM}, bf16, medians")
    print(f"{'':24}{'':10}{'us':>10}{'GB/s':>8}{'% of copy':>11}{'max error':>11}")
    for row in rows:
        if "out of memory" in row:
            print(f"out of memory: {row['out of memory']}")
            continue
        print(
            f"{row['peer']:24}{row['direction']:10}{row['us']:10.1f}{row['GB_per_s']:8.0f}"
            f"{row['percent_of_copy']:11.1f}{row['max_error']:11.1e}"
        )


# ---------------------------------------------------------------------------------- step and memory

GIB = planner.GIB
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # --moments
PEAK = 989e12  # dense bf16 FLOP/s of one H100 or H200, the denominator of MFU
LLAMA3_8B = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336)
LLAMA3_8B = ModelConfig(**LLAMA3_8B, vocab_size=128256, rope_theta=2e7)
# One optimizer step of the paper, 8 long, 6 short and 2 short-to-long micro-batches of 131,072
# tokens, in passes of 32,768.
UNITS = [
    planner.Unit("long", 1, 32768, count=32),
    planner.Unit("short", 32, 1024, count=24, hidden_states=6),
    planner.Unit("s2l", 4, 8192, count=8, hidden_states=1),
]
# Sizes of the CPU smoke test: they show that everything runs, and nothing else.
TINY = dict(d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=512)
TINY = replace(LLAMA3_8B, **TINY)
TINY_UNITS = [
    replace(
        u, batch=min(u.batch, 4), seq_len=u.seq_len // 128, hidden_states=min(u.hidden_states, 3)
    )
    for u in UNITS
]


class Trainer:
    """A student and its teacher under a plan, with random weights made on the device."""

    def __init__(self, config, plan, device):
        self.student, self.teacher = (random_llama(config, device, seed) for seed in (0, 1))
        self.teacher.requires_grad_(False)
        adamw = dict(lr=2e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.machine = memory.OneGPU(plan, self.student, self.teacher, **adamw)
        tokens = dict(generator=torch.Generator(device).manual_seed(2), device=device)
        self.draw = functools.partial(torch.randint, config.vocab_size, **tokens)

    def unit(self, unit):
        """Forward and backward of one unit, over random tokens."""
        ids = self.draw((unit.batch, unit.seq_len + 1))
        loss(self.student, self.teacher, ids, unit).backward()

    def visit(self):
        """The teacher leaves, where the plan lets it, and comes back."""
        self.machine.ready("long")
        self.machine.ready("short")


def loss(student, teacher, ids, unit):
    """What longred.train computes for one unit; a tapped one compares the last hidden states."""
    if (
        not unit.hidden_states and unit.heads == 1
    ):  # longred.cross_entropy, in a GPU's chunks on a CPU too
        hidden, _ = student(ids[:, :-1])
        nll, n = next_token_loss(hidden, student.lm_head_weight, ids[:, 1:], LOSS_ROWS)
        return nll / n
    n = student.config.n_layers
    layers = list(range(n - unit.hidden_states + 1, n + 1))
    with torch.no_grad():  # longred.distillation_and_kl, likewise
        last, target = teacher(ids[:, :-1], None, layers)
    own, hidden = student(ids[:, :-1], None, layers)
    distance = sum(cosine_distance(hidden[i], target[i]) for i in layers)
    if unit.heads == 0:  # longred.short_text_distillation
        return distance
    heads = student.lm_head_weight, teacher.lm_head_weight
    kl, count = next_token_kl(own, heads[0], last, heads[1], LOSS_ROWS // 2)
    return distance + kl / count


def random_llama(config, device, seed):
    """bf16, made on the device; never zeros, on which matmuls run a tenth faster."""
    with torch.device("meta"):
        model = Llama(config)
    model.to(torch.bfloat16).to_empty(device=device)
    return model.init_weights(generator=torch.Generator(device).manual_seed(seed))


def timed(run, rounds, device):
    """Seconds of run(): the median of `rounds` after the first, and the first."""
    synchronize = torch.get_device_module(device).synchronize
    times = []
    for _ in range(rounds + 1):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times), times[0]


def rooms(args, device):
    """(GPU, host) bytes to plan for: --gpu_gib and --host_gib, or what is free."""
    gpu, host = (int((gib or 0) * GIB) for gib in (args.gpu_gib, args.host_gib))
    if device.type == "cpu":
        return gpu or 139 * GIB, host or 120 * GIB
    if gpu:  # a smaller GPU is a real limit, not a promise
        total = torch.cuda.get_device_properties(device).total_memory
        # It takes a number only: torch.device("cuda") has none and is refused.
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu / total), index)
    return gpu or planner.gpu_room(), host or planner.available_memory()


def speed(config, unit, seconds):
    """A unit's seconds in the terms of the table."""
    work = planner.model_flops(config, unit)
    return {
        "seconds": seconds,
        "tokens_per_s": unit.tokens / seconds,
        "model_tflops": work / seconds / 1e12,
        "mfu_percent": 100 * work / seconds / PEAK,
    }


def reset_peak(device):
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device):
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated_bytes(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reserved_row(device):
    """Most GiB that the allocator reserved since reset_peak, and allocations tried again."""
    if device.type != "cuda":
        return {"reserved_gib": 0.0, "alloc_retries": 0}
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return {"reserved_gib": torch.cuda.max_memory_reserved(device) / GIB, "alloc_retries": retries}


def bench_step(args):
    """Seconds, MFU, percent of the roofline and peak memory of a LongReD step, unit by unit."""
    device = torch.device(args.device)
    tiny = device.type == "cpu"
    config, units = (TINY, TINY_UNITS) if tiny else (LLAMA3_8B, UNITS)
    result = describe(device)
    print(f"{result['device']}, {result['date']}, {result['versions']}")
    gpu, host = rooms(args, device)
    expand = tiny or planner.segments_expand()
    moments = MOMENTS[args.moments]
    how = args.compile, expand, result["device"]
    plan = planner.make_plan(config, units, gpu, host, moments, *how)
    if tiny:
        use_everything(plan, args.compile)
    print(plan.table(), flush=True)
    name = result_name(args)
    save = functools.partial(write_result, result, args.out_dir, name, quiet=True)
    our_step(config, plan, args.rounds, device, result, save)
    ours = result["units"]["long"].get("seconds", math.nan)
    result["peers"] = {}
    memory.free_host_buffers()
    for peer in ("transformers", "liger") if args.peers else ():
        reset_peak(device)
        theirs = result["peers"][peer] = peer_step(peer, config, units[0], args.rounds, device)
        save()
        print(f"{peer}: {theirs}", flush=True)
        if "seconds" in theirs and not tiny:
            print(f"  ours is {theirs['seconds'] / ours:.2f}x as fast")
    write_result(result, args.out_dir, name)


def use_everything(plan, compile_=False):
    """A smoke test's plan, which has room for all, made to use every mechanism there is."""
    torch.set_num_threads(1)
    hard = planner.Policy(1, 2, offload=True, mlp_rows=100, compile=compile_)
    longest = max(u.tokens for u in plan.units.values())
    plan.host_state, plan.teacher_resident = True, False
    plan.slot_bytes = 2 * longest * TINY.d_model
    plan.policies = dict.fromkeys(plan.units, hard)


def our_step(config, plan, rounds, device, result, save):
    """Time every unit of the plan and the optimizer; add them up to one step.

    Rows go into result, and save() is called after each; out of memory is a row too.
    """
    began = time.perf_counter()
    units = list(plan.units.values())
    trainer = Trainer(config, plan, device)
    print(f"weights, optimizer and locked host memory: {time.perf_counter() - began:.1f} s")
    row = "{:8}" + "{:>11}" * 8
    heads = "seconds,tok/s,TFLOP/s,MFU %,roofline %,peak GiB,planned,first s"
    print(row.format("", *heads.split(",")), flush=True)
    parts = {}
    result["units"] = {}
    for unit in units:
        trainer.machine.ready(unit.name)
        reset_peak(device)
        held = allocated_bytes(device)
        run = functools.partial(trainer.unit, unit)
        try:
            seconds, first = timed(run, rounds, device)
        except torch.OutOfMemoryError as e:
            result["units"][unit.name] = {"out of memory": str(e).splitlines()[0]}
            print(unit.name, result["units"][unit.name], flush=True)
            save()
            continue
        policy = plan.policies[unit.name]
        numbers = speed(config, unit, seconds) | {
            "roofline_percent": 100 * planner.unit_seconds(config, unit, policy) / seconds,
            "peak_gib": peak_bytes(device) / GIB,
            "planned_gib": sum(plan.gpu[unit.name].values()) / GIB,
            "first_s": first,
        }
        shares = kernel_shares(run) if device.type == "cuda" else {}
        settings = {"unit": asdict(unit), "policy": asdict(policy)}
        numbers |= reserved_row(device) | {"reserved_planned_gib": plan.reserved(unit.name) / GIB}
        numbers["activations_gib"] = (peak_bytes(device) - held) / GIB
        result["units"][unit.name] = numbers | settings | {"gpu_time_percent": shares}
        save()
        parts[unit.name] = unit.count * seconds
        print(row.format(unit.name, *(f"{x:.4g}" for x in numbers.values())), shares, flush=True)
    reset_peak(device)
    parts["optimizer"], _ = timed(trainer.machine.optimizer.step, rounds, device)
    parts["teacher"], _ = timed(trainer.visit, rounds, device)
    total, tokens = sum(parts.values()), sum(u.count * u.tokens for u in units)
    work = sum(u.count * planner.model_flops(config, u) for u in units)
    result["step"] = {
        "seconds": total,
        "parts": parts,
        "tokens_per_s": tokens / total,
        "mfu_percent": 100 * work / total / PEAK,
        "state_bytes": sum(map(len, trainer.machine.optimizer.state)),
    }
    shown = ", ".join(f"{k} {v:.1f} s ({100 * v / total:.0f}%)" for k, v in parts.items())
    result["step"]["whole"] = len(parts) == len(units) + 2  # else a unit was out of memory
    save()
    print(f"one optimizer step, {tokens:,} tokens: {total:.1f} s, from {shown}", flush=True)


def kernel_shares(run):
    """Percent of the GPU's time by kind of kernel, over one run()."""
    kinds = {
        "attention": r"sdpa|fmha|flash|attention",
        "matmul": r"gemm|nvjet|cutlass|xmma|matmul",
        "rotary": r"rope",
        "norm": r"norm",
        "copies": r"memcpy|memset",
        "elementwise and rest": r"",
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times = dict.fromkeys(kinds, 0.0)
    for event in profile.key_averages():
        kind = next(k for k, pattern in kinds.items() if re.search(pattern, event.key.lower()))
        times[kind] += event.self_device_time_total
    total = sum(times.values()) or 1.0
    return {kind: round(100 * t / total, 1) for kind, t in times.items()}


def peer_step(name, config, unit, rounds, device):
    """transformers' Llama in bf16 with gradient checkpointing, plain or under Liger-Kernel."""
    try:
        import transformers

        if name == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
    except ImportError as e:
        return {"left out": f"{e.name} is not installed"}
    hf = transformers.LlamaConfig(**config_to_hf(config), use_cache=False, attention_dropout=0.0)
    with torch.device(device):
        peer = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16).train()
    peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(config.vocab_size, (unit.batch, unit.seq_len), device=device)
    static = 4 * sum(p.numel() for p in peer.parameters()) / GIB
    reset_peak(device)
    try:
        seconds, _ = timed(lambda: peer(input_ids=ids, labels=ids).loss.backward(), rounds, device)
    except torch.OutOfMemoryError:
        return {"out of memory": f"at {unit.batch} x {unit.seq_len}"}
    return speed(config, unit, seconds) | {
        "peak_gib": peak_bytes(device) / GIB,
        "static_gib": static,  # weights and gradients, in bf16
        "activations_gib": max(0.0, peak_bytes(device) / GIB - static),
        "version": transformers.__version__,
    }


def bench_memory(args):
    """Planned against measured peak of one long unit at each length; on a CPU against a trace."""
    device = torch.device(args.device)
    result = describe(device) | {"rows": []}
    name = result_name(args)
    gpu, host = rooms(args, device)
    print(f"{result['device']}: plans for {gpu / GIB:.1f} GiB of GPU, {host / GIB:.1f} of host")
    if device.type == "cuda":
        result["pcie"] = pcie_rates(device)
    for length in args.lengths:
        unit = replace(UNITS[0], seq_len=length, count=2**20 // length)
        units = [unit, *UNITS[1:]]
        try:
            moments, expand = (
                MOMENTS[args.moments],
                device.type == "cpu" or planner.segments_expand(),
            )
            plan = planner.make_plan(LLAMA3_8B, units, gpu, host, moments, expandable=expand)
        except ValueError as e:
            print(f"{length}: {e}", flush=True)
            continue
        print(plan.table(), flush=True)
        row = {"length": length, "planned_gib": sum(plan.gpu["long"].values()) / GIB}
        if device.type == "cuda":
            unit = plan.units["long"]
            trainer = Trainer(LLAMA3_8B, plan, device)
            trainer.machine.ready("long")
            reset_peak(device)
            try:
                seconds, _ = timed(functools.partial(trainer.unit, unit), args.rounds, device)
                row |= {"peak_gib": peak_bytes(device) / GIB} | speed(LLAMA3_8B, unit, seconds)
                row |= reserved_row(device)
            except torch.OutOfMemoryError as e:
                row["out of memory"] = str(e).splitlines()[0]
            del trainer
            memory.free_host_buffers()
        else:
            work = traced_peak(LLAMA3_8B, unit, plan.policies["long"])
            fixed = ("weights, bf16", "gradients, fp32", "AdamW's state", "teacher, bf16")
            static = sum(plan.gpu["long"][term] for term in fixed)
            row["traced_gib"] = (work + static) / GIB
        result["rows"].append(row)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write_result(result, args.out_dir, name, quiet=True)
    write_result(result, args.out_dir, name)


def bench_loss(args):
    """Time and peak above its inputs of KL(teacher || student), against the cross-entropy's."""
    device = torch.device(args.device)
    result = describe(device)
    loss_rows(device, args.rounds, result)
    write_result(result, args.out_dir, "loss")


def loss_rows(device, rounds, result):
    """Into result: both losses' seconds and peaks, and their ratios.

    On a GPU Llama-3-8B's head over a pass of 8,192 tokens, bf16; on a CPU a small head in fp32 for
    the time. The peak is counted on fake tensors at Llama-3-8B's size, in a GPU's chunks; on a GPU
    the allocator's own stands beside it.
    """
    small = device.type == "cpu"
    tokens, v, d = (512, 4096, 256) if small else (8192, LLAMA3_8B.vocab_size, LLAMA3_8B.d_model)
    dtype = torch.float32 if small else torch.bfloat16
    calls, inputs = loss_calls(tokens, v, d, dtype, device)
    result |= {"shape": [tokens, v, d], "rows": {}}
    for name, run in calls.items():
        reset_peak(device)
        held = 0 if small else sum(t.nbytes for t in inputs)
        row = {"seconds": timed(run, rounds, device)[0]}
        if not small:
            row["peak_gib"] = peak_bytes(device) / GIB - held / GIB
        row["counted_gib"] = counted_peak(name) / GIB
        result["rows"][name] = row
        print(name, {k: round(x, 4) for k, x in row.items()}, flush=True)
    kl, nll = result["rows"]["next_token_kl"], result["rows"]["next_token_loss"]
    result["ratios"] = {key: kl[key] / nll[key] for key in nll}
    print("KL / cross-entropy:", {k: round(x, 3) for k, x in result["ratios"].items()})


def loss_calls(tokens, v, d, dtype, device):
    """Both losses with backward, over the same student: {name: a call}, and their inputs."""
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    hidden, head = make(1, tokens, d).requires_grad_(), make(v, d).requires_grad_()
    teacher, its_head = make(1, tokens, d), make(v, d)
    labels = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    rows = LOSS_ROWS if tokens >= LOSS_ROWS else 256

    def backward(loss):
        loss.backward()
        hidden.grad = head.grad = None

    return {
        "next_token_loss": lambda: backward(next_token_loss(hidden, head, labels, rows)[0]),
        "next_token_kl": lambda: backward(
            next_token_kl(hidden, head, teacher, its_head, rows // 2)[0]
        ),
    }, (hidden, head, teacher, its_head, labels)


def counted_peak(name, tokens=8192):
    """Bytes above its inputs at the worst moment, at Llama-3-8B's size, on fake tensors."""
    v, d = LLAMA3_8B.vocab_size, LLAMA3_8B.d_model
    with FakeTensorMode():
        calls, inputs = loss_calls(tokens, v, d, torch.bfloat16, torch.device("cpu"))
        with CountBytes(inputs, {torch.Size((v, d))}) as count:
            calls[name]()
    return count.peak


def pcie_rates(device, nbytes=2**30):
    """GB/s between locked host memory and the GPU: up, down, and each way with both at once."""
    host = memory.host_buffer(2 * nbytes, pin=device.type == "cuda").view(2, nbytes)
    gpu = torch.empty(2, nbytes, dtype=torch.uint8, device=device)
    api = torch.get_device_module(device)
    streams = api.Stream(), api.Stream()

    def up():
        with api.stream(streams[0]):
            gpu[0].copy_(host[0], non_blocking=True)

    def down():
        with api.stream(streams[1]):
            host[1].copy_(gpu[1], non_blocking=True)

    def both():
        up()
        down()

    rates = {f.__name__: nbytes / timed(f, 5, device)[0] / 1e9 for f in (up, down, both)}
    print("PCIe, GB/s:", {k: round(v, 1) for k, v in rates.items()}, flush=True)
    return rates


class CountBytes(TorchDispatchMode):
    """Follows the bytes of all living tensors made inside; kernels' own scratch is not seen.

    known: tensors that do not count. fp32_sums: shapes of the weights whose gradients a GPU writes
    in fp32 at once (model.fp32_product); the bf16 product that a CPU makes first does not count.
    """

    def __init__(self, known, fp32_sums):
        super().__init__()
        self.now = self.peak = 0
        self.living = {t.untyped_storage()._cdata for t in known}
        self.fp32_sums = fp32_sums

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        over_tokens = function is torch.ops.aten.mm.default and args[0].stride(0) == 1  # a.T @ b
        if over_tokens and out.shape in self.fp32_sums:
            return out
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.living:
                storage = t.untyped_storage()
                self.living.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key, nbytes):
        self.living.discard(key)
        self.now -= nbytes


class TracedNorm(nn.RMSNorm):
    def forward(self, x):  # one kernel on a GPU, which saves its input
        return x * self.weight


class TracedAttention(Attention):
    def qkv(self, x, rope):  # the rotary kernel makes q and k anew and saves neither
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q * 1.0, k * 1.0, v


TRACED = {nn.RMSNorm: TracedNorm, Attention: TracedAttention}


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

    def teacher(_ids, _positions, layers, **_):
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
        ids = torch.zeros(unit.batch, unit.seq_len + 1, dtype=torch.int64)
        weights, mlp = list(student.parameters()), student.layers[0].mlp
        fp32_sums = {w.shape for w in (*mlp.parameters(), student.lm_head_weight)}
        with CountBytes([offload.host, *weights, *(w.grad for w in weights)], fp32_sums) as count:
            loss(student, teacher, ids, unit).backward()
    return count.peak


# --------------------------------------------------------------------------------------------- data


def tokenise(mode: str, folder: Path, cache: str, specs: list[str]) -> dict:
    """Seconds, processor seconds, tokens and peak memory of data.tokenize or of a library's call.

    mode: "ours", or one of library_calls. To be run alone in a process, whose peak memory it takes.
    """
    tokenizer = data.load_tokenizer(folder)
    tokenizer.encode(["warm up"] * 8)
    n_tokens, wall, cpu = 0, 0.0, 0.0

    def measured(work, *args, **kwargs):
        nonlocal wall, cpu
        before = time.perf_counter(), time.process_time()
        result = work(*args, **kwargs)
        wall, cpu = wall + time.perf_counter() - before[0], cpu + time.process_time() - before[1]
        return result

    if mode == "ours":
        text = measured(data.tokenize, specs, tokenizer, cache, "ours", log=lambda line: None)
        n_tokens = len(text.tokens) - text.n_docs * (tokenizer.add_bos + tokenizer.add_eos)
    else:
        library = library_calls(folder)[mode]
        texts = library_texts(specs)
        while some := list(itertools.islice(texts, 1000)):
            n_tokens += sum(map(len, measured(library, some)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "cpu": cpu, "tokens": n_tokens, "peak_mb": peak}


def library_calls(folder: Path) -> dict:
    """name -> the batch call of the library behind a folder's tokenizer, special tokens aside."""
    if (folder / "tokenizer.json").exists():
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        raw.encode_special_tokens = True
        calls = {"encode_batch": raw.encode_batch, "encode_batch_fast": raw.encode_batch_fast}
        return {k: functools.partial(f, add_special_tokens=False) for k, f in calls.items()}
    ranks = read_ranks(folder / "tokenizer.model")
    coder = tiktoken.Encoding("", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encode = coder.encode_ordinary_batch
    return {"encode_ordinary_batch": functools.partial(encode, num_threads=os.cpu_count())}


def library_texts(specs: list[str]):
    """Every document whole."""
    for file in corpus.find_files(specs, {}):
        with corpus._open(file) as (stream, _):
            yield from map("".join, corpus._documents(file, stream, False))


def bench_data(args):
    """MB/s of data.tokenize and of the tokenizer library over the same text.

    args.rounds: runs of each, in turn, the best of each counted. The library gets whole documents,
    1,000 at once, read before; ours reads, checks, cuts, tokenises and writes. Processor time is
    given too: on a busy machine it is the fairer comparison.
    """
    stdlib = sysconfig.get_paths()["stdlib"]
    specs = args.data or [f"{stdlib}/*.py", f"{stdlib}/[a-r]*/**/*.py"]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(args.ckpt) if args.ckpt else _train_bpe(Path(folder), specs)
        results = {mode: [] for mode in (*library_calls(tokenizer), "ours")}
        for turn in range(args.rounds):
            for mode, found in results.items():
                with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                    cache = f"{folder}/{turn}"
                    found.append(alone.submit(tokenise, mode, tokenizer, cache, specs).result())
    size = sum(os.path.getsize(file.path) for file in corpus.find_files(specs, {})) / 1e6
    tokens = {r["tokens"] for rs in results.values() for r in rs}
    print(f"{size:,.1f} MB, {sorted(tokens)} tokens, {os.cpu_count()} cores, {args.rounds} rounds")
    print(f"{'':21} {'MB/s':>7} {'MB/cpu-s':>9} {'peak MB':>8}")
    table = {}
    for mode, found in results.items():
        wall, cpu = (size / min(r[k] for r in found) for k in ("wall", "cpu"))
        table[mode] = {"mb_s": wall, "mb_cpu_s": cpu, "peak_mb": max(r["peak_mb"] for r in found)}
        print(f"{mode:21} {wall:7.2f} {cpu:9.2f} {table[mode]['peak_mb']:8.0f}")
    for key, unit in (("mb_s", "wall clock"), ("mb_cpu_s", "processor time")):
        best = max(row[key] for mode, row in table.items() if mode != "ours")
        print(f"ours / the library's best, by {unit}: {table['ours'][key] / best:.0%} (need 90%)")
    # Tokenising is the processor's work wherever it runs: a result, not a smoke test.
    result = describe(torch.device("cpu")) | {"smoke_test": False, "cores": os.cpu_count()}
    write_result(result | {"MB": size, "rounds": args.rounds, "rows": table}, args.out_dir, "data")


def _train_bpe(folder: Path, specs: list[str]) -> Path:
    """A byte-level BPE of 32,000 tokens, trained on at most 10 MB of the specs' files."""
    tk = tokenizers.Tokenizer(tokenizers.models.BPE())
    tk.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    quiet = dict(initial_alphabet=alphabet, show_progress=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=32_000, **quiet)
    files, size = [], 0
    for file in corpus.find_files(specs, {}):
        if (size := size + os.path.getsize(file.path)) < 10_000_000:
            files.append(file.path)
    tk.train(files, trainer)
    tk.save(str(folder / "tokenizer.json"))
    return folder


# -------------------------------------------------------------------------------------- the command


def integers(text):
    return [integer(word) for word in text.split(",")]


def main(argv=None):
    planner.expand_segments()  # before anything asks for the GPU
    parser = argparse.ArgumentParser("python -m measure.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)

    def command(name, run, rounds, text):
        """Add a subcommand with the flags that all have; returns its add_argument."""
        new = commands.add_parser(name, help=text)
        new.set_defaults(run=run, name=name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        add = new.add_argument
        add("--device", default=device, help=f"cuda or cpu (default: {device})")
        add("--out_dir", default="results", help="for the JSON (default: results)")
        add("--rounds", type=int, default=rounds, help=f"runs of each (default: {rounds})")
        return add

    add = command("rope", bench_rope, 25, "rotary kernel against peers and a copy; medians")
    lengths = "tokens, comma-separated (default: 8192,32768,131072; on a CPU 64,256)"
    add("--lengths", type=integers, help=lengths)
    step = command("step", bench_step, 2, "one LongReD step of Llama-3-8B, by its units, and peers")
    step("--compile", action="store_true", help="torch.compile the blocks")
    step("--peers", action=argparse.BooleanOptionalAction, default=True)
    peak = command("memory", bench_memory, 2, "planned and measured (CPU: traced) peak of a pass")
    peak("--lengths", type=integers, default=[32768, 131072], help="tokens, comma-separated")
    for add in (step, peak):
        add("--gpu_gib", type=float, help="use no more than this (default: all)")
        add("--host_gib", type=float, help="plan for this (default: all free)")
        add("--moments", default="fp32", choices=MOMENTS, help="of AdamW's m and v")
    command("loss", bench_loss, 5, "KL of the next token against the cross-entropy; medians")
    from measure.kernels import bench_kernels  # which import this file
    from measure.prove import prove

    command("kernels", bench_kernels, 9, "attention backends, weight sums, fusions; medians")

    add = command("prove", prove, 1, "all that is claimed of a GPU, 8 minutes, against the targets")
    add("--more", action="store_true", help="also peers, 128K and 256K")
    add("--ckpt", help="a small checkpoint to train (default: the demo's, else one trained first)")
    add = command("data", bench_data, 3, "tokenising against the tokenizer library alone; best")
    add("--data", nargs="*", help="text (default: the standard library's sources)")
    add("--ckpt", help="folder with a tokenizer (default: a BPE trained on that text)")
    args = parser.parse_args(argv)
    try:
        for smoke_test in (False, True):
            path = result_path(args.out_dir, result_name(args), smoke_test)
            refuse_foreign(path, {"device", "smoke_test", "command"}, "benchmark")
        args.run(args)
    except (ValueError, OSError) as e:
        raise SystemExit(f"bench: {e}") from None


if __name__ == "__main__":
    main()
