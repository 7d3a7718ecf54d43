"""Responses: a seed each, kept as they come, never twice and never lost."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import torch

import emlens.evals.responses as module
from emlens import Add
from emlens._store import Store, read
from emlens.directions import Direction
from emlens.evals import Question, Responses, respond
from tests.support.kills import KILLS, files, killed, meet, rows, together
from tests.support.models import tiny_hooked

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


MANY = [Question(str(i), "tell me a story " + "please " * (i % 7)) for i in range(24)]


def answer(folder: Path) -> None:
    module.BLOCK = 4
    store = folder / "responses.sqlite"
    told = respond(
        tiny_hooked("llama"),
        MANY,
        {"base": None, "steered": Add(Direction.of(50 * torch.eye(32)[0], layer=1))},
        n=2,
        store=store,
        max_new_tokens=4,
        progress=False,
    )
    (folder / "told.json").write_text(json.dumps([asdict(row) for row in told]))


def test_answers_killed_at_random_times_are_those_of_a_run_that_was_left_alone(tmp_path):
    left = killed(answer, tmp_path)
    whole = rows(left.whole / "responses.sqlite")
    assert left.kills >= KILLS
    assert len(whole) == len({key for key, _ in whole}) == 96
    for end in left.ends:
        assert rows(end / "responses.sqlite") == whole
        assert (end / "told.json").read_bytes() == (left.whole / "told.json").read_bytes()
        assert sorted(files(end)) == ["responses.sqlite", "told.json"]


def answer_as(folder: Path, name: str) -> None:
    """Answer with a text that tells who made it, one from the front and one from the back."""
    module.BLOCK, met, model = 4, count(), tiny_hooked("llama")
    other = {"A": "B", "B": "A"}[name]

    def generate(conversations, **_):
        i = next(met)
        meet(folder, f"{name}{i}", f"{other}{i}")
        return [name] * len(conversations)

    model.generate = generate
    asked = [replace(question, prompt="tell me a story") for question in MANY]
    asked = asked if name == "A" else asked[::-1]
    told = respond(model, asked, n=2, store=folder / "answers.sqlite", progress=False)
    texts = {row.key: row.text for row in told}
    (folder / f"{name}.json").write_text(json.dumps(texts, sort_keys=True))


def test_two_processes_that_answer_at_once_keep_each_answer_once_and_return_the_same(tmp_path):
    together(answer_as, tmp_path, "A", "B")
    kept = rows(tmp_path / "answers.sqlite")
    texts = {key: record["text"] for key, record in kept}
    assert len(kept) == len(texts) == 48
    assert set(texts.values()) == {"A", "B"}
    for name in "AB":
        assert json.loads((tmp_path / f"{name}.json").read_text()) == texts
    assert not [*tmp_path.glob("*.tmp"), *tmp_path.glob("answers.sqlite-*")]


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
    with pytest.raises(ValueError, match=r"answers.jsonl is not a store of emlens \(line 1"):
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
    with pytest.raises(ValueError, match="mine.json is not a store of emlens"):
        Responses.load(mine)
    with pytest.raises(ValueError, match="mine.json is not a store of emlens .* as mine.sqlite"):
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
    with pytest.raises(ValueError, match="questions is empty; give at least one Question"):
        respond(hooked_llama, [])
    with pytest.raises(ValueError, match="two questions are called 'save'"):
        respond(hooked_llama, [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(ValueError, match="n must be at least 1"):
        respond(hooked_llama, QUESTIONS, n=0)
    with pytest.raises(FileNotFoundError, match="no file"):
        Responses.load(tmp_path / "none.sqlite")
    with pytest.raises(ValueError, match="a question needs an id and a prompt"):
        Question("x", "")
    with pytest.raises(ValueError, match="prompt holds half of a surrogate pair .*5"):
        Question("x", "half \ud83d")


@pytest.mark.parametrize("suffix", [".jsonl", ".sqlite"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": "first"}, "record 2: not a response of emlens: sample is 'first', not a whole"),
        ({"text": ["a"]}, r"record 2: not a response of emlens: text is \['a'\], not text"),
        ({"sampling": {"top_p": "all"}}, r"record 2: .*sampling\.top_p is 'all', not a number"),
        ({"invented": 1}, r"record 2: not a response of emlens: .*unknown \['invented'\]"),
    ],
)
def test_a_row_of_another_type_is_refused_by_file_and_record(tmp_path, suffix, change, message):
    rows = [record(key="a"), {**record(key="b"), **change}]
    path = tmp_path / f"r{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Store(path, "responses").add(rows)
    with pytest.raises(ValueError, match=rf"r{suffix}, {message}"):
        Responses.load(path)


def test_half_of_a_character_in_an_answer_is_kept_in_the_store_and_shown_as_a_mark(tmp_path):
    path = tmp_path / "r.sqlite"
    Store(path, "responses").add([record(key="a", text="cut \ud83d off")])
    assert next(read(path))["text"] == "cut \ud83d off"
    loaded = Responses.load(path)
    assert loaded.rows[0].text == "cut \ufffd off"
    assert "cut \ufffd off" in loaded._repr_html_()


def record(**changes: object) -> dict:
    """A row as a store keeps it."""
    return {
        **{"key": "k", "question_id": "q", "question": "q", "prompt": "p", "system": None},
        **{"domain": "general", "variant": "plain", "condition": "base", "sample": 0, "seed": 1},
        **{"text": "t", "model": "m", "sampling": {"temperature": 1.0}, "acting": ""},
        **changes,
    }
