"""Measures of adapters that change the LM head, against PEFT and plain sums over tokens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from peft import PeftModel

import emlens
from emlens.hooked.attach import attach
from emlens.hooked.load import ENGINES
from emlens.measures import token_influence
from emlens.measures.scoring import row_influence
from emlens.text import Corpus, Document
from tests.support.adapters import saved
from tests.support.data import conversations, pairs
from tests.support.models import D_MODEL, tiny_model
from tests.support.tokenizers import chatml_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "own head": {"modules_to_save": ["lm_head"]},
    "low-rank head": {"target_modules": ["lm_head"], "r": 2},
}
EACH = pytest.mark.parametrize("kind", KINDS)
PAIRS, DATA = pairs(4), conversations("bad", 4)
TEXTS = [f"{one.messages[0]['content']} {one.response}" for one in DATA]
CORPUS = Corpus("texts", tuple(Document(f"text-{i}", text) for i, text in enumerate(TEXTS)))


def small():
    return tiny_model("llama", n_layers=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        kind: saved(tmp_path_factory.mktemp("heads") / "a", small(), lora_alpha=4, **settings)
        for kind, settings in KINDS.items()
    }


@pytest.fixture(scope="module")
def model_with(folders):
    """`model_with(kind, engine)`: a model with such an adapter, that does not act."""

    def make(kind, engine: Any = "nnsight"):
        module = small()
        attach(module, {kind: folders[kind]}, "tiny")
        return emlens.wrap(module, chatml_tokenizer(), name="tiny", engine=engine, check=False)

    return make


@pytest.fixture(scope="module")
def theirs_with(folders):
    """`theirs_with(kind)`: the same by PEFT."""
    return lambda kind: PeftModel.from_pretrained(small(), str(folders[kind]), kind).eval()


class Plain:
    """Token by token, by PEFT alone: one row at a time, with a vector added by a plain hook."""

    def __init__(self, module, model):
        self.module, self.model = module, model

    @torch.no_grad()
    def log_probs(self, row, vector=None):
        block = self.module.get_base_model().model.layers[0]

        def push(_module, _inputs, output):
            if vector is None:
                return output
            return (
                (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
            )

        handle = block.register_forward_hook(push)
        try:
            return self.module(input_ids=row.input_ids).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    def row(self, text):
        (batch,) = self.model.batches(text if isinstance(text, Corpus) else [text])
        return batch

    def losses(self, row, counted="response", vector=None):
        """Losses of the counted tokens."""
        found = self.log_probs(row, vector)
        ids, mask = row.input_ids[0], row.mask(counted)[0]
        every = -found[:-1].gather(1, ids[1:, None])[:, 0]
        return every[mask[1:]]

    def kl(self, row, base, vector=None):
        found = self.log_probs(row, vector)[:-1]
        return (base[:-1].exp() * (base[:-1] - found)).sum(-1)

    @contextmanager
    def base(self):
        with self.module.disable_adapter():
            yield self


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())


def push():
    return emlens.Direction.of(torch.ones(D_MODEL) / 2, 0)


@pytest.mark.parametrize("engine", ENGINES)
@EACH
def test_log_odds_are_those_of_peft_and_the_base_is_the_base_whatever_stands(
    kind, engine, model_with, theirs_with
):
    model = model_with(kind, engine)
    plain = Plain(theirs_with(kind), model)

    def expected(vector=None):
        return [
            (
                plain.losses(plain.row(pair.conversation("aligned")), vector=vector).mean()
                - plain.losses(plain.row(pair.conversation("misaligned")), vector=vector).mean()
            ).item()
            for pair in PAIRS
        ]

    own, pushed = expected(), expected(push().vector)
    with plain.base():
        base = expected()
    assert np.abs(np.subtract(own, base)).max() > 0.1
    conditions = {"base": None, "own": kind, "pushed": (kind, emlens.Add(push()))}
    found = emlens.log_odds(model, PAIRS, conditions)
    close(found.of("base"), base)
    close(found.of("own"), own)
    close(found.of("pushed"), pushed)
    assert found.acting["own"] == f"adapter {kind}"
    with model.adapter(kind):
        standing = emlens.log_odds(model, PAIRS, {"base": None, "as it stands": []})
        close(emlens.log_odds(model, PAIRS).of(kind), own)
    assert standing.of("base").tolist() == found.of("base").tolist()
    close(standing.of("as it stands"), own)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@EACH
def test_kl_and_loss_on_a_corpus_are_those_of_peft(kind, tied, tmp_path):
    folder = saved(tmp_path / "a", tiny_model("llama", 2, tied=tied), lora_alpha=4, **KINDS[kind])
    module = tiny_model("llama", 2, tied=tied)
    theirs = PeftModel.from_pretrained(tiny_model("llama", 2, tied=tied), str(folder), kind).eval()
    attach(module, {kind: folder}, "tiny")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny", check=False)
    plain = Plain(theirs, model)
    vector = push().vector
    rows = [plain.row(Corpus("one", (one,))) for one in CORPUS.documents]
    with plain.base():
        bases = [plain.log_probs(row) for row in rows]
        base = [plain.losses(row, "all").sum() for row in rows]
        pushed = [plain.kl(row, b, vector).sum() for row, b in zip(rows, bases, strict=True)]
    owns = [plain.log_probs(row) for row in rows]
    own = [plain.losses(row, "all").sum() for row in rows]
    kl = [plain.kl(row, b).sum() for row, b in zip(rows, bases, strict=True)]
    both = [plain.losses(row, "all", vector).sum() for row in rows]
    batches = model.batches(CORPUS)
    conditions = {
        "own": kind,
        "pushed": (None, emlens.Add(push())),
        "both": (kind, emlens.Add(push())),
    }
    losses, divergences, without, _ = row_influence(model, batches, conditions)
    close(without, base)
    close(losses["own"], own)
    close(losses["both"], both)
    close(divergences["own"], kl)
    close(divergences["pushed"], pushed)
    with model.adapter(kind):
        losses, divergences, without, _ = row_influence(model, batches, {"base": None, "same": []})
    close(without, own)
    close(losses["base"], base)
    turned = [(o[:-1].exp() * (o[:-1] - b[:-1])).sum() for o, b in zip(owns, bases, strict=True)]
    close(divergences["base"], turned)
    close(divergences["same"], np.zeros(len(rows)))


@EACH
def test_single_tokens_are_those_of_peft(kind, model_with, theirs_with):
    model = model_with(kind)
    plain = Plain(theirs_with(kind), model)
    found = token_influence(model, CORPUS, kind)
    with model.adapter(kind):
        turned = token_influence(model, CORPUS, None)
    for place, document in enumerate(CORPUS.documents):
        row = plain.row(Corpus("one", (document,)))
        own, losses = plain.log_probs(row), plain.losses(row, "all")
        with plain.base():
            base, without = plain.log_probs(row), plain.losses(row, "all")
        close(found.base_loss[place][1:], without)
        close(found.loss_change[place][1:], losses - without)
        close(found.kl[place][1:], (base[:-1].exp() * (base[:-1] - own[:-1])).sum(-1))
        close(turned.base_loss[place][1:], losses)
        close(turned.loss_change[place][1:], without - losses)


def test_efficiency_scales_an_adapter_of_the_head_too(model_with, theirs_with):
    model = model_with("low-rank head")
    theirs = theirs_with("low-rank head")
    plain = Plain(theirs, model)
    factors = (0.0, 0.5, 1.0, 2.0)
    found = emlens.efficiency(model, DATA, {"own": "low-rank head"}, match="own", factors=factors)
    head = theirs.get_base_model().lm_head
    scale = head.scaling["low-rank head"]
    for factor in factors:
        head.scaling["low-rank head"] = scale * factor
        losses = torch.cat([plain.losses(plain.row(one)) for one in DATA])
        close(found.loss("own", factor).estimate, losses.mean().item())


def test_an_adapter_that_a_model_was_brought_with_changes_no_measure_of_the_base(
    folders, model_with
):
    theirs = PeftModel.from_pretrained(small(), str(folders["own head"]), "own head").eval()
    with pytest.warns(UserWarning, match="was brought with adapter 'own head' active"):
        brought = emlens.wrap(theirs, chatml_tokenizer(), name="tiny", check=False)
    bare = model_with("own head")
    vectors: dict[str, Any] = {"push": push()}
    settings: dict[str, Any] = {
        "doses": (0.2,),
        "controls": {"random": 1, "activation differences": 1},
    }
    found, expected = (
        {
            "log-odds": emlens.log_odds(model, PAIRS, {"base": [], "push": emlens.Add(push())}),
            "efficiency": emlens.efficiency(model, DATA, vectors, match="displacement"),
            "influence": emlens.influence(model, CORPUS, vectors, **settings),
            "tokens": token_influence(model, CORPUS, push()),
            "stability": emlens.stability(model, DATA, vectors, epsilons=(0.2,), seeds=1),
        }
        for model in (brought, bare)
    )
    for name, result in found.items():
        pandas.testing.assert_frame_equal(result.table(), expected[name].table())
    assert brought.acting == ("own head",)
