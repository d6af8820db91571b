"""Nothing that others put anywhere is deleted, moved or written over, by any command of ours."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest

from longred import main
from machine.formats import save_checkpoint
from machine.run import train
from measure import bench, demo, diagnosis, evaluate, frontier, tasks
from measure import text as text_command
from tests.conftest import WORDS, killed_after_two, tiny_llama, tiny_run, with_eos

# Names like those that a run, an evaluation, a demo, a benchmark and a cache of text give.
FOLDERS = (
    "long_cpt longred checkpoints/step-x checkpoints/step-7 checkpoints/step-000001-best "
    "checkpoints/step-000009.partial checkpoints/step-000009.damaged checkpoints/mine hf.partial "
    "hf.previous hf.old hf-copy cache scores samples-mine tokens-mine tokens-0123456789abcdef.part "
    "original.partial more"
).split()
FILES = (
    "notes.md log.jsonl.bak log.jsonl.partial longred.json.partial longred.json.old lock.txt "
    "report.md.old report.md.partial results.json.partial leaderboard.txt rope.json.partial "
    "seen_files.json.bak prose.txt demo.json.partial hf.txt state.pt .hidden tmp3f2a core "
    "checkpoints/notes checkpoints/latest longred/report.md long_cpt/hf hf.previous/config.json "
    "hf.previous/model.safetensors hf.partial/config.json hf.partial/tokenizer.json "
    "cache/kept-x.json tokens-mine/tokens.bin checkpoints/mine/manifest.json lock"
).split()


def plant(folder, but=()):
    """{path: its bytes}, of files that others put everywhere into a folder."""
    names = [*FILES, *(f"{name}/notes" for name in FOLDERS)]
    names = [name for name in names if not any(f"{name}/".startswith(f"{x}/") for x in but)]
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    paths = [folder / name for name in names] + [place / "mine.txt" for place in places]
    mine = {}
    for path in paths:
        if path.exists() or (path.parent.exists() and not path.parent.is_dir()):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {path.name}\n")
        mine[path] = path.read_bytes()
    return mine


def whole_texts(root):
    """Text that is long enough for every command."""
    rng = random.Random(1)
    for name in ("one", "two"):
        (root / f"{name}.txt").write_text(" ".join(rng.choices(WORDS, k=40_000)))
        os.utime(root / f"{name}.txt", (1e9, 1e9))  # only an older file is remembered
    return root / "one.txt", root / "two.txt"


def fresh(ckpt, folder, texts):
    train(tiny_run(ckpt, folder, cache_dir=str(folder), steps=2, save_every=1, keep=1))


def resumed(ckpt, folder, texts):
    main(["--resume", str(folder), "--keep", "1"])


def told(ckpt, folder, texts):
    main(["--out_dir", str(folder), "--device", "cpu"])
    main(["--out_dir", str(folder), "--device", "cpu"])


def compared(ckpt, folder, texts):
    argv = ["--base", ckpt[0], "--ckpt", ckpt[0], "--data", *texts, "--lengths", "64,128"]
    argv += ["--tasks", "kept", "position", "far", "repeat", "--samples", 1, "--depths", "0.5"]
    argv += ["--eval_tokens", 512, "--device", "cpu", "--out_dir", folder, "--cache_dir", folder]
    evaluate.main([str(x) for x in argv])


def written(ckpt, folder, texts):
    base = folder.parent / "base"
    if not base.exists():
        with_eos(ckpt[0], base)  # which a text may start from
    argv = f"samples {folder}/own.jsonl --base {base} --n_samples 2 --length 20 --device cpu"
    evaluate.main(argv.split())
    argv = f"corpus {folder}/best.jsonl --base {ckpt[0]} --ckpt {ckpt[0]} --data {texts[0]}"
    argv += f" --eval_tokens 256 --cache_dir {folder} --device cpu"
    evaluate.main(argv.split())


def benched(ckpt, folder, texts):
    for argv in ("rope --lengths 64 --rounds 1", "prove"):
        bench.main([*argv.split(), "--device", "cpu", "--out_dir", str(folder)])


def ranked(ckpt, folder, texts):
    base = folder.parent / "base"
    if not base.exists():
        with_eos(ckpt[0], base)  # which a text may start from
    argv = ["--base", base, "--long", texts[0], "--books", texts[1], "--no-train"]
    frontier.main([str(x) for x in (*argv, "--out_dir", folder, "--cache_dir", folder)])


def scored(ckpt, folder, texts):
    argv = ["--base", ckpt[0], "--tasks", "piqa", "--out_dir", folder, "--device", "cpu"]
    tasks.main([str(x) for x in argv])


def diagnosed(ckpt, folder, texts):
    argv = ["--base", ckpt[0], "--book", texts[1], "--out_dir", folder]
    diagnosis.main([str(x) for x in argv])


def looked_at(ckpt, folder, texts):
    text_command.main([str(x) for x in (texts[0], "--ckpt", ckpt[0], "--cache_dir", folder)])


# Command -> what it makes in the folder that it is given, by which it would hurt most.
COMMANDS = {
    fresh: "longred.json log.jsonl report.md hf checkpoints lock seen_files.json",
    resumed: "report.md hf lock",
    told: "demo.json prose.jsonl original tokenizer tokens long_cpt longred overview.png",
    compared: "report.md results.json overview.png drift.png training.png repeat.png lock cache",
    written: "own.jsonl best.jsonl seen_files.json",
    benched: "rope-cpu-smoke.json prove-cpu-smoke.json rope.json",
    ranked: "frontier.md frontier.json.gz frontier.png prose.jsonl original.json.gz",
    scored: "tasks.md tasks.json.gz cache",
    diagnosed: "diagnosis.json diagnosis.md diagnosis.png cache",
    looked_at: "seen_files.json",
}


@pytest.fixture
def folder(whole, tmp_path, request, monkeypatch):
    """The folder that a command works in; of a resumed run it is a run's."""
    monkeypatch.setattr(evaluate, "draw", lambda results, out_dir, *more: [])  # takes seconds
    requests = [("the cat", " runs"), ("the cat", " reads")]
    monkeypatch.setattr(tasks, "read_items", lambda task, most: [tasks.Item(requests, 0)] * 4)
    monkeypatch.setattr(frontier, "STORIES", 4)
    monkeypatch.setattr(frontier, "STORY_LEN", 64)
    monkeypatch.setattr(frontier, "BOOK_SEQUENCES", 2)
    short = dict(
        TEXT=1, DISTANCES=(1 / 2,), SEQUENCES=2, PASSAGES=2, docstrings=lambda: "a b " * 99
    )
    for name, value in (short | {"draw": lambda *_: None}).items():
        monkeypatch.setattr(diagnosis, name, value)
    monkeypatch.setattr(demo, "train_demo_model", make_demo_model)
    monkeypatch.setattr(demo, "write_demo_text", short_demo_text)
    small = dict(steps=1, eval_tokens=256, long_micro=1, long_batch=1)
    small |= dict(short_micro=1, short_batch=1, s2l_micro=1, s2l_batch=1)
    monkeypatch.setattr(demo, "train", lambda c: train(replace(c, **small)))
    folder = tmp_path / "folder"
    if request.node.callspec.params["command"] is resumed:
        return killed_after_two(whole, folder)
    folder.mkdir()
    return folder


def make_demo_model(seed, out_dir, prose):
    tokenizer = demo.write_byte_tokenizer(out_dir.with_name("tokenizer"))
    model = tiny_llama(vocab_size=256, max_position_embeddings=256)
    save_checkpoint(model, out_dir, tokenizer_from=tokenizer)


def short_demo_text(prose, code):
    for path in (prose, code):
        text = " ".join(random.Random(path.name).choices(WORDS, k=20_000))
        path.write_text(json.dumps({"text": text}) + "\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda f: f.__name__)
def test_a_command_works_around_strangers_files(command, ckpt, folder, tmp_path):
    texts = whole_texts(tmp_path)
    taken = COMMANDS[command].split()
    taken = [name for name in taken if name not in ("cache", "scores", "lock")]
    mine = plant(folder, but=taken)
    command(ckpt, folder, texts)
    assert {path: path.is_file() and path.read_bytes() for path in mine} == mine
    assert {path for path in folder.rglob("*") if path.is_file()} - mine.keys()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda f: f.__name__)
def test_a_strangers_file_in_the_way_stays_as_it_was(command, ckpt, folder, tmp_path):
    texts = whole_texts(tmp_path)
    clean = shutil.copytree(folder, tmp_path / "clean")
    for name in COMMANDS[command].split():
        shutil.rmtree(folder)
        shutil.copytree(clean, folder)
        path = folder / name
        mine = path if "." in name or name == "lock" else path / "notes"
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine\n")
        try:
            command(ckpt, folder, texts)
        except (SystemExit, ValueError) as e:
            assert isinstance(e.args[0], str) and "\n" not in e.args[0], name
            assert str(folder) in e.args[0], (name, e.args[0])
        left = [p for p in mine.parent.iterdir() if p.name.startswith(mine.name)]
        assert "mine\n" in [p.read_text() for p in left if p.is_file()], name
