"""The life of a run: its state on disk, written so that a kill at any moment loses nothing.

OUT_DIR/longred.json     what the run is: resolved config, chosen layers, data, code, versions
OUT_DIR/log.jsonl        one object a step
OUT_DIR/checkpoints/     step-NNNNNN/, the newest --keep: state.pt, and manifest.json with the size
                         and checksum of every file beside it; resume takes the newest sound one
OUT_DIR/hf/              the export
OUT_DIR/lock             held by the process at work here; it goes with the process, however it ends

A state is written beside the older ones, flushed to disk, then renamed: a folder without ".partial"
is complete. It is written by a thread while the next step's forward and backward passes run, which
read the weights and leave AdamW's state alone; the next update waits for it. So 96 GB of state
(Llama-3-8B on one GPU) need no second copy in memory, and the disk needs room for --keep + 1.

Under torchrun the weights of student and teacher, gradients and AdamW's state are spread over all
processes (FSDP2) and a state is a folder of shards (torch.distributed.checkpoint) that any number
of processes resumes. Processes take different sequences; with --context C, C of them share each:
every one holds T / C tokens and, inside attention, all T tokens of N / C heads (Ulysses, arXiv
2309.14509). Exact, two dozen lines, any device. torch's own context_parallel is a prototype,
reorders tokens, and has no CPU path to prove it by. Its limit: C divides the kv heads, 8 here.

And, before anything long: does the disk hold it all, does the memory.
"""

import ast
import errno
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import uuid
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import memory
from model import Llama, copy_whole

try:
    import fcntl
except ImportError:  # Windows: two runs in one OUT_DIR are not noticed there
    fcntl = None

GIB = 2**30

# ----------------------------------------------------------------------------------- small files


def write_json(path: Path, content: dict) -> None:
    """Write under a temporary name, flush to disk, rename: readers see the old or the new file."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside it last through a power failure."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def read_run(out_dir: str | os.PathLike) -> dict:
    """OUT_DIR/longred.json. Raises ValueError where there is no run to resume."""
    path = Path(out_dir) / "longred.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--resume {out_dir}: no {path.name} there, so no run to resume") from None
    except ValueError as e:
        raise ValueError(f"--resume {out_dir}: {path} is damaged ({e})") from None


def json_line(line: dict) -> str:
    """A line of log.jsonl; what is not finite is null, for JSON has no name for it."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(finite) + "\n"


def trim_log(path: Path, steps: int) -> list[dict]:
    """Drop the log lines after `steps`, which are about to be run again; returns those kept."""
    lines = []
    with suppress(FileNotFoundError, ValueError):  # a new run; a torn line
        for line in path.read_text(encoding="utf-8").splitlines()[:steps]:
            lines.append(json.loads(line))
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    return lines


# -------------------------------------------------------------------------- what a run depends on

# Fields of Config that a resumed run may have otherwise: none changes a step's numbers beyond how
# they round (or, steps, when a replay begins).
HARMLESS = (
    "ckpt out_dir resume resume_anyway steps cache_dir unit_tokens gpu_gib compile device".split()
)
HARMLESS += "context save_every save_minutes keep max_bad_steps eval_tokens".split()


def code_fingerprints() -> dict[str, str]:
    """{file: hash of what Python runs}, of the files a step is made of; comments do not count."""
    found = {}
    for name in ("longred", "model", "rope_kernels", "data", "memory"):
        path = Path(__file__).with_name(name + ".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        found[path.name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return found


def weight_fingerprints(folder: Path) -> dict[str, str]:
    """{file: size and checksum of its first and last MiB} of a checkpoint's weights and config."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".pth") or path.name in ("config.json", "params.json"):
            size = path.stat().st_size
            with open(path, "rb") as f:
                checksum = zlib.crc32(f.read(2**20))
                f.seek(max(0, size - 2**20))
                found[path.name] = f"{size}-{zlib.crc32(f.read(), checksum):08x}"
    return found


def check_same(saved: dict, now: dict, out_dir: Path, anyway: bool) -> None:
    """Refuse to continue a run as a different one.

    saved, now: {"config" or "data" or "weights" or "code": dict}; what `now` lacks is not compared.
    anyway: print, do not refuse. Raises ValueError naming the first difference.
    """
    found = []
    for part, new in now.items():
        old = saved.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{part} {key} was {old.get(key)}, is {new.get(key)}")
    if found and not anyway:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise ValueError(
            f"--resume {out_dir}: {found[0]}{more}; put back what the run began with, or pass "
            "--resume_anyway to go on with what is here"
        )
    for difference in found:
        print(f"warning: resuming although {difference}")


# ----------------------------------------------------------------------------------------- states


class ChecksummedFile:
    """A file being written, its checksum taken on the way: 96 GB need not be read again.

    After an error nothing more is written and all seems well to the writer, torch's zip archive,
    whose end must not fail a second time; `close` raises it.
    """

    def __init__(self, path: Path):
        self.file, self.size, self.checksum, self.error = open(path, "wb"), 0, 0, None

    def write(self, content) -> int:
        n = memoryview(content).nbytes
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as e:
                self.error = e
        self.size, self.checksum = self.size + n, zlib.crc32(content, self.checksum)
        return n

    def flush(self) -> None:
        pass

    def close(self) -> None:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            self.error = self.error or e
        with suppress(OSError):  # what is left in its buffer
            self.file.close()
        if self.error is not None:
            raise self.error


def file_checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def run_state(student: nn.Module, optimizer) -> dict:
    """All that changes from step to step, by name, without a copy.

    torch.optim.AdamW gets its state here where it has none yet: zeros, as it would make itself.
    """
    state = {"model": {name: p.detach() for name, p in student.named_parameters()}}
    if isinstance(optimizer, memory.AdamW):
        return state | {"optimizer": optimizer.state_dict()}
    for p in student.parameters():
        if not optimizer.state[p]:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
    named = student.named_parameters()
    return state | {"optimizer": {name: dict(optimizer.state[p]) for name, p in named}}


def tensors(state) -> list[Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, dict | list):
        parts = state.values() if isinstance(state, dict) else state
        return [t for part in parts for t in tensors(part)]
    return [state] if isinstance(state, Tensor) else []


def write_state(folder: Path, step: int, state: dict, config: dict, keep: int) -> None:
    """Write the state after `step` steps beside the older ones, then drop all but `keep`.

    Raises ValueError where it cannot be written; the older ones are as they were.
    """
    partial = folder / f"step-{step:06d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        f = ChecksummedFile(partial / "state.pt")
        try:
            torch.save(state, f)
        finally:
            f.close()
        publish(partial, step, config, {"state.pt": [f.size, f.checksum]}, keep)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_save(folder, step, state, e) from None


def signed(manifest: dict) -> dict:
    """With its own checksum in it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def publish(partial: Path, step: int, config: dict, files: dict, keep: int) -> None:
    """Give a complete state its manifest and its name; drop the oldest, the torn and the damaged.

    files: {name: [size, checksum]}, all that lies in `partial`.
    """
    write_json(partial / "manifest.json", signed({"step": step, "config": config, "files": files}))
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync_folder(final.parent)
    kept = sorted(final.parent.glob("step-??????"))[-keep:]
    for old in final.parent.glob("step-*"):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def cannot_save(folder: Path, step: int, state: dict, e: OSError) -> ValueError:
    need = sum(t.nbytes for t in tensors(state))
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "make room" if full else "mend that"
    return ValueError(
        f"cannot save the state after step {step} in {folder}: {e.strerror}; it takes "
        f"{need / GIB:.3g} GiB, {free / GIB:.3g} GiB are free; older states are untouched: "
        f"{reason} and continue with: python longred.py --resume {folder.parent}"
    )


def damage(folder: Path) -> str | None:
    """What is wrong with a saved state; None: every file has its size and checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if set(files) | {"manifest.json"} != {p.name for p in folder.iterdir()}:
            return "files are missing or new"
        if manifest != signed(manifest) or f"step-{manifest['step']:06d}" != folder.name:
            return "manifest.json has not its checksum"
        for name, (size, checksum) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has not its {size:,} bytes"
            if file_checksum(folder / name) != checksum:
                return f"{name} has not its checksum"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"manifest.json cannot be read ({type(e).__name__})"
    return None


def newest_state(out_dir: Path) -> Path | None:
    """The newest sound state; damaged ones are set aside with a warning. None: none was saved.

    Raises ValueError where states were saved and none is sound.
    """
    saved = sorted((out_dir / "checkpoints").glob("step-??????"), reverse=True)
    for folder in saved:
        wrong = damage(folder)
        if wrong is None:
            return folder
        print(f"warning: {folder} is damaged, {wrong}: skipped", file=sys.stderr)
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)  # the next save drops it
    if saved:
        raise ValueError(
            f"--resume {out_dir}: none of the {len(saved)} saved states is sound; remove "
            f"{out_dir / 'checkpoints'} to begin again at step 1"
        )
    return None


def read_state(folder: Path, student: nn.Module, optimizer, size: int = 1) -> None:
    """Load a saved state into student and optimizer, in place, tensor by tensor.

    One process's file or many processes' shards, into one process (size 1) or any number.
    """
    mine, whole = run_state(student, optimizer), folder / "state.pt"
    one_gpu = isinstance(optimizer, memory.AdamW)
    saved = None
    if whole.exists():
        saved = torch.load(whole, map_location="cpu", weights_only=True, mmap=True)
    if one_gpu != (saved is not None and "moments" in saved["optimizer"]):
        raise ValueError(
            f"{folder}: one GPU's state (bf16 weights, remainders) and that of CPUs or many GPUs "
            "(fp32) do not convert; resume as the run began, on one GPU or not"
        )
    with torch.no_grad():
        if saved is None:
            dcp.load(mine, checkpoint_id=folder, no_dist=size == 1)
            return
        if one_gpu:
            optimizer.load_state_dict(saved["optimizer"])
            mine, saved = mine["model"], saved["model"]
        copy_tree(mine, saved)


def copy_tree(mine: dict, saved: dict) -> None:
    assert mine.keys() == saved.keys(), mine.keys() ^ saved.keys()
    for name, value in mine.items():
        if isinstance(value, dict):
            copy_tree(value, saved[name])
        else:
            copy_whole(value, saved[name])


# ------------------------------------------------------------------------------------ being stopped


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag, so that the loop ends between micro-batches.

    Launchers send SIGTERM more than once: another one changes nothing. A second Ctrl-C gives up at
    once; what was saved stays. `number` is None, or the signal that asked for the stop.
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
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        self.number = self.number or number

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Life:
    """One process at work on a run: lock, signals, saves; a context around all of it.

    `step` steps are complete. `sound`: student and optimizer hold exactly those; false while an
    update is under way. An error that finds them sound saves them.
    """

    def __init__(self):
        self.rank, self.size = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.mesh = self.context = None
        self.out_dir = self.lock = self.thread = self.failure = None
        self.step, self.sound = 0, False
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.done_at, self.step_seconds = None, None  # of the last whole step
        self.stop = StopSignal()

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self.thread:
                self.thread.join()
            alone = self.size == 1  # the other processes may be inside a pass
            if alone and isinstance(error, Exception) and self.sound and not self.failure:
                self.save()
                self.hold()
                if self.saved_step:
                    print(f"ended after step {self.step}. {self.how_to_resume()}", flush=True)
        except ValueError as e:
            print(f"longred: {e}", file=sys.stderr)  # beside the error that brought us here
        finally:
            self.stop.__exit__()
            if self.lock:
                self.lock.close()
            if self.size > 1 and dist.is_initialized():
                dist.destroy_process_group()

    def join(self, device: str | None, context: int) -> None:
        """Under torchrun: meet the other processes. context: how many share each sequence."""
        if self.size == 1:
            if context > 1:
                raise ValueError(
                    f"--context {context} needs as many processes: start with torchrun"
                )
            return
        if self.size % context:
            raise ValueError(
                f"--context {context} does not divide torchrun's {self.size} processes"
            )
        cuda = torch.cuda.is_available() and device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Tokenising on one process may keep the others waiting; a dead one ends them by torchrun.
        store = own_names(next(dist.rendezvous("env://"))[0], self.rank, self.size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(hours=4),
            world_size=self.size,
            rank=self.rank,
            store=store,
        )
        kind = "cuda" if cuda else "cpu"
        self.mesh = init_device_mesh(kind, (self.size,))
        self.context = init_device_mesh(kind, (self.size // context, context))
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # one process speaks

    def from_first(self, value):
        """value() as the first process has it; the others wait."""
        found = [value() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def total(self, values: list[float], op: str = "SUM") -> list[float]:
        """Over all processes."""
        if self.size == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, getattr(dist.ReduceOp, op))
        return t.tolist()

    def share(self, n: int) -> tuple[range, int, int]:
        """Which of n sequences this process works on, which part of each, of how many parts.

        Groups of `context` processes get equally many; the last may get numbers beyond n.
        """
        parts = self.context.size(1) if self.context else 1
        each = -(-n * parts // self.size)
        first = self.rank // parts * each
        return range(first, first + each), self.rank % parts, parts

    def shard(self, model: nn.Module) -> None:
        """FSDP2: every block's weights and the rest's are spread over all processes.

        Whole ones exist for a block at a time, in bf16 on a GPU; gradients are averaged in fp32.
        Inputs are not cast: rotary frequencies must stay float64.
        """
        on_gpu = self.mesh.device_type == "cuda"
        bf16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if on_gpu else {}
        policy = MixedPrecisionPolicy(**bf16, cast_forward_inputs=False)
        for block in model.layers:
            if self.context.size(1) > 1:
                block.self_attn.exchange = partial(_Exchange.apply, self.context.get_group(1))
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)

    def claim(self, out_dir: Path, resumed: bool) -> None:
        """Make OUT_DIR ours. Raises ValueError where it is another's or cannot be written."""
        self.out_dir = out_dir
        if self.rank:
            return
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            self.lock = open(out_dir / "lock", "a")
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {out_dir}; wait for it, or pass another --out_dir"
            ) from None
        except OSError as e:
            raise ValueError(
                f"cannot write to --out_dir {out_dir}: {e.strerror}; pass another"
            ) from None
        if not resumed:
            refuse_taken(out_dir)

    def write_about(self, about: dict) -> None:
        if self.rank == 0:
            write_json(self.out_dir / "longred.json", about)

    def begin(self, c, student: nn.Module, optimizer) -> int:
        """Load the newest state, catch signals. Returns the steps behind us."""
        self.c, self.model, self.optimizer = c, student, optimizer
        self.config = {k: v for k, v in vars(c).items() if k not in HARMLESS}
        newest = self.from_first(lambda: newest_state(self.out_dir))
        if newest:
            manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
            check_same(manifest, {"config": self.config}, self.out_dir, c.resume_anyway)
            read_state(newest, student, optimizer, self.size)
            self.step = self.saved_step = manifest["step"]
            print(f"resuming after step {self.step}")
        self.sound = True
        self.stop.__enter__()
        return self.step

    def check_stop(self) -> None:
        """Between micro-batches: end here where a signal asked for it, the last step saved."""
        number = int(self.total([self.stop.number or 0], "MAX")[0])
        if not number:
            return
        self.save()
        self.hold()
        print(f"\nstopped by signal {number} after step {self.step}. {self.how_to_resume()}")
        sys.exit(128 + number)

    @contextmanager
    def update(self):
        """Around optimizer.step(): not before the state being saved is on disk."""
        self.hold()
        self.sound = False
        yield

    def done(self, step: int, log, bad: bool) -> None:
        """`step` is complete and logged: save where one is due. bad: it was skipped."""
        self.step, self.sound = step, True
        now, before = time.monotonic(), self.done_at
        self.done_at, self.step_seconds = now, now - before if before else None
        due = step % self.c.save_every == 0 or step == self.c.steps + self.c.replay_steps
        minutes = (now - self.saved_at) / 60
        late = self.from_first(lambda: 0 < self.c.save_minutes <= minutes)
        if (due or late) and not bad:
            if self.rank == 0:
                os.fsync(log.fileno())
            self.save()

    def save(self) -> None:
        """Begin to write the state after self.step, where it is not saved yet."""
        self.hold()
        if self.saved_step == self.step or not self.c.keep:
            return
        self.saved_step, self.saved_at = self.step, time.monotonic()
        state = run_state(self.model, self.optimizer)
        if self.size > 1:
            return self._write_sharded(self.out_dir / "checkpoints", state)
        self.thread = threading.Thread(target=self._write, args=(self.step, state))
        self.thread.start()

    def _write(self, step: int, state: dict) -> None:
        on_gpu = next(iter(state["model"].values())).is_cuda
        try:  # on a stream of its own: weights are copied between, not after, the passes' kernels
            with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
                write_state(self.out_dir / "checkpoints", step, state, self.config, self.c.keep)
        except Exception as e:
            self.failure = e

    def _write_sharded(self, folder: Path, state: dict) -> None:
        """Every process writes its shards, the first one publishes them; training waits."""
        partial = folder / f"step-{self.step:06d}.partial"

        def prepare():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        self.from_first(prepare)
        try:
            dcp.save(state, checkpoint_id=partial)
        except dcp.api.CheckpointException as e:
            found = (x for x in _causes(e) if isinstance(x, OSError))
            reason = next(found, OSError(0, str(e)[-200:]))
            raise cannot_save(folder, self.step, state, reason) from None
        mine = partial.glob(f"__{self.rank}_*")
        found = [None] * self.size
        dist.all_gather_object(found, {p.name: [p.stat().st_size, file_checksum(p)] for p in mine})

        def finish():
            meta = partial / ".metadata"
            files = {meta.name: [meta.stat().st_size, file_checksum(meta)]}
            for part in found:
                files |= part
            publish(partial, self.step, self.config, files, self.c.keep)

        self.from_first(finish)
        self._say_saved(time.monotonic() - self.saved_at)

    def how_to_resume(self) -> str:
        many = f"torchrun --nproc_per_node {self.size}" if self.size > 1 else "python"
        return f"Continue with: {many} longred.py --resume {self.out_dir}"

    def let_go(self) -> None:
        """Of a sharded model and its optimizer, whose memory the report needs."""
        self.model = self.optimizer = None
        gc.collect()

    def finish(self) -> None:
        """All steps are done and on disk; from here on signals act as usual."""
        self.stop.__exit__()
        self.check_stop()
        self.hold()
        self.sound = False

    def hold(self) -> None:
        """Wait for the state being written. Raises ValueError where that failed."""
        if not self.thread:
            return
        began = time.monotonic()
        self.thread.join()
        self.thread = None
        if self.failure:
            raise self.failure
        self._say_saved(time.monotonic() - began)

    def _say_saved(self, waited: float) -> None:
        share = f", {waited / self.step_seconds:.1%} of a step" if self.step_seconds else ""
        print(
            f"saved the state after step {self.saved_step} in "
            f"{time.monotonic() - self.saved_at:.1f} s; training waited {waited:.2f} s{share}",
            flush=True,
        )


def _causes(e: BaseException):
    """An exception of torch.distributed.checkpoint, and those behind it, of all processes."""
    for failure in e.failures.values():
        error = failure[0]
        while error is not None:
            yield error
            error = error.__cause__ or error.__context__


def own_names(store: dist.Store, rank: int, size: int) -> dist.Store:
    """torchrun's store, under a prefix that only the processes of this start share.

    It outlives torchrun's restarts, so a restarted process may find a dead one's address in it, and
    its count of restarts may differ from node to node. Hence each process says who it is this time,
    and the first one answers it with the prefix, until all have taken that up.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        prefix = store.get(f"prefix/{mine}").decode()  # waits for it
        store.set(f"{prefix}/{rank}", "taken up")
        return dist.PrefixStore(prefix, store)
    missing = set(range(1, size))
    while missing:
        missing = {r for r in missing if not store.check([f"{mine}/{r}"])}
        for r in missing:
            if store.check([f"here/{r}"]):  # perhaps the dead one's: then ask again
                store.set(f"prefix/{store.get(f'here/{r}').decode()}", mine)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


class _Exchange(torch.autograd.Function):
    """All-to-all among the processes that share sequences (Ulysses): what each has of one
    dimension is spread, and another one gathered. Backward: the same, the other way."""

    @staticmethod
    def forward(ctx, group, x, spread: int, gathered: int):
        ctx.args = group, gathered, spread
        parts = torch.stack(x.chunk(group.size(), spread))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), gathered)

    @staticmethod
    def backward(ctx, grad):
        group, spread, gathered = ctx.args
        return None, _Exchange.apply(group, grad.contiguous(), spread, gathered), None, None


def gathered(student: Llama, rank: int) -> Llama | None:
    """A sharded model whole, on the CPU, at the first process; tensor by tensor."""
    with torch.device("meta"):
        whole = Llama(student.config).eval()
    for name, p in student.named_parameters():
        full = p.detach().full_tensor()
        if rank == 0:
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, nn.Parameter(full.cpu()))
    return whole if rank == 0 else None


def refuse_taken(out_dir: Path) -> None:
    """A new run wants an OUT_DIR that can be written and holds no other. Raises ValueError."""
    if (out_dir / "longred.json").exists():
        raise ValueError(
            f"{out_dir} already holds a run; continue it with --resume {out_dir}, or pass another "
            "--out_dir"
        )
    there = out_dir
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to --out_dir {out_dir}: check {there}, or pass another")
    for name in ("hf", "log.jsonl", "checkpoints"):
        if (out_dir / name).exists():
            raise ValueError(f"{out_dir} holds another's {name}; pass another --out_dir")


def after_restart(config):
    """torchrun repeats its command after a failure: continue the run that it began."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and config.out_dir and not config.resume:
        if (Path(config.out_dir) / "longred.json").exists():
            return replace(config, resume=config.out_dir)
    return config


# -------------------------------------------------------------------------------- steps gone wrong


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

    def stop_if_lost(self, line: dict, steps: int, life: Life) -> None:
        """After max_bad skipped steps in a row, or where the run would end on one: ValueError.

        Nothing is saved: the newest state is from a step that was finite.
        """
        if self.bad >= self.max_bad or (self.bad and line["step"] == steps):
            life.sound = False
            values = {k: line[k] for k in ("loss", "grad_norm")}
            raise ValueError(
                f"step {line['step']}: {values}, {self.bad} steps in a row not finite; the newest "
                f"good state is that after step {life.saved_step}: try a smaller --lr than "
                f"{line['lr']:g}. {life.how_to_resume()}"
            )


# ------------------------------------------------------------------------------------- preflight


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
    free += sum(p.stat().st_size for p in (out_dir / "checkpoints").rglob("*"))  # these will go
    if export + states > free:
        raise ValueError(
            f"--out_dir {out_dir} needs {_gb(export + states)} (export {_gb(export)}, --keep + 1 "
            f"states to resume from {_gb(states)}), its disk has {_gb(free)} free; make room, pass "
            "another --out_dir or a smaller --keep (0: save none)"
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
