"""machine/samples.py: short text of the checkpoint's own, made once before a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

import data
from longred import main
from machine import samples
from machine.corpus import tokenize
from machine.formats import load_checkpoint, load_config
from machine.run import train
from machine.settings import MachineConfig as Config
from machine.settings import resolve
from machine.tokenizer import load_tokenizer
from model import config_to_hf
from tests.conftest import (
    bpe,
    byte_tokenizer,
    edit_record,
    killed_after_two,
    read_log,
    same_run,
    tiktoken_folder,
    tiny_config,
    tiny_run,
    with_eos,
)


def own_run(ckpt, out, spec="self:40", **changes):
    changes = dict(method="soft_replay", short_data=[spec], s2l_data=[spec], steps=2) | changes
    return tiny_run(ckpt, out, **changes)


@pytest.fixture
def ckpt(ckpt, tmp_path):
    """The tiny checkpoint with an end of text, which a sampled text starts from and ends with."""
    folder = with_eos(ckpt[0], tmp_path / "with_eos")
    return folder, *ckpt[1:]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(samples, "PART_TOKENS", 16 * 64)  # 16 texts of the window of 64


def test_a_run_on_its_own_samples_says_what_they_cost(ckpt, tmp_path, capsys, small_parts):
    train(own_run(ckpt, tmp_path / "run"))
    printed = capsys.readouterr().out
    plan = printed.index("40 texts of up to 64 tokens, at most 2,560 tokens, read")
    assert plan < printed.index("part 1/3") < printed.index("part 3/3") < printed.index("step 1/2")
    assert "tok/s  ETA" in printed[plan : printed.index("step 1/2")]
    record = json.loads((tmp_path / "run" / "longred.json").read_text())
    cost = record["own_samples"]["self:40"]
    header, *lines = open(cost["file"]).read().splitlines()
    assert len(lines) == cost["texts"] == 40 and header.startswith("token ids")
    assert sum(len(json.loads(x)) for x in lines) == cost["tokens"] > 40
    assert record["config"]["short_data"] == ["self:40"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"self:40: 40 of the checkpoint's own texts, {cost['tokens']:,} tokens" in report


def test_no_text_is_longer_than_the_sequences_that_read_it(ckpt, tmp_path, capsys):
    """Beyond them it costs most of the time: a window of 8,192 for sequences of 1,024."""
    short = dict(short_len=32, steps=1, s2l_micro=0, s2l_data=None)
    train(own_run(ckpt, tmp_path / "short", "self:8", **short))
    assert "8 texts of up to 32 tokens, at most 256 tokens" in capsys.readouterr().out
    train(own_run(ckpt, tmp_path / "both", "self:8", short_len=32, steps=1))
    assert "8 texts of up to 64 tokens, at most 512 tokens" in capsys.readouterr().out


def test_texts_are_those_that_generate_draws_and_a_stopped_run_goes_on(
    ckpt, tmp_path, capsys, small_parts, monkeypatch
):
    made = []

    def stopped(*args, **more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return whole(*args, **more)

    whole = samples.sample_ids
    monkeypatch.setattr(samples, "sample_ids", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(own_run(ckpt, tmp_path / "stopped"))
    monkeypatch.setattr(samples, "sample_ids", whole)
    capsys.readouterr()
    train(own_run(ckpt, tmp_path / "again"))
    assert "1 of 3 parts to make" in capsys.readouterr().out
    fresh = own_run(ckpt, tmp_path / "fresh", cache_dir=str(tmp_path / "other"))
    train(fresh)
    logs = [[x["loss"] for x in read_log(tmp_path / name)] for name in ("again", "fresh")]
    assert logs[0] == logs[1]
    (part,) = (tmp_path / "other").glob("samples-*/part-00000.json")
    texts = json.loads(part.read_text())["texts"]
    model, tokenizer, length = made[0][0], made[0][1], made[0][3]
    seed = int(samples.digest([fresh.seed, part.name])[:12], 16)
    generator = torch.Generator().manual_seed(seed)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = load_checkpoint(ckpt[0]).generate(
        torch.full((16, 1), first), length - 1, 1.0, generator=generator
    )[:, 1:]
    want = [row.tolist() for row in ids]
    assert tokenizer.eos_id == first  # it is kept
    want = [row[: row.index(first) + 1] if first in row else row for row in want]
    assert texts == want and len(model.layers) == 3


def test_other_seeds_make_other_texts_and_more_texts_keep_those_there_are(
    ckpt, tmp_path, capsys, small_parts
):
    train(own_run(ckpt, tmp_path / "one", eval_tokens=0))
    train(own_run(ckpt, tmp_path / "more", "self:60", eval_tokens=0))
    assert "1 of 4 parts to make" in capsys.readouterr().out
    train(own_run(ckpt, tmp_path / "other", seed=1, eval_tokens=0))
    assert "3 of 3 parts to make" in capsys.readouterr().out


def test_a_run_on_own_samples_resumes_where_its_cache_is_gone(ckpt, tmp_path, small_parts):
    """They are sampled anew, in other seconds and into another folder, and are the same ids."""
    train(own_run(ckpt, tmp_path / "whole", steps=4, save_every=2))
    out = killed_after_two(tmp_path / "whole", tmp_path / "run")
    edit_record(out, lambda record: record["own_samples"]["self:40"].update(seconds=2.9))
    shutil.rmtree(tmp_path / "tokens")
    main(["--resume", str(out), "--cache_dir", str(tmp_path / "elsewhere")])
    after = json.loads((out / "longred.json").read_text())["own_samples"]["self:40"]
    assert after["seconds"] != 2.9 and "elsewhere" in after["file"]
    assert same_run(tmp_path / "whole", out)


DAMAGES = {
    "null": lambda raw: "null",
    "nothing in it": lambda raw: "{}",
    "half of its bytes": lambda raw: raw[: len(raw) // 2],
    "half of its texts": lambda raw: json.dumps(
        (part := json.loads(raw)) | {"texts": part["texts"][:8]}
    ),
    "one id changed": lambda raw: raw.replace("[[", "[[1", 1),
    "a list": lambda raw: "[]",
    "no text": lambda raw: "",
}


def test_damaged_samples_are_made_anew_and_not_believed(ckpt, tmp_path, capsys, small_parts):
    train(own_run(ckpt, tmp_path / "sound", eval_tokens=0, steps=1))
    (part,) = tmp_path.glob("tokens/samples-*/part-00001.json")
    (whole,) = tmp_path.glob("tokens/samples-*/40.ids")
    sound = part.read_text(), whole.read_bytes()
    for damage, change in DAMAGES.items():
        part.write_text(change(sound[0]))
        whole.write_bytes(sound[1][: len(sound[1]) // 2])  # of which half would be trained on
        capsys.readouterr()
        train(own_run(ckpt, tmp_path / damage, eval_tokens=0, steps=1))
        assert "1 of 3 parts to make" in capsys.readouterr().out, damage
        assert json.loads(part.read_text())["texts"] == json.loads(sound[0])["texts"], damage
        assert whole.read_bytes() == sound[1], damage
        assert same_run(tmp_path / "sound", tmp_path / damage), damage


class SaysAnything:
    """A model that draws any id, also of padding of its embedding, and EOS more often."""

    def __init__(self, vocab: int, eos: int):
        self.vocab, self.eos = vocab, eos
        self.said, self.embed_tokens = [], torch.nn.Embedding(1, 1)

    def generate(self, batch, n, temperature, generator):
        new = torch.randint(self.vocab, (len(batch), n), generator=generator)
        new[torch.rand(new.shape, generator=generator) < 0.05] = self.eos
        self.said += new.tolist()
        return torch.cat([batch, new], 1)


def chat_tokenizer(folder):
    """Bytes and a chat model's special tokens; its vocabulary is padded from 262 to 300."""
    byte_tokenizer(folder)
    tk = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tk.add_special_tokens("<|begin|> <|end_of_text|> <|start_header_id|> <|eot_id|>".split())
    tk.add_tokens(["<think>"])  # a token that a text can become
    tk.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return 300, {256, 257, 259, 260}, 258


def ranks_tokenizer(folder):
    """Llama 3's kind of file, 266 ranks and 256 special tokens, under an embedding of 640 rows."""
    tiktoken_folder(folder, bpe(vocab_size=266))
    return 640, {*range(266, 522)} - {267}, 267


def prefix_tokenizer(folder):
    """Sentencepiece's kind: a blank is put in front of every text, and taken off when decoded."""
    folder.mkdir()
    vocab = "<unk> <s> </s> \u2581 a b \u2581a ab".split(" ")
    tk = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [("\u2581", "a"), ("a", "b")]))
    tk.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tk.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)])
    tk.add_special_tokens(["<unk>", "<s>", "</s>"])
    tk.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return 8, {0, 1}, 2


@pytest.mark.parametrize("make", [chat_tokenizer, ranks_tokenizer, prefix_tokenizer])
def test_what_was_sampled_and_nothing_else_is_read(tmp_path, make):
    vocab, special, eos = make(tmp_path / "tk")
    tokenizer, model = load_tokenizer(tmp_path / "tk"), SaysAnything(vocab, eos)
    assert tokenizer.eos_id == eos and tokenizer.add_bos
    config = tiny_config(vocab_size=vocab)
    (tmp_path / "tk" / "config.json").write_text(json.dumps(config_to_hf(config)))
    c = Config(original_len=64, seed=3, cache_dir=str(tmp_path / "cache"), device="cpu")
    path, cost = samples.own_samples(
        c, 128, 64, tmp_path / "tk", config, lambda: model, tokenizer, 1
    )
    documents, n = [], 0
    for row in model.said:
        # The end of text is the last token; nothing that a text cannot become is in it.
        bad = next((i for i, t in enumerate(row) if t in special or t >= tokenizer.vocab_size), 63)
        row = row[:bad]
        row = row[: row.index(eos) + 1] if eos in row else row
        n += len(row)
        documents += [[tokenizer.bos_id, *row]] if row not in ([], [eos]) else []
    assert len(model.said) == cost["texts"] == 128 and n == cost["tokens"]
    assert len({ids[-1] == eos for ids in documents}) == 2  # ended and cut ones
    corpus = tokenize([path], tokenizer, tmp_path / "cache")
    assert [x.tolist() for x in np.split(corpus.tokens, corpus.doc_starts[1:-1])] == documents
    stream = data.Stream(corpus, "short", 0, 1, 16)
    trained = [ids[:length] for ids, length in zip(documents, corpus.segments()[1], strict=True)]
    packed = sum(trained, [])
    read = sorted(stream.batch(i)[0].tolist() for i in range(stream.n_sequences))
    assert read == sorted(packed[16 * i : 16 * i + 17] for i in range(stream.n_sequences))
    assert stream.n_sequences > 5


def test_ids_of_another_tokenizer_are_refused(tmp_path, tk):
    path = tmp_path / "own.ids"
    for text, said in (
        (samples.ids_header("another") + "[1, 2]\n", "own.ids holds another tokenizer's ids"),
        (samples.ids_header(tk.fingerprint) + "[1]\n[257]\n", "own.ids:3 is no list of this tok"),
        (samples.ids_header(tk.fingerprint) + "[1]\n{}\n", "own.ids:3 is no list of this tok"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            tokenize([path], tk, tmp_path / "cache")


@pytest.mark.parametrize("spec", ["self:", "self:0", "self:many", "self:-3"])
def test_a_wrong_number_of_texts_is_refused_in_one_line(ckpt, tmp_path, spec):
    with pytest.raises(ValueError, match=f"{spec}: need self or self:N"):
        resolve(own_run(ckpt, tmp_path / "run", spec), load_config(ckpt[0]), ckpt[0])


def test_the_number_of_texts_has_a_finite_default():
    assert samples.count("self") == samples.DEFAULT_TEXTS == 2000
    assert samples.count("self:7") == 7 and samples.count("selfish.txt") is None
