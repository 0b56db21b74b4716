"""The Jinja environment of the templates of reports and model cards."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def templates(autoescape: bool) -> Environment:
    """Return a Jinja environment that loads the templates of this folder, created once per process.

    Args:
        autoescape: True to escape inserted values as HTML.
    """
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,  # By default a misspelled variable would render as nothing.
    )
