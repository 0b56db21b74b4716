"""The headers of an uncompressed tar, read for their names, places and sizes: no payload, and nothing unpacked."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of a long name or of PAX fields; a header may claim any size
_READ = 4096  # at once: the headers of small members lie close together
_REGULAR, _NO_DATA = b"07\0", b"123456"  # of other types the data is passed over
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


class TarError(ValueError):
    """The file is no whole uncompressed tar; the message says where."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    offset: int  # of its data
    size: int  # bytes
    header: bytes  # the block that describes it


def members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of an uncompressed tar (v7, ustar, GNU or PAX), in their order.

    Args:
        file: open for reading, unbuffered or not; read by position through its descriptor.

    Raises:
        TarError: compressed, cut off, broken, sparse, or more than one tar in the file.
    """
    window = _Window(file.fileno())
    read, size = window.read, os.fstat(file.fileno()).st_size
    if kind := next((kind for magic, kind in _COMPRESSED.items() if read(0, 8).startswith(magic)), None):
        raise TarError(f"it is compressed ({kind}): unpack it to a plain .tar, whose samples can be read by position")
    at = 0
    name: bytes | None = None  # what a GNU or PAX header says of the member after it
    true_size: int | None = None
    while True:
        block = read(at, BLOCK)
        if not block.rstrip(b"\0"):
            if len(block) < BLOCK:
                raise TarError(f"it is cut off at byte {at + len(block):,}: no end mark" if size else "it is empty")
            _check_end(file.fileno(), at, size)
            return
        if len(block) < BLOCK:
            raise TarError(f"it is cut off inside the header at byte {at:,}" if at else "it is no tar")
        _check_sum(block, at)
        kind, length, data = block[156:157], _number(block[124:136], at), at + BLOCK
        if kind in b"LKxgX":
            name, true_size = _extended(window, kind, length, at, name, true_size)
            at = data + _padded(length)
            continue
        if kind == b"S":
            raise TarError(f"the member at byte {at:,} is stored sparse: pack it without --sparse")
        name = _short_name(block) if name is None else name
        length = length if true_size is None else true_size
        length = 0 if kind in _NO_DATA else length
        if data + length > size:
            raise TarError(f"it is cut off inside {name.decode('utf-8', 'replace')!r}")
        if kind in _REGULAR and not (kind == b"\0" and name.endswith(b"/")):  # v7 had no type for folders
            yield Member(name, data, length, block)
        at = data + _padded(length)
        name, true_size = None, None


class _Window:
    """Reads a file by position, some more at once than it is asked for."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.held, self.held_at = b"", 0

    def read(self, offset: int, count: int) -> bytes:
        """Bytes from a place, fewer at the end."""
        start = offset - self.held_at
        if start >= 0 and start + count <= len(self.held):
            return self.held[start : start + count]
        self.held, self.held_at = os.pread(self.descriptor, max(count, _READ), offset), offset
        return self.held[:count]


def _extended(
    window: _Window, kind: bytes, length: int, at: int, name: bytes | None, true_size: int | None
) -> tuple[bytes | None, int | None]:
    """Name and size of the member after a GNU or PAX header, as far as it says them."""
    if length > MAX_EXTENDED:
        raise TarError(f"the header at byte {at:,} claims {length:,} bytes of names")
    data = at + BLOCK
    more = window.read(data, length)
    if len(more) < length:
        raise TarError(f"it is cut off inside the header at byte {at:,}")
    if kind == b"L":
        name, end, _ = more.partition(b"\0")
        # What pads it goes on as the name.
        if not end and window.read(data, _padded(length))[length:].strip(b"\0"):
            raise TarError(f"the header at byte {at:,} is broken")
    elif kind != b"K":
        fields = _pax(more, at)
        if any(key.startswith(b"GNU.sparse") for key in fields):
            raise TarError(f"the member at byte {at:,} is stored sparse: pack it without --sparse")
        if kind == b"g" and fields.keys() & {b"path", b"size"}:
            raise TarError(f"the header at byte {at:,} names all members alike")
        if kind != b"g":
            name = fields.get(b"path", name)
            true_size = _decimal(fields[b"size"], at) if b"size" in fields else true_size
    return name, true_size


def _short_name(block: bytes) -> bytes:
    """The name in a header itself."""
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _check_sum(block: bytes, at: int) -> None:
    """The sum of a header's bytes, the sum's own field taken for spaces; old tars summed signed bytes."""
    stated = _number(block[148:156], at)
    found = sum(block) - sum(block[148:156]) + 8 * 32
    if found != stated:
        signed = found - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if signed != stated:
            raise TarError(f"it is broken at byte {at:,}: no tar header" if at else "it is no tar")


def _check_end(descriptor: int, at: int, size: int) -> None:
    """Behind the end mark there is padding and nothing else: a second tar there would be lost without a word."""
    while at < size:
        chunk = os.pread(descriptor, 1 << 20, at)
        if chunk.strip(b"\0"):
            raise TarError(f"something follows its end mark at byte {at:,}: joined tars must be packed anew")
        if not chunk:
            return
        at += len(chunk)


def _number(field: bytes, at: int) -> int:
    """Octal digits, or GNU's binary form for what is too large for them."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip() or b"0"
    if text.strip(b"01234567"):
        raise TarError(f"it is broken at byte {at:,}: no tar header" if at else "it is no tar")
    return int(text, 8)


def _decimal(field: bytes, at: int) -> int:
    if not field.isdigit() or len(field) > 18:
        raise TarError(f"the header at byte {at:,} gives the size {field[:20]!r}")
    return int(field)


def _pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a PAX header."""
    fields, place = {}, 0
    while place < len(data) and data[place]:
        digits = data[place : place + 8].partition(b" ")[0]
        stop = place + int(digits) if digits.isdigit() else 0
        record = data[place + len(digits) + 1 : stop]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or stop > len(data):
            raise TarError(f"the header at byte {at:,} is broken")
        fields[key] = value
        place = stop
    return fields
