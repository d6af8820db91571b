"""README's section "Change the method" does what it says: its diff adds a method."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from machine.corpus import tokenize
from machine.formats import load_checkpoint
from machine.tokenizer import load_tokenizer
from tests.conftest import HERE, read_log

NO_GIT = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def section(title) -> str:
    """README's text under a heading, up to the next one."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)[1]


def run(folder, *command) -> str:
    """What the command prints in that folder, where git finds no repository around it."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent), "PYTHONPATH": str(folder)}
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=folder, env=env, **both)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository's Python files with the section's diffs applied to it."""
    copy = tmp_path_factory.mktemp("changed") / "longred"
    shutil.copytree(
        HERE, copy, ignore=lambda folder, names: [n for n in names if not part_of_copy(folder, n)]
    )
    diffs = re.findall(r"^```diff\n(.*?)^```$", section("Change the method"), re.M | re.S)
    assert diffs
    (copy / "change.diff").write_text("".join(diffs), encoding="utf-8")
    run(copy, "git", "apply", "change.diff")
    return copy


def part_of_copy(folder, name) -> bool:
    top = str(folder) == str(HERE)
    return name.endswith((".py", ".md")) or (top and name in ("machine", "measure", "tests"))


@NO_GIT
def test_the_diff_adds_one_function_and_one_table_to_the_method(changed):
    differ = {
        path.relative_to(changed).as_posix()
        for path in changed.rglob("*.py")
        if path.read_bytes() != (HERE / path.relative_to(changed)).read_bytes()
    }
    assert differ == {"longred.py"}


@NO_GIT
def test_the_new_loss_is_trained_and_logged(changed, ckpt, tmp_path):
    folder, long, short = ckpt
    flags = dict(ckpt=folder, target_len=256, rope_theta=3000.0, method="mse", steps=2, lr=1e-3)
    flags |= dict(long_data=long, short_data=short, long_micro=1, long_batch=1)
    flags |= dict(short_micro=2, short_batch=3, eval_tokens=0)
    flags |= dict(device="cpu", cache_dir=tmp_path / "tokens", out_dir=tmp_path / "run")
    run(changed, sys.executable, "longred.py", *(f"--{k}={v}" for k, v in flags.items()))

    teacher, student = load_checkpoint(folder), load_checkpoint(folder, rope_theta=3000.0)
    corpus = tokenize([str(short)], load_tokenizer(folder), tmp_path / "tokens", "short")
    text, losses = data.Stream(corpus, "short", 2024, 3, 64), []
    for index in (0, 1):  # the micro-batches of step 1
        ids = text.batch(index)[:, :-1]
        with torch.no_grad():
            (a, _), (b, _) = teacher(ids), student(ids)
        losses.append(((a - b).double() ** 2).sum().item() / a.numel())
    first, second = read_log(tmp_path / "run")
    assert first["loss_short"] == pytest.approx(np.mean(losses), rel=1e-5)
    for line in (first, second):
        want = 8 / 16 * line["loss_long"] + 8 / 16 * line["loss_short"]
        assert line["loss"] == pytest.approx(want) and line["loss_short"] > 0


@NO_GIT
def test_the_shape_of_the_repository_holds_and_a_run_of_another_method_is_as_before(changed):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_layout.py", "test_longred.py", "-k"]  # but what starts processes
    command += ["formula_written_out or test_layout and not by_path and not first and not loads"]
    assert re.search(r"^\d+ passed", found := run(changed, *command), re.M), found
