"""`python -m experiments`: the asymmetries over domains and seeds, and the page of findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.common import table_text
from emlens.study.folder import read_config
from experiments import AsymmetrySettings, read_asymmetries, read_paths, run_asymmetries, run_paths
from experiments.asymmetry_page import write_findings
from experiments.narrowing import read_narrowings, run_narrowing

app = typer.Typer(add_completion=False)


@app.command()
def asymmetries(
    out: Annotated[Path, typer.Option(help="Folder of the run; a rerun resumes it.")],
    config: Annotated[Path | None, typer.Option(help="Settings that differ, as YAML.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to load.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Page of findings; findings.md in the folder by default.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of its figures.")] = None,
    paths: Annotated[
        bool, typer.Option(help="Also train between the solutions: trade-off and drift.")
    ] = True,
    narrowing: Annotated[
        bool, typer.Option(help="Also train narrow solutions with other penalties and data.")
    ] = True,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Write the page from finished trials; run nothing.")
    ] = False,
) -> None:
    """Train general and narrow solutions over domains and seeds, and measure the asymmetries.

    Finished trials are kept, so an interrupted run resumes. With --paths the way between the two
    solutions of one domain is trained as well: medical, where it is among the domains; with
    --narrowing other ways to a narrow solution of it.
    """
    if read_only:
        found = read_asymmetries(out)
    else:
        settings = AsymmetrySettings.from_dict(
            {**AsymmetrySettings().to_dict(), **(read_config(config) if config else {})}
        )
        if model is not None:
            settings = replace(settings, model=model)
        found = run_asymmetries(out, settings, made_by=f"python -m experiments --out {out}")
        known = settings.domains
        domain = "medical" if "medical" in known else known[0]
        if paths:
            run_paths(out, settings, domain=domain)
        if narrowing:
            run_narrowing(out, settings, domain=domain)
    written = write_findings(
        found,
        page or out / "findings.md",
        figures or out / "figures",
        read_paths(out),
        read_narrowings(out),
    )
    typer.echo(table_text(found.table()))
    typer.echo(f"written: {written}")


if __name__ == "__main__":
    app()
