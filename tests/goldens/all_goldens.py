"""Every golden, by being imported."""

from __future__ import annotations

from tests.goldens import of_directions as of_directions
from tests.goldens import of_evals as of_evals
from tests.goldens import of_measures as of_measures
from tests.goldens import of_study as of_study
from tests.goldens import of_training as of_training
from tests.goldens.golden import GOLDENS

GROUPS = tuple(sorted({name.split(": ")[0] for name in GOLDENS}))
