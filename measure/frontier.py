"""The comparison that results/PLAN.md declares in its second part: every method as a curve.

    python measure/frontier.py --base stories260K --long war_and_peace.txt \\
        --books moby_dick.txt jack_sheppard.txt --out_dir out/frontier
    python measure/frontier.py --scores results/frontier.json.gz --out_dir out/frontier

The first command trains and scores what is missing, one run after another in the order of BLOCKS.
Every run has a folder of its own and is skipped once it is scored, so a stopped command continues
where it was. `--no-train` only scores what has been trained, and `--earlier FILE` takes the runs
that an earlier frontier.json.gz holds, so that another machine continues without their weights. The
second command reads the scores of an earlier one and needs neither texts nor weights. Both print
the table and the comparisons, with NOT RUN for what is missing, and write frontier.md, frontier.png
and frontier.json.gz.
"""

import argparse
import functools
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from machine.corpus import tokenize
from machine.files import whole_file
from machine.formats import load_checkpoint
from machine.keeper import command_line
from machine.samples import sample_ids
from machine.tokenizer import load_tokenizer
from measure.demo import prose_lines
from measure.far_context import interval, tail_losses
from measure.losses import short_text_drift
from measure.pictures import COLORS

# ------------------------------------------------------------------------------ what is declared


@dataclass(frozen=True)
class Point:
    """One setting of one method: a point of that method's curve, if it has a weight."""

    method: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.method if self.weight is None else f"{self.method}-{self.weight:g}"


TITLES = {  # of the methods that have a curve, and the flags that set a curve's weight
    "mix_cpt": ("Mix CPT", "--method mix_cpt --alpha_short {w:g} --alpha_s2l {w:g}"),
    "soft_replay": ("soft replay", "--method soft_replay --alpha_kl {w:g}"),
    "longred": ("LongReD-C", "--alpha_short {w:g}"),
    "longred_kl": ("LongReD-C + KL", "--alpha_kl {w:g}"),
}
REPLAY = "--method longrecipe --replay_steps 20 --replay_batch 4"
ALONE = {  # settings without a curve: Long CPT, LongRecipe, and LongReD-C with one change
    "long_cpt": ("Long CPT", "--method long_cpt"),
    "longrecipe": ("LongRecipe", "--method longrecipe"),
    "longrecipe_replay": ("LongRecipe, replay", REPLAY),
    "longrecipe_merged": ("LongRecipe, replay, merged 0.5", f"{REPLAY} --merge 0.5"),
    "longred_u": ("LongReD-U", "--position_scheme uniform"),
    "longred_3_layers": ("LongReD-C, 3 layers by KL", "--n_distill_layers 3"),
    "longred_even": ("LongReD-C, layers 1, 3, 5", "--distill_layers 1 3 5"),
    "longred_last": ("LongReD-C, last layer alone", "--distill_layers 5"),
    "longred_no_short": ("LongReD-C, no short-text loss", "--short_micro 0"),
    "longred_no_s2l": ("LongReD-C, no short-to-long loss", "--s2l_micro 0"),
}


def points(method: str, *weights: float) -> list[Point]:
    return [Point(method, w) for w in weights]


CLAIM = [*points("soft_replay", 1), *points("mix_cpt", 1, 2)]
PRIMARY_POINTS = [*CLAIM, *points("longred", 15), *points("soft_replay", 0.5)]
MAIN = [*PRIMARY_POINTS, *points("longred", 5)]
CURVES = [
    *points("mix_cpt", 0.5, 1, 2, 3),
    *points("soft_replay", 0.5, 1, 2, 4),
    *points("longred", 1, 2, 5, 15),
    *points("longred_kl", 0.5, 1, 2),
]
ABLATIONS = [Point(name) for name in ALONE if name.startswith("longred_")]
LONG_CPT, LONGRECIPE = Point("long_cpt"), Point("longrecipe")
LONGRECIPE_REPLAY = [Point("longrecipe_replay"), Point("longrecipe_merged")]
BLOCKS = [  # (short text, points, seeds), in the order in which they are run
    ("own", MAIN, [1]),
    ("foreign", [*points("soft_replay", 1), *points("mix_cpt", 1), *points("longred", 5)], [1]),
    ("own", PRIMARY_POINTS, [2]),
    ("own", PRIMARY_POINTS, [3]),
    ("none", [LONG_CPT], [1]),
    ("foreign", MAIN, [1]),
    ("foreign", MAIN, [2]),
    ("foreign", MAIN, [3]),
    ("own", MAIN, [2, 3]),
    ("own", CURVES, [1]),
    ("foreign", CURVES, [1]),
    ("own", PRIMARY_POINTS, [4, 5]),
    ("none", [LONG_CPT], [2, 3]),
    ("own", CURVES, [2, 3]),
    ("foreign", CURVES, [2, 3]),
    ("own", ABLATIONS, [1, 2, 3]),
    ("foreign", [Point("longred_u"), Point("longred_last")], [1, 2, 3]),
    ("none", [LONGRECIPE], [1, 2, 3]),
    ("own", LONGRECIPE_REPLAY, [1, 2, 3]),
]
RUNS = list(dict.fromkeys((text, p, s) for text, ps, seeds in BLOCKS for s in seeds for p in ps))
CELLS = list(dict.fromkeys((text, p) for text, p, _ in RUNS))
SEEDS = [1, 2, 3]  # a comparison is decided on these
MORE_SEEDS = [1, 2, 3, 4, 5]  # own samples' comparisons are repeated on these
SETTING = (
    "--target_len 2048 --no-add_eos --steps 80 --lr 5e-4 --long_micro 2 --long_batch 2 "
    "--short_micro 3 --short_batch 4 --s2l_micro 1 --s2l_batch 4 --eval_tokens 0 --keep 1 "
    "--save_every 20"
)
OWN_TEXTS = 2000  # samples of the original, drawn anew for each seed
STORIES, STORIES_SEED, STORY_LEN = 600, 90210, 512  # samples that no run trains on
BOOK_SEQUENCES, BOOK_LEN = 64, 2048  # of each unread book
SAME = 2e-4  # nats by which one model's loss on one sequence may differ between two machines
EQUAL = 0.005  # nats: story losses that differ by no more count as equal


@dataclass(frozen=True)
class Comparison:
    """Soft replay less a rival on unread books, at equal story loss.

    One of the two is a single point, the anchor. The other's curve is interpolated at the anchor's
    story loss.
    """

    rival: str
    anchor: Point
    curve: tuple[Point, ...]


COMPARISONS = [
    Comparison("mix_cpt", Point("soft_replay", 1), tuple(points("mix_cpt", 1, 2))),
    Comparison("longred", Point("longred", 15), tuple(points("soft_replay", 0.5, 1))),
]


def title(point: Point) -> str:
    name = {**TITLES, **ALONE}[point.method][0]
    return name if point.weight is None else f"{name} {point.weight:g}"


def run_name(text: str, point: Point, seed: int) -> str:
    return f"{text}-{point}-{seed}"


# ------------------------------------------------------------------------------- runs and scores


def flags_of(a, text: str, point: Point, seed: int) -> list[str]:
    """Return the flags of one run, as a user would type them."""
    method = {**TITLES, **ALONE}[point.method][1].format(w=point.weight)
    flags = ["--ckpt", a.base, "--long_data", *a.long, *SETTING.split(), *method.split()]
    if text != "none":
        short = f"self:{OWN_TEXTS}" if text == "own" else str(a.out_dir / "prose.jsonl")
        replay = point in LONGRECIPE_REPLAY  # which reads short text in a stage of its own
        for flag in ["--replay_data"] if replay else ["--short_data", "--s2l_data"]:
            flags += [flag, short]
    out = a.out_dir / run_name(text, point, seed)
    return [*flags, "--seed", str(seed), "--out_dir", str(out), "--cache_dir", a.cache_dir]


def train(out: Path, flags: list[str]) -> None:
    """Train one run into its folder, or continue what a stopped one left there.

    flags: of longred.py. What it prints is added to OUT.log beside the folder.
    """
    script = Path(__file__).resolve().parent.parent / "longred.py"
    started = (out / "longred.json").exists()
    print(f"{time.strftime('%H:%M:%S')} {out.name}: train", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(out.with_name(f"{out.name}.log"), "a", encoding="utf-8") as log:
        command = [sys.executable, str(script), *(["--resume", str(out)] if started else flags)]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"{out.name} ended by {code}; its output is in {log.name}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if not started:  # of a run that was stopped, the seconds before are not known
        with whole_file(out / "processor_seconds.json") as f:
            json.dump(round(seconds), f)


@torch.no_grad()
def stories(model, tokenizer) -> torch.Tensor:
    """Sample texts of the original that no run trains on, packed: (sequences, STORY_LEN + 1)."""
    generator, tokens = torch.Generator().manual_seed(STORIES_SEED), []
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    for start in range(0, STORIES, 50):
        n = min(50, STORIES - start)
        for ids in sample_ids(model, tokenizer, n, STORY_LEN, generator):
            tokens += [first, *(i for i in ids if i != tokenizer.eos_id)]
    return sequences(np.array(tokens), STORY_LEN, len(tokens))


def sequences(tokens: np.ndarray, length: int, most: int) -> torch.Tensor:
    """Cut up to `most` stretches of length + 1 tokens evenly from a text: (n, length + 1) int64."""
    n = min(most, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, n).astype(int)
    return torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64))


def open_texts(a, base) -> dict[str, torch.Tensor]:
    """Return the scored text: unread stories, and sequences over the whole of each unread book."""
    tokenizer = load_tokenizer(a.base, add_eos=False)
    texts = {"stories": stories(base, tokenizer)}
    for book in a.books:
        name = Path(book).stem
        if name in texts:
            raise ValueError(f"--books {book}: another text is called {name} too; rename one")
        tokens = tokenize([book], tokenizer, a.cache_dir, name).tokens
        if len(tokens) <= BOOK_LEN:
            raise ValueError(f"--books {book}: {len(tokens):,} tokens, need over {BOOK_LEN:,}")
        texts[name] = sequences(tokens, BOOK_LEN, BOOK_SEQUENCES)
    return texts


def score(base, model, texts: dict) -> dict:
    """Measure the mean loss on every sequence; on stories also KL and drift from the original."""
    rounded = lambda values: [round(x, 5) for x in values]  # noqa: E731
    moved = short_text_drift(base, model, texts["stories"], attention_sequences=0)["by_sequence"]
    found = {"stories": rounded(moved["loss"])}
    found |= {"kl": rounded(moved["kl"]), "drift": rounded(moved["drift"])}
    books = {name: ids for name, ids in texts.items() if name != "stories"}
    found["books"] = {name: rounded(tail_losses(model, x, BOOK_LEN)) for name, x in books.items()}
    return found


def write_prose(path: Path) -> None:
    """Write the foreign text; raise ValueError if another text has its name."""
    if not path.exists():
        with whole_file(path) as f:
            f.write(prose_lines())
    elif path.read_text(encoding="utf-8") != prose_lines():
        raise ValueError(
            f"{path} is not the prose of Python {platform.python_version()}: pass another --out_dir"
        )


def write_scores(path: Path, content: dict) -> None:
    """Write compressed JSON. It holds no time, so that equal content gives equal bytes."""
    with whole_file(path) as f:
        f.buffer.write(gzip.compress(json.dumps(content).encode(), mtime=0))


def read_scores(path: Path, keys: Set[str] = frozenset()) -> dict:
    """Read a compressed JSON object; raise ValueError in one line if it lacks one of the keys."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        if missing := sorted(keys - content.keys()):
            raise ValueError(f"no {missing[0]!r} in it")
        return content
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise ValueError(
            f"{path}: not a file of scores ({e}); need one that this command wrote, such as "
            "results/frontier.json.gz"
        ) from None


def read_earlier(path: Path, original: dict) -> dict[str, dict]:
    """Return the scores of earlier runs; raise ValueError if they are of other text or weights."""
    content = read_scores(path, {"original", "runs"})
    kinds = [(lambda r: r["stories"])] + [lambda r, b=b: r["books"][b] for b in original["books"]]
    try:
        apart = max(np.abs(np.subtract(f(original), f(content["original"]))).max() for f in kinds)
    except (KeyError, ValueError):
        apart = np.inf
    if not apart <= SAME:
        raise ValueError(
            f"{path}: its original scores otherwise on these texts (by {apart:.4f} nats); need the "
            "weights, books and versions of that comparison, or leave --earlier out"
        )
    return content["runs"]


def run_all(a) -> tuple[dict, dict]:
    """Train and score what is missing. Returns ({(text, point, seed): scores}, the original's)."""
    base = load_checkpoint(a.base)
    write_prose(a.out_dir / "prose.jsonl")
    texts = functools.cache(lambda: open_texts(a, base))  # read only if something is scored
    path = a.out_dir / "original.json.gz"
    if not path.exists():
        write_scores(path, score(base, base, texts()))
    original, runs = read_scores(path), {}
    earlier = read_earlier(a.earlier, original) if a.earlier else {}
    for run in RUNS:
        out = a.out_dir / run_name(*run)
        if run_name(*run) in earlier:
            runs[run] = earlier[run_name(*run)]
            continue
        if not (out / "scores.json.gz").exists():
            if a.train and not (out / "hf" / "config.json").exists():
                train(out, flags_of(a, *run))
            if not (out / "hf" / "config.json").exists():
                continue
            found = score(base, load_checkpoint(out), texts())
            seconds = out / "processor_seconds.json"
            found["processor_seconds"] = (
                json.loads(seconds.read_text()) if seconds.exists() else None
            )
            write_scores(out / "scores.json.gz", found)
        runs[run] = read_scores(out / "scores.json.gz")
    return runs, original


# ------------------------------------------------------------------------------------ statistics


def book_losses(run: dict, half: int) -> np.ndarray:
    """Return every second sequence's loss of each book. half: 0 is validation, 1 is test."""
    return np.concatenate([losses[half::2] for losses in run["books"].values()])


def story_losses(run: dict, half: int) -> np.ndarray:
    return np.array(run["stories"][half::2])


def between(anchor: dict, curve: list[dict]) -> tuple[dict, dict, float]:
    """Return the curve's two neighbours of the anchor by story loss, and the second one's share.

    Read from the validation half. Beyond the curve's end the end itself is taken, with share 0.
    """
    curve = sorted(curve, key=lambda run: story_losses(run, 0).mean())
    losses = [story_losses(run, 0).mean() for run in curve]
    here = story_losses(anchor, 0).mean()
    if here <= losses[0]:
        return curve[0], curve[0], 0.0
    if here >= losses[-1]:
        return curve[-1], curve[-1], 0.0
    i = int(np.searchsorted(losses, here))
    share = (here - losses[i - 1]) / (losses[i] - losses[i - 1])
    return curve[i - 1], curve[i], float(share)


def paired_t(differences: list[float]) -> tuple[float, float, float, float]:
    """Return mean, ends of the 95% t interval and two-sided p of 3 or 5 paired differences."""
    d = np.array(differences)
    assert len(d) in (3, 5), "declared for three and for five seeds"
    error, freedom = d.std(ddof=1) / np.sqrt(len(d)), len(d) - 1
    half = {2: 4.302653, 4: 2.776445}[freedom] * error
    if not error:
        return d.mean(), d.mean(), d.mean(), float(d.mean() == 0)
    t = abs(d.mean()) / error
    sine, cosine2 = t / np.sqrt(freedom + t**2), freedom / (freedom + t**2)
    inside = sine * (1 + cosine2 / 2 if freedom == 4 else 1)  # share of t's density within -t..t
    return d.mean(), d.mean() - half, d.mean() + half, 1 - inside


def holm(p: list[float]) -> list[float]:
    """Return Holm's corrected p values, in the order given."""
    order, out, most = np.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        out[i] = most
    return out


def differences(runs: dict, text: str, c: Comparison, seed: int):
    """Return soft replay less the rival by test sequence: (books, stories, second one's share).

    None if one of the seed's runs is missing.
    """
    if not all((text, point, seed) in runs for point in (c.anchor, *c.curve)):
        return None
    sign = 1 if c.anchor.method == "soft_replay" else -1
    anchor = runs[text, c.anchor, seed]
    one, two, share = between(anchor, [runs[text, point, seed] for point in c.curve])
    books, stories = (
        sign * (losses(anchor, 1) - (1 - share) * losses(one, 1) - share * losses(two, 1))
        for losses in (book_losses, story_losses)
    )
    return books, stories, share


def compare(runs: dict, text: str, c: Comparison, seeds: list[int]) -> dict | None:
    """Compare soft replay with the rival at equal story loss; None if a run is missing."""
    found = [differences(runs, text, c, seed) for seed in seeds]
    if None in found:
        return None
    books, stories, shares = zip(*found, strict=True)
    mean, low, high, p = paired_t([d.mean() for d in books])
    stories_less = float(np.mean([d.mean() for d in stories]))
    bootstrap = interval(np.mean(books, axis=0))[1:]
    return dict(
        mean=mean, t=(low, high), p=p, bootstrap=bootstrap, stories=stories_less, shares=shares
    )


def verdict(found: dict, corrected: float) -> str:
    """Say by the declared rule whether soft replay is ahead, behind, or neither."""
    low, high = found["bootstrap"]
    if corrected >= 0.05 or low * high <= 0:
        return "no difference shown"
    ahead = found["mean"] < 0
    off = found["stories"] if ahead else -found["stories"]  # of the better one, less the other
    if off > EQUAL:
        return "not at equal story loss"
    return "soft replay ahead" if ahead else "soft replay behind"


def by_seed(runs: dict, text: str, c: Comparison, seeds: list[int]) -> list[str]:
    """Print the difference on books of each seed whose runs are there, without a verdict."""
    found = {seed: differences(runs, text, c, seed) for seed in seeds}
    return [f"seed {seed}: {d[0].mean():+.4f}" for seed, d in found.items() if d]


def comparisons(runs: dict, text: str, seeds: list[int]) -> list[str]:
    """Print one short text's comparisons as a Markdown table; one that was not run has p = 1."""
    found = [compare(runs, text, c, seeds) for c in COMPARISONS]
    corrected = holm([f["p"] if f else 1.0 for f in found])
    lines = [f"Short text: {text}; seeds {seeds[0]} to {seeds[-1]}.", ""]
    lines += ["| soft replay less | books | 95% t | Holm's p | bootstrap | stories | says |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for c, f, p in zip(COMPARISONS, found, corrected, strict=True):
        row = "NOT RUN | | | | | " + " ".join(by_seed(runs, text, c, seeds)) + " |"
        if f:
            ranges = [f"{low:+.4f} to {high:+.4f}" for low, high in (f["t"], f["bootstrap"])]
            p_text = "<0.001" if p < 0.001 else f"{p:.3f}"
            row = f"{f['mean']:+.4f} | {ranges[0]} | {p_text} | {ranges[1]} |"
            row += f" {f['stories']:+.4f} | {verdict(f, p)} |"
        lines.append(f"| {TITLES[c.rival][0]}, at {title(c.anchor)}'s story loss | {row}")
    return [*lines, ""]


def ablations(runs: dict) -> list[str]:
    """Print LongReD-C with one change less LongReD-C 5, and LongRecipe less Long CPT, by seed.

    A Markdown table. Its last column is the books' loss less that of LongReD-C's whole curve at the
    same story loss; empty where the curve lacks a run or does not reach that loss.
    """
    lines = ["| method | short text | less | stories | books | books, at equal story loss |"]
    lines += ["|---|---|---|---:|---:|---:|"]
    for text, point in CELLS:
        if point not in [*ABLATIONS, LONGRECIPE, *LONGRECIPE_REPLAY]:
            continue
        other = (text, Point("longred", 5)) if point in ABLATIONS else ("none", LONG_CPT)
        pairs = [[runs.get((*cell, seed)) for cell in ((text, point), other)] for seed in SEEDS]
        if any(None in pair for pair in pairs):
            continue
        changes = [
            [losses(a, 1).mean() - losses(b, 1).mean() for a, b in pairs]
            for losses in (story_losses, book_losses)
        ]
        whole = Comparison("longred", point, tuple(p for p in CURVES if p.method == "longred"))
        found = [differences(runs, text, whole, seed) for seed in SEEDS]
        if None not in found and all(abs(d[1].mean()) < EQUAL for d in found):
            changes.append([-d[0].mean() for d in found])  # the rival is the anchor: its own sign
        cells = []
        for values in changes:
            mean, low, high, _ = paired_t(values)
            cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        cells += [""] * (3 - len(cells))
        lines.append(f"| {title(point)} | {text} | {title(other[1])} | {' | '.join(cells)} |")
    return [*lines, ""]


def curves(runs: dict) -> list[str]:
    """Print soft replay's whole curve less each point of the others, as a Markdown table.

    The curve is interpolated at the point's story loss, which favours the point by a little. Where
    the difference of story losses is far from 0, the curve does not reach the point, and its end is
    taken.
    """
    head = "| soft replay's curve less | short text | stories | books | 95% t |"
    rows = []
    soft = tuple(point for point in CURVES if point.method == "soft_replay")
    for text in ("own", "foreign"):
        for point in CURVES:
            c = Comparison(point.method, point, soft)
            if point not in soft and (found := compare(runs, text, c, SEEDS)):
                low, high = found["t"]
                books = f"{found['mean']:+.4f} | {low:+.4f} to {high:+.4f}"
                rows.append(f"| {title(point)} | {text} | {found['stories']:+.4f} | {books} |")
    return [head, "|---|---|---:|---:|---:|", *rows, ""] if rows else []


# ----------------------------------------------------------------------------------------- print


def spread(values: list[float], form: str = ".3f") -> str:
    mean = f"{np.mean(values):{form}}"
    return mean + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")


def leaderboard(runs: dict, original: dict) -> list[str]:
    """Print one row for each point and short text, from the test half."""
    names = list(original["books"])
    head = ["method", "short text", "seeds", "story loss", "KL", "drift", "books"]
    head += [*(name.replace("_", " ") for name in names), "processor seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for text, point in [("", None), *CELLS]:
        group = {s: r for (t, p, s), r in runs.items() if (t, p) == (text, point)}
        group = {"": original} if point is None else group
        first = f"| {title(point) if point else 'original'} | {text} |"
        if not group:
            lines.append(f"{first} NOT RUN |" + " |" * (len(head) - 3))
            continue
        some = group.values()
        row = [spread([np.mean(r[key][1::2]) for r in some]) for key in ("stories", "kl", "drift")]
        row += [spread([book_losses(r, 1).mean() for r in some])]
        row += [spread([np.mean(r["books"][name][1::2]) for r in some]) for name in names]
        seconds = [s for r in some if (s := r.get("processor_seconds"))]
        row.append(spread(seconds, ".0f") if seconds else "")
        lines.append(f"{first} {' '.join(map(str, group))} | " + " | ".join(row) + " |")
    return lines


def draw(runs: dict, original: dict, path: Path) -> None:
    """Draw story loss against book loss: a panel for each short text, a line for each method.

    Large points are means over SEEDS and are labelled by the method's weight; pale ones are runs.
    A point that lacks one of SEEDS has the pale ones alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def place(run: dict) -> tuple[float, float]:
        return story_losses(run, 1).mean(), book_losses(run, 1).mean()

    texts = [text for text in ("own", "foreign") if any(t == text for t, _, _ in runs)]
    figure, panels = plt.subplots(
        1, len(texts), figsize=(5.5 * len(texts), 4.5), constrained_layout=True, squeeze=False
    )
    words = {"own": "own samples", "foreign": "Python's prose"}
    for axes, text in zip(panels[0], texts, strict=True):
        for color, (method, (name, _)) in zip(COLORS, TITLES.items(), strict=False):
            means = []
            for point in [p for p in CURVES if p.method == method]:
                found = {s: place(r) for (t, p, s), r in runs.items() if (t, p) == (text, point)}
                for xy in found.values():
                    axes.plot(*xy, "o", ms=3, color=color, alpha=0.3)
                if found.keys() >= set(SEEDS):
                    same = [found[seed] for seed in SEEDS]
                    means.append((point, *np.mean(same, axis=0)))
            if not means:
                continue
            _, x, y = zip(*means, strict=True)
            axes.plot(x, y, "o-", ms=5, lw=1, color=color)
            for point, *xy in means:
                label = f"{name} {point.weight:g}" if point is means[0][0] else f"{point.weight:g}"
                axes.annotate(
                    label, xy, (4, 4), textcoords="offset points", color=color, fontsize=8
                )
        x, y = place(original)
        axes.set_title(f"short text: {words[text]}\n(the original: {x:.2f} and {y:.2f})")
        axes.set(xlabel="loss on unread stories, nats a token")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="loss on two unread books, nats a token")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def refuse_foreign(out_dir: Path, stem: str, keys: set[str]) -> None:
    """Raise ValueError if a file that a command would replace is there and is not its own.

    stem: of its files; STEM.json.gz holds these keys where the command wrote it.
    """
    names = [f"{stem}.{kind}" for kind in ("json.gz", "md", "png")]
    there = [out_dir / name for name in names if os.path.lexists(out_dir / name)]
    try:
        ours = not there or read_scores(out_dir / names[0]).keys() >= keys
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(
            f"{there[0]} is in the way, and this command did not write it: pass another --out_dir"
        )


def show(a, runs: dict, original: dict) -> None:
    """Print the table and the comparisons; write frontier.md and frontier.png."""
    table = [*leaderboard(runs, original), ""]
    for text in ("own", "foreign"):
        table += comparisons(runs, text, SEEDS)
    table += comparisons(runs, "own", MORE_SEEDS) + curves(runs) + ablations(runs)
    table += [f"{len(runs)} of {len(RUNS)} runs done."]
    print("\n".join(table))
    with whole_file(a.out_dir / "frontier.md") as f:
        f.write("\n".join(table) + "\n")
    if any(text != "none" for text, _, _ in runs):
        try:
            draw(runs, original, a.out_dir / "frontier.png")
        except ImportError:
            print("for the picture: pip install matplotlib, then the same command")


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that the user can correct ends it with a message of one line."""
    parser = argparse.ArgumentParser("python measure/frontier.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--base", metavar="DIR", help="the original model's folder")
    add("--long", nargs="+", metavar="TEXT", help="long text to train on")
    add("--books", nargs="+", metavar="TEXT", help="books that no run reads, scored whole")
    add("--out_dir", type=Path, default=Path("out/frontier"), help="default: out/frontier")
    add("--cache_dir", default="out/tokens", help="where tokenised text is kept")
    add(
        "--train", action=argparse.BooleanOptionalAction, default=True, help="train what is missing"
    )
    add("--earlier", type=Path, metavar="FILE", help="a frontier.json.gz whose runs are kept")
    add("--scores", type=Path, metavar="FILE", help="print an earlier frontier.json.gz")
    a = parser.parse_args(argv)
    with command_line("frontier", argv):
        refuse_foreign(a.out_dir, "frontier", {"original", "runs"})
        if a.scores:
            content = read_scores(a.scores, {"original", "runs"})
            runs = {run: r for run in RUNS if (r := content["runs"].get(run_name(*run)))}
            original = content["original"]
        else:
            if missing := [f"--{x}" for x in ("base", "long", "books") if not getattr(a, x)]:
                raise ValueError(f"{', '.join(missing)} missing; or --scores FILE to print one")
            if {*map(Path.resolve, map(Path, a.long))} & {*map(Path.resolve, map(Path, a.books))}:
                raise ValueError("a book of --books is in --long too, so it would be trained on")
            runs, original = run_all(a)
        content = {run_name(*run): scores for run, scores in runs.items()}
        write_scores(a.out_dir / "frontier.json.gz", {"original": original, "runs": content})
        show(a, runs, original)


if __name__ == "__main__":
    main()
