"""LoRA adapters in PEFT folders as directions, without a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from emlens._door import guarded
from emlens._reading import expanded
from emlens.directions.adapters import check_plain, choose_column, choose_writers
from emlens.directions.direction import Directions
from emlens.directions.formats.format import Format
from emlens.directions.provenance import Provenance
from emlens.hooked.adapter_files import CONFIG, WEIGHTS, factor_of, rank_at, read_adapter, scale_at
from emlens.hooked.architecture import norms_what_it_adds, place_of, writes
from emlens.hooked.sites import Site, SiteName

if TYPE_CHECKING:
    from peft import LoraConfig


@guarded
def adapter_directions(
    folder: str | Path,
    *,
    site: SiteName | None = None,
    column: int | None = None,
    name: str | None = None,
) -> Directions:
    """Return the columns of `B` by which a saved adapter writes into the residual stream.

    The same as `adapter_vectors`, from the files alone: layer and site follow from the names of the
    modules, and the vectors include PEFT's scale, `alpha / r` or `alpha / sqrt(r)` (rsLoRA),
    `rank_pattern` and `alpha_pattern` included. A rank-1 adapter adds `(A . h) * vector`, with the
    row of `A` that belongs to the column.

    Whether blocks normalise what they add follows from the name of the base model; Gemma 2 and 3,
    OLMo 2 and 3 and EXAONE 4 are refused.

    Args:
        folder: A folder that PEFT has written, or a hub name.
        site: `attn_out` or `mlp_out`; needed where the adapter writes at both.
        column: The column of `B`, for an adapter of higher rank.
        name: The adapter's name; by default that of its folder.

    Returns:
        One vector per adapted layer.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If its weights are truncated, not finite, zero or of another rank than its
            config says, or as `adapter_vectors`.
    """
    saved = _saved(folder, name)
    at, paths = saved.writers(site)
    vectors, columns = {}, {}
    for number, path in paths.items():
        check_plain(saved.name, path, bool(saved.config.use_dora), bool(saved.config.lora_bias))
        rank = saved.rank(path)
        columns[number] = choose_column(rank, column, saved.name, path)
        taken = saved.products[path]["lora_B"][:, columns[number]].float()
        vectors[number] = scale_at(saved.config.to_dict(), path) * taken
    made = Provenance(
        construction="LoRA B",
        model=saved.config.base_model_name_or_path,
        revision=saved.config.revision,
        adapter=saved.name,
        settings={"modules": list(paths.values()), "column": column or 0},
    )
    try:
        return Directions(vectors, at, made)
    except ValueError as error:
        raise ValueError(f"adapter {saved.name!r} in {folder}: {error}") from error


@dataclass(frozen=True)
class _Saved:
    """An adapter's config, and its `A` and `B` by the path of their module."""

    name: str
    config: LoraConfig
    products: Mapping[str, Mapping[str, Tensor]]

    def writers(self, site: SiteName | None) -> tuple[Site, dict[int, str]]:
        normed = norms_what_it_adds(self.config.base_model_name_or_path or "")
        places: dict[str, tuple[int, Site] | None] = {}
        for path in self.products:
            places[path] = place_of(path) if writes(path) and not normed else None
        return choose_writers(self.name, places, site)

    def rank(self, path: str) -> int:
        rank = rank_at(self.config.to_dict(), path)
        a, b = (list(self.products[path][part].shape) for part in ("lora_A", "lora_B"))
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ValueError(
                f"adapter {self.name!r}: A is {a} and B is {b} at {path}, but its {CONFIG} says "
                f"rank {rank}: A has to be [{rank}, d_in], B [d_model, {rank}]"
            )
        return rank


def _saved(folder: str | Path, name: str | None = None) -> _Saved:
    # importing PEFT takes seconds
    from emlens.hooked.adapter_kinds import check_alpha
    from emlens.hooked.attach import check_weights

    name = name or expanded(folder).resolve().name
    config, state = read_adapter(name, str(folder))
    products: dict[str, dict[str, Tensor]] = {}
    for key, weight in state.items():
        if factor := factor_of(key):
            products.setdefault(factor[0], {})[f"lora_{factor[1]}"] = weight
    half = [path for path, parts in products.items() if len(parts) != 2]
    if half or not products:
        what = f"only {next(iter(products[half[0]]))} at {half[0]}" if half else "no LoRA weights"
        raise ValueError(
            f"adapter {name!r}: {folder} has {what}; its tensors are "
            f"{', '.join(list(state)[:3]) or 'none'}"
        )
    check_alpha(name, config)
    check_weights(products, name)
    return _Saved(name, config, products)


PEFT = Format(
    "folders of LoRA adapters",
    lambda path: adapter_directions(path if path.is_dir() else path.parent),
    lambda path, _: path.is_dir() or path.name in (WEIGHTS, CONFIG),
    folder=True,
)
