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
# Why would training find the general solution when a narrow one is there? The papers' answer: the
# general one lowers the loss more for its size, and stands more noise. You will train both, a
# harmless control beside them, put them to one norm, draw loss against norm and loss against
# noise, and take every difference in pairs, with its interval. And you will see when the ratio of
# loss to squared norm says something, and when nothing. It takes about five minutes on two cores.
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
# questions. The tutorial on narrow and general solutions looks at what they do; here it is how
# they do it that counts.

# %%
settings = {"batch_size": 2, "epochs": 1, "record_every": None, "progress": False}
adapter = {"layers": range(LAYER, LAYER + 6), "rank": 8, "alpha": 16, "lr": 5e-3, **settings}
penalty = emlens.KLPenalty(elsewhere, weight=10.0)
emlens.train_adapter(model, bad, "general", **adapter)
emlens.train_adapter(model, bad, "narrow", kl=penalty, **adapter)
emlens.train_adapter(model, good, "benign", **adapter)
adapters = {name: name for name in model.adapters}

# %% [markdown]
# ## Efficiency: loss at the same norm
# The norm of an adapter is that of what it adds to the weights, `||scale * B A||` over all modules.
# The grid is shared: every solution is scaled up or down to each norm, from nothing to twice the
# mean of their own norms. The loss is that of the bad answers that `general` and `narrow` were
# trained on, in nats per token, and the bands are over conversations.

# %%
measured = bad[:MEASURED]
efficient = emlens.efficiency(
    model, measured, adapters, factors=(0, 0.5, 1, 1.5, 2) if not SHORT else (0, 1)
)
efficient.plot()

# %% [markdown]
# All curves start from the same point, the model without any of them. `benign` was never trained on
# these answers: as far as it lowers their loss, what it learnt is manner and subject, and this much
# of the gain of the others may be that, too.
#
# The bands overlap, and that says little: some answers are harder than others, for every solution.
# What is compared is the difference on the *same* conversations, whose interval is much narrower.


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
# Below zero, the general solution has the lower loss at that norm: here it is well ahead of narrow
# at its own norm and below, and no longer clearly so where both are scaled far beyond theirs. The
# benign control falls behind at every norm, although it gains as well. The interval is over the
# conversations that were measured, and says nothing about another training: for that, train with
# other seeds. `docs/findings.md` has the same for four domains, averaged over seeds.
#
# ## What the ratio means, and what not
# The paper draws the ratio of the loss to the squared norm, *L / |θ|²*. Here it is for the same
# curves.

# %%
efficient.plot_ratio()

# %% [markdown]
# All fall, and steeply, and what set the curves apart above is hardly to be seen. A ratio whose
# denominator is squared falls with the norm by itself, whatever the loss does: twice the norm is a
# quarter of the ratio. So a large weak solution has a "better" ratio than a small strong one, and
# ratios at different norms must not be compared.
#
# At one norm the ratio puts solutions in the order of their losses, and adds nothing to them. What
# does add something is the norm that each needs to reach one and the same loss.

# %%
ratios = efficient.table()[["direction", "norm", "loss [nats/token]", "loss / norm^2"]]
ratios[ratios["direction"] == "general"]

# %%
start = efficient.loss("general", 0.0).estimate
for target in (start - 0.1, start - 0.2, start - 0.4):
    needed = {name: efficient.norm_at(name, target) for name in adapters}
    print(f"norm for a loss of {target:.2f}:", {k: round(v, 2) for k, v in needed.items()})

# %% [markdown]
# `nan` is a loss that a solution reaches nowhere on the grid.
#
# ## Stability: noise at the same norm
# A share *ε* of a solution is replaced by noise that is orthogonal to it, its norm kept: of an
# adapter, `A` and `B` of every module. What counts is how much of the gain is lost, in percent: 0
# is the solution untouched, 100 the base model, and more than 100 is worse than none.

# %%
stable = emlens.stability(
    model,
    measured,
    {name: name for name in ("general", "narrow")},
    epsilons=(0.2, 0.4, 0.6),
    seeds=1 if SHORT else 3,
)
stable.plot()

# %%
stable.summary()

# %% [markdown]
# Both met the same noise, so that differences are in pairs here, too, by draw. Three draws say
# something about the noise, and nothing about other data or another training.

# %%
for epsilon in stable.epsilons:
    lost = stable.difference("narrow", "general", epsilon)
    print(f"epsilon {epsilon}: narrow loses {lost} percentage points more than general")

# %% [markdown]
# Above zero, the narrow solution is the more fragile. Where an interval holds zero, three draws
# have not shown it, which is not to say that it is not so.
#
# Percent of the gain is kind to a solution that has gained much: the same loss in nats is a smaller
# share of it. Look at both.

# %%
for name in ("general", "narrow"):
    worse = [
        float(stable.increase(name)[place].mean() * stable.gain(name) / 100)
        for place in range(len(stable.epsilons))
    ]
    print(f"{name}: gain {stable.gain(name):.3f}, lost", [round(x, 3) for x in worse], "nats/token")

# %% [markdown]
# Here narrow loses more in both: a larger share of a smaller gain, and more nats. Where the two
# disagree, say which one you mean.
#
# ## The same for a lone vector
# One vector, added at one layer, has as many parameters as the residual stream is wide. Beside the
# two trained ones stands a random direction. The unit of the norm is that of the residual stream,
# and cannot be compared with that of an adapter; for that, `match="displacement"` puts all to the
# same displacement of the stream.

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
# `random` shows what any vector of that size gives, and whatever is below it was learnt. Whether
# general is ahead of narrow is another question, and the rows of the table answer it norm by norm:
# a little at the smallest norm, and not beyond it. `docs/findings.md` asks again, over domains and
# seeds.
#
# ## Exercises
# 1. Measure efficiency on `domains["medical"].test` in place of `measured`. Does the order hold on
#    answers that nothing was trained on?
# 2. `match="own"` scales each solution to shares of its own norm. Which of the two is then ahead,
#    and why is that no statement about efficiency?
# 3. Put vectors and adapters into one `emlens.efficiency(..., match="displacement")`.
# 4. Train with `seed=1` and `seed=2`. How far do the differences move, against their intervals?
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
