"""All that is claimed of a GPU, measured in one run: python -m measure.bench prove --out_dir DIR

Stages in order of value; one JSON, rewritten after each. A stage that fails, or runs out of memory
or time, is a result like any other. It ends with the table of targets: PROVEN, MISSED or NOT RUN,
and why. What is extrapolated says so and is never PROVEN.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from machine import memory
from machine import plan as planner
from machine.formats import load_config
from machine.hf_config import original_window
from measure import bench, demo, evaluate, kernels

GIB = planner.GIB
HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    """One row of the table. value(stages) -> number, None where its stage did not run."""

    what: str
    value: object
    limit: dict  # by card: {"H200": 165, ...}; "any" for all
    unit: str
    most: bool  # the limit is the most allowed, else the least
    extrapolated: str = ""  # from what, where it is


def _get(stages: dict, *path):
    """stages[a][b]...; None where anything on the way is missing."""
    for key in path:
        stages = stages.get(key) if isinstance(stages, dict) else None
    return stages


def _rotary(field: str, against: str | None = None):
    """The worse direction at 32K; with `against`, as a ratio of that peer's time."""

    def value(stages):
        rows = _get(stages, "rotary", "rows") or []
        at_32k = {(r["peer"], r["direction"]): r for r in rows if r.get("T") == 32768 and "us" in r}
        found = []
        for direction in ("forward", "backward"):
            mine = at_32k.get((bench.OURS, direction))
            theirs = at_32k.get((against, direction)) if against else None
            if mine is None or (against and theirs is None):
                return None
            found.append(mine["us"] / theirs["us"] if against else mine[field])
        return min(found) if field == "percent_of_copy" else max(found)

    return value


def _against_peer(field: str, ours_first: bool = False):
    """transformers' number over ours for the same long pass, or ours over its."""

    def value(stages):
        ours = _get(stages, "8B", "units", "long", field)
        theirs = _get(stages, "peers", "transformers", field)
        if not ours or not theirs:
            return None
        return ours / theirs if ours_first else theirs / ours

    return value


def _planned(stages):
    """Largest distance of measured from planned reserved memory, percent."""
    units = _get(stages, "8B", "units") or {}
    pairs = [(u.get("reserved_gib"), u.get("reserved_planned_gib")) for u in units.values()]
    pairs = [(got, planned) for got, planned in pairs if got and planned]
    return max((100 * abs(got / planned - 1) for got, planned in pairs), default=None)


def _of_units(field: str):
    def value(stages):
        units = (_get(stages, "8B", "units") or {}).values()
        return max((u[field] for u in units if field in u), default=None)

    return value


def _longest(stages):
    """Tokens of the longest text that a long pass of 8B took."""
    units = [_get(stages, name, "units", "long") or {} for name in ("8B", "128K", "256K")]
    return max((u["unit"]["seq_len"] for u in units if "tokens_per_s" in u), default=None)


TARGETS = [  # as measure/README.md has them
    Target("rotary each way, 32K, 32/8 heads", _rotary("us"), {"H200": 165}, "us", True),
    Target(
        "rotary against a copy", _rotary("percent_of_copy"), {"H200": 95, "H100": 90}, "%", False
    ),
    Target("rotary against torch.compile", _rotary("us", "torch.compile"), {"any": 1.0}, "x", True),
    Target(
        "8B 32K long pass",
        lambda s: _get(s, "8B", "units", "long", "tokens_per_s"),
        {"H200": 7000, "H100": 6300},
        "tok/s",
        False,
    ),
    Target(
        "8B 32K whole step",
        lambda s: _get(s, "8B", "step", "seconds"),
        {"H200": 250, "H100": 275},
        "s",
        True,
        "one pass of each kind, times their number, and one update",
    ),
    Target("8B 32K reserved memory", _of_units("reserved_gib"), {"H100": 76}, "GiB", True),
    Target("allocation retries", _of_units("alloc_retries"), {"any": 0}, "", True),
    Target("planned against measured reserved", _planned, {"any": 10}, "% apart", True),
    Target("transformers' long pass", _against_peer("seconds"), {"any": 1.3}, "x our time", False),
    Target(
        "activations, long pass",
        _against_peer("activations_gib", ours_first=True),
        {"any": 0.5},
        "x transformers'",
        True,
    ),
    Target(
        "128K long pass",
        lambda s: _get(s, "128K", "units", "long", "tokens_per_s"),
        {"H200": 2800},
        "tok/s",
        False,
    ),
    Target("longest long pass of 8B", _longest, {"H200": 262144}, "tokens", False),
    Target(
        "KL's peak", lambda s: _get(s, "loss", "ratios", "peak_gib"), {"any": 1.1}, "x loss's", True
    ),
    Target(
        "KL's time", lambda s: _get(s, "loss", "ratios", "seconds"), {"any": 2.2}, "x loss's", True
    ),
]


def card(name: str) -> str:
    """H200, H100 or the device's own name."""
    return next((known for known in ("H200", "H100") if known in name), name)


def verdicts(stages: dict, device: str, smoke_test: bool) -> list[dict]:
    """One row a target: what was measured, what was asked, PROVEN, MISSED or NOT RUN and why."""
    rows = []
    for t in TARGETS:
        limit = t.limit.get(card(device), t.limit.get("any"))
        value = None if smoke_test else t.value(stages)
        row = {"target": t.what, "limit": limit, "unit": t.unit, "value": value}
        if smoke_test:
            row |= {"verdict": "NOT RUN", "why": "no GPU"}
        elif limit is None:
            row |= {"verdict": "NOT RUN", "why": f"a target of {' and '.join(t.limit)} only"}
        elif value is None:
            row |= {"verdict": "NOT RUN", "why": "its stage gave no number; see stages"}
        elif (value > limit) if t.most else (value < limit):
            row |= {
                "verdict": "MISSED",
                "why": t.extrapolated and f"extrapolated: {t.extrapolated}",
            }
        elif t.extrapolated:
            row |= {"verdict": "NOT RUN", "why": f"met, but extrapolated: {t.extrapolated}"}
        else:
            row |= {"verdict": "PROVEN", "why": ""}
        rows.append(row)
    return rows


def print_verdicts(rows: list[dict]) -> None:
    print(f"\n{'target':38}{'asked':>10}{'measured':>11}  verdict")
    for r in rows:
        asked, got = (f"{x:.4g}" if x is not None else "-" for x in (r["limit"], r["value"]))
        why = f" ({r['why']})" if r["why"] else ""
        print(f"{r['target'] + ', ' + r['unit']:38}{asked:>10}{got:>11}  {r['verdict']}{why}")


# -------------------------------------------------------------------------------------- the stages


# On a CPU each runs at a toy's size: it shows that the command works, and measures nothing.


def machine_stage(device, seconds: float, args) -> dict:
    """Copy and GEMM rates, PCIe, how much host memory can be locked."""
    gpu = device.type == "cuda"
    nbytes, size, piece = (2**30, 8192, 8 * GIB) if gpu else (2**20, 64, 2**20)
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    copy, _ = bench.timed(functools.partial(torch.empty_like(source).copy_, source), 9, device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm, _ = bench.timed(lambda: [torch.mm(a, b) for _ in range(10)], 9, device)
    found = {"copy_gb_s": 2 * nbytes / copy / 1e9, "gemm_tflops": 20 * size**3 / gemm / 1e12}
    if gpu:
        found |= {"memory_gib": torch.cuda.mem_get_info(device)[1] / GIB}
        found |= {"expandable_segments": planner.segments_expand()}
    found["pcie_gb_s"] = bench.pcie_rates(device, nbytes)
    memory.free_host_buffers()
    room, began, locked = planner.available_memory() or 0, time.monotonic(), 0
    most = room - planner.HOST_SPARE if gpu else 3 * piece
    while locked + piece <= most and time.monotonic() - began < seconds / 2:
        try:
            memory.host_buffer(piece, pin=gpu)
        except ValueError as e:
            found["lock_refused"] = str(e)
            break
        locked += piece
    memory.free_host_buffers()
    return found | {"lockable_gib": locked / GIB, "host_free_gib": room / GIB}


def tests_stage(device, seconds: float, args) -> dict:
    """tests/test_gpu.py in a process of its own, on this device."""
    if device.type != "cuda":
        return {"not run": "no GPU; python -m pytest runs the same tests on a CPU"}
    if importlib.util.find_spec("pytest") is None:
        return {"not run": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=seconds)
    return {"passed": done.returncode == 0, "output": done.stdout[-3000:]}


def rotary_stage(device, seconds: float, args) -> dict:
    """The rotary kernel at 8K and 32K against a copy and its peers."""
    rows, began = [], time.monotonic()
    lengths, rounds = ((32768, 8192), 15) if device.type == "cuda" else ((32, 8), 1)
    for n_tokens in lengths:
        if rows and time.monotonic() - began > seconds:
            return {"rows": rows, "not run": f"{n_tokens}: out of time"}
        rows += bench.rope_at(n_tokens, rounds, device)
        bench.print_rope(rows[-len(rows) :], n_tokens)
    return {"rows": rows}


def loss_stage(device, seconds: float, args) -> dict:
    """KL of the next token against the cross-entropy, with Llama-3-8B's head."""
    result = {}
    bench.loss_rows(device, 5 if device.type == "cuda" else 1, result)
    return result


def step_stage(device, seconds: float, args, length: int = 32768) -> dict:
    """Llama-3-8B, random weights: a pass of each kind and the optimizer, against the plan."""
    gpu = device.type == "cuda"
    config, units = (bench.LLAMA3_8B, bench.UNITS) if gpu else (bench.TINY, bench.TINY_UNITS)
    length, count = length if gpu else length // 1024, 2**20 // length
    units = [replace(units[0], seq_len=length, count=count), *units[1:]]
    room, host = 139 * GIB, 120 * GIB
    if gpu:
        room, host = planner.gpu_room(), planner.available_memory()
    expand, result = not gpu or planner.segments_expand(), {}
    for moments in (torch.float32, torch.bfloat16):
        try:
            card = torch.cuda.get_device_name(device) if gpu else "H200"
            asked = config, units, room, host, moments
            plan = planner.make_plan(*asked, expandable=expand, card=card)
            break
        except ValueError as e:
            result["refused"] = str(e)
    else:
        return result
    if not gpu:
        bench.use_everything(plan)
    print(plan.table(), flush=True)
    result["moments"] = str(moments)
    try:
        bench.our_step(config, plan, 1, device, result, lambda: None)
    finally:
        memory.free_host_buffers()
    return result


TEXT = sysconfig.get_paths()["stdlib"] + "/*.py"  # real text that is everywhere
DEMO = Path("out/demo/original")  # where `python longred.py` leaves it
DEMO_STEPS = 150


def small_checkpoint(root: Path, ckpt: str | None) -> tuple[Path, str]:
    """A folder with a real small checkpoint, and which it is: --ckpt, the demo's, one made now."""
    if ckpt:
        return Path(ckpt), ckpt
    if (DEMO / "config.json").is_file():
        return DEMO, f"the demo's original, {DEMO}"
    topics = root / "prose.jsonl"
    demo.write_demo_text(topics, root / "code.jsonl")
    demo.train_demo_model(0, root / "original", topics, steps=DEMO_STEPS)
    return root / "original", f"the demo's original after {DEMO_STEPS} steps, trained here"


def stopped_and_resumed(command: list, out: Path, until: float) -> dict:
    """Run, SIGTERM after the first state, resume. passed is True where both went as they should."""
    # Tests without a GPU run kernels in Triton's interpreter, a run does not.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with open(out.with_name("said"), "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and time.monotonic() < until:
            if (out / "checkpoints" / "step-000002").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            stopped = process.wait(timeout=max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped = "not stopped in time"
        said.seek(0)
        printed = said.read()[-2000:]
    if stopped != 128 + signal.SIGTERM:
        return {"passed": False, "stopped": stopped, "output": printed}
    resume, left = [*command[:2], "--resume", str(out)], max(1, until - time.monotonic())
    done = subprocess.run(resume, capture_output=True, text=True, timeout=left, env=environment)
    if done.returncode:
        return {"passed": False, "resumed": done.returncode, "output": done.stderr[-2000:]}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    whole = [x["step"] for x in log] == list(range(1, len(log) + 1))
    return {"passed": whole, "stopped": stopped, "loss": [log[0]["loss"], log[-1]["loss"]]}


def run_stage(device, seconds: float, args) -> dict:
    """A small checkpoint as a user runs it: train, SIGTERM, resume, export, reopen, evaluate."""
    from transformers import AutoModelForCausalLM

    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        original, which = small_checkpoint(root, args.ckpt)
        window, out = original_window(load_config(original)), root / "run"
        flags = {"ckpt": original, "target_len": 2 * window, "out_dir": out, "device": device}
        flags |= {"long_data": TEXT, "short_data": TEXT, "cache_dir": root / "tokens", "steps": 4}
        flags |= {"long_micro": 1, "long_batch": 2, "short_micro": 1, "short_batch": 4}
        flags |= {"s2l_micro": 1, "s2l_batch": 2, "eval_tokens": 4 * window, "save_every": 2}
        given = [x for key, value in flags.items() for x in (f"--{key}", str(value))]
        command = [sys.executable, str(HERE / "longred.py"), *given]
        found = {"checkpoint": which} | stopped_and_resumed(command, out, until)
        if not found["passed"]:
            return found
        reopened = AutoModelForCausalLM.from_pretrained(out / "hf")
        found["reopened_parameters"] = sum(p.numel() for p in reopened.parameters())
        found["report"] = (out / "report.md").read_text()[:2000]
        wanted = ["--tasks", "kept", "position", "--lengths", f"{window},{2 * window}"]
        wanted += ["--eval_tokens", str(4 * window), "--device", str(device)]
        places = ["--out_dir", str(root / "evaluated"), "--cache_dir", str(root / "tokens")]
        evaluate.main(["--base", str(original), "--ckpt", str(out), *wanted, *places])
        return found | {"evaluated": (root / "evaluated" / "report.md").read_text()[:4000]}


def peers_stage(device, seconds: float, args) -> dict:
    """The same long pass by transformers with checkpointing, and under Liger-Kernel."""
    found, gpu = {}, device.type == "cuda"
    config, unit = (bench.LLAMA3_8B, bench.UNITS[0]) if gpu else (bench.TINY, bench.TINY_UNITS[0])
    for peer in ("transformers", "liger"):
        found[peer] = bench.peer_step(peer, config, unit, 1, device)
        bench.reset_peak(device)
    return found


def kernels_stage(device, seconds: float, args) -> dict:
    """Attention by backend, weight gradient sums, fusions: what the code should choose."""
    until, found = time.monotonic() + seconds, []
    for name, make in kernels.rows(device).items():
        if time.monotonic() < until:
            found.append(kernels.one_row(name, make, 5 if device.type == "cuda" else 1, device))
    return {"rows": found, "fastest": kernels.winners(found)}


STAGES = {  # name -> (what it runs, seconds it may take)
    "machine": (machine_stage, 40),
    "tests": (tests_stage, 90),
    "rotary": (rotary_stage, 40),
    "8B": (step_stage, 150),
    "run": (run_stage, 150),
    "loss": (loss_stage, 20),
}
MORE = {
    "kernels": (kernels_stage, 90),
    "peers": (peers_stage, 200),
    "128K": (functools.partial(step_stage, length=131072), 300),
    "256K": (functools.partial(step_stage, length=262144), 400),
}


def fenced(stage, seconds: float, device, args=None) -> dict:
    """A stage's result, or its error as the result. Limits are the stages' own to keep; on Linux an
    alarm ends what does not."""

    def too_late(number, frame):
        raise TimeoutError(f"more than {2 * seconds:.0f} s")

    began, previous = time.monotonic(), None
    if hasattr(signal, "SIGALRM"):
        previous = signal.signal(signal.SIGALRM, too_late)
        signal.alarm(int(2 * seconds))
    try:
        result = stage(device, seconds, args)
    except Exception as e:  # out of memory, a compiler, a bug: whatever it is, others go on
        lines = str(e).splitlines() or [""]
        result = {"error": f"{type(e).__name__}: {lines[0][:500]}"}
    finally:
        if previous is not None:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
    bench.reset_peak(device)
    return result | {"stage_seconds": round(time.monotonic() - began, 1)}


def prove(args) -> None:
    """Run every stage, write prove.json after each, end with the table."""
    device = torch.device(args.device)
    result = bench.describe(device) | {"stages": {}, "targets": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}", flush=True)
    save = functools.partial(bench.write_result, result, args.out_dir, "prove")
    for name, (stage, seconds) in (STAGES | (MORE if args.more else {})).items():
        found = result["stages"][name] = fenced(stage, seconds, device, args)
        short = {k: v for k, v in found.items() if not isinstance(v, dict | list)}
        print(f"stage {name}: {short}", flush=True)
        result["targets"] = verdicts(result["stages"], result["device"], device.type != "cuda")
        save(quiet=True)
    print_verdicts(result["targets"])
    save()
