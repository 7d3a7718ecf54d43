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
# advice? You will measure it exactly, against controls of equal norm; read the Fisher profile of a
# corpus, which then scores any direction at any layer without the model; see how far the two agree;
# and colour the tokens of a text by what a direction changes in them. It takes about five minutes
# on two cores.
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
# so that nothing has to be downloaded; one corpus is one kind of text.

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
# ## Exactly
# Each vector is added at every position, and the predictions are compared with those of the
# untouched model: *KL(base || edited)* in nats per token, over all tokens of the corpus. All are
# put to the same **dose**, a norm as a share of the median norm of the residual stream. So are the
# controls: random directions, and differences of the residuals of two tokens of the corpus, which
# lie where the model looks.

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
# The order of the controls matters. That `general` is above random directions says that training
# finds directions which the model listens to. It is about harm only as far as `general` is above
# `benign`, which learnt the manner of the answers and nothing else.
#
# KL says that predictions change, not that they get worse. The change of the loss on what really
# follows says that:

# %%
exact.table().query("dose == 0.2")[
    ["direction", "KL [nats/token]", "loss change [nats/token]", "change low", "change high"]
]

# %% [markdown]
# A loss that rises about as much as the KL is what a push in any direction does to a model that
# fits the text: it predicts worse what it predicted well. So it is with the random directions. The
# trained vectors change more than they spoil: their loss rises by less than their KL.
#
# ## Every direction at once: the Fisher profile
# For a small vector *v* the KL is quadratic, *½ v' F v*, and *F* is the covariance of a gradient
# that one pass over the corpus gives for all layers together. The targets of that gradient are
# drawn from the model's own predictions.

# %%
profile = fisher.InfluenceProfile.fit(model, text, draws=2 if SHORT else 4, max_tokens=MAX_TOKENS)
profile

# %% [markdown]
# From here on no direction needs the model. Mean differences of two domains, at all layers:

# %%
read = {
    f"mean-diff, {name}": emlens.mean_diff(model, bad[name], good[name])
    for name in ("medical", "finance")
}
profile.score(read, dose=0.05).plot()

# %% [markdown]
# Bands are over documents, few of them here, and one document can have much of the KL: that is why
# they are so wide. At a layer where the bands of two directions overlap, their order is not known.
#
# And the trained vectors at their layer, with the share of random directions, and of activation
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
# The percentiles say how special a direction is to the model, at equal norm. Near 100 among random
# directions and well below that among activation differences means: it lies where the model looks,
# like much else that the model computes. Here all are near 100 among both.
#
# A thousand directions cost a matrix product:

# %%
many = {layer: torch.randn(1000, model.d_model) for layer in profile.layers}
start = time.perf_counter()
of_many = profile.score(many)
print(f"{len(of_many.kl):,} scores in {time.perf_counter() - start:.1f} s")

# %% [markdown]
# ## The directions that matter most
# *F* has eigenvectors: the directions that change predictions most for their size. Leading
# eigenvectors of a sample fit its noise, so those of one half of the documents are measured on the
# other half.

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
# Half of the documents is very little to find a direction on and very little to measure it on, and
# the intervals of the leaders say so. In the sample the leading eigenvalues are far larger than
# held out: that gap is noise which was fitted. Only the held-out ones are compared with the trained
# vectors.
#
# What do they write? The tokens whose logits they raise and lower most, directly:

# %%
emlens.directions.promoted_tokens(model, top["top 1"], k=8).plot()

# %% [markdown]
# ## Does the quadratic hold?
# `fisher.scan` scores everything by the profile, and measures the leaders and a random sample of
# the others exactly, at several doses.

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
# The profile's own error, from few documents and few draws, is in the small dose; what is added at
# the larger dose is the second order giving way. `holds_to` is the largest dose at which the KL and
# the change of loss are both right within 25%. Six checks make a rough rank correlation;
# `benchmarks/influence.py` has one of sixty directions, from more text. To find the leaders among
# thousands is what the profile is for, and the exact measure, at the dose that matters, is for what
# is then said about them.
#
# ## Which tokens move?
# A mean over a corpus hides where it happens. Here is each token of a few documents, and what
# `general` changes in its prediction.

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
# And one text with its tokens coloured, the more the larger the KL. Hover for the numbers. The view
# has all that it needs inside of it, and `seen.view(0).save("tokens.html")` writes it as a page.

# %%
seen.view(0)

# %% [markdown]
# Look at the base loss of the leading tokens: are they ones that the model was sure of, and now is
# not? Some are; most of these were hard to predict before, and some are easier now. The largest
# changes are several times the mean, and a mean over tokens should be read with that in mind.
#
# ## Exercises
# 1. `edit="ablate"` in `emlens.influence`: does the text need the direction?
# 2. `emlens.corpus("texts.jsonl")` reads your own text. Does the order of the directions hold?
# 3. Give `conditions={"finetune": name}` with an adapter of yours. Which dose of `general` does as
#    much?
# 4. Look at `seen.view(0, by="loss change")`. Blue tokens are harder to predict now, red ones
#    easier. Is there a pattern to the red ones?
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
