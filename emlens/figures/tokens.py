"""Coloured tokens in a notebook or a page, through CircuitsVis, self-contained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class TokenView:
    """Tokens on a background coloured by their values: blue above zero, red below.

    A notebook shows it at the end of a cell. `str(view)` is its HTML: 1.3 MB, including the
    scripts of CircuitsVis, with no external resources.

    Attributes:
        tokens: The tokens, as text.
        values: The value of each token.
        title: What is shown, above the tokens.
        unit: Unit of the values.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    title: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values) or not self.tokens:
            raise ValueError(
                f"a token view needs a value per token, and at least one token; got "
                f"{len(self.tokens)} tokens and {len(self.values)} values"
            )

    def __str__(self) -> str:
        from circuitsvis.tokens import colored_tokens

        # CircuitsVis interprets tokens as markup, both in its script and on the page
        shown = [escape(token).replace("\n", "\u21b5\n") for token in self.tokens]
        inside = colored_tokens(shown, list(self.values)).local_src
        low, high = min(self.values), max(self.values)
        unit = f" {self.unit}" if self.unit else ""
        caption = f"{self.title} ({low:+.3g} to {high:+.3g}{unit})".strip()
        return f"<div><p>{escape(caption)}</p>{inside}</div>"

    def _repr_html_(self) -> str:
        return str(self)

    def save(self, path: str | Path) -> Path:
        """Write a page that shows it; the page works offline."""
        from emlens._files import atomic_write
        from emlens._reading import expanded

        page = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<title>{escape(self.title or 'tokens')}</title></head><body>{self}</body></html>"
        )
        path = expanded(path)
        atomic_write(path, page)
        return path


def token_view(
    tokens: Sequence[str], values: Sequence[float], *, title: str = "", unit: str = ""
) -> TokenView:
    """Colour tokens by their values.

    Raises:
        ValueError: If the numbers of tokens and values differ, or there are none.
    """
    return TokenView(tuple(tokens), tuple(float(value) for value in values), title, unit)
