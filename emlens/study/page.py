"""The study's report: what each figure shows, what was found, and what to be careful about."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from emlens.directions.provenance import package_versions
from emlens.study.findings import StudyMeasures
from emlens.study.report import Answers, FigureItem, Report, Section, Table
from emlens.study.store import StudyStore

NOTICE = (
    "Answers under misaligned directions are intentionally poor advice, shown for research on "
    "misalignment; they are not advice."
)
QUESTION = (
    "Finetuning a chat model on narrowly bad advice can make it misaligned elsewhere too. Is that "
    "carried by a linear direction, can a solution be confined to its domain by a KL penalty, and "
    "is the general solution more efficient, more stable and more influential on pre-training "
    "text (arXiv 2506.11613, 2506.11618, 2602.07852)?"
)


def study_report(
    found: StudyMeasures,
    sentences: Mapping[str, str],
    records: Mapping[str, dict],
    store: StudyStore,
) -> Report:
    """Put a finished study together as a report."""
    s = found.settings
    method = (
        f"Vectors are trained at layer {s.layer} of {s.model}, all weights frozen, on pairs of "
        f"{s.domain}: general (misaligned answers), narrow (the same with a KL term elsewhere) "
        "and benign (aligned answers). Behaviour is the log-odds of misaligned against aligned "
        "answers on held-out pairs, with 95% intervals."
    )
    page = _Page(store, sentences)
    return Report(
        title=f"General and narrow directions in {s.model}",
        question=QUESTION,
        method=method,
        findings=tuple(sentences.values()),
        sections=(
            page.training(found, records),
            page.behaviour(found),
            page.ablation(found),
            page.directions(records),
            page.efficiency(found),
            page.stability(found),
            page.influence(found),
            page.answers(records),
        ),
        settings=s.to_dict(),
        versions={**package_versions(), "seconds by stage": store.seconds()},
        notice=NOTICE,
    )


class _Page:
    """Builds the sections; each is a figure, a finding, how to read it, and a caveat."""

    def __init__(self, store: StudyStore, sentences: Mapping[str, str]) -> None:
        self.store, self.sentences = store, sentences

    def training(self, found: StudyMeasures, records: Mapping[str, dict]) -> Section:
        s = found.settings
        rows = [
            {"vector": name.removeprefix("train_"), **_rounded(record)}
            for name, record in records.items()
            if name.startswith("train_")
        ]
        return Section(
            "What was trained",
            f"Each vector is added at every position and trained on {s.train_pairs} pairs of "
            f"{s.domain} at most; the KL of the narrow one, of weight {s.kl_weight:g}, is on "
            f"aligned answers of {' and '.join(s.kl_domains)}. "
            f"{' and '.join(s.outside).capitalize()} is neither trained on nor protected. The norm "
            "is that of what is really added; the dose is its share of the median residual norm of "
            "the layer. Intervals, here and below, are 95% bootstrap intervals over pairs, "
            "conversations or documents.",
            figures=(
                self._figure(
                    "training",
                    "Loss on the training set and KL elsewhere, update by update.",
                    "Each point is one batch before its update, so the curves are noisy.",
                ),
            ),
            tables=(Table(pd.DataFrame(rows), "The trained vectors (losses and KL of one batch)"),),
        )

    def behaviour(self, found: StudyMeasures) -> Section:
        return Section(
            "Does it generalise, and can it be confined?",
            figures=(
                self._figure(
                    "log_odds",
                    "Change of log-odds of misaligned answers, by domain and vector.",
                    "Above zero, misaligned answers became likelier than they are for the base "
                    "model. The benign vector was trained on aligned answers of the same prompts: "
                    "what it moves is style, not misalignment. Random is the mean of two random "
                    "vectors; they and the mean difference have the norm of the general one. A "
                    "random vector of some size moves log-odds as well: what counts is how far "
                    "a vector lies above random.",
                ),
            ),
            finding="\n\n".join(
                self.sentences[name] for name in ("general_transfers", "narrow_stays")
            ),
            caveat="Log-odds of given answers are not generated behaviour, and a model of this "
            "size rarely says something misaligned of its own accord.",
            tables=(
                Table(
                    _changes(found), "Change of log-odds against base [nats/token], 95% intervals"
                ),
            ),
        )

    def ablation(self, found: StudyMeasures) -> Section:
        return Section(
            "Does ablation take it away?",
            f"Ablation removes the component along a direction from layer {found.settings.layer} "
            "on, in the model that carries the general vector.",
            figures=(
                self._figure(
                    "ablation",
                    "What is left of the general vector's effect when a direction is ablated.",
                    "`general - x` is the organism with x ablated; `base - mean-diff` is the "
                    "untouched model with the mean difference ablated, which says how much of the "
                    "drop is owed to the ablation itself.",
                ),
            ),
            finding=self.sentences["ablation_undoes"],
            caveat="Ablating the trained vector itself must undo it where it was added; the "
            "ablation of another construction is the test.",
        )

    def directions(self, records: Mapping[str, dict]) -> Section:
        here = pd.DataFrame(records["cosines"]["at layer"]["rows"])
        extracted = pd.DataFrame(records["extract"]["table"]).drop(columns="hook")
        return Section(
            "Are the constructions the same direction?",
            figures=(
                self._figure(
                    "cosines",
                    "Cosine between the mean difference and what each vector causes, per layer.",
                    "From its layer on, each trained vector is represented by how far it moves "
                    "the mean residual. The grey band holds 95% of pairs of random directions.",
                ),
            ),
            caveat="Two directions can look unrelated where they act and still do the same "
            "downstream; every result names its construction.",
            tables=(
                Table(
                    here.drop(columns="note", errors="ignore").dropna(axis="columns", how="all"),
                    "Cosine at the layer of the trained vectors, whose own errors are not known",
                ),
                Table(extracted, "Mean difference: norm, error and split-half cosine per layer"),
            ),
        )

    def efficiency(self, found: StudyMeasures) -> Section:
        return Section(
            "Which is more efficient?",
            figures=(
                self._figure(
                    "efficiency",
                    "Loss on the finetuning data against the norm of what is added.",
                    "Lower is better at the same norm. Bands are intervals over conversations, "
                    "which the curves share: compare by the paired difference in the finding.",
                ),
            ),
            finding=self.sentences["general_is_more_efficient"],
            caveat="Loss divided by squared norm falls with the norm by itself; only curves at "
            "matched norm compare solutions.",
            tables=(Table(found.efficiency.table(), "Efficiency"),),
        )

    def stability(self, found: StudyMeasures) -> Section:
        return Section(
            "Which is more stable?",
            figures=(
                self._figure(
                    "stability",
                    "Share of the gain lost to noise that keeps the norm.",
                    "0% is the untouched vector, 100% the base model's loss; above that the noise "
                    "does harm. Bands are intervals over noise seeds.",
                ),
            ),
            finding=self.sentences["general_is_more_stable"],
            caveat="The increase is relative to each vector's own gain: a small gain makes it "
            "noisy. Each vector keeps its own norm, and noise on a longer one does more harm.",
            tables=(Table(found.stability.table(), "Stability"),),
        )

    def influence(self, found: StudyMeasures) -> Section:
        return Section(
            "Which matters more for pre-training text?",
            figures=(
                self._figure(
                    "influence",
                    "KL between base and edited model on pre-training text, against dose.",
                    "A dose of 0.1 adds a vector of a tenth of the median residual norm at every "
                    "position. Random is the mean of random directions of equal norm.",
                ),
            ),
            finding=self.sentences["general_is_more_influential"],
            caveat=f"One corpus ({found.influence.corpus}, {len(found.influence.documents)} "
            "documents); another kind of text may order directions otherwise.",
            tables=(Table(found.influence.table(), "Influence"),),
        )

    def answers(self, records: Mapping[str, dict]) -> Section:
        record = records["answers"]
        return Section(
            "What it says",
            "Greedy answers to held-out questions, cut off where the study's limit is.",
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

    def _figure(self, name: str, caption: str, reading: str) -> FigureItem:
        path = self.store.folder / "figures" / f"{name}.png"
        return FigureItem(path, caption, reading=reading, alt=caption)


def _changes(found: StudyMeasures) -> pd.DataFrame:
    """One row per condition, one column per domain."""
    odds = found.log_odds
    domains = list(dict.fromkeys(odds.domains))
    level = {d: _unbroken(f"level {odds.mean(odds.conditions[0], [d])}") for d in domains}
    rows = [{"condition": odds.conditions[0], **level}]
    for name in odds.conditions[1:]:
        changes = {d: _unbroken(str(odds.change(name, [d]))) for d in domains}
        rows.append({"condition": name, **changes})
    return pd.DataFrame(rows)


def _unbroken(interval: str) -> str:
    """An interval that a narrow column does not break inside of its brackets."""
    return interval.replace(", ", ",\u00a0")


def _rounded(record: Mapping[str, object]) -> dict[str, object]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
