"""measure/multiple_choice.py: options are weighed as whole texts, tasks by the rule."""

import json

import pytest
import torch

from machine.formats import load_checkpoint
from machine.tokenizer import load_tokenizer
from measure.multiple_choice import (
    Item,
    above_chance,
    answer,
    difference,
    find_tasks,
    main,
    read_task,
)


def test_the_likeliest_option_answers_as_plain_log_softmax_says(ckpt):
    model, tokenizer = load_checkpoint(ckpt[0]), load_tokenizer(ckpt[0])
    chosen = set()
    for question in ("the cat reads", "a red dog", "it runs in", "to be 42 or"):
        options = ["dog", "red", "short", "of"]
        scores = []
        for option in options:
            ids = torch.tensor(tokenizer.encode_batch([f"{question} {option}"])[0])
            log_p = model.logits(model(ids[None, :-1])[0])[0].double().log_softmax(-1)
            behind = len(question)  # a byte a token
            picked = log_p[behind - 1 :].gather(1, ids[behind:, None])
            scores.append(picked.sum().item())
        best = scores.index(max(scores))
        chosen.add(best)
        for i in range(4):
            item = Item(question, options, [j == i for j in range(4)])
            assert answer(model, tokenizer, item) == (i == best)
    assert len(chosen) > 1 or chosen != {0}


def test_a_task_is_read_and_what_cannot_be_scored_counted(tmp_path):
    examples = [
        {"input": "2 + 2", "target_scores": {"4": 1, "5": 0}},
        {"input": "all right", "target_scores": {"a": 1, "b": 1}},
        {"input": "free", "target": "text"},
    ]
    folder = tmp_path / "sums"
    folder.mkdir()
    task = {"examples": examples, "example_input_prefix": "Q: "}
    (folder / "task.json").write_text(json.dumps(task))
    (path,) = find_tasks(tmp_path, ["sums", "absent"]).values()
    items, left_out = read_task(path)
    assert left_out == 2 and items == [Item("Q: 2 + 2", ["4", "5"], [True, False])]
    path.write_text("[]")
    with pytest.raises(ValueError, match="no multiple-choice task"):
        read_task(path)
    with pytest.raises(SystemExit, match="none of winowhy lies there"):
        main(["--base", "x", "--tasks", str(tmp_path), "--names", "winowhy"])


def test_three_standard_errors_above_chance_by_hand():
    items = [Item("", ["a", "b"], [True, False])] * 100  # 50 +- 5 by guessing
    assert not above_chance([True] * 65 + [False] * 35, items)
    assert above_chance([True] * 66 + [False] * 34, items)


def test_the_difference_is_a_mean_over_tasks_not_over_items():
    base = [[False] * 10, [True] * 1000]
    better = [[True] * 10, [True] * 1000]
    assert difference(base, better) == (50.0, 50.0, 50.0)
    mean, low, high = difference(base, [[True] * 5 + [False] * 5, [True] * 1000])
    assert mean == 25 and low < 25 < high


def test_one_command_scores_two_checkpoints(ckpt, tmp_path, capsys):
    questions = [f"the {word} {i}" for i in range(30) for word in ("cat", "dog")]
    model, tokenizer = load_checkpoint(ckpt[0]), load_tokenizer(ckpt[0])
    examples = []
    for text in questions:  # the right option is what the original prefers: it is above chance
        says = answer(model, tokenizer, Item(text, ["runs", "is on"], [True, False]))
        examples.append({"input": text, "target_scores": {"runs": int(says), "is on": 1 - says}})
    (tmp_path / "made.json").write_text(json.dumps({"examples": examples}))
    argv = ["--base", str(ckpt[0]), "--ckpt", str(ckpt[0]), "--tasks", str(tmp_path)]
    main([*argv, "--names", "made", "--out_dir", str(tmp_path / "out"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "1 of 1 tasks count, 30 items scored, 0 left out" in printed
    assert "fewer than the 5,000 items" in printed
    assert "| original | 100.0 | 100.0 | +0.0 (+0.0 to +0.0) |" in printed
