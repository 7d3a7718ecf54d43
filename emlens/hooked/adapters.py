"""LoRA adapters on one copy of a base model: which there are, and which acts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import product
from typing import Any

from torch import Tensor, nn

from emlens.hooked.architecture import Architecture

Weights = Mapping[str, Tensor]
"""An adapter's weights, by the keys that PEFT saves them under."""


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
            if getattr(getattr(layer, "token_adapter", layer), "merged", False):
                raise ValueError(
                    f"an adapter is merged into the weights of {path}, so there is no base model "
                    "left; call unmerge_adapter() on the PEFT model first"
                )

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Every layer or wrapper that PEFT has put into the model, with its path.

        The layer inside of a wrapper for single tokens, which switches with it, is left out.
        """
        if "peft" not in sys.modules:
            return  # importing it takes seconds, and there can be no such layer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

        inner = set()
        for path, part in self._module.named_modules():
            if isinstance(part, TrainableTokensWrapper):
                inner.add(id(part.token_adapter))
            if isinstance(part, AuxiliaryTrainingWrapper) or (
                isinstance(part, BaseTunerLayer) and id(part) not in inner
            ):
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

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Every tensor that an adapter owns, by the key that PEFT saves it under.

        `A`, `B`, magnitudes, biases, saved modules and single tokens. The tensors are the model's
        own, without their graph; the keys do not have the adapter's name in them.

        Raises:
            ValueError: If there is no such adapter.
        """
        self.check(name)
        from peft import get_peft_model_state_dict

        with self.asked_for(name):
            found = get_peft_model_state_dict(
                self._module, adapter_name=name, save_embedding_layers=False
            )
        live = {id(part): path for path, part in self._module.named_modules()}
        places = {f"{live[id(part)]}.": f"{path}." for path, part in self.parts()}
        return {
            places[place] + key.removeprefix(place): tensor
            for key, tensor in found.items()
            # others are biases of the base
            if (place := max((p for p in places if key.startswith(p)), key=len, default=""))
        }

    @contextmanager
    def asked_for(self, name: str) -> Iterator[None]:
        """Let PEFT read or fill one adapter where another has single tokens.

        PEFT asks every wrapper for single tokens, also one that has none of this adapter.
        """
        others = [
            part
            for _, part in self.parts()
            if hasattr(part, "token_adapter") and name not in available(part)
        ]
        asked = ("adapter_state_dict", "adapter_state_dict_load_map")
        try:
            for part, method in product(others, asked):
                setattr(part, method, lambda *_: {})
            yield
        finally:
            for part, method in product(others, asked):
                delattr(part, method)

    def scalings(self, name: str) -> dict[str, float]:
        """What each LoRA layer of an adapter multiplies `B A` with at present, by its path.

        Raises:
            ValueError: If there is no such adapter.
        """
        return {path: float(part.scaling[name]) for path, part in self.lora_layers(name).items()}

    @property
    def names(self) -> tuple[str, ...]:
        found = dict.fromkeys(name for _, layer in self.parts() for name in available(layer))
        order = [name for name in getattr(self._module, "peft_config", {}) if name in found]
        return tuple(dict.fromkeys([*order, *found]))

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters in force, in order; none for the base."""
        layers = [layer for _, layer in self.parts() if not layer.disable_adapters]
        real = {n for layer in layers for n in layer.active_adapters if n in available(layer)}
        # a layer of LoRA knows the order of all, a wrapper only its own
        known = sorted((list(layer.active_adapters) for layer in layers), key=len, reverse=True)
        return tuple(dict.fromkeys(name for names in known for name in names if name in real))

    @property
    def active(self) -> str | None:
        """The adapters in force (several joined by `+`), or None for the base."""
        return "+".join(self.acting) or None

    @contextmanager
    def using(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Let adapters act together inside of the block, or none; afterwards all is as it was.

        Args:
            names: One adapter, several, or None for the base.

        Raises:
            ValueError: If there is no such adapter, or two of them replace the same module.
        """
        chosen = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names or ()))
        parts = list(self.parts())
        layers = [layer for _, layer in parts]
        _check_together(chosen, parts)
        for name in chosen:
            self.check(name)
        before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
        try:
            with kept_gradients(*layers):
                for layer in layers:
                    switch(layer, chosen)
            yield
        finally:
            # one may have been taken away inside of the block
            left = {name for layer in layers for name in available(layer)}
            with kept_gradients(*layers):
                for layer, active, disabled in before:
                    own = left if hasattr(layer, "lora_A") else left & set(available(layer))
                    _set(layer, [name for name in active if name in own], disabled)

    def check(self, name: str) -> None:
        """Refuse the name of an adapter that there is not.

        Raises:
            ValueError: Listing those that there are.
        """
        known = self.names
        if name in known:
            return
        if known:
            raise ValueError(
                f"there is no adapter {str(name)!r}; the adapters are {', '.join(known)}"
            )
        raise ValueError(
            f"there is no adapter {str(name)!r}: this model has none; load them with "
            "emlens.load(base, adapters={name: folder or hub name})"
        )


def available(layer: Any) -> list[str]:
    """The adapters that have weights in a layer or wrapper of PEFT."""
    kept = (reduce(getattr, name.split("."), layer) for name in layer.adapter_layer_names)
    return list(dict.fromkeys(name for group in kept for name in _keys(group)))


def switch(layer: Any, names: Sequence[str]) -> None:
    """Let adapters act in a layer; where none of them has weights, the base does."""
    held = available(layer)
    own = [name for name in names if name in held]
    # PEFT tells a layer of LoRA of them all, and a wrapper of its own
    active = list(names) if hasattr(layer, "lora_A") else own
    _set(layer, active if own else list(layer.active_adapters), not own)


def _set(layer: Any, active: list[str], disabled: bool) -> None:
    if list(layer.active_adapters) != active:
        layer.set_adapter(active)
    if layer.disable_adapters != disabled:
        layer.enable_adapters(not disabled)


def _check_together(names: Sequence[str], parts: Iterable[tuple[str, Any]]) -> None:
    for path, layer in parts if len(names) > 1 else ():
        both = [name for name in names if name in available(layer)]
        if len(both) > 1 and not hasattr(layer, "lora_A"):
            raise ValueError(
                f"adapters {both[0]!r} and {both[1]!r} both replace {path}; only one of them can "
                "act at a time"
            )


def delete_from(layer: Any, name: str) -> None:
    """Take one adapter out of a layer; of the others, those act that did."""
    acting = [] if layer.disable_adapters else [n for n in layer.active_adapters if n != name]
    if hasattr(layer, "lora_A"):
        layer.delete_adapter(name)
    else:
        layer.delete_adapter(name, new_active_adapters=acting)
    switch(layer, acting)


@contextmanager
def kept_gradients(*modules: nn.Module) -> Iterator[None]:
    """Put every weight's `requires_grad` back, which PEFT sets when it switches."""
    flags = [(weight, weight.requires_grad) for part in modules for weight in part.parameters()]
    try:
        yield
    finally:
        for weight, flag in flags:
            if weight.requires_grad != flag:
                weight.requires_grad_(flag)


def _keys(group: Any) -> Iterable[str]:
    return group.keys() if isinstance(group, (nn.ModuleDict, nn.ParameterDict)) else ()
