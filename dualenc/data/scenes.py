"""Synthetic scenes: coloured shapes at places, and sentences that say what is there.

A data set that can be made anywhere in seconds, hard enough that a model has to bind colours to shapes and understand
where things are, and easy enough to learn on two CPU cores.
"""

import io
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from webdataset.writer import TarWriter

from dualenc.data.plan import stream

COLOURS = {
    "red": (214, 40, 40), "orange": (247, 127, 0), "yellow": (250, 210, 30), "green": (40, 150, 70),
    "blue": (40, 90, 200), "purple": (130, 60, 170), "pink": (250, 140, 190), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIDES = ("left", "right", "top", "bottom")
TEMPLATES = ("a {c}.", "a picture of a {c}.", "there is a {c} in the scene.")


class Thing(NamedTuple):
    """One shape of a scene; lengths as shares of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """A picture and its caption."""

    image: Image.Image
    caption: str
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator, things: int = 2, size: int = 64) -> Scene:
    """A scene of one or two things of different names, apart from each other."""
    while True:  # both anew: beside a thing in the middle there is no room for another
        placed = [_thing(rng) for _ in range(things)]
        apart = all(max(abs(a.x - b.x), abs(a.y - b.y)) > 0.42 for a, b in pairwise(placed))
        if apart and len({thing.name for thing in placed}) == things:
            break
    scale = 4  # drawn large and made small: smooth edges
    ground = tuple(int(v) for v in rng.integers(200, 256, 3))
    image = Image.new("RGB", (size * scale, size * scale), ground)
    for thing in placed:
        _draw(ImageDraw.Draw(image), thing, size * scale, ground)
    return Scene(image.resize((size, size), Image.Resampling.LANCZOS), _caption(rng, placed), tuple(placed))


def _thing(rng: np.random.Generator) -> Thing:
    x, y = rng.uniform(0.2, 0.8, 2)
    return Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), x, y, rng.uniform(0.12, 0.2))


def _draw(canvas: ImageDraw.ImageDraw, thing: Thing, side: int, ground: tuple[int, ...]) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    fill = COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    match thing.shape:
        case "circle":
            canvas.ellipse(box, fill=fill)
        case "square":
            canvas.rectangle(box, fill=fill)
        case "triangle":
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        case "cross":
            canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
            canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        case "ring":
            canvas.ellipse(box, fill=fill)
            canvas.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=ground)
        case "star":
            angles = np.pi * np.arange(10) / 5 - np.pi / 2
            radii = np.where(np.arange(10) % 2 == 0, r * 1.1, r * 0.45)
            canvas.polygon([(x + s * np.cos(a), y + s * np.sin(a)) for a, s in zip(angles, radii)], fill=fill)


def _caption(rng: np.random.Generator, things: list[Thing]) -> str:
    def said(thing: Thing) -> str:
        size = "big " if thing.radius > 0.17 else "small " if thing.radius < 0.15 else ""
        return f"a {size if rng.random() < 0.5 else ''}{thing.name}"

    if len(things) == 1:
        thing = things[0]
        offset = {"left": -thing.x, "right": thing.x - 1, "top": -thing.y, "bottom": thing.y - 1}
        side = max(offset, key=lambda name: offset[name])
        place = ("", f" at the {side}", f" near the {side}")[rng.integers(3)]
        start = ("", "a picture of ", "there is ")[rng.integers(3)]
        return f"{start}{said(thing)}{place}"
    a, b = things if rng.random() < 0.5 else things[::-1]
    if rng.random() < 0.25:
        return f"{said(a)} and {said(b)}"
    if abs(a.x - b.x) > abs(a.y - b.y):
        relation = "left of" if a.x < b.x else "right of"
    else:
        relation = "above" if a.y < b.y else "below"
    return f"{said(a)} {relation} {said(b)}"


def _scenes(seed: int, part: int, count: int) -> Iterator[Scene]:
    for i in range(count):
        rng = np.random.Generator(stream(seed, part, i))
        yield draw_scene(rng, things=1 + int(rng.random() < 0.5))


def write_scenes(
    folder: str | os.PathLike[str], train: int, held_out: int = 200, shard: int = 500, seed: int = 0
) -> None:
    """Writes a data set of scenes.

    Args:
        folder: gets `train-000000.tar` ..., and in the layout of CLIP_benchmark `retrieval/` (held-out scenes) and
            `zeroshot/` (one thing each, classified by colour and shape: 48 classes).
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

    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    with TarWriter(str(_split(folder / "zeroshot")), mtime=0) as tar:
        for i in range(held_out):
            scene = draw_scene(np.random.Generator(stream(seed, 2, i)), things=1)
            label = names.index(scene.things[0].name)
            tar.write({"__key__": f"{i:07d}", "png": _png(scene.image), "cls": str(label).encode()})
    (folder / "zeroshot" / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def _split(folder: Path) -> Path:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    return folder / "test" / "0.tar"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
