"""A solution may be called anything: its numbers are those it has under another name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from emlens import Direction, efficiency, influence, log_odds, stability
from emlens.hooked.condition import conditions_of
from emlens.measures import weight_noise
from emlens.text import Corpus, Document, Pair
from tests.support.data import conversations

DATA = conversations("bad", 3)
TEXT = Corpus("rain", (Document("d0", "the rain came"), Document("d1", "my friend left it")))
TAKEN = ("a 0.1 0", "a 0", "a 1", "a at 1", "a 0.1", "random", "random 0 0")
"""What a noisy, a scaled or a numbered `a` could be called inside."""


def pair_of(model, name: str) -> dict[str, Direction]:
    vectors = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(3))
    return {"a": Direction.of(vectors[0], 1), name: Direction.of(2 * vectors[1], 1)}


def measured(model, measure: str, name: str):
    """The numbers of a measure, a solution of this name beside `a`."""
    given = pair_of(model, name)
    calls = {
        "stability": lambda: stability(model, DATA, given, epsilons=[0.1, 0.5], seeds=2),
        "efficiency": lambda: efficiency(model, DATA, given, factors=[0, 1]),
        "displacement": lambda: efficiency(
            model, DATA, given, match="displacement", factors=[0.5, 1], layer=2
        ),
        "weight noise": lambda: weight_noise(model, DATA, given, epsilons=[0.1], seeds=2),
        "influence": lambda: influence(
            model, TEXT, given, doses=[0.1, 0.2], controls=0, per_token=True
        ),
        "a condition": lambda: influence(
            model,
            TEXT,
            {"a": given["a"]},
            doses=[0.1],
            controls=0,
            conditions={name: [], "c": []},
            per_token=True,
        ),
    }
    return numbers(vars(calls[measure]()))


def numbers(value) -> list:
    """All numbers of a result in order, exactly, without the names."""
    if isinstance(value, (dict, tuple)):
        return [numbers(item) for item in (value.values() if isinstance(value, dict) else value)]
    return [] if isinstance(value, str) else [repr(value)]


@pytest.mark.parametrize(
    "measure",
    ["stability", "efficiency", "displacement", "weight noise", "influence", "a condition"],
)
def test_a_name_that_looks_like_a_variant_of_another_changes_no_number(hooked_llama, measure):
    expected = measured(hooked_llama, measure, "b")
    for name in TAKEN:
        assert measured(hooked_llama, measure, name) == expected, name


def test_token_values_are_kept_and_read_back_under_such_names(hooked_llama, tmp_path):
    given = pair_of(hooked_llama, "a 0")
    found = influence(hooked_llama, TEXT, given, doses=[0.1, 0.2], controls=0, per_token=True)
    again = type(found).load(found.save(tmp_path / "influence.json"))
    for name in given:
        for place, dose in enumerate((0.1, 0.2)):
            values = again.tokens(name, dose)
            total = sum(sum(x for x in row if x == x) for row in found.token_kl[f"{name} {place}"])
            assert total == pytest.approx(
                sum(again.kl[again.directions.index(name)][place]), rel=1e-4
            )
            assert dataclasses.is_dataclass(values)


def test_names_of_several_parts_stay_tuples(hooked_llama):
    assert list(conditions_of(hooked_llama, {("a", 0.1, 0): [], "a 0.1 0": []})) == [
        ("a", 0.1, 0),
        "a 0.1 0",
    ]
    with pytest.raises(TypeError, match=r"condition \"\('a', 1\)\" is an int"):
        conditions_of(hooked_llama, {("a", 1): 5})


def test_results_name_conditions_by_words(hooked_llama):
    pairs = [Pair("p", "a good answer", "a bad answer", "d", "0")]
    assert log_odds(hooked_llama, pairs, {1: [], ("x", 2): []}).conditions == ("1", "('x', 2)")
