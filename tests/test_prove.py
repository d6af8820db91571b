"""measure.bench prove: it ends everywhere, and says of a target no more than was measured."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from machine import memory
from machine.formats import load_config
from machine.hf_config import original_window
from measure import bench, prove, timing
from tests.conftest import HERE

PASSES = ["long", "short", "s2l"]


CUDA, CPU = torch.device("cuda"), torch.device("cpu")  # before one is mapped to the other


def proved(tmp_path, part="first", stages=None, device=CUDA, ckpt=None):
    """What the command wrote, of some of a part's stages."""
    chosen = {name: prove.PARTS[part].stages[name] for name in stages or prove.PARTS[part].stages}
    slow = {name: (work, 20 * seconds) for name, (work, seconds) in chosen.items()}
    given = dict(part=part, seconds=None, ckpt=ckpt and str(ckpt), out_dir=str(tmp_path))
    with mock.patch.dict(prove.PARTS, {part: prove.Part(20_000, slow)}):
        prove.prove(SimpleNamespace(device=device, **given))
    smoke = "-cpu-smoke" * (device == CPU)
    return json.loads((tmp_path / f"prove{smoke}.json").read_text())


@pytest.fixture
def few_sources(monkeypatch):
    monkeypatch.setattr(prove, "TEXT", str(HERE / "machine" / "*.py"))


def test_every_stage_runs_to_its_end_on_a_cpu_and_every_target_is_not_run(
    ckpt, tmp_path, few_sources, capsys
):
    for part in prove.PARTS:  # each keeps what the others measured
        result = proved(tmp_path, part, device=CPU, ckpt=ckpt[0])
    stages = result["stages"]
    assert list(stages) == [name for part in prove.PARTS.values() for name in part.stages]
    assert not {name: stage["error"] for name, stage in stages.items() if "error" in stage}
    assert stages["tests"]["not run"].startswith("no GPU")
    assert stages["machine"]["pcie_gb_s"]["both"] > 0
    assert stages["machine"]["host"]["lockable_gib"] > 0
    assert {row["T"] for row in stages["rotary"]["rows"]} == {8, 32}
    for name in ("8B", "128K", "256K"):
        assert stages[name]["step"]["whole"] and list(stages[name]["units"]) == PASSES
    run = stages["run"]
    assert run["passed"] and run["stopped"] == 143 and run["checkpoint"] == str(ckpt[0])
    assert run["reopened_parameters"] > 0 and "| run |" in run["evaluated"]
    assert stages["loss"]["ratios"]["counted_gib"] < 1.1
    assert stages["attention"]["32 tokens, backward, what the model gets"]["seconds"] > 0
    assert "\n" not in stages["attention"]["32 tokens, forward, FA3"]["error"]
    assert stages["peers"]["transformers"]["seconds"] > 0
    assert {row["verdict"] for row in result["targets"]} == {"NOT RUN"}
    assert len(result["targets"]) == len(prove.TARGETS)
    said = capsys.readouterr().out
    assert said.count("NOT RUN (no GPU)") == 3 * len(prove.TARGETS) and "PROVEN" not in said


# --------------------------------------------------- faults, with the device mapped to the CPU


@pytest.fixture
def mapped(cuda_runtime, tmp_path, monkeypatch):
    """A GPU's way through prove at a toy's sizes, on the CPU; the list of all that was timed.

    Before anything is timed all that was timed before must be on disk.
    """
    generator, timed, measured = torch.Generator, timing.timed, []

    class Generator:
        def __new__(cls, device=None):
            return generator()

    def witness(run, rounds, device):
        if measured:
            on_disk = numbers(json.loads((tmp_path / "prove.json").read_text()))
            assert {seconds for seconds, _ in measured} <= on_disk
        measured.append(timed(run, rounds, device))
        return measured[-1]

    monkeypatch.setattr(timing, "timed", witness)
    monkeypatch.setattr(timing, "microseconds", timing.host_microseconds)
    monkeypatch.setattr(timing, "pcie_rates", lambda *_: {"up": 1.0})
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a third of a second each, after many tests
    monkeypatch.setattr(timing, "FULL", timing.TOY._replace(loss=(64, 512, 32)))
    return measured


def numbers(found) -> set[float]:
    """Every number in a result."""
    if isinstance(found, dict | list):
        inside = found.values() if isinstance(found, dict) else found
        return set().union(*map(numbers, inside)) if found else set()
    return {found} if isinstance(found, float) else set()


def refuse_lock(monkeypatch, cuda_runtime):
    cuda_runtime.refuse_after = 0


def out_of_memory_in_the_second_pass(monkeypatch, _):
    run, rooms, plan = timing.Trainer.unit, [], timing.planned

    def unit(self, unit):
        if unit.name == "short" and len(rooms) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        run(self, unit)

    def planned(step, device, **settings):
        rooms.append(settings["gpu_bytes"])
        assert rooms[-1] == int(0.92 ** (len(rooms) - 1) * 8 * 2**30)
        return plan(step, device, **settings)

    monkeypatch.setattr(timing.Trainer, "unit", unit)
    monkeypatch.setattr(timing, "planned", planned)


def a_pass_raises(monkeypatch, _):
    run = timing.Trainer.unit

    def unit(self, unit):
        if unit.name == "short":
            raise RuntimeError("a bug")
        run(self, unit)

    monkeypatch.setattr(timing.Trainer, "unit", unit)


def optimizer_raises(monkeypatch, _):
    monkeypatch.setattr(memory.AdamW, "step", mock.Mock(side_effect=RuntimeError("a bug")))


def peers_raise(monkeypatch, _):
    rope_peers = timing.rope_peers

    def peers(*given):
        return rope_peers(*given) | {"eager": mock.Mock(side_effect=RuntimeError("a bug"))}

    def peer_step(name, *given):
        if name == "transformers":
            raise RuntimeError("a bug")
        return {"seconds": 1.0}

    monkeypatch.setattr(timing, "rope_peers", peers)
    monkeypatch.setattr(timing, "peer_step", peer_step)


def profiler_raises(monkeypatch, _):
    monkeypatch.setattr(timing, "kernel_shares", mock.Mock(side_effect=RuntimeError("a bug")))


def all_measured(stages):
    assert stages["8B"]["step"]["whole"] and list(stages["8B"]["units"]) == PASSES
    rows = [row["T"] for row in stages["rotary"]["rows"] if "us" in row]
    assert len(rows) == 14  # of copy, ours, eager and torch.compile at two lengths
    assert {"copy", "gemm", "host", "memory_gib"} <= set(stages["machine"])
    assert stages["loss"]["ratios"]["seconds"] > 0


def lock_was_refused(stages):
    all_measured(stages)
    first, second = stages["8B"]["tries"]
    assert "refuses to lock" in first["refused"] and second["host_gib"] == 0
    assert "refuses to lock" in stages["machine"]["host"]["refused"]
    assert stages["machine"]["gemm"]["seconds"] > 0


def memory_ran_out(stages):
    all_measured(stages)
    first, second = stages["8B"]["tries"]
    assert first["out of memory"] and second["gpu_gib"] == pytest.approx(0.92 * 8)


def a_pass_raised(stages):
    units = stages["8B"]["units"]
    assert "a bug" in units["short"]["error"] and units["s2l"]["seconds"] > 0
    assert stages["8B"]["parts"]["update"]["seconds"] > 0 and not stages["8B"]["step"]["whole"]


def optimizer_raised(stages):
    assert list(stages["8B"]["units"]) == PASSES and not stages["8B"]["step"]["whole"]
    assert "a bug" in stages["8B"]["parts"]["update"]["error"]
    assert stages["8B"]["parts"]["between passes"]["seconds"] > 0


def peers_raised(stages):
    rows = {(r["peer"], r["direction"], r["T"]): r for r in stages["rotary"]["rows"]}
    assert "a bug" in rows["eager", "", 32]["error"]
    assert rows[timing.OURS, "backward", 8]["us"] > 0
    assert rows["torch.compile", "forward", 32]["us"] > 0
    if "peers" in stages:
        assert "a bug" in stages["peers"]["transformers"]["error"]
        assert stages["peers"]["liger"] == {"seconds": 1.0}


def profiler_raised(stages):
    all_measured(stages)
    assert "a bug" in stages["8B"]["units"]["long"]["gpu_time_percent"]["error"]


FAULTS = {  # what goes wrong, and what the result says then
    "nothing": (lambda *_: None, all_measured),
    "the lock is refused": (refuse_lock, lock_was_refused),
    "no memory in the second pass": (out_of_memory_in_the_second_pass, memory_ran_out),
    "a pass raises": (a_pass_raises, a_pass_raised),
    "the optimizer raises": (optimizer_raises, optimizer_raised),
    "a peer raises": (peers_raise, peers_raised),
    "the profiler raises": (profiler_raises, profiler_raised),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_row_that_was_measured_is_on_disk_whatever_fails(
    fault, mapped, cuda_runtime, tmp_path, monkeypatch
):
    inject, check = FAULTS[fault]
    inject(monkeypatch, cuda_runtime)
    stages = proved(tmp_path)["stages"]
    check(stages)
    assert list(stages) == ["8B", "rotary", "machine", "loss"]
    assert {seconds for seconds, _ in mapped} <= numbers(stages)
    if fault == "a peer raises":
        check(proved(tmp_path, "more", ["peers"])["stages"])


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_a_random_moment_loses_the_row_being_measured_and_no_more(
    seed, mapped, tmp_path, monkeypatch
):
    """At the beginning of a measurement or of a write, so that one row may have been under way."""
    moment, events = random.Random(seed).randrange(4, 28), []
    child = os.fork()
    if not child:
        gc.freeze()  # the parent's objects: some need its threads when they are destroyed

        def killing(function):
            def run(*args, **more):
                events.append(function)
                if len(events) == moment:
                    (tmp_path / "timed.json").write_text(json.dumps([s for s, _ in mapped]))
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **more)

            return run

        try:
            for name in ("timed", "write_result"):
                monkeypatch.setattr(timing, name, killing(getattr(timing, name)))
            proved(tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    result = json.loads((tmp_path / "prove.json").read_text())
    timed = json.loads((tmp_path / "timed.json").read_text())
    assert len(set(timed) - numbers(result)) <= 1 and set(timed[:-1]) <= numbers(result)
    assert len(result["targets"]) == len(prove.TARGETS)


def test_tests_that_do_not_end_leave_what_they_printed(tmp_path, monkeypatch):
    """The time is over once the second test has begun, however slow the machine is."""

    def over(command, timeout, **settings):
        with subprocess.Popen(command, **settings) as process:
            printed = b""
            while b"::test_b" not in printed and (more := os.read(process.stdout.fileno(), 4096)):
                printed += more
            process.kill()
        raise subprocess.TimeoutExpired(command, timeout, output=printed)

    tests = tmp_path / "test_hangs.py"
    tests.write_text("import signal\ndef test_a(): pass\ndef test_b(): signal.pause()\n")
    monkeypatch.setattr(prove, "GPU_TESTS", tests)
    stage = prove.Stage("tests", 600, 1e9, torch.device("cuda"), None, lambda stage: None)
    stage.begin = lambda: None
    with mock.patch.object(subprocess, "run", over):
        prove.tests_stage(stage)
    assert stage.rows["passed"] is False and "600 s" in stage.rows["error"]
    assert "test_hangs.py::test_a PASSED" in stage.rows["output"]
    tests.write_text("def test_a(): pass\n")
    prove.tests_stage(stage)
    assert stage.rows["passed"] is True and "1 passed" in stage.rows["output"]


def test_a_run_is_proved_where_transformers_is_missing(ckpt, whole, tmp_path, monkeypatch):
    def stopped_and_resumed(command, out, stage):
        shutil.copytree(whole, out)
        return {"passed": True}

    monkeypatch.setattr(prove, "stopped_and_resumed", stopped_and_resumed)
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = proved(tmp_path, "then", ["run"], device=CPU, ckpt=ckpt[0])["stages"]["run"]
    assert run["passed"] and "transformers" in run["reopened_parameters"]["error"]
    assert "| run |" in run["evaluated"] and "report" in run


def test_a_command_stops_in_time_with_every_row_on_disk(tmp_path, monkeypatch):
    """By the alarm, in the second stage; the third is not begun."""

    def one_row_then_none(stage):
        stage.measure("row", lambda: 1.5)
        os.kill(os.getpid(), signal.SIGALRM)
        stage.measure("lost", lambda: 2.5)

    def late(stage):
        stage.measure("row", lambda: 0.5)
        monkeypatch.setattr(prove.time, "monotonic", lambda: 1e9)

    stages = {"first": (one_row_then_none, 9), "second": (late, 9), "third": (late, 9)}
    monkeypatch.setitem(prove.PARTS, "first", prove.Part(100, stages))
    bench.main(["prove", "--device", "cpu", "--out_dir", str(tmp_path)])
    found = json.loads((tmp_path / "prove-cpu-smoke.json").read_text())["stages"]
    assert found["first"]["row"] == 1.5 and "lost" not in found["first"]
    assert found["first"]["error"].startswith("out of time")
    assert found["second"]["row"] == 0.5 and found["third"]["not run"] == "no time was left"


def test_the_first_command_fits_430_s_and_the_second_360_s():
    asked = {part: sum(s for _, s in prove.PARTS[part].stages.values()) for part in prove.PARTS}
    assert 2 * asked["first"] <= prove.PARTS["first"].seconds == 430
    assert asked["then"] + 60 <= prove.PARTS["then"].seconds == 360


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
            for peer, both in ((timing.OURS, (160.0, 164.0)), ("torch.compile", (158.0, 170.0)))
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
