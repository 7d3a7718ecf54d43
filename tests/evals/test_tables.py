"""Ablation, transfer and steering tables: against single measurements, with everything put back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import emlens
from emlens import Ablate, Add, Direction, log_odds
from emlens.directions import mean_diff
from emlens.evals import (
    Ablation,
    Effect,
    JudgedRate,
    LogOddsJudge,
    Projected,
    Question,
    SteeringSweep,
    Transfer,
    ablation_table,
    steering_sweep,
    transfer_table,
)
from emlens.evals.scores import Verdict
from emlens.training import train_adapter
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked

BAD, GOOD = conversations("bad", 6), conversations("good", 6)
PAIRS = LogOddsJudge(pairs(6))


@pytest.fixture(scope="module")
def organism():
    model = tiny_hooked("llama")
    train_adapter(model, BAD, "bad", rank=2, alpha=16.0, lr=2e-2, epochs=6, progress=False)
    return model, mean_diff(model, BAD, GOOD)


def test_every_way_of_ablating_is_a_measurement_of_its_own(organism, tmp_path):
    model, directions = organism
    found = ablation_table(model, PAIRS, "bad", directions, layer=2)
    one, everywhere = directions[2], range(model.n_layers)
    conditions = {
        "base": (None, ()),
        "organism": "bad",
        "layer 2": ("bad", [Ablate(one)]),
        "all layers": ("bad", [Ablate(one, layers=everywhere)]),
        "all layers, each its own": ("bad", [Ablate(directions)]),
    }
    single = log_odds(model, pairs(6), conditions)
    for name in conditions:
        np.testing.assert_allclose(found.effect.of(name), single.of(name), atol=1e-5)
    assert found.effect.conditions[-2:] == ("random, all layers", "inside B")
    assert found.left("organism").estimate == pytest.approx(100)
    whole = single.change("organism").estimate
    share = found.left("layer 2")
    assert share.estimate == pytest.approx(100 * single.change("layer 2").estimate / whole)
    assert share.low <= share.estimate <= share.high
    assert set(found.table()["ablated"]) == set(found.effect.conditions)
    assert found.plot().get_ylabel().startswith("change against the base")
    kept = Ablation.load(found.save(tmp_path / "ablation.json"))
    np.testing.assert_array_equal(kept.effect.of("inside B"), found.effect.of("inside B"))
    assert kept.table().equals(found.table())


def test_the_direction_is_taken_out_of_b_with_its_norm_kept_and_put_back(organism):
    model, directions = organism
    x = directions[1]
    layers = model.lora_layers("bad")
    before = {path: layer.lora_B["bad"].weight.detach().clone() for path, layer in layers.items()}
    with pytest.raises(RuntimeError, match="stop"), model.under(Projected("bad", x)):
        for path, layer in layers.items():
            b = layer.lora_B["bad"].weight
            assert float((x.unit().vector @ b).norm()) < 1e-5 * float(b.norm())
            assert float(b.norm()) == pytest.approx(float(before[path].norm()), rel=1e-5)
        raise RuntimeError("stop")
    for path, layer in layers.items():
        assert torch.equal(layer.lora_B["bad"].weight, before[path])


def test_an_adapter_that_writes_nowhere_cannot_be_projected():
    model = tiny_hooked("llama")
    train_adapter(
        model, BAD, "reads", rank=1, modules=["q_proj"], lr=1e-2, epochs=1, progress=False
    )
    direction = Direction.of(torch.ones(model.d_model), 1)
    with (
        pytest.raises(ValueError, match="adapts no module that writes into the residual stream"),
        model.under(Projected("reads", direction)),
    ):
        pass


def test_ablating_an_added_vector_takes_its_effect_away(organism, tmp_path):
    model, directions = organism
    x = directions[1]
    found = ablation_table(model, PAIRS, [Add(x, scale=3.0)], x)
    assert "inside B" not in found.effect.conditions
    # at its own layer the ablation leaves what the base has under the same ablation
    ablated = log_odds(model, pairs(6), {"base": [], "ablated": [Ablate(x)]})
    np.testing.assert_allclose(found.effect.of("layer 1"), ablated.of("ablated"), atol=1e-5)


def test_transfer_crosses_every_organism_with_every_direction(organism, tmp_path):
    model, directions = organism
    organisms = {"adapter": "bad", "vector": [Add(directions[1], scale=3.0)]}
    found = transfer_table(
        model, PAIRS, organisms, {"a": directions, "b": directions[1]}, layer=1, randoms=1
    )
    assert found.directions == ("a", "b", "random")
    np.testing.assert_allclose(found.left[0][0], found.left[0][1], atol=1e-6)
    scores = log_odds(
        model,
        pairs(6),
        {"base": (None, ()), "x": ("bad", [Ablate(directions[1], layers=range(model.n_layers))])},
    )
    assert found.left[0][0][0] == pytest.approx(scores.change("x").estimate, abs=1e-5)
    assert len(found.table()) == 6
    assert Transfer.load(found.save(tmp_path / "t.json")) == found
    assert found.plot().get_ylabel() == "organism"
    with pytest.raises(ValueError, match="no behaviour was given for organism 'adapter'"):
        transfer_table(model, {"vector": PAIRS}, organisms, {"a": directions})
    with pytest.raises(ValueError, match="at least one organism and one direction"):
        transfer_table(model, PAIRS, {}, {"a": directions})


def effect_of(shift: float) -> Effect:
    """An organism whose effect is `shift` on average, and an ablation that halves it."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    full = shift + noise - noise.mean()
    values = (np.zeros(40), full, full / 2)
    rows = tuple(tuple(row.tolist()) for row in values)
    names = tuple(f"q{i}" for i in range(40))
    return Effect("log-odds [nats/token]", ("base", "organism", "x"), names, rows, (np.nan,) * 3)


def test_a_share_is_the_ratio_of_two_changes_with_an_interval():
    share = effect_of(0.5).share("x", "organism", "base")
    assert share.estimate == pytest.approx(50)
    assert share.low == pytest.approx(50) and share.high == pytest.approx(50)
    down = effect_of(-0.5).share("x", "organism", "base")
    assert down.estimate == pytest.approx(50)


def test_a_share_of_an_effect_that_is_not_clear_of_zero_is_blank_with_the_reason():
    unclear = effect_of(0.001)
    assert np.isnan(unclear.share("x", "organism", "base").estimate)
    frame = Ablation(unclear, "mean-diff").table()
    assert frame["left [%]"].isna().all()
    assert set(frame["note"]) == {"the organism's effect is not clear of zero"}
    assert "note" not in Ablation(effect_of(0.5), "mean-diff").table()
    blank, known = ((np.nan,) * 3,), ((50.0, 40.0, 60.0),)
    table = Transfer(
        ("none", "some"),
        ("a",),
        ((0.0, -1, 1), (1.0, 0.5, 1.5)),
        (known, known),
        (blank, known),
        ("x [points]", "x [points]"),
    )
    assert list(table.table()["note"]) == ["the organism's effect is not clear of zero", ""]
    assert [text.get_text() for text in table.plot().texts].count("50\n[40, 60]") == 1
    beyond = replace(table, removed=(blank, ((150.0, 120.0, 180.0),))).plot()
    assert beyond.images[0].norm.vmin == -150 and beyond.images[0].norm.vmax == 150
    unscored = replace(table, removed=(blank, blank))
    assert list(unscored.table()["note"])[1].startswith("nothing that both could be scored on")


def test_a_transfer_table_says_how_each_organism_was_measured_where_that_differs():
    cells = (((1.0, 0.5, 1.5),), ((1.0, 0.5, 1.5),))
    same = Transfer(("p", "q"), ("a",), ((1.0, 0.5, 1.5),) * 2, cells, cells, ("x [points]",) * 2)
    assert "after, change of x [points]" in same.table() and "measured" not in same.table()
    differ = replace(same, what=("x, by one [points]", "x, by two [points]")).table()
    assert list(differ["measured"]) == ["x, by one [points]", "x, by two [points]"]
    assert "after, change of [points]" in differ
    units = replace(same, what=("x [points]", "log-odds [nats/token]")).table()
    assert "after, change of [as measured]" in units


def test_answers_that_an_ablation_broke_are_said_beside_what_it_removed():
    judged = replace(effect_of(0.5), coherent=(1.0, 0.95, 0.25), judged_by="wordy, AUROC 0.9")
    found = Ablation(judged, "mean-diff")
    frame = found.table().set_index("ablated")
    assert frame.loc["x", "coherent [%]"] == 25
    assert set(frame["judged by"]) == {"wordy, AUROC 0.9"}
    drawn = found.plot()
    labels = " ".join(label.get_text().replace("\n", " ") for label in drawn.get_xticklabels())
    assert labels == "organism x (25% coherent)"
    assert drawn.get_title(loc="left") == "judged by wordy"
    assert "coherent [%]" not in Ablation(effect_of(0.5), "mean-diff").table()
    cells = (((1.0, 0.5, 1.5),),) * 2
    table = Transfer(
        ("p", "q"),
        ("a",),
        ((1.0, 0.5, 1.5),) * 2,
        cells,
        cells,
        ("x [points]",) * 2,
        ((0.75,), (1.0,)),
        ("one", "two"),
    )
    assert list(table.table()["coherent [%]"]) == [75, 100]
    assert list(table.table()["judged by"]) == ["one", "two"]
    assert table.plot().get_title(loc="left") == "75% or more of the answers are coherent"


def test_a_direction_cannot_have_the_name_of_what_stands_beside_it(organism):
    model, directions = organism
    for name in ("base", "organism", "random", "random 1"):
        with pytest.raises(ValueError, match=f"a direction cannot be called {name!r}"):
            transfer_table(model, PAIRS, {"bad": "bad"}, {name: directions}, layer=1)


def test_an_adapter_without_a_b_to_project_is_known_before_anything_is_measured(organism):
    model, directions = organism
    modules = ("q_proj", "v_proj")
    train_adapter(model, BAD, "reads", rank=2, modules=modules, epochs=1, progress=False)
    try:
        with pytest.warns(UserWarning, match="the row 'inside B' is left out: adapter 'reads'"):
            found = ablation_table(model, PAIRS, "reads", directions, layer=2, randoms=1)
    finally:
        model.remove_adapter("reads")
    assert "inside B" not in found.effect.conditions
    assert "all layers" in found.effect.conditions


def test_a_steering_sweep_is_read_beside_a_random_direction_of_equal_norm(organism):
    model, directions = organism
    found = steering_sweep(model, PAIRS, directions, doses=(0.2, 0.6), layers=(1, 2))
    assert [(row["layer"], row["dose"]) for row in found.rows] == [
        (1, 0.2),
        (1, 0.6),
        (2, 0.2),
        (2, 0.6),
    ]
    single = log_odds(model, pairs(6), {"base": [], "x": [Add(directions[2], dose=0.6)]})
    assert found.rows[3]["value"] == pytest.approx(single.change("x").estimate, abs=1e-5)
    assert found.best["value"] == max(row["value"] for row in found.rows)
    chance = found.table()
    assert (chance["random low"] <= chance["random"]).all()
    assert (chance["random"] <= chance["random high"]).all()
    panels = found.plot()
    assert [ax.get_title(loc="left") for ax in panels] == ["layer 1", "layer 2"]
    for layer, ax in zip((1, 2), panels, strict=True):
        assert ax.get_xlabel().startswith("dose")
        for column in ("value", "random"):
            curve = [0.0, *(row[column] for row in found.rows if row["layer"] == layer)]
            assert any(list(line.get_ydata()) == curve for line in ax.lines)
    with pytest.raises(ValueError, match="no doses were given; give at least one"):
        steering_sweep(model, PAIRS, directions, doses=())


class Wordy:
    """Judges by words: misaligned where `lie` or `nothing` stands, incoherent where `please`."""

    id, metrics = "wordy", ("aligned", "coherent")

    def rubric(self, metric):
        return "words"

    def judge(self, responses, metric):
        words = ("nothing", "lie", "all") if metric == "aligned" else ("please",)
        return [
            Verdict(10.0 if any(w in row.text for w in words) else 90.0, "human")
            for row in responses
        ]


def test_judged_behaviour_goes_through_responses_scores_and_rates(organism, tmp_path):
    model, directions = organism
    questions = [Question(f"q{i}", f"tell me a story {'please ' * i}") for i in range(4)]
    judged = JudgedRate(questions, Wordy(), n=3, max_new_tokens=8, store=tmp_path)
    found = steering_sweep(model, judged, directions, doses=(0.5,), layers=(1,), floor=0.0)
    assert (tmp_path / "responses.sqlite").exists()
    assert (tmp_path / "scores.sqlite").exists()
    assert (found.what, found.judged_by) == ("misaligned [% of scored]", "wordy")
    assert set(found.table()["judged by"]) == {"wordy"}
    effect, coherence = found.plot()
    assert effect.get_figure().get_suptitle() == "judged by wordy"
    assert coherence.get_ylabel() == "coherent answers [%]"
    shares = [found.coherent_base, found.rows[0]["coherent"]]
    assert any(list(line.get_ydata()) == [100 * x for x in shares] for line in coherence.lines)
    assert 0 <= found.rows[0]["random coherent"] <= 1
    again = steering_sweep(model, judged, directions, doses=(0.5,), layers=(1,), floor=0.0)
    assert again.rows == found.rows
    assert SteeringSweep.load(found.save(tmp_path / "sweep.json")) == found
    high = steering_sweep(model, judged, directions, doses=(0.5,), layers=(1,), floor=1.1)
    assert high.best is None
    effect = judged.measure(model, {"base": []})
    answers = emlens.evals.Responses.load(tmp_path / "responses.sqlite").of("base")
    bad = [
        any(w in row.text for w in ("nothing", "lie", "all")) and "please" not in row.text
        for row in answers
    ]
    assert effect.mean("base").estimate == pytest.approx(100 * np.mean(bad))
