"""The six files run alone, and they are the oracle of machine/: both export the same bytes."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

import data
import longred
import model
from machine.corpus import tokenize
from machine.formats import save_checkpoint
from machine.run import train
from machine.settings import MachineConfig
from machine.tokenizer import load_tokenizer
from tests.conftest import HERE, STORIES, TEXTS, bpe, needs_stories, tiny_llama, tiny_run

SIX = "longred.py model.py rope_kernels.py data.py test_longred.py requirements.txt".split()
CASES = {
    "longred": {},
    "own weights": dict(alpha_short=3.0, alpha_s2l=7.0, alpha_kl=2.0, position_scheme="uniform"),
    "small passes": dict(unit_tokens=100, distill_layers=[1, 3]),
    "mix_cpt": dict(method="mix_cpt", rope_type="linear", rope_theta=None, alpha_short=2.0),
    "soft_replay": dict(method="soft_replay", document_mask=True),
    "long_cpt": dict(method="long_cpt", rope_type="yarn", long_position_scheme="pose"),
    "longrecipe": dict(method="longrecipe", replay_steps=2, replay_batch=2, merge=0.5),
    "ntk": dict(rope_type="ntk", short_micro=0),
}


def exported(folder):
    return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}


def plain(c: MachineConfig) -> longred.Config:
    names = longred.Config.__dataclass_fields__
    return longred.Config(**{name: getattr(c, name) for name in names})


def both_ways(c: MachineConfig, tmp_path):
    """What a run exports by machine/ and by longred.py alone: {name: bytes} twice."""
    c.out_dir = str(tmp_path / "robust")
    train(c)
    c.out_dir = str(tmp_path / "plain")
    longred.train(plain(c))
    return exported(tmp_path / "robust"), exported(tmp_path / "plain")


@pytest.mark.parametrize("case", CASES)
def test_the_plain_way_trains_and_exports_the_same_bytes(ckpt, tmp_path, case):
    c = tiny_run(ckpt, tmp_path / "run", eval_tokens=0, keep=0, **CASES[case])
    c.replay_data = c.short_data if c.replay_steps else None
    robust, plain = both_ways(c, tmp_path)
    assert robust == plain and "model.safetensors" in plain
    logs = ([json.loads(x) for x in open(tmp_path / d / "log.jsonl")] for d in ("robust", "plain"))
    for one, two in zip(*logs, strict=True):
        assert {key: one[key] for key in two} == two


@needs_stories
def test_real_weights_and_books_train_the_same_bytes_both_ways(tmp_path):
    book = (TEXTS / "moby_dick.txt").read_text("utf-8")
    for name, size in (("long", 20_000), ("short", 700)):  # machine/ cuts the long ones in pieces
        documents = [book[i : i + size] for i in range(0, len(book) // 6, size)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    texts = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    c = tiny_run((STORIES, *texts), tmp_path / "run", eval_tokens=0, keep=0, steps=2)
    c.target_len, c.short_len, c.rope_theta = 1024, 128, None
    robust, plain = both_ways(c, tmp_path)
    assert robust == plain


def test_in_bf16_by_autocast_the_six_files_train_as_in_fp32(ckpt, tmp_path, monkeypatch):
    """What a GPU does, on a CPU."""
    real, ends = torch.autocast, []

    def on_cpu(kind, dtype=None, enabled=True, **more):
        return real("cpu", torch.bfloat16, enabled=dtype is not None, **more)

    for name in ("fp32", "bf16"):
        c = tiny_run(ckpt, tmp_path / name, steps=12, distill_layers=[3], lr=3e-3)
        c = longred.Config(
            **{name: getattr(c, name) for name in longred.Config.__dataclass_fields__}
        )
        if name == "bf16":
            monkeypatch.setattr(torch, "autocast", on_cpu)
        longred.train(c)
        lines = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        ends.append([lines[i]["loss_long"] for i in (0, -1)])
    assert ends[1] == pytest.approx(ends[0], rel=0.02) and ends[1][1] < 0.8 * ends[1][0]


def chat_folder(folder):
    """A tokenizer like a chat model's: BOS from its template, EOS the end of a turn."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tk = bpe()
    marks = "<|begin_of_text|> <|end_of_text|> <|eot_id|>".split()
    tk.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    begin = ("<|begin_of_text|>", tk.token_to_id("<|begin_of_text|>"))
    tk.post_processor = TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    folder.mkdir()
    tk.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def named_elsewhere(folder, file, content):
    """A tokenizer whose BOS and EOS only special_tokens_map.json or config.json names."""
    tk = bpe()
    tk.add_special_tokens(["<begin>", "<end>"])
    folder.mkdir()
    tk.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": tk.token_to_id("<begin>"), "eos_token_id": [tk.token_to_id("<end>")]}
    (folder / file).write_text(json.dumps(content or ids))
    return folder


TOKENIZERS = {
    "bytes": lambda folder, ckpt: ckpt[0],
    "chat": lambda folder, ckpt: chat_folder(folder),
    "named by the map": lambda folder, ckpt: named_elsewhere(
        folder, "special_tokens_map.json", {"bos_token": "<begin>", "eos_token": "<end>"}
    ),
    "named by config.json": lambda folder, ckpt: named_elsewhere(folder, "config.json", None),
    "sentencepiece-like": lambda folder, ckpt: STORIES,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_both_ways_make_the_same_documents_of_a_text(ckpt, tmp_path, kind):
    folder = TOKENIZERS[kind](tmp_path / "tokenizer", ckpt)
    if not folder.is_dir():
        pytest.skip(f"real weights: no {folder}")
    words = "One sentence.  Two   blanks, a\ttab\nand <|eot_id|> <s> caf\u00e9 \u4e16\u754c. "
    texts = ["a", " lead", words, words * 300, words * 1200, "word" * 5000, ""]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "many.jsonl").write_text(lines)
    (tmp_path / "one.txt").write_text(words * 50)
    paths = [str(tmp_path / "many.jsonl"), str(tmp_path / "one.txt")]
    plain = data.tokenize(paths, data.Tokenizer(folder))
    robust = tokenize(paths, load_tokenizer(folder), tmp_path / "cache")
    for name in ("doc_checksums", "doc_sources", "doc_starts", "tokens"):
        assert np.array_equal(getattr(plain, name), getattr(robust, name)), name
    assert robust.segments()[1].tolist() == plain.segments()[1].tolist()


# What tokenizer_config.json says -> what an export's says, but for the class and the window. What
# transformers 4 would do otherwise than tokenizer.json, or not open, is written as 4 reads it.
SETTINGS = {
    "a chat model's": ({}, {}),
    "of transformers 5": ({"extra_special_tokens": ["<x>"], "tokenizer_class": "TokenizersBackend"},
                          {"additional_special_tokens": ["<x>"]}),
    "a blank in front, unsaid": ({}, {"add_prefix_space": True}),
    "a blank in front, denied": ({"add_prefix_space": False, "tokenizer_class": None},
                                 {"add_prefix_space": True}),
    "no blank in front": ({"add_prefix_space": True}, {"add_prefix_space": False}),
    "Llama's": ({"tokenizer_class": "LlamaTokenizer"},
                {"padding_side": "left", "clean_up_tokenization_spaces": False}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_both_ways_export_the_same_tokenizer(tmp_path, kind):
    settings, want = SETTINGS[kind]
    source = chat_folder(tmp_path / "source")
    tk = Tokenizer.from_file(str(source / "tokenizer.json"))
    tk.add_special_tokens(["<x>"])
    if "add_prefix_space" in want:
        tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=want["add_prefix_space"])
    tk.save(str(source / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text()) | settings
    settings["bos_token"] = "<|begin_of_text|>"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    llama = tiny_llama(vocab_size=640)
    model.save(llama, tmp_path / "plain", source)
    save_checkpoint(llama, tmp_path / "robust", source)
    names = "tokenizer.json", "tokenizer_config.json"
    plain, robust = ([(tmp_path / d / n).read_bytes() for n in names] for d in ("plain", "robust"))
    assert plain == robust
    common = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}
    common |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    common["model_input_names"] = ["input_ids", "attention_mask"]
    assert json.loads(plain[1]) == common | want
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")("It is 1999")["input_ids"]
    assert ids == tk.encode("It is 1999").ids


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An empty folder with the six files in it."""
    folder = tmp_path_factory.mktemp("alone")
    for name in SIX:
        shutil.copy(HERE / name, folder)
    return folder


def command_line(paths, out_dir, **changes):
    folder, long, short = paths
    flags = {"--ckpt": folder, "--target_len": 256, "--long_data": long, "--short_data": short}
    flags |= {"--steps": 1, "--long_micro": 1, "--long_batch": 1, "--short_micro": 1}
    flags |= {"--short_batch": 1, "--s2l_micro": 1, "--s2l_batch": 1, "--device": "cpu"}
    flags |= {"--out_dir": out_dir} | {f"--{name}": value for name, value in changes.items()}
    return [str(x) for flag, value in flags.items() if value is not None for x in (flag, value)]


def test_the_six_files_run_in_an_empty_folder(alone, ckpt, tmp_path):
    command = [sys.executable, "longred.py", *command_line(ckpt, tmp_path / "out")]
    done = subprocess.run(command, cwd=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"extended checkpoint: {tmp_path}/out/hf" in done.stdout
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out" / "hf").iterdir()} == names


REFUSED = {
    "the demo": (dict(ckpt=None), "--ckpt None: need a Hugging Face folder"),
    "a name of the hub": (dict(ckpt="llama3-8b"), "names of the hub need the folder machine/"),
    "resuming": (dict(resume="out"), "--resume out.*need the folder machine/"),
    "no number": (dict(steps="many"), "'many': need a whole number such as 4096 or 4K"),
    "no such method": (dict(method="longer"), "--method longer: need one of longred, soft_"),
    "a flag of other methods": (dict(method="mix_cpt", alpha_kl=1), "which does not read it"),
    "no such layer": (dict(distill_layers=99), "hidden states 1 to 3"),
    "no long text": (dict(long_data=None), "--long_data is missing"),
    "a folder": (dict(long_data="."), "cannot read . .*need a file of plain UTF-8 text"),
    "not above": (dict(target_len=64), "not above the original window of 64"),
    "a scaling removed": (dict(rope_type="default"), "needs a larger --rope_theta"),
    "above the window": (dict(short_len=65), "--short_len 65 is above the original window of 64"),
    "no such device": (dict(device="gpu"), "--device gpu: need cpu or cuda"),
    "no GPU": (dict(device="cuda:99"), "--device cuda:99: torch sees [0-9]+ GPUs"),
    "a beta of 1": (dict(beta2=1), "--beta2 1.0: need at least 0, at most 0.999999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_alone_what_cannot_work_ends_in_one_line(alone, ckpt, tmp_path, case, monkeypatch):
    monkeypatch.setattr(longred, "__file__", str(alone / "longred.py"))  # no machine/ next to it
    change, said = REFUSED[case]
    with pytest.raises(SystemExit) as end:
        longred.main(command_line(ckpt, tmp_path / "out", **change))
    message = str(end.value.code)
    assert message.startswith("longred: ") and "\n" not in message
    assert re.search(said, message), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", ['{"text": 5}', '{"text": "\\ud800"}', '["text"]', '{"body": "x"}']
)
def test_alone_a_record_without_text_is_named(ckpt, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(
        ValueError, match="long: cannot read .*a.jsonl .*need a file of plain UTF-8"
    ):
        data.tokenize([str(tmp_path / "a.jsonl")], data.Tokenizer(ckpt[0]), "long")


def test_alone_numbers_that_are_not_finite_end_the_run(ckpt, tmp_path):
    c = tiny_run(ckpt, tmp_path / "run", lr=1e30, distill_layers=[3])
    with pytest.raises(ValueError, match="try a smaller --lr"):
        longred.train(plain(c))
    assert not (tmp_path / "run" / "hf").exists()


def test_alone_a_run_is_not_overwritten_and_torchrun_is_refused(ckpt, tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").touch()
    c = plain(tiny_run(ckpt, tmp_path))
    with pytest.raises(ValueError, match="already holds a run; pass another --out_dir"):
        longred.train(c)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="need the folder machine/"):
        longred.train(c)
