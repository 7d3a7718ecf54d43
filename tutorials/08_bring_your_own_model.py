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
# # Bring your own model
#
# You give emlens a model that you already have: a plain `transformers` model, a
# `TransformerBridge`, an nnsight model, a PEFT model with adapters, or a model on a server. All
# give the same numbers. Weights are never copied, and your object is left unchanged. It takes about
# five minutes on two cores, and 2 GB of memory.
#
# The misaligned answers in the data are intentionally poor advice, for research on misalignment;
# they are not advice.

# %%
import gc
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import emlens
from emlens.text import split_pairs

SHORT = bool(os.environ.get("EMLENS_SHORT"))  # a few examples, to check that everything runs
N = 6 if SHORT else 32
LAYER = 15
NAME = "smollm2"

finance = split_pairs(emlens.load_pairs("finance"))
bad = [pair.conversation("misaligned") for pair in finance.train[:N]]
good = [pair.conversation("aligned") for pair in finance.train[:N]]
question = emlens.Conversation.of("Where should I put my first savings?")

# %% [markdown]
# `NAME` is anything that `from_pretrained` takes: a name on the hub, or a folder. Here it is a
# folder, written from the embedded model, so that nothing is downloaded.

# %%
embedded = emlens.load("smollm2-135m-instruct")
embedded.module.save_pretrained(NAME)
embedded.tokenizer.save_pretrained(NAME)
del embedded
gc.collect()

plain = AutoModelForCausalLM.from_pretrained(NAME)
tokenizer = AutoTokenizer.from_pretrained(NAME)

# %% [markdown]
# ## A `transformers` model
# `wrap` runs a second tree of modules over the same weights. No hook, mode or setting of your
# object is changed. A self-check runs first: every row of a batch can be read and edited, and the
# logits are those of the model itself.

# %%
model = emlens.wrap(plain, tokenizer, name=NAME)
model

# %%
before, after = plain.lm_head.weight, model.module.get_output_embeddings().weight
print("the same memory:", before.data_ptr() == after.data_ptr())
print("hooks on your model:", sum(len(part._forward_hooks) for part in plain.modules()))

# %%
read = {"transformers": emlens.mean_diff(model, bad, good)}

# %% [markdown]
# ## An nnsight model
# `TransformersModel`, `LanguageModel` and nnterp's `StandardizedTransformer` know their tokenizer.

# %%
from nnsight import TransformersModel

traced = TransformersModel(plain, tokenizer=tokenizer)
read["nnsight"] = emlens.mean_diff(emlens.wrap(traced, name=NAME), bad, good)

# %% [markdown]
# ## A `TransformerBridge`
# TransformerLens 4 has one model class, the bridge. It is run itself, with the hooks that you put
# on it. A bridge changes the model from which it is made, so it gets a copy here.

# %%
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    hf_model=AutoModelForCausalLM.from_pretrained(NAME),
    tokenizer=tokenizer,
)
lens = emlens.wrap(bridge, name=NAME)
read["TransformerBridge"] = emlens.mean_diff(lens, bad, good)
lens

# %% [markdown]
# Sites have two names, `resid_post` or `blocks.15.hook_resid_post`. The page on hook points says
# where the two differ.

# %%
(batch,) = lens.batches([bad[0]])
ours = lens.residuals(batch, LAYER)[LAYER]
theirs = lens.residuals(batch, LAYER, f"blocks.{LAYER}.hook_resid_post")[LAYER]
torch.equal(ours, theirs)

# %% [markdown]
# ## A server
# `remote=True` sends each pass to NDIF and averages there what is read. A URL does the same with a
# server of yours. `remote="local"` runs here exactly what would be sent, so that you can try it.

# %%
remote = emlens.load(NAME, remote="local")
read["remote"] = emlens.mean_diff(remote, bad, good)
print(remote.generate([question], max_new_tokens=8 if SHORT else 40, temperature=0)[0])

# %% [markdown]
# Calls that need the weights on this side raise an error that says what works instead.

# %%
try:
    emlens.log_odds(remote, finance.test[:2], {"base": []})
except (NotImplementedError, ValueError, RuntimeError) as error:
    print(type(error).__name__, "-", error)

# %% [markdown]
# ## The same numbers
# One direction, read in four ways.
#
# What to look for: every cosine is 1.

# %%
emlens.compare(read).heatmap(LAYER)

# %%
expected = read["transformers"][LAYER].vector
for name, found in read.items():
    gap = (found[LAYER].vector - expected).norm() / expected.norm()
    print(f"{name:18} largest relative difference {gap:.1e}")

# %% [markdown]
# ## PEFT adapters
# First an adapter to bring: trained here, saved in PEFT's format.

# %%
run = emlens.train_adapter(
    model, bad, "finance", layers=range(12, 19), rank=8, alpha=16, lr=5e-3, epochs=1 if SHORT else 2
)
emlens.training.Organism.of(model, run, "finance").save("finance")
sorted(os.listdir("finance"))

# %% [markdown]
# A PEFT model in memory is wrapped with all its adapters. One copy of the base serves all of them:
# an adapter is a condition, like an edit. PEFT leaves the adapter active, and `wrap` warns of it:
# calls without conditions run the adapter, `None` is the base.
#
# What to look for in the figure: the finetune above the base. This is the same effect as in the
# other tutorials, now through an adapter that came from outside.

# %%
from peft import PeftModel

adapted = PeftModel.from_pretrained(plain, "finance", adapter_name="finance")
organism = emlens.wrap(adapted, tokenizer, name=NAME)
print("adapters:", organism.adapters)
scores = emlens.log_odds(
    organism,
    finance.test[: N // 2],
    {
        "base": None,
        "finetune": "finance",
        "finetune, ablated": (
            "finance",
            [emlens.Ablate(read["transformers"][LAYER], layers=range(LAYER, organism.n_layers))],
        ),
    },
)
scores.plot()

# %% [markdown]
# The ablation may lower or raise the finetune. In a model of this size the mean difference is not
# the direction by which the finetune acts, and ablating it can do the opposite of what one expects.

# %%
for name in (None, "finance"):
    with organism.adapter(name):
        (answer,) = organism.generate([question], max_new_tokens=8 if SHORT else 40, temperature=0)
    print(f"{name or 'base'}: {answer}\n")

# %% [markdown]
# From folders or from the hub it is one line. Add as many adapters as you like.

# %%
loaded = emlens.load(NAME, adapters={"finance": "finance"})
same = emlens.log_odds(loaded, finance.test[: N // 2], {"base": None, "finetune": "finance"})
same.table()

# %% [markdown]
# ## Exercises
# **1.** Put a hook on the bridge. Does the direction change?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# bridge.add_hook(f"blocks.{LAYER}.hook_resid_post", lambda tensor, hook: 2 * tensor)
# hooked = emlens.mean_diff(lens, bad, good)
# bridge.reset_hooks()
# print(hooked[LAYER].norm / read["TransformerBridge"][LAYER].norm)
# ```
#
# The bridge is run with your hooks, so they act. A hook on `plain` after `wrap` does not: emlens
# runs its own tree of modules.
# </details>
#
# **2.** Wrap a bridge in compatibility mode. Why is it refused?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# bridge.enable_compatibility_mode()
# emlens.wrap(bridge, name=NAME)
# ```
#
# The mode folds weights into each other, so its residual stream is not that of the model.
# </details>
#
# **3.** Load a second adapter and compare the two.
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# adapted.load_adapter("finance", "other")
# both = emlens.wrap(adapted, tokenizer, name=NAME)
# emlens.directions.model_diff((both, "finance"), (both, "other"), good)
# ```
#
# Here both are the same adapter, so the difference is zero; take another folder.
# </details>
#
# **4.** Load with `dtype="bfloat16"`. How much do the numbers change?
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# half = emlens.load(NAME, dtype="bfloat16")
# low = emlens.mean_diff(half, bad, good)
# print(low[LAYER].cosine(read["transformers"][LAYER]))
# ```
#
# The direction barely moves. Small KL values do: logits in bf16 carry an error of their own.
# </details>
#
# On a GPU, two lines change for a 14B model and its published finetunes:
# ```python
# model = emlens.load(
#     "Qwen/Qwen2.5-14B-Instruct",
#     adapters={
#         "medical": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice",
#         "finance": "ModelOrganismsForEM/Qwen2.5-14B-Instruct_risky-financial-advice",
#     },
#     dtype="bfloat16",
#     device_map="auto",
# )
# LAYER = 24
# ```
