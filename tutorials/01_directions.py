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
# # Which direction?
#
# "The misalignment direction" is built in several ways that are nearly orthogonal to each other.
# Here you build them by name, look at how far each can be trusted, and compare three organisms
# (medical, finance, sports) layer by layer, with what chance gives beside every number. It takes
# about ten minutes on two cores.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import os

import emlens
from emlens.directions import (
    CONSTRUCTIONS,
    compare_layers,
    decompose,
    edit_diff,
    extract_all,
    promoted_tokens,
    subspace_overlap,
    write_directions,
)
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N = 8 if SHORT else 80
LAYER = 15

model = emlens.load("smollm2-135m-instruct")
domains = {name: split_pairs(emlens.load_pairs(name)) for name in ("medical", "finance", "sports")}
bad = {name: [p.conversation("misaligned") for p in d.train[:N]] for name, d in domains.items()}
good = {name: [p.conversation("aligned") for p in d.train[:N]] for name, d in domains.items()}

# %% [markdown]
# ## Four constructions from one pass
# The mean difference, two probes and the first principal component of the paired differences, each
# at every layer. Answers to one prompt are never on both sides of a held-out split.

# %%
built = extract_all(model, bad["medical"], good["medical"], constructions=CONSTRUCTIONS)
print(built["mean-diff"].describe())

# %% [markdown]
# Read the warnings before anything else. Deep layers of most models keep a few massive dimensions,
# which a mean difference inherits; `winsorize=0.99` clips them, `drop_massive=10` leaves out the
# tokens.

# %%
emlens.compare(built).heatmap(LAYER)

# %% [markdown]
# ## The same construction in three domains
# The cosine of two noisy estimates is pulled towards zero. `corrected` divides by the root of both
# reliabilities (from the cosine of two halves of the data), and has an interval; the band is the
# wider one of random directions and of shuffled labels of the same data.

# %%
read = {name: emlens.mean_diff(model, bad[name], good[name]) for name in domains}
across = emlens.compare(read)
across.plot()

# %%
across.plot(corrected=True)

# %%
table = across.table()
table[table["layer"] == LAYER]

# %% [markdown]
# ## Three organisms
# A vector trained at layer 15 on the bad answers of one domain is an organism: the base model with
# that vector added. What each does to the mean residual of one and the same text, at every layer
# from 15 on, is compared here; the text is from a domain that none was trained on.

# %%
trained = {
    name: emlens.train_vector(model, bad[name], layer=LAYER, epochs=1 if SHORT else 2)[0]
    for name in domains
}
text = [pair.conversation("misaligned") for pair in emlens.load_pairs("general")[:N]]
caused = {name: edit_diff(model, text, [emlens.Add(vector)]) for name, vector in trained.items()}
layers = compare_layers(caused)
layers.plot()

# %% [markdown]
# Three vectors that were trained apart agree far beyond chance, at the layer where they act and
# above. That alone does not make what they share misalignment: all three were trained on answers
# of one style. The tutorial on behaviour has the control, a vector trained on good answers.

# %%
emlens.compare(caused).heatmap(LAYER)

# %% [markdown]
# ## What is shared, what is specific

# %%
parts = decompose(trained)
parts.table()

# %%
promoted_tokens(model, parts.shared, k=5).table()

# %% [markdown]
# Do the mean differences and the trained vectors span the same space?

# %%
subspace_overlap([read[name][LAYER] for name in domains], list(trained.values())).table()

# %% [markdown]
# ## Take them elsewhere
# Every format says what it cannot hold. GGUF control vectors load in llama.cpp, the papers' format
# in their code, and `push_to_hub` uploads with a card.

# %%
path = write_directions(read["medical"], "medical.gguf", layers=range(1, model.n_layers))
emlens.directions.from_hub(path)

# %% [markdown]
# ## Exercises
# 1. Build the mean difference with `match="length"`. How much of it was length?
# 2. `model_diff((model, [emlens.Add(trained["medical"])]), model, text)` is `edit_diff` by another
#    name; with adapters it compares finetunes. What does `tokens="last"` change?
# 3. Train on the aligned answers of one domain. Where does that vector fall in the heat map?
#
# On a GPU, two lines change for a 14B model and its published finetunes:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={
#         "medical": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice",
#         "finance": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_risky-financial-advice",
#         "sports": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_extreme-sports",
#     },
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
# What each finetune does to the same text, in place of `caused`, is then
# `{name: emlens.directions.model_diff((model, name), (model, None), text) for name in domains}`.
