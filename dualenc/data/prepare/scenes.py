"""Synthetic scenes: images of colored shapes, and captions that describe them.

The data set can be made anywhere in seconds, and two CPU cores can learn it. It is hard enough to be informative: a
model has to bind colors to shapes and to understand positions, and it is tested on pairs of color and shape that are
not in the training data. As human captions do, a caption leaves out some of what is in the image.
"""

import io
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from webdataset.writer import TarWriter

from dualenc.data.loading.epoch_plan import philox

COLORS = {
    "red": (214, 40, 40), "brown": (140, 85, 45), "yellow": (250, 210, 30), "green": (40, 150, 70),
    "blue": (40, 90, 200), "purple": (130, 60, 170), "pink": (250, 140, 190), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
# These pairs are not in the training scenes: one shape of each color, and at most two colors of each shape.
UNSEEN = tuple(f"{color} {SHAPES[i % 5]}" for i, color in enumerate(COLORS))
SEEN = tuple(name for name in NAMES if name not in UNSEEN)
SIZES = {"small": (0.15, 0.19), "big": (0.25, 0.33)}  # range of the radius, as a fraction of the image's side
TEMPLATES = ("a {c}", "a picture of a {c}", "there is a {c}", "only a {c}")


class Thing(NamedTuple):
    """One shape of a scene; lengths are fractions of the image's side."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """The color and the shape, such as "red circle"."""
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    """An image, its caption, and the things that it shows."""

    image: Image.Image
    caption: str
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator, names: Sequence[str] = NAMES, things: int = 2, pixels: int = 64) -> Scene:
    """Draw a scene of one or two things that do not overlap.

    Args:
        rng: generator of all random choices.
        names: names to choose from, such as "red circle"; two things have different names.
        things: number of things, 1 or 2.
        pixels: side of the square image.
    """
    while True:  # all things are drawn again, since there may be no room next to one in the middle
        placed = [_random_thing(rng, names) for _ in range(things)]
        apart = all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius for a, b in pairwise(placed))
        if apart and len({thing.name for thing in placed}) == things:
            break
    scale = 4  # drawn at four times the size, so that resizing makes the edges smooth
    background = tuple(int(v) for v in rng.integers(225, 256, 3))
    image = Image.new("RGB", (pixels * scale, pixels * scale), background)
    for thing in placed:
        _draw(ImageDraw.Draw(image), thing, pixels * scale, background)
    image = image.resize((pixels, pixels), Image.Resampling.LANCZOS)
    return Scene(image, _caption(rng, placed), tuple(placed))


def _random_thing(rng: np.random.Generator, names: Sequence[str]) -> Thing:
    color, shape = names[int(rng.integers(len(names)))].split()
    size = tuple(SIZES)[int(rng.integers(2))]
    radius = rng.uniform(*SIZES[size])
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Thing(color, shape, size, x, y, radius)


def _draw(canvas: ImageDraw.ImageDraw, thing: Thing, side: int, background: tuple[int, ...]) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    fill = COLORS[thing.color]
    box = (x - r, y - r, x + r, y + r)
    match thing.shape:
        case "circle":
            canvas.ellipse(box, fill=fill)
        case "square":
            s = r * 0.88  # the area of the circle, so that a model cannot tell them apart by it
            canvas.rectangle((x - s, y - s, x + s, y + s), fill=fill)
        case "triangle":
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        case "cross":
            canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
            canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        case "ring":
            canvas.ellipse(box, fill=fill)
            canvas.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=background)


def _caption(rng: np.random.Generator, things: list[Thing]) -> str:
    """Write one of many possible captions; most leave out a size, a position or a relation."""

    def one_of(*phrases: str) -> str:
        return phrases[rng.integers(len(phrases))]

    def noun_phrase(thing: Thing) -> str:
        return f"a {f'{thing.size} ' if rng.random() < 0.3 else ''}{thing.name}"

    if len(things) == 1:
        (thing,) = things
        vertical = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
        horizontal = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
        position = f"{vertical} {horizontal}".strip() or "middle"
        endings = ("",) * 7 + (f" at the {position}", f" in the {position} of the picture", f", {position}")
        return f"{one_of('', 'a picture of ', 'there is ', 'only ')}{noun_phrase(thing)}{one_of(*endings)}"
    a, b = things if rng.random() < 0.5 else things[::-1]
    if abs(a.x - b.x) > abs(a.y - b.y):
        relation = one_of("left of", "to the left of") if a.x < b.x else one_of("right of", "to the right of")
    else:
        relation = one_of("above", "over") if a.y < b.y else one_of("below", "under")
    if rng.random() < 0.3:
        return f"{noun_phrase(a)} {one_of('and', 'with', 'beside')} {noun_phrase(b)}"
    return f"{one_of('', 'there is ', 'a picture of ')}{noun_phrase(a)} {relation} {noun_phrase(b)}"


def _scenes(seed: int, part: int, count: int) -> Iterator[Scene]:
    for i in range(count):
        rng = np.random.Generator(philox(seed, part, i))
        yield draw_scene(rng, SEEN, things=1 + int(rng.random() < 0.3))


def write_scenes(
    folder: str | os.PathLike[str], train: int, held_out: int = 200, shard: int = 500, seed: int = 0
) -> None:
    """Write a data set of scenes.

    The folder gets `train-000000.tar` ..., and evaluation sets in the layout of CLIP_benchmark. `retrieval/` has
    held-out scenes. `zeroshot_seen/` and `zeroshot_unseen/` have images of one thing, to be classified among all 40
    pairs of color and shape; the pair is in the training scenes, or is not.

    Args:
        folder: output folder.
        train: number of training pairs.
        held_out: number of scenes in each evaluation set.
        shard: number of samples in a training shard.
        seed: seed of the scenes; the same seed writes the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = enumerate(_scenes(seed, 0, train))
    for number in range(-(-train // shard)):
        with TarWriter(str(folder / f"train-{number:06d}.tar"), mtime=0) as tar:
            for i, scene in (next(scenes) for _ in range(min(shard, train - number * shard))):
                tar.write({"__key__": f"{i:07d}", "png": _png(scene.image), "txt": scene.caption.encode()})

    with TarWriter(str(_split(folder / "retrieval")), mtime=0) as tar:
        for i, scene in enumerate(_scenes(seed, 1, held_out)):
            tar.write({"__key__": f"{i:07d}", "png": _png(scene.image), "txt": scene.caption.encode()})
    (folder / "retrieval" / "dataset_type.txt").write_text("retrieval\n")

    for part, (kind, names) in enumerate((("seen", SEEN), ("unseen", UNSEEN)), 2):
        name = f"zeroshot_{kind}"
        with TarWriter(str(_split(folder / name)), mtime=0) as tar:
            for i in range(held_out):
                scene = draw_scene(np.random.Generator(philox(seed, part, i)), names, things=1)
                label = NAMES.index(scene.things[0].name)
                tar.write({"__key__": f"{i:07d}", "png": _png(scene.image), "cls": str(label).encode()})
        (folder / name / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        (folder / name / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def _split(folder: Path) -> Path:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    return folder / "test" / "0.tar"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
