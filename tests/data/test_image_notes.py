"""Notes in image files, transparency of every depth, and Pillow's modes."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from helpers import encode, pixels, smooth
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from dualenc.data import ImageError, decode_image
from dualenc.data.image_notes import cut, find_notes
from dualenc.data.images import to_tensor

XMP = b"XML:com.adobe.xmp"
PROFILE = b"Raw profile type exif"


def chunk(kind, data=b"", crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def segment(marker, data=b""):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def riff(kind, data):
    return struct.pack("<4sI", kind, len(data)) + data + bytes(len(data) % 2)


def itxt(keyword, text, packed=False):
    return keyword + (b"\0\1\0\0\0" + zlib.compress(text) if packed else b"\0\0\0\0\0" + text)


def exif(orientation, prefix=b""):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return prefix + tags.tobytes().removeprefix(b"Exif\0\0")


def raw_profile(orientation):
    data = exif(orientation, b"Exif\0\0")
    return f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()


def xmp(orientation):
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def with_chunk(data, *extra, last=False):
    """Return a PNG with chunks after its header, or before its end."""
    place = len(data) - 12 if last else 33
    return data[:place] + b"".join(extra) + data[place:]


def with_segment(data, *extra):
    return data[:2] + b"".join(extra) + data[2:]


def with_riff(data, *extra):
    """Return a WebP with the chunks of `Image.save` in other contents: profile, EXIF and XMP behind the image."""
    body = data[12:] + b"".join(extra)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


BIG = 3 << 20
PNG_NOTES = {
    "large profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(BIG))),
    "profile by another method": chunk(b"iCCP", b"x\0\7" + zlib.compress(b"x")),
    "profile without a name": chunk(b"iCCP", b""),
    "large packed text": chunk(b"zTXt", b"Raw profile type xmp\0\0" + zlib.compress(bytes(BIG))),
    "text by another method": chunk(b"zTXt", b"Comment\0\7abc"),
    "large packed XMP": chunk(b"iTXt", itxt(XMP, bytes(BIG), packed=True)),
    "broken packed XMP": chunk(b"iTXt", XMP + b"\0\1\0\0\0abc"),
    "large text": chunk(b"tEXt", b"Comment\0" + b"a" * 70_000_000),
    "broken EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF of nothing": chunk(b"eXIf"),
    "EXIF that is no EXIF": chunk(b"eXIf", os.urandom(99)),
    "raw profile of no digits": chunk(b"tEXt", PROFILE + b"\0\nexif\n  8\nhello\n"),
    "damaged text": chunk(b"tEXt", b"Comment\0abc", crc=1),
    "damaged EXIF": chunk(b"eXIf", exif(6), crc=1),
    "short gamma": chunk(b"gAMA", b"\1"),
    "short chromaticities": chunk(b"cHRM", b"\1"),
    "short sRGB": chunk(b"sRGB"),
    "short size": chunk(b"pHYs", b"\1"),
    "gamma of a camera": chunk(b"gAMA", struct.pack(">I", 100_000)),
    "short animation": chunk(b"acTL", b"\1"),
    "unordered frames": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I", 7) + bytes(22)),
    "private": chunk(b"prVt", os.urandom(100)),
}
JPEG_NOTES = {
    "large profile": b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, 60]) + bytes(65_000)) for i in range(60)),
    "short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "short pictures": segment(0xE2, b"MPF\0II"),
    "large comment": segment(0xFE, bytes(65_533)) * 80,
    "broken EXIF": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "EXIF of nothing": segment(0xE1, b"Exif\0\0"),
    "EXIF that is no EXIF": segment(0xE1, b"Exif\0\0" + os.urandom(99)),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)),
}
WEBP_NOTES = {
    "large profile": riff(b"ICCP", bytes(BIG)),
    "large XMP": riff(b"XMP ", bytes(BIG)),
    "broken EXIF": riff(b"EXIF", b"MM\0*\xff\xff\xff\xff"),
    "EXIF of nothing": riff(b"EXIF", b""),
    "truncated XMP": riff(b"XMP ", bytes(900))[:-300],
    "much too long XMP": struct.pack("<4sI", b"XMP ", 0xFFFFFFFF),
}


@pytest.fixture
def picture(seed):
    return smooth(np.random.default_rng(seed), 18, 26)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("note", PNG_NOTES)
def test_a_note_changes_no_pixel_of_a_png(picture, note, last):
    noted = with_chunk(encode(picture), PNG_NOTES[note], last=last)
    assert np.array_equal(decode_image(noted).permute(1, 2, 0).numpy(), picture)


@pytest.mark.parametrize("note", JPEG_NOTES)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_note_changes_no_pixel_of_a_jpeg(picture, note, mode):
    """simplejpeg decodes the first of each pair, Pillow the rotated one and CMYK."""
    plain = encode(Image.fromarray(picture).convert(mode), "jpeg")
    assert torch.equal(decode_image(with_segment(plain, JPEG_NOTES[note])), decode_image(plain))
    if "EXIF" not in note:
        rotation = segment(0xE1, b"Exif\0\0" + exif(6))
        rotated = decode_image(with_segment(plain, rotation))
        assert torch.equal(decode_image(with_segment(plain, JPEG_NOTES[note], rotation)), rotated)
        assert rotated.shape == (3, 26, 18)


@pytest.mark.parametrize("note", WEBP_NOTES)
@pytest.mark.parametrize("lossless", [True, False])
def test_a_note_changes_no_pixel_of_a_webp(picture, note, lossless):
    plain = encode(picture, "webp", lossless=lossless)
    extended = encode(picture, "webp", lossless=lossless, xmp=b"x")  # with the header that notes need
    for data in (with_riff(extended, WEBP_NOTES[note]), extended, extended + b"\0" * 99):
        assert torch.equal(decode_image(data), decode_image(plain))


def test_the_end_of_a_file_may_be_missing_in_a_note(picture):
    expected = decode_image(encode(picture))
    whole = with_chunk(encode(picture), chunk(b"tEXt", b"Comment\0" + bytes(200)), last=True)
    assert torch.equal(decode_image(whole[:-100]), expected)
    with pytest.raises(ImageError):  # the control: the pixels themselves are not complete
        decode_image(whole[: -400 - 12])


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_orientation_is_found_in_every_note(picture, orientation):
    """The notes are the same that Pillow reads, beside others that it refuses."""
    png, jpeg = encode(picture), encode(picture, "jpeg")
    webp = encode(picture, "webp", lossless=True, exif=exif(1))
    files = [
        with_chunk(png, chunk(b"eXIf", exif(orientation))),
        with_chunk(png, chunk(b"eXIf", exif(orientation)), last=True),
        with_chunk(png, chunk(b"tEXt", PROFILE + b"\0" + raw_profile(orientation))),
        with_chunk(png, chunk(b"zTXt", PROFILE + b"\0\0" + zlib.compress(raw_profile(orientation)))),
        with_chunk(png, chunk(b"tEXt", b"exif\0" + exif(orientation, b"Exif\0\0"))),
        with_chunk(png, chunk(b"iTXt", itxt(XMP, xmp(orientation)))),
        with_chunk(png, chunk(b"iTXt", itxt(XMP, xmp(orientation), packed=True)), last=True),
        with_segment(jpeg, segment(0xE1, b"Exif\0\0" + exif(orientation))),
        with_segment(jpeg, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation))),
        encode(picture, "webp", lossless=True, exif=exif(orientation)),
        encode(picture, "webp", lossless=True, xmp=xmp(orientation)),
    ]
    for i, data in enumerate(files):
        plain = decode_image({b"\x89": png, b"\xff": jpeg}.get(data[:1], webp)).permute(1, 2, 0).numpy()
        upright = np.rot90(plain, 2 if orientation == 3 else -1)
        found = decode_image(data).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - upright).max() <= (2 if data[:1] == b"\xff" else 0), i
        assert np.abs(found[:18, :18].astype(int) - plain[:18, :18]).mean() > 2  # the control
        if data[:1] == b"\x89":
            refused = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(BIG)))
            assert np.array_equal(decode_image(with_chunk(data, refused)).permute(1, 2, 0).numpy(), upright)
    # The first MiB of a packed XMP is read, in which the orientation is.
    large = with_chunk(png, chunk(b"iTXt", itxt(XMP, xmp(orientation) + bytes(BIG), packed=True)))
    assert np.array_equal(
        decode_image(large).permute(1, 2, 0).numpy(), np.rot90(picture, 2 if orientation == 3 else -1)
    )


def test_notes_of_a_webp_count_only_where_its_header_says_so(picture):
    data = bytearray(encode(picture, "webp", lossless=True, exif=exif(6)))
    assert decode_image(bytes(data)).shape == (3, 26, 18)
    data[20] &= ~8  # RFC 9649, section 2.7.1
    assert decode_image(bytes(data)).shape == (3, 18, 26)


def test_exif_of_several_segments_is_read_as_one(picture):
    tags = Image.Exif()
    tags[0x010E] = "a" * 70_000  # a description longer than a segment
    tags[0x0112] = 6
    content = tags.tobytes().removeprefix(b"Exif\0\0")
    parts = [segment(0xE1, b"Exif\0\0" + content[i : i + 60_000]) for i in range(0, len(content), 60_000)]
    assert len(parts) == 2
    assert decode_image(with_segment(encode(picture, "jpeg"), *parts)).shape == (3, 26, 18)


def test_an_animation_shows_its_first_frame(seed):
    frames = [Image.fromarray(pixels(np.random.default_rng((seed, i)), 9, 7)) for i in range(3)]
    for default in (False, True):
        data = encode(frames[0], save_all=True, append_images=frames[1:], default_image=default, duration=40)
        assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), np.asarray(frames[0]))


def test_notes_are_not_unpacked(picture):
    """A note of 64 MiB takes no memory, whether or not it may tell the orientation."""
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(4)) + packer.flush()
    for note in (chunk(b"zTXt", b"Comment\0\0" + bomb), chunk(b"zTXt", PROFILE + b"\0\0" + bomb),
                 chunk(b"iTXt", XMP + b"\0\1\0\0\0" + bomb), chunk(b"iCCP", b"x\0\0" + bomb)):  # fmt: skip
        data = with_chunk(encode(picture), note)
        tracemalloc.start()
        assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), picture)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(bomb) + (8 << 20)


def test_of_many_notes_one_is_unpacked(picture, monkeypatch):
    """A small file may hold thousands of notes of 1 MiB, and a JPEG thousands of parts of an EXIF."""
    calls, unpack = [], zlib.decompressobj
    note = chunk(b"zTXt", PROFILE + b"\0\0" + zlib.compress(raw_profile(6) + bytes(BIG)))
    data = with_chunk(encode(picture), *[note] * 50)
    monkeypatch.setattr(zlib, "decompressobj", lambda: calls.append(1) or unpack())
    assert decode_image(data).shape == (3, 18, 26)  # Zeros are no digits, so this profile is broken.
    assert len(calls) == 1
    parts = [exif(6)[i : i + 1] for i in range(len(exif(6)))]
    jpeg = with_segment(encode(picture, "jpeg"), *(segment(0xE1, b"Exif\0\0" + part) for part in parts))
    assert decode_image(jpeg).shape == (3, 26, 18)


def test_fill_bytes_between_segments(picture):
    """T.81, B.1.1.2: any marker may be preceded by any number of bytes 0xFF."""
    plain = encode(picture, "jpeg")
    filled = with_segment(
        plain, b"\xff" * 7, segment(0xE2, b"ICC_PROFILE\0"), b"\xff", segment(0xE1, b"Exif\0\0" + exif(6))
    )
    assert decode_image(filled).shape == (3, 26, 18)
    assert torch.equal(decode_image(with_segment(plain, b"\xff" * 7)), decode_image(plain))


def test_a_file_with_nothing_to_leave_out_is_not_copied(picture):
    for kind in ("png", "webp", "jpeg"):
        data = encode(picture, kind)
        assert find_notes(data) == ([], {})
        assert cut(data, []) is data


def test_pixels_are_still_capped_and_pillow_is_left_as_it_was(picture):
    def state():
        png, file = PngImagePlugin, ImageFile
        return (png.MAX_TEXT_CHUNK, png.MAX_TEXT_MEMORY, file.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS,
            list(warnings.filters))  # fmt: skip

    before = state()
    for note in PNG_NOTES.values():
        if len(note) < 1 << 20:
            header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
            bomb = b"\x89PNG\r\n\x1a\n" + header + note + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")
            with pytest.raises(ImageError, match="pixels"):
                decode_image(bomb)
            decode_image(with_chunk(encode(picture), note))
    assert state() == before
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):  # the control: Pillow refuses the picture of the first note
        Image.open(io.BytesIO(with_chunk(encode(picture), PNG_NOTES["large packed text"])))


# Transparency


def png(values, depth, key):
    """Write (H, W) gray or (H, W, 3) colors of this depth, with the transparent one in units of the file."""
    height, width = values.shape[:2]
    if depth < 8:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -depth:].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in values]
    kind = 2 if values.ndim == 3 else 0
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        + chunk(b"tRNS", np.atleast_1d(key).astype(">u2").tobytes())
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND")
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_value_is_white_at_every_depth(seed, depth, channels):
    if channels == 3 and depth < 8:
        pytest.skip("PNG has no such colors")
    rng = np.random.default_rng(seed)
    shape, most = (11, 13, 3)[: 1 + channels // 2 + 1], (1 << depth) - 1
    for key in {0, 1, most // 3, most - 1, most}:
        values = rng.integers(0, most + 1, shape)
        values[:4] = key
        if depth == 16:  # Values that share one of their bytes with the transparent one are opaque.
            values[4], values[5] = key ^ 1, key ^ 256
        transparent = (values == key).all(-1, keepdims=True) if channels == 3 else (values == key)[..., None]
        seen = values[..., None] if channels == 1 else values
        expected = np.where(transparent, 255, seen / most * 255) + np.zeros(3)
        data = png(values, depth, np.full(channels, key))
        for image in (decode_image(data), to_tensor(Image.open(io.BytesIO(data)))):
            found = image.permute(1, 2, 0).numpy()
            assert (found[transparent[..., 0]] == 255).all()
            assert np.abs(found - expected).max() <= 1, key
    assert expected.min() < 128  # the control: something is not white


def test_the_file_of_an_image_that_pillow_opened_stays_open(seed, tmp_path):
    values = np.random.default_rng(seed).integers(0, 1 << 16, (6, 5, 3))
    (tmp_path / "a.png").write_bytes(png(values, 16, values[2, 3]))
    with Image.open(tmp_path / "a.png") as image:
        found = to_tensor(image)
        assert found[:, 2, 3].tolist() == [255, 255, 255]
        assert np.array_equal(np.asarray(image), values >> 8)
        assert torch.equal(to_tensor(Image.open(tmp_path / "a.png")), found)


# Pillow's modes


def lab(image):
    srgb, profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, profile, "RGB", "LAB"))


@pytest.mark.parametrize(
    ("mode", "most"),
    [("RGB", 0), ("RGBA", 0), ("RGBX", 0), ("RGBa", 0), ("CMYK", 0), ("YCbCr", 3), ("HSV", 4), ("LAB", 8)],
)
def test_every_mode_of_colors_is_itself(picture, mode, most):
    color = Image.fromarray(picture)
    image = lab(color) if mode == "LAB" else color.convert("RGBA" if mode == "RGBa" else mode).convert(mode)
    assert image.mode == mode
    difference = np.abs(to_tensor(image).permute(1, 2, 0).numpy().astype(int) - picture)
    assert difference.mean() <= most  # LAB has 8 bits a channel too, which are far apart for saturated colors


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_gray_is_itself(seed, mode):
    gray = pixels(np.random.default_rng(seed), 9, 7)[..., 0]
    gray = np.where(gray > 127, 255, 0).astype(np.uint8) if mode == "1" else gray
    if mode.startswith("I;16"):
        order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
        image = Image.frombytes(mode, (7, 9), (gray.astype(np.uint16) * 257).astype(order).tobytes())
    else:
        image = Image.fromarray(gray)
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert image.mode == mode
    assert np.array_equal(to_tensor(image).permute(1, 2, 0).numpy(), gray[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_opacity_is_on_white(seed, mode):
    gray = Image.fromarray(pixels(np.random.default_rng(seed), 9, 7)[..., 0])
    image = gray.convert("P").convert("PA") if mode == "PA" else gray.convert("RGBA" if "RGB" in mode else "LA")
    opacity = pixels(np.random.default_rng(seed + 1), 9, 7)[..., 0]
    opacity[0], opacity[1] = 0, 255
    image.putalpha(Image.fromarray(opacity))
    image = image.convert(mode)
    assert image.mode == mode
    share = opacity[..., None] / 255
    expected = np.asarray(gray.convert("RGB")) * share + 255 * (1 - share)
    found = to_tensor(image).permute(1, 2, 0).numpy()
    assert (found[0] == 255).all()
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(seed, mode):
    """The same numbers may mean 0 to 1, 0 to 255 or 0 to 65,535, and Pillow's own conversion turns most to white."""
    gray = pixels(np.random.default_rng(seed), 9, 7)[..., 0]
    image = Image.fromarray(gray.astype(np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    with pytest.raises(ImageError, match=f"mode {mode}, .*mode L"):
        to_tensor(image)
    # The way out that the message names.
    assert np.array_equal(to_tensor(image.convert("L"))[0].numpy(), gray)
    wide = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert np.array_equal(to_tensor(wide)[0].numpy(), gray)
