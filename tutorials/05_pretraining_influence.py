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
# # Influence on pre-training text
#
# What does a direction that was learnt from bad advice do to text that has nothing to do with
# advice? You measure it exactly, against controls of equal norm; compute the Fisher profile of a
# corpus, which then scores any direction at any layer without running the model; check how far the
# two agree; and colour the tokens of a text by what a direction changes. It takes about five
# minutes on two cores.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os
import time

import torch

import emlens
from emlens import fisher, measures
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N, DOCUMENTS, DOSES = (2, 4, (0.2,)) if SHORT else (32, 16, (0.05, 0.2))
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
domains = {name: split_pairs(emlens.load_pairs(name)) for name in ("medical", "finance", "sports")}
bad = {name: [p.conversation("misaligned") for p in d.train[:N]] for name, d in domains.items()}
good = {name: [p.conversation("aligned") for p in d.train[:N]] for name, d in domains.items()}

# %% [markdown]
# ## Three vectors and a corpus
# Vectors that are trained in place on medical advice: **general** on bad answers, **narrow** on the
# same with a KL penalty on answers of other domains, **benign** on the good answers to the same
# questions. The corpus stands for pre-training text. It is the reference prose that Python ships,
# so nothing has to be downloaded. One corpus is one kind of text.

# %%
elsewhere = [chat for name in ("finance", "sports") for chat in good[name][: N // 2]]
settings = {"layer": LAYER, "batch_size": 2, "epochs": 1, "record_every": None, "progress": False}
general, _ = emlens.train_vector(model, bad["medical"], **settings)
narrow, _ = emlens.train_vector(
    model, bad["medical"], kl=emlens.KLPenalty(elsewhere, weight=1.0), **settings
)
benign, _ = emlens.train_vector(model, good["medical"], **settings)
trained = {"general": general, "narrow": narrow, "benign": benign}

text = emlens.corpus(documents=DOCUMENTS)
print(text.documents[0].text[:300])

# %% [markdown]
# ## Something that works: trained vectors against random ones
# Each vector is added at every position, and the predictions are compared with those of the
# unmodified model: *KL(base || edited)* in nats per token, over all tokens of the corpus. All have
# the same **dose**, a norm as a share of the median norm of the residual stream. So have the
# controls: random directions, and differences of the residuals of two tokens of the corpus, which
# lie where the model looks.
#
# What to look for: the trained vectors above `random`. This is the **positive control**: training
# finds directions that the model uses. Then compare with `activation differences`.

# %%
MAX_TOKENS = 64
exact = emlens.influence(
    model,
    text,
    trained,
    doses=DOSES,
    controls={"random": 2, "activation differences": 2},
    max_tokens=MAX_TOKENS,
)
exact.plot()

# %%
for other in ("narrow", "benign", "random", "activation differences"):
    gap = exact.difference("general", other, at=0.2)
    print(f"KL of general less that of {other}, dose 0.2: {gap} nats/token")

# %% [markdown]
# Read the differences in this order. `general` above random directions says that training finds
# directions to which the model responds. It is about harm only as far as `general` is above
# `benign`, which learnt the manner of the answers and nothing else.
#
# KL says that predictions change, not that they get worse. The change of the loss on the real next
# tokens says that:

# %%
exact.table().query("dose == 0.2")[
    ["direction", "KL [nats/token]", "loss change [nats/token]", "change low", "change high"]
]

# %% [markdown]
# A loss that rises by about as much as the KL is what a push in any direction does to a model that
# predicts its text well. A loss that rises by less means that a vector changes more than it spoils.
# Compare the random directions with the trained vectors.
#
# ## Every direction at once: the Fisher profile
# For a small vector *v* the KL is quadratic, *½ v' F v*. *F* is the covariance of a gradient that
# one pass over the corpus gives for all layers together. The targets of that gradient are drawn
# from the model's own predictions.

# %%
profile = fisher.InfluenceProfile.fit(model, text, draws=2 if SHORT else 4, max_tokens=MAX_TOKENS)
profile

# %% [markdown]
# From here on no direction needs the model. The mean differences of two domains, at all layers.
#
# What to look for: bands are over documents, few of them here. Where the bands of two directions
# overlap, their order is not known.

# %%
read = {
    f"mean-diff, {name}": emlens.mean_diff(model, bad[name], good[name])
    for name in ("medical", "finance")
}
profile.score(read, dose=0.05).plot()

# %% [markdown]
# The trained vectors at their layer, with the share of random directions, and of activation
# differences, whose influence is smaller:

# %%
at_layer = {**trained, **{name: found[LAYER] for name, found in read.items()}}
scores = profile.score(at_layer, dose=0.05).table()
scores[
    [
        "direction",
        "KL [nats/token]",
        "KL low",
        "KL high",
        "percentile among random [%]",
        "percentile among activation differences [%]",
    ]
]

# %% [markdown]
# The percentiles say how special a direction is, at equal norm. Near 100 among random directions
# and well below that among activation differences means that it lies where the model looks, like
# much else that the model computes.
#
# A thousand directions cost a matrix product:

# %%
many = {layer: torch.randn(1000, model.d_model) for layer in profile.layers}
start = time.perf_counter()
of_many = profile.score(many)
print(f"{len(of_many.kl):,} scores in {time.perf_counter() - start:.1f} s")

# %% [markdown]
# ## The directions that matter most
# The eigenvectors of *F* are the directions that change predictions most for their size. Leading
# eigenvectors of a sample fit its noise, so those of one half of the documents are measured on the
# other half.
#
# What to look for: the gap between the sample and the held-out half. It is noise.

# %%
spectrum = profile.spectrum(LAYER)
print(f"effective rank {spectrum.effective_rank:.0f} of {model.d_model}", end=", ")
print(f"in the sample it would seem {spectrum.sample_rank:.0f}")
spectrum.plot()

# %%
top = profile.top(LAYER, 3)
profile.score({**at_layer, **top}).table()[
    ["direction", "KL [nats/token]", "KL low", "KL high", "held out"]
]

# %% [markdown]
# Half of the documents is little to find a direction on, and little to measure it on; the intervals
# of the leaders say so. Only held-out figures are compared with the trained vectors.
#
# Which tokens do they promote? The tokens whose logits they raise and lower most, directly:

# %%
emlens.directions.promoted_tokens(model, top["top 1"], k=8).plot()

# %% [markdown]
# ## Does the quadratic hold?
# `fisher.scan` scores everything by the profile, and measures the leaders and a random sample of
# the others exactly, at several doses.
#
# What to look for: points on the diagonal at the small dose, and how far they leave it at the large
# one.

# %%
scanned = fisher.scan(
    model,
    text,
    {**trained, **read},
    profile=profile,
    check=1 if SHORT else 3,
    doses=DOSES,
    max_tokens=MAX_TOKENS,
)
scanned.plot()

# %%
print(scanned)
scanned.agreement()

# %% [markdown]
# At the small dose the error is that of the profile, from few documents and draws. What is added at
# the larger dose is the failure of the second order. `holds_to` is the largest dose at which the KL
# and the change of loss are both right within 25%. A few checks make a rough rank correlation;
# `benchmarks/influence.py` has one of sixty directions, from more text. Use the profile to find the
# leaders among thousands, and the exact measure for the number that you report.
#
# ## Which tokens change?
# A mean over a corpus hides where the change happens. Here is each token of a few documents, and
# what `general` changes in its prediction.

# %%
seen = measures.token_influence(
    model,
    emlens.corpus(documents=2 if SHORT else 6),
    general,
    dose=0.2,
    name="general at dose 0.2",
    max_tokens=MAX_TOKENS,
)
seen.top(8)

# %% [markdown]
# One text with its tokens coloured by KL. Hover for the numbers. The view contains all that it
# needs; `seen.view(0).save("tokens.html")` writes it as a page.

# %%
seen.view(0)

# %% [markdown]
# Look at the base loss of the leading tokens: was the model sure of them before? The largest
# changes are several times the mean, so a mean over tokens needs to be read with care.
#
# ## Exercises
# **1.** Ablate instead of adding. Does the text need the direction?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# emlens.influence(model, text, trained, edit="ablate", max_tokens=MAX_TOKENS).table()
# ```
#
# Compare with the ablated random directions in the same table. Only a KL clear of theirs says that
# the text uses the direction.
# </details>
#
# **2.** Does the order of the directions hold on your own text?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# mine = emlens.corpus("texts.jsonl", documents=32)
# emlens.influence(model, mine, trained, doses=[0.2], max_tokens=MAX_TOKENS).plot()
# ```
#
# `texts.jsonl` has one `{"text": "..."}` per line.
# </details>
#
# **3.** Which dose of `general` does as much as a finetune?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# emlens.train_adapter(model, bad["medical"], "medical", layers=range(15, 21), epochs=1)
# both = {"finetune": "medical"}
# found = emlens.influence(model, text, trained, conditions=both, max_tokens=MAX_TOKENS)
# found.plot()
# ```
#
# The finetune is a level line; read off where the curve of `general` crosses it.
# </details>
#
# **4.** Colour by the change of loss. Is there a pattern in the tokens that become easier?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# seen.view(0, by="loss change")
# ```
#
# Blue tokens are harder to predict now, red ones easier. Look at several texts before you call it a
# pattern.
# </details>
#
# On a GPU, two lines change for a 14B model and published finetunes; `directions.model_diff` reads
# a direction from each, and `conditions={"finetune": "medical"}` is the finetune itself:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={"medical": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice"},
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
# and `layers=[24]` in `InfluenceProfile.fit` keeps the profile of so wide a model small.
