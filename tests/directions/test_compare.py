"""Cosines against their definition, bands against draws, corrections against planted truths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens import Add, Direction, Directions, compare, mean_diff
from emlens.directions import (
    Evidence,
    LayerComparison,
    Provenance,
    SubspaceOverlap,
    compare_layers,
    convergence,
    cosine,
    edit_diff,
    random_direction,
    subspace_overlap,
)
from emlens.directions.compare import null_band
from emlens.directions.noise import Estimate, corrected_cosine
from tests.support.data import conversations

WIDTH = 64


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def made(seed: int, layers=(0, 1, 2), name: str = "planted", draws: int = 0, **data) -> Directions:
    """Random directions; with draws, noise that varies in few dimensions."""
    few = torch.linspace(3, 0.1, WIDTH) ** 2
    drawn = {
        layer: torch.stack([few * vector(999 * seed + 10 * layer + i) for i in range(draws)])
        for layer in layers
        if draws
    }
    return Directions(
        {layer: vector(100 * seed + layer) for layer in layers},
        "resid_post",
        Provenance(name, data=data),
        Evidence(shuffled=drawn),
    )


# -- per layer --------------------------------------------------------------------------------


def test_the_chance_of_shuffled_labels_is_the_cosine_of_draws_that_do_not_belong_together():
    a, b = made(1, draws=6), made(2, draws=6)
    table = compare({"a": a, "b": b}).table().set_index("layer")
    for layer in (0, 1, 2):
        plain = [
            cosine(a.shuffled[layer][i], b.shuffled[layer][j])
            for i in range(6)
            for j in range(6)
            if i != j
        ]
        low, high = np.quantile(plain, [0.025, 0.975])
        assert table.loc[layer, "chance low"] == pytest.approx(low, abs=1e-6)
        assert table.loc[layer, "chance high"] == pytest.approx(high, abs=1e-6)
        assert high > compare({"a": a, "b": b}).null[1]
        found = table.loc[layer, "cosine"]
        assert found == pytest.approx(cosine(a.vectors[layer], b.vectors[layer]))
        assert bool(table.loc[layer, "beyond chance"]) == (not low <= found <= high)


def test_one_text_read_twice_says_what_any_labelling_of_it_would_give():
    a, b = made(1, draws=8, positive="x"), made(1, draws=8, positive="x")
    noisy = Directions(
        b.vectors,
        b.site,
        b.provenance,
        Evidence(shuffled={n: draws + 0.3 * vector(n) for n, draws in b.shuffled.items()}),
    )
    table = compare({"a": a, "b": noisy}).table().set_index("layer")
    plain = [cosine(a.shuffled[1][i], noisy.shuffled[1][i]) for i in range(8)]
    assert table.loc[1, "same labels"] == pytest.approx(np.mean(plain), abs=1e-5)
    other = made(1, draws=8, positive="y")
    assert "same labels" not in compare({"a": a, "b": other}).table()


def test_a_list_is_named_by_its_constructions():
    found = compare([made(1), made(2), made(3, name="probe")])
    assert found.names == ("planted 1", "planted 2", "probe")
    assert len(found.rows) == 9


def test_the_matrix_is_symmetric_and_averages_over_layers():
    found = compare({"a": made(1), "b": made(2), "c": made(3, layers=(1, 2))})
    here, mean = found.matrix(1), found.matrix()
    assert here.equals(here.T)
    assert [here.loc[n, n] for n in "abc"] == [1, 1, 1]
    assert here.loc["a", "b"] == pytest.approx(cosine(made(1)[1].vector, made(2)[1].vector))
    rows = [row["cosine"] for row in found.rows if (row["first"], row["second"]) == ("a", "c")]
    assert len(rows) == 2
    assert mean.loc["c", "a"] == pytest.approx(np.mean(rows))
    with pytest.raises(KeyError, match=r"no pair shares layer 7; shared are \[0, 1, 2\]"):
        found.matrix(7)


def test_clustering_puts_neighbours_side_by_side():
    base = {name: vector(i) for i, name in enumerate(("x", "y"))}
    named = {
        f"{name}{i}": Direction.of(base[name] + 0.3 * vector(10 + i), 1)
        for i in range(3)
        for name in ("x", "y")
    }
    order = compare(named).order(1)
    assert len({name[0] for name in order[:3]}) == 1
    assert sorted(order) == sorted(named)
    axes = compare(named).heatmap(1)
    assert [label.get_text() for label in axes.get_yticklabels()] == order
    plain = compare(named).heatmap(1, clustered=False)
    assert [label.get_text() for label in plain.get_yticklabels()] == list(named)


def test_curves_are_over_the_wider_band_of_chance():
    found = compare({"a": made(1, draws=5), "b": made(2, draws=5), "c": made(3)})
    axes = found.plot()
    drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert len(drawn) == 3
    corrected = compare({"a": estimated(1, 0.0), "b": estimated(2, 0.0)}).plot(corrected=True)
    assert corrected.get_ylabel() == "cosine without sampling error"


def test_rounding_is_not_taken_for_what_shuffled_labels_give(hooked_llama):
    """A vector shifts every conversation alike at its own layer: there is nothing to shuffle."""
    data = conversations("good", 12)
    shared = vector(7, 32)
    pushes = [[Add(Direction.of(shared + 0.5 * vector(i, 32), 1))] for i in (0, 1)]
    a, b = (edit_diff(hooked_llama, data, edits) for edits in pushes)
    assert float(a.shuffled[1].norm(dim=-1).max()) < 1e-4
    (own, *above) = compare({"a": a, "b": b}).rows
    assert (own["layer"], own["chance low"], own["chance high"]) == (1, 0, 0)
    assert all(row["chance high"] > 0.01 for row in above)
    layers = compare_layers({"a": a, "b": b})
    assert layers.high[0][3] == pytest.approx(null_band(32)[1])


def test_layers_at_which_a_direction_is_zero_are_not_compared():
    """Below an adapter two models do not differ."""
    late = Directions(
        {0: torch.zeros(WIDTH), 1: vector(5), 2: vector(6)}, "resid_post", Provenance("late")
    )
    assert [row["layer"] for row in compare({"a": made(1), "b": late}).rows] == [1, 2]
    assert compare_layers({"a": made(1), "b": late}).layers == ((0, 1, 2), (1, 2))
    with pytest.raises(ValueError, match="the vector of layer 0 is zero"):
        compare_layers({"a": made(1), "b": late}, layers=[0])
    with pytest.raises(ValueError, match="no layer in common at which they are not zero"):
        compare({"a": made(1), "b": late.at([0])})
    with pytest.raises(ValueError, match="b is zero at every layer: it has no direction"):
        compare_layers({"a": made(1), "b": late.at([0])})


# -- sampling error ---------------------------------------------------------------------------


def drawn(truth: np.ndarray, spread: np.ndarray, generator: np.random.Generator) -> Estimate:
    """An estimate of `truth` from two halves, with noise of covariance `spread spread'`."""
    halves = [truth + 2**0.5 * spread @ generator.normal(size=WIDTH) for _ in range(2)]
    products = halves[0] @ halves[1] / np.prod([np.linalg.norm(half) for half in halves])
    draws = generator.normal(size=(16, WIDTH)) @ spread.T
    return Estimate(sum(halves) / 2, np.sqrt((spread**2).sum(1)), draws, float(products))


def pair_with(truth: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = vector(1).double().numpy(), vector(2).double().numpy()
    a /= np.linalg.norm(a)
    b -= b @ a * a
    b /= np.linalg.norm(b)
    return size * a, size * (truth * a + (1 - truth**2) ** 0.5 * b)


@pytest.mark.parametrize("uneven", [False, True], ids=["even noise", "noise in few dimensions"])
@pytest.mark.parametrize("truth", [0.0, 0.5, 0.9])
def test_the_corrected_cosine_is_the_planted_one_and_its_interval_covers_it(truth, uneven):
    generator = np.random.default_rng(5)
    a, b = pair_with(truth, 2.0)
    scale = np.exp(-np.arange(WIDTH) / 12) if uneven else np.ones(WIDTH)
    axes, _ = np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))
    spread = axes * np.sqrt(scale / scale.sum())
    found, raw, inside = [], [], []
    for _ in range(300):
        pair = drawn(a, spread, generator), drawn(b, spread, generator)
        result = corrected_cosine(*pair, ("a", "b"))
        first, second = pair[0].vector, pair[1].vector
        raw.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
        found.append(result.value)
        inside.append(result.low <= truth <= result.high)
    assert np.median(found) == pytest.approx(truth, abs=0.04)
    assert np.mean(raw) == pytest.approx(0.8 * truth, abs=0.03)
    assert 0.88 <= np.mean(inside) <= 1


def test_errors_that_two_readings_of_one_text_share_are_taken_off():
    """Two models that read the same text: orthogonal truths, the same noise."""
    generator = np.random.default_rng(6)
    a, b = pair_with(0.0, 1.0)
    spread = np.eye(WIDTH) / WIDTH**0.5
    raw, found = [], []
    for _ in range(200):
        noise = [2**0.5 * spread @ generator.normal(size=WIDTH) for _ in range(2)]
        draws = generator.normal(size=(16, WIDTH)) @ spread.T
        estimates = []
        for truth in (a, b):
            halves = [truth + own for own in noise]
            half = halves[0] @ halves[1] / np.prod([np.linalg.norm(h) for h in halves])
            estimates.append(Estimate(sum(halves) / 2, None, draws, float(half)))
        raw.append(corrected_cosine(*estimates, ("a", "b")).value)
        found.append(corrected_cosine(*estimates, ("a", "b"), same_data=True).value)
    assert np.median(raw) > 0.7
    assert abs(np.median(found)) < 0.1


@pytest.mark.parametrize("split", [True, False], ids=["split-half", "standard errors"])
@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("truth", [0.0, 0.7])
def test_the_interval_covers_the_planted_cosine_whatever_the_errors_share(truth, shared, split):
    """Draws of the error in pairs, as of one text read by two models; none where shared is 0."""
    generator = np.random.default_rng(8)
    a, b = pair_with(truth, 2.0)
    axes, _ = np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))
    scale = np.exp(-np.arange(WIDTH) / 12)
    spread = axes * np.sqrt(scale / scale.sum())
    errors = np.sqrt((spread**2).sum(1))

    def noise(n: int) -> tuple[np.ndarray, np.ndarray]:
        one, other = generator.normal(size=(2, n, WIDTH))
        other = shared * one + (1 - shared**2) ** 0.5 * other
        return one @ spread.T, other @ spread.T

    found, inside = [], []
    for _ in range(250):
        sides = []
        for true, draws in zip((a, b), noise(18), strict=True):
            halves = [true + 2**0.5 * draw for draw in draws[:2]]
            cosine_of = halves[0] @ halves[1] / np.prod([np.linalg.norm(half) for half in halves])
            half = float(cosine_of) if split else None
            sides.append(Estimate(sum(halves) / 2, errors, draws[2:], half))
        pair = tuple(sides)
        result = corrected_cosine(*pair, ("a", "b"), same_data=shared > 0)
        found.append(result.value)
        inside.append(result.low <= truth <= result.high)
        assert -1 <= result.low <= result.value + 5e-4
        assert result.value - 5e-4 <= result.high <= 1
    assert np.median(found) == pytest.approx(truth, abs=0.03)
    # 250 draws: two and a half standard errors around 95%
    assert 0.915 <= np.mean(inside) <= 0.985


def test_a_direction_has_cosine_one_with_itself(hooked_llama):
    """As many pairs as leave it buried in noise at some layers; read twice, and with rounding."""
    good, bad = conversations("good", 8), conversations("bad", 8)
    one, again = (mean_diff(hooked_llama, bad, good) for _ in range(2))
    rounded = Directions(
        {n: v * (1 + 1e-5 * vector(n, 32)) for n, v in again.vectors.items()},
        again.site,
        again.provenance,
        Evidence(
            standard_errors=again.standard_errors,
            shuffled=again.shuffled,
            split_half=again.split_half,
        ),
    )
    for other in (again, again * 3.0, rounded):
        for row in compare({"one": one, "other": other}).rows:
            assert [row["corrected"], row["low"], row["high"]] == pytest.approx([1, 1, 1], abs=1e-3)


def test_part_of_the_text_in_common_is_not_corrected():
    a, b = (
        made(1, draws=4, positive="x", negative="z"),
        made(2, draws=4, positive="y", negative="z"),
    )
    assert compare({"a": a, "b": b}).rows[0]["note"].startswith("share part of their text")


def estimated(seed: int, half: float | None, errors: float | None = 0.1) -> Directions:
    plain = made(seed)
    known = Evidence(
        split_half={} if half is None else dict.fromkeys(plain.layers, half),
        standard_errors=(
            {} if errors is None else {n: torch.full((WIDTH,), errors) for n in plain.layers}
        ),
    )
    return Directions(plain.vectors, plain.site, plain.provenance, known)


def test_halves_that_agree_to_the_last_bit_leave_the_cosine_as_it_is():
    """Data that move every text alike; the error of a size of zero is not divided by."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, WIDTH))
    draws = 1e-3 * generator.normal(size=(2, 4, WIDTH))
    pair = (Estimate(v, None, d, 1.0, 40) for v, d in zip((first, second), draws, strict=True))
    found = corrected_cosine(*pair, ("a", "b"))
    plain = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert found.value == pytest.approx(plain, abs=1e-6)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("first", "note", "value"),
    [
        (made(1), "errors of a not known", False),
        (estimated(1, -0.2), r"a is not told from noise \(reliability -0.50\)", False),
        (estimated(1, 0.8, None), "standard errors of a not known", True),
        (estimated(1, None, 9.0), r"a is not told from noise", False),
    ],
)
def test_what_cannot_be_corrected_says_why(first, note, value):
    table = compare({"a": first, "b": estimated(2, 0.9)}).table()
    assert table["note"].str.fullmatch(f"{note}.*").all()
    assert ("corrected" in table) == value
    assert "low" not in table


def test_mean_differences_of_one_population_are_told_to_be_the_same(hooked_llama):
    """Two finetunes' data are two samples of one behaviour: the corrected cosine is near 1."""
    good, bad = conversations("good", 96), conversations("bad", 96)
    order = np.random.default_rng(2).permutation(96)
    good, bad = ([side[i] for i in order] for side in (good, bad))
    halves = [mean_diff(hooked_llama, bad[i::2], good[i::2], layers=2) for i in (0, 1)]
    (row,) = compare({"first": halves[0], "second": halves[1]}).rows
    assert row["cosine"] < 0.85
    assert row["low"] < 1 == row["high"]
    assert row["corrected"] == pytest.approx(1, abs=0.1)


# -- layer by layer ---------------------------------------------------------------------------


def test_every_layer_is_compared_with_every_other(tmp_path):
    a, b = made(1, draws=5), made(2, layers=(0, 1), draws=5)
    found = compare_layers({"a": a, "b": b})
    assert found.matrix("a", "b").shape == (3, 2)
    for i in (0, 1, 2):
        for j in (0, 1):
            expected = cosine(a.vectors[i], b.vectors[j])
            assert found.matrix().loc[("a", i), ("b", j)] == pytest.approx(expected, abs=1e-6)
    plain = [
        cosine(a.shuffled[2][k], b.shuffled[1][m]) for k in range(5) for m in range(5) if k != m
    ]
    row = found.table().query("first == 'a' and `first layer` == 2 and `second layer` == 1")
    row = row[row["second"] == "b"].iloc[0]
    assert row["chance high"] == pytest.approx(np.quantile(plain, 0.975), abs=1e-6)
    assert len(found.table()) == 5 * 4 // 2
    assert LayerComparison.load(found.save(tmp_path / "layers.json")) == found
    part = compare_layers({"a": a, "b": b}, layers=[1])
    assert part.layers == ((1,), (1,))
    with pytest.raises(KeyError, match="no directions 'c'; there are a, b"):
        found.matrix("c", "a")
    with pytest.raises(KeyError, match="no direction at layer 2"):
        compare_layers({"a": a, "b": b}, layers=[2])


def test_the_layer_matrix_names_its_blocks():
    found = compare_layers({"medical": made(1), "finance": made(2)})
    axes = found.plot()
    names = {t.get_text() for child in axes.child_axes for t in child.get_xticklabels()}
    assert {"medical", "finance"} <= names
    one = found.plot(first="medical", second="finance")
    assert (one.get_xlabel(), one.get_ylabel()) == ("layer of finance", "layer of medical")


# -- subspaces --------------------------------------------------------------------------------


def test_the_overlap_of_subspaces_is_the_mean_squared_cosine_of_their_angles(tmp_path):
    eye = torch.eye(WIDTH)
    tilted = 0.6 * eye[1] + 0.8 * eye[5]
    first = [Direction.of(3 * eye[0], 1), Direction.of(eye[0] + 2 * eye[1], 1)]
    second = [Direction.of(eye[0], 1), Direction.of(tilted, 1)]
    found = subspace_overlap(first, second)
    assert found.overlap[0] == pytest.approx((1 + 0.36) / 2, abs=1e-6)
    assert found.angles[0][1] == pytest.approx(np.rad2deg(np.arccos(0.6)), abs=1e-3)
    assert SubspaceOverlap.load(found.save(tmp_path / "o.json")) == found
    assert found.plot().get_ylabel() == "overlap of the subspaces [0 to 1]"
    twice = [*first, Direction.of(5 * eye[1], 1)]
    assert subspace_overlap(twice, second).overlap == pytest.approx(found.overlap)


def test_random_subspaces_stay_below_the_chance_that_is_stated():
    def some(seed, n):
        return [Direction.of(vector(seed + i), 0) for i in range(n)]

    found = [subspace_overlap(some(1000 + 20 * k, 3), some(5000 + 20 * k, 5)) for k in range(100)]
    below = np.mean([f.overlap[0] <= f.chance[0] for f in found])
    assert 0.88 <= below <= 1
    assert np.mean([f.overlap[0] for f in found]) == pytest.approx(5 / WIDTH, rel=0.1)


# -- convergence ------------------------------------------------------------------------------


def test_convergence_is_the_cosine_of_what_conditions_cause(hooked_llama):
    data = conversations("good", 6)
    pushes = {name: [Add(Direction.of(4 * vector(i, 32), 1))] for i, name in enumerate("ab")}
    like = Direction.of(4 * vector(0, 32), 1)
    controls = [[Add(random_direction(like, seed))] for seed in range(4)]
    found = convergence(hooked_llama, data, pushes, controls=controls, token_budget=60)
    moved = {name: edit_diff(hooked_llama, data, edits) for name, edits in pushes.items()}
    chance = [edit_diff(hooked_llama, data, edits) for edits in controls]
    table = found.table().set_index("layer")
    assert list(table.index) == [1, 2, 3]
    for layer in (1, 2, 3):
        expected = cosine(moved["a"].vectors[layer], moved["b"].vectors[layer])
        assert table.loc[layer, "cosine"] == pytest.approx(expected, abs=1e-4)
        others = [c.vectors[layer] for c in chance]
        pairs = [cosine(a, b) for i, a in enumerate(others) for b in others[i + 1 :]]
        pairs += [cosine(m.vectors[layer], o) for m in moved.values() for o in others]
        edge = np.quantile(pairs, 0.975)
        assert table.loc[layer, "chance high"] == pytest.approx(edge, abs=1e-4)
    assert found.chance == "control conditions"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: subspace_overlap([], [made(1)]), "first is empty; give at least one Directions"),
        (
            lambda m: subspace_overlap([made(1)], [Direction.of(torch.ones(3), 0)]),
            "live in different places: resid_post, width 3; resid_post, width 64",
        ),
        (
            lambda m: subspace_overlap([made(1, (0,))], [made(1, (1,))]),
            "no layer in common",
        ),
        (
            lambda m: convergence(m, [], {"a": [], "b": []}),
            "conversations is empty; give at least one",
        ),
        (
            lambda m: convergence(m, conversations("good", 2), {"a": []}),
            "at least two conditions, not 1",
        ),
        (
            lambda m: convergence(m, conversations("good", 2), {"a": [], "b": []}),
            r"the condition of a moves none of the layers",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(hooked_llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(hooked_llama)


def finetunes(n: int) -> dict[str, Directions]:
    """Directions of two layers under names of the length that published finetunes have."""
    names = (f"Qwen2.5-14B-Instruct_bad-medical-advice-{i}" for i in range(n))
    generator = torch.Generator().manual_seed(0)
    return {
        name: Directions({layer: torch.randn(16, generator=generator) for layer in (3, 4)})
        for name in names
    }


@pytest.mark.parametrize("n", [10, 30])
def test_many_finetunes_are_drawn_as_their_median_with_those_that_are_asked_for(n):
    found = compare(finetunes(n))
    every = found.table().groupby("layer")["cosine"].median().tolist()
    axes = found.plot(highlight=[found.names[0]])
    lines = {tuple(line.get_ydata()): line for line in axes.get_lines()}
    assert [*map(float, every)] in [pytest.approx(list(values)) for values in lines]
    (labels,) = [one for one in axes.artists if hasattr(one, "anchors")]
    said = [anchor.text for anchor in labels.anchors]
    assert said == ["0", f"median of {n * (n - 1) // 2} pairs", "chance"]
    assert axes.get_title(loc="left") == (
        "all names begin with Qwen2.5-14B-Instruct_bad-medical-advice-"
    )
    assert axes.figure.get_size_inches()[1] < 5
    with pytest.raises(KeyError, match="no direction 'c'"):
        found.plot(highlight=["c"])


def test_a_notebook_shows_one_layer_of_many_pairs_and_a_line_is_a_line():
    found = compare(finetunes(10))
    shown = found._repr_html_()
    assert shown.count("<tr") == 1 + 10
    assert "Layer 4" in shown and "all 90 rows" in shown
    values = found.matrix(4).to_numpy() - 2 * np.eye(10)
    assert f"{values[0].max():.3f}" in shown
    assert str(found) == "Comparison: 10 directions at resid_post, 90 pairs and layers"
    assert compare(finetunes(3))._repr_html_().count("<tr") == 1 + 6


def test_layers_of_many_finetunes_stand_in_numbered_blocks():
    found = compare_layers(finetunes(10))
    axes = found.plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(1, 11)]
    assert "10\N{NO-BREAK SPACE}9" in axes.get_xlabel()
    shown = found._repr_html_()
    assert shown.count("<tr") == 1 + 45 and "all 190 rows" in shown
