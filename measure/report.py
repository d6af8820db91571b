"""The report that closes a run: original against extended model, on held-out text."""

from pathlib import Path

import numpy as np

import data
from measure.evaluate import position_losses, short_text_drift, table
from model import Llama


def report(c, streams: dict, teacher: Llama, student: Llama, code_changes: list[dict]) -> dict:
    """Measure both models, print the table, write OUT_DIR/report.md; returns the numbers.

    c: the run's Config. streams: as longred.plan_streams has them. code_changes: {"after_step",
    "files"} of each time the run went on with other code than it began with.
    """
    texts = held_out_texts(c, streams)
    rows, curves = {}, {}
    for name, model in (("original", teacher), (c.method, student)):
        row = rows[name] = {}
        if "short" in texts:
            drift = short_text_drift(teacher, model, texts["short"], attention_sequences=0)
            row |= {f"short loss at {c.original_len}": drift["loss"], "KL": drift["kl"]}
            row["drift (1 - cos)"] = 1 - drift["cosine"][-1]
        if "long" in texts:
            by_position = position_losses(model, texts["long"])
            row[f"long loss at {c.target_len}"] = by_position.mean().item()
            for i, quarter in enumerate(by_position.chunk(4)):
                row[f"quarter {i + 1}"] = quarter.mean().item()
            curves[name] = [part.mean().item() for part in by_position.chunk(32)]
    tokens = {name: s.tokens * len(s.steps) for name, s in streams.items()}
    trained = ", ".join(f"{n:,} {name} tokens" for name, n in tokens.items())
    held_out = ", ".join(f"{len(ids)} {name} sequences" for name, ids in texts.items())
    changes = "".join(
        f"After step {change['after_step']} the run went on with other code in "
        f"{', '.join(change['files'])}.\n\n"
        for change in code_changes
    )
    text = (
        f"# {c.method}: {c.original_len:,} -> {c.target_len:,}\n\n"
        f"{c.ckpt}, {c.steps} steps: {trained}. Losses in nats a token on held-out text; on the "
        "short, KL(original, it) and drift of the last hidden state: "
        f"{held_out}.\n\n{changes}{table(rows)}"
    )
    (Path(c.out_dir) / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return {"rows": rows, "long loss in 32 parts": curves, "tokens": tokens}


def held_out_texts(c, streams: dict) -> dict:
    """{"short": (n, original_len + 1) ids, "long": (n, target_len + 1)}, what there is of them.

    Of a text that was no stream of the run too, nothing that one of its streams trained on, as far
    as those gave a document's end.
    """
    tokenizer, texts = data.load_tokenizer(c.ckpt, c.add_eos), {}
    for name, specs, seq_len in (
        ("short", c.short_data, c.original_len),
        ("long", c.long_data, c.target_len),
    ):
        quiet = dict(skip_bad_lines=c.skip_bad_lines, log=lambda line: None)
        try:
            if name in streams:
                corpus = streams[name].text.corpus
            else:
                corpus = data.tokenize(specs, tokenizer, c.cache_dir, name, **quiet)
                tails = [s.text.corpus.ends_held_out() for s in streams.values()]
                corpus.elsewhere = np.unique(np.concatenate(tails))
            ids = data.held_out(corpus, max(1, c.eval_tokens // seq_len), seq_len)
            texts[name] = ids.to(c.device)
        except ValueError as e:
            print(f"not measured: {e}")
    return texts
