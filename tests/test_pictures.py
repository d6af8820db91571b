"""measure/pictures.py: what is drawn is what was measured, and can be read."""

import json

import numpy as np
import pytest

from measure import pictures

matplotlib = pytest.importorskip("matplotlib")


def runs_of(tmp_path):
    """[(name, folder, result)]: an original and two runs each of two methods, with logs."""
    results = [("original", None, result(5.0))]
    for name, method, short in (("Mix CPT", "mix_cpt", 2.0), ("LongReD", "longred", 0.05)):
        for seed in (0, 1):
            folder = tmp_path / f"{method}{seed}" / "hf"
            folder.mkdir(parents=True)
            lines = [{"step": i + 1, "loss_long": 3.0 - seed, "loss_short": short, "loss_s2l": None}
                     for i in range(20)]  # fmt: skip
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder.parent / "log.jsonl").write_text(text)
            config = {"config": {"method": method}}
            (folder.parent / "longred.json").write_text(json.dumps(config))
            results.append((name, folder, result(3.0 + seed / 10)))
    return results


def result(loss):
    cells = {"512": {"by_depth": [-0.2, 0.5], "depths": [0, 1]}}
    drift = {"cosine": [1.0, 0.9], "attention_kl": [[0.1, 0.2]]}
    position = {"whole": {"nll": [loss] * 64}}
    return {"kept": {"loss": 1.5, **drift}, "position": position, "repeat": cells,
            "niah_single_1": cells}  # fmt: skip


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """{name: figure}, as `draw` left them."""
    from matplotlib import pyplot as plt

    kept_open = {}
    monkeypatch.setattr(plt, "close", lambda figure: None)
    paths = pictures.draw(runs_of(tmp_path), tmp_path, 512, 2048)
    for path, number in zip(paths, plt.get_fignums(), strict=True):
        assert path.stat().st_size > 10_000
        kept_open[path.stem] = plt.figure(number)
    yield kept_open
    monkeypatch.undo()
    plt.close("all")


def test_every_picture_is_drawn_without_a_legend_and_every_name_stands_once(figures):
    assert figures.keys() == {"overview", "drift", "training", "needles", "repeat"}
    for name in ("overview", "drift", "training"):
        for axes in figures[name].axes:
            assert axes.get_legend() is None
            said = [text.get_text() for text in axes.texts]
            assert len(said) == len(set(said)), said


def test_training_never_mixes_nats_and_cosines(figures):
    panels = {(a.get_title(), a.get_ylabel()): a for a in figures["training"].axes}
    assert panels.keys() == {
        ("long text", pictures.CE),
        ("short text", pictures.CE),
        ("short text", pictures.COS),
    }
    for (title, unit), axes in panels.items():
        highest = max(max(line.get_ydata()) for line in axes.lines)
        assert title == "long text" or (highest < 1) == (unit == pictures.COS)
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_divergence_is_no_cross_entropy(tmp_path):
    curves = pictures.training_curves(runs_of(tmp_path) + logged(tmp_path, "soft_replay", 0.4))
    assert [*curves] == [
        ("long", pictures.CE),
        ("short", pictures.COS),
        ("short", pictures.CE),
        ("short", pictures.KL),
    ]
    assert curves["short", pictures.KL] == [("soft_replay", [0.4] * 20)]
    both = logged(tmp_path, "longred", 0.1, loss_kl=0.3)
    assert pictures.training_curves(both)["short", pictures.KL] == [("longred", [0.3] * 20)]


def test_a_replays_steps_are_its_own(tmp_path):
    from matplotlib import pyplot as plt

    results = logged(tmp_path, "longrecipe", None, loss_replay=2.0)
    with plt.rc_context({"figure.constrained_layout.use": True}):
        figure = pictures.draw_training(plt, results, pictures.styles(results))
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step of replay"]
    plt.close(figure)


def test_without_results_there_are_no_pictures(tmp_path):
    assert pictures.draw([], tmp_path, 64, 128) == [] == [*tmp_path.iterdir()]


def test_a_damaged_line_of_a_log_is_left_out_of_the_picture_with_a_warning(tmp_path, capsys):
    found = logged(tmp_path, "longred", 0.1)
    log = found[0][1].parent / "log.jsonl"
    lines = log.read_bytes().splitlines()
    lines[3], lines[5], lines[7] = b"\xff" + lines[3], lines[5][:9], b"[]"
    lines[9] = lines[9].replace(b"0.1", b'"a"')
    log.write_bytes(b"\n".join(lines))
    curves = pictures.training_curves(found)
    assert curves["long", pictures.CE] == [("longred", [3.0] * 17)]
    assert curves["short", pictures.COS] == [("longred", [0.1] * 16)]
    assert "log.jsonl: 3 damaged lines are left out" in capsys.readouterr().out


def logged(tmp_path, method, short, **more):
    """[(method, folder, {})]: a run of 20 steps with its log."""
    folder = tmp_path / f"{method}-alone" / "hf"
    folder.mkdir(parents=True)
    line = {"loss_long": 3.0, "loss_short": short, "loss_s2l": None, **more}
    (folder.parent / "log.jsonl").write_text((json.dumps(line) + "\n") * 20)
    (folder.parent / "longred.json").write_text(json.dumps({"config": {"method": method}}))
    return [(method, folder, {})]


def test_a_loss_of_ones_own_has_an_axis_of_its_own(tmp_path):
    runs = [*logged(tmp_path, "mix_cpt", 2.0), *logged(tmp_path, "mse", 0.5)]
    short = [key for key in pictures.training_curves(runs) if key[0] == "short"]
    assert short == [("short", pictures.CE), ("short", "loss of mse")]


def test_an_original_that_is_better_than_every_extension_is_in_the_picture():
    from matplotlib import pyplot as plt

    kept = {"kept": {"loss": 2.0}}
    results = [
        (name, None, kept | {"position": {"whole": {"nll": [loss] * 64}}})
        for name, loss in (("original", 2.0), ("a", 3.0), ("b", 3.3))
    ]
    figure = pictures.draw_overview(plt, results, pictures.styles(results), 16, 64)
    for axes in figure.axes[:2]:
        low, high = axes.get_ylim()
        assert low < 2.0 and high > 3.3
    plt.close(figure)


def test_a_run_that_ended_early_is_named_where_it_ended(tmp_path):
    from matplotlib import pyplot as plt

    (short,), (long,) = (logged(tmp_path, method, 0.1) for method in ("longred", "long_cpt"))
    log = short[1].parent / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:7]))
    results = [("original", None, {}), short, long]
    with plt.rc_context({"figure.constrained_layout.use": True}):
        figure = pictures.draw_training(plt, results, pictures.styles(results))
    said = {text.get_text(): text for text in figure.axes[0].texts}
    assert said.keys() == {"longred", "long_cpt"} and said["longred"].xy == (7, 3.0)
    plt.close(figure)


def test_maps_share_their_lengths_and_what_was_not_asked_says_so():
    from matplotlib import pyplot as plt

    few, many = ({n: {"by_depth": [0.5], "depths": [0]} for n in ns} for ns in (["1024"],
                 ["512", "1024", "2048"]))  # fmt: skip
    results = [("a", None, {"niah_x": few}), ("b", None, {"niah_x": many})]
    figure = pictures.draw_maps(plt, results, "niah_", "share")
    a, b = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.isnan(np.ma.filled(a, np.nan)).tolist() == [[True, False, True]]
    assert np.isfinite(np.ma.filled(b, np.nan)).all()
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    assert said == [["not asked", "0.50", "not asked"], 3 * ["0.50"]]
    plt.close(figure)


def test_seeds_are_their_mean_and_a_band(figures):
    axes = next(a for a in figures["training"].axes if a.get_title() == "long text")
    assert len(axes.collections) == 2  # a band each
    for line in axes.lines:
        assert np.allclose(line.get_ydata(), 2.5)  # of 3 and 2


def test_grey_is_the_originals_alone_and_colours_do_not_repeat():
    style = pictures.styles([(f"m{i}", None, {}) for i in range(13)])
    colors = [s["color"] for s in style.values()]
    assert colors[0] == pictures.GREY and len(set(colors)) == 13


def test_signed_maps_are_centred_on_0_and_shares_run_from_0_to_1(figures):
    limits = {name: figures[name].axes[0].images[0].get_clim() for name in ("repeat", "needles")}
    assert limits == {"repeat": (-0.5, 0.5), "needles": (0, 1)}


def test_a_map_of_next_to_nothing_stays_pale():
    from matplotlib import pyplot as plt

    cells = {"512": {"by_depth": [-0.02, 0.01], "depths": [0, 1]}}
    figure = pictures.draw_maps(plt, [("original", None, {"repeat": cells})], "repeat", "nats")
    assert figure.axes[0].images[0].get_clim() == (-0.1, 0.1)
    plt.close(figure)


def test_boxes_never_overlap_and_stay_below_the_top():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        wanted = sorted(rng.random(8).tolist())
        heights = rng.uniform(0.03, 0.12, 8).tolist()
        placed = pictures.apart(wanted, heights)
        gaps = [(a + b) / 2 for a, b in zip(heights, heights[1:], strict=False)]
        assert all(np.diff(placed) > np.array(gaps) - 1e-9) and placed[-1] <= 1
    assert pictures.apart([0.1, 0.5], [0.1, 0.1]) == [0.1, 0.5]
    assert pictures.apart([], []) == []
