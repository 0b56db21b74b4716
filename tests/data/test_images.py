import contextlib
import io
import itertools
import random
import resource
import struct
import warnings
import zlib

import numpy as np
import open_clip
import pytest
import torch
from helpers import encode, pixels, smooth
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as TF

import dualenc.data.image_pixels as image_pixels
import dualenc.data.images as images_module
from dualenc.data import Augment, ImageError, Preprocess, decode_image
from dualenc.data.image_notes import find_notes
from dualenc.data.images import open_image, thumbnail, to_tensor


def array(image):
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(int)


def by_pillow(data):
    """Decode as a viewer does: upright, on white, RGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        color, alpha = np.asarray(image)[..., :3] / 255, np.asarray(image)[..., 3:] / 255
        return np.round((color * alpha + 1 - alpha) * 255).astype(int)
    return np.asarray(image.convert("RGB")).astype(int)


def close(image, data, most=1, mean=0.5):
    difference = np.abs(array(image) - by_pillow(data))
    assert difference.max() <= most
    assert difference.mean() <= mean


@pytest.fixture(params=[(1, 1), (7, 5), (40, 33)])
def picture(request, seed):
    return smooth(np.random.default_rng(seed), *request.param)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"quality": 30}]
)
def test_jpeg(picture, options):
    data = encode(picture, "jpeg", **options)
    close(decode_image(data), data, most=2)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_jpeg_of_other_colors(picture, mode):
    data = encode(Image.fromarray(picture).convert(mode), "jpeg")
    close(decode_image(data), data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_every_exif_orientation_is_decoded_upright(seed, orientation, kind):
    upright = smooth(np.random.default_rng(seed), 24, 40)
    transposition = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[orientation]  # fmt: skip
    stored = Image.fromarray(upright)
    stored = stored if transposition is None else stored.transpose(Image.Transpose[transposition])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 97, "subsampling": 0} if kind == "jpeg" else {}
    image = array(decode_image(encode(stored, kind, exif=exif, **options)))
    assert image.shape == (24, 40, 3)
    assert np.abs(image - upright).mean() < 4
    assert orientation == 1 or np.abs(image[:20, :20] - np.asarray(stored)[:20, :20]).mean() > 4  # control


def test_the_orientation_of_a_jpeg_equals_pillows(seed):
    """A JPEG goes to simplejpeg, which ignores rotations, only where Pillow finds none: for every content of notes."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (8, 8))
    files = []
    for orientation, endian in itertools.product([None, *range(10)], "<>"):
        exif = Image.Exif()
        exif.endian = endian
        exif[ExifTags.Base.Make] = "maker"
        if orientation is not None:
            exif[ExifTags.Base.Orientation] = orientation
        files.append(encode(picture, "jpeg", exif=exif, comment=b"Exif\0\0"))
        assert is_upright(files[-1]) == (orientation not in range(2, 9))
    files.append(encode(picture, "jpeg", exif=Image.Exif(), xmp=b'<x tiff:Orientation="6"/>'))
    assert not is_upright(files[-1])
    plain = encode(picture, "jpeg")
    assert is_upright(plain)
    assert is_upright(plain[:9]) is None
    certain, wrong = 0, []
    for _ in range(2000):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(30, 90)] = rng.choice([0, 1, 3, 6, 0x12, 255, rng.randrange(256)])
        ours = is_upright(bytes(data))
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # Pillow raises on files that it cannot open.
            warnings.simplefilter("ignore")
            theirs = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
            wrong += [bytes(data[:90])] if ours is not None and ours != (theirs not in range(2, 9)) else []
            certain += ours is not None
    assert not wrong
    assert certain > 1000


def is_upright(data):
    """Return whether `decode_image` takes a JPEG for upright; None where the structure is left to Pillow."""
    places, notes = find_notes(data)
    return None if places is None else image_pixels._is_upright(notes)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless(picture, kind):
    data = encode(picture, kind, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(array(decode_image(data)), picture)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparent_pixels_are_on_white(seed, kind):
    rng = np.random.default_rng(seed)
    rgba = pixels(rng, 9, 11, 4)
    rgba[0, 0, 3], rgba[1, 1, 3] = 0, 255
    data = encode(rgba, kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    image = decode_image(data)
    close(image, data)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 1, 1].tolist() == rgba[1, 1, :3].tolist()


def test_gray_with_alpha_palette_and_one_bit(seed):
    rng = np.random.default_rng(seed)
    close(decode_image(data := encode(Image.fromarray(pixels(rng, 9, 7, 2), "LA"))), data)
    close(decode_image(data := encode(Image.fromarray(pixels(rng, 9, 7)[..., 0]))), data)
    close(decode_image(data := encode(Image.fromarray(pixels(rng, 9, 7)[..., 0]).convert("1"))), data)
    indices = rng.integers(0, 4, (9, 7), dtype=np.uint8)
    indices[0, :4] = range(4)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    close(decode_image(data := encode(palette)), data)
    for transparency in (2, bytes([255, 128, 0, 64])):
        data = encode(palette, transparency=transparency)
        image = decode_image(data)
        close(image, data)
        assert image[:, 0, 2].tolist() == [255, 255, 255]
    close(decode_image(data := encode(Image.new("RGB", (3, 2), (9, 8, 7)), transparency=(9, 8, 7))), data)
    assert (decode_image(data) == 255).all()


def test_16_bit_gray(seed):
    """The values are scaled as in a viewer; Pillow's own conversion clips all values above 255 to white."""
    gray = np.random.default_rng(seed).integers(0, 1 << 16, (9, 7)).astype(np.uint16)
    image = array(decode_image(encode(Image.fromarray(gray))))
    assert np.abs(image - (gray / 257)[..., None]).max() <= 1


def test_layout_is_channels_last(picture):
    for kind in ("jpeg", "png"):
        image = decode_image(encode(picture, kind))
        assert image.permute(1, 2, 0).is_contiguous()
        image.add_(0)  # writable


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_truncated_data_is_an_image_error_or_the_whole_image(seed, kind):
    data = encode(pixels(np.random.default_rng(seed), 24, 24), kind)
    whole, refused = decode_image(data), 0
    for length in range(0, len(data), 37):
        try:
            assert torch.equal(decode_image(data[:length]), whole)  # Only the end mark is missing.
        except ImageError:
            refused += 1
    assert refused >= length // 37 - 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_corrupted_bytes_raise_only_image_errors(seed, kind):
    rng = np.random.default_rng(seed)
    data = encode(smooth(rng, 24, 24), kind)
    for _ in range(150):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            broken[place] = rng.integers(0, 256)
        with contextlib.suppress(ImageError):
            assert decode_image(bytes(broken)).shape[0] == 3


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"hello" * 100])
def test_garbage(data):
    with pytest.raises(ImageError, match="cannot be decoded as JPEG, PNG or WebP"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["gif", "eps", "bmp", "tiff", "ppm", "ico", "tga", "pcx"])
def test_other_formats_are_refused(seed, kind):
    data = encode(pixels(np.random.default_rng(seed), 16, 16), kind)
    with pytest.raises(ImageError, match="cannot be decoded as JPEG, PNG or WebP"):
        decode_image(data)


def forged_png(width, height):
    """Build a PNG with a header of this size and an empty body."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pixel_cap_is_read_from_the_header(monkeypatch):
    with pytest.raises(ImageError, match="pixels"):
        decode_image(forged_png(60_000, 60_000))
    with pytest.raises(ImageError, match="pixels"):
        decode_image(forged_png(2**31 - 1, 2**31 - 1))
    monkeypatch.setattr(image_pixels, "MAX_PIXELS", 200)
    for kind in ("jpeg", "png", "webp"):
        decode_image(encode(np.zeros((10, 20, 3), np.uint8), kind))
        with pytest.raises(ImageError, match=r"10 x 21|21 x 10"):
            decode_image(encode(np.zeros((10, 21, 3), np.uint8), kind))
    with pytest.raises(ImageError, match="pixels"):
        to_tensor(Image.new("RGB", (21, 10)))


def test_a_huge_jpeg_header_is_refused():
    data = bytearray(encode(np.zeros((16, 16, 3), np.uint8), "jpeg"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    with pytest.raises(ImageError, match="pixels"):
        decode_image(bytes(data))


def test_sizes_between_pillows_limit_and_max_pixels_do_not_warn():
    """Pillow warns from 89 million pixels, which clutters a log and is an error under -W error."""
    with pytest.raises(ImageError) as error:
        decode_image(forged_png(10_000, 10_000))
    assert "DecompressionBomb" not in str(error.value)


def test_open_image(tmp_path, picture, seed):
    path = tmp_path / "ä b.png"
    path.write_bytes(encode(picture))
    with open(path, "rb") as file:
        data = path.read_bytes()
        for source in (
            path,
            str(path),
            Image.fromarray(picture),
            picture,
            data,
            bytearray(data),
            io.BytesIO(data),
            file,
        ):
            assert np.array_equal(array(open_image(source)), picture)
    assert np.array_equal(array(open_image(picture[::-1, ::2])), picture[::-1, ::2])  # any strides
    gray, rgba = picture[..., 0], pixels(np.random.default_rng(seed), 7, 9, 4)
    for source in (gray, gray[..., None]):
        assert np.array_equal(array(open_image(source)), gray[..., None].repeat(3, 2))
    alpha = rgba[..., 3:] / 255
    white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(array(open_image(rgba)) - white).max() <= 1
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"b\.png: cannot be decoded"):
        open_image(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match=r"c\.png"):
        open_image(tmp_path / "c.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_image(tmp_path)


def test_open_image_refuses_what_has_no_defined_pixels(tmp_path, seed):
    picture = pixels(np.random.default_rng(seed), 90, 80)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "cut.jpg").write_bytes(encode(picture, "jpg")[:-900])
    with open(tmp_path / "a.txt") as text, Image.open(tmp_path / "cut.jpg") as cut:
        wrong = {
            "float64": picture / 255,
            "uint16": picture.astype(np.uint16),
            "transpose": picture.transpose(2, 0, 1),
            "colors come last": picture[..., :2],
            "0 x 80": picture[:0, :, 0],
            "NoneType|None": None,
            "dict": {"image": picture},
            'mode "rb"': text,
            "seek": io.BytesIO(),
            "https://example.org/a.jpg: is a URL": "https://example.org/a.jpg?token=secret",
            r"cut\.jpg: cannot be loaded": cut,
        }
        for match, source in wrong.items():
            with pytest.raises(ImageError, match=match) as error:
                open_image(source)
            assert "\n" not in str(error.value)
            assert "secret" not in str(error.value)


# Preprocess

SIZES = [(16, 16), (37, 53), (53, 37), (16, 90), (90, 16), (101, 33), (9, 13), (13, 9), (200, 17), (17, 17)]


def reference(image, size, mode, resample):
    """Transform by Pillow, with open_clip's rounding of the longer side; center crop, or padding with black."""
    height, width = image.shape[:2]
    if mode == "squash":
        target = (size, size)
    elif mode == "shortest":
        side = min(height, width)
        target = (height * size // side, width * size // side)
    else:
        side = max(height, width)
        target = (max(1, round(height * size / side)), max(1, round(width * size / side)))
    resized = Image.fromarray(image).resize((target[1], target[0]), resample)
    if mode == "longest":
        canvas = Image.new("RGB", (size, size))
        canvas.paste(resized, ((size - target[1]) // 2, (size - target[0]) // 2))
        return np.asarray(canvas).astype(int)
    left, top = round((target[1] - size) / 2), round((target[0] - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", SIZES)
def test_preprocess_equals_pillow(seed, resize, interpolation, shape):
    image = smooth(np.random.default_rng(seed), *shape)
    out = Preprocess(16, interpolation=interpolation, resize=resize)(to_tensor(Image.fromarray(image)))
    assert out.shape == (3, 16, 16)
    expected = reference(image, 16, resize, Image.Resampling[interpolation.upper()])
    assert np.abs(array(out) - expected).mean() < 0.6


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("shape", SIZES)
def test_preprocess_equals_open_clip(seed, resize, shape):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    image = Image.fromarray(smooth(np.random.default_rng(seed), *shape))
    peer = open_clip.image_transform(16, False, mean, std, resize_mode=resize, interpolation="bicubic", fill_color=0)
    ours = Preprocess(16, mean, std, resize=resize)
    difference = (ours.normalize(ours(to_tensor(image))) - peer(image)).abs().mean()
    assert difference < 0.6 / 255 / 0.2


@pytest.mark.parametrize("shape", [(375, 500), (480, 640), (333, 500), (427, 640), (500, 334)])
def test_preprocess_of_photo_sizes_equals_open_clip(seed, shape):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(pixels(rng, *shape))  # noise, in which a shift by one pixel is visible
    peer = open_clip.image_transform(64, False, (0, 0, 0), (1, 1, 1), resize_mode="shortest", interpolation="bicubic")
    assert np.abs(array(Preprocess(64)(to_tensor(image))) / 255 - peer(image).permute(1, 2, 0).numpy()).mean() < 1 / 255


def test_normalize_equals_torchvision(seed):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    peer = transforms.Normalize(mean, std)(images.double() / 255)
    ours = Preprocess(9, mean, std).normalize(images)
    assert ours.dtype == torch.float32
    assert (ours - peer).abs().max() < 2e-6
    assert torch.equal(Preprocess(9, mean, std).normalize(images[0]), ours[0])


def test_normalize_does_not_depend_on_the_layout():
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    before, preprocess = images.clone(), Preprocess(9, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    last = images.contiguous(memory_format=torch.channels_last)
    assert last.stride() != images.stride()
    assert torch.equal(preprocess.normalize(last), preprocess.normalize(images))
    floats = images.float()
    assert torch.equal(preprocess.normalize(floats), preprocess.normalize(images))
    assert torch.equal(floats, before.float())
    assert torch.equal(images, before)


# Augment

EVERYTHING = {"scale": (0.5, 1.3), "flip": 0.5, "rotate": 20, "color": 0.3, "hue": 0.2, "gray": 0.3}


@pytest.fixture
def photo(seed):
    return to_tensor(Image.fromarray(smooth(np.random.default_rng(seed), 40, 50)))


@pytest.mark.parametrize("options", [{}, {"scale": (0.3, 1.0)}, EVERYTHING])
def test_augment_draws_only_from_torchs_generator(seed, photo, options):
    augment, before = Augment(16, **options), photo.clone()
    torch.manual_seed(seed)
    first = [augment(photo) for _ in range(12)]
    random.seed(seed + 1)
    np.random.seed(seed % 1000)  # noqa: NPY002 (the generator that must not be used)
    torch.manual_seed(seed)
    again = Augment(16, **options)
    assert all(torch.equal(a, again(photo)) for a in first)
    assert all((a.shape, a.dtype) == ((3, 16, 16), torch.uint8) for a in first)
    assert any(not torch.equal(first[0], other) for other in first)
    assert torch.equal(photo, before)


def test_augment_only_crops_by_default(seed, photo):
    """The default equals open_clip's training transform, without flip and color jitter."""
    for i in range(10):
        torch.manual_seed(seed + i)
        found = Augment(16)(photo)
        torch.manual_seed(seed + i)
        box = images_module._crop_box(*photo.shape[-2:], (0.9, 1.0))
        assert torch.equal(found, TF.resized_crop(photo, *box, [16, 16], transforms.InterpolationMode.BICUBIC))
        torch.manual_seed(seed + i)
        assert not torch.equal(found, Augment(16, flip=1.0)(photo))  # control


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (50, 400), (7, 5), (1, 1)])
def test_crops_have_torchvisions_distribution(seed, scale, size):
    """The means of all edges and of their products are equal within 5 standard errors."""
    peer = transforms.RandomResizedCrop(16, scale)
    torch.manual_seed(seed)
    ours = torch.tensor([images_module._crop_box(*size, scale) for _ in range(3000)]).double()
    found = (peer.make_params([torch.empty(3, *size)]) for _ in range(3000))
    theirs = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in found]).double()
    for a, b in ((ours, theirs), *((x[:, :, None] * x[:, None] for x in (o, t)) for o, t in [(ours, theirs)])):
        error = ((a.var(0) + b.var(0)) / 3000).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-9).all()
    top, left, height, width = ours.T
    assert (torch.stack([top, left]) >= 0).all()
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]


def test_augment_flips(seed, photo):
    torch.manual_seed(seed)
    plain = [Augment(16)(photo) for _ in range(5)]
    torch.manual_seed(seed)
    flipped = [Augment(16, flip=1.0)(photo) for _ in range(5)]
    assert (flipped[0].flip(-1).float() - plain[0].float()).abs().max() <= 1  # Only the first has the same draws.
    whole = Preprocess(16, resize="squash")(photo).float()
    assert all((out.float() - whole.flip(-1)).abs().mean() < (out.float() - whole).abs().mean() for out in flipped)
    half = Augment(16, flip=0.5)
    outs = [half(photo).float() for _ in range(200)]
    share = np.mean([bool((out - whole.flip(-1)).abs().mean() < (out - whole).abs().mean()) for out in outs])
    assert 0.3 < share < 0.7  # 5.6 standard deviations


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 100_000)])
def test_a_very_long_image_is_cropped_before_it_is_resized(seed, size):
    """The memory stays small, and the result is that of the center."""
    line = torch.from_numpy(pixels(np.random.default_rng(seed), *size)).permute(2, 0, 1)
    center = [slice((length - min(length, 60)) // 2, (length + min(length, 60)) // 2) for length in size]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Preprocess(224)(line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB; resized whole, over 3 GB
    expected = Preprocess(224)(line[:, center[0], center[1]])
    assert (found.float() - expected.float()).abs().mean() < 0.1


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_the_first_frame_of_an_animation_is_decoded(seed, kind):
    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(pixels(rng, 9, 7)) for _ in range(3)]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), np.asarray(frames[0]))


def gray_of(image):
    return image.float().mul(torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0)


def test_augment_jitters_colors(seed):
    """A hue shift of a colored square on gray changes only the square."""
    picture = torch.full((3, 30, 30), 128, dtype=torch.uint8)
    picture[:, 8:22, 8:22] = torch.tensor([200, 60, 40], dtype=torch.uint8)[:, None, None]
    hue = Augment(16, scale=(1.0, 1.0), hue=0.5)
    plain = Augment(16, scale=(1.0, 1.0))(picture)
    outs = [hue(picture) for _ in range(20)]
    assert all((out[:, 0].int() - 128).abs().max() <= 1 for out in outs)
    colors = torch.stack([out[:, 8, 8] for out in outs]).float()
    assert (colors.sum(1) - 300).abs().max() < 6  # rotated about the gray axis
    assert (colors.argmax(1) != 0).any()
    assert any((out.float() - plain.float()).abs().max() > 20 for out in outs)

    color = Augment(16, scale=(1.0, 1.0), color=0.4)
    outs = [color(picture) for _ in range(20)]
    assert len({tuple(out[:, 8, 8].tolist()) for out in outs}) > 10
    assert all(bool((out[0, 8, 8] >= out[1, 8, 8]) & (out[1, 8, 8] >= out[2, 8, 8])) for out in outs)  # Red stays red.
    levels = torch.stack([out[:, 0, 0] for out in outs]).float()
    assert (levels.max(1).values - levels.min(1).values).max() <= 2  # Gray stays gray.
    assert levels.std() > 3


def test_augment_converts_to_gray(seed, photo):
    gray = Augment(16, gray=1.0)
    for i in range(5):
        torch.manual_seed(seed + i)
        out = gray(photo)
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])
        torch.manual_seed(seed + i)
        assert (out[0].float() - gray_of(Augment(16)(photo))).abs().max() <= 1.5
    outs = [Augment(16, gray=0.5)(photo) for _ in range(200)]
    share = np.mean([torch.equal(out[0], out[1]) for out in outs])
    assert 0.3 < share < 0.7


def emoji(background, color, height=44, width=44):
    picture = torch.tensor(background, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    picture[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = torch.tensor(color)[:, None, None]
    return picture


@pytest.mark.parametrize("background", [(255, 255, 255), (230, 240, 210)])
@pytest.mark.parametrize("shape", [(44, 44), (30, 60), (61, 33)])
def test_augment_pads_with_the_color_of_the_corners(background, shape):
    """Neither padding nor rotation adds black, and the image has the requested share of the area."""
    color = (200, 140, 150)  # each channel between the background's and black
    picture = emoji(background, color, *shape)
    low, high = torch.tensor(color) - 22, torch.tensor(background) + 22  # Bicubic interpolation overshoots.
    for options in ({"scale": (2.0, 2.0)}, {"scale": (1.0, 1.0), "rotate": 45}, {"scale": (0.6, 2.0), "rotate": 30}):
        augment = Augment(32, **options)
        for _ in range(6):
            out = augment(picture).int()
            assert bool((out >= low[:, None, None]).all()), options
            assert bool((out <= high[:, None, None]).all()), options
            if options["scale"] == (2.0, 2.0):  # The square is a quarter of the image, an eighth of the padded image.
                edge = torch.cat([out[:, 0], out[:, -1], out[:, :, 0], out[:, :, -1]], 1)
                assert (edge - torch.tensor(background)[:, None]).abs().max() <= 1
                square = ((out - torch.tensor(color)[:, None, None]).abs().sum(0) < 60).float().mean()
                cropped = max(shape) / min(shape) * 3 / 4 if max(shape) / min(shape) > 4 / 3 else 1.0
                assert square == pytest.approx(cropped / 8, rel=0.3)


@pytest.mark.parametrize("options", [{"scale": (0.8, 1.7)}, {"rotate": 45}, {"scale": (1.5, 1.5), "rotate": 45}])
def test_augment_leaves_no_seam(options):
    """An image of one color keeps it, at the border to the padding too."""
    color = torch.randint(100, 256, (3, 1, 1), dtype=torch.uint8)
    for _ in range(10):
        out = Augment(32, **options)(color.expand(3, 40, 50).contiguous())
        assert (out.int() - color.int()).abs().max() <= 1


def test_augment_rotates(seed):
    """The rotation is about the center, in both directions, up to the largest angle."""
    picture = emoji((255, 255, 255), (30, 60, 90), 60, 60)
    picture[:, :20, 28:32] = 0
    augment = Augment(60, scale=(1.0, 1.0), rotate=30)
    shifts = []
    for _ in range(40):
        out = augment(picture)
        dark = torch.nonzero(out.int().sum(0)[:12] < 120)[:, 1].float()  # columns of the bar's top end
        assert len(dark)
        shifts.append(float(dark.mean()) - 29.5)
    assert min(shifts) < -5
    assert max(shifts) > 5
    assert max(map(abs, shifts)) < 30 * np.sin(np.radians(30)) + 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (9, 1), (3, 200)])
def test_augment_accepts_any_size(seed, shape):
    out = Augment(16, **EVERYTHING)(to_tensor(Image.fromarray(pixels(np.random.default_rng(seed), *shape))))
    assert (out.shape, out.dtype) == ((3, 16, 16), torch.uint8)


# Thumbnails


@pytest.mark.parametrize("shape", [(375, 500), (500, 120), (160, 160), (161, 40), (40, 33), (1, 1), (2, 900), (900, 2)])
@pytest.mark.parametrize("side", [160, 50])
def test_thumbnail(seed, shape, side):
    picture = smooth(np.random.default_rng(seed), *shape)
    data = thumbnail(to_tensor(Image.fromarray(picture)), side)
    assert data[:2] == b"\xff\xd8"
    found = Image.open(io.BytesIO(data))
    assert (found.format, found.mode) == ("JPEG", "RGB")
    share = min(1, side / max(shape))
    assert max(found.size) == min(side, max(shape))
    for length, full in zip(found.size, shape[::-1], strict=True):
        assert abs(length - max(1, full * share)) <= 0.5
    expected = Image.fromarray(picture).resize(found.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 3


def test_thumbnail_of_a_view_that_is_not_contiguous(seed):
    image = to_tensor(Image.fromarray(smooth(np.random.default_rng(seed), 50, 60))).transpose(1, 2)[:, 5:45:2, 3:40]
    found = np.asarray(Image.open(io.BytesIO(thumbnail(image)))).astype(int)
    assert np.abs(found - image.permute(1, 2, 0).numpy()).mean() < 3


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_the_output_is_square_for_every_shape(seed, resize):
    rng = np.random.default_rng(seed)
    for height, width in [(7, 9), (9, 7), (1, 30), *rng.integers(1, 60, (40, 2)).tolist()]:
        image = to_tensor(Image.fromarray(smooth(rng, height, width)))
        assert Preprocess(24, resize=resize)(image).shape == (3, 24, 24), (height, width)
