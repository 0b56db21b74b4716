"""Scores of the samples of shards: a table for each shard, resumable and by parts, and a step over all tables."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, cast

import numpy as np

from dualenc.curation.duplicates import find_duplicates, normalized
from dualenc.curation.tables import (
    ABOUT,
    FORMAT,
    GLOBAL,
    KEY,
    open_table,
    read_scores,
    table_facts,
    table_path,
    write_table,
)
from dualenc.data.image_features import EmbeddingFile, file_name
from dualenc.data.pairs import caption_members
from dualenc.data.prepare.resumable import check_same, other_inputs
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.shard import Shard, content_hash
from dualenc.inference.embed_files import EmbeddedBatch, Towers, Track, check_loading, embed_parts, write_arrays
from dualenc.inference.embedder import Embedder
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import write_json
from dualenc.utils.text import plural
from dualenc.utils.urls import redact

_WHOLE = ("captions", "tokens", "width", "height")  # columns of whole numbers, -1 for null in the files


@dataclass(frozen=True)
class ScoredShards:
    """Tables that `score_shards` wrote.

    Attributes:
        out: the folder.
        samples: number of samples of all shards.
        shards: number of shards.
        before: shards whose table an earlier call wrote.
        missing: shards that lack a table, which other parts write.
        bad: samples without a score among the finished tables.
    """

    out: Path
    samples: int
    shards: int
    before: int
    missing: int
    bad: int

    def lines(self) -> list[str]:
        """Return a summary for the terminal, with the next command."""
        if self.missing:
            return [f"{self.out}: {self.missing} of {plural(self.shards, 'shard')} lack a table: run the other parts"]
        text = [f"{self.out}: scores of {plural(self.samples, 'sample')} in {plural(self.shards, 'table')}"]
        if self.before:
            text.append(f"{self.before:,} of them were there before")
        if self.bad:
            text.append(f"{plural(self.bad, 'sample')} cannot be scored: see the column problem")
        text.append(f"next: dualenc filter {quote(str(self.out))} --where 'clip_score > q(0.7)' --out kept.select")
        return text


def score_shards(
    index: ShardIndex,
    out: str | os.PathLike[str],
    models: Sequence[str],
    load: Callable[[str], Embedder],
    *,
    captions: str = "auto",
    part: tuple[int, int] = (0, 1),
    workers: int = 2,
    batch_size: int = 64,
    track: Track = lambda items, total: items,
) -> ScoredShards:
    """Write a table of scores for each shard, and once all are there, the columns that depend on all shards.

    Tables and embeddings that exist are kept: the same call resumes a stopped one, and a call with further models
    computes only theirs.

    Args:
        index: index of complete shards.
        out: folder for `scores.json`, `tables/` and `embeddings/`.
        models: names of the models; the first one's embeddings find duplicates.
        load: function that loads a model by its name.
        captions: source of the captions; see `dualenc.data.pairs.captions_of`.
        part: number and count of parts; part i of n takes the shards whose number is i modulo n.
        workers: processes that decode images.
        batch_size: images per forward pass.
        track: wrapper of the batches, whose number is `total`, for a progress bar.

    Raises:
        DataError: If two shards share a name, a shard cannot be read, the part is out of range, or the folder was begun
            with other options.
    """
    out = Path(out)
    if not (0 <= part[0] < part[1]):
        raise DataError(f"part {part[0]}/{part[1]} must be I/N with I from 0 to N-1")
    if not models:
        raise DataError("no model is named: pass --model M")
    check_loading(batch_size, workers)
    caption_members(captions)  # raises if it is not understood
    mine = list(range(part[0], len(index.parts), part[1]))
    plan = _begin(out, index, captions)
    for number, name in enumerate(models):
        embedder = load(name)
        plan = _add_model(out, plan, number, name, embedder)
        todo = [i for i in mine if not _embedded(out, number, index.parts[i], embedder.fingerprint)]
        towers = Towers(
            cast(Any, embedder.preprocess),
            partial(embedder.embed_images, batch_size=batch_size),
            embedder.model.embed_dim,
            embedder.embed_texts,
            captions,
        )
        options: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "track": track}
        for i, batches in embed_parts(index, todo, towers, **options) if todo else ():
            _write_scores(out, number, index.parts[i], embedder, batches)
    made_by = [model["made_by"] for model in plan["models"]]
    todo = [i for i in mine if not _has_table(out, index.parts[i], made_by)]
    for i in todo:
        _write_columns(out, index, i, made_by)
    missing = sum(not _has_table(out, shard, made_by) for shard in index.parts)
    bad = 0
    if not missing:
        names = [shard.facts["name"] for shard in index.parts]
        bad = finish(out, names, lambda i: embeddings_of(out, names[i]))
    return ScoredShards(out, len(index), len(index.parts), len(mine) - len(todo), missing, bad)


def _begin(out: Path, index: ShardIndex, captions: str) -> dict[str, Any]:
    """Create the folder with its `scores.json`, or check that it was begun with the same shards and captions."""
    shards: dict[str, dict[str, Any]] = {}
    for shard in index.parts:
        name = shard.facts["name"]
        if name in shards:
            raise DataError(f"two shards are called {name}: score them into two folders")
        shards[name] = {"digest": shard.facts["digest"], "samples": len(shard)}
    plan = {
        "format": FORMAT, "models": [], "captions": captions, "members": list(index.images), "shards": shards,
        "urls": [redact(s.url) if "://" in s.url else os.path.abspath(s.url) for s in index.parts],
    }  # fmt: skip
    if not (out / ABOUT).exists():
        if out.exists() and (not out.is_dir() or any(path.suffix != ".part" for path in out.iterdir())):
            raise DataError(f"{out} must be a new folder: it holds files that score did not write")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ABOUT, plan, indent=1)
        return plan
    begun = read_scores(out)
    digests = [{name: shard["digest"] for name, shard in one["shards"].items()} for one in (begun, plan)]
    described = {"shards": other_inputs(*digests), "members": f"--image {';'.join(begun['members'])}"}
    check_same(out, begun, {name: plan[name] for name in ("shards", "captions", "members")}, described)
    if begun["urls"] != plan["urls"]:  # The shards have moved.
        begun = {**begun, "urls": plan["urls"]}
        write_json(out / ABOUT, begun, indent=1)
    return begun


def _add_model(out: Path, plan: dict[str, Any], number: int, name: str, embedder: Embedder) -> dict[str, Any]:
    """Note a model in `scores.json`, or check that it is the one noted there; return the content."""
    known = plan["models"]
    if number < len(known):
        if known[number]["made_by"] != embedder.fingerprint:
            raise DataError(
                f"{out} has scores by {known[number]['name']} as model {number + 1}, which differs from {name}: give "
                "the same models in the same order, or name a new folder"
            )
        return plan
    plan = {**plan, "models": [*known, {"name": name, "made_by": embedder.fingerprint}]}
    write_json(out / ABOUT, plan, indent=1)
    return plan


def _embeddings(out: Path, number: int, shard: str) -> Path:
    return out / "embeddings" / str(number + 1) / file_name(shard)


def _embedded(out: Path, number: int, shard: Shard, made_by: str) -> bool:
    """Return whether the embeddings and scores of a shard by a model are there."""
    path = _embeddings(out, number, shard.facts["name"])
    if not path.exists():
        return False
    about = EmbeddingFile(path).about
    if (about["digest"], about["made_by"]) != (shard.facts["digest"], made_by):
        raise DataError(f"{path} is of another shard or model: remove it, and run the same dualenc score again")
    return True


def _write_scores(out: Path, number: int, shard: Shard, embedder: Embedder, batches: list[EmbeddedBatch]) -> None:
    """Write the file of a shard by a model: its images' embeddings, scores and the facts of this pass."""
    size = len(shard)
    images = normalized(np.concatenate([batch.images for batch in batches]))
    sums, counts = np.zeros(size), np.zeros(size, np.int64)
    facts = {name: np.full(size, -1, np.int32) for name in _WHOLE}
    hashes = np.array([x for batch in batches for x in batch.read.hashes], np.uint64).view(np.int64)
    text_hashes = np.zeros(size, np.uint64)
    bad: dict[int, tuple[int, str, str]] = {}
    for batch in batches:
        read = batch.read
        rows = np.array(read.text_rows, np.int64)
        if batch.texts is not None and len(rows):
            cosines = (images[rows].astype(np.float64) * normalized(batch.texts)).sum(1)
            np.add.at(sums, rows, cosines)
            np.add.at(counts, rows, 1)
            np.maximum.at(facts["tokens"], rows, _lengths(embedder, read.texts))
            for row in np.unique(rows).tolist():
                texts = [text for text, owner in zip(read.texts, read.text_rows, strict=True) if owner == row]
                text_hashes[row] = content_hash("\n".join(texts).encode())
        if read.good:
            facts["height"][read.good], facts["width"][read.good] = np.array(read.sizes).T
        for item in sorted(read.bad):
            bad.setdefault(item[0], item)
    facts["captions"] = np.where(counts > 0, counts, -1).astype(np.int32)
    score = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
    arrays = {"image": images, "clip_score": score, "piece": hashes, "text_hash": text_hashes.view(np.int64), **facts}
    about = {"format": FORMAT, "digest": shard.facts["digest"], "made_by": embedder.fingerprint}
    about |= {"keys": [], "bad": list(bad.values())}
    path = _embeddings(out, number, shard.facts["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays, about)


def _lengths(embedder: Embedder, texts: list[str]) -> np.ndarray:
    """Return the number of tokens of each text as the model reads it."""
    return np.array([len(ids) for ids in embedder.tokenizer.encode(texts)], np.int32)


def _has_table(out: Path, shard: Shard, made_by: list[str]) -> bool:
    """Return whether a shard has a table with the scores of all models."""
    path = table_path(out, shard.facts["name"])
    return path.exists() and table_facts(path) == {"digest": shard.facts["digest"], "made_by": made_by}


def embeddings_of(out: Path, shard: str) -> np.ndarray:
    """Read the embeddings (n, D) of a shard's images by the first model."""
    return EmbeddingFile(_embeddings(out, 0, shard)).rows("image")[:]


def _write_columns(out: Path, index: ShardIndex, number: int, made_by: list[str]) -> None:
    """Write the table of a shard from the files of its models; the columns that depend on all shards come later."""
    shard, start = index.parts[number], index.starts[number]
    files = [EmbeddingFile(_embeddings(out, i, shard.facts["name"])) for i in range(len(made_by))]
    first, count = files[0], len(shard)
    columns: dict[str, Any] = {
        "key": [shard.key(i) for i in range(count)],
        "row": np.arange(count, dtype=np.int32),
    }
    for i, file in enumerate(files):
        columns[f"clip_score_{i + 1}" if i else "clip_score"] = file.rows("clip_score")[:]
    whole = {name: first.rows(name)[:].astype(np.float64) for name in _WHOLE}
    whole = {name: np.where(values < 0, np.nan, values) for name, values in whole.items()}
    columns |= whole
    columns["aspect"] = whole["width"] / whole["height"]
    columns["image_hash"] = _nullable(first.image_hashes.view(np.int64))
    columns["text_hash"] = _nullable(first.rows("text_hash")[:])
    if "json" in shard.facts["extensions"]:
        uids = [_uid(index, start + i) for i in range(count)]
        if any(uid is not None for uid in uids):
            columns["uid"] = uids
    problems = {row: cause for file in reversed(files) for row, (cause, _) in file.bad.items()}
    columns["problem"] = [problems.get(i) for i in range(count)]
    write_table(table_path(out, shard.facts["name"]), columns, {"digest": shard.facts["digest"], "made_by": made_by})


def _nullable(hashes: np.ndarray) -> Any:
    """Return hashes as a column, in which 0 becomes null."""
    import pyarrow

    return pyarrow.array(hashes, mask=hashes == 0)


def _uid(index: ShardIndex, row: int) -> str | None:
    """Return the field `uid` of a sample's JSON, if it is a text."""
    sample = index[row]
    try:
        fields = sample.read_json() if "json" in sample else None
    except BadSample:
        return None
    uid = fields.get("uid") if isinstance(fields, dict) else None
    return uid if isinstance(uid, str) else None


# The step over all shards


def finish(out: Path, shards: Sequence[str], vectors: Callable[[int], np.ndarray]) -> int:
    """Write the columns that depend on all shards, unless all tables have them; return the samples without a score.

    Any process may do it, also several at once: each table is replaced as a whole, by equal content.

    Args:
        out: folder of the tables.
        shards: names of the shards in order.
        vectors: function that reads the embeddings of a shard by its number.
    """
    import pyarrow
    import pyarrow.compute

    paths = [table_path(out, name) for name in shards]
    tables = [open_table(path) for path in paths]
    counts = [table.metadata.num_rows for table in tables]
    scores = np.concatenate([table.read(["clip_score"]).column(0).to_numpy() for table in tables])
    bad = int(np.isnan(scores).sum())
    if all(set(GLOBAL) <= set(table.schema_arrow.names) for table in tables):
        return bad
    hashes = np.concatenate([table.read(["image_hash"]).column(0).fill_null(0).to_numpy() for table in tables])
    found = find_duplicates(vectors, counts, scores, hashes, out)
    keys = pyarrow.chunked_array([chunk for table in tables for chunk in table.read(["key"]).column(0).chunks])
    keys = keys.cast(pyarrow.large_string()).combine_chunks()  # 32-bit offsets end at 2 GB of keys.
    start = 0
    for path, count in zip(paths, counts, strict=True):
        rows = slice(start, start + count)
        table = open_table(path)
        columns = {name: table.read([name]).column(0) for name in table.schema_arrow.names if name not in GLOBAL}
        near = found.row[rows]
        columns["cluster"] = pyarrow.array(found.cluster[rows], mask=found.cluster[rows] < 0)
        columns["duplicate_of"] = keys.take(pyarrow.array(near, mask=near < 0)).cast(pyarrow.string())
        columns["duplicate_row"] = near
        columns["duplicate_similarity"] = found.similarity[rows]
        write_table(path, columns, json.loads(table.schema_arrow.metadata[KEY]))
        start += count
    return bad
