"""Ablation of a direction in an organism, in every way that the papers do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from textwrap import fill
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emlens._results import Result
from emlens._stats import Interval
from emlens.directions import Direction, Directions, random_direction
from emlens.directions.adapters import WRITERS
from emlens.edits import Ablate
from emlens.evals.behaviour import LABEL, Behaviour, Effect, answer_columns
from emlens.evals.parts import BASE, NO_EFFECT, ORGANISM, averaged, one_of
from emlens.hooked import Condition, Edit, HookedModel, Site
from emlens.hooked.altered import adapter_factors, put_back
from emlens.hooked.sweep import parts_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

THREE_SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
"""What enters a block, and what its two parts add: the field's three-site ablation."""

BROKEN = 0.8
"""Coherent share below which a figure says how many are left."""


@dataclass(frozen=True)
class Ablation(Result):
    """What is left of an organism's behaviour when a direction is ablated in it.

    Attributes:
        effect: The behaviour under each condition, as a record.
        direction: How the direction was made.
    """

    effect: Effect
    direction: str

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
                    f"change vs base, {self.effect.what}": left.estimate,
                    "low": left.low,
                    "high": left.high,
                    "left [%]": share.estimate,
                    "left low [%]": share.low,
                    "left high [%]": share.high,
                    f"change vs organism, {self.effect.what}": gone.estimate,
                    "gone low": gone.low,
                    "gone high": gone.high,
                    **answer_columns(coherent, self.effect.judged_by),
                }
            )
        frame = pd.DataFrame(rows)
        none = bool(frame["left [%]"].isna().all())
        return frame.assign(note=NO_EFFECT) if none else frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change against the base, one dot per way of ablating.

        Ways under which fewer than four answers in five are coherent say so.
        """
        from emlens.figures import dot_intervals

        coherent = dict(zip(self.effect.conditions, self.effect.coherent, strict=True))
        shown = [name for name in self.effect.conditions if name != BASE]
        values = [self.effect.change(name, BASE) for name in shown]
        return dot_intervals(
            [
                f"{name} ({coherent[name]:.0%} coherent)" if coherent[name] < BROKEN else name
                for name in shown
            ],
            ["change against the base"] * len(shown),
            [value.estimate for value in values],
            [value.low for value in values],
            [value.high for value in values],
            y_label=f"change against the base\n{fill(self.effect.what, LABEL)}",
            title=self.effect.title,
            x_label="what is ablated",
            ax=ax,
        )


def ablation_table(
    model: HookedModel,
    organism: Condition,
    directions: Directions,
    behaviour: Behaviour,
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
        organism: What makes it misaligned: an adapter's name, edits, or both.
        directions: The direction, or one per layer.
        behaviour: How behaviour is measured.
        layer: The layer whose direction is ablated everywhere; the middle one by default.
        randoms: Random directions, averaged.
        seed: Seed of the random directions.

    Raises:
        ValueError: If the layer is not among the directions.
    """
    chosen = one_of(directions, layer)
    adapter, edits = parts_of(organism)
    where = range(model.n_layers)

    def with_edits(*more: Edit) -> Condition:
        both = [*edits, *more]
        return (adapter, both) if isinstance(adapter, str) else both

    chance = [random_direction(chosen, seed + i) for i in range(randoms)]
    conditions: dict[str, Condition] = {
        BASE: (None, ()),
        ORGANISM: organism,
        f"layer {chosen.layer}": with_edits(Ablate(chosen)),
        "all layers": with_edits(Ablate(chosen, layers=where)),
        "three sites, all layers": with_edits(
            *(Ablate(chosen, layers=where, site=site) for site in THREE_SITES)
        ),
    }
    if len(directions.layers) > 1:
        conditions["all layers, each its own"] = with_edits(Ablate(directions))
    names = {f"random {i}": with_edits(Ablate(x, layers=where)) for i, x in enumerate(chance)}
    projected = isinstance(adapter, str) and _can_be_projected(model, adapter)
    effect = behaviour.measure(model, {**conditions, **names})
    effect = averaged(effect, "random, all layers", tuple(names))
    if isinstance(adapter, str) and projected:
        with projected_adapter(model, adapter, chosen):
            inside = behaviour.measure(model, {BASE: (None, ()), "inside B": organism})
        effect = replace(
            effect,
            conditions=(*effect.conditions, "inside B"),
            values=(*effect.values, inside.values[1]),
            coherent=(*effect.coherent, inside.coherent[1]),
        )
    return Ablation(effect, chosen.provenance.construction)


def _can_be_projected(model: HookedModel, name: str) -> bool:
    try:
        _writing(model, name)
    except ValueError as error:
        warnings.warn(f"the row 'inside B' is left out: {error}", stacklevel=3)
        return False
    return True


def _writing(model: HookedModel, name: str) -> dict[str, Tensor]:
    """Every `B` that writes into the residual stream."""
    writing = {
        path: factors.b
        for path, factors in adapter_factors(model, name).items()
        if path.rpartition(".")[2] in WRITERS
    }
    if not writing:
        raise ValueError(
            f"adapter {name!r} adapts no module that writes into the residual stream, so there is "
            "nothing to project a direction out of"
        )
    return writing


@contextmanager
def projected_adapter(model: HookedModel, name: str, direction: Direction) -> Iterator[HookedModel]:
    """Project a direction out of every `B` that writes into the stream, inside the block.

    Each `B` keeps its norm (arXiv 2506.11618, appendix D); a `B` that lies along the direction
    becomes zero.

    Args:
        model: A model with adapters.
        name: The adapter.
        direction: The direction.

    Raises:
        ValueError: If the adapter writes nowhere into the residual stream, or as
            `scaled_adapter`.
    """
    writing = _writing(model, name)
    with put_back(writing.values()):
        with torch.no_grad():
            for weight in writing.values():
                unit = direction.unit().vector.to(weight.device, torch.float64)
                b = weight.double()
                out = b - torch.outer(unit, unit @ b)
                size = out.norm()
                kept = out * (b.norm() / size) if size > 1e-9 * b.norm() else torch.zeros_like(b)
                weight.copy_(kept)
        yield model
