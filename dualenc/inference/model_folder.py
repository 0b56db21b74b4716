"""Folders of models: written whole or not at all, fetched from the hub, and configs that are what they say."""

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError


def check_tokenizer(tokenizer: Tokenizer, text: TextConfig) -> None:
    """Refuses a tokenizer that gives what a text encoder does not take.

    Raises:
        ModelError: it has more entries, or makes longer texts.
    """
    if tokenizer.vocab_size > text.vocab_size:
        raise ModelError(f"the tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size {text.vocab_size}")
    if tokenizer.context_length > text.context_length:
        raise ModelError(
            f"the tokenizer gives {tokenizer.context_length} tokens, the model takes {text.context_length}"
        )
