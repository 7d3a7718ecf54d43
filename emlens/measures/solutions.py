"""Solutions: vectors or adapters, at any strength and under noise, scored in one way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from emlens._distributed import leads
from emlens.directions import Direction, Directions
from emlens.edits import Add
from emlens.hooked import Edit, HookedModel, check_layers
from emlens.hooked.altered import adapter_norms, noisy_adapter, scaled_adapter, turned
from emlens.measures.scoring import row_losses
from emlens.text import TokenBatch, TokenMask

Kind = Literal["vector", "adapter"]

Variant = Sequence[Edit] | Callable[[], AbstractContextManager]
"""A solution at some strength: edits, or what makes the context in which an adapter acts."""

Axes = Sequence[Directions] | Directions
"""Directions that span, at each layer, the subspace that noise is drawn from."""

BASE = "base"

D = TypeVar("D", bound=Directions)


@dataclass(frozen=True)
class VectorSolution:
    """Vectors that are added to the residual stream, at one layer or several.

    Attributes:
        name: What it is called.
        directions: The vectors.
    """

    name: str
    directions: Directions
    kind: Kind = "vector"

    @property
    def construction(self) -> str:
        return self.directions.provenance.construction

    @property
    def norm(self) -> float:
        """Norm of what is added; over several layers the root of the sum of squares."""
        if isinstance(self.directions, Direction):
            return self.directions.norm
        return math.hypot(*self.directions.norms.values())

    @property
    def dimension(self) -> int:
        return self.directions.d_model

    def as_it_is(self) -> Variant:
        return [Add(self.directions)]

    def at_norm(self, norm: float) -> Variant:
        if isinstance(self.directions, Direction):
            return [Add(self.directions.scaled_to(norm))]
        return self.times(norm / self.norm)

    def times(self, factor: float) -> Variant:
        return [Add(self.directions * factor)]

    def noisy(self, epsilon: float, seed: int, along: Axes | None = None) -> Variant:
        return [Add(perturbed(self.directions, epsilon, seed, along))]


@dataclass(frozen=True)
class AdapterSolution:
    """A LoRA adapter of the model.

    Attributes:
        name: What it is called.
        model: The model that has it.
        adapter: Its name there.
        norm: `||scale * B A||_F`, over several modules the root of the sum of squares.
    """

    name: str
    model: HookedModel
    adapter: str
    norm: float
    kind: Kind = "adapter"

    @property
    def construction(self) -> str:
        return f"adapter {self.adapter}"

    def as_it_is(self) -> Variant:
        return partial(self.model.adapter, self.adapter)

    def at_norm(self, norm: float) -> Variant:
        return self.times(norm / self.norm)

    def times(self, factor: float) -> Variant:
        return partial(scaled_adapter, self.model, self.adapter, factor)

    def noisy(self, epsilon: float, seed: int, along: Axes | None = None) -> Variant:
        if along is not None:
            raise ValueError(
                f"{self.name!r} is an adapter, and noise along given directions is for vectors; "
                'adapters take noise="random"'
            )
        return partial(noisy_adapter, self.model, self.adapter, epsilon, seed)


Solution = VectorSolution | AdapterSolution


def read_solutions(
    model: HookedModel, given: Mapping[str, Directions | str]
) -> dict[str, Solution]:
    """Check what is to be compared, and say of each what it is.

    Args:
        model: The model that they belong to.
        given: `{name: directions}` or `{name: name of an adapter}`.

    Raises:
        ValueError: If there is nothing to compare, a direction is zero, of another width or at a
            layer that there is not, an adapter does not exist, changes nothing or is no plain
            LoRA, or adapters are to be compared while one is in force.
        TypeError: If something is neither directions nor a name.
    """
    if not given:
        raise ValueError("no directions were given; pass {name: direction or name of an adapter}")
    if BASE in given:
        raise ValueError(f"{BASE!r} is the model without any solution; choose another name")
    found: dict[str, Solution] = {}
    for name, value in given.items():
        if isinstance(value, str):
            found[name] = AdapterSolution(
                name, model, value, math.hypot(*adapter_norms(model, value).values())
            )
            continue
        if not isinstance(value, Directions):
            raise TypeError(
                f"{name!r} is a {type(value).__name__}; give a Direction, Directions, or the name "
                "of an adapter on the model"
            )
        found[name] = _vectors(model, name, value)
    acting = model.active_adapter
    if acting is not None and any(one.kind == "adapter" for one in found.values()):
        raise ValueError(
            f"adapter {acting!r} is in force, so there is no base to compare adapters with; put "
            "the call into `with model.adapter(None):`"
        )
    return found


def _vectors(model: HookedModel, name: str, directions: Directions) -> VectorSolution:
    if directions.d_model != model.d_model:
        raise ValueError(
            f"direction {name!r} has width {directions.d_model}, but {model.name} has d_model "
            f"{model.d_model}: it comes from another model"
        )
    check_layers(directions.layers, model.n_layers)
    made = VectorSolution(name, directions)
    if made.norm == 0:
        raise ValueError(f"direction {name!r} is zero: there is nothing to measure")
    return made


def variant_losses(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    variants: Mapping[str, Variant],
    *,
    tokens: TokenMask = "response",
    progress: bool = False,
    description: str = "losses",
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return summed loss in nats per row under `"base"` and each variant, and counted tokens.

    All edits share one prefix; adapters run one after the other.

    Raises:
        ValueError: If a row has no counted token, or a loss is not finite (row named).
    """
    edits = {name: variant for name, variant in variants.items() if not callable(variant)}
    altered = {name: variant for name, variant in variants.items() if callable(variant)}
    sums, counts = row_losses(
        model,
        batches,
        {BASE: [], **edits},
        tokens=tokens,
        progress=progress,
        description=description,
    )
    hidden = not (progress and altered and leads())
    for name, acting in tqdm(altered.items(), desc=f"{description} of adapters", disable=hidden):
        with acting():
            found, _ = row_losses(
                model, batches, {name: []}, tokens=tokens, description=description
            )
        sums |= found
    return sums, counts


def perturbed(direction: D, epsilon: float, seed: int, along: Axes | None = None) -> D:
    """Return `sqrt(1 - eps^2) x + eps y` with `y` random, orthogonal to `x`, of equal norm.

    Of several layers each keeps its norm.

    Args:
        direction: `x`.
        epsilon: Noise level, 0 to 1.
        seed: Seed of `y`.
        along: Directions to whose span `y` belongs, e.g. the principal ones of the Fisher
            profile; all directions of the residual stream by default. Where the span leaves a
            single axis beside `x`, seeds differ in its sign alone.

    Raises:
        ValueError: If `along` has no axis at a layer, or none beside `x` itself.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for layer in direction.layers:
        x = direction.vectors[layer].double()
        if along is None:
            noise = torch.randn(len(x), generator=generator, dtype=torch.float64)
        else:
            basis = _beside(x, along, direction.site, layer)
            weights = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
            noise = basis @ weights
        vectors[layer] = turned(x, noise, epsilon)
    return type(direction)(
        vectors,
        direction.site,
        direction.provenance.derived(
            f"{direction.provenance.construction}, noise {epsilon:g}, seed {seed}"
        ),
        residual_norms=direction.residual_norms,
    )


def _beside(x: torch.Tensor, along: Axes, site: str, layer: int) -> torch.Tensor:
    """Orthonormal basis `[d_model, k]` of what the axes span orthogonal to `x`."""
    given = [along] if isinstance(along, Directions) else list(along)
    axes = [one.vectors[layer].double() for one in given if one.site == site and layer in one]
    if not axes:
        raise ValueError(f"none of the directions to draw noise from is at {site} of layer {layer}")
    if len(axes[0]) != len(x):
        raise ValueError(f"noise along directions of width {len(axes[0])} for one of {len(x)}")
    stacked = torch.stack([axis / axis.norm().clamp(min=1e-30) for axis in axes], dim=1)
    unit = x / x.norm().clamp(min=1e-30)
    rest = stacked - unit[:, None] * (unit @ stacked)
    left, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    # what rounding leaves of an axis that is `x` itself is no direction; axes are kept in fp32
    basis = left[:, sizes > 1e-5]
    if not basis.shape[1]:
        raise ValueError(
            f"the directions to draw noise from at layer {layer} span nothing beside the "
            "direction itself; give others, or noise='random'"
        )
    return basis
