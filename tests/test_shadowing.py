"""No class of the package hides an attribute of a base class from another library.

A name that the base class uses for itself, such as `threading.Thread._stop` in Python 3.11 and 3.12, breaks it. Allowed
are overrides of what the base class offers, methods that call the method of the same name of the base class, and names
that an override sets in the place of the method that it replaces.
"""

import ast
import builtins
import importlib
import inspect
import textwrap
import threading
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import pytest
from test_house import MODULES

# Private names of the base class in the versions of Python that are supported, since a test runs in one of them.
THREAD_NAMES = """
    _args _bootstrap _bootstrap_inner _context _daemonic _delete _handle _ident _initialized _invoke_excepthook
    _is_stopped _kwargs _name _native_id _os_thread_handle _reset_internal_locks _after_fork _set_ident _set_native_id
    _set_os_name _set_tstate_lock _started _stderr _stop _target _tstate_lock _wait_for_tstate_lock _join
"""
OTHER_VERSIONS = {threading.Thread: set(THREAD_NAMES.split())}


def classes(modules: list[ModuleType]) -> list[type]:
    """Return the classes that are defined in modules, also inside functions' modules and other classes."""
    found: list[type] = []
    for module in modules:
        todo = [value for value in vars(module).values() if inspect.isclass(value)]
        while todo:
            one = todo.pop()
            if one.__module__ == module.__name__ and one not in found:
                found.append(one)
                todo += [value for value in vars(one).values() if inspect.isclass(value)]
    return found


@cache
def body(cls: type) -> list[ast.stmt]:
    """Return the statements of a class; none without Python source."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    return node.body if isinstance(node, ast.ClassDef) else []


@cache
def methods(cls: type) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the methods of a class by name."""
    return {node.name: node for node in body(cls) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def set_by(method: ast.FunctionDef | ast.AsyncFunctionDef | None) -> set[str]:
    """Return the names that a method sets on its instance."""
    if method is None or not method.args.args:
        return set()
    own = method.args.args[0].arg
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == own
    }


def names(cls: type) -> set[str]:
    """Return the names that a class defines in its source: in its body, and on its instances."""
    found = set(methods(cls))
    for node in body(cls):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:  # without a value it is only declared
            targets = [node.target]
        found |= {part.id for one in targets for part in ast.walk(one) if isinstance(part, ast.Name)}
        found |= {node.name} if isinstance(node, ast.ClassDef) else set()
    return found.union(*map(set_by, methods(cls).values()))


def calls_base(cls: type, name: str) -> bool:
    """Return whether the method of a class calls the method of the same name of its base class."""
    return name in methods(cls) and any(
        isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "super"
        for node in ast.walk(methods(cls)[name])
    )  # fmt: skip


def takes_over(cls: type, base: type, name: str) -> bool:
    """Return whether a class sets a name only in overrides of the methods with which the base class sets it."""
    setting = {method for method, node in methods(cls).items() if name in set_by(node)}
    replaced = {method for method, node in methods(base).items() if name in set_by(node)} - {"__init__"}
    return name not in methods(cls) and bool(setting) and setting <= replaced


def public(base: type, name: str) -> bool:
    """Return whether a base class offers a name to others: a method, a property, or a name in the body of the class."""
    return not name.startswith("_") and name in vars(base) | vars(base).get("__annotations__", {})


def special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def shadows(cls: type, ours: str = "dualenc.") -> Iterator[str]:
    """Yield what a class hides: names in the class or on its instances that a foreign base class uses for itself."""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith(ours) or base.__module__ == builtins.__name__:
            continue
        theirs = {*vars(base), *names(base), *OTHER_VERSIONS.get(base, ())}
        for name in sorted(names(cls) & theirs):
            if not (special(name) or public(base, name) or calls_base(cls, name) or takes_over(cls, base, name)):
                yield f"{cls.__module__}.{cls.__qualname__}.{name} hides {base.__module__}.{base.__qualname__}.{name}"


def test_no_class_hides_what_its_base_class_uses():
    modules = [importlib.import_module(name) for name in MODULES if name != "dualenc.__main__"]
    foreign = [
        cls
        for cls in classes(modules)
        if any(not base.__module__.startswith(("dualenc.", "builtins")) for base in cls.__mro__[1:])
    ]
    assert len(foreign) > 30
    # The place for private parts of Lightning, each with a test of its own.
    mine = [cls for cls in foreign if cls.__module__ != "dualenc.training.lightning_internals"]
    assert [line for cls in mine for line in shadows(cls)] == []


class Base:
    """A class of another library."""

    documented: int

    def __init__(self) -> None:
        self._private, self.undocumented, self.documented = 1, 2, 3

    def hook(self) -> None: ...

    def refill(self) -> None:
        self.stock = 1

    def _helper(self) -> None: ...


class Hook(Base):
    def hook(self) -> None: ...


class Documented(Base):
    def __init__(self) -> None:
        self.documented = 4


class Extends(Base):
    def _helper(self) -> None:
        super()._helper()


class Helper(Base):
    def _helper(self) -> None: ...


class Private(Base):
    def __init__(self) -> None:
        self._private = 4


class TakesOver(Base):
    def refill(self) -> None:
        self.stock = 3


class TakesMore(Base):
    def hook(self) -> None:
        self.stock = 3


class Undocumented(Base):
    def other(self) -> None:
        self.undocumented, self.own = 4, 5


class InClass(Base):
    _private = 4


class Stopping(threading.Thread):
    def __init__(self) -> None:
        super().__init__()
        self._stop = threading.Event()


@pytest.mark.parametrize(
    ("cls", "hidden"),
    [
        (Hook, ""),
        (Documented, ""),
        (Extends, ""),
        (TakesOver, ""),
        (TakesMore, "stock"),
        (Helper, "_helper"),
        (Private, "_private"),
        (Undocumented, "undocumented"),
        (InClass, "_private"),
        (Stopping, "_stop"),
    ],
)
def test_what_counts_as_hidden(cls, hidden):
    assert [line.rpartition(".")[2] for line in shadows(cls, ours="nothing.")] == ([hidden] if hidden else [])
