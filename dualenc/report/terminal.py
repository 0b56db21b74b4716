"""Results as tables in the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from dualenc.report.comparison import differences
from dualenc.report.formatting import change, number
from dualenc.report.model import Comparison, Result
from dualenc.utils.text import printable


def print_table(results: Sequence[Result]) -> None:
    """Print the metrics of all sets as one table, and below it verdicts, prompts, notes and problems.

    Args:
        results: results of one model, or of several, which are then named in a column.
    """
    lines = [
        [
            (
                name,
                number(value),
                _interval(result["intervals"].get(name), number),
                "" if (chance := result["chance"].get(name)) is None else number(chance),
            )
            for name, value in result["metrics"].items()
        ]
        for result in results
    ]
    several = len({result["model"] for result in results}) > 1
    baselines = [bool(result.get("baseline")) for result in results]
    compared = "baseline" if baselines and all(baselines) else "chance or baseline" if any(baselines) else "chance"
    _print_sets(results, ("metric", "value", "95% interval", compared), lines, several)


def print_comparison(comparisons: Sequence[Comparison]) -> None:
    """Print the metrics of two models on all sets as one table, with their differences and the better model.

    Args:
        comparisons: evaluation sets, all of the same two models.
    """
    results = [comparison.result for comparison in comparisons]
    if results:
        from rich.text import Text

        same = "A and B are the same model.\n" if all(result.get("same_model") for result in results) else ""
        _console().print(Text(f"A  {printable(results[0]['first'])}\nB  {printable(results[0]['second'])}\n{same}"))
    lines = [
        [
            (
                row["name"], number(row["a"]), number(row["b"]), change(row["difference"]),
                _interval(row["interval"], change), row["better"] and f"{row['better']} better",
            )
            for row in differences(comparison)
        ]
        for comparison in comparisons
    ]  # fmt: skip
    _print_sets(results, ("metric", "A", "B", "B - A", "95% interval", ""), lines)


def _print_sets(
    results: Sequence[Result],
    head: Sequence[str],
    lines: Sequence[Sequence[tuple[str, ...]]],
    several: bool = False,
) -> None:
    """Print a table of sets, with a column of models if there are several."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("set", overflow="fold")
    if several:
        table.add_column("model", overflow="fold")
    table.add_column("n", justify="right")
    for name in head:
        table.add_column(name, no_wrap=True, justify="left" if name in ("metric", "") else "right")
    for result, metrics in zip(results, lines):
        if table.row_count:
            table.add_row()
        model = [Text(printable(result["model"]))] if several else []
        first = [[Text(printable(result["dataset"]), style="bold"), *model, Text(f"{result['n']:,}")]]
        if result.get("problems") or not result["complete"]:
            first.append([Text("incomplete", style="bold yellow"), *(Text() for _ in model), Text()])
        for left, cells in zip_longest(first, metrics):
            table.add_row(*(left or [""] * len(first[0])), *map(Text, cells or ()))
    _console().print(table)
    remarks = list(dict.fromkeys(_remarks(results, several)))  # Several models may have the same.
    if remarks:
        _console().print()
    for name, remark in remarks:
        _print_line(name, remark)
    for name, problem in _problems(results):
        _print_line(name, _problem(problem), "bold yellow")


def _print_line(name: str, text: str, style: str = "bold") -> None:
    from rich.text import Text

    _console().print(Text.assemble((f"{name}: ", style), text))


def _remarks(results: Sequence[Result], several: bool) -> Iterator[tuple[str, str]]:
    """Yield the name of a set, and of the model if there are several, with each sentence about its result."""
    for result in results:
        name = printable(result["dataset"])
        if verdict := result.get("verdict"):
            yield f"{name}, {printable(result['model'])}" if several else name, printable(verdict)
        if prompts := result.get("prompts"):
            yield name, printable(f"prompts: {prompts}")
        if (precision := result.get("precision", "fp32")) != "fp32":
            yield name, printable(f"precision: {precision}")
        if changed := result.get("changed"):
            counts = [f"{count:,} of {total:,} {noun}" for noun, (count, total) in changed.items()]
            yield name, printable(f"with another answer: {', '.join(counts)}")
        for note in result.get("notes", ()):
            yield name, printable(note)


def _problems(results: Sequence[Result]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for result in results:
        for problem in result.get("problems", ()):
            yield printable(result["dataset"]), problem


def _problem(problem: Mapping[str, Any]) -> str:
    """Return one line with the problem, its count, and the first names."""
    names = [printable(name) for name in problem["names"][:3]]
    more = ", ..." if problem["count"] > len(names) else ""
    return f"{printable(problem['what'])}: {problem['count']:,}" + (f" ({', '.join(names)}{more})" if names else "")


def _interval(bounds: Sequence[float] | None, write: Callable[[float], str]) -> str:
    return "{} to {}".format(*map(write, bounds)) if bounds else ""


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # A pipe or file gets whole lines, which can be searched.
        console.width = 100_000
    return console
