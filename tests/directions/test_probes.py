"""Classifiers against scikit-learn written out, and folds against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from emlens.directions.probes import classifier, out_of_fold, unscaled

GENERATOR = np.random.default_rng(0)
VALUES = GENERATOR.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + 2
TRUTH = VALUES[:, 0] + VALUES[:, 3] + GENERATOR.normal(size=60) > 4


def test_a_probe_is_a_logistic_regression_on_data_of_unit_variance():
    scaled = (VALUES - VALUES.mean(0)) / VALUES.std(0)
    plain = LogisticRegression(C=0.5, max_iter=1000).fit(scaled, TRUTH)
    found = classifier("logistic", 0.5).fit(VALUES, TRUTH)
    expected = plain.decision_function(scaled)
    assert found.decision_function(VALUES) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "lda", "sparse"])
def test_weights_and_offset_on_the_data_as_they_are_give_the_same_scores(kind):
    found = classifier(kind).fit(VALUES, TRUTH)
    weights, offset = unscaled(found)
    assert VALUES @ weights + offset == pytest.approx(found.decision_function(VALUES), abs=1e-9)


def test_an_l1_penalty_leaves_out_what_says_nothing():
    weights, _ = unscaled(classifier("sparse", 0.1).fit(VALUES, TRUTH))
    assert weights[3] > 0
    assert weights[[1, 2, 4]] == pytest.approx(np.zeros(3))


def test_each_item_is_judged_once_by_what_was_fitted_to_the_other_folds():
    fold = np.arange(13) % 5
    found = list(out_of_fold(np.flatnonzero, fold))
    assert np.sum([test for test, _ in found], axis=0).tolist() == [1] * 13
    for test, fitted in found:
        assert sorted([*fitted, *np.flatnonzero(test)]) == list(range(13))
