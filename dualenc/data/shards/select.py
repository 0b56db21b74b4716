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
    """A test of a dict of fields, from a small part of Python's expressions: never `eval`.

    Raises:
        DataError: the text does not parse, or has something else in it.
    """

    def value(node: ast.expr, fields: Any) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return fields[node.id]
            case ast.List() | ast.Tuple():
                return [value(item, fields) for item in node.elts]
            case ast.UnaryOp(op=ast.Not()):
                return not value(node.operand, fields)
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand, fields)
            case ast.BoolOp():
                parts = (value(item, fields) for item in node.values)
                return all(parts) if isinstance(node.op, ast.And) else any(parts)
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                items = [value(item, fields) for item in (node.left, *node.comparators)]
                return all(_COMPARE[type(op)](*pair) for op, pair in zip(node.ops, pairwise(items), strict=True))
        raise AssertionError(node)

    def check(node: ast.expr) -> None:
        match node:
            case ast.Constant() | ast.Name() | ast.UnaryOp(op=ast.Not() | ast.USub()) | ast.BoolOp():
                pass
            case ast.List() | ast.Tuple():
                pass
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                pass
            case _:
                raise DataError(f"select {text!r}: {ast.unparse(node)!r} is not understood; see ShardIndex.select")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                check(child)

    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"select {text!r} is neither a file of keys nor an expression ({error})") from None

    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

    def test(fields: Any) -> bool:
        if not isinstance(fields, dict) or not names <= fields.keys():
            return False
        try:
            return bool(value(tree, fields))
        except TypeError:  # not comparable: no match
            return False

    check(tree)  # an expression that is not understood fails here, before any sample is read
    return test
