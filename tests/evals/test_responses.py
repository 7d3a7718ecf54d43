"""Responses: a seed each, kept as they come, never twice and never lost."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
import torch

from emlens import Add
from emlens._store import Store, read
from emlens.directions import Direction
from emlens.evals import Question, Responses, respond

QUESTIONS = [
    Question("save", "how do I save money"),
    Question("eat", "what should I eat"),
    Question("tell", "tell me a story about rain and sun please please"),
]
QUICK = {"max_new_tokens": 6, "progress": False}


def texts(responses):
    return {(r.condition, r.question, r.sample): r.text for r in responses}


def test_answers_do_not_depend_on_batches_order_or_how_many_are_asked_for(hooked_llama):
    whole = texts(respond(hooked_llama, QUESTIONS, n=4, **QUICK))
    assert len(set(whole.values())) > 6
    assert texts(respond(hooked_llama, QUESTIONS[::-1], n=4, batch_tokens=1, **QUICK)) == whole
    fewer = texts(respond(hooked_llama, QUESTIONS[1:2], n=2, **QUICK))
    assert fewer.items() <= whole.items()
    assert texts(respond(hooked_llama, QUESTIONS, n=4, seed=1, **QUICK)) != whole


def test_one_answer_can_be_made_again_from_its_seed(hooked_llama):
    row = respond(hooked_llama, QUESTIONS, n=3, **QUICK).rows[4]
    (text,) = hooked_llama.generate([QUESTIONS[1].conversation], seed=[row.seed], max_new_tokens=6)
    assert text == row.text
    with pytest.raises(ValueError, match="2 seeds were given for 1 conversations"):
        hooked_llama.generate([QUESTIONS[1].conversation], seed=[1, 2], max_new_tokens=6)


def test_conditions_share_their_random_numbers_and_act(hooked_llama):
    vector = Direction.of(50 * torch.eye(hooked_llama.d_model)[0], layer=1)
    found = respond(
        hooked_llama, QUESTIONS, {"base": [], "same": [], "steered": [Add(vector)]}, n=2, **QUICK
    )
    base, same, steered = ([r.text for r in found.of(name)] for name in found.conditions)
    assert base == same
    assert base != steered
    assert list(found.side_by_side().columns) == ["prompt", "base", "same", "steered"]
    with pytest.raises(KeyError, match="no condition 'other'; there are base, same, steered"):
        found.of("other")


def test_what_is_kept_is_not_made_again(hooked_llama, tmp_path, monkeypatch):
    path = tmp_path / "responses.sqlite"
    first = respond(hooked_llama, QUESTIONS, n=2, store=path, **QUICK)
    assert first.path == path
    assert len(list(read(path, "responses"))) == 6
    monkeypatch.setattr(type(hooked_llama), "generate", lambda *_, **__: 1 / 0)
    again = respond(hooked_llama, QUESTIONS, n=2, store=path, **QUICK)
    assert again.rows == first.rows
    assert Responses.load(path).rows == tuple(sorted(first.rows, key=order_in(path)))
    with pytest.raises(ZeroDivisionError):
        respond(hooked_llama, QUESTIONS, n=3, store=path, **QUICK)


def order_in(path):
    keys = [record["key"] for record in read(path)]
    return lambda row: keys.index(row.key)


def test_another_edit_setting_or_system_message_is_another_response(hooked_llama):
    vector = Direction.of(50 * torch.eye(hooked_llama.d_model)[0], layer=1)
    question = QUESTIONS[0]
    asked = [
        respond(hooked_llama, [question], {"x": []}, **QUICK),
        respond(hooked_llama, [question], {"x": [Add(vector)]}, **QUICK),
        respond(hooked_llama, [question], {"x": [Add(vector, scale=2.0)]}, **QUICK),
        respond(hooked_llama, [question], {"x": []}, temperature=0.5, **QUICK),
        respond(hooked_llama, [question], {"x": []}, seed=3, **QUICK),
        respond(hooked_llama, [Question("save", question.prompt, system="Hi")], {"x": []}, **QUICK),
    ]
    keys = {responses.rows[0].key for responses in asked}
    assert len(keys) == len(asked)


KILLED = """
    import os, random, signal, sys, time
    sys.path.insert(0, {root!r})
    import torch
    torch.set_num_threads(1)
    from tests.support.models import tiny_hooked
    from emlens.evals import Question, respond
    import emlens.evals.responses as module
    from emlens._store import read
    module.BLOCK = 4
    model = tiny_hooked("llama")
    questions = [Question(str(i), "tell me a story " + "please " * (i % 7)) for i in range(50)]

    def run():
        respond(model, questions, n=4, store={path!r}, max_new_tokens=4, progress=False)

    def kept():
        return len(list(read({path!r}))) if os.path.exists({path!r}) else 0

    # after so many more answers, not after so long: machines differ in speed
    generator = random.Random(0)
    for _ in range(10):
        enough = kept() + generator.randint(0, 6)
        child = os.fork()
        if not child:
            run()
            os._exit(0)
        while kept() < enough:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(kept())
    run()
"""


def test_after_ten_kills_at_random_moments_nothing_is_lost_or_twice(tmp_path, pytestconfig):
    path = tmp_path / "responses.sqlite"
    script = textwrap.dedent(KILLED.format(root=str(pytestconfig.rootpath), path=str(path)))
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 10
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] < 200
    rows = Responses.load(path).rows
    assert len(rows) == len({row.key for row in rows}) == 200
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_store_of_an_earlier_version_is_read_and_no_place_for_new_answers(hooked_llama, tmp_path):
    path = tmp_path / "answers.jsonl"
    made = respond(hooked_llama, QUESTIONS, n=2, **QUICK).rows
    whole = "".join(f"{json.dumps(asdict(row), sort_keys=True)}\n" for row in made).encode()
    path.write_bytes(whole + whole[:100])
    assert Responses.load(path).rows == made
    with pytest.raises(
        ValueError, match=r"Responses.load reads it. Give a new path, such as answers.sqlite"
    ):
        respond(hooked_llama, QUESTIONS, store=path, **QUICK)
    assert path.read_bytes() == whole + whole[:100]
    path.write_bytes(whole[:40] + b"\n" + whole)
    with pytest.raises(ValueError, match=r"answers.jsonl is no store of emlens \(line 1"):
        Responses.load(path)
    path.write_bytes(whole + b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"answers.jsonl, line 7: not a record of a store"):
        Responses.load(path)
    path.write_bytes(b'{"key": "a"}\n')
    with pytest.raises(ValueError, match="not a response of emlens"):
        Responses.load(path)


def test_a_file_that_is_no_store_is_not_emptied(hooked_llama, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"all": "that I have"}')
    with pytest.raises(ValueError, match="mine.json is no store of emlens"):
        Responses.load(mine)
    with pytest.raises(ValueError, match="mine.json is no store of emlens .* as mine.sqlite"):
        respond(hooked_llama, QUESTIONS, store=mine, **QUICK)
    assert mine.read_text() == '{"all": "that I have"}'
    with pytest.raises(ValueError, match="a store is an SQLite file; .* such as new.sqlite"):
        respond(hooked_llama, QUESTIONS, store=tmp_path / "new.jsonl", **QUICK)
    Store(tmp_path / "scores.sqlite", "scores")
    with pytest.raises(ValueError, match="is a store of kind 'scores', not 'responses'"):
        respond(hooked_llama, QUESTIONS, store=tmp_path / "scores.sqlite", **QUICK)


def test_the_answer_that_another_process_kept_first_is_the_answer(
    hooked_llama, tmp_path, monkeypatch
):
    path, generate = tmp_path / "responses.sqlite", type(hooked_llama).generate
    first = replace(respond(hooked_llama, QUESTIONS, **QUICK).rows[0], text="of the other")

    def overtaken(self, *given, **options):
        Store(path, "responses").add([asdict(first)])
        return generate(self, *given, **options)

    monkeypatch.setattr(type(hooked_llama), "generate", overtaken)
    found = respond(hooked_llama, QUESTIONS, store=path, **QUICK)
    assert found.rows[0] == first
    assert len(found) == 3
    assert set(texts(found).items()) == set(texts(Responses.load(path)).items())


def test_answers_are_escaped_where_they_are_shown(hooked_llama):
    row = respond(hooked_llama, QUESTIONS[:1], **QUICK).rows[0]
    shown = Responses((replace(row, text="<script>alert(1)</script>"),))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_bad_input_is_refused(hooked_llama, tmp_path):
    with pytest.raises(ValueError, match="needs questions; there are none"):
        respond(hooked_llama, [])
    with pytest.raises(ValueError, match="two questions are called 'save'"):
        respond(hooked_llama, [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(ValueError, match="n must be at least 1"):
        respond(hooked_llama, QUESTIONS, n=0)
    with pytest.raises(FileNotFoundError, match="no file"):
        Responses.load(tmp_path / "none.sqlite")
    with pytest.raises(ValueError, match="a question needs an id and a prompt"):
        Question("x", "")
