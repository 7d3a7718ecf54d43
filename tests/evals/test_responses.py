"""Responses: a seed each, kept as they come, never twice and never lost."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from emlens import Add
from emlens.directions import Direction
from emlens.evals import Question, Responses, respond
from emlens.evals.store import JsonLines

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
    path = tmp_path / "responses.jsonl"
    first = respond(hooked_llama, QUESTIONS, n=2, store=path, **QUICK)
    assert first.path == path
    assert len(path.read_text().splitlines()) == 6
    monkeypatch.setattr(type(hooked_llama), "generate", lambda *_, **__: 1 / 0)
    again = respond(hooked_llama, QUESTIONS, n=2, store=path, **QUICK)
    assert again.rows == first.rows
    assert Responses.load(path).rows == tuple(sorted(first.rows, key=order_in(path)))
    with pytest.raises(ZeroDivisionError):
        respond(hooked_llama, QUESTIONS, n=3, store=path, **QUICK)


def order_in(path):
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
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
    module.BLOCK = 4
    model = tiny_hooked("llama")
    questions = [Question(str(i), "tell me a story " + "please " * (i % 7)) for i in range(50)]

    def run():
        respond(model, questions, n=4, store={path!r}, max_new_tokens=4, progress=False)

    def kept():
        return open({path!r}, "rb").read().count(b"\\n") if os.path.exists({path!r}) else 0

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
    path = tmp_path / "responses.jsonl"
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
    assert len(path.read_text().split("\n")) == 201


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    store = JsonLines(path, "key")
    assert store.add({"key": "a", "text": "line\u2028break\nand more"})
    assert not store.add({"key": "a", "text": "again"})
    assert store.add({"key": "b", "text": "two"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "te')
    assert [record["key"] for record in JsonLines(path, "key")] == ["a", "b"]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"key": "a"}\n{"nokey": 1}\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="line 2: not a record with 'key'"):
        JsonLines(path, "key")


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
        Responses.load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a question needs an id and a prompt"):
        Question("x", "")
