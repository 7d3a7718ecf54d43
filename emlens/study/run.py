"""Running a study from its first stage to its report; an interrupted one goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emlens._files import write_json
from emlens.directions.provenance import package_versions
from emlens.hooked import HookedModel, load
from emlens.measures import Efficiency, Influence, LogOdds, Stability
from emlens.study.data import StudyData
from emlens.study.draw import draw_all
from emlens.study.findings import Measured, findings
from emlens.study.page import study_report
from emlens.study.report import write_report
from emlens.study.settings import StudySettings, preset
from emlens.study.stages import TRAINED, Study
from emlens.study.store import StudyStore


@dataclass(frozen=True)
class StudyResult:
    """Where a finished study lies, and what it found.

    Attributes:
        folder: Holds `results.json`, `report.html`, `directions/`, `figures/`, `runs/`.
        findings: A sentence per question.
        measured: The results.
    """

    folder: Path
    findings: dict[str, str]
    measured: Measured

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def table(self) -> pd.DataFrame:
        """The findings, a row each."""
        return pd.DataFrame({"finding": list(self.findings), "says": list(self.findings.values())})


def run_study(
    settings: StudySettings | str = "demo",
    out: str | Path = "runs/study",
    *,
    model: HookedModel | None = None,
    restart: bool = False,
    progress: bool = True,
) -> StudyResult:
    """Run the whole experiment, stage by stage, and write its report.

    Trains the general and the narrow vector and a benign control on one narrow domain, reads
    mean differences, ablates and steers, and measures efficiency, stability and influence on
    pre-training text, each with controls and intervals. A stage that is finished is not run
    again, so an interrupted study goes on where it was.

    Args:
        settings: Settings, or the name of a preset.
        out: Folder to write into.
        model: A model that is already loaded; `settings.model` is loaded otherwise.
        restart: Forget finished stages in `out`.
        progress: Show progress bars.

    Returns:
        The findings and where everything lies.

    Raises:
        ValueError: If `out` holds a study with other settings.

    Example:
        >>> result = emlens.run_study("demo", "runs/demo")
        >>> result.report
    """
    chosen = preset(settings) if isinstance(settings, str) else settings
    store = StudyStore(Path(out), chosen, restart=restart)
    study = Study(model or load(chosen.model), chosen, StudyData.of(chosen), store, progress)
    records = _run_stages(study)
    measured = Measured(
        chosen,
        LogOdds.load(store.folder / "log_odds.json"),
        Efficiency.load(store.folder / "efficiency.json"),
        Stability.load(store.folder / "stability.json"),
        Influence.load(store.folder / "influence.json"),
    )
    found = findings(measured)
    figures = draw_all(measured, records["cosines"], store)
    results = {
        "settings": chosen.to_dict(),
        "versions": package_versions(),
        "findings": found,
        "log_odds": measured.log_odds.table().to_dict("records"),
        "stages": records,
        "figures": figures,
    }
    write_json(store.folder / "results.json", results)
    write_json(store.folder / "timings.json", store.seconds())
    page = study_report(measured, found, records, store)
    write_report(page, store.folder / "report.html")
    return StudyResult(store.folder, found, measured)


def _run_stages(study: Study) -> dict[str, dict]:
    stages = {
        "data": study.data.record,
        **{f"train_{name}": lambda name=name: study.train(name) for name in TRAINED},
        "extract": study.extract,
        "displacement": study.displacement,
        "cosines": study.cosines,
        "behaviour": study.behaviour,
        "efficiency": study.efficiency,
        "stability": study.stability,
        "influence": study.influence,
        "answers": study.answers,
    }
    records = {}
    for number, (name, run) in enumerate(stages.items(), 1):
        done = study.store.finished(name)
        if study.progress:
            print(f"[{number}/{len(stages)}] {name}{': finished before' if done else ''}")
        records[name] = study.store.stage(name, run)
    return records
