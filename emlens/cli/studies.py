"""Whole experiments: `study`, `report`."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from emlens.cli.app import app
from emlens.cli.common import Call, Settings, show_config, verb
from emlens.cli.values import settings_from

Folder = Annotated[Path, typer.Option("--out", help="Folder of the run; a rerun resumes it.")]


def _study_keys() -> list[str]:
    from emlens.study import StudySettings

    return [item.name for item in fields(StudySettings)]


@verb(
    app,
    "emlens study --preset demo --out runs/demo",
    "emlens study --preset smoke --set domain=finance --set 'kl_domains=[\"medical\"]'"
    " --out runs/smoke",
    "emlens study --config runs/smoke/config.yaml --out runs/again --quiet",
    model=True,
    config=True,
    settings=_study_keys,
)
def study(
    call: Call,
    preset: Annotated[str, typer.Option(help="demo (LoRA), vector, or smoke.")] = "demo",
    out: Folder = Path("runs/study"),
    option: Settings = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget finished stages.")] = False,
) -> None:
    """Run the whole experiment and write its report; an interrupted run resumes.

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
    call.kept = f"finished stages are in {out}; run the same command again to resume"
    model = call.placed_model(settings.model)
    result = run_study(
        settings, out, model=model, restart=restart, progress=call.progress, made_by=call.command
    )
    call.result(
        {
            "folder": out,
            "report": result.report,
            "findings": {name: asdict(one) for name, one in result.findings.items()},
        },
        *(f"- {finding}" for finding in result.findings.values()),
        f"report: {result.report}",
    )


@verb(
    app,
    "emlens report runs/demo",
)
def report(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
) -> None:
    """Write the report of a finished run again, from the files in its folder, without a model.

    Writes report.html; for a study, also redraws the figures.
    """
    from emlens.study import StudyResult
    from emlens.study.evaluation import RESPONSES, evaluation_report

    if (folder / RESPONSES).is_file():
        written = evaluation_report(folder)
    else:
        written = StudyResult.load(folder).write_report()
    call.result({"folder": folder, "report": written}, f"written: {written}")
