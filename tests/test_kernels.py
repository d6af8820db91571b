"""measure.bench kernels: its rows, and that the lines it times are the lines they stand for."""

import json

import torch
import torch.nn.functional as F

from measure import bench, kernels
from model import _chunk_nll


def test_each_way_is_a_row_and_what_a_machine_cannot_do_says_why(tmp_path, capsys, monkeypatch):
    seen, write = [], bench.write_result

    def spy(result, *args, **more):
        write(result, *args, **more)
        seen.append(len(json.loads((tmp_path / "kernels-cpu-smoke.json").read_text())["rows"]))

    monkeypatch.setattr(bench, "write_result", spy)
    bench.main(["kernels", "--device", "cpu", "--rounds", "1", "--out_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "kernels-cpu-smoke.json").read_text())["rows"]
    assert seen == [*range(1, len(rows) + 1), len(rows)]  # written after each
    found = {(r["table"], r["way"]): r for r in rows if "backward" not in r["what"]}
    for key in (("attention", "chosen"), ("weight sums", "after it"), ("loss", "eager")):
        assert found[key]["seconds"] > 0 and found[key]["rate"] > 0
    for key in (("attention", "FA3"), ("attention", "CUDNN_ATTENTION")):
        assert found[key]["error"] and "\n" not in found[key]["error"]
    assert "no matmul that adds" in found["weight sums", "inside the matmul"]["error"]


def test_the_fastest_way_is_named_with_its_lead():
    def row(way, **more):
        return {"table": "attention", "what": "1024 tokens, forward", "way": way} | more

    said = kernels.winners([row("a", seconds=3.0), row("b", seconds=2.0), row("c", error="x")])
    assert said == ["attention, 1024 tokens, forward: b, 1.50 x as fast as the next"]
    assert kernels.winners([row("a", seconds=3.0), row("c", error="x")]) == []


def test_the_lines_timed_are_the_losss_and_the_mlps():
    logits, labels = torch.randn(5, 32), torch.tensor([3, 0, 31, 7, 7])
    nll, grad = kernels.loss_gradient(logits.clone(), labels)
    ours, its_grad = _chunk_nll(logits, torch.eye(32), labels, True)
    torch.testing.assert_close(nll, ours)
    torch.testing.assert_close(grad, its_grad.bfloat16())
    gate, up, grad_act = (torch.randn(5, 8, dtype=torch.float64) for _ in range(3))
    leaves = gate.requires_grad_(), up.requires_grad_()
    act = kernels.swiglu(*leaves)
    expected = torch.autograd.grad(act, leaves, grad_act)
    got = kernels.swiglu_backward(grad_act, gate, up)
    torch.testing.assert_close(got, (*expected, F.silu(gate) * up))
