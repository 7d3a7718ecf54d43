"""How an nnsight trace makes a visit, here or on a server.

What runs inside of a remote trace travels as source, to where emlens and its typing libraries
are not installed. So these are plain functions that need nothing but torch, and no annotation
stands inside of a body.
"""

from __future__ import annotations

from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from emlens.hooked.architecture import as_returned, finish_logits, hidden_of, with_hidden
from emlens.hooked.generation import draw
from emlens.hooked.hook_plan import at_attention, at_point


def walk(model: Any, parts: Any, visit: Any, resume: Any = None, last: int | None = None) -> None:
    """Inside a trace: skip what is resumed, then make the visit, in execution order.

    Args:
        model: nnsight's envoy of the model.
        parts: Where its parts are: an `Architecture`, or a namespace like it.
        visit: A `Visit`, or its plain copy.
        resume: `(layer, residual)` to resume from.
        last: The deepest block to visit; all by default.
    """
    blocks = envoy(model, parts.blocks)
    done = -1
    if resume is not None:
        done, residual = resume
        value = blocks[0].input if parts.skips else blocks[done].output
        found = hidden_of(value)
        residual = residual.to(found.device, found.dtype)
        if (done, "resid_post") in visit.points:
            residual = at_point(visit, done, "resid_post", residual)
        if not parts.skips:
            blocks[done].output = with_hidden(value, residual)
        for layer in range(done + 1 if parts.skips else 0):
            blocks[layer].skip(as_returned(residual, parts.returns))
    for layer, points in groupby(visit.points, key=lambda point: point[0]):
        if layer > done and (last is None or layer <= last):
            _walk_block(blocks[layer], parts, visit, layer, {site for _, site in points})


def walk_steps(
    tracer: Any, model: Any, parts: Any, visit: Any, steps: Any, dice: Any = None
) -> None:
    """Inside a trace of generation: make the visit at every step of decoding.

    Args:
        tracer: The tracer of the trace.
        model: nnsight's envoy of the model.
        parts: Where its parts are.
        visit: A `Visit`, or its plain copy.
        steps: `(width of the prompts, most steps, whether a step runs the newest token only)`.
        dice: Draw the tokens at the LM head: `uniforms` `[batch, steps]`, `temperature` and
            `top_p`. None leaves them to the model.
    """
    if not visit.points and dice is None and visit.logits is None:
        return
    width, n, cached = steps
    for step in tracer.iter[:n]:
        visit.start = width + step - 1 if step and cached else 0
        walk(model, parts, visit)
        if visit.logits is not None:
            last = envoy(model, parts.head).output[:, -1]
            visit.logits.append(last.sum(-1, dtype=torch.float32))
        if dice is not None:
            _roll(envoy(model, parts.head), parts, dice, step)


def envoy(root: Any, path: str) -> Any:
    """The envoy at a dotted path below another."""
    return reduce(getattr, path.split("."), root)


def on_cpu(value: Any) -> Any:
    """A copy on the CPU of what a trace found, holding no storage but its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([on_cpu(item) for item in value])
    return value


def _walk_block(block: Any, parts: Any, visit: Any, layer: int, sites: set) -> None:
    """Visit one block's sites in the order in which the block computes them."""
    before = None
    if sites & {"resid_pre", "resid_mid"}:
        entering = block.input
        before = at_point(visit, layer, "resid_pre", entering)
        if before is not entering:
            block.input = before
    if sites & {"attn_out", "resid_mid"}:
        module = envoy(block, parts.attn_out)
        value = module.output
        contribution = hidden_of(value)
        after = at_attention(visit, layer, before, contribution)
        if after is not contribution:
            module.output = with_hidden(value, after)
    if "mlp_out" in sites:
        _walk_output(visit, layer, "mlp_out", envoy(block, parts.mlp_out))
    if "resid_post" in sites:
        _walk_output(visit, layer, "resid_post", block)


def _walk_output(visit: Any, layer: int, site: Any, module: Any) -> None:
    value = module.output
    before = hidden_of(value)
    after = at_point(visit, layer, site, before)
    if after is not before:
        module.output = with_hidden(value, after)


def _roll(head: Any, parts: Any, dice: Any, step: int) -> None:
    """Draw the next tokens at the LM head, and leave only them possible."""
    logits = head.output
    scores = finish_logits(logits[:, -1], parts.logit_scale, parts.soft_cap)
    chosen = draw(scores, dice.uniforms[:, step], dice.temperature, dice.top_p)
    forced = torch.full_like(logits, -torch.inf)
    forced[:, -1] = forced[:, -1].scatter(1, chosen, 0.0)
    head.output = forced
