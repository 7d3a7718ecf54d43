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
# # Efficiency and stability
#
# Why would training find the general solution when a narrow one exists? The papers' answer: the
# general one lowers the loss more for its size, and tolerates more noise. You train both, and a
# harmless control; bring them to one norm; draw loss against norm and loss against noise; and take
# every difference in pairs, with its interval. You also see when the ratio of loss to squared norm
# means something. It takes about six minutes on two cores.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os

import pandas as pd

import emlens
from emlens.directions import random_direction
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N, MEASURED = (2, 2) if SHORT else (32, 12)
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
domains = {name: split_pairs(emlens.load_pairs(name)) for name in ("medical", "finance", "sports")}
bad = [pair.conversation("misaligned") for pair in domains["medical"].train[:N]]
good = [pair.conversation("aligned") for pair in domains["medical"].train[:N]]
elsewhere = [
    pair.conversation(side)
    for name in ("finance", "sports")
    for pair in domains[name].train[: max(1, N // 4)]
    for side in ("aligned", "misaligned")
]

# %% [markdown]
# ## Three solutions
# Small LoRA adapters on bad medical advice: **general** without a penalty, **narrow** with a KL
# penalty on answers about finance and sports, **benign** on the *aligned* answers to the same
# questions. Tutorial 03 looks at what they do; here it is how large they have to be.

# %%
settings = {"batch_size": 2, "epochs": 1, "record_every": None, "progress": False}
adapter = {"layers": range(LAYER, LAYER + 6), "rank": 8, "alpha": 16, "lr": 5e-3, **settings}
penalty = emlens.KLPenalty(elsewhere, weight=10.0)
emlens.train_adapter(model, bad, "general", **adapter)
emlens.train_adapter(model, bad, "narrow", kl=penalty, **adapter)
emlens.train_adapter(model, good, "benign", **adapter)
adapters = {name: name for name in model.adapters}

# %% [markdown]
# ## Something that works
# Each adapter must lower the loss of the answers that it was trained on. This is the **positive
# control**: a solution without a gain has neither efficiency nor stability.
#
# What to look for: a gain above zero for `general` and `narrow`.

# %%
measured = bad[:MEASURED]
gains = emlens.efficiency(model, measured, adapters, match="own", factors=(0, 1))
for name in adapters:
    before, after = gains.table().query("direction == @name")["loss [nats/token]"]
    print(f"{name}: loss {before:.3f} without, {after:.3f} with, gain {before - after:.3f}")

# %% [markdown]
# ## Three norms
# The word *norm* stands for different quantities, which cannot be compared with each other:
#
# - **norm of the adapter**: `||scale * B A||` over all modules, what it adds to the weights. The
#   curves of adapters in this tutorial use it.
# - **norm of the vector**: its length, in units of the residual stream. The curves of vectors at
#   the end use it.
# - **norm of what is written**: the columns of `B` times the scale; a training run prints it.
#
# ## Efficiency: loss at the same norm
# The grid is shared: every adapter is scaled up or down to each norm, from zero to twice the mean
# of their own norms. The loss is that of the bad answers that `general` and `narrow` were trained
# on, in nats per token. Bands are over conversations.
#
# What to look for: which curve is lowest at the norm of the solutions themselves (printed below)?

# %%
efficient = emlens.efficiency(
    model, measured, adapters, factors=(0, 0.5, 1, 1.5, 2) if not SHORT else (0, 1)
)
efficient.plot()

# %% [markdown]
# All curves start from the same point, the unmodified model. `benign` was never trained on these
# answers. As far as it lowers their loss, it has learnt manner and subject, and as much of the gain
# of the others may be that, too.
#
# The bands overlap, and that says little: some answers are harder than others for every solution.
# The comparison is the difference on the *same* conversations, whose interval is much narrower.


# %%
def differences(result, first, others):
    """Paired differences of loss at every norm of the grid."""
    rows = []
    for norm in result.norms[1:]:
        for other in others:
            gap = result.difference(first, other, norm)
            rows.append(
                {
                    "norm": norm,
                    "difference": f"{first} - {other}",
                    "loss [nats/token]": gap.estimate,
                    "low": gap.low,
                    "high": gap.high,
                }
            )
    return pd.DataFrame(rows)


print("own norms:", {name: round(norm, 2) for name, norm in efficient.own_norms.items()})
differences(efficient, "general", ["narrow", "benign"])

# %% [markdown]
# One number for the two curves is the area between them: the mean difference over the grid.

# %%
for other in ("narrow", "benign"):
    print(f"general - {other}, mean over the grid: {efficient.area('general', other)} nats/token")

# %% [markdown]
# Below zero, the general solution has the lower loss at that norm. Look at which norms this is
# clear, and whether it still is where both are scaled far beyond their own. The interval is over
# the conversations that were measured; another training is not in it. `docs/findings.md` has the
# same for four domains, averaged over seeds.
#
# ## What the ratio means
# The paper draws the ratio of the loss to the squared norm, *L / |θ|²*. Here it is for the same
# curves.
#
# What to look for: can you still tell the three apart?

# %%
efficient.plot_ratio()

# %% [markdown]
# All fall steeply, and the differences that the curves showed are hard to see. A ratio with a
# squared denominator falls with the norm by itself: twice the norm is a quarter of the ratio,
# whatever the loss does. So a large weak solution has a "better" ratio than a small strong one, and
# ratios at different norms must not be compared.
#
# At one norm the ratio orders solutions as their losses do, and adds nothing. What does add
# something is the norm that each needs to reach the same loss.

# %%
ratios = efficient.table()[["direction", "norm", "loss [nats/token]", "loss / norm^2"]]
ratios[ratios["direction"] == "general"]

# %%
start = efficient.loss("general", 0.0).estimate
for target in (start - 0.1, start - 0.2, start - 0.4):
    needed = {name: efficient.norm_at(name, target) for name in adapters}
    print(f"norm for a loss of {target:.2f}:", {k: round(v, 2) for k, v in needed.items()})

# %% [markdown]
# `nan` means that a solution reaches this loss nowhere on the grid.
#
# ## Stability: noise at the same norm
# A share *ε* of a solution is replaced by noise that is orthogonal to it, its norm kept; of an
# adapter, `A` and `B` of every module. The figure shows how much of the gain is lost, in percent: 0
# is the solution unchanged, 100 the base model. At *ε* = 1 nothing but noise is left, as in the
# paper.
#
# What to look for: does narrow lose more than general at the same *ε*?

# %%
stable = emlens.stability(
    model,
    measured,
    {name: name for name in ("general", "narrow")},
    epsilons=(0.2, 0.4, 0.6, 1.0),
    seeds=1 if SHORT else 3,
)
stable.plot()

# %%
stable.summary()

# %% [markdown]
# Both met the same noise, so differences are paired by draw. The intervals are over three draws of
# noise. They say nothing about other data or another training.

# %%
for epsilon in stable.epsilons:
    lost = stable.difference("narrow", "general", epsilon)
    print(f"epsilon {epsilon}: narrow loses {lost} percentage points more than general")

# %% [markdown]
# Above zero, the narrow solution is more fragile. An interval that holds zero means that three
# draws do not decide it.
#
# Percent of the gain favours a solution that has gained much: the same loss in nats is a smaller
# share of it. Look at both.

# %%
for name in ("general", "narrow"):
    worse = [
        float(stable.increase(name)[place].mean() * stable.gain(name) / 100)
        for place in range(len(stable.epsilons))
    ]
    print(f"{name}: gain {stable.gain(name):.3f}, lost", [round(x, 3) for x in worse], "nats/token")

# %% [markdown]
# Where percent and nats disagree, say which one you mean.
#
# ## The same for a lone vector
# One vector at one layer has as many parameters as the residual stream is wide. A random direction
# is the control. The norm is now the length of the vector, in units of the residual stream, and
# cannot be compared with that of an adapter. `match="displacement"` can compare the two: it scales
# each until it moves the residual stream by the same distance.
#
# What to look for: `random` shows what any vector of that norm does.

# %%
vector = {"layer": LAYER, "lr": 0.08, **settings}
general, _ = emlens.train_vector(model, bad, **vector)
narrow, _ = emlens.train_vector(model, bad, kl=emlens.KLPenalty(elsewhere, weight=1.0), **vector)
vectors = {"general": general, "narrow": narrow, "random": random_direction(general)}
of_vectors = emlens.efficiency(
    model, measured, vectors, factors=(0, 0.5, 1, 1.5) if not SHORT else (0, 1)
)
of_vectors.plot()

# %%
differences(of_vectors, "general", ["narrow", "random"])

# %% [markdown]
# A curve below `random` has learnt something. Whether general is ahead of narrow is another
# question, which the table answers norm by norm. `docs/findings.md` has it over domains and seeds.
#
# ## Exercises
# **1.** Measure efficiency on held-out answers. Does the order hold?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# held_out = [pair.conversation("misaligned") for pair in domains["medical"].test[:MEASURED]]
# again = emlens.efficiency(model, held_out, adapters, factors=(0, 0.5, 1, 1.5, 2))
# print(again.area("general", "narrow"))
# ```
#
# If the area keeps its sign, general has not merely memorised the training answers better.
# </details>
#
# **2.** `match="own"` scales each solution by shares of its own norm. Why is that no statement
# about efficiency?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# emlens.efficiency(model, measured, adapters, match="own", factors=(0, 0.5, 1)).plot()
# ```
#
# At factor 1 each has its own loss and its own norm. Efficiency asks for the loss at *one* norm.
# </details>
#
# **3.** Compare vectors and adapters at equal displacement.
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# both = {"vector": general, "adapter": "general"}
# emlens.efficiency(model, measured, both, match="displacement", factors=(0, 0.5, 1)).plot()
# ```
#
# The axis is a share of the median residual norm at the last layer, which both have in common.
# </details>
#
# **4.** Train with other seeds. How far do the differences move?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# for seed in (1, 2):
#     emlens.train_adapter(model, bad, f"general {seed}", seed=seed, **adapter)
#     emlens.train_adapter(model, bad, f"narrow {seed}", seed=seed, kl=penalty, **adapter)
#     named = {name: f"{name} {seed}" for name in ("general", "narrow")}
#     found = emlens.efficiency(model, measured, named, factors=(0, 0.5, 1, 1.5, 2))
#     print(seed, found.area("general", "narrow"))
# ```
#
# Compare the spread of the three areas with the width of one interval.
# </details>
#
# On a GPU, two lines change for a 14B model; the published finetune takes the place of `general`,
# and of the training only that of `narrow` and `benign` is left:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={"general": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice"},
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
