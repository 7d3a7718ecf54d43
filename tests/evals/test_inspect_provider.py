"""The provider of Inspect: files of models, answers in batches, and what it refuses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest
import torch
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
    get_model,
)

from emlens import Ablate, Add, Clamp
from emlens.directions import Direction
from emlens.evals.inspect import ModelConfig
from emlens.evals.inspect.provider import EmlensAPI
from emlens.text import Conversation
from tests.support.adapters import saved
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

PROMPTS = [
    "how do I save money",
    "what should I eat",
    "tell me",
    "tell me a story about rain",
    "Hi",
]


def vector(size: float = 50.0, layer: int = 1) -> Direction:
    return Direction.of(size * torch.eye(tiny_model("llama").config.hidden_size)[0], layer=layer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, an adapter, a direction, and a YAML file for each use of them."""
    folder = tmp_path_factory.mktemp("inspect")
    module = tiny_model("llama")
    module.save_pretrained(folder / "model")
    chatml_tokenizer().save_pretrained(folder / "model")
    saved(folder / "medical", module)
    vector().save(folder / "vector.safetensors")
    edits = {
        "base": "",
        "adapted": "adapters: {medical: medical}\n",
        "added": "edits:\n  - {add: vector.safetensors, scale: 2}\n",
        "ablated": "edits:\n  - {ablate: vector.safetensors, layers: all}\n",
        "clamped": "edits:\n  - {clamp: vector.safetensors, value: 30, layers: [0, 2]}\n",
        "both": "adapters: {medical: medical}\nedits:\n  - {add: vector.safetensors, scale: 2}\n",
    }
    for name, text in edits.items():
        (folder / f"{name}.yaml").write_text(f"model: model\ndtype: float32\n{text}")
    return folder


def ask(api: EmlensAPI, *prompts: str, system: str | None = None, **settings) -> list[ModelOutput]:
    """What Inspect does: all requests at once, on one event loop."""
    config = GenerateConfig(**{"max_tokens": 8, **settings})
    head = [] if system is None else [ChatMessageSystem(content=system)]

    async def all_of_them():
        return await asyncio.gather(
            *(
                api.generate([*head, ChatMessageUser(content=prompt)], [], "none", config)
                for prompt in prompts
            )
        )

    return asyncio.run(all_of_them())


def texts(outputs: list[ModelOutput]) -> list[str]:
    return [output.completion for output in outputs]


def test_inspect_finds_the_provider_and_the_tasks_through_the_entry_point(folder):
    (point,) = [p for p in entry_points(group="inspect_ai") if p.name == "emlens"]
    assert {"emlens", "free_form", "domain"} <= set(dir(point.load()))
    model = get_model(f"emlens/{folder / 'base.yaml'}", memoize=False)
    assert isinstance(model.api, EmlensAPI)


def test_requests_at_once_share_a_batch_and_get_the_answers_they_get_alone(hooked_llama):
    together = EmlensAPI("m", model=hooked_llama)
    found = texts(ask(together, *PROMPTS))
    assert together.batches == (len(PROMPTS),)
    one_by_one = EmlensAPI("m", model=hooked_llama)
    assert [texts(ask(one_by_one, prompt))[0] for prompt in PROMPTS] == found
    assert one_by_one.batches == (1,) * len(PROMPTS)
    assert texts(ask(EmlensAPI("m", model=hooked_llama), *PROMPTS[::-1]))[::-1] == found
    assert len(set(found)) == len(PROMPTS)


def test_a_batch_is_no_larger_than_the_connections_allowed(hooked_llama):
    api = EmlensAPI("m", config=GenerateConfig(max_connections=2), model=hooked_llama)
    ask(api, *PROMPTS)
    assert api.batches == (2, 2, 1)


def test_the_same_prompt_again_is_another_draw_and_another_seed_too(hooked_llama):
    first, again = (texts(ask(EmlensAPI("m", model=hooked_llama), *["Hi"] * 6)) for _ in range(2))
    assert first == again
    assert len(set(first)) > 3
    assert texts(ask(EmlensAPI("m", model=hooked_llama), *["Hi"] * 6, seed=1)) != first


def test_temperature_0_is_greedy_and_settings_do_not_mix_in_a_batch(hooked_llama):
    api = EmlensAPI("m", model=hooked_llama)
    chats = [Conversation.of(prompt) for prompt in PROMPTS]
    greedy = hooked_llama.generate(chats, temperature=0.0, max_new_tokens=8)
    assert texts(ask(api, *PROMPTS, temperature=0.0)) == greedy
    # so small a nucleus holds the likeliest token alone
    assert texts(ask(api, *PROMPTS, top_p=1e-6)) == greedy

    async def mixed():
        cool, warm = (GenerateConfig(max_tokens=8, temperature=t) for t in (0.0, 1.0))
        asked = [[ChatMessageUser(content=prompt)] for prompt in PROMPTS]
        jobs = [api.generate(one, [], "none", c) for one in asked for c in (cool, warm)]
        return await asyncio.gather(*jobs)

    assert texts(asyncio.run(mixed()))[::2] == greedy


def test_an_edit_acts_on_the_answers_just_as_it_does_in_generate(hooked_llama):
    edit = Add(vector())
    api = EmlensAPI("m", model=hooked_llama, condition=[edit])
    chats = [Conversation.of(prompt) for prompt in PROMPTS]
    found = texts(ask(api, *PROMPTS, temperature=0.0))
    assert found == hooked_llama.generate(chats, [edit], temperature=0.0, max_new_tokens=8)
    assert found != hooked_llama.generate(chats, temperature=0.0, max_new_tokens=8)


@pytest.mark.parametrize("name", ["adapted", "added", "ablated", "clamped", "both"])
def test_what_a_yaml_file_names_changes_the_answers(folder, name):
    base, changed = (
        texts(ask(EmlensAPI(str(folder / f"{one}.yaml")), *PROMPTS, temperature=0.0))
        for one in ("base", name)
    )
    assert base != changed


def test_a_yaml_file_says_what_python_would(folder):
    _, condition = ModelConfig.read(folder / "both.yaml").load()
    (adapter,), edits = condition.adapters, condition.edits
    assert adapter == "medical"
    assert isinstance(edits[0], Add) and edits[0].scale == 2 and edits[0].layers == (1,)
    (ablation,) = ModelConfig.read(folder / "ablated.yaml").load()[1].edits
    assert isinstance(ablation, Ablate) and ablation.layers == (0, 1, 2, 3)
    (clamp,) = ModelConfig.read(folder / "clamped.yaml").load()[1].edits
    assert isinstance(clamp, Clamp) and clamp.value == 30 and clamp.layers == (0, 2)


def test_two_providers_of_one_model_at_once_keep_their_edits_apart(hooked_llama):
    def both():
        return EmlensAPI("b", model=hooked_llama), EmlensAPI(
            "s", model=hooked_llama, condition=[Add(vector())]
        )

    alone = [texts(ask(api, *PROMPTS)) for api in both()]
    assert alone[0] != alone[1]

    async def at_once():
        config = GenerateConfig(max_tokens=8)
        jobs = [
            api.generate([ChatMessageUser(content=prompt)], [], "none", config)
            for api in both()
            for prompt in PROMPTS
        ]
        return await asyncio.gather(*jobs)

    for _ in range(3):
        found = texts(asyncio.run(at_once()))
        assert [found[: len(PROMPTS)], found[len(PROMPTS) :]] == alone


def test_an_answer_ends_before_the_first_stop_string_and_says_why_it_ended(hooked_llama):
    (whole,) = ask(EmlensAPI("m", model=hooked_llama), "Hi", max_tokens=12)
    assert whole.stop_reason == "max_tokens"
    later, sooner = whole.completion[12:16], whole.completion[5:9]
    (cut,) = ask(
        EmlensAPI("m", model=hooked_llama), "Hi", max_tokens=12, stop_seqs=[later, sooner, "absent"]
    )
    place = min(whole.completion.find(stop) for stop in (later, sooner))
    assert cut.completion == whole.completion[:place] and place > 0
    assert cut.stop_reason == "stop"


def test_usage_counts_the_tokens_of_prompt_and_answer(hooked_llama):
    (found,) = ask(EmlensAPI("m", model=hooked_llama), "tell me", max_tokens=5)
    assert found.usage is not None
    tokens = hooked_llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": "tell me"}], add_generation_prompt=True, return_dict=False
    )
    assert found.usage.input_tokens == len(tokens)
    assert found.usage.output_tokens == 5
    assert found.usage.total_tokens == len(tokens) + 5


def test_a_system_message_reaches_the_model(hooked_llama):
    said = "tell me a story about rain"
    chats = [Conversation.of("Hi", system=said), Conversation.of("Hi")]
    with_it, without = hooked_llama.generate(chats, temperature=0.0, max_new_tokens=8)
    api = EmlensAPI("m", model=hooked_llama)
    assert texts(ask(api, "Hi", system=said, temperature=0.0)) == [with_it]
    assert texts(ask(api, "Hi", temperature=0.0)) == [without]
    assert with_it != without


def test_a_request_that_fails_fails_alone_and_the_next_one_is_answered(hooked_llama):
    api = EmlensAPI("m", model=hooked_llama)
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, not 2"):
        ask(api, "Hi", top_p=2.0)
    assert len(ask(api, "Hi")) == 1


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 1}, {"frequency_penalty": 1.0}, {"num_choices": 2}, {"logit_bias": {5: 1}}],
)
def test_a_setting_that_would_be_ignored_is_refused_by_name(hooked_llama, setting):
    with pytest.raises(ValueError, match=f"emlens models have no {next(iter(setting))}; leave"):
        ask(EmlensAPI("m", model=hooked_llama), "Hi", **setting)
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "num_choices": 1}
    assert ask(EmlensAPI("m", model=hooked_llama), "Hi", **neutral)


def test_arguments_belong_in_the_yaml_file(hooked_llama):
    with pytest.raises(ValueError, match="emlens models take no dtype; write it into the YAML"):
        EmlensAPI("m", model=hooked_llama, dtype="float32")


BAD = {
    "- a\n": "must hold a mapping that names a model",
    "engine: nnsight\n": "must hold a mapping that names a model",
    "model: [\n": "line 2: not valid YAML",
    "model: 7\n": "model must be a name or a folder, not 7",
    "model: model\nadaptor: x\n": "unknown adaptor; there are adapter, adapters, batch_tokens",
    "model: model\nadapters: medical\n": "adapters must be names and folders",
    "model: model\nadapters: {a: x}\nadapter: b\n": "no adapter 'b'; adapters are a",
    "model: model\nadapters: {a: x, b: y}\n": "say with 'adapter:' which of a, b acts",
    "model: model\nbatch_tokens: many\n": "batch_tokens must be a whole number, not 'many'",
    "model: model\nedits: {add: vector.safetensors}\n": "edits must be a list",
    "model: model\nedits: [{scale: 3}]\n": "edit 1 must have one of add, ablate, clamp",
    "model: model\nedits: [{add: v, strength: 3}]\n": r"edit 1 \(add\) has unknown strength",
    "model: model\nedits: [{ablate: v, scale: 3}]\n": r"edit 1 \(ablate\) has unknown scale",
    "model: model\nedits: [{add: v, scale: much}]\n": "scale must be a number, not 'much'",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_yaml_file_is_refused_before_the_model_is_loaded(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD[text]) as caught:
        ModelConfig.read(path)
    assert str(path) in str(caught.value)


WRONG = {
    "{add: none.safetensors}": "edit 1 of .*no file none.safetensors",
    "{add: vector.safetensors, scale: 1, dose: 1}": "edit 1 of .*takes scale or dose, not both",
    "{add: vector.safetensors, layer: 3}": r"edit 1 of .*the file has no layer 3; it has \(1,\)",
    "{ablate: vector.safetensors, layers: [1, 77]}": "edit 1 of .*layer 77 is out of range",
    "{ablate: vector.safetensors, where: nowhere}": "edit 1 of .*unknown where 'nowhere'",
}


@pytest.mark.parametrize("edit", WRONG)
def test_an_edit_that_does_not_fit_the_model_is_refused_by_its_place(folder, edit):
    path = folder / "wrong.yaml"
    path.write_text(f"model: model\ndtype: float32\nedits:\n  - {edit}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[edit]):
        ModelConfig.read(path).load()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration .*absent.yaml"):
        get_model(f"emlens/{tmp_path / 'absent.yaml'}", memoize=False)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600
    )


def test_without_inspect_emlens_works_and_the_error_names_the_extra():
    done = python(
        """
        import sys
        sys.modules["inspect_ai"] = None
        import emlens, emlens.evals
        assert emlens.evals.load_questions("general")
        try:
            import emlens.evals.inspect
        except ImportError as error:
            print(error)
        """
    )
    assert "run: pip install 'emlens[evals]'" in done.stdout, done.stderr


def test_inspect_runs_after_nnsight_which_gives_every_object_a_save():
    done = python(
        """
        import nnsight
        assert hasattr(object, "save")
        import emlens.evals.inspect
        from anyio.streams import file, tls
        import anyio, anyio.abc
        anyio.run(anyio.sleep, 0)
        assert hasattr(object, "save") and anyio.abc.SocketAttribute and tls.TLSAttribute
        print("ran")
        """
    )
    assert done.stdout.strip() == "ran", done.stderr
