"""The command line, made from the settings: the fields of MachineConfig are its flags."""

import argparse
import re
from dataclasses import fields
from typing import Literal, get_args, get_origin

from machine.settings import HARMLESS, MachineConfig

# The first field of each group -> what the group is about, for --help.
GROUPS = {
    "original_len": "the window",
    "method": "the method",
    "long_data": "text",
    "steps": "a step; the paper's has 16 micro-batches of 131,072 tokens",
    "replay_data": "LongRecipe's second stage, after --steps",
    "lr": "optimizer: AdamW",
    "source_weights": "how text is read",
    "out_dir": "the run and its machine; none of these changes what is learnt",
}


# What stands for a text in --help, by the end of the flag's name.
METAVARS = {"_data": "TEXT", "_dir": "DIR", "resume": "OUT_DIR", "weights": "SOURCE=SHARE"}


def integer(text: str) -> int:
    """A whole number; 4K is 4,096 and 1M 1,048,576."""
    found = re.fullmatch(r"([+-]?[\d_]+)([KkMm]?)", text)
    try:
        return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()]
    except (TypeError, ValueError):
        need = f"{text!r}: need a whole number such as 4096 or 4K"
        raise argparse.ArgumentTypeError(need) from None


def parse_args(
    kind: type[MachineConfig], argv: list[str] | None, description: str
) -> MachineConfig:
    """A `kind` of MachineConfig from the command line; its field names are the flags.

    Raises SystemExit with one line for a flag that is unknown or that does not go with the others.
    """
    usage = "python longred.py --ckpt CHECKPOINT --target_len TOKENS [flags]\n"
    usage += "       python longred.py     (the demo: minutes on a CPU, no download)"
    parser = argparse.ArgumentParser(
        "longred.py",
        usage,
        description.splitlines()[0],
        "Lengths may be written 4K, 32K, 128K (K = 1,024).",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("needed, but for the demo")

    def error(message: str):
        raise SystemExit(f"longred: {message}; all flags: python longred.py --help")

    parser.error = error
    machines = fields(MachineConfig)
    learnt = [f for f in fields(kind) if f not in machines]
    for f in (*learnt, *machines):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        (value, _), more = get_args(f.type | None), {}  # of X or X | None, value is X
        if get_origin(value) is list:
            value, more["nargs"] = get_args(value)[0], "+"
        if get_origin(value) is Literal:
            more["choices"] = get_args(value)
        elif value is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            word = [shown for end, shown in METAVARS.items() if f.name.endswith(end)]
            word = word or [f.name.upper()]
            kinds = {int: (integer, "N"), float: (float, "X"), str: (str, word[0])}
            more["type"], more["metavar"] = kinds[value]
        text, shown = f.metadata["help"].replace("%", "%%"), f.default
        if shown is not None and "default:" not in text:
            text += f" (default: {['no', 'yes'][shown] if value is bool else shown})"
        group.add_argument(f"--{f.name}", default=f.default, help=text, **more)
    config = kind(**vars(parser.parse_args(argv)))
    given = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    extra = given - {"resume", "resume_anyway", *HARMLESS}
    if config.resume and extra and not config.resume_anyway:
        raise SystemExit(
            f"longred: --resume takes its run's own settings: drop --{min(extra)}, or add "
            "--resume_anyway"
        )
    extra = given - {"out_dir", "seed", "device"}
    if not config.resume and not config.ckpt and extra:
        raise SystemExit(
            f"longred: --{min(extra)} needs --ckpt: the checkpoint to extend (none: the demo)"
        )
    return config
