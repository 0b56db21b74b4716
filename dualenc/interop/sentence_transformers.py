"""The export format of sentence-transformers: a text encoder, its pooling, its projection, normalization.

All versions of the library since 2 read these names of modules and keys.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.architecture import fitted, with_segment
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, tokenizer_config
from dualenc.formats.model_folder import CONFIG, MODULES
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, counts_positions, write_text_model
from dualenc.interop import references
from dualenc.interop.export_format import ExportFormat
from dualenc.models.text_encoder import Pool, TextEncoder
from dualenc.report.card import ModelSource
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json

MODES: dict[Pool, str] = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
ACTIVATIONS = {
    nn.GELU: "torch.nn.modules.activation.GELU",
    nn.Tanh: "torch.nn.modules.activation.Tanh",
    nn.Identity: "torch.nn.modules.linear.Identity",
}
SETTINGS = "config_sentence_transformers.json"
ENCODER_SETTINGS = "sentence_bert_config.json"
POOLING = "1_Pooling"
DENSE_FILES = ("config.json", "model.safetensors")


class SentenceTransformersFormat(ExportFormat):
    """Format of `SentenceTransformer(FOLDER)`; of a dual encoder the text tower alone."""

    name = "sentence-transformers"
    files = (
        CONFIG, "model.safetensors", "tokenizer.json", "tokenizer_config.json", MODULES, SETTINGS, ENCODER_SETTINGS,
        f"{POOLING}/config.json", *(f"[0-9]_Dense/{name}" for name in DENSE_FILES), "[0-9]_Normalize/config.json",
    )  # fmt: skip
    uploaded = (
        MODULES, SETTINGS, ENCODER_SETTINGS, CONFIG, "model*.safetensors", "model.safetensors.index.json",
        *TOKENIZER_FILES, *(f"[0-9]_*/{name}" for name in DENSE_FILES),
    )  # fmt: skip
    reference = references.SENTENCE_TRANSFORMERS
    compared = ("ids", "texts")
    segments = False

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        """Write the text tower of a dual encoder, or a text model; see `ExportFormat.write`."""
        write_sentence_transformer(model, folder)
        return []

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
    text model. The encoder and the pooling of a text model are written, its heads are not.

    Args:
        model: the dual encoder or text model.
        folder: an empty folder.

    Raises:
        ModelError: If no family of transformers has the architecture of the text tower, if the tower attends to
            padding, if the tokenizer has no padding token, or if the family counts positions by another token.
    """
    encoder, tokenizer, pool, layers = _parts(model)
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
        raise ModelError(f"{model.name}: its tokenizer has no padding token ([PAD] or <pad>)")
    state = with_segment({f"text.{name}": x for name, x in encoder.state_dict().items()}, text)
    state = {f"encoder.{name.removeprefix('text.')}": x for name, x in state.items()}
    write_text_model(folder, family, text, {}, tokenizer, state)
    write_json(folder / ENCODER_SETTINGS, {"max_seq_length": tokenizer.context_length, "do_lower_case": False})
    names = ["", POOLING, *(f"{i}_Dense" for i in range(2, 2 + len(layers))), f"{2 + len(layers)}_Normalize"]
    for name in names[1:]:
        (folder / name).mkdir()
    modes = {f"pooling_mode_{mode}": mode == MODES[pool] for mode in MODES.values()}
    write_json(folder / POOLING / "config.json", {"word_embedding_dimension": text.width, **modes})
    for name, (linear, activation) in zip(names[2:-1], layers, strict=True):
        _write_dense(folder / name, linear, activation)
    write_json(folder / names[-1] / "config.json", {})
    kinds = [name.partition("_")[2] or "Transformer" for name in names]
    modules = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    write_json(folder / MODULES, modules)
    write_json(folder / SETTINGS, {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})


def _parts(model: Embedder | TextPredictor) -> tuple[TextEncoder, Tokenizer, Pool, list[tuple[nn.Linear, nn.Module]]]:
    """Return the encoder, its tokenizer, its pooling, and the linear maps after pooling, each with its activation."""
    if isinstance(model, TextPredictor):
        encoder: Any = model.model.encoder
        return encoder, model.tokenizer, model.model.embedding_pool or encoder.config.pool, []
    dual = model.dual_encoder
    assert isinstance(model.tokenizer, Tokenizer)
    projection = dual.text_projection
    maps = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    layers: list[tuple[nn.Linear, nn.Module]] = []
    for i, one in enumerate(maps):
        if isinstance(one, nn.Linear):
            layers.append((one, maps[i + 1] if i + 1 < len(maps) else nn.Identity()))
    return dual.text, model.tokenizer, dual.config.text.pool, layers


def _write_dense(folder: Path, linear: nn.Linear, activation: nn.Module) -> None:
    """Write a module `Dense`."""
    about = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    write_json(folder / "config.json", {**about, "activation_function": ACTIVATIONS[type(activation)]})
    state: dict[str, Tensor] = {f"linear.{name}": x for name, x in linear.state_dict().items()}
    state = {name: x.detach().float().cpu().contiguous() for name, x in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
