"""Sources that hold their images themselves: tables with a column of images, and shards."""

import json
import re
import shlex
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fits import fails, fit
from helpers import caption, encode, pixels, write_tar
from test_make_shards import Stop, content, read, stop_after, table_of, texts

import dualenc
from dualenc.cli import main
from dualenc.data import ShardIndex
from dualenc.data.pairs import only_pairs
from dualenc.data.prepare.make_shards import make_shards
from dualenc.utils.errors import DataError


def images(rng, count):
    """Return the bytes of different images in all formats."""
    return [encode(pixels(rng), ("png", "jpeg", "webp")[i % 3]) for i in range(count)]


def rows_of(rng, count):
    """Return rows as Hugging Face stores them; many datasets give all images one path, or none."""
    paths = ["image.jpg", None, "sub/7.png"]
    return [
        {"image": {"bytes": data, "path": paths[int(rng.integers(3))]}, "text": text, "width": i, "label": f"l{i % 3}"}
        for i, (data, text) in enumerate(zip(images(rng, count), texts(rng, count)))
    ]


def parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def image_of(sample):
    return next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)


def without_names(out):
    """Return the images, captions and fields of the samples in order, without the names of the files."""
    found = []
    for sample in read(out):
        about = json.loads(sample["json"])
        about.pop("file")
        found.append((image_of(sample), sample["txt"], about))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_with_images_inside_gives_the_shards_of_a_table_of_files(tmp_path, seed, workers):
    """The same samples in the same order, from one table or several, with any row groups and either kind of column."""
    rng = np.random.default_rng(seed)
    rows = rows_of(rng, 23)
    named = []
    for i, row in enumerate(rows):
        (tmp_path / f"{i}").write_bytes(row["image"]["bytes"])
        named.append({**row, "image": f"{i}"})
    options = {"samples": 7, "seed": seed % 1000, "workers": workers}
    make_shards(table_of(tmp_path / "t.jsonl", named), tmp_path / "files", **options)
    expected = without_names(tmp_path / "files")
    assert len(expected) == 23
    sources = {"one": [parquet(tmp_path / "one.parquet", rows, row_group_size=4)]}
    cuts = [0, 6, 6, 15, 23]
    sources["several"] = [
        parquet(tmp_path / "several" / f"train-{n:05d}-of-00004.parquet", rows[a:b]) if a < b else None
        for n, (a, b) in enumerate(pairwise(cuts))
    ]
    plain = [{**row, "image": row["image"]["bytes"]} for row in rows]
    sources["bytes"] = [parquet(tmp_path / "bytes" / "00000.parquet", plain)]
    for name, tables in sources.items():
        given = [table for table in tables if table]
        ways = [given, f"{given[0].parent}/{'one*' if name == 'one' else '*'}"]
        for number, way in enumerate(ways if name != "bytes" else [*ways, given[0].parent]):
            out = tmp_path / f"{name}{number}"
            summary = make_shards(way, out, **options)
            assert without_names(out) == expected
            assert (summary.samples, summary.left_out) == (23, {})
            assert not [path for path in out.iterdir() if path.suffix not in (".tar", ".json")]


def test_the_names_of_the_images(tmp_path, seed):
    rows = rows_of(np.random.default_rng(seed), 9)
    make_shards(parquet(tmp_path / "t.parquet", rows), tmp_path / "out", workers=0)
    fields = [json.loads(sample["json"]) for sample in read(tmp_path / "out")]
    names = {about["width"]: about["file"] for about in fields}
    assert names == {i: row["image"]["path"] or f"row {i + 1}" for i, row in enumerate(rows)}


def img2dataset_rows(rng, count):
    """Return rows as img2dataset writes them with `--output_format parquet`: no bytes where the download failed."""
    rows = []
    for i, (data, text) in enumerate(zip(images(rng, count), texts(rng, count))):
        status = str(rng.choice(["success", "failed_to_download", "failed_to_resize"], p=[0.3, 0.5, 0.2]))
        status = ["success", "failed_to_download", "failed_to_resize"][i] if i < 3 else status
        good = status == "success"
        error = None if good else f"HTTP Error {int(rng.integers(400, 505))}"
        rows.append({
            "url": f"http://127.0.0.1/{i}.jpg", "caption": text, "key": f"{i:09d}", "status": status,
            "error_message": error, "width": 8 if good else None, "height": 8 if good else None,
            "sha256": "ab" if good else None, "jpg": data if good else None,
        })  # fmt: skip
    return rows


def test_tables_of_img2dataset_with_failed_rows(tmp_path, seed):
    """Failed downloads are counted by their status; even if most failed, the table is understood."""
    rng = np.random.default_rng(seed)
    rows = img2dataset_rows(rng, 60)
    for number in range(3):
        parquet(tmp_path / "set" / f"{number:05d}.parquet", rows[20 * number : 20 * number + 20], row_group_size=5)
        (tmp_path / "set" / f"{number:05d}_stats.json").write_text("{}")
    summary = make_shards(tmp_path / "set", tmp_path / "out", workers=0, val=0.2, seed=seed % 100, samples=4)
    good = {row["jpg"]: row for row in rows if row["jpg"]}
    found = [*read(tmp_path / "out"), *read(tmp_path / "out" / "held_out" / "test")]
    assert {image_of(sample) for sample in found} == set(good)
    for sample in found:
        row, about = good[image_of(sample)], json.loads(sample["json"])
        assert about["captions"] == [row["caption"]]
        assert {name: about[name] for name in ("url", "key", "width")} == {k: row[k] for k in ("url", "key", "width")}
    assert summary.samples + summary.held_out == len(good) == len(found)
    causes = {cause: len(names) for cause, names in summary.left_out.items()}
    statuses = Counter(row["status"] for row in rows if not row["jpg"])
    assert causes == {f"no image in its row ({status})": count for status, count in statuses.items()}
    places = {place for names in summary.left_out.values() for place in names}
    assert places == {f"{i // 20:05d}.parquet row {i % 20 + 1}" for i, row in enumerate(rows) if not row["jpg"]}


def test_a_table_without_any_image_is_refused(tmp_path, seed):
    rows = [{**row, "jpg": b""} for row in img2dataset_rows(np.random.default_rng(seed), 5)]
    with pytest.raises(DataError, match=r"0 of 5 samples .*no image in its row \(failed_to_download\)"):
        make_shards(parquet(tmp_path / "t.parquet", rows), tmp_path / "out", workers=0)


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "table":
        source = parquet(tmp_path / "t.parquet", [*rows_of(rng, 20), {"image": None, "text": "x"}])
    else:
        source = tmp_path / "set"
        apart(tmp_path / "set", tmp_path / "set", pairs(rng, 20))
    options = {"samples": 4, "workers": 0, "val": 0.2}
    make_shards(source, tmp_path / "whole", **options)
    for count in rng.integers(1, 6, 3).tolist():
        with pytest.raises(Stop):
            make_shards(source, tmp_path / "out", track=stop_after(count), **options)
        (tmp_path / "out" / ".pictures-left.part").write_bytes(b"of a killed process")
    make_shards(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert make_shards(source, tmp_path / "out", **options).finished_before


def test_other_images_of_the_same_captions_are_refused(tmp_path, seed):
    rows = rows_of(np.random.default_rng(seed), 6)
    table = parquet(tmp_path / "t.parquet", rows)
    make_shards(table, tmp_path / "out", workers=0)
    rows[0]["image"]["bytes"] += b"longer"
    parquet(table, rows, compression="none")
    with pytest.raises(DataError, match="begun with other rows or files"):
        make_shards(table, tmp_path / "out", workers=0)


def test_columns_of_images(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = [
        {"a": {"bytes": row["image"]["bytes"], "path": None}, "mask": encode(pixels(rng)), "say": row["text"]}
        for row in rows_of(rng, 6)
    ]
    table = parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError, match=r"usual name for images, only 'a', 'mask': .*--image_column"):
        make_shards(table, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="usual name for captions"):
        make_shards(table, tmp_path / "out", image_column="a", workers=0)
    with pytest.raises(DataError, match=r"inside|images in its column 'a'"):
        make_shards(table, tmp_path / "o", image_column="a", caption_column="say", images=tmp_path, workers=0)
    make_shards(table, tmp_path / "out", image_column="a", caption_column="say", workers=0)
    assert {image_of(s): s["txt"].decode() for s in read(tmp_path / "out")} == {r["a"]["bytes"]: r["say"] for r in rows}
    make_shards(table, tmp_path / "masks", image_column="mask", caption_column="say", workers=0)
    assert {image_of(sample) for sample in read(tmp_path / "masks")} == {row["mask"] for row in rows}
    with pytest.raises(DataError, match=r"has its images inside.*make-shards"):
        dualenc.data.BenchmarkSet.open(parquet(tmp_path / "set.parquet", rows_of(rng, 3)))


def test_what_a_shell_makes_of_a_glob(tmp_path, seed):
    """Files that img2dataset and dualenc write next to tables and shards are passed over; other tables are refused."""
    rng = np.random.default_rng(seed)
    for folder in ("tables", "shards"):
        for number in range(2):
            name = f"{tmp_path}/{folder}/{number:05d}"
            parquet(Path(f"{name}.parquet"), rows_of(rng, 4) if folder == "tables" else [{"caption": "x"}])
            Path(f"{name}_stats.json").write_text("{}")
    apart(tmp_path / "shards", tmp_path / "shards", pairs(rng, 7))
    ShardIndex.build(tmp_path / "shards")
    for folder, count in (("tables", 8), ("shards", 7)):  # next to shards, tables have no images
        names = sorted(map(str, (tmp_path / folder).iterdir()))
        for number, way in enumerate((names, tmp_path / folder, f"{tmp_path}/{folder}/*")):
            assert make_shards(way, tmp_path / f"{folder}{number}", workers=0).samples == count
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,caption\nx.png,y\n")
    with pytest.raises(DataError, match=r"a\.csv: only \.parquet tables and shards may be several"):
        make_shards([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out", workers=0)


def test_splits_are_not_mixed(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for part in range(2):
            parquet(tmp_path / f"{split}-0000{part}-of-00002.parquet", rows_of(rng, 4))
    with pytest.raises(DataError, match=r"splits test, train.*train-\*\.parquet"):
        make_shards(tmp_path, tmp_path / "out", workers=0)
    assert make_shards(f"{tmp_path}/train-*.parquet", tmp_path / "out", workers=0).samples == 8


def test_tables_of_different_columns_are_refused(tmp_path, seed):
    rows = rows_of(np.random.default_rng(seed), 6)
    first = parquet(tmp_path / "a.parquet", rows)
    for other in (
        [{**row, "image": row["image"]["bytes"]} for row in rows],
        [{**row, "more": 1} for row in rows],
        [{**row, "image": None} for row in rows],
    ):
        with pytest.raises(DataError, match=r"b\.parquet has other columns than .*a\.parquet"):
            make_shards([first, parquet(tmp_path / "b.parquet", other)], tmp_path / "out", workers=0)


def test_pointers_and_pages_in_place_of_tables_and_images(tmp_path, seed):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n"
    good = parquet(tmp_path / "a.parquet", rows_of(np.random.default_rng(seed), 3))
    for name in ("b.parquet", "b.csv", "b.jsonl", "b.json"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            make_shards(tmp_path / name, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match=r"b\.parquet is a Git LFS pointer"):
        make_shards([good, tmp_path / "b.parquet"], tmp_path / "out", workers=0)
    rows = [{"image": f"{i}.png", "caption": "x"} for i in range(6)]
    files = [pointer, b"<html>", *images(np.random.default_rng(seed), 4)]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(data)
    summary = make_shards(table_of(tmp_path / "t.jsonl", rows), tmp_path / "out", workers=0)
    causes = {names[0]: cause for cause, names in summary.left_out.items()}
    assert "Git LFS pointer" in causes["0.png"]
    assert "HTML page" in causes["1.png"]
    assert summary.samples == 4


# Shards whose images and captions are apart


def pairs(rng, count):
    """Return key -> image and caption."""
    return {f"{i:04d}": (data, f"{caption(rng)} {i}") for i, data in enumerate(images(rng, count))}


def apart(pictures, captions, made, image_prefix="", text_prefix="", form="txt"):
    """Write images and captions into different shards, the captions in another order and in other parts."""
    keys = list(made)
    for number, part in enumerate(np.array_split(keys, 2)):
        samples = [{"__key__": f"{image_prefix}{key}", "png": made[key][0]} for key in part]
        write_tar(pictures / f"shard{number}.tar", samples)
    texts = [{"txt": made[key][1].encode()} for key in keys]
    if form == "json":
        texts = [{"json": json.dumps({"caption": made[key][1], "source": "web"}).encode()} for key in keys]
    if form == "lists":
        texts = [{"json": json.dumps({"captions": [made[key][1], "second"]}).encode()} for key in keys]
    rest = [{"__key__": f"{text_prefix}{key}", **text} for key, text in zip(keys, texts)][::-1]
    name = "captions-{}.tar" if pictures == captions else "shard{}.tar"
    for number, part in enumerate(np.array_split(np.array(rest, dtype=object), 3)):
        write_tar(captions / name.format(number), list(part))


LAYOUTS = {
    "two folders, as Energon joins them": ("ds1", "ds2", "", "", "txt"),
    "two folders with captions in .json": ("ds1", "ds2", "", "", "json"),
    "lists of captions": ("ds1", "ds2", "", "", "lists"),
    "one folder": ("ds", "ds", "", "", "txt"),
    "folders within the tars": ("ds1", "ds2", "images/", "captions/", "txt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_captions_in_different_shards_are_joined_by_key(tmp_path, seed, layout):
    """The error of a run names the command whose shards it can train on."""
    pictures, captions, image_prefix, text_prefix, form = LAYOUTS[layout]
    made = pairs(np.random.default_rng(seed), 24)
    folders = list(dict.fromkeys([str(tmp_path / pictures), str(tmp_path / captions)]))
    apart(tmp_path / pictures, tmp_path / captions, made, image_prefix, text_prefix, form)
    source = {"json": "json.caption", "lists": "json.captions"}.get(form, "txt")
    with pytest.raises(DataError, match=re.escape(f"`dualenc make-shards {shlex.join(folders)} OUT`")):
        only_pairs(ShardIndex.build(folders), source)
    make_shards(folders, tmp_path / "out", workers=0)
    joined = {}
    for sample in read(tmp_path / "out"):
        about = json.loads(sample["json"])
        joined[Path(about["file"]).stem] = (image_of(sample), about["captions"])
        assert about.get("source") == ("web" if form == "json" else None)
    second = ["second"] if form == "lists" else []
    assert joined == {key: (data, [text, *second]) for key, (data, text) in made.items()}
    index, left_out = only_pairs(ShardIndex.build(tmp_path / "out"), "json.captions")
    assert (len(index), left_out) == (24, [])


@pytest.mark.long
def test_the_command_that_fit_and_doctor_name(tmp_path, seed, capsys):
    apart(tmp_path / "pictures of 24", tmp_path / "texts", pairs(np.random.default_rng(seed), 24))
    folders = [str(tmp_path / "pictures of 24"), str(tmp_path / "texts")]
    short = ["--data.val", "null", "--trainer.max_steps", "1", "--data.train"]
    line = fails(capsys, fit(tmp_path, *short, json.dumps(folders)))
    (command,) = re.findall("`dualenc (make-shards .*) OUT`", line)
    with pytest.raises(SystemExit):
        main(["doctor", *folders, "--workers", "0"])
    assert "make-shards" in capsys.readouterr().out
    main([*shlex.split(command), str(tmp_path / "out"), "--workers", "0"])
    main(fit(tmp_path, *short, str(tmp_path / "out")))
    assert "24 pairs to train on" in capsys.readouterr().err


def test_keys_that_do_not_meet_are_not_offered_to_be_joined(tmp_path, seed):
    made = pairs(np.random.default_rng(seed), 6)
    apart(tmp_path / "a", tmp_path / "b", made, text_prefix="other-")
    with pytest.raises(DataError, match="give them the same key"):
        only_pairs(ShardIndex.build([tmp_path / "a", tmp_path / "b"]), "txt")


def test_what_cannot_be_joined_is_counted(tmp_path, seed):
    made = pairs(np.random.default_rng(seed), 12)
    apart(tmp_path / "a", tmp_path / "b", made)
    for key in ("lonely", "mute"):  # more of them than of pairs
        member = {"png": made["0000"][0]} if key == "lonely" else {"txt": b"nothing to see"}
        samples = [{"__key__": f"{key}{i}", **member} for i in range(15)]
        write_tar(tmp_path / ("a" if key == "lonely" else "b") / "more.tar", samples)
    summary = make_shards([tmp_path / "a", tmp_path / "b"], tmp_path / "out", workers=0)
    assert summary.samples == 12
    assert {cause: len(names) for cause, names in summary.left_out.items()} == {
        "caption without an image": 15,
        "caption empty": 15,
    }
    assert all("mute" in name for name in summary.left_out["caption without an image"])
    assert all("lonely" in name for name in summary.left_out["caption empty"])


def test_keys_of_several_images(tmp_path, seed):
    """Whole samples may have equal keys in different shards; captions of their own must not."""
    rng = np.random.default_rng(seed)
    one, two = pairs(rng, 5), pairs(rng, 5)
    for name, made in (("0", one), ("1", two)):
        samples = [{"__key__": key, "png": data, "txt": text.encode()} for key, (data, text) in made.items()]
        write_tar(tmp_path / "set" / f"{name}.tar", samples)
    assert make_shards(tmp_path / "set", tmp_path / "out", workers=0).samples == 10
    found = {image_of(sample): sample["txt"].decode() for sample in read(tmp_path / "out")}
    assert found == dict([*one.values(), *two.values()])
    write_tar(tmp_path / "set" / "2.tar", [{"__key__": "0003", "txt": b"whose?"}])
    with pytest.raises(DataError, match=r"'0003' has images in .*0\.tar and .*1\.tar: keys must differ"):
        make_shards(tmp_path / "set", tmp_path / "other", workers=0)


def test_shards_without_captions_are_refused(tmp_path, seed):
    apart(tmp_path / "a", tmp_path / "b", pairs(np.random.default_rng(seed), 4))
    with pytest.raises(DataError, match="no captions, neither"):
        make_shards(tmp_path / "a", tmp_path / "out", workers=0)
    with pytest.raises(DataError, match=r"no images among 4 samples.*: name the shards of images"):
        make_shards(tmp_path / "b", tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="images is an option for tables only"):
        make_shards(tmp_path / "a", tmp_path / "out", images=tmp_path, workers=0)
