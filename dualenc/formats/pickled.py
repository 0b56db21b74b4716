"""Tensors of files that other programs have pickled, read without running code of the file."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from dualenc.utils.errors import ModelError
from dualenc.utils.text import one_line

# Entries under which programs of training keep the weights; averaged weights are taken before others, as timm does.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module")
SCALARS = "NumPy scalars"
NUMPY = ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")


class _Ignored:
    """A stand-in for a NumPy scalar, such as the best metric of a training: its value is not read."""

    def __init__(self, *parts: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickled(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file that `torch.save` has written.

    Args:
        path: a dictionary of tensors, or a dictionary that holds one under the names of `WRAPPERS`, next to values of
            plain types.

    Returns:
        The tensors, and what is around them: the names of the entries that hold them, and `SCALARS`.

    Raises:
        ModelError: If the file cannot be read, or holds no such dictionary.
    """
    try:
        content, around = _load(path)
    except Exception as error:  # a damaged file makes torch raise errors of any class
        raise ModelError(f"{path} cannot be read: {_refusal(error)}") from None
    found = next(_dictionaries(content, around), None)
    if found is None:
        held = ", ".join(map(repr, list(content)[:8])) if isinstance(content, dict) else ""
        held = f", its entries are {one_line(held)}" if held else ""
        raise ModelError(
            f"{path} must be a dictionary of tensors and nothing else, or have one as its entry "
            f"{', '.join(WRAPPERS[:-1])} or {WRAPPERS[-1]}{held}: save its weights so"
        )
    return found


def _dictionaries(content: Any, entries: list[str]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Yield the dictionaries of tensors in a dictionary, each with the names of the entries that hold it."""
    if not isinstance(content, dict) or not content:
        return
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        yield content, entries
        return
    for name in WRAPPERS:
        yield from _dictionaries(content.get(name), [*entries, name])


def _load(path: Path) -> tuple[Any, list[str]]:
    """Load a file with torch, if need be with stand-ins for NumPy scalars."""

    def load(mmap: bool = True) -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError:  # Files of torch before 1.6 cannot be memory-mapped.
            if not mmap:
                raise
            return load(mmap=False)

    with warnings.catch_warnings(action="ignore"):  # torch warns before it raises an error
        try:
            return load(), []
        except UnpicklingError as error:
            if "GLOBAL numpy." not in str(error):
                raise
            with _numpy_ignored():
                return load(), [SCALARS]


@contextmanager
def _numpy_ignored() -> Iterator[None]:
    """Let torch read NumPy scalars, without running code of NumPy."""
    from numpy import dtypes

    names = [*NUMPY, *(f"dtypes.{name}" for name in dtypes.__all__)]
    with torch.serialization.safe_globals([(_Ignored, f"numpy.{name}") for name in names]):
        yield


def _refusal(error: Exception) -> str:
    """Return why torch does not read a file, in one line."""
    text = str(error)
    if "TorchScript" in text:
        return (
            "it is a TorchScript archive, which holds code: save the tensors alone, by "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT)"
        )
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"besides tensors it holds {found[1]}, which could run code: save its tensors alone, by torch.save in the "
            "program that wrote it"
        )
    if not isinstance(error, OSError | RuntimeError | MemoryError):
        return "it was not written by torch.save, or is damaged: download or save it again"
    return one_line((text.splitlines() or [type(error).__name__])[0])
