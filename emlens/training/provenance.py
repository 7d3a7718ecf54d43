"""The provenance of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from emlens._files import sha256_of
from emlens.directions import Provenance
from emlens.hooked import HookedModel
from emlens.hooked.identity import identities
from emlens.text import Conversation
from emlens.text.conversation import content_hash
from emlens.text.tokens import template_hash
from emlens.training.anchors import conversations_of
from emlens.training.settings import (
    AnchorPenalty,
    KLPenalty,
    Penalty,
    ProjectionPenalty,
    TrainSettings,
)
from emlens.training.trainable import Trainable


def provenance_of(
    model: HookedModel,
    trainable: Trainable,
    train: Sequence[Conversation],
    settings: TrainSettings,
    kl: KLPenalty | None,
    penalties: Sequence[Penalty],
    construction: str,
    validation: Sequence[Conversation] = (),
) -> Provenance:
    """Where a training comes from: two runs of one provenance end alike.

    The settings hold what it started from (`start`, None for zero) and, in preventive steering,
    the edits `within` which it was trained.
    """
    data, n = {"train": content_hash(train)}, {"train": len(train)}
    penalty = None
    if kl is not None:
        penalty = {"weight": kl.weight, "tokens": kl.tokens, "batch_size": kl.batch_size}
        data["kl"], n["kl"] = content_hash(kl.conversations), len(kl.conversations)
    if validation:
        data["validation"], n["validation"] = content_hash(validation), len(validation)
    record = {**asdict(settings), **trainable.record(), "kl": penalty, **model.template.record}
    if penalties:
        record["penalties"] = [_record(item) for item in penalties]
    within = model.edits_in_force(())
    if within:
        record["within"] = [repr(edit) for edit in within]
    return Provenance(
        construction=f"{construction}, {'narrow (KL)' if kl else 'general'}",
        model=model.name,
        revision=model.revision,
        adapter=model.active_adapter,
        tokens=settings.tokens,
        data=data,
        template=template_hash(model.template),
        n=n,
        seed=settings.seed,
        settings=record,
        **identities(model),
    )


def _record(penalty: Penalty) -> dict[str, object]:
    record: dict[str, object] = {"kind": type(penalty).__name__, "weight": penalty.weight}
    if isinstance(penalty, AnchorPenalty):
        record |= {"shape": penalty.shape, "margin": penalty.margin}
        record |= {"batch_size": penalty.batch_size, "n": len(penalty.data)}
        record["data"] = content_hash(conversations_of(penalty))
    if isinstance(penalty, ProjectionPenalty):
        # a fixed order, so that two records of the same vectors are equal
        vectors = sorted(penalty.directions.vectors.items())
        hashed = sha256_of(b"".join(vector.numpy().tobytes() for _, vector in vectors))
        record["directions"] = f"{penalty.directions!r} {hashed[:16]}"
    return record
