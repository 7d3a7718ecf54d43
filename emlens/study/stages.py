"""The stages of a study: each is a few calls of the rooms below, and returns its record."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from emlens._runs import Parts
from emlens.directions import Directions, compare, edit_diff, mean_diff, random_direction
from emlens.edits import Ablate, Add
from emlens.hooked import HookedModel
from emlens.hooked.condition import Condition, ConditionLike, Conditions, condition_of
from emlens.measures import confinement, efficiency, influence, log_odds, match_kl, stability
from emlens.measures.matching import UnmatchedError
from emlens.measures.solutions import norm_of, times
from emlens.study.data import StudyData
from emlens.study.settings import StudySettings
from emlens.study.store import StudyStore
from emlens.text import Conversation, corpus
from emlens.training import (
    KLPenalty,
    Organism,
    random_adapter,
    train_adapter,
    train_vector,
)

SOLUTIONS = ("general", "narrow")
TRAINED = (*SOLUTIONS, "benign", "other")
RANDOM, SAME_KL = "random", "random, same KL"
CONFINEMENT = "confinement.json"
TOLERANCE = 0.03
"""Share of an effect within which strengths are matched."""
ABLATED = ("own direction", "other domain's direction", "random direction")
"""What is ablated, in the general solution and in the base model."""


@dataclass
class Study:
    """What every stage works with."""

    model: HookedModel
    settings: StudySettings
    data: StudyData
    store: StudyStore
    progress: bool = True
    _found: dict[str, ConditionLike] = field(default_factory=dict, repr=False)

    @contextmanager
    def on_model(self) -> Iterator[None]:
        """Keep adapters of the study on the model inside the block only.

        Raises:
            ValueError: If the model has adapters of those names, or some are in force.
        """
        acting = "+".join(map(str, self.model.adapters_in_force))
        if self.settings.kind == "adapter" and acting:
            raise ValueError(
                f"adapter {acting!r} is in force; put the call into "
                "`with model.adapter(None):`, or study vectors (kind='vector')"
            )
        try:
            # the base of the study is the model as it was brought
            with (
                own_adapters(self.model, self.settings.kind, (*TRAINED, *self._randoms())),
                self.model.adapter(*self.model.adapters_in_force),
            ):
                yield
        finally:
            self._found.clear()

    # -- solutions ----------------------------------------------------------------------------

    def train(self, name: str) -> dict:
        """Train a solution: general, narrow (with KL), benign, or general in another domain."""
        Parts(self.store.folder / "organisms").part(
            name, lambda: self._trained(name), record="organism.json"
        )
        run = self._organism(name).run
        last = run.steps[-1]
        return {
            "norm": norm_of(self.model, self.condition(name)),
            "first loss": run.steps[0].loss,
            "last loss": last.loss,
            "last KL": last.kl,
            "updates": len(run.steps),
        }

    def _trained(self, name: str) -> Organism:
        s, data = self.settings, self.data
        texts = {"benign": data.aligned, "other": data.elsewhere}
        conversations = texts.get(name, data.misaligned)()
        return train_solution(
            self.model,
            conversations,
            name,
            s.kind,
            s.layers,
            s.rank,
            kl=KLPenalty(data.kl_text(), s.kl_weight) if name == "narrow" else None,
            epochs=s.epochs,
            lr=s.lr,
            batch_size=s.batch_size,
            seed=s.seed,
            progress=self.progress,
        )

    def condition(self, name: str) -> Condition:
        """A trained solution, or a random one of the norm of the general one."""
        if name not in self._found:
            number = name.removeprefix(f"{RANDOM} ")
            self._found[name] = (
                self._organism(name).on(self.model)
                if name in TRAINED
                else self._random(name, self.settings.seed + int(number))
            )
        return condition_of(self.model, self._found[name])

    def _random(self, name: str, seed: int) -> ConditionLike:
        self.condition("general")
        return random_solution(self.model, self._organism("general"), name, seed)

    def _randoms(self) -> list[str]:
        return [f"{RANDOM} {i}" for i in range(self.settings.controls)]

    def _organism(self, name: str) -> Organism:
        return Organism.load(self.store.folder / "organisms" / name)

    def solutions(self, names: Sequence[str] = SOLUTIONS) -> dict[str, Directions | str]:
        """Solutions as efficiency and stability take them: vectors, or names of adapters."""
        found: dict[str, Directions | str] = {}
        for name in names:
            condition = self.condition(name)
            add = condition.edits[0] if condition.edits else None
            found[name] = add.direction if isinstance(add, Add) else name
        return found

    # -- directions ---------------------------------------------------------------------------

    def extract(self) -> dict:
        """Mean differences of the training pairs, and how far each solution moves the residual."""
        s = self.settings
        found = mean_diff(
            self.model,
            self.data.misaligned(),
            self.data.aligned(),
            seed=s.seed,
            progress=self.progress,
        )
        self.store.keep("mean_diff", found)
        text = self.data.misaligned(s.measure_pairs)
        above = range(min(s.layers), self.model.n_layers)
        for name in TRAINED:
            moved = edit_diff(
                self.model, text, self.condition(name), layers=above, progress=self.progress
            )
            self.store.keep(name, moved)
        return {"table": found.table().to_dict("records"), "layers": list(above)}

    def cosines(self) -> dict:
        """Cosines between the directions at every layer that they share."""
        named = {"mean-diff": self.store.directions("mean_diff")}
        named |= {name: self.store.directions(name) for name in TRAINED}
        found = compare(named)
        return {"rows": list(found.rows), "null": list(found.null)}

    # -- what they do -------------------------------------------------------------------------

    def confinement(self) -> dict:
        """Narrow outside, compared with general at the strength of equal effect inside."""
        s = self.settings
        inside = [pair for pair in self.data.test if pair.domain == s.domain]
        outside = [pair for pair in self.data.test if pair.domain != s.domain]
        general, narrow = self.condition("general"), self.condition("narrow")
        try:
            found = confinement(
                self.model,
                inside,
                outside,
                general,
                narrow,
                tolerance=TOLERANCE,
                seed=s.seed,
                progress=self.progress,
            )
        except UnmatchedError as error:  # no strength has the effect: a finding, and no failure
            return {"factor": None, "reason": str(error)}
        found.save(self.store.folder / CONFINEMENT)
        return {"factor": found.matched.factor}

    def same_kl(self) -> dict:
        """Factors at which random solutions have the KL of the general one."""
        text = self.data.aligned(self.settings.measure_pairs)
        factors = {}
        for name in self._randoms():
            try:
                found = match_kl(
                    self.model,
                    text,
                    self.condition(name),
                    self.condition("general"),
                    tolerance=TOLERANCE,
                    progress=self.progress,
                )
            except UnmatchedError as error:
                return {"reason": str(error)}
            factors[name] = found.factor
        return {"factors": factors}

    def behaviour(self) -> dict:
        """Log-odds inside and outside of the domain under every condition."""
        scores = log_odds(self.model, self.data.test, self.conditions(), progress=self.progress)
        alike = "factors" in self.store.record("same_kl")
        scores = scores.averaged(SAME_KL if alike else RANDOM, self._randoms())
        scores.save(self.store.folder / "log_odds.json")
        return {"conditions": list(scores.conditions)}

    def conditions(self) -> Conditions:
        """The solutions, their controls, and what is ablated in the general one."""
        alike = self.store.record("same_kl").get("factors", {})
        general = self.condition("general")
        layers = range(min(self.settings.layers), self.model.n_layers)
        own, other = (self.store.directions(name) for name in ("general", "other"))
        seed = self.settings.seed
        chosen = (
            [own[i] for i in layers],
            [other[i] for i in layers],
            [random_direction(own[i], seed + i) for i in layers],
        )
        gone = {
            name: [Ablate(one, layers=[one.layer]) for one in directions]
            for name, directions in zip(ABLATED, chosen, strict=True)
        }
        nothing = condition_of(self.model, [])
        return {
            "base": nothing,
            **{name: self.condition(name) for name in (*SOLUTIONS, "benign")},
            **{name: times(self.condition(name), alike.get(name, 1.0)) for name in self._randoms()},
            **{without("general", name): general.with_edits(*gone[name]) for name in ABLATED},
            **{without("base", name): nothing.with_edits(*gone[name]) for name in ABLATED},
        }

    def efficiency(self) -> dict:
        """Loss on the finetuning data at matched norms."""
        s = self.settings
        found = efficiency(
            self.model,
            self.data.misaligned(s.measure_pairs),
            {**self.solutions(), RANDOM: self.solutions(self._randoms()[:1])[f"{RANDOM} 0"]},
            factors=(0.0, *s.factors),
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "efficiency.json")
        return {"table": found.table().to_dict("records")}

    def stability(self) -> dict:
        """Loss under norm-preserving noise."""
        s = self.settings
        found = stability(
            self.model,
            self.data.misaligned(s.measure_pairs),
            self.solutions(),
            epsilons=s.epsilons,
            seeds=s.noise_seeds,
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "stability.json")
        return {"table": found.table().to_dict("records")}

    def influence(self) -> dict:
        """KL and next-token loss on pre-training text, at equal norms."""
        s = self.settings
        names = (*SOLUTIONS, "benign", *self._randoms())
        norms = {name: norm_of(self.model, self.condition(name)) for name in names}
        mean = float(np.mean([norms[name] for name in SOLUTIONS]))
        found = influence(
            self.model,
            corpus(s.corpus, documents=s.documents, seed=s.seed),
            {},
            conditions={
                at(name, factor): times(self.condition(name), factor * mean / norms[name])
                for name in names
                for factor in s.factors
            },
            max_tokens=s.document_tokens,
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "influence.json")
        return {"table": found.table().to_dict("records"), "norm": mean}

    def answers(self) -> dict:
        """Greedy answers to held-out questions, side by side."""
        s = self.settings
        questions = self.data.questions(s)
        prompts = [Conversation.of(prompt) for _, prompt in questions]
        general = self.condition("general")
        columns = {
            "base": condition_of(self.model, []),
            "general": general,
            f"general x {s.steer_factor:g}": times(general, s.steer_factor),
            "narrow": self.condition("narrow"),
        }
        texts = {}
        for name, condition in columns.items():
            with self.model.under(condition):
                texts[name] = self.model.generate(
                    prompts, max_new_tokens=s.answer_tokens, temperature=0
                )
        return {"questions": [list(question) for question in questions], "answers": texts}


def train_solution(
    model: HookedModel,
    conversations: Sequence[Conversation],
    name: str,
    kind: Literal["adapter", "vector"],
    layers: Sequence[int],
    rank: int,
    **options: Any,
) -> Organism:
    """Train an adapter at some layers, or a vector at the first; the model does not keep it.

    Options are those that `train_adapter` and `train_vector` share.
    """
    if kind == "vector":
        _, run = train_vector(model, conversations, layers[0], **options)
        return Organism.of(model, run, name)
    shape: Any = {"rank": rank, "alpha": 2 * rank, "layers": layers}
    try:
        run = train_adapter(model, conversations, name, **shape, **options)
        return Organism.of(model, run, name)
    finally:  # an interrupted training leaves an adapter that must not pass for a trained one
        if name in model.adapters:
            model.remove_adapter(name)


def random_solution(model: HookedModel, like: Organism, name: str, seed: int) -> ConditionLike:
    """A random vector or adapter of the norm of a trained one, whose adapter is on the model."""
    if like.directions is not None:
        return [Add(random_direction(like.run.direction(), seed))]
    return random_adapter(model, like.name, name, seed=seed)


@contextmanager
def own_adapters(model: HookedModel, kind: str, names: Collection[str]) -> Iterator[None]:
    """Take the adapters off the model that are put on it inside the block.

    Raises:
        ValueError: If the model has an adapter of those names already.
    """
    check_free(model, kind, names)
    before = model.adapters
    try:
        yield
    finally:
        for name in set(model.adapters) - set(before):
            model.remove_adapter(name)


def check_free(model: HookedModel, kind: str, names: Collection[str]) -> None:
    """Refuse names of adapters that the model has already.

    Raises:
        ValueError: If there is one.
    """
    taken = sorted({*names} & {*model.adapters}) if kind == "adapter" else []
    if taken:
        raise ValueError(
            f"{model.name} has an adapter {taken[0]!r} already, a name that is needed here; rename "
            f"it, or remove it with model.remove_adapter({taken[0]!r})"
        )


def without(condition: str, ablated: str) -> str:
    """Name of a condition in which a direction is ablated."""
    return f"{condition}, {ablated} ablated"


def at(name: str, factor: float) -> str:
    """Name of a solution at a factor of the common norm."""
    return f"{name} x {factor:g}"
