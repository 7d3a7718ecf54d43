"""What messages of Inspect say reaches the model, and what it thinks comes back as reasoning."""

from __future__ import annotations

import asyncio

import pytest
import torch
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
)
from inspect_ai.tool import ToolCall

import emlens
from emlens import Conversation
from emlens.evals._inspect import said
from emlens.evals.inspect.provider import EmlensAPI
from emlens.text.thinking import parted
from tests.support import tokenizers as support
from tests.support.models import tiny_model

ASKED = ChatMessageUser(content="tell me a story")


def ask(api, *chats, **settings):
    """What Inspect does: all requests at once, on one event loop."""
    config = GenerateConfig(**{"max_tokens": 8, "temperature": 0.0, **settings})

    async def all_of_them():
        jobs = (api.generate(list(chat), [], "none", config) for chat in chats)
        return await asyncio.gather(*jobs)

    return asyncio.run(all_of_them())


def scripted(tokenizer, text):
    """A model that writes one text, token by token, and then ends; and the prompts it read."""
    model = emlens.wrap(tiny_model("llama"), tokenizer, name="tiny")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    prompts = []

    def note(_module, inputs):
        if inputs[0].shape[1] > 1:
            prompts.append((tokenizer.decode(inputs[0][0]), iter(ids)))

    def write(_module, _inputs, logits):
        forced = torch.full_like(logits, -1e4)
        forced[:, -1, next(prompts[-1][1])] = 1e4
        return forced

    model.module.get_input_embeddings().register_forward_pre_hook(note)
    model.module.get_output_embeddings().register_forward_hook(write)
    return EmlensAPI("m", model=model), prompts


def test_a_begun_answer_is_gone_on_with_beside_questions(hooked_llama):
    begun = ChatMessageAssistant(content="the rain")
    questions = [ASKED], [ASKED, begun]
    api = EmlensAPI("m", model=hooked_llama)
    found = [one.completion for one in ask(api, *questions)]
    assert api.batches == (2,)
    chats = [Conversation.of(ASKED.text), Conversation.of(ASKED.text, "the rain")]
    expected = hooked_llama.generate(
        chats, temperature=0, max_new_tokens=8, continue_final_message=True
    )
    assert found == expected
    assert found[0] != found[1]
    # greedy decoding of the whole: what follows the begun answer, token by token
    ids = hooked_llama.tokenizer.apply_chat_template(
        list(chats[1].messages), continue_final_message=True, return_dict=False
    )
    logits = hooked_llama.module(input_ids=torch.tensor([ids])).logits[0, -1]
    assert found[1].startswith(hooked_llama.tokenizer.decode([int(logits.argmax())]))


@pytest.mark.parametrize(
    ("family", "written", "thought", "answer"),
    [
        ("qwen3", "<think>\nrain and sun\n</think>\n\nkeep it", "rain and sun", "keep it"),
        ("qwen3", "keep it", None, "keep it"),
        ("qwen3", "<think>\n\n</think>\n\nkeep it", None, "keep it"),
        ("qwen3", "<think>\nrain and", "rain and", ""),
        ("opened_thinking", "rain and sun\n</think>\n\nkeep it", "rain and sun", "keep it"),
        ("opened_thinking", "rain and", "rain and", ""),
    ],
)
def test_what_a_model_thinks_comes_back_as_reasoning(family, written, thought, answer):
    api, _ = scripted(getattr(support, f"{family}_tokenizer")(), written)
    (output,) = ask(api, [ASKED], max_tokens=64)
    content = output.choices[0].message.content
    reasoning = [one.reasoning for one in content if one.type == "reasoning"] if thought else None
    assert reasoning == ([thought] if thought else None)
    assert output.completion == answer
    assert output.choices[0].stop_reason == "stop"


def test_reasoning_goes_back_to_the_model_as_it_was_written():
    api, prompts = scripted(support.qwen3_tokenizer(), "<think>\nrain\n</think>\n\nkeep it")
    (first,) = ask(api, [ASKED], max_tokens=64)
    message = first.choices[0].message
    assert said(message) == "<think>\nrain\n</think>\n\nkeep it"
    begun = ChatMessageAssistant(
        content=[ContentReasoning(reasoning="rain"), ContentText(text="so")]
    )
    ask(api, [ASKED, begun], max_tokens=64)
    assert prompts[-1][0].endswith("<|im_start|>assistant\n<think>\nrain\n</think>\n\nso")


def test_calls_and_what_tools_gave_reach_the_model():
    api, prompts = scripted(support.qwen3_tokenizer(), "good")
    call = ToolCall(id="1", function="walk", arguments={"a": 1})
    chat = [
        ASKED,
        ChatMessageAssistant(content="", tool_calls=[call]),
        ChatMessageTool(content="the sun", tool_call_id="1", function="walk"),
    ]
    (output,) = ask(api, chat)
    assert output.completion == "good"
    assert "<call> walk </call>" in prompts[-1][0]
    assert "<|im_start|>tool\nthe sun<|im_end|>" in prompts[-1][0]


def test_what_is_no_text_is_refused_by_its_kind(hooked_llama):
    picture = ContentImage(image="data:image/png;base64,AAAA")
    message = ChatMessageUser(content=[ContentText(text="look"), picture])
    with pytest.raises(ValueError, match="a message of the role user holds image"):
        ask(EmlensAPI("m", model=hooked_llama), [ChatMessageSystem(content="Hi"), message])


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("answer", "", "answer"),
        ("<think>a</think>b", "a", "b"),
        (" <think>\na\n</think>\n\nb <think>c</think>", "a", "b <think>c</think>"),
        ("a</think>b", "a", "b"),
        ("<think>a", "a", ""),
        ("", "", ""),
    ],
)
def test_the_thinking_before_an_answer_is_told_apart(text, thought, answer):
    assert parted(text) == (thought, answer)
