"""Exact influence: additions, ablations, controls; and many directions ranked, then checked."""

from __future__ import annotations

import copy
import importlib
from unittest.mock import patch

import numpy as np
import pytest
import torch

import emlens
from emlens import Ablate, Direction, influence
from emlens.directions import mean_diff, random_direction
from emlens.measures import Influence, InfluenceProfile, InfluenceScan
from emlens.measures.controls import control_directions
from emlens.text import Corpus, Document
from tests.support.data import conversations
from tests.support.models import tiny_hooked

# the package has a function of this name
scan_module = importlib.import_module("emlens.measures.scan")

TEXT = Corpus(
    "rain",
    tuple(
        Document(f"d{i}", f"the rain came and {'then it left ' * (i % 4 + 1)}my friend{' now' * i}")
        for i in range(8)
    ),
)


def direction(model, layer: int = 1, seed: int = 0) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(model.d_model, generator=generator), layer)


def test_ablation_equals_a_plain_loop(hooked_llama):
    x = direction(hooked_llama)
    found = influence(hooked_llama, TEXT, {"x": x}, edit="ablate", controls=2)
    for i, document in enumerate(TEXT.documents):
        (batch,) = hooked_llama.batches(Corpus("one", (document,)))
        logits = [
            hooked_llama.unembed(hooked_llama.hidden(batch, edits)[0])[:-1].log_softmax(-1)
            for edits in ([], [Ablate(x)])
        ]
        kl = float((logits[0].exp() * (logits[0] - logits[1])).sum().detach())
        assert found.kl[0][0][i] == pytest.approx(kl, abs=1e-4)
    assert found.doses == (1.0,)
    assert list(found.table()["direction"]) == ["x", "random"]
    assert "KL(base || edited)" in found.plot().get_ylabel()


def test_norms_are_taken_as_they_are_and_equal_the_doses_of_that_size(hooked_llama):
    x = {"x": direction(hooked_llama)}
    doses = influence(hooked_llama, TEXT, x, doses=(0.1, 0.3), controls=1)
    norms = influence(hooked_llama, TEXT, x, norms=doses.norms["x"], controls=1)
    np.testing.assert_allclose(norms.doses, doses.doses, rtol=1e-6)
    np.testing.assert_allclose(norms.kl, doses.kl, rtol=1e-5, atol=1e-7)


def test_a_direction_cannot_have_the_name_of_its_controls(hooked_llama):
    x = direction(hooked_llama)
    with pytest.raises(ValueError, match="two things are called 'random'; rename one"):
        influence(hooked_llama, TEXT, {"random": x}, doses=(0.2,))
    alone = influence(hooked_llama, TEXT, {"random": x, "x": x}, doses=(0.2,), controls=0)
    assert alone.divergence("random", 0.2) == alone.divergence("x", 0.2)


def test_norms_stay_norms_where_places_differ(hooked_llama):
    pair = {"a": direction(hooked_llama, 0), "b": direction(hooked_llama, 2)}
    found = influence(hooked_llama, TEXT, pair, norms=(0.5, 1.0), controls=1)
    assert np.isnan(found.doses).all()
    assert found.norms["a"] == found.norms["b"] == (0.5, 1.0)
    assert found.groups.keys() == {"random, resid_post 0", "random, resid_post 2"}
    assert found.divergence("a", 1.0).estimate > found.divergence("a", 0.5).estimate
    assert found.plot().get_xlabel() == "norm of what is added"


def test_controls_of_every_kind_have_the_norm_of_the_direction(hooked_llama):
    diff = mean_diff(hooked_llama, conversations("bad", 6), conversations("good", 6))[1]
    kinds = {"random": 2, "activation differences": 3, "shuffled labels": 2}
    found = influence(hooked_llama, TEXT, {"mean-diff": diff}, doses=(0.2,), controls=kinds)
    assert list(found.table()["direction"]) == ["mean-diff", *kinds]
    assert len(found.controls) == 7
    assert {found.norms[name] for name in found.controls} == {found.norms["mean-diff"]}
    parts = [found.divergence(name, 0.2).estimate for name in found.groups["shuffled labels"]]
    assert found.divergence("shuffled labels", 0.2).estimate == pytest.approx(np.mean(parts))


def test_activation_differences_are_differences_of_the_corpus(hooked_llama):
    x = direction(hooked_llama)
    made = control_directions(
        hooked_llama,
        TEXT,
        {"x": x},
        {"activation differences": 4},
        max_tokens=64,
        token_budget=64,
        seed=0,
    )["activation differences"]
    tokens = []
    for batch in hooked_llama.batches(TEXT, max_tokens=64):
        residual = hooked_llama.residuals(batch, 1)[1]
        tokens.append(residual[batch.attention_mask.bool()])
    tokens = torch.cat(tokens)
    differences = (tokens[:, None] - tokens[None]).flatten(0, 1)
    for control in made.values():
        assert (differences - control.vector).norm(dim=1).min() < 1e-4


def test_other_conditions_are_measured_once_beside_the_directions(hooked_llama):
    x = direction(hooked_llama)
    found = influence(
        hooked_llama,
        TEXT,
        {"x": x},
        doses=(0.1, 0.2),
        controls=0,
        conditions={"ablated": [Ablate(x)], "nothing": []},
    )
    alone = influence(hooked_llama, TEXT, {"x": x}, edit="ablate", controls=0)
    assert found.divergence("ablated", 0.1).estimate == pytest.approx(
        alone.divergence("x", 1).estimate, abs=1e-6
    )
    assert found.divergence("nothing", 0.2).estimate == pytest.approx(0, abs=1e-6)
    table = found.table()
    assert list(table["direction"]) == ["x", "x", "ablated", "nothing"]
    assert np.isnan(table["dose"].iloc[2])
    only = influence(hooked_llama, TEXT, {}, conditions={"ablated": [Ablate(x)]})
    assert only.directions == ("ablated",)


def test_short_documents_are_skipped_and_counted(hooked_llama):
    mixed = Corpus("mixed", (Document("one", "rain"), *TEXT.documents, Document("none", "")))
    found = influence(hooked_llama, mixed, {"x": direction(hooked_llama)}, controls=0)
    whole = influence(hooked_llama, TEXT, {"x": direction(hooked_llama)}, controls=0)
    assert (found.skipped, whole.skipped) == (2, 0)
    assert found.counts == (0, *whole.counts)
    assert found.documents == ("one", *whole.documents)
    assert found.kl[0][0][0] == 0
    for dose in found.doses:
        one, other = (part.divergence("x", dose).estimate for part in (found, whole))
        assert one == pytest.approx(other, rel=0.1)
        assert (
            sum(found.kl[0][0]) / sum(found.counts)
            == found.divergence("x", found.doses[0]).estimate
        )
    too_short = Corpus("short", mixed.documents[:1])
    with pytest.raises(ValueError, match="no document has two tokens .see max_tokens."):
        influence(hooked_llama, too_short, {"x": direction(hooked_llama)}, controls=0)
    with pytest.raises(ValueError, match="no document of corpus 'none' has a token"):
        influence(
            hooked_llama, Corpus("none", mixed.documents[-1:]), {"x": direction(hooked_llama)}
        )


def test_single_tokens_are_kept_on_request_and_add_up(hooked_llama, tmp_path):
    x = direction(hooked_llama)
    edits = {"ablated": [Ablate(x)]}
    settings = {"doses": (0.1, 0.3), "controls": 1, "conditions": edits, "token_budget": 40}
    mixed = Corpus("mixed", (Document("one", "rain"), *TEXT.documents))
    found = influence(hooked_llama, mixed, {"x": x}, per_token=True, **settings)
    plain = influence(hooked_llama, mixed, {"x": x}, **settings)
    assert (found.kl, found.losses, found.counts) == (plain.kl, plain.losses, plain.counts)
    for name in ("x", "random 0", "ablated"):
        for place, dose in enumerate(found.doses):
            single = found.tokens(name, dose)
            assert single.names == found.documents and single.skipped == 1
            row = found.directions.index(name)
            assert np.nansum([np.nansum(part) for part in single.kl]) == pytest.approx(
                sum(found.kl[row][place]), rel=1e-5
            )
            change = np.subtract(found.losses[row][place], found.base)
            assert [np.nansum(part) for part in single.loss_change] == pytest.approx(
                change.tolist(), abs=1e-4
            )
    assert "".join(found.texts[1]) == TEXT.documents[0].text
    again = Influence.load(found.save(tmp_path / "influence.json"))
    assert again.tokens("x", 0.3).top(3).equals(found.tokens("x", 0.3).top(3))
    with pytest.raises(ValueError, match=r"no values of single tokens were kept; .*per_token=True"):
        plain.tokens("x", 0.1)
    with pytest.raises(KeyError, match="no direction 'y'; there are x, random 0, ablated"):
        found.tokens("y", 0.1)


def test_a_dose_that_was_not_measured_is_refused(hooked_llama):
    found = influence(hooked_llama, TEXT, {"x": direction(hooked_llama)}, doses=(0.1, 0.2))
    for ask in (found.divergence, found.loss_change):
        with pytest.raises(ValueError, match="nothing was measured at dose 0.4; there is 0.1, 0.2"):
            ask("x", 0.4)
    assert found.divergence("x", 0.1001) == found.divergence("x", 0.1)


@pytest.mark.parametrize("n", [24, 64])
def test_intervals_over_documents_cover_in_simulation(n):
    """Documents differ in length and in how much a direction changes them, as they do in fact."""
    generator = np.random.default_rng(n)

    def corpus_of(n):
        counts = generator.integers(20, 128, n).astype(float)
        return counts * generator.gamma(8.0, 0.01, n), counts

    def measured(kl, counts):
        return Influence(
            directions=("x",),
            constructions={"x": "given"},
            doses=(0.1,),
            norms={"x": (1.0,)},
            kl=((tuple(kl),),),
            losses=((tuple(kl),),),
            base=(0.0,) * len(kl),
            counts=tuple(counts),
            documents=tuple(map(str, range(len(kl)))),
            corpus="simulated",
            controls=(),
        )

    kl, counts = corpus_of(400_000)
    truth = kl.sum() / counts.sum()
    found = [measured(*corpus_of(n)).divergence("x", 0.1) for _ in range(800)]
    assert 0.93 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "clamp"}, "unknown edit 'clamp'; choose 'add' or 'ablate'"),
        ({"norms": [-1.0]}, r"norms\[0\] must be at least 0, not -1"),
        ({"doses": [float("nan")]}, r"doses\[0\] must be a finite number, not nan"),
        ({"controls": {"fair": 2}}, "unknown controls 'fair'; choose 'random', 'activation diff"),
        ({"controls": {"random": -2}}, r"controls\['random'\] must be at least 0, not -2"),
        ({"controls": {"shuffled labels": 2}}, "no direction carries directions under shuffled"),
        ({"conditions": {"x": []}}, "two things are called 'x'; rename one"),
        ({"method": "auto", "edit": "ablate"}, "method='auto' has no edit; use method='exact'"),
        ({"method": "auto", "controls": 2}, "method='auto' has no controls; use method='exact'"),
        ({"method": "auto", "per_token": True}, "method='auto' has no per_token; use method='exa"),
        ({"method": "fast"}, "unknown method 'fast'; choose 'exact' or 'auto'"),
    ],
)
def test_bad_input_is_refused(hooked_llama, options, message):
    with pytest.raises(ValueError, match=message):
        influence(hooked_llama, TEXT, {"x": direction(hooked_llama)}, **options)


def test_a_vector_of_another_width_is_refused(hooked_llama):
    with pytest.raises(ValueError, match="has width 7, but tiny-llama has d_model 32"):
        influence(hooked_llama, TEXT, {"x": Direction.of(torch.ones(7), 1)}, controls=0)


# -- many directions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scanned():
    model = tiny_hooked("llama")
    profile = InfluenceProfile.fit(model, TEXT, draws=64)
    many = {f"random {i}": random_direction(direction(model, i % 3), i) for i in range(12)}
    many |= dict(profile.top(1, k=2))
    found = influence(
        model, TEXT, many, method="auto", profile=profile, doses=(0.05, 0.1, 1.0), check=4
    )
    return model, profile, many, found


def test_a_scan_ranks_by_the_profile_and_checks_leaders_and_a_sample(scanned):
    _, profile, many, found = scanned
    table = found.table()
    assert len(table) == len(many)
    assert list(table["KL [nats/token]"]) == sorted(table["KL [nats/token]"], reverse=True)
    scores = profile.score(many, 0.05).table()
    assert table["KL [nats/token]"].max() == pytest.approx(scores["KL [nats/token]"].max())
    chosen = {(row["direction"], row["chosen"]) for row in found.checked}
    assert len(chosen) == 8
    leaders = {name for name, why in chosen if why == "leader"}
    assert leaders == set(table["direction"][:4])
    assert table["exact KL [nats/token]"].notna().sum() == 8


def test_a_direction_found_on_half_of_the_documents_is_checked_on_the_other(scanned):
    model, profile, many, _ = scanned
    few = {name: many[name] for name in ("top 1", "random 1")}
    found = emlens.measures.scan(model, TEXT, few, profile=profile, doses=(0.05,), check=2)
    exact = influence(model, TEXT, few, doses=(0.05,), controls=0)
    other = exact.among(range(1, len(TEXT), 2))
    assert other.documents == exact.documents[1::2]
    rows = {row["direction"]: row for row in found.checked}
    assert {name: row["held out"] for name, row in rows.items()} == {
        "top 1": True,
        "random 1": False,
    }
    for name, of in (("top 1", other), ("random 1", exact)):
        assert rows[name]["exact"] == pytest.approx(of.divergence(name, 0.05).estimate, rel=1e-5)
    with pytest.raises(ValueError, match="no places were given; give at least one"):
        exact.among([])


def test_a_scan_says_how_far_it_agrees_and_where_the_quadratic_breaks(scanned, tmp_path):
    model, _, many, found = scanned
    at = found.agreement().set_index("dose")
    assert at.loc[0.05, "median relative error"] < 0.25
    assert at.loc[0.05, "Spearman"] > 0.8
    assert at.loc[1.0, "median relative error"] > at.loc[0.05, "median relative error"]
    assert found.holds_to in (0.05, 0.1)
    row = next(row for row in found.checked if row["dose"] == 0.1)
    exact = influence(model, TEXT, {"x": many[row["direction"]]}, doses=(0.1,), controls=0)
    exact = exact.among(range(1, len(TEXT), 2)) if row["held out"] else exact
    assert row["exact"] == pytest.approx(exact.divergence("x", 0.1).estimate, rel=1e-5)
    assert "the quadratic holds within 25% up to dose" in str(found)
    assert InfluenceScan.load(found.save(tmp_path / "scan.json")).checked == found.checked
    assert found.plot().get_xscale() == "log"


def test_a_scan_makes_its_own_profile_and_refuses_what_it_cannot_do(hooked_llama):
    diff = mean_diff(hooked_llama, conversations("bad", 4), conversations("good", 4))
    found = emlens.measures.scan(hooked_llama, TEXT, diff, doses=(0.05,), check=1, draws=2)
    assert {row["layer"] for row in found.scores} == set(diff.layers)
    with pytest.raises(ValueError, match="no directions were given"):
        emlens.measures.scan(hooked_llama, TEXT, {})
    with pytest.raises(ValueError, match="doses must be above zero"):
        emlens.measures.scan(hooked_llama, TEXT, diff, doses=(-0.1,))
    with pytest.raises(ValueError, match="check must be at least 1"):
        emlens.measures.scan(hooked_llama, TEXT, diff, check=0)


def test_a_scan_checks_all_directions_in_one_measurement(scanned):
    model, profile, many, found = scanned
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs["doses"])
        return influence(*args, **kwargs)

    with patch.object(scan_module, "exact_influence", counting):
        again = influence(
            model, TEXT, many, method="auto", profile=profile, doses=(0.05, 0.1, 1.0), check=4
        )
    assert calls == [[0.05, 0.1, 1.0]]
    assert again.checked == found.checked


def test_a_profile_of_another_model_is_refused_and_of_other_text_told(scanned):
    model, profile, _, _ = scanned
    x = {"x": direction(model)}
    renamed = emlens.wrap(model.module, model.tokenizer, name="another")
    influence(renamed, TEXT, x, method="auto", profile=profile, doses=(0.05,), check=1)
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.lm_head.weight[0] += 1
    other = emlens.wrap(module, model.tokenizer, name=model.name)
    with pytest.raises(
        ValueError, match=f"identity: '.*' there, '{other.identity}' now.; fit one of 'tiny-llama'"
    ):
        influence(other, TEXT, x, method="auto", profile=profile)
    acting = model.edited(Ablate(x["x"]))
    with acting, pytest.raises(ValueError, match=r"edits: \[\] there, \['Ablate"):
        influence(model, TEXT, x, method="auto", profile=profile)
    part = Corpus("part", TEXT.documents[:4])
    with pytest.warns(UserWarning, match=r"the profile is of rain, .* on other text \(part\)"):
        influence(model, part, x, method="auto", profile=profile, doses=(0.05,), check=1)
