"""`build_search`: any source, continuing, adds, drops and changes, kills, two builders, damaged files, other models."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode, pixels, tiny_embedder, tiny_tokenizer, write_shards, write_tar

import dualenc.search.build as build_module
import dualenc.search.sources as sources
from dualenc import DataError, Index, ModelError, ShardIndex, TextConfig
from dualenc.data.pairs import captions_of, decode_sample
from dualenc.inference.text_model import TextPredictor
from dualenc.models import HeadConfig, TextModel
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.search.build import build_search
from dualenc.search.folder import building


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "segments").iterdir()}


def pictures(folder: Path, seed: int, count: int) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for path in paths:
        path.write_bytes(encode(pixels(rng)))
    return paths


def text_model(seed: int) -> TextPredictor:
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=tokenizer.context_length)
    prompts = EmbeddingConfig(prompts={"query": "two ", "document": "red "})
    return TextPredictor(
        TextModel(config, {"vector": HeadConfig("embedding", problem="cosine", embedding=prompts)}).eval(), tokenizer
    )


@pytest.fixture
def model(seed: int) -> Any:
    return tiny_embedder(seed)


def test_pictures_of_shards_with_captions_and_fields(model: Any, tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path / "shards", [11, 1, 7], seed, captions=2)
    made = build_search(model, [str(tmp_path / "shards")], tmp_path / "out", workers=0, batch_size=4)
    index, samples = Index.open(tmp_path / "out", model), list(ShardIndex.build(str(tmp_path / "shards")))
    assert (len(index), index.kind, index.dims, made.new) == (19, "images", 8, 19)
    vectors = model.embed_images([decode_sample(sample) for sample in samples]).numpy()
    np.testing.assert_allclose(index.vectors.take(np.arange(19)), vectors, atol=1e-3)
    for row, sample in enumerate(samples):
        record = index.record(row)
        assert record["key"] == sample.key
        assert record["source"] == sample.shard
        assert record["captions"] == captions_of(sample, "auto")
        assert record["fields"]["number"] == row
        assert index.image_bytes(row) == (sample.read("png"), "image/png")
        assert (np.asarray(index.image(row)) == decode_sample(sample).permute(1, 2, 0).numpy()).all()
    assert {field["name"]: field["type"] for field in index.about["fields"]}["width"] == "number"
    assert set(index.about["examples"]) <= {captions_of(sample, "auto")[0] for sample in samples}


def test_captions_of_shards(model: Any, tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path / "shards", [5, 4], seed, captions=2)
    build_search(model, [str(tmp_path / "shards")], tmp_path / "out", texts=True)
    index = Index.open(tmp_path / "out", model)
    texts = [text for sample in ShardIndex.build(str(tmp_path / "shards")) for text in captions_of(sample, "auto")]
    assert [index.record(row)["captions"] for row in range(len(index))] == [[text] for text in texts]
    np.testing.assert_allclose(index.vectors.take(np.arange(18)), model.embed_texts(texts).numpy(), atol=1e-3)
    hit = next(iter(index.search(texts=[texts[7]])))
    assert hit.score == pytest.approx(1, abs=1e-3)  # of this caption, or of one with the same tokens
    assert index.image(hit.row).size == (8, 8)


def test_passages_have_the_prompts_of_the_model(tmp_path: Path, seed: int) -> None:
    model, rng = text_model(seed), np.random.default_rng(seed)
    words = ["cat", "dog", "mat", "tree", "hats", "boats"]
    lines = [
        {"_id": f"d{i}", "title": words[i], "text": f"a {words[5 - i]}", "year": int(rng.integers(9))} for i in range(6)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"_id": "x"}]))
    made = build_search(model, [str(tmp_path / "corpus.jsonl")], tmp_path / "out")
    index = Index.open(tmp_path / "out", model)
    passages = [f"{line['title']} {line['text']}" for line in lines]
    wanted = model.embed([f"red {text}" for text in passages], prompt="").numpy()
    np.testing.assert_allclose(index.vectors.take(np.arange(6)), wanted, atol=1e-3)
    np.testing.assert_allclose(index.encode(["a cat"]), model.embed(["two a cat"], prompt="").numpy(), atol=1e-6)
    assert [index.record(row)["key"] for row in range(6)] == [line["_id"] for line in lines]
    assert [one["bad"] for one in index.about["segments"]] == [1]
    assert "1 text cannot be used" in "\n".join(made.lines())
    with pytest.raises(ModelError, match="texts only"):
        index.search(images=[np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(DataError, match="not a picture"):
        index.image(0)


def test_numbers_of_tables_are_numbers(tmp_path: Path, seed: int) -> None:
    (tmp_path / "a.csv").write_text("text,year,code,name\na cat,1990,007,x\na dog,2.5,12,\n")
    build_search(text_model(seed), [str(tmp_path / "a.csv")], tmp_path / "out")
    index = Index.open(tmp_path / "out")
    fields = [index.record(row)["fields"] for row in range(2)]
    assert fields == [{"year": 1990, "code": "007", "name": "x"}, {"year": 2.5, "code": 12, "name": ""}]
    assert index.rows_where("year > 3").tolist() == [True, False]


def test_bad_samples_have_no_row(model: Any, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = encode(pixels(rng, 20, 30), "jpeg")
    samples = [
        {"__key__": "broken", "jpg": good[:50], "txt": b"a dog"},
        {"__key__": "good", "jpg": good, "txt": b"a cat"},
        {"__key__": "none", "txt": b"no picture"},
        {"__key__": "silent", "jpg": good, "json": b'{"size": NaN}'},
    ]
    write_tar(tmp_path / "a.tar", samples)
    made = build_search(model, [str(tmp_path / "a.tar")], tmp_path / "out", workers=0)
    index = Index.open(tmp_path / "out")
    assert [index.record(row)["key"] for row in range(len(index))] == ["good", "silent"]
    assert index.record(1) | {"source": ""} == {
        "key": "silent", "source": "", "captions": [], "fields": {"width": 30, "height": 20, "size": None},
    }  # fmt: skip
    assert "2 pictures cannot be used" in "\n".join(made.lines())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"nothing of the source can be used: .*decoded"):
        build_search(model, [str(tmp_path / "b")], tmp_path / "other", workers=0)


def test_shards_that_are_new_gone_or_changed(model: Any, tmp_path: Path, seed: int) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    write_shards(shards, [5, 4, 3], seed)
    build_search(model, [str(shards)], out, workers=0)
    before = times(out)
    assert not build_search(model, [str(shards)], out, workers=0).new
    assert times(out) == before
    (shards / "part-000.tar").unlink()
    write_shards(tmp_path / "new", [6, 2], seed + 1)
    changed = bytearray((shards / "part-001.tar").read_bytes())
    place = changed.index(b"IDAT") - 20  # the picture alone: the headers of the tar stay the same
    (tmp_path / "new" / "part-000.tar").rename(shards / "part-003.tar")
    sample = ShardIndex.build(str(shards / "part-001.tar"))[0]
    offset, size = sample.members["png"]
    assert offset < place < offset + size
    changed[offset : offset + size] = encode(pixels(np.random.default_rng(seed + 2))).ljust(size, b"\0")[:size]
    (shards / "part-001.tar").write_bytes(changed)
    made = build_search(model, [str(shards)], out, workers=0)
    after = times(out)
    assert len(set(before) & set(after)) == 1
    assert all(before[name] == after[name] for name in set(before) & set(after))
    assert (made.new, len(made.dropped)) == (10, 2)
    build_search(model, [str(shards)], tmp_path / "fresh", workers=0)
    assert everything(out) == everything(tmp_path / "fresh")


def test_unchanged_pictures_keep_their_embedding(
    model: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART", 4)
    paths, out, seen = pictures(tmp_path / "pictures", seed, 10), tmp_path / "out", []
    build_search(model, [str(tmp_path / "pictures")], out, workers=0)
    real = model.embed_images
    monkeypatch.setattr(
        model, "embed_images", lambda images, **rest: (seen.append(len(images)), real(images, **rest))[1]
    )
    rng = np.random.default_rng(seed + 1)
    paths[3].write_bytes(encode(pixels(rng)))  # changed
    os.utime(paths[5], ns=(1, 1))  # touched, with the same bytes
    paths[7].rename(tmp_path / "pictures" / "moved.png")
    (tmp_path / "pictures" / "000-new.png").write_bytes(encode(pixels(rng)))
    paths[9].unlink()
    build_search(model, [str(tmp_path / "pictures")], out, workers=0)
    assert sum(seen) == 2
    index = Index.open(out, model)
    names = sorted((tmp_path / "pictures").iterdir())
    assert [index.record(row)["key"] for row in range(len(index))] == list(map(str, names))
    np.testing.assert_allclose(
        index.vectors.take(np.arange(10)), real([str(name) for name in names]).numpy(), atol=1e-3
    )
    paths[0].write_bytes(paths[1].read_bytes() + b" ")
    with pytest.raises(DataError, match="has changed since"):
        index.image(names.index(paths[0]))


def test_lines_that_were_there_keep_their_embedding(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINES", 8)
    monkeypatch.setattr(sources, "CHUNK", 3)
    model, file = text_model(seed), tmp_path / "a.txt"
    file.write_text("".join(f"a cat {i}\n" for i in range(20)))
    build_search(model, [str(file)], tmp_path / "out")
    before, seen, real = times(tmp_path / "out"), [], model.embed
    monkeypatch.setattr(model, "embed", lambda texts, **rest: (seen.extend(texts), real(texts, **rest))[1])
    file.write_text("".join(f"a cat {i}\n" for i in range(20)) + "a dog\n")
    build_search(model, [str(file)], tmp_path / "out")
    assert len(set(before) & set(times(tmp_path / "out"))) == 2
    assert [text for text in seen if text.startswith("red a ")] == ["red a dog"]
    index = Index.open(tmp_path / "out", model)
    assert [index.record(row)["captions"][0] for row in (0, 19, 20)] == ["a cat 0", "a cat 19", "a dog"]


def test_another_model_or_other_options_are_refused(model: Any, tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path / "shards", [3], seed)
    source, out = [str(tmp_path / "shards")], tmp_path / "out"
    model.save(tmp_path / "model")
    build_search(str(tmp_path / "model"), source, out, workers=0)
    before = everything(out)
    other = tiny_embedder(seed + 1)
    with pytest.raises(DataError, match=r"another model .*/model, .*name a new"):
        build_search(other, source, out, workers=0)
    with pytest.raises(DataError, match="begun with"):
        build_search(model, source, out, captions="txt", workers=0)
    with pytest.raises(ModelError, match=r"was made with .*/model"):
        Index.open(out, other)
    other.save(tmp_path / "model")  # the recorded spec now names another model
    with pytest.raises(ModelError, match="was made with"):
        Index.open(out).search(texts=["a cat"])
    assert everything(out) == before
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "mine.txt").write_text("")
    with pytest.raises(DataError, match=r"holds mine\.txt"):
        build_search(model, source, tmp_path / "else", workers=0)
    with pytest.raises(DataError, match="is not an index"):
        Index.open(tmp_path / "else")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_damaged_segment_is_named_and_made_again(model: Any, tmp_path: Path, seed: int, cut: int) -> None:
    write_shards(tmp_path / "shards", [3, 4], seed)
    source, out = [str(tmp_path / "shards")], tmp_path / "out"
    build_search(model, source, out, workers=0)
    whole = everything(out)
    path = sorted((out / "segments").iterdir())[1]
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        Index.open(out)
    made = build_search(model, source, out, workers=0)
    assert made.damaged == [str(path)]
    assert everything(out) == whole
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])  # the same size, a bit of the content flipped
    assert build_search(model, source, out, workers=0).damaged == [str(path)]
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        Index.open(out)
    build_search(model, source, out, workers=0)
    assert everything(out) == whole


def test_two_builders_at_once(model: Any, tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path / "shards", [3], seed)
    with building(tmp_path / "out"), pytest.raises(DataError, match="another process"):
        build_search(model, [str(tmp_path / "shards")], tmp_path / "out", workers=0)
    build_search(model, [str(tmp_path / "shards")], tmp_path / "out", workers=0)  # the lock is free again


def test_a_killed_build_continues_bit_equal(model: Any, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, out = [str(tmp_path / "shards")], tmp_path / "out"
    write_shards(tmp_path / "shards", [6, 5, 7, 3, 4], seed)
    write_shards(tmp_path / "before", [6, 5], seed + 1)
    build_search(
        model, [str(tmp_path / "before"), *source], out, workers=0, batch_size=4
    )  # a build to bring up to date
    for name in ("part-001.tar", "part-003.tar"):
        (tmp_path / "shards" / name).unlink()
    write_shards(tmp_path / "new", [5, 5, 5], seed + 2)
    source.append(str(tmp_path / "new"))
    real_write, real_json = build_module.write_segment, build_module.write_json
    for _ in range(4):
        steps = int(rng.integers(0, 5))

        def kill_at(real: Any, *arguments: Any, steps: list[int] = [steps], **rest: Any) -> None:  # noqa: B006
            if not steps[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            steps[0] -= 1
            real(*arguments, **rest)

        if not (child := os.fork()):
            try:
                build_module.write_segment = partial(kill_at, real_write)
                build_module.write_json = partial(kill_at, real_json)
                build_search(model, source, out, workers=0, batch_size=4)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        (out / "segments" / ".x.safetensors-ab12.part").write_bytes(b"of one that was killed")
    build_search(model, source, out, workers=0, batch_size=4)
    build_search(model, source, tmp_path / "whole", workers=0, batch_size=4)
    assert everything(out) == everything(tmp_path / "whole")
    assert len(Index.open(out).about["segments"]) == 6
