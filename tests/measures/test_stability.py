"""Stability of vectors and adapters against plain loops, PEFT itself and planted curves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from emlens import Add, Direction, stability
from emlens.directions import Directions, Provenance, cosine
from emlens.hooked import Noisy, response_losses
from emlens.hooked.load import ENGINES
from emlens.measures import Stability
from emlens.measures.stability import perturbed
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


def mean_loss(model, edits=()):
    """The mean over full passes, nothing shared."""
    sums, counts = response_losses(model, model.batches(DATA), edits)
    return float(sums.numpy().sum() / counts.numpy().sum())


def factors(model, name):
    """Copies of `A` and `B` at every module of an adapter."""
    return {
        (path, part): getattr(layer, f"lora_{part}")[name].weight.detach().clone()
        for path, layer in model.lora_layers(name).items()
        for part in ("A", "B")
    }


def planted(increases, gain=2.0, epsilons=(0.25, 0.5, 1.0)):
    """A stability made by hand from increases in percent, `{name: [epsilons][seeds]}`."""
    seeds = len(next(iter(increases.values()))[0])
    return Stability(
        directions=tuple(increases),
        constructions=dict.fromkeys(increases, "given"),
        norms=dict.fromkeys(increases, 1.0),
        epsilons=epsilons,
        seeds=tuple(range(seeds)),
        base_loss=3.0,
        losses=dict.fromkeys(increases, 3.0 - gain),
        perturbed=tuple(
            tuple(tuple(3.0 - gain + gain * p / 100 for p in row) for row in rows)
            for rows in increases.values()
        ),
    )


# -- vectors ----------------------------------------------------------------------------------


def test_noise_keeps_the_norm_and_turns_by_the_angle(hooked_llama):
    x = direction(hooked_llama)
    for epsilon in (0.0, 0.3, 1.0):
        y = perturbed(x, epsilon, seed=5)
        assert y.norm == pytest.approx(x.norm, rel=1e-6)
        assert cosine(x.vector, y.vector) == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-6)
    assert not torch.equal(perturbed(x, 1.0, 5).vector, perturbed(x, 1.0, 6).vector)


def test_noise_is_that_of_its_formula_bit_by_bit(hooked_llama):
    x = direction(hooked_llama)
    long = x.vector.double()
    noise = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise = noise - (noise @ long) / (long @ long) * long
    noise = noise / noise.norm() * long.norm()
    expected = ((1 - 0.3**2) ** 0.5 * long + 0.3 * noise).float()
    assert torch.equal(perturbed(x, 0.3, 5).vector, expected)


def test_noise_on_several_layers_keeps_the_norm_of_each(hooked_llama):
    x = several(hooked_llama)
    y = perturbed(x, 0.6, seed=1)
    for layer in x.layers:
        assert y.norms[layer] == pytest.approx(x.norms[layer], rel=1e-6)
        assert cosine(x.vectors[layer], y.vectors[layer]) == pytest.approx(0.8, abs=1e-6)


def test_stability_is_the_relative_loss_increase_bit_by_bit(hooked_llama):
    x = {"x": direction(hooked_llama), "-x": -direction(hooked_llama), "two": several(hooked_llama)}
    found = stability(hooked_llama, DATA, x, epsilons=(0.0, 0.5), seeds=2)
    base = mean_loss(hooked_llama)
    assert found.base_loss == base
    for name, one in x.items():
        own = mean_loss(hooked_llama, [Add(one)])
        noisy = [mean_loss(hooked_llama, [Add(perturbed(one, 0.5, seed))]) for seed in (0, 1)]
        assert found.losses[name] == own
        assert found.perturbed[found.directions.index(name)][1].tolist() == list(noisy)
        expected = [100 * (value - own) / (base - own) for value in noisy]
        if base > own:
            assert np.allclose(found.increase(name)[1], expected)
            assert np.allclose(found.increase(name)[0], 0, atol=0.1)
        else:
            assert np.isnan(found.increase(name)).all()
    # one of two opposite directions lowers the loss to first order
    assert max(found.gain("x"), found.gain("-x")) > 0


# -- shrinking, added noise, angles -----------------------------------------------------------


def test_shrinking_alone_is_measured_beside_the_noise(model):
    solutions = {"x": direction(model), "many": "many"}
    found = stability(model, DATA, solutions, epsilons=(0.6, 1.0), seeds=1)
    with model.under(None):
        vector = mean_loss(model, [Add(direction(model) * 0.8)])
        base = mean_loss(model)
    assert found.shrunk[0] == pytest.approx([vector, base], abs=1e-6)
    kept = factors(model, "many")
    layers = model.lora_layers("many")
    with torch.no_grad():
        for (path, part), weight in kept.items():
            getattr(layers[path], f"lora_{part}")["many"].weight.copy_(0.8 * weight)
    with model.adapter("many"):
        smaller = mean_loss(model)
    with torch.no_grad():
        for (path, part), weight in kept.items():
            getattr(layers[path], f"lora_{part}")["many"].weight.copy_(weight)
    assert found.shrunk[1] == pytest.approx([smaller, base], abs=1e-5)
    for name in solutions:
        if found.gain(name) > 0:
            expected = 100 * (found.shrunk[found.directions.index(name)] - found.losses[name])
            assert found.shrinking(name) == pytest.approx(expected / found.gain(name))
    assert "shrinking alone [%]" in found.table()


def test_added_noise_does_not_shrink(hooked_llama):
    x = direction(hooked_llama)
    found = stability(hooked_llama, DATA, {"x": x}, epsilons=(0.5,), seeds=2, noise="added")
    long = x.vector.double()
    for draw in (0, 1):
        noise = torch.randn(32, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
        noise = noise - (noise @ long) / (long @ long) * long
        moved = Direction.of((long + 0.5 * noise / noise.norm() * long.norm()).float(), 1)
        expected = mean_loss(hooked_llama, [Add(moved)])
        assert found.perturbed[0, 0, draw] == pytest.approx(expected, abs=1e-6)
    assert found.noise == "added" and not found.shrunk.size
    assert np.nan_to_num(found.shrinking("x")).tolist() == [0]
    assert found.angles[0, 0] == pytest.approx(np.degrees(np.arctan(0.5)), abs=1e-3)


def test_an_epsilon_turns_an_adapter_further_than_a_vector(model):
    solutions = {"x": direction(model), "two": several(model), "many": "many"}
    found = stability(model, DATA, solutions, epsilons=(0.3, 0.8), seeds=2)
    for place, epsilon in enumerate((0.3, 0.8)):
        angle = np.degrees(np.arccos((1 - epsilon**2) ** 0.5))
        assert found.angles[:2, place] == pytest.approx([angle, angle], abs=1e-3)
        each = []
        for draw in (0, 1):
            products = []
            for condition in ("many", Noisy("many", epsilon, draw)):
                with model.under(condition):
                    products.append(
                        torch.cat(
                            [
                                (
                                    layer.scaling["many"]
                                    * layer.lora_B["many"].weight.detach().double()
                                    @ layer.lora_A["many"].weight.detach().double()
                                ).flatten()
                                for layer in model.lora_layers("many").values()
                            ]
                        )
                    )
            each.append(np.degrees(np.arccos(cosine(*products))))
        assert found.angles[2, place] == pytest.approx(np.mean(each), abs=1e-3)
        assert found.angles[2, place] > angle + 3
    assert found.table()["angle [degrees]"].notna().all()


# -- noise within a subspace ------------------------------------------------------------------


def test_noise_within_a_subspace_stays_there_and_keeps_the_norm(hooked_llama):
    x = direction(hooked_llama)
    axes = [direction(hooked_llama, seed=seed) for seed in (1, 2, 3)]
    y = perturbed(x, 0.6, 4, along=axes).vector.double()
    own = x.vector.double()
    added = (y - 0.8 * own) / 0.6
    assert float(added @ own) == pytest.approx(0, abs=1e-5)
    assert float(added.norm()) == pytest.approx(x.norm, rel=1e-6)
    # orthogonal to x within the span of the axes and x
    span = torch.stack([own, *(axis.vector.double() for axis in axes)], dim=1)
    rest = added - span @ torch.linalg.lstsq(span, added[:, None]).solution[:, 0]
    assert float(rest.norm()) < 1e-5
    assert not torch.equal(y.float(), perturbed(x, 0.6, 5, along=axes).vector)


def test_noise_along_one_axis_differs_in_its_sign_alone(hooked_llama):
    x, axis = direction(hooked_llama), direction(hooked_llama, seed=1)
    drawn = [(perturbed(x, 1.0, seed, along=axis)).vector for seed in range(8)]
    signs = {round(cosine(one, drawn[0])) for one in drawn}
    assert signs == {-1, 1}
    expected = abs(cosine(drawn[0], axis.orthogonal_to(x).vector))
    assert expected == pytest.approx(1, abs=1e-6)


def test_stability_names_the_directions_its_noise_comes_from(hooked_llama):
    x = direction(hooked_llama)
    axes = {"first": direction(hooked_llama, seed=1), "second": direction(hooked_llama, seed=2)}
    found = stability(hooked_llama, DATA, {"x": x}, noise=axes, epsilons=(0.5,), seeds=2)
    assert found.noise == "within first, second"
    along = list(axes.values())
    noisy = [mean_loss(hooked_llama, [Add(perturbed(x, 0.5, seed, along))]) for seed in (0, 1)]
    assert found.perturbed[0][0].tolist() == list(noisy)
    listed = stability(hooked_llama, DATA, {"x": x}, noise=along, epsilons=(0.5,), seeds=2)
    assert np.array_equal(listed.perturbed, found.perturbed)
    assert listed.noise == "within given, given"


# -- adapters ---------------------------------------------------------------------------------


def test_noise_on_an_adapter_turns_a_and_b_apart_and_keeps_their_norms(both):
    before = factors(both, "many")
    with both.under(Noisy("many", 0.6, seed=3)):
        assert both.active_adapter == "many"
        noisy = factors(both, "many")
        untouched = factors(both, "one")
    assert len(before) == 12
    for place, weight in before.items():
        a, b = weight.flatten(), noisy[place].flatten()
        assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
        assert cosine(a, b) == pytest.approx(0.8, abs=1e-5)
    assert all(torch.equal(untouched[place], w) for place, w in factors(both, "one").items())
    assert all(torch.equal(before[place], w) for place, w in factors(both, "many").items())


def test_two_adapters_of_one_shape_meet_the_same_noise(model):
    noise = {}
    for name in ("one", "other"):
        own = factors(model, name)
        with model.under(Noisy(name, 1.0, seed=3)):
            noise[name] = factors(model, name)
        for place, weight in own.items():
            mine = weight.double().flatten()
            noise[name][place] = noise[name][place].double().flatten(), mine
    for place in noise["one"]:
        (first, x1), (second, x2) = noise["one"][place], noise["other"][place]
        # without what is not orthogonal to both weights they are the same direction
        basis, _ = torch.linalg.qr(torch.stack([x1, x2], dim=1))
        rest = [y - basis @ (basis.T @ y) for y in (first, second)]
        assert cosine(*rest) == pytest.approx(1, abs=1e-5)
    with model.under(Noisy("one", 1.0, seed=4)):
        again = factors(model, "one")
    assert all(abs(cosine(again[p].flatten(), noise["one"][p][0])) < 0.9 for p in again)


def test_weights_of_an_adapter_are_put_back_also_after_an_error(model):
    before = factors(model, "many")
    with pytest.raises(RuntimeError, match="inside"), model.under(Noisy("many", 0.5)):
        raise RuntimeError("inside")
    assert all(torch.equal(before[place], w) for place, w in factors(model, "many").items())
    assert model.active_adapter is None


def test_stability_of_an_adapter_is_that_of_peft_with_noisy_weights(both):
    found = stability(both, DATA, {"x": "many", "y": "one"}, epsilons=(0.0, 0.4), seeds=1, seed=7)
    assert found.base_loss == mean_loss(both)
    with both.adapter("many"):
        assert found.losses["x"] == mean_loss(both)
    assert found.perturbed[0][0].tolist() == [found.losses["x"]]
    with both.under(Noisy("many", 0.4, seed=7)):
        noisy = factors(both, "many")
    plain = peft_model(tiny_model("llama"), seed=2, **ADAPTERS["many"])
    with torch.no_grad():
        for (path, part), weight in noisy.items():
            layer = plain.get_submodule(f"base_model.model.{path}")
            getattr(layer, f"lora_{part}")["default"].weight.copy_(weight)
        total, count = 0.0, 0
        for row in tokenize(DATA, both.tokenizer):
            (batch,) = pack([row])
            targets = batch.targets("response")[0]
            logits = plain(input_ids=batch.input_ids).logits[0].log_softmax(-1)
            places = targets.nonzero()[:, 0]
            total -= float(logits[places - 1, batch.input_ids[0, places]].sum())
            count += len(places)
    assert found.perturbed[0][1][0] == pytest.approx(total / count, abs=1e-4)
    assert found.kinds == {"x": "adapter", "y": "adapter"}


def test_vectors_and_adapters_stand_in_one_result(model):
    found = stability(model, DATA, {"v": direction(model), "a": "one"}, epsilons=(0.5,), seeds=1)
    alone = stability(model, DATA, {"v": direction(model)}, epsilons=(0.5,), seeds=1)
    assert np.array_equal(found.perturbed[0], alone.perturbed[0])
    assert found.kinds == {"v": "vector", "a": "adapter"}


# -- what a result says -----------------------------------------------------------------------


def test_half_life_is_where_the_curve_crosses_half():
    # seed 0 crosses between 0.25 and 0.5, seed 1 between 0.5 and 1
    found = planted({"x": ((30, 10), (70, 30), (100, 80)), "y": ((50, 40), (60, 60), (90, 90))})
    assert found.half_lives("x") == pytest.approx([0.375, 0.7])
    half = found.half_life("x")
    assert half.estimate == pytest.approx(0.5375)
    assert half.low < half.estimate < half.high
    assert found.half_lives("y") == pytest.approx([0.25, 0.375])
    early = planted({"x": ((100,), (100,), (100,))})
    assert early.half_lives("x") == pytest.approx([0.125])


def test_half_life_is_that_of_a_quadratic_loss():
    levels = tuple(np.linspace(0.05, 1, 20))
    found = planted({"x": [[100 * e**2] for e in levels]}, epsilons=levels)
    assert found.half_life("x").estimate == pytest.approx(0.5**0.5, abs=1e-3)


def test_a_half_life_beyond_the_grid_is_nan_and_said_to_be():
    found = planted({"x": ((1, 60), (2, 70), (49, 80)), "y": ((1, 2), (2, 3), (30, 40))})
    assert np.isnan(found.half_life("x").estimate)
    notes = dict(zip(found.summary()["direction"], found.summary()["note"], strict=True))
    assert notes == {
        "x": "beyond the highest level (1) for 1 of 2 seeds",
        "y": "beyond the highest level (1)",
    }
    assert "beyond the highest level" in found._repr_html_()
    none = planted({"x": ((1, 2), (2, 3), (30, 40))}, gain=-1.0)
    assert list(none.summary()["note"]) == ["no gain to lose"]
    assert np.isnan(none.half_life("x").estimate)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(KeyError, match="no direction 'z'; there are x"):
        planted({"x": ((1,), (2,), (3,))}).increase("z")


def test_results_survive_being_saved_and_earlier_ones_load(model, tmp_path):
    found = stability(model, DATA, {"v": direction(model), "a": "one"}, epsilons=(0.5,), seeds=2)
    path = found.save(tmp_path / "stability.json")
    assert Stability.load(path) == found
    upper, lower = found.plot()
    assert upper.get_ylabel() == "loss increase\n[% of the gain]"
    assert lower.get_ylabel() == "difference from v\n[percentage points]"
    curve = planted({"x": ((1, 2), (2, 3), (30, 40))}).plot().lines[1]
    assert list(curve.get_xdata()) == [0, 0.25, 0.5, 1], "without noise nothing is lost"
    record = json.loads(path.read_text())
    del record["kinds"], record["noise"]
    path.write_text(json.dumps(record))
    assert Stability.load(path).table().equals(found.table())


# -- bad input --------------------------------------------------------------------------------

X = Direction.of(torch.ones(32), 1)
ELSEWHERE = Direction.of(torch.ones(32), 2)
ZERO = Directions(
    {0: torch.zeros(32), 1: torch.zeros(32)}, "resid_post", Provenance("nothing at all")
)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "no directions were given"),
        ({"x": X}, {"epsilons": [2]}, r"epsilons\[0\] must be|no epsilons were given"),
        ({"x": X}, {"epsilons": []}, r"epsilons\[0\] must be|no epsilons were given"),
        ({"x": X}, {"epsilons": [-0.1]}, r"epsilons\[0\] must be|no epsilons were given"),
        ({"x": X}, {"epsilons": [float("nan")]}, r"epsilons\[0\] must be|no epsilons were given"),
        ({"x": X}, {"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"x": ZERO}, {}, "direction 'x' is zero"),
        ({"x": Direction.of(torch.ones(7), 1)}, {}, "direction 'x' has width 7"),
        ({"x": "nobody"}, {}, "there is no adapter 'nobody'"),
        ({"x": X}, {"noise": "weights"}, "unknown noise 'weights'; choose 'random'"),
        ({"x": X}, {"noise": [torch.ones(32)]}, r"noise\[0\] must be a Directions, not a Tensor"),
        ({"x": X}, {"noise": ELSEWHERE}, "none of the directions .* at resid_post of layer 1"),
        ({"x": X}, {"noise": [X, X * -2]}, "span nothing besides the direction itself"),
        (
            {"x": X},
            {"noise": Direction.of(torch.ones(7), 1)},
            "noise along directions of width 7 for one of 32",
        ),
        ({"x": "one"}, {"noise": X}, "'one' is an adapter, and noise along given directions"),
    ],
)
def test_bad_input_is_refused(model, given, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        stability(model, DATA, given, **options)


def test_noise_on_an_adapter_beyond_its_range_is_refused(model):
    refused = pytest.raises(ValueError, match="epsilon must be at least 0 and at most 1, not 1.5")
    with refused, model.under(Noisy("one", 1.5)):
        pass
