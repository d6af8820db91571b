"""What a run needs, before anything is allocated: memory, disk, and the fastest plan that fits.

What training keeps, per parameter: a bf16 weight (2 B) that must be on the GPU; an fp32 gradient
(4 B), touched in every pass, and AdamW's state (10 B), touched once a step, that need not be. What
it keeps per token: a block's activations, most of which are cheaper to make again than to keep.
`make_plan` chooses among the mechanisms of machine/memory.py, also which blocks are recomputed in
backward (`Policy`), and Plan.table shows the choice.

Sizes in bytes unless said otherwise; GiB = 2^30.
"""

import bisect
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from model import (
    DISTANCE_ROWS,
    LOSS_ROWS,
    Llama,
    ModelConfig,
    next_token_loss,
    stored_dtype,
)

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU's ceilings. They rank plans, so their ratios matter; measure/bench.py step times."""

    name: str
    matmul: float  # FLOP/s, in bf16
    attention_forward: float
    attention_backward: float
    copy: float  # bytes/s

    @classmethod
    def of(cls, name: str) -> "Card | None":
        """Return the card that torch calls `name`, by its published peaks; None if unknown."""
        for known, (matmul, copy) in PEAKS.items():
            if known in name:
                rates = (matmul / PEAKS["H200"][0] * x for x in H200_RATES[:3])
                return cls(known, *rates, copy / PEAKS["H200"][1] * H200_RATES[3])
        return None


# bf16 matmul on random data and device copies: measured on an H200, before this code was;
# attention: FA3 on an H100 as published; PCIe: assumed.
H200_RATES = 790e12, 650e12, 540e12, 4.3e12
H200 = Card("H200", *H200_RATES)
# As makers publish them: dense bf16 with fp32 sums, memory. First match counts.
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100 80GB PCIe": (312e12, 1.94e12),
    "A100": (312e12, 1.56e12),
    "L40S": (362e12, 0.86e12),
    "RTX A6000": (155e12, 0.77e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.94e12),
}
PCIE = 50e9  # bytes/s
ELEMENTWISE = 152  # bytes per token, block and d_model: norms, rotary, SwiGLU, residuals, if fused
# Kept free: CUDA's context is outside the allocator, fragments are inside it. Unmeasured.
GPU_SPARE, GPU_SPARE_FRACTION, HOST_SPARE = 1.0 * GIB, 0.03, 6 * GIB
NCCL = 1.0 * GIB  # its buffers, where several GPUs work together. Unmeasured
# Reserved beyond what is allocated: 20 MiB pages that are not full if the allocator's segments
# expand, otherwise gaps between long-lived tensors. Both come from seven planned runs, recorded at
# full size on fake tensors and replayed through a model of the allocator (measure/replay.py of
# commit c5ec068, run again on 2026-12-01). With segments that expand, at most 0.24 GiB (0.63 with
# gradients in host memory) were reserved beyond what was allocated, and no allocation was retried.
# With fixed segments 8B at 32K had 6.9 to 10.2 of 79.1 GiB stranded and ended in its first long
# pass; since then the cache is emptied before every phase, and segments expand if the driver can.
PAGES, STRANDED_FRACTION = 0.5 * GIB, 0.13
# Gradients on their way to host memory that may still be on the GPU, and three buffers of 2^24
# fp32 numbers.
IN_FLIGHT, GRADIENT_BUFFERS = 2**29, 3 * 2**26


@dataclass
class Policy:
    """How the blocks of one kind of micro-batch run while gradients are on.

    The model's last `keep_all` blocks keep all activations for backward, the `attention` blocks
    before them keep the attention's output and recompute the rest, and the first ones recompute
    everything. Backward meets the last blocks first, so their activations are freed before the
    others need room for recomputing.
    """

    keep_all: int = 0  # blocks that are not recomputed; 3.6 GB each at 32K tokens of Llama-3-8B
    attention: int = 0  # recomputed blocks that keep the attention's output; 0.27 GB each there
    offload: bool = False  # the inputs of recomputed blocks wait in host memory
    mlp_rows: int = 8192  # tokens of one MLP tile
    loss_rows: int = LOSS_ROWS  # tokens whose logits exist at a time
    compile: bool = False  # torch.compile, one graph for all blocks of a kind


RECOMPUTE_ALL = Policy()  # backward recomputes every block


@dataclass(frozen=True)
class Unit:
    """One kind of forward and backward pass, `count` of them in an optimizer step."""

    name: str
    batch: int  # sequences
    seq_len: int
    count: int = 1
    hidden_states: int = 0  # how many are compared with the teacher's
    heads: int = 1  # LM heads run: of KL 2 (the teacher's), of hidden states alone 0

    @classmethod
    def of(cls, stream, c, most: int | None = None) -> "Unit":
        """Return the passes that a step makes of a longred.StepStream, by what its loss needs.

        most: sequences in a pass; default: all of a micro-batch.
        """
        batch = stream.batch if most is None else min(stream.batch, max(1, most))
        distilled = len(c.distill_layers or ()) or c.n_distill_layers
        hidden_states = {"none": 0, "last": 1, "distilled": distilled}[stream.loss.compares]
        count = stream.micro * -(-stream.batch // batch)
        return cls(stream.name, batch, stream.seq_len, count, hidden_states, stream.loss.lm_heads)

    @property
    def teacher(self) -> bool:
        return self.hidden_states > 0 or self.heads == 2

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


@dataclass
class Plan:
    """What `make_plan` decided, and why: bytes by term, on the GPU for each unit, on the host."""

    host_state: bool  # AdamW's state waits in host memory
    teacher_resident: bool  # else parked, on the GPU for the distillation units only
    moments: torch.dtype
    units: dict[str, Unit] = field(default_factory=dict)  # as a process will run them
    policies: dict[str, Policy] = field(default_factory=dict)  # empty: RECOMPUTE_ALL
    gpu: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    slot_bytes: int = 0  # of Offload; 0: nothing is offloaded
    seconds: float = 0.0  # of one step at the ceilings above: ranks plans, promises nothing
    expandable: bool = True  # whether the allocator's segments can expand
    host_gradients: bool = False  # gradients are summed in host memory
    host_given: bool = False  # by --host_gib, so that more than what is free is tried
    card: Card | None = None  # None: not one whose ceilings are known; an H200's were taken
    processes: int = 1
    context: int = 1  # processes to a sequence

    def reserved(self, name: str) -> int:
        """Estimate the bytes that the allocator reserves for a unit: peak allocated, and gaps."""
        peak = sum(self.gpu[name].values())
        return int(peak + (self.gaps if self.expandable else STRANDED_FRACTION * peak))

    @property
    def gaps(self) -> float:
        """Return the gaps of segments that expand; larger with gradients in host memory."""
        return 1.5 * PAGES if self.host_gradients else PAGES

    def table(self) -> str:
        """Format the memory table, GiB: terms of each unit's peak on the GPU, one column a unit."""
        each = f" of each of {self.processes}" if self.processes > 1 else ""
        lines = [f"memory plan{each}, GiB".ljust(38) + "".join(n.rjust(9) for n in self.gpu)]
        for term in dict.fromkeys(t for terms in self.gpu.values() for t in terms):
            row = (terms.get(term, 0) / GIB for terms in self.gpu.values())
            lines.append(f"  {term:<36}" + "".join(f"{x:9.2f}" for x in row))
        total = (sum(terms.values()) / GIB for terms in self.gpu.values())
        lines.append("  GPU peak, allocated".ljust(38) + "".join(f"{x:9.2f}" for x in total))
        how = "" if self.expandable else " (fixed segments)"
        reserved = (self.reserved(name) / GIB for name in self.gpu)
        row = ("  GPU peak, reserved" + how).ljust(38)
        lines.append(row + "".join(f"{x:9.2f}" for x in reserved))
        lines += [f"  host: {term:<30}{x / GIB:9.2f}" for term, x in self.host.items() if x]
        lines.append("  host".ljust(38) + f"{sum(self.host.values()) / GIB:9.2f}")
        lines += [f"  {name}: {self.how(name)}" for name in self.units]
        if self.host_gradients:
            lines.append("  gradients leave the GPU in every pass and add up in host memory")
        if self.processes == 1:
            card = self.card
            which = f"on one {card.name}" if card else "were this an H200 (its own: not known)"
            lines.append(
                f"  a step takes {self.seconds:.3g} s at least {which}, every kernel at its ceiling"
            )
        return "\n".join(lines)

    def how(self, name: str) -> str:
        """Say how the passes of a unit run."""
        unit, policy = self.units[name], self.policies.get(name)
        whole = f" of {unit.seq_len * self.context:,}" if self.context > 1 else ""
        size = f"{unit.batch} x {unit.seq_len:,}{whole} tokens a pass"
        if policy is None:
            return f"{size}, every block recomputed"
        return (
            f"{size}, {policy.keep_all} blocks kept whole, {policy.attention} recomputed but for "
            f"attention, MLP tiles of {policy.mlp_rows}"
            + (f", {policy.loss_rows} rows of logits" if policy.loss_rows < LOSS_ROWS else "")
            + (", inputs offloaded" if policy.offload else "")
        )


def parameter_count(config: ModelConfig, lm_head: bool = True) -> int:
    """Count the parameters, without norms and biases (0.003% of Llama-3-8B)."""
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    block = config.d_model * (heads * config.head_dim + 3 * config.d_ff)
    embeddings = 1 + (lm_head and not config.tie_embeddings)
    return config.n_layers * block + embeddings * config.vocab_size * config.d_model


def flops(config: ModelConfig, unit: Unit) -> dict[str, float]:
    """Count one forward pass's FLOPs: matmuls and causal attention of ONE block, the LM head."""
    block = parameter_count(replace(config, n_layers=1, vocab_size=0))
    q = config.n_heads * config.head_dim
    return {
        "matmul": 2.0 * unit.tokens * block,
        "attention": 2.0 * unit.tokens * unit.seq_len * q,  # half the square, QK and PV
        "head": 2.0 * unit.tokens * config.vocab_size * config.d_model if unit.heads else 0.0,
    }


def model_flops(config: ModelConfig, unit: Unit) -> float:
    """Count a unit's FLOPs without recomputing: student forward, twice that backward, teacher."""
    once = flops(config, unit)
    passes = 4 if unit.teacher else 3
    heads = 2 + unit.heads  # the student's three passes of it, and the teacher's one
    return config.n_layers * passes * (once["matmul"] + once["attention"]) + heads * once["head"]


def unit_seconds(config: ModelConfig, unit: Unit, policy: Policy, card: Card = H200) -> float:
    """Return a unit's seconds if every kernel ran at its peak, recomputation included."""
    once, n = flops(config, unit), config.n_layers
    matmul, attention = once["matmul"] / card.matmul, once["attention"] / card.attention_forward
    recomputed = n - policy.keep_all
    block = parameter_count(replace(config, n_layers=1, vocab_size=0))
    down = config.d_ff * config.d_model / block  # early stop: down_proj is not run again
    seconds = n * (3 * matmul + attention + 2.5 * once["attention"] / card.attention_backward)
    seconds += recomputed * (1 - down) * matmul + (recomputed - policy.attention) * attention
    seconds += (2 + unit.heads) * once["head"] / card.matmul
    if unit.teacher:
        seconds += n * (matmul + attention)
    tiles = -(-unit.tokens // policy.mlp_rows)
    traffic = n * unit.tokens * config.d_model * ELEMENTWISE
    traffic += n * tiles * 3 * config.d_ff * config.d_model * 16  # fp32 sums: product, read, write
    traffic += 12 * parameter_count(config)  # a pass adds bf16 gradients to fp32 ones
    if unit.heads:  # the head's fp32 sum, too
        chunks = -(-unit.tokens * unit.heads // policy.loss_rows)
        traffic += chunks * 16 * config.vocab_size * config.d_model
    # An offload hidden behind compute costs 1-2% (Unsloth's figure; unmeasured here).
    return (seconds + traffic / card.copy) * (1.02 if policy.offload else 1.0)


def activation_memory(config: ModelConfig, unit: Unit, policy: Policy) -> dict[str, int]:
    """Bytes on the GPU beyond weights, gradients, state and teacher, at a unit's worst moment."""
    m, d, f = unit.tokens, config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    x = 2 * m * d  # one hidden state
    lse = 4 * m * config.n_heads
    recomputed = config.n_layers - policy.keep_all
    block = 2 * m * (3 * d + 2 * q + 2 * kv) + lse + 8 * m  # what autograd keeps but for x and MLP
    block += 2 * m * (q + kv) if config.qk_norm else 0  # q and k before their norms
    # A block's backward is widest in the MLP, or in attention with its fp32 gradient of q. The
    # first block that backward reaches keeps its activations (counted below) or makes them now.
    tiles = 3 if policy.keep_all else 5  # gate and up count with the block where it keeps them
    in_mlp = tiles * 2 * min(policy.mlp_rows, m) * f + 4 * 4 * f * d + 2 * x
    in_attention = 2 * m * (4 * q + 2 * kv) - x
    backward = max(in_mlp, in_attention) + (0 if policy.keep_all else block)
    # Gradients of the hidden states compared; the last one's is used up before any block's.
    in_block = backward + max(0, unit.hidden_states - 1) * x
    # The teacher's hidden states, and ours unless they are inputs counted below.
    compared = (2 if policy.offload else 1) * unit.hidden_states * x
    chunk = 40 * min(DISTANCE_ROWS, m) * d if unit.hidden_states else 0  # ten fp32 copies
    if unit.heads:  # fp32 and bf16 logits (KL: three fp32 ones), then bf16 d(logits) and an fp32
        # product, next to the fp32 sum; of KL alone the teacher's last hidden state
        rows, v = min(policy.loss_rows // unit.heads, m), config.vocab_size
        logits = max(6 * unit.heads * rows * v, 2 * rows * v + 4 * v * d)
        chunk = max(chunk, 4 * v * d + logits)
        compared = compared or (unit.heads - 1) * x
    at_loss = 2 * x + compared + chunk + x
    head = 4 * config.vocab_size * d if config.tie_embeddings and unit.heads else 0
    in_block += head  # the head's fp32 gradient waits for the embedding's, the same tensor's
    on_gpu = min(recomputed, 2) if policy.offload else recomputed
    mlp_saved = 2 * m * (4 if config.mlp_bias else 2) * f
    terms = {
        "inputs of recomputed blocks": on_gpu * x,
        "attention outputs kept": policy.attention * (2 * m * q + lse),
        "blocks kept whole": policy.keep_all * (x + block + mlp_saved),
    }
    # The embedding's gradient is the last, in bf16 and in fp32; all of the above is freed by then.
    at_embedding = head + 6 * config.vocab_size * d + x - sum(terms.values())
    moments = {
        "in a block's backward": in_block,
        "at the loss": at_loss,
        "at the embedding": at_embedding,
    }
    worst = max(moments, key=moments.get)
    return terms | {"working memory " + worst: moments[worst]}


@dataclass(frozen=True)
class Question:
    """What has to fit where. The planner's advice is its answer to the same with one change."""

    config: ModelConfig
    units: tuple[Unit, ...]
    gpu_bytes: int  # free on each GPU
    host_bytes: int  # free on the host, for each process
    moments: torch.dtype = torch.float32
    processes: int = 1  # of torchrun
    context: int = 1  # processes to a sequence
    expandable: bool = True  # whether the allocator's segments expand; if not, more is left alone
    card: str = "H200"  # as torch names it, whose ceilings count

    @property
    def gpu_room(self) -> float:
        """Bytes of each GPU that a plan may allocate."""
        free = self.gpu_bytes if self.expandable else int(self.gpu_bytes / (1 + STRANDED_FRACTION))
        return free * (1 - GPU_SPARE_FRACTION) - GPU_SPARE - (NCCL if self.processes > 1 else 0)

    @property
    def host_room(self) -> int:
        return max(0, self.host_bytes - HOST_SPARE)

    @property
    def ceilings(self) -> Card:
        return Card.of(self.card) or H200


def make_plan(
    config: ModelConfig,
    units: list[Unit],
    gpu_bytes: int,
    host_bytes: int,
    *,
    length: tuple[str, int] = ("--target_len", 0),
    compile: bool = False,
    **more,
) -> Plan:
    """Choose the fastest plan that fits this model, these units, these GPUs and this host.

    gpu_bytes, host_bytes: free now, for all of the run; a spare part of each is left alone.
    length: the flag of the longest unit's length, and what it has to be above. more: Question's
    other fields. Raises ValueError where nothing fits, saying what is missing and which changes
    would fit.
    """
    question = Question(config, tuple(units), gpu_bytes, host_bytes, **more)
    plan = answer(question)
    if plan is None:
        raise ValueError(refusal(question, *length))
    plan.expandable, plan.card = question.expandable, Card.of(question.card)
    for policy in plan.policies.values():
        policy.compile = compile
    return plan


def answer(question: Question) -> Plan | None:
    """Return the fastest plan that fits, or None."""
    return fastest(question) if question.processes == 1 else spread(question)


# ------------------------------------------------------------------------------------- one GPU


class Place(NamedTuple):
    """Where something is during a run: the bytes that it takes there, and what that costs."""

    gpu: int
    host: int = 0
    step: float = 0.0  # seconds a step
    each_pass: float = 0.0  # seconds a pass; counted in full, though backward may hide most


def places(q: Question) -> dict[str, tuple[Place, Place]]:
    """The mechanisms of a whole run: what may stay on the GPU, or leave it for host memory.

    What the passes choose for themselves, each for its own, is in `passes`.
    """
    n = parameter_count(q.config)
    state = n * (2 + 2 * q.moments.itemsize)
    kl, taught = any(u.heads == 2 for u in q.units), any(u.teacher for u in q.units)
    visiting = 2 * parameter_count(q.config, lm_head=kl)
    return {
        "gradients, fp32": (
            Place(4 * n),
            Place(IN_FLIGHT + GRADIENT_BUFFERS, 4 * n, each_pass=4 * n / PCIE),
        ),
        "AdamW's state": (
            Place(state, step=12 * n * 12 / q.ceilings.copy),
            Place(0, state, step=state / PCIE),
        ),
        # With its LM head, at home: the closing report needs it. It visits only who is taught.
        "teacher, bf16": (
            Place(2 * n),
            Place(visiting, 2 * n, step=visiting / PCIE if taught else 0.0),
        ),
    }


def passes(config: ModelConfig, unit: Unit):
    """The mechanisms of a pass: yields (unit, policy, bytes by term), of every choice there is.

    How many attention outputs are kept depends on what room is left: `best_pass`.
    """
    logits = (LOSS_ROWS, LOSS_ROWS // 4) if unit.heads else (LOSS_ROWS,)
    batches = sorted({max(1, unit.batch >> i) for i in range(6)})  # fewer a pass, more passes
    for offload, batch, rows, loss_rows in product(
        (False, True), batches, (8192, 16384, 32768), logits
    ):
        part = replace(unit, batch=batch, count=unit.count * -(-unit.batch // batch))
        for keep_all in range(config.n_layers + 1 - offload):
            policy = Policy(keep_all, 0, offload, rows, loss_rows)
            yield part, policy, activation_memory(config, part, policy)


def best_pass(q: Question, choices: list, room: float, offload: bool, each_pass: float):
    """Return the fastest of `choices` that fits in `room`: (seconds a step, unit, policy), or None.

    offload: whether inputs may wait in host memory. each_pass: further seconds that a pass takes.
    """
    best, n_layers = None, q.config.n_layers
    for part, policy, terms in choices:
        left = int(room - sum(terms.values()))
        if left < 0 or policy.offload > offload:
            continue
        saved = 2 * part.tokens * q.config.n_heads * (q.config.head_dim + 2)
        policy = replace(policy, attention=min(n_layers - policy.keep_all, left // saved))
        seconds = part.count * (unit_seconds(q.config, part, policy, q.ceilings) + each_pass)
        if best is None or seconds < best[0]:
            best = seconds, part, policy
    return best


def fastest(q: Question) -> Plan | None:
    """The one search: everything that may leave the GPU stays or leaves, and the best passes."""
    weights, table, best = 2 * parameter_count(q.config), places(q), None
    choices = {unit.name: list(passes(q.config, unit)) for unit in q.units}
    # Gradients leave only after AdamW's state: they move in every pass.
    together = (), ("AdamW's state",), ("AdamW's state", "gradients, fp32")
    for offload, visits, others in product((False, True), ((), ("teacher, bf16",)), together):
        leave = visits + others
        chosen = {name: pair[name in leave] for name, pair in table.items()}
        plan = Plan(
            host_state="AdamW's state" in leave,
            teacher_resident=not visits,
            moments=q.moments,
            host_gradients="gradients, fp32" in leave,
            host={name: place.host for name, place in chosen.items()},
            seconds=sum(place.step for place in chosen.values()),
        )
        each_pass = sum(place.each_pass for place in chosen.values())
        for unit in q.units:
            fixed = {"weights, bf16": weights} | {n: place.gpu for n, place in chosen.items()}
            if visits and not unit.teacher:
                fixed["teacher, bf16"] = 0
            room = q.gpu_room - sum(fixed.values())
            found = best_pass(q, choices[unit.name], room, offload, each_pass)
            if found is None:
                break
            seconds, part, policy = found
            plan.seconds += seconds
            plan.units[unit.name], plan.policies[unit.name] = part, policy
            plan.gpu[unit.name] = fixed | activation_memory(q.config, part, policy)
            if policy.offload:
                plan.slot_bytes = max(plan.slot_bytes, 2 * part.tokens * q.config.d_model)
        plan.host["block inputs"] = q.config.n_layers * plan.slot_bytes
        fits = len(plan.units) == len(q.units) and sum(plan.host.values()) <= q.host_room
        if fits and (best is None or plan.seconds < best.seconds):
            best = plan
    return best


# -------------------------------------------------------------------------------- several GPUs


def spread(q: Question) -> Plan | None:
    """Return the plan of each of several GPUs over which the weights are sharded (many.py)."""
    plan = smallest_spread(q)
    return plan if most(plan) <= q.gpu_room and sum(plan.host.values()) <= q.host_room else None


def smallest_spread(q: Question) -> Plan:
    """What each GPU holds, with fewer sequences in a pass where that fits, or one.

    Every block is recomputed. 18 bytes a parameter are spread.
    """
    n, d = parameter_count(q.config), q.config.d_model
    block = parameter_count(replace(q.config, n_layers=1, vocab_size=0))
    # The embeddings are gathered for all of a pass.
    embeddings = q.config.vocab_size * d * (1 if q.config.tie_embeddings else 2)
    plan = Plan(False, True, q.moments, processes=q.processes, context=q.context)
    # Student and teacher whole and in fp32, in the first process.
    plan.host = {"export, first process": 8 * n}
    for unit in q.units:
        for i in range(8):
            length = unit.seq_len // q.context
            part = replace(unit, batch=max(1, unit.batch >> i), seq_len=length)
            made = activation_memory(q.config, part, RECOMPUTE_ALL)
            terms = {
                "weights, fp32": 4 * n // q.processes,
                "gradients, fp32": 4 * n // q.processes,
                "AdamW's state": 8 * n // q.processes,
                "teacher, bf16": 2 * n // q.processes,
                # Two blocks in bf16, one's gradient in bf16 and fp32.
                "gathered blocks": 10 * block,
                "gathered embeddings": 2 * embeddings * (2 if unit.teacher else 1),
                **made,
                "gradient of the embeddings": max(0, 6 * embeddings - sum(made.values())),
            }
            plan.units[unit.name], plan.gpu[unit.name] = part, terms
            if sum(terms.values()) <= q.gpu_room:
                break
    return plan


def most(plan: Plan) -> int:
    return max(sum(terms.values()) for terms in plan.gpu.values())


# --------------------------------------------------------------------------------------- advice


def refusal(q: Question, flag: str, floor: int) -> str:
    """Say why nothing fits, and what would. flag, floor: make_plan's length."""
    n, longest = parameter_count(q.config), max(unit.seq_len for unit in q.units)
    gpu, host = q.gpu_bytes / GIB, q.host_bytes / GIB
    if q.processes == 1:
        why = (
            f"this does not fit {gpu:.1f} GiB of GPU and {host:.1f} GiB of host memory: weights "
            f"take {2 * n / GIB:.1f} GiB of the GPU, gradients {4 * n / GIB:.1f} and AdamW's state "
            f"{n * (2 + 2 * q.moments.itemsize) / GIB:.1f} GiB of either, and a pass over "
            f"{longest} tokens its activations"
        )
    else:
        plan = smallest_spread(q)
        why = (
            f"this does not fit {q.processes} GPUs with {gpu:.1f} GiB each and {host:.1f} GiB of "
            f"host memory: {most(plan) / GIB:.1f} GiB of each GPU are needed (weights, gradients, "
            f"AdamW's state and teacher {18 * n / q.processes / GIB:.1f}), and the export takes "
            f"{sum(plan.host.values()) / GIB:.1f} GiB of the first one's host"
        )
    fits = dict.fromkeys(filter(None, (first_that_fits(runs) for runs in changes(q, flag, floor))))
    return f"{why}; " + (
        "it fits with " + ", or ".join(fits) if fits else "no one change that was tried fits"
    )


def first_that_fits(runs) -> str | None:
    """The words of the first change with which there is a plan. In a run later ones need less."""
    for run in runs:
        i = bisect.bisect_left(run, True, key=lambda change: answer(change[1]) is not None)
        if i < len(run):
            return run[i][0]
    return None


def changes(q: Question, flag: str, floor: int) -> list:
    """The same question with one setting changed, as runs of (words, question): see above."""
    cut = [(f"{flag} {n}", replace(q, units=units)) for n, units in shorter(q.units, floor)]
    if q.processes > 1:
        one = replace(q, processes=1, context=1)
        words = "one of these GPUs alone (python longred.py, no torchrun)"
        bf16 = f"{words} and --moments bf16", replace(one, moments=torch.bfloat16)
        return [more_processes(q), [cut], [[(words, one), bf16]]]
    half = replace(q, moments=torch.bfloat16)
    bf16 = [("--moments bf16", half)] if q.moments != torch.bfloat16 else []
    both = [(f"--moments bf16 and {words}", replace(half, units=k.units)) for words, k in cut]
    hosts = [
        (f"{gib} GiB of free host memory", replace(q, host_bytes=gib * GIB))
        for gib in range(8, 2049, 8)
    ]
    gpus = [
        (f"a GPU of {g} GB", replace(q, gpu_bytes=int(g * 0.98 * GIB)))
        for g in (24, 32, 48, 80, 96, 141, 180, 288)
        if g * 0.98 * GIB > q.gpu_bytes
    ]
    return [[bf16], [cut, bf16, both if bf16 else []], [hosts], [gpus], more_processes(q)]


def shorter(units: tuple[Unit, ...], floor: int) -> list[tuple[int, tuple[Unit, ...]]]:
    """(length, units): the longest cut, in steps of 8,192, but to more than `floor`."""
    longest = max(u.seq_len for u in units)
    floor = max([floor, *(u.seq_len for u in units if u.seq_len < longest)])
    return [
        (n, tuple(replace(u, seq_len=n) if u.seq_len == longest else u for u in units))
        for n in range((longest - 1) // 8192 * 8192, floor, -8192)
    ]


def more_processes(q: Question) -> list:
    """More processes of torchrun, or more to a sequence; each a run of its own."""
    runs, lengths = [], [unit.seq_len for unit in q.units]
    for i, context in product(range(10), (1, 2, 4, 8)):
        many = q.processes * 2**i
        divides = not any(n % context for n in (*lengths, q.config.n_kv_heads, many))
        if divides and many > 1 and (many, context) != (q.processes, q.context):
            words = f"{many} GPUs (torchrun)"
            words += f" and --context {context}" if max(context, q.context) > 1 else ""
            more = replace(q, processes=many, context=context, expandable=True)
            runs.append([(words, more)])
    return runs


# ------------------------------------------------------------------------------- what there is


def report_steps(c, model: ModelConfig, streams) -> float:
    """Estimate what the closing report costs, in optimizer steps, by the FLOPs of both."""
    if not c.eval_tokens:
        return 0.0

    def read(length: int) -> float:  # a forward pass, with the LM head
        n = max(1, c.eval_tokens // length)
        return model_flops(model, Unit("report", n, length)) / 3

    step = [Unit.of(s, c) for s in streams]
    return (4 * read(c.original_len) + 2 * read(c.target_len)) / sum(
        unit.count * model_flops(model, unit) for unit in step
    )


ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # torch reads both


def expand_segments() -> None:
    """Have the GPU's allocator map pages where memory is free, if the system can do that.

    To be called before CUDA starts, which reads the setting once. A setting of the user's wins. A
    child process tries it first: where the driver cannot, the first allocation fails.
    """
    if any(os.environ.get(name) for name in ALLOCATOR):
        return
    os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    if torch.cuda.device_count() and not _gpu_allocates():  # the count does not start CUDA
        os.environ[ALLOCATOR[0]] = "expandable_segments:False"


def _gpu_allocates() -> bool:
    """Whether a process of this environment can allocate memory on the GPU."""
    code = "import torch; torch.empty(2**25, device='cuda')"
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
        return done.returncode == 0
    return False


def segments_expand() -> bool:
    """Return whether the allocator's segments expand: platform, driver or user may forbid it."""
    probe = torch.empty(32 * 2**20, dtype=torch.uint8, device="cuda")
    address = probe.data_ptr()
    return any(
        segment["is_expandable"]
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= address < segment["address"] + segment["total_size"]
    )


def asked(flag: str, gib: float | None, free: int | None, grows: bool = False) -> int:
    """Return the bytes to plan for: what a flag asks for, else all that is free.

    Raises ValueError for more than is free. grows: the free memory of some systems grows as it is
    asked for, so more than is free is a warning and the run tries.
    """
    if not gib and free is None:
        raise ValueError(f"this system does not say how much memory is free; pass {flag}")
    if gib and free is not None and gib * GIB > free:
        if not grows:
            raise ValueError(
                f"{flag} {gib:g}: {free / GIB:.1f} GiB are free; pass less, or free some"
            )
        print(
            f"warning: {flag} {gib:g}, but the system says that {free / GIB:.1f} GiB are free; "
            "if it cannot give more, it ends this process without a word",
            flush=True,
        )
    return int(gib * GIB) if gib else free


def gpu_room() -> int:
    """Bytes of the current GPU that are free for this run."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def reserved_now(device: str) -> dict[str, float | None]:
    """For the log: the most GiB that the allocator has reserved, and its retries."""
    if not device.startswith("cuda"):
        return {"reserved_gib": None, "alloc_retries": None}
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    return {"reserved_gib": round(reserved, 2), "alloc_retries": retries}


def trial(device: str) -> None:
    """Run a tiny block forward and backward on the device, before hours are planned.

    Raises ValueError, one line, for what would stop the first pass: compiler, driver, old card.
    """
    if device.startswith("cuda"):
        try:
            major, minor = torch.cuda.get_device_capability(device)  # the driver's first word
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"the GPU {device} does not answer: {why(e)}") from e
        if major < 8:
            raise ValueError(
                f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; "
                "need 8.0 (Ampere) or newer for bf16, or pass --device cpu"
            )
    shape = dict(d_model=256, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=128, d_ff=512)
    try:
        block = (
            Llama(ModelConfig(**shape, vocab_size=128)).init_weights().to(device, torch.bfloat16)
        )
        ids = torch.arange(128, device=device)[None]
        hidden, _ = block(ids)
        next_token_loss(hidden, block.lm_head_weight, ids)[0].backward()
        finite = all(p.grad.isfinite().all().item() for p in block.parameters())
    except Exception as e:  # anything that a compiler, a driver or a kernel raises
        raise ValueError(f"a trial of one tiny block on {device} failed: {why(e)}") from e
    if not finite:
        raise ValueError(
            f"a trial of one tiny block on {device} gave gradients that are not finite"
        )


def why(error: Exception) -> str:
    """Say in one line what was wrong in the trial, and what to do."""
    said = f"{type(error).__name__}: {error}"
    known = {
        "Failed to find C compiler": "Triton needs a C compiler; install gcc or set CC",
        "Python.h": "Triton needs Python's headers; install python3-dev for this Python",
        # The compiler's own words go to the terminal; the error has only its command line.
        "CalledProcessError": "Triton's C compiler failed, most often because it lacks Python's "
        "headers; install python3-dev for this Python",
        "driver on your system is too old": "the NVIDIA driver is too old for this torch; update "
        f"it, or install a torch built for an older CUDA than {torch.version.cuda}",
        "no kernel image": f"torch {torch.__version__} was not built for this GPU; install one "
        "that was",
        "out of memory": "another process holds the GPU's memory; see nvidia-smi",
    }
    for words, advice in known.items():
        if words in said:
            return advice
    return (said.splitlines() or [""])[0][:300]


def preflight(c, model: ModelConfig, units: list[Unit], *, processes: int, freed: int) -> None:
    """Refuse what would fail after hours: a run that its disk or its memory cannot hold.

    c: the run's settings. units: the passes of its streams. processes: torchrun's. freed: bytes of
    the older states in its OUT_DIR, which new ones replace.
    """
    alone = processes == 1
    n = parameter_count(model)
    export = n * (stored_dtype(model) or torch.float32).itemsize
    # A state: fp32 weights (or bf16 and a remainder) and AdamW's two moments.
    bf16 = (c.device.startswith("cuda") or c.dtype) and c.moments == "bf16" and alone
    states = c.keep and (c.keep + 1) * n * (8 if bf16 else 12)
    check_disk(Path(c.out_dir), export=export, states=states, freed=freed)
    if not alone and (c.gpu_gib or c.host_gib or c.compile or c.dtype or c.moments != "fp32"):
        raise ValueError(
            "--gpu_gib, --host_gib, --dtype, --moments and --compile are for one process: drop "
            "them with torchrun"
        )
    if c.device.startswith("cuda"):
        trial(c.device)
    if c.device == "cpu":
        tokens = max(unit.tokens for unit in units) // c.context
        # fp32: student, teacher, gradients and the two moments. bf16: student, teacher, remainder,
        # fp32 gradients and the moments. Many processes hold a part each and recompute every block.
        weights = (14 if bf16 else 18) if c.dtype else 20
        recompute = c.recompute or not alone
        passes = processes * activation_bytes(model, tokens, recompute, bool(c.dtype))
        check_memory(weights * n, passes)


def activation_bytes(model, tokens: int, recompute: bool, bf16: bool = False) -> int:
    """Estimate what one forward pass keeps for backward, at `tokens` tokens.

    A block keeps about 9 vectors of width d_model (inputs and outputs of norms and attention, q, k,
    v) and 4 of width d_ff; in bf16 half of the 9 are still fp32 (SmolLM2's shape, 6 layers, 512
    tokens: 139 MB here, 140 MB measured; in bf16 86 and 86). With recompute it keeps its input
    only, and one block at a time is whole.
    """
    narrow, wide = (3, 2) if bf16 else (4, 4)  # bytes of a number of the 9, and of the 4
    block = tokens * (narrow * 9 * model.d_model + wide * 4 * model.d_ff)
    if not recompute:
        return model.n_layers * block
    return wide * tokens * model.d_model * model.n_layers + block


def forecast(c, config: ModelConfig, streams, steps: range, processes: int = 1) -> float:
    """Seconds of optimizer steps on this CPU: their arithmetic at half the speed of one matmul.

    That speed is measured here, in a fraction of a second, with the threads the run will have.
    """
    dtype = torch.bfloat16 if c.dtype else torch.float32
    x = torch.randn(1024, config.d_model, dtype=dtype)
    w = torch.randn(config.d_model, config.d_ff, dtype=dtype)
    torch.mm(x, w)
    began, n = time.perf_counter(), 0
    while n < 3 or time.perf_counter() - began < 0.2:
        torch.mm(x, w)
        n += 1
    speed = n * 2 * x.numel() * config.d_ff / (time.perf_counter() - began)
    read = [(Unit.of(s, c), sum(step in s.steps for step in steps)) for s in streams]
    flops = sum(n * unit.count * model_flops(config, unit) for unit, n in read)
    return flops / speed * 2 / processes


def check_disk(out_dir: Path, *, export: int, states: int, freed: int) -> None:
    """Raise ValueError unless out_dir's disk has room for export and states, in bytes.

    Tokens of the text and the hub's files are not counted: they may be there already, or be on
    other disks, and a full disk does not lose what they hold.
    """
    there = out_dir.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free + freed
    if export + states > free:
        raise ValueError(
            f"--out_dir {out_dir} needs {_gb(export + states)} (export {_gb(export)}, --keep + 1 "
            f"states to resume from {_gb(states)}), its disk has {_gb(free)} free; make room, pass "
            "another --out_dir or a smaller --keep (0: save none)"
        )


def check_memory(weights: int, activations: int) -> None:
    """Raise ValueError unless a CPU run fits what is free. weights: with gradients and AdamW."""
    free = available_memory()
    if free is not None and weights + activations > free:
        raise ValueError(
            f"memory: about {_gb(weights + activations)} needed (weights, teacher, gradients and "
            f"AdamW {_gb(weights)}, activations {_gb(activations)}), {_gb(free)} are free; try "
            "--recompute, a smaller --unit_tokens or --target_len, or a machine with more"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process can still take: the system's, within the limits of its containers.

    None where neither can be read (macOS, Windows). Of control groups version 2 alone is known.
    root: where proc/ and sys/ lie.
    """
    free = []
    with suppress(OSError, KeyError, ValueError):
        free.append(_fields(root / "proc/meminfo")["MemAvailable"] * 1024)
    with suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::"))
        group = root / "sys/fs/cgroup" / own[3:].strip("/")
        # Limits above hold too. In a container the path may be the host's, and not be there.
        for place, limit in product([group, *group.parents], ("memory.max", "memory.high")):
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                stat = _fields(place / "memory.stat")  # file pages can be given back, these not
                kept = sum(stat.get(kind, 0) for kind in ("anon", "shmem", "slab_unreclaimable"))
                free.append(max(0, int((place / limit).read_text()) - kept))
    return min(free, default=None)


def forget_peak(device: str) -> None:
    """Begin a phase: peak_gib will return the most that was held from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Linux only: elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name: number unit" or "name number"."""
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def peak_gib(device: str) -> float:
    """Return the most memory held since forget_peak: the GPU's or this process's; 0: unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / GIB
    with suppress(OSError, KeyError):  # Linux only
        return _fields(Path("/proc/self/status"))["VmHWM"] * 1024 / GIB
    return 0.0


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
