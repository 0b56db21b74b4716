"""Synthetic scenes: colored shapes of a size at places, and sentences that say what is there.

A data set that can be made anywhere in seconds, easy enough to learn on two CPU cores, and hard enough to tell
something: a model has to bind colors to shapes and understand where things are, and it is asked for pairs of color
and shape that never stand in the training data. A caption leaves out what its writer did not think of, as people's do.
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
# Never in a training scene: one of each color's five, and no shape misses more than two of its eight.
UNSEEN = tuple(f"{color} {SHAPES[i % 5]}" for i, color in enumerate(COLORS))
SEEN = tuple(name for name in NAMES if name not in UNSEEN)
SIZES = {"small": (0.15, 0.19), "big": (0.25, 0.33)}  # radius as a share of the picture's side
TEMPLATES = ("a {c}", "a picture of a {c}", "there is a {c}", "only a {c}")


class Thing(NamedTuple):
    """One shape of a scene; lengths as shares of the picture's side."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    """A picture and its caption."""

    image: Image.Image
    caption: str
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator, names: Sequence[str] = NAMES, things: int = 2, pixels: int = 64) -> Scene:
    """A scene of one or two things of different names out of `names`, apart from each other."""
    while True:  # both anew: beside a thing in the middle there is no room for another
        placed = [_thing(rng, names) for _ in range(things)]
        apart = all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius for a, b in pairwise(placed))
        if apart and len({thing.name for thing in placed}) == things:
            break
    scale = 4  # drawn large and made small: smooth edges
    ground = tuple(int(v) for v in rng.integers(225, 256, 3))
    image = Image.new("RGB", (pixels * scale, pixels * scale), ground)
    for thing in placed:
        _draw(ImageDraw.Draw(image), thing, pixels * scale, ground)
    image = image.resize((pixels, pixels), Image.Resampling.LANCZOS)
    return Scene(image, _caption(rng, placed), tuple(placed))


def _thing(rng: np.random.Generator, names: Sequence[str]) -> Thing:
    color, shape = names[int(rng.integers(len(names)))].split()
    size = tuple(SIZES)[int(rng.integers(2))]
    radius = rng.uniform(*SIZES[size])
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Thing(color, shape, size, x, y, radius)


def _draw(canvas: ImageDraw.ImageDraw, thing: Thing, side: int, ground: tuple[int, ...]) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    fill = COLORS[thing.color]
    box = (x - r, y - r, x + r, y + r)
    match thing.shape:
        case "circle":
            canvas.ellipse(box, fill=fill)
        case "square":
            s = r * 0.88  # as much paint as the circle, so that not the area tells them apart
            canvas.rectangle((x - s, y - s, x + s, y + s), fill=fill)
        case "triangle":
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        case "cross":
            canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
            canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        case "ring":
            canvas.ellipse(box, fill=fill)
            canvas.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=ground)


def _caption(rng: np.random.Generator, things: list[Thing]) -> str:
    """One of many ways to say it; most leave out a size, a place or a relation."""

    def one_of(*ways: str) -> str:
        return ways[rng.integers(len(ways))]

    def said(thing: Thing) -> str:
        return f"a {f'{thing.size} ' if rng.random() < 0.3 else ''}{thing.name}"

    if len(things) == 1:
        (thing,) = things
        vertical = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
        sideways = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
        place = f"{vertical} {sideways}".strip() or "middle"
        ways = ("",) * 7 + (f" at the {place}", f" in the {place} of the picture", f", {place}")
        return f"{one_of('', 'a picture of ', 'there is ', 'only ')}{said(thing)}{one_of(*ways)}"
    a, b = things if rng.random() < 0.5 else things[::-1]
    if abs(a.x - b.x) > abs(a.y - b.y):
        relation = one_of("left of", "to the left of") if a.x < b.x else one_of("right of", "to the right of")
    else:
        relation = one_of("above", "over") if a.y < b.y else one_of("below", "under")
    if rng.random() < 0.3:
        return f"{said(a)} {one_of('and', 'with', 'beside')} {said(b)}"
    return f"{one_of('', 'there is ', 'a picture of ')}{said(a)} {relation} {said(b)}"


def _scenes(seed: int, part: int, count: int) -> Iterator[Scene]:
    for i in range(count):
        rng = np.random.Generator(philox(seed, part, i))
        yield draw_scene(rng, SEEN, things=1 + int(rng.random() < 0.3))


def write_scenes(
    folder: str | os.PathLike[str], train: int, held_out: int = 200, shard: int = 500, seed: int = 0
) -> None:
    """Writes a data set of scenes.

    Args:
        folder: gets `train-000000.tar` ..., and in the layout of CLIP_benchmark `retrieval/` (held-out scenes) and
            `zeroshot_seen/` and `zeroshot_unseen/`: one thing each, of a pair of color and shape that the training
            scenes have or have not, to be found among all 40 pairs.
        train: number of training pairs.
        held_out: number of scenes in each evaluation set.
        shard: samples in a training shard.
        seed: the same seed writes the same bytes.
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
