"""Settings of a run: the machine's flags, the paper's defaults, and what is refused.

`MachineConfig` holds what a machine needs to know; longred.Config inherits it and adds what is
learnt, from what. Every field is a flag; None is worked out by `resolve`.
"""

import glob
import math
import os
import re
import sys
import types
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import torch

from machine import corpus, plan, samples
from machine.hf_config import original_window
from model import ModelConfig


def opt(default, help: str, least: float | None = None, most: float | None = None):
    """A setting and its command-line flag. least, most: values that make sense (most of a whole
    number, if not given: 2^40, above which products overflow)."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class MachineConfig:
    """How text is read, and how a run lives on its machine."""

    # Text, beyond longred.Config's
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
    out_dir: str | None = opt(None, "default: out/<ckpt name>-<target_len>; demo: out/demo")
    resume: str | None = opt(None, "continue the run in this OUT_DIR; needs no other flag")
    resume_anyway: bool = opt(False, "with --resume: although config, data or weights changed")
    device: str | None = opt(None, "cuda or cpu (default: cuda where there is one)")
    unit_tokens: int = opt(32768, "most tokens in one forward pass, at least one sequence", least=1)
    recompute: bool = opt(False, "recompute blocks in backward on a CPU; a GPU's plan decides")
    context: int | None = opt(None, "processes to a sequence, under torchrun (default: 1)", least=1)
    gpu_gib: float | None = opt(None, "GPU memory to plan for (default: all that is free)", least=0)
    host_gib: float | None = opt(None, "host memory to plan for (default: all free)", least=0)
    moments: Literal["fp32", "bf16"] = opt("fp32", "AdamW's m and v on a GPU")
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


# Fields that a resumed run may have otherwise: none changes a step's numbers beyond how they round
# (or, steps, when a replay begins).
HARMLESS = {f.name for f in fields(MachineConfig)} - set(
    "recompute moments skip_bad_lines source_weights min_doc_len length_upsample add_eos".split()
)
# Text is known by its content, wherever it lies.
TEXTS = "long_data", "short_data", "s2l_data", "replay_data"
HARMLESS |= {"ckpt", "steps", *TEXTS}

# -------------------------------------------------------------------------------------- defaults

# The paper's base for (theta, window) -> target (App. B, tables 3 and 9); 32000 and 128000 there.
PAPER_THETA = {
    (500_000.0, 8192, 32768): 2e7,
    (500_000.0, 8192, 131072): 1e8,
    (1_000_000.0, 32768, 131072): 2e7,
}
# The rest of App. B: at 32K, and at 128K.
PAPER = {
    "alpha_short": (5.0, 2.0),
    "alpha_s2l": (10.0, 15.0),
    "position_scheme": ("cream", "uniform"),
    "n_distill_layers": (6, 3),  # 3 only where the window grows by more than 8
}
MICRO_BATCH = 131072  # tokens in each of the paper's 16 micro-batches


def default_theta(theta: float, original_len: int, target_len: int) -> float:
    """ABF's new base: the paper's where it has one, else a rule.

    The rule keeps how many frequencies complete a turn within the window: with wavelengths
    2 pi theta^(2j/H), that is ln(new) / ln(theta) = ln(target / 2 pi) / ln(original / 2 pi).
    Rounded to two digits.
    """
    for (base, window, target), new in PAPER_THETA.items():
        if (theta, original_len) == (base, window) and 0.97 * target < target_len <= target:
            return new
    ratio = math.log(target_len / (2 * math.pi)) / math.log(original_len / (2 * math.pi))
    return float(f"{theta**ratio:.1e}")


def default_train_len(c: MachineConfig) -> int:
    """LongRecipe's best ratio, 30% of the target (its table of ratios); all of it if ordinary.

    From 4,096 on a multiple of 128, as attention on a GPU likes its lengths.
    """
    if c.long_position_scheme == "ordinary":
        return c.target_len
    multiple = 128 if c.target_len >= 4096 else 1
    return round(0.3 * c.target_len / multiple) * multiple


def rope_scaling(c: MachineConfig) -> dict | None:
    """--rope_type in transformers' form; None keeps what the checkpoint has (ABF)."""
    if c.rope_type is None:
        return None
    scaling = {"rope_type": c.rope_type}
    if c.rope_type != "default":
        scaling["factor"] = c.target_len / c.original_len
    if c.rope_type == "yarn":
        scaling["original_max_position_embeddings"] = c.original_len
    return scaling


def source_shares(c: MachineConfig, specs: list[str]) -> list[float] | None:
    """--source_weights for one stream's list of sources, in its order; None: as they come.

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
    """Sources are well spelt, and every share's is one that this run reads."""
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


def fill(c: MachineConfig, **defaults) -> None:
    """Set the fields that were left to us."""
    for name, value in defaults.items():
        if getattr(c, name) is None:
            setattr(c, name, value)


def fill_defaults(c: MachineConfig, ckpt_name: str, theta: float) -> None:
    """The paper's settings and the usual places, wherever nothing was said."""
    far = c.target_len >= 128_000  # the paper's second set of settings
    paper = {name: values[far] for name, values in PAPER.items()}
    if far and c.target_len <= 8 * c.original_len:
        paper["n_distill_layers"] = PAPER["n_distill_layers"][0]
    if c.method == "mix_cpt":  # a plain mixture, unless a weight is asked for
        fill(c, alpha_short=1.0, alpha_s2l=1.0)
    alone = c.method in ("long_cpt", "longrecipe")  # baselines that read no other stream
    if alone:
        c.short_micro = c.s2l_micro = 0
    fill(
        c,
        **paper,
        out_dir=f"out/{ckpt_name}-{c.target_len}",
        device="cuda" if torch.cuda.is_available() else "cpu",
        context=1,
        # Short-to-long wants text like the short stream's; a user's own long text is near at hand.
        s2l_data=c.long_data or c.short_data or corpus.DEFAULT_SHORT,
        long_data=corpus.DEFAULT_LONG,
        short_data=corpus.DEFAULT_SHORT,
        long_position_scheme="longrecipe" if c.method == "longrecipe" else "ordinary",
        long_micro=16 if alone else 8,
        long_batch=max(1, MICRO_BATCH // c.target_len),
        s2l_batch=max(1, MICRO_BATCH // c.original_len),
        replay_batch=max(1, MICRO_BATCH // c.original_len),
        short_len=1024,
        alpha_kl=1.0 if c.method == "soft_replay" else 0.0,
    )
    if c.rope_type is None:
        fill(c, rope_theta=default_theta(theta, c.original_len, c.target_len))
    c.short_len = min(c.short_len, c.original_len)
    fill(c, train_len=default_train_len(c), short_batch=max(1, MICRO_BATCH // c.short_len))


# ---------------------------------------------------------------------------------------- checks


def resolve(config: MachineConfig, model: ModelConfig, ckpt: Path) -> MachineConfig:
    """Fill in what was left to us and refuse what cannot work, before anything is allocated."""
    c = replace(config, ckpt=str(ckpt.resolve()))
    settle_paths(c)
    if c.original_len is None:
        c.original_len = original_window(model)
    if c.original_len is None:
        raise ValueError(
            "--original_len is missing: Meta's params.json does not say it; pass 4096 for Llama 2, "
            "2048 for Llama 1"
        )
    for f in fields(c):
        value, least, most = getattr(c, f.name), f.metadata["least"], f.metadata["most"]
        if most is None:
            most = 2**40 if isinstance(value, int) else sys.float_info.max
        if None not in (value, least) and not least <= value <= most:
            above = f", at most {most:g}" if value > most else ""
            raise ValueError(f"--{f.name} {value}: need at least {least}{above}")
    if c.target_len is None:
        raise ValueError("--target_len is missing: how many tokens the extended model should read")
    if c.target_len <= c.original_len:
        raise ValueError(
            f"--target_len {c.target_len} is not above the original window of {c.original_len}; "
            "pass a longer one (or the true --original_len)"
        )
    if c.rope_type is None and (model.rope_scaling or {}).get("rope_type") == "yarn":
        raise ValueError(
            f"the checkpoint is scaled by YaRN, {model.rope_scaling}: a larger theta on top of it "
            "is not defined, and readers would take another factor from the new window; pass "
            "--rope_type default, which removes the scaling, with a --rope_theta to your liking"
        )
    check_device(c, plan.parameter_count(model))
    fill_defaults(c, Path(os.path.abspath(config.ckpt)).name, model.rope_theta)
    if c.train_len > c.target_len:
        raise ValueError(
            f"--train_len {c.train_len} is above --target_len {c.target_len}; try a third of it"
        )
    if bool(c.replay_data) != bool(c.replay_steps):
        raise ValueError(
            f"--replay_data {c.replay_data} with --replay_steps {c.replay_steps}: need both or none"
        )
    if not 0 <= c.merge < 1:
        raise ValueError(f"--merge {c.merge}: need the original's share, from 0 to below 1")
    if c.alpha_kl and c.method not in ("longred", "soft_replay"):
        raise ValueError(
            f"--alpha_kl {c.alpha_kl:g} with --method {c.method}: only longred and soft_replay "
            "have that loss; drop one of the two"
        )
    if not all(1 <= i <= model.n_layers for i in c.distill_layers or ()):
        raise ValueError(
            f"--distill_layers {c.distill_layers}: this model has hidden states 1 to "
            f"{model.n_layers} (the last is after the final norm)"
        )
    check_lengths(c, model)
    check_sources(c)
    return c


def check_device(c: MachineConfig, parameters: int) -> None:
    """Of a --device, whether it is here; `parameters`: of the model, where none is asked for."""
    if c.device and not re.fullmatch(r"cpu|cuda(:\d+)?", c.device):
        raise ValueError(f"--device {c.device}: need cpu or cuda (one of many: cuda:1)")
    if c.device and c.device != "cpu":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {c.device}: torch sees no GPU, for want of one or of a new enough "
                f"driver: compare {torch.version.cuda or 'no CUDA'}, which torch "
                f"{torch.__version__} was built for, with nvidia-smi's, or pass --device cpu"
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
    """What attention asks of lengths: on a GPU, and where processes share a sequence."""
    lengths = c.train_len, c.short_len, c.original_len
    if c.document_mask and (c.context > 1 or c.compile):
        other = f"--context {c.context}" if c.context > 1 else "--compile"
        raise ValueError(
            f"--document_mask does not go with {other}: documents would lie across processes, or "
            "ask for a new graph each time; drop one of the two"
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


def whole_path(path: str, flag: str) -> str:
    """An absolute path, so that a run can be resumed from any folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"--{flag} {path}: no such user; write the path out")
    return os.path.abspath(found)


def settle_paths(c: MachineConfig) -> None:
    """Every path of the settings becomes absolute; hub datasets and self stay as they are."""
    for name in ("out_dir", "cache_dir"):
        if getattr(c, name):
            setattr(c, name, whole_path(getattr(c, name), name))
    for name in TEXTS:
        if specs := getattr(c, name):
            setattr(c, name, [whole_path(s, name) if is_path(s) else s for s in map(str, specs)])


def is_path(spec: str) -> bool:
    """A source of text that lies on this disk: no hub dataset, no sample of the checkpoint's."""
    return not spec.startswith("hf:") and samples.count(spec) is None


def moved(path: str, old_dir: str, new_dir: str) -> str:
    """A run's path, or where it lies now if it moved together with OUT_DIR; checked by content."""
    plain = path.rpartition("#")[0] if "#" in path and not os.path.exists(path) else path
    if not is_path(path) or not os.path.isabs(old_dir) or glob.glob(plain):
        return path
    there = os.path.normpath(os.path.join(new_dir, os.path.relpath(plain, old_dir)))
    if os.path.isabs(plain) and glob.glob(there):
        print(f"{path} is gone; going on with {there}")
        return there + path.removeprefix(plain)
    return path


def resumed_config(saved: dict, given: MachineConfig) -> MachineConfig:
    """The config a run began with, for the OUT_DIR it lies in now."""
    names = {f.name for f in fields(given)}
    if unknown := saved.keys() - names:
        raise ValueError(
            f"--resume {given.resume}: its setting {min(unknown)} is not known here; resume it "
            "with the version of longred that began it"
        )
    out_dir, old_dir = whole_path(given.resume, "resume"), str(saved.get("out_dir"))
    saved = dict(saved)
    for name in ("ckpt", "cache_dir", *TEXTS):
        value = saved.get(name)
        if isinstance(value, str):
            saved[name] = moved(value, old_dir, out_dir)
        elif isinstance(value, list):
            saved[name] = [moved(str(path), old_dir, out_dir) for path in value]
    now = {"out_dir": out_dir, "resume": out_dir, "resume_anyway": given.resume_anyway}
    for f in fields(given):
        if f.name in HARMLESS or given.resume_anyway:
            if f.name not in now and getattr(given, f.name) != f.default:
                now[f.name] = getattr(given, f.name)
    check_kinds(given, saved)
    # A source that was named anew is so wherever else it is named.
    pairs = (zip(saved.get(name) or (), now.get(name) or (), strict=False) for name in TEXTS)
    renamed = {old: str(new) for pair in pairs for old, new in pair}
    for name in TEXTS:
        if saved.get(name):
            saved[name] = [renamed.get(spec, spec) for spec in saved[name]]
    if shares := saved.get("source_weights"):
        shares = (text.rpartition("=") for text in shares)
        saved["source_weights"] = [f"{renamed.get(s, s)}={share}" for s, _, share in shares]
    return type(given)(**(saved | now))


def check_kinds(given: MachineConfig, saved: dict) -> None:
    """ValueError where longred.json has a setting of another kind than the flag's."""
    for f in fields(given):
        if f.name in saved and not any(fits(saved[f.name], kind) for kind in kinds(f.type)):
            raise ValueError(
                f"--resume {given.resume}: longred.json is damaged: its {f.name} is "
                f"{saved[f.name]!r:.60}; take it from a backup"
            )


def kinds(annotation) -> tuple:
    either = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if either else (annotation,)


def fits(value, kind) -> bool:
    """Whether a value from JSON is of the kind that a field's annotation names."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(v, get_args(kind)[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)
