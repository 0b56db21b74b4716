"""The command line."""

from dualenc.cli.parser import main

__all__ = ["main"]
