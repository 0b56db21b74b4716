"""The packed batch of texts, which the tokenizer makes and the text encoder takes.

A batch of captions of 5 to 40 words padded to 77 positions is mostly padding. A packed batch is one flat sequence of
real tokens with the offsets of its texts. Only `TextEncoder.forward_padded` takes padded texts: it exists for export
and as an oracle in tests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A packed batch of B texts with N real tokens in total.

    The texts are sorted by length, so that texts of equal length are neighbors, which makes attention fast. `rows`
    leads back to the order in which the caller gave the texts.

    Attributes:
        ids: (N,) int64 ids of the real tokens.
        positions: (N,) int64 position of each token in its own text.
        offsets: (B+1,) int32; row r is `ids[offsets[r]:offsets[r+1]]`.
        rows: (B,) int64; the caller's text i is row `rows[i]`.
        max_len: length of the longest text; a Python number, so that no kernel has to wait for the device.
        types: (N,) int64 segment of each token, for encoders with segment embeddings.

    Example:
        >>> from dualenc import Tokens
        >>> tokens = Tokens.pack([[5, 6, 7], [8, 9]])
        >>> tokens
        Tokens(2 texts, 5 tokens, longest 3)
        >>> tokens.ids, tokens.rows
        (tensor([8, 9, 5, 6, 7]), tensor([1, 0]))
        >>> ids, mask, types = tokens.padded()
        >>> ids
        tensor([[5, 6, 7],
                [8, 9, 0]])
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    rows: Tensor
    max_len: int
    types: Tensor | None = None

    @classmethod
    def pack(cls, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> "Tokens":
        """Pack lists of token ids, on the host.

        Args:
            texts: B lists of at least one token id.
            types: B lists of the tokens' segments.

        Raises:
            ValueError: If there are no texts, or a text has no tokens.
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
        """Return the texts as ids (B, T), mask (B, T) of real tokens and types (B, T), in the caller's order."""
        index, mask = padding_index(self.offsets, self.max_len)
        index, mask = index[self.rows], mask[self.rows]
        types = None if self.types is None else self.types[index] * mask
        return self.ids[index] * mask, mask, types

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tokens":
        """Copy the batch to another device."""
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


def padding_index(offsets: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Compute the index into the packed batch of each cell of the padded one.

    Args:
        offsets: (B+1,) of the packed texts.
        max_len: T.

    Returns:
        index: (B, T) int64. Cells past the end of a text point at its first token, so that indexing is always safe.
        mask: (B, T) bool, true for real tokens.
    """
    start, end = offsets[:-1, None].long(), offsets[1:, None].long()
    index = start + torch.arange(max_len, device=offsets.device)
    mask = index < end
    return torch.where(mask, index, start), mask
