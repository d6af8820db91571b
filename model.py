"""Llama: the network, its loss over a large vocabulary, generation; a plain folder in and out.

Architecture (Llama 1-3, Mistral, Qwen2, Qwen3): token embedding, n_layers blocks of pre-norm
attention and SwiGLU MLP, final RMSNorm, LM head. Parameters carry Hugging Face's names: loading is
a name map. Rotary is half-split as in HF: dimension j pairs with j + H/2.

Shapes: B batch, T tokens, D d_model, N query heads, K kv heads, H head_dim, V vocab.
Activations in attention are (B, T, N, H) everywhere up to the SDPA call.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from machine import checkpoints, hf_config  # files of any kind, and whether to trust them
from rope_kernels import apply_rope, ntk_theta, rope_frequencies

# ---------------------------------------------------------------------------------------- config


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
    qk_norm: bool = False  # Qwen3: each head's q and k through an RMSNorm before they turn
    hf: dict = field(default_factory=dict)

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Read config.json's content, in the spelling of transformers 4 or 5.

        Raises ValueError for an entry missing, absurd or not computed here (sliding windows, ...).
        """
        checked = hf_config.check_config(hf)  # refused there, or every default filled in
        return cls(
            **{ours: checked[theirs] for ours, theirs in hf_config.CONFIG_NAMES.items()},
            max_position_embeddings=checked["max_position_embeddings"],
            qkv_bias=checked["attention_bias"] or checked["model_type"] == "qwen2",
            o_bias=checked["attention_bias"],
            mlp_bias=checked["mlp_bias"],
            qk_norm=checked["model_type"] == "qwen3",
            hf=dict(hf),
        )

    def to_hf(self) -> dict:
        """Return config.json's content: what was read, with this shape, rotary and window in it.

        Rotary is spelt as in transformers 4, which 5 reads; "ntk" becomes the larger theta it is.
        """
        family = "qwen3" if self.qk_norm else "llama"
        hf = {"model_type": family, "hidden_act": "silu"} | self.hf
        hf.setdefault("architectures", [hf_config.FAMILIES[hf["model_type"]]])
        hf |= {theirs: getattr(self, ours) for ours, theirs in hf_config.CONFIG_NAMES.items()}
        scaling = self.rope_scaling
        if scaling and scaling["rope_type"] == "ntk":
            hf["rope_theta"] = ntk_theta(self.head_dim, self.rope_theta, scaling["factor"])
            hf["rope_scaling"] = None
        if hf["model_type"] in ("llama", "qwen3"):
            hf["attention_bias"] = self.qkv_bias
        if hf["model_type"] == "llama":
            hf["mlp_bias"] = self.mlp_bias
        return hf_config.exported(hf, self.max_position_embeddings)

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype that the checkpoint's config names for its weights, None if it names none."""
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return names.get(str(self.hf.get("dtype") or self.hf.get("torch_dtype")))


# ----------------------------------------------------------------------------------------- model


@dataclass
class KVCache:
    """Keys and values of the tokens read: per block (B, S, K, H), `length` of the S filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


class Documents(NamedTuple):
    """Where documents lie in B sequences of T tokens, read one after the other."""

    lengths: list[int]  # B T in all; the end of a sequence ends a document
    starts: Tensor  # (n + 1,) int32, on the tokens' device: 0, ..., B T


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d_query, d_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, d_query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, d_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d_query, config.d_model, bias=config.o_bias)
        self.attend = causal_attention  # machine/ puts its own around it
        if config.qk_norm:  # one for all heads
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def qkv(self, x: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> rotated q (B, T, N, H), rotated k and plain v (B, T, K, H)."""
        heads = -1, self.config.head_dim
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return *apply_rope(q, k, *rope), v

    def forward(self, x: Tensor, rope: tuple, cached=None, documents=None) -> Tensor:
        q, k, v = self.qkv(x, rope)
        if documents is not None:
            return self.o_proj(document_attention(self.attend, q, k, v, documents).flatten(2))
        start = 0
        if cached is not None:
            keys, values, start = cached
            end = start + x.shape[1]
            keys[:, start:end], values[:, start:end] = k, v
            k, v = keys[:, :end], values[:, :end]
        return self.o_proj(self.attend(q, k, v, start).flatten(2))  # (B, T, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H). Causal by index, never by position id.

    start: tokens before the first query (KV cache). No mask tensor is ever built. In 16 bits on a
    GPU only cuDNN's and the flash kernel may answer: the O(T^2) one takes all memory at 32K.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, H) views
    pinned = nullcontext()
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # cuDNN builds a plan for each new shape, some 30 ms, and a cache grows with every token.
        cudnn = [] if start else [SDPBackend.CUDNN_ATTENTION]
        pinned = sdpa_kernel([*cudnn, SDPBackend.FLASH_ATTENTION])
    elif q.is_cuda and k.shape[1] < q.shape[1]:  # in fp32 only the O(T^2) kernel takes fewer heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    bias = None
    if start and q.shape[2] > 1:  # is_causal would align the triangle top-left, which is wrong
        from torch.nn.attention.bias import causal_lower_right  # brings seconds of imports

        bias = causal_lower_right(q.shape[2], k.shape[2])
    with pinned:
        out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=start == 0, enable_gqa=True)
    return out.transpose(1, 2)


def document_attention(attend, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q (B, T, N, H), k and v (B, T, K, H) -> (B, T, N, H), each document by itself, causal.

    No mask is built: n tokens cost n^2, not all T^2 together. In 16 bits on a GPU by torch's
    variable-length attention (2.11's knows no grouped heads: K and V are repeated), else by pieces.
    """
    flat = [t.flatten(0, 1) for t in (q, k, v)]  # (B T, heads, H)
    if not q.is_cuda or q.dtype == torch.float32:
        pieces = zip(*(t.split(documents.lengths) for t in flat), strict=True)
        return torch.cat([attend(*(t[None] for t in p))[0] for p in pieces]).view_as(q)
    from torch.nn.attention import varlen  # brings as many

    places = [documents.starts] * 2 + [max(documents.lengths)] * 2
    grouped = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
    if not grouped:
        flat[1:] = (t.repeat_interleave(q.shape[2] // k.shape[2], 1) for t in flat[1:])
    return varlen.varlen_attn(*flat, *places, window_size=(-1, 0), **grouped).view_as(q)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple, cached=None, documents=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cached, documents)
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
        self.run_block = None  # set by machine/memory.py: how a block runs while gradients are on
        # Not a buffer: .to(bfloat16) casts buffers, and bf16 frequencies are off by whole turns.
        with torch.device("cpu"):
            rope = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.inv_freq, self.attention_factor = rope

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

    def with_frequencies(self, inv_freq: Tensor, attention_factor: float) -> "Llama":
        """The same weights, not copied, under other frequencies. inv_freq: (H/2,) float64."""
        view = object.__new__(type(self))  # FSDP's class would build a model for copy.copy
        view.__dict__.update(self.__dict__)
        view.inv_freq, view.attention_factor = inv_freq, attention_factor
        return view

    def for_length(self, length: int) -> "Llama":
        """What reads a text of `length` tokens: of a model with two rotaries (longrope) the old one
        where the text fits the old window. To be chosen once: cached keys are stored rotated."""
        s = self.config.rope_scaling or {}
        if s.get("rope_type") != "longrope" or length > s["original_max_position_embeddings"]:
            return self
        old = s | {"long_factor": s["short_factor"]}
        rope = rope_frequencies(self.config.head_dim, self.config.rope_theta, old)
        return self.with_frequencies(*rope)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        taps: tuple[int, ...] = (),
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read tokens (B, T) int64; return the last hidden state and the tapped ones. Any length.

        position_ids: (B, T) or (T,) int64 >= 0, rotary positions; default: the tokens' own indices.
        taps: hidden-state indices as in HF: 0 = embeddings, i = output of block i,
            n_layers = after the final norm (= the last hidden state).
        cache: tokens already read; extended in place by these.
        documents: no token attends beyond its own. Positions stay: rotary sees differences alone.
        Returns (last_hidden (B, T, D), {index: (B, T, D)}).
        """
        start = cache.length if cache else 0
        if position_ids is None:
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        self.inv_freq = self.inv_freq.to(input_ids.device)
        rope = (position_ids, self.inv_freq, self.attention_factor)
        x = self.embed_tokens(input_ids)  # (B, T, D)
        hidden = {0: x} if 0 in taps else {}
        for i, block in enumerate(self.layers):
            if self.run_block is not None and cache is None and torch.is_grad_enabled():
                x = self.run_block(i, block, x, rope, documents)
            else:
                cached = (cache.keys[i], cache.values[i], start) if cache else None
                x = block(x, rope, cached, documents)
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
        pcd: decode by contrast (arXiv 2506.08371); a dict of what differs from PCD, {} for the
            paper's settings. Every token is then read twice, into a cache each, as keys are stored
            rotated: twice the time and the cache (Llama-3-8B in bf16: 256 KiB a token).
        chunk_len: prompt tokens a row read at a time. The prompt's keys and values must fit (16 GiB
            for 8B at 128K in bf16); activations take the room of one chunk only.
        """
        batch, length = input_ids.shape
        if length == 0 or temperature < 0:
            raise ValueError(f"got {length} tokens at temperature {temperature}, need some at >= 0")
        out = torch.cat([input_ids, input_ids.new_zeros(batch, max_new_tokens)], dim=1)
        models = [self.for_length(length + max_new_tokens)]
        if pcd is not None:
            if not pcd.keys() <= PCD.keys():
                raise ValueError(f"pcd: got {', '.join(pcd)}, need some of {', '.join(PCD)}")
            pcd = PCD | pcd
            models.append(local_view(models[0], pcd))
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
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            out[:, end : end + 1] = new
        return out


# ------------------------------------------------------------ positional contrastive decoding (PCD)

PCD = {"alpha": 0.2, "beta": 2.5, "base_ratio": 1e-4, "gamma": 30}  # the paper's best


def local_frequencies(inv_freq: Tensor, alpha: float, base_ratio: float) -> Tensor:
    """PCD's local-aware frequencies: fast planes as they are, slow ones turned too fast.

    For j = 1 .. H/2, x = 2 j / H, T(x) = 2 - exp(alpha x):
        inv_freq*_j = T(x) inv_freq_j + (1 - T(x)) inv_freq_j base_ratio^(-2 (j - 1) / H)
    The last factor is the frequency under base_ratio times the base. inv_freq: (H/2,) float64.
    """
    half = len(inv_freq)
    j = torch.arange(1, half + 1, dtype=torch.float64, device=inv_freq.device)
    keep = 2.0 - torch.exp(alpha * j / half)  # T(x)
    return inv_freq * (keep + (1.0 - keep) * base_ratio ** (-(j - 1) / half))


def local_view(model: Llama, pcd: dict) -> Llama:
    """The same weights under PCD's local-aware frequencies. pcd: as PCD, all of it."""
    inv_freq = local_frequencies(model.inv_freq, pcd["alpha"], pcd["base_ratio"])
    return model.with_frequencies(inv_freq, model.attention_factor)


def contrast(logits: Tensor, local: Tensor, beta: float, gamma: int) -> Tensor:
    """(B, V) fp32: (1 + beta) logits - beta local on the gamma likeliest of `logits`, else -inf."""
    top = logits.topk(min(gamma, logits.shape[-1])).indices  # (B, gamma)
    mixed = (1.0 + beta) * logits.gather(-1, top) - beta * local.gather(-1, top)
    return torch.full_like(logits, -torch.inf).scatter(-1, top, mixed)


# ------------------------------------------------------------------------- loss and attention drift

LOSS_ROWS = 4096  # logits that exist at a time on a GPU: 2 GiB at V = 128256; a plan may set fewer
KL_NUMBERS = 2**26  # numbers of an attention map that exist at a time


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; from bf16 the GPU's matmul writes its fp32 sums without rounding them."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _ChunkedLoss(torch.autograd.Function):
    """A sum over tokens, with the gradients formed chunk by chunk during the forward pass.

    Each chunk of rows makes its logits, turns them in place into d(logits), and leaves d(hidden)
    and its part of d(weight): for the cross-entropy three matmuls in all, as without chunking.
    """

    @staticmethod
    def forward(ctx, hidden, weight, chunk_loss, rows, with_grad):  # (M, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        for i in range(0, hidden.shape[0], rows):
            h = hidden[i : i + rows]
            loss, grad = chunk_loss(h, weight, slice(i, i + rows), with_grad)
            total += loss
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


def _chunk_nll(h: Tensor, weight: Tensor, labels: Tensor, with_grad: bool):
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


def _chunk_kl(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, with_grad):
    """(sum of KL(teacher || student), d(logits) = student's softmax - teacher's, or None)."""
    log_q = F.linear(h, weight).float()  # (rows, V)
    log_q.sub_(log_q.logsumexp(-1, keepdim=True))
    log_p = F.linear(teacher_h, teacher_weight).float()
    log_p.sub_(log_p.logsumexp(-1, keepdim=True))
    p = log_p.exp()
    kl = log_p.sub_(log_q).mul_(p).sum()
    del log_p
    return kl, log_q.exp_().sub_(p).to(h.dtype) if with_grad else None


def next_token_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy straight from hidden states, without ever holding (T, V) logits.

    hidden: (B, T, D). lm_head_weight: (V, D). labels: (B, T) int64, shifted; -100: not counted.
    chunk_rows: tokens whose logits exist at a time; default LOSS_ROWS on a GPU, 256 on a CPU.
    Returns (sum of nll, fp32 scalar with gradient; number of counted labels, int64 scalar).
    """
    assert hidden.shape[:-1] == labels.shape, (hidden.shape, labels.shape)
    rows = chunk_rows or (LOSS_ROWS if hidden.is_cuda else 256)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad)
    flat = labels.flatten()

    def chunk_loss(h, weight, part, with_grad):
        return _chunk_nll(h, weight, flat[part], with_grad)

    rest = lm_head_weight, chunk_loss, rows, with_grad
    return _ChunkedLoss.apply(hidden.flatten(0, -2), *rest), (flat != -100).sum()


def next_token_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of the next token from hidden states, in chunks as next_token_loss.

    The sum over tokens of sum over the vocabulary of p (log p - log q), p = softmax of the
    teacher's logits, q of the student's. Hidden: (B, T, D); heads: (V, D), float. The widths D may
    differ, the vocabularies may not: ValueError. The teacher gets no gradient.
    chunk_rows: as there, but half by default, since two models' logits exist at a time.
    Returns (sum, fp32 scalar with gradient; number of tokens, int64 scalar).
    """
    if len(student_head) != len(teacher_head):
        raise ValueError(
            f"KL between vocabularies of {len(teacher_head)} (teacher) and {len(student_head)} "
            "(student): need the same one in both"
        )
    assert student_hidden.shape[:-1] == teacher_hidden.shape[:-1]
    rows = chunk_rows or (LOSS_ROWS // 2 if student_hidden.is_cuda else 128)
    with_grad = torch.is_grad_enabled()
    with_grad = with_grad and (student_hidden.requires_grad or student_head.requires_grad)
    flat, fixed = teacher_hidden.detach().flatten(0, -2), teacher_head.detach()

    def chunk_loss(h, weight, part, with_grad):
        return _chunk_kl(h, weight, flat[part], fixed, with_grad)

    hidden = student_hidden.flatten(0, -2)
    total = _ChunkedLoss.apply(hidden, student_head, chunk_loss, rows, with_grad)
    return total, torch.tensor(len(hidden), device=hidden.device)


@torch.no_grad()
def merge_weights(model: Llama, original: Llama, share: float) -> Llama:
    """LongRecipe's last stage (2409.00509), in place: share x original + (1 - share) x model."""
    for p, old in zip(model.parameters(), original.parameters(), strict=True):
        assert p.shape == old.shape, (p.shape, old.shape)
        p.copy_(torch.lerp(p.float(), old.to(p.device).float(), share))
    return model


@torch.no_grad()
def attention_kl(a: Llama, b: Llama, input_ids: Tensor) -> Tensor:
    """How far the attention of b has drifted from a's, head by head (LongReD section 3, eq. 6).

    input_ids: (B, T) int64, read by both under ordinary positions. The two run in lockstep, and the
    (T, T) maps exist in chunks of rows: 8B reads 8,192 tokens in 1.5 GiB beyond the weights.
    Returns (n_layers, n_heads) fp32: KL(attention of a || attention of b), mean over positions.
    """
    batch, length = input_ids.shape
    rows = max(1, KL_NUMBERS // (batch * a.config.n_heads * length))
    positions = torch.arange(length, device=input_ids.device)
    hidden = [m.embed_tokens(input_ids) for m in (a, b)]
    ropes = [(positions, m.inv_freq.to(input_ids.device), m.attention_factor) for m in (a, b)]
    kl = torch.zeros(a.config.n_layers, a.config.n_heads, device=input_ids.device)
    for i, blocks in enumerate(zip(a.layers, b.layers, strict=True)):
        inputs = list(zip(blocks, hidden, ropes, strict=True))
        qk = [block.self_attn.qkv(block.input_layernorm(x), rope)[:2] for block, x, rope in inputs]
        for start in range(0, length, rows):
            log_a, log_b = (_attention_log_probs(q, k, start, start + rows) for q, k in qk)
            diff = (log_a - log_b).masked_fill_(log_a.isneginf(), 0.0)
            kl[i] += log_a.exp_().mul_(diff).sum((0, 2, 3)) / (batch * length)
        hidden = [block(x, rope) for block, x, rope in inputs]
    return kl


def _attention_log_probs(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Rows start..end of the causal attention map, as logs: (B, N, rows, keys) fp32."""
    q, k = q[:, start:end].transpose(1, 2).float(), k[:, :end].transpose(1, 2).float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, N, keys, H)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
    return scores.masked_fill_(future, -torch.inf).log_softmax(-1)


# -------------------------------------------------------------------------------------- checkpoints

SHARD_SIZE = "5GB"


def load_config(folder: str | Path) -> ModelConfig:
    """Read config.json, else Meta's params.json. Raises ValueError naming file and fault."""
    return checkpoints.read_config(Path(folder), ModelConfig.from_hf)


def rescaled(
    config: ModelConfig,
    rope_theta: float | None = None,
    rope_scaling: dict | None = None,
    name: object = "the checkpoint",
) -> ModelConfig:
    """A copy of config under another rotary embedding. rope_theta alone (ABF) keeps its scaling.

    rope_scaling: replaces "no scaling"; {"rope_type": "default"} removes the config's own.
    Raises ValueError, calling the config by `name`, for two scalings on top of each other.
    """
    theta = config.rope_theta if rope_theta is None else rope_theta
    scaling = hf_config.new_scaling(config, rope_scaling, name)
    return replace(config, rope_theta=theta, rope_scaling=scaling)


def load_checkpoint(
    path_or_name: str | Path,
    rope_theta: float | None = None,
    rope_scaling: dict | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shard=None,
) -> Llama:
    """Load a checkpoint into a Llama in eval mode, its rotary embedding `rescaled` on the way.

    path_or_name: folder, OUT_DIR, known name or hub id (checkpoints.resolve_checkpoint).
    shard: called with the empty model, before its memory is allocated.
    device, dtype: of the parameters. Each tensor goes straight into place, one in flight.
    Raises ValueError as `rescaled`, or for a tensor damaged, missing, extra, misshapen, not finite.
    """
    folder = checkpoints.resolve_checkpoint(path_or_name)
    config = rescaled(load_config(folder), rope_theta, rope_scaling, folder)
    with torch.device("meta"):
        model = Llama(config)  # names and shapes, no memory
    shapes = {checkpoints.hf_name(name): p.shape for name, p in model.named_parameters()}
    read = checkpoints.open_tensors(folder, shapes, config)  # all is checked, nothing read yet
    model.to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            checkpoints.copy_whole(parameter, read(checkpoints.hf_name(name)))
    return model.eval()


def save_checkpoint(
    model: Llama, out_dir: str | Path, tokenizer_from: str | Path | None = None
) -> Path:
    """Write a Hugging Face folder that transformers and vLLM open; weights in their own dtype.

    out_dir: appears once it is whole; replaces an older checkpoint, anything else is a ValueError.
    tokenizer_from: folder, or whatever --ckpt takes, whose tokenizer files are carried over.
    """
    state = {checkpoints.hf_name(name): p.detach() for name, p in model.named_parameters()}
    hf = model.config.to_hf()
    hf["torch_dtype"] = hf["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    with checkpoints.new_folder(Path(out_dir)) as folder:
        save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE)
        if tokenizer_from is not None:
            hf = checkpoints.carry_over(Path(tokenizer_from), folder, hf)
        checkpoints.write_json(folder / "config.json", hf)
    return Path(out_dir)
