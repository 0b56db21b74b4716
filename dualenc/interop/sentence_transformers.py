"""Folders that the library sentence-transformers loads: an encoder, how to pool, a projection, unit length.

Names of modules and keys are those that all its versions since 2 read.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.architecture import fitted, with_segment
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.tokenizers import tokenizer_config
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, counts_positions, write_text_model
from dualenc.models.text_encoder import Pool, TextEncoder
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json

MODES: dict[Pool, str] = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
ACTIVATIONS = {
    nn.GELU: "torch.nn.modules.activation.GELU",
    nn.Tanh: "torch.nn.modules.activation.Tanh",
    nn.Identity: "torch.nn.modules.linear.Identity",
}
WAY_OUT = "export it with --format onnx"


def write_sentence_transformer(model: Embedder | TextPredictor, folder: Path) -> None:
    """Writes a text tower so that `SentenceTransformer(folder).encode` gives what we give.

    That is `embed_texts` of a dual encoder, whose projection becomes one or more `Dense`; or `embed` of a text model:
    its encoder and pooling go out, its heads do not.

    Args:
        model: which.
        folder: that is there, and empty.

    Raises:
        ModelError: the text tower has the architecture of no family of transformers, or sees its padding; or the
            tokenizer has no token to pad with, or not the one by which the family counts positions.
    """
    encoder, tokenizer, pool, layers = _parts(model)
    text = encoder.config
    if text.pad_to is not None:
        raise ModelError(
            f"{model.name}: its text tower sees the padding of a text (text.pad_to {text.pad_to}), which "
            f"sentence-transformers hides from it: {WAY_OUT}"
        )
    found = fitted(text, [name for name in FAMILIES if name != "siglip_text_model"])
    if found is None:
        raise ModelError(f"{model.name}: its text tower is of no family that transformers has: {WAY_OUT}")
    family, text = found
    if not counts_positions(text, tokenizer):
        raise ModelError(
            f"{model.name}: {family.name} counts positions by its padding token, number {text.position_offset - 1}, "
            f"where the tokenizer has another: {WAY_OUT}"
        )
    if "pad_token" not in tokenizer_config(tokenizer, text):
        raise ModelError(f"{model.name}: its tokenizer has no padding token ([PAD] or <pad>): {WAY_OUT}")
    state = with_segment({f"text.{name}": x for name, x in encoder.state_dict().items()}, text)
    state = {f"encoder.{name.removeprefix('text.')}": x for name, x in state.items()}
    write_text_model(folder, family, text, {}, tokenizer, state)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": tokenizer.context_length, "do_lower_case": False}
    )
    names = ["", "1_Pooling", *(f"{i}_Dense" for i in range(2, 2 + len(layers))), f"{2 + len(layers)}_Normalize"]
    for name in names[1:]:
        (folder / name).mkdir()
    modes = {f"pooling_mode_{mode}": mode == MODES[pool] for mode in MODES.values()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": text.width, **modes})
    for name, (linear, activation) in zip(names[2:-1], layers, strict=True):
        _write_dense(folder / name, linear, activation)
    write_json(folder / names[-1] / "config.json", {})
    kinds = [name.partition("_")[2] or "Transformer" for name in names]
    modules = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _parts(model: Embedder | TextPredictor) -> tuple[TextEncoder, Tokenizer, Pool, list[tuple[nn.Linear, nn.Module]]]:
    """The encoder, its tokenizer, how to pool, and the maps after that, each with its activation."""
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
    about = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    write_json(folder / "config.json", {**about, "activation_function": ACTIVATIONS[type(activation)]})
    state: dict[str, Tensor] = {f"linear.{name}": x for name, x in linear.state_dict().items()}
    state = {name: x.detach().float().cpu().contiguous() for name, x in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
