"""The life of a run: its state on disk, written so that a kill at any moment loses nothing.

OUT_DIR/longred.json     what the run is: resolved config, chosen layers, data, versions
OUT_DIR/log.jsonl        one object a step
OUT_DIR/checkpoints/     step-NNNNNN/state.pt, the newest two; resume takes the newest
OUT_DIR/hf/              the export

And, before anything long: does the disk hold it all, does the memory.
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


# ------------------------------------------------------------------------------------- preflight


def parameter_count(model) -> int:
    """Parameters of a ModelConfig's network, in closed form: nothing is built. Biases left out."""
    attention = 2 * model.d_model * (model.n_heads + model.n_kv_heads) * model.head_dim
    block = attention + 3 * model.d_model * model.d_ff + 2 * model.d_model
    embeddings = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    return embeddings + model.n_layers * block + model.d_model


def activation_bytes(model, tokens: int, recompute: bool) -> int:
    """About what one forward pass keeps for backward in fp32, at `tokens` tokens.

    A block keeps about 9 vectors of width d_model (inputs and outputs of norms and attention, q, k,
    v) and 4 of width d_ff (SmolLM2's shape, 6 layers, 512 tokens: 139 MB here, 140 MB measured).
    With recompute it keeps its input only, and one block at a time is whole.
    """
    block = 4 * tokens * (9 * model.d_model + 4 * model.d_ff)
    if not recompute:
        return model.n_layers * block
    return 4 * tokens * model.d_model * model.n_layers + block


def check_disk(out_dir: Path, export: int, states: int) -> None:
    """ValueError unless out_dir's disk has room for the export and the states, in bytes."""
    there = out_dir.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    if export + states > free:
        raise ValueError(
            f"--out_dir {out_dir} needs {_gb(export + states)} (export {_gb(export)}, states to "
            f"resume from {_gb(states)}), its disk has {_gb(free)} free; pass a folder on a larger "
            "disk, or a larger --save_every"
        )


def check_memory(weights: int, activations: int) -> None:
    """ValueError unless a run on the CPU fits what is free; weights: with gradients and AdamW."""
    free = available_memory()
    if free is not None and weights + activations > free:
        raise ValueError(
            f"memory: about {_gb(weights + activations)} needed (weights, teacher, gradients and "
            f"AdamW {_gb(weights)}, activations {_gb(activations)}), {_gb(free)} are free; try "
            "--recompute, a smaller --unit_tokens or --target_len, or a machine with more"
        )


def available_memory() -> int | None:
    """Bytes this process can still take: the system's, within its container's limit.

    None where neither can be read (macOS, Windows).
    """
    free = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            free.append(int(limit) - int(stat["anon"]))
    except (OSError, KeyError, ValueError):
        pass
    return min(free, default=None)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
