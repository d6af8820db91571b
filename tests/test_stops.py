"""Ctrl-C ends every command by 130 without a traceback, and what it wrote is whole or not there."""

import json
import subprocess
import sys

import pytest
import torch

from machine.keeper import command_line
from tests.conftest import HERE
from tests.test_strangers import whole_texts

# Command -> its flags, and a function that it calls in the midst of its work.
BASE = "--base CKPT --device cpu"
TEXT = "--data ONE TWO --cache_dir OUT/tokens"
COMMANDS = {
    "evaluate": (f"{BASE} --ckpt CKPT {TEXT} --tasks kept --out_dir OUT", "evaluate.row"),
    "evaluate, reading": (f"{BASE} --ckpt CKPT {TEXT} --out_dir OUT", "evaluate.open_texts"),
    "evaluate samples": (f"samples OUT/own.jsonl {BASE} --n_samples 2", "evaluate.sample_ids"),
    "evaluate corpus": (
        f"corpus OUT/best.jsonl {BASE} --ckpt CKPT {TEXT}",
        "evaluate.select_corpus",
    ),
    "bench": ("rope --device cpu --out_dir OUT", "timing.rope_at"),
    "bench prove": ("prove --device cpu --out_dir OUT", "timing.our_step"),
    "tasks": (f"{BASE} --tasks piqa --out_dir OUT", "tasks.score"),
    "frontier": ("--base CKPT --long ONE --books TWO --out_dir OUT", "frontier.run_all"),
    "diagnosis": ("--base CKPT --book ONE --out_dir OUT", "diagnosis.run_all"),
    "text": ("ONE --ckpt CKPT --cache_dir OUT", "text.show"),
    "longred": ("--out_dir OUT --device cpu", "demo.train_demo_model"),
}
CODE = """
import atexit, json, os, signal, sys
import torch._dynamo
from measure import bench, demo, diagnosis, evaluate, frontier, tasks, text, timing
import longred
del sys.argv[0]

def run(command, flags, place):
    module, name = place.split(".")
    again = lambda: os.kill(os.getpid(), signal.SIGINT)

    def stop(*args, **kwargs):
        atexit.register(again)  # a second one while it ends
        again()

    setattr(globals()[module], name, stop)
    tasks.read_items = lambda task, most: [tasks.Item([("the cat", " runs"), ("a", " cat")], 0)] * 4
    sys.argv = [command, *flags.split()]
    globals()[command.split()[0].strip(",")].main()

for command, (flags, place) in json.loads(sys.argv[0]).items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(run(command, flags, place))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("\\n" + json.dumps([command, code]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(ckpt, tmp_path_factory):
    """{command: its exit code}, the folders that each wrote in, and all that they printed."""
    root, given = tmp_path_factory.mktemp("stops"), {}
    one, two = whole_texts(root)
    for command, (flags, place) in COMMANDS.items():
        out = root / command.replace(" ", "_")
        out.mkdir()
        for word, path in {"OUT": out, "CKPT": ckpt[0], "ONE": one, "TWO": two}.items():
            flags = flags.replace(word, str(path))
        given[command] = flags, place
    command = [sys.executable, "-c", CODE, json.dumps(given)]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode()
    codes = dict(json.loads(line) for line in said.splitlines() if line.startswith('["'))
    return codes, root, said


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_twice_ends_a_command_by_130_with_nothing_half_written(ended, command):
    codes, root, said = ended
    assert codes.get(command) == 130 and "Traceback" not in said, said[-9000:]
    left = [p.name for p in (root / command.replace(" ", "_")).rglob("*")]
    assert not [name for name in left if "partial" in name], left


def test_a_full_gpu_ends_a_command_in_one_line():
    with pytest.raises(SystemExit, match="^evaluate: CUDA out of memory. Tried 9 GiB$"):
        with command_line("evaluate", []):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried 9 GiB")
