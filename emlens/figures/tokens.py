"""Coloured tokens in a notebook or a page, through CircuitsVis, with all it needs inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class TokenView:
    """Tokens on a ground coloured by a value each: blue above zero, red below.

    It shows itself at the end of a notebook cell; `str(view)` is its HTML, 1.3 MB with the scripts
    of CircuitsVis, and loads nothing from anywhere.

    Attributes:
        tokens: The tokens, as text.
        values: A value each.
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
                f"a token view needs a value per token, and one token at least; got "
                f"{len(self.tokens)} tokens and {len(self.values)} values"
            )

    def __str__(self) -> str:
        from circuitsvis.tokens import colored_tokens

        # CircuitsVis takes tokens for markup, in its script as well as on the page
        shown = [escape(token).replace("\n", "\u21b5\n") for token in self.tokens]
        inside = colored_tokens(shown, list(self.values)).local_src
        low, high = min(self.values), max(self.values)
        unit = f" {self.unit}" if self.unit else ""
        caption = f"{self.title} ({low:+.3g} to {high:+.3g}{unit})".strip()
        return f"<div><p>{escape(caption)}</p>{inside}</div>"

    def _repr_html_(self) -> str:
        return str(self)

    def save(self, path: str | Path) -> Path:
        """Write a page that shows it, offline as well."""
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
    """Colour tokens by a value each.

    Raises:
        ValueError: If there are not as many of one as of the other, or none.
    """
    return TokenView(tuple(tokens), tuple(float(value) for value in values), title, unit)
