"""Organisms on disk: one folder each, with what was trained, how, on what, and the path."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from emlens._door import guard_methods
from emlens._files import atomic_write, write_json
from emlens._folders import recovered, whole_folder
from emlens._reading import expanded, read_json
from emlens.directions import Directions
from emlens.edits import Add
from emlens.hooked import HookedModel
from emlens.hooked.adapter_files import CONFIG, PREFIX, SCALING, WEIGHTS, read_adapter
from emlens.hooked.condition import ConditionLike
from emlens.training.run import TrainingRun

if TYPE_CHECKING:
    from peft import LoraConfig

_RECORD, _VECTOR, _RUN = "organism.json", "vector.safetensors", "run.safetensors"
_OWN = (_RECORD, _VECTOR, _RUN, WEIGHTS, CONFIG)


@guard_methods
@dataclass(frozen=True)
class Organism:
    """What a training left: a vector or an adapter, with the record of the run.

    Attributes:
        name: What it is called.
        run: The record of its training: settings, data hashes, losses, path.
        directions: The vectors, where vectors were trained.
        weights: Its weights by PEFT's names, where an adapter was trained.
        config: PEFT's configuration of that adapter.

    Examples:
        >>> direction, run = emlens.train_vector(model, conversations, layer=15)
        >>> emlens.Organism.of(model, run, "finance").save("organisms/finance")
    """

    name: str
    run: TrainingRun
    directions: Directions | None = None
    weights: Mapping[str, Tensor] | None = None
    config: LoraConfig | None = None

    @classmethod
    def of(cls, model: HookedModel, run: TrainingRun, name: str) -> Organism:
        """The organism of a run on a model.

        Args:
            model: The model it was trained on; an adapter is taken from it.
            run: The record of the run.
            name: What it is called: of an adapter, its name on the model.

        Raises:
            ValueError: If the model has no such adapter, or the weights themselves were trained.
        """
        if run.layers:
            return cls(name, run, directions=run.directions())
        if run.settings.get("kind") == "weights":
            raise ValueError(
                "this run finetuned the weights themselves; keep the whole model with "
                "model.module.save_pretrained(folder) and load it with emlens.load(folder)"
            )
        own = model._adapters.parameters(name)
        weights = {f"{PREFIX}{k}": w.detach().to("cpu", copy=True) for k, w in own.items()}
        configs: Any = getattr(model.module, "peft_config", {})
        return cls(name, run, weights=weights, config=deepcopy(configs[name]))

    def save(self, folder: str | Path) -> Path:
        """Write the folder; an adapter's loads in plain PEFT and in `emlens.load(adapters=)`.

        An organism that is there is replaced when the new one is complete; if that fails, it
        stays.
        """
        folder = expanded(folder)
        with whole_folder(folder, _OWN) as new:
            self.run.save(new / _RUN)
            if self.directions is not None:
                self.directions.save(new / _VECTOR)
            if self.weights is not None and self.config is not None:
                # tied weights are written twice, as safetensors has to have it
                plain = {name: tensor.clone().contiguous() for name, tensor in self.weights.items()}
                atomic_write(new / WEIGHTS, save(plain, metadata={"format": "pt"}))
                config = deepcopy(self.config)
                config.inference_mode = True
                config.save_pretrained(str(new))
            record = {
                "name": self.name,
                "kind": "vector" if self.directions is not None else "adapter",
                "provenance": self.run.provenance.to_dict(),
                "updates": len(self.run.steps),
            }
            write_json(new / _RECORD, record)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Organism:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If the folder holds no whole organism.
            ValueError: If a file in it is damaged.
        """
        folder = recovered(expanded(folder))
        if not (folder / _RECORD).is_file():
            raise FileNotFoundError(
                f"{folder} holds no organism (no {_RECORD}); a LoRA adapter of others is loaded "
                "with emlens.load(base, adapters={name: folder})"
            )
        name, kind = _kept(folder / _RECORD)
        run = TrainingRun.load(folder / _RUN)
        if kind == "vector":
            return cls(name, run, directions=Directions.load(folder / _VECTOR))
        config, weights = read_adapter(name, str(folder))
        named = {f"{PREFIX}{key}": weight for key, weight in weights.items()}
        return cls(name, run, weights=named, config=config)

    def on(self, model: HookedModel) -> ConditionLike:
        """What makes the model this organism, for measures: edits, or the adapter's name.

        An adapter that the model does not have yet is put onto it.

        Raises:
            ValueError: If it does not fit the model, or the model has another of that name.
        """
        if self.directions is not None:
            edits = [Add(self.directions, where=self.run.settings.get("where", "all"))]
            model.edits_in_force(edits)  # refuses a layer or a width that is not the model's
            return edits
        if self.config is None or self.weights is None:
            raise ValueError(f"organism {self.name!r} has neither a vector nor an adapter")
        if self.name not in model.adapters:
            model.add_adapter(self.name, self.config, self.weights)
        elif not self._is_on(model):
            raise ValueError(
                f"the model has another adapter called {self.name!r}; remove it with "
                "model.remove_adapter, or save the organism under another name"
            )
        return self.name

    def _is_on(self, model: HookedModel) -> bool:
        """Whether the model's adapter of this name has these weights, with this scale."""
        config: Any = getattr(model.module, "peft_config", {}).get(self.name)
        if any(getattr(config, field) != getattr(self.config, field) for field in SCALING):
            return False
        there = model._adapters.parameters(self.name)
        ours = {key.removeprefix(PREFIX): weight for key, weight in (self.weights or {}).items()}
        return there.keys() <= ours.keys() and all(
            torch.equal(weight, ours[key].to(weight)) for key, weight in there.items()
        )


def _kept(path: Path) -> tuple[str, str]:
    """Name and kind of an organism, by its record."""
    record = read_json(path, dict)
    name, kind = record.get("name"), record.get("kind")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: name is {name!r:.60}, not text; name the organism")
    if kind not in ("vector", "adapter"):
        raise ValueError(f"{path}: kind is {kind!r:.60}, neither 'vector' nor 'adapter'")
    return name, kind
