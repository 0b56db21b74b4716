"""Replaced-token detection: a small encoder puts words in place of others, a larger one tells which (ELECTRA)."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.models.heads import HeadConfig, TextModel
from dualenc.models.text_encoder import TextConfig
from dualenc.tokens import Tokens

SHARED = (
    "token_embeddings",
    "position_embeddings",
    "segment_embeddings",
    "norm",
)  # of the embeddings; the way to the encoder's width is its own


class Replaced(NamedTuple):
    """A step of replaced-token detection on N tokens, M of which the generator had to guess."""

    guesses: Tensor  # (M, V) logits of the generator
    ids: Tensor  # (N,) int64, what the discriminator read
    replaced: Tensor  # (N,) bool, where that is not what stood there
    logits: Tensor  # (N,) of the discriminator, above 0 for "replaced"


def generator_config(text: TextConfig, size: float) -> TextConfig:
    """The architecture of a generator (Clark et al. 2020, section 3.2): as deep as the discriminator, and narrower.

    Args:
        text: architecture of the discriminator.
        size: heads and widths of its blocks, times those of the discriminator; the paper found 1/4 to 1/2 best.

    Raises:
        ValueError: the size is not between 0 and 1.
    """
    if not 0 < size <= 1:
        raise ValueError(f"model.generator_size {size} must lie between 0 and 1")
    heads = max(1, round(size * text.heads))
    width = heads * (text.width // text.heads)
    hidden = max(1, round(size * (text.mlp_width or 4 * text.width)))
    embeddings = text.embed_width or text.width
    return replace(
        text, heads=heads, width=width, mlp_width=hidden, embed_width=None if width == embeddings else embeddings
    )


class ReplacedTokenModel(nn.Module):
    """A generator with a masked-language head and a discriminator that share their embeddings (Clark et al. 2020).

    Args:
        text: architecture of the discriminator, which is the encoder that people go on with.
        generator: architecture of the generator; see `generator_config`.

    Raises:
        ValueError: the embeddings of the two cannot be the same.
    """

    def __init__(self, text: TextConfig, generator: TextConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "context_length", "types", "positions", "position_offset", "normalizes_embeddings"):
            if getattr(text, name) != getattr(generator, name):
                raise ValueError(
                    f"generator and discriminator share embeddings: {name} {getattr(generator, name)} is not "
                    f"{getattr(text, name)}"
                )
        if (text.embed_width or text.width) != (generator.embed_width or generator.width):
            raise ValueError("generator and discriminator share embeddings: embed_width must be the same")
        self.discriminator = TextModel(text, {"rtd": HeadConfig("rtd")})
        self.generator = TextModel(generator, {"mlm": HeadConfig("mlm")})
        own, other = self.generator.encoder.embeddings, self.discriminator.encoder.embeddings
        for name in SHARED:
            setattr(own, name, getattr(other, name))

    @classmethod
    def join(cls, discriminator: TextModel, generator: TextModel) -> "ReplacedTokenModel":
        """A model of two that were saved apart.

        Raises:
            ValueError: their embeddings are not the same to the bit, or a head is missing.
        """
        model = cls(discriminator.config, generator.config)
        first, second = (part.encoder.embeddings.state_dict() for part in (discriminator, generator))
        for name in first:
            if name.split(".")[0] in SHARED and not torch.equal(first[name], second[name]):
                raise ValueError(f"generator and discriminator were not trained together: embeddings.{name} differs")
        for mine, given, head in ((model.generator, generator, "mlm"), (model.discriminator, discriminator, "rtd")):
            if f"head {head}" not in mine.load_pretrained(given):
                raise ValueError(f"one of generator and discriminator has no head of kind {head}")
        return model

    def forward(self, tokens: Tokens, ids: Tensor, masked_positions: Tensor) -> Replaced:
        """Guesses, draws from the guesses, and judges.

        What stands at a hidden place is drawn from the generator's softmax, by the largest of its logits plus Gumbel
        noise of torch's generator; no gradient passes it. A draw that is the original token counts as original.

        Args:
            tokens: B texts of N tokens.
            ids: (N,), with tokens hidden at `masked_positions`.
            masked_positions: (M,).
        """
        generator = self.generator
        guesses = generator.head("mlm", generator.encoder(tokens._replace(ids=ids))[masked_positions], tokens)
        with torch.no_grad():
            noise = -torch.empty_like(guesses, dtype=torch.float32).exponential_().log()
            drawn = (guesses.float() + noise).argmax(-1)
            read = tokens.ids.clone()
            read[masked_positions] = drawn
        logits = self.discriminator(tokens._replace(ids=read), "rtd")
        return Replaced(guesses, read, read != tokens.ids, logits)


def replaced_token_losses(out: Replaced, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the generator's cross entropy over M masked positions and of the discriminator's over all N tokens.

    Args:
        out: of the model.
        labels: (M,), what stood at the masked positions.
    """
    guessed = F.cross_entropy(out.guesses.float(), labels, reduction="sum")
    return guessed, F.binary_cross_entropy_with_logits(out.logits.float(), out.replaced.float(), reduction="sum")
