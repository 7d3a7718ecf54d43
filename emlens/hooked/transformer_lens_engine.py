"""The TransformerLens engine: reads and edits at the hook points of a `TransformerBridge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emlens.hooked.adapters import Adapters, Weights
from emlens.hooked.architecture import as_returned, hidden_of, with_hidden
from emlens.hooked.hook_plan import Visit
from emlens.hooked.model import HookedModel, Resume
from emlens.hooked.sites import Site
from emlens.hooked.truth import in_short
from emlens.text import TokenBatch

if TYPE_CHECKING:
    from peft import LoraConfig

Change = Callable[[Tensor], Tensor]


class TransformerLensModel(HookedModel):
    """A hooked model on TransformerLens' `TransformerBridge`.

    The bridge's own `forward` and `generate` are not used: the bridged module is called with the
    attention mask and position ids of the batch, so that padding is never guessed.
    """

    engine = "transformer_lens"

    def __init__(
        self,
        bridge: TransformerBridge,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
        paths: Mapping[int, str] | None = None,
    ) -> None:
        module: Any = bridge.original_model
        super().__init__(module, tokenizer, name, revision)
        self._adapters = Adapters(module, paths)
        self.bridge = bridge

    def add_adapter(
        self, name: str, config: LoraConfig, weights: Weights | None = None
    ) -> NoReturn:
        """Refuse: the bridge has put modules of its own where the adapter would go.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "a new adapter cannot be put into a TransformerBridge; load the model with "
            "engine='nnsight' to train it, or give an adapter with emlens.load(adapters=...), "
            "which is trained on either engine"
        )

    def hook_point(self, layer: int, site: Site) -> HookPoint:
        """The TransformerLens hook point of a site.

        Raises:
            ValueError: If TransformerLens has none there.
        """
        block: Any = self._blocks[layer]
        found = getattr(block, f"hook_{site}", None)
        if not isinstance(found, HookPoint):
            raise ValueError(
                f"TransformerLens has no hook_{site} in block {layer} of {self.name}; "
                "engine='nnsight' may have it"
            )
        return found

    @property
    def _blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.architecture.blocks))

    def _lacks(self, site: Site) -> str:
        """TransformerLens says where attention and MLP are; `resid_mid` needs none of its own."""
        try:
            for layer in range(self.n_layers if site != "resid_mid" else 0):
                self.hook_point(layer, site)
        except ValueError as error:
            return str(error)
        return ""

    def _run(
        self, batch: TokenBatch, visit: Visit, last: int | None, resume: Resume | None = None
    ) -> Tensor:
        with ExitStack() as stack:
            done = -1
            if resume is not None:
                done = resume[0]
                self._skip(stack, visit, resume)
            self._enter(stack, visit, after=done)
            norm = self.module.get_submodule(self.architecture.norm)
            stack.enter_context(_hooked(norm if last is None else self._blocks[last], _stop))
            try:
                self.module(**self.architecture.inputs(batch))
            except _Stopped as stopped:
                return stopped.hidden
        raise RuntimeError(f"{self.name} ran to its end without passing its final norm")

    def _decode(self, batch: TokenBatch, visit: Visit, **settings) -> Tensor:
        prompt = batch.input_ids.shape[1]
        cached = settings["use_cache"]
        step = -1

        def begin(*_) -> None:
            nonlocal step
            step += 1
            visit.starts_at(prompt + step - 1 if step and cached else 0)

        with ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(begin).remove)
            self._enter(stack, visit)
            generate: Any = self.module.generate
            return generate(**self.architecture.prompt(batch), **settings)

    def _skip(self, stack: ExitStack, visit: Visit, resume: Resume) -> None:
        """Let the blocks below the residual hand it on instead of running."""
        layer, residual = resume
        if (layer, "resid_post") in visit.points:
            residual = visit(layer, "resid_post", residual)
        if self.architecture.skips:
            whole = as_returned(residual, self.architecture.returns)
            for block in self._blocks[: layer + 1]:
                stack.enter_context(_replaced(block, whole))
        else:
            given = _hooked(self._blocks[layer], lambda *seen: with_hidden(seen[2], residual))
            stack.enter_context(given)

    def _enter(self, stack: ExitStack, visit: Visit, after: int = -1) -> None:
        """Hang the visit into the hook points of the blocks after `after`."""
        for layer, points in groupby(visit.points, key=lambda point: point[0]):
            if layer > after:
                self._enter_block(stack, visit, layer, {site for _, site in points})

    def _enter_block(self, stack: ExitStack, visit: Visit, layer: int, sites: set[Site]) -> None:
        before: Tensor | None = None

        def entering(residual: Tensor) -> Tensor:
            nonlocal before
            before = visit(layer, "resid_pre", residual)
            return before

        def attention(contribution: Tensor) -> Tensor:
            return visit.attention(layer, before, contribution)

        if sites & {"resid_pre", "resid_mid"}:
            self._at(stack, layer, "resid_pre", entering)
        if sites & {"attn_out", "resid_mid"}:
            self._at(stack, layer, "attn_out", attention)
        for site in ("mlp_out", "resid_post"):
            if site in sites:
                self._at(stack, layer, site, lambda value, site=site: visit(layer, site, value))

    def _at(self, stack: ExitStack, layer: int, site: Site, change: Change) -> None:
        stack.enter_context(_hooked_point(self.hook_point(layer, site), change))


def bridge_of(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> TransformerBridge:
    """Build a `TransformerBridge` on a model in memory, with eager attention.

    The module and its config are changed in place: give it a `shadow`.

    Not by `boot_transformers`: that looks for a processor, and installs packages to load it.

    Raises:
        ValueError: If TransformerLens does not know the architecture, or fails on it.
    """
    own = copy.deepcopy(tokenizer)
    # said to prepend BOS already, or the bridge would load the tokenizer anew to make it do so
    own.init_kwargs = {"name_or_path": name, **own.init_kwargs, "add_bos_token": True}
    kind = type(module).__name__
    try:
        module.set_attn_implementation("eager")
        return build_bridge_from_module(
            module, kind, hf_config=module.config, tokenizer=own, model_name=name
        )
    except Exception as error:
        raise ValueError(
            f"TransformerLens cannot bridge {kind} ({in_short(error)}); engine='nnsight' may run it"
        ) from error


class _Stopped(Exception):
    """Carries the hidden state that a pass was run for out of the model."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("stopped")
        self.hidden = hidden


def _stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
    raise _Stopped(hidden_of(output))


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked_point(point: HookPoint, change: Change) -> Iterator[None]:
    """Put `change` behind the hooks that the user may have at a hook point."""

    def changed(tensor: Tensor, *, hook: HookPoint) -> Tensor | None:
        after = change(tensor)
        return None if after is tensor else after

    handle = point.add_hook(changed)
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)


@contextmanager
def _replaced(block: nn.Module, value: object) -> Iterator[None]:
    """Make a block return a value; written past the bridge, whose attributes reach through."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *_, **__: value
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
