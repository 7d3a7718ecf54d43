"""`Directions`: vectors in the residual stream, one per layer at one site, with provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, Self, cast, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emlens._arguments import NOT_NEGATIVE, POSITIVE, is_list, number, shown, whole, wholes
from emlens._door import guard_methods, guarded
from emlens._guesses import no_attribute, word_for
from emlens._kinds import instance, kind, made_with, mapping, some
from emlens._reading import expanded
from emlens.directions.diagnostics import trust_table, trust_text, warnings_of
from emlens.directions.files import read_vectors, write_vectors
from emlens.directions.provenance import Provenance
from emlens.directions.vectors import Evidence, Vectors, cosine, nonzero
from emlens.hooked.sites import SiteName

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@guard_methods
class Directions(Vectors):
    """Immutable `{layer: vector}` at one site, fp32 on the CPU; with one layer, a `Direction`.

    `resid_post` of layer `i` is the output of block `i`, never after the final norm.

    Args:
        vectors: A vector `[d_model]` per layer.
        site: Where in the block.
        provenance: How they were made.
        evidence: What else is known about them; its fields are attributes, e.g.
            `directions.auroc[15]`.

    Raises:
        ValueError: If there are no vectors, a layer is negative, widths differ, or a value is not
            finite.

    Examples:
        >>> import torch
        >>> directions = emlens.Directions({14: torch.ones(576), 15: torch.ones(576)})
        >>> directions.layers
        (14, 15)
        >>> directions[15].vector.shape
        torch.Size([576])
    """

    def __new__(cls, vectors: Mapping[int, Tensor] | None = None, *_: object, **__: object) -> Self:
        if vectors is not None and not isinstance(vectors, Mapping):
            raise TypeError(
                f"directions are made of {{layer: vector}}, not of {shown(vectors)}; make one of a "
                "vector with Direction.of(vector, layer)"
            )
        one = cls is Directions and isinstance(vectors, Mapping) and len(vectors) == 1
        return super().__new__(cast(type[Self], Direction) if one else cls)

    # NumPy would read a direction as the list of its layers
    __array_ufunc__ = None

    def __array__(self, *args: object, **kwargs: object) -> Never:
        raise TypeError(
            f"{self!r} is not an array, but vectors with a site and provenance; take one of "
            ".vectors, e.g. directions.vectors[15].numpy()"
        )

    # -- reading ------------------------------------------------------------------------------

    @overload
    def __getitem__(self, layer: int) -> Direction: ...
    @overload
    def __getitem__(self, layer: slice | Sequence[int]) -> Directions: ...
    def __getitem__(self, layer: int | slice | Sequence[int]) -> Directions:
        """The direction at a layer, or those at several; -1 is the last."""
        if is_list(layer):
            return self.at(cast(Sequence[int], layer))
        if isinstance(layer, slice):
            ends = (self._counted(layer.start), self._counted(layer.stop))
            asked = range(*slice(*ends, layer.step).indices(self.layers[-1] + 1))
            found = [own for own in self.layers if own in asked]
            if not found:
                raise KeyError(f"no direction at layers {ends[0]}:{ends[1]}; {self._there()}")
            return self.at(found)
        one = cast(int, layer)
        return self.at([self.layers[one] if _from_end(one, self) else one])

    def __iter__(self) -> Iterator[int]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, layer: object) -> bool:
        return layer in self._vectors

    def keys(self) -> tuple[int, ...]:
        """The layers."""
        return self.layers

    def values(self) -> list[Direction]:
        """The direction of each layer."""
        return [self[layer] for layer in self]

    def items(self) -> list[tuple[int, Direction]]:
        """Each layer with its direction."""
        return [(layer, self[layer]) for layer in self]

    def stack(self) -> Float[Tensor, "layers d_model"]:
        """The vectors of all layers as one tensor, a copy."""
        return torch.stack(list(self._vectors.values()))

    def numpy(self) -> np.ndarray:
        """The vectors of all layers as one array, `[layers, d_model]`, a copy."""
        return self.stack().numpy()

    # -- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Directions) -> Self:
        return self._combine(other, torch.add, "+")

    def __radd__(self, other: object) -> Self:
        # what `sum` begins with
        if type(other) is not int or other != 0:
            return NotImplemented
        return self

    def __sub__(self, other: Directions) -> Self:
        return self._combine(other, torch.sub, "-")

    def __mul__(self, factor: float) -> Self:
        if isinstance(factor, Directions):
            return NotImplemented
        factor = number("the factor on a direction", factor)
        return self._scaled(factor, f"{factor:g} * ({self.provenance.construction})")

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Self:
        if isinstance(factor, Directions):
            return NotImplemented
        return self * (1.0 / number("the divisor of a direction", factor))

    def __neg__(self) -> Self:
        return self._scaled(-1.0, f"-({self.provenance.construction})")

    def unit(self) -> Self:
        """The same directions with norm 1.

        Raises:
            ValueError: If a vector is zero.
        """
        return self._map(lambda layer, vector: vector / nonzero(vector, layer).norm(), "unit")

    @guarded
    def scaled_to(self, norm: float) -> Self:
        """The same directions with the given norm."""
        return self.unit()._scaled(norm, f"{self.provenance.construction} at norm {norm:g}")

    @guarded
    def orthogonal_to(self, other: Directions) -> Self:
        """The directions without their component along `other`, layer by layer.

        `other` may be at another site: all sites write into one stream.

        Raises:
            KeyError: If `other` lacks a layer.
            ValueError: If widths differ, or a vector of `other` is zero.
        """
        along = self._along(other)
        how = f"orthogonal to {other.provenance.construction}"
        return self._map(lambda layer, vector: (vector.double() - along[layer]).float(), how)

    @guarded
    def along(self, other: Directions) -> Self:
        """The component along `other`, layer by layer; `orthogonal_to` gives the rest."""
        along = self._along(other)
        return self._map(
            lambda layer, _: along[layer].float(), f"along {other.provenance.construction}"
        )

    @guarded
    def cosine(self, other: Directions) -> dict[int, float]:
        """Signed cosine with `other` at every shared layer; for a `Direction`, a number.

        Raises:
            ValueError: If sites or widths differ, or no layer is shared.
        """
        return self._cosines(other)

    def _cosines(self, other: Directions) -> dict[int, float]:
        if self.site != other.site:
            raise ValueError(f"cannot compare {self.site} with {other.site}")
        shared = [layer for layer in self.layers if layer in other]
        if not shared:
            raise ValueError(
                f"the directions have no layer in common: {self.layers} against {other.layers}"
            )
        return {layer: cosine(self._vectors[layer], other._vectors[layer]) for layer in shared}

    def at(self, layers: Iterable[int]) -> Directions:
        """The same directions at some of their layers; a `Direction` if it is one.

        Raises:
            KeyError: If one of the layers does not exist.
        """
        wanted = sorted(set(wholes("layers", layers)))
        for layer in wanted:
            if layer not in self._vectors:
                raise KeyError(f"no direction at layer {layer}; {self._there()}")

        vectors = {layer: self._vectors[layer] for layer in wanted}
        return Directions(vectors, self.site, self.provenance, self.evidence.at(wanted))

    # -- showing and keeping ------------------------------------------------------------------

    def table(self) -> pd.DataFrame:
        """One row per layer; columns without any value are left out.

        Columns: `norm` and its standard error, in units of the residual stream (along this axis,
            from the directions under shuffled labels; without those, from the standard errors of
            coordinates taken as independent); `dose`, the norm as a share of the median residual
            norm;
        `angle error (degrees)`, how far the standard errors turn the direction; the cosine of two
        halves of the data; the cosine with the mean activation; the share of the squared norm that
        lies in its two largest dimensions; the AUROC of the projection on held-out conversations;
        the norm as a multiple of the 95th percentile of those under shuffled labels; and what else
        the construction says of each layer.
        """
        return trust_table(self)

    def warnings(self) -> list[str]:
        """Warnings in words; layers with the same one share a line."""
        return warnings_of(self)

    def describe(self) -> str:
        """A description in words: provenance, table and warnings."""
        made = self.provenance
        where = f"{self.site} (output of block i, before the final norm)"
        head = [
            f"{made.construction}, {len(self)} layer(s), d_model {self.d_model}",
            f"site: {where if self.site == 'resid_post' else self.site}",
            f"model: {made.model or 'unknown'}; tokens: {made.tokens or 'not recorded'}",
        ]
        return "\n".join([*head, trust_text(self), *self.warnings()])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The norm at each layer as a share of the residual norm, over what chance gives.

        Chance is the 95th percentile of the norm under shuffled labels, where that is known. Norms
        are in units of the residual stream where the residual norm is not known.
        """
        from emlens.figures.lines import layer_curves

        dosed = all(layer in self.residual_norms for layer in self.layers)
        sizes = {n: self.residual_norms[n] if dosed else 1.0 for n in self.layers}
        norms = [norm / sizes[layer] for layer, norm in self.norms.items()]
        chance = None
        if all(layer in self.shuffled for layer in self.layers):
            drawn = {n: np.quantile(self.shuffled[n].norm(dim=-1), 0.95) for n in self.layers}
            chance = (np.zeros(len(self)), np.array([drawn[n] / sizes[n] for n in self.layers]))
        return layer_curves(
            {self.provenance.construction: (self.layers, norms)},
            y_label="norm / median residual norm" if dosed else "norm",
            title=self.site,
            null=chance,
            ax=ax,
        )

    def save(self, path: str | Path) -> Path:
        """Write everything that is known as safetensors; atomic.

        Other formats are written by `write_directions`.

        Raises:
            ValueError: If the suffix is not `.safetensors`.
        """
        return write_vectors(self, expanded(path))

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what `save` wrote; `read_directions` reads other formats."""
        found = read_vectors(expanded(path))
        return Directions(found.vectors, found.site, found.provenance, found.evidence)

    def __repr__(self) -> str:
        made = self.provenance.construction
        layers = ", ".join(map(str, self.layers)) if len(self) <= 8 else f"{len(self)} layers"
        return (
            f"{type(self).__name__}({made}, {self.site}, layers {layers}, d_model {self.d_model})"
        )

    def _ipython_key_completions_(self) -> list[int]:
        return list(self.layers)

    def _repr_html_(self) -> str:
        table = self.table().to_html(index=False, float_format="%.3f")
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.warnings())
        return f"<p><b>{escape(repr(self))}</b></p>{table}<ul>{notes}</ul>"

    # -- inside -------------------------------------------------------------------------------

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Never:
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in ("layer", "vector", "norm", "residual_norm"):
                one = f"directions[{self.layers[-1]}].{name}"
                raise AttributeError(f"{said}, as there are {len(self)} layers; take {one}")
            of_tensors = not name.startswith("_") and hasattr(Tensor, name)
            if of_tensors and not word_for(name, dir(type(self))):
                one = "vector" if len(self) == 1 else "stack()"
                raise AttributeError(f"{said}; of the tensor it is .{one}.{name}")
            raise AttributeError(no_attribute(self, name))

    def _there(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        run = len(self) > 3 and self.layers == tuple(range(first, last + 1))
        return f"there are layers {f'{first} to {last}' if run else str(self.layers)[1:-1]}"

    def _counted(self, end: int | None) -> int | None:
        """An end of a range of layers; a negative one counts back from the last."""
        if end is None or end >= 0:
            return end
        return self.layers[end] if -end <= len(self) else 0

    def _along(self, other: Directions) -> dict[int, Float[Tensor, " d_model"]]:
        if other.d_model != self.d_model:
            raise ValueError(f"{self!r} and {other!r} are of different widths")
        found = {}
        for layer, vector in self._vectors.items():
            axis = nonzero(other[layer].vector, layer).double()
            found[layer] = (vector.double() @ axis) / (axis @ axis) * axis
        return found

    def _map(self, change: Callable[[int, Tensor], Tensor], how: str) -> Self:
        vectors = {layer: change(layer, vector) for layer, vector in self._vectors.items()}
        made = self.provenance.derived(f"{self.provenance.construction}, {how}")
        known = Evidence(self.residual_norms, means=self.means)
        return type(self)(vectors, self.site, made, known)

    def _scaled(self, factor: float, construction: str) -> Self:
        vectors = {layer: vector * factor for layer, vector in self._vectors.items()}
        made, known = self.provenance.derived(construction), self.evidence.scaled(factor)
        return type(self)(vectors, self.site, made, known)

    def _combine(self, other: Directions, operation: Callable, sign: str) -> Self:
        if not isinstance(other, Directions):
            return NotImplemented
        if self.site != other.site or self.layers != other.layers or self.d_model != other.d_model:
            raise ValueError(
                f"cannot combine {self!r} with {other!r}: site, layers or width differ"
            )
        mine, theirs = self.provenance.construction, other.provenance.construction
        return type(self)(
            {layer: operation(self._vectors[layer], other._vectors[layer]) for layer in self},
            self.site,
            self.provenance.derived(f"({mine}) {sign} ({theirs})"),
            Evidence(self.residual_norms or other.residual_norms),
        )


@guard_methods
class Direction(Directions):
    """A vector in the residual stream at one site of one layer.

    Raises:
        ValueError: If there is not exactly one layer.

    Examples:
        >>> import torch
        >>> direction = emlens.Direction.of(torch.ones(576), layer=15)
        >>> direction.vector.shape, direction.norm
        (torch.Size([576]), 24.0)
    """

    def __init__(
        self,
        vectors: Mapping[int, Float[Tensor, " d_model"]],
        site: SiteName = "resid_post",
        provenance: Provenance | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__(vectors, site, provenance, evidence)
        if len(self) != 1:
            raise ValueError(f"a Direction has one layer, not {len(self)}; use Directions")

    @classmethod
    def of(
        cls,
        vector: Float[Tensor, " d_model"],
        layer: int,
        site: SiteName = "resid_post",
        construction: str = "given",
        residual_norm: float | None = None,
    ) -> Direction:
        """Make a direction from a vector."""
        layer = whole("layer", layer, NOT_NEGATIVE)
        size = None if residual_norm is None else number("residual_norm", residual_norm, POSITIVE)
        norms = {} if size is None else {layer: size}
        return cls({layer: vector}, site, Provenance(construction), Evidence(norms))

    @guarded
    def cosine(self, other: Directions) -> float:  # type: ignore[override]
        """Signed cosine with `other`, which may have further layers.

        Raises:
            ValueError: If sites or widths differ, or `other` lacks the layer.
        """
        return self._cosines(other)[self.layer]

    def numpy(self) -> np.ndarray:
        """The vector as an array, `[d_model]`, a copy."""
        return self.vector.numpy()

    @property
    def layer(self) -> int:
        return self.layers[0]

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        return self._vectors[self.layer]

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    @property
    def residual_norm(self) -> float | None:
        return self.residual_norms.get(self.layer)


_ADVICE = "make one with Direction.of(vector, layer)"
made_with(Directions, _ADVICE)
made_with(Direction, f"take one, e.g. directions[15], or {_ADVICE}")
kind(Sequence[Directions], words="directions")(partial(some, Directions))


def _from_end(layer: Any, directions: Directions) -> bool:
    return type(layer) is int and -len(directions) <= layer < 0


def by_name(given: Any) -> dict[str, Any]:
    """Directions that came without names, or names of adapters, by what they are called.

    Directions are called after their construction; several of one are numbered.
    """
    items = list(given) if is_list(given) else [given]
    plain = [one if isinstance(one, str) else one.provenance.construction for one in items]
    names = [
        f"{name} {plain[: i + 1].count(name)}" if plain.count(name) > 1 else name
        for i, name in enumerate(plain)
    ]
    return dict(zip(names, items, strict=True))


def _named(item: type, adapters: bool, name: str, value: Any) -> Any:
    """Directions by name; those that are given without are called after their construction."""
    check = partial(_one_of, item, adapters)
    if isinstance(value, Directions) or is_list(value) or (adapters and isinstance(value, str)):
        items = list(value) if is_list(value) else [value]
        value = by_name([check(f"{name}[{i}]", one) for i, one in enumerate(items)])
    return mapping(None, check, name, value)


def _one_of(item: type, adapters: bool, name: str, value: Any) -> Any:
    if adapters and isinstance(value, str):
        return value
    return instance(item, _ADVICES[item], name, value)


_ADVICES = {Directions: _ADVICE, Direction: f"take one, e.g. directions[15], or {_ADVICE}"}
kind(Mapping[str, Direction], words="directions by name")(partial(_named, Direction, False))
kind(Mapping[str, Directions], words="directions by name")(partial(_named, Directions, False))
kind(Mapping[str, Directions | str], words="directions or adapters by name")(
    partial(_named, Directions, True)
)
