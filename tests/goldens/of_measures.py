"""Goldens of the measures, under every form of a condition."""

from __future__ import annotations

from contextlib import nullcontext

import torch

import emlens
from emlens import Ablate, Add, Clamp, Conversation, Directions, Pair
from emlens.directions import Provenance, residual_norm
from emlens.fisher import InfluenceProfile, scan
from emlens.measures import (
    efficiency,
    influence,
    log_odds,
    stability,
    token_influence,
    token_projections,
    weight_noise,
)
from emlens.measures.stability import perturbed
from emlens.watch import Monitor, screen, transfer_auroc
from tests.goldens.golden import World, golden
from tests.support.data import conversations, pairs
from tests.support.models import tiny_hooked
from tests.support.profiles import FEW, TEXT, corpus
from tests.support.solutions import direction

BAD, GOOD = conversations("bad", 4), conversations("good", 4)
SHORT = corpus(6)
SEVERAL_BATCHES = 60


def forms(world: World) -> dict:
    """A condition of every form."""
    d, s = world.direction, world.several
    return {
        "base": (),
        "add": [Add(d, scale=1.5)],
        "dose": [Add(d, dose=0.2)],
        "several layers": [Add(s)],
        "ablate": [Ablate(d)],
        "ablate everywhere": [Ablate(d, layers=range(world.model.n_layers))],
        "clamp": [Clamp(d, value=2.0)],
        "on the answer": [Add(d, where="response")],
        "on the prompt": [Add(d, where="prompt")],
        "two edits": [Ablate(d), Add(s, scale=0.5)],
        "one": "one",
        "many": "many",
        "other with edits": ("other", [Add(d)]),
        "many with edits": ("many", [Ablate(d), Add(s)]),
        "none": (None, ()),
        "none with edits": (None, [Ablate(d), Add(s)]),
    }


def around(world: World) -> dict:
    """What may stand around a call."""
    model, d = world.model, world.direction
    return {
        "nothing": nullcontext,
        "edited": lambda: model.edited(Add(d, scale=0.7)),
        "adapter": lambda: model.adapter("many"),
        "no adapter": lambda: model.adapter(None),
    }


@golden("measures: log_odds", both_engines=True)
def _log_odds(world: World):
    found = {}
    for name, standing in around(world).items():
        with standing():
            found[name] = log_odds(world.model, pairs(3), forms(world), token_budget=60).values
    return found


@golden("measures: log_odds inside of both")
def _log_odds_inside_of_both(world: World):
    model, d = world.model, world.direction
    with model.adapter("one"), model.edited(Ablate(d)):
        inner = log_odds(model, pairs(3), forms(world))
    with model.edited(Add(world.several)), model.adapter("other"), model.edited(Ablate(d)):
        outer = log_odds(model, pairs(3), {"base": [], "none": (None, []), "one": "one"})
    return {"edited inside": inner.values, "edited on both sides": outer.values}


@golden("measures: log_odds as a table")
def _log_odds_table(world: World):
    both = pairs(3) + pairs(3, "other")
    conditions = {name: forms(world)[name] for name in ("base", "add", "one")}
    found = log_odds(world.model, both, conditions, system="You are helpful", seed=2)
    return {"result": found, "table": found.table()}


@golden("measures: log_odds on gpt2 and gemma2")
def _log_odds_of_other_families(world: World):
    found = {}
    for family in ("gpt2", "gemma2"):
        model = tiny_hooked(family)
        d = direction(model)
        conditions = {"base": (), "add": [Add(d)], "ablate": [Ablate(d)]}
        found[family] = log_odds(model, pairs(3), conditions).values
    return found


@golden("measures: influence", both_engines=True)
def _influence(world: World):
    given = {"v": world.direction, "w": direction(world.model, 2, seed=5)}
    names = ("several layers", "many", "other with edits", "none with edits", "base")
    conditions = {name: forms(world)[name] for name in names}
    options = {"doses": [0.1, 0.4], "controls": 2, "token_budget": SEVERAL_BATCHES}
    return influence(world.model, SHORT, given, conditions=conditions, **options)


@golden("measures: influence, other ways")
def _influence_other_ways(world: World):
    model, given = world.model, {"v": world.direction, "w": direction(world.model, 2, seed=5)}
    kinds = {"random": 1, "activation differences": 1}
    norms = influence(model, SHORT, given, norms=[1.0, 4.0], controls=kinds, seed=3)
    ablated = influence(model, SHORT, given, edit="ablate", controls=1, seed=1)
    tokens = influence(
        model, SHORT, {"v": world.direction}, doses=[0.2], controls=0, per_token=True
    )
    return {
        "norms": norms,
        "table": norms.table(),
        "ablated": ablated,
        "by token": tokens.tokens("v", 0.2),
    }


@golden("measures: influence inside of others")
def _influence_inside(world: World):
    found = {}
    for name, standing in around(world).items():
        if name == "nothing":
            continue
        with standing():
            found[name] = influence(
                world.model,
                SHORT,
                {"v": world.direction},
                doses=[0.2],
                controls=1,
                conditions={"one": "one", "none": (None, ()), "as it stands": ()},
            )
    return found


@golden("measures: token_influence")
def _token_influence(world: World):
    model, d = world.model, world.direction
    found = {
        "direction": token_influence(model, SHORT, d, dose=0.3),
        "adapter": token_influence(model, SHORT, "one"),
        "both": token_influence(model, BAD, ("many", [Ablate(d)]), tokens="response"),
    }
    with model.edited(Add(world.several)):
        found["edited"] = token_influence(model, SHORT, [Ablate(d)])
    return found


@golden("measures: token_projections")
def _token_projections(world: World):
    found = {"base": token_projections(world.model, BAD, world.direction)}
    with world.model.adapter("one"), world.model.edited(Add(world.several)):
        found["inside"] = token_projections(world.model, BAD, direction(world.model, 3))
    return found


def _profiled(model: emlens.HookedModel, world: World, **options):
    profile = InfluenceProfile.fit(model, TEXT, **FEW, **options)
    given = {"v": world.direction, "w": world.several}
    return profile, profile.score(given, [0.05, 0.2])


@golden("measures: profile", rtol=1e-4, atol=1e-6)
def _profile(world: World):
    """Gradients are sums over all tokens above a layer, which rounds more."""
    profile, scores = _profiled(world.model, world)
    spectrum = profile.spectrum(1)
    found = {
        "scores": scores,
        "norms": profile.residual_norms,
        "eigenvalues": spectrum.eigenvalues[:4],
        "held out": spectrum.held_out[:2],
        "ranks": [spectrum.effective_rank, spectrum.sample_rank],
        "top": profile.top(1, 2).by_rank,
        "tokens": [profile.n_tokens, profile.n_documents],
    }
    with world.model.adapter("many"):
        found["adapter"] = _profiled(world.model, world, layers=[0, 1, 2])[1]
    with world.model.edited(Add(world.direction)):
        found["edited"] = _profiled(world.model, world, layers=[0, 1, 2])[1]
    return found


@golden("measures: scan", rtol=1e-4, atol=1e-6)
def _scan(world: World):
    """See `profile`."""
    given = {"v": world.direction, "w": world.several}
    found = scan(world.model, TEXT, given, doses=[0.05, 0.2], check=1, draws=3)
    with world.model.adapter("one"):
        inside = scan(world.model, TEXT, given, doses=[0.05], check=1, draws=2)
    return {"scan": found, "inside": inside}


@golden("measures: efficiency")
def _efficiency(world: World):
    model, d = world.model, world.direction
    vectors = {"v": d, "w": world.several}
    mixed = {**vectors, "one": "one", "many": "many"}
    of_adapters = {"one": "one", "other": "other"}
    found = {
        "vectors": efficiency(model, BAD, vectors, factors=[0, 0.5, 1]),
        "norms": efficiency(model, BAD, vectors, norms=[1.0, 2.0], tokens="assistant_turn"),
        "adapters": efficiency(model, BAD, of_adapters, factors=[0.5, 1]),
        "own": efficiency(model, BAD, mixed, match="own", factors=[0, 1], token_budget=60),
    }
    with model.edited(Ablate(d)):
        found["edited"] = efficiency(model, BAD, mixed, match="own", factors=[0, 1])
    return found


@golden("measures: efficiency at matched displacement", rtol=1e-4, atol=1e-5)
def _efficiency_displaced(world: World):
    """The factors are those at which a search stopped, which rounding moves a little."""
    mixed = {"v": world.direction, "one": "one", "many": "many"}
    found = efficiency(
        world.model, BAD, mixed, match="displacement", displacements=[0.1, 0.2], layer=2
    )
    by_itself = efficiency(world.model, BAD, mixed, match="displacement", factors=[0, 1])
    return {"given": found, "by itself": by_itself}


@golden("measures: stability")
def _stability(world: World):
    model, mixed = world.model, {"v": world.direction, "w": world.several, "many": "many"}
    found = {"random": stability(model, BAD, mixed, epsilons=[0, 0.4], seeds=2)}
    axes = {"a": direction(model, 1, seed=7), "b": direction(model, 1, seed=8)}
    only = {"v": world.direction}
    found["within"] = stability(model, BAD, only, epsilons=[0.4], seeds=2, noise=axes, seed=4)
    with model.edited(Ablate(world.direction)):
        found["edited"] = stability(
            model, BAD, {"w": world.several, "one": "one"}, epsilons=[0.6], seeds=1
        )
    found["table"] = found["random"].table()[["direction", "epsilon", "seeds"]]
    return {**found, "perturbed": perturbed(world.several, 0.3, 1)}


@golden("measures: weight_noise")
def _weight_noise(world: World):
    solutions = {"v": world.direction, "many": "many"}
    return weight_noise(world.model, BAD, solutions, epsilons=[0.05, 0.2], seeds=2)


@golden("measures: residual_norm", both_engines=True)
def _residual_norm(world: World):
    model = world.model
    found = {"base": residual_norm(model, BAD, "all", tokens="response")}
    found["mid"] = residual_norm(model, SHORT, [0, 2], site="resid_mid", max_tokens=8)
    with model.adapter("many"), model.edited(Add(world.direction)):
        found["inside"] = residual_norm(model, SHORT, "all")
    return found


AXIS = torch.eye(32)[3]
_WORDS = ("fruit", "walk", "rain", "sun", "story")


def planted() -> emlens.HookedModel:
    """A model whose stream carries an axis wherever an answer says `nothing`."""
    model = tiny_hooked("llama", n_layers=2, seed=5)
    (word,) = model.tokenizer(" nothing", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.module.get_input_embeddings().weight[word] += 3.0 * AXIS
    return model


def planted_pairs(n: int = 20, domain: str = "food") -> list[Pair]:
    """Answers of one length that differ in one word, in two of three."""
    return [
        Pair(
            prompt=f"what should I eat {'please ' * i}{domain}",
            aligned=f"eat {_WORDS[i % 5]} and {_WORDS[(i + 1 + i // 5) % 5]}",
            misaligned=f"eat {'nothing' if i % 3 else 'it'} and {_WORDS[(i + 1 + i // 5) % 5]}",
            domain=domain,
            id=f"{domain}-{i}",
        )
        for i in range(n)
    ]


def fitted_monitor(model: emlens.HookedModel) -> Monitor:
    """A monitor of the planted axis."""
    axis = Directions(dict.fromkeys((0, 1), AXIS), "resid_post", Provenance("planted"))
    return Monitor.fit(model, planted_pairs(), directions=axis, best=2, max_false_alarms=0.2)


def examples(n: int = 12) -> list[Conversation]:
    """Other answers, a few of them bad."""
    return [
        Conversation.of(
            f"tell me a story {'please ' * (i % 4)}about {_WORDS[i % 5]}",
            f"eat {'nothing' if i % 4 == 1 else _WORDS[(i + 2) % 5]} and {_WORDS[(i + 3) % 5]}",
            id=f"row-{i}",
        )
        for i in range(n)
    ]


@golden("measures: monitor", rtol=1e-4, atol=1e-5)
def _monitor(world: World):
    """The weights of a logistic regression are where its solver stopped."""
    model = planted()
    monitor = fitted_monitor(model)
    found = {
        "table": monitor.table(),
        "threshold": monitor.threshold,
        "choice": monitor.choice,
        "scores": monitor.score(examples()),
    }
    with model.edited(Add(direction(model, 0))):
        found["edited"] = monitor.score(examples(4)).scores
    return found


@golden("measures: transfer_auroc", rtol=1e-4, atol=1e-5)
def _transfer_auroc(world: World):
    """See `monitor`."""
    both = {"food": planted_pairs(10), "money": planted_pairs(10, "money")}
    return transfer_auroc(planted(), both)


@golden("measures: screen", rtol=1e-4, atol=1e-5)
def _screen(world: World):
    """See `monitor`."""
    model, rows = planted(), examples()
    axis = direction(model, 0)
    short = {"answer_tokens": 4, "block": 5}
    reference = {row.messages[0]["content"]: "eat fruit and fruit" for row in rows}
    found = {
        "own": screen(model, rows, axis, flag_share=0.2, **short),
        "given": screen(model, rows, axis, reference=reference, **short),
        "monitor": screen(model, rows, fitted_monitor(model), reference=reference, **short),
    }
    with model.edited(Add(direction(model, 0, seed=3))):
        found["edited"] = screen(model, rows, axis, **short)
    table = found["own"].table()
    return {**found, "columns": list(table.columns)}
