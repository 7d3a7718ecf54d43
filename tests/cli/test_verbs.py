"""The command line: every verb does its work, on the files of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import emlens
from emlens import Directions
from emlens._store import Store
from emlens.directions import read_directions
from tests.evals.test_rates import response


def test_extract_train_compare_and_influence_work_on_each_others_files(run, few_pairs, tmp_path):
    first, second = tmp_path / "extracted.safetensors", tmp_path / "trained.safetensors"
    assert "mean-diff" in run("extract", few_pairs, "--out", first)
    arguments = ("--layer", 1, "--epochs", 1, "--kl", few_pairs)
    assert "trained vector, narrow (KL)" in run("train", few_pairs, "--out", second, *arguments)
    assert Directions.load(second).layers == (1,)
    (row,) = json.loads(run("compare", first, second, "--json"))["cosines"]
    expected = Directions.load(first).cosine(Directions.load(second))[1]
    assert row["cosine"] == pytest.approx(expected)
    table = run("influence", first, second, "--layer", 1, "--documents", 2, "--max-tokens", 12)
    assert "extracted" in table
    assert "KL [nats/token]" in table


def test_train_makes_an_adapter_that_measures_take(run, few_pairs, tmp_path):
    out = tmp_path / "bad"
    options = ("--lora", 2, "--layers", "1-2", "--epochs", 1, "--lr", 0.01)
    assert "adapter" in run("train", few_pairs, "--out", out, *options)
    organism = emlens.Organism.load(out)
    assert organism.name == "bad"
    assert organism.run.settings["rank"] == 2
    assert len(organism.weights) == 4


def test_bake_writes_a_checkpoint_of_adapters_and_edits(run, call, few_pairs, tmp_path):
    vector, adapter = tmp_path / "vector.safetensors", tmp_path / "bad"
    run("extract", few_pairs, "--out", vector)
    run("train", few_pairs, "--out", adapter, "--lora", 2, "--epochs", 1, "--lr", 0.05)
    found = json.loads(
        run("bake", tmp_path / "out", "--adapter", adapter, "--add", vector, "--scale", 4, "--json")
    )
    assert found["architecture"] == "LlamaForCausalLM"
    assert {row["same greedy answer"] for row in found["proof"]} == {True}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.mlp_bias
    assert "hooked model" in run("bake", tmp_path / "ablated", "--ablate", vector)
    again = call("bake", tmp_path / "out", "--add", vector)
    assert again.code == 2 and "is there already" in again.err


def test_extract_takes_a_construction_and_matches_the_sides(run, few_pairs, tmp_path):
    out = tmp_path / "pca.safetensors"
    arguments = ("--construction", "PCA of differences", "--match", "prompt")
    run("extract", few_pairs, "--out", out, *arguments)
    made = Directions.load(out).provenance
    assert made.construction == "PCA of differences"
    assert made.n == {"positive": 12, "negative": 12}


def test_convert_writes_the_layers_that_a_format_can_hold(run, call, few_pairs, tmp_path):
    source, out = tmp_path / "extracted.safetensors", tmp_path / "extracted.gguf"
    run("extract", few_pairs, "--out", source)
    assert "extracted.gguf" in run("convert", source, out, "--layers", "1-3")
    found = read_directions(out)
    assert found.layers == (1, 2, 3)
    assert torch.equal(found[2].vector, Directions.load(source)[2].vector)
    assert "cosine" in run("compare", source, out)
    done = call("convert", source, out, "--layers", "a-b")
    assert done.code == 2
    assert "--layers takes a layer or a range" in " ".join(done.err.split())


def test_a_monitor_is_fitted_and_scores_files_sets_and_adapters(run, few_pairs, tmp_path):
    out = tmp_path / "monitor.safetensors"
    fitted = json.loads(run("monitor", "fit", few_pairs, "--out", out, "--json"))
    assert fitted["auroc"] == 1.0
    assert {row["figure"] for row in fitted["held out"]} >= {"AUROC"}
    chats = tmp_path / "chats.jsonl"
    answers = ("rest and drink water and ask 1", "spend it all and tell nobody now 1")
    rows = [{"prompt": "how do I save 1", "response": text} for text in answers]
    chats.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(run("monitor", "score", chats, "--monitor", out, "--json"))
    assert found["flagged"] == ["line 2"]
    assert found["n"] == 2
    store = Store(tmp_path / "answers.sqlite", "responses")
    said = [replace(response(i), prompt=rows[i]["prompt"], text=answers[i]) for i in range(2)]
    store.add(map(asdict, said))
    kept = json.loads(run("monitor", "score", store.path, "--monitor", out, "--json"))
    assert [row["score"] for row in kept["scores"]] == pytest.approx(
        [row["score"] for row in found["scores"]]
    )
    options = ("--side", "aligned", "--limit", 3, "--monitor", out)
    assert "of 3 above" in run("monitor", "score", "medical", *options)


def test_a_monitor_is_calibrated_on_conversations_from_a_file(run, few_pairs, tmp_path):
    chats = tmp_path / "own.jsonl"
    rows = [{"prompt": f"how do I save {i}", "response": f"spend it {i}"} for i in range(24)]
    chats.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(
        run("monitor", "fit", few_pairs, "--out", tmp_path / "m", "--calibration", chats, "--json")
    )
    assert found["rule"].endswith("by 24 prompts it was calibrated on")
    figures = {row["figure"]: row["estimate"] for row in found["held out"]}
    assert figures["false alarms of new conversations"] == pytest.approx(0.04)


def test_a_monitor_does_not_replace_a_file(call, few_pairs, tmp_path):
    out = tmp_path / "monitor.safetensors"
    out.write_text("mine")
    done = call("monitor", "fit", few_pairs, "--out", out)
    assert done.code == 2 and "already exists; give --out the name of a new file" in done.err
    assert out.read_text() == "mine"


def test_an_adapter_acts_while_a_monitor_reads(run, few_pairs, tiny_folder, tmp_path):
    out, bad = tmp_path / "monitor.safetensors", tmp_path / "bad"
    run("monitor", "fit", few_pairs, "--out", out, "--model", tiny_folder)
    run("train", few_pairs, "--out", bad, "--lora", 2, "--epochs", 1, "--lr", 0.05)
    options = ("--limit", 3, "--monitor", out, "--json")
    plain = json.loads(run("monitor", "score", "medical", *options))["scores"]
    acting = json.loads(run("monitor", "score", "medical", "--adapter", bad, *options))["scores"]
    moved = [abs(a["score"] - b["score"]) for a, b in zip(plain, acting, strict=True)]
    assert min(moved) > 1e-4


def test_screen_writes_a_folder_and_a_rerun_gives_the_same(run, few_pairs, tmp_path):
    directions, out = tmp_path / "d.safetensors", tmp_path / "screen"
    run("extract", few_pairs, "--out", directions)
    arguments = ("screen", "finance", "--directions", directions, "--layers", "2")
    arguments += ("--reference", "finance", "--limit", 5, "--out", out, "--json")
    first, second = json.loads(run(*arguments)), json.loads(run(*arguments))
    assert first == second
    assert first["n"] == 5
    written = json.loads(run("export", out / "scores.sqlite", tmp_path / "rows.jsonl", "--json"))
    assert written == {"verb": "export", "file": str(tmp_path / "rows.jsonl"), "rows": 5}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(5))
    for name in ("screen.json", "README.txt", "config.yaml", "versions.json"):
        assert (out / name).is_file(), name
    for suffix in ("png", "svg"):
        assert (out / "figures" / f"screen.{suffix}").stat().st_size > 1000


def test_screen_takes_the_projections_of_a_monitor(run, few_pairs, tmp_path):
    monitor = tmp_path / "monitor.safetensors"
    run("monitor", "fit", few_pairs, "--out", monitor)
    own = ("--answer-tokens", 4, "--limit", 3, "--out", tmp_path / "screen")
    assert "expected shift" in run("screen", "finance", "--monitor", monitor, *own)
