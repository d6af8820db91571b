"""An export opens in the transformers that is installed; tests/clients.py does the others."""

import re

import pytest

from machine.formats import load_checkpoint, save_checkpoint
from tests import clients
from tests.conftest import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["abf", "linear", "yarn", "ntk"])
def test_an_export_is_the_same_in_transformers(tmp_path, capsys, monkeypatch, kind, changes):
    byte_tokenizer(tmp_path / "tokenizer")
    model = tiny_llama(vocab_size=257, **changes)
    source = save_checkpoint(model, tmp_path / "source", tmp_path / "tokenizer")
    scaling = None if kind == "abf" else {"rope_type": kind, "factor": 4.0}
    extended = load_checkpoint(source, 9000.0 if kind == "abf" else None, scaling)
    extended.config.max_position_embeddings = 256
    out = save_checkpoint(extended, tmp_path / "out", source)
    monkeypatch.setattr(clients, "CLIENTS", {"transformers": clients.transformers})
    clients.main([str(out), "--text", "a window of 256 " * 8])
    said = capsys.readouterr().out
    assert re.search(r"^transformers +\S+ +gap \S+, 48 of 48 greedy tokens$", said, re.M), said


def test_a_client_that_disagrees_ends_in_exit_1(tmp_path, capsys, monkeypatch):
    byte_tokenizer(tmp_path / "tokenizer")
    out = save_checkpoint(tiny_llama(vocab_size=257), tmp_path / "out", tmp_path / "tokenizer")
    monkeypatch.setattr(clients, "CLIENTS", {"transformers": lambda *a: (1.0, a[-1])})
    with pytest.raises(SystemExit, match="disagree: transformers"):
        clients.main([str(out)])
    assert "gap 1.0e+00" in capsys.readouterr().out
