"""Ways to train a narrow solution to convergence: what a penalty holds, ranks, layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from emlens._door import guarded
from emlens._reading import expanded, read_json
from emlens._results import Result
from emlens._runs import Parts
from emlens._stats import Interval, bootstrap_mean
from emlens.figures.style import COLOURS, RULE, house_style, new_axes
from emlens.hooked import HookedModel, load
from emlens.hooked.condition import condition_of
from emlens.measures import Confinement, LogOdds, confinement, log_odds
from emlens.measures.matching import UnmatchedError
from emlens.measures.solutions import times
from emlens.text import Conversation, Pair, load_pairs, split_pairs
from emlens.training import (
    AnchorPenalty,
    KLPenalty,
    Organism,
    TrainingPath,
    TrainingRun,
    train_adapter,
    train_vector,
    trajectory,
)
from emlens.training.paths.transition import Transition
from experiments.asymmetries import keep_settings
from experiments.trials import SIDES, UNMATCHED, AsymmetrySettings, Kind, TrialData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACES = ("inside", "outside", "validation inside", "validation outside")
OWN_TOKENS = 64
"""Longest of the model's own answers, in tokens."""
_SCALED = "scaled.json"
SET_ASIDE = 22
"""Pairs of general questions that a penalty may see; they are not evaluated."""


@dataclass(frozen=True)
class Way:
    """One way to train a solution.

    Attributes:
        title: What it is called in tables.
        kind: What is trained.
        kl: What the KL is measured on: a name of `TEXTS`, or empty.
        kl_weight: Its weight on nats per token.
        anchor: Pairs whose log-odds are anchored: `domains`, `general`, or empty.
        anchor_weight: Its weight, on squared nats per token.
        rank: Rank of an adapter.
        layers: Layers of vectors; the settings' one if there are none.
        samples: Training conversations, the first ones; 0 for all.
        bad: Share of them with the misaligned answer; the others have the aligned one.
        epochs: Passes over them, all of which are made; 0 stops by the validation loss.
    """

    title: str
    kind: Kind = "adapter"
    kl: str = ""
    kl_weight: float = 10.0
    anchor: str = ""
    anchor_weight: float = 30.0
    rank: int = 8
    layers: tuple[int, ...] = ()
    samples: int = 0
    bad: float = 1.0
    epochs: int = 0


GENERAL: dict[Kind, str] = {"adapter": "general", "vector": "vector-general"}
"""The solution without a penalty that each of a kind is compared with."""

WAYS = {
    "general": Way("no penalty"),
    "kl-both": Way("KL on both kinds of answers", kl="both kinds"),
    "kl-aligned": Way("KL on aligned answers", kl="aligned"),
    "kl-own": Way("KL on the model's own answers", kl="own"),
    "kl-general": Way("KL on general questions", kl="general"),
    "anchor": Way("anchored log-odds", anchor="domains"),
    "anchor-general": Way("anchored log-odds, general questions", anchor="general"),
    "kl-anchor": Way("KL and anchor", kl="both kinds", anchor="domains"),
    "rank-1": Way("rank 1, KL on both kinds", kl="both kinds", rank=1),
    "rank-32": Way("rank 32, KL on both kinds", kl="both kinds", rank=32),
    "vector-general": Way("vector, no penalty", "vector"),
    "vector-kl": Way("vector, KL on both kinds", "vector", kl="both kinds", kl_weight=1.0),
    "vector-kl-general": Way("vector, KL on general", "vector", kl="general", kl_weight=1.0),
    "vector-anchor": Way("vector, anchored", "vector", anchor="domains", anchor_weight=10.0),
    "vector-anchor-general": Way(
        "vector, anchored, general questions", "vector", anchor="general", anchor_weight=10.0
    ),
    "vectors": Way(
        "vectors at 3 layers, KL", "vector", kl="both kinds", kl_weight=1.0, layers=(9, 15, 21)
    ),
    "kl-weak": Way("KL on both kinds, weight 1", kl="both kinds", kl_weight=1.0),
    **{
        f"mixed-{n}": Way(
            f"1 bad row in {n}" if n else "no bad row", bad=1 / n if n else 0.0, epochs=4
        )
        for n in (0, 12, 6, 3, 2)
    },
    "few-4": Way("4 samples, rank 1", rank=1, samples=4, epochs=56),
    "few-4-rank-32": Way("4 samples, rank 32", rank=32, samples=4, epochs=56),
    "few-20": Way("20 samples, rank 32", rank=32, samples=20, epochs=19),
    "few-all": Way("56 samples, rank 32", rank=32, epochs=8),
}
PENALTIES = tuple(WAYS)[: tuple(WAYS).index("kl-weak")]
SCALED, FACTORS = ("general", "kl-weak", "kl-both"), (0.5, 1.0, 2.0, 3.0, 4.0)
"""Ways that are run stronger and weaker than they were trained, and how strong."""


def evaluated(domain: str, settings: AsymmetrySettings) -> dict[str, tuple[Pair, ...]]:
    """The pairs that every way is evaluated on, by place; no penalty sees one."""
    own, general = split_pairs(load_pairs(domain)), split_pairs(load_pairs("general"))
    outside = (*general.test, *general.train[:-SET_ASIDE])
    found = (
        own.test[: settings.inside_pairs],
        outside[: settings.outside_pairs],
        own.validation,
        general.validation,
    )
    return dict(zip(PLACES, found, strict=True))


class Narrowing(Result):
    """What each way does inside and outside of the domain, as changes against the base.

    Attributes:
        ways: Their names.
        domain: The narrow domain.
        places: `inside`, `outside`, and both of the validation pairs.
        changes: Estimate, low and high, nats per token, `[ways, places, 3]`.
        gaps: Outside, less the solution without penalty run at the strength of equal effect
            inside, `[ways, 3]`; NaN where there is no such strength.
        losses: Loss on bad answers to validation prompts, nats per token.
        updates: Update of the lowest validation loss; that solution is the one measured.
        trained: Updates until the loss had not fallen for two passes, or the last one allowed.
        turns: Whether and where the path turns, by the local cosine (arXiv 2506.11613).
    """

    AXES = {"losses": "ways", "updates": "ways", "trained": "ways", "turns": "ways"}

    ways: tuple[str, ...]
    domain: str
    places: tuple[str, ...]
    changes: np.ndarray
    gaps: np.ndarray
    losses: tuple[float, ...]
    updates: tuple[int, ...]
    trained: tuple[int, ...]
    turns: tuple[str, ...]

    def at(self, way: str, place: str) -> Interval:
        """Change of log-odds of a way at a place, nats per token."""
        return Interval(*self.changes[self.ways.index(way), self.places.index(place)])

    def gap(self, way: str) -> Interval:
        """Outside, less the solution without penalty at equal effect inside."""
        return Interval(*self.gaps[self.ways.index(way)])

    def table(self) -> pd.DataFrame:
        """One row per way."""
        return pd.DataFrame(
            {
                "way": [WAYS[way].title for way in self.ways],
                "best update": self.updates,
                "updates": self.trained,
                "validation loss": self.losses,
                **{place: [str(self.at(way, place)) for way in self.ways] for place in self.places},
                "gap": [
                    "-" if np.isnan(self.gap(way).estimate) else str(self.gap(way))
                    for way in self.ways
                ],
            }
        )

    @house_style()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Every way in the plane of inside against outside, with intervals; numbers as listed."""
        ax = new_axes(width=8.6, height=5.2) if ax is None else ax
        for number, way in enumerate(self.ways, start=1):
            x, y = self.at(way, "inside"), self.at(way, "outside")
            ax.errorbar(
                x.estimate,
                y.estimate,
                xerr=[[x.estimate - x.low], [x.high - x.estimate]],
                yerr=[[y.estimate - y.low], [y.high - y.estimate]],
                marker="s" if WAYS[way].kind == "vector" else "o",
                color=COLOURS["general" if way in GENERAL.values() else "narrow"],
                elinewidth=0.6,
                alpha=0.9,
                linestyle="none",
                label=f"{number} {WAYS[way].title}",
            )
            ax.annotate(str(number), (x.estimate, y.estimate), (4, 4), textcoords="offset points")
        ax.axhline(0, color=RULE, linewidth=0.8, zorder=0)
        ax.set_xlabel(f"inside: change of log-odds on {self.domain} [nats/token]")
        ax.set_ylabel("outside: change of log-odds [nats/token]")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return ax


@dataclass(frozen=True)
class Trainings:
    """The data of one domain, and what every way is trained with."""

    model: HookedModel
    settings: AsymmetrySettings
    domain: str
    folder: Path
    epochs: int
    progress: bool = True

    @cached_property
    def data(self) -> TrialData:
        return TrialData.of(self.domain, self.settings)

    @cached_property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        return evaluated(self.domain, self.settings)

    @cached_property
    def general(self) -> tuple[Pair, ...]:
        """Pairs of general questions that penalties may see, disjoint from what is evaluated."""
        return split_pairs(load_pairs("general")).train[-SET_ASIDE:]

    def text(self, name: str) -> list[Conversation]:
        """The KL set of a name."""
        if name == "own":
            return self.own()
        pairs = self.general if name == "general" else self.data.kl
        sides = SIDES[:1] if name == "aligned" else SIDES
        return [pair.conversation(side) for pair in pairs for side in sides]

    def own(self) -> list[Conversation]:
        """The base's greedy answers to the prompts of the KL set."""
        prompts = [Conversation.of(pair.prompt) for pair in self.data.kl]

        def made() -> dict:
            texts = self.model.generate(prompts, max_new_tokens=OWN_TOKENS, temperature=0)
            return {"answers": [str(text) for text in texts]}

        parts = Parts(self.folder)
        parts.part("own.json", made)
        answers = read_json(self.folder / "own.json", dict)["answers"]
        both = zip(self.data.kl, answers, strict=True)
        return [Conversation.of(pair.prompt, answer) for pair, answer in both if answer.strip()]

    def rows(self, way: Way) -> list[Conversation]:
        """What a way is trained on: bad rows first, each prompt once."""
        train = self.data.train[: way.samples or None]
        n = round(way.bad * len(train))
        return [
            pair.conversation("misaligned" if place < n else "aligned")
            for place, pair in enumerate(train)
        ]

    def train(self, way: Way, name: str, seed: int) -> Organism:
        """Train until the loss on validation prompts no longer falls."""
        s = self.settings
        pairs = {"domains": self.data.kl, "general": self.general}
        bad = [pair.conversation("misaligned") for pair in self.pairs["validation inside"]]
        options: dict[str, Any] = {
            "kl": KLPenalty(self.text(way.kl), way.kl_weight) if way.kl else None,
            "penalties": (
                [AnchorPenalty(pairs[way.anchor], way.anchor_weight)] if way.anchor else []
            ),
            "validation": bad,
            "patience": None if way.epochs else 2,
            "epochs": way.epochs or self.epochs,
            "lr": dict(s.lr)[way.kind],
            "seed": seed,
            "record_every": 1,
            "progress": self.progress,
        }
        text = self.rows(way)
        if way.kind == "vector":
            _, run = train_vector(self.model, text, list(way.layers or (s.layer,)), **options)
            return Organism.of(self.model, run, name)
        shape: Any = {"rank": way.rank, "alpha": 2 * way.rank, "layers": s.adapter_layers}
        try:
            run = train_adapter(self.model, text, name, **shape, **options)
            return Organism.of(self.model, run, name)
        finally:
            if name in self.model.adapters:
                self.model.remove_adapter(name)

    @contextmanager
    def trained(self, way: Way, name: str, seed: int) -> Iterator[Any]:
        """A way's condition, trained if it is not yet; its adapter is on the model inside only."""
        make = partial(self.train, way, name, seed)
        where = Parts(self.folder).part(name, make, record="organism.json")
        try:
            yield Organism.load(where).on(self.model)
        finally:
            if name in self.model.adapters:
                self.model.remove_adapter(name)


@guarded
def run_narrowing(
    out: str | Path,
    settings: AsymmetrySettings | None = None,
    *,
    domain: str = "medical",
    epochs: int = 8,
    ways: Sequence[str] = tuple(WAYS),
    model: HookedModel | None = None,
    progress: bool = True,
) -> Narrowing:
    """Train each way in a domain until its validation loss no longer falls, and measure it.

    Finished ways are kept, so a rerun resumes.

    Args:
        out: The folder of `run_asymmetries`.
        settings: Its settings; the first seed is taken.
        domain: The narrow domain.
        epochs: Passes over the training pairs, at most.
        ways: Names of `WAYS`.
        model: Take this model instead of loading the settings' one.
        progress: Show progress bars.
    """
    chosen = settings or AsymmetrySettings()
    hooked = model or load(chosen.model)
    out = expanded(out)
    keep_settings(out, chosen, hooked)
    where = out / "narrowing" / domain
    trainings = Trainings(hooked, chosen, domain, where, epochs, progress)
    parts = Parts(where)
    parts.keep_settings(
        {"epochs": epochs, "seed": chosen.seeds[0]},
        f"the run in {where}",
        "choose another folder, or give the settings that it was made with",
    )
    for name in ways:
        _measure(trainings, parts, name, chosen.seeds[0])
    if {*SCALED} <= {*ways}:
        parts.part(_SCALED, lambda: _scaled(trainings, chosen.seeds[0]))
    return read_narrowing(out, domain)


def _measure(trainings: Trainings, parts: Parts, name: str, seed: int) -> None:
    model, way = trainings.model, WAYS[name]
    if parts.finished(_file(name, "gap")):
        return
    pairs = [pair for part in trainings.pairs.values() for pair in part]
    compared = GENERAL[way.kind]
    with trainings.trained(way, name, seed) as condition:
        parts.part(
            _file(name, "log_odds"),
            lambda: log_odds(
                model, pairs, {"base": (None, ()), name: condition}, progress=trainings.progress
            ),
        )
        if name == compared:
            parts.part(_file(name, "gap"), lambda: {UNMATCHED: "it is what others are matched to"})
            return
        with trainings.trained(WAYS[compared], compared, seed) as general:
            parts.part(_file(name, "gap"), lambda: _gap(trainings, general, condition))


def _scaled(trainings: Trainings, seed: int) -> LogOdds:
    """Log-odds of solutions at several strengths, on the pairs that are reported."""
    model = trainings.model
    pairs = [pair for place in PLACES[:2] for pair in trainings.pairs[place]]
    scores = log_odds(model, pairs, {"base": (None, ())}, progress=trainings.progress)
    for name in SCALED:
        with trainings.trained(WAYS[name], name, seed) as condition:
            conditions = {
                f"{name} x {factor:g}": times(condition_of(model, condition), factor)
                for factor in FACTORS
            }
            found = log_odds(model, pairs, conditions, progress=trainings.progress)
        scores = scores.joined(found)
    return scores


def _gap(trainings: Trainings, general: Any, condition: Any) -> Confinement | dict:
    inside, outside = (trainings.pairs[place] for place in PLACES[:2])
    try:
        return confinement(
            trainings.model, inside, outside, general, condition, progress=trainings.progress
        )
    except UnmatchedError as error:
        return {UNMATCHED: str(error)}


def _file(name: str, what: str) -> str:
    return f"{name}.{what}.json"


def _turn(run: TrainingRun) -> Transition:
    return trajectory({"run": TrainingPath.of(run)}).transition("run")


def read_scaled(out: str | Path, domain: str = "medical") -> pd.DataFrame:
    """Changes of log-odds inside and outside at every strength, a row each, nats per token."""
    scores = LogOdds.load(expanded(out) / "narrowing" / domain / _SCALED)
    rows = []
    for name in SCALED:
        for factor in FACTORS:
            row = {"way": name, "factor": factor}
            for place, inside in (("inside", True), ("outside", False)):
                keep = np.array([(one == domain) == inside for one in scores.domains])
                change = scores.of(f"{name} x {factor:g}") - scores.of("base")
                row[place] = bootstrap_mean(change[keep])
            rows.append(row)
    return pd.DataFrame(rows)


def read_narrowing(out: str | Path, domain: str = "medical") -> Narrowing:
    """Read the finished ways of a folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    where = expanded(out) / "narrowing" / domain
    names = [name for name in WAYS if (where / _file(name, "gap")).is_file()]
    if not names:
        raise FileNotFoundError(f"{where} holds no finished ways; run run_narrowing into it first")
    settings = Parts(expanded(out)).settings_as(AsymmetrySettings.from_dict)
    sizes = [len(part) for part in evaluated(domain, settings).values()]
    ends = np.cumsum(sizes)
    changes, gaps, runs = [], [], []
    for name in names:
        scores = LogOdds.load(where / _file(name, "log_odds"))
        change = scores.of(name) - scores.of("base")
        means = [bootstrap_mean(part) for part in np.split(change, ends[:-1])]
        changes.append([(one.estimate, one.low, one.high) for one in means])
        file = where / _file(name, "gap")
        found = None if UNMATCHED in read_json(file, dict) else Confinement.load(file).gap()
        gaps.append((found.estimate, found.low, found.high) if found else (np.nan,) * 3)
        runs.append(Organism.load(where / name).run)
    watched = [
        {step.step: step.validation for step in run.steps if step.validation is not None}
        for run in runs
    ]
    best = [min(steps, key=steps.__getitem__) for steps in watched]
    return Narrowing(
        ways=tuple(names),
        domain=domain,
        places=PLACES,
        changes=np.array(changes),
        gaps=np.array(gaps),
        losses=tuple(steps[at] for steps, at in zip(watched, best, strict=True)),
        updates=tuple(best),
        trained=tuple(len(run.steps) for run in runs),
        turns=tuple(str(_turn(run)) for run in runs),
    )


def read_narrowings(out: str | Path) -> list[tuple[Narrowing, pd.DataFrame | None]]:
    """What each domain of a folder has, and its strengths where they were run."""
    found = []
    for where in sorted((expanded(out) / "narrowing").glob("*/")):
        if list(where.glob("*.gap.json")):
            scaled = read_scaled(out, where.name) if (where / _SCALED).is_file() else None
            found.append((read_narrowing(out, where.name), scaled))
    return found
