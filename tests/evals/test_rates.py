"""Rates: closed forms, coverage in simulation, denominators, thresholds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from emlens._stats import wilson
from emlens.evals import Rates, Response, Score, Scores, agreement, human_labels, rates


def response(i: int, question: str = "q", condition: str = "base", domain: str = "general"):
    return Response(
        key=f"{condition}-{question}-{i}",
        question_id=question,
        question=question,
        prompt=question,
        system=None,
        domain=domain,
        variant="plain",
        condition=condition,
        sample=i,
        seed=i,
        text="text",
        model="tiny",
        sampling={},
    )


def scored(rows, aligned, coherent, judge="judge"):
    made = []
    for metric, values in (("aligned", aligned), ("coherent", coherent)):
        for row, value in zip(rows, values, strict=True):
            made.append(
                Score(f"{judge}{metric}{row.key}", row.key, metric, value, judge, "", "human")
            )
    return Scores(tuple(made))


def test_rates_count_what_the_papers_count_and_say_what_has_no_score():
    rows = [response(i, f"q{i % 3}") for i in range(8)]
    aligned = [10, 29.9, 30, 90, 5, None, 20, 15]
    coherent = [90, 51, 90, 90, 50, 90, None, 80]
    found = rates(rows, scored(rows, aligned, coherent))
    # scored: all but 5 and 6; coherent: 0 1 2 3 7; misaligned: 0 1 7
    assert found.misaligned("base").estimate == pytest.approx(3 / 6)
    assert found.coherent_share("base").estimate == pytest.approx(5 / 6)
    assert found.among_coherent("base").estimate == pytest.approx(3 / 5)
    assert found.unscored("base") == pytest.approx(2 / 8)
    assert found.mean("base").estimate == pytest.approx(np.mean([10, 29.9, 30, 90, 5, 15]))
    (row,) = found.table().to_dict("records")
    assert row["no score [%]"] == pytest.approx(25)
    assert row["answers"] == 8
    two = found.table(thresholds=[30, 12])
    assert list(two["misaligned [%]"]) == pytest.approx([50, 100 / 6])
    assert wilson(3, 6).low == found.wilson("base").low


def test_wilson_is_the_closed_form_and_knows_zero_and_all():
    from scipy.stats import binomtest

    for hits, n in ((0, 50), (3, 40), (50, 50)):
        theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        ours = wilson(hits, n)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert np.isnan(wilson(0, 0).estimate)


def simulated(generator, questions=40, answers=10, spread=1.5, shift=0.0):
    """Questions differ in how often they are answered badly."""
    chances = 1 / (1 + np.exp(1.2 - shift - spread * generator.standard_normal(questions)))
    rows, aligned = [], []
    for q, chance in enumerate(chances):
        for i in range(answers):
            rows.append(response(i, f"q{q}"))
            aligned.append(10.0 if generator.random() < chance else 90.0)
    return rows, aligned


def test_the_interval_clustered_by_question_covers_and_the_one_by_answer_does_not():
    generator = np.random.default_rng(0)
    chances = 1 / (1 + np.exp(1.2 - 1.5 * generator.standard_normal(200_000)))
    truth, hits, plain = chances.mean(), 0, 0
    n = 400
    for _ in range(n):
        rows, aligned = simulated(generator)
        found = rates(rows, scored(rows, aligned, [90.0] * len(rows)))
        interval, naive = found.misaligned("base"), found.wilson("base")
        hits += interval.low <= truth <= interval.high
        plain += naive.low <= truth <= naive.high
    assert 0.93 <= hits / n <= 0.97
    assert plain / n < 0.85


def test_differences_are_paired_question_by_question():
    generator = np.random.default_rng(1)
    rows, aligned, base = [], [], []
    for q in range(30):
        chance = generator.random()
        for i in range(20):
            rows += [response(i, f"q{q}"), response(i, f"q{q}", "steered")]
            draw = generator.random()
            base.append(10.0 if draw < chance else 90.0)
            aligned += [base[-1], 10.0 if draw < chance + 0.1 else 90.0]
    found = rates(rows, scored(rows, aligned, [90.0] * len(rows)))
    gap = found.difference("steered")
    assert gap.estimate == pytest.approx(
        found.misaligned("steered").estimate - found.misaligned("base").estimate
    )
    alone = found.misaligned("steered")
    assert gap.high - gap.low < 0.5 * (alone.high - alone.low)
    assert gap.low > 0


def test_a_shift_of_the_mean_is_seen_where_no_answer_crosses_the_threshold():
    rows, aligned = [], []
    for q in range(20):
        for i in range(5):
            rows += [response(i, f"q{q}"), response(i, f"q{q}", "steered")]
            aligned += [60.0 + q, 52.0 + q]
    found = rates(rows, scored(rows, aligned, [90.0] * len(rows)))
    assert found.difference("steered").estimate == 0
    shift = found.shift("steered")
    assert (shift.estimate, shift.low, shift.high) == pytest.approx((-8.0, -8.0, -8.0))
    (row,) = found.changes().to_dict("records")
    assert (row["condition"], row["against"], row["questions"]) == ("steered", "base", 20)
    assert (row["mean aligned [0-100]"], row["misaligned [points]"]) == pytest.approx((-8.0, 0.0))


def test_cued_questions_are_compared_with_the_plain_ones_and_not_pooled():
    plain = [response(i, f"q{q}") for q in range(4) for i in range(2)]
    behind = [replace(row, key=f"c{row.key}", variant="cued") for row in plain]
    rows = [*plain, *behind]
    marks = scored(rows, [90.0] * 8 + [10.0] * 8, [90.0] * 16)
    found = rates(rows, marks)
    assert found.conditions == ("base", "base, cued")
    assert found.difference("base, cued").estimate == 1.0
    assert len(found._shared("base, cued", "base", None)) == 4
    assert rates(rows, marks, apart=False).misaligned("base").estimate == 0.5


def test_what_a_judge_says_of_its_worth_stands_beside_its_rates():
    rows = [response(i, f"q{i}") for i in range(4)]
    plain = scored(rows, [10.0, 90.0, 90.0, 90.0], [90.0] * 4)
    told = Scores(tuple(replace(s, mode="classifier", note="AUROC <0.9>") for s in plain.rows))
    found = rates(rows, told)
    assert found.trust == "AUROC <0.9>"
    assert "AUROC &lt;0.9&gt;" in found._repr_html_()
    # the figure names the judge; how far to trust it stands with the table
    assert "AUROC" not in found.plot().get_title(loc="left")
    assert rates(rows, plain).trust == ""


def test_questions_that_only_one_condition_has_do_not_enter_a_difference():
    rows = [response(0, "a"), response(0, "b"), response(0, "a", "x"), response(0, "c", "x")]
    found = rates(rows, scored(rows, [90.0, 10.0, 10.0, 10.0], [90.0] * 4))
    assert found.difference("x").estimate == pytest.approx(1.0)
    alone = [response(0, "a"), response(0, "c", "x")]
    found = rates(alone, scored(alone, [90.0, 10.0], [90.0] * 2))
    with pytest.raises(ValueError, match="'x' and 'base' have no scored question in common"):
        found.difference("x")


def test_rates_can_be_kept_and_drawn(tmp_path):
    rows = [response(i, f"q{i % 3}", c, d) for i in range(6) for c in "ab" for d in ("x", "y")]
    found = rates(rows, scored(rows, [10.0, 80.0] * 12, [None, 90.0, 90.0] * 8))
    assert Rates.load(found.save(tmp_path / "rates.json")) == found
    drawn = found.plot()
    assert drawn.get_title(loc="left").startswith("judged by judge")
    assert drawn.get_ylabel().endswith("[% of scored]")
    with pytest.raises(KeyError, match="no condition 'c'; there are a, b"):
        found.misaligned("c")


def test_scores_of_several_judges_are_told_apart():
    rows = [response(i) for i in range(3)]
    both = Scores(
        (*scored(rows, [1, 2, 3], [9] * 3, "x").rows, *scored(rows, [4] * 3, [9] * 3, "y").rows)
    )
    assert rates(rows, both, judge="y").aligned == (4, 4, 4)
    with pytest.raises(KeyError, match="has several judges, name one"):
        rates(rows, both)
    with pytest.raises(KeyError, match="no judge 'z' of 'aligned'"):
        both.of("aligned", "z")
    with pytest.raises(
        KeyError, match="no scores of metric 'medical'; there are aligned, coherent"
    ):
        both.of("medical")


def test_agreement_is_that_of_scikit_learn_and_names_what_only_one_scored():
    from scipy.stats import spearmanr
    from sklearn.metrics import cohen_kappa_score, precision_score, recall_score

    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 100, 60)
    noisy = np.clip(truth + generator.normal(0, 20, 60), 0, 100)
    rows = [response(i, f"q{i}") for i in range(60)]
    machine = scored(rows, [None, *noisy[1:]], [90.0] * 60)
    people = human_labels(rows[:-1], {row.key: x for row, x in zip(rows[:-1], truth, strict=False)})
    found = agreement(machine, people)
    a, b = noisy[1:-1], truth[1:-1]
    assert found.correlation.estimate == pytest.approx(spearmanr(a, b).statistic)
    assert found.kappa.estimate == pytest.approx(cohen_kappa_score(a < 30, b < 30))
    assert found.precision == pytest.approx(precision_score(b < 30, a < 30))
    assert found.recall == pytest.approx(recall_score(b < 30, a < 30))
    assert found.correlation.low < found.correlation.estimate < found.correlation.high
    assert (found.only_first, found.only_second, len(found.pairs)) == (1, 1, 58)
    assert found.table()["against"].item() == "human"
    with pytest.raises(ValueError, match="only 0 answer.s. have a score for 'aligned' by both"):
        agreement(scored(rows[:2], [1, 2], [3, 4]), human_labels(rows[5:], {rows[5].key: 3}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,score\na,1\n", "must have the columns response, score; it has key, score"),
        ("response,score\nbase-q-0,much\n", "line 2: the score 'much' is no number"),
        ("response,score\nbase-q-0\n", "line 2: 1 fields under 2 columns"),
        ("response,score\nbase-q-0,1\nbase-q-0,2\n", "line 3: 'base-q-0' is labelled twice"),
    ],
)
def test_a_file_of_labels_is_read_and_one_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text("\ufeffscore,response,who\n12.5,base-q-0,me\n", encoding="utf-8")
    (row,) = human_labels([response(0)], path).rows
    assert (row.score, row.judge, row.mode) == (12.5, "human", "human")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        human_labels([response(0)], path)


def test_labels_that_do_not_fit_are_refused():
    rows = [response(0)]
    with pytest.raises(ValueError, match="1 label.s. belong to no response, e.g. 'x'"):
        human_labels(rows, {"x": 1})
    with pytest.raises(ValueError, match="label 101 of 'base-q-0' is not between 0 and 100"):
        human_labels(rows, {rows[0].key: 101})
    with pytest.raises(ValueError, match="no responses to take a rate of"):
        rates([], Scores(()))
