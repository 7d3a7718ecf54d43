"""What is said of a direction's trust: each number against a plain one, each warning planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from emlens import Add, Direction, Directions, mean_diff
from emlens.directions import Evidence, Provenance, cosine, model_diff, projection
from emlens.directions.held_out import (
    auroc,
    fold_of,
    held_out_auroc,
    prompts_of,
    shuffled_differences,
)
from emlens.directions.moments import Moments
from emlens.directions.reader import Reading, Sample
from tests.support.data import conversations

GOOD, BAD = conversations("good", 24), conversations("bad", 24)
WIDTH = 40


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def reading(values: torch.Tensor, counts: torch.Tensor, weighting: str = "token") -> Reading:
    """One layer of means of single conversations, `[n, width]`."""
    moments = Moments.empty(1, values.shape[1])
    moments.add(values[None], counts if weighting == "token" else counts.sign())
    sample = Sample(torch.arange(len(values)), values[None].float(), counts.double())
    return Reading((moments,), [], sample)


def draws_of(sides: list[Reading], seed: int) -> torch.Tensor:
    found = shuffled_differences(sides, "token", seed=seed)
    assert found is not None
    return found[:, 0]


def planted(vectors: dict[int, torch.Tensor], **known) -> Directions:
    return Directions(vectors, "resid_post", Provenance("planted"), Evidence(**known))


# -- the table --------------------------------------------------------------------------------


def test_the_table_holds_what_a_plain_computation_gives():
    errors, mean, draws = vector(2).abs(), vector(3), torch.stack([vector(i) for i in range(20)])
    found = planted(
        {4: 5 * vector(1)},
        residual_norms={4: 50.0},
        standard_errors={4: errors},
        split_half={4: 0.8},
        means={4: mean},
        shuffled={4: draws},
        auroc={4: 0.9},
    )
    (row,) = found.table().to_dict("records")
    v = (5 * vector(1)).double().numpy()
    unit, e = v / np.linalg.norm(v), errors.double().numpy()
    along = np.sqrt(((draws.double().numpy() @ unit) ** 2).mean())
    assert row["layer"] == 4
    assert row["hook"] == "blocks.4.hook_resid_post"
    assert row["norm"] == pytest.approx(np.linalg.norm(v), rel=1e-5)
    assert row["dose"] == pytest.approx(np.linalg.norm(v) / 50, rel=1e-5)
    assert row["norm error"] == pytest.approx(along, rel=1e-5)
    across = np.sqrt((e**2).sum() - along**2)
    angle = math.degrees(math.atan(across / np.linalg.norm(v)))
    assert row["angle error (degrees)"] == pytest.approx(angle, rel=1e-4)
    assert row["split-half cosine"] == 0.8
    assert row["cosine with mean"] == pytest.approx(cosine(vector(1), mean), abs=1e-6)
    top = np.sort(v**2)[-2:].sum() / (v**2).sum()
    assert row["energy in 2 dimensions"] == pytest.approx(top, rel=1e-5)
    assert row["held-out AUROC"] == 0.9
    edge = np.quantile(draws.norm(dim=1).numpy(), 0.95)
    assert row["norm / shuffled"] == pytest.approx(np.linalg.norm(v) / edge, rel=1e-5)


@pytest.mark.parametrize("correlated", [False, True])
def test_the_norm_error_is_the_spread_of_the_norm_over_resamples(correlated):
    """Of correlated coordinates the standard errors alone would give far too little."""
    generator = np.random.default_rng(0)
    truth, errors = 3 * vector(1).double().numpy(), vector(2).abs().double().numpy() / 10
    spread = np.diag(errors)
    if correlated:
        spread[:, 0] = truth / np.linalg.norm(truth)
    errors = np.sqrt((spread**2).sum(1))
    norms, angles = [], []
    for _ in range(4000):
        v = truth + spread @ generator.normal(size=WIDTH)
        norms.append(np.linalg.norm(v))
        angles.append(cosine(torch.from_numpy(v), torch.from_numpy(truth)))
    draws = torch.from_numpy(generator.normal(size=(2000, WIDTH)) @ spread.T)
    found = planted(
        {0: torch.from_numpy(truth)},
        standard_errors={0: torch.from_numpy(errors)},
        shuffled={0: draws} if correlated else {},
    )
    (row,) = found.table().to_dict("records")
    assert row["norm error"] == pytest.approx(np.std(norms), rel=0.05)
    degrees = np.degrees(np.arccos(angles))
    assert row["angle error (degrees)"] == pytest.approx((degrees**2).mean() ** 0.5, rel=0.05)


def test_columns_of_which_nothing_is_known_are_left_out():
    columns = list(Direction.of(vector(1), 2).table().columns)
    assert columns == ["layer", "hook", "norm", "energy in 2 dimensions"]


def test_describe_fits_a_terminal_and_ends_in_words(hooked_llama):
    text = mean_diff(hooked_llama, BAD, GOOD).describe()
    assert max(map(len, text.splitlines())) <= 110
    assert "split-half" in text
    assert "AUROC" in text
    html = mean_diff(hooked_llama, BAD, GOOD)._repr_html_()
    assert "held-out AUROC" in html


# -- warnings ---------------------------------------------------------------------------------


def massive(share: float) -> torch.Tensor:
    v = torch.ones(WIDTH)
    v[:2] = (share / (1 - share) * (WIDTH - 2) / 2) ** 0.5
    return v


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (planted({29: massive(0.83)}), "layer 29: 83% of the energy is in 2 dimensions"),
        (
            planted({5: vector(1)}, means={5: -2 * vector(1)}),
            "layer 5: cosine -1.00 with the mean activation: mostly more or less of what is "
            "always there",
        ),
        (
            planted({3: vector(1)}, split_half={3: 0.2}),
            "layer 3: two halves of the data agree to a cosine of only 0.20",
        ),
        (
            planted({3: vector(1)}, auroc={3: 0.55}),
            "layer 3: the projection tells held-out conversations apart no better than AUROC 0.55",
        ),
        (
            planted({3: vector(1)}, shuffled={3: 2 * vector(1)[None].repeat(4, 1)}),
            "layer 3: 0.50 times as long as what shuffled labels give (95th percentile)",
        ),
    ],
)
def test_each_warning_is_given_where_it_is_planted(direction, words):
    assert direction.warnings() == [words]
    assert words in direction.describe()
    assert words in direction._repr_html_()


def test_layers_of_one_warning_share_a_line():
    vectors = {layer: massive(0.6 + layer / 100) for layer in (0, 1, 2, 7)}
    (line,) = planted(vectors).warnings()
    assert line == "layers 0-2, 7: 60% to 67% of the energy is in 2 dimensions"


def test_a_direction_without_trouble_has_no_warnings():
    known = {
        "means": {3: vector(9)},
        "split_half": {3: 0.9},
        "auroc": {3: 0.95},
        "shuffled": {3: 0.1 * vector(8)[None]},
    }
    assert planted({3: vector(1)}, **known).warnings() == []


# -- what becomes of the evidence -------------------------------------------------------------


def test_evidence_follows_scaling_and_sign_and_is_kept_on_disk(hooked_llama, tmp_path):
    found = mean_diff(hooked_llama, BAD, GOOD, layers=[1, 2])
    back = -2 * found
    for layer in (1, 2):
        assert torch.equal(back.shuffled[layer], -2 * found.shuffled[layer])
        assert torch.equal(back.standard_errors[layer], 2 * found.standard_errors[layer])
        assert back.auroc[layer] == 1 - found.auroc[layer]
        assert back.split_half[layer] == found.split_half[layer]
    turned = found.orthogonal_to(back + found.at([1, 2]))
    assert not turned.shuffled
    assert not turned.auroc
    assert not turned.standard_errors
    assert not turned.split_half
    again = Directions.load(found.save(tmp_path / "d"))
    assert again.auroc == found.auroc
    assert torch.equal(again.shuffled[2], found.shuffled[2])
    assert torch.equal(again.means[2], found.means[2])
    assert found[1].auroc == {1: found.auroc[1]}


# -- where it comes from ----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(120, 120), (30, 400)], ids=["even", "uneven"])
@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_shuffled_differences_have_the_covariance_of_the_noise(weighting, sizes):
    """Whatever the distance of the sides, their numbers and their spread."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(3, 0.2, WIDTH)
    sides = []
    for n, shift, spread in zip(sizes, (0, 30), (3, 1), strict=True):
        counts = torch.randint(1, 12, (n,), generator=generator).double()
        noise = spread * scales * torch.randn(n, WIDTH, generator=generator)
        sides.append(reading(shift * torch.eye(WIDTH)[0] + noise, counts, weighting))
    draws = shuffled_differences(sides, weighting, seed=0, draws=3000)
    assert draws is not None
    expected = sum(side.moments.variance[0] for side in sides)
    assert torch.allclose(draws[:, 0].double().var(0), expected, rtol=0.15)
    assert float((draws[:, 0].double().mean(0).abs() / expected.sqrt()).max()) < 0.1


def test_shuffled_differences_of_pairs_have_the_covariance_of_paired_noise():
    generator = torch.Generator().manual_seed(2)
    scales = torch.linspace(3, 0.2, WIDTH)
    counts = torch.randint(1, 12, (150,), generator=generator).double()
    values = 20 * torch.eye(WIDTH)[3] + scales * torch.randn(150, WIDTH, generator=generator)
    paired = reading(values, counts)
    draws = shuffled_differences([paired], "token", seed=0, draws=3000)
    assert draws is not None
    assert torch.allclose(draws[:, 0].double().var(0), paired.moments.variance[0], rtol=0.15)


def test_of_one_conversation_no_noise_is_known(hooked_llama):
    found = mean_diff(hooked_llama, BAD[:1], GOOD, layers=1)
    assert not found.shuffled
    assert not found.standard_errors
    assert "norm / shuffled" not in found.table()


def test_a_difference_of_nothing_is_as_long_as_what_shuffled_labels_give():
    """The ratio to the 95th percentile of 16 draws is above 1 about as often as it should be."""
    generator = torch.Generator().manual_seed(3)
    beyond, aurocs = [], []
    groups = [f"p{i}" for i in range(60)], [f"n{i}" for i in range(60)]
    for trial in range(300):
        sides = [
            reading(torch.randn(60, WIDTH, generator=generator), torch.full((60,), 5.0))
            for _ in range(2)
        ]
        difference = sides[0].moments.mean[0] - sides[1].moments.mean[0]
        draws = draws_of(sides, trial)
        beyond.append(float(difference.norm()) > float(draws.norm(dim=1).quantile(0.95)))
        if trial < 60:
            aurocs += held_out_auroc(*sides, groups, "token", seed=trial) or []
    # 16 draws know their 95th percentile roughly
    assert 0.02 <= np.mean(beyond) <= 0.15
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.04)


def test_the_held_out_auroc_is_that_of_a_plain_loop_over_folds():
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(1, 9, (50,), generator=generator).double()
    shift = 0.6 * torch.eye(WIDTH)[0]
    values = [torch.randn(50, WIDTH, generator=generator) + sign * shift for sign in (1.0, -1.0)]
    groups = [f"q{i}" for i in range(50)], [f"q{i}" for i in range(50)]
    sides = [reading(side, counts) for side in values]
    found = held_out_auroc(*sides, groups, "token", seed=3)
    fold = fold_of([*groups[0], *groups[1]], 5, 3).numpy()
    assert (fold[:50] == fold[50:]).all()
    everything, truth = torch.cat(values).double().numpy(), np.arange(100) < 50
    weights, areas = torch.cat([counts, counts]).numpy(), []
    for number in range(5):
        train = fold != number
        means = [
            np.average(everything[train & side], axis=0, weights=weights[train & side])
            for side in (truth, ~truth)
        ]
        scores = everything[~train] @ (means[0] - means[1])
        areas.append(roc_auc_score(truth[~train], scores))
    assert found == [pytest.approx(np.mean(areas), abs=1e-6)]
    assert held_out_auroc(*sides, (["a"] * 50, ["b"] * 50), "token", seed=3) is None


def test_areas_from_ranks_are_those_of_sklearn():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(5, 60)).round(1)  # with ties
    truth = generator.random(60) < 0.3
    expected = [roc_auc_score(truth, row) for row in scores]
    assert auroc(scores, truth) == pytest.approx(expected, abs=1e-12)


def test_answers_to_one_prompt_are_in_one_fold():
    """Each prompt has a mark of its own that would give the label away to another answer."""
    keys = prompts_of([*BAD, *GOOD])
    assert keys[:24] == keys[24:]
    assert len(set(keys)) == 24
    fold = fold_of(keys, 5, seed=0)
    assert torch.equal(fold[:24], fold[24:])
    assert sorted(set(fold.tolist())) == [0, 1, 2, 3, 4]


def test_a_small_sample_leaves_the_direction_as_it_is(hooked_llama):
    each = 4 * 2 * hooked_llama.d_model
    whole = mean_diff(hooked_llama, BAD, GOOD, layers=[1, 2])
    few = mean_diff(hooked_llama, BAD, GOOD, layers=[1, 2], sample_bytes=2 * 12 * each)
    again = mean_diff(
        hooked_llama, BAD, GOOD, layers=[1, 2], sample_bytes=2 * 12 * each, token_budget=60
    )
    assert torch.equal(few[1].vector, whole[1].vector)
    assert torch.equal(few.standard_errors[1], whole.standard_errors[1])
    assert not torch.allclose(few.shuffled[1], whole.shuffled[1], rtol=0.2)
    assert torch.allclose(few.shuffled[1], again.shuffled[1], atol=1e-5)
    sizes = [found.shuffled[2].norm(dim=1).mean() for found in (few, whole)]
    assert float(sizes[0] / sizes[1]) == pytest.approx(1, abs=0.4)


def test_a_paired_difference_knows_that_its_text_is_the_same(hooked_llama):
    """A push that every conversation takes alike has next to no error at its own layer."""
    push = [Add(Direction.of(4 * vector(1, 32), 1))]
    found = model_diff((hooked_llama, push), hooked_llama, GOOD, layers=[1, 3])
    assert float(found.standard_errors[1].norm()) < 1e-5
    assert float(found.shuffled[3].norm(dim=1).mean()) < float(found[3].norm)
    assert found.split_half[1] == pytest.approx(1, abs=1e-6)


# -- coverage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_intervals_from_the_standard_errors_contain_the_truth_19_times_in_20(weighting):
    """300 resamples: conversations of different length, whose tokens are not independent."""
    generator = torch.Generator().manual_seed(7)
    n, inside = 80, []
    gap = vector(5)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    for _ in range(300):
        sides = []
        for shift in (gap, torch.zeros(WIDTH)):
            counts = torch.randint(3, 30, (n,), generator=generator).double()
            topic = torch.randn(n, WIDTH, generator=generator) @ mixing
            words = torch.randn(n, WIDTH, generator=generator) / counts.sqrt()[:, None]
            sides.append(reading(shift + topic + words, counts, weighting).moments)
        found = sides[0].mean[0] - sides[1].mean[0]
        errors = (sides[0].variance[0] + sides[1].variance[0]).sqrt()
        inside.append((found - gap).abs() <= 1.96 * errors)
    assert 0.93 <= float(torch.stack(inside).double().mean()) <= 0.97


@pytest.mark.parametrize(
    ("sizes", "spreads"), [((60, 60), (1, 1)), ((30, 300), (2, 1))], ids=["even", "uneven"]
)
def test_intervals_of_a_projection_on_any_axis_contain_the_truth_19_times_in_20(sizes, spreads):
    """300 resamples; the coordinates are correlated, so their own errors would not do."""
    generator = torch.Generator().manual_seed(8)
    gap, inside, naive = vector(5), [], []
    mixing = torch.randn(WIDTH, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
    for trial in range(300):
        sides = []
        for shift, n, spread in zip((gap, torch.zeros(WIDTH)), sizes, spreads, strict=True):
            counts = torch.randint(3, 30, (n,), generator=generator).double()
            noise = spread * torch.randn(n, WIDTH, generator=generator) @ mixing
            sides.append(reading(shift + noise, counts))
        found = sides[0].moments.mean[0] - sides[1].moments.mean[0]
        error = (sides[0].moments.variance[0] + sides[1].moments.variance[0]).sqrt()
        made = Provenance(
            "planted",
            data={"positive": "a", "negative": "b"},
            n=dict(zip(("positive", "negative"), sizes, strict=True)),
        )
        known = Evidence(shuffled={2: draws_of(sides, trial)})
        directions = Directions({2: found}, "resid_post", made, known)
        axis = Direction.of(mixing[trial % 3] / mixing[trial % 3].norm(), 2)
        truth = float(gap @ axis.vector)
        interval = projection(directions, axis)[2]
        inside.append(interval.low <= truth <= interval.high)
        reach = 1.96 * float((error * axis.vector).norm())
        naive.append(abs(interval.estimate - truth) <= reach)
    assert 0.93 <= np.mean(inside) <= 0.97
    assert np.mean(naive) < 0.85
    with pytest.raises(ValueError, match="nothing is known of the noise of Direction"):
        projection(axis, directions)
