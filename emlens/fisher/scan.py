"""Many directions: ranked by the Fisher profile, and the leaders and a sample checked exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from emlens._door import guarded
from emlens._results import Result
from emlens._runs import check_same
from emlens._stats import Interval
from emlens.directions import Direction, Directions
from emlens.fisher.inputs import HELD_OUT
from emlens.fisher.passes import PassSettings
from emlens.fisher.profile import DOSE, InfluenceProfile
from emlens.hooked import CorpusOptions, HookedModel
from emlens.measures.influence import DOSES, Influence, influence
from emlens.measures.scoring import with_tokens
from emlens.text import Corpus

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TRUSTED = 0.25
"""Largest error of the KL and of the change of loss at which the second order holds."""

LOSS = " loss change"

OF_THE_MODEL = ("model", "revision", "adapter", "edits", "d_model", "identity", "condition")
"""Settings that a profile must share with the model that it is checked on."""


class InfluenceScan(Result):
    """Scores of all directions at all their layers, and how far they agree with the exact ones.

    Attributes:
        scores: A row per direction and layer, as `ProfileScores.table` gives them.
        checked: A row per checked direction, layer and dose: `direction`, `layer`, `chosen`
            (`leader` or `sample`), `dose`; of the KL `exact`, `exact low`, `exact high` and
            `predicted`, and the same of the change of loss, `exact loss change` and so on, nats
            per token; `held out` where both are on the documents that it was not found on.
        dose: The dose of the scores.
        corpus: Name of the corpus.
    """

    HOLDS_ENDS = True

    scores: tuple[dict, ...]
    checked: tuple[dict, ...]
    dose: float
    corpus: str

    def table(self) -> pd.DataFrame:
        """All directions and layers, the most influential first; the exact values where checked."""
        import pandas as pd

        frame = pd.DataFrame(self.scores)
        exact = {(row["direction"], row["layer"]): row for row in self._at(self.dose)}
        keys = list(zip(frame["direction"], frame["layer"], strict=True))
        for column, field in (
            ("exact KL [nats/token]", "exact"),
            ("exact loss change [nats/token]", f"exact{LOSS}"),
        ):
            frame[column] = [exact.get(key, {}).get(field, float("nan")) for key in keys]
        return frame.sort_values("KL [nats/token]", ascending=False, ignore_index=True)

    def agreement(self) -> pd.DataFrame:
        """One row per dose: how well KL and change of loss of what was checked are predicted.

        Errors of the KL are relative to each exact value. A change of loss may be near zero, so
        its median error is relative to the median size of the exact changes at the dose; signs
        are counted where the exact interval excludes zero. Scans saved by earlier versions
        have no change of loss: NaN.
        """
        import pandas as pd

        rows = []
        for dose in sorted({row["dose"] for row in self.checked}):
            at = self._at(dose)
            exact = np.array([row["exact"] for row in at])
            predicted = np.array([row["predicted"] for row in at])
            rows.append(
                {
                    "dose": dose,
                    "checked": len(at),
                    "Spearman": _ranks(exact, predicted),
                    "median relative error": float(np.median(np.abs(predicted / exact - 1))),
                    "median predicted / exact": float(np.median(predicted / exact)),
                    **_of_loss(at),
                }
            )
        return pd.DataFrame(rows)

    @property
    def holds_to(self) -> float | None:
        """The largest dose up to which KL and change of loss are right within 25%, or None."""
        holds = None
        for row in self.agreement().to_dict("records"):
            if max(row["median relative error"], np.nan_to_num(row["loss error"])) > TRUSTED:
                break
            holds = float(row["dose"])
        return holds

    def plot(self, ax: Axes | None = None) -> Axes:
        """Predicted against exact KL, a series per dose, and the diagonal."""
        from emlens.figures.scatter import agreement_plot

        series = {
            f"dose {dose:g}": (
                [row["exact"] for row in self._at(dose)],
                [row["predicted"] for row in self._at(dose)],
            )
            for dose in sorted({row["dose"] for row in self.checked})
        }
        return agreement_plot(
            series,
            x_label=f"exact KL on {self.corpus} [nats/token]",
            y_label="by the Fisher profile [nats/token]",
            ax=ax,
        )

    def __str__(self) -> str:
        best = self.table().iloc[0]
        limit = "at no dose tried" if self.holds_to is None else f"up to dose {self.holds_to:g}"
        return (
            f"{len(self.scores)} directions and layers on {self.corpus}: the most influential is "
            f"{best['direction']} at layer {best['layer']}; the second order holds "
            f"within {TRUSTED:.0%} {limit}"
        )

    def _at(self, dose: float) -> list[dict]:
        return [row for row in self.checked if np.isclose(row["dose"], dose)]


@guarded
def scan(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Directions] | Directions,
    *,
    profile: InfluenceProfile | None = None,
    doses: Sequence[float] = DOSES,
    check: int = 5,
    draws: int = 8,
    seed: int = 0,
    **options: Unpack[CorpusOptions],
) -> InfluenceScan:
    """Score every direction at every layer it has, and check the leaders and a sample exactly.

    Args:
        model: The model.
        corpus: Raw text.
        directions: Named directions of any number of layers.
        profile: A profile of this model on this corpus; made, at the layers needed, by default.
        doses: Doses of the exact check; the one nearest to 0.05 is that of the scores.
        check: How many leaders, and how many others at random, are checked.
        draws: Draws of the profile, where it is made.
        seed: Seed of the profile and of the sample.
        **options: See `CorpusOptions`.

    Raises:
        ValueError: If there are no directions or no doses above zero, or the profile is of another
            model, adapter or edits, or does not fit the directions.
    """
    named = {"direction": directions} if isinstance(directions, Directions) else dict(directions)
    if not named:
        raise ValueError("no directions were given; pass {name: direction}")
    grid = sorted({float(dose) for dose in doses})
    if not grid or grid[0] <= 0:
        raise ValueError(f"doses must be above zero, and at least one; got {list(doses)}")
    if check < 1:
        raise ValueError(f"check must be at least 1, not {check}")
    if profile is None:
        layers = sorted({layer for value in named.values() for layer in value.layers})
        profile = InfluenceProfile.fit(model, corpus, layers, draws, seed=seed, **options)
    _check_profile(profile, model, corpus)
    dose = min(grid, key=lambda value: abs(value - DOSE))
    scores = profile.score(named, dose).table().to_dict("records")
    order = sorted(range(len(scores)), key=lambda i: -scores[i]["KL [nats/token]"])
    leaders, rest = order[:check], order[check:]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:check]
    chosen = dict.fromkeys(leaders, "leader") | {rest[j]: "sample" for j in sorted(drawn.tolist())}
    picked = {f"{scores[i]['direction']}, layer {scores[i]['layer']}": i for i in chosen}
    exact = influence(
        model,
        corpus,
        {key: _at(named, scores[i]) for key, i in picked.items()},
        doses=grid,
        controls=0,
        **options,
    )
    known = corpus.hash in {digest for _, digest in profile.corpora}
    halves = _halves(model, corpus) if known else []
    checked: list[dict] = []
    for key, i in picked.items():
        held_out = bool(scores[i]["held out"]) and known
        on = exact.among(_other_half(halves, _at(named, scores[i]))) if held_out else exact
        checked += _compared(on, key, scores[i], chosen[i], held_out, dose)
    return InfluenceScan(tuple(scores), tuple(checked), dose, corpus.name)  # type: ignore[arg-type]


def _check_profile(profile: InfluenceProfile, model: HookedModel, corpus: Corpus) -> None:
    """Refuse a profile of another model; warn of one of another corpus."""
    made = profile.settings
    now = PassSettings.of(model, made.layers, made.draws, made.max_tokens, made.seed)
    found, wanted = ({name: getattr(one, name) for name in OF_THE_MODEL} for one in (made, now))
    way_out = (
        f"fit one of {model.name!r} with InfluenceProfile.fit, or leave it out to have one fitted"
    )
    check_same(found, wanted, "the profile", way_out)
    if corpus.hash not in {digest for _, digest in profile.corpora}:
        warnings.warn(
            f"the profile was fitted on {profile.corpus}, but the exact check uses {corpus.name}; "
            "the two may disagree for that reason",
            stacklevel=5,
        )


def _at(named: Mapping[str, Directions], score: Mapping) -> Direction:
    """The direction of one row of scores."""
    return named[str(score["direction"])][int(score["layer"])]


def _halves(model: HookedModel, corpus: Corpus) -> list[int]:
    """Which half of a profile each document of an influence belongs to."""
    kept = {id(document) for document in with_tokens(model, corpus).documents}
    return [place % 2 for place, one in enumerate(corpus.documents) if id(one) in kept]


def _other_half(halves: Sequence[int], direction: Direction) -> list[int]:
    """Places, in an influence, of the documents that a direction was not found on."""
    found: Any = direction.provenance.settings[HELD_OUT]
    return [place for place, half in enumerate(halves) if half != int(found["half"])]


def _compared(
    exact: Influence, key: str, score: Mapping, why: str, held_out: bool, dose: float
) -> list[dict]:
    """A row for each dose of the exact measurement."""
    row = {"direction": str(score["direction"]), "layer": int(score["layer"]), "chosen": why}
    row["held out"] = held_out
    bend = float(score["KL [nats/token]"])
    slope = float(score["loss change [nats/token]"]) - bend
    rows = []
    for x in exact.doses:
        ratio = x / dose
        kl, loss = bend * ratio**2, slope * ratio + bend * ratio**2
        rows.append(
            {
                **row,
                "dose": x,
                **_beside("", exact.divergence(key, x), kl),
                **_beside(LOSS, exact.loss_change(key, x), loss),
            }
        )
    return rows


def _beside(what: str, interval: Interval, predicted: float) -> dict:
    return {
        f"exact{what}": interval.estimate,
        f"exact{what} low": interval.low,
        f"exact{what} high": interval.high,
        f"predicted{what}": predicted,
    }


def _ranks(exact: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(np.asarray(spearmanr(exact, predicted))[0]) if len(exact) > 2 else float("nan")


def _of_loss(rows: Sequence[Mapping]) -> dict:
    """How well the changes of loss of some checked rows are predicted."""
    keys = (f"exact{LOSS}", f"exact{LOSS} low", f"exact{LOSS} high", f"predicted{LOSS}")
    exact, low, high, predicted = np.array(
        [[row.get(key, np.nan) for key in keys] for row in rows]
    ).T
    clear = (low > 0) | (high < 0)
    right = np.sign(exact[clear]) == np.sign(predicted[clear])
    return {
        "loss Spearman": _ranks(exact, predicted),
        "loss error": float(np.median(np.abs(predicted - exact)) / np.median(np.abs(exact))),
        "loss error [nats/token]": float(np.median(np.abs(predicted - exact))),
        "loss signs right": float(right.mean()) if clear.any() else float("nan"),
    }
