"""Ablation of a direction in an organism, in every way that the papers do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval
from emlens.directions import Direction, Directions, random_direction
from emlens.directions.fits import check_fits
from emlens.edits import Ablate
from emlens.evals.behaviour import LABEL, Behaviour, Effect, answer_columns
from emlens.evals.tables import NO_EFFECT, ORGANISM, averaged, single_layer
from emlens.hooked import Condition, HookedModel
from emlens.hooked.architecture import writes
from emlens.hooked.condition import BASE, ConditionLike, condition_of
from emlens.hooked.lora_scaling import adapter_factors, put_back
from emlens.hooked.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

THREE_SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
"""What enters a block, and what its two parts add: the field's three-site ablation."""

BROKEN = 0.8
"""Coherent share below which a figure says how many are left."""


class Ablation(Result):
    """What is left of an organism's behaviour when a direction is ablated in it.

    Attributes:
        effect: The behaviour under each condition, as a record.
        direction: How the direction was made.
    """

    effect: Effect
    direction: str

    def _verify(self) -> None:
        for name in (BASE, ORGANISM):
            if name not in self.effect.conditions:
                raise ValueError(
                    f"effect.conditions has no {name!r}, which the others are compared with"
                )

    def _said(self) -> str:
        return f"{self.direction}, {self.effect._said()}"

    def left(self, condition: str) -> Interval:
        """Share of the organism's effect that is left, in percent.

        NaN where that effect is not clear of zero.
        """
        return self.effect.share(condition, ORGANISM, BASE)

    def table(self) -> pd.DataFrame:
        """One row per way of ablating: the effect left, and its change against the organism.

        Where answers were generated, the coherent ones stand beside: an ablation that breaks the
        model leaves no misaligned answers either.
        The share left is blank, with the reason, where the organism's effect is not clear of zero.
        """
        import pandas as pd

        rows = []
        for name, coherent in zip(self.effect.conditions, self.effect.coherent, strict=True):
            left, gone = self.effect.change(name, BASE), self.effect.change(name, ORGANISM)
            share = self.left(name)
            rows.append(
                {
                    "ablated": name,
                    **left.columns(f"change vs base, {self.effect.what}"),
                    "left [%]": share.estimate,
                    "left low [%]": share.low,
                    "left high [%]": share.high,
                    **gone.columns(f"change vs organism, {self.effect.what}", "gone "),
                    **answer_columns(coherent, self.effect.judged_by),
                    "acting": self.effect.acting.get(name, ""),
                }
            )
        frame = pd.DataFrame(rows)
        none = bool(frame["left [%]"].isna().all())
        return frame.assign(note=NO_EFFECT) if none else frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change against the base, one dot per way of ablating.

        Ways under which fewer than four answers in five are coherent say so.
        """
        from emlens.figures.bars import dot_intervals

        coherent = dict(zip(self.effect.conditions, self.effect.coherent, strict=True))
        shown = [name for name in self.effect.conditions if name != BASE]
        values = [self.effect.change(name, BASE) for name in shown]
        return dot_intervals(
            [
                f"{name} ({coherent[name]:.0%} coherent)" if coherent[name] < BROKEN else name
                for name in shown
            ],
            None,
            [value.estimate for value in values],
            [value.low for value in values],
            [value.high for value in values],
            y_label=f"change against the base\n{fill(self.effect.what, LABEL)}",
            title=self.effect.title,
            x_label="what is ablated",
            ax=ax,
        )


@guarded
def ablation_table(
    model: HookedModel,
    behaviour: Behaviour,
    organism: ConditionLike,
    directions: Directions,
    *,
    layer: int | None = None,
    randoms: int = 2,
    seed: int = 0,
) -> Ablation:
    """Ablate a direction in an organism in every way that the papers do, with a random control.

    At the direction's layer; at all layers, the one direction; at all layers, each with its own
    direction, where there are several; at three sites of all layers; inside of an adapter's `B`,
    with the norm of `B` kept; and random directions at all layers (arXiv 2506.11618, sections 3.3
    and appendix D). An adapter that is not plain LoRA, or writes nowhere into the residual stream,
    has no such `B`: a warning says so before anything is measured, and that row is left out.

    Args:
        model: The model.
        behaviour: How behaviour is measured.
        organism: What makes it misaligned: an adapter's name, edits, both, or an `Organism`.
        directions: The direction, or one per layer.
        layer: The layer whose direction is ablated everywhere; the middle one by default.
        randoms: Random directions, averaged.
        seed: Seed of the random directions.

    Raises:
        ValueError: If the layer is not among the directions.
    """
    chosen = single_layer(directions, layer)
    whole, where = condition_of(model, organism), range(model.n_layers)
    conditions: dict[str, Condition] = {
        BASE: Condition(),
        ORGANISM: whole,
        f"layer {chosen.layer}": whole.with_edits(Ablate(chosen)),
        "all layers": whole.with_edits(Ablate(chosen, layers=where)),
        "three sites, all layers": whole.with_edits(
            *(Ablate(chosen, layers=where, site=site) for site in THREE_SITES)
        ),
    }
    if len(directions.layers) > 1:
        conditions["all layers, each its own"] = whole.with_edits(Ablate(directions))
    chance = {
        f"random {i}": whole.with_edits(Ablate(random_direction(chosen, seed + i), layers=where))
        for i in range(randoms)
    }
    inside = _inside(model, whole, chosen)
    effect = behaviour.measure(model, {**conditions, **chance, **inside})
    effect = averaged(effect, "random, all layers", tuple(chance))
    return Ablation(effect, chosen.provenance.construction)


def _inside(model: HookedModel, organism: Condition, direction: Direction) -> dict[str, Condition]:
    """The organism with the direction projected out of its adapter's `B`, where that can be."""
    if not organism.names:
        return {}
    (name, *_) = organism.names
    try:
        _writing(model, name)
    except ValueError as error:
        warnings.warn(f"the row 'inside B' is left out: {error}", stacklevel=4)
        return {}
    rest = organism.adapters[1:] if organism.adapters else ()
    return {"inside B": Condition((Projected(name, direction), *rest), organism.edits)}


def _writing(model: HookedModel, name: str) -> dict[str, Tensor]:
    """Every `B` that writes into the residual stream."""
    writing = {
        path: factors.b for path, factors in adapter_factors(model, name).items() if writes(path)
    }
    if not writing:
        raise ValueError(
            f"adapter {name!r} adapts no module that writes into the residual stream, so there is "
            "nothing to project a direction out of"
        )
    return writing


@dataclass(frozen=True, eq=False)
class Projected:
    """An adapter with a direction projected out of every `B` that writes into the stream.

    Each `B` keeps its norm (arXiv 2506.11618, appendix D); a `B` that lies along the direction
    becomes zero.

    Attributes:
        adapter: The adapter.
        direction: The direction.

    Raises:
        ValueError: Where it is used: if the adapter writes nowhere into the residual stream, or
            as `Scaled`.

    Examples:
        >>> with model.under(Projected("medical", direction)):
        ...     model.generate([conversation])
    """

    adapter: str
    direction: Direction

    def __str__(self) -> str:
        return f"{self.adapter} (without {self.direction!r})"

    @contextmanager
    def altering(self, model: HookedModel) -> Iterator[None]:
        check_fits(model, self.direction, "what is projected out")
        writing = _writing(model, self.adapter)
        with put_back(writing.values()):
            with torch.no_grad():
                for weight in writing.values():
                    unit = self.direction.unit().vector.to(weight.device, torch.float64)
                    b = weight.double()
                    out = b - torch.outer(unit, unit @ b)
                    size, whole = out.norm(), b.norm()
                    weight.copy_(out * (whole / size) if size > 1e-9 * whole else 0 * b)
            yield
