"""The shape of the repository: what may import what, and how long a function may be."""

import ast
import importlib
import subprocess
import sys

import pytest

from tests.conftest import HERE

FOLDERS = ("", "machine", "measure", "tests")
FILES = {
    path.relative_to(HERE).as_posix(): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((HERE / folder).glob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
SOURCES = [name for name in FILES if not name.startswith("test") and "__init__" not in name]
FUNCTIONS = [
    (name, node)
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
]
# One meaning each was too much to ask of these; flags and their values may be called so.
NAMES_THAT_SAY_NOTHING = "at ends about use hold let_go from_first kept again".split()
# Room -> rooms it may import. Imports inside a function, for speech or a report, do not count.
MAY_IMPORT = {
    "rope_kernels": set(),
    "data": set(),
    "model": {"rope_kernels"},
    "machine.hf_config": {"rope_kernels"},
    "machine.checkpoints": {"machine.hf_config"},
    "machine": {"rope_kernels", "data", "model", "machine"},
    "longred": {"rope_kernels", "data", "model", "machine"},
    "measure": {"rope_kernels", "data", "model", "machine", "longred", "measure"},
}


def names(tree) -> set[str]:
    """Every name that appears in code: variables, attributes, functions, parameters, imports."""
    found = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            if isinstance(getattr(node, field, None), str):
                found.add(getattr(node, field))
    return found


def given(tree) -> set[str]:
    """The names that a file gives: to functions, classes, parameters, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias) and node.asname:
            found.add(node.asname)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(getattr(node, "id", None) or node.attr)
    return found


def called(tree) -> set[str]:
    """The last part of what is called: `a.b.c(...)` gives c."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(f, "attr", None) or getattr(f, "id", "") for f in calls}


def depth(node) -> int:
    """Blocks inside blocks below this one: if, for, while, with, try; `elif` goes no deeper."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        elif_ = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try) and not elif_
        deepest = max(deepest, depth(child) + block)
    return deepest


def imported(tree) -> set[str]:
    """Modules of ours that a file imports as it is loaded; machine.X in full."""
    ours, found = {name.removesuffix(".py").replace("/", ".") for name in SOURCES}, set()
    inside = {
        x for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for x in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in inside or is_for_types(tree, node):
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & ours


def is_for_types(tree, node) -> bool:
    """Below `if TYPE_CHECKING:`, so never imported."""
    guards = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in names(n.test)]
    return any(node in ast.walk(guard) for guard in guards)


def test_each_file_can_be_imported_first():
    code = """
import importlib, os, sys
import huggingface_hub, torch._dynamo, torch.distributed.fsdp  # once for all: they take seconds
for name in sys.argv[1:]:
    sys.stderr.flush()
    child = os.fork()
    if not child:  # a process that has seen no file of ours
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""
    modules = [name.removesuffix(".py").replace("/", ".") for name in SOURCES]
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_keep_the_order_of_the_house(name):
    module = name.removesuffix(".py").replace("/", ".")
    allowed = MAY_IMPORT.get(module, MAY_IMPORT[module.split(".")[0]])
    for other in imported(TREES[name]):
        assert {other, other.split(".")[0]} & allowed, f"{name} imports {other}"


def test_no_function_is_longer_than_70_lines():
    long = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, node in FUNCTIONS
        if node.end_lineno - node.lineno + 1 > 70
    }
    assert not long


def test_train_is_flat():
    (train,) = (n for name, n in FUNCTIONS if (name, n.name) == ("longred.py", "train"))
    assert train.end_lineno - train.lineno + 1 <= 70 and depth(train) <= 4


def test_the_step_is_seen_in_longred_and_the_machine_knows_no_loss():
    text, machine = FILES["longred.py"], FILES["machine/run.py"]
    assert {"backward", "clip_grad_norm_"} <= called(TREES["longred.py"])
    assert "optimizer.step()" in text
    for word in ("cosine", "cross_entropy", "next_token_loss", "backward(", "clip_grad_norm_"):
        assert word not in machine, word
    assert "optimizer.step()" not in machine


def test_longred_knows_neither_gpu_nor_number_of_processes():
    text = FILES["longred.py"]
    for word in ("cuda", "rank", "world_size", "is_available", "size > 1", "size == 1"):
        assert word not in text.lower(), word


@pytest.mark.parametrize("name", FILES)
def test_names_explain_themselves(name):
    assert not given(TREES[name]) & set(NAMES_THAT_SAY_NOTHING)


# What code beyond this repository binds to
BOUND = {
    "rope_kernels": "rope_frequencies apply_rope apply_rope_torch",
    "model": "ModelConfig Llama next_token_loss attention_kl load_config load_checkpoint "
    "save_checkpoint",
    "longred": "Config train main cosine_distance select_distill_layers",
    "data": "uniform_positions cream_positions cream_truncated_positions pose_positions "
    "longrecipe_positions load_tokenizer tokenize Corpus Stream held_out",
}


@pytest.mark.parametrize("module", BOUND)
def test_names_that_others_bind_to_are_where_they_were(module):
    found = importlib.import_module(module)
    assert all(callable(getattr(found, name)) for name in BOUND[module].split())


@pytest.mark.parametrize("name", ["evaluate", "bench"])
def test_a_command_of_measure_runs_by_name_here_and_by_path_anywhere(name, tmp_path):
    by_name, by_path = ["-m", f"measure.{name}"], [HERE / "measure" / f"{name}.py"]
    for command, folder in ((by_name, HERE), (by_path, tmp_path)):
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0 and f"measure.{name}" in done.stdout, done.stderr[-2000:]


def test_folders_are_packages_with_nothing_in_them():
    for folder in FOLDERS[1:]:
        assert (HERE / folder / "__init__.py").read_bytes() == b""
