"""Images in all forms that Python users pass, as batches for a model."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualenc.data.images import IMAGE_FORMS, ImageError, Preprocess, open_image
from dualenc.data.pairs import Pairs, decode_sample
from dualenc.data.shards.index import Sample
from dualenc.inference.open_clip import OpenClipTransform
from dualenc.utils.arguments import shown_value
from dualenc.utils.errors import warn_once

Track = Callable[[Iterable[Any]], Iterable[Any]]


def image_batches(
    images: Any, preprocess: Preprocess | OpenClipTransform, batch_size: int, track: Track = iter
) -> Iterator[Tensor]:
    """Yield batches of images: uint8 (B, 3, H, W) of any size, or normalized (B, 3, S, S).

    Args:
        images: one image, a batch, or an iterable of these, as `dualenc.Embedder.embed_images` takes them.
        preprocess: preprocessing of single images.
        batch_size: number of images in a batch of single ones; batches are yielded as they come.
        track: wraps the loop over the images, for a progress bar.

    Raises:
        ImageError: If an image cannot be read, or has another form.
    """
    waiting: list[Tensor] = []  # single images of one type
    for number, item in enumerate(_items(images, batch_size, track)):
        image = _tensor(item, f"image {number}")
        _check(image, preprocess, f"image {number}")
        if image.dim() == 3 and not image.is_floating_point():
            image = preprocess(image)
        # torch.stack would mix pixels and normalized values, and a batch must not overtake the images before it.
        if waiting and (image.dim() == 4 or image.dtype != waiting[0].dtype or len(waiting) == batch_size):
            yield torch.stack(waiting)
            waiting = []
        if image.dim() == 3:
            waiting.append(image)
        elif len(image):
            yield image
    if waiting:
        yield torch.stack(waiting)


def _items(images: Any, batch_size: int, track: Track) -> Iterable[Any]:
    """Return an iterable of images and batches."""
    images = images.images if isinstance(images, Pairs) else images
    if isinstance(images, Tensor) and images.dim() == 4:
        return track(images.split(batch_size))
    single = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | Tensor
    one_array = isinstance(images, np.ndarray) and images.dtype.kind in "biufc" and images.ndim != 4
    if isinstance(images, single) or one_array or hasattr(images, "read"):
        return [images]
    if not hasattr(images, "__iter__") and hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        # The data sets of torch need not end an iteration over their numbers by an IndexError.
        return (images[i] for i in track(range(len(images))))
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise ImageError(f"images cannot be {shown_value(images)}", f"pass {IMAGE_FORMS}, one or many")
    return track(images)


def _tensor(item: Any, name: str) -> Tensor:
    """Return an image, or a batch of images, as a tensor."""
    item = item.images if isinstance(item, Pairs) else item
    if isinstance(item, Tensor):
        return item
    if isinstance(item, Sample):
        return decode_sample(item)
    if isinstance(item, list | tuple):
        way_out = "of a loader with labels pass the images alone, as in (images for images, _ in loader)"
        raise ImageError(f"{name}: is a {type(item).__name__}, not an image", way_out)
    return open_image(item, name)


def _check(images: Tensor, preprocess: Preprocess | OpenClipTransform, name: str) -> None:
    """Raise an `ImageError` if a tensor is not one image or a batch, or its values have no defined range."""
    shape = " x ".join(map(str, images.shape))
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        hint = ": permute it, the colors come first" if images.dim() in (3, 4) and images.shape[-1] in (1, 3, 4) else ""
        raise ImageError(f"{name}: is a tensor of {shape}", f"an image is (3, H, W), a batch (B, 3, H, W){hint}")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ImageError(f"{name}: is a tensor of {images.dtype}", "scale it to 0 to 255 and convert it to torch.uint8")
    size = (preprocess.size,) * 2 if isinstance(preprocess.size, int) else tuple(preprocess.size)
    if images.shape[-2:] != size:
        raise ImageError(
            f"{name}: is a float tensor of {shape}",
            f"normalized images have {size[0]} x {size[1]} pixels; pixels of any size are torch.uint8",
        )
    if images.numel() and any(preprocess.mean) and float(images.min()) >= 0 and float(images.max()) <= 1:
        warn_once(
            "float images must be normalized, and some lie between 0 and 1, as torchvision's ToTensor gives them: pass "
            "torch.uint8, or normalize them as embedder.preprocess does"
        )
