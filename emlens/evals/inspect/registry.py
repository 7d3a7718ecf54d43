"""What Inspect finds through its entry point: the provider `emlens` and the tasks."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from emlens.evals.inspect.tasks import domain, free_form, graded, sampled, shares

__all__ = ["domain", "emlens", "free_form", "graded", "sampled", "shares"]


@modelapi(name="emlens")
def emlens() -> type[ModelAPI]:
    """Hooked models with edits and adapters."""
    # the model is loaded only where it is asked for
    from emlens.evals.inspect.provider import EmlensAPI

    return EmlensAPI
