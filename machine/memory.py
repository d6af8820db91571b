"""Memory: how 8 billion parameters train on one GPU, and how long their text may be.

Four mechanisms compose; machine/plan.py chooses among them and OneGPU carries out its plan:

    AdamW         bf16 weight + 16-bit remainder = the exact fp32 master; m and v; in host memory
                  where the GPU has no room, streamed through it once a step
    HostGradients fp32 gradients, summed in host memory where the GPU has no room for them either
    apply_policy  decides for each block whether backward recomputes it (run_block); attention
                  outputs saved, inputs waiting in host memory (Offload), the MLP in tiles (_Tiles)
    Visitor       a frozen teacher, on the GPU only while it is needed

Everything here also runs on a CPU, where streams do nothing and every copy is done when it returns.
Sizes in bytes unless said otherwise; GiB = 2^30.
"""

import collections
import gc
import math
import mmap
import sys
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from machine.plan import GIB, IN_FLIGHT, Plan, Policy, available_memory
from model import Llama, add_product, fp32_product

# ------------------------------------------------------------------------------------- host memory


class HostMemoryRefused(ValueError):
    """The system does not give, or does not lock, the host memory that a plan uses.

    A plan that uses none may still fit: plan.make_plan with host_bytes=0.
    """


_LOCKED = []  # buffers that CUDA has registered; each must stay mapped until it is unregistered


def host_buffer(nbytes: int, pin: bool) -> Tensor:
    """Return a flat, zeroed buffer of host memory, page-locked for copies at full speed.

    nbytes: its size; no rounding, where torch's own pinned allocator goes to the next power of
        two (10% more on Llama-3-8B's shapes). pin: register it with CUDA, which takes a GPU.
    Returns (nbytes,) uint8. Raises HostMemoryRefused.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise HostMemoryRefused(
            f"the system refuses {nbytes / GIB:.1f} GiB of host memory ({e.strerror})"
        ) from e
    # Big pages make locking 90 GB quick; a forked child must not get copies of locked pages.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(AttributeError, OSError):  # a system that does not know it is only slower
            memory.madvise(getattr(mmap, advice))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    buffer.zero_()  # by all cores: the first touch is what allocates
    if pin:
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        if code:
            _forget_cuda_error()
            raise HostMemoryRefused(
                f"the system refuses to lock {nbytes / GIB:.1f} GiB of host memory (CUDA error "
                f"{code}; see `ulimit -l` and the container's memory limit)"
            )
        _LOCKED.append(buffer)
    return buffer


def _forget_cuda_error() -> None:
    """Launch a kernel that takes the error which a refused call of CUDA's runtime leaves behind.

    torch's cudart returns the code only. The next launch, whatever it is, would raise the error.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def free_host_buffers() -> None:
    """Unlock every host buffer. Its memory is free as soon as nothing views it any more."""
    gc.collect()
    if _LOCKED:
        torch.cuda.synchronize()  # no copy from or to them is under way
        unlock = torch.cuda.cudart().cudaHostUnregister
        # Each is held until CUDA has let go of its pages, and longer where it does not.
        _LOCKED[:] = [buffer for buffer in _LOCKED if int(unlock(buffer.data_ptr()))]
    if _LOCKED:
        _forget_cuda_error()
        gib = sum(buffer.nbytes for buffer in _LOCKED) / GIB
        print(f"CUDA does not unlock {gib:.1f} GiB of host memory: they stay in use until the end")


def empty_cache(device: torch.device | str) -> None:
    """Return the memory that torch's allocator keeps cached, before another phase begins.

    Otherwise long-lived tensors get parts of segments from the phase before, and the rest of these
    segments cannot be used for larger tensors.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------- AdamW


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into (bf16 weight rounded half up in magnitude, int16 remainder), without loss.

    Half up, not half to even: at an exact tie the latter may leave +32768, which int16 cannot hold.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 number that `split_master` split, bit for bit."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


class AdamW:
    """AdamW on bf16 weights with exact fp32 masters; its state on the GPU or in host memory.

    The update is torch.optim.AdamW's for-loop variant (foreach=False, fused=False), operation for
    operation, so on a CPU masters, m and v equal its bits. Gradients are fp32 (Tensor.grad_dtype),
    allocated here once and zeroed in place, so memory is constant from the first step on;
    torch.nn.utils.clip_grad_norm_ works on with_gradients(). A gradient that is not finite is the
    caller's to refuse before step: rounding turns some NaN masters into ordinary bf16 weights.

    State of a piece of n <= chunk numbers of one parameter, in one buffer: m | v | remainder, 10 n
    bytes with fp32 moments, 6 n with bf16. On the host all pieces are in one flat locked buffer.
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
        host_gradients: bool = False,
    ):
        """params: bf16, or fp32, which become bf16 + remainder here. host: keep the state there,
        and with host_gradients the gradients too.

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
        self.gradients = HostGradients(params, chunk) if host_gradients else None
        if not host_gradients:
            for p in params:
                p.grad = torch.zeros(p.shape, dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def _take_over(self, params: list[Tensor]) -> None:
        """Make fp32 parameters bf16, their low bits the remainder; gradients become fp32."""
        masters = {id(p): p.data.flatten() for p in params if p.dtype == torch.float32}
        for p in params:
            if id(p) in masters:
                p.data = p.data.new_empty(p.shape, dtype=torch.bfloat16)
            assert p.dtype == torch.bfloat16 and p.is_contiguous(), (p.dtype, p.stride())
            p.grad = None
            p.grad_dtype = torch.float32
        for (p, start, end), state in zip(self.pieces, self.state, strict=True):
            if id(p) in masters:
                weight, remainder = split_master(masters[id(p)][start:end])
                p.view(-1)[start:end].copy_(weight)
                self._fields(state, end - start)[2].copy_(remainder)

    def _nbytes(self, n: int) -> int:
        return -(-n * (2 + 2 * self.moments_dtype.itemsize) // 64) * 64  # aligned for the next one

    def _fields(self, state: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of a piece's buffer: m, v, remainder, (n,) each."""
        size = n * self.moments_dtype.itemsize
        m, v = (state[i * size : (i + 1) * size].view(self.moments_dtype) for i in (0, 1))
        return m, v, state[2 * size : 2 * size + 2 * n].view(torch.int16)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights once, from the accumulated gradients."""
        self.steps += 1
        for (p, start, end), state, grad in self._streamed():
            weight = p.view(-1)[start:end]
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
        """Yield each piece with its state and gradient on the GPU; then copy the state back.

        Three buffers rotate on two side streams: one is filled and one emptied while the third is
        updated, so both directions of PCIe are busy. Llama-3-8B, fp32 moments: 80.3 GB each way.
        """
        if self.gradients:
            grads = self.gradients.pieces()
        else:
            grads = [p.grad.view(-1)[start:end] for p, start, end in self.pieces]
        if not self.host:
            yield from zip(self.pieces, self.state, grads, strict=True)
            return
        api = torch.get_device_module(self.device)
        compute, fill, empty = api.current_stream(), api.Stream(), api.Stream()
        size = max(len(s) for s in self.state)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(3)]
        filled, emptied = {}, {}  # events, by piece
        fill.wait_stream(compute)  # what had the buffers' memory before may still be running

        def start_filling(i: int) -> None:
            with api.stream(fill):
                if i >= 3:
                    fill.wait_event(emptied[i - 3])
                buffers[i % 3][: len(self.state[i])].copy_(self.state[i], non_blocking=True)
                if self.gradients:
                    buffer = self.gradients.buffers[i % 3][: len(grads[i])]
                    grads[i] = buffer.copy_(grads[i], non_blocking=True)
                filled[i] = fill.record_event()

        start_filling(0)
        for i, piece in enumerate(self.pieces):
            if i + 1 < len(self.pieces):
                start_filling(i + 1)
            compute.wait_event(filled[i])
            state = buffers[i % 3][: len(self.state[i])]
            yield piece, state, grads[i]
            empty.wait_stream(compute)
            with api.stream(empty):
                self.state[i].copy_(state, non_blocking=True)
                emptied[i] = empty.record_event()
        compute.wait_stream(empty)  # before the buffers' memory goes to someone else

    def with_gradients(self) -> list[Tensor]:
        """What clip_grad_norm_ takes: the parameters, or where gradients are away their sums."""
        return self.gradients.settled() if self.gradients else self.param_groups[0]["params"]

    def zero_grad(self) -> None:
        if self.gradients:
            self.gradients.summed = set()  # each sum begins with its next gradient
            return
        for p in self.param_groups[0]["params"]:
            p.grad.zero_()

    def close(self) -> None:
        """Let go of state and gradients, wherever they are."""
        self.state = []
        if self.gradients:
            self.gradients.close()
            self.gradients = None
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict:
        """Return everything except the bf16 weights, without a copy: the state's own buffers.

        To be saved before the next step, which writes them again.
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


class HostGradients:
    """fp32 gradients that leave the GPU as backward makes them, and add up in host memory.

    A hook on each parameter takes its gradient. Piece by piece, one side stream copies the sum so
    far to the GPU and adds the gradient; another copies it back, while backward continues. The
    additions and their order are those of gradients that stay on the GPU, so the bits are the same.
    A pass moves 4 bytes a parameter each way: 32 GB of Llama-3-8B, 0.64 s at an assumed 50 GB/s.
    Unmeasured.
    """

    def __init__(self, params: list[Tensor], chunk: int):
        """chunk: numbers in a piece."""
        device = params[0].device
        sizes = [p.numel() for p in params]
        self.flat = host_buffer(4 * sum(sizes), pin=device.type == "cuda").view(torch.float32)
        self.sums = [
            flat.view(p.shape) for flat, p in zip(self.flat.split(sizes), params, strict=True)
        ]
        self.chunk, self.api = chunk, torch.get_device_module(device)
        size = min(chunk, max(sizes))
        self.buffers = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(3)]
        self.fill, self.empty = self.api.Stream(), self.api.Stream()
        self.fill.wait_stream(self.api.current_stream())  # the buffers' memory may be in use there
        self.moved = 0  # pieces, so far
        self.emptied, self.home = {}, {}  # events: by buffer, by parameter
        self.leaving = collections.deque()  # (gradient, event after which it may go)
        self.summed = set()  # which parameters have a gradient in this step
        take = [partial(self._take, i) for i in range(len(params))]
        self.hooks = [
            p.register_post_accumulate_grad_hook(f) for p, f in zip(params, take, strict=True)
        ]

    @torch.no_grad()
    def _take(self, i: int, p: Tensor) -> None:
        """The hook of parameter i, whose gradient is complete for this pass."""
        compute, grad = self.api.current_stream(), p.grad
        p.grad = None
        if i in self.home:
            self.fill.wait_event(self.home[i])  # the last pass's sum is there
        parts = (t.reshape(-1).split(self.chunk) for t in (self.sums[i], grad))
        for part, new in zip(*parts, strict=True):
            b = self.moved % 3
            self.moved += 1
            buffer = self.buffers[b][: len(part)]
            with self.api.stream(self.fill):
                if b in self.emptied:
                    self.fill.wait_event(self.emptied[b])
                if i in self.summed:
                    buffer.copy_(part, non_blocking=True)
                    self.fill.wait_stream(compute)  # only now has the gradient to be there
                    buffer.add_(new)
                else:  # in a step the first of all: AdamW, which had the buffers, is done then
                    self.fill.wait_stream(compute)
                    buffer.copy_(new)
                added = self.fill.record_event()
            with self.api.stream(self.empty):
                self.empty.wait_event(added)
                part.copy_(buffer, non_blocking=True)
                self.emptied[b] = self.home[i] = self.empty.record_event()
        self.summed.add(i)
        self.leaving.append((grad, added))
        while sum(g.nbytes for g, _ in self.leaving) > IN_FLIGHT:
            compute.wait_event(self.leaving[0][1])  # then its memory may be used again
            self.leaving.popleft()

    def settled(self) -> list[Tensor]:
        """Return the sums once all copies to the host are done: CPU tensors, each its own .grad."""
        compute = self.api.current_stream()
        for stream in (self.fill, self.empty):
            compute.wait_stream(stream)
        self.leaving.clear()
        self.api.synchronize()  # what follows is the CPU's
        for i, total in enumerate(self.sums):
            if i not in self.summed:  # no stream of this step had a gradient for it
                total.zero_()
            total.grad = total.detach()
        self.summed = set(range(len(self.sums)))
        return self.sums

    def pieces(self) -> list[Tensor]:
        """Return the settled sums in AdamW's pieces."""
        return [part for total in self.settled() for part in total.view(-1).split(self.chunk)]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.api.synchronize()  # nothing is on its way
        self.leaving.clear()
        self.flat, self.buffers = None, []
        self.sums.clear()  # in place: the caller that clipped them may still hold this list


# ------------------------------------------------------------------------------------- activations


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
        """Return saved-tensor hooks that move block i's input x away and let all else pass."""
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


# True while a block runs a second time, only for what it saves. For all threads: backward runs in
# another one.
RECOMPUTING = False


def tiled_swiglu(
    x: Tensor,
    gate_proj: nn.Linear,
    up_proj: nn.Linear,
    down_proj: nn.Linear,
    *,
    rows: int,
    save: bool,
) -> Tensor:
    """Compute model.swiglu in tiles of `rows` tokens. save: keep gate and up for backward.

    apply_policy puts it into a model's MLPs; they must have no biases.
    """
    weights = gate_proj.weight, up_proj.weight, down_proj.weight
    return _Tiles.apply(x, *weights, rows, save, RECOMPUTING)


class _Tiles(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) in tiles of tokens, keeping x alone, or x, gate and up.

    forward     a = silu(x Wg') * (x Wu'),  y = a Wd'
    backward    da = dy Wd;  dup = da * silu(gate);  dgate = silu'(gate) (da * up)
                dx = dgate Wg + dup Wu;  dWd = dy' a;  dWg = dgate' x;  dWu = dup' x
    Gradients of the weights are summed over tiles in fp32. Without `save`, backward makes gate and
    up again. A recomputed block makes those two products again anyway; here its second run leaves
    them to us (`recomputing`), so tiling costs no matmul, only the traffic of the fp32 sums.
    """

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, rows, save, recomputing):
        ctx.rows = rows
        if recomputing:
            ctx.save_for_backward(x, gate_weight, up_weight, down_weight)
            return x.detach()  # of the right shape; the checkpoint stops here and drops it
        flat = x.flatten(0, -2)  # (B T, D)
        out = torch.empty_like(flat)
        weights = gate_weight, up_weight
        saved = [flat.new_empty(len(flat), len(w)) for w in weights] if save else []
        for i in range(0, len(flat), rows):
            tile = slice(i, i + rows)
            if save:
                gate, up = (whole[tile] for whole in saved)
                torch.mm(flat[tile], gate_weight.T, out=gate)
                torch.mm(flat[tile], up_weight.T, out=up)
            else:
                gate, up = (F.linear(flat[tile], w) for w in weights)  # (rows, d_ff)
            torch.mm(F.silu(gate).mul_(up), down_weight.T, out=out[tile])
        ctx.save_for_backward(x, *weights, down_weight, *saved)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad_out):
        x, gate_weight, up_weight, down_weight, *saved = ctx.saved_tensors
        flat, grad_out = x.flatten(0, -2), grad_out.flatten(0, -2)
        grad_x = torch.empty_like(flat)
        sums = [None, None, None]  # gradients of gate, up and down
        for i in range(0, len(flat), ctx.rows):
            tile = slice(i, i + ctx.rows)
            if saved:
                gate, up = (whole[tile] for whole in saved)
            else:
                gate, up = (F.linear(flat[tile], w) for w in (gate_weight, up_weight))
            grad_gate, grad_up = _swiglu_backward(grad_out[tile], gate, up, down_weight, sums)
            _add_to_sum(sums, 0, grad_gate, flat[tile])
            _add_to_sum(sums, 1, grad_up, flat[tile])
            torch.mm(grad_gate, gate_weight, out=grad_x[tile])
            grad_x[tile].addmm_(grad_up, up_weight)
            del gate, up, grad_gate, grad_up  # or they would outlive the next tile's first half
        return grad_x.view_as(x), *sums, None, None, None


def _swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor, down_weight: Tensor, sums: list):
    """Return the gradients of gate and up, (rows, d_ff); add that of down to sums."""
    act = F.silu(gate)
    _add_to_sum(sums, 2, grad_out, act * up)
    grad_act = grad_out @ down_weight
    grad_up = act.mul_(grad_act)
    return torch.ops.aten.silu_backward(grad_act.mul_(up), gate), grad_up


def _add_to_sum(sums: list, i: int, a: Tensor, b: Tensor) -> None:
    """Add a.T @ b to sums[i] in fp32; the first tile's product becomes the sum."""
    if sums[i] is None:
        sums[i] = fp32_product(a.T, b)
    else:
        add_product(sums[i], a.T, b)


@contextmanager
def _recomputing(inner):
    global RECOMPUTING
    RECOMPUTING = True
    try:
        with inner:
            yield
    finally:  # the checkpoint leaves by an exception as soon as it has what it needs
        RECOMPUTING = False


def _save_attention():
    ops = list(ATTENTION_OPS)
    if "torch.nn.attention.varlen" in sys.modules:  # imported by the first --document_mask
        ops.append(torch.ops.torch_attn._varlen_attn.default)
    return create_selective_checkpoint_contexts(ops)


def _contexts(save_attention: bool):
    """Return the contexts in which a checkpointed block first runs and is recomputed."""
    first, second = _save_attention() if save_attention else (nullcontext(), nullcontext())
    return first, _recomputing(second)


def _eager(block: nn.Module, recompute: bool, save: bool, *inputs) -> Tensor:
    """Run a block; with `recompute` backward runs it again, with `save` all but its attention."""
    if not recompute:
        return block(*inputs)
    contexts = partial(_contexts, save)
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def _graph(block: nn.Module, recompute: bool, save: bool, *inputs) -> Tensor:
    """The same for torch.compile, with the checkpoint inside the graph: recomputation that nobody
    reads, down_proj's, is dropped there without our help."""
    if not recompute:
        return block(*inputs)
    if save:
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_save_attention)
    return checkpoint(block, *inputs, use_reentrant=False)


@cache
def _compiled():
    return torch.compile(_graph, dynamic=False, fullgraph=True)


def apply_policy(model: Llama, policy: Policy, offload: Offload | None = None) -> None:
    """Make the model's blocks run by `policy` from the next forward pass on.

    Backward recomputes all blocks but the last policy.keep_all, which `run_block` leaves alone.
    offload: where inputs wait, with policy.offload; one for all policies of a model.
    """
    first_kept = len(model.layers) - policy.keep_all
    first_saved = first_kept - policy.attention
    assert 0 <= first_saved and bool(offload) >= policy.offload, (policy, len(model.layers))
    for i, block in enumerate(model.layers):
        if not model.config.mlp_bias:
            save = i >= first_kept
            block.mlp.swiglu = partial(tiled_swiglu, rows=policy.mlp_rows, save=save)
    run = _compiled() if policy.compile else _eager

    def run_block(i: int, block: nn.Module, x: Tensor, rotary, cached, documents) -> Tensor:
        if cached is not None or not torch.is_grad_enabled():
            return block(x, rotary, cached, documents)
        recompute = i < first_kept
        away = policy.offload and recompute
        with offload.hooks(i, x) if away else nullcontext():
            return run(block, recompute, i >= first_saved, x, rotary, None, documents)

    model.run_block = run_block


# --------------------------------------------------------------------------------------- teacher


class Visitor:
    """A frozen model whose weights live in one flat locked host buffer and visit the GPU.

    They do not change there, so none go back: leaving frees the copies. Llama-3-8B without its LM
    head, which only KL runs: 15.0 GB, 0.3 s at an assumed 50 GB/s.
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


# -------------------------------------------------------------------------- carrying out a plan


class OneGPU:
    """Carries out a plan: the optimizer, the teacher's visits, the host memory of block inputs."""

    def __init__(self, plan: Plan, student: Llama, teacher: Llama, **adamw):
        """adamw: lr, betas, eps, weight_decay. Student and teacher are on the GPU, in bf16.

        Raises HostMemoryRefused, with both models as they were.
        """
        self.plan, self.student = plan, student
        self.teacher = self.offload = self.optimizer = self.name = None
        self.device = device = student.embed_tokens.weight.device
        need, free = sum(plan.host.values()), available_memory()
        if free is not None and need > free and not plan.host_given:
            # The system would end this process as the pages are touched.
            raise HostMemoryRefused(
                f"{need / GIB:.1f} GiB of host memory were planned for, {free / GIB:.1f} are left; "
                "end what else uses it here, or plan for less with --host_gib"
            )
        try:
            if not plan.teacher_resident:
                self.teacher = Visitor(teacher, device)
            empty_cache(device)  # gradients and state live for the run: allocate them first
            if plan.slot_bytes:
                self.offload = Offload(student.config.n_layers, plan.slot_bytes, device)
            where = dict(host=plan.host_state, host_gradients=plan.host_gradients)
            where |= dict(moments_dtype=plan.moments)
            self.optimizer = AdamW(student.parameters(), **adamw, **where)
        except HostMemoryRefused:
            self.finish()
            raise

    def ready(self, name: str) -> None:
        """Set up for the passes of unit `name`: the student's policy, the teacher here or not."""
        policy = self.plan.policies[name]
        apply_policy(self.student, policy, self.offload)
        self.student.loss_rows = policy.loss_rows
        units = self.plan.units
        if self.teacher and not units[name].teacher:
            self.teacher.leave()
        if name != self.name:
            empty_cache(self.device)
        if self.teacher and units[name].teacher:
            self.teacher.come(lm_head=any(u.heads == 2 for u in units.values()))
        self.name = name

    def finish(self) -> None:
        """Free gradients, state and host memory, and put the whole teacher on the GPU to stay.

        Called after the last step: export and report need the memory of the GPU and of the host.
        """
        self.student.__dict__.pop("run_block", None)
        self.student.loss_rows = None
        if self.optimizer:
            self.optimizer.close()
        self.offload = None
        if self.teacher:
            self.teacher.come(lm_head=True)
            self.teacher = None
        free_host_buffers()
        empty_cache(self.device)
