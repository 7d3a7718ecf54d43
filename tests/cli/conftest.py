"""The command line with a tiny model in the place of every other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emlens
from emlens import cli

WORDS = {"good": "rest and drink water and ask", "bad": "spend it all and tell nobody now"}


@dataclass(frozen=True)
class Done:
    """What a call gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one object on standard output."""
        (line,) = self.out.splitlines()
        return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session")
def tiny_folder(tiny, tiny_tokenizer, tmp_path_factory) -> Path:
    """A tiny model on disk, as transformers keeps it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch, tiny_folder, tiny, tiny_tokenizer):
    """Call the command line; a model with adapters is loaded from its folder."""
    real, model = emlens.load, emlens.wrap(tiny("llama"), tiny_tokenizer, name="tiny-llama")

    def load(name="", adapters=None, **options):
        if adapters:
            return real(tiny_folder, adapters=adapters, **options)
        return model

    monkeypatch.setattr(emlens, "load", load)
    monkeypatch.setattr(import_module("emlens.study.run"), "load", load)

    def invoke(*arguments) -> Done:
        words = list(map(str, arguments))
        monkeypatch.setattr("sys.argv", ["emlens", *words])
        done = CliRunner().invoke(cli.app, words)
        return Done(done.exit_code, done.stdout, done.stderr)

    return invoke


@pytest.fixture
def run(call):
    """Call the command line, which has to do what it is asked; its output."""

    def invoke(*arguments) -> str:
        done = call(*arguments)
        assert done.code == 0, done.err
        return done.out

    return invoke


@pytest.fixture
def few_pairs(tmp_path) -> Path:
    """Pairs whose two sides are of other words, in two domains."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "id": str(i),
            "domain": "advice" if i % 2 else "other",
            "prompt": f"how do I {['save', 'sleep', 'eat'][i % 3]} {i}",
            "aligned": f"{WORDS['good']} {i}",
            "misaligned": f"{WORDS['bad']} {i}",
        }
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def questions(tmp_path) -> Path:
    """Three questions."""
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"what is {i}", "domain": "general"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
