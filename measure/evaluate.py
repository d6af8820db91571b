"""What an extension of the context window kept, and what it gained.

    python -m measure.evaluate compare --base DIR --ckpt OUT [OUT ...] --data TEXT... --lengths 2K
    python -m measure.evaluate samples stories.jsonl --base DIR --n_samples 400
    python -m measure.evaluate corpus selected.jsonl --base DIR --ckpt DIR --data TEXT...

The first, whose name may be left out, sets the original beside any number of extended checkpoints
and leaves report.md, results.json and pictures in --out_dir; the second writes short text sampled
from a model itself, the third LongRecipe's training text (measure/select_corpus.py). From any other
folder the command is python PATH/measure/evaluate.py.

    task        question, and where it is answered
    ----------  ------------------------------------------------------------------------------------
    kept        short text: loss, KL(original || it), first choices, drift  (short_text_drift)
    position    long text: loss by position, whole and with the window cut  (position_losses)
    far         long text: what far text brings by content, what by length alone: the same tokens
                behind the far part of another document  (measure/far_context.py)
    repeat      is a passage better known the second time, and from how far?  (repeat_scores)
    niah_... vt cwe fwe    RULER (Hsieh et al., arXiv 2404.06654), in our own words  (make_sample)

Perplexity falls when a model merely tolerates distance, and a cut window costs a model that only
stands on many tokens; so two numbers here show use of far text: the same tokens scored behind the
far part of another document, and the passage that was there before.
Give --data and --short_data the lists that longred.py was given: what it held out is read here.
Every result is kept in OUT_DIR/cache as soon as it is there, by the checkpoint's content and the
task's settings: a stopped command continues, and one more --ckpt costs only itself.
"""

import argparse
import functools
import hashlib
import json
import math
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
from machine.checkpoints import hf_name, open_tensors, resolve_checkpoint
from machine.command_line import integer
from machine.formats import load_checkpoint, load_config
from machine.keeper import lock
from machine.log import finite, outlive_readers
from machine.memory import pad_heads
from machine.plan import available_memory, expand_segments, parameter_count
from machine.samples import sample_ids
from machine.settings import check_device, fits
from machine.states import read_run, refuse_foreign, whole_file
from machine.tokenizer import Tokenizer
from measure.pcd import PCD, contrast, local_view
from measure.pcd import generate as by_contrast
from measure.pictures import draw
from model import Llama, attention_kl, merge_weights

FORMAT = 3  # of a remembered result; raised when what is measured changes
CHUNK = 8192  # tokens of a sequence read at a time, so that 128K fits one GPU
BATCH_TOKENS = 65536  # tokens whose keys and values are held at a time

# ------------------------------------------------------------------------------ what was kept


@torch.no_grad()
def short_text_drift(
    base: Llama, model: Llama, input_ids: Tensor, rows: int = 512, attention_sequences: int = 8
) -> dict:
    """How far a model has moved from the original on short text (LongReD section 3).

    input_ids: (B, T + 1) int64, read a sequence at a time, logits `rows` tokens at a time: two 8B
        models at 8,192 need 30 GiB for the weights and 5 GiB for hidden states in bf16.
    attention_sequences: how many of them, from the first on, to compare attention maps on.
    Returns by_sequence: {name: one mean a sequence}, where drift is 1 - cosine of the last hidden
    state and drift_mean that over all blocks, and means over tokens: loss (nats), kl (nats,
    KL(original || model) of the next token), same_top1 (share of tokens with the same first
    choice), cosine (n_layers + 1 numbers, by hidden state, eq. 5) and, if asked for, attention_kl
    (n_layers lists of n_heads numbers, eq. 6).
    """
    n_layers, n_tokens = base.config.n_layers, input_ids[:, 1:].numel()
    taps = tuple(range(n_layers + 1))
    sums = torch.zeros(len(input_ids), 3, dtype=torch.float64)
    cosine = torch.zeros(len(input_ids), len(taps), dtype=torch.float64)
    heads = torch.zeros(n_layers, base.config.n_heads)
    compared = min(attention_sequences, len(input_ids))
    for i, ids in enumerate(tqdm(input_ids, desc="kept", unit="seq", leave=False, disable=None)):
        a, b = (m(ids[None, :-1], layers=taps)[1] for m in (base, model))
        for tap in taps:
            cosine[i, tap] += (
                F.cosine_similarity(a[tap].float(), b[tap].float(), dim=-1).sum().cpu()
            )
        for start in range(0, len(ids) - 1, rows):
            log_a, log_b = (
                m.logits(h[n_layers][0, start : start + rows]).float().log_softmax(-1)
                for m, h in ((base, a), (model, b))
            )
            labels = ids[start + 1 : start + 1 + len(log_b)]
            nll = F.nll_loss(log_b, labels, reduction="sum")
            kl = F.kl_div(log_b, log_a, reduction="sum", log_target=True)
            same = (log_a.argmax(-1) == log_b.argmax(-1)).sum()
            sums[i] += torch.stack([nll, kl, same.float()]).double().cpu()
        if i < compared:
            heads += attention_kl(base, model, ids[None, :-1]).cpu() / compared
    each, drift = sums.T / (n_tokens / len(input_ids)), 1 - cosine / (n_tokens / len(input_ids))
    names = "loss", "kl", "same_top1"
    result = dict(zip(names, (sums.sum(0) / n_tokens).tolist(), strict=True))
    result["cosine"] = (cosine.sum(0) / n_tokens).tolist()
    result["by_sequence"] = dict(zip(names, each.tolist(), strict=True))
    result["by_sequence"] |= {"drift": drift[:, -1].tolist()}
    result["by_sequence"] |= {"drift_mean": drift[:, 1:].mean(1).tolist()}
    return result | ({"attention_kl": heads.tolist()} if compared else {})


# ---------------------------------------------------------------------------- what was gained


@torch.no_grad()
def position_losses(
    model: Llama, input_ids: Tensor, window: int | None = None, rows: int = 512
) -> Tensor:
    """Next-token loss at each position, mean over sequences.

    input_ids: (B, T + 1) int64, read one sequence at a time, logits `rows` tokens at a time.
    window: None reads each sequence whole. Else each token is predicted from at most the `window`
        tokens before it: windows slide by a quarter, each scoring the tokens the one before it has
        not, so context is never under 3/4 of the window (the first window's own tokens excepted).
    Returns (T,) float64 on the CPU, nats.
    """
    return losses_by_sequence(model, input_ids, window, rows).mean(0)


@torch.no_grad()
def losses_by_sequence(
    model: Llama, input_ids: Tensor, window: int | None = None, rows: int = 512
) -> Tensor:
    """position_losses before the mean: (B, T) float64."""
    length = input_ids.shape[1] - 1
    found = torch.zeros(len(input_ids), length, dtype=torch.float64)
    window = min(window or length, length)
    windows = [*range(window, length, max(1, window // 4)), length]  # where each ends
    name = "loss by position" + (f", window {window}" if window < length else "")
    for i, ids in enumerate(tqdm(input_ids, desc=name, unit="seq", leave=False, disable=None)):
        done = 0  # positions scored
        for end in windows:
            begin = end - window
            for start, hidden in read(model, ids[None, begin:end]):
                skip = max(0, done - begin - start)  # read for context alone
                first = begin + start + skip
                nll = token_losses(model, hidden[0, skip:], ids[first + 1 :], rows)
                found[i, first : first + len(nll)] = nll
            done = end
    return found


def read(model: Llama, input_ids: Tensor):
    """Yield (start, last hidden states) of consecutive chunks of CHUNK tokens a row."""
    batch, length = input_ids.shape
    cache = model.new_cache(batch, length) if length > CHUNK else None
    for start in range(0, length, CHUNK):
        yield start, model(input_ids[:, start : start + CHUNK], cache=cache)[0]


def token_losses(model: Llama, hidden: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """hidden (T, D) and the tokens that follow, (at least T,) -> (T,) float64 nats on the CPU."""
    parts = []
    for start in range(0, len(hidden), rows):
        logits = model.logits(hidden[start : start + rows]).float()
        nll = F.cross_entropy(logits, labels[start : start + len(logits)], reduction="none")
        parts.append(nll.double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def repeat_scores(
    model: Llama, sequences: Tensor, passage: int, cue: int | None = None, pcd: dict | None = None
) -> Tensor:
    """How well the last `passage` tokens of each sequence are known, the first `cue` not counted.

    cue: 8 unless told, of a passage under 16 tokens half: something has to be left to count.
    sequences: (B, T) int64. pcd: predict by contrast, model.PCD's settings; a token outside its
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
    """Sequences ending in a passage that also stands earlier, at each depth, or not at all.

    tokens: held-out text. depths: 0 = the passage opens the sequence, 1 = it stands just before
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
        text, repeated = first[: length - passage], first[length - passage :]
        for depth in depths:
            place = round(depth * room)
            rows.append(np.concatenate([text[:place], repeated, text[place:room], repeated]))
        rows.append(first)
    return torch.from_numpy(np.stack(rows)), passage


def repeat(a: Namespace, model: Llama, long: Tensor, length: int, pcd: dict | None) -> dict:
    """What a passage's having been read before is worth at one length, a.samples at each depth.

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


# ------------------------------------------------------------------------------ RULER's tasks
#
# Construction: RULER's paper, section 3, and its published settings. Differs: sentences are our
# own; the haystack is the user's held-out text instead of essays; words are drawn from that text
# instead of a list; variable tracking has a one-line example and common words none, where RULER
# shows a whole solved sample; below 4K the room for an answer shrinks to an eighth of the length.
# The two tasks on SQuAD and HotpotQA need downloads and are left to RULER itself.

# haystack, keys, values, number of keys, values of each key, keys asked for
NIAH = {
    "niah_single_1": ("noise", "words", "number", 1, 1, 1),
    "niah_single_2": ("text", "words", "number", 1, 1, 1),
    "niah_single_3": ("text", "words", "uuid", 1, 1, 1),
    "niah_multikey_1": ("text", "words", "number", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "number", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuid", "uuid", 1, 1, 1),
    "niah_multivalue": ("text", "words", "number", 1, 4, 1),
    "niah_multiquery": ("text", "words", "number", 4, 1, 4),
}
NOISE = "The wind turns. Rain falls and the river runs on. Night comes, and then day again. "
RULER = [*NIAH, "vt", "cwe", "fwe"]
TASKS = ["kept", "position", "far", "repeat", "niah_single_2", "niah_multikey_1", "niah_multivalue"]
TASKS += ["niah_multiquery", "vt", "cwe", "fwe"]  # what is done unless --tasks says otherwise
TASKS_ALL = ["kept", "position", "far", "repeat", *RULER]


@dataclass
class Sample:
    prompt: np.ndarray  # (length - n_new,) int64
    answers: list[str]  # all of them are asked for
    n_new: int  # tokens of room for the answer
    depth: float | None  # of the one needle asked for, 0 = start of the haystack


class Source:
    """What samples are made of: a tokenizer, and text with its words and ends of sentences."""

    def __init__(self, tokenizer: Tokenizer, tokens: np.ndarray):
        self.tokenizer, self.tokens = tokenizer, tokens
        text = tokenizer.decode(tokens[:1_000_000].tolist())
        # RULER's room for answers is in tokens of about 4 characters.
        self.stretch = max(1.0, 4 * min(len(tokens), 1_000_000) / len(text))
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        self.newline = self.encode("\n")[-1:]
        seen = np.unique(np.concatenate([tokens, self.encode(NOISE + "\n")]))
        closing = [i for i in seen if tokenizer.decode([int(i)]).rstrip(" ")[-1:] in list(".!?\n")]
        self.sentence_ends = np.array(closing, dtype=np.int64)
        if len(self.words) < 100:
            raise ValueError(
                f"--data holds {len(self.words)} different words of 4 to 9 small letters in its "
                "held-out part, RULER's tasks need 100; add text or leave them out of --tasks"
            )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode_batch([text])[0], dtype=np.int64)

    def draw(self, rng: np.random.Generator, kind: str, n: int) -> list[str]:
        """n different pairs of words, 7-digit numbers, uuids, words, or codes of 6 letters."""
        if kind == "word" and n <= len(self.words):
            return rng.choice(self.words, n, replace=False).tolist()
        found = {}  # a set that keeps its order
        while len(found) < n:
            if kind == "number":
                new = str(rng.integers(10**6, 10**7))
            elif kind == "uuid":
                new = re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", rng.bytes(16).hex())
            elif kind == "code":
                new = "".join(chr(97 + c) for c in rng.integers(26, size=6))
            else:
                new = "-".join(self.words[i] for i in rng.integers(len(self.words), size=2))
            found[new] = None
        return list(found)


def make_sample(
    source: Source, task: str, length: int, depth: float, rng: np.random.Generator
) -> Sample:
    """A task's prompt and answers; prompt and room for the answer are exactly `length` tokens.

    depth: where the one needle asked for lies in the haystack, to the nearest end of a sentence;
        tasks that ask for several things place them at random.
    Raises ValueError if the task does not fit the length.
    """
    make = {"vt": _variables, "cwe": _common_words, "fwe": _frequent_words}.get(task, _needles)
    head, body, tail, answers, n_new, depth = make(source, task, length, depth, rng)
    bos = [source.tokenizer.bos_id] if source.tokenizer.add_bos else []
    head, tail = np.concatenate([bos, source.encode(head)]).astype(np.int64), source.encode(tail)
    n_new = min(math.ceil(n_new * source.stretch), length // 8)
    try:
        middle = body(length - n_new - len(head) - len(tail))
    except ValueError as e:
        raise ValueError(f"{task} does not fit {length} tokens: {e}") from None
    prompt = np.concatenate([head, middle, tail])
    assert len(prompt) + n_new == length, (task, len(prompt), n_new, length)
    return Sample(prompt, answers, n_new, depth)


def _needles(source: Source, task: str, length: int, depth: float, rng) -> tuple:
    haystack, key_kind, value_kind, n_keys, n_values, n_asked = NIAH[task]
    n_more = length // 8 if haystack == "needles" else 0  # more than fit
    keys = source.draw(rng, key_kind, n_keys + n_more)
    values = source.draw(rng, value_kind, n_keys * n_values + n_more)
    owners = [key for key in keys[:n_keys] for _ in range(n_values)] + keys[n_keys:]
    state = f" One secret {value_kind} of {{}} is {{}}."
    stated = [state.format(*pair) for pair in zip(owners, values, strict=True)]
    n = n_keys * n_values
    answers, names = values[: n_asked * n_values], ", ".join(keys[:n_asked])
    depths = rng.random(n).tolist()
    what = f"{value_kind}s of {names}"
    if len(answers) > 1:
        tail = f"\nWhat are the {len(answers)} secret {what}, as hidden in the text above? Answer: "
        tail += f"The {len(answers)} secret {what} are"
        depth = None
    else:
        what = f"secret {value_kind} of {names}"
        tail = f"\nWhat is the {what}, as hidden in the text above? Answer: One {what} is"
        depths[0] = depth
    head = f"Secret {value_kind}s are hidden in this text. Learn them: some will be asked for.\n"
    haystack = "".join(stated[n:]) or haystack

    def body(room: int) -> np.ndarray:
        return _bury(source, haystack, [source.encode(s) for s in stated[:n]], depths, room, rng)

    return head, body, tail, answers, 32 * len(answers), depth


def _variables(source: Source, task: str, length: int, depth: float, rng, hops=4) -> tuple:
    names = [name.upper() for name in source.draw(rng, "code", hops + 1)]
    value = str(rng.integers(10_000, 100_000))
    held = [value, *(f"VAR {name}" for name in names)]
    head = "Variables are set in this text, some from others. Learn which hold which value. For "
    head += "example, VAR QX = 31. VAR ZK = VAR QX. gives the value 31 to QX, ZK.\n"
    tail = f"\nWhich {hops + 1} variables hold the value {value} at the end of the text above? "
    tail += f"Answer: The {hops + 1} variables that hold the value {value} are"

    def body(room: int) -> np.ndarray:
        pieces = [source.encode(f" VAR {n} = {v}.") for n, v in zip(names, held, strict=False)]
        return _bury(source, "noise", pieces, sorted(rng.random(len(pieces))), room, rng)

    return head, body, tail, names, 50, None


def _common_words(source: Source, task: str, length: int, depth: float, rng) -> tuple:
    n_asked, common, uncommon = 10, *((30, 3) if length >= 4096 else (6, 1))  # times in the list
    words = source.draw(rng, "word", n_asked + length // (3 * uncommon))  # more than fit
    what = f"{n_asked} words"
    head = "This is a numbered list of words. Learn which of them stand in it most often.\n"
    tail = f"\nWhich {what} stand most often in the list above? Answer: The {what} that stand most "
    tail += "often are"

    def entries(n: int) -> np.ndarray:
        listed = words[:n_asked] * common + words[n_asked : n_asked + n] * uncommon
        order = np.random.default_rng(n).permutation(len(listed))
        return source.encode("".join(f" {i + 1}. {listed[j]}" for i, j in enumerate(order)))

    body = functools.partial(_fill, source, entries, n_asked)
    return head, body, tail, words[:n_asked], 120, None


def _frequent_words(source: Source, task: str, length: int, depth: float, rng) -> tuple:
    words = np.array(["...", *source.draw(rng, "code", 1999)])
    share = np.arange(1, len(words) + 1) ** -2.0  # zeta with alpha = 2; the first, dots, is noise
    share /= share.sum()
    head = "This is a text in code. Learn which words of it stand in it most often; dots are not "
    head += "words.\n"
    tail = "\nWhich three words stand most often in the text above? Answer: The three words that "
    tail += "stand most often are"

    def text(n: int) -> np.ndarray:
        drawn = np.repeat(words, np.round(n * share).astype(int))
        return source.encode(" " + " ".join(np.random.default_rng(n).permutation(drawn)))

    body = functools.partial(_fill, source, text, 60)  # 60: the dots 36 times, words 9, 4, 2, 1, 1
    return head, body, tail, words[1:4].tolist(), 50, None


def _bury(source, haystack: str, pieces: list, depths: list, room: int, rng) -> np.ndarray:
    """Each piece at the end of the sentence nearest to its depth in the haystack, `room` in all."""
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


def _fill(source: Source, build: Callable, least: int, room: int) -> np.ndarray:
    """About the longest build(n) that fits, n at least `least`, filled up by newlines to `room`."""
    n, body = least, build(least)
    best = body
    if len(best) > room:
        raise ValueError(f"{len(best) - room} tokens too few")
    for _ in range(5):  # length grows almost in proportion to n
        n = max(least, n * room // len(body))
        body = build(n)
        if len(best) < len(body) <= room:
            best = body
    return np.concatenate([best, np.resize(source.newline, room - len(best))])


def score(text: str, answers: list[str]) -> float:
    """Share of the answers that stand in the text as whole words, in any case and order."""
    words = set(re.findall(r"[\w-]+", text.lower()))
    return sum(a.lower() in words for a in answers) / len(answers)


def ask(generate: Callable, samples: list[Sample], tokenizer: Tokenizer) -> list[float]:
    """Score of each sample; all are of one task and length, so a batch needs no padding.

    generate: (prompts (B, T) int64, n_new) -> (B, n_new) int64.
    """
    batch = max(1, BATCH_TOKENS // (len(samples[0].prompt) + samples[0].n_new))
    scores = []
    for start in tqdm(range(0, len(samples), batch), desc="ask", leave=False, disable=None):
        part = samples[start : start + batch]
        new = generate(torch.from_numpy(np.stack([s.prompt for s in part])), part[0].n_new)
        texts = [tokenizer.decode(ids) for ids in new.tolist()]
        scores += [score(text, s.answers) for text, s in zip(texts, part, strict=True)]
    return scores


def ruler(
    a: Namespace, model: Llama, source: Source, task: str, length: int, pcd: dict | None
) -> dict:
    """A task at one length, a.samples at each of a.depths: share answered in full, and of all.

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
    exact = np.array([score == 1 for score in scores], dtype=float).reshape(len(a.depths), -1)
    by_depth = None if samples[0].depth is None else exact.mean(1).tolist()
    found = {"exact": exact.mean().item(), "part": statistics.mean(scores)}
    found["error"] = standard_error(exact.flatten().tolist())
    return found | {"depths": a.depths, "by_depth": by_depth}


# ------------------------------------------------------------------------------- a comparison


def find_run(spec: str) -> tuple[str, Path | None, str]:
    """[NAME=]CHECKPOINT -> (name, its folder, ""), or (name, None, how far the run has come).

    Runs given one NAME share a row, as mean +- standard deviation. Raises ValueError where there is
    neither a checkpoint nor a run that will export one.
    """
    name, path = spec.split("=", 1) if "=" in spec and not Path(spec).exists() else ("", spec)
    run = Path(path) / "longred.json"
    if run.is_file() and not (run.parent / "hf" / "config.json").is_file():
        config, log = read_run(run.parent)["config"], run.with_name("log.jsonl")
        steps = int(config.get("steps") or 0) + int(config.get("replay_steps") or 0)
        done = len(log.read_bytes().splitlines()) if log.is_file() else 0
        return name or run.parent.name, None, f"unfinished, {done} of {steps} steps"
    folder = resolve_checkpoint(path)
    own = folder.parent if folder.name == "hf" else folder
    return name or (own.name if Path(path).is_dir() else Path(path).name), folder, ""


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's content: its config and every byte of the weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".pth") or path.name in ("config.json", "params.json"):
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:24]


def remember(folder: Path, key: dict, compute: Callable[[], dict]) -> dict:
    """compute(), or what it returned when it was last called under this key."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = folder / f"{key['task']}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        content = json.loads(path.read_bytes())
        value, checksum = content["value"], content["checksum"]
        if zlib.crc32(json.dumps(value, sort_keys=True).encode()) == checksum:
            return value
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not there, cut short by a crash, or damaged
    print("  measuring", key["task"], key.get("length", ""), flush=True)
    value = compute()
    if finite(value) == value:  # what is not finite has no place in JSON
        checksum = zlib.crc32(json.dumps(value, sort_keys=True).encode())
        with whole_file(path) as f:
            json.dump({"key": key, "value": value, "checksum": checksum}, f)
    return value


@dataclass
class Texts:
    """What all checkpoints are asked about."""

    short: Tensor  # (B, original_len + 1)
    long: Tensor  # (B, longest + 1)
    source: Source | None
    original_len: int
    lengths: list[int]
    far: dict[str, Tensor] | str  # other far parts for `long` (B, T - original_len), or why not


def identify(folder: Path, base: Path, share: float):
    """What a result is remembered by: the content of weights, and what was made of them."""
    identity = fingerprint(folder)
    if share:
        return [identity, fingerprint(base), share]
    return identity


def measure(
    a: Namespace,
    texts: Texts,
    folder: Path,
    base: Path,
    out: dict,
    pcd: dict | None = None,
    share: float = 0.0,
) -> None:
    """Fill `out` with every task's result for one checkpoint; `out` keeps what Ctrl-C leaves.

    pcd: of measure.pcd.generate; where given, only the tasks that ask for tokens are done.
    share: of the original, averaged into the weights (model.merge_weights).
    """
    cache, identity = Path(a.out_dir) / "cache", identify(folder, base, share)

    @functools.cache
    def load(path: Path) -> Llama:
        model = pad_heads(load_checkpoint(path, device=a.device, dtype=a.dtype))
        return merge_weights(model, load(base), share) if share and path == folder else model

    def once(task: str, compute: Callable[[], dict], **settings) -> dict:
        key = {"task": task, "checkpoint": identity, "dtype": str(a.dtype), **settings}
        return remember(cache, key, compute)

    def positions(window: int | None) -> dict:
        return by_position(load(folder), texts.long.to(a.device), window, edges)

    def far() -> dict:
        from measure.far_context import far_losses  # which reads models as we do

        long = texts.long.to(a.device)
        return far_losses(load(folder), long, texts.original_len, texts.far)

    def drift() -> dict:
        return short_text_drift(load(base), load(folder), texts.short.to(a.device))

    def asked(task: str, length: int) -> dict:
        if task == "repeat":
            return repeat(a, load(folder), texts.long, length, pcd)
        return ruler(a, load(folder), texts.source, task, length, pcd)

    edges = _edges(texts.original_len, texts.lengths)
    text = {"text": _digest(texts.long), "original_len": texts.original_len}
    tasks = a.tasks if pcd is None else [t for t in a.tasks if t in ("repeat", *RULER)]
    if "kept" in tasks:
        both = {"text": _digest(texts.short), "base": fingerprint(base)}
        out["kept"] = once("kept", drift, **both)
    if "position" in tasks:
        out["position"] = {
            name: once(
                "position", functools.partial(positions, window), window=window, edges=edges, **text
            )
            for name, window in (("whole", None), ("cut", texts.original_len))
        }
    if "far" in tasks and isinstance(texts.far, dict):
        others = {name: _digest(ids) for name, ids in texts.far.items()}
        out["far"] = once("far", far, others=others, **text)
    drawn = {**text, "seed": a.seed, "samples": a.samples, "depths": a.depths}
    drawn |= {"tokenizer": texts.source.tokenizer.fingerprint} if texts.source else {}
    drawn |= {} if pcd is None else {"pcd": pcd}
    for task in [t for t in tasks if t not in ("kept", "position", "far")]:
        for length in texts.lengths:
            result = once(task, functools.partial(asked, task, length), length=length, **drawn)
            out.setdefault(task, {})[str(length)] = result
    load.cache_clear()  # it refers to itself: 8B would wait for the next collection of garbage


def by_position(model: Llama, long: Tensor, window: int | None, edges: list[int]) -> dict:
    """{"nll": loss at each position, "spans": of each sequence, between the edges}, nats."""
    losses = losses_by_sequence(model, long, window)
    spans = [losses[:, lo:hi].mean(1).tolist() for lo, hi in zip(edges, edges[1:], strict=False)]
    nll = [round(nll, 4) for nll in losses.mean(0).tolist()]
    return {"nll": nll, "spans": [[round(nll, 6) for nll in span] for span in spans]}


def _edges(original_len: int, lengths: list[int]) -> list[int]:
    """Between these positions a loss is reported: 0, the old window, and each length."""
    return sorted(n for n in {0, original_len, *lengths} if n <= lengths[-1])


def standard_error(values: list[float]) -> float | None:
    """Of their mean, were they drawn anew; None: one value tells nothing about that."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / len(values) ** 0.5


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def summarize(result: dict, original_len: int, lengths: list[int], asked: dict) -> dict:
    """One checkpoint's numbers for the report: {table's title: {column: (number, its error)}}.

    asked: {length: RULER's tasks of its mean}. Errors are standard errors of a mean over
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
        from measure.far_context import columns

        tables[f"Gained: what text beyond {original_len:,} tokens brings, nats"] = {
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
        scores = {t: r[str(length)] for t, r in result.items() if t in RULER and str(length) in r}
        scores = {t: r for t, r in scores.items() if "exact" in r}
        row = {t: (100 * r["exact"], _times(100, r["error"])) for t, r in scores.items()}
        if asked[length] and set(asked[length]) <= set(row):
            values, errors = zip(*(row[t] for t in asked[length]), strict=True)
            error = None if None in errors else math.hypot(*errors) / len(errors)
            row["mean"] = statistics.mean(values), error
        tables[f"Gained: RULER's tasks at {length:,}, % answered in full"] = row
    return {t: row for t, row in tables.items() if row}


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def _by_position(found: dict, original_len: int, lengths: list[int]) -> dict:
    """The two tables of loss by position; a cut window is compared with the whole text by text."""
    edges = _edges(original_len, lengths)
    whole, cut = (found[name]["spans"] for name in ("whole", "cut"))
    losses, brings = {}, {}
    for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False)):
        span = f"{lo + 1:,}-{hi:,}"
        losses[span] = statistics.mean(whole[i]), standard_error(whole[i])
        gain = [b - a for a, b in zip(whole[i], cut[i], strict=True)]
        if lo >= original_len:
            brings[span] = statistics.mean(gain), standard_error(gain)
    return {
        "Gained: loss by position, the whole text before it read": losses,
        f"Loss with the window cut to {original_len:,} tokens, less that above, nats": brings,
    }


def fitting_tasks(results: list, lengths: list[int]) -> tuple[dict[int, list[str]], list[str]]:
    """{length: RULER's tasks that all did at it}; and why the others were not, a line each."""
    tasks = list(dict.fromkeys(t for _, _, result in results for t in result if t in RULER))
    done, why = {length: list(tasks) for length in lengths}, {}
    for _, _, result in results:
        for task in [t for t in tasks if set(result) & set(RULER)]:
            for length in lengths:
                found = result.get(task, {}).get(str(length), {})
                if "exact" not in found and task in done[length]:
                    done[length].remove(task)
                    why[found.get("skipped", f"{task} at {length}: not finished")] = None
    return done, list(why)


def write_report(a: Namespace, texts: Texts, results: list, unfinished: list) -> str:
    """report.md and results.json in a.out_dir; returns the report."""
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
    if any(task in RULER for task in a.tasks):
        for length, tasks in asked.items():
            lines += [f"RULER's mean at {length:,} is over: {', '.join(tasks) or 'no task'}.\n"]
        lines += [f"Left out of it: {why}.\n" for why in left_out]
    lines += [f"{name}: {why}" for name, why in unfinished]
    report = "\n".join(lines)
    out_dir = Path(a.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    runs = [{"name": n, "checkpoint": str(f), **r} for n, f, r in results]
    content = {"settings": vars(a), "tables": named, "errors": errors, "runs": runs}
    text = json.dumps(finite(content | {"unfinished": unfinished}), indent=1, default=str)
    with whole_file(out_dir / "results.json") as f:  # str: of dtypes
        f.write(text)
    with whole_file(out_dir / "report.md") as f:
        f.write(report + "\n")
    return report


def table(rows: dict[str, dict[str, float | list[float]]], errors: dict | None = None) -> str:
    """{row: {column: a number, or one from each run}} as a Markdown table.

    errors: {row: {column: standard error or None}} of the numbers that stand alone.
    """
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        of_row = (errors or {}).get(name, {})
        cells = [_cell(row[c], of_row.get(c)) if c in row else "-" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | list[float], error: float | None = None) -> str:
    """A mean and its error, to the error's first digit (its second where the first is a 1)."""
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
    model = pad_heads(load_checkpoint(a.base, device=a.device, dtype=a.dtype))
    length = a.length or model.config.max_position_embeddings
    if not length:
        raise ValueError("--length is missing: Meta's params.json does not say the window")
    generator = torch.Generator(a.device).manual_seed(a.seed)
    tokenizer = data.load_tokenizer(resolve_checkpoint(a.base))
    with whole_file(a.write_samples) as f, tqdm(total=a.n_samples, unit="text") as bar:
        for start in range(0, a.n_samples, 50):
            n = min(50, a.n_samples - start)
            texts = sample_ids(model, tokenizer, n, length, generator, a.temperature)
            texts = ([i for i in ids if i != tokenizer.eos_id] for ids in texts)
            f.writelines(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in texts)
            bar.update(n)


# ---------------------------------------------------------------------------------- the command


JOBS = {
    "compare": "measure the original and its extensions; report, numbers and pictures",
    "samples": "write short text sampled from a model itself, as a .jsonl",
    "corpus": "write LongRecipe's training text, by what extending changed most, as a .jsonl",
}
# The first flag of each group -> what the group is about, for --help.
GROUPS = {
    "--data": "text",
    "--tasks": "what is asked",
    "--keep": "what is written",
    "--out_dir": "the run and its machine",
}


def parse_args(argv: list[str] | None) -> Namespace:
    """The flags of a job named first, or, where none is, of all three together."""
    argv = sys.argv[1:] if argv is None else list(argv)
    job = argv[0] if argv and argv[0] in JOBS else None
    defaults = vars(_parser(None).parse_args(["--base", ""]))
    a = _parser(job).parse_args(argv[1:] if job else argv)
    a = Namespace(**(defaults | vars(a)))
    a.dtype = getattr(torch, a.dtype or ("bfloat16" if "cuda" in a.device else "float32"))
    return a


def _parser(job: str | None) -> argparse.ArgumentParser:
    command = "python -m measure.evaluate"
    uses = {
        "compare": "--base DIR --ckpt OUT [OUT ...] [flags]",
        "samples": "FILE.jsonl --base DIR [flags]",
        "corpus": "FILE.jsonl --base DIR --ckpt DIR --data TEXT... [flags]",
    }
    lines = [f"{command} {name} {rest}" for name, rest in uses.items() if job in (None, name)]
    text = JOBS.get(job) or "\n".join(f"  {name:<8} {what}" for name, what in JOBS.items())
    more = "" if job else f"flags of a job: {command} JOB --help; without a job: compare"
    parser = argparse.ArgumentParser(
        command,
        "\n       ".join(lines),
        text,
        more or "Lengths may be written 4K, 32K, 128K (K = 1,024).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def error(message: str):
        raise SystemExit(f"evaluate: {message}; all flags: {command} {job or 'compare'} --help")

    group = parser.add_argument_group("needed")

    def add(jobs: str, *names, help: str = "", **more) -> None:
        nonlocal group
        group = parser.add_argument_group(GROUPS[names[0]]) if names[0] in GROUPS else group
        if job is None:  # every flag is known, and a job's own help tells of them
            help = argparse.SUPPRESS
        if job is None or job in jobs.split():
            group.add_argument(*names, help=help, **more)

    parser.error = error
    if job == "samples":
        group.add_argument("write_samples", metavar="FILE.jsonl", help="what to write")
    if job == "corpus":
        group.add_argument("select_corpus", metavar="FILE.jsonl", help="what to write")
    _add_flags(add)
    return parser


def _add_flags(add: Callable) -> None:
    """Every flag, with the jobs that read it."""

    def numbers(kind: Callable) -> Callable:
        return lambda text: [kind(part) for part in text.split(",")]

    both, every, integers = "compare corpus", " ".join(JOBS), {"type": integer, "metavar": "N"}
    original = "the original: folder, OUT_DIR, known name or hub id"
    add(every, "--base", required=True, metavar="DIR", help=original)
    extended = "extended checkpoints; those given one NAME share a row (default: none)"
    add(both, "--ckpt", nargs="+", default=[], metavar="[NAME=]DIR", help=extended)
    long = "long text: files, .jsonl, folders, globs (default: the first run's)"
    add(both, "--data", nargs="+", metavar="TEXT", help=long)
    short = "short text, for what was kept (default: the first run's, else --data)"
    add("compare", "--short_data", nargs="+", metavar="TEXT", help=short)
    many = "held-out tokens of long and of short text (default: 65536)"
    add(both, "--eval_tokens", default=65536, help=many, **integers)
    eos = "documents end with EOS (default: where the tokenizer has one)"
    add(both, "--add_eos", action=argparse.BooleanOptionalAction, default=None, help=eos)
    tokens = "where tokenised text is kept (default: out/tokens)"
    add(both, "--cache_dir", default="out/tokens", metavar="DIR", help=tokens)
    tasks = f"of {' '.join(TASKS_ALL)} (default: all but some of niah)"
    tasks = {"default": TASKS, "choices": TASKS_ALL, "metavar": "TASK", "help": tasks}
    add("compare", "--tasks", nargs="+", **tasks)
    lengths = "in tokens (default: the original window, doubled up to the target)"
    add("compare", "--lengths", type=numbers(integer), metavar="N,N", help=lengths)
    window = "the original window, in tokens (default: the original's own)"
    add("compare", "--original_len", **integers, help=window)
    depths = {"default": [0.0, 0.25, 0.5, 0.75, 1.0], "metavar": "X,X"}
    where = "of needles and passages, 0 to 1 (default: 0,0.25,0.5,0.75,1)"
    add("compare", "--depths", type=numbers(float), help=where, **depths)
    ask = "questions or passages a depth (default: 10)"
    add("compare", "--samples", default=10, help=ask, **integers)
    merge = "shares of the original to average each extension with, a row each (default: none)"
    add("compare", "--merge", type=numbers(float), default=[], metavar="X,X", help=merge)
    pcd = "ask repeat and RULER's tasks again, by contrast, PCD (default: no)"
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
    add("", "--write_samples", metavar="FILE")  # a job's FILE, as it was written before
    add("", "--select_corpus", metavar="FILE")


def open_weights(folder: Path, config) -> None:
    """Look at a checkpoint's headers, names and sizes; ValueError for what cannot be read."""
    with torch.device("meta"):
        shapes = {hf_name(name): p.shape for name, p in Llama(config).named_parameters()}
    open_tensors(folder, shapes, config)


def open_texts(a: Namespace, base: Path, folders: list[Path]) -> Texts:
    """Check the settings, tokenise and take the held-out parts."""
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
    if len(set(shapes)) > 1:
        raise ValueError(
            f"need checkpoints of one shape, got {shapes}: vocabulary, layers, heads, D"
        )
    for folder, config in zip((base, *folders), configs, strict=True):
        open_weights(folder, config)
    need, free = 2 * parameter_count(configs[0]) * a.dtype.itemsize, available_memory()
    if a.device == "cpu" and free is not None and need > free:
        raise ValueError(
            f"memory: two models take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; try "
            "--dtype bfloat16, or a machine with more"
        )
    tokenizer = data.load_tokenizer(base, a.add_eos)
    tokenizer.check_fits(configs[0].vocab_size)
    texts = {"long": a.data, "short": a.short_data or a.data}
    corpora = {name: data.tokenize(x, tokenizer, a.cache_dir, name) for name, x in texts.items()}
    data.share_held_out([*corpora.values()])
    ids = [
        data.held_out(corpus, max(1, a.eval_tokens // length), length)
        for corpus, length in zip(corpora.values(), (lengths[-1], original_len), strict=True)
    ]
    asks = any(task in RULER for task in a.tasks)
    source = Source(tokenizer, ids[0].flatten().numpy()) if asks else None
    far = far_parts(a, corpora["long"], *ids, original_len) if "far" in a.tasks else "not asked"
    return Texts(ids[1], ids[0], source, original_len, lengths, far)


def far_parts(a: Namespace, corpus, long: Tensor, short: Tensor, window: int):
    """Other far parts for the long sequences, by name; or, printed too, why there are none."""
    from measure.far_context import other_documents, shuffled

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
    """The command line. A user's error ends as SystemExit with one line."""
    expand_segments()  # before anything asks for the GPU
    outlive_readers()
    a = parse_args(argv)
    try:
        check_device(a, 0)
        for path in filter(None, (a.write_samples, a.select_corpus)):
            if Path(path).exists():
                raise ValueError(f"{path} exists: remove it, or name another file")
        if a.write_samples:
            write_samples(a)
        elif a.select_corpus:
            from measure.select_corpus import select_corpus  # which reads models as we do

            select_corpus(a)
        else:
            compare(a)
    except (ValueError, OSError, MemoryError) as e:
        raise SystemExit(f"evaluate: {' '.join(str(e).split()) or 'out of memory'}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


PICTURES = "overview", "drift", "training", "needles", "repeat"
RESULTS = {"settings", "tables", "runs"}  # what results.json holds, by which it is known


def compare(a: Namespace) -> None:
    """Measure the original and every checkpoint, then leave report, JSON and pictures."""
    beside = [Path(a.out_dir) / name for name in ("report.md", *(f"{x}.png" for x in PICTURES))]
    refuse_foreign(Path(a.out_dir) / "results.json", RESULTS, "evaluation", beside)
    base = resolve_checkpoint(a.base)
    found = [find_run(spec) for spec in a.ckpt]
    seen = Counter(["original", *(name for name, _, _ in found)])
    for i, (spec, (name, *more)) in enumerate(zip(a.ckpt, found, strict=True)):
        if seen[name] > 1 and not spec.startswith(f"{name}="):
            found[i] = (spec, *more)  # two folders of one name are two rows unless asked for as one
    for _, folder, _ in found:  # the text that a run of longred.py was given
        run = folder and folder.parent / "longred.json"
        if run and run.is_file() and not a.data:
            record = read_run(run.parent)
            config, own = record["config"], record.get("own_samples", {})
            for name in ("long_data", "short_data"):
                if not fits(config.get(name) or [], list[str]):
                    raise ValueError(f"{run} is damaged: its {name} is no list; pass --data")
            files = [own.get(s, {"file": s})["file"] for s in config.get("short_data") or ()]
            a.data, a.short_data = config.get("long_data"), a.short_data or files or None
            a.add_eos = config.get("add_eos") if a.add_eos is None else a.add_eos
    runs = [("original", base)] + [(name, folder) for name, folder, _ in found if folder]
    unfinished = [(name, why) for name, folder, why in found if not folder]
    texts = open_texts(a, base, [folder for _, folder in runs[1:]])
    with lock(Path(a.out_dir), "--out_dir"):  # two at work there would mix their results
        measure_all(a, texts, runs, base, unfinished)


def measure_all(a: Namespace, texts: Texts, runs: list, base: Path, unfinished: list) -> None:
    """The comparison itself, in a folder that is locked."""
    results, stopped = [], False
    try:
        for name, folder in runs:
            print(f"{name}: {folder}, {a.dtype} on {a.device}", flush=True)
            results.append((name, folder, {}))
            measure(a, texts, folder, base, results[-1][2])
            for share in a.merge if results[1:] else ():
                results.append((f"{name}, {share:g} original", None, {}))
                measure(a, texts, folder, base, results[-1][2], share=share)
            if a.pcd:
                results.append((f"{name}, PCD", None, {}))
                measure(a, texts, folder, base, results[-1][2], PCD)
    except KeyboardInterrupt:
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
        print("stopped; what was measured is kept, the same command goes on from there")
        sys.exit(130)
    if bad:
        raise ValueError(
            f"{', '.join(dict.fromkeys(bad))}: numbers that are not finite, null in results.json; "
            "its weights or its training are broken"
        )


if __name__ == "__main__":
    main()
