"""Remote execution: the same numbers as here, from a process where emlens does not exist."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass

import httpx
import pytest
import torch
import websocket
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from safetensors.torch import load_file, save_file

import emlens
from emlens import Ablate, Add, Clamp, Conversation, Direction
from emlens.edits import Shift
from emlens.hooked import NonFiniteError
from emlens.hooked.remote.model import RemoteModel, check_remote
from emlens.hooked.sites import SITES
from emlens.hooked.sweep import sweep
from emlens.text import pack, tokenize
from tests.support.data import conversations
from tests.support.server import load_served

FAMILIES = ("llama", "gpt2", "gemma2")
TOLERANCE = 1e-5


def batch_of(model, n=5):
    (batch,) = pack(tokenize(conversations("bad", n), model.tokenizer))
    return batch


def direction(model, layer=1, size=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Direction.of(size * torch.randn(model.d_model, generator=generator), layer)


def edits_of(model, where):
    along = direction(model)
    return [
        Add(along, where=where),
        Ablate(along, layers=(0, 2, 3), where=where, site="resid_mid"),
        Clamp(along, value=3.0, layers=(2,), where=where, site="attn_out"),
        Shift(direction(model, seed=1).vector, 3, where=where),
    ]


def the_same(first, second):
    assert first.keys() == second.keys()
    return all(torch.allclose(first[k], second[k], atol=TOLERANCE) for k in first)


def mean_of_row(residual):
    return residual.float().mean(1)


# -- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_known_without_weights(here, dry, hub, family):
    local, remote = here(family), load_served(hub(family))
    assert next(remote.module.parameters()).is_meta
    for fact in ("n_layers", "d_model", "n_vocab", "sites", "dtype", "device", "engine"):
        assert getattr(remote, fact) == getattr(local, fact), fact
    assert remote.tokenizer.get_vocab() == local.tokenizer.get_vocab()
    assert dry(family).name == local.name == f"tiny-{family}"


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_are_those_of_the_local_engine(here, dry, family):
    local, remote = here(family), dry(family)
    batch, along = batch_of(local), [Add(direction(local))]
    for site in SITES:
        for pool in (None, mean_of_row):
            expected = local.residuals(batch, [1, 3], site, pool, along)
            assert the_same(remote.residuals(batch, [1, 3], site, pool, along), expected), site


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["all", "prompt", "response"])
def test_edits_are_those_of_the_local_engine(here, dry, family, where):
    local, remote = here(family), dry(family)
    batch = batch_of(local)
    for edits in ([], edits_of(local, where), *([edit] for edit in edits_of(local, where))):
        expected = local.hidden(batch, edits)
        assert torch.allclose(remote.hidden(batch, edits), expected, atol=TOLERANCE), edits
    with remote.edited(*edits_of(local, where)):
        inside = remote.hidden(batch)
    assert torch.allclose(inside, local.hidden(batch, edits_of(local, where)), atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_passes_and_sweeps_are_those_of_the_local_engine(here, dry, family):
    local, remote = here(family), dry(family)
    batch = batch_of(local)
    conditions = {"base": [], "deep": [Add(direction(local, 2))], "low": [Add(direction(local))]}
    expected = {name: hidden for name, hidden, _ in sweep(local, batch, conditions)}
    found = {name: hidden for name, hidden, _ in sweep(remote, batch, conditions)}
    assert the_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["all", "prompt", "response"])
def test_answers_are_those_of_the_local_engine(here, dry, family, where):
    local, remote = here(family), dry(family)
    prompts = [Conversation.of(text) for text in ("how", "tell me a story about rain")]
    for edits in ([], [Add(direction(local), where=where)]):
        for settings in (
            {"temperature": 0},
            {"seed": 3, "top_p": 0.8, "temperature": 0.7, "batch_tokens": 1},
            {"seed": 3, "use_cache": False},
        ):
            expected = local.generate(prompts, edits, max_new_tokens=8, **settings)
            assert remote.generate(prompts, edits, max_new_tokens=8, **settings) == expected


def test_nothing_stays_on_the_model_after_a_request(saved):
    remote = emlens.load(saved("llama"), remote="local", check=False)
    batch = batch_of(remote)
    bare = remote.hidden(batch)
    module = remote._traced._module
    paths = [path for path, _ in module.named_modules()]
    remote.generate([Conversation.of("how")], edits_of(remote, "all"), max_new_tokens=3)
    remote.residuals(batch, "all", edits=edits_of(remote, "all"))
    assert [path for path, _ in module.named_modules()] == paths
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(remote.hidden(batch), bare)
    assert remote.tokenizer.padding_side == emlens.load(saved("llama")).tokenizer.padding_side


# -- a process of its own, without emlens ---------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_server_without_emlens_gives_the_same_numbers(here, served, family):
    local, remote = here(family), served(family)
    batch, edits = batch_of(local), edits_of(local, "response")
    assert torch.allclose(remote.hidden(batch, edits), local.hidden(batch, edits), atol=TOLERANCE)
    residual = local.residuals(batch, 1)[1]
    later = [Add(direction(local, 2))]
    expected = local.hidden(batch, later)
    assert torch.allclose(remote.hidden(batch, later, (1, residual)), expected, atol=TOLERANCE)
    expected = local.residuals(batch, "all", "resid_mid", mean_of_row, edits)
    assert the_same(remote.residuals(batch, "all", "resid_mid", mean_of_row, edits), expected)
    prompts = [Conversation.of(text) for text in ("how", "tell me a story about rain")]
    for settings in ({"temperature": 0}, {"seed": 3, "top_p": 0.9}):
        answers = local.generate(prompts, edits, max_new_tokens=6, **settings)
        assert remote.generate(prompts, edits, max_new_tokens=6, **settings) == answers
    check_remote(remote)


def test_a_direction_is_extracted_on_the_server(here, served):
    local, remote = here("llama"), served("llama")
    texts = conversations("bad", 4), conversations("good", 4)
    expected = emlens.mean_diff(local, *texts, progress=False)
    found = emlens.mean_diff(remote, *texts, progress=False)
    assert the_same(found.vectors, expected.vectors)
    assert found.residual_norms == pytest.approx(expected.residual_norms, abs=TOLERANCE)


def test_a_users_own_edit_runs_on_the_server(here, dry, served):
    @dataclass(frozen=True)
    class Halve:
        layers: tuple[int, ...] = (1,)
        site: str = "resid_post"
        where: str = "all"

        def delta(self, residual, layer):
            return _half_of(residual)

    local = here("llama")
    batch = batch_of(local)
    expected = local.hidden(batch, [Halve()])
    assert not torch.allclose(expected, local.hidden(batch), atol=0.1)
    for remote in (served("llama"), dry("llama")):
        assert torch.allclose(remote.hidden(batch, [Halve()]), expected, atol=TOLERANCE)
    assert torch.equal(local.hidden(batch, [Halve()]), expected)


def _half_of(residual):
    return -residual / 2


def test_a_pool_keeps_its_precision_where_the_server_lowers_it(here):
    local = here("llama")
    batch, along = batch_of(local), direction(local).vector

    def project(residual):
        return residual.float() @ along

    whole = local.residuals(batch, 1)[1]
    with torch.autocast("cpu", torch.bfloat16):
        lowered = project(whole)
    assert not torch.allclose(lowered.float(), project(whole), atol=1e-3)
    # layer 0's input is computed before anything that autocast touches
    with torch.autocast("cpu", torch.bfloat16):
        found = local.residuals(batch, 0, "resid_pre", project)[0]
    assert torch.equal(found, project(local.residuals(batch, 0, "resid_pre")[0]))


# -- what travels ---------------------------------------------------------------------------------


def test_only_what_is_asked_for_comes_back(here, served, server):
    local, remote = here("llama"), served("llama")
    short, long = batch_of(local, 2), batch_of(local, 40)

    def cost(batch, *asked):
        remote.residuals(batch, *asked)
        return len(server.sent[-1]), server.came_back[-1]

    number = local.d_model * 4
    overhead = 4000
    _, one = cost(long, 2)
    assert abs(one - len(long) * long.input_ids.shape[1] * number) < overhead
    request, pooled = cost(long, 2, "resid_post", mean_of_row)
    assert pooled < len(long) * number + overhead < one / 3
    assert request < 12_000
    _, both = cost(long, [1, 2], "resid_post", mean_of_row)
    assert abs(both - pooled - len(long) * number) < overhead / 4
    _, last_token = cost(short, 2, "resid_post", lambda residual: residual[:, -1])
    assert last_token < len(short) * number + overhead
    remote.generate([Conversation.of("how")], max_new_tokens=4)
    assert server.came_back[-1] < overhead


def test_a_request_names_the_model_and_contacts_nothing(here, hub, monkeypatch):
    requests = []

    def request(backend, envelope, tracer):
        requests.append((envelope, backend._serialize(tracer)))
        raise RemoteError("stopped before it was sent")

    def unexpected(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(RemoteBackend, "request", request)
    monkeypatch.setattr(websocket, "create_connection", unexpected)
    monkeypatch.setattr("socket.socket.connect", unexpected)
    remote = load_served(hub("llama"), revision="main")
    with pytest.raises(RemoteError, match="stopped before it was sent"):
        remote.hidden(batch_of(remote), edits_of(remote, "all"))
    ((envelope, blob),) = requests
    assert envelope.model_key == (
        "nnsight.modeling.transformers.TransformersModel:"
        '{"repo_id": "emlens-tests/tiny-llama", "revision": "main", "task": "text-generation"}'
    )
    assert envelope.env == {"attn_implementation": "sdpa"}
    assert len(blob) < 20_000
    assert not remote._traced.dispatched


# -- what is refused ------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_named(hub):
    remote = load_served(hub("llama"), remote="http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"no answer for .*tiny-llama from http://127.0.0.1:9"
    ):
        remote.hidden(batch_of(remote))
    with pytest.raises(ConnectionError, match=r"remote='local' tries the same request here"):
        emlens.load(remote.name, remote="http://127.0.0.1:9", task="text-generation")


def test_a_refused_key_is_told_apart_from_an_error_on_the_server(hub, monkeypatch):
    def request(backend, envelope, tracer):
        raise RemoteError("Failed to send request: invalid key") from httpx.HTTPError("401")

    monkeypatch.setattr(RemoteBackend, "request", request)
    remote = load_served(hub("llama"))
    with pytest.raises(ConnectionError, match=r"invalid key.*your key is set"):
        remote.hidden(batch_of(remote))


def test_what_needs_weights_is_refused_with_what_works(dry):
    remote = dry("llama")
    batch = batch_of(remote)
    works = r"residuals \(pooled too\), hidden, edits and generate work remotely"
    with pytest.raises(RuntimeError, match=rf"unembed .* are on a server. {works}"):
        remote.unembed(torch.zeros(1, remote.d_model))
    with pytest.raises(RuntimeError, match=r"normalize needs the weights"):
        remote.normalize(torch.zeros(1, remote.d_model))
    with pytest.raises(RuntimeError, match=rf"a gradient needs the weights.*{works}"):
        remote.hidden(batch, grad=True)
    with pytest.raises(RuntimeError, match=r"training .*load the model without remote="):
        remote.frozen()
    with pytest.raises(RuntimeError, match=r"an adapter needs the weights"):
        remote.adapter("narrow").__enter__()
    with pytest.raises(RuntimeError, match=r"every loss and KL"):
        emlens.hooked.response_losses(remote, [batch])


def test_edits_and_pools_that_cannot_travel_are_refused(dry):
    remote = dry("llama")
    batch, along = batch_of(remote), direction(remote)

    class Twice(Add):
        def delta(self, residual, layer):
            return 2 * super().delta(residual, layer)

    with pytest.raises(ValueError, match=r"the formula of Shift holds a tensor that requires grad"):
        remote.hidden(batch, [Shift(torch.ones(remote.d_model, requires_grad=True), 1)])
    with pytest.raises(TypeError, match=r"Twice cannot run remotely: .*method formula\(layer\)"):
        remote.hidden(batch, [Twice(along)])

    import pandas

    def by_table(residual):
        return torch.tensor(pandas.DataFrame(residual[0].numpy()).mean().to_numpy())

    lock = threading.Lock()

    def guarded(residual):
        with lock:
            return residual

    with pytest.raises(TypeError, match=r"the pool cannot run remotely: it needs pandas, which"):
        remote.residuals(batch, 1, pool=by_table)
    with pytest.raises(TypeError, match=r"the pool cannot be sent to a server: .*lock"):
        remote.residuals(batch, 1, pool=guarded)


def test_a_subclass_that_brings_its_own_formula_is_carried(here, dry):
    class Twice(Add):
        def delta(self, residual, layer):
            function, arguments = self.formula(layer)
            return function(residual, *arguments)

        def formula(self, layer):
            function, (vector,) = super().formula(layer)
            return function, (2 * vector,)

    local, batch = here("llama"), batch_of(here("llama"))
    expected = local.hidden(batch, [Add(direction(local), scale=2.0)])
    found = dry("llama").hidden(batch, [Twice(direction(local))])
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_what_only_the_server_can_choose_is_refused(saved, hub):
    with pytest.raises(ValueError, match=r"tiny-llama is a folder here, which a server does not"):
        emlens.load(saved("llama"), remote=True)
    with pytest.raises(ValueError, match=r"with remote= the server has chosen them"):
        load_served(hub("llama"), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"remote= runs with engine='nnsight' alone"):
        emlens.load(saved("llama"), engine="transformer_lens", remote="local")


def test_the_check_refuses_a_server_whose_hooks_miss_a_row(saved, monkeypatch):
    remote = emlens.load(saved("llama"), remote="local")
    first = RemoteModel.hidden

    def stuck(self, batch, edits=(), resume=None, *, grad=False):
        hidden = first(self, batch, edits, resume)
        places = list(batch.index)
        hidden[places.index(3)] = hidden[places.index(1)]
        return hidden

    monkeypatch.setattr(RemoteModel, "hidden", stuck)
    with pytest.raises(RuntimeError, match=r"edit at layer 2 left a row of 5 tokens as it was"):
        check_remote(remote)


def test_passes_that_are_not_finite_are_refused(dry, saved, tmp_path, own_functions_travel):
    remote, asked = dry("llama"), [Conversation.of("how", id="short")]
    huge = Add(direction(remote, size=1e25))
    for call in (
        lambda: remote.hidden(batch_of(remote), [huge]),
        lambda: remote.residuals(batch_of(remote), 2, pool=mean_of_row, edits=[huge]),
        lambda: remote.generate(asked, [huge], max_new_tokens=3),
    ):
        with pytest.raises(NonFiniteError, match=r"the residual of .* at layer 1 \(resid_post\)"):
            call()

    folder = shutil.copytree(saved("llama"), tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken = emlens.load(folder, remote="local", check=False)
    for temperature in (0, 1.0):
        with pytest.raises(NonFiniteError, match="a logit of short under base is not finite"):
            broken.generate(asked, temperature=temperature, max_new_tokens=3)
