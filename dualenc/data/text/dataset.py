"""Lines and plan to batches of texts, for one head or several."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.loading.bad_samples import Bad, SampleReader
from dualenc.data.loading.loader import Request
from dualenc.data.text.files import Line, TextIndex
from dualenc.data.text.masking import Masked, Masking
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.tokens import Tokens
from dualenc.utils.errors import BadSample, DataError

SEPARATOR = "|"  # of several labels in one field


class Part(NamedTuple):
    """What one head has of a batch. A sample that is bad and measured has no part in it."""

    texts: (
        Tensor  # (b,) int64, which of the batch's texts, in the caller's order; `Texts.rows[texts]` are their numbers
    )
    others: Tensor | None  # (b,) int64, the second texts of an embedding head's pairs
    # Single: (b,) int64; several: (b, C) float32, 0 or 1; regression, cosine: (b,) float32. None where there are none.
    labels: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Part":
        """The same on another device."""
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in self._asdict().items() if x is not None}
        return self._replace(**moved)


class Texts(NamedTuple):
    """A batch of B samples: their texts, and after those the second texts of pairs whose sides are texts of their own.

    So text i is of sample i for i < B.
    """

    tokens: Tokens  # with segments where a classification head takes pairs
    rows: Tensor  # (B,) int64, number of each sample in the index; -1 for a bad one where it is measured
    parts: dict[str, Part]  # of the heads that have samples in it
    masked: Masked | None  # the texts with words hidden, where the head that guesses them has samples in it
    bad: Sequence[Bad] = ()  # samples that were met and could not be used

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Texts":
        """The same on another device; what only names the samples stays."""
        return self._replace(
            tokens=self.tokens.to(device, non_blocking),
            parts={head: part.to(device, non_blocking) for head, part in self.parts.items()},
            masked=self.masked and self.masked.to(device, non_blocking),
        )


class Use(NamedTuple):
    """What the lines of a source are for.

    Attributes:
        head: its name.
        kind: "mlm" and "rtd" have words hidden; of "classification" both texts of a pair are one, joined by the
            tokenizer; of "embedding" they are two.
        text, pair, label: columns; absent where there are none.
        labels: of a classification, in the order of the logits.
        problem: see `dualenc.models.heads.HeadConfig`.
    """

    head: str
    kind: Literal["mlm", "rtd", "classification", "embedding"]
    text: str = "text"
    pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] = ()
    problem: str = "single_label"

    @property
    def columns(self) -> list[str]:
        """Those that it reads."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]

    @property
    def hides(self) -> bool:
        """Whether words are hidden."""
        return self.kind in ("mlm", "rtd")


class LabeledText(NamedTuple):
    """What a line holds for a head."""

    text: str
    other: str | None
    label: int | list[float] | float | None


def texts_of(sample: Line, use: Use, fields: Mapping[str, Any] | None = None) -> list[str]:
    """The text of a line, or both.

    Args:
        sample: the line.
        use: what it is for.
        fields: what it holds, where that has been read.

    Raises:
        BadSample: one is missing, empty, or no text.
    """
    fields = sample.read() if fields is None else fields
    found = []
    for name in (use.text, use.pair):
        if name is None:
            continue
        text = field(sample, fields, name)
        if not isinstance(text, str) or not text.strip():
            raise BadSample(sample, f"its column {name!r} holds no text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a character
            raise BadSample(sample, f"its column {name!r} holds what is no Unicode", error.reason) from None
        found.append(text)
    return found


def field(sample: Line, fields: Mapping[str, Any], name: str) -> Any:
    """One field of a line.

    Raises:
        BadSample: there is none.
    """
    if name not in fields:
        raise BadSample(sample, f"it has no field {name!r}")
    return fields[name]


def label_of(sample: Line, use: Use, fields: Mapping[str, Any]) -> int | list[float] | float | None:
    """The label of a line that holds these fields, as numbers; None where it has none.

    Raises:
        BadSample: it is no number, or none of the head's labels.
    """
    if use.label is None:
        return None
    value = field(sample, fields, use.label)
    if use.problem in ("regression", "cosine"):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise BadSample(sample, f"its column {use.label!r} is not a number", repr(value)[:80])
        return number
    names = _names(value, use.problem)
    if unknown := [name for name in names if name not in use.labels]:
        raise BadSample(sample, f"its column {use.label!r} is no label of head {use.head!r}", repr(unknown[0])[:80])
    if use.problem == "single_label":
        return use.labels.index(names[0])
    return [float(label in names) for label in use.labels]


def _names(value: Any, problem: str) -> list[str]:
    """The labels that a field names."""
    if problem == "multi_label" and isinstance(value, str):
        items = [name for name in value.split(SEPARATOR) if name.strip()]
    elif problem == "multi_label" and isinstance(value, list):
        items = value
    else:
        items = [value]
    return [item.strip() if isinstance(item, str) else json.dumps(item) for item in items]


def all_labels(index: TextIndex, use: Use) -> list[int | list[float] | float]:
    """The label of every line that has a good one.

    Raises:
        DataError: a line has a label that the head does not know; names both.
    """
    found = []
    for sample in index:
        try:
            fields = sample.read()
            if use.label is not None and use.problem in ("single_label", "multi_label") and use.label in fields:
                for name in _names(fields[use.label], use.problem):
                    if name not in use.labels:
                        known = ", ".join(use.labels[:20]) + (", ..." if len(use.labels) > 20 else "")
                        raise DataError(
                            f"{sample}: label {name[:80]!r} in column {use.label!r} is none of head {use.head!r}, "
                            f"which has {known}: add it to model.heads.{use.head}.labels, or mend the line"
                        )
            label = label_of(sample, use, fields)
        except BadSample:
            continue
        if label is not None:
            found.append(label)
    return found


def all_texts(index: TextIndex, use: Use) -> Iterator[str]:
    """Every text of the lines; those that have no readable one are passed over."""
    for sample in index:
        try:
            yield from texts_of(sample, use)
        except BadSample:
            continue


class TextDataset(Dataset[Texts]):
    """Batches of texts, by request; see `dualenc.data.loading.loader.BatchDataset`.

    Args:
        index: the lines.
        uses: (number of files, what their lines are for) of each source, in the order of the index.
        tokenizer: texts to `Tokens`.
        seed: of the hidden words; None where it is measured: then the same are hidden each time.
        masking: hides words of the heads that guess them; absent, none are.
        whole_words: hides words whole.
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
        self.samples = SampleReader(index, self._read, measured=seed is None, alike=self._alike)
        self.progress, self.where = self.samples.progress, self.samples.where
        self.uses, self.tokenizer, self.masking, self.whole_words = list(uses), tokenizer, masking, whole_words
        lines = np.cumsum([0, *index.counts()])
        files = np.cumsum([0, *(number for number, _ in uses)])
        self._bounds = lines[files]  # (U+1,) first line of each source
        self._segments = any(use.kind == "classification" and use.pair is not None for _, use in uses)

    def _source(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def _alike(self, row: int) -> tuple[int, int]:
        """The lines of the same source: the first, and the first after them."""
        source = self._source(row)
        return int(self._bounds[source]), int(self._bounds[source + 1])

    def _read(self, row: int, sample: Line) -> LabeledText:
        use = self.uses[self._source(row)][1]
        fields = sample.read()
        text, *other = texts_of(sample, use, fields)
        return LabeledText(text, other[0] if other else None, label_of(sample, use, fields))

    def __getitem__(self, request: Request) -> Texts:
        """The batch of an epoch's samples `rows` (B,), the first of which has place `position` in the epoch.

        Raises:
            DataError: too many samples one after the other are bad.
        """
        epoch, position, rows = request
        items: list[LabeledText] = []
        used: list[int] = []
        bad: list[Bad] = []
        for row in rows.tolist():
            number, item = self.samples.read_next_good(row, bad)
            items.append(item)
            used.append(number)
        uses = [self.uses[self._source(row)][1] for row in rows.tolist()]
        joined = [i for i, use in enumerate(uses) if use.kind == "classification" and items[i].other is not None]
        apart = [i for i, use in enumerate(uses) if use.kind == "embedding" and items[i].other is not None]
        second = {i: len(items) + place for place, i in enumerate(apart)}
        hidden = [i for i, use in enumerate(uses) if use.hides and used[i] >= 0] if self.masking is not None else []
        tokens, words = self._tokens(items, joined, apart, hidden if self.whole_words else [])
        masked = None
        if hidden:
            assert self.masking is not None
            # In training by the place in the epoch, so that each epoch hides others; else by the line.
            numbers = {i: position + i if self.seed is not None else used[i] for i in hidden}
            key = (0,) if self.seed is None else (self.seed, epoch)
            masked = self.masking(tokens, key, numbers=numbers, words=words if self.whole_words else None)
        parts = {}
        for head, use in {use.head: use for use in uses}.items():
            own = [i for i, one in enumerate(uses) if one.head == head and used[i] >= 0]
            if own:
                parts[head] = _part(own, second, [items[i].label for i in own], use)
        self.progress.done()
        return Texts(tokens, torch.tensor(used), parts, masked, bad)

    def _tokens(
        self, items: list[LabeledText], joined: list[int], apart: list[int], whole: list[int]
    ) -> tuple[Tokens, dict[int, list[int]]]:
        """The texts of a batch, and of those in `whole` the word of each token."""
        texts: list[list[int]] = [[]] * (len(items) + len(apart))
        types: dict[int, list[int]] = {}
        words: dict[int, list[int]] = {}
        if joined:
            for i, ids, segments in zip(
                joined, *self.tokenizer.encode_pairs([(items[i].text, items[i].other or "") for i in joined])
            ):
                texts[i], types[i] = ids, segments
        if whole:
            for i, ids, numbers in zip(whole, *self.tokenizer.encode_words([items[i].text for i in whole])):
                texts[i], words[i] = ids, numbers
        left = [i for i in range(len(items)) if i not in types and i not in words]
        strings = [items[i].text for i in left] + [items[i].other or "" for i in apart]
        for i, ids in zip([*left, *range(len(items), len(texts))], self.tokenizer.encode(strings)):
            texts[i] = ids
        segments = [types.get(i, [0] * len(ids)) for i, ids in enumerate(texts)] if self._segments else None
        return Tokens.pack(texts, segments), words

    def facts(self) -> dict[str, Any]:
        """See `BatchDataset.facts`."""
        return {
            "columns": [[use.head, use.text, use.pair, use.label] for _, use in self.uses],
            "labels": [[use.kind, use.problem, list(use.labels)] for _, use in self.uses],
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": self.index.fingerprint,
            "mask": self.masking.share if self.masking else None,
            "whole_words": self.whole_words,
        }


def _part(own: list[int], second: dict[int, int], labels: list[Any], use: Use) -> Part:
    others = torch.tensor([second[i] for i in own]) if own[0] in second else None
    found = None
    if use.label is not None:
        found = torch.tensor(labels, dtype=torch.int64 if use.problem == "single_label" else torch.float32)
    return Part(torch.tensor(own), others, found)
