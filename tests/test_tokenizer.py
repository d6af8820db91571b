"""machine/tokenizer.py: what a tokenizer says, in which pieces, and how it is exported."""

import functools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import machine.corpus
import machine.tokenizer
from machine.checkpoints import client_notes
from machine.corpus import tokenize
from machine.formats import load_checkpoint, save_checkpoint
from machine.tokenizer import carry_tokenizer, check_export, llama3_special_tokens, load_tokenizer
from tests.conftest import (
    HERE,
    STORIES,
    bpe,
    byte_tokenizer,
    documents,
    meta_folder,
    needs_stories,
    prose,
    tiktoken_folder,
    tiny_llama,
)


@needs_stories
def test_real_tokenizer_is_read_with_its_habits():
    tk = load_tokenizer(STORIES)
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
        assert load_tokenizer(tmp_path).add_bos is adds
    path.unlink()
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    assert load_tokenizer(tmp_path).eos_id == 256


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
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="cannot use .*tokenizer.json"):
        load_tokenizer(tmp_path)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("which", ["llama3", "gpt2", "tiktoken", "stories260K"])
@given(st.lists(st.sampled_from([" ", "\n", "a", "Be", "\r\n", "'s", "1", ",", "\t", "e\u0301"])))
@settings(max_examples=60, deadline=None)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(which, parts):
    tk = cutters(which)
    text = "".join(parts) * 3
    size, machine.corpus.PIECE = machine.corpus.PIECE, 2
    try:
        assert tk.cut is not None
        assert in_pieces(tk, text) == tk.encode_batch([text])[0]
    finally:
        machine.corpus.PIECE = size


@pytest.mark.parametrize(
    "token", ["red words", "end\nThe", "a b c", "\nred", "\u00e9 (x y)+", "red"]
)
@pytest.mark.parametrize("which", ["llama3", "a blank in front"])
def test_a_document_is_not_cut_within_an_added_token(tmp_path, monkeypatch, which, token):
    monkeypatch.setattr(machine.corpus, "PIECE", 2)
    tk = bpe()
    if which == "a blank in front":
        tk = Tokenizer(
            models.BPE({c: i for i, c in enumerate(["\u2581", *map(chr, range(9, 300))])}, [])
        )
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tk.normalizer = normalizers.Sequence(steps)
    tk.add_tokens([AddedToken(token, special=False, normalized=False)])
    tk.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(tmp_path)
    assert len(read.encode_batch([token])[0]) <= 2
    for text in (f"It is {token} " * 9, f"the{token}or" * 9, f"red\n{token}\nword\n" * 9):
        assert in_pieces(read, text) == read.encode_batch([text])[0], text
    assert len(list(machine.corpus._split(["It is red\nor it " * 9], read))) > 9


def in_pieces(tk, text):
    """The tokens of a text, cut as a document is."""
    pieces = list(machine.corpus._split([text], tk))
    encoded = tk.encode_batch([piece for piece, *_ in pieces])
    skipped = (tk.encode_batch([piece[:skip]])[0] if skip else [] for piece, _, skip, _ in pieces)
    return [i for ids, skip in zip(encoded, skipped, strict=True) for i in ids[len(skip) :]]


AWKWARD = {  # no blank between letters to cut at, in 150,000 characters
    "blanks": "a" + " " * 150_000 + "b",
    "digits": "0123456789" * 15_000,
    "one letter": "a" * 150_000,
    "newlines": "\n" * 150_000,
    "dashes": "-" * 150_000,
    "cjk": "\u4e16\u754c\u4f60\u597d" * 37_500,
    "code": "".join(f"\n    x_{i}={i};" for i in range(10_000)),
    "punctuation": ".,;:!? ,." * 16_000,
    "letters": "".join(random.Random(0).choices("abcdefgh", k=150_000)),
    "tables": "12 | 7,5 | -3\n" * 11_000,
}


def test_no_joint_is_seen_between_letters_that_a_token_holds_side_by_side(tmp_path):
    """A run of ab may be cut after an even number alone, which no look at what is around tells."""
    vocab = {t: i for i, t in enumerate(["<unk>", "\u2581", "a", "b", "c", "ab", "abab"])}
    exact = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "ab")], unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    exact.normalizer = normalizers.Sequence(steps)
    exact.save(str(tmp_path / "tokenizer.json"))
    tk = load_tokenizer(tmp_path)
    assert tk.joint("ab" * 101, 1, 198) is None
    assert tk.joint("ab" * 50 + "c" + "ab" * 51, 1, 198) == 101


@needs_stories
@pytest.mark.parametrize("name", AWKWARD)
def test_a_document_without_a_place_to_cut_has_the_tokens_of_the_whole(tmp_path, name):
    tk, text = load_tokenizer(STORIES), AWKWARD[name]
    pieces = list(machine.corpus._split([text], tk))
    assert len(pieces) > 2 and max(len(piece) for piece, *_ in pieces) <= (1 << 16) + 1
    assert in_pieces(tk, text) == tk.encode_batch([text])[0]
    (tmp_path / "a.txt").write_text(text, newline="")
    (ids,) = documents(tokenize([tmp_path / "a.txt"], tk, tmp_path / "cache"))
    assert ids == [tk.bos_id, *tk.encode_batch([text])[0], tk.eos_id]
    for size in (1000, 70_000):  # however it is read
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(machine.corpus._split(blocks, tk)) == pieces


@functools.cache
def cutters(which):
    import tempfile

    if which == "stories260K":
        if not STORIES.is_dir():
            pytest.skip(f"real weights: no {STORIES}")
        return load_tokenizer(STORIES)
    with tempfile.TemporaryDirectory() as folder:
        if which == "tiktoken":
            return tiktoken_folder(Path(folder), bpe())
        bpe(GPT2 if which == "gpt2" else None).save(f"{folder}/tokenizer.json")
        return load_tokenizer(folder)


# ------------------------------------------------------------------------------------------- export


MIXED = "I'll re-read 12,345.67 caf\u00e9s\n\n\tdef f(x):  return x['a']  # \u4e16\u754c "
MIXED += "\U0001f600 WE'RE "


def test_metas_tokenizer_is_exported_as_one_that_encodes_alike(tmp_path):
    prose = (HERE / "longred.py").read_text()[:20000] + MIXED * 5
    model = tiny_llama(vocab_size=812, n_layers=1)
    folder = meta_folder(tmp_path / "meta", model, 1)
    tiktoken_folder(folder, bpe(vocab_size=556))
    out = save_checkpoint(load_checkpoint(folder), tmp_path / "hf", tokenizer_from=folder)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    meta, rng = load_tokenizer(folder), random.Random(0)
    texts = [prose, MIXED] + ["".join(rng.choices(prose + MIXED * 9, k=60)) for _ in range(200)]
    for text, ids in zip(texts, meta.encode_batch(texts), strict=True):
        assert theirs(text).input_ids == [meta.bos_id, *ids], text
        assert theirs(text, add_special_tokens=False).input_ids == list(ids), text
    assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (meta.bos_id, meta.eos_id)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (meta.bos_id, meta.eos_id)
    assert not (out / "tokenizer.model").exists()  # it would be taken for a sentencepiece model


# ---------------------------------------------------------------- special tokens, and forged files


def named(folder, *special, config=None, beside=None, settings=None):
    """byte_tokenizer's folder with other special tokens, from 256 on, and files next to it."""
    from tokenizers import AddedToken

    byte_tokenizer(folder)
    tk = json.loads((folder / "tokenizer.json").read_text())
    tk["added_tokens"] = []
    tk = Tokenizer.from_str(json.dumps(tk))
    tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tk.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": settings, "config": config, "special_tokens_map": beside}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content or {}))
    return folder


@pytest.mark.parametrize(
    "special, files, end",
    [
        (["<s>", "</s>"], dict(beside={"eos_token": "</s>"}, config={"eos_token_id": 2}), 257),
        (["<s>", "</s>"], dict(beside={"eos_token": {"content": "</s>"}}), 257),
        ([], dict(config={"eos_token_id": 2}), None),  # an ordinary character
        ([], dict(config={"eos_token_id": 128001}), None),
        ([], dict(config={"eos_token_id": -1}), None),
        ([], dict(settings={"eos_token": "b"}), None),
        (["<e>"], dict(config={"eos_token_id": [2, 256]}), 256),
        (["<|eot_id|>", "<|end_of_text|>"], dict(settings={"eos_token": "<|eot_id|>"}), 257),
        (["<|im_end|>", "<|endoftext|>"], dict(settings={"eos_token": "<|im_end|>"}), 257),
        (
            ["<|im_end|>", "<|stop|>"],
            dict(settings={"eos_token": "<|im_end|>"}, config={"eos_token_id": [256, 257]}),
            257,
        ),
        (["<|im_end|>"], dict(settings={"eos_token": "<|im_end|>"}), None),  # unless asked
    ],
)
def test_documents_end_with_an_end_of_text_or_nothing(tmp_path, special, files, end):
    tk = load_tokenizer(named(tmp_path / "tk", *special, **files))
    assert (tk.eos_id if tk.add_eos else None) == end
    assert tk.eos_id is None or tk.eos_id < tk.vocab_size


@pytest.mark.parametrize(
    "files",
    [
        dict(beside={"bos_token": "<s>", "eos_token": "</s>"}),
        dict(beside={"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}),
        dict(config={"bos_token_id": 256, "eos_token_id": 257}),
        dict(config={"bos_token_id": 256, "eos_token_id": [257, 258]}),
        dict(beside={"bos_token": "<s>"}, config={"eos_token_id": 257}),
    ],
)
def test_both_ends_may_be_named_beside_tokenizer_config(tmp_path, files):
    """By special_tokens_map.json or config.json alone; BOS is in front where a template has it."""
    folder = named(tmp_path / "tk", "<s>", "</s>", "<e>", **files)
    tk = load_tokenizer(folder)
    assert (tk.bos_id, tk.eos_id, tk.add_bos, tk.add_eos) == (256, 257, False, True)
    exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
    exact.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    exact.save(str(folder / "tokenizer.json"))
    tk = load_tokenizer(folder)
    assert (tk.bos_id, tk.eos_id, tk.add_bos, tk.add_eos) == (256, 257, True, True)
    assert check_export(folder, tk, ["some text"]) == 9


def test_an_end_that_is_asked_for_is_there_or_refused(tmp_path):
    with pytest.raises(ValueError, match="--add_eos: .* name no end of text"):
        load_tokenizer(named(tmp_path / "a"), add_eos=True)
    asked = named(tmp_path / "b", "<|im_end|>", settings={"eos_token": "<|im_end|>"})
    assert load_tokenizer(asked, add_eos=True).eos_id == 256


def test_a_special_token_beyond_the_embedding_is_no_fault_unless_documents_hold_it(tmp_path):
    tk = load_tokenizer(named(tmp_path, "</s>", "<pad>", settings={"eos_token": "</s>"}))
    tk.check_fits(257)
    with pytest.raises(ValueError, match="ids go up to 256, the model has 256"):
        tk.check_fits(256)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config"])
@pytest.mark.parametrize("content", ['{"a": tr', "[]", '{"eos_token": 5, "bos_token": []}'])
def test_the_damaged_file_is_the_one_that_is_named(tmp_path, name, content):
    named(tmp_path, "</s>")
    (tmp_path / f"{name}.json").write_text(content)
    if "eos_token" in content and name != "tokenizer_config":
        return
    with pytest.raises(ValueError, match=f"{name}.json") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def forge(tk, kind):
    if kind == "regex":
        split = {"type": "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Isolated"}
        steps = [split | {"invert": False}, tk["pre_tokenizer"]]
        tk["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    if kind == "charsmap":
        tk["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    if kind == "unigram":
        tk["model"] = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}
    if kind == "bomb":
        grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 2000}
        tk["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 3}


@pytest.mark.parametrize("kind", ["regex", "charsmap", "unigram", "bomb"])
def test_a_forged_tokenizer_ends_in_one_line(tmp_path, kind, capfd):
    byte_tokenizer(tmp_path)
    tk = json.loads((tmp_path / "tokenizer.json").read_text())
    forge(tk, kind)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tk))
    with pytest.raises(ValueError, match="cannot use .*tokenizer.json") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and "panicked" not in capfd.readouterr().err


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"  # as each of its models begins


@pytest.mark.parametrize("content, kind", [(SENTENCEPIECE, "a sentencepiece model"), (b"?", "dam")])
def test_a_tokenizer_model_of_another_kind_is_refused_naming_what_to_take(tmp_path, content, kind):
    (tmp_path / "tokenizer.model").write_bytes(content)
    said = (
        f"tokenizer.model is {kind}.*hf download OWNER/NAME tokenizer.json --local-dir {tmp_path}"
    )
    with pytest.raises(ValueError, match=said) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_sentencepiece_model_beside_a_tokenizer_json_goes_along(tmp_path):
    """llama.cpp's converter reads it."""
    tk, out = byte_tokenizer(tmp_path / "tk"), tmp_path / "out"
    (tmp_path / "tk" / "tokenizer.model").write_bytes(SENTENCEPIECE)
    assert load_tokenizer(tmp_path / "tk").fingerprint == tk.fingerprint
    out.mkdir()
    carry_tokenizer(tmp_path / "tk", out, None)
    assert (out / "tokenizer.model").read_bytes() == SENTENCEPIECE
    assert (out / "tokenizer.json").is_file()


def test_an_export_that_reads_the_runs_text_otherwise_is_refused(tmp_path):
    tk = byte_tokenizer(tmp_path)
    assert check_export(tmp_path, tk, ["some text"]) == 9
    tk.encode = lambda texts: [[7] for _ in texts]
    with pytest.raises(ValueError, match="cannot be exported: .*by the export's tokenizer.json"):
        check_export(tmp_path, tk, ["some text"])


def with_template(folder, single, **settings):
    """byte_tokenizer's folder with <s> and </s>, 256 and 257, which put these around a text."""
    named(folder, "<s>", "</s>", settings={"bos_token": "<s>", "eos_token": "</s>"} | settings)
    tk = Tokenizer.from_file(str(folder / "tokenizer.json"))
    around = [("<s>", 256), ("</s>", 257)]
    tk.post_processor = TemplateProcessing(single=single, special_tokens=around)
    tk.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "single, settings, alike",
    [
        ("$A", {}, True),
        ("<s> $A", {}, True),
        ("<s> $A </s>", {}, True),  # documents end with EOS, too
        ("<s> $A", {"add_bos_token": True}, True),
        ("<s> $A", {"add_bos_token": False}, False),
        ("$A", {"add_bos_token": True}, False),
        ("</s> $A", {"add_bos_token": False}, False),
        ("$A <s>", {}, False),
    ],
)
def test_what_an_export_puts_around_a_text_is_what_training_read(tmp_path, single, settings, alike):
    folder = with_template(tmp_path / "tk", single, **settings)
    tk = load_tokenizer(folder)
    if alike:
        assert check_export(folder, tk, ["some text"]) == 9
        return
    with pytest.raises(ValueError, match="remove add_bos_token.*tokenizer_config.json") as said:
        check_export(folder, tk, ["some text"])
    assert re.search(r"\[25[67], |\[25[67]\]", str(said.value)) and "\n" not in str(said.value)
    if settings:  # the remedy works
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        machine.tokenizer._export_encoder.cache_clear()
        if single != "</s> $A":
            assert check_export(folder, load_tokenizer(folder), ["some text"]) == 9


def test_ids_that_the_template_gives_are_held_against_the_embedding(tmp_path):
    tk = load_tokenizer(with_template(tmp_path / "tk", "$A </s>"), add_eos=False)
    tk.check_fits(258)
    with pytest.raises(ValueError, match="ids go up to 257, the model has 257 embeddings"):
        tk.check_fits(257)


def test_a_mismatch_of_texts_that_look_alike_shows_the_tokens(tmp_path):
    tk = byte_tokenizer(tmp_path)
    tk.encode, whole = lambda texts: [[120, *ids[1:]] for ids in whole(texts)], tk.encode
    tk.decode = lambda ids: "x" * len(ids)  # as two spellings of one character
    with pytest.raises(ValueError, match=r"'xxxx' \[120, .*'xxxx' \[82, "):
        check_export(tmp_path, tk, ["some text"])


def test_an_end_of_text_that_tokenizer_config_alone_names_is_taken(tmp_path):
    entry = {"content": "</s>", "special": True}
    settings = {"eos_token": "</s>", "added_tokens_decoder": {"257": entry}}
    tk = load_tokenizer(named(tmp_path / "a", "<s>", settings=settings))
    assert (tk.eos_id, tk.add_eos, tk.vocab_size) == (257, True, 258)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    assert theirs.eos_token_id == 257
    with pytest.raises(ValueError, match="ids go up to 257"):
        tk.check_fits(257)
    for wrong in ({"x": entry}, {"257": {}}, {"257": entry | {"special": False}}, [], {"257": "a"}):
        settings["added_tokens_decoder"] = wrong
        assert load_tokenizer(named(tmp_path / "b", "<s>", settings=settings)).eos_id is None


@pytest.mark.parametrize("name", ["TokenizersBackend", "SentencePieceBackend"])
def test_the_class_of_an_export_is_one_that_transformers_4_and_5_know(tmp_path, name):
    settings = {"tokenizer_class": name, "backend": "tokenizers", "extra_special_tokens": ["<x>"]}
    carry_tokenizer(named(tmp_path / "a", "<x>", settings=settings), mkdir(tmp_path / "b"), None)
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<x>"],
    }
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").tokenize("a") == ["a"]


def with_rules(kind):
    """A tokenizer whose rules are not those of the class that its folder names."""
    if kind == "a digit a token":
        return bpe(r"\p{N}|\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    tk = bpe()
    if kind == "no capitals":
        tk.normalizer = normalizers.Lowercase()
    if kind == "a blank in front":
        tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if kind == "no blank in front":
        vocab = {token: i for i, token in enumerate(["<unk>", "\u2581", *map(chr, range(33, 127))])}
        tk = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
        tk.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tk


RULES = ["a digit a token", "no capitals", "a blank in front", "no blank in front"]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", None])
def test_transformers_reads_an_exports_text_by_its_tokenizer_json(tmp_path, kind, name):
    source, out = mkdir(tmp_path / "a"), mkdir(tmp_path / "b")
    with_rules(kind).save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": name} if name else {}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    carry_tokenizer(source, out, None)
    texts = ["In 1999 It was 12,345.", " led", "", "a  b "]
    want = load_tokenizer(source).encode_batch(texts)
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        (out / "config.json").write_text(json.dumps({"model_type": family}))
        read = transformers.AutoTokenizer
        if family == "qwen2":  # transformers 5 has Qwen2's own rules for all of them
            (note,) = client_notes(out)
            assert "open it by PreTrainedTokenizerFast.from_pretrained" in note
            read = transformers.PreTrainedTokenizerFast
        else:
            assert client_notes(out) == []
        opened = read.from_pretrained(out)
        assert [opened(text, add_special_tokens=False)["input_ids"] for text in texts] == want


LEFT = {"padding_side": "left", "clean_up_tokenization_spaces": False}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BY_CLASS = {  # its source's class, what else its tokenizer_config.json says -> what is added
    "nothing else": ("LlamaTokenizer", {}, LEFT | TOKENS),
    "fast": ("LlamaTokenizerFast", TOKENS, LEFT),
    "its own": ("CodeLlamaTokenizer", TOKENS | {"eos_token": "!", "padding_side": "right"},
                {"clean_up_tokenization_spaces": False}),
    "a map beside it": ("LlamaTokenizer", {}, LEFT),
    "another class": ("Qwen2Tokenizer", TOKENS, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_CLASS)
def test_an_export_says_what_its_sources_class_took_for_granted(tmp_path, kind):
    name, settings, more = BY_CLASS[kind]
    settings = settings | {"tokenizer_class": name}
    source, out = mkdir(tmp_path / "a"), mkdir(tmp_path / "b")
    tk = bpe() if name.startswith("Qwen2") else with_rules("no blank in front")
    tk.add_special_tokens([*TOKENS.values()])
    tk.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "a map beside it":
        (source / "special_tokens_map.json").write_text(json.dumps(TOKENS))
    carry_tokenizer(source, out, None)
    written = json.loads((out / "tokenizer_config.json").read_text())
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    assert written == settings | names | more | {"tokenizer_class": "PreTrainedTokenizerFast"}
    theirs, opened = map(transformers.AutoTokenizer.from_pretrained, (source, out))
    for key in ("padding_side", "eos_token", "bos_token", "clean_up_tokenization_spaces"):
        assert getattr(opened, key) == getattr(theirs, key), key
    assert len(opened) == tk.get_vocab_size()
    assert set(opened("a")) == {"input_ids", "attention_mask"}


def test_no_token_is_added_that_the_tokenizer_has_not(tmp_path):
    source = named(tmp_path / "a", "<s>", settings={"tokenizer_class": "LlamaTokenizer"})
    (source / "special_tokens_map.json").unlink()
    carry_tokenizer(source, mkdir(tmp_path / "b"), None)
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["bos_token"] == "<s>" and "eos_token" not in written


def mkdir(folder):
    folder.mkdir()
    return folder


def test_truncation_and_padding_stay_behind(tmp_path):
    byte_tokenizer(tmp_path / "a")
    tk = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    tk.enable_truncation(4)
    tk.enable_padding(length=99)
    tk.save(str(tmp_path / "a" / "tokenizer.json"))
    (tmp_path / "b").mkdir()
    settings = {"max_length": 4, "truncation_strategy": "longest_first", "eos_token": "<|end|>"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    carry_tokenizer(tmp_path / "a", tmp_path / "b", 128)
    carried = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    kept = {"eos_token": "<|end|>", "model_input_names": ["input_ids", "attention_mask"]}
    assert carried == kept | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    assert len(Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json")).encode("a" * 9)) == 9
