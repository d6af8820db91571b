"""measure/frontier.py: the declared statistics by hand, and what a missing run prints."""

import argparse
import shutil
import sys

import numpy as np
import pytest
import torch

from longred import parse_args, plan_streams
from machine.formats import load_config
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from measure import frontier
from measure.frontier import (
    CELLS,
    COMPARISONS,
    RUNS,
    Point,
    between,
    book_losses,
    compare,
    comparisons,
    flags_of,
    holm,
    leaderboard,
    main,
    paired_t,
    read_scores,
    run_name,
    sequences,
    verdict,
    write_scores,
)


def made(stories: float, books: float, seed: int = 0) -> dict:
    """A run whose sequences have these mean losses, with a little noise of the seed's own."""
    noise = np.random.default_rng(seed).normal(0, 1e-4, size=(3, 40))
    run = {"stories": [*(stories + noise[0])], "kl": [0.1] * 40, "drift": [0.1] * 40}
    return run | {"books": {"a": [*(books + noise[1])], "b": [*(books + 1 + noise[2])]}}


@pytest.mark.parametrize(
    "differences, half, p", [([1, 2, 3], 2.4841, 0.0742), ([1, 2, 3, 4, 5], 1.9632, 0.0132)]
)
def test_paired_differences_give_the_t_interval_and_p_of_a_table(differences, half, p):
    mean, low, high, found = paired_t(differences)
    assert mean == np.mean(differences) and (low, high) == pytest.approx(
        (mean - half, mean + half), abs=1e-3
    )
    assert found == pytest.approx(p, abs=1e-4)
    assert paired_t([1.0, -1.0, 0.0])[3] == 1.0


def test_holm_multiplies_by_the_hypotheses_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 1.0]) == [1.0, 1.0]


def test_an_anchor_is_placed_between_its_neighbours_by_the_validation_half():
    curve = [made(1.4, 3.0), made(1.6, 2.8), made(1.5, 2.9)]
    anchor = made(1.425, 2.9)
    anchor["stories"][1::2] = [9.0] * 20  # the test half decides nothing here
    one, two, share = between(anchor, curve)
    assert one is curve[0] and two is curve[2] and share == pytest.approx(0.25)
    assert between(made(1.3, 3.0), curve) == (curve[0], curve[0], 0.0)  # beyond the curve's end
    assert between(made(1.7, 3.0), curve) == (curve[1], curve[1], 0.0)


def both_comparisons(soft: float = 2.95) -> dict:
    """Soft replay's book loss against 3.0 of both rivals at equal story loss, three seeds."""
    runs = {}
    for seed in (1, 2, 3):
        runs["own", Point("soft_replay", 1), seed] = made(1.455, soft, seed)
        runs["own", Point("soft_replay", 0.5), seed] = made(1.49, soft, 10 + seed)
        runs["own", Point("mix_cpt", 1), seed] = made(1.46, 2.95, 20 + seed)
        runs["own", Point("mix_cpt", 2), seed] = made(1.44, 3.15, 30 + seed)
        runs["own", Point("longred", 15), seed] = made(1.47, 3.0, 40 + seed)
    return runs


def test_soft_replay_less_a_rival_is_read_at_equal_story_loss_whoever_is_the_anchor():
    runs = both_comparisons()
    for c in COMPARISONS:  # soft replay is the first one's anchor and the second one's curve
        found = compare(runs, "own", c, [1, 2, 3])
        assert found["mean"] == pytest.approx(-0.05, abs=1e-3)
        share = 3 / 4 if c.rival == "mix_cpt" else 3 / 7
        assert found["shares"] == pytest.approx([share] * 3, abs=0.02)
        assert found["stories"] == pytest.approx(0, abs=1e-3) and found["p"] < 0.001
    lines = comparisons(runs, "own", [1, 2, 3])
    assert sum("soft replay ahead" in line for line in lines) == 2
    lines = comparisons(both_comparisons(soft=3.05), "own", [1, 2, 3])
    assert sum("soft replay behind" in line for line in lines) == 2
    lines = comparisons(both_comparisons(soft=3.0), "own", [1, 2, 3])
    assert sum("no difference shown" in line for line in lines) == 2


def test_the_books_are_compared_on_the_test_half_of_both():
    run = made(1.4, 3.0)
    assert [len(book_losses(run, half)) for half in (0, 1)] == [40, 40]
    runs = both_comparisons()
    for run in runs.values():
        for losses in run["books"].values():
            losses[::2] = [7.0] * 20
    assert compare(runs, "own", COMPARISONS[0], [1, 2, 3])["mean"] == pytest.approx(-0.05, abs=1e-3)


def test_a_comparison_without_one_of_its_runs_is_not_run_and_counts_in_holm():
    runs = both_comparisons()
    for seed in (1, 2, 3):  # so that p is large enough to be seen
        runs["own", Point("soft_replay", 1), seed] = made(1.455, 2.93 + 0.01 * seed, seed)
    alone = compare(runs, "own", COMPARISONS[0], [1, 2, 3])["p"]
    del runs["own", Point("longred", 15), 3]
    lines = comparisons(runs, "own", [1, 2, 3])
    assert sum("NOT RUN" in line for line in lines) == 1
    (row,) = (line for line in lines if line.startswith("| LongReD-C"))
    assert "NOT RUN | | | | | seed 1: -0.0" in row and "seed 2" in row and "seed 3" not in row
    (row,) = (line for line in lines if line.startswith("| Mix CPT"))
    assert f"| {2 * alone:.3f} |" in row and alone > 0.001
    assert sum("NOT RUN" in line for line in comparisons(runs, "foreign", [1, 2, 3])) == 2


def test_ahead_needs_equal_story_loss_or_a_lower_one():
    found = {"mean": -0.05, "bootstrap": (-0.06, -0.04), "stories": 0.004}
    assert verdict(found, 0.01) == "soft replay ahead"
    assert verdict(found | {"stories": -0.1}, 0.01) == "soft replay ahead"  # better on both axes
    assert verdict(found | {"stories": 0.006}, 0.01) == "not at equal story loss"
    assert verdict(found, 0.06) == "no difference shown"
    assert verdict(found | {"bootstrap": (-0.1, 0.01)}, 0.01) == "no difference shown"
    behind = {"mean": 0.05, "bootstrap": (0.04, 0.06), "stories": -0.006}
    assert verdict(behind, 0.01) == "not at equal story loss"  # the rival forgot more


def test_an_ablation_is_paired_by_seed_and_needs_all_of_them():
    runs, changed = {}, Point("longred_last")
    for seed in (1, 2, 3):  # the seeds' luck is ten times the change
        runs["own", Point("longred", 5), seed] = made(1.5 + seed / 10, 3.0 + seed / 10)
        runs["own", changed, seed] = made(1.51 + seed / 10, 2.99 + seed / 10)
    (row,) = frontier.ablations(runs)[2:-1]
    same = [f"{x:+.3f} ({x:+.3f} to {x:+.3f})" for x in (0.01, -0.01)]
    assert row == f"| LongReD-C, last layer alone | own | LongReD-C 5 | {same[0]} | {same[1]} |  |"
    for seed in (1, 2, 3):  # the curve: 2.98 at the change's story loss
        for weight, stories, books in ((1, 1.6, 2.9), (2, 1.52, 2.96), (15, 1.4, 3.2)):
            runs["own", Point("longred", weight), seed] = made(
                stories + seed / 10, books + seed / 10
            )
    (row,) = frontier.ablations(runs)[2:-1]
    assert row.endswith("| +0.010 (+0.010 to +0.010) |")
    for seed in (1, 2, 3):  # beyond it
        runs["own", changed, seed] = made(1.61 + seed / 10, 2.99 + seed / 10)
    (row,) = frontier.ablations(runs)[2:-1]
    assert row.endswith("|  |")
    del runs["own", changed, 2]
    assert not frontier.ablations(runs)[2:-1]
    for seed in (1, 2, 3):  # LongRecipe is compared with Long CPT, whatever its own short text
        runs["none", Point("long_cpt"), seed] = made(2.0 + seed / 10, 3.0 + seed / 10)
        runs["own", Point("longrecipe_replay"), seed] = made(1.9 + seed / 10, 3.1 + seed / 10)
    (row,) = frontier.ablations(runs)[2:-1]
    assert row.startswith("| LongRecipe, replay | own | Long CPT | -0.100 (-0.100 to -0.100) |")


def test_soft_replays_whole_curve_is_read_at_every_point_of_the_others():
    runs = {}
    for seed in (1, 2, 3):
        for i, (weight, books) in enumerate({4: 3.2, 2: 3.1, 1: 3.05, 0.5: 3.03}.items()):
            soft = made(1.4 + i / 20, books, 10 * i + seed)  # stories 1.40, 1.45, 1.50, 1.55
            runs["own", Point("soft_replay", weight), seed] = soft
        runs["own", Point("longred_kl", 1), seed] = made(1.475, 3.1, 50 + seed)
        runs["own", Point("mix_cpt", 0.5), seed] = made(1.6, 3.0 + seed / 100, 60 + seed)
    mixed, distilled = (row.split(" | ") for row in frontier.curves(runs)[2:-1])
    assert mixed[:2] == ["| Mix CPT 0.5", "own"]  # beyond the curve, whose end is 1.55 and 3.03
    assert [float(x) for x in mixed[2:4]] == pytest.approx([-0.05, 0.01], abs=1e-3)
    ends = [float(x) for x in mixed[4].removesuffix(" |").split(" to ")]
    assert ends == pytest.approx([0.01 - 0.0248, 0.01 + 0.0248], abs=2e-3)  # t of 0, 0.01, 0.02
    assert distilled[:2] == ["| LongReD-C + KL 1", "own"]  # 3.075 on the curve
    assert [float(x) for x in distilled[2:4]] == pytest.approx([0.0, -0.025], abs=1e-3)
    del runs["own", Point("soft_replay", 4), 2]
    assert not frontier.curves(runs)


def test_a_cell_without_a_run_says_so():
    rows = leaderboard({("own", Point("mix_cpt", 1), 1): made(1.5, 3.0)}, made(1.4, 4.0))
    assert sum("NOT RUN" in row for row in rows) == len(CELLS) - 1
    (row,) = (row for row in rows if row.startswith("| Mix CPT 1 | own"))
    assert "| 1 | 1.500 |" in row and "NOT RUN" not in row


def test_a_book_is_read_evenly_from_beginning_to_end():
    found = sequences(np.arange(1000), 100, 31)
    assert found.shape == (9, 101) and found[0, 0] == 0 and found[-1, -1] == 999
    assert (found.diff(dim=1) == 1).all() and (found[1:, 0] >= found[:-1, -1]).all()
    assert sequences(np.arange(1000), 100, 2).shape == (2, 101)


@pytest.mark.parametrize("text, point", CELLS, ids=lambda x: str(x))
def test_every_cell_is_a_run_that_is_accepted(ckpt, tmp_path, text, point):
    """NOT RUN must not mean that it could not be run."""
    folder, long, _ = ckpt
    args = argparse.Namespace(base=str(folder), long=[str(long)], out_dir=tmp_path)
    args.cache_dir = "tokens"
    config = parse_args(flags_of(args, text, point, 7), Config)
    model = load_config(folder)
    model.n_layers = 5  # stories260K's: its layers are named in some flags
    c = resolve(config, model, folder)
    assert c.seed == 7 and c.steps == 80 and c.keep == 1
    left_out = {"longred_no_short": {"short"}, "longred_no_s2l": {"s2l"}}.get(point.method, set())
    expected = {"long"} if text == "none" else {"long", "short", "s2l"} - left_out
    if point in frontier.LONGRECIPE_REPLAY:
        expected = {"long", "replay"}
        assert c.merge == (0.5 if point.method == "longrecipe_merged" else 0)
    assert set(plan_streams(c)) == expected
    weights = {name: s.weights for name, s in plan_streams(c).items()}
    if point.method == "mix_cpt":  # its weight is both alphas
        assert weights["short"] == {"short": 6 / 16 * point.weight}
        assert weights["s2l"] == {"s2l": 2 / 16 * point.weight}


def test_what_was_scored_is_neither_trained_nor_scored_again(ckpt, tmp_path, monkeypatch):
    folder, long, short = ckpt
    trained, scored, two = [], [], RUNS[:2]

    def train(out, flags):
        assert flags[flags.index("--out_dir") + 1] == str(out)
        trained.append(out.name)
        if len(trained) == 2:
            raise ValueError("the second run breaks")
        (out / "hf").mkdir(parents=True)
        (out / "hf" / "config.json").write_text("{}")

    def score(base, model, texts):
        scored.append(model)
        return made(1.4, 3.0)

    monkeypatch.setattr(frontier, "RUNS", two)
    monkeypatch.setattr(frontier, "train", train)
    monkeypatch.setattr(frontier, "score", score)
    monkeypatch.setattr(frontier, "open_texts", lambda a, base: {})
    monkeypatch.setattr(frontier, "load_checkpoint", lambda folder: folder)
    monkeypatch.setattr(frontier, "draw", lambda *args: None)
    argv = ["--base", str(folder), "--long", str(long), "--books", str(short)]
    argv += ["--out_dir", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match="the second run breaks"):
        main(argv)
    main(argv)
    names = [run_name(*run) for run in two]
    assert trained == [names[0], names[1], names[1]] and len(scored) == 3  # and the original
    assert list(read_scores(tmp_path / "o" / "frontier.json.gz")["runs"]) == names
    main([*argv, "--no-train"])
    assert len(trained) == len(scored) == 3

    # On another machine, from the scores alone: only the original is scored again.
    earlier = tmp_path / "earlier.json.gz"
    run = made(1.4, 3.0, seed=9)
    write_scores(earlier, {"original": made(1.4, 3.0), "runs": {names[0]: run, names[1]: run}})
    argv[-1] = str(tmp_path / "other")
    main([*argv, "--earlier", str(earlier)])
    assert len(trained) == 3 and len(scored) == 4
    found = read_scores(tmp_path / "other" / "frontier.json.gz")["runs"]
    assert found == {names[0]: run, names[1]: run}
    write_scores(earlier, {"original": made(1.41, 3.0), "runs": {}})
    with pytest.raises(SystemExit, match="its original scores otherwise on these texts"):
        main([*argv, "--earlier", str(earlier)])


def test_scores_alone_make_the_same_table_and_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = {run_name(*run): r for run, r in both_comparisons().items()}
    write_scores(tmp_path / "a.json.gz", {"original": made(1.4, 4.0), "runs": runs})
    for out in ("one", "two"):
        scores = tmp_path / ("a.json.gz" if out == "one" else "one/frontier.json.gz")
        main(["--scores", str(scores), "--out_dir", str(tmp_path / out)])
    one, two = ((tmp_path / out / "frontier.md").read_text() for out in ("one", "two"))
    assert one == two and one in capsys.readouterr().out and "15 of 136 runs done" in one
    assert (tmp_path / "two" / "frontier.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    main(["--scores", str(scores), "--out_dir", str(tmp_path / "two")])
    assert "pip install matplotlib" in capsys.readouterr().out
    files = [tmp_path / x for x in ("one/frontier.json.gz", "two/frontier.json.gz")]
    assert files[0].read_bytes() == files[1].read_bytes()  # no time of writing in them


def test_the_picture_has_means_of_the_same_seeds_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.figure

    drawn, runs = [], both_comparisons()
    runs["own", Point("soft_replay", 1), 4] = made(2.0, 5.0)  # a seed that other points lack
    del runs["own", Point("mix_cpt", 2), 3]
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **b: drawn.append(self)
    )
    frontier.draw(runs, made(1.4, 4.0), tmp_path / "a.png")
    labels = {label.get_text(): label.xy for label in drawn[0].axes[0].texts}
    assert labels.keys() == {"soft replay 0.5", "1", "Mix CPT 1", "LongReD-C 15"}
    assert labels["1"] == pytest.approx((1.455, 2.95 + 0.5), abs=1e-3)  # books a and b, 1 apart


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "not a file of scores"),
        (b"text", "not a file of scores"),
        ({"a": 1}, "no 'original' in it"),
    ],
)
def test_bad_scores_end_in_one_line(tmp_path, content, said):
    path = tmp_path / "x.json.gz"
    if isinstance(content, dict):
        write_scores(path, content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=said) as end:
        main(["--scores", str(path), "--out_dir", str(tmp_path / "o")])
    assert "\n" not in str(end.value.code)


def test_an_unread_book_is_not_trained_on_and_other_prose_is_refused(ckpt, tmp_path):
    folder, long, short = ckpt
    argv = ["--base", str(folder), "--long", str(long), "--out_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="it would be trained on"):
        main([*argv, "--books", str(short), str(long)])
    with pytest.raises(SystemExit, match="--books missing"):
        main(argv)
    (tmp_path / "prose.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match="is not the prose of Python"):
        main([*argv, "--books", str(short)])


def test_each_book_is_scored_under_a_name_of_its_own(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "stories", lambda *args: torch.zeros(1, 513))
    (tmp_path / "few.txt").write_text("a few words")
    args = argparse.Namespace(base=str(ckpt[0]), cache_dir=str(tmp_path / "tokens"))
    for books, said in {
        (ckpt[1], shutil.copy(ckpt[1], tmp_path / "long.txt")): "another text is called long too",
        (shutil.copy(ckpt[1], tmp_path / "stories.txt"),): "another text is called stories too",
        (tmp_path / "few.txt",): "few.txt: 11 tokens, need over 2,048",
    }.items():
        args.books = [str(book) for book in books]
        with pytest.raises(ValueError, match=said):
            frontier.open_texts(args, None)
