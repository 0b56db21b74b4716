"""`dualenc build-search` and `dualenc search` as a user meets them."""

import json
from pathlib import Path

import numpy as np
import pytest
from fits import fails
from helpers import encode, pixels, tiny_embedder, write_shards

from dualenc import Index, ShardIndex
from dualenc.cli import main


@pytest.fixture
def built(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> Path:
    tiny_embedder(seed).save(tmp_path / "model")
    write_shards(tmp_path / "shards", [9, 6], seed)
    main(["build-search", str(tmp_path / "model"), str(tmp_path / "shards"), str(tmp_path / "out"), "--workers", "0"])
    printed = capsys.readouterr().out
    assert "15 pictures in 2 segments, 8 dimensions" in printed
    assert f"next: dualenc search {tmp_path / 'out'} " in printed
    return tmp_path / "out"


def test_words_and_pictures_make_one_query(
    built: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "photo.png"
    picture.write_bytes(encode(pixels(np.random.default_rng(seed))))
    main([
        "search", str(built), "a cat", str(picture), "-k", "4", "--weights", "2", "0.5", "--minus", "boats",
        "--where", "width >= 1", "--json",
    ])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    index = Index.open(built)
    options = {"minus": ["boats"], "where": "width >= 1", "k": 4}
    wanted = index.search(texts=["a cat"], images=[picture], weights=[2, 0.5], **options)
    assert [hit["row"] for hit in found["hits"]] == wanted.rows.tolist()
    assert [hit["fields"]["number"] for hit in found["hits"]] == wanted.rows.tolist()
    main(["search", str(built), str(picture), "a cat", "--weights", "0.5", "2", "-k", "3", "--minus", "boats"])
    lines = capsys.readouterr().out.splitlines()
    same = index.search(texts=["a cat"], images=[picture], weights=[2, 0.5], minus=["boats"], k=3)
    assert [line.split()[2:4] for line in lines[1:]] == [[str(hit.row), hit.key] for hit in same]
    main(["search", str(built), "a cat", "--min-score", "1.01"])
    assert capsys.readouterr().out == "no hits among 15 rows\n"


def test_long_captions_leave_room_for_the_scores(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = "a small red square and a green circle " * 20
    embedder, out = tiny_embedder(seed), tmp_path / "out"
    embedder.save(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("".join(f"{i} {text}\n" for i in range(3)))
    main(["build-search", str(tmp_path / "model"), str(tmp_path / "texts.txt"), str(out)])
    example = f"0 {text}"[:78].rsplit(" ", 1)[0]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f'next: dualenc search {out} "{example}')
    assert all(len(one) <= 80 and text.startswith(one.split(" ", 1)[1]) for one in Index.open(out).about["examples"])
    main(["search", str(out), "a cat"])
    head, *lines = capsys.readouterr().out.splitlines()
    hits = list(Index.open(out).search(texts=["a cat"]))
    assert head.split() == ["score", "row", "key", "text"]
    for rank, (line, hit) in enumerate(zip(lines, hits, strict=True), 1):
        assert " ".join(line.split()).startswith(f"{rank} {hit.score:.3f} {hit.row} {hit.key} {hit.caption[:10]}")
    assert all(len(line) <= 60 for line in lines)


def test_pictures_and_keys_are_written(built: Path, tmp_path: Path) -> None:
    main([
        "search", str(built), "a cat", "-k", "11", "--save", str(tmp_path / "saved"),
        "--select", str(tmp_path / "keys"),
    ])  # fmt: skip
    index = Index.open(built)
    hits = list(index.search(texts=["a cat"], k=11))
    saved = sorted((tmp_path / "saved").iterdir())
    assert [path.name for path in saved] == [f"{i:02d}-{hit.key}.png" for i, hit in enumerate(hits, 1)]
    assert [path.read_bytes() for path in saved] == [index.image_bytes(hit.row)[0] for hit in hits]
    chosen = ShardIndex.build(str(tmp_path / "shards")).select(str(tmp_path / "keys"))
    assert sorted(sample.key for sample in chosen) == sorted(hit.key for hit in hits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "a cat"], "missing is not an index: make one with"),
        (["OUT", "photo.jpg"], "photo.jpg does not exist"),
        (["OUT", "a cat", "-k", "0"], "--k 0 must be at least 1"),
        (["OUT", "a cat", "--weights", "1", "2"], "--weights must be 1 numbers"),
        (["OUT", "a cat", "--where", "width >"], "where 'width >' is not an expression"),
        (["OUT", "a cat", "--where", "wide > 3"], "no field 'wide'"),
        (["OUT", "a cat", "--minus", "a cat"], "cancel each other"),
        (["OUT", "OUT/search.json"], "cannot be decoded"),
        (["OUT", "a cat", "--model", "nowhere/model"], "nowhere/model"),
        (["OUT"], "needs QUERY"),
    ],
)
def test_mistakes_are_one_line(built: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, ["search", *(word.replace("OUT", str(built)) for word in words)])


def test_mistakes_of_building_are_one_line(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, shards = str(tmp_path / "model"), str(tmp_path / "shards")
    assert "match no file" in fails(capsys, ["build-search", model, str(tmp_path / "none"), str(built)])
    (tmp_path / "a.txt").write_text("a cat\n")
    assert "build an index of each" in fails(capsys, ["build-search", model, shards, str(tmp_path / "a.txt"), "x"])
    assert "begun with" in fails(capsys, ["build-search", model, str(tmp_path / "a.txt"), str(built)])
    assert "batch_size 0" in fails(capsys, ["build-search", model, shards, str(built), "--batch-size", "0"])
    assert "not a specification" in fails(capsys, ["build-search", model, shards, str(built), "--index", "best"])
