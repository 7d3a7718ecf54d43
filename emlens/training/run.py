"""The record of a training run: settings, losses, and the path that was taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guard_methods
from emlens._reading import expanded
from emlens._tensors import read_tensors, whole_record, write_tensors
from emlens._types import checked_fields, frozen
from emlens.directions import Direction, Directions, Evidence, Provenance
from emlens.directions.files import read_norms
from emlens.edits import Add
from emlens.hooked import NonFiniteError
from emlens.hooked.sites import Site, check_site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KIND = "training run"
_STATE, _GRADIENT, _VECTOR = "state/", "gradient/", "vector."


@dataclass(frozen=True, slots=True)
class Step:
    """One update: losses in nats per token, norm in units of the residual stream.

    `validation` is the loss on the validation set after the update, at the end of an epoch.
    """

    step: int
    loss: float
    kl: float | None
    norm: float
    gradient_norm: float
    lr: float
    penalty: float | None = None
    validation: float | None = None

    INFINITE = ("gradient_norm",)


@guard_methods
@dataclass(frozen=True)
class TrainingRun:
    """What happened while something was trained.

    Attributes:
        settings: All settings of the run.
        steps: One record per update; losses are those before the update.
        states: What was trained after each recorded update, by name, `[records, ...]`, the start
            first: for vectors what is added, for adapters `A` and `B`.
        path_steps: Updates done at each record.
        site: Where vectors are added; None for adapters.
        residual_norms: Median residual norm there, by layer.
        provenance: How it was made.
        gradients: Gradients at the start of each recorded update, likewise, if asked for.
    """

    settings: dict
    steps: tuple[Step, ...]
    states: Mapping[str, Float[Tensor, "records ..."]]
    path_steps: tuple[int, ...]
    site: Site | None
    residual_norms: Mapping[int, float]
    provenance: Provenance
    gradients: Mapping[str, Float[Tensor, "records ..."]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the vectors that were trained."""
        names = (name for name in self.states if name.startswith(_VECTOR))
        return tuple(sorted(int(name.removeprefix(_VECTOR)) for name in names))

    @property
    def path(self) -> Float[Tensor, "records d_model"]:
        """What is added after each recorded update, of a run that trained one vector.

        Raises:
            ValueError: If it trained several, or an adapter.
        """
        if len(self.layers) != 1:
            raise ValueError(
                f"the path of one vector was asked for, but what was trained is "
                f"{', '.join(self.states)}; see states"
            )
        return self.states[f"{_VECTOR}{self.layers[0]}"]

    def direction(self, record: int = -1) -> Direction:
        """The vector as it was at a record of the path; the last by default.

        Raises:
            ValueError: If several vectors were trained, or an adapter.
        """
        if len(self.layers) != 1:
            raise ValueError(f"this run trained {len(self.layers)} vectors; see directions()")
        return self.directions(record)[self.layers[0]]

    def directions(self, record: int = -1) -> Directions:
        """The vectors as they were at a record of the path; the last by default.

        Raises:
            ValueError: If an adapter was trained, or there is no such record.
        """
        if self.site is None or not self.layers:
            raise ValueError("this run trained an adapter; see directions.adapter_vectors")
        paths = {layer: self.states[f"{_VECTOR}{layer}"] for layer in self.layers}
        known = len(next(iter(paths.values())))
        if not -known <= record < known:
            raise ValueError(f"there is no record {record}; this run kept {known}")
        vectors = {layer: path[record] for layer, path in paths.items()}
        return Directions(vectors, self.site, self.provenance, Evidence(self.residual_norms))

    def edits(self, record: int = -1) -> list[Add]:
        """What adds the vectors as they were at a record of the path, where they were trained.

        Raises:
            ValueError: If an adapter was trained.
        """
        return [Add(self.directions(record), where=self.settings.get("where", "all"))]

    def table(self) -> pd.DataFrame:
        """One row per update; columns that nothing is known of are left out."""
        import pandas as pd

        unit = "[nats/token]"
        names = {name: f"{name} {unit}" for name in ("loss", "penalty", "validation")}
        rows = [asdict(step) for step in self.steps]
        known = [n for n in rows[0] if any(row[n] is not None for row in rows)] if rows else []
        frame = pd.DataFrame(rows, columns=known)
        return frame.rename(columns={**names, "kl": f"KL {unit}"})

    def plot(self, ax: Axes | None = None) -> Axes | list[Axes]:
        """Loss against updates, and beside it the KL and penalties, where there are some.

        The KL is far smaller than the loss, so it has axes of its own; on `ax` the loss alone is
        drawn.
        """
        from emlens.figures.lines import line_bands
        from emlens.figures.style import new_panels

        losses = self._along(loss="training", validation="validation")
        rest = self._along(kl="KL", penalty="penalty")
        panels = [(losses, "loss [nats/token]")]
        panels += [(rest, f"{' and '.join(rest)} [nats/token]")] if rest and ax is None else []
        axes = new_panels(len(panels), width=4.6 * len(panels), height=3.4) if ax is None else [ax]
        for panel, (curves, label) in zip(axes, panels, strict=True):
            line_bands(curves, x_label="update", y_label=label, ax=panel)
        return axes if len(axes) > 1 else axes[0]

    def _along(self, **named: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Updates and values of the fields of steps that are known, by what they are called."""
        curves = {}
        for one, label in named.items():
            known = [step for step in self.steps if getattr(step, one) is not None]
            if known:
                values = np.array([getattr(step, one) for step in known])
                curves[label] = (np.array([step.step for step in known]), values)
        return curves

    def save(self, path: str | Path) -> Path:
        """Write the run as safetensors, everything but the path in its header; atomic."""
        record = {
            "site": self.site,
            "residual_norms": dict(self.residual_norms),
            "provenance": self.provenance.to_dict(),
            "settings": self.settings,
            "steps": [asdict(step) for step in self.steps],
            "path_steps": list(self.path_steps),
        }
        tensors = {f"{_STATE}{name}": value for name, value in self.states.items()}
        tensors |= {f"{_GRADIENT}{name}": value for name, value in self.gradients.items()}
        return write_tensors(expanded(path), KIND, tensors, record)

    @classmethod
    def load(cls, path: str | Path) -> TrainingRun:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or of another kind.
        """
        path = expanded(path)
        tensors, record = read_tensors(path, KIND)
        with whole_record(path, KIND):
            states, gradients = _named(tensors, _STATE), _named(tensors, _GRADIENT)
            return cls.of_record(record, states, gradients)

    @classmethod
    def of_record(
        cls, record: Mapping, states: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> TrainingRun:
        """The run that a record in a file describes.

        Raises:
            KeyError: If a part is missing.
            ValueError: If a part has another type, or there is not a state for each record.
        """
        made = Provenance.from_dict(record["provenance"])
        path_steps = tuple(record["path_steps"])
        if not all(type(step) is int for step in path_steps):
            raise ValueError("path_steps has something else than whole numbers")
        for name, state in states.items():
            if not state.ndim or len(state) != len(path_steps):
                raise ValueError(
                    f"{name} has shape {list(state.shape)}, but there are {len(path_steps)} records"
                )
        return cls(
            settings=frozen(record.get("settings", made.to_dict()["settings"])),
            steps=tuple(Step(**checked_fields(Step, step)) for step in record["steps"]),
            states=states,
            path_steps=path_steps,
            site=None if record["site"] is None else check_site(record["site"]),
            residual_norms=read_norms(record["residual_norms"]),
            provenance=made,
            gradients=gradients,
        )

    def __repr__(self) -> str:
        last = self.steps[-1] if self.steps else None
        end = f", loss {last.loss:.3f} nats/token, norm {last.norm:.3g}" if last else ""
        layers = ", ".join(map(str, self.layers))
        what = f"layer{'s' if len(self.layers) > 1 else ''} {layers}" if layers else "adapter"
        return f"TrainingRun({len(self.steps)} updates, {what}{end})"

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(repr(self))}</b></p>" + self.table().tail(3).to_html(index=False)


class TrainingStopped(NonFiniteError):
    """Training met a value that is not finite; `run` is the record up to the last good update."""

    def __init__(self, message: str, run: TrainingRun) -> None:
        super().__init__(message)
        self.run = run


def stacked(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Records of one state each, as `[records, ...]` by name."""
    return {name: torch.stack([r[name] for r in records]) for name in records[0]} if records else {}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
