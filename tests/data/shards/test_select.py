"""Fields of nested JSON by name, and expressions over them: what they select, and what they say if they cannot."""

import json
import random
import re
from typing import Any

import pytest
from helpers import write_tar

from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.select import describe_fields, find_field
from dualenc.utils.errors import DataError

ROWS = [
    {"width": 100, "meta": {"width": 7, "tags": ["cat", "dog"], "by": {"name": "ann"}}, "caption": "a cat"},
    {"width": 200, "meta": {"width": 9, "tags": []}, "caption": "a dog and a cat"},
    {"width": 300, "meta": "none", "caption": ["one", "two", "three"]},
    {"width": 400, "meta": {"width": "wide", "by": {"name": "bob"}}, "caption": None},
    {"width": 500, "meta.width": 11, "boxes": [{"label": "cat", "at": [1, 2]}, {"label": "dog"}, 3]},
]


@pytest.fixture
def index(tmp_path: Any) -> ShardIndex:
    samples = [{"__key__": f"k{i}", "json": json.dumps(row).encode()} for i, row in enumerate(ROWS)]
    samples += [{"__key__": "k5", "txt": b"x"}, {"__key__": "k6", "json": b"{"}, {"__key__": "k7", "json": b"[7]"}]
    return ShardIndex.build(write_tar(tmp_path / "a.tar", samples))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("meta.width >= 7", [0, 1, 4]),
        ("meta.width > 7", [1, 4]),
        ("meta.width == 'wide'", [3]),
        ("meta.by.name in ['ann', 'bob']", [0, 3]),
        ("meta.by.name != 'ann' and width > 0", [3]),
        ("'dog' in meta.tags", [0]),
        ("len(meta.tags) == 2", [0]),
        ("len(meta.tags) < 2", [1]),
        ("len(caption) > 3", [0, 1]),
        ("3 <= len(caption) < 9", [0, 2]),
        ("not len(meta.tags)", [1]),
        ("len(meta.by) == 1", [0, 3]),
        ("'dog' in boxes.label", [4]),
        ("len(boxes.at) == 2", [4]),
        ("len('abc') == 3 and width == 100", [0]),
    ],
)
def test_expressions_over_nested_fields(index: ShardIndex, expression: str, expected: list[int]) -> None:
    assert [sample.key for sample in index.select(expression)] == [f"k{i}" for i in expected]


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("length(caption) > 3", "'length(caption)'"),
        ("len(caption, 3) > 3", "'len(caption, 3)'"),
        ("len(*caption) > 3", "'len(*caption)'"),
        ("len() > 3", "'len()'"),
        ("len(obj=caption) > 3", "'len(obj=caption)'"),
        ("caption.lower() == 'x'", "'caption.lower()'"),
        ("caption.startswith(a)", "'caption.startswith(a)'"),
        ("len(caption).real > 3", "'len(caption).real'"),
        ("'a'.join == 3", "'a'.join"),
        ("meta['width'] > 3", "meta['width']"),
        ("width + 1 > 3", "'width + 1'"),
        ("my-key > 3", "'my - key'"),
        ("width ~ 3", "invalid syntax"),
        ("keys/list.txt", "'keys / list.txt'"),
    ],
)
def test_what_is_not_understood_is_named_with_what_is(index: ShardIndex, expression: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        index.select(expression)
    text = str(error.value)
    assert said in text
    assert repr(expression) in text
    assert "len(...)" in text
    assert "meta.width" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("meta.depth > 3", ["no field 'meta.depth'", "(6 samples)", "'k0' has width, meta.width, meta.tags"]),
        ("keys.txt", ["no field 'keys.txt'", "'k0' has width", "no file"]),
        ("width > 10000", ["the condition is not met (5 samples)", "no field 'width'", "no .json (1 sample)"]),
        ("meta > 3", ["values that do not fit together", "'dict' and 'int'"]),
        ("len(width) > 3", ["values that do not fit together", "'int' has no len()"]),
        ("width.__class__ > 3", ["no field 'width.__class__'"]),
    ],
)
def test_a_selection_of_nothing_gives_the_reasons(index: ShardIndex, expression: str, parts: list[str]) -> None:
    with pytest.raises(DataError) as error:
        index.select(expression)
    assert f"{expression!r} selects 0 of 8 samples" in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_keys_in_any_encoding(index: ShardIndex, tmp_path: Any, encoding: str) -> None:
    (tmp_path / "keys.txt").write_bytes("k3\r\n\r\nk0\n".encode(encoding))
    assert [sample.key for sample in index.select(str(tmp_path / "keys.txt"))] == ["k0", "k3"]


@pytest.mark.parametrize("data", [b"k0\n\xff\n", b"k0\0\n", "k0\n".encode("utf-16-le")])
def test_a_list_of_keys_that_is_not_a_text_is_named(index: ShardIndex, tmp_path: Any, data: bytes) -> None:
    (tmp_path / "keys.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"keys\.txt (is not UTF-8|has NUL)"):
        index.select(str(tmp_path / "keys.txt"))


# Fields


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the names and values of all fields of nested objects."""
    found = [(name, value)] if name else []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += leaves(inner, f"{name}.{key}" if name else key)
    return found


def test_every_field_is_found_by_its_name(seed: int) -> None:
    """Random nested objects, with keys that have dots. A name may have several readings: one of them is found."""
    rng = random.Random(seed)

    def draw(depth: int) -> Any:
        if not depth or rng.random() < 0.3:
            return rng.randrange(10)
        return {rng.choice(["a", "b", "a.b", "c", "b.c"]): draw(depth - 1) for _ in range(3)}

    for _ in range(200):
        fields = {"x": draw(3), **{rng.choice(["a", "x.a"]): draw(2)}}
        named = leaves(fields)
        for name, value in named:
            found = find_field(fields, name)
            assert any(found is other for same, other in named if same == name), (fields, name)
            if len([1 for same, _ in named if same == name]) == 1:
                assert found is value
        for name in ("d", "x.d", "a.b.c.d", "x.a.b.c.a", ""):
            if name not in dict(named):
                with pytest.raises(KeyError):
                    find_field(fields, name)


def test_a_field_of_a_list_of_objects_is_a_list() -> None:
    rows = [{"caption": "one"}, 7, {"caption": ["two", "three"]}, {}, [{"caption": "no"}]]
    assert find_field({"annotations": rows}, "annotations.caption") == ["one", "two", "three"]
    assert find_field(rows, "caption") == ["one", "two", "three"]
    for value in ([7], [], {"caption": [1]}, "caption", None):
        with pytest.raises(KeyError):
            find_field(value, "caption.x")


def test_a_description_names_the_fields_and_stays_short(seed: int) -> None:
    rng = random.Random(seed)
    fields = {"url": "x", "meta": {"caption": "a", "size": {"width": 3}, "empty": {}}, "rows": [{"text": 1}, 3]}
    assert describe_fields(fields) == "url, meta.caption, meta.size.width, meta.empty, rows.text"
    assert describe_fields({}) == describe_fields([1]) == describe_fields("text") == "no fields"
    many = {f"{rng.random()} {'x' * 10_000}\n\x1b[31m": {"a": i} for i in range(1000)}
    assert len(describe_fields(many)) < 600
    assert not re.search(r"[\n\x1b]", describe_fields(many))
    deep: Any = 1
    for _ in range(500):
        deep = {"a": deep}
    assert describe_fields(deep) == "a.a.a.a"
