"""Streams that read some documents more often than others, and mixtures of several sources."""

import zlib

import numpy as np

from data import Corpus, Stream


def choose_documents(
    corpus: Corpus, seq_len: int, source: int | None, min_doc_len: int, length_upsample: float
) -> np.ndarray | None:
    """Return the indices of the documents for a data.Stream; None: all of them, in order.

    source: the index of the one source to read; None: all.
    min_doc_len: tokens; shorter documents are left out.
    length_upsample: how many times as much documents of seq_len tokens or more weigh as shorter
        ones. Every source keeps its share of the tokens: each document is repeated or left out
        accordingly, and a fraction of a copy is a probability. Copies are far apart.
    """
    if source is None and not min_doc_len and length_upsample == 1:
        return None
    sizes = np.diff(corpus.doc_starts)
    if min_doc_len > sizes.max(initial=0):
        raise ValueError(
            f"--min_doc_len {min_doc_len}: no document of {corpus.name} has so many tokens, the "
            f"longest has {sizes.max(initial=0):,}; pass a smaller one"
        )
    lengths = np.where(sizes >= min_doc_len, corpus.segments()[1], 0)
    if source is not None:
        lengths = np.where(corpus.doc_sources == source, lengths, 0)
    if length_upsample == 1:
        return np.flatnonzero(lengths)
    chosen = _upsample(corpus, lengths, seq_len, length_upsample)
    return chosen[lengths[chosen] > 0]


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

    def _part(self, number: int) -> tuple[Stream, int]:
        """Return the stream whose sequence is number `number`, and its number in that stream."""
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
        return self.streams[source], block * int(self.counts[source]) + rank

    def sequence(self, number: int) -> np.ndarray:
        stream, own = self._part(number)
        return stream.sequence(own)

    def opens(self, number: int) -> np.ndarray:
        stream, own = self._part(number)
        return stream.opens(own)

    batch_size = property(lambda self: self.streams[0].batch_size)
    batch, first_tokens = Stream.batch, Stream.first_tokens

    def describe(self, n_batches: int) -> str:
        """Return a line for each source, about its share of a run of n_batches, and one for all."""
        shares, held = self.counts / self.BLOCK, self.corpus.describe_held_out()
        lines = [
            f"{share:.1%} of {s.describe(round(n_batches * share))}".replace(f", {held}", "")
            for s, share in zip(self.streams, shares, strict=True)
        ]
        return "\n".join([*lines, f"{self.streams[0].name}: of all its sources {held}"])


def _upsample(corpus: Corpus, lengths: np.ndarray, seq_len: int, factor: float) -> np.ndarray:
    """Return the indices of documents, some repeated: see choose_documents' length_upsample."""
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
