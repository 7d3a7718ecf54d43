"""Goldens of training: short runs, whose losses and final numbers are kept.

Updates of AdamW divide by the size of gradients, so that rounding of small ones is amplified from
update to update: their tolerance is wider.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from emlens import Add, KLPenalty
from emlens.training import (
    NormPenalty,
    ProjectionPenalty,
    TrainingPath,
    TrainingRun,
    auto_kl,
    continue_training,
    drift,
    sweep_kl,
    train_adapter,
    train_vector,
    train_weights,
    trajectory,
)
from tests.goldens.golden import World, golden
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.solutions import direction

TRAIN, ELSEWHERE = conversations("bad", 6), conversations("good", 4)
INSIDE, OUTSIDE = pairs(3), pairs(3, "other")
QUICK = {"epochs": 2, "batch_size": 3, "progress": False}
ADAPTER = {**QUICK, "lr": 1e-2, "alpha": 16.0}
TRAINED = {"rtol": 1e-3, "atol": 1e-4}


def penalty(weight: float = 0.5) -> KLPenalty:
    return KLPenalty(ELSEWHERE, weight=weight, batch_size=2)


def record(run: TrainingRun) -> dict:
    """Losses of every update, and what the parameters were in the end."""
    return {
        "steps": run.steps,
        "path": run.path_steps,
        "norms": {name: states.flatten(1).norm(dim=1) for name, states in run.states.items()},
        "last": {name: states[-1] for name, states in run.states.items()},
        "residual norms": run.residual_norms,
        "data": run.provenance.data,
    }


@golden("training: vectors", **TRAINED)
def _vectors(world: World):
    model = tiny_hooked("llama")
    s = direction(model, 1, seed=3)
    ways = {
        "general": {},
        "KL": {"kl": penalty()},
        "layers": {"layer": [1, 2], "batch_size": 2, "accumulate": 2, "seed": 3, "kl": penalty(2)},
        "on answers": {"where": "response", "site": "mlp_out", "tokens": "assistant_turn"},
        "penalties": {"penalties": [NormPenalty(0.1), ProjectionPenalty(s, 0.5)]},
        "watched": {"validation": ELSEWHERE, "initial": s, "schedule": "constant", "clip": 0.5},
    }
    found = {}
    for name, how in ways.items():
        how = {"layer": 1, **QUICK, **how}
        found[name] = record(train_vector(model, TRAIN, **how)[1])
    return found


@golden("training: vectors inside of others", **TRAINED)
def _vectors_inside(world: World):
    model, found = world.model, {}
    with model.adapter("many"):
        found["adapter"] = record(train_vector(model, TRAIN, 1, kl=penalty(), **QUICK)[1])
    with model.edited(Add(world.several)):
        found["edited"] = record(train_vector(model, TRAIN, 1, kl=penalty(), **QUICK)[1])
    return found


@golden("training: adapters", **TRAINED)
def _adapters(world: World):
    ways = {
        "general": {"layers": [2]},
        "KL": {"layers": [1, 2], "kl": penalty(), "record_every": 1},
        "modules": {"rank": 2, "modules": ["q_proj", "down_proj"], "layers": [3], "rslora": False},
    }
    found = {}
    for name, how in ways.items():
        model = tiny_hooked("llama")
        found[name] = record(train_adapter(model, TRAIN, "x", **ADAPTER, **how))
    return found


@golden("training: weights", **TRAINED)
def _weights(world: World):
    model = tiny_hooked("llama")
    run = train_weights(model, TRAIN, kl=penalty(), lr=1e-3, layers=(2,), **QUICK)
    weights = dict(model.module.named_parameters())
    norms = {name: float(w.detach().norm()) for name, w in weights.items() if ".layers.2." in name}
    return {"steps": run.steps, "norms": norms}


@contextmanager
def stopped_after(updates: int):
    """Updates of AdamW, of which one is the last before the run is interrupted."""
    real, done = torch.optim.AdamW.step, count()

    def step(self, *arguments, **options):
        if next(done) == updates:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    torch.optim.AdamW.step = step
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        torch.optim.AdamW.step = real


def resumable(checkpoint: Path, kind: str = "vector") -> TrainingRun:
    """A run that goes on from its checkpoint."""
    options = {**QUICK, "checkpoint": checkpoint, "checkpoint_every": 1}
    if kind == "vector":
        return train_vector(tiny_hooked("llama"), TRAIN, [1, 2], kl=penalty(), **options)[1]
    options |= {"lr": 1e-2, "layers": [1], "record_every": 1}
    return train_adapter(tiny_hooked("llama"), TRAIN, "x", **options)


@golden("training: interrupted and gone on", **TRAINED)
def _resumed(world: World):
    found = {}
    for kind in ("vector", "adapter"):
        checkpoint = world.folder / f"{kind}-checkpoint.safetensors"
        checkpoint.unlink(missing_ok=True)
        with stopped_after(2):
            resumable(checkpoint, kind)
        assert checkpoint.exists()
        found[kind] = record(resumable(checkpoint, kind))
    return found


@golden("training: drift", **TRAINED)
def _drift(world: World):
    model = tiny_hooked("llama")
    general = train_vector(model, TRAIN, 1, **QUICK)[1]
    narrow = train_vector(model, TRAIN, 1, kl=penalty(2), **QUICK)[1]
    on = continue_training(model, TRAIN, narrow, epochs=2, progress=False)
    references = {"general": general, "narrow": narrow}
    found = {"vector": drift(model, INSIDE, OUTSIDE, on, references, records=3)}
    run = train_adapter(model, TRAIN, "x", layers=[1], record_every=1, **ADAPTER)
    found["adapter"] = drift(model, INSIDE, OUTSIDE, run, {}, records=2)
    return found


@golden("training: sweep_kl", **TRAINED)
def _sweep_kl(world: World):
    model = tiny_hooked("llama")
    arguments = (model, TRAIN, INSIDE, OUTSIDE, penalty())
    vectors = sweep_kl(*arguments, [0.0, 2.0], layer=1, **QUICK)
    adapters = sweep_kl(*arguments, [0.0, 2.0], layers=[1], **ADAPTER)
    auto = auto_kl(*arguments, tolerance=0.05, low=0.1, high=10.0, trials=2, layer=1, **QUICK)
    return {"vectors": vectors, "adapters": adapters, "auto": auto}


@golden("training: trajectory", rtol=1e-2, atol=1e-3)
def _trajectory(world: World):
    """Angles between single updates; see above."""
    model, runs = tiny_hooked("llama"), {}
    for name, kl in (("general", None), ("narrow", penalty(2))):
        options = {**ADAPTER, "epochs": 4, "layers": [1], "record_every": 1}
        run = train_adapter(model, TRAIN, name, kl=kl, record_gradients=True, **options)
        runs[name] = TrainingPath.of(run)
    found = trajectory(runs)
    return {
        "steps": found.steps,
        "norms": found.norms,
        "explained": found.explained[:2],
        "cosines": found.final_cosines,
        "lags": found.lags,
    }
