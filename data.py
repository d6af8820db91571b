"""Token files -> batches for the streams of a run, and the position-id schemes.

    text of any usual kind --tokenize()--> Corpus, memory-mapped            (machine/corpus.py)
    Corpus --Stream(...).batch(index)----> (B, T + 1) token ids, a function of (seed, name, index)
    Corpus --held_out()------------------> (n, T + 1) token ids that no Stream ever shows
    uniform_positions(), cream_positions() ... -> (B, T) position ids: T tokens spread over a window
                                                  of target_len positions

The held-out part is never trained on:
    with 100 documents or more, a document is held out when the checksum of its text is a multiple
        of 20: about 1 in 20, the same document in every stream, copies of it included;
    with fewer, the last twentieth of the tokens of every document.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from machine.tokenizer import Tokenizer

SPLIT_BY_DOCUMENT = 100  # documents: with fewer, each gives its end to the held-out part

# ---------------------------------------------------------------------------- from text to tokens


def load_tokenizer(folder: str | Path, add_eos: bool | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint folder: tokenizer.json or Meta's tokenizer.model.

    add_eos: whether documents end with EOS; None: where the tokenizer names one.
    Raises: ValueError if there is neither file, or it cannot be read.
    """
    from machine import tokenizer

    return tokenizer.load_tokenizer(folder, add_eos)


def tokenize(
    specs: list[str],
    tokenizer: "Tokenizer",
    cache_dir: str | Path,
    name: str = "text",
    skip_bad_lines: bool = False,
    log: Callable[[str], None] = print,
) -> "Corpus":
    """Tokenise text once; later calls map what lies in cache_dir.

    specs: files, folders, globs, hub datasets (machine.corpus.find_files says how to write them).
    name: of the stream, for the log.
    skip_bad_lines: leave out and count malformed records and files that are not text.
    Raises: ValueError at a missing, empty or unreadable file, a malformed record, a full disk.
    """
    from machine import corpus

    return corpus.tokenize(specs, tokenizer, cache_dir, name, skip_bad_lines, log)


@dataclass
class Corpus:
    """Tokenised documents, back to back, memory-mapped."""

    name: str
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    doc_starts: np.ndarray  # (n_docs + 1,) int64, the last one is n_tokens
    doc_checksums: np.ndarray  # (n_docs,) int64, crc32 of the text
    doc_sources: np.ndarray  # (n_docs,) int64, which of the specs
    fingerprint: str
    folder: Path

    @property
    def n_docs(self) -> int:
        return len(self.doc_checksums)

    def segments(self, held_out=False, min_doc_len=0) -> tuple[np.ndarray, np.ndarray]:
        """Where the training part lies, or the held-out part: (starts, lengths), one per document.

        The rule stands at the top of this file; lengths are 0 where there is nothing. Documents
        under min_doc_len tokens count as nothing.
        """
        starts, lengths = self.doc_starts[:-1], np.diff(self.doc_starts)
        if self.n_docs >= SPLIT_BY_DOCUMENT:
            out = self.doc_checksums % 20 == 0
            if not out.any():  # 1 chance in 170 at 100 documents
                out = self.doc_checksums == self.doc_checksums.min()
            size = np.where(out == held_out, lengths, 0)
        else:
            tail = lengths // 20
            starts = starts + lengths - tail if held_out else starts
            size = tail if held_out else lengths - tail
        return starts, np.where(lengths >= min_doc_len, size, 0)


# ---------------------------------------------------------------------------- streams


def _packed(starts, lengths) -> tuple[np.ndarray, np.ndarray]:
    """(starts in the corpus, ends in the packed sequence) of the segments that hold anything."""
    return starts[lengths > 0], np.cumsum(lengths[lengths > 0])


def _read(tokens, starts, packed_ends, offset, length) -> np.ndarray:
    """`length` tokens of the packed sequence from `offset` on, as int64."""
    out = np.empty(length, dtype=np.int64)
    done, i = 0, int(np.searchsorted(packed_ends, offset, side="right"))
    while done < length:
        skipped = offset + done - (packed_ends[i - 1] if i else 0)
        n = min(length - done, packed_ends[i] - offset - done)
        out[done : done + n] = tokens[starts[i] + skipped : starts[i] + skipped + n]
        done, i = done + n, i + 1
    return out


@dataclass
class Stream:
    """Batches of a corpus' training part; batch(index) is a pure function of (seed, name, index).

    Documents are packed back to back and cut into sequences of seq_len inputs, each with the next
    token as its last label, so that every token is predicted once an epoch. Each epoch visits the
    sequences in its own order; batches run on from one epoch into the next. Processes share out
    a step's sequences, not batches (machine/many.py): the same tokens however many there are.
    Nothing hides one document from the next: attention and positions run across their borders.

    source: of the corpus' sources (specs) this one alone; None: all.
    min_doc_len: tokens; shorter documents are left out.
    length_upsample: documents of seq_len tokens or more weigh this many times as much as shorter
        ones, and yet every source (spec) keeps its share of the tokens: each document is repeated
        or left out accordingly, a fraction of a copy being a chance. Copies lie far apart.
    """

    corpus: Corpus
    name: str
    seed: int
    batch_size: int
    seq_len: int
    min_doc_len: int = 0
    length_upsample: float = 1.0
    source: int | None = None

    def __post_init__(self):
        starts, lengths = self.corpus.segments(min_doc_len=self.min_doc_len)
        if self.source is not None:
            lengths = np.where(self.corpus.doc_sources == self.source, lengths, 0)
        if self.length_upsample != 1:
            chosen = _upsample(self.corpus, lengths, self.seq_len, self.length_upsample)
            starts, lengths = starts[chosen], lengths[chosen]
        self.starts, self.packed_ends = _packed(starts, lengths)
        n_tokens = int(self.packed_ends.max(initial=0))
        self.n_sequences = (n_tokens - 1) // self.seq_len
        if self.n_sequences < 1:
            only = f" in documents of at least {self.min_doc_len:,}" if self.min_doc_len else ""
            raise ValueError(
                f"{self.name}: text too short: {n_tokens:,} tokens to train on{only}, one sequence "
                f"needs {self.seq_len + 1:,}; add text or train on shorter sequences"
            )
        self._order = (-1, np.empty(0, np.int64))  # the order of one epoch, a pure function of it

    def sequence(self, number: int) -> np.ndarray:
        """Sequence `number` of all epochs: (seq_len + 1,) int64."""
        epoch, place = divmod(number, self.n_sequences)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch])
            self._order = (epoch, rng.permutation(self.n_sequences))
        offset = int(self._order[1][place]) * self.seq_len
        return _read(self.corpus.tokens, self.starts, self.packed_ends, offset, self.seq_len + 1)

    def batch(self, index: int) -> torch.Tensor:
        """Batch number `index` (step * micro_batches + micro): (batch_size, seq_len + 1) int64."""
        first = index * self.batch_size
        rows = (self.sequence(first + i) for i in range(self.batch_size))
        return torch.from_numpy(np.stack(list(rows)))

    def describe(self, n_batches: int) -> str:
        """What a run of n_batches reads: documents, tokens, their lengths, epochs; for the log."""
        lengths = np.diff(self.packed_ends, prepend=0)
        _, held = self.corpus.segments(held_out=True)
        edges = {"<1K": 1 << 10, "<4K": 1 << 12, "<16K": 1 << 14, "<32K": 1 << 15, "<128K": 1 << 17}
        edges["longer"] = 1 << 62
        share = np.histogram(lengths, [0, *edges.values()], weights=lengths)[0] / lengths.sum()
        spread = ", ".join(f"{n} {s:.0%}" for n, s in zip(edges, share, strict=True) if s)
        how = "by document" if self.corpus.n_docs >= SPLIT_BY_DOCUMENT else "at documents' ends"
        n, epochs = n_batches * self.batch_size, n_batches * self.batch_size / self.n_sequences
        many = f"\nWARNING {self.name}: the same text {epochs:.1f} times over; add more text"
        return (
            f"{self.name}: {len(lengths):,} documents, {lengths.sum():,} tokens to train on, "
            f"{held.sum():,} held out {how}; tokens by length of document: {spread}; "
            f"{n:,} sequences of {self.seq_len:,} are {epochs:.2f} epochs"
        ) + (many if epochs > 4 else "")


class Mixture:
    """Batches like a Stream's, of several sources in given shares of the tokens.

    Every BLOCK sequences hold a whole number of each source's, to the nearest by largest remainder,
    in random order; each source is read epoch by epoch by a Stream of its own. batch(index) is a
    pure function of (seed, name, index).
    """

    BLOCK = 1000  # sequences; shares are exact to a thousandth

    def __init__(self, streams: list[Stream], shares: list[float]):
        """streams: alike but for their source. shares: above 0, in any unit."""
        self.streams, self.corpus = streams, streams[0].corpus
        want = self.BLOCK * np.array(shares) / sum(shares)
        self.counts = np.floor(want).astype(int)
        short = np.argsort(self.counts - want, kind="stable")[: self.BLOCK - self.counts.sum()]
        self.counts[short] += 1
        self._block = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def sequence(self, number: int) -> np.ndarray:
        block, place = divmod(number, self.BLOCK)
        if self._block[0] != block:
            first = self.streams[0]
            salt = zlib.crc32(f"{first.name}, sources".encode())
            order = np.random.default_rng([first.seed, salt, block]).permutation(
                np.repeat(np.arange(len(self.counts)), self.counts)
            )
            ranks = np.empty(self.BLOCK, np.int64)  # of each among its source's in this block
            for source, count in enumerate(self.counts):
                ranks[order == source] = np.arange(count)
            self._block = (block, order, ranks)
        source, rank = int(self._block[1][place]), int(self._block[2][place])
        return self.streams[source].sequence(block * int(self.counts[source]) + rank)

    batch_size = property(lambda self: self.streams[0].batch_size)
    batch = Stream.batch

    def describe(self, n_batches: int) -> str:
        """Every source's line, for its share of a run of n_batches."""
        shares = self.counts / self.BLOCK
        lines = (
            f"{share:.1%} of {s.describe(round(n_batches * share))}"
            for s, share in zip(self.streams, shares, strict=True)
        )
        return "\n".join(lines)


def _upsample(corpus: Corpus, lengths: np.ndarray, seq_len: int, factor: float) -> np.ndarray:
    """Indices of documents, some of them repeated: see Stream's length_upsample."""
    weights = np.where(np.diff(corpus.doc_starts) >= seq_len, float(factor), 1.0)
    for source in np.unique(corpus.doc_sources):
        from_source = corpus.doc_sources == source
        if lengths[from_source].any():
            n_tokens = lengths[from_source].sum()
            weights[from_source] *= n_tokens / (weights * lengths)[from_source].sum()
    # The chance is the document's own, so that no other document changes it.
    chance = corpus.doc_checksums * 2654435761 % (1 << 32) / (1 << 32)
    copies = np.floor(weights + chance + 1e-9)
    return np.concatenate([np.flatnonzero(copies > i) for i in range(int(copies.max(initial=1)))])


def held_out(corpus: Corpus, n_sequences: int, seq_len: int) -> torch.Tensor:
    """Up to n_sequences of the held-out part, evenly spaced, none overlapping: (n, seq_len + 1).

    Raises: ValueError when there is not even one.
    """
    starts, packed_ends = _packed(*corpus.segments(held_out=True))
    n_tokens = int(packed_ends.max(initial=0))
    n = min(n_sequences, n_tokens // (seq_len + 1))
    if n < 1:
        raise ValueError(
            f"{corpus.name}: {n_tokens:,} held-out tokens, one sequence needs {seq_len + 1:,}; "
            "add text (a twentieth is held out) or evaluate at a shorter length"
        )
    offsets = np.linspace(0, n_tokens - seq_len - 1, n).astype(np.int64)
    read = (_read(corpus.tokens, starts, packed_ends, int(i), seq_len + 1) for i in offsets)
    return torch.from_numpy(np.stack(list(read)))


class Batch(NamedTuple):
    """What one forward pass reads: equally long sequences, or the same part of each."""

    ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, the tokens that follow
    indices: torch.Tensor  # (T,) int64, the tokens' own places in their sequence
    positions: torch.Tensor  # (B, T) or (T,) int64, where the student is told they stand
    share: float  # of its stream's mean loss


# ---------------------------------------------------------------------------- position schemes

Array, Rng = np.ndarray, np.random.Generator


def _check_lengths(seq_len: int, target_len: int) -> None:
    if target_len < seq_len or seq_len < 1:
        raise ValueError(
            f"cannot spread {seq_len} tokens over {target_len} positions: need target_len at least "
            "seq_len, and seq_len at least 1"
        )


def _three_chunks(rng, batch, seq_len, target_len, draw_middle) -> np.ndarray:
    """Head at the start, tail at the end of the window; draw_middle says where the middle ends.

    A coin per batch picks head = tail = T // 3, or 4 f rounded down (f = target_len / T), which is
    held to T // 3 where a short T leaves no middle otherwise.
    """
    _check_lengths(seq_len, target_len)
    if target_len == seq_len:
        return np.tile(np.arange(seq_len, dtype=np.int64), (batch, 1))
    if seq_len < 3:
        raise ValueError(f"{seq_len} tokens cannot form a head, a middle and a tail: need 3")
    head = seq_len // 3
    if rng.integers(2):
        head = min(head, 4 * target_len // seq_len)
    mid = seq_len - 2 * head
    mid_last = draw_middle(head, mid)  # (B,) position of the middle's last token
    positions = np.empty((batch, seq_len), np.int64)
    positions[:, :head] = np.arange(head)
    positions[:, head : head + mid] = mid_last[:, None] + np.arange(1 - mid, 1)
    positions[:, head + mid :] = np.arange(target_len - head, target_len)
    return positions


def uniform_positions(rng: Rng, batch: int, seq_len: int, target_len: int) -> Array:
    """LongReD-U: the middle chunk ends anywhere between head and tail, equally likely.

    Any factor will do. As in the released code the middle never touches the head: at least one
    position lies between them.
    Returns: (batch, seq_len) int64, strictly increasing from 0 to target_len - 1.
    Raises: ValueError if target_len < seq_len, or if there is no room for three chunks.
    """

    def draw_middle(head, mid):
        return rng.integers(seq_len - head, target_len - head, size=batch)  # upper end excluded

    return _three_chunks(rng, batch, seq_len, target_len, draw_middle)


def cream_positions(
    rng: Rng, batch: int, seq_len: int, target_len: int, truncated: bool = False
) -> Array:
    """LongReD-C: the middle chunk's place follows CREAM's Gaussian, as the released code draws it.

    With f = target_len / T, k in 2 .. 2 f says about which half-window the middle ends at:
        x = 1000 points from 2 to 2 f;   k = floor(interp(u, Phi((x - 1 - f) / 5), x)), u in (0, 1)
        end ~ uniform(head + (mid - 1) k / 2 .. k T / 2 - tail - 1)
    Phi is not normalised to [2, 2 f], so interp clamps the mass outside it onto the two ends. At
    f = 4: P(k = 2) = 0.345, P(3) .. P(7) = 0.070 to 0.079 each, P(k = 8) = 0.274: 62% of the
    draws sit on the ends, U-shaped, hardly "focused on the middle"; at f = 16 P(2) = 0.003, a bell.
    cream_truncated_positions is the Gaussian without the clamp.

    A factor that is not whole works alike: k runs to floor(2 f), and ends stay inside the window.
    Returns, raises: as uniform_positions.
    """
    factor = target_len / seq_len
    x = np.linspace(2, 2 * factor, 1000)
    cdf = torch.special.ndtr(torch.from_numpy((x - 1 - factor) / 5)).numpy()  # Phi

    def draw_middle(head, mid):
        u = rng.random(batch)
        if truncated:
            u = cdf[0] + u * (cdf[-1] - cdf[0])
        k = np.floor(np.interp(u, cdf, x))  # np.interp holds u outside the table to its ends
        low = np.floor(head + (mid - 1) * k / 2).astype(np.int64)
        high = np.floor(k * seq_len / 2).astype(np.int64) - head - 1
        return rng.integers(low, high, endpoint=True)

    return _three_chunks(rng, batch, seq_len, target_len, draw_middle)


def cream_truncated_positions(rng: Rng, batch: int, seq_len: int, target_len: int) -> Array:
    """cream_positions with the Gaussian truncated to [2, 2 f] and normalised: no clamp.

    At f = 4: P(k = 2 .. 7) = 0.156, 0.169, 0.176, 0.176, 0.169, 0.156 and P(k = 8) = 0, since k is
    rounded down: the last half-window is left to the tail.
    Returns, raises: as uniform_positions.
    """
    return cream_positions(rng, batch, seq_len, target_len, truncated=True)


def pose_positions(rng: Rng, batch: int, seq_len: int, target_len: int) -> Array:
    """PoSE (arXiv 2309.10400) with two chunks: the second is moved on by a random distance.

    First chunk 1 .. (T + 1) // 2 tokens, distance 0 .. target_len - T, both uniform, per sample.
    Differs: the tokens stay one contiguous text; PoSE also draws where its second chunk is read.
    Returns: (batch, seq_len) int64, strictly increasing from 0, last <= target_len - 1.
    """
    _check_lengths(seq_len, target_len)
    first = rng.integers(1, (seq_len + 1) // 2, size=(batch, 1), endpoint=True)
    distance = rng.integers(0, target_len - seq_len, size=(batch, 1), endpoint=True)
    index = np.arange(seq_len)
    return index + np.where(index < first, 0, distance)


END_PROMPT = 18  # tokens


def endprompt_positions(rng: Rng, batch: int, seq_len: int, target_len: int) -> Array:
    """EndPrompt (arXiv 2605.14589): the text at its own positions, its end at the window's.

    position i = i for i < T - E, else target_len - T + i; E = 18 tokens, at most half of T. One gap
    of full length for every token before it, none inside, and nothing is drawn.
    Differs: the last E tokens are the text's own, where the paper appends a prompt that says so.
    Returns: (batch, seq_len) int64, strictly increasing from 0 to target_len - 1.
    """
    _check_lengths(seq_len, target_len)
    index = np.arange(seq_len)
    end = min(END_PROMPT, seq_len // 2)
    positions = index + np.where(index < seq_len - end, 0, target_len - seq_len)
    return np.tile(positions, (batch, 1))


def longrecipe_positions(rng: Rng, boundaries: Array, seq_len: int, target_len: int) -> Array:
    """LongRecipe (arXiv 2409.00509, Algorithm 1): random gaps between sentences, none inside.

    The N sentences take N of target_len - T + N slots, in order, the first one slot 0; every slot
    left empty is one position skipped.
    boundaries: start index of each sentence, any order; 0 is one of them in any case.
    Differs: Algorithm 1 has target_len slots, from which sentences could run past the window; these
    are the released code's. A gap may be 0, where eq. 6 adds 1. The released code also gives a
    random first part of the sample its plain positions.
    Returns: (seq_len,) int64, strictly increasing from 0, last <= target_len - 1.
    """
    _check_lengths(seq_len, target_len)
    starts = np.unique(np.append(np.asarray(boundaries, dtype=np.int64), 0))
    if starts[0] < 0 or starts[-1] >= seq_len:
        raise ValueError(f"sentence starts {starts[0]} .. {starts[-1]} outside 0 .. {seq_len - 1}")
    n = len(starts)
    slots = 1 + np.sort(rng.choice(target_len - seq_len + n - 1, n - 1, replace=False))
    skipped = np.append(0, slots - np.arange(1, n))  # empty slots before each sentence
    return np.arange(seq_len) + np.repeat(skipped, np.diff(np.append(starts, seq_len)))


def sentence_ends(tokenizer: "Tokenizer") -> np.ndarray:
    """Which tokens end a sentence: text that ends in . ! ? or a newline, and the end of a document.

    Asked of the tokenizer token by token, so that any checkpoint will do. Returns (V,) bool.
    """
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    is_end = np.array([text.endswith((".", "!", "?", "\n")) for text in texts])
    if tokenizer.eos_id is not None:
        is_end[tokenizer.eos_id] = True
    return is_end


def sentence_starts(ids: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Index of each sentence's first token, 0 among them.

    ids: (T,) int64. is_end: (V,) bool, from sentence_ends. Returns (n_sentences,) int64.
    """
    return np.append(0, np.flatnonzero(is_end[ids[:-1]]) + 1)


def draw_positions(
    scheme: str, rng: Rng, ids: torch.Tensor, target_len: int, is_end: np.ndarray
) -> torch.Tensor:
    """Positions by the scheme's name, one of the functions above, for ids (B, T): (B, T) int64.

    is_end: (V,) bool, from sentence_ends; read by longrecipe alone.
    """
    if scheme == "longrecipe":
        texts = ids.numpy()
        starts = (sentence_starts(text, is_end) for text in texts)
        rows = [longrecipe_positions(rng, s, ids.shape[1], target_len) for s in starts]
        return torch.from_numpy(np.stack(rows))
    draw = {
        "uniform": uniform_positions,
        "cream": cream_positions,
        "cream_truncated": cream_truncated_positions,
        "pose": pose_positions,
        "endprompt": endprompt_positions,
    }[scheme]
    return torch.from_numpy(draw(rng, *ids.shape, target_len))
