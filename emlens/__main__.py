"""`python -m emlens` is the command line."""

from emlens.cli import main

main()
