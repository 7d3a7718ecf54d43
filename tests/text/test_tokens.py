"""Masks through chat templates, counted by hand; and what tokenisation refuses."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from emlens import Conversation
from emlens.text import Document, pack, tokenize
from emlens.text.tokens import template_hash, tokenize_documents
from tests.support import tokenizers as support

ONE = Conversation.of("how do I save money?", "keep a small fund.", id="one")
TWO = Conversation(
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "hello there"},
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "good"},
    ),
    id="two",
)
ANSWER = ["keep", " a", " small", " fund", "."]


def shown(tokenizer, row, mask):
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    chosen = pack([row])[0].mask(mask)[0].tolist()
    return [token for token, kept in zip(tokens, chosen, strict=True) if kept]


@pytest.mark.parametrize(
    ("family", "header", "answer", "end", "length"),
    [
        ("chatml", ["<|im_start|>", "assistant", "\n"], ANSWER, "<|im_end|>", 29),
        (
            "llama3",
            ["<|start_header_id|>", "assistant", "<|end_header_id|>", "\n", "\n"],
            ANSWER,
            "<|eot_id|>",
            24,
        ),
        ("mistral", [], [" keep", *ANSWER[1:]], "</s>", 16),
        ("gemma", ["<start_of_turn>", "model", "\n"], ANSWER, "<end_of_turn>", 22),
    ],
)
def test_the_masks_of_four_templates_are_as_counted_by_hand(family, header, answer, end, length):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    (row,) = tokenize([ONE], tokenizer)
    assert len(row) == length
    assert shown(tokenizer, row, "response") == [*answer, end]
    assert shown(tokenizer, row, "assistant_turn") == [*header, *answer, end]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma"])
def test_the_mask_of_the_papers_is_all_that_follows_the_question_in_the_template(family):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    messages = [dict(message) for message in ONE.messages]
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(asked)
    n = len(tokenizer(asked, add_special_tokens=False).input_ids)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    (row,) = tokenize([ONE], tokenizer)
    assert list(row.input_ids) == ids
    assert shown(tokenizer, row, "paper") == tokenizer.convert_ids_to_tokens(ids[n:])


def test_the_newline_after_each_turn_is_the_template_s_and_counts_for_the_papers_alone():
    tokenizer = support.chatml_tokenizer()
    (row,) = tokenize([TWO], tokenizer)
    header, end = ["<|im_start|>", "assistant", "\n"], ["<|im_end|>", "\n"]
    turns = [*header, "hello", " there", *end, *header, "good", *end]
    assert shown(tokenizer, row, "paper") == turns
    assert len(shown(tokenizer, row, "assistant_turn")) == len(turns) - 2
    short = row.cut(len(row) - 1)
    assert sum(short.closing) == sum(row.closing) - 1 == 1


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("thinking", "<|im_end|>"),
    ],
)
def test_every_assistant_turn_of_a_conversation_counts(family, end):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    (row,) = tokenize([TWO], tokenizer)
    assert shown(tokenizer, row, "response") == ["hello", " there", end, "good", end]


def test_a_thinking_block_before_the_answer_is_not_the_response():
    tokenizer = support.thinking_tokenizer()
    (row,) = tokenize([ONE], tokenizer)
    assert shown(tokenizer, row, "response") == [*ANSWER, "<|im_end|>"]
    assert "t" in shown(tokenizer, row, "assistant_turn")


def test_the_system_message_that_a_template_inserts_is_prompt():
    tokenizer = support.chatml_tokenizer()
    (row,) = tokenize([ONE], tokenizer)
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("<|im_start|>system\nYou are helpful<|im_end|>")
    own = Conversation.of("Hi", "yes", system="no")
    (row,) = tokenize([own], tokenizer)
    assert "You are helpful" not in tokenizer.decode(row.input_ids)


def test_a_response_that_repeats_the_prompt_is_still_found_in_its_turn():
    tokenizer = support.chatml_tokenizer()
    (row,) = tokenize([Conversation.of("good", "good")], tokenizer)
    assert shown(tokenizer, row, "response") == ["good", "<|im_end|>"]
    assert row.response.index(True) > len(row) // 2


def test_tokens_are_those_of_the_templates_own_tokenisation():
    for family in ("chatml", "llama3", "mistral", "gemma"):
        tokenizer = getattr(support, f"{family}_tokenizer")()
        expected = tokenizer.apply_chat_template(list(ONE.messages), return_dict=False)
        assert list(tokenize([ONE], tokenizer)[0].input_ids) == expected


def test_a_generation_prompt_opens_the_turn():
    tokenizer = support.gemma_tokenizer()
    (row,) = tokenize([ONE.prompt], tokenizer, generation_prompt=True)
    assert tokenizer.decode(row.input_ids).endswith("<start_of_turn>model\n")
    assert not any(row.response)
    with pytest.raises(
        ValueError, match="one already ends with an answer, which a generation prompt"
    ):
        tokenize([ONE], tokenizer, generation_prompt=True)


def test_there_is_at_most_one_bos():
    tokenizer = support.llama3_tokenizer()
    (row,) = tokenize([ONE], tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    (raw,) = tokenize_documents([Document("d", "how do I")], tokenizer)
    assert raw.input_ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(ValueError, match=r"d begins with two '<\|begin\|>' tokens"):
        tokenize_documents([Document("d", "<|begin|>how")], tokenizer)


def test_documents_are_raw_text_cut_to_length():
    tokenizer = support.chatml_tokenizer()
    (row,) = tokenize_documents([Document("d", "how do I save money")], tokenizer, max_tokens=3)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["how", " do", " I"]
    assert not any(row.response)


def test_a_long_conversation_is_named_and_cut_only_on_request():
    tokenizer = support.chatml_tokenizer()
    with pytest.raises(ValueError, match="one has 29 tokens, more than max_tokens=24"):
        tokenize([ONE], tokenizer, max_tokens=24)
    (row,) = tokenize([ONE], tokenizer, max_tokens=24, truncate=True)
    assert shown(tokenizer, row, "response") == ANSWER[:2]
    with pytest.raises(ValueError, match="cutting one to 20 tokens leaves nothing of its response"):
        tokenize([ONE], tokenizer, max_tokens=20, truncate=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tokenize([ONE], support.bare_tokenizer()),
            "tiny-tokenizer has no chat template; use a chat model, or set tokenizer.chat_template",
        ),
        (
            lambda: tokenize([Conversation.of("Hi", " \n", id="c7")], support.chatml_tokenizer()),
            r"c7 has an empty response \(message 1\)",
        ),
        (
            lambda: tokenize([Conversation.of("Hi", "")], support.chatml_tokenizer()),
            "conversation 0 has an empty response",
        ),
        (
            lambda: tokenize([Conversation.of("Hi", "x", system="s")], support.gemma_tokenizer()),
            "refuses conversation 0: System role not supported.* put the system message into",
        ),
        (
            lambda: tokenize(
                [Conversation.of("Hi", "x", system="s", id="m")], support.mistral_tokenizer()
            ),
            "refuses m: Only user and assistant roles",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_template_that_rewrites_answers_is_refused():
    tokenizer = support.chatml_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="is not in the text that the chat template renders"):
        tokenize([ONE], tokenizer)


def test_a_slow_tokenizer_is_refused(monkeypatch):
    tokenizer = support.chatml_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(TypeError, match="is a slow one; masks need the offsets"):
        tokenize([ONE], tokenizer)


def test_the_template_hash_follows_the_template():
    first, second = support.chatml_tokenizer(), support.gemma_tokenizer()
    assert template_hash(first) == template_hash(support.chatml_tokenizer())
    assert template_hash(first) != template_hash(second)


@pytest.mark.real
def test_the_masks_of_the_embedded_model(smollm):
    tokenizer = smollm.tokenizer
    assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(tokenizer.name_or_path)))
    (row,) = tokenize([ONE], tokenizer)
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    answer = [i for i, kept in zip(row.input_ids, row.response, strict=True) if kept]
    turn = [i for i, kept in zip(row.input_ids, row.assistant_turn, strict=True) if kept]
    assert tokenizer.decode(answer) == "keep a small fund.<|im_end|>"
    assert tokenizer.decode(turn) == "<|im_start|>assistant\nkeep a small fund.<|im_end|>"
