"""Token by token: what an edit changes in a text, and where a text lies along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from emlens._door import guarded
from emlens._kinds import kind
from emlens._progress import bar
from emlens._results import Result
from emlens.directions import Direction, Directions, residual_norm
from emlens.directions.fits import check_fits
from emlens.edits import Add
from emlens.hooked import CorpusOptions, HookedModel, ReadOptions, pools
from emlens.hooked.condition import ConditionLike
from emlens.hooked.options import CorpusSettings, ReadSettings
from emlens.measures.doses import named
from emlens.measures.importance import slopes_by_token
from emlens.measures.scoring import TokenValues, row_influence, with_tokens
from emlens.text import Conversation, Corpus, TokenMask

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from emlens.figures.tokens import TokenView

CONTEXT = 12
"""Tokens shown before and after one."""

_COLUMNS = {
    "KL": "kl",
    "loss change": "loss_change",
    "base loss": "base_loss",
    "importance": "importance",
}


class TokenInfluence(Result):
    """What an edit changes in the prediction of every token.

    Attributes:
        what: What the edit is called.
        texts: Tokens of each text, as text, `[texts][pos]`.
        names: Name of each text.
        base_loss: Loss of each token in nats, `[texts][pos]`; NaN where nothing predicts it.
        loss_change: Its change under the edit, nats.
        kl: `KL(base || edited)` where it is predicted, nats.
        source: Name of the corpus.
        skipped: Texts of fewer than two tokens.
        importance: If requested, the derivative of the summed KL of the text by a factor on what
            the edit adds at each token, nats: to first order, the KL lost without the edit there.
    """

    AXES = {
        "names": "texts",
        "importance": "texts? tokens*",
        "texts": "texts tokens*",
        "base_loss": "texts tokens*",
        "loss_change": "texts tokens*",
        "kl": "texts tokens*",
    }

    what: str
    texts: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    base_loss: tuple[tuple[float, ...], ...]
    loss_change: tuple[tuple[float, ...], ...]
    kl: tuple[tuple[float, ...], ...]
    source: str
    skipped: int = 0
    importance: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, kept: TokenValues, condition: str, source: str) -> TokenInfluence:
        """What one condition changes, of the values that were kept."""
        rows = range(len(kept.texts))
        base, losses = kept.base, kept.losses[condition]
        change = [np.subtract(losses[i], base[i]).tolist() for i in rows]
        return cls(
            what=condition,
            texts=tuple(kept.texts[i] for i in rows),
            names=tuple(kept.names[i] for i in rows),
            base_loss=tuple(base[i] for i in rows),
            loss_change=tuple(map(tuple, change)),
            kl=tuple(kept.kl[condition][i] for i in rows),
            source=source,
            skipped=sum(not np.isfinite(base[i]).any() for i in rows),
        )

    def top(self, k: int = 10, by: str = "KL") -> pd.DataFrame:
        """The `k` tokens that change most, with their context.

        Args:
            k: How many.
            by: `"KL"`, `"loss change"` (either way), `"base loss"` or `"importance"`.

        Raises:
            ValueError: If there is no such column.
        """
        import pandas as pd

        values = self._column(by)
        places = [
            (abs(value), text, position)
            for text, row in enumerate(values)
            for position, value in enumerate(row)
            if np.isfinite(value)
        ]
        rows = []
        for _, text, position in sorted(places, key=lambda place: -place[0])[:k]:
            rows.append(
                {
                    "text": self.names[text],
                    "position": position,
                    "token": self.texts[text][position],
                    "KL [nats]": self.kl[text][position],
                    "loss change [nats]": self.loss_change[text][position],
                    "base loss [nats]": self.base_loss[text][position],
                    **(
                        {"importance [nats]": self.importance[text][position]}
                        if self.importance
                        else {}
                    ),
                    "context": self._context(text, position),
                }
            )
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """One row per text, those that change most first, nats per token."""
        import pandas as pd

        rows = []
        for i, name in enumerate(self.names):
            counted = np.isfinite(self.base_loss[i])
            if not counted.any():
                continue
            kl, change = np.asarray(self.kl[i]), np.asarray(self.loss_change[i])
            rows.append(
                {
                    "text": name,
                    "tokens": int(counted.sum()),
                    "KL [nats/token]": float(kl[counted].mean()),
                    "loss change [nats/token]": float(change[counted].mean()),
                    "largest KL [nats]": float(kl[counted].max()),
                    "at token": self.texts[i][int(np.nanargmax(np.where(counted, kl, np.nan)))],
                }
            )
        frame = pd.DataFrame(rows)
        by = "KL [nats/token]"
        return frame.sort_values(by, ascending=False, ignore_index=True) if rows else frame

    def view(self, text: int | str = 0, by: str = "KL") -> TokenView:
        """The tokens of one text, coloured by what changes, through CircuitsVis.

        Raises:
            ValueError: If there is no such text or column.
        """
        from emlens.figures.tokens import token_view

        i = _place(self.names, text)
        values = np.nan_to_num(np.asarray(self._column(by)[i]))
        title = f"{self.names[i]}: {by} under {self.what}"
        return token_view(self.texts[i], values.tolist(), title=title, unit="nats")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean KL by position in the text."""
        from emlens.figures.lines import line_bands

        longest = max(map(len, self.kl))
        table = np.full((len(self.kl), longest), np.nan)
        for row, values in zip(table, self.kl, strict=True):
            row[: len(values)] = values
        seen = np.isfinite(table).any(0)
        mean = np.nanmean(table[:, seen], axis=0)
        return line_bands(
            {self.what: (np.arange(longest)[seen], mean)},
            x_label="position in the text",
            y_label=f"mean KL on {self.source} [nats]",
            ax=ax,
        )

    def _column(self, by: str) -> tuple[tuple[float, ...], ...]:
        if by not in _COLUMNS:
            raise ValueError(f"unknown column {by!r}; choose {', '.join(map(repr, _COLUMNS))}")
        if not (found := getattr(self, _COLUMNS[by])):
            raise ValueError("importance was not measured; call token_influence(importance=True)")
        return found

    def _context(self, text: int, position: int) -> str:
        tokens = self.texts[text]
        before = "".join(tokens[max(0, position - CONTEXT) : position])
        after = "".join(tokens[position + 1 : position + 1 + CONTEXT])
        return f"{before}[[{tokens[position]}]]{after}"

    def _repr_html_(self) -> str:
        top = self.top().to_html(index=False, float_format="%.3f", escape=True)
        return (
            f"<p><b>{escape(f'{self.what} on {self.source}: tokens that change most')}</b></p>{top}"
        )


class TokenProjections(Result):
    """Where every token of some conversations lies along a direction: the monitoring view.

    Attributes:
        direction: How the direction was made.
        layer: Its layer.
        texts: Tokens of each conversation, as text, `[conversations][pos]`.
        names: Name of each conversation.
        counted: Whether a token is under the mask.
        values: Projection on the unit direction, as a share of the median residual norm.
    """

    AXES = {
        "names": "texts",
        "texts": "texts tokens*",
        "counted": "texts tokens*",
        "values": "texts tokens*",
    }

    direction: str
    layer: int
    texts: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    counted: tuple[tuple[bool, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def table(self) -> pd.DataFrame:
        """One row per conversation: mean and largest projection of the counted tokens."""
        import pandas as pd

        rows = []
        for i, name in enumerate(self.names):
            counted = np.asarray(self.counted[i])
            values = np.asarray(self.values[i])[counted]
            tokens = [t for t, mine in zip(self.texts[i], counted, strict=True) if mine]
            most = int(values.argmax()) if len(values) else 0
            rows.append(
                {
                    "conversation": name,
                    "tokens": len(values),
                    "mean projection [median residual norm]": values.mean()
                    if len(values)
                    else None,
                    "largest": values[most] if len(values) else None,
                    "at token": tokens[most] if tokens else "",
                }
            )
        return pd.DataFrame(rows)

    def view(self, conversation: int | str = 0) -> TokenView:
        """The tokens of one conversation, coloured by their projection, through CircuitsVis.

        Raises:
            ValueError: If there is no such conversation.
        """
        from emlens.figures.tokens import token_view

        i = _place(self.names, conversation)
        title = f"{self.names[i]}: projection on {self.direction}, layer {self.layer}"
        return token_view(
            self.texts[i], self.values[i], title=title, unit="of the median residual norm"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Projection along each conversation, up to eight of them, without the first token.

        The residual of the first token is many times longer than that of others (an attention
        sink), and would set the scale; `values` and `table` have it.
        """
        from emlens.figures.lines import line_bands

        curves = {
            name: (np.arange(len(values))[1:], np.asarray(values)[1:])
            for name, values in list(zip(self.names, self.values, strict=True))[:8]
        }
        return line_bands(
            curves,
            x_label="position in the conversation (the first token is left out)",
            y_label=f"projection, layer {self.layer} [median residual norm]",
            reference=0.0,
            ax=ax,
        )


kind(Direction | ConditionLike, words="a direction or a condition")(lambda _, given: given)


@guarded
def token_influence(
    model: HookedModel,
    corpus: Corpus | Sequence[Conversation],
    condition: Direction | ConditionLike,
    *,
    dose: float = 0.2,
    name: str = "the edit",
    tokens: TokenMask = "all",
    importance: bool = False,
    **options: Unpack[CorpusOptions],
) -> TokenInfluence:
    """Return what an edit changes in the prediction of every token of a text.

    Three numbers are kept for each token, so this suits texts to look at; `emlens.influence` sums
    over any corpus.

    Args:
        model: The model.
        corpus: Raw text, or conversations.
        condition: A direction, added at `dose`; or edits, an adapter's name, or both.
        dose: Norm of what is added, as a share of the median residual norm on the text.
        name: What it is called.
        tokens: Tokens that count; all tokens of raw text.
        importance: Measure for each token, counted or not, how much of the KL at the counted tokens
            comes from what is added there, by a gradient, one text at a time.
        **options: See `CorpusOptions`; conversations are read whole.

    Raises:
        ValueError: If there is no text, the direction is zero, or importance is asked of an
            adapter that is not plain LoRA.
        TypeError: If directions of several layers are given.

    Source:
        arXiv 2506.11618, section 4 (the importance of the tokens that are probed).

    Examples:
        >>> seen = token_influence(model, answers, "medical", tokens="response", importance=True)
        >>> seen.top(10, by="importance")
    """
    if not len(corpus):
        raise ValueError("there is no text to look at")
    n_all = len(corpus)
    corpus = with_tokens(model, corpus) if isinstance(corpus, Corpus) else corpus
    reading = CorpusSettings(**options)
    # conversations are read whole
    cut = reading.max_tokens if isinstance(corpus, Corpus) else None
    acting: ConditionLike
    if isinstance(condition, Directions):
        named({name: condition})  # type: ignore[dict-item]
        assert isinstance(condition, Direction)
        place = condition.layer
        how: Any = {"site": condition.site, "token_budget": reading.token_budget}
        with model.under([]):
            (size,) = residual_norm(model, corpus, place, max_tokens=cut, **how).values()
        acting = [Add(condition.scaled_to(dose * size))]
    else:
        acting = condition
    batches = model.batches(corpus, token_budget=reading.token_budget, max_tokens=cut)
    kept = TokenValues()
    _, _, _, counts = row_influence(
        model, batches, {name: acting}, tokens=tokens, progress=reading.progress, keep=kept
    )
    if not counts.any():
        raise ValueError("no text has a counted token after another token, so nothing is predicted")
    source = corpus.name if isinstance(corpus, Corpus) else "conversations"
    found = TokenInfluence.of(kept, name, source)
    if importance:
        found = replace(found, importance=_importance(model, corpus, acting, tokens, cut))
    return replace(found, skipped=found.skipped + n_all - len(corpus))


def _importance(
    model: HookedModel,
    corpus: Corpus | Sequence[Conversation],
    acting: ConditionLike,
    tokens: TokenMask,
    cut: int | None,
) -> tuple[tuple[float, ...], ...]:
    found: dict[int, tuple[float, ...]] = {}
    # one row per batch, so that an edit sees the tokens without padding
    for batch in model.batches(corpus, token_budget=1, max_tokens=cut):
        slopes = slopes_by_token(model, batch, acting, tokens)
        found[batch.index[0]] = tuple(slopes[0].tolist())
    return tuple(found[i] for i in range(len(found)))


@torch.no_grad()
@guarded
def token_projections(
    model: HookedModel,
    conversations: Sequence[Conversation],
    direction: Direction,
    **options: Unpack[ReadOptions],
) -> TokenProjections:
    """Return the projection of every token of some conversations onto a direction.

    Args:
        model: The model.
        conversations: The conversations.
        direction: The direction; its norm does not matter.
        **options: See `ReadOptions`, with a `token_budget` of 1024; all tokens are shown, tables
            count `tokens`.

    Raises:
        ValueError: If there are no conversations, or the direction is zero or of another width.
    """
    named({"direction": direction})
    check_fits(model, direction, "the direction")
    reading = ReadSettings(**{"token_budget": CorpusSettings.token_budget, **options})
    how: Any = {"site": direction.site, "token_budget": reading.token_budget}
    (size,) = residual_norm(model, conversations, direction.layer, **how).values()
    unit = direction.unit().vector / size
    batches = model.batches(conversations, token_budget=reading.token_budget)
    n, shown = len(conversations), TokenValues()
    found: dict[str, list] = {key: [()] * n for key in ("counted", "values")}
    for batch in bar(batches, desc="projections", unit="batch", shown=reading.progress):
        pool = pools.along(unit)
        read = model.residuals(batch, direction.layer, direction.site, pool)[direction.layer]
        real, mask = batch.attention_mask.bool().cpu(), batch.mask(reading.tokens).cpu()
        for row, place in enumerate(batch.index):
            found["values"][place] = tuple(read[row].cpu()[real[row]].tolist())
            found["counted"][place] = tuple(mask[row][real[row]].tolist())
        shown.note(model, batch)
    return TokenProjections(
        direction=direction.provenance.construction,
        layer=direction.layer,
        texts=tuple(shown.texts[i] for i in range(n)),
        names=tuple(shown.names[i] for i in range(n)),
        counted=tuple(found["counted"]),
        values=tuple(found["values"]),
    )


def _place(names: Sequence[str], text: int | str) -> int:
    if isinstance(text, str):
        if text not in names:
            raise ValueError(f"no text {text!r}; there are {', '.join(names[:5])} ...")
        return list(names).index(text)
    if not -len(names) <= text < len(names):
        raise ValueError(f"there are {len(names)} texts, so none is number {text}")
    return text % len(names)
