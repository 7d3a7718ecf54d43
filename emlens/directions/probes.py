"""Linear classifiers on what a model holds of a text: made, fitted by folds, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from emlens.directions.held_out import FOLDS

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Fitted = TypeVar("Fitted")
Classifier = Literal["logistic", "lda", "sparse"]


def classifier(
    kind: Classifier = "logistic", regularisation: float = 1.0, features: Any = None
) -> Pipeline:
    """Return a linear classifier of scikit-learn that is still to be fitted.

    Args:
        kind: `"logistic"` regression, linear discriminant analysis (`"lda"`, shrunk), or logistic
            regression with an L1 penalty (`"sparse"`).
        regularisation: scikit-learn's `C`; LDA has none.
        features: What makes numbers of unit size of the data; a `StandardScaler` by default.
    """
    from sklearn import __version__
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any
    if kind == "lda":
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    elif kind == "sparse":
        # scikit-learn names the L1 penalty in another way from 1.8 on
        new = tuple(map(int, __version__.split(".")[:2])) >= (1, 8)
        named: Any = {"l1_ratio": 1.0} if new else {"penalty": "l1"}
        model = LogisticRegression(C=regularisation, solver="liblinear", max_iter=1000, **named)
    else:
        model = LogisticRegression(C=regularisation, max_iter=2000)
    return make_pipeline(features or StandardScaler(), model)


def unscaled(fitted: Pipeline) -> tuple[Float[np.ndarray, " k"], float]:
    """Weights and offset, on the data as they are, of a classifier on scaled ones."""
    (_, scaler), (_, model) = fitted.steps
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - scaler.mean_ @ weights)


def out_of_fold(
    fit: Callable[[Bool[np.ndarray, " n"]], Fitted], fold: Int[np.ndarray, " n"]
) -> Iterator[tuple[Bool[np.ndarray, " n"], Fitted]]:
    """Yield the items of each fold with what was fitted to the others.

    Args:
        fit: Takes which items to fit to.
        fold: The fold of each item, see `fold_of`.
    """
    for number in range(FOLDS):
        yield fold == number, fit(fold != number)
