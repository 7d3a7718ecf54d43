"""The provenance of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from emlens.directions import Provenance
from emlens.hooked import HookedModel
from emlens.text import Conversation, content_hash, template_hash
from emlens.training.settings import KLPenalty, Penalty, ProjectionPenalty, TrainSettings
from emlens.training.trainable import Trainable


def provenance_of(
    model: HookedModel,
    trainable: Trainable,
    train: Sequence[Conversation],
    settings: TrainSettings,
    kl: KLPenalty | None,
    penalties: Sequence[Penalty],
    construction: str,
) -> Provenance:
    """Where a training comes from: two runs of one provenance end alike."""
    data, n = {"train": content_hash(train)}, {"train": len(train)}
    penalty = None
    if kl is not None:
        penalty = {"weight": kl.weight, "tokens": kl.tokens, "batch_size": kl.batch_size}
        data["kl"], n["kl"] = content_hash(kl.conversations), len(kl.conversations)
    record = {**asdict(settings), **trainable.record(), "kl": penalty}
    if penalties:
        record["penalties"] = [_record(item) for item in penalties]
    return Provenance(
        construction=f"{construction}, {'narrow (KL)' if kl else 'general'}",
        model=model.name,
        revision=model.revision,
        adapter=model.active_adapter,
        tokens=settings.tokens,
        data=data,
        template=template_hash(model.tokenizer),
        n=n,
        seed=settings.seed,
        settings=record,
    )


def _record(penalty: Penalty) -> dict[str, object]:
    record: dict[str, object] = {"kind": type(penalty).__name__, "weight": penalty.weight}
    if isinstance(penalty, ProjectionPenalty):
        record["directions"] = repr(penalty.directions)
    return record
