"""measure/diagnosis.py: each measure by its definition, and the whole command on a toy."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from machine.formats import load_checkpoint, save_checkpoint
from machine.tokenizer import load_tokenizer
from measure import diagnosis
from measure.diagnosis import (
    DISTANCES,
    FACTORS,
    SCALINGS,
    copy_gains,
    copy_positions,
    main,
    pairs_told_apart,
    predictions,
    rank_correlation,
    scaled,
)
from tests.conftest import PERIOD, hf_model, rel, tiny_llama, tokens, write_byte_tokenizer

WINDOW = 512


@pytest.mark.parametrize("share", DISTANCES)
def test_position_ids_place_the_occurrences_at_the_distance(share):
    for window, length, passage in ((512, 64, 4), (8192, 1024, 64)):
        distance = round(share * 4 * window)
        first, _, positions = copy_positions(length, passage, distance)
        apart = positions[-passage:] - positions[first : first + passage]
        assert (apart == distance).all() and (positions.diff() >= 1).all()
        assert positions[0] == 0 and positions[-1] < 4 * window
    with pytest.raises(AssertionError, match="a distance of 37"):
        copy_positions(64, 4, 37)


def test_a_gain_is_the_difference_of_two_whole_passes():
    model, text, other = tiny_llama(), tokens(1, 32)[0], tokens(1, 6, seed=5)[0]
    found = copy_gains(model, text, other, [32, 90])
    for distance, gain in zip((32, 90), found, strict=True):
        first, _, positions = copy_positions(32, 6, distance)
        losses = []
        for put in (other, text[-6:]):
            ids = text.clone()
            ids[first : first + 6] = put
            logits = model.logits(model(ids[None, :-1], positions[:-1])[0])[0, -6:].double()
            losses.append(F.cross_entropy(logits, ids[-6:]).item())
        assert gain == pytest.approx(losses[0] - losses[1], abs=1e-5)
        assert abs(gain) > 1e-3
    assert copy_gains(model, text, text[-6:], [32, 90]) == pytest.approx([0, 0], abs=1e-6)


def test_a_model_that_copies_from_one_distance_gains_at_that_distance_alone(reader):
    texts = torch.randint(16, (20, 32), generator=torch.Generator().manual_seed(3))
    distances = [PERIOD, PERIOD + 2, 2 * PERIOD]
    others = texts.roll(1, 0)[:, -6:]
    gains = [copy_gains(reader[0], *x, distances) for x in zip(texts, others, strict=True)]
    at, near, far = np.mean(gains, axis=0)
    assert at > 1.5 and abs(near) < 0.5 and abs(far) < 0.5


def test_each_scaling_is_that_of_a_run(tmp_path):
    write_byte_tokenizer(tmp_path / "tk")
    base = tiny_llama(vocab_size=256, max_position_embeddings=WINDOW)
    folder = save_checkpoint(base, tmp_path / "base", tokenizer_from=tmp_path / "tk")
    theta = float(f"{500 ** (math.log(2048 / 2 / math.pi) / math.log(512 / 2 / math.pi)):.1e}")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
    wanted = {"ABF": dict(rope_theta=theta), "linear": {"rope_type": "linear", "factor": 4.0}}
    wanted |= {"NTK": {"rope_type": "ntk", "factor": 4.0}, "YaRN": yarn}
    ids = tokens(1, 65, 256)
    for name in SCALINGS:
        kind = wanted[name] if name == "ABF" else {"rope_scaling": wanted[name]}
        other, view = load_checkpoint(folder, **kind), scaled(base, name, 4)
        assert torch.equal(view.inv_freq, other.inv_freq)
        assert view.attention_factor == other.attention_factor
        hf = hf_model(save_checkpoint(other, tmp_path / name, tokenizer_from=tmp_path / "tk"))
        assert rel(view.logits(view(ids)[0]), hf(ids).logits) < 1e-4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of window 512 and a book: the command's arguments, less --out_dir."""
    root = tmp_path_factory.mktemp("diagnosis")
    write_byte_tokenizer(root / "tk")
    model = tiny_llama(vocab_size=256, max_position_embeddings=WINDOW)
    folder = save_checkpoint(model, root / "base", tokenizer_from=root / "tk")
    (root / "book.txt").write_text(" ".join(f"{i} and {i * i % 97}" for i in range(400)))
    return ["--base", str(folder), "--book", str(root / "book.txt")]


@pytest.fixture
def few(monkeypatch):
    """Fewer sequences, and docstrings that take no seconds to find."""
    for name, value in dict(SEQUENCES=3, PASSAGES=2).items():
        monkeypatch.setattr(diagnosis, name, value)
    monkeypatch.setattr(diagnosis, "docstrings", lambda: "Return the sum of a and b.\n\n" * 20)


def test_the_whole_command_on_a_tiny_model(small, few, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    argv = [*small, "--out_dir", str(tmp_path / "o")]
    main(argv)
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "o" / "diagnosis.json").read_text())
    names = [f"{scaling} x{factor}" for factor in FACTORS for scaling in SCALINGS]
    assert list(content["rows"]) == ["original", *names]
    assert all(f"| {name} | " in printed for name in content["rows"])
    assert (tmp_path / "o" / "diagnosis.png").stat().st_size > 10_000
    assert {len(x) for x in content["about"]["files"].values()} == {64}

    original, abf = content["rows"]["original"], content["rows"]["ABF x4"]
    for name, each in original["short"].items():
        zeros = ("kl", "drift", "drift_mean", "drift_by_layer", "attention_kl_by_layer")
        assert {x for key in zeros for x in each[key]} == {0.0}, name
        moved = abf["short"][name]
        assert min(min(moved[key]) for key in ("kl", "drift", "attention_kl_by_layer")) > 0
        assert len(moved["drift_by_layer"]) == 4 and moved["drift_by_layer"][0] == 0.0
        assert np.mean(moved["drift"]) == pytest.approx(moved["drift_by_layer"][-1], abs=1e-5)
    assert original["frequencies"] == 0.0 and content["rows"]["linear x4"][
        "frequencies"
    ] == pytest.approx(math.log(4), abs=1e-5)
    distances = ["64", "256", "512", "1024", "1536", "1792", "1984"]
    assert list(abf["copy"]) == list(original["copy"]) == distances
    assert {len(x) for x in abf["copy"].values()} == {2} and not content["rows"]["ABF x2"]["copy"]
    assert np.abs([*abf["copy"].values()]).min() > 1e-5  # the placebo is not the passage itself

    text = torch.tensor(load_tokenizer(small[1]).encode_batch([diagnosis.docstrings()])[0])
    starts = np.linspace(0, len(text) - 65, 3).astype(int)
    ids = torch.stack([text[i : i + 65] for i in starts])
    logits = hf_model(small[1])(ids[:, :-1]).logits.double()
    want = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    assert original["short"]["docstrings"]["loss"] == pytest.approx(want.tolist(), abs=1e-5)

    monkeypatch.setattr(diagnosis, "short_text_drift", None)  # all is kept: nothing is measured
    before = (tmp_path / "o" / "diagnosis.json").read_bytes()
    main(argv)
    assert (tmp_path / "o" / "diagnosis.json").read_bytes() == before


def test_a_stopped_command_continues_with_the_row_that_it_was_at(small, few, tmp_path, monkeypatch):
    done, measure = [], diagnosis.measure

    def stops(base, model, *inputs):
        if len(done) == 4:
            done.append(None)
            raise ValueError("stopped")
        done.append(model)
        return measure(base, model, *inputs)

    monkeypatch.setattr(diagnosis, "measure", stops)
    monkeypatch.setattr(diagnosis, "draw", lambda *_: None)
    with pytest.raises(SystemExit, match="stopped"):
        main([*small, "--out_dir", str(tmp_path)])
    table = (tmp_path / "diagnosis.md").read_text().splitlines()
    assert sum("NOT RUN" in line for line in table) == 9 + 5  # rows, and verdicts
    main([*small, "--out_dir", str(tmp_path)])
    assert len(done) == 5 + 9  # 13 rows, of which one was begun twice


def made_row(loss, drift, frequencies):
    each = dict(
        loss=[loss, loss + 0.1, loss + 0.2 + drift / 1e3], drift=[drift], drift_mean=[drift]
    )
    return {"short": {"a": each | {"kl": [-drift], "attention_kl_by_layer": [drift]}}} | {
        "frequencies": frequencies
    }


def test_a_predictor_is_judged_by_the_pairs_of_one_factor_that_are_told_apart():
    rows = {"original": made_row(2.0, 0.0, 0.0)}
    for f, factor in enumerate(FACTORS):
        for i, name in enumerate(SCALINGS):  # the last two of each factor are equal
            loss = 2.1 + min(i, 2) / 10 + f
            rows[f"{name} x{factor}"] = made_row(loss, i / 10 + f, float(i != 0))
    pairs = pairs_told_apart(rows)
    assert len(pairs) == 15 and ("NTK x4", "YaRN x4") not in pairs
    assert ("ABF x4", "linear x4") in pairs and ("linear x4", "ABF x4") not in pairs
    lines = {line.split(" | ")[0][2:]: line for line in predictions(rows)[2:]}
    assert "| 15 of 15 | yes |" in lines["drift, mean over blocks"]
    assert "| 0 of 15 | no | -1.00 (4 points) | -1.00 (12 points) |" in lines["output KL"]
    assert "| 9 of 15 | no |" in lines["change of the frequencies (no model)"]
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"max_position_embeddings": 64}, "its window is 64, need 128"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "b is already scaled by .*need"),
        ({"book": b"a b"}, "book has 3 tokens, need"),
        ({"book": b"caf\xe9"}, "book.txt is not UTF-8 text .*; convert it"),
    ],
)
def test_bad_input_ends_in_one_line(small, few, tmp_path, change, said):
    argv = [*small, "--out_dir", str(tmp_path / "o")]
    if "book" not in change:
        write_byte_tokenizer(tmp_path / "tk")
        model = tiny_llama(vocab_size=256, **change)
        argv[1] = str(save_checkpoint(model, tmp_path / "b", tokenizer_from=tmp_path / "tk"))
    else:
        (tmp_path / "book.txt").write_bytes(change["book"])
        argv[3] = str(tmp_path / "book.txt")
    with pytest.raises(SystemExit, match=said) as end:
        main(argv)
    assert "\n" not in str(end.value.code)
    argv[3] = str(tmp_path / "none.txt")
    with pytest.raises(SystemExit, match="No such file"):
        main(argv)
