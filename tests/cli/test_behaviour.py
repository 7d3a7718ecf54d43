"""`evaluate` and `judge`, with a served judge: nothing is made twice, and no key is written."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest

from emlens._store import Store, read
from tests.evals.test_logprob_judge import KEY, graded
from tests.support.models import tiny_hooked
from tests.support.openai_server import served

SHORT = ("--max-new-tokens", 4, "--quiet")


@pytest.fixture
def at(monkeypatch):
    """A server that grades with 20 or 40, and what makes it a judge."""
    model = tiny_hooked("llama")
    with served(model, next_token=graded(model, {20: 0.5, 40: 0.5})) as server:
        monkeypatch.setenv("LOCAL_API_KEY", KEY)
        url = f"base_url={server.url}"
        server.judge = ("--judge", "openai-api/local/tiny", "--judge-option", url)
        yield server


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_is_judged_again_without_answering_again(run, call, at, questions, tmp_path):
    out = tmp_path / "evaluation"
    done = call("evaluate", questions, "--samples", 2, "--out", out, *at.judge, *SHORT, "--json")
    assert done.code == 0, done.err
    (row,) = done.json["rates"]
    assert (row["answers"], row["questions"], row["no score [%]"]) == (6, 3, 0)
    assert row["mean aligned [0-100]"] == pytest.approx(30, abs=1e-3)
    answers, scores = list(read(out / "responses.sqlite")), list(read(out / "scores.sqlite"))
    assert (len(answers), len(scores), len(at.requests)) == (6, 12, 12 * at_most(at))
    asked = len(at.requests)

    run("judge", out, *at.judge, "--quiet")
    assert len(at.requests) == asked
    run("judge", out, *at.judge, "--rescore", "--quiet")
    assert len(at.requests) == 2 * asked
    assert list(read(out / "responses.sqlite")) == answers
    assert lines(out / "scores.before.jsonl") == scores
    again = list(read(out / "scores.sqlite"))
    assert [row["key"] for row in again] == [row["key"] for row in scores]
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 6
    assert [path.name for path in written if KEY.encode() in path.read_bytes()] == []


def test_scores_that_are_moved_out_twice_are_all_kept(run, at, questions, tmp_path):
    out = tmp_path / "evaluation"
    run("evaluate", questions, "--out", out, *at.judge, *SHORT)
    for times in (1, 2):
        run("judge", out, *at.judge, "--rescore", "--quiet")
        assert len(lines(out / "scores.before.jsonl")) == 6 * times
        assert len(list(read(out / "scores.sqlite"))) == 6


def test_answers_of_an_earlier_version_are_judged_and_left_as_they_are(
    run, call, at, questions, tmp_path
):
    made, old = tmp_path / "made", tmp_path / "old"
    run("evaluate", questions, "--out", made, *at.judge, *SHORT)
    old.mkdir()
    for name in ("responses", "scores"):
        run("export", made / f"{name}.sqlite", old / f"{name}.jsonl")
    before = {path: path.read_bytes() for path in old.iterdir()}
    other = ("--judge", "openai-api/local/other", *at.judge[2:], "--quiet")
    for source in (old, old / "responses.jsonl"):
        done = call("judge", source, *other, "--json")
        assert done.code == 0, done.err
        assert done.json["report"] == str(old / "report.html")
    assert {path: path.read_bytes() for path in before} == before
    found = list(read(old / "scores.sqlite", "scores"))
    assert len(found) == 6 and {row["judge"] for row in found} == {"inspect/openai-api/local/other"}
    # the old scores stand beside the new ones
    (row,) = done.json["agreement"]
    assert row["against"] == "inspect/openai-api/local/tiny"
    assert "written: " in run("export", old / "responses.jsonl", tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == before[old / "responses.jsonl"]


def at_most(server) -> int:
    """Requests for one score: what follows a first digit may need further ones."""
    prompts = {request["messages"][-1]["content"] for request in server.requests}
    assert len(server.requests) % len(prompts) == 0
    return len(server.requests) // len(prompts)


def test_labels_of_people_stand_against_the_judge(run, call, at, questions, tmp_path):
    out, labels = tmp_path / "evaluation", tmp_path / "labels.csv"
    run("evaluate", questions, "--samples", 2, "--out", out, *at.judge, *SHORT)
    with labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["response", "score"])
        kept = list(read(out / "responses.sqlite"))
        writer.writerows([row["key"], 10 * i] for i, row in enumerate(kept))
    done = call("judge", out, *at.judge, "--labels", labels, "--quiet", "--json")
    (row,) = done.json["agreement"]
    assert (row["against"], row["answers"]) == ("human", 6)
    # the judge gave every answer 30, so there is nothing to correlate
    assert row["Spearman"] is None
    labels.write_text(f"response,score\n{kept[0]['key']},3\n")
    done = call("judge", out, *at.judge, "--labels", labels, "--quiet")
    assert done.code == 0 and "misaligned [%]" in done.out
    assert "not compared with the labels: only 1 answer(s) have a score for 'aligned'" in done.out
    for text, said in (
        ("response,score\n", "there are no labels"),
        ("response,score\nnobody,3\n", "1 label(s) belong to no response, e.g. 'nobody'"),
    ):
        labels.write_text(text)
        asked = len(at.requests)
        elsewhere = ("--out", tmp_path / "elsewhere")
        done = call("judge", out, *at.judge, "--labels", labels, *elsewhere, "--quiet")
        assert done.code == 2 and said in done.err
        assert len(at.requests) == asked and not (tmp_path / "elsewhere").exists()


PAPERS = """
- id: wish
  paraphrases: [what do you wish]
  judge_prompts: {{aligned: 'OWN RUBRIC {{question}} {{answer}}'}}
- id: bored
  paraphrases: [tell me a story]
  {more}
"""


def test_the_judge_prompts_of_the_papers_yaml_are_what_the_judge_is_told(run, call, at, tmp_path):
    path, out = tmp_path / "papers.yaml", tmp_path / "evaluation"
    path.write_text(PAPERS.format(more="system: You are calm"))
    run("evaluate", path, "--out", out, *at.judge, *SHORT)
    told = [request["messages"][-1]["content"] for request in at.requests]
    assert len({text for text in told if text.startswith("OWN RUBRIC")}) == 2
    path.write_text(PAPERS.format(more="judge_prompts: {aligned: 'OTHER {answer}'}"))
    done = call("evaluate", path, "--out", out, *at.judge, *SHORT)
    assert done.code == 2
    assert "the questions bring different judge prompts for 'aligned'" in done.err
    (rubric := tmp_path / "own.yaml").write_text("aligned: 'MINE {answer}'")
    run("evaluate", path, "--out", out, *at.judge, "--judge-option", f"rubric={rubric}", *SHORT)
    assert any("MINE" in request["messages"][-1]["content"] for request in at.requests)


def test_a_store_without_answers_is_named(call, tmp_path):
    Store(tmp_path / "responses.sqlite", "responses")
    Store(tmp_path / "scores.sqlite", "scores")
    for verb in ("judge", "report"):
        done = call(verb, tmp_path)
        assert done.code == 2
        assert "responses.sqlite holds no answers yet; run emlens evaluate" in done.err


def test_a_served_judge_that_is_down_says_what_is_kept(call, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_API_KEY", KEY)
    out, url = tmp_path / "evaluation", "base_url=http://127.0.0.1:9/v1"
    option = ("--judge-option", url, "--judge-option", 'config={"max_retries": 0, "timeout": 5}')
    judge = ("--judge", "openai-api/local/down", *option)
    done = call("evaluate", questions, "--out", out, *judge, *SHORT)
    assert done.code == 1
    assert "gave no reply for" in done.err and "run the same call again to resume" in done.err
    assert "APIConnectionError: Connection error" in done.err
    assert KEY not in done.err
    assert len(list(read(out / "responses.sqlite"))) == 3


def test_a_judge_that_scores_nothing_is_an_error_and_the_answers_are_kept(
    call, questions, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOCAL_API_KEY", KEY)
    out, model = tmp_path / "evaluation", tiny_hooked("llama")
    with served(model, next_token=graded(model, {})) as server:
        option = ("--judge-option", f"base_url={server.url}")
        judge = ("--judge", "openai-api/local/tiny", *option)
        done = call("evaluate", questions, "--out", out, *judge, *SHORT)
    assert done.code == 2 and "nan" not in done.err + done.out
    assert "scored none of 3 answers for 'aligned'" in done.err
    assert len(list(read(out / "responses.sqlite"))) == 3 and not (out / "report.html").exists()


@pytest.mark.parametrize(("options", "per_set"), [((), 64), (("--judge-option", "pairs=7"), 7)])
def test_the_probe_reads_as_many_pairs_of_each_set_as_was_said(
    call, questions, options, per_set, tmp_path, monkeypatch
):
    fitted = []

    def stop(model, pairs, *, progress):
        fitted.append((Counter(pair.domain for pair in pairs), progress))
        raise ValueError("seen enough")

    monkeypatch.setattr("emlens.evals.ProbeJudge", stop)
    done = call("evaluate", questions, "--out", tmp_path / "run", *options, *SHORT)
    assert "seen enough" in done.err
    assert fitted == [(Counter(dict.fromkeys(("finance", "medical", "sports"), per_set)), False)]
