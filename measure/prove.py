"""All that is claimed of a GPU, by three commands: measure.bench prove, --then and --more.

Every row is on disk as soon as it is measured, so that a kill loses the one being measured. A row
that fails, or for which there is no memory or no time, is a result like any other. It ends with the
table of targets: PROVEN, MISSED or NOT RUN, and why. What is extrapolated says so and is never
PROVEN. On a CPU everything runs at a toy's size: it shows that the command works, and measures
nothing.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from machine import memory
from machine import plan as planner
from machine.formats import load_config
from machine.hf_config import original_window
from measure import demo, evaluate, timing
from model import causal_attention

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
            mine = at_32k.get((timing.OURS, direction))
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


# One step of Llama-3-8B at 32K by the planner's FLOPs and assumed rates, in seconds:
#                                                                            H200   H100
#     every kernel at its peak                                                219    246
#     GEMM at 720, attention at 580 forward and 450 backward (TFLOP/s),
#     elementwise lines eager                                                 252    284
#     the same, sustained at 700 W                                            274    308
#     the same, with FlashAttention-2                                         289    321
# Ideas to save seconds, in this order: recompute less (6, on an H100 28), fuse the elementwise
# lines (7 to 11), attention at FlashAttention-3's rate (11), FP8 (30, but it changes the numerics).
# None is built before a GPU has shown where the time goes.
TARGETS = [
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
        "one pass of each kind, times their number, one update, all between passes once",
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


class OutOfTime(BaseException):
    """A stage's or the command's time is over: not an error of the row that it ends."""


class Stage:
    """One stage at work: its rows, which are on disk once they are measured, and its time."""

    def __init__(self, name: str, seconds: float, until: float, device, args, write):
        """until: on time.monotonic's clock, when all must be over. write: puts rows on disk."""
        self.name, self.seconds, self.until = name, seconds, until
        self.device, self.args, self.write = device, args, write
        self.rows = {}

    def save(self) -> None:
        self.write(self)

    def measure(self, name: str, run) -> None:
        """Put what run() returns into the rows, or why it failed."""
        try:
            self.rows[name] = run()
        except Exception as e:
            self.rows[name] = timing.failure(e)
        self.save()
        print(f"{self.name}, {name}: {self.rows[name]}", flush=True)
        timing.reset_peak(self.device)

    def begin(self) -> None:
        """The time of the stage begins: at twice its seconds, or at `until`, OutOfTime ends it."""
        self.began = time.monotonic()
        if hasattr(signal, "SIGALRM"):  # not on Windows
            signal.alarm(max(1, int(min(2 * self.seconds, self.until - self.began))))

    def left(self) -> float:
        """Seconds of its own that it still has."""
        return self.seconds - (time.monotonic() - self.began)


def step_stage(stage: Stage, length: int = 32768) -> None:
    """Llama-3-8B, random weights: a pass of each kind and the optimizer, against the plan.

    Where the system refuses to lock host memory, a plan without any is measured. Where a pass is
    out of memory, it is measured under a plan for 8% less room.
    """
    device, gpu = stage.device, stage.device.type == "cuda"
    step, rounds = timing.sizes(device).steps[length], 1
    room, host = (planner.gpu_room(), planner.available_memory()) if gpu else (139 * GIB, 120 * GIB)
    tries = stage.rows["tries"] = []
    while len(tries) < 4:
        tries.append({"gpu_gib": room / GIB, "host_gib": (host or 0) / GIB})
        stage.save()
        plan = fitting(step, device, room, host, tries[-1])
        try:
            timing.our_step(step, plan, rounds, device, result=stage.rows, save=stage.save)
        except memory.HostMemoryRefused as e:
            tries[-1]["refused"], host = str(e), 0
        except torch.OutOfMemoryError as e:
            tries[-1] |= timing.failure(e)
        memory.free_host_buffers()
        timing.reset_peak(device)
        if any("out of memory" in row for row in stage.rows.get("units", {}).values()):
            tries[-1].setdefault("out of memory", "in a pass")
        if "out of memory" in tries[-1]:
            room = int(0.92 * room)
        elif "refused" not in tries[-1]:
            return


def fitting(step, device, room: int, host: int | None, said: dict) -> planner.Plan:
    """The plan for so much memory, AdamW's moments in bf16 where only that fits."""
    settings = dict(gpu_bytes=room, host_bytes=host or 0)
    try:
        plan = timing.planned(step, device, moments=torch.float32, **settings)
    except ValueError as e:
        said["fp32 moments"] = str(e)
        plan = timing.planned(step, device, moments=torch.bfloat16, **settings)
    said["moments"] = str(plan.moments)
    return plan


def rotary_stage(stage: Stage) -> None:
    """The rotary kernel at 32K and 8K against a copy and its peers."""
    stage.rows["rows"] = []
    rounds = 3 * timing.sizes(stage.device).rounds
    for n_tokens in timing.sizes(stage.device).rope_lengths:
        try:
            rows = timing.rope_at(n_tokens, rounds, stage.device)
        except torch.OutOfMemoryError as e:
            rows = [{"peer": "all", "direction": "", "T": n_tokens} | timing.failure(e)]
        stage.rows["rows"] += rows
        stage.save()
        timing.print_rope(rows, n_tokens)


def machine_stage(stage: Stage) -> None:
    """Copy and GEMM rates, PCIe, how much host memory can be locked."""
    device, sizes = stage.device, timing.sizes(stage.device)

    def copy():
        source = torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=device)
        run = functools.partial(torch.empty_like(source).copy_, source)
        seconds, _ = timing.timed(run, 9, device)
        return {"seconds": seconds, "gb_s": 2 * sizes.copied / seconds / 1e9}

    def gemm():
        n = sizes.matmul
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds, _ = timing.timed(lambda: [torch.mm(a, b) for _ in range(10)], 9, device)
        return {"seconds": seconds, "tflops": 20 * n**3 / seconds / 1e12}

    stage.measure("copy", copy)
    stage.measure("gemm", gemm)
    if device.type == "cuda":
        stage.measure("memory_gib", lambda: torch.cuda.mem_get_info(device)[1] / GIB)
        stage.measure("expandable_segments", planner.segments_expand)
    stage.measure("pcie_gb_s", lambda: timing.pcie_rates(device, sizes.copied))
    memory.free_host_buffers()
    stage.measure("host", lambda: lockable(stage, sizes.locked))
    memory.free_host_buffers()


def lockable(stage: Stage, piece: int) -> dict:
    """GiB of host memory that can be locked, tried for half of the stage's time."""
    gpu, room = stage.device.type == "cuda", planner.available_memory() or 0
    found, locked = {"free_gib": room / GIB}, 0
    most = min(room - planner.HOST_SPARE, 32 * piece) if gpu else 3 * piece
    while locked + piece <= most and stage.left() > stage.seconds / 2:
        try:
            memory.host_buffer(piece, pin=gpu)
        except memory.HostMemoryRefused as e:
            found["refused"] = str(e)
            break
        locked += piece
    return found | {"lockable_gib": locked / GIB}


def loss_stage(stage: Stage) -> None:
    """KL of the next token against the cross-entropy, with Llama-3-8B's head."""
    timing.loss_rows(stage.device, result=stage.rows, save=stage.save)


GPU_TESTS = HERE / "tests" / "test_gpu.py"


def tests_stage(stage: Stage) -> None:
    """tests/test_gpu.py in a process of its own, on this device."""
    if stage.device.type != "cuda":
        stage.rows["not run"] = "no GPU; python -m pytest runs the same tests on a CPU"
    elif importlib.util.find_spec("pytest") is None:
        stage.rows["not run"] = "pytest is not installed"
    else:
        command = [sys.executable, "-u", "-m", "pytest", "-v", "-rs", "--durations=8"]
        command += ["-p", "no:cacheprovider", str(GPU_TESTS)]
        settings = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            done = subprocess.run(command, timeout=stage.seconds, **settings)
            stage.rows |= {"passed": done.returncode == 0}
            printed = done.stdout
        except subprocess.TimeoutExpired as e:
            stage.rows |= {"passed": False, "error": f"more than {stage.seconds:.0f} s"}
            printed = e.stdout or b""
        stage.rows["output"] = printed.decode(errors="replace")[-6000:]


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


def run_stage(stage: Stage) -> None:
    """A small checkpoint as a user runs it: train, SIGTERM, resume, export, reopen, evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        original, stage.rows["checkpoint"] = small_checkpoint(root, stage.args.ckpt)
        stage.begin()  # only now, since the checkpoint may have had to be trained
        window, out = original_window(load_config(original)), root / "run"
        flags = {"ckpt": original, "target_len": 2 * window, "out_dir": out}
        flags |= {"long_data": TEXT, "short_data": TEXT, "cache_dir": root / "tokens", "steps": 4}
        flags |= {"long_micro": 1, "long_batch": 2, "short_micro": 1, "short_batch": 4}
        flags |= {"s2l_micro": 1, "s2l_batch": 2, "eval_tokens": 4 * window, "save_every": 2}
        flags |= {"device": stage.device}
        given = [x for key, value in flags.items() for x in (f"--{key}", str(value))]
        command = [sys.executable, str(HERE / "longred.py"), *given]
        stage.rows |= stopped_and_resumed(command, out, stage)
        stage.save()
        if not stage.rows["passed"]:
            return
        stage.rows["report"] = (out / "report.md").read_text()[:2000]
        stage.measure("reopened_parameters", lambda: parameters_in_transformers(out / "hf"))
        stage.measure("evaluated", lambda: evaluated(original, out, window, root, stage.device))


def stopped_and_resumed(command: list, out: Path, stage: Stage) -> dict:
    """Run, SIGTERM after the first state, resume. passed is True where both went as they should."""
    # Tests without a GPU run kernels in Triton's interpreter, a run does not.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with open(out.with_name("said"), "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and stage.left() > 0:
                if (out / "checkpoints" / "step-000002").exists():
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            stopped = process.wait(timeout=max(1, stage.left()))
        except subprocess.TimeoutExpired:
            stopped = "not stopped in time"
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        printed = said.read()[-2000:]
    if stopped != 128 + signal.SIGTERM:
        return {"passed": False, "stopped": stopped, "output": printed}
    resume = [*command[:2], "--resume", str(out)]
    settings = dict(capture_output=True, text=True, env=environment)
    done = subprocess.run(resume, timeout=max(1, stage.left()), **settings)
    if done.returncode:
        return {"passed": False, "resumed": done.returncode, "output": done.stderr[-2000:]}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    whole = [x["step"] for x in log] == list(range(1, len(log) + 1))
    return {"passed": whole, "stopped": stopped, "loss": [log[0]["loss"], log[-1]["loss"]]}


def parameters_in_transformers(folder: Path) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def evaluated(original: Path, out: Path, window: int, root: Path, device) -> str:
    """The beginning of evaluate's report on the run."""
    asked = ["--tasks", "kept", "position", "--lengths", f"{window},{2 * window}"]
    asked += ["--eval_tokens", str(4 * window), "--device", str(device)]
    places = ["--out_dir", str(root / "evaluated"), "--cache_dir", str(root / "tokens")]
    evaluate.main(["--base", str(original), "--ckpt", str(out), *asked, *places])
    return (root / "evaluated" / "report.md").read_text()[:4000]


WAYS = "what the model gets", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "FA3"


def attention_stage(stage: Stage) -> None:
    """Attention of Llama-3-8B by backend, forward and backward: which should answer."""
    for n_tokens in timing.sizes(stage.device).attention_lengths:
        for way in WAYS:
            for backward in (False, True):
                name = f"{n_tokens} tokens, {'backward' if backward else 'forward'}, {way}"
                run = functools.partial(attention_row, way, n_tokens, backward, stage.device)
                stage.measure(name, run)


def attention_row(way: str, n_tokens: int, backward: bool, device) -> dict:
    """32 query and 8 kv heads of 128, causal."""

    def random(heads):
        shape = 1, n_tokens, heads, 128
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def forward():
        if way == WAYS[0]:
            return causal_attention(q, k, v)
        with sdpa_kernel([getattr(SDPBackend, "FLASH_ATTENTION" if way == "FA3" else way)]):
            wide = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)

    q, k, v = random(32), random(8), random(8)
    work = 2 * 2 * 32 * 128 * n_tokens**2 / 2  # FLOP: two products over half the square
    with flash_attention_3() if way == "FA3" else nullcontext():
        run = forward
        if backward:
            out, work = forward(), 2.5 * work
            grad = torch.randn_like(out)
            run = functools.partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
        seconds, _ = timing.timed(run, timing.sizes(device).rounds, device)
    return {"seconds": seconds, "tflops": work / seconds / 1e12}


@contextmanager
def flash_attention_3():
    """FlashAttention-3 behind the flash backend; raises where it is not installed."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()


def peers_stage(stage: Stage) -> None:
    """The same long pass by transformers with checkpointing, and under Liger-Kernel."""
    step = timing.sizes(stage.device).steps[32768]
    for peer in ("transformers", "liger"):
        stage.measure(peer, functools.partial(timing.peer_step, peer, step, 1, stage.device))


class Part(NamedTuple):
    """What one command measures: stages by name, each with the seconds that it should take."""

    seconds: float  # of the command
    stages: dict


PARTS = {
    "first": Part(
        430,
        {
            "8B": (step_stage, 110),
            "rotary": (rotary_stage, 45),
            "machine": (machine_stage, 20),
            "loss": (loss_stage, 15),
        },
    ),
    "then": Part(
        360,
        {"tests": (tests_stage, 150), "run": (run_stage, 110), "attention": (attention_stage, 40)},
    ),
    "more": Part(
        1200,
        {
            "peers": (peers_stage, 200),
            "128K": (functools.partial(step_stage, length=131072), 300),
            "256K": (functools.partial(step_stage, length=262144), 400),
        },
    ),
}


def run_one(stage: Stage, work) -> None:
    """Run a stage to its end, its error or the end of its time; its rows stay."""
    began = time.monotonic()
    stage.rows["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if stage.until - began < 2:
        stage.rows["not run"] = "no time was left"
        return stage.save()
    try:
        stage.begin()
        work(stage)
    except OutOfTime:
        stage.rows["error"] = f"out of time after {time.monotonic() - began:.0f} s"
    except Exception as e:  # whatever it is, the other stages go on
        stage.rows |= timing.failure(e)
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
    stage.rows["stage_seconds"] = round(time.monotonic() - began, 1)
    memory.free_host_buffers()
    timing.reset_peak(stage.device)
    stage.save()


def earlier_stages(path: Path, result: dict) -> dict:
    """The stages that another command measured, on this device with these versions."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    same = all(earlier.get(key) == result[key] for key in ("device", "versions"))
    return earlier.get("stages", {}) if same else {}


def prove(args) -> None:
    """Run the stages of one part, every row on disk once it is measured; end with the table."""

    def too_late(number, frame):
        raise OutOfTime

    def write(stage: Stage) -> None:
        result["stages"][stage.name] = stage.rows
        result["targets"] = verdicts(result["stages"], result["device"], device.type != "cuda")
        timing.write_result(result, args.out_dir, "prove", quiet=True)

    device, part = args.device, PARTS[args.part]
    until = time.monotonic() + (args.seconds or part.seconds)
    result = timing.describe(device)
    path = timing.result_path(args.out_dir, "prove", result["smoke_test"])
    result |= {"stages": earlier_stages(path, result), "targets": []}
    print(f"{result['device']}, {result['date']}, {result['versions']}", flush=True)
    previous = signal.signal(signal.SIGALRM, too_late) if hasattr(signal, "SIGALRM") else None
    try:
        for name, (work, seconds) in part.stages.items():
            stage = Stage(name, seconds, until, device, args, write)
            run_one(stage, work)
            short = {k: v for k, v in stage.rows.items() if not isinstance(v, dict | list)}
            print(f"stage {name}: {short}", flush=True)
    finally:
        if previous is not None:
            signal.signal(signal.SIGALRM, previous)
    print_verdicts(result["targets"])
    timing.write_result(result, args.out_dir, "prove")
