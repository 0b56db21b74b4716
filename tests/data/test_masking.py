"""Hidden words: how many, which, what stands in their place."""

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

from dualenc.data import DataError, Tokenizer
from dualenc.data.masking import Masking


def texts_of(rng, count):
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) for _ in range(count)]


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_shares(seed, share):
    """Of the ordinary tokens; 80, 10 and 10 percent of those; special tokens never; what is not chosen stays."""
    tokenizer = tiny_tokenizer(24)
    tokens = tokenizer(texts_of(np.random.default_rng(seed), 4000))
    masked = Masking(tokenizer, share)(tokens, (seed, 0), 0)
    special = set(tokenizer.special.values())
    ordinary = torch.tensor([i not in special for i in tokens.ids.tolist()])
    chosen = torch.zeros(len(tokens.ids), dtype=torch.bool)
    chosen[masked.places] = True
    assert not (chosen & ~ordinary).any()
    assert torch.equal(masked.ids[~chosen], tokens.ids[~chosen])
    assert torch.equal(masked.labels, tokens.ids[masked.places])

    def near(found, expected, number):
        assert abs(found - expected) < 5 * (expected * (1 - expected) / number) ** 0.5

    now, number = masked.ids[masked.places], len(masked.places)
    near(number / int(ordinary.sum()), share, int(ordinary.sum()))
    near(float((now == tokenizer.special["[MASK]"]).double().mean()), 0.8, number)
    # A token drawn at random is in one case of all words the one that was there.
    words = tokenizer.vocab_size - len(special)
    near(float((now == masked.labels).double().mean()), 0.1 + 0.1 / words, number)
    others = now[(now != tokenizer.special["[MASK]"]) & (now != masked.labels)]
    assert not special & set(others.tolist())
    assert len(set(others.tolist())) > words / 2


def test_what_is_hidden_depends_on_the_text_s_number_alone(seed):
    """Not on the batch that it comes in; another epoch is another draw."""
    tokenizer = tiny_tokenizer(24)
    texts = texts_of(np.random.default_rng(seed), 40)
    masking = Masking(tokenizer, 0.4)

    def by_text(first, stop, epoch=0):
        tokens = tokenizer(texts[first:stop])
        ids, offsets = masking(tokens, (seed, epoch), first).ids, tokens.offsets.tolist()
        return [ids[offsets[row] : offsets[row + 1]].tolist() for row in tokens.rows.tolist()]

    whole = by_text(0, 40)
    assert whole == by_text(0, 7) + by_text(7, 31) + by_text(31, 40)
    assert whole != by_text(0, 40, epoch=1)


def test_wrong_use():
    for share in (1.0, -0.1):
        with pytest.raises(DataError, match=f"data.mask {share}"):
            Masking(tiny_tokenizer(), share)
    without = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), 8)
    with pytest.raises(DataError, match="mlm_weight"):
        Masking(without, 0.15)
