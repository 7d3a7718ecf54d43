"""The one loop: AdamW on whatever is trained, with a record of the path, resumable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import NoReturn

import torch
from torch import Tensor

from emlens._distributed import leads
from emlens._progress import bar
from emlens.directions import Provenance
from emlens.hooked import NonFiniteError
from emlens.hooked.sites import Site
from emlens.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from emlens.training.objective import Draw, Losses, Objective, Rows
from emlens.training.options import Recording
from emlens.training.run import Step, TrainingRun, TrainingStopped, stacked
from emlens.training.settings import TrainSettings
from emlens.training.trainable import Trainable


@dataclass
class _Progress:
    """How far a run is, and what it left behind."""

    steps: list[Step] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    best: float = float("inf")
    since_best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class Loop:
    """One run, from the first update to the record.

    Args:
        trainable: What is trained.
        objective: The terms of the loss.
        settings: How.
        recording: What is kept.
        site: Where vectors are added; None for adapters.
        residual_norms: Median residual norm by layer.
        provenance: How it is made.
        validation: Rows whose loss decides on an early stop.
    """

    def __init__(
        self,
        trainable: Trainable,
        objective: Objective,
        settings: TrainSettings,
        recording: Recording,
        site: Site | None,
        residual_norms: dict[int, float],
        provenance: Provenance,
        validation: Rows | None = None,
    ) -> None:
        self.trainable, self.objective, self.settings = trainable, objective, settings
        self.recording, self.residual_norms = recording, residual_norms
        self.site: Site | None = site
        self.provenance, self.validation = provenance, validation

    def run(self) -> TrainingRun:
        """Train to the end; resume from the checkpoint if there is one.

        Raises:
            ValueError: If the checkpoint belongs to another run.
            NonFiniteError: If the model's own passes are not finite.
            TrainingStopped: If a pass, a loss or a gradient becomes so; nothing has moved then.
        """
        with self.trainable.acting(), self.objective.computing():
            return self._run()

    def _run(self) -> TrainingRun:
        settings, parameters = self.settings, self.trainable.parameters
        optimiser = torch.optim.AdamW(
            list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay
        )
        done = self._resumed(optimiser) or _Progress([], [self.trainable.state()], [], [0])
        per_epoch = self.objective.train.per_epoch
        total = per_epoch * settings.epochs
        draws = self.objective.draws(len(done.steps))
        shown = bar(
            total=total,
            initial=len(done.steps),
            desc="training",
            unit="update",
            shown=self.recording.progress,
        )
        with shown:
            while len(done.steps) < total and not self._enough(done):
                try:
                    step = self._update(optimiser, next(draws), done, total)
                    end_of_epoch = len(done.steps) % per_epoch == 0
                    if self.validation is not None and end_of_epoch:
                        step = self._validate(done)
                except NonFiniteError as error:
                    self._stop(error, done)
                self._keep(optimiser, done)
                shown.set_postfix(_shown(step))
                shown.update()
        if done.best_weights:
            self._load(done.best_weights)
        if done.at[-1] != len(done.steps) or done.best_weights:
            done.states.append(self.trainable.state())
            done.at.append(len(done.steps))
        return self._record(done)

    # -- pieces -------------------------------------------------------------------------------

    def _update(self, optimiser, drawn: Draw, done: _Progress, total: int) -> Step:
        n = len(done.steps)
        rate = self.settings.rate(n, total)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        losses = self.objective.backward(drawn)
        parameters = self.trainable.parameters
        recorded = None
        if self._records(n + 1) and self.recording.record_gradients:
            recorded = {k: _plain(p.grad) for k, p in parameters.items()}
        limit = float("inf") if self.settings.clip is None else self.settings.clip
        gradient = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit))
        self._check(losses, gradient, drawn.train, done)
        if recorded is not None:
            done.gradients.append(recorded)
        optimiser.step()
        step = Step(n, losses.loss, losses.kl, self._norm(), gradient, rate, losses.penalty)
        done.steps.append(step)
        if self._records(n + 1):
            done.states.append(self.trainable.state())
            done.at.append(n + 1)
        return step

    def _records(self, n: int) -> bool:
        every = self.recording.record_every
        return every is not None and n % every == 0

    def _validate(self, done: _Progress) -> Step:
        assert self.validation is not None
        value = self.objective.evaluate(self.validation)
        done.steps[-1] = replace(done.steps[-1], validation=value)
        if value < done.best:
            done.best, done.since_best = value, 0
            if self.settings.patience is not None:
                done.best_weights = {k: _plain(p) for k, p in self.trainable.parameters.items()}
        else:
            done.since_best += 1
        return done.steps[-1]

    def _enough(self, done: _Progress) -> bool:
        return self.settings.patience is not None and done.since_best >= self.settings.patience

    def _norm(self) -> float:
        """Of all that is written into the stream, together; of all weights where nothing is."""
        with torch.no_grad():
            parts = [vector for _, vector in self.trainable.written()]
            parts = parts or list(self.trainable.parameters.values())
            return float(torch.stack([part.norm() for part in parts]).norm())

    def _check(self, losses: Losses, gradient: float, places: list[int], done: _Progress) -> None:
        values = {"loss": losses.loss, "KL": losses.kl, "penalty": losses.penalty}
        values["gradient norm"] = gradient
        if all(isfinite(value) for value in values.values() if value is not None):
            return
        said = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        names = ", ".join(self.objective.train.cache.rows[place].name for place in places)
        raise TrainingStopped(
            f"update {len(done.steps)}: {said}, which is not finite, on the batch {names}; try a "
            "smaller lr or fp32 weights. The run up to here is kept in .run",
            self._record(done),
        )

    def _stop(self, error: NonFiniteError, done: _Progress) -> NoReturn:
        """A pass was not finite: the model's own fault at the first update, training's later."""
        if isinstance(error, TrainingStopped) or not done.steps:
            raise error
        raise TrainingStopped(
            f"update {len(done.steps)}: {error}, or train with a smaller lr. The run up to here is "
            "kept in .run",
            self._record(done),
        ) from error

    def _record(self, done: _Progress) -> TrainingRun:
        return TrainingRun(
            settings=self.provenance.to_dict()["settings"],
            steps=tuple(done.steps),
            states=stacked(done.states),
            path_steps=tuple(done.at),
            site=self.site,
            residual_norms=self.residual_norms,
            provenance=self.provenance,
            gradients=stacked(done.gradients),
        )

    # -- resuming -----------------------------------------------------------------------------

    def _keep(self, optimiser: torch.optim.Optimizer, done: _Progress) -> None:
        where, every = self.recording.checkpoint, self.recording.checkpoint_every
        if where is None or len(done.steps) % every or not leads():
            return
        moments = {
            f"{name}/{key}": _plain(value)
            for name, parameter in self.trainable.parameters.items()
            for key, value in optimiser.state[parameter].items()
        }
        save_checkpoint(
            where,
            Checkpoint(
                run=self._record(done),
                parameters={k: _plain(p) for k, p in self.trainable.parameters.items()},
                moments=moments,
                best_parameters=done.best_weights,
                best=done.best,
                since_best=done.since_best,
            ),
        )

    def _resumed(self, optimiser: torch.optim.Optimizer) -> _Progress | None:
        where = self.recording.checkpoint
        if where is None:
            return None
        shapes = {name: p.shape for name, p in self.trainable.parameters.items()}
        kept = load_checkpoint(where, self.provenance, shapes)
        if kept is None:
            return None
        self._load(kept.parameters)
        for name, parameter in self.trainable.parameters.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in kept.moments.items()}
            optimiser.state[parameter] = {
                key: own[key] if key == "step" else own[key].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        run = kept.run
        return _Progress(
            steps=list(run.steps),
            states=_unstacked(run.states),
            gradients=_unstacked(run.gradients),
            at=list(run.path_steps),
            best=kept.best,
            since_best=kept.since_best,
            best_weights=kept.best_parameters,
        )

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trainable.parameters.items():
                parameter.copy_(weights[name].to(parameter.device))


def _plain(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.detach().float().cpu().clone()


def _unstacked(values) -> list[dict[str, Tensor]]:
    n = len(next(iter(values.values()))) if values else 0
    return [{name: value[i].clone() for name, value in values.items()} for i in range(n)]


def _shown(step: Step) -> dict[str, str]:
    shown = {"loss": f"{step.loss:.3f}"}
    if step.kl is not None:
        shown["KL"] = f"{step.kl:.4f}"
    return {**shown, "norm": f"{step.norm:.1f}"}
