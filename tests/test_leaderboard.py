"""measure/leaderboard.py: the declared statistics, by hand, and what a missing run prints."""

import argparse
import json
import subprocess

import numpy as np
import pytest

import longred
from longred import plan_streams
from machine.formats import load_config
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from measure import leaderboard as board
from measure.leaderboard import (
    CELLS,
    draw,
    holm,
    leaderboard,
    paired_t,
    read_earlier,
    sequences,
    train,
    unread,
    verdicts,
)


def test_three_pairs_give_the_t_interval_and_p_of_a_table():
    mean, low, high, p = paired_t([1.0, 2.0, 3.0])  # t = 2 / (1 / sqrt 3) = 3.4641, 2 degrees
    assert mean == 2 and (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert paired_t([1.0, -1.0, 0.0])[3] == 1.0


def test_holm_multiplies_by_the_hypotheses_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 1.0]) == [1.0, 1.0]


def made(stories, books, seed):
    """A run whose sequences have these mean losses, with a little noise of its own."""
    noise = np.random.default_rng(seed).normal(0, 1e-3, size=(2, 40))
    losses = {"stories": list(stories + noise[0]), "books": list(books + noise[1])}
    far = dict.fromkeys(("true", "other", "cut"), [1.0, 2.0])
    return losses | {"twice": losses["books"], "far": far, "kl": 0.1, "drift": 0.1}


def test_a_lead_wants_both_axes_and_three_seeds():
    means = {"soft_replay": (1.0, 3.0), "mix_cpt": (1.1, 3.0), "longred": (1.1, 2.9)}
    seeds = [1, 2, 3]
    runs = {
        ("own", name, seed): made(x + 0.01 * seed, y, 10 * seed + i)
        for i, (name, (x, y)) in enumerate(means.items())
        for seed in seeds
    }
    lines, leads = verdicts(runs, seeds)
    assert leads == {
        "own: soft replay leads Mix CPT": True,
        "own: soft replay leads LongReD-C": False,  # behind by 0.1 on books
    }
    assert sum("NOT RUN" in line for line in lines) == 4  # foreign text
    del runs["own", "soft_replay", 3]
    lines, leads = verdicts(runs, seeds)
    assert not leads and sum("NOT RUN" in line for line in lines) == 8


def test_a_cell_without_a_run_says_so():
    rows = leaderboard({("own", "mix_cpt", 1): made(1.5, 3.0, 1)}, made(1.4, 4.0, 2))
    assert sum("NOT RUN" in row for row in rows) == len(CELLS) - 1
    (row,) = (row for row in rows if row.startswith("| Mix CPT | own"))
    assert "| 1 | 1.5" in row and "NOT RUN" not in row


def test_earlier_runs_count_only_on_the_text_they_were_scored_on(tmp_path):
    original, run = made(1.4, 4.0, 2), made(1.5, 3.0, 1)
    path = tmp_path / "leaderboard.json"
    path.write_text(json.dumps({"original": original, "runs": {"own-mix_cpt-1": run}}))
    assert (
        read_earlier(path, original) == {"own-mix_cpt-1": run}
        and read_earlier(None, original) == {}
    )
    for other in (made(1.5, 4.0, 2), original | {"books": original["books"][1:]}):
        with pytest.raises(ValueError, match="scored on other text"):
            read_earlier(path, other)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a leaderboard.json"):
        read_earlier(path, original)
    with pytest.raises(ValueError, match="no such file"):
        read_earlier(tmp_path / "none.json", original)


def test_an_earlier_run_is_neither_trained_nor_scored_again(tmp_path, monkeypatch, capsys):
    cells = ["own-mix_cpt-1", "own-mix_cpt_without_0-1"]
    runs = {name: made(1.5, 3.0, 1) for name in cells}
    path, asked = tmp_path / "earlier.json", []
    path.write_text(json.dumps({"original": made(1.4, 4.0, 2), "runs": runs}))
    one = [([tuple(name.split("-")[:2])], 1) for name in cells]
    stand_ins = dict(BLOCKS=one, open_texts=lambda a: {}, load_checkpoint=lambda folder: folder)
    stand_ins |= dict(pad_heads=lambda model: argparse.Namespace(config=None), draw=lambda *_: None)
    stand_ins |= dict(score=lambda *_: made(1.4, 4.0, 2), sampling_flops=lambda *_: 0.0)
    stand_ins |= dict(train=lambda *run: asked.append(run))
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(board, name, stand_in)
    board.score_all(
        argparse.Namespace(seeds="1", base="b", out_dir=tmp_path, earlier=path, train=True)
    )
    assert not asked and json.loads((tmp_path / "leaderboard.json").read_text())["runs"] == runs
    said = capsys.readouterr().out.splitlines()
    (row,) = (line for line in said if "first book held out" in line and "| 1 |" in line)
    assert row.count("| - | - |") == 1  # what far text brings has no control there


def test_a_held_out_book_is_scored_whole_and_not_trained_on():
    args = argparse.Namespace(long=["moby.txt", "war.txt"])
    assert unread(args, "mix_cpt_without_1") == "war.txt" and unread(args, "mix_cpt") is None
    tokens = np.arange(1000)
    found = sequences(tokens, 100, 31)
    assert found.shape == (9, 101) and found[0, 0] == 0 and found[-1, -1] == 999
    assert (found.diff(dim=1) == 1).all() and (found[1:, 0] >= found[:-1, -1]).all()
    assert sequences(tokens, 100, 2).shape == (2, 101)


@pytest.mark.parametrize("text, method", CELLS)
def test_every_cell_is_a_run_that_is_accepted(ckpt, tmp_path, monkeypatch, text, method):
    """NOT RUN shall not mean that it could not."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    folder, *long = ckpt
    args = argparse.Namespace(base=str(folder), long=[str(path) for path in long], own="own.jsonl")
    args.foreign, args.out_dir, args.cache_dir = str(long[0]), tmp_path, "tokens"
    train(args, text, method, 7)
    ((_, script, *flags),) = commands
    config = longred.parse_args(flags, Config)
    c = resolve(config, load_config(folder), folder)
    assert script.endswith("longred.py") and c.seed == 7
    assert c.steps == (89 if method == "mix_cpt_flops" else 80)
    held_out = unread(args, method)
    assert c.long_data == [path for path in args.long if path != held_out]
    streams = plan_streams(c)
    assert set(streams) == ({"long"} if text == "none" else {"long", "short", "s2l"})


def test_the_picture_promises_a_line_only_where_one_can_be_seen(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    runs, drawn = {("own", "mix_cpt", 1): made(1.5, 3.0, 1)}, []
    original = made(1.4, 4.0, 2)
    draw(runs, original, tmp_path / "alone.png")
    runs["own", "longred", 1] = made(1.6, 2.9, 3)  # worse on stories, better on books
    draw(runs, original, tmp_path / "two.png")
    titles, lines = zip(*((f.axes[0].get_title(), f.axes[0].lines) for f in drawn), strict=True)
    assert ["line joins" in title for title in titles] == [False, True]
    black = [[line for line in found if line.get_color() == "black"] for found in lines]
    assert [len(found) for found in black] == [0, 1]
    said = [text.get_text().strip() for text in drawn[1].axes[0].texts]
    assert said[0] == "original, at 4.00" and len(said) == len(set(said)) == 3
    runs["own", "mix_cpt", 2] = made(1.5, 3.1, 4)  # and longred, of one seed, is pale beside it
    draw(runs, original, tmp_path / "three.png")
    axes = drawn[2].axes[0]
    said = [text.get_text().strip() for text in axes.texts]
    assert said == ["original, at 4.00", "Mix CPT, own samples"] and "pale" in axes.get_title()
    (pale,) = (line for line in axes.lines if line.get_alpha())
    assert pale.get_xydata()[0] == pytest.approx([1.6, 2.9], abs=1e-2)
    for figure in drawn:
        plt.close(figure)
