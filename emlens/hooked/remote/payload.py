"""What goes along with a remote request: edits and pools as plain functions and tensors."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

import cloudpickle
import torch
from nnsight.intervention.serialization import DEFAULT_PROTOCOL, CustomCloudPickler
from nnsight.ndif import pull_env
from torch import Tensor

from emlens.hooked.edit import Edit, Formula, has_formula
from emlens.hooked.sites import check_site

ON_SERVER = frozenset(
    {"torch", "numpy", "transformers", "accelerate", "einops", "peft", "nnsight", "cloudpickle"}
)
"""Packages that a server has, besides the standard library."""

_OURS = __name__.partition(".")[0]
_WAY_OUT = (
    "give the edit a method formula(layer) that returns (function, arguments): a function of "
    "the residual and its arguments, with torch alone"
)


def carried(edit: Edit) -> Edit:
    """Return an edit that does the same and can travel: plain attributes and pure functions.

    An edit with a `formula` is taken apart into its functions and tensors. Any other is taken
    along whole with its class, which goes well where that leans on nothing that a server lacks
    and, for what a dataclass generates, the server runs the same version of Python.

    Raises:
        TypeError: If the edit needs what a server does not have, or cannot be serialised.
        ValueError: If it holds a tensor that requires grad.
    """
    name = type(edit).__name__
    layers = tuple(edit.layers)
    if has_formula(edit):
        formulas = {layer: _formula(edit, layer) for layer in layers}
        delta = _delta_of(formulas)
        check_travels(formulas, f"the formula of {name}", "write it with torch alone")
    else:
        if any(kind.__module__.partition(".")[0] == _OURS for kind in type(edit).__mro__):
            raise TypeError(
                f"{name} cannot run remotely: it computes its own delta on top of a class of "
                f"emlens, which a server does not have; {_WAY_OUT}"
            )
        delta = edit.delta
        check_travels(delta, name, _WAY_OUT)
    plain = SimpleNamespace(
        site=check_site(edit.site), layers=layers, where=edit.where, delta=delta
    )
    return cast(Edit, plain)


def check_travels(thing: object, what: str, way_out: str) -> None:
    """Refuse what a server could not rebuild.

    Args:
        thing: What shall travel.
        what: Its name in the error.
        way_out: What else can be done, for the error.

    Raises:
        TypeError: If it needs a package that a server does not have, or cannot be serialised.
        ValueError: If it holds a tensor that requires grad.
    """
    pull_env()
    with by_value():
        seen = _Witness()
        try:
            seen.dump(thing)
        except Exception as error:
            raise TypeError(f"{what} cannot be sent to a server: {error}; {way_out}") from error
    if seen.live:
        raise ValueError(
            f"{what} holds a tensor that requires grad; no gradient comes back from a server: "
            "detach it, or load the model without remote="
        )
    missing = sorted({name.partition(".")[0] for name in seen.needs} - _known())
    if missing:
        raise TypeError(
            f"{what} cannot run remotely: it needs {', '.join(missing)}, which a server does not "
            f"have; send it with nnsight.register({missing[0]!r}), or {way_out}"
        )


@contextmanager
def by_value() -> Iterator[None]:
    """Inside the block, functions of emlens are serialised as source, not by their name."""
    package = sys.modules[_OURS]
    if _OURS in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(package)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(package)


class _Witness(CustomCloudPickler):
    """Serialises as a request does, and notes what is only named: what must be there already."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=DEFAULT_PROTOCOL)
        self.needs: set[str] = set()
        self.live = False

    def reducer_override(self, obj: Any) -> Any:
        result = super().reducer_override(obj)
        if isinstance(obj, ModuleType):
            self.needs.add(obj.__name__)
        elif result is NotImplemented and isinstance(
            obj, (type, FunctionType, BuiltinFunctionType)
        ):
            self.needs.add(obj.__module__ or "builtins")
        elif isinstance(obj, Tensor):
            self.live |= obj.requires_grad
        return result


def _known() -> set[str]:
    return set(ON_SERVER) | set(sys.stdlib_module_names)


def _formula(edit: Any, layer: int) -> Formula:
    function, arguments = edit.formula(layer)
    return function, tuple(_own(value) for value in arguments)


def _own(value: Any) -> Any:
    """A tensor as the only one in its storage: the whole storage would travel."""
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.to("cpu", copy=True)
    return value


def _delta_of(formulas: Mapping[int, Formula]) -> Callable[[Tensor, int], Tensor]:
    def delta(residual: Tensor, layer: int) -> Tensor:
        function, arguments = formulas[layer]
        placed = [
            value.to(residual.device) if isinstance(value, torch.Tensor) else value
            for value in arguments
        ]
        return function(residual, *placed)

    return delta
