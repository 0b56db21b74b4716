"""Fields of a sample's JSON by their names, and expressions over them, such as `meta.width > 200 and len(tags) > 1`."""

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, pairwise
from typing import Any

from dualenc.data.shards.sample import Sample
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import plural, quoted

UNDERSTOOD = (
    "fields such as width or meta.width, numbers, texts in quotes, lists, ==, !=, <, <=, >, >=, in, not in, and, or, "
    "not, len(...)"
)
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_NO_FIELD = "no field"
_NAMES = 10  # field names that a message lists
_DEPTH = 4  # objects within objects whose field names a message lists

# Fields


def find_field(fields: Any, name: str) -> Any:
    """Return a field of parsed JSON by its name.

    Args:
        fields: an object, or a list of objects, of which the fields of all are returned as one list.
        name: name of the field; "a.b" is the field "b" of the object "a", if no field is called "a.b".

    Raises:
        KeyError: If there is no such field.
    """
    if isinstance(fields, list):
        found: list[Any] = []
        for item in (item for item in fields if isinstance(item, dict)):
            with suppress(KeyError):
                value = find_field(item, name)
                found += value if isinstance(value, list) else [value]
        if found:
            return found
    if isinstance(fields, dict):
        if name in fields:
            return fields[name]
        for at, character in enumerate(name):
            if character == "." and name[:at] in fields:
                with suppress(KeyError):
                    return find_field(fields[name[:at]], name[at + 1 :])
    raise KeyError(name)


def describe_fields(fields: Any) -> str:
    """Return the names of the fields of parsed JSON as text, for a message."""
    names = list(islice(_field_names(fields), _NAMES + 1))
    more = ", ..." if len(names) > _NAMES else ""
    return f"{', '.join(quoted(name, 40)[1:-1] for name in names[:_NAMES]) or 'no fields'}{more}"


def _field_names(value: Any, name: str = "", depth: int = _DEPTH) -> Iterator[str]:
    """Yield the names of the fields that hold no fields themselves."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, dict) and value and depth:
        for key, inner in value.items():
            yield from _field_names(inner, f"{name}.{key}" if name else key, depth - 1)
    elif name:
        yield name


# Expressions


class Expression:
    """A condition on the fields of a sample, in a small part of Python's expressions; `eval` is never called.

    Args:
        text: the expression. Names, which may be dotted, stand for fields; it may have constants, lists, comparisons,
            `and`, `or`, `not`, `-` and `len(...)`.
        option: name of the option that the text is from, for messages; `select` may be a file of keys, too.

    Attributes:
        names: names of the fields.

    Raises:
        DataError: If the text cannot be parsed, or contains something else.
    """

    def __init__(self, text: str, option: str = "select") -> None:
        self.names: list[str] = []
        self._text, self._option = text, option
        try:
            self._value = self._compiled(self._parse(text))
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise self._refusal(error.msg if isinstance(error, SyntaxError) else str(error)) from None

    def failure(self, sample: Sample) -> str | None:
        """Return why a sample does not meet the condition, or None if it does.

        The condition is not met where a field is missing or values cannot be compared. The text is the same for all
        samples with this problem.
        """
        if "json" not in sample:
            return "no .json"
        try:
            fields = sample.read_json()
        except BadSample as error:
            return error.cause
        return self.failure_of(fields)

    def failure_of(self, fields: Any) -> str | None:
        """Return why parsed JSON does not meet the condition, or None if it does; see `failure`."""
        found = {}
        for name in self.names:
            try:
                found[name] = find_field(fields, name)
            except KeyError:
                return f"{_NO_FIELD} {name!r} in the .json"
        try:
            return None if self._value(found) else "the condition is not met"
        except TypeError as error:
            return f"values that do not fit together ({error})"

    def explain(self, sample: Callable[[int], Sample], failures: Sequence[str | None]) -> str:
        """Return the reasons why no sample meets the condition, and the fields of one that lacks a field.

        Args:
            sample: returns a sample by its number.
            failures: the `failure` of each sample.
        """
        causes = [f"{failure} ({plural(count, 'sample')})" for failure, count in Counter(failures).most_common(4)]
        lacking = next((i for i, failure in enumerate(failures) if failure and failure.startswith(_NO_FIELD)), None)
        if lacking is not None:
            example = sample(lacking)
            causes.append(f"the .json of {quoted(example.key)} has {describe_fields(example.read_json())}")
        if self.names == [self._text]:
            causes.append("there is no file of this name")
        return "; ".join(causes) or "there are none"

    understood = UNDERSTOOD

    def _parse(self, text: str) -> ast.expr:
        """Parse the text as an expression of Python."""
        return ast.parse(text, mode="eval").body

    def _compiled(self, node: ast.expr) -> Callable[[Any], Any]:
        """Return the function that computes a node of the expression from the fields in `names`."""
        match node:
            case ast.Constant(value):
                return lambda fields: value
            case ast.Name() | ast.Attribute() if (name := _dotted(node)) is not None:
                self.names.append(name)
                return lambda fields: fields[name]
            case ast.List(nodes) | ast.Tuple(nodes):
                items = [self._compiled(item) for item in nodes]
                return lambda fields: [item(fields) for item in items]
            case ast.UnaryOp(ast.Not() | ast.USub() as op, operand):
                inner, change = self._compiled(operand), operator.not_ if isinstance(op, ast.Not) else operator.neg
                return lambda fields: change(inner(fields))
            case ast.BoolOp(op, nodes):
                parts, join = [self._compiled(part) for part in nodes], all if isinstance(op, ast.And) else any
                return lambda fields: join(part(fields) for part in parts)
            case ast.Compare(left, ops, nodes) if all(type(op) in _COMPARE for op in ops):
                sides, tests = [self._compiled(side) for side in (left, *nodes)], [_COMPARE[type(op)] for op in ops]
                return lambda fields: _chain(tests, [side(fields) for side in sides])
            case ast.Call(ast.Name("len"), [counted], []) if not isinstance(counted, ast.Starred):
                measured = self._compiled(counted)
                return lambda fields: len(measured(fields))
        raise self._refusal(f"{ast.unparse(node)!r} is not understood")

    def _refusal(self, problem: str) -> DataError:
        kind = "neither a file of keys nor" if self._option == "select" else "not"
        return DataError(
            f"{self._option} {self._text!r} is {kind} an expression: {problem}; an expression has {self.understood}"
        )


def _dotted(node: ast.expr) -> str | None:
    """Return the name that a chain of attributes spells, such as `meta.width`; None for other nodes."""
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _chain(tests: list[Callable[[Any, Any], bool]], values: list[Any]) -> bool:
    """Return whether each test holds for a value and the next one, as in `a < b < c`."""
    return all(test(*pair) for test, pair in zip(tests, pairwise(values), strict=True))
