"""Expressions over the fields of a sample, such as `width >= 200 and license in ["cc0", "cc-by"]`."""

import ast
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from dualenc.utils.errors import DataError

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def expression(text: str) -> Callable[[Any], bool]:
    """Return a test of a dict of fields, from a small part of Python's expressions; never calls `eval`.

    Args:
        text: the expression. Names stand for fields; it may have constants, lists, comparisons, `and`, `or`, `not` and
            `-`.

    Returns:
        A function that is true for the fields of which the expression holds. It is false where a field is missing or
        values cannot be compared.

    Raises:
        DataError: If the text cannot be parsed, or contains something else.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        value = _compiled(tree, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"select {text!r} is neither a file of keys nor an expression ({error})") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

    def test(fields: Any) -> bool:
        if not isinstance(fields, dict) or not names <= fields.keys():
            return False
        try:
            return bool(value(fields))
        except TypeError:  # Values that cannot be compared do not match.
            return False

    return test


def _compiled(node: ast.expr, text: str) -> Callable[[Any], Any]:
    """Return the function that computes a node of the expression `text` from the fields of a sample."""
    match node:
        case ast.Constant(value):
            return lambda fields: value
        case ast.Name(name):
            return lambda fields: fields[name]
        case ast.List(nodes) | ast.Tuple(nodes):
            items = [_compiled(item, text) for item in nodes]
            return lambda fields: [item(fields) for item in items]
        case ast.UnaryOp(ast.Not() | ast.USub() as op, operand):
            inner, change = _compiled(operand, text), operator.not_ if isinstance(op, ast.Not) else operator.neg
            return lambda fields: change(inner(fields))
        case ast.BoolOp(op, nodes):
            parts, join = [_compiled(part, text) for part in nodes], all if isinstance(op, ast.And) else any
            return lambda fields: join(part(fields) for part in parts)
        case ast.Compare(left, ops, nodes) if all(type(op) in _COMPARE for op in ops):
            sides, tests = [_compiled(side, text) for side in (left, *nodes)], [_COMPARE[type(op)] for op in ops]
            return lambda fields: _chain(tests, [side(fields) for side in sides])
    raise DataError(f"select {text!r}: {ast.unparse(node)!r} is not understood; see ShardIndex.select")


def _chain(tests: list[Callable[[Any, Any], bool]], values: list[Any]) -> bool:
    """Return whether each test holds for a value and the next one, as in `a < b < c`."""
    return all(test(*pair) for test, pair in zip(tests, pairwise(values), strict=True))
