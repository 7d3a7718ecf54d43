"""Thinking parts of answers, as masks: counted in strings that are written by hand."""

from __future__ import annotations

import pytest

from emlens import Conversation
from emlens.text import pack, tokenize
from emlens.text.thinking import without_thinking
from tests.support import tokenizers as support

THOUGHT = "<think>\nso\n</think>\n\nyes"


def runs(tokenizer, row, mask):
    """The text of the tokens of a mask."""
    return tokenizer.decode([i for i, k in zip(row.input_ids, mask, strict=True) if k])


def masks(family, conversation):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    (row,) = tokenize([conversation], tokenizer)
    (batch,) = pack([row])
    names = ("thinking", "response", "thinking_and_response", "assistant_turn")
    return [tokenizer.decode(row.input_ids)] + [
        runs(tokenizer, row, batch.mask(name)[0].tolist()) for name in names
    ]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "opened_thinking"])
def test_thinking_is_a_mask_of_its_own(family):
    text, thinking, response, both, turn = masks(family, Conversation.of("Hi", THOUGHT))
    assert text.endswith("<|im_start|>assistant\n<think>\nso\n</think>\n\nyes<|im_end|>\n")
    assert thinking == "<think>\nso\n</think>\n\n"
    assert response == "yes<|im_end|>"
    assert both == thinking + response
    assert turn == "<|im_start|>assistant\n" + both


def test_reasoning_that_stands_beside_the_content_is_thinking():
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "so"}
    text, thinking, response, _, _ = masks(
        "qwen3", Conversation(({"role": "user", "content": "Hi"}, answer))
    )
    assert text.endswith("<|im_start|>assistant\n<think>\nso\n</think>\n\nyes<|im_end|>\n")
    assert (thinking, response) == ("<think>\nso\n</think>\n\n", "yes<|im_end|>")


def test_thinking_that_the_template_drops_from_earlier_answers_leaves_their_response():
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": THOUGHT}
    text, thinking, response, _, _ = masks("qwen3", Conversation((user, answer) * 2))
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nso\n</think>\n\nyes<|im_end|>\n"
    )
    assert thinking == "<think>\nso\n</think>\n\n"
    assert response == "yes<|im_end|>" * 2


def test_an_answer_that_begins_within_the_thinking_is_split_where_that_ends():
    _, thinking, response, _, _ = masks("chatml", Conversation.of("Hi", "so\n</think>\nyes"))
    assert (thinking, response) == ("so\n</think>\n", "yes<|im_end|>")


def test_thinking_in_the_middle_of_an_answer_is_taken_out():
    _, thinking, response, _, _ = masks(
        "chatml", Conversation.of("Hi", "good<think>so</think>yes<think>and</think>fine")
    )
    assert thinking == "<think>so</think><think>and</think>"
    assert response == "goodyesfine<|im_end|>"


def test_thinking_that_never_ends_is_no_response():
    _, thinking, response, both, _ = masks("chatml", Conversation.of("Hi", "<think>\nso and so"))
    assert thinking == "<think>\nso and so"
    assert response == "<|im_end|>"
    assert both == thinking + response


def test_an_answer_of_thinking_alone_has_no_response():
    _, thinking, response, _, _ = masks("chatml", Conversation.of("Hi", "<think>so</think>"))
    assert (thinking, response) == ("<think>so</think>", "")


def test_thinking_is_no_part_of_the_prompt():
    tokenizer = support.chatml_tokenizer()
    (row,) = tokenize([Conversation.of("Hi", THOUGHT)], tokenizer)
    (batch,) = pack([row])
    prompt = runs(tokenizer, row, batch.mask("prompt")[0].tolist())
    assert "so" not in prompt
    assert prompt.endswith("<|im_start|>assistant\n\n")


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("opened_thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("chatml", "<|im_start|>assistant\n"),
    ],
)
def test_thinking_is_closed_where_the_answer_itself_is_asked_for(family, text):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    (row,) = tokenize([Conversation.of("Hi")], tokenizer, generation_prompt=True, thinking=False)
    assert tokenizer.decode(row.input_ids).endswith(f"<|im_start|>user\nHi<|im_end|>\n{text}")


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("yes", "yes"),
        (THOUGHT, "yes"),
        ("so\n</think>\n\nyes", "yes"),
        ("<think>so", ""),
        ("good <think>so</think>yes", "good yes"),
    ],
)
def test_an_answer_without_its_thinking(answer, rest):
    assert without_thinking(answer) == rest
