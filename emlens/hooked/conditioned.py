"""The conditions of a hooked model: its adapters and edits, and their identity."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.adapters import Adapters, Weights
from emlens.hooked.architecture import Architecture
from emlens.hooked.condition import Acting, Altered, Condition, ConditionLike, condition_of
from emlens.hooked.edit import Edit, check_edits
from emlens.hooked.identity import model_identity, versions_of
from emlens.hooked.interface import Hooked
from emlens.hooked.sites import Site, SiteName, check_site
from emlens.text.template import Template

if TYPE_CHECKING:
    from peft import LoraConfig


class Conditioned:
    """The part of `HookedModel` that manages adapters and edits."""

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.architecture = Architecture.of(module)
        self._adapters = Adapters(module)
        self._edits: tuple[Edit, ...] = ()
        self._enclosing: tuple[Acting, ...] = ()
        self._condition = ""
        self._changes = ExitStack()
        self._identity: tuple[tuple[object, ...], str] | None = None
        self._origins: set[str | None] = set()
        self._template = Template(tokenizer)

    @property
    def n_layers(self) -> int:
        return self.architecture.n_layers

    @property
    def d_model(self) -> int:
        return self.architecture.d_model

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.architecture.sites

    def check_site(self, site: SiteName, layers: Iterable[int] | None = None) -> Site:
        """Return the site with this name.

        Args:
            site: emlens' own name or TransformerLens'.
            layers: The layers it is used with; a TransformerLens name may contain one.

        Raises:
            ValueError: If the site is unknown, or this model does not have it, with the reason.
        """
        return check_site(site, self.architecture.missing, self.name, layers)

    @property
    def template(self) -> Template:
        """The chat template, with the arguments that the model was loaded with."""
        return self._template

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given beside messages; a fixed date is `strftime_now`."""
        return dict(self._template.arguments)

    @contextmanager
    def under(self, condition: ConditionLike) -> Iterator[Self]:
        """Run under a condition inside the block: its adapters, then its edits after outer ones.

        Args:
            condition: None for the base, edits, the name of an adapter, `(name, edits)`, or an
                `Organism`.

        Raises:
            ValueError: If the model has no such adapter, or an edit does not fit it.
            TypeError: If it is not a condition.

        Examples:
            >>> with model.under(("medical", [emlens.Ablate(direction)])):
            ...     model.generate([conversation])
        """
        found = condition_of(self._hooked, condition)
        adapters = found.adapters or ()
        with self.edited(*found.edits), self._altered(adapters), self._adapters.using(found.names):
            before = self._enclosing, self._condition
            self._enclosing, self._condition = adapters, found.name
            try:
                yield self
            finally:
                self._enclosing, self._condition = before

    @contextmanager
    def _altered(self, adapters: Sequence[Acting]) -> Iterator[None]:
        """Change these adapters inside the block, and none that an enclosing block has changed."""
        outer, inner = _changes_of(self._enclosing), _changes_of(adapters)
        if outer == inner:
            yield
            return
        try:
            self._change(inner)
            yield
        finally:
            self._change(outer)

    def _change(self, altered: Sequence[Altered]) -> None:
        """Put what is changed about adapters back, then change these."""
        self._changes.close()
        for one in altered:
            self._changes.enter_context(one.altering(self))

    @contextmanager
    def edited(self, *edits: Edit | Sequence[Edit]) -> Iterator[Self]:
        """Apply edits, or lists of edits, in every call inside the block.

        They act before the edits of the call. Calls of `model.module` itself are not edited.
        """
        before = self._edits
        given: list[Any] = []
        for item in edits:
            given += item if isinstance(item, (list, tuple)) else [item]
        self._edits = (*before, *self._checked(given))
        try:
            yield self
        finally:
            self._edits = before

    @contextmanager
    def adapter(self, *names: Acting | None) -> Iterator[Self]:
        """Activate one or several adapters inside the block; None is the base.

        Conditions inside the block that name no adapter take it.

        Args:
            *names: Names from `adapters`, or None. The previous state is restored afterwards.

        Raises:
            ValueError: If there is no such adapter; the known ones are listed.

        Examples:
            >>> with model.adapter("medical"):
            ...     model.generate([conversation])
        """
        with self.under(Condition(tuple(name for name in names if name is not None))):
            yield self

    @property
    def _hooked(self) -> Hooked:
        return cast(Hooked, self)

    @property
    def identity(self) -> str:
        """A hash of the model's content, 16 letters; see `model_identity`."""
        versions = versions_of(self._hooked)
        if self._identity is None or self._identity[0] != versions:
            self._identity = versions, model_identity(self._hooked)
        return self._identity[1]

    @property
    def enclosing_adapters(self) -> tuple[Acting, ...] | None:
        """What a condition that names no adapter takes: those of the enclosing block, else none.

        An adapter that the model was brought with is no enclosing one.
        """
        return self._enclosing or None

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that act now; none for the base."""
        return self._adapters.acting

    @property
    def adapters_in_force(self) -> tuple[Acting, ...]:
        """The adapters that act now, with what is changed about them; none for the base."""
        return self._enclosing or self.acting

    @property
    def condition_in_force(self) -> Condition:
        """The adapters and edits that act now, under the name that their condition has."""
        return Condition(self.adapters_in_force, self._edits, name=self._condition)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters on the model."""
        return self._adapters.names

    @property
    def active_adapter(self) -> str | None:
        """The adapters in force, joined by `+`, or None for the base."""
        return "+".join(self.acting) or None

    def check_adapter(self, name: str) -> None:
        """Refuse the name of an adapter that there is not.

        Raises:
            ValueError: Listing those that there are.
        """
        self._adapters.check(name)

    def lowest_block(self, name: str) -> int:
        """The first block that an adapter changes; 0 where it changes more than blocks."""
        return self._adapters.lowest_block(name, self.architecture)

    def adapter_weights(self, name: str) -> dict[str, Tensor]:
        """Every tensor that an adapter owns, by a path without its name."""
        return self._adapters.parameters(name)

    def adapter_scalings(self, name: str) -> dict[str, float]:
        """The strength that an adapter acts with now, by the path of each LoRA layer."""
        return self._adapters.scalings(name)

    def lora_layers(self, name: str) -> dict[str, Any]:
        """PEFT's layers of one adapter, by their path in the module."""
        return self._adapters.lora_layers(name)

    def add_adapter(self, name: str, config: LoraConfig, weights: Weights | None = None) -> None:
        """Add a LoRA adapter to the model; it does not act yet.

        A wrapped object does not change: emlens runs a second tree of its modules.

        Args:
            name: Its name; `adapter(name)` activates it.
            config: PEFT's configuration.
            weights: Its weights by PEFT's keys; None for a new adapter that is to be trained.

        Raises:
            ValueError: If the name is taken, or the adapter does not fit the model or would change
                the base.
            NotImplementedError: If the engine has replaced the modules that it targets.
        """
        from emlens.hooked.attach import inject

        inject(self.module, name, config, self.name, weights)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter from the model.

        Raises:
            ValueError: If there is no such adapter.
        """
        from emlens.hooked.attach import remove

        self._adapters.check(name)
        remove(self.module, name)

    def edits_in_force(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The edits of enclosing `edited` blocks, then `edits`, all checked."""
        return (*self._edits, *self._checked(edits))

    def _checked(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        check_edits(edits, self.name, self.architecture.missing, self.n_layers, self.d_model)
        for edit in edits:
            self._note_origin(type(edit).__name__, getattr(edit, "origin", None))
        return tuple(edits)

    def _note_origin(self, edit: str, origin: str | None) -> None:
        """Warn once of a direction from a model of another name; it may well be meant."""
        if origin in (None, self.name, *self._origins):
            return
        self._origins.add(origin)
        warnings.warn(
            f"{edit} uses a direction that was made in {origin!r}, but this model is "
            f"{self.name!r}; if both are the same model, give wrap or load the same name",
            stacklevel=5,
        )


def _changes_of(adapters: Sequence[Acting]) -> tuple[Altered, ...]:
    return tuple(one for one in adapters if not isinstance(one, str))
