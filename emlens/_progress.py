"""Progress bars: when and how they are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from emlens._distributed import leads

DELAY = 1.0
"""Seconds before a bar appears: a short call shows none."""


def bar(items: Iterable[Any] | None = None, *, shown: bool, **how: Any) -> tqdm:
    """A progress bar on standard error in terminals and notebooks; one of several processes shows
    it.

    Args:
        items: The items to iterate over.
        shown: The caller's `progress`.
        **how: `total`, `desc`, `unit`, `initial`, as `tqdm` takes them.
    """
    return tqdm(items, disable=not (shown and leads() and watched()), delay=DELAY, **how)


def watched() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")
