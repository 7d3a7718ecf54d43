"""Numbers in tables say what they are in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import emlens

ROOT = Path(emlens.__file__).parent
TABLES = ("table", "_row", "changes", "agreement", "tokens", "describe")

# counts, names and places
PLAIN = {
    *("ablated", "against", "at token", "batch", "checked", "condition", "conversation", "dose"),
    *("direction", "direction from", "domain", "epochs", "estimate", "example", "figure", "first"),
    *("finding", "first layer", "flagged", "from", "judge", "kl", "largest", "layer", "metric"),
    *("acting", "judged by", "prompt", "same greedy answer"),
    *("layers of 48", "misaligned answers", "modules", "n", "name", "note", "organism", "pairs"),
    *(
        "feature",
        "position",
        "questions",
        "rank",
        "row",
        "run",
        "says",
        "scored by one only",
        "second",
        "to",
    ),
    *("second layer", "seeds", "source", "step", "test", "text", "token id", "tokens", "topic"),
    *(
        "measured",
        "tokens of each",
        "training pairs",
        "held-out pairs",
        "trains",
        "updates",
        "held out",
    ),
    *("conversations", "factor", "matched", "set"),
    *("answers", "answers on topic", "best layer alone", "beyond chance", "by seed"),
}
# shares, correlations and ratios have none
BARE = {
    *("AUROC", "AUROC, bag of words", "AUROC, held out", "AUROC, projection", "its AUROC"),
    *("Spearman", "accuracy", "calibration error", "chance (95%)", "cosine", "epsilon", "hits"),
    *(
        "cumulative share",
        "false alarms",
        "median predicted / exact",
        "overlap",
        "recall",
    ),
    *("median relative error", "precision", "alpha", "lr", "KL weight", "KL error of the draws"),
}
# in units of the parameters, of the score, or of the judge; the docstrings say which
OWN = {
    "change of activation",
    "activation without",
    "norm",
    "loss / norm^2",
    "score",
    "threshold",
    "aligned below",
    "logit difference",
}
# ends of an interval are in the unit of the estimate before them
ENDS = ("low", "high")


def columns() -> Iterator[tuple[str, str]]:
    """Names of columns as the methods that make tables write them, with their file."""
    for path in sorted(ROOT.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name in TABLES:
                for record in ast.walk(function):
                    for key in record.keys if isinstance(record, ast.Dict) else ():
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            yield path.name, key.value


def has_unit(column: str) -> bool:
    if column.endswith(ENDS) or column in PLAIN | BARE | OWN:
        return True
    return column.endswith(("]", "(degrees)"))


def test_every_column_of_a_table_says_its_unit_or_has_none():
    found = list(columns())
    assert len(found) > 100
    assert [(file, name) for file, name in found if not has_unit(name)] == []


def test_a_column_without_its_unit_is_found():
    assert not has_unit("loss")
    assert not has_unit("KL")
    assert has_unit("loss [nats/token]")
