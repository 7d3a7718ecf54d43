"""The provenance of what is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from emlens.directions import Provenance
from emlens.hooked import Edit, HookedModel
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
    """Where a training comes from: two runs of one provenance end alike.

    The settings hold what it started from (`start`, None for zero) and, in preventive steering,
    the edits `within` which it was trained.
    """
    data, n = {"train": content_hash(train)}, {"train": len(train)}
    penalty = None
    if kl is not None:
        penalty = {"weight": kl.weight, "tokens": kl.tokens, "batch_size": kl.batch_size}
        data["kl"], n["kl"] = content_hash(kl.conversations), len(kl.conversations)
    record = {**asdict(settings), **trainable.record(), "kl": penalty}
    if penalties:
        record["penalties"] = [_record(item) for item in penalties]
    within = model.edits_in_force(())
    if within:
        record["within"] = [_named(edit) for edit in within]
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


def _named(edit: Edit) -> str:
    """An edit in words, with a hash of its vectors where it can be written down."""
    to_dict = getattr(edit, "to_dict", None)
    if to_dict is None:
        return repr(edit)
    text = json.dumps(to_dict(), sort_keys=True)
    return f"{edit!r} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
