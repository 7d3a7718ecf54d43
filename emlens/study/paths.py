"""The way between general and narrow: the trade-off curve, and what becomes of each solution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from emlens._files import read_json, write_json
from emlens.hooked import HookedModel, load
from emlens.study.asymmetries import check_same
from emlens.study.trials import SOLUTIONS, AsymmetrySettings, Trial, trial_folder
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

WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0)
FREED, PENALISED = "narrow, KL removed", "general, KL added"
_CONTINUED = {FREED: ("narrow", "freed"), PENALISED: ("general", "penalised")}
_SWEEP, _TRAJECTORY, _FOLDER = "tradeoff.json", "trajectory.json", "paths"
_ASKED = "settings.json"


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
    out, chosen = Path(out), settings or AsymmetrySettings()
    if model is not None:
        chosen = replace(chosen, model=model.name)
    check_same(out, chosen)
    hooked = model or load(chosen.model)
    seed = chosen.seeds[0]
    at = trial_folder(out, domain, "adapter", seed)
    trial = Trial(hooked, chosen, domain, "adapter", seed, at, progress)
    where = out / _FOLDER / domain
    _check_asked(where, {"seed": seed, "weights": [float(w) for w in weights], "records": records})
    trial.train()
    if not (where / _SWEEP).exists():
        _sweep(trial, weights).save(where / _SWEEP)
    finished = {name: Organism.load(at / name).run for name in SOLUTIONS}
    for start, file in _CONTINUED.values():
        _continue(trial, where, start, file, finished, records)
    runs = {**finished, **{name: _run(where, file) for name, (_, file) in _CONTINUED.items()}}
    paths = {name: TrainingPath.of(run) for name, run in runs.items()}
    trajectory(paths).save(where / _TRAJECTORY)
    return _read(where)


def _check_asked(where: Path, asked: dict) -> None:
    """Parts that are there are not made again, so they have to be what is asked for."""
    path = where / _ASKED
    if path.exists():
        known = read_json(path)
        other = [key for key in asked if known.get(key) != asked[key]]
        differ = [f"{key} {known.get(key)}, not {asked[key]}" for key in other]
        if other:
            raise ValueError(
                f"{where} holds paths of {'; '.join(differ)}; give what it was made "
                "with, or delete that folder"
            )
        return
    where.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def read_paths(out: str | Path) -> list[SolutionPaths]:
    """The finished ones of a folder, none if there are none."""
    found = sorted((Path(out) / _FOLDER).glob(f"*/{_TRAJECTORY}"))
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
        data.penalty(1.0),
        weights,
        data.inside,
        data.outside,
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
    where: Path,
    start: str,
    file: str,
    finished: dict[str, TrainingRun],
    records: int,
) -> None:
    """Train one solution on, the other way, and follow what it does."""
    if (where / f"{file}.json").exists():
        return
    data, path = trial.data, where / f"{file}.safetensors"
    with _on(trial, start):
        if not path.exists():
            kl = data.penalty(dict(trial.settings.kl_weight)["adapter"])
            continue_training(
                trial.model,
                data.conversations("misaligned"),
                finished[start],
                kl=kl if start == "general" else None,
                record_every=1,
                progress=trial.progress,
            ).save(path)
        found = drift(
            trial.model,
            _run(where, file),
            finished,
            data.inside,
            data.outside,
            records=records,
        )
    found.save(where / f"{file}.json")


@contextmanager
def _on(trial: Trial, name: str) -> Iterator[None]:
    """An organism of a trial on its model, inside the block only."""
    Organism.load(trial.folder / name).on(trial.model)
    try:
        yield
    finally:
        trial.model.remove_adapter(name)
