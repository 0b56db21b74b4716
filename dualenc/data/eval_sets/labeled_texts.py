"""Texts with labels in two tables, one to learn from and one to measure on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, tensor

from dualenc.data.text.files import KINDS, Line, TextIndex
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import did_you_mean, quoted


@dataclass(frozen=True, eq=False, repr=False)
class LabeledTexts:
    """Texts to learn from and texts to measure on, opened by `open_labeled_texts`.

    Attributes:
        path: file of the texts to measure on.
        train_path: file of the texts to learn from.
        name: name of its folder and of the file.
        split: name of the file without its ending.
        labels: names of the labels.
        train: N texts to learn from.
        train_targets: (N,) int64 their labels.
        texts: M texts to measure on.
        targets: (M,) int64 their labels.
        columns: columns of the text and of the label.
        fingerprint: hash of both files.
    """

    path: str
    train_path: str
    name: str
    split: str
    labels: list[str]
    train: list[str]
    train_targets: Tensor
    texts: list[str]
    targets: Tensor
    columns: tuple[tuple[str, ...], str]
    fingerprint: str


def is_table(path: str) -> bool:
    """Return whether a path is that of a file of texts, by its ending."""
    return path.lower().endswith(KINDS)


def open_labeled_texts(train: str, test: str, text: Sequence[str] = ("text",), label: str = "label") -> LabeledTexts:
    """Read two tables of labeled texts.

    Args:
        train: table to learn from: `.tsv`, `.csv` or `.jsonl`.
        test: table to measure on.
        text: columns of the text, which are joined by a blank.
        label: column of the label.

    Raises:
        DataError: If a file or a column is missing, a line is broken, or a label of `test` is not in `train`.
    """
    if Path(train).resolve() == Path(test).resolve():
        raise DataError(f"{test} cannot be both learned from and measured on: name two files")
    one, other = (TextIndex.build(path, [*text, label]) for path in (train, test))
    (texts, labels), (measured, theirs) = (_read(index, text, label) for index in (one, other))
    names = sorted(set(labels), key=_number_or_name)
    if len(names) < 2:
        raise DataError(f"{train}: all texts have the label {quoted(names[0])}: two labels are needed")
    place = next((i for i, name in enumerate(theirs) if name not in names), None)
    if place is not None:
        raise DataError(
            f"{other[place]} has the label {quoted(theirs[place])}, which no text of {train} has: "
            f"{did_you_mean(theirs[place], names)}"
        )
    number = {name: i for i, name in enumerate(names)}
    path = Path(test)
    return LabeledTexts(
        path=test,
        train_path=train,
        name=f"{path.resolve().parent.name}/{path.stem}",
        split=path.stem,
        labels=names,
        train=texts,
        train_targets=tensor([number[name] for name in labels]),
        texts=measured,
        targets=tensor([number[name] for name in theirs]),
        columns=(tuple(text), label),
        fingerprint=hashlib.blake2b(f"{one.fingerprint} {other.fingerprint}".encode(), digest_size=16).hexdigest(),
    )


def _number_or_name(label: str) -> tuple[int, str]:
    """Return a key that sorts numbers by their value and other labels after them, by name."""
    return (int(label), "") if label.isdecimal() else (2**63, label)


def _read(index: TextIndex, text: Sequence[str], label: str) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a table."""
    texts, labels = [], []
    for line in index:
        fields = line.read()
        texts.append(" ".join(_field(line, fields.get(name), name) for name in text))
        labels.append(_field(line, fields.get(label), label))
    return texts, labels


def _field(line: Line, value: object, name: str) -> str:
    """Return a field as text; a `.jsonl` may hold numbers as labels.

    Raises:
        DataError: If it is missing, or a list or object.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample(line, f"its field {name!r} is not a text or number")
    return str(value)
