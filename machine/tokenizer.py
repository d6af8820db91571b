"""A checkpoint's tokenizer: read, and carried into an export.

Either Hugging Face's tokenizer.json or Meta's tokenizer.model of Llama 3, tiktoken's ranks, which
an export has as a tokenizer.json that encodes alike. Sentencepiece's tokenizer.model is not read.
"""

import base64
import functools
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import data
from machine.files import LFS_REMEDY, digest, is_lfs_pointer, read_json, write_json
from machine.hf_config import say_once
from model import TOKENIZER_FILES, tokenizer_settings


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
    ordinary: frozenset[int]  # ids that a text can become: no special token, no hole, no padding
    spelled: re.Pattern  # a special token written out in a text, which is ordinary text there
    template: tuple[list[int], list[int]]  # ids that it puts around a text by itself
    cut: re.Pattern | None = None  # where a text may be cut without changing its tokens
    pairs: frozenset[str] = frozenset()  # characters side by side in a token, where that is known
    added: tuple[str, ...] = ()  # tokens that are found in a text before it is cut into words

    def joint(self, text: str, first: int, last: int) -> int | None:
        """Return the last place from `first` on that no token spans; None: unknown.

        Two neighbouring characters that no token holds side by side are in two tokens (BPE merges,
        and unigrams cover, neighbours alone). What else the tokenizer does is tried on the text
        around the place.
        """
        places = (i for i in range(last, first, -1) if text[i - 1 : i + 1] not in self.pairs)
        for i in itertools.islice(places if self.pairs else (), 99):
            left, right, before = text[max(0, i - 40) : i], text[i : i + 40], text[i - 1]
            tried = self.encode_batch([left + right, left, before + right, before])
            if tried[0] == tried[1] + tried[2][len(tried[3]) :]:
                return i
        return None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; markup such as <s> is plain text."""
        return [[int(i) for i in ids] for ids in self.encode(texts)]

    def check_fits(self, vocab_size: int) -> None:
        """Raise ValueError if a document can hold ids that a model's vocabulary does not have."""
        final = [self.bos_id if self.add_bos else 0, self.eos_id if self.add_eos else 0]
        final += [i for part in self.template for i in part]
        if (largest := max(max(self.ordinary, default=0), *final)) >= vocab_size:
            raise ValueError(
                f"tokenizer does not fit the model: its ids go up to {largest}, the "
                f"model has {vocab_size} embeddings; use the tokenizer that came with the weights"
            )


def find_tokenizer(folder: str | Path) -> Path:
    """Return a folder's tokenizer.json, else its tokenizer.model. Raises ValueError for others.

    Such a tokenizer.model is tiktoken's ranks; sentencepiece's is not read.
    """
    path = Path(folder) / "tokenizer.json"
    path = path if path.is_file() else path.with_name("tokenizer.model")
    if not path.is_file():
        raise ValueError(
            f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; copy one of "
            "them from where the weights came from"
        )
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is {LFS_REMEDY}")
    if path.name == "tokenizer.model" and not read_ranks(path):
        kind = "a sentencepiece model" if path.read_bytes()[:1] == b"\n" else "damaged"
        raise ValueError(
            f"{path} is {kind}: need tiktoken's ranks (Llama 3), or a tokenizer.json; take that "
            "from the checkpoint's Hugging Face repository: hf download OWNER/NAME tokenizer.json "
            f"--local-dir {folder}"
        )
    return path


def load_tokenizer(folder: str | Path, add_eos: bool | None = None) -> Tokenizer:
    """Read tokenizer.json or Meta's tokenizer.model from a checkpoint folder.

    add_eos: whether documents end with EOS; None: where the tokenizer names an end of text.
    Raises: ValueError if there is neither, or it cannot be read, or names no EOS and one is asked.
    """
    path, load = find_tokenizer(folder), _load_ranks
    if path.name == "tokenizer.json":
        _try_in_a_child(path)
        load = _load_json
    try:
        tokenizer = load(path, _settings(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        if type(error) is ValueError:  # ours
            raise
        raise ValueError(f"cannot use {path}: {error}; fetch it again") from error
    tokenizer.cut = _find_cut(tokenizer)
    if tokenizer.cut is None or DROP not in tokenizer.cut.pattern:
        tokenizer.pairs = frozenset()  # of a byte-level vocabulary, cut into words beforehand
    if add_eos and tokenizer.eos_id is None:
        raise ValueError(
            f"--add_eos: {path} and the files next to it name no end of text among its "
            "special tokens; name one as eos_token in tokenizer_config.json, or drop it"
        )
    tokenizer.add_eos = tokenizer.add_eos if add_eos is None else add_eos
    return tokenizer


# A few lines with everything that a tokenizer's rules may treat in a special way.
PROBE = (
    "It's 12,345.67\n\n  \tdef f(x):  # caf\u00e9 \u4e16\u754c \U0001f600 don't  a_b-c [x] {y} <s> "
    "\u00a0\u2581\u0627\u0644 fi\ufb01 \r\n"
    + "".join(map(chr, range(32, 127)))
    + "one line of many words, no end to it " * 60
)
CHILD = """
import json, sys
path, probe, sys.path[:], cpu, memory = json.loads(sys.stdin.read())
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
try:
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(path)
    ids = tokenizer.encode(probe).ids
    if len(ids) > 200 * len(probe):
        sys.exit(f"it makes {len(ids):,} tokens of {len(probe)} characters")
    if tokenizer.get_vocab_size() < 1:
        sys.exit("it has no tokens")
except BaseException as error:
    sys.exit(" ".join(str(error).split())[:200] or type(error).__name__)
"""


@functools.lru_cache(64)
def _tried(path: Path, stat: tuple) -> str | None:
    """Try a tokenizer in a process of its own, with limits; return what goes wrong, or None."""
    cpu, memory = 15 + stat[0] // 2**21, 2**32 + 64 * stat[0]  # seconds, bytes
    given = json.dumps([str(path), PROBE, sys.path, cpu, memory])
    # One thread: a pool's threads cost address space, and their stacks count against the limit.
    env = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", CHILD]
    done = dict(input=given, capture_output=True, text=True, env=env, timeout=4 * cpu)
    try:
        child = subprocess.run(command, **done)
    except subprocess.TimeoutExpired:
        return f"it took more than {4 * cpu} s for {len(PROBE)} characters"
    if child.returncode < 0 or child.returncode > 1:
        return f"it ended a process ({child.returncode}) that had {memory >> 30} GiB and {cpu} s"
    said = child.stderr.strip().splitlines() or ["it cannot be read"]
    return said[-1][:200] if child.returncode else None


def _try_in_a_child(path: Path) -> None:
    """ValueError for a tokenizer that panics, hangs or expands without end: no later moment and no
    `except` would help. Costs 0.1 s, once for a file."""
    stat = path.stat()
    if wrong := _tried(path.resolve(), (stat.st_size, stat.st_mtime_ns, stat.st_ino)):
        raise ValueError(f"cannot use {path}: {wrong}; fetch it again")


def _settings(path: Path) -> dict:
    """Read the files next to a tokenizer (data.read_settings).

    Raises ValueError naming the file that is damaged.
    """
    for name in "special_tokens_map tokenizer_config config generation_config".split():
        if (beside := path.with_name(f"{name}.json")).is_file():
            read_json(beside)
    settings = data.read_settings(path.parent)
    for kind in ("bos_token", "eos_token"):
        if not isinstance(settings[kind], str | None):
            raise ValueError(
                f"{path.with_name('tokenizer_config.json')}: {kind} is {settings[kind]!r:.60}, "
                "need a string; fetch it again"
            )
    return settings


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


def _named_alone(config: dict) -> dict[int, str]:
    """Special tokens of tokenizer_config.json, by id: of those that tokenizer.json lacks
    transformers adds each, and no text becomes one."""
    entries, found = config.get("added_tokens_decoder"), {}
    for i, entry in entries.items() if isinstance(entries, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) and entry.get("special") else None
        if isinstance(token, str) and i.isdecimal() and int(i) < 2**32:
            found[int(i)] = token
    return found


def _load_json(path: Path, config: dict) -> Tokenizer:
    """Load Hugging Face's tokenizer.json."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns after a fork
    plain = data.Tokenizer(path.parent, _named_alone(config))
    tk, specials, eos_id = plain.tokenizer, plain.special, plain.eos_id
    if eos_id is None and plain.ends:
        eos_id = plain.ends[0]
        say_once(
            f"documents end with nothing: {specials[eos_id]} ends a turn, not a text (--add_eos: "
            "with it)"
        )
    for kind in ("bos", "eos"):
        named = [config[f"{kind}_token"], *config[f"{kind}_token_id"]]
        named = [x for x in named if x is not None]
        if named and not any(x in specials or x in specials.values() for x in named):
            said = ", ".join(f"{x!r:.40}" for x in named)
            say_once(f"{path}: {kind.upper()} {said} is no special token of it: not taken")

    def encode(texts: list[str]) -> list[array]:
        try:
            found = tk.encode_batch_fast(texts, add_special_tokens=False)  # no character offsets
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # its Rust code gave up: no Exception
                raise
            raise ValueError(f"{path} cannot read this text: {error!s:.200}") from None
        # Each list is packed as soon as it is made: all of them at once no cache would hold.
        return [array("I", e.ids) for e in found]

    vocab = tk.get_vocab(with_added_tokens=True).values()
    return Tokenizer(
        encode,
        lambda ids: tk.decode([int(i) for i in ids], skip_special_tokens=False),
        max(*vocab, *specials, 0) + 1,
        *(plain.bos_id, eos_id, bool(plain.add_bos), plain.eos_id is not None),
        digest(path.read_bytes()),
        frozenset(i for i in vocab if i not in specials),
        _any_of(specials.values()),
        plain.around,
        pairs=_pairs(tk.get_vocab()),
        added=tuple(t.content for t in tk.get_added_tokens_decoder().values() if not t.special),
    )


# Llama 3's way of cutting text into words, which its tokenizer.model leaves to the reader.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_special_tokens(n_ranks: int) -> dict[str, int]:
    """Return Llama 3's 256 special tokens, which follow the n_ranks ordinary ones."""
    names = [f"reserved_special_token_{i}" for i in range(251)]
    names[:0] = ["begin_of_text", "end_of_text"]
    names[6:6] = ["start_header_id", "end_header_id"]
    names.insert(9, "eot_id")
    return {f"<|{name}|>": n_ranks + i for i, name in enumerate(names)}


def read_ranks(path: Path) -> dict[bytes, int] | None:
    """Read a tiktoken file's tokens (base64, space, rank on each line); None if it is not one."""
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        return None


def _load_ranks(path: Path, config: dict) -> Tokenizer:
    """Load Meta's tokenizer.model, tiktoken's ranks."""
    import tiktoken

    ranks = read_ranks(path)
    special = llama3_special_tokens(len(ranks))
    coder = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    pool = ThreadPoolExecutor(os.cpu_count())
    one = functools.partial(coder.encode_to_numpy, disallowed_special=())
    return Tokenizer(
        encode=lambda texts: list(pool.map(one, texts)),
        decode=lambda ids: coder.decode([int(i) for i in ids]),
        vocab_size=len(ranks) + 256,
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=True,
        fingerprint=digest(path.read_bytes()),
        ordinary=frozenset(ranks.values()),
        spelled=_any_of(special),
        template=([special["<|begin_of_text|>"]], []),
    )


def optional(package: str, what: object):
    """Import a package that only some inputs need. Raises ValueError saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        package = package.split(".")[0]
        raise ValueError(f"reading {what} takes one more package: pip install {package}") from error


BLANK = "\u2581"  # sentencepiece's space
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # its name of a byte, no text of five characters
DROP = r"(?<=[^\W\d_]) (?=[^\W\d_])"


def _pairs(vocab: Iterable[str]) -> frozenset[str]:
    """Return every two neighbouring characters of all tokens."""
    tokens = [token.replace(BLANK, " ") for token in vocab if not BYTE.fullmatch(token)]
    return frozenset(token[i : i + 2] for token in tokens for i in range(len(token) - 1))


def _find_cut(tokenizer: Tokenizer) -> re.Pattern | None:
    """Return where a long text may be cut so that its pieces' tokens are the tokens of the whole.

    Byte-level tokenizers cut at word borders first: after a lone newline, or before a lone space,
    is safe. Sentencepiece's put a space in front of every text: cut at a space and drop it. Which
    holds is tried on this tokenizer. Neither: `joint`, else pieces of LONGEST_PIECE, some tokens
    off at each cut.
    """
    a, b = "He said: it's 12 o'clock,\n\nbut 'No one", "knew' the 7th\r\nthing of 1999. Yes"
    keep = r"(?<=\S\n)(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])"
    for pattern, *groups in (
        (keep, [a + "\n" + b, a + "\n", b], [a + " " + b, a, " " + b]),
        (DROP, [a + " " + b, a, b]),
    ):
        ids = [tokenizer.encode_batch(group) for group in groups]
        if all(whole == first + second for whole, first, second in ids):
            return re.compile(_not_within(tokenizer.added, pattern))
    return None


def _not_within(tokens: Iterable[str], pattern: str) -> str:
    """Return the pattern of a cut so that it is neither inside one of these tokens nor at a blank
    next to one, which the token may take in, or behind which a text begins anew."""
    cut, not_here = re.compile(pattern), []
    for t in tokens:
        not_here += [(t[:i], t[i:]) for i in range(1, len(t)) if cut.match(f"a{t}a", i + 1)]
        not_here += [("", f" {t}")] if cut.match(f"a {t}", 1) else []
        not_here += [(t, " ")] if cut.match(f"{t} a", len(t)) else []
    places = "".join(f"(?!(?<={re.escape(a)}){re.escape(b)})" for a, b in not_here)
    return f"{places}(?:{pattern})" if places else pattern


# --------------------------------------------------------------------------------- into an export


def carry_tokenizer(source: Path, out_dir: Path, window: int | None) -> dict:
    """Copy a checkpoint's tokenizer files, or convert the tokenizer.model of one that has no other.

    window: max_position_embeddings of the export, in tokens; None leaves the old model_max_length.
    Truncation and padding settings stay behind, and so does code that auto_map names.
    Returns the ids of begin and end of text where a conversion found them, as in config.json.
    """
    found = {name for name in TOKENIZER_FILES if (source / name).is_file()}
    special = {}
    if "tokenizer.model" in found and "tokenizer.json" not in found:
        special = _convert(source, out_dir)
        found.remove("tokenizer.model")
    for name in found:
        shutil.copyfile(source / name, out_dir / name)
    path = out_dir / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else None
    if "tokenizer.json" in found:
        content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        if content.get("truncation") or content.get("padding"):
            content |= {"truncation": None, "padding": None}
            write_json(out_dir / "tokenizer.json", content)
    if settings is None:
        return special
    gone = "max_length stride truncation_strategy padding pad_to_multiple_of auto_map backend"
    settings = {key: value for key, value in settings.items() if key not in gone.split()}
    settings = tokenizer_settings(settings, out_dir)
    write_json(path, settings | ({"model_max_length": window} if window else {}))
    return special


def check_export(source: Path, tokenizer: Tokenizer, texts: list[str] | None = None) -> int:
    """Compare what training reads with what the export's tokenizer.json makes of the same texts.

    texts: the run's own; None: a few lines that try everything, before any text is read. What the
    tokenizer puts around a text is compared too: in front training's BOS or nothing, behind it
    nothing or training's EOS. Returns the number of tokens compared. Raises ValueError where one
    differs.
    """
    exported = _export_encoder(source)
    texts = [PROBE, " a", "", "a  b ", *PROBE.split()] if texts is None else texts
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    closings = [], [tokenizer.eos_id]
    n = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        want, got = [*first, *ids], exported(text)
        n += len(ids)
        if any(got == [*want, *closing] for closing in closings):
            continue
        i = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(want))
        remedy = "put the tokenizer.json that belongs to it into the folder"
        if any(got[k : k + len(ids)] == ids for k in range(len(got) - len(ids) + 1)):
            remedy = (
                "remove add_bos_token and add_eos_token from its tokenizer_config.json, so that "
                "tokenizer.json alone decides what is put around a text"
            )
        raise ValueError(
            f"the tokenizer of {source} cannot be exported: "
            f"{tokenizer.decode(want[max(0, i - 9) : i])!r} continues as "
            f"{_shown(tokenizer, want[i : i + 4])} in training, as "
            f"{_shown(tokenizer, got[i : i + 4])} by the export's tokenizer.json; {remedy}"
        )
    return n


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Show tokens as text and as ids: two texts may look alike."""
    return f"{tokenizer.decode(ids)!r} {ids}" if ids else "nothing"


@functools.lru_cache(4)
def _export_encoder(source: Path) -> Callable[[str], list[int]]:
    """Return text -> ids by the tokenizer.json that an export of this folder has."""
    from tokenizers import Tokenizer as Fast

    with tempfile.TemporaryDirectory() as folder:
        carry_tokenizer(source, Path(folder), None)
        exported = Fast.from_file(f"{folder}/tokenizer.json")
    exported.encode_special_tokens = True  # markup in a text is text, in training and here
    return lambda text: exported.encode(text).ids


def _convert(source: Path, out_dir: Path) -> dict:
    """Write Meta's tokenizer.model as a tokenizer.json that encodes alike: check_export tries it.

    Returns config.json's ids of begin and end of text. The ranks' own file stays behind: readers of
    Hugging Face folders take it for a sentencepiece model, and break on it.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    original = load_tokenizer(source)
    converted, special = _convert_ranks(read_ranks(source / "tokenizer.model"))
    converted.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    ids = {"bos": original.bos_id, "eos": original.eos_id}
    tokens = {kind: converted.id_to_token(i) for kind, i in ids.items()}
    if original.add_bos:
        begin = [(tokens["bos"], original.bos_id)]
        single = f"{tokens['bos']} $A"
        converted.post_processor = TemplateProcessing(single=single, special_tokens=begin)
    converted.save(str(out_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    settings |= {f"{kind}_token": token for kind, token in tokens.items()}
    write_json(
        out_dir / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False}
    )
    return {f"{kind}_token_id": i for kind, i in ids.items()}


def _convert_ranks(ranks: dict[bytes, int]):
    """Turn tiktoken's ranks into a byte-level BPE: (tokenizer, its special tokens)."""
    from tokenizers import Regex, decoders, models
    from tokenizers import Tokenizer as Fast
    from tokenizers import pre_tokenizers as cutters

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]  # byte-level BPE's stand-ins
    spell = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    merges = _merges(vocab, sorted(vocab, key=vocab.get))
    converted = Fast(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut = cutters.Split(Regex(LLAMA3_PATTERN), "isolated")
    level = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
    converted.pre_tokenizer = cutters.Sequence([cut, level])
    converted.decoder = decoders.ByteLevel()
    return converted, llama3_special_tokens(len(ranks))


def _merges(vocab: dict[str, int], order: list[str]) -> list[tuple[str, str]]:
    """Return every pair of tokens that make a third, in the order in which BPE prefers the result.

    The file of ranks does not keep the pairs: any two neighbours merge whose union is a token.
    """
    merges = []
    for token in order:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
