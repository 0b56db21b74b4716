"""Replaced-token detection (ELECTRA): a small generator replaces tokens, a larger discriminator detects them."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualenc.models.heads.base import HeadConfig, make_head
from dualenc.models.heads.text_model import TextModel
from dualenc.models.text_encoder import TextConfig
from dualenc.tokens import Tokens

# Parts of the embeddings that both encoders share; each has its own projection to the encoder's width.
SHARED = ("token_embeddings", "position_embeddings", "segment_embeddings", "norm")
GENERATOR, DISCRIMINATOR = HeadConfig("mlm"), HeadConfig("rtd")


class Replaced(NamedTuple):
    """Outputs of a step of replaced-token detection on N tokens, M of which the generator guesses."""

    guesses: Tensor  # (M, V) logits of the generator
    ids: Tensor  # (N,) int64, input of the discriminator
    replaced: Tensor  # (N,) bool, whether the input differs from the original token
    logits: Tensor  # (N,) of the discriminator, above 0 for "replaced"


def generator_config(text: TextConfig, size: float) -> TextConfig:
    """Return the architecture of a generator: as deep as the discriminator, and narrower.

    See Clark et al. 2020, section 3.2.

    Args:
        text: architecture of the discriminator.
        size: heads and widths of the generator's blocks, as a factor of the discriminator's; the paper found 1/4 to 1/2
            best.

    Raises:
        ValueError: If the size does not lie between 0 and 1.
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
        text: architecture of the discriminator, which is the encoder to use after pretraining.
        generator: architecture of the generator; see `generator_config`.

    Raises:
        ValueError: If the two cannot share their embeddings.
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
        self.discriminator = TextModel(text, {"rtd": DISCRIMINATOR})
        self.generator = TextModel(generator, {"mlm": GENERATOR})
        own, other = self.generator.encoder.embeddings, self.discriminator.encoder.embeddings
        for name in SHARED:
            setattr(own, name, getattr(other, name))

    @classmethod
    def join(cls, discriminator: TextModel, generator: TextModel) -> "ReplacedTokenModel":
        """Return a model of two parts that were saved separately.

        Raises:
            ValueError: If their embeddings are not bit-equal, or a head is missing.
        """
        model = cls(discriminator.config, generator.config)
        first, second = (part.encoder.embeddings.state_dict() for part in (discriminator, generator))
        for name in first:
            if name.split(".")[0] in SHARED and not torch.equal(first[name], second[name]):
                raise ValueError(f"generator and discriminator were not trained together: embeddings.{name} differs")
        for mine, given, head in ((model.generator, generator, "mlm"), (model.discriminator, discriminator, "rtd")):
            if head not in mine.load_pretrained(given).whole:
                raise ValueError(f"generator or discriminator lacks a head of kind {head}")
        return model

    def forward(self, tokens: Tokens, ids: Tensor, masked_positions: Tensor) -> Replaced:
        """Guess masked tokens, draw replacements from the guesses, and judge every token.

        A replacement is drawn from the generator's softmax, as the argmax of its logits plus Gumbel noise of torch's
        generator; no gradient passes through the draw. A draw that equals the original token counts as original.

        Args:
            tokens: B texts of N tokens.
            ids: (N,), with masked tokens at `masked_positions`.
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
    """Return the sums of the generator's loss over M masked positions and of the discriminator's over all N tokens.

    Args:
        out: outputs of the model.
        labels: (M,) original tokens at the masked positions.
    """
    guessed = make_head(GENERATOR).loss(out.guesses, labels)
    return guessed, make_head(DISCRIMINATOR).loss(out.logits, out.replaced)
