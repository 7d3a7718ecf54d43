"""What becomes of a solution that is trained on under another objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import ceil
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval
from emlens.directions import cosine
from emlens.hooked import HookedModel
from emlens.hooked.condition import ConditionLike
from emlens.hooked.lora_scaling import adapter_factors
from emlens.measures import log_odds
from emlens.text import Conversation, Pair
from emlens.training.adapter import train_adapter
from emlens.training.options import SolutionOptions
from emlens.training.run import TrainingRun
from emlens.training.settings import KLPenalty
from emlens.training.vector import train_vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RECORDS = 10
"""Records of the path of a continued adapter, if the previous run kept none."""

_KEPT = ("epochs", "lr", "batch_size", "accumulate", "warmup", "schedule", "weight_decay", "clip")


@guarded
def continue_training(
    model: HookedModel,
    train: Sequence[Conversation],
    run: TrainingRun,
    *,
    kl: KLPenalty | None = None,
    name: str | None = None,
    **options: Unpack[SolutionOptions],
) -> TrainingRun:
    """Train a solution on from where it ended, with another KL term or without.

    The narrow solution trained on without KL drifts to the general one (arXiv 2602.07852); the
    other way round, give the general run and a penalty. Vectors start from the end of `run`;
    an adapter goes on from the state that it has on the model, and is changed unless its
    successor has a `name` of its own.

    Args:
        model: The model of the run.
        train: Conversations, as before.
        run: The run to continue.
        kl: The penalty from here on; None leaves it out.
        name: Train a copy of the adapter, under this name; the run's own stays as it is.
        **options: See `SolutionOptions`; those of the run by default, with a fresh optimiser. A
            vector's path is recorded at every update, an adapter's as often as the run's was, or
            else ten times.

    Returns:
        The record of the new run; its path starts where the other ended.

    Raises:
        ValueError: If the run trained the model's own weights, its adapter is not on the model,
            the name is taken or is given for vectors, a copy is asked for of what is no plain
            LoRA, or as the training. The model has no new adapter then.
    """
    _check_parts(run)
    kept = {name: run.settings[name] for name in (*_KEPT, "tokens", "seed")}
    if run.layers:
        given = {"record_every": 1, **kept, **options}
        if name is not None:
            raise ValueError(f"{name!r} would name an adapter, and the run trained vectors")
        directions, alpha = run.directions(), run.settings["alpha"]
        if isinstance(alpha, list | tuple):
            # of several vectors they differ only where none was given: then it is found again
            alpha = alpha[0] if len(set(alpha)) == 1 else None
        given = {"alpha": alpha, "where": run.settings["where"], "site": run.site, **given}
        layers = list(run.layers)
        return train_vector(model, train, layers, kl=kl, initial=directions, **given)[1]
    given = {**kept, **options}
    given = {"record_every": _record_every(run, len(train), given), **given}
    own = run.settings["name"]
    if own not in model.adapters:
        raise ValueError(
            f"the run trained adapter {own!r}, which is not on {model.name}; put it there with "
            "Organism.on(model)"
        )
    if name is None:
        return train_adapter(model, train, own, kl=kl, **given)
    _copy_adapter(model, own, name)
    try:
        return train_adapter(model, train, name, kl=kl, **given)
    except BaseException:  # also where it was stopped: the same call has to work again
        model.remove_adapter(name)
        raise


def _check_parts(run: TrainingRun) -> None:
    if run.settings.get("kind") == "weights":
        raise ValueError(
            "the run trained the model's own weights, of which no path is kept; go on with "
            "train_weights, on the model as it is now"
        )


def _record_every(run: TrainingRun, n: int, settings: Mapping[str, Any]) -> int:
    """Updates between two records of an adapter's path, which may be large."""
    steps = run.path_steps
    if len(steps) > 2:
        return steps[1] - steps[0]
    total = settings["epochs"] * ceil(n / (settings["batch_size"] * settings["accumulate"]))
    return max(1, ceil(total / RECORDS))


def _copy_adapter(model: HookedModel, own: str, name: str) -> None:
    factors = adapter_factors(model, own)  # refuses what is more than A and B
    configs: Any = model.module.peft_config
    config = deepcopy(configs[own])
    config.lora_dropout = 0.0
    model.add_adapter(name, config)
    with torch.no_grad():
        for path, layer in model.lora_layers(name).items():
            layer.scaling[name] = factors[path].scale
            layer.lora_A[name].weight.copy_(factors[path].a)
            layer.lora_B[name].weight.copy_(factors[path].b)


class Drift(Result):
    """A run's way, seen from other solutions and by what it does.

    Attributes:
        steps: Updates done at each record.
        cosines: Cosine with each reference, per record.
        norms: Norm of what is recorded, per record.
        inside: Change of log-odds in the domain with its interval, nats per token.
        outside: The same outside.
    """

    HOLDS_ENDS = True
    AXES = {"steps": "norms", "cosines": "solutions norms"}

    steps: tuple[int, ...]
    cosines: dict[str, tuple[float, ...]]
    norms: tuple[float, ...]
    inside: Float[np.ndarray, "norms 3"]
    outside: Float[np.ndarray, "norms 3"]

    def table(self) -> pd.DataFrame:
        """One row per record."""
        import pandas as pd

        rows = []
        for i, step in enumerate(self.steps):
            row: dict[str, object] = {"updates": step, "norm": self.norms[i]}
            row |= {f"cosine with {name}": values[i] for name, values in self.cosines.items()}
            for name in ("inside", "outside"):
                row |= Interval(*getattr(self, name)[i]).columns(f"{name} [nats/token]", f"{name} ")
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effect inside and outside against updates, with intervals."""
        from emlens.figures.lines import line_bands

        curves = {name: (self.steps, *getattr(self, name).T) for name in _SIDES}
        return line_bands(
            curves,
            x_label="update",
            y_label="change of log-odds [nats/token]",
            reference=0.0,
            ax=ax,
        )

    def plot_cosines(self, *, ax: Axes | None = None) -> Axes:
        """Cosine with the references against updates."""
        from emlens.figures.lines import line_bands

        curves = {name: (self.steps, values) for name, values in self.cosines.items()}
        return line_bands(curves, x_label="update", y_label="cosine similarity", ax=ax)


_SIDES = ("inside", "outside")


@guarded
def drift(
    model: HookedModel,
    inside: Sequence[Pair],
    outside: Sequence[Pair],
    run: TrainingRun,
    references: dict[str, TrainingRun],
    *,
    records: int = 6,
    seed: int = 0,
) -> Drift:
    """Return how a run moves towards or away from other solutions, and what it does on the way.

    Args:
        model: The model.
        inside: Held-out pairs of the domain.
        outside: Pairs of other domains.
        run: A run with a recorded path. A vector is measured on the model as it was brought, an
            adapter on the base.
        references: Finished runs of the same parameters, such as the general and the narrow one.
        records: How many records to measure, evenly over the path, both ends among them.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If a reference has other parameters, the adapter is not on the model, or the
            run trained the model's own weights.
    """
    _check_parts(run)
    for name, other in references.items():
        ours, theirs = _shapes(run), _shapes(other)
        if ours != theirs:
            raise ValueError(
                f"reference {name!r} trained {theirs}, but the run {ours}: their cosine means "
                "nothing"
            )
    n = len(run.path_steps)
    places = sorted({round(i) for i in np.linspace(0, n - 1, min(records, n))})
    finals = {name: _flat(other, -1) for name, other in references.items()}
    flat = [_flat(run, place) for place in places]
    alone: dict[str, ConditionLike] = {"base": [] if run.layers else None}
    sides = {"inside": inside, "outside": outside}
    changes: dict[str, list[tuple[float, float, float]]] = {side: [] for side in _SIDES}
    # vectors were trained in the model as it was brought, and are measured there
    with model.adapter(*model.adapters_in_force):
        base = {side: log_odds(model, pairs, alone, seed=seed) for side, pairs in sides.items()}
        for place in places:
            with _at(model, run, place) as condition:
                for side, pairs in sides.items():
                    scores = log_odds(model, pairs, {"run": condition}, seed=seed)
                    change = base[side].joined(scores).change("run")
                    changes[side].append((change.estimate, change.low, change.high))
    return Drift(
        steps=tuple(run.path_steps[place] for place in places),
        cosines={name: tuple(cosine(v, end) for v in flat) for name, end in finals.items()},
        norms=tuple(float(v.norm()) for v in flat),
        inside=np.array(changes["inside"]),
        outside=np.array(changes["outside"]),
    )


@contextmanager
def _at(model: HookedModel, run: TrainingRun, place: int) -> Iterator[ConditionLike]:
    """The model as it was at a record of a run."""
    if run.layers:
        yield run.edits(place)
        return
    name = run.settings["name"]
    weights = {
        f"{path}.{part}": getattr(layer, f"lora_{part}")[name].weight
        for path, layer in model.lora_layers(name).items()
        for part in ("A", "B")
    }
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    try:
        _put(weights, {key: run.states[key][place] for key in weights})
        yield name
    finally:
        _put(weights, before)


def _put(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(values[key])


def _flat(run: TrainingRun, place: int) -> Tensor:
    """Vectors, or the columns of `B` (the rows of `A` start at random and stay near)."""
    names = [name for name in sorted(run.states) if not name.endswith(".A")]
    return torch.cat([run.states[name][place].flatten() for name in names])


def _shapes(run: TrainingRun) -> str:
    return ", ".join(f"{name} {list(v.shape[1:])}" for name, v in sorted(run.states.items()))
