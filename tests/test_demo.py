"""measure/demo.py: the story that plain `python longred.py` tells."""

import functools
import json
import shutil
from dataclasses import replace

import pytest

from longred import main
from machine.files import lock_folder, write_json
from machine.formats import load_checkpoint
from machine.keeper import clear_run
from machine.run import train
from measure import demo, evaluate
from tests.conftest import edit_record


def test_the_demo_trains_an_original_stretches_it_both_ways_and_compares(
    tmp_path, monkeypatch, capsys
):
    out, configs = tmp_path / "demo", []
    train_demo_model = functools.partial(demo.train_demo_model, steps=2)
    monkeypatch.setattr(demo, "train_demo_model", train_demo_model)

    write_demo_text = demo.write_demo_text

    def some_of_the_code(prose, code):
        write_demo_text(prose, code)
        code.write_text("".join(code.read_text().splitlines(True)[:100]))

    monkeypatch.setattr(demo, "write_demo_text", some_of_the_code)

    def short_train(config):  # of a minute or two, the first step
        configs.append(config)
        return train(replace(config, steps=1, eval_tokens=2048))

    monkeypatch.setattr(demo, "train", short_train)
    flags = ["--out_dir", str(out), "--seed", "7", "--device", "cpu"]
    main(flags)
    monkeypatch.setattr(demo, "train_demo_model", None)
    main(flags)  # the earlier demo's runs are replaced, its original is taken
    with pytest.raises(TypeError):  # another seed has an original of its own
        main([*flags, "--seed", "8"])
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


def test_the_demo_touches_nothing_that_it_did_not_make(tmp_path, whole):
    out = tmp_path / "runs"
    shutil.copytree(whole, out / "long_cpt")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match="long_cpt is in the demo's way, and no demo made it"):
        main(["--out_dir", str(out)])
    write_json(out / demo.MARK, {})  # a demo's folder after all, with another's run in it
    with pytest.raises(ValueError, match="holds another run, which stays"):
        clear_run(out / "long_cpt", str(out / "original"))
    assert all(p.read_bytes() == content for p, content in before.items())


def test_a_demo_clears_its_own_run_but_not_around_somebodys_file(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    record = edit_record(out, lambda record: record["config"].update(out_dir=str(out)))
    (out / "hf" / "MINE").write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="MINE is in the way, and not of the run"):
        clear_run(out, record["config"]["ckpt"])
    assert sorted(out.rglob("*")) == before
    (out / "hf" / "MINE").unlink()
    clear_run(out, record["config"]["ckpt"])
    assert [p.name for p in out.iterdir()] == ["lock"]


def test_two_demos_in_one_folder_do_not_meet(tmp_path):
    with lock_folder(tmp_path, "--out_dir"):
        with pytest.raises(SystemExit, match="another process is at work in"):
            main(["--out_dir", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
