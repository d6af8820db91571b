"""machine/run.py, keeper.py, states.py: a run that was stopped or killed goes on bit for bit."""

import ast
import contextlib
import dataclasses
import errno
import functools
import json
import math
import mmap
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import longred
from longred import cross_entropy, main, short_to_long_distillation
from machine import log, plan, states
from machine.corpus import tokenize
from machine.files import file_checksum, lock_folder, signed
from machine.formats import load_checkpoint, load_config, save_checkpoint
from machine.keeper import Keeper, StopSignal
from machine.log import Watch
from machine.many import Processes
from machine.memory import AdamW
from machine.run import train
from machine.settings import MAY_CHANGE, of_today, resolve
from machine.settings import MachineConfig as Config
from machine.tokenizer import load_tokenizer
from model import CONFIG_NAMES
from tests.conftest import (
    HERE,
    command_line,
    edit_record,
    killed_after_two,
    read_log,
    same_run,
    tiny_llama,
    tiny_run,
)

# ------------------------------------------------------------------------------------------- resume

SHARD = "shard-00000.safetensors"  # the file of a state that one process writes


def resume_flags(line):
    """Return the flags of the command that a line ends with, as a shell reads them."""
    python, script, *flags = shlex.split(line.rpartition("with: ")[2])
    assert python == "python" and Path(script).samefile(HERE / "longred.py")
    return flags


def test_the_command_to_resume_starts_the_processes_of_one_node(monkeypatch):
    keeper = types.SimpleNamespace(out_dir="my run", processes=types.SimpleNamespace(size=16))
    for here in ("8", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        words = shlex.split(Keeper.resume_command(keeper, "--keep", "1"))
        assert words[:3] == ["torchrun", "--nproc_per_node", here]
        assert words[4:] == ["--resume", "my run", "--keep", "1"]


def test_a_state_is_copied_on_the_gpu_that_it_is_on(monkeypatch):
    """A thread's own GPU is the first, whichever the run has."""
    seen = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "stream")
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda x: seen.append(x) or contextlib.nullcontext())
    keeper = types.SimpleNamespace(_write=lambda *state: seen.append("written"), failure=None)
    gpu = torch.device("cuda", 1)
    Keeper._write_in_thread(keeper, {"weight": types.SimpleNamespace(device=gpu)}, {})
    assert seen == [gpu, "stream", "written"] and keeper.failure is None


def test_a_stopped_run_resumes_bit_for_bit(ckpt, tmp_path, monkeypatch):
    """One of two stages; of one: test_a_stop_acts_within_one_pass."""
    recipe = dict(method="longrecipe", steps=2, replay_steps=2, replay_data=[str(ckpt[2])])
    train(tiny_run(ckpt, tmp_path / "whole", save_every=100, **recipe, replay_batch=2))
    print_step = log.print_step

    def stop_after_three(line, last, eta):
        print_step(line, last, eta)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers do

    monkeypatch.setattr(log, "print_step", stop_after_three)
    with pytest.raises(SystemExit) as stop:
        train(tiny_run(ckpt, tmp_path / "parts", save_every=2, **recipe, replay_batch=2))
    assert stop.value.code == 143
    monkeypatch.setattr(log, "print_step", print_step)
    main(["--resume", str(tmp_path / "parts")])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_resumes_bit_for_bit_with_every_step_logged_once(whole, at_two):
    with open(at_two / "log.jsonl", "a") as lines:
        lines.write('{"step": 5, "lo')  # torn
    (at_two / "checkpoints" / "step-000004.partial").mkdir()
    main(["--resume", str(at_two)])
    assert same_run(whole, at_two)
    assert not list(at_two.rglob("*.partial"))


@pytest.mark.parametrize("name", [SHARD, "manifest.json"])
@pytest.mark.parametrize("damage", ["first byte", "middle byte", "last byte", "cut", "gone"])
def test_a_damaged_state_is_skipped_and_the_one_before_it_taken(
    whole, tmp_path, capsys, name, damage
):
    out = shutil.copytree(whole, tmp_path / "run")
    path = out / "checkpoints" / "step-000004" / name
    raw = bytearray(path.read_bytes())
    if damage.endswith("byte"):
        raw[{"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}[damage.split()[0]]] ^= 1
    path.write_bytes(raw[:-7] if damage == "cut" else raw)
    if damage == "gone":
        path.unlink()
    assert states.newest_state(out).name == "step-000002"
    assert "step-000004 is damaged" in capsys.readouterr().err
    (out / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="none of the 1 saved states is sound and of this version"):
        states.newest_state(out)


def test_an_update_waits_for_the_state_being_saved(whole, ckpt, tmp_path, monkeypatch):
    write_shard = states.write_shard
    save, wait, step = Keeper.save, Keeper.wait, torch.optim.AdamW.step
    going_on, order = [], []  # of each save: whether training came to the next wait, or update

    def save_and_say(keeper):
        keeper.wait()
        going_on.append(threading.Event())
        save(keeper)

    def wait_and_say(keeper):
        if keeper.thread:
            going_on[-1].set()
        wait(keeper)

    def update_and_say(*args, **kwargs):
        order.append("update")
        if going_on:
            going_on[-1].set()
        return step(*args, **kwargs)

    def write_late(*args):
        order.append("write")
        assert going_on[-1].wait(60)
        found = write_shard(*args)
        order.append("written")
        return found

    for owner, name, call in (
        (Keeper, "save", save_and_say),
        (Keeper, "wait", wait_and_say),
        (torch.optim.AdamW, "step", update_and_say),
        (states, "write_shard", write_late),
    ):
        monkeypatch.setattr(owner, name, call)
    out = tmp_path / "run"
    train(tiny_run(ckpt, out, save_every=2))
    assert order == ["update"] * 2 + ["write", "written"] + ["update"] * 2 + ["write", "written"]
    shutil.rmtree(out / "checkpoints" / "step-000004")
    main(["--resume", str(out)])
    assert same_run(whole, out)


def test_an_error_inside_an_update_saves_nothing_of_it(whole, ckpt, tmp_path, monkeypatch):
    step, out = torch.optim.AdamW.step, tmp_path / "run"

    def fail_half_way(optimizer):
        if len(read_log(out)) == 2:
            optimizer.param_groups[0]["params"][0].data += 1.0
            raise RuntimeError("a kernel failed")
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail_half_way)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(tiny_run(ckpt, out, save_every=100))
    assert states.newest_state(out) is None
    monkeypatch.undo()
    main(["--resume", str(out)])
    assert same_run(whole, out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_ends_the_run_but_not_its_older_states(whole, at_two, monkeypatch, code):
    def fail(path, tensors):
        path.write_bytes(b"half of it")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(states, "write_shard", fail)
    remedy = "mend that" if code == errno.EIO else "make room"
    said = rf"after step 4 .*takes 0.\d+ GiB, .* GiB are free.*: {remedy} and continue"
    at_two = at_two.rename(at_two.with_name("my run"))
    with pytest.raises(SystemExit, match=said) as full:
        main(["--resume", str(at_two)])
    assert [p.name for p in (at_two / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    main(resume_flags(str(full.value)))
    assert same_run(whole, at_two)


def test_a_limit_on_the_size_of_a_file_is_called_so_and_nothing_is_lost(whole, at_two):
    size = (at_two / "checkpoints" / "step-000002" / SHARD).stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
    try:
        with pytest.raises(SystemExit, match=r"after step 4 .*: raise the limit .*ulimit -f"):
            main(["--resume", str(at_two)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in (at_two / "checkpoints").iterdir()] == ["step-000002"]
    main(["--resume", str(at_two)])
    assert same_run(whole, at_two)


def test_an_error_between_updates_saves_the_steps_done(whole, ckpt, tmp_path, monkeypatch):
    @functools.wraps(short_to_long_distillation)
    def fail(*args):
        if len(read_log(out)) == 3:
            raise RuntimeError("a kernel failed")
        return short_to_long_distillation(*args)

    out = tmp_path / "run"
    monkeypatch.setattr(longred, "short_to_long_distillation", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(tiny_run(ckpt, out, save_every=100))
    assert states.newest_state(out).name == "step-000003"
    monkeypatch.setattr(longred, "short_to_long_distillation", short_to_long_distillation)
    main(["--resume", str(out)])
    assert same_run(whole, out)


def changed_run(out, ckpt, part):
    def change(record):
        if part == "config":
            record["config"]["lr"] = 0.5  # only the saved state still knows better
        else:
            record[part][next(iter(record[part]))] = "0"

    edit_record(out, change)


@pytest.mark.parametrize("part", ["config", "data", "weights"])
def test_resume_refuses_another_run_and_names_the_difference(at_two, ckpt, part):
    changed_run(at_two, ckpt, part)
    with pytest.raises(SystemExit, match=f"{part} [a-z_.]+ was .*, is .*--resume_anyway"):
        main(["--resume", str(at_two)])
    main(["--resume", str(at_two), "--resume_anyway"])


# Entries of config.json, one each, that a ModelConfig or the export's dtype is made of.
OTHER_CONFIG = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHER_CONFIG |= {"num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 81}
OTHER_CONFIG |= {"vocab_size": 97, "rms_norm_eps": 2e-5, "rope_theta": 501.0}
OTHER_CONFIG |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "float16"}
OTHER_CONFIG |= {"max_position_embeddings": 65, "tie_word_embeddings": True}
OTHER_CONFIG |= {"attention_bias": True, "mlp_bias": True, "model_type": "qwen3"}


def test_any_other_byte_of_the_weights_and_entry_of_the_config_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("machine.formats.SHARD_SIZE", "30KB")
    folder = save_checkpoint(tiny_llama(), tmp_path / "model")
    first = states.weight_fingerprints(folder)

    def changed(path, raw) -> bool:
        before, now = path.read_bytes(), {}
        path.write_bytes(raw)
        now["weights"] = states.weight_fingerprints(folder)
        path.write_bytes(before)
        if now["weights"] == first:
            return False
        name = path.name if path.suffix == ".safetensors" else "config"
        with pytest.raises(ValueError, match=f"weights {name} was .*, is .*--resume_anyway"):
            states.check_same({"weights": first}, now, tmp_path, False)
        return True

    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:  # in the header, in each tensor, at both ends
        raw = path.read_bytes()
        for i in (*range(0, len(raw), 997), len(raw) - 1):
            assert changed(path, raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]), (path.name, i)
        assert changed(path, raw + b"\0") and changed(path, raw[:-1])
    config = json.loads((folder / "config.json").read_text())
    assert {*OTHER_CONFIG} >= {*CONFIG_NAMES.values()}
    for key, value in OTHER_CONFIG.items():
        other = json.dumps(config | {key: value}).encode()
        assert value != config.get(key) and changed(folder / "config.json", other), key
    same = json.dumps(dict(reversed(config.items())), indent=4).encode()
    assert not changed(folder / "config.json", same)  # written otherwise, it says the same


def test_a_run_resumed_with_other_code_warns_goes_on_and_records_it(at_two, whole, capsys):
    path = at_two / "longred.json"
    edit_record(at_two, lambda r: r["code"].update({"model.py": "0", "machine/many.py": "0"}))
    main(["--resume", str(at_two)])
    assert "the code changed in machine/many.py, model.py" in capsys.readouterr().out
    assert same_run(whole, at_two)
    for name in ("longred.json", "report.md"):
        assert "machine/many.py" in (at_two / name).read_text(), name
    now = json.loads(path.read_text())["code"]
    assert now == states.code_fingerprints()


def test_a_resumed_run_takes_flags_that_change_no_number(at_two):
    with pytest.raises(SystemExit, match="drop --lr, or add --resume_anyway"):
        main(["--resume", str(at_two), "--lr", "0.5", "--keep", "1"])
    main(["--resume", str(at_two), "--keep", "1"])
    assert len(list((at_two / "checkpoints").iterdir())) == 1


def test_a_flag_counts_on_resuming_though_its_value_is_the_default(at_two):
    for f in dataclasses.fields(Config):
        if f.default is not None and f.name not in MAY_CHANGE | {"resume_anyway"}:
            flag = [f"--{f.name}", str(f.default)]
            if isinstance(f.default, bool):
                flag = [f"--{'' if f.default else 'no-'}{f.name}"]
            with pytest.raises(SystemExit, match=f"drop --{f.name}, or add --resume_anyway"):
                main(["--resume", str(at_two), *flag])
    before = json.loads((at_two / "longred.json").read_text())["config"]
    default = Config.save_every
    assert before["save_every"] != default
    main(["--resume", str(at_two), "--save_every", str(default)])
    after = json.loads((at_two / "longred.json").read_text())["config"]
    assert after["save_every"] == default and after["steps"] == before["steps"]


def test_comments_do_not_change_a_codes_fingerprint(tmp_path, monkeypatch):
    fingerprints = states.code_fingerprints.__wrapped__  # conftest remembers those of our files
    before = fingerprints()
    (tmp_path / "machine").mkdir()
    for name in before:
        source = (HERE / name).read_text().replace("import math", "import math  # a comment")
        (tmp_path / name).write_text("# another\n" + source.replace('"""', '"""More. ', 1))
    monkeypatch.setattr(states, "__file__", str(tmp_path / "machine" / "states.py"))
    assert fingerprints() == before
    (tmp_path / "data.py").write_text((HERE / "data.py").read_text() + "\nx = 1\n")
    assert fingerprints()["data.py"] != before["data.py"]


def test_states_of_one_gpu_and_of_others_are_told_apart(whole):
    state = states.newest_state(whole)
    student = load_checkpoint(whole).bfloat16()
    optimizer = AdamW(student.parameters(), 0.1, (0.9, 0.95), 1e-8, 0.0, host=True)
    with pytest.raises(ValueError, match="step-000004: a state in bf16 .* do not convert"):
        states.read_state(state, student, optimizer)


def test_an_out_dir_that_is_not_ours_is_refused(ckpt, tmp_path, at_two):
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train(tiny_run(ckpt, at_two))
    (tmp_path / "other" / "hf").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another's hf"):
        train(tiny_run(ckpt, tmp_path / "other"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to --out_dir .*: check .*file, or"):
        train(tiny_run(ckpt, tmp_path / "file" / "run"))
    keeper = Keeper(Processes())
    keeper.claim(at_two, resumed=True)
    with pytest.raises(SystemExit, match="another process is at work in"):
        main(["--resume", str(at_two)])
    keeper.close(None)


# --------------------------------------------------------------------------------- steps gone wrong


def spoil(monkeypatch, out, bad_steps):
    """Make the long loss of these steps NaN, gradient and all."""

    @functools.wraps(cross_entropy)
    def loss(*args):
        step = len(read_log(out)) + 1
        return cross_entropy(*args) * (math.nan if step in bad_steps else 1.0)

    monkeypatch.setattr(longred, "cross_entropy", loss)


def test_a_step_that_is_not_finite_changes_nothing_and_is_flagged(ckpt, tmp_path, monkeypatch):
    out, saved = tmp_path / "run", {}
    spoil(monkeypatch, out, {3})

    def copy_state(keeper, step, *more):
        tensors, _ = states.run_state(keeper.model, keeper.optimizer)
        saved[step] = [t.clone() for t in tensors.values()]
        step_done(keeper, step, *more)

    step_done = Keeper.step_done
    monkeypatch.setattr(Keeper, "step_done", copy_state)
    train(tiny_run(ckpt, out, save_every=1, keep=9, eval_tokens=0))
    assert [line["flag"] for line in read_log(out)] == [None, None, "skipped", None]
    assert read_log(out)[2]["loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(saved[2], saved[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(saved[3], saved[4], strict=True))
    assert not (out / "checkpoints" / "step-000003").exists()


def test_bad_steps_in_a_row_end_the_run_with_the_last_good_state(ckpt, tmp_path, monkeypatch):
    out = tmp_path / "run"
    spoil(monkeypatch, out, {3, 4, 6, 7, 8})
    with pytest.raises(ValueError, match="step 8: .* 3 steps in a row not finite") as lost:
        train(tiny_run(ckpt, out, steps=20, save_every=1))
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000005"] and not (out / "hf").exists()
    assert "smaller --lr than 0.001, or continue after step 5 with: python" in str(lost.value)
    remedy = resume_flags(str(lost.value).replace("SMALLER", "1e-4"))
    monkeypatch.undo()
    main([*remedy, "--steps", "6"])
    assert [line["lr"] for line in read_log(out)[4:]] == [0.001, 1e-4]


def test_spikes_are_flagged_against_the_median_before_them():
    watch = Watch([], max_bad=3)
    steps = [dict(loss=1.0, grad_norm=1.0)] * 8 + [dict(loss=1.0, grad_norm=4.0)]
    steps += [dict(loss=9.0, grad_norm=1.0), dict(loss=2.0, grad_norm=2.0)]
    flags = [watch.flag(line) for line in steps]
    assert flags == [None] * 8 + ["spike", "spike", None] and watch.bad == 0


def test_skipped_steps_do_not_count_in_the_median_of_a_spike():
    watch = Watch([], max_bad=20)
    skipped = [dict(loss=math.nan, grad_norm=99.0)] * 9
    steps = [dict(loss=1.0, grad_norm=1.0)] * 7 + skipped + [dict(loss=1.0, grad_norm=1.0)]
    steps += [dict(loss=1.0, grad_norm=4.0)]
    flags = [watch.flag(line) for line in steps]
    assert flags == [None] * 7 + ["skipped"] * 9 + [None, "spike"]


# --------------------------------------------------------------------------------------- the report


def test_a_report_that_finds_no_short_text_says_so_and_ends_the_run_well(ckpt, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short to hold anything out")
    short = [str(tmp_path / "short.txt")]
    train(tiny_run(ckpt, tmp_path / "run", method="long_cpt", short_data=short, steps=1))
    assert "not measured: " in capsys.readouterr().out
    assert "| long_cpt |" in (tmp_path / "run" / "report.md").read_text()


def test_the_report_has_a_column_at_twice_the_window(ckpt, tmp_path):
    c = tiny_run(ckpt, tmp_path / "run", eval_tokens=1024)
    model = load_checkpoint(train(c))
    (long,) = c.long_data
    corpus = tokenize([long], load_tokenizer(c.ckpt), c.cache_dir, "long")
    ids = data.held_out(corpus, 2, 512)
    logits = model.logits(model(ids[:, :-1])[0]).double()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    rows = json.loads((tmp_path / "run" / "longred.json").read_text())["report"]["rows"]
    assert rows["longred"]["long loss at 512, beyond the window"] == pytest.approx(want, rel=1e-5)
    assert "| long loss at 512, beyond the window |" in (tmp_path / "run" / "report.md").read_text()


# ----------------------------------------------------------------- nobody listens, nothing is taken


UNREAD = """
import os, sys
import torch._dynamo, torch.distributed.tensor
import longred

out, *flags = sys.argv[1:]
for reader in ("gone", "full", "leaves"):
    ours, pipe = os.pipe()
    if reader == "gone":
        os.close(ours)
    child = os.fork()
    if not child:
        if reader == "leaves":
            os.close(ours)
        full = os.open("/dev/full", os.O_WRONLY)
        for number in 1, 2:
            os.dup2(full if reader == "full" else pipe, number)
        os.close(pipe)
        sys.argv = ["longred.py", *flags, "--out_dir", f"{out}-{reader}"]
        sys.exit(longred.main())
    os.close(pipe)
    if reader == "leaves":
        with open(ours, "rb", buffering=0) as f:
            assert f.readline()
    print(reader, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
BOTH = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_outlives_whoever_reads_what_it_prints(ckpt, whole, tmp_path):
    flags = command_line(tiny_run(ckpt, tmp_path / "run", save_every=2))
    command = [sys.executable, "-c", UNREAD, tmp_path / "run", *flags]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "gone 0\nfull 0\nleaves 0\n", done.stderr[-2000:]
    for reader in ("gone", "full", "leaves"):
        assert same_run(whole, tmp_path / f"run-{reader}"), reader


def test_a_hang_up_that_was_ignored_at_the_start_changes_nothing(ckpt, tmp_path, monkeypatch):
    print_step = log.print_step

    def hang_up(*args):
        print_step(*args)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(log, "print_step", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tiny_run(ckpt, tmp_path / "run", steps=2, eval_tokens=0))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "hf").exists()


def test_a_second_ctrl_c_gives_up_at_once_and_another_sigterm_changes_nothing():
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGTERM
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert stop.number == signal.SIGINT


SECOND_CTRL_C = """
import functools, json, os, pathlib, signal, sys, threading
from contextlib import ExitStack
import torch._dynamo, torch.distributed.tensor
import longred
from machine import log, states

states.code_fingerprints = functools.cache(states.code_fingerprints)
states.code_fingerprints()  # once for all children
PLACES = {"join": (threading.Thread, "join"), "set": (threading.Event, "set")}
PLACES |= {"flush": (os, "fsync"), "rename": (pathlib.Path, "rename")}
PLACES |= {"close": (ExitStack, "close"), "write": (states, "write_shard")}

def run(place):
    stopped, print_step, (owner, name) = [], log.print_step, PLACES[place]
    call = getattr(owner, name)

    def second(*args, **kwargs):
        if stopped:
            os.kill(os.getpid(), signal.SIGINT)
        return call(*args, **kwargs)

    def first(line, *args):
        print_step(line, *args)
        if line["step"] == 3:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))

    log.print_step = first
    setattr(owner, name, second)
    sys.argv = ["longred.py", "--resume", f"{sys.argv[1]}-{place}"]
    longred.main()

for place in PLACES:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(run(place))
    print(json.dumps({place: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
"""


def test_a_second_ctrl_c_in_any_clean_up_ends_by_its_code_without_a_traceback(whole, tmp_path):
    places = "join", "set", "flush", "rename", "close", "write"
    for place in places:
        killed_after_two(whole, tmp_path / f"run-{place}")
    done = subprocess.run([sys.executable, "-c", SECOND_CTRL_C, tmp_path / "run"], cwd=HERE, **BOTH)
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert codes == [{place: 130} for place in places], done.stdout[-2000:]
    assert "Traceback" not in done.stdout, done.stdout[-2000:]
    for place in places:
        main(["--resume", str(tmp_path / f"run-{place}")])
        assert same_run(whole, tmp_path / f"run-{place}"), place


def test_a_second_ctrl_c_in_a_join_reaches_whoever_called_main(at_two, monkeypatch):
    join, print_step, interrupted = threading.Thread.join, log.print_step, []

    def second(thread, *args):
        if thread.daemon:  # that which prints progress, not that which writes a state
            interrupted.append(thread)
            os.kill(os.getpid(), signal.SIGINT)
        join(thread, *args)

    def first(*args):
        print_step(*args)
        monkeypatch.setattr(threading.Thread, "join", second)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log, "print_step", first)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(at_two)])
    assert end.value.code == 130 and interrupted  # not later, in some finalizer
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_started_oddly_works_or_says_why(ckpt, whole, tmp_path, monkeypatch, capfd):
    flags = command_line(tiny_run(ckpt, tmp_path / "run", save_every=2))
    run = f"{sys.executable} -OO {HERE}/longred.py {' '.join(flags)} >&- 2>&-"
    assert subprocess.run(["bash", "-c", run]).returncode == 0
    assert same_run(whole, tmp_path / "run")
    for env, line in (
        (dict(LOCAL_RANK="1"), "already holds a run"),
        (dict(RANK="3", LOCAL_RANK="3"), "already holds a run"),
        (dict(WORLD_SIZE="4"), "RANK is missing: start with torchrun"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=line) as end:
            [patch.setenv(*item) for item in env.items()]
            main(flags)
        assert "\n" not in end.value.code and not capfd.readouterr().err


def test_a_lock_file_that_is_removed_lets_no_second_run_in(at_two):
    keeper = Keeper(Processes())
    keeper.claim(at_two, resumed=True)
    (at_two / "lock").unlink()
    with pytest.raises(SystemExit, match="another process is at work in"):
        main(["--resume", str(at_two)])
    keeper.close(None)
    lock_folder(at_two, "--out_dir").close()


@pytest.mark.parametrize("name", ["hf/notes", "report.md"])
def test_what_is_in_the_way_of_a_resumed_run_is_refused_before_its_next_step(at_two, name):
    mine, before = at_two / name, read_log(at_two)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine\n")
    with pytest.raises(ValueError, match=f"{name.split('/')[0]} is in the way, and no"):
        train(Config(resume=str(at_two)))
    assert mine.read_text() == "mine\n" and read_log(at_two) == before


@pytest.mark.parametrize(
    "number, at_pass",
    [
        (signal.SIGTERM, 1),  # of 4 in a step: 2 long, 1 short, 1 short-to-long
        (signal.SIGTERM, 6),
        (signal.SIGTERM, 16),  # the last of all
        (signal.SIGHUP, 7),
        (signal.SIGINT, 8),
    ],
)
def test_a_stop_acts_within_one_pass(ckpt, whole, tmp_path, monkeypatch, number, at_pass, capsys):
    out, passes, stopped = tmp_path / "my run", [], []

    def stop_in(loss):
        @functools.wraps(loss)
        def run_pass(*args):
            passes.append(loss.__name__)
            if len(passes) == at_pass:
                os.kill(os.getpid(), number)
                stopped.append(time.process_time())
            return loss(*args)

        return run_pass

    for name in ("cross_entropy", "short_text_distillation", "short_to_long_distillation"):
        monkeypatch.setattr(longred, name, stop_in(getattr(longred, name)))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            train(tiny_run(ckpt, out, save_every=100))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == 128 + number and len(passes) == at_pass and not (out / "hf").exists()
    assert resume_flags(capsys.readouterr().out.splitlines()[-1]) == ["--resume", str(out)]
    assert time.process_time() - stopped[0] < 5
    done = at_pass // 4  # a step whose last pass it was is whole
    newest = states.newest_state(out)
    assert (newest.name if newest else None) == (f"step-{done:06d}" if done else None)
    monkeypatch.undo()
    if number == signal.SIGTERM:
        main(["--resume", str(out)])
        assert same_run(whole, out)


def test_a_stop_that_saved_nothing_does_not_promise_to_go_on(ckpt, tmp_path, monkeypatch, capsys):
    print_step = log.print_step

    def stop(*args):
        print_step(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log, "print_step", stop)
    with pytest.raises(SystemExit) as end:
        train(tiny_run(ckpt, tmp_path / "run", keep=0))
    said = capsys.readouterr().out
    assert end.value.code == 143 and "Nothing was saved: --keep is 0." in said
    assert "--resume" not in said.splitlines()[-1]


def test_a_step_is_on_record_before_anything_is_printed(ckpt, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def look(line, last, eta):
        assert read_log(out)[-1]["step"] == line["step"]

    monkeypatch.setattr(log, "print_step", look)
    train(tiny_run(ckpt, out, steps=2, eval_tokens=0))


def test_strangers_files_stay_in_every_folder_of_a_run(at_two, whole):
    mine = [folder / "mine" for folder in (at_two, *at_two.rglob("*")) if folder.is_dir()]
    names = ("step-000002-best", "step-notes", "step-000004", "step-000004.partial", "others")
    mine += [at_two / "checkpoints" / name / "notes" for name in names]
    mine += [at_two / name / "notes" for name in ("hf", "hf.partial", "hf.previous")]
    (at_two / "hf").mkdir()
    (at_two / "hf" / "config.json").write_text("{}")  # of an earlier export
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    main(["--resume", str(at_two), "--keep", "1"])
    assert all(path.read_text() == "mine" for path in mine), [p for p in mine if not p.exists()]
    assert same_run(whole, at_two)
    shards = at_two.glob("checkpoints/*/shard-*")
    assert [p.parent.name for p in shards] == ["step-000004"]


def test_a_copy_of_a_state_under_another_number_stays_and_is_not_taken(at_two, whole, capsys):
    states_, copies = at_two / "checkpoints", []
    for name in ("step-000001", "step-000777"):
        copies.append(shutil.copytree(states_ / "step-000002", states_ / name))
    main(["--resume", str(at_two), "--keep", "1"])
    assert "step-000777 holds another step's state: left alone" in capsys.readouterr().err
    assert all((copy / SHARD).is_file() for copy in copies)
    assert same_run(whole, at_two) and not (states_ / "step-000002").exists()


def test_a_state_behind_a_link_is_taken_and_stays(at_two, whole, tmp_path):
    folder = at_two / "checkpoints" / "step-000002"
    folder.rename(tmp_path / "other disk")
    folder.symlink_to(tmp_path / "other disk")
    main(["--resume", str(at_two), "--keep", "1"])
    assert same_run(whole, at_two) and (tmp_path / "other disk" / SHARD).is_file()


def test_a_run_without_states_says_that_its_steps_are_done_once_more(at_two, whole, capsys):
    shutil.rmtree(at_two / "checkpoints")
    main(["--resume", str(at_two)])
    assert "no state is left: the 4 steps in" in capsys.readouterr().out
    assert same_run(whole, at_two)


def test_a_file_that_its_user_put_beside_an_export_stays_there(at_two, whole, tmp_path):
    main(["--resume", str(at_two)])
    for name in ("tokenizer.model", "special_tokens_map.json", "model-q8.safetensors"):
        (at_two / "hf" / name).write_text(f"mine: {name}")
    (at_two / "hf" / "model-00001-of-00002.safetensors").write_text("of an older export")
    main(["--resume", str(at_two)])
    mine = [p.name for p in (at_two / "hf").iterdir() if p.read_bytes().startswith(b"mine")]
    assert sorted(mine) == ["model-q8.safetensors", "special_tokens_map.json", "tokenizer.model"]
    assert not (at_two / "hf" / "model-00001-of-00002.safetensors").exists()


def test_a_state_of_another_version_is_refused_in_one_line_and_stays(at_two):
    folder = at_two / "checkpoints" / "step-000002"
    (folder / SHARD).rename(folder / "state.pt")
    with pytest.raises(SystemExit, match=r"none .* sound and of this version .*another's: resume"):
        main(["--resume", str(at_two)])
    assert (folder / "state.pt").is_file()


FORGED = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
    "other shapes": lambda path: save_file(
        {k: v.flatten()[:1] for k, v in load_file(path).items()}, path
    ),
    "other dtypes": lambda path: save_file(
        {k: v.double() for k, v in load_file(path).items()}, path
    ),
    "no tensors": lambda path: save_file({}, path),
}


class Code:
    def __reduce__(self):
        return os.putenv, ("EXECUTED", "1")


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_state_is_refused_in_one_line_and_nothing_in_it_runs(at_two, forgery, monkeypatch):
    folder = at_two / "checkpoints" / "step-000002"
    FORGED[forgery](folder / SHARD)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][SHARD] = [
        (folder / SHARD).stat().st_size,
        file_checksum(folder / SHARD),
    ]
    (folder / "manifest.json").write_text(json.dumps(signed(content)))
    monkeypatch.setattr(pickle, "Unpickler", None)
    with pytest.raises(SystemExit, match="step-000002 does not hold a state of this run") as end:
        main(["--resume", str(at_two)])
    assert "\n" not in end.value.code


def test_nothing_of_ours_unpickles_or_evaluates():
    for path in (HERE / "machine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and k.value.value for k in node.keywords)
            assert name != "torch.load" or safe, path
            assert not name.startswith(("pickle.", "marshal.", "eval", "exec", "shelve")), path
            assert not any(k.arg == "allow_pickle" for k in node.keywords), path


def test_a_torn_log_line_costs_itself_alone(tmp_path, capsys):
    good = [{"step": n, "loss": 1.0, "grad_norm": 2.0, "flag": None} for n in range(1, 7)]
    lines = [json.dumps(line).encode() for line in good]
    lines[1], lines[3] = lines[1][:20], b"\xff[" * 9
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n[[[")
    kept_ = states.trim_log(tmp_path / "log.jsonl", 5)
    assert [line["step"] for line in kept_] == [1, 3, 5] == [x["step"] for x in read_log(tmp_path)]
    assert "line 2, 4, 7 damaged" in capsys.readouterr().out
    lines[1], lines[3] = json.dumps(good[2]).encode(), json.dumps(good[3]).encode()
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert [line["step"] for line in states.trim_log(tmp_path / "log.jsonl", 6)] == [1, 3, 4, 5, 6]
    assert "lacks 1 of 6 steps, step 2 and on" in capsys.readouterr().out


def test_any_other_byte_of_longred_json_is_seen_or_says_the_same(at_two, whole):
    path = at_two / "longred.json"
    raw, record = path.read_bytes(), states.read_run(at_two)
    for i in range(0, len(raw), 3):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
        try:
            found = states.read_run(at_two)
        except ValueError as e:
            assert "damaged" in str(e) and "\n" not in str(e)
        else:  # a blank, or the name of the checksum itself
            assert all(found[key] == record[key] for key in record if key != "checksum"), i
    path.write_bytes(raw.replace(b'"seed": 2024', b'"seed": 2025'))
    with pytest.raises(SystemExit, match="has not its checksum; .*remove the line") as end:
        main(["--resume", str(at_two)])
    line = re.search('the line ("[a-z]+")', str(end.value.code))[1]
    lines = path.read_text().splitlines(True)
    path.write_text("".join(text for text in lines if line not in text))  # as it says
    with pytest.raises(SystemExit, match="config seed was 2024, is 2025"):
        main(["--resume", str(at_two)])
    path.write_bytes(b"\n".join(x for x in raw.splitlines() if b'"checksum"' not in x))
    main(["--resume", str(at_two)])  # as one of a version that wrote none
    assert same_run(whole, at_two)


def test_a_run_resumes_from_anywhere_and_after_a_move(ckpt, whole, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(ckpt[0], home / "tiny")
    for name, path in zip(("long.txt", "short.txt"), ckpt[1:], strict=True):
        shutil.copyfile(path, home / name)
    monkeypatch.chdir(home)
    names = Path("tiny"), Path("long.txt"), Path("short.txt")
    train(tiny_run(names, Path("run"), save_every=2, cache_dir="cache"))
    shutil.rmtree("run/hf"), shutil.rmtree("run/checkpoints/step-000004")
    monkeypatch.chdir("/")
    shutil.copytree(home, tmp_path / "copied")
    main(["--resume", str(home / "run")])
    assert same_run(whole, home / "run")
    shutil.rmtree(home)
    moved = tmp_path / "copied"
    given = ["--resume", str(moved / "run"), "--cache_dir", str(moved / "cache")]
    for name, path in {"ckpt": "tiny", "long_data": "long.txt", "short_data": "short.txt"}.items():
        with pytest.raises(SystemExit, match=f"home/{path} is gone; .* anew .*: --{name} PATH"):
            main(given)
        given += [f"--{name}", str(moved / path)]
    main(given)
    assert same_run(whole, moved / "run")


def test_fewer_steps_than_were_done_are_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = (out / "report.md").read_text()
    with pytest.raises(SystemExit, match="--steps 3: 4 steps are done"):
        main(["--resume", str(out), "--steps", "3"])
    assert (out / "report.md").read_text() == before


def test_seconds_of_a_save_are_those_until_it_is_on_disk(ckpt, tmp_path, monkeypatch, capsys):
    @functools.wraps(cross_entropy)
    def slow(*args):
        time.sleep(0.6)
        return cross_entropy(*args)

    monkeypatch.setattr(longred, "cross_entropy", slow)
    train(tiny_run(ckpt, tmp_path / "run", steps=2, save_every=1, eval_tokens=0))
    seconds = re.findall(r"step 1 in ([\d.]+) s", capsys.readouterr().out)
    assert float(seconds[0]) < 0.5


def test_times_are_shown_as_clocks_show_them():
    shown = [log.clock(x) for x in (0, 59.6, 119.6, 3599.7, 3600, 36061)]
    assert shown == ["0:00", "1:00", "2:00", "1:00:00", "1:00:00", "10:01:01"]


def test_the_peak_is_that_of_the_phase():
    # A mapping of its own: an allocator may serve a tensor from freed memory that stays resident.
    with mmap.mmap(-1, 200 << 20) as held:
        held[:: mmap.PAGESIZE] = b"x" * (len(held) // mmap.PAGESIZE)
        before = plan.peak_gib("cpu")
    plan.forget_peak("cpu")
    assert plan.peak_gib("cpu") < before - 0.15


def test_gradients_are_not_clipped_at_0(ckpt, tmp_path):
    for name, clip in (("off", 0), ("wide", 1e9)):
        train(tiny_run(ckpt, tmp_path / name, steps=2, grad_clip=clip, eval_tokens=0))
    assert same_run(tmp_path / "off", tmp_path / "wide")


def test_a_record_with_removed_flags_at_their_defaults_goes_on_as_it_trained(ckpt, tmp_path):
    c = dataclasses.asdict(tiny_run(ckpt, tmp_path / "run", method="mix_cpt"))
    old = c | {"short_rope": "new", "export_longrope": False, "alpha_kl": 0.0}
    old |= {"alpha_short": 5.0, "alpha_s2l": 10.0, "position_scheme": "cream"}
    now = of_today(old)
    assert (now["alpha_short"], now["alpha_s2l"]) == (1.0, 1.0)  # the 5 and 10 did nothing
    assert now["alpha_kl"] is now["position_scheme"] is None and "short_rope" not in now
    assert resolve(Config(**now), load_config(ckpt[0]), ckpt[0]).alpha_short == 1.0
    weighted = c | {"alpha_short": 2.0, "alpha_s2l": 0.5}  # a record of today
    assert of_today(weighted)["alpha_short"] == 2.0
    assert of_today(old | {"short_rope": "original"})["short_rope"] == "original"
