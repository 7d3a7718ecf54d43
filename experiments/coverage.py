"""How often the intervals of emlens hold the truth, in simulation, and the page that says so.

`python -m experiments.coverage --out docs/intervals.md` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from emlens._door import guarded
from emlens._stats import (
    Interval,
    RunningMean,
    bootstrap_gap,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
    bootstrap_trainings,
    gap_of_shares,
    mean_over_seeds,
    share_of_units,
    wilson,
)
from emlens.watch.roc import auroc_interval, promise, threshold_for

SIMULATIONS = 1000
AIM = (93.0, 97.0)
MANY = 400_000
"""Draws behind a truth that has no closed form."""

Simulate = Callable[[np.random.Generator], tuple[Interval, float]]
"""Draws data, and gives an interval with what it should hold."""


@dataclass(frozen=True)
class Case:
    """An interval on one kind of data.

    Attributes:
        interval: What it is the interval of.
        data: What is drawn.
        size: How much of it.
        simulate: Draws once.
        slow: Whether it resamples with a call each; a quarter of the simulations are enough.
    """

    interval: str
    data: str
    size: str
    simulate: Simulate
    slow: bool = False


@guarded
def coverage(simulations: int = SIMULATIONS, seed: int = 0) -> pd.DataFrame:
    """Simulate every interval, and count how often it holds the truth.

    Args:
        simulations: Data sets per row.
        seed: Seed of the data; the rows draw independently.

    Returns:
        One row per interval and kind of data: the share of intervals that hold the truth, those
        that lie below and above it, all in percent, and the median width.
    """
    rows = []
    for number, case in enumerate(cases()):
        generator = np.random.default_rng([seed, number])
        n = max(simulations // 4, 1) if case.slow else simulations
        drawn = [case.simulate(generator) for _ in range(n)]
        low, high, truth = np.array([(one.low, one.high, of) for one, of in drawn]).T
        rows.append(
            {
                "interval": case.interval,
                "data": case.data,
                "size": case.size,
                "holds [%]": 100 * float(((low <= truth) & (truth <= high)).mean()),
                "below [%]": 100 * float((high < truth).mean()),
                "above [%]": 100 * float((low > truth).mean()),
                "width": float(np.median(high - low)),
            }
        )
    return pd.DataFrame(rows)


def cases() -> Iterator[Case]:
    """All rows of the table."""
    for part in (_means, _trainings, _seeds, _rates, _gaps, _areas, _thresholds, _agreement):
        yield from part()


# -- means ---------------------------------------------------------------------------------------

SKEWED = {"normal": 0.0, "lognormal, sd of log 0.5": 0.5, "lognormal, sd of log 1": 1.0}


def _values(generator: np.random.Generator, spread: float, *shape: int) -> np.ndarray:
    """Values of mean 1: normal for a spread of zero, else lognormal."""
    noise = generator.normal(size=shape)
    return 1 + noise if spread == 0 else np.exp(spread * noise - spread**2 / 2)


def _documents(generator: np.random.Generator, n: int, spread: float) -> np.ndarray:
    """Sums and counts of documents: lengths are lognormal, values per token independent of them."""
    counts = np.ceil(np.exp(4 + 0.6 * generator.normal(size=n)))
    return np.array([counts * _values(generator, spread, n), counts])


def _means() -> Iterator[Case]:
    for name, spread in SKEWED.items():
        for n in (6, 12, 24, 60):

            def mean(generator: np.random.Generator, n: int = n, spread: float = spread):
                return bootstrap_mean(_values(generator, spread, n)), 1.0

            yield Case("mean over units", name, f"{n} units", mean)
    for name, spread in {"normal": 0.0, "lognormal, sd of log 0.7": 0.7}.items():
        for n in (12, 24, 64):

            def ratio(generator: np.random.Generator, n: int = n, spread: float = spread):
                return bootstrap_ratio(*_documents(generator, n, spread)), 1.0

            yield Case("mean per token", f"{name}, lengths differ", f"{n} documents", ratio)
    for name, spread in SKEWED.items():
        for n in (24, 72):

            def running(generator: np.random.Generator, n: int = n, spread: float = spread):
                kept = RunningMean(int(generator.integers(2**31)), 1000)
                for value in _values(generator, spread, n):
                    kept.add(value)
                return kept.interval(), 1.0

            yield Case("mean in one pass (screen)", name, f"{n} rows", running, slow=True)


def _trainings() -> Iterator[Case]:
    for runs, apart in ((2, 0.3), (3, 0.0), (3, 0.3), (3, 1.0), (5, 0.3), (5, 1.0)):
        for name in ("normal", "lognormal, sd of log 1"):
            for n in (12, 24):

                def mean(
                    generator: np.random.Generator,
                    runs: int = runs,
                    apart: float = apart,
                    n: int = n,
                    spread: float = SKEWED[name],
                ):
                    units = _values(generator, spread, n)
                    units = (units - 1) / (1 if spread == 0 else np.sqrt(np.expm1(spread**2)))
                    own = apart * generator.normal(size=(runs, 1))
                    both = 0.5 * generator.normal(size=(runs, n))
                    return bootstrap_trainings(units + own + both), 0.0

                size = f"{runs} trainings, {n} units"
                yield Case("mean over trainings", f"{name}, trainings {apart:g} sd", size, mean)


def _seeds() -> Iterator[Case]:
    for name in ("normal", "lognormal, sd of log 0.5"):
        for n in (3, 5):

            def mean(generator: np.random.Generator, n: int = n, spread: float = SKEWED[name]):
                return mean_over_seeds(_values(generator, spread, n)), 1.0

            yield Case("t interval over seeds", name, f"{n} seeds", mean)


# -- rates ---------------------------------------------------------------------------------------

QUESTIONS = ((4, 50), (8, 50), (12, 10), (24, 10), (44, 10))
ODDS = {
    "alike": (-3.0, 0.0),
    "differ": (-3.0, 1.0),
    "differ a lot": (-3.0, 2.0),
    "rare": (-5.0, 1.0),
}
"""Mean log-odds of a misaligned answer, and their spread over questions."""


def _chances(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def _rates() -> Iterator[Case]:
    normal = np.random.default_rng(0).normal(size=MANY)
    for name, (middle, spread) in ODDS.items():
        truth = float(_chances(middle + spread * normal).mean())
        for n, each in QUESTIONS:

            def rate(
                generator: np.random.Generator,
                n: int = n,
                each: int = each,
                at: tuple[float, float, float] = (middle, spread, truth),
            ):
                chances = _chances(at[0] + at[1] * generator.normal(size=n))
                return share_of_units(generator.binomial(each, chances), np.full(n, each)), at[2]

            data = f"questions {name}, {100 * truth:.1f}%"
            yield Case("rate over questions", data, f"{n} questions of {each} answers", rate)
    for n in (50, 400):

        def independent(generator: np.random.Generator, n: int = n):
            return wilson(int(generator.binomial(n, 0.05)), n), 0.05

        yield Case("Wilson's, answers independent", "5%", f"{n} answers", independent)

    def clustered(generator: np.random.Generator):
        hits = generator.binomial(50, _chances(-3 + generator.normal(size=8))).sum()
        return wilson(int(hits), 400), float(_chances(-3 + normal).mean())

    yield Case("Wilson's, answers independent", "questions differ", "8 questions of 50", clustered)


def _gaps() -> Iterator[Case]:
    normal = np.random.default_rng(0).normal(size=MANY)
    for name, (middle, spread) in ODDS.items():
        ends = [float(_chances(middle + by + spread * normal).mean()) for by in (1, 0)]
        for n, each in QUESTIONS[1:4:2]:

            def gap(
                generator: np.random.Generator,
                n: int = n,
                each: int = each,
                at: tuple[float, float, float] = (middle, spread, ends[0] - ends[1]),
            ):
                own, counts = at[0] + at[1] * generator.normal(size=n), np.full(n, each)
                hits = [generator.binomial(each, _chances(own + by)) for by in (1, 0)]
                return gap_of_shares((hits[0], counts), (hits[1], counts)), at[2]

            size = f"{n} questions of {each} answers"
            yield Case("difference of rates, paired", f"questions {name}", size, gap)
    for n in (8, 24):

        def shift(generator: np.random.Generator, n: int = n):
            own, counts = generator.normal(70, 15, n), np.full(n, 10.0)
            change = generator.normal(-5, 5, n)
            noise = generator.normal(0, 8 / np.sqrt(10), (2, n))
            first, second = 10 * (own + change + noise[0]), 10 * (own + noise[1])
            return bootstrap_gap((first, counts), (second, counts)), -5.0

        yield Case("shift of a mean, paired", "normal", f"{n} questions of 10 answers", shift)


# -- monitors and judges -------------------------------------------------------------------------


def _areas() -> Iterator[Case]:
    from scipy.stats import norm

    for area in (0.8, 0.95, 0.99):
        for kind in ("normal", "exponential", "pairs of one prompt", "3 answers to a prompt"):
            for n in (12, 24, 60):

                def of(generator: np.random.Generator, n: int = n, at: float = area, k: str = kind):
                    groups, own = np.arange(2 * n), generator.normal(size=2 * n)
                    if k == "exponential":
                        scores = generator.exponential(np.repeat([at / (1 - at), 1.0], n))
                    else:
                        if k != "normal":
                            groups = groups % n if k == "pairs of one prompt" else groups // 3
                            shared = generator.normal(size=2 * n)[groups]
                            own = np.sqrt(0.5) * (own + shared)
                        scores = own + np.repeat([norm.ppf(at) * np.sqrt(2), 0.0], n)
                    return auroc_interval(scores, np.arange(2 * n) < n, groups), at

                yield Case("AUROC", f"{kind}, {area:g}", f"{n} and {n}", of)


def _thresholds() -> Iterator[Case]:
    from scipy.stats import norm

    for share in (0.05, 0.2):
        for kind in ("one answer to a prompt", "3 answers to a prompt"):
            for n in (10, 20, 24, 60):

                def alarms(
                    generator: np.random.Generator, n: int = n, at: float = share, k: str = kind
                ):
                    each = 3 if k.startswith("3") else 1
                    groups = np.repeat(np.arange(n), each)
                    own, shared = generator.normal(size=n * each), generator.normal(size=n)
                    scores = np.sqrt(0.5) * (own + shared[groups])
                    limit = threshold_for(scores, np.zeros(n * each, bool), groups, at)
                    # of new conversations: their scores are standard normal
                    return promise(scores, groups, limit), float(norm.sf(limit))

                yield Case(f"false alarms, {share:.0%} asked for", kind, f"{n} prompts", alarms)


def _agreement() -> Iterator[Case]:
    from scipy.stats import rankdata

    def ranked(x: np.ndarray, y: np.ndarray) -> float:
        a, b = rankdata(x), rankdata(y)
        return float(np.corrcoef(a, b)[0, 1])

    def kappa(x: np.ndarray, y: np.ndarray) -> float:
        a, b = x > 0.5, y > 0.5
        chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
        return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else float("nan")

    draws = np.random.default_rng(0).normal(size=(3, MANY))
    whole = draws[0] + 0.7 * draws[1], draws[0] + 0.7 * draws[2]
    for name, statistic in (("Spearman's correlation", ranked), ("Cohen's kappa", kappa)):
        truth = statistic(*whole)
        for n in (24, 100):

            def of(
                generator: np.random.Generator,
                n: int = n,
                statistic: Callable[[np.ndarray, np.ndarray], float] = statistic,
                truth: float = truth,
            ):
                both, one, other = generator.normal(size=(3, n))
                x, y = both + 0.7 * one, both + 0.7 * other

                def drawn(chosen: np.ndarray) -> float:
                    return statistic(x[chosen], y[chosen])

                own = int(generator.integers(2**31))
                estimate = statistic(x, y)
                options = {"estimate": estimate, "seed": own, "resamples": 500}
                return bootstrap_statistic(drawn, n, **options), truth

            yield Case(name, "normal scores of two judges", f"{n} answers", of, slow=True)


# -- the page ------------------------------------------------------------------------------------

TEXT = """# Intervals

Made by `python -m experiments.coverage` with {n} simulated data sets a row. Brackets and bands in
emlens are 95% intervals. The table says how often each kind holds the truth at sizes that people
use. The aim is 93 to 97%; `narrow` and `wide` mark rows outside of it. One simulated share has a
standard error of {error:.1f} points; rows of `mean in one pass`, Spearman and kappa use a quarter
of the data sets.

## What to know

- **Units, not numbers, make an interval.** Units are pairs, documents, questions, prompts or
  trainings. With fewer than two there is no interval.
- **Means** have studentised bootstrap intervals that are never narrower than t intervals. For
  very skewed units (a standard deviation of the log of 1: a few units carry the effect) 90 to 93%
  hold the truth with 6 to 24 units, and 95% with 60; the others lie
  below it.
- **Rates** are over questions. Eight questions with 50 answers each are eight units: where
  questions differ a lot, the interval of a rate of 13% spans 47 points. A claim about a rate
  takes 24 questions or more; fewer than four say next to nothing. Where questions are alike or
  misaligned answers rare, rates and their differences hold the truth more often than they say (97
  to 99%): the design effect of so few questions cannot be known, and it is taken to be one
  or more. No hit in 400 answers to eight questions gives {zero}. The interval of a
  single question is Wilson's over its answers, and says nothing of other questions.
- **Wilson's interval** alone, in columns of that name and in `evals.topics`, takes answers as
  independent. Where questions differ it is far too narrow.
- **Trainings** are random as well: three say how far another would be off, with wide intervals.
  Two have a t interval of 12.7 standard errors over trainings.
- **AUROC** has a width at 1.0 too: 24 and 24 conversations without one in the wrong order give
  {one}. The formula behind it overstates the variance of normal scores near 1, so 98% hold the
  truth there.
- **A monitor's threshold** promises `(k + 1) / (n + 1)` false alarms among new conversations,
  where `k` of the `n` aligned prompts that it was set on score higher. For 5% it takes 19 of
  them; with 20 the promise is 4.8%, with 24 it is 4.0%, with 60 it is 4.9%. The share of one
  monitor varies around it, as the interval says: with 24 the truth lies between {alarms}. With
  ten prompts the highest score promises 9.1%, and `Monitor.fit` warns.
- A promise holds for conversations like those that the threshold was set on. Set it on the
  model's own answers with `Monitor.calibrated` before it watches the model. Several answers to a
  prompt count as one in it, which is careful: fewer new conversations raise an alarm than it
  says.
- Not simulated here: the intervals of cosines between directions and of Fisher profiles.

## The table

`below` and `above` are shares of intervals that lie below and above the truth; widths are
medians, in the unit of the number. In `mean over trainings`, trainings differ by a multiple of
the standard deviation over units, and their interaction has half of it.

"""


def write_intervals(found: pd.DataFrame, page: Path, simulations: int = SIMULATIONS) -> Path:
    """Write the page of intervals."""
    whole = np.ones(24)
    scores, truth = np.concatenate([whole, 0 * whole]), np.arange(48) < 24
    alarms = promise(np.arange(24.0), np.arange(24), 23.0)
    text = TEXT.format(
        n=simulations,
        error=100 * np.sqrt(0.05 * 0.95 / simulations),
        zero=_percent(share_of_units(np.zeros(8), np.full(8, 50.0))),
        one=f"{auroc_interval(scores, truth, np.arange(48)):.2f}",
        alarms=f"{100 * alarms.low:.1f} and {100 * alarms.high:.1f}%",
    )
    shown = found.copy()
    shown["mark"] = [
        "narrow" if x < AIM[0] else "wide" if x > AIM[1] else "" for x in shown["holds [%]"]
    ]
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
    for row in shown.to_dict("records"):
        cells = [
            f"{x:.2f}" if k == "width" else f"{x:.1f}" if isinstance(x, float) else x
            for k, x in row.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return page


def _percent(found: Interval) -> str:
    return f"{100 * found.estimate:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def main(
    out: Annotated[Path, typer.Option(help="Page to write.")],
    simulations: Annotated[int, typer.Option(help="Data sets per row.")] = SIMULATIONS,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
) -> None:
    """Simulate every interval, and write the page that says how often it holds the truth."""
    found = coverage(simulations, seed)
    typer.echo(found.to_string(index=False, float_format="%.2f"))
    typer.echo(f"written: {write_intervals(found, out, simulations)}")


if __name__ == "__main__":
    typer.run(main)
