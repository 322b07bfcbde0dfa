"""`python -m bilens` is the `bilens` command."""

from bilens.cli import main

main()
