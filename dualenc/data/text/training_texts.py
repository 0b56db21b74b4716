"""The texts that a tokenizer is trained on: all of them, or as many as change its vocabulary."""

import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from dualenc.data.loading.epoch_plan import derive_seed, philox

MAX_TEXTS = 1_000_000  # more texts change few entries of a vocabulary, and their reading takes minutes
_TEXTS = 6  # keeps this generator's stream apart from those of `EpochPlan` and `Masking`


def spread_samples(index: Any, most: int, seed: int) -> Iterator[Any]:
    """Yield all samples of an index, or `most` of them, in the order of the index.

    One sample is drawn from each of `most` ranges of equal length, so that all shards have their share.

    Args:
        index: samples, with a length, by their numbers.
        most: largest number of samples.
        seed: seed of the drawing, on which the samples depend alone.
    """
    if len(index) <= most:
        yield from index
        return
    edges = np.arange(most + 1) * len(index) // most
    for row in np.random.Generator(philox(seed, _TEXTS)).integers(edges[:-1], edges[1:]).tolist():
        yield index[row]


def draw_texts(texts: Iterable[str], most: int, seed: int) -> list[str]:
    """Return all texts, or `most` of them, each text with the same probability.

    The texts are read once and only those that may be returned are kept (reservoir sampling, Li 1994, algorithm L).

    Args:
        texts: the texts.
        most: largest number of texts.
        seed: seed of the drawing, on which the numbers of the drawn texts depend alone.
    """
    rest = iter(texts)
    kept = list(islice(rest, most))
    rng = random.Random(derive_seed(seed, _TEXTS))
    log_threshold = 0.0  # logarithm of the largest of `most` uniform numbers that stand for the kept texts

    def log_uniform() -> float:
        return math.log(1.0 - rng.random())  # never of 0

    while True:
        log_threshold += log_uniform() / most
        passed = int(log_uniform() / math.log1p(-math.exp(log_threshold)))
        text = next(islice(rest, passed, None), None)
        if text is None:
            return kept
        kept[rng.randrange(most)] = text
