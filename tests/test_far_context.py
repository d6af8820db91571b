"""measure/far_context.py: a model that reads far text differs from one that does not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from measure.far_context import (
    columns,
    content_and_length,
    far_losses,
    interval,
    other_documents,
    shuffled,
)
from model import Llama
from tests.conftest import PERIODIC as LENGTH
from tests.conftest import made_corpus, periodic, tiny_llama, tokens

WINDOW = 16  # a token comes back after PERIOD, beyond it


def test_the_measure_fires_for_a_model_that_reads_far_text(reader):
    model, loss = reader
    assert loss < 0.2  # it has learnt to
    true = periodic(64, 1)
    far = LENGTH - WINDOW
    others = {"other": periodic(64, 2)[:, :far], "shuffled": shuffled(true[:, :far], 0)}
    losses = far_losses(model, true, WINDOW, others)
    (content, low, _), (length, _, _) = (
        content_and_length(losses)["content"],
        content_and_length(losses)["length"],
    )
    assert low > 2.0 and content > 2.0  # ln 16 is 2.77: all of what was to be known
    assert abs(length) < content / 2
    assert np.mean(losses["shuffled"]) > np.mean(losses["true"]) + 2


def test_content_brings_nothing_to_a_model_that_does_not_read_it(reader):
    model = Llama(reader[0].config)  # the same toy, untrained
    model.init_weights(0.1, torch.Generator().manual_seed(0)).eval()
    others = {"other": periodic(64, 2)[:, : LENGTH - WINDOW]}
    content, low, high = content_and_length(far_losses(model, periodic(64, 1), WINDOW, others))[
        "content"
    ]
    assert low <= 0 <= high and abs(content) < 0.05


def test_losses_are_those_of_the_last_half_window_behind_each_far_part():
    model, ids = tiny_llama(), tokens(3, 42)  # 41 inputs: far 25, near 16, of them 8 scored
    other = tokens(3, 25, seed=5)
    losses = far_losses(model, ids, 16, {"other": other})
    assert list(losses) == ["true", "other", "cut"]
    texts = {"true": ids, "other": torch.cat([other, ids[:, 25:]], 1), "cut": ids[:, 25:]}
    for name, text in texts.items():
        logits = model.logits(model(text[:, :-1])[0])[:, -8:].double()
        want = F.cross_entropy(logits.transpose(1, 2), text[:, -8:], reduction="none").mean(1)
        assert losses[name] == pytest.approx(want.tolist(), rel=1e-4)
    row = columns(losses)
    difference = np.mean(losses["other"]) - np.mean(losses["true"])
    assert row["content adds"] == pytest.approx(difference)


def test_a_sequence_without_a_far_part_is_refused():
    with pytest.raises(ValueError, match="16 tokens have no part beyond 16"):
        far_losses(tiny_llama(), tokens(1, 17), 16, {})


def test_the_other_far_part_shares_no_document_and_keeps_its_source():
    corpus = made_corpus([4000] * 4, sources=[0, 0, 1, 1])  # every token is different
    ids = data.held_out(corpus, 20, 20)
    far = other_documents(corpus, 20, 20, 10, seed=3)
    assert far.shape == (len(ids), 10)
    for row, theirs in zip(ids, far, strict=True):
        mine, whole = ({int(t) // 4000 for t in part} for part in (row[10:], row))
        others = {int(t) // 4000 for t in theirs}
        assert not mine & others
        if len(whole) == 1:  # both documents of a source in one sequence: it has no third
            assert {d // 2 for d in mine} == {d // 2 for d in others}
    with pytest.raises(ValueError, match="of one document"):
        other_documents(made_corpus([4000]), 5, 20, 10, seed=3)


def test_the_interval_is_that_of_a_mean():
    d = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    mean, low, high = interval(d)
    half = 1.96 * d.std() / 20
    assert mean == pytest.approx(d.mean())
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)


def test_the_interval_of_few_sequences_holds_the_mean_in_95_of_100_cases():
    rng = np.random.default_rng(2)
    for n in (2, 5, 19):
        ends = np.array([interval(d)[1:] for d in rng.normal(0.0, 1.0, size=(2000, n))])
        held = ((ends[:, 0] <= 0) & (0 <= ends[:, 1])).mean()
        assert 0.93 < held < 0.97, (n, held)
    row = columns({"true": [2.0], "other": [2.1], "cut": [2.5]})
    assert row["content adds"] == pytest.approx(0.1) and "content, 95% from" not in row
