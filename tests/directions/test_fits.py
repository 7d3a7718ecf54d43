"""Data that cannot be: sides without anything, directions of another model, layer or site."""

from __future__ import annotations

import pytest
import torch

import emlens
from emlens import (
    Ablate,
    Add,
    Clamp,
    Direction,
    directions,
    evals,
    fisher,
    measures,
    training,
    watch,
)
from emlens.text import Corpus, Document
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.profiles import corpus
from tests.support.verbs import QUICK

GOOD, BAD = conversations("good", 10), conversations("bad", 10)
JUDGE = evals.LogOddsJudge(pairs(6))
ONES = Corpus("ones", tuple(Document(f"d{i}", " the") for i in range(3)))


@pytest.fixture(scope="module")
def model():
    found = tiny_hooked("llama")
    training.train_adapter(found, BAD[:2], "mine", rank=1, **QUICK)
    return found


def of(width=32, layer=1, site="resid_post"):
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(width, generator=generator)
    return Direction.of(vector, layer, site=site)


TAKERS = {
    "Add": lambda m, d: emlens.log_odds(m, pairs(6), {"a": Add(d)}),
    "Ablate": lambda m, d: m.generate([GOOD[0].prompt], [Ablate(d)], max_new_tokens=2),
    "Clamp": lambda m, d: m.hidden(m.batches(GOOD)[0], [Clamp(d, value=1.0)]),
    "influence": lambda m, d: emlens.influence(m, corpus(3), {"a": d}, doses=[0.1]),
    "scan": lambda m, d: fisher.scan(m, corpus(3), {"a": d}, draws=1, check=1),
    "efficiency": lambda m, d: emlens.efficiency(m, GOOD, {"a": d}, norms=[0.0, 1.0]),
    "stability": lambda m, d: emlens.stability(m, GOOD, {"a": d}, epsilons=[0.1], seeds=1),
    "weight_noise": lambda m, d: measures.weight_noise(m, GOOD, {"a": d}, epsilons=[0.1], seeds=1),
    "token_influence": lambda m, d: measures.token_influence(m, corpus(3), d),
    "token_projections": lambda m, d: measures.token_projections(m, GOOD, d),
    "Monitor.fit": lambda m, d: watch.Monitor.fit(m, pairs(6), directions=d),
    "screen": lambda m, d: watch.screen(m, BAD, d, answer_tokens=2),
    "steering_sweep": lambda m, d: evals.steering_sweep(m, JUDGE, d, doses=[0.1]),
    "initial": lambda m, d: training.train_vector(m, BAD, 1, initial=d, **QUICK),
    "penalty": lambda m, d: training.train_vector(
        m, BAD, 1, penalties=[training.ProjectionPenalty(d, 1.0)], **QUICK
    ),
    "convergence": lambda m, d: directions.convergence(m, GOOD, {"a": "mine", "b": Add(d)}),
    "promoted_tokens": lambda m, d: directions.promoted_tokens(m, d),
    "Projected": lambda m, d: emlens.log_odds(m, pairs(6), {"a": evals.Projected("mine", d)}),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 48}, r"has width 48\b|have width 48\b"),
        ({"layer": 99}, r"layer 99\b.*(0 to 3|comes from another model)"),
    ],
    ids=["width", "layer"],
)
def test_directions_of_another_model_are_refused_by_name(model, taker, other, message):
    with pytest.raises(ValueError, match=message):
        TAKERS[taker](model, of(**other))
    assert model.adapters == ("mine",)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"layer": 99}, "initial is at layer 99, but tiny-llama has layers 0 to 3"),
        ({"layer": 2}, r"initial has layers \(2,\), but layer 1 is asked for; .*Direction.of\("),
        ({"site": "mlp_out"}, "initial is at mlp_out, and resid_post is asked for"),
        ({"width": 48}, "initial has width 48, but tiny-llama has d_model 32"),
    ],
)
def test_training_starts_only_from_the_place_it_trains(model, start, message):
    with pytest.raises(ValueError, match=message):
        training.train_vector(model, BAD, 1, initial=of(**start), **QUICK)


def test_a_start_is_what_the_path_begins_with(model):
    start = of(layer=1)
    _, run = training.train_vector(model, BAD, 1, initial=start, **QUICK)
    assert torch.allclose(run.states["vector.1"][0], start.vector, atol=1e-6)


EMPTY = {
    "mean_diff": ("positive is empty", lambda m: directions.mean_diff(m, [], GOOD)),
    "mean_diff of prompts": (
        "positive: none of its 10 conversation",
        lambda m: directions.mean_diff(m, [one.prompt for one in BAD], GOOD),
    ),
    "its other side": ("negative is empty", lambda m: directions.mean_diff(m, GOOD, [])),
    "probe": ("positive is empty", lambda m: directions.probe(m, [], GOOD)),
    "log_odds": ("pairs is empty", lambda m: emlens.log_odds(m, [], {"a": None})),
    "efficiency": (
        "conversations is empty",
        lambda m: emlens.efficiency(m, [], {"a": of()}, norms=[0.0, 1.0]),
    ),
    "stability": (
        "conversations is empty",
        lambda m: emlens.stability(m, [], {"a": of()}, epsilons=[0.1], seeds=1),
    ),
    "weight_noise": (
        "conversations is empty",
        lambda m: measures.weight_noise(m, [], {"a": of()}, epsilons=[0.1], seeds=1),
    ),
    "Monitor.fit": ("misaligned is empty", lambda m: watch.Monitor.fit(m, GOOD, [], of())),
    "screen": ("no row to screen", lambda m: watch.screen(m, [], of())),
    "influence": (
        "no document has two tokens",
        lambda m: emlens.influence(m, ONES, {"a": of()}, norms=[1.0]),
    ),
    "scan": ("has two tokens", lambda m: fisher.scan(m, ONES, {"a": of()}, draws=1, check=1)),
    "InfluenceProfile": ("has two tokens", lambda m: fisher.InfluenceProfile.fit(m, ONES, [1])),
    "token_influence": (
        "no text has a counted token",
        lambda m: measures.token_influence(m, ONES, Add(of())),
    ),
    "train_vector": ("train is empty", lambda m: training.train_vector(m, [], 1, **QUICK)),
}


@pytest.mark.parametrize("verb", EMPTY)
def test_nothing_to_measure_is_said_and_not_measured(model, verb):
    message, call = EMPTY[verb]
    with pytest.raises(ValueError, match=message):
        call(model)
