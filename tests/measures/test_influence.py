"""Exact influence: additions, ablations, controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens import Ablate, Direction, influence
from emlens.directions import mean_diff
from emlens.measures import Influence
from emlens.measures.controls import control_directions
from emlens.text import Corpus, Document
from tests.support.data import conversations

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
    with pytest.raises(ValueError, match="the name 'random' is used twice; rename one"):
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
    assert found.counts.tolist() == [0, *whole.counts]
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
    for name in ("kl", "losses", "counts"):
        assert np.array_equal(getattr(found, name), getattr(plain, name)), name
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
        ({"conditions": {"x": []}}, "the name 'x' is used twice; rename one"),
    ],
)
def test_bad_input_is_refused(hooked_llama, options, message):
    with pytest.raises(ValueError, match=message):
        influence(hooked_llama, TEXT, {"x": direction(hooked_llama)}, **options)


def test_a_vector_of_another_width_is_refused(hooked_llama):
    with pytest.raises(ValueError, match="has width 7, but tiny-llama has d_model 32"):
        influence(hooked_llama, TEXT, {"x": Direction.of(torch.ones(7), 1)}, controls=0)
