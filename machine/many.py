"""Many processes on one run, started by torchrun: who works on what, and how they communicate.

The weights of student and teacher, gradients and AdamW's state are spread over all processes
(FSDP2). Processes take different sequences; with --context C, C of them share each sequence: every
one holds T / C tokens and, inside attention, all T tokens of N / C heads (Ulysses, arXiv
2309.14509). Exact, and on any device; torch's own context_parallel is a prototype, reorders tokens,
and has no CPU path to prove it by. Its limit: C divides the kv heads, 8 in Llama 3.

One process alone goes the same way: its share is everything, and a total is its own number.
"""

import os
import sys
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model import Llama


class Processes:
    """The processes of a run as one of them sees them; `rank` 0 prints and writes."""

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.size > 1 else 0
        self.mesh = self.groups = None  # all of them; (groups, processes that share sequences)

    def join(self, device: str | None, context: int) -> None:
        """Join the other processes, under torchrun. context: how many share each sequence."""
        if self.size == 1:
            if context > 1:
                raise ValueError(
                    f"--context {context} needs as many processes: start with torchrun"
                )
            return
        if ":" in (device or ""):
            raise ValueError(
                f"--device {device} under torchrun, where every process has a GPU of its own: pass "
                "--device cuda"
            )
        if self.size % context:
            raise ValueError(
                f"--context {context} does not divide torchrun's {self.size} processes"
            )
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(
                    f"WORLD_SIZE is {self.size} in the environment, and {name} is missing: start "
                    "with torchrun, or unset WORLD_SIZE for one process"
                )
        from torch.distributed.device_mesh import init_device_mesh  # here: --help need not wait

        cuda = torch.cuda.is_available() and device != "cpu"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Tokenising on one process may keep the others waiting; a dead one ends them by torchrun.
        store = own_names(next(dist.rendezvous("env://"))[0], self.rank, self.size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(hours=4),
            world_size=self.size,
            rank=self.rank,
            store=store,
        )
        kind = "cuda" if cuda else "cpu"
        self.mesh = init_device_mesh(kind, (self.size,))
        self.groups = init_device_mesh(kind, (self.size // context, context))
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # only rank 0 prints

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def from_rank_0(self, compute):
        """Return compute() of the first process in all of them; the others wait."""
        found, error = None, None
        try:
            found = compute() if self.rank == 0 else None
        except (ValueError, OSError) as e:
            error = e
        if self.size > 1 and dist.is_initialized():  # the others must not wait for what failed
            sent = [(found, str(error) if error else None)]
            dist.broadcast_object_list(sent, src=0)
            found, said = sent[0]
            error = error or (ValueError(said) if said else None)
        if error:
            raise error
        return found

    def everyone(self, value) -> list:
        """Return each process's value, in the order of ranks."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def total(self, values: list[float], op: str = "SUM") -> list[float]:
        """Sum each of the values over all processes, or reduce it by another op."""
        if self.size == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, getattr(dist.ReduceOp, op))
        return t.tolist()

    def share(self, n: int) -> tuple[range, int, int]:
        """Return which of n sequences this process works on, which part of each, of how many parts.

        Groups of `context` processes get equally many; the last may get numbers beyond n.
        """
        parts = self.groups.size(1) if self.groups else 1
        each = -(-n * parts // self.size)
        first = self.rank // parts * each
        return range(first, first + each), self.rank % parts, parts

    def shard(self, model: Llama) -> None:
        """Shard a model by FSDP2: every block's weights and the rest's, over all processes.

        Whole ones exist for a block at a time, in bf16 on a GPU; gradients are averaged in fp32.
        Inputs are not cast: rotary frequencies must stay float64.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        on_gpu = self.mesh.device_type == "cuda"
        bf16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if on_gpu else {}
        policy = MixedPrecisionPolicy(**bf16, cast_forward_inputs=False)
        for block in model.layers:
            if self.groups.size(1) > 1:
                attention, group = block.self_attn, self.groups.get_group(1)
                attention.attend = partial(attend_to_all_tokens, group, attention.attend)
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)

    def gather(self, student: Llama) -> Llama:
        """Return a sharded model whole, on the first process's CPU; elsewhere without memory."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        with torch.device("meta"):
            whole = Llama(student.config).eval()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(student, options=options)  # empty but for the first process
        if self.rank == 0:  # padded where the processes do not divide the rows: safetensors refuses
            state = {n: t.clone() if padded(t) else t for n, t in state.items()}
            whole.load_state_dict(state, assign=True)
        return whole


def padded(t: Tensor) -> bool:
    return t.untyped_storage().nbytes() > t.nbytes


def whole_number(x: Tensor) -> float:
    """Return a scalar's value, sharded or not."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).item()


def attend_to_all_tokens(group, attend, q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """Run attention by Ulysses: on all tokens, with a part of the heads in each process."""
    q, k, v = (exchange(group, t, 2, 1) for t in (q, k, v))  # (B, T, N, H): dim 1 tokens, 2 heads
    return exchange(group, attend(q, k, v, start), 1, 2)


def exchange(group, x: Tensor, spread: int, gathered: int) -> Tensor:
    """Exchange by all-to-all: dimension `spread` is split between processes, `gathered` is joined.

    Differentiable: the gradient takes the same way back.
    """
    from torch.distributed.nn.functional import all_to_all_single

    parts = torch.stack(x.chunk(group.size(), spread))
    received = all_to_all_single(torch.empty_like(parts), parts, group=group)
    return torch.cat(received.unbind(), gathered)


def is_silent() -> bool:
    """Return whether another process of this machine says what all of them have to say."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("LOCAL_RANK", "0") != "0"


def after_restart(config):
    """Make a config with an out_dir resume its run if torchrun repeats its command."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and config.out_dir and not config.resume:
        if (Path(config.out_dir) / "longred.json").exists():
            return replace(config, resume=config.out_dir)
    return config


def own_names(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return torchrun's store under a prefix that only the processes of this start share.

    It outlives torchrun's restarts, so a restarted process may find a dead one's address in it, and
    its count of restarts may differ from node to node. Hence each process says who it is this time,
    and the first one answers it with the prefix, until all have taken that up.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        prefix = store.get(f"prefix/{mine}").decode()  # waits for it
        store.set(f"{prefix}/{rank}", "taken up")
        return dist.PrefixStore(prefix, store)
    missing = set(range(1, size))
    while missing:
        missing = {r for r in missing if not store.check([f"{mine}/{r}"])}
        for r in missing:
            if store.check([f"here/{r}"]):  # perhaps the dead one's: then ask again
                store.set(f"prefix/{store.get(f'here/{r}').decode()}", mine)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)
