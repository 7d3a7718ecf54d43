"""Random sets of conditions: a sweep, one by one, and PEFT with plain hooks give the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel

import emlens
from emlens import hooked
from emlens.hooked.attach import attach
from emlens.hooked.sweep import sweep
from emlens.text import pack
from emlens.text.tokens import TokenRow
from tests.support.adapters import TOKENS, saved
from tests.support.models import D_MODEL, tiny_model
from tests.support.plain import run_plain
from tests.support.tokenizers import chatml_tokenizer

LAYERS = 4
KINDS: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": ["q_proj", "down_proj"]},
    "late": {"layers_to_transform": [2, 3], "r": 2},
    "rooted": {"use_rslora": True, "r": 4, "layers_to_transform": [1, 3]},
    "dora": {"use_dora": True, "r": 2, "target_modules": ["o_proj", "down_proj"]},
    "own_head": {"modules_to_save": ["lm_head"]},
    "low_rank_head": {"target_modules": ["lm_head", "v_proj"]},
    "low_rank_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "some_tokens": {"trainable_token_indices": TOKENS},
    "own_norm": {"modules_to_save": ["model.norm"], "layers_to_transform": [3]},
}
PLAIN = ("everywhere", "late", "rooted", "low_rank_head")
"""Those whose strength can be set."""
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

Strengths = dict[str, float]
"""Adapters that act, each with its strength."""


@dataclass(frozen=True)
class Edit:
    """An edit, with the plain arithmetic of it."""

    kind: str
    layers: tuple[int, ...]
    site: str
    where: str
    vector: torch.Tensor

    def made(self) -> emlens.Add | emlens.Ablate:
        kind = {"add": emlens.Add, "ablate": emlens.Ablate}[self.kind]
        direction = emlens.Direction.of(self.vector, self.layers[0], site=self.site)
        return kind(direction, layers=self.layers, where=self.where)

    def applied(self, x, response):
        unit = self.vector / self.vector.norm()
        change = self.vector.expand_as(x) if self.kind == "add" else -(x @ unit)[..., None] * unit
        near = response | torch.cat([response[1:], response[-1:] & False])
        places = {"all": response | True, "prompt": ~response, "response": near}[self.where]
        return x + change * places[:, None]


@dataclass(frozen=True)
class Standing:
    """What acts, as the test reckons it."""

    named: Strengths
    edits: tuple[Edit, ...] = ()

    def and_then(self, *edits: Edit) -> Standing:
        return replace(self, edits=(*self.edits, *edits))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(kind, tied)`: an adapter that PEFT has saved."""

    @cache
    def save(kind, tied):
        folder = tmp_path_factory.mktemp("adapters") / f"{kind}_{tied}"
        seed = list(KINDS).index(kind)
        settings = {"lora_alpha": 2} | KINDS[kind]
        return saved(folder, tiny_model("llama", LAYERS, tied=tied), seed=seed, **settings)

    return save


def rows():
    """Two rows of different lengths, the last tokens of which are an answer."""
    for length in (11, 7):
        ids = (*TOKENS, *range(10, 10 + length - len(TOKENS)))
        answer = (False,) * (length - 3) + (True,) * 3
        yield TokenRow(ids, answer, answer, f"row {length}")


def batch_of_rows():
    (batch,) = pack(list(rows()), padding_side="left")
    return batch


class Draw:
    """A model with some adapters, and what is drawn at random about it."""

    def __init__(self, seed, folders, tied, engine):
        self.random = random.Random(seed)
        self.tied = tied
        kinds = self._kinds()
        self.folders = {kind: folders(kind, tied) for kind in kinds}
        module = tiny_model("llama", LAYERS, tied=tied)
        attach(module, self.folders, "tiny-llama")
        tokenizer = chatml_tokenizer()
        self.model = emlens.wrap(module, tokenizer, engine=engine, name="tiny", check=False)
        bare = tiny_model("llama", LAYERS, tied=tied)
        self.bare = emlens.wrap(bare, tokenizer, engine=engine, name="tiny", check=False)
        self._peft: dict[tuple[str, ...], PeftModel] = {}

    def _kinds(self) -> list[str]:
        """Some kinds that fit onto one model: no two that replace or adapt the same embedding."""
        kinds: list[str] = []
        at = {"own_head": "head", "low_rank_head": "head"}
        at |= {"low_rank_tokens": "tokens", "some_tokens": "tokens"}
        if self.tied:
            at = dict.fromkeys(at, "both")
        for kind in self.random.sample(list(KINDS), len(KINDS)):
            if kind not in at or at[kind] not in [at.get(one) for one in kinds]:
                kinds.append(kind)
        return kinds[:3]

    def edit(self) -> Edit:
        layers = self.random.sample(range(LAYERS), self.random.choice([1, 1, 2]))
        generator = torch.Generator().manual_seed(self.random.randrange(10**6))
        return Edit(
            self.random.choice(["add", "ablate"]),
            tuple(sorted(layers)),
            self.random.choice(SITES),
            self.random.choice(["all", "all", "prompt", "response"]),
            torch.randn(D_MODEL, generator=generator),
        )

    def edits(self, least=0) -> list[Edit]:
        return [self.edit() for _ in range(self.random.randint(least, 2))]

    def adapters(self) -> tuple[Any, Strengths]:
        """One adapter or two, as they are written, and with their strengths."""
        chosen = self.random.sample(list(self.folders), self.random.choice([1, 1, 2]))
        strengths = dict.fromkeys(chosen, 1.0)
        written: list[Any] = list(chosen)
        for i, name in enumerate(chosen):
            if name in PLAIN and self.random.random() < 0.3:
                strengths[name] = self.random.choice([0.0, 0.5, 3.0])
                written[i] = hooked.Scaled(name, strengths[name])
        return (written[0] if len(written) == 1 else written), strengths

    def condition(self, now: Standing) -> tuple[Any, Standing]:
        """Something that a user may write, and what acts under it."""
        form = self.random.randrange(7)
        edits = self.edits(least=1)
        made = [one.made() for one in edits]
        adapters, strengths = self.adapters()
        plain = replace(now, named={})
        acting = replace(now, named=strengths)
        enclosed = now
        return [
            (None, plain),
            ([], enclosed),
            (made[0], enclosed.and_then(edits[0])),
            (made, enclosed.and_then(*edits)),
            (adapters, acting),
            ((adapters, made), acting.and_then(*edits)),
            ((None, made), plain.and_then(*edits)),
        ][form]

    def nest(self, stack: ExitStack) -> Standing:
        """Enter up to three blocks around all that follows."""
        now = Standing({})
        for _ in range(self.random.randint(0, 3)):
            form = self.random.randrange(4)
            if form == 0:
                edits = self.edits()
                stack.enter_context(self.model.edited(*[one.made() for one in edits]))
                now = now.and_then(*edits)
            elif form == 1:
                written, strengths = self.adapters()
                names = written if isinstance(written, list) else [written]
                stack.enter_context(self.model.adapter(*names))
                now = replace(now, named=strengths)
            elif form == 2:
                stack.enter_context(self.model.adapter(None))
                now = replace(now, named={})
            else:
                written, now = self.condition(now)
                stack.enter_context(self.model.under(written))
        return now

    # -- what plain PEFT says -------------------------------------------------------------------

    def expected(self, standing: Standing) -> Iterator[torch.Tensor]:
        """Logits of each row under PEFT, with plain hooks."""
        names = tuple(standing.named)
        module: Any = tiny_model("llama", LAYERS, tied=self.tied)
        if names:
            module = self._peft_model(names).get_base_model()
        strengths = {name: factor for name, factor in standing.named.items() if factor != 1}
        layers = [
            (part, name)
            for part in module.modules()
            for name in strengths
            if isinstance(scales := getattr(part, "scaling", None), dict) and name in scales
        ]
        before = [layer.scaling[name] for layer, name in layers]
        for layer, name in layers:
            layer.scaling[name] *= strengths[name]
        try:
            for row in rows():
                response = torch.tensor(row.response)
                points = {}
                for edit in standing.edits:
                    for layer in edit.layers:
                        points.setdefault((layer, edit.site), []).append(edit)
                changes = {
                    point: lambda x, edits=edits, r=response: applied(edits, x, r) - x
                    for point, edits in points.items()
                }
                with torch.no_grad():
                    yield run_plain(module, "llama", list(row.input_ids), changes).logits
        finally:
            for (layer, name), scale in zip(layers, before, strict=True):
                layer.scaling[name] = scale

    def _peft_model(self, names: tuple[str, ...]) -> PeftModel:
        # PEFT cannot load another adapter after one of single tokens
        first, *others = sorted(names, key="some_tokens".__eq__)
        base = tiny_model("llama", LAYERS, tied=self.tied)
        made = PeftModel.from_pretrained(base, str(self.folders[first]), adapter_name=first)
        for name in others:
            made.load_adapter(str(self.folders[name]), adapter_name=name)
        tuner: Any = made.base_model
        tuner.set_adapter(list(names))
        return made.eval()


def applied(edits, x, response):
    for edit in edits:
        x = edit.applied(x, response)
    return x


def gap(found, expected):
    """Largest difference, as a share of the largest logit where that is above 1."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("seed", "engine"),
    [
        *((seed, "nnsight") for seed in range(10)),
        *((seed, "transformer_lens") for seed in (90, 91)),
    ],
)
def test_a_sweep_is_each_condition_alone_is_peft_with_hooks(seed, engine, tied, folders):
    draw = Draw(seed, folders, tied, engine)
    model, batch = draw.model, batch_of_rows()
    real = batch.attention_mask.bool()
    for _ in range(2):
        with ExitStack() as stack:
            now = draw.nest(stack)
            drawn = [draw.condition(now) for _ in range(4)]
            drawn += [(None, replace(now, named={})), ([], now)]
            draw.random.shuffle(drawn)
            written = {str(i): one for i, (one, _) in enumerate(drawn)}
            swept = {
                name: head.unembed(hidden) for name, hidden, head in sweep(model, batch, written)
            }
            for (name, condition), (_, standing) in zip(written.items(), drawn, strict=True):
                with model.under(condition), torch.no_grad():
                    alone = model.unembed(model.hidden(batch))
                shown = f"{condition} where {now.named} acts"
                assert gap(swept[name][real], alone[real]) < 1e-5, shown
                expected = torch.cat(list(draw.expected(standing)))
                order = sorted(range(len(batch)), key=lambda row: batch.index[row])
                found = torch.cat([alone[row][real[row]] for row in order])
                assert gap(found, expected) < 1e-5, shown
                if not standing.named:
                    edits = [edit.made() for edit in standing.edits]
                    with torch.no_grad():
                        bare = draw.bare.unembed(draw.bare.hidden(batch, edits))
                    assert torch.equal(swept[name], bare), shown
                    assert torch.equal(alone, bare), shown
    assert model.acting == ()
    with torch.no_grad():
        left = model.unembed(model.hidden(batch))
        assert torch.equal(left, draw.bare.unembed(draw.bare.hidden(batch)))
