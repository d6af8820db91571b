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
from machine import checkpoints, corpus, log, memory, plan, samples, states
from machine.checkpoints import hf_name, open_tensors, resolve_checkpoint
from machine.command_line import parse_args  # noqa: F401, for longred.py
from machine.corpus import beginnings
from machine.formats import (  # rescaled: for longred.py
    load_checkpoint,
    load_config,
    rescaled,  # noqa: F401
    save_checkpoint,
    stored_dtype,
)
from machine.keeper import Keeper, refuse_in_the_way, refuse_taken
from machine.log import outlive_readers  # noqa: F401, for longred.py
from machine.many import Processes, after_restart, whole_number
from machine.memory import in_chunks  # noqa: F401, for longred.py
from machine.settings import (  # noqa: F401, for longred.py
    HARMLESS,
    TEXTS,
    MachineConfig,
    is_path,
    opt,
    resolve,
    resumed_config,
    rope_scaling,
    source_shares,
)
from machine.tokenizer import check_export, find_tokenizer
from model import Llama


def last_words(error: Exception) -> str | int:
    """How a user's error ends: one line, said by one process of each machine."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        return 1
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and not error.filename:
        line += "; a disk or a pipe that this run writes to gave that error"
    return f"longred: {line}"


class Run:
    """One process at work on a run, from its settings to its export; a context around all of it."""

    def __init__(self):
        plan.expand_segments()  # before anything asks for the GPU
        self.processes = Processes()
        self.keeper = Keeper(self.processes)
        self.once = self.processes.from_rank_0  # what one process does for all
        self.plan = self.one_gpu = None  # of the memory of one GPU; None on a CPU or on many
        self.resumed = None  # longred.json of the run that goes on
        self.data_seconds = 0.0  # waited for text in this step
        self.own = {}  # the source self:N -> its file and cost
        self.sequences = {}  # stream -> how many of its sequences go into one forward pass
        self.texts = {}  # stream -> its data.Stream or data.Mixture

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.keeper.close(error)
        self.processes.leave()
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ValueError(
                f"the host's memory ran out ({str(error).splitlines()[-1:]!r:.150}); a smaller "
                "--unit_tokens, --recompute, or a machine with more. What was saved is kept"
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise ValueError(
                f"{str(error).splitlines()[0]} Go on, or begin anew, with a --gpu_gib some GiB "
                "below the GPU peak of the memory plan, or a smaller --unit_tokens"
            ) from error

    # ---------------------------------------------------------------------------- before step 1

    def open(self, config: MachineConfig) -> MachineConfig:
        """The settings, all filled in. Raises ValueError, one line, for what cannot work."""
        config = after_restart(config)
        if config.resume:
            self.resumed = states.read_run(config.resume)
            states.refuse_older(Path(config.resume))
            config = resumed_config(self.resumed["config"], config)
        self.processes.join(config.device, config.context or 1)
        if self.resumed:
            self.keeper.claim(Path(config.resume), resumed=True)
        self.source = resolve_checkpoint(config.ckpt)
        if (self.source / "tokenizer.model").is_file():  # of a kind that is not read, perhaps
            find_tokenizer(self.source)
        self.original = load_config(self.source)
        self.c = c = resolve(config, self.original, self.source)
        self.out_dir = Path(c.out_dir)
        self.once(lambda: self.look_at_all(config))
        if c.device.startswith("cuda:"):
            torch.cuda.set_device(c.device)
        # A GPU's attention takes nothing wider than bf16. Weights are fp32 (FSDP casts shards as it
        # gathers them), but under a plan, whose AdamW holds the rest of their digits.
        self.compute = torch.bfloat16 if c.device.startswith("cuda") else torch.float32
        self.stored = torch.float32
        return c

    def look_at_all(self, given: MachineConfig) -> None:
        """What is cheap to find wrong is found here, before anything that takes long.

        given: the settings before they were resolved, with paths as the user wrote them.
        """
        if not self.resumed:
            refuse_taken(self.out_dir)
        else:
            refuse_in_the_way(self.out_dir)
        with torch.device("meta"):
            empty = Llama(self.original)
        shapes = {hf_name(name): p.shape for name, p in empty.named_parameters()}
        open_tensors(self.source, shapes, self.original)
        data.load_tokenizer(self.source, self.c.add_eos).check_fits(self.original.vocab_size)
        for specs in (getattr(given, name) for name in TEXTS):
            corpus.find_files([s for s in map(str, specs or ()) if is_path(s)], {})

    def check(self, streams: dict) -> None:
        """Refuse a run that its disk or its memory cannot hold; on a GPU print and take its plan.

        Sets how many sequences of each stream go into one forward pass.
        """
        c, size = self.c, self.processes.size
        self.streams = streams
        self.units = [plan.Unit.of(s, c, c.unit_tokens // s.seq_len) for s in streams.values()]
        self.once(lambda: plan.preflight(c, self.original, streams.values(), self.units, size))
        found = self.plan_memory() if c.device.startswith("cuda") else None
        if found:
            print(found.table(), flush=True)
        units = found.units.values() if found else self.units
        self.sequences = {unit.name: unit.batch for unit in units}
        if found and size == 1:
            self.plan, self.stored = found, torch.bfloat16

    def plan_memory(self) -> plan.Plan | plan.SharedPlan:
        """On GPUs: the memory table, and what follows from it; the same in every process."""
        c, processes, units = self.c, self.processes, self.units
        room = plan.asked("--gpu_gib", c.gpu_gib, plan.gpu_room())
        host = plan.asked("--host_gib", c.host_gib, plan.available_memory())
        skipped = c.train_len < c.target_len
        length = ("--train_len", 0) if skipped else ("--target_len", c.original_len)
        if processes.size > 1:
            room, host = processes.total([room, host], "MIN")
            shares = processes.size, c.context, room, host
            return plan.shared_plan(self.original, units, *shares, length)
        moments = torch.bfloat16 if c.moments == "bf16" else torch.float32
        rest = c.compile, plan.segments_expand(), torch.cuda.get_device_name(), length
        return plan.make_plan(self.original, units, room, host, moments, *rest)

    def open_texts(self, streams: dict) -> None:
        """Tokenise, once, on one process, and open every stream's text."""
        c = self.c
        tokenizer = data.load_tokenizer(self.source, c.add_eos)
        tokenizer.check_fits(self.original.vocab_size)
        check_export(self.source, tokenizer)

        def tokenize() -> list[data.Corpus]:
            texts = [self.own_text(getattr(c, f"{name}_data"), tokenizer) for name in streams]
            options = tokenizer, c.cache_dir
            return [
                data.tokenize(text, *options, name, c.skip_bad_lines)
                for text, name in zip(texts, streams, strict=True)
            ]

        def open_stream(s, tokens: data.Corpus) -> data.Stream | data.Mixture:
            only_long = (c.min_doc_len, c.length_upsample) if s.name == "long" else (0, 1.0)
            settings = tokens, s.name, c.seed, s.batch, s.seq_len, *only_long
            specs = getattr(c, f"{s.name}_data")
            shares = source_shares(c, specs)
            if not shares:
                return data.Stream(*settings)
            return data.Mixture([data.Stream(*settings, i) for i in range(len(specs))], shares)

        if self.processes.size > 1:
            self.once(lambda: tokenize() and None)
        corpora = tokenize()
        data.share_held_out(corpora)
        self.once(lambda: self.check_text(tokenizer))
        for s, tokens in zip(streams.values(), corpora, strict=True):
            self.texts[s.name] = open_stream(s, tokens)
            print(self.texts[s.name].describe(s.micro * len(s.steps)))
        skips_at_sentences = any(s.position_scheme == "longrecipe" for s in streams.values())
        self.is_end = data.sentence_ends(tokenizer) if skips_at_sentences else ()
        self.record = {
            "data": {name: text.corpus.fingerprint for name, text in self.texts.items()},
            "weights": states.weight_fingerprints(self.source),
        }
        if self.resumed:
            states.check_same(self.resumed, self.record, self.out_dir, c.resume_anyway)
        self.record["own_samples"] = self.own  # where they are and what they cost; they are data
        self.record["code"] = states.code_fingerprints()
        self.record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}

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

    def check_text(self, tokenizer) -> None:
        """Refuse, before any step, an export that would tokenise this run's text otherwise."""
        c, n = self.c, 0
        for name in self.streams:
            specs = self.own_text(getattr(c, f"{name}_data"), tokenizer)
            texts = beginnings(specs, c.cache_dir, c.skip_bad_lines)
            n += check_export(self.source, tokenizer, texts)
        print(f"the export's tokenizer makes the same {n:,} tokens of this text's beginnings")

    def load(self, theta=None, scaling=None, whole: bool = False, frozen: bool = False) -> Llama:
        """The checkpoint's model, its rotary rescaled; over many processes in shards, or whole.

        frozen: only read from, so that nothing is kept that its passes would round away.
        """

        def prepare(model: Llama) -> None:  # while it is empty
            if self.c.device == "cpu":
                memory.pad_heads(model)
            if self.processes.size > 1 and not whole:
                self.processes.shard(model)

        memory.empty_cache(self.c.device)  # of the layer choice's remains
        dtype = self.compute if whole or frozen else self.stored
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
        if c.device == "cpu":
            now = [s for s in self.streams.values() if 0 in s.steps]
            seconds = plan.forecast(c, self.original, now, self.processes.size)
            log.print_forecast(c, seconds, c.steps)
        return self.adamw

    # ------------------------------------------------------------------------------- the steps

    def steps(self, last: int):
        """Yield the number of each step from the newest state on; between them log, save, stop."""
        c, keeper = self.c, self.keeper
        if not self.resumed:  # from here on OUT_DIR is ours
            keeper.claim(self.out_dir, resumed=False)
        self.record["config"] = asdict(c)
        config = {k: v for k, v in self.record["config"].items() if k not in HARMLESS}
        if c.source_weights:  # shares in the order of the sources, whose names may change
            config["source_weights"] = [text.rpartition("=")[2] for text in c.source_weights]
        before = self.resumed["config"] if self.resumed else {}
        first = keeper.load(c, config, before, self.student, self.adamw)
        self.note_changed_code(first)
        self.write_record()
        logged = self.once(lambda: states.trim_log(self.out_dir / "log.jsonl", first))
        self.watch = log.Watch(logged, c.max_bad_steps)
        after = plan.report_steps(c, self.original, self.streams.values())
        began, path = time.monotonic(), self.out_dir / "log.jsonl"
        with open(os.devnull if self.processes.rank else path, "a") as lines:
            for step in range(first, last):
                step_began, self.data_seconds = time.monotonic(), 0.0
                plan.forget_peak(c.device)
                self.read = 0  # sequences, in this step
                with log.pulse(partial(self.print_within, step + 1, step_began)):
                    yield step
                seconds = time.monotonic() - step_began
                line = {"step": step + 1, **self.line, "seconds": round(seconds, 3)}
                line["data_share"] = round(self.data_seconds / seconds, 4)
                if said := log.unheard():
                    line["note"] = said
                with states.writing(path):
                    lines.write(log.json_line(line))
                    lines.flush()
                keeper.step_done(step + 1, lines, last, self.watch.bad)
                # Only now is anything printed: the step is on record, and what is due is saved.
                left = (time.monotonic() - began) / (step + 1 - first) * (last - step - 1 + after)
                if step == first and left > 600:
                    print(
                        f"{log.clock(left)} to go with the report, at the pace of this first step"
                    )
                log.print_step(line, last, left)
                self.watch.stop_if_lost(line, last, keeper)
        keeper.finish()

    def print_within(self, step: int, began: float) -> None:
        seconds = time.monotonic() - began
        print(f"  step {step}: at its sequence {self.read}, {seconds:.0f} s so far", flush=True)

    def note_changed_code(self, first: int) -> None:
        """Say, and record for the report, which files a resumed run finds changed."""
        old = self.resumed or {}
        self.record["code_changes"] = old.get("code_changes", [])
        if old and (files := states.changed_code(old.get("code", {}), self.record["code"])):
            self.record["code_changes"].append({"after_step": first, "files": files})

    def write_record(self) -> None:
        if self.processes.rank == 0:
            states.write_json(self.out_dir / "longred.json", self.record)

    def batches(self, stream, step: int):
        """This process's part of what a step reads of a stream, as data.Batch, one a forward pass.

        Yields nothing in a step that does not read the stream.
        """
        if step not in stream.steps:
            return
        if self.one_gpu:
            self.one_gpu.ready(stream.name)
        c, size = self.c, self.processes.size
        numbers, piece, pieces = self.processes.share(stream.micro * stream.batch)
        length = stream.seq_len // pieces
        part = slice(piece * length, (piece + 1) * length)

        def read(index: int) -> data.MicroBatch:
            began = time.monotonic()
            found = data.micro_batch(self.texts[stream.name], stream, index, c, self.is_end)
            self.data_seconds += time.monotonic() - began
            return found

        most = self.sequences[stream.name]
        for batch in data.batches(read, stream, step, numbers, part, most, size, c.device):
            self.keeper.check_stop()
            self.read += len(batch.ids) if batch.fraction else 0
            yield batch

    def with_gradients(self):
        """The student's parameters, or what holds their gradients in host memory."""
        return self.adamw.with_gradients() if self.plan else self.student.parameters()

    def log_step(self, means: dict[str, Tensor], norm: Tensor) -> bool:
        """Log a step. Returns whether all its numbers are finite, so that the update may be made.

        means: the mean losses of the step, unweighted, as this process has them; their weighted sum
        is what is trained. This is the one moment of a step at which numbers come from the GPU.
        Waits for a state that is being saved, whose weights an update would change.
        """
        totals = self.processes.total([float(x) for x in means.values()])
        read = {n: x / self.processes.size for n, x in zip(means, totals, strict=True)}
        streams = [s for s in self.streams.values() if s.name in read]
        self.line = {
            "loss": sum(weight * read[n] for s in streams for n, weight in s.weights.items()),
            **{f"loss_{name}": None for name in log.LOSSES},
            **{f"loss_{name}": mean for name, mean in read.items()},
            "lr": self.adamw.param_groups[0]["lr"],
            "grad_norm": whole_number(norm),
            "tokens": sum(s.tokens for s in streams),
            "peak_gib": round(plan.peak_gib(self.c.device), 2),
            **plan.reserved_now(self.c.device),
        }
        self.line["flag"] = self.watch.flag(self.line)
        if self.line["flag"] == "skipped":
            return False
        self.keeper.before_update()
        return True

    # ----------------------------------------------------------------------------- after the last

    def gather(self, student: Llama, teacher: Llama) -> tuple[Llama, Llama]:
        """Both whole, here; in all but the first process without memory, to be left alone.

        Frees the optimizer's state first: the export and the report need the memory.
        """
        if self.one_gpu:
            self.one_gpu.finish()
        else:
            self.adamw.state.clear()
            self.adamw.param_groups.clear()
        self.adamw = None
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
        dtype = stored_dtype(self.original) or self.stored
        if dtype == torch.float16 and any(p.abs().max() > 65504 for p in student.parameters()):
            print("weights beyond 65,504 are inf in float16: the export is in bfloat16")
            dtype = torch.bfloat16
        student.to(dtype)
        with states.writing(exported):
            save_checkpoint(student, exported, tokenizer_from=self.source)
        print(f"extended checkpoint: {exported}")
        for line in checkpoints.client_notes(exported):
            print(line)
        if c.eval_tokens:
            from measure.report import report

            models = (memory.pad_heads(m.to(c.device, self.compute)) for m in (teacher, student))
            texts = {
                name: [self.own.get(spec, {"file": spec})["file"] for spec in getattr(c, name)]
                for name in ("long_data", "short_data")
            }
            corpora = {name: text.corpus for name, text in self.texts.items()}
            told = self.record["code_changes"], self.own
            self.record["report"] = report(
                replace(c, **texts), self.streams, corpora, *models, *told
            )
        if said := log.unheard():  # after the last line of log.jsonl
            self.record["notes"] = [said]
        self.write_record()
        print(f"more: python -m measure.evaluate --base {c.ckpt} --ckpt {self.out_dir}")
        return exported
