"""Several paths of training side by side: norms, principal components, turns, where they go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import Result
from emlens._types import checked_fields
from emlens.training.paths.path import (
    Part,
    TrainingPath,
    comparison_scores,
    cosines_with,
    first_few,
)
from emlens.training.paths.transition import (
    MIN_MOVE,
    Transition,
    find_transition,
    local_cosine,
    regular,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Unit = Literal["steps", "records"]
_CHUNK = 2**18


class Trajectory(Result):
    """What `trajectory` found, per run and record.

    Attributes:
        parameters: Names of the parameters that were looked at.
        steps: Updates done at each record of each run.
        norms: Norm of each record.
        coordinates: Principal components of all runs' records together, `[records, components]`.
        explained: Share of variance that each component holds.
        lags: The `k` of the local cosines of each run.
        unit: What the lags count.
        min_move: Where both moves of a local cosine are shorter, there is none.
        local_cosines: `[lags, records]` for each run; NaN where there is none.
        final_cosines: For each run and each run's final record, the cosine of every record with
            it, `[records]`; NaN for records of norm 0.
        final_scores: Likewise the comparison score, see `comparison_scores`.
        descent_cosines: The same of minus the gradient, for runs with gradients: positive where
            a small step down the loss goes towards that solution.
        transitions: What `transition` gives, as plain records.
    """

    AXES = {
        "steps": "curves records*",
        "norms": "curves records*",
        "coordinates": "curves records* axes",
        "explained": "axes",
        "final_cosines": "curves curves? records*",
        "final_scores": "curves? curves? records*",
        "descent_cosines": "curves? curves? records*",
        "transitions": "curves",
        "lags": "curves lags*",
        "local_cosines": "curves lags* records*",
    }

    parameters: tuple[str, ...]
    steps: dict[str, tuple[int, ...]]
    norms: dict[str, tuple[float, ...]]
    coordinates: dict[str, tuple[tuple[float, ...], ...]]
    explained: tuple[float, ...]
    lags: dict[str, tuple[int, ...]]
    unit: Unit
    min_move: float
    local_cosines: dict[str, tuple[tuple[float, ...], ...]]
    final_cosines: dict[str, dict[str, tuple[float, ...]]]
    final_scores: dict[str, dict[str, tuple[float, ...]]]
    descent_cosines: dict[str, dict[str, tuple[float, ...]]]
    transitions: dict[str, dict]

    def _verify(self) -> None:
        for run, record in self.transitions.items():
            if len(checked_fields(Transition, record)["peaks"]) != len(self.lags[run]):
                raise ValueError(f"the transition of {run} has not a peak for each of its lags")

    def transition(self, run: str) -> Transition:
        """Where a run turns, with its interval, or why it is said not to.

        Raises:
            ValueError: If there is no such run.
        """
        self._known([run])
        return Transition(**self.transitions[run])

    def table(self) -> pd.DataFrame:
        """One row per run and record; norms in units of the parameters."""
        import pandas as pd

        rows = []
        for run, steps in self.steps.items():
            for record, step in enumerate(steps):
                row = {"run": run, "step": step, "norm": self.norms[run][record]}
                for place, value in enumerate(self.coordinates[run][record]):
                    row[f"PC{place + 1}"] = value
                for lag, values in zip(self.lags[run], self.local_cosines[run], strict=True):
                    row[f"local cosine, k = {lag} {self.unit}"] = values[record]
                for other, values in self.final_cosines[run].items():
                    row[f"cosine with {other}, final"] = values[record]
                for other, values in self.final_scores.get(run, {}).items():
                    row[f"score with {other}, final"] = values[record]
                for other, values in self.descent_cosines.get(run, {}).items():
                    row[f"cosine of -gradient with {other}, final"] = values[record]
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The runs' paths in the plane of the first two components."""
        from emlens.figures.paths import path_plot

        tracks = {}
        for run, records in self.coordinates.items():
            points = np.zeros((len(records), 2))
            points[:, : len(self.explained[:2])] = np.asarray(records)[:, :2]
            tracks[run] = points
        shares = [f" ({100 * share:.0f}% of variance)" for share in self.explained[:2]]
        labels = [f"PC{n + 1}{share}" for n, share in enumerate([*shares, "", ""][:2])]
        return path_plot(tracks, x_label=labels[0], y_label=labels[1], ax=ax)

    def plot_local_cosine(self, lag: int | None = None, ax: Axes | None = None) -> Axes:
        """Local cosines against steps, transitions as vertical lines with their intervals.

        One run is drawn with all its lags; several are drawn with one, the middle by default.

        Args:
            lag: The one `k` to draw.
            ax: Axes to draw on.

        Raises:
            ValueError: If a run has no such lag.
        """
        from emlens.figures import palette
        from emlens.figures.lines import line_bands

        curves, runs = {}, list(self.steps)
        for run in runs:
            lags = self.lags[run]
            if lag is not None and lag not in lags:
                raise ValueError(
                    f"run {run!r} has no lag {lag}; it has {', '.join(map(str, lags))}"
                )
            one = lags[len(lags) // 2] if lag is None else lag
            for k in lags if lag is None and len(runs) == 1 else [one]:
                values = np.asarray(self.local_cosines[run][lags.index(k)])
                name = f"k = {k}" if len(runs) == 1 else run
                curves[name] = (np.asarray(self.steps[run]), values)
        ax = line_bands(
            curves,
            x_label="update",
            y_label="local cosine [-1 straight, +1 back]",
            reference=(0.0, "right angle"),
            ax=ax,
        )
        shades = palette(curves)
        for run in runs:
            found = self.transition(run)
            if found.step is None or found.low is None or found.high is None:
                continue
            shade = shades.get(run, "0.45")
            ax.axvline(found.step, color=shade, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
            ax.axvspan(found.low, found.high, color=shade, alpha=0.12, linewidth=0, zorder=0)
        return ax

    def plot_norm(self, ax: Axes | None = None) -> Axes:
        """Norms against steps."""
        from emlens.figures.lines import line_bands

        curves = {r: (np.asarray(self.steps[r]), np.asarray(self.norms[r])) for r in self.steps}
        return line_bands(curves, x_label="update", y_label="norm of the parameters", ax=ax)

    def _known(self, runs: Sequence[str]) -> None:
        unknown = [run for run in runs if run not in self.steps]
        if unknown:
            raise ValueError(
                f"there is no run {unknown[0]!r}; the runs are {first_few([*self.steps])}"
            )


@guarded
def trajectory(
    runs: Mapping[str, TrainingPath],
    *,
    names: Iterable[str] | None = None,
    part: Part | None = "B",
    lags: Sequence[int] | None = None,
    unit: Unit = "steps",
    min_move: float = MIN_MOVE,
    components: int = 3,
    seed: int = 0,
) -> Trajectory:
    """Compare the paths of one or several trainings of the same parameters.

    All of it comes from the inner products of the records, summed parameter by parameter in fp64,
    so that no second copy of a path is made.

    Args:
        runs: Paths by name, e.g. `general` and `narrow`.
        names: Parameters to look at, all by default.
        part: Of adapters, only `B` as in the papers, only `A`, or None for both.
        lags: `k` of the local cosines; by default 1, 2 and 3 times each run's usual distance of
            records, which is the 5, 10 and 15 steps of the papers for their checkpoints.
        unit: Whether lags count `steps` or `records`.
        min_move: Where both moves of a local cosine are shorter, there is none. The default is
            that of arXiv 2506.11613, for a `B` of norm about 0.1; 0 for no limit. It is applied
            to the parameters looked at; the paper's code also keeps a step of `B` if `A` moves.
        components: Principal components to keep, at most.
        seed: Seed of the shuffling that says whether a turn is more than chance.

    Returns:
        A `Trajectory`.

    Raises:
        ValueError: If there are no runs, they differ in parameters or shapes, a record is not
            finite, or a setting is none.
    """
    _check(runs, lags, unit, components, min_move)
    chosen = _parameters(runs, None if names is None else list(names), part)
    gram, descent = _products(runs, chosen)
    places, start = {}, 0
    for run, path in runs.items():
        places[run] = np.arange(start, start + len(path))
        start += len(path)
    ends = {run: int(own[-1]) for run, own in places.items()}
    coordinates, explained = _components(gram, components)
    positions = {r: p.steps if unit == "steps" else tuple(range(len(p))) for r, p in runs.items()}
    of_run = {r: tuple(lags) if lags else _usual(positions[r]) for r in runs}
    own = {run: gram[np.ix_(at, at)] for run, at in places.items()}
    found = {
        r: find_transition(own[r], positions[r], of_run[r], p.steps, min_move=min_move, seed=seed)
        for r, p in runs.items()
    }
    return Trajectory(
        parameters=tuple(chosen),
        steps={run: tuple(path.steps) for run, path in runs.items()},
        norms={run: _numbers(np.sqrt(gram[at, at])) for run, at in places.items()},
        coordinates={r: tuple(map(_numbers, coordinates[at])) for r, at in places.items()},
        explained=_numbers(explained),
        lags=of_run,
        unit=unit,
        min_move=float(min_move),
        local_cosines={
            r: tuple(_numbers(local_cosine(own[r], positions[r], k, min_move)) for k in of_run[r])
            for r in runs
        },
        final_cosines={
            r: {
                o: _numbers(cosines_with(gram[at, end], gram[end, end], np.sqrt(gram[at, at])))
                for o, end in ends.items()
            }
            for r, at in places.items()
        },
        final_scores=comparison_scores(runs, chosen),
        descent_cosines={
            r: {
                o: _numbers(cosines_with(products[:, end], gram[end, end], norms))
                for o, end in ends.items()
            }
            for r, (products, norms) in descent.items()
        },
        transitions={run: asdict(turn) for run, turn in found.items()},
    )


def _check(
    runs: Mapping[str, TrainingPath],
    lags: Sequence[int] | None,
    unit: Unit,
    components: int,
    min_move: float,
) -> None:
    if not runs:
        raise ValueError("there are no runs to compare: give at least one {name: path}")
    if unit not in ("steps", "records"):
        raise ValueError(f"unknown unit {unit!r}; choose 'steps' or 'records'")
    if lags is not None and (not lags or any(lag < 1 for lag in lags)):
        raise ValueError(f"lags must be whole numbers from 1 on, not {list(lags)}")
    if components < 1 or min_move < 0:
        raise ValueError(
            f"components must be at least 1 and min_move at least 0, not {components}, {min_move}"
        )


def _parameters(
    runs: Mapping[str, TrainingPath], names: list[str] | None, part: Part | None
) -> list[str]:
    first, *others = runs
    chosen = runs[first].names(names, part)
    wanted = {name: list(runs[first].states[name].shape[1:]) for name in chosen}
    for run in others:
        states = runs[run].states
        have = {n: list(states[n].shape[1:]) for n in runs[run].names(names, part)}
        if have != wanted:
            differ = sorted(n for n in {*have, *wanted} if have.get(n) != wanted.get(n))
            raise ValueError(
                f"runs {first!r} and {run!r} differ in {first_few(differ)} "
                f"({wanted.get(differ[0], 'not there')} and {have.get(differ[0], 'not there')}); "
                "choose parameters that all runs have with names="
            )
    return chosen


def _products(
    runs: Mapping[str, TrainingPath], names: list[str]
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Inner products of all records; and of gradients with records, with the gradients' norms."""
    total = sum(map(len, runs.values()))
    gram = torch.zeros(total, total, dtype=torch.float64)
    with_gradients = [r for r, p in runs.items() if all(name in p.gradients for name in names)]
    across = {r: torch.zeros(len(runs[r]), total, dtype=torch.float64) for r in with_gradients}
    squares = {r: torch.zeros(len(runs[r]), dtype=torch.float64) for r in with_gradients}
    width = max(1, 16 * _CHUNK // total)
    for name in names:
        flat = [path.states[name].flatten(1) for path in runs.values()]
        for start in range(0, flat[0].shape[1], width):
            cut = slice(start, start + width)
            block = torch.cat([part[:, cut].double() for part in flat])
            gram.addmm_(block, block.T)
            for run in with_gradients:
                gradient = runs[run].gradients[name].flatten(1)[:, cut].double()
                across[run].addmm_(gradient, block.T)
                squares[run] += gradient.square().sum(1)
    finite = gram.diagonal().isfinite()
    if not bool(finite.all()):
        rows = [(run, step) for run, path in runs.items() for step in path.steps]
        run, step = rows[int((~finite).nonzero()[0])]
        raise ValueError(f"run {run!r} has values that are not finite at step {step}")
    descent = {r: (-across[r].numpy(), squares[r].sqrt().numpy()) for r in with_gradients}
    return gram.numpy(), descent


def _components(
    gram: Float[np.ndarray, "records records"], components: int
) -> tuple[Float[np.ndarray, "records components"], Float[np.ndarray, " components"]]:
    """Principal components of records that are known by their inner products."""
    from sklearn.decomposition import PCA

    # coordinates in an orthonormal basis of what the records span: the same distances and angles
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    image = vectors * np.sqrt(values.clip(min=0))
    # several records may be one and the same point
    if len(gram) < 2 or values[-1] <= 1e-12 * max(np.abs(gram).max(), math.ulp(0)):
        return np.zeros((len(gram), 1)), np.zeros(1)
    pca = PCA(n_components=min(components, len(gram) - 1), svd_solver="full")
    return pca.fit_transform(image), pca.explained_variance_ratio_


def _usual(positions: Sequence[int]) -> tuple[int, ...]:
    gap, _ = regular(positions)
    return (gap, 2 * gap, 3 * gap)


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
