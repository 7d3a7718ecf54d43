"""PEFT's adapter folders as directions, against the adapter on its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import emlens
from emlens.directions import (
    Direction,
    adapter_directions,
    adapter_vectors,
    read_checkpoints,
    read_directions,
)
from emlens.hooked.architecture import norms_what_it_adds, place_of
from tests.support.adapters import peft_model, saved
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

WEIGHTS = "adapter_model.safetensors"


def rewritten(folder: Path, **changed) -> Path:
    """The folder with keys of its config changed."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


@pytest.mark.parametrize(
    ("family", "settings", "call"),
    [
        ("llama", {}, {}),
        ("llama", {"use_rslora": True, "r": 4, "lora_alpha": 8}, {"column": 3}),
        ("llama", {"r": 4, "lora_alpha": 8}, {"column": 0}),
        ("llama", {"target_modules": ["o_proj", "q_proj"]}, {}),
        ("llama", {"target_modules": ["o_proj", "down_proj"]}, {"site": "attn_out"}),
        (
            "llama",
            {
                "rank_pattern": {r"layers\.2\.mlp\.down_proj": 2},
                "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 5},
                "use_rslora": True,
            },
            {"column": 0},
        ),
        ("gpt2", {"target_modules": ["mlp.c_proj"], "fan_in_fan_out": True}, {}),
        ("gpt_neox", {"target_modules": ["dense"]}, {}),
        ("gpt_neox", {"target_modules": ["dense_4h_to_h"]}, {}),
    ],
)
def test_a_folder_gives_the_vectors_of_the_adapter_on_its_model(tmp_path, family, settings, call):
    module = tiny_model(family)
    folder = saved(tmp_path / "mine", module, **settings)
    rewritten(folder, base_model_name_or_path="org/base", revision="main")
    wrapped = emlens.wrap(peft_model(module, **settings), chatml_tokenizer(), name="tiny")
    expected = adapter_vectors(wrapped, "default", **call)
    found = adapter_directions(folder, **call)
    assert (found.site, found.layers) == (expected.site, expected.layers)
    assert all(torch.equal(found.vectors[n], expected.vectors[n]) for n in found)
    assert found.provenance.settings == expected.provenance.settings
    assert (found.provenance.construction, found.provenance.adapter) == ("LoRA B", "mine")
    assert (found.provenance.model, found.provenance.revision) == ("org/base", "main")


@pytest.mark.parametrize("rslora", [True, False])
def test_row_times_vector_is_what_the_adapter_adds_in_the_model(tmp_path, rslora):
    module = tiny_model("llama")
    settings = {"layers_to_transform": [2], "lora_alpha": 7, "use_rslora": rslora}
    folder = saved(tmp_path / "mine", module, **settings)
    direction, weights = adapter_directions(folder), load_file(folder / WEIGHTS)
    (row,) = next(value for key, value in weights.items() if "lora_A" in key)
    assert isinstance(direction, Direction)
    tuned = peft_model(module, **settings)
    down: Any = tuned.get_base_model().get_submodule("model.layers.2.mlp.down_proj")
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        added = down(hidden) - down.base_layer(hidden)
    assert torch.allclose(added, (hidden @ row)[:, None] * direction.vector, atol=1e-4)
    assert float(added.abs().max()) > 0.1


def test_a_folder_of_one_column_is_read_as_any_other_file(tmp_path):
    folder = saved(tmp_path / "mine", tiny_model("llama"), layers_to_transform=[1])
    expected = adapter_directions(folder)
    for read in (
        read_directions(folder),
        read_directions(folder, "peft"),
        read_directions(folder / WEIGHTS),
        read_directions(tmp_path),
    ):
        assert torch.equal(read[1].vector, expected[1].vector)
        assert read.provenance == expected.provenance
    with pytest.raises(ValueError, match="of width 32, but the model's is 5120"):
        read_directions(folder, d_model=5120)


def test_the_adapters_of_checkpoints_are_read_by_step(tmp_path):
    for seed, step in ((1, 10), (2, 5)):
        saved(tmp_path / f"checkpoints/checkpoint-{step}", tiny_model("llama"), seed)
    found = read_checkpoints(tmp_path)
    assert list(found) == [5, 10]
    expected = adapter_directions(tmp_path / "checkpoints/checkpoint-10")
    assert torch.equal(found[10].vectors[3], expected.vectors[3])
    assert found[10].provenance.n == {"steps": 10}


@pytest.mark.parametrize(
    ("family", "settings", "call", "message"),
    [
        ("llama", {"r": 2}, {}, r"'mine' has rank 2 at .*, so B has 2 columns; .* with column="),
        ("llama", {"r": 2}, {"column": 2}, "there is no column 2"),
        ("llama", {"target_modules": ["q_proj"]}, {}, "not write into the residual stream dire"),
        (
            "llama",
            {"target_modules": ["o_proj", "down_proj"]},
            {},
            "writes at mlp_out and attn_out; name one with site=",
        ),
        ("llama", {}, {"site": "attn_out"}, "writes at mlp_out, not at attn_out"),
        ("llama", {"use_dora": True}, {}, "is DoRA at"),
        ("llama", {"lora_bias": True}, {}, "has a bias at"),
    ],
)
def test_what_is_no_vector_of_the_stream_is_refused(tmp_path, family, settings, call, message):
    folder = saved(tmp_path / "mine", tiny_model(family), **settings)
    with pytest.raises(ValueError, match=message):
        adapter_directions(folder, **call)


def test_an_adapter_of_a_base_that_norms_what_it_adds_is_refused(tmp_path):
    folder = saved(tmp_path / "mine", tiny_model("gemma2"))
    rewritten(folder, base_model_name_or_path="google/gemma-2-2b-it")
    with pytest.raises(ValueError, match="down_proj is read by .*, or normed before it is added"):
        adapter_directions(folder)


def weights(change):
    """A change to every tensor that an adapter's file holds; None leaves one out."""

    def apply(folder: Path) -> None:
        kept = {k: change(k, v) for k, v in load_file(folder / WEIGHTS).items()}
        save_file({k: v for k, v in kept.items() if v is not None}, folder / WEIGHTS)

    return apply


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            truncated,
            ValueError,
            "'mine': its weights in .* are not readable .* downloaded completely",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, "'mine': found none at"),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            FileNotFoundError,
            "has no adapter_config.json",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            ValueError,
            r"'mine': .*adapter_config.json is not valid JSON",
        ),
        (lambda folder: rewritten(folder, r=3), ValueError, r"A is \[1, 64\] .* says rank 3"),
        (
            weights(lambda _, v: v * float("nan")),
            ValueError,
            r"'mine' has weights at .* that are not finite",
        ),
        (weights(lambda _, v: v * 0), ValueError, "'mine' changes nothing: A or B is zero"),
        (weights(lambda k, v: v if "lora_A" in k else None), ValueError, "has only lora_A at"),
        (weights(lambda k, v: None), ValueError, "has no LoRA weights; its tensors are none"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(tmp_path, damage, error, message):
    folder = saved(tmp_path / "mine", tiny_model("llama"))
    damage(folder)
    with pytest.raises(error, match=message):
        adapter_directions(folder)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    folder = saved(tmp_path / "mine", tiny_model("llama"))
    rewritten(folder, peft_type="IA3")
    with pytest.raises(ValueError, match="'mine' is of the kind IA3; emlens runs LoRA adapters"):
        adapter_directions(folder)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.24.mlp.down_proj", (24, "mlp_out")),
        ("model.layers.0.self_attn.o_proj", (0, "attn_out")),
        ("model.language_model.layers.3.mlp.down_proj", (3, "mlp_out")),
        ("transformer.h.11.attn.c_proj", (11, "attn_out")),
        ("gpt_neox.layers.2.attention.dense", (2, "attn_out")),
        ("model.layers.1.block_sparse_moe.experts.0.w2", (1, "mlp_out")),
        ("lm_head", None),
        ("model.embed_tokens", None),
        ("model.visual.layers.3.mlp.down_proj", None),
    ],
)
def test_the_place_of_a_module_is_known_from_its_name(path, place):
    assert place_of(path) == place


@pytest.mark.parametrize(
    ("name", "normed"),
    [
        ("google/gemma-2-2b-it", True),
        ("google/gemma-3-27b-it", True),
        ("tiny-gemma2", True),
        ("google/medgemma-4b-it", True),
        ("google/shieldgemma-9b", True),
        ("allenai/OLMo-2-1124-7B", True),
        ("allenai/Olmo-3-7B-Think", True),
        ("LGAI-EXAONE/EXAONE-4.0-32B", True),
        ("allenai/FlexOlmo-7x7B-1T", True),
        ("google/gemma-2b", False),
        ("google/gemma-7b-it", False),
        ("allenai/OLMo-7B", False),
        ("allenai/OLMoE-1B-7B-0924", False),
        ("LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct", False),
        ("unsloth/Qwen2.5-14B-Instruct", False),
    ],
)
def test_models_that_norm_what_they_add_are_known_by_name(name, normed):
    assert norms_what_it_adds(name) is normed
