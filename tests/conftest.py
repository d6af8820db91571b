"""Tiny models, texts and runs that several files of tests share; nothing here is a test.

Without a GPU the rotary kernel runs in Triton's interpreter, which must be chosen before the first
import of rope_kernels; with one, the very same tests run the compiled kernel. Comparisons with the
real weights and texts use ../shared and skip where it is absent.
"""

import base64
import functools
import gc
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # wherever pytest was started
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import data
import rope_kernels
from machine import memory, states
from machine.formats import load_checkpoint, save_checkpoint
from machine.run import train
from machine.settings import MachineConfig as Config
from machine.tokenizer import LLAMA3_PATTERN, load_tokenizer
from measure.demo import write_byte_tokenizer
from model import Llama, ModelConfig

HERE = Path(__file__).resolve().parent.parent  # the repository's root
SHARED = HERE.parent / "shared"
STORIES = SHARED / "weights" / "stories260K"
TEXTS = SHARED / "texts"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"real weights: no {STORIES}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = pytest.mark.skipif(rope_kernels.triton is None, reason="triton is not installed")
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
rope_kernels.interpret_on_cpu = False  # what is not about the kernel shall not pay for it
torch.set_num_threads(1)  # tiny shapes: threads would mostly wait for each other
states.code_fingerprints = functools.cache(states.code_fingerprints)  # was half of a tiny run


def pytest_collection_finish():
    """Take what the imports left out of every later gc.collect(): each looked at all of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


# ------------------------------------------------------------------------------------------- models


def tiny_config(**changes) -> ModelConfig:
    """A Llama whose numbers all differ: GQA 6:2, head_dim not d_model / n_heads."""
    shape = dict(d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=80)
    shape |= dict(vocab_size=96, max_position_embeddings=64, rope_theta=500.0)
    return ModelConfig(**(shape | changes))


def tiny_llama(seed=0, std=0.2, **changes) -> Llama:
    """At the usual std of 0.02 attention is flat and a wrong theta hardly shows; 0.2 shows it."""
    model = Llama(tiny_config(**changes))
    model.init_weights(std, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in model.named_parameters():  # ones would hide a norm of q or k left out
            if "q_norm" in name or "k_norm" in name:
                p.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def tokens(batch=2, length=33, vocab=96, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def hf_model(folder):
    """The folder as transformers reads it, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def rel(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def meta_folder(folder, model, shards, embedding_dim=0, **params):
    """The model as Meta's own files: other names, neighbours paired, cut across `shards` files."""
    c = model.config
    folder.mkdir()
    state = {}
    for name, t in model.state_dict().items():
        name = name.replace("self_attn.", "attention.").replace("mlp.", "feed_forward.")
        for ours, theirs in zip(
            "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj embed_tokens lm_head "
            "input_layernorm post_attention_layernorm".split(),
            "wq wk wv wo w1 w2 w3 tok_embeddings output attention_norm ffn_norm".split(),
            strict=True,
        ):
            name = name.replace(ours, theirs)
        if name.endswith(("wq.weight", "wk.weight")):
            rows = [h * c.head_dim + j + half * c.head_dim // 2 for h in range(len(t) // c.head_dim)
                    for j in range(c.head_dim // 2) for half in (0, 1)]  # fmt: skip
            t = t[rows]
        state[name] = t.to(torch.bfloat16)
    for i in range(shards):
        part = {"rope.freqs": torch.ones(c.head_dim // 2)}
        for name, t in state.items():
            rowwise = name.endswith(("wo.weight", "w2.weight"))
            dim = embedding_dim if "tok_emb" in name else int(rowwise)
            part[name] = t if t.ndim == 1 else t.chunk(shards, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    known = dict(dim=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, norm_eps=c.norm_eps)
    known |= dict(n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size, rope_theta=c.rope_theta)
    known |= {} if c.d_model == c.n_heads * c.head_dim else {"head_dim": c.head_dim}
    (folder / "params.json").write_text(json.dumps(known | params))
    return folder


PERIOD, PERIODIC = 20, 32  # a token comes back after PERIOD; inputs in a sequence


def periodic(n, seed):
    """(n, PERIODIC + 1) int64: random tokens, repeated after PERIOD."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(16, (n, PERIOD), generator=generator)
    return first.repeat(1, 2)[:, : PERIODIC + 1]


@pytest.fixture(scope="session")
def reader():
    """A toy trained until it predicts a token from its occurrence PERIOD tokens before."""
    shape = dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64)
    model = Llama(ModelConfig(**shape, vocab_size=16, rope_theta=100.0))
    model.init_weights(0.1, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(400):
        ids = periodic(64, step + 10)
        logits = model.logits(model(ids[:, :-1])[0])[:, PERIOD - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, PERIOD:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), loss.item()


@pytest.fixture(params=[False, True], ids=["llama", "qwen3"])
def pairs(tmp_path, request):
    """The same teacher and student, ours and transformers': student with another theta."""
    original = save_checkpoint(tiny_llama(qk_norm=request.param), tmp_path / "original")
    student = load_checkpoint(original, rope_theta=9000.0).train()
    extended = save_checkpoint(student, tmp_path / "extended")
    return (load_checkpoint(original), student), (hf_model(original), hf_model(extended))


def same_first_update(got, want):
    """Weights after AdamW's first step at lr 1e-3 agree; `want` still holds its gradients.

    That step is lr * g / (|g| + 1e-8), all but lr * sign: it says nothing where a gradient is no
    larger than its own rounding, which differs from processor to processor.
    """
    for (name, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
        size, off = b.grad.abs(), (a - b).abs()
        unsure = (size > 0) & (size <= 1e-5 * size.max())
        assert off[~unsure].max() < 2e-5 and off.max() < 2.1e-3, name
        assert unsure.sum() < 0.01 * (size > 0).sum(), name


def distance_by_hand(a, b):
    dot = (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())
    return (1 - dot).mean()


# --------------------------------------------------------------------------------------------- text


def byte_tokenizer(folder):
    """A folder with a tokenizer.json of 256 bytes and an end-of-text token, 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tk = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens(["<|end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tk.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return load_tokenizer(folder)


@pytest.fixture
def tk(tmp_path):
    """byte_tokenizer of the folder tmp_path / "tk"."""
    return byte_tokenizer(tmp_path / "tk")


def bpe(pattern=None, vocab_size=600):
    """A byte-level BPE, trained on English and Python."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tk = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern or LLAMA3_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tk.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tk.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    more = dict(initial_alphabet=alphabet, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **more)
    tk.train_from_iterator([prose(), Path(__file__).read_text()], trainer)
    return tk


def tiktoken_folder(folder, tk):
    """The same BPE as Meta writes it: base64 of each token's bytes, and its rank."""
    bs = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in bs}
    rest = (b for b in range(256) if b not in bs)
    byte_of.update({chr(256 + i): b for i, b in enumerate(rest)})
    ranks = sorted((i, bytes(byte_of[c] for c in t)) for t, i in tk.get_vocab().items())
    folder.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(token) + f" {i}\n".encode() for i, token in ranks)
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return load_tokenizer(folder)


def prose():
    from pydoc_data.topics import topics

    return "\n\n".join(topics[k] for k in sorted(topics))


def documents(corpus):
    return [ids.tolist() for ids in np.split(corpus.tokens, corpus.doc_starts[1:-1])]


def made_corpus(lengths, checksums=None, sources=None):
    """A corpus in memory whose every token is different."""
    starts = np.append(0, np.cumsum(lengths))
    n = len(lengths)
    checksums = np.arange(n) if checksums is None else np.asarray(checksums)
    sources = np.zeros(n, np.int64) if sources is None else np.asarray(sources)
    return data.Corpus("made", np.arange(starts[-1]), starts, checksums, sources)


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "tokenizers"])


def run_python(code, *args, **env):
    """Start code in a process forked from one that has imported torch, and nothing of ours."""
    handle, path = tempfile.mkstemp()
    os.close(handle)
    begin = f"""
import os, sys, torch
torch.set_num_threads(1)
os.environ.update({env!r})
sys.argv[1:] = {[*map(str, args)]!r}
for fd in 1, 2:
    os.dup2(os.open({path!r}, os.O_WRONLY | os.O_APPEND), fd)
"""
    process = FORKSERVER.Process(target=exec, args=(begin + code, {"__name__": "__main__"}))
    process.path = Path(path)
    process.start()
    return process


def printed(process) -> str:
    """What a process of run_python printed, once it has ended."""
    process.join()
    text = process.path.read_text()
    process.path.unlink()
    return text


# --------------------------------------------------------------------------------------------- runs

WORDS = "the a red long short cat dog runs reads window of in to and 7 42 on, is. was; it\n".split(
    " "
)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A tiny byte-level checkpoint, window 64, and text for it: (folder, long, short)."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_llama(vocab_size=256, std=0.1)
    write_byte_tokenizer(root / "tokenizer")
    folder = save_checkpoint(model, root / "original", tokenizer_from=root / "tokenizer")
    rng = random.Random(0)
    for name in ("long", "short"):
        (root / f"{name}.txt").write_text(" ".join(rng.choices(WORDS, k=12_000)))
    return folder, root / "long.txt", root / "short.txt"


def tiny_run(ckpt, out_dir, **changes) -> Config:
    folder, long, short = ckpt
    settings = dict(ckpt=str(folder), target_len=256, out_dir=str(out_dir), rope_theta=3000.0)
    settings |= dict(long_data=[str(long)], short_data=[str(short)], steps=4, lr=1e-3)
    settings |= dict(long_micro=2, long_batch=1, short_micro=1, short_batch=3, s2l_micro=1)
    settings |= dict(
        s2l_batch=2, cache_dir=str(out_dir.parent / "tokens"), eval_tokens=512, device="cpu"
    )
    return Config(**(settings | changes))


def command_line(c) -> list[str]:
    """The flags that say what is not a default in a run's settings."""
    default = vars(Config())
    given = {name: value for name, value in vars(c).items() if value != default[name]}
    flags = ([f"--{k}", *(v if isinstance(v, list) else [v])] for k, v in given.items())
    return [str(x) for flag in flags for x in flag]


def read_log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def same_run(a, b):
    """Two runs ended with the same bits and logged the same steps."""
    one, two = (load_file(folder / "hf" / "model.safetensors") for folder in (a, b))
    logs = [[(x["step"], x["loss"], x["grad_norm"]) for x in read_log(f)] for f in (a, b)]
    return logs[0] == logs[1] and all(torch.equal(one[name], two[name]) for name in one)


def edit_record(out, change):
    """Edit a run's longred.json by change(record), and take out its checksum, as it asks for."""
    record = json.loads((out / "longred.json").read_text())
    record.pop("checksum")
    change(record)
    (out / "longred.json").write_text(json.dumps(record))
    return record


def killed_after_two(whole, out):
    """A copy of a run of 4 steps as it was somewhere after its state of step 2 was saved."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "hf")
    shutil.rmtree(out / "checkpoints" / "step-000004")
    return out


@pytest.fixture(scope="session")
def whole(ckpt, tmp_path_factory):
    """An uninterrupted run of 4 steps, saved after 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_run(ckpt, out, save_every=2))
    return out


@pytest.fixture
def at_two(whole, tmp_path):
    return killed_after_two(whole, tmp_path / "killed")


class MappedToCPU(TorchFunctionMode):
    """Every device that is called cuda is the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(self.mapped, (args, kwargs or {}))
        return function(*args, **kwargs)

    @staticmethod
    def mapped(x):
        named = isinstance(x, torch.device) and x.type == "cuda"
        named |= isinstance(x, str) and bool(re.fullmatch(r"cuda(:\d+)?", x))
        return torch.device("cpu") if named else x


@pytest.fixture
def a_gpu(monkeypatch):
    """The GPU that is there; without one --device cuda runs all the same, on the CPU."""
    if torch.cuda.is_available():
        yield
        return
    answers = dict(is_available=True, device_count=1, current_device=0, memory_reserved=0)
    answers |= dict(get_device_capability=(9, 0), get_device_name="NVIDIA H100 80GB HBM3")
    answers |= dict(mem_get_info=(8 * 2**30, 8 * 2**30), memory_stats={"num_alloc_retries": 2})
    answers |= dict(max_memory_reserved=3 * 2**30, max_memory_allocated=2**31)
    answers |= dict(empty_cache=None, reset_peak_memory_stats=None, synchronize=None)
    everywhere = {"is_expandable": True, "address": 0, "total_size": 2**64}
    for name, answer in (answers | {"memory_snapshot": [everywhere]}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    with MappedToCPU():
        yield


class CudaRuntime(TorchDispatchMode):
    """CUDA's runtime as far as host memory goes: what is locked, and how a refusal is answered.

    A refused call leaves its error pending, and the next kernel launched raises it.
    """

    def __init__(self):
        super().__init__()
        self.locked, self.refuse_after, self.pending = {}, 10**9, False

    def cudaHostRegister(self, address, nbytes, flags):
        if len(self.locked) >= self.refuse_after:
            self.pending = True
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        spans = (line.split()[0].split("-") for line in open("/proc/self/maps"))
        assert any(int(a, 16) <= address < int(b, 16) for a, b in spans), "unmapped while locked"
        return 0 if self.locked.pop(address, None) else 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.pending:
            self.pending = False
            raise RuntimeError("CUDA error: out of memory")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def cuda_runtime(a_gpu, monkeypatch):
    """CUDA's runtime on a CPU in its place: every host buffer is locked, or refused."""
    host_buffer, runtime = memory.host_buffer, CudaRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(memory, "host_buffer", lambda nbytes, pin: host_buffer(nbytes, True))
    with runtime:
        yield runtime
    memory.free_host_buffers()
    assert not runtime.locked


def with_eos(folder, copy):
    """A copy of a byte-level checkpoint whose newline, token 10, ends a text."""
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": 10}')
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens([tokenizer.id_to_token(10)])  # or it would not be taken for EOS
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy
