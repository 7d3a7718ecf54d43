"""Paths read from the checkpoint folders of a training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emlens._door import guarded
from emlens._reading import expanded, read_json
from emlens._tensors import opened_tensors
from emlens.directions import read_checkpoints
from emlens.hooked.adapter_files import CONFIG, SCALING, WEIGHTS, factor_of, scale_at
from emlens.training.paths.path import Part, TrainingPath, chosen_names, first_few

_STEP = re.compile(r"checkpoint-(\d+)")
_LOG = "trainer_state.json"
_GRADIENTS = Path("gradients") / "gradients.safetensors"
_LOGGED = {
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "lr",
    "eval_loss": "validation",
}


@guarded
def read_path(
    folder: str | Path, *, names: Iterable[str] | None = None, part: Part | None = None
) -> TrainingPath:
    """Read the `checkpoint-<step>` folders of a training as a path.

    They are looked for in `checkpoints/`, then in the folder itself, and hold LoRA adapters of
    PEFT (`adapter_model.safetensors`) or vectors (`steering_vector.pt`, with
    `gradients/gradients.safetensors` where there are any). Of adapters only the weights chosen are
    read, each straight into its place, and nothing but `A` and `B`. The log is that of the last
    `trainer_state.json`.

    Args:
        folder: The folder, or a copy of a repository.
        names: Parameters to read, as in `TrainingPath.states`; all by default.
        part: Only `A` or only `B` of adapters; the papers look at `B`.

    Returns:
        The path; vectors as they act (times alpha), `A` and `B` as they are in the files.

    Raises:
        FileNotFoundError: If there are no checkpoints, or one lacks its weights.
        ValueError: If a checkpoint is truncated, not finite, or differs from the first in modules,
            shapes or scale; or a chosen parameter is not there.
    """
    folder = expanded(folder)
    found = _checkpoints(folder)
    adapters = [step for step, place in found.items() if (place / WEIGHTS).is_file()]
    log = _log(found)
    if not adapters:
        return _vectors(folder, found, names, log)
    bare = [place for step, place in found.items() if step not in adapters]
    if bare:
        raise FileNotFoundError(
            f"{bare[0]} has no {WEIGHTS}, as {found[adapters[0]].name} has; fetch it again, or "
            "remove the folder"
        )
    return _adapters(found, names, part, log)


def _checkpoints(folder: Path) -> dict[int, Path]:
    for place in (folder / "checkpoints", folder):
        found = {
            int(name[1]): child
            for child in (place.iterdir() if place.is_dir() else ())
            if (name := _STEP.fullmatch(child.name)) and child.is_dir()
        }
        if found:
            return {step: found[step] for step in sorted(found)}
    raise FileNotFoundError(
        f"{folder} has no checkpoint-<step>, neither in it nor in its checkpoints/"
    )


def _adapters(
    found: dict[int, Path],
    names: Iterable[str] | None,
    part: Part | None,
    log: tuple[dict, ...],
) -> TrainingPath:
    first, *_ = found.values()
    config = _config(first)
    keys = _keys(first)
    chosen = chosen_names(list(keys), names, part, where=str(first))
    states: dict[str, Tensor] = {}
    for record, place in enumerate(found.values()):
        if _scaling(_config(place)) != _scaling(config):
            raise ValueError(
                f"{place} says {_scaling(_config(place))} in its {CONFIG}, but {first.name} says "
                f"{_scaling(config)}; they belong to different trainings"
            )
        _same_modules(place, _keys(place), first, keys)
        with opened_tensors(place / WEIGHTS) as file:
            for name in chosen:
                weight = file.get_tensor(keys[name])
                if name not in states:
                    states[name] = torch.empty(len(found), *weight.shape)
                _put(states[name], record, weight, f"{place}: {name}")
    modules = {name.rpartition(".")[0] for name in keys}
    settings = {
        "kind": "adapter",
        "base": config.get("base_model_name_or_path"),
        **_scaling(config),
        "scales": {module: scale_at(config, module) for module in sorted(modules)},
    }
    return TrainingPath(tuple(found), states, {}, log, settings)


def _vectors(
    folder: Path,
    found: dict[int, Path],
    names: Iterable[str] | None,
    log: tuple[dict, ...],
) -> TrainingPath:
    read = read_checkpoints(folder)
    first = read[next(iter(read))]
    chosen = chosen_names([f"vector.{layer}" for layer in first.layers], names, None, str(folder))
    states = {name: torch.empty(len(read), first.d_model) for name in chosen}
    gradients = {}
    for record, (step, directions) in enumerate(read.items()):
        place = found[step]
        if (directions.layers, directions.site) != (first.layers, first.site):
            raise ValueError(
                f"{place} holds {directions!r}, but {found[next(iter(read))].name} {first!r}; "
                "they belong to different trainings"
            )
        for name in chosen:
            vector = directions.vectors[int(name.removeprefix("vector."))]
            _put(states[name], record, vector, f"{place}: {name}")
        gradient = _gradient(place)
        if gradient is not None and len(chosen) == 1:
            kept = gradients.setdefault(chosen[0], torch.full_like(states[chosen[0]], torch.nan))
            _put(kept, record, gradient, f"{place / _GRADIENTS}: the gradient")
    settings = {"kind": "vector", "site": first.site, "base": first.provenance.model}
    settings |= {k: v for k, v in first.provenance.settings.items() if k in ("alpha", "approach")}
    return TrainingPath(tuple(read), states, gradients, log, settings)


def _put(states: Tensor, record: int, weight: Tensor, what: str) -> None:
    if weight.shape != states.shape[1:]:
        raise ValueError(
            f"{what} has shape {list(weight.shape)}, but {list(states.shape[1:])} in the "
            "checkpoints before; they belong to different trainings"
        )
    states[record] = weight
    if not bool(states[record].isfinite().all()):
        raise ValueError(f"{what} has values that are not finite")


def _keys(place: Path) -> dict[str, str]:
    """Names of an adapter's `A` and `B`, and the keys that its file has them under."""
    path = place / WEIGHTS
    with opened_tensors(path) as file:
        keys = list(file.keys())
    found = {".".join(factor): key for key in sorted(keys) if (factor := factor_of(key))}
    if not found:
        raise ValueError(f"{path} has no LoRA weights; its tensors are {first_few(keys)}")
    return found


def _same_modules(place: Path, keys: dict[str, str], first: Path, wanted: dict[str, str]) -> None:
    if keys == wanted:
        return
    more, less = sorted(set(keys) - set(wanted)), sorted(set(wanted) - set(keys))
    differs = [f"lacks {first_few(less)}"] if less else []
    differs += [f"has {first_few(more)} besides"] if more else []
    raise ValueError(
        f"{place} {' and '.join(differs) or 'names its weights otherwise'}, compared with "
        f"{first.name}; they belong to different trainings"
    )


def _config(place: Path) -> dict[str, Any]:
    if not (place / CONFIG).is_file():
        raise FileNotFoundError(f"{place} has no {CONFIG}, which gives the scale of its weights")
    return read_json(place / CONFIG, dict)


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in SCALING if config.get(key)}


def _gradient(place: Path) -> Tensor | None:
    path = place / _GRADIENTS
    if not path.exists():
        return None
    with opened_tensors(path) as file:
        return file.get_tensor("steering_vector")


def _log(found: dict[int, Path]) -> tuple[dict, ...]:
    """What the last checkpoint with a log says; the entries of one step are put together."""
    step, place = max(
        ((s, p / _LOG) for s, p in found.items() if (p / _LOG).exists()), default=(0, None)
    )
    if place is None:
        return ()
    state = read_json(place, dict)
    if state.get("global_step", step) != step:
        raise ValueError(
            f"{place} belongs to step {state['global_step']}, its folder to step {step}; one of "
            "them is misplaced"
        )
    entries: dict[int, dict] = {}
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{place}: log_history is not a list of objects")
    for entry in history:
        if type(entry.get("step", 0)) is not int:
            raise ValueError(f"{place}: step is {entry['step']!r:.40}, not a whole number")
    for entry in history:
        kept = {ours: entry[key] for key, ours in _LOGGED.items() if key in entry}
        if kept and "step" in entry:
            entries.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return tuple(entries[step] for step in sorted(entries))
