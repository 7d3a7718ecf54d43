"""The comparison score: how much of what one state writes lies in the span of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens.training.paths.path import TrainingPath


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
