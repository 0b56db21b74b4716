"""Conditions over the columns of a table, such as `clip_score > q(0.7) and tokens in 3..64`.

A null is neither less, equal nor greater, also under `not`, as in SQL: a sample whose column is null does not meet a
condition on it.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dualenc.curation.tables import Columns
from dualenc.data.shards.select import Expression
from dualenc.utils.errors import DataError

_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_TEXTS_OR_RANGE = re.compile(rf"""('[^']*'|"[^"]*")|({_NUMBER})\s*\.\.\s*({_NUMBER})""")
_SPAN = re.compile(r"span\(([^(),]+), ([^(),]+)\)")
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


class _Values(NamedTuple):
    """A column of N values, and which of them are not null."""

    values: np.ndarray
    known: np.ndarray


class _Truth(NamedTuple):
    """The rows that meet a condition, and those that fail it; a null does neither."""

    met: np.ndarray  # (N,) bool
    failed: np.ndarray  # (N,) bool


class _Quantile(NamedTuple):
    """The value below which a share of the compared column lies."""

    share: float


class _Span(NamedTuple):
    """A range with both its ends."""

    low: float
    high: float


class Conditions(Expression):
    """A condition on the columns of a table, computed for all rows at once; `eval` is never called.

    Args:
        text: the expression: columns, numbers, texts in quotes, lists, comparisons, `in`, ranges `3..64` with both
            ends, `q(0.7)` for the quantile of the compared column, `and`, `or`, `not`.

    Raises:
        DataError: If the text cannot be parsed, or contains something else.
    """

    understood = (
        "columns, numbers, texts in quotes, lists, ==, !=, <, <=, >, >=, in, not in, 3..64, q(0.7), and, or, not"
    )

    def __init__(self, text: str) -> None:
        super().__init__(text, option="--where")

    def rules(self, columns: Columns) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the text of each part of the `and` at the top, and the mask (N,) of the rows that meet it.

        Raises:
            DataError: If there is no such column, or values cannot be compared.
        """
        top = self._parse(self._text)
        both = isinstance(top, ast.BoolOp) and isinstance(top.op, ast.And)
        for node in top.values if both else [top]:  # pyright: ignore[reportAttributeAccessIssue]
            found = self._compiled(node)(columns)
            yield _shown(node), self._truth(found, node).met

    def _parse(self, text: str) -> ast.expr:
        """Parse the text, in which ranges have a form of their own."""
        return super()._parse(_TEXTS_OR_RANGE.sub(lambda m: m[1] or f"span({m[2]}, {m[3]})", text))

    def _compiled(self, node: ast.expr) -> Callable[[Any], Any]:
        match node:
            case ast.Name(name):
                self.names.append(name)
                return lambda columns: _Values(columns[name], columns.known(name))
            case ast.Call(ast.Name("q"), [ast.Constant(share)], []):
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                    raise self._refusal(f"the quantile q({share!r}) must be between 0 and 1")
                return lambda columns: _Quantile(share)
            case ast.Call(ast.Name("span"), [low, high], []):
                low, high = ast.literal_eval(low), ast.literal_eval(high)
                if low > high:
                    raise self._refusal(f"the range {low}..{high} is empty")
                return lambda columns: _Span(low, high)
            case ast.UnaryOp(ast.Not(), operand):
                inner = self._compiled(operand)
                return lambda columns: _Truth(*reversed(self._truth(inner(columns), operand)))
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, int | float):
                return lambda columns: -value
            case ast.BoolOp(op, nodes):
                parts, is_and = [(self._compiled(part), part) for part in nodes], isinstance(op, ast.And)
                return lambda columns: _joined([self._truth(part(columns), at) for part, at in parts], is_and)
            case ast.Compare(left, ops, nodes) if all(type(op) in {*_COMPARE, ast.In, ast.NotIn} for op in ops):
                sides = [self._compiled(side) for side in (left, *nodes)]
                return lambda columns: self._chain([side(columns) for side in sides], ops, node)
            case ast.Constant(value) if isinstance(value, int | float | str):
                return lambda columns: value
            case ast.List(nodes) | ast.Tuple(nodes) if all(
                isinstance(item, ast.Constant | ast.UnaryOp) for item in nodes
            ):
                items = [self._compiled(item) for item in nodes]
                return lambda columns: [item(columns) for item in items]
        raise self._refusal(f"{_shown(node)!r} is not understood")

    def _truth(self, found: Any, node: ast.expr) -> _Truth:
        """Return the value of a node that must be a condition."""
        if not isinstance(found, _Truth):
            raise self._refusal(f"{_shown(node)!r} is not a condition")
        return found

    def _chain(self, sides: list[Any], ops: list[ast.cmpop], node: ast.expr) -> _Truth:
        """Return where each comparison holds between a side and the next one, as in `a < b < c`."""
        return _joined([self._compare(*pair, op, node) for pair, op in zip(pairwise(sides), ops, strict=True)], True)

    def _compare(self, left: Any, right: Any, op: ast.cmpop, node: ast.expr) -> _Truth:
        """Return where a comparison holds."""
        problem = f"{_shown(node)!r} compares "
        columns = [side for side in (left, right) if isinstance(side, _Values)]
        if not columns:
            raise self._refusal(f"{problem}no column")
        if any(isinstance(side, _Truth) for side in (left, right)):
            raise self._refusal(f"{problem}a condition")
        known = np.logical_and.reduce([column.known for column in columns])
        left, right = (_quantile(side, columns[0]) for side in (left, right))
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(left, _Values) or not isinstance(right, _Span | list):
                raise self._refusal(f"{problem}something other than a column with a list or a range")
            items = list(right)
            self._check_kinds([left.values, *items], problem)
            values = left.values[known]
            if isinstance(right, _Span):
                inside = (values >= right.low) & (values <= right.high)
            else:
                inside = (
                    np.array([x in set(items) for x in values], bool)
                    if values.dtype == object
                    else np.isin(values, items)
                )
            return _spread(inside if isinstance(op, ast.In) else ~inside, known)
        if isinstance(left, _Span | list) or isinstance(right, _Span | list):
            raise self._refusal(f"{problem}a list or a range, which need 'in'")
        one, other = (side.values[known] if isinstance(side, _Values) else side for side in (left, right))
        self._check_kinds([one, other], problem)
        return _spread(np.asarray(_COMPARE[type(op)](one, other), bool), known)

    def _check_kinds(self, values: list[Any], problem: str) -> None:
        """Refuse to compare texts with numbers."""
        kinds = {isinstance(x, str) or (isinstance(x, np.ndarray) and x.dtype == object) for x in values}
        if len(kinds) > 1:
            raise self._refusal(f"{problem}texts with numbers")


def _shown(node: ast.expr) -> str:
    """Return a node as the user writes it."""
    return _SPAN.sub(r"\1..\2", ast.unparse(node))


def _quantile(side: Any, column: _Values) -> Any:
    """Return the value of a quantile of a column; other sides unchanged."""
    if not isinstance(side, _Quantile):
        return side
    if column.values.dtype == object:
        raise DataError("a quantile needs a column of numbers, not of texts")
    values = column.values[column.known]
    return float(np.quantile(values, side.share)) if len(values) else 0.0  # no row meets the condition anyway


def _joined(parts: list[_Truth], is_and: bool) -> _Truth:
    """Join conditions by `and` or `or`."""
    first, second = (np.logical_and, np.logical_or) if is_and else (np.logical_or, np.logical_and)
    return _Truth(first.reduce([part.met for part in parts]), second.reduce([part.failed for part in parts]))


def _spread(holds: np.ndarray, known: np.ndarray) -> _Truth:
    """Return a condition of all rows from its values at those that are not null."""
    met, failed = np.zeros(len(known), bool), np.zeros(len(known), bool)
    met[known], failed[known] = holds, ~holds
    return _Truth(met, failed)
