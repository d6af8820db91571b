"""What was kept and what was gained by an extension of the context window.

    python evaluate.py --base DIR --write_samples stories.jsonl --n_samples 400

writes text sampled from a model itself: short text from its own distribution, for distillation.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from model import Llama, load_checkpoint, resolve_checkpoint


@torch.no_grad()
def position_losses(model: Llama, input_ids: Tensor, rows: int = 256) -> Tensor:
    """Next-token loss at each position, mean over sequences.

    input_ids: (B, T + 1) int64, read one sequence at a time, logits `rows` tokens at a time.
    Returns (T,) float64 on the CPU, nats.
    """
    total = torch.zeros(input_ids.shape[1] - 1, dtype=torch.float64)
    for ids in tqdm(input_ids, desc="loss by position", unit="seq", leave=False, disable=None):
        hidden = model(ids[None, :-1])[0][0]  # (T, D)
        for start in range(0, hidden.shape[0], rows):
            logits = model.logits(hidden[start : start + rows]).float()
            labels = ids[start + 1 : start + 1 + logits.shape[0]]
            nll = F.cross_entropy(logits, labels, reduction="none")
            total[start : start + rows] += nll.double().cpu()
    return total / input_ids.shape[0]


@torch.no_grad()
def hidden_similarity(a: Llama, b: Llama, input_ids: Tensor) -> Tensor:
    """Cosine of the two models' hidden states, mean over tokens (LongReD section 3, eq. 5).

    input_ids: (B, T) int64. Returns (n_layers + 1,) float64 on the CPU, by hidden-state index.
    """
    taps = tuple(range(a.config.n_layers + 1))
    total = torch.zeros(len(taps), dtype=torch.float64)
    for ids in input_ids:
        hidden_a, hidden_b = (m(ids[None], taps=taps)[1] for m in (a, b))
        for i in taps:
            cos = F.cosine_similarity(hidden_a[i].float(), hidden_b[i].float(), dim=-1)
            total[i] += cos.mean().double().cpu()
    return total / input_ids.shape[0]


def plot_demo(rows: dict, curves: dict, original_len: int, target_len: int, path: Path) -> Path:
    """Two panels: short loss as points, long loss by position as lines. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = dict(zip(rows, [("#777777", ":"), ("#d55e00", "--"), ("#0072b2", "-")], strict=True))
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 2])
    short = {name: next(iter(row.values())) for name, row in rows.items()}
    for x, (name, loss) in enumerate(short.items()):
        left.plot(x, loss, "o", markersize=9, color=styles[name][0])
        left.annotate(f"{loss:.2f}", (x, loss), (0, 8), textcoords="offset points", ha="center")
    left.set_xticks(range(len(short)), list(short))
    left.set_title(f"kept: English prose at {original_len}")
    left.set_ylabel("loss, nats a token (lower is better)")
    left.margins(0.25)
    for name, curve in curves.items():
        x = [(i + 0.5) * target_len / len(curve) for i in range(len(curve))]
        right.plot(x, curve, styles[name][1], color=styles[name][0], label=name)
    right.axvline(original_len, color="black", linewidth=0.8)
    right.annotate(" original window", (original_len, right.get_ylim()[1]), va="top")
    right.set_title("gained: source code, by position")
    right.set_xlabel("position, tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def write_samples(
    base: str, path: str, n_samples: int, length: int | None, temperature: float, seed: int
) -> None:
    """Sample texts from the model, each from its BOS token (else EOS) to its EOS token.

    path: a .jsonl of {"text": ...}; length: most tokens in one, default the model's window.
    """
    model = load_checkpoint(base)
    tokenizer = data.load_tokenizer(resolve_checkpoint(base))
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise ValueError(f"{base}: its tokenizer has neither BOS nor EOS to start a text from")
    length = length or model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    partial = Path(path + ".partial")
    with open(partial, "w", encoding="utf-8") as f, tqdm(total=n_samples, unit="text") as bar:
        for start in range(0, n_samples, 50):
            batch = torch.full((min(50, n_samples - start), 1), first)
            texts = model.generate(batch, length - 1, temperature, generator=generator)
            for ids in texts[:, 1:].tolist():
                ends = [i for i, t in enumerate(ids) if t in (tokenizer.eos_id, first)]
                f.write(json.dumps({"text": tokenizer.decode(ids[: (ends + [None])[0]])}) + "\n")
            bar.update(len(batch))
    partial.replace(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder, OUT_DIR, known name or hub id")
    parser.add_argument("--write_samples", required=True, metavar="FILE", help="a .jsonl to write")
    parser.add_argument("--n_samples", type=int, default=400)
    parser.add_argument("--length", type=int, help="most tokens in a sample (default: the window)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=2024)
    a = parser.parse_args(argv)
    try:
        write_samples(a.base, a.write_samples, a.n_samples, a.length, a.temperature, a.seed)
    except (ValueError, OSError) as e:
        raise SystemExit(f"evaluate: {e}") from None


if __name__ == "__main__":
    main()
