"""The machine's settings, and what a run on this machine refuses.

`MachineConfig` adds to longred.Config how text is read, and how a run uses its machine.
"""

import glob
import math
import os
import re
from collections.abc import Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

import longred
from longred import Config, fill, opt, parse_args
from machine import corpus, plan, samples
from machine.hf_config import original_window
from model import ModelConfig


@dataclass
class MachineConfig(Config):
    """longred.Config, how text is read, and how a run uses its machine."""

    # What longred.Config has, with more kinds of values
    ckpt: str | None = opt(None, "folder, OUT_DIR, known name or hub id; none: the demo")
    long_data: list[str] | None = opt(
        None,
        "long text: files, folders, globs, hub datasets hf:owner/name[@revision][/part][#column] "
        "(default: 1.3 GB of public-domain books and open-licence papers, 0.9G tokens)",
    )
    short_data: list[str] | None = opt(
        None,
        "short text, on which the model is to stay as it is; self[:N]: N (2,000) texts sampled "
        "from the checkpoint (default: 2.9 GB of RedPajama's sample from the hub, 0.7G tokens)",
    )
    s2l_data: list[str] | None = opt(
        None, "text for short-to-long (default: long_data; if that is the default, short_data)"
    )
    out_dir: str | None = opt(None, "default: out/<ckpt name>-<target_len>; demo: out/demo")
    # How text is read
    source_weights: list[str] | None = opt(
        None, "SOURCE=SHARE of its stream's tokens, for all of a --..._data list (default: as read)"
    )
    min_doc_len: int = opt(0, "leave shorter documents out of the long stream, in tokens", least=0)
    length_upsample: float = opt(
        1.0,
        "weight of documents of train_len tokens or more in the long stream, within a source",
        least=1e-3,
        most=1e3,
    )
    add_eos: bool | None = opt(
        None, "end documents with EOS (default: where the tokenizer has one)"
    )
    # The run
    resume: str | None = opt(None, "continue the run in this OUT_DIR; needs no other flag")
    resume_anyway: bool = opt(False, "with --resume: although config, data or weights changed")
    recompute: bool = opt(False, "recompute blocks in backward on a CPU; a GPU's plan decides")
    context: int | None = opt(None, "processes to a sequence, under torchrun (default: 1)", least=1)
    gpu_gib: float | None = opt(None, "GPU memory to plan for (default: all that is free)", least=0)
    host_gib: float | None = opt(None, "host memory to plan for (default: all free)", least=0)
    dtype: Literal["bf16"] | None = opt(
        None, "bf16: compute on a CPU as on one GPU, with bf16 weights (default: fp32)"
    )
    moments: Literal["fp32", "bf16"] = opt("fp32", "AdamW's m and v, if weights are bf16")
    compile: bool = opt(False, "torch.compile the blocks on a GPU")
    save_every: int = opt(64, "steps between states that --resume can continue from", least=1)
    save_minutes: float = opt(30.0, "minutes until one is saved anyway; 0: never", least=0)
    keep: int = opt(2, "states kept; the disk needs room for one more; 0: save none", least=0)
    max_bad_steps: int = opt(3, "stop after so many steps in a row that are not finite", least=1)
    cache_dir: str = opt("out/tokens", "where tokenised text is kept, for all runs")
    skip_bad_lines: bool = opt(False, "leave out and count malformed records, do not stop at them")
    eval_tokens: int = opt(
        65536, "held-out tokens a stream in the closing report; 0: no report", least=0
    )


# Settings that a resumed run may change. None changes a step's numbers by more than rounding,
# except --steps, which decides when a replay begins.
MAY_CHANGE = {f.name for f in fields(MachineConfig)} - {f.name for f in fields(Config)}
MAY_CHANGE -= {"recompute", "dtype", "moments", "skip_bad_lines", "source_weights"}
MAY_CHANGE -= {"min_doc_len", "length_upsample", "add_eos"}
MAY_CHANGE |= {"out_dir", "device", "unit_tokens"}
# Text and weights are compared by their content (states.check_same), not by their paths.
TEXTS = "long_data", "short_data", "s2l_data", "replay_data"
MAY_CHANGE |= {"ckpt", "steps", *TEXTS}

# ---------------------------------------------------------------------------------------- checks


def source_shares(c: MachineConfig, specs: list[str]) -> list[float] | None:
    """Return --source_weights for one stream's list of sources; None: no shares are given.

    Raises ValueError for a share that is no number above 0, and for a list named only in part.
    """
    shares = {}
    for text in c.source_weights or ():
        source, _, share = text.rpartition("=")
        try:
            shares[source] = float(share)
        except ValueError:
            shares[source] = math.nan
        if not source or not 0 < shares[source] < math.inf:
            raise ValueError(f"--source_weights {text}: need SOURCE=SHARE, a number above 0")
    missing = [spec for spec in specs if spec not in shares]
    if len(missing) == len(specs):
        return None
    if missing:
        raise ValueError(
            f"--source_weights has no share for {missing[0]}; name all of its list, or none"
        )
    return [shares[spec] for spec in specs]


def check_sources(c: MachineConfig) -> None:
    """Check that sources are spelt well, and that every share's source is one of this run."""
    lists = [c.long_data, c.short_data, c.s2l_data, c.replay_data]
    read = [spec for specs in lists for spec in specs or ()]
    for spec in read:
        samples.count(spec)
    for specs in lists:
        source_shares(c, specs or [])
    for text in c.source_weights or ():
        if (source := text.rpartition("=")[0]) not in read:
            raise ValueError(
                f"--source_weights {text}: {source} is no source of this run; write it as in "
                f"--long_data or --short_data: {', '.join(dict.fromkeys(read))}"
            )


def resolve(config: MachineConfig, model: ModelConfig, ckpt: Path) -> MachineConfig:
    """All settings filled in. Raises ValueError for those that cannot work, before anything is
    allocated. ckpt: the folder that config.ckpt names."""
    c = replace(config, ckpt=str(ckpt.resolve()))
    settle_paths(c)
    if c.original_len is None:  # else original_window's doubts are settled
        c.original_len = original_window(model)
    if c.original_len is None:
        raise ValueError(
            "--original_len is missing: Meta's params.json does not have it; pass 4096 for Llama "
            "2, 2048 for Llama 1"
        )
    check_device(c, plan.parameter_count(model))
    # Short-to-long needs text like the short stream's; a user's own long text is available, too.
    fill(c, context=1, s2l_data=c.long_data or c.short_data or corpus.DEFAULT_SHORT)
    fill(c, long_data=corpus.DEFAULT_LONG, short_data=corpus.DEFAULT_SHORT)
    c = longred.resolve(c, model, Path(os.path.abspath(config.ckpt)).name)
    check_lengths(c, model)
    check_cpu(c)
    check_sources(c)
    return c


def check_flags(c: MachineConfig, given: Set[str]) -> None:
    """Raise SystemExit, in one line, for given flags that do not fit --resume or need --ckpt."""
    extra = given - {"resume", "resume_anyway", *MAY_CHANGE}
    if c.resume and extra and not c.resume_anyway:
        raise SystemExit(
            f"longred: --resume takes its run's own settings: drop --{min(extra)}, or add "
            "--resume_anyway"
        )
    extra = given - {"out_dir", "seed", "device"}
    if not c.resume and not c.ckpt and extra:
        raise SystemExit(
            f"longred: --{min(extra)} needs --ckpt: the checkpoint to extend (none: the demo)"
        )


def check_device(c: MachineConfig, parameters: int) -> None:
    """Raise ValueError if --device is not here, or if the model is too large for a CPU."""
    if c.device and not re.fullmatch(r"cpu|cuda(:\d+)?", c.device):
        raise ValueError(f"--device {c.device}: need cpu or cuda (one of many: cuda:1)")
    if c.device and c.device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {c.device}: torch sees no GPU, or none with a new enough driver: "
                f"compare {torch.version.cuda or 'no CUDA'}, which torch {torch.__version__} was "
                "built for, with nvidia-smi's, or pass --device cpu"
            )
        if int(c.device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device {c.device}: torch sees {torch.cuda.device_count()} GPUs, counted from 0"
            )
    if c.device is None and parameters > 1e9 and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, and {parameters / 1e9:.1f}B parameters are "
            "not for a CPU; compare the CUDA it was built for with nvidia-smi's, or pass --device "
            "cpu"
        )


def check_lengths(c: MachineConfig, model: ModelConfig) -> None:
    """Check what attention asks of lengths: on a GPU, and where processes share a sequence."""
    lengths = c.train_len, c.short_len, c.original_len
    if c.document_mask and (c.context > 1 or c.compile):
        other = f"--context {c.context}" if c.context > 1 else "--compile"
        raise ValueError(
            f"--document_mask does not go with {other}: documents would be split between processes,"
            " or need a new graph each time; drop one of the two"
        )
    if any(n % c.context for n in (*lengths, model.n_heads, model.n_kv_heads)):
        raise ValueError(
            f"--context {c.context} must divide the lengths {lengths} and the model's "
            f"{model.n_heads} heads and {model.n_kv_heads} kv heads"
        )
    if c.device.startswith("cuda"):  # cuDNN's attention is only sound at such lengths
        for name, length in zip(("train_len", "short_len", "original_len"), lengths, strict=True):
            if length % 128:
                raise ValueError(
                    f"--{name} {length}: attention on a GPU needs a multiple of 128, try "
                    f"{max(128, length // 128 * 128)}"
                )


def check_cpu(c: MachineConfig) -> None:
    """Refuse what a CPU would ignore; a GPU's run may be resumed on one."""
    ignored = [f"--{name}" for name in ("gpu_gib", "host_gib", "compile") if getattr(c, name)]
    ignored += ["--moments bf16"] * (c.moments == "bf16" and c.dtype is None)
    if c.device == "cpu" and ignored and not c.resume:
        raise ValueError(f"{', '.join(ignored)}: a CPU does nothing with it; drop it")


def whole_path(path: str, flag: str) -> str:
    """Return an absolute path, so that a run can be resumed from any folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"--{flag} {path}: no such user; write the path out")
    return os.path.abspath(found)


def settle_paths(c: MachineConfig) -> None:
    """Make every path of the settings absolute; hub datasets and self stay as they are."""
    for name in ("out_dir", "cache_dir"):
        if getattr(c, name):
            setattr(c, name, whole_path(getattr(c, name), name))
    for name in TEXTS:
        if specs := getattr(c, name):
            setattr(c, name, [whole_source(s, name) for s in map(str, specs)])
    if c.source_weights:
        shares = [(text, text.rpartition("=")[0]) for text in c.source_weights]
        c.source_weights = [
            whole_source(source, "source_weights") + text[len(source) :] if source else text
            for text, source in shares
        ]


def whole_source(spec: str, flag: str) -> str:
    """Return a source of text with an absolute path, if it has one."""
    return whole_path(spec, flag) if is_path(spec) else spec


def is_path(spec: str) -> bool:
    """Return whether a source of text is on this disk: no hub dataset, no sample of the model's."""
    return not spec.startswith("hf:") and samples.count(spec) is None


def is_at_hand(specs: list[str]) -> bool:
    """Return whether a list of text that a run did not read can be read now.

    The default short text would have to be fetched, and samples to be drawn.
    """
    return specs != corpus.DEFAULT_SHORT and all(samples.count(spec) is None for spec in specs)


# Removed flags, and their values with which a recorded run can still be resumed.
REMOVED = {"short_rope": "new", "export_longrope": False}


def of_today(saved: dict) -> dict:
    """Return the settings of a run's record as this version has them.

    A removed flag stays, to be refused, if it made a difference.
    """
    old = {name for name, value in REMOVED.items() if name in saved and saved[name] == value}
    saved = {name: value for name, value in saved.items() if name not in old}
    method = saved.get("method")
    if old and method == "mix_cpt":  # its weights were recorded as LongReD's, and did nothing
        saved |= {"alpha_short": 1.0, "alpha_s2l": 1.0}
    unread = longred.UNREAD.get(method, ()) if isinstance(method, str) else ()
    return saved | {name: None for name in unread if name in saved}


def resumed_config(
    saved: dict, given: MachineConfig, named: Set[str] | None = None
) -> MachineConfig:
    """Return the config that a run began with, with the flags that may be given when it resumes.

    saved: from OUT_DIR/longred.json. named: the flags of `given` that count; None: those that are
    not defaults. Raises ValueError where saved is damaged or another version's, and for a path that
    is gone and was not given anew.
    """
    names = {f.name for f in fields(given)}
    if unknown := saved.keys() - names:
        raise ValueError(
            f"--resume {given.resume}: its setting {min(unknown)} is not known here; resume it "
            "with the version of longred that began it"
        )
    if not is_sound(saved, type(given)):
        path = Path(given.resume) / "longred.json"
        raise ValueError(f"{path} is damaged, in its config; take it from a backup")
    saved, out_dir = dict(saved), whole_path(given.resume, "resume")
    now = {"out_dir": out_dir, "resume": out_dir, "resume_anyway": given.resume_anyway}
    if named is None:
        named = {f.name for f in fields(given) if getattr(given, f.name) != f.default}
    for name in named - now.keys():
        if name in MAY_CHANGE or given.resume_anyway:
            now[name] = getattr(given, name)
    # A source that was given a new path has it wherever else it is named.
    pairs = (zip(saved.get(name) or (), now.get(name) or (), strict=False) for name in TEXTS)
    renamed = {old: str(new) for pair in pairs for old, new in pair}
    for name in TEXTS:
        if saved.get(name):
            saved[name] = [renamed.get(spec, spec) for spec in saved[name]]
    if shares := saved.get("source_weights"):
        shares = (text.rpartition("=") for text in shares)
        saved["source_weights"] = [f"{renamed.get(s, s)}={share}" for s, _, share in shares]
    c = type(given)(**(saved | now))
    for name in ("ckpt", *TEXTS):
        value = getattr(c, name) or []
        for path in map(str, value if isinstance(value, list) else [value]):
            plain, _ = corpus.split_column(path)
            if os.path.isabs(plain) and not glob.glob(plain) and not os.path.exists(plain):
                raise ValueError(
                    f"--resume {given.resume}: {plain} is gone; if it was moved, name it anew (of "
                    f"several, all): --{name} PATH"
                )
    return c


def is_sound(saved: dict, kind: type[MachineConfig]) -> bool:
    """Return whether every setting has a value that its flag can have."""
    flags = []
    for f in fields(kind):
        value = saved.get(f.name)
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{f.name}")
        elif isinstance(value, list):
            flags += [f"--{f.name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{f.name}={value}")
    try:
        parsed = vars(parse_args(flags, kind))
    except SystemExit:
        return False
    return all(parsed[name] == value for name, value in saved.items())
