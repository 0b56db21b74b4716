"""The export format of sentence-transformers: a text encoder, its pooling, its projection, normalization, prompts."""

from pathlib import Path
from typing import Any

from torch import nn

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.architecture import fitted, with_segment
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, tokenizer_config
from dualenc.formats.model_folder import CONFIG, MODULES
from dualenc.formats.sentence_transformers import DENSE_FILES, ENCODER_SETTINGS, SETTINGS, write_modules
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, counts_positions, write_text_model
from dualenc.interop import references
from dualenc.interop.export_format import ExportFormat
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.models.text_encoder import Pool, TextEncoder
from dualenc.report.card import ModelSource
from dualenc.utils.errors import ModelError


class SentenceTransformersFormat(ExportFormat):
    """Format of `SentenceTransformer(FOLDER)`; of a dual encoder the text tower alone."""

    name = "sentence-transformers"
    files = (
        CONFIG, "model.safetensors", "tokenizer.json", "tokenizer_config.json", MODULES, SETTINGS, ENCODER_SETTINGS[0],
        f"1_Pooling/{CONFIG}", *(f"[0-9]_Dense/{name}" for name in DENSE_FILES), f"[0-9]_Normalize/{CONFIG}",
    )  # fmt: skip
    uploaded = (
        MODULES, SETTINGS, *ENCODER_SETTINGS, CONFIG, "model*.safetensors", "model.safetensors.index.json",
        *TOKENIZER_FILES, *(f"[0-9]_*/{name}" for name in DENSE_FILES),
    )  # fmt: skip
    reference = references.SENTENCE_TRANSFORMERS
    compared = ("ids", "texts", "prompts")

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        """Write the text tower of a dual encoder, or a text model; see `ExportFormat.write`."""
        write_sentence_transformer(model, folder)
        if not isinstance(model, TextPredictor):
            return []
        heads = [name for name in model.model.head_configs if name != model.model.embedding_head]
        return [f"head {name}: the format has no place for it" for name in heads]

    def snippet(self, source: ModelSource, images: bool) -> str:
        """Return a program that embeds a sentence."""
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({source.arguments})\n"
            'print(model.encode(["a sentence"]))'
        )

    def task(self, folder: Path) -> str:
        """Return the pipeline tag of sentence embeddings."""
        return "sentence-similarity"


def write_sentence_transformer(model: Embedder | TextPredictor, folder: Path) -> None:
    """Write a text tower so that `SentenceTransformer(folder).encode` gives the embeddings of dualenc.

    These are `embed_texts` of a dual encoder, whose projection becomes one or more `Dense` modules, or `embed` of a
    text model. Of a text model the encoder and the first embedding head are written, with its pooling, dense layers,
    prompts and dimensions; other heads are not.

    Args:
        model: the dual encoder or text model.
        folder: an empty folder.

    Raises:
        ModelError: If no family of transformers has the architecture of the text tower, if the tower attends to
            padding, if the tokenizer has no padding token, or if the family counts positions by another token.
    """
    encoder, tokenizer, pool, layers, vectors = _parts(model)
    text = encoder.config
    if text.pad_to is not None:
        raise ModelError(
            f"{model.name}: its text tower attends to padding (text.pad_to {text.pad_to}), which sentence-transformers "
            "masks"
        )
    found = fitted(text, [name for name in FAMILIES if name != "siglip_text_model"])
    if found is None:
        raise ModelError(f"{model.name}: no family of transformers has the architecture of its text tower")
    family, text = found
    if not counts_positions(text, tokenizer):
        raise ModelError(
            f"{model.name}: {family.name} counts positions by its padding token, number {text.position_offset - 1}, "
            "which is another token in the tokenizer"
        )
    if "pad_token" not in tokenizer_config(tokenizer, text):
        raise ModelError(
            f"{model.name}: its tokenizer does not have a padding token: name one as pad_token in tokenizer_config.json"
        )
    state = with_segment({f"text.{name}": x for name, x in encoder.state_dict().items()}, text)
    state = {f"encoder.{name.removeprefix('text.')}": x for name, x in state.items()}
    write_text_model(folder, family, text, {}, tokenizer, state)
    write_modules(folder, text.width, tokenizer.context_length, pool, layers, vectors)


def _parts(
    model: Embedder | TextPredictor,
) -> tuple[TextEncoder, Tokenizer, Pool, list[tuple[nn.Linear, nn.Module]], EmbeddingConfig]:
    """Return the encoder, its tokenizer, its pooling, the linear maps after pooling with their activations, prompts."""
    if isinstance(model, TextPredictor):
        text: Any = model.model
        name = text.embedding_head
        pool = text.config.pool if name is None else text.head_configs[name].pool or text.config.pool
        return text.encoder, model.tokenizer, pool, [] if name is None else _maps(text.heads[name]), text.vectors
    dual = model.dual_encoder
    assert isinstance(model.tokenizer, Tokenizer)
    return dual.text, model.tokenizer, dual.config.text.pool, _maps(dual.text_projection), EmbeddingConfig()


def _maps(projection: nn.Module) -> list[tuple[nn.Linear, nn.Module]]:
    """Return the linear maps of a projection, each with its activation."""
    maps = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    return [
        (one, maps[i + 1] if i + 1 < len(maps) else nn.Identity())
        for i, one in enumerate(maps)
        if isinstance(one, nn.Linear)
    ]
