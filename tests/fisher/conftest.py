"""Fisher profiles that several files test."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from emlens.fisher import InfluenceProfile
from emlens.fisher import sums as sums_of
from tests.support.profiles import FEW, TEXT


@pytest.fixture(scope="session")
def profile(hooked_llama) -> InfluenceProfile:
    return InfluenceProfile.fit(hooked_llama, TEXT, **FEW)


@pytest.fixture
def folding():
    """Profiles keep covariances, and gradients of five documents only."""
    with patch.object(sums_of, "SAMPLED", 5), patch.object(sums_of, "WIDTHS", 0.2):
        yield
