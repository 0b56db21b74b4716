"""Lazy imports (PEP 562): a package's names are imported at their first use, so that importing the package is fast."""

import sys
from importlib import import_module
from importlib.util import find_spec

TYPE_CHECKING = False  # type checkers take it as true; every command waits for what is loaded here
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def lazy_names(package: str, names: "Mapping[str, str]") -> "tuple[Callable[[str], Any], Callable[[], list[str]]]":
    """Return the `__getattr__` and the `__dir__` of a package, which find its names and its modules.

    Args:
        package: `__name__` of the package.
        names: name -> the module that defines it, relative to the package.
    """

    def getattr_(name: str) -> "Any":
        if name in names:
            value = getattr(import_module(f"{package}.{names[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next access does not call this function
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return getattr_, dir_
