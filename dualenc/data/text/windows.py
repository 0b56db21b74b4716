"""Samples whose tokens are judged one by one: each is read as one text, or as several that overlap, called windows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.tokens import Tokens

if TYPE_CHECKING:
    from dualenc.data.text.files import Line, TextIndex


class Window(NamedTuple):
    """One text of a sample, and the tokens in it that the head judges."""

    ids: list[int]
    types: list[int] | None  # segment of each token; None where all are in the first
    places: list[int]  # (t,) places in `ids` of the judged tokens, ascending
    labels: list[Any]  # (t,) label of each judged token, or one label of the window; empty where no labels are read


class Windowed(NamedTuple):
    """A sample as windows, of which it has one at least."""

    windows: list[Window]
    kept: Any  # what the head needs to turn its logits into an answer; stays on the host


class Windows(NamedTuple):
    """The w windows of b samples of a batch."""

    tokens: Tensor  # (t,) int64, index of each judged token among the N tokens of the batch, window by window
    windows: Tensor  # (t,) int64, number of each judged token's window, ascending
    samples: Tensor  # (w,) int64, number of each window's sample, ascending
    kept: Sequence[Any] = ()  # (b,) see `Windowed.kept`

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Windows":
        """Return a copy on another device; what is kept stays on the host."""
        tokens, windows, samples = (x.to(device, non_blocking=non_blocking) for x in self[:3])
        return Windows(tokens, windows, samples, self.kept)

    @classmethod
    def locate(cls, samples: Sequence[Windowed], texts: Sequence[Sequence[int]], tokens: Tokens) -> "Windows":
        """Find the judged tokens of samples in a packed batch.

        Args:
            samples: b samples.
            texts: for each sample the number of each window's text in the batch, in the caller's order.
            tokens: the batch.
        """
        windows = [window for sample in samples for window in sample.windows]
        starts = tokens.offsets[:-1].long()[tokens.rows[torch.tensor([*chain.from_iterable(texts)])]].tolist()
        counts = torch.tensor([len(window.places) for window in windows])
        places = [start + place for start, window in zip(starts, windows, strict=True) for place in window.places]
        return cls(
            torch.tensor(places, dtype=torch.int64),
            torch.arange(len(windows)).repeat_interleave(counts),
            torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample.windows) for sample in samples])),
            [sample.kept for sample in samples],
        )


class WindowReader(ABC):
    """Conversion of a line into windows, for a head that judges tokens.

    Attributes:
        dtype: type of the labels of a batch.
    """

    dtype: ClassVar[torch.dtype] = torch.int64

    @property
    @abstractmethod
    def facts(self) -> list[Any]:
        """The settings that decide about the windows, which a resumed run must have again, as JSON."""

    @abstractmethod
    def check(self, index: "TextIndex", head: str) -> None:
        """Read the labels of all lines, so that one that the head cannot learn raises before training starts.

        Args:
            index: the lines.
            head: name of the head, for the message.

        Raises:
            DataError: If there is such a label; the message names file, line and label.
        """

    @abstractmethod
    def read(self, sample: "Line", labeled: bool) -> Any:
        """Return the content of a line, which `texts` and `windows` take.

        Args:
            sample: the line.
            labeled: read the labels, too.

        Raises:
            BadSample: If the line does not hold what the head reads.
        """

    def problem(self, item: Any, tokenizer: Tokenizer) -> tuple[str, str] | None:
        """Return why a line cannot be divided into windows, as cause and detail of a `BadSample`; None if it can.

        Args:
            item: content of the line, see `read`.
            tokenizer: tokenizer of the windows.
        """
        return None

    @abstractmethod
    def texts(self, item: Any) -> list[str]:
        """Return the texts of a line, which train a tokenizer and are shown in reports."""

    @abstractmethod
    def windows(self, items: Sequence[Any], tokenizer: Tokenizer) -> list[Windowed]:
        """Return the windows of the content of lines.

        Raises:
            DataError: If the tokenizer's `context_length` does not leave room for them.
        """


def pack_windows(samples: Sequence[Windowed], segments: bool) -> tuple[Tokens, Windows]:
    """Pack the windows of samples as one batch.

    Args:
        samples: the samples.
        segments: give the tokens their segments.
    """
    windows = [window for sample in samples for window in sample.windows]
    types = [window.types or [0] * len(window.ids) for window in windows] if segments else None
    tokens = Tokens.pack([window.ids for window in windows], types)
    numbers = iter(range(len(windows)))
    return tokens, Windows.locate(samples, [[next(numbers) for _ in one.windows] for one in samples], tokens)
