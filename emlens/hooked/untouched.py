"""Whole or not at all: what is put into a model leaves all that was there as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emlens.hooked.adapters import Adapters, available, delete_from

_CHUNK = 1 << 18


@contextmanager
def untouched(module: nn.Module, what: str) -> Iterator[None]:
    """Let adapters be put into a model inside the block, and prove that the rest is as it was.

    Every tensor of the model has to be in its place afterwards, in the same storage, with the
    same content (compared by a checksum over all of its bytes). If it is not, or the block raises,
    modules, tensors, adapters and their settings are put back.

    Args:
        module: The `...ForCausalLM` module.
        what: What is put in, as the error calls it.

    Raises:
        ValueError: If a tensor of the model was changed.
    """
    before = _Before(module)
    sums = before.checksums()
    try:
        yield
        moved = before.moved()
        if moved is not None:
            raise ValueError(f"{what} would put another tensor in the place of {moved}; refused")
        after = before.checksums()
        changed = [path for path, value in sums.items() if after[path] != value]
        if changed:
            raise ValueError(
                f"{what} has overwritten {changed[0]} of the model; load the model again, and "
                "leave the adapter out"
            )
    except BaseException:
        before.restore()
        raise


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter or buffer: the object, and its storage by another name."""

    tensor: Tensor
    data: Tensor


class _Before:
    """Where everything in a model is; no tensor is copied."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._tensors = {path: _Kept(t, t.data) for path, t in _tensors(module)}
        self._layers = [
            (layer, available(layer), list(layer.active_adapters), layer.disable_adapters)
            for _, layer in Adapters(module).parts()
        ]
        configs = getattr(module, "peft_config", None)
        self._configs = None if configs is None else dict(configs)

    def moved(self) -> str | None:
        """A tensor that is not in the model any more, or in another storage."""
        there = {id(tensor) for _, tensor in _tensors(self._module)}
        for path, kept in self._tensors.items():
            same = kept.tensor.data_ptr() == kept.data.data_ptr()
            if id(kept.tensor) not in there or not same or kept.tensor.shape != kept.data.shape:
                return path
        return None

    def checksums(self) -> dict[str, int]:
        """The content of every tensor; those that accelerate keeps elsewhere are left out."""
        distinct = {id(kept.tensor): (p, kept.tensor) for p, kept in self._tensors.items()}
        return {path: checksum(tensor) for path, tensor in distinct.values() if not tensor.is_meta}

    def restore(self) -> None:
        known = {id(layer) for layer, *_ in self._layers}
        names = {id(layer): held for layer, held, *_ in self._layers}
        for _, layer in list(Adapters(self._module).parts()):
            if id(layer) in known:
                for name in available(layer):
                    if name not in names[id(layer)]:
                        delete_from(layer, name)
        for path, part in self._modules.items():
            if path:
                _set(self._module, path, part)
        for path, kept in self._tensors.items():
            if kept.tensor.data_ptr() != kept.data.data_ptr():
                kept.tensor.data = kept.data
            _set(self._module, path, kept.tensor)
        for layer, _, active, disabled in self._layers:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        owner: Any = self._module
        if self._configs is not None:
            owner.peft_config = self._configs
        else:
            with suppress(AttributeError):
                del owner.peft_config


def checksum(tensor: Tensor) -> int:
    """A number that any change of any bit of a tensor changes, made on its device, in pieces."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 8 == 0 and flat.data_ptr() % 8 == 0 and flat.storage_offset() % 8 == 0:
        flat = flat.view(torch.int64)
    # odd factors, so that no bit is lost where the sum wraps around
    factors = torch.arange(1, 2 * _CHUNK, 2, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for piece in flat.split(_CHUNK):
        total = total * 6364136223846793005 + (piece * factors[: len(piece)]).sum()
    return int(total)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _set(module: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    """Put a module or tensor back into its place, where another one is now."""
    parent, _, child = path.rpartition(".")
    owner = module.get_submodule(parent)
    homes: list[dict[str, Any]] = [owner._modules, owner._parameters, owner._buffers]
    for places in homes:
        if child in places and places[child] is not value:
            places[child] = value
