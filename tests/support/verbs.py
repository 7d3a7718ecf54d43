"""Every public verb that runs a model, as a call on a model, some data and a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import emlens
from emlens import directions, evals, fisher, hooked, measures, training, watch
from emlens.hooked.sweep import sweep
from emlens.text import Conversation, Corpus, Document, Pair
from tests.evals.test_rates import response
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.solutions import direction


@dataclass(frozen=True)
class Case:
    """A model and what a verb is given with it.

    Attributes:
        model: The model, with an adapter called `mine`.
        folder: Where a verb may write.
        words: What stands at the end of every prompt and document.
    """

    model: emlens.HookedModel
    folder: Path
    words: str = ""

    @cached_property
    def good(self) -> list[Conversation]:
        return [self._longer(one) for one in conversations("good", 10)]

    @cached_property
    def bad(self) -> list[Conversation]:
        return [self._longer(one) for one in conversations("bad", 10)]

    @cached_property
    def pairs(self) -> list[Pair]:
        found = pairs(6)
        return [Pair(p.prompt + self.words, p.aligned, p.misaligned, p.domain, p.id) for p in found]

    @cached_property
    def corpus(self) -> Corpus:
        texts = [f"the sun and the rain {i} {self.words}" for i in range(4)]
        return Corpus("words", tuple(Document(f"d{i}", t) for i, t in enumerate(texts)))

    @cached_property
    def questions(self) -> list[evals.Question]:
        return [evals.Question(f"q{i}", f"what should I eat {self.words}") for i in range(2)]

    @cached_property
    def responses(self) -> list[evals.Response]:
        return [replace(response(i), text=f"eat fruit {self.words}") for i in range(2)]

    @cached_property
    def direction(self) -> emlens.Direction:
        return direction(self.model)

    @cached_property
    def along(self) -> dict[str, Any]:
        return {"one": self.direction}

    @cached_property
    def monitor(self) -> watch.Monitor:
        """A monitor of a model that works, put on this one."""
        sound = tiny_hooked("llama")
        found = watch.Monitor.fit(sound, pairs(6), directions=direction(sound))
        return found.on(self.model)

    def run(self) -> training.TrainingRun:
        """A run of training on a model that works."""
        return training.train_vector(tiny_hooked("llama"), conversations("bad"), 1, **QUICK)[1]

    def batch(self) -> Any:
        return self.model.batches(self.good)[0]

    def _longer(self, one: Conversation) -> Conversation:
        first, *rest = one.messages
        return Conversation(({**first, "content": first["content"] + self.words}, *rest), one.id)


QUICK: dict[str, Any] = {"epochs": 1, "progress": False}
SHORT: dict[str, Any] = {"max_new_tokens": 4}
LENGTH: dict[str, Any] = {"max_tokens": 4096}

VERBS: dict[str, Callable[[Case], Any]] = {
    # -- the model itself
    "generate": lambda c: c.model.generate([one.prompt for one in c.good], **SHORT),
    "generate greedily": lambda c: c.model.generate([c.good[0].prompt], temperature=0, **SHORT),
    "hidden": lambda c: c.model.hidden(c.batch()),
    "residuals": lambda c: c.model.residuals(c.batch(), "all"),
    "response_losses": lambda c: hooked.response_losses(c.model, [c.batch()]),
    "sweep": lambda c: list(sweep(c.model, c.batch(), {"base": None})),
    # -- directions
    "mean_diff": lambda c: directions.mean_diff(c.model, c.bad, c.good),
    "model_diff": lambda c: directions.model_diff((c.model, "mine"), (c.model, None), c.good),
    "both_diff": lambda c: directions.both_diff((c.model, "mine"), c.bad, (c.model, None), c.good),
    "edit_diff": lambda c: directions.edit_diff(c.model, c.good, emlens.Add(c.direction)),
    "system_prompt_diff": lambda c: directions.system_prompt_diff(
        c.model, [q.prompt for q in c.questions], ["Be bad."], ["Be good."], **SHORT
    ),
    "probe": lambda c: directions.probe(c.model, c.bad, c.good),
    "pca": lambda c: directions.pca(c.model, c.bad, c.good),
    "extract_all": lambda c: directions.extract_all(c.model, c.bad, c.good),
    "confounds": lambda c: directions.confounds(c.model, c.bad, c.good),
    "convergence": lambda c: directions.convergence(
        c.model, c.good, {"a": "mine", "b": emlens.Add(c.direction)}
    ),
    "residual_norm": lambda c: directions.residual_norm(c.model, c.good, 1),
    "residual_norm of documents": lambda c: directions.residual_norm(c.model, c.corpus, 1),
    "adapter_scalars": lambda c: directions.adapter_scalars(c.model, c.good, "mine"),
    # -- measures
    "log_odds": lambda c: emlens.log_odds(c.model, c.pairs, {"base": None}),
    "influence": lambda c: emlens.influence(c.model, c.corpus, c.along, doses=[0.1], **LENGTH),
    "influence of conditions": lambda c: emlens.influence(
        c.model, c.corpus, {}, conditions={"mine": "mine"}, **LENGTH
    ),
    "scan": lambda c: fisher.scan(c.model, c.corpus, c.along, draws=1, check=1, **LENGTH),
    "InfluenceProfile.fit": lambda c: fisher.InfluenceProfile.fit(
        c.model, c.corpus, [1], draws=1, checkpoint=c.folder / "profile.safetensors", **LENGTH
    ),
    "efficiency": lambda c: emlens.efficiency(c.model, c.good, c.along, norms=[0.0, 1.0]),
    "stability": lambda c: emlens.stability(c.model, c.good, c.along, epsilons=[0.1], seeds=1),
    "weight_noise": lambda c: measures.weight_noise(
        c.model, c.good, c.along, epsilons=[0.1], seeds=1
    ),
    "token_influence": lambda c: measures.token_influence(
        c.model, c.corpus, emlens.Add(c.direction), **LENGTH
    ),
    "token_projections": lambda c: measures.token_projections(c.model, c.good, c.direction),
    "transfer_auroc": lambda c: watch.transfer_auroc(c.model, {"a": c.pairs, "b": c.pairs}),
    "Monitor.fit": lambda c: watch.Monitor.fit(c.model, c.pairs, directions=c.direction),
    "Monitor.score": lambda c: c.monitor.score(c.good),
    "screen": lambda c: watch.screen(
        c.model,
        c.bad,
        c.direction,
        out=c.folder / "screen.sqlite",
        answer_tokens=4,
    ),
    # -- evals
    "respond": lambda c: evals.respond(
        c.model,
        c.questions,
        {"base": None},
        store=c.folder / "answers.sqlite",
        progress=False,
        **SHORT,
    ),
    "judge with LocalJudge": lambda c: evals.judge(
        c.responses,
        evals.LocalJudge(c.model),
        store=c.folder / "scores.sqlite",
        progress=False,
    ),
    "ProbeJudge": lambda c: evals.ProbeJudge(c.model, c.pairs, layer=1, progress=False),
    "LogOddsJudge": lambda c: evals.LogOddsJudge(c.pairs).measure(c.model, {"base": None}),
    "ablation_table": lambda c: evals.ablation_table(
        c.model, evals.LogOddsJudge(c.pairs), "mine", c.direction, layer=1
    ),
    "transfer_table": lambda c: evals.transfer_table(
        c.model, evals.LogOddsJudge(c.pairs), {"mine": "mine"}, c.along, layer=1
    ),
    "steering_sweep": lambda c: evals.steering_sweep(
        c.model, evals.LogOddsJudge(c.pairs), c.direction, doses=[0.1]
    ),
    "scalar_table": lambda c: evals.scalar_table(
        c.model, {"a": c.good, "b": c.bad}, "mine", runs=2
    ),
    # -- training
    "train_vector": lambda c: training.train_vector(
        c.model, c.bad, 1, checkpoint=c.folder / "vector.safetensors", checkpoint_every=1, **QUICK
    ),
    "train_vector with a KL set": lambda c: training.train_vector(
        c.model, c.bad, 1, kl=emlens.KLPenalty(c.good, weight=1.0), **QUICK
    ),
    "train_adapter": lambda c: training.train_adapter(
        c.model, c.bad, "new", rank=1, checkpoint=c.folder / "adapter.safetensors", **QUICK
    ),
    "train_weights": lambda c: training.train_weights(
        c.model, c.bad, checkpoint=c.folder / "weights.safetensors", **QUICK
    ),
    "continue_training": lambda c: training.continue_training(c.model, c.bad, c.run(), **QUICK),
    "sweep_kl": lambda c: training.sweep_kl(
        c.model,
        c.bad,
        c.pairs,
        c.pairs,
        emlens.KLPenalty(c.good, weight=1.0),
        [1.0],
        layer=1,
        **QUICK,
    ),
    "drift": lambda c: training.drift(c.model, c.pairs, c.pairs, c.run(), {}, records=2),
}
"""Verbs by name. Where one takes `max_tokens`, it is asked not to cut."""
