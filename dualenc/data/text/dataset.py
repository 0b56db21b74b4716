"""Batches of texts from lines of files, for one head or several."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.loading.bad_samples import BadRecord, SampleReader
from dualenc.data.loading.loader import Request
from dualenc.data.shards.shard import content_hash
from dualenc.data.text.files import Line, TextIndex
from dualenc.data.text.labels import Label, LabelReader
from dualenc.data.text.masking import Masked, Masking
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import Windowed, WindowReader, Windows
from dualenc.tokens import Tokens
from dualenc.utils.decoding import text_problem
from dualenc.utils.errors import BadSample, DataError

Pairs = Literal["joined", "apart", "none"]


class Part(NamedTuple):
    """The samples of a batch that belong to one head. A sample that is bad and measured belongs to no head."""

    # (b,) int64, index of each sample's text in the batch, in the caller's order; `Texts.rows[texts]` are their rows.
    texts: Tensor
    others: Tensor | None  # (b,) int64, index of each second text, where the head reads the texts of a pair apart
    # (b, ...) of the dtype of the head's `LabelReader`, or (t, ...) of t judged tokens; None for a head without labels
    labels: Tensor | None
    windows: Windows | None = None  # where the head judges tokens; `texts` has the first window of each sample
    ids: Tensor | None = None  # (b, 2) int64 hashes of the texts of a pair that are read apart, by `token_hashes`
    negatives: Tensor | None = None  # (m,) int64, index of each text that belongs to no sample of the head's
    negative_ids: Tensor | None = None  # (m,) int64, hashes of the negatives

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Part":
        """Return a copy on another device."""
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in self._asdict().items() if x is not None}
        return self._replace(**moved)


class Texts(NamedTuple):
    """Batch of B samples: their texts, then further windows, second texts of pairs that are read apart, and negatives.

    So text i belongs to sample i for i < B.
    """

    tokens: Tokens  # with segments where the texts of a pair are joined
    rows: Tensor  # (B,) int64, row of each sample in the index; -1 for a bad one where it is measured
    parts: dict[str, Part]  # by the heads that have samples in the batch
    masked: Masked | None  # the texts with masked tokens, where the head that reads them has samples in the batch
    bad: Sequence[BadRecord] = ()  # bad samples that were met

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Texts":
        """Return a copy on another device; rows and bad samples stay on the host."""
        return self._replace(
            tokens=self.tokens.to(device, non_blocking),
            parts={head: part.to(device, non_blocking) for head, part in self.parts.items()},
            masked=self.masked and self.masked.to(device, non_blocking),
        )


@dataclass(frozen=True)
class Needs:
    """The data that a head needs.

    Attributes:
        labels: reader of its labels; None for a head without labels.
        pairs: "joined", a line has one text, or two that the tokenizer joins; "apart", a line has two texts, each by
            itself; "none", a line has one text.
        masking: of the tokens that are chosen to be guessed, the share that the mask token replaces and the share that
            a random token replaces, see `Masking`; None for a head that reads all tokens.
        meaning: kind, problem and labels of the head, which a resumed run must have again.
        windows: reader of the lines for a head that judges tokens, in place of `labels` and `pairs`.
        negatives: further texts of a line may be negatives of all pairs of a batch.
    """

    labels: LabelReader | None = None
    pairs: Pairs = "joined"
    masking: tuple[float, float] | None = None
    meaning: tuple[str, str, tuple[str, ...]] = ("", "", ())
    windows: WindowReader | None = None
    negatives: bool = False


class Use(NamedTuple):
    """The use of a source's lines: columns that are read for a head.

    Attributes:
        head: name of the head.
        text: column of the text.
        pair: column of the second text of a pair; None for single texts.
        label: column of the label; None where no label is read.
        needs: data that the head needs.
        negatives: column of further texts that are negatives; None where none are read.
    """

    head: str
    text: str = "text"
    pair: str | None = None
    label: str | None = None
    needs: Needs = Needs()
    negatives: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read, which a reader of windows checks itself."""
        if self.needs.windows is not None:
            return []
        return [name for name in (self.text, self.pair, self.label, self.negatives) if name is not None]


class LabeledText(NamedTuple):
    """Content of a line for a head."""

    text: str
    other: str | None
    label: Label | None
    negatives: Sequence[str] = ()


def texts_of(sample: Line, use: Use, fields: Mapping[str, Any] | None = None) -> list[str]:
    """Return the text of a line, or both texts of a pair, or those of a reader of windows.

    Args:
        sample: the line.
        use: columns to read.
        fields: content of the line by column, where it has been read already.

    Raises:
        BadSample: If a text is missing, empty, not a string, not UTF-8, or has NULs.
    """
    if (reader := use.needs.windows) is not None:
        return reader.texts(reader.read(sample, False))
    fields = sample.read() if fields is None else fields
    found = []
    for name in (use.text, use.pair):
        if name is None:
            continue
        found.append(text_field(sample, fields, name))
    return found


def text_field(sample: Line, fields: Mapping[str, Any], name: str) -> str:
    """Return the text of one field of a line.

    Raises:
        BadSample: If it is missing, empty, not a string, not UTF-8, or has NULs.
    """
    text = field(sample, fields, name)
    _check_text(sample, name, text)
    return text


def negatives_of(sample: Line, use: Use, fields: Mapping[str, Any]) -> list[str]:
    """Return the negatives of a line: the texts of a list, or one text; none where the field is empty.

    Args:
        sample: the line.
        use: columns to read.
        fields: content of the line by column.

    Raises:
        BadSample: If the line lacks the field, or holds anything else.
    """
    if use.negatives is None:
        return []
    value = field(sample, fields, use.negatives)
    found = value if isinstance(value, list) else [] if value in (None, "") else [value]
    for text in found:
        _check_text(sample, use.negatives, text)
    return found


def _check_text(sample: Line, name: str, text: Any) -> None:
    """Raise BadSample if a value of a column is not a text."""
    if problem := text_problem(text):
        cause = "no text" if problem in ("empty", "not text") else f"a text {problem}"
        raise BadSample(sample, f"its column {name!r} holds {cause}")


def field(sample: Line, fields: Mapping[str, Any], name: str) -> Any:
    """Return one field of a line.

    Raises:
        BadSample: If the line lacks the field.
    """
    if name not in fields:
        raise BadSample(sample, f"it has no field {name!r}")
    return fields[name]


def label_of(sample: Line, use: Use, fields: Mapping[str, Any]) -> Label | None:
    """Return the label of a line, or None where no label is read.

    Args:
        sample: the line.
        use: columns to read.
        fields: content of the line by column.

    Raises:
        BadSample: If the field does not hold a label of the head.
    """
    reader = use.needs.labels
    if use.label is None or reader is None:
        return None
    value = field(sample, fields, use.label)
    try:
        return reader.read(value)
    except ValueError as error:
        cause = f"its column {use.label!r} does not hold {reader.expected} for head {use.head!r}"
        raise BadSample(sample, cause, str(error)) from None


def all_labels(index: TextIndex, use: Use) -> list[Label]:
    """Return the label of every line that has a readable one.

    Raises:
        DataError: If a line has a label that the head does not know; the message names both.
    """
    found = []
    for sample in index:
        try:
            fields = sample.read()
            _check_names(sample, use, fields)
            label = label_of(sample, use, fields)
        except BadSample:
            continue
        if label is not None:
            found.append(label)
    return found


def _check_names(sample: Line, use: Use, fields: Mapping[str, Any]) -> None:
    """Raise DataError if a line names a label that the head does not know."""
    reader = use.needs.labels
    if reader is None or use.label is None or use.label not in fields:
        return
    for name in reader.unknown(fields[use.label]):
        known = ", ".join(reader.names[:20]) + (", ..." if len(reader.names) > 20 else "")
        raise DataError(
            f"{sample}: label {name[:80]!r} in column {use.label!r} is not a label of head {use.head!r}, which has "
            f"{known}: add it to model.heads.{use.head}.labels, or correct the line"
        )


def all_texts(lines: Iterable[Line], use: Use, bad: list[str] | None = None) -> Iterator[str]:
    """Yield every text of lines; lines without a readable text are left out.

    Args:
        lines: the lines, such as a `TextIndex`.
        use: columns to read.
        bad: a list that takes the reason for each line that is left out.
    """
    for sample in lines:
        try:
            yield from texts_of(sample, use)
        except BadSample as error:
            if bad is not None:
                bad.append(str(error))


class TextDataset(Dataset[Texts]):
    """Batches of texts on request; see `dualenc.data.loading.loader.BatchDataset`.

    Args:
        index: the lines.
        uses: (number of files, use of their lines) of each source, in the order of the index.
        tokenizer: conversion of texts into `Tokens`.
        seed: seed of the masked tokens; None where lines are measured: then the same tokens are masked each time.
        masking: masks tokens for the head that guesses them; None masks no tokens.
        whole_words: mask whole words.
    """

    def __init__(
        self,
        index: TextIndex,
        uses: Sequence[tuple[int, Use]],
        tokenizer: Tokenizer,
        seed: int | None = None,
        masking: Masking | None = None,
        whole_words: bool = False,
    ) -> None:
        self.index, self.seed = index, seed
        self.samples = SampleReader(index, self._read, evaluation=seed is None, replacements=self._source_range)
        self.current_sample, self.locate = self.samples.current_sample, self.samples.locate
        self.uses, self.tokenizer, self.masking, self.whole_words = list(uses), tokenizer, masking, whole_words
        lines = np.cumsum([0, *index.counts()])
        files = np.cumsum([0, *(number for number, _ in uses)])
        self._bounds = lines[files]  # (U+1,) first line of each source
        self._segments = any(
            use.needs.windows is not None or (use.needs.pairs == "joined" and use.pair is not None) for _, use in uses
        )

    def _source(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def _source_range(self, row: int) -> tuple[int, int]:
        """Return the bounds of the source of a line: its first line, and the first line after it."""
        source = self._source(row)
        return int(self._bounds[source]), int(self._bounds[source + 1])

    def _read(self, row: int, sample: Line) -> Any:
        """Return the content of a line: a `LabeledText`, or what the head's reader of windows returns."""
        use = self.uses[self._source(row)][1]
        if (reader := use.needs.windows) is not None:
            item = reader.read(sample, use.label is not None)
            if problem := reader.problem(item, self.tokenizer):
                raise BadSample(sample, *problem)
            return item
        fields = sample.read()
        text, *other = texts_of(sample, use, fields)
        label, negatives = label_of(sample, use, fields), negatives_of(sample, use, fields)
        return LabeledText(text, other[0] if other else None, label, negatives)

    def __getitem__(self, request: Request) -> Texts:
        """Return the batch of an epoch's samples `rows` (B,), the first of which has place `position` in the epoch.

        Raises:
            DataError: If too many consecutive samples are bad.
        """
        epoch, position, rows = request
        items: list[Any] = []
        used: list[int] = []
        bad: list[BadRecord] = []
        for row in rows.tolist():
            number, item = self.samples.read_next_good(row, bad)
            items.append(item)
            used.append(number)
        uses = [self.uses[self._source(row)][1] for row in rows.tolist()]
        guessing = [i for i, use in enumerate(uses) if use.needs.masking is not None and used[i] >= 0]
        hidden = guessing if self.masking is not None else []
        texts = BatchTexts(self.tokenizer, items, uses, hidden if self.whole_words else [])
        tokens = Tokens.pack(texts.ids, texts.types if self._segments else None)
        masked = None
        if hidden:
            assert self.masking is not None
            # In training the draws depend on the place in the epoch, so that each epoch masks others; else on the line.
            numbers = {i: position + i if self.seed is not None else used[i] for i in hidden}
            key = (0,) if self.seed is None else (self.seed, epoch)
            masked = self.masking(tokens, key, numbers=numbers, words=texts.words if self.whole_words else None)
        parts = {}
        for head, use in {use.head: use for use in uses}.items():
            own = [i for i, one in enumerate(uses) if one.head == head and used[i] >= 0]
            if own:
                parts[head] = texts.part(own, use, tokens)
        self.current_sample.finish()
        return Texts(tokens, torch.tensor(used), parts, masked, bad)

    def sample_bytes(self) -> int:
        """See `BatchDataset.sample_bytes`."""
        return 0

    def facts(self) -> dict[str, Any]:
        """See `BatchDataset.facts`."""
        meanings = [use.needs.meaning for _, use in self.uses]
        windows = [use.needs.windows and use.needs.windows.facts for _, use in self.uses]
        return {
            "columns": [
                [use.head, use.text, use.pair, use.label, *([use.negatives] if use.negatives else [])]
                for _, use in self.uses
            ],
            "labels": [[kind, problem, list(labels)] for kind, problem, labels in meanings],
            # Left out where no head judges tokens, as in checkpoints of earlier versions.
            **({"windows": windows} if any(windows) else {}),
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": self.index.fingerprint,
            "mask": self.masking.share if self.masking else None,
            "whole_words": self.whole_words,
        }


class BatchTexts:
    """The tokens of a batch: first one text of each sample, then further windows, second texts of pairs, negatives.

    Args:
        tokenizer: conversion of texts into ids.
        items: contents of the B lines, see `TextDataset`.
        uses: use of each.
        whole: samples of which the word of each token is needed.

    Attributes:
        ids: ids of each text.
        types: segment of each token of each text.
        words: word of each token, for the texts in `whole`.
    """

    def __init__(self, tokenizer: Tokenizer, items: Sequence[Any], uses: Sequence[Use], whole: Sequence[int]) -> None:
        self.items = items
        self.ids: list[list[int]] = [[]] * len(items)
        self.words: dict[int, list[int]] = {}
        self._types: dict[int, list[int]] = {}
        self._second: dict[int, int] = {}  # text of the second text of a pair that is read apart
        self._negatives: dict[int, range] = {}  # texts of the negatives of a sample
        self._windows: dict[int, tuple[Windowed, list[int]]] = {}  # windows of a sample, and the text of each
        self._add_windows(tokenizer, uses)
        pairs = [i for i in range(len(items)) if i not in self._windows and items[i].other is not None]
        if joined := [i for i in pairs if uses[i].needs.pairs == "joined"]:
            both = tokenizer.encode_pairs([(items[i].text, items[i].other) for i in joined])
            for i, ids, segments in zip(joined, *both):
                self.ids[i], self._types[i] = ids, segments
        if whole:
            for i, ids, numbers in zip(whole, *tokenizer.encode_words([items[i].text for i in whole])):
                self.ids[i], self.words[i] = ids, numbers
        left = [i for i in range(len(items)) if not self.ids[i]]
        apart = [i for i in pairs if uses[i].needs.pairs == "apart"]
        self._second = {i: len(self.ids) + number for number, i in enumerate(apart)}
        self.ids += [[]] * len(apart)
        strings = [items[i].text for i in left] + [items[i].other for i in apart]
        numbers = [*left, *self._second.values()]
        for i in apart:
            self._negatives[i] = range(len(self.ids), len(self.ids) + len(items[i].negatives))
            self.ids += [[]] * len(items[i].negatives)
            strings += items[i].negatives
            numbers += self._negatives[i]
        for i, ids in zip(numbers, tokenizer.encode(strings)):
            self.ids[i] = ids

    def _add_windows(self, tokenizer: Tokenizer, uses: Sequence[Use]) -> None:
        """Read windows where a head judges tokens: the first one is the sample's text, the others come last."""
        for head, use in {use.head: use for use in uses}.items():
            if (reader := use.needs.windows) is None:
                continue
            own = [i for i, one in enumerate(uses) if one.head == head]
            for i, sample in zip(own, reader.windows([self.items[i] for i in own], tokenizer), strict=True):
                first = len(self.ids)
                numbers = [i, *range(first, first + len(sample.windows) - 1)]
                self.ids += [[]] * (len(numbers) - 1)
                self._windows[i] = sample, numbers
                for number, window in zip(numbers, sample.windows, strict=True):
                    self.ids[number] = window.ids
                    if window.types is not None:
                        self._types[number] = window.types

    @property
    def types(self) -> list[list[int]]:
        """The segment of each token of each text."""
        return [self._types.get(i, [0] * len(ids)) for i, ids in enumerate(self.ids)]

    def part(self, own: list[int], use: Use, tokens: Tokens) -> Part:
        """Return the part of a head.

        Args:
            own: its samples.
            use: their use.
            tokens: the batch.
        """
        if (reader := use.needs.windows) is not None:
            samples, texts = zip(*(self._windows[i] for i in own))
            labels = [label for sample in samples for window in sample.windows for label in window.labels]
            found = None if use.label is None else torch.tensor(labels, dtype=reader.dtype)
            return Part(torch.tensor(own), None, found, Windows.locate(samples, texts, tokens))
        found = None
        if use.label is not None and use.needs.labels is not None:
            found = torch.tensor([self.items[i].label for i in own], dtype=use.needs.labels.dtype)
        texts = torch.tensor(own)
        if own[0] not in self._second:
            return Part(texts, None, found)
        others, hashes = torch.tensor([self._second[i] for i in own]), token_hashes(tokens)
        part = Part(texts, others, found, ids=torch.stack([hashes[texts], hashes[others]], 1))
        if use.negatives is None:
            return part
        negatives = torch.tensor([number for i in own for number in self._negatives[i]], dtype=torch.int64)
        return part._replace(negatives=negatives, negative_ids=hashes[negatives])


def token_hashes(tokens: Tokens) -> Tensor:
    """Hash the ids of each text; return (B,) int64 in the caller's order, equal where texts are equal as tokens."""
    ids, offsets = tokens.ids.numpy(), tokens.offsets.tolist()
    found = [content_hash(ids[offsets[row] : offsets[row + 1]].tobytes()) for row in tokens.rows.tolist()]
    return torch.from_numpy(np.array(found, np.uint64).view(np.int64))
