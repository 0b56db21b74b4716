"""Documents, queries and judgments in the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663).

A folder holds `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels/SPLIT.tsv`, whose
header is `query-id`, `corpus-id`, `score`. A document is relevant if its score is above 0.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dualenc.data.eval_sets.base import Problem, Problems, problem_list
from dualenc.data.text.files import Line, TextIndex
from dualenc.utils.decoding import is_blank
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import plural, printable, quoted

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
COLUMNS = ("query-id", "corpus-id", "score")
ID = "_id"


@dataclass(frozen=True, eq=False, repr=False)
class DocumentSet:
    """Documents with the queries of a split and their judgments, opened by `open_documents`.

    The documents are sorted by their id, the last one first: the order of documents of equal score in trec_eval.

    Attributes:
        path: the folder.
        name: name of the folder.
        split: name of the split.
        ids: D ids of the documents.
        query_ids: Q ids of the queries that have judgments, in the order of `queries.jsonl`.
        queries: texts of the queries.
        query: (n,) int64 query of each judgment of a relevant document.
        document: (n,) int64 its document; -1 if the corpus lacks it.
        gain: (n,) int64 its score, 1 or more.
        problems: judgments of queries or documents that are not there.
        notes: sentences on what is unusual.
        fingerprint: hash of the files.
    """

    path: str
    name: str
    split: str
    ids: list[str]
    query_ids: list[str]
    queries: list[str]
    query: np.ndarray
    document: np.ndarray
    gain: np.ndarray
    problems: list[Problem]
    notes: list[str]
    fingerprint: str
    _corpus: TextIndex
    _lines: np.ndarray  # (D,) place of each document in the corpus

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        about = [f"split {self.split}", plural(len(self), "document"), f"{len(self.queries):,} queries"]
        return f"DocumentSet({printable(self.name)}: {', '.join(about)})"

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Read documents: title and text, joined by a blank.

        Raises:
            DataError: If the file has been changed.
        """
        return [_text(self._corpus[int(self._lines[row])])[1] for row in rows]

    @property
    def corpus_fingerprint(self) -> str:
        """A hash of the file of the documents."""
        return self._corpus.fingerprint

    @cached_property
    def own_documents(self) -> np.ndarray:
        """The document that has the id of each query (Q,) int64; -1 where there is none."""
        place = {name: row for row, name in enumerate(self.ids)}
        return np.array([place.get(name, -1) for name in self.query_ids], np.int64)


def is_document_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder with one of BEIR's files."""
    return any(os.path.exists(os.path.join(path, name)) for name in (CORPUS, QUERIES, QRELS))


def open_documents(folder: str | os.PathLike[str], split: str | None = None) -> DocumentSet:
    """Open a folder in the layout of BEIR; the texts of its documents are read later.

    Args:
        folder: the folder.
        split: the split; absent, "test", or the only split.

    Raises:
        DataError: If a file is missing, a line is broken, an id occurs twice, a judgment is repeated, or no judgment
            names a query and a document that are there.
    """
    path = Path(folder)
    for name in (CORPUS, QUERIES):
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing: documents need {CORPUS}, {QUERIES} and {QRELS}/SPLIT.tsv")
    split = _split(path, split)
    corpus, asked = TextIndex.build(str(path / CORPUS)), TextIndex.build(str(path / QUERIES))
    judged = TextIndex.build(str(path / QRELS / f"{split}.tsv"), COLUMNS)
    ids, lines, empty = _documents(corpus)
    texts = dict(_items(asked))
    qrels = _judgments(judged, texts, ids)
    used = {name: row for row, name in enumerate(name for name in texts if name in qrels.queries)}
    if not used or not any(document >= 0 for _, document, _ in qrels.relevant):
        first = " and ".join(quoted(judged[0].read()[name]) for name in COLUMNS[:2])
        raise DataError(
            f"{judged.parts[0]} does not judge any document of {CORPUS} relevant to a query of {QUERIES}: compare its "
            f"ids, such as {first}, with theirs"
        )
    rows = [(used[query], document, gain) for query, document, gain in qrels.relevant]
    query, document, gain = np.array(rows, np.int64).T
    notes = [f"documents without a text, embedded as an empty text: {empty:,}"] if empty else []
    if none := len(used) - len(np.unique(query)):
        notes.append(f"queries without a relevant document, which count 0 in every metric: {none:,}")
    whole = [index.fingerprint for index in (corpus, asked, judged)]
    return DocumentSet(
        path=str(path),
        name=path.resolve().name,
        split=split,
        ids=ids,
        query_ids=list(used),
        queries=[texts[name] for name in used],
        query=query,
        document=document,
        gain=gain,
        problems=qrels.problems,
        notes=notes,
        fingerprint=hashlib.blake2b(" ".join(whole).encode(), digest_size=16).hexdigest(),
        _corpus=corpus,
        _lines=lines,
    )


class _Judged(NamedTuple):
    """Judgments as they stand in a file."""

    queries: set[str]  # those that have a judgment
    relevant: list[tuple[str, int, int]]  # query, document or -1, and score above 0; sorted by query and document
    problems: list[Problem]


def _split(path: Path, split: str | None) -> str:
    """Return the name of the split to measure on."""
    found = sorted(one.stem for one in (path / QRELS).glob("*.tsv"))
    if not found:
        raise DataError(f"{path / QRELS} holds no judgments: it needs a file such as test.tsv")
    if split is None and "test" not in found and len(found) > 1:
        raise DataError(f"{path} has the splits {', '.join(found)} but no test: name one of them")
    if split is not None and split not in found:
        raise DataError(f"{path} has no split {split!r}, only {', '.join(found)}")
    return split or ("test" if "test" in found else found[0])


def _text(line: Line) -> tuple[str, str]:
    """Return the id and the text of a document or query, with the title before it.

    Raises:
        DataError: If the line is broken; the message names it.
    """
    fields = line.read()
    for name in (ID, "text"):
        if not isinstance(fields.get(name), str):
            raise BadSample(line, f"its field {name!r} is missing" if name not in fields else f"{name!r} is not a text")
    title = fields.get("title") or ""
    if not isinstance(title, str):
        raise BadSample(line, "'title' is not a text")
    return fields[ID], f"{title} {fields['text']}".strip()


def _items(index: TextIndex) -> Iterator[tuple[str, str]]:
    """Yield the id and text of each line of a file.

    Raises:
        DataError: If a line is broken, or has the id of another one.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(index):
        name, text = _text(line)
        if name in seen:
            raise DataError(f"{line}: its {ID} {quoted(name)} is that of {index[seen[name]].key}, too: remove one")
        seen[name] = number
        yield name, text


def _documents(corpus: TextIndex) -> tuple[list[str], np.ndarray, int]:
    """Return the ids of the documents, the last first, their places in the file, and the number of empty ones."""
    ids, empty = [], 0
    for name, text in _items(corpus):
        ids.append(name)
        empty += is_blank(text)
    lines = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    return [ids[i] for i in lines], np.array(lines, np.int64), empty


def _judgments(index: TextIndex, queries: dict[str, str], ids: list[str]) -> _Judged:
    """Read the judgments of a split.

    Args:
        index: lines of the file.
        queries: text of each query by its id.
        ids: ids of the documents.

    Raises:
        DataError: If a line is broken, or judges a pair again.
    """
    place, order = {name: row for row, name in enumerate(ids)}, {name: row for row, name in enumerate(queries)}
    problems, relevant = Problems(list), []
    seen: set[tuple[str, str]] = set()
    for line in index:
        fields = line.read()
        query, document, score = (fields[name] for name in COLUMNS)
        try:
            gain = int(score)
        except ValueError:
            raise BadSample(line, f"its score {quoted(score)} is not an integer") from None
        if (query, document) in seen:
            raise DataError(f"{line} judges query {quoted(query)} and document {quoted(document)} again: remove it")
        seen.add((query, document))
        if query not in order:
            problems[f"judgment of a query that is not in {QUERIES}"].append(printable(query))
        elif document not in place:
            problems[f"judgment of a document that is not in {CORPUS}"].append(printable(document))
        if query in order and gain > 0:
            relevant.append((query, place.get(document, -1), gain))
    relevant.sort(key=lambda one: (order[one[0]], one[1]))
    return _Judged({query for query, _ in seen if query in order}, relevant, problem_list(problems))
