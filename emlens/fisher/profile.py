"""The Fisher profile: the influence of any direction at any layer, from one pass over a corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from emlens._door import guard_methods, guarded
from emlens._reading import expanded
from emlens._runs import check_same
from emlens._tensors import read_tensors, write_tensors
from emlens.directions import Direction, Evidence, Provenance
from emlens.fisher.forms import (
    Forms,
    controls,
    crossed,
    eigen,
    forms,
    halves_seen,
    percentiles,
    tokens_seen,
)
from emlens.fisher.inputs import HELD_OUT, Expected, Group, Scored, grouped
from emlens.fisher.passes import PassSettings, gather
from emlens.fisher.results import ProfileScores, Spectrum, TopDirections
from emlens.fisher.sums import FisherSums
from emlens.hooked import CorpusOptions, HookedModel
from emlens.hooked.options import CorpusSettings
from emlens.hooked.sites import Layers, check_layers
from emlens.text import Corpus

KIND = "influence profile"
EIGENVECTOR = "Fisher eigenvector"

DOSE = 0.05
"""Share of the median residual norm that is scored by default: small enough for second order."""


@guard_methods
@dataclass(frozen=True, eq=False)
class InfluenceProfile:
    """What every direction at every layer does to next-token prediction on a corpus.

    A vector `v` added at every position of `resid_post` of a layer changes the predictions by a
    KL of `v' F v / 2` to second order, where `F` is the covariance of the gradient of
    `sum_s log p(y_s)` with respect to `v`, the `y_s` drawn from the model's own predictions. The
    loss changes by the inner product of `v` with its gradient plus the same `v' F v / 2`: `F`
    stands for the second derivative of the loss (Gauss-Newton). One pass over the corpus gives
    both for all layers. Then any direction is scored without the model.

    Attributes:
        settings: What was read, and how.
        corpora: Name and hash of every corpus that is part of it.
        skipped: Documents that were too short to predict anything in.
        sums: Gradients of the documents, or their covariance.
    """

    settings: PassSettings
    corpora: tuple[tuple[str, str], ...]
    skipped: int
    sums: FisherSums

    @classmethod
    @guarded
    def fit(
        cls,
        model: HookedModel,
        corpus: Corpus,
        layers: Layers = "all",
        draws: int = 8,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 16,
        **options: Unpack[CorpusOptions],
    ) -> InfluenceProfile:
        """Make the profile of a model on a corpus, in one streaming pass.

        It costs about `draws + 2` forward passes, whatever the number of layers. Memory does not
        grow with the corpus: at most about `32 * d_model^2` bytes per layer while it runs, a third
        of that in the profile and its file. Several processes share the documents.

        Args:
            model: The model, with the adapter and the edits that are in force.
            corpus: Raw text, e.g. `emlens.corpus("python-docs")`.
            layers: Layers to profile; fewer of them save memory in wide models.
            draws: Draws of all targets per document. The error of a score from the draws alone
                is about `sqrt(2 / (draws * documents))` of it.
            seed: Seed of the draws; those of a document depend on its tokens and the seed alone.
            checkpoint: A file that the state is written to; the same call resumes from it, to
                the same numbers. It stays there at the end.
            checkpoint_every: Batches between two writes.
            **options: See `CorpusOptions`.

        Raises:
            ValueError: If the corpus is empty or all of its documents are too short, a setting is
                out of range, a gradient is not finite (document and layer named), or the
                checkpoint is of another run.
        """
        if not len(corpus):
            raise ValueError(f"corpus {corpus.name!r} has no documents")
        reading = CorpusSettings(**options)
        max_tokens = reading.max_tokens
        settings = PassSettings.of(
            model, check_layers(layers, model.n_layers), draws, max_tokens, seed
        )
        sums, skipped = gather(
            model,
            corpus,
            settings,
            token_budget=reading.token_budget,
            checkpoint=None if checkpoint is None else expanded(checkpoint),
            every=checkpoint_every,
            progress=reading.progress,
        )
        if not sum(halves_seen(sums)):
            raise ValueError(
                f"no document of corpus {corpus.name!r} has two tokens within "
                f"max_tokens={max_tokens}, so nothing is predicted"
            )
        return cls(settings, ((corpus.name, corpus.hash),), skipped, sums.finished())

    # -- what it is ---------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        return self.settings.layers

    @property
    def corpus(self) -> str:
        """Name of the corpus, or names of the corpora."""
        return " + ".join(dict.fromkeys(name for name, _ in self.corpora))

    @property
    def n_documents(self) -> int:
        """Documents that count."""
        return sum(halves_seen(self.sums))

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return tokens_seen(self.sums)

    @cached_property
    def residual_norms(self) -> dict[int, float]:
        """Median norm of the residual on the corpus, by layer: what a dose is a share of."""
        norms = self.sums.tokens.norms.median(dim=1).values.tolist()
        return dict(zip(self.layers, norms, strict=True))

    @cached_property
    def id(self) -> str:
        """Hash of what was read, and how; 16 hexadecimal digits."""
        record = json.dumps([asdict(self.settings), self.corpora], sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        kept = "factor" if self.sums.totals is None else "covariance"
        return (
            f"InfluenceProfile({self.settings.model}, {len(self.layers)} layers, {kept}, "
            f"{self.n_documents} documents of {self.corpus}, {self.n_tokens} tokens, "
            f"{self.settings.draws} draws)"
        )

    # -- what it says -------------------------------------------------------------------------

    def score(
        self, directions: Scored, dose: float | Sequence[float] | None = DOSE
    ) -> ProfileScores:
        """Score any number of directions at once, without the model.

        The KL is quadratic in the dose; the change of loss has the gradient's linear part and the
        same quadratic one, so `loss_change - kl` is the first order alone. Both hold for small
        doses only, and `emlens.influence` measures what larger ones do.

        Leading eigenvectors of a profile (`top`) are scored on the half of the documents that
        they were not found on, by any profile that has one of their corpora in it.

        Args:
            directions: Named directions (all their layers are scored), or arrays `[n, d_model]`
                by layer.
            dose: Norms of what is added, as shares of the median residual norm of the layer on
                the corpus; a negative one turns the directions round. None adds them as they are.

        Raises:
            TypeError: If something is neither directions nor an array.
            ValueError: If there are none, or one is zero or not finite, has another width, layer
                or site, or comes from another model.
        """
        groups = grouped(directions, self._expected)
        doses = [None] if dose is None else [float(x) for x in np.atleast_1d(np.asarray(dose))]
        if not all(x is None or (np.isfinite(x) and x != 0) for x in doses):
            raise ValueError(f"doses must be finite and not zero; got {dose}")
        blocks = [self._block(group, doses) for group in groups]
        order = np.argsort(np.concatenate([group.places for group in groups]), kind="stable")
        columns: dict[str, Any] = {
            name: np.concatenate([np.asarray(block[name]) for block in blocks])[order]
            for name in blocks[0]
        }
        columns = {name: tuple(values.reshape(-1).tolist()) for name, values in columns.items()}
        return ProfileScores(**columns, corpus=self.corpus)

    @guarded
    def spectrum(self, layer: int) -> Spectrum:
        """Return the eigenvalues of a layer, in the sample, held out, and shrunk to what holds.

        Raises:
            ValueError: If the layer is not there, or there are too few documents for two halves.
        """
        place = self._place(layer)
        (first, one), (second, other) = (self._eigen(place, half) for half in (0, 1))
        values = eigen(self.sums, place, (0, 1))[0]
        n = min(len(one), len(other))
        outside = crossed(self.sums, place, one[:n].float(), other[:n].float())
        # <F0, F1>, each factor from another half
        products = float(((one @ other.T) ** 2 * first[:, None] * second).sum())
        return Spectrum(
            layer,
            tuple((values / self.n_tokens).tolist()),
            tuple(outside.quadratic.tolist()),
            effective_rank=float(first.sum() * second.sum()) / products,
            sample_rank=float(values.sum() ** 2 / (values**2).sum()),
            corpus=self.corpus,
        )

    @guarded
    def top(self, layer: int, k: int = 5, dose: float = DOSE) -> TopDirections:
        """Return the `k` directions of a layer with the largest influence, scored held out.

        The directions are leading eigenvectors on the even documents; `score` counts only the
        odd ones for them. The table averages both ways.

        Raises:
            ValueError: If the layer is not there, there are too few documents for two halves, or
                `k` is not between 1 and the rank of a half.
        """
        place = self._place(layer)
        vectors = [self._eigen(place, half)[1] for half in (0, 1)]
        most = min(map(len, vectors))
        if not 1 <= k <= most:
            raise ValueError(f"k must be between 1 and {most}, not {k}")
        first, second = (part[:k].float() for part in vectors)
        names = [f"top {rank}" for rank in range(1, k + 1)]
        group = Group(layer, None, names, [EIGENVECTOR] * k, list(range(k)), [first])
        block = self._block(group, [dose], crossed(self.sums, place, first, second))
        block["held_out"] = np.ones((k, 1), bool)
        columns: dict[str, Any] = {
            name: tuple(np.reshape(part, -1).tolist()) for name, part in block.items()
        }
        directions = {
            name: Direction(
                {layer: vector},
                "resid_post",
                self._provenance(rank),
                Evidence({layer: self.residual_norms[layer]}),
            )
            for rank, (name, vector) in enumerate(zip(names, first, strict=True), start=1)
        }
        return TopDirections(directions, ProfileScores(**columns, corpus=self.corpus))

    # -- together and on disk -----------------------------------------------------------------

    def merge(self, *others: InfluenceProfile) -> InfluenceProfile:
        """Return the profile of the documents of all, as if they had been read in one pass.

        Raises:
            ValueError: If they differ in model, layers, draws, seed or other settings, or have a
                corpus in common.
        """
        return reduce(InfluenceProfile._merged, others, self)

    def _merged(self, other: InfluenceProfile) -> InfluenceProfile:
        check_same(
            asdict(other.settings),
            asdict(self.settings),
            f"the profile of {other.corpus}",
            "fit all with the same settings to merge them",
        )
        known = {digest for _, digest in other.corpora}
        twice = [name for name, digest in self.corpora if digest in known]
        if twice:
            raise ValueError(
                f"both profiles have corpus {twice[0]!r} in them; it would count twice"
            )
        return InfluenceProfile(
            self.settings,
            (*self.corpora, *other.corpora),
            self.skipped + other.skipped,
            self.sums.merged(other.sums).finished(),
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: gradients or covariance, whichever is smaller; atomic."""
        record = {
            "settings": asdict(self.settings),
            "corpora": [list(pair) for pair in self.corpora],
            "skipped": self.skipped,
        }
        return write_tensors(expanded(path), KIND, self.sums.tensors(), record)

    @classmethod
    def load(cls, path: str | Path) -> InfluenceProfile:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, of another kind, or does not hold together.
        """
        path = expanded(path)
        tensors, record = read_tensors(path, KIND)
        try:
            settings = PassSettings.from_dict(record["settings"])
            sums = FisherSums.from_tensors(tensors)
            corpora = tuple((str(name), str(digest)) for name, digest in record["corpora"])
            skipped = int(record["skipped"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a whole {KIND}: {error!r}") from error
        sums.check(str(path), len(settings.layers), settings.draws, settings.d_model)
        return cls(settings, corpora, skipped, sums)

    # -- inside -------------------------------------------------------------------------------

    @cached_property
    def _expected(self) -> Expected:
        corpora = frozenset(digest for _, digest in self.corpora)
        return Expected(self.settings.model, self.layers, self.settings.d_model, corpora)

    def _provenance(self, rank: int) -> Provenance:
        """Of an eigenvector that was found on the even documents."""
        return Provenance(
            EIGENVECTOR,
            model=self.settings.model,
            revision=self.settings.revision,
            adapter=self.settings.adapter,
            identity=self.settings.identity,
            condition=self.settings.condition,
            data=dict(self.corpora),
            seed=self.settings.seed,
            settings={HELD_OUT: {"profile": self.id, "half": 0}, "rank": rank},
        )

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            have = ", ".join(map(str, self.layers))
            raise ValueError(f"no layer {layer} in the profile; it has layers {have}")
        return self.layers.index(layer)

    def _eigen(self, place: int, half: int) -> tuple[Tensor, Tensor]:
        if not min(halves_seen(self.sums)):
            raise ValueError(
                "a spectrum is measured on documents that it was not found on, but the profile "
                f"has {self.n_documents} document(s), all in one half; fit it on more"
            )
        return eigen(self.sums, place, (half,))

    def _block(
        self, group: Group, doses: Sequence[float | None], found: Forms | None = None
    ) -> dict[str, np.ndarray]:
        """The columns of a result for one group, `[directions, doses]` each."""
        place, size = self._place(group.layer), self.residual_norms[group.layer]
        if found is None:
            units = group.vectors / group.vectors.norm(dim=1, keepdim=True)
            found = forms(self.sums, place, units, group.half)
        signed = np.stack(
            [group.norms if x is None else 0 * group.norms + x * size for x in doses], 1
        )
        half_squares = 0.5 * signed**2
        low, high = found.interval()
        change, change_low, change_high = found.loss_change(signed)
        shape = signed.shape

        def across(values: object) -> np.ndarray:
            return np.broadcast_to(np.asarray(values)[:, None], shape)

        random, differences = self._controls(place)
        return {
            "directions": across(np.array(group.names, dtype=object)),
            "layers": np.full(shape, group.layer),
            "constructions": across(np.array(group.constructions, dtype=object)),
            "doses": signed / size,
            "norms": abs(signed),
            "kl": half_squares * found.quadratic[:, None],
            "kl_low": half_squares * low[:, None],
            "kl_high": half_squares * high[:, None],
            "kl_draw_error": half_squares * found.draw_error[:, None],
            "loss_change": change,
            "change_low": change_low,
            "change_high": change_high,
            "random_percentile": across(percentiles(found.quadratic, random)),
            "difference_percentile": across(percentiles(found.quadratic, differences)),
            "held_out": np.full(shape, group.half is not None),
        }

    @cached_property
    def _known_controls(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _controls(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted forms of random unit vectors and of unit differences of activations."""
        if place not in self._known_controls:
            self._known_controls[place] = controls(self.sums, place, self.settings.seed)
        return self._known_controls[place]
