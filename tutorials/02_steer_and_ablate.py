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
# Two questions are asked of a direction. Does *adding* it make a good model worse? Does *removing*
# it make a bad model better? You steer the base model at several layers and doses, finetune two
# organisms, ablate directions in them in every way that the papers use, carry a direction from one
# organism to the other, and read answers side by side. It takes about ten minutes on two cores.
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
# A model of 135M parameters gives poor advice by itself, so the share of bad answers that it writes
# says little. Instead, every prompt comes with one aligned and one misaligned answer that were
# written beforehand, and the model says which it finds likelier. **Log-odds** are the
# log-probability per token of the misaligned answer minus that of the aligned one, in **nats per
# token** (a nat is a log-probability to base *e*; +0.7 is twice as likely, at every token). Only
# the *change* against the unmodified model counts. All prompts are held out: nothing is trained on
# them or read from them.
#
# ## Something that works: technical style
# The set `technical` has plain answers (`aligned`) and technical ones (`misaligned`). It is the
# **positive control**: a direction that is read from answers about cooking should make technical
# answers about *other* subjects likelier.
#
# What to look for: `style` above zero and above `random`. If this fails, something is wrong with
# the code, and nothing below can be trusted.

# %%
technical = emlens.load_pairs("technical")
cooking = [pair for pair in technical if pair.domain == "cooking"][:N]
other_subjects = [pair for pair in technical if pair.domain != "cooking"][:HELD_OUT]
style = emlens.mean_diff(model, cooking)[LAYER]
control = emlens.log_odds(
    model,
    other_subjects,
    {
        "base": None,
        "style": emlens.Add(style, dose=0.2),
        "random": emlens.Add(random_direction(style), dose=0.2),
    },
)
print("style, other subjects:", control.change("style"), "nats/token")
print("random, other subjects:", control.change("random"), "nats/token")

# %% [markdown]
# ## Steer: layers and doses
# From here on the data are bad advice.

# %%
in_domain = evals.LogOddsJudge(held_out["finance"])

# %% [markdown]
# The direction is the mean difference of residuals, misaligned minus aligned answers about finance.
# A **dose** is the norm of what is added as a share of the median norm of the residual stream at
# that layer. Norms grow many times over from the first layer to the last, so a dose can be compared
# across layers and a factor on the vector cannot.
#
# What to look for: the distance between the direction and the random direction of equal norm, at
# each layer and dose.

# %%
mean_diff = emlens.mean_diff(model, bad["finance"], good["finance"])
sweep = evals.steering_sweep(
    model, in_domain, mean_diff, doses=(0.1, 0.2, 0.4), layers=(6, LAYER, 24)
)
sweep.plot()

# %% [markdown]
# Random directions are not harmless: at a large dose they raise the log-odds as well. Flatter
# predictions are not the reason. A temperature above 1 flattens them all and lowers the log-odds a
# little. Without the random curve the other could not be read.

# %%
swept = sweep.table()[["layer", "dose", "value", "low", "high", "random"]]
for row in swept[swept["dose"] == 0.2].itertuples():
    print(f"layer {row.layer}: {row.value:+.3f}, random direction {row.random:+.3f} nats/token")
swept

# %% [markdown]
# ## Does it reach outside of finance?
# The same edit on prompts that have nothing to do with money, with three random directions of equal
# norm, averaged.
#
# What to look for: the interval of `mean-diff` on general questions. Does it hold zero?

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

# %%
for domain in ("finance", "general"):
    print(f"mean-diff less random, {domain}:", scores.change("mean-diff", [domain], "random"))

# %% [markdown]
# A direction that is clear of random ones in finance only is about this domain's answers.
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
# **Ablating** a direction *r* removes the component along it from the residual stream, *x - (x · r)
# r*, at every position. The direction ablated here is what the finetune does: the difference of
# mean residuals between the organism and the base on the same text, from `model_diff`. The papers
# ablate in several ways, and `ablation_table` tries them all:
#
# - at one layer, or the same direction at all layers;
# - at **three sites**: what enters each block, and what attention and MLP add to it, so that no
#   block can write the direction back;
# - each layer with its own direction;
# - inside the adapter's weights, whose norm is kept;
# - random directions at all layers, as the control.
#
# What to look for: rows near the base removed the effect, rows near the organism left it. Where is
# `random`?

# %%
text = bad["general"][:N]
shift = {
    name: model_diff((model, name), (model, None), text, layers=range(LAYER, model.n_layers))
    for name in ("finance", "medical")
}
ablation = evals.ablation_table(model, in_domain, "finance", shift["finance"], layer=LAYER + 5)
ablation.plot()

# %% [markdown]
# Where ablation at all layers removes most of the effect and a random direction removes none, what
# the finetune does runs mostly along one direction. `left` is a ratio of two uncertain numbers from
# sixteen prompts, so its interval is wide. Look at the change in nats as well.

# %%
ablation.table().drop(columns=["low", "high"])

# %% [markdown]
# The mean difference of the base's own activations, which steered so well, is another direction.
# Does taking *it* out help?

# %%
other = evals.ablation_table(model, in_domain, "finance", mean_diff, layer=LAYER + 5)
other.plot()

# %% [markdown]
# The mean difference tells good answers from bad ones in the *base*. That does not make it the
# direction by which this finetune acts: ablating it can even raise the effect. A direction's name
# has to say how it was made.
#
# ## Transfer
# The direction of one organism, ablated in the other at all layers. Rows are organisms, each
# measured on held-out prompts of its own domain. Columns say where the direction comes from.
#
# What to look for: a shared direction would remove the effect off the diagonal, too.

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
# These directions are differences of two models on the same text. Directions of each model on its
# own answers, `both_diff`, carry over more, as the page on evaluation shows for three organisms. An
# interval that spans 0 and 100% says only that sixteen prompts are too few.
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
# These are answers of a very small model, cut off at forty tokens. Does the finetune talk about
# money where nobody asked? Does that stop when its direction is ablated, and do the answers still
# make sense? Read numbers first, then answers.
#
# ## Exercises
# **1.** Steer with a negative dose. Is the effect the mirror image?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# chance = random_direction(mean_diff[LAYER])
# both = {"base": None}
# for dose in (-0.2, 0.2):
#     both[f"mean-diff {dose:+}"] = emlens.Add(mean_diff[LAYER], dose=dose)
#     both[f"random {dose:+}"] = emlens.Add(chance, dose=dose)
# emlens.log_odds(model, held_out["finance"], both).plot()
# ```
#
# The part of an effect that is the same for both signs is one of size; the part that changes sign
# is one of direction.
# </details>
#
# **2.** Measure the ablations on general questions. Why do the intervals say so little?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# outside = evals.LogOddsJudge(held_out["general"])
# evals.ablation_table(model, outside, "finance", shift["finance"], layer=LAYER + 5).table()
# ```
#
# The effect itself is small outside of the domain. `left` divides by it, so its interval has no
# bounds where the effect's interval holds zero.
# </details>
#
# **3.** Train a third organism on the *aligned* answers. How much of the effect is style?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# options = {"layers": range(LAYER, LAYER + 6), "rank": 8, "alpha": 16, "lr": 5e-3, "epochs": 2}
# emlens.train_adapter(model, good["finance"], "benign", **options)
# benign = model_diff((model, "benign"), (model, None), text, layers=range(LAYER, model.n_layers))
# emlens.compare({"finance": shift["finance"], "benign": benign}).plot()
# evals.ablation_table(model, in_domain, "finance", benign, layer=LAYER + 5).plot()
# ```
#
# What the benign direction removes from the bad organism is shared by any finetune on these
# questions.
# </details>
#
# **4.** Measure generated answers instead of log-odds.
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# judge = evals.ProbeJudge(model, emlens.load_pairs("medical"))
# questions = evals.load_questions("general", limit=8)
# judged = evals.JudgedRate(questions, judge, n=2, max_new_tokens=32, threshold=50)
# evals.ablation_table(model, judged, "finance", shift["finance"], layer=LAYER + 5).table()
# ```
#
# The table then has the share of coherent answers as well: an ablation that breaks the model leaves
# no misaligned answers either.
# </details>
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
