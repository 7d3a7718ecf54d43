"""The path that weights take through training, record by record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guard_methods
from emlens._reading import expanded
from emlens._tensors import read_tensors, whole_record, write_tensors
from emlens.training.run import TrainingRun

KIND = "training path"
Part = Literal["A", "B"]
"""Which weights of an adapter; vectors have no parts, and are taken whichever is chosen."""

_STATE, _GRADIENT = "state/", "gradient/"


@guard_methods
@dataclass(frozen=True)
class TrainingPath:
    """What was trained, record by record.

    Attributes:
        steps: Updates done at each record, rising.
        states: `[records, ...]` per parameter, fp32 on the CPU: `vector.15` is what a vector adds
            at layer 15, `model.layers.24.mlp.down_proj.B` the raw `B` of an adapter's module.
        gradients: Gradients of some of the parameters, likewise; NaN where none was recorded.
        log: What was logged on the way, each entry with its `step`, the updates done by then.
        settings: How it was trained, as far as known; of adapters read from files the `scales`
            by module with which `B A` acts.

    Raises:
        ValueError: If there are no records or states, steps do not rise, or counts differ.
    """

    steps: tuple[int, ...]
    states: Mapping[str, Float[Tensor, "records ..."]]
    gradients: Mapping[str, Float[Tensor, "records ..."]] = field(default_factory=dict)
    log: tuple[dict, ...] = ()
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps or not self.states:
            raise ValueError(
                f"a path needs records and states; it has {len(self.steps)} and {len(self.states)}"
            )
        if any(
            later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)
        ):
            raise ValueError(f"the steps of a path must rise; they are {first_few(self.steps)}")
        for name, state in self.states.items():
            if state.ndim < 2 or len(state) != len(self.steps):
                raise ValueError(
                    f"the states of {name} have shape {list(state.shape)}, but there are "
                    f"{len(self.steps)} records: [{len(self.steps)}, ...] is needed"
                )
        for name, gradient in self.gradients.items():
            wanted = list(self.states[name].shape) if name in self.states else None
            if wanted != list(gradient.shape):
                raise ValueError(
                    f"the gradients of {name} have shape {list(gradient.shape)}, its states "
                    f"{wanted or 'are not there'}; there has to be one for each record"
                )

    def __len__(self) -> int:
        return len(self.steps)

    def names(self, names: Iterable[str] | None = None, part: Part | None = None) -> list[str]:
        """Names of the parameters chosen, in their order; all by default.

        Raises:
            ValueError: If one is not there, or nothing is left.
        """
        return chosen_names(list(self.states), names, part)

    def flat(
        self, names: Iterable[str] | None = None, part: Part | None = None
    ) -> Float[Tensor, "records n"]:
        """All states, or those chosen, flattened beside each other.

        Args:
            names: Parameters to take, all by default; they come in the order of `states`.
            part: Only `A` or only `B` of adapters.

        Returns:
            `[records, n]`; without a copy where there is one parameter.

        Raises:
            ValueError: As `names`.
        """
        parts = [self.states[name].flatten(1) for name in self.names(names, part)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def between(self, start: int, end: int) -> TrainingPath:
        """The records, and the log, from step `start` to step `end`, both included.

        Raises:
            ValueError: If there is no record between them.
        """
        inside = [place for place, step in enumerate(self.steps) if start <= step <= end]
        if not inside:
            raise ValueError(
                f"there is no record between steps {start} and {end}; the path goes from "
                f"{self.steps[0]} to {self.steps[-1]}"
            )
        cut = slice(inside[0], inside[-1] + 1)
        return TrainingPath(
            self.steps[cut],
            {name: state[cut] for name, state in self.states.items()},
            {name: gradient[cut] for name, gradient in self.gradients.items()},
            tuple(entry for entry in self.log if start <= entry["step"] <= end),
            self.settings,
        )

    @classmethod
    def of(cls, run: TrainingRun) -> TrainingPath:
        """The path of a run that was trained here.

        The gradient of a record is the one that led to it; the start has none, nor has an
        end between two regular records. Where `patience` put back an earlier solution at the end,
        that last record is left out: the path does not go there.
        """
        n = len(run.path_steps) - _ends_with_an_earlier_state(run)
        states = {name: state[:n] for name, state in run.states.items()}
        gradients = {}
        for name, gradient in run.gradients.items():
            kept = torch.full_like(states[name], float("nan"))
            kept[1 : len(gradient) + 1] = gradient
            gradients[name] = kept
        log = tuple(asdict(step) for step in run.steps)
        return cls(tuple(run.path_steps[:n]), states, gradients, log, run.settings)

    def save(self, path: str | Path) -> Path:
        """Write the path as one safetensors file, steps and log in its header; atomic."""
        tensors = {f"{_STATE}{name}": state for name, state in self.states.items()}
        tensors |= {f"{_GRADIENT}{name}": value for name, value in self.gradients.items()}
        record = {
            "steps": list(self.steps),
            "names": list(self.states),
            "log": list(self.log),
            "settings": self.settings,
        }
        return write_tensors(expanded(path), KIND, tensors, record)

    @classmethod
    def load(cls, path: str | Path) -> TrainingPath:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or of another kind.
        """
        path = expanded(path)
        tensors, record = read_tensors(path, KIND)
        with whole_record(path, KIND):
            names, steps = record["names"], tuple(record["steps"])
            if not steps or not all(type(step) is int for step in steps):
                raise ValueError("steps has something else than whole numbers, or is empty")
            if not all(isinstance(entry["step"], int) for entry in record["log"]):
                raise ValueError("an entry of its log names no step")
            for name in names:
                shape = list(tensors[f"{_STATE}{name}"].shape)
                if shape[:1] != [len(steps)]:
                    raise ValueError(f"{name} has shape {shape}, but there are {len(steps)} steps")
            return cls(
                steps,
                {name: tensors[f"{_STATE}{name}"] for name in names},
                {n: tensors[f"{_GRADIENT}{n}"] for n in names if f"{_GRADIENT}{n}" in tensors},
                tuple(record["log"]),
                dict(record["settings"]),
            )

    def __repr__(self) -> str:
        size = sum(state[0].numel() for state in self.states.values())
        return (
            f"TrainingPath({len(self)} records, steps {self.steps[0]} to {self.steps[-1]}, "
            f"{len(self.states)} parameters with {size} values)"
        )


def _ends_with_an_earlier_state(run: TrainingRun) -> bool:
    """Whether the last record is the solution of the lowest validation loss, out of order."""
    losses = {n: step.validation for n, step in enumerate(run.steps, 1)}
    known = {n: loss for n, loss in losses.items() if loss is not None}
    if run.settings.get("patience") is None or not known:
        return False
    repeated = len(run.path_steps) > 1 and run.path_steps[-1] == run.path_steps[-2]
    return repeated or min(known, key=known.__getitem__) < len(run.steps)


def chosen_names(
    have: list[str], names: Iterable[str] | None, part: Part | None, where: str = "the path"
) -> list[str]:
    """Names asked for among those there are, in the order of the latter.

    Raises:
        ValueError: If one is not there, or nothing is left.
    """
    if part not in (None, "A", "B"):
        raise ValueError(f"unknown part {part!r}; choose 'A' or 'B', or None for both")
    asked = have if names is None else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in asked if name not in have]
    if unknown:
        raise ValueError(f"{where} has no parameter {unknown[0]!r}; it has {first_few(have)}")
    other = {"A": ".B", "B": ".A"}.get(part or "")
    chosen = [n for n in have if n in asked and not (other and n.endswith(other))]
    if not chosen:
        raise ValueError(f"nothing is chosen: {where} has {first_few(have)}")
    return chosen


def first_few(items: Sequence[object]) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(map(str, items[:4])) + more


def comparison_scores(
    runs: Mapping[str, TrainingPath], names: Sequence[str]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """`|X' Y|_F / (|X|_F |Y|_F)` of every record with every run's final one.

    The columns of `X` and `Y` are all that the chosen parameters write: vectors, the columns of
    `B`, the rows of `A`. For one column this is the cosine without its sign. Turning the columns
    among themselves changes nothing, which the cosine of the flattened weights cannot say of an
    adapter of a higher rank; equal states of `r` orthogonal columns of one length have
    `1 / sqrt(r)`.

    This is not the "comp score" of arXiv 2506.11613's code, which stacks the vectors as rows and
    takes `|X Y'|_F` of the same matrices: that is 1 for a single layer whatever the weights are,
    and `1 / sqrt(r)` for `r` unrelated vectors of equal norm as well as for equal ones, so it says
    how norms are spread over layers rather than whether vectors agree.

    Args:
        runs: Paths by name, with the same parameters.
        names: Parameters to take.

    Returns:
        For each run and each run's final record `[records]`, NaN where one of the two is zero;
        nothing where the parameters do not write into one space.
    """
    first = next(iter(runs.values()))
    widths = {_columns(name, first.states[name][0]).shape[0] for name in names}
    if len(widths) > 1:
        return {}
    finals = {run: _at(path, names, len(path) - 1) for run, path in runs.items()}
    return {
        run: {
            other: tuple(_score(_at(path, names, place), final) for place in range(len(path)))
            for other, final in finals.items()
        }
        for run, path in runs.items()
    }


def _at(path: TrainingPath, names: Sequence[str], place: int) -> Float[Tensor, "width columns"]:
    return torch.cat([_columns(name, path.states[name][place]) for name in names], dim=1)


def _columns(name: str, state: Tensor) -> Float[Tensor, "width columns"]:
    state = state.double()
    if state.ndim == 1:
        return state[:, None]
    return state.T if name.endswith(".A") else state


def _score(one: Tensor, other: Tensor) -> float:
    scale = float(one.norm() * other.norm())
    return float((one.T @ other).norm()) / scale if scale > 0 else float("nan")


def cosines_with(
    products: Float[np.ndarray, " n"], square: float, norms: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Cosines with a vector of that squared norm, from inner products; NaN where one is zero."""
    scale = np.sqrt(square) * norms
    cosines = np.full(len(products), np.nan)
    there = scale > 0
    cosines[there] = np.clip(products[there] / scale[there], -1, 1)
    return cosines
