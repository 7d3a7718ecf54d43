"""Organisms on disk: one folder each, with what was trained, how, on what, and the path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from emlens._files import atomic_folder, atomic_write, read_json, write_json
from emlens.directions import Directions
from emlens.edits import Add
from emlens.hooked import ConditionLike, HookedModel
from emlens.training.run import TrainingRun

if TYPE_CHECKING:
    from peft import LoraConfig

_RECORD, _VECTOR, _RUN = "organism.json", "vector.safetensors", "run.safetensors"
_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Organism:
    """What a training left: a vector or an adapter, with the record of the run.

    Attributes:
        name: What it is called.
        run: The record of its training: settings, data hashes, losses, path.
        directions: The vectors, where vectors were trained.
        weights: `A` and `B` by PEFT's names, where an adapter was trained.
        config: PEFT's configuration of that adapter.

    Example:
        >>> direction, run = emlens.train_vector(model, conversations, layer=15)
        >>> Organism.of(model, run, "finance").save("organisms/finance")
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
        weights = {
            f"{_PREFIX}{path}.{part}.weight": getattr(layer, part)[name].weight.detach().cpu()
            for path, layer in model.lora_layers(name).items()
            for part in ("lora_A", "lora_B")
        }
        configs = getattr(model.module, "peft_config", {})
        return cls(name, run, weights=weights, config=configs[name])

    def save(self, folder: str | Path) -> Path:
        """Write the folder; an adapter's loads in plain PEFT and in `emlens.load(adapters=)`.

        A folder without its record is not whole; an organism that is there stays if this fails.
        """
        folder = Path(folder)
        with atomic_folder(folder, _RECORD) as draft:
            self._write(draft)
        return folder

    def _write(self, folder: Path) -> None:
        self.run.save(folder / _RUN)
        if self.directions is not None:
            self.directions.save(folder / _VECTOR)
        if self.weights is not None and self.config is not None:
            plain = {name: tensor.contiguous() for name, tensor in self.weights.items()}
            atomic_write(folder / _WEIGHTS, save(plain, metadata={"format": "pt"}))
            self.config.inference_mode = True
            self.config.save_pretrained(str(folder))
        record = {
            "name": self.name,
            "kind": "vector" if self.directions is not None else "adapter",
            "provenance": self.run.provenance.to_dict(),
            "updates": len(self.run.steps),
        }
        write_json(folder / _RECORD, record)

    @classmethod
    def load(cls, folder: str | Path) -> Organism:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If the folder holds no whole organism.
            ValueError: If a file in it is damaged.
        """
        folder = Path(folder).expanduser()
        if not (folder / _RECORD).is_file():
            raise FileNotFoundError(
                f"{folder} holds no organism (no {_RECORD}); a LoRA adapter of others is loaded "
                "with emlens.load(base, adapters={name: folder})"
            )
        record, run = read_json(folder / _RECORD), TrainingRun.load(folder / _RUN)
        if record["kind"] == "vector":
            return cls(record["name"], run, directions=Directions.load(folder / _VECTOR))
        from emlens.hooked.attach import read_adapter

        config, weights = read_adapter(record["name"], str(folder))
        named = {f"{_PREFIX}{name}": weight for name, weight in weights.items()}
        return cls(record["name"], run, weights=named, config=config)

    def on(self, model: HookedModel) -> ConditionLike:
        """What makes the model this organism, for measures: edits, or the adapter's name.

        An adapter that the model does not have yet is put onto it.

        Raises:
            ValueError: If it does not fit the model.
        """
        if self.directions is not None:
            return [Add(self.directions, where=self.run.settings.get("where", "all"))]
        if self.name not in model.adapters:
            self._attach(model)
        return self.name

    def _attach(self, model: HookedModel) -> None:
        import torch

        if self.config is None or self.weights is None:
            raise ValueError(f"organism {self.name!r} has neither a vector nor an adapter")
        model.add_adapter(self.name, self.config)
        with torch.no_grad():
            for path, layer in model.lora_layers(self.name).items():
                for part in ("lora_A", "lora_B"):
                    weight = self.weights[f"{_PREFIX}{path}.{part}.weight"]
                    getattr(layer, part)[self.name].weight.copy_(weight)
