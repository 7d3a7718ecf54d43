"""The four asymmetries of general and narrow solutions, over domains and seeds, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from emlens._door import guarded
from emlens._reading import expanded
from emlens._results import Result
from emlens._runs import SETTINGS, Parts
from emlens._stats import Interval, bootstrap_trainings, holm, mean_over_seeds, p_value
from emlens.hooked import HookedModel, load
from emlens.hooked.identity import identities
from emlens.measures import Confinement, Divergence, Efficiency, LogOdds, Stability, log_odds
from emlens.measures.confinement import gap_over
from emlens.study.folder import RunFolder
from experiments.trials import (
    BENIGN,
    RANDOM,
    SOLUTIONS,
    AsymmetrySettings,
    Kind,
    Trial,
    TrialData,
    read_trials,
    trial_folder,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FOLDER = RunFolder(
    title="General and narrow solutions over domains and seeds (python -m experiments)",
    files={
        "findings.md": "the page of findings",
        "figures/": "its figures, PNG and SVG",
        "trials/": "a folder per domain, kind and seed: organisms and their measures",
        "base/": "the unmodified model's log-odds by domain",
        "paths/": "what lies between the solutions, by domain",
        "settings.json": "the settings as the runs compare them",
    },
    resume="python -m experiments --config FOLDER/config.yaml --out FOLDER   (from the repository)",
    load=(
        "from experiments import read_asymmetries, read_paths",
        'read_asymmetries(".").table()',
        'read_paths(".")',
    ),
)

CLAIMS = {
    "general transfers": "general: change of log-odds outside [nats/token]",
    "narrow stays": "narrow outside, less general outside at the strength of equal effect inside",
    "efficiency": "loss of general minus narrow at equal norm [nats/token]",
    "stability": "gain lost to noise, narrow minus general [percentage points]",
    "influence": "KL on pre-training text at equal norm, general minus narrow [nats/token]",
}
"""The claims of arXiv 2602.07852, and the quantity that each is read from."""

DIGITS = {"stability": 1, "": 3}
"""Decimals that are printed of a claim's quantity, and of the others'."""

VERDICTS = ("as in the papers", "the other way", "not seen")
"""What an interval says of a claim: on their side of zero, on the other, around it."""

_SHOWN = ("general", "narrow", "benign", "random")

_EXPECTED = {
    "general transfers": 1,
    "narrow stays": -1,
    "efficiency": -1,
    "stability": 1,
    "influence": 1,
}


class AsymmetryRow(TypedDict):
    """A quantity of one kind of solution in one domain."""

    kind: str
    domain: str
    quantity: str
    estimate: float
    low: float
    high: float
    seeds: tuple[float, ...]


class Asymmetries(Result):
    """What was found, a row per kind of solution, domain and quantity.

    Attributes:
        rows: `kind`, `domain`, `quantity`, `estimate`, `low`, `high`, `seeds` (the estimate of
            each seed alone).
        settings: What it was tried on.
    """

    rows: tuple[AsymmetryRow, ...]
    settings: dict

    def of(self, kind: str, domain: str, quantity: str) -> Interval | None:
        """One quantity; None where it was not measured."""
        for row in self.rows:
            if (row["kind"], row["domain"], row["quantity"]) == (kind, domain, quantity):
                return Interval(row["estimate"], row["low"], row["high"])
        return None

    def verdict(self, kind: str, domain: str, claim: str) -> str:
        """`as in the papers`, `the other way`, `not seen`, or empty where it cannot be said.

        An end of the interval that is zero as it is printed does not exclude zero.
        """
        found = self.of(kind, domain, claim)
        if found is None:
            return ""
        digits = DIGITS.get(claim, DIGITS[""])
        if not (round(found.low, digits) > 0 or round(found.high, digits) < 0):
            return VERDICTS[2]
        return VERDICTS[0] if found.estimate * _EXPECTED[claim] > 0 else VERDICTS[1]

    def corrected(self) -> dict[tuple[str, str, str], tuple[float, float]]:
        """p of every cell of the claims, and p by Holm's correction for the number of cells.

        Cells by kind, domain and claim; those that cannot be said are left out. p is read from
        the interval, so that it is below 0.05 where a 95% interval excludes zero.
        """
        cells = {
            (row["kind"], row["domain"], row["quantity"]): self._p(row)
            for row in self.rows
            if row["quantity"] in CLAIMS
        }
        known = {cell: p for cell, p in cells.items() if np.isfinite(p)}
        both = zip(known.values(), holm(list(known.values())).tolist(), strict=True)
        return dict(zip(known, both, strict=True))

    def holds(self, kind: str, domain: str, claim: str) -> bool:
        """Whether a verdict other than `not seen` stands after Holm's correction."""
        _, p = self.corrected().get((kind, domain, claim), (1.0, 1.0))
        return self.verdict(kind, domain, claim) in VERDICTS[:2] and p < 1 - self.level

    def _p(self, row: AsymmetryRow) -> float:
        degrees = np.inf
        if row["quantity"] == "stability":
            n = len(row["seeds"])
            degrees = (n if n > 1 else self.settings.get("noise_seeds", 3)) - 1
        found = Interval(row["estimate"], row["low"], row["high"])
        return p_value(found, degrees=degrees, level=self.level)

    def table(self) -> pd.DataFrame:
        """One row per quantity; p, raw and by Holm's correction, of those that claims are."""
        import pandas as pd

        p = self.corrected()
        unknown = float("nan"), float("nan")
        cells = [p.get((x["kind"], x["domain"], x["quantity"]), unknown) for x in self.rows]
        return pd.DataFrame(
            [
                {
                    **{k: row[k] for k in ("kind", "domain", "quantity")},
                    **{k: row[k] for k in ("estimate", "low", "high")},
                    "by seed": ", ".join(f"{value:+.3f}" for value in row["seeds"]),
                    "p": raw,
                    "p (Holm)": holm_p,
                }
                for row, (raw, holm_p) in zip(self.rows, cells, strict=True)
            ]
        )

    def plot(self, ax: Axes | None = None, *, kind: str = "adapter") -> Axes | list[Axes]:
        """Change of log-odds inside of each domain, and outside beside it; on `ax` outside alone.

        Raises:
            ValueError: If there are no trials of the kind.
        """
        from emlens.figures.bars import dot_intervals
        from emlens.figures.style import new_panels, share_y

        shown = {
            place: [
                (row, solution)
                for row in self.rows
                for solution in _SHOWN
                if (row["kind"], row["quantity"]) == (kind, f"{solution} {place}")
            ]
            for place in (("inside", "outside") if ax is None else ("outside",))
        }
        shown = {place: rows for place, rows in shown.items() if rows}
        if not shown:
            raise ValueError(f"there are no trials of kind {kind!r}")
        panels = new_panels(len(shown), width=10.3, height=3.7) if ax is None else [ax]
        for panel, (place, rows) in zip(panels, shown.items(), strict=True):
            dot_intervals(
                groups=[row["domain"] for row, _ in rows],
                series=[solution for _, solution in rows],
                values=[row["estimate"] for row, _ in rows],
                low=[row["low"] for row, _ in rows],
                high=[row["high"] for row, _ in rows],
                y_label="change of log-odds [nats/token]",
                x_label="narrow domain",
                title=f"{place.capitalize()} of the domain",
                ax=panel,
            )
        if len(panels) > 1 and (legend := panels[0].get_legend()) is not None:
            legend.remove()
        share_y(panels)
        return panels if ax is None else ax


@guarded
def run_asymmetries(
    out: str | Path = "runs/asymmetries",
    settings: AsymmetrySettings | None = None,
    *,
    model: HookedModel | None = None,
    progress: bool = True,
    made_by: str = "experiments.run_asymmetries(folder, settings)",
    **overrides: Any,
) -> Asymmetries:
    """Train general and narrow solutions in every domain with every seed, and measure them.

    Each part that is finished stays finished, so an interrupted run resumes; several
    processes may work on different `kinds` or `domains` in one folder.

    Args:
        out: The folder.
        settings: What is tried; `AsymmetrySettings()` by default.
        model: Take this model instead of loading the settings' one.
        progress: Show progress bars.
        made_by: The command or call that is noted in the folder's `README.txt`.
        **overrides: Fields of `AsymmetrySettings`.

    Returns:
        What all finished trials in the folder say, those of other calls included.

    Raises:
        ValueError: If the folder holds trials with other settings.
    """
    out = expanded(out)
    chosen = replace(settings or AsymmetrySettings(), **overrides)
    if model is not None:
        chosen = replace(chosen, model=model.name)
    hooked = model or load(chosen.model)
    keep_settings(out, chosen, hooked)
    FOLDER.write(out, chosen.to_dict(), made_by)
    for seed in chosen.seeds:
        for domain in chosen.domains:
            for kind in chosen.kinds:
                where = trial_folder(out, domain, kind, seed)
                trial = Trial(hooked, chosen, domain, kind, seed, where, progress)
                trial.run(lambda domain=domain: _base(hooked, out, domain, chosen, progress))
    return read_asymmetries(out)


@guarded
def read_asymmetries(out: str | Path) -> Asymmetries:
    """Pool the finished trials of a folder.

    Intervals of changes of log-odds, losses and KL resample trainings and pairs, conversations or
    documents together; those of stability are t intervals over trainings (over noise draws where
    there is one training).

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    out = expanded(out)
    if not (out / SETTINGS).is_file():
        raise FileNotFoundError(f"{out} holds no asymmetries; run them into it first")
    settings = Parts(out).settings_as(AsymmetrySettings.from_dict)
    rows: list[AsymmetryRow] = []
    everything = AsymmetrySettings()
    for kind in everything.kinds:
        for domain in everything.domains:
            trials = read_trials(out, domain, kind)
            if trials:
                rows += _pooled(kind, domain, trials, settings)
    return Asymmetries(tuple(rows), settings.to_dict())


# -- pooling -------------------------------------------------------------------------------------


def _pooled(
    kind: Kind, domain: str, trials: list, settings: AsymmetrySettings
) -> list[AsymmetryRow]:
    data = TrialData.of(domain, settings)
    rows: dict[str, tuple[Interval, list[float]]] = {}
    odds = [trial[0] for trial in trials]
    n_inside, n_outside = len(data.inside), len(data.outside)
    if len(odds[0].ids) != n_inside + n_outside or not n_inside or not n_outside:
        raise ValueError(
            f"the trials of {domain!r} have {len(odds[0].ids)} pairs, but {SETTINGS} says "
            f"{n_inside} inside and {n_outside} outside; bring back the one they were made with"
        )
    shifts = {}
    for name in (*SOLUTIONS, BENIGN, RANDOM):
        with_it = [scores for scores in odds if name in scores.conditions]
        if with_it:
            each = np.array([scores.of(name) - scores.of("base") for scores in with_it])
            shifts[name] = each[:, :n_inside], each[:, n_inside:]
            for place, values in zip(("inside", "outside"), shifts[name], strict=True):
                rows[f"{name} {place}"] = bootstrap_trainings(values), values.mean(1).tolist()
    rows["general transfers"] = rows["general outside"]
    confined = [trial[4] for trial in trials if trial[4] is not None]
    # the strength of an effect that is not there says nothing
    if rows["general inside"][0].low > 0 and len(confined) == len(trials):
        rows["narrow stays"] = _confined(confined)
    rows["efficiency"] = _efficiency([trial[1] for trial in trials])
    stability, each = _stability([trial[2] for trial in trials])
    if np.isfinite(stability.estimate):  # where nothing was gained, nothing can be lost to noise
        rows["stability"] = stability, each
    rows["influence"] = _influence([trial[3] for trial in trials], "general", "narrow")
    if RANDOM in trials[0][3]:
        rows["influence, general over random"] = _influence(
            [trial[3] for trial in trials], "general", RANDOM
        )
    diverged = [trial[5] for trial in trials]
    for place in dict.fromkeys(diverged[0].sets):
        for name in (*SOLUTIONS, RANDOM):
            rows[f"KL {place}, {name}"] = _divergence(diverged, name, place)
    return [
        {
            "kind": kind,
            "domain": domain,
            "quantity": quantity,
            "estimate": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "seeds": tuple(seeds),
        }
        for quantity, (interval, seeds) in rows.items()
    ]


def _confined(found: Sequence[Confinement]) -> tuple[Interval, list[float]]:
    """Narrow outside, less general outside at the matched strength; it is matched by training."""
    return gap_over(found), [one.gap().estimate for one in found]


def _divergence(found: Sequence[Divergence], name: str, place: str) -> tuple[Interval, list[float]]:
    first = found[0]
    here = np.array([one == place for one in first.sets])
    sums = [one.kl[one.conditions.index(name), here] for one in found]
    counts = first.counts[here]
    return bootstrap_trainings(sums, counts), [float(x.sum() / counts.sum()) for x in sums]


def _efficiency(found: Sequence[Efficiency]) -> tuple[Interval, list[float]]:
    gaps, each = [], []
    for one in found:
        a, b = (np.asarray(one.sums[one.directions.index(name)]) for name in SOLUTIONS)
        gaps.append((a - b).mean(0))
        each.append(float(gaps[-1].sum() / np.sum(one.counts)))
    return bootstrap_trainings(gaps, found[0].counts), each


def _stability(found: Sequence[Stability]) -> tuple[Interval, list[float]]:
    gaps = [one.increase("narrow") - one.increase("general") for one in found]
    each = [float(gap.mean()) for gap in gaps]
    return mean_over_seeds(each if len(each) > 1 else gaps[0].mean(0)), each


def _influence(found: Sequence[dict], first: str, second: str) -> tuple[Interval, list[float]]:
    gaps = [np.asarray(one[first]) - np.asarray(one[second]) for one in found]
    counts = found[0]["counts"]
    each = [float(gap.sum() / np.sum(counts)) for gap in gaps]
    return bootstrap_trainings(gaps, counts), each


# -- the folder ----------------------------------------------------------------------------------


def _base(
    model: HookedModel, out: Path, domain: str, settings: AsymmetrySettings, progress: bool
) -> LogOdds:
    def measured() -> LogOdds:
        data = TrialData.of(domain, settings)
        pairs = (*data.inside, *data.outside)
        return log_odds(model, pairs, {"base": (None, ())}, progress=progress)

    return LogOdds.load(Parts(out / "base").part(f"{domain}.json", measured))


def keep_settings(out: Path, settings: AsymmetrySettings, model: HookedModel) -> None:
    """Trials of one folder share all but which of them are run.

    Raises:
        ValueError: If they do not; the settings that differ are named.
    """
    Parts(out).keep_settings(
        {**settings.to_dict(), **identities(model)},
        f"the run in {out}",
        "choose another folder, or give the settings that it was made with",
        free=("domains", "kinds", "seeds"),
        defaults=AsymmetrySettings().to_dict(),
    )
