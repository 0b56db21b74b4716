"""Text files that others wrote say the same in every encoding: evaluation sets, tables, vocabularies, configs."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import caption, encode, pixels, tiny_tokenizer, write_benchmark, write_choices, write_tar

from dualenc.data import BenchmarkSet, ShardIndex, Tokenizer
from dualenc.data.prepare.make_shards import make_shards
from dualenc.data.text.files import TextIndex
from dualenc.utils.decoding import is_blank
from dualenc.utils.errors import DataError
from dualenc.utils.files import read_json

ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"]
TEXTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".token")


def encoded(text: str, encoding: str) -> bytes:
    name, _, mark = encoding.partition(" ")
    return f"{mark and chr(0xFEFF)}{text}".encode(name)


def encode_again(folder: Path, encoding: str) -> int:
    """Encode all text files of a folder again, and return their number."""
    paths = [path for path in folder.rglob("*") if path.suffix in TEXTS]
    for path in paths:
        path.write_bytes(encoded(path.read_bytes().decode(), encoding))
    return len(paths)


def content(folder: Path) -> list[Any]:
    data = BenchmarkSet.open(folder)
    assert data.problems == []
    return [data.kind, data.classnames, data.templates, data.targets.tolist(), data.captions[0], data.texts, len(data)]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval", "choice"])
def test_evaluation_sets(tmp_path: Path, seed: int, kind: str, encoding: str) -> None:
    folder = tmp_path / "set"
    if kind == "choice":
        write_choices(folder, seed)
    else:
        folder = write_benchmark(folder, seed, kind)
    before = content(folder)
    assert encode_again(folder, encoding) >= 1
    assert content(folder) == before


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_members_of_evaluation_sets(tmp_path: Path, seed: int, encoding: str) -> None:
    picture = encode(pixels(np.random.default_rng(seed)))
    for kind, member, text in (
        ("classification", "cls", "3"),
        ("retrieval", "txt", "a cat\n\ufeff\r\n two\u200b dogs\n\n"),
    ):
        folder = write_benchmark(tmp_path / kind, seed, kind)
        (folder / "test/nshards.txt").write_text("1")
        write_tar(folder / "test/0.tar", [{"__key__": "a", "png": picture, member: encoded(text, encoding)}])
        (folder / "test/dualenc.index").unlink(missing_ok=True)
        data = BenchmarkSet.open(folder)
        found = data.targets.tolist() if kind == "classification" else data.captions[0]
        assert found == ([3] if kind == "classification" else ["a cat", "two\u200b dogs"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\n\0\nc", r"classnames\.txt has NUL"),
        ("a\n\u200b\nc".encode(), r"classnames\.txt: line 2 is blank"),
        ("\ufeff\na".encode(), r"classnames\.txt: line 1 is blank"),
        ("\ufeff\n\u2060".encode(), r"classnames\.txt is empty"),
        ("a\nb".encode("utf-16-be"), r"classnames\.txt has NUL"),
        ("a\nb".encode("utf-16")[:-1], r"classnames\.txt is not UTF-16"),
    ],
)
def test_class_names_that_nobody_can_read(tmp_path: Path, seed: int, data: bytes, message: str) -> None:
    folder = write_benchmark(tmp_path / "set", seed)
    (folder / "classnames.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        BenchmarkSet.open(folder)


def table(rows: list[list[str]], suffix: str) -> str:
    if suffix in (".json", ".jsonl"):
        objects = [dict(zip(rows[0], row)) for row in rows[1:]]
        return json.dumps(objects) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in objects)
    file = io.StringIO()
    csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", *ENCODINGS])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_tables_of_captions(tmp_path: Path, seed: int, suffix: str, encoding: str) -> None:
    rng = np.random.default_rng(seed)
    texts = {f"{i}.png": f"{caption(rng)} é猫" for i in range(6)}
    for name in (*texts, "bad.png", "blank.png"):
        (tmp_path / name).write_bytes(encode(pixels(rng)))
    rows = [["image", "caption"], *map(list, texts.items()), ["0.png", "\ufeff more"], ["blank.png", "\u200b"]]
    rows.append(["bad.png", "a\0b"])
    (tmp_path / f"t{suffix}").write_bytes(encoded(table(rows, suffix), encoding))
    summary = make_shards(tmp_path / f"t{suffix}", tmp_path / "out", workers=0)
    found = {
        sample.read_json()["file"]: sample.read_json()["captions"] for sample in ShardIndex.build(tmp_path / "out")
    }
    assert found == {name: [text, "more"] if name == "0.png" else [text] for name, text in texts.items()}
    assert set(summary.left_out) == {"caption empty", "caption with NUL characters"}


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_tables_that_are_not_texts_are_named(tmp_path: Path, suffix: str) -> None:
    text = table([["image", "caption"], ["a.png", "a cat"]], suffix)
    for data in (text.encode("utf-16-le"), text.encode("utf-16")[:-1]):
        (tmp_path / f"t{suffix}").write_bytes(data)
        with pytest.raises(DataError, match=rf"t\{suffix} (has NUL|is not UTF-16)"):
            make_shards(tmp_path / f"t{suffix}", tmp_path / "out", workers=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_vocabularies_and_configurations(tmp_path: Path, encoding: str) -> None:
    plain = tiny_tokenizer()
    texts = ["a cat sits", "two red boats"]
    plain.save(tmp_path / "tokenizer.json")
    entries = sorted(plain.backend.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(name for name, _ in entries) + "\n", "utf-8")
    (tmp_path / "config.json").write_text('{"a": "é"}', "utf-8")
    assert encode_again(tmp_path, encoding) == 3
    for name in ("tokenizer.json", "vocab.txt"):
        assert Tokenizer.from_file(tmp_path / name, 12).encode(texts) == plain.encode(texts)
    assert read_json(tmp_path / "config.json") == {"a": "é"}


def test_lines_of_text_files(tmp_path: Path) -> None:
    lines = ["\ufeff", "a cat", "\u200b\u2060", "\u00ad", " \ufeff", "\u3164", "b\ufeff", "\x7f", "\ufeff\0"]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "\n".join(lines)).encode())
    index = TextIndex.build(str(tmp_path / "a.txt"))
    assert [sample.key for sample in index] == ["line 2", "line 7", "line 9"]
    assert [sample.read()["text"] for sample in list(index)[:2]] == ["a cat", "b\ufeff"]
    with pytest.raises(DataError, match="line 9: it has NUL"):
        index[2].read()
    invisible = [chr(code) for code in range(1, 0xD800) if is_blank(chr(code))]
    invisible += [chr(code) for code in range(0xE000, 0x110000) if is_blank(chr(code))]
    (tmp_path / "a.txt").write_bytes("\n".join(["a", *(c for c in invisible if c != "\n"), "b"]).encode())
    assert [sample.read()["text"] for sample in TextIndex.build(str(tmp_path / "a.txt"))] == ["a", "b"]
    for suffix, text in ((".csv", "text\na"), (".tsv", "text\na"), (".jsonl", '{"text": "a"}')):
        (tmp_path / f"b{suffix}").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf" + text.encode())
        assert [sample.read() for sample in TextIndex.build(str(tmp_path / f"b{suffix}"), ["text"])] == [{"text": "a"}]
