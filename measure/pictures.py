"""The pictures of a comparison: what each model kept and gained, how it drifted, how it trained.

Each line or point has its name next to it, in its own colour; grey is the original's alone. Several
runs of one name are drawn as their mean with a band from the least to the most. Thick lines are
smoothed, faint ones are raw. An axis has one unit; a signed quantity has a map centred on 0.
"""

import textwrap
from pathlib import Path

import numpy as np

from machine.log import read_losses
from machine.states import read_run

# Okabe and Ito's colours, which colour-blind readers can tell apart, and five for long comparisons.
GREY = "#777777"
COLORS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
COLORS += ["#7f3b08", "#5e3c99", "#8c0d2c", "#4d7c0f", "#b8a100"]
STREAMS = {"long": "long text", "short": "short text", "s2l": "short to long", "replay": "replay"}
CE, KL, COS = "cross-entropy, nats a token", "KL, nats a token", "distance, 1 - cos"
UNITS = {"longred": COS, "soft_replay": KL, "mix_cpt": CE}  # of short text and short to long
SMOOTH = 5  # values in a moving average


def draw(results: list, out_dir: Path, original_len: int, target_len: int) -> list[Path]:
    """Draw the pictures that the results allow. Raises ImportError without matplotlib.

    results: [(name, folder or None, what evaluate.measure filled in)], the original first; none if
    its numbers are not finite.
    """
    if not results:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = styles(results)
    look = {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100}
    paths = []
    with plt.rc_context({**look, "figure.constrained_layout.use": True, "savefig.dpi": 150}):
        for name, figure in {
            "overview": draw_overview(plt, results, style, original_len, target_len),
            "drift": draw_drift(plt, results, style),
            "training": draw_training(plt, results, style),
            "needles": draw_maps(plt, results, "niah_", "share of needles found"),
            "repeat": draw_maps(plt, results, "repeat", "nats gained by having read it before"),
        }.items():
            if figure is not None:
                paths.append(out_dir / f"{name}.png")
                figure.savefig(paths[-1])
                plt.close(figure)
    return paths


def styles(results: list) -> dict[str, dict]:
    """Return {name: how its lines look}. When the colours run out, lines are dashed."""
    names = list(dict.fromkeys(name for name, _, _ in results))
    found = {names[0]: {"color": GREY, "ls": "-"}}
    for i, name in enumerate(names[1:]):
        found[name] = {
            "color": COLORS[i % len(COLORS)],
            "ls": ["-", "--", "-.", ":"][i // len(COLORS) % 4],
        }
    return found


def by_name(pairs) -> dict[str, np.ndarray]:
    """Group (name, values) as {name: (runs, values)}, cut to the shortest run of each name."""
    runs = {}
    for name, values in pairs:
        runs.setdefault(name, []).append(values)
    return {
        name: np.array([v[: min(map(len, rows))] for v in rows], dtype=float)
        for name, rows in runs.items()
    }


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a moving average over SMOOTH values, over fewer near the two ends."""
    if len(values) < 3 * SMOOTH:
        return values
    window = np.ones(SMOOTH)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot(axes, x, runs: np.ndarray, style: dict, marker: str = "", smooth: bool = True):
    """Plot the mean of runs (n, values) with its band, the raw mean faint; return its line."""
    from matplotlib.colors import to_rgb

    mean = runs.mean(0)
    line = smoothed(mean) if smooth else mean
    if smooth and len(mean) >= 3 * SMOOTH:  # pale, not transparent: two over each other are grey
        pale = 0.35 * np.array(to_rgb(style["color"])) + 0.65
        axes.plot(x, mean, color=pale, lw=0.8, zorder=1)
    if len(runs) > 1:
        low, high = (smoothed(f(0)) if smooth else f(0) for f in (runs.min, runs.max))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    return axes.plot(x, line, color=style["color"], ls=style["ls"], lw=1.8, marker=marker, ms=4)[0]


def name_lines(axes, lines: dict, style: dict, height: float = 0.06) -> None:
    """Write each line's name to the right of its end, moved apart where they would overlap.

    lines: {name: Line2D}. Lines nearer than 1% of the axis' height everywhere look like one and
    share a name; one that ends early has its name there, on white.
    """
    low, high = axes.get_ylim()
    groups = []  # [names, line]
    last = max((line.get_xdata()[-1] for line in lines.values()), default=0)
    for name, drawn in lines.items():
        line, end = drawn.get_ydata(), drawn.get_xdata()[-1]
        if end < 0.9 * last:
            axes.annotate(name, (end, line[-1]), xytext=(4, 0),
                          textcoords="offset points", color=style[name]["color"], va="center",
                          fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
            continue
        for group in groups:
            same = len(group[1]) == len(line)
            if same and np.abs(group[1] - line).max() < 0.01 * (high - low):
                group[0].append(name)
                break
        else:
            groups.append([[name], line])
    groups.sort(key=lambda group: group[1][-1])
    wanted = [min(max((line[-1] - low) / (high - low), 0.0), 1.0) for _, line in groups]
    heights = [height * len(names) for names, _ in groups]
    for (names, _), y in zip(groups, apart(wanted, heights), strict=True):
        color, text = style[names[-1]]["color"], "\n= ".join(names)
        axes.text(1.02, y, text, transform=axes.transAxes, color=color, va="center", fontsize=9)


def apart(wanted: list[float], heights: list[float]) -> list[float]:
    """Place the middles of boxes as near to the rising `wanted` as they go without overlap."""
    gaps = [(a + b) / 2 for a, b in zip(heights, heights[1:], strict=False)]
    placed = wanted[:1]
    for y, gap in zip(wanted[1:], gaps, strict=True):
        placed.append(max(y, placed[-1] + gap))
    top = 1.0
    for i in range(len(placed) - 1, -1, -1):  # what was pushed out comes down, and pushes others
        placed[i] = min(placed[i], top)
        top = placed[i] - gaps[i - 1] if i else top
    return placed


def whole_steps(axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_overview(plt, results: list, style: dict, original_len: int, target_len: int):
    """Draw short text against long text, and the long text by position."""
    results = [(n, f, r) for n, f, r in results if "kept" in r and "position" in r]
    if not results:
        return None
    long = by_name((n, r["position"]["whole"]["nll"]) for n, _, r in results)
    short = by_name((n, [r["kept"]["loss"]]) for n, _, r in results)
    parts = {
        n: np.stack([p.mean(1) for p in np.array_split(runs, min(32, runs.shape[1]), 1)], 1)
        for n, runs in long.items()
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.2])
    first, *others = parts
    # The original's loss may dwarf every difference between the others: it is left out then.
    low, highest = min(map(np.min, parts.values())), max(map(np.max, parts.values()))
    span = max(max(parts[n].max() for n in others or [first]) - low, 1e-3)
    top = (highest if highest < low + 3.2 * span else low + span) + 0.12 * span
    x = (np.arange(parts[first].shape[1]) + 0.5) * target_len / parts[first].shape[1]
    lines = {n: plot(right, x, runs, style[n]) for n, runs in parts.items()}
    right.set(xlim=(0, target_len), ylim=(low - 0.08 * span, top))
    outside = {n for n, line in lines.items() if line.get_ydata()[-1] > top}
    name_lines(right, {n: line for n, line in lines.items() if n not in outside}, style)
    ticks = np.linspace(0, target_len, 5)  # where a tick is a whole token
    right.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    right.axvline(original_len, color="black", lw=0.8, ls=":")
    right.annotate("original window", (original_len, low - 0.06 * span), xytext=(4, 0),
                   textcoords="offset points", fontsize=9)  # fmt: skip
    for n in outside:
        mean = parts[n].mean()
        right.text(0.99, 0.99, f"{n}: {mean:.2f}, above this picture", transform=right.transAxes,
                   ha="right", va="top", color=style[n]["color"], fontsize=9)  # fmt: skip
    right.set(title="long text by position", xlabel="position, tokens", ylabel="nats a token")
    points = {n: (short[n].mean(), runs.mean()) for n, runs in long.items()}
    draw_points(left, points, short, long, style, first)
    left.set_xlabel(f"kept: loss on short text at {original_len:,}, nats a token")
    left.set_ylabel(f"gained: loss on long text at {target_len:,}, nats")
    left.set_title("both at once (lower left is better)")
    return figure


def draw_points(axes, points: dict, short: dict, long: dict, style: dict, first: str) -> None:
    """Draw each name's point, with bars from the least to the most run and the name next to it."""
    ys = [v for n in points if n != first for v in long[n].mean(1)] or [points[first][1]]
    # A small difference of one must not look as large as a large one of the other.
    wide = np.ptp([x for x, _ in points.values()])
    low = min(*ys, points[first][1])
    height = max(max(ys) - low, 0.25 * wide, 0.05)
    top = low + 1.25 * height
    for name, (x, y) in points.items():
        color = style[name]["color"]
        if y > top:
            axes.axvline(x, color=color, lw=1.0, ls=":")
            axes.text(x, top, f" {name}, at {y:.2f}", color=color, va="top", fontsize=9)
            continue
        hollow = "white" if style[name]["ls"] != "-" else color
        for values, horizontal in ((short[name], True), (long[name].mean(1), False)):
            span = [[values.min()], [values.max()]]
            fixed = [[y], [y]] if horizontal else [[x], [x]]
            axes.plot(*((span, fixed) if horizontal else (fixed, span)), color=color, lw=1.2)
        axes.plot(x, y, "o", ms=7, color=color, mfc=hollow)
    axes.set_ylim(low - 0.12 * height, top)
    inside = sorted((n for n in points if points[n][1] <= top), key=lambda n: points[n][1])
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for names
    bottom = low - 0.12 * height
    wanted = [(points[n][1] - bottom) / (top - bottom) for n in inside]
    heights = apart(wanted, [0.05] * len(inside))
    for name, y_name in zip(inside, heights, strict=True):
        x, y = points[name]
        place = max(x, short[name].max()) + 0.03 * (right - left), bottom + y_name * (top - bottom)
        axes.annotate(name, (x, y), place, color=style[name]["color"], va="center", fontsize=9)


def draw_drift(plt, results: list, style: dict):
    runs = [(name, r["kept"]) for name, _, r in results[1:] if "attention_kl" in r.get("kept", {})]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.0))
    hidden = by_name((name, [1 - c for c in k["cosine"]]) for name, k in runs)
    heads = by_name((name, np.mean(k["attention_kl"], axis=1)) for name, k in runs)
    for axes, values, start in ((left, hidden, 0), (right, heads, 1)):
        lines = {}
        for name, rows in values.items():
            x = np.arange(start, start + rows.shape[1])
            lines[name] = plot(axes, x, rows, style[name], "o", smooth=False)
        axes.set_ylim(bottom=0)
        name_lines(axes, lines, style)
        whole_steps(axes)
    left.set(title="hidden states", xlabel="index (0 = embeddings)", ylabel="1 - cosine")
    right.set(title="attention", xlabel="block", ylabel="KL, mean of heads, nats")
    figure.suptitle("Drift from the original on short text (lower is better)")
    return figure


def training_curves(results: list) -> dict[tuple[str, str], list]:
    """Read {(stream, unit): [(name, losses)]} from the logs next to the checkpoints.

    Long text comes first and replay last, and between them the others unit by unit.
    """
    curves = {}

    def add(stream: str, unit: str, name: str, values: list) -> None:
        values = [x for x in values if type(x) in (int, float)]
        if values:
            curves.setdefault((stream, unit), []).append((name, values))

    for name, folder, _ in results:
        log = folder.parent / "log.jsonl" if folder and folder.name == "hf" else Path("none")
        if not log.is_file():
            continue
        lines, run = read_losses(log), log.with_name("longred.json")
        config = read_run(run.parent)["config"] if run.is_file() else {}
        method = str(config.get("method", "longred"))
        for stream in STREAMS:
            unit = UNITS.get(method, f"loss of {method}") if stream in ("short", "s2l") else CE
            add(stream, unit, name, [line.get(f"loss_{stream}") for line in lines])
        if method == "longred":  # soft replay's short loss is this KL already
            add("short", KL, name, [line.get("loss_kl") for line in lines])
    streams, units = ["long", "short", "s2l", "replay"], [COS, CE, KL]
    units += sorted({unit for _, unit in curves} - {*units})  # of methods that a user wrote
    place = {stream: (i > 0) + (i > 2) for i, stream in enumerate(streams)}  # the two in the middle
    order = {(s, u): (place[s], units.index(u), streams.index(s)) for s, u in curves}
    return {key: curves[key] for key in sorted(curves, key=order.get)}


def draw_training(plt, results: list, style: dict):
    """Draw a panel for each stream and unit: cross-entropy and distances share no axis."""
    curves = training_curves(results)
    if not curves:
        return None
    # No hole: five panels are a tall one and four, seven a tall one and six; a column has a unit.
    layout = {4: ["01", "23"], 5: ["013", "024"], 6: ["013", "524"]}
    layout |= {7: ["0135", "0246"], 8: ["0135", "7246"]}
    layout = layout.get(len(curves), ["".join(map(str, range(len(curves))))])
    size = (4.6 * len(layout[0]), 3.6 * len(layout))
    figure, panels = plt.subplot_mosaic("\n".join(layout), figsize=size)
    for place, ((stream, unit), runs) in enumerate(curves.items()):
        axes = panels[str(place)]
        lines = {}
        for name, rows in by_name(runs).items():
            lines[name] = plot(axes, np.arange(1, rows.shape[1] + 1), rows, style[name])
        name_lines(axes, lines, style)
        step = "step of replay" if stream == "replay" else "step"
        axes.set(title=STREAMS[stream], xlabel=step, ylabel=unit)
        whole_steps(axes)
    figure.suptitle("Training losses, unweighted")
    figure.get_layout_engine().set(w_pad=0.15)  # a name and the next panel's unit
    return figure


def draw_maps(plt, results: list, task: str, title: str):
    """Draw heat maps, length by depth: a row of them for each task, a column for each name.

    Shares run from 0 to 1; nats may be of either sign, on a map centred on 0 and no narrower than a
    tenth, lest noise be painted dark.
    """
    grids = {}
    for name, _, result in results:
        for key in (key for key in result if key.startswith(task)):
            cells = {n: r for n, r in result[key].items() if r.get("by_depth")}
            if cells:
                grid = np.array([r["by_depth"] for r in cells.values()]).T
                grids.setdefault((key, name), []).append((grid, cells))
    if not grids:
        return None
    rows, columns = (list(dict.fromkeys(key[i] for key in grids)) for i in (0, 1))
    figure, panels = plt.subplots(
        len(rows), len(columns), squeeze=False, sharey=True,
        figsize=(1.8 + 2.5 * len(columns), 1.2 + 2.2 * len(rows)),
    )  # fmt: skip
    lengths = sorted({int(n) for runs in grids.values() for _, cells in runs for n in cells})
    means = {}
    for key, runs in grids.items():  # not a number: not asked
        means[key] = np.full((len(runs[0][0]), len(lengths)), np.nan)
        asked = [lengths.index(int(n)) for n in runs[0][1]]
        means[key][:, asked] = np.mean([grid for grid, _ in runs], axis=0)
    most = 1.0 if task == "niah_" else max(0.1, *(np.nanmax(np.abs(m)) for m in means.values()))
    signed = {"cmap": "PuOr", "vmin": -most, "vmax": most}
    look = {"cmap": "cividis", "vmin": 0, "vmax": 1} if task == "niah_" else signed
    for (key, name), grid in means.items():
        axes = panels[rows.index(key)][columns.index(name)]
        image = axes.imshow(grid, aspect="auto", **look)
        for (y, x), value in np.ndenumerate(grid):
            if np.isnan(value):
                axes.text(x, y, "not asked", ha="center", va="center", fontsize=9)
                continue
            dark = abs(value) > 0.65 * most if task != "niah_" else value < 0.5
            color = "w" if dark else "k"
            axes.text(x, y, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=color)
        cells = grids[key, name][0][1]
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axes.set_yticks(range(len(grid)), [f"{d:g}" for d in next(iter(cells.values()))["depths"]])
        label = name if len(rows) == 1 else f"{name}: {key}"
        axes.set_title(textwrap.fill(label, 24), fontsize=10)
        axes.spines[:].set_visible(False)
    figure.supxlabel("length, tokens")
    figure.supylabel("depth (0 = start)")
    figure.colorbar(image, ax=panels, label=title)
    return figure
