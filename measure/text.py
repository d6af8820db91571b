"""A look at one's own text before a run: what a model will read of it, and what it will not.

    python -m measure.text PATH... --ckpt DIR

For each source: documents, tokens, its share; five documents' beginnings and ends, special tokens
visible; what was left out, and why; what is held out; whether the export's tokenizer makes the same
tokens. The text is tokenised as a run would do it, into the same cache, so a run need not again.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # by path from any folder too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from machine import corpus as texts
from machine.checkpoints import resolve_checkpoint
from machine.corpus import tokenize
from machine.keeper import command_line
from machine.tokenizer import Tokenizer, check_export, load_tokenizer

SHOWN = 24  # tokens of a beginning, and of an end


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m measure.text", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="+", metavar="PATH", help="as --long_data takes them")
    parser.add_argument("--ckpt", required=True, help="folder, OUT_DIR, known name or hub id")
    parser.add_argument("--add_eos", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--skip_bad_lines", action="store_true", help="as longred.py's")
    parser.add_argument("--cache_dir", default="out/tokens", help="as longred.py's")
    return parser.parse_args(argv)


def show(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Both ends of a document as the model sees them, on one line; BOS and EOS in brackets."""
    special = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}

    def spell(part) -> str:
        text, run = "", []
        for i in [*(int(i) for i in part), None]:
            if i is None or i in special:
                text += tokenizer.decode(run).replace("\r", "\\r").replace("\n", "\\n")
                text += f"[{special[i]} {i}]" if i is not None else ""
                run = []
            else:
                run.append(i)
        return text

    if len(ids) <= 2 * SHOWN:
        return spell(ids)
    return f"{spell(ids[:SHOWN])} ... {spell(ids[-SHOWN:])}"


def look(a: argparse.Namespace) -> None:
    """Print all of it. Raises ValueError, one line, for what a run would refuse too."""
    folder, left_out = resolve_checkpoint(a.ckpt), []
    tokenizer = load_tokenizer(folder, a.add_eos)
    check_export(folder, tokenizer)

    def log(line: str) -> None:
        print(line)
        if "left out" in line:
            left_out.append(line)

    corpus = tokenize(a.paths, tokenizer, a.cache_dir, "text", a.skip_bad_lines, log)
    sizes = np.diff(corpus.doc_starts)
    marks = [f"BOS {tokenizer.bos_id} in front" if tokenizer.add_bos else "nothing in front"]
    marks += [f"EOS {tokenizer.eos_id} at the end" if tokenizer.add_eos else "nothing at the end"]
    print(f"\na document has {', '.join(marks)}")
    for source, spec in enumerate(a.paths):
        mine = np.flatnonzero(corpus.doc_sources == source)
        n = int(sizes[mine].sum())
        print(f"\n{spec}: {len(mine):,} documents, {n:,} tokens, {n / len(corpus.tokens):.1%}")
        for i in mine[np.linspace(0, len(mine) - 1, min(5, len(mine))).astype(int)]:
            ids = corpus.tokens[corpus.doc_starts[i] : corpus.doc_starts[i + 1]]
            print(f"  document {i:,}, {len(ids):,} tokens: {show(tokenizer, ids)}")
    print(f"\nof {len(corpus.tokens):,} tokens {corpus.describe_held_out()}")
    print("\n".join(["left out:", *(f"  {x}" for x in left_out)]) if left_out else "left out: none")
    some = texts.beginnings(a.paths, a.cache_dir, a.skip_bad_lines)
    same = check_export(folder, tokenizer, some)
    pairs = zip(some, tokenizer.encode(some), strict=True)
    back = sum(tokenizer.decode(ids) == text for text, ids in pairs)
    print(
        f"tokenizer: the export's makes the same {same:,} tokens of {len(some):,} documents' "
        f"beginnings; decoded, {back:,} of them are the text again"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's error ends as SystemExit with one line."""
    with command_line("text", argv):
        look(parse_args(argv))


if __name__ == "__main__":
    main()
