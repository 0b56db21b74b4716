"""Captions of samples: any encoding, lists with empty entries, nested fields, members of other names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import fails, fit
from helpers import caption, encode, pixels, write_tar

from dualenc.cli import main
from dualenc.data import PairDataset, Preprocess, ShardIndex, Tokenizer
from dualenc.data.pairs import caption_members, captions_of, only_pairs
from dualenc.utils.errors import BadSample, DataError

MARK = "\ufeff"


def index_of(folder: Path, **members: bytes) -> ShardIndex:
    """Write a shard of one sample and return its index."""
    sample = {"__key__": "k", "png": encode(pixels(np.random.default_rng(0)))}
    return ShardIndex.build(write_tar(folder / "a.tar", [{**sample, **members}]), rescan=True)


def captions(folder: Path, source: str, **members: bytes) -> list[str]:
    return captions_of(index_of(folder, **members)[0], source)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mark_is_no_part_of_a_caption(tmp_path: Path, seed: int, encoding: str) -> None:
    text = f"{caption(np.random.default_rng(seed))} é猫"
    fields = json.dumps({"captions": [text, f"{MARK} {text}\n"]}, ensure_ascii=False)
    assert captions(tmp_path, "txt", txt=f" {text}\n".encode(encoding)) == [text]
    assert captions(tmp_path, "json.captions", json=fields.encode(encoding)) == [text, text]


@pytest.mark.parametrize("text", ["", " \n", MARK, f"{MARK}\r\n", "\u200b", "\u2060\u00ad", "\x07", "\u3164"])
def test_a_caption_of_which_nothing_is_visible_is_empty(tmp_path: Path, text: str) -> None:
    index = index_of(tmp_path, txt=text.encode(), json=json.dumps({"a": text, "b": [text, None]}).encode())
    for source in ("txt", "json.a", "json.b"):
        with pytest.raises(BadSample) as error:
            captions_of(index[0], source)
        assert error.value.cause == f"{source} holds no caption, or only empty ones"


def test_empty_entries_of_a_list_are_left_out(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [f"{caption(rng)} {i}" for i in range(4)]
    entries: list[Any] = [*texts, "", " ", None, MARK, float("nan"), []]
    rng.shuffle(entries)
    found = captions(tmp_path, "json.captions", json=json.dumps({"captions": entries}).encode())
    assert found == [entry for entry in entries if entry in texts]
    assert len(found) == 4


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (["a", "b\0"], "json.c holds a caption with NUL characters"),
        ("\0", "json.c holds a caption with NUL characters"),
        (["a", "\ud800"], "json.c holds a caption not UTF-8"),
        (["a", 7], "json.c holds a caption not text"),
        ({"en": "a"}, "json.c holds a caption not text"),
    ],
)
def test_an_entry_that_is_not_a_caption_spoils_its_sample_by_name(tmp_path: Path, value: Any, cause: str) -> None:
    with pytest.raises(BadSample) as error:
        captions(tmp_path, "json.c", json=json.dumps({"c": value}).encode())
    assert error.value.cause == cause
    assert "\0" not in str(error.value)


def test_nested_fields_and_members_of_other_names(tmp_path: Path) -> None:
    fields = {
        "meta": {"caption": "one", "en.us": ["two"]},
        "a.b": "three",
        "rows": [{"text": "four"}, {"text": "five"}],
    }
    index = index_of(
        tmp_path,
        txt=b"six",
        **{"long.txt": b"seven", "meta.json": b'{"x": {"y": "eight"}}'},
        json=json.dumps(fields).encode(),
    )
    want = {
        "json.meta.caption": ["one"],
        "json.meta.en.us": ["two"],
        "json.a.b": ["three"],
        "json.rows.text": ["four", "five"],
        "txt": ["six"],
        "long.txt": ["seven"],
        "LONG.txt": ["seven"],
        "meta.json.x.y": ["eight"],
    }
    assert {source: captions_of(index[0], source) for source in want} == want
    assert caption_members("json.a.json") == ["json"]
    assert len(only_pairs(index, "meta.json.x.y")[0]) == 1


@pytest.mark.parametrize(
    ("members", "want"),
    [
        ({"txt": b"one"}, ["one"]),
        ({"txt": b"one", "json": b'{"captions": ["two", "three"], "caption": "four"}'}, ["two", "three"]),
        ({"txt": b"one", "json": b'{"caption": "four"}'}, ["one"]),  # img2dataset
        ({"json": b'{"caption": "four"}'}, ["four"]),
        ({"json": b'["x"]', "txt": b"one"}, ["one"]),
        ({"json": b'{"url": "x"}'}, "no .txt, and its .json has no field 'captions' or 'caption'"),
        ({"json": b'{"captions": []}', "txt": b"one"}, "json.captions holds no caption, or only empty ones"),
        ({"json": b'{"captions"', "txt": b"one"}, ".json cannot be read"),
    ],
)
def test_captions_are_found_sample_by_sample(tmp_path: Path, members: dict[str, bytes], want: Any) -> None:
    (tmp_path / "other").mkdir()
    index = ShardIndex.join([index_of(tmp_path, **members), index_of(tmp_path / "other", txt=b"five")])
    assert len(only_pairs(index, "auto")[0]) == 2
    assert captions_of(index[1], "auto") == ["five"]
    if isinstance(want, list):
        assert captions_of(index[0], "auto") == want
    else:
        with pytest.raises(BadSample) as error:
            captions_of(index[0], "auto")
        assert error.value.cause == want


@pytest.mark.parametrize("source", ["", "json", "json.", "csv", "caption", "meta.caption", "txt.", ".txt"])
def test_other_sources_are_refused(tmp_path: Path, source: str) -> None:
    for ask in (lambda: caption_members(source), lambda: only_pairs(index_of(tmp_path, txt=b"a"), source)):
        with pytest.raises(DataError, match="must be 'auto', 'txt' or"):
            ask()


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"meta": {"caption": "a", "lang": "en"}, "url": "x"}, "it has meta.caption, meta.lang, url"),
        ({}, "it has no fields"),
        (["a"], "it has no fields"),
        ("a", "it has no fields"),
    ],
)
def test_a_missing_field_is_answered_by_those_that_are_there(tmp_path: Path, fields: Any, detail: str) -> None:
    with pytest.raises(BadSample) as error:
        captions(tmp_path, "json.meta.text", json=json.dumps(fields).encode())
    assert error.value.cause == "its .json has no field 'meta.text'"
    assert error.value.detail == detail


def test_commands_name_the_fields_that_are_there(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    samples = [
        {"__key__": f"{i}", "png": encode(pixels(rng)), "json": json.dumps({"meta": {"said": caption(rng)}}).encode()}
        for i in range(64)  # a share of them is held out, which must not be none
    ]
    shards = write_tar(tmp_path / "shards" / "0.tar", samples)
    tokenizer = ["--data.val", "null", "--data.tokenizer", str(tmp_path / "t.json")]
    main(["tokenizer", shards, str(tmp_path / "t.json"), "--captions", "json.meta.said", "--vocab_size", "200"])
    for arguments, status in (
        (fit(tmp_path, "--data.captions", "json.said"), 2),
        (fit(tmp_path, "--data.captions", "json.said", *tokenizer), 1),
        (["tokenizer", shards, str(tmp_path / "u.json"), "--captions", "json.said"], 2),
    ):
        line = fails(capsys, arguments, status)
        assert "no field 'said'" in line
        assert "it has meta.said" in line


def test_a_batch_has_only_what_is_visible(tmp_path: Path, seed: int) -> None:
    """The samples of shards with marks equal those of the same shards without, and a mark alone is a bad sample."""
    rng = np.random.default_rng(seed)
    pictures, texts = [encode(pixels(rng)) for _ in range(12)], [caption(rng) for _ in range(12)]
    tokenizer = Tokenizer.train(texts, 270, 16, "bpe")

    def read(name: str, mark: bytes) -> Any:
        samples = [
            {"__key__": f"{i}", "png": picture, "txt": mark + text.encode()}
            for i, (picture, text) in enumerate(zip(pictures, texts))
        ]
        index = ShardIndex.build(write_tar(tmp_path / name / "0.tar", samples))
        return PairDataset(index, "txt", tokenizer, Preprocess(8), seed=seed)[0, 0, np.arange(12)]

    plain, marked = read("plain", b""), read("marked", MARK.encode())
    assert (plain.ids == marked.ids).all()
    assert len(set(plain.ids[1].tolist())) > 1  # control
    samples = [{"__key__": f"{i}", "png": pictures[i], "txt": [b"a cat", MARK.encode()][i % 2]} for i in range(6)]
    index = ShardIndex.build(write_tar(tmp_path / "alone" / "0.tar", samples))
    batch = PairDataset(index, "txt", tokenizer, Preprocess(8), seed=seed)[0, 0, np.arange(6)]
    assert {record.key for record in batch.bad} == {"1", "3", "5"}
