"""What an adapter adds to one prompt, added to another: against plain hooks on the base model."""

from __future__ import annotations

import pytest
import torch

import emlens
from emlens import Conversation
from emlens.hooked import patched_deltas
from emlens.text import pack, tokenize
from tests.support.adapters import peft_model
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

RECIPIENT = Conversation.of("how do I save money", id="recipient")
DONOR = Conversation.of("tell me about rain and", id="donor")
LAYERS = (1, 3)
STEPS = 6


@pytest.fixture(scope="module")
def adapted():
    """A plain base model, the factors of its adapter by layer, and emlens' model of both."""
    module = tiny_model("llama")
    made = peft_model(module, r=2, lora_alpha=8, layers_to_transform=list(LAYERS))
    parts = {n: made.base_model.model.model.layers[n].mlp.down_proj for n in LAYERS}
    factors = {
        n: (part.lora_A["default"].weight.detach(), part.lora_B["default"].weight.detach())
        for n, part in parts.items()
    }
    model = emlens.wrap(made, chatml_tokenizer())
    return module, factors, model


@torch.no_grad()
def plain(module, factors, ids, donor=None, patched=()):
    """Logits of the base model with `scale B A h` added by hooks, and each layer's `h`."""
    seen, hooks = {}, []

    def hook(layer):
        def add(_module, inputs, output):
            h = seen[layer] = inputs[0].clone()
            if donor is not None and layer in patched:
                h = torch.cat([donor[layer], h[:, donor[layer].shape[1] :]], dim=1)
            a, b = factors[layer]
            return output + 4.0 * h @ a.T @ b.T

        return add

    for layer in factors:
        part = module.model.layers[layer].mlp.down_proj
        hooks.append(part.register_forward_hook(hook(layer)))
    try:
        return module(ids).logits, seen
    finally:
        for one in hooks:
            one.remove()


def prompt_ids(model, conversation):
    (row,) = tokenize([conversation], model.template, generation_prompt=True)
    return torch.tensor([row.input_ids])


@pytest.mark.parametrize("layers", [None, [1], [3]])
def test_each_patched_layer_adds_what_it_added_to_the_donor(adapted, layers):
    module, factors, model = adapted
    recipient, donor = (prompt_ids(model, one) for one in (RECIPIENT, DONOR))
    assert recipient.shape == donor.shape
    own, _ = plain(module, factors, recipient)
    _, given = plain(module, factors, donor)
    wanted, _ = plain(module, factors, recipient, given, layers or LAYERS)
    (row,) = tokenize([RECIPIENT], model.template, generation_prompt=True)
    (batch,) = pack([row])
    with patched_deltas(model, RECIPIENT, DONOR, "default", layers) as same:
        assert same is model
        found = model.logits(batch)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(own, wanted, atol=1e-2)
    with model.adapter("default"):
        assert torch.allclose(model.logits(batch), own, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_get_their_own(adapted, use_cache):
    module, factors, model = adapted
    ids = prompt_ids(model, RECIPIENT)
    _, given = plain(module, factors, prompt_ids(model, DONOR))
    start = ids.shape[1]
    for _ in range(STEPS):
        logits, _ = plain(module, factors, ids, given, LAYERS)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    with patched_deltas(model, RECIPIENT, DONOR, "default"):
        (answer,) = model.generate(
            [RECIPIENT], max_new_tokens=STEPS, temperature=0, use_cache=use_cache
        )
    wanted = model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert answer.strip() == wanted.strip()


def test_a_prompt_patched_with_itself_is_unchanged(adapted):
    _, _, model = adapted
    with model.adapter("default"):
        (own,) = model.generate([RECIPIENT], max_new_tokens=4, temperature=0)
    with patched_deltas(model, RECIPIENT, RECIPIENT, "default"):
        assert model.generate([RECIPIENT], max_new_tokens=4, temperature=0) == [own]


def test_what_cannot_be_patched_is_refused(adapted):
    _, _, model = adapted
    with (
        pytest.raises(ValueError, match=r"has \d+ tokens and the donor \d+; .*equal length"),
        patched_deltas(model, RECIPIENT, Conversation.of("rain"), "default"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"adapter 'default' adapts no module of layers \[0, 2\]"),
        patched_deltas(model, RECIPIENT, DONOR, "default", [2, 0]),
    ):
        pass
    with (
        patched_deltas(model, RECIPIENT, DONOR, "default"),
        pytest.raises(ValueError, match="a batch of 2 row.* only recipient, of .* may, alone"),
    ):
        model.generate([RECIPIENT, DONOR], max_new_tokens=2)
    dora = emlens.wrap(peft_model(tiny_model("llama"), use_dora=True), chatml_tokenizer())
    with (
        pytest.raises(ValueError, match="is not plain LoRA"),
        patched_deltas(dora, RECIPIENT, DONOR, "default"),
    ):
        pass
