"""Where the parts of a `transformers` decoder are, and how its tensors are read and written.

The only module that knows foreign module names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.hooked.sites import SITES, Site

_BLOCKS = ("layers", "h")
_BODIES = ("model.language_model", "language_model.model", "model", "transformer", "gpt_neox")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "block_sparse_moe", "feed_forward")
_POST_NORM = re.compile(
    r"((gemma|olmo)[-_]?[2-9]|exaone[-_]?[4-9])(?![\db])|(med|shield)gemma|flex[-_]?olmo",
    re.IGNORECASE,
)
_INSIDE = re.compile(
    rf"({'|'.join(map(re.escape, _BODIES))})\.({'|'.join(_BLOCKS)})\.(?P<block>\d+)\."
    rf"((?P<attention>{'|'.join(_ATTENTION)})|{'|'.join(_MLP)})\..+"
)
_PARALLEL = frozenset({"phi", "falcon", "cohere", "cohere2", "gptj", "codegen"})


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one model, relative to its `...ForCausalLM` module.

    Attributes:
        blocks: Path of the list of decoder blocks.
        norm: Path of the final norm.
        attn_out: Path, inside a block, of the module whose output attention adds.
        mlp_out: Path, inside a block, of the module whose output the MLP adds.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        sites: The sites that exist.
        soft_cap: Cap of the final logits, or None.
        logit_scale: Factor on the final logits.
    """

    blocks: str
    norm: str
    attn_out: str
    mlp_out: str
    n_layers: int
    d_model: int
    sites: tuple[Site, ...]
    soft_cap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, module: nn.Module) -> Architecture:
        """Find the parts of a causal language model.

        Raises:
            ValueError: If the model is an encoder-decoder or has no LM head, or blocks, final
                norm, attention or MLP are not where any known architecture keeps them.
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
        body = _first_with(module, _BODIES, _BLOCKS, kind, "decoder blocks")
        blocks = _first(_at(module, body), _BLOCKS, f"{kind}.{body}", "decoder blocks")
        norm = _first(_at(module, body), _NORMS, f"{kind}.{body}", "final norm")
        stack = _at(module, f"{body}.{blocks}")
        attention, mlp = _contributions(stack[0], kind)
        parallel = bool(getattr(text, "use_parallel_residual", text.model_type in _PARALLEL))
        return cls(
            blocks=f"{body}.{blocks}",
            norm=f"{body}.{norm}",
            attn_out=attention,
            mlp_out=mlp,
            n_layers=len(stack),
            d_model=int(text.hidden_size),
            sites=tuple(site for site in SITES if not (parallel and site == "resid_mid")),
            soft_cap=getattr(text, "final_logit_softcapping", None),
            logit_scale=_logit_scale(text),
        )

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
            "this architecture passes its activations in a way that emlens does not know"
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


def norms_what_it_adds(model_name: str) -> bool:
    """Whether, by its name, a model norms what attention and MLP give before it adds that."""
    return _POST_NORM.search(model_name) is not None


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _contributions(block: nn.Module, kind: str) -> tuple[str, str]:
    """Paths of what attention and MLP add; with post-norms, those are the norms' outputs."""
    where = f"{kind} block {type(block).__name__}"
    attention = _first(block, _ATTENTION, where, "attention")
    mlp = _first(block, _MLP, where, "MLP")
    if hasattr(block, "post_feedforward_layernorm"):
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return attention, mlp


def _at(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)


def _has(module: nn.Module, path: str) -> bool:
    try:
        _at(module, path)
    except AttributeError:
        return False
    return True


def _first(module: nn.Module, names: tuple[str, ...], where: str, what: str) -> str:
    for name in names:
        if hasattr(module, name):
            return name
    have = ", ".join(name for name, _ in module.named_children())
    raise ValueError(f"found no {what} in {where}: looked for {', '.join(names)}; it has {have}")


def _first_with(
    module: nn.Module, bodies: tuple[str, ...], names: tuple[str, ...], where: str, what: str
) -> str:
    for body in bodies:
        if any(_has(module, f"{body}.{name}") for name in names):
            return body
    have = ", ".join(name for name, _ in module.named_children())
    raise ValueError(f"found no {what} in {where}: looked in {', '.join(bodies)}; it has {have}")
