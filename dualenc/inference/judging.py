"""Answers of heads that judge tokens, for samples that are not lines of files."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dualenc.data.text.dataset import Part, Texts
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import Windowed, pack_windows
from dualenc.models.heads import Examples, TextModel
from dualenc.models.tower import evaluating
from dualenc.utils.arguments import check_batch_size

AT_ONCE = 1024  # samples to tokenize at a time


def judge(
    model: TextModel,
    tokenizer: Tokenizer,
    head: str,
    items: Sequence[Any],
    batch_size: int,
    answers: Callable[[Examples], Sequence[Any]] | None = None,
) -> list[Any]:
    """Return the answer of a head for each item.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        head: name of a head that has a reader of windows.
        items: contents, see `WindowReader.read`.
        batch_size: number of windows in a forward pass; one item with more of them is a batch of its own.
        answers: function that returns an answer for each sample; None for `Head.answers`.

    Raises:
        ValueError: If the batch size is not positive.
    """
    check_batch_size(batch_size)
    kind, reader = model.kinds[head], model.kinds[head].needs.windows
    assert reader is not None
    answers = kind.answers if answers is None else answers
    out: list[Any] = []
    with evaluating(model):
        for start in range(0, len(items), AT_ONCE):
            samples = reader.windows(items[start : start + AT_ONCE], tokenizer)
            found: list[Any] = [None] * len(samples)
            for part in _batches(samples, batch_size):
                examples = _examples(model, head, [samples[i] for i in part])
                for i, answer in zip(part, answers(examples), strict=True):
                    found[i] = answer
            out += found
    return out


def _examples(model: TextModel, head: str, samples: Sequence[Windowed]) -> Examples:
    device = next(model.parameters()).device
    tokens, windows = pack_windows(samples, segments=model.config.types > 1)
    tokens, windows = tokens.to(device), windows.to(device)
    first = torch.searchsorted(windows.samples, torch.arange(len(samples), device=device))
    part = Part(first, None, None, windows)
    batch = Texts(tokens, first, {head: part}, None)
    return model.kinds[head].examples(model(tokens, head, windows.tokens), batch, part)


def _batches(samples: Sequence[Windowed], batch_size: int) -> list[list[int]]:
    """Divide samples into batches of at most `batch_size` windows, samples of similar lengths together."""
    order = sorted(range(len(samples)), key=lambda i: max(len(window.ids) for window in samples[i].windows))
    batches: list[list[int]] = []
    number = batch_size
    for i in order:
        number += len(samples[i].windows)
        if number > batch_size:
            batches.append([])
            number = len(samples[i].windows)
        batches[-1].append(i)
    return batches
