"""The progress bar of loops that may take long."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any


def progress(description: str, stderr: bool = False) -> Callable[..., Iterable[Any]]:
    """Return a function that wraps an iterable in a progress bar, shown on a terminal and in a notebook only.

    Args:
        description: noun for the items that are counted.
        stderr: draw the bar on standard error, for programs whose standard output is read by others.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True) if stderr else None
    shown = sys.stderr.isatty() or (console is not None and console.is_jupyter)
    return partial(track, description=description, transient=True, disable=not shown, console=console)
