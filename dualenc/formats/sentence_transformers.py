"""The folders of sentence-transformers, read and written: modules, prompts, pooling, dense layers.

A folder lists its modules in `modules.json`, each with a folder of its own. An encoder (Transformer) is followed by
Pooling, any number of Dense modules, and Normalize or nothing. Vectors are of unit length here, with Normalize or
without it. What would make other vectors than the library's is refused by name.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.model_folder import CONFIG, MODULES
from dualenc.formats.state_dict import Rule, Weights, read_state
from dualenc.models.heads.vectors import DENSE_ACTIVATIONS, DenseConfig, EmbeddingConfig
from dualenc.models.text_encoder import Pool
from dualenc.utils.errors import ModelError, warn_once
from dualenc.utils.files import read_json, write_json

SETTINGS = "config_sentence_transformers.json"
# The library reads the first of these files that holds anything.
ENCODER_SETTINGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
NAMES = {"module_input_name": ("sentence_embedding",), "module_output_name": ("sentence_embedding", None)}
POOLING: dict[str, Pool] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
# Keys that older versions of the library read and write -> the mode of pooling that each turns on.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Options of transformers in the encoder's settings, and those of them that do not change the vectors.
HARMLESS = {"trust_remote_code", "attn_implementation", "add_pooling_layer", "dtype", "torch_dtype"}
OPTIONS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
TEXTS = {"method": "forward", "method_output_name": "last_hidden_state"}
# Other keys of these settings -> the values that can be computed.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": TEXTS},),
    "module_output_name": ("token_embeddings",),
    "processing_kwargs": ({}, None),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_name_or_path": (None,),
}
APPLIED = ("max_seq_length", "do_lower_case", "unpad_inputs")  # Unpadded texts have the same vectors.
KNOWN = {"__version__", "requirements", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"}
KNOWN |= {"truncate_dim"}
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "torch.nn.modules.linear.Identity",
    **{kind: f"torch.nn.modules.activation.{kind.__name__}" for kind in DENSE_ACTIVATIONS.values()},
}
DENSE_FILES = (CONFIG, "model.safetensors")
HEAD = "embedding"  # name of the head that holds what is read


@dataclass(frozen=True)
class SentenceFolder:
    """Content of a folder of sentence-transformers, except for the encoder itself.

    Attributes:
        encoder: folder of the encoder.
        pool: pooling.
        vectors: dense layers, prompts and dimensions; None where the folder has none of them.
        dense: folder of each dense layer.
        inputs: dimensions that each dense layer takes.
        max_length: longest text in tokens; None for that of the tokenizer.
        lowercase: whether texts are converted to lower case first.
    """

    encoder: Path
    pool: Pool
    vectors: EmbeddingConfig | None
    dense: tuple[Path, ...]
    inputs: tuple[int, ...]
    max_length: int | None
    lowercase: bool

    def check_width(self, width: int) -> None:
        """Refuse dense layers that do not take what is before them.

        Args:
            width: width of the encoder.

        Raises:
            ModelError: If one does not; the message names its file.
        """
        layers = () if self.vectors is None else self.vectors.dense
        for folder, taken, layer in zip(self.dense, self.inputs, layers, strict=True):
            if taken != width:
                raise ModelError(f"{folder / CONFIG}: in_features {taken} must be {width}, the dimensions before it")
            width = layer.width

    def read_dense(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Read the tensors of the dense layers, under the names of a `TextModel`.

        Args:
            shapes: shapes of these tensors by name.

        Raises:
            ModelError: If a file is missing or damaged, or its tensors do not match its config.
        """
        state: dict[str, Tensor] = {}
        for i, folder in enumerate(self.dense):
            start = f"heads.{HEAD}.{2 * i}."  # An activation follows each layer.
            own = {name: shape for name, shape in shapes.items() if name.startswith(start)}
            weights = Weights(folder)
            try:
                rules = [Rule((name,), (f"linear.{name.removeprefix(start)}",)) for name in own]
                state |= read_state(weights, rules, own, str(weights.path))
            finally:
                weights.close()
        return state


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Read the configuration of a folder of sentence-transformers.

    Raises:
        ModelError: If a file is missing or damaged, or the folder asks for what dualenc cannot compute; the message
            names the file and the key.
    """
    modules = read_modules(folder)
    path = folder / MODULES
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ModelError(f"{path} must begin with a Transformer and a Pooling, found {', '.join(kinds) or 'nothing'}")
    normalized = kinds[-1] == "Normalize"
    if normalized:
        normalize = modules.pop()[1] / CONFIG
        _check_values(normalize, _optional(normalize), NAMES, ())
    if other := [inside.name for kind, inside in modules[2:] if kind != "Dense"]:
        raise ModelError(f"{path}: the module {other[0]} at this place cannot be computed by dualenc")
    dense = tuple(inside for _, inside in modules[2:])
    layers = [_read_dense(inside / CONFIG) for inside in dense]
    encoder = modules[0][1]
    about, where = _encoder_settings(encoder)
    if (length := about.get("max_seq_length")) is not None:
        _check_positive(where, about, "max_seq_length")
    return SentenceFolder(
        encoder,
        _pooling(modules[1][1] / CONFIG),
        _vectors(folder / SETTINGS, tuple(layer for _, layer in layers), normalized),
        dense,
        tuple(inputs for inputs, _ in layers),
        length,
        bool(about.get("do_lower_case")),
    )


def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """Read the kind and the folder of each module.

    Raises:
        ModelError: If the list is damaged, names a folder outside, or a kind that dualenc lacks.
    """
    path = folder / MODULES
    try:
        found = [(str(one["type"]), str(one["path"]), str(one.get("name", i))) for i, one in enumerate(read_json(path))]
    except (TypeError, KeyError, AttributeError):
        raise ModelError(f"{path} must be a list of modules with type and path") from None
    names = [name for _, _, name in found]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ModelError(f"{path}: two modules have the name {twice[0]!r}")
    modules = []
    for kind, inside, _ in found:
        name = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers.") or name not in KINDS:
            raise ModelError(f"{path}: the module {kind} cannot be computed by dualenc")
        if folder.resolve() not in ((folder / inside).resolve(), *(folder / inside).resolve().parents):
            raise ModelError(f"{path}: the path {inside!r} must lie inside its folder")
        modules.append((name, folder / inside))
    return modules


def _encoder_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """Read the settings of the encoder, and return them with their file."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder / CONFIG} does not exist; {MODULES} names its folder")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder / 'adapter_config.json'}: adapters cannot be computed by dualenc: merge them first")
    paths = [folder / name for name in ENCODER_SETTINGS]
    path = next((path for path in paths if path.is_file() and read_json(path)), paths[0])
    about = _optional(path)
    for key in OPTIONS:
        options = about.get(key) or {}
        if not isinstance(options, dict) or options.keys() - HARMLESS:
            raise ModelError(f"{path}: {key} {json.dumps(options)} cannot be computed by dualenc")
    _check_values(path, about, COMPUTED, (*APPLIED, *OPTIONS))
    return about, path


def _check_values(
    path: Path, about: Mapping[str, Any], computed: Mapping[str, Sequence[Any]], known: Collection[str]
) -> None:
    """Refuse settings that dualenc does not compute.

    Args:
        path: the file, for messages.
        about: the parsed settings.
        computed: values that can be computed, by key.
        known: other keys that are known.
    """
    for key, value in about.items():
        if key in known:
            continue
        if key not in computed:
            raise ModelError(f"{path}: {key} is unknown to dualenc, which cannot compute the same vectors with it")
        if value not in computed[key]:
            raise ModelError(f"{path}: {key} {json.dumps(value)} cannot be computed by dualenc")


def _pooling(path: Path) -> Pool:
    about = _object(path)
    sizes = ("word_embedding_dimension", "embedding_dimension")
    _check_values(path, about, {"include_prompt": (True,)}, (*sizes, *FLAGS, "pooling_mode"))
    chosen = about.get("pooling_mode")
    if chosen is None:  # The mean is the library's default.
        chosen = [mode for key, mode in FLAGS.items() if about.get(key)] or ["mean"]
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list) or len(chosen) != 1 or chosen[0] not in POOLING:
        shown = " and ".join(map(str, chosen)) if isinstance(chosen, list) else repr(chosen)
        raise ModelError(f"{path}: pooling by {shown} cannot be computed by dualenc")
    return POOLING[chosen[0]]


def _read_dense(path: Path) -> tuple[int, DenseConfig]:
    """Read the number of inputs and the configuration of a dense layer."""
    about = _object(path)
    known = ("in_features", "out_features", "bias", "activation_function")
    _check_values(path, about, {**NAMES, "use_residual": (False,)}, known)
    named = str(about.get("activation_function", ACTIVATIONS[nn.Tanh]))
    usual: dict[str, Any] = {"Identity": None, **{kind.__name__: name for name, kind in DENSE_ACTIVATIONS.items()}}
    activation = named.rpartition(".")[2]
    if not named.startswith("torch.nn.") or activation not in usual:
        raise ModelError(f"{path}: activation_function {named} cannot be computed by dualenc")
    inputs, width, bias = about.get("in_features", 0), about.get("out_features", 0), about.get("bias", True)
    if not isinstance(bias, bool):
        raise ModelError(f"{path}: bias must be true or false, found {json.dumps(bias)}")
    for key in ("in_features", "out_features"):
        _check_positive(path, about, key)
    return inputs, DenseConfig(width, bias, usual[activation])


def _vectors(path: Path, dense: tuple[DenseConfig, ...], normalized: bool) -> EmbeddingConfig | None:
    """Read the prompts and the number of dimensions."""
    about = _optional(path)
    if (kind := about.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise ModelError(f"{path}: model_type {kind} cannot be computed by dualenc")
    if unknown := [key for key in about if key not in KNOWN]:
        warn_once(f"{path}: {', '.join(unknown)}: not known to dualenc, and not applied")
    if (dim := about.get("truncate_dim")) is not None:
        _check_positive(path, about, "truncate_dim")
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not (similarity == "dot" and normalized and dim is None):
        raise ModelError(
            f"{path}: similarity_fn_name {similarity} cannot be computed by dualenc, whose vectors have unit length: "
            'remove it to compare by "cosine"'
        )
    prompts, default = about.get("prompts") or {}, about.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ModelError(f"{path}: prompts must be an object of strings")
    prompts = {name: text or "" for name, text in prompts.items()}
    if default in ("query", "document"):  # The library always has both, empty where they are not named.
        prompts.setdefault(default, "")
    try:
        vectors = EmbeddingConfig(dense, prompts, default, dim)
    except ValueError as error:
        raise ModelError(f"{path}: {str(error).replace('default_prompt', 'default_prompt_name')}") from None
    return None if vectors == EmbeddingConfig() else vectors


def _check_positive(path: Path, about: Mapping[str, Any], key: str) -> None:
    """Refuse a setting that is not a positive number."""
    value = about.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} must be a positive number, found {json.dumps(value)}")


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} must be an object")
    return found


def _optional(path: Path) -> dict[str, Any]:
    return _object(path) if path.is_file() else {}


def check_prompts(prompts: Mapping[str, str], tokenizer: Tokenizer, where: str) -> None:
    """Refuse prompts with a special token that the tokenizer takes for text, and the library for the token.

    Args:
        prompts: prompts by name.
        tokenizer: tokenizer of the model.
        where: the folder, for messages.

    Raises:
        ModelError: If there is such a prompt.
    """
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = False
    for name, text in prompts.items():
        if backend.encode(text).ids != tokenizer.backend.encode(text).ids:
            raise ModelError(f"{where}: prompts.{name} {text!r} has a special token, which dualenc takes for text")


def write_modules(
    folder: Path,
    width: int,
    max_length: int,
    pool: Pool,
    layers: Sequence[tuple[nn.Linear, nn.Module]],
    vectors: EmbeddingConfig,
) -> None:
    """Write all files of a folder but those of the encoder itself, which lies in the folder.

    All versions of the library since 2 read these names of modules and keys of layers.

    Args:
        folder: the folder.
        width: width of the encoder.
        max_length: longest text in tokens.
        pool: the pooling.
        layers: linear layers after pooling, each with its activation.
        vectors: prompts and dimensions; `layers` stand for its own.
    """
    write_json(folder / ENCODER_SETTINGS[0], {"max_seq_length": max_length, "do_lower_case": False})
    names = ["", "1_Pooling", *(f"{i}_Dense" for i in range(2, 2 + len(layers))), f"{2 + len(layers)}_Normalize"]
    for name in names[1:]:
        (folder / name).mkdir()
    modes = {key: POOLING[mode] == pool for key, mode in FLAGS.items() if mode in POOLING}
    write_json(folder / names[1] / CONFIG, {"word_embedding_dimension": width, **modes})
    for name, (linear, activation) in zip(names[2:-1], layers, strict=True):
        _write_dense(folder / name, linear, activation)
    write_json(folder / names[-1] / CONFIG, {})
    kinds = [name.partition("_")[2] or "Transformer" for name in names]
    modules = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    write_json(folder / MODULES, modules)
    about: dict[str, Any] = {"prompts": vectors.prompts, "default_prompt_name": vectors.default_prompt}
    about |= {"similarity_fn_name": "cosine"} | ({} if vectors.dim is None else {"truncate_dim": vectors.dim})
    write_json(folder / SETTINGS, about)


def _write_dense(folder: Path, linear: nn.Linear, activation: nn.Module) -> None:
    about = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    write_json(folder / CONFIG, {**about, "activation_function": ACTIVATIONS[type(activation)]})
    state = {f"linear.{name}": x.detach().float().cpu().contiguous() for name, x in linear.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
