"""Run folders: they explain themselves, go on, and take their own settings back."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import yaml

from emlens.study import StudySettings

SMALL = ("--preset", "smoke", "--set", "layers=[1, 2]")


@pytest.fixture
def studied(run, tmp_path):
    out = tmp_path / "study"
    return out, run("study", *SMALL, "--set", "epsilons=[0.3]", "--out", out, "--quiet", "--json")


def test_a_study_explains_its_folder_and_its_config_makes_it_again(studied, call, tmp_path):
    out, said = studied
    assert json.loads(said)["report"] == str(out / "report.html")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["epsilons"] == [0.3]
    assert set(config) == set(StudySettings().to_dict())
    readme = (out / "README.txt").read_text()
    for name in sorted(path.name for path in out.iterdir() if path.name != "README.txt"):
        assert f"  {name}" in readme, name
    assert "Made by\n  emlens study --preset smoke" in readme
    assert "emlens study --config config.yaml --out ." in readme
    lines = readme.partition("To read it in Python")[2].partition("Files")[0].splitlines()[1:]
    exec_in(out, "\n".join(line.strip() for line in lines))
    (made,) = json.loads((out / "versions.json").read_text())
    assert {"python", "emlens", "torch"} <= set(made["versions"])
    again = call("study", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert "settings:\nmodel: smollm2-135m-instruct" in again.err
    for name in ("results.json", "influence.json"):
        ours = json.loads((out / name).read_text())
        assert ours == json.loads((tmp_path / "again" / name).read_text())


def exec_in(folder, program):
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(program, "README.txt", "exec"), {})
    finally:
        os.chdir(before)


def test_a_report_is_rebuilt_without_a_model(studied, run, monkeypatch, call):
    out, _ = studied
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    monkeypatch.setattr(import_module("emlens.study.run"), "load", None)
    assert f"written: {out / 'report.html'}" in run("report", out)
    assert (out / "report.html").read_bytes() == before
    (out / "stages" / "answers.json").unlink()
    done = call("report", out)
    assert done.code == 2
    assert "is not finished (answers missing); resume it first: emlens study" in done.err


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(call, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: smoke\nrank: 1\nlr: 0.5\nkl-domains: [finance]\n")
    done = call(
        "study", "--config", path, "--set", "lr=0.25", "--set", "rank=99", "--out", tmp_path / "x"
    )
    settings = yaml.safe_load(done.err.partition("settings:\n")[2].partition("\n[")[0])
    wanted = {"lr": 0.25, "rank": 99, "kl_domains": ["finance"], "train_pairs": 6}
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer: 3\nlr: 1\nspeed: 2", "unknown key(s) layer, speed; known are"),
        ("- 1", "must hold names and values"),
        ("lr: [1", "not valid YAML"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_what_is_wrong(call, tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    done = call("study", "--config", path)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert str(path) in "".join(done.err.split())


def test_a_config_fills_the_options_of_a_verb(run, call, few_pairs, tmp_path):
    path, out = tmp_path / "train.yaml", tmp_path / "v.safetensors"
    path.write_text(f"data: {few_pairs}\nepochs: 1\nlayer: 2\nkl: {few_pairs}\nout: {out}\n")
    made = json.loads(run("train", "--config", path, "--layer", 1, "--json"))
    assert made["written"] == str(out)
    assert made["layers"] == [1]
    assert made["settings"]["epochs"] == 1
    assert made["settings"]["kl"]["weight"] == 1.0
    path.write_text("epoch: 1\n")
    done = call("train", few_pairs, "--config", path)
    assert done.code == 2
    assert "unknown key(s) epoch; known are data, device_map" in " ".join(done.err.split())
