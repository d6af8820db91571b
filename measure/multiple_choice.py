"""Short-task score of a checkpoint: multiple choice, by the likelihood of each option.

    python -m measure.multiple_choice --base DIR --ckpt DIR [DIR ...] --tasks TASKS_DIR

TASKS_DIR holds JSON files as the `bigbench` package has them (PyPI; a task's task.json or any
NAME.json): {"examples": [{"input": "...", "target_scores": {"option": 0 or 1, ...}}, ...]}.

An option's score is the sum of log p of its tokens behind the question; the likeliest option
answers. Where several options are right one of them is enough; items without options, or without a
right and a wrong one, are left out and counted. A task counts where the original, on even items, is
above chance by three standard errors; all models are then scored on the odd items. The score is the
mean over tasks, the difference to the original has a paired 95% bootstrap interval over the items
of each task. At least --least items (5,000) must be scored, or it says so.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from machine.checkpoints import resolve_checkpoint
from machine.formats import load_checkpoint, load_config
from machine.plan import expand_segments
from machine.tokenizer import Tokenizer, load_tokenizer
from measure.evaluate import fingerprint, remember, token_losses
from model import Llama

TASKS = "social_iqa strategyqa winowhy goal_step_wikihow timedial sports_understanding "
TASKS += "logical_deduction disambiguation_qa physical_intuition"
DRAWS = 10_000  # of the bootstrap


@dataclass
class Item:
    """A question with its options, and which of them are right."""

    question: str
    options: list[str]
    right: list[bool]

    @property
    def chance(self) -> float:
        return sum(self.right) / len(self.right)


def read_task(path: Path) -> tuple[list[Item], int]:
    """(items, number left out). Raises ValueError, naming the file, where it is no such task."""
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
        prefix, suffix = task.get("example_input_prefix", ""), task.get("example_output_prefix", "")
        examples = [(e["input"], e.get("target_scores")) for e in task["examples"]]
        items = [
            Item(prefix + text + suffix, list(scores), [score > 0 for score in scores.values()])
            for text, scores in examples
            if scores
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{path}: no multiple-choice task ({type(e).__name__}: {e}); need examples with input "
            "and target_scores"
        ) from None
    good = [item for item in items if 0 < item.chance < 1]
    return good, len(examples) - len(good)


def find_tasks(folder: Path, names: list[str]) -> dict[str, Path]:
    """NAME -> its file: folder/NAME.json, folder/NAME/task.json, or .../NAME/SUBTASK/task.json."""
    found = {}
    for name in names:
        paths = [folder / f"{name}.json", folder / name / "task.json"]
        paths = [p for p in paths if p.is_file()] or sorted((folder / name).glob("*/task.json"))
        found |= {name if len(paths) == 1 else f"{name}/{p.parent.name}": p for p in paths}
    if not found:
        raise ValueError(f"{folder}: none of {', '.join(names)} lies there as JSON")
    return found


@torch.no_grad()
def answer(model: Llama, tokenizer: Tokenizer, item: Item) -> bool:
    """Whether the likeliest option is right; each is read behind the question and a blank.

    The question's tokens are those of question + " " + option up to where the texts part, so that
    no boundary is forced inside a token. A text beyond the window loses its beginning.
    """
    text = item.question if item.question[-1:].isspace() else item.question + " "
    encoded = tokenizer.encode_batch([text.rstrip()] + [text + o for o in item.options])
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    question, scores = encoded[0], []
    window = model.config.max_position_embeddings or 8192
    for ids in encoded[1:]:
        shared = 0
        while shared < min(len(question), len(ids) - 1) and question[shared] == ids[shared]:
            shared += 1
        n = len(ids) - shared  # tokens of the option
        ids = torch.tensor((bos + list(ids))[-window - 1 :])
        ids = ids.to(model.embed_tokens.weight.device)
        n = min(n, len(ids) - 1)
        hidden, _ = model(ids[None, :-1])
        scores.append(-token_losses(model, hidden[0, -n:], ids[-n:]).sum().item())
    return item.right[int(np.argmax(scores))]


def above_chance(right: list[bool], items: list[Item]) -> bool:
    """By three standard errors of guessing."""
    chance = np.array([item.chance for item in items])
    error = np.sqrt((chance * (1 - chance)).sum())
    return bool(sum(right) - chance.sum() > 3 * error)


def difference(base: list[list[bool]], model: list[list[bool]]) -> tuple[float, float, float]:
    """Mean over tasks of model - base in percent, and its paired 95% bootstrap interval."""
    rng, draws, means = np.random.default_rng(0), np.zeros(DRAWS), []
    for one, two in zip(base, model, strict=True):
        d = 100 * (np.array(two, dtype=float) - np.array(one, dtype=float))
        means.append(d.mean())
        draws += d[rng.integers(len(d), size=(DRAWS, len(d)))].mean(1) / len(base)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean(means)), float(low), float(high)


def compare(a) -> list[str]:
    """The table, as lines of Markdown; every task's answers are kept as they come."""
    tasks = {name: read_task(path) for name, path in find_tasks(a.tasks, a.names).items()}
    folders = {"original": resolve_checkpoint(a.base)}
    folders |= {str(spec): resolve_checkpoint(spec) for spec in a.ckpt}
    tokenizer = load_tokenizer(folders["original"])
    tokenizer.check_fits(load_config(folders["original"]).vocab_size)
    answers = {}
    for name, folder in folders.items():
        model = load_checkpoint(folder, device=a.device, dtype=a.dtype)
        for task, (items, _) in tasks.items():
            key = {"task": f"choice-{Path(task).name}", "checkpoint": fingerprint(folder)}
            key |= {"items": [item.question for item in items], "dtype": str(a.dtype)}

            def ask(model=model, items=items) -> list[bool]:
                return [answer(model, tokenizer, item) for item in items]

            answers[name, task] = remember(a.out_dir / "cache", key, ask)
    counted = [t for t in tasks if above_chance(answers["original", t][::2], tasks[t][0][::2])]
    n = sum(len(answers["original", t][1::2]) for t in counted)
    left_out = sum(out for _, out in tasks.values())
    lines = [f"{len(counted)} of {len(tasks)} tasks count, {n:,} items scored, {left_out} left out"]
    if n < a.least:
        lines.append(f"fewer than the {a.least:,} items that a verdict wants: exploratory")
    if not counted:
        return [*lines, "the original is not above chance by three standard errors on any task"]
    lines += ["", "| model | " + " | ".join(counted) + " | mean | less original, 95% |"]
    lines.append("|---|" + "---:|" * (len(counted) + 2))
    odd = {name: [answers[name, t][1::2] for t in counted] for name in folders}
    for name, rows in odd.items():
        shares = [100 * np.mean(row) for row in rows]
        cells = [f"{share:.1f}" for share in [*shares, np.mean(shares)]]
        mean, low, high = difference(odd["original"], rows)
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's error ends as SystemExit with one line."""
    expand_segments()  # before anything asks for the GPU
    parser = argparse.ArgumentParser("python -m measure.multiple_choice", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--base", required=True, help="the original: folder, OUT_DIR, known name or hub id")
    add("--ckpt", nargs="+", default=[], help="extended checkpoints")
    add("--tasks", type=Path, required=True, help="folder of the tasks' JSON")
    add("--names", nargs="+", default=TASKS.split(), help="tasks in it (default: nine of bigbench)")
    add("--least", type=int, default=5000, help="items for a verdict (default: 5000)")
    add("--out_dir", type=Path, default=Path("out/choice"), help="default: out/choice")
    add("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    a = parser.parse_args(argv)
    a.dtype = torch.bfloat16 if "cuda" in a.device else torch.float32
    try:
        print("\n".join(compare(a)), flush=True)
    except (ValueError, OSError) as e:
        raise SystemExit(f"multiple_choice: {e}") from None


if __name__ == "__main__":
    main()
