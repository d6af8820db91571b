"""Keeping a run from being lost: the lock on OUT_DIR, signals, and when a state is saved.

A single process writes a state in a thread while the next step's passes run. They read the weights
and do not touch AdamW's state; the next update waits for the thread. So the 96 GB of state of
Llama-3-8B on one GPU need no second copy in memory. With several processes each writes its shard
and training waits, because they have to agree that all is written.
"""

import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote

import torch
from torch import nn

from machine import states
from machine.checkpoints import checkpoint_files, drop_checkpoint
from machine.files import free_name, lock_folder, unfinished
from machine.log import command
from machine.many import Processes, is_silent


def interrupt(number, frame) -> None:
    """Handle Ctrl-C for a command: this one ends it, and another does so at once.

    An exception for the second one could be lost, or printed, inside a clean-up: a join, a flush, a
    close. What a process leaves behind when it ends here, a kill leaves too.
    """
    signal.signal(number, end_at_once)
    raise KeyboardInterrupt


def end_at_once(number, frame) -> None:
    os._exit(128 + number)


@contextmanager
def command_line(name: str, argv: list[str] | None):
    """End a command as its user expects: an error of the user's by one line, Ctrl-C by 130.

    argv: as `main` was given it; None: the process is this command's, and so is its Ctrl-C.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        raise SystemExit(last_words(name, e)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def last_words(name: str, error: Exception) -> str | int:
    """How a user's error ends: one line, said by one process of each machine."""
    if is_silent():
        return 1
    line = " ".join(str(error).split()) or "out of memory"
    if isinstance(error, OSError) and not error.filename:
        line += "; a disk or a pipe that this run writes to gave that error"
    return f"{name}: {line}"


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag: the loop ends between micro-batches.

    Launchers send SIGTERM more than once: another one changes nothing. A second Ctrl-C gives up at
    once; what was saved stays. A SIGHUP that was ignored at the start (nohup) stays so. `number` is
    None, or the signal that asked for the stop; a command keeps these handlers to its end then.
    """

    def __init__(self):
        self.number = None
        self.previous = {}

    def __enter__(self) -> "StopSignal":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            try:
                self.previous[number] = signal.signal(number, self._flag)
            except ValueError:  # not the main thread: whoever called us owns the signals
                pass
        return self

    def _flag(self, number, frame):
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        self.number = self.number or number
        if number == signal.SIGINT and self.in_command:
            signal.signal(number, end_at_once)

    @property
    def in_command(self) -> bool:
        """Return whether the process is one of our commands, not a program that calls train."""
        return self.previous.get(signal.SIGINT) is interrupt

    def __exit__(self, *exc):
        if not (self.number and self.in_command):
            for number, handler in self.previous.items():
                signal.signal(number, handler)


# What a run makes in its OUT_DIR, except the lock.
MADE = ("longred.json", "log.jsonl", "report.md", "hf", "checkpoints")
OURS = r"(longred\.json|log\.jsonl|report\.md)(\.\d+\.partial\d*)?"  # killed while writing it


def clear_run(out_dir: Path, ckpt: str) -> None:
    """Remove a run of `ckpt` that its caller will repeat, or nothing at all.

    Raises ValueError, before anything is removed, if another process is running it, if it is of
    another checkpoint, or if the folder holds other files.
    """
    with lock_folder(out_dir, "--out_dir"):
        record = out_dir / "longred.json"
        if record.exists() and not same_place(states.read_run(out_dir)["config"], out_dir, ckpt):
            raise ValueError(f"{out_dir} holds another run, which stays: pass another --out_dir")
        states_, exports = out_dir / "checkpoints", [out_dir / "hf", *unfinished(out_dir / "hf")]
        files = [p for p in out_dir.iterdir() if re.fullmatch(OURS, p.name) and p.is_file()]
        ours = [out_dir / "lock", *files, states_, *exports]
        ours += [p for state in states_.glob("step-*") for p in (state, *states.parts_of(state))]
        ours += [path for export in exports for path in checkpoint_files(export)]
        if others := sorted(set(out_dir.rglob("*")) - set(ours)):
            raise ValueError(
                f"{others[0]} is in the way, and not of the run in {out_dir}: move it, or pass "
                "another --out_dir"
            )
        for state in states_.glob("step-*"):
            states.drop(state)
        if states_.is_dir():
            states_.rmdir()
        for export in exports:
            drop_checkpoint(export)
        for path in files:
            path.unlink()


def same_place(config: dict, out_dir: Path, ckpt: str) -> bool:
    """Return whether a run's checkpoint is this one, also if both were moved together."""
    was = os.path.relpath(str(config.get("ckpt")), str(config.get("out_dir")))
    return was == os.path.relpath(Path(ckpt).resolve(), out_dir)


def refuse_taken(out_dir: Path) -> None:
    """Raise ValueError unless OUT_DIR can be written and holds no other run."""
    for name in ("config.json", "params.json"):
        if (out_dir / name).exists():
            raise ValueError(
                f"{out_dir} is a checkpoint's own folder (it holds {name}), which a run would hide "
                "its export behind; pass another --out_dir"
            )
    if (out_dir / "longred.json").exists():
        raise ValueError(
            f"{out_dir} already holds a run; continue it with --resume {quote(str(out_dir))}, or "
            "pass another --out_dir"
        )
    there = out_dir
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to --out_dir {out_dir}: check {there}, or pass another")
    for name in MADE:
        if (out_dir / name).exists():
            raise ValueError(f"{out_dir} holds another's {name}; pass another --out_dir")


def refuse_in_the_way(out_dir: Path) -> None:
    """Raise ValueError if a foreign file has the name of a resumed run's export or report.

    The same check at the end would come after all the steps.
    """
    hf, report = out_dir / "hf", out_dir / "report.md"
    others = hf.exists() and not (hf / "config.json").is_file()
    if others and (not hf.is_dir() or any(hf.iterdir())):
        raise ValueError(f"{hf} is in the way, and no export: move it, then resume")
    first = b""
    if report.is_file():
        with open(report, "rb") as f:
            first = f.readline(200)
    if os.path.lexists(report) and not re.match(rb"# \w+: [\d,]+ -> [\d,]+\s", first):
        raise ValueError(f"{report} is in the way, and no run wrote it: move it, then resume")


def check_steps(done: int, c, before: dict) -> None:
    """Raise ValueError if a resumed run's --steps is below the number of steps done.

    before: the run's config up to now. Once the replay that follows --steps has begun, --steps
    cannot change.
    """
    replay, old = c.replay_steps, before.get("steps", c.steps)
    least = min(c.steps, old) if replay and c.steps != old else c.steps + replay
    if done > least:
        raise ValueError(
            f"--steps {c.steps}: {done} steps are done, {max(0, done - old)} of them replay, and "
            f"none is undone; leave --steps out (the run has {old}), or pass more where no replay "
            "has begun"
        )


class Keeper:
    """Keeps a run from being lost: the lock on OUT_DIR, signals, and the states to resume from.

    `step` steps are complete. `sound`: student and optimizer hold exactly those; false while an
    update is under way. An error that finds them sound saves them.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.out_dir = self.lock = self.thread = self.failure = None
        self.step, self.sound = 0, False
        self.saved_step, self.saved_at, self.save_seconds = 0, time.monotonic(), 0.0
        self.done_at, self.step_seconds = None, None  # of the last whole step
        self.stop = StopSignal()

    def claim(self, out_dir: Path, resumed: bool) -> None:
        """Lock OUT_DIR. Raises ValueError if another run has it or it cannot be written."""
        self.out_dir = out_dir

        def take():
            self.lock = lock_folder(out_dir, "--out_dir")
            if not resumed:
                refuse_taken(out_dir)

        self.processes.from_rank_0(take)

    def load(self, c, config: dict, before: dict, student: nn.Module, optimizer) -> int:
        """Load the newest state and catch signals from here on. Returns the number of steps done.

        config: of c, what a state must have been made with. before: the config that the run had.
        """
        self.c, self.config, self.model, self.optimizer = c, config, student, optimizer
        newest = self.processes.from_rank_0(lambda: states.newest_state(self.out_dir))
        if newest:
            manifest = states.read_manifest(newest)
            check_steps(manifest["step"], c, before)
            states.check_same(manifest, {"config": config}, self.out_dir, c.resume_anyway)
            states.read_state(newest, student, optimizer)
            self.step = self.saved_step = manifest["step"]
            print(f"resuming after step {self.step}")
        self.sound = True
        self.stop.__enter__()
        return self.step

    def check_stop(self) -> None:
        """Save the last step and exit if a signal asked for it. Called between micro-batches."""
        number = int(self.processes.total([self.stop.number or 0], "MAX")[0])
        if not number:
            return
        self.save()
        self.wait()
        saved = f"Continue with: {self.resume_command()}"
        saved = saved if self.c.keep else "Nothing was saved: --keep is 0."
        print(f"\nstopped by signal {number} after step {self.step}. {saved}")
        sys.exit(128 + number)

    def before_update(self) -> None:
        """Wait for a state that is being saved: optimizer.step() overwrites what it holds."""
        self.wait()
        self.sound = False

    def step_done(self, step: int, log, last: int, bad: bool) -> None:
        """Note that `step` of `last` is complete and logged; save a state if one is due.

        bad: the step was skipped, because it was not finite.
        """
        self.step, self.sound = step, True
        now, before = time.monotonic(), self.done_at
        self.done_at, self.step_seconds = now, now - before if before else None
        due = step % self.c.save_every == 0 or step == last
        minutes = (now - self.saved_at) / 60
        late = self.processes.from_rank_0(lambda: 0 < self.c.save_minutes <= minutes)
        if (due or late) and not bad:
            if self.processes.rank == 0:
                os.fsync(log.fileno())
            self.save()

    def save(self) -> None:
        """Begin to write the state after self.step, unless it is saved already."""
        self.wait()
        if self.saved_step == self.step or not self.c.keep:
            return
        self.saved_step, self.saved_at = self.step, time.monotonic()
        state = states.run_state(self.model, self.optimizer)
        if self.processes.size > 1:
            self._write(*state)
            self._say_saved(self.save_seconds)
        else:
            self.thread = threading.Thread(target=self._write_in_thread, args=state)
            self.thread.start()

    def _write_in_thread(self, tensors: dict, words: dict) -> None:
        gpu = next(iter(tensors.values())).device
        try:  # on a stream of its own: weights are copied between, not after, the passes' kernels
            with ExitStack() as stack:
                if gpu.type == "cuda":  # a thread begins on GPU 0
                    stack.enter_context(torch.cuda.device(gpu))
                    stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
                self._write(tensors, words)
        except Exception as e:
            self.failure = e

    def _write(self, tensors: dict, words: dict) -> None:
        """Write the state next to the older ones, then remove all but --keep.

        If one process cannot write, raises ValueError in every process and leaves older states.
        """
        step, rank = self.saved_step, self.processes.rank
        folder, name = self.out_dir / "checkpoints", f"shard-{rank:05d}.safetensors"
        wished = folder / f"step-{step:06d}.partial"

        def attempt(write):  # the others must not wait for one that failed
            try:
                return write()
            except (OSError, ValueError) as e:
                return e.__cause__ if isinstance(e.__cause__, OSError) else e

        def prepare() -> Path:
            states.drop(wished)
            free = free_name(wished)  # foreign files may keep `wished` from being removed
            free.mkdir(parents=True)
            return free

        def finish(files: dict):
            manifest = {"step": step, "config": self.config, "optimizer": words, "files": files}
            states.publish(partial, manifest, self.c.keep)

        partial = self.processes.from_rank_0(lambda: attempt(prepare))
        failed = partial if isinstance(partial, Exception) else None
        if not failed:
            mine = attempt(lambda: {name: states.write_shard(partial / name, tensors)})
            files = {}
            for part in self.processes.everyone(mine):
                if isinstance(part, Exception):
                    failed = part
                else:
                    files |= part
        if not failed:
            failed = self.processes.from_rank_0(lambda: attempt(lambda: finish(files)))
        if failed:
            if rank == 0 and isinstance(partial, Path):
                states.drop(partial)
            raise states.cannot_save(folder, step, sum(t.nbytes for t in tensors.values()), failed)
        self.save_seconds = time.monotonic() - self.saved_at

    def resume_command(self, *flags: str) -> str:
        """Return the command that continues this run; of several nodes, what each one runs."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes.size))
        return command("longred.py", "--resume", self.out_dir, *flags, processes=here)

    def finish(self) -> None:
        """End the steps: the last state is on disk, and signals act as usual again."""
        self.stop.__exit__()
        self.check_stop()
        self.wait()
        self.sound = False
        self.model = self.optimizer = None  # the report needs their memory

    def wait(self) -> None:
        """Wait for the state that is being written. Raises ValueError if that failed."""
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
            f"{self.save_seconds:.1f} s; training waited {waited:.2f} s{share}",
            flush=True,
        )

    def close(self, error: BaseException | None) -> None:
        """End the run and release its lock. error: what ended it; finished steps are saved then."""
        try:
            if self.thread:
                self.thread.join()
            alone = self.processes.size == 1  # the other processes may be inside a pass
            if alone and isinstance(error, Exception) and self.sound and not self.failure:
                self.save()
                self.wait()
                if self.saved_step:
                    resume = self.resume_command()
                    print(f"ended after step {self.step}. Continue with: {resume}", flush=True)
        except ValueError as e:
            print(f"longred: {e}", file=sys.stderr)  # in addition to the error that ended the run
        finally:
            self.stop.__exit__()
            if self.lock:
                self.lock.close()
