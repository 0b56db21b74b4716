"""Text embedders of any kind: a text model, or the text tower of a dual encoder."""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.text_checkpoint import CONFIGS, open_text
from dualenc.formats.model_folder import open_folder, spec_name
from dualenc.inference.embedder import Embedder, check_spec, load
from dualenc.inference.embedding import embedding_dim, prompt_text
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.utils.arguments import Precision
from dualenc.utils.errors import ModelError

QUERY_PROMPTS, DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")  # names in sentence-transformers


class TextTower:
    """Embedder of texts, as the commands use it that measure texts alone.

    Args:
        source: a text model, or a dual encoder, whose text tower embeds into the space of the images.
    """

    def __init__(self, source: TextPredictor | Embedder) -> None:
        self.source = source

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.source.name

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the embeddings."""
        return self.source.fingerprint

    @property
    def precision(self) -> Precision:
        """The precision in which the embeddings are computed."""
        return self.source.precision

    @property
    def model(self) -> nn.Module:
        """The module with the weights."""
        return self.source.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ModelError: If it is one of open_clip.
        """
        if not isinstance(self.source.tokenizer, Tokenizer):
            raise ModelError(f"{self.name} is a model of open_clip, whose texts cannot be cut into passages: import it")
        return self.source.tokenizer

    @property
    def settings(self) -> EmbeddingConfig:
        """Prompts and dimensions of the model; a dual encoder has none of its own."""
        return self.source.model.vectors if isinstance(self.source, TextPredictor) else EmbeddingConfig()

    def prompt(self, given: str | None = None, names: Sequence[str] = ()) -> str:
        """Return the text to put before texts.

        Args:
            given: name of one of the model's prompts, or the text itself; "" for none; None for the first of `names`
                that the model has, or else its default.
            names: names of prompts.

        Raises:
            ModelError: If it is not a prompt.
        """
        known = next((name for name in names if name in self.settings.prompts), None)
        return prompt_text(self.settings, known if given is None else given, self.name)

    def embed(self, texts: Sequence[str], before: str | None = None, dim: int | None = None) -> Tensor:
        """Embed texts as (N, E) of unit length in fp32, on the CPU.

        Args:
            texts: N texts.
            before: text to put before each of them, see `prompt`; None for the model's default.
            dim: number of dimensions to keep, the first ones; None for the model's default.

        Raises:
            ModelError: If the embeddings have fewer dimensions.
        """
        before = self.prompt() if before is None else before
        prompted = [before + text for text in texts]
        if isinstance(self.source, TextPredictor):
            return self.source.embed(prompted, prompt="", dim=dim)
        found = self.source.embed_texts(prompted)
        kept = embedding_dim(self.settings, dim, found.shape[1], self.name)
        return found if kept == found.shape[1] else F.normalize(found[:, :kept], dim=-1)


def load_text_tower(
    spec: str | os.PathLike[str], device: str | torch.device | None = None, precision: Precision = "fp32"
) -> TextTower:
    """Load an embedder of texts.

    Args:
        spec: a spec of `dualenc.load_text`, or of `dualenc.load` for the text tower of a dual encoder.
        device: device of the weights; None for CUDA where it is available, else the CPU.
        precision: see `Embedder`.

    Raises:
        ModelError: If the model cannot be read.
    """
    return TextTower((load if _is_dual(spec) else load_text)(spec, device, precision))


def check_text_tower(spec: str | os.PathLike[str]) -> None:
    """Refuse a spec of `load_text_tower` before the weights are read.

    Raises:
        ModelError: If there is no such model.
    """
    if _is_dual(spec):
        check_spec(spec)
    else:
        open_text(spec)


def _is_dual(spec: str | os.PathLike[str]) -> bool:
    """Return whether a spec names a dual encoder."""
    name = spec_name(spec)
    return (
        name.startswith("open_clip:")
        or open_folder(name, CONFIGS).first("text_model", "dual_encoder") == "dual_encoder"
    )
