"""Directions in terms of features of a sparse autoencoder, given its encode and decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from emlens._door import guarded
from emlens._results import Result
from emlens.directions.direction import Direction
from emlens.directions.vectors import nonzero

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Coder = Callable[[Tensor], Tensor]
CHUNK = 1024
"""Activations that are encoded at once."""


class FeatureDecomposition(Result):
    """Features of a sparse autoencoder that a direction lies along, and that it activates.

    Attributes:
        direction: How the direction was made.
        layer: Its layer.
        features: The features that change most, and those that the direction lies along most;
            by their change, then by their cosine.
        changes: Change of each feature's activation when the direction is added, averaged.
        cosines: Cosine of the direction with what the feature decodes to.
        activations: Activation of each feature without the direction, averaged.
        active: Number of features whose activation changes.
        n_features: Number of features.
        reconstructed: Share of the direction that the change of the reconstruction gives back,
            `1 - |v - change|^2 / |v|^2`: below zero if it points elsewhere.
    """

    AXES = {"changes": "features", "cosines": "features", "activations": "features"}

    direction: str
    layer: int
    features: tuple[int, ...]
    changes: tuple[float, ...]
    cosines: tuple[float, ...]
    activations: tuple[float, ...]
    active: int
    n_features: int
    reconstructed: float

    def table(self) -> pd.DataFrame:
        """One row per feature; activations are in units of the autoencoder."""
        import pandas as pd

        return pd.DataFrame(
            {
                "feature": self.features,
                "change of activation": self.changes,
                "cosine": self.cosines,
                "activation without": self.activations,
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Cosine of the direction with each feature, sorted by change."""
        from emlens.figures.bars import dot_intervals

        nothing = [float("nan")] * len(self.features)
        return dot_intervals(
            list(map(str, self.features)),
            ["it changes" if change else "it does not change" for change in self.changes],
            self.cosines,
            nothing,
            nothing,
            y_label=f"cosine of {self.direction}, layer {self.layer}",
            x_label="feature",
            ax=ax,
        )


@guarded
@torch.no_grad()
def in_features(
    direction: Direction,
    encode: Coder,
    decode: Coder,
    activations: Float[Tensor, "n d_model"] | None = None,
    k: int = 10,
) -> FeatureDecomposition:
    """Return the features of a sparse autoencoder that a direction consists of.

    A direction is a difference of activations, and an encoder has a bias and a threshold: so the
    direction is added to activations, and the change of the features is averaged. The cosine with a
    feature's decoder vector needs no encoder; if the two disagree, the direction lies along a
    feature without activating it, or activates one that it does not lie along.

    Args:
        direction: The direction, at the norm of interest.
        encode: Activations `[n, d_model]` to features `[n, n_features]`, by PyTorch, on the
            device of `activations`; `encode` of SAELens or of `dictionary_learning`.
        decode: Features to activations.
        activations: Activations of the site that the autoencoder was trained on, to which the
            direction is added; by default `decode(0)`, the reconstruction without features.
        k: Features to keep of each kind.

    Raises:
        ValueError: If widths differ, the direction is zero, `k` is not from 1 to the number of
            features, or what the autoencoder gives is not finite.

    Examples:
        >>> sae = sae_lens.SAE.from_pretrained(release, sae_id)
        >>> in_features(direction, sae.encode, sae.decode, activations).table()
    """
    vector = nonzero(direction.vector, direction.layer)
    d = len(vector)
    if activations is None:
        activations = decode(torch.zeros_like(_of_width(encode(vector.new_zeros(1, d)), None)))
    base = _of_width(activations, d, "the activations").float()
    vector = vector.to(base)
    n_features = _of_width(encode(base[:1]), None).shape[1]
    if not 1 <= k <= n_features:
        raise ValueError(f"k is {k}; the autoencoder has {n_features} features")
    before, change = base.new_zeros(2, n_features).double()
    moved = base.new_zeros(d).double()
    for part in base.split(CHUNK):
        first, second = (_of_width(encode(x), n_features) for x in (part, part + vector))
        before += first.double().sum(0)
        change += (second - first).double().sum(0)
        outputs = [
            _of_width(decode(f), d, "what the autoencoder decodes to") for f in (first, second)
        ]
        moved += (outputs[1] - outputs[0]).double().sum(0)
    before, change, moved = (total / len(base) for total in (before, change, moved))
    along = _products(decode, base.new_zeros(1, n_features), vector)
    chosen = torch.cat([change.abs().topk(k).indices, along.abs().topk(k).indices]).unique()
    ones = torch.nn.functional.one_hot(chosen, n_features).to(base)
    columns = decode(ones) - decode(torch.zeros_like(ones))
    cosines = torch.nn.functional.cosine_similarity(columns.double(), vector.double()[None])
    changes = change[chosen]
    if not bool(torch.isfinite(torch.cat([changes, cosines, moved, base.sum(0)])).all()):
        raise ValueError("the autoencoder gives values that are not finite for these activations")
    places = sorted(range(len(chosen)), key=lambda i: (-abs(changes[i]), -abs(cosines[i])))
    missed = (vector.double() - moved).square().sum() / vector.double().square().sum()
    return FeatureDecomposition(
        direction.provenance.construction,
        direction.layer,
        tuple(int(chosen[i]) for i in places),
        tuple(float(changes[i]) for i in places),
        tuple(float(cosines[i]) for i in places),
        tuple(float(before[chosen[i]]) for i in places),
        active=int((change != 0).sum()),
        n_features=n_features,
        reconstructed=1 - float(missed),
    )


@torch.enable_grad()
def _products(decode: Coder, zeros: Tensor, vector: Tensor) -> Tensor:
    """Inner product of a vector with what each feature decodes to, by one backward pass."""
    features = zeros.clone().requires_grad_()
    (found,) = torch.autograd.grad((decode(features) @ vector).sum(), features)
    return found[0]


def _of_width(values: Tensor, width: int | None, what: str = "what the encoder gives") -> Tensor:
    if values.ndim != 2 or (width is not None and values.shape[1] != width):
        raise ValueError(
            f"{what} has shape {tuple(values.shape)}; it needs [n, {width or 'n_features'}]"
        )
    return values
