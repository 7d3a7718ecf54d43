"""What the scalars of rank-1 adapters tell apart: the papers' probing of `A . h`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from emlens._door import guarded
from emlens._results import Result
from emlens._stats import Interval, mean_over_seeds
from emlens.directions.adapters import adapter_scalars
from emlens.directions.probes import classifier
from emlens.hooked import HookedModel
from emlens.hooked.sites import SiteName
from emlens.text import Conversation, TokenMask

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TEST_SHARE = 0.2


class ScalarTable(Result):
    """How well an adapter's scalars separate classes of answers, token by token.

    Attributes:
        adapter: The adapter.
        layers: Layers that it writes at, `[m]`.
        tests: The two classes of each test.
        accuracy: Held-out accuracy of each run, `[tests][runs]`; 0.5 is chance.
        auroc: Held-out AUROC of each run, `[tests][runs]`.
        single: AUROC of each layer's scalar alone, on all tokens, `[tests][m]`.
        weights: Weight of each standardised scalar, averaged over runs, `[tests][m]`.
        tokens: Tokens of each class in a run, after both are cut to equal size.
    """

    AXES = {
        "tokens": "tests",
    }

    adapter: str
    layers: tuple[int, ...]
    tests: tuple[tuple[str, str], ...]
    accuracy: Float[np.ndarray, "tests runs"]
    auroc: Float[np.ndarray, "tests runs"]
    single: Float[np.ndarray, "tests layers"]
    weights: Float[np.ndarray, "tests layers"]
    tokens: tuple[int, ...]

    def of(self, first: str, second: str) -> Interval:
        """Mean held-out AUROC of a test, with its interval over splits.

        Raises:
            KeyError: If there is no such test.
        """
        if (first, second) not in self.tests:
            raise KeyError(f"no test of {first!r} against {second!r}; there are {self.tests}")
        return mean_over_seeds(self.auroc[self.tests.index((first, second))], self.level)

    def table(self) -> pd.DataFrame:
        """One row per test: accuracy, AUROC, and the layer that tells most by itself."""
        import pandas as pd

        rows = []
        for i, (first, second) in enumerate(self.tests):
            auroc = mean_over_seeds(self.auroc[i], self.level)
            most = int(np.argmax(np.abs(self.single[i] - 0.5)))
            rows.append(
                {
                    "test": f"{first} / {second}",
                    "accuracy": float(self.accuracy[i].mean()),
                    **auroc.columns("AUROC"),
                    "tokens of each": self.tokens[i],
                    "best layer alone": self.layers[most],
                    "its AUROC": float(self.single[i, most]),
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Weight of each layer's scalar, one row per test."""
        from emlens.figures import heatmap

        return heatmap(
            self.weights,
            [f"{first} / {second}" for first, second in self.tests],
            [str(layer) for layer in self.layers],
            value_label="weight of the standardised scalar",
            x_label="layer",
            limits=None,
            ax=ax,
        )


@guarded
def scalar_table(
    model: HookedModel,
    classes: Mapping[str, Sequence[Conversation]],
    adapter: str,
    tests: Sequence[tuple[str, str]] | None = None,
    *,
    runs: int = 20,
    regularisation: float = 0.01,
    tokens: TokenMask = "response",
    site: SiteName | None = None,
    column: int | None = None,
    seed: int = 0,
) -> ScalarTable:
    """Probe what the scalars `A . h` of a rank-1 adapter tell apart (arXiv 2506.11618, section 4).

    Features are the scalars of one token at every layer; the classifier is an L1 logistic
    regression. Whole conversations are held out, a fifth of each class, the scaler is fitted on
    the training part, and both classes are cut to equal numbers of tokens; averaged over random
    splits. (The reference code standardises before it splits, and has tokens of one answer on
    both sides.)

    Args:
        model: A model with adapters.
        classes: Conversations by class, e.g. medical or not, aligned or misaligned.
        adapter: The adapter's name; of rank 1, or name a column.
        tests: Pairs of classes; all by default.
        runs: Random splits.
        regularisation: scikit-learn's `C`.
        tokens: Tokens that count.
        site: See `adapter_scalars`.
        column: See `adapter_scalars`.
        seed: Seed of the splits.

    Raises:
        ValueError: If there are fewer than two classes, a class has fewer than five
            conversations, or a test names an unknown class.
    """
    if len(classes) < 2:
        raise ValueError(f"scalars are probed between two classes or more, not {len(classes)}")
    few = [name for name, texts in classes.items() if len(texts) < 5]
    if few:
        raise ValueError(
            f"class {few[0]!r} has {len(classes[few[0]])} conversations; five at least"
        )
    wanted = list(combinations(classes, 2)) if tests is None else [tuple(t) for t in tests]
    unknown = {name for test in wanted for name in test} - set(classes)
    if unknown:
        raise ValueError(f"unknown class {min(unknown)!r}; there are {', '.join(classes)}")
    read: dict[str, _Read] = {}
    layers: tuple[int, ...] = ()
    for name, texts in classes.items():
        found = adapter_scalars(model, texts, adapter, tokens=tokens, site=site, column=column)
        features = np.stack([values.float().numpy() for values in found.scalars.values()], axis=1)
        read[name] = features, found.conversations.numpy()
        layers = tuple(found.scalars)
    results = [_tested(read[a], read[b], runs, regularisation, seed) for a, b in wanted]
    return ScalarTable(
        adapter=adapter,
        layers=layers,
        tests=tuple((a, b) for a, b in wanted),
        accuracy=np.array([result["accuracy"] for result in results]),
        auroc=np.array([result["auroc"] for result in results]),
        single=np.array([result["single"] for result in results]),
        weights=np.array([np.mean(result["weights"], axis=0) for result in results]),
        tokens=tuple(min(len(read[a][0]), len(read[b][0])) for a, b in wanted),
    )


_Read = tuple[np.ndarray, np.ndarray]


def _tested(first: _Read, second: _Read, runs: int, regularisation: float, seed: int) -> dict:
    from sklearn.metrics import roc_auc_score

    found: dict[str, list] = {"accuracy": [], "auroc": [], "weights": []}
    for run in range(runs):
        generator = np.random.default_rng([seed, run])
        train, test = [], []
        for side in (first, second):
            held = _held_out(side[1], generator)
            train.append(side[0][~held])
            test.append(side[0][held])
        x, y = _balanced(train, generator)
        x_test, y_test = _balanced(test, generator)
        probe = classifier("sparse", regularisation).fit(x, y)
        found["accuracy"].append(float(probe.score(x_test, y_test)))
        found["auroc"].append(float(roc_auc_score(y_test, probe.decision_function(x_test))))
        found["weights"].append(probe.steps[1][1].coef_[0])
    both = np.concatenate([first[0], second[0]])
    truth = np.repeat([0, 1], [len(first[0]), len(second[0])])
    found["single"] = [float(roc_auc_score(truth, values)) for values in both.T]
    return found


def _held_out(conversations: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Tokens of a fifth of the conversations."""
    known = np.unique(conversations)
    n = max(1, round(TEST_SHARE * len(known)))
    return np.isin(conversations, generator.permutation(known)[:n])


def _balanced(
    sides: Sequence[np.ndarray], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides cut to the tokens of the smaller one; the second is class 1."""
    n = min(map(len, sides))
    kept = [side[generator.permutation(len(side))[:n]] for side in sides]
    return np.concatenate(kept), np.repeat([0, 1], n)
