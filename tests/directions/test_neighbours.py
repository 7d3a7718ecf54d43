"""The real steering-vectors beside emlens: what one reads and adds, the other does."""

from __future__ import annotations

import steering_vectors
import torch

import emlens
from emlens import Add, Conversation
from emlens.directions import from_steering_vectors, to_steering_vectors
from tests.support.data import conversations
from tests.support.models import tiny_model
from tests.support.solutions import several
from tests.support.tokenizers import chatml_tokenizer


def rendered(conversation: Conversation) -> str:
    return chatml_tokenizer().apply_chat_template(list(conversation.messages), tokenize=False)


def test_directions_act_in_steering_vectors_as_in_emlens():
    module = tiny_model("llama")
    model = emlens.wrap(module, chatml_tokenizer(), name="tiny-llama")
    directions = several(model)
    (batch,) = model.batches(conversations("good", 1))
    with to_steering_vectors(directions).apply(module, multiplier=2.0), torch.no_grad():
        theirs = module(batch.input_ids).logits
    assert torch.allclose(model.logits(batch, Add(directions * 2)), theirs, atol=1e-5)
    assert not torch.allclose(model.logits(batch), theirs, atol=1e-2)


def test_a_vector_trained_by_steering_vectors_is_the_mean_difference_at_its_token():
    module, tokenizer = tiny_model("llama"), chatml_tokenizer()
    model = emlens.wrap(module, tokenizer, name="tiny-llama")
    questions = ("how do I save", "what should I eat", "tell me a story")
    bad, good = ([Conversation.of(q, word) for q in questions] for word in ("sun", "rain"))
    texts = [(rendered(b), rendered(g)) for b, g in zip(bad, good, strict=True)]
    # an answer is its word and the end of its turn; the template ends in a newline
    theirs = [
        from_steering_vectors(
            steering_vectors.train_steering_vector(
                module, tokenizer, texts, layers=[1, 2], read_token_index=place
            )
        )
        for place in (-3, -2)
    ]
    ours = emlens.mean_diff(model, bad, good, layers=[1, 2])
    assert {one.site for one in theirs} == {ours.site}
    for layer in ours.layers:
        mean = (theirs[0].vectors[layer] + theirs[1].vectors[layer]) / 2
        assert torch.allclose(mean, ours.vectors[layer], atol=1e-5)
