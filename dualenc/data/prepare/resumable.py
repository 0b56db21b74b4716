"""How a stopped command continues: a journal with a line for each finished part, and what it was begun with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualenc.utils.errors import DataError

JOURNAL = "unfinished.jsonl"  # in the folder that is written: a line for each shard that is whole


def read_lines(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, none if there is no such file; one that a stop cut off ends them."""
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], tell: Mapping[str, str]) -> None:
    """Refuses to go on with other options than OUT was begun with.

    Args:
        out: the folder that was begun.
        before: the options it was begun with.
        now: those that are given.
        tell: what to say of the options whose values would tell nobody anything.

    Raises:
        DataError: one differs.
    """
    for name in now:
        if before.get(name) != now[name]:
            what = tell.get(name) or f"{name} {before.get(name)!r}, not {now[name]!r}"
            raise DataError(f"{out} was begun with {what}: give the same, remove the folder, or name a new one")


def other_inputs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How shards by name differ from those that a folder was begun with, for `check_same`."""
    other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    some = (
        f"{name} {'is new' if name not in before else 'has changed' if name in now else 'is missing'}"
        for name in other[:3]
    )
    return f"other shards ({', '.join(some)}{', ...' if len(other) > 3 else ''})"
