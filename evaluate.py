"""What was kept and what was gained by an extension of the context window.

    python evaluate.py --base DIR --write_samples stories.jsonl --n_samples 400

writes text sampled from a model itself: short text from its own distribution, for distillation.
"""

import argparse
import functools
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from model import Llama, attention_kl, load_checkpoint, resolve_checkpoint

CHUNK = 8192  # tokens of a sequence read at a time, so that 128K fits one GPU
BATCH_TOKENS = 65536  # tokens whose keys and values are held at a time

# ------------------------------------------------------------------------------ what was kept


@torch.no_grad()
def kept(
    base: Llama, model: Llama, input_ids: Tensor, rows: int = 512, attention_sequences: int = 8
) -> dict:
    """How far a model has moved from the original on short text (LongReD section 3).

    input_ids: (B, T + 1) int64, read a sequence at a time, logits `rows` tokens at a time: two 8B
        models at 8,192 need 30 GiB for the weights and 5 GiB for hidden states in bf16.
    attention_sequences: how many of them, from the first on, to compare attention maps on.
    Returns means over tokens: loss (nats), kl (nats, KL(original || model) of the next token),
    same_top1 (share of tokens with the same first choice), cosine (n_layers + 1 numbers, by hidden
        state, eq. 5) and, if asked for, attention_kl (n_layers lists of n_heads numbers, eq. 6).
    """
    n_layers, n_tokens = base.config.n_layers, input_ids[:, 1:].numel()
    taps = tuple(range(n_layers + 1))
    sums = torch.zeros(3, dtype=torch.float64)
    cosine = torch.zeros(len(taps), dtype=torch.float64)
    heads = torch.zeros(n_layers, base.config.n_heads)
    compared = min(attention_sequences, len(input_ids))
    for i, ids in enumerate(tqdm(input_ids, desc="kept", unit="seq", leave=False, disable=None)):
        a, b = (m(ids[None, :-1], taps=taps)[1] for m in (base, model))
        for tap in taps:
            cosine[tap] += F.cosine_similarity(a[tap].float(), b[tap].float(), dim=-1).sum().cpu()
        for start in range(0, len(ids) - 1, rows):
            log_a, log_b = (
                m.logits(h[n_layers][0, start : start + rows]).float().log_softmax(-1)
                for m, h in ((base, a), (model, b))
            )
            labels = ids[start + 1 : start + 1 + len(log_b)]
            nll = F.nll_loss(log_b, labels, reduction="sum")
            kl = F.kl_div(log_b, log_a, reduction="sum", log_target=True)
            same = (log_a.argmax(-1) == log_b.argmax(-1)).sum()
            sums += torch.stack([nll, kl, same.float()]).double().cpu()
        if i < compared:
            heads += attention_kl(base, model, ids[None, :-1]).cpu() / compared
    loss, kl, same = (sums / n_tokens).tolist()
    result = {"loss": loss, "kl": kl, "same_top1": same, "cosine": (cosine / n_tokens).tolist()}
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
    length = input_ids.shape[1] - 1
    total = torch.zeros(length, dtype=torch.float64)
    whole = window is None or length <= window
    ends = [length] if whole else [*range(window, length, max(1, window // 4)), length]
    name = "loss by position" if whole else f"the same, window {window}"
    with tqdm(total=len(input_ids), desc=name, unit="seq", leave=False, disable=None) as bar:
        for ids in input_ids:
            done = 0  # positions scored
            for end in ends:
                start = 0 if whole else end - window
                for at, hidden in read(model, ids[None, start:end]):
                    skip = max(0, done - start - at)  # read for context alone
                    first = start + at + skip
                    nll = token_losses(model, hidden[0, skip:], ids[first + 1 :], rows)
                    total[first : first + len(nll)] += nll
                done = end
            bar.update()
    return total / len(input_ids)


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
def repeat_losses(model: Llama, sequences: Tensor, passage: int, cue: int = 8) -> Tensor:
    """Loss on the last `passage` tokens of each sequence, its first `cue` tokens not counted.

    sequences: (B, T) int64. Returns (B,) float64 nats, mean over a passage's counted tokens.
    """
    out = []
    batch = max(1, BATCH_TOKENS // sequences.shape[1])
    for part in tqdm(sequences.split(batch), desc="repeat", leave=False, disable=None):
        tail = []  # what the passage's counted tokens are predicted from
        for start, hidden in read(model, part[:, :-1]):
            tail.append(hidden[:, max(0, part.shape[1] - 1 - start - (passage - cue)) :])
        tail = torch.cat(tail, 1)
        labels = part[:, -tail.shape[1] :]
        out += [token_losses(model, h, y).mean() for h, y in zip(tail, labels, strict=True)]
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
        text, again = first[: length - passage], first[length - passage :]
        for depth in depths:
            at = round(depth * room)
            rows.append(np.concatenate([text[:at], again, text[at:room], again]))
        rows.append(first)
    return torch.from_numpy(np.stack(rows)), passage


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
TASKS = ["kept", "position", "repeat", "niah_single_2", "niah_multikey_1", "niah_multivalue"]
TASKS += ["niah_multiquery", "vt", "cwe", "fwe"]  # what is done unless --tasks says otherwise
TASKS_ALL = ["kept", "position", "repeat", *RULER]


@dataclass
class Sample:
    prompt: np.ndarray  # (length - n_new,) int64
    answers: list[str]  # all of them are asked for
    n_new: int  # tokens of room for the answer
    depth: float | None  # of the one needle asked for, 0 = start of the haystack


class Source:
    """What samples are made of: a tokenizer, and text with its words and ends of sentences."""

    def __init__(self, tokenizer: data.Tokenizer, tokens: np.ndarray):
        self.tokenizer, self.tokens = tokenizer, tokens
        text = tokenizer.decode(tokens[:1_000_000].tolist())
        # RULER's room for answers is in tokens of about 4 characters.
        self.stretch = max(1.0, 4 * min(len(tokens), 1_000_000) / len(text))
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        self.newline = self.encode("\n")[-1:]
        seen = np.unique(np.concatenate([tokens, self.encode(NOISE + "\n")]))
        ends = [i for i in seen if tokenizer.decode([int(i)]).rstrip(" ")[-1:] in list(".!?\n")]
        self.sentence_ends = np.array(ends, dtype=np.int64)
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
    ends = np.flatnonzero(np.isin(filler, source.sentence_ends)) + 1
    ends = np.concatenate([[0], ends, [n]])
    out, last = [], 0
    for i in np.argsort(depths, kind="stable"):
        at = int(ends[np.abs(ends - depths[i] * n).argmin()])
        out += [filler[last:at], pieces[i]]
        last = at
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


def ask(generate: Callable, samples: list[Sample], tokenizer: data.Tokenizer) -> list[float]:
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


# ------------------------------------------------------------------------------- samples, main


def plot_demo(rows: dict, curves: dict, original_len: int, target_len: int, path: Path) -> Path:
    """Two panels: short loss as points, long loss by position as lines. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = dict(zip(rows, [("#777777", ":"), ("#d55e00", "--"), ("#0072b2", "-")], strict=True))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 2])
    short = {name: next(iter(row.values())) for name, row in rows.items()}
    for x, (name, loss) in enumerate(short.items()):
        left.plot(x, loss, "o", markersize=9, color=styles[name][0])
        left.annotate(f"{loss:.2f}", (x, loss), (0, 8), textcoords="offset points", ha="center")
    left.set_xticks(range(len(short)), list(short))
    left.set_title(f"kept: English prose at {original_len}")
    left.set_ylabel("loss, nats a token (lower is better)")
    left.margins(0.25)
    for name, curve in curves.items():
        x = [(i + 0.5) * target_len / len(curve) for i in range(len(curve))]
        right.plot(x, curve, styles[name][1], color=styles[name][0], label=name)
    right.axvline(original_len, color="black", linewidth=0.8)
    right.annotate(" original window", (original_len, right.get_ylim()[1]), va="top")
    right.set_title("gained: source code, by position")
    right.set_xlabel("position, tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def write_samples(
    base: str, path: str, n_samples: int, length: int | None, temperature: float, seed: int
) -> None:
    """Sample texts from the model, each from its BOS token (else EOS) to its EOS token.

    path: a .jsonl of {"text": ...}; length: most tokens in one, default the model's window.
    """
    model = load_checkpoint(base)
    tokenizer = data.load_tokenizer(resolve_checkpoint(base))
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise ValueError(f"{base}: its tokenizer has neither BOS nor EOS to start a text from")
    length = length or model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    partial = Path(path + ".partial")
    with open(partial, "w", encoding="utf-8") as f, tqdm(total=n_samples, unit="text") as bar:
        for start in range(0, n_samples, 50):
            batch = torch.full((min(50, n_samples - start), 1), first)
            texts = model.generate(batch, length - 1, temperature, generator=generator)
            for ids in texts[:, 1:].tolist():
                ends = [i for i, t in enumerate(ids) if t in (tokenizer.eos_id, first)]
                f.write(json.dumps({"text": tokenizer.decode(ids[: (ends + [None])[0]])}) + "\n")
            bar.update(len(batch))
    partial.replace(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder, OUT_DIR, known name or hub id")
    parser.add_argument("--write_samples", required=True, metavar="FILE", help="a .jsonl to write")
    parser.add_argument("--n_samples", type=int, default=400)
    parser.add_argument("--length", type=int, help="most tokens in a sample (default: the window)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=2024)
    a = parser.parse_args(argv)
    try:
        write_samples(a.base, a.write_samples, a.n_samples, a.length, a.temperature, a.seed)
    except (ValueError, OSError) as e:
        raise SystemExit(f"evaluate: {e}") from None


if __name__ == "__main__":
    main()
