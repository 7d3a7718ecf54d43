"""What a condition, an LM head, an identity and an answer need of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.architecture import Architecture
from emlens.hooked.edit import Edit
from emlens.text.template import Template


class Hooked(Protocol):
    """The part of `HookedModel` that its own parts rest on, so that none of them imports it."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None

    architecture: Architecture

    @property
    def template(self) -> Template: ...

    @property
    def identity(self) -> str: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def condition_in_force(self) -> Any: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def acting(self) -> tuple[str, ...]: ...

    @property
    def adapters_in_force(self) -> tuple[Any, ...]: ...

    @property
    def enclosing_adapters(self) -> tuple[Any, ...] | None: ...

    def under(self, condition: Any) -> AbstractContextManager[Any]: ...

    def unembed(self, hidden: Tensor) -> Tensor: ...

    def edits_in_force(self, edits: Sequence[Edit]) -> tuple[Edit, ...]: ...

    def check_adapter(self, name: str) -> None: ...

    def adapter_weights(self, name: str) -> dict[str, Tensor]: ...

    def adapter_scalings(self, name: str) -> dict[str, float]: ...

    def _decode(self, batch: Any, visit: Any, **settings: Any) -> Tensor: ...
