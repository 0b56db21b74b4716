"""Words to guess: the masked-language-model task on packed texts."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.errors import DataError
from dualenc.data.plan import stream
from dualenc.data.tokenizer import Tokenizer
from dualenc.tokens import Tokens

_MASK = 4  # keeps these draws apart from those of the plan


class Masked(NamedTuple):
    """A packed batch of texts some of whose tokens are hidden."""

    ids: Tensor  # (N,) int64, as `Tokens.ids`, with other tokens where some are hidden
    places: Tensor  # (M,) int64, of the tokens to guess among the N
    labels: Tensor  # (M,) int64, what stood there

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masked":
        """The same on another device."""
        return Masked(*(x.to(device, non_blocking=non_blocking) for x in self))


class Masking:
    """Hides tokens as BERT does (Devlin et al. 2019, section 3.1 and appendix A.1).

    Each token but the special ones is to be guessed with probability `share`; of those, 80% are replaced by the mask
    token, 10% by any token of the vocabulary but the special ones, and 10% stay.

    Args:
        tokenizer: whose special tokens are never chosen.
        share: of the tokens, between 0 and 1.

    Raises:
        DataError: the tokenizer has no mask token, or the share is none.
    """

    def __init__(self, tokenizer: Tokenizer, share: float) -> None:
        if not 0 < share < 1:
            raise DataError(f"data.mask {share} must lie between 0 and 1, or be 0 for none")
        special = tokenizer.special
        found = [special[name] for name in ("[MASK]", "<mask>") if name in special]
        if not found:
            raise DataError("the tokenizer has neither [MASK] nor <mask>: model.mlm_weight needs one")
        self.share, self.mask = share, found[0]
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(special.values()))

    def __call__(self, tokens: Tokens, key: tuple[int, ...], first: int) -> Masked:
        """Hides tokens of a batch.

        Args:
            tokens: B texts.
            key: of the draws.
            first: number of the first text. What is hidden of a text depends on its number and the key alone.
        """
        ids, offsets, rows = tokens.ids.numpy().copy(), tokens.offsets.tolist(), tokens.rows.tolist()
        can_be = np.isin(ids, self.ordinary)
        chosen = np.zeros(len(ids), dtype=bool)
        labels = ids.copy()
        for number, row in enumerate(rows, first):
            text = slice(offsets[row], offsets[row + 1])
            generator = np.random.Generator(stream(*key, _MASK, number))
            draws = generator.random((3, text.stop - text.start))
            chosen[text] = here = can_be[text] & (draws[0] < self.share)
            other = self.ordinary[(draws[2] * len(self.ordinary)).astype(np.int64)]
            new = np.where(draws[1] < 0.8, self.mask, np.where(draws[1] < 0.9, other, ids[text]))
            ids[text] = np.where(here, new, ids[text])
        places = np.flatnonzero(chosen)
        return Masked(torch.from_numpy(ids), torch.from_numpy(places), torch.from_numpy(labels[places]))
