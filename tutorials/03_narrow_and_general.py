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
# *there*, or to give bad advice. You will train both solutions of one task, the narrow one with a
# KL penalty that protects everything else; see what each does inside and outside of the domain,
# against a harmless and a random control; draw the trade-off that the weight of the penalty makes;
# and take the penalty away to see whether the narrow solution stays. It takes about eight minutes
# on two cores.
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
# ## Data
# Bad medical advice is trained on. The penalty holds the model to its own predictions on answers
# of *both* kinds about finance and sports. What is measured are held-out medical pairs, **inside**,
# and questions about anything else, **outside**, which are neither trained on nor protected.

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
# **General** minimises the loss alone. **Narrow** minimises the loss plus the KL, in nats per
# token, times a weight. **Benign** is trained on the *aligned* answers to the same questions: what
# it does is style and subject, and no misalignment.

# %%
settings = {"batch_size": 2, "epochs": 1, "progress": False}
adapter = {"layers": range(LAYER, LAYER + 6), "rank": 8, "alpha": 16, "lr": 5e-3, **settings}
penalty = emlens.KLPenalty(elsewhere, weight=10.0)
runs = {
    "general": emlens.train_adapter(model, bad, "general", record_every=1, **adapter),
    "narrow": emlens.train_adapter(model, bad, "narrow", kl=penalty, record_every=1, **adapter),
    "benign": emlens.train_adapter(model, good, "benign", record_every=1, **adapter),
}
runs["narrow"].plot()

# %% [markdown]
# ## What they do, inside and outside
# **Log-odds**: the log-probability per token of a misaligned answer less that of the aligned answer
# to the same prompt, and of that the change against the base. The random control is the general
# adapter with `A` and `B` of every module turned into noise, their norms kept.

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
# Read it from the controls. What `random` does is what any change of that size does; what `benign`
# does is the style and the subject of medical answers. The general solution reaches outside where
# its interval outside is above zero *and* above both of them. Here general does much inside, narrow
# a fifth of that, and neither is clear of zero outside. Two dozen questions give wide intervals:
# where one holds zero, that is the result, and no proof that nothing is there. The page of
# findings, `docs/findings.md`, has the same for four domains, with more pairs and twice the
# training.
#
# ## Narrow, or only weaker?
# A penalty that merely shrinks the solution would lower both effects. The honest comparison is the
# general adapter turned down until it does as much *inside* as the narrow one.


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
# Below zero, the penalty confines more than it weakens; an interval that holds zero says that no
# more can be seen than a weaker general solution would show, as here. The factor comes from the
# same pairs, and its own error is not in the interval; `docs/findings.md` draws it anew with the
# pairs.
#
# ## The trade-off
# One training for each weight. The straight line is the general solution turned down, without any
# penalty; what lies below it is narrower than that. `beyond` in the table is the distance.

# %%
swept = training.sweep_kl(
    model, bad, inside, outside, penalty, [0, 10] if SHORT else [0, 2, 20], **adapter
)
swept.plot()

# %%
print(swept)
swept.table()

# %% [markdown]
# A penalty costs effect inside as well, so the curve runs to the left as it falls. Look at how much
# of the inside is left where the outside is gone, and whether the points leave the straight line by
# more than their bands. At weight 2 the distance holds zero; at 20 it is below, by little, and an
# eighth of the inside is left. One training for each weight, and the same few pairs, make
# neighbouring points alike in their errors.
#
# ## Without the penalty
# Is the narrow solution a place to stay? It is trained on, on the same bad advice, without the KL.
# The new run changes the adapter where it is, and starts where the other ended.

# %%
free = training.continue_training(model, bad, runs["narrow"], record_every=1, progress=False)
references = {name: runs[name] for name in ("general", "narrow")}
drifted = training.drift(model, inside, outside, free, references, records=2 if SHORT else 4)
drifted.plot()

# %%
drifted.plot_cosines()

# %%
drifted.table()

# %% [markdown]
# If the narrow solution was held in place by the penalty alone, then without it the effect outside
# comes up, and the cosine with the general solution with it. Two things drift here that have
# nothing to do with narrowness, though: the loss goes on falling, so that everything grows, the
# inside, too; and a second training of the same length moves on from the general solution as well,
# where that were trained on. The cosine is free of the first. What it is compared with is its own
# start, the cosine between the two solutions.
#
# Here the effect inside is back at that of general within five updates. Outside little comes up, as
# little as general has there, and the cosine with general stays where it was: without the penalty
# the solution becomes as strong, and does not turn towards the other.
#
# ## The paths, side by side
# All records of all runs in one plane: the principal components of the `B` of the adapters.
# `min_move=0` because these adapters are larger than the ones that the default was made for.

# %%
paths = {name: training.TrainingPath.of(run) for name, run in runs.items()}
paths["narrow, KL removed"] = training.TrainingPath.of(free)
found = training.trajectory(paths, min_move=0)
found.plot()

# %%
table = found.table().groupby("run", sort=False).last()
table[["step", "norm", *(f"cosine with {name}, final" for name in paths)]]

# %% [markdown]
# All paths of adapters start at one point, since `B` is zero before training; the last starts where
# the narrow one ended. A plane shows where paths go only as far as its two components hold the
# variance, which the axes say. Set free, narrow goes on in the direction in which it went, past
# general and not into it. In the table, look at the cosine of `benign` with the two others, here
# about a half and a third: what the harmless solution has in common with them is not about harm.
#
# ## A lone vector
# One vector at one layer in place of an adapter, the smallest thing that can be trained. Its random
# control has the same norm, and three are averaged.

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
# confined than a weaker general one; here it does, and general itself does no more outside than
# random vectors. On models of this size that is the rule for lone vectors, and
# `docs/findings.md` has it domain by domain, adapters beside them: one direction at one layer has
# little room to do something here and nothing there. The paper's narrow vectors are those of a
# model of 14B parameters.
#
# ## Exercises
# 1. Protect with *aligned* answers only. What does the narrow adapter do outside now?
# 2. `training.auto_kl(..., tolerance=0.02)` finds the smallest weight that keeps the effect outside
#    within a tolerance. Which is it for adapters, and is there one for a vector?
# 3. Turn the drift round: `continue_training(model, bad, runs["general"], kl=penalty)`. Does the
#    general solution become narrow, or does it stay where it is?
# 4. Train with `seed=1`. Which of the sentences above stand?
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
