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

_MASK = 4  # separates these draws from those of the epoch plan


class Masked(NamedTuple):
    """A packed batch of texts with some tokens masked."""

    ids: Tensor  # (N,) int64, `Tokens.ids` with other tokens at some of the masked positions
    masked_positions: Tensor  # (M,) int64, positions of the tokens to guess among the N
    labels: Tensor  # (M,) int64, original tokens at these positions

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masked":
        """Return a copy on another device."""
        return Masked(*(x.to(device, non_blocking=non_blocking) for x in self))


class Masking:
    """Masking of BERT (Devlin et al. 2019, section 3.1 and appendix A.1).

    Each token except the special ones is chosen with probability `share`; of the chosen ones, 80% are replaced by the
    mask token, 10% by a random token that is not special, and 10% stay, unless other shares are given.

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
                "the tokenizer has neither [MASK] nor <mask>: model.mlm_weight, or a head of kind mlm, needs one"
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
            numbers: numbers of the texts to mask, by their indices in the batch; None for all texts, with numbers
                that start at `first`.
            words: for the same texts the word of each token, -1 for no word, see `Tokenizer.encode_words`: words are
                then masked whole (whole word masking, by BERT's authors), each with probability `share`.
        """
        ids, offsets, rows = tokens.ids.numpy().copy(), tokens.offsets.tolist(), tokens.rows.tolist()
        ordinary = np.isin(ids, self.ordinary)
        chosen = np.zeros(len(ids), dtype=bool)
        labels = ids.copy()
        for index, number in (dict(enumerate(range(first, first + len(rows)))) if numbers is None else numbers).items():
            text = slice(offsets[rows[index]], offsets[rows[index] + 1])
            generator = np.random.Generator(philox(*key, _MASK, number))
            draws = generator.random((3, text.stop - text.start))
            choice = draws[0]
            if words is not None:  # All tokens of a word take the draw of its first one.
                _, starts, inverse = np.unique(words[index], return_index=True, return_inverse=True)
                choice = draws[0][starts][inverse]
            chosen[text] = here = ordinary[text] & (choice < self.share)
            random = self.ordinary[(draws[2] * len(self.ordinary)).astype(np.int64)]
            swaps = draws[1] < self.hidden + self.swapped
            new = np.where(draws[1] < self.hidden, self.mask, np.where(swaps, random, ids[text]))
            ids[text] = np.where(here, new, ids[text])
        masked_positions = np.flatnonzero(chosen)
        return Masked(
            torch.from_numpy(ids), torch.from_numpy(masked_positions), torch.from_numpy(labels[masked_positions])
        )
