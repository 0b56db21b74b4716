"""Objects that a user names by their import path."""

from importlib import import_module
from typing import Any

from dualenc.utils.text import one_line


def import_by_path(path: str) -> Any:
    """Return the object with the import path `package.module.Name`.

    Importing a module runs its code: the path must come from the user, never from a file of a model or data set.

    Raises:
        ImportError: If the module cannot be imported, whatever its code raises, or lacks the name; gives the reason.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # code of the user, which may raise anything
        raise ImportError(f"{type(error).__name__}: {one_line(error)}") from error
