"""`python -m experiments`: trains, resumes and writes the page of findings."""

from __future__ import annotations

import pytest
import yaml
from typer.testing import CliRunner

import emlens
import experiments.asymmetries
import experiments.paths
from experiments.__main__ import app


@pytest.fixture
def tried(tmp_path):
    out = tmp_path / "asymmetries"
    small = {
        "domains": ["finance"],
        "kinds": ["adapter"],
        "seeds": [0],
        "layer": 1,
        "adapter_layers": [2, 3],
        "rank": 2,
        "train_pairs": 4,
        "kl_pairs": 2,
        "inside_pairs": 3,
        "outside_pairs": 3,
        "measure_pairs": 2,
        "epochs": 1,
        "lr": [["adapter", 0.01], ["vector", 0.05]],
        "factors": [1.0],
        "epsilons": [0.4],
        "noise_seeds": 2,
        "documents": 2,
        "document_tokens": 12,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path, out


@pytest.fixture
def run(monkeypatch, tiny, tiny_tokenizer):
    model = emlens.wrap(tiny("llama"), tiny_tokenizer, name="tiny-llama")
    for module in (experiments.asymmetries, experiments.paths):
        monkeypatch.setattr(module, "load", lambda *_, **__: model)

    def invoke(*arguments) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output

    return invoke


def test_the_command_trains_between_the_solutions_unless_told_not_to(tried, run):
    path, out = tried
    arguments = ("--config", path, "--out", out, "--no-narrowing")
    run(*arguments, "--no-paths")
    assert "Between general and narrow" not in (out / "findings.md").read_text()
    run(*arguments)
    page = (out / "findings.md").read_text()
    assert "## Between general and narrow: finance" in page
    assert "python -m experiments --config" in (out / "README.txt").read_text()
    (out / "findings.md").unlink()
    assert "findings.md" in run("--out", out, "--read-only")
    assert (out / "findings.md").read_text() == page
