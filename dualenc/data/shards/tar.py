"""Reading of the headers of an uncompressed tar: names, offsets and sizes. Data is neither read nor unpacked."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dualenc.utils.files import stand_in

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of a long name or of PAX fields; limited because a header may claim any size
_READ_SIZE = 4096  # bytes of a read; one read covers several headers where members are small
_REGULAR, _NO_DATA = b"07\0", b"123456"  # types of members; the data of other types is skipped
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


class TarError(ValueError):
    """A file that is not a complete uncompressed tar; the message says at which byte."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int  # bytes from the start of the file to its data
    size: int  # bytes
    header: bytes  # the 512-byte block that describes it
    start: int  # bytes from the start of the file to the first of its headers, which a long name adds to the block


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar (v7, ustar, GNU or PAX), in their order.

    Args:
        file: file that is open for reading, buffered or not; it is read by position through its descriptor.

    Raises:
        TarError: If the tar is compressed, cut off, broken or sparse, or the file holds more than one tar.
    """
    reader = _Reader(file.fileno())
    read, size = reader.read, os.fstat(file.fileno()).st_size
    if kind := next((kind for magic, kind in _COMPRESSED.items() if read(0, 8).startswith(magic)), None):
        raise TarError(f"it is compressed ({kind}): unpack it to a plain .tar, whose samples can be read by position")
    if (what := stand_in(read(0, BLOCK))) and read(257, 5) != b"ustar":  # the first member may have such a name
        raise TarError(f"it is {what}")
    at = 0
    name: bytes | None = None  # given by a GNU or PAX header for the member after it
    true_size: int | None = None
    start: int | None = None
    while True:
        block = read(at, BLOCK)
        if not block.rstrip(b"\0"):
            if len(block) < BLOCK:
                raise TarError(f"it is cut off at byte {at + len(block):,}: no end mark" if size else "it is empty")
            _check_end(file.fileno(), at, size)
            return
        if len(block) < BLOCK:
            raise TarError(f"it is cut off inside the header at byte {at:,}" if at else "it is not a tar")
        _verify_checksum(block, at)
        kind, length, data = block[156:157], _number(block[124:136], at), at + BLOCK
        if kind in b"LKxgX":
            name, true_size = _extended(reader, kind, length, at, name, true_size)
            start = None if kind == b"g" else at if start is None else start  # a "g" is about all members after it
            at = data + padded(length)
            continue
        if kind == b"S":
            raise TarError(f"the member at byte {at:,} is stored sparse: pack it without --sparse")
        name = _short_name(block) if name is None else name
        length = length if true_size is None else true_size
        length = 0 if kind in _NO_DATA else length
        if data + length > size:
            raise TarError(f"it is cut off inside {name.decode('utf-8', 'replace')!r}")
        if kind in _REGULAR and not (kind == b"\0" and name.endswith(b"/")):  # v7 tars have no type for folders
            yield Member(name, data, length, block, at if start is None else start)
        at = data + padded(length)
        name, true_size, start = None, None, None


class _Reader:
    """Reader of a file by position, with a buffer of one read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.buffer, self.buffer_offset = b"", 0

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from an offset, fewer at the end of the file."""
        start = offset - self.buffer_offset
        if start >= 0 and start + count <= len(self.buffer):
            return self.buffer[start : start + count]
        self.buffer, self.buffer_offset = os.pread(self.descriptor, max(count, _READ_SIZE), offset), offset
        return self.buffer[:count]


def _extended(
    reader: _Reader, kind: bytes, length: int, at: int, name: bytes | None, true_size: int | None
) -> tuple[bytes | None, int | None]:
    """Return the name and size that a GNU or PAX header gives the member after it, or the ones passed in."""
    if length > MAX_EXTENDED:
        raise TarError(f"the header at byte {at:,} claims {length:,} bytes of names")
    data = at + BLOCK
    content = reader.read(data, length)
    if len(content) < length:
        raise TarError(f"it is cut off inside the header at byte {at:,}")
    if kind == b"L":
        name, end, _ = content.partition(b"\0")
        # Without an end mark, bytes other than zeros in the padding would continue the name.
        if not end and reader.read(data, padded(length))[length:].strip(b"\0"):
            raise TarError(f"the header at byte {at:,} is broken")
    elif kind != b"K":
        fields = _pax(content, at)
        if any(key.startswith(b"GNU.sparse") for key in fields):
            raise TarError(f"the member at byte {at:,} is stored sparse: pack it without --sparse")
        if kind == b"g" and fields.keys() & {b"path", b"size"}:
            raise TarError(f"the header at byte {at:,} gives all members one name or size")
        if kind != b"g":
            name = fields.get(b"path", name)
            true_size = _decimal(fields[b"size"], at) if b"size" in fields else true_size
    return name, true_size


def _short_name(block: bytes) -> bytes:
    """Return the name that is stored in the header block itself."""
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def padded(length: int) -> int:
    """Return the bytes that data of this length takes in a tar, a multiple of `BLOCK`."""
    return -(-length // BLOCK) * BLOCK


def _verify_checksum(block: bytes, at: int) -> None:
    """Verify the sum of a header's bytes, in which the sum's own field counts as spaces.

    Old tars sum signed bytes.
    """
    expected = _number(block[148:156], at)
    found = sum(block) - sum(block[148:156]) + 8 * 32
    if found != expected:
        signed = found - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if signed != expected:
            raise TarError(f"it is broken at byte {at:,}: not a tar header" if at else "it is not a tar")


def _check_end(descriptor: int, at: int, size: int) -> None:
    """Refuse anything but padding after the end mark: a second tar there would be ignored silently."""
    while at < size:
        chunk = os.pread(descriptor, 1 << 20, at)
        if chunk.strip(b"\0"):
            raise TarError(f"there is data after its end mark at byte {at:,}: pack joined tars into one")
        if not chunk:
            return
        at += len(chunk)


def _number(field: bytes, at: int) -> int:
    """Return the number in a field: octal digits, or GNU's binary form for larger numbers."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip() or b"0"
    if text.strip(b"01234567"):
        raise TarError(f"it is broken at byte {at:,}: not a tar header" if at else "it is not a tar")
    return int(text, 8)


def _decimal(field: bytes, at: int) -> int:
    if not field.isdigit() or len(field) > 18:
        raise TarError(f"the header at byte {at:,} gives the size {field[:20]!r}")
    return int(field)


def _pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """Return the fields of a PAX header from its records "LENGTH KEY=VALUE\\n"."""
    fields, start = {}, 0
    while start < len(data) and data[start]:
        digits = data[start : start + 8].partition(b" ")[0]
        stop = start + int(digits) if digits.isdigit() else 0
        record = data[start + len(digits) + 1 : stop]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or stop > len(data):
            raise TarError(f"the header at byte {at:,} is broken")
        fields[key] = value
        start = stop
    return fields
