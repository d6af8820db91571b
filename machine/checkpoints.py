"""Checkpoints of every kind, in and out: where they are, what they hold, whether it is sound.

    resolve_checkpoint(name) -> folder                  known names and hub ids are downloaded
    read_config(folder, from_hf) -> ModelConfig         config.json, or Meta's params.json
    open_tensors(folder, shapes, config) -> read(name)  names, shapes, dtypes checked beforehand
    new_folder(out_dir)                                 an export, whole or not at all

Checkpoints come from anywhere. A false header or config ends in a ValueError of one line before any
memory is allocated for what it claims, and nothing in a file is ever executed.

Tensors have Hugging Face's names, and q and k its half-split rotary convention (dimension j pairs
with j + H/2). Only Meta's own format pairs neighbours (2j, 2j + 1): those rows are permuted here.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from machine.files import (
    LFS,
    LFS_REMEDY,
    MOST_JSON,
    downloading,
    free_name,
    is_lfs_pointer,
    publish,
    read_json,
    unfinished,
)
from model import TOKENIZER_FILES

# --------------------------------------------------------------------------------- where to find it

# Short names for --ckpt; any other "owner/name" is tried on the hub as it is.
HUB_NAMES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}


def resolve_checkpoint(path_or_name: str | os.PathLike) -> Path:
    """Find the folder of a checkpoint: a folder, an OUT_DIR holding hf/, a known name, a hub id.

    A known name or hub id may end in @revision. Local folders win. Raises ValueError saying which
    names exist or how to provide the weights.
    """
    text = str(path_or_name)
    folder = Path(os.path.expanduser(text))  # Path's own raises RuntimeError for ~nobody
    for candidate in (folder, folder / "hf"):
        if (candidate / "config.json").is_file() or (candidate / "params.json").is_file():
            _refuse_adapter(candidate)
            return candidate
    if folder.exists():
        _refuse_adapter(folder)
        raise ValueError(
            f"{folder} holds no config.json (nor does {folder / 'hf'}): need a Hugging Face folder "
            "with config.json, model.safetensors and tokenizer.json, or Meta's with params.json, "
            "consolidated.00.pth and tokenizer.model"
        )
    name, _, revision = text.partition("@")
    repo = HUB_NAMES.get(name.lower(), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith((".", "/")):
        raise ValueError(
            f"no checkpoint {text!r}: not a folder here, not a hub id owner/name[@revision], and "
            f"not one of {', '.join(HUB_NAMES)}"
        )
    return _download(text, repo, unquote(revision) or None)


def _refuse_adapter(folder: Path) -> None:
    """Raise ValueError for an adapter (LoRA or the like) that is not merged into the weights."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds {name}, an adapter that is not merged into the weights and would "
                "be left out; merge it (peft: model.merge_and_unload().save_pretrained(...)) and "
                "pass that folder, or remove the file to mean the weights alone"
            )


def _download(name: str, repo: str, revision: str | None) -> Path:
    """Return the folder of a downloaded repository. revision: commit, tag or branch; None: main."""
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
    wanted += ["adapter_config.json"]  # its presence is refused
    login = "your token was refused" if get_token() else "you are not logged in"
    try:
        with downloading():
            found = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*wanted, *TOKENIZER_FILES, *CARRIED],
                ignore_patterns=["original/*", "consolidated*"],  # Meta's copy doubles the download
            )
        return resolve_checkpoint(found)
    except GatedRepoError:
        reason = f"its licence must be accepted at https://huggingface.co/{repo}, and {login}"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}, which is a commit, tag or branch after @"
    except RepositoryNotFoundError:
        reason = f"the hub has no such repository, or it is private and {login}"
    except Exception as e:  # a dozen network errors from three libraries
        if type(e) is ValueError:  # our own; some of theirs are kinds of ValueError
            raise
        said = " ".join(str(e.__cause__ or e).split())
        reason = f"nothing is cached, the hub refused or is out of reach ({said:.100}), and {login}"
    wanted = f"{repo} --revision {revision}" if revision else repo
    raise ValueError(
        f"cannot get {name!r} from the hub as {repo}: {reason}. Either run `hf auth login` and `hf "
        f"download {wanted} --exclude 'original/*'` where there is a network, or pass the folder: "
        "--ckpt /path/to/folder (with config.json, *.safetensors and tokenizer.json)"
    ) from None


# ------------------------------------------------------------------------------------------- config


def read_config(folder: Path, from_hf: Callable):
    """Return from_hf of config.json's content, or of Meta's params.json translated to it.

    Of Meta's weights the headers are read too, for the widths that params.json leaves out.
    Raises ValueError naming the file and the fault.
    """
    meta = not (folder / "config.json").is_file() and (folder / "params.json").is_file()
    path = folder / ("params.json" if meta else "config.json")
    hf = read_json(path)
    if meta:
        hf = _hf_from_meta(folder, hf)
    try:
        config = from_hf(hf)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if meta:  # unknown, rather than transformers' default
        config.max_position_embeddings = hf.get("max_position_embeddings")
    return config


# --------------------------------------------------------------------------------------- weights in


def open_tensors(folder: Path, shapes: dict[str, tuple], config) -> Callable[[str], Tensor]:
    """Check a folder's tensors before any is read; return what reads one by its name.

    shapes: {Hugging Face's name: shape} of all that are needed. config: a ModelConfig.
    Raises ValueError for a tensor missing, extra, misshapen or quantised, and for a damaged file.
    """
    if (folder / "config.json").is_file():
        return _hf_tensors(folder, shapes, config.tie_embeddings)
    return _meta_tensors(folder, shapes, config)


def copy_whole(mine: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this process's shard of it where `mine` is sharded."""
    if hasattr(mine, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(mine.device, mine.dtype)
        whole = distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None)
    mine.copy_(whole)


def _hf_tensors(folder: Path, shapes: dict, tied: bool) -> Callable[[str], Tensor]:
    """Check a Hugging Face folder's tensors by name, shape and dtype; return what reads one."""
    files = _weight_files(folder)
    ignored = {n for n in files if n.endswith(("rotary_emb.inv_freq", "rope.freqs"))}
    if tied:
        ignored.add("lm_head.weight")  # some writers store the tied matrix twice
    _check_names(folder, shapes.keys(), files.keys() - ignored)
    for name, shape in shapes.items():
        path, entry = files[name]
        if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {name} is {entry['dtype']}, need F32, F16 or BF16; {UNQUANTISED}"
            )
        if entry["shape"] != list(shape):
            rows, *width = entry["shape"]
            reason = "weights of another model: fetch config.json and weights from one place"
            padded = width == list(shape[1:]) and rows > shape[0]
            if name in (EMBEDDING, "lm_head.weight") and padded:
                reason = (
                    "where the rows were padded after config.json was written, as transformers' "
                    f"resize_token_embeddings did, set its vocab_size to {rows}, else fetch "
                    "config.json and weights from one place"
                )
            raise ValueError(
                f"{path}: {name} is {entry['dtype']} {entry['shape']}, need {list(shape)} by "
                f"config.json; {reason}"
            )

    def read(name: str) -> Tensor:
        # Opened again for each tensor, so that the pages of a memory-mapped file do not add up.
        with safe_open(files[name][0], framework="pt") as f:
            return f.get_tensor(name)

    def read_sound(name: str) -> Tensor:
        tensor = read(name)
        check_finite(tensor, name, files[name][0])
        return tensor

    if tied and "lm_head.weight" in files:
        _check_tied(files["lm_head.weight"][0], read("lm_head.weight"), read(EMBEDDING))
    return read_sound


EMBEDDING = "model.embed_tokens.weight"
UNQUANTISED = "quantised weights are not read: take the checkpoint that they were made from"
# How the names of tensors end that belong to quantised weights (FP8, GPTQ, AWQ, bitsandbytes).
QUANTISED = re.compile(r"(_scale|_scale_inv|\.scales|\.qweight|\.qzeros|_packed|\.absmax|\.SCB)$")
# What FSDP, activation checkpointing and torch.compile put between the parts of a name.
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def _check_tied(path: Path, head: Tensor, embedding: Tensor) -> None:
    """Raise ValueError if config.json ties embedding and head, and the file holds two matrices.

    Transformers 5 keeps the file's own head, transformers 4 and vLLM take the embedding.
    """
    if head.shape == embedding.shape and torch.equal(head, embedding.to(head.dtype)):
        return
    raise ValueError(
        f"{path} holds an lm_head.weight of its own, while config.json says tie_word_embeddings: "
        "true, and readers differ over which counts; set tie_word_embeddings to false to keep the "
        "head, or remove lm_head.weight from the file to tie it"
    )


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Raise ValueError if a tensor holds inf or nan, or a number that fp32 takes for inf.

    One pass, at memory speed: a finite sum means finite numbers. If the sum is not finite, it may
    only have overflowed, so the numbers are then looked at one by one.
    """
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise ValueError(
            f"{path}: {name} holds {bad:,} numbers of {tensor.numel():,} that are inf or nan; the "
            "weights are broken, no training mends that: fetch them again or take an earlier state"
        )


def _weight_files(folder: Path) -> dict[str, tuple[Path, dict]]:
    """Return {tensor name: (file, its dtype and shape)}, from the headers alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map; fetch it again")
        names = sorted({Path(str(n)).name for n in names.values()})  # of this folder, no other
    else:
        raise ValueError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; download "
            "the weights (of shards the index too), or convert .bin files with transformers' "
            "save_pretrained"
        )
    absent = [name for name in names if not os.path.lexists(folder / name)]
    if absent:
        others = sorted({p.name for p in folder.glob("model-*.safetensors")} - set(names))
        raise ValueError(
            f"{folder} lacks {len(absent)} of the {len(names)} files that {index.name} names, "
            f"{absent[0]!r} and on"
            + (f", and has {others[0]!r}, which it does not name" if others else "")
            + "; fetch the index and all its files from one place"
        )
    files = {}
    for path in (folder / n for n in names):
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no plain file")
            header = _safetensors_header(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as e:
            raise ValueError(
                f"{path} is missing, truncated or damaged ({str(e)[:300]}); fetch it again"
            ) from None
        if twice := files.keys() & header.keys():
            raise ValueError(
                f"{min(twice)} is in both {files[min(twice)][0]} and {path}, and readers differ "
                "over which counts; fetch both again, they are shards of two downloads or saves"
            )
        files |= {name: (path, entry) for name, entry in header.items()}
    return files


def _safetensors_header(path: Path) -> dict[str, dict]:
    """Return {tensor name: {"dtype", "shape", "data_offsets"}} after safetensors' own checks.

    Those refuse holes, overlaps and sizes that do not add up; a name given twice passes them.
    """
    with open(path, "rb") as f:
        first = f.read(8)
        if LFS.startswith(first) and is_lfs_pointer(path):
            raise ValueError(LFS_REMEDY)
        size = int.from_bytes(first, "little")
        if size > MOST_JSON:
            raise ValueError(f"a header of {size:,} bytes, need at most {MOST_JSON:,}")
        text = f.read(size)
    with safe_open(path, framework="pt"):
        pairs = json.loads(text, object_pairs_hook=list)
    header = {name: dict(entry) for name, entry in pairs}
    if len(header) < len(pairs):
        raise ValueError("a name is twice in its header")
    header.pop("__metadata__", None)
    return header


def _check_names(place: Path, expected: Set[str], found: Set[str]) -> None:
    """Raise ValueError unless a checkpoint's tensors are those expected."""
    missing, unknown = expected - found, found - expected
    if missing == {"lm_head.weight"} and not unknown:
        raise ValueError(
            f"{place} lacks lm_head.weight, while config.json says tie_word_embeddings: false; set "
            "it to true where the embedding is the head too (Unsloth and mergekit write such "
            "folders), else fetch the weights again"
        )
    if unknown:
        _refuse_prefix(place, expected, found)
    if scales := sorted(name for name in unknown if QUANTISED.search(str(name))):
        raise ValueError(f"{place} has {len(scales)} tensors like {scales[0]:.99}; {UNQUANTISED}")
    for problem, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            some = sorted(map(str, names))[:3]
            raise ValueError(
                f"{place} {problem} {len(names)} tensor(s), {some!r:.200}; its config and its "
                "weights do not belong together: fetch both from one place"
            )


def _refuse_prefix(place: Path, expected: Set[str], found: Set[str]) -> None:
    """Raise ValueError if all names are the expected ones with, or without, a prefix."""
    if found and (whole := {f"model.{name}" for name in found}) <= expected:
        how = " without its lm_head; take the whole model's checkpoint"
        if whole == expected:
            how = "; resave it: python -c 'from transformers import AutoModelForCausalLM as M; "
            how += f'M.from_pretrained("{place}").save_pretrained("{place}-whole")\''
        raise ValueError(
            f"{place}: its names lack the prefix 'model.', it was saved from transformers' base "
            f"model{how}"
        )
    names = [str(name) for name in found]
    inside = {name.removesuffix(EMBEDDING) for name in names if name.endswith(EMBEDDING)} - {""}
    if inside := sorted(inside | {m[0] for name in names for m in WRAPPERS.finditer(name)}):
        raise ValueError(
            f"{place}: its names have {inside[0]!r} in them, of a model that was saved wrapped "
            "(DDP, FSDP, torch.compile, PEFT, a vision model); save what is inside it, or rename "
            "them"
        )


# ------------------------------------------------------------------------------------ Meta's format

# Our parameter names -> Meta's. There w1 is the gate, w2 the way down, w3 the way up.
META_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _meta_files(folder: Path) -> list[Path]:
    """Return consolidated.00.pth and so on, one file for each rank of Meta's model parallelism."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    got = [path.name for path in paths]
    if not got and list(folder.glob("consolidated*.safetensors")):
        raise ValueError(
            f"{folder} holds Mistral's own format (consolidated.safetensors and params.json), "
            "which is not read; take config.json, model*.safetensors and tokenizer.json of the "
            "same repository"
        )
    if not got or got != [f"consolidated.{i:02d}.pth" for i in range(len(got))]:
        raise ValueError(f"{folder}: need consolidated.00.pth and on, got {got}; fetch the rest")
    return paths


def _open_meta(path: Path) -> dict[str, Tensor]:
    """Return one of Meta's files, memory-mapped. Only tensors are ever unpickled from it."""
    if not path.is_file():
        raise ValueError(f"{path} is no plain file")
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is {LFS_REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("compressed, as no torch.save does: it could unpack to any size")
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # what a damaged pickle raises is anything
        raise ValueError(
            f"{path} is truncated, damaged, or a pickle of more than tensors, which is never run "
            f"({type(e).__name__}); fetch it again from where the weights are published"
        ) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} is no plain dict of tensors in fp32, fp16 or bf16")
    for name, t in tensors.items():
        if not isinstance(name, str) or not _is_plain(t):
            raise ValueError(
                f"{path} is no plain dict of tensors in fp32, fp16 or bf16: {str(name)[:60]} is "
                "empty, sparse, a view of something else, or no tensor; fetch it again"
            )
    return tensors


def _is_plain(t: object) -> bool:
    """Return whether the file holds every number that a tensor's shape claims.

    A tensor with a stride of 0, or without memory (sparse, meta), could claim any size.
    """
    floats = torch.float32, torch.float16, torch.bfloat16
    return (
        isinstance(t, Tensor)
        and t.dtype in floats
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and t.ndim in (1, 2)
        and t.numel() > 0
        and t.is_contiguous()
        and t.numel() * t.itemsize <= t.untyped_storage().nbytes()
    )


def _hf_from_meta(folder: Path, params: dict) -> dict:
    """Translate params.json to a config.json; missing widths come from the first file's shapes."""
    files = _meta_files(folder)
    first = _open_meta(files[0])
    embedding, output = first.get("tok_embeddings.weight"), first.get("output.weight")
    gate = first.get("layers.0.feed_forward.w1.weight")
    matrices = [t for t in (embedding, gate, output) if t is not None]
    if embedding is None or gate is None or any(t.ndim != 2 for t in matrices):
        raise ValueError(f"{files[0]} lacks a matrix tok_embeddings or layers.0.feed_forward.w1")
    # Llama 3.2 ties the two, and may store both. The first row is compared first: it is cheap.
    tied = output is None or (
        torch.equal(output[0], embedding[0]) and torch.equal(output, embedding)
    )
    vocab = params.get("vocab_size", -1)  # -1 in Llama 2: as many as the tokenizer has
    if vocab == -1:
        vocab = (embedding if output is None else output).shape[0] * len(files)
    hf = {
        "hidden_size": params.get("dim"),
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads"),
        "head_dim": params.get("head_dim"),
        "intermediate_size": gate.shape[0] * len(files),
        "vocab_size": vocab,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta"),
        "sliding_window": params.get("sliding_window"),  # Mistral 0.1; refused by from_hf
        "tie_word_embeddings": tied,
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }
    if vocab == 128256:  # Llama 3; params.json itself never has the window
        hf["max_position_embeddings"] = 8192
    if params.get("use_scaled_rope"):  # Llama 3.1 on; 3.2, the tied one, divides by 32
        hf["max_position_embeddings"] = 131072
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor", 32.0 if tied else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
            "original_max_position_embeddings": 8192,
        }
    return {key: value for key, value in hf.items() if value is not None}


def _meta_tensors(folder: Path, shapes: dict, config) -> Callable[[str], Tensor]:
    """Check the shards of Meta's tensors by name and shape; return what reads one and joins it."""
    paths, half = _meta_files(folder), config.head_dim // 2
    expected = {_meta_name(name): shape for name, shape in shapes.items()}
    ignored = {"rope.freqs"} | ({"output.weight"} if config.tie_embeddings else set())
    held = [{name: t.shape for name, t in _open_meta(path).items()} for path in paths]
    for path, found in zip(paths, held, strict=True):
        _check_names(path, expected.keys(), found.keys() - ignored)
    split = {n: _split_dim(folder, n, s, [f[n] for f in held]) for n, s in expected.items()}

    # Opened again for each block, so that the pages of the memory-mapped files do not add up.
    @lru_cache(1)
    def shards(block: str) -> list[dict[str, Tensor]]:
        return [_open_meta(path) for path in paths]

    def read(name: str) -> Tensor:
        theirs = _meta_name(name)
        parts = [shard[theirs] for shard in shards(".".join(theirs.split(".")[:2]))]
        whole = parts[0] if split[theirs] is None else torch.cat(parts, split[theirs])
        check_finite(whole, theirs, paths[0])
        if "q_proj" in name or "k_proj" in name:  # neighbours (2j, 2j + 1) -> halves
            whole = whole.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return whole

    return read


def _meta_name(name: str) -> str:
    name = name.removeprefix("model.")
    for ours, theirs in META_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name


def _split_dim(folder: Path, name: str, whole: tuple, parts: list[tuple]) -> int | None:
    """Return the dimension that the shards cut; None if each holds the whole tensor.

    By shape, because it differs: Llama 3 cuts the token embedding's rows, Llama 2 its columns.
    """
    if all(part == whole for part in parts):
        return None
    for cut, n in enumerate(whole):
        size = (*whole[:cut], n // len(parts), *whole[cut + 1 :])
        if n % len(parts) == 0 and all(part == size for part in parts):
            return cut
    raise ValueError(
        f"{folder}: {name} is {[tuple(p) for p in parts]} in {len(parts)} files, params.json asks "
        f"for {tuple(whole)}; a file is missing, or they do not belong together"
    )


# ---------------------------------------------------------------------------------------------- out

# Carried into an export unchanged, next to weights and tokenizer: licences and chat templates.
CARRIED = (
    "LICENSE* LICENCE* COPYING* NOTICE* USE_POLICY* chat_template.json additional_chat_templates/*"
).split()
TEMPLATES = "additional_chat_templates"
# Files next to the weights that an export may leave out: the weights in other formats, what only
# the original folder needs, and what an export writes itself.
NO_LOSS = re.compile(
    r"(model|pytorch_model|consolidated|flax_model|tf_model|rust_model).*|params\.json|\..*|"
    r"config\.json|generation_config\.json|checklist\.chk|longred\.json|log\.jsonl"
)


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files in a folder that `new_folder` may have written there."""
    names = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    weights = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
    names |= set(TOKENIZER_FILES)
    if folder.is_symlink() or not folder.is_dir():
        return []
    ours = [p for p in folder.iterdir() if p.name in names or weights.fullmatch(p.name)]
    return [p for p in (*ours, *carried_files(folder)) if p.is_file()]


def carried_files(folder: Path) -> list[Path]:
    """Return the licences and chat templates in a checkpoint's folder."""
    found = (path for pattern in CARRIED for path in sorted(folder.glob(pattern)))
    return [path for path in found if path.is_file()]


def drop_checkpoint(folder: Path, but: Iterable[str] = ()) -> None:
    """Remove an export's files except `but`, and the folder if nothing else is in it."""
    for path in checkpoint_files(folder):
        if path.name not in but:
            path.unlink()
    for place in (folder / TEMPLATES, folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a folder to write a checkpoint in, which is renamed to out_dir once it is complete.

    An older checkpoint there is replaced; other files in its folder stay. Raises ValueError if
    out_dir holds anything else.
    """
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} exists and is no checkpoint; pass another folder or remove it")
    for left in unfinished(out_dir):
        drop_checkpoint(left)
    partial = free_name(out_dir.with_name(f"{out_dir.name}.{os.getpid()}.partial"))
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:  # a full disk, say, on which its size is missed
        drop_checkpoint(partial)
        raise
    for shard in partial.glob("*.safetensors"):  # written for the owner's eyes only by safetensors
        shutil.copymode(partial / "config.json", shard)
    new = {path.name for path in partial.iterdir()}

    def drop(older: Path) -> None:
        names = {path.name for path in checkpoint_files(older) if path.parent == older}
        # A tokenizer.model, say, that its user put there stays.
        drop_checkpoint(older, but=[n for n in names if n[:5] != "model" and n not in new])

    publish(partial, out_dir, drop)


def client_notes(folder: Path) -> list[str]:
    """Return what other programs get wrong about an export, a line each; [] if nothing is known."""
    hf, notes = read_json(folder / "config.json"), []
    kind = (hf.get("rope_scaling") or {}).get("rope_type")
    if kind == "yarn":
        notes.append("note: yarn is silently wrong in transformers below 4.51")
    if kind == "linear":
        window = hf["max_position_embeddings"]
        notes.append(f"note: vLLM needs --max-model-len {window} with linear scaling")
    path = folder / "tokenizer.json"
    try:  # of any size, unlike a config
        tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rules = str([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
        sentencepiece = tokenizer.get("model", {}).get("byte_fallback")  # its mark
    except (ValueError, AttributeError, RecursionError):
        return notes
    if sentencepiece and not (folder / "tokenizer.model").is_file():
        notes.append(
            "note: llama.cpp tokenises otherwise without sentencepiece's tokenizer.model: copy "
            f"the original's into {folder} before converting"
        )
    if tokenizer and hf.get("model_type") == "qwen2" and not all(x in rules for x in QWEN2_RULES):
        notes.append(
            "note: transformers 5 cuts the text of every qwen2 as Qwen2 does, which this "
            "tokenizer.json does not: open it by PreTrainedTokenizerFast.from_pretrained"
        )
    return notes


# What Qwen2's tokenizer.json does with a text beforehand, and with digits.
QWEN2_RULES = "'NFC'", r"|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|", "'add_prefix_space': False"
