"""What bench.py times: the rotary kernel, a step of Llama-3-8B by its parts, planned memory."""

import functools
import gc
import json
import platform
import re
import shlex
import statistics
import sys
import time
import weakref
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from longred import StepStream, fill_defaults, plan_streams
from machine import memory
from machine import plan as planner
from machine.files import whole_file
from machine.settings import MachineConfig as Config
from model import LOSS_ROWS, Llama, ModelConfig, config_to_hf, next_token_kl, next_token_loss
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


def failure(error: Exception) -> dict:
    """An error as a row of a result: no memory, a compiler, a bug. Other rows go on."""
    line = (str(error).splitlines() or [""])[0][:500]
    if isinstance(error, torch.OutOfMemoryError):
        return {"out of memory": line}
    return {"error": f"{type(error).__name__}: {line}"}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def describe(device) -> dict:
    """Where and with what a result was measured."""
    versions = {name: version(name) for name in ("torch", "triton", "liger-kernel")}
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
    device = args.device
    lengths = args.lengths or ([64, 256] if device.type == "cpu" else [8192, 32768, 131072])
    result = describe(device) | {"backend": rope_backend(device), "rows": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}, path {result['backend']}")
    for n_tokens in lengths:
        try:
            rows = rope_at(n_tokens, args.rounds, device)
        except torch.OutOfMemoryError as e:
            rows = [{"peer": "all", "direction": "", "T": n_tokens} | failure(e)]
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

    jobs, errors, failed = {(COPY, "both"): (target.copy_, flat)}, {(COPY, "both"): 0.0}, {}
    for name, rotate in rope_peers(n_tokens, device).items():
        try:
            jobs |= rope_jobs(name, rotate, sets)
            errors[name, "forward"], errors[name, "backward"] = rope_errors(rotate, sets[0])
        except Exception as e:
            failed[name] = failure(e)

    times = {key: [] for key in jobs if key[0] not in failed}
    for round_ in range(rounds + 2):  # peers take turns, so that a change of clocks meets all
        for key in [key for key in times if key[0] not in failed]:
            try:
                us = microseconds(*jobs[key], device)
            except Exception as e:
                failed[key[0]] = failure(e)
                continue
            if round_ >= 2:  # two rounds of warming up
                times[key].append(us)
    medians = {key: statistics.median(us) for key, us in times.items() if key[0] not in failed}
    rows = [{"peer": name, "direction": "", "T": n_tokens} | why for name, why in failed.items()]
    return rows + [
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


def rope_jobs(name, rotate, sets) -> dict:
    """(name, direction) -> what is timed, and its arguments for each set."""
    forward, backward = [], []
    for *qk, grad_q, grad_k in sets:
        leaves = [x.clone().requires_grad_() for x in qk]  # Liger rotates what it is given
        forward.append(leaves)
        out = rotate(*leaves)
        backward.append((out, leaves, (grad_q.clone(), grad_k.clone())))
    grad = functools.partial(torch.autograd.grad, retain_graph=True)
    return {(name, "forward"): (rotate, forward), (name, "backward"): (grad, backward)}


def rope_peers(n_tokens, device):
    """name -> function from q, k in (B, T, heads, H) to both rotated, in the same layout.

    Peers take tables of cos and sin, made once a step and shared by the layers, so they are not
    timed for making them; longred makes its angles inside, and is.
    """
    inv_freq, _ = rope_frequencies(HEAD_DIM, THETA)
    ids, inv_freq = torch.arange(n_tokens, device=device)[None], inv_freq.to(device)
    angle = (ids[..., None].float() * inv_freq.float()).repeat(1, 1, 2)  # (B, T, H), as peers do
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def heads_first(function):  # peers take (B, heads, T, H); both transposes are views
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
        if "us" not in row:
            print(row)
            continue
        print(
            f"{row['peer']:24}{row['direction']:10}{row['us']:10.1f}{row['GB_per_s']:8.0f}"
            f"{row['percent_of_copy']:11.1f}{row['max_error']:11.1e}"
        )


# ---------------------------------------------------------------------------------- step and memory

GIB = planner.GIB
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # --moments
LLAMA3_8B = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336)
LLAMA3_8B = ModelConfig(**LLAMA3_8B, vocab_size=128256, rope_theta=2e7)
TINY = dict(d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160, vocab_size=512)
TINY = replace(LLAMA3_8B, **TINY)


class Step(NamedTuple):
    """One optimizer step of LongReD, by the tables of longred.py."""

    config: ModelConfig
    c: Config
    streams: dict[str, StepStream]
    units: list[planner.Unit]  # the passes of each stream

    @classmethod
    def paper(cls, config: ModelConfig, target_len: int, original_len: int = 8192, **settings):
        """The paper's step, unless settings change it: 16 micro-batches of 131,072 tokens."""
        c = Config(target_len=target_len, original_len=original_len, **settings)
        fill_defaults(c, "", config.rope_theta)
        c.distill_layers = list(range(config.n_layers + 1))[-c.n_distill_layers :]
        streams = plan_streams(c)
        units = [planner.Unit.of(s, c, c.unit_tokens // s.seq_len) for s in streams.values()]
        return cls(config, c, streams, units)


class Sizes(NamedTuple):
    """How large everything is that is measured."""

    steps: dict[int, Step]  # by the length of a long text at full size
    rope_lengths: tuple[int, ...]
    attention_lengths: tuple[int, ...]
    copied: int  # bytes
    matmul: int  # rows and columns
    locked: int  # bytes locked at a time
    loss: tuple[int, int, int]  # tokens, V, D
    rounds: int


LENGTHS = 32768, 131072, 262144
FULL = Sizes(
    {n: Step.paper(LLAMA3_8B, n) for n in LENGTHS},
    rope_lengths=(32768, 8192),
    attention_lengths=(32768, 8192, 1024),
    copied=2**30,
    matmul=8192,
    locked=8 * GIB,
    loss=(8192, LLAMA3_8B.vocab_size, LLAMA3_8B.d_model),
    rounds=5,
)
FEW = dict(long_batch=1, short_batch=4, s2l_batch=4, short_len=8, n_distill_layers=3)
TOY = Sizes(
    {n: Step.paper(TINY, n // 128, original_len=64, **FEW) for n in LENGTHS},
    rope_lengths=(32, 8),
    attention_lengths=(32,),
    copied=2**20,
    matmul=64,
    locked=2**20,
    loss=(512, 4096, 256),
    rounds=1,
)


def sizes(device) -> Sizes:
    """Full on a GPU. On a CPU a toy's: they show that everything runs, and nothing else."""
    return FULL if device.type == "cuda" else TOY


class Trainer:
    """A student and its teacher under a plan, with random weights made on the device."""

    def __init__(self, step: Step, plan: planner.Plan, device):
        self.step, self.plan, self.device = step, plan, device
        self.student, self.teacher = (random_llama(step.config, device, seed) for seed in (0, 1))
        self.teacher.requires_grad_(False)
        adamw = dict(lr=2e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.machine = memory.OneGPU(plan, self.student, self.teacher, **adamw)
        tokens = dict(generator=torch.Generator(device).manual_seed(2), device=device)
        self.draw = functools.partial(torch.randint, step.config.vocab_size, **tokens)

    def unit(self, unit):
        """Forward and backward of one pass, over random tokens."""
        batch = data.Batch.whole(self.draw((unit.batch, unit.seq_len + 1)))
        stream, c = self.step.streams[unit.name], self.step.c
        if stream.position_scheme != "ordinary":  # positions that skip are each sequence's own
            skipping = batch.teacher_positions * (c.target_len // unit.seq_len)
            batch = batch._replace(student_positions=skipping.expand(unit.batch, -1))
        losses = stream.loss(self.student, self.teacher, batch, c)
        losses = losses if isinstance(losses, dict) else {stream.name: losses}
        sum(stream.weights[name] * loss for name, loss in losses.items()).backward()

    def update(self):
        """What ends a step: clipping, the optimizer, zeroing."""
        optimizer = self.machine.optimizer
        torch.nn.utils.clip_grad_norm_(optimizer.with_gradients(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def turn(self):
        """What a step does between kinds of pass: the cache emptied, the teacher's visit."""
        for name in self.plan.units:
            self.machine.ready(name)

    def measure(self, unit, rounds: int) -> dict:
        """One kind of pass: its seconds, speed and memory, planned and measured."""
        self.machine.ready(unit.name)
        reset_peak(self.device)
        held = allocated_bytes(self.device)
        seconds, first = timed(functools.partial(self.unit, unit), rounds, self.device)
        policy, card = self.plan.policies[unit.name], self.plan.card or planner.H200
        floor = planner.unit_seconds(self.step.config, unit, policy, card)
        return speed(self.step.config, unit, seconds, card) | {
            "roofline_percent": 100 * floor / seconds,
            "peak_gib": peak_bytes(self.device) / GIB,
            "planned_gib": sum(self.plan.gpu[unit.name].values()) / GIB,
            "first_s": first,
            **reserved_row(self.device),
            "reserved_planned_gib": self.plan.reserved(unit.name) / GIB,
            "activations_gib": (peak_bytes(self.device) - held) / GIB,
            "unit": asdict(unit),
            "policy": asdict(policy),
        }


def random_llama(config, device, seed):
    """bf16, made on the device; never zeros, on which matmuls run a tenth faster."""
    with torch.device("meta"):
        model = Llama(config)
    model.to(torch.bfloat16).to_empty(device=device)
    return model.init_weights(generator=torch.Generator(device).manual_seed(seed))


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


def planned(step: Step, device, host_given: bool = False, **settings) -> planner.Plan:
    """The plan of a step on this device, printed. settings: make_plan's.

    host_given: by --host_gib, so that more host memory than what is free is tried.
    """
    gpu = device.type == "cuda"
    settings |= dict(card=torch.cuda.get_device_name(device)) if gpu else {}
    expandable = not gpu or planner.segments_expand()
    plan = planner.make_plan(step.config, step.units, expandable=expandable, **settings)
    if step.config is TINY and settings["host_bytes"]:
        use_everything(plan)
    plan.host_given = host_given
    print(plan.table(), flush=True)
    return plan


def use_everything(plan):
    """A toy's plan, which has room for all, made to use every mechanism there is."""
    torch.set_num_threads(1)
    compiled = any(policy.compile for policy in plan.policies.values())
    hard = planner.Policy(1, 2, offload=True, mlp_rows=100, compile=compiled)
    longest = max(u.tokens for u in plan.units.values())
    plan.host_state, plan.teacher_resident = True, False
    plan.slot_bytes = 2 * longest * TINY.d_model
    plan.policies = dict.fromkeys(plan.units, hard)


def speed(config, unit, seconds, card):
    """A unit's seconds in the terms of the table."""
    work = planner.model_flops(config, unit)
    return {
        "seconds": seconds,
        "tokens_per_s": unit.tokens / seconds,
        "model_tflops": work / seconds / 1e12,
        "mfu_percent": 100 * work / seconds / planner.PEAKS[card.name][0],
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
    device = args.device
    step, result = sizes(device).steps[32768], describe(device)
    print(f"{result['device']}, {result['date']}, {result['versions']}")
    gpu, host = rooms(args, device)
    settings = dict(gpu_bytes=gpu, host_bytes=host, compile=args.compile)
    settings |= dict(host_given=bool(args.host_gib))
    plan = planned(step, device, moments=MOMENTS[args.moments], **settings)
    name = result_name(args)
    save = functools.partial(write_result, result, args.out_dir, name, quiet=True)
    our_step(step, plan, args.rounds, device, result=result, save=save)
    memory.free_host_buffers()
    result["peers"] = {}
    for peer in ("transformers", "liger") if args.peers else ():
        reset_peak(device)
        theirs = result["peers"][peer] = peer_step(peer, step, args.rounds, device)
        save()
        print(f"{peer}: {theirs}", flush=True)
        ours = result["units"]["long"].get("seconds")
        if ours and "seconds" in theirs and device.type != "cpu":
            print(f"  ours is {theirs['seconds'] / ours:.2f}x as fast")
    write_result(result, args.out_dir, name)


COLUMNS = (
    "seconds tokens_per_s model_tflops mfu_percent roofline_percent peak_gib planned_gib".split()
)


def our_step(step: Step, plan, rounds, device, *, result, save):
    """Time every unit of the plan and what is between them; add them up to one step.

    Rows go into result["units"] and result["parts"], and save() is called after each. A pass that
    fails is a row too; one that an earlier call measured is not measured again.
    """
    began = time.perf_counter()
    trainer = Trainer(step, plan, device)
    print(f"weights, optimizer and locked host memory: {time.perf_counter() - began:.1f} s")
    print(f"{'':8}" + "".join(f"{name:>17}" for name in COLUMNS), flush=True)
    units, parts = result.setdefault("units", {}), result.setdefault("parts", {})
    for name, unit in plan.units.items():
        if "seconds" in units.get(name, {}):
            continue
        try:
            units[name] = trainer.measure(unit, rounds)
        except Exception as e:
            units[name] = failure(e)
        save()
        reset_peak(device)
        shown = (f"{units[name][key]:17.4g}" for key in COLUMNS if key in units[name])
        print(f"{name:8}", *shown, "" if "seconds" in units[name] else units[name], flush=True)
    for name, run in (("update", trainer.update), ("between passes", trainer.turn)):
        if "seconds" in parts.get(name, {}):
            continue
        try:
            parts[name] = {"seconds": timed(run, rounds, device)[0]}
        except Exception as e:
            parts[name] = failure(e)
        save()
    add_up(step, result)
    save()
    for name, unit in plan.units.items() if device.type == "cuda" else ():
        trainer.machine.ready(name)
        try:
            units[name]["gpu_time_percent"] = kernel_shares(functools.partial(trainer.unit, unit))
        except Exception as e:  # the profiler is not needed for anything else
            units[name]["gpu_time_percent"] = failure(e)
        save()
        print(name, units[name]["gpu_time_percent"], flush=True)


def add_up(step: Step, result) -> None:
    """result["step"]: a whole step, from one pass of each kind, the update and all between."""
    rows = {name: row for name, row in result["units"].items() if "seconds" in row}
    parts = {name: row["unit"]["count"] * row["seconds"] for name, row in rows.items()}
    parts |= {n: row["seconds"] for n, row in result["parts"].items() if "seconds" in row}
    total = sum(parts.values())
    tokens = sum(stream.tokens for stream in step.streams.values())
    result["step"] = {
        "seconds": total,
        "seconds_of": parts,
        "tokens_per_s": tokens / total if total else 0.0,
        "whole": len(parts) == len(result["units"]) + len(result["parts"]),
    }
    shown = ", ".join(f"{k} {v:.1f} s ({100 * v / total:.0f}%)" for k, v in parts.items())
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


def peer_step(name, step: Step, rounds, device):
    """A long pass by transformers in bf16 with gradient checkpointing, plain or under Liger."""
    try:
        import transformers

        if name == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
    except ImportError as e:
        return {"left out": f"{e.name} is not installed"}
    config, unit = step.config, step.units[0]
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
    card = planner.Card.of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return speed(config, unit, seconds, card or planner.H200) | {
        "peak_gib": peak_bytes(device) / GIB,
        "static_gib": static,  # weights and gradients, in bf16
        "activations_gib": max(0.0, peak_bytes(device) / GIB - static),
        "version": transformers.__version__,
    }


def bench_memory(args):
    """The plan at each length; on a GPU also the peak of a long pass, against the planned one."""
    device = args.device
    result = describe(device) | {"rows": []}
    name = result_name(args)
    gpu, host = rooms(args, device)
    print(f"{result['device']}: plans for {gpu / GIB:.1f} GiB of GPU, {host / GIB:.1f} of host")
    if device.type == "cuda":
        result["pcie"] = pcie_rates(device)
    for length in args.lengths:
        step, settings = Step.paper(LLAMA3_8B, length), dict(moments=MOMENTS[args.moments])
        settings |= dict(host_given=bool(args.host_gib))
        try:
            plan = planned(step, device, gpu_bytes=gpu, host_bytes=host, **settings)
        except ValueError as e:
            print(f"{length}: {e}", flush=True)
            continue
        row = {"length": length, "planned_gib": sum(plan.gpu["long"].values()) / GIB}
        if device.type == "cuda":
            trainer = Trainer(step, plan, device)
            try:
                row |= trainer.measure(plan.units["long"], args.rounds)
            except torch.OutOfMemoryError as e:
                row |= failure(e)
            del trainer
            memory.free_host_buffers()
        result["rows"].append(row)
        print({k: round(v, 2) for k, v in row.items() if isinstance(v, float)}, flush=True)
        write_result(result, args.out_dir, name, quiet=True)
    write_result(result, args.out_dir, name)


# ------------------------------------------------------------------------------- losses, transfers


def loss_rows(device, *, result, save):
    """Into result: seconds and peaks of KL and cross-entropy with Llama-3-8B's head, their ratios.

    The peak is counted on fake tensors at Llama-3-8B's size, in a GPU's chunks; on a GPU the
    allocator's own is next to it.
    """
    small, shape = device.type == "cpu", sizes(device).loss
    calls, inputs = loss_calls(*shape, torch.float32 if small else torch.bfloat16, device)
    result |= {"shape": shape, "rows": {}}
    for name, run in calls.items():
        reset_peak(device)
        row = {"seconds": timed(run, sizes(device).rounds, device)[0]}
        if not small:
            row["peak_gib"] = (peak_bytes(device) - sum(t.nbytes for t in inputs)) / GIB
        row["counted_gib"] = counted_peak(name) / GIB
        result["rows"][name] = row
        save()
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
        "next_token_kl": lambda: backward(next_token_kl(hidden, head, teacher, its_head, rows)[0]),
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
