"""machine/tokenizer.py: what a tokenizer says, in which pieces, and how it is exported."""

import functools
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import machine.corpus
from machine.tokenizer import llama3_special_tokens
from model import load_checkpoint, save_checkpoint
from tests.conftest import (
    HERE,
    STORIES,
    bpe,
    byte_tokenizer,
    meta_folder,
    needs_stories,
    prose,
    tiktoken_file,
    tiktoken_folder,
    tiny_llama,
)


@needs_stories
def test_real_tokenizer_is_read_with_its_habits():
    tk = data.load_tokenizer(STORIES)
    assert (tk.vocab_size, tk.bos_id, tk.eos_id, tk.add_bos) == (512, 1, 2, True)
    assert tk.encode_batch(["Once upon a time"]) == [[403, 407, 261, 378]]
    assert tk.decode(np.array([403, 407, 261, 378])) == "Once upon a time"
    tk.check_fits(512)
    with pytest.raises(ValueError, match="ids go up to 511, the model has 300"):
        tk.check_fits(300)
    assert not {0, 1, 2} & set(tk.encode_batch(["<s> a </s><unk>"])[0])  # markup is plain text


def test_add_bos_token_of_the_config_overrules_the_post_processor(tmp_path):
    byte_tokenizer(tmp_path)
    config = {"bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>"}
    for adds in (True, False):
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**config, "add_bos_token": adds}))
        assert data.load_tokenizer(tmp_path).add_bos is adds
    path.unlink()
    assert data.load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    assert data.load_tokenizer(tmp_path).eos_id == 256


def test_meta_tokenizer_gives_the_ids_of_the_same_bpe(tmp_path):
    tk = bpe()
    meta = tiktoken_folder(tmp_path, tk)
    texts = [prose()[:50_000], "it's 1999\r\n\r\n  \tx <|end_of_text|> naive cafe", "\n\n a\n"]
    assert meta.encode_batch(texts) == [e.ids for e in tk.encode_batch(texts)]
    assert meta.decode(meta.encode_batch(texts)[1]) == texts[1]
    assert (meta.vocab_size, meta.bos_id, meta.eos_id) == (856, 600, 601)
    names = llama3_special_tokens(128_000)
    assert names["<|eot_id|>"] == 128_009 and names["<|reserved_special_token_4|>"] == 128_008
    assert names["<|reserved_special_token_250|>"] == 128_255 and len(names) == 256


def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json and tokenizer\.model"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="cannot use .*tokenizer.json"):
        data.load_tokenizer(tmp_path)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("which", ["llama3", "gpt2", "tiktoken", "sentencepiece"])
@given(st.lists(st.sampled_from([" ", "\n", "a", "Be", "\r\n", "'s", "1", ",", "\t", "e\u0301"])))
@settings(max_examples=60, deadline=None)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(which, parts):
    tk = cutters(which)
    text = "".join(parts) * 3
    size, machine.corpus.PIECE = machine.corpus.PIECE, 2
    try:
        assert tk.cut is not None
        pieces = [piece for piece, _ in machine.corpus._split([text], tk.cut)]
    finally:
        machine.corpus.PIECE = size
    assert [i for ids in tk.encode_batch(pieces) for i in ids] == tk.encode_batch([text])[0]


@functools.cache
def cutters(which):
    import tempfile

    if which == "sentencepiece":
        if not STORIES.is_dir():
            pytest.skip(f"real weights: no {STORIES}")
        return data.load_tokenizer(STORIES)
    with tempfile.TemporaryDirectory() as folder:
        if which == "tiktoken":
            return tiktoken_folder(Path(folder), bpe())
        bpe(GPT2 if which == "gpt2" else None).save(f"{folder}/tokenizer.json")
        return data.load_tokenizer(folder)


# ------------------------------------------------------------------------------------------- export


def sentencepiece_file(path, text):
    """As in Llama 2: BPE with byte fallback, spaces written as U+2581, one put in front."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=written, model_type="bpe",
        vocab_size=500, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(written.getvalue())


MIXED = "I'll re-read 12,345.67 caf\u00e9s\n\n\tdef f(x):  return x['a']  # \u4e16\u754c "
MIXED += "\U0001f600 WE'RE "


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_metas_tokenizer_is_exported_as_one_that_encodes_alike(tmp_path, kind):
    prose = (HERE / "longred.py").read_text()[:20000] + MIXED * 5
    model = tiny_llama(vocab_size=812, n_layers=1)
    folder = meta_folder(tmp_path / "meta", model, 1)
    write = tiktoken_file if kind == "tiktoken" else sentencepiece_file
    write(folder / "tokenizer.model", prose)
    out = save_checkpoint(load_checkpoint(folder), tmp_path / "hf", tokenizer_from=folder)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    meta, rng = data.load_tokenizer(folder), random.Random(0)
    texts = [prose, MIXED] + ["".join(rng.choices(prose + MIXED * 9, k=60)) for _ in range(200)]
    for text, ids in zip(texts, meta.encode_batch(texts), strict=True):
        assert theirs(text).input_ids == [meta.bos_id, *ids], text
        assert theirs(text, add_special_tokens=False).input_ids == list(ids), text
    assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (meta.bos_id, meta.eos_id)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (meta.bos_id, meta.eos_id)
    assert (out / "tokenizer.model").exists() == (kind == "sentencepiece")
