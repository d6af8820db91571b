"""LongRecipe's choice of text: whole sentences rich in what an extension changed most.

    python -m measure.evaluate corpus selected.jsonl --base DIR --ckpt DIR --data TEXT...

LongRecipe (arXiv 2409.00509, section 4.1) scores each token by how far extending the model moved
its logit, calls the kinds of token that are frequent among the highest scores anchors, and trains
on the sentences that hold them: `logit_change`, `anchor_kinds`, `select_sentences`, in that order.
It needs an extended model first; a short one will do.
"""

import json
from argparse import Namespace
from shlex import quote

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from machine.checkpoints import resolve_checkpoint
from machine.corpus import tokenize
from machine.files import whole_file
from machine.formats import load_checkpoint, load_config
from machine.tokenizer import Tokenizer, load_tokenizer
from measure.losses import read
from model import Llama


@torch.no_grad()
def logit_change(base: Llama, extended: Llama, input_ids: Tensor, rows: int = 256) -> Tensor:
    """Return log softmax(S' - S) of each token that came, from both models' logits S, S' (eq. 2).

    input_ids: (T + 1,) int64. Returns (T,) fp32 on the CPU: above -ln V the extension raised the
    token that came more than the rest of the vocabulary.
    Differs: eq. 3 sums raw logit changes over samples; logits carry a free constant at each
    position, which the softmax removes and that sum does not, so scores stay eq. 2's.
    """
    parts = []
    both = (read(model, input_ids[None, :-1]) for model in (base, extended))
    for (begin, hidden), (_, changed) in zip(*both, strict=True):
        for start in range(0, hidden.shape[1], rows):
            rise = extended.logits(changed[0, start : start + rows]).float()
            rise -= base.logits(hidden[0, start : start + rows]).float()  # (rows, V)
            came = input_ids[begin + start + 1 : begin + start + 1 + len(rise), None]
            parts.append(rise.log_softmax(-1).gather(-1, came)[:, 0].cpu())
    return torch.cat(parts)


def token_kinds(tokenizer: Tokenizer) -> tuple[np.ndarray, list[str]]:
    """Return a kind for every token: ((V,) index into the names, names).

    Differs: the paper counts parts of speech. A tagger would tie us to one language and one way of
    cutting words, so a kind is the token's own text, case and blanks aside, and all numbers are
    one: the classes the paper finds (numerals, pronouns, auxiliaries, conjunctions, adpositions)
    are closed ones, whose frequent words are tokens of their own.
    """
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    kinds = ["number" if any(c.isdigit() for c in t) else t.strip().lower() or t for t in texts]
    names, index = np.unique(kinds, return_inverse=True)
    return index, names.tolist()


def anchor_kinds(
    scores: np.ndarray, kinds: np.ndarray, n_kinds: int, top: float = 0.2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kinds that are frequent among the `top` share of tokens by score (impactful ones).

    scores: (T,) of tokens; kinds: (T,) theirs. Returns (anchors, most frequent first; each kind's
    share of the impactful tokens; its share of all).
    Differs: the paper takes the top fifth of the vocabulary at each position; here only tokens that
    came are scored, and the fifth is of all positions read.
    "Frequent" is left open in the paper; here: more frequent than among all tokens, and of those
    kinds the most frequent ones that make up half of the impactful tokens, or all there are.
    """
    impactful = kinds[np.argsort(-scores, kind="stable")[: max(1, int(top * len(scores)))]]
    among, overall = (np.bincount(x, minlength=n_kinds) / len(x) for x in (impactful, kinds))
    order = np.argsort(-among, kind="stable")
    order = order[among[order] > overall[order]]
    covered = np.cumsum(among[order]) - among[order]  # by the kinds before
    return order[covered < 0.5], among, overall


def select_sentences(
    ids: np.ndarray, starts: np.ndarray, is_anchor: np.ndarray, keep: float
) -> np.ndarray:
    """Return the part of a document to train on: (T,) bool, whole sentences only.

    Sentences without an anchor go; of the others the ones densest in anchors stay, in their order
    in the text, until they make up `keep` of the document's tokens (the last may exceed it).
    ids: (T,) int64. starts: data.sentence_starts. is_anchor: (V,) bool.
    """
    lengths = np.diff(np.append(starts, len(ids)))
    anchors = np.add.reduceat(is_anchor[ids].astype(np.int64), starts)
    order = np.argsort(-anchors / lengths, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    chosen = np.zeros(len(starts), bool)
    chosen[order] = (before < keep * len(ids)) & (anchors[order] > 0)
    return np.repeat(chosen, lengths)


def find_anchors(a: Namespace, corpus: data.Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """Score a sample of the training part of --data; say which kinds are anchors.

    Returns (V,) bool, whether a token is of such a kind.
    """
    where = dict(device=a.device, dtype=a.dtype)
    base, extended = (load_checkpoint(x, **where) for x in (a.base, a.ckpt[0]))
    length = a.length or extended.config.max_position_embeddings
    sample = data.Stream(corpus, "impactful", a.seed, 1, length)
    n = min(sample.n_sequences, max(1, a.eval_tokens // length))
    rows = [sample.batch(i)[0] for i in tqdm(range(n), desc="reading", unit="seq", disable=None)]
    scores = torch.cat([logit_change(base, extended, row.to(a.device)) for row in rows]).numpy()
    of_token, names = token_kinds(tokenizer)
    kinds = of_token[torch.cat([row[1:] for row in rows]).numpy()]
    anchors, among, overall = anchor_kinds(scores, kinds, len(names))
    print(
        f"{len(anchors)} anchor kinds, from {len(scores):,} tokens read at {length:,}; the most "
        "frequent, with their share of the impactful fifth and of all:"
    )
    print(", ".join(f"{names[k]!r} {among[k]:.3f} {overall[k]:.3f}" for k in anchors[:20]))
    return np.isin(of_token, anchors)


def select_corpus(a: Namespace) -> None:
    """Find the anchors, then select from all of the training part of --data.

    The paper filters an 80K sample to the 24K trained on, hence --keep 0.3, document by document.
    What training holds out is left out here too: selected text has other checksums.
    """
    if not 0 < a.keep <= 1:
        raise ValueError(f"corpus: --keep {a.keep}: need a share above 0, at most 1")
    folders = [resolve_checkpoint(x) for x in (a.base, *a.ckpt)]
    if len(sizes := {load_config(folder).vocab_size for folder in folders}) > 1:
        raise ValueError(f"corpus: need two checkpoints of one vocabulary, got {sorted(sizes)} ids")
    tokenizer = load_tokenizer(folders[0], a.add_eos)
    corpus = tokenize(a.data, tokenizer, a.cache_dir, "data", a.skip_bad_lines)
    is_anchor, is_end = find_anchors(a, corpus, tokenizer), data.sentence_ends(tokenizer)
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    total = selected = documents = 0
    with whole_file(a.file) as f:
        for start, size in zip(*corpus.segments(), strict=True):
            ids = corpus.tokens[start : start + size].astype(np.int64)
            ids = ids[~np.isin(ids, special)]
            total += len(ids)
            if len(ids):
                starts = data.sentence_starts(ids, is_end)
                ids = ids[select_sentences(ids, starts, is_anchor, a.keep)]
            if len(ids):
                f.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
                selected, documents = selected + len(ids), documents + 1
    print(
        f"kept {selected:,} of {total:,} tokens in {documents:,} of {corpus.n_docs:,} documents: "
        f"{a.file}; train on it with --method longrecipe --long_data {quote(a.file)}"
    )
