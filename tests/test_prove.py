"""measure.bench prove: it ends everywhere, and says of a target no more than was measured."""

import json

import pytest
import torch

from measure import bench, prove


def test_without_a_gpu_it_runs_to_its_end_and_every_target_is_not_run(tmp_path, capsys):
    bench.main(["prove", "--device", "cpu", "--out_dir", str(tmp_path), "--more"])
    result = json.loads((tmp_path / "prove-cpu-smoke.json").read_text())
    assert list(result["stages"]) == [*prove.STAGES, *prove.MORE]
    assert {row["verdict"] for row in result["targets"]} == {"NOT RUN"}
    assert len(result["targets"]) == len(prove.TARGETS)
    said = capsys.readouterr().out
    assert said.count("NOT RUN (no GPU)") == len(prove.TARGETS) and "PROVEN" not in said


UNIT = {"reserved_gib": 75.0, "reserved_planned_gib": 75.5, "alloc_retries": 0}
MEASURED = {
    "rotary": {
        "rows": [
            {"peer": peer, "direction": way, "T": 32768, "us": us, "percent_of_copy": 15600 / us}
            for peer, us in ((bench.OURS, 160.0), ("torch.compile", 158.0))
            for way in ("forward", "backward")
        ]
    },
    "8B": {
        "units": {"long": UNIT | {"tokens_per_s": 6900.0, "seconds": 4.7}},
        "step": {"seconds": 240.0},
    },
}


def test_a_verdict_is_proven_missed_or_not_run():
    found = {r["target"]: r for r in prove.verdicts(MEASURED, "NVIDIA H200", False)}
    verdict = {name: row["verdict"] for name, row in found.items()}
    assert verdict["rotary each way, 32K, 32/8 heads"] == "PROVEN"
    assert verdict["rotary against torch.compile"] == "MISSED"  # 160 against 158
    assert verdict["8B 32K long pass"] == "MISSED"
    assert verdict["128K long pass"] == "NOT RUN"  # its stage did not run
    step = found["8B 32K whole step"]
    assert step["verdict"] == "NOT RUN" and "extrapolated" in step["why"]  # met, yet not PROVEN
    assert verdict["8B 32K reserved memory"] == "NOT RUN"  # an H100's target
    h100 = {r["target"]: r["verdict"] for r in prove.verdicts(MEASURED, "NVIDIA H100 80GB", False)}
    assert h100["8B 32K reserved memory"] == "PROVEN" and h100["8B 32K long pass"] == "PROVEN"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room\nmore"), KeyError("x")])
def test_a_stage_that_fails_is_a_result(error):
    def stage(device, seconds):
        raise error

    row = prove.fenced(stage, 10, torch.device("cpu"))
    assert type(error).__name__ in row["error"] and "more" not in row["error"]


def test_a_stage_that_hangs_is_ended():
    def stage(device, seconds):
        while True:
            pass

    assert "TimeoutError" in prove.fenced(stage, 0.5, torch.device("cpu"))["error"]
