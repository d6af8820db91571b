"""The command line, made from the settings: the fields of Config are its flags."""

import argparse
from dataclasses import fields
from typing import Literal, get_args, get_origin

from machine.settings import HARMLESS, Config


def parse_args(kind: type[Config], argv: list[str] | None, description: str) -> Config:
    """A `kind` of Config from the command line; its field names are the flags.

    Raises SystemExit with one line for a flag that is unknown or that does not go with the others.
    """
    parser = argparse.ArgumentParser(
        "longred.py", "python longred.py [flags]", description, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(message: str):
        raise SystemExit(f"longred: {message}; all flags: python longred.py --help")

    parser.error = error
    machines = fields(Config)
    learnt = [f for f in fields(kind) if f not in machines]
    for f in (*learnt, *machines):
        (value, _), more = get_args(f.type | None), {}  # of X or X | None, value is X
        if get_origin(value) is list:
            value, more["nargs"] = get_args(value)[0], "+"
        if get_origin(value) is Literal:
            more["choices"] = get_args(value)
        elif value is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more |= {"type": value, "metavar": value.__name__}
        shown = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            f"--{f.name}", default=f.default, help=f.metadata["help"] + shown, **more
        )
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
