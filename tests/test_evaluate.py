"""measure/: losses, RULER, the comparison of checkpoints, and choosing text."""

import json
import math
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch._dynamo.testing
import torch.nn.functional as F

import data
import model as model_module
from machine.corpus import tokenize
from machine.files import lock_folder
from machine.formats import load_checkpoint, save_checkpoint
from machine.plan import parameter_count
from machine.run import train
from machine.tokenizer import load_tokenizer
from measure import evaluate, losses, pcd, report, select_corpus
from model import Llama, attention_kl
from tests.conftest import (
    bpe,
    distance_by_hand,
    edit_weights,
    meta_folder,
    rel,
    tiktoken_folder,
    tiny_llama,
    tiny_run,
    tokens,
    with_eos,
)


@pytest.fixture(scope="session")
def sentences(ckpt, tmp_path_factory):
    """Sentences of 400 different words; the tiny checkpoint's tokenizer reads bytes."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("prose") / "prose.txt"
    words = sorted({"".join(rng.choices("aeioulnrst", k=rng.randint(4, 8))) for _ in range(400)})
    path.write_text(" ".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(4000)))
    return path


@pytest.fixture(scope="session")
def source(ckpt, sentences):
    tokenizer = load_tokenizer(ckpt[0])
    return evaluate.Source(tokenizer, np.array(tokenizer.encode_batch([sentences.read_text()])[0]))


# ------------------------------------------------------------------------------------------- losses


def nll_by_hand(theirs, ids):
    """Transformers' loss on each token but the first."""
    with torch.no_grad():
        logits = theirs(ids).logits.double()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def test_what_was_kept_equals_transformers(pairs):
    ours, theirs = pairs
    ids = tokens(3, 34)
    got = losses.short_text_drift(*ours, ids, rows=7, attention_sequences=2)
    with torch.no_grad():
        a, b = (m(ids[:, :-1], output_hidden_states=True) for m in theirs)
    p, q = (x.logits.double().softmax(-1) for x in (a, b))
    assert got["loss"] == pytest.approx(nll_by_hand(theirs[1], ids).mean().item(), rel=1e-4)
    assert got["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert got["same_top1"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    want = [
        1 - distance_by_hand(*x).item() for x in zip(a.hidden_states, b.hidden_states, strict=True)
    ]
    assert got["cosine"] == pytest.approx(want, abs=1e-5) and want[-1] < 0.999
    heads = attention_kl(*ours, ids[:2, :-1])
    assert rel(torch.tensor(got["attention_kl"]), heads) < 1e-4
    same = losses.short_text_drift(ours[0], ours[0], ids)
    assert same["kl"] == 0 and same["same_top1"] == 1 and min(same["cosine"]) > 1 - 1e-6


@pytest.mark.parametrize("chunk", [5, 4096])
def test_losses_by_position_equal_transformers(pairs, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    ids = tokens(3, 50)
    got = losses.losses_by_sequence(pairs[0][1], ids, rows=3)
    assert rel(got, nll_by_hand(pairs[1][1], ids)) < 1e-5


@pytest.mark.parametrize("chunk", [5, 4096])
def test_a_cut_window_scores_each_token_from_its_own_window_only(pairs, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    ids, window, stride = tokens(1, 50), 16, 4
    got = losses.losses_by_sequence(pairs[0][1], ids, window)[0]
    for t in range(49):  # token t + 1 is predicted from start .. t
        end = min(49, window + max(0, math.ceil((t + 1 - window) / stride)) * stride)
        start = max(0, end - window)
        assert t - start < window and (t < window or t - start >= window - stride)
        want = nll_by_hand(pairs[1][1], ids[:, start : t + 2])[0, -1]
        assert got[t].item() == pytest.approx(want.item(), rel=1e-4)
    far = losses.losses_by_sequence(pairs[0][1], ids, 49)
    assert torch.equal(far, losses.losses_by_sequence(pairs[0][1], ids))


@pytest.mark.parametrize("length", [96, 512])
def test_a_passage_is_repeated_at_each_depth_and_new_in_the_control(length):
    text, depths = np.arange(1000), [0.0, 0.3, 1.0]  # every token differs: a match is a copy
    rows, passage = evaluate.repeat_sequences(text, length, depths, n=2, seed=0)
    assert rows.shape == (8, length) and passage == min(64, length // 8)
    for i, row in enumerate(rows.tolist()):
        passage_ids, before = row[-passage:], row[:-passage]
        found = [
            start
            for start in range(length - 2 * passage + 1)
            if before[start:][:passage] == passage_ids
        ]
        want = [*(round(d * (length - 2 * passage)) for d in depths), None][i % 4]
        assert found == ([] if want is None else [want])
        assert len(set(before)) == len(before)
        if i % 4 != depths.index(1.0):  # read again or new, it follows its own text
            assert passage_ids[0] - before[-1] in (1, 1 - len(text))


def test_the_loss_on_a_repeated_passage_equals_transformers(pairs, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 7)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 100)
    ids = tokens(3, 45)
    ids[:, -5:] = pairs[1][1](ids).logits[:, -6:-1].argmax(-1)  # so that some are first choices
    loss, right = evaluate.repeat_scores(pairs[0][1], ids, passage=12, cue=3).unbind(1)
    assert rel(loss, nll_by_hand(pairs[1][1], ids)[:, -9:].mean(1)) < 1e-5
    choices = pairs[1][1](ids).logits[:, -10:-1].argmax(-1)
    assert torch.equal(right, (choices == ids[:, -9:]).double().mean(1)) and right.max() > 0


def test_first_choices_on_a_passage_under_pcd_are_those_of_generate(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 7)
    model, ids = tiny_llama(), tokens(length=30)
    ids = pcd.generate(model, ids, 12)  # all of it PCD's own choice
    ids[1, -3] = (ids[1, -3] + 1) % 96
    right = evaluate.repeat_scores(model, ids, 12, 4, pcd=pcd.PCD)[:, 1]
    assert right[0] == 1 and right[1] <= 7 / 8
    assert (evaluate.repeat_scores(model, ids, 12, 4)[:, 1] < right).any()


# ------------------------------------------------------------------------------------------ needles


@pytest.mark.parametrize("length", [2048, 4999])
@pytest.mark.parametrize("task", evaluate.NIAH)
def test_needles_are_there_once_at_their_depth_and_exact_in_length(source, task, length):
    for i, depth in enumerate([0.0, 0.37, 1.0]):
        rng = np.random.default_rng([i, length])
        sample = evaluate.make_sample(source, task, length, depth, rng)
        assert len(sample.prompt) + sample.n_new == length
        text = source.tokenizer.decode(sample.prompt.tolist())
        assert text.count(sample.answer) == 1 and sample.depth == depth
        hay = text[text.index("\n") + 1 : text.rindex("\nWhat")]
        needle = re.search(rf" One secret \w+ of (\S+) is {sample.answer}\.", hay)
        rest = len(hay) - len(needle[0])
        sentence = max(len(s) for s in hay.replace(needle[0], "").split("."))
        assert abs(needle.start() - depth * rest) <= sentence
        assert text.endswith(f" of {needle[1]} is")
        if task == "niah_multikey_1":
            assert hay.count(" One secret number of ") == 4


@pytest.mark.parametrize("stretch", [4.0, 1.0])  # 1: by a text's mean, not by that of a uuid
@pytest.mark.parametrize("task", evaluate.NIAH)
def test_a_perfect_answerer_scores_all_and_a_random_one_nothing(source, task, stretch, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 6000)
    monkeypatch.setattr(source, "stretch", stretch)
    rngs = (np.random.default_rng(i) for i in range(5))
    samples = [evaluate.make_sample(source, task, 3000, 0.5, rng) for rng in rngs]
    answers = {s.prompt.tobytes(): f" {s.answer}." for s in samples}

    def perfect(prompts, n_new):
        said = [source.encode(answers[p.numpy().tobytes()])[:n_new] for p in prompts]
        return torch.stack([torch.from_numpy(np.pad(ids, (0, n_new - len(ids)))) for ids in said])

    def babble(prompts, n_new):
        return tokens(len(prompts), n_new, vocab=128)

    assert evaluate.ask(perfect, samples, source.tokenizer) == [1.0] * 5
    assert evaluate.ask(babble, samples, source.tokenizer) == [0.0] * 5


def test_needles_that_cannot_be_made_or_answered_are_refused(source, monkeypatch):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="niah_single_3 does not fit 256 tokens: its answer takes"):
        evaluate.make_sample(source, "niah_single_3", 256, 0.5, rng)
    monkeypatch.setattr(source, "words", source.words[:3])
    with pytest.raises(ValueError, match="10 pairs of words of 3 different ones"):
        source.draw(rng, "words", 10)
    assert len(set(source.draw(rng, "words", 9))) == 9


def test_an_answer_counts_as_a_whole_word():
    assert evaluate.found(" are 22, and 11.", "11") and not evaluate.found("1123", "11")
    assert evaluate.found("Red-Fox", "red-fox") and not evaluate.found("", "x")


# ----------------------------------------------------------------------------------- the comparison


@pytest.fixture
def comparison(ckpt, sentences, tmp_path, monkeypatch):
    """A command that compares two extensions, and a run that has not ended; no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, _, short = ckpt
    for i, theta in enumerate((2000.0, 9000.0)):
        extended = load_checkpoint(folder, rope_theta=theta)
        save_checkpoint(extended, tmp_path / f"run{i}" / "hf", tokenizer_from=folder)
        lines = [{"step": s, "loss_long": 3 - s, "loss_short": None, "loss_s2l": 1} for s in (1, 2)]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"run{i}" / "log.jsonl").write_text(log)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "longred.json").write_text('{"config": {"steps": 5, "replay_steps": 4}}')
    (tmp_path / "late" / "log.jsonl").write_text("{}\n{}\n")
    argv = f"--base {folder} --data {sentences} --short_data {short} --lengths 128,600 --samples 1"
    argv += " --tasks kept position repeat niah_single_2 --depths 0,1 --eval_tokens 1300"
    argv += f" --device cpu --cache_dir {tmp_path}/tokens --out_dir {tmp_path}/o"
    argv += f" --ckpt ext={tmp_path}/run0 ext={tmp_path}/run1 {tmp_path}/late"
    return argv.split(), tmp_path / "o"


@pytest.mark.parametrize(
    "run",
    [
        {"s2l_data": "held"},  # one of long_data, of which the run holds out the end alone
        {"short_data": "bad", "skip_bad_lines": True},
        {"short_data": None, "method": "long_cpt"},  # the default, which nobody fetched
        {"short_data": ["self:10"], "method": "long_cpt"},  # which nobody drew
    ],
    ids=lambda run: str(next(iter(run.items()))),
)
def test_the_text_that_a_runs_report_scored_is_scored(ckpt, tmp_path, monkeypatch, run, capsys):
    folder, long, short = ckpt
    books, bad, text = tmp_path / "books", tmp_path / "bad.jsonl", long.read_text()
    books.mkdir()
    paths = [books / f"{i:02}.txt" for i in range(80)]
    for i, path in enumerate(paths):
        path.write_text(text[600 * i : 600 * (i + 1)])
    bad.write_text(json.dumps({"text": short.read_text()}) + "\nnot a record\n")
    corpus = tokenize([str(books)], load_tokenizer(folder), tmp_path / "tokens")
    checksums = zip(paths, corpus.doc_checksums, strict=True)
    held = [str(path) for path, x in checksums if x % 20 == 0]
    assert len(held) > 2
    named = {"held": held[:1], "bad": [str(bad)]}
    run = {key: named.get(str(value), value) for key, value in run.items()}
    scored, held_out_texts = {}, report.held_out_texts
    monkeypatch.setattr(
        report, "held_out_texts", lambda *x: scored.update(held_out_texts(*x)) or {**scored}
    )
    c = tiny_run(ckpt, tmp_path / "run", **{"long_data": [str(books)], "steps": 1} | run)
    train(c)
    assert ("short" in scored) == (c.method != "long_cpt")
    again = []
    monkeypatch.setattr(evaluate, "measure_all", lambda a, texts, *_: again.append(texts))
    argv = f"--base {folder} --ckpt {c.out_dir} --tasks kept --eval_tokens 512 --device cpu"
    evaluate.main([*argv.split(), "--cache_dir", c.cache_dir, "--out_dir", str(tmp_path / "o")])
    assert torch.equal(again[0].long, scored["long"]) and len(again[0].short) > 1
    assert "short" not in scored or torch.equal(again[0].short, scored["short"])
    assert "no file at" not in capsys.readouterr().out


def test_one_command_leaves_report_numbers_and_pictures(comparison, capsys, monkeypatch):
    argv, out = comparison
    monkeypatch.undo()  # matplotlib is back
    evaluate.main(argv)
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    assert report in printed and "late: unfinished, 2 of 9 steps" in report
    content = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["original", "ext", "ext"]
    assert "needles found at 600, %\n\n| model | niah_single_2 | mean |" in report
    assert "\n| ext | 0.000 +- 0.000 | 0.000 +- 0.000 |\n" in report
    losses = [run["kept"]["loss"] for run in content["runs"]]
    mean, spread = np.mean(losses[1:]), np.std(losses[1:], ddof=1)
    by_sequence = content["runs"][0]["kept"]["by_sequence"]["loss"]
    error = np.std(by_sequence, ddof=1) / len(by_sequence) ** 0.5
    assert losses[0] == pytest.approx(np.mean(by_sequence))
    said, *_ = re.findall(
        r"^\| original \| ([\d.]+) \+- ([\d.]+) \| 0.000 \| 100.000 \|", report, re.M
    )
    runs, *_ = re.findall(r"^\| ext \| ([\d.]+) \+- ([\d.]+) \| [^-]*\+-", report, re.M)
    for shown, value, wrong in ((said, losses[0], error), (runs, mean, spread)):
        unit = 10.0 ** -len(shown[1].partition(".")[2])  # of the last digit shown
        assert 0.9 * unit <= wrong < 20 * unit and abs(float(shown[1]) - wrong) <= unit / 2
        assert abs(float(shown[0]) - value) <= 0.51 * unit
    whole, cut = (content["runs"][1]["position"][n]["nll"] for n in ("whole", "cut"))
    assert len(whole) == len(cut) == 600 and whole[:64] == cut[:64] and whole[99] != cut[99]
    assert "skipped" in content["runs"][0]["niah_single_2"]["128"]
    pictures = {p.stem for p in out.glob("*.png")}
    assert pictures == {"overview", "drift", "training", "needles", "repeat"}


def test_pcd_is_one_more_row_asked_by_contrast(comparison, monkeypatch):
    argv, out = comparison
    asked, generate, contrasted = [], Llama.generate, pcd.generate
    monkeypatch.setattr(Llama, "generate", lambda *a: asked.append(None) or generate(*a))
    monkeypatch.setattr(evaluate, "by_contrast", lambda *a: asked.append(a[-1]) or contrasted(*a))
    evaluate.main([*argv, "--pcd"])
    rows = json.loads((out / "results.json").read_text())["runs"]
    names = [name + end for name in ("original", "ext", "ext") for end in ("", ", PCD")]
    assert [row["name"] for row in rows] == names
    assert all(set(row) == {"name", "checkpoint", "repeat", "niah_single_2"} for row in rows[1::2])
    assert all(
        set(row["repeat"]["600"]) == {"seen_right", "new_right", "errors"} for row in rows[1::2]
    )
    n = len(asked) // 6
    assert asked == ([None] * n + [pcd.PCD] * n) * 3 and n > 0


def test_a_merge_is_one_more_row_of_averaged_weights(comparison, ckpt, tmp_path):
    argv, out = comparison
    evaluate.main([*argv, "--tasks", "kept", "--merge", "0.25"])
    rows = json.loads((out / "results.json").read_text())["runs"]
    names = ["original", *2 * ["ext", "ext, 0.25 original"]]
    assert [row["name"] for row in rows] == names
    assert [row["checkpoint"] is None for row in rows] == ["," in name for name in names]
    edit_weights(tmp_path / "run0" / "hf", lambda w: w["model.norm.weight"].mul_(1.5))
    merged = model_module.merge_weights(
        load_checkpoint(tmp_path / "run0"), load_checkpoint(ckpt[0]), 0.25
    )
    save_checkpoint(merged, tmp_path / "by_hand", tokenizer_from=ckpt[0])
    hand = ["--ckpt", f"ext={tmp_path}/run0", f"hand={tmp_path}/by_hand"]
    evaluate.main([*argv, "--tasks", "kept", "--merge", "0.25", *hand])
    losses = [r["kept"]["loss"] for r in json.loads((out / "results.json").read_text())["runs"]]
    assert losses[2] == pytest.approx(losses[3], rel=1e-6) and len(set(losses[:3])) == 3


def count_calls(monkeypatch, done, stop_after=99):
    """Append the name of every measurement begun; Ctrl-C instead of the one after stop_after."""
    for name in ("short_text_drift", "losses_by_sequence", "repeat_scores", "ask"):
        true = getattr(evaluate, name)

        def counted(*args, name=name, true=true, **more):
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(name)
            return true(*args, **more)

        monkeypatch.setattr(evaluate, name, counted)


def test_a_stopped_comparison_goes_on_with_the_row_that_it_stopped_in(
    comparison, monkeypatch, capsys
):
    argv, out = comparison
    done = []
    each = ["short_text_drift", *2 * ["losses_by_sequence", "repeat_scores"], "ask"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        count_calls(patch, done, stop_after=len(each) + 2)  # in the second row
        evaluate.main(argv)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    assert "| original |" in report and "| ext |" not in report
    done.clear()
    count_calls(monkeypatch, done)
    evaluate.main(argv)
    assert sorted(done) == sorted(2 * each)
    evaluate.main(argv)
    assert len(done) == 2 * len(each)


def test_a_changed_checkpoint_is_measured_again_and_pictures_are_optional(comparison, capsys):
    argv, out = comparison
    argv += ["--tasks", "kept"]
    evaluate.main(argv)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(out.glob("*.png"))
    assert len(list((out / "cache").iterdir())) == 3
    edit_weights(out.parent / "run0" / "hf", lambda w: w["model.norm.weight"].mul_(1.01))
    evaluate.main(argv)
    assert len(list((out / "cache").iterdir())) == 4


def test_folders_of_one_name_are_two_rows_unless_named_alike(comparison):
    argv, out = comparison
    ours = shutil.copytree(out.parent / "run0" / "hf", out.parent / "a" / "original")
    evaluate.main([*argv, "--tasks", "kept", "--ckpt", str(ours), f"original={ours}"])
    names = [run["name"] for run in json.loads((out / "results.json").read_text())["runs"]]
    assert names == ["original", str(ours), "original"]


BAD_COMPARISONS = {
    "--tasks": ("passkey", "argument --tasks: invalid choice: 'passkey'"),
    "--lengths": ("many", "'many': need a whole number such as 4096 or 4K"),
    "--depths": ("0,2", "--depths from 0 to 1"),
    "--data": ("nowhere.txt", "no file at nowhere.txt"),
    "--ckpt": ("nowhere", "no checkpoint 'nowhere'"),
    "--original_len": ("99999", "one sequence needs 100,000"),
}


@pytest.mark.parametrize("flag", BAD_COMPARISONS)
def test_bad_input_to_evaluate_ends_in_one_line(comparison, flag):
    argv, out = comparison
    value, said = BAD_COMPARISONS[flag]
    with pytest.raises(SystemExit) as end:
        evaluate.main([*argv, flag, value])
    message = str(end.value.code)
    assert said in message and "\n" not in message and not out.exists()


def test_a_run_is_named_by_its_folder_also_from_within(ckpt, tmp_path, monkeypatch):
    folder = shutil.copytree(ckpt[0], tmp_path / "mine")
    (folder / "inner").mkdir()
    for inside, path in ((folder, "."), (folder / "inner", "..")):
        monkeypatch.chdir(inside)
        assert evaluate.find_run(path)[0] == "mine"


@pytest.mark.parametrize("more, models", [([], 1), (["kept"], 2), (["--merge", "0.5"], 2)])
def test_memory_is_asked_for_the_models_that_are_held(ckpt, tmp_path, monkeypatch, more, models):
    folder, long, _ = ckpt
    asked = models * parameter_count(load_checkpoint(folder).config) * 4
    monkeypatch.setattr(evaluate, "available_memory", lambda: asked - 1)
    monkeypatch.setattr(evaluate, "measure_all", lambda *_: None)
    argv = f"--base {folder} --ckpt run={folder} --data {long} --out_dir {tmp_path} --device cpu "
    argv = [*f"{argv} --lengths 64 --original_len 64 --tasks position".split(), *more]
    with pytest.raises(SystemExit, match=["the model takes", "two models take"][models - 1]):
        evaluate.main(argv)
    monkeypatch.setattr(evaluate, "available_memory", lambda: asked)
    evaluate.main(argv)


def test_metas_folder_can_be_the_original(ckpt, sentences, tmp_path, capsys):
    folder = meta_folder(tmp_path / "meta", tiny_llama(vocab_size=612, n_layers=2, std=0.1), 2)
    tiktoken_folder(folder, bpe(vocab_size=276))
    argv = ["--base", folder, "--data", sentences, "--tasks", "kept", "--device", "cpu"]
    argv += ["--eval_tokens", 600, "--cache_dir", tmp_path / "tokens", "--out_dir", tmp_path / "o"]
    with pytest.raises(SystemExit, match="--original_len is missing"):
        evaluate.main([str(x) for x in argv])
    evaluate.main([str(x) for x in [*argv, "--original_len", 64]])
    assert "| original | 6." in capsys.readouterr().out


def test_the_last_line_of_a_run_is_a_command_that_works_from_any_folder(
    ckpt, tmp_path, capsys, monkeypatch
):
    (tmp_path / "with a blank").mkdir()
    out = tmp_path / "with a blank" / "run"
    train(tiny_run(ckpt, out, method="long_cpt", steps=1, eval_tokens=0))
    said = capsys.readouterr().out.splitlines()[-1]
    python, script, *flags = shlex.split(said.removeprefix("more: "))
    assert said.startswith("more: python ") and python == "python"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # of a script by its path: test_layout.py
    assert Path(script).samefile(evaluate.__file__)
    evaluate.main([*flags, "--tasks", "kept", "--eval_tokens", "512", "--device", "cpu"])
    assert "| run |" in capsys.readouterr().out


# -------------------------------------------------------------------------------- text of one's own


def test_own_samples_are_text_for_training(ckpt, tmp_path):
    path = tmp_path / "own.jsonl"
    folder = with_eos(ckpt[0], tmp_path / "with_eos")
    argv = ["samples", path, "--base", folder, "--n_samples", 3, "--length", 12]
    evaluate.main([str(x) for x in argv])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == 3 and any(texts) and all("\n" not in text for text in texts)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--n_samples", 0),
        ("--length", -5),
        ("--length", 1),
        ("--temperature", "nan"),
        ("--seed", -1),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_and_leave_no_file(ckpt, tmp_path, flag, value):
    argv = ["samples", tmp_path / "own.jsonl", "--base", ckpt[0], flag, value]
    with pytest.raises(SystemExit, match=f"{flag} {value}.*: need at least 2 tokens, 1 text"):
        evaluate.main([str(x) for x in argv])
    assert not (tmp_path / "own.jsonl").exists()


def test_samples_of_a_long_window_are_drawn_as_many_at_a_time_as_fit(ckpt, tmp_path, monkeypatch):
    drawn = []

    def none(model, tokenizer, n, length, *more):
        drawn.append(n)
        return [[65]] * n

    monkeypatch.setattr(evaluate, "sample_ids", none)
    for length in ("131072", "1024", "1000M"):
        path = tmp_path / f"{length}.jsonl"
        flags = ["--base", str(ckpt[0]), "--n_samples", "52", "--length", length]
        evaluate.main(["samples", str(path), *flags])
    assert drawn == [2] * 26 + [50, 2] + [1] * 52


def test_logit_change_is_the_softmax_of_the_difference_by_hand():
    a, b, ids = tiny_llama(), tiny_llama(seed=5), tokens(1, 40)[0]
    got = select_corpus.logit_change(a, b, ids, rows=7)
    with torch.no_grad():
        p, q = (m.logits(m(ids[None])[0][0]).softmax(-1) for m in (a, b))
    for t in range(39):
        rise = q[t] / p[t]  # softmax(S' - S) is p' / p, normalised
        assert got[t].item() == pytest.approx(math.log(rise[ids[t + 1]] / rise.sum()), abs=1e-4)
    assert torch.allclose(select_corpus.logit_change(a, a, ids), torch.tensor(-math.log(96.0)))


def test_anchors_are_frequent_and_more_so_among_impactful_tokens():
    kinds = np.repeat([0, 1, 2, 3], [60, 15, 15, 10])
    scores = np.zeros(100)
    for start, n in [(0, 6), (60, 7), (75, 4), (90, 3)]:  # the impactful fifth, by kind
        scores[start : start + n] = 1.0
    anchors, among, overall = select_corpus.anchor_kinds(scores, kinds, 4)
    assert among.tolist() == [0.3, 0.35, 0.2, 0.15] and overall.tolist() == [0.6, 0.15, 0.15, 0.1]
    assert anchors.tolist() == [1, 2]  # 0: frequent everywhere; 3: the others make up half


def test_selection_keeps_whole_sentences_densest_in_anchors_in_text_order():
    # 0 ends a sentence, 5 is an anchor
    ids = np.array([5, 9, 0, 5, 5, 0, 7, 7, 7, 0, 9, 9, 9, 5, 5, 5, 0])
    is_end, is_anchor = np.arange(10) == 0, np.arange(10) == 5
    starts = data.sentence_starts(ids, is_end)
    assert starts.tolist() == [0, 3, 6, 10]
    for keep, left in [
        (0.1, "5 5 0"),
        (0.3, "5 5 0 9 9 9 5 5 5 0"),
        (1, "5 9 0 5 5 0 9 9 9 5 5 5 0"),
    ]:
        mask = select_corpus.select_sentences(ids, starts, is_anchor, keep)
        assert " ".join(map(str, ids[mask])) == left


def test_kinds_fold_case_blanks_and_numbers(ckpt):
    index, names = select_corpus.token_kinds(tok := load_tokenizer(ckpt[0]))
    kind = {text: names[index[tok.encode_batch([text])[0][0]]] for text in "aA17.\n"}
    assert kind == {"a": "a", "A": "a", "1": "number", "7": "number", ".": ".", "\n": "\n"}


def test_select_corpus_writes_sentences_of_the_training_part(ckpt, tmp_path, capsys):
    trained = train(tiny_run(ckpt, tmp_path / "run", method="long_cpt", steps=3, eval_tokens=0))
    out = tmp_path / "selected.jsonl"
    flags = ["corpus", out, "--base", ckpt[0], "--ckpt", trained, "--data", ckpt[1]]
    flags += ["--cache_dir", tmp_path / "tokens", "--eval_tokens", 2048, "--device", "cpu"]
    evaluate.main([str(f) for f in flags])
    whole = ckpt[1].read_text()
    text = json.loads(out.read_text())["text"]  # one document
    sentences = re.findall(r"[^.!?\n]*[.!?\n]", text)
    assert "".join(sentences) == text and len(sentences) > 100
    place = 0
    for sentence in sentences:  # verbatim and in order
        place = whole.index(sentence, place) + len(sentence)
    assert place < 0.96 * len(whole) and 0.3 * 0.95 < len(text) / (0.95 * len(whole)) < 0.31
    assert f"kept {len(text):,} of" in capsys.readouterr().out
    other = save_checkpoint(tiny_llama(vocab_size=300), tmp_path / "other")
    flags = ["corpus", tmp_path / "x", "--base", ckpt[0], "--ckpt", other, "--data", ckpt[1]]
    with pytest.raises(SystemExit, match=r"of one vocabulary, got \[256, 300\] ids"):
        evaluate.main([str(f) for f in flags])


# ------------------------------------------------------------------------- numbers and neighbours


def test_a_passage_of_the_shortest_length_leaves_tokens_to_count(ckpt):
    text = np.arange(5000) % 256
    for length in (64, 71, 72):
        ids, passage = evaluate.repeat_sequences(text, length, [0.0], 1, 0)
        scores = evaluate.repeat_scores(load_checkpoint(ckpt[0]), ids, passage)
        assert scores.isfinite().all() and passage == length // 8


@pytest.mark.parametrize(
    "value, error, shown",
    [
        (1.23456, 0.0234, "1.23 +- 0.02"),
        (1.23456, 0.0134, "1.235 +- 0.013"),
        (37.5, 6.9, "38 +- 7"),
        (37.5, 14.0, "38 +- 14"),
        (0.5, None, "0.500"),
        (0.001, None, "0.0010"),
        (-0.0004, None, "-4.0e-04"),
        (float("nan"), 0.1, "not finite"),
        ([1.0, 1.2], None, "1.10 +- 0.14"),
    ],
)
def test_digits_go_as_far_as_the_error(value, error, shown):
    assert evaluate._cell(value, error) == shown


def test_results_that_are_not_finite_are_null_and_end_the_command_by_1(
    comparison, capsys, monkeypatch
):
    argv, out = comparison
    drift = evaluate.short_text_drift

    def broken(*args, **more):
        return drift(*args, **more) | {"kl": math.nan}

    monkeypatch.setattr(evaluate, "short_text_drift", broken)
    with pytest.raises(SystemExit, match="original, ext: numbers that are not finite"):
        evaluate.main([*argv, "--tasks", "kept"])

    def refuse(name):
        raise AssertionError(name)

    content = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    assert (
        content["runs"][0]["kept"]["kl"] is None and "not finite" in (out / "report.md").read_text()
    )


def test_a_far_part_whose_losses_are_not_finite_is_shown_so(comparison, monkeypatch):
    broken = dict.fromkeys(("true", "other", "short text", "shuffled", "cut"), [math.nan] * 2)
    monkeypatch.setattr(evaluate, "far_parts", lambda *args: {"other": torch.zeros(1, 1).long()})
    monkeypatch.setattr(evaluate, "far_losses", lambda *args: broken)
    with pytest.raises(SystemExit, match="original, ext: numbers that are not finite"):
        evaluate.main([*comparison[0], "--tasks", "far"])
    assert "not finite" in (comparison[1] / "report.md").read_text()


def test_the_report_says_why_far_context_is_not_in_it(comparison):
    argv, out = comparison
    evaluate.main([*argv, "--tasks", "far", "--lengths", "64"])
    said = "Far context is not measured: --lengths end at the original window of 64."
    assert said in (out / "report.md").read_text()


def test_a_share_without_an_extension_is_refused(ckpt):
    with pytest.raises(SystemExit, match="--merge needs --ckpt"):
        evaluate.main(["--base", str(ckpt[0]), "--data", str(ckpt[1]), "--merge", "0.5"])


def test_evaluations_wait_for_no_other_and_overwrite_nobodys_report(comparison):
    argv, out = comparison
    out.mkdir()
    with lock_folder(out, "--out_dir"):
        with pytest.raises(SystemExit, match="another process is at work in"):
            evaluate.main([*argv, "--tasks", "kept"])
    (out / "report.md").write_text("mine")
    with pytest.raises(SystemExit, match="report.md is in the way, and no evaluation wrote it"):
        evaluate.main([*argv, "--tasks", "kept"])
    assert (out / "report.md").read_text() == "mine"
    with pytest.raises(SystemExit, match="exists: remove it, or name another file"):
        evaluate.main(["samples", str(out / "report.md"), *argv[:2]])
    with pytest.raises(SystemExit, match="--device cuda:99: torch sees"):
        evaluate.main([*argv, "--device", "cuda:99"])


def test_the_mean_over_needles_is_over_tasks_that_are_named():
    found = {"exact": 0.5, "error": 0.1}
    one, two = "niah_single_1", "niah_single_2"
    result = {one: {"64": found, "128": found}}
    result[two] = {"64": {"skipped": "too long"}, "128": found | {"exact": 1.0}}
    asked, why = evaluate.fitting_tasks([("a", None, result)], [64, 128])
    assert asked == {64: [one], 128: [one, two]} and why == ["too long"]
    tables = evaluate.summarize(result, 64, [64, 128], asked)
    means = [row["mean"] for row in tables.values()]
    assert means[0] == (50.0, 10.0) and means[1] == (75.0, pytest.approx(math.hypot(10, 10) / 2))


@pytest.mark.parametrize("job", evaluate.JOBS)
def test_a_jobs_help_begins_with_what_it_needs_and_tells_every_default(job, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([job, "--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^(\w.*):$", text, re.M)
    assert groups[:2] == ["options", "needed"] and groups[-1] == "the run and its machine"
    needed = {"base", "ckpt", "data"} if job == "corpus" else {"base"}
    flags = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", text, re.M | re.S))
    assert text.index("needed:") < text.index("  --base") < text.index("  --device")
    assert flags.keys() >= {"base", "device", "seed"} and "--write_samples" not in text
    for flag, said in flags.items():
        assert flag in needed or "default:" in said, flag


def test_jobs_are_subcommands_and_the_form_without_one_is_compare(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {job} " in text for job in ("compare", "samples", "corpus"))
    assert "--merge" not in text  # the flags are each job's own
    flags = ["--base", "x", "--ckpt", "y", "--lengths", "512,4K", "--tasks", "kept"]
    plain, named = (evaluate.parse_args([*job, *flags]) for job in ([], ["compare"]))
    assert plain == named and named.lengths == [512, 4096]
    for old in ("--write_samples", "--select_corpus"):  # the name of a job is the only spelling
        with pytest.raises(SystemExit, match=f"unrecognized arguments: {old} f"):
            evaluate.parse_args(["--base", "x", old, "f"])
    with pytest.raises(
        SystemExit, match="unrecognized arguments: --merge 0.5; all flags: .*samples"
    ):
        evaluate.parse_args(["samples", "f", "--base", "x", "--merge", "0.5"])
