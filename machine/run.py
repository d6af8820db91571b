"""The one door between the method and its machine: longred.py uses all of machine/ through `Run`.

A Run opens what a run needs, hands out this process's part of each step, and between steps logs,
saves and stops. It knows no loss: what is learnt, and how, stands in longred.py.

    settings.py     flags, the paper's defaults, what is refused;  command_line.py
    plan.py         what fits: disk, memory, the fastest plan for one GPU
    memory.py       that plan at work: AdamW in host memory, recomputing, tiles, a visiting teacher
    states.py       states on disk;  keeper.py: when they are saved, signals, the lock;  log.py
    many.py         torchrun: weights in shards, sequences shared out
    corpus.py       text of any kind -> token files;  samples.py: the checkpoint's own
    tokenizer.py, checkpoints.py    every format
"""

import os
import platform
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
from machine import log, memory, plan, samples, states
from machine.checkpoints import resolve_checkpoint
from machine.command_line import parse_args  # noqa: F401, for longred.py
from machine.keeper import Keeper, refuse_taken
from machine.many import Processes, after_restart, whole_number
from machine.memory import in_chunks  # noqa: F401, for longred.py
from machine.settings import (  # noqa: F401, for longred.py
    HARMLESS,
    Config,
    default_theta,
    opt,
    resolve,
    resumed_config,
    rope_scaling,
    source_shares,
)
from model import Llama, load_checkpoint, load_config, save_checkpoint


class Run:
    """One process at work on a run, from its settings to its export; a context around all of it."""

    def __init__(self):
        self.processes = Processes()
        self.keeper = Keeper(self.processes)
        self.once = self.processes.from_rank_0  # what one process does for all
        self.plan = self.one_gpu = None  # of the memory of one GPU; None on a CPU or on many
        self.resumed = None  # longred.json of the run that goes on
        self.data_seconds = 0.0  # waited for text in this step
        self.own = {}  # the source self:N -> its file and cost

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.keeper.close(error)
        self.processes.leave()
        if isinstance(error, torch.OutOfMemoryError):
            raise ValueError(
                f"{str(error).splitlines()[0]} Go on, or begin anew, with a --gpu_gib some GiB "
                "below the GPU peak of the memory plan, or a smaller --unit_tokens"
            ) from error

    # ---------------------------------------------------------------------------- before step 1

    def open(self, config: Config) -> Config:
        """The settings, all filled in. Raises ValueError, one line, for what cannot work."""
        config = after_restart(config)
        if config.resume:
            self.resumed = states.read_run(config.resume)
            config = resumed_config(self.resumed["config"], config)
        self.processes.join(config.device, config.context or 1)
        if self.resumed:
            self.keeper.claim(Path(config.resume), resumed=True)
        self.source = resolve_checkpoint(config.ckpt)
        self.original = load_config(self.source)
        self.c = c = resolve(config, self.original, self.source)
        self.out_dir = Path(c.out_dir)
        if not self.resumed:
            self.once(lambda: refuse_taken(self.out_dir))
        if c.device.startswith("cuda:"):
            torch.cuda.set_device(c.device)
        # A GPU's attention takes nothing wider than bf16. Weights are fp32 (FSDP casts shards as it
        # gathers them), but under a plan, whose AdamW holds the rest of their digits.
        self.compute = torch.bfloat16 if c.device.startswith("cuda") else torch.float32
        self.stored = torch.float32
        return c

    def check(self, streams: dict) -> None:
        """Refuse a run that its disk or its memory cannot hold; on a GPU print and take its plan.

        Sets how many sequences of each stream go into one forward pass.
        """
        c, alone = self.c, self.processes.size == 1
        for s in streams.values():
            s.rows = min(s.batch, max(1, c.unit_tokens // s.seq_len))
        self.streams = streams
        self.once(lambda: plan.preflight(c, self.original, streams.values(), alone))
        self.plan = self.plan_memory() if alone else None
        if self.plan:
            self.stored = torch.bfloat16
            for s in streams.values():
                s.rows = self.plan.units[s.name].batch
            print(self.plan.table(), flush=True)

    def plan_memory(self) -> plan.Plan | None:
        """On one GPU: the memory table, and what follows from it."""
        c = self.c
        if not c.device.startswith("cuda"):
            return None
        units = [
            plan.Unit(s.name, s.rows, s.seq_len, s.micro * -(-s.batch // s.rows), s.taps, s.heads)
            for s in self.streams.values()
        ]
        room = int(c.gpu_gib * plan.GIB) if c.gpu_gib else plan.gpu_room()
        moments = torch.bfloat16 if c.moments == "bf16" else torch.float32
        return plan.make_plan(
            self.original, units, room, plan.available_memory(), moments, c.compile
        )

    def open_text(self, streams: dict):
        """Tokenise, once, on one process, and open every stream's text. Returns the tokenizer."""
        c = self.c
        tokenizer = data.load_tokenizer(self.source, c.add_eos)
        tokenizer.check_fits(self.original.vocab_size)

        def open_stream(s) -> data.Stream:
            specs = getattr(c, f"{s.name}_data")
            text = self.own_text(specs, tokenizer)
            corpus = data.tokenize(text, tokenizer, c.cache_dir, s.name, c.skip_bad_lines)
            only_long = (c.min_doc_len, c.length_upsample) if s.name == "long" else (0, 1.0)
            settings = corpus, s.name, c.seed, s.batch, s.seq_len, *only_long
            shares = source_shares(c, specs)
            if not shares:
                return data.Stream(*settings)
            return data.Mixture([data.Stream(*settings, i) for i in range(len(specs))], shares)

        if self.processes.size > 1:
            self.once(lambda: [open_stream(s) for s in streams.values()] and None)
        for s in streams.values():
            s.text = open_stream(s)
            print(s.text.describe(s.micro * len(s.steps)))
        self.record = {
            "data": {name: s.text.corpus.fingerprint for name, s in streams.items()},
            "weights": states.weight_fingerprints(self.source),
            "own_samples": self.own,
        }
        if self.resumed:
            states.check_same(self.resumed, self.record, self.out_dir, c.resume_anyway)
        self.record["code"] = states.code_fingerprints()
        self.record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        return tokenizer

    def own_text(self, specs: list[str], tokenizer) -> list[str]:
        """A list of sources, `self` in it replaced by the file of the checkpoint's own samples."""
        for spec in specs:
            n = samples.count(spec)
            if n and spec not in self.own:
                asked = sum(
                    s.tokens * len(s.steps)
                    for s in self.streams.values()
                    if spec in getattr(self.c, f"{s.name}_data")
                )
                load = partial(self.load, whole=True)
                more = self.source, self.original, load, tokenizer, asked
                path, cost = samples.own_samples(self.c, n, *more)
                self.own[spec] = {"file": path} | cost
        return [self.own[spec]["file"] if spec in self.own else spec for spec in specs]

    def load(self, theta=None, scaling=None, whole: bool = False) -> Llama:
        """The checkpoint's model, its rotary rescaled; over many processes in shards, or whole."""

        def prepare(model: Llama) -> None:  # while it is empty
            if self.c.device == "cpu":
                memory.pad_heads(model)
            if self.processes.size > 1 and not whole:
                self.processes.shard(model)

        dtype = self.compute if whole else self.stored
        return load_checkpoint(self.source, theta, scaling, self.c.device, dtype, prepare)

    def optimizer(self, student: Llama, teacher: Llama):
        """AdamW for this machine; how the blocks of the student run is settled with it."""
        c = self.c
        adamw = c.lr, (c.beta1, c.beta2), 1e-8, c.weight_decay
        self.student = student
        if self.plan:
            self.one_gpu = memory.OneGPU(self.plan, student, teacher, *adamw)
            self.adamw = self.one_gpu.optimizer
        else:
            self.adamw = torch.optim.AdamW(student.parameters(), *adamw)
            if c.recompute or self.processes.size > 1:
                memory.apply_policy(student, plan.Policy())  # every block is recomputed
        log.print_header(c, student, teacher, self.streams)
        return self.adamw

    # ------------------------------------------------------------------------------- the steps

    def steps(self, last: int):
        """Yield the number of each step from the newest state on; between them log, save, stop."""
        c, keeper = self.c, self.keeper
        if not self.resumed:  # from here on OUT_DIR is ours
            keeper.claim(self.out_dir, resumed=False)
        self.record["config"] = asdict(c)
        config = {k: v for k, v in self.record["config"].items() if k not in HARMLESS}
        first = keeper.load(c, config, self.student, self.adamw)
        self.note_changed_code(first)
        self.write_record()
        logged = self.once(lambda: log.trim_log(self.out_dir / "log.jsonl", first))
        self.watch = log.Watch(logged, c.max_bad_steps)
        began = time.monotonic()
        with open(os.devnull if self.processes.rank else self.out_dir / "log.jsonl", "a") as lines:
            for step in range(first, last):
                step_began, self.data_seconds = time.monotonic(), 0.0
                yield step
                seconds = time.monotonic() - step_began
                line = {"step": step + 1, **self.line, "seconds": round(seconds, 3)}
                line["data_share"] = round(self.data_seconds / seconds, 4)
                lines.write(log.json_line(line))
                lines.flush()
                left = (time.monotonic() - began) / (step + 1 - first) * (last - step - 1)
                if step == first and left > 600:
                    print(f"about {left / 3600:.1f} hours to go, at the pace of this first step")
                log.print_step(line, last, left)
                keeper.step_done(step + 1, lines, last, self.watch.bad)
                self.watch.stop_if_lost(line, last, keeper)
        self.adamw = None
        keeper.finish()

    def note_changed_code(self, first: int) -> None:
        """Say, and record for the report, which files a resumed run finds changed."""
        old = self.resumed or {}
        self.record["code_changes"] = old.get("code_changes", [])
        if old and (files := states.changed_code(old["code"], self.record["code"])):
            self.record["code_changes"].append({"after_step": first, "files": files})

    def write_record(self) -> None:
        if self.processes.rank == 0:
            states.write_json(self.out_dir / "longred.json", self.record)

    def batches(self, stream, step: int, read):
        """This process's part of a step's sequences, up to stream.rows in each Batch.

        read(stream, index): micro-batch number index, as ids (B, T + 1) and positions (B, T) or
        None. Shares sum to 1 over the batches of all processes, times the number of processes,
        since gradients are averaged over those; sequences are equally long, so a share is one over
        sequences. With nothing left to do a process repeats a sequence, as share 0: FSDP needs it.
        """
        if self.one_gpu:
            self.one_gpu.ready(stream.name)
        device, n = self.c.device, stream.micro * stream.batch
        mine, piece, pieces = self.processes.share(n)
        size = stream.seq_len // pieces
        part = slice(piece * size, (piece + 1) * size)  # of a sequence, in tokens
        indices = torch.arange(part.start, part.stop, device=device)
        loaded = -1  # micro-batch
        for start in range(0, len(mine), stream.rows):
            real = [j for j in mine[start : start + stream.rows] if j < n]
            ids, positions = [], []
            for j in real or [n - 1]:
                micro, row = divmod(j, stream.batch)
                if micro != loaded:
                    loaded, began = micro, time.monotonic()
                    whole_ids, whole_positions = read(stream, step * stream.micro + micro)
                    self.data_seconds += time.monotonic() - began
                ids.append(whole_ids[row, part.start : part.stop + 1])
                positions += [] if whole_positions is None else [whole_positions[row, part]]
            ids = torch.stack(ids).to(device)
            positions = torch.stack(positions).to(device) if positions else indices
            share = len(real) / (n * pieces) * self.processes.size
            self.keeper.check_stop()
            yield data.Batch(ids[:, :-1], ids[:, 1:], indices, positions, share)

    def means(self, means: dict[str, Tensor | None]) -> dict[str, float | None]:
        """Over all processes; the one moment of a step at which numbers come from the GPU."""
        read = {name: float(x) for name, x in means.items() if x is not None}
        totals = (x / self.processes.size for x in self.processes.total([*read.values()]))
        return means | dict(zip(read, totals, strict=True))

    def may_update(self, total: float, means: dict[str, float | None], norm: Tensor) -> bool:
        """Whether this step counts: not where it is not finite. Waits for a state being saved.

        total: the weighted sum that is trained; means: the unweighted losses of the step.
        """
        read = [s for s in self.streams.values() if means[s.name] is not None]
        self.line = {
            "loss": total,
            **{f"loss_{name}": mean for name, mean in means.items()},
            "lr": self.adamw.param_groups[0]["lr"],
            "grad_norm": whole_number(norm),
            "tokens": sum(s.tokens for s in read),
            "peak_gib": round(plan.peak_gib(self.c.device), 2),
        }
        self.line["flag"] = self.watch.flag(self.line)
        if self.line["flag"] == "skipped":
            return False
        self.keeper.before_update()
        return True

    # ----------------------------------------------------------------------------- after the last

    def gather(self, student: Llama, teacher: Llama) -> tuple[Llama, Llama]:
        """Both whole, here; in all but the first process without memory, to be left alone."""
        if self.one_gpu:
            self.one_gpu.finish()
        if self.processes.size > 1:
            student = self.processes.gather(student)
            teacher = student if self.processes.rank else load_checkpoint(self.source)
        self.student = self.one_gpu = None
        return student, teacher

    def export(self, student: Llama, teacher: Llama) -> Path:
        """Write OUT_DIR/hf, as a Hugging Face folder in the original's dtype, and the report."""
        c, exported = self.c, self.out_dir / "hf"
        if self.processes.rank:
            return exported
        student.to(self.original.stored_dtype() or self.stored)
        save_checkpoint(student, exported, tokenizer_from=self.source)
        print(f"extended checkpoint: {exported}")
        if c.eval_tokens:
            from measure.report import report

            models = (memory.pad_heads(m.to(c.device, self.compute)) for m in (teacher, student))
            texts = {
                name: [self.own.get(spec, {"file": spec})["file"] for spec in getattr(c, name)]
                for name in ("long_data", "short_data")
            }
            told = self.record["code_changes"], self.own
            self.record["report"] = report(replace(c, **texts), self.streams, *models, *told)
        self.write_record()
        print(f"more: python -m measure.evaluate --base {c.ckpt} --ckpt {self.out_dir}")
        return exported
