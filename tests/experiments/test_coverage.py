"""The page of intervals: every row is simulated, and the page in the docs has the rows of today."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from experiments.coverage import AIM, cases, coverage, write_intervals

PAGE = Path(__file__).parents[2] / "docs" / "intervals.md"


def rows_of(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_row_is_simulated_and_written(tmp_path):
    found = coverage(simulations=2)
    assert np.isfinite(found.select_dtypes("number")).all().all()
    shares = found[["holds [%]", "below [%]", "above [%]"]].sum(axis=1)
    assert np.allclose(shares, 100)
    assert (found["width"] > 0).all()
    again = coverage(simulations=2)
    assert again.equals(found)
    page = write_intervals(found, tmp_path / "intervals.md", 2).read_text()
    assert len(rows_of(page)) == len(found)


def test_the_page_in_the_docs_has_the_rows_of_today_and_marks_those_outside_of_the_aim():
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert [row[:3] for row in rows] == [[c.interval, c.data, c.size] for c in cases()]
    for row in rows:
        holds, mark = float(row[3]), row[-1]
        assert mark == ("narrow" if holds < AIM[0] else "wide" if holds > AIM[1] else ""), row


def test_the_command_says_what_it_takes():
    import typer

    from experiments.coverage import main

    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--help"])
    assert "--simulations" in shown.output
