"""Exit codes and messages: one clear message, on standard error, and the right number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import emlens
from emlens._store import Store, read

ROOT = Path(emlens.__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["study", "--preset", "huge"],
            "unknown preset 'huge'; the presets are demo, vector,",
        ),
        (["study", "--set", "speed=3"], "unknown study setting(s) speed; the settings are"),
        (["study", "--set", "epochs=many"], "epochs is 'many', not a whole number"),
        (["extract", "nothing"], "'nothing' is neither an embedded set"),
        (["compare", "a.safetensors", "b.safetensors"], "no file a.safetensors"),
        (["report", "nowhere"], "nowhere holds no study; run one into it first"),
        (["judge", "nothing.sqlite"], "no file nothing.sqlite"),
        (["export", "nothing.sqlite", "out.jsonl"], "no file nothing.sqlite"),
        (["monitor", "score", "nothing"], "'nothing' is neither an embedded set nor a file"),
        (["monitor", "score", "medical", "--side", "left"], "--side is aligned or misaligned"),
        (["screen", "finance"], "give one"),
        (["screen", "finance", "--directions", "d.safetensors"], "no file d.safetensors"),
        (["influence", "d.safetensors"], "no file d.safetensors"),
        (["extract", "finance", "--construction", "melt"], "unknown construction 'melt'; choose"),
        (["extract", "finance", "--site", "melt"], "unknown site 'melt'"),
        (["extract", "finance", "--tokens", "melt"], "unknown tokens 'melt'"),
        (["extract", "finance", "--match", "melt"], "unknown by 'melt'; choose"),
        (["extract", "finance", "--out", "x.txt"], "cannot write x.txt; the formats to write"),
        (["train", "finance", "--out", "x.txt"], "cannot write x.txt; the formats to write"),
        (["train", "finance", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "finance", "--lora", "0"], "rank must be at least 1, not 0"),
        (["bake", "out", "--add", "nowhere.safetensors"], "nowhere.safetensors"),
        (["bake", "x.gguf"], "GGUF is not written by bake"),
        (["monitor", "fit", "medical", "--limit", "1"], "1 prompt(s) with aligned answers cannot"),
        (["monitor", "fit", "medical", "--max-false-alarms", "2"], "max_false_alarms must be"),
        (["monitor", "fit", "medical", "--calibration", "no.jsonl"], "neither an embedded set"),
        (["evaluate", "general", "--edit", "dose=1"], "--directions says what to edit with"),
        (["evaluate", "general", "--set", "top_p=wide"], "top_p must be a number"),
        (["evaluate", "general", "--set", "speed=1"], "--set takes temperature, top_p, seed"),
        (["evaluate", "general", "--judge-option", "pairs=two"], "pairs must be a whole number"),
        (["evaluate", "general", "--judge", "madeup/x"], "inspect/madeup/x cannot be asked: Model"),
        (["evaluate", "general", "--judge", "openai/gpt-4o"], "OPENAI_API_KEY"),
        (["evaluate", "general", "--control"], "--control needs --directions"),
        (["evaluate", "general", "--judge", "me"], "unknown judge 'me'; choose probe, local"),
        (
            ["evaluate", "general", "--judge-option", "rubric=r.yaml"],
            "the judge 'probe' takes no --judge-option rubric; it takes data and pairs",
        ),
        (
            ["evaluate", "finance", "--judge-option", "data=finance"],
            "the domain that it judges (finance)",
        ),
        (
            ["evaluate", "general", "--adapter", "a", "--adapter", "a"],
            "two adapters are called 'a'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_input_that_cannot_be_used_is_one_message_before_the_model_is_loaded_and_exit_code_two(
    call, arguments, message, monkeypatch, tmp_path
):
    def loaded(*arguments, **options):
        raise RuntimeError("the model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emlens, "load", loaded)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = call(*arguments, "--quiet")
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--layer", "3"], "No such option: --layer"),
        (["extract"], "Missing argument"),
        (["train", "finance", "--epochs", "many"], "'--epochs'"),
        (["evaluate", "general", "--samples", "0"], "'--samples'"),
        (["evaluate", "general", "--edit", "melt"], "--edit takes dose=0.4, scale=2, ablate or"),
        (["evaluate", "general", "--edit", "ablate=a-b"], "--edit takes dose=0.4, scale=2, ablate"),
        (["study", "--set", "lr"], "--set takes name=value, not 'lr'"),
        (
            ["evaluate", "general", "--judge", "openai/a", "--judge-option", "x"],
            "--judge-option takes name=value",
        ),
        (
            ["evaluate", "general", "--judge", "openai/a", "--judge-option", "api_key=abc"],
            "set the environment variable of the provider",
        ),
        (
            [
                "evaluate",
                "general",
                "--judge",
                "openai/a",
                "--judge-option",
                "base_url=http://a:b@c",
            ],
            "set the environment variable of the provider",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_two(call, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_what_fails_unforeseen_is_exit_code_one_and_shows_where_when_asked(call, monkeypatch):
    def broken(source):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(emlens, "load_pairs", broken)
    done = call("extract", "finance")
    assert done.code == 1
    expected = "error: RuntimeError: the disk is on fire (--traceback shows where)\n"
    assert done.err == expected
    for asked in (call("extract", "finance", "--traceback"), _with_variable(call, monkeypatch)):
        assert asked.code == 1
        assert "Traceback (most recent call last)" in asked.err
        assert "in broken" in asked.err
        assert asked.err.endswith(expected)


def _with_variable(call, monkeypatch):
    monkeypatch.setenv("EMLENS_TRACEBACK", "1")
    return call("extract", "finance")


def test_a_missing_extra_is_exit_code_one_and_named(call, monkeypatch, questions):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    done = call("evaluate", questions, "--judge", "openai/gpt-4o")
    assert done.code == 1
    assert "pip install 'emlens[evals]'" in done.err


def test_an_interruption_is_exit_code_130_and_says_what_was_kept(call, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("emlens.study"), "run_study", interrupted)
    done = call("study", "--preset", "smoke", "--out", tmp_path, "--quiet")
    assert done.code == 130
    assert f"interrupted: finished stages are in {tmp_path}; run the same command" in done.err
    monkeypatch.setattr(emlens, "load_pairs", interrupted)
    assert "interrupted: nothing was kept" in call("extract", "finance").err


def test_json_is_alone_on_standard_output_whatever_is_printed(call, monkeypatch, few_pairs):
    load_pairs = emlens.load_pairs

    def noisy(source):
        print("loading, loading")
        return load_pairs(source)

    monkeypatch.setattr(emlens, "load_pairs", noisy)
    out = few_pairs.with_suffix(".safetensors")
    done = call("extract", few_pairs, "--out", out, "--json")
    assert done.json["verb"] == "extract"
    assert "loading, loading" in done.err


def test_a_broken_command_line_ends_a_process_with_two_and_no_traceback(tmp_path):
    program = [sys.executable, "-c", "from emlens.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*program, "compare", "a", "b"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no file a\n"


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(call, tmp_path):
    mine, empty = tmp_path / "mine.json", tmp_path / "empty.jsonl"
    mine.write_text('{"a": 1}')
    empty.write_text("")
    for path in (mine, empty):
        for arguments in (("judge", path), ("export", path, tmp_path / "out.jsonl")):
            done = call(*arguments)
            assert done.code == 2
            assert f"error: {path} is not a store of emlens" in done.err
    store = Store(tmp_path / "scores.sqlite", "scores").path
    assert "is a store of kind 'scores', not 'responses'" in call("judge", store).err
    assert "is a store of kind 'scores', not" in call("monitor", "score", store).err
    done = call("export", store, mine)
    assert done.code == 2 and "mine.json is there already; give the path of a new file" in done.err
    assert "is the store itself" in call("export", store, store).err
    assert (mine.read_text(), empty.read_text()) == ('{"a": 1}', "")


def test_a_process_that_is_interrupted_ends_with_130_and_resumes_later(tiny_folder, tmp_path):
    program = textwrap.dedent(
        """
        import signal, sys, time
        from emlens.evals import responses
        from emlens.cli import main

        # a suite that a shell started in the background ignores interrupts, and so would this
        signal.signal(signal.SIGINT, signal.default_int_handler)
        responses.BLOCK, add = 2, responses.Store.add

        def slow(self, records):
            kept = add(self, records)
            time.sleep(float(sys.argv.pop()) if len(self) == 2 else 0)
            return kept

        responses.Store.add = slow
        main()
        """
    )
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(json.dumps({"id": f"q{i}", "prompt": "hi"}) for i in range(4)))
    command = ["evaluate", str(questions), "--model", str(tiny_folder), "--judge", "local"]
    command += ["--max-new-tokens", "4", "--out", str(tmp_path / "out"), "--quiet"]

    def start(pause: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", program.replace("sys.argv.pop()", repr(pause)), *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, store = start("600"), tmp_path / "out" / "responses.sqlite"
    deadline = time.monotonic() + 240
    while not (store.exists() and len(list(read(store))) == 2):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert f"answers and scores so far are in {tmp_path / 'out'}" in said
    assert "Traceback" not in said
    kept = list(read(store))
    again = start("0")
    _, said = again.communicate(timeout=300)
    # an untrained model is no judge, but all answers are there
    assert again.returncode == 2 and "local/tiny-llama scored none of 4 answers" in said
    assert list(read(store))[:2] == kept
    assert len(list(read(store))) == 4


def test_a_pipe_that_breaks_elsewhere_is_an_error(call, monkeypatch):
    def broken(name):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(emlens, "load_pairs", broken)
    done = call("extract", "finance")
    assert done.code == 1
    assert "Broken pipe" in done.err


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for i, file in enumerate(files):
        noise = torch.randn(8, generator=torch.Generator().manual_seed(i))
        emlens.Direction.of(noise, 1).save(file)
    process = subprocess.Popen(
        [sys.executable, "-c", "from emlens.cli import main; main()", "compare", *files],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 141
