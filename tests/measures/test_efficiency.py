"""Efficiency of vectors and adapters against plain loops, PEFT itself and planted curves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from emlens import Add, Direction, efficiency
from emlens.hooked import Scaled, adapter_norms, response_losses
from emlens.hooked.load import ENGINES
from emlens.hooked.losses import Targets, token_losses
from emlens.measures import Efficiency
from emlens.text import pack, tokenize
from tests.support.adapters import peft_model
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.solutions import ADAPTERS, direction, several, with_adapters

DATA = conversations("bad", 4)


@pytest.fixture(scope="module", params=ENGINES)
def both(request, tmp_path_factory):
    """The model with adapters, on each engine."""
    return with_adapters(tmp_path_factory.mktemp("adapters"), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_adapters(tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def plain_sums(model, edits=()):
    """Summed loss of each conversation: a full pass for each batch, nothing shared."""
    sums = np.zeros(len(DATA))
    for batch in model.batches(DATA):
        targets = Targets.of(batch, "response")
        losses = token_losses(model, targets.predictors(model.hidden(batch, edits)), targets.ids)
        sums[list(batch.index)] = targets.per_row(losses, len(batch)).numpy()
    return sums


def mean_loss(model, edits=()):
    sums, counts = response_losses(model, pack(tokenize(DATA, model.tokenizer)), edits)
    return float(sums.sum() / counts.sum())


def curves(sums, norms=(0.0, 1.0, 3.0), **more):
    """An efficiency made by hand, of two conversations of 2 and 6 tokens."""
    return Efficiency(
        directions=tuple(sums),
        constructions=dict.fromkeys(sums, "given"),
        norms=norms,
        doses=(float("nan"),) * len(norms),
        sums=tuple(sums.values()),
        counts=(2.0, 6.0),
        own_norms=dict.fromkeys(sums, 1.0),
        **more,
    )


# -- vectors ----------------------------------------------------------------------------------


def test_efficiency_is_the_loss_at_each_norm_bit_by_bit(hooked_llama):
    directions = {"a": direction(hooked_llama, seed=1), "b": direction(hooked_llama, seed=2) * 2}
    found = efficiency(hooked_llama, DATA, directions, norms=[0, 1.5, 6])
    base = plain_sums(hooked_llama)
    for name, of_name in zip(found.directions, found.sums, strict=True):
        assert np.array_equal(of_name[0], base)
        for norm, sums in zip((1.5, 6.0), of_name[1:], strict=True):
            expected = plain_sums(hooked_llama, [Add(directions[name].scaled_to(norm))])
            assert np.array_equal(sums, expected)
    assert found.loss("a", 0).estimate == found.loss("b", 0).estimate
    assert found.doses == pytest.approx((0, 0.15, 0.6))
    assert found.own_norms == pytest.approx({"a": 3.0, "b": 6.0})
    gap = found.difference("a", "b", 6.0)
    assert gap.estimate == pytest.approx(
        found.loss("a", 6.0).estimate - found.loss("b", 6.0).estimate
    )


def test_the_default_grid_is_factors_of_the_mean_norm(hooked_llama):
    directions = {"a": direction(hooked_llama, size=2), "b": direction(hooked_llama, size=4)}
    found = efficiency(hooked_llama, DATA, directions, factors=(0, 1, 2))
    assert found.norms == pytest.approx((0, 3, 6))


def test_directions_of_several_layers_are_scaled_together(hooked_llama):
    many = several(hooked_llama)
    found = efficiency(hooked_llama, DATA, {"many": many}, norms=[1.0, 4.0])
    assert found.own_norms["many"] == pytest.approx(8**0.5)
    for norm in (1.0, 4.0):
        expected = mean_loss(hooked_llama, [Add(many * (norm / 8**0.5))])
        assert found.loss("many", norm).estimate == pytest.approx(expected, abs=1e-5)
    assert np.isnan(found.doses).all()


def test_own_factors_scale_each_by_its_own_norm(hooked_llama):
    x = {"a": direction(hooked_llama, seed=1, size=2), "b": several(hooked_llama)}
    found = efficiency(hooked_llama, DATA, x, match="own", factors=(0, 1, 1.5))
    assert list(found.sums[0][1]) == list(plain_sums(hooked_llama, [Add(x["a"])]))
    assert list(found.sums[1][1]) == list(plain_sums(hooked_llama, [Add(x["b"])]))
    assert found.norms_of("a") == pytest.approx((0, 2, 3))
    table = found.table()
    assert list(table["factor of own norm"]) == [0, 1, 1.5] * 2
    assert found.plot()[-1].get_xlabel() == "strength [share of own norm]"


# -- adapters ---------------------------------------------------------------------------------


def test_the_norm_of_an_adapter_is_that_of_the_product_it_adds(both):
    for name in ADAPTERS:
        layers, norms = both.lora_layers(name), adapter_norms(both, name)
        assert list(norms) == list(layers)
        for path, layer in layers.items():
            product = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
            assert norms[path] == pytest.approx(float(product.norm()), rel=1e-5)
    assert len(adapter_norms(both, "many")) == 6


def test_an_adapter_at_its_own_norm_is_reproduced_bit_by_bit(both):
    own = float(np.sqrt(np.square(list(adapter_norms(both, "many").values())).sum()))
    found = efficiency(both, DATA, {"many": "many"}, norms=[0, own], match="norm")
    assert found.own_norms["many"] == pytest.approx(own, rel=1e-12)
    base = plain_sums(both)
    with both.adapter("many"):
        untouched = plain_sums(both)
    assert found.sums[0].tolist() == [list(base), list(untouched)]
    factor = efficiency(both, DATA, {"many": "many"}, match="own", factors=(1.0,))
    assert list(factor.sums[0][0]) == list(untouched)
    assert not np.array_equal(base, untouched)
    assert both.active_adapter is None


def test_a_scaled_adapter_is_the_one_whose_b_is_scaled(both):
    plain = peft_model(tiny_model("llama"), seed=2, **ADAPTERS["many"])
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_B" in name:
                weight *= 0.4
    (batch,) = both.batches(DATA)
    with torch.no_grad():
        expected = plain(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
    with both.under(Scaled("many", 0.4)):
        logits = both.unembed(both.hidden(batch).flatten(0, 1)).view_as(expected)
    kept = batch.attention_mask.bool()
    assert torch.allclose(logits[kept], expected[kept], atol=2e-4)


def test_a_scaled_adapter_is_put_back_also_after_an_error(model):
    before = {path: layer.scaling["many"] for path, layer in model.lora_layers("many").items()}

    def now():
        return {path: layer.scaling["many"] for path, layer in model.lora_layers("many").items()}

    with pytest.raises(RuntimeError, match="inside"), model.under(Scaled("many", 0.3)):
        assert model.active_adapter == "many"
        with model.under(Scaled("many", 0.5)):
            assert now() == {path: scale * 0.5 for path, scale in before.items()}
        assert now() == {path: scale * 0.3 for path, scale in before.items()}
        raise RuntimeError("inside")
    assert now() == before
    assert model.active_adapter is None


def test_adapters_share_a_grid_of_norms_whose_unit_is_said(model):
    found = efficiency(model, DATA, {"a": "one", "b": "many"}, factors=(0.5, 1.0))
    mean = np.mean(list(found.own_norms.values()))
    assert found.norms == pytest.approx((0.5 * mean, mean))
    with model.under(Scaled("many", 0.5 * mean / found.own_norms["b"])):
        expected = mean_loss(model)
    assert found.loss("b", 0.5 * mean).estimate == pytest.approx(expected, abs=1e-5)
    assert found.kinds == {"a": "adapter", "b": "adapter"}
    assert found.plot()[-1].get_xlabel() == "norm of the adapter [||scale * B A||]"


# -- matched displacement ---------------------------------------------------------------------


def displaced(model, layer, edits=()):
    """The same, one conversation at a time."""
    moved, sizes = [], []
    adapter = edits if isinstance(edits, str) else None
    for conversation in DATA:
        (batch,) = pack(tokenize([conversation], model.tokenizer))
        base = model.residuals(batch, layer)[layer][batch.mask("response")]
        with model.adapter(adapter):
            changed = model.residuals(batch, layer, edits=() if adapter else edits)[layer]
        moved.append(changed[batch.mask("response")] - base)
        sizes.append(base.norm(dim=-1))
    square = torch.cat(moved).double().square().sum(1).mean()
    return float(square.sqrt() / torch.cat(sizes).median())


def test_a_vector_displaces_its_own_layer_by_its_norm(hooked_llama):
    x = direction(hooked_llama, layer=3)
    found = efficiency(
        hooked_llama, DATA, {"x": x}, match="displacement", displacements=(0, 0.1, 0.5)
    )
    own = displaced(hooked_llama, 3, [Add(x)])
    assert found.factors["x"] == pytest.approx((0, 0.1 / own, 0.5 / own), rel=0.02)
    assert found.displacements["x"] == pytest.approx((0, 0.1, 0.5), rel=0.01)
    assert found.place == "resid_post of layer 3"


def test_vectors_and_adapters_are_matched_by_what_they_displace(both):
    x = {"vector": direction(both), "many": "many", "layers": several(both)}
    found = efficiency(both, DATA, x, match="displacement", factors=(0, 0.5, 1), layer=-2)
    assert found.place == "resid_post of layer 2"
    for name in x:
        assert found.displacements[name] == pytest.approx(found.grid, rel=0.01)
        assert list(found.sums[found.directions.index(name)][0]) == list(plain_sums(both))
    own = [displaced(both, 2, [Add(x["vector"])]), displaced(both, 2, "many")]
    own.append(displaced(both, 2, [Add(x["layers"])]))
    middle = np.prod(own) ** (1 / 3)
    assert found.grid == pytest.approx((0, middle / 2, middle), rel=1e-4)
    factor = found.factors["vector"][2]
    again = displaced(both, 2, [Add(x["vector"] * factor)])
    assert found.displacements["vector"][2] == pytest.approx(again, rel=1e-4)
    with both.under(Scaled("many", found.factors["many"][1])):
        loss = mean_loss(both)
    assert found.loss("many", found.grid[1]).estimate == pytest.approx(loss, abs=1e-5)
    assert "displacement" in found.plot()[-1].get_xlabel()


def test_a_displacement_that_is_its_own_takes_the_solution_as_it_is(model):
    whole = efficiency(model, DATA, {"a": "one"}, match="displacement", factors=(1,))
    assert whole.factors["a"] == (1.0,)


# -- what a result says -----------------------------------------------------------------------


def test_the_area_is_the_mean_gap_of_trapezoids_paired_by_conversation():
    # per token: first 4, 3, 1; second 4, 2, 2, over norms 0, 1, 3
    found = curves({"a": ((8, 24), (6, 18), (2, 6)), "b": ((8, 24), (4, 12), (4, 12))})
    area = found.area("a", "b")
    assert area.estimate == pytest.approx(((0 + 1) / 2 * 1 + (1 - 1) / 2 * 2) / 3)
    # the gap is the same for every token, so that resampling conversations changes nothing
    assert (area.low, area.high) == pytest.approx((area.estimate,) * 2)
    assert found.area("b", "a").estimate == pytest.approx(-area.estimate)
    shuffled = curves(
        {"a": ((2, 6), (8, 24), (6, 18)), "b": ((4, 12), (8, 24), (4, 12))}, (3.0, 0.0, 1.0)
    )
    assert shuffled.area("a", "b").estimate == pytest.approx(area.estimate)
    with pytest.raises(ValueError, match="an area needs at least two points on the grid"):
        curves({"a": ((8, 24),), "b": ((8, 24),)}, (1.0,)).area("a", "b")


def test_an_area_that_conversations_disagree_on_has_an_interval():
    found = curves({"a": ((2, 6), (4, 6), (4, 6)), "b": ((2, 6), (2, 12), (2, 12))})
    area = found.area("a", "b")
    assert area.low < area.estimate < area.high
    assert not area.excludes_zero


def test_the_norm_at_a_loss_is_interpolated_and_nan_where_it_is_not_reached():
    found = curves({"a": ((8, 24), (6, 18), (2, 6)), "b": ((8, 24), (4, 12), (4, 12))})
    assert found.norm_at("a", 2.0) == pytest.approx(2.0)
    assert found.norm_at("b", 3.0) == pytest.approx(0.5)
    assert found.norm_at("b", 5.0) == 0
    assert np.isnan(found.norm_at("b", 1.5))
    # a grid that begins too high says nothing of the norms below it
    high = curves({"a": ((2, 6), (1, 3)), "b": ((2, 6), (1, 3))}, (0.5, 1.0))
    assert np.isnan(high.norm_at("a", 4.0))
    assert high.norm_at("a", 1.0) == pytest.approx(0.5)


def test_the_ratio_stands_beside_the_curve_with_its_remark():
    found = curves({"a": ((8, 24), (6, 18), (2, 6)), "b": ((8, 24), (4, 12), (4, 12))})
    ratios = found.table()["loss / norm^2"]
    assert np.isnan(ratios[0])
    assert list(ratios[1:3]) == pytest.approx([3.0, 1 / 9])
    assert "falls with the norm by itself" in found._repr_html_()
    axes = found.plot_ratio()
    assert axes.get_yscale() == "log"
    assert axes.get_title() or axes.get_title("left")


@pytest.mark.parametrize("match", ["norm", "own", "displacement"])
def test_results_survive_being_saved(model, tmp_path, match):
    x = {"a": "one", "b": "many"}
    found = efficiency(model, DATA, x, match=match, factors=(0, 1))
    again = Efficiency.load(found.save(tmp_path / "efficiency.json"))
    assert again.table().equals(found.table())
    assert again.area("a", "b") == found.area("a", "b")
    upper, lower = found.plot()
    assert upper.get_ylabel() == "loss on finetuning\ndata [nats/token]"
    assert lower.get_ylabel() == "difference from\na [nats/token]"
    gap = found.difference("b", "a", found.grid[-1])
    line = next(line for line in lower.lines if len(line.get_xdata()) == len(found.grid))
    assert line.get_ydata()[-1] == pytest.approx(gap.estimate)
    if match != "norm":
        assert again == found


def test_a_result_of_an_earlier_version_still_loads(hooked_llama, tmp_path):
    found = efficiency(hooked_llama, DATA, {"x": direction(hooked_llama)}, norms=[0, 1])
    path = found.save(tmp_path / "efficiency.json")
    record = json.loads(path.read_text())
    for later in ("kinds", "match", "levels", "factors", "displacements", "place"):
        del record[later]
    path.write_text(json.dumps(record))
    assert Efficiency.load(path).table().equals(found.table())
    del record["norms"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"missing \['norms'\]"):
        Efficiency.load(path)


# -- bad input --------------------------------------------------------------------------------

WIDE = Direction.of(torch.ones(7), 1)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "no directions were given"),
        ({"base": "one"}, {}, "'base' is the model without any solution"),
        (
            {"x": torch.ones(32)},
            {},
            r"directions\['x'\] must be a Directions, not a Tensor of shape \[32\]; make one",
        ),
        ({"x": Direction.of(torch.zeros(32), 1)}, {}, "direction 'x' is zero"),
        ({"x": WIDE}, {}, "direction 'x' has width 7, but tiny-llama has d_model 32"),
        (
            {"x": Direction.of(torch.ones(32), 9)},
            {},
            "direction 'x' is at layer 9, but tiny-llama has layers 0 to 3",
        ),
        ({"x": "nobody"}, {}, "there is no adapter 'nobody'; the adapters are one, other, many"),
        ({"x": "one"}, {"norms": [-1]}, r"norms\[0\] must be at least 0, not -1"),
        ({"x": "one"}, {"norms": [float("nan")]}, r"norms\[\d\] must be a finite number"),
        ({"x": "one"}, {"norms": [1, float("inf")]}, r"norms\[\d\] must be a finite number"),
        ({"x": "one"}, {"norms": []}, "no norms were given"),
        (
            {"x": "one"},
            {"match": "own", "factors": [-2]},
            r"factors\[0\] must be at least 0, not -2",
        ),
        (
            {"x": "one"},
            {"match": "loss"},
            "unknown match 'loss'; choose 'norm', 'own' or 'displacement'",
        ),
        ({"x": "one"}, {"match": "own", "norms": [1]}, 'norms are a grid for match="norm"'),
        ({"x": "one"}, {"layer": 1}, 'a layer is given, but it is for match="displacement"'),
        ({"x": "one"}, {"displacements": [1]}, "displacements are given, but they are for"),
        ({"x": "one"}, {"match": "displacement", "layer": 0}, "'x' displaces nothing at"),
        (
            {"x": "one"},
            {"match": "displacement", "displacements": [-0.1]},
            r"displacements\[0\] must be at least 0, not -0.1",
        ),
        (
            {"v": Direction.of(torch.ones(32), 1), "x": "one"},
            {},
            "'v' is a vector and 'x' an adapter: their norms have different units",
        ),
    ],
)
def test_bad_input_is_refused(model, given, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        efficiency(model, DATA, given, **options)


def test_directions_that_are_not_finite_cannot_be_made():
    with pytest.raises(ValueError, match=r"1 value\(s\) that are not finite"):
        Direction.of(torch.tensor([1.0, float("nan")]), 1)


def test_a_displacement_out_of_reach_is_refused(model, monkeypatch):
    monkeypatch.setattr("emlens.measures.displacement.LARGEST_FACTOR", 2.0)
    with pytest.raises(ValueError, match="'x' displaces the residual stream by .* was requested"):
        efficiency(model, DATA, {"x": "one"}, match="displacement", displacements=[1e6])


def test_an_adapter_in_force_is_no_base_to_compare_adapters_with(model):
    with model.adapter("other"):
        with pytest.raises(ValueError, match=r"adapter 'other' is in force.*model.adapter\(None\)"):
            efficiency(model, DATA, {"x": "one"}, factors=(1,))
        with model.adapter(None):
            inside = efficiency(model, DATA, {"x": "one"}, factors=(1,))
    outside = efficiency(model, DATA, {"x": "one"}, factors=(1,))
    assert np.array_equal(inside.sums, outside.sums)


def test_an_adapter_that_is_damaged_or_no_plain_lora_is_refused(tmp_path):
    model = with_adapters(tmp_path)
    (layer,) = model.lora_layers("one").values()
    refused = pytest.raises(
        ValueError, match="the factor on adapter 'one' must be a finite number, not nan"
    )
    with refused, model.under(Scaled("one", float("nan"))):
        pass
    layer.use_dora["one"] = True
    with pytest.raises(ValueError, match="adapter 'one' is not plain LoRA at model.layers.2"):
        adapter_norms(model, "one")
    layer.use_dora["one"] = False
    with torch.no_grad():
        layer.lora_B["one"].weight.zero_()
    with pytest.raises(ValueError, match="adapter 'one' changes nothing"):
        efficiency(model, DATA, {"x": "one"})
    with torch.no_grad():
        layer.lora_B["one"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"adapter 'one' has weights at .* that are not finite"):
        efficiency(model, DATA, {"x": "one"})
