"""The log of a run: one line a step, on screen and in log.jsonl, and what is odd about it."""

import json
import math
import os
import shlex
import statistics
import sys
import threading
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import torch

from machine.files import finite
from model import Llama
from rope_kernels import rope_backend


def command(script: str, *arguments, processes: int = 1) -> str:
    """Return a command line that works from any folder: python PATH/script, quoted for a shell."""
    path = Path(__file__).resolve().parent.parent / script
    python = ["torchrun", "--nproc_per_node", processes] if processes > 1 else ["python"]
    return shlex.join(map(str, [*python, path, *arguments]))


# ------------------------------------------------------------------------- a stdout that is closed


def outlive_readers() -> None:
    """From here on the run continues if its stdout or stderr is closed.

    After the first write that fails, the text is dropped.
    """
    for number in range(3):  # 2>&- would give its number to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        setattr(sys, name, stream)
        with suppress(OSError, ValueError, AttributeError):  # no file: a caller's own object
            if stream.fileno() == number and not hasattr(stream, "outlives"):
                stream.reconfigure(errors="backslashreplace")
                stream.outlives = True
                stream.write = drop_if_closed(number, stream.write)
                stream.flush = drop_if_closed(number, stream.flush)


def drop_if_closed(number: int, call):
    """Wrap a stream's method: if it fails, /dev/null takes the place of file `number`."""

    def attempt(*args):
        try:
            return call(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    return attempt


# --------------------------------------------------------------------------------- the lines


def json_line(line: dict) -> str:
    return json.dumps(finite(line), allow_nan=False) + "\n"


def read_line(line: bytes, steps: int) -> dict | None:
    """Return a line of log.jsonl; {} if its step is beyond `steps`, None if it is damaged."""
    try:
        found = json.loads(line)
        step, flag = found["step"], found["flag"]
        sound = type(step) is int and step > 0 and (flag is None or type(flag) is str)
        if not sound or not all(type(found[k]) in (int, float, type(None)) for k in WATCHED):
            return None
        if flag != "skipped" and not all(type(found[k]) in (int, float) for k in WATCHED):
            return None
        return found if step <= steps else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_losses(path: Path) -> list[dict]:
    """Return the lines of a log.jsonl, of this version or another, and warn of damaged ones."""
    found, raw = [], path.read_bytes().splitlines()
    for line in raw:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    found = [line for line in found if isinstance(line, dict)]
    if len(found) < len(raw):
        print(f"warning: {path}: {len(raw) - len(found)} damaged lines are left out")
    return found


WATCHED = "loss", "grad_norm"


class Watch:
    """Flags a step in the log: "skipped" (not finite), "spike", or None.

    A spike: loss or gradient norm above 3 times its median over the last 64 steps, 8 at least.
    """

    def __init__(self, lines: list[dict], max_bad: int):
        self.lines, self.max_bad = lines, max_bad

    @property
    def bad(self) -> int:
        """How many of the last steps in a row were skipped."""
        return len(list(takewhile(lambda line: line["flag"] == "skipped", reversed(self.lines))))

    def flag(self, line: dict) -> str | None:
        flag, good = None, [old for old in self.lines[-64:] if old["flag"] != "skipped"]
        for key in WATCHED:
            if not math.isfinite(line[key]):
                flag = "skipped"
            elif len(good) >= 8 and flag is None:
                if line[key] > 3 * statistics.median(old[key] for old in good):
                    flag = "spike"
        self.lines.append(line | {"flag": flag})
        return flag

    def stop_if_lost(self, line: dict, steps: int, keeper) -> None:
        """Raise ValueError after max_bad skipped steps in a row, or if the last step was skipped.

        Nothing is saved: the newest state is from a step that was finite.
        """
        if self.bad >= self.max_bad or (self.bad and line["step"] == steps):
            keeper.sound = False
            values = {k: line[k] for k in ("loss", "grad_norm")}
            remedy = f"Begin again with a smaller --lr than {line['lr']:g}"
            if keeper.saved_step:
                smaller = keeper.resume_command("--lr", "SMALLER", "--resume_anyway")
                remedy += f", or continue after step {keeper.saved_step} with: {smaller}"
            raise ValueError(
                f"step {line['step']}: {values}, {self.bad} steps in a row not finite. {remedy}"
            )


LOSSES = "long short s2l replay kl".split()  # every line of log.jsonl has them, null if not read


def print_header(c, student: Llama, teacher: Llama, streams: dict) -> None:
    parameters = sum(p.numel() for p in student.parameters())
    old, new = teacher.config, student.config
    print(
        f"{c.method}: {c.ckpt} ({parameters:,} parameters), {c.original_len:,} -> "
        f"{c.target_len:,} tokens on {c.device}, {student.embed_tokens.weight.dtype}\n"
        f"rotary: theta {old.rope_theta:g} -> {new.rope_theta:g}, scaling {old.rope_scaling} -> "
        f"{new.rope_scaling}; {rope_backend(torch.device(c.device))}"
    )
    for s in streams.values():
        print(
            f"{s.name:>5}: {s.micro} x {s.batch} x {s.seq_len:,} = {s.tokens:,} tokens a step, "
            + ", ".join(f"weight of {name} {weight:g}" for name, weight in s.weights.items())
        )
    replay = f" + {c.replay_steps} of replay" if c.replay_steps else ""
    print(f"{c.steps}{replay} steps, lr {c.lr:g}, seed {c.seed}, into {c.out_dir}", flush=True)


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss, or as m:ss within an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_forecast(seconds: float, steps: int) -> None:
    """Print how long a CPU will take for the steps to go, and what makes it less."""
    print(
        f"forecast on this CPU: about {span(seconds / steps)} a step, {span(seconds)} for {steps} "
        "steps (within a factor of two or three). Shorter: fewer --steps; a smaller --target_len; "
        "fewer tokens a step by --long_micro, --long_batch, --short_micro, --short_batch, "
        "--s2l_micro, --s2l_batch (all 1: the least)",
        flush=True,
    )


def span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} seconds"


@contextmanager
def pulse(say, seconds: float = 30.0):
    """Call say() every so many seconds while the context is open, however long a pass takes."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(seconds):
            say()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def print_step(line: dict, last: int, eta: float) -> None:
    losses = "  ".join(
        f"{name.removeprefix('loss_')} {value:.4f}"
        for name, value in line.items()
        if name.startswith("loss_") and value is not None
    )
    reserved = ""
    if line.get("reserved_gib"):
        retries = line["alloc_retries"]
        reserved = f" of {line['reserved_gib']:.1f} reserved"
        reserved += f", {retries} allocation retries" if retries else ""
    print(
        f"step {line['step']:>{len(str(last))}}/{last}  {losses}  lr {line['lr']:g}  grad "
        f"{line['grad_norm']:.2f}  {line['tokens'] / line['seconds']:,.0f} tok/s  peak "
        f"{line['peak_gib']:.1f} GiB{reserved}  data {line['data_share']:.1%}  "
        f"ETA {clock(eta)}" + (f"  {line['flag'].upper()}" if line["flag"] else ""),
        flush=True,
    )
