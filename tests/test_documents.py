"""--document_mask: no document sees another, in every stream, in student and teacher."""

import json
import random

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

import data
from longred import cosine_distance
from machine import memory, settings
from machine.corpus import tokenize
from machine.formats import load_checkpoint, load_config
from machine.run import train
from machine.tokenizer import load_tokenizer
from model import (
    Documents,
    causal_attention,
    document_attention,
    next_token_loss,
)
from tests.conftest import (
    WORDS,
    made_corpus,
    read_log,
    rel,
    same_first_update,
    tiny_llama,
    tiny_run,
    tokens,
)

LENGTHS = [5, 1, 27, 20, 13]  # two sequences of 33


def documents(lengths=LENGTHS, device="cpu"):
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return Documents(list(lengths), starts)


def test_first_tokens_mark_where_documents_begin():
    lengths = [7, 3, 40, 11, 2, 60]
    stream = data.Stream(made_corpus(lengths), "long", 1, 3, 10)
    opening = {int(i) for i in np.cumsum([0, *lengths[:-1]])}  # every token is its own place
    for index in range(8):
        ids, first = stream.batch(index), stream.first_tokens(index)
        assert first.shape == ids.shape
        assert first.tolist() == [[int(i) in opening for i in row] for row in ids]


def test_labels_that_open_another_document_do_not_count():
    first = torch.zeros(2, 9, dtype=torch.bool)
    first[0, [0, 3, 8]] = first[1, 5] = True
    labels, found = data.by_document(torch.arange(16).view(2, 8), first)
    assert (labels == -100).nonzero().tolist() == [[0, 2], [0, 7], [1, 4]]
    assert found.lengths == [3, 5, 5, 3] and found.starts.tolist() == [0, 3, 8, 13, 16]
    assert found.starts.dtype == torch.int32


@pytest.mark.parametrize("counted", ["as in the sequence", "from 0", "skipped"])
@pytest.mark.parametrize("head_dim, qk_norm", [(16, False), (8, True)])
def test_packed_documents_equal_separate_ones(counted, head_dim, qk_norm):
    """Forward within 2e-5 of the largest number, gradients within 1e-4 (fp32); "from 0": rotary
    sees differences of positions alone."""
    shape = dict(head_dim=head_dim, qk_norm=qk_norm)
    packed, apart_ = (tiny_llama(**shape) for _ in range(2))
    ids, taps = tokens(), (1, 3)
    positions = torch.arange(33).expand(2, -1)
    if counted == "skipped":
        positions = torch.from_numpy(data.pose_positions(np.random.default_rng(0), 2, 33, 200))
    _, got = packed(ids, positions, taps, documents=documents())
    flat_ids, flat_positions = ids.flatten().split(LENGTHS), positions.flatten().split(LENGTHS)
    want = {i: [] for i in taps}
    for part, where in zip(flat_ids, flat_positions, strict=True):
        where = torch.arange(len(part)) if counted == "from 0" else where
        for i, hidden in apart_(part[None], where, taps)[1].items():
            want[i].append(hidden[0])
    for i in taps:
        want[i] = torch.cat(want[i]).view_as(got[i])
        assert rel(got[i], want[i]) < 2e-5, i
    for hidden in (got, want):
        sum((h * h.roll(1, -1)).sum() for h in hidden.values()).backward()
    for (name, p), other in zip(packed.named_parameters(), apart_.parameters(), strict=True):
        if other.grad is not None:
            assert rel(p.grad, other.grad) < 1e-4, name
    assert rel(packed(ids, positions, taps)[1][3], want[3]) > 1e-2  # without: another thing


def test_no_bit_of_a_document_depends_on_another():
    model, ids = tiny_llama(), tokens()
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 96  # all but the two documents at its start
    one, two = (model(i, documents=documents())[0] for i in (ids, other))
    assert torch.equal(one[0, :6], two[0, :6]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0, 6:], two[0, 6:])


def test_recomputed_blocks_keep_to_documents():
    plain, recomputed = tiny_llama(), tiny_llama()
    memory.apply_policy(recomputed, memory.Policy(keep_all=1, attention=1, mlp_rows=10))
    for model in (plain, recomputed):
        model(tokens(), documents=documents())[0].square().sum().backward()
    for (name, p), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.grad is not None:
            assert rel(other.grad, p.grad) < 2e-5, name


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0"])
def test_the_gpus_call_of_variable_length_attention(monkeypatch, version):
    """A stand-in with torch's contract, on what looks like a GPU's tensors."""
    asked = []

    def stand_in(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
        asked.append(enable_gqa)
        starts = cu_seq_q
        assert window_size == (-1, 0) and max_q == max_k == 27 and starts is cu_seq_k
        assert enable_gqa or q.shape[1] == k.shape[1]
        parts = (t.split(starts.diff().tolist()) for t in (q, k, v))
        out = [causal_attention(*(t[None] for t in p))[0] for p in zip(*parts, strict=True)]
        return torch.cat(out)

    class OnGPU(torch.Tensor):
        is_cuda = property(lambda self: True)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 33, n, 16, generator=generator).bfloat16() for n in (6, 2, 2))
    want = document_attention(causal_attention, q, k, v, documents())
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: stand_in(
        *(t.as_subclass(torch.Tensor) if isinstance(t, OnGPU) else t for t in a), **k
    ))  # fmt: skip
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    got = document_attention(None, *(t.as_subclass(OnGPU) for t in (q, k, v)), documents())
    assert asked == [version == "2.13.0"]
    assert torch.equal(got.as_subclass(torch.Tensor), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_variable_length_attention_on_a_gpu():
    q, k, v = (torch.randn(2, 33, n, 64, device="cuda").bfloat16() for n in (6, 2, 2))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = document_attention(None, *inputs, documents(device="cuda"))
    exact = [t.detach().float().requires_grad_() for t in inputs]
    want = document_attention(causal_attention, *exact, documents(device="cuda"))
    assert rel(out.float(), want) < 2e-2
    grads = (
        torch.autograd.grad(o.float().square().sum(), i) for o, i in ((out, inputs), (want, exact))
    )
    for got, expected in zip(*grads, strict=True):
        assert rel(got.float(), expected) < 3e-2


@pytest.fixture
def short_documents(ckpt, tmp_path):
    """The tiny checkpoint, with text in documents of 2 to 40 words."""
    rng = random.Random(1)
    for name in ("long", "short"):
        texts = (" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(400))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return ckpt[0], tmp_path / "long.jsonl", tmp_path / "short.jsonl"


def test_a_step_equals_the_formula_over_separate_documents(short_documents, tmp_path):
    changes = dict(steps=1, distill_layers=[2, 3], eval_tokens=0, document_mask=True)
    c = tiny_run(short_documents, tmp_path / "run", **changes)
    exported = load_checkpoint(train(c))
    folder, long, short = short_documents
    teacher = load_checkpoint(folder)
    student = load_checkpoint(folder, rope_theta=3000.0).train()
    tok, cache = load_tokenizer(folder), tmp_path / "tokens"
    text = {n: tokenize([str(p)], tok, cache, n) for n, p in (("long", long), ("short", short))}
    skipped = data.cream_positions(np.random.default_rng([c.seed, 0x52, 0]), 2, 64, 256)

    def pieces(stream, indices, positions=None):
        """(ids, positions) of each document in a stream's sequences."""
        for index in indices:
            ids, first = stream.batch(index), stream.first_tokens(index)
            for row in range(len(ids)):
                borders = [
                    0,
                    *(i for i in range(1, stream.seq_len) if first[row, i]),
                    stream.seq_len,
                ]
                for a, b in zip(borders, borders[1:], strict=False):
                    where = np.arange(a, b) if positions is None else positions[row, a:b]
                    last = b < stream.seq_len or first[row, b]
                    yield ids[row : row + 1, a : b + 1], torch.from_numpy(where), bool(last)

    loss_long = loss_short = loss_s2l = 0.0
    for ids, where, ended in pieces(data.Stream(text["long"], "long", c.seed, 1, 256), (0, 1)):
        labels = ids[:, 1:].clone()
        if ended:  # what follows is another document's
            labels[0, -1] = -100
        hidden, _ = student(ids[:, :-1], where)
        loss_long += next_token_loss(hidden, student.lm_head_weight, labels)[0] / 512
    for ids, where, _ in pieces(data.Stream(text["short"], "short", c.seed, 3, 64), (0,)):
        (_, a), (_, b) = (m(ids[:, :-1], where, (2, 3)) for m in (student, teacher))
        n = ids.shape[1] - 1
        loss_short += sum(cosine_distance(a[i], b[i].detach()) for i in (2, 3)) * n / 192
    for ids, where, _ in pieces(data.Stream(text["long"], "s2l", c.seed, 2, 64), (0,), skipped):
        n = ids.shape[1] - 1
        a, b = student(ids[:, :-1], where)[0], teacher(ids[:, :-1])[0].detach()
        loss_s2l += cosine_distance(a, b) * n / 128
    total = 8 / 16 * loss_long + 6 / 16 * 5 * loss_short + 2 / 16 * 10 * loss_s2l
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
    torch.optim.AdamW(student.parameters(), 1e-3, (0.9, 0.95), 1e-8, 0.1).step()
    line = read_log(tmp_path / "run")[0]
    for name, loss in (("long", loss_long), ("short", loss_short), ("s2l", loss_s2l)):
        assert line[f"loss_{name}"] == pytest.approx(loss.item(), rel=1e-5), name
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    same_first_update(exported, student)


def test_a_masked_step_does_not_depend_on_how_it_is_cut(short_documents, tmp_path):
    losses = []
    for units in (64, 32768):
        out = tmp_path / f"units{units}"
        changes = dict(steps=2, long_batch=2, eval_tokens=0, document_mask=True, unit_tokens=units)
        train(tiny_run(short_documents, out, **changes))
        losses.append([(line["loss"], line["grad_norm"]) for line in read_log(out)])
    assert np.allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("other", [dict(context=2), dict(compile=True)], ids=str)
def test_what_a_document_mask_does_not_go_with_is_refused(ckpt, tmp_path, other):
    c = tiny_run(ckpt, tmp_path / "run", document_mask=True, **other)
    with pytest.raises(ValueError, match=f"--document_mask does not go with --{[*other][0]}"):
        settings.resolve(c, load_config(ckpt[0]), ckpt[0])
