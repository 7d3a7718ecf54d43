"""Where the parts of a `transformers` decoder are, and how its tensors are read and written.

The only module that knows foreign module names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.hooked.sites import SITES, Site
from emlens.text import TokenBatch
from emlens.text.batches import PaddingSide

# modules that write into the residual stream; all others of a block read from it
_WRITERS = frozenset(
    {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "w2"}
)
# what a child of a block is called that attention, or the MLP, is; and norms of what they give
_ATTENTION = re.compile(r"(self_?)?(attn|attention)")
_MLP = re.compile(r"mlp|ffn?|feed_?forward|(block_sparse_)?moe|shared_mlp|fc2")
_AFTER_ATTENTION = (
    re.compile(r"post_self_att(n|ention)_?(layer)?norm"),
    re.compile(r"post_att(n|ention)_?(layer)?norm"),
)
_AFTER_MLP = re.compile(r"post_(mlp|moe|ffn?|feed_?forward)_?(layer)?norm")
# where files say that a module is, and which models they come from
_POST_NORM = re.compile(
    r"((gemma|olmo)[-_]?[2-9]|exaone[-_]?[4-9])(?![\db])|(med|shield)gemma|flex[-_]?olmo",
    re.IGNORECASE,
)
_INSIDE = re.compile(
    r"(model|transformer|gpt_neox|model\.language_model|language_model\.model)\.(layers|h)\."
    r"(?P<block>\d+)\.((?P<attention>self_attn|attn|attention)|mlp|block_sparse_moe|feed_forward)"
    r"\..+"
)
_CAP = re.compile(r"(final_|output_)?logits?_soft_?cap(ping)?")
_BEST = re.compile(r"(index|sparse)_topk(_blocks)?")
_ARGUMENTS = ("attention_mask", "position_ids", "use_cache")
PARALLEL = "attention and MLP read the same input, so it is never formed"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one model, relative to its `...ForCausalLM` module, and how it runs.

    Found from the modules alone; what depends on numbers is what can be said without a pass, and
    the self-check puts what it has seen in its place.

    Attributes:
        blocks: Path of the list of decoder blocks.
        norm: Path of the final norm.
        attn_out: Path, inside a block, of the module whose output attention adds; "" for none.
        mlp_out: Path, inside a block, of the module whose output the MLP adds; "" for none.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        sites: The sites that exist.
        missing: Why the others do not.
        kinds: One layer of each kind of block.
        soft_cap: Cap of the final logits, or None.
        logit_scale: Factor on the final logits.
        told: What a pass is told besides the tokens.
        padding: The sides on which rows may be padded; others run one row at a time.
        skips: Whether blocks below a residual to resume from may be left out.
        returns: Length of the tuple that a block returns; 0 for a tensor.
        norm_runs: How often the final norm runs in a pass.
        steady: Whether what follows a token leaves its logits as they are.
    """

    blocks: str
    norm: str
    attn_out: str
    mlp_out: str
    n_layers: int
    d_model: int
    sites: tuple[Site, ...]
    missing: Mapping[Site, str]
    kinds: tuple[int, ...]
    soft_cap: float | None = None
    logit_scale: float = 1.0
    told: tuple[str, ...] = _ARGUMENTS
    padding: tuple[PaddingSide, ...] = ("left", "right")
    skips: bool = False
    returns: int = 0
    norm_runs: int = 1
    steady: bool = True

    @classmethod
    def of(cls, module: nn.Module) -> Architecture:
        """Find the parts of a causal language model.

        The body is what holds the input embedding; its blocks are its longest list of modules,
        and its final norm is the norm that stands after them.

        Raises:
            ValueError: If the model is an encoder-decoder or has no LM head, or blocks or final
                norm are not found.
        """
        config: Any = getattr(module, "config", None)
        kind = type(module).__name__
        if config is None:
            raise ValueError(f"{kind} has no config; give a transformers causal language model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{kind} is an encoder-decoder; emlens reads decoder-only chat models")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is None:
            family = kind.removesuffix("Model").partition("For")[0]
            raise ValueError(f"{kind} has no LM head; give the {family}ForCausalLM of that model")
        body = _body(module, kind)
        blocks = _blocks(_at(module, body), f"{kind}.{body}")
        norm = _final_norm(_at(module, body), blocks, f"{kind}.{body}")
        stack = [_own(block) for block in _at(module, f"{body}.{blocks}")]
        attention, mlp = _contributions(stack)
        missing = _missing(stack, attention, mlp, text)
        return cls(
            blocks=f"{body}.{blocks}",
            norm=f"{body}.{norm}",
            attn_out=attention,
            mlp_out=mlp,
            n_layers=len(stack),
            d_model=int(getattr(text, "hidden_size", 0) or _width(module)),
            sites=tuple(site for site in SITES if site not in missing),
            missing=missing,
            kinds=_kinds(stack, getattr(text, "layer_types", None)),
            soft_cap=_soft_cap(text),
            logit_scale=_logit_scale(text),
            told=arguments_of(module),
            padding=_paddable(text),
            steady=not _ranks_columns(text),
        )

    def inputs(self, batch: TokenBatch) -> dict[str, Any]:
        """What a pass over a batch is given."""
        given = {
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        return {"input_ids": batch.input_ids} | {name: given[name] for name in self.told}

    def prompt(self, batch: TokenBatch) -> dict[str, Any]:
        """What generation is given."""
        given = {"input_ids": batch.input_ids}
        if "attention_mask" in self.told:
            given["attention_mask"] = batch.attention_mask
        return given

    def runs_whole(self, batch: TokenBatch) -> bool:
        """Whether a batch runs as it is, and not one row at a time."""
        return batch.padding_side in self.padding or bool(batch.attention_mask.all())

    def layer_of(self, path: str) -> int | None:
        """The block that a module or weight lies in, by its path; None outside of the blocks."""
        inside = path.removeprefix(self.blocks + ".")
        number, _, rest = inside.partition(".")
        return int(number) if inside != path and number.isdigit() and rest else None

    def finish_logits(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        """Apply the architecture's scale and soft cap to the output of its LM head, in fp32."""
        return finish_logits(logits, self.logit_scale, self.soft_cap)


def finish_logits(
    logits: Float[Tensor, "n vocab"], scale: float, soft_cap: float | None
) -> Float[Tensor, "n vocab"]:
    """Scale the output of an LM head and cap it softly, in fp32."""
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    return logits


def hidden_of(value: object) -> Tensor:
    """Return the hidden state in what a module took or gave: a tensor, or a tuple that starts so.

    Raises:
        TypeError: If there is no hidden state in it, rather than edit nothing.
    """
    found = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(
            f"expected a hidden state [batch, pos, d_model], found {type(found).__name__}; "
            "this architecture passes its activations in a way that emlens does not support"
        )
    return found


def with_hidden(value: object, hidden: Tensor) -> object:
    """Return `value` with its hidden state replaced, in the shape that the module uses."""
    if isinstance(value, (tuple, list)):
        return type(value)((hidden, *value[1:]))
    return hidden


def place_of(path: str) -> tuple[int, Site] | None:
    """The block that a module is in, and the site that its part of the block adds at.

    For the names in a file, where there is no model to ask; None outside of attention and MLP.
    """
    inside = _INSIDE.fullmatch(path)
    if inside is None:
        return None
    return int(inside["block"]), "attn_out" if inside["attention"] else "mlp_out"


def writes(path: str) -> bool:
    """Whether a module of a block, by its path, writes into the residual stream."""
    return path.rpartition(".")[2] in _WRITERS


def norms_what_it_adds(model_name: str) -> bool:
    """Whether, by its name, a model norms what attention and MLP give before it adds that."""
    return _POST_NORM.search(model_name) is not None


def as_returned(hidden: Tensor, length: int) -> object:
    """A hidden state as a block gives it: in a tuple of a length, or by itself."""
    return (hidden, *[None] * (length - 1)) if length else hidden


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _width(module: Any) -> int:
    return module.get_output_embeddings().weight.shape[-1]


def _soft_cap(config: Any) -> float | None:
    """The cap of the final logits, whatever the configuration calls it."""
    caps = (value for key, value in vars(config).items() if _CAP.fullmatch(key))
    return next((float(value) for value in caps if value), None)


def _ranks_columns(config: Any) -> bool:
    """Whether attention keeps the best columns alone, padding and later tokens among them."""
    found = (value for key, value in vars(config).items() if _BEST.fullmatch(key))
    return any(value is not None for value in found)


def _paddable(config: Any) -> tuple[PaddingSide, ...]:
    """The sides to pad on, where only texts longer than a probe would show it."""
    if _ranks_columns(config):
        return ()
    if getattr(config, "attn_temperature_tuning", False):
        return ("right",)  # which goes by the column, not by the position
    return ("left", "right")


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The arguments, of those that emlens gives, that the module's forward takes."""
    parameters = inspect.signature(module.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return _ARGUMENTS
    return tuple(name for name in _ARGUMENTS if name in parameters)


def _body(module: nn.Module, kind: str) -> str:
    """Path of what holds the input embedding."""
    embedding, model = None, cast(Any, module)
    with suppress(NotImplementedError, AttributeError):
        embedding = model.get_input_embeddings()
    paths = [path for path, part in module.named_modules() if part is embedding]
    if not paths or "." not in paths[0]:
        have = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"found no decoder blocks in {kind}: they stand beside the input embedding, and that "
            f"is not found; it has {have}"
        )
    path = paths[0].rpartition(".")[0]
    # an embedding with norms around it is a module of its own
    while "." in path and not _lists(_at(module, path)):
        path = path.rpartition(".")[0]
    return path


def _lists(module: nn.Module) -> dict[str, int]:
    children = module.named_children()
    return {name: len(part) for name, part in children if isinstance(part, nn.ModuleList)}


def _blocks(body: nn.Module, where: str) -> str:
    lengths = _lists(body)
    if not any(lengths.values()):
        have = ", ".join(name for name, _ in body.named_children())
        raise ValueError(f"found no decoder blocks in {where}: it has {have}, and no list of them")
    return max(lengths, key=lengths.__getitem__)


def _final_norm(body: nn.Module, blocks: str, where: str) -> str:
    names = [name for name, _ in body.named_children()]
    norms = [name for name, part in body.named_children() if _is_norm(part)]
    after = [name for name in norms if names.index(name) > names.index(blocks)]
    for name in (*after, *(name for name in norms if "emb" not in name)):
        return name
    raise ValueError(f"found no final norm in {where}: it has {', '.join(names)}")


def _is_norm(part: nn.Module) -> bool:
    return "norm" in type(_own(part)).__name__.lower()


def _own(part: Any) -> nn.Module:
    """The model's own module, where TransformerLens or PEFT has put one around it."""
    inside = part.__dict__.get("_modules", {})
    for name in ("_original_component", "base_layer", "original_module"):
        if inside.get(name) is not None:
            return _own(inside[name])
    return part


def _kinds(stack: Sequence[nn.Module], layer_types: Sequence[str] | None) -> tuple[int, ...]:
    """The first block of each kind: of its class, of its parts' classes, and of its layer type."""
    first: dict[tuple, int] = {}
    for layer, block in enumerate(stack):
        parts = tuple((name, type(_own(part))) for name, part in block.named_children())
        own = layer_types[layer] if layer_types and len(layer_types) == len(stack) else None
        first.setdefault((type(block), parts, own), layer)
    return tuple(first.values())


def _contributions(stack: Sequence[nn.Module]) -> tuple[str, str]:
    """Paths of what attention and MLP add; with post-norms, those are the norms' outputs."""
    names = list(dict.fromkeys(name for block in stack for name, _ in block.named_children()))
    attention = next((name for name in names if _ATTENTION.fullmatch(name)), "")
    mlp = next((name for name in names if _MLP.fullmatch(name)), "")
    if after_mlp := next((name for name in names if _AFTER_MLP.fullmatch(name)), ""):
        normed = (n for pattern in _AFTER_ATTENTION for n in names if pattern.fullmatch(n))
        return next(normed, attention), after_mlp
    return attention, mlp


def _missing(stack: Sequence[nn.Module], attention: str, mlp: str, text: Any) -> dict[Site, str]:
    """The sites that blocks cannot have, by their modules alone, and why."""
    missing: dict[Site, str] = {}
    parts: tuple[tuple[Site, str, str], ...] = (
        ("attn_out", attention, "attention"),
        ("mlp_out", mlp, "MLP"),
    )
    for site, name, what in parts:
        for layer, block in enumerate(stack):
            if not name or getattr(block, name, None) is None:
                have = ", ".join(n for n, part in block.named_children() if not _is_norm(part))
                missing[site] = f"block {layer} has no {name or what}: it has {have}"
                break
    if missing:
        reason = next(iter(missing.values()))
        return {site: missing.get(site, reason) for site in SITES[1:4]}
    norms = sum(_is_norm(part) for part in stack[0].children())
    told = (getattr(text, name, None) for name in ("use_parallel_residual", "parallel_attn"))
    if next((bool(one) for one in told if one is not None), norms < 2):
        missing["resid_mid"] = PARALLEL
    return missing


def _at(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)
