"""Hard negatives of pairs of texts: documents that a text model finds near a query and that are not the query's own."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualenc.data.loading.bad_samples import BadRecord, causes
from dualenc.data.text.dataset import Use, texts_of, token_hashes
from dualenc.data.text.files import TextIndex
from dualenc.inference.embed_files import Track
from dualenc.inference.text_model import TextPredictor
from dualenc.metrics import nearest
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import atomic_write
from dualenc.utils.text import plural

COLUMN = "negatives"  # of the lines that are written
CHUNK = 4096  # texts that are tokenized or embedded between two steps of a progress bar


class Mined(NamedTuple):
    """Result of `mine_negatives`."""

    out: Path
    pairs: int  # number of lines
    documents: int  # number of distinct documents
    negatives: int  # number over all pairs
    wanted: int  # number for each pair
    bad: list[BadRecord]  # lines of pairs or corpus that cannot be read

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        text = [
            f"{self.out}: {self.negatives / self.pairs:.2f} negatives for each of {plural(self.pairs, 'pair')}, the "
            f"nearest of {plural(self.documents, 'document')}; train with negatives: {COLUMN}"
        ]
        if self.negatives < self.wanted * self.pairs:
            text.append(f"fewer than {self.wanted} for some: the documents are not enough")
        if self.bad:
            text.append(f"left out {plural(len(self.bad), 'line')} that cannot be read: {causes(self.bad)}")
        return text


class _Texts(NamedTuple):
    """Distinct texts, equal where their tokens are equal."""

    texts: list[str]
    number: dict[int, int]  # by hash

    @classmethod
    def of(cls, texts: Sequence[str], hashes: Sequence[int]) -> "_Texts":
        first: dict[int, str] = {}
        for key, text in zip(hashes, texts, strict=True):
            first.setdefault(key, text)
        return cls(list(first.values()), {key: i for i, key in enumerate(first)})


def mine_negatives(
    predictor: TextPredictor,
    files: Sequence[str],
    out: str | os.PathLike[str],
    corpus: Sequence[str] = (),
    *,
    text: str = "text",
    pair: str = "pair",
    document: str = "text",
    negatives: int = 4,
    skip: int = 0,
    batch_size: int = 64,
    track: Track = lambda items, total: items,
) -> Mined:
    """Write the lines of pairs of texts, each with the documents that are nearest to its first text.

    A document that equals the first text, or a second text that any line pairs with it, is left out. Texts are equal
    where the model reads the same tokens. The search is exact.

    Args:
        predictor: the model that judges how near texts are.
        files: the pairs: `.tsv`, `.csv`, `.jsonl`; paths, globs, brace patterns.
        out: `.jsonl` to write: the columns of the lines, and `negatives`, the documents as a list, the nearest first.
        corpus: files of documents; the second texts of the pairs where there are none.
        text: column of the first text.
        pair: column of the second text.
        document: column of the documents in the files of the corpus.
        negatives: number of documents for each line.
        skip: number of the nearest documents to leave out, which may answer the first text too.
        batch_size: texts per forward pass.
        track: wraps the steps, whose number is `total`, for a progress bar.

    Raises:
        DataError: If a file is missing or lacks a column, or there is nothing to choose from.
        ValueError: If a number is too small.
    """
    if negatives < 1 or skip < 0:
        raise ValueError(f"negatives {negatives} must be at least 1, and skip {skip} at least 0")
    out, bad = Path(out), []
    index = TextIndex.build(list(files), [text, pair])
    if not str(out).endswith(".jsonl") or any(out.absolute() == Path(one).absolute() for one in index.shards):
        raise DataError(f"{out} must be a .jsonl file that is not one of the pairs")
    rows, firsts, seconds = _read(index, Use("", text, pair), bad)
    documents = seconds
    if corpus:
        _, documents, _ = _read(TextIndex.build(list(corpus), [document]), Use("", document), bad)
    if not firsts or not documents:
        raise DataError(f"no {'document' if firsts else 'pair'} can be read: {causes(bad)}")
    first, second = _hashes(predictor, firsts), _hashes(predictor, seconds)
    found = _Texts.of(documents, _hashes(predictor, documents) if corpus else second)
    queries = _Texts.of(firsts, first)
    own = _own_documents(first, second, queries, found)
    if int((own >= 0).sum(1).max()) + skip >= len(found.texts):
        raise DataError(
            f"{len(found.texts):,} distinct documents leave none for a query whose own and {skip} others are left out: "
            "name a corpus that has more, or a smaller skip"
        )
    vectors = _embed(predictor, [*queries.texts, *found.texts], batch_size, track)
    near = nearest(vectors[: len(own)], vectors[len(own) :], skip + negatives, skip=own)[0][:, skip:].tolist()
    mined = [[found.texts[i] for i in near[queries.number[key]] if i >= 0] for key in first]
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, texts in zip(rows, mined, strict=True):
            file.write(json.dumps({**index[row].read(), COLUMN: texts}, ensure_ascii=False) + "\n")
    return Mined(out, len(rows), len(found.texts), sum(map(len, mined)), negatives, bad)


def _own_documents(first: Sequence[int], second: Sequence[int], queries: _Texts, documents: _Texts) -> Tensor:
    """Return the documents (Q, P) that equal a query or its second texts, padded with -1.

    Args:
        first: hash of the first text of each pair.
        second: hash of the second text of each pair.
        queries: distinct first texts.
        documents: distinct documents.
    """
    own: list[set[int]] = [{documents.number.get(key, -1)} for key in queries.number]
    for one, other in zip(first, second, strict=True):
        own[queries.number[one]].add(documents.number.get(other, -1))
    return pad_sequence([torch.tensor(sorted(numbers)) for numbers in own], batch_first=True, padding_value=-1)


def _read(index: TextIndex, use: Use, bad: list[BadRecord]) -> tuple[list[int], list[str], list[str]]:
    """Return the rows of the readable lines, their texts, and their second texts; add the other lines to `bad`."""
    rows, texts = [], []
    for row, line in enumerate(index):
        try:
            texts.append(texts_of(line, use))
            rows.append(row)
        except BadSample as error:
            bad.append(BadRecord(row, line.shard, line.key, error.cause, error.detail))
    return rows, [text for text, *_ in texts], [other for _, *others in texts for other in others]


def _hashes(predictor: TextPredictor, texts: Sequence[str]) -> list[int]:
    """Return a hash of the tokens of each text."""
    parts = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    return [one for part in parts for one in token_hashes(predictor.tokenizer(part)).tolist()]


def _embed(predictor: TextPredictor, texts: Sequence[str], batch_size: int, track: Track) -> Tensor:
    """Return the vectors of texts."""
    starts: Any = range(0, len(texts), CHUNK)
    steps = track(starts, total=len(starts))
    return torch.cat([predictor.embed(texts[start : start + CHUNK], batch_size) for start in steps])
