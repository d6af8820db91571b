"""Text -> token files -> batches for the streams of a run, and the position-id schemes.

    text of any usual kind --tokenize()--> Corpus, memory-mapped
    Corpus --Stream(...).batch(index)----> (B, T + 1) token ids, a function of (seed, name, index)
    Corpus --held_out()------------------> (n, T + 1) token ids that no Stream ever shows
    uniform_positions(), cream_positions() ... -> (B, T) position ids: T tokens spread over a window
                                                  of target_len positions

Tokenised once. The cache folder is named after a fingerprint of the files' contents, the tokenizer
and the options, and appears under that name only when it is complete; what is being built lies
beside it in a `.part` folder, and a killed run goes on from its last finished shard.

A document is stored as [BOS] + tokens + [EOS]:
    BOS where the model's tokenizer puts one in front by itself (add_bos_token in
        tokenizer_config.json, else the post-processor of tokenizer.json; Meta's own: always);
    EOS wherever the tokenizer names one: pretraining ends documents with it, whether or not the
        tokenizer adds it to prompts. For a model trained otherwise: `--no-add_eos`.

The held-out part is never trained on:
    with 100 documents or more, a document is held out when the checksum of its text is a multiple
        of 20: about 1 in 20, the same document in every stream, copies of it included;
    with fewer, the last twentieth of the tokens of every document.
"""

import base64
import codecs
import contextlib
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

FORMAT = 2  # part of the cache key: raise it when the files' layout or the cutting rule changes
PIECE = 1 << 14  # characters: longer documents go to the tokenizer in pieces, for speed and memory
LONGEST_PIECE = 1 << 16  # without a safe cut an unsafe one is made: a million blanks kill tiktoken
BATCH = 1 << 20  # characters handed to the tokenizer at once; it has two batches in hand
SHARD = 32  # batches between two notes of how far a build has come: what a kill costs
# Of a cache folder, beside meta.json. The second holds three int64 for each document: its end as an
# offset in tokens, the checksum of its text, and its source (index of the spec that named it).
FILES = ("tokens.bin", "documents.bin")
SPLIT_BY_DOCUMENT = 100  # documents: with fewer, each gives its end to the held-out part

# Text for a real checkpoint when none is named: files of the Hugging Face hub, readable with the
# packages of requirements.txt. Long: books (public domain, 1.1 GB) and papers (CC BY, CC BY-SA,
# CC0; 0.2 GB), about 0.9G tokens. Short and short-to-long: RedPajama's sample without its books,
# 2.9 GB, about 0.7G tokens, mixed nearly as the paper mixes SlimPajama (its Table 8), whose files
# need zstandard; its parts keep their own terms: Common Crawl's (1.5 GB), ODC-BY (c4, 0.9 GB), MIT,
# BSD or Apache 2.0 (github, 0.2 GB), the papers' own (arxiv, 0.1 GB), CC BY-SA (the rest, 0.2 GB).
DEFAULT_LONG = [
    "hf:common-pile/project_gutenberg_filtered/project_gutenberg-dolma-000[01].json.gz",
    "hf:common-pile/arxiv_papers_filtered/arxiv-papers-0007.json.gz",
]
PARTS = ("cc_2019-30", "cc_2023-06", "c4", "github", "arxiv", "stackexchange", "wikipedia")
DEFAULT_SHORT = [f"hf:togethercomputer/RedPajama-Data-1T-Sample/{p}_sample.jsonl" for p in PARTS]

# ---------------------------------------------------------------------------- tokenizers


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
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    added = {"bos": full[:at], "eos": full[at + len(bare) :]}

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
        coder = _optional("sentencepiece", path).SentencePieceProcessor(model_file=str(path))
        encode, ids = coder.encode, (coder.vocab_size(), coder.bos_id(), coder.eos_id())
    add_bos, fingerprint = config.get("add_bos_token", True), _sha256(path.read_bytes())
    decode = lambda ids: coder.decode([int(i) for i in ids])  # noqa: E731
    return Tokenizer(encode, decode, *ids, add_bos, True, fingerprint)


def _optional(package: str, what: object):
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


# ---------------------------------------------------------------------------- reading text


@dataclass
class File:
    path: str  # on disk, or inside its hub dataset; rows: the dataset's name
    source: int  # index of the spec that named it
    column: str  # field of a record that holds the text
    kind: str  # text | jsonl | parquet | rows (of a hub dataset, streamed)
    fingerprint: str = ""
    stat: tuple = ()  # size, mtime, ctime, device and inode before it was read; hub: size
    hub: tuple = ()  # (dataset, commit): fetched when it is read; rows: also config and split


@dataclass
class Piece:
    text: str
    first: bool  # of its document
    last: bool
    checksum: int  # of its document's first piece
    source: int
    position: int  # bytes of all files read before its end, for the progress bar


def _kind(path: str) -> str:
    found = re.search(r"\.(jsonl|ndjson|parquet|json(?=\.))(\.gz|\.zst)?$", path.lower())
    return "text" if not found else "parquet" if found[1] == "parquet" else "jsonl"


def find_files(specs: list[str], remembered: dict) -> list[File]:
    """Specs -> the files they name, sorted, each file once.

    specs: a file, a folder (all files below it, hidden ones left out), a glob, or
        hf:owner/name[/config][:split]: a dataset of the Hugging Face hub, where config is a folder,
        file or glob in it and split a word of the file names ("train" unless told, where there is
        such); each may end in #column, the field of records to read ("text" unless told).
    remembered: what hub specs named before, used first and added to: data stay as they were.
    """
    found = {}
    for source, spec in enumerate(map(str, specs)):
        path, column = spec, "text"
        if "#" in spec and not os.path.exists(spec):
            path, column = spec.rsplit("#", 1)
        if path.startswith("hf:"):
            remembered[path] = remembered.get(path) or _hub_files(path)
            for name, size, *hub in remembered[path]:
                kind, key = "rows" if len(hub) > 2 else _kind(name), "/".join([*hub, name])
                found.setdefault(key, File(name, source, column, kind, key, (size,), tuple(hub)))
            continue
        path = os.path.expanduser(path)
        path = f"{glob.escape(path)}/**" if os.path.isdir(path) else path
        paths = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        stats = {p: _stat(p) for p in paths if os.path.isfile(p)}
        # An empty file among others is no fault.
        full = {p: stat for p, stat in stats.items() if stat[0]}
        if not full:
            what = "only empty files" if stats else "no file"
            raise ValueError(f"{what} at {spec}: need a text file, folder, glob or hf:owner/name")
        for p, stat in full.items():
            found.setdefault(stat[3:], File(p, source, column, _kind(p), stat=stat))
    return list(found.values())


def _hub_files(spec: str) -> list[list]:
    """hf:owner/name[/config][:split] -> [file name, size, dataset, commit] of each; all of it as
    rows, [dataset, 0, dataset, commit, config, split], where no file can be told to be meant."""
    import huggingface_hub

    name, _, split = spec[3:].partition(":")
    owner, name, config = [*name.split("/", 2), "", ""][:3]
    repo = f"{owner}/{name}"
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, files_metadata=True)
    except Exception as error:  # its error classes differ from version to version
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot list {spec} ({reason}); check name and network, or name a downloaded folder"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    chosen = _choose(list(sizes), config, split)
    if not chosen and any(c in config for c in "*?[."):
        raise ValueError(f"no file {config!r} in {repo}; it has {', '.join([*sizes][:5])} ...")
    rows = [[repo, 0, repo, info.sha, config, split]]
    return [[name, sizes[name], repo, info.sha] for name in chosen] or rows


def _choose(names: list[str], config: str, split: str) -> list[str]:
    """Files of a hub dataset that config (a file, glob or folder) and split speak of."""
    if exact := fnmatch.filter(names, config):
        return sorted(exact)
    names = [n for n in names if _kind(n) != "text" and (not config or f"/{config}/" in f"/{n}")]
    in_split = re.compile(rf"(^|[/_.-]){split or 'train'}([/_.-]|$)")
    return sorted(filter(in_split.search, names)) or ([] if split else sorted(names))


def _decoded(stream, path: str, digest=None) -> Iterator[str]:
    """UTF-8 text of a stream, whose bytes also go into digest; ValueError at what is not text."""
    decoder, offset, block = codecs.getincrementaldecoder("utf-8-sig")(), 0, b" "
    while block:
        block = stream.read(1 << 20)
        if digest:
            digest.update(block)
        try:
            if b"\0" in block:
                raise ValueError(f"binary, with a zero byte at {offset + block.index(0)}")
            yield decoder.decode(block, final=not block)
        except ValueError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error}, block at byte {offset}); convert it (iconv -f "
                "latin1 -t utf-8), name files by a glob without it, or pass --skip_bad_lines"
            ) from error
        offset += len(block)


def _split(blocks: Iterable[str], cut: re.Pattern | None) -> Iterator[tuple[str, bool]]:
    """One document -> (piece, is it the last), cut where the tokens do not notice."""
    rest = ""
    for block in itertools.chain(blocks, [None]):
        rest, start = rest + (block or ""), 0
        # All of `rest` is cut at the end of the text; before it, only what has room for a cut.
        while len(rest) - start > (PIECE if block is None else LONGEST_PIECE):
            end = start + LONGEST_PIECE
            found = cut.search(rest, start + PIECE, end + 1) if cut else None
            if found is None and len(rest) <= end:
                break
            yield rest[start : found.start() if found else end], False
            start = found.end() if found else end
        rest = rest[start:]
    if rest:
        yield rest, True


@contextlib.contextmanager
def _open(file: File):
    """(stream of decompressed bytes, raw stream whose position tells the progress)"""
    path, name = file.path, file.path.lower()
    if file.kind == "rows":
        yield None, None
        return
    if file.hub:
        import huggingface_hub

        path = huggingface_hub.hf_hub_download(
            file.hub[0], path, repo_type="dataset", revision=file.hub[1]
        )
    with open(path, "rb") as raw:
        if name.endswith(".gz"):
            yield gzip.GzipFile(fileobj=raw), raw
        elif name.endswith(".zst"):
            unpacker = _optional("zstandard", path).ZstdDecompressor()
            yield io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True)), raw
        else:
            yield raw, raw


def _records(file: File, stream) -> Iterator[bytes | dict]:
    """Records of a file: lines of JSON, still to be parsed, or dicts."""
    if file.kind == "jsonl":
        yield from stream
    elif file.kind == "parquet":
        table = _optional("pyarrow.parquet", file.path).ParquetFile(stream)
        columns = [file.column] if file.column in table.schema_arrow.names else None
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    else:
        repo, commit, config, split = file.hub
        yield from _optional("datasets", repo).load_dataset(
            repo, config or None, split=split or "train", revision=commit, streaming=True
        )


def _documents(file: File, stream, skip_bad: bool) -> Iterator[Iterable[str] | None]:
    """Texts of a file, in blocks; None for a record left out because it is none."""
    if file.kind == "text":
        yield _decoded(stream, file.path)
        return
    for number, record in enumerate(_records(file, stream), 1):
        try:
            if isinstance(record, bytes):
                record = json.loads(record) if record.strip() else {file.column: ""}
            text = record.get(file.column) if isinstance(record, dict) else None
            if text is None:
                raise ValueError(f"no {file.column!r} in {str(record)[:60]}...; try PATH#FIELD")
            text.encode()  # half a surrogate pair is legal JSON and not text
            yield [text]
        except (ValueError, AttributeError) as error:
            if not skip_bad:
                raise ValueError(
                    f"{file.path}:{number}: not a record with text ({error}); mend it, or leave "
                    "out such records with --skip_bad_lines"
                ) from error
            yield None


def _pieces(files: list[File], cut, skip_bad: bool, count: dict) -> Iterator[Piece]:
    """Documents in order, as pieces. count["bad"] goes up with every record left out."""
    before = 0  # bytes in files read
    for file in files:
        try:
            with _open(file) as (stream, raw):
                for document in _documents(file, stream, skip_bad):
                    if document is None:
                        count["bad"] += 1
                        continue
                    checksum = None
                    for text, last in _split(document, cut):
                        first = checksum is None
                        checksum = zlib.crc32(text.encode()) if first else checksum
                        position = before + (raw.tell() if raw else 0)
                        yield Piece(text, first, last, checksum, file.source, position)
        except Exception as error:  # every reader has its own
            if type(error) is ValueError:  # ours, with file and remedy
                raise
            raise ValueError(f"cannot read {file.path}: {error}; fetch or leave it out") from error
        before += file.stat[0]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of BATCH characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batches, encode) -> Iterator[tuple[list[Piece], list]]:
    """(batch, ids of its pieces), in order.

    Libraries encode without Python's lock. With two batches in hand their threads never rest while
    the ids of one become Python's, the one before is written and another is read.
    """
    jobs = deque()
    with ThreadPoolExecutor(2) as pool:
        for batch in batches:
            jobs.append((batch, pool.submit(encode, [piece.text for piece in batch])))
            if len(jobs) > 2:
                batch, job = jobs.popleft()
                yield batch, job.result()
        for batch, job in jobs:
            yield batch, job.result()


def _fingerprint(files: list[File], seen: dict, skip_bad: bool, log: Callable) -> list[File]:
    """Fill in each file's content fingerprint; read only files not seen before or changed since.

    Plain text is also checked here, before hours of work: what is not UTF-8 is an error, or with
    skip_bad left out. seen: path -> size, times and fingerprint, remembered from run to run.
    """
    good = []
    for file in tqdm(files, "checking files", disable=None, leave=False):
        if not file.hub:
            path = os.path.abspath(file.path)
            try:
                if seen.get(path, [])[:-1] != list(file.stat):
                    seen[path] = [*file.stat, _hash(file)]
            except ValueError as error:
                if not skip_bad:
                    raise
                log(f"left out: {error}")
                continue
            file.fingerprint = seen[path][-1]
            # Written a moment ago, it can change within one tick of its clock: not remembered.
            if time.time_ns() - max(file.stat[1:3]) < 2e9:
                del seen[path]
        good.append(file)
    return good


def _stat(path: str) -> tuple:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


def _hash(file: File) -> str:
    digest = hashlib.sha256()
    with open(file.path, "rb") as stream:
        if file.kind == "text" and not file.path.lower().endswith((".gz", ".zst")):
            for _ in _decoded(stream, file.path, digest):
                pass
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------- tokenising


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


def tokenize(
    specs: list[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    name: str = "text",
    skip_bad_lines: bool = False,
    log: Callable[[str], None] = print,
) -> Corpus:
    """Tokenise text once; later calls map what lies on disk.

    specs: files, folders, globs, hub datasets (find_files says how they are written).
    name: of the stream, for the log.
    skip_bad_lines: leave out and count malformed records and files that are not text.
    Raises: ValueError at a missing, empty or unreadable file, a malformed record, a full disk.
    """
    cache_dir, memory = Path(cache_dir), Path(cache_dir) / "seen_files.json"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        seen = _read_json(memory)
        known = str(seen)
        files = _fingerprint(find_files(specs, seen), seen, skip_bad_lines, log)
        if str(seen) != known:
            _write_atomic(memory, seen)
        key = [FORMAT, PIECE, skip_bad_lines, tokenizer.fingerprint]
        key += [tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos]
        key += [(file.fingerprint, file.source, file.column, file.kind) for file in files]
        fingerprint = _sha256(json.dumps(key).encode())
        folder = cache_dir / f"tokens-{fingerprint}"
        meta = _complete(folder)
        if meta is None:
            log(f"{name}: tokenising {len(files):,} files, or waiting for a run that is at it")
            with FileLock(f"{folder}.lock"):  # a killed run's lock frees itself
                meta = _complete(folder, log)
                meta = meta or _build(folder, files, tokenizer, name, skip_bad_lines, log)
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        records = np.fromfile(folder / "documents.bin", dtype=np.int64).reshape(-1, 3)
    except OSError as error:
        raise ValueError(
            f"{name}: {error}; if the disk is full, free about half the text's size in {cache_dir} "
            "and run again: it goes on where it stopped"
        ) from error
    left_out = f"; {meta['bad']:,} bad records left out" if meta["bad"] else ""
    log(f"{name}: {len(records):,} documents, {len(tokens):,} tokens in {folder}{left_out}")
    starts = np.append(0, records[:, 0])
    return Corpus(name, tokens, starts, records[:, 1], records[:, 2], fingerprint, folder)


def _write_atomic(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _complete(folder: Path, log: Callable = lambda _: None) -> dict | None:
    """The cache's description if it is whole, None if it is to be built."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if all(os.path.getsize(folder / name) == meta[name] for name in FILES):
            return meta
    except (OSError, ValueError, KeyError):
        pass
    if folder.is_dir():
        log(f"{folder} is damaged: building it anew")
    return None


def _build(folder, files, tokenizer, name, skip_bad, log) -> dict:
    """Tokenise into folder.part, shard by shard; rename when done. Returns the description."""
    part, began = Path(f"{folder}.part"), time.perf_counter()
    part.mkdir(exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    fresh = {file: 0 for file in FILES} | {"dtype": dtype, "pieces": 0, "bad": 0}  # bytes, counts
    total, item = sum(file.stat[0] for file in files), np.dtype(dtype).itemsize
    with contextlib.ExitStack() as stack:
        bar = tqdm(None, f"tokenising {name}", total, unit="B", unit_scale=True, disable=None)
        stack.enter_context(bar)
        streams = {file: stack.enter_context(open(part / file, "ab")) for file in FILES}
        state = _read_json(part / "meta.json") or fresh
        if any(stream.tell() < state[file] for file, stream in streams.items()):
            state = fresh
        for file, stream in streams.items():
            stream.truncate(state[file])  # what a killed run wrote after its last shard
        if state[FILES[0]]:
            log(f"{name}: going on after {state[FILES[0]] // item:,} tokens of an interrupted run")

        def finish_shard():  # it is finished when meta.json is on disk, after what it speaks of
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
            _write_atomic(part / "meta.json", state)

        # What was tokenised is read again and dropped, plain text 100 times as fast as one core
        # tokenises it.
        state["bad"] = 0
        pieces = _pieces(files, tokenizer.cut, skip_bad, state)
        pieces = itertools.islice(pieces, state["pieces"], None)
        size = 0  # characters
        for n, (batch, ids) in enumerate(_encoded(_batches(pieces), tokenizer.encode), 1):
            _append(batch, ids, tokenizer, state, *streams.values())
            bar.set_postfix_str(f"{state[FILES[0]] // item:,} tokens", refresh=False)
            bar.update(batch[-1].position - bar.n)
            size += sum(len(piece.text) for piece in batch)
            if n % SHARD == 0:
                finish_shard()
        finish_shard()
    for file in files:
        if not file.hub and _stat(file.path) != file.stat:
            shutil.rmtree(part)
            raise ValueError(f"{file.path} changed while it was read: run again")
    if not state[FILES[0]]:
        raise ValueError(f"{name}: no text in {len(files)} files; name files that hold some")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    os.replace(part, folder)
    size, seconds = size / 1e6, time.perf_counter() - began
    log(f"{name}: tokenised {size:,.1f}M characters in {seconds:,.1f} s, {size / seconds:,.2f}M/s")
    return state


def _append(batch, ids, tokenizer, state, tokens, records) -> None:
    """Write one tokenised batch: documents' tokens and, where one ends, its record."""
    parts, ends, n_tokens = [], [], state[FILES[0]] // np.dtype(state["dtype"]).itemsize
    for piece, piece_ids in zip(batch, ids, strict=True):
        first = [tokenizer.bos_id] if tokenizer.add_bos and piece.first else []
        last = [tokenizer.eos_id] if tokenizer.add_eos and piece.last else []
        parts += [first, piece_ids, last]
        n_tokens += len(first) + len(piece_ids) + len(last)
        if piece.last:
            ends.append((n_tokens, piece.checksum, piece.source))
    flat = np.concatenate(parts, dtype=state["dtype"], casting="unsafe")
    state[FILES[0]] += tokens.write(flat.data)
    state[FILES[1]] += records.write(np.array(ends, dtype=np.int64).data)
    state["pieces"] += len(batch)


# ---------------------------------------------------------------------------- streams


def _packed(starts, lengths) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends in the packed sequence) of the segments that hold anything."""
    return starts[lengths > 0], np.cumsum(lengths[lengths > 0])


def _read(tokens, starts, ends, offset, length) -> np.ndarray:
    """`length` tokens of the packed sequence from `offset` on, as int64."""
    out = np.empty(length, dtype=np.int64)
    done, i = 0, int(np.searchsorted(ends, offset, side="right"))
    while done < length:
        skipped = offset + done - (ends[i - 1] if i else 0)
        n = min(length - done, ends[i] - offset - done)
        out[done : done + n] = tokens[starts[i] + skipped : starts[i] + skipped + n]
        done, i = done + n, i + 1
    return out


@dataclass
class Stream:
    """Batches of a corpus' training part; batch(index) is a pure function of (seed, name, index).

    Documents are packed back to back and cut into sequences of seq_len inputs, each with the next
    token as its last label, so that every token is predicted once an epoch. Each epoch visits the
    sequences in its own order; batches run on from one epoch into the next. Processes share out
    a step's sequences, not batches (runs.Life.share): the same tokens however many there are.
    Nothing hides one document from the next: attention and positions run across their borders.

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

    def __post_init__(self):
        starts, lengths = self.corpus.segments(min_doc_len=self.min_doc_len)
        if self.length_upsample != 1:
            chosen = _upsample(self.corpus, lengths, self.seq_len, self.length_upsample)
            starts, lengths = starts[chosen], lengths[chosen]
        self.starts, self.ends = _packed(starts, lengths)
        n_tokens = int(self.ends.max(initial=0))
        self.n_sequences = (n_tokens - 1) // self.seq_len
        if self.n_sequences < 1:
            only = f" in documents of at least {self.min_doc_len:,}" if self.min_doc_len else ""
            raise ValueError(
                f"{self.name}: text too short: {n_tokens:,} tokens to train on{only}, one sequence "
                f"needs {self.seq_len + 1:,}; add text or train on shorter sequences"
            )
        self._order = (-1, np.empty(0, np.int64))  # the order of one epoch, a pure function of it

    def batch(self, index: int) -> torch.Tensor:
        """Batch number `index` (step * micro_batches + micro): (batch_size, seq_len + 1) int64."""
        rows = np.empty((self.batch_size, self.seq_len + 1), np.int64)
        for row in range(self.batch_size):
            epoch, place = divmod(index * self.batch_size + row, self.n_sequences)
            if self._order[0] != epoch:
                rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), epoch])
                self._order = (epoch, rng.permutation(self.n_sequences))
            offset = int(self._order[1][place]) * self.seq_len
            rows[row] = _read(self.corpus.tokens, self.starts, self.ends, offset, self.seq_len + 1)
        return torch.from_numpy(rows)

    def describe(self, n_batches: int) -> str:
        """What a run of n_batches reads: documents, tokens, their lengths, epochs; for the log."""
        lengths = np.diff(self.ends, prepend=0)
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


def _upsample(corpus: Corpus, lengths: np.ndarray, long: int, factor: float) -> np.ndarray:
    """Indices of documents, repeated: see Stream's length_upsample."""
    weights = np.where(np.diff(corpus.doc_starts) >= long, float(factor), 1.0)
    for source in np.unique(corpus.doc_sources):
        here = corpus.doc_sources == source
        if lengths[here].any():
            weights[here] *= lengths[here].sum() / (weights * lengths)[here].sum()
    # The chance is the document's own, so that no other document changes it.
    chance = corpus.doc_checksums * 2654435761 % (1 << 32) / (1 << 32)
    copies = np.floor(weights + chance + 1e-9)
    return np.concatenate([np.flatnonzero(copies > i) for i in range(int(copies.max(initial=1)))])


def held_out(corpus: Corpus, n_sequences: int, seq_len: int) -> torch.Tensor:
    """Up to n_sequences of the held-out part, evenly spaced, none overlapping: (n, seq_len + 1).

    Raises: ValueError when there is not even one.
    """
    starts, ends = _packed(*corpus.segments(held_out=True))
    n_tokens = int(ends.max(initial=0))
    n = min(n_sequences, n_tokens // (seq_len + 1))
    if n < 1:
        raise ValueError(
            f"{corpus.name}: {n_tokens:,} held-out tokens, one sequence needs {seq_len + 1:,}; "
            "add text (a twentieth is held out) or evaluate at a shorter length"
        )
    offsets = np.linspace(0, n_tokens - seq_len - 1, n).astype(np.int64)
    rows = [_read(corpus.tokens, starts, ends, int(offset), seq_len + 1) for offset in offsets]
    return torch.from_numpy(np.stack(rows))


# ---------------------------------------------------------------------------- position schemes

Array, Rng = np.ndarray, np.random.Generator


def _check_lengths(seq_len: int, target_len: int) -> None:
    if target_len < seq_len or seq_len < 1:
        raise ValueError(
            f"cannot spread {seq_len} tokens over {target_len} positions: need target_len at least "
            "seq_len, and seq_len at least 1"
        )


def _three_chunks(rng, batch, seq_len, target_len, draw_ends) -> np.ndarray:
    """Head at the start, tail at the end of the window, the middle ending where draw_ends says.

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
    ends = draw_ends(head, mid)  # (B,) position of the middle's last token
    positions = np.empty((batch, seq_len), np.int64)
    positions[:, :head] = np.arange(head)
    positions[:, head : head + mid] = ends[:, None] + np.arange(1 - mid, 1)
    positions[:, head + mid :] = np.arange(target_len - head, target_len)
    return positions


def uniform_positions(rng: Rng, batch: int, seq_len: int, target_len: int) -> Array:
    """LongReD-U: the middle chunk ends anywhere between head and tail, equally likely.

    Any factor will do. As in the released code the middle never touches the head: at least one
    position lies between them.
    Returns: (batch, seq_len) int64, strictly increasing from 0 to target_len - 1.
    Raises: ValueError if target_len < seq_len, or if there is no room for three chunks.
    """

    def draw_ends(head, mid):
        return rng.integers(seq_len - head, target_len - head, size=batch)  # upper end excluded

    return _three_chunks(rng, batch, seq_len, target_len, draw_ends)


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

    def draw_ends(head, mid):
        u = rng.random(batch)
        if truncated:
            u = cdf[0] + u * (cdf[-1] - cdf[0])
        k = np.floor(np.interp(u, cdf, x))  # np.interp holds u outside the table to its ends
        low = np.floor(head + (mid - 1) * k / 2).astype(np.int64)
        high = np.floor(k * seq_len / 2).astype(np.int64) - head - 1
        return rng.integers(low, high, endpoint=True)

    return _three_chunks(rng, batch, seq_len, target_len, draw_ends)


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


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens end a sentence: text that ends in . ! ? or a newline, and the end of a document.

    Asked of the tokenizer token by token, so that any checkpoint will do. Returns (V,) bool.
    """
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    ends = np.array([text.endswith((".", "!", "?", "\n")) for text in texts])
    if tokenizer.eos_id is not None:
        ends[tokenizer.eos_id] = True
    return ends


def sentence_starts(ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Index of each sentence's first token, 0 among them. ids: (T,) int64; ends: sentence_ends."""
    return np.append(0, np.flatnonzero(ends[ids[:-1]]) + 1)
