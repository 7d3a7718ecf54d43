"""A fixed dozen of the zoo, each for what it does otherwise; `make zoo` runs all of it."""

from __future__ import annotations

import pytest

from tests.hooked.zoo import SITES, TOLERANCE, try_model

AROUND = ("resid_pre", "resid_post")
# architecture, engine, and the sites that it has; none where the engine is refused
DOZEN = {
    ("granite", "nnsight"): AROUND,
    ("bloom", "transformer_lens"): SITES,
    ("falcon", "nnsight"): ("resid_pre", "attn_out", "mlp_out", "resid_post"),
    ("gptj", "transformer_lens"): ("resid_pre", "attn_out", "mlp_out", "resid_post"),
    ("nanochat", "transformer_lens"): SITES,
    ("cohere2_moe", "nnsight"): ("resid_pre", "attn_out", "mlp_out", "resid_post"),
    ("deepseek_v32", "nnsight"): SITES,
    ("llama4_text/tuned", "nnsight"): AROUND,
    ("gemma4_text/per_layer", "nnsight"): AROUND,
    ("qwen3_next", "nnsight"): AROUND,
    ("mamba2", "nnsight"): AROUND,
    ("paligemma", "nnsight"): SITES,
    ("gpt2/unscaled", "transformer_lens"): (),
    ("gemma3_text/softcap", "transformer_lens"): (),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "engine"), DOZEN)
def test_what_is_granted_is_what_plain_hooks_see_and_the_rest_is_refused(name, engine):
    outcomes = {one.check: one for one in try_model(name, engine)}
    wrong = [one for one in outcomes.values() if one.kind not in ("right", "refused")]
    assert not wrong, f"beyond {TOLERANCE}, or an error of a library's"
    granted = tuple(
        site for site in SITES
        if f"read {site}" in outcomes and outcomes[f"read {site}"].kind == "right"
    )  # fmt: skip
    assert granted == DOZEN[name, engine]
    for site in granted:
        assert outcomes[f"edit {site}"].kind == "right"
    if granted:
        right = {check for check, one in outcomes.items() if one.kind == "right"}
        assert {"logits", "masks", "resume", "gradient", "adapter"} <= right
    else:
        assert (
            "TransformerLens computes other logits than the model itself" in outcomes["load"].said
        )
        assert "use engine='nnsight'" in outcomes["load"].said
