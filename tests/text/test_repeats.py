"""Rows that are in a set more than once are counted, and warned of once."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

import emlens
from emlens import directions, measures, watch
from emlens.evals import ProbeJudge
from emlens.text import Conversation
from emlens.text.repeats import repeats
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.solutions import direction

BAD, GOOD = conversations("bad", 10), conversations("good", 10)
MANY = [*BAD, *(Conversation(one.messages, f"copy of {one.id}") for one in BAD[:3])]
OTHERS = conversations("good", 13)
MANY_PAIRS = [*pairs(8), replace(pairs(8)[0], id="copy", domain="another")]

VERBS = {
    "mean_diff": ("3 of 13 positive conv", lambda m: directions.mean_diff(m, MANY, GOOD)),
    "its other side": ("3 of 13 negative conv", lambda m: directions.mean_diff(m, GOOD, MANY)),
    "probe": ("3 of 13 positive conv", lambda m: directions.probe(m, MANY, GOOD)),
    "pca": ("3 of 13 positive conv", lambda m: directions.pca(m, MANY, OTHERS)),
    "extract_all": ("3 of 13 positive conv", lambda m: directions.extract_all(m, MANY, OTHERS)),
    "confounds": ("3 of 13 positive conv", lambda m: directions.confounds(m, MANY, GOOD)),
    "edit_diff": (
        "3 of 13 conversations",
        lambda m: directions.edit_diff(m, MANY, emlens.Add(direction(m))),
    ),
    "log_odds": ("1 of 9 pairs", lambda m: emlens.log_odds(m, MANY_PAIRS, {"base": None})),
    "efficiency": (
        "3 of 13 conversations",
        lambda m: emlens.efficiency(m, MANY, {"one": direction(m)}, norms=[0.0, 1.0]),
    ),
    "stability": (
        "3 of 13 conversations",
        lambda m: emlens.stability(m, MANY, {"one": direction(m)}, epsilons=[0.1], seeds=1),
    ),
    "weight_noise": (
        "3 of 13 conversations",
        lambda m: measures.weight_noise(m, MANY, {"one": direction(m)}, epsilons=[0.1], seeds=1),
    ),
    "ProbeJudge": ("1 of 9 labelled", lambda m: ProbeJudge(m, MANY_PAIRS, layer=1, progress=False)),
    "Monitor.fit": ("3 of 13 mis", lambda m: watch.Monitor.fit(m, GOOD, MANY, direction(m))),
    "Monitor.fit of its own": ("3 of 13 mis", lambda m: watch.Monitor.fit(m, GOOD, MANY)),
    "screen": (
        "3 of 13 trusted",
        lambda m: watch.screen(m, GOOD, direction(m), trusted=MANY, answer_tokens=4),
    ),
}


def told(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in seen if "repeat another" in str(one.message)]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_computed_from_repeated_rows_says_how_many_once(verb):
    start, call = VERBS[verb]
    (message,) = told(lambda: call(tiny_hooked("llama")))
    assert message.startswith(start)


def test_sets_without_copies_are_not_warned_of():
    model = tiny_hooked("llama")
    assert not told(lambda: directions.confounds(model, BAD, GOOD))
    assert not told(lambda: emlens.log_odds(model, pairs(8), {"base": None}))


def test_ids_and_domains_are_no_content():
    assert repeats(MANY) == 3
    assert repeats(MANY_PAIRS) == 1
    assert repeats([]) == 0
    answered = [Conversation.of("a", "b"), Conversation.of("a", "c"), Conversation.of("b", "a")]
    assert repeats(answered) == 0


def test_copies_raise_the_split_half_cosine_of_what_is_nothing():
    # the same conversations, dealt out to two sides at random: there is no direction
    model = tiny_hooked("llama")
    sides = [*BAD[::2], *GOOD[1::2]], [*BAD[1::2], *GOOD[::2]]
    plain = directions.mean_diff(model, *sides, layers=[1]).split_half[1]
    with pytest.warns(UserWarning, match="repeat another"):
        copied = directions.mean_diff(model, sides[0] * 8, sides[1] * 8, layers=[1]).split_half[1]
    assert copied > plain + 0.3
