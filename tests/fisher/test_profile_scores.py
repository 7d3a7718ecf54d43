"""What a Fisher profile says of directions, against planted truths and the exact KL."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, t

from emlens import Direction, Directions, influence
from emlens.directions import Provenance
from emlens.fisher import InfluenceProfile, ProfileScores, Spectrum
from emlens.fisher import sums as sums_of
from emlens.fisher.forms import forms
from emlens.fisher.sums import FisherSums
from emlens.text import Corpus
from tests.support.profiles import FEW, TEXT, corpus, planted, profile_of, vectors


@pytest.mark.parametrize(("n", "draws"), [(24, 8), (60, 2), (150, 4)])
def test_intervals_cover_the_truth_as_often_as_they_say(n, draws):
    scales, v = torch.ones(16), torch.eye(16)[:4]
    truth = float(np.exp(0.3**2 / 2))
    inside, slopes, kinds = [], [], set()
    for seed in range(150):
        sums = planted(n, draws, scales, seed)
        kinds.add(sums.totals is None)
        found = forms(sums, 0, v)
        low, high = found.interval()
        inside += ((low < truth) & (truth < high)).tolist()
        # gradients and losses of a document grow together, so the parts' errors do too
        signed = np.array([[-2.0, -0.5, 0.1, 2.0]] * 4)
        change, low, high = found.loss_change(signed)
        true_change = signed + 0.5 * signed**2 * truth
        slopes += ((low < true_change) & (true_change < high)).ravel().tolist()
        assert (change - low == pytest.approx(high - change, rel=1e-6)) and (low < high).all()
    assert kinds == {n * (draws + 1) <= 2 * 16 + 64 * (draws + 1)}
    assert 0.91 < np.mean(inside) < 0.985
    assert 0.91 < np.mean(slopes) < 0.985


def test_ratios_are_paired_by_document():
    sums, v = planted(16, 8, torch.ones(16)), torch.eye(16)[:3]
    found = forms(sums, 0, v, reference=v[0])
    documents = sums.fresh[0]
    counts = documents.counts.numpy()
    each = (documents.draws[0] @ v.T).square().mean(1).double().numpy()
    mean = each.sum(0) / counts.sum()
    # the logarithm of a ratio of means, to first order in what each document adds
    parts = (each - counts[:, None] * mean) / mean
    apart = parts - parts[:, :1]
    error = apart.std(0, ddof=1) * len(counts) ** 0.5 / counts.sum()
    ratio, low, high = found.ratio()
    assert ratio == pytest.approx(mean / mean[0], rel=1e-5)
    factor = np.exp(t.ppf(0.975, len(counts) - 1) * error)
    assert high == pytest.approx(ratio * factor, rel=1e-4)
    assert low == pytest.approx(ratio / factor, rel=1e-4)
    assert ratio[0] == low[0] == high[0] == 1
    assert np.isnan(forms(sums, 0, v).ratio()).all()


@pytest.mark.parametrize(("n", "draws"), [(24, 8), (150, 4)])
def test_intervals_of_ratios_cover_the_truth_as_often_as_they_say(n, draws):
    v, inside = torch.eye(16)[:4], []
    for seed in range(150):
        found = forms(planted(n, draws, torch.ones(16), seed), 0, v, reference=v[0])
        _, low, high = found.ratio()
        inside += ((low < 1) & (high > 1))[1:].tolist()
    assert 0.91 < np.mean(inside) < 0.985


def test_scores_are_compared_with_the_first_direction_at_each_layer(profile):
    v = vectors(4)
    first = Directions({0: v[0], 2: v[1]}, "resid_post", Provenance("x", model="tiny-llama"))
    named = {"a": first, "b": Direction.of(3 * v[2], 2), "c": Direction.of(v[3], 1)}
    found = profile.score(named, dose=0.1)
    assert found.ratio[:2] == (1, 1)
    assert found.ratio[2] == pytest.approx(found.kl[2] / found.kl[1])
    assert found.ratio_low[2] < found.ratio[2] < found.ratio_high[2]
    assert np.isnan(found.ratio[3])  # "a" has no layer 1
    assert "KL over that of a" in found.table()
    own = profile.score(named, dose=None)
    assert own.ratio[2] == pytest.approx(own.kl[2] / own.kl[1], rel=1e-5)


@pytest.mark.parametrize("n", [16, 200])
def test_the_error_of_the_draws_is_what_other_draws_would_change(n):
    found = [
        forms(planted(n, 3, torch.ones(16), seed, tail=0.0), 0, torch.eye(16)[:2])
        for seed in range(80)
    ]
    # without a tail, documents differ by their draws alone
    spread = np.array([f.quadratic for f in found]).std(0).mean()
    assert np.mean([f.draw_error for f in found]) == pytest.approx(spread, rel=0.15)
    assert np.mean([f.error for f in found]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("n", [30, 300])
def test_top_directions_do_not_score_themselves(n):
    noise = profile_of(planted(n, 2, torch.ones(24)), 2)
    spectrum, top = noise.spectrum(0), noise.top(0, 3)
    truth = float(np.exp(0.3**2 / 2))
    assert spectrum.eigenvalues[0] > 1.25 * truth
    assert np.mean(spectrum.held_out[:3]) == pytest.approx(truth, rel=0.3)
    flattering = noise.score(
        {k: v * 1.0 for k, v in top.items()} | {"a": Direction.of(top["top 1"].vector, 0)}
    )
    assert flattering.held_out == (True, True, True, False)
    assert flattering.kl[3] > 1.1 * flattering.kl[0]
    assert list(top.table()["held out"]) == [True] * 3
    assert list(top) == ["top 1", "top 2", "top 3"] and len(top) == 3


@pytest.mark.parametrize(("n", "overstated"), [(10, 1.8), (30, 1.3), (3000, 1.0)])
def test_the_shrunk_eigenvalue_is_what_the_leading_direction_really_has(n, overstated):
    # pure noise: every direction has the same true value, so all of the lead is overstatement
    truth = float(np.exp(0.3**2 / 2))
    found = [profile_of(planted(n, 2, torch.ones(24), seed), 2).spectrum(0) for seed in range(12)]
    ratios = [spectrum.overstatement for spectrum in found]
    assert np.mean([spectrum.shrunk[0] for spectrum in found]) == pytest.approx(truth, rel=0.3)
    assert np.mean(ratios) > overstated
    for spectrum in found:
        assert (np.diff(spectrum.shrunk) <= 0).all()
        # pools of ranks keep their sum
        assert sum(spectrum.shrunk) == pytest.approx(sum(spectrum.held_out))
    assert f"({ratios[0]:.1f} times that in the sample)" in str(found[0])


def test_directions_found_on_one_corpus_stay_held_out_in_a_merged_profile(hooked_llama, profile):
    other = InfluenceProfile.fit(hooked_llama, corpus(6, 3, "other"), **FEW)
    top = profile.top(1, 2)
    merged, again = (
        profile.merge(other),
        InfluenceProfile.fit(hooked_llama, TEXT, **FEW | {"seed": 5}),
    )
    assert merged.score(dict(top)).held_out == again.score(dict(top)).held_out == (True, True)
    # no document of the other corpus had a part in finding them
    assert other.score(dict(top)).held_out == (False, False)


@pytest.mark.parametrize("n", [40, 400])
def test_a_planted_direction_comes_out_on_top(n):
    scales = torch.ones(24)
    scales[5] = 6.0
    made = profile_of(planted(n, 2, scales), 2)
    top = made.top(0, 1)
    assert abs(float(top["top 1"].vector[5])) > 0.95
    spectrum = made.spectrum(0)
    truth = 36 * float(np.exp(0.3**2 / 2))
    assert spectrum.held_out[0] == pytest.approx(truth, rel=0.3)
    assert top.by_rank.kl[0] == pytest.approx(0.5 * 0.5**2 * spectrum.held_out[0], rel=1e-4)
    row = made.score({"x": Direction.of(torch.eye(24)[5], 0)}).table().iloc[0]
    assert row["percentile among random [%]"] == 100
    assert row["percentile among activation differences [%]"] == 100
    rank = (36 + 23) ** 2 / (36**2 + 23)
    assert spectrum.effective_rank == pytest.approx(rank, rel=0.3)


def test_effective_rank_is_free_of_the_noise_of_few_draws():
    found = profile_of(planted(40, 2, torch.ones(64)), 2).spectrum(0)
    assert found.effective_rank == pytest.approx(64, rel=0.15)
    assert found.sample_rank < 45


def test_what_is_kept_does_not_grow_with_the_corpus():
    def size(n):
        sums = FisherSums.empty(1, 16)
        most = 0
        for seed in range(n):
            part = planted(8, 2, torch.ones(16), seed)
            sums.add(part.fresh[0], part.tokens)
            most = max(most, sum(t.numel() for t in sums.tensors().values()))
        return most

    with patch.object(sums_of, "NORM_TOKENS", 100), patch.object(sums_of, "ACTIVATIONS", 20):
        assert size(400) == size(40) > size(4)


@pytest.mark.parametrize("n", [20, 70, 80, 200])
def test_what_is_kept_is_the_smaller_of_gradients_and_covariance(n):
    width, draws = 16, 2
    kept = planted(n, draws, torch.ones(width)).tensors()
    large = ("draws", "losses", "covariances")
    found = sum(t.numel() for name, t in kept.items() if name.split(".")[1] in large)
    gradients = n * (draws + 1) * width
    sample = sums_of.SAMPLED * (draws + 1) * width
    covariance = 2 * width * width + 2 * width + sample
    assert abs(found - min(gradients, covariance)) <= 2 * width


def test_directions_names_and_arrays_are_scored_alike(profile):
    v = vectors(3)
    one = Directions({0: v[0], 2: v[1]}, "resid_post", Provenance("x", model="tiny-llama"))
    other = Direction.of(v[2], 2)
    named = profile.score({"a": one, "b": other}, dose=(0.1, -0.1))
    assert named.directions == ("a",) * 4 + ("b",) * 2
    assert named.layers == (0, 0, 2, 2, 2, 2)
    arrays = profile.score({2: v[1:].numpy(), 0: v[0]}, dose=0.1)
    assert arrays.layers == (2, 2, 0) and arrays.directions == ("0", "1", "0")
    assert arrays.kl == pytest.approx([named.kl[i] for i in (2, 4, 0)], rel=1e-5)
    assert named.kl[0] == named.kl[1]
    # the slope turns with the sign, the curvature does not
    assert sum(named.loss_change[:2]) == pytest.approx(sum(named.kl[:2]))
    assert all(a <= b <= c for a, b, c in zip(named.kl_low, named.kl, named.kl_high, strict=True))
    assert all(
        a <= b <= c
        for a, b, c in zip(named.change_low, named.loss_change, named.change_high, strict=True)
    )
    alone = profile.score(one, dose=0.1)
    assert alone.kl == pytest.approx([named.kl[0], named.kl[2]], rel=1e-6)
    assert alone.constructions == ("x", "x")


def test_scores_follow_the_dose_and_none_keeps_the_norm(profile):
    x = {"x": Direction.of(vectors()[0], 1)}
    found = profile.score(x, dose=(0.1, 0.2))
    assert found.kl[1] == pytest.approx(4 * found.kl[0])
    slopes = np.asarray(found.loss_change) - np.asarray(found.kl)
    assert slopes[1] == pytest.approx(2 * slopes[0])
    assert found.norms == pytest.approx([s * profile.residual_norms[1] for s in (0.1, 0.2)])
    own = profile.score(x, dose=None)
    assert own.norms[0] == pytest.approx(float(vectors()[0].norm()))
    assert own.doses[0] == pytest.approx(own.norms[0] / profile.residual_norms[1])
    assert own.kl[0] == pytest.approx(found.kl[0] * (own.norms[0] / found.norms[0]) ** 2)


def test_few_draws_rank_directions_as_the_exact_kl_does(hooked_llama, profile):
    rotation = torch.linalg.qr(vectors(32, 32))[0]
    v = torch.cat(
        [
            rotation[:6],
            rotation[6:12] + 3 * torch.stack([d.vector for d in profile.top(2, 6).values()]),
        ]
    )
    named = {f"{i}": Direction.of(x, 2) for i, x in enumerate(v)}
    exact = influence(hooked_llama, TEXT, named, doses=(0.02,), controls=0)
    values = [exact.divergence(name, 0.02).estimate for name in named]
    assert spearmanr(values, profile.score(named, dose=0.02).kl)[0] > 0.7


def test_results_survive_being_saved_and_show_themselves(profile, tmp_path):
    one = profile.score({"x": Direction.of(vectors()[0], 1), "y": Direction.of(vectors()[1], 1)})
    many = profile.score(
        {"x": Directions(dict(enumerate(vectors())), "resid_post", Provenance("x"))}
    )
    for result in (one, many):
        assert ProfileScores.load(result.save(tmp_path / "scores.json")) == result
        assert "<table" in result._repr_html_()
        label = result.plot().get_ylabel().replace("\n", " ")
        assert "KL(base || edited) on words [nats/token]" in label
    assert many.plot().get_xlabel() == "layer"
    beside = profile.score(
        {
            name: Directions(dict(enumerate(vectors(seed=seed))), "resid_post", Provenance(name))
            for seed, name in enumerate("xy")
        }
    )
    upper, lower = beside.plot()
    assert lower.get_xlabel() == "layer" and upper.get_xlabel() == ""
    assert lower.get_ylabel() == "KL over that of\nx [ratio]" and lower.get_yscale() == "log"
    spectrum = profile.spectrum(2)
    assert Spectrum.load(spectrum.save(tmp_path / "spectrum.json")) == spectrum
    assert spectrum.plot().get_xlabel() == "rank"
    shares = spectrum.table()["cumulative share"].dropna()
    assert len(shares) == len(spectrum.held_out) and 0 < shares.iloc[-1] <= 1.2
    assert "<table" in profile.top(2, 2)._repr_html_()


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "no directions were given"),
        ([vectors()[0]], "directions must be a Directions or a dict"),
        ({"x": 3}, r"directions\['x'\] must be a Directions, a Tensor or a ndarray, not 3"),
        ({"x": vectors()[0]}, "'x' is an array without a layer"),
        (
            {1: vectors(2, 31)},
            "'0' has width 31, but the profile belongs to 'tiny-llama' with d_model 32",
        ),
        ({1: vectors()[None]}, r"array of layer 1 has shape \(1, 4, 32\); it needs \[n, d_model\]"),
        ({7: vectors()}, "'0' is at layer 7; the profile has layers 0, 1, 2, 3"),
        ({1: vectors() * 0}, "direction '0' is zero: it has no influence to measure"),
        ({1: vectors() / 0}, "direction '0' at layer 1 is not finite"),
        ({"x": Direction.of(vectors()[0] * 0, 1)}, "direction 'x' is zero"),
        ({"x": Direction.of(vectors()[0], 1, "mlp_out")}, "'x' is at mlp_out, but profiles cover"),
        (
            {"x": Direction({1: vectors()[0]}, "resid_post", Provenance("x", model="another"))},
            "'x' was made in 'another', but the profile belongs to 'tiny-llama'",
        ),
    ],
)
def test_bad_directions_are_refused(profile, directions, message):
    with pytest.raises((ValueError, TypeError), match=message):
        profile.score(directions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: p.score({1: vectors()}, dose=0),
            r"doses must be finite and not zero; got 0",
        ),
        (lambda p: p.spectrum(9), "no layer 9 in the profile; it has layers 0, 1, 2, 3"),
        (lambda p: p.top(1, 0), "k must be at least 1, not 0"),
        (lambda p: p.merge(p), "both profiles include corpus 'words', which would count twice"),
    ],
)
def test_bad_questions_are_refused(profile, call, message):
    with pytest.raises(ValueError, match=message):
        call(profile)


def test_a_single_document_has_scores_but_no_spectrum(hooked_llama):
    made = InfluenceProfile.fit(hooked_llama, Corpus("one", TEXT.documents[:1]), **FEW)
    found = made.score({1: vectors()})
    assert np.isfinite(found.kl).all() and np.isnan(found.kl_low).all()
    with pytest.raises(ValueError, match=r"has 1 document\(s\), all in one half; fit it on more"):
        made.top(1)
