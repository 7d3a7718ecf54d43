"""The figures of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emlens._stats import Interval
from emlens.figures import colour, house_style, save_figure
from emlens.figures.bars import dot_intervals
from emlens.figures.lines import layer_curves, line_bands
from emlens.figures.style import new_panels
from emlens.study.findings import StudyMeasures, effect_left, general_transfers, narrow_stays
from emlens.study.stages import ABLATED, RANDOM, SAME_KL, SOLUTIONS, at, without
from emlens.study.store import StudyStore
from emlens.training import Organism

SHOWN = ("general", "narrow", "benign", SAME_KL, RANDOM)


def draw_all(found: StudyMeasures, cosines: dict, store: StudyStore) -> dict[str, list[str]]:
    """Draw every figure into `figures/`; names of the files by figure."""
    folder = store.folder / "figures"
    folder.mkdir(exist_ok=True)
    makers = {
        "log_odds": lambda: odds_figure(found),
        "ablation": lambda: ablation_figure(found),
        "cosines": lambda: cosine_figure(cosines),
        "efficiency": found.efficiency.plot,
        "stability": found.stability.plot,
        "influence": lambda: influence_figure(found),
        "training": lambda: training_figure(store),
    }
    if found.confinement is not None:
        makers["confinement"] = found.confinement.plot
    files = {}
    with house_style():
        for name, make in makers.items():
            written = save_figure(make(), folder / name)
            files[name] = [str(Path(path).relative_to(store.folder)) for path in written]
    return files


def odds_figure(found: StudyMeasures):
    """Change of log-odds inside and outside of the domain, side by side."""
    odds = found.log_odds
    shown = [name for name in SHOWN if name in odds.conditions]
    values = {
        (place, name): odds.change(name, domains)
        for place, domains in _places(found)
        for name in shown
    }
    return _dots(values, title=_title(found), colours={SAME_KL: colour("random")})


def ablation_figure(found: StudyMeasures):
    """The general solution's effect, and what is left where a direction is ablated."""
    odds = found.log_odds
    values = {}
    for place, domains in _places(found):
        values[place, "general"] = odds.change("general", domains)
        values |= {
            (place, without("general", name)): effect_left(odds, name, domains) for name in ABLATED
        }
    return _dots(values, colours={without("general", ABLATED[-1]): colour("random")})


def _places(found: StudyMeasures) -> list[tuple[str, Sequence[str]]]:
    s = found.settings
    return [(f"inside: {s.domain}", [s.domain]), (f"outside: {', '.join(s.outside)}", s.outside)]


def _dots(values: Mapping[tuple[str, str], Interval], **options: Any):
    return dot_intervals(
        groups=[place for place, _ in values],
        series=[name for _, name in values],
        values=[value.estimate for value in values.values()],
        low=[value.low for value in values.values()],
        high=[value.high for value in values.values()],
        y_label="change of log-odds of misaligned\nanswers against base [nats/token]",
        **options,
    )


def _title(found: StudyMeasures) -> str:
    """What the picture shows, in a line."""
    s = found.settings
    spreads = general_transfers(found).verdict == "as in the papers"
    stays = narrow_stays(found).verdict == "as in the papers"
    first = f"Training on {s.domain} {'spreads' if spreads else 'is not seen to spread'}"
    return f"{first}; a KL penalty {'confines it' if stays else 'is not seen to confine it'}"


def cosine_figure(cosines: dict):
    """Cosine per layer between the mean difference and what each solution causes downstream."""
    frame = pd.DataFrame(cosines["rows"])
    frame["pair"] = frame["first"] + " vs " + frame["second"]
    shown = [pair for pair in frame["pair"].unique() if "general" in pair]
    curves = {
        pair: tuple(
            frame.loc[frame["pair"] == pair, name].to_numpy() for name in ("layer", "cosine")
        )
        for pair in shown
    }
    return layer_curves(curves, null=tuple(cosines["null"]))


def influence_figure(found: StudyMeasures):
    """KL on pre-training text against strength, at equal norms."""
    influence, s = found.influence, found.settings
    x = np.array(sorted(s.factors))
    curves = {}
    for name in (*SOLUTIONS, "benign", "random 0"):
        values = [influence.divergence(at(name, f), influence.doses[0]) for f in x]
        bands = np.array([(value.estimate, value.low, value.high) for value in values]).T
        curves[name.removesuffix(" 0")] = (x, *bands)
    return line_bands(
        curves,
        x_label="strength [factor on the common norm]",
        y_label=f"KL(base || edited) on {influence.corpus}\n[nats/token]",
    )


def training_figure(store: StudyStore):
    """Loss on the training set and KL elsewhere against updates, for the two solutions."""
    left, right = new_panels(2)
    losses, divergences = {}, {}
    for name in SOLUTIONS:
        run = Organism.load(store.folder / "organisms" / name).run
        x = np.array([step.step for step in run.steps])
        losses[name] = (x, np.array([step.loss for step in run.steps]))
        if run.steps[0].kl is not None:
            divergences[name] = (x, np.array([step.kl for step in run.steps]))
    line_bands(losses, x_label="update", y_label="training loss [nats/token]", ax=left)
    line_bands(divergences, x_label="update", y_label="KL elsewhere [nats/token]", ax=right)
    return left
