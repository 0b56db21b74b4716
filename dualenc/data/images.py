"""Pictures: bytes from strangers to uint8 tensors, and the transform that evaluation uses.

Everything up to the device is uint8: a quarter of the bytes of float32 between processes, and torch's antialiased
resize on uint8 in channels-last layout is the fastest there is on a CPU. Normalization happens on the device.
"""

import io
import math
import struct
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 1 << 27  # 134 million: above any photo, below what a header can claim to exhaust memory


LONG = 50  # times the shorter side: more of a picture is cut off before it is resized


class ImageError(ValueError):
    """A picture that cannot be decoded, or must not be.

    Attributes:
        cause: what is wrong, alike for all pictures that have it.
        detail: more of it, for this one.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause, self.detail = cause, detail


def decode_image(data: bytes) -> Tensor:
    """Decodes JPEG, PNG or WebP to what a viewer shows: RGB, upright, on white where it is transparent.

    Returns:
        uint8 (3, H, W), stored channels last.

    Raises:
        ImageError: other formats, broken data, or more than `MAX_PIXELS` pixels by the header.
    """
    if data[:3] == b"\xff\xd8\xff" and _upright(data):
        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(data)
            if int(height) * int(width) <= MAX_PIXELS and color in ("YCbCr", "Gray", "RGB"):
                return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
        except ValueError:  # rare but valid JPEGs, and broken ones: Pillow decides which
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, where MAX_PIXELS is the bound; of broken tags
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                return to_tensor(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # beyond Pillow's own bound, which is above MAX_PIXELS
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("cannot be decoded as JPEG, PNG or WebP") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on broken data
        raise ImageError("cannot be decoded", f"{type(error).__name__}: {error}") from error


def _upright(data: bytes) -> bool:
    """Whether a JPEG has no tag that turns it: simplejpeg knows nothing of them."""
    turn = _orientation(data)
    if turn is not None:
        return turn == 1
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # as below; the decoder will say what is wrong
        return False


def _orientation(data: bytes) -> int | None:
    """The EXIF tag that turns a JPEG; 1 where there is none.

    None for whatever is out of the ordinary: Pillow knows more, but may take longer to open a picture than simplejpeg
    to decode it. A JPEG begins with segments (ITU-T T.81, annex B); that of EXIF is laid out as TIFF 6.0, section 2:
    a header, then a directory of entries of 12 bytes.
    """
    start, found = 2, None
    try:
        while True:  # ends with the scan at the latest, or the data
            fill, marker, length = struct.unpack_from(">BBH", data, start)
            if fill != 0xFF or marker == 0xFF:
                return None
            if marker == 0xDA:
                return 1
            if marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
                break
            start += 2 + length
        segment = data[start + 10 : start + 2 + length]
        order = {b"II*\0": "<", b"MM\0*": ">"}[segment[:4]]
        (directory,) = struct.unpack_from(f"{order}I", segment, 4)
        (entries,) = struct.unpack_from(f"{order}H", segment, directory)
        for entry in range(entries):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", segment, directory + 2 + 12 * entry)
            if tag == ExifTags.Base.Orientation:
                if found is not None or (kind, count) != (3, 1):  # 3: a number of 16 bits
                    return None
                found = value
    except (struct.error, KeyError):  # leads out of the data, or has no such header
        return None
    return 1 if found is None and b"tiff:Orientation" not in data else found


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow image as uint8 (3, H, W), stored channels last; see `decode_image`."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels", f"{image.width} x {image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3
    ).permute(2, 0, 1)  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform and the normalization: what `preprocess.json` of a model directory holds.

    Attributes:
        size: output height and width in pixels.
        mean, std: by channel, of images in [0, 1].
        interpolation: of the antialiased resize.
        resize: the shorter side to `size` and the middle cut out ("shortest"), both sides to `size` ("squash"), or the
            longer side to `size` on a black ground ("longest").
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash", "longest"] = "shortest"

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) of any size to uint8 (3, size, size)."""
        height, width = image.shape[-2:]
        if self.resize == "shortest" and max(height, width) > LONG * min(height, width):
            # Only a square of the middle is seen: a line of 1 x 20,000 would else become one of 224 x 4,480,000.
            image = center_crop(image, min(height, LONG * width), min(width, LONG * height))
            height, width = image.shape[-2:]
        if self.resize == "squash":
            target = (self.size, self.size)
        else:
            side = (max if self.resize == "longest" else min)(height, width)
            # torchvision, and so open_clip, cuts the fraction off where the shorter side is given
            whole = round if self.resize == "longest" else int
            target = (max(1, whole(height * self.size / side)), max(1, whole(width * self.size / side)))
        return center_crop(resize(image, target, self.interpolation), self.size, self.size)

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (..., 3, S, S) to `dtype`, zero mean and unit deviation by channel; on the images' device."""
        # Channels last, a whole row of means beside a row of pixels: torch would else go along 3 numbers at a time.
        width = images.shape[-1] if images.stride(-3) == 1 else 1
        mean, std = _channels(self.mean, self.std, width, images.device)
        return images.to(torch.float32, copy=True).sub_(mean).div_(std).to(dtype)


@lru_cache(maxsize=8)
def _channels(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, W) in units of uint8, stored channels last; kept, since a copy to a GPU waits for what
    runs there.
    """
    mean_std = (torch.tensor([mean, std], dtype=torch.float32) * 255).to(device)
    mean_std = mean_std[:, None].repeat(1, width, 1).mT[:, :, None]  # (2, 3, 1, W)
    return mean_std[0], mean_std[1]


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Return an image resized by antialiased interpolation, as torchvision resizes it.

    Args:
        image: uint8 (3, H, W).
        size: output height and width in pixels.
        mode: "bicubic" or "bilinear".

    Returns:
        uint8 (3, *size), stored channels last: both this and any stacking is then faster.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    # One image of a batch: torch looks at all four strides, and takes the slow way if the first is not what it should.
    pixels = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)[0]


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Return the middle of an image (3, H, W); where that is smaller, it is set on black."""
    below, beside = max(0, height - image.shape[-2]), max(0, width - image.shape[-1])
    if below or beside:
        image = F.pad(image, [beside // 2, (beside + 1) // 2, below // 2, (below + 1) // 2])
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """A part of an image, resized by antialiased bicubic interpolation.

    Args:
        image: uint8 (3, H, W).
        box: top, left, height and width of the part in pixels.
        size: output height and width in pixels.

    Returns:
        uint8 (3, size, size), stored channels last: both this and any stacking is then faster.
    """
    top, left, height, width = box
    return resize(image[:, top : top + height, left : left + width], (size, size))


class Augment(torch.nn.Module):
    """The training transform: uint8 (3, H, W) to uint8 (3, size, size).

    By default what open_clip trains with, a crop resized by antialiased bicubic interpolation and nothing else: no
    flip, since captions say "left of", and no colors, since they say "red".

    Args:
        size: output height and width in pixels.
        scale: least and largest area of the crop as shares of the picture's. Above 1, the picture is first set on a
            ground of the color of its corners, and so shown smaller.
        flip: share of the pictures that are mirrored.
        rotate: largest angle in degrees, either way; what comes in from outside has the color of the corners.
        color: brightness, contrast and saturation are multiplied by up to 1 + color, and down to 1 - color.
        hue: largest turn of all colors about the gray axis, either way; 0.5 is half a turn.
        gray: share of the pictures that lose their color.

    All changes of color are one 3 x 3 matrix (Haeberli 1993, Matrix Operations for Image Processing): faster than one
    after the other, above all than a conversion to HSV and back.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.9, 1.0),
        flip: float = 0.0,
        rotate: float = 0.0,
        color: float = 0.0,
        hue: float = 0.0,
        gray: float = 0.0,
    ) -> None:
        super().__init__()
        self.margin = (max(1.0, scale[1]) ** 0.5 - 1) / 2  # on each side, so that the whole has the largest area
        whole = (1 + 2 * self.margin) ** 2
        self.size, self.scale = size, (scale[0] / whole, scale[1] / whole)
        self.flip, self.rotate, self.color, self.hue, self.gray = flip, rotate, color, hue, gray

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) of any size to uint8 (3, size, size)."""
        if self.margin or self.rotate:
            image = self._on_ground(image)
        height, width = image.shape[-2:]
        image = resized_crop(image, _crop_box(height, width, self.scale), self.size)
        if self.flip and float(torch.rand(())) < self.flip:
            image = image.flip(-1)
        return self._recolored(image) if self.color or self.hue or self.gray else image

    def _on_ground(self, image: Tensor) -> Tensor:
        # Here, since most training and all commands on data do without it, and it takes seconds to import.
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as TF

        height, width = image.shape[-2:]
        ground = image[:, :: max(1, height - 1), :: max(1, width - 1)].float().mean((1, 2)).round().tolist()
        if self.margin:
            x, y = round(self.margin * width), round(self.margin * height)
            image = TF.pad(image, [x, y, x, y], fill=ground)
        if self.rotate:
            angle = float(torch.empty(()).uniform_(-self.rotate, self.rotate))
            shift = torch.tensor(ground)[:, None, None]  # torchvision's own fill leaves a dark seam around the picture
            turned = TF.rotate(image - shift, angle, InterpolationMode.BILINEAR) + shift
            image = turned.round().clamp(0, 255).to(torch.uint8)
        return image

    def _recolored(self, image: Tensor) -> Tensor:
        *factors, turn, lose = torch.rand(5).tolist()
        brightness, contrast, saturation = (1 + self.color * (2 * draw - 1) for draw in factors)
        saturation = 0.0 if lose < self.gray else saturation
        angle = 2 * math.pi * self.hue * (2 * turn - 1)
        about_gray = math.cos(angle) * torch.eye(3) + math.sin(angle) * _CROSS + (1 - math.cos(angle)) * _MEAN
        matrix = brightness * (saturation * torch.eye(3) + (1 - saturation) * _LUMA) @ about_gray
        pixels = image.flatten(1).float()  # (3, H * W)
        mean = float(_LUMA[0] @ matrix @ pixels.mean(1))
        pixels = (contrast * matrix @ pixels).add_((1 - contrast) * mean).round_().clamp_(0, 255)
        return pixels.to(torch.uint8).view(image.shape)


def _crop_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, as torchvision's RandomResizedCrop has them (Szegedy et al. 2015).

    Ours, since torchvision takes longer to draw a box than to cut it out. All numbers that ten tries may want are drawn
    at once: a call of the generator takes longer than they do.
    """
    low, high = 3 / 4, 4 / 3  # width over height
    y, x, *tries = torch.rand(22).tolist()
    for area, ratio in zip(tries[::2], tries[1::2]):
        area = (scale[0] + area * (scale[1] - scale[0])) * height * width
        ratio = low * (high / low) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    # The largest part of the middle that has a ratio within the bounds.
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


_LUMA = torch.tensor([[0.299, 0.587, 0.114]]).repeat(3, 1)  # ITU-R BT.601
# Rodrigues' rotation about the axis of grays: its cross-product matrix, and the projection onto it.
_CROSS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
_MEAN = torch.full((3, 3), 1 / 3)


def thumbnail(image: Tensor, side: int = 160) -> bytes:
    """A uint8 (3, H, W) picture as a JPEG that fits into a square of `side` pixels; a smaller one keeps its size."""
    height, width = image.shape[-2:]
    if max(height, width) > side:
        size = (max(1, round(height * side / max(height, width))), max(1, round(width * side / max(height, width))))
        image = resize(image, size)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return simplejpeg.encode_jpeg(pixels, quality=88, colorspace="RGB", colorsubsampling="444")


def open_image(source: Any) -> Tensor:
    """A path or a Pillow image as uint8 (3, H, W).

    Raises:
        ImageError: the picture cannot be decoded; names the path.
    """
    if isinstance(source, Image.Image):
        return to_tensor(source)
    try:
        with open(source, "rb") as file:
            return decode_image(file.read())
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from None
