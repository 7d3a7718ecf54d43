"""Runs a study from its first stage to its report; an interrupted one resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from emlens._door import guard_methods, guarded
from emlens._files import write_json
from emlens._reading import expanded
from emlens._results import Shown
from emlens._runs import Parts
from emlens.directions.provenance import package_versions
from emlens.hooked import HookedModel, load
from emlens.hooked.identity import identities
from emlens.measures import Confinement, Efficiency, Influence, LogOdds, Stability
from emlens.study.data import StudyData
from emlens.study.draw import draw_all
from emlens.study.findings import StudyMeasures, findings
from emlens.study.folder import STUDY
from emlens.study.page import study_report
from emlens.study.report import Finding, write_report
from emlens.study.settings import StudySettings, preset, settings_of
from emlens.study.stages import CONFINEMENT, TRAINED, Study
from emlens.study.store import SETTINGS, StudyStore

STAGES = (
    "data",
    *(f"train_{name}" for name in TRAINED),
    "extract",
    "cosines",
    "confinement",
    "same_kl",
    "behaviour",
    "efficiency",
    "stability",
    "influence",
    "answers",
)
"""The stages of a study, in their order."""


@guard_methods
@dataclass(frozen=True, repr=False)
class StudyResult(Shown):
    """A finished study: its folder, what it found, and the results behind that.

    Attributes:
        folder: Holds `results.json`, `report.html`, `directions/`, `figures/`, `runs/`; its
            `README.txt` says what each file is.
        findings: A claim of the papers, a verdict and the numbers, each.
        measured: The results.
    """

    folder: Path
    findings: dict[str, Finding]
    measured: StudyMeasures

    @classmethod
    def load(cls, folder: str | Path) -> StudyResult:
        """Read a finished study; no model is needed.

        Args:
            folder: The folder of `run_study`.

        Raises:
            FileNotFoundError: If the folder holds no study.
            ValueError: If the study is not finished; what is missing is named.
        """
        folder = expanded(folder)
        if not (folder / SETTINGS).is_file() or not (folder / "stages").is_dir():
            raise FileNotFoundError(f"{folder} holds no study; run one into it first")
        store = StudyStore(folder, Parts(folder).settings_as(settings_of))
        missing = [name for name in STAGES if not store.finished(name)]
        if missing:
            raise ValueError(
                f"the study in {folder} is not finished ({', '.join(missing)} missing); resume it "
                f"first: emlens study --config {folder / 'config.yaml'} --out {folder}"
            )
        measured = StudyMeasures(
            store.settings,
            LogOdds.load(folder / "log_odds.json"),
            Efficiency.load(folder / "efficiency.json"),
            Stability.load(folder / "stability.json"),
            Influence.load(folder / "influence.json"),
            Confinement.load(at) if (at := folder / CONFINEMENT).is_file() else None,
        )
        return cls(folder, findings(measured), measured)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def write_report(self) -> Path:
        """Draw the figures, and write the report and `results.json`; what is there is replaced."""
        chosen = self.measured.settings
        store = StudyStore(self.folder, chosen)
        records = {name: store.record(name) for name in STAGES}
        figures = draw_all(self.measured, records["cosines"], store)
        results = {
            "settings": chosen.to_dict(),
            "versions": package_versions(),
            "findings": {name: asdict(one) for name, one in self.findings.items()},
            "log_odds": self.measured.log_odds.table().to_dict("records"),
            "stages": records,
            "figures": figures,
        }
        write_json(self.folder / "results.json", results)
        write_json(self.folder / "timings.json", store.seconds())
        write_report(study_report(self.measured, self.findings, records, store), self.report)
        return self.report

    def table(self) -> pd.DataFrame:
        """The findings, a row each."""
        rows = [asdict(one) for one in self.findings.values()]
        return pd.DataFrame(rows, columns=["claim", "verdict", "text"])

    def _said(self) -> str:
        seen = sum(one.verdict == "as in the papers" for one in self.findings.values())
        return f"{seen} of {len(self.findings)} claims as in the papers, in {self.folder}"

    def _repr_html_(self) -> str:
        # findings are sentences, which pandas would cut
        with pd.option_context("display.max_colwidth", None):
            return super()._repr_html_()


@guarded
def run_study(
    settings: StudySettings | str = "demo",
    out: str | Path = "runs/study",
    *,
    model: HookedModel | None = None,
    restart: bool = False,
    progress: bool = True,
    made_by: str = "emlens.run_study(settings, folder)",
) -> StudyResult:
    """Run the whole experiment, stage by stage, and write its report.

    Trains a general and a narrow solution and a benign control on one narrow domain (LoRA
    adapters; vectors with the preset `"vector"`), measures log-odds inside and outside of it,
    efficiency, stability and influence on pre-training text (arXiv 2602.07852, Fig. 1), and
    ablates the general solution's own and another domain's direction; each with controls and
    intervals. Finished stages are kept, so an interrupted study resumes.

    Args:
        settings: Settings, or the name of a preset.
        out: Folder to write into.
        model: A model that is already loaded; `settings.model` is loaded otherwise.
        restart: Forget finished stages in `out`.
        progress: Show progress bars.
        made_by: The command or call that is noted in the folder's `README.txt`.

    Returns:
        The findings and where everything lies.

    Raises:
        ValueError: If `out` holds a study with other settings.

    Examples:
        >>> result = emlens.run_study("demo", "runs/demo")
        >>> result.report
    """
    chosen = preset(settings) if isinstance(settings, str) else settings
    if model is not None:
        chosen = replace(chosen, model=model.name)
    hooked = model or load(chosen.model)
    store = StudyStore(expanded(out), chosen, identities(hooked), restart=restart)
    STUDY.write(store.folder, chosen.to_dict(), made_by, restart=restart)
    study = Study(hooked, chosen, StudyData.of(chosen), store, progress)
    with study.on_model():
        _run_stages(study)
    result = StudyResult.load(store.folder)
    result.write_report()
    return result


def _run_stages(study: Study) -> None:
    for number, name in enumerate(STAGES, 1):
        done = study.store.finished(name)
        if study.progress:
            print(f"[{number}/{len(STAGES)}] {name}{': finished before' if done else ''}")
        study.store.stage(name, lambda name=name: _run_stage(study, name))


def _run_stage(study: Study, name: str) -> dict:
    if name == "data":
        return study.data.record()
    if name.startswith("train_"):
        return study.train(name.removeprefix("train_"))
    return getattr(study, name)()
