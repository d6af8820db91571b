"""What was kept and what was gained by an extension of the context window.

    python evaluate.py --base DIR --write_samples stories.jsonl --n_samples 400

writes text sampled from a model itself: short text from its own distribution, for distillation.
"""

import argparse
import json
import zlib
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
