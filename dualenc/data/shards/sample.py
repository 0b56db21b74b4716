"""A sample of a shard: its members, which of them is the image, and the content of its texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from dualenc.data.shards.shard import IMAGE_EXTENSIONS, Shard
from dualenc.utils.decoding import TextError, decode_text
from dualenc.utils.errors import BadSample, DataError

MAX_IMAGE, MAX_OTHER = 1 << 28, 1 << 24  # bytes of the largest member that is read


def image_members(option: str | None) -> tuple[str, ...]:
    """Parse the option `image`: the members that may hold a sample's image, the first one that exists is used.

    Args:
        option: names without the key, separated by `;` as in webdataset, such as "input.jpg" or "input.jpg;input.png";
            None for the usual ones, `IMAGE_EXTENSIONS`.

    Raises:
        DataError: If a name is empty, or a path or pattern.
    """
    if option is None:
        return IMAGE_EXTENSIONS
    names = [name.strip().removeprefix(".").lower() for name in option.split(";")]
    if not all(names) or any(set(name) & set("*?/\\{}") for name in names):
        raise DataError(
            f"image {option!r} must be the names of members without the key, separated by ';', such as 'input.jpg'"
        )
    return tuple(names)


def image_argument(images: Sequence[str]) -> str:
    """Return the argument of `dualenc fit` for these members, to follow the others; "" for the usual members."""
    return "" if tuple(images) == IMAGE_EXTENSIONS else f" --data.image {quote(';'.join(images))}"


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: its key and the locations of its members."""

    source: Shard
    key: str
    members: dict[str, tuple[int, int]]  # extension -> offset, size in bytes
    images: tuple[str, ...] = IMAGE_EXTENSIONS  # extensions of the members that may hold the image

    def __contains__(self, extension: str) -> bool:
        return extension in self.members

    @property
    def shard(self) -> str:
        """The shard's path, or its URL without secrets."""
        return str(self.source)

    def read(self, extension: str) -> bytes:
        """Read the bytes of one member.

        Raises:
            BadSample: If there is no such member, or it is larger than `MAX_IMAGE` or `MAX_OTHER`.
            DataError: If the shard is gone or was changed.
        """
        if extension not in self.members:
            raise BadSample(self, f"no .{extension} among its members", ", ".join(sorted(self.members)))
        offset, size = self.members[extension]
        if size > (MAX_IMAGE if extension in self.images else MAX_OTHER):
            raise BadSample(self, f".{extension} is too large", f"{size:,} bytes")
        return self.source.read(offset, size)

    def read_text(self, extension: str) -> str:
        """Read and decode a member that holds text.

        Raises:
            BadSample: If the member is missing, or is not a text.
        """
        data = self.read(extension)  # outside of the `try`, because its DataError is a ValueError, too
        try:
            return decode_text(data)
        except TextError as error:
            raise BadSample(self, f".{extension} {error.cause}", error.detail) from None

    def read_json(self, extension: str = "json") -> Any:
        """Read and parse a member that holds JSON.

        Raises:
            BadSample: If the member is missing, or cannot be parsed.
        """
        text = self.read_text(extension)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(self, f".{extension} cannot be read", str(error)) from None

    @property
    def image(self) -> str | None:
        """The extension of the image, or None if there is no image."""
        return next((extension for extension in self.images if extension in self.members), None)

    def __str__(self) -> str:
        return f"{self.shard} sample {self.key!r}"
