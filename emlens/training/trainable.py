"""What is trained: vectors at some layers, the weights of a LoRA adapter, or the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from emlens.directions import Directions
from emlens.directions.fits import check_fits
from emlens.edits import Shift
from emlens.hooked import Edit, HookedModel
from emlens.hooked.architecture import writes
from emlens.hooked.edit import Where
from emlens.hooked.identity import base_weights
from emlens.hooked.sites import Site


class Trainable(Protocol):
    """What the loop needs to know of that which it trains."""

    @property
    def below(self) -> int:
        """Deepest layer whose output stays as it is; -1 if the first block changes."""
        ...

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser moves, by name: fp32 leaves."""
        ...

    def edits(self) -> Sequence[Edit]:
        """Edits in force while training."""
        ...

    def acting(self) -> Any:
        """Context in which the model is the trained one."""
        ...

    def resting(self) -> Any:
        """Context in which the model is the base."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What is recorded of the path, by name: fp32 on the CPU."""
        ...

    def written(self) -> Iterator[tuple[int, Tensor]]:
        """The vectors that are written into the residual stream, with their layers, live."""
        ...

    def record(self) -> dict[str, object]:
        """What it is, for the provenance."""
        ...

    @property
    def keeps_base(self) -> bool:
        """Whether `resting` brings the base back once training has begun."""
        ...


class VectorParts:
    """Vectors that are added to the residual stream, one per layer; zero at first.

    What is added is `alpha * parameter`.
    """

    keeps_base = True

    def __init__(
        self,
        model: HookedModel,
        layers: Sequence[int],
        site: Site,
        where: Where,
        alphas: Mapping[int, float],
        initial: Directions | None,
    ) -> None:
        self._site: Site = site
        self._where: Where = where
        self._alphas = dict(alphas)
        self._vectors: dict[int, Tensor] = {}
        given: dict[int, Tensor] = {}
        if initial is not None:
            check_fits(model, initial, "initial", site=site, layers=layers)
            given = {layer: initial.vectors[layer] for layer in layers}
        for layer in layers:
            start = given[layer] / alphas[layer] if given else torch.zeros(model.d_model)
            self._vectors[layer] = start.to(model.device).requires_grad_()
        self._start = _digest(given.values())
        self.below = below_vectors(model, layers, site, where)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {f"vector.{layer}": vector for layer, vector in self._vectors.items()}

    def edits(self) -> Sequence[Edit]:
        added = ((layer, self._alphas[layer] * vector) for layer, vector in self._vectors.items())
        return [Shift(vector, layer, self._site, self._where) for layer, vector in added]

    @contextmanager
    def acting(self) -> Iterator[None]:
        yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Tensor]:
        return {
            f"vector.{layer}": (self._alphas[layer] * vector).detach().float().cpu().clone()
            for layer, vector in self._vectors.items()
        }

    def written(self) -> Iterator[tuple[int, Tensor]]:
        for layer, vector in self._vectors.items():
            yield layer, self._alphas[layer] * vector

    def record(self) -> dict[str, object]:
        alphas = list(self._alphas.values())
        return {
            "kind": "vector",
            "layers": list(self._vectors),
            "site": self._site,
            "where": self._where,
            "alpha": alphas[0] if len(alphas) == 1 else alphas,
            "start": self._start,
        }


def below_vectors(model: HookedModel, layers: Sequence[int], site: Site, where: Where) -> int:
    """Deepest layer that vectors, and the edits in force, leave as it is; -1 if there is none."""
    places = [Shift(torch.zeros(model.d_model), layer, site, where) for layer in layers]
    below = model.prefix_layer(places)
    return -1 if below is None else below


def below_weights(model: HookedModel, layer: int) -> int:
    """Deepest layer that weights from block `layer` on, and edits in force, leave as it is."""
    edited = model.prefix_layer(())
    return layer - 1 if edited is None else min(layer - 1, edited)


class AdapterParts:
    """The weights of one LoRA adapter of a model."""

    keeps_base = True

    def __init__(self, model: HookedModel, name: str) -> None:
        self._model, self._name = model, name
        self._layers = model.lora_layers(name)
        self._blocks: dict[str, int] = {}
        for path, layer in self._layers.items():
            block = model.architecture.layer_of(path)
            if block is None or name not in layer.lora_A:
                raise ValueError(
                    f"adapter {name!r} adapts {path}, outside of the decoder blocks; emlens "
                    "trains adapters inside of them"
                )
            self._blocks[path] = block
        plain = {f"{path}.lora_{part}.weight" for path in self._layers for part in "AB"}
        more = sorted(model._adapters.parameters(name).keys() - plain)
        if more:
            raise ValueError(
                f"adapter {name!r} has {more[0]} beside A and B; emlens trains plain LoRA, so "
                "train this one with PEFT"
            )
        self.below = below_weights(model, min(self._blocks.values()))
        written = [w for n, w in self.parameters.items() if n.endswith(".B")]
        # a new adapter does nothing yet; its A is drawn from the seed
        trained = any(bool(weight.any()) for weight in written)
        self._start = _digest(self.state().values()) if trained else None

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{path}.{part}": getattr(layer, f"lora_{part}")[self._name].weight
            for path, layer in self._layers.items()
            for part in ("A", "B")
        }

    def edits(self) -> Sequence[Edit]:
        return []

    @contextmanager
    def acting(self) -> Iterator[None]:
        flags = [(weight, weight.requires_grad) for weight in self.parameters.values()]
        with self._model.adapter(self._name):
            try:
                for weight, _ in flags:
                    weight.requires_grad_(True)
                yield
            finally:
                for weight, flag in flags:
                    weight.requires_grad_(flag)
                    weight.grad = None

    @contextmanager
    def resting(self) -> Iterator[None]:
        with self._model.adapter(None):
            yield

    def state(self) -> dict[str, Tensor]:
        return {n: w.detach().float().cpu().clone() for n, w in self.parameters.items()}

    def written(self) -> Iterator[tuple[int, Tensor]]:
        for path, layer in self._layers.items():
            if writes(path):
                scale = layer.scaling[self._name]
                for column in layer.lora_B[self._name].weight.T:
                    yield self._blocks[path], scale * column

    def record(self) -> dict[str, object]:
        record = {"kind": "adapter", "name": self._name, "modules": list(self._layers)}
        return {**record, "start": self._start}


class WeightParts:
    """The model's own weights: of some blocks, or all there are. They are changed in place."""

    keeps_base = False

    def __init__(self, model: HookedModel, layers: Sequence[int] | None) -> None:
        named = dict(base_weights(model.module))
        if layers is not None:
            blocks = tuple(f"{model.architecture.blocks}.{layer}." for layer in layers)
            named = {name: weight for name, weight in named.items() if name.startswith(blocks)}
        self.parameters = named
        self.below = -1 if layers is None else below_weights(model, min(layers))
        self._layers = None if layers is None else list(layers)
        # sums tell finetuned weights from others, and are quick
        sums = [torch.stack([w.double().sum(), w.double().norm()]) for w in named.values()]
        self._start = _digest(sums)

    def edits(self) -> Sequence[Edit]:
        return []

    @contextmanager
    def acting(self) -> Iterator[None]:
        try:
            for weight in self.parameters.values():
                weight.requires_grad_(True)
            yield
        finally:
            for weight in self.parameters.values():
                weight.requires_grad_(False)
                weight.grad = None

    @contextmanager
    def resting(self) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Tensor]:
        return {}

    def written(self) -> Iterator[tuple[int, Tensor]]:
        return iter(())

    def record(self) -> dict[str, object]:
        return {"kind": "weights", "layers": self._layers, "start": self._start}


def _digest(tensors: Iterable[Tensor]) -> str | None:
    """What tells a start from another; None where there is nothing to start from."""
    digest, none = hashlib.sha256(), True
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        none = False
    return None if none else digest.hexdigest()[:16]
