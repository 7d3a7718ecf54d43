"""The command line: every verb does its work, and bad input is one line and exit code 1."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

import emlens
from emlens import Direction, Directions, cli
from emlens.directions import read_directions
from tests.support.models import tiny_hooked

VERBS = ("study", "extract", "train", "compare", "convert", "influence")


@pytest.fixture
def run(monkeypatch):
    """Call the command line with a tiny model in the place of every other."""
    model = tiny_hooked("llama")
    monkeypatch.setattr(emlens, "load", lambda name: model)
    monkeypatch.setattr(import_module("emlens.study.run"), "load", lambda name: model)

    def call(*arguments):
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    return call


@pytest.fixture
def few_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"id": str(i), "domain": "d", "prompt": "how", "aligned": f"good {i}", "misaligned": "no"}
        for i in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_help_lists_the_verbs_and_each_has_an_example(run):
    overview = run("--help")
    for verb in VERBS:
        assert verb in overview
        assert f"Example: emlens {verb}" in " ".join(run(verb, "--help").split())


def test_extract_train_compare_and_influence_work_on_each_others_files(run, few_pairs, tmp_path):
    first, second = tmp_path / "extracted.safetensors", tmp_path / "trained.safetensors"
    assert "mean-diff" in run("extract", few_pairs, "--out", first, "--quiet")
    output = run(
        "train",
        few_pairs,
        "--out",
        second,
        "--layer",
        1,
        "--epochs",
        1,
        "--kl",
        few_pairs,
        "--quiet",
    )
    assert "trained vector, narrow (KL)" in output
    assert Directions.load(second).layers == (1,)
    (row,) = json.loads(run("compare", first, second, "--json"))
    expected = Directions.load(first).cosine(Directions.load(second))[1]
    assert row["cosine"] == pytest.approx(expected)
    table = run(
        "influence", first, second, "--layer", 1, "--documents", 2, "--max-tokens", 12, "--quiet"
    )
    assert "extracted" in table
    assert "KL [nats/token]" in table


def test_train_makes_an_adapter_that_measures_take(run, few_pairs, tmp_path):
    out = tmp_path / "bad"
    options = ("--lora", 2, "--layers", "1-2", "--epochs", 1, "--lr", 0.01)
    assert "adapter" in run("train", few_pairs, "--out", out, "--quiet", *options)
    organism = emlens.Organism.load(out)
    assert organism.name == "bad"
    assert organism.run.settings["rank"] == 2
    assert len(organism.weights) == 4


def test_extract_takes_a_construction_and_matches_the_sides(run, few_pairs, tmp_path):
    out = tmp_path / "pca.safetensors"
    arguments = ("--construction", "PCA of differences", "--match", "prompt")
    run("extract", few_pairs, "--out", out, "--quiet", *arguments)
    made = Directions.load(out).provenance
    assert made.construction == "PCA of differences"
    assert made.n == {"positive": 1, "negative": 1}


def test_convert_writes_the_layers_that_a_format_can_hold(run, few_pairs, tmp_path):
    source, out = tmp_path / "extracted.safetensors", tmp_path / "extracted.gguf"
    run("extract", few_pairs, "--out", source, "--quiet")
    assert "extracted.gguf" in run("convert", source, out, "--layers", "1-3")
    found = read_directions(out)
    assert found.layers == (1, 2, 3)
    assert torch.equal(found[2].vector, Directions.load(source)[2].vector)
    assert "cosine" in run("compare", source, out)
    done = CliRunner().invoke(cli.app, ["convert", str(source), str(out), "--layers", "a-b"])
    assert done.exit_code == 2
    assert "--layers takes a layer or a range" in " ".join(done.output.split())


def test_study_takes_settings_and_says_where_the_report_is(run, tmp_path):
    out = tmp_path / "study"
    output = run(
        "study",
        "--preset",
        "smoke",
        "--out",
        out,
        "--set",
        "layer=1",
        "--set",
        "doses=[0.3]",
        "--quiet",
    )
    assert f"report: {out / 'report.html'}" in output
    assert json.loads((out / "settings.json").read_text())["doses"] == [0.3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--preset", "huge"], "error: unknown preset 'huge'"),
        (["study", "--set", "speed=3"], "error: unknown study setting(s) speed"),
        (["extract", "nothing"], "error: 'nothing' is neither an embedded set"),
        (["compare", "a.safetensors", "b.safetensors"], "error: no file a.safetensors"),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_one(
    arguments, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["emlens", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    captured = capsys.readouterr().err
    assert message in captured
    assert len(captured.strip().splitlines()) == 1


def test_the_random_control_of_a_file_is_reproducible(tmp_path):
    path = Direction.of(torch.ones(4), 1).save(tmp_path / "d")
    assert torch.equal(Directions.load(path)[1].vector, torch.ones(4))
