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
# "The misalignment direction" can be built in several ways, and the results differ. Constructions
# that read the same activations mostly agree. A vector that is trained in place is nearly
# orthogonal to them. Here you build directions by name, check how far each can be trusted, and
# compare three domains (medical, finance, sports) layer by layer, with the band of chance beside
# every number. It takes about ten minutes on two cores.
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
# ## Something that works: technical style
# The set `technical` has a plain and a technical answer to each prompt. The difference is easy to
# see, so a direction must find it: this is a **positive control**. A direction that is read from
# answers about cooking is used to tell answers about other subjects apart.
#
# What to look for: a held-out AUROC near 1 at home, and projections of technical answers (other
# subjects) above those of plain ones.

# %%
technical = emlens.load_pairs("technical")
cooking = [pair for pair in technical if pair.domain == "cooking"][:N]
elsewhere = [pair for pair in technical if pair.domain != "cooking"][:N]
style = emlens.mean_diff(model, cooking)
print(f"held-out AUROC in cooking, layer {LAYER}: {style.auroc.get(LAYER, float('nan')):.2f}")

means = {}
for side in ("misaligned", "aligned"):
    batches = model.batches([pair.conversation(side) for pair in elsewhere])
    unit, total, tokens = style[LAYER].unit().vector, 0.0, 0
    for batch in batches:
        read = model.residuals(batch, LAYER)[LAYER][batch.mask("response")]
        total, tokens = total + float((read @ unit).sum()), tokens + len(read)
    means[side] = total / tokens / style.residual_norms[LAYER]
print("mean projection on it in other subjects, median residual norms:")
print(f"technical {means['misaligned']:+.3f}, plain {means['aligned']:+.3f}")

# %% [markdown]
# ## Four constructions from one pass
# The mean difference, two probes and the first principal component of the paired differences, each
# at every layer. Answers to one prompt are never on both sides of a held-out split.

# %%
built = extract_all(model, bad["medical"], good["medical"], constructions=CONSTRUCTIONS)
print(built["mean-diff"].describe())

# %% [markdown]
# Read the warnings first. Deep layers of most models have a few massive dimensions, which a mean
# difference inherits. `winsorize=0.99` clips them; `drop_massive=10` leaves out the tokens.
#
# What to look for in the figure: all four read the same activations of the same texts. Which pairs
# are far from 1, and which from 0?

# %%
emlens.compare(built).heatmap(LAYER)

# %% [markdown]
# These constructions are related, and a probe differs from a mean difference by how it weighs
# dimensions that vary a lot. None of them says that the model *uses* the direction. The trained
# vectors further down are made in another way, and the last heat map compares the two.
#
# ## The same construction in three domains
# The cosine of two noisy estimates is pulled towards zero. `corrected` divides by the root of both
# reliabilities (from the cosine of two halves of the data), and has an interval. The band is the
# wider one of random directions and of shuffled labels of the same data.
#
# What to look for: at which layers do the curves leave the band?

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
# In early layers the band is wide: directions of shuffled labels agree with each other there, so a
# high cosine says little.
#
# ## Three organisms
# A vector trained at layer 15 on the bad answers of one domain makes an organism: the base model
# with that vector added. Each changes the mean residual of one and the same text, at every layer
# from 15 on. These changes are compared here, on text of a domain that none was trained on.
#
# What to look for: the blocks off the diagonal. Where do two organisms agree, and with which
# layers?

# %%
trained = {
    name: emlens.train_vector(model, bad[name], layer=LAYER, epochs=1 if SHORT else 2)[0]
    for name in domains
}
text = [pair.conversation("misaligned") for pair in emlens.load_pairs("general")[:N]]
caused = {name: edit_diff(model, text, [emlens.Add(vector)]) for name, vector in trained.items()}
layers = compare_layers(caused)
layers.plot()

# %%
emlens.compare(caused).heatmap(LAYER)

# %% [markdown]
# Vectors that were trained separately agree far beyond chance, at the layer where they act and
# above. What they share need not be misalignment: all were trained on answers in one style. The
# control is a vector trained on good answers (exercise 3).
#
# ## What is shared, what is specific

# %%
parts = decompose(trained)
parts.table()

# %%
promoted_tokens(model, parts.shared, k=5).table()

# %% [markdown]
# ## Read and trained directions
# Do the mean differences and the trained vectors span the same space? 90 degrees is orthogonal.

# %%
spans = subspace_overlap([read[name][LAYER] for name in domains], list(trained.values()))
row = spans.table().iloc[0]
print(f"smallest angle between the two spans: {row['smallest angle (degrees)']:.0f} degrees")
print(f"overlap {row['overlap']:.3f}, by chance up to {row['chance (95%)']:.3f}")

# %%
emlens.compare(
    {
        **{f"read, {name}": read[name][LAYER] for name in domains},
        **{f"trained, {name}": trained[name] for name in domains},
    }
).heatmap(LAYER)

# %% [markdown]
# Look at the corner where read meets trained. Where its cosines lie within the band of chance, both
# kinds of direction are reproducible across domains and have nothing to do with each other. A
# result about "the direction" has to say which one.
#
# ## Take them elsewhere
# Every format says what it cannot hold. GGUF control vectors load in llama.cpp, the papers' format
# in their code. `push_to_hub` uploads with a card.

# %%
path = write_directions(read["medical"], "medical.gguf", layers=range(1, model.n_layers))
emlens.directions.from_hub(path)

# %% [markdown]
# ## Exercises
# **1.** Build the mean difference with `match="length"`. How much of it was length?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# same_length = emlens.mean_diff(model, bad["medical"], good["medical"], match="length")
# emlens.compare({"all": read["medical"], "same length": same_length}).plot()
# ```
#
# A cosine near 1 means that length played no part. `emlens.directions.confounds` does this for
# length and prompt at once.
# </details>
#
# **2.** `model_diff` with an edit on one side is `edit_diff` by another name. What does
# `tokens="last"` change?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# from emlens.directions import model_diff
#
# steered = (model, [emlens.Add(trained["medical"])])
# last = model_diff(steered, model, text, tokens="last")
# emlens.compare({"answer": caused["medical"], "last": last}).plot()
# ```
#
# `"last"` reads the one token from which the answer starts, so fewer tokens count and the direction
# is noisier. At layer 15 both are the vector itself.
# </details>
#
# **3.** Train on the aligned answers of one domain. Where does that vector fall in the heat map?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# benign, _ = emlens.train_vector(model, good["medical"], layer=LAYER, epochs=2)
# emlens.compare({**trained, "benign": benign}).heatmap(LAYER)
# ```
#
# If its cosine with the bad vectors is about as high as theirs among each other, what they share is
# style.
# </details>
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
# Then `{name: emlens.directions.model_diff((model, name), (model, None), text) for name in
# domains}` takes the place of `caused`: what each finetune does to the same text.
