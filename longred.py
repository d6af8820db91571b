"""LongReD: stretch a Llama's context window without losing what it could do on short text.

    python longred.py                                          the story in minutes, on any laptop
    python longred.py --ckpt llama3-8b --target_len 32768      the job
    python longred.py --ckpt DIR --target_len N --long_data PATH... --short_data PATH...
    python longred.py --resume OUT_DIR
    torchrun --nproc_per_node 8 longred.py ...                 many GPUs; --resume too, any number

Rescaling the rotary embedding and training a little on long text gives a model its long window, and
makes it worse at everything short. LongReD (Dong et al., ACL 2025, arXiv 2502.07365) mixes into
each optimizer step two distillations towards the frozen original model:

    what the paper calls it            equation    here
    ---------------------------------  ----------  --------------------------------------------
    long-text training                 eq. 18      long_text_loss
    short-text distillation            eq. 8       short_text_distillation
    short-to-long distillation         eq. 17      short_to_long_distillation, data.*_positions
    the sum of the three               eq. 18      open_streams (weights), the loop in extend
    similarity of hidden states        eq. 5       cosine_distance
    layers to distil, by attention KL  eq. 6       select_distill_layers, model.attention_kl

--method longrecipe is LongRecipe (arXiv 2409.00509) in the same loop: long text of 0.3 x the target
under positions that skip from sentence to sentence (long_positions). --long_position_scheme
longrecipe puts LongReD's own long stream under the same positions.

Differs: the two distillations are distances, 1 - cos, where the paper has -cos, and means over a
batch where eq. 8 sums over texts: the same direction, and 0 when nothing was forgotten. Eq. 18 is
read as the released code runs it, a mean over a step's 16 micro-batches (8 long, 6 short, 2 short-
to-long): 8/16 L_long + 6/16 alpha_short L_short + 2/16 alpha_s2l L_s2l, at 32K 0.5 : 1.875 : 1.25.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import memory
import runs
from model import (
    Llama,
    ModelConfig,
    attention_kl,
    load_checkpoint,
    load_config,
    merge_weights,
    next_token_loss,
    resolve_checkpoint,
    save_checkpoint,
)
from rope_kernels import rope_backend

# ---------------------------------------------------------------------------------------- config


def opt(default, help: str, least: float | None = None):
    """A field of Config and its command-line flag. least: the smallest value that makes sense."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass
class Config:
    """Everything a run depends on; each field is a flag. None: worked out by `resolve`."""

    # What to extend, and where to
    ckpt: str | None = opt(None, "folder, OUT_DIR, known name or hub id; none: the demo")
    target_len: int | None = opt(None, "the new window, in tokens")
    original_len: int | None = opt(None, "the old window (the checkpoint's)", least=32)
    out_dir: str | None = opt(None, "default: out/<ckpt name>-<target_len>; demo: out/demo")
    resume: str | None = opt(None, "continue the run in this OUT_DIR; needs no other flag")
    resume_anyway: bool = opt(False, "with --resume: although config, data or code changed")
    rope_type: Literal["linear", "yarn", "ntk", "default"] | None = opt(
        None,
        "default: ABF, a larger theta, the checkpoint's own scaling kept; linear (PI), yarn, ntk: "
        "by target / original; 'default' removes the checkpoint's scaling",
    )
    rope_theta: float | None = opt(
        None, "new theta (default for ABF: the paper's, else a rule)", least=1
    )
    # Method
    method: Literal["longred", "long_cpt", "mix_cpt", "longrecipe"] = opt(
        "longred",
        "longred: three losses; long_cpt: cross-entropy on long text; mix_cpt: on all streams; "
        "longrecipe: on text of --train_len with gaps between sentences",
    )
    alpha_short: float | None = opt(None, "weight of short-text distillation (5; 128K: 2)", least=0)
    alpha_s2l: float | None = opt(None, "weight of short-to-long distillation (10; 15)", least=0)
    distill_layers: list[int] | None = opt(None, "hidden states to distil; 1 = output of block 1")
    n_distill_layers: int | None = opt(
        None, "how many to choose by drift (6; 3 at 128K, if over 8 x)", least=1
    )
    position_scheme: Literal["uniform", "cream", "cream_truncated"] | None = opt(
        None, "skipped positions of short-to-long (default: cream, uniform from 128K on)"
    )
    long_position_scheme: Literal["ordinary", "pose", "longrecipe"] | None = opt(
        None, "positions of long text (default: ordinary; method longrecipe: longrecipe)"
    )
    train_len: int | None = opt(
        None, "tokens in a long text (target_len; if positions are skipped 0.3 of it)", least=1
    )
    # Text
    long_data: list[str] | None = opt(
        None,
        "long text: files (plain, .jsonl, .json.gz, .jsonl.zst, .parquet), folders, globs, hub "
        "datasets hf:owner/name[/config][:split][#column]; default: 1.3 GB of public-domain books "
        "and open-licence papers from the hub (common-pile), about 0.9G tokens",
    )
    short_data: list[str] | None = opt(
        None,
        "short text, the like of which is to be kept; default: 2.9 GB of RedPajama's sample from "
        "the hub (its parts' own licences), about 0.7G tokens",
    )
    s2l_data: list[str] | None = opt(
        None, "text for short-to-long (default: long_data; where that is the default, short_data)"
    )
    min_doc_len: int = opt(0, "leave shorter documents out of the long stream, in tokens", least=0)
    length_upsample: float = opt(
        1.0,
        "weight of documents of train_len tokens or more in the long stream, within a source",
        least=0,
    )
    skip_bad_lines: bool = opt(False, "leave out and count malformed records, do not stop at them")
    short_len: int | None = opt(None, "tokens in a short text (1024; <= original_len)", least=1)
    add_eos: bool | None = opt(None, "end documents with EOS (where the tokenizer has one)")
    cache_dir: str = opt("out/tokens", "where tokenised text is kept, for all runs")
    # A step: the paper's 16 micro-batches, 131,072 tokens in each
    steps: int = opt(512, "optimizer steps", least=1)
    long_micro: int | None = opt(None, "long micro-batches a step (8; long_cpt: 16)", least=1)
    long_batch: int | None = opt(None, "sequences in each (131072 / target_len)", least=1)
    short_micro: int = opt(6, "short-text micro-batches a step; 0 drops the loss", least=0)
    short_batch: int | None = opt(None, "sequences in each (131072 / short_len)", least=1)
    s2l_micro: int = opt(2, "short-to-long micro-batches a step; 0 drops the loss", least=0)
    s2l_batch: int | None = opt(None, "sequences in each (131072 / original_len)", least=1)
    # LongRecipe's second stage, after `steps`: cross-entropy, ordinary positions, the old window
    replay_data: list[str] | None = opt(None, "text like what the original was trained on")
    replay_steps: int = opt(0, "steps on it, the learning rate falling from lr / 10 to 0", least=0)
    replay_batch: int | None = opt(
        None, "sequences in each of its long_micro micro-batches (131072 / original_len)", least=1
    )
    merge: float = opt(0.0, "export merge x original + (1 - merge) x trained weights (paper: 0.5)")
    # Optimizer: AdamW, constant learning rate, no warm-up (App. B)
    lr: float = opt(2e-5, "learning rate", least=0)
    weight_decay: float = opt(0.1, "decoupled weight decay", least=0)
    beta1: float = opt(0.9, "AdamW's first decay")
    beta2: float = opt(0.95, "AdamW's second decay")
    grad_clip: float = opt(1.0, "largest global gradient norm", least=0)
    # Machine
    device: str | None = opt(None, "cuda or cpu (default: cuda where there is one)")
    unit_tokens: int = opt(32768, "most tokens in one forward pass, at least one sequence", least=1)
    recompute: bool = opt(False, "recompute blocks in backward on a CPU; a GPU's plan decides")
    context: int | None = opt(None, "processes to a sequence, under torchrun (1)", least=1)
    gpu_gib: float | None = opt(None, "GPU memory to plan for (default: all that is free)", least=0)
    moments: Literal["fp32", "bf16"] = opt("fp32", "AdamW's m and v on a GPU")
    compile: bool = opt(False, "torch.compile the blocks on a GPU")
    save_every: int = opt(64, "steps between states that --resume can continue from", least=1)
    save_minutes: float = opt(30.0, "minutes until one is saved anyway; 0: never", least=0)
    keep: int = opt(2, "states kept; the disk needs room for one more; 0: save none", least=0)
    max_bad_steps: int = opt(3, "stop after so many steps in a row that are not finite", least=1)
    eval_tokens: int = opt(
        65536, "held-out tokens a stream in the closing report; 0: no report", least=0
    )
    seed: int = opt(2024, "of every random choice, each a function of (seed, stream, step)")


# ---------------------------------------------------------------------------------------- losses


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos between hidden states, mean over tokens, in fp32 (eq. 5).

    student, teacher: (B, T, D), any float dtype. Returns a scalar.
    """
    return (1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def long_text_loss(student: Llama, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Next-token cross-entropy, mean over tokens, under ordinary positions by default (eq. 18).

    input_ids: (B, T + 1) int64. position_ids: (B, T) or (T,) int64.
    """
    hidden, _ = student(input_ids[:, :-1], position_ids)
    nll, count = next_token_loss(hidden, student.lm_head_weight, input_ids[:, 1:])
    return nll / count


def short_text_distillation(
    student: Llama,
    teacher: Llama,
    input_ids: Tensor,
    layers: list[int],
    position_ids: Tensor | None = None,
) -> Tensor:
    """Cosine distance of the chosen hidden states, SUM over layers (eq. 8).

    input_ids: (B, T) int64, read by both under positions 0..T-1, or the position_ids (T,) of a part
    of a text. No LM head runs in either model.
    """
    with torch.no_grad():
        _, target = teacher(input_ids, position_ids, layers)
    _, hidden = student(input_ids, position_ids, layers)
    return sum(memory.in_chunks(cosine_distance, hidden[i], target[i]) for i in layers)


def short_to_long_distillation(
    student: Llama,
    teacher: Llama,
    input_ids: Tensor,
    position_ids: Tensor,
    teacher_position_ids: Tensor | None = None,
) -> Tensor:
    """Cosine distance of the LAST hidden state; only the student sees skipped positions (eq. 17).

    input_ids: (B, T) int64. position_ids: (B, T) int64, spanning the target window.
    teacher_position_ids: (T,), the tokens' own indices in a text of which these are a part.
    """
    with torch.no_grad():
        target, _ = teacher(input_ids, teacher_position_ids)
    hidden, _ = student(input_ids, position_ids)
    return memory.in_chunks(cosine_distance, hidden, target)


def select_distill_layers(teacher: Llama, student: Llama, input_ids: Tensor, n: int) -> list[int]:
    """The n hidden states to distil: the last, and those whose attention drifts most (eq. 6).

    input_ids: (B, T) int64, short text. Returns sorted hidden-state indices.
    Differs: the paper leaves open how heads are pooled (here: their mean), which way the KL points
    (original || extended) and when it is taken (after rescaling, before any training).
    """
    kl = attention_kl(teacher, student, input_ids).mean(dim=1)  # (n_layers,)
    last = teacher.config.n_layers
    drifting = kl[: last - 1].argsort(descending=True)[: max(0, n - 1)] + 1
    return sorted([*drifting.tolist(), last])


def stream_loss(
    c: Config,
    stream: "Stream",
    student: Llama,
    teacher: Llama,
    ids: Tensor,
    indices: Tensor,
    positions: Tensor,
) -> Tensor:
    """The loss of one pass, as `passes` yields it."""
    if not stream.taps:
        return long_text_loss(student, ids, positions)
    ids = ids[:, :-1]
    if stream.name == "short":
        return short_text_distillation(student, teacher, ids, c.distill_layers, indices)
    assert stream.name == "s2l", stream.name
    return short_to_long_distillation(student, teacher, ids, positions, indices)


# ----------------------------------------------------------------------------------------- train


def train(config: Config) -> Path:
    """Extend a checkpoint. Returns the exported folder, OUT_DIR/hf.

    Raises ValueError, one line, for whatever the user can mend.
    """
    with runs.Life() as life:  # the lock on OUT_DIR, signals, a save when an error ends the run
        try:
            return extend(config, life)
        except torch.OutOfMemoryError as e:
            raise ValueError(
                f"{str(e).splitlines()[0]} Go on, or begin again, with a --gpu_gib some GiB below "
                "the GPU peak of the memory plan, or a smaller --unit_tokens"
            ) from e


def extend(config: Config, life: runs.Life) -> Path:
    """`train`, in execution order: set up, take the steps, export and report."""
    # What to do, and whether it can be done
    config = runs.after_restart(config)
    run = runs.read_run(config.resume) if config.resume else None
    if run:
        config = resumed_config(run, config)
    life.join(config.device, config.context or 1)
    if run:
        life.claim(Path(config.resume), resumed=True)
    source = resolve_checkpoint(config.ckpt)
    original = load_config(source)
    c = resolve(config, original, source)
    out_dir = Path(c.out_dir)
    if not run:
        life.from_first(lambda: runs.refuse_taken(out_dir))
    life.from_first(lambda: preflight(c, original))
    if c.device.startswith("cuda:"):
        torch.cuda.set_device(c.device)
    plan = plan_memory(c, original) if life.size == 1 else None  # None on a CPU

    # Text
    tokenizer = data.load_tokenizer(source, c.add_eos)
    tokenizer.check_fits(original.vocab_size)
    if life.size > 1:
        life.from_first(lambda: open_streams(c, tokenizer) and None)  # one process tokenises
    streams = open_streams(c, tokenizer)
    ends = data.sentence_ends(tokenizer) if c.long_position_scheme == "longrecipe" else None
    about = {
        "data": {name: s.text.corpus.fingerprint for name, s in streams.items()},
        "weights": runs.weight_fingerprints(source),
        "code": runs.code_fingerprints(),
    }
    if run:
        runs.check_same(run, about, out_dir, c.resume_anyway)
    about["versions"] = {"python": platform.python_version(), "torch": torch.__version__}

    # Models, layers to distil, optimizer
    compute = torch.bfloat16 if c.device.startswith("cuda") else torch.float32
    choose = "short" in streams and streams["short"].taps and not c.distill_layers
    if choose and life.size > 1:  # before the models are in shards
        c.distill_layers = life.from_first(
            lambda: choose_layers(c, *open_models(c, source, compute), streams["short"])
        )
    dtype = torch.bfloat16 if plan else torch.float32
    teacher, student = open_models(c, source, dtype, life.shard if life.size > 1 else None)
    if choose and life.size == 1:
        c.distill_layers = choose_layers(c, teacher, student, streams["short"])
    adamw = c.lr, (c.beta1, c.beta2), 1e-8, c.weight_decay
    machine = memory.Machine(plan, student, teacher, *adamw) if plan else None
    if machine:
        optimizer = machine.optimizer
        for stream in streams.values():
            stream.rows = plan.units[stream.name].batch
    else:
        optimizer = torch.optim.AdamW(student.parameters(), *adamw)
        if c.recompute or life.size > 1:
            memory.use(student, memory.Policy())  # every block is recomputed

    # From here on OUT_DIR is ours, and what --resume needs is in it
    if not run:
        life.claim(out_dir, resumed=False)
    about["config"] = asdict(c)
    life.write_about(about)
    first = life.begin(c, student, optimizer)
    logged = life.from_first(lambda: runs.trim_log(out_dir / "log.jsonl", first))
    watch = runs.Watch(logged, c.max_bad_steps)
    print_header(c, student, teacher, streams)

    # The steps. Of eq. 18's three losses each pass adds one, to the gradients of all
    began, last = time.monotonic(), c.steps + c.replay_steps
    with open(os.devnull if life.rank else out_dir / "log.jsonl", "a") as log:
        for step in range(first, last):
            step_began = time.monotonic()
            active = [s for s in streams.values() if (s.name == "replay") == (step >= c.steps)]
            losses = {stream.name: 0.0 for stream in active}  # unweighted means over the step
            for stream in active:
                stream.waited = 0.0
                if machine:
                    machine.ready(stream.name)
                for ids, indices, positions, part in passes(c, stream, step, life, ends):
                    life.check_stop()
                    loss = stream_loss(c, stream, student, teacher, ids, indices, positions)
                    # Parts sum to 1 over all processes, whose gradients FSDP averages.
                    (loss * (stream.weight * part * life.size)).backward()
                    losses[stream.name] += loss.item() * part
            losses = dict(zip(losses, life.total(list(losses.values())), strict=True))
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), c.grad_clip)
            norm = (norm.full_tensor() if life.size > 1 else norm).item()
            line = log_line(c, step + 1, streams, losses, norm)
            line["flag"] = watch.flag(line)
            if line["flag"] != "skipped":
                with life.update():
                    optimizer.param_groups[0]["lr"] = learning_rate(c, step)
                    optimizer.step()
            optimizer.zero_grad()
            seconds = time.monotonic() - step_began
            waited = sum(stream.waited for stream in active)
            line |= {"seconds": round(seconds, 3), "data_share": round(waited / seconds, 4)}
            log.write(runs.json_line(line))
            log.flush()
            left = (time.monotonic() - began) / (step + 1 - first) * (last - step - 1)  # seconds
            if step == first and left > 600:
                print(f"about {left / 3600:.1f} hours to go, if every step is like this first one")
            print_step(c, line, left)
            life.done(step + 1, log, watch.bad)
            watch.stop_if_lost(line, last, life)
    life.finish()

    # The export, and what it gained and lost
    student.eval()
    if machine:
        machine.finish()
    if life.size > 1:
        student = runs.gathered(student, life.rank)  # on the CPU
        if life.rank:
            return out_dir / "hf"
        teacher, optimizer = load_checkpoint(source), None
        life.let_go()
    if c.merge:
        merge_weights(student, teacher, c.merge)
    stored = original.stored_dtype() or dtype  # as the original is
    exported = save_checkpoint(student.to(stored), out_dir / "hf", tokenizer_from=source)
    print(f"extended checkpoint: {exported}")
    if c.eval_tokens:
        about["report"] = report(c, *(m.to(c.device, compute) for m in (teacher, student)))
    life.write_about(about)
    print(f"more: python evaluate.py --base {c.ckpt} --ckpt {out_dir}")
    return exported


# ----------------------------------------------------------------------------------------- settings

# The paper's base for (theta, window) -> target (App. B, tables 3 and 9); 32000 and 128000 there.
PAPER_THETA = {
    (500_000.0, 8192, 32768): 2e7,
    (500_000.0, 8192, 131072): 1e8,
    (1_000_000.0, 32768, 131072): 2e7,
}


def default_theta(theta: float, original_len: int, target_len: int) -> float:
    """ABF's new base: the paper's where it has one, else a rule.

    The rule keeps how many frequencies complete a turn within the window: with wavelengths
    2 pi theta^(2j/H), that is ln(new) / ln(theta) = ln(target / 2 pi) / ln(original / 2 pi).
    Rounded to two digits.
    """
    for (base, window, target), new in PAPER_THETA.items():
        if (theta, original_len) == (base, window) and 0.97 * target < target_len <= target:
            return new
    ratio = math.log(target_len / (2 * math.pi)) / math.log(original_len / (2 * math.pi))
    return float(f"{theta**ratio:.1e}")


def long_alone(c: Config) -> bool:
    """A baseline that reads no other stream."""
    return c.method in ("long_cpt", "longrecipe")


def fill(c: Config, **defaults) -> None:
    """Set the fields that were left to us."""
    for name, value in defaults.items():
        if getattr(c, name) is None:
            setattr(c, name, value)


def resolve(config: Config, model: ModelConfig, ckpt: Path) -> Config:
    """Fill in what was left to us and refuse what cannot work, before anything is allocated."""
    c = replace(config, ckpt=str(ckpt.resolve()))
    fill(c, original_len=model.max_position_embeddings)
    if c.original_len is None:
        raise ValueError(
            "--original_len is missing: Meta's params.json does not say it; pass 4096 for Llama 2, "
            "2048 for Llama 1"
        )
    for f in fields(Config):
        value, least = getattr(c, f.name), f.metadata["least"]
        if None not in (value, least) and not least <= value < math.inf:
            raise ValueError(f"--{f.name} {value}: need at least {least}")
    if c.target_len is None:
        raise ValueError("--target_len is missing: how many tokens the extended model should read")
    if c.target_len <= c.original_len:
        raise ValueError(
            f"--target_len {c.target_len} is not above the original window of {c.original_len}; "
            "pass a longer one (or the true --original_len)"
        )
    if long_alone(c):
        c.short_micro = c.s2l_micro = 0
    if c.device and c.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {c.device}: need cpu or cuda")
    n = memory.parameter_count(model)
    if c.device is None and n > 1e9 and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, and {n / 1e9:.1f}B parameters are not for a "
            "CPU; compare the CUDA it was built for with nvidia-smi's, or pass --device cpu"
        )
    far = c.target_len >= 128_000  # the paper's second set of settings
    fill(
        c,
        out_dir=f"out/{Path(config.ckpt).name}-{c.target_len}",
        device="cuda" if torch.cuda.is_available() else "cpu",
        context=1,
        # Short-to-long wants text like the short stream's; a user's own long text is near at hand.
        s2l_data=c.long_data or c.short_data or data.DEFAULT_SHORT,
        long_data=data.DEFAULT_LONG,
        short_data=data.DEFAULT_SHORT,
        alpha_short=2.0 if far else 5.0,
        alpha_s2l=15.0 if far else 10.0,
        n_distill_layers=3 if far and c.target_len > 8 * c.original_len else 6,
        position_scheme="uniform" if far else "cream",
        long_position_scheme="longrecipe" if c.method == "longrecipe" else "ordinary",
        long_micro=16 if long_alone(c) else 8,
        long_batch=max(1, 131072 // c.target_len),
        s2l_batch=max(1, 131072 // c.original_len),
        replay_batch=max(1, 131072 // c.original_len),
    )
    if c.rope_type is None:
        fill(c, rope_theta=default_theta(model.rope_theta, c.original_len, c.target_len))
    fill(c, train_len=default_train_len(c), short_len=1024)
    c.short_len = min(c.short_len, c.original_len)
    fill(c, short_batch=max(1, 131072 // c.short_len))
    if c.train_len > c.target_len:
        raise ValueError(
            f"--train_len {c.train_len} is above --target_len {c.target_len}; try a third of it"
        )
    if bool(c.replay_data) != bool(c.replay_steps):
        raise ValueError(
            f"--replay_data {c.replay_data} with --replay_steps {c.replay_steps}: need both or none"
        )
    if not 0 <= c.merge < 1:
        raise ValueError(f"--merge {c.merge}: need the original's share, from 0 to below 1")
    if not all(1 <= i <= model.n_layers for i in c.distill_layers or ()):
        raise ValueError(
            f"--distill_layers {c.distill_layers}: this model has hidden states 1 to "
            f"{model.n_layers} (the last is after the final norm)"
        )
    lengths = c.train_len, c.short_len, c.original_len
    if any(n % c.context for n in (*lengths, model.n_heads, model.n_kv_heads)):
        raise ValueError(
            f"--context {c.context} must divide the lengths {lengths} and the model's "
            f"{model.n_heads} heads and {model.n_kv_heads} kv heads"
        )
    if c.device.startswith("cuda"):  # cuDNN's attention is only sound at such lengths
        for name, length in zip(("train_len", "short_len", "original_len"), lengths, strict=True):
            if length % 128:
                raise ValueError(
                    f"--{name} {length}: attention on a GPU needs a multiple of 128, try "
                    f"{max(128, length // 128 * 128)}"
                )
        if not torch.cuda.is_available():
            raise ValueError(f"--device {c.device}: torch sees no GPU; pass --device cpu")
    return c


def default_train_len(c: Config) -> int:
    """LongRecipe's best ratio, 30% of the target (its table of ratios); all of it if ordinary.

    From 4,096 on a multiple of 128, as attention on a GPU likes its lengths.
    """
    if c.long_position_scheme == "ordinary":
        return c.target_len
    multiple = 128 if c.target_len >= 4096 else 1
    return round(0.3 * c.target_len / multiple) * multiple


def resumed_config(run: dict, given: Config) -> Config:
    """The config a run began with, for the OUT_DIR it lies in now."""
    if unknown := run["config"].keys() - {f.name for f in fields(Config)}:
        raise ValueError(
            f"--resume {given.resume}: its setting {min(unknown)} is not known here; resume it "
            "with the version of longred that began it"
        )
    now = {"out_dir": given.resume, "resume": given.resume, "resume_anyway": given.resume_anyway}
    for f in fields(Config):
        if f.name in runs.HARMLESS or given.resume_anyway:
            if f.name not in now and getattr(given, f.name) != f.default:
                now[f.name] = getattr(given, f.name)
    return Config(**(run["config"] | now))


# ------------------------------------------------------------------------------------------ streams


LOSSES = "long", "short", "s2l", "replay"  # the streams, in the order a step takes them


@dataclass
class Stream:
    """One source of a step's loss: `micro` batches of `batch` sequences of `seq_len` tokens."""

    name: str  # of LOSSES; "replay" is read alone, in the steps after the others'
    micro: int
    batch: int
    seq_len: int
    weight: float  # on the stream's mean loss (eq. 18, see the top of this file)
    taps: int  # hidden states compared with the teacher's; 0: cross-entropy, no teacher
    rows: int = 0  # sequences in one forward pass
    text: data.Stream | None = None  # set by open_streams
    waited: float = 0.0  # seconds for data in this step

    @property
    def tokens(self) -> int:  # in a step
        return self.micro * self.batch * self.seq_len


def plan_streams(c: Config) -> dict[str, Stream]:
    """The streams that this run reads, all that is told about them in one place.

    A weight is share x alpha; a share is the stream's part of the paper's 16 micro-batches, however
    many are read here.
    """
    alone = long_alone(c)
    short = (c.short_micro, c.short_batch, c.short_len)
    s2l = (c.s2l_micro, c.s2l_batch, c.original_len)
    layers = len(c.distill_layers or ()) or c.n_distill_layers
    if c.method == "longred":
        short += (6 / 16 * c.alpha_short, layers)
        s2l += (2 / 16 * c.alpha_s2l, 1)
    else:  # cross-entropy on all
        short, s2l = (*short, 6 / 16, 0), (*s2l, 2 / 16, 0)
    long = (c.long_micro, c.long_batch, c.train_len, 1.0 if alone else 8 / 16, 0)
    replay = (c.long_micro if c.replay_steps else 0, c.replay_batch, c.original_len, 1.0, 0)
    every = dict(zip(LOSSES, (long, short, s2l, replay), strict=True))
    streams = {name: Stream(name, *spec) for name, spec in every.items() if spec[0]}
    for stream in streams.values():
        stream.rows = min(stream.batch, max(1, c.unit_tokens // stream.seq_len))
    return streams


def open_streams(c: Config, tokenizer: data.Tokenizer) -> dict[str, Stream]:
    """Tokenise (once) and open the streams."""
    streams = plan_streams(c)
    for name, stream in streams.items():
        specs = getattr(c, f"{name}_data")
        corpus = data.tokenize(specs, tokenizer, c.cache_dir, name, c.skip_bad_lines)
        only_long = (c.min_doc_len, c.length_upsample) if name == "long" else ()
        stream.text = data.Stream(corpus, name, c.seed, stream.batch, stream.seq_len, *only_long)
        steps = c.replay_steps if name == "replay" else c.steps
        print(stream.text.describe(stream.micro * steps))
    return streams


def skipped_positions(c: Config, index: int, batch: int) -> Tensor:
    """(batch, original_len) int64 position ids of short-to-long micro-batch number `index`."""
    rng = np.random.default_rng([c.seed, 0x52, index])
    scheme = getattr(data, f"{c.position_scheme}_positions")
    return torch.from_numpy(scheme(rng, batch, c.original_len, c.target_len))


def long_positions(c: Config, index: int, input_ids: Tensor, ends: np.ndarray) -> Tensor | None:
    """Position ids of long micro-batch number `index` within the target window; None: ordinary.

    input_ids: (B, T) int64. ends: data.sentence_ends of the tokenizer. Returns (B, T) int64.
    """
    rng = np.random.default_rng([c.seed, 0x4C, index])
    if c.long_position_scheme == "ordinary":
        return None
    if c.long_position_scheme == "pose":
        return torch.from_numpy(data.pose_positions(rng, *input_ids.shape, c.target_len))
    rows = [
        data.longrecipe_positions(rng, data.sentence_starts(row, ends), len(row), c.target_len)
        for row in input_ids.numpy()
    ]
    return torch.from_numpy(np.stack(rows))


def passes(c: Config, stream: Stream, step: int, life: runs.Life, ends: np.ndarray):
    """This process's part of a step's sequences, up to `rows` in each forward and backward pass.

    Yields ids (B, T + 1), their indices in the text (T,), the student's positions, (B, T) where
    other than those, and the pass's part of the stream's mean loss; sequences are equally long, so
    that is one over sequences. With nothing left to do a process repeats a sequence, as part 0:
    FSDP needs it.
    """
    n = stream.micro * stream.batch
    mine, piece, pieces = life.share(n)
    size = stream.seq_len // pieces
    tokens = slice(piece * size, (piece + 1) * size)
    indices = torch.arange(tokens.start, tokens.stop, device=c.device)
    loaded = -1  # micro-batch
    for start in range(0, len(mine), stream.rows):
        real = [j for j in mine[start : start + stream.rows] if j < n]
        ids, positions = [], []
        for j in real or [n - 1]:
            micro, row = divmod(j, stream.batch)
            if micro != loaded:
                loaded = micro
                index = step * stream.micro + micro
                asked = time.monotonic()
                batch = stream.text.batch(index)
                stream.waited += time.monotonic() - asked
                at = None  # (B, T): positions other than a token's own index
                if stream.name == "s2l" and stream.taps:
                    at = skipped_positions(c, index, stream.batch)
                elif stream.name == "long":
                    at = long_positions(c, index, batch[:, :-1], ends)
            ids.append(batch[row, tokens.start : tokens.stop + 1])
            positions += [] if at is None else [at[row, tokens]]
        yield (
            torch.stack(ids).to(c.device),
            indices,
            torch.stack(positions).to(c.device) if positions else indices,
            len(real) / (n * pieces),
        )


# ------------------------------------------------------------------------------- models and machine


def preflight(c: Config, model: ModelConfig) -> None:
    """Refuse what would fail after hours: a run that its disk or its memory cannot hold."""
    n = memory.parameter_count(model)
    export = n * (model.stored_dtype() or torch.float32).itemsize
    # A state: fp32 weights (on a GPU bf16 and a remainder) and AdamW's two moments.
    many = "WORLD_SIZE" in os.environ
    bf16 = c.device.startswith("cuda") and c.moments == "bf16" and not many
    runs.check_disk(Path(c.out_dir), export, c.keep and (c.keep + 1) * n * (8 if bf16 else 12))
    if many and (c.gpu_gib or c.compile or c.moments != "fp32"):
        raise ValueError(
            "--gpu_gib, --moments and --compile are one GPU's: drop them with torchrun"
        )
    if c.device == "cpu" and not many:
        tokens = max(s.rows * s.seq_len for s in plan_streams(c).values())
        # fp32 student, teacher, gradients and the two moments
        runs.check_memory(20 * n, runs.activation_bytes(model, tokens, c.recompute))


def rope_scaling(c: Config) -> dict | None:
    """--rope_type in transformers' form; None keeps what the checkpoint has (ABF)."""
    if c.rope_type is None:
        return None
    scaling = {"rope_type": c.rope_type}
    if c.rope_type != "default":
        scaling["factor"] = c.target_len / c.original_len
    if c.rope_type == "yarn":
        scaling["original_max_position_embeddings"] = c.original_len
    return scaling


def open_models(c: Config, source: Path, dtype=torch.float32, shard=None) -> tuple[Llama, Llama]:
    """The frozen teacher, and the student with its rotary rescaled."""
    teacher = load_checkpoint(source, None, None, c.device, dtype, shard).requires_grad_(False)
    scaling = rope_scaling(c)
    student = load_checkpoint(source, c.rope_theta, scaling, c.device, dtype, shard).train()
    student.config.max_position_embeddings = c.target_len
    return teacher, student


def choose_layers(c: Config, teacher: Llama, student: Llama, short: Stream) -> list[int]:
    """Select on a few sequences of the original length (sec. 3.1 used 1,000 of 8,192 tokens)."""
    n = max(1, min(16, 32768 // c.original_len))
    text = data.Stream(short.text.corpus, "layers", c.seed, n, c.original_len)
    ids = text.batch(0)[:, :-1].to(c.device)
    layers = select_distill_layers(teacher, student, ids, c.n_distill_layers)
    print(f"layers to distil, by attention drift on {ids.numel():,} tokens: {layers}")
    return layers


def plan_memory(c: Config, model: ModelConfig) -> memory.Plan | None:
    """On a GPU: the memory table and what follows from it, before anything is allocated."""
    if not c.device.startswith("cuda"):
        return None
    units = []
    for s in plan_streams(c).values():
        count = s.micro * -(-s.batch // s.rows)
        units.append(memory.Unit(s.name, s.rows, s.seq_len, count, s.taps))
    room = int(c.gpu_gib * memory.GIB) if c.gpu_gib else memory.gpu_room()
    moments = torch.bfloat16 if c.moments == "bf16" else torch.float32
    plan = memory.make_plan(model, units, room, runs.available_memory(), moments, c.compile)
    print(plan.table(), flush=True)
    return plan


def learning_rate(c: Config, step: int) -> float:
    """Constant; over the replay stage from a tenth, LongRecipe's 5e-6 to 5e-5, on a line to 0 (the
    shape is ours: its paper gives none)."""
    if step < c.steps:
        return c.lr
    return 0.1 * c.lr * (c.steps + c.replay_steps - step) / c.replay_steps


# -------------------------------------------------------------------------------- what is printed


def print_header(c: Config, student: Llama, teacher: Llama, streams: dict[str, Stream]) -> None:
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


def log_line(c: Config, step: int, streams: dict, losses: dict, norm: float) -> dict:
    """One object of log.jsonl. Every loss_* is an unweighted mean over the step; `loss` is their
    weighted sum, what is trained."""
    return {
        "step": step,
        "loss": sum(streams[name].weight * loss for name, loss in losses.items()),
        **{f"loss_{name}": losses.get(name) for name in LOSSES},
        "lr": learning_rate(c, step - 1),
        "grad_norm": norm,
        "tokens": sum(streams[name].tokens for name in losses),
        "peak_gib": round(peak_gib(c.device), 2),
    }


def peak_gib(device: str) -> float:
    """Most memory held so far: the GPU allocator's, else this process's (0 where unknown)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_step(c: Config, line: dict, eta: float) -> None:
    losses = "  ".join(
        f"{name} {line[f'loss_{name}']:.4f}" for name in LOSSES if line[f"loss_{name}"] is not None
    )
    last = c.steps + c.replay_steps
    print(
        f"step {line['step']:>{len(str(last))}}/{last}  {losses}  lr {line['lr']:g}  grad "
        f"{line['grad_norm']:.2f}  {line['tokens'] / line['seconds']:,.0f} tok/s  peak "
        f"{line['peak_gib']:.1f} GiB  data {line['data_share']:.1%}  "
        f"ETA {eta // 60:.0f}:{eta % 60:02.0f}"
        + (f"  {line['flag'].upper()}" if line["flag"] else ""),
        flush=True,
    )


def report(c: Config, teacher: Llama, student: Llama) -> dict:
    """Compare original and extended model on held-out text; print it and write report.md."""
    from evaluate import kept, position_losses, table

    tokenizer, texts = data.load_tokenizer(c.ckpt, c.add_eos), {}
    for name, specs, seq_len in (
        ("short", c.short_data, c.original_len),
        ("long", c.long_data, c.target_len),
    ):
        quiet = dict(skip_bad_lines=c.skip_bad_lines, log=lambda line: None)
        try:
            corpus = data.tokenize(specs, tokenizer, c.cache_dir, name, **quiet)
            ids = data.held_out(corpus, max(1, c.eval_tokens // seq_len), seq_len)
            texts[name] = ids.to(c.device)
        except ValueError as e:
            print(f"not measured: {e}")
    rows, curves = {}, {}
    for name, model in (("original", teacher), (c.method, student)):
        row = rows[name] = {}
        if "short" in texts:
            short = kept(teacher, model, texts["short"], attention_sequences=0)
            row |= {f"short loss at {c.original_len}": short["loss"], "KL": short["kl"]}
            row["drift (1 - cos)"] = 1 - short["cosine"][-1]
        if "long" in texts:
            by_position = position_losses(model, texts["long"])
            row[f"long loss at {c.target_len}"] = by_position.mean().item()
            for i, quarter in enumerate(by_position.chunk(4)):
                row[f"quarter {i + 1}"] = quarter.mean().item()
            curves[name] = [part.mean().item() for part in by_position.chunk(32)]
    steps = {"replay": c.replay_steps}
    tokens = {n: s.tokens * steps.get(n, c.steps) for n, s in plan_streams(c).items()}
    read = ", ".join(f"{n:,} {name} tokens" for name, n in tokens.items())
    held_out = ", ".join(f"{len(ids)} {name} sequences" for name, ids in texts.items())
    text = (
        f"# {c.method}: {c.original_len:,} -> {c.target_len:,}\n\n"
        f"{c.ckpt}, {c.steps} steps: {read}. Losses in nats a token on held-out text; on the "
        "short, KL(original, it) and drift of the last hidden state: "
        f"{held_out}.\n\n{table(rows)}"
    )
    (Path(c.out_dir) / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return {"rows": rows, "long loss in 32 parts": curves, "tokens": tokens}


# ------------------------------------------------------------------------------------------ demo


def demo(config: Config) -> Path:
    """The paper's story at a size any laptop trains; no network. Returns the demo's folder.

    A byte-level Llama of 0.8M parameters learns the English prose that ships inside Python
    (window 256), then its window is stretched to 1,024 over Python's own sources: once by long-text
    training alone, once by LongReD.
    """
    import evaluate

    out_dir = Path(config.out_dir or "out/demo")
    prose, code, original = out_dir / "prose.jsonl", out_dir / "code.jsonl", out_dir / "original"
    if not (original / "config.json").is_file():
        write_demo_text(prose, code)
        train_demo_model(config, original, prose)
    flags = dict(ckpt=str(original), target_len=1024, rope_theta=1e5, steps=60, lr=5e-4)
    flags |= dict(long_data=[str(code)], short_data=[str(prose)], s2l_data=[str(prose)])
    flags |= dict(long_micro=2, long_batch=2, short_micro=2, short_batch=4)
    flags |= dict(s2l_micro=1, s2l_batch=4, cache_dir=str(out_dir / "tokens"))
    flags |= dict(seed=config.seed, device=config.device)
    reports = {}
    for method in ("long_cpt", "longred"):
        folder = out_dir / method
        if (folder / "longred.json").exists():
            shutil.rmtree(folder)  # an earlier demo's
        train(Config(method=method, out_dir=str(folder), **flags))
        reports[method] = runs.read_run(folder)["report"]
    reports["original"] = reports["longred"]  # each measures the original too
    rows, measured = {}, []
    for name, title in (("original",) * 2, ("long_cpt", "Long CPT"), ("longred", "LongReD")):
        row = reports[name]["rows"][name]
        rows[title] = {
            "prose loss at 256": row["short loss at 256"],
            "code loss at 1,024": row["long loss at 1024"],
            "drift of the last hidden state": row["drift (1 - cos)"],
        }
        losses = {"kept": {"loss": row["short loss at 256"]}}
        losses["position"] = {"whole": {"nll": reports[name]["long loss in 32 parts"][name]}}
        measured.append((title, out_dir / name / "hf", losses))
    print(f"\nWhat the longer window gained, and what it cost:\n\n{evaluate.table(rows)}\n")
    print(
        f"More: python evaluate.py --base {original} --ckpt {out_dir}/long_cpt {out_dir}/longred "
        f"--out_dir {out_dir}/more"
    )
    try:
        print("pictures:", *evaluate.draw(measured, out_dir, 256, 1024))
    except ImportError:
        print("for pictures: pip install matplotlib, then run this again")
    return out_dir


def write_demo_text(prose: Path, code: Path) -> None:
    """Two .jsonl files: Python's help topics, and the sources of its standard library."""
    from pydoc_data.topics import topics

    prose.parent.mkdir(parents=True, exist_ok=True)
    with open(prose, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    with open(code, "w", encoding="utf-8") as f:
        for path in sorted(stdlib.rglob("*.py")):
            parts = path.relative_to(stdlib).parts
            if not {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(parts):
                f.write(json.dumps({"text": path.read_text("utf-8", "replace")}) + "\n")


def train_demo_model(config: Config, out_dir: Path, prose: Path, steps: int = 600) -> None:
    """Train the demo's original model, byte-level and 0.8M parameters, from scratch to a HF folder.

    Plain next-token training: 600 steps of 12 x 256 tokens, a linear warm-up and a cosine to 0.
    """
    tokenizer_dir = write_byte_tokenizer(out_dir.with_name("tokenizer"))
    tokenizer = data.load_tokenizer(tokenizer_dir)
    corpus = data.tokenize([str(prose)], tokenizer, out_dir.with_name("tokens"), "prose")
    text = data.Stream(corpus, "original", config.seed, 12, 256)
    shape = dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=352)
    shape |= dict(vocab_size=256, rope_theta=1e4, max_position_embeddings=256)
    generator = torch.Generator().manual_seed(config.seed)
    model = Llama(ModelConfig(**shape)).init_weights(generator=generator)
    peak_lr, warm_up = 4e-3, 40
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    bar = tqdm(range(steps), desc="training the demo's original model", unit="step")
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, (step + 1) / warm_up) * cosine
        loss = long_text_loss(model, text.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    save_checkpoint(model, out_dir, tokenizer_from=tokenizer_dir)


def write_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of 256 tokens, one a byte: no merges, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# ------------------------------------------------------------------------------------------ main


def parse_args(argv: list[str] | None) -> Config:
    """Config from the command line; its field names are the flags."""
    parser = argparse.ArgumentParser(
        "longred.py", "python longred.py [flags]", __doc__, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(message: str):
        raise SystemExit(f"longred: {message}; all flags: python longred.py --help")

    parser.error = error
    for f in fields(Config):
        (kind, _), more = get_args(f.type | None), {}  # of X or X | None, kind is X
        if get_origin(kind) is list:
            kind, more["nargs"] = get_args(kind)[0], "+"
        if get_origin(kind) is Literal:
            more["choices"] = get_args(kind)
        elif kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more |= {"type": kind, "metavar": kind.__name__}
        shown = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            f"--{f.name}", default=f.default, help=f.metadata["help"] + shown, **more
        )
    return Config(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's error ends as SystemExit with one line."""
    config = parse_args(argv)
    given = {f.name for f in fields(Config) if getattr(config, f.name) != f.default}
    try:
        extra = given - {"resume", "resume_anyway", *runs.HARMLESS}
        if config.resume and extra and not config.resume_anyway:
            raise ValueError(
                f"--resume takes its run's own settings: drop --{min(extra)}, or add "
                "--resume_anyway"
            )
        if config.resume or config.ckpt:
            train(config)
        elif extra := given - {"out_dir", "seed", "device"}:
            raise ValueError(
                f"--{min(extra)} needs --ckpt: the checkpoint to extend (none: the demo)"
            )
        else:
            demo(config)
    except (ValueError, OSError) as e:
        raise SystemExit(f"longred: {e}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
