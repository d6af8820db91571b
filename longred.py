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
    the sum of the three               eq. 18      plan_streams (weights), the loop in train
    similarity of hidden states        eq. 5       cosine_distance
    layers to distil, by attention KL  eq. 6       select_distill_layers, model.attention_kl

--method soft_replay keeps the model's outputs, not its hidden states: 8/16 L_long + alpha_kl (6/16
KL(teacher || student) of the next token on short text + 2/16 of it on short-to-long's text under
ordinary positions). --method longred --alpha_kl A adds A x 6/16 KL on short text to LongReD's step,
from the same forward passes. KL against forgetting is others' (on a model's own samples: arXiv
2605.26097); these shares are Mix CPT's.

--method longrecipe is LongRecipe (arXiv 2409.00509) in the same loop: long text of 0.3 x the target
under positions that skip from sentence to sentence. --short_rope original: two rotaries, short text
read under the old one, the rest under the new (after LongRoPE2, arXiv 2502.20082).

Differs: the two distillations are distances, 1 - cos, where the paper has -cos, and means over a
batch where eq. 8 sums over texts: the same direction, and 0 when nothing was forgotten. Eq. 18 is
read as the released code runs it, a mean over a step's 16 micro-batches (8 long, 6 short, 2 short-
to-long): 8/16 L_long + 6/16 alpha_short L_short + 2/16 alpha_s2l L_s2l, at 32K 0.5 : 1.875 : 1.25.

B sequences, T tokens, D hidden width. Locks, states, processes and memory: machine/.
"""

import importlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from machine import run as machine
from machine.run import opt
from model import Llama, attention_kl, merge_weights, next_token_kl, next_token_loss, rescaled
from rope_kernels import rope_frequencies

default_theta = machine.default_theta  # for code beyond this repository, as write_byte_tokenizer

# ---------------------------------------------------------------------------------------- config


@dataclass
class Config(machine.Config):
    """What is learnt, from what. Each field is a flag, and so are machine.Config's; None: worked
    out from the checkpoint and the paper (machine/settings.py)."""

    # What to extend, and where to
    ckpt: str | None = opt(None, "folder, OUT_DIR, known name or hub id; none: the demo")
    target_len: int | None = opt(None, "the new window, in tokens")
    original_len: int | None = opt(None, "the old window (default: the checkpoint's)", least=32)
    rope_type: Literal["linear", "yarn", "ntk", "default"] | None = opt(
        None,
        "linear (PI), yarn, ntk: by target / original; 'default': the checkpoint's scaling removed "
        "(default: ABF, a larger theta, its scaling kept)",
    )
    rope_theta: float | None = opt(None, "new theta (default: the paper's, or a rule)", 1, 1e15)
    # Method
    method: Literal["longred", "soft_replay", "long_cpt", "mix_cpt", "longrecipe"] = opt(
        "longred",
        "longred: three losses; soft_replay: cross-entropy on long text, KL to the original's "
        "outputs on short; long_cpt: cross-entropy on long text; mix_cpt: on all streams; "
        "longrecipe: on text of --train_len with gaps between sentences",
    )
    alpha_short: float | None = opt(None, "weight of the short loss (default: 5; at 128K 2)", 0)
    alpha_s2l: float | None = opt(None, "weight of short-to-long (default: 10; at 128K 15)", 0)
    alpha_kl: float | None = opt(None, "weight of KL on short text (default: 0; soft_replay: 1)", 0)
    short_rope: Literal["new", "original"] = opt(
        "new", "rotary under which the short stream is read (original: see --export_longrope)"
    )
    distill_layers: list[int] | None = opt(None, "hidden states to distil (default: by drift)")
    n_distill_layers: int | None = opt(
        None, "how many (default: 6; 3 from 128K on where the old window is under an eighth)", 1
    )
    position_scheme: Literal["uniform", "cream", "cream_truncated"] | None = opt(
        None, "skipped positions of short-to-long (default: cream; uniform from 128K on)"
    )
    long_position_scheme: Literal["ordinary", "pose", "endprompt", "longrecipe"] | None = opt(
        None, "positions of long text (default: ordinary; method longrecipe: longrecipe)"
    )
    train_len: int | None = opt(
        None, "tokens in a long text (default: target_len; 0.3 of it where positions skip)", 1
    )
    # Text
    long_data: list[str] | None = opt(
        None,
        "long text: files, folders, globs, hub datasets hf:owner/name[/config][:split][#column] "
        "(default: 1.3 GB of public-domain books and open-licence papers, 0.9G tokens)",
    )
    short_data: list[str] | None = opt(
        None,
        "short text, the like of which is to be kept; self[:N]: N (2,000) of the checkpoint's own "
        "(default: 2.9 GB of RedPajama's sample from the hub, 0.7G tokens)",
    )
    s2l_data: list[str] | None = opt(
        None, "text for short-to-long (default: long_data; where that is the default, short_data)"
    )
    short_len: int | None = opt(None, "tokens in a short text (default: 1024, or the window)", 1)
    document_mask: bool = opt(False, "attention stays within documents (the paper's does not)")
    # A step: the paper's 16 micro-batches, 131,072 tokens in each
    steps: int = opt(512, "optimizer steps", least=1)
    long_micro: int | None = opt(None, "long micro-batches a step (default: 8; 16 if alone)", 1)
    long_batch: int | None = opt(None, "sequences in each (default: 131072 / target_len)", least=1)
    short_micro: int = opt(6, "short-text micro-batches a step; 0 drops the loss", least=0)
    short_batch: int | None = opt(None, "sequences in each (default: 131072 / short_len)", least=1)
    s2l_micro: int = opt(2, "short-to-long micro-batches a step; 0 drops the loss", least=0)
    s2l_batch: int | None = opt(None, "sequences in each (default: 131072 / original_len)", least=1)
    # LongRecipe's second stage, after `steps`: cross-entropy, ordinary positions, the old window
    replay_data: list[str] | None = opt(None, "text like the original's own (default: none)")
    replay_steps: int = opt(0, "steps on it, the learning rate falling from lr / 10 to 0", least=0)
    replay_batch: int | None = opt(None, "sequences in each (default: 131072 / original_len)", 1)
    merge: float = opt(0.0, "export merge x original + (1 - merge) x trained weights (paper: 0.5)")
    # Optimizer: AdamW, constant learning rate, no warm-up (App. B)
    lr: float = opt(2e-5, "learning rate", least=0)
    weight_decay: float = opt(0.1, "decoupled weight decay", least=0)
    beta1: float = opt(0.9, "AdamW's first decay", least=0, most=1)
    beta2: float = opt(0.95, "AdamW's second decay", least=0, most=1)
    grad_clip: float = opt(1.0, "largest global gradient norm; 0: no limit", least=0)
    seed: int = opt(2024, "of every random choice, a function of (seed, stream, step)", least=0)


# ---------------------------------------------------------------------------------------- losses


@machine.in_chunks  # a few thousand tokens at a time, or autograd would save ten fp32 copies
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos between hidden states, mean over tokens, in fp32 (eq. 5).

    student, teacher: (B, T, D), any float dtype. Returns a scalar.
    """
    return (1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def long_text_loss(
    student: Llama,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    documents=None,
) -> Tensor:
    """Next-token cross-entropy, mean over tokens, under ordinary positions by default (eq. 18).

    input_ids: (B, T + 1) int64, or (B, T) where labels (B, T), the tokens that follow, are given.
    position_ids: (B, T) or (T,) int64.
    documents: a model.Documents. A document's first token (-100) is foretold by no other: it costs
    0 and counts in the mean, which so does not depend on how a step is cut into passes.
    """
    if labels is None:
        input_ids, labels = input_ids[:, :-1], input_ids[:, 1:]
    hidden, _ = student(input_ids, position_ids, documents=documents)
    nll, _ = next_token_loss(hidden, student.lm_head_weight, labels)
    return nll / labels.numel()


def short_text_distillation(
    student: Llama,
    teacher: Llama,
    input_ids: Tensor,
    layers: list[int],
    position_ids: Tensor | None = None,
    documents=None,
    with_kl: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Cosine distance of the chosen hidden states, SUM over layers (eq. 8).

    input_ids: (B, T) int64, read by both under positions 0..T-1, or the position_ids (T,) of a part
    of a text. No LM head runs in either model; with_kl: both do, and {"short": that distance,
    "kl": KL of the next token} comes back, from the same two passes.
    """
    with torch.no_grad():
        last, target = teacher(input_ids, position_ids, layers, documents=documents)
    own, hidden = student(input_ids, position_ids, layers, documents=documents)
    distance = sum(cosine_distance(hidden[i], target[i]) for i in layers)
    if not with_kl:
        return distance
    total, count = next_token_kl(own, student.lm_head_weight, last, teacher.lm_head_weight)
    return {"short": distance, "kl": total / count}


def soft_replay(
    student: Llama,
    teacher: Llama,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    documents=None,
) -> Tensor:
    """KL(teacher || student) of the next token, mean over tokens, over the whole vocabulary.

    A sampled token's cross-entropy is an estimate of the same gradient from one sample (Mix CPT).
    input_ids: (B, T) int64. position_ids: (T,), the tokens' own indices.
    """
    parts = short_text_distillation(student, teacher, input_ids, [], position_ids, documents, True)
    return parts["kl"]


def short_to_long_distillation(
    student: Llama,
    teacher: Llama,
    input_ids: Tensor,
    position_ids: Tensor,
    teacher_position_ids: Tensor | None = None,
    documents=None,
) -> Tensor:
    """Cosine distance of the LAST hidden state; only the student sees skipped positions (eq. 17).

    input_ids: (B, T) int64. position_ids: (B, T) int64, spanning the target window.
    teacher_position_ids: (T,), the tokens' own indices in a text of which these are a part.
    """
    with torch.no_grad():
        target, _ = teacher(input_ids, teacher_position_ids, documents=documents)
    hidden, _ = student(input_ids, position_ids, documents=documents)
    return cosine_distance(hidden, target)


def loss_table(c: Config, student: Llama, teacher: Llama) -> dict[str, Callable[..., Tensor]]:
    """What a stream's `loss` names: a function of a data.Batch, a mean over all of its tokens (a
    process may see a part of each sequence), or several means by their names in the log."""
    short = student  # as it reads the short stream
    if c.short_rope == "original":
        short = student.with_frequencies(teacher.inv_freq, teacher.attention_factor)

    def kl_of_short(b: data.Batch) -> dict[str, Tensor]:
        kl = soft_replay(short, teacher, b.ids, b.indices, b.documents)
        return {"short": kl, "kl": kl}

    return {
        "cross_entropy": lambda b: long_text_loss(
            student, b.ids, b.positions, b.labels, b.documents
        ),
        "short_text_distillation": lambda b: short_text_distillation(
            short, teacher, b.ids, c.distill_layers, b.indices, b.documents, bool(c.alpha_kl)
        ),
        "short_to_long_distillation": lambda b: short_to_long_distillation(
            student, teacher, b.ids, b.positions, b.indices, b.documents
        ),
        "kl_of_short": kl_of_short,
        "soft_replay": lambda b: soft_replay(student, teacher, b.ids, b.indices, b.documents),
    }


# --------------------------------------------------------------------------------------- streams

STREAMS = "long", "short", "s2l", "replay"  # all there can be; log.jsonl has a loss_* for each


@dataclass
class StepStream:
    """What a step takes from one stream of text: `micro` batches of `batch` sequences."""

    name: str
    micro: int
    batch: int
    seq_len: int  # tokens
    weight: float  # on the mean loss over all of them (eq. 18, see the top of this file)
    loss: str  # a row of loss_table
    taps: int = 0  # hidden states compared with the teacher's
    kl_weight: float = 0.0  # on KL beside that loss, from the same passes
    heads: int | None = None  # LM heads run; default 1, 0 with taps; 2: student's and teacher's
    scheme: str = "ordinary"  # of the student's positions: data.draw_positions
    steps: range = range(0)  # in which it is read
    rows: int = 0  # sequences in one forward pass, by the machine's memory
    text: data.Stream | None = None  # opened by the machine

    @property
    def tokens(self) -> int:  # in a step
        return self.micro * self.batch * self.seq_len

    @property
    def weights(self) -> dict[str, float]:
        """What is trained, by its name in the log."""
        return {self.name: self.weight} | ({"kl": self.kl_weight} if self.kl_weight else {})


def plan_streams(c: Config) -> dict[str, StepStream]:
    """Eq. 18 as a table: all that is told about the streams that this run reads, in one place.

    A weight is share x alpha; a share is the stream's part of the paper's 16 micro-batches, however
    many are read here. Baselines have cross-entropy on all their streams.
    """
    long = StepStream("long", c.long_micro, c.long_batch, c.train_len, 8 / 16, "cross_entropy")
    short = StepStream("short", c.short_micro, c.short_batch, c.short_len, 6 / 16, "cross_entropy")
    s2l = StepStream("s2l", c.s2l_micro, c.s2l_batch, c.original_len, 2 / 16, "cross_entropy")
    replay = StepStream("replay", c.long_micro, c.replay_batch, c.original_len, 1, "cross_entropy")
    long.scheme = c.long_position_scheme
    if c.method == "longred":
        short.loss, s2l.loss = "short_text_distillation", "short_to_long_distillation"
        short.weight, s2l.weight = short.weight * c.alpha_short, s2l.weight * c.alpha_s2l
        short.taps, s2l.taps = len(c.distill_layers or ()) or c.n_distill_layers, 1
        s2l.scheme = c.position_scheme
        if c.alpha_kl:
            short.kl_weight, short.heads = 6 / 16 * c.alpha_kl, 2
    elif c.method == "soft_replay":
        short.loss, s2l.loss = "kl_of_short", "soft_replay"
        short.weight, s2l.weight = short.weight * c.alpha_kl, s2l.weight * c.alpha_kl
        short.heads = s2l.heads = 2
    elif c.method in ("long_cpt", "longrecipe"):
        long.weight = 1  # it is alone
    long.steps = short.steps = s2l.steps = range(c.steps)
    replay.steps = range(c.steps, c.steps + c.replay_steps)
    return {s.name: s for s in (long, short, s2l, replay) if s.micro and s.steps}


def micro_batches(c: Config, tokenizer) -> Callable[[StepStream, int], tuple[Tensor, Tensor]]:
    """read(stream, index) -> its micro-batch number `index`, a pure function of the seed:
    ids (B, T + 1) int64 and the student's positions (B, T), None for the tokens' own indices."""
    salts = {"s2l": 0x52, "long": 0x4C}  # so that no two streams draw the same positions
    is_end = data.sentence_ends(tokenizer) if c.long_position_scheme == "longrecipe" else ()

    def read(stream: StepStream, index: int):
        ids = stream.text.batch(index)
        if stream.scheme == "ordinary":
            return ids, None
        salt = salts.get(stream.name, zlib.crc32(stream.name.encode()))
        rng = np.random.default_rng([c.seed, salt, index])
        return ids, data.draw_positions(stream.scheme, rng, ids[:, :-1], c.target_len, is_end)

    return read


# ----------------------------------------------------------------------------- models and layers


def open_models(c: Config, run: machine.Run) -> tuple[Llama, Llama]:
    """The frozen teacher, and the student with its rotary rescaled."""
    teacher = run.load(frozen=True).requires_grad_(False)
    student = run.load(c.rope_theta, machine.rope_scaling(c)).train()
    student.config.max_position_embeddings = c.target_len
    return teacher, student


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


def choose_layers(c: Config, run: machine.Run, short: StepStream) -> list[int]:
    """Select on a few sequences of the original length (sec. 3.1 used 1,000 of 8,192 tokens).

    The student is, so far, the teacher's own weights under the new frequencies.
    """
    n = max(1, min(16, 32768 // c.original_len))
    text = data.Stream(short.text.corpus, "layers", c.seed, n, c.original_len)
    ids = text.batch(0)[:, :-1].to(c.device)
    teacher = run.load(whole=True)
    new = rescaled(teacher.config, c.rope_theta, machine.rope_scaling(c))
    frequencies = rope_frequencies(new.head_dim, new.rope_theta, new.rope_scaling)
    student = teacher.with_frequencies(*frequencies)
    layers = select_distill_layers(teacher, student, ids, c.n_distill_layers)
    print(f"layers to distil, by attention drift on {ids.numel():,} tokens: {layers}")
    return layers


# ----------------------------------------------------------------------------------------- train


def weighted(stream: StepStream, parts: Tensor | dict[str, Tensor], share: float, means: dict):
    """What a batch adds to the step's loss; its parts, unweighted, are added to the means."""
    parts = parts if isinstance(parts, dict) else {stream.name: parts}
    for name, part in parts.items():
        means[name] = (means[name] or 0.0) + part.detach().double() * share
    return sum(parts[name] * (weight * share) for name, weight in stream.weights.items())


def learning_rate(c: Config, step: int) -> float:
    """Constant; over the replay stage from a tenth to 0 (LongRecipe's 5e-6; the line is ours)."""
    if step < c.steps:
        return c.lr
    return 0.1 * c.lr * (c.steps + c.replay_steps - step) / c.replay_steps


def train(config: Config) -> Path:
    """Extend a checkpoint. Returns the exported folder, OUT_DIR/hf.

    Raises ValueError, one line, for whatever the user can mend.
    """
    with machine.Run() as run:  # the lock on OUT_DIR, signals, a save when an error ends the run
        c = run.open(config)  # resolved, or refused
        streams = plan_streams(c)
        run.check(streams)  # disk, memory, the GPU's plan: before any text is fetched
        read = micro_batches(c, run.open_text(streams))
        if not c.distill_layers and "short" in streams and streams["short"].taps:
            c.distill_layers = run.once(lambda: choose_layers(c, run, streams["short"]))
        teacher, student = open_models(c, run)
        optimizer = run.optimizer(student, teacher)
        losses = loss_table(c, student, teacher)

        for step in run.steps(c.steps + c.replay_steps):  # from the newest state on
            reads = [stream for stream in streams.values() if step in stream.steps]
            means = dict.fromkeys((*STREAMS, "kl"))  # unweighted; None: not read in this step
            for stream in reads:
                for batch in run.batches(stream, step, read):  # this process's part of them
                    weighted(stream, losses[stream.loss](batch), batch.share, means).backward()
            means = run.over_processes(means)
            total = sum(w * means[name] for s in reads for name, w in s.weights.items())
            norm = torch.nn.utils.clip_grad_norm_(run.with_gradients(), c.grad_clip or math.inf)
            optimizer.param_groups[0]["lr"] = learning_rate(c, step)
            if run.may_update(total, means, norm):  # finite, and the last state is on disk
                optimizer.step()
            optimizer.zero_grad()

        del losses, optimizer  # they hold what the report needs the memory of
        student, teacher = run.gather(student.eval(), teacher)  # whole
        if c.merge:
            merge_weights(student, teacher, c.merge)
        return run.export(student, teacher)  # and what it gained and lost, on held-out text


# ------------------------------------------------------------------------------------------ main


def write_byte_tokenizer(folder: Path) -> Path:
    return importlib.import_module("measure.demo").write_byte_tokenizer(folder)


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's error ends as SystemExit with one line."""
    machine.outlive_readers()
    config = machine.parse_args(Config, argv, __doc__)
    try:
        if config.resume or config.ckpt:
            train(config)
        else:
            importlib.import_module("measure.demo").demo(config)  # which imports this file
    except (ValueError, OSError) as e:
        raise SystemExit(machine.last_words(e)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
