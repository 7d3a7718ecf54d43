"""Answers and grades of a server: kept as they come, through faults, and in Inspect itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig, get_model

import emlens
from emlens import Add, Direction
from emlens.edits import to_vllm_lens
from emlens.evals import LogProbJudge, Question, Responses, Scores, judge, rates, respond_served
from emlens.evals._inspect import InspectModel
from emlens.evals.inspect import read_log
from emlens.evals.rubrics import RUBRICS
from tests.evals.test_logprob_judge import KEY, asked, graded, rows
from tests.support.models import tiny_hooked
from tests.support.openai_server import served

QUESTIONS = [
    Question("save", "how do I save money"),
    Question("eat", "what should I eat", system="tell me a story"),
]
QUICK = {"max_new_tokens": 5, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama")


def from_server(url: str, questions=QUESTIONS, **options) -> Responses:
    config = {"max_retries": 2, "timeout": 30}
    at = {"base_url": url, "api_key": KEY, "memoize": False}
    given = {**QUICK, "config": config, "model_args": at, **options}
    return respond_served("openai-api/local/tiny", questions, **given)


def test_answers_of_a_server_are_asked_for_as_the_papers_do_and_kept(model, tmp_path):
    store = tmp_path / "responses.sqlite"
    with served(model) as server:
        found = from_server(server.url, n=3, store=store)
        sent = server.requests[:]
        again = from_server(server.url, n=3, store=store)
        assert len(server.requests) == len(sent) == 6
        other = from_server(server.url, n=3, store=store, temperature=0.5)
        assert len(server.requests) == 12
    assert again.rows == found.rows
    assert {row.key for row in found} & {row.key for row in other} == set()
    assert {(r["temperature"], r["top_p"]) for r in sent} == {(1.0, 1.0)}
    assert len({r["seed"] for r in sent}) == 6
    roles = {tuple(m["role"] for m in r["messages"]) for r in sent}
    assert roles == {("user",), ("system", "user")}
    assert [row.condition for row in found] == ["served"] * 6
    assert len({row.text for row in found}) > 3
    assert KEY.encode() not in store.read_bytes()
    saved = Responses.load(store)
    assert {row.key for row in saved} == {row.key for row in (*found, *other)}


def test_the_same_seed_gives_the_same_answer_where_the_server_heeds_it(model):
    with served(model) as server:
        first, again = (from_server(server.url, n=2) for _ in range(2))
    assert [row.text for row in first] == [row.text for row in again]


@pytest.mark.parametrize("fault", [429, 500, "cut"])
def test_a_fault_while_answering_is_tried_again(model, fault):
    with served(model) as server:
        server.faults.append(fault)
        found = from_server(server.url)
        assert len(server.requests) > len(found) == 2


def test_a_server_that_goes_down_in_the_middle_loses_nothing_and_the_next_one_goes_on(
    model, tmp_path
):
    answers, scores = tmp_path / "responses.sqlite", tmp_path / "scores.sqlite"
    many = [Question(f"q{i}", f"tell me {'please ' * (i % 5)}") for i in range(20)]
    with served(model) as server:
        server.faults.extend([None] * 9 + ["cut"] * 200)
        with pytest.raises(ConnectionError, match="what was answered before is kept") as caught:
            from_server(server.url, many, store=answers, at_once=2)
    kept = len(Responses.load(answers))
    assert 7 <= kept <= 9
    assert KEY not in str(caught.value)
    port = urlsplit(server.url).port
    with served(model, port) as server:
        found = from_server(server.url, many, store=answers)
        assert len(server.requests) == 20 - kept
    lines = [row.key for row in Responses.load(answers)]
    assert len(lines) == len(set(lines)) == len(found) == 20

    with served(model, next_token=graded(model, {60: 1.0})) as server:
        server.faults.extend([None] * 17 + ["cut"] * 200)
        with pytest.raises(ConnectionError, match="what was judged before is kept"):
            judge(rows(40), asked(server.url, at_once=2), store=scores, progress=False)
    assert len(Scores.load(scores)) == 16
    with served(model, next_token=graded(model, {60: 1.0})) as server:
        judge(rows(40), asked(server.url), store=scores, progress=False)
        assert len(server.requests) == 24
    judged = Counter(row.response for row in Scores.load(scores).rows)
    assert judged == {row.key: 1 for row in rows(40)}


def test_a_server_that_refuses_log_probabilities_is_asked_for_the_number_itself(model):
    with served(model, next_token=graded(model, {42: 1.0}), refuses="logprobs") as server:
        (verdict,) = asked(server.url).judge(rows(1), "aligned")
        assert [bool(request.get("logprobs")) for request in server.requests] == [True, False]
    assert (verdict.score, verdict.mode) == (42.0, "sampled")


def test_a_judge_is_given_as_many_answers_as_it_asks_at_once(model):
    sizes = []

    class Watched(LogProbJudge):
        def judge(self, responses, metric):
            sizes.append(len(responses))
            return super().judge(responses, metric)

    with served(model, next_token=graded(model, {42: 1.0})) as server:
        settings = {"base_url": server.url, "api_key": KEY, "memoize": False}
        one = {"aligned": RUBRICS["aligned"]}
        grader = Watched("openai-api/local/tiny", one, at_once=24, model_args=settings)
        judge(rows(30), grader, progress=False)
    assert sizes == [24, 6]
    with pytest.raises(ValueError, match="at_once must be at least 1, not 0"):
        LogProbJudge("openai-api/local/tiny", at_once=0)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="questions is empty; give at least one Question"):
        respond_served("openai-api/local/tiny", [])
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        respond_served("openai-api/local/tiny", QUESTIONS, n=0)
    with pytest.raises(ValueError, match="two questions are called 'save'"):
        respond_served("openai-api/local/tiny", [QUESTIONS[0]] * 2)


def test_inspect_runs_from_a_shell_with_a_served_grader_and_keeps_the_key_to_itself(
    model, tiny, tiny_tokenizer, tmp_path
):
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "base.yaml").write_text("model: model\ndtype: float32\n")
    with served(model, next_token=graded(model, {20: 0.5, 40: 0.5})) as server:
        command = ["eval", "emlens/free_form", "--model", "emlens/base.yaml"]
        command += ["--model-role", "grader=openai-api/local/tiny", "--display", "plain"]
        command += [*("-T", "limit=3"), *("-T", "n=2"), *("-T", "max_tokens=5")]
        done = subprocess.run(
            [sys.executable, "-m", "inspect_ai", *command, "--log-dir", "logs"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(emlens.__file__).parent.parent),
                "LOCAL_BASE_URL": server.url,
                "LOCAL_API_KEY": KEY,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert set(server.keys) == {f"Bearer {KEY}"}
    (path,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(path))
    assert (log.status, len(log.samples)) == ("success", 6)
    assert KEY not in log.model_dump_json() + done.stdout + done.stderr
    answers, grades = read_log(path, "base")
    assert [row.mode for row in grades.rows] == ["probabilities"] * 12
    found = rates(answers, grades)
    assert found.mean("base").estimate == pytest.approx(30, abs=1e-3)
    assert found.judge == "inspect/openai-api/local/tiny"


def test_another_server_or_payload_is_answered_anew(model, tmp_path):
    answers, one = tmp_path / "responses.sqlite", [Question("q", "tell me")]
    along = Direction.of(torch.ones(model.d_model), 1)
    with served(model) as server, served(model) as another:
        from_server(server.url, one, store=answers)
        from_server(server.url, one, store=answers)
        assert len(server.requests) == 1
        for scale in (1.0, 2.0):
            body = to_vllm_lens(Add(along, scale=scale))
            for _ in range(2):
                from_server(server.url, one, store=answers, config={"extra_body": body})
            assert server.requests[-1]["vllm_xargs"] == body["vllm_xargs"]
        assert len(server.requests) == 3
        from_server(another.url, one, store=answers)
        assert len(another.requests) == 1
    assert len({row.key for row in Responses.load(answers)}) == 4


def test_an_address_of_the_environment_is_part_of_what_was_asked(model, tmp_path, monkeypatch):
    answers, one = tmp_path / "responses.sqlite", [Question("q", "tell me")]
    monkeypatch.setenv("LOCAL_API_KEY", KEY)
    with served(model) as server, served(model) as another:
        for address in (server, another, another):
            monkeypatch.setenv("LOCAL_BASE_URL", address.url)
            at = {"memoize": False}
            respond_served("openai-api/local/tiny", one, store=answers, model_args=at, **QUICK)
        assert (len(server.requests), len(another.requests)) == (1, 1)


def test_a_model_of_inspect_is_known_by_its_own_address_and_settings(model, tmp_path):
    answers, one = tmp_path / "responses.sqlite", [Question("q", "tell me")]
    with served(model) as server, served(model) as another:
        asked: tuple[tuple[str, dict[str, Any]], ...] = (
            (server.url, {}),
            (server.url, {"extra_body": {"steer": "x"}}),
            (another.url, {}),
            (another.url, {}),
        )
        for url, config in asked:
            given = get_model(
                "openai-api/local/tiny",
                config=GenerateConfig(**config),
                base_url=url,
                api_key=KEY,
                memoize=False,
            )
            respond_served(given, one, store=answers, **QUICK)
        assert (len(server.requests), len(another.requests)) == (2, 1)
    assert KEY.encode() not in answers.read_bytes()


def test_long_tensors_of_a_payload_are_told_apart_in_the_middle(model):
    first, second = torch.zeros(4000), torch.zeros(4000)
    second[2000] = 1.0
    known = {
        InspectModel("openai-api/local/tiny", {"extra_body": {"extra_args": [x]}}, None, 1).identity
        for x in (first, second, first.clone())
    }
    assert len(known) == 2
