"""README's section "Change the method" does what it says: a fourth loss, added by its diffs."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from model import load_checkpoint
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
    (copy / "fourth.diff").write_text("".join(diffs), encoding="utf-8")
    run(copy, "git", "apply", "fourth.diff")
    return copy


def part_of_copy(folder, name) -> bool:
    top = str(folder) == str(HERE)
    return name.endswith(".py") or (top and name in ("machine", "measure", "tests"))


@NO_GIT
def test_the_diffs_touch_only_the_method_and_its_test(changed):
    differ = {
        path.relative_to(changed).as_posix()
        for path in changed.rglob("*.py")
        if path.read_bytes() != (HERE / path.relative_to(changed)).read_bytes()
    }
    assert differ == {"longred.py", "test_longred.py"}


@NO_GIT
def test_the_new_loss_is_trained_and_logged(changed, ckpt, tmp_path):
    folder, long, short = ckpt
    flags = dict(ckpt=folder, target_len=256, rope_theta=3000.0, distill_layers=3, steps=2, lr=1e-3)
    flags |= dict(long_data=long, short_data=short, mse_data=short, long_micro=1, long_batch=1)
    flags |= dict(short_micro=2, short_batch=3, s2l_micro=1, s2l_batch=1, eval_tokens=0)
    flags |= dict(device="cpu", cache_dir=tmp_path / "tokens", out_dir=tmp_path / "run")
    run(changed, sys.executable, "longred.py", *(f"--{k}={v}" for k, v in flags.items()))

    teacher, student = load_checkpoint(folder), load_checkpoint(folder, rope_theta=3000.0)
    tokenizer = data.load_tokenizer(folder)
    corpus = data.tokenize([str(short)], tokenizer, tmp_path / "tokens", "mse")
    text, losses = data.Stream(corpus, "mse", 2024, 3, 64), []
    for index in (0, 1):  # the micro-batches of step 1
        ids = text.batch(index)[:, :-1]
        with torch.no_grad():
            (a, _), (b, _) = teacher(ids), student(ids)
        losses.append(((a - b).double() ** 2).sum().item() / a.numel())
    first, second = read_log(tmp_path / "run")
    assert first["loss_mse"] == pytest.approx(np.mean(losses), rel=1e-5)
    parts = dict(long=8 / 16, short=6 / 16 * 5, s2l=2 / 16 * 10, mse=6 / 16)
    for line in (first, second):
        want = sum(weight * line[f"loss_{name}"] for name, weight in parts.items())
        assert line["loss"] == pytest.approx(want) and line["loss_mse"] > 0


@NO_GIT
def test_its_own_test_passes_and_a_run_without_it_is_as_before(changed):
    tests = "mse_distillation or one_step_of_train_equals_the_formula"
    found = run(changed, sys.executable, "-m", "pytest", "-q", "test_longred.py", "-k", tests)
    assert re.search(r"^[2-9] passed, \d+ deselected", found, re.M), found
    assert "def test_mse_distillation" in (changed / "test_longred.py").read_text()
