"""Solutions as conditions: their norms, other strengths, and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, cast

import torch

from emlens._door import guarded
from emlens.directions import Direction, Directions, Evidence
from emlens.directions.fits import check_fits
from emlens.edits import Add
from emlens.edits.edits import edit_from_dict
from emlens.hooked import Condition, Edit, HookedModel, Noisy, Scaled, adapter_norms
from emlens.hooked.condition import BASE, Acting, ConditionLike, condition_of
from emlens.hooked.lora_scaling import turned

Kind = Literal["vector", "adapter"]

Axes = Sequence[Directions] | Directions
"""Directions that span, at each layer, the subspace that noise is drawn from."""

D = TypeVar("D", bound=Directions)


def read_solutions(
    model: HookedModel, given: Mapping[str, Directions | str]
) -> dict[str, Condition]:
    """Check the solutions to compare, and return each as a condition.

    Args:
        model: The model that they belong to.
        given: `{name: directions}` or `{name: name of an adapter}`.

    Raises:
        ValueError: If there is nothing to compare, a direction is zero, of another width or at a
            layer that does not exist, an adapter does not exist, changes nothing or is no plain
            LoRA, or adapters are compared inside of a block in which one is in force.
        TypeError: If something is neither directions nor a name.
    """
    if not given:
        raise ValueError("no directions were given; pass {name: direction or name of an adapter}")
    if BASE in given:
        raise ValueError(f"{BASE!r} is the model without any solution; choose another name")
    found: dict[str, Condition] = {}
    for name, value in given.items():
        if isinstance(value, str):
            try:
                found[name] = condition_of(model, value)
            except ValueError as error:
                raise ValueError(f"directions[{str(name)!r}]: {error}") from None
            norm_of(model, found[name])
            continue
        if not isinstance(value, Directions):
            raise TypeError(
                f"{name!r} is a {type(value).__name__}; give a Direction, Directions, or the name "
                "of an adapter on the model"
            )
        check_fits(model, value, f"direction {name!r}")
        if _norm(value) == 0:
            raise ValueError(f"direction {name!r} is zero: there is nothing to measure")
        found[name] = condition_of(model, Add(value))
    acting = model.enclosing_adapters
    if acting and any(kind_of(one) == "adapter" for one in found.values()):
        named = "+".join(map(str, acting))
        raise ValueError(
            f"adapter {named!r} is in force, so there is no base to compare adapters with; put "
            "the call into `with model.adapter(None):`"
        )
    return found


def acting_of(model: HookedModel, solutions: Mapping[str, Condition]) -> dict[str, str]:
    """What acts under each solution and without any, in words."""
    named = {BASE: condition_of(model, []), **solutions}
    return {name: condition.described(model) for name, condition in named.items()}


def kind_of(solution: Condition) -> Kind:
    """Whether a solution is made of vectors or is an adapter."""
    return "vector" if solution.edits else "adapter"


def directions_of(solution: Condition) -> Directions:
    """The vectors of a solution."""
    return cast(Add, solution.edits[0]).direction


def construction_of(solution: Condition) -> str:
    """How a solution was made."""
    if kind_of(solution) == "adapter":
        return f"adapter {solution.names[0]}"
    return directions_of(solution).provenance.construction


def norm_of(model: HookedModel, solution: Condition) -> float:
    """Norm of what vectors add, or `||scale * B A||_F` of an adapter.

    Over several layers or modules it is the root of the sum of squares.
    """
    if kind_of(solution) == "adapter":
        return math.hypot(*adapter_norms(model, solution.names[0]).values())
    return _norm(directions_of(solution))


def times(solution: Condition, factor: float) -> Condition:
    """A solution scaled by a factor: its vectors, or its adapters if it has none."""
    if kind_of(solution) == "adapter":
        return Condition(tuple(_scaled(one, factor) for one in solution.adapters or ()))
    return Condition(solution.adapters, tuple(_stronger(one, factor) for one in solution.edits))


def without(solution: Condition) -> Condition:
    """A solution at strength zero."""
    return Condition(solution.adapters if solution.edits else None)


def scalable(model: HookedModel, given: ConditionLike) -> Condition:
    """The condition that was given, if it can be scaled: vectors that are added, or adapters.

    Raises:
        ValueError: If it is the base, an adapter does not exist, is not plain LoRA or is changed
            in another way than by one factor, or an edit is not `Add`.
    """
    found = condition_of(model, given)
    others = [one for one in found.edits if not isinstance(one, Add)]
    if others:
        raise ValueError(f"{others[0]!r} has no strength; give vectors that are added (Add)")
    if not found.edits and not found.adapters:
        raise ValueError("the base has no strength; give an adapter, or vectors that are added")
    for one in found.adapters or ():
        if not isinstance(one, str) and not _by_one_factor(one):
            raise ValueError(f"{one} is changed by more than one factor; give its name alone")
    for name in () if found.edits else found.names:
        adapter_norms(model, name)
    return found


def record_of(solution: Condition) -> dict:
    """A JSON-ready record of a condition that can be scaled; `condition_from` reads it."""
    adapters = dict.fromkeys(solution.names, 1.0)
    scaled = [one for one in solution.adapters or () if isinstance(one, Scaled)]
    adapters |= {one.adapter: cast(float, one.factor) for one in scaled}
    return {"adapters": adapters, "edits": [cast(Add, one).to_dict() for one in solution.edits]}


def condition_from(record: Mapping) -> Condition:
    """The condition that `record_of` wrote."""
    adapters = tuple(n if f == 1 else Scaled(n, f) for n, f in record["adapters"].items())
    return Condition(adapters, tuple(cast(Add, edit_from_dict(one)) for one in record["edits"]))


def _by_one_factor(adapter: Acting) -> bool:
    return isinstance(adapter, Scaled) and not isinstance(adapter.factor, Mapping)


def _scaled(adapter: Acting, factor: float) -> Scaled:
    if isinstance(adapter, Scaled):
        return Scaled(adapter.adapter, cast(float, adapter.factor) * factor)
    return Scaled(cast(str, adapter), factor)


def _stronger(edit: Edit, factor: float) -> Add:
    added = cast(Add, edit)
    if added.dose is not None:
        return replace(added, dose=added.dose * factor)
    return replace(added, direction=added.direction * factor)


def at_norm(solution: Condition, norm: float, own: float) -> Condition:
    """A solution scaled from its own norm to another."""
    if kind_of(solution) == "vector":
        directions = directions_of(solution)
        if isinstance(directions, Direction):
            return _adding(solution, directions.scaled_to(norm))
    return times(solution, norm / own)


def noisy(
    solution: Condition, epsilon: float, seed: int, along: Axes | None = None, added: bool = False
) -> Condition:
    """A solution under noise that keeps its norm, or is added to it.

    Raises:
        ValueError: If noise along given directions is requested for an adapter.
    """
    if kind_of(solution) == "vector":
        return _adding(solution, perturbed(directions_of(solution), epsilon, seed, along, added))
    (name,) = solution.names
    if along is not None:
        raise ValueError(
            f"{name!r} is an adapter, and noise along given directions is for vectors; "
            'adapters take noise="random"'
        )
    return Condition((Noisy(name, epsilon, seed, added),))


def shrunk(solution: Condition, epsilon: float) -> Condition:
    """A solution shrunk as by norm-preserving noise, without the noise."""
    kept = (1 - epsilon**2) ** 0.5
    # in an adapter both A and B shrink
    return times(solution, kept**2 if kind_of(solution) == "adapter" else kept)


def angle_under_noise(model: HookedModel, solution: Condition, noise: Condition) -> float:
    """Angle between a solution and itself under noise, in degrees.

    For vectors it is measured in the residual stream over all layers, for adapters in the weights.
    """
    for one in noise.adapters or ():
        if isinstance(one, Noisy):
            return one.angle(model)
    x, y = (
        torch.cat([vector.double() for vector in directions_of(one).vectors.values()])
        for one in (solution, noise)
    )
    cosine = float(x @ y / (x.norm() * y.norm()))
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _adding(solution: Condition, directions: Directions) -> Condition:
    return Condition(solution.adapters, (Add(directions),))


def _norm(directions: Directions) -> float:
    return math.hypot(*directions.norms.values())


@guarded
def perturbed(
    direction: D, epsilon: float, seed: int, along: Axes | None = None, added: bool = False
) -> D:
    """Return `sqrt(1 - eps^2) x + eps y` with `y` random, orthogonal to `x`, of equal norm.

    Each of several layers keeps its norm.

    Args:
        direction: `x`.
        epsilon: Noise level, 0 to 1.
        seed: Seed of `y`.
        along: Directions to whose span `y` belongs, e.g. the principal ones of the Fisher
            profile; all directions of the residual stream by default. If the span has a
            single axis besides `x`, seeds differ in its sign alone.
        added: Return `x + eps y`, which does not shrink `x`.

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
        vectors[layer] = turned(x, noise, epsilon, added=added)
    return type(direction)(
        vectors,
        direction.site,
        direction.provenance.derived(
            f"{direction.provenance.construction}, noise {epsilon:g}{' added' * added}, seed {seed}"
        ),
        Evidence(direction.residual_norms),
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
    # an axis equal to `x` leaves only rounding errors, which are no direction (axes are fp32)
    basis = left[:, sizes > 1e-5]
    if not basis.shape[1]:
        raise ValueError(
            f"the directions to draw noise from at layer {layer} span nothing besides "
            "the direction itself; give others, or noise='random'"
        )
    return basis
