"""FROZEN: the driver of the first part of results/PLAN.md, which made leaderboard.json and .png.

It is kept to show how those figures were made and is not maintained. It runs at commit 447d774
(`git checkout 447d774`, then the command below); its four runs with two rotaries need that commit.
measure/frontier.py drives the second part.

The comparison that results/PLAN.md declares: train what is missing, score it, print who leads.

    python -m measure.leaderboard --base stories260K --long texts/*.txt --own own.jsonl \\
        --foreign texts/war_and_peace.txt --test test.jsonl --out_dir out/leaderboard

One run after the other, in the order of BLOCKS, each seed by seed; every run and every score is
kept as it ends, so a stopped command goes on. `--no-train` scores and prints what there is; runs in
an earlier leaderboard.json count as done by `--earlier`, without their checkpoints. Cells without a
run print NOT RUN. Leaves leaderboard.md, leaderboard.json and leaderboard.png.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

import data
from longred import plan_streams
from machine import plan
from machine.corpus import tokenize
from machine.files import refuse_foreign, remember, whole_file
from machine.formats import load_checkpoint
from machine.settings import MachineConfig as Config
from machine.tokenizer import load_tokenizer
from measure.evaluate import short_text_drift
from measure.far_context import (
    brings,
    far_losses,
    interval,
    other_documents,
    shuffled,
    tail_losses,
)
from measure.pictures import COLORS, GREY, draw_points

METHODS = {  # name in folders -> name in print, flags
    "long_cpt": ("Long CPT", "--method long_cpt"),
    "mix_cpt": ("Mix CPT", "--method mix_cpt"),
    "longred": ("LongReD-C", ""),
    "soft_replay": ("soft replay", "--method soft_replay"),
    "longred_kl": ("LongReD + KL", "--alpha_kl 1"),
    "mix_cpt_ntk": ("Mix CPT, NTK", "--method mix_cpt --rope_type ntk"),
    "longred_ntk": ("LongReD-C, NTK", "--rope_type ntk"),
    "soft_replay_ntk": ("soft replay, NTK", "--method soft_replay --rope_type ntk"),
}
MAIN = "mix_cpt", "longred", "soft_replay"
for i, book in enumerate(("first", "second")):  # of --long, which is then the scored text
    for name in MAIN:
        title, flags = METHODS[name]
        METHODS[f"{name}_without_{i}"] = f"{title}, {book} book held out", flags
for weight in ("0.5", "2", "4"):
    title = f"soft replay, alpha_kl {weight}"
    METHODS[f"soft_replay_{weight}"] = title, f"--method soft_replay --alpha_kl {weight}"
for weight in ("2", "15"):
    METHODS[f"longred_{weight}"] = f"LongReD-C, alpha_short {weight}", f"--alpha_short {weight}"
SCHEMES = {"pose": "PoSE", "longrecipe": "LongRecipe"}
for scheme, title in SCHEMES.items():
    flags = f"--method soft_replay --long_position_scheme {scheme}"
    METHODS[f"soft_replay_{scheme}"] = f"soft replay on {title}'s long text", flags
METHODS["mix_cpt_flops"] = "Mix CPT, soft replay's FLOPs", "--method mix_cpt --steps 89"
BLOCKS = [  # one after the other, each seed by seed: its cells, in how many seeds
    ([("own", name) for name in MAIN], 3),
    ([("foreign", name) for name in MAIN], 3),
    ([("none", "long_cpt")], 3),
    ([("own", "mix_cpt_flops")], 3),
    ([("own", "longred_kl"), ("foreign", "longred_kl")], 1),
    ([("foreign", f"{name}_ntk") for name in MAIN], 1),
    ([("own", f"{name}_without_{i}") for i in (0, 1) for name in MAIN], 1),
    ([("own", f"soft_replay_{scheme}") for scheme in SCHEMES], 1),
    ([("own", f"soft_replay_{w}") for w in ("0.5", "2", "4")], 1),
    ([("own", f"longred_{w}") for w in ("2", "15")], 1),
]
CELLS = [cell for cells, _ in BLOCKS for cell in cells]
PRIMARY = [  # soft replay against these
    (text, other, axis)
    for text in ("own", "foreign")
    for other in ("mix_cpt", "longred")
    for axis in ("stories", "books")
]
SETTING = (
    "--target_len 2048 --no-add_eos --steps 80 --lr 5e-4 --long_micro 2 --long_batch 2 "
    "--short_micro 3 --short_batch 4 --s2l_micro 1 --s2l_batch 4 --eval_tokens 0 --keep 0"
)
MARGIN = 0.01  # nats by which a method that leads may be behind in the mean


# ----------------------------------------------------------------------------- runs and scores


def unread(a, method: str) -> str | None:
    """The one of --long that a method does not train on, and is scored on."""
    _, held_out, i = method.rpartition("_without_")
    return a.long[int(i)] if held_out else None


def train(a, text: str, method: str, seed: int) -> None:
    """One run into its folder, by the command that a user would type."""
    out = a.out_dir / f"{text}-{method}-{seed}"
    long = [book for book in a.long if book != unread(a, method)]
    flags = ["--ckpt", a.base, "--long_data", *long, *SETTING.split()]
    flags += ["--seed", str(seed), "--out_dir", str(out), "--cache_dir", a.cache_dir]
    if text != "none":
        short = {"own": a.own, "foreign": a.foreign}[text]
        flags += ["--short_data", short, "--s2l_data", short]
    script = Path(__file__).resolve().parent.parent / "longred.py"
    resume = (out / "longred.json").exists() and ["--resume", str(out)]
    command = [sys.executable, str(script), *(resume or flags + METHODS[method][1].split())]
    subprocess.run(command, check=True)


def open_texts(a) -> dict[str, torch.Tensor]:
    """The scored text: stories in sequences of the old window, books at target and twice that."""
    tokenizer = load_tokenizer(a.base, add_eos=False)
    stories = tokenize([a.test], tokenizer, a.cache_dir, "test")
    books = tokenize(a.long, tokenizer, a.cache_dir, "long")
    n = (len(stories.tokens) - 1) // 512
    rows = [stories.tokens[i * 512 : i * 512 + 513].astype(np.int64) for i in range(n)]
    texts = {"stories": torch.from_numpy(np.stack(rows))}
    texts |= {
        "books": data.held_out(books, 10**6, 2048),
        "twice": data.held_out(books, 10**6, 4096),
    }
    other = other_documents(books, 10**6, 2048, 1536, seed=1)
    texts["other"], texts["shuffled"] = other, shuffled(texts["books"][:, :1536], seed=1)
    texts["of stories"] = torch.from_numpy(np.resize(texts["stories"][:, :-1], other.shape))
    return texts


def sequences(tokens: np.ndarray, length: int, most: int) -> torch.Tensor:
    """Up to `most` of its stretches of length + 1 tokens, evenly over a text: (n, length + 1)."""
    n = min(most, (len(tokens) - 1) // length)
    starts = np.linspace(0, len(tokens) - length - 1, n).astype(int)
    return torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int64))


def with_book(a, texts: dict, book: str) -> dict:
    """The scored text with one whole book in place of the books' held-out ends."""
    tokenizer = load_tokenizer(a.base, add_eos=False)
    tokens = tokenize([book], tokenizer, a.cache_dir, "book").tokens
    n = {name: len(texts[name]) for name in ("books", "twice")}
    lengths = {"books": 2048, "twice": 4096}
    return texts | {name: sequences(tokens, lengths[name], n[name]) for name in n}


def score(base, model, texts: dict) -> dict:
    """Losses of every sequence (even: validation, odd: test), and on the test half the rest."""
    found = {
        name: [round(x, 5) for x in tail_losses(model, texts[name], texts[name].shape[1] - 1)]
        for name in ("stories", "books", "twice")
    }
    moved = short_text_drift(base, model, texts["stories"][1::2], attention_sequences=0)
    found |= {"kl": moved["kl"], "same_top1": moved["same_top1"], "drift": 1 - moved["cosine"][-1]}
    others = {name: texts[name][1::2] for name in ("other", "shuffled", "of stories")}
    found["far"] = far_losses(model, texts["books"][1::2], 512, others)
    return found


def cost(out: Path, model) -> dict:
    """Of a finished run, from what it left: tokens, FLOPs (teacher and heads in) and seconds."""
    c = Config(**json.loads((out / "longred.json").read_text())["config"])
    tokens = flops = 0
    for s in plan_streams(c).values():
        unit = plan.Unit.of(s, c)
        passes = unit.count * len(s.steps)
        tokens += passes * unit.tokens
        flops += passes * plan.model_flops(model.config, unit)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"tokens": tokens, "flops": flops, "seconds": sum(line["seconds"] for line in log)}


def sampling_flops(config, n: int, length: int) -> float:
    """Of n texts of `length` tokens sampled with a cache: one forward pass, its head included."""
    once = plan.flops(config, plan.Unit("", n, length))
    return config.n_layers * (once["matmul"] + once["attention"]) + once["head"]


# --------------------------------------------------------------------------------- statistics


def paired_t(differences: list[float]) -> tuple[float, float, float, float]:
    """Of three paired differences: mean, 95% interval, two-sided p (2 degrees of freedom)."""
    d = np.array(differences)
    assert len(d) == 3, "declared for three seeds"
    error = d.std(ddof=1) / np.sqrt(3)
    t = abs(d.mean()) / error if error else np.inf
    half = 4.302653 * error
    return d.mean(), d.mean() - half, d.mean() + half, 1 - 1 / np.sqrt(1 + 2 / t**2) if t else 1.0


def holm(p: list[float]) -> list[float]:
    """Holm's corrected p values, in the order given."""
    order, out, most = np.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        out[i] = most
    return out


def compare(runs: dict, text: str, other: str, axis: str, seeds: list[int]) -> dict | None:
    """Soft replay less another method, test half; None with fewer than three seeds of both."""
    keys = [((text, "soft_replay", s), (text, other, s)) for s in seeds]
    if len(seeds) != 3 or not all(one in runs and two in runs for one, two in keys):
        return None
    pairs = [[np.array(runs[k][axis][1::2]) for k in pair] for pair in keys]
    by_sequence = np.mean([mine - theirs for mine, theirs in pairs], axis=0)
    mean, low, high, p = paired_t([mine.mean() - theirs.mean() for mine, theirs in pairs])
    return dict(mean=mean, t=(low, high), p=p, bootstrap=interval(by_sequence)[1:])


def verdicts(runs: dict, seeds: list[int]) -> tuple[list[str], dict]:
    """The primary comparisons as a Markdown table, and who leads whom by the declared rule."""
    found = {key: compare(runs, *key, seeds) for key in PRIMARY}
    corrected = holm([f["p"] if f else 1.0 for f in found.values()])
    lines = ["| short text | soft replay less | axis | mean | 95% t | Holm's p | bootstrap |"]
    lines += ["|---|---|---|---:|---:|---:|---:|"]
    for (key, f), p in zip(found.items(), corrected, strict=True):
        text, other, axis = key
        row = "NOT RUN | | | |"
        if f:
            f["significant"] = bool(p < 0.05 and f["bootstrap"][0] * f["bootstrap"][1] > 0)
            ranges = (f"{lo:+.4f} to {hi:+.4f}" for lo, hi in (f["t"], f["bootstrap"]))
            row = "{:+.4f} | {} | {:.3f} | {} |".format(f["mean"], next(ranges), p, next(ranges))
        lines.append(f"| {text} | {METHODS[other][0]} | {axis} | {row}")
    leads = {}
    for text, other, _ in PRIMARY:
        both = [found[text, other, axis] for axis in ("stories", "books")]
        if None not in both:
            worse = any(f["mean"] > (0 if f["significant"] else MARGIN) for f in both)
            better = any(f["significant"] and f["mean"] < 0 for f in both)
            leads[f"{text}: soft replay leads {METHODS[other][0]}"] = better and not worse
    return lines, leads


# ------------------------------------------------------------------------------------- print


def spread(values: list[float], form: str = ".3f") -> str:
    mean = f"{np.mean(values):{form}}"
    return mean + (f" +- {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")


def leaderboard(runs: dict, original: dict) -> list[str]:
    """One row a method and text, test half."""
    head = ["method", "short text", "seeds", "story loss", "KL", "drift", "book loss"]
    head += ["at 4,096", "content brings", "length brings", "tokens", "TFLOP", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    cells = {(text, name): [] for text, name in CELLS}
    seeds = {}
    for (text, name, seed), run in runs.items():
        cells[text, name].append(run)
        seeds.setdefault((text, name), []).append(str(seed))
    for (text, name), group in [(("", "original"), [original]), *cells.items()]:
        title, which = METHODS.get(name, ("original",))[0], " ".join(seeds.get((text, name), []))
        if not group:
            lines.append(f"| {title} | {text} | NOT RUN |" + " |" * (len(head) - 3))
            continue
        row = [spread([np.mean(r["stories"][1::2]) for r in group])]
        if "stories_old" in group[0]:
            old = spread([np.mean(r["stories_old"][1::2]) for r in group])
            row[0] += f" (old rotary {old})"
        row += [spread([r[key] for r in group]) for key in ("kl", "drift")]
        row += [spread([np.mean(r[key][1::2]) for r in group]) for key in ("books", "twice")]
        far = {n: np.mean([r["far"][n] for r in group], axis=0) for n in ("true", "other", "cut")}
        content = [f"{m:.3f} ({lo:.3f} to {hi:.3f})" for m, lo, hi in brings(far).values()]
        row += ["-", "-"] if "_without_" in name else content  # the others are not of that book
        if "seconds" in group[0]:
            row += [f"{group[0]['tokens']:,}", f"{group[0]['flops'] / 1e12:.2f}"]
            row += [spread([r["seconds"] for r in group], ".0f")]
        row += [""] * (len(head) - 3 - len(row))
        lines.append(f"| {title} | {text} | {which} | " + " | ".join(row) + " |")
    return lines


def draw(runs: dict, original: dict, path: Path) -> None:
    """Short loss against long loss: lower left is better; the frontier of means drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"own": COLORS[1], "foreign": COLORS[0], "none": COLORS[2]}
    words = {"own": "own samples", "foreign": "War and Peace", "none": "no short text"}
    marks = {"original": {"color": GREY, "ls": "-"}}
    losses = {"original": [np.array([np.mean(original[k][1::2])]) for k in ("stories", "books")]}
    drawn = [cell for cell in CELLS if "_without_" not in cell[1]]  # those read another text
    groups = {
        cell: [[np.mean(r[k][1::2]) for r in group] for k in ("stories", "books")]
        for cell in drawn
        if (group := [r for (*of, _), r in runs.items() if tuple(of) == cell])
    }
    repeated = any(len(pair[0]) > 1 for pair in groups.values())
    alone = []  # beside runs in several seeds one of a single seed is a pale point without a name
    for (text, name), pair in groups.items():
        if repeated and len(pair[0]) == 1:
            alone.append((*pair, colors[text]))
            continue
        label = f"{METHODS[name][0]}, {words[text]}" + ("" if repeated else ", one seed")
        marks[label] = {"color": colors[text], "ls": "-"}
        losses[label] = [np.array(values) for values in pair]
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    short, long = ({name: pair[i] for name, pair in losses.items()} for i in (0, 1))
    points = {name: (short[name].mean(), long[name].mean()) for name in losses}
    draw_points(axes, points, short, {n: v[:, None] for n, v in long.items()}, marks, "original")
    shown = axes.axis()
    for x, y, color in alone:
        axes.plot(x, y, "o", ms=4, color=color, alpha=0.4, zorder=0)
    axes.axis(shown)
    found = [p for name, p in points.items() if name != "original"]
    best = [p for p in found if not any(q[0] <= p[0] and q[1] <= p[1] for q in found if q != p)]
    title = "Lower left is better"
    if len(best) > 1:
        axes.plot(*zip(*sorted(best), strict=True), color="black", lw=0.8, zorder=0)
        title += "; the line joins what nothing named beats on both"
    if alone:
        title += "\npale: other settings, one seed each (results/README.md names them)"
    axes.set(xlabel="loss on stories, nats a token", ylabel="loss on books, nats a token")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m measure.leaderboard", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("base", "own", "foreign", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--long", nargs="+", required=True)
    parser.add_argument("--seeds", default="2024,2025,2026")
    parser.add_argument("--out_dir", type=Path, default=Path("out/leaderboard"))
    parser.add_argument("--cache_dir", default="out/tokens")
    parser.add_argument(
        "--earlier", metavar="JSON", help="an earlier leaderboard.json on this text"
    )
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args(argv)
    try:
        board = [a.out_dir / f"leaderboard.{name}" for name in ("json", "md", "png")]
        refuse_foreign(board[0], {"original", "runs"}, "leaderboard", board[1:])
        score_all(a)
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        raise SystemExit(f"leaderboard: {e}") from None


def read_earlier(path: str | None, original: dict) -> dict[str, dict]:
    """The runs of an earlier leaderboard.json; refused if its original had other losses.

    Such a run has no checkpoint here that could be scored again, so the text must be the same one.
    """
    if not path:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"--earlier {path}: no such file; results/leaderboard.json is one")
    try:
        content = json.loads(Path(path).read_text())
        runs, theirs = dict(content["runs"]), content["original"]
        same_text = all(
            len(theirs[key]) == len(original[key])
            and np.allclose(theirs[key], original[key], atol=1e-3)
            for key in ("stories", "books", "twice")
        )
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"--earlier {path}: not a leaderboard.json of this command ({e})"
        ) from None
    if not same_text:
        raise ValueError(
            f"--earlier {path}: its original was scored on other text; leave --earlier out"
        )
    return runs


def score_all(a) -> None:
    """Train what is missing where a.train says so, score what there is, print who leads."""
    seeds, texts, runs = [int(s) for s in a.seeds.split(",")], open_texts(a), {}
    base = load_checkpoint(a.base)
    digest = {name: len(ids) for name, ids in texts.items()}
    print("sequences:", digest)

    def once(name: str, compute) -> dict:
        return remember(a.out_dir / "scores", {"task": name, "texts": digest}, compute)

    original = once("original", lambda: score(base, base, texts))
    finished = read_earlier(a.earlier, original)
    order = [(*cell, s) for cells, n in BLOCKS for s in seeds[:n] for cell in cells]
    for text, method, seed in order:
        out = a.out_dir / f"{text}-{method}-{seed}"
        if out.name in finished:
            runs[text, method, seed] = finished[out.name]
            continue
        if a.train and not (out / "hf" / "config.json").exists():
            train(a, text, method, seed)
        if (out / "hf" / "config.json").exists():
            model = load_checkpoint(out)
            read = with_book(a, texts, book) if (book := unread(a, method)) else texts
            found = once(out.name, lambda m=model, read=read: score(base, m, read))
            runs[text, method, seed] = found | cost(out, base)
    lines, leads = verdicts(runs, seeds)
    sampled = sampling_flops(base.config, 2000, 511) / 1e12
    table = [*leaderboard(runs, original), "", *lines, ""]
    table += [f"{claim}: {'yes' if yes else 'no'}" for claim, yes in leads.items()]
    table += [f"\nOwn samples cost {sampled:.2f} TFLOP once. {time.strftime('%Y-%m-%d')}."]
    print("\n".join(table))
    content = {"original": original, "runs": {"-".join(map(str, k)): r for k, r in runs.items()}}
    for name, text in (("md", "\n".join(table)), ("json", json.dumps(content))):
        with whole_file(a.out_dir / f"leaderboard.{name}") as f:
            f.write(text + "\n")
    if runs:
        draw(runs, original, a.out_dir / "leaderboard.png")


if __name__ == "__main__":
    main()
