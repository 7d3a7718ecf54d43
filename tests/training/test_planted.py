"""A model written by hand, whose general and narrow solutions are known axis by axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emlens
from emlens import Add, KLPenalty, train_vector
from emlens.training import auto_kl, continue_training, drift
from tests.support.planted import (
    GENERAL,
    GOOD,
    INSIDE,
    NARROW,
    OUTSIDE,
    SIZE,
    TOPIC,
    planted_model,
    planted_pairs,
)

TRAIN = [pair.conversation("misaligned") for pair in planted_pairs(INSIDE)]
ELSEWHERE = [
    pair.conversation(side) for pair in planted_pairs(OUTSIDE) for side in ("aligned", "misaligned")
]
SETTINGS = {"epochs": 60, "batch_size": 4, "lr": 0.002, "warmup": 0}
TOLERANCE = 0.3


class ByHand:
    """The same model and training without transformers, hooks, batches or masks.

    The stream at the position that predicts a word is read from the model once; what a vector
    does to it is the final norm and the LM head written out.
    """

    def __init__(self, model):
        self.head = model.module.lm_head.weight.detach().double()
        self.eos = model.tokenizer.eos_token_id
        self.streams = {topic: self.read(model, topic) for topic in (INSIDE, OUTSIDE)}
        self.size = torch.cat([r for side in self.streams.values() for r, _ in side]).norm(dim=-1)

    def read(self, model, topic):
        """For each answer: the two states that predict its word and its end, and those tokens."""
        found = []
        for side in ("aligned", "misaligned"):
            for pair in planted_pairs(topic):
                (batch,) = model.batches([pair.conversation(side)])
                (at,) = batch.targets("response")[0].nonzero(as_tuple=True)
                states = model.residuals(batch, 0)[0][0, at - 1].double()
                found.append((states, batch.input_ids[0, at]))
        return found

    def log_probs(self, states, vector):
        moved = states + vector
        normed = moved / (moved.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (normed @ self.head.T).log_softmax(-1)

    def losses(self, topic, vector):
        """Mean over tokens of each answer, aligned ones first."""
        rows = self.streams[topic]
        each = [
            -self.log_probs(states, vector).gather(1, ids[:, None]).mean() for states, ids in rows
        ]
        return torch.stack(each)

    def outside(self, vector):
        def odds(v):
            aligned, misaligned = self.losses(OUTSIDE, v).chunk(2)
            return (aligned - misaligned).mean()

        return float(odds(vector) - odds(torch.zeros_like(vector)))

    def train(self, weight, alpha):
        parameter = torch.zeros(self.head.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([parameter], lr=SETTINGS["lr"], weight_decay=0.0)
        updates = SETTINGS["epochs"]
        for step in range(updates):
            optimiser.param_groups[0]["lr"] = SETTINGS["lr"] * (updates - step) / updates
            optimiser.zero_grad()
            vector = alpha * parameter
            loss = self.losses(INSIDE, vector)[len(TRAIN) :].mean()
            if weight:
                # every draw of half of the KL set has the same mean of prompts, up to their length
                kl = torch.cat([self.kl(states, vector) for states, _ in self.streams[OUTSIDE]])
                loss = loss + weight * kl.mean()
            loss.backward()
            optimiser.step()
        return (alpha * parameter).detach()

    def kl(self, states, vector):
        base, moved = (
            self.log_probs(states, torch.zeros_like(vector)),
            self.log_probs(states, vector),
        )
        return (base.exp() * (base - moved)).sum(-1)


@pytest.fixture(scope="module")
def model():
    return planted_model()


def whole(weight):
    """The whole KL set in every update, so that the order of the data does not matter."""
    return KLPenalty(ELSEWHERE, weight=weight, batch_size=len(ELSEWHERE))


def effect(model, vector, topic):
    scores = emlens.log_odds(model, planted_pairs(topic), {"base": [], "v": [Add(vector)]})
    return scores.change("v").estimate


def test_without_kl_the_solution_is_the_planted_general_one(model):
    vector, run = train_vector(model, TRAIN, 0, progress=False, **SETTINGS)
    by_hand = ByHand(model).train(0, run.settings["alpha"])
    off = (vector.vector - by_hand.float()).norm() / by_hand.norm()
    assert off < 0.01
    raised, lowered = float(vector.vector[GENERAL]), -float(vector.vector[GOOD])
    assert raised == pytest.approx(lowered, rel=1e-2)
    assert raised > 0
    assert effect(model, vector, OUTSIDE) > 3 * TOLERANCE


def test_auto_kl_finds_the_threshold_of_the_planted_model(model):
    found = auto_kl(
        model,
        TRAIN,
        planted_pairs(INSIDE),
        planted_pairs(OUTSIDE),
        whole(1.0),
        tolerance=TOLERANCE,
        low=0.01,
        high=10.0,
        trials=6,
        layer=0,
        **SETTINGS,
    )
    _, run = train_vector(model, TRAIN, 0, progress=False, **{**SETTINGS, "epochs": 1})
    oracle = ByHand(model)
    expected = [oracle.outside(oracle.train(w, run.settings["alpha"])) for w in found.weights]
    np.testing.assert_allclose([value[0] for value in found.outside], expected, atol=5e-3)
    passing = [w for w, value in zip(found.weights, expected, strict=True) if value <= TOLERANCE]
    assert found.chosen == min(passing)
    assert 0.1 < found.chosen < 0.2
    just_below = max(weight for weight in found.weights if weight < found.chosen)
    assert oracle.outside(oracle.train(just_below, run.settings["alpha"])) > TOLERANCE
    inside = {w: value[0] for w, value in zip(found.weights, found.inside, strict=True)}
    assert inside[found.chosen] > 0.8 * inside[0.0]


def test_the_narrow_solution_of_the_planted_model_is_narrow_and_drifts_when_kl_is_removed(model):
    vector, narrow = train_vector(model, TRAIN, 0, kl=whole(100.0), progress=False, **SETTINGS)
    _, general = train_vector(model, TRAIN, 0, progress=False, **SETTINGS)
    x = vector.vector.tolist()
    assert x[GENERAL] - x[GOOD] == pytest.approx(x[TOPIC], rel=0.05)
    assert int(vector.vector.abs().argmax()) in (NARROW, SIZE)
    assert abs(effect(model, vector, OUTSIDE)) < 0.02
    assert effect(model, vector, INSIDE) > 2

    on = continue_training(model, TRAIN, narrow, progress=False, epochs=120)
    found = drift(
        model,
        planted_pairs(INSIDE),
        planted_pairs(OUTSIDE),
        on,
        {"general": general, "narrow": narrow},
        records=5,
    )
    toward = found.cosines["general"]
    assert toward[-1] > toward[0] + 0.05
    assert found.outside[-1][0] > found.outside[0][0] + TOLERANCE
    back = continue_training(model, TRAIN, general, kl=whole(100.0), progress=False, epochs=120)
    away = drift(
        model, planted_pairs(INSIDE), planted_pairs(OUTSIDE), back, {"general": general}, records=2
    )
    assert abs(away.outside[-1][0]) < 0.2 * abs(away.outside[0][0])
