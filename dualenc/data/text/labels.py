"""Readers of labels: a field of a line becomes a class, a set of classes or a number."""

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

SEPARATOR = "|"  # between the labels of one field
Label = int | list[float] | float


class LabelReader(ABC):
    """Conversion of a field into the label of a head.

    Attributes:
        dtype: type of the labels of a batch.
        expected: text that completes "the column does not hold ...".
        names: labels that the head knows; empty where the label is a number.
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    expected: ClassVar[str]
    names: tuple[str, ...] = ()

    @abstractmethod
    def read(self, value: Any) -> Label:
        """Return the label that a field holds.

        Args:
            value: content of the field: a string, or any value of JSON.

        Raises:
            ValueError: If the field holds something else; the message shows it.
        """

    def unknown(self, value: Any) -> list[str]:
        """Return the names in a field that are not among `names`."""
        return []


class NumberReader(LabelReader):
    """Reader of finite numbers."""

    expected = "a number"

    def read(self, value: Any) -> float:
        """See `LabelReader.read`."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(_shown(value))
        return number


@dataclass(frozen=True)
class OneLabelReader(LabelReader):
    """Reader of one label a text: its index in `names`."""

    dtype = torch.int64
    expected = "a label"
    names: tuple[str, ...] = ()

    def read(self, value: Any) -> int:
        """See `LabelReader.read`."""
        if unknown := self.unknown(value):
            raise ValueError(_shown(unknown[0]))
        return self.names.index(_name(value))

    def unknown(self, value: Any) -> list[str]:
        """See `LabelReader.unknown`."""
        return [name for name in [_name(value)] if name not in self.names]


@dataclass(frozen=True)
class ManyLabelsReader(LabelReader):
    """Reader of any number of labels a text: for each of `names` 1 or 0.

    A field is a list, or a string whose labels are separated by `SEPARATOR`.
    """

    expected = "labels"
    names: tuple[str, ...] = ()

    def read(self, value: Any) -> list[float]:
        """See `LabelReader.read`."""
        if unknown := self.unknown(value):
            raise ValueError(_shown(unknown[0]))
        found = _many(value)
        return [float(name in found) for name in self.names]

    def unknown(self, value: Any) -> list[str]:
        """See `LabelReader.unknown`."""
        return [name for name in _many(value) if name not in self.names]


def _many(value: Any) -> list[str]:
    if isinstance(value, str):
        return [_name(item) for item in value.split(SEPARATOR) if item.strip()]
    return [_name(item) for item in (value if isinstance(value, list) else [value])]


def _name(value: Any) -> str:
    """Return the label that a string or another value of JSON stands for."""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]
