"""Text of any usual kind -> token files on disk, made once and memory-mapped from then on.

    find_files    files, folders, globs, hub datasets -> Files
    _pieces       Files -> documents, long ones cut where no token is
    _encoded      pieces, in batches -> token ids, by Tokenizer.encode (machine/tokenizer.py)
    _append       ids -> tokens.bin, and a record a document -> documents.bin
    tokenize      all of these, by _build if the cache does not have them yet -> Corpus

The cache folder is named after a fingerprint of the files' contents, the tokenizer and the options,
and appears under that name only when it is complete. Until then it is built in a `.part` folder
next to it, where the next run continues after the last finished shard of a killed one.

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
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

import data
from machine.files import (
    LFS,
    LFS_REMEDY,
    digest,
    downloading,
    file_checksum,
    free_name,
    is_on_disk,
    lock,
    publish,
    read_signed,
    remedy,
    signed,
    write_json,
)
from machine.tokenizer import Tokenizer, optional

FORMAT = 6  # part of the cache key: raise it when the files' layout or the cutting rule changes
PIECE = 1 << 14  # characters: longer documents go to the tokenizer in pieces, for speed and memory
LONGEST_PIECE = 1 << 16  # more is not encoded at once: a million blanks kill tiktoken
BATCH = 1 << 20  # characters handed to the tokenizer at once; it has two batches in hand
SHARD = 32  # batches between two notes of a build's progress: at most so many a kill costs
# The files of a cache folder next to meta.json. The second holds three int64 for each document: its
# end as an offset in tokens, its text's checksum, and its source (index of the spec that named it).
FILES = ("tokens.bin", "documents.bin")

# Text for a real checkpoint when none is named: files of the Hugging Face hub at the commits that
# public code names, readable with the packages of requirements.txt. Long: books (public domain, 1.1
# GB) and papers (CC BY, CC BY-SA, CC0; 0.2 GB), about 0.9G tokens. Short and short-to-long:
# RedPajama's sample without its books, 2.9 GB, about 0.7G tokens, mixed nearly as the paper mixes
# SlimPajama (its Table 8), whose files need zstandard; its parts keep their own terms: Common
# Crawl's (1.5 GB), ODC-BY (c4, 0.9 GB), MIT, BSD or Apache 2.0 (github, 0.2 GB), the papers' own
# (arxiv, 0.1 GB), CC BY-SA (the rest, 0.2 GB).
BOOKS = "common-pile/project_gutenberg_filtered@3cdf6879c807f4e4e063f2ceb23bc268d8c29ab7"
PAPERS = "common-pile/arxiv_papers_filtered@033cf7f53f9b348deec868c1a5a48484f3ee9e52"
SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample@98f93b765c118b999b1af570c3e399c207d08da7"
DEFAULT_LONG = [
    f"hf:{BOOKS}/project_gutenberg-dolma-000[01].json.gz",
    f"hf:{PAPERS}/arxiv-papers-0007.json.gz",
]
PARTS = ("cc_2019-30", "cc_2023-06", "c4", "github", "arxiv", "stackexchange", "wikipedia")
DEFAULT_SHORT = [f"hf:{SAMPLE}/{part}_sample.jsonl" for part in PARTS]

# ---------------------------------------------------------------------------- reading text


@dataclass
class File:
    path: str  # on disk, or inside its hub dataset
    source: int  # index of the spec that named it
    column: str  # field of a record that holds the text
    fingerprint: str = ""
    stat: tuple = ()  # size, mtime, ctime, device and inode before it was read; hub: size
    hub: tuple = ()  # (dataset, commit): fetched when it is read


@dataclass
class Corpus(data.Corpus):
    """Tokenised documents in files, memory-mapped."""

    fingerprint: str = ""  # of the text and of what made tokens of it
    folder: Path | None = None
    commits: dict[str, str] = field(default_factory=dict)  # of each hub source: what was read


@dataclass
class Piece:
    text: str
    first: bool  # of its document
    last: bool
    checksum: int  # of its document's whole text, where this is the last piece
    source: int
    position: int  # bytes of all files read before its end, for the progress bar
    ids: list[int] | None = None  # of a file of ids, whose documents are one piece each
    skip: int = 0  # of its tokens: they are of the piece before


# A file of token ids begins with this line; then a document a line, as a JSON list.
IDS = "token ids, a document a line, of the tokenizer "


def ids_header(fingerprint: str) -> str:
    return f"{IDS}{fingerprint}\n"


def find_files(
    specs: list[str], remembered: dict, log: Callable[[str], None] = print
) -> list[File]:
    """Specs -> the files they name, sorted, each file once.

    specs: a file, a folder (all files below it, hidden ones left out; of a downloaded dataset its
        train split alone, which is listed), a glob of files and folders, or
        hf:owner/name[@revision][/part]: a dataset of the Hugging Face hub, where revision is a
        commit, tag or branch, and part a file or glob in it, or a folder, whose train split is read
        where there is such; each may end in #column, the field of records to read ("text" if not
        given).
    remembered: what hub specs named before, used first and added to: data stay as they were.
    """
    found = {}
    for source, spec in enumerate(map(str, specs)):
        path, column = split_column(spec)
        if path.startswith("hf:"):
            remembered[path] = remembered.get(path) or _hub_files(path)
            remembered.setdefault(at_commit(path, remembered[path][0][3]), remembered[path])
            for name, size, *hub in remembered[path]:
                key = "/".join([*hub, name])
                file = File(name, source, column, key, (size,), tuple(hub))
                _one_column(spec, found.setdefault(key, file), column, path.endswith(name))
            continue
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            paths = _files_of(path, log)
        elif "**" in path and not os.path.exists(path):
            raise ValueError(
                f"no file at {spec}, and ** is not read: name the folder, or what find lists: "
                "$(find FOLDER -name '*.txt')"
            )
        else:
            matches = [path] if os.path.isfile(path) else sorted(glob.glob(path))
            matches = (_files_of(p, log) if os.path.isdir(p) else [p] for p in matches)
            paths = [*itertools.chain.from_iterable(matches)]
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
            file = File(p, source, column, stat=stat)
            _one_column(spec, found.setdefault(stat[3:], file), column, path == p)
    return list(found.values())


def split_column(spec: str) -> tuple[str, str]:
    """PATH#COLUMN -> (PATH, COLUMN); the column is "text" where a path itself holds the sign."""
    path, sign, column = spec.rpartition("#")
    if not sign or "/" in column or os.path.exists(spec) or glob.glob(spec):
        return spec, "text"
    return path, column


def _one_column(spec: str, file: File, column: str, by_name: bool) -> None:
    """Raise ValueError if a spec names a file, of which another column is read already."""
    if by_name and file.column != column:
        raise ValueError(
            f"{spec}: of this file #{file.column} is read already, and a file is read once: name "
            "one column, and before its folder"
        )


def at_commit(spec: str, commit: str | None) -> str:
    """Return a hub source as it is at a commit; any source as it is if that is None."""
    named = re.match(r"(hf:[^/]+/[^/:#@]+)(@[^/:#]*)?", spec)
    return f"{named[1]}@{commit}{spec[named.end() :]}" if named and commit else spec


def _hub_files(spec: str) -> list[list]:
    """hf:owner/name[@revision][/part] -> [file name, size, dataset, commit] of each."""
    import huggingface_hub

    owner, name, part = [*spec[3:].split("/", 2), "", ""][:3]
    part = part.rstrip("/")
    name, _, revision = name.partition("@")
    repo = f"{owner}/{name}"
    try:
        info = huggingface_hub.HfApi().dataset_info(
            repo, revision=unquote(revision) or None, files_metadata=True
        )
    except Exception as error:  # its error classes differ from version to version
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot list {spec} ({reason}); check name and network, or name a downloaded folder"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    chosen = fnmatch.filter(sizes, part)  # a file or a glob; else a folder, or all
    inside = (n for n in sizes if _is_records(n) and (not part or f"/{part}/" in f"/{n}"))
    chosen = sorted(chosen or _train_split([*inside]))
    if not chosen:
        code = f"import datasets; datasets.load_dataset({json.dumps(repo)}, split='train')"
        code += ".to_json('FILE.jsonl')"
        raise ValueError(
            f"no records in {part or 'the files'} of {repo}; it has {', '.join([*sizes][:5])} ...: "
            f"name a file or a glob, or make .jsonl of it: python -c {shlex.quote(code)}"
        )
    return [[name, sizes[name], repo, info.sha] for name in chosen]


# Files that describe a dataset and hold none of its text.
CARDS = "README.md dataset_infos.json dataset_info.json dataset_dict.json state.json".split()
# Endings of a dataset's files that hold no records; a project's train.py and test.py are no splits.
PLAIN = re.compile(r"(^|/)[^.]+$|\.(txt|text|raw|tokens|tok|en|de|fr|zh)(\.gz|\.zst)?$", re.I)


def _is_records(name: str) -> bool:
    """Whether a file's name is that of records that are read, and of no dataset's card."""
    suffix = _suffix(name)
    return bool(suffix) and suffix not in TABLES and os.path.basename(name) not in CARDS


def _named(words: str) -> re.Pattern:
    """What finds a split's name in that of a file: train-0.txt, c4-train.01.gz, Train/a."""
    return re.compile(rf"(^|[/_. -])({words})\d*([/_. -]|$)", re.I)


TRAIN = _named("train|training")
OTHER_SPLIT = _named(
    "test|testing|valid|validation|val|dev|development|eval|evaluation|held[_-]?out"
)


def _train_split(names: list[str]) -> list[str]:
    """Of a dataset's files those of the train split; else those of no other split; else all."""
    train = [n for n in names if TRAIN.search(n)]
    return train or [n for n in names if not OTHER_SPLIT.search(n)] or names


def _walk(folder: str) -> list[str]:
    """All files below a folder, sorted; hidden ones left out, and each folder entered once, however
    many links lead to it."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _files_of(folder: str, log: Callable) -> list[str]:
    """A folder's files; of a downloaded dataset, told by its card or its splits, those of the train
    split, or all of its data where no name speaks of one. What is left out then is listed."""
    names = {os.path.relpath(p, folder): p for p in _walk(folder) if os.path.isfile(p)}
    records = [n for n in names if _is_records(n)]
    card = records and any(os.path.basename(n) in CARDS for n in names)
    plain = [n for n in names if PLAIN.search(n) and not _suffix(n)]
    data = records + [n for n in plain if not card or "." in os.path.basename(n)]  # no LICENSE
    if not card and not (any(map(TRAIN.search, data)) and any(map(OTHER_SPLIT.search, data))):
        return list(names.values())
    chosen = set(_train_split(data))
    read, left_out = [n for n in names if n in chosen], [n for n in names if n not in chosen]
    if left_out:
        said = (
            ", ".join(some[:8]) + (f" and {len(some) - 8} more" if len(some) > 8 else "")
            for some in (read, left_out)
        )
        part = "its train split" if any(map(TRAIN.search, read)) else "its data"
        log(
            f"{folder} is a dataset's folder: reading {part}, {next(said)}; left out: "
            f"{next(said)} (name files or a glob to read them)"
        )
    return [names[n] for n in read]


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
                raise ValueError(f"a zero byte at {offset + block.index(0)}")
            yield decoder.decode(block, final=not block)
        except ValueError as error:
            remedy = "convert it from its encoding (Western Europe: iconv -f cp1252 -t utf-8), "
            if CONTROL.search(block):
                remedy = "it is binary: unpack it or export its text as .txt or .jsonl, "
            raise ValueError(
                f"{path} is not UTF-8 text ({error}, block at byte {offset}); {remedy}name files "
                "by a glob without it, or pass --skip_bad_lines"
            ) from None
        offset += len(block)


CONTROL = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")  # characters of no text in any code page
# How files begin that are known and not read, with what they are and what helps: a row a remedy.
OTHERS = {
    (LFS,): LFS_REMEDY,
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text; convert it: iconv -f utf-16 -t utf-8",
    (b"\xfd7zXZ\0", b"BZh", b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!"): (
        "packed, or an archive; unpack it: 7z x (of a .docx, .epub or .odt: pandoc -t plain)"
    ),
    (b"\x1f\x8b", b"\x28\xb5\x2f\xfd"): "packed twice; unpack it once: gzip -d, or zstd -d",
    (b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0"): (
        "a document; extract its text first: pdftotext, or soffice "
        "--convert-to 'txt:Text (encoded):UTF8'"
    ),
    (b"\xff\xff\xff\xff",): (
        "an Arrow stream; convert it: python -c 'import pyarrow as a, pyarrow.parquet as p; "
        'p.write_table(a.ipc.open_stream("FILE").read_all(), "FILE.parquet")\''
    ),
}
TAR = "a tar archive; unpack it into a folder of its own: tar -xf"  # it says so at byte 257


def _refuse_other(path: str, head: bytes) -> None:
    """ValueError with the remedy that helps for a file, unpacked, of a kind that is not read."""
    found = [said for begins, said in OTHERS.items() if head.startswith(begins)]
    if found or head[257:262] == b"ustar":
        raise ValueError(f"{path} is {[*found, TAR][0]}")


TABLES = {"csv": ",", "tsv": "\t"}  # not read: how they part their columns


def _suffix(path: str) -> str:
    """Of records, by the file's name: jsonl, json, parquet, csv or tsv; "" for any other."""
    found = re.search(r"\.(jsonl|ndjson|json|parquet|csv|tsv)(\.gz|\.zst)?$", path.lower())
    return found[1].replace("ndjson", "jsonl") if found else ""


def _kind(file: File) -> str:
    """What a file holds, by its content: text, jsonl, parquet or ids.

    Raises ValueError, with the command that helps, for what is not read.
    """
    path, suffix = file.path, _suffix(file.path)
    if suffix in TABLES:
        raise ValueError(f"{path} is a table, which is not read; {_as_lines(path, suffix)}")
    with _reading(path), _open(file) as (stream, _):
        head = stream.read(1024)
        _refuse_other(path, head)
        if head.startswith(b"PAR1"):
            if not stream.seekable():
                unpack = f"zstd -d {shlex.quote(path)}"
                raise ValueError(f"{path} is parquet in .zst, which is not read: {unpack}")
            return "parquet"
        if head.startswith(IDS.encode()):
            return "ids"
        text, objects = head.removeprefix(codecs.BOM_UTF8).lstrip(), 0
        if text.startswith(b"{"):
            lines = itertools.chain(io.BytesIO(text + stream.readline(1 << 28)), stream)
            some = [*itertools.islice(filter(bytes.strip, lines), 2)]
            objects = len([*itertools.takewhile(_is_object, some)])
            if objects == 1 and not suffix:  # one line of JSON may be a text; not so a record
                objects += file.column in json.loads(some[0])
    if re.match(rb'\[\s*\{\s*"', text) or suffix == "json" and not objects:
        raise ValueError(f"{path} is JSON, but not a record a line; {_as_lines(path, suffix)}")
    if suffix == "parquet":
        raise ValueError(f"{path} is no parquet file, or damaged; fetch it again")
    return "jsonl" if suffix or objects > 1 else "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _as_lines(path: str, suffix: str) -> str:
    """The command that makes .jsonl of a table, or of other JSON; every value stays as it is."""
    made = f"{path}.jsonl"
    unpack = "zstd -dcf" if path.lower().endswith(".zst") else "gzip -cdf"
    command = (
        f"""{unpack} {shlex.quote(path)} | jq -c 'if type == "array" then .[] else . end' > """
    )
    command += shlex.quote(made)
    if suffix in TABLES:
        code = f"import pandas; table = pandas.read_csv({json.dumps(path)}, "
        code += f"sep={json.dumps(TABLES[suffix])}, dtype=str, keep_default_na=False); "
        code += f'table.to_json({json.dumps(made)}, orient="records", lines=True)'
        command = f"python -c {shlex.quote(code)}"
    return f"make .jsonl of it and name that: {command}"


@contextlib.contextmanager
def _reading(path: str):
    """What any reader raises at a damaged file is a ValueError that names it."""
    try:
        yield
    except Exception as error:  # every reader has its own
        if type(error) is ValueError:  # ours, with file and remedy
            raise
        raise ValueError(f"cannot read {path}: {error}; fetch or leave it out") from error


def _split(blocks: Iterable[str], tokenizer: Tokenizer | None):
    """One document -> (piece, is it the last, how many characters of the piece before it it begins
    with, at the last the crc32 of the whole), cut where the tokens do not notice.

    The checksum is not that of the pieces, which lack what cuts drop: copies of a document would
    differ by tokenizer.

    Where no safe cut is in LONGEST_PIECE, it is at a joint that no token spans: the next piece
    begins with the character before, so that nothing is put in front of it as of a text, and the
    tokens of that character are left out. An unsafe cut is made where there is none either: within
    a run of one letter or of blanks, say, whose tokens depend on where the run began.
    """
    rest, overlap, checksum, cut = "", 0, 0, tokenizer and tokenizer.cut
    for block in itertools.chain(blocks, [None]):
        rest, start = rest + (block or ""), 0
        checksum = zlib.crc32((block or "").encode(), checksum)
        # All of `rest` is cut at the end of the text; before it, only what has room for a cut.
        while len(rest) - start > (PIECE if block is None else LONGEST_PIECE):
            end = start + LONGEST_PIECE
            found = cut.search(rest, start + PIECE, end + 1) if cut else None
            if found is None and len(rest) <= end:
                break
            joint = tokenizer.joint(rest, start + PIECE, end) if tokenizer and not found else None
            yield rest[start : found.start() if found else joint or end], False, overlap, 0
            overlap = 1 if joint else 0
            start = found.end() if found else (joint or end) - overlap
        rest = rest[start:]
    if rest:
        yield rest, True, overlap, checksum


class Zstd(io.RawIOBase):
    """The bytes in a .zst file, frame after frame; EOFError where it ends inside one.

    Frames of `zstd --long=31` are read too: they ask for 2 GiB of memory at most.
    """

    def __init__(self, raw, path: str):
        unpacker = optional("zstandard", path).ZstdDecompressor(max_window_size=1 << 31)
        self.blocks, self.ready = self.unpacked(raw, unpacker), b""

    def unpacked(self, raw, unpacker) -> Iterator[bytes]:
        frame, packed = None, b""
        while packed := packed or raw.read(1 << 17):
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(packed)
            packed, frame = frame.unused_data, None if frame.eof else frame
        if frame:
            raise EOFError("it ends inside a zstd frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.ready = self.ready or next(filter(None, self.blocks), b"")
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


@contextlib.contextmanager
def _open(file: File):
    """(stream of decompressed bytes, raw stream whose position tells the progress)

    Packed is what begins so, or is called so: under its name, a file cut to nothing is damaged.
    """
    path, name = file.path, file.path.lower()
    if file.hub:
        import huggingface_hub

        with downloading():
            path = huggingface_hub.hf_hub_download(
                file.hub[0], path, repo_type="dataset", revision=file.hub[1]
            )
    with open(path, "rb") as raw:
        head = raw.peek(4)
        if name.endswith(".gz") or head.startswith(b"\x1f\x8b"):
            yield gzip.GzipFile(fileobj=raw), raw
        elif name.endswith(".zst") or head.startswith(b"\x28\xb5\x2f\xfd"):
            yield io.BufferedReader(Zstd(raw, path), 1 << 20), raw
        else:
            yield raw, raw


def _records(file: File, kind: str, stream) -> Iterator[bytes | dict]:
    """Records of a file: lines of JSON, still to be parsed, or what was parsed."""
    if kind == "jsonl":
        yield from stream
        return
    table = optional("pyarrow.parquet", file.path).ParquetFile(stream)
    columns = [file.column] if file.column in table.schema_arrow.names else None
    for batch in table.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


def _documents(file: File, kind: str, stream, skip_bad: bool) -> Iterator[Iterable[str] | None]:
    """Yield the documents of a file, each as blocks of text; None for a bad record left out."""
    if kind == "text":
        yield _decoded(stream, file.path)
        return
    for number, record in enumerate(_records(file, kind, stream), 1):
        try:
            if isinstance(record, bytes):
                if number == 1 and record.startswith(codecs.BOM_UTF8):
                    record = record.removeprefix(codecs.BOM_UTF8)
                record = json.loads(record) if record.strip() else {file.column: ""}
            yield [_text(record, file.column)]
        except (ValueError, RecursionError) as error:
            if not skip_bad:
                raise ValueError(
                    f"{file.path}:{number}: not a record with text ({error}); mend it, or leave "
                    "out such records with --skip_bad_lines"
                ) from error
            yield None


def _text(record: object, column: str) -> str:
    """Return a record's text. Raises ValueError saying what is there instead, and what helps."""
    if not isinstance(record, dict):
        raise ValueError(f"{str(record)[:60]} is a {type(record).__name__}, need an object")
    text = record.get(column)
    if isinstance(text, bytes):  # a parquet column without the mark of text
        text = text.decode()
    if isinstance(text, str):
        text.encode()  # half a surrogate pair is legal JSON and not text
        return text
    if column in record:
        said = f"{column!r} is {json.dumps(text, default=str)[:40]}, need text"
        if isinstance(text, list):
            said += f": jq -c '{{text: (.{column} | join(\"\\n\"))}}' IN.jsonl > OUT.jsonl"
        raise ValueError(said)
    held = [str(key) for key, value in record.items() if isinstance(value, str)]
    helps = f"text is in {', '.join(held[:6])}: name it as PATH#{held[0]}" if held else ""
    if "." in column:
        helps = f"a nested field is read after jq -c '{{text: .{column}}}' IN.jsonl > OUT.jsonl"
    raise ValueError(f"no {column!r} in {str(record)[:60]}...; {helps or 'try PATH#FIELD'}")


def _id_rows(file: File, stream, tokenizer: Tokenizer) -> Iterator[list[int]]:
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
    before = 0  # bytes in files read
    for file in files:
        with _reading(file.path):
            kind = _kind(file)
            with _open(file) as (stream, raw):
                for ids in _id_rows(file, stream, tokenizer) if kind == "ids" and tokenizer else ():
                    checksum, position = zlib.crc32(str(ids).encode()), before + raw.tell()
                    yield Piece("", True, True, checksum, file.source, position, ids)
                for document in _documents(file, kind, stream, skip_bad) if kind != "ids" else ():
                    if document is None:
                        count["bad"] += 1
                        continue
                    first, returns = True, False
                    for text, last, overlap, checksum in _split(document, tokenizer):
                        for token in tokenizer.spelled.findall(text) if tokenizer else ():
                            count["spelled"][token] = count["spelled"].get(token, 0) + 1
                        returns |= "\r" in text
                        position = before + raw.tell()
                        piece = Piece(text, first, last, checksum, file.source, position)
                        if overlap:
                            piece.skip = len(tokenizer.encode_batch([text[:overlap]])[0])
                        first = False
                        yield piece
                    count["cr"] += returns
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
        with contextlib.suppress(ValueError):  # tokenize reports what cannot be read
            pieces = _pieces([file], None, skip_bad, {"bad": 0, "cr": 0, "spelled": {}})
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

    What is not read is refused here, before hours of work, and so is a text that is not UTF-8 or
    cannot be unpacked; with skip_bad it is left out. seen: path -> size, times and fingerprint,
    remembered from run to run.
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
    digest, kind = hashlib.sha256(), _kind(file)
    with _reading(file.path), _open(file) as (stream, raw):
        if kind == "text":
            for _ in _decoded(stream, file.path, digest if stream is raw else None):
                pass
            if stream is not raw:
                raw.seek(0)
        while block := raw.read(1 << 20):
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
    """Tokenise text once; later calls memory-map the files.

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
            write_json(seen_path, signed(seen), indent=None)
        key = [FORMAT, PIECE, skip_bad_lines, tokenizer.fingerprint]
        key += [tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos]
        key += [(file.fingerprint, file.source, file.column) for file in files]
        if tokenizer.cut and "(?!" in tokenizer.cut.pattern:  # not where the usual places are cut
            key += [tokenizer.cut.pattern]
        fingerprint = digest(key)
        folder = cache_dir / f"tokens-{fingerprint}"
        meta = _complete(folder)
        if meta is None:
            log(f"{name}: tokenising {len(files):,} files, or waiting for a run that is at it")
            lock_path = Path(f"{folder}.lock")
            with lock(lock_path, wait=True) as handle:  # a killed run's lock frees itself
                held = partial(is_on_disk, handle, lock_path)
                meta = _complete(folder, log)
                meta = meta or _build(folder, files, tokenizer, name, skip_bad_lines, log, held)
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        records = np.fromfile(folder / "documents.bin", dtype=np.int64).reshape(-1, 3)
    except OSError as error:
        raise ValueError(
            f"{name}: {error}; {remedy(error)} and run again, it goes on where it stopped (tokens "
            f"are in {cache_dir} and take about half the text's size)"
        ) from error
    left_out = f"; {meta['bad']:,} bad records left out" if meta["bad"] else ""
    left_out += f"; {meta['cr']:,} documents keep their carriage returns" if meta["cr"] else ""
    log(f"{name}: {len(records):,} documents, {len(tokens):,} tokens in {folder}{left_out}")
    if meta["spelled"]:
        log(_say_spelled(name, meta["spelled"]))
    starts = np.append(0, records[:, 0])
    return Corpus(
        name,
        tokens,
        starts,
        doc_checksums=records[:, 1],
        doc_sources=records[:, 2],
        fingerprint=fingerprint,
        folder=folder,
        commits={str(specs[file.source]): file.hub[1] for file in files if file.hub},
    )


def _say_spelled(name: str, spelled: dict[str, int]) -> str:
    """A warning of text in which special tokens are written out, as some files part documents."""
    most = sorted(spelled, key=lambda token: -spelled[token])
    counts = ", ".join(f"{token!r} {spelled[token]:,} times" for token in most[:3])
    code = (
        f'import json; parts = open("FILE", encoding="utf-8").read().split({json.dumps(most[0])})'
    )
    code += '; print(*(json.dumps({"text": part.strip()}) for part in parts), sep="\\n")'
    return (
        f"WARNING {name}: its text spells special tokens, which are read as ordinary text: "
        f"{counts}; where one parts documents, make .jsonl of them: python -c {shlex.quote(code)} "
        "> FILE.jsonl"
    )


def _read_memo(path: Path) -> dict:
    """Return the content of seen_files.json; {} if it is damaged, since it can be made again.

    A damaged file may be a user's own, so it is renamed, not removed.
    """
    found = read_signed(path)
    if found is None and path.is_file():
        with contextlib.suppress(OSError):  # another process was at it
            path.rename(free_name(path.with_name(f"{path.name}.damaged")))
    return {key: value for key, value in (found or {}).items() if key != "checksum"}


def _complete(folder: Path, log: Callable = lambda _: None) -> dict | None:
    """The cache's description if it is whole, None if it is to be built.

    All of it is read once in a process and compared with the checksums in meta.json, about 1 s a GB
    from memory.
    """
    with contextlib.suppress(OSError, KeyError):
        meta = read_signed(folder / "meta.json")
        stats = tuple(_stat(folder / name) for name in FILES)
        if meta and _checksums(folder, stats) == meta["checksums"]:
            return meta
    if folder.is_dir():
        log(f"{folder} is damaged: building it anew")
    return None


@lru_cache(64)
def _checksums(folder: Path, stats: tuple) -> list[int]:
    """crc32 of each file of a cache, as it was at `stats`."""
    return [file_checksum(folder / name) for name in FILES]


def _drop(folder: Path) -> None:
    """Remove a cache's files, its description first, and the folder if nothing else is in it."""
    for name in ("meta.json", *FILES):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _build(folder, files, tokenizer, name, skip_bad, log, held) -> dict:
    """Tokenise into folder.part, shard by shard; rename when done. Returns the description.

    held(): whether the cache's lock is still ours.
    """
    part, began = Path(f"{folder}.part"), time.perf_counter()
    part.mkdir(exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    fresh = dict.fromkeys((*FILES, "pieces", "bad", "cr"), 0)  # sizes in bytes
    fresh |= {"checksums": [0, 0], "dtype": dtype, "spelled": {}}
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

        def finish_shard():  # finished when meta.json is on disk, after the tokens that it counts
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
            if not held():
                raise ValueError(f"{name}: {folder}.lock was removed at work: run again")
            write_json(part / "meta.json", signed(state))

        # What was tokenised is read again and dropped, plain text 100 times as fast as one core
        # tokenises it.
        state |= {"bad": 0, "cr": 0, "spelled": {}}
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
    publish(part, folder, _drop)
    size, seconds = size / 1e6, time.perf_counter() - began
    log(f"{name}: tokenised {size:,.1f}M characters in {seconds:,.1f} s, {size / seconds:,.2f}M/s")
    return state


def _unfinished(part: Path, fresh: dict) -> dict:
    """Return an interrupted build's progress from its meta.json; `fresh` if that is not sound.

    The checksums of what it wrote are compared too.
    """
    state = read_signed(part / "meta.json")
    if state and state.keys() - {"checksum"} == fresh.keys():
        del state["checksum"]
        with contextlib.suppress(OSError):
            sums = [file_checksum(part / file, state[file]) for file in FILES]
            if sums == state["checksums"] and state["dtype"] == fresh["dtype"]:
                return state
    return fresh


def _append(batch, ids, tokenizer, state, tokens, records) -> None:
    """Write one tokenised batch: documents' tokens and, where one ends, its record."""
    parts, ended, n_tokens = [], [], state[FILES[0]] // np.dtype(state["dtype"]).itemsize
    for piece, piece_ids in zip(batch, ids, strict=True):
        first = [tokenizer.bos_id] if tokenizer.add_bos and piece.first else []
        last = [tokenizer.eos_id] if tokenizer.add_eos and piece.last else []
        if piece.ids is not None:
            piece_ids, last = piece.ids, []
        piece_ids = piece_ids[piece.skip :]
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
