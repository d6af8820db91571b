"""What a run needs, before anything is allocated: memory, disk, and the fastest plan that fits.

What training keeps, per parameter: a bf16 weight (2 B) that must be on the GPU; an fp32 gradient
(4 B), touched in every pass, and AdamW's state (10 B), touched once a step, that need not be. What
it keeps per token: a block's activations, most of which are cheaper to make again than to keep.
`make_plan` weighs the mechanisms of machine/memory.py against each other and prints what it chose
as a table.

Sizes in bytes unless said otherwise; GiB = 2^30.
"""

import bisect
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from machine.formats import stored_dtype
from model import LOSS_ROWS, Llama, ModelConfig, next_token_loss

GIB = 2**30
DISTANCE_ROWS = 8192  # tokens whose hidden states are compared at a time (memory.in_chunks)


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
        """The card that torch calls `name`, by its published peaks; None: not known here."""
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
# Kept free: CUDA's context lies outside the allocator, fragments inside it. Unmeasured.
GPU_SPARE, GPU_SPARE_FRACTION, HOST_SPARE = 1.0 * GIB, 0.03, 6 * GIB
# Reserved beyond what is allocated: 20 MiB pages that are not full where segments of the allocator
# expand, else what lives on in the midst of freed memory. Both were found by replaying planned runs
# through a model of the allocator (README.md, "One GPU's memory"; measure/replay.py of c5ec068).
PAGES, STRANDED_FRACTION = 0.5 * GIB, 0.13
# Gradients bound for host memory that may still be on the GPU; three buffers of 2^24 fp32 beside.
IN_FLIGHT, GRADIENT_BUFFERS = 2**29, 3 * 2**26


@dataclass
class Policy:
    """How the blocks of one kind of micro-batch run while gradients are on.

    In the order in which blocks run: first those recomputed in full, then `attention` of them that
    keep the attention's output, and last `unchecked` ones that keep everything. The last, because
    their activations are gone again when the others need room for recomputing.
    """

    unchecked: int = 0  # blocks that are not recomputed; 3.6 GB each at 32K tokens of Llama-3-8B
    attention: int = 0  # recomputed blocks that keep the attention's output; 0.27 GB each there
    offload: bool = False  # the inputs of recomputed blocks wait in host memory
    mlp_rows: int = 8192  # tokens of one MLP tile
    loss_rows: int = LOSS_ROWS  # tokens whose logits exist at a time
    compile: bool = False  # torch.compile, one graph for all blocks of a kind


@dataclass(frozen=True)
class Unit:
    """One kind of forward and backward pass, `count` of them in an optimizer step."""

    name: str
    batch: int  # sequences
    seq_len: int
    count: int = 1
    hidden_states: int = 0  # how many are compared with the teacher's
    heads: int | None = (
        None  # LM heads run: 1, of KL 2 (the teacher's); by default 1, or 0 if any are compared
    )

    def __post_init__(self):
        if self.heads is None:
            object.__setattr__(self, "heads", 0 if self.hidden_states else 1)

    @classmethod
    def of(cls, stream, c, most: int | None = None) -> "Unit":
        """The passes that a step makes of a stream (longred.StepStream), by what its loss needs.

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
    units: dict[str, Unit]  # as they will run: with fewer sequences in a pass where that helps
    policies: dict[str, Policy]
    gpu: dict[str, dict[str, int]]
    host: dict[str, int]
    slot_bytes: int  # of Offload; 0: nothing is offloaded
    seconds: float  # of one optimizer step at the ceilings above: ranks plans, promises nothing
    expandable: bool = True  # whether the allocator's segments can expand
    host_gradients: bool = False  # gradients are summed in host memory
    host_given: bool = False  # by --host_gib, so that more than what is free is tried
    card: Card | None = None  # None: not one whose ceilings are known; an H200's were taken

    def reserved(self, name: str) -> int:
        """Bytes that the allocator takes for a unit, about: allocated at the peak, and gaps."""
        peak = sum(self.gpu[name].values())
        return int(peak + (self.gaps if self.expandable else STRANDED_FRACTION * peak))

    @property
    def gaps(self) -> float:
        """Of segments that expand: wider where large gradients come and go among what stays."""
        return 1.5 * PAGES if self.host_gradients else PAGES

    def table(self) -> str:
        """The memory table, GiB, one column a unit."""
        how = "" if self.expandable else " (fixed segments)"
        reserved = {name: self.reserved(name) for name in self.gpu}
        lines = memory_table("memory plan, GiB", self.gpu, reserved, how, self.host)
        for n, p in self.policies.items():
            lines.append(
                f"  {n}: {self.units[n].batch} x {self.units[n].seq_len:,} tokens a pass, "
                f"{p.unchecked} blocks unchecked, {p.attention} recomputed but for attention, "
                f"MLP tiles of {p.mlp_rows}"
                + (f", {p.loss_rows} rows of logits" if p.loss_rows < LOSS_ROWS else "")
                + (", inputs offloaded" if p.offload else "")
            )
        if self.host_gradients:
            lines.append("  gradients leave the GPU in every pass and add up in host memory")
        which = (
            f"on one {self.card.name}" if self.card else "were this an H200 (its own: not known)"
        )
        lines.append(
            f"  a step takes {self.seconds:.3g} s at least {which}, every kernel at its ceiling"
        )
        return "\n".join(lines)


def memory_table(title: str, gpu: dict, reserved: dict, how: str, host: dict) -> list[str]:
    """Lines: terms of each unit's peak on the GPU, what is reserved for it, terms of the host's."""
    lines = [title.ljust(38) + "".join(name.rjust(9) for name in gpu)]
    for term in dict.fromkeys(t for terms in gpu.values() for t in terms):
        row = (terms.get(term, 0) / GIB for terms in gpu.values())
        lines.append(f"  {term:<36}" + "".join(f"{x:9.2f}" for x in row))
    total = (sum(terms.values()) / GIB for terms in gpu.values())
    lines.append("  GPU peak, allocated".ljust(38) + "".join(f"{x:9.2f}" for x in total))
    row = ("  GPU peak, reserved" + how).ljust(38)
    lines.append(row + "".join(f"{x / GIB:9.2f}" for x in reserved.values()))
    lines += [f"  host: {term:<30}{x / GIB:9.2f}" for term, x in host.items() if x]
    return [*lines, "  host".ljust(38) + f"{sum(host.values()) / GIB:9.2f}"]


def parameter_count(config: ModelConfig, lm_head: bool = True) -> int:
    """Weights, norms and biases left out (0.003% of Llama-3-8B)."""
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    block = config.d_model * (heads * config.head_dim + 3 * config.d_ff)
    embeddings = 1 + (lm_head and not config.tie_embeddings)
    return config.n_layers * block + embeddings * config.vocab_size * config.d_model


def flops(config: ModelConfig, unit: Unit) -> dict[str, float]:
    """FLOPs of one forward pass: matmuls and causal attention of ONE block, the LM head."""
    block = parameter_count(replace(config, n_layers=1, vocab_size=0))
    q = config.n_heads * config.head_dim
    return {
        "matmul": 2.0 * unit.tokens * block,
        "attention": 2.0 * unit.tokens * unit.seq_len * q,  # half the square, QK and PV
        "head": 2.0 * unit.tokens * config.vocab_size * config.d_model if unit.heads else 0.0,
    }


def model_flops(config: ModelConfig, unit: Unit) -> float:
    """FLOPs of a unit, nothing counted twice: student forward, twice that backward, teacher."""
    once = flops(config, unit)
    passes = 4 if unit.teacher else 3
    heads = 2 + unit.heads  # the student's three passes of it, and the teacher's one
    return config.n_layers * passes * (once["matmul"] + once["attention"]) + heads * once["head"]


def unit_seconds(config: ModelConfig, unit: Unit, policy: Policy, card: Card = H200) -> float:
    """Seconds of a unit if every kernel ran at its ceiling, recomputation included."""
    once, n = flops(config, unit), config.n_layers
    matmul, attention = once["matmul"] / card.matmul, once["attention"] / card.attention_forward
    recomputed = n - policy.unchecked
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
    recomputed = config.n_layers - policy.unchecked
    block = 2 * m * (3 * d + 2 * q + 2 * kv) + lse + 8 * m  # what autograd keeps beside x and MLP
    block += 2 * m * (q + kv) if config.qk_norm else 0  # q and k before their norms
    # A block's backward is widest in the MLP, or in attention with its fp32 gradient of q. The
    # first block it meets has its activations counted below if unchecked, else makes them now.
    tiles = 3 if policy.unchecked else 5  # gate and up count with the block where it keeps them
    in_mlp = tiles * 2 * min(policy.mlp_rows, m) * f + 4 * 4 * f * d + 2 * x
    in_attention = 2 * m * (4 * q + 2 * kv) - x
    backward = max(in_mlp, in_attention) + (0 if policy.unchecked else block)
    # Gradients of the hidden states compared; the last one's is used up before any block's.
    in_block = backward + max(0, unit.hidden_states - 1) * x
    # The teacher's hidden states, and ours unless they are inputs counted below.
    compared = (2 if policy.offload else 1) * unit.hidden_states * x
    chunk = 40 * min(DISTANCE_ROWS, m) * d if unit.hidden_states else 0  # ten fp32 copies
    if unit.heads:  # fp32 and bf16 logits (KL: three fp32 ones), then bf16 d(logits) and an fp32
        # product, beside the fp32 sum; of KL alone the teacher's last hidden state
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
        "unchecked blocks": policy.unchecked * (x + block + mlp_saved),
    }
    # The embedding's gradient comes last, in bf16 and once more in fp32; all of the above is gone.
    at_embedding = head + 6 * config.vocab_size * d + x - sum(terms.values())
    moments = {
        "in a block's backward": in_block,
        "at the loss": at_loss,
        "at the embedding": at_embedding,
    }
    worst = max(moments, key=moments.get)
    return terms | {"working memory " + worst: moments[worst]}


def best_policy(config, unit: Unit, room: int, offload: bool, card: Card, each_pass: float = 0):
    """The fastest (seconds a step, unit, policy) whose activations fit in `room` bytes, or None.

    offload: whether inputs may wait in host memory, for units that gain by it. each_pass: seconds
    that a pass takes beside its work.
    """
    best = None
    logits = (LOSS_ROWS, LOSS_ROWS // 4) if unit.heads else (LOSS_ROWS,)
    batches = sorted({max(1, unit.batch >> i) for i in range(6)})  # fewer a pass, more passes
    choices = (False, True)[: 1 + offload], batches, (8192, 16384, 32768), logits
    for away, batch, rows, loss_rows in product(*choices):
        part = replace(unit, batch=batch, count=unit.count * -(-unit.batch // batch))
        for unchecked in range(config.n_layers + 1 - away):
            policy = Policy(unchecked, 0, away, rows, loss_rows)
            left = room - sum(activation_memory(config, part, policy).values())
            if left < 0:
                break
            saved = 2 * part.tokens * config.n_heads * (config.head_dim + 2)
            policy.attention = min(config.n_layers - unchecked, left // saved)
            seconds = part.count * (unit_seconds(config, part, policy, card) + each_pass)
            if best is None or seconds < best[0]:
                best = seconds, part, policy
    return best


def make_plan(
    config: ModelConfig,
    units: list[Unit],
    gpu_bytes: int,
    host_bytes: int,
    moments: torch.dtype = torch.float32,
    compile: bool = False,
    expandable: bool = True,
    card: str = "H200",
    length: tuple[str, int] = ("--target_len", 0),
) -> Plan:
    """Choose the fastest plan that fits this model, these units, this GPU and this host.

    gpu_bytes, host_bytes: free now, for all of the run; a spare part of each is left alone.
    expandable: whether the allocator's segments expand; where not, more is left alone.
    card: as torch names it, whose ceilings count. length: the flag of the longest unit's, and what
    it has to be above.
    Raises ValueError where none fits, saying what is missing and which changes would fit.
    """
    given = gpu_bytes
    if not expandable:
        gpu_bytes = int(gpu_bytes / (1 + STRANDED_FRACTION))
    known = Card.of(card)
    ceilings = known or H200
    plan = _fastest(config, units, gpu_bytes, host_bytes, moments, ceilings)
    if plan is None:
        rest = gpu_bytes, host_bytes, moments, ceilings
        advice = _advice(config, units, *rest, length)
        if not expandable and _fastest(config, units, given, *rest[1:]):
            advice.append("PYTORCH_ALLOC_CONF=expandable_segments:True")
        raise ValueError(_refusal(config, units, gpu_bytes, host_bytes, moments, advice))
    plan.expandable, plan.card = expandable, known
    for policy in plan.policies.values():
        policy.compile = compile
    return plan


# Whether AdamW's state and gradients are in host memory.
PLACES = (False, False), (True, False), (True, True)


def _fastest(config, units, gpu_bytes, host_bytes, moments, card: Card = H200) -> Plan | None:
    n = parameter_count(config)
    state_bytes = n * (2 + 2 * moments.itemsize)
    parked = 2 * n  # the teacher, with its LM head: the closing report needs it
    gpu_room = int(gpu_bytes * (1 - GPU_SPARE_FRACTION) - GPU_SPARE)
    best = None
    for offload, swapped, (host_state, away) in product((False, True), (False, True), PLACES):
        host = {
            "AdamW's state": state_bytes if host_state else 0,
            "gradients, fp32": 4 * n if away else 0,
            "teacher": parked if swapped else 0,
            "block inputs": 0,
        }
        seconds = state_bytes / PCIE if host_state else 12 * n * 12 / card.copy
        visiting = 2 * parameter_count(config, lm_head=any(u.heads == 2 for u in units))
        seconds += visiting / PCIE if swapped and any(u.teacher for u in units) else 0
        parts, policies, gpu, slot_bytes = {}, {}, {}, 0
        for unit in units:
            fixed = {
                "weights, bf16": 2 * n,
                "gradients, fp32": IN_FLIGHT + GRADIENT_BUFFERS if away else 4 * n,
                "AdamW's state": 0 if host_state else state_bytes,
                "teacher, bf16": (visiting if unit.teacher else 0) if swapped else parked,
            }
            # Counted in full, though backward may hide most of it.
            each_pass = 4 * n / PCIE if away else 0
            left = gpu_room - sum(fixed.values())
            found = best_policy(config, unit, left, offload, card, each_pass)
            if found is None:
                break
            cost, part, policy = found
            seconds += cost
            parts[unit.name], policies[unit.name] = part, policy
            gpu[unit.name] = fixed | activation_memory(config, part, policy)
            if policy.offload:
                slot_bytes = max(slot_bytes, 2 * part.tokens * config.d_model)
                host["block inputs"] = config.n_layers * slot_bytes
        else:
            fits = sum(host.values()) <= max(0, host_bytes - HOST_SPARE)
            if fits and (best is None or seconds < best.seconds):
                where = host_state, not swapped
                best = Plan(*where, moments, parts, policies, gpu, host, slot_bytes, seconds)
                best.host_gradients = away
    return best


def _refusal(config, units, gpu_bytes, host_bytes, moments, advice: list[str]) -> str:
    """Why nothing fits, and what would."""
    n, longest = parameter_count(config), max(units, key=lambda u: u.seq_len)
    what = (
        f"this does not fit {gpu_bytes / GIB:.1f} GiB of GPU and {host_bytes / GIB:.1f} GiB of "
        f"host memory: weights take {2 * n / GIB:.1f} GiB of the GPU, gradients {4 * n / GIB:.1f} "
        f"and AdamW's state {n * (2 + 2 * moments.itemsize) / GIB:.1f} GiB of either, and a pass "
        f"over {longest.seq_len} tokens its activations"
    )
    fits = ", or ".join(advice)
    return f"{what}; it fits with {fits}" if fits else f"{what}; no one change that was tried fits"


def _advice(config, units, gpu_bytes, host_bytes, moments, card, length) -> list[str]:
    """Changes with each of which it fits: tried, every one, by the planner itself."""

    def fits(changed=units, m=moments, gpu=gpu_bytes, host=host_bytes) -> bool:
        return _fastest(config, changed, gpu, host, m, card) is not None

    def longest(m: torch.dtype) -> list[int]:
        i = bisect.bisect_left(shorter, True, key=lambda cut: fits(cut[1], m))
        return [n for n, _ in shorter[i : i + 1]]

    advice, half, shorter = [], moments == torch.float32, list(_shorter(units, length[1]))
    if half and fits(m=torch.bfloat16):
        advice.append("--moments bf16")
    found = longest(moments)
    advice += [f"{length[0]} {n}" for n in found]
    if half and not advice:
        advice += [f"--moments bf16 and {length[0]} {n}" for n in longest(torch.bfloat16)]
    hosts = range(8, 2049, 8)
    i = bisect.bisect_left(hosts, True, key=lambda gib: fits(host=gib * GIB))
    advice += [f"{gib} GiB of free host memory" for gib in hosts[i : i + 1]]
    sizes = (g for g in (24, 32, 48, 80, 96, 141, 180, 288) if g * 0.98 * GIB > gpu_bytes)
    advice += [f"a GPU of {g} GB" for g in sizes if fits(gpu=int(g * 0.98 * GIB))][:1]
    for processes, context in product((2, 4, 8, 16, 32, 64), (1, 2, 4, 8)):
        if _shares_fit(config, units, processes, context, gpu_bytes, host_bytes):
            more = f" and --context {context}" if context > 1 else ""
            advice.append(f"{processes} such GPUs (torchrun){more}")
            break
    return advice


def _shorter(units: list[Unit], floor: int):
    """(length, units): the longest cut, in steps of 8,192, but to more than `floor`."""
    longest = max(u.seq_len for u in units)
    floor = max([floor, *(u.seq_len for u in units if u.seq_len < longest)])
    for length in range((longest - 1) // 8192 * 8192, floor, -8192):
        yield length, [replace(u, seq_len=length) if u.seq_len == longest else u for u in units]


# -------------------------------------------------------------------------------- several GPUs

NCCL = 1.0 * GIB  # its buffers, outside the allocator. Unmeasured


@dataclass
class SharedPlan:
    """What each of several GPUs holds of a run whose weights are spread over them (many.py)."""

    processes: int
    context: int  # processes to a sequence
    units: dict[str, Unit]  # as one process reads them: its part of a sequence
    gpu: dict[str, dict[str, int]]
    host: dict[str, int]

    def table(self) -> str:
        reserved = {name: int(sum(terms.values()) + PAGES) for name, terms in self.gpu.items()}
        title = f"memory plan of each of {self.processes}, GiB"
        lines = memory_table(title, self.gpu, reserved, "", self.host)
        for name, u in self.units.items():
            whole = f" of {u.seq_len * self.context:,}" if self.context > 1 else ""
            lines.append(
                f"  {name}: {u.batch} x {u.seq_len:,}{whole} tokens a pass, every block recomputed"
            )
        return "\n".join(lines)


def shared_plan(
    config, units, processes, context, gpu_bytes, host_bytes, length=("--target_len", 0)
) -> SharedPlan:
    """What each process of torchrun takes of its GPU and of the host.

    gpu_bytes, host_bytes: free on the fullest. Raises ValueError where that is not enough, saying
    what would be. length: as make_plan's.
    """
    fewer = []  # sequences a pass
    for unit in units:
        parts = [replace(unit, batch=max(1, unit.batch >> i)) for i in range(8)]
        held = (u for u in parts if _holds(_shares(config, [u], processes, context), gpu_bytes))
        fewer.append(next(held, parts[-1]))
    plan = _shares(config, fewer, processes, context)
    if _holds(plan, gpu_bytes, host_bytes):
        return plan
    per, peak = parameter_count(config) * 18 / processes, _most(plan)
    raise ValueError(
        f"this does not fit {processes} GPUs with {gpu_bytes / GIB:.1f} GiB each and "
        f"{host_bytes / GIB:.1f} GiB of host memory: {peak / GIB:.1f} GiB of each GPU are needed "
        f"(weights, gradients, AdamW's state and teacher {per / GIB:.1f}), and the export takes "
        f"{sum(plan.host.values()) / GIB:.1f} GiB of the first one's host; "
        + _shared_advice(config, units, processes, context, gpu_bytes, host_bytes, length)
    )


def _shared_advice(config, units, processes, context, gpu_bytes, host_bytes, length) -> str:
    advice = []
    sizes = [processes * 2**i for i in range(10)]
    for many, parts in product(sizes, (1, 2, 4, 8)):
        fits = _shares_fit(config, units, many, parts, gpu_bytes, host_bytes)
        if fits and (many, parts) != (processes, context):
            other = f" and --context {parts}" if parts != context else ""
            advice.append(f"{many} processes{other}" if many > processes else f"--context {parts}")
            break
    for n, changed in _shorter(units, length[1]):
        if _shares_fit(config, changed, processes, context, gpu_bytes, host_bytes):
            advice.append(f"{length[0]} {n}")
            break
    for moments in (torch.float32, torch.bfloat16):
        if _fastest(config, units, gpu_bytes, host_bytes, moments):
            bf16 = " and --moments bf16" if moments == torch.bfloat16 else ""
            advice.append(f"one of these GPUs alone (python longred.py, no torchrun){bf16}")
            break
    if not advice:
        return "no number of such GPUs that was tried fits"
    return "it fits with " + ", or ".join(advice)


def _shares(config, units, processes: int, context: int) -> SharedPlan:
    """20 bytes a parameter, 18 with the teacher in bf16, spread; what is whole; activations."""
    n, v, d = parameter_count(config), config.vocab_size, config.d_model
    block = parameter_count(replace(config, n_layers=1, vocab_size=0))
    rest = v * d * (1 if config.tie_embeddings else 2)  # gathered for all of a pass
    own, gpu = {}, {}
    for unit in units:
        u = own[unit.name] = replace(unit, seq_len=unit.seq_len // context)
        made = activation_memory(config, u, Policy())
        gpu[u.name] = {
            "weights, fp32": 4 * n // processes,
            "gradients, fp32": 4 * n // processes,
            "AdamW's state": 8 * n // processes,
            "teacher, bf16": 2 * n // processes,
            # Two blocks in bf16, one's gradient in bf16 and fp32.
            "gathered blocks": 10 * block,
            "gathered embeddings": 2 * rest * (2 if u.teacher else 1),
            **made,
            "gradient of the embeddings": max(0, 6 * rest - sum(made.values())),
        }
    # Student and teacher whole and in fp32, in the first process.
    return SharedPlan(processes, context, own, gpu, {"export, first process": 8 * n})


def _most(plan: SharedPlan) -> int:
    return max(sum(terms.values()) for terms in plan.gpu.values())


def _holds(plan: SharedPlan, gpu_bytes: int, host_bytes: float = math.inf) -> bool:
    room = gpu_bytes * (1 - GPU_SPARE_FRACTION) - GPU_SPARE - NCCL
    return _most(plan) <= room and sum(plan.host.values()) <= host_bytes - HOST_SPARE


def _shares_fit(config, units, processes: int, context: int, gpu_bytes: int, host_bytes: int):
    """Whether so many GPUs, `context` to a sequence, would hold it."""
    lengths = [u.seq_len for u in units]
    if processes % context or any(n % context for n in (*lengths, config.n_kv_heads)):
        return False
    units = [replace(u, batch=1) for u in units]
    return _holds(_shares(config, units, processes, context), gpu_bytes, host_bytes)


# ------------------------------------------------------------------------------- what there is


def report_steps(c, model: ModelConfig, streams) -> float:
    """About what the closing report costs, in optimizer steps, by the FLOPs of both."""
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
    """Whether they do, by looking at one: the platform, the driver or the user may not allow it."""
    probe = torch.empty(32 * 2**20, dtype=torch.uint8, device="cuda")
    address = probe.data_ptr()
    return any(
        segment["is_expandable"]
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= address < segment["address"] + segment["total_size"]
    )


def asked(flag: str, gib: float | None, free: int | None, grows: bool = False) -> int:
    """Bytes to plan for: what a flag asks for, else all that is free.

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
    """For the log: most GiB reserved by the allocator so far, and allocations tried again."""
    if not device.startswith("cuda"):
        return {"reserved_gib": None, "alloc_retries": None}
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    return {"reserved_gib": round(reserved, 2), "alloc_retries": retries}


def trial(device: str) -> None:
    """A tiny block forward and backward on the real device: seconds, before hours are planned.

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
    except Exception as e:  # whatever a compiler, a driver or a kernel comes up with
        raise ValueError(f"a trial of one tiny block on {device} failed: {why(e)}") from e
    if not finite:
        raise ValueError(
            f"a trial of one tiny block on {device} gave gradients that are not finite"
        )


def why(error: Exception) -> str:
    """One line on a failure of the trial: what was wrong, what to do."""
    said = f"{type(error).__name__}: {error}"
    known = {
        "Failed to find C compiler": "Triton needs a C compiler; install gcc or set CC",
        "Python.h": "Triton needs Python's headers; install python3-dev for this Python",
        # The compiler's own words go to the terminal, only its command line comes back.
        "CalledProcessError": "Triton's C compiler failed, most often for want of Python's "
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


def preflight(c, model: ModelConfig, streams, units: list[Unit], processes: int) -> None:
    """Refuse what would fail after hours: a run that its disk or its memory cannot hold.

    c: the run's settings. units: the passes of its streams. processes: torchrun's.
    """
    alone = processes == 1
    n = parameter_count(model)
    export = n * (stored_dtype(model) or torch.float32).itemsize
    # A state: fp32 weights (on a GPU bf16 and a remainder) and AdamW's two moments.
    bf16 = c.device.startswith("cuda") and c.moments == "bf16" and alone
    check_disk(Path(c.out_dir), export, c.keep and (c.keep + 1) * n * (8 if bf16 else 12))
    if not alone and (c.gpu_gib or c.host_gib or c.compile or c.moments != "fp32"):
        raise ValueError(
            "--gpu_gib, --host_gib, --moments and --compile are one GPU's: drop them with torchrun"
        )
    for s in streams:
        check_batch(s)
    if c.device.startswith("cuda"):
        trial(c.device)
    if c.device == "cpu":
        tokens = max(unit.tokens for unit in units)
        # fp32 student, teacher, gradients and the two moments; many processes hold a part each
        check_memory(20 * n, processes * activation_bytes(model, tokens, c.recompute))


def check_batch(stream) -> None:
    """ValueError for a micro-batch whose ids and positions alone do not fit the host's memory."""
    free, need = available_memory(), 16 * stream.batch * (stream.seq_len + 1)
    if free is not None and need > free:
        raise ValueError(
            f"--{stream.name}_batch {stream.batch}: {stream.seq_len:,} tokens in each sequence are "
            f"{_gb(need)} of ids and positions, {_gb(free)} of memory are free; pass a smaller one "
            f"and more --{stream.name}_micro"
        )


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


def forecast(c, config: ModelConfig, streams, processes: int = 1) -> float:
    """Seconds of an optimizer step on this CPU: its arithmetic at half the speed of one matmul.

    That speed is measured here, in a fraction of a second, with the threads the run will have.
    """
    x, w = torch.randn(1024, config.d_model), torch.randn(config.d_model, config.d_ff)
    torch.mm(x, w)
    began, n = time.perf_counter(), 0
    while n < 3 or time.perf_counter() - began < 0.2:
        torch.mm(x, w)
        n += 1
    speed = n * 2 * x.numel() * config.d_ff / (time.perf_counter() - began)
    units = (Unit.of(s, c) for s in streams)
    return sum(u.count * model_flops(config, u) for u in units) / speed * 2 / processes


def check_disk(out_dir: Path, export: int, states: int) -> None:
    """ValueError unless out_dir's disk has room for the export and the states, in bytes."""
    there = out_dir.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    from machine.states import parts_of, states_in  # which imports this file

    for state in states_in(out_dir / "checkpoints"):
        free += sum(p.stat().st_size for p in parts_of(state))  # these will go
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


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process can still take: the system's, within the limits of its containers.

    None where neither can be read (macOS, Windows). root: where proc/ and sys/ lie.
    """
    free = []
    with suppress(OSError, KeyError, ValueError):
        free.append(_fields(root / "proc/meminfo")["MemAvailable"] * 1024)
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            v1 = "memory" in kinds.split(",")
            if kinds and not v1:
                continue
            top = root / "sys/fs/cgroup" / ("memory" if v1 else "")
            group = top / path.strip("/")
            # Limits above hold too. In a container the path may be the host's, and not be there.
            groups = [group, *group.parents]
            for place in groups[: groups.index(top) + 1]:
                with suppress(OSError, KeyError, ValueError):
                    free.append(_group_room(place, v1))
    return min(free, default=None)


def forget_peak(device: str) -> None:
    """Begin a phase: peak_gib will tell the most that was held from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Linux only: elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _group_room(group: Path, v1: bool) -> int:
    """A control group's limit less what it cannot give back: file pages it can, locked ones not."""
    names = ["memory.limit_in_bytes"] if v1 else ["memory.max", "memory.high"]
    limits = []  # "max", or no such file: none
    for name in names:
        with suppress(OSError, ValueError):
            limits.append(int((group / name).read_text()))
    limit = min(limits, default=2**63)
    stat = _fields(group / "memory.stat")
    kinds = ("total_rss", "total_shmem") if v1 else ("anon", "shmem", "slab_unreclaimable")
    return max(0, limit - sum(stat.get(kind, 0) for kind in kinds))


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name: number unit" or "name number"."""
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def peak_gib(device: str) -> float:
    """Most memory held since forget_peak: the GPU allocator's, else this process's (0: unknown)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / GIB
    with suppress(OSError, KeyError, IndexError):
        fields = dict(
            line.split(":") for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(fields["VmHWM"].split()[0]) * 1024 / GIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
