"""Words to guess: the masked-language-model task on packed texts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.loading.epoch_plan import philox
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.tokens import Tokens
from dualenc.utils.errors import DataError

_MASK = 4  # keeps these draws apart from those of the plan


class Masked(NamedTuple):
    """A packed batch of texts some of whose tokens are hidden."""

    ids: Tensor  # (N,) int64, as `Tokens.ids`, with other tokens where some are hidden
    masked_positions: Tensor  # (M,) int64, of the tokens to guess among the N
    labels: Tensor  # (M,) int64, what stood there

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masked":
        """The same on another device."""
        return Masked(*(x.to(device, non_blocking=non_blocking) for x in self))


class Masking:
    """Hides tokens as BERT does (Devlin et al. 2019, section 3.1 and appendix A.1).

    Each token but the special ones is to be guessed with probability `share`; of those, 80% are replaced by the mask
    token, 10% by any token of the vocabulary but the special ones, and 10% stay, unless other shares are given.

    Args:
        tokenizer: whose special tokens are never chosen.
        share: of the tokens, between 0 and 1.
        hidden: share of those to be guessed in whose place the mask token stands.
        swapped: share of those in whose place any token stands; the others stay.

    Raises:
        DataError: the tokenizer has no mask token, or the share is none.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, hidden: float = 0.8, swapped: float = 0.1) -> None:
        if not 0 < share < 1:
            raise DataError(f"data.mask {share}: the share of tokens to guess must lie between 0 and 1")
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
        """Hides tokens of a batch.

        Args:
            tokens: B texts.
            key: of the draws.
            first: number of the first text. What is hidden of a text depends on its number and the key alone.
            numbers: of the texts in which tokens are hidden, by their places in the batch; absent, all of them have
                numbers from `first` on.
            words: of the same texts, the word of each token, -1 for none, see `Tokenizer.encode_words`: words are then
                hidden whole (whole word masking, of BERT's authors), each with probability `share`.
        """
        ids, offsets, rows = tokens.ids.numpy().copy(), tokens.offsets.tolist(), tokens.rows.tolist()
        can_be = np.isin(ids, self.ordinary)
        chosen = np.zeros(len(ids), dtype=bool)
        labels = ids.copy()
        for place, number in (dict(enumerate(range(first, first + len(rows)))) if numbers is None else numbers).items():
            text = slice(offsets[rows[place]], offsets[rows[place] + 1])
            generator = np.random.Generator(philox(*key, _MASK, number))
            draws = generator.random((3, text.stop - text.start))
            decides = draws[0]
            if words is not None:  # the draw of a word's first token is that of all of them
                _, begins, of = np.unique(words[place], return_index=True, return_inverse=True)
                decides = draws[0][begins][of]
            chosen[text] = here = can_be[text] & (decides < self.share)
            other = self.ordinary[(draws[2] * len(self.ordinary)).astype(np.int64)]
            swaps = draws[1] < self.hidden + self.swapped
            new = np.where(draws[1] < self.hidden, self.mask, np.where(swaps, other, ids[text]))
            ids[text] = np.where(here, new, ids[text])
        masked_positions = np.flatnonzero(chosen)
        return Masked(
            torch.from_numpy(ids), torch.from_numpy(masked_positions), torch.from_numpy(labels[masked_positions])
        )
