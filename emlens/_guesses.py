"""Suggestions for unknown names."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

CLOSE = 0.75
"""How alike two names are of which one may be meant by the other, as `difflib` counts."""

_MEANT = """
Steer, SteeringVector, AddVector, Intervention, Steering: Add
Projection, ProjectOut, Erase, Remove, Ablation: Ablate
HookedTransformer, HookedTransformerBridge, LanguageModel, PeftModel, AutoModel, load_model: load
steering_vector, diff_of_means, difference_of_means, extract, caa, get_direction: mean_diff
cosine_similarity, cos_sim, cosine_sim: cosine compare
train_steering_vector, train, fit_vector: train_vector
train_lora, finetune, fine_tune, sft: train_adapter
Dataset, TextDataset, load_corpus, load_dataset: corpus load_conversations
Message, Chat, Prompt: Conversation
judge_responses, grade, score_responses: judge
linear_probe, LogisticRegression: probe
run_with_cache, trace, get_activations, activations, hidden_states, cache: residuals
run_with_hooks, hooks, add_hook, steer, with_hooks: edited
to_tokens, to_str_tokens, encode, tokenize: batches
set_adapter, disable_adapter, active_adapters: adapter
load_adapter: add_adapter
delete_adapter: remove_adapter
chat, respond, answer, complete: generate
cfg, config: module.config
to, cuda, cpu, eval, train, parameters, state_dict, named_modules: module.
W_U, lm_head, unembedding: unembed
normalize, normalise, unit_vector, unit_norm: unit
project_out, remove, without, orthogonalize: orthogonal_to
project, project_onto: along
dot, cos, similarity: cosine
to_tensor, as_tensor, tensor: stack
to_dict, to_pandas, dataframe, df, to_frame: table
best_layer, best, argmax: table
layer: layers
layers: layer
hook, hook_name, hook_point, act_name, act: site
position, positions, pos, token_position, token_pos: where tokens
mask, token_mask, response_only: tokens
learning_rate, learn_rate, step_size: lr
steps, n_steps, num_steps, max_steps, n_epochs, num_epochs, num_train_epochs: epochs
per_device_train_batch_size, train_batch_size: batch_size
gradient_accumulation_steps, grad_accum: accumulate
warmup_steps, warmup_ratio, num_warmup_steps: warmup
max_grad_norm, grad_clip, clip_norm: clip
wd, l2: weight_decay
r, lora_r, lora_rank, ranks: rank
lora_alpha: alpha
kl_weight, kl_coef, kl_coeff, kl_penalty, beta, lambda_kl: kl weight
bs, batch_size, n_batch, tokens_per_batch: token_budget batch_size
max_length, max_len, seq_len, context_length, n_ctx, truncation: max_tokens
max_length, max_tokens, n_tokens, max_gen_tokens, n_new_tokens: max_new_tokens
temp: temperature
do_sample: temperature
samples, n_samples, num_samples, num_return_sequences, n_responses: n
dose: doses
doses: dose norms
coeff, coef, coefficient, multiplier, strength, steering_strength, factor: scale dose doses factors
scale: dose doses
dose: scale
alpha, amount, magnitude: scale dose
norm: norms
epsilon, eps, noise, sigma: epsilons
seeds, random_state, rng, random_seed: seed
verbose, show_progress, progress_bar, tqdm, verbosity: progress
output, output_dir, out_dir, save_dir, save_to, save_path, folder: out checkpoint path
checkpoint_dir, checkpoint_path, resume, resume_from: checkpoint
threshold, cutoff: threshold thresholds
prompt, prompts, text, texts, inputs, messages, chats, dialogues: conversations questions
dataset, data, examples: conversations corpus data pairs
texts, documents: corpus
n, n_documents, max_documents, limit, n_docs: documents limit n
user, question, instruction, input: prompt
assistant, answer, completion, output, reply: response
vector, vectors, steering_vector, direction: directions direction
directions: direction
condition, edits, edit, hooks, fwd_hooks, interventions: conditions edits
metric, metrics: metrics
judges, grader: judge
n_controls, random_controls, baselines: controls
device, devices, placement: device_map
torch_dtype, precision: dtype
adapter, adapter_name, lora, loras, lora_path, peft_model: adapters
backend: engine
model_name, model_id, path, pretrained_model_name_or_path: name
system, system_prompt: system trait
positive_prompts, pos, harmful, misaligned, positives: positive misaligned
negative_prompts, neg, harmless, aligned, negatives: negative aligned
val, validation_split, test_size, holdout: held_out
n_workers, workers, num_workers, concurrency, max_workers: at_once
token_ids, tokenids, input_ids: tokens
axes, axis: ax
figsize: ax
normalise, normalize: norms
"""
"""Words of the field, and what they are called here: those of a line mean one of what follows."""


def _read() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in _MEANT.strip().splitlines():
        words, _, meant = line.partition(": ")
        for word in words.split(", "):
            found[word] = (*found.get(word, ()), *meant.split())
    return found


MEANT = _read()


def word_for(name: str, known: Collection[str]) -> str | None:
    """The known name that stands for a word of the field, or None."""
    for meant in MEANT.get(name, ()):
        first, dot, rest = meant.partition(".")
        if first in known:
            return f"{first}.{rest or name}" if dot else first
    return None


def nearest(name: str, known: Collection[str], close: float = CLOSE) -> str | None:
    """The known name that is probably meant, or None.

    Terms of the field come before similar spellings.
    """
    if meant := word_for(name, known):
        return meant
    lower = {one.lower(): one for one in reversed(list(known))}
    found = get_close_matches(name.lower(), lower, n=1, cutoff=close)
    return lower[found[0]] if found else None


def no_attribute(owner: object, name: str) -> str:
    """The error message for a missing attribute."""
    said = f"{type(owner).__name__!r} object has no attribute {name!r}"
    public = [one for one in dir(owner) if not one.startswith("_")]
    found = None if name.startswith("_") else nearest(name, public)
    return f"{said}; did you mean {found}?" if found else said


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """The error message for an unknown name: a suggestion, or all known names."""
    found = nearest(name, known)
    listed = ", ".join(sorted(known))
    said = f"; did you mean {found}?" if found else f"; there are {listed}" if listed else ""
    return f"{what} {name!r}{said}"
