"""Does a model read far text, or does it only rely on having many tokens before it?

The same tokens are scored behind four kinds of far part. The near part is always the same:

    true       the text that was there
    other      as much of another document (of the same --data, and the same source if possible)
    NAME       other kinds of text, and `shuffled`, the true far part's tokens in random order
    cut        none: the window is cut to the original's

Content adds other - true, and length adds cut - other. A model that gains only by the second has
learnt to rely on many tokens, not to read them. A cut window alone (true against cut) is the sum of
both and shows neither. The task `far` of measure.evaluate reports both.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import data
from measure.losses import BATCH_TOKENS, read, token_losses
from model import Llama

DRAWS = 10_000  # of a bootstrap
# The 97.5% quantiles of Student's t with 1, 2, ... 18 degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
T += [2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101]


class DocumentOf:
    """In a corpus' place of tokens: which document each token belongs to."""

    def __init__(self, doc_starts: np.ndarray):
        self.doc_starts = doc_starts

    def __len__(self) -> int:
        return int(self.doc_starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.searchsorted(self.doc_starts, np.arange(part.start, part.stop), "right") - 1


def other_documents(corpus: data.Corpus, n: int, length: int, far: int, seed: int) -> Tensor:
    """For each of data.held_out(corpus, n, length) a far part without its near part's documents.

    From its own source where there is one, else from another; where the near part spans all
    documents, of others than its last token's. Returns (n, far) int64.
    Raises ValueError where all of the held-out text is of one document.
    """
    ids = data.held_out(corpus, n, length)
    owners = data.held_out(replace(corpus, tokens=DocumentOf(corpus.doc_starts)), n, length)
    sources = [{int(corpus.doc_sources[d]) for d in set(row.tolist())} for row in owners]
    theirs, out = [set(row[:far].tolist()) for row in owners], []
    for i, row in enumerate(owners):
        for mine in (set(row[far:].tolist()), {int(row[-1])}):
            if others := [j for j, documents in enumerate(theirs) if not mine & documents]:
                break
        else:
            raise ValueError(
                "the held-out text is of one document, far context has no control; add another"
            )
        near = [j for j in others if sources[i] & sources[j]] or others
        chosen = near[np.random.default_rng([seed, i]).integers(len(near))]
        out.append(ids[chosen, :far])
    return torch.stack(out)


def shuffled(far: Tensor, seed: int) -> Tensor:
    """Each row's own tokens in random order. far: (n, far) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in far])


@torch.no_grad()
def far_losses(
    model: Llama, sequences: Tensor, window: int, others: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Loss on the last window / 2 tokens of each sequence, behind every kind of far part.

    sequences: (B, T + 1) int64. The last `window` inputs of each are near and are kept; the
    T - window tokens before them are the far part. others: {name: (B, T - window) int64}.
    Returns {"true", each name, "cut": B mean losses in nats}.
    """
    far = sequences.shape[1] - 1 - window
    if far < 1:
        raise ValueError(f"sequences of {far + window} tokens have no part beyond {window}")
    texts = {"true": sequences} | {
        name: torch.cat([part.to(sequences), sequences[:, far:]], 1)
        for name, part in others.items()
    }
    texts["cut"] = sequences[:, far:]
    return {name: tail_losses(model, ids, window // 2) for name, ids in texts.items()}


def tail_losses(model: Llama, ids: Tensor, scored: int) -> list[float]:
    """ids (B, T + 1) int64 -> of each row the mean loss on its last `scored` tokens, nats."""
    length, out = ids.shape[1] - 1, []
    for part in ids.split(max(1, BATCH_TOKENS // length)):
        chunks = [
            hidden[:, max(0, length - scored - start) :]
            for start, hidden in read(model, part[:, :-1])
        ]
        tails = torch.cat(chunks, 1)
        out += [
            token_losses(model, tail, row[-scored:]).mean().item()
            for tail, row in zip(tails, part, strict=True)
        ]
    return out


def interval(differences, draws: int = DRAWS) -> tuple[float, float, float]:
    """Return the mean over sequences and its 95% interval; (mean, nan, nan) for one sequence.

    It is a bootstrap's (percentiles, seed 0), and Student's t below 20 sequences, where a bootstrap
    is too narrow: with 2 normal values it holds the mean in 47% of all cases, with 8 in 86%.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return float(d.mean()), math.nan, math.nan
    if len(d) < 20:
        half = T[len(d) - 2] * d.std(ddof=1) / math.sqrt(len(d))
        return float(d.mean()), float(d.mean() - half), float(d.mean() + half)
    picks = np.random.default_rng(0).integers(len(d), size=(draws, len(d)))
    low, high = np.percentile(d[picks].mean(1), [2.5, 97.5])
    return float(d.mean()), float(low), float(high)


def content_and_length(losses: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """What content and what length add, each with its interval over sequences, nats."""
    true, other, cut = (np.array(losses[name]) for name in ("true", "other", "cut"))
    return {"content": interval(other - true), "length": interval(cut - other)}


def columns(losses: dict[str, list[float]]) -> dict[str, float]:
    """A row of the report: losses by kind of far part, then both differences with their ends."""
    row = {f"loss, far part {name}": float(np.mean(x)) for name, x in losses.items()}
    for name, (mean, low, high) in content_and_length(losses).items():
        row[f"{name} adds"] = mean
        if len(losses["true"]) > 1:  # one sequence has no interval
            row |= {f"{name}, 95% from": low, f"{name}, to": high}
    return row
