"""Directions from and to the hub: a folder stands in for the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from emlens.directions import (
    Direction,
    Directions,
    Provenance,
    adapter_directions,
    from_hub,
    push_to_hub,
)
from emlens.directions.formats.hub import card
from tests.support.adapters import saved
from tests.support.models import tiny_model

D = 8
REPO = "me/vectors"


class Hub:
    """What is used of `huggingface_hub`, on folders of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple] = []
        self.token: str | None = None

    def api(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def _folder(self, repo_id: str, revision: str | None) -> Path:
        folder = self.root / repo_id / (revision or "main")
        if not folder.is_dir():
            response = SimpleNamespace(headers={}, request=None)
            message = f"404 Client Error.\n\nRepository Not Found for {repo_id}."
            raise RepositoryNotFoundError(message, response=response)  # type: ignore[arg-type]
        return folder

    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        folder = self._folder(repo_id, revision)
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self._folder(repo_id, None) / filename).is_file()

    def download(
        self, repo_id: str, filename: str, revision: str | None = None, token: str | None = None
    ) -> str:
        path = self._folder(repo_id, revision) / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        kept = self.root / "cache" / repo_id / (revision or "main") / filename
        kept.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(path, kept))

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        self.asked.append(("create", repo_id, private, exist_ok))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo_id: str, operations: list, commit_message: str):
        self.asked.append(("commit", repo_id, commit_message))
        for operation in operations:
            path = self.root / repo_id / "main" / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(operation.path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.chdir(tmp_path)
    return made


def some(layers=(1, 2), site="resid_post", model="org/base", seed=0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    made = Provenance(
        "mean-diff",
        model=model,
        revision="abc",
        tokens="response",
        data={"bad": "0123456789abcdef"},
        n={"conversations": 12},
        seed=3,
    )
    vectors = {layer: torch.randn(D, generator=generator) for layer in layers}
    return (Direction if len(layers) == 1 else Directions)(vectors, site, made)


def same(first: Directions, second: Directions) -> None:
    assert (first.site, first.layers) == (second.site, second.layers)
    assert all(torch.equal(first.vectors[layer], second.vectors[layer]) for layer in first)


# -- reading -------------------------------------------------------------------------------------


def test_a_folder_or_a_file_is_read_without_the_hub(tmp_path):
    written = some()
    path = written.save(tmp_path / "a.safetensors")
    same(from_hub(tmp_path), written)
    same(from_hub(path), written)
    some(seed=1).save(tmp_path / "b.safetensors")
    same(from_hub(str(tmp_path), "a.safetensors"), written)
    with pytest.raises(ValueError, match=r"2 files of directions; .* a.safetensors, b.safetensors"):
        from_hub(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*c\.safetensors"):
        from_hub(tmp_path, "c.safetensors")


@pytest.mark.parametrize(
    ("filename", "site", "layers"),
    [
        ("directions.safetensors", "attn_out", (0, 2)),
        ("deep/v.gguf", "resid_post", (1, 2)),
        ("steering_vector.pt", "mlp_out", (3,)),
    ],
)
def test_what_is_pushed_comes_back_in_every_format(hub, filename, site, layers):
    written = some(layers, site)
    address = push_to_hub(written, REPO, filename=filename, private=True, token="secret")
    assert address == f"https://hub/{REPO}/commit/1"
    assert hub.asked == [
        ("create", REPO, True, True),
        ("commit", REPO, f"Upload {filename} with emlens"),
    ]
    assert hub.token == "secret"
    assert sorted(hub.list_repo_files(REPO)) == sorted(["README.md", filename])
    same(from_hub(REPO), written)
    same(from_hub(REPO, filename), written)


def test_a_revision_is_read_where_one_is_named(hub):
    written = some(seed=1)
    push_to_hub(some(), REPO)
    written.save(hub.root / REPO / "v2" / "other.safetensors")
    same(from_hub(REPO, revision="v2"), written)
    same(from_hub(REPO, "other.safetensors", revision="v2"), written)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("place", ["", "checkpoints/final/"])
def test_a_repository_of_the_papers_says_its_base_model(hub, named, place):
    filename = f"{place}steering_vector.pt"
    path = hub.root / REPO / "main" / filename
    path.parent.mkdir(parents=True)
    torch.save({"steering_vector": torch.ones(D), "layer_idx": 24, "alpha": 2.0}, path)
    read = from_hub(REPO, filename if named else None)
    assert read.provenance.model is None
    config = hub.root / REPO / "main" / "adapter_config.json"
    config.write_text(json.dumps({"base_model": "org/base"}))
    read = from_hub(REPO, filename if named else None)
    assert read.provenance.model == "org/base"
    assert torch.equal(read[24].vector, torch.full((D,), 2.0))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("place", ["", "checkpoints/checkpoint-5/"])
def test_a_repository_with_an_adapter_is_read_with_its_config(hub, named, place):
    folder = saved(hub.root / REPO / "main" / place, tiny_model("llama"))
    filename = f"{place}adapter_model.safetensors"
    read = from_hub(REPO, filename if named else None)
    same(read, adapter_directions(folder))
    assert read.provenance.adapter == REPO


def test_what_is_not_on_the_hub_is_refused_in_words(hub):
    with pytest.raises(FileNotFoundError, match=r"found no no/such, neither .* \(404 Client Error"):
        from_hub("no/such")
    with pytest.raises(FileNotFoundError, match=r"found no no/such/v\.gguf, neither in a folder"):
        from_hub("no/such", "v.gguf")
    push_to_hub(some(), REPO)
    with pytest.raises(FileNotFoundError, match=r"found no me/vectors/x\.gguf, .*no x\.gguf in"):
        from_hub(REPO, "x.gguf")
    push_to_hub(some(), REPO, filename="b.gguf")
    with pytest.raises(ValueError, match=r"me/vectors holds 2 .* b.gguf, directions.safetensors"):
        from_hub(REPO)
    (hub.root / "me/empty/main").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="me/empty holds no directions .*it has nothing"):
        from_hub("me/empty")


def test_without_a_network_what_is_missing_is_refused_in_words():
    # the tests run with HF_HUB_OFFLINE; this asks the real library
    with pytest.raises(FileNotFoundError, match="found no no/such, neither in a folder nor on"):
        from_hub("no/such")
    with pytest.raises(FileNotFoundError, match=r"found no no/such/v\.gguf, neither"):
        from_hub("no/such", "v.gguf")
    with pytest.raises(FileNotFoundError, match=r"found no /no/such/folder/at/all, neither"):
        from_hub("/no/such/folder/at/all")


def test_a_connection_that_fails_is_told_in_words(hub, monkeypatch):
    class ConnectError(Exception):
        """As that of the hub's client: no `OSError`."""

    def fails(*_args, **_named):
        raise ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(hub, "list_repo_files", fails)
    with pytest.raises(FileNotFoundError, match=r"found no me/vectors, .* \(\[Errno 111\] Conn"):
        from_hub(REPO)


# -- writing -------------------------------------------------------------------------------------


def test_nothing_is_made_on_the_hub_for_what_a_format_cannot_hold(hub):
    with pytest.raises(ValueError, match=r"v\.gguf: a control vector acts at resid_post"):
        push_to_hub(some(site="mlp_out"), REPO, filename="v.gguf")
    assert hub.asked == []


def test_the_card_says_what_the_directions_are():
    directions = some((1,))
    text = card(directions, REPO, "v.gguf")
    head, _, body = text.partition("---\n# vectors")
    assert "base_model: org/base" in head
    assert "license:" not in head, "the licence is the owner's to choose"
    for line in (
        "- Construction: mean-diff. Other constructions of the same behaviour",
        "- Model: org/base at revision abc",
        "- Site: `resid_post`: the output of the block, never after the final norm.",
        "- Layers: 1",
        f"- Width: {D}",
        f"- Norm: {directions.norms[1]:.4g}",
        "- Tokens that counted: response",
        "- Data: 12 conversations; bad 0123456789ab",
        "- Seed: 3",
        'directions.from_hub("me/vectors", "v.gguf")',
    ):
        assert line in body
    assert "Adapter" not in body, "what is not known is left out"


@pytest.mark.parametrize("model", [None, "tiny", "./base", "/models/org/base"])
def test_a_base_that_is_no_hub_name_stays_out_of_the_head(model):
    assert "base_model" not in card(some(model=model), REPO, "v.gguf")


def test_only_the_section_of_the_file_is_replaced_in_a_card(hub):
    push_to_hub(some(), REPO, filename="a.safetensors")
    path = hub.root / REPO / "main" / "README.md"
    path.write_text(path.read_text().replace("# vectors", "# My own title") + "\nMy own words.\n")
    push_to_hub(some((2,)), REPO, filename="b.gguf")
    both = path.read_text()
    assert both.startswith("---\nlibrary_name: emlens")
    for kept in ("# My own title", "My own words.", "- Layers: 1, 2\n", "- Layers: 2\n"):
        assert both.count(kept) == 1
    push_to_hub(some((7,)), REPO, filename="a.safetensors")
    assert path.read_text() == both.replace("- Layers: 1, 2\n", "- Layers: 7\n").replace(
        line(both, "- Norm: "), line(card(some((7,)), REPO, "a.safetensors"), "- Norm: ")
    )


def line(text: str, start: str) -> str:
    """The first line that starts so."""
    return next(one for one in text.splitlines() if one.startswith(start))


def test_a_card_of_somebody_else_is_kept_and_gets_a_section(hub):
    path = hub.root / REPO / "main" / "README.md"
    path.parent.mkdir(parents=True)
    path.write_text("---\nlicense: mit\n---\n# Theirs\n")
    push_to_hub(some(), REPO)
    text = path.read_text()
    assert text.startswith("---\nlicense: mit\n---\n# Theirs\n\n<!-- emlens: directions.safet")
    assert text.endswith("<!-- end of directions.safetensors -->\n")
