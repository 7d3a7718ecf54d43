"""The benchmark for GPUs runs on a CPU as well, on a tiny model, so that it is never broken."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(script, folder, tokenizer, *options):
    tokenizer.save_pretrained(folder)
    out = folder / "gpu.json"
    given = ["--tokenizer", str(folder), "--shapes", "tiny", "--pairs", "1", "--out", str(out)]
    script.main([*given, *options])
    return json.loads(out.read_text())["shapes"]["tiny"]


def test_every_part_ends_and_stands_beside_its_baseline(script, tiny_tokenizer, tmp_path):
    parts = [name for name in script.PARTS if name != "transformer_lens"]
    found = run(script, tmp_path, tiny_tokenizer, "--parts", *parts)
    assert [name for name in parts if "failed" in found[name]] == []
    (rows,) = [found["extract"][name] for name in found["extract"] if name.isdigit()]
    assert rows["mean_diff"]["speed against bare pass"] == pytest.approx(
        rows["bare pass"]["s"] / rows["mean_diff"]["s"]
    )
    assert len(rows["bare pass"]["rounds"]) == 1
    assert found["generate"]["time, steered against bare"] > 0
    assert found["profile"]["in exact evaluations"] > 0


def test_a_part_that_fails_or_takes_too_long_says_so(script, tiny_tokenizer, tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(script.PARTS, "train", broken)
    options = ("--parts", "train", "extract", "generate")
    found = run(script, tmp_path, tiny_tokenizer, *options)
    assert found["train"]["failed"] == "RuntimeError: out of luck"
    assert "failed" not in found["generate"]
    found = run(script, tmp_path, tiny_tokenizer, "--parts", "generate", "--limit", "0.001")
    assert found["generate"]["failed"] == "TimeoutError: took longer than 0.001 s"
