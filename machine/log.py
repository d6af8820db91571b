"""The log of a run: one line a step, on screen and in log.jsonl, and what is odd about it."""

import json
import math
import statistics
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import torch

from model import Llama
from rope_kernels import rope_backend


def json_line(line: dict) -> str:
    """A line of log.jsonl; what is not finite is null, for JSON has no name for it."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(finite) + "\n"


def trim_log(path: Path, steps: int) -> list[dict]:
    """Drop the log lines after `steps`, about to be run once more; returns those before."""
    lines = []
    with suppress(FileNotFoundError, ValueError):  # a new run; a torn line
        for line in path.read_text(encoding="utf-8").splitlines()[:steps]:
            lines.append(json.loads(line))
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    return lines


class Watch:
    """Flags a step in the log: "skipped" (not finite), "spike", or None.

    A spike: loss or gradient norm above 3 times its median over the last 64 steps, 8 at least.
    """

    def __init__(self, lines: list[dict], max_bad: int):
        self.lines, self.max_bad = lines, max_bad

    @property
    def bad(self) -> int:
        """Steps skipped in a row, up to now."""
        return len(list(takewhile(lambda line: line["flag"] == "skipped", reversed(self.lines))))

    def flag(self, line: dict) -> str | None:
        flag, good = None, [old for old in self.lines[-64:] if old["flag"] != "skipped"]
        for key in ("loss", "grad_norm"):
            if not math.isfinite(line[key]):
                flag = "skipped"
            elif len(good) >= 8 and flag is None:
                if line[key] > 3 * statistics.median(old[key] for old in good):
                    flag = "spike"
        self.lines.append(line | {"flag": flag})
        return flag

    def stop_if_lost(self, line: dict, steps: int, keeper) -> None:
        """After max_bad skipped steps in a row, or where the run would end on one: ValueError.

        Nothing is saved: the newest state is from a step that was finite.
        """
        if self.bad >= self.max_bad or (self.bad and line["step"] == steps):
            keeper.sound = False
            values = {k: line[k] for k in ("loss", "grad_norm")}
            raise ValueError(
                f"step {line['step']}: {values}, {self.bad} steps in a row not finite; the newest "
                f"good state is that after step {keeper.saved_step}: try a smaller --lr than "
                f"{line['lr']:g}. {keeper.how_to_resume()}"
            )


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
            f"weight {s.weight:g}"
        )
    replay = f" + {c.replay_steps} of replay" if c.replay_steps else ""
    print(f"{c.steps}{replay} steps, lr {c.lr:g}, seed {c.seed}, into {c.out_dir}", flush=True)


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
        f"ETA {eta // 60:.0f}:{eta % 60:02.0f}"
        + (f"  {line['flag'].upper()}" if line["flag"] else ""),
        flush=True,
    )
