"""Notes in image files, such as profiles, texts and EXIF: found without unpacking them, and cut out of the file."""

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

MAX_NOTE = 1 << 20  # bytes that are unpacked of a note that may tell the orientation

Note = tuple[int, int, str, Any]  # its first byte, the byte after its end, Pillow's name or "", and the content


def find_notes(data: bytes) -> tuple[list[tuple[int, int]] | None, dict[str, Any]]:
    """Find the parts of an image file that its pixels do not need.

    Returns:
        The first byte of each part and the byte after its end, in order, None for a JPEG of unusual structure; and the
        notes in which Pillow looks for an orientation, under its own names.
    """
    walk = {b"\xff\xd8\xff": _jpeg_notes, b"\x89PN": _png_notes, b"RIF": _webp_notes}.get(data[:3])
    places: list[tuple[int, int]] = []
    notes: dict[str, Any] = {}
    exif: list[bytes] = []  # A JPEG continues a long one in another segment.
    try:
        for start, end, name, content in walk(data) if walk else ():
            places.append((start, end))
            if name == "exif":
                exif.append(content.removeprefix(b"Exif\0\0"))
            elif name:
                notes[name] = content
    except struct.error:
        return None, {}
    return places, notes | ({"exif": b"Exif\0\0" + b"".join(exif)} if exif else {})


def _jpeg_notes(data: bytes) -> Iterator[Note]:
    """Yield the comments and application segments of a JPEG (ITU-T T.81, annex B), except those that tell its colors.

    Raises:
        struct.error: If the segments before the scan are unusual.
    """
    start = 2
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, start)
        if fill != 0xFF:
            raise struct.error("no marker")
        if marker == 0xFF:  # Any number of fill bytes may precede a marker.
            start += 1
            continue
        if marker == 0xDA:  # the scan
            return
        end = start + 2 + length
        # JFIF and Adobe tell the color space; libjpeg ignores shorter ones.
        tells_colors = (marker == 0xE0 and length >= 16) or (marker == 0xEE and length >= 14)
        if (0xE0 <= marker <= 0xEF or marker == 0xFE) and not tells_colors:
            name, content = "", b""
            if marker == 0xE1 and data.startswith(b"Exif\0\0", start + 4):
                name, content = "exif", data[start + 4 : end]
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 4):
                name, content = "xmp", data[start + 33 : end]
            yield start, end, name, content
        start = end


def _png_notes(data: bytes) -> Iterator[Note]:
    """Yield the ancillary chunks of a PNG (W3C Portable Network Graphics, section 5), except the transparency."""
    start, known = 8, {""}
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if kind == b"IEND" or not kind.isalpha():
            return
        if kind[0] & 0x20 and kind != b"tRNS":  # The bit marks chunks that are not needed to show the image.
            name, content = _png_name(kind, data[start + 8 : start + 88]), b""
            if name not in known and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end]):
                known.add(name)  # The first one counts: a file may have any number of notes that unpack to 1 MiB.
                content = _png_content(kind, data[start + 8 : end - 4])
            yield start, min(end, len(data)), name if content else "", content
        start = end


def _png_name(kind: bytes, begin: bytes) -> str:
    """Return the name of a chunk in which Pillow looks for an orientation, "" for all others."""
    texts = {b"exif": "exif", b"Raw profile type exif": "Raw profile type exif", b"XML:com.adobe.xmp": "xmp"}
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        return texts.get(begin.partition(b"\0")[0], "")
    return "exif" if kind == b"eXIf" else ""


def _png_content(kind: bytes, body: bytes) -> Any:
    """Return the EXIF or the text of a chunk, of a packed text the first MiB; b"" if it is broken."""
    if kind == b"eXIf":
        return body
    keyword, _, content = body.partition(b"\0")
    packed = kind == b"zTXt" or (kind == b"iTXt" and content[:1] != b"\0")
    if kind == b"iTXt":  # A flag, the method, a language and a translation of the keyword come first.
        content = content[2:].split(b"\0", 2)[-1]
    elif packed:
        content = content[1:]  # without the method
    if packed:
        try:
            content = zlib.decompressobj().decompress(content, MAX_NOTE)
        except zlib.error:
            return b""
    return content.decode("latin-1") if keyword == b"Raw profile type exif" else content


def _webp_notes(data: bytes) -> Iterator[Note]:
    """Yield the profile, EXIF and XMP of a WebP (RFC 9649, section 2.7), and what follows the file's end."""
    flags = data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0  # of the notes that count
    names = {b"ICCP": "", b"EXIF": "exif" if flags & 8 else "", b"XMP ": "xmp" if flags & 4 else ""}
    start = 12
    limit = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while start + 8 <= limit:
        kind, length = struct.unpack_from("<4sI", data, start)
        end = start + 8 + length + length % 2
        if kind in names:
            yield start, min(end, limit), names[kind], data[start + 8 : start + 8 + length] if names[kind] else b""
        start = end
    if limit < len(data):
        yield limit, len(data), "", b""


def cut(data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """Return an image file without its parts at these places; the file itself if there are none."""
    if not places:
        return data
    bounds = [0, *itertools.chain.from_iterable(places), len(data)]
    pieces = [data[start:end] for start, end in zip(bounds[::2], bounds[1::2])]
    if data[:4] == b"RIFF":  # libwebp refuses a file whose header has another size.
        pieces[0] = data[:4] + struct.pack("<I", sum(map(len, pieces)) - 8) + pieces[0][8:]
    return b"".join(pieces)
