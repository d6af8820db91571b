"""machine/corpus.py: text of any kind to token files, once, whatever happens meanwhile."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

import data
import machine.corpus
from longred import main
from machine.corpus import tokenize
from machine.mixture import Mixture, choose_documents
from machine.run import train
from machine.tokenizer import load_tokenizer
from tests.conftest import (
    HERE,
    PROPERTY,
    STORIES,
    TEXTS,
    bpe,
    byte_tokenizer,
    documents,
    killed_after_two,
    made_corpus,
    needs_stories,
    printed,
    prose,
    run_python,
    same_run,
    tiktoken_folder,
    tiny_run,
)

DOCS = ["first \u00e9 text", "second,\r\nlonger \ud55c text\n\n", "third"]


def test_every_kind_of_file_gives_the_same_documents(tk, tmp_path):
    lines = "".join(json.dumps({"body": d, "id": i}) + "\n" for i, d in enumerate(DOCS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    for name in ("b.jsonl.gz", "c.json.gz", "d"):
        (tmp_path / name).write_bytes(gzip.compress(lines))
    for i, text in enumerate(DOCS):
        (tmp_path / f"d{i}.weird").write_bytes(text.encode())
    expected = [[*ids, 256] for ids in tk.encode_batch(DOCS)]
    assert [len(ids) - 1 for ids in expected] == [len(text.encode()) for text in DOCS]
    for spec in ("a.jsonl#body", "b.jsonl.gz#body", "c.json.gz#body", "d#body"):
        assert documents(tokenize([tmp_path / spec], tk, tmp_path / "cache")) == expected
    plain = tokenize([tmp_path / "d?.weird"], tk, tmp_path / "cache")  # as open() reads it
    read = [(tmp_path / f"d{i}.weird").read_text(encoding="utf-8") for i in range(3)]
    assert [tk.decode(d[:-1]) for d in documents(plain)] == read and "\r" not in read[1]


def test_zstd_and_parquet_are_read_where_installed(tk, tmp_path):
    zstandard, pq = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCS).encode()
    pack = zstandard.compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(lines[:30]) + pack(lines[30:]))  # two frames
    (tmp_path / "by another name").write_bytes(pack(lines))
    pq.write_table(pyarrow.table({"text": DOCS, "x": [1, 2, 3]}), tmp_path / "b.parquet")
    for name in ("a.jsonl.zst", "by another name", "b.parquet"):
        corpus = tokenize([tmp_path / name], tk, tmp_path / "cache")
        assert [tk.decode(d[:-1]) for d in documents(corpus)] == DOCS
    with pytest.raises(ValueError, match="b.parquet:1: .*no 'nope' in"):
        tokenize([f"{tmp_path}/b.parquet#nope"], tk, tmp_path / "cache")
    (tmp_path / "b.parquet.zst").write_bytes(pack((tmp_path / "b.parquet").read_bytes()))
    with pytest.raises(ValueError, match="parquet in .zst, which is not read: zstd -d .*b.parquet"):
        tokenize([tmp_path / "b.parquet.zst"], tk, tmp_path / "cache")


@pytest.mark.parametrize("name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_optional_package_is_named(tk, tmp_path, monkeypatch, name, package):
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{name} takes one more package: pip install {package}"):
        tokenize([tmp_path / name], tk, tmp_path / "cache")


@needs_stories
def test_real_books_are_stored_whole_with_bos_and_eos(tmp_path):
    if not TEXTS.is_dir():
        pytest.skip(f"real text: no {TEXTS}")
    tk = load_tokenizer(STORIES)
    corpus = tokenize([TEXTS], tk, tmp_path)
    for path, ids in zip(sorted(TEXTS.iterdir()), documents(corpus), strict=True):
        text = path.read_bytes().decode("utf-8-sig")
        assert ids == [1, *tk.encode_batch([text])[0], 2]
    assert corpus.tokens.dtype == np.uint16 and isinstance(corpus.tokens, np.memmap)


def dropping_tokenizer(folder):
    """Like sentencepiece's: a text may be cut at a blank between letters, which is dropped."""
    vocab = {t: i for i, t in enumerate(["<unk>", "\u2581", *map(chr, range(33, 127)), "\n", "\r"])}
    tk = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tk.normalizer = normalizers.Sequence(steps)
    folder.mkdir()
    tk.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["keep", "drop"])
def test_a_checksum_is_that_of_the_whole_text_wherever_it_is_cut(tmp_path, kind):
    make = dropping_tokenizer if kind == "drop" else byte_tokenizer
    tk, texts = make(tmp_path / "tk"), [f"{i} words to cut it at " * 3000 for i in range(3)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text(texts[0] * 20)  # a file of one document: read by the MiB
    corpus = tokenize([tmp_path / "a.jsonl", tmp_path / "b.txt"], tk, tmp_path / "cache")
    whole = [zlib.crc32(text.encode()) for text in (*texts, texts[0] * 20)]
    assert corpus.doc_checksums.tolist() == whole
    pieces = [piece for piece, *_ in machine.corpus._split([texts[0]], tk)]
    assert len(pieces) > 3 and ("".join(pieces) == texts[0]) == (kind == "keep")


def test_a_million_blanks_do_not_kill_the_tokenizer(tmp_path):
    tk = tiktoken_folder(tmp_path / "tk", bpe())
    text = "a" + " " * 1_000_000 + "b\n"
    (tmp_path / "a.txt").write_text(text)
    corpus = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    assert tk.decode(documents(corpus)[0][1:-1]) == text


# ---------------------------------------------------------------------------------------- the cache


def test_a_second_run_reads_no_text_and_tokenises_nothing(tk, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    os.utime(path, (1, 1))
    monkeypatch.setattr(machine.corpus, "_stat", lambda p: (os.stat(p).st_size, 1, 1))
    first = tokenize([path], tk, tmp_path / "cache")
    tk.encode = None
    monkeypatch.setattr(machine.corpus, "_hash", None)
    second = tokenize([path], tk, tmp_path / "cache")
    assert second.fingerprint == first.fingerprint and documents(second) == documents(first)


@pytest.mark.parametrize("clock", ["long ago", "within a tick"])
def test_a_changed_file_is_tokenised_anew_even_with_its_old_time_and_size(
    tk, tmp_path, monkeypatch, clock
):
    now = time.time_ns()
    if clock == "long ago":  # files are remembered; the second differs in its ctime
        monkeypatch.setattr(machine.corpus.time, "time_ns", lambda: now + 10**11)
    else:
        monkeypatch.setattr(machine.corpus, "_stat", lambda path: (3, now, now))
    for text in ("one", "two"):
        (tmp_path / "a.txt").write_text(text)
        os.utime(tmp_path / "a.txt", (1, 1))
        corpus = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
        assert tk.decode(documents(corpus)[0][:-1]) == text


def test_a_file_that_changes_while_it_is_read_is_an_error(tk, tmp_path):
    path, encode = tmp_path / "a.txt", tk.encode
    path.write_text("some text")

    def meanwhile(texts):
        path.write_text("other text")
        return encode(texts)

    tk.encode = meanwhile
    with pytest.raises(ValueError, match="a.txt changed while it was read: run again"):
        tokenize([path], tk, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens-*[!k]"))


@pytest.mark.parametrize("how", ["cut", "other bytes", "pipe"])
@pytest.mark.parametrize("harm", ["tokens.bin", "documents.bin", "meta.json"])
def test_a_damaged_cache_is_built_anew_and_never_read(tk, tmp_path, harm, how):
    lines = []
    (tmp_path / "a.txt").write_text("some text")
    corpus = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    expected = documents(corpus)
    whole = (corpus.folder / harm).read_bytes()
    other = whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]
    if how == "pipe":
        (corpus.folder / harm).unlink()
        os.mkfifo(corpus.folder / harm)
    else:
        (corpus.folder / harm).write_bytes(whole[:-2] if how == "cut" else other)  # not \n alone
    rebuilt = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache", log=lines.append)
    assert documents(rebuilt) == expected and any("is damaged" in line for line in lines)


def test_options_and_tokenizer_have_their_own_caches(tk, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with_end = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    tk.add_eos = False
    without = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    assert len(with_end.tokens) == len(without.tokens) + 1


SLOW_BUILD = """
import random, sys, time
import machine.corpus
from machine.corpus import tokenize
from machine.tokenizer import load_tokenizer
machine.corpus.PIECE, machine.corpus.BATCH, machine.corpus.SHARD = 64, 256, 4
tk = load_tokenizer(sys.argv[1])
def slow(texts, encode=tk.encode):
    time.sleep(float(sys.argv[4]) * 2 * random.random())  # batches overtake each other
    return encode(texts)
tk.encode = slow
tokenize([sys.argv[2]], tk, sys.argv[3], log=lambda line: print(line, flush=True))
"""


def test_a_killed_run_goes_on_after_its_last_shard_and_loses_nothing(tk, tmp_path):
    texts = [f"document {i} " * (i % 40 + 1) for i in range(200)]
    text = "".join(json.dumps({"text": t} if i % 9 else {}) + "\n" for i, t in enumerate(texts))
    good = [t for i, t in enumerate(texts) if i % 9]
    (tmp_path / "a.jsonl").write_text(text)
    code = SLOW_BUILD.replace("log=", "skip_bad_lines=True, log=")
    args = [code, tmp_path / "tk", tmp_path / "a.jsonl", tmp_path / "cache"]
    for _ in range(2):
        run, began = run_python(*args, 0.05), time.time_ns()
        while not [p for p in tmp_path.glob("c*/*/meta.json") if p.stat().st_mtime_ns > began]:
            time.sleep(0.01)
        time.sleep(0.2)  # into the next shard
        os.kill(run.pid, signal.SIGKILL)
        assert "tokens in" not in printed(run)
        for name in ("tokens.bin", "documents.bin"):  # half a shard more
            with open(next(tmp_path.glob(f"c*/*.part/{name}")), "ab") as stream:
                stream.write(b"torn")
        assert not list((tmp_path / "cache").glob("tokens-*[!kt]"))  # but .lock and .part
    out = printed(run_python(*args, 0))
    assert "going on after" in out and "23 bad records left out" in out
    folder = next(p for p in (tmp_path / "cache").glob("tokens-*") if p.is_dir())
    stored = np.fromfile(folder / "tokens.bin", np.uint16)
    assert stored.tolist() == [i for t in good for i in [*tk.encode_batch([t])[0], 256]]


def test_the_tokenizer_has_a_second_batch_in_hand(tk, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.corpus, "BATCH", 1)  # each document is one
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(str(i))
    both, encode = threading.Barrier(2, timeout=30), tk.encode
    tk.encode = lambda texts: both.wait() < 2 and encode(texts)
    corpus = tokenize([tmp_path / "?.txt"], tk, tmp_path / "cache")
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["0", "1", "2", "3"]


def test_two_runs_at_once_build_one_whole_cache(tk, tmp_path):
    (tmp_path / "a.txt").write_text(prose()[:9_000])
    args = [SLOW_BUILD, tmp_path / "tk", tmp_path / "a.txt", tmp_path / "cache", 0.05]
    runs = [run_python(*args) for _ in range(2)]
    outs = [printed(run) for run in runs]
    assert [run.exitcode for run in runs] == [0, 0], outs
    assert sum("M/s" in out for out in outs) == 1
    assert not list((tmp_path / "cache").glob("*.part"))


BOTH = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
FULL_DISK = """
import resource, signal, subprocess, sys
import machine.corpus
from machine.corpus import tokenize
from machine.tokenizer import load_tokenizer
if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=256k", "t", sys.argv[3]]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (262144, -1))  # the next best thing
machine.corpus.SHARD, machine.corpus.BATCH = 1, 1 << 15
tk = load_tokenizer(sys.argv[1])
try:
    tokenize([sys.argv[2]], tk, sys.argv[3])
except ValueError as error:
    print("ERROR", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
subprocess.call(["mount", "-o", "remount,size=8m", sys.argv[3]])
print("THEN", tokenize([sys.argv[2]], tk, sys.argv[3]).tokens.sum())
"""


def test_a_full_disk_is_one_line_and_costs_no_finished_shard(tk, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "a.txt").write_text(prose())
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    can = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    command = [*(alone if can else ()), sys.executable, "-c", FULL_DISK, tmp_path / "tk"]
    done = subprocess.run([*command, tmp_path / "a.txt", tmp_path / "cache"], cwd=HERE, **BOTH)
    out = done.stdout
    error = next(line for line in out.splitlines() if line.startswith("ERROR"))
    assert f"in {tmp_path}/cache" in error and "and run again" in error
    assert "No space left" in error and "make room" in error or "File too large" in error
    assert "going on after" in out
    assert int(out.split("THEN ")[1]) == sum(tk.encode_batch([prose()])[0]) + 256


# ------------------------------------------------------------------- bad files, many files, the hub

BAD = {
    "*.nope": (None, "no file at .*nope: need a text file, folder, glob"),
    "empty.txt": (b"", "only empty files at .*empty.txt: need a text file"),
    "binary.txt": (b"text\0text", "binary.txt is not UTF-8 text .a zero byte at 4.*binary"),
    "latin.txt": ("caf\u00e9 au lait".encode("latin1"), "latin.txt is not UTF-8 text .*iconv"),
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', r"line.jsonl:2: not a record with text"),
    "field.jsonl": (b'{"body": "a"}\n', r"field.jsonl:1: .*no 'text' in {'body': 'a'}.*PATH#body"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "half.jsonl:1: .*surrogates"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: .*'text' is 3, need text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot read .*cut.jsonl.gz"),
    "no.gz": (b"this is not gzip", "cannot read .*no.gz.*[Nn]ot a gzipped file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_it(tk, tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        tokenize([tmp_path / name], tk, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens-*/meta.json"))


def test_skip_bad_lines_leaves_out_and_counts(tk, tmp_path):
    lines = []
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\nnonsense\n\n{"text": "b"}\n{"text": 3}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.gz").write_bytes(gzip.compress("caf\u00e9".encode("latin1")))
    (tmp_path / "e.gz").write_bytes(gzip.compress(prose().encode())[:-9])
    corpus = tokenize([tmp_path / "?.*"], tk, tmp_path / "c", skip_bad_lines=True, log=lines.append)
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["a", "b"]
    assert "2 bad records left out" in lines[-1]
    for line, name in zip(lines, ("b.txt", "d.gz", "e.gz"), strict=False):
        assert line.startswith("left out: ") and name in line


def test_20000_small_files_are_each_read_once(tk, tmp_path):
    for i in range(20_000):
        folder = tmp_path / "many" / str(i % 20)
        if i < 20:
            folder.mkdir(parents=True)
        (folder / f"{i}.txt").write_text(str(i) if i % 100 else "")  # 200 are empty
    specs = [tmp_path / "many", tmp_path / "many/*/*.txt"]
    corpus = tokenize(specs, tk, tmp_path / "cache")
    texts = sorted(int(tk.decode(d[:-1])) for d in documents(corpus))
    assert texts == [i for i in range(20_000) if i % 100]
    assert set(corpus.doc_sources) == {0}


class DatasetHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as listing and fetching a dataset needs.

    A request for /moved puts v1.0's commit in the place of its main branch.
    """

    main = "c0ffee"
    files = {
        "README.md": b"# a data set",
        "en/train-0.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
        "en/validation-0.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
        "raw/books.txt": b"four",
    }

    def answer(self, body, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def do_GET(self):
        if self.path == "/moved":
            DatasetHub.main = "0ld"
            return self.answer(b"")
        old = any(name in self.path for name in ("0ld", "v1.0"))
        commit = "0ld" if old else "c0ffee" if "c0ffee" in self.path else self.main
        files = self.files if commit == "c0ffee" else {"en/train-0.jsonl": b'{"text": "before"}'}
        name = self.path.split(f"/resolve/{commit}/")[-1]
        if self.path.startswith("/api/datasets/me/texts"):
            siblings = [{"rfilename": n, "size": len(c)} for n, c in files.items()]
            info = {"id": "me/texts", "sha": commit, "siblings": siblings}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        elif name in files:
            self.answer(files[name], ETag=f'"{commit}{name}"', X_Repo_Commit=commit)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_hub_datasets_are_fetched_once_and_stay_as_they_were(tk, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if True:
        import sys
        from machine.corpus import tokenize
        from machine.tokenizer import load_tokenizer
        tk = load_tokenizer(sys.argv[1])
        some = "hf:me/texts", "hf:me/texts/en/validation*#text", "hf:me/texts/raw/*.txt"
        old = "hf:me/texts@v1.0", "hf:me/texts@0ld/en/"
        for spec in (*some, *old, *sys.argv[3:]):
            c = tokenize([spec], tk, sys.argv[2], log=lambda line: None)
            print(*[tk.decode(c.tokens[a:b - 1]) for a, b in zip(c.doc_starts, c.doc_starts[1:])])
        for spec in ("hf:me/texts/fr/*.gz", "hf:me/texts/en:validation"):
            try:
                tokenize([spec], tk, sys.argv[2])
            except ValueError as error:
                print(error)
    """
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = env["HF_HUB_DISABLE_XET"] = "1"
    for network in (True, False):
        args = [tmp_path / "tk", tmp_path / "cache"]
        args += [] if network else ["hf:me/texts@c0ffee/en/validation*#text"]  # as a resumed run
        out = printed(run_python(code, *args, **env))
        found = ["one two", "three", "four", "before", "before", *(["three"] * len(args[2:]))]
        assert out.split("\n")[: len(found)] == found, out
        said = "no records in fr/*.gz of me/texts", "no records in en:validation of me/texts"
        said = said if network else ["cannot list hf:me/texts/en:validation"]
        assert all(words in out for words in said) and (not network or "load_dataset" in out)
        server.shutdown()
        server.server_close()


def test_a_run_reads_on_at_the_commit_of_the_hub_at_which_it_began(
    ckpt, whole, tmp_path, monkeypatch
):
    texts = {"en/train-0.txt": ckpt[1].read_bytes(), "short.txt": ckpt[2].read_bytes()}
    monkeypatch.setattr(DatasetHub, "files", texts)
    monkeypatch.setattr(DatasetHub, "main", "c0ffee")
    server = ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if True:
        import os, shutil, sys, urllib.request
        from longred import main
        out, cache, *flags = sys.argv[1:]
        main(flags)
        shutil.rmtree(f"{out}/checkpoints/step-000004")
        shutil.rmtree(cache)
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/moved").close()
    """
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = env["HF_HUB_DISABLE_XET"] = "1"
    out, cache = tmp_path / "run", tmp_path / "tokens"
    long, short = "hf:me/texts/en/*.txt", "hf:me/texts/short.txt#text"
    c = tiny_run(ckpt, out, save_every=2, long_data=[long], s2l_data=[long], short_data=[short])
    default = dataclasses.asdict(type(c)())
    given = {k: v for k, v in dataclasses.asdict(c).items() if v != default[k]}
    flags = [(f"--{k}", *(v if isinstance(v, list) else [v])) for k, v in given.items()]
    flags = [str(x) for flag in flags for x in flag]
    code += "    main(['--resume', out])"
    said = printed(run_python(code, out, cache, *flags, **env))
    server.shutdown()
    server.server_close()
    assert DatasetHub.main == "0ld" and "resuming after step 2" in said, said[-2000:]
    record = json.loads((out / "longred.json").read_text())
    assert record["commits"] == {long: "c0ffee", short: "c0ffee"}
    assert record["config"]["long_data"] == [long]
    assert same_run(whole, out)


def test_the_default_data_names_files_that_need_no_optional_package():
    specs = machine.corpus.DEFAULT_LONG + machine.corpus.DEFAULT_SHORT
    assert all(
        machine.corpus._suffix(spec) in ("json", "jsonl") and not spec.endswith(".zst")
        for spec in specs
    )


def of_source(corpus, source):
    chosen = choose_documents(corpus, 10, source, 0, 1.0)
    return data.Stream(corpus, "long", 7, 4, 10, chosen)


def test_a_mixture_holds_the_shares_asked_for_and_repeats_no_sequence_of_an_epoch():
    corpus = made_corpus([4000, 3000, 9000], sources=[0, 0, 1])  # every token is different
    streams = [of_source(corpus, i) for i in (0, 1)]
    mixed = Mixture(streams, [1, 3])
    ids = torch.cat([mixed.batch(i) for i in range(250)])  # one block of 1,000 sequences
    first = ids[:, 0] < 7000
    assert first.sum() == 250 and len(set(ids[~first, 0].tolist())) == 750
    assert all(len({int(t) < 7000 for t in row}) == 1 for row in ids)  # no sequence mixes them
    longer = torch.cat([mixed.batch(i) for i in range(250, 500)])
    assert (longer[:, 0] < 7000).sum() == 250
    seen = torch.cat([ids[first], longer[longer[:, 0] < 7000]])[:, 0]
    assert len(set(seen.tolist())) == 500  # of 665 of its first epoch: blocks run on
    fresh = Mixture(
        [of_source(corpus, i) for i in (0, 1)],
        [1, 3],
    )
    assert torch.equal(fresh.batch(333), mixed.batch(333))  # whatever was read before
    assert Mixture(streams, [1, 1, 1][:2]).counts.tolist() == [500, 500]
    described = mixed.describe(250)
    assert "25.0% of long: 2 documents" in described and described.count("held out") == 1


def test_source_weights_are_trained_on_and_mistakes_refused(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(ckpt[1].parent)  # sources are named as a user names them
    long, short = (os.path.relpath(path) for path in ckpt[1:])
    c = tiny_run(ckpt, tmp_path / "run", steps=1, method="long_cpt", eval_tokens=0)
    c = dataclasses.replace(c, long_data=[str(long), str(short)])
    weights = [f"{long}=1", f"{short}=0.25"]
    train(dataclasses.replace(c, source_weights=weights))
    mistakes = (
        (weights[:1], f"no share for {ckpt[2]}"),
        ([*weights, "elsewhere=1"], "elsewhere is no source of this run"),
        ([f"{long}=0", weights[1]], "need SOURCE=SHARE, a number above 0"),
        ([f"{long}=x", weights[1]], "need SOURCE=SHARE, a number above 0"),
        (["1", weights[1]], "--source_weights 1: need SOURCE=SHARE, a number above 0"),
    )
    for shares, words in mistakes:
        bad = dataclasses.replace(c, source_weights=shares, out_dir=str(tmp_path / "bad"))
        with pytest.raises(ValueError, match=words):
            train(bad)


def test_a_run_with_shares_resumes_where_its_text_was_moved(ckpt, tmp_path):
    """Shares belong to the sources of a list in their order, whatever their names are now."""
    old = [str(shutil.copy(path, tmp_path / path.name)) for path in ckpt[1:]]
    c = tiny_run(ckpt, tmp_path / "whole", save_every=2, method="long_cpt", eval_tokens=0)
    weights = [f"{old[0]}=3", f"{old[1]}=1"]
    train(dataclasses.replace(c, long_data=old, source_weights=weights))
    out = killed_after_two(tmp_path / "whole", tmp_path / "run")
    new = [str(shutil.move(path, f"{path}.moved")) for path in old]
    main(["--resume", str(out), "--long_data", *new])
    assert same_run(tmp_path / "whole", out)
    record = json.loads((out / "longred.json").read_text())["config"]
    assert record["source_weights"] == [f"{new[0]}=3", f"{new[1]}=1"]
    swapped = killed_after_two(tmp_path / "whole", tmp_path / "swapped")
    with pytest.raises(SystemExit, match="data long was"):
        main(["--resume", str(swapped), "--long_data", *new[::-1]])


# -------------------------------------------------------------- records, other kinds, damaged files


def records(n=40):
    return [{"id": i, "text": f"r\u00e9cord {i} with [brackets], commas"} for i in range(n)]


NAMES = "a.jsonl a.json a.ndjson UPPER.JSON a.jsonlines a.jl part-00000 a.jsonl.1 a.json.txt a"


@pytest.mark.parametrize("name", NAMES.split())
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  \n"], ids=["", "bom", "blank lines"])
def test_records_are_known_by_content_whatever_the_file_is_called(tk, tmp_path, name, before):
    content = (before + "\n".join(map(json.dumps, records()))).encode()
    for packed in ("", ".gz"):
        path = tmp_path / (name + packed)
        path.write_bytes(gzip.compress(content) if packed else content)
        corpus = tokenize([path], tk, tmp_path / "cache")
        assert [tk.decode(d[:-1]) for d in documents(corpus)] == [r["text"] for r in records()]


@pytest.mark.parametrize(
    "content",
    [
        "{curly} braces open this text\nand it goes on",
        '{"config": "of one line", "is": "a text"}',
        '{\n  "pretty": "printed"\n}\n',
        "[\\n 1, 2]",
        "{}",
        '{"a": 1}\nand prose',
    ],
)
def test_a_text_with_braces_is_a_text(tk, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    (ids,) = documents(tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache"))
    assert tk.decode(ids[:-1]) == content


def test_one_record_of_another_name_is_a_record(tk, tmp_path):
    for column, name in (("text", "part-0"), ("body", "part-1#body")):
        (tmp_path / name.partition("#")[0]).write_text(json.dumps({"id": 1, column: "one"}))
        (ids,) = documents(tokenize([f"{tmp_path}/{name}"], tk, tmp_path / "cache"))
        assert tk.decode(ids[:-1]) == "one"


def pandas_here(folder):
    """The environment in which a command finds pandas: the one installed, else a stand-in."""
    try:
        import pandas  # noqa: F401
    except ImportError:
        (folder / "pandas.py").write_text(STAND_IN)
        return os.environ | {"PYTHONPATH": str(folder)}
    return os.environ


STAND_IN = """
import csv, gzip, io, json, subprocess

class Table(list):
    def to_json(self, path, orient, lines):
        assert orient == "records" and lines
        with open(path, "w") as f:
            f.writelines(json.dumps(row) + chr(10) for row in self)

def read_csv(path, sep=",", dtype=None, keep_default_na=True):
    assert dtype is str and not keep_default_na
    if path.endswith(".zst"):
        text = subprocess.run(["zstd", "-dc", path], capture_output=True).stdout.decode()
        opened = io.StringIO(text, newline="")
    else:
        opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path, newline="")
    return Table(csv.DictReader(opened, delimiter=sep))
"""
ODD = [{"id": "007", "text": 'NA, "quoted"'}, {"id": "1", "text": "caf\u00e9\n2021-01-01"}]


def table(separator):
    rows = [separator.join(f'"{v}"' for v in (r["id"], r["text"].replace('"', '""'))) for r in ODD]
    return "\n".join([separator.join(("id", "text")), *rows])


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("it's a table.csv", table(",")),
        ("TABLE.TSV", table("\t")),
        ("array.json", json.dumps(ODD)),
        ("array.txt", json.dumps(ODD, indent=2)),
        ("long.json", "".join(json.dumps(r, indent=2) for r in ODD)),
    ],
)
def test_what_holds_records_of_another_form_is_refused_with_the_command_that_mends_it(
    tk, tmp_path, name, content, packed
):
    path = tmp_path / (name + packed)
    raw, zstandard = content.encode(), pytest.importorskip("zstandard")
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path.write_bytes(pack(raw))
    with pytest.raises(ValueError, match="make .jsonl of it") as refused:
        tokenize([path], tk, tmp_path / "cache")
    said = str(refused.value)
    assert "\n" not in said and str(path) in said
    command = said.partition("name that: ")[2]
    if "jq" in command and not (shutil.which("jq") and shutil.which("zstd")):
        return
    subprocess.run(["bash", "-c", command], check=True, env=pandas_here(tmp_path), cwd=tmp_path)
    (made,) = tmp_path.glob("*.jsonl")
    corpus = tokenize([made], tk, tmp_path / "cache")
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == [r["text"] for r in ODD]


OTHERS = {  # more in test_remedies.py
    "pointer.txt": (machine.corpus.LFS + b"\noid sha256:0\nsize 9\n", "Git LFS pointer.*lfs pull"),
    "b.arrow": (b"ARROW1\0\0", "it is binary"),
    "utf16be.txt": ("text without a mark".encode("utf-16-be"), "it is binary"),
    "no.json": (b"nothing", "no.json is JSON, but not a record a line; make .* jq"),
    "object.json": (b'{"features": {}}', "object.json:1: .*no 'text'"),
    "no.parquet": (b"nothing", "no parquet file"),
    "a.jsonl.gz": (gzip.compress(gzip.compress(b"text")), "packed twice"),
    "inner.txt.gz": (gzip.compress(b"BZh91AY"), "7z x"),
    "a.jsonl.lz4": (bytes.fromhex("04224d18604082") + b"\x12\0\0\0abc", "it is binary"),
    "a.db": (b"SQLite format 3\0" + b"\1\2\3" * 50, "it is binary"),
    "a.npy": (b"\x93NUMPY\1\0", "it is binary"),
    "train.bin": (np.arange(5000, dtype=np.uint16).tobytes(), "it is binary"),
    "model.pkl": (b"\x80\x04\x95\x0b", "it is binary"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "soffice"),
    "a.docx": (b"PK\x03\x04", "pandoc"),
    "a.rar": (b"Rar!\x1a\x07", "7z x"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_text_gets_the_remedy_that_helps(tk, tmp_path, name):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        tokenize([tmp_path / name], tk, tmp_path / "cache")
    said = str(caught.value)
    assert "\n" not in said and ("iconv" not in said or name == "utf16be.txt")


def test_a_pipe_is_refused_and_not_waited_for(tk, tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is a pipe"):
        tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")


def test_zstd_is_read_whole_or_refused(tk, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    raw = "".join(json.dumps({"text": f"{i} " * 99}) + "\n" for i in range(400)).encode()
    long = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=1)
    c = zstandard.ZstdCompressor(compression_params=long).compressobj()
    packed = c.compress(raw) + c.flush()
    (tmp_path / "long.jsonl.zst").write_bytes(packed + zstandard.compress(raw))
    assert tokenize([tmp_path / "long.jsonl.zst"], tk, tmp_path / "cache").n_docs == 800
    for n in (1, len(packed) // 2, len(packed) - 1, len(packed) + 9):
        (tmp_path / "cut.txt.zst").write_bytes((packed + packed)[:n])
        with pytest.raises(ValueError, match="cut.txt.zst.*inside a zstd frame|cut.txt.zst"):
            tokenize([tmp_path / "cut.txt.zst"], tk, tmp_path / "cache")


@pytest.mark.parametrize("card", ["README.md", "dataset_infos.json", None])
def test_of_a_dataset_folder_the_train_split_is_read_and_listed(tk, tmp_path, card):
    folder, said = tmp_path / "set", []
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test", "validation"):
        (folder / "data" / f"{split}-0.jsonl").write_text(json.dumps({"text": split}))
    if card:
        (folder / card).write_text("{}")
    corpus = tokenize([folder], tk, tmp_path / "cache", log=said.append)
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["train"]
    assert any("reading its train split" in x and "test-0.jsonl" in x for x in said)


def test_books_beside_a_readme_and_records_are_read(tk, tmp_path):
    files = {"README.md": "mine", "LICENSE": "MIT", "a.jsonl": '{"text": "a"}', "b.txt": "b"}
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_text(content)
    said = []
    corpus = tokenize([tmp_path / "set"], tk, tmp_path / "cache", log=said.append)
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["a", "b"]
    assert any("reading its data, a.jsonl, b.txt; left out: LICENSE, README" in x for x in said)


SETS = {  # a dataset's files, and which of them are its train split
    "TinyStories-train.txt TinyStories-valid.txt": 0,
    "wiki.train.raw wiki.valid.raw wiki.test.raw": 0,
    "c4-train.00000-of-01024.jsonl c4-validation.00000-of-8.jsonl": 0,
    "Train/a.txt TEST/a.txt": 0,
    "training/part-0 testing/part-0": 0,
    "train1.jsonl val1.jsonl dev.jsonl": 0,
    "my train.txt my heldout.txt": 0,
    "train_sft-0.jsonl test_sft-0.jsonl": 0,
    "train.en eval.en": 0,
    "train test": 0,
}


@pytest.mark.parametrize("names", SETS)
def test_the_train_split_is_known_by_any_usual_name(tk, tmp_path, names):
    folder, said = tmp_path / "set", []
    paths = [folder / name for name in names.replace("my ", "my\0").split()]
    paths = [path.with_name(path.name.replace("\0", " ")) for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": str(path)}))
    corpus = tokenize([folder], tk, tmp_path / "cache", log=said.append)
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == [str(paths[SETS[names]])]
    assert any("reading its train split" in x and paths[1].name in x for x in said)


@pytest.mark.parametrize("names", ["train.py test.py", "a.txt b.txt", "testament.txt trains.txt"])
def test_what_is_no_split_is_read_whole(tk, tmp_path, names):
    for name in names.split():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text(name)
    corpus = tokenize([tmp_path / "set"], tk, tmp_path / "cache")
    assert sorted(tk.decode(d[:-1]) for d in documents(corpus)) == sorted(names.split())


def test_a_walk_ends_whatever_links_lie_in_the_folder(tk, tmp_path):
    folder = tmp_path / "se[t]"  # glob characters in its name
    for place in (folder / "a", folder / "b" / "c", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "one.txt").write_text(place.name)
    for i in range(8):  # 8 loops: 8^40 ways through them
        (folder / "a" / f"up{i}").symlink_to(folder)
        (folder / "b" / f"self{i}").symlink_to(folder / "b")
    (folder / "there").symlink_to(tmp_path / "elsewhere")
    (folder / "again.txt").symlink_to(folder / "a" / "one.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "b" / "hard.txt").hardlink_to(folder / "b" / "c" / "one.txt")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    corpus = tokenize([folder], tk, tmp_path / "cache")
    assert sorted(tk.decode(d[:-1]) for d in documents(corpus)) == ["a", "c", "elsewhere"]


def test_a_glob_of_any_depth_is_refused_with_what_lists_the_files(tk, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place in ("a/1.txt", "a/b/2.txt", "a/b/3.md"):
        (tmp_path / place).write_text(place)
    with pytest.raises(ValueError, match=r"find FOLDER") as refused:
        tokenize([f"{tmp_path}/a/**/*.txt"], tk, tmp_path / "cache")
    command = str(refused.value).split("$(")[1][:-1].replace("FOLDER", str(tmp_path / "a"))
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.split()
    assert tokenize(found, tk, tmp_path / "cache").n_docs == 2


def test_a_glob_names_what_the_shell_would(tk, tmp_path):
    for name in ("a.txt", "sub/b.txt", "c#/c.txt", "shot #1.txt", ".hidden/d.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(name)
    for glob, names in {
        "*": ["a.txt", "c#/c.txt", "shot #1.txt", "sub/b.txt"],
        "c#/*.txt": ["c#/c.txt"],
        "shot #*": ["shot #1.txt"],
        "s*": ["shot #1.txt", "sub/b.txt"],
    }.items():
        corpus = tokenize([f"{tmp_path}/set/{glob}"], tk, tmp_path / "cache")
        assert [tk.decode(d[:-1]) for d in documents(corpus)] == names
    (tmp_path / "set" / "c").mkdir()
    with pytest.raises(ValueError, match=r"no file at .*c#/\*.md"):
        tokenize([f"{tmp_path}/set/c#/*.md"], tk, tmp_path / "cache")


def test_one_column_of_a_file_is_read(tk, tmp_path):
    path = tmp_path / "set" / "a.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"text": "a text", "title": "a title"}))
    corpus = tokenize(
        [f"{path}#title", path.parent, path.with_name("*.jsonl")], tk, tmp_path / "cache"
    )
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == ["a title"]
    for specs in ([path, f"{path}#title"], [path.parent, f"{path}#title"]):
        with pytest.raises(ValueError, match="a.jsonl#title: of this file #text is read already"):
            tokenize(specs, tk, tmp_path / "cache")
    with pytest.raises(ValueError, match="hf:a/b/a.jsonl: of this file #x is read already"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.HfApi.dataset_info", listed)
            machine.corpus.find_files(["hf:a/b/a.jsonl#x", "hf:a/b/a.jsonl"], {})


SPECS = st.text(st.sampled_from(list("ab/*?[]:#@.~{}()|\\\0\n %\u00e9")), max_size=12)


@settings(PROPERTY, max_examples=200)
@given(st.sampled_from(["hf:", "hf:a/b", "hf:a/b/", "hf:a/b:", "hf:a/b@", ""]), SPECS)
def test_any_string_is_a_source_or_one_line(tmp_path_factory, before, spec):
    os.chdir(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.dataset_info", listed)
        try:
            files = machine.corpus.find_files([before + spec], {}, lambda line: None)
        except ValueError as e:
            assert "\n" not in str(e) or "\n" in spec
        else:
            assert files


def listed(api, repo, revision=None, files_metadata=False):
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    names = ["a.jsonl", "b/test.json", "c.txt"]
    siblings = [types.SimpleNamespace(rfilename=name, size=1) for name in names]
    return types.SimpleNamespace(siblings=siblings, sha="0")


def test_text_that_spells_special_tokens_is_said_with_what_parts_it(tmp_path):
    tk, said = byte_tokenizer(tmp_path / "tk"), []
    stories = [f'Story {i}, of "a cat".' for i in range(8)]
    (tmp_path / "stories.txt").write_text("\n<|end|>\n".join(stories))
    for _ in range(2):  # when it is tokenised, and from the cache
        tokenize([tmp_path / "stories.txt"], tk, tmp_path / "cache", log=said.append)
        assert "WARNING text: its text spells special tokens" in said[-1]
        assert "'<|end|>' 7 times" in said[-1] and "\n" not in said[-1]
    command = said[-1][said[-1].index("python -c") :]
    command = command.replace("FILE.jsonl", "made.jsonl").replace("FILE", "stories.txt")
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    corpus = tokenize([tmp_path / "made.jsonl"], tk, tmp_path / "cache", log=said.append)
    assert [tk.decode(d[:-1]) for d in documents(corpus)] == stories
    assert all(d[-1] == tk.eos_id for d in documents(corpus)) and "WARNING" not in said[-1]


@pytest.mark.parametrize(
    "record, spec, said",
    [
        ({"content": "a", "id": 1}, "a.jsonl", "no 'text' .*: name it as PATH#content"),
        ({"text": None, "url": "a"}, "a.jsonl", r"'text' is null, need text\); .*--skip_bad_lines"),
        ({"meta": {"text": "a\nb"}}, "a.jsonl#meta.text", "no 'meta.text' .*nested.*jq -c '.*'"),
        ({"text": ["a", "b"]}, "a.jsonl", r"'text' is \[.*\], need text: jq -c '.*'"),
        ({"text": {"en": "a"}}, "a.jsonl", "'text' is {.*, need text"),
        ([1, 2], "a.jsonl", r"\[1, 2\] is a list, need an object"),
    ],
)
def test_a_record_without_a_text_says_what_is_there_and_what_helps(
    tk, tmp_path, record, spec, said
):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=said) as refused:
        tokenize([f"{tmp_path}/{spec}"], tk, tmp_path / "cache")
    said = str(refused.value)
    if "jq -c" in said and shutil.which("jq"):
        command = said[said.index("jq -c") : said.index("OUT.jsonl") + 9]
        command = command.replace("IN.jsonl", "a.jsonl").replace("OUT.jsonl", "made.jsonl")
        subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
        (ids,) = documents(tokenize([tmp_path / "made.jsonl"], tk, tmp_path / "cache"))
        assert tk.decode(ids[:-1]) == "a\nb"


def test_a_parquet_column_of_bytes_is_text_where_it_is_utf_8(tk, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    column = pyarrow.array(["caf\u00e9".encode()], pyarrow.binary())
    pq.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (ids,) = documents(tokenize([tmp_path / "a.parquet"], tk, tmp_path / "cache"))
    assert tk.decode(ids[:-1]) == "caf\u00e9"


MEMOS = ["", '{"a"', "null", "[]", '{"PATH": 5}', '{"PATH": [1, 2]}', '{"PATH": []}', "[" * 10**5]


@pytest.mark.parametrize("memo", MEMOS)
def test_a_damaged_memo_is_rebuilt(tk, tmp_path, memo):
    (tmp_path / "a.txt").write_text("some text")
    os.utime(tmp_path / "a.txt", (1, 1))
    first = tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    memo = memo.replace("PATH", str(tmp_path / "a.txt"))
    (tmp_path / "cache" / "seen_files.json").write_text(memo)
    assert tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache").fingerprint == (first.fingerprint)


def test_a_look_at_ones_own_text(tk, tmp_path, capsys):
    from measure import text

    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\r\\ny"}\nnonsense\n')
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    (tmp_path / "tk" / "config.json").write_text("{}")
    where = ["--ckpt", str(tmp_path / "tk"), "--cache_dir", str(tmp_path / "cache")]
    text.main([*paths, *where, "--skip_bad_lines"])
    said = capsys.readouterr().out
    assert "1 documents, 8 tokens, 61.5%" in said and "1 documents, 5 tokens, 38.5%" in said
    assert "one\\ntwo[EOS 256]" in said and "x\\r\\ny[EOS 256]" in said
    assert "1 bad records left out; 1 documents keep their carriage returns" in said
    assert "same 11 tokens of 2 documents' beginnings; decoded, 2 of them" in said
    with pytest.raises(SystemExit, match="text: .*b.jsonl:2: not a record"):
        text.main([*paths, *where])


def test_min_doc_len_leaves_out_shorter_documents():
    corpus = made_corpus([100, 20, 100])
    stream = data.Stream(corpus, "long", 0, 1, 10, choose_documents(corpus, 10, None, 100, 1.0))
    seen = {int(i) for k in range(stream.n_sequences) for i in stream.batch(k).ravel()}
    assert not seen & set(range(100, 120)) and max(seen) > 120
    with pytest.raises(ValueError, match="--min_doc_len 101: no document .* the longest has 100"):
        choose_documents(corpus, 10, None, 101, 1.0)


def test_length_upsample_favours_long_documents_and_keeps_each_source_its_share():
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(4000) < 0.1, 1000, 100)
    sources = np.arange(4000) % 2
    corpus = made_corpus(lengths, rng.integers(0, 2**32, 4000), sources)
    _, train = corpus.segments()
    chosen = choose_documents(corpus, 1000, None, 0, 3.0)
    for source in (0, 1):
        before, after = train * (sources == source), train[chosen] * (sources[chosen] == source)
        assert after.sum() == pytest.approx(before.sum(), rel=0.05)
        long = [w[w == 1000].sum() / w.sum() for w in (before, after)]
        assert long[1] / (1 - long[1]) == pytest.approx(3 * long[0] / (1 - long[0]), rel=0.15)
    assert np.diff(chosen).min() < 0 and not (np.diff(chosen) == 0).any()  # copies far apart
    stream = data.Stream(corpus, "long", 0, 1, 1000, chosen)
    assert abs(stream.n_sequences * 1000 / train.sum() - 1) < 0.05
