"""machine/settings.py: what cannot work is refused in one line, before anything is written."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import longred
from longred import main, plan_streams
from machine import log, plan
from machine.formats import load_checkpoint, load_config
from machine.run import train
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from machine.states import bytes_in
from model import ModelConfig
from tests.conftest import HERE, tiny_run


def test_lengths_that_a_gpus_attention_cannot_take_are_refused(ckpt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model = ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, rope_theta=5e5)
    asked = Config(ckpt="x", target_len=32768, short_len=1000, device="cuda")
    with pytest.raises(ValueError, match="--short_len 1000: .* multiple of 128, try 896"):
        resolve(asked, model, ckpt[0])


@pytest.mark.parametrize("keep, states", [(2, 3), (0, 0)])
def test_the_disk_must_hold_the_export_and_keep_and_one_more_states(
    ckpt, tmp_path, monkeypatch, keep, states
):
    model, there = load_config(ckpt[0]), tmp_path / "run" / "checkpoints" / "step-000001"
    c = resolve(tiny_run(ckpt, tmp_path / "run", keep=keep, device="cpu"), model, ckpt[0])
    weights = sum(p.numel() for p in load_checkpoint(ckpt[0]).parameters())
    need = int(weights * (4 + states * 12))  # fp32; a state: weights and two moments
    there.mkdir(parents=True)
    (there / "shard-00000.safetensors").write_bytes(bytes(10_000))  # goes as new ones come
    for free, enough in ((0.95 * need, False), (1.05 * need, True)):
        usage = shutil._ntuple_diskusage(0, 0, free - 10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        refused = contextlib.nullcontext() if enough else pytest.raises(ValueError, match="--keep")
        with refused:
            units = [plan.Unit.of(s, c) for s in plan_streams(c).values()]
            freed = bytes_in(there.parent)
            plan.preflight(c, model, units, processes=1, freed=freed)


def test_bf16_on_a_cpu_is_for_one_process_and_for_machine(ckpt, tmp_path):
    model = load_config(ckpt[0])
    c = resolve(tiny_run(ckpt, tmp_path / "run", dtype="bf16"), model, ckpt[0])
    with pytest.raises(ValueError, match="--dtype, .* are for one process: drop them"):
        plan.preflight(c, model, [], processes=2, freed=0)
    with pytest.raises(SystemExit, match="--dtype bf16; .* many flags need the folder machine/"):
        longred.parse_args(["--dtype", "bf16"])


# What is wrong: flags changed in a good command line (@: in the test's folder), what is said
BAD_INPUTS = {
    "unknown flag": ({"--target_length": 9}, "unrecognized arguments: --target_length"),
    "unknown ckpt": ({"--ckpt": "lama3"}, "no checkpoint 'lama3'.*llama3-8b"),
    "missing file": ({"--long_data": "nowhere.txt"}, "no file at nowhere.txt"),
    "truncated weights": ({"--ckpt": "@cut"}, "cut/model.safetensors is missing, truncated"),
    "tokenizer misfit": ({"--ckpt": "@misfit"}, "ids go up to 256, the model has 256"),
    "text too short": ({"--long_data": "@tiny.txt"}, "long: text too short"),
    "target not above": ({"--target_len": 64}, "64 is not above the original window of 64"),
    "train above target": ({"--train_len": 257}, "257 is above --target_len 256"),
    "replay of nothing": ({"--replay_steps": 2}, "need both or none"),
    "merge of all": ({"--merge": 1}, "from 0 to below 1"),
    "no such layer": ({"--distill_layers": 4}, "hidden states 1 to 3"),
    "loss not finite": ({"--lr": "1e30"}, "step 3: .*2 steps in a row not finite"),
    "out of range": ({"--steps": 0}, "--steps 0: need at least 1"),
    "no such device": ({"--device": "gpu"}, "--device gpu: need cpu or cuda"),
    "uphill": ({"--grad_clip": -1}, "--grad_clip -1.0: need at least 0"),
    "not a number": (
        {"--steps": "many"},
        "--steps: 'many': need a whole number such as 4096 or 4K",
    ),
    "resume and more": ({"--resume": "@void"}, "--resume takes its run's own"),
    "no such user": (
        {"--cache_dir": "~nobody_at_all/x"},
        "--cache_dir ~nobody_at_all/x: no such user",
    ),
    "no long text": ({"--length_upsample": 0}, "--length_upsample 0.0: need at least 0.001"),
    "theta of no model": ({"--rope_theta": 1e300}, "--rope_theta 1e.300: need .* at most 1e.15"),
    "absurd number": ({"--steps": 10**30}, "--steps 10{30}: need .* at most"),
    "no such GPU": ({"--device": "cuda"}, "torch sees no GPU, .* new enough driver"),
    "the checkpoint's folder": ({"--out_dir": "@cut"}, "is a checkpoint's own folder"),
    "no checkpoint": ({"--ckpt": None}, "--[a-z_0-9]+ needs --ckpt"),
    "disk too small": ({}, "needs 0.0 GB .*its disk has 0.0 GB free"),
    "memory too small": ({}, "memory: about 0.0 GB needed .*--recompute"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_in_one_line_with_nothing_half_written(ckpt, tmp_path, case, monkeypatch):
    folder, long, short = ckpt
    change, said = BAD_INPUTS[case]
    if case in ("truncated weights", "the checkpoint's folder"):
        cut = shutil.copytree(folder, tmp_path / "cut") / "model.safetensors"
        cut.write_bytes(cut.read_bytes()[:-100])
    if case == "tokenizer misfit":
        path = shutil.copytree(folder, tmp_path / "misfit") / "tokenizer.json"
        extra = {"id": 300, "content": "<x>", "special": False, "single_word": False}
        extra |= {"lstrip": False, "rstrip": False, "normalized": False}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens": [extra]}))
    if case == "disk too small":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    if case == "memory too small":
        monkeypatch.setattr(plan, "available_memory", lambda: 10**6)
    (tmp_path / "tiny.txt").write_text("too short")
    out = tmp_path / "out"
    flags = {"--ckpt": folder, "--target_len": 256, "--long_data": long, "--short_data": short}
    flags |= {"--out_dir": out, "--cache_dir": tmp_path / "tokens", "--steps": 3, "--long_micro": 1}
    flags |= {"--long_batch": 1, "--short_batch": 1, "--s2l_batch": 1, "--device": "cpu", **change}
    given = [str(x) for flag, value in flags.items() if value is not None for x in (flag, value)]
    with pytest.raises(SystemExit) as end:
        main([x.replace("@", f"{tmp_path}/") for x in given])
    message = str(end.value.code)
    assert re.search(said, message) and "\n" not in message and len(message) < 500, message
    assert not (out / "hf").exists() and not list(tmp_path.rglob("*.partial"))
    assert case == "loss not finite" or not out.exists()
    early = case not in ("text too short", "loss not finite")
    assert not early or not (tmp_path / "tokens").exists()  # before any text is read


def test_resume_where_no_run_is_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no longred.json there, so no run to resume"):
        main(["--resume", str(tmp_path)])


def test_missing_weights_end_with_the_ways_to_provide_them(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, HERE / "longred.py", "--ckpt", "llama3-8b", "--target_len", "32768"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "hf download meta-llama/Meta-Llama-3-8B" in done.stderr and "--ckpt /path" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("out"))


def test_numbers_may_be_written_in_k():
    kinds = {"4K": 4096, "128k": 131072, "1M": 2**20, "-3": -3, "512": 512, "1_000": 1000}
    assert {text: longred.whole_number(text) for text in kinds} == kinds
    for text in ("4Q", "K", "4.5K", "", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number such as 4096 or 4K"):
            longred.whole_number(text)
    flags = ["--ckpt", "x", "--target_len", "32K", "--distill_layers", "1", "2"]
    c = longred.parse_args(flags, Config)
    assert c.target_len == 32768 and c.distill_layers == [1, 2]


def test_the_flag_that_settles_a_doubtful_window_is_obeyed(ckpt, tmp_path):
    folder = shutil.copytree(ckpt[0], tmp_path / "linear")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}  # LongLoRA, Vicuna
    (folder / "config.json").write_text(json.dumps(config))
    model = load_config(folder)
    c = tiny_run(ckpt, tmp_path / "run", original_len=None, target_len=1024, rope_theta=None)
    with pytest.raises(ValueError, match="--original_len 64 or --original_len 256") as refused:
        resolve(c, model, folder)
    for named in re.findall(r"--original_len (\d+)", str(refused.value)):
        given = dataclasses.replace(c, original_len=int(named))
        assert resolve(given, model, folder).original_len == int(named)


def test_help_names_the_two_needed_flags_first_and_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    usage, needed, *_ = re.split(r"\n\n(?=needed)", text)
    assert len(re.findall("python longred.py", usage)) == 2 and "eq." not in text
    assert re.findall(r"^  --(\w+)", needed, re.M)[:2] == ["ckpt", "target_len"]
    names = {f.name for f in dataclasses.fields(Config)}
    assert longred.GROUPS.keys() <= names
    for f in dataclasses.fields(Config):
        said = re.search(rf"^  --{f.name}[ ,](.*?)(?=^  --|^\S|\Z)", text, re.M | re.S)[1]
        plain = f.name in ("ckpt", "target_len", "resume")
        assert plain or re.search(r"default:|none:", " ".join(said.split())), f.name


def test_help_and_a_users_error_wait_for_no_heavy_import():
    """What the seconds go to, whatever else the machine is doing."""
    code = "import sys, longred\nfor argument in sys.argv[1:]:\n    try: longred.main([argument])\n"
    code += "    except SystemExit: print(*(HEAVY & {*sys.modules}), file=sys.stderr)"
    heavy = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers"}
    heavy |= {"datasets", "matplotlib", "tokenizers", "sympy"}
    command = [sys.executable, "-c", f"HEAVY = {heavy}\n{code}", "--nonsense", "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "\n\n", done.stderr[-500:]


def test_a_long_step_says_so_and_a_cpu_gets_a_forecast(ckpt, tmp_path, capsys, monkeypatch):
    pulse, say = log.pulse, []
    monkeypatch.setattr(log, "pulse", lambda f: pulse(f, 0.01))
    train(tiny_run(ckpt, tmp_path / "run", steps=2, eval_tokens=0))
    text = capsys.readouterr().out
    assert text.index("forecast on this CPU: about") < text.index("step 1/2")
    assert re.search(r"a step, .* for 2 steps .*Shorter: fewer --steps", text)
    assert re.search(r"^  step 1: at its sequence \d+, 0 s so far$", text, re.M)
    with log.pulse(lambda: say.append(1)):
        pass
    assert len(say) <= 1  # it ends with its context
    main(["--resume", str(tmp_path / "run"), "--steps", "5"])
    assert "for 3 steps (within" in capsys.readouterr().out
    main(["--resume", str(tmp_path / "run")])
    assert "forecast" not in capsys.readouterr().out  # nothing is left to do


def test_a_cpu_refuses_what_it_would_ignore(ckpt, tmp_path):
    flags = dict(gpu_gib=1.0, host_gib=1.0, compile=True, moments="bf16")
    with pytest.raises(ValueError, match="--gpu_gib, --host_gib, --compile, --moments bf16: a CPU"):
        resolve(tiny_run(ckpt, tmp_path / "run", **flags), load_config(ckpt[0]), ckpt[0])
    with_bf16 = tiny_run(ckpt, tmp_path / "run", dtype="bf16", moments="bf16")
    assert resolve(with_bf16, load_config(ckpt[0]), ckpt[0]).moments == "bf16"
