"""Objects of steering-vectors and repeng, by stand-ins with their fields."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from emlens.directions import (
    Direction,
    Directions,
    Provenance,
    from_repeng,
    from_steering_vectors,
    read_directions,
    to_repeng,
    to_steering_vectors,
    write_directions,
)

D = 6


@dataclass
class SteeringVector:
    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    model_type: str
    directions: dict[int, np.ndarray]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Both libraries, as far as they are used."""
    theirs = {"steering_vectors": SteeringVector, "repeng": ControlVector}
    for name, kind in theirs.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{kind.__name__: kind}))


def some(layers=(0, 2), site="resid_post", **settings) -> Directions:
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(D, generator=generator) for layer in layers}
    made = Provenance("mean-diff", settings=settings)
    return (Direction if len(layers) == 1 else Directions)(vectors, site, made)


def same(first: Directions, second: Directions) -> None:
    assert (first.site, first.layers) == (second.site, second.layers)
    assert type(first) is type(second)
    assert all(torch.equal(first.vectors[layer], second.vectors[layer]) for layer in first)


# -- steering-vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "kind"),
    [("resid_post", "decoder_block"), ("mlp_out", "mlp"), ("attn_out", "self_attn")],
)
@pytest.mark.parametrize("layers", [(0, 2), (3,)])
def test_a_steering_vector_keeps_its_layers_and_site_both_ways(site, kind, layers):
    written = some(layers, site)
    theirs = to_steering_vectors(written)
    assert isinstance(theirs, SteeringVector)
    assert theirs.layer_type == kind
    assert list(theirs.layer_activations) == list(layers)
    back = from_steering_vectors(theirs)
    same(back, written)
    assert back.provenance.construction == "SteeringVector"
    assert back.provenance.settings == {"layer_type": kind}


def test_a_steering_vector_shares_no_memory_with_the_directions():
    written = some()
    theirs = to_steering_vectors(written)
    before = written.vectors[0].clone()
    theirs.layer_activations[0].zero_()
    assert torch.equal(written.vectors[0], before)


def test_layers_counted_from_the_end_need_the_number_of_layers():
    theirs = SteeringVector({-1: torch.ones(D), 0: torch.zeros(D)})
    with pytest.raises(ValueError, match="has layer -1, counted from the end; .* with n_layers="):
        from_steering_vectors(theirs)
    found = from_steering_vectors(theirs, n_layers=4)
    assert found.layers == (0, 3)
    assert bool(found.vectors[3].all())
    with pytest.raises(ValueError, match=r"layer 0 is not one of 1, or occurs twice"):
        from_steering_vectors(theirs, n_layers=1)
    with pytest.raises(ValueError, match="layer 4 is not one of 4"):
        from_steering_vectors(SteeringVector({4: torch.ones(D)}), n_layers=4)


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)])
def test_vectors_of_any_precision_and_leading_ones_become_fp32(shape):
    values = torch.arange(D).to(torch.bfloat16)
    weight = torch.nn.Parameter(values.reshape(shape))
    found = from_steering_vectors(SteeringVector({1: weight}))
    assert torch.equal(found[1].vector, torch.arange(D).float())
    assert not found[1].vector.requires_grad


@pytest.mark.parametrize(
    ("theirs", "error", "message"),
    [
        (
            SteeringVector({1: torch.ones(D)}, "input_layernorm"),
            ValueError,
            "layer type 'input_layernorm' acts on what a module reads.* decoder_block, mlp",
        ),
        (
            SteeringVector({1: torch.full((D,), float("nan"))}),
            ValueError,
            r"SteeringVector: the vector of layer 1 has 6 value\(s\) that are not finite",
        ),
        (
            SteeringVector({1: torch.ones(D), 2: torch.ones(D + 1)}),
            ValueError,
            r"SteeringVector: every layer needs one vector of the same width",
        ),
        (
            SteeringVector({1: torch.ones(2, D)}),
            ValueError,
            r"shape \[2, 6\] at layer 1; one vector",
        ),
        (SteeringVector({1: torch.ones(())}), ValueError, r"shape \[\] at layer 1"),
        (SteeringVector({}), ValueError, "SteeringVector: directions need at least one layer"),
        (
            ControlVector("llama", {1: np.ones(D)}),
            TypeError,
            "object with layer_activations .* and layer_type, found ControlVector",
        ),
        (torch.ones(D), TypeError, "found Tensor"),
    ],
)
def test_what_is_no_steering_vector_of_the_stream_is_refused(theirs, error, message):
    with pytest.raises(error, match=message):
        from_steering_vectors(theirs)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid"])
def test_a_steering_vector_cannot_act_where_the_library_does_not(site):
    with pytest.raises(ValueError, match=f"cannot act at {site}; it acts at resid_post, mlp_out"):
        to_steering_vectors(some(site=site))


def test_a_steering_vector_would_not_act_at_a_norm():
    made = Provenance("mean-diff", model="google/gemma-2-2b-it")
    with pytest.raises(ValueError, match=r"gemma-2-2b-it norm before .* not act at attn_out"):
        to_steering_vectors(Direction({1: torch.ones(D)}, "attn_out", made))
    theirs = to_steering_vectors(Direction({1: torch.ones(D)}, "resid_post", made))
    assert theirs.layer_type == "decoder_block"


# -- repeng --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 2), (3,)])
def test_a_control_vector_keeps_its_layers_both_ways(layers):
    written = some(layers)
    theirs = to_repeng(written, "llama")
    assert isinstance(theirs, ControlVector)
    assert theirs.model_type == "llama"
    for layer in layers:
        assert theirs.directions[layer].dtype == np.float32
        assert not np.shares_memory(theirs.directions[layer], written.vectors[layer].numpy())
    back = from_repeng(theirs)
    same(back, written)
    assert back.provenance.construction == "ControlVector"
    assert to_repeng(back).model_type == "llama"


def test_a_control_vector_from_a_file_is_read_without_a_warning():
    values = np.arange(D, dtype="float64")
    values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = from_repeng(ControlVector("llama", {1: values}))
    assert torch.equal(found[1].vector, torch.arange(D).float())


def test_the_model_type_is_the_hint_in_a_gguf_file(tmp_path):
    found = from_repeng(ControlVector("qwen2", {1: np.ones(D, "float32")}))
    read = read_directions(write_directions(found, tmp_path / "v.gguf"))
    assert to_repeng(read).model_type == "qwen2"


@pytest.mark.parametrize(
    ("theirs", "error", "message"),
    [
        (
            ControlVector("llama", {-1: np.ones(D)}),
            ValueError,
            r"has layers \[-1\]; repeng applies those from 0 on only",
        ),
        (
            ControlVector("llama", {1: np.ones(D), 2: np.ones(D + 1)}),
            ValueError,
            "ControlVector: every layer needs one vector of the same width",
        ),
        (
            ControlVector("llama", {1: np.full(D, np.inf)}),
            ValueError,
            r"ControlVector: the vector of layer 1 has 6 value\(s\) that are not finite",
        ),
        (some(), TypeError, "object with directions .* and model_type, found Directions"),
    ],
)
def test_what_is_no_control_vector_is_refused(theirs, error, message):
    with pytest.raises(error, match=message):
        from_repeng(theirs)


def test_a_control_vector_needs_the_output_of_blocks_and_a_model_type():
    with pytest.raises(ValueError, match="acts at resid_post.* are at mlp_out and would act elsew"):
        to_repeng(some(site="mlp_out"), "llama")
    with pytest.raises(ValueError, match=r"needs a model type; give model\.config\.model_type"):
        to_repeng(some())


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    monkeypatch.setitem(sys.modules, "repeng", None)
    with pytest.raises(ModuleNotFoundError, match=r"library steering-vectors .*; pip install ste"):
        to_steering_vectors(some())
    with pytest.raises(ModuleNotFoundError, match=r"library repeng .*; pip install repeng"):
        to_repeng(some(), "llama")
