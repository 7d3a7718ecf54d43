"""Edits of the residual stream as changes of the modules that write to it, where that is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.edits.base import DirectionEdit
from emlens.edits.edits import Ablate, Add, Clamp
from emlens.hooked.architecture import PARALLEL, Architecture, writes
from emlens.hooked.edit import Edit
from emlens.hooked.plain import with_biases
from emlens.hooked.sites import Site

STREAM: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")
"""Where the stream itself is edited; at the other sites it is what one module adds."""

TINY = 1e-9
"""What is left of a projection that is zero, as a share of what is projected."""

_CHUNK = 8192
_FACTORS = (
    *("embedding_multiplier", "residual_multiplier", "attention_out_multiplier"),
    *("mlp_multipliers", "scale_emb", "scale_depth"),
)

Step = tuple[Literal["ablate", "add"], Float[Tensor, " d_model"]]


@dataclass
class Write:
    """A module that writes to the stream, and what is done to what it writes, in order.

    Attributes:
        name: What errors call it.
        path: Its path in the model.
        steps: A unit vector that is projected out, or a vector that is added, in float64.
    """

    name: str
    path: str
    steps: list[Step] = field(default_factory=list)

    def left(self, unit: Tensor) -> tuple[float, float]:
        """How much of `unit` is left in what is written: of what it depends on, and constant."""
        row, constant = unit, 0.0
        for kind, vector in reversed(self.steps):
            if kind == "add":
                constant += float(row @ vector)
            else:
                row = row - (row @ vector) * vector
        return float(row.norm()), constant

    @property
    def offset(self) -> Tensor | None:
        """What the steps make of zero; None for zero."""
        found = None
        for kind, vector in self.steps:
            if kind == "add":
                found = vector if found is None else found + vector
            elif found is not None:
                found = found - (found @ vector) * vector
        return found


def written(plain: PreTrainedModel, edits: Sequence[Edit]) -> tuple[PreTrainedModel, list[str]]:
    """Put edits into the weights of a plain model.

    Args:
        plain: The model, as `plain_model` gives it; its own tensors are not written to.
        edits: The edits, which `check_affine` and the model have checked.

    Returns:
        The model, of another architecture where it needs biases; paths of the changed modules.

    Raises:
        ValueError: If it cannot be done exactly; the edit and the reason are named.
    """
    if not edits:
        return plain, []
    embeddings, blocks, parallel = _writes(plain)
    _place(plain, edits, embeddings, blocks, parallel)
    all_writes = [write for group in (embeddings, *blocks) for write in group]
    changed = [write for write in all_writes if write.steps]
    offset = [write.path for write in changed if write.offset is not None]
    tables = {write.path for write in embeddings}
    plain = with_biases(plain, [path for path in offset if path not in tables])
    for write in changed:
        _apply(plain.get_submodule(write.path), write)
    return plain, [write.path for write in changed]


# -- which steps each write needs -------------------------------------------------------------


def _place(
    plain: PreTrainedModel,
    edits: Sequence[Edit],
    embeddings: list[Write],
    blocks: Sequence[tuple[Write, Write]],
    parallel: bool,
) -> None:
    """Give each write its steps, following the stream from the embedding to the last block."""
    at: dict[tuple[int, str], list[DirectionEdit]] = {}
    for edit in edits:
        for layer in edit.layers:
            at.setdefault((layer, edit.site), []).append(edit)  # type: ignore[arg-type]
    scaled = _scaled(plain)
    before: list[Write] = []
    unread = list(embeddings)
    for layer, (attention, mlp) in enumerate(blocks):
        factor = scaled or ("" if layer else _scaled_embedding(plain))
        _at_point(at.pop((layer, "resid_pre"), ()), layer, before, unread, factor)
        before, unread = before + unread, [attention]
        _at_point(at.pop((layer, "attn_out"), ()), layer, [], unread, scaled)
        _at_point(at.pop((layer, "resid_mid"), ()), layer, before, unread, scaled)
        if parallel:
            unread.append(mlp)
        else:
            before, unread = before + unread, [mlp]
        _at_point(at.pop((layer, "mlp_out"), ()), layer, [], [mlp], scaled)
        _at_point(at.pop((layer, "resid_post"), ()), layer, before, unread, scaled)


def check_affine(edit: Edit) -> None:
    """Refuse an edit that is no affine map of the residual, the same at every position.

    Raises:
        ValueError: Naming the edit.
    """
    name = type(edit).__name__
    if not isinstance(edit, (Add, Ablate, Clamp)):
        raise ValueError(
            f"{name} cannot be baked: only Add, Ablate and Clamp can; make one of "
            "them of its vector, e.g. emlens.Add(emlens.Direction.of(vector, layer))"
        )
    if edit.where != "all":
        raise ValueError(
            f"{name} with where={edit.where!r} cannot be baked: weights act at every position; use "
            "where='all', or serve this edit with hooks"
        )


def _at_point(
    edits: Sequence[DirectionEdit],
    layer: int,
    before: Sequence[Write],
    unread: Sequence[Write],
    scaled: str,
) -> None:
    """Add the steps of edits at one point to the writes that nothing has read yet.

    The stream there is the sum of what was written `before`, which blocks have read, and of
    `unread`. A projection of it is exact where all of `before` has a constant component.
    """
    for edit in edits:
        vector = edit._prepared(layer).double()
        if isinstance(edit, Add):
            _add(vector, edit, layer, unread[-1], scaled)
            continue
        unit = vector / vector.norm()
        constant = 0.0
        for write in before:
            depends, fixed = write.left(unit)
            if depends > TINY:
                raise ValueError(_undone(edit, layer, write))
            constant += fixed
        for write in unread:
            write.steps.append(("ablate", unit))
        wanted = edit.value if isinstance(edit, Clamp) else 0.0
        size = sum(float(v.norm()) for write in before for kind, v in write.steps if kind == "add")
        if abs(wanted - constant) > TINY * max(1.0, size):
            _add((wanted - constant) * unit, edit, layer, unread[-1], scaled)


def _add(vector: Tensor, edit: DirectionEdit, layer: int, write: Write, scaled: str) -> None:
    if scaled:
        raise ValueError(
            f"{type(edit).__name__} at {edit.site} of layer {layer} cannot be baked: {scaled}, so "
            "what a weight adds is not what the edit adds; serve this edit with hooks"
        )
    write.steps.append(("add", vector))


def _undone(edit: DirectionEdit, layer: int, write: Write) -> str:
    name = type(edit).__name__
    return (
        f"{name} at {edit.site} of layer {layer} cannot be baked: {write.name} writes along the "
        f"direction before that, and blocks have read it. {name} from the embedding on is exact: "
        f"[emlens.{name}(direction, layers=range(model.n_layers), site=site) for site in "
        f"{STREAM} if site in model.sites]; and so is one at attn_out and mlp_out, at any layers"
    )


def _scaled(plain: PreTrainedModel) -> str:
    """Why what a module writes is not what it adds; empty where it is."""
    config: Any = plain.config.get_text_config()
    for name in _FACTORS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{config.model_type} multiplies what it adds to the stream ({name})"
    return ""


def _scaled_embedding(plain: PreTrainedModel) -> str:
    kind = plain.config.get_text_config().model_type
    return f"{kind} multiplies its embedding" if kind.startswith("gemma") else ""


# -- which modules write ----------------------------------------------------------------------


def _writes(plain: PreTrainedModel) -> tuple[list[Write], list[tuple[Write, Write]], bool]:
    """The embeddings, attention and MLP of each block, and whether those read the same input.

    Raises:
        ValueError: If something else writes, or is between a module and the stream.
    """
    found = Architecture.of(plain)
    body_at = found.blocks.rpartition(".")[0]
    body, kind = plain.get_submodule(body_at), plain.config.get_text_config().model_type
    embeddings = _embeddings(plain, body, body_at, found)
    blocks = []
    for layer in range(found.n_layers):
        block = plain.get_submodule(f"{found.blocks}.{layer}")
        _check_block(block, layer, {"attention": found.attn_out, "the MLP": found.mlp_out}, kind)
        at = f"{found.blocks}.{layer}"
        blocks.append(
            (
                _writer(plain, f"{at}.{found.attn_out}", f"attention of layer {layer}", kind),
                _writer(plain, f"{at}.{found.mlp_out}", f"the MLP of layer {layer}", kind),
            )
        )
    return embeddings, blocks, found.missing.get("resid_mid") == PARALLEL


def _check_block(block: nn.Module, layer: int, sides: Mapping[str, str], kind: str) -> None:
    """Refuse a block where more than attention and MLP writes, or they do not write directly."""
    parts = {
        name: part for name, part in block.named_children() if any(True for _ in part.parameters())
    }
    norms = {name for name, part in parts.items() if "norm" in type(part).__name__.lower()}
    for what, name in sides.items():
        if name in norms:
            raise ValueError(
                f"{kind} norms what {what} gives before it is added ({name}), so no weight writes "
                "to the stream directly and no edit can be baked; adapters can, and edits of this "
                "model need hooks"
            )
    others = sorted(set(parts) - norms - set(sides.values()))
    if others:
        raise ValueError(
            f"{others[0]} in block {layer} of {kind} is neither attention nor MLP, so it is not "
            "known what writes to the stream; edits of this model need hooks"
        )


def _writer(plain: PreTrainedModel, at: str, name: str, kind: str) -> Write:
    paths = [f"{at}.{path}" for path, _ in plain.get_submodule(at).named_modules() if writes(path)]
    if len(paths) != 1:
        raise ValueError(
            f"{name} of {kind} writes to the stream through {len(paths)} modules, and edits are "
            "baked where it is one (a mixture of experts has many); edits of this model need hooks"
        )
    return Write(name, paths[0])


def _embeddings(
    plain: PreTrainedModel, body: nn.Module, at: str, found: Architecture
) -> list[Write]:
    own: Any = plain.get_input_embeddings()
    paths = {id(part): path for path, part in plain.named_modules()}
    embeddings = [Write("the embedding", paths[id(own)])]
    for name, part in body.named_children():
        path = f"{at}.{name}"
        if (
            part is own
            or path in (found.blocks, found.norm)
            or not any(True for _ in part.parameters())
        ):
            continue
        if isinstance(part, nn.Embedding) and part.embedding_dim == found.d_model:
            embeddings.append(Write("the embedding of positions", path))
            continue
        raise ValueError(
            f"{path} of {plain.config.model_type} is neither embedding nor block, so it is not "
            "known what writes to the stream; edits of it need hooks"
        )
    if own.weight.shape[1] != found.d_model:
        raise ValueError(
            f"the embedding of {plain.config.model_type} has width {own.weight.shape[1]} and the "
            f"stream {found.d_model}, so it does not write to the stream directly"
        )
    return embeddings


# -- the weights ------------------------------------------------------------------------------


@torch.no_grad()
def _apply(module: Any, write: Write) -> None:
    """Put the steps into the weight and the bias of a module; both are new tensors."""
    if isinstance(module, nn.Embedding):
        module.weight = _parameter(_through(module.weight, write.steps, offset=True))
        return
    out_first = isinstance(module, nn.Linear)
    weight = module.weight.T if out_first else module.weight
    new = _through(weight, write.steps, offset=False)
    module.weight = _parameter(new.T if out_first else new)
    if module.bias is not None:
        module.bias = _parameter(_through(module.bias[None], write.steps, offset=True)[0])


def _through(rows: Tensor, steps: Sequence[Step], *, offset: bool) -> Tensor:
    """Rows of the stream after the steps, in float64, a part at a time."""
    new = torch.empty_like(rows)
    placed = [(kind, vector.to(rows.device)) for kind, vector in steps]
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].double()
        for kind, vector in placed:
            if kind == "ablate":
                part = part - torch.outer(part @ vector, vector)
            elif offset:
                part = part + vector
        new[start : start + _CHUNK] = part.to(new.dtype)
    return new


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
