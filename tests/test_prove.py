"""measure.bench prove: it ends everywhere, and says of a target no more than was measured."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from machine.formats import load_config
from machine.hf_config import original_window
from measure import bench, prove
from tests.conftest import HERE


def test_every_stage_runs_to_its_end_on_a_cpu_and_every_target_is_not_run(
    ckpt, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prove, "TEXT", str(HERE / "machine" / "*.py"))
    for table in ("STAGES", "MORE"):  # a slow machine is no error here
        slow = {name: (run, 20 * limit) for name, (run, limit) in getattr(prove, table).items()}
        monkeypatch.setattr(prove, table, slow)
    seen, write = [], bench.write_result

    def spy(result, *args, **more):
        write(result, *args, **more)
        seen.append(list(json.loads((tmp_path / "prove-cpu-smoke.json").read_text())["stages"]))

    monkeypatch.setattr(bench, "write_result", spy)
    given = ["--device", "cpu", "--out_dir", str(tmp_path), "--more", "--ckpt", str(ckpt[0])]
    bench.main(["prove", *given])
    result = json.loads((tmp_path / "prove-cpu-smoke.json").read_text())
    names = [*prove.STAGES, *prove.MORE]
    assert seen == [names[:i] for i in range(1, len(names) + 1)] + [names]
    errors = {name: stage["error"] for name, stage in result["stages"].items() if "error" in stage}
    assert not errors and result["stages"]["tests"]["not run"].startswith("no GPU")
    stages = result["stages"]
    assert stages["machine"]["pcie_gb_s"]["both"] > 0 and stages["machine"]["lockable_gib"] > 0
    assert {row["T"] for row in stages["rotary"]["rows"]} == {8, 32}
    for name in ("8B", "128K", "256K"):
        assert stages[name]["step"]["whole"] and list(stages[name]["units"]) == UNITS
    run = stages["run"]
    assert run["passed"] and run["stopped"] == 143 and run["checkpoint"] == str(ckpt[0])
    assert run["reopened_parameters"] > 0 and "| run |" in run["evaluated"]
    assert stages["loss"]["ratios"]["counted_gib"] < 1.1
    assert any("seconds" in row for row in stages["kernels"]["rows"])
    assert stages["peers"]["transformers"]["seconds"] > 0
    assert {row["verdict"] for row in result["targets"]} == {"NOT RUN"}
    assert len(result["targets"]) == len(prove.TARGETS)
    said = capsys.readouterr().out
    assert said.count("NOT RUN (no GPU)") == len(prove.TARGETS) and "PROVEN" not in said


UNITS = ["long", "short", "s2l"]


def test_a_kill_leaves_what_was_measured_before_it(tmp_path, monkeypatch):
    def killed(device, seconds, args):
        os.kill(os.getpid(), signal.SIGKILL)

    stages = {"first": (lambda *_: {"found": 1}, 9), "second": (killed, 9), "third": (killed, 9)}
    monkeypatch.setattr(prove, "STAGES", stages)
    child = os.fork()
    if not child:
        try:
            bench.main(["prove", "--device", "cpu", "--out_dir", str(tmp_path)])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    result = json.loads((tmp_path / "prove-cpu-smoke.json").read_text())
    assert list(result["stages"]) == ["first"] and result["stages"]["first"]["found"] == 1
    assert len(result["targets"]) == len(prove.TARGETS)


def test_a_gpus_tests_run_on_it_in_a_process_of_their_own(monkeypatch):
    asked = []

    def run(command, **more):
        asked.append((command, more["cwd"], more["timeout"]))
        return subprocess.CompletedProcess(command, 1, stdout="2 failed", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    found = prove.tests_stage(torch.device("cuda"), 90, None)
    assert found == {"passed": False, "output": "2 failed"}
    (command, folder, timeout) = asked[0]
    assert (folder / command[-1]).is_file() and timeout == 90 and command[1:3] == ["-m", "pytest"]


def test_the_small_checkpoint_is_the_one_given_the_demos_or_one_made_here(tmp_path, monkeypatch):
    assert prove.small_checkpoint(tmp_path, "some/folder") == (Path("some/folder"), "some/folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prove, "DEMO_STEPS", 1)
    folder, which = prove.small_checkpoint(tmp_path, None)
    assert which == "the demo's original after 1 steps, trained here"
    assert original_window(load_config(folder)) == 256
    (tmp_path / prove.DEMO.parent).mkdir(parents=True)
    folder.rename(prove.DEMO)
    assert prove.small_checkpoint(tmp_path, None)[0] == prove.DEMO


UNIT = {"reserved_gib": 75.0, "reserved_planned_gib": 75.5, "alloc_retries": 0}
LONG = {"tokens_per_s": 6900.0, "seconds": 4.7, "activations_gib": 12.0, "unit": {"seq_len": 32768}}
MEASURED = {
    "rotary": {
        "rows": [
            {"peer": peer, "direction": way, "T": 32768, "us": us, "percent_of_copy": 15600 / us}
            for peer, both in ((bench.OURS, (160.0, 164.0)), ("torch.compile", (158.0, 170.0)))
            for way, us in zip(("forward", "backward"), both, strict=True)
        ]
    },
    "8B": {"units": {"long": UNIT | LONG}, "step": {"seconds": 240.0, "whole": True}},
    "peers": {"transformers": {"seconds": 9.4, "activations_gib": 16.0}},
    "loss": {"ratios": {"seconds": 2.1, "peak_gib": 1.2}},
    "256K": {"units": {"long": {"out of memory": "CUDA out of memory"}}},
}


def test_a_verdict_is_proven_missed_or_not_run():
    found = {r["target"]: r for r in prove.verdicts(MEASURED, "NVIDIA H200", False)}
    verdict = {name: row["verdict"] for name, row in found.items()}
    assert verdict["rotary each way, 32K, 32/8 heads"] == "PROVEN"
    rotary = [row["value"] for name, row in found.items() if name.startswith("rotary")]
    assert rotary == pytest.approx([164, 15600 / 164, 160 / 158])  # the worse direction of each
    assert verdict["rotary against torch.compile"] == "MISSED"  # 160 against 158
    assert verdict["8B 32K long pass"] == "MISSED"
    assert verdict["128K long pass"] == "NOT RUN"  # its stage did not run
    step = found["8B 32K whole step"]
    assert step["verdict"] == "NOT RUN" and "extrapolated" in step["why"]  # met, yet not PROVEN
    assert verdict["8B 32K reserved memory"] == "NOT RUN"  # an H100's target
    assert verdict["transformers' long pass"] == "PROVEN"  # 2 x ours
    assert verdict["activations, long pass"] == "MISSED"  # 0.75 x theirs
    assert verdict["KL's time"] == "PROVEN" and verdict["KL's peak"] == "MISSED"
    longest = found["longest long pass of 8B"]
    assert (longest["value"], longest["verdict"]) == (32768, "MISSED")  # 256K did not fit
    h100 = {r["target"]: r["verdict"] for r in prove.verdicts(MEASURED, "NVIDIA H100 80GB", False)}
    assert h100["8B 32K reserved memory"] == "PROVEN" and h100["8B 32K long pass"] == "PROVEN"
    extrapolated = [t for t in prove.TARGETS if t.extrapolated]
    assert extrapolated and not any(found[t.what]["verdict"] == "PROVEN" for t in extrapolated)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room\nmore"), KeyError("x")])
def test_a_stage_that_fails_is_a_result(error):
    def stage(device, seconds, args):
        raise error

    row = prove.fenced(stage, 10, torch.device("cpu"))
    assert type(error).__name__ in row["error"] and "more" not in row["error"]


def test_a_stage_that_hangs_is_ended():
    def stage(device, seconds, args):
        while True:
            pass

    assert "TimeoutError" in prove.fenced(stage, 0.5, torch.device("cpu"))["error"]
