"""Resuming of stopped commands: a journal with a line for each finished part, and a check of the options."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualenc.utils.errors import DataError

JOURNAL = "unfinished.jsonl"  # in the output folder; has a line for each complete shard


def read_lines(journal: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a journal; none if the file does not exist.

    A stopped process may have left a last line without its end, which is left out.
    """
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def read_begun(about: Path, command: str) -> dict[str, Any]:
    """Return what an earlier call of a command wrote about its output folder; an empty dict for a new folder.

    Args:
        about: file in the folder that describes it.
        command: name of the command, for messages.

    Raises:
        DataError: If the folder holds files of something else.
    """
    out = about.parent
    if not about.exists():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} must be a folder")
        if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise DataError(f"{out} holds files that {command} did not write: name a new folder")
        return {}
    try:
        begun = json.loads(about.read_text("utf-8"))
        begun["inputs"] = dict(begun["inputs"])
        return begun
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{about} was not written by {command}: name a new folder") from None


def check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], descriptions: Mapping[str, str]) -> None:
    """Refuse to resume with other options than the folder was begun with.

    Args:
        out: the output folder.
        before: options that the folder was begun with.
        now: options of this call.
        descriptions: texts for the message in place of the values of options that mean nothing to a user.

    Raises:
        DataError: If an option differs.
    """
    for name in now:
        if before.get(name) != now[name]:
            what = descriptions.get(name) or f"{name} {before.get(name)!r}, not {now[name]!r}"
            raise DataError(f"{out} was begun with {what}: give the same, remove the folder, or name a new one")


def other_inputs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe how the input shards differ from those that a folder was begun with, for `check_same`."""
    other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    examples = (
        f"{name} {'is new' if name not in before else 'has changed' if name in now else 'is missing'}"
        for name in other[:3]
    )
    return f"other shards ({', '.join(examples)}{', ...' if len(other) > 3 else ''})"
