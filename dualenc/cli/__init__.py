"""The command line: `main` runs a command, `parser.py` lists the commands."""

from dualenc.cli.parser import main

__all__ = ["main"]
