"""What a refusal of machine/corpus.py tells the reader to do is done, and mends what was refused.

Commands of programs that are not installed here are skipped, by name. The commands that name the
file itself (pandas, jq, parts by special tokens) are run where they are refused: test_corpus.py,
and that of a base model's names in test_checkpoints.py.
"""

import bz2
import gzip
import io
import lzma
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import pytest

from machine.corpus import MAGIC, tokenize
from machine.files import LFS
from tests.conftest import byte_tokenizer, documents

TEXT = "caf\u00e9 text, \u201cquoted\u201d"


def archive(path, kind):
    inner = TEXT.encode()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("inner.txt", inner)
    else:
        with tarfile.open(path, kind) as t:
            entry = tarfile.TarInfo("inner.txt")
            entry.size = len(inner)
            t.addfile(entry, io.BytesIO(inner))


def database(path):
    with sqlite3.connect(path) as made:
        made.execute("create table TABLES (body)")
        made.execute("insert into TABLES values (?)", [TEXT])


def arrow(path, kind):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [TEXT]})
    with getattr(pa.ipc, f"new_{kind}")(path, table.schema) as writer:
        writer.write_table(table)


def lz4(path):
    if not shutil.which("lz4"):
        pytest.skip("no lz4 here")
    subprocess.run(["lz4", "-q", "-", path], input=TEXT.encode(), check=True)


# name -> (what makes the file, what of the message is the command).
TABLE = {
    "a.txt": (lambda p: p.write_bytes(TEXT.encode("utf-16")), r"iconv -f utf-16 -t utf-8$"),
    "be.txt": (lambda p: p.write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be")), r"iconv .*$"),
    "le.txt": (lambda p: p.write_bytes(TEXT.encode("utf-16-le")), r"iconv -f utf-16le.*$"),
    "latin.txt": (lambda p: p.write_bytes(TEXT.encode("cp1252")), r"iconv [^)]*"),
    "a.txt.xz": (lambda p: p.write_bytes(lzma.compress(TEXT.encode())), r"xz -d$"),
    "a.txt.bz2": (lambda p: p.write_bytes(bz2.compress(TEXT.encode())), r"bunzip2$"),
    "a.txt.lz4": (lz4, r"lz4 -dm$"),
    "a.zip": (lambda p: archive(p, "zip"), r"unzip$"),
    "a.tar": (lambda p: archive(p, "w"), r"tar -xf$"),
    "a.tar.gz": (lambda p: archive(p, "w:gz"), r"tar -xf$"),
    "a.db": (database, r"sqlite3 FILE .*"),
    "b.arrow": (lambda p: arrow(p, "file"), r"python -c '.*'$"),
    "c.arrow": (lambda p: arrow(p, "stream"), r"python -c '.*'$"),
}
# The rest of MAGIC: no command is named, or its input cannot be made here.
NOT_RUN = {LFS, b"7z\xbc\xaf\x27\x1c", b"Rar!", b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0"}
NOT_RUN |= {b"\x93NUMPY", b"\x89HDF"}


@pytest.mark.parametrize("name", TABLE)
def test_the_command_that_a_refusal_names_mends_the_file(tmp_path, name):
    make, pattern = TABLE[name]
    tk, folder = byte_tokenizer(tmp_path / "tk"), tmp_path / "text"
    folder.mkdir()
    path = folder / name
    make(path)
    with pytest.raises(ValueError) as refused:
        tokenize([path], tk, tmp_path / "cache")
    assert "\n" not in str(refused.value)
    command = re.search(pattern, str(refused.value))[0]
    program = command.split()[0]
    if not shutil.which(program) and program != "python":
        pytest.skip(f"no {program} here")
    command = filled(name, command)
    subprocess.run(["bash", "-c", command], check=True, cwd=folder, capture_output=True)
    path.unlink(missing_ok=True)
    (ids,) = documents(tokenize([folder], tk, tmp_path / "cache"))
    assert tk.decode(ids[:-1]) == TEXT


def filled(name, command):
    """A refusal's command with the reader's part: the file, and where its text goes."""
    command = command.replace("COLUMN", "body").replace("TABLE", "TABLES")
    if "FILE" not in command:
        command += f" FILE{' > out.txt' if 'iconv' in command else ''}"
    return command.replace("FILE", name).replace("python -c", f"{sys.executable} -c")


def test_gzip_under_another_name_is_read_under_the_name_that_is_asked_for(tmp_path):
    tk = byte_tokenizer(tmp_path / "tk")
    (tmp_path / "a.txt").write_bytes(gzip.compress(TEXT.encode()))
    with pytest.raises(ValueError, match="let its name end in .gz"):
        tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache")
    (tmp_path / "a.txt").rename(tmp_path / "a.txt.gz")
    (ids,) = documents(tokenize([tmp_path / "a.txt.gz"], tk, tmp_path / "cache"))
    assert tk.decode(ids[:-1]) == TEXT


def test_every_kind_of_file_that_is_known_and_not_read_is_in_the_table(tmp_path):
    begin = set()
    for name, (make, _) in TABLE.items():
        make(tmp_path / name)
        head = (tmp_path / name).read_bytes()
        begin |= {magic for magic in MAGIC if head.startswith(magic)}
    assert begin | NOT_RUN == MAGIC.keys() and not begin & NOT_RUN
