"""What an evaluation set holds, wherever it lies, and the text files that lie beside its images."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dualenc.data.images import ImageError, decode_image
from dualenc.data.prepare.caption_sources import clean
from dualenc.data.shards.index import MAX_IMAGE
from dualenc.data.shards.remote import fetch_small
from dualenc.data.shards.shard import content_hash
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.urls import is_remote, shown

SPLITS = ("test", "train", "val", "valid", "validation")  # the usual names
CLASSNAMES, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"

Kind = Literal["classification", "multilabel", "retrieval", "choice"]
Problems = defaultdict[str, list[str]]  # what -> names


@dataclass(frozen=True)
class Problem:
    """Something of a set that is wrong, and left out if it cannot be used.

    Attributes:
        what: is wrong, for one of them.
        names: where, for people: one for each.
    """

    what: str
    names: list[str]


class Choices(NamedTuple):
    """n instances of one or two images and two texts: text j of an instance belongs to its image j.

    Winoground (Thrush et al. 2022, arXiv:2204.03162) has two images. SugarCrepe (Hsieh et al. 2023, arXiv:2306.14610)
    has one: its first text is right, and the second wrong.
    """

    images: Tensor  # (n, 2) int64 numbers of the set's images; the second is -1 where there is one alone
    texts: Tensor  # (n, 2) int64 numbers of the set's texts
    keys: list[str]  # n


class Pictures(Protocol):
    """Images by number, wherever they lie."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """What image i is called in its set."""
        ...

    def decode(self, i: int) -> Tensor:
        """Image i, uint8 (3, H, W); or `BadSample`."""
        ...

    def hashes(self) -> np.ndarray:
        """(N,) uint64 of the images' bytes, see `dualenc.data.shards.shard.content_hash`."""
        ...


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Content:
    """What a split of an evaluation set holds that can be used; what is not of its kind is empty.

    Attributes:
        kind: of task.
        pictures: N images.
        problems: all that is wrong and can be known without decoding an image.
        classnames: C names, of classification and multilabel sets.
        templates: with {c} for the name.
        targets: class of each image (N,) int64, or whether each class is on it (N, C) bool (multilabel).
        captions: of a retrieval set, all T of them, and the number of the image (T,) int64 that each belongs to.
        texts: of a set of choices, each once.
        choices: between these texts.
    """

    kind: Kind
    pictures: Pictures
    problems: list[Problem]
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    captions: tuple[list[str], Tensor] = field(default_factory=lambda: ([], torch.empty(0, dtype=torch.int64)))
    texts: list[str] = field(default_factory=list)
    choices: Choices = field(
        default_factory=lambda: Choices(*(torch.empty(0, 2, dtype=torch.int64) for _ in range(2)), keys=[])
    )


class Files:
    """Images that are files of their own.

    Args:
        paths: of the files.
        keys: what they are called.
    """

    def __init__(self, paths: Sequence[str], keys: Sequence[str]) -> None:
        self.paths, self.keys = list(paths), list(map(clean, keys))

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        """See `Pictures`."""
        return self.keys[i]

    def decode(self, i: int) -> Tensor:
        """See `Pictures`."""
        try:
            return decode_image(self._read(i))
        except ImageError as error:
            raise BadSample(clean(self.paths[i]), error.cause, error.detail) from None

    def hashes(self) -> np.ndarray:
        """See `Pictures`; 0 for a file that cannot be read."""
        found = np.zeros(len(self), np.uint64)
        for i in range(len(self)):
            try:
                found[i] = content_hash(self._read(i))
            except BadSample:
                continue
        return found

    def _read(self, i: int) -> bytes:
        try:
            with open(self.paths[i], "rb") as file:
                data = file.read(MAX_IMAGE + 1)
        except OSError as error:
            raise BadSample(clean(self.paths[i]), "cannot be read", error.strerror or "") from None
        if len(data) > MAX_IMAGE:
            raise BadSample(clean(self.paths[i]), "is too large", f"more than {MAX_IMAGE:,} bytes")
        return data


def listed(problems: Problems) -> list[Problem]:
    """Problems as a set has them."""
    return [Problem(what, names) for what, names in problems.items() if names]


# Text files beside the images


def read_text(path: str) -> str | None:
    """A small file, here or elsewhere; None where there is none.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        data = fetch_small(path) if is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return None if data is None else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)} cannot be read ({error})") from None


def read_classnames(path: str, problems: Problems) -> list[str] | None:
    """One name a line; those that stand twice stay, and are a problem. None where there is no such file.

    Raises:
        DataError: it is empty, or a line is blank.
    """
    names = _lines(path)
    if names is not None:
        note_duplicates(names, problems)
    return names


def note_duplicates(names: list[str], problems: Problems) -> None:
    """Names of several classes are a problem: no text tells these classes apart."""
    for name, count in Counter(names).items():
        if count > 1:
            classes = ", ".join(str(i) for i, other in enumerate(names) if other == name)
            problems["class name that stands twice"].append(f"{name!r} (classes {classes})")


def read_templates(path: str, problems: Problems) -> list[str] | None:
    """One template a line; those without {c} are left out. None where there is no such file.

    Raises:
        DataError: it is empty, a line is blank, or none is left.
    """
    templates = _lines(path)
    if templates is None:
        return None
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            problems["template without {c}"].append(f"{shown(path)} line {number}: {template!r}")
    usable = [template for template in templates if "{c}" in template]
    if not usable:
        raise DataError(f"{shown(path)}: {templates[0]!r} has no {{c}} for the class name, and no other line has")
    return usable


def _lines(path: str) -> list[str] | None:
    text = read_text(path)
    if text is None:
        return None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise DataError(f"{shown(path)} is empty")
    if "" in lines:
        raise DataError(f"{shown(path)}: line {lines.index('') + 1} is blank, which would shift what follows")
    return lines
