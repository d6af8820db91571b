"""Memory: how 8 billion parameters train on one GPU, and how long their text may be.

What training keeps, per parameter: a bf16 weight and an fp32 gradient (6 B) that must be on the
GPU, and AdamW's state (10 B), touched once a step, that need not be. What it keeps per token: a
block's activations, most of which are cheaper to make again than to keep. Four mechanisms compose:

    AdamW         bf16 weight + 16-bit remainder = the exact fp32 master; m and v; in host memory
                  where the GPU has no room, streamed through it once a step
    use           how blocks run: recomputed in backward, attention outputs kept, some blocks left
                  alone, inputs waiting in host memory (Offload), the MLP in tiles (model._TiledMLP)
    Visitor       a frozen teacher, on the GPU only while it is needed
    make_plan     the memory table before anything is allocated, and the fastest choice that fits;
                  Machine is that plan at work

Everything here also runs on a CPU, where streams are empty words and every copy is done when it
returns. Sizes in bytes unless said otherwise; GiB = 2^30.
"""

import math
import mmap
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model import LOSS_ROWS, MLP, Llama, ModelConfig

GIB = 2**30

# ------------------------------------------------------------------------------------- host memory

_PINNED = []  # kept for the life of the process: registered pages must not be unmapped


def host_buffer(nbytes: int, pin: bool) -> Tensor:
    """One flat, zeroed buffer of host memory, page-locked so that the GPU copies at full speed.

    nbytes: its size; no rounding, where torch's own pinned allocator goes to the next power of
        two (10% more on Llama-3-8B's shapes). pin: register it with CUDA, which takes a GPU.
    Returns (nbytes,) uint8. Raises ValueError where the system refuses to lock that much.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Big pages make locking 90 GB quick; a forked child must not get copies of locked pages.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            memory.madvise(getattr(mmap, advice))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    buffer.zero_()  # by all cores: the first touch is what allocates
    if pin:
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        if code:
            raise ValueError(
                f"cannot lock {nbytes / GIB:.1f} GiB of host memory (CUDA error {code}); see "
                "`ulimit -l` and the container's memory limit, or try --moments bf16"
            )
        _PINNED.append(buffer)
    return buffer


# ------------------------------------------------------------------------------------------- AdamW


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 weight rounded half up in magnitude, int16 remainder); nothing is lost.

    Half up, not half to even: at an exact tie the latter may leave +32768, which int16 cannot hold.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 number that `split_master` took apart, bit for bit."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


class AdamW:
    """AdamW on bf16 weights with exact fp32 masters; its state on the GPU or in host memory.

    The update is torch.optim.AdamW's for-loop variant (foreach=False, fused=False), operation for
    operation, so on a CPU masters, m and v equal its bits. Gradients are fp32 (Tensor.grad_dtype),
    allocated here once and zeroed in place, so memory is constant from the first step on;
    torch.nn.utils.clip_grad_norm_ works on them. A gradient that is not finite is the caller's to
    refuse before step: rounding turns some NaN masters into ordinary bf16 weights.

    State of a piece of n <= chunk numbers of one parameter, in one buffer: m | v | remainder, 10 n
    bytes with fp32 moments, 6 n with bf16. On the host all pieces lie in one flat locked buffer.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        host: bool,
        moments_dtype: torch.dtype = torch.float32,
        chunk: int = 2**24,
    ):
        """params: bf16, or fp32, which become bf16 + remainder here. host: keep the state there.

        chunk: numbers updated at a time; 160 MiB of fp32 state, about 3.4 ms of PCIe at 50 GB/s.
        Raises ValueError for bf16 moments whose decay bf16 cannot express.
        """
        if moments_dtype == torch.bfloat16 and 1 - max(betas) < 2**-7:
            raise ValueError(
                f"betas {betas} with bf16 moments: a change of {1 - max(betas):g} a step is below "
                "bf16's half step of 2^-9 to 2^-8 and would be rounded away; use fp32 moments, or "
                "betas up to 0.99"
            )
        params = [p for p in params if p.requires_grad]
        self.param_groups = [
            dict(params=params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        ]
        self.steps = 0
        self.host, self.moments_dtype = host, moments_dtype
        self.device = params[0].device
        self.pieces = [
            (p, start, min(start + chunk, p.numel()))
            for p in params
            for start in range(0, p.numel(), chunk)
        ]
        sizes = [self._nbytes(end - start) for _, start, end in self.pieces]
        if host:
            flat = host_buffer(sum(sizes), pin=self.device.type == "cuda")
            self.state = list(flat.split(sizes))
        else:
            self.state = [torch.zeros(s, dtype=torch.uint8, device=self.device) for s in sizes]
        self._take_over(params)

    @torch.no_grad()
    def _take_over(self, params: list[Tensor]) -> None:
        """fp32 parameters become bf16, their low bits the remainder; gradients become fp32."""
        masters = {id(p): p.data.flatten() for p in params if p.dtype == torch.float32}
        for p in params:
            if id(p) in masters:
                p.data = p.data.new_empty(p.shape, dtype=torch.bfloat16)
            assert p.dtype == torch.bfloat16 and p.is_contiguous(), (p.dtype, p.stride())
            p.grad = None
            p.grad_dtype = torch.float32
            p.grad = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for (p, start, end), state in zip(self.pieces, self.state, strict=True):
            if id(p) in masters:
                weight, remainder = split_master(masters[id(p)][start:end])
                p.view(-1)[start:end].copy_(weight)
                self._fields(state, end - start)[2].copy_(remainder)

    def _nbytes(self, n: int) -> int:
        return -(-n * (2 + 2 * self.moments_dtype.itemsize) // 64) * 64  # aligned for the next one

    def _fields(self, state: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a piece's buffer: m, v, remainder, (n,) each."""
        size = n * self.moments_dtype.itemsize
        m, v = (state[i * size : (i + 1) * size].view(self.moments_dtype) for i in (0, 1))
        return m, v, state[2 * size : 2 * size + 2 * n].view(torch.int16)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the accumulated gradients."""
        self.steps += 1
        for (p, start, end), state in self._streamed():
            weight, grad = p.view(-1)[start:end], p.grad.view(-1)[start:end]
            m, v, remainder = self._fields(state, end - start)
            master = join_master(weight, remainder)
            self._update(master, grad, m, v)
            weight_now, remainder_now = split_master(master)
            weight.copy_(weight_now)
            remainder.copy_(remainder_now)

    def _update(self, master: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> None:
        group = self.param_groups[0]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m32, v32 = m.float(), v.float()  # themselves where they are fp32
        if group["weight_decay"]:
            master.mul_(1 - lr * group["weight_decay"])
        m32.lerp_(grad, 1 - beta1)
        v32.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        denominator = (v32.sqrt() / correction2**0.5).add_(group["eps"])
        master.addcdiv_(m32, denominator, value=-lr / correction1)
        if m32 is not m:
            m.copy_(m32)
            v.copy_(v32)

    def _streamed(self):
        """Each piece with its state where its weight is; the state goes home after the update.

        Three buffers rotate on two side streams: one is filled and one emptied while the third is
        updated, so both directions of PCIe are busy. Llama-3-8B, fp32 moments: 80.3 GB each way.
        """
        if not self.host:
            yield from zip(self.pieces, self.state, strict=True)
            return
        api = torch.get_device_module(self.device)
        compute, fill, empty = api.current_stream(), api.Stream(), api.Stream()
        size = max(len(s) for s in self.state)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(3)]
        filled, emptied = {}, {}  # events, by piece
        fill.wait_stream(compute)  # whoever had the buffers' memory before may still be running

        def start_filling(i: int) -> None:
            with api.stream(fill):
                if i >= 3:
                    fill.wait_event(emptied[i - 3])
                buffers[i % 3][: len(self.state[i])].copy_(self.state[i], non_blocking=True)
                filled[i] = fill.record_event()

        start_filling(0)
        for i, piece in enumerate(self.pieces):
            if i + 1 < len(self.pieces):
                start_filling(i + 1)
            compute.wait_event(filled[i])
            state = buffers[i % 3][: len(self.state[i])]
            yield piece, state
            empty.wait_stream(compute)
            with api.stream(empty):
                self.state[i].copy_(state, non_blocking=True)
                emptied[i] = empty.record_event()
        compute.wait_stream(empty)  # before the buffers' memory goes to someone else

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.zero_()

    def state_dict(self) -> dict:
        """Everything but the bf16 weights, without a copy: the state's own buffers.

        torch.save streams them: from the host's flat buffer straight to the file, from the GPU one
        piece (160 MiB) at a time. To be saved before the next step, which writes them again.
        """
        torch.get_device_module(self.device).synchronize()
        return {
            "steps": self.steps,
            "moments": str(self.moments_dtype).removeprefix("torch."),
            "state": self.state,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Copy piece by piece; from a memory-mapped file nothing piles up. Any placement to any."""
        moments = str(self.moments_dtype).removeprefix("torch.")
        if saved["moments"] != moments or [len(s) for s in saved["state"]] != [
            len(s) for s in self.state
        ]:
            raise ValueError(
                f"the saved optimizer has {saved['moments']} moments for {len(saved['state'])} "
                f"pieces, this one {moments} for {len(self.state)}; pass the run's --moments"
            )
        self.steps = saved["steps"]
        for mine, theirs in zip(self.state, saved["state"], strict=True):
            mine.copy_(theirs)


# ------------------------------------------------------------------------------------- activations


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
    compile: bool = False  # torch.compile, one graph for all blocks of a kind


# What SDPA turns into, on a GPU and on a CPU; `Policy.attention` keeps their output.
ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class Offload:
    """Inputs of recomputed blocks, in one locked host buffer between forward and backward.

    Forward copies each to its slot on a side stream while the block computes; backward fetches
    block i - 1's while block i works, so that two or three are on the GPU at a time. Llama-3-8B at
    32K: 268 MB a block, 5.4 ms at an assumed 50 GB/s, against some 40 ms of forward. Unmeasured.
    """

    def __init__(self, n_blocks: int, slot_bytes: int, device: torch.device):
        self.slot_bytes = slot_bytes
        self.host = host_buffer(n_blocks * slot_bytes, pin=device.type == "cuda")
        self.api = torch.get_device_module(device)
        self.down, self.up = self.api.Stream(), self.api.Stream()
        self.on_gpu, self.saved, self.fetched = {}, {}, {}  # tensors and events, by block

    def hooks(self, i: int, x: Tensor):
        """Saved-tensor hooks that send block i's input x away and let everything else pass."""
        address, shape = x.data_ptr(), x.shape  # not x itself: it has to be free to go

        def pack(t: Tensor):
            if t.data_ptr() != address or t.shape != shape:
                return t
            self._save(i, t)
            return i, t.shape, t.dtype, t.device

        def unpack(handle):
            return handle if isinstance(handle, Tensor) else self._load(*handle)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _slot(self, i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        assert nbytes <= self.slot_bytes, (nbytes, self.slot_bytes)
        start = i * self.slot_bytes
        return self.host[start : start + nbytes].view(dtype).view(shape)

    def _save(self, i: int, t: Tensor) -> None:
        if i == 0:
            self.on_gpu.clear()  # an interrupted pass may have left some
        compute = self.api.current_stream()
        self.down.wait_stream(compute)
        with self.api.stream(self.down):
            self._slot(i, t.shape, t.dtype).copy_(t.detach(), non_blocking=True)
            self.saved[i] = self.down.record_event()
        self.on_gpu[i] = t.detach()
        if i - 2 in self.on_gpu:  # its copy is done by now: let its memory go
            compute.wait_event(self.saved[i - 2])
            del self.on_gpu[i - 2]

    def _load(self, i: int, *like) -> Tensor:
        if i not in self.on_gpu:
            self._fetch(i, *like)
        compute = self.api.current_stream()
        compute.wait_event(self.fetched.pop(i) if i in self.fetched else self.saved[i])
        x = self.on_gpu.pop(i)
        if i > 0 and i - 1 not in self.on_gpu:
            self._fetch(i - 1, *like)
        return x

    def _fetch(self, i: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        t = torch.empty(shape, dtype=dtype, device=device)
        self.up.wait_stream(self.api.current_stream())  # t's memory may still be in use there
        with self.api.stream(self.up):
            t.copy_(self._slot(i, shape, dtype), non_blocking=True)
            self.fetched[i] = self.up.record_event()
        self.on_gpu[i] = t


@contextmanager
def _again(inner):
    MLP.recomputing = True  # for all threads: backward runs in another one
    try:
        with inner:
            yield
    finally:  # the checkpoint leaves by an exception as soon as it has what it needs
        MLP.recomputing = False


def _keep_attention():
    return create_selective_checkpoint_contexts(ATTENTION_OPS)


def _contexts(keep: bool):
    """The contexts a checkpointed block first runs in and is recomputed in."""
    first, again = _keep_attention() if keep else (nullcontext(), nullcontext())
    return first, _again(again)


def _eager(block: nn.Module, x: Tensor, rope: tuple, recompute: bool, keep: bool) -> Tensor:
    """A block, recomputed in backward or not, its attention's output kept or not."""
    if not recompute:
        return block(x, rope)
    contexts = partial(_contexts, keep)
    return checkpoint(
        block, x, rope, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def _graph(block: nn.Module, x: Tensor, rope: tuple, recompute: bool, keep: bool) -> Tensor:
    """The same for torch.compile, with the checkpoint inside the graph: recomputation that nobody
    reads, down_proj's, is dropped there without our help."""
    if not recompute:
        return block(x, rope)
    if keep:
        return checkpoint(block, x, rope, use_reentrant=False, context_fn=_keep_attention)
    return checkpoint(block, x, rope, use_reentrant=False)


@cache
def _compiled():
    return torch.compile(_graph, dynamic=False, fullgraph=True)


def use(model: Llama, policy: Policy, offload: Offload | None = None) -> None:
    """Make the model's blocks run by `policy` from the next forward pass on.

    offload: where inputs wait, with policy.offload; one for all policies of a model.
    """
    first_unchecked = len(model.layers) - policy.unchecked
    first_kept = first_unchecked - policy.attention
    assert 0 <= first_kept and bool(offload) >= policy.offload, (policy, len(model.layers))
    for i, block in enumerate(model.layers):
        block.mlp.rows = 0 if model.config.mlp_bias else policy.mlp_rows
        block.mlp.keep = i >= first_unchecked
    run = _compiled() if policy.compile else _eager

    def run_block(i: int, block: nn.Module, x: Tensor, rope: tuple) -> Tensor:
        recompute = i < first_unchecked
        away = policy.offload and recompute
        with offload.hooks(i, x) if away else nullcontext():
            return run(block, x, rope, recompute, i >= first_kept)

    model.run_block = run_block


# --------------------------------------------------------------------------------------- teacher


class Visitor:
    """A frozen model whose weights live in one flat locked host buffer and visit the GPU.

    They do not change there, so none go back: leaving frees the copies. Llama-3-8B without its LM
    head, which no distillation loss runs: 15.0 GB, 0.3 s at an assumed 50 GB/s.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        named = dict(model.named_parameters())
        assert not any(p.requires_grad for p in named.values())
        sizes = [-(-p.nbytes // 64) * 64 for p in named.values()]
        flat = host_buffer(sum(sizes), pin=device.type == "cuda")
        self.device, self.homes = device, {}  # name -> (parameter, its weights on the host)
        for (name, p), part in zip(named.items(), flat.split(sizes), strict=True):
            p.data = part[: p.nbytes].view(p.dtype).view(p.shape).copy_(p.data)
            self.homes[name] = p, p.data

    def come(self, lm_head: bool = False) -> None:
        for name, (p, home) in self.homes.items():
            here = p.data_ptr() != home.data_ptr()
            if not here and (lm_head or not name.startswith("lm_head.")):
                p.data = home.to(self.device, non_blocking=True)

    def leave(self) -> None:
        for p, home in self.homes.values():
            p.data = home


DISTANCE_ROWS = 8192  # tokens whose fp32 copies exist at a time


def in_chunks(distance, student: Tensor, teacher: Tensor, rows: int = DISTANCE_ROWS) -> Tensor:
    """distance(student, teacher), a mean over tokens, with fp32 copies of `rows` tokens at a time.

    student, teacher: (B, T, D) hidden states of one layer. Left to autograd, cosine_distance keeps
    some ten fp32 copies, 5 GB a layer at 32K tokens of Llama-3-8B; six layers would pile them up.
    """
    pairs = zip(student.flatten(0, -2).split(rows), teacher.flatten(0, -2).split(rows), strict=True)
    total = student.shape[:-1].numel()
    return sum(
        checkpoint(distance, s, t, use_reentrant=False, preserve_rng_state=False) * (len(s) / total)
        for s, t in pairs
    )


# --------------------------------------------------------------------------------------- planner

# Ceilings of one H200 (bf16 matmul on random data, device copies: measured, before this code was;
# attention: FA3 on an H100 as published; PCIe: assumed). They rank plans, so their ratios matter;
# bench.py step times.
MATMUL, ATTENTION_FORWARD, ATTENTION_BACKWARD = 790e12, 650e12, 540e12  # FLOP/s
COPY, PCIE = 4.3e12, 50e9  # bytes/s
ELEMENTWISE = 152  # bytes per token, block and d_model: norms, rotary, SwiGLU, residuals, if fused
# Kept free: CUDA's context lies outside the allocator, fragments inside it. Unmeasured.
GPU_SPARE, GPU_SPARE_FRACTION, HOST_SPARE = 1.0 * GIB, 0.03, 6 * GIB


@dataclass(frozen=True)
class Unit:
    """One kind of forward and backward pass, `count` of them in an optimizer step."""

    name: str
    batch: int  # sequences
    seq_len: int
    count: int = 1
    taps: int = 0  # hidden states compared with the teacher's; 0: cross-entropy, no teacher

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

    def table(self) -> str:
        """The memory table, GiB, one column a unit."""
        names = list(self.gpu)
        lines = ["memory plan, GiB".ljust(38) + "".join(n.rjust(9) for n in names)]
        for term in dict.fromkeys(t for terms in self.gpu.values() for t in terms):
            row = (self.gpu[n].get(term, 0) / GIB for n in names)
            lines.append(f"  {term:<36}" + "".join(f"{x:9.2f}" for x in row))
        total = (sum(self.gpu[n].values()) / GIB for n in names)
        lines.append("  GPU peak".ljust(38) + "".join(f"{x:9.2f}" for x in total))
        lines += [f"  host: {term:<30}{x / GIB:9.2f}" for term, x in self.host.items() if x]
        lines.append("  host".ljust(38) + f"{sum(self.host.values()) / GIB:9.2f}")
        for n, p in self.policies.items():
            lines.append(
                f"  {n}: {self.units[n].batch} x {self.units[n].seq_len:,} tokens a pass, "
                f"{p.unchecked} blocks unchecked, {p.attention} recomputed but for attention, "
                f"MLP tiles of {p.mlp_rows}" + (", inputs offloaded" if p.offload else "")
            )
        lines.append(f"  a step takes {self.seconds:.3g} s at least, every kernel at its ceiling")
        return "\n".join(lines)


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
        "head": 0.0 if unit.taps else 2.0 * unit.tokens * config.vocab_size * config.d_model,
    }


def model_flops(config: ModelConfig, unit: Unit) -> float:
    """FLOPs of a unit, nothing counted twice: student forward, twice that backward, teacher."""
    once = flops(config, unit)
    passes = 4 if unit.taps else 3
    return config.n_layers * passes * (once["matmul"] + once["attention"]) + 3 * once["head"]


def unit_seconds(config: ModelConfig, unit: Unit, policy: Policy) -> float:
    """Seconds of a unit if every kernel ran at its ceiling, recomputation included."""
    once, n = flops(config, unit), config.n_layers
    matmul, attention = once["matmul"] / MATMUL, once["attention"] / ATTENTION_FORWARD
    recomputed = n - policy.unchecked
    block = parameter_count(replace(config, n_layers=1, vocab_size=0))
    down = config.d_ff * config.d_model / block  # early stop: down_proj is not run again
    seconds = n * (3 * matmul + attention + 2.5 * once["attention"] / ATTENTION_BACKWARD)
    seconds += recomputed * (1 - down) * matmul + (recomputed - policy.attention) * attention
    seconds += 3 * once["head"] / MATMUL
    if unit.taps:
        seconds += n * (matmul + attention)
    tiles = -(-unit.tokens // policy.mlp_rows)
    traffic = n * unit.tokens * config.d_model * ELEMENTWISE
    traffic += n * tiles * 3 * config.d_ff * config.d_model * 16  # fp32 sums: product, read, write
    traffic += 12 * parameter_count(config)  # a pass adds bf16 gradients to fp32 ones
    # An offload hidden behind compute costs 1-2% (Unsloth's figure; unmeasured here).
    return (seconds + traffic / COPY) * (1.02 if policy.offload else 1.0)


def activation_memory(config: ModelConfig, unit: Unit, policy: Policy) -> dict[str, int]:
    """Bytes on the GPU beyond weights, gradients, state and teacher, at a unit's worst moment."""
    m, d, f = unit.tokens, config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    x = 2 * m * d  # one hidden state
    lse = 4 * m * config.n_heads
    recomputed = config.n_layers - policy.unchecked
    block = 2 * m * (3 * d + 2 * q + 2 * kv) + lse + 8 * m  # what autograd keeps beside x and MLP
    # A block's backward is widest in the MLP, or in attention with its fp32 gradient of q. The
    # first block it meets has its activations counted below if unchecked, else makes them now.
    tiles = 3 if policy.unchecked else 5  # gate and up count with the block where it keeps them
    in_mlp = tiles * 2 * min(policy.mlp_rows, m) * f + 4 * 4 * f * d + 2 * x
    in_attention = 2 * m * (4 * q + 2 * kv) - x
    backward = max(in_mlp, in_attention) + (0 if policy.unchecked else block)
    # Gradients of the hidden states compared; the last one's is used up before any block's.
    in_block = backward + max(0, unit.taps - 1) * x
    if unit.taps:  # the teacher's hidden states, and ours unless they are inputs counted below
        compared = (2 if policy.offload else 1) * unit.taps * x
        chunk = 40 * min(DISTANCE_ROWS, m) * d  # ten fp32 copies
        at_loss = 2 * x + compared + chunk + x
    else:  # fp32 and bf16 logits, then bf16 d(logits) and an fp32 product, beside the fp32 sum
        rows, v = min(LOSS_ROWS, m), config.vocab_size
        at_loss = 2 * x + 4 * v * d + max(6 * rows * v, 2 * rows * v + 4 * v * d) + x
    worst = "in a block's backward" if in_block > at_loss else "at the loss"
    on_gpu = min(recomputed, 2) if policy.offload else recomputed
    mlp_kept = 2 * m * (4 if config.mlp_bias else 2) * f
    return {
        "inputs of recomputed blocks": on_gpu * x,
        "attention outputs kept": policy.attention * (2 * m * q + lse),
        "unchecked blocks": policy.unchecked * (x + block + mlp_kept),
        "working memory " + worst: max(in_block, at_loss),
    }


def best_policy(config: ModelConfig, unit: Unit, room: int, offload: bool):
    """The fastest (seconds a step, unit, policy) whose activations fit in `room` bytes, or None.

    offload: whether inputs may wait in host memory, for units that gain by it.
    """
    best = None
    batches = sorted({max(1, unit.batch >> i) for i in range(6)})  # fewer a pass, more passes
    for away, batch, rows in product((False, True)[: 1 + offload], batches, (8192, 16384, 32768)):
        part = replace(unit, batch=batch, count=unit.count * -(-unit.batch // batch))
        for unchecked in range(config.n_layers + 1 - away):
            policy = Policy(unchecked, 0, away, rows)
            left = room - sum(activation_memory(config, part, policy).values())
            if left < 0:
                break
            kept = 2 * part.tokens * config.n_heads * (config.head_dim + 2)
            policy.attention = min(config.n_layers - unchecked, left // kept)
            seconds = part.count * unit_seconds(config, part, policy)
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
) -> Plan:
    """Choose the fastest plan that fits this model, these units, this GPU and this host.

    gpu_bytes, host_bytes: free now, for all of the run; a spare part of each is left alone.
    Raises ValueError where none fits, saying what is missing and which flags would save how much.
    """
    plan = _fastest(config, units, gpu_bytes, host_bytes, moments)
    if plan is None:
        raise ValueError(_advice(config, units, gpu_bytes, host_bytes, moments))
    for policy in plan.policies.values():
        policy.compile = compile
    return plan


def _fastest(config, units, gpu_bytes, host_bytes, moments) -> Plan | None:
    n = parameter_count(config)
    state_bytes = n * (2 + 2 * moments.itemsize)
    parked = 2 * n  # the teacher, with its LM head: the closing report needs it
    visiting = 2 * parameter_count(config, lm_head=False)
    gpu_room = int(gpu_bytes * (1 - GPU_SPARE_FRACTION) - GPU_SPARE)
    best = None
    for offload, swapped, host_state in product((False, True), repeat=3):
        host = {
            "AdamW's state": state_bytes if host_state else 0,
            "teacher": parked if swapped else 0,
            "block inputs": 0,
        }
        seconds = state_bytes / PCIE if host_state else 12 * n * 12 / COPY
        seconds += visiting / PCIE if swapped and any(u.taps for u in units) else 0
        parts, policies, gpu, slot_bytes = {}, {}, {}, 0
        for unit in units:
            fixed = {
                "weights, bf16": 2 * n,
                "gradients, fp32": 4 * n,
                "AdamW's state": 0 if host_state else state_bytes,
                "teacher, bf16": (visiting if unit.taps else 0) if swapped else parked,
            }
            found = best_policy(config, unit, gpu_room - sum(fixed.values()), offload)
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
    return best


def _advice(config, units, gpu_bytes, host_bytes, moments) -> str:
    """Why nothing fits, and what would."""
    n, longest = parameter_count(config), max(units, key=lambda u: u.seq_len)
    lines = [
        f"this does not fit {gpu_bytes / GIB:.1f} GiB of GPU and {host_bytes / GIB:.1f} GiB of "
        f"host memory: weights and gradients take {6 * n / GIB:.1f} GiB of the GPU, AdamW's state "
        f"{n * (2 + 2 * moments.itemsize) / GIB:.1f} GiB of either, and a pass over "
        f"{longest.seq_len} tokens its activations"
    ]

    def fits(changed: list[Unit], m: torch.dtype = moments) -> bool:
        return _fastest(config, changed, gpu_bytes, host_bytes, m) is not None

    if moments == torch.float32:
        verdict = "and fits" if fits(units, torch.bfloat16) else "which is not enough alone"
        lines.append(f"--moments bf16 saves {4 * n / GIB:.1f} GiB, {verdict}")
    for seq_len in range(longest.seq_len // 8192 * 8192, 0, -8192):
        shorter = [replace(u, seq_len=min(u.seq_len, seq_len)) for u in units]
        if seq_len < longest.seq_len and fits(shorter):
            lines.append(f"--target_len {seq_len} fits")
            break
    else:
        lines.append("no length fits: a bigger GPU, more host memory, or more GPUs with torchrun")
    return "; ".join(lines)


class Machine:
    """A plan at work: the optimizer, the teacher's visits, the inputs' slots."""

    def __init__(self, plan: Plan, student: Llama, teacher: Llama, *adamw):
        """adamw: lr, betas, eps, weight_decay. Student and teacher are on the GPU, in bf16."""
        self.plan, self.student = plan, student
        device = student.embed_tokens.weight.device
        self.teacher = None if plan.teacher_resident else Visitor(teacher, device)
        self.offload = None
        if plan.slot_bytes:
            self.offload = Offload(student.config.n_layers, plan.slot_bytes, device)
        where = dict(host=plan.host_state, moments_dtype=plan.moments)
        self.optimizer = AdamW(student.parameters(), *adamw, **where)

    def ready(self, name: str) -> None:
        """Set up for the passes of unit `name`: the student's policy, the teacher here or not."""
        use(self.student, self.plan.policies[name], self.offload)
        if self.teacher:
            self.teacher.come() if self.plan.units[name].taps else self.teacher.leave()

    def finish(self) -> None:
        """After the last step: gradients and policies go, the whole teacher comes to stay."""
        self.student.zero_grad(set_to_none=True)
        self.student.run_block = None
        if self.teacher:
            self.teacher.come(lm_head=True)


def gpu_room() -> int:
    """Bytes of the current GPU that are free for this run."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
