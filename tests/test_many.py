"""machine/many.py: many processes train as one does."""

import datetime
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from longred import main
from machine import many
from machine.run import Run
from tests.conftest import (
    HERE,
    command_line,
    killed_after_two,
    printed,
    read_log,
    run_python,
    tiny_run,
)


def test_restarted_processes_do_not_read_what_dead_ones_left_in_the_store():
    # torchrun's store outlives a restart: in three starts on one, none finds an older one's names.
    store, seen = dist.HashStore(), []
    store.set_timeout(datetime.timedelta(seconds=5))
    store.set("here/1", "of a process killed before it was answered")
    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            named = list(pool.map(lambda rank: many.own_names(store, rank, 3), range(3)))
        assert not any(own.check(["address"]) for own in named)
        named[0].set("address", str(start))
        seen.append([own.get("address") for own in named])
    assert seen == [[str(start).encode()] * 3 for start in range(3)]


@pytest.mark.parametrize("error, left", [(None, [1]), (OSError("a disk is full"), [])])
def test_a_process_that_fails_alone_does_not_wait_for_the_others(monkeypatch, error, left):
    """NCCL's leave is a collective: the error would never be printed."""
    one, seen = Run(), []
    monkeypatch.setattr(one.processes, "leave", lambda: seen.append(1))
    with suppress(OSError), one:
        if error:
            raise error
    assert seen == left


def test_out_of_memory_of_many_processes_advises_what_they_take(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="CUDA out. Resume, .* with a smaller --unit_tokens"):
        with Run():
            raise torch.OutOfMemoryError("CUDA out.")


def test_a_gpu_named_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:0 under torchrun.*pass --device cuda"):
        many.Processes().join("cuda:0", 1)


def torchrun(n, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(n), HERE / "longred.py", *flags], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def together(n, flags):
    """What torchrun starts, in processes that have torch imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    code, env = "import longred; longred.main(sys.argv[1:])", env | {"WORLD_SIZE": str(n)}
    ranks = [run_python(code, *flags, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for ended in wait(list(waiting)):
            if waiting.pop(ended).exitcode:  # the others wait for it
                [rank.kill() for rank in ranks]
    texts = [printed(rank)[-2000:] for rank in ranks]
    assert not any(rank.exitcode for rank in ranks), texts


def test_processes_that_share_sequences_and_tokens_train_as_one_does(whole, ckpt, tmp_path):
    out = tmp_path / "run"
    together(4, command_line(tiny_run(ckpt, out, save_every=2, context=2)))  # two share a sequence
    compare = [out]
    for n, context in ((1, 1), (2, 1)):  # resumed on others than those that saved
        compare.append(killed_after_two(out, tmp_path / f"on{n}"))
        resume = ["--resume", str(compare[-1]), "--context", str(context)]
        main(resume) if n == 1 else torchrun(n, resume)
    one = load_file(whole / "hf" / "model.safetensors")
    for folder in compare:
        for a, b in zip(read_log(whole), read_log(folder), strict=True):
            for key in ("step", "loss", "loss_long", "loss_short", "loss_s2l", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (folder.name, key)
        many = load_file(folder / "hf" / "model.safetensors")
        assert all((one[name] - many[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.parametrize("method", ["soft_replay", "longred"])
def test_processes_compute_the_kl_of_whole_heads(ckpt, tmp_path, method):
    c = tiny_run(ckpt, tmp_path / "1", steps=2, eval_tokens=0, method=method, alpha_kl=1.0, keep=0)
    c.distill_layers = [3] if method == "longred" else None
    logs = []
    for n in (1, 2):
        flags = command_line(replace(c, out_dir=str(tmp_path / str(n))))
        main(flags) if n == 1 else together(n, flags)
        logs.append(read_log(tmp_path / str(n)))
    kl = ("loss_kl",) if method == "longred" else ()  # soft_replay's short loss is the KL itself
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "loss_long", "loss_short", *kl, "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5) and a[key] > 0, key


@pytest.mark.parametrize("n, size", [(8, 4), (5, 4), (2, 4), (1, 1)])
def test_every_sequence_of_a_step_goes_to_one_process(n, size):
    everyone = [many.Processes() for _ in range(size)]
    for rank, process in enumerate(everyone):
        process.rank, process.size = rank, size
    shares = [list(process.share(n)[0]) for process in everyone]
    assert len({len(share) for share in shares}) == 1  # all take part in every pass
    assert sorted(j for share in shares for j in share if j < n) == list(range(n))
