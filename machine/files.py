"""Files and folders that are written whole or not at all, locks, checksums, and checked caches.

A reader finds the old content or the new one, also after a kill or a power failure: everything is
written under a name that was free, flushed to disk, and renamed last (`whole_file`, `publish`).
Other programs' files stay.
"""

import errno
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # On Windows two commands in one folder are not noticed.
    fcntl = None

# -------------------------------------------------------------------------------------- reading

# The most bytes of JSON that are read. The largest real header is below 1 MB, and a parsed one
# takes many times its text, so that a forged one could take all memory.
MOST_JSON = 2**22
LFS = b"version https://git-lfs.github.com/spec/v1"  # the first line of a Git LFS pointer
LFS_REMEDY = "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or download it"


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a clone without git-lfs left a few lines in the place of this file."""
    with open(path, "rb") as f:
        return f.read(len(LFS)) == LFS


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Raises ValueError, one line, if it holds anything else."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, need at most {MOST_JSON:,}")
        if not path.is_file():
            raise ValueError("it is no plain file")
        if is_lfs_pointer(path):
            raise ValueError(LFS_REMEDY)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}; fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, need an object")
    return content


# -------------------------------------------------------------------------------------- writing


def remedy(error: Exception) -> str:
    """Return what a user can do about a write that failed."""
    code = getattr(error, "errno", None)
    if code == errno.EFBIG:
        return "raise the limit on the size of a file (ulimit -f, or that of the disk's format)"
    return "make room" if code in (errno.ENOSPC, errno.EDQUOT) else "mend that"


def os_error(error: Exception) -> OSError:
    """Return the OSError, a full disk say, that safetensors has put into the words of its own."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


@contextmanager
def writing(path: Path):
    """Turn an OSError inside into a ValueError that names the file, the cause and the remedy."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise ValueError(f"cannot write {path}: {reason}; {remedy(e)} and continue") from e


@contextmanager
def downloading():
    """Turn a full disk, while the hub sends something, into a ValueError that says which disk."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from huggingface_hub.constants import HF_HUB_CACHE

        raise ValueError(
            f"{HF_HUB_CACHE}, where the hub's files go, is full; make room, or set HF_HOME to a "
            "folder on another disk, and run again: whole files are not fetched twice"
        ) from None


def free_name(path: Path) -> Path:
    """Return path, or one like it that is free: somebody's file may have that name."""
    names = (path.with_name(f"{path.name}{i or ''}") for i in range(1000))
    return next(p for p in names if not os.path.lexists(p))


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, last through a power failure."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_file(path: str | Path):
    """Open a text file to write, which takes its name when it is complete and on disk."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = free_name(path.with_name(f"{path.name}.{os.getpid()}.partial"))
        # What UTF-8 cannot hold, a lone surrogate, becomes JSON's own escape for it.
        with open(partial, "x", encoding="utf-8", errors="backslashreplace") as f:
            try:
                yield f
                f.flush()
                os.fsync(f.fileno())
            except BaseException:
                partial.unlink()
                raise
        partial.replace(path)
        sync(path.parent)


def finite(content):
    """Return JSON's content with null for every number that is not finite: JSON has none."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    """Write one object whole."""
    with whole_file(path) as f:
        json.dump(finite(content), f, indent=indent, allow_nan=False, ensure_ascii=False)
        f.write("\n")


def unfinished(folder: Path) -> list[Path]:
    """Return the folders that killed processes left next to `folder` while they wrote it."""
    ours = re.compile(re.escape(folder.name) + r"\.\d+\.(partial|previous)\d*")
    found = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return [p for p in found if ours.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def publish(partial: Path, folder: Path, drop: Callable[[Path], None]) -> None:
    """Rename a complete folder to its final name: the moment from which it counts.

    An older folder of that name is renamed first. drop: removes from the older one what we wrote,
    and the folder if nothing else is in it. What it leaves is a user's: it moves to the new folder.
    """
    for path in partial.iterdir():
        sync(path)
    if os.path.lexists(folder):
        folder.rename(free_name(folder.with_name(f"{folder.name}.{os.getpid()}.previous")))
    partial.rename(folder)
    sync(folder.parent)
    for left in unfinished(folder):
        drop(left)
        for path in left.iterdir() if left.exists() else ():
            path.rename(free_name(folder / path.name))
        if left.exists():
            left.rmdir()


def refuse_foreign(path: Path, keys: set[str], maker: str, others: Iterable[Path] = ()) -> None:
    """Raise ValueError where `path` or a file written with it exists, and no `maker` wrote it.

    path: of JSON that holds these keys if it is the maker's. others: what is written with it.
    """
    there = [p for p in (path, *others) if os.path.lexists(p)]
    if not there:
        return
    try:
        ours = keys <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(
            f"{there[0]} is in the way, and no {maker} wrote it: pass another --out_dir"
        )


# ---------------------------------------------------------------------------- checksums, caches


def file_checksum(path: Path, most: int = 2**63) -> int:
    """Return the crc32 of a file's first `most` bytes. OSError, not a wait, for a pipe."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no regular file")
    found = 0
    with open(path, "rb") as f:
        while block := f.read(min(2**22, most)):
            found, most = zlib.crc32(block, found), most - len(block)
    return found


def digest(content, length: int = 16) -> str:
    """Return the first hexadecimal digits of the sha256 of bytes, or of JSON's content."""
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:length]


def signed(content: dict) -> dict:
    """Return an object with its own checksum in it."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def read_signed(path: Path) -> dict | None:
    """Return the object that was written with its checksum; None if it is missing or damaged."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        content = json.loads(path.read_bytes())
        return content if content == signed(content) else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def remember(folder: Path, key: dict, make: Callable[[], dict]) -> dict:
    """Return make(), or what it returned when it was last called under this key.

    key: JSON's content with a "task", which names the file. A damaged file is made again. A result
    that is not finite cannot be written as JSON and is not kept.
    """
    path = folder / f"{key['task']}-{digest(key, 24)}.json"
    if (kept := read_signed(path)) and "value" in kept:
        return kept["value"]
    value = make()
    if finite(value) == value:
        write_json(path, signed({"key": key, "value": value}), indent=None)
    return value


# ---------------------------------------------------------------------------------------- locks


def lock(path: Path, wait: bool = False):
    """Return the locked file at `path`, held until it is closed or its process ends.

    wait: for another process that holds it; otherwise that is a BlockingIOError. On a disk without
    locks nothing is held, with a warning. Raises OSError where the file cannot be written.
    """
    while True:
        handle = open(path, "a")
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.close()
            raise
        except OSError as e:
            print(f"warning: {path} cannot be locked ({e.strerror}): let nothing else work there")
            return handle
        if is_on_disk(handle, path):
            return handle
        handle.close()  # it was removed while we waited for it


def is_on_disk(handle, path: Path) -> bool:
    """Return whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def lock_folder(folder: Path, flag: str) -> ExitStack:
    """Return the lock of a folder in which one command at a time may write.

    It is on the file `lock` there, and on the folder itself, so that no second command gets in when
    the file is removed. flag: that names the folder. Raises ValueError where another holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(lock(folder / "lock"))
            if fcntl:
                handle = os.open(folder, os.O_RDONLY)
                held.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:  # most network disks lock no folders
                    if isinstance(e, BlockingIOError):
                        raise
            return held.pop_all()
    except BlockingIOError:
        raise ValueError(
            f"another process is at work in {folder}; wait for it, or pass another {flag}"
        ) from None
    except OSError as e:
        raise ValueError(f"cannot write to {flag} {folder}: {e.strerror}; pass another") from None
