"""Checks of arguments that Python users pass: each error is one line that says what to pass instead."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

from dualenc.utils.text import printable, quoted, reason

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]  # in which a model computes embeddings
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which tokenizers cannot read


def shown_value(value: object) -> str:
    """Return a value for a message: short ones as Python writes them, others by their type."""
    if isinstance(value, str):
        return quoted(value)
    name = type(value).__name__
    return repr(value) if value is None or isinstance(value, bool | int | float) else f"of the type {printable(name)}"


def strings(given: Any, what: str, *, one: bool = False) -> list[str]:
    """Return strings as a list.

    Args:
        given: an iterable of strings.
        what: noun for the strings, in the plural.
        one: whether a single string stands for itself; otherwise it is refused, since its letters would be taken.

    Raises:
        ValueError: If anything else is given, or a string has half of a character that is written as two halves.
    """
    if isinstance(given, str):
        if not one:
            raise ValueError(f"{what} are the single string {quoted(given)}: pass a list, such as [{quoted(given)}]")
        given = [given]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise ValueError(f"{what} are {shown_value(given)}: pass {'a string or ' if one else ''}a list of strings")
    found = list(given)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{what} must be strings, but number {i} (from 0) is {shown_value(text)}")
        if _SURROGATE.search(text):
            raise ValueError(f"{what} must be Unicode, but number {i} (from 0) has half of a character: {quoted(text)}")
    return found


def check_batch_size(batch_size: int) -> None:
    """Raise a ValueError if a batch size is not a positive number."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {shown_value(batch_size)}: it must be a number of at least 1")


def check_precision(precision: str) -> None:
    """Raise a ValueError if a precision is not one of `Precision`."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {shown_value(precision)}: choose one of {', '.join(get_args(Precision))}")


def usable_device(device: "str | int | torch.device | None") -> "torch.device":
    """Return a device that this machine has.

    Args:
        device: the device; None for CUDA if available, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        # torch's own messages list twenty kinds of devices, or name a page of NVIDIA's.
        known = "at start of device string" in str(error) or not torch.cuda.is_available()
        why = "" if known else f" ({reason(error)})"
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(
            f"device {shown_value(device)} cannot be used here{why}: choose one of {', '.join(here)}"
        ) from None
    return found
