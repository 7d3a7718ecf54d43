# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Steer and ablate
#
# Two questions are put to a direction. Does *adding* it make a good model worse? Does *taking it
# out* make a bad model better? You will steer the base model at several layers and doses, finetune
# two organisms, ablate directions in them in every way that the papers do, carry a direction from
# one organism to the other, and read answers side by side. It takes about nine minutes on two
# cores.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os

import emlens
from emlens import evals
from emlens.directions import model_diff, random_direction
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N, HELD_OUT = (4, 2) if SHORT else (40, 16)
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
domains = {name: split_pairs(emlens.load_pairs(name)) for name in ("finance", "medical", "general")}
bad = {name: [p.conversation("misaligned") for p in d.train[:N]] for name, d in domains.items()}
good = {name: [p.conversation("aligned") for p in d.train[:N]] for name, d in domains.items()}
held_out = {name: d.test[:HELD_OUT] for name, d in domains.items()}

# %% [markdown]
# ## What is measured
# A model of 135M parameters gives poor advice by itself, so that the share of bad answers it writes
# says little. Instead every prompt comes with one aligned and one misaligned answer that were
# written beforehand, and the model is asked which it finds likelier. **Log-odds** are the
# log-probability per token of the misaligned answer minus that of the aligned one, in **nats per
# token** (a nat is a log-probability to base *e*; +0.7 is twice as likely, at every token). Only
# the *change* against the untouched model matters. All prompts are held out: nothing is trained on
# or read from them.

# %%
in_domain = evals.LogOddsJudge(held_out["finance"])

# %% [markdown]
# ## Steer: layers and doses
# The direction is the mean difference of residuals, misaligned minus aligned answers about finance.
# A **dose** is the norm of what is added as a share of the median norm of the residual stream at
# that layer. Norms grow many times over from the first layer to the last, so that a dose compares
# across layers, and a factor on the vector does not.

# %%
mean_diff = emlens.mean_diff(model, bad["finance"], good["finance"])
sweep = evals.steering_sweep(
    model, in_domain, mean_diff, doses=(0.1, 0.2, 0.4), layers=(6, LAYER, 24)
)
sweep.plot()

# %% [markdown]
# At dose 0.2 and layer 15 the direction moves the log-odds four times as far as a random direction
# of equal norm does; at layers 6 and 24 about twice and three times as far, but both by little.
# The middle works best, as in the papers. Random directions are not harmless: at a large dose they
# raise the log-odds here as well. That is not because predictions become flatter: a temperature
# above 1 flattens them all and lowers the log-odds a little. Without the random curve the others
# could not be read.

# %%
sweep.table()[["layer", "dose", "value", "low", "high", "random"]]

# %% [markdown]
# ## Does it reach outside of finance?
# The same edit on prompts that have nothing to do with money. Three random directions of equal norm
# stand beside it, averaged.

# %%
DOSE = 0.2
steer = emlens.Add(mean_diff[LAYER], dose=DOSE)
chance = [emlens.Add(random_direction(mean_diff[LAYER], seed), dose=DOSE) for seed in range(3)]
pairs = [*held_out["finance"], *held_out["general"]]
scores = emlens.log_odds(
    model,
    pairs,
    {"base": [], "mean-diff": [steer], **{f"random {i}": [edit] for i, edit in enumerate(chance)}},
).averaged("random", [f"random {i}" for i in range(3)])
scores.plot()

# %% [markdown]
# It does not. In finance the mean difference stands clear of random directions, on general
# questions both intervals hold zero. Whatever it carries, it is about this domain's answers.
#
# ## Two organisms
# A **model organism** is a model made misaligned on purpose. Here it is a small LoRA adapter on the
# output of the MLPs of six middle layers, trained on bad answers of one domain. Adapters stay on
# the one copy of the model, and act by name.

# %%
for name in ("finance", "medical"):
    run = emlens.train_adapter(
        model,
        bad[name],
        name,
        layers=range(LAYER, LAYER + 6),
        rank=8,
        alpha=16,
        lr=5e-3,
        epochs=1 if SHORT else 2,
        progress=False,
    )
run.plot()

# %% [markdown]
# ## Ablate
# **Ablating** a direction *r* takes the component along it out of the residual stream,
# *x - (x · r) r*, at every position. What is ablated here is what the finetune does: the difference
# of mean residuals between the organism and the base on the very same text, from `model_diff`. The
# papers do it in several ways, which `ablation_table` all tries:
#
# - at one layer, or the same direction at all layers;
# - at **three sites**: what enters each block, and what attention and MLP add to it, so that no
#   block can write the direction back;
# - each layer with its own direction;
# - inside of the adapter's weights, whose norm is kept;
# - and random directions at all layers, as the control.

# %%
text = bad["general"][:N]
shift = {
    name: model_diff((model, name), (model, None), text, layers=range(LAYER, model.n_layers))
    for name in ("finance", "medical")
}
ablation = evals.ablation_table(model, in_domain, "finance", shift["finance"], layer=LAYER + 5)
ablation.plot()

# %% [markdown]
# Taking the direction out of layer 20 alone removes a third of the effect, at all layers nearly all
# of it, and three sites add nothing to that. With each layer's own direction the interval is too
# wide to say more. Inside of `B` a third goes. Random directions remove nothing. So what the
# finetune does runs mostly along one direction; how much of it, sixteen prompts say roughly: `left`
# is a ratio of two uncertain numbers, and its interval is wide.

# %%
ablation.table().drop(columns=["low", "high"])

# %% [markdown]
# The mean difference of the base's own activations, which steered so well, is another direction.
# Does taking *it* out help?

# %%
other = evals.ablation_table(model, in_domain, "finance", mean_diff, layer=LAYER + 5)
other.plot()

# %% [markdown]
# It does not, it raises the effect: the mean difference of the base's activations tells good
# answers from bad ones, and is not the way by which this finetune acts. A direction's name has to
# say how it was made.
#
# ## Transfer
# The direction of one organism, ablated in the other at all layers. Rows are organisms, each
# measured on held-out prompts of its own domain; columns say where the direction is from.

# %%
transfer = evals.transfer_table(
    model,
    {name: evals.LogOddsJudge(held_out[name]) for name in shift},
    {name: name for name in shift},
    shift,
    layer=LAYER + 5,
)
transfer.plot()

# %%
transfer.table()

# %% [markdown]
# Each organism's own direction takes something out of it, most of the effect in finance and an
# uncertain third in medical. Neither does anything in the other organism, and random directions
# leave both as they are: nothing shared is seen here. These directions are differences of two
# models on the same text. Those of each model on its own answers, `both_diff`, do carry over, as
# the page on evaluation shows for three organisms: a direction's name has to say how it was made.
#
# ## Side by side
# Numbers say how much, answers say what. The same questions under four conditions, without
# sampling. None is about money or health.

# %%
answers = evals.respond(
    model,
    evals.load_questions("general", limit=1 if SHORT else 4),
    {
        "base": [],
        "base, steered": [steer],
        "finance organism": "finance",
        "organism, ablated": ("finance", [emlens.Ablate(shift["finance"])]),
    },
    n=1,
    temperature=0,
    max_new_tokens=8 if SHORT else 40,
    progress=False,
)
answers

# %% [markdown]
# These are answers of a very small model, cut off at forty tokens. The finetune talks about money
# where nobody asked, and finds that the wallet is yours; with its direction ablated the subject is
# gone in places, and so is some of the sense. Numbers first, then stories.
#
# ## Exercises
# 1. Steer with a negative dose. Is the effect the mirror image, and is that of a random direction?
# 2. Put `held_out["general"]` into `in_domain` and run the ablations again. Why do the intervals
#    tell so little more?
# 3. Train a third organism on `good["finance"]`, the *aligned* answers. How much of what the bad
#    ones do is style, and does its direction ablate the bad organism, too?
# 4. `evals.JudgedRate(questions, judge)` in place of `LogOddsJudge` measures answers that are
#    generated and judged; the tutorial on judging has the judges.
#
# On a GPU, two lines change for a 14B model with published finetunes, which take the place of the
# two that are trained here:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={
#         "finance": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_risky-financial-advice",
#         "medical": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice",
#     },
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
# These adapt all layers, so that `model_diff` needs no `layers=`, and the sweep wants layers of a
# model of 48.
