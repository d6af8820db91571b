"""The next-token loss of a model by position, and how far it moved from the original."""

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Llama, attention_kl

CHUNK = 8192  # tokens of a sequence read at a time, so that 128K fits one GPU
BATCH_TOKENS = 65536  # tokens whose keys and values are held at a time


@torch.no_grad()
def short_text_drift(
    base: Llama, model: Llama, input_ids: Tensor, rows: int = 512, attention_sequences: int = 8
) -> dict:
    """Measure how far a model has moved from the original on short text (LongReD section 3).

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
def losses_by_sequence(
    model: Llama, input_ids: Tensor, window: int | None = None, rows: int = 512
) -> Tensor:
    """Return the next-token loss at each position of each sequence.

    input_ids: (B, T + 1) int64, read one sequence at a time, logits `rows` tokens at a time.
    window: None reads each sequence whole. Else each token is predicted from at most the `window`
        tokens before it: windows slide by a quarter, each scoring the tokens the one before it has
        not, so context is never under 3/4 of the window (the first window's own tokens excepted).
    Returns (B, T) float64 on the CPU, nats.
    """
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
    """Return each token's loss, (T,) float64 nats on the CPU.

    hidden: (T, D). labels: the tokens that follow, at least T of them.
    """
    parts = []
    for start in range(0, len(hidden), rows):
        logits = model.logits(hidden[start : start + rows]).float()
        nll = F.cross_entropy(logits, labels[start : start + len(logits)], reduction="none")
        parts.append(nll.double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the values' mean, or None if there is only one value."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / len(values) ** 0.5
