"""A run that survives and fits: longred.Run with states, signals, many GPUs, and other formats.

`Run` overrides what longred.Run does in the plainest way. It knows no loss: what is learnt, and
how, is in longred.py.

    settings.py     the machine's flags, and what is refused
    plan.py         what fits: disk, memory, the fastest plan for one GPU (which blocks recompute)
    memory.py       carries out that plan: AdamW in host memory, recomputing, tiles, the teacher
    files.py        files and folders written whole, locks, checksums, checked caches
    states.py       states on disk;  keeper.py: when they are saved, signals;  log.py
    many.py         torchrun: weights in shards, sequences shared between processes
    corpus.py       text of any kind -> token files;  mixture.py: shares of several sources
    samples.py      text sampled from the checkpoint itself
    tokenizer.py, checkpoints.py    every format
"""

import os
import platform
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import longred
from longred import Config, given_flags
from machine import checkpoints, corpus, files, log, memory, plan, samples, states
from machine.checkpoints import open_tensors, resolve_checkpoint
from machine.corpus import at_commit, beginnings
from machine.files import finite, signed
from machine.formats import load_checkpoint, load_config, save_checkpoint
from machine.keeper import Keeper, command_line, refuse_in_the_way, refuse_taken
from machine.many import Processes, after_restart, whole_number
from machine.mixture import Mixture, choose_documents
from machine.settings import (
    MAY_CHANGE,
    TEXTS,
    MachineConfig,
    check_flags,
    is_path,
    of_today,
    resolve,
    resumed_config,
    source_shares,
)
from machine.tokenizer import check_export, find_tokenizer, load_tokenizer
from model import Llama, export_dtype, hf_name, merge_weights, stored_dtype


class Run(longred.Run):
    """One process's part of a run, from the settings to the export; a context around all of it.

    given: names of the settings that a resumed run may take anew; None: all but the defaults.
    """

    def __init__(self, given: Set[str] | None = None):
        self.given = given
        plan.expand_segments()  # before anything asks for the GPU
        self.processes = Processes()
        self.keeper = Keeper(self.processes)
        self.once = self.processes.from_rank_0  # call a function in one process, for all of them
        # Of the memory of one GPU, or of a CPU in bf16; None where weights are fp32.
        self.plan = self.one_gpu = None
        self.resumed = None  # longred.json of the run that is continued
        self.data_seconds = 0.0  # waited for text in this step
        self.own = {}  # the source self:N -> its file and cost
        self.commits = {}  # a source on the hub -> the commit at which it is read
        self.sequences = {}  # stream -> how many of its sequences go into one forward pass
        self.texts = {}  # stream -> its data.Stream or mixture.Mixture
        self.stepping = None  # the generator of the steps
        self.whole = False  # whether `load` takes the weights whole, not this process's shards

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if self.stepping:  # a generator's own clean-up would swallow what interrupts it
                self.stepping.close()
        finally:
            self.keeper.close(error)
            if error is None:  # of one process alone, it would wait here for the others, in silence
                self.processes.leave()
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ValueError(
                f"the host's memory ran out ({str(error).splitlines()[-1:]!r:.150}); a smaller "
                "--unit_tokens, --recompute, or a machine with more. What was saved is kept"
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            less = "a --gpu_gib some GiB below the GPU peak of the memory plan, or "
            less = "" if self.processes.size > 1 else less  # which has no plan to change
            raise ValueError(
                f"{str(error).splitlines()[0]} Resume, or begin again, with {less}a smaller "
                "--unit_tokens"
            ) from error

    # ---------------------------------------------------------------------------- before step 1

    def open(self, config: Config) -> MachineConfig:
        """Return the settings, all filled in. Raises ValueError, one line, for what cannot work."""
        if not isinstance(config, MachineConfig):  # longred.Config, with the defaults of the rest
            config = MachineConfig(**vars(config))
        config = after_restart(config)
        if config.resume:
            self.resumed = states.read_run(config.resume)
            self.resumed["config"] = of_today(self.resumed["config"])
            self.commits = self.resumed["commits"]
            config = resumed_config(self.resumed["config"], config, self.given)
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
        in_bf16 = c.device.startswith("cuda") or c.dtype == "bf16"
        self.compute = torch.bfloat16 if in_bf16 else torch.float32
        self.stored = torch.float32
        return c

    def look_at_all(self, given: MachineConfig) -> None:
        """Find what is cheap to find wrong, before anything that takes long.

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
        load_tokenizer(self.source, self.c.add_eos).check_fits(self.original.vocab_size)
        for specs in (getattr(given, name) for name in TEXTS):
            corpus.find_files([s for s in map(str, specs or ()) if is_path(s)], {})

    def fit_to_machine(self, streams: dict) -> None:
        """Refuse a run that its disk or its memory cannot hold; on a GPU print and take its plan.

        Sets how many sequences of each stream go into one forward pass.
        """
        c, size = self.c, self.processes.size
        self.streams = streams
        self.units = [plan.Unit.of(s, c, c.unit_tokens // s.seq_len) for s in streams.values()]
        freed = states.bytes_in(self.out_dir / "checkpoints")
        self.once(lambda: plan.preflight(c, self.original, self.units, processes=size, freed=freed))
        self.take_plan(self.plan_memory() if self.compute == torch.bfloat16 else None)

    def take_plan(self, found: plan.Plan | None) -> None:
        """Print a plan and follow it from here on."""
        if found and found.gpu:
            print(found.table(), flush=True)
        units = found.units.values() if found else self.units
        self.sequences = {unit.name: unit.batch for unit in units}
        if found and self.processes.size == 1:
            self.plan, self.stored = found, torch.bfloat16

    def plan_memory(self, host_memory: bool = True) -> plan.Plan:
        """Return where everything is and how passes run in bf16; the same in every process.

        On a CPU nothing has to be away, and blocks are recomputed if --recompute asks for that.
        host_memory: whether a plan for one GPU may use any.
        """
        c, processes = self.c, self.processes
        moments = torch.bfloat16 if c.moments == "bf16" else torch.float32
        if c.device == "cpu":
            units = {unit.name: unit for unit in self.units}
            policy = plan.Policy(keep_all=0 if c.recompute else self.original.n_layers)
            return plan.Plan(False, True, moments, units, dict.fromkeys(units, policy))
        room = plan.asked("--gpu_gib", c.gpu_gib, plan.gpu_room())
        host = plan.asked("--host_gib", c.host_gib, plan.available_memory(), grows=True)
        skipped = c.train_len < c.target_len
        length = ("--train_len", 0) if skipped else ("--target_len", c.original_len)
        if processes.size > 1:
            room, host = processes.total([room, host], "MIN")
        found = plan.make_plan(
            self.original,
            self.units,
            gpu_bytes=room,
            host_bytes=host if host_memory else 0,
            moments=moments,
            processes=processes.size,
            context=c.context,
            compile=c.compile,
            expandable=processes.size > 1 or plan.segments_expand(),
            card=torch.cuda.get_device_name(),
            length=length,
        )
        found.host_given = bool(c.host_gib)
        return found

    def open_texts(self, streams: dict) -> None:
        """Check disk and memory; then tokenise, once, on one process, and open every stream."""
        self.fit_to_machine(streams)
        c = self.c
        tokenizer = load_tokenizer(self.source, c.add_eos)
        tokenizer.check_fits(self.original.vocab_size)
        check_export(self.source, tokenizer)

        def tokenize() -> list[data.Corpus]:
            texts = [self.own_text(getattr(c, f"{name}_data"), tokenizer) for name in streams]
            return [
                corpus.tokenize(text, tokenizer, c.cache_dir, name, c.skip_bad_lines)
                for text, name in zip(texts, streams, strict=True)
            ]

        def open_stream(s, tokens: data.Corpus) -> data.Stream | Mixture:
            min_doc_len, upsample = (
                (c.min_doc_len, c.length_upsample) if s.name == "long" else (0, 1)
            )

            def of_source(source: int | None) -> data.Stream:
                chosen = choose_documents(tokens, s.seq_len, source, min_doc_len, upsample)
                return data.Stream(tokens, s.name, c.seed, s.batch, s.seq_len, chosen)

            specs = getattr(c, f"{s.name}_data")
            shares = source_shares(c, specs)
            if not shares:
                return of_source(None)
            return Mixture([of_source(i) for i in range(len(specs))], shares)

        if self.processes.size > 1:
            self.once(lambda: tokenize() and None)
        corpora = tokenize()
        if not self.commits:
            self.commits = {spec: at for tokens in corpora for spec, at in tokens.commits.items()}
        data.share_held_out(corpora)
        self.once(lambda: self.check_text(tokenizer))
        for s, tokens in zip(streams.values(), corpora, strict=True):
            self.texts[s.name] = open_stream(s, tokens)
            print(self.texts[s.name].describe(s.micro * len(s.steps)))
        skips_at_sentences = any(s.position_scheme == "longrecipe" for s in streams.values())
        self.is_end = data.sentence_ends(tokenizer) if skips_at_sentences else ()
        self.record = {
            "data": {name: text.corpus.fingerprint for name, text in self.texts.items()},
            "weights": self.once(lambda: states.weight_fingerprints(self.source)),
        }
        if self.resumed:
            states.check_same(self.resumed, self.record, self.out_dir, c.resume_anyway)
        self.record["own_samples"] = self.own  # where they are and what they cost; they are data
        self.record["commits"] = self.commits
        self.record["code"] = states.code_fingerprints()
        self.record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}

    def own_text(self, specs: list[str], tokenizer) -> list[str]:
        """A list of sources: of `self` the file of the checkpoint's own samples, of the hub what
        the run began with."""
        for spec in specs:
            n = samples.count(spec)
            if n and spec not in self.own:
                streams = self.streams.values()
                readers = [s for s in streams if spec in getattr(self.c, f"{s.name}_data")]
                asked = sum(s.tokens * len(s.steps) for s in readers)
                longest = max(s.seq_len for s in readers)
                path, cost = samples.own_samples(
                    self.c,
                    n,
                    min(longest, self.c.original_len),
                    source=self.source,
                    config=self.original,
                    load=self.load_whole,
                    tokenizer=tokenizer,
                    asked=asked,
                )
                self.own[spec] = {"file": path} | cost
        files = {spec: own["file"] for spec, own in self.own.items()}
        return [files.get(spec) or at_commit(spec, self.commits.get(spec)) for spec in specs]

    def check_text(self, tokenizer) -> None:
        """Refuse, before any step, an export that would tokenise this run's text otherwise."""
        c, n = self.c, 0
        for name in self.streams:
            specs = self.own_text(getattr(c, f"{name}_data"), tokenizer)
            texts = beginnings(specs, c.cache_dir, c.skip_bad_lines)
            n += check_export(self.source, tokenizer, texts)
        print(f"the export's tokenizer makes the same {n:,} tokens of this text's beginnings")

    def choose_layers(self) -> list[int]:
        """Run longred.choose_layers in the first process, with the weights whole."""
        self.whole = True
        layers = self.once(super().choose_layers)
        self.whole = False
        return layers

    def load_whole(self) -> Llama:
        """Load the original in this process alone, to be sampled from."""
        self.whole = True
        model = self.load()
        self.whole = False
        return model

    def load(self, theta: float | None = None, scaling: dict | None = None) -> Llama:
        """Load the original, which is only read, or with a new rotary embedding the model to train.

        Of many processes each has its shards, except while layers are chosen. The original needs no
        more digits than passes compute with.
        """

        def shard(model: Llama) -> None:  # while it is empty
            if self.processes.size > 1 and not self.whole:
                self.processes.shard(model)

        memory.empty_cache(self.c.device)  # of what is left of the choice of layers
        only_read = self.whole or (theta is None and scaling is None)
        dtype = self.compute if only_read else self.stored
        return load_checkpoint(self.source, theta, scaling, self.c.device, dtype, shard)

    def optimizer(self, student: Llama, teacher: Llama):
        """Return AdamW for this machine. On one GPU also carry out the rest of the plan."""
        c = self.c
        adamw = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=1e-8, weight_decay=c.weight_decay)
        self.student = student
        if self.plan:
            if (dtype := stored_dtype(self.original)) not in (None, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                print(f"weights stored as {name} are rounded to bfloat16; the export is {name}")
            self.one_gpu = self.open_one_gpu(student, teacher, **adamw)
            self.adamw = self.one_gpu.optimizer
        else:
            self.adamw = torch.optim.AdamW(student.parameters(), **adamw)
            if c.recompute or self.processes.size > 1:
                memory.apply_policy(student, plan.RECOMPUTE_ALL)
        log.print_header(c, student, teacher, self.streams)
        return self.adamw

    def open_one_gpu(self, student: Llama, teacher: Llama, **adamw) -> memory.OneGPU:
        """Carry out the plan; if the system refuses its host memory, one that uses none.

        AdamW's moments become bf16 if only that fits, unless the run has a state in fp32.
        """
        try:
            return memory.OneGPU(self.plan, student, teacher, **adamw)
        except memory.HostMemoryRefused as e:
            refused = str(e)
        for moments in dict.fromkeys([self.c.moments, self.c.moments if self.resumed else "bf16"]):
            self.c.moments = moments
            with suppress(ValueError):
                found = self.plan_memory(host_memory=False)
                break
        else:
            raise ValueError(f"{refused}; and no plan without host memory fits this GPU")
        print(f"{refused}; going on without, AdamW's moments in {moments}:", flush=True)
        self.take_plan(found)
        return memory.OneGPU(self.plan, student, teacher, **adamw)

    # ------------------------------------------------------------------------------- the steps

    def steps(self, last: int) -> Iterator[int]:
        """Yield the number of each step from the newest state on; between them log, save, stop."""
        self.stepping = self.run_steps(last)
        return self.stepping

    def run_steps(self, last: int) -> Iterator[int]:
        c, keeper = self.c, self.keeper
        if not self.resumed:  # from here on OUT_DIR is ours
            keeper.claim(self.out_dir, resumed=False)
        self.record["config"] = asdict(c)
        config = {k: v for k, v in self.record["config"].items() if k not in MAY_CHANGE}
        if c.source_weights:  # shares in the order of the sources, whose names may change
            config["source_weights"] = [text.rpartition("=")[2] for text in c.source_weights]
        before = self.resumed["config"] if self.resumed else {}
        first = keeper.load(c, config, before, self.student, self.adamw)
        self.note_changed_code(first)
        if c.device == "cpu" and first < last:
            steps, streams = range(first, last), self.streams.values()
            seconds = plan.forecast(c, self.original, streams, steps, self.processes.size)
            log.print_forecast(seconds, len(steps))
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
                with files.writing(path):
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
        """Print, and record for the report, which code files changed since the run began."""
        old = self.resumed or {}
        self.record["code_changes"] = old.get("code_changes", [])
        if old and (files := states.changed_code(old.get("code", {}), self.record["code"])):
            words = f"After step {first} the run continued with other code in {', '.join(files)}."
            self.record["code_changes"].append(words)

    def write_record(self) -> None:
        if self.processes.rank == 0:
            record = {"checksum": 0} | signed(finite(self.record))  # its line is the first
            files.write_json(self.out_dir / "longred.json", record)

    def batches(self, stream, step: int) -> Iterator[data.Batch]:
        """Yield this process's part of what a step reads of a stream, a data.Batch for each pass.

        Yields nothing in a step that does not read the stream.
        """
        if step not in stream.steps:
            return
        if self.one_gpu:  # which blocks backward recomputes, and where the teacher is
            self.one_gpu.ready(stream.name)
        c = self.c
        numbers, piece, pieces = self.processes.share(stream.micro * stream.batch)
        length = stream.seq_len // pieces
        batches = data.batches(
            self.texts[stream.name],
            stream,
            step,
            c,
            most=self.sequences[stream.name],
            is_end=self.is_end,
            numbers=numbers,
            part=slice(piece * length, (piece + 1) * length),
            processes=self.processes.size,
        )
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.data_seconds += time.monotonic() - began
            if batch is None:
                return
            self.keeper.check_stop()
            self.read += len(batch.ids) if batch.fraction else 0
            yield batch

    def with_gradients(self):
        """Return the student's parameters, or what holds their gradients in host memory."""
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
        """Return both models whole, in the first process; in the others they have no memory.

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
        student, teacher = self.gather(student, teacher)
        if self.processes.rank:
            return exported
        if c.merge:
            merge_weights(student, teacher, c.merge)
        student.to(export_dtype(student, self.original))
        with files.writing(exported):
            save_checkpoint(student, exported, tokenizer_from=self.source)
        print(f"extended checkpoint: {exported}")
        for line in checkpoints.client_notes(exported):
            print(line)
        if c.eval_tokens:
            from measure.report import report

            teacher, student = (m.to(c.device, self.compute) for m in (teacher, student))
            texts = {
                name: [self.own.get(spec, {"file": spec})["file"] for spec in getattr(c, name)]
                for name in ("long_data", "short_data")
            }
            corpora = {name: text.corpus for name, text in self.texts.items()}
            self.record["report"] = report(
                replace(c, **texts),
                streams=self.streams,
                corpora=corpora,
                teacher=teacher,
                student=student,
                code_changes=self.record["code_changes"],
                own_samples=self.own,
            )
        self.write_record()
        evaluation = ("measure/evaluate.py", "--base", c.ckpt, "--ckpt", self.out_dir)
        print("more:", log.command(*evaluation))
        return exported


def train(config: Config, given: Set[str] | None = None) -> Path:
    """Run longred.train with the Run of this file. Returns the folder of the exported model."""
    return longred.train(config, Run(given))


def main(argv: list[str] | None = None) -> None:
    """Run the command line. An error that the user can correct ends it with one line."""
    log.outlive_readers()
    given = given_flags(argv, MachineConfig)
    config = MachineConfig(**given)
    check_flags(config, given.keys())
    with command_line("longred", argv):
        if config.resume or config.ckpt:
            train(config, given.keys())
        else:
            from measure.demo import demo  # not at the top: it imports this file

            demo(config)
