"""The life of a run: its state on disk, written so that a kill at any moment loses nothing.

OUT_DIR/longred.json     what the run is: resolved config, chosen layers, data, versions
OUT_DIR/log.jsonl        one object a step
OUT_DIR/checkpoints/     step-NNNNNN/state.pt, the newest two; resume takes the newest
OUT_DIR/hf/              the export
"""

import json
import os
import shutil
import signal
from pathlib import Path

import torch


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that the loop ends between micro-batches.

    A second signal acts as usual. `number` is None, or the signal that asked for the stop.
    """

    def __init__(self):
        self.number = None
        self.previous = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._flag)
            except ValueError:  # not the main thread: whoever called us owns the signals
                pass
        return self

    def _flag(self, number, frame):
        self.number = number
        self.__exit__()

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def write_json(path: Path, content: dict) -> None:
    """Write under a temporary name, flush to disk, rename: readers see the old or the new file."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def read_run(out_dir: str | os.PathLike) -> dict:
    """OUT_DIR/longred.json. Raises ValueError where there is no run to resume."""
    path = Path(out_dir) / "longred.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--resume {out_dir}: no {path.name} there, so no run to resume") from None
    except ValueError as e:
        raise ValueError(f"--resume {out_dir}: {path} is damaged ({e})") from None


def save_state(out_dir: Path, step: int, state: dict, keep: int = 2) -> None:
    """Write the state after `step` steps beside the older ones, then drop all but `keep`."""
    folder = out_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    if final.exists():
        return
    partial = folder / f"step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with open(partial / "state.pt", "wb") as f:
        torch.save({"step": step, **state}, f)
        f.flush()
        os.fsync(f.fileno())
    partial.rename(final)
    for old in sorted(folder.glob("step-??????"))[:-keep]:
        shutil.rmtree(old)


def load_state(out_dir: Path) -> dict | None:
    """The newest complete state, on the CPU and memory-mapped; None before the first save."""
    saved = sorted((out_dir / "checkpoints").glob("step-??????"))
    if not saved:
        return None
    try:
        return torch.load(saved[-1] / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise ValueError(
            f"{saved[-1]} is damaged ({type(e).__name__}); remove that folder and resume again, "
            "from the one before it"
        ) from None


def trim_log(path: Path, steps: int) -> None:
    """Drop the log lines after `steps`: those steps are about to be run again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
