"""`Monitor`: a threshold on a projection, calibrated on held-out conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from emlens._door import guard_methods, guarded
from emlens._reading import expanded
from emlens._results import Result
from emlens._stats import Interval
from emlens._tensors import read_tensors, whole_record, write_tensors
from emlens.directions import mean_diff
from emlens.directions.held_out import prompts_of
from emlens.hooked import BatchOptions, HookedModel, ReadOptions
from emlens.hooked.options import ReadSettings
from emlens.hooked.sites import Layers, check_site
from emlens.text import Conversation, Pair, TokenMask
from emlens.text.conversation import names
from emlens.text.repeats import repeats_told
from emlens.watch.held_out import Aligned, HeldOut
from emlens.watch.monitor_fit import (
    HELD_OUT,
    Labelled,
    areas,
    check_choice,
    check_kept,
    chosen_columns,
    evidence,
    logistic,
    rule,
    warn_of_leak,
)
from emlens.watch.projections import AnyDirections, Readout, readout_of
from emlens.watch.roc import Roc, auroc, numbered, threshold_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "monitor"


class MonitorScores(Result):
    """Scores of conversations, and which are flagged.

    Attributes:
        names: Name of each conversation, `[n]`.
        scores: Its score, `[n]`.
        threshold: A score above it is flagged.
        tokens: Counted tokens, `[n]`.
        columns: Names of the projections that the score is made of, `[k]`.
        projections: Those projections, in units of the median residual norm, `[n, k]`.
    """

    AXES = {"scores": "names", "tokens": "names"}

    names: tuple[str, ...]
    scores: tuple[float, ...]
    threshold: float
    tokens: tuple[int, ...]
    columns: tuple[str, ...]
    projections: Float[np.ndarray, "names columns"]

    @property
    def flagged(self) -> tuple[str, ...]:
        """Names of the conversations above the threshold."""
        return tuple(
            name
            for name, score in zip(self.names, self.scores, strict=True)
            if score > self.threshold
        )

    def table(self) -> pd.DataFrame:
        """One row per conversation: score, whether it is flagged, and each projection."""
        frame = pd.DataFrame({"conversation": self.names, "score": self.scores})
        frame["flagged"] = frame["score"] > self.threshold
        frame["tokens"] = self.tokens
        for name, values in zip(self.columns, self.projections.T, strict=True):
            frame[f"projection, {name} [median norms]"] = values
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """All scores, highest first, and the threshold."""
        from emlens.figures.lines import line_bands

        ranked = np.sort(self.scores)[::-1]
        return line_bands(
            {"score": (np.arange(1, len(ranked) + 1), ranked)},
            x_label="conversations, highest score first",
            y_label="score",
            reference=(self.threshold, "threshold"),
            ax=ax,
        )


@guard_methods
@dataclass(frozen=True, eq=False)
class Monitor:
    """A score of conversations and a threshold, with their performance on held-out conversations.

    `Monitor.fit` makes one, `score` applies it, `table` and `roc` describe its performance.

    Attributes:
        readout: The projections that the score is made of, and their weights.
        threshold: A score above it is flagged.
        rule: How it was chosen.
        held_out: Conversations that it was not fitted to.
        choice: Cross-validated AUROC of every projection on the fitted part, by column.
        max_false_alarms: The rule's limit; None for Youden's rule.
        record: Further settings of the fit.
        model: The model that it reads; `on` gives it one after loading.
        calibration: Scores of the conversations that `calibrated` set the threshold on; None if
            the held-out ones were used.
    """

    readout: Readout
    threshold: float
    rule: str
    held_out: HeldOut
    choice: dict[str, float]
    max_false_alarms: float | None
    record: dict[str, object] = field(default_factory=dict)
    model: HookedModel | None = None
    calibration: Aligned | None = None

    @classmethod
    @guarded
    def fit(
        cls,
        model: HookedModel,
        aligned: Sequence[Conversation] | Sequence[Pair],
        misaligned: Sequence[Conversation] | None = None,
        directions: AnyDirections | None = None,
        *,
        layers: Layers | None = None,
        best: int = 1,
        pooled: bool = False,
        regularisation: float = 1.0,
        max_false_alarms: float | None = 0.05,
        held_out: float = HELD_OUT,
        seed: int = 0,
        **options: Unpack[ReadOptions],
    ) -> Monitor:
        """Choose a projection and a threshold on two parts that share no prompt.

        The score of a conversation is the mean over its answer tokens of the residual's
        component along a direction, in units of the median residual norm. The layer and the
        direction, or the weights of several, are chosen on the fitted part; all figures are those
        of the held-out part. Directions that were extracted from the same conversations have seen
        the held-out ones, which makes the figures too good. Give no directions, to extract a mean
        difference from the fitted part alone, or directions from other data.

        Args:
            model: The model to read; adapters and edits in force act.
            aligned: Aligned conversations; or pairs, which have both sides.
            misaligned: Misaligned conversations.
            directions: Pointing to misaligned; of any number of layers, or several by name. By
                default the mean difference of the fitted part.
            layers: Use the mean projection at these layers, instead of choosing.
            best: How many projections to choose; the score is their mean.
            pooled: Fit a logistic regression (scikit-learn) instead, to the projections at
                `layers`, all of them by default.
            regularisation: Its `C`.
            max_false_alarms: The threshold raises at most this share of false alarms among new
                aligned conversations like the held-out ones: `k` of these `n` score higher, with
                `(k + 1) / (n + 1)` at most the share. A share of 0.05 needs 19 held-out prompts;
                with fewer, a warning gives the share that the highest score promises. None
                maximises hits minus false alarms, without a promise.
            held_out: Share of prompts that is held out.
            seed: Seed of the split, the folds and the bootstrap.
            **options: See `ReadOptions`.

        Answers of a data set differ from those of the model: before watching a model, set the
        threshold on the model's own answers with `calibrated`.

        Raises:
            ValueError: If a side is empty or too small to split, directions do not fit the
                model, or a setting is out of range.
        """
        check_choice(best, pooled)
        data = Labelled.of(aligned, misaligned)
        fitted, truth = data.fitted(held_out, seed), data.truth
        tokens, own = ReadSettings(**options).tokens, None
        if directions is None:
            with repeats_told():
                sides = data.sides_of(fitted)
                directions = own = mean_diff(model, *sides, seed=seed, **options)
        else:
            warn_of_leak(directions, data)
        columns = readout_of(model, directions, data.items_of(fitted), **options)
        values, counts = columns.read(model, data.conversations, description="monitor", **options)
        choice = areas(values[fitted], truth[fitted], data.keys_of(fitted), seed)
        if own is not None and own.auroc:
            # these directions have seen the fitted part, so their own figures are cross-fitted
            choice = np.array([own.auroc[layer] for layer in columns.layers])
        if pooled:
            places = chosen_columns(columns, choice, layers, len(choice), model.n_layers)
            weights, offset = logistic(values[fitted][:, places], truth[fitted], regularisation)
        else:
            places = chosen_columns(columns, choice, layers, best, model.n_layers)
            weights, offset = [1 / len(places)] * len(places), 0.0
        readout = columns.keeping(places, weights, offset)
        scores = readout.score(values[:, places])
        held = evidence(model, data, fitted, scores, counts, tokens, seed)
        return cls(
            readout=readout,
            threshold=threshold_for(held.scores, held.truth, held.groups, max_false_alarms),
            rule=rule(held, max_false_alarms),
            held_out=held,
            choice=dict(zip(columns.columns, choice.tolist(), strict=True)),
            max_false_alarms=max_false_alarms,
            record={
                "adapter": model.active_adapter,
                "tokens": tokens,
                "pooled": pooled,
                "fitted": int(fitted.sum()),
                "seed": seed,
            },
            model=model,
        )

    # -- using it -----------------------------------------------------------------------------

    @guarded
    def score(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> MonitorScores:
        """Score conversations, batched.

        Args:
            conversations: Conversations with answers.
            max_tokens: Cut longer conversations at their end.
            **options: See `BatchOptions`.

        Raises:
            ValueError: If there are none, one has no answer, or the monitor has no model.
        """
        if self.model is None:
            raise ValueError(
                "this monitor was loaded without a model; give it one with monitor.on(model)"
            )
        values, counts = self.readout.read(
            self.model,
            conversations,
            tokens=self._tokens,
            max_tokens=max_tokens,
            description="monitor",
            **options,
        )
        return MonitorScores(
            names=tuple(names(conversations)),
            scores=tuple(self.readout.score(values).tolist()),
            threshold=self.threshold,
            tokens=tuple(counts.tolist()),
            columns=self.readout.columns,
            projections=values,
        )

    @guarded
    def calibrated(
        self,
        conversations: Sequence[Conversation],
        max_false_alarms: float = 0.05,
        **options: Unpack[BatchOptions],
    ) -> Monitor:
        """The same monitor with a threshold set on aligned conversations of your own.

        The promise of a threshold holds for conversations like those it was set on. Set it on
        answers of the model before any finetuning, to prompts like those it will watch.

        Args:
            conversations: Aligned conversations, none of which the monitor was fitted to.
            max_false_alarms: Share of false alarms among new ones, at most; see `fit`.
            **options: See `BatchOptions`.

        Raises:
            ValueError: If they have fewer than two prompts, one has no answer, or the monitor has
                no model.

        Examples:
            >>> own = monitor.calibrated(base_answers, max_false_alarms=0.05)
        """
        keys = prompts_of(conversations)
        if len(set(keys)) < 2:
            raise ValueError(
                f"a threshold needs conversations of at least two prompts, not {len(set(keys))}"
            )
        scores = np.asarray(self.score(conversations, **options).scores)
        found = Aligned(scores, numbered(keys))
        return replace(
            self,
            threshold=found.threshold(max_false_alarms),
            rule=found.rule(max_false_alarms, "prompts it was calibrated on"),
            max_false_alarms=max_false_alarms,
            calibration=found,
        )

    def on(self, model: HookedModel) -> Monitor:
        """The same monitor reading `model`, which must be the one it was fitted on.

        Raises:
            ValueError: If width, layers or name differ.
        """
        self.readout.check(model)
        if model.name != self.readout.model:
            raise ValueError(
                f"this monitor was fitted on {self.readout.model!r}, and this model is "
                f"{model.name!r}: its threshold means nothing there. Fit one for this model; if "
                "both are the same model, give wrap or load the same name"
            )
        return replace(self, model=model)

    # -- how good it is -----------------------------------------------------------------------

    @property
    def auroc(self) -> float:
        """AUROC on the held-out conversations."""
        return auroc(self.held_out.scores, self.held_out.truth)

    @property
    def promised(self) -> Interval | None:
        """Expected share of false alarms among new conversations; None for Youden's rule.

        The interval covers the true share for 95% of thresholds set in this way.
        """
        if self.max_false_alarms is None:
            return None
        return self._set_on.promise(self.threshold)

    @property
    def _set_on(self) -> Aligned:
        return self.calibration or self.held_out.aligned

    def roc(self) -> Roc:
        """The ROC curve on the held-out conversations, with the interval of its area."""
        return self.held_out.roc(self.threshold)

    def table(self) -> pd.DataFrame:
        """Figures on the held-out conversations, each with its 95% interval.

        `false alarms of new conversations` is what the threshold promises, with the interval in
        which their true share lies, for conversations like those that it was set on. `at the
        threshold` counts the held-out ones; for cross-fitted rates the threshold was set on other
        prompts. Intervals are over prompts; those of cross-fitted rates do not include the
        variation of the threshold between data sets.
        """
        held, seed = self.held_out, self._seed
        paired, n_paired = held.paired(seed)
        found = [("AUROC", held.auroc(), len(held.scores)), *held.length_rows()]
        found.append(("paired accuracy, same prompt", paired, n_paired))
        if (promised := self.promised) is not None:
            set_on = self._set_on.scores
            found.append(("false alarms of new conversations", promised, len(set_on)))
        for name, (rate, n) in held.rates(self.threshold).items():
            found.append((f"{name} at the threshold", rate, n))
        if self.calibration is None:
            for name, (rate, n) in held.cross_fitted_rates(self.max_false_alarms, seed).items():
                found.append((f"{name}, cross-fitted", rate, n))
        rows = [
            {"figure": name, "estimate": one.estimate, "low": one.low, "high": one.high, "n": n}
            for name, one, n in found
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ROC curve on the held-out conversations."""
        return self.roc().plot(ax)

    # -- keeping it ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: vectors, weights and the held-out scores; atomic."""
        path = expanded(path)
        path = path if path.suffix else path.with_suffix(".safetensors")
        tensors = {
            "vectors": self.readout.vectors,
            "weights": torch.from_numpy(self.readout.weights),
            **self.held_out.tensors(),
            **(self.calibration.tensors() if self.calibration else {}),
        }
        record = {
            "names": self.readout.names,
            "layers": self.readout.layers,
            "offset": self.readout.offset,
            "site": self.readout.site,
            "model": self.readout.model,
            "threshold": self.threshold,
            "rule": self.rule,
            "max_false_alarms": self.max_false_alarms,
            "slope": self.held_out.slope,
            "longer": self.held_out.longer,
            "choice": self.choice,
            "record": self.record,
        }
        return write_tensors(path, KIND, tensors, record)

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> Monitor:
        """Read what `save` wrote, with or without a model to watch.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no monitor, or the model is not the one it was fitted on.
        """
        path = expanded(path)
        tensors, record = read_tensors(path, KIND)
        with whole_record(path, KIND):
            found = cls._of(tensors, record)
        return found if model is None else found.on(model)

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor], record: Mapping) -> Monitor:
        check_kept(tensors, record)
        readout = Readout(
            names=tuple(record["names"]),
            layers=tuple(record["layers"]),
            vectors=tensors["vectors"],
            weights=tensors["weights"].numpy(),
            offset=record["offset"],
            site=check_site(record["site"]),
            model=record["model"],
        )
        return cls(
            readout=readout,
            threshold=record["threshold"],
            rule=record["rule"],
            held_out=HeldOut.of_tensors(tensors, record["slope"], record["longer"]),
            choice=record["choice"],
            max_false_alarms=record["max_false_alarms"],
            record=record["record"],
            calibration=Aligned.of_tensors(tensors),
        )

    def __repr__(self) -> str:
        first, rest = self.readout.columns[:4], self.readout.columns[4:]
        where, more = ", ".join(first), f" and {len(rest)} more" if rest else ""
        promised = self.promised
        told = f", {promised:.1%} false alarms of new conversations" if promised else ""
        return (
            f"Monitor({where}{more} of {self.readout.model}, held-out AUROC {self.auroc:.3f} on "
            f"{len(self.held_out.scores)} conversations, threshold {self.threshold:.4g}: "
            f"{self.rule}{told})"
        )

    def _repr_html_(self) -> str:
        table = self.table().to_html(index=False, float_format="%.3f", na_rep="", escape=True)
        return f"<p><b>{escape(repr(self))}</b></p>{table}"

    @property
    def _seed(self) -> int:
        return int(str(self.record["seed"]))

    @property
    def _tokens(self) -> TokenMask:
        return self.record["tokens"]  # type: ignore[return-value]
