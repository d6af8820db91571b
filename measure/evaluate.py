"""What an extension of the context window kept, and what it gained.

    python -m measure.evaluate compare --base DIR --ckpt OUT [OUT ...] --data TEXT... --lengths 2K
    python -m measure.evaluate samples stories.jsonl --base DIR --n_samples 400
    python -m measure.evaluate corpus selected.jsonl --base DIR --ckpt DIR --data TEXT...

The first, whose name may be left out, compares the original with any number of extended checkpoints
and leaves report.md, results.json and pictures in --out_dir. The second writes short text sampled
from a model itself, the third LongRecipe's training text (measure/select_corpus.py). From any other
folder the command is python PATH/measure/evaluate.py.

    task        question, and where it is answered
    ----------  ------------------------------------------------------------------------------------
    kept        short text: loss, KL(original || it), first choices, drift  (short_text_drift)
    position    long text: loss by position, whole and with the window cut  (losses_by_sequence)
    far         long text: what far text adds by its content, and what by its length alone: the
                same tokens behind the far part of another document  (measure/far_context.py)
    repeat      is a passage better known the second time, and from how far?  (repeat_scores)
    niah_...    needles, RULER's retrieval tasks (arXiv 2404.06654), in our own words  (make_sample)

Perplexity falls when a model merely tolerates distance, and a cut window costs a model that only
relies on having many tokens. Therefore two numbers here show use of far text: the loss of the same
tokens behind the far part of another document, and the loss of a passage that was there before.
Give --data and --short_data the lists that longred.py was given: what it held out is read here.
The row of a checkpoint is kept in OUT_DIR/cache when it ends, by the checkpoint's content and the
settings: a stopped command continues with the next row, and one more --ckpt costs only itself.
"""

import argparse
import functools
import json
import math
import os
import re
import statistics
import sys
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from longred import whole_number
from machine.checkpoints import open_tensors, resolve_checkpoint
from machine.corpus import at_commit, tokenize
from machine.files import digest, finite, lock_folder, refuse_foreign, remember, whole_file
from machine.formats import load_checkpoint, load_config
from machine.keeper import command_line
from machine.log import command, outlive_readers
from machine.plan import available_memory, expand_segments, parameter_count
from machine.samples import PART_TOKENS, sample_ids
from machine.settings import check_device, is_at_hand
from machine.states import read_run, weight_fingerprints
from machine.tokenizer import Tokenizer, load_tokenizer
from measure.far_context import columns, far_losses, other_documents, shuffled
from measure.losses import (
    BATCH_TOKENS,
    losses_by_sequence,
    read,
    short_text_drift,
    standard_error,
)
from measure.pcd import PCD, contrast, local_view
from measure.pcd import generate as by_contrast
from measure.pictures import draw
from measure.select_corpus import select_corpus
from model import Llama, hf_name, merge_weights

FORMAT = 5  # of a remembered result; raised when what is measured changes


@torch.no_grad()
def repeat_scores(
    model: Llama, sequences: Tensor, passage: int, cue: int | None = None, pcd: dict | None = None
) -> Tensor:
    """Score the last `passage` tokens of each sequence, without the first `cue` of them.

    cue: if None, 8, or half of a passage under 16 tokens, so that some tokens are left to count.
    sequences: (B, T) int64. pcd: predict by contrast, settings as in pcd.py; a token outside its
    gamma likeliest ones has probability 0 then, so that only first choices can be compared.
    Returns (B, 2) float64, means over the counted tokens: loss in nats; 1 where the first choice
    was the token that came, else 0.
    """
    models, out = [model], []
    cue = min(8, passage // 2) if cue is None else cue
    if pcd:
        models.append(local_view(model, pcd))
    batch, counted = max(1, BATCH_TOKENS // sequences.shape[1]), passage - cue
    for part in tqdm(sequences.split(batch), desc="repeat", leave=False, disable=None):
        tails = []  # for each model: what the counted tokens are predicted from
        for each in models:
            chunks = [
                hidden[:, max(0, part.shape[1] - 1 - start - counted) :]
                for start, hidden in read(each, part[:, :-1])
            ]
            tails.append(torch.cat(chunks, 1))
        for row, labels in enumerate(part[:, -counted:]):
            views = [model.logits(tail[row]).float() for tail in tails]
            logits = contrast(*views, pcd["beta"], pcd["gamma"]) if pcd else views[0]
            nll = F.cross_entropy(logits, labels).double()
            out.append(torch.stack([nll, (logits.argmax(-1) == labels).double().mean()]).cpu())
    return torch.stack(out)


def repeat_sequences(
    tokens: np.ndarray, length: int, depths: list[float], n: int, seed: int
) -> tuple[Tensor, int]:
    """Return sequences that end in a passage which also occurs earlier, at each depth, or does not.

    tokens: held-out text. depths: 0 = the passage opens the sequence, 1 = it comes just before
        its repetition.
    Returns ((len(depths) + 1) * n, length) int64, per sample the depths in order and then the
    control, whose passage is new; and the passage's length.
    """
    passage = min(64, length // 8)
    room = length - 2 * passage
    rows = []
    for index in range(n):
        rng = np.random.default_rng([seed, zlib.crc32(b"repeat"), length, index])
        first = np.resize(np.roll(tokens, -rng.integers(len(tokens))), length)
        # As the control does, what is read again follows its own text, but at depth 1.
        text, repeated = first[passage : length - passage], first[length - passage :]
        for depth in depths:
            place = round(depth * room)
            rows.append(np.concatenate([text[:place], repeated, text[place:], repeated]))
        rows.append(first)
    return torch.from_numpy(np.stack(rows)), passage


def repeat(a: Namespace, model: Llama, long: Tensor, length: int, pcd: dict | None) -> dict:
    """Compare passages that were read before with new ones at one length, a.samples at each depth.

    long: (B, T) int64, held-out text. Returns losses in nats on seen and new passages and shares
    of right first choices; under PCD (`repeat_scores`) only the latter.
    """
    tokens = long.flatten().numpy()
    ids, passage = repeat_sequences(tokens, length, a.depths, a.samples, a.seed)
    scores = repeat_scores(model, ids.to(a.device), passage, pcd=pcd)
    scores = scores.view(a.samples, -1, 2)
    errors = {}  # over samples: the depths of one share their text
    for i, right in ((0, ""), (1, "_right")):
        errors |= {f"seen{right}": standard_error(scores[:, :-1, i].mean(1).tolist())}
        errors |= {f"new{right}": standard_error(scores[:, -1, i].tolist())}
    scores = scores.mean(0)  # (depths + 1, 2), the last a new passage
    seen, (new, new_right) = scores[:-1], scores[-1].tolist()
    found = {"seen_right": seen[:, 1].mean().item(), "new_right": new_right, "errors": errors}
    if pcd is None:
        found |= {"seen": seen[:, 0].mean().item(), "new": new, "depths": a.depths}
        found["by_depth"] = (new - seen[:, 0]).tolist()
    return found


# -------------------------------------------------------------------------------------- needles
#
# Construction: RULER's paper, section 3, and its published settings. Differs: sentences are our
# own; the haystack is the user's held-out text instead of essays; words are drawn from that text
# instead of a list; the room for a number is 32 tokens instead of 128, and no answer has more than
# an eighth of the length. RULER's other tasks (several values or keys at once, variable tracking,
# word counting, questions) are left to RULER itself.

# haystack, kind of keys, kind of values, needles with a key (one of them is asked for)
NIAH = {
    "niah_single_1": ("noise", "words", "number", 1),
    "niah_single_2": ("text", "words", "number", 1),
    "niah_single_3": ("text", "words", "uuid", 1),
    "niah_multikey_1": ("text", "words", "number", 4),
    "niah_multikey_2": ("needles", "words", "number", 1),
    "niah_multikey_3": ("needles", "uuid", "uuid", 1),
}
NOISE = "The wind turns. Rain falls and the river runs on. Night comes, and then day again. "
TASKS = ["kept", "position", "far", "repeat", "niah_single_2", "niah_multikey_1"]  # the default
TASKS_ALL = ["kept", "position", "far", "repeat", *NIAH]


@dataclass
class Sample:
    prompt: np.ndarray  # (length - n_new,) int64
    answer: str
    n_new: int  # tokens of room for the answer
    depth: float  # of the needle that is asked for, 0 = start of the haystack


class Source:
    """A tokenizer, and text with its words and ends of sentences, of which samples are made."""

    def __init__(self, tokenizer: Tokenizer, tokens: np.ndarray):
        self.tokenizer, self.tokens = tokenizer, tokens
        text = tokenizer.decode(tokens[:1_000_000].tolist())
        # RULER's room for answers is in tokens of about 4 characters.
        self.stretch = max(1.0, 4 * min(len(tokens), 1_000_000) / len(text))
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        seen = np.unique(np.concatenate([tokens, self.encode(NOISE + "\n")]))
        closing = [i for i in seen if tokenizer.decode([int(i)]).rstrip(" ")[-1:] in list(".!?\n")]
        self.sentence_ends = np.array(closing, dtype=np.int64)
        if len(self.words) < 100:
            raise ValueError(
                f"--data holds {len(self.words)} different words of 4 to 9 small letters in its "
                "held-out part, needles need 100; add text or leave niah_... out of --tasks"
            )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode_batch([text])[0], dtype=np.int64)

    def draw(self, rng: np.random.Generator, kind: str, n: int) -> list[str]:
        """Return n different pairs of words, 7-digit numbers, or uuids."""
        if kind == "words" and n > len(self.words) ** 2:
            raise ValueError(f"{n} pairs of words of {len(self.words)} different ones")
        found = {}  # a set that keeps its order
        while len(found) < n:
            if kind == "number":
                new = str(rng.integers(10**6, 10**7))
            elif kind == "uuid":
                new = re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", rng.bytes(16).hex())
            else:
                new = "-".join(self.words[i] for i in rng.integers(len(self.words), size=2))
            found[new] = None
        return list(found)


def make_sample(
    source: Source, task: str, length: int, depth: float, rng: np.random.Generator
) -> Sample:
    """Make a prompt and its answer; prompt and room for the answer are exactly `length` tokens.

    depth: where the needle asked for is in the haystack, to the nearest end of a sentence. The
        others are at random depths.
    Raises ValueError if the task does not fit the length.
    """
    haystack, key_kind, value_kind, n_keys = NIAH[task]
    n_more = length // 8 if haystack == "needles" else 0  # more than fit
    keys = source.draw(rng, key_kind, n_keys + n_more)
    values = source.draw(rng, value_kind, n_keys + n_more)
    state = f" One secret {value_kind} of {{}} is {{}}."
    stated = [state.format(*pair) for pair in zip(keys, values, strict=True)]
    depths = [depth, *rng.random(n_keys)[1:].tolist()]
    what = f"secret {value_kind} of {keys[0]}"
    head = f"Secret {value_kind}s are hidden in this text. Learn them: some will be asked for.\n"
    tail = f"\nWhat is the {what}, as hidden in the text above? Answer: One {what} is"
    haystack = "".join(stated[n_keys:]) or haystack
    bos = [source.tokenizer.bos_id] if source.tokenizer.add_bos else []
    head, tail = np.concatenate([bos, source.encode(head)]).astype(np.int64), source.encode(tail)
    n_new = min(math.ceil((128 if value_kind == "uuid" else 32) * source.stretch), length // 8)
    needles, room = (
        [source.encode(s) for s in stated[:n_keys]],
        length - n_new - len(head) - len(tail),
    )
    try:
        if (n_answer := len(source.encode(" " + values[0]))) > n_new:
            raise ValueError(f"its answer takes {n_answer}, above an eighth")
        middle = _bury(source, haystack, needles, depths, room, rng)
    except ValueError as e:
        raise ValueError(f"{task} does not fit {length} tokens: {e}") from None
    prompt = np.concatenate([head, middle, tail])
    assert len(prompt) + n_new == length, (task, len(prompt), n_new, length)
    return Sample(prompt, values[0], n_new, depth)


def _bury(source, haystack: str, pieces: list, depths: list, room: int, rng) -> np.ndarray:
    """Put each piece at the end of the sentence nearest to its depth; `room` tokens in all."""
    n = room - sum(len(p) for p in pieces)
    if n < 0:
        raise ValueError(f"{-n} tokens too few")
    if haystack == "text":
        filler = np.resize(np.roll(source.tokens, -rng.integers(len(source.tokens))), n)
    else:
        filler = np.resize(source.encode(NOISE if haystack == "noise" else haystack), n)
    gaps = np.flatnonzero(np.isin(filler, source.sentence_ends)) + 1
    gaps = np.concatenate([[0], gaps, [n]])  # between sentences
    out, last = [], 0
    for i in np.argsort(depths, kind="stable"):
        gap = int(gaps[np.abs(gaps - depths[i] * n).argmin()])
        out += [filler[last:gap], pieces[i]]
        last = gap
    return np.concatenate([*out, filler[last:]])


def found(text: str, answer: str) -> bool:
    """Return whether the text holds the answer as a whole word, in any case."""
    return answer.lower() in re.findall(r"[\w-]+", text.lower())


def ask(generate: Callable, samples: list[Sample], tokenizer: Tokenizer) -> list[float]:
    """Score each sample 1.0 or 0.0. All are of one task and length, so a batch needs no padding.

    generate: (prompts (B, T) int64, n_new) -> (B, n_new) int64.
    """
    batch = max(1, BATCH_TOKENS // (len(samples[0].prompt) + samples[0].n_new))
    scores = []
    for start in tqdm(range(0, len(samples), batch), desc="ask", leave=False, disable=None):
        part = samples[start : start + batch]
        new = generate(torch.from_numpy(np.stack([s.prompt for s in part])), part[0].n_new)
        texts = [tokenizer.decode(ids) for ids in new.tolist()]
        scores += [float(found(text, s.answer)) for text, s in zip(texts, part, strict=True)]
    return scores


def needles(
    a: Namespace, model: Llama, source: Source, task: str, length: int, pcd: dict | None
) -> dict:
    """Return the share of needles found in one task at one length, a.samples at each depth.

    Returns {"skipped": why} where the task does not fit the length.
    """

    def generate(prompts: Tensor, n_new: int) -> Tensor:
        prompts = prompts.to(a.device)
        plain = pcd is None
        made = model.generate(prompts, n_new) if plain else by_contrast(model, prompts, n_new, pcd)
        return made[:, prompts.shape[1] :].cpu()

    samples = []
    try:
        for i in tqdm(range(len(a.depths) * a.samples), desc="write", leave=False, disable=None):
            rng = np.random.default_rng([a.seed, zlib.crc32(task.encode()), length, i])
            samples.append(make_sample(source, task, length, a.depths[i // a.samples], rng))
    except ValueError as e:
        return {"skipped": str(e)}
    scores = ask(generate, samples, source.tokenizer)
    by_depth = np.array(scores).reshape(len(a.depths), -1).mean(1).tolist()
    share = {"exact": statistics.mean(scores), "error": standard_error(scores)}
    return share | {"depths": a.depths, "by_depth": by_depth}


# ------------------------------------------------------------------------------- a comparison


def find_run(spec: str) -> tuple[str, Path | None, str]:
    """Split [NAME=]CHECKPOINT into (name, folder, ""), or (name, None, how far the run has come).

    Runs given one NAME share a row, as mean +- standard deviation. Raises ValueError where there is
    neither a checkpoint nor a run that will export one.
    """
    name, path = spec.split("=", 1) if "=" in spec and not Path(spec).exists() else ("", spec)
    run = Path(path) / "longred.json"
    if run.is_file() and not (run.parent / "hf" / "config.json").is_file():
        config, log = read_run(run.parent)["config"], run.with_name("log.jsonl")
        steps = int(config.get("steps") or 0) + int(config.get("replay_steps") or 0)
        done = len(log.read_bytes().splitlines()) if log.is_file() else 0
        name = name or Path(os.path.abspath(path)).name  # "." has none
        return name, None, f"unfinished, {done} of {steps} steps"
    folder = resolve_checkpoint(path)
    own = Path(os.path.abspath(folder))
    own = own.parent if own.name == "hf" else own
    return name or (own.name if Path(path).is_dir() else Path(path).name), folder, ""


@dataclass
class Texts:
    """The text that all checkpoints are measured on."""

    short: Tensor  # (B, original_len + 1)
    long: Tensor  # (B, longest + 1)
    source: Source | None
    original_len: int
    lengths: list[int]
    far: dict[str, Tensor] | str  # other far parts for `long` (B, T - original_len), or why not

    @property
    def has_far(self) -> bool:
        return isinstance(self.far, dict)


def row(
    a: Namespace,
    texts: Texts,
    folder: Path,
    base: Path,
    pcd: dict | None = None,
    share: float = 0.0,
) -> dict:
    """Return one checkpoint's results, {task: result}, measured now or found in OUT_DIR/cache.

    pcd: of measure.pcd.generate; where given, only the tasks that ask for tokens are done.
    share: of the original, averaged into the weights (model.merge_weights).
    """
    far = {name: _digest(ids) for name, ids in texts.far.items()} if texts.has_far else None
    key = {"format": FORMAT, "task": "row", "checkpoint": weight_fingerprints(folder)}
    key |= {"base": weight_fingerprints(base)}
    key |= {"share": share, "pcd": pcd, "dtype": str(a.dtype), "tasks": sorted({*a.tasks})}
    key |= {"short": _digest(texts.short), "long": _digest(texts.long), "far": far}
    key |= {"original_len": texts.original_len, "lengths": texts.lengths}
    key |= {"seed": a.seed, "samples": a.samples, "depths": a.depths}
    key |= {"tokenizer": texts.source.tokenizer.fingerprint if texts.source else None}
    compute = functools.partial(measure, a, texts, folder=folder, base=base, pcd=pcd, share=share)
    return remember(Path(a.out_dir) / "cache", key, compute)


def measure(
    a: Namespace, texts: Texts, *, folder: Path, base: Path, pcd: dict | None, share: float
) -> dict:
    """Measure the row of a checkpoint: every task's result."""

    def load(path: Path) -> Llama:
        return load_checkpoint(path, device=a.device, dtype=a.dtype)

    model, out = load(folder), {}
    model = merge_weights(model, load(base), share) if share else model
    long, edges = texts.long.to(a.device), _edges(texts.original_len, texts.lengths)
    tasks = a.tasks if pcd is None else [t for t in a.tasks if t in ("repeat", *NIAH)]
    for task in dict.fromkeys(tasks):
        print(f"  measuring {task}", flush=True)
        if task == "kept":
            original = model if folder == base else load(base)
            out[task] = short_text_drift(original, model, texts.short.to(a.device))
            del original  # an 8B model, which what follows does not need
        elif task == "position":
            whole = cut = by_position(model, long, None, edges)
            if texts.lengths[-1] > texts.original_len:
                cut = by_position(model, long, texts.original_len, edges)
            out[task] = {"whole": whole, "cut": cut}
        elif task == "far":
            if texts.has_far:
                out[task] = far_losses(model, long, texts.original_len, texts.far)
        elif task == "repeat":
            out[task] = {str(n): repeat(a, model, texts.long, n, pcd) for n in texts.lengths}
        else:
            out[task] = {
                str(n): needles(a, model, texts.source, task, n, pcd) for n in texts.lengths
            }
    return out


def by_position(model: Llama, long: Tensor, window: int | None, edges: list[int]) -> dict:
    """Return {"nll": loss at each position, "spans": each sequence's means between the edges}."""
    losses = losses_by_sequence(model, long, window)
    spans = [losses[:, lo:hi].mean(1).tolist() for lo, hi in zip(edges, edges[1:], strict=False)]
    nll = [round(nll, 4) for nll in losses.mean(0).tolist()]
    return {"nll": nll, "spans": [[round(nll, 6) for nll in span] for span in spans]}


def _edges(original_len: int, lengths: list[int]) -> list[int]:
    """Return the positions between which a loss is reported: 0, the old window, each length."""
    return sorted(n for n in {0, original_len, *lengths} if n <= lengths[-1])


def _digest(ids: Tensor) -> str:
    return digest(ids.numpy().tobytes())


def summarize(result: dict, original_len: int, lengths: list[int], asked: dict) -> dict:
    """Return one checkpoint's numbers as {table's title: {column: (number, its error)}}.

    asked: {length: the needle tasks of its mean}. Errors are standard errors of a mean over
    sequences, passages or questions; None where there was one.
    """
    tables = {}
    if "kept" in result:
        k = result["kept"]
        error = {name: standard_error(each) for name, each in k["by_sequence"].items()}
        tables[f"Kept: short text at {original_len:,}"] = {
            "loss": (k["loss"], error["loss"]),
            "KL(original, it)": (k["kl"], error["kl"]),
            "same first choice, %": (100 * k["same_top1"], _times(100, error["same_top1"])),
            "drift (1 - cos), last": (1 - k["cosine"][-1], error["drift"]),
            "drift, mean of layers": (1 - statistics.mean(k["cosine"][1:]), error["drift_mean"]),
            "attention KL": (float(np.mean(k["attention_kl"])), None),
        }
    if "position" in result:
        tables |= _by_position(result["position"], original_len, lengths)
    if "far" in result:
        tables[f"Gained: what text beyond {original_len:,} tokens adds, nats"] = {
            column: (value, None) for column, value in columns(result["far"]).items()
        }
    if "repeat" in result:
        read = "in a passage read before and a new one, %"
        loss = tables["Gained: loss on a passage read before, and on a new one"] = {}
        right = tables[f"Gained: first choices that were right, {read}"] = {}
        for n, r in result["repeat"].items():
            for name in ("seen", "new"):
                column = f"{name} at {int(n):,}"
                if name in r:
                    loss[column] = r[name], r["errors"][name]
                error = _times(100, r["errors"][f"{name}_right"])
                right[column] = 100 * r[f"{name}_right"], error
    for length in lengths:
        scores = {t: r[str(length)] for t, r in result.items() if t in NIAH and str(length) in r}
        scores = {t: r for t, r in scores.items() if "exact" in r}
        row = {t: (100 * r["exact"], _times(100, r["error"])) for t, r in scores.items()}
        if asked[length] and set(asked[length]) <= set(row):
            values, errors = zip(*(row[t] for t in asked[length]), strict=True)
            error = None if None in errors else math.hypot(*errors) / len(errors)
            row["mean"] = statistics.mean(values), error
        tables[f"Gained: needles found at {length:,}, %"] = row
    return {t: row for t, row in tables.items() if row}


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def _by_position(found: dict, original_len: int, lengths: list[int]) -> dict:
    """Make the two tables of loss by position. A cut window is compared text by text."""
    edges = _edges(original_len, lengths)
    whole, cut = (found[name]["spans"] for name in ("whole", "cut"))
    losses, gains = {}, {}
    for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False)):
        span = f"{lo + 1:,}-{hi:,}"
        losses[span] = statistics.mean(whole[i]), standard_error(whole[i])
        gain = [b - a for a, b in zip(whole[i], cut[i], strict=True)]
        if lo >= original_len:
            gains[span] = statistics.mean(gain), standard_error(gain)
    return {
        "Gained: loss by position, the whole text before it read": losses,
        f"Loss with the window cut to {original_len:,} tokens, less that above, nats": gains,
    }


def fitting_tasks(results: list, lengths: list[int]) -> tuple[dict[int, list[str]], list[str]]:
    """Return {length: the needle tasks that every row did}, and a line for each one left out."""
    tasks = list(dict.fromkeys(t for _, _, result in results for t in result if t in NIAH))
    done, why = {length: list(tasks) for length in lengths}, {}
    for _, _, result in results:
        for task in [t for t in tasks if set(result) & set(NIAH)]:
            for length in lengths:
                found = result.get(task, {}).get(str(length), {})
                if "exact" not in found and task in done[length]:
                    done[length].remove(task)
                    why[found.get("skipped", f"{task} at {length}: not finished")] = None
    return done, list(why)


def write_report(a: Namespace, texts: Texts, results: list, unfinished: list) -> str:
    """Write report.md and results.json into a.out_dir and return the report."""
    asked, left_out = fitting_tasks(results, texts.lengths)
    named, errors = {}, {}
    for name, _, result in results:
        for title, row in summarize(result, texts.original_len, texts.lengths, asked).items():
            for column, (value, error) in row.items():
                cells = named.setdefault(title, {}).setdefault(name, {})
                cells.setdefault(column, []).append(value)
                errors.setdefault(title, {}).setdefault(name, {})[column] = error
    lines = [f"# {a.base}, window {texts.original_len:,}, and its extensions\n"]
    lines += [
        f"Held-out text: {len(texts.long)} sequences of {texts.long.shape[1] - 1:,} tokens"
        f", {len(texts.short)} short ones. Losses in nats a token. {a.samples} passages or "
        f"questions at each of {len(a.depths)} depths. {a.dtype} on {a.device}. After +-: where "
        "runs share a name the standard deviation over them, else the standard error of a mean "
        "over sequences or questions; digits go as far as it does.\n"
    ]
    for title, rows in named.items():
        lines += [f"## {title}\n", table(rows, errors[title]) + "\n"]
    if any(task in NIAH for task in a.tasks):
        for length, tasks in asked.items():
            lines += [
                f"the needles' mean at {length:,} is over: {', '.join(tasks) or 'no task'}.\n"
            ]
        lines += [f"Left out of it: {why}.\n" for why in left_out]
    if "far" in a.tasks and not texts.has_far:
        lines += [f"Far context is not measured: {texts.far}.\n"]
    lines += [f"{name}: {why}" for name, why in unfinished]
    report = "\n".join(lines)
    out_dir = Path(a.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [{"name": n, "checkpoint": f and str(f), **r} for n, f, r in results]
    content = {"settings": vars(a), "tables": named, "errors": errors, "runs": runs}
    text = json.dumps(finite(content | {"unfinished": unfinished}), indent=1, default=str)
    with whole_file(out_dir / "results.json") as f:  # str: of dtypes
        f.write(text)
    with whole_file(out_dir / "report.md") as f:
        f.write(report + "\n")
    return report


def table(rows: dict[str, dict[str, float | list[float]]], errors: dict | None = None) -> str:
    """Print {row: {column: a number, or one from each run}} as a Markdown table.

    errors: {row: {column: standard error or None}} of the single numbers.
    """
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        of_row = (errors or {}).get(name, {})
        cells = [_cell(row[c], of_row.get(c)) if c in row else "-" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | list[float], error: float | None = None) -> str:
    """Print a mean and its error, to the error's first digit (the second if the first is a 1)."""
    values = value if isinstance(value, list) else [value]
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = statistics.mean(values)
    error = statistics.stdev(values) if len(values) > 1 else error
    if not error or not math.isfinite(error):
        form = ".3f" if mean == 0 or abs(mean) >= 0.01 else ".4f" if abs(mean) >= 1e-3 else ".1e"
        return f"{mean:{form}}" + (f" +- {error:{form}}" if len(values) > 1 else "")
    digits = -math.floor(math.log10(error))
    digits += int(error * 10**digits) == 1
    if digits > 5:
        return f"{mean:.1e} +- {error:.0e}"
    shown = max(0, digits)
    return f"{round(mean, digits) + 0.0:.{shown}f} +- {round(error, digits):.{shown}f}"


# ------------------------------------------------------------------------- a model's own text


def write_samples(a: Namespace) -> None:
    """Sample texts from the model, each from its BOS token (else EOS) to its EOS token."""
    model = load_checkpoint(a.base, device=a.device, dtype=a.dtype)
    length = a.length or model.config.max_position_embeddings
    if not length:
        raise ValueError("--length is missing: Meta's params.json does not say the window")
    if length < 2 or a.n_samples < 1 or not 0 <= a.temperature < math.inf or a.seed < 0:
        raise ValueError(
            f"--length {length} --n_samples {a.n_samples} --temperature {a.temperature} --seed "
            f"{a.seed}: need at least 2 tokens, 1 text, and numbers of at least 0"
        )
    each = max(1, min(50, PART_TOKENS // length))
    generator = torch.Generator(a.device).manual_seed(a.seed)
    tokenizer = load_tokenizer(resolve_checkpoint(a.base))
    with whole_file(a.file) as f, tqdm(total=a.n_samples, unit="text") as bar:
        for start in range(0, a.n_samples, each):
            n = min(each, a.n_samples - start)
            texts = sample_ids(model, tokenizer, n, length, generator, a.temperature)
            texts = ([i for i in ids if i != tokenizer.eos_id] for ids in texts)
            f.writelines(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in texts)
            bar.update(n)


# ---------------------------------------------------------------------------------- the command


JOBS = {  # its flags in short, and what it does
    "compare": (
        "--base DIR --ckpt OUT [OUT ...] [flags]",
        "measure the original and its extensions; report, numbers and pictures",
    ),
    "samples": (
        "FILE.jsonl --base DIR [flags]",
        "write short text sampled from a model itself, as a .jsonl",
    ),
    "corpus": (
        "FILE.jsonl --base DIR --ckpt DIR --data TEXT... [flags]",
        "write LongRecipe's training text, by what extending changed most, as a .jsonl",
    ),
}
# The first flag of each group -> what the group is about, for --help.
GROUPS = {
    "--data": "text",
    "--tasks": "what is asked",
    "--keep": "what is written",
    "--out_dir": "the run and its machine",
}


def parse_args(argv: list[str] | None) -> Namespace:
    """Parse the flags of a job; if no job is named, those of compare."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in (*JOBS, "-h", "--help"):
        argv = ["compare", *argv]
    prog = "python -m measure.evaluate"
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    hint = f"flags of a job: {prog} JOB --help; without a job's name: compare"
    parser = argparse.ArgumentParser(prog, epilog=hint, **form)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for job, (usage, what) in JOBS.items():
        lengths = "Lengths may be written 4K, 32K, 128K (K = 1,024)."
        usage = f"{prog} {job} {usage}"
        one = jobs.add_parser(job, help=what, description=what, usage=usage, epilog=lengths, **form)
        _add_flags(job, one)
        one.error = parser.error = functools.partial(_refuse, argv[0])
    a = parser.parse_args(argv)
    a.dtype = getattr(torch, a.dtype or ("bfloat16" if "cuda" in a.device else "float32"))
    return a


def _refuse(job: str, message: str) -> None:
    all_flags = command("measure/evaluate.py", job, "--help")
    raise SystemExit(f"evaluate: {message}; all flags: {all_flags}")


def _add_flags(job: str, parser: argparse.ArgumentParser) -> None:
    """Add one job's flags, out of the list of every flag with the jobs that read it."""
    group = parser.add_argument_group("needed")

    def add(jobs: str, *names, **settings) -> None:
        nonlocal group
        if names[0] in GROUPS:  # a group without flags is not printed
            group = parser.add_argument_group(GROUPS[names[0]])
        if job in jobs.split():
            group.add_argument(*names, **settings)

    def numbers(kind: Callable) -> Callable:
        return lambda text: [kind(part) for part in text.split(",")]

    add("samples corpus", "file", metavar="FILE.jsonl", help="what to write")
    both, every, integers = "compare corpus", " ".join(JOBS), {"type": whole_number, "metavar": "N"}
    original = "the original: folder, OUT_DIR, known name or hub id"
    add(every, "--base", required=True, metavar="DIR", help=original)
    extended = "extended checkpoints; those given one NAME share a row (default: none)"
    add("compare", "--ckpt", nargs="+", default=[], metavar="[NAME=]DIR", help=extended)
    add("corpus", "--ckpt", nargs=1, required=True, metavar="DIR", help="the extended checkpoint")
    long = "long text: files, .jsonl, folders, globs"
    long += " (default: the first run's)" if job == "compare" else ""
    add(both, "--data", nargs="+", required=job == "corpus", metavar="TEXT", help=long)
    short = "short text, for what was kept (default: --data; without that the first run's)"
    add("compare", "--short_data", nargs="+", metavar="TEXT", help=short)
    many = "held-out tokens of long and of short text" if job == "compare" else "tokens of --data"
    many += " (default: 65536)"
    add(both, "--eval_tokens", default=65536, help=many, **integers)
    run = " (default: as the first run; with --data: " if job == "compare" else " (default: "
    eos = f"documents end with EOS{run}where the tokenizer has one)"
    add(both, "--add_eos", action=argparse.BooleanOptionalAction, default=None, help=eos)
    bad = f"leave out and count malformed records{run}no)"
    add(both, "--skip_bad_lines", action="store_true", help=bad)
    tokens = "where tokenised text is kept (default: out/tokens)"
    add(both, "--cache_dir", default="out/tokens", metavar="DIR", help=tokens)
    tasks = f"of {' '.join(TASKS_ALL)} (default: {' '.join(TASKS)})"
    tasks = {"default": TASKS, "choices": TASKS_ALL, "metavar": "TASK", "help": tasks}
    add("compare", "--tasks", nargs="+", **tasks)
    lengths = "in tokens (default: the original window, doubled up to the target)"
    add("compare", "--lengths", type=numbers(whole_number), metavar="N,N", help=lengths)
    window = "the original window, in tokens (default: the original's own)"
    add("compare", "--original_len", **integers, help=window)
    depths = {"default": [0.0, 0.25, 0.5, 0.75, 1.0], "metavar": "X,X"}
    where = "of needles and passages, 0 to 1 (default: 0,0.25,0.5,0.75,1)"
    add("compare", "--depths", type=numbers(float), help=where, **depths)
    ask = "questions or passages a depth (default: 10)"
    add("compare", "--samples", default=10, help=ask, **integers)
    merge = "shares of the original to average each extension with, a row each (default: none)"
    add("compare", "--merge", type=numbers(float), default=[], metavar="X,X", help=merge)
    pcd = "ask repeat and the needles again, by contrast, PCD (default: no)"
    add("compare", "--pcd", action="store_true", help=pcd)
    real = {"type": float, "metavar": "X"}
    add("corpus", "--keep", default=0.3, help="of a document's tokens (default: 0.3)", **real)
    add("samples", "--n_samples", default=400, help="texts (default: 400)", **integers)
    longest = "tokens in a text at most (default: the window)"
    add("samples corpus", "--length", help=longest, **integers)
    add("samples", "--temperature", default=1.0, help="of sampling (default: 1.0)", **real)
    add("compare", "--out_dir", default="out/evaluate", metavar="DIR", help="default: out/evaluate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add(every, "--device", default=device, help="cuda or cpu (default: cuda where there is one)")
    dtypes = ["float32", "bfloat16"]
    add(every, "--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    add(every, "--seed", default=2024, help="of every draw (default: 2024)", **integers)


def open_weights(folder: Path, config) -> None:
    """Check a checkpoint's headers, names and sizes; raise ValueError if it cannot be read."""
    with torch.device("meta"):
        shapes = {hf_name(name): p.shape for name, p in Llama(config).named_parameters()}
    open_tensors(folder, shapes, config)


def open_texts(a: Namespace, base: Path, folders: list[Path], trained_on: list = ()) -> Texts:
    """Check the settings, tokenise and take the held-out parts.

    trained_on: the lists of text that decided together what was held out; none: those scored.
    """
    configs = [load_config(folder) for folder in (base, *folders)]
    windows = [c.max_position_embeddings or 0 for c in configs]  # Meta's Llama 1 and 2: unknown
    original_len = a.original_len or windows[0]
    longest = max(original_len, *windows)
    doubled = [original_len * 2**i for i in range(40) if original_len * 2**i <= longest]
    lengths = sorted(set(a.lengths or [*doubled, longest]))
    shapes = [(c.vocab_size, c.n_layers, c.n_heads, c.d_model) for c in configs]
    if not original_len:
        raise ValueError("--original_len is missing: Meta's params.json does not say the window")
    if not a.data:
        raise ValueError("--data is missing: pass long text, files or folders, to be scored")
    if lengths[0] < 64 or a.samples < 1 or not all(0 <= d <= 1 for d in a.depths):
        raise ValueError("need --lengths of 64 at least, --samples of 1, and --depths from 0 to 1")
    if not all(0 < share < 1 for share in a.merge):
        raise ValueError(f"--merge {a.merge}: need the original's shares, between 0 and 1")
    if a.merge and not folders:
        raise ValueError("--merge needs --ckpt, of which it takes the other share")
    if len(set(shapes)) > 1:
        raise ValueError(
            f"need checkpoints of one shape, got {shapes}: vocabulary, layers, heads, D"
        )
    for folder, config in zip((base, *folders), configs, strict=True):
        open_weights(folder, config)
    two = folders and (a.merge or "kept" in a.tasks)
    need = (2 if two else 1) * parameter_count(configs[0]) * a.dtype.itemsize
    free, held = available_memory(), "two models take" if two else "the model takes"
    if a.device == "cpu" and free is not None and need > free:
        raise ValueError(
            f"memory: {held} {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try "
            "--dtype bfloat16, or a machine with more"
        )
    tokenizer = load_tokenizer(base, a.add_eos)
    tokenizer.check_fits(configs[0].vocab_size)
    texts = {"long": a.data, "short": a.short_data or a.data}

    def opened(specs: list[str], name: str) -> data.Corpus:
        return tokenize(specs, tokenizer, a.cache_dir, name, a.skip_bad_lines)

    corpora = {name: opened(specs, name) for name, specs in texts.items()}
    trained = [opened(specs, "trained on") for specs in trained_on] or [*corpora.values()]
    data.share_held_out(trained)
    data.share_held_out([*corpora.values()], trained[0].ends)
    ids = [
        data.held_out(corpus, max(1, a.eval_tokens // length), length)
        for corpus, length in zip(corpora.values(), (lengths[-1], original_len), strict=True)
    ]
    asks = any(task in NIAH for task in a.tasks)
    source = Source(tokenizer, ids[0].flatten().numpy()) if asks else None
    far = far_parts(a, corpora["long"], *ids, original_len) if "far" in a.tasks else "not asked"
    return Texts(ids[1], ids[0], source, original_len, lengths, far)


def far_parts(a: Namespace, corpus, long: Tensor, short: Tensor, window: int):
    """Return other far parts for the long sequences, by name, or the reason why there are none."""

    length = long.shape[1] - 1
    try:
        if length <= window:
            raise ValueError(f"--lengths end at the original window of {window}")
        other = other_documents(corpus, len(long), length, length - window, a.seed)
    except ValueError as e:
        print(f"far context is not measured: {e}")
        return str(e)
    kind = torch.from_numpy(np.resize(short[:, :-1].numpy(), other.shape))
    far = long[:, : length - window]
    return {"other": other, "short text": kind, "shuffled": shuffled(far, a.seed)}


def main(argv: list[str] | None = None) -> None:
    """The command line. An error that the user can correct ends it with a message of one line."""
    expand_segments()  # before anything asks for the GPU
    outlive_readers()
    a = parse_args(argv)
    with command_line("evaluate", argv):
        check_device(a, 0)
        if a.job != "compare" and Path(a.file).exists():
            raise ValueError(f"{a.file} exists: remove it, or name another file")
        if a.job == "samples":
            write_samples(a)
        elif a.job == "corpus":
            select_corpus(a)
        else:
            compare(a)


PICTURES = "overview", "drift", "training", "needles", "repeat"
RESULTS = {"settings", "tables", "runs"}  # what results.json holds, by which it is known


def compare(a: Namespace) -> None:
    """Measure the original and every checkpoint, then leave report, JSON and pictures."""
    beside = [Path(a.out_dir) / name for name in ("report.md", *(f"{x}.png" for x in PICTURES))]
    refuse_foreign(Path(a.out_dir) / "results.json", RESULTS, "evaluation", beside)
    base = resolve_checkpoint(a.base)
    found = [find_run(spec) for spec in a.ckpt]
    seen = Counter(["original", *(name for name, _, _ in found)])
    for i, (spec, (name, folder, why)) in enumerate(zip(a.ckpt, found, strict=True)):
        if seen[name] > 1 and not spec.startswith(f"{name}="):
            found[i] = (
                spec,
                folder,
                why,
            )  # two folders of one name are two rows unless asked for as one
    trained_on = ()  # of the first run, the list of each stream
    for _, folder, _ in found:
        run = folder and folder.parent / "longred.json"
        if run and run.is_file() and not a.data:
            config, lists, short = texts_of_run(run)
            a.data, a.short_data = lists["long"], a.short_data or short
            trained_on = [specs for specs in lists.values() if specs]
            a.add_eos = config.get("add_eos") if a.add_eos is None else a.add_eos
            a.skip_bad_lines |= bool(config.get("skip_bad_lines"))
    runs = [("original", base)] + [(name, folder) for name, folder, _ in found if folder]
    unfinished = [(name, why) for name, folder, why in found if not folder]
    texts = open_texts(a, base, [folder for _, folder in runs[1:]], trained_on)
    with lock_folder(Path(a.out_dir), "--out_dir"):  # two at work there would mix their results
        measure_all(a, texts, runs, base, unfinished)


def texts_of_run(path: Path) -> tuple[dict, dict[str, list[str]], list[str] | None]:
    """Return a run's settings, its streams' lists of text, and the list to score as short text.

    path: of its longred.json. Raises ValueError if that is damaged.
    """
    record = read_run(path.parent)
    config, own, commits = (record[key] for key in ("config", "own_samples", "commits"))

    def files(name: str) -> list[str]:
        specs = config.get(f"{name}_data") or ()
        found = (own.get(s, {"file": at_commit(s, commits.get(s))})["file"] for s in specs)
        return [str(file) for file in found]

    try:
        lists = {name: files(name) for name in record["data"]}
        scored = "short" in lists or is_at_hand(config.get("short_data") or [])
        return config, {"long": files("long")} | lists, (files("short") or None) if scored else None
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is damaged, in its texts; pass --data") from None


def measure_all(a: Namespace, texts: Texts, runs: list, base: Path, unfinished: list) -> None:
    """Run the comparison in a folder that is locked."""
    results, stopped = [], False
    try:
        for name, folder in runs:
            print(f"{name}: {folder}, {a.dtype} on {a.device}", flush=True)
            results.append((name, folder, row(a, texts, folder, base)))
            for share in a.merge if results[1:] else ():
                merged = row(a, texts, folder, base, share=share)
                results.append((f"{name}, {share:g} original", None, merged))
            if a.pcd:
                results.append((f"{name}, PCD", None, row(a, texts, folder, base, PCD)))
    except KeyboardInterrupt:
        if not results:  # an older report stays
            raise
        stopped = True
    print("\n" + write_report(a, texts, results, unfinished), flush=True)
    bad = [name for name, _, result in results if finite(result) != result]
    try:
        sound = [found for found in results if found[0] not in bad]
        sound = [] if "original" in bad else sound
        print("pictures:", *draw(sound, Path(a.out_dir), texts.original_len, texts.lengths[-1]))
    except ImportError:
        print("for pictures: pip install matplotlib, then the same command (nothing is redone)")
    print(f"report and numbers: {a.out_dir}/report.md, {a.out_dir}/results.json")
    if stopped:
        print("stopped; the rows that ended are kept, the same command goes on with the next")
        sys.exit(130)
    if bad:
        raise ValueError(
            f"{', '.join(dict.fromkeys(bad))}: numbers that are not finite, null in results.json; "
            "its weights or its training are broken"
        )


if __name__ == "__main__":
    main()
