"""Templates of pages and cards, compiled once per process."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def templates(autoescape: bool) -> Environment:
    """Return the templates of this folder.

    Args:
        autoescape: True to escape inserted values as HTML.
    """
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
