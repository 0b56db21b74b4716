"""Comparison of dualenc with another library, which runs in a process of its own."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.interop.inputs import Inputs
from dualenc.interop.references import Reference
from dualenc.utils.errors import ModelError

NOT_COUNTED = ("photos",)  # Each library resizes photos with its own arithmetic; their pixels are compared.
PIXELS = 0.1  # mean difference of normalized pixels, above which an image was resized or cropped differently
WORDS = {
    "pixels": "images of noise",
    "ids": "texts of random tokens",
    "prompts": "texts with prompts",
    "scale": "temperature",
    "bias": "logit bias",
}


class Check(NamedTuple):
    """Comparison of dualenc with one reference.

    Attributes:
        reference: function or program that loads the model with another library.
        model: what the reference loads.
        inputs: inputs of both.
        expected: outputs of dualenc by name, all of which the reference must give.
        tokenizer: tokenizer of dualenc, whose ids of the texts the reference must give too; None if not compared.
    """

    reference: Reference
    model: str
    inputs: Inputs
    expected: Mapping[str, np.ndarray]
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Verified:
    """Largest difference between dualenc and another library, for each kind of input.

    Attributes:
        library: name of the other library.
        tolerance: upper limit of all differences that count.
        differences: largest difference by name.
        counts: number of inputs by name.
    """

    library: str
    tolerance: float
    differences: dict[str, float]
    counts: dict[str, int]

    @property
    def largest(self) -> float:
        """The largest difference that counts."""
        return max(x for name, x in self.differences.items() if name not in NOT_COUNTED)

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        parts = [
            f"{self.counts[name]} {WORDS.get(name, name)} {x:.1e}"
            for name, x in self.differences.items()
            if name not in NOT_COUNTED
        ]
        lines = [
            f"compared with {self.library}: largest difference {self.largest:.1e}, {self.tolerance:.0e} allowed "
            f"({', '.join(parts)})"
        ]
        lines += [
            f"{self.counts[name]} {name} that {self.library} resizes itself: {self.differences[name]:.1e}, not counted"
            for name in NOT_COUNTED
            if name in self.differences
        ]
        return lines


def verify(check: Check, tolerance: float) -> Verified:
    """Compare the outputs of dualenc with those of another library in a fresh process.

    Args:
        check: the comparison.
        tolerance: largest difference that is allowed, relative to the largest value where this is above 1.

    Raises:
        ModelError: If a difference is above the tolerance or not a number, if the token ids differ, if nothing is
            compared, or if the other library is not installed or cannot load the model.
    """
    library, model, expected = check.reference.library, check.model, check.expected
    found = run(check.reference, model, check.inputs)
    names = (*expected, *(["text_ids"] if check.tokenizer is not None else []))
    if missing := [name for name in names if name not in found]:
        raise ModelError(f"{library} does not give {', '.join(missing)} for {model}, which dualenc compares")
    if "bias" in found and "scale" in expected and "bias" not in expected:
        raise ModelError(f"{library} finds a logit bias in {model}, which the model of dualenc does not have")
    if check.tokenizer is not None:
        _compare_ids(library, model, check.inputs.texts, check.tokenizer, found)
    differences = {}
    for name, ours in expected.items():
        if ours.shape != found[name].shape:
            raise ModelError(f"{library} gives shape {found[name].shape} for {name} of {model}, expected {ours.shape}")
        if name.endswith("_pixels"):
            _compare_pixels(library, model, ours, found[name])
            continue
        largest = max(1.0, float(np.abs(ours).max()))  # embeddings have unit length; a temperature is larger
        differences[name] = float(np.abs(ours - found[name]).max()) / largest
        if name not in NOT_COUNTED and not differences[name] <= tolerance:  # also true for NaN
            raise ModelError(
                f"{library} and dualenc differ by {differences[name]:.1e} on {WORDS.get(name, name)} of {model}, "
                f"{tolerance:.0e} is allowed: nothing was written"
            )
    if not differences.keys() - set(NOT_COUNTED):
        raise ModelError(f"nothing of {model} was compared with {library}: nothing was written")
    return Verified(library, tolerance, differences, {name: len(expected[name]) for name in differences})


def _compare_pixels(library: str, model: str, ours: np.ndarray, found: np.ndarray) -> None:
    """Raise if two libraries resized or cropped images differently, beyond rounding."""
    difference = float(np.abs(ours - found).mean())
    if not difference <= PIXELS:
        raise ModelError(
            f"{library} resizes or crops the images of {model} in another way: normalized pixels differ by "
            f"{difference:.2f} on average"
        )


def _compare_ids(
    library: str, model: str, texts: Sequence[str], tokenizer: Tokenizer, found: Mapping[str, np.ndarray]
) -> None:
    """Raise if the ids of a text differ, apart from the padding after them."""
    if len(found["text_ids"]) != len(texts):
        raise ModelError(
            f"{library} gives text_ids of {len(found['text_ids'])} texts for {model}, expected {len(texts)}"
        )
    for row, (text, ours) in enumerate(zip(texts, tokenizer.encode(texts), strict=True)):
        ids = found["text_ids"][row]
        rest = found["text_mask"][row, len(ours) :] if "text_mask" in found else ids[len(ours) :] != ids[-1]
        if ids[: len(ours)].tolist() != ours or rest.any():
            raise ModelError(f"the tokenizer does not match: {library} gives other ids for {text[:50]!r} with {model}")


def run(reference: Reference, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
    """Run a reference on inputs in a fresh process, and return its outputs.

    Raises:
        ModelError: If the library is not installed, or the process fails; the message has its last line.
    """
    library = reference.library
    with tempfile.TemporaryDirectory(prefix="dualenc-verify-") as name:
        folder = Path(name)
        inputs.write(folder)
        try:
            done = subprocess.run(
                reference.command(model, name), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ModelError(f"{library} cannot be started to check {model} ({error})") from None
        if done.returncode < 0:
            raise ModelError(
                f"{library} was stopped by signal {-done.returncode} while it checked {model}: is memory short?"
            )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
            last = (lines or done.stderr.strip().splitlines() or ["without a message"])[-1]
            if last.startswith("ModuleNotFoundError"):
                last = f"{last.partition(': ')[2]}: install it, what cannot be checked is not written"
            raise ModelError(f"{library} cannot load {model} ({last})")
        try:
            with np.load(folder / "outputs.npz", allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ModelError(f"the check of {model} with {library} wrote no valid outputs.npz ({error})") from None
