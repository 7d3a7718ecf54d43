"""Checkpoints of a run: all that is needed to end bit-identical after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from emlens._runs import START_ANEW, check_same
from emlens._tensors import read_tensors, whole_record, write_tensors
from emlens.directions import Provenance
from emlens.training.run import TrainingRun

KIND = "training checkpoint"
_PARTS = ("parameter", "moment", "best", "state", "gradient")


@dataclass(frozen=True)
class Checkpoint:
    """A run in the middle.

    Attributes:
        run: Its record so far.
        parameters: The parameters, by name.
        moments: AdamW's `step`, `exp_avg` and `exp_avg_sq`, by `name/key`.
        best_parameters: The parameters of the lowest validation loss, if it is watched.
        best: That loss.
        since_best: Epochs since.
    """

    run: TrainingRun
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    best_parameters: dict[str, Tensor]
    best: float
    since_best: int


def save_checkpoint(path: Path, kept: Checkpoint) -> None:
    """Write a checkpoint; atomic, so that a kill leaves the one before."""
    groups: dict[str, Mapping[str, Tensor]] = dict(
        zip(
            _PARTS,
            (
                kept.parameters,
                kept.moments,
                kept.best_parameters,
                kept.run.states,
                kept.run.gradients,
            ),
            strict=True,
        )
    )
    tensors = {f"{part}|{n}": t for part, group in groups.items() for n, t in group.items()}
    record = {
        "provenance": kept.run.provenance.to_dict(),
        "steps": [asdict(step) for step in kept.run.steps],
        "path_steps": list(kept.run.path_steps),
        "site": kept.run.site,
        "residual_norms": dict(kept.run.residual_norms),
        "best": kept.best if kept.best < float("inf") else None,
        "since_best": kept.since_best,
    }
    write_tensors(path, KIND, tensors, record)


def load_checkpoint(
    path: Path, expected: Provenance, shapes: Mapping[str, torch.Size]
) -> Checkpoint | None:
    """Read a checkpoint; None where there is none yet.

    Args:
        path: The file.
        expected: The provenance of the run.
        shapes: Shapes of the parameters that are trained, by name.

    Raises:
        ValueError: If it belongs to another run (data, settings or model differ; it says which).
            Or if a tensor is missing, or has another shape than its parameter.
    """
    if not path.exists():
        return None
    tensors, record = read_tensors(path, KIND)
    with whole_record(path, KIND):
        found = Provenance.from_dict(record["provenance"])
    ours, theirs = _compared(expected), _compared(found)
    way_out = START_ANEW
    if ours["settings"].get("start") != theirs["settings"].get("start"):
        way_out += "; start is what a run begins from: load the model anew, or give the same one"
    check_same(theirs, ours, f"the checkpoint {path}", way_out)
    parts = {
        part: {n.split("|", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{part}|")}
        for part in _PARTS
    }
    with whole_record(path, KIND):
        _check_shapes(tensors, shapes)
        run = TrainingRun.of_record(record, parts["state"], parts["gradient"])
        best = float("inf") if record["best"] is None else float(record["best"])
        since = int(record["since_best"])
    return Checkpoint(run, parts["parameter"], parts["moment"], parts["best"], best, since)


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Compare tensors with the parameters they are for: a smaller one would be spread over them."""
    best = any(name.startswith("best|") for name in tensors)
    for name, shape in shapes.items():
        wanted = {f"parameter|{name}": shape, f"moment|{name}/step": torch.Size()}
        wanted |= {f"moment|{name}/{moment}": shape for moment in ("exp_avg", "exp_avg_sq")}
        wanted |= {f"best|{name}": shape} if best else {}
        for key, size in wanted.items():
            if tensors[key].shape != size:
                raise ValueError(f"{key} has shape {list(tensors[key].shape)}, not {list(size)}")


def _compared(made: Provenance) -> dict:
    """What a run and its continuation have in common: all but the versions."""
    record = {name: value for name, value in made.to_dict().items() if name != "versions"}
    # an adapter takes its weights from the checkpoint, wherever it stands by now
    free = {"start"} if made.settings.get("kind") == "adapter" else set()
    settings = {name: value for name, value in record["settings"].items() if name not in free}
    return {**record, "settings": settings}
