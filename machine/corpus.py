"""Text of any usual kind -> token files on disk, made once and memory-mapped from then on.

    files, folders, globs, hub datasets --find_files()--> Files
    Files --documents, in pieces--> ids --> data.Corpus, by tokenize()

The cache folder is named after a fingerprint of the files' contents, the tokenizer and the options,
and appears under that name only when it is complete; what is being built lies beside it in a
`.part` folder, and a killed run goes on from its last finished shard.

A document is stored as [BOS] + tokens + [EOS]:
    BOS where the model's tokenizer puts one in front by itself (add_bos_token in
        tokenizer_config.json, else the post-processor of tokenizer.json; Meta's own: always);
    EOS wherever the tokenizer names one: pretraining ends documents with it, whether or not the
        tokenizer adds it to prompts. For a model trained otherwise: `--no-add_eos`.
Of the checkpoint's own samples (samples.py) the file holds ids: they are stored as they were
sampled, behind the same [BOS], with an EOS where one was sampled and nowhere else.
"""

import codecs
import contextlib
import csv
import errno
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data import Corpus
from machine.checkpoints import LFS, LFS_REMEDY, free_name
from machine.tokenizer import Tokenizer, optional

FORMAT = 3  # part of the cache key: raise it when the files' layout or the cutting rule changes
PIECE = 1 << 14  # characters: longer documents go to the tokenizer in pieces, for speed and memory
LONGEST_PIECE = 1 << 16  # without a safe cut an unsafe one is made: a million blanks kill tiktoken
BATCH = 1 << 20  # characters handed to the tokenizer at once; it has two batches in hand
SHARD = 32  # batches between two notes of how far a build has come: what a kill costs
# Of a cache folder, beside meta.json. The second holds three int64 for each document: its end as an
# offset in tokens, the checksum of its text, and its source (index of the spec that named it).
FILES = ("tokens.bin", "documents.bin")

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

# ---------------------------------------------------------------------------- reading text


@dataclass
class File:
    path: str  # on disk, or inside its hub dataset; kind "rows": the dataset's name
    source: int  # index of the spec that named it
    column: str  # field of a record that holds the text
    kind: str  # text | jsonl | json | csv | tsv | parquet | rows (of a hub dataset, streamed) | ids
    fingerprint: str = ""
    stat: tuple = ()  # size, mtime, ctime, device and inode before it was read; hub: size
    hub: tuple = ()  # (dataset, commit): fetched when it is read; rows: also config and split


@dataclass
class Piece:
    text: str
    first: bool  # of its document
    last: bool
    checksum: int  # of its document up to its end
    source: int
    position: int  # bytes of all files read before its end, for the progress bar
    ids: list[int] | None = None  # of a file of ids, whose documents are one piece each


# A file of token ids begins with this line; then a document a line, as a JSON list.
IDS = "token ids, a document a line, of the tokenizer "


def ids_header(fingerprint: str) -> str:
    return f"{IDS}{fingerprint}\n"


def _is_ids(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(len(IDS)) == IDS.encode()


def _kind(path: str) -> str:
    found = re.search(r"\.(jsonl|ndjson|parquet|json|csv|tsv)(\.gz|\.zst)?$", path.lower())
    return "text" if not found else {"ndjson": "jsonl"}.get(found[1], found[1])


def find_files(
    specs: list[str], remembered: dict, log: Callable[[str], None] = print
) -> list[File]:
    """Specs -> the files they name, sorted, each file once.

    specs: a file, a folder (all files below it, hidden ones left out; of a downloaded dataset its
        train split alone, which is listed), a glob, or
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
        if os.path.isdir(path):
            paths = _train_split(path, sorted(glob.glob(f"{glob.escape(path)}/**", recursive=True)))
            if paths.left_out:
                log(paths.say())
            paths = paths.read
        else:
            paths = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ValueError(
                f"{spec} is a pipe or a device; text is read twice: write it to a file"
            )
        stats = {p: _stat(p) for p in paths if os.path.isfile(p)}
        # An empty file among others is no fault.
        full = {p: stat for p, stat in stats.items() if stat[0]}
        if not full:
            what = "only empty files" if stats else "no file"
            raise ValueError(f"{what} at {spec}: need a text file, folder, glob or hf:owner/name")
        for p, stat in full.items():
            kind = "ids" if _is_ids(p) else _kind(p)
            found.setdefault(stat[3:], File(p, source, column, kind, stat=stat))
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
    streamed = [[repo, 0, repo, info.sha, config, split]]
    return [[name, sizes[name], repo, info.sha] for name in chosen] or streamed


def _choose(names: list[str], config: str, split: str) -> list[str]:
    """Files of a hub dataset that config (a file, glob or folder) and split speak of."""
    if exact := fnmatch.filter(names, config):
        return sorted(exact)
    names = [n for n in names if _kind(n) != "text" and (not config or f"/{config}/" in f"/{n}")]
    names = [n for n in names if os.path.basename(n) not in CARDS]
    in_split = re.compile(rf"(^|[/_.-]){split or 'train'}([/_.-]|$)")
    return sorted(filter(in_split.search, names)) or ([] if split else sorted(names))


# What describes a dataset, beside its files.
CARDS = "README.md dataset_infos.json dataset_info.json dataset_dict.json state.json".split()
OTHER_SPLIT = re.compile(r"(^|[/_.-])(test|valid|validation|dev|eval|val)([/_.-]|$)")


class FilesOf(NamedTuple):
    """Of a folder: the files that are read, and those left out."""

    folder: str
    read: list[str]
    left_out: list[str]

    def say(self) -> str:
        read, left_out = (
            f"{', '.join(os.path.relpath(p, self.folder) for p in some[:8])}"
            f"{f' and {len(some) - 8} more' if len(some) > 8 else ''}"
            for some in (self.read, self.left_out)
        )
        return (
            f"{self.folder} is a dataset's folder: reading its train split, {read}; left out: "
            f"{left_out} (name files or a glob to read them)"
        )


def _train_split(folder: str, paths: list[str]) -> FilesOf:
    """A folder's files; of a downloaded dataset repository, told by its card or its splits, those
    of the train split, or all of its data where no name speaks of one."""
    files = [p for p in paths if os.path.isfile(p)]
    names = [os.path.relpath(p, folder) for p in files]
    data = [n for n in names if _kind(n) != "text" and os.path.basename(n) not in CARDS]
    train = _choose(names, "", "train")
    cards = any(os.path.basename(n) in CARDS for n in names)
    if not data or not (cards or (train and any(map(OTHER_SPLIT.search, data)))):
        return FilesOf(folder, files, [])
    chosen = set(train or data)
    by_name = zip(names, files, strict=True)
    read = [p for n, p in by_name if n in chosen]
    return FilesOf(folder, read, [p for p in files if p not in set(read)])


def _decoded(stream, path: str, digest=None) -> Iterator[str]:
    """UTF-8 text of a stream, its lines ended by a newline alone, as Python's open reads it.

    The bytes also go into digest. Raises ValueError at what is not text.
    """
    decoder, offset, block = codecs.getincrementaldecoder("utf-8-sig")(), 0, b" "
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
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


# How files begin that are no text, and what helps.
MAGIC = {
    LFS: f"is {LFS_REMEDY}",
    b"\xff\xfe": "is UTF-16 text; convert it: iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "is UTF-16 text; convert it: iconv -f utf-16 -t utf-8",
    b"\xfd7zXZ\0": "is packed by xz; unpack it: xz -d",
    b"BZh": "is packed by bzip2; unpack it: bunzip2",
    b"PK\x03\x04": "is a zip archive; unpack it: unzip",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it: 7z x",
    b"%PDF": "is a PDF; extract its text first: pdftotext",
    b"ARROW1": "is an Arrow file; convert it: datasets.load_from_disk(FOLDER).to_parquet(...)",
    b"\xff\xff\xff\xff": "is an Arrow stream; convert it: "
    "datasets.Dataset.from_file(FILE).to_parquet(...)",
}
# Read where the name says so.
BY_NAME = {
    b"\x1f\x8b": ("packed by gzip", (".gz",)),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", (".zst",)),
    b"PAR1": ("a parquet file", (".parquet", ".parquet.gz", ".parquet.zst")),
}


def _refuse_other(path: str) -> None:
    """ValueError with the remedy that helps for a file of a kind that is not read."""
    with open(path, "rb") as stream:
        head, name = stream.read(64), path.lower()
    for magic, said in MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path} {said}")
    for magic, (kind, ends_in) in BY_NAME.items():
        if head.startswith(magic) and not name.endswith(ends_in):
            raise ValueError(f"{path} is {kind}; let its name end in {ends_in[0]}, or unpack it")
    if head[1::2].count(0) > len(head) // 4 or head[0::2].count(0) > len(head) // 4:
        order = "le" if head[1::2].count(0) > head[0::2].count(0) else "be"
        if all(b for b in (head[0::2] if order == "le" else head[1::2])):
            raise ValueError(f"{path} is UTF-16 text; convert it: iconv -f utf-16{order} -t utf-8")


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


class Zstd(io.RawIOBase):
    """The bytes in a .zst file, frame after frame; EOFError where it ends inside one.

    Frames of `zstd --long=31` are read too: they ask for 2 GiB of memory at most.
    """

    def __init__(self, raw, path: str):
        self.raw, self.frame, self.packed, self.ready = raw, None, b"", b""
        self.unpacker = optional("zstandard", path).ZstdDecompressor(max_window_size=1 << 31)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            self.packed = self.packed or self.raw.read(1 << 17)
            if not self.packed:
                if self.frame:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self.frame = self.frame or self.unpacker.decompressobj()
            self.ready, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.frame, self.packed = None, self.frame.unused_data
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


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
            yield io.BufferedReader(Zstd(raw, path), 1 << 20), raw
        else:
            yield raw, raw


def _records(file: File, stream) -> Iterator[bytes | dict]:
    """Records of a file: lines of JSON, still to be parsed, or what was parsed."""
    if file.kind == "jsonl":
        yield from stream
    elif file.kind == "json":
        yield from _json_records(stream)
    elif file.kind in ("csv", "tsv"):
        csv.field_size_limit(1 << 30)
        lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        rows = csv.DictReader(lines, delimiter="," if file.kind == "csv" else "\t", strict=True)
        if file.column not in (rows.fieldnames or []):
            raise ValueError(
                f"{file.path}: no column {file.column!r} among {str(rows.fieldnames)[:100]}; "
                "try PATH#COLUMN"
            )
        yield from rows
    elif file.kind == "parquet":
        table = optional("pyarrow.parquet", file.path).ParquetFile(stream)
        columns = [file.column] if file.column in table.schema_arrow.names else None
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    else:
        repo, commit, config, split = file.hub
        yield from optional("datasets", repo).load_dataset(
            repo, config or None, split=split or "train", revision=commit, streaming=True
        )


def _json_records(stream) -> Iterator[bytes | object]:
    """Records of a .json file: its lines, where the first is one, else the values in it.

    Values may stand in one array, one after another, or be a single one over many lines.
    """
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(first.removeprefix(codecs.BOM_UTF8)), dict):
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from stream
            return
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    blocks = itertools.chain([first], iter(lambda: stream.read(1 << 20), b""), [None])
    rest, gap, wanted = "", re.compile(r"[\s,\[\]]*"), 0
    for block in blocks:
        rest += text.decode(block or b"", final=block is None)
        if len(rest) < wanted and block is not None:
            continue
        start = gap.match(rest).end()
        while start < len(rest):
            try:
                value, start = decoder.raw_decode(rest, start)
            except ValueError:
                if block is None:
                    raise
                break
            yield value
            start = gap.match(rest, start).end()
        rest = rest[start:]
        wanted = 2 * len(rest)  # a value of many blocks is not tried at each of them


def _documents(file: File, stream, skip_bad: bool) -> Iterator[Iterable[str] | None]:
    """Texts of a file, in blocks; None for a record left out because it is none."""
    if file.kind == "text":
        yield _decoded(stream, file.path)
        return
    for number, record in enumerate(_records(file, stream), 1):
        try:
            if isinstance(record, bytes):
                if number == 1 and record.startswith(codecs.BOM_UTF8):
                    record = record.removeprefix(codecs.BOM_UTF8)
                record = json.loads(record) if record.strip() else {file.column: ""}
            text = record.get(file.column) if isinstance(record, dict) else None
            if text is None:
                raise ValueError(f"no {file.column!r} in {str(record)[:60]}...; try PATH#FIELD")
            text.encode()  # half a surrogate pair is legal JSON and not text
            yield [text]
        except (ValueError, AttributeError, RecursionError) as error:
            if not skip_bad:
                raise ValueError(
                    f"{file.path}:{number}: not a record with text ({error}); mend it, or leave "
                    "out such records with --skip_bad_lines"
                ) from error
            yield None


def _ids(file: File, stream, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Documents of a file of token ids; those without any, as an empty text, are none."""
    if stream.readline().decode() != ids_header(tokenizer.fingerprint):
        raise ValueError(f"{file.path} holds another tokenizer's ids; name the text it was made of")
    allowed = tokenizer.ordinary | {tokenizer.eos_id}
    for number, line in enumerate(stream, 2):
        ids = json.loads(line)
        if not isinstance(ids, list) or not allowed.issuperset(ids):
            raise ValueError(f"{file.path}:{number} is no list of this tokenizer's ids; remove it")
        if ids not in ([], [tokenizer.eos_id]):
            yield ids


def _pieces(files: list[File], tokenizer: Tokenizer | None, skip_bad: bool, count: dict):
    """Documents in order, as pieces. count["bad"] goes up with every record left out, count["cr"]
    with every document that holds carriage returns: records keep theirs.

    tokenizer: by which texts are cut and ids checked; None: no cuts, and files of ids left out.
    """
    before, cut = 0, tokenizer and tokenizer.cut  # bytes in files read
    for file in files:
        try:
            with _open(file) as (stream, raw):
                known = file.kind == "ids" and tokenizer
                for ids in _ids(file, stream, tokenizer) if known else ():
                    checksum, position = zlib.crc32(str(ids).encode()), before + raw.tell()
                    yield Piece("", True, True, checksum, file.source, position, ids)
                for document in _documents(file, stream, skip_bad) if file.kind != "ids" else ():
                    if document is None:
                        count["bad"] += 1
                        continue
                    checksum, first, returns = 0, True, False
                    for text, last in _split(document, cut):
                        checksum = zlib.crc32(text.encode(), checksum)
                        returns |= "\r" in text
                        position = before + (raw.tell() if raw else 0)
                        yield Piece(text, first, last, checksum, file.source, position)
                        first = False
                    count["cr"] += returns
        except Exception as error:  # every reader has its own
            if type(error) is ValueError:  # ours, with file and remedy
                raise
            raise ValueError(f"cannot read {file.path}: {error}; fetch or leave it out") from error
        before += file.stat[0]


def beginnings(
    specs: list[str], cache_dir: str | Path, skip_bad: bool = False, most: int = 200
) -> list[str]:
    """The first 2,000 characters of up to `most` documents, taken evenly from the specs' files.

    None of files of ids, which no tokenizer reads again.
    """
    memo = _read_memo(Path(cache_dir) / "seen_files.json")
    files = find_files(specs, memo, lambda line: None)
    chosen = files[:: max(1, len(files) // 20)]
    each, texts = -(-most // len(chosen)), []
    for file in chosen:
        with contextlib.suppress(ValueError):  # what cannot be read is told when all is read
            pieces = _pieces([file], None, skip_bad, {"bad": 0, "cr": 0})
            firsts = (piece.text[:2000] for piece in pieces if piece.first)
            texts += itertools.islice(firsts, each)
    return texts[:most]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of BATCH characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + len(piece.ids or ())
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
                _refuse_other(path)
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
    cache_dir, seen_path = Path(cache_dir), Path(cache_dir) / "seen_files.json"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        seen = _read_memo(seen_path)
        known = str(seen)
        files = _fingerprint(find_files(specs, seen, log), seen, skip_bad_lines, log)
        if str(seen) != known:
            _write_atomic(seen_path, seen)
        key = [FORMAT, PIECE, skip_bad_lines, tokenizer.fingerprint]
        key += [tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos]
        key += [(file.fingerprint, file.source, file.column, file.kind) for file in files]
        fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        folder = cache_dir / f"tokens-{fingerprint}"
        meta = _complete(folder)
        if meta is None:
            log(f"{name}: tokenising {len(files):,} files, or waiting for a run that is at it")
            with FileLock(f"{folder}.lock"):  # a killed run's lock frees itself
                meta = _complete(folder, log)
                meta = meta or _build(folder, files, tokenizer, name, skip_bad_lines, log)
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        records = np.fromfile(folder / "documents.bin", dtype=np.int64).reshape(-1, 3)
    except Damaged as error:
        raise ValueError(f"{name}: {error}") from None
    except OSError as error:
        advice = "; mend that and run again: it goes on where it stopped"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = (
                f"; the disk is full, free about half the text's size in {cache_dir} and run again:"
                " it goes on where it stopped"
            )
        raise ValueError(f"{name}: {error}{advice}") from error
    left_out = f"; {meta['bad']:,} bad records left out" if meta["bad"] else ""
    left_out += f"; {meta['cr']:,} documents keep their carriage returns" if meta["cr"] else ""
    log(f"{name}: {len(records):,} documents, {len(tokens):,} tokens in {folder}{left_out}")
    starts = np.append(0, records[:, 0])
    return Corpus(name, tokens, starts, records[:, 1], records[:, 2], fingerprint, folder)


def _read_memo(path: Path) -> dict:
    """seen_files.json, without the entries that are damaged: a memo may be lost, never fatal.

    One without a sound entry may be somebody's file: it is set aside under another name.
    """
    memo = found = None
    try:
        memo = json.loads(path.read_text(encoding="utf-8"))
        found = {key: value for key, value in memo.items() if _is_memo(key, value)}
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    if not found and memo != {} and path.is_file():
        with contextlib.suppress(OSError):  # another process was at it
            path.rename(free_name(path.with_name(f"{path.name}.damaged")))
    return found or {}


def _is_memo(key: str, value: object) -> bool:
    """Of a local file: size, times, device, inode, fingerprint; of a hub spec: its files."""
    if not isinstance(value, list):
        return False
    if key.startswith("hf:"):
        rows = [isinstance(v, list) and len(v) in (4, 6) and type(v[1]) is int for v in value]
        return bool(rows) and all(rows) and all(isinstance(x, str) for v in value for x in v[2:])
    *numbers, fingerprint = value or [None]
    return isinstance(fingerprint, str) and all(type(v) is int for v in numbers)


def _write_atomic(path: Path, content: dict) -> None:
    """Runs that share a cache may write seen_files.json at once: each by a name of its own."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _complete(folder: Path, log: Callable = lambda _: None) -> dict | None:
    """The cache's description if it is whole, None if it is to be built: cut short, or unknown.

    All of it is read once in a process and compared with the checksums in meta.json, about 1 s a GB
    from memory. Raises ValueError for other bytes in a file of the right size.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        known = _kinds(meta) == _kinds(FRESH)
        if known and all(os.path.getsize(folder / name) == meta[name] for name in FILES):
            stats = tuple(_stat(folder / name) for name in FILES)
            if meta["dtype"] in DTYPES and len(meta["checksums"]) == len(FILES):
                return _same_bytes(folder, stats, meta)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    if folder.is_dir():
        log(f"{folder} is damaged: building it anew")
    return None


DTYPES = "uint16", "uint32"
# A cache's description before anything is in it; sizes in bytes.
FRESH = dict.fromkeys(FILES, 0) | {"checksums": [0, 0], "dtype": "", "pieces": 0, "bad": 0, "cr": 0}


def _kinds(description: dict) -> dict[str, type]:
    return {key: type(value) for key, value in description.items()}


class Damaged(Exception):
    """A cache's bytes are not those that were written."""


def _same_bytes(folder: Path, stats: tuple, meta: dict) -> dict:
    if _checksums(folder, stats) != meta["checksums"]:
        raise Damaged(
            f"{folder} is damaged: its bytes are not those that were written, by its checksums; "
            f"look after that disk, then remove the folder, and the text is tokenised anew"
        )
    return meta


@lru_cache(64)
def _checksums(folder: Path, stats: tuple) -> list[int]:
    """crc32 of each file of a cache, as it was at `stats`."""
    found = []
    for name in FILES:
        checksum = 0
        with open(folder / name, "rb") as stream:
            while block := stream.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
        found.append(checksum)
    return found


def _drop(folder: Path) -> None:
    """Remove a cache's files, its description first, and the folder if nothing else is in it."""
    for name in ("meta.json", *FILES):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _build(folder, files, tokenizer, name, skip_bad, log) -> dict:
    """Tokenise into folder.part, shard by shard; rename when done. Returns the description."""
    part, began = Path(f"{folder}.part"), time.perf_counter()
    part.mkdir(exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    fresh = FRESH | {"checksums": [0, 0], "dtype": dtype}
    total, item = sum(file.stat[0] for file in files), np.dtype(dtype).itemsize
    with contextlib.ExitStack() as stack:
        bar = tqdm(None, f"tokenising {name}", total, unit="B", unit_scale=True, disable=None)
        stack.enter_context(bar)
        streams = {file: stack.enter_context(open(part / file, "ab")) for file in FILES}
        state = _unfinished(part, fresh)
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
        state["bad"] = state["cr"] = 0
        pieces = _pieces(files, tokenizer, skip_bad, state)
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
            _drop(part)
            raise ValueError(f"{file.path} changed while it was read: run again")
    if not state[FILES[0]]:
        raise ValueError(f"{name}: no text in {len(files)} files; name files that hold some")
    _drop(folder)  # a damaged one
    if folder.exists():  # somebody's files are in it
        for file in (*FILES, "meta.json"):
            os.replace(part / file, folder / file)
        _drop(part)
    else:
        os.replace(part, folder)
    size, seconds = size / 1e6, time.perf_counter() - began
    log(f"{name}: tokenised {size:,.1f}M characters in {seconds:,.1f} s, {size / seconds:,.2f}M/s")
    return state


def _unfinished(part: Path, fresh: dict) -> dict:
    """How far an interrupted build has come, by its meta.json; `fresh` if that cannot be true.

    Of what it wrote the checksum is compared too.
    """
    try:
        state = json.loads((part / "meta.json").read_text())
        if _kinds(state) != _kinds(fresh):
            return fresh
        for file, checksum in zip(FILES, state["checksums"], strict=True):
            left, found = state[file], 0
            with open(part / file, "rb") as stream:
                while left and (block := stream.read(min(left, 1 << 22))):
                    left, found = left - len(block), zlib.crc32(block, found)
            if left or found != checksum:
                return fresh
        return state if state["dtype"] == fresh["dtype"] else fresh
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return fresh


def _append(batch, ids, tokenizer, state, tokens, records) -> None:
    """Write one tokenised batch: documents' tokens and, where one ends, its record."""
    parts, ended, n_tokens = [], [], state[FILES[0]] // np.dtype(state["dtype"]).itemsize
    for piece, piece_ids in zip(batch, ids, strict=True):
        first = [tokenizer.bos_id] if tokenizer.add_bos and piece.first else []
        last = [tokenizer.eos_id] if tokenizer.add_eos and piece.last else []
        if piece.ids is not None:
            piece_ids, last = piece.ids, []
        parts += [first, piece_ids, last]
        n_tokens += len(first) + len(piece_ids) + len(last)
        if piece.last:
            ended.append((n_tokens, piece.checksum, piece.source))
    flat = np.concatenate(parts, dtype=state["dtype"], casting="unsafe")
    written = flat, np.array(ended, dtype=np.int64).reshape(-1, 3)
    for i, (stream, array) in enumerate(zip((tokens, records), written, strict=True)):
        raw = array.tobytes()
        state[FILES[i]] += stream.write(raw)
        state["checksums"][i] = zlib.crc32(raw, state["checksums"][i])
    state["pieces"] += len(batch)
