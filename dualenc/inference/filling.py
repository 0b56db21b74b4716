"""Guesses at masked tokens: the texts with masks, the words that may stand there, and their probabilities."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.models.heads import TextModel
from dualenc.models.tower import evaluating
from dualenc.tokens import Tokens
from dualenc.utils.arguments import check_batch_size, shown_value, strings
from dualenc.utils.text import plural, quoted

MASK = "[MASK]"  # mask in a text to fill, whatever the tokenizer calls it


class Filling(TypedDict):
    """A guess at a masked token."""

    token: str  # its entry in the vocabulary
    probability: float  # among all tokens, also if there are `targets`
    text: str  # the text that was given, with the word in its place; other masks stay
    sequence: str  # the text that the tokenizer makes of the ids, as in transformers; with special tokens if masks stay


class Filler:
    """A model that fills masks, with its tokenizer.

    Args:
        model: encoder and heads.
        head: name of a head of kind "mlm".
        tokenizer: tokenizer of the model.
        name: name of the model for messages.

    Raises:
        ValueError: If the tokenizer lacks a mask token.
    """

    def __init__(self, model: TextModel, head: str, tokenizer: Tokenizer, name: str) -> None:
        mask_id = tokenizer.mask_id
        if mask_id is None:
            raise ValueError(
                f"the tokenizer of {name} does not have a mask token: name one as mask_token in tokenizer_config.json"
            )
        self.model, self.head, self.tokenizer, self.mask_id = model, head, tokenizer, mask_id

    def __call__(
        self, texts: list[str], top_k: int, targets: Sequence[str] | None, batch_size: int
    ) -> list[list[list[Filling]]]:
        """Return the guesses for each mask of each text; see `TextPredictor.fill`."""
        check_batch_size(batch_size)
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {shown_value(top_k)}: it must be a number of at least 1")
        masked = [
            self._read(text, ids) for text, ids in zip(texts, self.tokenizer.encode(self._named(texts), masks=True))
        ]
        wanted = None if targets is None else torch.tensor(self._ids_of(strings(targets, "targets", one=True)))
        out: list[list[list[Filling]]] = [[] for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: len(masked[i].ids))
        with evaluating(self.model):
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                for i, probabilities in zip(part, self._probabilities([masked[i] for i in part])):
                    out[i] = self._guesses(masked[i], probabilities, top_k, wanted)
        return out

    def _named(self, texts: list[str]) -> list[str]:
        """Return texts in which the masks have the tokenizer's own name."""
        return [text.replace(MASK, self.tokenizer.roles["mask_token"]) for text in texts]

    def _read(self, text: str, ids: list[int]) -> "_Masked":
        """Find the masks of a text.

        Raises:
            ValueError: If there are none, or the longest text in tokens leaves one out.
        """
        segments = self._named([text])[0].split(self.tokenizer.roles["mask_token"])
        if len(segments) < 2:
            raise ValueError(f"{quoted(text)} does not contain {MASK}: write it in place of a word")
        positions = [i for i, one in enumerate(ids) if one == self.mask_id]
        if len(positions) < len(segments) - 1:
            longest = self.tokenizer.context_length
            raise ValueError(f"{quoted(text)} is longer than {longest} tokens, and a {MASK} is cut off")
        return _Masked(ids, positions, segments)

    def _ids_of(self, targets: list[str]) -> list[int]:
        """Return the ids of words, each of which must be one token.

        Raises:
            ValueError: If a word is several tokens, or unknown; or there are no words.
        """
        backend, found = self.tokenizer.backend, {}
        for target in targets:
            number = backend.token_to_id(target)
            encoding = backend.encode(target, add_special_tokens=False)
            numbers = encoding.ids if number is None else [number]
            if len(numbers) != 1:
                pieces = f": {', '.join(map(quoted, encoding.tokens[:8]))}" if numbers else ""
                raise ValueError(
                    f"the target {quoted(target)} is {plural(len(numbers), 'token')}{pieces}; a mask is one token"
                )
            if number is None and numbers[0] == self.tokenizer.id_of("unk_token"):
                raise ValueError(f"the target {quoted(target)} is not in the vocabulary of the tokenizer")
            found[numbers[0]] = None
        if not found:
            raise ValueError("targets is empty: pass words, or None for the whole vocabulary")
        return list(found)

    def _probabilities(self, masked: "list[_Masked]") -> list[Tensor]:
        """Return the probabilities (masks, vocabulary) of the tokens at the masks of each text of a batch."""
        tokens = Tokens.pack([one.ids for one in masked])
        starts = tokens.offsets[:-1][tokens.rows].tolist()
        places = [start + i for start, one in zip(starts, masked) for i in one.positions]
        device = next(self.model.parameters()).device
        logits = self.model(tokens.to(device), self.head, torch.tensor(places, device=device)).float().cpu()
        known = logits.softmax(-1)[:, : self.tokenizer.vocab_size]
        return list(known.split([len(one.positions) for one in masked]))

    def _guesses(
        self, masked: "_Masked", probabilities: Tensor, top_k: int, wanted: Tensor | None
    ) -> list[list[Filling]]:
        """Return the likeliest tokens for each mask of a text, among the wanted ones if there are any."""
        chosen = probabilities if wanted is None else probabilities[:, wanted]
        found = chosen.topk(min(top_k, chosen.shape[1]))
        best = found.indices if wanted is None else wanted[found.indices]
        return [
            [self._filling(masked, number, one, p) for one, p in zip(ids, values, strict=True)]
            for number, (ids, values) in enumerate(zip(best.tolist(), found.values.tolist(), strict=True))
        ]

    def _filling(self, masked: "_Masked", number: int, token_id: int, probability: float) -> Filling:
        """Return a guess for a mask of a text, counted from 0."""
        backend = self.tokenizer.backend
        token = backend.id_to_token(token_id) or ""
        before, after = MASK.join(masked.segments[: number + 1]), MASK.join(masked.segments[number + 1 :])
        word = backend.decode([token_id], skip_special_tokens=False).strip()
        if token.startswith("##"):  # continues the word before it
            before, word = before.rstrip(), token[2:]
        ids = list(masked.ids)
        ids[masked.positions[number]] = token_id
        left_out = (
            set(self.tokenizer.special.values()) if len(masked.positions) == 1 else {self.tokenizer.id_of("pad_token")}
        )
        sequence = backend.decode([one for one in ids if one not in left_out], skip_special_tokens=False)
        return {"token": token, "probability": probability, "text": before + word + after, "sequence": sequence}


class _Masked(NamedTuple):
    """A text with masks."""

    ids: list[int]
    positions: list[int]  # of the masks among the ids
    segments: list[str]  # the text between the masks
