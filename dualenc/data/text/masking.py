"""Masking of tokens for masked language modeling, on packed texts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.loading.epoch_plan import philox
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.tokens import Tokens
from dualenc.utils.errors import DataError

# Part of the key of each random draw. It differs from the numbers in `epoch_plan`, so that draws are independent.
_MASK = 4


class Masked(NamedTuple):
    """A packed batch of texts in which some tokens are replaced, and the original tokens as labels."""

    ids: Tensor  # (N,) int64, `Tokens.ids` with other tokens at some of the masked positions
    masked_positions: Tensor  # (M,) int64, positions of the tokens to guess among the N
    labels: Tensor  # (M,) int64, original tokens at these positions

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masked":
        """Return a copy on another device."""
        return Masked(*(x.to(device, non_blocking=non_blocking) for x in self))


class Masking:
    """Masking of BERT (Devlin et al. 2019, section 3.1 and appendix A.1).

    Each token except the special ones is chosen with probability `share`. By default, the mask token replaces 80% of
    the chosen tokens and a random token that is not special replaces 10%; the other 10% stay.

    Args:
        tokenizer: tokenizer whose special tokens are never chosen.
        share: share of the tokens to choose, between 0 and 1.
        hidden: share of the chosen tokens that the mask token replaces.
        swapped: share of the chosen tokens that a random token replaces; the others stay.

    Raises:
        DataError: If the tokenizer lacks a mask token, or the share is not between 0 and 1.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, hidden: float = 0.8, swapped: float = 0.1) -> None:
        if not 0 < share < 1:
            raise DataError(f"data.mask {share}: the share of masked tokens must lie between 0 and 1")
        if tokenizer.mask_id is None:
            raise DataError(
                "the tokenizer does not have a mask token, which model.mlm_weight and heads of kind mlm need: name one "
                "as mask_token in tokenizer_config.json"
            )
        self.share, self.hidden, self.swapped, self.mask = share, hidden, swapped, tokenizer.mask_id
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special.values()))

    def __call__(
        self,
        tokens: Tokens,
        key: tuple[int, ...],
        first: int = 0,
        numbers: Mapping[int, int] | None = None,
        words: Mapping[int, Sequence[int]] | None = None,
    ) -> Masked:
        """Mask tokens of a batch.

        Args:
            tokens: B texts.
            key: key of the random draws.
            first: number of the first text. The masked tokens of a text depend only on its number and the key.
            numbers: index in the batch -> number, for the texts to mask; None to mask all texts, with numbers that
                start at `first`.
            words: index in the batch -> number of the word of each token, -1 for no word, for the same texts; see
                `Tokenizer.encode_words`. All tokens of a word are then chosen together (whole word masking of BERT's
                authors), with probability `share`. None to choose each token by itself.
        """
        ids, offsets, rows = tokens.ids.numpy().copy(), tokens.offsets.tolist(), tokens.rows.tolist()
        ordinary = np.isin(ids, self.ordinary)
        chosen = np.zeros(len(ids), dtype=bool)
        labels = ids.copy()
        for index, number in (dict(enumerate(range(first, first + len(rows)))) if numbers is None else numbers).items():
            text = slice(offsets[rows[index]], offsets[rows[index] + 1])
            generator = np.random.Generator(philox(*key, _MASK, number))
            # For each token: is it chosen, what replaces it, and by which random token.
            draws = generator.random((3, text.stop - text.start))
            choice = draws[0]
            if words is not None:  # All tokens of a word take the draw of its first one.
                _, starts, inverse = np.unique(words[index], return_index=True, return_inverse=True)
                choice = draws[0][starts][inverse]
            chosen[text] = chosen_here = ordinary[text] & (choice < self.share)
            random_ids = self.ordinary[(draws[2] * len(self.ordinary)).astype(np.int64)]
            swapped_or_hidden = draws[1] < self.hidden + self.swapped
            kept_or_random = np.where(swapped_or_hidden, random_ids, ids[text])
            replaced = np.where(draws[1] < self.hidden, self.mask, kept_or_random)
            ids[text] = np.where(chosen_here, replaced, ids[text])
        masked_positions = np.flatnonzero(chosen)
        return Masked(
            torch.from_numpy(ids), torch.from_numpy(masked_positions), torch.from_numpy(labels[masked_positions])
        )
