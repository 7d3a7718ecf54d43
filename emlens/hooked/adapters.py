"""LoRA adapters on one copy of a base model: which there are, and which acts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from emlens.hooked.architecture import Architecture


class Adapters:
    """The adapters that PEFT has injected into a model.

    Each targeted module has become a layer that holds the original; the base weights stay where
    they are, and any number of adapters share them.

    Args:
        module: The `...ForCausalLM` module.
        paths: What its parts are called, by `id`, where an engine has moved them.

    Raises:
        ValueError: If an adapter is merged into the weights.
    """

    def __init__(self, module: nn.Module, paths: Mapping[int, str] | None = None) -> None:
        self._module = module
        self._paths = dict(paths or {})
        for path, layer in self.parts():
            if getattr(layer, "merged", False):
                raise ValueError(
                    f"an adapter is merged into the weights of {path}, so there is no base model "
                    "left; call unmerge_adapter() on the PEFT model first"
                )

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Every layer that PEFT has put into the model, with its path."""
        if "peft" not in sys.modules:
            return  # importing it takes seconds, and there can be no such layer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        for path, part in self._module.named_modules():
            if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper)):
                yield self._paths.get(id(part), path), part

    def lora_layers(self, name: str) -> dict[str, Any]:
        """The LoRA layers of one adapter, by their path in the model.

        Raises:
            ValueError: If there is no such adapter.
        """
        self.check(name)
        from peft.tuners.lora import LoraLayer

        return {
            path: part
            for path, part in self.parts()
            if isinstance(part, LoraLayer) and name in available(part)
        }

    def lowest_block(self, name: str, architecture: Architecture) -> int:
        """The first decoder block that an adapter changes: 0 where it changes more than blocks.

        Args:
            name: The adapter.
            architecture: Where the model's blocks are.

        Raises:
            ValueError: If there is no such adapter.
        """
        self.check(name)
        lowest = None
        for path, part in self.parts():
            if name not in available(part):
                continue
            block = architecture.layer_of(path)
            if block is None:
                return 0
            lowest = block if lowest is None else min(lowest, block)
        return lowest or 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, layer in self.parts() for name in available(layer)))

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the adapters in force; none for the base."""
        acting = dict.fromkeys(
            name
            for _, layer in self.parts()
            if not layer.disable_adapters
            for name in layer.active_adapters
            if name in available(layer)
        )
        return tuple(acting)

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[None]:
        """Let some adapters act inside of the block, or none; afterwards all is as it was.

        Raises:
            ValueError: If there is no such adapter.
        """
        for name in names:
            self.check(name)
        layers = [layer for _, layer in self.parts()]
        before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
        try:
            with kept_gradients(self._module):
                for layer in layers:
                    switch(layer, names)
            yield
        finally:
            with kept_gradients(self._module):
                for layer, active, disabled in before:
                    layer.set_adapter(active)
                    layer.enable_adapters(not disabled)

    def tensors(self) -> Iterator[nn.Parameter]:
        """Every parameter that belongs to an adapter and not to the base."""
        for path, weight in self._module.named_parameters():
            if any(part.startswith(("lora_", "modules_to_save")) for part in path.split(".")):
                yield weight

    def parameters(self, name: str) -> dict[str, Any]:
        return {
            ".".join(part for part in path.split(".") if part != name): weight
            for path, weight in self._module.named_parameters()
            if name in path.split(".")
        }

    def scalings(self, name: str) -> dict[str, float]:
        return {path: layer.scaling[name] for path, layer in self.lora_layers(name).items()}

    def check(self, name: str) -> None:
        """Refuse the name of an adapter that there is not.

        Raises:
            ValueError: Listing those that there are.
        """
        known = self.names
        if name in known:
            return
        if known:
            raise ValueError(f"there is no adapter {name!r}; the adapters are {', '.join(known)}")
        raise ValueError(
            f"there is no adapter {name!r}: this model has none; load them with "
            "emlens.load(base, adapters={name: folder or hub name})"
        )


def available(layer: Any) -> list[str]:
    """The adapters that have weights in a layer of PEFT."""
    if hasattr(layer, "modules_to_save"):
        return list(layer.modules_to_save)
    kept = (getattr(layer, name) for name in layer.adapter_layer_names)
    return list(dict.fromkeys(name for group in kept for name in _keys(group)))


def switch(layer: Any, names: Sequence[str]) -> None:
    """Let adapters act in a layer; where none has weights, the base does."""
    here = [name for name in names if name in available(layer)]
    if not here:
        layer.enable_adapters(False)
        return
    layer.enable_adapters(True)
    layer.set_adapter(here)


@contextmanager
def kept_gradients(module: nn.Module) -> Iterator[None]:
    """Put every weight's `requires_grad` back, which PEFT sets when it switches."""
    flags = [(weight, weight.requires_grad) for weight in module.parameters()]
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _keys(group: Any) -> Iterable[str]:
    return group.keys() if isinstance(group, (nn.ModuleDict, nn.ParameterDict)) else ()
