"""The content of an evaluation set, common to all layouts, and the text files next to its images."""

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
from dualenc.data.shards.remote import fetch_small
from dualenc.data.shards.sample import MAX_IMAGE
from dualenc.data.shards.shard import content_hash
from dualenc.utils.decoding import TextError, decode_text, is_blank, lines_of
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.limits import hits_file_limit
from dualenc.utils.urls import is_remote, shown

SPLITS = ("test", "train", "val", "valid", "validation")  # names of folders that are taken as splits
CLASSNAMES, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"

Kind = Literal["classification", "multilabel", "retrieval", "choice"]
Problems = defaultdict[str, list[str]]  # `Problem.what` -> `Problem.names`


@dataclass(frozen=True)
class Problem:
    """A problem of an evaluation set, such as images that are missing. Unusable samples are left out of the set.

    Attributes:
        what: the problem in the singular, such as "image missing".
        names: where it occurs, one printable name for each time.
    """

    what: str
    names: list[str]


class Choices(NamedTuple):
    """n instances of one or two images and two texts, where text j of an instance belongs to its image j.

    Winoground (Thrush et al. 2022, arXiv:2204.03162) has two images. SugarCrepe (Hsieh et al. 2023, arXiv:2306.14610)
    has one image: the first text is right, and the second wrong.
    """

    images: Tensor  # (n, 2) int64 numbers of the images in the set; the second is -1 in instances of one image
    texts: Tensor  # (n, 2) int64 numbers of the texts in the set
    keys: list[str]  # (n,) names of the instances


class ImageSource(Protocol):
    """Images by number, in shards or in files of their own."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Return the name of image i in its set."""
        ...

    def decode(self, i: int) -> Tensor:
        """Decode image i to uint8 (3, H, W).

        Raises:
            BadSample: If the image cannot be read or decoded.
        """
        ...

    def hashes(self) -> np.ndarray:
        """Hash the bytes of all images, (N,) uint64; see `dualenc.data.shards.shard.content_hash`."""
        ...


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Content:
    """The usable content of a split of an evaluation set. Attributes that its kind does not use are empty.

    Attributes:
        kind: kind of the task.
        source: the N images.
        problems: all problems that are known without decoding an image.
        classnames: C names of classes, for "classification" and "multilabel".
        templates: sentences with `{c}` in place of the class name, for the same kinds.
        targets: class of each image (N,) int64, or (N, C) bool, true where the class is on the image (multilabel).
        captions: T captions of a retrieval set, and the number of each caption's image (T,) int64.
        texts: texts of a set of choices, each once.
        choices: the choices between these texts.
    """

    kind: Kind
    source: ImageSource
    problems: list[Problem]
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    captions: tuple[list[str], Tensor] = field(default_factory=lambda: ([], torch.empty(0, dtype=torch.int64)))
    texts: list[str] = field(default_factory=list)
    choices: Choices = field(
        default_factory=lambda: Choices(*(torch.empty(0, 2, dtype=torch.int64) for _ in range(2)), keys=[])
    )


class ImageFiles:
    """Images that are files of their own; see `ImageSource`.

    Args:
        paths: paths of the files.
        keys: names of the images.
    """

    def __init__(self, paths: Sequence[str], keys: Sequence[str]) -> None:
        self.paths, self.keys = list(paths), list(map(clean, keys))

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, i: int) -> str:
        """See `ImageSource`."""
        return self.keys[i]

    def decode(self, i: int) -> Tensor:
        """See `ImageSource`."""
        try:
            return decode_image(self.read(i))
        except ImageError as error:
            raise BadSample(clean(self.paths[i]), error.cause, error.detail) from None

    def hashes(self) -> np.ndarray:
        """See `ImageSource`; 0 for a file that cannot be read."""
        found = np.zeros(len(self), np.uint64)
        for i in range(len(self)):
            try:
                found[i] = content_hash(self.read(i))
            except BadSample:
                continue
        return found

    def read(self, i: int) -> bytes:
        """Read the bytes of image i.

        Raises:
            BadSample: If the file cannot be read, or is too large.
        """
        try:
            with open(self.paths[i], "rb") as file:
                data = file.read(MAX_IMAGE + 1)
        except OSError as error:
            if hits_file_limit(error):  # the fault of the machine, not of the file
                raise
            raise BadSample(clean(self.paths[i]), "cannot be read", error.strerror or "") from None
        if len(data) > MAX_IMAGE:
            raise BadSample(clean(self.paths[i]), "is too large", f"more than {MAX_IMAGE:,} bytes")
        return data


def problem_list(problems: Problems) -> list[Problem]:
    """Convert problems that were collected by `Problem.what` to a list."""
    return [Problem(what, names) for what, names in problems.items() if names]


# Text files next to the images


def read_text(path: str) -> str | None:
    """Read a small local or remote file; None if it does not exist.

    Raises:
        DataError: If the file cannot be read, or is not a text.
    """
    try:
        data = fetch_small(path) if is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return None if data is None else decode_text(data)
    except TextError as error:
        raise DataError(f"{shown(path)} {error}") from None


def read_classnames(path: str, problems: Problems) -> list[str] | None:
    """Read class names, one on each line; None if the file does not exist. Duplicates are kept, and are a problem.

    Raises:
        DataError: If the file is empty, or a line is blank.
    """
    names = _lines(path)
    if names is not None:
        note_duplicates(names, problems)
    return names


def note_duplicates(names: list[str], problems: Problems) -> None:
    """Note the names that several classes share: no text distinguishes these classes."""
    for name, count in Counter(names).items():
        if count > 1:
            classes = ", ".join(str(i) for i, other in enumerate(names) if other == name)
            problems["duplicate class name"].append(f"{name!r} (classes {classes})")


def read_templates(path: str, problems: Problems) -> list[str] | None:
    """Read templates, one on each line; None if the file does not exist. Those without `{c}` are left out.

    Raises:
        DataError: If the file is empty, a line is blank, or no template has `{c}`.
    """
    templates = _lines(path)
    if templates is None:
        return None
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            problems["template without {c}"].append(f"{shown(path)} line {number}: {template!r}")
    usable = [template for template in templates if "{c}" in template]
    if not usable:
        raise DataError(f"{shown(path)}: {templates[0]!r} has no {{c}} for the class name, and no other line has one")
    return usable


def _lines(path: str) -> list[str] | None:
    """Read the lines of a file, which are names by number or templates; None if the file does not exist.

    Raises:
        DataError: If the file is empty, or a line is blank.
    """
    text = read_text(path)
    if text is None:
        return None
    if is_blank(text):
        raise DataError(f"{shown(path)} is empty: write one entry on each line, or remove the file")
    lines = lines_of(text)
    while is_blank(lines[-1]):
        lines.pop()
    if blank := [number for number, line in enumerate(lines, 1) if is_blank(line)]:
        raise DataError(f"{shown(path)}: line {blank[0]} is blank, which would shift the lines after it: remove it")
    return lines
