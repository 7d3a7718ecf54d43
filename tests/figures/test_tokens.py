"""Coloured tokens: shown in a browser as they are, each on a ground of its own."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from emlens.figures.tokens import token_view
from tests.support.browser import WIDTHS, look

TOKENS = ("The", " cat", " <b>sat</b>", "\n", " &amp; on", " it") * 20
VALUES = (0.0, 2.0, -2.0, 0.5, -0.5, 1.0) * 20


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_tokens_needs_nothing_from_outside_and_fits(chromium, tmp_path, width):
    view = token_view(TOKENS, VALUES, title="KL <i>by</i> token", unit="nats")
    seen = look(chromium, view.save(tmp_path / "tokens.html"), width)
    assert seen.complaints == []
    assert "KL <i>by</i> token (-2 to +2 nats)" in seen.text
    plain = " ".join(seen.text.split())
    assert plain.count("cat <b>sat</b>") == plain.count("&amp; on it") == 20


def test_tokens_above_zero_are_blue_and_those_below_are_red(chromium, tmp_path):
    view = token_view(["W" * 30, "M" * 30], [1.0, -1.0])
    seen = look(chromium, view.save(tmp_path / "tokens.html"), 1280)
    with Image.open(io.BytesIO(seen.screenshot)) as shot:
        count = {colour: number for number, colour in shot.convert("RGB").getcolors(1 << 24) or ()}
    blue = sum(n for (r, _, b), n in count.items() if b > r + 100)
    red = sum(n for (r, _, b), n in count.items() if r > b + 100)
    assert min(blue, red) > 1000


def test_a_value_for_each_token_is_asked_for():
    with pytest.raises(ValueError, match="got 2 tokens and 1 values"):
        token_view(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="at least one token"):
        token_view([], [])
