"""`screen`: score a finetuning set before training, by the projections of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float

from emlens._distributed import leads
from emlens._door import guarded
from emlens._progress import bar
from emlens._results import Result
from emlens._stats import Interval
from emlens._store import Store
from emlens.hooked import HookedModel
from emlens.hooked.sites import Layers
from emlens.text import Conversation
from emlens.text.repeats import warn_of_repeats
from emlens.watch.monitor import Monitor
from emlens.watch.projections import AnyDirections
from emlens.watch.screen_rows import (
    Answers,
    Dataset,
    Example,
    References,
    blocks,
    examples,
    kept_rows,
)
from emlens.watch.screen_scorer import Scorer, ScreenOptions, ScreenSettings, screen_readout
from emlens.watch.screen_tally import Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reference = Literal["own"] | Answers
"""`"own"` for the model's own answers, or `Answers`; a file named `own` is `Path("own")`."""

POINTS = 2000
"""The most points of a plotted curve."""


class Screen(Result):
    """How far a finetuning set would push a projection, and which examples push most.

    The score of an example is the projection of its answer minus that of the reference answer to
    the same prompt, in units of the median residual norm unless stated otherwise.

    Attributes:
        model: Name of the model.
        source: What was screened.
        reference: What it was compared with.
        columns: Names of the projections.
        n: Examples with a score.
        unscored: Examples without a score, because the model's own answer was empty.
        expected: Mean score over the whole set, and the ends of its 95% interval.
        threshold: A score above it is flagged.
        rule: How the threshold was set.
        n_flagged: Flagged examples; an estimate where the set is larger than `scores`.
        worst: The examples with the highest scores, worst first, as mappings.
        scores: Scores in the order of the set, NaN where there is none; of a set beyond 100,000
            examples, a random sample.
        unit: Unit of the scores: median residual norms, or the log-odds of a pooled monitor.
    """

    HOLDS_ENDS = True

    model: str
    source: str
    reference: str
    columns: tuple[str, ...]
    n: int
    unscored: int
    expected: tuple[float, float, float]
    threshold: float
    rule: str
    n_flagged: int
    worst: tuple[dict, ...]
    scores: tuple[float, ...]
    unit: str = "median norms"

    @property
    def shift(self) -> Interval:
        """Mean score over the set: the push of training on all of it."""
        return Interval(*self.expected)

    @property
    def flagged(self) -> tuple[str, ...]:
        """Names of the flagged examples, worst first, as far as `worst` reaches."""
        return tuple(row["name"] for row in self.worst if row["score"] > self.threshold)

    def table(self) -> pd.DataFrame:
        """One row per example that was kept, worst first."""
        rows = [
            {
                "rank": rank,
                "example": row["name"],
                "row": row["row"],
                f"score [{self.unit}]": row["score"],
                "flagged": row["score"] > self.threshold,
                f"projection [{self.unit}]": row["projection"],
                f"reference [{self.unit}]": row["reference"],
                "tokens": row["tokens"],
            }
            for rank, row in enumerate(self.worst, 1)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None, *, highlight: Sequence[int] | None = None) -> Axes:
        """All scores, worst first, with the threshold.

        Args:
            ax: Axes to draw on; a figure of its own if not given.
            highlight: Rows of the set to mark, from 0, e.g. those that are known to be planted;
                the title says how many of them are flagged.

        Raises:
            ValueError: If a row is not in the set, or the set is larger than `scores`.
        """
        from emlens.figures import COLOURS
        from emlens.figures.lines import line_bands
        from emlens.figures.style import MARKED

        scores = np.array(self.scores, dtype=float)
        order = np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())]
        share = 100 * (np.arange(len(order)) + 0.5) / len(order)
        at = np.unique(np.linspace(0, len(order) - 1, POINTS).astype(int))
        marked = self._marked(highlight or ())
        flagged = int((scores[marked] > self.threshold).sum())
        ax = line_bands(
            {"examples": (share[at], scores[order[at]])},
            x_label="share of the set, worst first [%]",
            y_label=f"answer minus reference [{self.unit}]",
            title=f"{flagged} of {len(marked)} marked rows are flagged" if marked else None,
            reference=(self.threshold, "threshold"),
            colours={"examples": COLOURS["base"]},
            ax=ax,
        )
        ax.axhline(0, color=COLOURS["random"], linewidth=0.8, zorder=1)
        if marked:
            chosen = np.isin(order, marked)
            label = f"marked rows ({len(marked)})"
            look = {"color": MARKED, "marker": "D", "s": 34, "zorder": 5}
            ax.scatter(share[chosen], scores[order[chosen]], label=label, **look)
            ax.legend(loc="upper right", frameon=False, fontsize=9)
        return ax

    def _marked(self, rows: Sequence[int]) -> list[int]:
        if rows and len(self.scores) != self.n + self.unscored:
            raise ValueError(
                f"scores holds a sample of {len(self.scores)} of {self.n + self.unscored} rows, "
                "whose places in the set are not known; leave highlight out"
            )
        strange = [row for row in rows if not 0 <= row < len(self.scores)]
        if strange:
            raise ValueError(f"no row {strange[0]}; the set has rows 0 to {len(self.scores) - 1}")
        return sorted(set(rows))

    def __repr__(self) -> str:
        return (
            f"Screen({self.source}: {self.n} examples against {self.reference}, expected shift "
            f"{self.shift:+.4f} {self.unit}, "
            f"{self.n_flagged} flagged above {self.threshold:.4f})"
        )


@guarded
def screen(
    model: HookedModel,
    dataset: Dataset,
    directions: AnyDirections | Monitor,
    *,
    reference: Reference = "own",
    layers: Layers | None = None,
    trusted: Sequence[Conversation] | None = None,
    flag_share: float = 0.01,
    out: str | Path | None = None,
    **options: Unpack[ScreenOptions],
) -> Screen:
    """Score a finetuning set before training, by the projection difference of its answers.

    Each answer's projection is compared with that of a reference answer to the same prompt
    (arXiv 2507.21509): the difference between the example and what the model would have said. The
    mean over the set predicts the shift that training causes; it is not that shift itself. The set
    is read in blocks, and memory does not grow with it.

    All differences between the answers and the reference count, including style and length. Against
    the model's own answers, even a harmless set written by others is shifted; `trusted` examples
    of the same kind set the threshold accordingly.

    Args:
        model: The model to be trained; adapters and edits in force act.
        dataset: A JSON Lines file whose rows have `messages`, or `prompt` and `response`; or
            conversations, which may be a stream.
        directions: Directions pointing to misaligned, or a monitor, whose projections are used.
        reference: `"own"`: the model answers the prompts itself. Or reference answers: a set (file
            or conversations) that answers the same prompts, or `{prompt: answer}`. They are held
            in memory.
        layers: Layers whose mean projection is used; by default the one with the highest held-out
            AUROC of the directions, or the middle one of theirs. Not with a monitor.
        trusted: Harmless examples of the same kind; the threshold is the lowest score that at most
            `flag_share` of them exceed. Otherwise it is how far the highest `flag_share` of the
            reference answers project above their median.
        flag_share: See `trusted`.
        out: An SQLite file to which scores are written, block by block. A rerun resumes after
            the last complete block, with the same result.
        **options: See `ScreenOptions`.

    Raises:
        ValueError: If the set is empty, a row is broken (its line is named; what came before it
            is in `out`), a prompt has no reference answer, directions do not fit the model, or
            `out` holds something else.
    """
    source = str(dataset) if isinstance(dataset, (str, Path)) else "conversations"
    how, own = ScreenSettings(**options), isinstance(reference, str) and reference == "own"
    parts, first = _peeked(blocks(examples(dataset), how.block), source)
    scorer = Scorer(
        model=model,
        readout=screen_readout(model, directions, layers, [one.conversation for one in first]),
        references=None if own else References(reference),
        how=how,
    )
    benign = None if trusted is None else _trusted_scores(scorer, trusted)
    store = None if out is None else Store(out, "screen", scorer.settings(directions))
    old, tally = iter(store or ()), Tally(how.keep, how.seed)
    with bar(desc=f"screen {source}", unit="row", shown=how.progress) as shown:
        for part in parts:
            scored = kept_rows(islice(old, len(part)), part, str(out))
            if len(scored) < len(part):
                before, scored = scored, scorer(part)
                if store is not None and leads():
                    if before:
                        # a broken row cut this block short, so the whole block is scored again
                        store.remove(one.row for one in before)
                    scored = kept_rows(store.add(map(vars, scored)), part, str(out))
            tally.add(scored)
            shown.update(len(part))
    if next(old, None) is not None:
        raise ValueError(f"{out} holds scores of more examples than {source} has")
    limit, rule = _threshold(tally, benign, flag_share, source)
    pooled = isinstance(directions, Monitor) and bool(directions.record["pooled"])
    found = _result(scorer, source, "own" if own else reference, tally, limit, rule)
    return replace(found, unit="log-odds") if pooled else found


def _peeked(
    parts: Iterable[list[Example]], source: str
) -> tuple[Iterable[list[Example]], list[Example]]:
    """The blocks, and the first of them."""
    rest = iter(parts)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"the dataset ({source}) has no row to screen")
    return chain([first], rest), first


def _trusted_scores(scorer: Scorer, trusted: Sequence[Conversation]) -> Float[np.ndarray, " n"]:
    warn_of_repeats(trusted, "trusted conversations")
    parts = blocks(examples(trusted, "trusted "), scorer.how.block)
    found = [one.score for part in parts for one in scorer(part) if one.score is not None]
    if not found:
        raise ValueError("trusted has no example with a score, so it cannot set a threshold")
    return np.array(found)


def _threshold(
    tally: Tally, trusted: np.ndarray | None, flag_share: float, source: str
) -> tuple[float, str]:
    if tally.n == 0:
        raise ValueError(
            f"none of the {tally.unscored} examples of {source} has a score: the model's own "
            "answers are empty; give reference answers"
        )
    if trusted is not None:
        rule = f"the score that at most {flag_share:.1%} of {len(trusted)} trusted examples exceed"
        above = int(flag_share * len(trusted) + 1e-9)
        return float(np.sort(trusted)[-1 - above]), rule
    spread = np.array(tally.references.values)
    rule = f"how far the top {flag_share:.1%} of the reference answers lie above their median"
    return float(np.quantile(spread, 1 - flag_share) - np.median(spread)), rule


def _result(
    scorer: Scorer, source: str, reference: Reference, tally: Tally, threshold: float, rule: str
) -> Screen:
    mean = tally.mean()
    named = str(reference) if isinstance(reference, (str, Path)) else "reference answers"
    return Screen(
        model=scorer.model.name,
        source=source,
        reference="the model's own answers" if scorer.references is None else named,
        columns=scorer.readout.columns,
        n=tally.n,
        unscored=tally.unscored,
        expected=(mean.estimate, mean.low, mean.high),
        threshold=threshold,
        rule=rule,
        n_flagged=tally.above(threshold),
        worst=tuple(tally.worst()),
        scores=tuple(tally.scores.values),
    )
