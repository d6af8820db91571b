"""measure/demo.py: the story that plain `python longred.py` tells."""

import json
import shutil

import pytest

from longred import main
from machine.keeper import clear_run, lock
from machine.states import write_json
from measure import demo, evaluate


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
    record = json.loads((out / "longred.json").read_text())
    record["config"]["out_dir"] = str(out)
    (out / "longred.json").write_text(json.dumps(record))
    (out / "hf" / "MINE").write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="MINE is in the way, and not of the run"):
        clear_run(out, record["config"]["ckpt"])
    assert sorted(out.rglob("*")) == before
    (out / "hf" / "MINE").unlink()
    clear_run(out, record["config"]["ckpt"])
    assert [p.name for p in out.iterdir()] == ["lock"]


def test_two_demos_in_one_folder_do_not_meet(tmp_path):
    with lock(tmp_path, "--out_dir"):
        with pytest.raises(SystemExit, match="another process is at work in"):
            main(["--out_dir", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
