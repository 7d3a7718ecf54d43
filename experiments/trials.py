"""One trial of the asymmetries: a general and a narrow solution of one domain, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from emlens._arguments import NOT_NEGATIVE, POSITIVE, number
from emlens._door import check_fields, guard_methods
from emlens._reading import read_json
from emlens._runs import Parts
from emlens._types import check_settings, checked_fields
from emlens.directions import Direction
from emlens.hooked import HookedModel, Scaled, adapter_norms
from emlens.hooked.condition import ConditionLike
from emlens.measures import (
    Confinement,
    Divergence,
    Efficiency,
    LogOdds,
    Stability,
    confinement,
    divergence,
    efficiency,
    log_odds,
    stability,
)
from emlens.measures import influence as measure_influence
from emlens.measures.matching import UnmatchedError
from emlens.measures.scoring import row_influence
from emlens.study.stages import check_free, own_adapters, random_solution, train_solution
from emlens.text import Conversation, Pair, corpus, load_pairs, split_pairs
from emlens.training import KLPenalty, Organism

Kind = Literal["adapter", "vector"]
SOLUTIONS = ("general", "narrow")
BENIGN, RANDOM = "benign", "random"
ADAPTERS = (*SOLUTIONS, BENIGN, RANDOM)
"""Names of a trial's adapters on the model."""
SIDES: tuple[Literal["aligned", "misaligned"], ...] = ("aligned", "misaligned")
UNMATCHED = "unmatched"
"""Under which a trial says why the general solution has no strength of the narrow one's effect."""
ADVICE = ("medical", "finance", "sports")
STYLE, STYLE_INSIDE = "technical", "cooking"


@guard_methods
@dataclass(frozen=True, slots=True)
class AsymmetrySettings:
    """What the four asymmetries are tried on.

    Attributes:
        model: Model to load.
        domains: Narrow domains; `technical` is the second task, technical style in cooking.
        kinds: `adapter` (LoRA at `down_proj` of some layers), `vector` (in place, at one layer).
        seeds: Training seeds; the split of the data is the same for all.
        layer: Layer of the vectors.
        adapter_layers: Layers of the adapters.
        rank: Rank of the adapters; alpha is twice as much.
        train_pairs: Pairs of the narrow domain trained on, at most.
        kl_pairs: Pairs of each other domain in the KL set, both answers of each.
        inside_pairs: Held-out pairs of the domain, at most.
        outside_pairs: Pairs outside of it, at most.
        measure_pairs: Training pairs that efficiency and stability are measured on.
        epochs: Passes over the training pairs.
        lr: Learning rate by kind.
        kl_weight: Weight of the KL by kind, nats per token.
        factors: Norms of the efficiency curve, as factors of the mean norm.
        epsilons: Noise levels.
        noise_seeds: Noise draws per level.
        documents: Documents of pre-training text.
        document_tokens: Tokens that each is cut to.
        dose: Dose at which the vectors' influence is measured.
    """

    model: str = "smollm2-135m-instruct"
    domains: tuple[str, ...] = (*ADVICE, STYLE)
    kinds: tuple[Kind, ...] = ("adapter", "vector")
    seeds: tuple[int, ...] = (0, 1, 2)
    layer: int = 15
    adapter_layers: tuple[int, ...] = (15, 16, 17, 18, 19, 20)
    rank: int = 8
    train_pairs: int = 56
    kl_pairs: int = 32
    inside_pairs: int = 24
    outside_pairs: int = 32
    measure_pairs: int = 12
    epochs: int = 2
    lr: tuple[tuple[Kind, float], ...] = (("adapter", 5e-3), ("vector", 0.08))
    kl_weight: tuple[tuple[Kind, float], ...] = (("adapter", 10.0), ("vector", 1.0))
    factors: tuple[float, ...] = (0.5, 1.0, 1.5)
    epsilons: tuple[float, ...] = (0.2, 0.4, 0.6)
    noise_seeds: int = 3
    documents: int = 16
    document_tokens: int = 96
    dose: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, seeds=NOT_NEGATIVE)
        for name, limits in (("lr", POSITIVE), ("kl_weight", POSITIVE)):
            of_kinds = getattr(self, name)
            checked = ((kind, number(f"{name} of {kind}", x, limits)) for kind, x in of_kinds)
            object.__setattr__(self, name, tuple(checked))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict) -> AsymmetrySettings:
        """Read what `to_dict` gave, from JSON as well.

        Raises:
            ValueError: If a setting does not exist (those that do are listed), or is of another
                type.
        """
        check_settings(cls, record)
        return cls(**checked_fields(cls, record))


@dataclass(frozen=True)
class TrialData:
    """The pairs of a narrow domain, split once for all seeds.

    Attributes:
        train: Trained on.
        kl: Pairs of other domains, whose answers of both kinds are the KL set.
        inside: Held-out pairs of the domain.
        outside: Pairs of no domain that is trained on or protected.
    """

    train: tuple[Pair, ...]
    kl: tuple[Pair, ...]
    inside: tuple[Pair, ...]
    outside: tuple[Pair, ...]

    @classmethod
    def of(cls, domain: str, settings: AsymmetrySettings) -> TrialData:
        """The pairs of one of the settings' domains.

        Raises:
            ValueError: If there is no such domain.
        """
        if domain not in (*ADVICE, STYLE):
            raise ValueError(f"no domain {domain!r}; there are {', '.join((*ADVICE, STYLE))}")
        pairs = load_pairs(domain)
        if domain == STYLE:
            own = split_pairs([pair for pair in pairs if pair.domain == STYLE_INSIDE])
            outside = tuple(pair for pair in pairs if pair.domain != STYLE_INSIDE)
            others = ADVICE[:2]
        else:
            own, general = split_pairs(pairs), split_pairs(load_pairs("general"))
            outside = (*general.test, *general.train)
            others = tuple(other for other in ADVICE if other != domain)
        protected = (split_pairs(load_pairs(other)).train[: settings.kl_pairs] for other in others)
        return cls(
            own.train[: settings.train_pairs],
            tuple(pair for part in protected for pair in part),
            own.test[: settings.inside_pairs],
            outside[: settings.outside_pairs],
        )

    def conversations(self, side: Literal["aligned", "misaligned"]) -> list[Conversation]:
        """The training prompts with one of their answers."""
        return [pair.conversation(side) for pair in self.train]

    def penalty(self, weight: float) -> KLPenalty:
        """The KL penalty, on answers of both kinds, in equal parts of each update."""
        return KLPenalty([p.conversation(side) for p in self.kl for side in SIDES], weight)

    def sets(self, settings: AsymmetrySettings) -> dict[str, tuple[Pair, ...]]:
        """Held-out pairs on which the KL is measured: of the domain, outside, and medical."""
        found = {"inside": self.inside, "outside": self.outside}
        if any(pair.domain == "medical" for pair in self.inside):
            return found
        medical = split_pairs(load_pairs("medical")).test[: settings.inside_pairs]
        return {**found, "medical": medical}


@dataclass(frozen=True)
class Trial:
    """A domain, a kind of solution, a seed: trained and measured, part by part, in a folder.

    Each part that is finished stays finished.
    """

    model: HookedModel
    settings: AsymmetrySettings
    domain: str
    kind: Kind
    seed: int
    folder: Path
    progress: bool = True

    @property
    def data(self) -> TrialData:
        return TrialData.of(self.domain, self.settings)

    @property
    def names(self) -> tuple[str, ...]:
        """What is trained: the benign control with the first seed only."""
        return (*SOLUTIONS, BENIGN) if self.seed == self.settings.seeds[0] else SOLUTIONS

    def run(self, base: Callable[[], LogOdds]) -> None:
        """Train and measure what is not there yet.

        Args:
            base: Gives the unmodified model's log-odds inside and outside of the domain.
        """
        self.train()
        parts = Parts(self.folder)
        with self._solutions() as conditions:
            parts.part("log_odds.json", lambda: self._behaviour(conditions, base()))
            parts.part("efficiency.json", self._efficiency)
            parts.part("stability.json", self._stability)
            parts.part("influence.json", self._influence)
            parts.part("confinement.json", lambda: self._confinement(conditions))
            parts.part("divergence.json", lambda: self._divergence(conditions))

    def train(self) -> None:
        """Train what is not there yet, into the folder."""
        for name in self.names:
            make = partial(self._train, name)
            Parts(self.folder).part(name, make, record="organism.json")

    # -- training -----------------------------------------------------------------------------

    def _train(self, name: str) -> Organism:
        s, data = self.settings, self.data
        kl = data.penalty(dict(s.kl_weight)[self.kind]) if name == "narrow" else None
        text = data.conversations("aligned" if name == BENIGN else "misaligned")
        check_free(self.model, self.kind, ADAPTERS)
        return train_solution(
            self.model,
            text,
            name,
            self.kind,
            s.adapter_layers if self.kind == "adapter" else (s.layer,),
            s.rank,
            kl=kl,
            epochs=s.epochs,
            lr=dict(s.lr)[self.kind],
            seed=self.seed,
            record_every=1,
            progress=self.progress,
        )

    @contextmanager
    def _solutions(self) -> Iterator[dict[str, ConditionLike]]:
        """What was trained and a random control of the general one, as conditions.

        Adapters are on the model inside the block only.
        """
        with own_adapters(self.model, self.kind, ADAPTERS):
            kept = {name: Organism.load(self.folder / name) for name in self.names}
            found = {name: one.on(self.model) for name, one in kept.items()}
            found[RANDOM] = random_solution(self.model, kept["general"], RANDOM, self.seed)
            yield found

    def _vector(self, name: str) -> Direction:
        return Organism.load(self.folder / name).run.direction()

    def _pair(self) -> dict:
        if self.kind == "adapter":
            return {name: name for name in SOLUTIONS}
        return {name: self._vector(name) for name in SOLUTIONS}

    # -- measures -----------------------------------------------------------------------------

    def _behaviour(self, conditions: dict[str, ConditionLike], base: LogOdds) -> LogOdds:
        pairs = (*self.data.inside, *self.data.outside)
        found = log_odds(self.model, pairs, conditions, progress=self.progress)
        return base.joined(found)

    def _measured(self) -> list[Conversation]:
        return self.data.conversations("misaligned")[: self.settings.measure_pairs]

    def _efficiency(self) -> Efficiency:
        return efficiency(
            self.model,
            self._measured(),
            self._pair(),
            factors=self.settings.factors,
            progress=self.progress,
        )

    def _stability(self) -> Stability:
        s = self.settings
        return stability(
            self.model,
            self._measured(),
            self._pair(),
            epsilons=s.epsilons,
            seeds=s.noise_seeds,
            progress=self.progress,
        )

    def _influence(self) -> dict:
        """KL per document, in nats, of both solutions at one norm."""
        s = self.settings
        text = corpus(documents=s.documents)
        if self.kind == "vector":
            found = measure_influence(
                self.model,
                text,
                self._pair(),
                doses=[s.dose],
                controls=2,
                max_tokens=s.document_tokens,
                progress=self.progress,
            )
            rows = dict(zip(found.directions, (row[0] for row in found.kl), strict=True))
            chance = np.mean([rows[name] for name in found.controls], axis=0).tolist()
            kept = {name: list(rows[name]) for name in SOLUTIONS}
            return {**kept, RANDOM: chance, "counts": list(found.counts)}
        batches = self.model.batches(text, max_tokens=s.document_tokens)
        names = (*SOLUTIONS, RANDOM)
        norms = {name: float(np.hypot.reduce(_norms(self.model, name))) for name in names}
        mean = float(np.mean([norms[name] for name in SOLUTIONS]))
        scaled = {name: Scaled(name, mean / norms[name]) for name in names}
        _, kl, _, counts = row_influence(self.model, batches, scaled, progress=self.progress)
        return {**{name: kl[name].tolist() for name in names}, "counts": counts.tolist()}

    def _confinement(self, conditions: dict[str, ConditionLike]) -> Confinement | dict:
        """The narrow solution against the general one of the same effect inside, or why not."""
        data = self.data
        general, narrow = (conditions[name] for name in SOLUTIONS)
        try:
            return confinement(
                self.model, data.inside, data.outside, general, narrow, progress=self.progress
            )
        except UnmatchedError as error:
            return {UNMATCHED: str(error)}

    def _divergence(self, conditions: dict[str, ConditionLike]) -> Divergence:
        measured = {name: conditions[name] for name in (*SOLUTIONS, RANDOM)}
        sets = {
            name: [pair.conversation(side) for pair in pairs for side in SIDES]
            for name, pairs in self.data.sets(self.settings).items()
        }
        return divergence(self.model, sets, measured, progress=self.progress)


Results = tuple[LogOdds, Efficiency, Stability, dict, Confinement | None, Divergence]
"""Those of a trial; no confinement where no strength of the general solution could be matched."""


def read_trials(folder: Path, domain: str, kind: Kind) -> list[Results]:
    """The results of the finished trials of a domain and a kind, by seed."""
    found, start = [], f"{domain}-{kind}-"
    seeds = {at.name.removeprefix(start): at for at in folder.glob(f"trials/{start}*")}
    places = {int(seed): at for seed, at in seeds.items() if seed.isdecimal()}
    for _, at in sorted(places.items()):
        if (at / "divergence.json").exists():
            found.append(
                (
                    LogOdds.load(at / "log_odds.json"),
                    Efficiency.load(at / "efficiency.json"),
                    Stability.load(at / "stability.json"),
                    _influence(at / "influence.json"),
                    _confinement(at / "confinement.json"),
                    Divergence.load(at / "divergence.json"),
                )
            )
            _compare(found[-1], found[0], at)
    return found


def _compare(trial: Results, first: Results, at: Path) -> None:
    """Refuse a trial that cannot be pooled with the first one."""
    odds, efficiency, stability, influence, confined, diverged = trial
    named = {
        "log_odds": ({"base", *SOLUTIONS} - {*odds.conditions}, odds.ids, first[0].ids),
        "efficiency": ({*SOLUTIONS} - {*efficiency.directions}, efficiency.counts, first[1].counts),
        "stability": ({*SOLUTIONS} - {*stability.directions}, 0, 0),
        "influence": (set(), influence["counts"], first[3]["counts"]),
        "confinement": (set(), confined.ids if confined else (), _outside(odds, confined)),
        "divergence": ({*SOLUTIONS} - {*diverged.conditions}, diverged.ids, first[5].ids),
    }
    for name, (missing, own, others) in named.items():
        if missing:
            raise ValueError(f"{at / name}.json has no {min(missing)}; delete it to resume")
        if not np.array_equal(own, others):
            raise ValueError(
                f"{at / name}.json is of other texts than that of the seeds before; delete it to "
                "resume"
            )
    if influence.keys() != first[3].keys():
        raise ValueError(
            f"{at / 'influence.json'} has other conditions than that of the seeds before; delete "
            "it to resume"
        )


def _outside(odds: LogOdds, confined: Confinement | None) -> tuple[str, ...]:
    """The pairs that a confinement is of, if it is of the trial's own."""
    return odds.ids[len(confined.matched.ids) :] if confined else ()


def _confinement(path: Path) -> Confinement | None:
    if UNMATCHED in read_json(path, dict):
        return None
    return Confinement.load(path)


def _influence(path: Path) -> dict[str, list[float]]:
    found = read_json(path, dict)
    missing = {*SOLUTIONS, "counts"} - set(found)
    if missing:
        raise ValueError(f"{path} has no {min(missing)}; delete it to resume the trial")
    size = len(found["counts"]) if isinstance(found["counts"], list) else None
    for name, values in found.items():
        numbers = isinstance(values, list) and all(isinstance(n, (int, float)) for n in values)
        if not numbers or len(values) != size:
            raise ValueError(f"{path}: {name} is not a list of a number for each of its counts")
    return found


def trial_folder(folder: Path, domain: str, kind: Kind, seed: int) -> Path:
    """Where a trial lies."""
    return folder / "trials" / f"{domain}-{kind}-{seed}"


def _norms(model: HookedModel, name: str) -> list[float]:
    return list(adapter_norms(model, name).values())
