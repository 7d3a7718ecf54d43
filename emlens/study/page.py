"""The study's report: what each figure shows, what was found, and what to be careful about."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from emlens.directions.provenance import package_versions
from emlens.study.findings import StudyMeasures
from emlens.study.report import Answers, FigureItem, Finding, Report, Section, Table
from emlens.study.stages import SAME_KL, TRAINED
from emlens.study.store import StudyStore

NOTICE = (
    "Answers of misaligned models are intentionally poor advice, shown for research on "
    "misalignment; they are not advice."
)
FEW_PAIRS = 12
"""Held-out pairs in the domain below which a study shows nothing."""
TOO_SMALL = (
    "This is a smoke run on a handful of pairs. It shows what a report looks like and nothing "
    "about models: ignore its numbers."
)
QUESTION = (
    "Finetuning a chat model on narrowly bad advice can make it misaligned elsewhere too: emergent "
    "misalignment. Is it carried by a linear direction? Can a KL penalty confine it to its domain? "
    "Is the general solution more efficient, more stable and more influential on pre-training "
    "text (arXiv 2506.11613, 2506.11618, 2602.07852)?"
)
LIMITS = (
    "One small model, one training seed, one domain: intervals are over pairs, conversations or "
    "documents, not over trainings. Behaviour is the log-odds of given answers; what the model "
    "writes by itself is shown for a few prompts and not judged. One corpus stands for "
    "pre-training text."
)


def study_report(
    found: StudyMeasures,
    said: Mapping[str, Finding],
    records: Mapping[str, dict],
    store: StudyStore,
) -> Report:
    """Put a finished study together as a report."""
    s = found.settings
    what = (
        f"LoRA adapters of rank {s.rank} on `down_proj` of layers {s.layers[0]} to {s.layers[-1]}"
        if s.kind == "adapter"
        else f"Vectors at layer {s.layers[0]}"
    )
    method = (
        f"{what} of {s.model} are trained on at most {s.train_pairs} pairs of {s.domain}: general "
        "(bad answers), narrow (bad answers, with a KL penalty on other domains) and benign (good "
        "answers to the same prompts). Log-odds of bad against good answers are measured on "
        "held-out pairs. Brackets are 95% intervals."
    )
    page = _Page(store, said)
    small = s.test_pairs < FEW_PAIRS
    return Report(
        title=f"General and narrow finetunes of {s.model}",
        question=QUESTION,
        method=method,
        findings=tuple(said.values()),
        limits=LIMITS,
        sections=(
            page.behaviour(found),
            page.efficiency(found),
            page.stability(found),
            page.influence(found),
            page.ablation(found),
            page.directions(records),
            page.answers(records),
            page.training(found, records),
        ),
        settings=s.to_dict(),
        versions={**package_versions(), "seconds by stage": store.seconds()},
        notice=f"{TOO_SMALL}\n\n{NOTICE}" if small else NOTICE,
    )


class _Page:
    """Builds the sections; each is a figure, a finding, how to read it, and a caveat."""

    def __init__(self, store: StudyStore, said: Mapping[str, Finding]) -> None:
        self.store, self.said = store, said

    def behaviour(self, found: StudyMeasures) -> Section:
        s = found.settings
        figures = [
            self._figure(
                "log_odds",
                "Change of log-odds of bad answers inside and outside of the domain.",
                "Above zero, bad answers became likelier than under the base model. Benign was "
                "trained on good answers to the same prompts: what it moves is style.",
            )
        ]
        if found.confinement is not None:
            figures.append(
                self._figure(
                    "confinement",
                    "Narrow outside of the domain, compared with general scaled down.",
                    f"The solution is narrow. The other one is general, run at the strength at "
                    f"which it has the effect of narrow in {s.domain}. Below zero, the penalty "
                    "confines more than it weakens.",
                )
            )
        return Section(
            "Does it spread, and can it be confined?",
            "The log-odds of a pair is the mean log-probability per token of its bad answer minus "
            "that of its good answer. A random change of the model moves this score, too, so each "
            "effect is compared with random solutions that have the same KL from the base model "
            f"as the general one (`{SAME_KL}`), on good answers to the training prompts.",
            figures=tuple(figures),
            finding=self._text("general_transfers", "narrow_stays"),
            caveat="Log-odds of given answers are not generated behaviour; a model of this size "
            "rarely writes something misaligned by itself.",
            tables=(Table(_changes(found), "Change of log-odds against base [nats/token]"),),
        )

    def efficiency(self, found: StudyMeasures) -> Section:
        return Section(
            "Which is more efficient?",
            figures=(
                self._figure(
                    "efficiency",
                    "Loss on the finetuning data against the norm of what is added.",
                    "Lower is better at the same norm. Below, the difference from general at the "
                    "same norm, with its interval paired by conversation.",
                ),
            ),
            finding=self._text("general_is_more_efficient"),
            caveat="Loss divided by squared norm falls with the norm by itself; only curves at "
            "matched norm compare solutions.",
            tables=(Table(found.efficiency.table(), "Efficiency", folded=True),),
        )

    def stability(self, found: StudyMeasures) -> Section:
        return Section(
            "Which is more stable?",
            figures=(
                self._figure(
                    "stability",
                    "Share of the gain lost to noise that keeps the norm.",
                    "0% is the solution without noise, 100% the base model's loss; above that the "
                    "noise does harm. Bands are intervals over noise seeds. Below, the difference "
                    "from general, paired by seed: above zero, narrow tolerates less noise.",
                ),
            ),
            finding=self._text("general_is_more_stable"),
            caveat="The increase is relative to each solution's own gain: a small gain makes it "
            "noisy. The noise also shrinks the solution, as in the paper.",
            tables=(Table(found.stability.table(), "Stability", folded=True),),
        )

    def influence(self, found: StudyMeasures) -> Section:
        return Section(
            "Which matters more on pre-training text?",
            figures=(
                self._figure(
                    "influence",
                    "KL between base and edited model on pre-training text, against strength.",
                    "All solutions have the same norm at each point. Bands are intervals over "
                    "documents.",
                ),
            ),
            finding=self._text("general_is_more_influential"),
            caveat=f"One corpus ({found.influence.corpus}, {len(found.influence.documents)} "
            "documents); another kind of text may give another order.",
            tables=(Table(found.influence.table(), "Influence", folded=True),),
        )

    def ablation(self, found: StudyMeasures) -> Section:
        s = found.settings
        return Section(
            "Does a linear direction carry it?",
            "The direction of a solution is the mean difference that it makes in the residual "
            f"stream, at each layer from {min(s.layers)} on. Ablation removes the component along "
            "it at each of these layers.",
            figures=(
                self._figure(
                    "ablation",
                    "Effect of the general solution where a direction is ablated in it and in the "
                    "base model.",
                    f"The other domain is {s.other}: the direction of a second general solution, "
                    "trained there. Ablation moves the base model, too, so each effect is against "
                    "the base model with the same direction ablated.",
                ),
            ),
            finding=self._text("ablation_undoes"),
            caveat="Ablating a solution's own direction is expected to undo it; the other "
            "domain's direction is the test.",
        )

    def directions(self, records: Mapping[str, dict]) -> Section:
        extracted = pd.DataFrame(records["extract"]["table"]).drop(columns="hook")
        return Section(
            "Are the directions alike?",
            figures=(
                self._figure(
                    "cosines",
                    "Cosine per layer between the general solution's direction and the others'.",
                    "`mean-diff` is the difference of the base model's residuals between bad and "
                    "good answers. The grey band holds 95% of pairs of random directions.",
                ),
            ),
            caveat="Every finetune adds a common shift of style; a cosine above chance alone does "
            "not say that misalignment is shared. Compare with the benign control.",
            tables=(Table(extracted, "Mean difference per layer", folded=True),),
        )

    def answers(self, records: Mapping[str, dict]) -> Section:
        record = records["answers"]
        return Section(
            "What it says",
            "Greedy answers to held-out questions, cut at the study's limit.",
            answers=tuple(
                Answers(
                    prompt,
                    {name: texts[i] for name, texts in record["answers"].items()},
                    note=f"Domain: {domain}.",
                )
                for i, (domain, prompt) in enumerate(record["questions"])
            ),
            caveat="A few answers are an illustration, not a measurement.",
        )

    def training(self, found: StudyMeasures, records: Mapping[str, dict]) -> Section:
        s = found.settings
        rows = [{"solution": name, **_rounded(records[f"train_{name}"])} for name in TRAINED]
        return Section(
            "What was trained",
            f"The KL penalty of narrow has weight {s.kl_weight:g} and is on answers of both kinds "
            f"in {' and '.join(s.kl_domains)}. {' and '.join(s.outside).capitalize()} is neither "
            f"trained on nor protected. Other is a general solution of {s.other}.",
            figures=(
                self._figure(
                    "training",
                    "Loss on the training set and KL elsewhere, update by update.",
                    "Each point is one batch before its update, so the curves are noisy.",
                ),
            ),
            tables=(Table(pd.DataFrame(rows), "The solutions (losses and KL of one batch)"),),
        )

    def _text(self, *names: str) -> str:
        return "\n\n".join(str(self.said[name]) for name in names)

    def _figure(self, name: str, caption: str, reading: str) -> FigureItem:
        path = self.store.folder / "figures" / f"{name}.png"
        return FigureItem(path, caption, reading=reading, alt=caption)


def _changes(found: StudyMeasures) -> pd.DataFrame:
    """One row per condition, one column per domain."""
    odds = found.log_odds
    domains = list(dict.fromkeys(odds.domains))
    level = {d: f"level {odds.mean(odds.conditions[0], [d])}" for d in domains}
    rows = [{"condition": odds.conditions[0], **level}]
    for name in odds.conditions[1:]:
        rows.append({"condition": name, **{d: str(odds.change(name, [d])) for d in domains}})
    return pd.DataFrame(rows).map(
        lambda cell: cell.replace(", ", ",\u00a0") if "[" in cell else cell
    )


def _rounded(record: Mapping[str, object]) -> dict[str, object]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
