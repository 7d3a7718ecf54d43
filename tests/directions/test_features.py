"""Directions in the features of a sparse autoencoder, made here in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from emlens import Direction
from emlens.directions import FeatureDecomposition, in_features

D, N = 24, 40


@dataclass(frozen=True)
class Config:
    d_model: int = D
    n_features: int = N
    threshold: float = 0.0
    orthonormal: bool = False


class SAE(nn.Module):
    """`relu(W (x - c) + b)`, with a jump where a threshold is given, and `W' f + c`."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        columns = torch.randn(config.n_features, config.d_model, generator=g)
        if config.orthonormal:
            columns = torch.linalg.qr(columns.T)[0].T
        self.columns = nn.Parameter(columns / columns.norm(dim=1, keepdim=True))
        self.bias = nn.Parameter(-0.1 * torch.rand(len(columns), generator=g))
        self.centre = nn.Parameter(torch.randn(config.d_model, generator=g))
        self.threshold = config.threshold

    def encode(self, x):
        before = (x - self.centre) @ self.columns.T + self.bias
        return torch.where(before > self.threshold, before, 0).relu()

    def decode(self, features):
        return features @ self.columns + self.centre


def test_the_features_that_a_direction_is_made_of_are_found():
    sae = SAE(Config(n_features=D, orthonormal=True))
    parts = {3: 5.0, 11: -2.0, 17: 1.0}
    v = sum(size * sae.columns[i].detach() for i, size in parts.items())
    found = in_features(Direction.of(v, 2), sae.encode, sae.decode, k=3)
    by = dict(zip(found.features, found.changes, strict=True))
    # from where no feature is on, one that is taken away cannot fall
    assert by[3] == pytest.approx(5.0 + sae.bias[3].item(), abs=1e-4)
    assert by[17] == pytest.approx(1.0 + sae.bias[17].item(), abs=1e-4) and by[11] == 0
    cosines = dict(zip(found.features, found.cosines, strict=True))
    norm = sum(size**2 for size in parts.values()) ** 0.5
    assert {i: cosines[i] for i in parts} == pytest.approx(
        {i: size / norm for i, size in parts.items()}, abs=1e-5
    )
    assert (found.active, found.n_features, found.layer) == (2, D, 2)
    assert found.features[:2] == (3, 17)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_changes_are_means_over_activations_as_counted_by_hand(threshold):
    sae = SAE(Config(threshold=threshold))
    g = torch.Generator().manual_seed(1)
    activations, v = 3 * torch.randn(2500, D, generator=g), torch.randn(D, generator=g)
    found = in_features(Direction.of(v, 0), sae.encode, sae.decode, activations, k=5)
    with torch.no_grad():
        before = sae.encode(activations).double()
        after = sae.encode(activations + v).double()
        change = (after - before).mean(0)
        moved = change @ sae.columns.double()
        cosines = sae.columns @ v / v.norm()
    table = found.table().set_index("feature")
    most, along = change.abs().topk(5).indices.tolist(), cosines.abs().topk(5).indices.tolist()
    assert set(table.index) == {*most, *along} and list(table.index[:5]) == most
    for feature, row in table.iterrows():
        assert row["change of activation"] == pytest.approx(float(change[feature]), abs=1e-5)
        assert row["cosine"] == pytest.approx(float(cosines[feature]), abs=1e-5)
        assert row["activation without"] == pytest.approx(
            float(before[:, feature].mean()), abs=1e-5
        )
    missed = float((v.double() - moved).square().sum() / v.double().square().sum())
    assert found.reconstructed == pytest.approx(1 - missed, abs=1e-5)


def test_a_decomposition_shows_and_keeps_itself(tmp_path):
    sae = SAE(Config())
    found = in_features(Direction.of(torch.randn(D), 1), sae.encode, sae.decode, torch.randn(9, D))
    assert found.plot().get_xlabel() == "feature"
    assert FeatureDecomposition.load(found.save(tmp_path / "it.json")) == found
    assert sae.columns.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": N + 1}, f"k is {N + 1}; the autoencoder has {N} features"),
        ({"activations": torch.zeros(3, D + 1)}, r"activations has shape \(3, 25\); it needs \[n,"),
        ({"activations": torch.full((3, D), float("nan"))}, "are not finite for these activations"),
        ({"encode": lambda x: x[0]}, r"the encoder gives has shape \(24,\); it needs"),
        ({"decode": lambda f: f}, r"decodes to has shape \(5, 40\); it needs \[n, 24\]"),
        ({"direction": Direction.of(torch.zeros(D), 1)}, "layer 1 is zero"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    sae = SAE(Config())
    given = {
        "direction": Direction.of(torch.randn(D), 1),
        "encode": sae.encode,
        "decode": sae.decode,
        "activations": torch.randn(5, D),
    }
    with pytest.raises(ValueError, match=message):
        in_features(**(given | change))
