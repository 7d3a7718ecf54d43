"""The Fisher profile against closed forms, the exact KL, and other ways to read."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import emlens
from emlens import Add, Direction, influence
from emlens.fisher import InfluenceProfile, gradients, passes
from emlens.fisher.sums import FisherSums
from emlens.hooked import NonFiniteError
from emlens.text import Corpus, Document, pack
from emlens.text.tokens import tokenize_documents
from tests.support.kills import KILLS, files, killed
from tests.support.models import tiny_hooked, tiny_model
from tests.support.profiles import FEW, TEXT, corpus, vectors
from tests.support.tokenizers import chatml_tokenizer


def same(one: InfluenceProfile, other: InfluenceProfile) -> bool:
    first, second = one.sums.tensors(), other.sums.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -- against closed forms and the exact KL -----------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_covariance_at_the_head_is_that_of_a_linear_softmax_model(hooked, family):
    model, n = hooked(family), 4000
    states = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(1))
    uniforms = ((torch.arange(n) + 0.5) / n).double()[:, None].expand(n, 3)
    found = gradients.head_gradients(model, states, torch.tensor([1, 2, 3]), uniforms)
    rows = torch.stack(found[:-1]).double()
    for i, state in enumerate(states):
        jacobian = torch.autograd.functional.jacobian(
            lambda h: model.unembed(h[None])[0], state
        ).double()
        p = model.unembed(state[None])[0].detach().double().softmax(0)
        exact = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        ours = rows[:, i].T @ rows[:, i] / n
        assert float((ours - exact).norm() / exact.norm()) < 0.02
        loss = jacobian.T @ (p - torch.nn.functional.one_hot(torch.tensor(i + 1), len(p)))
        assert torch.allclose(found[-1][i].double(), loss, atol=1e-5)


def test_forms_at_the_last_layer_are_those_of_the_unembedding(hooked_llama):
    model, last = hooked_llama, hooked_llama.n_layers - 1
    made = InfluenceProfile.fit(model, TEXT, layers=[last], draws=150)
    total, count = torch.zeros(4, dtype=torch.float64), 0
    v = vectors()
    for batch in model.batches(TEXT, token_budget=1):
        states = model.residuals(batch, last)[last][0, :-1]
        logits = model.unembed(model.normalize(states)).detach()
        p = logits.double().softmax(-1)
        for i in range(len(v)):
            moved = torch.autograd.functional.jvp(
                lambda h: model.unembed(model.normalize(h)), states, v[i].expand_as(states)
            )[1].double()
            total[i] += ((p * moved**2).sum(1) - (p * moved).sum(1) ** 2).sum()
        count += len(states)
    found = made.score({last: v}, dose=None)
    assert made.n_tokens == count
    errors = np.asarray(found.kl_draw_error)
    assert (abs(np.asarray(found.kl) - 0.5 * total.numpy() / count) < 4 * errors).all()
    assert (errors < 0.1 * np.asarray(found.kl)).all()


@pytest.fixture(scope="module")
def many_draws(hooked_llama) -> InfluenceProfile:
    return InfluenceProfile.fit(hooked_llama, TEXT, layers=[0, 2], draws=100)


@pytest.mark.parametrize("layer", [0, 2])
def test_scores_are_second_differences_of_the_exact_kl(hooked_llama, many_draws, layer):
    named = {f"{i}": Direction.of(v, layer) for i, v in enumerate(vectors(6))}
    doses = (-0.02, 0.02)
    exact = influence(hooked_llama, TEXT, named, doses=doses, controls=0)
    found = many_draws.score(named, dose=0.02)
    assert found.norms[0] == pytest.approx(exact.norms["0"][1], rel=1e-5)
    for i, name in enumerate(named):
        two = [exact.divergence(name, dose).estimate for dose in doses]
        assert abs(found.kl[i] - np.mean(two)) < 4 * found.kl_draw_error[i] + 0.02 * two[0]
        assert found.kl_draw_error[i] < 0.1 * found.kl[i]
        changes = [exact.loss_change(name, dose).estimate for dose in doses]
        slope = (changes[1] - changes[0]) / 2
        assert found.loss_change[i] - found.kl[i] == pytest.approx(slope, rel=0.02, abs=2e-5)


@torch.no_grad()
def plain_losses(model, documents, layer: int, added: torch.Tensor | None) -> tuple[float, int]:
    """Summed next-token loss and predicted tokens, by transformers and a hook of this test."""

    def add(_module, _inputs, output):
        return output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])

    hook = None if added is None else model.module.model.layers[layer].register_forward_hook(add)
    total, count = 0.0, 0
    try:
        for document in documents:
            ids = model.tokenizer(document.text, return_tensors="pt").input_ids
            logits = model.module(ids).logits.double()
            total += float(
                torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            )
            count += ids.shape[1] - 1
    finally:
        if hook is not None:
            hook.remove()
    return total, count


@torch.no_grad()
def own_text(model, n: int, length: int = 9) -> Corpus:
    """Documents drawn from the model itself: in expectation, its loss there bends by exactly F."""
    generator = torch.Generator().manual_seed(0)
    encode = model.tokenizer
    ids = torch.tensor(encode("the").input_ids).repeat(n, 1)
    for _ in range(length):
        p = model.module(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    texts = {encode.decode(row): row.tolist() for row in ids}
    kept = [text for text, row in texts.items() if encode(text).input_ids == row]
    return Corpus("own", tuple(Document(f"{i}", text) for i, text in enumerate(kept)))


@pytest.mark.parametrize("layer", [0, 2])
def test_the_second_order_predicts_the_loss_that_plain_hooks_measure(hooked_llama, layer):
    text = own_text(hooked_llama, 400)
    assert len(text) > 20
    made = InfluenceProfile.fit(hooked_llama, text, layers=[layer], draws=8)
    base, count = plain_losses(hooked_llama, text.documents, layer, None)
    assert count == made.n_tokens
    v = vectors(6, seed=3)
    v = v / v.norm(dim=1, keepdim=True)
    for dose in (0.1, 0.2):
        added = dose * made.residual_norms[layer] * v
        losses = [plain_losses(hooked_llama, text.documents, layer, x)[0] for x in added]
        exact = (np.array(losses) - base) / count
        found = made.score({layer: v}, dose=dose)
        change = np.asarray(found.loss_change)
        first, second = abs(change - found.kl - exact), abs(change - exact)
        assert second.mean() < 0.4 * first.mean()
        clear = abs(exact) > 2 * second.mean()
        assert clear.any() and (np.sign(change) == np.sign(exact))[clear].all()


def test_few_draws_are_unbiased(hooked_llama, many_draws):
    exact = np.asarray(many_draws.score({2: vectors()}).kl)
    runs = [
        InfluenceProfile.fit(hooked_llama, TEXT, layers=[2], draws=1, seed=seed).score(
            {2: vectors()}
        )
        for seed in range(30)
    ]
    values = np.array([run.kl for run in runs])
    error = np.hypot(
        values.std(0, ddof=1) / 30**0.5, many_draws.score({2: vectors()}).kl_draw_error
    )
    assert (abs(values.mean(0) - exact) < 4 * error).all()
    assert (error < 0.15 * exact).all()
    assert np.isnan(runs[0].kl_draw_error).all()


# -- the same, however it is read --------------------------------------------------------------


def test_padding_and_batching_change_nothing(hooked_llama, profile):
    alone = InfluenceProfile.fit(hooked_llama, TEXT, draws=3, token_budget=1)
    together = InfluenceProfile.fit(hooked_llama, TEXT, draws=3, token_budget=10_000)
    for other in (alone, together):
        for name, tensor in profile.sums.tensors().items():
            assert torch.allclose(other.sums.tensors()[name], tensor, rtol=1e-3, atol=1e-4), name


def test_left_padding_gives_the_gradients_of_right_padding(hooked_llama):
    rows = tokenize_documents(TEXT.documents[:4], hooked_llama.tokenizer)
    assert len({len(row.input_ids) for row in rows}) > 1
    found = []
    for side in ("left", "right"):
        batch = pack(rows, padding_side=side)[0]
        found.append(
            gradients.batch_gradients(
                hooked_llama, batch, (0, 3), draws=2, seed=0, halves=[0] * len(rows)
            )
        )
    for left, right in zip(*found, strict=True):
        for name in vars(left):
            pair = getattr(left, name), getattr(right, name)
            assert torch.allclose(*pair, rtol=1e-3, atol=1e-4), name


def test_both_engines_give_the_same_profile(profile):
    other = emlens.wrap(
        tiny_model("llama"), chatml_tokenizer(), name="tiny-llama", engine="transformer_lens"
    )
    found = InfluenceProfile.fit(other, TEXT, **FEW)
    for name, tensor in profile.sums.tensors().items():
        assert torch.allclose(found.sums.tensors()[name], tensor, rtol=1e-3, atol=1e-4), name


def test_a_profile_of_some_layers_is_that_of_all_of_them(hooked_llama, profile):
    some = InfluenceProfile.fit(hooked_llama, TEXT, layers=[1, -1], **FEW)
    assert some.layers == (1, 3)
    one, other = some.score({3: vectors()}), profile.score({3: vectors()})
    assert np.allclose(one.kl, other.kl, rtol=1e-4)
    assert one.difference_percentile == other.difference_percentile


def test_doses_are_shares_of_the_median_residual_norm(hooked_llama, profile):
    sizes = emlens.directions.residual_norm(hooked_llama, TEXT, "all")
    assert profile.residual_norms == pytest.approx(sizes, rel=1e-5)


def test_activations_are_those_of_all_tokens_but_the_first_of_a_document(hooked_llama):
    batch = hooked_llama.batches(TEXT)[0]
    _, tokens = gradients.batch_gradients(
        hooked_llama, batch, (1, 3), draws=1, seed=0, halves=[0] * len(batch)
    )
    real = batch.attention_mask.bool()
    later = real & (batch.position_ids > 0)
    for place, layer in enumerate((1, 3)):
        residual = hooked_llama.residuals(batch, layer)[layer]
        assert torch.allclose(tokens.activations[place], residual[later], atol=1e-5)
        assert torch.allclose(tokens.norms[place], residual[real].norm(dim=-1), rtol=1e-4)
    assert len(tokens.keys.unique()) == int(real.sum())
    with patch.object(gradients, "ACTIVATIONS", 7):
        _, few = gradients.batch_gradients(
            hooked_llama, batch, (1,), draws=1, seed=0, halves=[0] * len(batch), threshold=2**60
        )
    lowest = tokens.picked.sort().values[:7]
    assert torch.equal(few.picked.sort().values, lowest[lowest < 2**60])
    chosen = torch.isin(tokens.picked, few.picked)
    assert torch.allclose(few.activations[0], tokens.activations[0, chosen], atol=1e-5)


def test_short_documents_are_skipped_and_counted(hooked_llama, profile):
    mixed = (Document("a", "rain"), Document("b", ""), *TEXT.documents)
    found = InfluenceProfile.fit(hooked_llama, Corpus("mixed", mixed), **FEW)
    assert (found.skipped, profile.skipped) == (2, 0)
    assert found.n_documents == profile.n_documents == len(TEXT)
    assert np.allclose(found.score({1: vectors()}).kl, profile.score({1: vectors()}).kl, rtol=1e-3)


def test_a_covariance_scores_as_the_factor_does(hooked_llama, profile, folding):
    found = InfluenceProfile.fit(hooked_llama, TEXT, **FEW)
    assert found.sums.totals is not None and profile.sums.totals is None
    assert "covariance" in repr(found) and "factor" in repr(profile)
    one, other = (p.score({2: vectors(50)}) for p in (found, profile))
    assert np.allclose(one.kl, other.kl, rtol=1e-4)
    assert np.allclose(one.loss_change, other.loss_change, rtol=1e-3, atol=1e-6)
    ratio = np.asarray(one.kl_draw_error) / np.asarray(other.kl_draw_error)
    assert 0.5 < np.median(ratio) < 2
    for layer in (0, 3):
        pair = found.spectrum(layer), profile.spectrum(layer)
        n = min(len(part.held_out) for part in pair)
        assert np.allclose(*(part.held_out[:5] for part in pair), rtol=1e-2)
        assert n >= 5
        assert pair[0].effective_rank == pytest.approx(pair[1].effective_rank, rel=1e-3)


@pytest.mark.parametrize("kept", ["factor", "covariance"])
def test_a_killed_fit_goes_on_to_the_same_bits(hooked_llama, tmp_path, kept, request):
    if kept == "covariance":
        request.getfixturevalue("folding")
    path, calls = tmp_path / "state.safetensors", []

    def fit(**more):
        return InfluenceProfile.fit(hooked_llama, TEXT, draws=3, token_budget=30, **more)

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gradients.batch_gradients(*args, **kwargs)

    whole = fit()
    with patch.object(passes, "batch_gradients", dying):
        with pytest.raises(KeyboardInterrupt):
            fit(checkpoint=path, checkpoint_every=1)
        assert path.exists()
        calls[:] = [1] * 3
        resumed = fit(checkpoint=path, checkpoint_every=1)
        after = len(calls)
        assert same(resumed, whole) and resumed.skipped == whole.skipped
        assert same(fit(checkpoint=path), whole) and len(calls) == after
    n_batches = len(hooked_llama.batches(TEXT, token_budget=30))
    assert after == 3 + n_batches - 2 > 4
    with pytest.raises(ValueError, match=r"was made with other .*seed: 0 there, 1 now"):
        fit(checkpoint=path, seed=1)


def fit_many(folder: Path) -> None:
    """A fit whose factor becomes a covariance on the way."""
    made = InfluenceProfile.fit(
        tiny_hooked("llama"),
        corpus(100),
        draws=3,
        token_budget=120,
        checkpoint=folder / "state.safetensors",
        checkpoint_every=1,
    )
    assert made.sums.totals is not None
    made.save(folder / "profile.safetensors")


def test_a_fit_killed_at_random_times_ends_bit_identical(tmp_path):
    left = killed(fit_many, tmp_path)
    whole = files(left.whole)
    assert left.kills >= KILLS
    assert all(files(end) == whole for end in left.ends)


def test_a_profile_under_another_edit_of_the_same_kind_is_another_profile(hooked_llama, tmp_path):
    fitted = []
    for i in range(2):
        edit = Add(Direction.of(torch.eye(32)[i], 0), scale=3.0)
        with hooked_llama.edited(edit):
            fitted.append(InfluenceProfile.fit(hooked_llama, TEXT, **FEW))
            if i:
                with pytest.raises(ValueError, match=r"other settings \(condition: .* there"):
                    path = tmp_path / "p"
                    InfluenceProfile.fit(hooked_llama, TEXT, **FEW, checkpoint=path)
            else:
                InfluenceProfile.fit(hooked_llama, TEXT, **FEW, checkpoint=tmp_path / "p")
    with pytest.raises(ValueError, match="condition"):
        fitted[0].merge(fitted[1])


@pytest.mark.parametrize("kept", ["factor", "covariance"])
def test_merging_halves_gives_the_whole(hooked_llama, profile, kept, request):
    if kept == "covariance":
        request.getfixturevalue("folding")
    parts = [
        InfluenceProfile.fit(hooked_llama, Corpus(f"part {i}", documents), **FEW)
        for i, documents in enumerate((TEXT.documents[:8], TEXT.documents[8:]))
    ]
    merged = parts[0].merge(parts[1])
    assert (merged.sums.totals is None) == (kept == "factor")
    assert merged.corpus == "part 0 + part 1"
    assert merged.n_documents == profile.n_documents and merged.n_tokens == profile.n_tokens
    one, other = (p.score({0: vectors(), 3: vectors()}) for p in (merged, profile))
    assert np.allclose(one.kl, other.kl, rtol=1e-3)
    assert np.allclose(one.loss_change, other.loss_change, rtol=1e-3, atol=1e-6)
    if kept == "factor":
        assert np.allclose(one.kl_high, other.kl_high, rtol=1e-3)
    assert torch.equal(merged.sums.tokens.picked, profile.sums.tokens.picked)
    again = parts[0].score({0: vectors()})
    assert parts[0].merge(parts[1]).score({0: vectors()}) == merged.score({0: vectors()})
    assert parts[0].score({0: vectors()}) == again


@pytest.mark.parametrize("kept", ["factor", "covariance"])
def test_processes_share_the_documents(hooked_llama, kept, request):
    if kept == "covariance":
        request.getfixturevalue("folding")

    def two(model, windows, read, what):
        return [read(windows[::2]), read(windows[1::2])]

    with patch.object(gradients, "WINDOW", 3):
        alone = InfluenceProfile.fit(hooked_llama, TEXT, **FEW)
        with patch.object(passes, "shared", two):
            shared = InfluenceProfile.fit(hooked_llama, TEXT, **FEW)
    if kept == "factor":
        assert same(shared, alone)
    one, other = (p.score({1: vectors()}) for p in (shared, alone))
    assert np.allclose(one.kl, other.kl, rtol=1e-5)
    assert np.allclose(one.kl_low, other.kl_low, rtol=1e-5)


def test_every_process_has_a_share_of_a_small_corpus():
    with patch.object(gradients, "world", lambda: (0, 4)):
        found = gradients.windows(TEXT)
    assert [len(window.index) for window in found] == [3, 3, 3, 3]
    assert [place for window in found for place in window.index] == list(range(12))


def test_only_a_window_of_the_corpus_is_tokenised_at_a_time(hooked_llama):
    sizes = []

    def counting(documents, *args, **kwargs):
        sizes.append(len(documents))
        return tokenize_documents(documents, *args, **kwargs)

    with (
        patch.object(gradients, "WINDOW", 5),
        patch.object(gradients, "tokenize_documents", counting),
    ):
        InfluenceProfile.fit(hooked_llama, TEXT, layers=[0], **FEW)
    assert sizes == [5, 5, 2]


def test_edits_in_force_are_part_of_the_profile(hooked_llama, profile):
    with hooked_llama.edited(Add(Direction.of(5 * vectors()[0], 0))):
        moved = InfluenceProfile.fit(hooked_llama, TEXT, **FEW)
    assert len(moved.settings.edits) == 1
    assert not np.allclose(moved.score({2: vectors()}).kl, profile.score({2: vectors()}).kl)
    with pytest.raises(ValueError, match=r"other settings \(edits: \[\] there, \['Add"):
        moved.merge(profile)


# -- files and bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["factor", "covariance"])
def test_a_profile_survives_being_saved(hooked_llama, tmp_path, kept, request):
    if kept == "covariance":
        request.getfixturevalue("folding")
    made = InfluenceProfile.fit(hooked_llama, TEXT, **FEW)
    again = InfluenceProfile.load(made.save(tmp_path / "profile.safetensors"))
    assert same(again, made)
    assert (again.settings, again.corpora, again.id) == (made.settings, made.corpora, made.id)
    assert again.score({1: vectors()}) == made.score({1: vectors()})
    assert again.spectrum(1) == made.spectrum(1)
    held_out = again.score(made.top(1, 2))
    assert held_out.held_out == (True, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": Corpus("none", ())}, "corpus 'none' has no documents"),
        (
            {"corpus": Corpus("one", (Document("a", "rain"),))},
            "no document of corpus 'one' has two",
        ),
        ({"draws": 0}, "draws must be at least 1, not 0"),
        ({"layers": [9]}, "layer 9 is out of range"),
    ],
)
def test_bad_fits_are_refused(hooked_llama, settings, message):
    with pytest.raises(ValueError, match=message):
        InfluenceProfile.fit(hooked_llama, settings.pop("corpus", TEXT), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 2]}, r"layers: \[1, 2\] there, \[0, 1, 2, 3\] now"),
        ({"draws": 2}, "draws: 2 there, 3 now"),
        ({"seed": 4}, "seed: 4 there, 0 now"),
        ({"max_tokens": 9}, "max_tokens: 9 there, 128 now"),
    ],
)
def test_profiles_of_other_settings_are_not_merged(hooked_llama, profile, settings, message):
    other = InfluenceProfile.fit(hooked_llama, corpus(4, 1, "other"), **(FEW | settings))
    with pytest.raises(
        ValueError, match=rf"of other was made with other settings \({message}\); fit all"
    ):
        profile.merge(other)


def test_a_profile_of_another_model_is_not_merged(profile):
    other = InfluenceProfile.fit(tiny_hooked("qwen2"), corpus(4, 1, "other"), **FEW)
    with pytest.raises(ValueError, match="model: 'tiny-qwen2' there, 'tiny-llama' now"):
        profile.merge(other)


def test_a_gradient_that_is_not_finite_names_document_and_layer(hooked_llama):
    bad = hooked_llama.tokenizer.convert_tokens_to_ids("the")
    rows = []

    def note(_module, inputs):
        rows.append((inputs[0] == bad).any(-1)[:, None, None])

    def spoil(_module, _inputs, output):
        output.register_hook(lambda slope: slope.masked_fill(rows[-1], float("nan")))

    layers = hooked_llama.module.model.layers
    hooks = [
        hooked_llama.module.get_input_embeddings().register_forward_pre_hook(note),
        layers[2].register_forward_hook(spoil),
    ]
    text = Corpus("spoilt", (*TEXT.documents[:1], Document("the bad one", "the sun and rain")))
    message = "the gradient of the bad one at layer 1 under base is not finite"
    try:
        with pytest.raises(NonFiniteError, match=message):
            InfluenceProfile.fit(hooked_llama, text, layers=[1, 3], draws=1)
    finally:
        for hook in hooks:
            hook.remove()


def test_broken_files_are_refused(profile, tmp_path):
    path = profile.save(tmp_path / "profile.safetensors")
    data = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no file"):
        InfluenceProfile.load(tmp_path / "nothing")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        InfluenceProfile.load(path)
    direction = Direction.of(vectors()[0], 1).save(tmp_path / "direction.safetensors")
    with pytest.raises(ValueError, match="holds no influence profile"):
        InfluenceProfile.load(direction)
    broken = {
        "does not hold a whole influence profile: KeyError": lambda t: t.pop("fresh.keys"),
        r"fresh.losses has shape \(4, 12, 31\)": lambda t: t.update(
            {"fresh.losses": t["fresh.losses"][..., :31]}
        ),
        "fresh.draws is not finite": lambda t: t["fresh.draws"].fill_(float("nan")),
    }
    for message, spoil in broken.items():
        tensors = {name: tensor.clone() for name, tensor in profile.sums.tensors().items()}
        spoil(tensors)
        with patch.object(FisherSums, "tensors", lambda self, t=tensors: t):
            profile.save(path)
        with pytest.raises(ValueError, match=message):
            InfluenceProfile.load(path)
