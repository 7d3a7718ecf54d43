"""Influence: what a direction does to next-token prediction on pre-training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from emlens._door import guarded
from emlens.directions import Direction, Directions
from emlens.hooked import Conditions, HookedModel
from emlens.measures.exact import DOSES, Influence, Kind, exact_influence
from emlens.measures.projections import AnyDirections
from emlens.measures.scan import InfluenceScan, scan
from emlens.text import Corpus

if TYPE_CHECKING:
    from emlens.measures.profile import InfluenceProfile


@overload
def influence(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Direction],
    *,
    method: Literal["exact"] = "exact",
    **options: Any,
) -> Influence: ...
@overload
def influence(
    model: HookedModel,
    corpus: Corpus,
    directions: Mapping[str, Directions] | Directions,
    *,
    method: Literal["auto"],
    **options: Any,
) -> InfluenceScan: ...
@guarded
def influence(  # pyright: ignore[reportInconsistentOverload]
    model: HookedModel,
    corpus: Corpus,
    directions: AnyDirections,
    *,
    method: Literal["exact", "auto"] = "exact",
    profile: InfluenceProfile | None = None,
    check: int = 5,
    doses: Sequence[float] = DOSES,
    norms: Sequence[float] | None = None,
    edit: Kind = "add",
    controls: int | Mapping[str, int] | None = None,
    conditions: Conditions | None = None,
    per_token: bool = False,
    max_tokens: int = 128,
    token_budget: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> Influence | InfluenceScan:
    """Add (or ablate) each direction and measure KL and next-token loss on pre-training text.

    The exact method is one forward pass above the layer per direction and dose, the prefix below
    shared (arXiv 2602.07852, Fig. 6, there against the parameter norm). All predicted tokens
    count; padding never does. `method="auto"` scores any number of directions at all their layers
    by the Fisher profile of the corpus, and measures the leaders and a sample exactly.

    Args:
        model: The model.
        corpus: Raw text, e.g. `emlens.corpus("python-docs")`.
        directions: Named directions; each is added at its own site and layer. `"auto"` takes
            directions of several layers.
        method: `"exact"` or `"auto"`.
        profile: A profile of this model, for `"auto"`; made by default.
        check: Leaders, and as many others at random, that `"auto"` measures exactly.
        doses: Norms as shares of the median residual norm of a layer, measured on the corpus.
            A negative dose turns the directions round.
        norms: Norms in units of the residual stream, in place of doses.
        edit: `"add"`, or `"ablate"`: the component along the direction is taken away, and there
            are no doses.
        controls: Random directions of equal norm at every place a direction is added at; or
            numbers by kind: `"random"`, `"activation differences"` (of two tokens of the corpus),
            `"shuffled labels"` (of the mean differences among the directions). Three random ones
            by default; `"auto"` compares with the profile's percentiles and takes none.
        conditions: Further edits or adapters, measured once as they are: a finetune, say.
        per_token: Keep loss and KL of every single token as well, for `Influence.tokens`: two
            numbers per token, direction and dose, in memory and on disk.
        max_tokens: Tokens that a document is cut to.
        token_budget: Padded tokens of a batch.
        seed: Seed of the controls and of the bootstrap over documents.
        progress: Show a progress bar.

    Raises:
        ValueError: If the corpus is empty or all of it too short, a direction is zero, a norm is
            negative, a name is taken twice, or controls are asked for that there are none of.

    Example:
        >>> found = emlens.influence(model, emlens.corpus(), {"general": general}, doses=[0.1])
        >>> found.divergence("general", 0.1)
    """
    if method not in ("exact", "auto"):
        raise ValueError(f"unknown method {method!r}; choose 'exact' or 'auto'")
    if edit not in ("add", "ablate"):
        raise ValueError(f"unknown edit {edit!r}; choose 'add' or 'ablate'")
    if not len(corpus):
        raise ValueError(f"corpus {corpus.name!r} has no documents")
    shared: Any = {
        "doses": doses,
        "max_tokens": max_tokens,
        "token_budget": token_budget,
        "seed": seed,
        "progress": progress,
    }
    exact_only: Any = {
        "norms": norms,
        "conditions": conditions,
        "per_token": per_token,
        "controls": controls,
    }
    if method == "exact":
        lone = cast(Mapping[str, Direction], directions)
        return exact_influence(model, corpus, lone, edit=edit, **exact_only, **shared)
    asked = [name for name, value in exact_only.items() if value]
    unused = [*asked, *(["edit"] if edit != "add" else [])]
    if unused:
        raise ValueError(f"method='auto' has no {', '.join(unused)}; use method='exact'")
    return scan(model, corpus, directions, profile=profile, check=check, **shared)
