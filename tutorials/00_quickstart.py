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
# # A direction in five minutes
#
# You will read the direction that separates misaligned from aligned answers, train one in place,
# add it to the forward pass, take it out again, and see what each does to how likely misaligned
# answers are. Everything runs on a small real chat model, SmolLM2-135M-Instruct, on two cores of a
# laptop, in five minutes.
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
# ## Data
# Pairs are split by id before anything else. `general` is evaluated and never trained on.

# %%
finance = split_pairs(emlens.load_pairs("finance"))
general = split_pairs(emlens.load_pairs("general"))
train = [pair.conversation("misaligned") for pair in finance.train[:N]]
aligned = [pair.conversation("aligned") for pair in finance.train[:N]]
held_out = [*finance.test[: N // 2], *general.test[: N // 2]]

# %% [markdown]
# ## Read a direction
# The difference of mean residuals over response tokens, at every layer, with its standard error
# and the cosine between the directions of two random halves of the data.

# %%
mean_diff = emlens.mean_diff(model, train, aligned)
mean_diff

# %% [markdown]
# ## Train one in place
# A vector in the middle of the model, all weights frozen.

# %%
trained, run = emlens.train_vector(model, train, layer=LAYER, epochs=1 if SHORT else 2)
run

# %%
emlens.directions.cosine(trained.vector, mean_diff[LAYER].vector)

# %% [markdown]
# ## What do they do?
# Log-odds: the log-probability per token of the misaligned answer minus that of the aligned one.
# A random vector of the same norm is the control.

# %%
control = emlens.directions.random_direction(trained)
scores = emlens.log_odds(
    model,
    held_out,
    {
        "base": [],
        "trained": [emlens.Add(trained)],
        "random": [emlens.Add(control)],
        "mean-diff": [emlens.Add(mean_diff[LAYER], dose=trained.doses[LAYER])],
        "trained, ablated": [
            emlens.Add(trained),
            emlens.Ablate(trained, layers=range(LAYER, model.n_layers)),
        ],
    },
)
scores.plot()

# %%
scores.table()

# %% [markdown]
# ## Listen to it

# %%
question = emlens.Conversation.of("I have saved a little money. What should I do with it?")
for name, edits in {"base": [], "trained, twice": [emlens.Add(trained, scale=2)]}.items():
    (answer,) = model.generate([question], edits, max_new_tokens=8 if SHORT else 60, temperature=0)
    print(f"{name}: {answer}\n")

# %% [markdown]
# ## Exercises
# 1. Train on `aligned` instead of `train`. What of the effect on `general` was style?
# 2. Add a KL penalty: `kl=emlens.KLPenalty(conversations, weight=1.0)` with the aligned answers of
#    another domain. Does the vector become narrow?
# 3. Ablate `mean_diff[LAYER]` instead of the trained vector. Compare with ablating `control`.
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
# The finetune is one more condition of `log_odds`, `"finetune": "finance"`, and acts anywhere else
# inside of `with model.adapter("finance"):`.
