"""The way between general and narrow: the trade-off curve, and what becomes of each solution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from emlens._door import guarded
from emlens._reading import expanded
from emlens._runs import Parts
from emlens.hooked import HookedModel, load
from emlens.training import (
    Drift,
    KLSweep,
    Organism,
    TrainingPath,
    TrainingRun,
    Trajectory,
    continue_training,
    drift,
    sweep_kl,
    trajectory,
)
from experiments.asymmetries import keep_settings
from experiments.trials import SOLUTIONS, AsymmetrySettings, Trial, trial_folder

WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0)
FREED, PENALISED = "narrow, KL removed", "general, KL added"
_CONTINUED = {FREED: ("narrow", "freed"), PENALISED: ("general", "penalised")}
_SWEEP, _TRAJECTORY, _FOLDER = "tradeoff.json", "trajectory.json", "paths"


@dataclass(frozen=True)
class SolutionPaths:
    """What lies between the general and the narrow adapter of one domain (arXiv 2602.07852).

    Attributes:
        domain: The narrow domain.
        sweep: One training per weight of the KL.
        drifts: The narrow solution trained on without KL, and the general one with it.
        trajectory: The joint PCA of all four paths.
    """

    domain: str
    sweep: KLSweep
    drifts: dict[str, Drift]
    trajectory: Trajectory


@guarded
def run_paths(
    out: str | Path = "runs/asymmetries",
    settings: AsymmetrySettings | None = None,
    *,
    domain: str = "medical",
    weights: Sequence[float] = WEIGHTS,
    records: int = 4,
    model: HookedModel | None = None,
    progress: bool = True,
) -> SolutionPaths:
    """Train between general and narrow in the folder of the asymmetries; resumable.

    The general and the narrow adapter of the first seed are taken from the folder, or trained.

    Args:
        out: The folder of `run_asymmetries`.
        settings: Its settings.
        domain: The narrow domain.
        weights: Weights of the trade-off curve.
        records: Records of each path at which behaviour is measured.
        model: Take this model instead of loading the settings' one.
        progress: Show progress bars.

    Raises:
        ValueError: If the folder was made with other settings, seed, weights or records, or there
            is no such domain.
    """
    out, chosen = expanded(out), settings or AsymmetrySettings()
    if model is not None:
        chosen = replace(chosen, model=model.name)
    hooked = model or load(chosen.model)
    keep_settings(out, chosen, hooked)
    seed = chosen.seeds[0]
    at = trial_folder(out, domain, "adapter", seed)
    trial = Trial(hooked, chosen, domain, "adapter", seed, at, progress)
    where = out / _FOLDER / domain
    parts = Parts(where)
    parts.keep_settings(
        {"seed": seed, "weights": [float(w) for w in weights], "records": records},
        f"the run in {where}",
        "give the settings that it was made with, or delete that folder",
    )
    trial.train()
    parts.part(_SWEEP, lambda: _sweep(trial, weights))
    finished = {name: Organism.load(at / name).run for name in SOLUTIONS}
    for start, file in _CONTINUED.values():
        _continue(trial, parts, start, file, finished, records)
    runs = {**finished, **{name: _run(where, file) for name, (_, file) in _CONTINUED.items()}}
    paths = {name: TrainingPath.of(run) for name, run in runs.items()}
    trajectory(paths).save(where / _TRAJECTORY)
    return _read(where)


@guarded
def read_paths(out: str | Path) -> list[SolutionPaths]:
    """The finished ones of a folder, none if there are none."""
    found = sorted((expanded(out) / _FOLDER).glob(f"*/{_TRAJECTORY}"))
    return [_read(path.parent) for path in found]


def _read(where: Path) -> SolutionPaths:
    return SolutionPaths(
        where.name,
        KLSweep.load(where / _SWEEP),
        {name: Drift.load(where / f"{file}.json") for name, (_, file) in _CONTINUED.items()},
        Trajectory.load(where / _TRAJECTORY),
    )


def _run(where: Path, file: str) -> TrainingRun:
    return TrainingRun.load(where / f"{file}.safetensors")


def _sweep(trial: Trial, weights: Sequence[float]) -> KLSweep:
    s, data = trial.settings, trial.data
    return sweep_kl(
        trial.model,
        data.conversations("misaligned"),
        data.inside,
        data.outside,
        data.penalty(1.0),
        weights,
        rank=s.rank,
        alpha=2 * s.rank,
        layers=s.adapter_layers,
        epochs=s.epochs,
        lr=dict(s.lr)["adapter"],
        seed=trial.seed,
        progress=trial.progress,
    )


def _continue(
    trial: Trial,
    parts: Parts,
    start: str,
    file: str,
    finished: dict[str, TrainingRun],
    records: int,
) -> None:
    """Train one solution on, the other way, and follow what it does."""
    if parts.finished(f"{file}.json"):
        return
    data = trial.data

    def trained_on() -> TrainingRun:
        kl = data.penalty(dict(trial.settings.kl_weight)["adapter"])
        return continue_training(
            trial.model,
            data.conversations("misaligned"),
            finished[start],
            kl=kl if start == "general" else None,
            record_every=1,
            progress=trial.progress,
        )

    with _on(trial, start):
        run = TrainingRun.load(parts.part(f"{file}.safetensors", trained_on))
        parts.part(
            f"{file}.json",
            lambda: drift(trial.model, data.inside, data.outside, run, finished, records=records),
        )


@contextmanager
def _on(trial: Trial, name: str) -> Iterator[None]:
    """An organism of a trial on its model, inside the block only."""
    Organism.load(trial.folder / name).on(trial.model)
    try:
        yield
    finally:
        trial.model.remove_adapter(name)
