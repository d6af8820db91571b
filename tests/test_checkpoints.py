"""machine/checkpoints.py: every format in and out, and every hostile file refused in one line."""

import dataclasses
import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch._dynamo.testing
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from machine import checkpoints, files, hf_config
from machine.checkpoints import resolve_checkpoint
from machine.corpus import tokenize
from machine.formats import (
    config_from_hf,
    config_to_hf,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from machine.run import train
from machine.settings import resolve
from machine.tokenizer import load_tokenizer
from measure import evaluate
from measure.demo import write_byte_tokenizer
from model import save, stored_dtype
from tests.conftest import (
    HERE,
    LLAMA3,
    PROPERTY,
    bpe,
    byte_tokenizer,
    edit_weights,
    hf_model,
    meta_folder,
    printed,
    rel,
    run_python,
    tiktoken_folder,
    tiny_config,
    tiny_llama,
    tiny_run,
    tokens,
)

# ----------------------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensor.*model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unknown 1 tensor.*extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).char()}), "norm.weight is I8"),
        (lambda t: t.update({GATE: torch.ones(64, 48)}), r"gate.* F32 \[64, 48\], need \[80, 48\]"),
        (lambda t: t.update({GATE: torch.ones(80, 48).to(torch.float8_e4m3fn)}), "F8_E4M3.*quant"),
        (lambda t: t.update({f"{GATE}_scale": torch.ones(1)}), "1 tensors like .*quantised"),
        (lambda t: t.update({GATE[:-6] + "qweight": t.pop(GATE)}), "1 tensors like .*quantised"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 48)}), r"lm_head.* F32 \[3, 48\]"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, said):
    folder = save_checkpoint(tiny_llama(), tmp_path / "hf")
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(folder)


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_were_padded_after_config_json_are_named_with_the_remedy(tmp_path, tied):
    folder = save_checkpoint(tiny_llama(tie_embeddings=tied), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(ValueError, match="set its vocab_size to 96"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    assert load_checkpoint(folder).config.vocab_size == 96


def test_an_index_of_another_download_is_named(tmp_path):
    folder = save_checkpoint(tiny_llama(), tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[0] for name in load_file(next(folder.glob("*.safetensors")))}
    weight_map[checkpoints.EMBEDDING] = names[1]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="lacks 2 of the 2 .*has 'model-00001-of-00001.safet"):
        load_checkpoint(folder)


def test_what_old_writers_leave_in_the_file_is_ignored(tmp_path):
    folder = save_checkpoint(tiny_llama(tie_embeddings=True), tmp_path / "hf")

    def change(t):
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, change)
    assert load_checkpoint(folder).config.tie_embeddings


def test_a_save_replaces_only_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no checkpoint"):
        save_checkpoint(tiny_llama(), tmp_path / "thesis")
    save_checkpoint(tiny_llama(), tmp_path / "hf")
    save_checkpoint(tiny_llama(seed=5), tmp_path / "hf")
    embedding = load_checkpoint(tmp_path / "hf").embed_tokens.weight
    assert torch.equal(embedding, tiny_llama(5).embed_tokens.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "thesis"]


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_weights_are_never_twice_in_memory(tmp_path, kind):
    model = tiny_llama(d_model=1024, vocab_size=12_000, d_ff=2048, std=0.02)
    size = sum(p.numel() * 4 for p in model.parameters())
    if kind == "hf":
        save_checkpoint(model, tmp_path / "it")
    else:
        meta_folder(tmp_path / "it", model, 2)
    code = """
import resource, sys
from machine import formats as model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
m = model.load_checkpoint(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(printed(run_python(code, tmp_path / "it")))
    largest = 12_000 * 1024 * 4
    assert size > 1.5e8 and grown < size + largest + 40e6, (grown, size)


FAMILIES = {
    "llama": dict(rope_theta=500.0),
    "llama 3.2": dict(
        rope_theta=5000.0,
        tie_word_embeddings=True,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32},
    ),
    "llama biased": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=None, rope_theta=1000.0),
    "qwen2": dict(use_sliding_window=False, rope_theta=1000.0),
    "qwen3": dict(rope_theta=1000.0),
    "qwen3 biased, tied": dict(attention_bias=True, tie_word_embeddings=True, rope_theta=1000.0),
}
EXTENSIONS = {
    "none": {},
    "theta": {"rope_theta": 9000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 4.0}},
}


def family_folder(folder, family):
    """A tiny random checkpoint of that family, written by transformers."""
    kind = family.split()[0].capitalize()
    shape = config_to_hf(tiny_config()) | dict(rope_scaling=None, head_dim=8, initializer_range=0.2)
    shape = {k: v for k, v in shape.items() if k not in ("architectures", "model_type")}
    config = getattr(transformers, f"{kind}Config")(**(shape | FAMILIES[family]))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("bias") or "_norm." in name:  # zeros and ones would hide one not read
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers_both_ways_after_each_extension(tmp_path, family):
    theirs, ids = family_folder(tmp_path / "hf", family), tokens(length=101)
    for name, extension in EXTENSIONS.items():
        if family == "llama 3.2" and "rope_scaling" in extension:
            with pytest.raises(ValueError, match="already scaled"):
                load_checkpoint(tmp_path / "hf", **extension)
            continue
        ours = load_checkpoint(tmp_path / "hf", **extension)
        ours.config.max_position_embeddings = 256
        extended = hf_model(save_checkpoint(ours, tmp_path / name))
        reread = load_checkpoint(tmp_path / name)
        got, before = ours.logits(ours(ids)[0]), theirs(ids).logits
        assert rel(got, extended(ids).logits) < 1e-4, name
        assert rel(reread.logits(reread(ids)[0]), got) < 1e-5, name
        assert (rel(got, before) < 1e-4) == (name == "none"), name
        assert type(extended) is type(theirs) and extended.config.max_position_embeddings == 256
        assert extended.config.tie_word_embeddings == theirs.config.tie_word_embeddings


def test_qwen3_is_extended_measured_and_exported_as_qwen3(ckpt, tmp_path):
    model = tiny_llama(vocab_size=256, std=0.1, qk_norm=True)
    folder = save_checkpoint(model, tmp_path / "original", tokenizer_from=ckpt[0])
    out = tmp_path / "run"
    exported = train(tiny_run((folder, *ckpt[1:]), out, steps=3, lr=3e-3))
    theirs, ours, ids = hf_model(exported), load_checkpoint(exported), tokens(1, 200, 256)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        assert rel(ours.logits(ours(ids)[0]), theirs(ids).logits) < 1e-4
    norm = "layers.1.self_attn.q_norm.weight"
    assert not torch.equal(ours.get_parameter(norm), model.get_parameter(norm))  # it learns too
    out_dir = str(tmp_path / "evaluated")
    flags = ["--tasks", "kept", "position", "--eval_tokens", "256", "--out_dir", out_dir]
    evaluate.main(["--base", str(folder), "--ckpt", str(out), "--device", "cpu", *flags])
    found = json.loads((tmp_path / "evaluated" / "results.json").read_text())["runs"][1]["kept"]
    assert found["kl"] > 0 and np.shape(found["attention_kl"]) == (3, 6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "never_heard_of"])
def test_a_family_that_is_not_computed_is_refused(family):
    with pytest.raises(ValueError, match=f"model_type is {family}, .*need one of llama, mistral"):
        config_from_hf(config_to_hf(tiny_config()) | {"model_type": family})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spellings_of_transformers_4_and_5_read_alike(tmp_path, family):
    family_folder(tmp_path, family)
    five, four = (json.loads((tmp_path / "config.json").read_text()) for _ in range(2))
    rope = four.pop("rope_parameters")
    four |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": four.pop("dtype")}
    four["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    older = four | {"rope_scaling": rope | {"type": rope["rope_type"]}}
    older["rope_scaling"].pop("rope_type")  # as before 4.43
    read = [config_from_hf(hf) for hf in (five, four, older)]
    assert [stored_dtype(c) for c in read] == [torch.float32] * 3
    assert len({str(dataclasses.replace(c, hf={})) for c in read}) == 1
    assert "rope_parameters" not in config_to_hf(read[0]) and config_to_hf(read[0])["rope_theta"]


def hf_folder(folder, **changes):
    """A tiny checkpoint whose config.json has these entries; None takes one out."""
    save_checkpoint(tiny_llama(max_position_embeddings=64), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
ROTARIES = {
    "scaling next to parameters": dict(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_scaling=YARN,
    ),
    "linear next to parameters": dict(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_scaling=LINEAR,
    ),
    "original at the top": dict(rope_scaling=YARN, original_max_position_embeddings=64),
    "original at the top alone": dict(
        rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=32
    ),
    "no original": dict(rope_scaling={"type": "yarn", "factor": 4.0}),
    "no original, llama3": dict(
        rope_scaling={k: v for k, v in LLAMA3.items() if "original" not in k}
    ),
    "theta twice": dict(rope_theta=9e3, rope_parameters={"rope_theta": 9e3}, rope_scaling=None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary_is_read_as_transformers_reads_it(tmp_path, name):
    folder = hf_folder(tmp_path / "hf", **ROTARIES[name])
    ours, theirs, ids = load_checkpoint(folder), hf_model(folder), tokens(length=90)
    assert rel(ours.logits(ours(ids)[0]), theirs(ids).logits) < 1e-4


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rope_theta=None, rope_scaling=LINEAR, rope_parameters={"rope_theta": 5e5}), "theta"),
        (dict(rope_scaling={"factor": 4.0}), "a factor without a kind"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rotary for some layers"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (dict(rope_interleaved=True), "rope_interleaved is True"),
        (dict(rope_theta=700.0, rope_parameters={"rope_theta": 9e3}, rope_scaling=None), "700.0"),
        (dict(rope_theta=700.0, rope_scaling=LINEAR | {"rope_theta": 9e3}), "700.0.*9000.0"),
        (dict(rope_scaling=YARN, original_max_position_embeddings=32), "is 32, inside the yarn"),
        (dict(rope_scaling=LINEAR | {"type": "yarn"}), "rope_type is 'linear', type 'yarn'"),
        (dict(rope_scaling=None, rope_parameters=PARTIAL), "partial_rotary_factor is 0.5, inside"),
        (dict(rope_scaling=LINEAR | {"partial_rotary_factor": 0.25}), "factor is 0.25, inside"),
        (dict(rope_scaling=LINEAR, rope_parameters=PARTIAL), "partial_rotary_factor is 0.5"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        load_config(hf_folder(tmp_path / "hf", **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"rope_type": "longrope"}, {"type": "longrope"}, {"type": "su"}])
def test_two_rotaries_in_one_model_are_refused_with_the_reason(tmp_path, key, kind):
    two = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0, "rope_theta": 500.0}
    changes = {"rope_scaling": None} | {key: two | kind}
    with pytest.raises(ValueError, match="which of the two a longer window would rescale") as said:
        load_config(hf_folder(tmp_path / "hf", **changes))
    assert "two rotaries in one model" in str(said.value) and "try 'default'" not in str(said.value)


def test_a_head_of_its_own_under_tied_embeddings_is_refused(tmp_path):
    folder = save_checkpoint(tiny_llama(tie_embeddings=True), tmp_path / "hf")
    changed = load_checkpoint(folder).embed_tokens.weight.clone()
    changed[90, 3] += 1.0  # a row that the first look does not see
    edit_weights(folder, lambda t: t.update({"lm_head.weight": changed}))
    with pytest.raises(ValueError, match="lm_head.weight of its own.*tie_word_embeddings"):
        load_checkpoint(folder)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf"), 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, dtype):
    if bad == 1e300 and dtype != torch.float64:
        return  # no such number, or inf
    folder, name = save_checkpoint(tiny_llama(), tmp_path / "hf"), "model.layers.1.mlp.up_proj"

    def change(t):
        t[f"{name}.weight"] = t[f"{name}.weight"].to(dtype)
        t[f"{name}.weight"][7, 9] = bad

    edit_weights(folder, change)
    with pytest.raises(ValueError, match=f"{name}.weight holds 1 numbers of .* inf or nan"):
        load_checkpoint(folder)


def test_large_finite_weights_are_no_fault():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        most = torch.full((99, 99), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
        checkpoints.check_finite(most, "w", "file")


@pytest.mark.parametrize(
    "changes, window",
    [
        (dict(rope_scaling=YARN), 256),  # 64 is from before the scaling
        (dict(rope_scaling=YARN, max_position_embeddings=256), 256),
        (dict(rope_scaling=YARN, max_position_embeddings=80), 256),
        (dict(rope_scaling=LINEAR, max_sequence_length=256), 256),
        (dict(rope_scaling=LINEAR, original_max_position_embeddings=64), 256),
        (dict(rope_scaling=LINEAR, original_max_position_embeddings=16), 64),
        (dict(rope_scaling=LINEAR), "--original_len 64 or --original_len 256"),
        (dict(model_type="qwen2", max_position_embeddings=None), 32768),
        (dict(model_type="mistral", max_position_embeddings=None, sliding_window=None), 131072),
        (dict(max_position_embeddings=None), 2048),
    ],
)
def test_the_window_of_a_config(tmp_path, changes, window, capsys):
    config = json.loads((hf_folder(tmp_path / "hf") / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    config |= {"sliding_window": None}
    read = config_from_hf(config)
    if isinstance(window, str):
        with pytest.raises(ValueError, match=window):
            hf_config.original_window(read)
        return
    assert hf_config.original_window(read) == window
    assert hf_config.original_window(config_from_hf(config_to_hf(read))) == window


def test_an_export_has_one_window_and_one_rotary(tmp_path):
    old = dict(max_sequence_length=64, n_ctx=64, seq_length=64, max_length=64)
    old |= dict(auto_map={"AutoModelForCausalLM": "modeling_x.Llama"})
    ours = load_checkpoint(hf_folder(tmp_path / "hf", **old), rope_scaling=LINEAR)
    ours.config.max_position_embeddings = 256
    out = json.loads((save_checkpoint(ours, tmp_path / "out") / "config.json").read_text())
    assert [out[k] for k in ("max_sequence_length", "n_ctx", "seq_length")] == [256] * 3
    assert out["original_max_position_embeddings"] == 64 and "max_length" not in out
    assert "auto_map" not in out
    assert hf_config.original_window(load_config(tmp_path / "out")) == 256
    theirs, ids = hf_model(tmp_path / "out"), tokens(length=90)
    assert rel(ours.logits(ours(ids)[0]), theirs(ids).logits) < 1e-4


def test_what_is_not_read_is_named(tmp_path, capsys):
    hf_config.say_once.cache_clear()
    changes = dict(logit_scale=0.5, qk_norm=True, auto_map={"AutoModel": "modeling_own.Own"})
    load_config(hf_folder(tmp_path / "hf", **changes))
    said = capsys.readouterr().out
    assert "logit_scale, qk_norm is not read" in said and "modeling_own.Own" in said
    load_config(hf_folder(tmp_path / "plain"))
    assert "WARNING" not in capsys.readouterr().out


# What the published config.json files of models in HUB_NAMES hold in addition to the usual entries.
PUBLISHED = {
    "smollm2": dict(is_llama_config=True, rope_interleaved=False, pretraining_tp=1, use_cache=True),
    "smollm2's": {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "llama": dict(attention_bias=False, mlp_bias=False, initializer_range=0.02, eos_token_id=[1]),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=131072),
    "qwen3": dict(model_type="qwen3", max_window_layers=28, attention_dropout=0.0, head_dim=16),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_are_read_without_a_warning(capsys, name):
    hf_config.say_once.cache_clear()
    hf = config_to_hf(tiny_config()) | PUBLISHED[name]
    hf |= {"architectures": [hf_config.FAMILIES[hf["model_type"]]]}
    assert config_from_hf(hf).n_layers == 3
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_an_export_that_is_not_finite_is_refused_before_anything_is_written(tmp_path, dtype):
    model = tiny_llama().to(dtype)
    save_checkpoint(model, tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.norm.weight[0] = 65504.0  # the largest of float16
    save_checkpoint(model, tmp_path / "large")
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match="norm.weight has 1 numbers that are inf or nan.*bfloat16"):
        save_checkpoint(model, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_weights_beyond_float16_are_exported_in_bfloat16(ckpt, tmp_path, capsys):
    folder = shutil.copytree(ckpt[0], tmp_path / "hf")
    edit_weights(folder, lambda t: t["model.norm.weight"].fill_(70_000.0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    c = tiny_run(ckpt, tmp_path / "run", steps=1, eval_tokens=0, method="long_cpt")
    out = train(dataclasses.replace(c, ckpt=str(folder)))
    assert "the export is in bfloat16" in capsys.readouterr().out
    assert stored_dtype(load_config(out)) == torch.bfloat16
    assert load_checkpoint(out).norm.weight.min() > 65504


def test_licences_and_chat_templates_go_along_and_what_does_not_is_named(tmp_path, capsys):
    source = save_checkpoint(tiny_llama(vocab_size=257), tmp_path / "source")
    byte_tokenizer(source)
    along = "LICENSE NOTICE.txt USE_POLICY.md chat_template.json additional_chat_templates/a.jinja"
    for name in (*along.split(), "tekken.json", "README.md", "chat_template.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    for _ in range(2):  # written over, and none twice
        out = save_checkpoint(load_checkpoint(source), tmp_path / "out", tokenizer_from=source)
        said = capsys.readouterr().out
        assert (
            f"left out of the export, next to the weights in {source}: README.md, tekken.json\n"
            in said
        )
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    weights = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found == {*along.split(), "chat_template.jinja", *weights}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "case",
    ["tied not said", "base model", "module.", "_orig_mod."]
    + ["inside: _checkpoint_wrapped_module.", "inside: _fsdp_wrapped_module."],
)
def test_names_of_tensors_that_others_write_get_the_remedy(tmp_path, case, tied):
    folder = save_checkpoint(tiny_llama(tie_embeddings=tied), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    if case == "tied not said":
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        edit_weights(folder, lambda t: t.pop("lm_head.weight", None))
        with pytest.raises(ValueError, match="set it to true"):
            load_checkpoint(folder)
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        assert load_checkpoint(folder).config.tie_embeddings
        return
    tensors = load_file(folder / "model.safetensors")
    if case == "base model":
        tensors.pop("lm_head.weight", None)
        tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
        said = "from transformers import" if tied else "without its lm_head; take the whole"
    elif case.startswith("inside"):
        case = case.removeprefix("inside: ")
        tensors = {re.sub(r"(layers\.\d\.)", rf"\1{case}", name): x for name, x in tensors.items()}
        said = f"have '{case}' in them"
    else:
        tensors, said = {case + name: t for name, t in tensors.items()}, f"have '{case}' in them"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said) as refused:
        load_checkpoint(folder)
    assert "\n" not in str(refused.value)
    if case == "base model" and tied:
        command = str(refused.value).partition("resave it: ")[2]
        command = command.replace("python -c", f"{sys.executable} -c")
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
        assert load_checkpoint(f"{folder}-whole").config.n_layers == 3


def test_a_tensor_in_two_shards_is_refused_naming_both(tmp_path):
    folder = save_checkpoint(tiny_llama(), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], {}
    for name, part in zip(names, (tensors, {EMBEDDING: tensors[EMBEDDING]}), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=f"{EMBEDDING} is in both .*{names[0]} and .*fetch both"):
        load_checkpoint(folder)


EMBEDDING = checkpoints.EMBEDDING


@pytest.mark.parametrize("given", [".", "../hf", "./"])
def test_the_default_out_dir_has_the_checkpoints_name(ckpt, tmp_path, monkeypatch, given):
    folder = shutil.copytree(ckpt[0], tmp_path / "hf")
    monkeypatch.chdir(folder)
    c = dataclasses.replace(tiny_run(ckpt, tmp_path / "x"), ckpt=given, out_dir=None)
    assert resolve(c, load_config(folder), folder).out_dir.endswith("out/hf-256")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_not_merged_is_refused(tmp_path, name):
    folder = hf_folder(tmp_path / "hf")
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}, an adapter that is not merged"):
        load_checkpoint(folder)


def test_a_larger_theta_over_yarn_is_refused_before_anything_is_read(ckpt, tmp_path):
    folder = hf_folder(tmp_path / "hf", rope_scaling=YARN)
    run = dataclasses.replace(tiny_run(ckpt, tmp_path / "out", target_len=512), ckpt=str(folder))
    with pytest.raises(ValueError, match="scaled by YaRN.*--rope_type default"):
        train(run)
    with pytest.raises(ValueError, match="--rope_type default only removes .* --rope_theta"):
        train(dataclasses.replace(run, rope_type="default", rope_theta=None))


def test_an_export_carries_what_was_next_to_the_weights(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    source = save_checkpoint(tiny_llama(), tmp_path / "source", tmp_path / "tokenizer")
    (source / "generation_config.json").write_text(
        '{"top_p": 0.9, "max_length": 4, "eos_token_id": [3, 5]}'
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "eos_token": "b",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_checkpoint(source, rope_theta=9e3)
    model.config.max_position_embeddings = 4096
    out = save_checkpoint(model, tmp_path / "out", tokenizer_from=source)
    theirs, tokenizer = hf_model(out), transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.generation_config.top_p == 0.9 and theirs.generation_config.max_length != 4
    assert len({file.stat().st_mode for file in (out / "config.json", *out.glob("*.safe*"))}) == 1
    assert theirs.generation_config.eos_token_id == [3, 5]
    assert theirs.config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert tokenizer.eos_token == "b" and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.decode(tokenizer("it's 7 o'clock").input_ids) == "it's 7 o'clock"


def test_weights_that_cannot_be_written_end_in_one_line_and_leave_nothing(tmp_path):
    """safetensors says a full disk, or a limit, by an exception of its own."""
    limit, llama = resource.getrlimit(resource.RLIMIT_FSIZE), tiny_llama()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        said = r"cannot write .*out: File too large; raise the limit .*ulimit -f"
        with pytest.raises(ValueError, match=said), files.writing(tmp_path / "out"):
            save_checkpoint(llama, tmp_path / "out")
        assert not [*tmp_path.iterdir()]
        with pytest.raises(OSError, match="cannot write .*alone.*File too large"):
            save(llama, tmp_path / "alone", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_files_that_may_only_be_read_are_carried_into_an_export(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_byte_tokenizer(source)
    (source / "tokenizer_config.json").write_text("{}")
    for path in source.iterdir():
        path.chmod(0o444)
    save(tiny_llama(), out, source)
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_a_config_without_a_class_gets_its_familys(tmp_path):
    llama = tiny_llama()
    llama.config.hf = {"model_type": "llama", "architectures": None}
    out = save_checkpoint(llama, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_an_export_says_what_other_programs_get_wrong(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    source = save_checkpoint(tiny_llama(), tmp_path / "source", tmp_path / "tokenizer")
    for kind, said in {"yarn": "transformers below 4.51", "linear": "--max-model-len 256"}.items():
        scaling = {"rope_type": kind, "factor": 4.0}
        model = load_checkpoint(source, rope_scaling=scaling)
        model.config.max_position_embeddings = 256
        (note,) = checkpoints.client_notes(save_checkpoint(model, tmp_path / kind))
        assert said in note
    assert checkpoints.client_notes(source) == []
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (note,) = checkpoints.client_notes(source)
    assert "llama.cpp tokenises otherwise" in note
    (source / "tokenizer.model").write_bytes(b"")
    assert checkpoints.client_notes(source) == []


# ----------------------------------------------------------------------------------- Meta's folders


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_metas_shards_give_the_logits_of_the_same_weights(tmp_path, shards, embedding_dim):
    shape = dict(n_heads=16, n_kv_heads=8, head_dim=4, d_model=64, n_layers=2)
    model = tiny_llama(**shape).to(torch.bfloat16)
    # Llama 2 leaves the vocabulary to the tokenizer
    params = {} if embedding_dim == 0 else {"vocab_size": -1}
    folder = meta_folder(tmp_path / "meta", model, shards, embedding_dim, **params)
    ours = load_checkpoint(folder)
    for (name, want), got in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(want.float(), got), name
    assert ours.config.max_position_embeddings is None
    assert stored_dtype(ours.config) == torch.bfloat16
    theirs = hf_model(save_checkpoint(ours, tmp_path / "hf"))
    assert rel(theirs(tokens()).logits, ours.logits(ours(tokens())[0])) < 1e-4


def test_metas_window_and_scaling_follow_the_generation(tmp_path):
    shape = dict(vocab_size=128256, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=8)
    model = tiny_llama(**shape, n_layers=1)
    model.lm_head.weight.data.mul_(2.0)
    llama3 = load_config(meta_folder(tmp_path / "3", model, 1))
    assert (llama3.max_position_embeddings, llama3.rope_scaling) == (8192, None)
    scaled = load_config(meta_folder(tmp_path / "3.1", model, 1, use_scaled_rope=True))
    assert scaled.max_position_embeddings == 131072 and scaled.rope_scaling == LLAMA3
    assert not scaled.tie_embeddings
    model.lm_head.weight.data.copy_(model.embed_tokens.weight)
    tied = load_checkpoint(meta_folder(tmp_path / "3.2", model, 1, use_scaled_rope=True))
    assert tied.config.tie_embeddings and tied.config.rope_scaling["factor"] == 32.0


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "consolidated.01.pth").unlink(), "asks for|a file is missing"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "need consolidated.00.pth"),
        (lambda f: (f / "params.json").write_text("{}"), "params.json: num_hidden_layers is None"),
        (lambda f: (f / "consolidated.01.pth").write_bytes(b"PK"), "01.pth is truncated, damaged"),
        (lambda f: torch.save([1], f / "consolidated.01.pth"), "01.pth is no plain dict"),
    ],
)
def test_a_damaged_meta_folder_is_refused_in_one_line(tmp_path, damage, said):
    folder = meta_folder(tmp_path / "meta", tiny_llama(), 2)
    damage(folder)
    with pytest.raises(ValueError, match=said) as e:
        load_checkpoint(folder)
    assert "\n" not in str(e.value)


def test_metas_folder_is_extended_and_its_export_is_a_checkpoint(ckpt, tmp_path):
    folder = meta_folder(tmp_path / "meta", tiny_llama(vocab_size=612, n_layers=2, std=0.1), 2)
    tiktoken_folder(folder, bpe(vocab_size=276))
    run = tiny_run(ckpt, tmp_path / "out", steps=1, distill_layers=[2], eval_tokens=0)
    run.ckpt = str(folder)
    with pytest.raises(ValueError, match="--original_len is missing: .* 4096 for Llama 2"):
        train(run)
    train(dataclasses.replace(run, original_len=64))
    exported = load_config(resolve_checkpoint(tmp_path / "out"))
    assert exported.max_position_embeddings == 256 and exported.rope_theta == 3000.0
    assert stored_dtype(exported) == torch.bfloat16
    further = tiny_run(ckpt, tmp_path / "further", target_len=512, steps=1, eval_tokens=0)
    further.ckpt = str(tmp_path / "out")
    assert load_config(train(further)).max_position_embeddings == 512


# ------------------------------------------------------------------------------------------ the hub


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a download asks for; some/model is the folder `files`."""

    files, asked = None, []

    def log_message(self, *args):
        pass

    def do_GET(self):
        _, *parts = self.path.split("?")[0].split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        status, error = {
            "meta-llama/Meta-Llama-3-8B": (401, "GatedRepo"),
            "some/broken": (500, ""),
            "some/model": (200, ""),
        }.get(repo, (404, "RepoNotFound"))
        sha, body = "a" * 40, b""
        before = {"revision", "resolve"} & {*parts}
        asked = parts[parts.index(before.pop()) + 1] if before else sha
        if status == 200 and asked not in ("main", sha, "v1.0", "b" * 40):
            status, error = 404, "RevisionNotFound"
        sha = "b" * 40 if asked in ("v1.0", "b" * 40) else sha
        names = sorted(p.relative_to(self.files) for p in self.files.rglob("*"))
        if status == 200 and "tree" in parts:
            body = [dict(type="file", path=str(n), oid="b" * 40, size=1) for n in names]
        elif status == 200 and parts[0] == "api":
            siblings = [{"rfilename": str(n)} for n in names]
            body = {"id": repo, "sha": sha, "private": False, "siblings": siblings}
        elif status == 200:
            self.asked.append("/".join(parts[4:]))
            body = (self.files / self.asked[-1]).read_bytes()
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{zlib.crc32(self.path.encode())}"')
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_the_hub_is_asked_for_what_is_needed_and_refusals_are_explained(tmp_path):
    folder = save_checkpoint(tiny_llama(), tmp_path / "files")
    for name in ("original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"much")
    Hub.files, Hub.asked = folder, []
    answers = {
        "some/model": "a" * 40,  # the commit that was read, in the path that a run records
        "some/model@v1.0": "b" * 40,
        "some/model@v9": "it has no revision 'v9'.*hf download some/model --revision v9",
        "llama3-8b": "licence must be accepted at .*Meta-Llama-3-8B, and you are not logged in",
        "some/broken": "out of reach .*500.* you are not logged in",
        "no/body": "no such repository",
    }
    code = """
import json, sys
from machine import formats as model
for name in sys.argv[1:]:
    try: print(model.load_checkpoint(name) and model.checkpoints.resolve_checkpoint(name).name)
    except ValueError as e: print(e)
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    process = run_python(code, *answers, **env, HF_TOKEN="", HF_HUB_OFFLINE="")
    lines = printed(process).splitlines()
    server.shutdown()
    assert process.exitcode == 0, lines
    for (name, want), got in zip(answers.items(), lines, strict=True):
        assert re.search(want, got), (name, lines)
        assert got == want or ("hf auth login" in got and "hf download" in got), got
    assert sorted(set(Hub.asked)) == ["config.json", "model.safetensors"]


def test_the_downloads_that_refusals_name_bring_what_was_missing(tmp_path):
    hf = shutil.which("hf", path=os.path.dirname(sys.executable)) or shutil.which("hf")
    if not hf:
        pytest.skip("no hf here")
    Hub.files, Hub.asked = save_checkpoint(tiny_llama(), tmp_path / "files"), []
    byte_tokenizer(Hub.files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_TOKEN": "", "HF_HUB_OFFLINE": "", "HF_HOME": f"{tmp_path}/home"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}

    def obey(refusal):
        command = re.search(r"hf download [^`]*", refusal)[0].replace("OWNER/NAME", "some/model")
        command = command.replace("hf", hf, 1)
        subprocess.run(["bash", "-c", command], env=env, check=True, capture_output=True)

    with pytest.raises(ValueError, match="a sentencepiece model") as refused:
        (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
        load_tokenizer(tmp_path)
    obey(str(refused.value))
    assert load_tokenizer(tmp_path).vocab_size == 257
    code = "from machine.formats import load_checkpoint as load; load('some/model@v1.0')"
    first = run_python(code, **env | {"HF_HUB_OFFLINE": "1"})
    refusal = printed(first)
    assert first.exitcode and "cannot get 'some/model@v1.0' from the hub" in refusal
    obey(refusal)
    server.shutdown()
    again = run_python(code, **env | {"HF_HUB_OFFLINE": "1"})
    assert not printed(again) and again.exitcode == 0


def test_a_hub_out_of_reach_is_said_whatever_kind_its_error_is(monkeypatch):
    """huggingface_hub below 1.0 raises a kind of ValueError for it."""

    def away(*args, **kwargs):
        raise type("LocalEntryNotFoundError", (FileNotFoundError, ValueError), {})("no snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(ValueError, match=r"cannot get 'some/model' from the hub.*--ckpt /path"):
        load_checkpoint("some/model")


def test_a_disk_that_the_hubs_files_fill_is_named_and_no_login_asked_for(tmp_path, monkeypatch, tk):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    name = "a.jsonl", 9, "me/texts", "c0ffee"
    monkeypatch.setattr("machine.corpus._hub_files", lambda spec: [[*name]])
    for read in (
        lambda: load_checkpoint("some/model"),
        lambda: tokenize(["hf:me/texts"], tk, tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match="hub, where the hub's files go, is full.*HF_HOME"):
            read()


# ------------------------------------------------------------------------------------ hostile files

CAN_TAKE = 200e6  # bytes beyond the file's own size that a hostile one may cost


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {HERE / 'pwned'}",)


def forged(header: str, data=b"", size=None) -> bytes:
    raw = header.encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + data


TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
WEIGHTS = {
    "header of 2^60 bytes": forged("{}", size=2**60),
    "header of a million tensors": forged(
        "{" + ",".join(f'"{i}":{TENSOR % (0, 0)}' for i in range(10**6)) + "}"
    ),
    "shape of 2^60": forged(f'{{"a":{TENSOR % (0, 8)}}}'.replace("[2]", f"[{2**60}]"), b"0" * 8),
    "overlap": forged(f'{{"a":{TENSOR % (0, 8)},"b":{TENSOR % (4, 12)}}}', b"0" * 12),
    "name twice": forged(f'{{"a":{TENSOR % (0, 8)},"a":{TENSOR % (0, 8)}}}', b"0" * 8),
    "nested": forged("[" * 10**6),
}
E, Q = "tok_embeddings.weight", "layers.1.attention.wq.weight"
PLAIN = {  # tensors in a .pth that are none, or claim more than the file holds
    "scalar": lambda t: t.update({E: torch.tensor(1.0)}),
    "vector": lambda t: t.update({E: torch.ones(96 * 48)}),
    "empty": lambda t: t.update({"output.weight": torch.zeros(0, 0)}),
    "no rows": lambda t: t.update({E: torch.zeros(0, 48)}),
    "sparse": lambda t: t.update({Q: t[Q].to_sparse()}),
    "csr": lambda t: t.update({Q: t[Q].to_sparse_csr()}),
    "meta": lambda t: t.update({Q: t[Q].to("meta")}),
    "stride 0": lambda t: t.update({Q: torch.ones(1, 1).expand(2**20, 2**20)}),
    "number for a name": lambda t: t.update({7: t[Q]}),
    "list of numbers": lambda t: t.update({Q: [1.0]}),
}
NUMBERS = {
    "num_key_value_heads": (4, "num_attention_heads 6 is not a multiple"),
    "num_hidden_layers": (2**31 - 1, "num_hidden_layers is 2147483647, need"),
    "hidden_size": (2**20, r"embed_tokens.weight is F32 \[96, 48\]"),
    "vocab_size": (2**31 - 1, "vocab_size is 2147483647, need"),
    "rope_theta": (10**4000, "rope_theta: got 1000"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps is nan"),
    "rope_scaling": ({"rope_type": "spiral"}, "rope_type: got 'spiral'"),
    "model_type": ([], "model_type is \\[\\]"),
    "intermediate_size": (True, "intermediate_size is True"),
    "quantization_config": ({"bits": 4}, "quantization_config is .* does not compute"),
    "sliding_window": (64, "sliding_window is 64"),
}


def hostile(root):
    """{name: (folder, what is said of it)}"""
    good = save_checkpoint(tiny_llama(), root / "good")
    whole = (good / "model.safetensors").read_bytes()
    weights = WEIGHTS | {"truncated": whole[: len(whole) // 2]}
    config = json.loads((good / "config.json").read_text())
    sys.set_int_max_str_digits(5000)
    numbers = {k: (json.dumps(config | {k: v}), said) for k, (v, said) in NUMBERS.items()}
    texts = {"deep": "[" * 10**6, "large": " " * 2**23 + "{}", "list": "[]"}
    texts = {k: (text, "config.json .*(damaged|holds a list)") for k, text in texts.items()}
    cases = {}
    for name, raw in weights.items():
        cases[name] = shutil.copytree(good, root / name), "safetensors is missing, truncated or dam"
        (root / name / "model.safetensors").write_bytes(raw)
    for name, (text, said) in (numbers | texts).items():
        cases[name] = shutil.copytree(good, root / name), said
        (root / name / "config.json").write_text(text)
    for name in ("config.json", "model.safetensors"):
        folder = shutil.copytree(good, root / f"{name} loop")
        (folder / name).unlink()
        (folder / name).symlink_to(name)
        cases[folder.name] = folder, "holds no config.json|holds neither model.safetensors"
    for name in ("config.json", "model.safetensors", "shard.safetensors"):
        folder = shutil.copytree(good, root / f"{name} pipe")
        if name == "shard.safetensors":
            (folder / "model.safetensors").unlink()
            index = {"weight_map": {"a": name}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        cases[folder.name] = folder, "holds no config.json|holds neither|it is no plain file"
        folder = shutil.copytree(good, root / f"{name} pointer")
        (folder / "model.safetensors").write_bytes(files.LFS + b"\noid sha256:0\nsize 9\n")
        cases[folder.name] = folder, "Git LFS pointer.*git lfs pull"
    (root / "loop").symlink_to("loop")
    cases["loop"] = root / "loop", "no checkpoint .*loop"
    for i, content in enumerate((Bomb(), {"tok_embeddings.weight": Bomb()})):
        folder = meta_folder(root / f"bomb{i}", tiny_llama(), 1)
        torch.save(content, folder / "consolidated.00.pth")
        cases[folder.name] = folder, "never run"
    for name, change in PLAIN.items():
        folder = meta_folder(root / name, tiny_llama(), 1)
        tensors = torch.load(folder / "consolidated.00.pth")
        change(tensors)
        torch.save(tensors, folder / "consolidated.00.pth")
        cases[name] = folder, "no plain dict of tensors|lacks a matrix"
    folder = meta_folder(root / "pth pipe", tiny_llama(), 1)
    (folder / "consolidated.00.pth").unlink()
    os.mkfifo(folder / "consolidated.00.pth")
    cases[folder.name] = folder, "consolidated.00.pth is no plain file"
    folder = meta_folder(root / "mistral", tiny_llama(), 1)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.safetensors")
    cases[folder.name] = folder, "Mistral's own format.*config.json"
    unpacked = io.BytesIO()
    torch.save({"a": "0" * 200_000_000}, unpacked)
    folder = meta_folder(root / "packed", tiny_llama(), 1)
    cases["packed"] = folder, "never run"
    packed = zipfile.ZipFile(folder / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED)
    with packed, zipfile.ZipFile(unpacked) as plain:  # 200 KB that unpack to 200 MB, held thrice
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    return cases


def test_hostile_checkpoints_end_in_one_line_and_take_no_memory(tmp_path):
    cases = hostile(tmp_path)
    code = """
import json, resource, sys
from machine import formats as model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model.load_checkpoint(sys.argv[1]); before = peak()
for folder in sys.argv[2:]:
    try: model.load_checkpoint(folder); said = "loaded"
    except ValueError as e: said = str(e)
    print(json.dumps([said, peak() - before]))
"""
    process = run_python(code, tmp_path / "good", *(folder for folder, _ in cases.values()))
    results = [json.loads(x) for x in printed(process).splitlines() if x.startswith("[")]
    assert process.exitcode == 0, results
    for (name, (folder, want)), (message, grown) in zip(cases.items(), results, strict=True):
        assert re.search(want, message), (name, message[:500])
        assert "\n" not in message and len(message) < 600, (name, message[:1000])
        sizes = (
            [f.stat().st_size for f in folder.iterdir() if f.is_file()] if folder.is_dir() else []
        )
        assert grown < sum(sizes) + CAN_TAKE, (name, grown)
    assert not (HERE / "pwned").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
SCALING = st.dictionaries(
    st.sampled_from(["rope_type", "factor", "rope_theta", "low_freq_factor", "beta_fast"]),
    st.sampled_from(["yarn", "llama3", "ntk", "linear", 1e300, 10**400, 1, 2.0]) | JSON,
)
ENTRIES = sorted(config_to_hf(tiny_config())) + ["rope_parameters", "layer_types", "sliding_window"]


@settings(PROPERTY, max_examples=100)
@given(st.dictionaries(st.sampled_from(ENTRIES), JSON | SCALING, max_size=4))
def test_any_config_is_read_or_refused_with_one_line(changes):
    try:
        config = config_from_hf(config_to_hf(tiny_config()) | changes)
    except ValueError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
    else:
        assert config_to_hf(config_from_hf(config_to_hf(config))) == config_to_hf(config)


@settings(PROPERTY, max_examples=200)
@given(
    st.binary(max_size=40)
    | st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 80), st.binary(max_size=80)).map(
        lambda x: x[0].to_bytes(8, "little") + x[1]
    )
    | st.dictionaries(st.text(max_size=3), JSON, max_size=3).map(lambda d: forged(json.dumps(d)))
)
def test_any_bytes_as_safetensors_are_read_or_refused_with_one_line(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(raw)
    try:
        assert isinstance(checkpoints._weight_files(folder), dict)
    except ValueError as e:
        assert "\n" not in str(e) and len(str(e)) < 800
