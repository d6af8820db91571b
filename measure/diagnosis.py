"""The paper's own diagnosis: what does a longer window cost before anything is trained?

    python measure/diagnosis.py --base SmolLM2-135M --book jack_sheppard.txt --out_dir out/diagnosis

LongReD (sections 2 and 3) says that scaling the rotary embedding moves a model's hidden states
and attention, and that this drift predicts what is lost on short text. Here one model is read under
ABF, linear, NTK and YaRN scaling, by forward passes alone:

    short text   loss, drift of the hidden states, attention KL and output KL
    copying      nats a token that a passage's earlier occurrence saves, by its distance

Copying is measured against a placebo, another passage in the place of the first occurrence, and
under position ids with a gap, so that no distance needs more tokens than another. The constants are
the plan that results/PLAN.md declares. diagnosis.json, diagnosis.md and diagnosis.png are written
after every row, with NOT RUN for what is missing, and a stopped command continues where it was.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import json
import math
import sys
import sysconfig
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longred import Config, default_theta, rope_scaling
from machine.checkpoints import resolve_checkpoint
from machine.files import digest, refuse_foreign, remember, whole_file, write_json
from machine.formats import load_checkpoint, load_config, rescaled
from machine.keeper import command_line
from machine.tokenizer import load_tokenizer
from measure.demo import prose_lines
from measure.frontier import sequences
from measure.losses import short_text_drift, standard_error, token_losses
from measure.pictures import COLORS, GREY
from model import Llama
from rope_kernels import rope_frequencies

# ------------------------------------------------------------------------------ what is declared

SCALINGS = {"ABF": None, "linear": "linear", "NTK": "ntk", "YaRN": "yarn"}  # name: --rope_type
FACTOR = 4  # target / window; copying is measured at this one
FACTORS = (FACTOR, 2, 8)
ROWS = {"original": None} | {f"{s} x{f}": (s, f) for f in FACTORS for s in SCALINGS}
SEQUENCES = 4  # of each short text
ATTENTION_SEQUENCES = 1  # of these, on which attention maps are compared
PASSAGES = 12
TEXT = 8  # a sequence, and a text that repeats a passage, is window / TEXT tokens long
PASSAGE = 16  # the passage is 1 / PASSAGE of that text
DISTANCES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 31 / 32)  # shares of FACTOR x window
TOLD_APART = 2  # standard errors by which the short losses of two scalings must differ
FORETELLS = 0.9  # a predictor must order this share of the distinguishable pairs as the loss does
PAIRS = 10  # fewer of them decide nothing


# -------------------------------------------------------------------------------------- measures


def scaled(base: Llama, name: str, factor: int) -> Llama:
    """Return a view of the model under a scaling, with the frequencies that a run would give it."""
    window = base.config.max_position_embeddings
    c = Config(original_len=window, target_len=factor * window, rope_type=SCALINGS[name])
    theta = None
    if name == "ABF":
        theta = default_theta(base.config.rope_theta, window, c.target_len)
    config = rescaled(base.config, theta, rope_scaling(c))
    return base.with_frequencies(
        *rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    )


def copy_positions(length: int, passage: int, distance: int) -> tuple[int, int, Tensor]:
    """Return where a text's last passage occurred first, where the gap is, and position ids.

    The first three quarters, in whose middle the first occurrence is, have the positions from 0 on.
    Those of the last quarter, which ends in the passage, place the occurrences `distance` apart.
    """
    gap = length * 3 // 4
    first = (gap - passage) // 2
    skipped = distance - (length - passage - first)
    assert skipped >= 0, f"a distance of {distance} is less than {length} tokens make"
    assert passage < length - gap, (passage, length)
    positions = torch.arange(length)
    positions[gap:] += skipped
    return first, gap, positions


@torch.no_grad()
def copy_gains(model: Llama, text: Tensor, other: Tensor, distances: list[int]) -> list[float]:
    """Measure at each distance how many nats a token the passage's first occurrence saves.

    text: (T,) int64, whose last len(other) tokens are the passage. other: (P,) int64, the placebo,
        which takes the place of the first occurrence in the text that is compared.
    Returns the difference of the mean losses on the passage's P tokens, placebo less passage.
    """
    n, passage = len(other), text[-len(other) :]
    cache, both, gains = model.new_cache(2, len(text)), torch.stack([text, text]), []
    for distance in distances:
        first, gap, positions = copy_positions(len(text), n, distance)
        if not gains:  # what is before the gap is the same at every distance
            both[:, first : first + n] = torch.stack([passage, other])
            model(both[:, :gap], cache=cache)
        cache.length = gap
        hidden, _ = model(both[:, gap:-1], positions[gap:-1], cache=cache)
        seen, new = (token_losses(model, h[-n:], passage).mean() for h in hidden)
        gains.append((new - seen).item())
    return gains


def measure(base: Llama, model: Llama, short: dict, copies: Tensor, distances: list[int]) -> dict:
    """Measure one row: {"short": {text: losses, ...}, "copy": {distance: gains}, ...}."""
    found = {"short": {}, "copy": {}}
    for name, ids in short.items():
        moved = short_text_drift(base, model, ids, attention_sequences=ATTENTION_SEQUENCES)
        each = {key: moved["by_sequence"][key] for key in ("loss", "kl", "drift", "drift_mean")}
        each["drift_by_layer"] = [1 - x for x in moved["cosine"]]
        each["attention_kl_by_layer"] = np.mean(moved["attention_kl"], 1).tolist()
        found["short"][name] = each
    found["frequencies"] = (base.inv_freq / model.inv_freq).log().mean().item()
    if distances:
        others = copies.roll(-1, 0)  # another passage is the next text's
        gains = [
            copy_gains(model, text, other[-(len(text) // PASSAGE) :], distances)
            for text, other in zip(tqdm(copies, "copy", disable=None), others, strict=True)
        ]
        by_distance = np.array(gains).T.tolist()
        found["copy"] = {str(d): x for d, x in zip(distances, by_distance, strict=True)}
    return rounded(found)


def rounded(content):
    """Round every number of JSON's content to 6 digits, and 0 to a 0 without a sign."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 6) + 0.0 if isinstance(content, float) else content


# ------------------------------------------------------------------------------------------ text


@functools.cache
def docstrings() -> str:
    """Return the docstrings of the modules at the top of Python's standard library."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node))
    return "\n\n".join(filter(None, found))


def read_texts(a) -> dict[str, str]:
    topics = (json.loads(line)["text"] for line in prose_lines().splitlines())
    try:
        book = a.book.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{a.book} is not UTF-8 text ({e}); convert it") from None
    return {"docstrings": docstrings(), "help topics": "\n\n".join(topics), a.book.stem: book}


def run_all(a):
    """Measure every row that is missing; yield diagnosis.json's content after each."""
    folder, texts = resolve_checkpoint(a.base), read_texts(a)
    if scaling := load_config(folder).rope_scaling:
        raise ValueError(f"{a.base} is already scaled by {scaling}: need a model without a scaling")
    base, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    tokenizer.check_fits(base.config.vocab_size)
    window = base.config.max_position_embeddings or 0
    length = window // TEXT
    if length < PASSAGE:
        raise ValueError(f"{a.base}: its window is {window}, need {TEXT * PASSAGE} tokens or more")
    ids = {name: np.array(tokenizer.encode_batch([text])[0]) for name, text in texts.items()}
    for name, tokens in ids.items():
        if len(tokens) <= (most := max(SEQUENCES, PASSAGES) * length):
            raise ValueError(f"{name} has {len(tokens):,} tokens, need more than {most:,}")
    short = {name: sequences(tokens, length, SEQUENCES) for name, tokens in ids.items()}
    copies = sequences(ids[a.book.stem], length - 1, PASSAGES)
    distances = [round(share * FACTOR * window) for share in DISTANCES]
    about = {"window": window, "sequences": SEQUENCES, "attention_sequences": ATTENTION_SEQUENCES}
    about |= {"passages": PASSAGES, "text_len": length, "passage_len": length // PASSAGE}
    about["texts"] = {name: digest(text.encode(), 64) for name, text in texts.items()}
    about["files"] = {
        path.name: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    }
    rows = {}
    for title, scaling in ROWS.items():
        print(f"{title} ...", flush=True)
        model = scaled(base, *scaling) if scaling else base
        far = distances if not scaling or scaling[1] == FACTOR else []
        make = functools.partial(measure, base, model, short, copies, far)
        key = {"task": "diagnosis", "row": title, "far": far}
        rows[title] = remember(a.out_dir / "cache", key | about, make)
        yield {"about": about, "rows": rows}


# ------------------------------------------------------------------------------------ statistics


def by_sequence(row: dict, key: str) -> np.ndarray:
    """Return one number a sequence, of all short texts."""
    return np.concatenate([each[key] for each in row["short"].values()])


PREDICTORS = {  # of the short loss, one number a row
    "drift of the last hidden state": lambda r: by_sequence(r, "drift").mean(),
    "drift, mean over blocks": lambda r: by_sequence(r, "drift_mean").mean(),
    "attention KL": lambda r: by_sequence(r, "attention_kl_by_layer").mean(),
    "output KL": lambda r: by_sequence(r, "kl").mean(),
    "change of the frequencies (no model)": lambda r: r["frequencies"],
}


def rank_correlation(x, y) -> float:
    """Return Spearman's rank correlation of numbers without ties; nan for fewer than two."""
    ranks = np.array([np.argsort(np.argsort(values)) for values in (x, y)])
    return float(np.corrcoef(ranks)[0, 1]) if len(x) > 1 else math.nan


def pairs_told_apart(rows: dict) -> list[tuple[str, str]]:
    """Return the pairs of one factor whose short losses differ: (the lower one, the higher one)."""
    found = []
    for one, two in itertools.combinations([name for name in rows if ROWS[name]], 2):
        differences = by_sequence(rows[two], "loss") - by_sequence(rows[one], "loss")
        error = standard_error(differences.tolist())
        if ROWS[one][1] == ROWS[two][1] and abs(differences.mean()) > TOLD_APART * error:
            found.append((one, two) if differences.mean() > 0 else (two, one))
    return found


def predictions(rows: dict) -> list[str]:
    """Print as a Markdown table how well each predictor orders the scalings by their short loss."""
    pairs, scalings = pairs_told_apart(rows), [name for name in rows if ROWS[name]]
    lines = ["| predictor | pairs ordered as the short loss | foretells |"]
    lines[0] += f" rank correlation, factor {FACTOR} | of all |"
    lines += ["|---|---:|---|---:|---:|"]
    for title, predictor in PREDICTORS.items():
        right = sum(predictor(rows[low]) < predictor(rows[high]) for low, high in pairs)
        says = "yes" if right >= FORETELLS * len(pairs) else "no"
        says = says if len(pairs) >= PAIRS else "not decided"
        cells = [f"{right} of {len(pairs)}", says if len(rows) == len(ROWS) else "NOT RUN"]
        for names in ([n for n in scalings if ROWS[n][1] == FACTOR], scalings):
            losses = [by_sequence(rows[name], "loss").mean() for name in names]
            rank = rank_correlation([predictor(rows[n]) for n in names], losses)
            cells.append(f"{rank:.2f} ({len(names)} points)" if len(names) > 2 else "NOT RUN")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


# ----------------------------------------------------------------------------------------- print


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def table(rows: dict) -> list[str]:
    """Print one row for each scaling: losses and their rise ± standard error, copying ± sd."""
    original = rows["original"]
    head = ["scaling", *original["short"], "rise", "drift", "attention KL", "output KL"]
    head += [tokens(int(d)) for d in original["copy"]]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in ROWS:
        if not (row := rows.get(name)):
            lines.append(f"| {name} | NOT RUN |" + " |" * (len(head) - 2))
            continue
        rise = by_sequence(row, "loss") - by_sequence(original, "loss")
        errors = [[*each["loss"]] for each in row["short"].values()] + [rise.tolist()]
        cells = [f"{np.mean(x):.3f} ± {standard_error(x):.3f}" for x in errors]
        cells += [f"{PREDICTORS['drift of the last hidden state'](row):.3f}"]
        cells += [f"{PREDICTORS[key](row):.3f}" for key in ("attention KL", "output KL")]
        for distance in original["copy"]:
            gains = row["copy"].get(distance)
            cells.append(f"{np.mean(gains):.2f} ± {np.std(gains, ddof=1):.2f}" if gains else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(content: dict, path: Path) -> None:
    """Draw the rise of the short loss against drift, and copying against distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, window = content["rows"], content["about"]["window"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    drift = PREDICTORS["drift of the last hidden state"]
    for color, scaling in zip(COLORS, SCALINGS, strict=False):
        places = []
        for factor in sorted(FACTORS):
            if not (row := rows.get(f"{scaling} x{factor}")):
                continue
            rise = by_sequence(row, "loss") - by_sequence(rows["original"], "loss")
            places.append((drift(row), rise.mean(), standard_error(rise.tolist())))
            label = dict(textcoords="offset points", color=color, fontsize=8)
            left.annotate(f"x{factor}", places[-1][:2], (5, -9), **label)
        if places:
            x, y, error = zip(*places, strict=True)
            left.errorbar(x, y, error, fmt="o-", ms=4, lw=1, color=color, label=scaling)
    left.set(xscale="log", xlabel="drift of the last hidden state, 1 - cos")
    left.set(ylabel="rise of the short loss, nats")
    left.set_title("untrained scalings on short text (bars: standard errors)", fontsize=10)
    titles = [name for name, row in rows.items() if row["copy"]]
    for color, title in zip([GREY, *COLORS], titles, strict=False):
        gains = np.array([*rows[title]["copy"].values()])
        error = gains.std(1, ddof=1) / gains.shape[1] ** 0.5
        x = [int(distance) for distance in rows[title]["copy"]]
        right.errorbar(x, gains.mean(1), error, fmt="o-", ms=4, lw=1, color=color, label=title)
    right.axvline(window, color=GREY, ls=":", lw=1)
    right.axhline(0, color=GREY, lw=0.5)
    right.set_xticks(x, map(tokens, x), fontsize=8)
    right.set(xlabel="distance, tokens (dotted: the old window)", ylabel="nats a token saved")
    right.set_title("a repeated passage against another one (bars: standard errors)", fontsize=10)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that the user can correct ends it with a message of one line."""
    parser = argparse.ArgumentParser("python measure/diagnosis.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--base", required=True, help="the original: folder, OUT_DIR, known name or hub id")
    add("--book", required=True, type=Path, metavar="TEXT", help="a book that no run reads")
    add("--out_dir", type=Path, default=Path("out/diagnosis"), help="default: out/diagnosis")
    a = parser.parse_args(argv)
    path = a.out_dir / "diagnosis.json"
    beside = [path.with_suffix(".md"), path.with_suffix(".png")]
    with command_line("diagnosis", argv):
        refuse_foreign(path, {"about", "rows"}, "diagnosis", beside)
        for content in run_all(a):
            write_json(path, content, indent=None)
            lines = [*table(content["rows"]), "", *predictions(content["rows"])]
            with whole_file(beside[0]) as f:
                f.write("\n".join(lines) + "\n")
            try:
                if len(content["rows"]) > 1:
                    draw(content, beside[1])
            except ImportError:
                lines += ["", "for the picture: pip install matplotlib, then the same command"]
        print("\n".join(lines))


if __name__ == "__main__":
    main()
