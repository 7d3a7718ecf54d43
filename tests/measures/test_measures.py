"""Log-odds and influence against plain loops and closed forms; what all results can do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emlens import Add, Direction, efficiency, influence, log_odds, stability
from emlens.hooked import response_losses
from emlens.measures import Efficiency, Influence, LogOdds, Stability
from emlens.text import Corpus, Document, pack, tokenize
from emlens.text.tokens import tokenize_documents
from tests.support.data import conversations, pairs

TEXT = Corpus(
    "words",
    tuple(
        Document(f"d{i}", text)
        for i, text in enumerate(
            ["the rain came and then it left", "eat fruit", "a story about sun and rain please"]
        )
    ),
)


def direction(model, layer=1, seed=0, size=3.0):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction.of(size * vector / vector.norm(), layer, residual_norm=10.0)


def log_prob(model, conversation, edits=()):
    sums, counts = response_losses(model, pack(tokenize([conversation], model.tokenizer)), edits)
    return -float(sums / counts)


def test_log_odds_equal_a_plain_loop_over_pairs(hooked_llama):
    data, edit = pairs(5), Add(direction(hooked_llama))
    found = log_odds(hooked_llama, data, {"base": [], "edited": [edit]}, token_budget=60)
    for i, pair in enumerate(data):
        for name, edits in (("base", []), ("edited", [edit])):
            expected = log_prob(hooked_llama, pair.conversation("misaligned"), edits) - log_prob(
                hooked_llama, pair.conversation("aligned"), edits
            )
            assert found.of(name)[i] == pytest.approx(expected, abs=1e-5)


def test_changes_are_paired_and_by_domain(hooked_llama):
    data = pairs(4, "here") + pairs(3, "there")
    found = log_odds(hooked_llama, data, {"base": [], "edited": [Add(direction(hooked_llama))]})
    change = found.change("edited", ["there"])
    expected = found.of("edited", ["there"]) - found.of("base", ["there"])
    assert change.estimate == pytest.approx(expected.mean())
    assert change.low <= change.estimate <= change.high
    assert found.change("base").estimate == 0
    table = found.table()
    assert list(table["pairs"]) == [4, 3, 4, 3]
    with pytest.raises(KeyError, match="no condition 'x'; there are base, edited"):
        found.of("x")
    with pytest.raises(KeyError, match=r"the domains are \['here', 'there'\]"):
        found.of("base", ["nowhere"])


def test_controls_can_be_averaged_pair_by_pair(hooked_llama):
    conditions = {
        "base": [],
        "random 0": [Add(direction(hooked_llama, seed=1))],
        "x": [Add(direction(hooked_llama, seed=2))],
        "random 1": [Add(direction(hooked_llama, seed=3))],
    }
    found = log_odds(hooked_llama, pairs(4), conditions)
    mean = found.averaged("random", ["random 0", "random 1"])
    assert mean.conditions == ("base", "random", "x")
    expected = (found.of("random 0") + found.of("random 1")) / 2
    assert np.allclose(mean.of("random"), expected)
    assert np.array_equal(mean.of("x"), found.of("x"))


def test_log_odds_of_a_model_that_prefers_neither_are_zero(hooked_llama):
    same = [type(p)(p.prompt, p.aligned, p.aligned, p.domain, p.id) for p in pairs(3)]
    assert np.allclose(log_odds(hooked_llama, same).of("base"), 0, atol=1e-6)


def test_influence_equals_a_plain_loop_over_documents(hooked_llama):
    x = direction(hooked_llama)
    found = influence(hooked_llama, TEXT, {"x": x}, doses=(0.1, 0.5), controls=1, token_budget=20)
    norm = found.norms["x"][1]
    rows = tokenize_documents(TEXT.documents, hooked_llama.tokenizer)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            block = hooked_llama.module.model.layers[1]
            base = hooked_llama.module(input_ids=ids).logits[0, :-1].log_softmax(-1)
            shift = x.scaled_to(norm).vector
            hook = block.register_forward_hook(lambda _m, _i, out, s=shift: out + s)
            edited = hooked_llama.module(input_ids=ids).logits[0, :-1].log_softmax(-1)
            hook.remove()
        kl = float((base.exp() * (base - edited)).sum())
        loss = -float(edited.gather(1, ids[0, 1:, None]).sum())
        assert found.kl[0][1][i] == pytest.approx(kl, abs=1e-4)
        assert found.losses[0][1][i] == pytest.approx(loss, abs=1e-4)
        assert found.counts[i] == len(row.input_ids) - 1
    expected = sum(found.kl[0][1]) / sum(found.counts)
    assert found.divergence("x", 0.5).estimate == pytest.approx(expected)


def test_a_dose_of_zero_has_no_influence_and_controls_have_equal_norm(hooked_llama):
    found = influence(
        hooked_llama, TEXT, {"x": direction(hooked_llama)}, doses=(0.0, 0.2), controls=2
    )
    assert found.divergence("x", 0.0).estimate == pytest.approx(0, abs=1e-6)
    assert found.loss_change("x", 0.0).estimate == pytest.approx(0, abs=1e-6)
    assert found.norms["random 0"] == found.norms["x"]
    table = found.table()
    assert list(table["direction"].unique()) == ["x", "random"]
    assert found.divergence("random", 0.2).estimate > 0


@pytest.mark.parametrize("kind", [LogOdds, Efficiency, Stability, Influence])
def test_results_survive_being_saved_and_show_themselves(hooked_llama, tmp_path, kind):
    x, data = {"x": direction(hooked_llama)}, conversations("bad", 3)
    found = {
        LogOdds: lambda: log_odds(hooked_llama, pairs(3), {"base": [], "x": [Add(x["x"])]}),
        Efficiency: lambda: efficiency(hooked_llama, data, x, norms=[0, 1]),
        Stability: lambda: stability(hooked_llama, data, x, epsilons=(0.5,), seeds=2),
        Influence: lambda: influence(hooked_llama, TEXT, x, doses=(0.1, 0.2)),
    }[kind]()
    again = kind.load(found.save(tmp_path / "result.json"))
    assert again == found
    assert again.table().equals(found.table())
    assert "<table" in found._repr_html_()
    assert found.plot().get_ylabel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: log_odds(m, []), "pairs is empty; give at least one Pair"),
        (lambda m, x: influence(m, Corpus("none", ()), {"x": x}), "corpus 'none' has no documents"),
        (lambda m, x: influence(m, TEXT, {"x": x * 0}), "direction 'x' is zero"),
        (
            lambda m, x: influence(m, TEXT, {"x": x * float("nan")}),
            "the factor on a direction must be a finite number, not nan",
        ),
        (
            lambda m, x: influence(m, TEXT, {"x": x.vector}),
            r"directions\['x'\] must be a Direction, not a Tensor",
        ),
    ],
)
def test_bad_input_is_refused(hooked_llama, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(hooked_llama, direction(hooked_llama))


def test_a_score_that_is_not_finite_names_row_and_condition(hooked_llama):
    huge = Direction.of(torch.full((hooked_llama.d_model,), 3e38), 1)
    with pytest.raises(
        ValueError, match=r"of advice-\d/\w+ .*under condition 'huge' \(.*\) is not finite"
    ):
        log_odds(hooked_llama, pairs(2), {"base": [], "huge": [Add(huge), Add(huge)]})
