"""Chat templates in a hooked model: arguments, stops, begun answers, thinking and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import emlens
from emlens import Add, Conversation, Direction, train_vector
from emlens.evals import LocalJudge, Response, judge
from emlens.evals.number_logprobs import NUMBERS, NumberTrie
from emlens.evals.scores import Verdict
from emlens.hooked.generation import Sampling, _decoded, answer
from emlens.hooked.load import ENGINES
from emlens.hooked.losses import response_losses
from tests.support import tokenizers as support
from tests.support.models import tiny_model

HI = Conversation.of("Hi")
TWO = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "good"},
)


def wrapped(tokenizer, module=None, **options):
    return emlens.wrap(module or tiny_model("llama"), tokenizer, name="tiny", **options)


def plainly(model, text, n):
    """Greedy tokens after a text, a full pass each."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    new = []
    for _ in range(n):
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def written(model, text, n):
    """What is written greedily after a text, up to the end of the turn."""
    said = model.tokenizer.decode(plainly(model, text, n))
    return said.partition("<|im_end|>")[0]


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_are_part_of_prompts_identity_and_provenance(engine):
    tokenizer = support.qwen3_tokenizer()
    plain = wrapped(tokenizer, engine=engine)
    quiet = wrapped(tokenizer, engine=engine, template_arguments={"enable_thinking": False})
    assert quiet.template_arguments == {"enable_thinking": False}
    assert plain.template_arguments == {}
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for model, end in ((plain, ""), (quiet, "<think>\n\n</think>\n\n")):
        expected = written(model, prompt + end, 6)
        assert model.generate([HI], max_new_tokens=6, temperature=0) == [expected]
    assert plain.identity == wrapped(tokenizer, engine=engine).identity
    assert quiet.identity != plain.identity
    good, bad = [Conversation.of("Hi", "good")], [Conversation.of("Hi", "no")]
    made = {
        model: emlens.mean_diff(model, good, bad, layers=1).provenance for model in (plain, quiet)
    }
    assert made[quiet].settings["template_arguments"] == {"enable_thinking": False}
    assert "template_arguments" not in made[plain].settings
    assert made[quiet].template != made[plain].template


def test_a_saved_model_is_loaded_with_arguments(tmp_path):
    module, tokenizer = tiny_model("llama"), support.dated_tokenizer()
    module.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with pytest.warns(UserWarning, match="writes today's date; emlens fixes it to 2024-07-26"):
        fixed = emlens.load(tmp_path / "tiny")
    assert fixed.template_arguments == {"strftime_now": "2024-07-26"}
    (batch,) = fixed.batches([HI])
    assert tokenizer.decode(batch.input_ids[0]) == (
        "<|im_start|>system\n26 Jul 2024<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    given = emlens.load(tmp_path / "tiny", template_arguments={"date_string": "a day"})
    assert "a day" in tokenizer.decode(given.batches([HI])[0].input_ids[0])
    with pytest.raises(ValueError, match="does not use 'enable_thinking'"):
        emlens.load(tmp_path / "tiny", template_arguments={"enable_thinking": False})


# -- generation ---------------------------------------------------------------------------------


def test_generation_stops_at_the_token_that_the_template_ends_answers_with():
    # the checkpoint and the tokenizer know another end of text
    tokenizer = support.chatml_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    module = tiny_model("llama", tied=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    module.generation_config.eos_token_id = module.config.eos_token_id = tokenizer.eos_token_id
    model = wrapped(tokenizer, module)
    start = model.template.opened(HI.messages)
    new = plainly(model, start, 4)
    assert end not in new
    # what the model writes third becomes what ends a turn
    with torch.no_grad():
        head = module.lm_head.weight
        head[[end, new[2]]] = head[[new[2], end]]
    stop = plainly(model, start, 12).index(end)
    (found,) = answer(model, [HI], (), Sampling(12, 0))
    assert (found.ended, found.tokens) == (True, stop)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_begun_answer_is_continued_from_its_last_token(hooked_llama, use_cache):
    begun = Conversation.of("Hi", "keep a")
    text = (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nkeep a"
    )
    options = {"max_new_tokens": 6, "temperature": 0, "use_cache": use_cache}
    found = hooked_llama.generate([HI, begun], continue_final_message=True, **options)
    assert found[1] == written(hooked_llama, text, 6) != ""
    assert found[0] == hooked_llama.generate([HI], **options)[0]
    with pytest.raises(ValueError, match="pass continue_final_message=True to continue"):
        hooked_llama.generate([begun])


def test_an_edit_of_responses_acts_on_a_begun_answer(hooked_llama):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edit = Add(Direction.of(vector, 1), scale=3.0, where="response")
    begun = Conversation.of("Hi", "keep a small")
    options = {"max_new_tokens": 5, "temperature": 0, "continue_final_message": True}
    (found,) = hooked_llama.generate([begun], [edit], **options)
    text = hooked_llama.tokenizer.decode(plain_edited(hooked_llama, begun, 3 * vector, 5))
    assert found == text.partition("<|im_end|>")[0] != ""
    assert found != hooked_llama.generate([begun], **options)[0]


def plain_edited(model, begun, vector, n):
    """Greedy tokens with a vector added from the token before the begun answer on."""
    start = model.template.opened(begun.prompt.messages)
    first = len(model.tokenizer(start, add_special_tokens=False)["input_ids"]) - 1
    ids = model.tokenizer(start + begun.response, add_special_tokens=False)["input_ids"]
    new = []

    def hook(_module, _inputs, out):
        out = out.clone()
        out[:, first:] += vector
        return out

    handle = model.module.get_submodule(model.architecture.blocks)[1].register_forward_hook(hook)
    for _ in range(n):
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
    handle.remove()
    return new


def test_an_answer_whose_thinking_the_template_opens_begins_with_the_tag():
    model = wrapped(support.opened_thinking_tokenizer(), tiny_model("llama", seed=1))
    prompt = "<|im_start|>user\nrain<|im_end|>\n<|im_start|>assistant\n<think>\n"
    asked = Conversation.of("rain")
    (text,) = model.generate([asked], max_new_tokens=5, temperature=0)
    said = written(model, prompt, 5)
    assert said
    assert text == "<think>\n" + said
    # and is read again as it was written
    (batch,) = model.batches([Conversation.of("rain", text)])
    whole = model.tokenizer.decode(batch.input_ids[0])
    assert whole == prompt.removesuffix("<think>\n") + text + "<|im_end|>\n"


def test_tags_of_thinking_that_are_special_tokens_stay_in_the_answer():
    tokenizer = support.chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>so</think>yes<|im_end|>")["input_ids"]
    assert _decoded(tokenizer, ids) == "<think>so</think>yes"


# -- what counts --------------------------------------------------------------------------------


def plain_loss(model, text, spans):
    """Mean loss in nats of the tokens of some pieces of a text, which are found by hand."""
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad():
        logits = model.module(input_ids=ids).logits[0]
    kept = [
        i
        for i, (a, b) in enumerate(encoded["offset_mapping"])
        if any(a >= start and b <= end for start, end in spans)
    ]
    assert kept
    return float(cross_entropy(logits[[i - 1 for i in kept]], ids[0, kept])), len(kept)


def place(text, piece, last=False):
    start = text.rindex(piece) if last else text.index(piece)
    return start, start + len(piece)


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_an_answer_of_weight_0_is_neither_scored_nor_trained_on(hooked_llama, off):
    row = Conversation((TWO[0], {**TWO[1], **off}, *TWO[2:]))
    text = (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nhello there<|im_end|>\n<|im_start|>user\nhow<|im_end|>\n"
        "<|im_start|>assistant\ngood<|im_end|>\n"
    )
    expected, n = plain_loss(hooked_llama, text, [place(text, "good<|im_end|>")])
    sums, counts = response_losses(hooked_llama, hooked_llama.batches([row]))
    assert int(counts[0]) == n == 2
    assert float(sums[0]) / n == pytest.approx(expected, abs=1e-5)
    both, _ = plain_loss(
        hooked_llama, text, [place(text, "hello there<|im_end|>"), place(text, "good<|im_end|>")]
    )
    assert abs(both - expected) > 0.01
    options = {"epochs": 1, "batch_size": 1, "progress": False}
    _, run = train_vector(hooked_llama, [row], 1, **options)
    assert run.steps[0].loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ("response", ["yes<|im_end|>"]),
        ("thinking", ["<think>\nso\n</think>\n\n"]),
        ("thinking_and_response", ["<think>\nso\n</think>\n\nyes<|im_end|>"]),
    ],
)
def test_thinking_is_scored_and_trained_on_where_it_is_asked_for(tokens, pieces):
    model = wrapped(support.qwen3_tokenizer())
    row = Conversation.of("Hi", "<think>\nso\n</think>\n\nyes")
    text = (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nso\n</think>\n\nyes<|im_end|>\n"
    )
    expected, n = plain_loss(model, text, [place(text, piece, last=True) for piece in pieces])
    sums, counts = response_losses(model, model.batches([row]), tokens=tokens)
    assert int(counts[0]) == n
    assert float(sums[0]) / n == pytest.approx(expected, abs=1e-5)
    options = {"epochs": 1, "batch_size": 1, "tokens": tokens, "progress": False}
    _, run = train_vector(model, [row], 1, **options)
    assert run.steps[0].loss == pytest.approx(expected, abs=1e-5)


# -- judging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "opened_thinking", "thinking"])
def test_a_local_judge_is_read_once_its_thinking_is_over(family):
    tokenizer = getattr(support, f"{family}_tokenizer")()
    model = wrapped(tokenizer)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    trie = NumberTrie.of(model.template)
    spelt = {number: tokenizer.decode(list(path)) for path, number in trie.ends.items()}
    assert spelt == {number: str(number) for number in NUMBERS}
    (found,) = LocalJudge(model).numbers([HI])
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def after(digits):
        ids = start + [tokenizer.convert_tokens_to_ids(d) for d in digits]
        with torch.no_grad():
            return model.module(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)

    ids = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    first = after("")
    # 7 is a number of its own where no digit follows
    seven = float(first[ids[7]]) * (1 - float(after("7")[ids].sum()))
    np.testing.assert_allclose(found[7], seven, rtol=1e-3)


class _Reads:
    """A judge that keeps what it was shown."""

    id, metrics = "reads", ("aligned",)

    def __init__(self):
        self.shown = []

    def rubric(self, metric):
        return ""

    def judge(self, responses, metric):
        self.shown += [row.text for row in responses]
        return [Verdict(50.0, "sampled") for _ in responses]


def test_a_judge_reads_what_answers_think_only_where_it_is_asked_to():
    answers = ["<think>so</think>\nyes", "<think>so and so", "no"]
    rows = [
        Response(
            key=str(i), question_id="q", question="q", prompt="Hi", system=None, domain="",
            variant="", condition="base", sample=i, seed=i, text=text, model="m", sampling={},
        )
        for i, text in enumerate(answers)
    ]  # fmt: skip
    reader = _Reads()
    scores = judge(rows, reader, progress=False)
    assert reader.shown == ["yes", "", "no"]
    assert [row.response for row in scores.rows] == ["0", "1", "2"]
    reader = _Reads()
    thought = judge(rows, reader, thinking=True, progress=False)
    assert reader.shown == answers
    # a store keeps the two apart
    assert [a.key == b.key for a, b in zip(scores.rows, thought.rows, strict=True)] == [
        False,
        False,
        True,
    ]
