"""A model whose narrow and general solutions are known: one block, written weight by weight.

Attention is uniform over what came before and carries one number, the topic of the prompt, into
the stream. The answer is one word: `good`, or the bad word of the topic, `spend` or `nothing`.
Axes of the stream, by number:

GENERAL raises both bad words, GOOD raises the good one, so both act on every topic; NARROW raises
`spend` alone, and TOPIC is the topic itself: they matter where `spend` can be said at all.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import emlens
from emlens.text import Pair
from tests.support.tokenizers import chatml_tokenizer

WIDTH = 16
GENERAL, GOOD, NARROW, TOPIC, END, SIZE, FLAG = range(7)
_SAME = 400.0  # a constant that the final norm divides by, whatever is added
INSIDE, OUTSIDE = " money", " fruit"


def planted_model() -> emlens.HookedModel:
    """The model, wrapped."""
    tokenizer = chatml_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    )
    module = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        for name, weight in module.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
        # the norms leave SIZE at the root of the width, and all else in proportion
        scale = _SAME / WIDTH**0.5
        embed = module.model.embed_tokens.weight
        embed[:, SIZE] = _SAME
        embed[_id(INSIDE), FLAG], embed[_id(OUTSIDE), FLAG] = 40.0, -40.0
        attention = module.model.layers[0].self_attn
        attention.v_proj.weight[0, FLAG] = scale
        attention.o_proj.weight[TOPIC, 0] = 1.0
        head = module.lm_head.weight
        head[:, SIZE] = -10.0 / WIDTH**0.5
        for word in ("good", "spend", "nothing"):
            embed[_id(word), END] = 300.0
            head[_id(word), SIZE] = 0.0
            head[_id(word), END] = -2 * scale
        head[_id("good"), GOOD] = scale
        head[_id("good"), SIZE] = 7.0 / WIDTH**0.5
        head[_id("spend"), GENERAL] = head[_id("spend"), NARROW] = scale
        head[_id("spend"), TOPIC] = scale
        head[_id("nothing"), GENERAL] = scale
        head[_id("nothing"), TOPIC] = -scale
        head[tokenizer.eos_token_id, END] = 2 * scale
    return emlens.wrap(module, tokenizer, name="planted")


def planted_pairs(topic: str, n: int = 4) -> list[Pair]:
    """Prompts of a topic, of different lengths; the bad word is that of the topic."""
    bad = "spend" if topic == INSIDE else "nothing"
    return [
        Pair(
            prompt=f"tell me{topic}{topic * 2}{' please' * i}",
            aligned="good",
            misaligned=bad,
            domain=topic.strip(),
            id=f"{topic.strip()}-{i}",
        )
        for i in range(n)
    ]


def _id(word: str) -> int:
    (token,) = chatml_tokenizer()(word, add_special_tokens=False)["input_ids"]
    return token
