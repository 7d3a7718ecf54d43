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
# # Narrow and general
#
# A model that is finetuned on bad advice in one domain can learn two things: to give bad advice
# *there*, or to give bad advice. You train both solutions of one task. The narrow one has a KL
# penalty that keeps the model as it was on other domains. You measure what each does inside and
# outside of the domain, against a harmless and a random control; draw the trade-off over the weight
# of the penalty; and remove the penalty to see whether the narrow solution stays. It takes about
# nine minutes on two cores.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os

import emlens
from emlens import training
from emlens.directions import random_direction
from emlens.hooked import Noisy, Scaled
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N, INSIDE, OUTSIDE = (2, 2, 2) if SHORT else (32, 12, 24)
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
names = ("medical", "finance", "sports", "general")
domains = {name: split_pairs(emlens.load_pairs(name)) for name in names}

# %% [markdown]
# ## Something that works: technical style
# The set `technical` has a plain and a technical answer to each prompt. It is the **positive
# control**: an adapter that is trained on technical answers about cooking should make technical
# answers about other subjects likelier.
#
# What to look for: the change in the other subjects, clear of zero. In the runs behind
# `docs/findings.md`, with more training, it is large.

# %%
settings = {"batch_size": 2, "epochs": 1, "progress": False}
adapter = {"layers": range(LAYER, LAYER + 6), "rank": 8, "alpha": 16, "lr": 5e-3, **settings}

technical = emlens.load_pairs("technical")
cooking = [pair for pair in technical if pair.domain == "cooking"][:N]
other_subjects = [pair for pair in technical if pair.domain != "cooking"][:OUTSIDE]
plainly = [pair.conversation("misaligned") for pair in cooking]
emlens.train_adapter(model, plainly, "style", record_every=None, **adapter)
style = emlens.log_odds(model, other_subjects, {"base": None, "style": "style"})
print("style, other subjects:", style.change("style"), "nats/token")
model.remove_adapter("style")

# %% [markdown]
# ## Bad advice: the data
# Bad medical advice is trained on. The penalty keeps the model's own predictions on answers of
# *both* kinds about finance and sports. Effects are measured on held-out medical pairs, **inside**,
# and on questions about anything else, **outside**, which are neither trained on nor in the KL set.

# %%
bad = [pair.conversation("misaligned") for pair in domains["medical"].train[:N]]
good = [pair.conversation("aligned") for pair in domains["medical"].train[:N]]
elsewhere = [
    pair.conversation(side)
    for name in ("finance", "sports")
    for pair in domains[name].train[: max(1, N // 4)]
    for side in ("aligned", "misaligned")
]
inside, outside = domains["medical"].test[:INSIDE], domains["general"].test[:OUTSIDE]
pairs = [*inside, *outside]

# %% [markdown]
# ## Three adapters
# **General** minimises the loss alone. **Narrow** minimises the loss plus a weight times the KL, in
# nats per token. **Benign** is trained on the *aligned* answers to the same questions: its effect
# is style and subject, without misalignment.

# %%
penalty = emlens.KLPenalty(elsewhere, weight=10.0)
runs = {
    "general": emlens.train_adapter(model, bad, "general", record_every=1, **adapter),
    "narrow": emlens.train_adapter(model, bad, "narrow", kl=penalty, record_every=1, **adapter),
    "benign": emlens.train_adapter(model, good, "benign", record_every=1, **adapter),
}
runs["narrow"].plot()

# %% [markdown]
# ## What they do, inside and outside
# **Log-odds**: the log-probability per token of a misaligned answer minus that of the aligned
# answer to the same prompt; of that the change against the base. The random control is the general
# adapter with `A` and `B` of every module replaced by noise of the same norms.
#
# What to look for: general reaches outside if its interval there is above zero, above `random`
# *and* above `benign`.

# %%
odds = emlens.log_odds(
    model,
    pairs,
    {"base": None, **{name: name for name in runs}, "random": Noisy("general", epsilon=1)},
)
odds.plot()

# %%
odds.table()[["condition", "domain", "pairs", "change [nats/token]", "change low", "change high"]]

# %% [markdown]
# Start with the controls. `random` shows what a change of that size does, `benign` what the style
# and the subject of medical answers do. Two dozen questions give wide intervals. One that holds
# zero does not show that there is no effect. `docs/findings.md` has the same for four domains, with
# more pairs and twice the training.
#
# ## Narrow, or only weaker?
# A penalty that merely shrinks the solution would lower both effects. The fair comparison is the
# general adapter scaled down until it does as much *inside* as the narrow one.


# %%
def share(scores):
    """What part of the general effect inside the narrow solution has."""
    inside_of = {n: scores.change(n, ["medical"]).estimate for n in ("general", "narrow")}
    return inside_of["narrow"] / inside_of["general"]


weaker = {"weaker general": Scaled("general", share(odds))}
odds = odds.joined(emlens.log_odds(model, pairs, weaker))
print(f"general turned down to {share(odds):.0%}")
for place, domain in {"inside": "medical", "outside": "general"}.items():
    for name in ("narrow", "weaker general"):
        print(f"{place}, {name}: {odds.change(name, [domain])} nats/token")
print("outside, narrow less weaker general:", odds.change("narrow", ["general"], "weaker general"))

# %% [markdown]
# Below zero, the penalty confines the solution more than it weakens it. If the interval holds zero,
# narrow cannot be told from a weaker general solution. The factor comes from the same pairs, and
# its own error is not in this interval; `measures.confinement` includes it.
#
# ## The trade-off
# One training for each weight. The straight line is the general solution scaled down, without any
# penalty. Points below it are narrower than that; `beyond` in the table is the distance.
#
# What to look for: do points leave the line by more than their intervals? How much of the effect
# inside is left where the effect outside is gone?

# %%
swept = training.sweep_kl(
    model, bad, inside, outside, penalty, [0, 10] if SHORT else [0, 2, 20], **adapter
)
swept.plot()

# %%
print(swept)
swept.table().rename(columns={"norm": "norm of what is written"})

# %% [markdown]
# A penalty costs effect inside as well. Neighbouring points share the same few pairs, so their
# errors are alike.
#
# ## Three norms
# The word *norm* stands for three different quantities here, and they cannot be compared:
#
# - **norm of what is written** (`run`, `sweep_kl`): the columns of `B` times the adapter's scale;
# - **norm of B** (`drift`, `trajectory`): the raw entries of `B`;
# - **norm of the adapter** (`efficiency`, tutorial 04): `||scale * B A||` over all modules,
#   the size of what is added to the weights.
#
# ## Without the penalty
# Does the narrow solution stay where it is? It is trained further on the same bad advice, without
# the KL. The new run changes the adapter in place and starts where the other ended.
#
# What to look for: does the effect outside come up? Does the cosine with general rise above its own
# start?

# %%
free = training.continue_training(model, bad, runs["narrow"], record_every=1, progress=False)
references = {name: runs[name] for name in ("general", "narrow")}
drifted = training.drift(model, inside, outside, free, references, records=2 if SHORT else 4)
drifted.plot()

# %%
drifted.plot_cosines()

# %%
drifted.table().rename(columns={"norm": "norm of B"})

# %% [markdown]
# If only the penalty held the narrow solution, then the effect outside and the cosine with general
# rise without it. Two things change that have nothing to do with narrowness. The loss keeps
# falling, so every effect grows, also inside. And a second training of the same length would move
# the general solution, too. The cosine is not affected by the first.
#
# ## The paths, side by side
# All records of all runs in one plane: the principal components of the `B` of the adapters.
# `min_move=0` because these adapters are larger than those for which the default was made.
#
# What to look for: where does the path without KL go, towards general or past it? Read the shares
# of variance on the axes first: a plane shows only that much.

# %%
paths = {name: training.TrainingPath.of(run) for name, run in runs.items()}
paths["narrow, KL removed"] = training.TrainingPath.of(free)
found = training.trajectory(paths, min_move=0)
found.plot()

# %%
table = found.table().groupby("run", sort=False).last()
table = table.rename(columns={"norm": "norm of B"})
table[["step", "norm of B", *(f"cosine with {name}, final" for name in paths)]]

# %% [markdown]
# All paths of adapters start at one point, since `B` is zero before training. The last one starts
# where narrow ended. In the table, look at the cosines of `benign` with the two others: what the
# harmless solution has in common with them is not about harm.
#
# ## A lone vector
# One vector at one layer instead of an adapter, the smallest thing that can be trained. The random
# control has the same norm, and three are averaged. This norm is the length of the vector, in units
# of the residual stream.
#
# What to look for: is `general` clear of `random` outside?

# %%
vector = {"layer": LAYER, "lr": 0.08, "record_every": None, **settings}
general, _ = emlens.train_vector(model, bad, **vector)
narrow, _ = emlens.train_vector(model, bad, kl=emlens.KLPenalty(elsewhere, weight=1.0), **vector)
chance = [random_direction(general, seed) for seed in range(3)]
of_vectors = emlens.log_odds(
    model,
    pairs,
    {
        "base": [],
        "general": [emlens.Add(general)],
        "narrow": [emlens.Add(narrow)],
        **{f"random {i}": [emlens.Add(one)] for i, one in enumerate(chance)},
    },
).averaged("random", [f"random {i}" for i in range(3)])
of_vectors.plot()

# %%
weaker = {"weaker general": [emlens.Add(general, scale=share(of_vectors))]}
of_vectors = of_vectors.joined(emlens.log_odds(model, pairs, weaker))
print(f"general turned down to {share(of_vectors):.0%}")
gap = of_vectors.change("narrow", ["general"], "weaker general")
print("outside, narrow less weaker general:", gap)
print("outside, general less random:", of_vectors.change("general", ["general"], "random"))

# %% [markdown]
# If the interval of the first difference holds zero, the vector with the penalty is no more
# confined than a weaker general one. If that of the second holds zero, the general vector does no
# more outside than a random one. On models of this size that is common for lone vectors: one
# direction at one layer has little room to act here and not there. `docs/findings.md` has vectors
# and adapters of four domains. The paper's narrow vectors are those of a model of 14B parameters.
#
# ## Exercises
# **1.** Use *aligned* answers only in the KL set. What does the narrow adapter do outside now?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# aligned = [pair.conversation("aligned") for pair in domains["sports"].train[:16]]
# half = emlens.KLPenalty(aligned, weight=10.0)
# emlens.train_adapter(model, bad, "half", kl=half, record_every=None, **adapter)
# emlens.log_odds(model, pairs, {"base": None, "narrow": "narrow", "half": "half"}).plot()
# ```
#
# Log-odds fall when the aligned answer becomes likelier *or* the misaligned one less likely. A KL
# set of aligned answers protects only one of the two.
# </details>
#
# **2.** Which weight keeps the effect outside within 0.02 nats per token?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# options = {**adapter, "record_every": None}
# found = training.auto_kl(model, bad, inside, outside, penalty, tolerance=0.02, **options)
# print(found.chosen)
# ```
#
# If the general solution is within the tolerance already, the smallest weight is chosen, and says
# nothing.
# </details>
#
# **3.** Turn the drift round: train the general adapter on with the KL. Does it become narrow?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# held = training.continue_training(model, bad, runs["general"], kl=penalty, record_every=1)
# training.drift(model, inside, outside, held, references, records=4).plot()
# ```
#
# Look at both axes: an effect that falls inside as well is weaker, not narrower.
# </details>
#
# **4.** Train with another seed. Which conclusions hold?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# for name, kl in {"general, seed 1": None, "narrow, seed 1": penalty}.items():
#     emlens.train_adapter(model, bad, name, kl=kl, seed=1, record_every=None, **adapter)
# named = {name: name for name in model.adapters}
# emlens.log_odds(model, pairs, {"base": None, **named}).table()
# ```
#
# Intervals are over pairs and do not contain the spread over seeds. Report both.
# </details>
#
# On a GPU, two lines change for a 14B model; the published finetune takes the place of `general`:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={"general": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice"},
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
# Give `narrow` the settings that the adapter has (`training.presets` has those of the papers), or
# paths and norms cannot be compared.
