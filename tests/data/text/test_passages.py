"""Passages of long texts: no token is lost, windows have their size, and words stay whole."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import WORDS, tokenizer_of

from dualenc.data.text.passages import _windows, cut_passages

TRAIN = [*WORDS, "catsits", "dogruns", "boatshats"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_windows_cover_the_text(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    tokenizer = tokenizer_of(kind, TRAIN * 3, 300 if kind == "bpe" else 60, 8)
    for _ in range(60):
        texts = [" ".join("".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(n)) for n in (0, 1, 3, 25)]
        size = int(rng.integers(2, 12))
        stride = int(rng.integers(size))
        for text, found in zip(texts, cut_passages(tokenizer, texts, size, stride), strict=True):
            encoding = tokenizer._untruncated.encode(text, add_special_tokens=False)
            if len(encoding) <= size:
                assert found == [text]
                continue
            windows = _windows(encoding, size, stride)
            assert found == [text[a:b] for a, b in windows]
            covered = np.array([a == b for a, b in encoding.offsets])  # some tokens stand for no letter
            for begin, end in windows:
                inside = [i for i, (a, b) in enumerate(encoding.offsets) if begin <= a < b <= end]
                assert 1 <= len(inside) <= size + (kind != "wordpiece")  # the first token may share a letter
                covered[inside] = True
            assert covered.all()
            assert all(a[1] < b[1] for a, b in pairwise(windows)) or kind != "wordpiece"


def test_windows_of_words_slide(seed: int) -> None:
    """With one token a word, windows are exactly `size` words, and have `stride` in common with the one before."""
    rng = np.random.default_rng(seed)
    tokenizer = tokenizer_of("wordpiece", WORDS * 3, 200, 8)
    words = rng.choice(WORDS, 40).tolist()
    size = int(rng.integers(2, 15))
    stride = int(rng.integers(size))
    (found,) = cut_passages(tokenizer, [" ".join(words)], size, stride)
    starts = [0]
    while starts[-1] + size < 40:
        starts.append(starts[-1] + size - stride)
    assert found == [" ".join(words[i : i + size]) for i in starts]
    with pytest.raises(ValueError, match="must lie between 0 and"):
        cut_passages(tokenizer, ["a"], size, size)


def test_long_words_are_cut_only_where_they_must_be() -> None:
    tokenizer = tokenizer_of("bpe", WORDS, 261, 8)  # one token a letter
    text = "cat catdogcatdogcat dog mat"
    (found,) = cut_passages(tokenizer, [text], 8, 1)
    assert found[0] == "cat"
    assert found[-1].endswith("dog mat")
    assert all(passage in text for passage in found)
    assert len(found) > 3
