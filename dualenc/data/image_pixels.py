"""Pixels of untrusted image files as arrays: decoding within limits, and the sizes of the evaluation transform.

It needs Pillow and numpy, not torch, so that a service can run exported models without torch.
"""

import io
import typing
import warnings
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from dualenc.data.image_notes import cut, find_notes

MAX_PIXELS = 1 << 27  # 134 million: more than any photo has, less than a header may claim to exhaust memory
MAX_ASPECT = 50  # largest ratio of the sides that is resized; longer images are cropped first


class ImageError(ValueError):
    """The error of an image that cannot be decoded, or must not be.

    Attributes:
        cause: the problem, in the same words for all images that have it.
        detail: details of this image.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause, self.detail = cause, detail


def decode_pixels(data: bytes) -> np.ndarray:
    """Decode JPEG, PNG or WebP as a viewer shows it: RGB, upright, and on white where it is transparent.

    Notes of a file (color profiles, XMP, texts, previews, later frames of an animated PNG) change no pixel. They are
    neither unpacked nor checked, so that a large or broken note does not refuse the image. Only the orientation is read
    from them. If it cannot be read, the image stays as stored.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ImageError: If the format is another, the data is broken, or the header declares more than `MAX_PIXELS` pixels.
    """
    places, notes = find_notes(data)
    if data[:3] == b"\xff\xd8\xff" and places is not None and _is_upright(notes):
        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(data)
            if int(height) * int(width) <= MAX_PIXELS and color in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:  # Rare valid JPEGs fail too, not only broken ones: Pillow decides.
            pass
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, which MAX_PIXELS limits, and of broken tags.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(cut(data, places or [])), formats=("JPEG", "PNG", "WEBP")) as image:
                image.info.update(notes)
                return to_pixels(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit is above MAX_PIXELS.
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("cannot be decoded as JPEG, PNG or WebP") from None
    except Exception as error:  # Pillow's decoders raise nearly any error on broken data.
        raise ImageError("cannot be decoded", f"{type(error).__name__}: {error}") from error


def _is_upright(notes: dict[str, Any]) -> bool:
    """Return whether no note tells that the image is rotated, which simplejpeg would ignore."""
    image = Image.Image()
    image.info.update(notes)
    return not notes or _orientation(image) not in _TO_UPRIGHT


def _orientation(image: Image.Image) -> int:
    """Return the orientation in the EXIF or XMP of a loaded image; 1, upright, if there is none or it is broken."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of broken tags.
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly any error on broken notes, which cannot refuse the image.
        return 1


def to_pixels(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode with a known range to uint8 (H, W, 3), which may be changed.

    The image becomes upright, and is put on white where it is transparent; see `decode_pixels`. 16-bit gray is scaled
    to 8 bits.

    Raises:
        ImageError: If the image has too many pixels, or the mode is I or F, for which Pillow has no range: the same
            values may mean 0 to 1, 0 to 255 or 0 to 65,535.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels", f"{image.width} x {image.height}")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"has Pillow's mode {image.mode}, whose range is not defined",
            "scale the values to 0 to 255 and convert to mode L, or to 0 to 65,535 and to mode I;16",
        )
    shown = _on_white(image)
    method = _TO_UPRIGHT.get(_orientation(image))
    shown = shown if method is None else shown.transpose(method)
    return np.frombuffer(bytearray(shown.tobytes()), np.uint8).reshape(shown.height, shown.width, 3)


_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _on_white(image: Image.Image) -> Image.Image:
    """Load an image, and return it as RGB, on white where it is transparent.

    A PNG declares its transparent color in the units of the file, and Pillow leaves it so. But it scales gray of 2 and
    4 bits to 8, and keeps the high bytes of colors of 16 bits.
    """
    color, stored = image.info.get("transparency"), _raw_mode(image)
    opaque = _opaque_16(image) if color is not None and stored == "RGB;16B" else None  # (H, W) bool
    image.load()
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips to 255.
        gray = np.asarray(image)
        opaque = gray != color if isinstance(color, int) else None
        image = Image.fromarray((gray / 257).round().astype(np.uint8))
    elif isinstance(color, int) and stored in ("L;2", "L;4"):
        image = image.copy()
        image.info["transparency"] = color * (85 if stored == "L;2" else 17)
    elif image.mode == "La":  # Pillow converts premultiplied gray to LA only.
        image = image.convert("LA")
    if opaque is not None:
        image = image.convert("RGB")
        image.info.pop("transparency", None)
        image.putalpha(Image.fromarray(opaque))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Return the layout of pixels in the file of a PNG that is not loaded yet, as Pillow names it; otherwise ""."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0].args) if image.format == "PNG" and tiles else ""


def _opaque_16(image: Image.Image) -> np.ndarray:
    """Compare the colors of a PNG of 16 bits a channel with its transparent one, (H, W): True where they differ.

    Pillow keeps only the high byte of a color. Read in the other byte order, the same file gives the low byte.
    """
    file = typing.cast(Any, image).fp
    place = file.tell()
    file.seek(0)
    low = typing.cast(Any, Image.open(file, formats=("PNG",)))
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    colors = np.asarray(low).astype(np.uint16)  # (H, W, 3)
    file.seek(place)
    colors += np.asarray(image).astype(np.uint16) << 8
    return (colors != np.array(image.info["transparency"])).any(-1)


def resize_plan(height: int, width: int, size: int, resize: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the sizes through which an image goes before the center crop to `size`; see `Preprocess`.

    Args:
        height, width: height and width of the image in pixels.
        size: output height and width in pixels.
        resize: "shortest", "squash" or "longest".

    Returns:
        Height and width of the center that is used, and those to which it is resized.
    """
    if resize == "squash":
        return (height, width), (size, size)
    if resize == "shortest" and max(height, width) > MAX_ASPECT * min(height, width):
        # Only the center square is used. Otherwise an image of 1 x 20,000 would be resized to 224 x 4,480,000.
        height, width = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    side = (max if resize == "longest" else min)(height, width)
    # torchvision, and so open_clip, rounds down where the shorter side is given.
    to_int = round if resize == "longest" else int
    return (height, width), (max(1, to_int(height * size / side)), max(1, to_int(width * size / side)))


def center_start(length: int, wanted: int) -> int:
    """Return the first pixel of the center of a side; negative if more pixels are wanted than the side has."""
    return round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)
