"""Masking: shares, choice of tokens, replacements."""

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

from dualenc.data import Tokenizer
from dualenc.data.text.masking import Masking
from dualenc.utils.errors import DataError


def texts_of(rng, count):
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) for _ in range(count)]


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_shares(seed, share):
    """Shares of ordinary tokens are chosen, of those 80, 10 and 10 percent; special tokens never; others stay."""
    tokenizer = tiny_tokenizer(24)
    tokens = tokenizer(texts_of(np.random.default_rng(seed), 4000))
    masked = Masking(tokenizer, share)(tokens, (seed, 0), 0)
    special = set(tokenizer.special.values())
    ordinary = torch.tensor([i not in special for i in tokens.ids.tolist()])
    chosen = torch.zeros(len(tokens.ids), dtype=torch.bool)
    chosen[masked.masked_positions] = True
    assert not (chosen & ~ordinary).any()
    assert torch.equal(masked.ids[~chosen], tokens.ids[~chosen])
    assert torch.equal(masked.labels, tokens.ids[masked.masked_positions])

    def near(found, expected, number):
        assert abs(found - expected) < 5 * (expected * (1 - expected) / number) ** 0.5

    now, number = masked.ids[masked.masked_positions], len(masked.masked_positions)
    near(number / int(ordinary.sum()), share, int(ordinary.sum()))
    near(float((now == tokenizer.special["[MASK]"]).double().mean()), 0.8, number)
    # A token drawn at random is in one case of all words the one that was there.
    words = tokenizer.vocab_size - len(special)
    near(float((now == masked.labels).double().mean()), 0.1 + 0.1 / words, number)
    others = now[(now != tokenizer.special["[MASK]"]) & (now != masked.labels)]
    assert not special & set(others.tolist())
    assert len(set(others.tolist())) > words / 2


def test_masks_depend_only_on_the_number_of_the_text(seed):
    """Masks do not depend on the batch; another epoch has other draws."""
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
    plain = Tokenizer(Backend(models.WordLevel({"a": 0, "<MASK|LLM-jp>": 1}, unk_token="a")), 8)
    named = plain.replace(roles={"mask_token": "<MASK|LLM-jp>"})  # A config file says so.
    assert Masking(named, 0.999)(named.pack([[0] * 500]), (0,)).ids.unique().tolist() == [0, 1]
    without = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), 8)
    with pytest.raises(DataError, match="mlm_weight"):
        Masking(without, 0.15)


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_whole_words(seed, share):
    """Shares are those of single tokens; all tokens of a word are chosen or none."""
    rng = np.random.default_rng(seed)
    made = ["".join(rng.choice(list("abcdef"), int(rng.integers(1, 9)))) for _ in range(200)]
    tokenizer = Tokenizer.train(made, 60, 24)
    texts = [" ".join(rng.choice(made, int(rng.integers(1, 9)))) for _ in range(3000)]
    ids, words = tokenizer.encode_words(texts)
    tokens = tokenizer.pack(ids)
    order = dict(enumerate(range(len(texts))))
    masked = Masking(tokenizer, share)(tokens, (seed, 0), 0, order, dict(enumerate(words)))
    chosen = torch.zeros(len(tokens.ids), dtype=torch.bool)
    chosen[masked.masked_positions] = True
    sizes, found = [], []
    for i, text in enumerate(words):
        row = int(tokens.rows[i])
        here = chosen[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        assert not any(flag for flag, word in zip(here, text, strict=True) if word < 0)
        for word in set(text) - {-1}:
            flags = {flag for flag, one in zip(here, text, strict=True) if one == word}
            assert len(flags) == 1
            sizes.append(text.count(word))
            found.append(flags.pop())
    sizes, found = np.array(sizes), np.array(found)
    assert (sizes > 1).mean() > 0.5
    assert abs(found.mean() - share) < 5 * (share * (1 - share) / len(found)) ** 0.5
    spread = 5 * (share * (1 - share) * (sizes**2).sum()) ** 0.5
    assert abs(sizes[found].sum() - share * sizes.sum()) < spread
    now = masked.ids[masked.masked_positions]
    part = float((now == tokenizer.mask_id).double().mean())
    assert abs(part - 0.8) < 5 * (0.16 / len(now)) ** 0.5  # token by token
    single = Masking(tokenizer, share)(tokens, (seed, 0), 0)
    assert not torch.equal(single.masked_positions, masked.masked_positions)


def test_some_texts_of_a_batch(seed):
    """Masks of chosen texts do not depend on the others."""
    tokenizer = tiny_tokenizer(24)
    tokens = tokenizer(texts_of(np.random.default_rng(seed), 30))
    masking = Masking(tokenizer, 0.5)
    whole, some = masking(tokens, (seed, 0), 7), masking(tokens, (seed, 0), numbers={i: 7 + i for i in range(0, 30, 3)})
    for i in range(30):
        text = slice(*tokens.offsets[tokens.rows[i] : tokens.rows[i] + 2].tolist())
        assert torch.equal(some.ids[text], (tokens if i % 3 else whole).ids[text])
    assert 0 < len(some.masked_positions) < len(whole.masked_positions)
