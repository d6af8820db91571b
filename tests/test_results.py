"""The tables of results/README.md are what the committed scores give."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from longred import parse_args, plan_streams
from machine.formats import load_config
from machine.samples import count
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from measure import frontier

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", RESULTS / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def not_in_readme(lines):
    """Return rows of tables, other than those that were not run, that the document has not."""
    document = (RESULTS / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and "NOT RUN" not in line]
    assert len(rows) > 3
    return [line for line in rows if line not in document]


def test_the_second_comparison_is_that_of_its_scores():
    content = frontier.read_scores(RESULTS / "frontier.json.gz")
    names = {frontier.run_name(*run): run for run in frontier.RUNS}
    runs = {names[name]: scores for name, scores in content["runs"].items()}
    table = frontier.leaderboard(runs, content["original"])
    curves, ablations = frontier.curves(runs), frontier.ablations(runs)
    tables = table + curves + ablations
    for text in ("own", "foreign"):
        tables += frontier.comparisons(runs, text, frontier.SEEDS)
    tables += frontier.comparisons(runs, "own", frontier.MORE_SEEDS)
    assert len(curves) > 16 and len(ablations) > 10 and not not_in_readme(tables)
    document = (RESULTS / "README.md").read_text()
    assert f"**{len(runs)} of {len(names)} runs are done" in document
    shown = [line for line in document.splitlines() if line.count("|") == 11]
    assert len(shown) > 20 and not [line for line in shown if line not in table]


def test_the_first_page_shows_rows_of_the_second_comparison():
    page, found = (RESULTS.parent / "README.md").read_text(), []
    shown = page.partition("| method | short text |")[2].partition("\n\n")[0].splitlines()[2:]
    for line in (RESULTS / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 12:  # with the number of seeds, each book and the seconds
            found.append(cells[1:3] + cells[4:8])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown]
    assert len(rows) == 12 and not [row for row in rows if row not in found]


def test_the_comparison_at_135m_is_that_of_its_scores(smollm2, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scores = RESULTS / "smollm2.json.gz"
    monkeypatch.setattr(sys, "argv", ["", "--scores", str(scores), "--out_dir", str(tmp_path)])
    smollm2.main()
    assert not not_in_readme(capsys.readouterr().out.splitlines())
    runs = frontier.read_scores(scores)["runs"]
    assert frontier.read_scores(tmp_path / scores.name)["runs"] == runs
    smollm2.draw({"original": runs["original"]}, tmp_path / "one.png")
    least = (tmp_path / "one.png").stat().st_size
    assert (tmp_path / "smollm2.png").stat().st_size > 1.3 * least


def test_every_run_at_135m_is_accepted(smollm2, ckpt, tmp_path):
    """NOT RUN must not mean that it could not be run."""
    folder, long, _ = ckpt
    args = argparse.Namespace(base=str(folder), long=str(long), out_dir=tmp_path)
    args.cache_dir = "tokens"
    model = load_config(folder)
    model.n_layers, model.max_position_embeddings = 30, 8192  # SmolLM2-135M's
    for name in smollm2.RUNS:
        c = resolve(parse_args(smollm2.flags_of(args, name), Config), model, folder)
        text, method, seed = name.split("-")
        kind = {"unextended": "long_cpt", "longred_yarn": "longred"}.get(method, method)
        assert (c.method, c.seed, c.steps, c.original_len) == (kind, int(seed), 70, 8192)
        assert set(plan_streams(c)) == ({"long"} if kind == "long_cpt" else {"long", "short"})
        assert (c.rope_type == "yarn") == (method == "longred_yarn")
        if method == "unextended":  # one stream, which reads the short text as it is
            assert (c.long_data, c.train_len) == ([str(tmp_path / "foreign.jsonl")], 512)
            assert (c.rope_theta, c.long_position_scheme) == (100_000, "ordinary")
        if text == "own":
            assert [count(spec) for spec in c.short_data] == [smollm2.OWN_TEXTS]


def test_a_difference_is_paired_by_seed_and_one_without_a_run_decides_nothing(smollm2):
    rng = np.random.default_rng(0)
    luck = rng.normal(size=len(smollm2.SEEDS))  # of a seed's batches, which both methods read

    def made(seed, shift):
        tasks = {t: (luck[seed - 1] + shift + rng.normal(size=40) / 100) for t in smollm2.ITEMS}
        gains = {str(d): rng.normal(size=40) for d in smollm2.FAR}
        return {"tasks": {t: x.tolist() for t, x in tasks.items()}, "copy": gains}

    shifts = zip(smollm2.SEEDS, (-0.10, -0.11, -0.12), strict=True)
    runs = {f"foreign-longred-{seed}": made(seed, shift) for seed, shift in shifts}
    runs |= {f"foreign-mix_cpt-{seed}": made(seed, 0) for seed in smollm2.SEEDS}
    _, _, bits, copying, *own = smollm2.comparisons(runs)
    mean = float(bits.split(" | ")[2])  # the seeds' luck is ten times that
    assert mean == pytest.approx(-0.11, abs=0.002) and bits.endswith("| differ |")
    assert copying.endswith("no difference shown |")
    assert len(own) == 2 and all("NOT RUN" in line for line in own)
    del runs["foreign-mix_cpt-3"]
    assert all("NOT RUN" in line for line in smollm2.comparisons(runs)[2:])
