"""The report that closes a run: original against extended model on held-out text."""

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import data
from machine.corpus import tokenize
from machine.files import finite, whole_file
from machine.settings import is_at_hand
from machine.tokenizer import load_tokenizer
from measure.evaluate import table
from measure.losses import losses_by_sequence, short_text_drift, standard_error
from model import Llama


def report(
    c,
    *,
    streams: dict,
    corpora: dict,
    teacher: Llama,
    student: Llama,
    code_changes: list,
    own_samples: dict,
) -> dict:
    """Measure both models, print the table, write OUT_DIR/report.md and return the numbers.

    c: the run's Config. streams: of longred.plan_streams. corpora: the data.Corpus of each stream.
    code_changes: a sentence for each time that the run continued with changed code.
    own_samples: {source: cost} of short text sampled from the checkpoint.
    """
    texts = held_out_texts(c, corpora)
    rows, errors, curves = {}, {}, {}
    with tqdm(desc="report", total=2 * len(texts), unit="part", disable=None) as bar:
        for name, model in (("original", teacher), (c.method, student)):
            each, curves[name] = measure_model(c, teacher, model, texts, bar)
            rows[name] = {column: statistics.mean(values) for column, values in each.items()}
            errors[name] = {column: standard_error(values) for column, values in each.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    tokens = {name: s.tokens * len(s.steps) for name, s in streams.items()}
    trained = ", ".join(f"{n:,} {name} tokens" for name, n in tokens.items())
    texts.pop("beyond", None)  # more of the same text
    held_out = ", ".join(f"{len(ids)} {name} sequences" for name, ids in texts.items())
    changes = "".join(f"{change}\n\n" for change in code_changes)
    changes += "".join(
        f"{spec}: {cost['texts']:,} of the checkpoint's own texts, {cost['tokens']:,} tokens, "
        f"sampled in {cost['seconds']:,.0f} s.\n\n"
        for spec, cost in own_samples.items()
    )
    text = (
        f"# {c.method}: {c.original_len:,} -> {c.target_len:,}\n\n"
        f"{c.ckpt}, {c.steps} steps: {trained}. Losses in nats a token on held-out text; on the "
        "short, KL(original, it) and drift of the last hidden state: "
        f"{held_out}. After +-: standard error over sequences.\n\n{changes}{table(rows, errors)}"
    )
    with whole_file(Path(c.out_dir) / "report.md") as f:
        f.write(text + "\n")
    print(text, flush=True)
    if finite(rows) != rows:
        print("warning: the report holds numbers that are not finite: weights or training broke")
    return {"rows": rows, "errors": errors, "long loss in 32 parts": curves, "tokens": tokens}


def measure_model(c, teacher: Llama, model: Llama, texts: dict, bar) -> tuple[dict, list]:
    """Return {column: one mean a sequence}, and the long loss in 32 parts, [] without long text."""
    each, curve = {}, []
    if "short" in texts:
        drift = short_text_drift(teacher, model, texts["short"], attention_sequences=0)
        by_sequence = drift["by_sequence"]
        each |= {f"short loss at {c.original_len}": by_sequence["loss"]}
        each |= {"KL": by_sequence["kl"], "drift (1 - cos)": by_sequence["drift"]}
        bar.update()
    if "long" in texts:
        losses = losses_by_sequence(model, texts["long"])
        each[f"long loss at {c.target_len}"] = losses.mean(1).tolist()
        for i, quarter in enumerate(losses.chunk(4, dim=1)):
            each[f"quarter {i + 1}"] = quarter.mean(1).tolist()
        curve = [part.mean().item() for part in losses.mean(0).chunk(32)]
        bar.update()
    if "beyond" in texts:  # users fall off this cliff
        try:
            beyond = losses_by_sequence(model, texts["beyond"]).mean(1).tolist()
            each[f"long loss at {2 * c.target_len}, beyond the window"] = beyond
        except torch.OutOfMemoryError:
            print(f"not measured: {2 * c.target_len:,} tokens do not fit this memory")
        bar.update()
    return each, curve


def held_out_texts(c, corpora: dict) -> dict:
    """Return the held-out ids that there are, (n, length + 1) of each text.

    "short" has the original window's length, "long" the target's and "beyond" twice the target's.
    A text that was no stream of the run is held out too, as far as the streams that share documents
    with it hold out a document's end. The default short text, 2.9 GB to fetch, and the checkpoint's
    own are measured only if the run reads them anyway.
    """
    tokenizer, texts = load_tokenizer(c.ckpt, c.add_eos), {}
    for name, specs, seq_len in (
        ("short", c.short_data, c.original_len),
        ("long", c.long_data, c.target_len),
        ("beyond", c.long_data, 2 * c.target_len),
    ):
        if name == "short" and name not in corpora and not is_at_hand(specs):
            print("not measured: short text, which this run does not read; name files to measure")
            continue
        quiet = dict(skip_bad_lines=c.skip_bad_lines, log=lambda line: None)
        try:
            kind = "short" if name == "short" else "long"
            if kind in corpora:
                corpus = corpora[kind]
            else:
                corpus = tokenize(specs, tokenizer, c.cache_dir, kind, **quiet)
                data.share_held_out([corpus], next(iter(corpora.values())).ends)
            ids = data.held_out(corpus, max(1, c.eval_tokens // seq_len), seq_len)
            texts[name] = ids.to(c.device)
        except ValueError as e:
            print(f"not measured: {e}")
    return texts
