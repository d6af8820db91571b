"""Text -> token files -> batches for the three streams, and the position-id schemes.

    text files --tokenize()--> Corpus (memory-mapped) --Stream.batch(index)--> (B, T + 1) token ids
                                                     `--held_out()-----------> text never trained on
    uniform_positions(), cream_positions(), ...      --> (B, T) position ids: T tokens spread over a
                                                         window of target_len positions

Tokenised once. The cache folder is named after a fingerprint of the files' contents, the tokenizer
and the options, and appears under that name only when it is complete; what is being built lies
beside it in a `.part` folder with a journal of finished shards, from which a killed run goes on.

A document is stored as [BOS] + tokens + [EOS]:
    BOS where the model's tokenizer puts one in front by itself (add_bos_token in
        tokenizer_config.json, else the post-processor of tokenizer.json; Meta's own: always);
    EOS wherever the tokenizer names one: pretraining ends documents with it, whether or not the
        tokenizer adds it to prompts. For a model trained otherwise: `tokenizer.add_eos = False`.

The held-out part is never trained on:
    with 100 documents or more, a document is held out when the checksum of its text is a multiple
        of 20: about 1 in 20, the same document in every stream, copies of it included;
    with fewer, the last twentieth of the tokens of every document.

Everything random is a pure function of (seed, stream name, index): no generator is kept.
"""

import codecs
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

FORMAT = 1  # part of the cache key: raise it when the files' layout or the cutting rule changes
PIECE = 1 << 16  # characters: longer documents go to the tokenizer in pieces, for speed and memory
LONGEST_PIECE = 1 << 20  # characters without a safe cut before an unsafe one is made
BATCH = 1 << 22  # characters handed to the tokenizer at once; two batches are in flight
SHARD = 1 << 26  # characters between two entries of the journal: what a killed run loses at most
RECORD = 3  # int64 per document on disk: end offset in tokens, checksum of the text, source

# ---------------------------------------------------------------------------- tokenizers


@dataclass
class Tokenizer:
    encode_batch: Callable[[list[str]], list[list[int]]]  # no special tokens, markup is plain text
    decode: Callable[[Iterable[int]], str]
    vocab_size: int  # largest id + 1
    bos_id: int | None
    eos_id: int | None
    add_bos: bool  # documents begin with bos_id
    add_eos: bool  # documents end with eos_id
    fingerprint: str  # of the tokenizer's file
    cut: re.Pattern | None = None  # where a text may be cut without changing its tokens

    def check_fits(self, vocab_size: int) -> None:
        """ValueError if the tokenizer can produce ids that a model's vocabulary does not hold."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer does not fit the model: its ids go up to {self.vocab_size - 1}, the "
                f"model has {vocab_size} embeddings; use the tokenizer that came with the weights"
            )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read tokenizer.json or Meta's tokenizer.model from a checkpoint folder.

    Raises: ValueError if there is neither, or it cannot be read.
    """
    folder = Path(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if path.is_file():
            load = _load_json if path.suffix == ".json" else _load_model
            try:
                tokenizer = load(path, _read_json(folder / "tokenizer_config.json"))
            except (ImportError, ValueError):
                raise
            except Exception as error:  # the tokenizers library raises bare Exception
                raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
            tokenizer.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            tokenizer.cut = _find_cut(tokenizer)
            return tokenizer
    raise ValueError(
        f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; copy one of "
        "them from where the weights came from"
    )


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load_json(path: Path, config: dict) -> Tokenizer:
    """Hugging Face's tokenizer.json."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns after a fork
    import tokenizers

    tk = tokenizers.Tokenizer.from_file(str(path))
    tk.no_truncation()
    tk.no_padding()
    tk.encode_special_tokens = True  # "<s>" inside a text is three characters, not the token
    # What the post-processor adds to a text: the model's own habit.
    bare, full = tk.encode("a", add_special_tokens=False).ids, tk.encode("a").ids
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]

    def special(kind: str) -> int | None:
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and tk.token_to_id(token) is not None:
            return tk.token_to_id(token)
        for name in ("config.json", "generation_config.json"):
            found = _read_json(path.parent / name).get(f"{kind}_token_id")
            if found is not None:  # Llama 3.1 lists several ends; the first ends a text
                return found[0] if isinstance(found, list) else found
        added = before if kind == "bos" else after
        return added[0] if added else None

    bos_id, eos_id = special("bos"), special("eos")
    adds_bos = config.get("add_bos_token")
    encode = getattr(tk, "encode_batch_fast", tk.encode_batch)  # fast: no character offsets

    return Tokenizer(
        encode_batch=lambda texts: [e.ids for e in encode(texts, add_special_tokens=False)],
        decode=lambda ids: tk.decode([int(i) for i in ids], skip_special_tokens=False),
        vocab_size=max(tk.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=bos_id is not None and (bos_id in before if adds_bos is None else bool(adds_bos)),
        add_eos=eos_id is not None,
        fingerprint="",
    )


# Llama 3's way of cutting text into words, as its tokenizer.model needs it and does not hold it.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_special_tokens(n_ranks: int) -> dict[str, int]:
    """Llama 3's 256 special tokens, which follow the n_ranks ordinary ones."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    names[9] = "eot_id"
    reserved = itertools.count()
    return {
        f"<|{names.get(i) or f'reserved_special_token_{next(reserved)}'}|>": n_ranks + i
        for i in range(256)
    }


def read_ranks(path: Path) -> dict[bytes, int] | None:
    """Tokens of a tiktoken file (base64, space, rank on each line); None if it is not one."""
    import base64
    import binascii

    try:
        lines = path.read_bytes().splitlines()
        pairs = (line.split() for line in lines if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        return None


def _load_model(path: Path, config: dict) -> Tokenizer:
    """Meta's tokenizer.model: tiktoken ranks (Llama 3) or sentencepiece (Llama 1 and 2)."""
    ranks = read_ranks(path)
    if ranks:
        import tiktoken

        special = llama3_special_tokens(len(ranks))
        encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        n_threads = os.cpu_count() or 1
        encode = lambda texts: encoding.encode_ordinary_batch(texts, num_threads=n_threads)  # noqa: E731
        decode, vocab_size = encoding.decode, len(ranks) + 256
        bos_id, eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
    else:
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(
                f"{path} is a sentencepiece model: pip install sentencepiece, or put the model's "
                "tokenizer.json beside it"
            ) from error
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        encode, decode, vocab_size = sp.encode, sp.decode, sp.vocab_size()
        bos_id, eos_id = sp.bos_id(), sp.eos_id()
    return Tokenizer(
        encode_batch=encode,
        decode=lambda ids: decode([int(i) for i in ids]),
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=config.get("add_bos_token", True),
        add_eos=True,
        fingerprint="",
    )


def _find_cut(tokenizer: Tokenizer) -> re.Pattern | None:
    """Where a long text may be cut so that its pieces' tokens are the tokens of the whole.

    Byte-level tokenizers first cut at word borders themselves: after a newline or before a space
    is safe. Sentencepiece's put a space in front of every text: cut at a space and drop it. Which
    holds is tried on this tokenizer. Neither: pieces of LONGEST_PIECE, one token off at each cut.
    """
    left, right = "He said: it's 12 o'clock,\n\nbut 'No one", "knew' the 7th\r\nthing of 1999. Yes"
    keep = r"(?<=\n)(?=[^\s])|(?<=[^\W\d_])(?= [^\W\d_])"
    drop = r"(?<=[^\W\d_]) (?=[^\W\d_])"
    for pattern, pairs in (
        (keep, [(left + "\n", right), (left, " " + right)]),
        (drop, [(left, right)]),
    ):
        between = " " if pattern is drop else ""
        texts = [[a + between + b, a, b] for a, b in pairs]
        ids = [tokenizer.encode_batch(group) for group in texts]
        if all(whole == [*a, *b] for whole, a, b in ids):
            return re.compile(pattern)
    return None


# ---------------------------------------------------------------------------- reading text


@dataclass
class File:
    path: str
    source: int  # index of the spec that named it
    column: str  # field of a record that holds the text
    kind: str  # text | jsonl
    fingerprint: str = ""
    stat: tuple = ()  # size, mtime and ctime when the fingerprint was taken


@dataclass
class Piece:
    text: str
    last: bool  # of its document
    checksum: int  # of its document's first piece
    source: int
    file: int
    number: int  # pieces of this file up to and including this one
    position: int  # bytes of all input read so far
    bad: int  # records left out so far


def find_files(specs: list[str]) -> list[File]:
    """Files, folders (all files below, hidden ones left out) and globs -> files, each once, sorted.

    A spec may end in #column: the field of .jsonl records to read, "text" unless told.
    """
    found = {}
    for source, spec in enumerate(specs):
        path, column = str(spec), "text"
        if not os.path.exists(path) and "#" in path:
            path, column = path.rsplit("#", 1)
        path = os.path.expanduser(path)
        if os.path.isfile(path):
            paths = [path]
        elif os.path.isdir(path):
            paths = [p for p in glob.glob(f"{glob.escape(path)}/**", recursive=True)]
        else:
            paths = glob.glob(path, recursive=True)
        paths = sorted(p for p in paths if os.path.isfile(p))
        if not paths:
            raise ValueError(
                f"no file at {spec!r}: need a text file, a folder, or a glob such as 'books/*.txt'"
            )
        full = [p for p in paths if os.path.getsize(p)]  # an empty file among others is no fault
        if not full:
            raise ValueError(f"{spec} is empty: need text; fill it or leave it out")
        for p in full:
            found.setdefault(os.path.realpath(p), File(p, source, column, _kind(p)))
    return list(found.values())


def _kind(path: str) -> str:
    name, packed = path.lower(), False
    for suffix in (".gz", ".zst"):
        if name.endswith(suffix):
            name, packed = name[: -len(suffix)], True
    if name.endswith((".jsonl", ".ndjson")) or (packed and name.endswith(".json")):
        return "jsonl"
    return "text"


def _decoded(blocks: Iterable[bytes], path: str) -> Iterator[str]:
    """UTF-8 text of a file's blocks; ValueError at what is not text."""
    decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for block in itertools.chain(blocks, [b""]):
        if b"\0" in block:
            raise ValueError(
                f"{path} is binary (a zero byte at {offset + block.index(0)}), need UTF-8 text; "
                "leave it out, e.g. by naming files with a glob, or pass --skip_bad_lines"
            )
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (near byte {offset + error.start}: {error.reason}); convert "
                "it, e.g. iconv -f latin1 -t utf-8, or leave it out with --skip_bad_lines"
            ) from error
        offset += len(block)


def _blocks(stream) -> Iterator[bytes]:
    return iter(lambda: stream.read(1 << 20), b"")


def _split(blocks: Iterable[str], cut: re.Pattern | None) -> Iterator[tuple[str, bool]]:
    """One document -> (piece, is it the last), cut where the tokens do not notice."""
    rest = ""
    for block in itertools.chain(blocks, [None]):
        rest += block or ""
        start = 0
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


def _lines(stream, file: File, skip_bad: bool) -> Iterator[list[str] | None]:
    """Texts of JSON records, one on a line; a bad one is None, or an error."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get(file.column), str):
                fields = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"no text in field {file.column!r} of {fields}; try PATH#FIELD")
            record[file.column].encode()  # half a surrogate pair is legal JSON and not text
            yield [record[file.column]]
        except ValueError as error:
            if not skip_bad:
                raise ValueError(
                    f"{file.path}:{number}: not a JSON record with text ({error}); mend the line, "
                    "or leave out such lines with --skip_bad_lines"
                ) from error
            yield None


def _open(file: File):
    """(stream of decompressed bytes, raw file whose position tells the progress)"""
    raw = open(file.path, "rb")
    if file.path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw), raw
    return raw, raw


def _pieces(files, cut, state, skip_bad, tally) -> Iterator[Piece]:
    """Documents in order, as pieces, from where `state` left off; tally["bad"] counts bad records.

    What lies before is read again and thrown away: seconds, where tokenising it took minutes.
    """
    before = sum(file.stat[0] for file in files[: state["file"]])
    for index in range(state["file"], len(files)):
        file, number = files[index], 0
        n_skip = state["pieces"] if index == state["file"] else 0
        try:
            stream, raw = _open(file)
            with raw:
                if file.kind == "jsonl":
                    documents = _lines(stream, file, skip_bad)
                else:
                    documents = [_decoded(_blocks(stream), file.path)]
                for document in documents:
                    if document is None:
                        tally["bad"] += number >= n_skip
                        continue
                    checksum = None
                    for text, last in _split(document, cut):
                        checksum = zlib.crc32(text.encode()) if checksum is None else checksum
                        number += 1
                        if number > n_skip:
                            position = before + raw.tell()
                            yield Piece(
                                text,
                                last,
                                checksum,
                                file.source,
                                index,
                                number,
                                position,
                                tally["bad"],
                            )
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"cannot read {file.path}: {error}; fetch it again or leave it out"
            ) from error
        before += file.stat[0]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _fingerprint(files: list[File], cache_dir: Path, skip_bad: bool, log: Callable) -> list[File]:
    """Fill in each file's content fingerprint; read only files not seen before or changed since.

    Plain text is also checked here, before hours of work: what is not UTF-8 is an error, or with
    skip_bad left out. Sizes and times of files seen are remembered in cache_dir/seen_files.json.
    """
    memory = cache_dir / "seen_files.json"
    try:
        seen = json.loads(memory.read_text())
    except (OSError, ValueError):
        seen = {}
    good, news = [], {}
    total = sum(os.path.getsize(file.path) for file in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="checking files", disable=None, delay=1)
    for file in files:
        stat = os.stat(file.path)
        file.stat = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        key = os.path.realpath(file.path)
        known = seen.get(key)
        if known and tuple(known[:3]) == file.stat:
            file.fingerprint = known[3]
            good.append(file)
            continue
        digest = hashlib.blake2b(digest_size=16)
        with open(file.path, "rb") as stream:

            def hashed(blocks, digest=digest):
                for block in blocks:
                    digest.update(block)
                    bar.update(len(block))
                    yield block

            plain = file.kind == "text" and not file.path.lower().endswith((".gz", ".zst"))
            try:
                for _ in (_decoded if plain else lambda b, _: b)(
                    hashed(_blocks(stream)), file.path
                ):
                    pass
            except ValueError as error:
                if not skip_bad:
                    raise
                log(f"left out: {error}")
                continue
        file.fingerprint = digest.hexdigest()
        good.append(file)
        # A file written a moment ago can change again within one tick of its clock: not remembered.
        if time.time_ns() - max(file.stat[1:]) > 2e9:
            news[key] = [*file.stat, file.fingerprint]
    bar.close()
    if news:
        _write_atomic(memory, json.dumps({**seen, **news}))
    return good


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------- tokenising


@dataclass
class Corpus:
    """Tokenised documents, back to back, memory-mapped."""

    name: str
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    doc_starts: np.ndarray  # (n_docs + 1,) int64, the last one is n_tokens
    doc_checksums: np.ndarray  # (n_docs,) int64, crc32 of the text
    doc_sources: np.ndarray  # (n_docs,) int64, index into sources
    sources: list[str]  # the specs
    fingerprint: str
    folder: str

    @property
    def n_docs(self) -> int:
        return len(self.doc_starts) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def segments(self, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Where the training part lies, or the held-out part: (starts, lengths), one per document.

        The rule stands at the top of this file. Lengths may be 0.
        """
        starts, lengths = self.doc_starts[:-1], np.diff(self.doc_starts)
        if self.n_docs >= 100:
            out = self.doc_checksums % 20 == 0
            if not out.any():  # 1 chance in 170 at 100 documents
                out = self.doc_checksums == self.doc_checksums.min()
            return starts, np.where(out == held_out, lengths, 0)
        tail = lengths // 20
        return (starts + lengths - tail, tail) if held_out else (starts, lengths - tail)


def tokenize(
    specs: list[str],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    name: str = "text",
    skip_bad_lines: bool = False,
    log: Callable[[str], None] = print,
) -> Corpus:
    """Tokenise files once; later calls map what lies on disk.

    specs: paths, folders, globs, each optionally with #column for .jsonl (see find_files).
    name: of the stream, for the log.
    skip_bad_lines: leave out and count malformed records and files that are not text.
    Raises: ValueError at a missing, empty or unreadable file, a malformed record, a full disk.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    files = _fingerprint(find_files(specs), cache_dir, skip_bad_lines, log)
    key = [FORMAT, tokenizer.fingerprint, tokenizer.add_bos, tokenizer.add_eos, skip_bad_lines]
    key += [tokenizer.bos_id, tokenizer.eos_id, PIECE]
    key += [(file.fingerprint, file.source, file.column, file.kind) for file in files]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = cache_dir / f"tokens-{fingerprint}"
    meta = _complete(folder)
    if meta is None:
        # One run builds, others wait here for its result; a killed run's lock frees itself.
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{name}: another run is tokenising the same text; waiting for it")
            lock.acquire()
        with lock:
            lock.release()  # the `with` holds it a second time
            meta = _complete(folder, log)
            if meta is None:
                meta = _build(folder, files, tokenizer, name, skip_bad_lines, log)
    log(
        f"{name}: {meta['documents']:,} documents, {meta['tokens']:,} tokens in {folder}"
        + (f"; {meta['bad']:,} bad records left out" if meta["bad"] else "")
    )
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    records = np.fromfile(folder / "documents.bin", dtype=np.int64).reshape(-1, RECORD)
    starts = np.concatenate([[0], records[:, 0]])
    specs = [str(spec) for spec in specs]
    return Corpus(
        name, tokens, starts, records[:, 1], records[:, 2], specs, fingerprint, str(folder)
    )


def _complete(folder: Path, log: Callable = lambda _: None) -> dict | None:
    """The cache's description if it is whole, None if it is to be built."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        records = (folder / "documents.bin").read_bytes()
        size = (folder / "tokens.bin").stat().st_size
        if size == meta["tokens"] * np.dtype(meta["dtype"]).itemsize:
            if zlib.crc32(records) == meta["records_checksum"]:
                return meta
        reason = f"tokens.bin holds {size:,} bytes, meta.json says otherwise"
    except (OSError, ValueError, KeyError) as error:
        reason = str(error)
    log(f"{folder} is damaged ({reason}): built anew")
    return None


def _build(folder, files, tokenizer, name, skip_bad, log) -> dict:
    """Tokenise into folder.part, shard by shard; rename when done. Returns the description."""
    part = Path(f"{folder}.part")
    part.mkdir(exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    state = _journal_end(part, dtype)
    if state["tokens"]:
        log(f"{name}: going on after {state['tokens']:,} tokens of an interrupted run")
    began, first_token = time.perf_counter(), state["tokens"]
    tally = {"bad": state["bad"]}
    pieces = _pieces(files, tokenizer.cut, dict(state), skip_bad, tally)
    total = sum(file.stat[0] for file in files)
    bar = tqdm(total=total, initial=state["position"], unit="B", unit_scale=True, disable=None)
    bar.set_description(f"tokenising {name}")
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            open(part / "tokens.bin", "ab") as tokens,
            open(part / "documents.bin", "ab") as records,
            open(part / "journal.jsonl", "a") as journal,
            bar,
        ):
            pending, uncommitted = None, 0
            # While the tokenizer works on one batch, the one before is written, the next read.
            for batch in itertools.chain(_batches(pieces), [None]):
                texts = [piece.text for piece in batch or ()]
                job = pool.submit(tokenizer.encode_batch, texts) if batch else None
                if pending:
                    done, result = pending
                    _append(done, result.result(), tokenizer, dtype, state, tokens, records)
                    bar.update(done[-1].position - bar.n)
                    bar.set_postfix_str(f"{state['tokens']:,} tokens", refresh=False)
                    uncommitted += sum(len(piece.text) for piece in done)
                if batch is None:
                    state["bad"] = tally["bad"]
                if uncommitted >= SHARD or batch is None:
                    _commit(state, tokens, records, journal)
                    uncommitted = 0
                pending = (batch, job)
    except OSError as error:
        raise ValueError(
            f"cannot write the tokens of {name} to {part}: {error}; free some space (about "
            f"{dtype.itemsize / 4:.1f} x the text's size) and run again: it goes on from there"
        ) from error
    for file in files:
        stat = os.stat(file.path)
        if (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) != file.stat:
            shutil.rmtree(part)
            raise ValueError(f"{file.path} changed while it was read: run again")
    if not state["tokens"]:
        raise ValueError(f"{name}: no text in {len(files)} files; name files that hold some")
    meta = {
        "tokens": state["tokens"],
        "documents": state["documents"],
        "dtype": dtype.name,
        "bad": state["bad"],
        "records_checksum": zlib.crc32((part / "documents.bin").read_bytes()),
        "files": [file.path for file in files[:1000]],
    }
    _write_atomic(part / "meta.json", json.dumps(meta))
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    os.replace(part, folder)
    seconds = time.perf_counter() - began
    log(
        f"{name}: tokenised {total / 1e6:,.1f} MB in {seconds:,.1f} s ({total / 1e6 / seconds:,.1f}"
        f" MB/s, {(state['tokens'] - first_token) / seconds:,.0f} tokens/s)"
    )
    return meta


def _append(batch, ids, tokenizer, dtype, state, tokens, records) -> None:
    """Write one tokenised batch: documents' tokens and, where one ends, its record."""
    flat, ends = [], []
    for piece, piece_ids in zip(batch, ids, strict=True):
        if not state["open"] and tokenizer.add_bos:
            flat.append(tokenizer.bos_id)
        flat += piece_ids
        state["open"] = not piece.last
        if piece.last:
            if tokenizer.add_eos:
                flat.append(tokenizer.eos_id)
            ends.append((state["tokens"] + len(flat), piece.checksum, piece.source))
    tokens.write(np.array(flat, dtype=dtype).data)
    records.write(np.array(ends, dtype=np.int64).data)
    state["tokens"] += len(flat)
    state["documents"] += len(ends)
    last = batch[-1]
    state.update(file=last.file, pieces=last.number, position=last.position, bad=last.bad)


def _commit(state, tokens, records, journal) -> None:
    """A shard is finished when its journal line is on disk, after what the line speaks of."""
    for stream in (tokens, records):
        stream.flush()
        os.fsync(stream.fileno())
    journal.write(json.dumps(state) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _journal_end(part: Path, dtype: np.dtype) -> dict:
    """State after the last finished shard; cuts off what a killed run wrote after it."""
    start = dict.fromkeys(("tokens", "documents", "file", "pieces", "position", "bad"), 0)
    states = [{**start, "open": False}]
    sizes = {"tokens.bin": ("tokens", dtype.itemsize), "documents.bin": ("documents", 8 * RECORD)}
    for name in (*sizes, "journal.jsonl"):
        (part / name).touch()
    for line in (part / "journal.jsonl").read_text().splitlines():
        try:
            state = json.loads(line)
        except ValueError:  # torn by the kill
            break
        if all((part / n).stat().st_size >= state[key] * size for n, (key, size) in sizes.items()):
            states.append(state)
    for name, (key, size) in sizes.items():
        os.truncate(part / name, states[-1][key] * size)
    _write_atomic(part / "journal.jsonl", "".join(json.dumps(s) + "\n" for s in states[1:]))
    return states[-1]


# ---------------------------------------------------------------------------- streams


def _packed(segments) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends in the packed sequence) of the segments that hold anything."""
    starts, lengths = segments
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


class Stream:
    """Batches of a corpus' training part; batch(index) is a pure function of (seed, name, index).

    Documents are packed back to back and cut into sequences of seq_len inputs, each with the next
    token as its last label, so that every token is predicted once an epoch. Each epoch visits the
    sequences in its own order; batches run on from one epoch into the next.
    """

    def __init__(self, corpus: Corpus, name: str, seed: int, batch_size: int, seq_len: int):
        self.corpus, self.name, self.seed = corpus, name, seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.starts, self.ends = _packed(corpus.segments())
        n_tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.n_sequences = (n_tokens - 1) // seq_len
        if self.n_sequences < 1:
            raise ValueError(
                f"{name}: text too short: {n_tokens:,} tokens to train on, one sequence needs "
                f"{seq_len + 1:,}; add text or train on shorter sequences"
            )
        self._order = (-1, np.empty(0, np.int64))  # the order of one epoch, a pure function of it

    @property
    def tokens_per_epoch(self) -> int:
        return self.n_sequences * self.seq_len

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


def held_out(corpus: Corpus, n_sequences: int, seq_len: int) -> torch.Tensor:
    """Up to n_sequences of the held-out part, evenly spaced, none overlapping: (n, seq_len + 1).

    Raises: ValueError when there is not even one.
    """
    starts, ends = _packed(corpus.segments(held_out=True))
    n_tokens = int(ends[-1]) if len(ends) else 0
    n = min(n_sequences, n_tokens // (seq_len + 1))
    if n < 1:
        raise ValueError(
            f"{corpus.name}: {n_tokens:,} held-out tokens, one sequence needs {seq_len + 1:,}; "
            "add text (a twentieth is held out) or evaluate at a shorter length"
        )
    offsets = np.linspace(0, n_tokens - seq_len - 1, n).astype(np.int64)
    rows = [_read(corpus.tokens, starts, ends, int(o), seq_len + 1) for o in offsets]
    return torch.from_numpy(np.stack(rows))


# ---------------------------------------------------------------------------- position schemes


def _check_lengths(seq_len: int, target_len: int) -> None:
    if target_len < seq_len or seq_len < 1:
        raise ValueError(
            f"cannot spread {seq_len} tokens over {target_len} positions: need target_len at least "
            "seq_len, and seq_len at least 1"
        )


def _three_chunks(rng, batch, seq_len, target_len, draw_ends) -> np.ndarray:
    """Head at the start, tail at the end of the window, the middle ending where draw_ends says.

    A coin per batch picks head = tail = T // 3 or 4 f (f = target_len / T, rounded down); 4 f is
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


def uniform_positions(
    rng: np.random.Generator, batch: int, seq_len: int, target_len: int
) -> np.ndarray:
    """LongReD-U: the middle chunk ends anywhere between head and tail, equally likely.

    Any factor will do. As in the released code the middle never touches the head: at least one
    position lies between them.
    Returns: (batch, seq_len) int64, strictly increasing from 0 to target_len - 1.
    Raises: ValueError if target_len < seq_len, or if there is no room for three chunks.
    """

    def draw_ends(head, mid):
        return rng.integers(seq_len - head, target_len - head, size=batch)  # upper end excluded

    return _three_chunks(rng, batch, seq_len, target_len, draw_ends)


def _cream(rng, batch, seq_len, target_len, truncated) -> np.ndarray:
    factor, sigma = target_len / seq_len, 5.0

    def normal_cdf(x):
        return np.array([0.5 * (1 + math.erf((v - 1 - factor) / sigma / 2**0.5)) for v in x])

    def draw_ends(head, mid):
        x = np.linspace(2, 2 * factor, 1000)
        cdf = normal_cdf(x)
        u = rng.random(batch)
        if truncated:
            u = cdf[0] + u * (cdf[-1] - cdf[0])
        k = np.floor(np.interp(u, cdf, x))  # np.interp holds u outside the table to its ends
        low = np.floor(head + (mid - 1) * k / 2).astype(np.int64)
        high = np.floor(k * seq_len / 2).astype(np.int64) - head - 1
        return rng.integers(low, high, endpoint=True)

    return _three_chunks(rng, batch, seq_len, target_len, draw_ends)


def cream_positions(
    rng: np.random.Generator, batch: int, seq_len: int, target_len: int
) -> np.ndarray:
    """LongReD-C: the middle chunk's place follows CREAM's Gaussian, as the released code draws it.

    With f = target_len / T, k in 2 .. 2 f says about which half-window the middle ends at:
        x = 1000 points from 2 to 2 f;   k = floor(interp(u, Phi((x - 1 - f) / 5), x)), u in (0, 1)
        end ~ uniform(head + (mid - 1) k / 2 .. k T / 2 - tail - 1)
    Phi is not normalised to [2, 2 f], so interp clamps the mass outside it onto the two ends. At
    f = 4: P(k = 2) = 0.345, P(3) .. P(7) = 0.070 to 0.079 each, P(k = 8) = 0.274: two thirds of the
    draws sit on the ends, U-shaped, hardly "focused on the middle"; at f = 16 P(2) = 0.003, a bell.
    cream_truncated_positions is the Gaussian without the clamp.

    A factor that is not whole works alike: k runs to floor(2 f), and ends stay inside the window.
    Returns, raises: as uniform_positions.
    """
    return _cream(rng, batch, seq_len, target_len, truncated=False)


def cream_truncated_positions(
    rng: np.random.Generator, batch: int, seq_len: int, target_len: int
) -> np.ndarray:
    """cream_positions with the Gaussian truncated to [2, 2 f] and normalised: no clamp.

    At f = 4: P(k = 2 .. 7) = 0.156, 0.169, 0.176, 0.176, 0.169, 0.156 and P(k = 8) = 0, since k is
    rounded down: the last half-window is left to the tail.
    Returns, raises: as uniform_positions.
    """
    return _cream(rng, batch, seq_len, target_len, truncated=True)


def pose_positions(
    rng: np.random.Generator, batch: int, seq_len: int, target_len: int
) -> np.ndarray:
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


def longrecipe_positions(
    rng: np.random.Generator, boundaries: np.ndarray, seq_len: int, target_len: int
) -> np.ndarray:
    """LongRecipe (arXiv 2409.00509, Algorithm 1): random gaps between sentences, none inside.

    The N sentences take N of target_len - T + N slots, in order, the first one slot 0; every slot
    left empty is one position skipped.
    boundaries: start index of each sentence, any order; 0 is one of them in any case.
    Differs: the released code also gives a random first part of the sample its plain positions.
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
