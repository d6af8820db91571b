"""Short text sampled from the checkpoint itself, before a run: --short_data self[:N].

The text that Llama 3 was trained on is not published, but its weights can be sampled for similar
text. Texts are sampled in parts of a few dozen, each a function of (weights, seed, settings, part):
a stopped run continues with the next part, and a larger N only adds to what is there.

The sampled ids themselves are kept and read, not their text: a special token spelled out is a dozen
ordinary ones, and tokenising a text does not always give the tokens that it was made of.
"""

import json
import time
from pathlib import Path

import torch

from machine import plan, states
from machine.corpus import ids_header
from machine.files import digest, read_signed, signed, whole_file, write_json
from machine.tokenizer import Tokenizer
from model import Llama

DEFAULT_TEXTS = 2000
PART_TOKENS = 2**18  # whose keys and values are held at a time: 32 GiB for Llama-3-8B in bf16
CPU_FLOPS = 5e9  # FLOP/s of one core in small matmuls, assumed, for the plan alone


def count(spec: str) -> int | None:
    """Return how many texts "self" or "self:N" asks for; None for any other source of text."""
    head, colon, number = spec.partition(":")
    if head != "self" or Path(spec).exists():
        return None
    if colon and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"{spec}: need self or self:N, N texts of the checkpoint's own")
    return int(number) if colon else DEFAULT_TEXTS


def sample_ids(
    model: Llama,
    tokenizer: Tokenizer,
    n: int,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Sample n texts as token ids, each after BOS (else EOS) and at most `length` tokens with it.

    A text ends with its end of text, which is kept, or before any other id that no text becomes: a
    special token, a row that pads the embedding. Sampled in one batch with the KV cache, from the
    whole softmax. Raises ValueError where the tokenizer has neither BOS nor EOS.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise ValueError("its tokenizer has neither BOS nor EOS to start a text from")
    batch = torch.full((n, 1), first, device=model.embed_tokens.weight.device)
    rows = model.generate(batch, length - 1, temperature, generator=generator)[:, 1:].tolist()
    texts = []
    for ids in rows:
        end = next((i for i, t in enumerate(ids) if t not in tokenizer.ordinary), len(ids))
        texts.append(ids[: end + (ids[end : end + 1] == [tokenizer.eos_id])])
    return texts


def own_samples(
    c, n: int, length: int, source: Path, config, load, tokenizer: Tokenizer, asked: int
) -> tuple[str, dict]:
    """Return (a file of n texts up to `length` tokens, its cost), made now or found cached.

    source: the checkpoint's folder, config: its ModelConfig. load(): the whole model. asked: tokens
    that the run will read of them.
    """
    each = max(1, min(64, PART_TOKENS // length))
    key = [states.weight_fingerprints(source), tokenizer.fingerprint, c.seed, length, each]
    key += ["T=1, ids"]
    folder = Path(c.cache_dir) / ("samples-" + digest(key))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"part-{i:05d}.json" for i in range(-(-n // each))]
    left = [path for path in parts if read_signed(path) is None]
    print(
        f"own samples: {n:,} texts of up to {length:,} tokens, at most {n * length:,} tokens, read "
        f"{asked / (n * length):.2f} times over or more; {len(left)} of {len(parts)} parts to "
        f"make, about {len(left) * _hours(config, each, length, c.device):.2g} hours (assumed "
        f"speeds), kept in {folder}",
        flush=True,
    )
    model = load() if left else None
    began = time.monotonic()
    for done, path in enumerate(left):
        seed = int(digest([c.seed, path.name])[:12], 16)
        generator = torch.Generator(c.device).manual_seed(seed)
        part_began = time.monotonic()
        texts = sample_ids(model, tokenizer, each, length, generator)
        found = {"texts": texts, "seconds": time.monotonic() - part_began}
        write_json(path, signed(found), indent=None)
        to_go = (time.monotonic() - began) / (done + 1) * (len(left) - done - 1)
        print(
            f"own samples: part {done + 1}/{len(left)}  {each * length / found['seconds']:,.0f} "
            f"tok/s  ETA {to_go // 60:.0f}:{to_go % 60:02.0f}",
            flush=True,
        )
    made = [read_signed(path) for path in parts]
    texts = [ids for part in made for ids in part["texts"]][:n]
    whole, lines = folder / f"{n}.ids", "".join(f"{json.dumps(ids)}\n" for ids in texts)
    lines = ids_header(tokenizer.fingerprint) + lines
    if not whole.is_file() or whole.read_bytes() != lines.encode():
        with whole_file(whole) as f:  # under torchrun the first process does it
            f.write(lines)
    cost = {"texts": n, "tokens": sum(map(len, texts))}
    return str(whole), cost | {"seconds": round(sum(part["seconds"] for part in made), 1)}


def _hours(config, each: int, length: int, device: str) -> float:
    """Return hours a part: a GPU reads weights and half the cache each token, a CPU multiplies."""
    once = plan.flops(config, plan.Unit("", each, length))
    work = config.n_layers * (once["matmul"] + once["attention"]) + once["head"]
    if not device.startswith("cuda"):
        return work / CPU_FLOPS / 3600
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * each * length  # bytes, half
    return length * (2 * plan.parameter_count(config) + cache) / plan.H200.copy / 3600
