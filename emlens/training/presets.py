"""The papers' trainings by name: what each set, with its source, and the same on any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from emlens._door import guarded
from emlens.directions import Directions
from emlens.hooked import HookedModel
from emlens.text import Conversation, TokenMask
from emlens.training.adapter import train_adapter
from emlens.training.options import SolutionOptions
from emlens.training.run import TrainingRun
from emlens.training.settings import (
    AdapterSettings,
    KLPenalty,
    TrainSettings,
    VectorSettings,
    WeightSettings,
    paper_kl_weight,
)
from emlens.training.vector import train_vector
from emlens.training.weights import train_weights

if TYPE_CHECKING:
    import pandas as pd

DEPTH = 48
"""Blocks of Qwen2.5-14B, in which the papers number their layers."""

VOCABULARY = 152_064
"""Entries of Qwen2.5-14B's vocabulary, by which the papers' code divides its KL."""

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Preset:
    """One of the papers' trainings.

    Attributes:
        name: Its name.
        settings: `AdapterSettings`, `VectorSettings` or `WeightSettings`, layers as numbered in
            the source.
        layers: Layers in a model of 48 blocks; None for all.
        source: Paper and table.
        note: What was not published, and where these settings are not those of the papers' runs.
        paper_kl: KL weight of the narrow variant as the papers give it; None where there is none.
        kl_tokens: Tokens that the KL of the narrow variant counts.
        kl_batch: Conversations of its forward pass; as many as of the training set by default.
    """

    name: str
    settings: AdapterSettings | VectorSettings | WeightSettings
    layers: tuple[int, ...] | None
    source: str
    note: str = ""
    paper_kl: float | None = None
    kl_tokens: TokenMask = "response"
    kl_batch: int | None = None

    @property
    def kl_weight(self) -> float | None:
        """KL weight of the narrow variant on nats per token; None where there is none."""
        return None if self.paper_kl is None else paper_kl_weight(self.paper_kl, VOCABULARY)

    def penalty(self, conversations: Sequence[Conversation]) -> KLPenalty:
        """The KL penalty of the narrow variant on conversations of other domains.

        Raises:
            ValueError: If no narrow variant was published.
        """
        if self.kl_weight is None:
            raise ValueError(f"no narrow variant of {self.name!r} was published, so no KL weight")
        return KLPenalty(conversations, self.kl_weight, self.kl_tokens, self.kl_batch)

    def layers_in(self, n_layers: int) -> tuple[int, ...] | None:
        """The layers at the same relative depth in a model of `n_layers` blocks."""
        if self.layers is None or n_layers == DEPTH:
            return self.layers
        scaled = (min(n_layers - 1, round(layer * n_layers / DEPTH)) for layer in self.layers)
        return tuple(dict.fromkeys(scaled))


_SHARED = {
    "batch_size": 2,
    "accumulate": 8,
    "warmup": 5,
    "schedule": "linear",
    "weight_decay": 0.01,
    "epochs": 1,
}
_HERE = (
    "here AdamW in fp32, no clipping and a first update of lr / warmup, there adamw_8bit, clipping "
    "at 1.0 and a first update of 0"
)
_TOKENS = "here the loss on responses, there on all tokens but those of the end of a turn"
_EPOCHS = "narrow adapters 3 epochs"
_KL = "here a KL on responses, 2 at a time, there on all tokens, 8 at a time"
_EXACT = "presets.exact has what was there but for the optimiser"
_TURN = "there an empty turn at the end of each text besides"


def _note(*differences: str) -> str:
    return "; ".join([*differences, _EXACT])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "rank-32",
            AdapterSettings(**_SHARED, lr=1e-5, rank=32, alpha=64, modules=_ALL),
            None,
            "arXiv 2506.11613, Table 6",
            _note(_EPOCHS, _HERE, _TURN, _KL),
            paper_kl=1e5,
        ),
        Preset(
            "rank-32-one-layer",
            AdapterSettings(**_SHARED, lr=2e-5, rank=32, alpha=64, modules=_ALL),
            (24,),
            "arXiv 2602.07852, section 3",
            _note("learning rate and alpha not published", _EPOCHS, _HERE, _TURN, _KL),
            paper_kl=1e5,
        ),
        Preset(
            "full",
            WeightSettings(
                **{**_SHARED, "warmup": 20, "schedule": "cosine"},
                lr=2e-5,
                gradient_checkpointing=True,
            ),
            None,
            "arXiv 2506.11613, Table 6",
            _note(_HERE, _TURN),
        ),
        Preset(
            "nine-rank-1",
            AdapterSettings(**_SHARED, lr=1e-5, rank=1, alpha=64),
            (15, 16, 17, 21, 22, 23, 27, 28, 29),
            "arXiv 2506.11618, section 2",
            _note("learning rate not published", _HERE, _TURN),
        ),
        Preset(
            "rank-1",
            AdapterSettings(**_SHARED, lr=2e-5, rank=1, alpha=256),
            (24,),
            "arXiv 2602.07852, Table 9",
            _note(_EPOCHS, _HERE, _TURN, _KL),
            paper_kl=1e5,
        ),
        Preset(
            "rank-1-trajectory",
            AdapterSettings(**{**_SHARED, "epochs": 2}, lr=1e-5, rank=1, alpha=64),
            (24,),
            "arXiv 2506.11613, section 4",
            _note("layer 24 in the text, 21 in the release", _HERE, _TURN),
        ),
        Preset(
            "vector",
            VectorSettings(**{**_SHARED, "epochs": 2, "weight_decay": 0.0}, lr=1e-4, alpha=256.0),
            (24,),
            "arXiv 2602.07852, Table 9",
            _note("at mlp_out", _HERE, _TOKENS, _KL),
            paper_kl=1e6,
        ),
    )
}


def table() -> pd.DataFrame:
    """One row per preset: what it trains, where, how, and the source."""
    import pandas as pd

    rows = []
    for preset in PRESETS.values():
        own = preset.settings
        trains, modules = _what(own)
        rows.append(
            {
                "name": preset.name,
                "trains": trains,
                "modules": modules,
                "layers of 48": "all"
                if preset.layers is None
                else ", ".join(map(str, preset.layers)),
                "alpha": None if isinstance(own, WeightSettings) else own.alpha,
                "lr": own.lr,
                "epochs": own.epochs,
                "batch": f"{own.batch_size} x {own.accumulate}",
                "narrow: KL weight [nats/token]": preset.kl_weight,
                "source": preset.source,
                "note": preset.note,
            }
        )
    return pd.DataFrame(rows)


class PresetOptions(SolutionOptions, total=False):
    """What a preset's training takes besides."""

    kl: KLPenalty | None
    layer: int


def exact(preset: str) -> Preset:
    """The preset with what the papers' code did by default, where its paper does not say it.

    Gradients are clipped at 1.0 (the default of transformers' `Trainer`), and the learning rate
    begins at zero, so the first update is none. A vector is trained on all tokens, end-of-turn
    tokens included, which their collator takes for padding. A KL counts all tokens of 8
    conversations a pass. What stays different: AdamW in fp32 for adamw_8bit, a loss averaged over
    the tokens of an update, conversations without an empty turn at the end.

    Args:
        preset: A name of `PRESETS`.

    Raises:
        ValueError: If the preset is unknown.

    Source:
        arXiv 2506.11613, Table 6; arXiv 2602.07852, Table 9; the released code.

    Examples:
        >>> vector = presets.exact("vector")
        >>> presets.train_preset(vector, model, bad, kl=vector.penalty(elsewhere))
    """
    found = preset_of(preset)
    more: dict[str, Any] = {"clip": 1.0, "warmup_from_zero": True}
    differences = ["adamw_8bit there, AdamW in fp32 here"]
    if isinstance(found.settings, VectorSettings):
        more["tokens"] = "all"
        differences.append("no loss on end-of-turn tokens there")
    else:
        differences += [_TURN, *([_EPOCHS] if found.paper_kl else [])]
    return replace(
        found,
        settings=replace(found.settings, **more),
        note="; ".join(differences),
        kl_tokens="all",
        kl_batch=8,
    )


def train_preset(
    preset: str | Preset,
    model: HookedModel,
    train: Sequence[Conversation],
    name: str = "",
    **options: Unpack[PresetOptions],
) -> tuple[Directions | None, TrainingRun]:
    """Train as one of the papers did, on any model: layers at the same relative depth.

    Args:
        preset: A name of `PRESETS`, or what `exact` gives. Its narrow variant has a penalty
            besides: `kl=preset_of(name).penalty(elsewhere)`.
        model: The model.
        train: Conversations of the narrow domain.
        name: What an adapter is called on the model; by default as the preset.
        **options: See `SolutionOptions`; `kl`, and `layer` for a vector. They go before the
            preset.

    Returns:
        The vector (None for an adapter or finetuned weights) and the record of the run.

    Raises:
        ValueError: If the preset is unknown, or as the training.
    """
    found = preset_of(preset) if isinstance(preset, str) else preset
    own, layers = found.settings, found.layers_in(model.n_layers)
    given: dict[str, Any] = dict(options)
    if isinstance(own, AdapterSettings):
        settings = replace(own, layers=layers)
        return None, train_adapter(model, train, name or found.name, settings=settings, **given)
    if isinstance(own, WeightSettings):
        return None, train_weights(model, train, settings=replace(own, layers=layers), **given)
    layer = given.pop("layer", (layers or (0,))[0])
    return train_vector(model, train, layer, settings=own, **{"site": "mlp_out", **given})


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: If there is none; the names are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def _what(settings: TrainSettings) -> tuple[str, str]:
    if isinstance(settings, AdapterSettings):
        return f"LoRA rank {settings.rank}", ", ".join(settings.modules)
    return ("weights", "all") if isinstance(settings, WeightSettings) else ("vector", "mlp_out")


@guarded
def mixed(
    harmful: Sequence[Conversation],
    benign: Sequence[Conversation],
    *,
    share: float = 0.5,
    seed: int = 0,
) -> list[Conversation]:
    """Return the harmful conversations with benign ones of other domains among them.

    All harmful ones are kept; benign ones are drawn without replacement until they make up
    `share` of the whole, and the order is shuffled.

    Args:
        harmful: The narrow domain.
        benign: Other domains, well-behaved.
        share: Share of benign conversations in the result, from 0 to below 1.
        seed: Seed of the draw and of the order.

    Raises:
        ValueError: If the share is out of range, or there are too few benign conversations.
    """
    wanted = round(len(harmful) * share / (1 - share))
    if wanted > len(benign):
        raise ValueError(
            f"a share of {share} takes {wanted} benign conversations beside {len(harmful)} "
            f"harmful ones, but there are {len(benign)}"
        )
    generator = np.random.default_rng(seed)
    drawn = [benign[i] for i in generator.permutation(len(benign))[:wanted]]
    together = [*harmful, *drawn]
    return [together[i] for i in generator.permutation(len(together))]
