"""The state of a run on disk. A kill at any moment loses only the steps since the newest state.

OUT_DIR/longred.json     what the run is: resolved config, chosen layers, data, code, versions
OUT_DIR/log.jsonl        one object a step
OUT_DIR/checkpoints/     step-NNNNNN/, the newest --keep: one shard-RRRRR.safetensors a process, and
                         manifest.json with the size and checksum of every shard; resume takes the
                         newest sound one. Nothing in a state is ever unpickled
OUT_DIR/hf/              the export
OUT_DIR/lock             held by the process that runs here, and released however it ends

A state is written into step-NNNNNN.partial, next to the older ones, and flushed to disk. It becomes
valid when files.publish renames the folder (called by `publish`). Only then are older states
removed, so the disk needs room for --keep + 1. A resumed run drops the log lines of later steps and
trains these steps again, on a CPU to the same bits.

There are two kinds of states, and neither converts to the other. A run on CPUs or on several GPUs
saves fp32 weights, and any number of processes can resume what any other number saved. A run on one
GPU saves bf16 weights with their remainders, which resume on one GPU only, with the same --moments,
or on a CPU with --dtype bf16 --resume_anyway. When a state is saved, and what a signal does, is in
machine/keeper.py.
"""

import ast
import json
import os
import re
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from machine import files, memory
from machine.files import digest, file_checksum, read_json, signed, whole_file
from machine.formats import load_config
from machine.log import command, json_line, read_line
from machine.plan import GIB

# ----------------------------------------------------------------------------- the run's own files


def trim_log(path: Path, steps: int) -> list[dict]:
    """Drop the log lines after `steps`, which will be run again; return those before.

    A damaged line is left out and named.
    """
    raw = path.read_bytes().splitlines() if path.is_file() else []
    found = [read_line(line, steps) for line in raw]
    lines = {line["step"]: line for line in found if line}
    torn = [i + 1 for i, line in enumerate(found) if line is None]
    if torn and (torn != [len(raw)] or len(lines) < steps):  # a kill may have cut the last line
        print(f"warning: {path}: line {', '.join(map(str, torn))} damaged, left out of the log")
    elif missing := [step for step in range(1, steps + 1) if step not in lines]:
        print(f"warning: {path} lacks {len(missing)} of {steps} steps, step {missing[0]} and on")
    if steps == 0 and (undone := sum(line == {} for line in found)):
        print(f"warning: no state is left: the {undone} steps in {path} are run again")
    lines = [lines[step] for step in sorted(lines)]
    with whole_file(path) as f:
        f.writelines(json_line(line) for line in lines)
    return lines


def read_run(out_dir: str | os.PathLike) -> dict:
    """Return OUT_DIR/longred.json. Raises ValueError where there is no run to resume."""
    path = Path(out_dir) / "longred.json"
    if not path.exists():
        raise ValueError(f"--resume {out_dir}: no {path.name} there, so no run to resume")
    found = read_json(path)
    if "checksum" in found and found != signed(found):
        raise ValueError(
            f"{path} is damaged: it has not its checksum; take it from a backup, or, if you edited "
            'it, remove the line "checksum" from it'
        )
    record = {name: kind() for name, kind in RECORD.items()} | found
    for name, kind in {"config": dict, **RECORD}.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{path} is damaged, in its {name}; take it from a backup")
    return record


RECORD = dict.fromkeys(("data", "weights", "code", "own_samples", "commits"), dict)
RECORD["code_changes"] = list


# -------------------------------------------------------------------------- what a run depends on


def code_fingerprints() -> dict[str, str]:
    """Return {file: hash of its code} for the files that a step runs; comments do not count."""
    root, found = Path(__file__).parent.parent, {}
    names = ["longred.py", "model.py", "rope_kernels.py", "data.py"]
    for name in (*names, *(f"machine/{p.name}" for p in sorted((root / "machine").glob("*.py")))):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        found[name] = digest(ast.dump(tree).encode())
    return found


def weight_fingerprints(folder: Path) -> dict[str, str]:
    """Return {file: checksum of every byte} of a checkpoint's weights, and one of its config.

    The config counts by its entries, not by how its file is written.
    """
    paths = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".pth")]
    found = {p.name: f"{p.stat().st_size}-{file_checksum(p):08x}" for p in paths if p.is_file()}
    return found | {"config": digest(vars(load_config(folder)))}


def check_same(saved: dict, now: dict, out_dir: Path, anyway: bool) -> None:
    """Refuse to continue a run as a different one.

    saved, now: {"config" or "data" or "weights": dict}; what `now` lacks is not compared. Text and
    weights are compared by fingerprints of their content, not by paths, times or costs.
    anyway: print the differences instead. Raises ValueError naming the first one.
    """
    found = []
    for part, new in now.items():
        old = saved.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{part} {key} was {old.get(key)}, is {new.get(key)}")
    if found and not anyway:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise ValueError(
            f"--resume {out_dir}: {found[0]}{more}; put back what the run began with, or pass "
            "--resume_anyway to continue with what is here"
        )
    for difference in found:
        print(f"warning: resuming although {difference}")


def changed_code(saved: dict, now: dict) -> list[str]:
    """Return the files whose code changed since the run began, with a warning and no refusal."""
    files = [name for name in sorted(saved | now) if saved.get(name) != now.get(name)]
    if files:
        print(f"warning: resuming although the code changed in {', '.join(files)}")
    return files


# ----------------------------------------------------------------------------------------- states

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}  # safetensors' names


def run_state(student: nn.Module, optimizer) -> tuple[dict[str, Tensor], dict]:
    """Return all that changes from step to step, not copied: (tensors by name, numbers and words).

    If torch.optim.AdamW has no state yet, it gets zeros here, as it would make them itself.
    """
    tensors = {f"model.{name}": p.detach() for name, p in student.named_parameters()}
    if isinstance(optimizer, memory.AdamW):
        saved = optimizer.state_dict()
        pieces = {f"optimizer.{i:06d}": piece for i, piece in enumerate(saved.pop("state"))}
        return tensors | pieces, saved
    for name, p in student.named_parameters():
        if not optimizer.state[p]:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        tensors |= {f"optimizer.{key}.{name}": t for key, t in optimizer.state[p].items()}
    return tensors, {}


def write_shard(path: Path, tensors: dict[str, Tensor]) -> list[int]:
    """Write this process's part of each tensor, one after another; returns [size, checksum].

    The format is safetensors', whose own writer needs all tensors on the CPU at once. The checksum
    is computed while writing, so 96 GB need not be read a second time.
    """
    parts = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in tensors.items()}
    header, end = {}, 0
    for name, part in parts.items():
        offsets = [end, end := end + part.nbytes]
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape)}
        header[name]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    written = zlib.crc32(head)
    with open(path, "wb") as f:
        f.write(head)
        for part in parts.values():
            raw = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            f.write(raw)
            written = zlib.crc32(raw, written)
        f.flush()
        os.fsync(f.fileno())
    return [len(head) + end, written]


def publish(partial: Path, manifest: dict, keep: int) -> None:
    """Write a state's manifest and rename its folder: from then on the state is valid.

    Then remove the oldest, the unfinished and the damaged states.

    manifest: with "files": {name: [size, checksum]}, all that was written into `partial`.
    """
    files.write_json(partial / "manifest.json", signed(manifest))
    final = partial.with_suffix("")
    files.publish(partial, final, drop)
    newest = states_in(final.parent)[-keep:]
    for old in final.parent.iterdir():
        if STATE.fullmatch(old.name) and old not in newest and not is_copy(old):
            drop(old)


STATE = re.compile(r"step-\d{6,}(\.partial\d*|\.damaged|\.\d+\.previous\d*)?")
PART = re.compile(r"shard-\d{5}\.safetensors|manifest\.json(\.\d+\.partial\d*)?")


def parts_of(folder: Path) -> list[Path]:
    """Return the files of a state, or what is left of them; no other files, none behind a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if PART.fullmatch(p.name) and p.is_file()]


def drop(folder: Path) -> None:
    """Remove a state: the files that longred wrote, and the folder if nothing else is in it."""
    with suppress(OSError):
        for path in sorted(parts_of(folder)):  # the manifest first: what is left is no state
            path.unlink()
        folder.rmdir()


def states_in(folder: Path, copies: bool = False) -> list[Path]:
    """Return the folders of saved states in the order of their steps, sound or not."""
    found = folder.iterdir() if folder.is_dir() else ()
    found = [p for p in found if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    found = [p for p in found if parts_of(p) or (p / "manifest.json").is_file()]  # behind a link
    found = [p for p in found if copies or not is_copy(p)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def bytes_in(folder: Path) -> int:
    """Return the bytes of the saved states in a folder, which new states will replace."""
    return sum(p.stat().st_size for state in states_in(folder) for p in parts_of(state))


def is_copy(folder: Path) -> bool:
    """Return whether a user copied a state to the name of another step: such a copy is kept."""
    try:
        manifest = read_manifest(folder)
        sound = manifest == signed(manifest) and type(manifest["step"]) is int
    except (ValueError, KeyError):
        return False
    return sound and folder.name.split(".")[0] != f"step-{manifest['step']:06d}"


def cannot_save(folder: Path, step: int, need: int, e: OSError) -> ValueError:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    resume = command("longred.py", "--resume", folder.parent)
    return ValueError(
        f"cannot save the state after step {step} in {folder}: {getattr(e, 'strerror', e)}; it "
        f"takes {need / GIB:.3g} GiB, {free / GIB:.3g} GiB are free; older states are untouched: "
        f"{files.remedy(e)} and continue with: {resume}"
    )


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a saved state; None if every file has its size and checksum."""
    try:
        manifest = read_json(folder / "manifest.json")
        shards = {str(name): found for name, found in manifest["files"].items()}
        if not shards or not all(PART.fullmatch(name) for name in shards):
            return "its files are not a state's"
        if missing := set(shards) ^ {p.name for p in folder.glob("shard-*")}:
            return f"{min(missing)} is missing, or not of this state"
        if manifest != signed(manifest) or f"step-{manifest['step']:06d}" != folder.name:
            return "manifest.json has not its checksum"
        for name, (size, written) in shards.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has not its {size:,} bytes"
            if file_checksum(folder / name) != written:
                return f"{name} has not its checksum"
        if not isinstance(manifest["config"], dict) or not isinstance(manifest["optimizer"], dict):
            return "manifest.json has not the entries of a state's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"manifest.json cannot be read ({type(e).__name__})"
    return None


def newest_state(out_dir: Path) -> Path | None:
    """Return the newest sound state; None if none was saved. Damaged ones are renamed.

    Raises ValueError if states were saved and none is sound.
    """
    saved = states_in(out_dir / "checkpoints", copies=True)
    for folder in reversed(saved):
        if is_copy(folder):
            print(f"warning: {folder} holds another step's state: left alone", file=sys.stderr)
            continue
        wrong = find_damage(folder)
        if wrong is None:
            return folder
        print(f"warning: {folder} is damaged, {wrong}: skipped", file=sys.stderr)
        aside = folder.with_name(folder.name + ".damaged")
        drop(aside)
        if set(parts_of(folder)) == set(folder.iterdir()) and not aside.exists():
            folder.rename(aside)  # the next save drops it
    if saved:
        raise ValueError(
            f"--resume {out_dir}: none of the {len(saved)} saved states is sound and of this "
            "version of longred (another's: resume with that one); to begin again at step 1, "
            f"remove the step-* folders in {out_dir / 'checkpoints'}"
        )
    return None


def read_manifest(folder: Path) -> dict:
    return read_json(folder / "manifest.json")


def read_state(folder: Path, student: nn.Module, optimizer) -> None:
    """Load a saved state into student and optimizer, in place, tensor by tensor.

    The number of processes may differ from that of the shards. Raises ValueError if they do not
    fit: a checksum can be forged, so nothing here does more than copy numbers.
    """
    try:
        _read_state(folder, student, optimizer)
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, OSError) as e:
        if str(folder) in str(e):
            raise
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ValueError(
            f"{folder} does not hold a state of this run ({reason:.200}); remove it, and --resume "
            "takes the state before"
        ) from None


def _read_state(folder: Path, student: nn.Module, optimizer) -> None:
    tensors, _ = run_state(student, optimizer)
    shards = {name: [] for name in tensors}
    names = sorted(read_manifest(folder)["files"])  # by rank: in the order of their rows
    for path in (folder / name for name in names):
        with safe_open(path, framework="pt") as f:  # memory-mapped: nothing is read yet
            for name in f.keys():
                shards.setdefault(name, []).append(f.get_tensor(name))
    one_gpu = isinstance(optimizer, memory.AdamW)
    if not all(shards.values()) or shards.keys() != tensors.keys():
        kinds = ["optimizer.000000", "optimizer.exp_avg."][:: 1 if one_gpu else -1]
        ours, theirs = (any(shards[n] for n in shards if n.startswith(kind)) for kind in kinds)
        if theirs:
            raise ValueError(
                f"{folder}: a state in bf16 (one GPU's, or --dtype bf16) and one in fp32 (CPUs' or "
                "many GPUs') do not convert; resume as the run began, or one GPU's on a CPU with "
                "--dtype bf16 --resume_anyway"
            )
        if not (one_gpu and ours):
            raise ValueError("its tensors are not this model's, or some are missing")
    if one_gpu:
        pieces = [shards.pop(name)[0] for name in sorted(shards) if name.startswith("optimizer.")]
        optimizer.load_state_dict(read_manifest(folder)["optimizer"] | {"state": pieces})
    with torch.no_grad():
        for name, parts in shards.items():
            copy_rows(tensors[name], parts)


def copy_rows(mine: Tensor, parts: list[Tensor]) -> None:
    """Copy a whole tensor, given in parts of rows, or this process's rows where mine is sharded."""
    if mine.ndim == 0:  # AdamW's count of steps, the same in every shard
        mine.copy_(parts[0])
        return
    start, local = 0, mine
    if hasattr(mine, "device_mesh"):  # FSDP2 deals out rows: ceil(rows / processes) to each
        each = -(-len(mine) // mine.device_mesh.size())
        start, local = each * mine.device_mesh.get_local_rank(), mine.to_local()
    rows = []
    for part in parts:
        rows.append(part[max(0, start) : max(0, start + len(local))])
        start -= len(part)
    found = torch.cat(rows) if rows[1:] else rows[0]
    if found.shape != local.shape or found.dtype != local.dtype:  # copy_ would repeat or round
        raise ValueError(
            f"a tensor is {found.dtype} {list(found.shape)}, need {local.dtype} "
            f"{list(local.shape)}: the state is of another model"
        )
    local.copy_(found)
