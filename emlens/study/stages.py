"""The stages of a study: each is a few calls of the rooms below, and returns its record."""

from __future__ import annotations

from dataclasses import dataclass

from emlens.directions import Direction, Directions, compare, edit_diff, mean_diff, random_direction
from emlens.edits import Ablate, Add
from emlens.hooked import HookedModel
from emlens.hooked.condition import Conditions
from emlens.measures import efficiency, influence, log_odds, stability
from emlens.study.data import StudyData
from emlens.study.settings import StudySettings
from emlens.study.store import StudyStore
from emlens.text import Conversation, corpus
from emlens.training import KLPenalty, train_vector

TRAINED = ("general", "narrow", "benign")
RANDOMS = 2
"""Random vectors of the general one's norm whose log-odds are averaged."""


@dataclass(frozen=True)
class Study:
    """What every stage works with."""

    model: HookedModel
    settings: StudySettings
    data: StudyData
    store: StudyStore
    progress: bool = True

    # -- making directions --------------------------------------------------------------------

    def train(self, name: str) -> dict:
        """Train one vector: general, narrow (with the KL term), or the benign control."""
        s, data = self.settings, self.data
        conversations = data.aligned() if name == "benign" else data.misaligned()
        kl = KLPenalty(data.kl_text(), weight=s.kl_weight) if name == "narrow" else None
        direction, run = train_vector(
            self.model,
            conversations,
            s.layer,
            kl=kl,
            epochs=s.epochs,
            lr=s.lr,
            batch_size=s.batch_size,
            seed=s.seed,
            progress=self.progress,
        )
        self.store.keep(name, direction)
        runs = self.store.folder / "runs"
        runs.mkdir(exist_ok=True)
        run.save(runs / f"{name}.safetensors")
        first, last = run.steps[0], run.steps[-1]
        return {
            "norm": direction.norm,
            "dose": direction.doses[s.layer],
            "first loss": first.loss,
            "last loss": last.loss,
            "last KL": last.kl,
            "updates": len(run.steps),
        }

    def extract(self) -> dict:
        """Mean differences on the training pairs, at every layer."""
        found = mean_diff(
            self.model,
            self.data.misaligned(),
            self.data.aligned(),
            seed=self.settings.seed,
            progress=self.progress,
        )
        self.store.keep("mean_diff", found)
        return {"table": found.table().to_dict("records")}

    def displacement(self) -> dict:
        """How far each trained vector moves the mean residual above its layer."""
        text = self.data.misaligned(self.settings.measure_pairs)
        above = range(self.settings.layer, self.model.n_layers)
        for name in TRAINED:
            moved = edit_diff(
                self.model,
                text,
                [Add(self.vector(name))],
                layers=above,
                progress=self.progress,
            )
            self.store.keep(f"displacement_{name}", moved)
        return {"layers": list(above)}

    def cosines(self) -> dict:
        """Cosines between the constructions, at every layer that they share."""
        named: dict[str, Directions] = {"mean-diff": self.store.directions("mean_diff")}
        for name in TRAINED:
            named[name] = self.store.directions(f"displacement_{name}")
        everywhere = compare(named)
        at_layer = {"mean-diff": named["mean-diff"][self.settings.layer]}
        here = compare(at_layer | {name: self.vector(name) for name in TRAINED})
        return {"above": _fields(everywhere), "at layer": _fields(here)}

    # -- what they do -------------------------------------------------------------------------

    def behaviour(self) -> dict:
        """Log-odds in every domain under every condition, ablations included."""
        scores = log_odds(self.model, self.data.test, self.conditions(), progress=self.progress)
        randoms = [name for name in scores.conditions if name.startswith("random ")]
        scores = scores.averaged("random", randoms)
        scores.save(self.store.folder / "log_odds.json")
        return {"conditions": list(scores.conditions)}

    def conditions(self) -> Conditions:
        """The organisms, their controls, and what is ablated in them."""
        s = self.settings
        general, mean = self.vector("general"), self.mean_at_layer()
        above = range(s.layer, self.model.n_layers)
        chance = [random_direction(general, s.seed + i) for i in range(RANDOMS)]
        return {
            "base": [],
            "general": [Add(general)],
            "narrow": [Add(self.vector("narrow"))],
            "benign": [Add(self.vector("benign"))],
            **{f"random {i}": [Add(random)] for i, random in enumerate(chance)},
            "mean-diff": [Add(mean.scaled_to(general.norm))],
            "general - general": [Add(general), Ablate(general, layers=above)],
            "general - mean-diff": [Add(general), Ablate(mean, layers=above)],
            "general - random": [Add(general), Ablate(chance[0], layers=above)],
            "base - mean-diff": [Ablate(mean, layers=above)],
        }

    def efficiency(self) -> dict:
        """Loss on the finetuning data at matched norms."""
        s = self.settings
        found = efficiency(
            self.model,
            self.data.misaligned(s.measure_pairs),
            self.solutions(),
            factors=s.factors,
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "efficiency.json")
        return {"table": found.table().to_dict("records")}

    def stability(self) -> dict:
        """Loss under norm-preserving noise."""
        s = self.settings
        found = stability(
            self.model,
            self.data.misaligned(s.measure_pairs),
            {name: self.vector(name) for name in ("general", "narrow")},
            epsilons=s.epsilons,
            seeds=s.noise_seeds,
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "stability.json")
        return {"table": found.table().to_dict("records")}

    def influence(self) -> dict:
        """KL and next-token loss on pre-training text."""
        s = self.settings
        found = influence(
            self.model,
            corpus(s.corpus, documents=s.documents, seed=s.seed),
            {
                "general": self.vector("general"),
                "narrow": self.vector("narrow"),
                "benign": self.vector("benign"),
                "mean-diff": self.mean_at_layer(),
            },
            doses=s.doses,
            controls=s.controls,
            max_tokens=s.document_tokens,
            seed=s.seed,
            progress=self.progress,
        )
        found.save(self.store.folder / "influence.json")
        return {"table": found.table().to_dict("records")}

    def answers(self) -> dict:
        """Greedy answers to held-out questions, side by side."""
        s = self.settings
        questions = self.data.questions(s)
        prompts = [Conversation.of(prompt) for _, prompt in questions]
        general = self.vector("general")
        columns = {
            "base": [],
            "general": [Add(general)],
            f"general x {s.steer_factor:g}": [Add(general, scale=s.steer_factor)],
            "narrow": [Add(self.vector("narrow"))],
        }
        texts = {
            name: self.model.generate(prompts, edits, max_new_tokens=s.answer_tokens, temperature=0)
            for name, edits in columns.items()
        }
        return {"questions": [list(question) for question in questions], "answers": texts}

    # -- directions of this study ---------------------------------------------------------------

    def vector(self, name: str) -> Direction:
        """A trained vector."""
        return self.store.directions(name)[self.settings.layer]

    def mean_at_layer(self) -> Direction:
        """The mean difference at the layer of the trained vectors."""
        return self.store.directions("mean_diff")[self.settings.layer]

    def solutions(self) -> dict[str, Direction]:
        """The two solutions and a random control."""
        general = self.vector("general")
        return {
            "general": general,
            "narrow": self.vector("narrow"),
            "random": random_direction(general, self.settings.seed),
        }


def _fields(comparison) -> dict:
    return {"rows": list(comparison.rows), "null": list(comparison.null)}
