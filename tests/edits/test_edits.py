"""Edits: pure arithmetic, what they refuse, and that they survive being written down."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch

from emlens import Ablate, Add, Clamp, Direction, Directions
from emlens.directions import Provenance
from emlens.edits import Shift, to_vllm_lens
from emlens.edits.edits import ablate_delta, add_delta, clamp_delta, edit_from_dict
from emlens.hooked import Edit


def residual(*shape, seed=0):
    return torch.randn(*(shape or (3, 5, 8)), generator=torch.Generator().manual_seed(seed))


def direction(seed=1, layer=2, **kwargs):
    return Direction.of(residual(8, seed=seed) * 3, layer, **kwargs)


def test_ablation_leaves_no_component_and_is_idempotent():
    x, edit = residual(seed=4) * 10, Ablate(direction())
    unit = direction().unit().vector
    once = x + edit.delta(x, 2)
    assert (once @ unit).abs().max() <= 1e-5
    twice = once + edit.delta(once, 2)
    assert torch.allclose(once, twice, atol=1e-5)
    rest = x - (x @ unit)[..., None] * unit
    assert torch.allclose(once, rest, atol=1e-5)


def test_ablation_ignores_the_length_of_the_direction():
    x = residual()
    assert torch.allclose(
        Ablate(direction()).delta(x, 2), Ablate(direction() * 7).delta(x, 2), atol=1e-6
    )


def test_clamp_sets_the_projection_to_its_value():
    x, unit = residual(), direction().unit().vector
    clamped = x + Clamp(direction(), value=2.5).delta(x, 2)
    assert torch.allclose(clamped @ unit, torch.full((3, 5), 2.5), atol=1e-5)


def test_add_is_linear_in_scale_and_dose_is_a_share_of_the_residual_norm():
    x, d = residual(), direction(residual_norm=40.0)
    assert torch.allclose(Add(d, scale=-2).delta(x, 2), -2 * Add(d).delta(x, 2))
    dosed = Add(d, dose=0.25).delta(x, 2)
    assert torch.allclose(dosed.norm(dim=-1), torch.full((3, 5), 10.0), atol=1e-4)
    assert torch.allclose(dosed[0, 0] / 10, d.unit().vector, atol=1e-6)


def test_vectors_may_differ_by_row():
    x, vectors = residual(), residual(3, 8, seed=9)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    for i in range(3):
        assert torch.equal(add_delta(x, vectors)[i], add_delta(x[i : i + 1], vectors[i])[0])
        one = ablate_delta(x[i : i + 1], units[i])[0]
        assert torch.allclose(ablate_delta(x, units)[i], one, atol=1e-6)
        one = clamp_delta(x[i : i + 1], units[i], 1.5)[0]
        assert torch.allclose(clamp_delta(x, units, 1.5)[i], one, atol=1e-6)


def test_dot_products_are_taken_in_fp32_for_half_precision_residuals():
    x = (residual() * 300).to(torch.bfloat16)
    exact = ablate_delta(x.float(), direction().unit().vector)
    assert torch.equal(Ablate(direction()).delta(x, 2), exact)


def test_a_single_direction_can_act_at_other_layers_and_sites():
    edit = Ablate(direction(), layers=range(4), site="attn_out")
    assert edit.layers == (0, 1, 2, 3)
    assert edit.site == "attn_out"
    assert torch.equal(edit.delta(residual(), 0), Ablate(direction()).delta(residual(), 2))


@pytest.mark.parametrize(
    "edit",
    [
        Add(direction(residual_norm=3.0), dose=0.5, where="response"),
        Add(direction(), scale=-1.5, layers=(1, 2)),
        Ablate(direction(), site="mlp_out", where="prompt"),
        Clamp(direction(), value=0.25),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_edits_survive_being_written_as_json(edit):
    again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert type(again) is type(edit)
    assert (again.layers, again.site, again.where) == (edit.layers, edit.site, edit.where)
    assert torch.equal(again.delta(residual(), 2), edit.delta(residual(), 2))
    assert again.direction.provenance == edit.direction.provenance


def test_every_edit_fits_the_protocol():
    shift = Shift(torch.zeros(8), 1)
    assert all(isinstance(e, Edit) for e in (Add(direction()), Ablate(direction()), shift))
    assert shift.layers == (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Add(torch.ones(8)),
            "direction of Add must be a Direction or Directions, not a Tensor",
        ),
        (lambda: Add(direction(), scale=1, dose=1), "scale or dose, not both"),
        (lambda: Add(direction(), dose=1), "a dose at layer 2 needs the median residual norm"),
        (lambda: Add(direction(), where="answer"), "unknown where 'answer'"),
        (lambda: Add(direction(), site="middle"), "unknown site 'middle'"),
        (lambda: Ablate(Direction.of(torch.zeros(8), 0)), "the vector of layer 0 is zero"),
        (
            lambda: Ablate(
                Directions({0: torch.ones(8), 1: torch.ones(8)}, "resid_post", Provenance("x")),
                layers=[2],
            ),
            r"Ablate at layer 2: the directions have layers \(0, 1\); pick one",
        ),
        (lambda: edit_from_dict({"edit": "melt"}), "unknown edit 'melt'; choose 'add'"),
    ],
)
def test_bad_edits_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# -- vLLM-Lens --------------------------------------------------------------------------------


def received(body: dict) -> list[dict]:
    """What a server of vLLM-Lens makes of a request: its transport without compression."""
    sent = json.loads(body["vllm_xargs"]["apply_steering_vectors"])
    for one in sent:
        found = one.pop("activations")
        raw = np.frombuffer(base64.b64decode(found["data"]), np.dtype(found["dtype"]))
        one["vectors"] = torch.from_numpy(raw.reshape(found["shape"]).copy())
    return sent


def test_vllm_lens_is_sent_the_vectors_as_they_are_added():
    dosed = Add(direction(residual_norm=40.0), dose=0.25)
    scaled = Add(direction(seed=3), scale=-2.0, layers=[1, 3])
    first, second = received(to_vllm_lens([dosed, scaled]))
    assert (first["layer_indices"], second["layer_indices"]) == ([2], [1, 3])
    assert torch.allclose(first["vectors"].norm(dim=1), torch.tensor([10.0]))
    assert torch.equal(second["vectors"], torch.stack([direction(seed=3).vector * -2.0] * 2))
    for one in (first, second):
        assert one["scale"] == 1.0 and one["norm_match"] is False
        assert set(one) == {"vectors", "layer_indices", "scale", "norm_match"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Ablate(direction()), "vLLM-Lens adds vectors and cannot do Ablate; emlens.bake puts"),
        (Clamp(direction()), "cannot do Clamp"),
        (Shift(residual(8), 2), "cannot do Shift"),
        (Add(direction(), site="mlp_out"), "vLLM-Lens adds at resid_post, not at mlp_out"),
        (Add(direction(), where="response"), "not at where='response'"),
        ([], "edits is empty"),
    ],
)
def test_what_vllm_lens_cannot_do_is_refused_by_name(edit, message):
    with pytest.raises(ValueError, match=message):
        to_vllm_lens(edit)
