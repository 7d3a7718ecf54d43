"""The figures of a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from emlens.figures import house_style, save_figure
from emlens.figures.bars import dot_intervals
from emlens.figures.lines import layer_curves, line_bands
from emlens.figures.style import new_panels
from emlens.study.findings import StudyMeasures
from emlens.study.store import StudyStore

SOLUTIONS = ("general", "narrow", "benign", "random", "mean-diff")
ABLATIONS = (
    "general",
    "general - general",
    "general - mean-diff",
    "general - random",
    "base - mean-diff",
)


def draw_all(found: StudyMeasures, cosines: dict, store: StudyStore) -> dict[str, list[str]]:
    """Draw every figure into `figures/`; names of the files by figure."""
    folder = store.folder / "figures"
    folder.mkdir(exist_ok=True)
    makers = {
        "log_odds": lambda: odds_figure(found, SOLUTIONS),
        "ablation": lambda: odds_figure(found, ABLATIONS),
        "cosines": lambda: cosine_figure(cosines),
        "efficiency": found.efficiency.plot,
        "stability": found.stability.plot,
        "influence": found.influence.plot,
        "training": lambda: training_figure(store),
    }
    files = {}
    with house_style():
        for name, make in makers.items():
            written = save_figure(make(), folder / name)
            files[name] = [str(Path(path).relative_to(store.folder)) for path in written]
    return files


def odds_figure(found: StudyMeasures, conditions: tuple[str, ...]):
    """Change of log-odds by domain for some conditions."""
    odds = found.log_odds
    rows = [
        {"condition": name, "domain": domain, "change": odds.change(name, [domain])}
        for domain in dict.fromkeys(odds.domains)
        for name in conditions
    ]
    return dot_intervals(
        groups=[row["domain"] for row in rows],
        series=[row["condition"] for row in rows],
        values=[row["change"].estimate for row in rows],
        low=[row["change"].low for row in rows],
        high=[row["change"].high for row in rows],
        y_label="change of log-odds vs base [nats/token]",
    )


def cosine_figure(cosines: dict):
    """Cosine per layer between the mean difference and what each vector causes downstream."""
    frame = pd.DataFrame(cosines["above"]["rows"])
    curves = {}
    frame["pair"] = frame["first"] + " vs " + frame["second"]
    for pair, part in frame.groupby("pair", sort=False):
        if "benign" not in str(pair):
            curves[str(pair)] = (part["layer"].to_numpy(), part["cosine"].to_numpy())
    low, high = cosines["above"]["null"]
    return layer_curves(curves, null=(low, high))


def training_figure(store: StudyStore):
    """Loss on the training set and KL elsewhere against updates, for the two solutions."""
    from emlens.training import TrainingRun

    runs = {
        name: TrainingRun.load(store.folder / "runs" / f"{name}.safetensors")
        for name in ("general", "narrow")
    }
    left, right = new_panels(2)
    losses, divergences = {}, {}
    for name, run in runs.items():
        x = np.array([step.step for step in run.steps])
        losses[name] = (x, np.array([step.loss for step in run.steps]))
        if run.steps[0].kl is not None:
            divergences[name] = (x, np.array([step.kl for step in run.steps]))
    line_bands(losses, x_label="update", y_label="training loss [nats/token]", ax=left)
    line_bands(divergences, x_label="update", y_label="KL elsewhere [nats/token]", ax=right)
    return left
