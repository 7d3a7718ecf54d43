"""`Directions`: vectors in the residual stream, one per layer at one site, with provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Never, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._arguments import NOT_NEGATIVE, POSITIVE, number, whole, wholes
from emlens._door import guard_methods, guarded
from emlens._reading import expanded
from emlens.directions.provenance import Provenance
from emlens.directions.vectors import checked_evidence, checked_vectors, cosine, nonzero
from emlens.hooked import Site, SiteName, check_site

if TYPE_CHECKING:
    import pandas as pd


@guard_methods
class Directions:
    """Immutable `{layer: vector}` at one site, fp32 on the CPU.

    `resid_post` of layer `i` is the output of block `i`, never after the final norm.

    Args:
        vectors: A vector `[d_model]` per layer.
        site: Where in the block.
        provenance: How they were made.
        residual_norms: Median norm of the residual at each layer; what a dose is a share of.
        standard_errors: Standard error of each coordinate, `[d_model]` per layer.
        split_half: Cosine between the directions of two random halves of the data, averaged over
            several splits, per layer.
        means: Mean activation of the data, `[d_model]` per layer.
        shuffled: The same construction with shuffled labels, `[draws, d_model]` per layer: how
            large a direction, and which, chance alone gives on this data.
        auroc: Area under the ROC curve of the projection on held-out conversations, per layer.
        measured: What else the construction says of each layer, by the name of its column in
            `table`.

    Raises:
        ValueError: If there are no vectors, a layer is negative, widths differ, or a value is not
            finite.
    """

    def __init__(
        self,
        vectors: Mapping[int, Float[Tensor, " d_model"]],
        site: SiteName,
        provenance: Provenance,
        *,
        residual_norms: Mapping[int, float] | None = None,
        standard_errors: Mapping[int, Float[Tensor, " d_model"]] | None = None,
        split_half: Mapping[int, float] | None = None,
        means: Mapping[int, Float[Tensor, " d_model"]] | None = None,
        shuffled: Mapping[int, Float[Tensor, "draws d_model"]] | None = None,
        auroc: Mapping[int, float] | None = None,
        measured: Mapping[str, Mapping[int, float]] | None = None,
    ) -> None:
        self._vectors = checked_vectors(vectors)
        self.site: Site = check_site(site, layers=self._vectors)
        self.provenance = provenance
        self.residual_norms = MappingProxyType(dict(residual_norms or {}))
        self.standard_errors = checked_evidence(standard_errors, self._vectors, "standard errors")
        self.split_half = MappingProxyType(dict(split_half or {}))
        self.means = checked_evidence(means, self._vectors, "means")
        self.shuffled = checked_evidence(shuffled, self._vectors, "shuffled draws", ndim=2)
        self.auroc = MappingProxyType(dict(auroc or {}))
        self.measured = MappingProxyType({k: dict(v) for k, v in (measured or {}).items()})

    # NumPy would read a direction as the list of its layers
    __array_ufunc__ = None

    def __array__(self, *args: object, **kwargs: object) -> Never:
        raise TypeError(
            f"{self!r} is no array, but vectors with a site and provenance; take one of "
            ".vectors, e.g. directions.vectors[15].numpy()"
        )

    # -- reading ------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._vectors)

    @property
    def d_model(self) -> int:
        return len(next(iter(self._vectors.values())))

    @property
    def vectors(self) -> Mapping[int, Float[Tensor, " d_model"]]:
        return MappingProxyType(self._vectors)

    @property
    def norms(self) -> dict[int, float]:
        """Norm of each vector, in units of the residual stream."""
        return {layer: float(vector.norm()) for layer, vector in self._vectors.items()}

    @property
    def doses(self) -> dict[int, float]:
        """Norm of each vector as a share of the median residual norm, where that is known."""
        norms = self.norms
        return {layer: norms[layer] / size for layer, size in self.residual_norms.items()}

    def __getitem__(self, layer: int) -> Direction:
        return cast(Direction, self.at([layer]))

    def __iter__(self) -> Iterator[int]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, layer: object) -> bool:
        return layer in self._vectors

    # -- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Directions) -> Self:
        return self._combine(other, torch.add, "+")

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
        """What is left when the component along `other` is taken out, layer by layer.

        `other` may be of another site: all sites write into one stream.

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
        """Signed cosine with `other` at every layer that both have.

        Raises:
            ValueError: If sites or widths differ, or no layer is shared.
        """
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
            KeyError: If one of the layers is not there.
        """
        wanted = sorted(set(wholes("layers", layers)))
        for layer in wanted:
            if layer not in self._vectors:
                have = ", ".join(map(str, self.layers))
                raise KeyError(f"no direction at layer {layer}; there are layers {have}")

        def keep(items: Mapping) -> dict:
            return {layer: items[layer] for layer in wanted if layer in items}

        kind = Direction if len(wanted) == 1 else Directions
        return kind(
            keep(self._vectors),
            self.site,
            self.provenance,
            residual_norms=keep(self.residual_norms),
            standard_errors=keep(self.standard_errors),
            split_half=keep(self.split_half),
            means=keep(self.means),
            shuffled=keep(self.shuffled),
            auroc=keep(self.auroc),
            measured={name: keep(values) for name, values in self.measured.items()},
        )

    # -- showing and keeping ------------------------------------------------------------------

    def table(self) -> pd.DataFrame:
        """One row per layer: size, errors, and how far it can be trusted; see `trust_table`."""
        from emlens.directions.diagnostics import trust_table

        return trust_table(self)

    def describe(self) -> str:
        """What these directions are, a table, and what should not be overlooked, in words."""
        from emlens.directions.diagnostics import trust_text, warnings_of

        made = self.provenance
        where = f"{self.site} (output of block i, before the final norm)"
        head = [
            f"{made.construction}, {len(self)} layer(s), d_model {self.d_model}",
            f"site: {where if self.site == 'resid_post' else self.site}",
            f"model: {made.model or 'unknown'}; tokens: {made.tokens or 'not recorded'}",
        ]
        return "\n".join([*head, trust_text(self), *warnings_of(self)])

    def save(self, path: str | Path) -> Path:
        """Write the format that the suffix names, safetensors by default; atomic.

        Only safetensors holds all that is known; see `write_directions`.

        Raises:
            ValueError: If the suffix names no format, or one that cannot hold these directions.
        """
        from emlens.directions.formats.read import write_directions

        return write_directions(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what `save` wrote; one layer comes back as a `Direction`."""
        from emlens.directions.files import load_directions
        from emlens.directions.formats.read import read_directions

        path = expanded(path)
        return read_directions(path) if path.suffix in (".gguf", ".pt") else load_directions(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = "directions.safetensors",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload to a repository of the Hugging Face hub, with a card in plain words.

        The file's suffix says its format (see `write_directions`). Of a card that is there, only
        the section of this file is replaced; the licence is left to you. Returns the address of
        the commit.
        """
        from emlens.directions.formats.hub import push

        return push(self, repo_id, filename=filename, private=private, token=token)

    @classmethod
    def from_hub(
        cls, source: str | Path, filename: str | None = None, revision: str | None = None
    ) -> Directions:
        """Read directions of any format from a repository of the hub, a folder or a file.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If there are several files and `filename` names none of them; they are
                listed.
        """
        from emlens.directions.formats.hub import fetch

        return fetch(source, filename, revision)

    def __repr__(self) -> str:
        made = self.provenance.construction
        layers = ", ".join(map(str, self.layers)) if len(self) <= 8 else f"{len(self)} layers"
        return (
            f"{type(self).__name__}({made}, {self.site}, layers {layers}, d_model {self.d_model})"
        )

    def _ipython_key_completions_(self) -> list[int]:
        return list(self.layers)

    def _repr_html_(self) -> str:
        from html import escape

        from emlens.directions.diagnostics import warnings_of

        table = self.table().to_html(index=False, float_format="%.3f")
        notes = "".join(f"<li>{escape(note)}</li>" for note in warnings_of(self))
        return f"<p><b>{escape(repr(self))}</b></p>{table}<ul>{notes}</ul>"

    # -- inside -------------------------------------------------------------------------------

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
        return type(self)(
            vectors,
            self.site,
            self.provenance.derived(f"{self.provenance.construction}, {how}"),
            residual_norms=self.residual_norms,
            means=self.means,
        )

    def _scaled(self, factor: float, construction: str) -> Self:
        return type(self)(
            {layer: vector * factor for layer, vector in self._vectors.items()},
            self.site,
            self.provenance.derived(construction),
            residual_norms=self.residual_norms,
            standard_errors={layer: e * abs(factor) for layer, e in self.standard_errors.items()},
            split_half=self.split_half,
            means=self.means,
            shuffled={layer: draws * factor for layer, draws in self.shuffled.items()},
            auroc={k: value if factor > 0 else 1 - value for k, value in self.auroc.items()},
            measured=self.measured if factor > 0 else None,
        )

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
            residual_norms=self.residual_norms or other.residual_norms,
        )


@guard_methods
class Direction(Directions):
    """A vector in the residual stream at one site of one layer.

    Raises:
        ValueError: If there is not exactly one layer.
    """

    def __init__(self, vectors: Mapping[int, Tensor], *args, **kwargs) -> None:
        super().__init__(vectors, *args, **kwargs)
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
        """A direction made by hand."""
        layer = whole("layer", layer, NOT_NEGATIVE)
        size = None if residual_norm is None else number("residual_norm", residual_norm, POSITIVE)
        norms = {} if size is None else {layer: size}
        return cls({layer: vector}, site, Provenance(construction), residual_norms=norms)

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
