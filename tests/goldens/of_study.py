"""Goldens of a whole study and of a run over domains, at the size of a smoke test.

All of it hangs on short trainings: see `of_training` for the tolerance.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from emlens._reading import read_json
from emlens.study import run_study
from experiments import read_asymmetries, read_paths, run_asymmetries, run_paths
from tests.experiments.test_asymmetries import QUICK as ASYMMETRIES
from tests.goldens.golden import World, golden
from tests.study.test_study import QUICK
from tests.support.models import tiny_hooked

STUDY = replace(QUICK, epochs=2, batch_size=3)
ONE_DOMAIN = replace(ASYMMETRIES, domains=("finance",))
TRAINED = {"rtol": 2e-3, "atol": 2e-4}


def study_in(folder: Path) -> Path:
    """The folder of a finished smoke study."""
    if not (folder / "results.json").exists():
        run_study(STUDY, folder, model=tiny_hooked("llama"), progress=False)
    return folder


def asymmetries_in(folder: Path) -> Path:
    """The folder of finished runs in one domain, with the paths between their solutions."""
    model = tiny_hooked("llama")
    run_asymmetries(folder, ONE_DOMAIN, model=model, progress=False)
    run_paths(
        folder, ONE_DOMAIN, domain="finance", weights=(0, 5), records=2, model=model, progress=False
    )
    return folder


def without_numbers(sentence: str) -> str:
    return re.sub(r"[-−+]?\d+(\.\d+)?", "#", sentence)


@golden("study: smoke", **TRAINED)
def _smoke(world: World):
    results = read_json(study_in(world.folder / "study") / "results.json")
    del results["versions"], results["settings"]
    for finding in results["findings"].values():
        finding["text"] = without_numbers(finding["text"])
    return results


@golden("study: asymmetries", **TRAINED)
def _asymmetries(world: World):
    folder = asymmetries_in(world.folder / "asymmetries")
    (paths,) = read_paths(folder)
    return {
        "rows": read_asymmetries(folder).rows,
        "sweep": paths.sweep,
        "drifts": paths.drifts,
    }
