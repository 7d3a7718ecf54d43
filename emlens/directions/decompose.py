"""What several directions share, what is specific to each, and the tokens that one promotes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guard_methods, guarded
from emlens._results import Result, Shown
from emlens.directions.compare import Named, checked, null_band
from emlens.directions.direction import Directions
from emlens.directions.fits import check_fits
from emlens.directions.provenance import Provenance
from emlens.directions.vectors import Evidence, cosine, nonzero
from emlens.hooked import HookedModel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SharedBy = Literal["mean", "component"]


@guard_methods
@dataclass(frozen=True, repr=False)
class Decomposition(Shown):
    """Several directions, split into a shared part and a part specific to each.

    Attributes:
        shared: The common direction, at every layer that all have.
        specific: Each direction without its part along `shared`, by name.
        rows: One record per name and layer, with the columns of `table`.
        null: Central 95% band of the cosine between random directions of this width.
    """

    shared: Directions
    specific: Mapping[str, Directions]
    rows: tuple[dict, ...]
    null: tuple[float, float]

    def table(self) -> pd.DataFrame:
        """One row per name and layer.

        `share` is the share of the squared norm along `shared`; for unrelated directions it is `1 /
        number` by construction (`share by chance`), so read `cosine with the others`, which leaves
        the direction itself out.
        """
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The cosine of each with the mean of the others against layer, over the chance band."""
        from emlens.figures.lines import layer_curves

        curves = {}
        for name in self.specific:
            own = [row for row in self.rows if row["name"] == name]
            layers = [row["layer"] for row in own]
            curves[name] = (layers, [row["cosine with the others"] for row in own])
        return layer_curves(curves, null=self.null, y_label="cosine with the others", ax=ax)

    def _said(self) -> str:
        return f"{', '.join(self.specific)}, layers {', '.join(map(str, self.shared.layers))}"


@guarded
def decompose(directions: Named, *, by: SharedBy = "mean") -> Decomposition:
    """Split directions into the part that they share and the part specific to each.

    Shared geometry is not shared effect: measure what each part does.

    Args:
        directions: Two or more directions at one site, of one width: named, or a list.
        by: `"mean"` takes the mean of the unit vectors as the shared direction, `"component"` their
            first principal component, uncentred. Its length is the mean length along it.

    Raises:
        ValueError: If `by` is unknown, no layer is shared by all, a vector is zero or the mean
            vanishes, or as `compare`.
    """
    if by not in ("mean", "component"):
        raise ValueError(f"cannot decompose by {by!r}; choose 'mean' or 'component'")
    named = checked(directions)
    layers = [
        layer for layer in next(iter(named.values())) if all(layer in d for d in named.values())
    ]
    if not layers:
        raise ValueError("the directions have no layer in common")
    vectors, rows = {}, []
    for layer in layers:
        held = torch.stack([d.vectors[layer].double() for d in named.values()])
        axis = _axis(held, by, layer)
        vectors[layer] = (axis * (held @ axis).mean()).float()
        for place, name in enumerate(named):
            units = held / held.norm(dim=1, keepdim=True)
            others = torch.cat([units[:place], units[place + 1 :]]).mean(0)
            along = float(units[place] @ axis)
            rows.append(
                {
                    "name": name,
                    "layer": layer,
                    "norm": float(held[place].norm()),
                    "cosine with shared": along,
                    "share": along**2,
                    "share by chance": 1 / len(named),
                    "cosine with the others": cosine(units[place], others),
                }
            )
    some = next(iter(named.values()))
    made = Provenance(
        f"shared by {', '.join(named)} ({by})",
        model=some.provenance.model,
        settings={"parents": {name: d.provenance.to_dict() for name, d in named.items()}},
    )
    shared = Directions(vectors, some.site, made, Evidence(some.residual_norms))
    specific = {name: d.at(layers).orthogonal_to(shared) for name, d in named.items()}
    return Decomposition(shared, specific, tuple(rows), null_band(some.d_model))


class PromotedTokens(Result):
    """Tokens whose logits a direction raises and lowers most.

    Attributes:
        rows: One record per layer and rank, with the columns of `table`.
        name: What the direction is.
    """

    rows: tuple[dict, ...]
    name: str

    def table(self) -> pd.DataFrame:
        """One row per layer and rank; `z` is in standard deviations over the vocabulary."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def plot(self, ax: Axes | None = None, *, layer: int | None = None) -> Axes | list[Axes]:
        """The promoted tokens of one layer beside the suppressed ones, as lists of bars.

        Args:
            ax: Axes to draw both lists on, one below the other; two of their own if not given.
            layer: The layer, the deepest by default.

        Raises:
            ValueError: If there are no tokens of the layer.
        """
        from emlens.figures import COLOURS
        from emlens.figures.bars import bar_list
        from emlens.figures.style import new_panels

        frame = self.table()
        shown = max(frame["layer"]) if layer is None else layer
        frame = frame.loc[frame["layer"] == shown]
        if frame.empty:
            raise ValueError(f"there are no tokens of layer {layer}")
        names, values = {}, {}
        for side in ("promoted", "suppressed"):
            names[side] = [repr(token)[1:-1] for token in frame[side]]
            values[side] = frame[f"{side} z"].tolist()
        of = f"by {self.name}, layer {shown}"
        label = "logit [SD over the vocabulary]"
        if ax is not None:
            both = [sum(lists.values(), []) for lists in (names, values)]
            return bar_list(*both, x_label=label, title=of, ax=ax)
        axes = new_panels(2, width=8.4, height=1.2 + 0.3 * len(frame))
        for panel, side in zip(axes, names, strict=True):
            title = f"{side.capitalize()} {of}" if side == "promoted" else side.capitalize()
            bar_list(
                names[side],
                values[side],
                x_label=label,
                title=title,
                shade=COLOURS["base" if side == "promoted" else "random"],
                ax=panel,
            )
        return axes


@guarded
def promoted_tokens(model: HookedModel, directions: Directions, k: int = 10) -> PromotedTokens:
    """Return the tokens that a direction promotes and suppresses most, by the logit lens.

    The direction goes through the model's own final norm and unembedding, without any context;
    what the norm adds by itself (its bias) is subtracted. This is only the direct path to the
    logits: below the last layers, most of the effect goes through later blocks.

    Args:
        model: The model.
        directions: Directions; each layer is read separately.
        k: Tokens on either side.

    Raises:
        ValueError: If the widths differ, a vector is zero, or `k` is not from 1 to the size of
            the vocabulary.
    """
    check_fits(model, directions, "a direction")
    if not 1 <= k <= model.n_vocab:
        raise ValueError(f"k is {k}; the vocabulary of {model.name} has {model.n_vocab} tokens")
    rows = []
    for layer, vector in directions.vectors.items():
        scores = _lens(model, nonzero(vector, layer))
        best = scores.topk(k)
        worst = (-scores).topk(k)
        for rank in range(k):
            up, down = int(best.indices[rank]), int(worst.indices[rank])
            rows.append(
                {
                    "layer": layer,
                    "rank": rank + 1,
                    "promoted": model.tokenizer.decode([up]),
                    "promoted z": float(best.values[rank]),
                    "suppressed": model.tokenizer.decode([down]),
                    "suppressed z": -float(worst.values[rank]),
                }
            )
    return PromotedTokens(tuple(rows), directions.provenance.construction)


def _lens(model: HookedModel, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " vocab"]:
    with torch.no_grad():
        pair = torch.stack([vector, torch.zeros_like(vector)]).to(model.device)
        logits = model.unembed(model.normalize(pair)).double().cpu()
    scores = logits[0] - logits[1]
    return (scores - scores.mean()) / scores.std()


def _axis(vectors: Float[Tensor, "n d_model"], by: SharedBy, layer: int) -> Tensor:
    norms = vectors.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ValueError(f"a vector of layer {layer} is zero: it has no direction")
    mean = (vectors / norms).mean(0)
    if by == "mean":
        if float(mean.norm()) < 1e-9:
            raise ValueError(f"the unit vectors of layer {layer} cancel: they share no mean")
        return mean / mean.norm()
    _, _, axes = torch.linalg.svd(vectors / norms, full_matrices=False)
    return axes[0] * (1 if float(axes[0] @ mean) >= 0 else -1)
