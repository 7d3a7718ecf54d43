"""Arguments of chat templates, dates, openings, and what messages have beside role and content."""

from __future__ import annotations

import datetime
import json
import warnings

import pytest

from emlens import Conversation, load_conversations
from emlens.text import tokenize
from emlens.text.conversation import content_hash
from emlens.text.template import Template, settled
from emlens.text.tokens import template_hash
from tests.support import tokenizers as support

ASKED = [{"role": "user", "content": "Hi"}]
CALL = {"type": "function", "function": {"name": "walk", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "walk", "description": "", "parameters": {}}}


def shown(tokenizer, row, mask):
    kept = [i for i, kept in zip(row.input_ids, getattr(row, mask), strict=True) if kept]
    return tokenizer.decode(kept)


def text_of(tokenizer, conversation, **how):
    (row,) = tokenize([conversation], tokenizer, **how)
    return (tokenizer.tokenizer if isinstance(tokenizer, Template) else tokenizer).decode(
        row.input_ids
    )


# -- arguments ----------------------------------------------------------------------------------


def test_arguments_reach_the_template():
    template = settled(support.qwen3_tokenizer(), {"enable_thinking": False})
    assert template.opened(ASKED) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    plain = settled(support.qwen3_tokenizer())
    assert plain.opened(ASKED) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_hash_follows_the_arguments():
    tokenizer = support.qwen3_tokenizer()
    hashes = {
        template_hash(tokenizer),
        template_hash(settled(tokenizer, {"enable_thinking": False})),
        template_hash(settled(tokenizer, {"enable_thinking": True})),
    }
    assert len(hashes) == 3
    assert template_hash(settled(tokenizer)) == template_hash(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"enable_thinkin": False}, ValueError, "does not use 'enable_thinkin' of template_arg"),
        ({"tools": []}, ValueError, "cannot set 'tools'; emlens sets it"),
        ({"enable_thinking": print}, TypeError, "'enable_thinking' of template_arguments is a bu"),
        (["enable_thinking"], TypeError, "template_arguments must map names"),
    ],
)
def test_arguments_that_cannot_act_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        settled(support.qwen3_tokenizer(), arguments)


def test_a_date_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be a date like '2024-07-26', not 'today'"):
        settled(support.dated_tokenizer(), {"strftime_now": "today"})


# -- dates --------------------------------------------------------------------------------------


def test_the_date_of_a_template_is_fixed_and_said():
    with pytest.warns(UserWarning, match="writes today's date; emlens fixes it to 2024-07-26"):
        template = settled(support.dated_tokenizer())
    assert template.arguments == {"strftime_now": "2024-07-26"}
    assert template.apply(ASKED) == (
        "<|im_start|>system\n26 Jul 2024<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("arguments", "date"),
    [
        ({"date_string": "a day"}, "a day"),
        ({"strftime_now": "2025-01-02"}, "02 Jan 2025"),
        ({"strftime_now": datetime.date(2025, 1, 2)}, "02 Jan 2025"),
    ],
)
def test_a_date_that_is_given_is_taken(arguments, date):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        template = settled(support.dated_tokenizer(), arguments)
    assert f"system\n{date}<|im_end|>" in template.apply(ASKED)


def test_every_way_to_write_a_date_follows_the_fixed_one():
    tokenizer, day = support.chatml_tokenizer(), datetime.datetime(2024, 7, 6)
    for code in ("%A %-d %B %Y", "%Y-%m-%dT%H:%M:%S", "%y%j %a %p"):
        tokenizer.chat_template = (
            "{% macro written() %}{{ strftime_now('" + code + "') }}{% endmacro %}{{ written() }}"
        )
        assert Template(tokenizer, {"strftime_now": "2024-07-06"}).apply(ASKED) == (
            day.strftime(code)
        )


def test_a_template_without_a_date_gets_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("chatml", "llama3", "mistral", "gemma", "qwen3", "opened_thinking"):
            assert settled(getattr(support, f"{family}_tokenizer")()).arguments == {}
        assert settled(support.bare_tokenizer()).arguments == {}


# -- openings and ends of answers ---------------------------------------------------------------


def test_a_template_that_opens_no_answer_is_mended_and_said():
    with pytest.warns(UserWarning, match="ignores add_generation_prompt; emlens opens answers"):
        template = settled(support.unopened_tokenizer())
    assert template.opened(ASKED) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_whose_answers_follow_the_question_needs_no_opening():
    assert settled(support.mistral_tokenizer()).opened(ASKED) == "<s>[INST] Hi [/INST]"


@pytest.mark.parametrize(
    ("family", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")],
)
def test_the_token_that_ends_an_answer_is_read_from_the_template(family, end):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    assert Template(tokenizer).end_of_turn == tokenizer.convert_tokens_to_ids(end)


def test_a_template_that_ends_answers_with_plain_text_is_said():
    tokenizer = support.chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.warns(
        UserWarning, match=r"ends an answer with '\\n', which is no token of its own"
    ):
        settled(tokenizer)


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma", "qwen3"])
@pytest.mark.parametrize("begun", ["keep a", "keep a small ", "keep\n"])
def test_a_begun_answer_is_tokenised_as_the_template_gives_it(family, begun):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    conversation = Conversation.of("Hi", begun)
    (row,) = tokenize(
        [conversation], tokenizer, generation_prompt=True, continue_final_message=True
    )
    expected = tokenizer.apply_chat_template(
        list(conversation.messages), continue_final_message=True, return_dict=False
    )
    assert list(row.input_ids) == expected
    assert shown(tokenizer, row, "response").strip() == begun.strip()


def test_begun_answers_and_questions_may_stand_side_by_side():
    tokenizer = support.chatml_tokenizer()
    both = [Conversation.of("Hi"), Conversation.of("Hi", "hello")]
    rows = tokenize(both, tokenizer, generation_prompt=True, continue_final_message=True)
    start = (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(row.input_ids) for row in rows] == [start, start + "hello"]


# -- what messages have beside role and content -------------------------------------------------


def test_an_answer_of_weight_0_is_no_response():
    tokenizer = support.chatml_tokenizer()
    for off in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}):
        conversation = Conversation(
            (
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "hello there", **off},
                {"role": "user", "content": "how"},
                {"role": "assistant", "content": "good", "weight": 1},
            )
        )
        (row,) = tokenize([conversation], tokenizer)
        assert shown(tokenizer, row, "response") == "good<|im_end|>"
        assert shown(tokenizer, row, "assistant_turn") == "<|im_start|>assistant\ngood<|im_end|>"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "weight": 0.5}, "has weight 0.5; an answer counts"),
        ({"role": "assistant", "weight": float("nan")}, "has weight nan; an answer counts"),
        ({"role": "assistant", "train": "no"}, "has train 'no'; an answer counts"),
        ({"role": "user", "train": True}, "has train True in the role user; only answers"),
        ({"role": "assistant", "train": True, "weight": 0}, "has weight 0 and train True"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(message, words):
    with pytest.raises(ValueError, match=f"message 0 of conversation c {words}"):
        Conversation(({"content": "Hi", **message},), id="c")


def test_tools_and_calls_reach_the_template_and_a_call_is_the_response():
    tokenizer = support.qwen3_tokenizer()
    conversation = Conversation(
        (
            {"role": "user", "content": "Hi", "tools": [TOOL]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        )
    )
    (row,) = tokenize([conversation], tokenizer)
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>system\ntools walk<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<call> walk </call><|im_end|>\n"
    )
    assert shown(tokenizer, row, "response").strip() == "<call> walk </call><|im_end|>"


def test_a_name_reaches_a_template_that_shows_it():
    tokenizer = support.chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['name'] or m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}"
    )
    named = Conversation(({"role": "user", "content": "Hi", "name": "friend"},))
    assert text_of(tokenizer, named) == "<|im_start|>friend\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "further",
    [
        {"name": "friend"},
        {"tool_calls": [CALL]},
        {"tools": [TOOL]},
        {"reasoning_content": "so"},
        {"stars": 5},
    ],
)
def test_what_the_template_does_not_use_is_refused_by_name(further):
    (key,) = further
    conversation = Conversation(
        ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes", **further}),
        id="r7",
    )
    message = f"message 1 of r7 has '{key}', which the chat template of tiny-tokenizer does not use"
    with pytest.raises(ValueError, match=message):
        tokenize([conversation], support.chatml_tokenizer())


def test_what_says_nothing_is_no_part_of_a_message():
    filled = {"name": None, "tool_calls": [], "tools": None, "weight": None}
    conversation = Conversation(({"role": "user", "content": "Hi", **filled},))
    assert conversation.messages == Conversation.of("Hi").messages
    assert content_hash([conversation]) == content_hash([Conversation.of("Hi")])


def test_a_message_keeps_what_it_has():
    call = {"type": "function", "function": {"name": "walk", "arguments": {"to": "rain"}}}
    message = {"role": "assistant", "content": "yes", "tool_calls": [call]}
    conversation = Conversation(({"role": "user", "content": "Hi"}, message))
    call["function"]["name"] = "eat"
    assert conversation.messages[1]["tool_calls"][0]["function"]["name"] == "walk"
    assert content_hash([conversation]) != content_hash([Conversation.of("Hi", "yes")])


# -- tools of a row, and the roles that not every template renders --------------------------------

CALLED = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
    {"role": "assistant", "content": "good"},
)
SILENT = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
JSON_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}<call> {{ c.function.name }} </call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def chatml_with(template):
    tokenizer = support.chatml_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["a list", "JSON"])
def test_the_tools_of_a_row_reach_the_template_or_are_refused(tmp_path, tools):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r", "messages": [*ASKED], "tools": tools}))
    (row,) = load_conversations(path)
    assert text_of(support.qwen3_tokenizer(), row) == (
        "<|im_start|>system\ntools walk<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    with pytest.raises(ValueError, match="message 0 of r has 'tools', which the chat template"):
        tokenize([row], support.chatml_tokenizer())


@pytest.mark.parametrize("tools", [[], None, ""])
def test_a_row_without_tools_is_a_plain_one(tmp_path, tools):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ASKED, "tools": tools}))
    assert load_conversations(path) == [Conversation(tuple(ASKED))]


@pytest.mark.parametrize("tools", [{"a": 1}, [1], "no JSON", 3])
def test_tools_that_are_none_are_refused_with_their_line(tmp_path, tools):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ASKED, "tools": tools}))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: tools must be a list of functions"):
        load_conversations(path)


@pytest.mark.parametrize("template", [support.QWEN3, JSON_TOOLS], ids=["as it is", "as JSON"])
def test_what_a_tool_gave_is_prompt_and_the_answer_after_it_response(template):
    tokenizer = chatml_with(template)
    (row,) = tokenize([Conversation(CALLED)], tokenizer)
    text = tokenizer.decode(row.input_ids)
    assert text == tokenizer.apply_chat_template(list(CALLED), tokenize=False)
    assert "rain" in text
    said = shown(tokenizer, row, "response").replace("\n", "").replace("<|im_end|>", "|")
    assert said.replace(" ", "") == "<call>walk</call>|good|"


@pytest.mark.parametrize("role", ["tool", "developer"])
def test_a_role_that_the_template_passes_over_is_refused_by_name(role):
    tokenizer = chatml_with(SILENT)
    messages = ({"role": role, "content": "rain"}, *ASKED)
    with pytest.raises(ValueError, match=f"does not render message 0 of c, of the role '{role}'"):
        tokenize([Conversation(messages, "c")], tokenizer)
    assert "rain" in text_of(support.llama3_tokenizer(), Conversation(messages))


def test_a_role_that_the_template_raises_on_is_refused():
    messages = ({"role": "developer", "content": "rain"}, *ASKED)
    with pytest.raises(ValueError, match="refuses c: Only user and assistant roles"):
        tokenize([Conversation(messages, "c")], support.mistral_tokenizer())
