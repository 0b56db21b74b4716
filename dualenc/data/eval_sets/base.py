"""The content of an evaluation set, common to all layouts, and what a user says about it."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dualenc.data.images import ImageError, decode_image
from dualenc.data.pairs import AUTO
from dualenc.data.prepare.caption_sources import clean
from dualenc.data.shards.remote import fetch_small
from dualenc.data.shards.sample import MAX_IMAGE
from dualenc.data.shards.shard import content_hash
from dualenc.utils.arguments import shown_value
from dualenc.utils.decoding import TextError, decode_text
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.limits import hits_file_limit
from dualenc.utils.urls import is_remote, shown

SPLITS = ("test", "train", "val", "valid", "validation")  # names of folders that are taken as splits

Kind = Literal["classification", "multilabel", "retrieval", "choice"]
Problems = defaultdict[str, list[str]]  # `Problem.what` -> `Problem.names`


@dataclass(frozen=True)
class SetOptions:
    """Options of evaluation sets, for what the files of a set do not say, or say otherwise.

    Files may be given as `pathlib.Path`, too.

    Attributes:
        captions: where the captions of plain shards are; see `dualenc.data.pairs.captions_of`.
        classnames: file of class names by number, one on each line or CLIP_benchmark's JSON; None for those of the set.
        templates: file of templates, one on each line or CLIP_benchmark's JSON; "openai" for the 80 of CLIP's paper on
            ImageNet; "simple" for 7 of them; None for those of the set.
        images: folder of the images of a caption table; None to search next to it.
        image: member that holds the image of a sample of plain shards; see `dualenc.data.shards.sample.image_members`.
        kind: kind to take a set as that could be read as several; None to decide by what it has.
    """

    captions: str = AUTO
    classnames: str | None = None
    templates: str | None = None
    images: str | None = None
    image: str | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not isinstance(value, str | None):
                raise DataError(f"option {name} of a set cannot be {shown_value(value)}: pass a path or name")

    def given(self) -> dict[str, str]:
        """Return the options that differ from their defaults, by name."""
        return {name: value for name, value in vars(self).items() if value != getattr(NO_OPTIONS, name)}


NO_OPTIONS = SetOptions()


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
        prompts: which templates these are, for display.
        targets: class of each image (N,) int64, or (N, C) bool, true where the class is on the image (multilabel).
        captions: T captions of a retrieval set, and the number of each caption's image (T,) int64.
        texts: texts of a set of choices, each once.
        choices: the choices between these texts.
        takes: names of the `SetOptions` that such a set takes.
    """

    kind: Kind
    source: ImageSource
    problems: list[Problem]
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    prompts: str = ""
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    captions: tuple[list[str], Tensor] = field(default_factory=lambda: ([], torch.empty(0, dtype=torch.int64)))
    texts: list[str] = field(default_factory=list)
    choices: Choices = field(
        default_factory=lambda: Choices(*(torch.empty(0, 2, dtype=torch.int64) for _ in range(2)), keys=[])
    )
    takes: tuple[str, ...] = ()


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
