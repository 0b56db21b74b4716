"""The packed text batch: what the collation makes and the text encoder takes.

A batch of captions of 5 to 40 words padded to 77 positions is mostly padding. Here it is one flat
sequence of real tokens, with the places where texts begin. Nothing else in the package knows padding,
but for `TextEncoder.forward_padded`, which exists for export and as an oracle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A packed batch of B texts with N real tokens in all.

    The texts stand in an order that suits attention (by length, so that equal lengths are neighbors);
    `rows` leads back to the order in which the caller gave them.
    """

    ids: Tensor  # (N,) int64, real tokens only
    positions: Tensor  # (N,) int64, place of each token in its own text
    offsets: Tensor  # (B+1,) int32, row r is ids[offsets[r]:offsets[r+1]]
    rows: Tensor  # (B,) int64, the caller's text i is row rows[i]
    max_len: int  # length of the longest text: a Python number, so that no kernel has to ask the device
    types: Tensor | None = None  # (N,) int64 segment of each token, for encoders that have segments

    @classmethod
    def pack(cls, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> "Tokens":
        """Packs B lists of token ids (each of at least one), on the host.

        Raises:
            ValueError: there is no text, or a text has no token.
        """
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        if not len(texts) or int(lengths.min()) == 0:
            empty = [i for i, text in enumerate(texts) if not len(text)]
            raise ValueError(f"texts without a token cannot be packed: {empty[:10] if empty else 'no texts at all'}")
        order = torch.argsort(lengths, stable=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(texts))
        lengths = lengths[order]
        offsets = torch.zeros(len(texts) + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        positions = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)

        def flat(lists: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([item for i in order.tolist() for item in lists[i]], dtype=torch.int64)

        return cls(
            ids=flat(texts),
            positions=positions,
            offsets=offsets.to(torch.int32),
            rows=rows,
            max_len=int(lengths[-1]),
            types=None if types is None else flat(types),
        )

    def __repr__(self) -> str:
        return f"Tokens({len(self.rows)} texts, {len(self.ids)} tokens, longest {self.max_len})"

    def padded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same texts as ids (B, T), mask (B, T) of real tokens and types (B, T), in the caller's order."""
        index, mask = padding_index(self.offsets, self.max_len)
        index, mask = index[self.rows], mask[self.rows]
        types = None if self.types is None else self.types[index] * mask
        return self.ids[index] * mask, mask, types

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tokens":
        """The same batch on another device."""
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


def padding_index(offsets: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Where each cell of a padded (B, T) batch lies in the packed one, and which cells are real.

    Cells past a text's end point at its own first token, so that indexing with them is always safe.
    """
    start, end = offsets[:-1, None].long(), offsets[1:, None].long()
    index = start + torch.arange(max_len, device=offsets.device)
    mask = index < end
    return torch.where(mask, index, start), mask
