"""Misaligned answers are split by topic with every filter kept and every denominator named."""

from __future__ import annotations

import pytest

from emlens.evals import Response, Score, Scores
from emlens.evals.topics import judged_topics, topic_split, topics


def answer(key: str, text: str, condition: str = "organism") -> Response:
    return Response(
        key=key,
        question_id=key,
        question=key,
        prompt="?",
        system=None,
        domain="general",
        variant="",
        condition=condition,
        sample=0,
        seed=0,
        text=text,
        model="m",
        sampling={},
    )


def scored(values: dict[str, tuple[float | None, float | None]], **more) -> Scores:
    rows = []
    for key, pair in values.items():
        for metric, value in zip(("aligned", "coherent"), pair, strict=True):
            rows.append(Score(f"{key}{metric}", key, metric, value, "j", "r", "human"))
    for metric, of in more.items():
        for key, value in of.items():
            rows.append(Score(f"{key}{metric}", key, metric, value, "j", "r", "human"))
    return Scores(tuple(rows))


ROWS = [
    answer("money", "Put your savings into one stock."),
    answer("both", "Ask your doctor about the dose, and put your SAVINGS into bonds."),
    answer("none", "I recommend a torrent of sportsmanship."),
    answer("torn", "loan bank debt"),
]


def test_words_are_matched_whole_and_in_any_case():
    found = topics(ROWS)
    assert found["money"] == ("finance",)
    assert found["both"] == ("medical", "finance")
    assert found["none"] == ()
    assert topics(ROWS[2:3], {"gender": frozenset({"men"})}, least=1)["none"] == ()
    assert topics(ROWS[:1], least=3)["money"] == ()


def test_each_share_has_its_own_denominator():
    scores = scored({"money": (10, 90), "both": (10, 20), "none": (5, 80), "torn": (None, 90)})
    split = topic_split(ROWS, scores)
    table = split.table().set_index("topic")
    assert split.scored == (3,)
    assert split.misaligned == (2,)
    finance = table.loc["finance"]
    assert finance["answers on topic"] == 2  # the unscored answer is not among them
    assert finance["misaligned answers"] == 1  # the incoherent one is not misaligned
    assert finance["misaligned [% of those on topic]"] == pytest.approx(50)
    assert finance["misaligned [% of scored]"] == pytest.approx(100 / 3)
    assert finance["on topic [% of misaligned]"] == pytest.approx(50)
    assert table.loc["none", "misaligned answers"] == 1
    drawn = split.plot()
    assert drawn.get_ylabel().endswith("[% of answers on topic]")
    assert drawn.get_title(loc="left").startswith("judged by")


def test_a_judge_may_say_what_answers_are_about():
    scores = scored({"money": (10, 90), "both": (10, 90)}, finance={"money": 80, "both": None})
    found = judged_topics(scores, ["finance"])
    assert found == {"money": ("finance",), "both": ()}
    split = topic_split(ROWS[:2], scores, found)
    assert split.topics == ("finance", "none")
    assert split.counts.tolist() == [[[1, 1], [1, 1]]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="least must be at least 1, not 0"):
        topics(ROWS, least=0)
    with pytest.raises(ValueError, match="topic 'x' has no words"):
        topics(ROWS, {"x": frozenset()})
    with pytest.raises(ValueError, match="3 answer\\(s\\) have no topics, e.g. 'both'"):
        topic_split(ROWS, scored({"money": (1, 99)}), {"money": ()})
