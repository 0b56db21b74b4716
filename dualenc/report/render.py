"""The templates of pages with the filters that write numbers, names and pictures."""

from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from dualenc.report import formatting
from dualenc.report.templates import templates
from dualenc.utils.text import plain

_FILTERS = ("number", "change", "uri", "breakable", "figure", "percent")


def render(template: str, **values: Any) -> Markup:
    """Fill a template of this folder; what the values hold is escaped as HTML.

    Args:
        template: name of the file.
        values: variables of the template.
    """
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = templates(autoescape=True)
    environment.filters |= {"plain": plain, **{name: getattr(formatting, name) for name in _FILTERS}}
    return environment
