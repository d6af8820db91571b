"""Benchmarks against peers and against the machine's own limits, all in one run.

    python -m measure.bench prove         one GPU: all targets in three commands, a JSON and a table
    python -m measure.bench rope          one GPU: the rotary kernel against its peers and a copy
    python -m measure.bench step          one GPU: a LongReD step of Llama-3-8B, part by part
    python -m measure.bench memory        planned peaks of a step; on a GPU against measured ones
    python -m measure.bench rope --device cpu    a smoke test; its numbers mean nothing

Every run prints a table and writes it to results/ as JSON, with device, versions, date and command.
From any other folder the command is python PATH/measure/bench.py.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path, which puts measure/ first among the places of modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from longred import whole_number
from machine import plan as planner
from machine.files import refuse_foreign
from machine.keeper import command_line
from measure.prove import PARTS, prove
from measure.timing import (
    MOMENTS,
    bench_memory,
    bench_rope,
    bench_step,
    result_name,
    result_path,
)


def integers(text):
    return [whole_number(word) for word in text.split(",")]


def main(argv=None):
    planner.expand_segments()  # before anything asks for the GPU
    parser = argparse.ArgumentParser("python -m measure.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)

    def command(name, run, rounds, text):
        """Add a subcommand with the flags that all have; returns its add_argument."""
        new = commands.add_parser(name, help=text)
        new.set_defaults(run=run, name=name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        add = new.add_argument
        add("--device", type=torch.device, default=device, help=f"cuda or cpu (default: {device})")
        add("--out_dir", default="results", help="for the JSON (default: results)")
        if rounds:
            add("--rounds", type=int, default=rounds, help=f"runs of each (default: {rounds})")
        return add

    add = command("rope", bench_rope, 25, "rotary kernel against peers and a copy; medians")
    lengths = "tokens, comma-separated (default: 8192,32768,131072; on a CPU 64,256)"
    add("--lengths", type=integers, help=lengths)
    step = command("step", bench_step, 2, "one LongReD step of Llama-3-8B, by its units, and peers")
    step("--compile", action="store_true", help="torch.compile the blocks")
    step("--peers", action=argparse.BooleanOptionalAction, default=True)
    peak = command("memory", bench_memory, 2, "planned peaks, on a GPU against measured ones")
    peak("--lengths", type=integers, default=[32768, 131072], help="tokens, comma-separated")
    for add in (step, peak):
        add("--gpu_gib", type=float, help="use no more than this (default: all)")
        add("--host_gib", type=float, help="plan for this (default: all free)")
        add("--moments", default="fp32", choices=MOMENTS, help="of AdamW's m and v")
    add = command("prove", prove, None, "all that is claimed of a GPU, against the targets")
    for part in list(PARTS)[1:]:
        text = f"only these stages: {', '.join(PARTS[part].stages)}"
        add(f"--{part}", dest="part", action="store_const", const=part, default="first", help=text)
    add("--seconds", type=float, help="stop before this, with every row on disk")
    add("--ckpt", help="a small checkpoint to train (default: the demo's, else one trained first)")
    args = parser.parse_args(argv)
    with command_line("bench", argv):
        for smoke_test in (False, True):
            path = result_path(args.out_dir, result_name(args), smoke_test)
            refuse_foreign(path, {"device", "smoke_test", "command"}, "benchmark")
        args.run(args)


if __name__ == "__main__":
    main()
