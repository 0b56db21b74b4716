"""The command line: `main` runs a command, `parser.py` lists them."""

from dualenc.cli.parser import main

__all__ = ["main"]
