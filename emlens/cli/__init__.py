"""The command line: thin verbs over the Python API.

Exit codes: 0 done, 1 failed, 2 wrong usage or input that cannot be used, 130 interrupted.
"""

# in the order of the help: each puts its verbs onto the application
from emlens.cli import studies, directions, training, behaviour, watching, screening  # noqa: F401, I001
from emlens.cli.app import app, main

__all__ = ["app", "main"]
