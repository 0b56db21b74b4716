"""Images: decoding of untrusted bytes to uint8 tensors, and the transforms of training and evaluation.

Images are uint8 until they are on the device: a quarter of the bytes of float32 between processes. torch's antialiased
resize of uint8 in channels-last layout is also the fastest on a CPU. Normalization runs on the device.
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dualenc.data.image_pixels import ImageError, center_start, decode_pixels, resize_plan, to_pixels
from dualenc.utils.arguments import shown_value
from dualenc.utils.text import quoted, reason
from dualenc.utils.urls import is_remote, shown

# Forms of an image that `open_image` and `dualenc.Embedder` take, for messages.
IMAGE_FORMS = "paths, Pillow images, arrays (H, W, 3) of uint8, tensors (3, H, W), bytes or open files"


def decode_image(data: bytes) -> Tensor:
    """Decode JPEG, PNG or WebP as a viewer shows it; see `decode_pixels`.

    Returns:
        uint8 (3, H, W), stored channels last.

    Raises:
        ImageError: If the format is another, the data is broken, or the header declares more than `MAX_PIXELS` pixels.
    """
    return torch.from_numpy(decode_pixels(data)).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a Pillow image of any mode with a known range to uint8 (3, H, W), stored channels last.

    Raises:
        ImageError: See `to_pixels`.
    """
    return torch.from_numpy(to_pixels(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform and the normalization, stored as `preprocess.json` of a model directory.

    Attributes:
        size: output height and width in pixels.
        mean: mean of each channel, of images in [0, 1].
        std: standard deviation of each channel, of images in [0, 1].
        interpolation: interpolation of the antialiased resize.
        resize: "shortest" resizes the shorter side to `size` and crops the center, "squash" resizes both sides to
            `size`, "longest" resizes the longer side to `size` and pads with black.

    Example:
        >>> import torch
        >>> from dualenc import Preprocess
        >>> preprocess = Preprocess(size=4)
        >>> image = preprocess(torch.full((3, 6, 9), 255, dtype=torch.uint8))
        >>> image.shape, image.dtype
        (torch.Size([3, 4, 4]), torch.uint8)
        >>> preprocess.normalize(image[None])[0, 0, 0]
        tensor([1., 1., 1., 1.])
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash", "longest"] = "shortest"

    def __call__(self, image: Tensor) -> Tensor:
        """Transform uint8 (3, H, W) of any size to uint8 (3, size, size)."""
        height, width = image.shape[-2:]
        center, target = resize_plan(height, width, self.size, self.resize)
        image = center_crop(image, *center)
        return center_crop(resize(image, target, self.interpolation), self.size, self.size)

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalize uint8 (..., 3, S, S) to zero mean and unit standard deviation in each channel, on their device."""
        # In channels-last layout the means are repeated for a whole row: torch would broadcast 3 numbers at a time.
        width = images.shape[-1] if images.stride(-3) == 1 else 1
        mean, std = _channels(self.mean, self.std, width, images.device)
        return images.to(torch.float32, copy=True).sub_(mean).div_(std).to(dtype)


@lru_cache(maxsize=8)
def _channels(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (3, 1, W) in units of uint8, stored channels last.

    They are cached, since each copy to a GPU would wait for the work that runs there.
    """
    mean_std = (torch.tensor([mean, std], dtype=torch.float32) * 255).to(device)
    mean_std = mean_std[:, None].repeat(1, width, 1).mT[:, :, None]  # (2, 3, 1, W)
    return mean_std[0], mean_std[1]


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize an image by antialiased interpolation, as torchvision does.

    Args:
        image: uint8 (3, H, W).
        size: output height and width in pixels.
        mode: "bicubic" or "bilinear".

    Returns:
        uint8 (3, *size), stored channels last, which makes resizing and stacking faster.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    # The image is a batch of one: torch checks all four strides, and takes a slow path if the first is unexpected.
    pixels = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)[0]


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Crop the center of an image (3, H, W); a smaller image is padded with black."""
    rows, columns = max(0, height - image.shape[-2]), max(0, width - image.shape[-1])  # to pad
    if rows or columns:
        image = F.pad(image, [columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2])
    top, left = center_start(image.shape[-2], height), center_start(image.shape[-1], width)
    return image[..., top : top + height, left : left + width]


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Crop an image, and resize the crop by antialiased bicubic interpolation.

    Args:
        image: uint8 (3, H, W).
        box: top, left, height and width of the crop in pixels.
        size: output height and width in pixels.

    Returns:
        uint8 (3, size, size), stored channels last; see `resize`.
    """
    top, left, height, width = box
    return resize(image[:, top : top + height, left : left + width], (size, size))


class Augment(torch.nn.Module):
    """The training transform, from uint8 (3, H, W) to uint8 (3, size, size).

    The default is that of open_clip's training: a random crop, resized by antialiased bicubic interpolation. There is
    no flip, since captions say "left of", and no color jitter, since captions say "red".

    Changes of color are combined into one 3 x 3 matrix (Haeberli 1993, Matrix Operations for Image Processing), which
    is faster than one change after the other, in particular than a conversion to HSV and back.

    Args:
        size: output height and width in pixels.
        scale: smallest and largest area of the crop, as shares of the image's area. For areas above 1 the image is
            first padded with the mean color of its corners.
        flip: probability of a horizontal flip.
        rotate: largest angle of rotation in degrees, in both directions; the corners are filled with their mean color.
        color: strength of the jitter: brightness, contrast and saturation are multiplied by 1 - color to 1 + color.
        hue: largest rotation of the colors about the gray axis, in both directions; 0.5 is half a turn.
        gray: probability of a conversion to gray.
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
        self.margin = (max(1.0, scale[1]) ** 0.5 - 1) / 2  # padding on each side, as a share of the side
        area = (1 + 2 * self.margin) ** 2  # of the padded image
        self.size, self.scale = size, (scale[0] / area, scale[1] / area)
        self.flip, self.rotate, self.color, self.hue, self.gray = flip, rotate, color, hue, gray

    def forward(self, image: Tensor) -> Tensor:
        """Transform uint8 (3, H, W) of any size to uint8 (3, size, size)."""
        if self.margin or self.rotate:
            image = self._pad_and_rotate(image)
        height, width = image.shape[-2:]
        image = resized_crop(image, _crop_box(height, width, self.scale), self.size)
        if self.flip and float(torch.rand(())) < self.flip:
            image = image.flip(-1)
        return self._jitter_colors(image) if self.color or self.hue or self.gray else image

    def _pad_and_rotate(self, image: Tensor) -> Tensor:
        # Imported here, since it takes seconds, and most training and all commands on data do not need it.
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as TF

        height, width = image.shape[-2:]
        fill = image[:, :: max(1, height - 1), :: max(1, width - 1)].float().mean((1, 2)).round().tolist()
        if self.margin:
            x, y = round(self.margin * width), round(self.margin * height)
            image = TF.pad(image, [x, y, x, y], fill=fill)
        if self.rotate:
            angle = float(torch.empty(()).uniform_(-self.rotate, self.rotate))
            shift = torch.tensor(fill)[:, None, None]  # The fill of torchvision leaves a dark seam around the image.
            rotated = TF.rotate(image - shift, angle, InterpolationMode.BILINEAR) + shift
            image = rotated.round().clamp(0, 255).to(torch.uint8)
        return image

    def _jitter_colors(self, image: Tensor) -> Tensor:
        *factors, hue, to_gray = torch.rand(5).tolist()
        brightness, contrast, saturation = (1 + self.color * (2 * draw - 1) for draw in factors)
        saturation = 0.0 if to_gray < self.gray else saturation
        angle = 2 * math.pi * self.hue * (2 * hue - 1)
        about_gray = math.cos(angle) * torch.eye(3) + math.sin(angle) * _CROSS + (1 - math.cos(angle)) * _MEAN
        matrix = brightness * (saturation * torch.eye(3) + (1 - saturation) * _LUMA) @ about_gray
        pixels = image.flatten(1).float()  # (3, H * W)
        mean = float(_LUMA[0] @ matrix @ pixels.mean(1))
        pixels = (contrast * matrix @ pixels).add_((1 - contrast) * mean).round_().clamp_(0, 255)
        return pixels.to(torch.uint8).view(image.shape)


def _crop_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a crop, as torchvision's RandomResizedCrop (Szegedy et al. 2015).

    torchvision takes longer to draw a box than to crop it. Here the random numbers of ten attempts are drawn at once,
    since a call of the generator takes longer than the numbers.
    """
    low, high = 3 / 4, 4 / 3  # width over height
    y, x, *attempts = torch.rand(22).tolist()
    for area, ratio in zip(attempts[::2], attempts[1::2]):
        area = (scale[0] + area * (scale[1] - scale[0])) * height * width
        ratio = low * (high / low) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    # No attempt fits: take the largest center crop with a ratio within the bounds.
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


_LUMA = torch.tensor([[0.299, 0.587, 0.114]]).repeat(3, 1)  # ITU-R BT.601
# Rodrigues' rotation about the gray axis: its cross-product matrix, and the projection onto the axis.
_CROSS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
_MEAN = torch.full((3, 3), 1 / 3)


def thumbnail(image: Tensor, side: int = 160) -> bytes:
    """Encode a uint8 (3, H, W) image as a JPEG, shrunk to fit into a square of `side` pixels."""
    height, width = image.shape[-2:]
    if max(height, width) > side:
        size = (max(1, round(height * side / max(height, width))), max(1, round(width * side / max(height, width))))
        image = resize(image, size)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return simplejpeg.encode_jpeg(pixels, quality=88, colorspace="RGB", colorsubsampling="444")


def open_image(source: Any, name: str = "image") -> Tensor:
    """Open an image of any form as uint8 (3, H, W), as a viewer shows it; see `decode_image` and `to_tensor`.

    Args:
        source: path, bytes or binary file of an encoded image; Pillow image; or array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) uint8 of gray, RGB or RGBA.
        name: noun for the image in messages, if it comes without a path.

    Raises:
        ImageError: If the image cannot be decoded, or is given in another form; the message names the path.
        OSError: If the file cannot be read.
    """
    name = _path_of(source) or name
    try:
        if isinstance(source, Image.Image):
            return _loaded(source)
        if isinstance(source, np.ndarray):
            return to_tensor(Image.fromarray(_pixels(source)))
        return decode_image(_encoded(source))
    except ImageError as error:
        raise ImageError(f"{shown(name)}: {error}") from None


def _loaded(image: Image.Image) -> Tensor:
    """Convert a Pillow image, whose file may not be read yet."""
    try:
        return to_tensor(image)
    except ImageError:
        raise
    except Exception as error:  # as in `decode_image`
        raise ImageError("cannot be loaded", reason(error)) from None


def _path_of(source: Any) -> str:
    """Return the path of an image that is a path, or was opened from one; otherwise ""."""
    path = getattr(source, "filename", None) or getattr(source, "name", None)  # of Pillow; of files
    path = source if isinstance(source, str | os.PathLike) else path
    return os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""


def _encoded(source: Any) -> bytes:
    """Return the bytes of an encoded image that is a path, bytes or a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise ImageError("is a file opened as text", 'open it with the mode "rb"')
        if not data:
            raise ImageError("is an empty file, or one that was read to its end", "rewind it with seek(0)")
        return data
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"cannot be {shown_value(source)}", f"pass {IMAGE_FORMS}")
    path = os.fsdecode(source)
    if is_remote(path):
        raise ImageError("is a URL, which is not downloaded", "pass a local file, or the bytes")
    if not os.path.exists(path):
        raise FileNotFoundError(f"image {quoted(path)} does not exist")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{quoted(path)} is a folder: pass its files, such as Path({path!r}).glob('*.jpg')")
    with open(path, "rb") as file:
        return file.read()


def _pixels(array: np.ndarray) -> np.ndarray:
    """Return an array of pixels in a shape that Pillow takes."""
    shape = " x ".join(map(str, array.shape))
    if array.dtype != np.uint8:
        raise ImageError(f"is an array of {array.dtype}", "scale it to 0 to 255 and convert it to uint8")
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        first = "transpose it, " if array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"is an array of {shape}", f"{first}the colors come last: (H, W, 3), (H, W, 4) or (H, W)")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError(f"is an array of {shape}", "an image is (H, W, 3), (H, W, 4) or (H, W)")
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
