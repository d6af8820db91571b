"""measure/demo.py: the story that plain `python longred.py` tells."""

import functools
import json
from dataclasses import replace

from longred import main, train
from measure import demo, evaluate
from model import load_checkpoint


def test_the_demo_trains_an_original_stretches_it_both_ways_and_compares(
    tmp_path, monkeypatch, capsys
):
    out, configs = tmp_path / "demo", []
    train_demo_model = functools.partial(demo.train_demo_model, steps=2)
    monkeypatch.setattr(demo, "train_demo_model", train_demo_model)

    def short_train(config):  # of a minute or two, the first step
        configs.append(config)
        return train(replace(config, steps=1, eval_tokens=2048))

    monkeypatch.setattr(demo, "train", short_train)
    flags = ["--out_dir", str(out), "--seed", "7", "--device", "cpu"]
    main(flags)
    monkeypatch.setattr(demo, "train_demo_model", None)
    main(flags)  # the earlier demo's runs are replaced, its original is taken
    assert [c.method for c in configs] == 2 * ["long_cpt", "longred"]
    assert {(c.seed, c.target_len) for c in configs} == {(7, 1024)}
    table = capsys.readouterr().out.split("what it cost:\n\n")[-1]
    assert table.startswith("| model | prose loss at 256 | code loss at 1,024 | drift of the last")
    assert [row.split(" |")[0] for row in table.splitlines()[2:5]] == [
        "| original",
        "| Long CPT",
        "| LongReD",
    ]
    assert (out / "overview.png").is_file()
    for folder, window in (("original", 256), ("long_cpt", 1024), ("longred", 1024)):
        assert load_checkpoint(out / folder).config.max_position_embeddings == window


def test_the_demos_text_is_what_python_brings_along(tmp_path):
    demo.write_demo_text(tmp_path / "prose.jsonl", tmp_path / "code.jsonl")
    texts = [
        [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (tmp_path / "prose.jsonl", tmp_path / "code.jsonl")
    ]
    size = [sum(map(len, part)) for part in texts]
    assert len(texts[0]) > 50 and size[0] > 300_000 and size[1] > 3_000_000
    assert any("def dataclass(" in text for text in texts[1])


def test_pictures_of_the_demo_need_losses_only(tmp_path):
    curves = {"original": [3.0, 9.0], "LongReD": [3.1, 2.9]}
    results = [
        (name, tmp_path, {"kept": {"loss": 2.0}, "position": {"whole": {"nll": curve}}})
        for name, curve in curves.items()
    ]
    assert evaluate.draw(results, tmp_path, 256, 1024) == [tmp_path / "overview.png"]
