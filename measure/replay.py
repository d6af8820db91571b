"""What torch's caching allocator makes of a planned run, without a GPU.

`record` runs a plan's code at full size on fake tensors and notes every allocation and every free;
`replay` feeds them to a model of the allocator and says how much memory it would reserve. Reserved
memory is more than allocated memory: a freed block is kept in the segment it was cut from, and what
lives for the run may have landed in the middle of it.

Rules of the model, as the allocator's own documentation and source state them: sizes in whole 512
bytes; up to 1 MiB from segments of 2 MiB, others from 20 MiB or, from 10 MiB on, their own size in
whole 2 MiB; the smallest free block that fits, cut where the rest is worth it; neighbours joined on
free; whole free segments given back when the GPU is full (an allocation retry) and by empty_cache.
Expandable: one segment a pool, as long as the GPU, of pages mapped at its end when needed and
unmapped wherever one is free: 2 MiB for small blocks, 20 MiB for others (so torch 2.11 to 2.13).
One stream; what kernels take for themselves is not seen, but for attention's fp32 gradient of q.
"""

import bisect
import functools
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longred
import model as llama
from machine import memory
from machine.plan import GIB, Plan, Unit

MIB = 2**20

# ----------------------------------------------------------------------------------- the allocator


class Block:
    __slots__ = ("segment", "start", "size", "free", "mapped", "before", "after")

    def __init__(self, segment, start: int, size: int, mapped: bool = True):
        self.segment, self.start, self.size = segment, start, size
        self.free, self.mapped, self.before, self.after = True, mapped, None, None

    def key(self):
        return self.size, self.segment[0], self.start

    def reach(self) -> int:
        """Its size with the unmapped room behind it, which it can grow into."""
        behind = self.after
        return self.size + (behind.size if behind and not behind.mapped else 0)


class Allocator:
    """A GPU of `room` bytes under torch's caching allocator. expandable: its segments expand."""

    def __init__(self, room: int, expandable: bool, large_page: int = 20 * MIB):
        self.room, self.expandable = room, expandable
        self.pages = 2 * MIB, large_page
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self.retries = self.n_segments = 0
        self.blocks = [], []  # free and mapped: of the small pool, of the large; (key, Block) each
        self.tails = [], []  # expandable: free and unmapped

    def malloc(self, nbytes: int) -> Block:
        """Raises MemoryError as torch raises OutOfMemoryError."""
        size = max(512, -(-nbytes // 512) * 512)
        pool = int(size > MIB)
        block = self._fitting(size, pool) or self._new(size, pool)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._new(size, pool)
        if block is None:
            stranded = self.reserved - self.allocated
            raise MemoryError(
                f"{size / MIB:.0f} MiB asked, {self.allocated / GIB:.2f} GiB allocated, "
                f"{stranded / GIB:.2f} reserved but not allocated, of {self.room / GIB:.2f}"
            )
        rest = block.size - size
        if rest > (MIB if pool and not self.expandable else 511):
            self._cut(block, size)
            self._insert(block.after)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        block.free = True
        self._insert(self._joined(block))

    def empty_cache(self) -> None:
        """Give back what holds nothing: whole segments, or whole pages of expandable ones."""
        for blocks in self.blocks:
            for _, block in [*blocks]:
                if self.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    self._remove(block)
                    self.reserved -= block.size

    def _fitting(self, size: int, pool: int) -> Block | None:
        """The smallest free block that fits; of expandable ones that which can grow least."""
        blocks = self.blocks[pool]
        i = bisect.bisect_left(blocks, ((size, -1, -1),))
        if i == len(blocks):
            return None
        while self.expandable and i + 1 < len(blocks):
            if blocks[i + 1][1].reach() >= blocks[i][1].reach():
                break
            i += 1
        return blocks.pop(i)[1]

    def _new(self, size: int, pool: int) -> Block | None:
        if self.expandable:
            return self._grown(size, pool)
        segment = 2 * MIB if not pool else 20 * MIB if size < 10 * MIB else _whole(size, 2 * MIB)
        if not self._reserve(segment):
            return None
        self.n_segments += 1
        return Block((self.n_segments, pool), 0, segment)

    def _grown(self, size: int, pool: int) -> Block | None:
        """Pages mapped at the first place where they, with the free block before them, suffice."""
        for tail in sorted(self.tails[pool], key=lambda t: (t.segment[0], t.start)):
            first = tail.before if tail.before and tail.before.free else tail
            if _free_from(first) >= size:
                break
        else:
            self.n_segments += 1
            first = Block((self.n_segments, pool), 0, _whole(self.room * 9 // 8, self.pages[pool]))
            first.mapped = False
            self.tails[pool].append(first)
        block = first
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block and block.size < size:
            block = self._map(block.after, min(block.after.size, size - block.size))
        if block:
            self._remove(block)
        return block

    def _map(self, tail: Block, size: int) -> Block | None:
        pool = tail.segment[1]
        size = min(tail.size, _whole(size, self.pages[pool]))
        if not self._reserve(size):
            return None
        self.tails[pool].remove(tail)
        if size < tail.size:
            self._cut(tail, size)
            self.tails[pool].append(tail.after)
        tail.mapped = True
        block = self._joined(tail)
        self._insert(block)
        return block

    def _unmap(self, block: Block) -> None:
        """The whole pages inside a free block."""
        page, pool = self.pages[block.segment[1]], block.segment[1]
        first, last = _whole(block.start, page), (block.start + block.size) // page * page
        if first >= last:
            return
        self._remove(block)
        if first > block.start:
            self._cut(block, first - block.start)
            self._insert(block)
            block = block.after
        if last < block.start + block.size:
            self._cut(block, last - block.start)
            self._insert(block.after)
        self.reserved -= block.size
        block.mapped = False
        neighbours = [b for b in (block.before, block.after) if b and not b.mapped]
        for other in neighbours:
            self.tails[pool].remove(other)
        self.tails[pool].append(self._joined(block, listed=False))

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self.room:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _cut(self, block: Block, size: int) -> None:
        rest = Block(block.segment, block.start + size, block.size - size, block.mapped)
        rest.before, rest.after = block, block.after
        if rest.after:
            rest.after.before = rest
        block.after, block.size = rest, size

    def _joined(self, block: Block, listed: bool = True) -> Block:
        """The block with its free neighbours of the same kind, taken off the list of free ones."""
        for other in (block.before, block.after):
            if other is None or not other.free or other.mapped != block.mapped:
                continue
            if listed:
                self._remove(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.size += second.size
            first.after = second.after
            if second.after:
                second.after.before = first
            block = first
        return block

    def _insert(self, block: Block) -> None:
        bisect.insort(self.blocks[block.segment[1]], (block.key(), block), key=lambda e: e[0])

    def _remove(self, block: Block) -> None:
        blocks = self.blocks[block.segment[1]]
        i = bisect.bisect_left(blocks, block.key(), key=lambda e: e[0])
        assert blocks[i][1] is block
        blocks.pop(i)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _free_from(block: Block | None) -> int:
    total = 0
    while block and block.free:
        total += block.size
        block = block.after
    return total


def order(plan: Plan, choose_layers: bool) -> list[str]:
    """The sections of `record` as a run meets them: two steps, two passes of each unit.

    A pass takes and gives back the same in every step.
    """
    chosen = choose_layers * ["choose layers"], choose_layers * ["choose layers, both loaded"]
    sections = [*chosen[0], "load", *chosen[1], "set up"]
    for step in range(2):
        for name in plan.units:
            sections += [f"ready for {name}, step {step}", *[f"{name}, a pass"] * 2]
        sections.append("update")
    return sections


def replay(record: dict[str, list], sections: list[str], allocator: Allocator) -> list[dict]:
    """Run sections of a record through an allocator, in any order; one row a section.

    Raises MemoryError, naming the section, where the GPU would be full.
    """
    living, rows = {}, []
    for name in sections:
        allocator.peak_allocated = allocator.allocated
        try:
            for key, nbytes in record[name]:
                if key is None:
                    allocator.empty_cache()
                elif nbytes:
                    living[key] = allocator.malloc(nbytes)
                elif key in living:
                    allocator.free(living.pop(key))
        except MemoryError as e:
            raise MemoryError(f"{name}: {e}") from None
        rows.append(
            {
                "section": name,
                "allocated": allocator.peak_allocated,
                "reserved": allocator.peak_reserved,
                "retries": allocator.retries,
            }
        )
    return rows


# ----------------------------------------------------------------------------------- the recording


class Recorder(TorchDispatchMode):
    """Notes (key, bytes) where a tensor's memory is taken, (key, 0) where it is given back.

    (None, 0): the cache was emptied.
    """

    def __init__(self, meta: bool):
        super().__init__()
        self.sections, self.log, self.living = {}, [], {}
        self.n, self.meta = 0, meta  # meta: whether tensors without memory count too

    def section(self, name: str) -> None:
        self.log = self.sections[name] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        backward = "attention" in function.name() and "backward" in function.name()
        if backward:  # an fp32 sum of q's gradient, the kernel's own
            self.log.append(("attention", 4 * args[1].numel()))
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (self.meta or t.device.type != "meta"):
                self._add(t.untyped_storage())
        if backward:
            self.log.append(("attention", 0))
        return out

    def _add(self, storage) -> None:
        address = storage._cdata
        if address in self.living or not storage.nbytes():
            return
        self.n += 1
        self.living[address] = self.n
        self.log.append((self.n, storage.nbytes()))
        weakref.finalize(storage, self._free, address)

    def _free(self, address) -> None:
        self.log.append((self.living.pop(address), 0))


class _Kernel(torch.autograd.Function):
    """Allocates what a GPU's one kernel would, where a CPU takes many operations."""

    @staticmethod
    def forward(ctx, saved, *inputs):
        ctx.save_for_backward(*saved)
        out = tuple(torch.empty(x.shape, dtype=x.dtype) for x in inputs)
        return out if len(out) > 1 else out[0]

    @staticmethod
    def backward(ctx, *grads):
        return None, *(torch.empty(g.shape, dtype=g.dtype) for g in grads)


class _Away(memory.Visitor):
    """A visiting teacher whose home is a name: fake tensors have one device."""

    def __init__(self, recorder: Recorder, model, device):
        self.named = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in self.named.items()}
        self.home = torch.empty(0, dtype=torch.bfloat16)
        self.here = set(self.named)
        self.leave()

    def come(self, lm_head: bool = False) -> None:
        for name, p in self.named.items():
            if name not in self.here and (lm_head or not name.startswith("lm_head.")):
                p.data = torch.empty(self.shapes[name], dtype=torch.bfloat16)
                self.here.add(name)

    def leave(self) -> None:
        for name in self.here:
            self.named[name].data = self.home
        self.here = set()


def _empty_llama(config):
    """bf16 weights, one allocation each, in the order in which a checkpoint is loaded."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = llama.Llama(config)
    torch.set_default_dtype(torch.float32)
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                empty = torch.empty(p.shape, dtype=torch.bfloat16)
                module._parameters[name] = torch.nn.Parameter(empty)
    return model


def _stand_ins(recorder: Recorder, reviewed: bool) -> list[tuple]:
    def host_buffer(nbytes, pin):
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            recorder.log.pop()  # it is not the GPU's
        kept_buffers.append(buffer)
        return buffer

    kept_buffers = []
    loss = llama.next_token_loss
    return [
        (llama, "apply_rope", lambda q, k, *_: _Kernel.apply((), q, k)),
        (F, "rms_norm", lambda x, *_: _Kernel.apply((x, x.new_empty(*x.shape[:-1], 2)), x)),
        (llama, "fp32_product", _fp32_product),
        (memory, "fp32_product", memory.fp32_product if reviewed else _fp32_product),
        (memory, "host_buffer", host_buffer),
        (memory, "empty_cache", lambda *_: recorder.log.append((None, 0))),
        (memory, "Visitor", functools.partial(_Away, recorder)),
        (longred, "next_token_loss", lambda *args: loss(*args, llama.LOSS_ROWS)),
    ]


def _fp32_product(a, b):
    return torch.empty(a.shape[0], b.shape[1])


def record(config, plan: Plan, original_len: int, reviewed: bool = False) -> dict[str, list]:
    """The sections of two steps of a planned run, one pass of each unit; see `order`.

    reviewed: as the review of commit a54fa9a recorded it, which is harsher than what runs: layers
    are chosen with teacher and student loaded, the models' shapes (on the meta device) count as
    memory while they are filled, and the MLP's fp32 products come out of bf16 ones.
    """
    recorder = Recorder(meta=reviewed)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        for stand_in in _stand_ins(recorder, reviewed):
            stack.enter_context(mock.patch.object(*stand_in))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        recorder.section("choose layers")
        if not reviewed:
            whole = _empty_llama(config)
            _choose_layers(whole, original_len)
            del whole
        recorder.section("load")
        memory.empty_cache("cpu")  # as run.Run.load does
        teacher = _empty_llama(config).requires_grad_(False)
        student = _empty_llama(config)
        recorder.section("choose layers, both loaded")
        if reviewed:
            _choose_layers(teacher, original_len)
        recorder.section("set up")
        adamw = 2e-5, (0.9, 0.95), 1e-8, 0.1
        machine = memory.OneGPU(plan, student, teacher, *adamw)
        for step in range(2):
            for unit in plan.units.values():
                recorder.section(f"ready for {unit.name}, step {step}")
                machine.ready(unit.name)
                if step == 0:
                    recorder.section(f"{unit.name}, a pass")
                    _one_pass(student, teacher, unit)
            if step == 0:
                recorder.section("update")
                torch.nn.utils.clip_grad_norm_(machine.optimizer.with_gradients(), 1.0)
                machine.optimizer.step()
                machine.optimizer.zero_grad()
        recorder.section("end")
    return recorder.sections


def _choose_layers(teacher, original_len: int) -> None:
    """longred.choose_layers with two of the blocks: the others take the same, one by one."""
    few = teacher.with_frequencies(teacher.inv_freq, teacher.attention_factor)
    few._modules = teacher._modules | {"layers": torch.nn.ModuleList(teacher.layers[:2])}
    few.config = replace(teacher.config, n_layers=2)
    other = few.with_frequencies(few.inv_freq, few.attention_factor)
    ids = torch.zeros(max(1, min(16, 32768 // original_len)), original_len, dtype=torch.int64)
    llama.attention_kl(few, other, ids)


def _one_pass(student, teacher, unit: Unit) -> None:
    ids = torch.zeros(unit.batch, unit.seq_len + 1, dtype=torch.int64)
    positions, n = torch.arange(unit.seq_len), student.config.n_layers
    if not unit.taps:
        loss = longred.long_text_loss(student, ids, positions)
    elif unit.taps > 1:
        layers = [*range(1, n, max(1, n // (unit.taps - 1)))][: unit.taps - 1] + [n]
        loss = longred.short_text_distillation(student, teacher, ids[:, :-1], layers, positions)
    else:
        spread = positions[None].expand(unit.batch, -1)
        loss = longred.short_to_long_distillation(student, teacher, ids[:, :-1], spread, positions)
    (loss * 0.01).backward()
