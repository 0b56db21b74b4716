"""Prompts and dimensions of text embeddings: resolving what a caller asks for with the settings of a model."""

import dataclasses
import json

from dualenc.models.heads import TextModel
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.utils.arguments import shown_value
from dualenc.utils.errors import ModelError
from dualenc.utils.text import did_you_mean, quoted

ENDS = (" ", ":", "\n", "\t")  # ends of a prompt that is given as text; a name has none of them


def prompt_text(settings: EmbeddingConfig, prompt: str | None, model: str) -> str:
    """Return the text to put before each text.

    Args:
        settings: settings of the model's embeddings.
        prompt: name of one of its prompts, or the text itself, which ends with white space or a colon; "" for none;
            None for the model's default.
        model: name of the model, for messages.

    Raises:
        ModelError: If it is neither.
    """
    if prompt is None:
        return "" if settings.default_prompt is None else settings.prompts[settings.default_prompt]
    if not isinstance(prompt, str):
        raise ModelError(f"prompt is {shown_value(prompt)}: pass the name of a prompt, or its text")
    if prompt in settings.prompts:
        return settings.prompts[prompt]
    if not prompt or prompt.endswith(ENDS):
        return prompt
    as_text = f"a text to put before each text ends with a blank or a colon, such as {quoted(prompt + ' ')}"
    hint = did_you_mean(prompt, settings.prompts) if settings.prompts else "it has none"
    raise ModelError(f"prompt {quoted(prompt)} is not one of the prompts of {model}: {hint} ({as_text})")


def embedding_dim(settings: EmbeddingConfig, dim: int | None, width: int, model: str) -> int:
    """Return the number of dimensions of the embeddings.

    Args:
        settings: settings of the model's embeddings.
        dim: dimensions to keep; None for the model's default.
        width: all dimensions.
        model: name of the model, for messages.

    Raises:
        ModelError: If it is not a number from 1 to `width`.
    """
    if dim is None:
        return min(settings.dim or width, width)
    if not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= width:
        raise ModelError(f"dim is {shown_value(dim)}: {model} has {width} dimensions, so it must be 1 to {width}")
    return dim


def described_vectors(model: TextModel) -> str:
    """Return all settings of the embedding head as JSON; an empty string for a head that leaves them open."""
    head = model.head_configs.get(model.embedding_head or "")
    if head is None or head.embedding is None:
        return ""
    return json.dumps([head.pool, dataclasses.asdict(head.embedding)], sort_keys=True)


def facts_of_embedding(model: TextModel) -> list[tuple[str, str]]:
    """Return facts about the embeddings of a text model as pairs of name and value, for display."""
    settings, facts = model.vectors, []
    if settings.dense or settings.dim is not None:
        kept = "" if settings.dim is None else f", of which {settings.dim} are kept"
        facts.append(("dimensions of a text", f"{model.embedding_width}{kept}"))
    if settings.prompts:
        names = [f"{name} (default)" if name == settings.default_prompt else name for name in settings.prompts]
        facts.append(("prompts", ", ".join(names)))
    return facts
