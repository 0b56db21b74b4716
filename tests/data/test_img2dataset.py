"""The output folder of img2dataset 1.47.0 goes unchanged through doctor, index, fit and embed."""

import hashlib
import io
import json
import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fits import fit, metrics
from helpers import caption, encode, smooth, tiny_embedder, write_tar
from PIL import Image
from safetensors import safe_open

from dualenc import ShardIndex
from dualenc.cli import main
from dualenc.data import decode_image

PER_SHARD = 30  # rows of the list of addresses, of which each shard keeps those that were downloaded
ERRORS = {
    "HTTP Error 404: Not Found": "failed_to_download",
    "[Errno 104] Connection reset by peer": "failed_to_download",
    "timed out": "failed_to_download",
    "unknown url type: ''": "failed_to_download",
    "Image decoding error": "failed_to_resize",
}


TYPES = {"id": "int64", "similarity": "float64"} | dict.fromkeys(
    ("width", "height", "original_width", "original_height"), "int32"
)


class Folder(NamedTuple):
    """Folder of shards, and what it holds: all rows, and the images and captions of those that were downloaded."""

    path: Path
    rows: list[dict[str, Any]]
    good: dict[str, tuple[bytes, str]]


def write_shard(path: Path, number: int, rows: list[dict[str, Any]], images: dict[str, bytes]) -> None:
    """Write one shard with its table and its statistics; the samples are in the order in which downloads ended."""
    name, errors = f"{number:05d}", Counter(row["error_message"] for row in rows if row["error_message"])
    random.shuffle(rows)
    good = [row for row in rows if row["status"] == "success"]
    samples = [
        {
            "__key__": row["key"],
            "jpg": images[row["key"]],
            "txt": (row["caption"] or "").encode(),
            "json": json.dumps(row, indent=4).encode(),
        }
        for row in good
    ]
    write_tar(path / f"{name}.tar", samples)
    table = path / f"{name}.parquet"
    if find_spec("pyarrow"):
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema([(column, pa.type_for_alias(TYPES.get(column, "string"))) for column in rows[0]])
        parquet.write_table(pa.Table.from_pylist(rows, schema), table)
    else:  # No command reads it.
        table.write_bytes(b"PAR1" + bytes(2000) + b"PAR1")
    counts = Counter(row["status"] for row in rows)
    stats = {
        "count": len(rows), "successes": len(good), "failed_to_download": counts["failed_to_download"],
        "failed_to_resize": counts["failed_to_resize"], "duration": 6.17, "start_time": 1795998616.11,
        "end_time": 1795998622.28, "status_dict": {"success": len(good), **errors},
    }  # fmt: skip
    (path / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Folder:
    """Write three shards with failures, gaps in the keys, equal images and captions that are empty or of many lines."""
    rng, path = np.random.default_rng(seed), tmp_path / "shards"
    path.mkdir()
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for number in range(3 * PER_SHARD):
        key = f"{number // PER_SHARD:05d}{number % PER_SHARD:02d}"
        text: str | None = f"{caption(rng)} {number}"
        error = str(rng.choice(list(ERRORS))) if number % 5 == 3 else None
        if number % PER_SHARD == 4:
            text = None
        if number % PER_SHARD == 6:
            text = 'naïve café 漢字 \U0001f600 "quoted"\nsecond line\ttab'
        image = encode(smooth(rng, 40, int(rng.integers(40, 60))), "jpeg")
        if number % 10 == 7:
            image = images[next(iter(images))]
        size = None if error else Image.open(io.BytesIO(image)).size
        if not error:
            images[key] = image
        width, height = size or (None, None)
        rows.append({
            "id": number, "similarity": float(rng.random()), "NSFW": random.choice(["UNLIKELY", None]),
            "license": random.choice(["cc0", "cc-by", None]), "caption": text, "url": f"http://127.0.0.1/img/{number}.jpg",
            "key": key, "status": ERRORS[error] if error else "success", "error_message": error, "width": width,
            "height": height, "original_width": width, "original_height": height, "exif": None if error else "{}",
            "sha256": None if error else hashlib.sha256(image).hexdigest(),
        })  # fmt: skip
    for number in range(3):
        write_shard(path, number, rows[number * PER_SHARD : (number + 1) * PER_SHARD], images)
    captions = {row["key"]: row["caption"] or "" for row in rows}
    return Folder(path, rows, {key: (image, captions[key]) for key, image in images.items()})


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00002}.tar"])
def test_the_index_has_the_downloaded_rows(folder: Folder, pattern: str) -> None:
    index = ShardIndex.build(f"{folder.path}{pattern}")
    assert [part.facts["name"] for part in index.parts] == ["00000.tar", "00001.tar", "00002.tar"]
    found = {sample.key: (sample.read("jpg"), sample.read("txt").decode()) for sample in index}
    assert found == folder.good
    assert 0 < len(folder.good) < len(folder.rows)


def test_columns_select_samples(folder: Folder) -> None:
    wanted = {
        row["key"] for row in folder.rows
        if row["key"] in folder.good and row["similarity"] >= 0.3 and row["NSFW"] == "UNLIKELY" and row["width"] > 45
    }  # fmt: skip
    index = ShardIndex.build(str(folder.path)).select('similarity >= 0.3 and NSFW == "UNLIKELY" and width > 45')
    assert {sample.key for sample in index} == wanted
    assert wanted < set(folder.good)


@pytest.mark.parametrize("captions", ["txt", "json.caption"])
def test_the_doctor_counts_what_img2dataset_left(
    folder: Folder, captions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", str(folder.path), "--all", "--json", "--captions", captions])
    found = json.loads(capsys.readouterr().out)
    texts = Counter(text for _, text in folder.good.values())
    images = Counter(image for image, _ in folder.good.values())
    counts = {item["what"]: item["count"] for item in found["findings"]}
    assert found["facts"]["pairs"] == len(folder.good)
    expected = {
        f"{captions} holds no caption": texts.pop(""),
        "image identical to": sum(images.values()) - len(images),
        "caption identical to": sum(texts.values()) - len(texts),
    }
    assert all(expected.values())
    for what, count in expected.items():
        assert [n for name, n in counts.items() if name.startswith(what)] == [count]
    assert len(counts) == len(expected)


def test_embeddings_are_those_of_the_images(folder: Folder, tmp_path: Path, seed: int) -> None:
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    main(["embed", str(tmp_path / "model"), str(folder.path), str(tmp_path / "out"), "--workers", "0"])
    seen = set()
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            keys = json.loads(file.metadata()["dualenc"])["keys"]
            image, text, rows = (torch.from_numpy(file.get_tensor(name)) for name in ("image", "text", "text_rows"))
        expected = embedder.embed_images([decode_image(folder.good[key][0]) for key in keys])
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        captions = [folder.good[key][1] for key in keys]
        assert rows.tolist() == [i for i, one in enumerate(captions) if one]
        expected = embedder.embed_texts([one for one in captions if one])
        torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)
        seen.update(keys)
    assert seen == set(folder.good)
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert {item["key"] for item in bad} == {key for key, (_, text) in folder.good.items() if not text}


@pytest.mark.long
def test_a_run_trains_on_it(folder: Folder, tmp_path: Path, seed: int) -> None:
    """The second run, on the same folder, finds the index of the first one there and trains on the same pairs."""
    for number in range(2):
        run = tmp_path / f"run{number}"
        more = ("--data.val", "null", "--trainer.max_steps", "6")
        main([*fit(tmp_path, *more), "--seed_everything", str(seed), "--trainer.default_root_dir", str(run)])
        record = json.loads((run / "run.json").read_text())
        assert record["train_pairs"] == len(folder.good)
        assert len(metrics(run, "train/loss")) == 6
        assert np.isfinite(metrics(run, "train/loss")).all()
        bad = {json.loads(line)["key"] for line in (run / "bad_samples.jsonl").read_text().splitlines()}
        assert bad <= {key for key, (_, text) in folder.good.items() if not text}
