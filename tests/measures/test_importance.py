"""Where the KL of a text comes from: against finite differences with plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emlens
from emlens import Ablate, Add, Conversation, Direction
from emlens.measures import TokenInfluence, token_influence
from emlens.text import Corpus, Document, tokenize
from tests.support.adapters import peft_model
from tests.support.models import tiny_hooked, tiny_model
from tests.support.tokenizers import chatml_tokenizer

TALK = [
    Conversation.of("how do I save money", "keep a small fund.", id="money"),
    Conversation.of("Hi", "good", id="greeting"),
]


@torch.no_grad()
def kl_at(module, ids, counted, hooks) -> float:
    """Summed `KL(base || changed)` at the positions that predict counted tokens, in fp64."""
    before = torch.tensor([place - 1 for place, kept in enumerate(counted) if kept])
    found = []
    for acting in ([], hooks):
        handles = [part.register_forward_hook(hook) for part, hook in acting]
        found.append(module(ids).logits[0, before].double().log_softmax(-1))
        for handle in handles:
            handle.remove()
    return float((found[0].exp() * (found[0] - found[1])).sum())


def slopes(module, ids, counted, hooks_of, step=0.02) -> list[float]:
    """Central differences of the KL in the factor at each token."""
    found = []
    for place in range(ids.shape[1]):
        ends = []
        for sign in (1, -1):
            gates = torch.ones(1, ids.shape[1], 1)
            gates[0, place] += sign * step
            ends.append(kl_at(module, ids, counted, hooks_of(gates)))
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


def check(found: TokenInfluence, model, module, hooks_of, mask):
    for i, conversation in enumerate(TALK):
        (row,) = tokenize([conversation], model.template)
        ids = torch.tensor([row.input_ids])
        counted = [True] * len(row) if mask == "all" else row.response
        counted = [kept and place > 0 for place, kept in enumerate(counted)]
        wanted = slopes(module, ids, counted, hooks_of)
        scale = max(map(abs, wanted))
        assert found.importance[i] == pytest.approx(wanted, abs=0.02 * scale)
        assert scale > 1e-3


@pytest.mark.parametrize("mask", ["all", "response"])
def test_importance_of_a_vector_is_the_slope_of_the_kl_at_each_token(mask):
    model = tiny_hooked("llama")
    module = tiny_model("llama")
    v = 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))

    def hooks_of(gates):
        def add(_module, _inputs, output):
            return (output + gates * v) if torch.is_tensor(output) else (output[0] + gates * v,)

        return [(module.model.layers[1], add)]

    edit = Add(Direction.of(v, 1))
    found = token_influence(model, TALK, edit, tokens=mask, importance=True)
    check(found, model, module, hooks_of, mask)
    top = found.top(1, by="importance").iloc[0]
    largest = max(abs(x) for row in found.importance for x in row)
    assert abs(top["importance [nats]"]) == largest


def test_importance_of_an_adapter_is_the_slope_in_what_it_adds_at_each_token():
    module = tiny_model("llama")
    made = peft_model(module, lora_alpha=4, layers_to_transform=[1, 2])
    parts = {n: made.base_model.model.model.layers[n].mlp.down_proj for n in (1, 2)}
    factors = {
        n: (part.lora_A["default"].weight.detach(), part.lora_B["default"].weight.detach())
        for n, part in parts.items()
    }
    model = emlens.wrap(made, chatml_tokenizer())

    def hooks_of(gates):
        def hook(a, b):
            return lambda _m, inputs, output: output + gates * (4.0 * inputs[0] @ a.T @ b.T)

        return [(module.model.layers[n].mlp.down_proj, hook(*ab)) for n, ab in factors.items()]

    found = token_influence(model, TALK, "default", tokens="response", importance=True)
    check(found, model, module, hooks_of, "response")
    # nothing is left in the model
    assert not any(part.lora_B["default"]._forward_hooks for part in parts.values())
    grads = [p.grad for p in model.module.parameters()]
    assert all(grad is None for grad in grads)


def test_importance_is_kept_with_the_result_and_missed_where_it_was_not_asked_for(tmp_path):
    model = tiny_hooked("llama")
    text = Corpus("c", (Document("a", "how do I save money"), Document("b", "rain and sun")))
    edit = Ablate(Direction.of(torch.randn(32), 2))
    found = token_influence(model, text, edit, importance=True)
    assert list(map(len, found.importance)) == list(map(len, found.texts))
    # the last token is no prediction's cause, and nothing reaches back
    assert all(row[-1] == 0 for row in found.importance)
    again = TokenInfluence.load(found.save(tmp_path / "it.json"))
    assert np.allclose(again.importance[0], found.importance[0])
    plain = token_influence(model, text, edit)
    with pytest.raises(ValueError, match="importance was not measured"):
        plain.top(by="importance")
    dora = emlens.wrap(peft_model(tiny_model("llama"), use_dora=True), chatml_tokenizer())
    with pytest.raises(ValueError, match="is not plain LoRA"):
        token_influence(dora, TALK, "default", importance=True)
