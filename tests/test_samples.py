"""machine/samples.py: short text of the checkpoint's own, made once before a run."""

import json

import pytest
import torch

from longred import main
from machine import samples
from machine.formats import load_checkpoint, load_config
from machine.run import train
from machine.settings import resolve
from tests.conftest import read_log, tiny_run, with_eos


def own_run(ckpt, out, spec="self:40", **changes):
    changes = dict(method="soft_replay", short_data=[spec], s2l_data=[spec], steps=2) | changes
    return tiny_run(ckpt, out, **changes)


@pytest.fixture
def ckpt(ckpt, tmp_path):
    """The tiny checkpoint with an end of text, which a sampled text starts from and ends with."""
    folder = with_eos(ckpt[0], tmp_path / "with_eos")
    return folder, *ckpt[1:]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(samples, "PART_TOKENS", 16 * 64)  # 16 texts of the window of 64


def test_a_run_on_its_own_samples_says_what_they_cost(ckpt, tmp_path, capsys, small_parts):
    train(own_run(ckpt, tmp_path / "run"))
    printed = capsys.readouterr().out
    plan = printed.index("40 texts of up to 64 tokens, at most 2,560 tokens, read")
    assert plan < printed.index("part 1/3") < printed.index("part 3/3") < printed.index("step 1/2")
    assert "tok/s  ETA" in printed[plan : printed.index("step 1/2")]
    record = json.loads((tmp_path / "run" / "longred.json").read_text())
    cost = record["own_samples"]["self:40"]
    lines = open(cost["file"]).read().splitlines()
    assert len(lines) == cost["texts"] == 40 and any(json.loads(x)["text"] for x in lines)
    assert record["config"]["short_data"] == ["self:40"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"self:40: 40 of the checkpoint's own texts, {cost['tokens']:,} tokens" in report


def test_texts_are_those_that_generate_draws_and_a_stopped_run_goes_on(
    ckpt, tmp_path, capsys, small_parts, monkeypatch
):
    made = []

    def stopped(*args, **more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return whole(*args, **more)

    whole = samples.sample_texts
    monkeypatch.setattr(samples, "sample_texts", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(own_run(ckpt, tmp_path / "stopped"))
    monkeypatch.setattr(samples, "sample_texts", whole)
    capsys.readouterr()
    train(own_run(ckpt, tmp_path / "again"))
    assert "1 of 3 parts to make" in capsys.readouterr().out
    fresh = own_run(ckpt, tmp_path / "fresh", cache_dir=str(tmp_path / "other"))
    train(fresh)
    logs = [[x["loss"] for x in read_log(tmp_path / name)] for name in ("again", "fresh")]
    assert logs[0] == logs[1]
    (part,) = (tmp_path / "other").glob("samples-*/part-00000.json")
    texts = json.loads(part.read_text())["texts"]
    model, tokenizer, length = made[0][0], made[0][1], made[0][3]
    seed = int(samples._digest([fresh.seed, part.name])[:12], 16)
    generator = torch.Generator().manual_seed(seed)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = load_checkpoint(ckpt[0]).generate(
        torch.full((16, 1), first), length - 1, 1.0, generator=generator
    )[:, 1:]
    want = [row.tolist() for row in ids]
    want = [row[: row.index(first)] if first in row else row for row in want]
    assert texts == [tokenizer.decode(row) for row in want] and len(model.layers) == 3


def test_other_seeds_make_other_texts_and_more_texts_keep_those_there_are(
    ckpt, tmp_path, capsys, small_parts
):
    train(own_run(ckpt, tmp_path / "one", eval_tokens=0))
    train(own_run(ckpt, tmp_path / "more", "self:60", eval_tokens=0))
    assert "1 of 4 parts to make" in capsys.readouterr().out
    train(own_run(ckpt, tmp_path / "other", seed=1, eval_tokens=0))
    assert "3 of 3 parts to make" in capsys.readouterr().out


def test_a_run_on_own_samples_resumes(ckpt, tmp_path, small_parts):
    train(own_run(ckpt, tmp_path / "run", steps=4, save_every=2))
    main(["--resume", str(tmp_path / "run")])
    assert len(read_log(tmp_path / "run")) == 4


@pytest.mark.parametrize("spec", ["self:", "self:0", "self:many", "self:-3"])
def test_a_wrong_number_of_texts_is_refused_in_one_line(ckpt, tmp_path, spec):
    with pytest.raises(ValueError, match=f"{spec}: need self or self:N"):
        resolve(own_run(ckpt, tmp_path / "run", spec), load_config(ckpt[0]), ckpt[0])


def test_the_number_of_texts_has_a_finite_default():
    assert samples.count("self") == samples.DEFAULT_TEXTS == 2000
    assert samples.count("self:7") == 7 and samples.count("selfish.txt") is None
