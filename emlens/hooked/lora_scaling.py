"""Adapters at another strength, and adapters or weights under noise; restored exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emlens._arguments import NOT_NEGATIVE, number, whole
from emlens._door import check_fields, guarded
from emlens.hooked.adapters import Adapters, available
from emlens.hooked.identity import base_weights
from emlens.hooked.model import HookedModel


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to one module: `scale * B A`.

    Attributes:
        layer: PEFT's layer.
        a: `A`, live, `[r, d_in]`.
        b: `B`, live, `[d_out, r]`.
        scale: `alpha / r`, or `alpha / sqrt(r)` (rsLoRA).
    """

    layer: Any
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    scale: float

    @property
    def norm(self) -> float:
        """`||scale * B A||_F`."""
        return max(self.product(self), 0.0) ** 0.5

    def product(self, other: Factors) -> float:
        """Inner product of two `scale * B A`, from `[r, r]` matrices: neither is ever formed."""
        (a, b), (c, d) = ((x.a.detach().double(), x.b.detach().double()) for x in (self, other))
        return self.scale * other.scale * float(((b.T @ d) * (a @ c.T)).sum())


@guarded
def adapter_norms(model: HookedModel, name: str) -> dict[str, float]:
    """Return `||scale * B A||_F` of every module that an adapter changes, by its path.

    The norm of the whole adapter is the root of the sum of their squares.

    Args:
        model: A model with adapters.
        name: The adapter.

    Raises:
        ValueError: If there is no such adapter, it is not plain LoRA, has weights that are not
            finite, or changes nothing.
    """
    return {path: factors.norm for path, factors in adapter_factors(model, name).items()}


@dataclass(frozen=True)
class Scaled:
    """An adapter at another strength; usable wherever an adapter's name is.

    A factor of 1 is exactly the adapter; 0 is the base. Factors by layer scale some layers alone,
    as the papers do to groups of rank-1 adapters (arXiv 2506.11618, section 4).

    Attributes:
        adapter: The adapter.
        factor: Multiplies its scale; or factors by layer, with the other layers unchanged.

    Raises:
        ValueError: If a factor is not finite; on use, if there is no such adapter, it is not plain
            LoRA, or it adapts nothing at a layer.

    Examples:
        >>> emlens.log_odds(model, pairs, {"base": None, "half": Scaled("medical", 0.5)})
        >>> with model.under(Scaled("medical", {21: 30.0, 23: 30.0})):
        ...     model.generate([conversation])
    """

    adapter: str
    factor: float | Mapping[int, float] = 1.0

    def __post_init__(self) -> None:
        by_layer = isinstance(self.factor, Mapping)
        factors = self.factor if isinstance(self.factor, Mapping) else {None: self.factor}
        checked = {
            layer if layer is None else whole("layer", layer): number(
                f"the factor on adapter {self.adapter!r}{f' at layer {layer}' * by_layer}", factor
            )
            for layer, factor in factors.items()
        }
        object.__setattr__(self, "factor", checked if by_layer else checked[None])

    def __hash__(self) -> int:
        given = self.factor
        factors = frozenset(given.items()) if isinstance(given, Mapping) else given
        return hash((self.adapter, factors))

    def __str__(self) -> str:
        factors = self.factor
        if isinstance(factors, Mapping):
            shown = ", ".join(f"layer {layer} times {f:g}" for layer, f in factors.items())
            return f"{self.adapter} ({shown})"
        return f"{self.adapter} times {factors:g}"

    @contextmanager
    def altering(self, model: HookedModel) -> Iterator[None]:
        parts = adapter_factors(model, self.adapter)
        scales = {path: part.scale for path, part in parts.items()}
        try:
            for path, factor in self._factors(model, parts).items():
                parts[path].layer.scaling[self.adapter] = scales[path] * factor
            yield
        finally:
            for path, scale in scales.items():
                parts[path].layer.scaling[self.adapter] = scale

    def _factors(self, model: HookedModel, paths: Iterable[str]) -> dict[str, float]:
        """The factor on each module."""
        if not isinstance(self.factor, Mapping):
            return dict.fromkeys(paths, self.factor)
        layers = {path: model.architecture.layer_of(path) for path in paths}
        adapted = sorted({layer for layer in layers.values() if layer is not None})
        missing = sorted(set(self.factor) - set(adapted))
        if missing:
            known = ", ".join(map(str, adapted))
            raise ValueError(
                f"adapter {self.adapter!r} adapts nothing at layer {missing[0]}; it has {known}"
            )
        return {p: self.factor[n] for p, n in layers.items() if n is not None and n in self.factor}


@dataclass(frozen=True)
class Noisy:
    """An adapter under noise, which keeps the norms of `A` and `B`.

    Of each module, `A` becomes `sqrt(1 - eps^2) A + eps Y`, with `Y` random, orthogonal to `A` and
    of the same Frobenius norm; likewise for `B`. With `added`, `A` becomes `A + eps Y`. The noise
    depends only on the seed, the module's path and the shape, so two adapters of the same shape get
    the same noise.

    Attributes:
        adapter: The adapter.
        epsilon: Noise level, 0 to 1.
        seed: Seed of the noise.
        added: Add the noise without shrinking `A` and `B`.

    Raises:
        ValueError: If epsilon is out of range; on use, if there is no such adapter, or it is not
            plain LoRA.
    """

    adapter: str
    epsilon: float
    seed: int = 0
    added: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        more = " added" if self.added else ""
        return f"{self.adapter} (noise {self.epsilon:g}{more}, seed {self.seed})"

    def angle(self, model: HookedModel) -> float:
        """Angle between the adapter under noise and the adapter, in degrees.

        It is that of `scale * B A` of all modules together, in the space of their weights.
        """
        before = {
            path: replace(one, a=one.a.detach().clone(), b=one.b.detach().clone())
            for path, one in adapter_factors(model, self.adapter).items()
        }
        with self.altering(model):
            after = adapter_factors(model, self.adapter)
            pairs = [(before[path], after[path]) for path in before]
            dot, own, other = (
                sum(a.product(b) for a, b in chosen)
                for chosen in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
            )
        cosine = dot / (own * other) ** 0.5
        return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))

    @contextmanager
    def altering(self, model: HookedModel) -> Iterator[None]:
        weights = {
            f"{path} {part}": weight
            for path, factors in adapter_factors(model, self.adapter).items()
            for part, weight in (("A", factors.a), ("B", factors.b))
        }
        with put_back(weights.values()):
            with torch.no_grad():
                for place, weight in weights.items():
                    flat = weight.detach().double().cpu().flatten()
                    generator = torch.Generator().manual_seed(_seed_of(self.seed, place))
                    noise = torch.randn(len(flat), generator=generator, dtype=torch.float64)
                    moved = turned(flat, noise, self.epsilon, added=self.added)
                    weight.copy_(moved.reshape(weight.shape))
            yield


@contextmanager
@guarded(epsilon=NOT_NEGATIVE)
def noisy_weights(model: HookedModel, epsilon: float, seed: int = 0) -> Iterator[HookedModel]:
    """Add Gaussian noise to the weight matrices of all blocks, inside the block.

    Each matrix `W` becomes `W + eps * ||W||_F * Z`, with `Z` Gaussian of norm 1. Adapters, biases,
    norms, the embedding and the LM head do not change. The noise is drawn on the device of the
    weights and by their paths, so other kinds of devices or engines give other draws.

    The originals are kept on the CPU meanwhile, which takes as much main memory as the blocks, and
    transfers from and to a GPU.

    Args:
        model: The model.
        epsilon: Norm of the noise as a share of the norm of each matrix.
        seed: Seed of the noise.

    Raises:
        ValueError: If epsilon is negative or not finite, or weights are quantised or offloaded.
    """
    matrices = block_matrices(model)
    with put_back(matrices.values()):
        with torch.no_grad():
            for path, weight in matrices.items():
                generator = torch.Generator(device=weight.device)
                generator.manual_seed(_seed_of(seed, path))
                noise = torch.randn(
                    weight.shape, generator=generator, device=weight.device, dtype=torch.float32
                )
                size = weight.float().norm() / noise.norm()
                weight.copy_(weight.float() + epsilon * size * noise)
        yield model


def turned(
    x: Float[Tensor, " n"], noise: Float[Tensor, " n"], epsilon: float, *, added: bool = False
) -> Float[Tensor, " n"]:
    """Return `sqrt(1 - eps^2) x + eps y`, `y` the noise orthogonal to `x` and of its norm.

    With `added` it is `x + eps y`. Zero stays zero.

    Raises:
        ValueError: If the noise has no part that is orthogonal to `x`.
    """
    if not bool(x.any()):
        return x
    noise = noise - (noise @ x) / (x @ x) * x
    if not float(noise.norm()) > 0:
        raise ValueError(f"there is no noise orthogonal to a vector of {len(x)} dimension(s)")
    noise = noise / noise.norm() * x.norm()
    return (1.0 if added else (1 - epsilon**2) ** 0.5) * x + epsilon * noise


def adapter_factors(model: HookedModel, name: str) -> dict[str, Factors]:
    """The factors of an adapter by the path of each module.

    Raises:
        ValueError: If there is no such adapter, it is not plain LoRA, has weights that are not
            finite, or changes nothing.
    """
    from emlens.hooked.attach import check_weights

    layers = model.lora_layers(name)
    _check_plain(model.module, name, layers)
    found = {
        path: Factors(
            layer, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        )
        for path, layer in layers.items()
    }
    check_weights({path: {"A": f.a, "B": f.b} for path, f in found.items()}, name)
    return found


def block_matrices(model: HookedModel) -> dict[str, Tensor]:
    """The weight matrices of all blocks by their path, adapters left out.

    Raises:
        ValueError: If one is quantised, or offloaded by accelerate.
    """
    blocks = model.module.get_submodule(model.architecture.blocks)
    base = {id(weight) for _, weight in base_weights(model.module)}
    matrices: dict[str, Tensor] = {
        # the same path whether or not there is an adapter beside the matrix
        path.replace(".base_layer", "").replace(".original_module", ""): weight
        for path, weight in blocks.named_parameters()
        if weight.ndim >= 2 and id(weight) in base
    }
    for path, weight in matrices.items():
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
            what = "offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
            raise ValueError(
                f"the weight {path} of {model.name} is {what}, so no noise can be added to it; "
                "load the model in bfloat16 or float32 on its device"
            )
    return matrices


@contextmanager
def put_back(weights: Iterable[Tensor]) -> Iterator[None]:
    """Give weights their values back, bit by bit; the values are kept on the CPU meanwhile."""
    kept = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


def _seed_of(seed: int, place: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:8]) >> 1


def _check_plain(module: nn.Module, name: str, layers: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than `scale * B A` at linear modules."""
    for path, part in Adapters(module).parts():
        if hasattr(part, "original_module") and name in available(part):
            raise ValueError(
                f"adapter {name!r} replaces {path} or rows of it (modules_to_save or "
                "trainable_token_indices), which has no scale; its strength and its noise cannot "
                "be set"
            )
    for path, layer in layers.items():
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer, "use_dora", {}).get(name):
            raise ValueError(
                f"adapter {name!r} is not plain LoRA at {path} ({type(variant).__name__}): it does "
                "more than add scale * B A, so its strength cannot be set by the scale"
            )
        if getattr(layer, "lora_bias", {}).get(name):
            raise ValueError(
                f"adapter {name!r} has a bias at {path}, so it is more than scale * B A"
            )
        if name not in layer.lora_A or type(layer).__name__ == "ParamWrapper":
            raise ValueError(
                f"adapter {name!r} adapts {path}, which is not a linear module (an embedding, or "
                "the stacked weights of experts); only linear ones have one norm of scale * B A"
            )
        if layer.lora_A[name].weight.ndim != 2:
            raise ValueError(f"adapter {name!r} adapts {path}, which is not a linear module")
