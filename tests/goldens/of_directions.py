"""Goldens of the constructions of directions, and of what is read from directions."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from emlens import Ablate, Add
from emlens.directions import (
    adapter_scalars,
    adapter_vectors,
    both_diff,
    compare,
    compare_layers,
    confounds,
    convergence,
    decompose,
    edit_diff,
    extract_all,
    from_repeng,
    from_steering_vectors,
    in_features,
    mean_diff,
    model_diff,
    pca,
    probe,
    projection,
    promoted_tokens,
    random_direction,
    subspace_overlap,
    system_prompt_diff,
)
from emlens.text import Pair
from tests.goldens.golden import World, golden
from tests.support.data import conversations
from tests.support.solutions import direction

BAD, GOOD = conversations("bad", 8), conversations("good", 8)
TWO = [1, 3]
_WORDS = ("fruit", "walk", "rain", "sun", "story", "fund")


def apart(side: str, n: int = 12) -> list:
    """Answers to prompts of their own, which two sides share: what a probe is fitted to."""
    both = [
        Pair(
            prompt=f"tell me a story {'please ' * i}".strip(),
            aligned=f"eat {_WORDS[i % 6]} and {_WORDS[(i + 1 + i // 6) % 6]}",
            misaligned=f"eat {'nothing' if i % 4 else _WORDS[i % 6]} and lie {_WORDS[i // 2]}",
            domain="food",
            id=str(i),
        )
        for i in range(n)
    ]
    return [pair.conversation(side) for pair in both]  # type: ignore[arg-type]


@golden("directions: mean_diff", both_engines=True)
def _mean_diff(world: World):
    model, d = world.model, world.direction
    found = {
        "by token": mean_diff(model, BAD, GOOD, token_budget=60),
        "with an edit": mean_diff(model, BAD, GOOD, layers=TWO, edits=[Ablate(d)]),
    }
    with model.edited(Add(d)):
        found["edited"] = mean_diff(model, BAD, GOOD, layers=TWO)
    with model.adapter("many"):
        found["adapter"] = mean_diff(model, BAD, GOOD, layers=TWO)
        with model.edited(Add(d)):
            found["both"] = mean_diff(model, BAD, GOOD, layers=TWO, edits=[Ablate(world.several)])
            with model.adapter(None):
                found["base inside"] = mean_diff(model, BAD, GOOD, layers=TWO)
    return found


@golden("directions: mean_diff, other ways")
def _mean_diff_other_ways(world: World):
    model = world.model
    ways = {
        "by conversation": {"weighting": "conversation"},
        "whole turn": {"tokens": "assistant_turn", "site": "mlp_out"},
        "attention": {"tokens": "prompt", "site": "attn_out"},
        "length": {"match": "length"},
        "prompt": {"match": "prompt", "seed": 3},
        "trimmed": {"skip_first": 1, "winsorize": 0.9},
        "without massive": {"drop_massive": 1.5, "site": "resid_mid"},
    }
    return {name: mean_diff(model, BAD, GOOD, layers=[2], **how) for name, how in ways.items()}


@golden("directions: models apart", both_engines=True)
def _models_apart(world: World):
    model, d = world.model, world.direction
    options = {"layers": [2]}
    found = {
        "adapter": model_diff((model, "one"), (model, None), BAD, **options),
        "adapters": model_diff((model, "many"), (model, "one"), BAD, **options),
        "edits": model_diff((model, [Add(d)]), (model, None), BAD, **options),
        "as it stands": model_diff((model, "other"), model, BAD, **options),
        "both": both_diff((model, "one"), BAD, (model, None), GOOD, **options),
        "with edits": both_diff((model, "one"), BAD, model, GOOD, edits=[Ablate(d)], **options),
    }
    with model.edited(Add(world.several)):
        found["edited"] = model_diff((model, "many"), (model, None), BAD, **options)
    with model.adapter("one"):
        found["inside"] = model_diff((model, "many"), (model, None), BAD, **options)
    return found


@golden("directions: probes and PCA", rtol=1e-3, atol=1e-4)
def _fitted(world: World):
    """A logistic regression is where its solver stopped; LDA inverts an ill-conditioned matrix."""
    model, bad, good = world.model, apart("misaligned"), apart("aligned")
    found = {
        "logistic": probe(model, bad, good, layers=[1], seed=1),
        "lda": probe(model, bad, good, kind="lda", layers=[1]),
        "pca": pca(model, bad, good, layers=[1, 2]),
        **extract_all(model, bad, good, layers=[2]),
    }
    with model.adapter("many"), model.edited(Add(world.direction)):
        found["inside"] = probe(model, bad, good, layers=[2], regularisation=0.1)
        found["pca inside"] = pca(model, bad, good, layers=[2], edits=[Ablate(world.several)])
    return found


@golden("directions: system_prompt_diff")
def _system_prompt_diff(world: World):
    model = world.model
    asked = [["how do I save money", "tell me a story"], ["You lie"], ["You are good", "Hi"]]
    options = {"max_new_tokens": 6, "layers": TWO, "seed": 4}
    made = system_prompt_diff(model, *asked, **options)
    found = {"base": made, "answers": made.provenance.settings["answers"]}
    with model.adapter("many"):
        found["adapter"] = system_prompt_diff(model, *asked, temperature=0.0, **options)
    with model.edited(Add(world.direction)):
        found["edited"] = system_prompt_diff(model, *asked, **options)
    return found


@golden("directions: what edits move")
def _effects(world: World):
    model = world.model
    pushes = {"v": [Add(world.direction)], "w": [Add(world.several)]}
    controls = [[Add(direction(model, 1, seed=i))] for i in (3, 4)]
    found = {
        "convergence": convergence(model, BAD, pushes, controls=controls),
        "edit": edit_diff(model, BAD, pushes["w"], layers=TWO),
    }
    with model.adapter("one"):
        found["adapter"] = edit_diff(model, BAD, pushes["v"], layers=TWO)
    return found


@golden("directions: adapters read")
def _adapters(world: World):
    model = world.model
    scalars = adapter_scalars(model, BAD, "one")
    return {
        "one": adapter_vectors(model, "one"),
        "other": adapter_vectors(model, "other"),
        "column": adapter_vectors(model, "many", site="mlp_out", column=1),
        "scalars": scalars.scalars,
        "positions": scalars.positions,
    }


def _encode(activations: torch.Tensor) -> torch.Tensor:
    """Features of an autoencoder: both halves of every coordinate."""
    return torch.cat([activations - 0.1, -activations - 0.1], dim=1).relu()


def _decode(features: torch.Tensor) -> torch.Tensor:
    one, other = features.chunk(2, dim=1)
    return one - other


@golden("directions: compared")
def _compared(world: World):
    model = world.model
    one = mean_diff(model, BAD, GOOD)
    other = mean_diff(model, BAD[:4], GOOD[4:], weighting="conversation")
    parts = decompose({"a": one, "b": other})
    comparison, found = confounds(model, BAD, GOOD, layers=[1])
    at = {name: made[1] for name, made in found.items()}
    return {
        "compare": compare({"a": one, "b": other}),
        "layers": compare_layers({"a": one, "b": other}),
        "overlap": subspace_overlap([one, other], [world.several]),
        "decompose": parts.rows,
        "shared": parts.shared.at([1]),
        "projection": projection(one, other),
        "promoted": promoted_tokens(model, one.at([3]), 3),
        "features": in_features(one[3], _encode, _decode, k=2),
        "trust": one.table(),
        "random": random_direction(one[2], 5),
        "confounds": {"rows": comparison.rows, "directions": at},
    }


@golden("directions: objects of others")
def _objects(world: World):
    s = {layer: vector.numpy() for layer, vector in world.several.vectors.items()}
    control = SimpleNamespace(model_type="llama", directions=s)
    steering = SimpleNamespace(layer_activations=world.several.vectors, layer_type="decoder_block")
    return {"repeng": from_repeng(control), "steering_vectors": from_steering_vectors(steering)}
