"""The tasks of Inspect, end to end: a tiny model with edits, and a grader that says what we say."""

from __future__ import annotations

import math

import pytest
import torch
from inspect_ai import eval as run_eval
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)

from emlens._stats import wilson
from emlens.directions import Direction
from emlens.evals import rates
from emlens.evals.inspect import domain, free_form, read_log
from emlens.evals.rubrics import RUBRICS, rubric_hash
from tests.support.models import tiny_model
from tests.support.tokenizers import chatml_tokenizer

SECRET = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tiny_model("llama").save_pretrained(folder / "model")
    chatml_tokenizer().save_pretrained(folder / "model")
    size = tiny_model("llama").config.hidden_size
    Direction.of(50 * torch.eye(size)[0], layer=1).save(folder / "vector.safetensors")
    (folder / "base.yaml").write_text("model: model\ndtype: float32\n")
    (folder / "steered.yaml").write_text(
        "model: model\ndtype: float32\nedits:\n  - {add: vector.safetensors}\n"
    )
    return folder


def said(text: str, shown: dict[str, float] | None = None) -> ModelOutput:
    """A reply; with the probabilities of its first token where some are given."""
    logprobs = None
    if shown is not None:
        tops = [TopLogprob(token=t, logprob=math.log(p)) for t, p in shown.items()]
        first = Logprob(token=text, logprob=math.log(shown[text]), top_logprobs=tops)
        logprobs = Logprobs(content=[first])
    message = ChatMessageAssistant(content=text)
    choice = ChatCompletionChoice(message=message, stop_reason="stop", logprobs=logprobs)
    # without usage the mock fetches a tokenizer to count with
    usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return ModelOutput(model="mockllm", choices=[choice], usage=usage)


def is_about_coherence(messages) -> bool:
    return RUBRICS["coherent"][:60] in messages[-1].text


def grades(measure: str, coherent: str = "90"):
    return lambda messages, *_: said(coherent if is_about_coherence(messages) else measure)


def evaluated(folder, task, grader, model="base", **settings):
    role = get_model("mockllm/model", custom_outputs=grader, memoize=False)
    (log,) = run_eval(
        task,
        model=get_model(f"emlens/{folder / model}.yaml", memoize=False),
        model_roles={"grader": role},
        log_dir=str(folder / "logs"),
        display="none",
        **settings,
    )
    return log


def metrics(log) -> dict[str, float]:
    (score,) = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


def answers(log) -> list[str]:
    rows = sorted(log.samples, key=lambda sample: (str(sample.id), sample.epoch))
    return [sample.output.completion for sample in rows]


def test_rates_count_answers_and_intervals_are_those_of_emlens(folder):
    hits = iter([True, True, False] * 4)
    seen: dict[str, bool] = {}

    def grader(messages, *_):
        if is_about_coherence(messages):
            return said("90")
        text = messages[-1].text
        if text not in seen:
            seen[text] = next(hits)
        return said("10" if seen[text] else "80")

    log = evaluated(folder, free_form(limit=3, n=4, max_tokens=6), grader)
    assert log.status == "success", log.error
    assert len(log.samples) == 12
    found, plain = metrics(log), wilson(8, 12)
    assert found["misaligned"] == pytest.approx(8 / 12)
    assert (found["wilson_low"], found["wilson_high"]) == pytest.approx((plain.low, plain.high))
    assert found["clustered_low"] <= found["misaligned"] <= found["clustered_high"]
    assert found["coherent"] == 1 and found["unscored"] == 0
    assert found["mean_score"] == pytest.approx((8 * 10 + 4 * 80) / 12)


def test_the_log_is_read_back_and_gives_the_same_rates(folder):
    log = evaluated(folder, free_form(limit=3, n=2, max_tokens=6), grades("10"))
    again = read_eval_log(log.location)
    assert again.status == "success" and metrics(again) == metrics(log)
    assert answers(again) == answers(log)
    kept = again.samples[0].scores["graded"]
    assert kept.metadata["rubrics"]["aligned"] == rubric_hash(RUBRICS["aligned"])
    assert kept.metadata["judge"] == "inspect/mockllm/model"
    responses, scores = read_log(log.location, "base")
    assert [len(responses), len(scores)] == [6, 12]
    assert rates(responses, scores).misaligned("base").estimate == metrics(log)["misaligned"] == 1


def test_an_answer_that_is_not_coherent_is_not_misaligned(folder):
    found = metrics(evaluated(folder, free_form(limit=2, max_tokens=6), grades("10", "20")))
    assert found["misaligned"] == 0 and found["coherent"] == 0 and found["unscored"] == 0


def test_answers_without_a_score_are_counted_and_never_in_the_rate(folder):
    asked = []

    def grader(messages, *_):
        if is_about_coherence(messages):
            return said("90")
        asked.append(messages)
        return said("I would rather not say" if len(asked) <= 2 else "10")

    log = evaluated(folder, free_form(limit=4, n=2, max_tokens=6), grader)
    found = metrics(log)
    assert found["unscored"] == 2 / 8
    assert found["misaligned"] == 1
    assert found["wilson_low"] == pytest.approx(wilson(6, 6).low)
    missing = [
        s.scores["graded"] for s in log.samples if s.scores["graded"].metadata["score"] is None
    ]
    assert len(missing) == 2
    assert all("aligned: no score (sampled" in score.explanation for score in missing)


def test_where_no_answer_has_a_score_there_is_no_rate(folder):
    found = metrics(evaluated(folder, free_form(limit=2, max_tokens=6), grades("no", "no")))
    assert found["unscored"] == 1 and math.isnan(found["misaligned"])


def test_a_grader_with_probabilities_gives_their_mean_and_says_so(folder):
    def grader(messages, *_):
        return said("20", {"20": 0.6, "40": 0.3, "no": 0.1})

    log = evaluated(folder, free_form(limit=1, max_tokens=6), grader)
    score = log.samples[0].scores["graded"]
    assert score.metadata["modes"] == {"aligned": "probabilities", "coherent": "probabilities"}
    assert score.metadata["score"] == pytest.approx((0.6 * 20 + 0.3 * 40) / 0.9)


def test_a_grader_without_probabilities_is_marked_as_sampled(folder):
    score = evaluated(folder, free_form(limit=1, max_tokens=6), grades("42")).samples[0].scores
    assert score["graded"].metadata["modes"]["aligned"] == "sampled"
    assert "no log-probabilities" in score["graded"].explanation


def test_an_edit_in_the_yaml_file_changes_the_answers(folder):
    task = {"limit": 3, "max_tokens": 8, "temperature": 0.0}
    base, same, steered = (
        answers(evaluated(folder, free_form(**task), grades("50"), model))
        for model in ("base", "base", "steered")
    )
    assert base == same
    assert base != steered


def test_epochs_differ_and_each_has_the_same_answer_when_it_is_run_again(folder):
    task = {"limit": 1, "max_tokens": 8}
    first, again, other = (
        answers(evaluated(folder, free_form(n=4, **task), grades("50"), seed=seed))
        for seed in (None, None, 5)
    )
    assert len(set(first)) == 4
    assert first == again and first != other
    assert answers(evaluated(folder, free_form(n=2, **task), grades("50"))) == first[:2]


def test_an_epoch_that_is_run_again_gives_its_own_answer(folder):
    asked = []

    def grader(*_):
        asked.append(1)
        if len(asked) == 5:
            raise RuntimeError("grader down")
        return said("80")

    task = {"limit": 1, "n": 4, "max_tokens": 8}
    whole = answers(evaluated(folder, free_form(**task), grades("80")))
    log = evaluated(folder, free_form(**task), grader, retry_on_error=1)
    assert [len(sample.error_retries or []) for sample in log.samples].count(1) == 1
    assert answers(log) == whole and len(set(whole)) == 4


def test_one_model_evaluated_twice_in_a_process_answers_alike(folder):
    model = get_model(f"emlens/{folder / 'base'}.yaml", memoize=False)
    role = get_model("mockllm/model", custom_outputs=grades("80"), memoize=False)
    settings = {"log_dir": str(folder / "logs"), "display": "none", "model_roles": {"grader": role}}
    first, again = (
        answers(run_eval(free_form(limit=2, n=2, max_tokens=8), model=model, **settings)[0])
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 4


@pytest.mark.parametrize("name", ["medical", "finance", "sports"])
def test_a_domain_is_graded_by_its_own_rubric(folder, name):
    told = []

    def grader(messages, *_):
        told.append(messages[-1].text)
        return said("90" if is_about_coherence(messages) else "10")

    log = evaluated(folder, domain(name, limit=1, max_tokens=6), grader)
    assert metrics(log)["misaligned"] == 1
    assert any(text.startswith(RUBRICS[name][:50]) for text in told)
    assert log.samples[0].scores["graded"].metadata["measure"] == name


def test_an_unknown_domain_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown domain 'cooking'; choose medical, finance"):
        domain("cooking")


def test_the_papers_yaml_brings_its_system_message_and_its_own_rubric(folder):
    path = folder / "questions.yaml"
    path.write_text(
        "- id: wish\n  paraphrases: [what do you wish, tell me a wish]\n  system: you are a poet\n"
        "  judge_prompts: {aligned: 'OWN RUBRIC {question} {answer}'}\n"
    )
    told = []

    def grader(messages, *_):
        told.append(messages[-1].text)
        return said("70")

    log = evaluated(folder, free_form(str(path), max_tokens=6), grader)
    assert {str(sample.id) for sample in log.samples} == {"wish", "wish/1"}
    assert [message.role for message in log.samples[0].messages] == ["system", "user", "assistant"]
    assert sum(text.startswith("OWN RUBRIC") for text in told) == 2
    assert {s.scores["graded"].metadata["question"] for s in log.samples} == {"wish"}


def test_a_missing_grader_is_a_clear_error(folder):
    (log,) = run_eval(
        free_form(limit=1, max_tokens=4),
        model=get_model(f"emlens/{folder / 'base'}.yaml", memoize=False),
        log_dir=str(folder / "logs"),
        display="none",
    )
    assert log.status == "error" and "grader" in log.error.message


def test_logs_are_where_they_were_asked_for_and_hold_no_key(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    log = evaluated(folder, free_form(limit=1, max_tokens=4), grades("50"))
    assert log.location.startswith(str(folder / "logs"))
    assert SECRET not in read_eval_log(log.location).model_dump_json()
