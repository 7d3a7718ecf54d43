"""Token by token: against the sums, with padding left out, and safe to show."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from emlens import Add, Direction, influence
from emlens.directions import Directions, Provenance
from emlens.figures.tokens import token_view
from emlens.measures import TokenInfluence, TokenProjections, token_influence, token_projections
from emlens.text import Conversation, Corpus, Document
from tests.measures.test_influence import TEXT, direction
from tests.support.data import conversations


def test_tokens_add_up_to_the_influence_of_their_documents(hooked_llama):
    x = direction(hooked_llama)
    found = token_influence(hooked_llama, TEXT, x, dose=0.2, token_budget=40)
    whole = influence(hooked_llama, TEXT, {"x": x}, doses=(0.2,), controls=0)
    assert found.names == whole.documents
    for i, (kl, change, base) in enumerate(
        zip(found.kl, found.loss_change, found.base_loss, strict=True)
    ):
        assert np.nansum(kl) == pytest.approx(whole.kl[0][0][i], abs=1e-4)
        assert np.nansum(base) == pytest.approx(whole.base[i], abs=1e-4)
        assert np.nansum(change) == pytest.approx(whole.losses[0][0][i] - whole.base[i], abs=1e-4)
        assert np.isnan(kl[0])
        assert len(kl) == len(found.texts[i]) == whole.counts[i] + 1
        assert "".join(found.texts[i]) == TEXT.documents[i].text


def test_the_top_tokens_are_those_with_the_largest_change_and_show_their_context(hooked_llama):
    found = token_influence(hooked_llama, TEXT, direction(hooked_llama))
    top = found.top(3)
    every = np.concatenate([np.asarray(row) for row in found.kl])
    assert list(top["KL [nats]"]) == pytest.approx(sorted(every[~np.isnan(every)])[-3:][::-1])
    row = top.iloc[0]
    assert f"[[{row['token']}]]" in row["context"]
    by_loss = found.top(1, by="loss change").iloc[0]["loss change [nats]"]
    assert abs(by_loss) == pytest.approx(np.nanmax(np.abs(np.concatenate(found.loss_change))))
    with pytest.raises(ValueError, match="unknown column 'loss'; choose 'KL', 'loss change'"):
        found.top(by="loss")


def test_texts_are_ranked_and_results_can_be_kept(hooked_llama, tmp_path):
    short = Corpus("short", (Document("one", "rain"), *TEXT.documents, Document("none", "")))
    x = [Add(direction(hooked_llama))]
    found = token_influence(hooked_llama, short, x, name="steering")
    assert found.skipped == 2
    table = found.table()
    assert list(table["KL [nats/token]"]) == sorted(table["KL [nats/token]"], reverse=True)
    assert len(table) == len(found.texts) - 1 == len(TEXT)
    again = TokenInfluence.load(found.save(tmp_path / "tokens.json"))
    assert again.table().equals(table)
    assert "steering on short" in found._repr_html_()
    assert found.plot().get_xlabel() == "position in the text"


def test_long_conversations_are_read_whole_and_nothing_to_predict_is_refused(hooked_llama):
    long = [Conversation.of("tell me a story " * 60, "fruit and rain " * 20)]
    found = token_influence(hooked_llama, long, direction(hooked_llama))
    assert len(found.kl[0]) > 128
    nothing = Corpus("short", (Document("one", "rain"),))
    with pytest.raises(ValueError, match="no text has a counted token after another"):
        token_influence(hooked_llama, nothing, [Add(direction(hooked_llama))])
    several = Directions({0: torch.ones(32), 1: torch.ones(32)}, "resid_post", Provenance("x"))
    with pytest.raises(TypeError, match="'the edit' is a Directions; give one layer"):
        token_influence(hooked_llama, TEXT, several)


def test_conversations_are_looked_at_through_their_mask(hooked_llama):
    data = conversations("bad", 3)
    found = token_influence(hooked_llama, data, direction(hooked_llama), tokens="response")
    batches = hooked_llama.batches(data)
    counted = sum(int(batch.targets("response").sum()) for batch in batches)
    assert sum(np.isfinite(row).sum() for row in found.kl) == counted
    assert found.source == "conversations"


def test_projections_equal_a_plain_dot_product(hooked_llama, tmp_path):
    data = conversations("bad", 4)
    x = direction(hooked_llama)
    found = token_projections(hooked_llama, data, x, token_budget=50)
    norms = []
    for i, conversation in enumerate(data):
        (batch,) = hooked_llama.batches([conversation])
        residual = hooked_llama.residuals(batch, 1)[1][0]
        norms.append(residual.norm(dim=-1))
        ratio = (residual @ x.unit().vector) / torch.tensor(found.values[i])
        assert ratio.std() / ratio.mean().abs() < 1e-4
        assert found.counted[i] == tuple(batch.mask("response")[0].tolist())
    assert float(ratio.mean()) == pytest.approx(float(torch.cat(norms).median()), rel=1e-4)
    table = found.table()
    first = np.asarray(found.values[0])[np.asarray(found.counted[0])]
    assert table.iloc[0, 2] == pytest.approx(first.mean())
    assert TokenProjections.load(found.save(tmp_path / "p.json")) == found
    assert "median residual norm" in found.plot().get_ylabel()


class _Tags(HTMLParser):
    """Tags of a page, with the names of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def test_a_view_is_whole_in_itself_and_shows_markup_as_text(hooked_llama):
    nasty = "</script><img src=x onerror=alert(1)>"
    page = str(token_view([nasty, " rain\n"], [0.5, -0.2], title="<b>", unit="nats"))
    assert nasty not in page
    assert "&lt;/script&gt;&lt;img" in page
    seen = _Tags()
    seen.feed(page)
    assert {tag for tag, _ in seen.found} == {"div", "p", "script"}
    # nothing is fetched: no source or link on a tag, no import, no network of packages in scripts
    assert not [at for _, names in seen.found for at in names if at in ("src", "href", "data")]
    script = page[page.index("<script") :]
    assert not re.search(r"\bimport\s*[({*\"']|\bfrom\s*[\"']https?:|importScripts", script)
    assert not re.search(r"unpkg|jsdelivr|cdnjs|esm\.sh|skypack|googleapis", page)
    assert "&lt;b&gt;" in page
    found = token_influence(hooked_llama, TEXT, direction(hooked_llama))
    assert "d1: KL under the edit" in found.view("d1").title
    seen = token_projections(hooked_llama, conversations("bad", 2), direction(hooked_llama))
    assert len(seen.view(1).tokens) == len(seen.texts[1])


def test_a_view_is_written_as_a_page(tmp_path):
    path = token_view(["a", "b"], [0.1, 0.2], title="t").save(tmp_path / "view.html")
    assert path.read_text().startswith("<!doctype html>")


def test_bad_input_is_refused(hooked_llama):
    x = direction(hooked_llama)
    with pytest.raises(ValueError, match="there is no text to look at"):
        token_influence(hooked_llama, Corpus("none", ()), x)
    with pytest.raises(ValueError, match="is zero"):
        token_influence(hooked_llama, TEXT, x * 0)
    with pytest.raises(ValueError, match="conversations is empty"):
        token_projections(hooked_llama, [], x)
    with pytest.raises(ValueError, match="the direction has width 7, but tiny-llama has"):
        token_projections(
            hooked_llama, [Conversation.of("Hi", "yes")], Direction.of(torch.ones(7), 1)
        )
    found = token_influence(hooked_llama, TEXT, x)
    with pytest.raises(ValueError, match="no text 'z'; there are d0"):
        found.view("z")
    with pytest.raises(ValueError, match="there are 8 texts, so none is number 9"):
        found.view(9)
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        token_view(["a", "b"], [1.0])
