"""Llama: the network, its loss over a large vocabulary, generation, and checkpoints in and out.

Architecture (Llama 1-3, Mistral, Qwen2): token embedding, n_layers blocks of pre-norm attention and
SwiGLU MLP, final RMSNorm, LM head. Parameters carry Hugging Face's names: loading is a name map.

Rotary convention: half-split as in HF (dimension j pairs with j + H/2). Only Meta's own format
pairs neighbours (2j, 2j + 1); its q and k rows are permuted once, on load.

Checkpoints come from anywhere: a header or config that lies ends as ValueError in one line, before
any memory is taken for what it claims, and nothing in a file is ever run.

Shapes: B batch, T tokens, D d_model, N query heads, K kv heads, H head_dim, V vocab.
Activations in attention are (B, T, N, H) everywhere up to the SDPA call.
"""

import copy
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from rope_kernels import apply_rope, ntk_theta, rope_frequencies

# ---------------------------------------------------------------------------------------- config

# model_type -> (architecture written on save, bias on q, k and v unless the config says otherwise)
FAMILIES = {
    "llama": ("LlamaForCausalLM", False),
    "mistral": ("MistralForCausalLM", False),
    "qwen2": ("Qwen2ForCausalLM", True),
}


@dataclass
class ModelConfig:
    """The shape of a Llama; `hf` keeps the config.json it came from, to be carried over on save."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int  # independent of d_model / n_heads
    d_ff: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # transformers' form: {"rope_type": ..., "factor": ...}
    # The window, in tokens: informative, never enforced. None: unknown (Meta's Llama 1 and 2).
    max_position_embeddings: int | None = 8192
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    hf: dict = field(default_factory=dict)

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Read a config.json, in the spelling of transformers 4 or 5.

        hf: the parsed dict. Raises ValueError naming the entry that is missing, absurd or that
        describes something this Llama does not compute (sliding windows, partial rotary, ...).
        """
        family = str(hf.get("model_type", "llama"))
        if family not in FAMILIES:
            raise ValueError(f"model_type is {family:.60}, need one of {', '.join(FAMILIES)}")
        n_layers = _number(hf, "num_hidden_layers", most=1000)
        _refuse_unsupported(hf, family, n_layers)
        d_model = _number(hf, "hidden_size")
        n_heads = _number(hf, "num_attention_heads")
        n_kv_heads = _number(hf, "num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise ValueError(
                f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads "
                f"{n_kv_heads}; config.json is damaged or not a Llama's"
            )
        head_dim = _number(hf, "head_dim", d_model // n_heads)
        window = _number(hf, "max_position_embeddings", 2048, most=2**40)
        theta, scaling = _rope_from_hf(hf, window)
        rope_frequencies(head_dim, theta, scaling)  # a bad theta or scaling ends here, explained
        bias = family == "llama" and bool(hf.get("attention_bias", False))
        return cls(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=_number(hf, "intermediate_size"),
            vocab_size=_number(hf, "vocab_size"),
            norm_eps=_number(hf, "rms_norm_eps", 1e-6, most=1, kind=float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=window,
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bias or FAMILIES[family][1],
            o_bias=bias,
            mlp_bias=family == "llama" and bool(hf.get("mlp_bias", False)),
            hf=dict(hf),
        )

    def to_hf(self) -> dict:
        """Return config.json's content: what was read, with this shape, rotary and window in it.

        Rotary is written in transformers 4's spelling (rope_theta, rope_scaling); 5 reads it too.
        "ntk" has no name there and becomes the larger theta that it is.
        """
        hf = {"model_type": "llama", "hidden_act": "silu"} | self.hf
        hf.pop("rope_parameters", None)
        hf.setdefault("architectures", [FAMILIES[hf["model_type"]][0]])
        theta, scaling = self.rope_theta, self.rope_scaling
        if scaling and scaling["rope_type"] == "ntk":
            theta, scaling = ntk_theta(self.head_dim, theta, scaling["factor"]), None
        hf.update(
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.d_ff,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=self.tie_embeddings,
        )
        if self.max_position_embeddings:
            hf["max_position_embeddings"] = self.max_position_embeddings
        if hf["model_type"] == "llama":
            hf.update(attention_bias=self.qkv_bias, mlp_bias=self.mlp_bias)
        return hf

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype that the checkpoint's config names for its weights, None if it names none."""
        name = str(self.hf.get("dtype") or self.hf.get("torch_dtype"))
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return names.get(name)


def _number(hf: dict, key: str, default=None, most: int = 2**20, kind: type = int):
    """An entry of somebody's config.json. 2^20 is far above any Llama, and no product overflows."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) is not kind or not 0 < value <= most:
        need = f"a number ({kind.__name__}) above 0, at most {most}"
        raise ValueError(f"{key} is {value!r:.60}, need {need}")
    return value


def _refuse_unsupported(hf: dict, family: str, n_layers: int) -> None:
    """What this model computes: each entry and the values it may have. Absent ones are fine."""
    if family == "mistral":
        hf = {"sliding_window": 4096} | hf  # transformers' default
    if family == "qwen2" and not hf.get("use_sliding_window"):
        hf = hf | {"sliding_window": None}
    for key, computed in {
        "sliding_window": (None,),
        "layer_types": (None, ["full_attention"] * n_layers),
        "hidden_act": (None, "silu"),
        "partial_rotary_factor": (None, 1.0),
        "quantization_config": (None,),
    }.items():
        if hf.get(key) not in computed:
            raise ValueError(
                f"{key} is {hf[key]!r:.60}, which this model does not compute; it needs full "
                "attention, SiLU, full rotary and plain weights"
            )


def _rope_from_hf(hf: dict, window: int) -> tuple[float, dict | None]:
    """(theta, scaling) from transformers 4's two keys or 5's one."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling is {scaling!r:.60}, need an object or null")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", None)
    theta = hf.get("rope_theta") if theta is None else theta
    if theta is None:
        print("the config gives no rope_theta: using 10,000, as the first Llama 2 releases meant")
        theta = 10_000.0
    return theta, _scaling(scaling, window)


def _scaling(scaling: dict, window: int | None) -> dict | None:
    """The scaling as ModelConfig keeps it: None for none, every key under its newest name."""
    scaling = dict(scaling)
    kind = scaling.pop("type", None)  # the key's name before transformers 4.43
    if scaling.setdefault("rope_type", kind or "default") == "default":
        return None
    if scaling["rope_type"] == "yarn":  # unwritten, it is the window itself
        scaling.setdefault("original_max_position_embeddings", window)
    return scaling


# ----------------------------------------------------------------------------------------- model


@dataclass
class KVCache:
    """Keys and values of the tokens read: per block (B, S, K, H), `length` of the S filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


class Attention(nn.Module):
    exchange = None  # set by runs.Life.shard where several processes share each sequence

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d_query, d_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, d_query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d_query, config.d_model, bias=config.o_bias)

    def qkv(self, x: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> rotated q (B, T, N, H), rotated k and plain v (B, T, K, H)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, k, *rope)
        return q, k, v

    def forward(self, x: Tensor, rope: tuple, cached: tuple | None = None) -> Tensor:
        q, k, v = self.qkv(x, rope)
        if self.exchange:  # a part of the tokens, all heads -> all tokens, a part of the heads
            q, k, v = (self.exchange(t, 2, 1) for t in (q, k, v))
        start = 0
        if cached is not None:
            keys, values, start = cached
            end = start + x.shape[1]
            keys[:, start:end], values[:, start:end] = k, v
            k, v = keys[:, :end], values[:, :end]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, H) views
        out = _causal_attention(q, k, v, start).transpose(1, 2)  # (B, T, N, H)
        if self.exchange:
            out = self.exchange(out, 1, 2)
        return self.o_proj(out.flatten(2))  # (B, T, D)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Causal by index, never by position id. start: tokens before the first query (KV cache).

    No mask tensor is ever built. On a GPU in bf16 or fp16 only cuDNN's and the flash kernel may
    answer: a silent fall back to the O(T^2) one would end in an out-of-memory error at 32K.
    """
    pinned = nullcontext()
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        pinned = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    elif q.is_cuda and k.shape[1] < q.shape[1]:  # in fp32 only the O(T^2) kernel takes fewer heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    with pinned:
        if start == 0:
            width, scale = q.shape[-1], q.shape[-1] ** -0.5
            if width < 16 and not q.is_cuda:  # torch's CPU kernel: 1.6 x as fast at 16 as at 8
                q, k, v = (F.pad(t, (0, 16 - width)) for t in (q, k, v))
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )[..., :width]
        # is_causal would align the triangle top-left, which is wrong when there are more keys.
        bias = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


class MLP(nn.Module):
    recomputing = False  # set by memory._again while a block runs again only for what it saves

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)
        # Set by memory.use. rows: tokens in a tile of _TiledMLP, 0: all at once by plain autograd.
        self.rows, self.keep = 0, False

    def forward(self, x: Tensor) -> Tensor:
        if self.rows:
            weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            return _TiledMLP.apply(x, *weights, self.rows, self.keep, self.recomputing)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _TiledMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) in tiles of tokens, keeping x alone, or x, gate and up.

    forward     a = silu(x Wg') * (x Wu'),  y = a Wd'
    backward    da = dy Wd;  dup = da * silu(gate);  dgate = silu'(gate) (da * up)
                dx = dgate Wg + dup Wu;  dWd = dy' a;  dWg = dgate' x;  dWu = dup' x
    Gradients of the weights are summed over tiles in fp32. Without `keep`, backward makes gate and
    up again. A recomputed block makes those two products again anyway; here its second run leaves
    them to us (`recomputing`), so tiling costs no matmul, only the traffic of the fp32 sums.
    """

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, rows, keep, recomputing):
        ctx.rows = rows
        if recomputing:
            ctx.save_for_backward(x, gate_weight, up_weight, down_weight)
            return x.detach()  # of the right shape; the checkpoint stops here and drops it
        flat = x.flatten(0, -2)  # (B T, D)
        out = torch.empty_like(flat)
        weights = gate_weight, up_weight
        kept = [flat.new_empty(len(flat), len(w)) for w in weights] if keep else []
        for i in range(0, len(flat), rows):
            tile = slice(i, i + rows)
            if keep:
                gate, up = (whole[tile] for whole in kept)
                torch.mm(flat[tile], gate_weight.T, out=gate)
                torch.mm(flat[tile], up_weight.T, out=up)
            else:
                gate, up = (F.linear(flat[tile], w) for w in weights)  # (rows, d_ff)
            torch.mm(F.silu(gate).mul_(up), down_weight.T, out=out[tile])
        ctx.save_for_backward(x, *weights, down_weight, *kept)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad_out):
        x, gate_weight, up_weight, down_weight, *kept = ctx.saved_tensors
        flat, grad_out = x.flatten(0, -2), grad_out.flatten(0, -2)
        grad_x = torch.empty_like(flat)
        sums = [None, None, None]  # gradients of gate, up and down
        for i in range(0, len(flat), ctx.rows):
            tile = slice(i, i + ctx.rows)
            if kept:
                gate, up = (whole[tile] for whole in kept)
            else:
                gate, up = (F.linear(flat[tile], w) for w in (gate_weight, up_weight))
            grad_gate, grad_up = _swiglu_backward(grad_out[tile], gate, up, down_weight, sums)
            _add_product(sums, 0, grad_gate, flat[tile])
            _add_product(sums, 1, grad_up, flat[tile])
            torch.mm(grad_gate, gate_weight, out=grad_x[tile])
            grad_x[tile].addmm_(grad_up, up_weight)
            del gate, up, grad_gate, grad_up  # or they would outlive the next tile's first half
        return grad_x.view_as(x), *sums, None, None, None


def _swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor, down_weight: Tensor, sums: list):
    """From (rows, D) to the gradients of gate and up, (rows, d_ff); adds that of down to sums."""
    act = F.silu(gate)
    _add_product(sums, 2, grad_out, act * up)
    grad_act = grad_out @ down_weight
    grad_up = act.mul_(grad_act)
    return torch.ops.aten.silu_backward(grad_act.mul_(up), gate), grad_up


def _add_product(sums: list, i: int, a: Tensor, b: Tensor) -> None:
    product = fp32_product(a.T, b)
    sums[i] = product if sums[i] is None else sums[i].add_(product)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; from bf16 the GPU's matmul writes its fp32 sums without rounding them."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple, cached: tuple | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama, on the current default device; `init_weights` or `load_checkpoint` fills it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.run_block = None  # set by memory.use: how a block runs while gradients are on
        # Not a buffer: .to(bfloat16) casts buffers, and bf16 frequencies are off by whole turns.
        with torch.device("cpu"):
            self.inv_freq, self.attention_factor = rope_frequencies(
                config.head_dim, config.rope_theta, config.rope_scaling
            )

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D): the LM head, which is the embedding itself where the two are tied."""
        return (self.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> "Llama":
        """Fill for training from scratch: normal matrices, unit norms, zero biases."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(0.0, std, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        taps: tuple[int, ...] = (),
        cache: KVCache | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read tokens; return the last hidden state and the tapped ones. Any length runs.

        input_ids: (B, T) int64.
        position_ids: (B, T) or (T,) int64 >= 0, rotary positions; default: the tokens' own indices.
        taps: hidden-state indices as in HF: 0 = embeddings, i = output of block i,
            n_layers = after the final norm (= the last hidden state).
        cache: tokens already read; extended in place by these.
        Returns (last_hidden (B, T, D), {index: (B, T, D)}).
        """
        start = cache.length if cache else 0
        if position_ids is None:
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        if self.inv_freq.device != input_ids.device:
            self.inv_freq = self.inv_freq.to(input_ids.device)
        rope = (position_ids, self.inv_freq, self.attention_factor)
        x = self.embed_tokens(input_ids)  # (B, T, D)
        hidden = {0: x} if 0 in taps else {}
        for i, block in enumerate(self.layers):
            if self.run_block is not None and torch.is_grad_enabled():
                x = self.run_block(i, block, x, rope)
            else:
                x = block(x, rope, (cache.keys[i], cache.values[i], start) if cache else None)
            if i + 1 in taps:
                hidden[i + 1] = x
        if cache:
            cache.length += input_ids.shape[1]
        hidden[self.config.n_layers] = self.norm(x)
        return hidden[self.config.n_layers], {i: hidden[i] for i in taps}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> (..., V). At T = 32768 and V = 128256 that is 15.7 GiB in fp32."""
        return F.linear(hidden, self.lm_head_weight)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_len` tokens, in the weights' dtype."""
        shape = (batch, max_len, self.config.n_kv_heads, self.config.head_dim)
        like = self.embed_tokens.weight
        keys, values = ([like.new_empty(shape) for _ in self.layers] for _ in range(2))
        return KVCache(keys, values)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        pcd: dict | None = None,
        generator: torch.Generator | None = None,
        chunk_len: int = 4096,
    ) -> Tensor:
        """Continue each row by exactly max_new_tokens; an end-of-text token does not stop it.

        input_ids: (B, T) int64. temperature: 0.0 = greedy, else the softmax is sampled, from
        `generator` where given. Returns (B, T + max_new_tokens).
        pcd: decode by contrast (`contrast`, arXiv 2506.08371); a dict of what differs from PCD,
            {} for the paper's settings. Every token is then read twice, into a cache each, since
            keys are kept rotated and hidden states differ from the second block on: twice the
            time and twice the cache (Llama-3-8B in bf16: 256 KiB a token, 8 GiB at 32K).
        chunk_len: prompt tokens a row read at a time. The prompt's keys and values must fit (16 GiB
            for 8B at 128K in bf16); activations take the room of one chunk only.
        """
        batch, length = input_ids.shape
        out = torch.cat([input_ids, input_ids.new_zeros(batch, max_new_tokens)], dim=1)
        models = [self]
        if pcd is not None:
            if not pcd.keys() <= PCD.keys():
                raise ValueError(f"pcd: got {', '.join(pcd)}, need some of {', '.join(PCD)}")
            pcd = PCD | pcd
            models.append(local_view(self, pcd))
        caches = [model.new_cache(batch, length + max_new_tokens) for model in models]
        new = input_ids
        for end in range(length, length + max_new_tokens):
            logits = []  # (B, V) each, with pcd also the local-aware ones
            for model, cache in zip(models, caches, strict=True):
                for part in new.split(chunk_len, dim=1):
                    hidden, _ = model(part, cache=cache)
                logits.append(model.logits(hidden[:, -1]).float())
            logits = contrast(*logits, pcd["beta"], pcd["gamma"]) if pcd else logits[0]
            if temperature == 0.0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs = (logits / temperature).softmax(-1)
                new = torch.multinomial(probs, 1, generator=generator)
            out[:, end : end + 1] = new
        return out


# ------------------------------------------------------------ positional contrastive decoding (PCD)

PCD = {"alpha": 0.2, "beta": 2.5, "base_ratio": 1e-4, "gamma": 30}  # the paper's best


def local_frequencies(inv_freq: Tensor, alpha: float, base_ratio: float) -> Tensor:
    """PCD's local-aware frequencies: fast planes as they are, slow ones turned too fast.

    For j = 1 .. H/2, x = 2 j / H, T(x) = 2 - exp(alpha x):
        inv_freq*_j = T(x) inv_freq_j + (1 - T(x)) inv_freq_j base_ratio^(-2 (j - 1) / H)
    The last factor is the frequency under base_ratio times the base. inv_freq: (H/2,) float64.
    Theta 5e5, H = 128 and the paper's settings turn the slowest plane 1,918 times faster.
    """
    half = len(inv_freq)
    j = torch.arange(1, half + 1, dtype=torch.float64, device=inv_freq.device)
    keep = 2.0 - torch.exp(alpha * j / half)  # T(x)
    return inv_freq * (keep + (1.0 - keep) * base_ratio ** (-(j - 1) / half))


def local_view(model: Llama, pcd: dict) -> Llama:
    """The same weights under PCD's local-aware frequencies. pcd: as PCD, all of it."""
    view = copy.copy(model)
    view.inv_freq = local_frequencies(model.inv_freq, pcd["alpha"], pcd["base_ratio"])
    return view


def contrast(logits: Tensor, local: Tensor, beta: float, gamma: int) -> Tensor:
    """(1 + beta) logits - beta local on the gamma likeliest tokens of `logits`, -inf elsewhere.

    logits, local: (B, V) fp32, under ordinary and under local-aware rotary frequencies.
    """
    top = logits.topk(min(gamma, logits.shape[-1])).indices  # (B, gamma)
    mixed = (1.0 + beta) * logits.gather(-1, top) - beta * local.gather(-1, top)
    return torch.full_like(logits, -torch.inf).scatter(-1, top, mixed)


# ------------------------------------------------------------------------- loss and attention drift


LOSS_ROWS = 4096  # tokens whose logits exist at a time, on a GPU


class _NextTokenLoss(torch.autograd.Function):
    """Sum of next-token losses, with the gradients formed chunk by chunk during the forward pass.

    Each chunk of rows makes its logits, turns them in place into softmax - onehot, and leaves
    d(hidden) and its part of d(weight): three matmuls in all, as without chunking.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, with_grad):  # (M, D), (V, D), (M,)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        for i in range(0, hidden.shape[0], rows):
            h = hidden[i : i + rows]
            nll, grad = _chunk_loss(h, weight, labels[i : i + rows], with_grad)
            total += nll
            if with_grad:
                torch.mm(grad, weight, out=grad_hidden[i : i + rows])
                grad_weight += fp32_product(grad.T, h)
            del grad  # (rows, V), or it would be alive while the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: at V = 128256 a copy would be 2 GiB. A second backward is refused by torch.
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None


def _chunk_loss(h: Tensor, weight: Tensor, labels: Tensor, with_grad: bool):
    """(sum of nll, d(logits) in h's dtype or None). A function, so that its logits die with it."""
    logits = F.linear(h, weight).float()  # (rows, V)
    counted = labels != -100
    target = labels.clamp(min=0)[:, None]
    lse = logits.logsumexp(-1)
    nll = torch.where(counted, lse - logits.gather(-1, target)[:, 0], 0.0).sum()
    if not with_grad:
        return nll, None
    grad = logits.sub_(lse[:, None]).exp_()
    grad.scatter_add_(-1, target, grad.new_full(target.shape, -1.0))
    return nll, grad.mul_(counted[:, None]).to(h.dtype)


def next_token_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy straight from hidden states, without ever holding (T, V) logits.

    hidden: (B, T, D), the last hidden state. lm_head_weight: (V, D).
    labels: (B, T) int64, already shifted; -100 is not counted.
    chunk_rows: tokens whose logits exist at a time; default 4096 on a GPU (2 GiB of fp32 logits at
        V = 128256, and few passes over d(weight)), 256 on a CPU.
    Returns (sum of nll, fp32 scalar with gradient; number of counted labels, int64 scalar).
    """
    assert hidden.shape[:-1] == labels.shape, (hidden.shape, labels.shape)
    rows = chunk_rows or (LOSS_ROWS if hidden.is_cuda else 256)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad)
    flat = labels.flatten()
    total = _NextTokenLoss.apply(hidden.flatten(0, -2), lm_head_weight, flat, rows, with_grad)
    return total, (flat != -100).sum()


@torch.no_grad()
def merge_weights(model: Llama, original: Llama, share: float) -> Llama:
    """share x original + (1 - share) x model, parameter by parameter, in place; returns model.

    The last stage of LongRecipe (arXiv 2409.00509, share 0.5). Rotary settings stay the model's.
    """
    for p, old in zip(model.parameters(), original.parameters(), strict=True):
        assert p.shape == old.shape, (p.shape, old.shape)
        p.copy_(torch.lerp(p.float(), old.to(p.device).float(), share))
    return model


KL_NUMBERS = 2**26  # of an attention map that exist at a time


@torch.no_grad()
def attention_kl(a: Llama, b: Llama, input_ids: Tensor) -> Tensor:
    """How far the attention of b has drifted from a's, head by head (LongReD section 3, eq. 6).

    input_ids: (B, T) int64, read by both under ordinary positions.
    Returns (n_layers, n_heads) fp32: KL(attention of a || attention of b), mean over positions.
    The two run in lockstep and the (T, T) maps exist only as chunks of rows of KL_NUMBERS
    numbers, so an 8B model reads 8,192 tokens in about 1.5 GiB beyond the weights.
    """
    batch, length = input_ids.shape
    rows = max(1, KL_NUMBERS // (batch * a.config.n_heads * length))
    positions = torch.arange(length, device=input_ids.device)
    hidden = [m.embed_tokens(input_ids) for m in (a, b)]
    ropes = [(positions, m.inv_freq.to(input_ids.device), m.attention_factor) for m in (a, b)]
    kl = torch.zeros(a.config.n_layers, a.config.n_heads, device=input_ids.device)
    for i, blocks in enumerate(zip(a.layers, b.layers, strict=True)):
        qk = [
            block.self_attn.qkv(block.input_layernorm(x), rope)[:2]
            for block, x, rope in zip(blocks, hidden, ropes, strict=True)
        ]
        for start in range(0, length, rows):
            log_a, log_b = (_attention_log_probs(q, k, start, start + rows) for q, k in qk)
            diff = (log_a - log_b).masked_fill_(log_a.isneginf(), 0.0)
            kl[i] += log_a.exp_().mul_(diff).sum((0, 2, 3)) / (batch * length)
        hidden = [block(x, r) for block, x, r in zip(blocks, hidden, ropes, strict=True)]
    return kl


def _attention_log_probs(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Rows start..end of the causal attention map, as logs: (B, N, rows, keys) fp32."""
    q, k = q[:, start:end].transpose(1, 2).float(), k[:, :end].transpose(1, 2).float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, N, keys, H)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
    return scores.masked_fill_(future, -torch.inf).log_softmax(-1)


# -------------------------------------------------------------------------------------- checkpoints

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
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json tokenizer.model vocab.json "
    "merges.txt added_tokens.json chat_template.jinja"
).split()
SHARD_SIZE = "5GB"
# Bytes of JSON read at most: the largest real header is below 1 MB, and a parse takes many times
# the text, so that a forged one could take all memory.
MOST_JSON = 2**22
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


def resolve_checkpoint(path_or_name: str | os.PathLike) -> Path:
    """Find the folder of a checkpoint: a folder, an OUT_DIR holding hf/, a known name, a hub id.

    Local folders win. Raises ValueError saying which names exist or how to provide the weights.
    """
    text = str(path_or_name)
    folder = Path(text).expanduser()
    for candidate in (folder, folder / "hf"):
        if (candidate / "config.json").is_file() or (candidate / "params.json").is_file():
            return candidate
    if folder.exists():
        raise ValueError(
            f"{folder} holds no config.json (nor does {folder / 'hf'}): need a Hugging Face folder "
            "with config.json, model.safetensors and tokenizer.json, or Meta's with params.json, "
            "consolidated.00.pth and tokenizer.model"
        )
    repo = HUB_NAMES.get(text.lower(), text)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith((".", "/")):
        raise ValueError(
            f"no checkpoint {text!r}: not a folder here, not a hub id owner/name, and not one of "
            f"{', '.join(HUB_NAMES)}"
        )
    return _download(text, repo)


def _download(name: str, repo: str) -> Path:
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
    login = "your token was refused" if get_token() else "you are not logged in"
    try:
        found = snapshot_download(
            repo,
            allow_patterns=[*wanted, *TOKENIZER_FILES],
            ignore_patterns=["original/*", "consolidated*"],  # Meta's copy doubles the download
        )
        return Path(found)
    except GatedRepoError:
        reason = f"its licence must be accepted at https://huggingface.co/{repo}, and {login}"
    except RepositoryNotFoundError:
        reason = f"the hub has no such repository, or it is private and {login}"
    except Exception as e:  # a dozen network errors from three libraries
        said = " ".join(str(e.__cause__ or e).split())
        reason = f"nothing is cached, the hub refused or is out of reach ({said:.100}), and {login}"
    raise ValueError(
        f"cannot get {name!r} from the hub as {repo}: {reason}. Either run `hf auth login` and `hf "
        f"download {repo} --exclude 'original/*'` where there is a network, or pass the folder: "
        "--ckpt /path/to/folder (with config.json, *.safetensors and tokenizer.json)"
    ) from None


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, else Meta's params.json. Raises ValueError naming the file and the fault.

    Of Meta's weights the headers are read too, for the widths that params.json leaves out.
    """
    folder = Path(folder)
    meta = not (folder / "config.json").is_file() and (folder / "params.json").is_file()
    path = folder / ("params.json" if meta else "config.json")
    hf = _read_json(path)
    if meta:
        hf = _hf_from_meta(folder, hf)
    try:
        config = ModelConfig.from_hf(hf)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if meta:  # unknown, rather than transformers' default
        config.max_position_embeddings = hf.get("max_position_embeddings")
    return config


def _read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, one line, whatever the file holds."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, need at most {MOST_JSON:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}; fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, need an object")
    return content


def load_checkpoint(
    path_or_name: str | os.PathLike,
    rope_theta: float | None = None,
    rope_scaling: dict | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shard=None,
) -> Llama:
    """Load a checkpoint into a Llama in eval mode, its rotary embedding rescaled on the way.

    path_or_name: folder, OUT_DIR, known name or hub id (see `resolve_checkpoint`).
    rope_theta: replaces the checkpoint's theta (ABF); its own scaling, if any, is kept.
    rope_scaling: replaces "no scaling"; {"rope_type": "default"} removes the checkpoint's own.
    shard: called with the empty model, before its memory is allocated.
    device, dtype: of the parameters. Each tensor goes straight into place, one in flight.
    Raises ValueError for a tensor missing, extra or misshapen, a damaged file, or two scalings
    on top of each other.
    """
    folder = resolve_checkpoint(path_or_name)
    config = load_config(folder)
    if rope_theta is not None:
        config.rope_theta = rope_theta
    if rope_scaling is not None:
        scaling = _scaling(rope_scaling, config.max_position_embeddings)
        if scaling and config.rope_scaling:
            raise ValueError(
                f"{folder} is already scaled by {config.rope_scaling}, on top of which "
                f"{scaling['rope_type']!r} is not defined; raise rope_theta instead, or "
                'remove the scaling first with rope_type "default"'
            )
        config.rope_scaling = scaling
    with torch.device("meta"):
        model = Llama(config)  # names and shapes, no memory
    tensors = _hf_tensors if (folder / "config.json").is_file() else _meta_tensors
    read = tensors(folder, model)
    model.to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            copy_whole(parameter, read(name))
    return model.eval()


def copy_whole(mine: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this process's shard of it where `mine` is sharded."""
    if isinstance(mine, DTensor):
        whole = whole.to(mine.device, mine.dtype)
        whole = distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None)
    mine.copy_(whole)


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _hf_tensors(folder: Path, model: Llama) -> Callable[[str], Tensor]:
    """Check a Hugging Face folder's tensors by name, shape and dtype; return what reads one."""
    expected = {_hf_name(n): list(p.shape) for n, p in model.named_parameters()}
    files = _weight_files(folder)
    ignored = {n for n in files if n.endswith(("rotary_emb.inv_freq", "rope.freqs"))}
    if model.config.tie_embeddings:
        ignored.add("lm_head.weight")  # some writers store the tied matrix twice
    _check_names(folder, expected.keys(), files.keys() - ignored)
    for name, shape in expected.items():
        path, entry = files[name]
        if entry["shape"] != shape or entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {name} is {entry['dtype']} {entry['shape']}, need F32, F16 or BF16 "
                f"{shape} by config.json; weights of another model, or quantised ones"
            )

    def read(name: str) -> Tensor:
        # Opened anew for each tensor, so that the pages of a memory-mapped file do not add up.
        with safe_open(files[_hf_name(name)][0], framework="pt") as f:
            return f.get_tensor(_hf_name(name))

    return read


def _weight_files(folder: Path) -> dict[str, tuple[Path, dict]]:
    """{tensor name: (file, its dtype and shape)}, from the headers alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map; fetch it again")
        names = sorted({Path(str(n)).name for n in names.values()})  # of this folder, no other
    else:
        raise ValueError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; download "
            "the weights, or convert .bin files with transformers' save_pretrained"
        )
    files = {}
    for path in (folder / n for n in names):
        try:
            header = _safetensors_header(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as e:
            raise ValueError(
                f"{path} is missing, truncated or damaged ({e}); fetch it again"
            ) from None
        if twice := files.keys() & header.keys():
            raise ValueError(f"{min(twice)} stands in both {files[min(twice)][0]} and {path}")
        files |= {name: (path, entry) for name, entry in header.items()}
    return files


def _safetensors_header(path: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}}, after safetensors' own checks.

    Those refuse holes, overlaps and sizes that do not add up; a name given twice passes them.
    """
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > MOST_JSON:
            raise ValueError(f"a header of {size:,} bytes, need at most {MOST_JSON:,}")
        text = f.read(size)
    with safe_open(path, framework="pt"):
        pairs = json.loads(text, object_pairs_hook=list)
    header = {name: dict(entry) for name, entry in pairs}
    if len(header) < len(pairs):
        raise ValueError("a name stands twice in its header")
    header.pop("__metadata__", None)
    return header


def _check_names(place: Path, expected: Set[str], found: Set[str]) -> None:
    """Tensor names, after those that may be ignored were taken out of `found`."""
    for problem, names in (("lacks", expected - found), ("has the unknown", found - expected)):
        if names:
            some = sorted(map(str, names))[:3]
            raise ValueError(
                f"{place} {problem} {len(names)} tensor(s), {some!r:.200}; its config and its "
                "weights do not belong together"
            )


def _meta_files(folder: Path) -> list[Path]:
    """consolidated.00.pth and on: one file for each rank of Meta's model parallelism."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    got = [path.name for path in paths]
    if not got or got != [f"consolidated.{i:02d}.pth" for i in range(len(got))]:
        raise ValueError(f"{folder}: need consolidated.00.pth and on, got {got}; fetch the rest")
    return paths


def _open_meta(path: Path) -> dict[str, Tensor]:
    """One of Meta's files, memory-mapped. Nothing but tensors is ever unpickled from it."""
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
    floats = torch.float32, torch.float16, torch.bfloat16
    good = isinstance(tensors, dict) and all(
        isinstance(t, Tensor) and t.dtype in floats for t in tensors.values()
    )
    if not good:
        raise ValueError(f"{path} is no plain dict of tensors in fp32, fp16 or bf16")
    return tensors


def _hf_from_meta(folder: Path, params: dict) -> dict:
    """params.json as a config.json; widths that it leaves out come from the first file's shapes."""
    files = _meta_files(folder)
    first = _open_meta(files[0])
    embedding, output = first.get("tok_embeddings.weight"), first.get("output.weight")
    gate = first.get("layers.0.feed_forward.w1.weight")
    if embedding is None or gate is None:
        raise ValueError(f"{files[0]} lacks tok_embeddings or layers.0.feed_forward.w1")
    # Llama 3.2 ties the two, and may store both. The first row tells for all others, cheaply.
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
    if vocab == 128256:  # Llama 3; no other params.json tells the window
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


def _meta_tensors(folder: Path, model: Llama) -> Callable[[str], Tensor]:
    """Check the shards of Meta's tensors by name and shape; return what reads one and joins it."""
    paths, half = _meta_files(folder), model.config.head_dim // 2
    expected = {_meta_name(n): p.shape for n, p in model.named_parameters()}
    ignored = {"rope.freqs"} | ({"output.weight"} if model.config.tie_embeddings else set())
    shapes = [{name: t.shape for name, t in _open_meta(path).items()} for path in paths]
    for path, found in zip(paths, shapes, strict=True):
        _check_names(path, expected.keys(), found.keys() - ignored)
    split = {n: _split_dim(folder, n, s, [f[n] for f in shapes]) for n, s in expected.items()}

    # Opened anew for each block, so that the pages of the memory-mapped files do not add up.
    @lru_cache(1)
    def shards(block: str) -> list[dict[str, Tensor]]:
        return [_open_meta(path) for path in paths]

    def read(name: str) -> Tensor:
        theirs = _meta_name(name)
        parts = [shard[theirs] for shard in shards(".".join(name.split(".")[:2]))]
        whole = parts[0] if split[theirs] is None else torch.cat(parts, split[theirs])
        if "q_proj" in name or "k_proj" in name:  # neighbours (2j, 2j + 1) -> halves
            whole = whole.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return whole

    return read


def _meta_name(name: str) -> str:
    for ours, theirs in META_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name


def _split_dim(folder: Path, name: str, whole: tuple, parts: list[tuple]) -> int | None:
    """Which dimension the shards cut; None: each holds the whole.

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


def save_checkpoint(
    model: Llama, out_dir: str | os.PathLike, tokenizer_from: str | os.PathLike | None = None
) -> Path:
    """Write a Hugging Face folder that transformers and vLLM open; weights in their own dtype.

    out_dir: written under a temporary name beside it, then renamed; an older checkpoint there is
        replaced, anything else is refused with ValueError.
    tokenizer_from: folder (or whatever --ckpt takes) whose tokenizer and generation_config files
        are carried over, with the new window.
    """
    from huggingface_hub import save_torch_state_dict

    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} exists and is no checkpoint; pass another folder or remove it")
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {_hf_name(n): p.detach() for n, p in model.named_parameters()}
    save_torch_state_dict(state, partial, max_shard_size=SHARD_SIZE)
    hf = model.config.to_hf()
    if tokenizer_from is not None:
        special = _carry_tokenizer(Path(tokenizer_from), partial, hf.get("max_position_embeddings"))
        hf = special | hf  # ids that Meta's params.json leaves to the tokenizer
    hf["torch_dtype"] = hf["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    _write_json(partial / "config.json", hf)
    for shard in partial.glob("*.safetensors"):  # written for the owner's eyes only by safetensors
        shutil.copymode(partial / "config.json", shard)
    previous = out_dir.with_name(out_dir.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(previous)
    partial.rename(out_dir)
    shutil.rmtree(previous, ignore_errors=True)
    return out_dir


def _carry_tokenizer(source: Path, out_dir: Path, window: int | None) -> dict:
    """Copy a checkpoint's tokenizer files, or convert the tokenizer.model of one that has no other.

    Returns the ids of begin and end of text where a conversion found them, as in config.json.
    """
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        source = resolve_checkpoint(source)
    found = {name for name in TOKENIZER_FILES if (source / name).is_file()}
    special = {}
    if "tokenizer.model" in found and "tokenizer.json" not in found:
        special = _convert_tokenizer(source, out_dir)
        found.remove("tokenizer.model")
    for name in (*found, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out_dir / name)
    settings = out_dir / "generation_config.json"
    if settings.is_file():  # an old max_length would stop generation inside the new window
        kept = {k: v for k, v in _read_json(settings).items() if k != "max_length"}
        _write_json(settings, kept)
    settings = out_dir / "tokenizer_config.json"
    if settings.is_file() and window:
        _write_json(settings, _read_json(settings) | {"model_max_length": window})
    return special


def _convert_tokenizer(source: Path, out_dir: Path) -> dict:
    """Write Meta's tokenizer.model as a tokenizer.json that encodes alike; refuse if it does not.

    Returns config.json's ids of begin and end of text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cutters
    from tokenizers.processors import TemplateProcessing

    from data import LLAMA3_PATTERN, llama3_special_tokens, load_tokenizer, read_ranks

    path = source / "tokenizer.model"
    original, ranks = load_tokenizer(source), read_ranks(path)
    if ranks:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]  # byte-level BPE's stand-ins
        spell = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
        special = llama3_special_tokens(len(ranks))
        merges = _merges(vocab, sorted(vocab, key=vocab.get))
        converted = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        cut = cutters.Split(Regex(LLAMA3_PATTERN), "isolated")
        level = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
        converted.pre_tokenizer = cutters.Sequence([cut, level])
        converted.decoder = decoders.ByteLevel()
    else:
        from sentencepiece import SentencePieceProcessor

        sp, blank = SentencePieceProcessor(model_file=str(path)), "\u2581"
        vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        special = [p for p, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i)]
        merged = [p for p, i in vocab.items() if p not in special and not sp.is_byte(i)]
        merges = _merges(vocab, sorted(merged, key=lambda p: -sp.get_score(vocab[p])))
        unknown = sp.id_to_piece(sp.unk_id())
        bytes_too = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
        converted = Tokenizer(models.BPE(vocab, merges, **bytes_too))
        spaces = [normalizers.Prepend(blank), normalizers.Replace(" ", blank)]
        converted.normalizer = normalizers.Sequence(spaces)
        decoder = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
        converted.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)])
        # Llama 3's file of that name is left behind: readers of Hugging Face folders take it for a
        # sentencepiece model, and break on it.
        shutil.copyfile(path, out_dir / path.name)
    converted.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    bos, eos = (converted.id_to_token(i) for i in (original.bos_id, original.eos_id))
    begin = [(bos, original.bos_id)]
    converted.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    probe = ["It's 12,345.67\n\n  \tdef f(x):  # \u00e9\u4e16\u754c \U0001f600 don't  ", " a", ""]
    for text, want in zip(probe, original.encode_batch(probe), strict=True):
        if converted.encode(text, add_special_tokens=False).ids != list(want):
            raise ValueError(f"{path} is of a kind with no known tokenizer.json; put one beside it")
    converted.save(str(out_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    _write_json(out_dir / "tokenizer_config.json", settings)
    return {"bos_token_id": original.bos_id, "eos_token_id": original.eos_id}


def _merges(vocab: dict[str, int], order: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that make a third, in the order in which BPE prefers the result.

    Neither kind of file keeps the pairs: any two neighbours merge whose union is a token.
    """
    merges = []
    for token in order:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
