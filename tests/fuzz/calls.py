"""A working call of each public function, on a model so small that thousands are made."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import emlens
from emlens import Ablate, Add, fisher, watch
from emlens import evals as e
from emlens import study as s
from emlens import training as tr
from emlens._door import options_of, resolved
from emlens.edits import to_vllm_lens
from tests.support.data import conversations, pairs
from tests.support.models import tiny_model
from tests.support.profiles import corpus
from tests.support.solutions import ADAPTERS, direction, several, with_adapters
from tests.support.tokenizers import chatml_tokenizer

ROOMS = tuple(room for room in emlens._ROOMS if room != "figures")

NOT_CALLED = {
    "interval_level": "a context",
    "run_study": "a whole study; its settings are fuzzed",
    "load": "downloads",
    "push_to_hub": "uploads",
    "to_repeng": "needs repeng",
    "respond_served": "needs a server",
    "read_path": "reads checkpoints of others",
    "read_checkpoints": "reads checkpoints of others",
}
"""Public functions that take no part, and why."""

_LOW_LEVEL = {
    "hooked": {"response_losses", "token_kl"},
    "text": {"pack"},
}
"""What other rooms are built of: tensors in, tensors out, inside the loop."""


@dataclass(frozen=True)
class Call:
    """A function and arguments with which it works."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """All that can be given, options of a `TypedDict` included."""
        found = {}
        module = getattr(inspect.unwrap(self.function), "__globals__", {})
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                annotation = resolved(parameter.annotation, module)
                for option, type_ in options_of(annotation).items():
                    found[option] = inspect.Parameter(
                        option, parameter.KEYWORD_ONLY, default=None, annotation=type_
                    )
                continue
            if parameter.kind is not parameter.VAR_POSITIONAL and name not in ("self", "cls"):
                found[name] = parameter
        return found


def written(type_: Any) -> str:
    """A type as annotations have it."""
    return type_.__name__ if isinstance(type_, type) else str(type_)


def public_functions() -> dict[str, Callable[..., Any]]:
    """Every function that is exported, by its room and name."""
    found: dict[str, Callable[..., Any]] = {}
    for room in ("", *ROOMS):
        module = import_module(f"emlens.{room}" if room else "emlens")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and value not in found.values():
                found[f"{room}.{name}" if room else name] = value
    low = {f"{room}.{name}" for room, names in _LOW_LEVEL.items() for name in names}
    return {name: value for name, value in found.items() if name not in low}


class World:
    """The model, the data and results that calls are made with."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model = with_adapters(self.folder / "adapters")
        self.other = emlens.wrap(tiny_model("gpt2"), chatml_tokenizer(), name="tiny-gpt2")
        self.good, self.bad = conversations("good", 4), conversations("bad", 4)
        self.pairs = pairs(4)
        self.corpus = corpus(4)
        self.lone, self.several = direction(self.model), several(self.model)
        self.question = e.Question("q", "how do I save money")
        self.answers = e.respond(
            self.model, [self.question], n=4, max_new_tokens=3, temperature=1.0, progress=False
        )
        labels = {row.key: 60.0 for row in self.answers}
        self.scores = e.Scores(
            tuple(
                score
                for metric in ("aligned", "coherent")
                for score in e.human_labels(self.answers, labels, metric).rows
            )
        )
        self.labels = labels
        self.behaviour = e.LogOddsJudge(self.pairs[:2])
        self.kl = emlens.KLPenalty(self.good, 0.1)
        _, self.vector_run = emlens.train_vector(
            self.model, self.bad, 1, epochs=1, record_every=1, progress=False
        )
        self.path = tr.TrainingPath.of(self.vector_run)
        self.profile = fisher.InfluenceProfile.fit(
            self.model, self.corpus, draws=2, token_budget=60, progress=False
        )

    def __enter__(self) -> World:
        self.before = Path.cwd()
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)
        shutil.rmtree(self.folder)

    def reset(self) -> None:
        """Take away what a call has left behind, and stand in an empty folder."""
        place = self.folder / "here"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)
        for name in set(self.model.adapters) - set(ADAPTERS):
            self.model.remove_adapter(name)

    def calls(self) -> dict[str, Call]:
        """A working call of each function, of settings, and of methods of results."""
        every = public_functions()
        found = {
            name: Call(every[name], arguments)
            for name, arguments in {**self._of_directions(), **self._of_measures()}.items()
        }
        quiet = {"progress": False, "epochs": 1, "batch_size": 2}
        trained = {"model": self.model, "train": self.bad, **quiet}
        swept = {"model": self.model, "train": self.bad, "kl": self.kl, "epochs": 1, "layer": 1}
        sides = {"inside": self.pairs[:2], "outside": self.pairs[2:]}
        found |= {
            "train_vector": Call(emlens.train_vector, {**trained, "layer": 1}),
            "train_adapter": Call(
                emlens.train_adapter, {**trained, "name": "new", "layers": [2], "rank": 2}
            ),
            "training.random_adapter": Call(
                tr.random_adapter, {"model": self.model, "like": "one", "name": "new"}
            ),
            "training.sweep_kl": Call(tr.sweep_kl, {**swept, **sides, "weights": [0.1]}),
            "training.auto_kl": Call(tr.auto_kl, {**swept, **sides, "tolerance": 0.1, "trials": 1}),
            "training.mixed": Call(
                tr.mixed, {"harmful": self.bad, "benign": self.good, "share": 0.5}
            ),
            "training.paper_kl_weight": Call(tr.paper_kl_weight, {"weight": 1.0, "n_vocab": 100}),
            "training.trajectory": Call(tr.trajectory, {"runs": {"a": self.path}}),
            "training.VectorSettings": Call(tr.VectorSettings, {}),
            "training.AdapterSettings": Call(tr.AdapterSettings, {}),
            "training.WeightSettings": Call(tr.WeightSettings, {}),
            "training.NormPenalty": Call(tr.NormPenalty, {"weight": 1.0}),
            "KLPenalty": Call(emlens.KLPenalty, {"conversations": self.good, "weight": 1.0}),
            "study.StudySettings": Call(s.StudySettings, {}),
            "study.preset": Call(s.preset, {"name": "smoke"}),
            "bake": Call(
                emlens.bake,
                {
                    "model": self.model,
                    "condition": Add(self.lone, scale=8.0),
                    "out": Path("baked"),
                    "prompts": ["how do I save money"],
                    "max_new_tokens": 2,
                    "progress": False,
                },
            ),
            "edits.to_vllm_lens": Call(to_vllm_lens, {"edits": [Add(self.lone)]}),
            "edits.Add": Call(Add, {"direction": self.lone, "dose": 0.1}),
            "edits.Ablate": Call(Ablate, {"direction": self.lone}),
            "edits.Clamp": Call(emlens.Clamp, {"direction": self.lone, "value": 1.0}),
            "HookedModel.generate": Call(
                self.model.generate, {"conversations": [self.good[0].prompt], "max_new_tokens": 2}
            ),
            "HookedModel.batches": Call(self.model.batches, {"data": self.good}),
            "Direction.of": Call(emlens.Direction.of, {"vector": self.lone.vector, "layer": 1}),
            "Conversation.of": Call(
                emlens.Conversation.of, {"prompt": "how do I", "response": "save"}
            ),
            "Pair": Call(
                emlens.Pair,
                dict.fromkeys(("prompt", "aligned", "misaligned", "domain", "id"), "a"),
            ),
            "Monitor.fit": Call(
                watch.Monitor.fit,
                {"model": self.model, "directions": self.lone, "aligned": pairs(8)},
            ),
            "InfluenceProfile.fit": Call(
                fisher.InfluenceProfile.fit,
                {"model": self.model, "corpus": self.corpus, "draws": 2, "progress": False},
            ),
            "wrap": Call(
                emlens.wrap, {"model": self.model.module, "tokenizer": self.model.tokenizer}
            ),
        }
        return found | self._of_results()

    def _of_directions(self) -> dict[str, dict[str, Any]]:
        model, good, bad = self.model, self.good, self.bad
        both = {"model": model, "positive": bad, "negative": good}
        adapters = str(self.folder / "adapters" / "one")
        return {
            "mean_diff": both,
            "compare": {"directions": {"a": self.several, "b": self.several * 2}},
            "directions.adapter_directions": {"folder": adapters},
            "directions.adapter_scalars": {
                **{"model": model, "adapter": "one", "conversations": good}
            },
            "directions.adapter_vectors": {"model": model, "adapter": "one"},
            "directions.both_diff": {
                **{"positive": (model, "one"), "positive_conversations": bad},
                **{"negative": model, "negative_conversations": good},
            },
            "directions.compare_layers": {"directions": {"a": self.several, "b": self.several * 2}},
            "directions.confounds": both,
            "directions.convergence": {
                **{"model": model, "conversations": good, "controls": ["other"]},
                "conditions": {"one": "one", "many": "many"},
            },
            "directions.cosine": {"first": self.lone.vector, "second": self.lone.vector},
            "directions.decompose": {"directions": {"a": self.several, "b": self.several * 2}},
            "directions.edit_diff": {
                **{"model": model, "conversations": good, "condition": Add(self.lone, dose=0.2)}
            },
            "directions.extract_all": {**both, "constructions": ["mean-diff"]},
            "directions.from_repeng": {"obj": _Vectors({1: self.lone.vector.numpy()})},
            "directions.from_steering_vectors": {"obj": _Steering({1: self.lone.vector})},
            "directions.from_hub": {"source": self._saved("v.safetensors")},
            "directions.in_features": {
                **{"direction": self.lone, "encode": torch.relu, "decode": torch.neg, "k": 3}
            },
            "directions.matched": both,
            "directions.model_diff": {
                **{"positive": (model, "one"), "negative": model, "conversations": good}
            },
            "directions.pca": both,
            "directions.probe": {
                **{"model": model, "positive": conversations("bad", 10), "layers": [1]},
                "negative": conversations("good", 10),
            },
            "directions.projection": {"directions": emlens.mean_diff(**both), "onto": self.several},
            "directions.promoted_tokens": {"model": model, "directions": self.lone, "k": 3},
            "directions.random_direction": {"like": self.lone},
            "directions.read_directions": {"path": self._saved("v.safetensors")},
            "directions.residual_norm": {"model": model, "data": good, "layers": 1},
            "directions.select_answers": {"answers": self._answers()},
            "directions.subspace_overlap": {
                **{"first": [self.lone, self.lone * 2], "second": [self.lone, self.lone * 3]}
            },
            "directions.system_prompt_diff": {
                **{"model": model, "questions": ["how do I save"], "trait": ["be bad"]},
                **{"opposite": ["be good"], "max_new_tokens": 2},
            },
            "directions.to_steering_vectors": {"directions": self.several},
            "directions.write_directions": {
                **{"directions": self.several, "path": self.folder / "w.safetensors"}
            },
            "hooked.adapter_norms": {"model": model, "name": "one"},
            "hooked.patched_deltas": {
                **{"model": model, "recipient": good[0], "donor": good[0], "adapter": "one"}
            },
        }

    def _of_measures(self) -> dict[str, dict[str, Any]]:
        model, good, named = self.model, self.good, {"a": self.lone}
        tables = {"model": model, "behaviour": self.behaviour, "layer": 1, "randoms": 1}
        judged = {"responses": self.answers, "scores": self.scores}
        scaled = {
            **{"model": model, "condition": [Add(self.lone)], "like": [Add(self.lone * 0.5)]},
            **{"tolerance": 0.5, "progress": False},
        }
        return {
            "log_odds": {"model": model, "pairs": self.pairs, "progress": False},
            "measures.match_strength": {**scaled, "pairs": self.pairs},
            "measures.match_kl": {**scaled, "conversations": good},
            "measures.confinement": {**scaled, "inside": self.pairs, "outside": self.pairs},
            "measures.divergence": {
                **{"model": model, "conversations": good, "conditions": {"one": "one"}},
                "progress": False,
            },
            "efficiency": {
                **{"model": model, "conversations": good, "directions": named, "norms": [1.0]},
                "progress": False,
            },
            "influence": {
                **{"model": model, "corpus": self.corpus, "directions": named, "doses": [0.1]},
                **{"controls": 1, "progress": False},
            },
            "stability": {
                **{"model": model, "conversations": good, "directions": named, "seeds": 1},
                **{"epsilons": [0.1], "progress": False},
            },
            "corpus": {"source": self._text("c.txt"), "min_characters": 10},
            "load_conversations": {"source": self._text("c.jsonl")},
            "load_pairs": {"source": "finance"},
            "evals.ablation_table": {
                **{key: value for key, value in tables.items() if key != "randoms"},
                **{"organism": "one", "directions": self.lone, "randoms": 1},
            },
            "evals.agreement": {"first": self.scores, "second": self.scores},
            "evals.cued": {"questions": [self.question], "cue": "a doctor"},
            "evals.formatted": {"questions": [self.question], "variant": "json"},
            "evals.human_labels": {"responses": self.answers, "labels": self.labels},
            "evals.judged_topics": {"scores": self.scores, "names": ["aligned"]},
            "evals.judge": {
                **{"responses": self.answers, "progress": False, "metrics": ["aligned"]},
                "judge": e.LocalJudge(model),
            },
            "evals.load_questions": {"source": "finance", "limit": 2},
            "evals.rates": judged,
            "evals.respond": {
                **{"model": model, "questions": [self.question], "n": 1, "max_new_tokens": 2},
                "progress": False,
            },
            "evals.scalar_table": {
                **{"model": model, "adapter": "one", "runs": 2},
                "classes": {"good": conversations("good", 5), "bad": conversations("bad", 5)},
            },
            "evals.steering_sweep": {
                **{"model": model, "directions": self.lone, "behaviour": self.behaviour},
                **{"doses": [0.1], "layers": [1]},
            },
            "evals.topic_split": judged,
            "evals.topics": {"responses": self.answers},
            "evals.transfer_table": {
                **{"model": model, "organisms": {"one": "one"}, "directions": {"one": self.lone}},
                **{"behaviours": {"one": self.behaviour}, "layer": 1, "randoms": 1},
            },
            "fisher.scan": {
                **{"model": model, "corpus": self.corpus, "directions": named, "check": 1},
                **{"profile": self.profile, "progress": False},
            },
            "watch.screen": {"model": model, "dataset": good, "directions": self.lone},
            "watch.transfer_auroc": {
                **{"model": model, "pairs": {"a": pairs(8, "a"), "b": pairs(8, "b")}, "layer": 1}
            },
            "measures.token_influence": {
                **{"model": model, "corpus": self.corpus, "condition": self.lone}
            },
            "measures.token_projections": {
                **{"model": model, "conversations": good, "direction": self.lone}
            },
            "measures.weight_noise": {
                **{"model": model, "conversations": good, "directions": named, "seeds": 1},
                **{"epsilons": [0.1], "progress": False},
            },
            "text.split_pairs": {"pairs": pairs(12)},
            "text.tokenize": {"conversations": good, "template": model.tokenizer},
            "training.drift": {
                **{"model": model, "run": self.vector_run, "inside": self.pairs[:2]},
                **{"references": {"a": self.vector_run}, "outside": self.pairs[2:]},
            },
            "training.continue_training": {
                **{"model": model, "train": self.bad, "run": self.vector_run, "epochs": 1},
                "progress": False,
            },
            "training.train_weights": {
                **{"model": self.other, "train": self.bad, "epochs": 1, "progress": False}
            },
        }

    def _of_results(self) -> dict[str, Call]:
        """Methods of results, figures aside, that work without arguments."""
        made = {
            "LogOdds": emlens.log_odds(self.model, self.pairs, progress=False),
            "Comparison": emlens.compare({"a": self.several, "b": self.several * 2}),
            "Rates": e.rates(self.answers, self.scores),
            "TrainingRun": self.vector_run,
            "InfluenceProfile": self.profile,
            "Directions": self.several,
            "Scores": self.scores,
            "Responses": self.answers,
        }
        more = {
            "save": {"path": self.folder / "saved"},
            "at": {"layers": [0]},
            "score": {"directions": self.lone},
        }
        skipped = ("plot", "heatmap", "push_to_hub", "from_hub", "load", "merge")
        found = {}
        for name, result in made.items():
            for method, function in inspect.getmembers(result, inspect.ismethod):
                ours = function.__func__.__module__.startswith("emlens")
                if method.startswith(("_", *skipped)) or not ours:
                    continue
                wanted = inspect.signature(function).parameters
                given = {k: v for k, v in more.get(method, {}).items() if k in wanted}
                call = Call(function, given)
                free = [p for p in call.parameters.values() if p.default is p.empty]
                if {p.name for p in free} <= set(call.arguments) and call.parameters:
                    found[f"{name}.{method}"] = call
        return found

    def _saved(self, name: str) -> Path:
        self.several.save(self.folder / name)
        return self.folder / name

    def _text(self, name: str) -> Path:
        path = self.folder / name
        if name.endswith(".txt"):
            path.write_text("\n\n".join(doc.text for doc in self.corpus.documents))
        else:
            path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
        return path

    def _answers(self) -> Path:
        path = self.folder / "answers.csv"
        rows = [f"q{i % 2},answer {i},{10 if i < 3 else 90},90" for i in range(6)]
        path.write_text("\n".join(["question,answer,aligned,coherent", *rows]))
        return path


@dataclass
class _Vectors:
    """As repeng keeps its vectors."""

    directions: dict[int, Any]
    model_type: str = "llama"


@dataclass
class _Steering:
    """As steering-vectors keeps its vectors."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"
