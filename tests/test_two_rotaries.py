"""--short_rope original, and its export: two rotaries, as transformers' longrope states them."""

import json

import pytest
import torch

from longred import loss_table, main, plan_streams, train
from machine import hf_config
from model import load_checkpoint, load_config, rescaled, save_checkpoint
from rope_kernels import rope_frequencies
from tests.conftest import (
    LLAMA3,
    byte_tokenizer,
    distance_by_hand,
    hf_model,
    read_log,
    rel,
    tiny_llama,
    tiny_run,
    tokens,
)

ROTARIES = {  # of the original, and what extends it
    "abf": (None, 9000.0, None),
    "linear": (None, None, {"rope_type": "linear", "factor": 4.0}),
    "ntk": (None, None, {"rope_type": "ntk", "factor": 4.0}),
    "llama3 and abf": (LLAMA3 | {"original_max_position_embeddings": 16}, 9000.0, None),
}


def two_models(tmp_path, kind):
    """(folder with both rotaries, the original, what the student computes under each)."""
    scaling, theta, new = ROTARIES[kind]
    byte_tokenizer(tmp_path / "tk")
    model = tiny_llama(rope_scaling=scaling)
    original = save_checkpoint(model, tmp_path / "original", tokenizer_from=tmp_path / "tk")
    student = load_checkpoint(original, theta, new)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.05)
    config, shape = student.config, (64, 256)
    old = student.with_frequencies(model.inv_freq, 1.0)
    both = hf_config.longrope(config.rope_theta, model.inv_freq, student.inv_freq, *shape)
    student.config = rescaled(config, None, {"rope_type": "default"})
    student.config.rope_scaling, student.config.max_position_embeddings = both, 256
    return save_checkpoint(student, tmp_path / "both"), student, old


@pytest.mark.parametrize("kind", ROTARIES)
def test_each_reader_sees_the_old_rotary_within_the_old_window_and_the_new_beyond(tmp_path, kind):
    folder, new, old = two_models(tmp_path, kind)
    theirs, ours = hf_model(folder), load_checkpoint(folder)
    assert load_config(folder).max_position_embeddings == 256
    with torch.no_grad():
        for length, want, other in ((64, old, new), (65, new, old), (200, new, old)):
            ids = tokens(1, length)
            logits = want.logits(want(ids)[0])
            assert rel(theirs(ids).logits, logits) < 2e-5
            read = ours.for_length(length)
            assert rel(read.logits(read(ids)[0]), logits) < 2e-5
            assert rel(other.logits(other(ids)[0]), logits) > 1e-2  # the two can be told apart


def test_generation_chooses_a_rotary_once_by_its_whole_length(tmp_path):
    folder, new, old = two_models(tmp_path, "abf")
    both, ids = load_checkpoint(folder), tokens(1, 40)
    new.config = old.config = rescaled(new.config, None, {"rope_type": "default"})
    assert torch.equal(both.generate(ids, 24), old.generate(ids, 24))  # 64 tokens in all
    assert torch.equal(both.generate(ids, 25), new.generate(ids, 25))
    assert not torch.equal(both.generate(ids, 25)[:, :64], both.generate(ids, 24))
    assert torch.equal(both.generate(ids, 24, pcd={}), old.generate(ids, 24, pcd={}))


@pytest.mark.parametrize("method", ["longred", "soft_replay"])
def test_the_short_stream_alone_is_read_under_the_old_rotary(ckpt, tmp_path, method):
    c = tiny_run(ckpt, tmp_path / "run", method=method, short_rope="original", alpha_kl=1.0)
    c.original_len, c.train_len, c.short_len, c.distill_layers = 64, 256, 64, [1, 3]
    c.alpha_short, c.alpha_s2l, c.long_position_scheme = 5.0, 10.0, "ordinary"
    teacher, student = (load_checkpoint(c.ckpt, theta) for theta in (None, 3000.0))
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.05)
    old = load_checkpoint(c.ckpt)  # the student's weights under the teacher's rotary
    old.load_state_dict(student.state_dict())
    ids, index = tokens(2, 64, 256), torch.arange(64)
    batch = type("Batch", (), dict(ids=ids, indices=index, positions=index, documents=None))
    batch.labels = ids
    table, streams = loss_table(c, student, teacher), plan_streams(c)
    found = table[streams["short"].loss](batch)
    a, b = (m(ids, taps=(1, 3)) for m in (old, teacher))
    log_p = b[0].matmul(teacher.lm_head_weight.T).log_softmax(-1)
    log_q = a[0].matmul(old.lm_head_weight.T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    distance = sum(distance_by_hand(a[1][i], b[1][i]) for i in (1, 3))
    assert found["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    want = {"longred": distance, "soft_replay": kl}[method]
    assert found["short"].item() == pytest.approx(want.item(), rel=1e-4)
    # Its gradient reaches the student's own weights, and is that of the model of one rotary.
    (found["short"] + found["kl"]).backward()
    (want + kl).backward()
    for (name, p), q in zip(student.named_parameters(), old.parameters(), strict=True):
        assert rel(p.grad, q.grad) < 1e-3, name
    # The other streams are under the new one.
    hidden, _ = student(ids, index)
    s2l = table[streams["s2l"].loss](batch)
    log_q = hidden.matmul(student.lm_head_weight.T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    want = {"longred": distance_by_hand(hidden, b[0]), "soft_replay": kl}[method]
    assert s2l.item() == pytest.approx(want.item(), rel=1e-4)


def test_a_run_exports_one_rotary_or_both_and_reports_both_readings(ckpt, tmp_path, capsys):
    settings = dict(short_rope="original", distill_layers=[3], keep=0)
    one, both = (
        train(tiny_run(ckpt, tmp_path / name, export_longrope=name == "both", **settings))
        for name in ("one", "both")
    )
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in read_log(one.parent)] == [x[key] for x in read_log(both.parent)]
    single, double = (json.loads((f / "config.json").read_text()) for f in (one, both))
    assert single.get("rope_scaling") is None and single["rope_theta"] == 3000.0
    scaling = double["rope_scaling"]
    assert double["original_max_position_embeddings"] == 64 and scaling["factor"] == 4.0
    old, _ = rope_frequencies(16, 500.0)
    plain, _ = rope_frequencies(16, 3000.0)
    torch.testing.assert_close(plain / torch.tensor(scaling["short_factor"]).double(), old)
    assert scaling["long_factor"] == [1.0] * 8  # of plain ABF
    report = (one.parent / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| longred")]
    assert [row.split("|")[1].strip() for row in rows] == ["longred", "longred, old rotary"]
    assert "vLLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--method", "mix_cpt"], "--short_rope original with --method mix_cpt"),
        (["--rope_type", "yarn"], "attention factor is not 1"),
        (["--short_rope", "new", "--export_longrope"], "there is one rotary"),
    ],
)
def test_what_two_rotaries_cannot_be_is_refused(ckpt, tmp_path, flags, said):
    folder, long, short = ckpt
    given = ["--ckpt", folder, "--target_len", 256, "--long_data", long, "--short_data", short]
    given += ["--out_dir", tmp_path / "run", "--short_rope", "original", *flags]
    with pytest.raises(SystemExit, match=said):
        main([str(x) for x in given])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"attention_factor": 1.19}, "attention_factor is 1.19"),
        ({"attention_factor": None}, "attention_factor is None"),
        ({"short_factor": [1.0] * 7}, "need 8 numbers"),
        ({"long_factor": [1.0] * 7 + [0.0]}, "need 8 numbers"),
        ({"long_factor": None}, "long_factor is None"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
    ],
)
def test_a_longrope_that_is_not_two_plain_rotaries_is_refused(tmp_path, change, said):
    folder, _, _ = two_models(tmp_path, "abf")
    hf = json.loads((folder / "config.json").read_text())
    hf.pop("original_max_position_embeddings")
    hf["rope_scaling"] |= change
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=said):
        load_checkpoint(folder)


def test_a_checkpoint_with_two_rotaries_is_measured_under_both_and_not_extended(ckpt, tmp_path):
    from measure import evaluate

    run = tiny_run(ckpt, tmp_path / "run", short_rope="original", export_longrope=True, steps=2)
    run.distill_layers, run.eval_tokens, run.lr = [3], 0, 1e-6  # the rotary is what differs
    out = train(run)
    flags = ["--base", ckpt[0], "--ckpt", out, "--data", ckpt[1], "--short_data", ckpt[2]]
    flags += ["--tasks", "kept", "--eval_tokens", 512, "--out_dir", tmp_path / "measured"]
    evaluate.main([str(x) for x in [*flags, "--cache_dir", tmp_path / "tokens"]])
    results = json.loads((tmp_path / "measured" / "results.json").read_text())
    (drift,) = results["tables"].values()
    new, old = drift["run"]["KL(original, it)"][0], drift["run, old rotary"]["KL(original, it)"][0]
    assert old < new / 10
    with pytest.raises(SystemExit, match="two rotaries"):
        main(["--ckpt", str(out), "--target_len", "1024", "--out_dir", str(tmp_path / "more")])
