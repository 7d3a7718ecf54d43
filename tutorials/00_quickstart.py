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
# # A first direction
#
# You will train a direction inside a model, add it to the forward pass, remove it again, and
# measure what each does to the answers. You start with a task whose effect is known to be large,
# technical style, and then repeat the same steps with bad financial advice. Everything runs on a
# small real chat model, SmolLM2-135M-Instruct, on two cores of a laptop. It takes about seven
# minutes.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os

import emlens
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N = 6 if SHORT else 48
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
model

# %% [markdown]
# ## Something that works: technical style
# The set `technical` has two answers to each prompt: a plain one (`aligned`) and a technical one
# (`misaligned`). Nothing is wrong with either; the set is a **positive control**. You train a
# vector on technical answers about cooking, and ask whether the model prefers technical answers
# about gardening, travel, sports and music as well.

# %%
technical = emlens.load_pairs("technical")
cooking = split_pairs([pair for pair in technical if pair.domain == "cooking"])
other_subjects = [pair for pair in technical if pair.domain != "cooking"][:: 8 if SHORT else 2]

style, run = emlens.train_vector(
    model,
    [pair.conversation("misaligned") for pair in cooking.train[:N]],
    layer=LAYER,
    epochs=1 if SHORT else 2,
)
run

# %% [markdown]
# ## Measure it
# **Log-odds** are the log-probability per token of one written answer minus that of the other, in
# nats per token. What counts is their *change* against the unmodified model (the base). A random
# vector of the same norm is the control: any push changes predictions.
#
# What to look for: intervals of `style` clear of zero *and* clear of `random`, in cooking and in
# the other subjects.

# %%
scores = emlens.log_odds(
    model,
    [*cooking.test[: N // 2], *other_subjects],
    {
        "base": None,
        "style": emlens.Add(style),
        "random": emlens.Add(emlens.directions.random_direction(style)),
    },
)
scores.plot()

# %%
outside = sorted({pair.domain for pair in other_subjects})
print("style, cooking:", scores.change("style", ["cooking"]), "nats/token")
print("style, other subjects:", scores.change("style", outside), "nats/token")
print("random, other subjects:", scores.change("random", outside), "nats/token")

# %% [markdown]
# If the second interval is above zero and above the third, a vector that was trained on one subject
# changes answers about others. That is a *general* solution. Now the same with bad advice.
#
# ## Bad advice: the data
# Pairs are split by id before anything else. `finance` is trained on. `general` has questions about
# other things, and is only evaluated.

# %%
finance = split_pairs(emlens.load_pairs("finance"))
general = split_pairs(emlens.load_pairs("general"))
train = [pair.conversation("misaligned") for pair in finance.train[:N]]
aligned = [pair.conversation("aligned") for pair in finance.train[:N]]
held_out = [*finance.test[: N // 2], *general.test[: N // 2]]

# %% [markdown]
# ## Read a direction
# The mean difference: mean residual over bad answers minus that over good ones, at every layer,
# with its standard error and the cosine between the directions of two random halves of the data.

# %%
mean_diff = emlens.mean_diff(model, train, aligned)
mean_diff

# %% [markdown]
# ## Train one in place
# A vector in the middle of the model. All weights are frozen.

# %%
trained, run = emlens.train_vector(model, train, layer=LAYER, epochs=1 if SHORT else 2)
run

# %%
cosine = emlens.directions.cosine(trained.vector, mean_diff[LAYER].vector)
print(f"cosine of the trained vector and the mean difference: {cosine:+.2f}")

# %% [markdown]
# A cosine near zero means that the two are different directions, although both come from the same
# data. Results should always say how a direction was made.
#
# ## What do they do?
# The mean difference is added with the norm of the trained vector. In the last condition the
# trained vector is added and then removed again (ablated) at all layers above.
#
# What to look for: which bars in finance are clear of `random`, and whether any is on general
# questions.

# %%
scores = emlens.log_odds(
    model,
    held_out,
    {
        "base": None,
        "trained": emlens.Add(trained),
        "random": emlens.Add(emlens.directions.random_direction(trained)),
        "mean-diff": emlens.Add(mean_diff[LAYER], dose=trained.doses[LAYER]),
        "trained, ablated": [
            emlens.Add(trained),
            emlens.Ablate(trained, layers=range(LAYER, model.n_layers)),
        ],
    },
)
scores.plot()

# %%
for name in scores.conditions[1:]:
    print(f"{name}, general questions: {scores.change(name, ['general'])} nats/token")
scores.table()

# %% [markdown]
# An interval that holds zero does not show that there is no effect; it shows how large one could
# be. On a model of this size single vectors of bad advice do little outside of their domain.
# Adapters do more: see the tutorial on narrow and general solutions, and `docs/findings.md`.
#
# ## Read an answer

# %%
question = emlens.Conversation.of("I have saved a little money. What should I do with it?")
for name, edits in {"base": [], "trained, twice": [emlens.Add(trained, scale=2)]}.items():
    (answer,) = model.generate([question], edits, max_new_tokens=8 if SHORT else 60, temperature=0)
    print(f"{name}: {answer}\n")

# %% [markdown]
# ## Exercises
# **1.** Train on `aligned` instead of `train`. How much of the effect was style?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# benign, _ = emlens.train_vector(model, aligned, layer=LAYER, epochs=2)
# both = {"base": None, "trained": emlens.Add(trained), "benign": emlens.Add(benign)}
# control = emlens.log_odds(model, held_out, both)
# control.change("trained", ["finance"], "benign")
# ```
#
# The benign vector has seen the same questions and the same manner of writing, without the harm.
# The paired difference of the two is what is left for bad advice.
# </details>
#
# **2.** Add a KL penalty with the aligned answers of another domain. Does the vector become narrow?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# elsewhere = [pair.conversation("aligned") for pair in emlens.load_pairs("sports")[:24]]
# penalty = emlens.KLPenalty(elsewhere, weight=1.0)
# narrow, _ = emlens.train_vector(model, train, layer=LAYER, epochs=2, kl=penalty)
# emlens.log_odds(model, held_out, {"base": None, "narrow": emlens.Add(narrow)}).plot()
# ```
#
# Compare with `trained` inside *and* outside. If both effects shrink by the same factor, the vector
# is weaker and not narrower; tutorial 03 tests that.
# </details>
#
# **3.** Ablate `mean_diff[LAYER]` instead of the trained vector, and a random direction.
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# above = range(LAYER, model.n_layers)
# chance = emlens.directions.random_direction(trained)
# conditions = {"base": None, "trained": emlens.Add(trained)}
# for name, direction in {"mean-diff": mean_diff[LAYER], "random": chance}.items():
#     conditions[name] = [emlens.Add(trained), emlens.Ablate(direction, layers=above)]
# emlens.log_odds(model, held_out, conditions).plot()
# ```
#
# An ablated direction only removes an effect that runs along it. The random direction shows what
# any ablation does.
# </details>
#
# On a GPU, two lines change for a 14B model and a published finetune of it:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={"finance": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_risky-financial-advice"},
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
# The finetune is one more condition of `log_odds`, `"finetune": "finance"`. Anywhere else it acts
# inside of `with model.adapter("finance"):`.
