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
import subprocess
import sys
import tarfile
import zipfile

import pytest

from machine.corpus import OTHERS, tokenize
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


def arrow(path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [TEXT]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def twice(content):
    return gzip.compress(gzip.compress(content))


# name -> (what makes the file, what of the message is the command).
TABLE = {
    "a.txt": (lambda p: p.write_bytes(TEXT.encode("utf-16")), r"iconv -f utf-16 -t utf-8$"),
    "be.txt": (lambda p: p.write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be")), r"iconv .*$"),
    "latin.txt": (lambda p: p.write_bytes(TEXT.encode("cp1252")), r"iconv [^)]*"),
    "a.txt.xz": (lambda p: p.write_bytes(lzma.compress(TEXT.encode())), r"7z x"),
    "a.txt.bz2": (lambda p: p.write_bytes(bz2.compress(TEXT.encode())), r"7z x"),
    "a.zip": (lambda p: archive(p, "zip"), r"7z x"),
    "a.tar": (lambda p: archive(p, "w"), r"tar -xf$"),
    "a.tar.gz": (lambda p: archive(p, "w:gz"), r"tar -xf$"),
    "b.txt.gz": (lambda p: p.write_bytes(twice(TEXT.encode())), r"gzip -d"),
    "c.arrow": (arrow, r"python -c '.*'$"),
}
# The row whose input cannot be made here; and that of Git LFS, whose command needs a repository.
# Each was run by hand, and mended its file: 7z 26.02, pdftotext 22.12, pandoc 2.17, soffice 7.4.7,
# git-lfs 3.3 (2026-12-01).
NOT_RUN = {row for row in OTHERS if LFS in row or b"%PDF" in row}


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
    if "FILE" not in command:
        command += f" FILE{' > out.txt' if 'iconv' in command else ''}"
    return command.replace("FILE", name).replace("python -c", f"{sys.executable} -c")


def test_every_row_of_the_table_is_tried(tmp_path):
    begin = set()
    for name, (make, _) in TABLE.items():
        make(tmp_path / name)
        head = (tmp_path / name).read_bytes()
        head = gzip.decompress(head) if name.endswith(".gz") else head
        begin |= {row for row in OTHERS if head.startswith(row)}
    assert begin | NOT_RUN == OTHERS.keys() and not begin & NOT_RUN
