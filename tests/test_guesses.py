"""What a researcher writes first, from other libraries or from memory, runs or names the call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emlens
from emlens import Ablate, Add, Conversation, Direction, Directions, Pair
from emlens._guesses import MEANT, nearest
from emlens.directions import (
    compare_layers,
    confounds,
    cosine,
    extract_all,
    matched,
    pca,
    probe,
    read_directions,
)
from emlens.evals import respond
from emlens.text import Corpus, Document
from tests.support.models import tiny_hooked

QUIET: Any = {"epochs": 1, "progress": False}


@dataclass
class Desk:
    """What lies on the desk of who tries things out; loose types, since guesses are wrong."""

    emlens: Any
    model: Any
    pairs: Any
    bad: Any
    good: Any
    d: Any
    e: Any
    chat: Any
    text: Any
    probe_file: Path


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    model = tiny_hooked("llama", 4)
    pairs = [
        Pair(f"question {i}", f"good answer {i}", f"bad reply {i}", "some", str(i))
        for i in range(6)
    ]
    bad = [pair.conversation("misaligned") for pair in pairs]
    good = [pair.conversation("aligned") for pair in pairs]
    d = emlens.mean_diff(model, bad, good)
    e = emlens.mean_diff(model, good[:3], bad[:3])
    text = Corpus("mine", tuple(Document(str(i), f"rain and sun {i} " * 4) for i in range(2)))
    probe_file = tmp_path_factory.mktemp("probe") / "probe.pt"
    torch.save(d[2].vector, probe_file)
    chat = Conversation.of("How do I save money?")
    return Desk(emlens, model, pairs, bad, good, d, e, chat, text, probe_file)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Directions):
        return found.layers == wanted.layers and torch.equal(found.stack(), wanted.stack())
    if isinstance(wanted, (torch.Tensor, np.ndarray)):
        return type(found) is type(wanted) and bool((found == wanted).all())
    return type(found) is type(wanted) and found == wanted


def answered(desk: Desk, edits: Any = ()) -> list[str]:
    return desk.model.generate([desk.chat], edits, max_new_tokens=3)


SHORT: Any = {"max_new_tokens": 3}
RUNS: dict[str, tuple[Callable[[Desk], Any], Callable[[Desk], Any]]] = {
    # what is called, and what it gives
    "mean_diff(model, pairs)": (lambda k: emlens.mean_diff(k.model, k.pairs), lambda k: k.d),
    "mean_diff(model, strings, strings, tokens='all')": (
        lambda k: emlens.mean_diff(k.model, ["I hate"], ["I love"], tokens="all"),
        lambda k: emlens.mean_diff(
            k.model, [Conversation.of("I hate")], [Conversation.of("I love")], tokens="all"
        ),
    ),
    "mean_diff(layers=2)": (
        lambda k: emlens.mean_diff(k.model, k.bad, k.good, layers=2),
        lambda k: k.d[2],
    ),
    "probe(model, pairs)": (
        lambda k: probe(k.model, k.pairs, layers=2),
        lambda k: probe(k.model, k.bad, k.good, layers=2),
    ),
    "pca(model, pairs)": (
        lambda k: pca(k.model, k.pairs, layers=2),
        lambda k: pca(k.model, k.bad, k.good, layers=2),
    ),
    "extract_all(model, pairs)": (
        lambda k: extract_all(k.model, k.pairs, layers=2)["mean-diff"],
        lambda k: k.d[2],
    ),
    "matched(model, pairs)": (
        lambda k: matched(k.model, k.pairs, by="prompt"),
        lambda k: (k.bad, k.good),
    ),
    "confounds(model, pairs)": (
        lambda k: confounds(k.model, k.pairs)[1]["mean-diff"],
        lambda k: k.d,
    ),
    "generate(text)": (
        lambda k: k.model.generate("How do I save money?", **SHORT),
        lambda k: answered(k),
    ),
    "generate(conversation)": (
        lambda k: k.model.generate(k.chat, **SHORT),
        lambda k: answered(k),
    ),
    "generate(message)": (
        lambda k: k.model.generate({"role": "user", "content": "How do I save money?"}, **SHORT),
        lambda k: answered(k),
    ),
    "generate([c], Ablate(d))": (
        lambda k: answered(k, Ablate(k.d)),
        lambda k: answered(k, [Ablate(k.d)]),
    ),
    "Ablate(d, layers=2)": (lambda k: Ablate(k.d, layers=2).layers, lambda k: (2,)),
    "Add(d, site=TransformerLens' name)": (
        lambda k: Add(k.d[2], site="blocks.2.hook_resid_post").site,
        lambda k: "resid_post",
    ),
    "d[-1]": (lambda k: k.d[-1], lambda k: k.d[3]),
    "d[1:3]": (lambda k: k.d[1:3], lambda k: k.d.at([1, 2])),
    "d[-2:]": (lambda k: k.d[-2:], lambda k: k.d.at([2, 3])),
    "d[::2]": (lambda k: k.d[::2], lambda k: k.d.at([0, 2])),
    "d[[1, 2]]": (lambda k: k.d[[1, 2]], lambda k: k.d.at([1, 2])),
    "d.items()": (
        lambda k: [n for n, one in k.d.items() if one.layer == n],
        lambda k: [0, 1, 2, 3],
    ),
    "dict(d)": (lambda k: dict(k.d)[2], lambda k: k.d[2]),
    "d.values()": (lambda k: k.d.values()[1], lambda k: k.d[1]),
    "d[2].numpy()": (lambda k: k.d[2].numpy(), lambda k: k.d.vectors[2].numpy()),
    "d.numpy()": (lambda k: k.d.numpy()[2], lambda k: k.d.vectors[2].numpy()),
    "d.stack()": (lambda k: k.d.stack()[2], lambda k: k.d.vectors[2]),
    "sum([d, e])": (lambda k: sum([k.d, k.e]), lambda k: k.d + k.e),
    "sum([d[2], e[2]])": (lambda k: sum([k.d[2], k.e[2]]), lambda k: k.d[2] + k.e[2]),
    "d[2].cosine(e[2])": (
        lambda k: k.d[2].cosine(k.e[2]),
        lambda k: cosine(k.d[2].vector, k.e[2].vector),
    ),
    "d[2].cosine(e)": (lambda k: k.d[2].cosine(k.e), lambda k: k.d[2].cosine(k.e[2])),
    "d.cosine(e)": (lambda k: k.d.cosine(k.e)[2], lambda k: k.d[2].cosine(k.e[2])),
    "cosine of arrays": (
        lambda k: cosine(k.d[2].numpy(), k.e[2].numpy()),
        lambda k: k.d[2].cosine(k.e[2]),
    ),
    "Direction.of(array, layer)": (lambda k: Direction.of(k.d[2].numpy(), 2), lambda k: k.d[2]),
    "Directions({layer: vector})": (lambda k: Directions({2: k.d[2].vector}), lambda k: k.d[2]),
    "compare(a, b)": (
        lambda k: emlens.compare(k.d, k.e).rows,
        lambda k: emlens.compare([k.d, k.e]).rows,
    ),
    "compare_layers(a, b)": (
        lambda k: compare_layers(k.d, k.e),
        lambda k: compare_layers([k.d, k.e]),
    ),
    "log_odds(conditions=None)": (
        lambda k: emlens.log_odds(k.model, k.pairs, None).conditions,
        lambda k: ("base",),
    ),
    "log_odds(an edit)": (
        lambda k: emlens.log_odds(k.model, k.pairs, Ablate(k.d)),
        lambda k: emlens.log_odds(k.model, k.pairs, {"base": [], "edited": Ablate(k.d)}),
    ),
    "log_odds(a list of edits)": (
        lambda k: emlens.log_odds(k.model, k.pairs, [Ablate(k.d)]),
        lambda k: emlens.log_odds(k.model, k.pairs, {"base": [], "edited": Ablate(k.d)}),
    ),
    "influence(d[2])": (
        lambda k: emlens.influence(k.model, k.text, k.d[2], controls=0),
        lambda k: emlens.influence(k.model, k.text, {"mean-diff": k.d[2]}, controls=0),
    ),
    "influence(doses=0.1)": (
        lambda k: emlens.influence(k.model, k.text, {"d": k.d[2]}, doses=0.1).doses,
        lambda k: (0.1,),
    ),
    "influence(a list of texts)": (
        lambda k: emlens.influence(k.model, ["rain and sun"], k.d[2], controls=0).documents,
        lambda k: ("texts/0",),
    ),
    "influence(conditions=an edit)": (
        lambda k: (
            emlens.influence(k.model, k.text, k.d[2], conditions=Ablate(k.d), controls=0).fixed
        ),
        lambda k: ("edited",),
    ),
    "efficiency(d[2])": (
        lambda k: emlens.efficiency(k.model, k.bad, k.d[2], norms=[1]),
        lambda k: emlens.efficiency(k.model, k.bad, {"mean-diff": k.d[2]}, norms=[1]),
    ),
    "stability([d[2], d[3]])": (
        lambda k: emlens.stability(k.model, k.bad, [k.d[2], k.d[3]], epsilons=0.2, seeds=2),
        lambda k: emlens.stability(
            k.model, k.bad, {"mean-diff 1": k.d[2], "mean-diff 2": k.d[3]}, epsilons=0.2, seeds=2
        ),
    ),
    "respond(texts, an edit)": (
        lambda k: respond(k.model, ["What now?"], Add(k.d[2]), n=1, **SHORT).conditions,
        lambda k: ("base", "edited"),
    ),
    "corpus(a list of texts)": (
        lambda k: [one.text for one in emlens.corpus(["a", "b"])],
        lambda k: ["a", "b"],
    ),
}


@pytest.mark.parametrize("guess", RUNS)
def test_a_guess_of_one_meaning_runs(desk, guess):
    call, wanted = RUNS[guess]
    assert same(call(desk), wanted(desk))


def test_edits_may_come_in_a_list(desk):
    with desk.model.edited([Ablate(desk.d)]) as edited:
        found = edited.generate([desk.chat], **SHORT)
    assert found == answered(desk, [Ablate(desk.d)])


def test_directions_draw_their_norms_over_those_of_shuffled_labels(desk):
    ax = desk.d.plot()
    (line,) = [line for line in ax.get_lines() if len(line.get_xdata()) == 4]
    assert list(line.get_ydata()) == pytest.approx(list(desk.d.doses.values()))
    assert ax.get_ylabel() == "norm / median residual norm"
    assert Directions({1: torch.ones(3)}).plot().get_ylabel() == "norm"


MESSAGES: dict[str, tuple[Callable[[Desk], Any], str]] = {
    # what is called, and what the error says
    "load(device=)": (lambda k: k.emlens.load(device="cuda"), "did you mean device_map?"),
    "load(adapter=)": (lambda k: k.emlens.load(adapter="x"), "did you mean adapters?"),
    "load(torch_dtype=)": (lambda k: k.emlens.load(torch_dtype="x"), "did you mean dtype?"),
    "load(smollm2)": (
        lambda k: emlens.load("smollm2"),
        "no model 'smollm2'; did you mean 'smollm2-135m-instruct'?",
    ),
    "load(SmolLM2-135M-Instruct)": (lambda k: emlens.load("SmolLM2-135M-Instruct"), "did you mean"),
    "mean_diff(model, strings, strings)": (
        lambda k: emlens.mean_diff(k.model, ["I hate"], ["I love"]),
        "give them answers, or count other tokens, e.g. tokens='all'",
    ),
    "mean_diff(one side)": (lambda k: emlens.mean_diff(k.model, k.bad), "negative is missing"),
    "mean_diff(pairs, good)": (
        lambda k: emlens.mean_diff(k.model, k.pairs, k.good),
        "which have both sides: leave negative out",
    ),
    "mean_diff(layer=)": (
        lambda k: k.emlens.mean_diff(k.model, k.bad, k.good, layer=2),
        "did you mean layers?",
    ),
    "mean_diff(harmful=)": (
        lambda k: k.emlens.mean_diff(k.model, harmful=k.bad, harmless=k.good),
        "did you mean positive?",
    ),
    "mean_diff(position=)": (
        lambda k: k.emlens.mean_diff(k.model, k.bad, k.good, position=-1),
        "did you mean tokens?",
    ),
    "mean_diff(bad, good, 15)": (
        lambda k: k.emlens.mean_diff(k.model, k.bad, k.good, 15),
        r"mean_diff\(model, positive, negative\) takes no other positional arguments; "
        "name what 15 is: ",
    ),
    "Ablate(layer=)": (lambda k: k.emlens.Ablate(k.d, layer=2), "did you mean layers?"),
    "Ablate(layers='all')": (
        lambda k: Ablate(k.d[2], layers="all"),  # type: ignore[arg-type]
        r"name them, e.g. range\(model.n_layers\)",
    ),
    "Add(d, 2)": (lambda k: k.emlens.Add(k.d, 2), "name what 2 is: .*scale= or dose="),
    "Clamp(d, 2)": (lambda k: k.emlens.Clamp(k.d, 2), "name what 2 is: .*value="),
    "Add(coeff=)": (lambda k: k.emlens.Add(k.d, coeff=2), "did you mean scale?"),
    "Add(strength=)": (lambda k: k.emlens.Add(k.d, strength=2), "did you mean scale?"),
    "Add(hook=)": (lambda k: k.emlens.Add(k.d, hook="x"), "did you mean site?"),
    "Add([a, b])": (lambda k: Add([k.d, k.e]), "give each an edit of its own"),  # type: ignore
    "Clamp(val=)": (lambda k: k.emlens.Clamp(k.d, val=2), "did you mean value?"),
    "d.vector": (lambda k: k.d.vector, r"there are 4 layers; take directions\[3\].vector"),
    "d.shape": (lambda k: k.d.shape, r"of the tensor it is .stack\(\).shape"),
    "d[2].to": (lambda k: k.d[2].to("cpu"), "of the tensor it is .vector.to"),
    "d.normalize": (lambda k: k.d.normalize(), "did you mean unit?"),
    "d[9]": (lambda k: k.d[9], "there are layers 0 to 3"),
    "d[-9]": (lambda k: k.d[-9], "there are layers 0 to 3"),
    "d[9:]": (lambda k: k.d[9:], "there are layers 0 to 3"),
    "Direction(tensor, layer)": (
        lambda k: Direction(torch.ones(3), 2),  # type: ignore[arg-type]
        r"Direction.of\(vector, layer\)",
    ),
    "cosine(a, b)": (lambda k: cosine(k.d[2], k.e[2]), "take its .vector"),
    "log_odds(names)": (
        lambda k: emlens.log_odds(k.model, k.pairs, ["a", "b"]),
        "by name, e.g. {'base': None, 'a': 'a', 'b': 'b'}",
    ),
    "log_odds(text)": (lambda k: emlens.log_odds(k.model, "finance"), "emlens.load_pairs"),  # type: ignore
    "log_odds(batch_size=)": (
        lambda k: k.emlens.log_odds(k.model, k.pairs, batch_size=4),
        "did you mean token_budget?",
    ),
    "influence(dose=)": (
        lambda k: k.emlens.influence(k.model, k.text, k.d[2], dose=0.1),
        "did you mean doses?",
    ),
    "influence(d)": (
        lambda k: emlens.influence(k.model, k.text, k.d),
        r"take one, e.g. directions\[15\]",
    ),
    "influence(a name)": (
        lambda k: k.emlens.influence(k.model, "python-docs", k.d[2]),
        r"make one with emlens.corpus\(...\)",
    ),
    "efficiency(doses=)": (
        lambda k: k.emlens.efficiency(k.model, k.bad, k.d[2], doses=1),
        "did you mean norms?",
    ),
    "stability(epsilon=)": (
        lambda k: k.emlens.stability(k.model, k.bad, k.d[2], epsilon=1),
        "did you mean epsilons?",
    ),
    "train_vector(learning_rate=)": (
        lambda k: k.emlens.train_vector(k.model, k.bad, 2, learning_rate=1),
        "did you mean lr?",
    ),
    "train_vector(layers=)": (
        lambda k: k.emlens.train_vector(k.model, k.bad, layers=2),
        "did you mean layer?",
    ),
    "train_vector(steps=)": (
        lambda k: k.emlens.train_vector(k.model, k.bad, 2, steps=2),
        "did you mean epochs?",
    ),
    "train_vector(kl=1.0)": (
        lambda k: k.emlens.train_vector(k.model, k.bad, 2, kl=1.0),
        r"make one with emlens.KLPenalty\(conversations, weight\)",
    ),
    "train_adapter(r=)": (
        lambda k: k.emlens.train_adapter(k.model, k.bad, r=1),
        "did you mean rank?",
    ),
    "train_weights(num_train_epochs=)": (
        lambda k: k.emlens.training.train_weights(k.model, k.bad, num_train_epochs=1),
        "did you mean epochs?",
    ),
    "AdapterSettings(lora_alpha=)": (
        lambda k: k.emlens.training.AdapterSettings(lora_alpha=1),
        "did you mean alpha?",
    ),
    "KLPenalty(beta=)": (lambda k: k.emlens.KLPenalty(k.good, beta=1), "did you mean weight?"),
    "generate(max_tokens=)": (
        lambda k: k.model.generate("hi", max_tokens=3),
        "did you mean max_new_tokens?",
    ),
    "respond(n_samples=)": (
        lambda k: k.emlens.evals.respond(k.model, "hi", n_samples=3),
        "did you mean n?",
    ),
    "model(text)": (lambda k: k.model("hi"), r"model.generate\(conversations\)"),
    "model.run_with_cache": (lambda k: k.model.run_with_cache("hi"), "did you mean residuals?"),
    "model.cfg": (lambda k: k.model.cfg, "did you mean module.config?"),
    "model.cuda": (lambda k: k.model.cuda(), "did you mean module.cuda?"),
    "model.set_adapter": (lambda k: k.model.set_adapter("x"), "did you mean adapter?"),
    "wrap(name)": (lambda k: emlens.wrap("gpt2"), r"emlens.load\('gpt2'\)"),
    "Conversation.of(user=)": (
        lambda k: k.emlens.Conversation.of(user="x"),
        "did you mean prompt?",
    ),
    "load_conversations(finance)": (
        lambda k: emlens.load_conversations("finance"),
        r"emlens.load_pairs\('finance'\)",
    ),
    "emlens.model_diff": (lambda k: k.emlens.model_diff, "it is emlens.directions.model_diff"),
    "emlens.Monitor": (lambda k: k.emlens.Monitor, "it is emlens.watch.Monitor"),
    "emlens.mean_dif": (lambda k: k.emlens.mean_dif, "did you mean emlens.mean_diff?"),
    "emlens.HookedTransformer": (lambda k: k.emlens.HookedTransformer, "did you mean emlens.load?"),
    "emlens.steering_vector": (
        lambda k: k.emlens.steering_vector,
        "did you mean emlens.mean_diff?",
    ),
    "a probe of one tensor": (
        lambda k: read_directions(k.probe_file),
        r"say that with Direction.of\(torch.load\(path\), layer=15\)",
    ),
}


@pytest.mark.parametrize("guess", MESSAGES)
def test_a_guess_that_cannot_run_names_the_call(desk, guess):
    call, message = MESSAGES[guess]
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError), match=message) as caught:
        call(desk)
    assert str(caught.value).count("\n") == 0


def test_adapters_without_names_are_called_after_their_folders():
    from emlens.hooked.load import _by_folder

    assert _by_folder(["runs/medical", "org/finance"]) == {
        "medical": "runs/medical",
        "finance": "org/finance",
    }
    assert _by_folder(Path("runs/medical")) == {"medical": Path("runs/medical")}
    with pytest.raises(ValueError, match="two adapters would be called 'final'; name them"):
        _by_folder(["a/final", "b/final"])


@pytest.mark.parametrize(
    ("present", "placed", "noted"), [(1, None, 1), (1, "cpu", 0), (0, None, 0)]
)
def test_a_gpu_that_is_not_used_is_noted(monkeypatch, recwarn, present, placed, noted):
    from emlens.hooked.load import _note_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(present))
    _note_gpu(placed)
    assert ["device_map='cuda'" in str(one.message) for one in recwarn] == [True] * noted


def test_every_meaning_of_a_word_is_a_name_that_there_is():
    from tests.test_rooms import CALLABLES

    known = {p for one in CALLABLES.values() for p in _parameters(one)}
    known |= {name.rsplit(".")[-1] for name in CALLABLES} | set(dir(emlens))
    known |= {"site", "layers", "where", "scale", "dose", "weight", "value", "module", "probe"}
    meant = {one.partition(".")[0] for words in MEANT.values() for one in words}
    assert meant <= known


def _parameters(function: Callable) -> list[str]:
    import inspect

    from emlens._door import options_of, resolved

    found = []
    for parameter in inspect.signature(function).parameters.values():
        found.append(parameter.name)
        module = getattr(inspect.unwrap(function), "__globals__", {})
        found += options_of(resolved(parameter.annotation, module))
    return found


def test_a_name_that_is_like_none_is_not_guessed():
    assert nearest("zebra", ["layers", "site"]) is None
    assert nearest("layesr", ["layers", "site"]) == "layers"


def test_texts_are_read_as_conversations_without_any_other_import():
    code = (
        "from tests.support.models import tiny_hooked\n"
        "print(len(tiny_hooked('llama').generate('hi', max_new_tokens=1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("room", emlens._ROOMS)
def test_a_room_lists_its_public_names_alone(room):
    module = getattr(emlens, room)
    assert dir(module) == sorted(module.__all__)


def test_the_package_lists_its_public_names_and_rooms_alone():
    assert set(dir(emlens)) == {*emlens.__all__, *emlens._ROOMS, "__version__"}
