"""The logits of a model as it was brought, which each engine is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.hooked.adapters import Adapters, available
from emlens.hooked.architecture import Architecture, arguments_of
from emlens.hooked.state import evaluating
from emlens.text.tokens import TokenRow

_LENGTHS = (7, 4)


@dataclass(frozen=True, slots=True)
class Said:
    """Rows of tokens, and the model's logits of each, run alone and without padding.

    Attributes:
        rows: The rows.
        logits: Of each, `[pos, vocab]`.
        ran: Paths of the adapted modules that ran: text passes others by, as experts.
    """

    rows: tuple[TokenRow, ...]
    logits: tuple[Float[Tensor, "pos vocab"], ...]
    ran: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Truth:
    """What a model computes without emlens.

    Attributes:
        architecture: Where its parts are, with what a pass has shown of its blocks.
        plain: As it came, whatever adapter acts.
        adapted: Under each adapter, and without any on the same rows.
    """

    architecture: Architecture
    plain: Said
    adapted: Mapping[str, tuple[Said, Said]]


@torch.no_grad()
def truth_of(module: PreTrainedModel, name: str) -> Truth:
    """Run a few short rows through a model, each alone, under each of its adapters.

    Args:
        module: The `...ForCausalLM` module.
        name: What errors call it.

    Raises:
        ValueError: If it cannot run by itself, or has no weights.
    """
    architecture = Architecture.of(module)
    adapters = Adapters(module)
    shown, rows = _Shown(), probe_rows(module)
    try:
        with evaluating(module):
            with shown.watching(module, architecture):
                plain = Said(rows, _alone(module, rows))
            steady = architecture.steady and _is_steady(module, plain)
            adapted = {}
            for adapter in adapters.names:
                parts = {path: p for path, p in adapters.parts() if adapter in available(p)}
                rows = probe_rows(module, _changed_tokens(parts.values(), adapter))
                with adapters.using(None):
                    base = Said(rows, _alone(module, rows))
                with adapters.using(adapter), running(parts) as ran:
                    logits = _alone(module, rows)
                adapted[adapter] = Said(rows, logits, frozenset(ran)), base
    except Exception as error:
        raise ValueError(
            f"{name} cannot run a short text by itself, before emlens changes it "
            f"({in_short(error)}); see that module(input_ids=ids) works"
        ) from error
    return Truth(replace(architecture, steady=steady, **shown.facts()), plain, adapted)


def unbridged(bridge: Any) -> PreTrainedModel | None:
    """A model as it was before a `TransformerBridge` was put over it, on the same weights.

    None where its parts are not found again, as with adapters inside, and where the bridge has
    hooks, which are meant to change what it says.
    """
    module = bridge.original_model
    if any(getattr(point, "fwd_hooks", None) for point in bridge.modules()):
        return None
    try:
        with torch.device("meta"):
            twin = type(module)(copy.deepcopy(module.config))
        for path, part in twin.named_modules():
            theirs: Any = reduce(_inside, path.split(".") if path else [], module)
            for kept in (part._parameters, part._buffers, part.__dict__):
                for name, value in list(kept.items()):
                    if isinstance(value, Tensor):
                        kept[name] = getattr(theirs, name)
    except Exception:
        return None
    return twin.eval()


def _inside(module: Any, name: str) -> Any:
    part = getattr(module, name)
    return getattr(part, "original_component", None) or part


def probe_rows(module: PreTrainedModel, tokens: Sequence[int] = ()) -> tuple[TokenRow, ...]:
    """Two short rows of random tokens, none of which the configuration has a use for."""
    head: Any = module.get_output_embeddings()
    special = set(_special(module.config.to_dict())) if hasattr(module.config, "to_dict") else set()
    plain = [i for i in range(int(head.weight.shape[0])) if i not in special] if special else []
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in _LENGTHS:
        n = len(plain) or int(head.weight.shape[0])
        ids = torch.randint(0, n, (length,), generator=generator).tolist()
        ids = [plain[i] for i in ids] if plain else ids
        ids[: len(tokens)] = tokens[:length]
        nothing = (False,) * length
        rows.append(TokenRow(tuple(ids), nothing, nothing, f"probe of {length} tokens"))
    return tuple(rows)


def input_device(module: nn.Module) -> torch.device:
    """Where inputs go: the device that the embedding runs on."""
    embedding = cast(Any, module).get_input_embeddings()
    if embedding.weight.is_meta:
        # offloaded by accelerate, which brings the weights in for the time of a pass
        return torch.device(embedding._hf_hook.execution_device)
    return embedding.weight.device


@contextmanager
def running(parts: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The paths of the modules that a pass inside of the block has run."""
    ran: set[str] = set()
    with ExitStack() as stack:
        for path, part in parts.items():
            handle = part.register_forward_pre_hook(lambda *_, path=path: ran.add(path))
            stack.callback(handle.remove)
        yield ran


def apart(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> str:
    """How far apart two tensors `[..., pos, n]` are, in words; empty where they are the same.

    In half precision half of a row's positions may differ: rounding may send a token to another
    expert, while an error is one of whole rows.
    """
    if ours.shape != theirs.shape:
        return f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    gaps = (ours.float() - theirs.float().to(ours.device)).abs().amax(-1)
    exact = dtype == torch.float32
    gap = float(gaps.max() if exact else gaps.median(-1).values.max())
    size = max(float(theirs.abs().max()), 1e-6)
    same = gap <= (1e-4 if exact else 5e-2) * size
    return "" if same else f"largest difference {gap:.3g}"


def in_short(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Shown:
    """What blocks and final norm do in a pass, seen by hooks."""

    def __init__(self) -> None:
        self.lengths: set[int] = set()
        self.norm_runs = 0

    def watching(self, module: nn.Module, architecture: Architecture) -> ExitStack:
        stack = ExitStack()
        blocks: Any = module.get_submodule(architecture.blocks)
        for block in blocks:
            stack.callback(block.register_forward_hook(self._block).remove)
        norm = module.get_submodule(architecture.norm)
        stack.callback(norm.register_forward_hook(self._norm).remove)
        return stack

    def facts(self) -> dict[str, Any]:
        return {
            "returns": max(self.lengths, default=0),
            "skips": len(self.lengths) == 1,
            "norm_runs": self.norm_runs // len(_LENGTHS),
        }

    def _block(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.lengths.add(len(output) if isinstance(output, tuple) else 0)

    def _norm(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.norm_runs += 1


def _alone(module: Any, rows: Iterable[TokenRow]) -> tuple[Tensor, ...]:
    device = input_device(module)
    given = {"use_cache": False} if "use_cache" in arguments_of(module) else {}
    ids = (torch.tensor([row.input_ids], device=device) for row in rows)
    return tuple(module(input_ids=one, **given).logits[0].float() for one in ids)


def _is_steady(module: Any, said: Said) -> bool:
    """Whether the logits of a text's beginning are those of the whole."""
    row, whole = said.rows[0], said.logits[0]
    half = len(row.input_ids) // 2
    begun = _alone(module, [replace(row, input_ids=row.input_ids[:half])])[0]
    return not apart(begun, whole[:half], module.dtype)


def _special(config: Any) -> Iterable[int]:
    """Every token that a configuration names, those of images included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            named = value if isinstance(value, list) else [value]
            yield from (one for one in named if isinstance(one, int))


def _changed_tokens(parts: Iterable[Any], name: str) -> list[int]:
    """A few tokens that an adapter has rows of its own for, which a random text may not have."""
    found: list[int] = []
    for part in parts:
        tokens = getattr(part, "token_adapter", part)
        if hasattr(tokens, "token_indices"):
            found += list(tokens.token_indices[name])[:4]
        elif isinstance(getattr(part, "original_module", None), nn.Embedding):
            changed = part.modules_to_save[name].weight != part.original_module.weight
            found += changed.any(1).nonzero()[:4, 0].tolist()
    return found
