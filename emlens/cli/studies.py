"""Whole experiments: `study`, `asymmetries`, `report`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Settings, rows_of, show_config, verb
from emlens.cli.values import settings_from

Folder = Annotated[Path, typer.Option("--out", help="Folder of the run; a rerun goes on in it.")]


def _study_keys() -> list[str]:
    from emlens.study import StudySettings

    return [item.name for item in fields(StudySettings)]


def _asymmetry_keys() -> list[str]:
    from emlens.study import AsymmetrySettings

    return [item.name for item in fields(AsymmetrySettings)]


@verb(
    app,
    "emlens study --preset demo --out runs/demo",
    "emlens study --preset smoke --set domain=medical --set 'kl_domains=[\"finance\"]'"
    " --out runs/smoke",
    "emlens study --config runs/smoke/config.yaml --out runs/again --quiet",
    model=True,
    config=True,
    settings=_study_keys,
)
def study(
    call: Call,
    preset: Annotated[str, typer.Option(help="demo or smoke.")] = "demo",
    out: Folder = Path("runs/study"),
    option: Settings = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget finished stages.")] = False,
) -> None:
    """Run the whole experiment and write its report; an interrupted run goes on.

    Settings are those of the preset, then those of --config, then those of --set. The folder
    explains itself in README.txt and keeps the resolved settings in config.yaml.
    """
    from emlens.study import preset as preset_of
    from emlens.study import run_study
    from emlens.study.settings import settings_of

    given = {**call.config, **settings_from(option)}
    if call.model is not None:
        given["model"] = call.model
    settings = settings_of({**preset_of(preset).to_dict(), **given})
    show_config(call, settings.to_dict())
    call.kept = f"finished stages are in {out}; run the same command again to go on"
    model = call.placed_model(settings.model)
    result = run_study(
        settings, out, model=model, restart=restart, progress=call.progress, made_by=call.command
    )
    call.result(
        {"folder": out, "report": result.report, "findings": result.findings},
        *(f"- {sentence}" for sentence in result.findings.values()),
        f"report: {result.report}",
    )


@verb(
    app,
    "emlens asymmetries --out runs/asymmetries --page docs/findings.md --figures docs/assets",
    "emlens asymmetries --set 'domains=[\"medical\"]' --set 'seeds=[0]' --out runs/medical",
    "emlens asymmetries --no-paths --set 'kinds=[\"vector\"]' --out runs/vectors",
    model=True,
    config=True,
    settings=_asymmetry_keys,
)
def asymmetries(
    call: Call,
    out: Folder = Path("runs/asymmetries"),
    page: Annotated[
        Path | None, typer.Option(help="Page of findings; findings.md in the folder by default.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of its figures.")] = None,
    paths: Annotated[
        bool, typer.Option(help="Also train between the solutions: trade-off and drift.")
    ] = True,
    paths_domain: Annotated[
        list[str] | None, typer.Option(help="Domain of that (repeatable); medical by default.")
    ] = None,
    option: Settings = None,
) -> None:
    """Train general and narrow solutions over domains and seeds, and measure the asymmetries.

    Finished trials are kept, so an interrupted run goes on; the page holds all that the folder
    does. With --paths the way between the two solutions of a domain is trained as well.
    """
    from emlens.study import AsymmetrySettings, read_paths, run_asymmetries, run_paths
    from emlens.study.asymmetry_page import write_findings

    given = {**call.config, **settings_from(option)}
    if call.model is not None:
        given["model"] = call.model
    settings = AsymmetrySettings.from_dict({**AsymmetrySettings().to_dict(), **given})
    show_config(call, settings.to_dict())
    call.kept = f"finished trials are in {out}; run the same command again to go on"
    model = call.placed_model(settings.model)
    found = run_asymmetries(
        out, settings, model=model, progress=call.progress, made_by=call.command
    )
    for domain in (paths_domain or _domains(settings.domains)) if paths else ():
        run_paths(out, settings, domain=domain, model=model, progress=call.progress)
    between = read_paths(out)
    written = write_findings(
        found, page or out / "findings.md", figures or out / "figures", between
    )
    table = found.table()
    call.result(
        {
            "folder": out,
            "page": written,
            "asymmetries": rows_of(table),
            "paths": [
                {"domain": path.domain, "trade-off": rows_of(path.sweep.table())}
                for path in between
            ],
        },
        table,
        *(f"between general and narrow, {path.domain}: {path.sweep}" for path in between),
        f"written: {written}",
    )


def _domains(known: tuple[str, ...]) -> list[str]:
    """Medical, or the first domain where that is not among those that are run."""
    return ["medical" if "medical" in known else known[0]]


@verb(
    app,
    "emlens report runs/demo",
    "emlens report runs/asymmetries",
)
def report(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
) -> None:
    """Write the report of a finished run again, from what lies in its folder; no model is run.

    Of a study this is report.html with its figures, of asymmetries findings.md, of an evaluation
    report.html.
    """
    from emlens.study import read_asymmetries, read_paths, rebuild_report
    from emlens.study.asymmetry_page import write_findings
    from emlens.study.evaluation import RESPONSES, evaluation_report

    if (folder / "trials").is_dir():
        found = read_asymmetries(folder)
        written = write_findings(
            found, folder / "findings.md", folder / "figures", read_paths(folder)
        )
    elif (folder / RESPONSES).is_file():
        written = evaluation_report(folder)
    else:
        written = rebuild_report(folder).report
    call.result({"folder": folder, "report": written}, f"written: {written}")
