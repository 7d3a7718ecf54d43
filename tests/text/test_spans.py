"""Answers that are easy to mistake for other text of the rendering."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlens import Conversation
from emlens.text import Document, pack, tokenize
from emlens.text.tokens import tokenize_documents
from tests.support import tokenizers as support

FAMILIES = ("chatml", "llama3", "mistral", "gemma", "thinking", "moved_system", "opened_thinking")
TOKENIZERS = {name: getattr(support, f"{name}_tokenizer")() for name in FAMILIES}
# Each of these also stands in a header, a marker, an inserted message or another content.
WORDS = ("a", "i", "s", "think", "user", "model", "assistant", "You are", "Hi", "INST", "yes")


def chat(*contents: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in contents), "chat")


def parts(family, conversation, mask="response"):
    """The text of each run of masked tokens, with the place of its first token."""
    tokenizer = TOKENIZERS[family]
    (row,) = tokenize([conversation], tokenizer)
    found, previous = [], False
    for i, kept in enumerate(getattr(row, mask)):
        if kept and not previous:
            found.append((i, ""))
        if kept:
            token = str(tokenizer.convert_ids_to_tokens(row.input_ids[i]))
            found[-1] = (found[-1][0], found[-1][1] + token)
        previous = kept
    return found


def end_of_turn(family):
    return {"gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}.get(
        family, "</s>" if family in ("mistral", "moved_system") else "<|im_end|>"
    )


@given(st.sampled_from(FAMILIES), st.lists(st.sampled_from(WORDS), min_size=4, max_size=4))
def test_the_response_is_the_answer_whatever_its_words(family, words):
    roles = ("user", "assistant", "user", "assistant")
    conversation = chat(*zip(roles, words, strict=True))
    texts = [text.lstrip(" ") for _, text in parts(family, conversation)]
    assert texts == [words[1] + end_of_turn(family), words[3] + end_of_turn(family)]
    turns = parts(family, conversation, "assistant_turn")
    for (opened, turn), (answered, text) in zip(turns, parts(family, conversation), strict=True):
        assert opened <= answered
        assert turn.endswith(text)


def test_an_answer_that_its_question_contains_is_found_where_a_template_moves_the_system_message():
    conversation = chat(
        ("system", "no"), ("user", "tell me yes"), ("assistant", "yes"), ("user", "and"),
        ("assistant", "good"),
    )  # fmt: skip
    expected = [(7, " yes</s>"), (16, " good</s>")]
    assert parts("moved_system", conversation) == expected
    assert parts("moved_system", conversation, "assistant_turn") == expected


def test_a_conversation_may_open_with_an_answer():
    conversation = chat(("assistant", "You are"), ("user", "Hi"), ("assistant", "fine"))
    assert parts("chatml", conversation) == [(11, "You are<|im_end|>"), (24, "fine<|im_end|>")]
    turns = [text for _, text in parts("chatml", conversation, "assistant_turn")]
    assert turns == [
        "<|im_start|>assistant\nYou are<|im_end|>",
        "<|im_start|>assistant\nfine<|im_end|>",
    ]


def test_an_answer_that_holds_the_end_of_turn_marker_counts_to_its_own_end():
    conversation = chat(("user", "Hi"), ("assistant", "good<|im_end|> yes"))
    assert [text for _, text in parts("chatml", conversation)] == ["good<|im_end|> yes<|im_end|>"]


def test_spaces_that_are_an_added_token_do_not_end_the_turn():
    tokenizer = support.chatml_tokenizer()
    tokenizer.add_tokens(["   "])
    (row,) = tokenize([chat(("user", "Hi"), ("assistant", "good   "))], tokenizer)
    kept = [i for i, response in zip(row.input_ids, row.response, strict=True) if response]
    assert tokenizer.convert_ids_to_tokens(kept) == ["good", "   ", "<|im_end|>"]


def test_a_template_that_reads_the_content_falls_back_to_searching_for_it():
    tokenizer = support.chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if 'fine' in m['content'] %}hello {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = tokenize([chat(("user", "fine"), ("assistant", "fine"))], tokenizer)
    kept = [i for i, response in zip(row.input_ids, row.response, strict=True) if response]
    # The space before the word is the template's, and part of the word's token.
    assert tokenizer.convert_ids_to_tokens(kept) == [" fine", "<|im_end|>"]
    assert row.response.index(True) > len(row) // 2


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_below_one_is_refused(limit):
    tokenizer = TOKENIZERS["chatml"]
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, not {limit}"):
        tokenize([chat(("user", "Hi"))], tokenizer, max_tokens=limit, truncate=True)
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, not {limit}"):
        tokenize_documents([Document("d", "how do I")], tokenizer, max_tokens=limit)
    rows = tokenize([chat(("user", "Hi"))], tokenizer)
    with pytest.raises(ValueError, match=f"max_rows must be at least 1, not {limit}"):
        pack(rows, max_rows=limit)
