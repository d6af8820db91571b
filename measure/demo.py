"""The demo, `python longred.py`: the paper's story at a size any laptop trains; no network.

A byte-level Llama of 0.8M parameters learns the English prose that ships inside Python (window
256), then its window is stretched to 1,024 over Python's own sources: once by long-text training
alone, once by LongReD.
"""

import json
import os
import sysconfig
from pathlib import Path

import torch
from tqdm import tqdm

import data
from longred import cross_entropy
from machine.corpus import tokenize
from machine.files import lock_folder, read_json, whole_file, write_json
from machine.formats import save_checkpoint
from machine.keeper import clear_run
from machine.log import command
from machine.run import train
from machine.settings import MachineConfig as Config
from machine.settings import check_device, whole_path
from machine.states import read_run
from machine.tokenizer import load_tokenizer
from measure import evaluate
from model import Llama, ModelConfig


def demo(config: Config) -> Path:
    """Train the original, stretch it both ways and compare the three. Return the demo's folder.

    config: out_dir (default: out/demo), seed and device count; the rest is the demo's own.
    """
    if not 0 <= config.seed < 2**40:
        raise ValueError(f"--seed {config.seed}: need one from 0 to below {2**40}")
    out_dir = Path(whole_path(config.out_dir or "out/demo", "out_dir"))
    device = config.device
    check_device(config, 0)
    with lock_folder(out_dir, "--out_dir"):
        return run_demo(out_dir, config.seed, device)


MADE = "prose.jsonl code.jsonl original tokenizer tokens long_cpt longred".split()
MADE += [f"{name}.png" for name in evaluate.PICTURES]
MARK = "demo.json"  # the folder is a demo's, and what is in MADE its own
MAKER = "python longred.py"


def take_folder(out_dir: Path) -> None:
    """Mark a folder as the demo's; raise ValueError if other files there have the demo's names."""
    mark = out_dir / MARK
    if not mark.is_file() or read_json(mark).get("made by") != MAKER:
        if there := [name for name in (MARK, *MADE) if os.path.lexists(out_dir / name)]:
            raise ValueError(
                f"{out_dir / there[0]} is in the demo's way, and no demo made it: pass another "
                "--out_dir (for an older demo's folder too), or --ckpt for a run of your own"
            )
        write_json(mark, {"made by": MAKER})


def run_demo(out_dir: Path, seed: int, device: str | None) -> Path:
    """Run the demo in a folder that is locked. Return the folder."""
    take_folder(out_dir)
    prose, code, original = out_dir / "prose.jsonl", out_dir / "code.jsonl", out_dir / "original"
    mark = {"made by": MAKER}
    if not (original / "config.json").is_file() or read_json(out_dir / MARK).get("seed") != seed:
        write_json(out_dir / MARK, mark)  # the original is no seed's until it is whole
        write_demo_text(prose, code)
        train_demo_model(seed, original, prose)
        write_json(out_dir / MARK, mark | {"seed": seed})
    flags = dict(ckpt=str(original), target_len=1024, rope_theta=1e5, steps=50, lr=1e-3)
    flags |= dict(long_data=[str(code)], short_data=[str(prose)], s2l_data=[str(prose)])
    flags |= dict(long_micro=1, long_batch=2, short_micro=1, short_batch=4)
    flags |= dict(s2l_micro=1, s2l_batch=2, cache_dir=str(out_dir / "tokens"))
    flags |= dict(eval_tokens=16384, seed=seed, device=device)
    reports = {}
    for method in ("long_cpt", "longred"):  # an earlier demo's go; both are looked at beforehand
        if (out_dir / method).exists():
            clear_run(out_dir / method, str(original))
    for method in ("long_cpt", "longred"):
        folder = out_dir / method
        train(Config(method=method, out_dir=str(folder), **flags))
        reports[method] = read_run(folder)["report"]
    reports["original"] = reports["longred"]  # each measures the original too
    rows, errors, measured = {}, {}, []
    for name, title in (("original",) * 2, ("long_cpt", "Long CPT"), ("longred", "LongReD")):
        row = reports[name]["rows"][name]
        columns = {
            "prose loss at 256": "short loss at 256",
            "code loss at 1,024": "long loss at 1024",
            "drift of the last hidden state": "drift (1 - cos)",
        }
        rows[title] = {shown: row[column] for shown, column in columns.items()}
        of_row = reports[name]["errors"][name]
        errors[title] = {shown: of_row[column] for shown, column in columns.items()}
        losses = {"kept": {"loss": row["short loss at 256"]}}
        losses["position"] = {"whole": {"nll": reports[name]["long loss in 32 parts"][name]}}
        measured.append((title, out_dir / name / "hf", losses))
    print(f"\nWhat the longer window gained, and what it cost:\n\n{evaluate.table(rows, errors)}\n")
    flags = ["--base", original, "--ckpt", out_dir / "long_cpt", out_dir / "longred"]
    print("More:", command("measure/evaluate.py", *flags, "--out_dir", out_dir / "more"))
    try:
        print("pictures:", *evaluate.draw(measured, out_dir, 256, 1024))
    except ImportError:
        print("for pictures: pip install matplotlib, then run this again")
    return out_dir


def prose_lines() -> str:
    """Return Python's help topics as .jsonl: English prose that every Python has with it."""
    from pydoc_data.topics import topics

    return "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))


def write_demo_text(prose: Path, code: Path) -> None:
    """Write two .jsonl files: Python's help topics, and the sources of its standard library."""
    with whole_file(prose) as f:
        f.write(prose_lines())
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    with whole_file(code) as f:
        for path in sorted(stdlib.rglob("*.py")):
            parts = path.relative_to(stdlib).parts
            if not {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(parts):
                f.write(json.dumps({"text": path.read_text("utf-8", "replace")}) + "\n")


def train_demo_model(seed: int, out_dir: Path, prose: Path, steps: int = 640) -> None:
    """Train the demo's original model, byte-level and 0.8M parameters, from scratch to a HF folder.

    Plain next-token training: 1,024 tokens a step, the first half of them in sequences of 128,
    which cost less attention, the second in sequences of 256, the window; a linear warm-up, then
    linearly to 0.
    """
    tokenizer_dir = write_byte_tokenizer(out_dir.with_name("tokenizer"))
    tokenizer = load_tokenizer(tokenizer_dir)
    corpus = tokenize([str(prose)], tokenizer, out_dir.with_name("tokens"), "prose")
    halves = [data.Stream(corpus, f"original {t}", seed, 1024 // t, t) for t in (128, 256)]
    shape = dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=352)
    shape |= dict(vocab_size=256, rope_theta=1e4, max_position_embeddings=256)
    generator = torch.Generator().manual_seed(seed)
    model = Llama(ModelConfig(**shape)).init_weights(generator=generator)
    peak_lr, warm_up, adamw = 5e-3, 30, dict(betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    bar = tqdm(range(steps), desc="training the demo's original model", unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / warm_up, 1 - step / steps)
        batch = data.Batch.whole(halves[2 * step // steps].batch(step))
        loss = cross_entropy(model, None, batch, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_checkpoint(model, out_dir, tokenizer_from=tokenizer_dir)


def write_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of 256 tokens, one a byte: no merges, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
