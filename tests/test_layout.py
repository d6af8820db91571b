"""The shape of the repository: what may import what, and how long a function may be."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import HERE, printed, run_python

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
# Room -> rooms it may import, also inside functions.
MAY_IMPORT = {
    "rope_kernels": set(),
    "model": {"rope_kernels"},
    "data": {"model"},
    "longred": {"rope_kernels", "model", "data"},
    "machine": {"rope_kernels", "model", "data", "longred", "machine"},
    "measure": {"rope_kernels", "model", "data", "longred", "machine", "measure"},
}
# Imports against the order: the hand-over of the command line, and the closing report.
EXCEPTIONS = {
    ("longred", "machine.run"),
    ("machine.run", "measure.demo"),
    ("machine.run", "measure.report"),
}


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


def module(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")


def imported(name: str) -> set[str]:
    """Modules of ours that a file imports, also inside functions, without the exceptions."""
    ours, found = {module(source) for source in SOURCES}, set()
    for node in ast.walk(TREES[name]):
        if is_for_types(TREES[name], node):
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    known = {other for who, other in EXCEPTIONS if who == module(name)} | {module(name)}
    return (found & ours) - known


def is_for_types(tree, node) -> bool:
    """Below `if TYPE_CHECKING:`, so never imported."""
    guards = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CH" in ast.unparse(n.test)]
    return any(node in ast.walk(guard) for guard in guards)


@pytest.fixture(scope="module")
def loaded():
    """{module: those of ours that it loads where none was}; without what cannot be imported."""
    code = """
import importlib, os, sys
import huggingface_hub, torch._dynamo, torch.distributed.fsdp  # once for all: they take seconds
for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        importlib.import_module(name)
        print(name, *sys.modules.keys() & set(sys.argv), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    command = [sys.executable, "-c", code, *map(module, SOURCES)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return {line.split()[0]: {*line.split()[1:]} for line in done.stdout.splitlines()}


def test_each_file_can_be_imported_first(loaded):
    assert loaded.keys() == {module(name) for name in SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_keep_the_order_of_the_house(name):
    allowed = MAY_IMPORT[module(name).split(".")[0]]
    for other in imported(name):
        assert other.split(".")[0] in allowed, f"{name} imports {other}"


def test_no_two_files_need_each_other():
    after = {module(name): imported(name) - {module(name)} for name in SOURCES}
    while ready := [name for name, others in after.items() if not others & after.keys()]:
        for name in ready:
            del after[name]
    assert not after, f"a circle of imports: {after}"


def test_every_exception_to_the_order_is_in_use():
    for name, other in EXCEPTIONS:
        assert other in re.findall(r"from ([\w.]+) import", FILES[name.replace(".", "/") + ".py"])


def test_the_method_loads_four_files_of_ours(loaded):
    assert loaded["model"] == {"model", "rope_kernels"}
    assert loaded["longred"] == {"longred", "model", "data", "rope_kernels"}


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


def test_train_and_the_losses_know_neither_gpu_nor_number_of_processes():
    for name, node in FUNCTIONS:
        if name == "longred.py" and (node.name == "train" or node.decorator_list):
            for word in ("cuda", "rank", "world_size", "is_available", "size > 1", "size == 1"):
                assert word not in ast.unparse(node).lower(), (node.name, word)


RUN = """  # as python runs it: sys.path begins with the script's folder, or with the current one
import runpy
way, folder, here = sys.argv[1:]
os.chdir(folder)
script = way.endswith(".py")
top = os.path.dirname(way) if script else folder
sys.path[:] = [top, *(path for path in sys.path if os.path.realpath(path) != here)]
sys.argv[1:] = ["--help"]
runpy.run_path(way, run_name="__main__") if script else runpy.run_module(way, {}, "__main__", True)
"""


@pytest.mark.parametrize("name", ["evaluate", "bench"])
def test_a_command_of_measure_runs_by_name_here_and_by_path_anywhere(name, tmp_path):
    ways = (f"measure.{name}", HERE), (HERE / "measure" / f"{name}.py", tmp_path)
    for run in [run_python(RUN, *way, HERE) for way in ways]:
        text = printed(run)
        assert run.exitcode == 0 and f"measure.{name}" in text, text[-2000:]


def test_folders_are_packages_with_nothing_in_them():
    for folder in FOLDERS[1:]:
        assert (HERE / folder / "__init__.py").read_bytes() == b""


def test_every_promise_of_the_machine_names_its_test():
    table = (HERE / "machine" / "README.md").read_text(encoding="utf-8")
    promised = re.findall(r"^\|.*\| `(test_\w+)` \|$", table, re.M)
    there = {node.name for name, node in FUNCTIONS if name.startswith(("tests/", "test_"))}
    assert len(promised) > 15 and set(promised) <= there, set(promised) - there
