"""A run goes on with the same settings or says what differs; what is finished stays finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from emlens._runs import Parts, check_same


def refused(found: dict, wanted: dict) -> str:
    with pytest.raises(ValueError) as error:
        check_same(found, wanted, "the study in x", "choose another folder")
    return str(error.value)


def test_the_same_settings_are_the_same_as_json_has_them():
    settings = {"layers": (1, 2), "deep": {"rates": ((0.1, 1),)}, "nothing": float("nan"), "n": 1.0}
    read = json.loads(json.dumps(settings))
    check_same(read, settings, "x", "y")
    check_same(settings, {**read, "n": 1}, "x", "y")


def test_what_differs_is_named_with_both_values_and_the_way_out():
    said = refused({"lr": 0.1, "seed": 0, "model": "a"}, {"lr": 0.5, "seed": 0, "model": None})
    assert said == (
        "the study in x was made with other settings (lr: 0.1 there, 0.5 now; "
        "model: 'a' there, None now); choose another folder"
    )


def test_names_that_one_side_lacks_are_shown_as_missing():
    said = refused({"old": 1}, {"new": [2]})
    assert "(new: missing there, [2] now; old: 1 there, missing now)" in said


def test_mappings_are_compared_name_by_name():
    said = refused({"data": {"train": "x", "kl": "y"}}, {"data": {"train": "x", "kl": "z"}})
    assert "(data.kl: 'y' there, 'z' now)" in said


def test_six_differences_are_shown_and_the_others_counted():
    said = refused({f"s{i}": i for i in range(9)}, {f"s{i}": -1 for i in range(9)})
    assert said.count(" there, ") == 6
    assert "s5: 5 there, -1 now; and 3 more); choose" in said


def test_of_long_values_the_place_is_shown_where_they_begin_to_differ():
    long = "a" * 500
    said = refused({"prompt": f"{long}bc{long}"}, {"prompt": f"{long}bd{long}"})
    assert "aabcaa" in said
    assert "aabdaa" in said
    assert len(said) < 300


@dataclass
class Note:
    text: str

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "note.txt").write_text(self.text)


def test_a_part_is_made_once_whether_it_is_a_record_or_saves_itself(tmp_path):
    parts = Parts(tmp_path / "run")
    assert json.loads(parts.part("a.json", lambda: {"n": 1}).read_text()) == {"n": 1}
    assert json.loads(parts.part("a.json", lambda: {"n": 2}).read_text()) == {"n": 1}
    for text in ("first", "second"):
        place = parts.part("note", lambda text=text: Note(text), record="note.txt")
        assert (place / "note.txt").read_text() == "first"
    assert parts.finished("a.json")
    assert not parts.finished("b.json")


def test_a_folder_whose_record_is_missing_is_made_again(tmp_path):
    (tmp_path / "dict").mkdir()
    assert not Parts(tmp_path).finished("dict", record="last.json")


def test_a_part_that_fails_is_not_finished(tmp_path):
    parts = Parts(tmp_path)

    def fail() -> dict:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parts.part("a.json", fail)
    assert not parts.finished("a.json")


def test_settings_are_kept_once_and_compared_but_for_the_free_ones(tmp_path):
    parts = Parts(tmp_path / "run")
    how = {"what": "the run in x", "way_out": "choose another folder"}
    parts.keep_settings({"lr": 1, "seeds": (0, 1)}, **how, free=("seeds",))
    parts.keep_settings({"lr": 1, "seeds": (5,)}, **how, free=("seeds",))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seeds"] == [0, 1]
    with pytest.raises(ValueError, match=r"the run in x was made .*\(lr: 1 there, 2 now\); choose"):
        parts.keep_settings({"lr": 2, "seeds": (0, 1)}, **how, free=("seeds",))


def test_what_an_older_folder_does_not_name_is_as_by_default(tmp_path):
    parts = Parts(tmp_path)
    how = {"what": "the run in x", "way_out": "choose another folder"}
    parts.keep_settings({"lr": 1}, **how)
    parts.keep_settings({"lr": 1, "dose": 0.2}, **how, defaults={"dose": 0.2})
    with pytest.raises(ValueError, match=r"dose: 0.2 there, 0.3 now"):
        parts.keep_settings({"lr": 1, "dose": 0.3}, **how, defaults={"dose": 0.2})
    with pytest.raises(ValueError, match=r"dose: missing there, 0.2 now"):
        parts.keep_settings({"lr": 1, "dose": 0.2}, **how)
