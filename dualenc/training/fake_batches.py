"""Batches for a measurement of memory: the shapes of real ones, without content."""

from typing import Any

import torch
from torch import Tensor

from dualenc.data import Pairs
from dualenc.data.text.dataset import Part, Texts
from dualenc.data.text.masking import Masked
from dualenc.data.text.windows import Windows
from dualenc.models.heads import Head
from dualenc.tokens import Tokens
from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.pair_data import PairData
from dualenc.training.task import Task
from dualenc.training.text import LanguageTask
from dualenc.training.text_data import TextData

GUESSED = 0.15  # share of the tokens that a masked-language-model loss guesses where the data do not set one


def fake_batch(task: Task, data: Any, samples: int, tokens: int) -> Any:
    """Return a batch for `training_step`.

    Args:
        task: task that takes the batch.
        data: data module of the run.
        samples: number of pairs or lines.
        tokens: number of tokens of each text.

    Raises:
        ValueError: If the task or the data are not of this package: only they tell what a batch holds.
    """
    if isinstance(task, ContrastiveTask) and isinstance(data, PairData):
        return _pairs(task, data, samples, tokens)
    if isinstance(task, LanguageTask) and isinstance(data, TextData):
        return _texts(task, data, samples, tokens)
    raise ValueError(
        f"a plan needs a task and data of dualenc.training, found {type(task).__name__} and {type(data).__name__}"
    )


def _pairs(task: ContrastiveTask, data: PairData, pairs: int, tokens: int) -> Pairs:
    size = task.preprocess.size
    features = data.features_path is not None
    images = torch.empty(pairs, task.model.image.width) if features else torch.empty(pairs, 3, size, size).byte()
    texts = _tokens(task, pairs, tokens)
    ids = torch.zeros(pairs, 2, dtype=torch.int64)
    return Pairs(images, texts, torch.zeros(pairs).long(), ids, _masked(texts, task.masked) if task.masked else None)


def _texts(task: LanguageTask, data: TextData, lines: int, tokens: int) -> Texts:
    """Return a batch whose lines belong to the heads in turn, or all to one of them if the heads take turns."""
    heads = list(data.heads.items())[: 1 if data.mix == "round_robin" else None]
    apart = [name for name, head in heads if head.needs.pairs == "apart"]
    owners = [torch.arange(i, lines, len(heads)) for i in range(len(heads))]
    seconds = sum(len(own) for own, (name, _) in zip(owners, heads) if name in apart)
    texts = _tokens(task, lines + seconds, tokens)
    parts, second = {}, lines
    for own, (name, head) in zip(owners, heads):
        others = torch.arange(second, second + len(own)) if name in apart else None
        second += len(own) if name in apart else 0
        parts[name] = _part(head, own, others, tokens)
    masked = _masked(texts, data.mask or GUESSED) if any(head.masking is not None for _, head in heads) else None
    return Texts(texts, torch.zeros(lines).long(), parts, masked)


def _part(head: Head, own: Tensor, others: Tensor | None, tokens: int) -> Part:
    """Return the samples of a head.

    Args:
        head: the head.
        own: (b,) numbers of its texts.
        others: (b,) numbers of the second texts of pairs that are read apart.
        tokens: number of tokens of each text.
    """
    needs, count = head.needs, len(own)
    if needs.windows is not None:  # Every token of every text is judged.
        place = (own[:, None] * tokens + torch.arange(tokens)).flatten()
        windows = Windows(place, torch.arange(count).repeat_interleave(tokens), torch.arange(count))
        judged = (count * tokens,) if head.config.labels else (count, 2)  # tags of tokens, or the places of answers
        return Part(own, None, torch.zeros(judged, dtype=needs.windows.dtype), windows)
    shape = (count, len(head.config.labels)) if head.config.problem == "multi_label" else (count,)
    labels = None if needs.labels is None else torch.zeros(shape, dtype=needs.labels.dtype)
    return Part(own, others, labels, ids=None if others is None else torch.zeros(count, 2, dtype=torch.int64))


def _tokens(task: Any, texts: int, tokens: int) -> Tokens:
    segments = [[0] * tokens] * texts if task.text_config.types else None
    return Tokens.pack([[0] * tokens] * texts, segments)


def _masked(texts: Tokens, share: float) -> Masked:
    count = max(1, round(share * len(texts.ids)))
    return Masked(texts.ids, torch.arange(count), texts.ids[:count])
