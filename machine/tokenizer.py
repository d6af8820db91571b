"""A checkpoint's tokenizer: read, and carried into an export.

Either Hugging Face's tokenizer.json or Meta's tokenizer.model, which is tiktoken's ranks (Llama 3)
or sentencepiece (Llama 1 and 2) and leaves an export as a tokenizer.json that encodes alike.
"""

import base64
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from machine.checkpoints import read_json, write_json

# What may stand beside the weights, and goes along with them.
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json tokenizer.model vocab.json "
    "merges.txt added_tokens.json chat_template.jinja"
).split()


@dataclass
class Tokenizer:
    encode: Callable[[list[str]], list]  # lists or arrays of ids, whichever is faster; no BOS, EOS
    decode: Callable[[Iterable[int]], str]
    vocab_size: int  # largest id + 1
    bos_id: int | None
    eos_id: int | None
    add_bos: bool  # documents begin with bos_id
    add_eos: bool  # documents end with eos_id
    fingerprint: str  # of the tokenizer's file
    cut: re.Pattern | None = None  # where a text may be cut without changing its tokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; markup such as <s> is plain text."""
        return [[int(i) for i in ids] for ids in self.encode(texts)]

    def check_fits(self, vocab_size: int) -> None:
        """ValueError if the tokenizer can produce ids that a model's vocabulary does not hold."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer does not fit the model: its ids go up to {self.vocab_size - 1}, the "
                f"model has {vocab_size} embeddings; use the tokenizer that came with the weights"
            )


def load_tokenizer(folder: str | Path, add_eos: bool | None = None) -> Tokenizer:
    """Read tokenizer.json or Meta's tokenizer.model from a checkpoint folder.

    add_eos: whether documents end with EOS; None: where the tokenizer names one.
    Raises: ValueError if there is neither, or it cannot be read.
    """
    for name, load in (("tokenizer.json", _load_json), ("tokenizer.model", _load_model)):
        path = Path(folder) / name
        if path.is_file():
            try:
                tokenizer = load(path, _read_json(path.with_name("tokenizer_config.json")))
            except Exception as error:  # the tokenizers library raises bare Exception
                if type(error) is ValueError:  # ours
                    raise
                raise ValueError(f"cannot use {path}: {error}; fetch it again") from error
            tokenizer.cut = _find_cut(tokenizer)
            tokenizer.add_eos = tokenizer.add_eos if add_eos is None else add_eos
            return tokenizer
    raise ValueError(
        f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; copy one of "
        "them from where the weights came from"
    )


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _load_json(path: Path, config: dict) -> Tokenizer:
    """Hugging Face's tokenizer.json."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns after a fork
    import tokenizers

    tk = tokenizers.Tokenizer.from_file(str(path))
    tk.no_truncation()
    tk.no_padding()
    tk.encode_special_tokens = True  # "<s>" inside a text is three characters, not the token
    # What the post-processor puts around a text is the model's own habit.
    bare, full = tk.encode("a", add_special_tokens=False).ids, tk.encode("a").ids
    first = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    added = {"bos": full[:first], "eos": full[first + len(bare) :]}

    def special(kind: str) -> int | None:
        token = config.get(f"{kind}_token")
        token = tk.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        for name in ("config.json", "generation_config.json"):
            found = _read_json(path.with_name(name)).get(f"{kind}_token_id")
            token = found if token is None else token
        token = token[0] if isinstance(token, list) else token  # Llama 3.1: the first ends a text
        return added[kind][0] if token is None and added[kind] else token

    bos_id, eos_id = special("bos"), special("eos")
    adds = config.get("add_bos_token")
    add_bos = bos_id is not None and (bos_id in added["bos"] if adds is None else adds)
    encode = tk.encode_batch_fast  # fast: no character offsets
    return Tokenizer(
        # Each list is packed as soon as it is made: all of them at once no cache would hold.
        lambda texts: [array("I", e.ids) for e in encode(texts, add_special_tokens=False)],
        lambda ids: tk.decode([int(i) for i in ids], skip_special_tokens=False),
        max(tk.get_vocab(with_added_tokens=True).values()) + 1,
        *(bos_id, eos_id, bool(add_bos), eos_id is not None, _sha256(path.read_bytes())),
    )


# Llama 3's way of cutting text into words, which its tokenizer.model leaves to the reader.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_special_tokens(n_ranks: int) -> dict[str, int]:
    """Llama 3's 256 special tokens, which follow the n_ranks ordinary ones."""
    names = [f"reserved_special_token_{i}" for i in range(251)]
    names[:0] = ["begin_of_text", "end_of_text"]
    names[6:6] = ["start_header_id", "end_header_id"]
    names.insert(9, "eot_id")
    return {f"<|{name}|>": n_ranks + i for i, name in enumerate(names)}


def read_ranks(path: Path) -> dict[bytes, int] | None:
    """Tokens of a tiktoken file (base64, space, rank on each line); None if it is not one."""
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        return None


def _load_model(path: Path, config: dict) -> Tokenizer:
    """Meta's tokenizer.model: tiktoken ranks (Llama 3) or sentencepiece (Llama 1 and 2)."""
    if ranks := read_ranks(path):
        import tiktoken

        special = llama3_special_tokens(len(ranks))
        coder = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        pool = ThreadPoolExecutor(os.cpu_count())
        one = functools.partial(coder.encode_to_numpy, disallowed_special=())
        encode = lambda texts: list(pool.map(one, texts))  # noqa: E731
        ids = len(ranks) + 256, special["<|begin_of_text|>"], special["<|end_of_text|>"]
    else:
        coder = optional("sentencepiece", path).SentencePieceProcessor(model_file=str(path))
        encode, ids = coder.encode, (coder.vocab_size(), coder.bos_id(), coder.eos_id())
    add_bos, fingerprint = config.get("add_bos_token", True), _sha256(path.read_bytes())
    decode = lambda ids: coder.decode([int(i) for i in ids])  # noqa: E731
    return Tokenizer(encode, decode, *ids, add_bos, True, fingerprint)


def optional(package: str, what: object):
    """Import a package that only some inputs need. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        package = package.split(".")[0]
        raise ValueError(f"reading {what} takes one more package: pip install {package}") from error


def _find_cut(tokenizer: Tokenizer) -> re.Pattern | None:
    """Where a long text may be cut so that its pieces' tokens are the tokens of the whole.

    Byte-level tokenizers cut at word borders first: after a lone newline, or before a lone space,
    is safe. Sentencepiece's put a space in front of every text: cut at a space and drop it. Which
    holds is tried on this tokenizer. Neither: pieces of LONGEST_PIECE, a token off at each cut.
    """
    a, b = "He said: it's 12 o'clock,\n\nbut 'No one", "knew' the 7th\r\nthing of 1999. Yes"
    keep = r"(?<=\S\n)(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])"
    drop = r"(?<=[^\W\d_]) (?=[^\W\d_])"
    for pattern, *groups in (
        (keep, [a + "\n" + b, a + "\n", b], [a + " " + b, a, " " + b]),
        (drop, [a + " " + b, a, b]),
    ):
        ids = [tokenizer.encode_batch(group) for group in groups]
        if all(whole == first + second for whole, first, second in ids):
            return re.compile(pattern)
    return None


# --------------------------------------------------------------------------------- into an export


def carry_tokenizer(source: Path, out_dir: Path, window: int | None) -> dict:
    """Copy a checkpoint's tokenizer files, or convert the tokenizer.model of one that has no other.

    window: max_position_embeddings of the export, in tokens; None leaves the old model_max_length.
    Returns the ids of begin and end of text where a conversion found them, as in config.json.
    """
    found = {name for name in TOKENIZER_FILES if (source / name).is_file()}
    special = {}
    if "tokenizer.model" in found and "tokenizer.json" not in found:
        special = _convert(source, out_dir)
        found.remove("tokenizer.model")
    for name in found:
        shutil.copyfile(source / name, out_dir / name)
    settings = out_dir / "tokenizer_config.json"
    if settings.is_file() and window:
        write_json(settings, read_json(settings) | {"model_max_length": window})
    return special


def _convert(source: Path, out_dir: Path) -> dict:
    """Write Meta's tokenizer.model as a tokenizer.json that encodes alike; refuse if it does not.

    Returns config.json's ids of begin and end of text.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast
    from tokenizers import pre_tokenizers as cutters
    from tokenizers.processors import TemplateProcessing

    path = source / "tokenizer.model"
    original, ranks = load_tokenizer(source), read_ranks(path)
    if ranks:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]  # byte-level BPE's stand-ins
        spell = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
        special = llama3_special_tokens(len(ranks))
        merges = _merges(vocab, sorted(vocab, key=vocab.get))
        converted = Fast(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        cut = cutters.Split(Regex(LLAMA3_PATTERN), "isolated")
        level = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
        converted.pre_tokenizer = cutters.Sequence([cut, level])
        converted.decoder = decoders.ByteLevel()
    else:
        from sentencepiece import SentencePieceProcessor

        sp, blank = SentencePieceProcessor(model_file=str(path)), "\u2581"
        vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        special = [p for p, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i)]
        merged = [p for p, i in vocab.items() if p not in special and not sp.is_byte(i)]
        merges = _merges(vocab, sorted(merged, key=lambda p: -sp.get_score(vocab[p])))
        unknown = sp.id_to_piece(sp.unk_id())
        bytes_too = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
        converted = Fast(models.BPE(vocab, merges, **bytes_too))
        spaces = [normalizers.Prepend(blank), normalizers.Replace(" ", blank)]
        converted.normalizer = normalizers.Sequence(spaces)
        decoder = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
        converted.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)])
        # Llama 3's file of that name is left behind: readers of Hugging Face folders take it for a
        # sentencepiece model, and break on it.
        shutil.copyfile(path, out_dir / path.name)
    converted.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    bos, eos = (converted.id_to_token(i) for i in (original.bos_id, original.eos_id))
    begin = [(bos, original.bos_id)]
    converted.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    probe = ["It's 12,345.67\n\n  \tdef f(x):  # \u00e9\u4e16\u754c \U0001f600 don't  ", " a", ""]
    for text, want in zip(probe, original.encode_batch(probe), strict=True):
        if converted.encode(text, add_special_tokens=False).ids != list(want):
            raise ValueError(f"{path} is of a kind with no known tokenizer.json; put one beside it")
    converted.save(str(out_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    write_json(out_dir / "tokenizer_config.json", settings)
    return {"bos_token_id": original.bos_id, "eos_token_id": original.eos_id}


def _merges(vocab: dict[str, int], order: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that make a third, in the order in which BPE prefers the result.

    Neither kind of file keeps the pairs: any two neighbours merge whose union is a token.
    """
    merges = []
    for token in order:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
