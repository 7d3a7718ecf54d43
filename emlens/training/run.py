"""The record of a training run: settings, losses, and the path that the vector took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._tensors import read_tensors, write_tensors
from emlens.directions import Direction, Provenance
from emlens.hooked import Site, check_site

KIND = "training run"


@dataclass(frozen=True, slots=True)
class Step:
    """One update: losses in nats per token, norm in units of the residual stream."""

    step: int
    loss: float
    kl: float | None
    norm: float
    gradient_norm: float
    lr: float


@dataclass(frozen=True)
class TrainingRun:
    """What happened while a vector was trained.

    Attributes:
        settings: All settings of the run.
        steps: One record per update; losses are those before the update.
        path: What is added after each recorded update, `[records, d_model]`, the start first.
        path_steps: Updates done at each record.
        layer: Layer of the vector.
        site: Its site.
        residual_norm: Median residual norm there.
        provenance: How the vector was made.
    """

    settings: dict
    steps: tuple[Step, ...]
    path: Float[Tensor, "records d_model"]
    path_steps: tuple[int, ...]
    layer: int
    site: Site
    residual_norm: float
    provenance: Provenance

    def direction(self, record: int = -1) -> Direction:
        """The vector as it was at a record of the path; the last by default."""
        return Direction(
            {self.layer: self.path[record]},
            self.site,
            self.provenance,
            residual_norms={self.layer: self.residual_norm},
        )

    def table(self) -> pd.DataFrame:
        """One row per update."""
        return pd.DataFrame([asdict(step) for step in self.steps]).rename(
            columns={"loss": "loss [nats/token]", "kl": "KL [nats/token]"}
        )

    def plot(self, ax=None):
        """Training loss (and KL, where there is a penalty) against updates."""
        from emlens.figures import line_bands

        x = np.array([step.step for step in self.steps])
        curves = {"loss": (x, np.array([step.loss for step in self.steps]), None, None)}
        if self.steps and self.steps[0].kl is not None:
            curves["KL"] = (x, np.array([step.kl for step in self.steps]), None, None)
        return line_bands(curves, x_label="update", y_label="nats per token", ax=ax)

    def save(self, path: str | Path) -> Path:
        """Write the run as safetensors, everything but the path in its header; atomic."""
        record = {
            "layer": self.layer,
            "site": self.site,
            "residual_norm": self.residual_norm,
            "provenance": self.provenance.to_dict(),
            "settings": self.settings,
            "steps": [asdict(step) for step in self.steps],
            "path_steps": list(self.path_steps),
        }
        return write_tensors(Path(path), KIND, {"path": self.path}, record)

    @classmethod
    def load(cls, path: str | Path) -> TrainingRun:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or of another kind.
        """
        tensors, record = read_tensors(Path(path), KIND)
        return cls(
            settings=record["settings"],
            steps=tuple(Step(**step) for step in record["steps"]),
            path=tensors["path"],
            path_steps=tuple(record["path_steps"]),
            layer=record["layer"],
            site=check_site(record["site"]),
            residual_norm=record["residual_norm"],
            provenance=Provenance.from_dict(record["provenance"]),
        )

    def __repr__(self) -> str:
        last = self.steps[-1] if self.steps else None
        end = f", loss {last.loss:.3f} nats/token, norm {last.norm:.3g}" if last else ""
        return f"TrainingRun({len(self.steps)} updates, layer {self.layer}{end})"

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(repr(self))}</b></p>" + self.table().tail(3).to_html(index=False)


class TrainingStopped(RuntimeError):
    """Training met a loss that is not finite; `run` is the record up to the last good update."""

    def __init__(self, message: str, run: TrainingRun) -> None:
        super().__init__(message)
        self.run = run


def trajectory(records: list[Tensor]) -> Float[Tensor, "records d_model"]:
    """Stack the recorded vectors of a run."""
    return torch.stack([record.detach().float().cpu() for record in records])
