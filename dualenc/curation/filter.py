"""Choice of samples by conditions on their scores, without near-duplicates and without pictures of evaluation sets."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from dualenc.curation.conditions import Conditions
from dualenc.curation.duplicates import BLOCK, normalized
from dualenc.curation.score import embeddings_of
from dualenc.curation.tables import Columns, check_shards, read_scores
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.data.eval_sets.shard_sets import ShardImages
from dualenc.data.pairs import read_image_bytes
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.selection import Selection
from dualenc.data.shards.shard import partial_hash
from dualenc.inference.embedder import Embedder
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import write_json
from dualenc.utils.text import plural

Track = Callable[[Any], Iterable[Any]]  # wraps batches that have a length


class FilterRule(NamedTuple):
    """A part of a filter.

    Attributes:
        name: text of the rule.
        kept: (N,) bool, the rows that it keeps.
    """

    name: str
    kept: np.ndarray


class Leak(NamedTuple):
    """A sample whose picture is also in an evaluation set.

    Attributes:
        row: number of the sample among all.
        set: location of the evaluation set.
        item: number of its picture.
        key: name of this picture in the set.
        similarity: cosine of the two embeddings; 1 for equal files.
        equal: whether the hashes of the files are equal.
    """

    row: int
    set: str
    item: int
    key: str
    similarity: float
    equal: bool


@dataclass
class FilterResult:
    """Result of a filter.

    Attributes:
        table: folder of the scores.
        shards: index of the scored shards.
        columns: columns of all rows in order.
        rules: the parts of the filter.
        kept: (N,) bool, the rows that all rules keep.
        leaks: samples that are also in an evaluation set, by row.
        threshold: "dedup" and "against", the least similarities of duplicates and leaks, where they were asked for.
    """

    table: Path
    shards: ShardIndex
    columns: Mapping[str, np.ndarray]
    rules: list[FilterRule]
    kept: np.ndarray
    leaks: list[Leak] = field(default_factory=list)
    threshold: dict[str, float] = field(default_factory=dict)

    def removed(self) -> Iterator[tuple[str, int, int]]:
        """Yield for each rule its name, the rows that it removes, and those that no other rule removes."""
        failures = np.zeros(len(self.kept), np.int32)
        for rule in self.rules:
            failures += ~rule.kept
        for rule in self.rules:
            yield rule.name, int((~rule.kept).sum()), int((~rule.kept & (failures == 1)).sum())

    def save(self, out: str | os.PathLike[str]) -> None:
        """Write the selection and, next to it, a record of the same name with the suffix `.json`.

        Raises:
            DataError: If nothing is kept, or the selection cannot be written in this form.
        """
        if not self.kept.any():
            worst = max(self.removed(), key=lambda item: item[1])
            raise DataError(f"no sample is kept: {worst[0]!r} removes {worst[1]:,} of {len(self.kept):,}; loosen it")
        out = Path(out)
        selection = Selection.of_index(self.shards.take(np.flatnonzero(self.kept)))
        selection.save(out, self.shards)
        rules = [{"rule": name, "removes": alone, "beyond_others": beyond} for name, alone, beyond in self.removed()]
        leaks = [{**leak._asdict(), "sample": self.shards.key(leak.row)} for leak in self.leaks]
        record: dict[str, Any] = {"format": 1, "table": str(self.table), "rules": rules, "threshold": self.threshold}
        record |= {"samples": len(self.kept), "kept": int(self.kept.sum()), "digest": selection.digest, "leaks": leaks}
        write_json(out.with_suffix(".json"), record, indent=1)

    def lines(self, out: str | os.PathLike[str]) -> list[str]:
        """Return a summary for the terminal, with the next command."""
        width = max([len(rule.name) for rule in self.rules], default=0)
        text = [
            f"{name:<{width}}  removes {alone:,}, {beyond:,} of them alone" for name, alone, beyond in self.removed()
        ]
        kept, count = int(self.kept.sum()), len(self.kept)
        text.append(f"{out}: {kept:,} of {plural(count, 'sample')} stay ({kept / max(1, count):.1%})")
        if self.leaks:
            equal = sum(leak.equal for leak in self.leaks)
            record = Path(out).with_suffix(".json")
            text.append(f"{plural(len(self.leaks), 'leak')}, {equal:,} of equal files; the pairs are in {record}")
        text.append(f"next: dualenc fit --config run.yaml --data.select {quote(str(out))}")
        return text


def filter_table(
    table: str | os.PathLike[str],
    where: str | None = None,
    dedup: float | None = None,
    against: Sequence[str] = (),
    against_similarity: float = 0.95,
    load: Callable[[str], Embedder] | None = None,
    *,
    workers: int = 2,
    track: Track = iter,
) -> FilterResult:
    """Return the samples of a table that meet all rules.

    Args:
        table: folder of `dualenc score`.
        where: conditions on the columns; see `Conditions`.
        dedup: least similarity of duplicates; a row is removed if a better row of its cell is as similar.
        against: evaluation sets whose pictures must not be among the samples.
        against_similarity: least similarity of a sample and a picture of these sets.
        load: function that loads the first model of the table by its name; for `against`.
        workers: processes that decode the pictures of evaluation sets.
        track: wrapper of the batches of pictures, for a progress bar.

    Raises:
        DataError: If the tables are not finished or of other shards, or the conditions do not fit the columns.
    """
    table = Path(table)
    for name, value in (("--dedup", dedup), ("--against_similarity", against_similarity)):
        if value is not None and not 0 < value <= 1:
            raise DataError(f"{name} {value} must be a similarity above 0 and at most 1")
    if where is None and dedup is None and not against:
        raise DataError("no rule is given: pass --where, --dedup or --against")
    conditions = None if where is None else Conditions(where)
    about = read_scores(table)
    shards = ShardIndex.build(about["urls"], image=";".join(about["members"]))
    check_shards(table, about, shards)
    columns = Columns(table, [shard.facts["name"] for shard in shards.parts])
    rules = row_rules(columns, conditions, dedup)
    leaks: list[Leak] = []
    if against:
        assert load is not None
        model = about["models"][0]
        embedder = load(model["name"])
        if embedder.fingerprint != model["made_by"]:
            raise DataError(f"{model['name']} has changed since {table} was made: score into a new folder")
        for location in against:
            found = find_leaks(table, shards, columns, location, embedder, against_similarity, workers, track)
            clean = np.ones(len(shards), bool)
            clean[[leak.row for leak in found]] = False
            rules.append(FilterRule(f"against {location}", clean))
            leaks += found
    threshold = {} if dedup is None else {"dedup": dedup}
    threshold |= {"against": against_similarity} if against else {}
    kept = np.logical_and.reduce([rule.kept for rule in rules])
    return FilterResult(table, shards, columns, rules, kept, leaks, threshold)


def row_rules(columns: Columns, conditions: Conditions | None, dedup: float | None) -> list[FilterRule]:
    """Return the rules on columns; `dedup` keeps rows without a duplicate, whose similarity is null."""
    rules = [FilterRule(*rule) for rule in conditions.rules(columns)] if conditions is not None else []
    if dedup is not None:
        # The similarity is stored in fp32, so that 0.95 is compared with what 0.95 is there.
        rules.append(FilterRule(f"dedup < {dedup}", ~(columns["duplicate_similarity"] >= np.float32(dedup))))
    return rules


def find_leaks(
    table: Path,
    shards: ShardIndex,
    columns: Mapping[str, np.ndarray],
    location: str,
    embedder: Embedder,
    similarity: float,
    workers: int,
    track: Track,
) -> list[Leak]:
    """Return the samples whose picture is in an evaluation set, each with the most similar picture of the set.

    Args:
        table: folder of the scores, with the embeddings of the samples.
        shards: index of the samples.
        columns: columns of the samples.
        location: the evaluation set.
        embedder: the model of these embeddings.
        similarity: least cosine of a leak.
        workers: processes that decode.
        track: wrapper of the batches, for a progress bar.

    Raises:
        DataError: If the set cannot be read, or the embeddings have other dimensions than the model.
    """
    data = BenchmarkSet.open(location)
    items, embeddings = _embed_set(data, embedder, workers, track)
    number_of: dict[int, int] = {}
    for item in range(len(data)):
        number_of.setdefault(_item_hash(data, item), item)
    number_of.pop(0, None)
    leaks = []
    for number, shard in enumerate(shards.parts):
        rows = range(shards.starts[number], shards.starts[number + 1])
        mine = normalized(embeddings_of(table, shard.facts["name"]))
        if mine.shape[1] != embeddings.shape[1]:
            raise DataError(
                f"{table} has embeddings of {mine.shape[1]} dimensions, the model of {embeddings.shape[1]}: score into "
                "a new folder"
            )
        best, cosine = _nearest_items(mine, embeddings)
        for i, row in enumerate(rows):
            equal = number_of.get(int(columns["image_hash"][row]))
            if equal is not None:
                leaks.append(Leak(row, location, equal, data.key(equal), 1.0, True))
            elif cosine[i] >= similarity:
                item = items[best[i]]
                leaks.append(Leak(row, location, item, data.key(item), float(cosine[i]), False))
    return leaks


def _embed_set(data: BenchmarkSet, embedder: Embedder, workers: int, track: Track) -> tuple[list[int], np.ndarray]:
    """Return the numbers of the pictures of a set that can be decoded, and their embeddings (M, D)."""
    items: list[int] = []
    parts = [np.zeros((0, embedder.model.embed_dim), np.float32)]
    for batch in track(data.images(embedder.preprocess, workers=workers)):
        if batch.images is not None:
            items += batch.rows
            parts.append(normalized(embedder.embed_images(batch.images).numpy()))
    return items, np.concatenate(parts)


def _item_hash(data: BenchmarkSet, item: int) -> int:
    """Return the hash of a picture's file as in the column `image_hash`, int64; 0 if it cannot be read."""
    try:
        source: Any = data.source
        is_sharded = isinstance(source, ShardImages)
        content = read_image_bytes(source.index[item])[1] if is_sharded else source.read(item)
    except BadSample:
        return 0
    return int(np.array(partial_hash(content), np.uint64).view(np.int64))


def _nearest_items(rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number (n,) of the most similar item of each row, and the cosine; -1 where there is none."""
    best, cosine = np.zeros(len(rows), np.int64), np.full(len(rows), -1.0, np.float32)
    step = max(1, BLOCK // max(1, len(items)))
    for start in range(0, len(rows) if len(items) else 0, step):
        products = np.nan_to_num(rows[start : start + step] @ items.T, nan=-1.0)
        best[start : start + step], cosine[start : start + step] = products.argmax(1), products.max(1)
    return best, cosine
