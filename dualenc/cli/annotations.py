"""Annotations of parameters as the command line needs them: metavars, descriptions, and checks of values."""

import ast
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from dualenc.utils.text import did_you_mean, quoted

WORDS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH", "bool": "{true,false}"}
NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
LISTS = ("list", "List", "Sequence", "tuple", "Iterable")
DICTS = ("dict", "Dict", "Mapping")


def metavar(source: str) -> str:
    """Return the word that stands for a value in a help text.

    Args:
        source: source code of the annotation.

    Example:
        >>> metavar("int | None"), metavar("Path"), metavar("Literal['linear', 'mlp']")
        ('N', 'PATH', '{linear,mlp}')
    """
    return "|".join(dict.fromkeys(_words(ast.parse(source, mode="eval").body))) or "VALUE"


def _words(node: ast.expr) -> list[str]:
    """Return the words for the types of an annotation, without None."""
    if isinstance(node, ast.BinOp):
        return [*_words(node.left), *_words(node.right)]
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2]
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return [f"{{{','.join(str(ast.literal_eval(item)) for item in items)}}}"]
        if name in ("Optional", "Union"):
            return [word for item in items for word in _words(item)]
        return ["LIST" if name in LISTS else "KEYS" if name in DICTS else "CLASS"]
    if isinstance(node, ast.Constant):
        return []
    name = ast.unparse(node).rpartition(".")[2]
    if name.startswith("_"):  # a name for several types, of another library
        return ["PATH" if "PATH" in name else "VALUE"]
    return [WORDS.get(name, "FUNCTION" if name == "Callable" else "CLASS")]


def members(annotation: Any) -> list[Any]:
    """Return the types of a union, or the only type."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [one for part in typing.get_args(annotation) for one in members(part)]
    return [annotation]


def element(annotation: Any) -> Any:
    """Return the type of the items of a list, a union where there are several; Any if the annotation does not say."""
    found = [
        typing.get_args(one)[0]
        for one in members(annotation)
        if typing.get_args(one) and _is_list(typing.get_origin(one))
    ]
    return Union[tuple(found)] if found else Any  # noqa: UP007 (of a list of types)


def _is_list(kind: Any) -> bool:
    return kind in (list, tuple, set, Sequence, Iterable)


def describe(annotation: Any) -> str:
    """Return what a value must be, such as "an integer or null"."""
    found = [f"one of {', '.join(dict.fromkeys(map(str, named)))}"] if (named := choices(annotation)) else []
    for one in members(annotation):
        origin = typing.get_origin(one) or one
        if _is_list(origin):
            found.append("a list")
        elif isinstance(origin, type) and (issubclass(origin, Mapping) or dataclasses.is_dataclass(origin)):
            found.append("a mapping of keys to values")
        elif one in NOUNS:
            found.append(NOUNS[one])
    found = found or ["a class"]
    return " or ".join([*dict.fromkeys(found), *(["null"] if type(None) in members(annotation) else [])])


def choices(annotation: Any) -> list[Any]:
    """Return the values that an annotation lists."""
    listed = [one for one in members(annotation) if typing.get_origin(one) is Literal]
    return [value for one in listed for value in typing.get_args(one)]


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value of a configuration may be meant for a parameter; true if the annotation does not tell."""
    kinds = members(annotation)
    if value is None:  # many parameters that are not annotated with None have it as their default
        return True
    if isinstance(value, str) and value.isidentifier() and {int, float} & {*kinds}:
        kinds = [one for one in kinds if _is_plain(one)]  # no name of a class is meant where numbers are
    return any(_fits(value, one) for one in kinds)


def _is_plain(one: Any) -> bool:
    return one in NOUNS or one is type(None) or typing.get_origin(one) is Literal


def _fits(value: Any, one: Any) -> bool:
    origin = typing.get_origin(one) or one
    if one is type(None):
        return False
    if origin is Literal:
        return str(value) in map(str, typing.get_args(one))
    if one is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")
    if one is int and isinstance(value, float):  # jsonargparse does not take 2.0 for 2
        return False
    if one in (int, float):
        return not isinstance(value, (bool, list, dict)) and _is_number(value, one)
    if one in (str, Path):
        return not isinstance(value, (list, dict))
    if _is_list(origin):
        return isinstance(value, (list, str))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, (dict, str))
    return True


def _is_number(value: Any, kind: Callable[[Any], Any]) -> bool:
    try:
        return kind(value) == float(value)
    except (TypeError, ValueError):
        return False


def must_be(name: str, annotation: Any, value: Any) -> str:
    """Return the message about a value that does not fit a parameter."""
    hint = did_you_mean(str(value), map(str, choices(annotation)), "")
    return f"{name} must be {describe(annotation)}, found {quoted(str(value))}{hint and f': {hint}'}"
