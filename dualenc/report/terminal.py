"""Results as tables in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from dualenc.report.comparison import differences
from dualenc.report.formatting import change, number
from dualenc.report.model import Result
from dualenc.report.sections import rows
from dualenc.utils.text import printable


def print_table(results: Sequence[Result]) -> None:
    """Prints the metrics of all sets in one table, and below it what was wrong with the sets.

    Args:
        results: of one model.
    """
    lines = [
        [
            (row["name"], number(row["value"]), _interval(row["interval"], number), _maybe(row["chance"]))
            for row in rows(result)
        ]
        for result in results
    ]
    _print_sets(results, ("metric", "value", "95% interval", "by chance"), lines)


def print_comparison(results: Sequence[Result]) -> None:
    """Prints the metrics of two models on all sets in one table, their differences, and which of them are clear.

    Args:
        results: of the same two models.
    """
    if results:
        from rich.text import Text

        _console().print(Text(f"A  {printable(results[0]['first'])}\nB  {printable(results[0]['second'])}\n"))
    lines = [
        [
            (
                row["name"], number(row["a"]), number(row["b"]), change(row["difference"]),
                _interval(row["interval"], change), row["better"] and f"{row['better']} better",
            )
            for row in differences(result)
        ]
        for result in results
    ]  # fmt: skip
    _print_sets(results, ("metric", "A", "B", "B - A", "95% interval", ""), lines)


def _print_sets(results: Sequence[Result], head: Sequence[str], lines: Sequence[Sequence[tuple[str, ...]]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("set", overflow="fold")
    table.add_column("n", justify="right")
    for name in head:
        table.add_column(name, no_wrap=True, justify="left" if name in ("metric", "") else "right")
    for result, metrics in zip(results, lines):
        if table.row_count:
            table.add_row()
        first = [(Text(printable(result["dataset"]), style="bold"), Text(f"{result['n']:,}"))]
        if result.get("problems") or not result["complete"]:
            first.append((Text("not complete", style="bold yellow"), Text()))
        for place, cells in zip_longest(first, metrics):
            table.add_row(*(place or ("", "")), *map(Text, cells or ()))
    console = _console()
    console.print(table)
    for name, problem in _problems(results):
        console.print(Text.assemble((f"{name}: ", "bold yellow"), _problem(problem)))


def _problems(results: Sequence[Result]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for result in results:
        for problem in result.get("problems", ()):
            yield printable(result["dataset"]), problem


def _problem(problem: Mapping[str, Any]) -> str:
    """One line: what, how many, and the first names."""
    names = [printable(name) for name in problem["names"][:3]]
    more = ", ..." if problem["count"] > len(names) else ""
    return f"{printable(problem['what'])}: {problem['count']:,}" + (f" ({', '.join(names)}{more})" if names else "")


def _interval(bounds: Sequence[float] | None, write: Any) -> str:
    return "{} to {}".format(*map(write, bounds)) if bounds else ""


def _maybe(value: float | None) -> str:
    return "" if value is None else number(value)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # lines stay whole for those who search in them
        console.width = 100_000
    return console
