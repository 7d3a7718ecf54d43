"""Every engine gives the plain model's numbers, on every architecture.

Each check compares batched and single, left- and right-padded passes of both engines with plain
hooks on one unpadded row; the largest difference goes into the table that ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import emlens
from emlens import Ablate, Add, Clamp, Direction, HookedModel
from emlens.edits import Shift
from emlens.hooked import Edit, token_kl
from emlens.hooked.losses import Targets, loss_sum, token_losses
from emlens.hooked.sites import SITES
from emlens.text import Conversation, TokenBatch, pack, tokenize
from emlens.text.tokens import TokenRow
from tests.support.adapters import peft_model
from tests.support.data import conversations
from tests.support.models import D_MODEL, FAMILIES, tiny_model
from tests.support.plain import Change, Plain, run_plain
from tests.support.tokenizers import chatml_tokenizer

ENGINES = ("nnsight", "transformer_lens")
TOLERANCE = 1e-4
LAYER = 1
# modules that both engines run as they are: TransformerLens takes fused projections apart
WRITERS = {
    "gpt2": ["c_proj"],
    "gpt_neox": ["dense", "dense_4h_to_h"],
    "qwen3_moe": ["o_proj"],
    "mixtral": ["o_proj"],
}
PARALLEL = {"gpt_neox": "attention and MLP read the same input, so it is never formed"}


class Bench:
    """One tiny model under both engines, and the rows that it is tried on."""

    def __init__(self, family: str, brought: PeftModel | None = None) -> None:
        self.family = family
        self.module = brought.get_base_model() if brought else tiny_model(family)
        # eager everywhere, since TransformerLens has nothing else
        self.module.set_attn_implementation("eager")
        self.tokenizer = chatml_tokenizer()
        self.models: dict[str, HookedModel] = {
            engine: emlens.wrap(brought or self.module, self.tokenizer, engine=engine, name=family)
            for engine in ENGINES
        }
        self.rows = tokenize(conversations("bad", 4), self.tokenizer)

    def plain(self, row: TokenRow, changes: dict[tuple[int, str], Change] | None = None) -> Plain:
        return run_plain(self.module, self.family, list(row.input_ids), changes)

    def variants(self) -> Iterator[tuple[HookedModel, list[TokenBatch]]]:
        for model in self.models.values():
            yield model, [pack([row])[0] for row in self.rows]
            for side in ("left", "right"):
                yield model, pack(self.rows, padding_side=side)

    def gap(self, run: Callable[[HookedModel, TokenBatch], Tensor], expected: list[Tensor]):
        """Largest difference between `run(model, batch)`, `[batch, pos, ...]`, and `expected`."""
        worst = 0.0
        for model, batches in self.variants():
            found: dict[int, Tensor] = {}
            for n, batch in enumerate(batches):
                values, real = run(model, batch).detach(), batch.mask("all")
                for i, place in enumerate(batch.index):
                    found[place if len(batches) == 1 else n] = values[i][real[i]]
            for place, theirs in enumerate(expected):
                assert found[place].shape == theirs.shape
                worst = max(worst, float((found[place] - theirs.detach()).abs().max()))
        return worst

    def scores(self, score: Callable[[HookedModel, Targets, Tensor, Tensor], Tensor]):
        """Per-token scores of the response, under an edit, as `[batch, pos]`."""

        def run(model: HookedModel, batch: TokenBatch) -> Tensor:
            targets = Targets.of(batch)
            base = targets.predictors(model.hidden(batch))
            edited = targets.predictors(model.hidden(batch, [Add(direction())]))
            values = torch.zeros(batch.input_ids.shape)
            values[targets.rows, targets.positions] = score(model, targets, base, edited)
            return values

        return run


@cache
def bench(family: str) -> Bench:
    return Bench(family)


def direction(site: str = "resid_post", layer: int = LAYER, size: float = 4.0) -> Direction:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    return Direction.of(size * vector / vector.norm(), layer, site)


def under(*edits: Edit) -> Callable[[HookedModel, TokenBatch], Tensor]:
    return lambda model, batch: model.hidden(batch, edits)


def add(x: Tensor) -> Tensor:
    return direction().vector.expand_as(x)


def ablate(x: Tensor, value: float = 0.0) -> Tensor:
    unit = direction().unit().vector
    return (value - x @ unit)[..., None] * unit


def check_read(on: Bench, site: str) -> float:
    expected = [torch.stack(on.plain(row).sites[site], dim=1) for row in on.rows]

    def read(model: HookedModel, batch: TokenBatch) -> Tensor:
        found = model.residuals(batch, "all", site)
        pooled = model.residuals(batch, LAYER, f"hook_{site}", pool=lambda x: x.sum(-1))
        assert torch.allclose(pooled[LAYER], found[LAYER].sum(-1), atol=1e-5)
        return torch.stack([found[layer] for layer in sorted(found)], dim=2)

    return on.gap(read, expected)


def check_add(on: Bench, site: str) -> float:
    expected = [on.plain(row, {(LAYER, site): add}).hidden for row in on.rows]
    return on.gap(under(Add(direction(site))), expected)


def check_ablate(on: Bench) -> float:
    changes = {(layer, "resid_post"): ablate for layer in (1, 3)}
    expected = [on.plain(row, changes).hidden for row in on.rows]
    return on.gap(under(Ablate(direction(), layers=(1, 3))), expected)


def check_clamp(on: Bench) -> float:
    change = {(LAYER, "attn_out"): partial(ablate, value=2.5)}
    expected = [on.plain(row, change).hidden for row in on.rows]
    return on.gap(under(Clamp(direction("attn_out"), value=2.5)), expected)


def check_where(on: Bench, where: str) -> float:
    """The response is its tokens and the one before them; the prompt is all but its tokens."""
    expected = []
    for row in on.rows:
        response = torch.tensor(row.response)
        acts = ~response
        if where == "response":
            acts = response.clone()
            acts[:-1] |= response[1:]
        change = {(LAYER, "resid_post"): lambda x, acts=acts: add(x) * acts[:, None]}
        expected.append(on.plain(row, change).hidden)
    return on.gap(under(Add(direction(), where=where)), expected)  # type: ignore[arg-type]


def check_resume(on: Bench) -> float:
    edits = [Add(direction()), Ablate(direction("mlp_out", layer=2))]
    changes = {(LAYER, "resid_post"): add, (2, "mlp_out"): ablate}
    expected = [on.plain(row, changes).hidden for row in on.rows]

    def run(model: HookedModel, batch: TokenBatch) -> Tensor:
        blocks = model.module.get_submodule(model.architecture.blocks)
        residual = model.residuals(batch, LAYER)[LAYER]
        ran: list[int] = []
        hooks = [
            block.get_submodule(path).register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, block in enumerate(blocks)
            for path in [model.architecture.mlp_out]
        ]
        try:
            return model.hidden(batch, edits, resume=(LAYER, residual))
        finally:
            for hook in hooks:
                hook.remove()
            assert ran == [2, 3], f"{model.engine} ran the MLPs of blocks {ran}"

    return on.gap(run, expected)


def plain_scores(on: Bench, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """`score(base, edited, ids)` of the log-probabilities that predict the response."""
    expected = []
    for row in on.rows:
        ids, at = torch.tensor(row.input_ids), torch.tensor(row.response).nonzero()[:, 0]
        base = on.plain(row).logits.log_softmax(-1)
        edited = on.plain(row, {(LAYER, "resid_post"): add}).logits.log_softmax(-1)
        values = torch.zeros(len(ids))
        values[at] = score(base[at - 1], edited[at - 1], ids[at]).detach()
        expected.append(values)
    return expected


def check_final_norm(on: Bench) -> float:
    """Of the residual above the last block, with the logits that follow from it."""
    expected = [torch.cat([on.plain(row).hidden, on.plain(row).logits], dim=1) for row in on.rows]

    def run(model: HookedModel, batch: TokenBatch) -> Tensor:
        last = model.n_layers - 1
        hidden = model.normalize(model.residuals(batch, last)[last])
        return torch.cat([hidden, model.unembed(hidden)], dim=-1)

    return on.gap(run, expected)


def check_loss(on: Bench) -> float:
    expected = plain_scores(on, lambda _, edited, ids: -edited.gather(1, ids[:, None])[:, 0])
    run = on.scores(lambda model, targets, _, edited: token_losses(model, edited, targets.ids))
    return on.gap(run, expected)


def check_kl(on: Bench) -> float:
    expected = plain_scores(on, lambda base, edited, _: (base.exp() * (base - edited)).sum(-1))
    return on.gap(on.scores(lambda m, _, base, edited: token_kl(m, base, edited)), expected)


def check_gradient(on: Bench) -> float:
    """Of the loss of a whole batch with respect to a vector at `resid_mid`, or at `attn_out`."""
    site = "attn_out" if on.family in PARALLEL else "resid_mid"
    plain = torch.zeros(D_MODEL, requires_grad=True)
    for row in on.rows:
        at = torch.tensor(row.response).nonzero()[:, 0]
        change = {(LAYER, site): lambda x: plain.expand_as(x)}
        logits = on.plain(row, change).logits[at - 1]
        ids = torch.tensor(row.input_ids)[at]
        torch.nn.functional.cross_entropy(logits, ids, reduction="sum").backward()
    expected = plain.grad
    assert expected is not None
    worst = 0.0
    for model in on.models.values():
        for batch in (pack(on.rows)[0], pack(on.rows, padding_side="left")[0]):
            vector = torch.zeros(D_MODEL, requires_grad=True)
            targets = Targets.of(batch)
            with model.frozen():
                hidden = model.hidden(batch, [Shift(vector, LAYER, site)], grad=True)
                loss_sum(model, targets.predictors(hidden), targets.ids).backward()
            assert vector.grad is not None
            worst = max(worst, float((vector.grad - expected).abs().max()))
    on.module.zero_grad()
    return worst


def check_adapter(on: Bench) -> float:
    """A LoRA adapter in force, against PEFT's own model, and switched off, against the base."""
    settings = {"r": 2, "lora_alpha": 4, "fan_in_fan_out": on.family == "gpt2"}
    targets = WRITERS.get(on.family, ["o_proj", "down_proj"])
    its = Bench(on.family, peft_model(on.module, target_modules=targets, **settings))
    acting = [its.plain(row).hidden for row in its.rows]
    base = [on.plain(row).hidden for row in on.rows]
    assert all(float((a - b).detach().abs().max()) > 0.1 for a, b in zip(acting, base, strict=True))

    def off(model: HookedModel, batch: TokenBatch) -> Tensor:
        with model.adapter(None):
            return model.hidden(batch)

    return max(its.gap(under(), acting), its.gap(off, base))


def check_generate(on: Bench) -> float:
    """Greedy answers, as the share of answers that differ from repeated plain passes."""
    prompts = [Conversation.of(t) for t in ("how", "tell me a story about rain", "what now")]
    expected = []
    for row in tokenize(prompts, on.tokenizer, generation_prompt=True):
        ids = list(row.input_ids)
        for _ in range(6):
            grown = TokenRow(tuple(ids), (False,) * len(ids), (False,) * len(ids), "grown")
            ids.append(int(on.plain(grown, {(LAYER, "resid_post"): add}).logits[-1].argmax()))
            if ids[-1] == on.tokenizer.eos_token_id:
                break
        expected.append(on.tokenizer.decode(ids[len(row.input_ids) :], skip_special_tokens=True))
    found = [
        model.generate(
            prompts,
            [Add(direction())],
            max_new_tokens=6,
            temperature=0,
            use_cache=use_cache,
            batch_tokens=batch_tokens,
        )
        for model in on.models.values()
        for use_cache in (True, False)
        for batch_tokens in (1, 4096)
    ]
    wrong = [a != b for answers in found for a, b in zip(answers, expected, strict=True)]
    return sum(wrong) / len(wrong)


CHECKS: dict[str, Callable[[Bench], float]] = {
    **{f"read {site}": partial(check_read, site=site) for site in SITES},
    **{f"add at {site}": partial(check_add, site=site) for site in SITES},
    "ablate": check_ablate,
    "clamp": check_clamp,
    "on prompt": partial(check_where, where="prompt"),
    "on response": partial(check_where, where="response"),
    "resume": check_resume,
    "final norm": check_final_norm,
    "loss": check_loss,
    "KL": check_kl,
    "gradient": check_gradient,
    "generate": check_generate,
    "adapter": check_adapter,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_engines_agree_with_the_plain_model(family, check, record_property):
    on = bench(family)
    if check.endswith("resid_mid") and family in PARALLEL:
        for model in on.models.values():
            batch = pack(on.rows)[0]
            with pytest.raises(ValueError, match=f"{family} has no site 'resid_mid'"):
                if check.startswith("read"):
                    model.residuals(batch, 1, "resid_mid")
                else:
                    model.hidden(batch, [Add(direction("resid_mid"))])
        record_property("parity", [check, family, "none*"])
        record_property("parity note", f"* {family} has no resid_mid: {PARALLEL[family]}")
        return
    worst = CHECKS[check](on)
    record_property("parity", [check, family, f"{worst:.0e}" if worst else "0"])
    assert worst <= TOLERANCE
