"""Synthetic scenes: unseen pairs are not in the training data, and captions are true."""

import io
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageDraw

from dualenc.data import BenchmarkSet, Preprocess
from dualenc.data.prepare import scenes
from dualenc.data.prepare.scenes import (
    COLORS,
    NAMES,
    SEEN,
    SHAPES,
    SIZES,
    TEMPLATES,
    UNSEEN,
    Scene,
    draw_scene,
    write_scenes,
)


def looks_like(image: Image.Image) -> str:
    """Return the color and shape of a scene's only thing, from its pixels."""
    pixels = np.asarray(image).astype(int)
    ground = np.array(Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(1)[0][0])
    color = max(COLORS, key=lambda name: (np.abs(pixels - COLORS[name]).max(-1) <= 3).sum())
    paint = np.array(COLORS[color])
    mask = np.abs(pixels - paint).sum(-1) < np.abs(pixels - ground).sum(-1)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = mask.shape
    quarter, share = height // 4, mask.mean()
    if mask[height // 2 - 1 : height // 2 + 2, width // 2 - 1 : width // 2 + 2].mean() < 0.5:
        shape = "ring"
    elif share > 0.65:
        fifth = height // 5
        corners = np.concatenate([mask[:fifth], mask[-fifth:]])[:, [*range(fifth), *range(-fifth, 0)]]
        shape = "square" if corners.mean() > 0.45 else "circle"
    elif mask[-quarter:].mean() - mask[:quarter].mean() > 0.5:
        shape = "triangle"
    else:
        shape = "cross"
    return f"{color} {shape}"


def test_the_unseen_names() -> None:
    assert len(NAMES) == len(set(NAMES)) == len(COLORS) * len(SHAPES)
    assert set(SEEN) | set(UNSEEN) == set(NAMES)
    assert not set(SEEN) & set(UNSEEN)
    for names in (SEEN, UNSEEN):
        assert {name.split()[0] for name in names} == set(COLORS)
    assert all(Counter(name.split()[1] for name in SEEN)[shape] >= len(COLORS) - 2 for shape in SHAPES)
    assert set(Counter(name.split()[0] for name in UNSEEN).values()) == {1}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Record the scenes that are drawn during the test."""
    made: list[Scene] = []

    def record(*args: object, **kwargs: object) -> Scene:
        made.append(draw_scene(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(scenes, "draw_scene", record)
    return made


@pytest.mark.long
def test_a_data_set(tmp_path: Path, seed: int, drawn: list[Scene]) -> None:
    """The data set is read with webdataset; each part has the right names, in images, captions and labels."""
    write_scenes(tmp_path, train=120, held_out=60, shard=50, seed=seed)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    assert [Path(shard).name for shard in shards] == [f"train-{i:06d}.tar" for i in range(3)]
    counts = [len(list(webdataset.WebDataset([shard], shardshuffle=False))) for shard in shards]
    assert counts == [50, 50, 20]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 120
    assert len(drawn) == 120 + 3 * 60
    trained, retrieval, seen, unseen = drawn[:120], drawn[120:180], drawn[180:240], drawn[240:]
    for sample, scene in zip(samples, trained, strict=True):
        assert sample["txt"].decode() == scene.caption
        assert np.array_equal(Image.open(io.BytesIO(sample["png"])), scene.image)

    data = BenchmarkSet.open(tmp_path / "retrieval")
    captions, owner = data.captions
    assert data.kind == "retrieval"
    assert captions == [scene.caption for scene in retrieval]
    assert owner.tolist() == list(range(60))
    for scene in (*trained, *retrieval):
        assert not {thing.name for thing in scene.things} & set(UNSEEN)
        assert not any(name in scene.caption for name in UNSEEN)
    assert {len(scene.things) for scene in trained} == {1, 2}

    for name, own, scenes_of in (("zeroshot_seen", SEEN, seen), ("zeroshot_unseen", UNSEEN, unseen)):
        data = BenchmarkSet.open(tmp_path / name)
        assert (data.kind, data.classnames, data.templates) == ("classification", list(NAMES), list(TEMPLATES))
        labels = [NAMES[i] for i in data.targets.tolist()]
        assert set(labels) <= set(own)
        assert len(set(labels)) > 5
        assert labels == [looks_like(scene.image) for scene in scenes_of]
        (batch,) = data.images(Preprocess(64))
        assert np.array_equal(batch.images.permute(0, 2, 3, 1), np.stack([scene.image for scene in scenes_of]))


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, seed: int) -> None:
    written = []
    for folder, number in (("a", seed), ("b", seed), ("c", seed + 1)):
        torch.manual_seed(number)
        write_scenes(tmp_path / folder, train=9, held_out=4, shard=4, seed=number)
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        written.append({str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert written[0].keys() == written[2].keys()
    tars = [name for name in written[0] if name.endswith(".tar")]
    assert len(tars) == 3 + 3
    assert all(written[0][name] != written[2][name] for name in tars)


def test_a_larger_data_set_begins_with_the_same_scenes(tmp_path: Path, seed: int, drawn: list[Scene]) -> None:
    write_scenes(tmp_path / "few", train=5, held_out=3, seed=seed)
    write_scenes(tmp_path / "many", train=9, held_out=3, seed=seed)
    captions = [scene.caption for scene in drawn]
    assert captions[:5] == captions[14:19]
    assert captions[5:14] == captions[23:]  # the held-out scenes do not depend on the number of training scenes
    assert captions[:3] != captions[5:8]


def test_the_drawn_thing_has_its_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in NAMES:
        for _ in range(4):
            assert looks_like(draw_scene(rng, [name], things=1).image) == name


@pytest.mark.long
def test_things_are_inside_the_image_and_do_not_overlap(seed: int) -> None:
    """By their pixels: no thing is cut off at the edge, and no pixel belongs to two things."""
    rng, side = np.random.default_rng(seed), 400
    for _ in range(80):
        things = draw_scene(rng, pixels=8).things
        masks = []
        for thing in things:
            small, big = SIZES[thing.size]
            assert small <= thing.radius <= big
            canvas = Image.new("L", (2 * side, 2 * side))  # with a margin on all sides, to see what would be cut off
            radius = thing.radius / 2 * 0.98  # a little less, because edges are drawn on whole pixels
            moved = thing._replace(x=thing.x / 2 + 0.25, y=thing.y / 2 + 0.25, radius=radius)
            wide = Image.new("RGB", canvas.size, (255, 255, 255))
            scenes._draw(ImageDraw.Draw(wide), moved, 2 * side, (255, 255, 255))
            masks.append((np.asarray(wide) != 255).any(-1))
            outside = masks[-1].copy()
            outside[side // 2 - 1 : -side // 2 + 1, side // 2 - 1 : -side // 2 + 1] = False
            assert masks[-1].any()
            assert not outside.any(), thing
        assert not any((a & b).any() for a, b in combinations(masks, 2)), things
        assert len({thing.name for thing in things}) == 2


# Captions

SAID = rf"(?:a (?P<size>small |big )?(?P<color>{'|'.join(COLORS)})? ?(?P<shape>{'|'.join(SHAPES)})" + (
    rf"|something (?P<size_>small |big )?(?P<color_>{'|'.join(COLORS)}))"
)
PLACE = r"(?:top|bottom)(?: left| right)?|left|right|middle"
ONE = re.compile(
    rf"(?:a picture of |there is |only )?(?P<it>{SAID})"
    rf"(?: at the (?P<at>{PLACE})| in the (?P<in>{PLACE}) of the picture|, (?P<after>{PLACE}))?"
)
RELATIONS = ["left of", "to the left of", "right of", "to the right of", "above", "over", "below", "under"]
LOOSE = ["and", "with", "beside"]


def describes(words: str, thing: scenes.Thing) -> bool:
    """Return whether a phrase is true of a thing, whose color or shape it must name."""
    found = re.fullmatch(SAID, words)
    assert found, words
    size, color, shape = found["size"] or found["size_"], found["color"] or found["color_"], found["shape"]
    assert color or shape
    pairs = ((size and size.strip(), thing.size), (color, thing.color), (shape, thing.shape))
    return all(not word or word == true for word, true in pairs)


def stands(a: scenes.Thing, relation: str, b: scenes.Thing) -> bool:
    far, high = abs(a.x - b.x) > abs(a.y - b.y), abs(a.y - b.y) > abs(a.x - b.x)
    return {
        "left": far and a.x < b.x, "right": far and a.x > b.x,
        "above": high and a.y < b.y, "over": high and a.y < b.y,
        "below": high and a.y > b.y, "under": high and a.y > b.y,
    }[relation.split()[-2] if relation.endswith(" of") else relation]  # fmt: skip


def is_at(place: str, thing: scenes.Thing) -> bool:
    vertical = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
    sideways = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
    return place.split() == ([word for word in (vertical, sideways) if word] or ["middle"])


def is_true(caption: str, things: tuple[scenes.Thing, ...]) -> bool:
    if len(things) == 1:
        found = ONE.fullmatch(caption)
        assert found, caption
        place = found["at"] or found["in"] or found["after"]
        return describes(found["it"], things[0]) and (not place or is_at(place, things[0]))
    thing, relation = r"((?:a|something) [a-z ]+?)", "|".join([*LOOSE, *RELATIONS])
    found = re.fullmatch(rf"(?:there is |a picture of )?{thing} ({relation}) {thing}", caption)
    assert found, caption
    first, relation, second = found.groups()
    return any(
        describes(first, a) and describes(second, b) and (relation in LOOSE or stands(a, relation, b))
        for a, b in (things, things[::-1])
    )


def test_captions_are_true(seed: int) -> None:
    """This holds for 2,000 scenes. With the caption of another scene, most are not true: the control."""
    rng = np.random.default_rng(seed)
    for count in (1, 2):
        made = [draw_scene(rng, things=count, pixels=4) for _ in range(1000)]
        assert all(is_true(scene.caption, scene.things) for scene in made)
        others = [is_true(a.caption, b.things) for a, b in pairwise(made)]
        assert sum(others) < 0.35 * len(others)


def test_captions_vary_with_few_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    captions = [draw_scene(rng, things=1 + i % 2, pixels=4).caption for i in range(2000)]
    assert len(set(captions)) > 1000
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert {*COLORS, *SHAPES, *SIZES, "left", "right", "above", "below", "middle"} <= words
    assert len(words) < 50
    for some in (SIZES, ("left", "right", "top", "bottom", "middle", "above", "over", "below", "under")):
        given = [any(word in caption for word in some) for caption in captions]
        assert 0.2 < sum(given) / len(given) < 0.8  # a size, a position or a relation is often left out
    assert all(any(name in caption for name in NAMES) for caption in captions)


def test_articles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    captions = [draw_scene(rng, things=1 + i % 2, pixels=4).caption for i in range(1000)]
    captions += [template.replace("{c}", name) for template in TEMPLATES for name in NAMES]
    wrong = re.compile(r"\ba [aeiou]|\ban [^aeiou]|\ba something|  |\ba a\b| $|^ | ,")
    assert not [caption for caption in captions if wrong.search(caption)]
    assert wrong.search("there is a orange star")  # the control
