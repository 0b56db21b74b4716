"""The export format ONNX: files of both towers, or of a text model, for programs without torch."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.export import Dim

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.interop import references
from dualenc.interop.export_format import ExportFormat, read_object
from dualenc.interop.inputs import OF_TOKENS, parts_of
from dualenc.models.dual_encoder import DualEncoder, unit
from dualenc.models.heads import TextModel
from dualenc.models.text_encoder import Pool, TextConfig
from dualenc.models.tower import evaluating
from dualenc.report.card import ModelSource
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, write_json
from dualenc.utils.text import one_line

ONNX = "onnx.json"
OPSET = 20  # the first with GELU as one operator; onnxruntime reads it since 1.17
ONE_FILE = 1_500_000_000  # bytes; larger weights are written to a second file, since a protobuf is limited to 2 GB

Shapes = dict[str, list[int | str]]  # by name; a string names an axis of any length


class OnnxFormat(ExportFormat):
    """Format of onnxruntime: `image.onnx` and `text.onnx` in float32, with tokenizer and preprocessing."""

    name = "onnx"
    files = ("image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data", "tokenizer.json", "preprocess.json", ONNX)
    uploaded = (ONNX, "*.onnx", "*.onnx.data", "tokenizer.json", "preprocess.json")
    weights = ("*.onnx",)
    reference = references.ONNXRUNTIME
    tolerance = 1e-4

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        """Write a dual encoder or a text model; see `ExportFormat.write`."""
        if isinstance(model, TextPredictor):
            return write_text_onnx(model, folder)
        write_onnx(model, folder)
        return []

    def snippet(self, source: ModelSource, images: bool) -> str:
        """Return a program that opens the graphs and the tokenizer."""
        image = 'image = onnxruntime.InferenceSession(f"{folder}/image.onnx")\n' if images else ""
        return source.with_folder(
            "import onnxruntime\nimport tokenizers",
            f"{image}"
            'text = onnxruntime.InferenceSession(f"{folder}/text.onnx")\n'
            'tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")\n'
            "tokenizer.encode_special_tokens = True  # the name of a special token in a text is text",
        )

    def task(self, folder: Path) -> str:
        """Return the pipeline tag of both towers, or that of a text model."""
        return super().task(folder) if (folder / "image.onnx").is_file() else "feature-extraction"

    def describe(self, folder: Path) -> str:
        """Return the inputs and outputs of the graphs, and how to use them."""
        return describe_onnx(folder)

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return `onnx.json`."""
        return read_object(folder / ONNX)


class ImagePart(nn.Module):
    """Image tower of a dual encoder, with its projection."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.projection = model.image, model.image_projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalized images (B, 3, S, S) as (B, E) of unit length."""
        return unit(self.projection(self.tower(pixels)))


class TextPart(nn.Module):
    """Text tower of a dual encoder, with its projection."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.encoder, self.projection = model.text, model.text_projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed ids and mask (B, T) as (B, E) of unit length."""
        ids, mask, _ = pad_texts(self.encoder.config, ids, mask)
        return unit(self.projection(self.encoder.pool_padded(self.encoder.forward_padded(ids, mask), mask)))


class WholeText(nn.Module):
    """Text model: the encoder, its classification heads, and its heads for named entities and for answers."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.encoder, self.heads = model.encoder, model.heads
        name = model.embedding_head
        self.dense = nn.Identity() if name is None else model.heads[name]
        self.pool: Pool | None = None if name is None else model.head_configs[name].pool
        self.dim = model.vectors.dim or model.embedding_width
        self.classifiers: dict[str, Pool | None] = {
            name: model.head_configs[name].pool for name in model.heads_for("text-classification")
        }
        self.of_tokens = [name for task in OF_TOKENS for name in model.heads_for(task)]

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute hidden states (B, T, D), embeddings (B, E) of unit length, and logits (B, C) or (B, T, C)."""
        own = torch.arange(ids.shape[1], device=ids.device)  # the positions before padding to `pad_to`
        ids, mask, types = pad_texts(self.encoder.config, ids, mask, types)
        hidden = self.encoder.forward_padded(ids, mask, types)
        embeddings = unit(self.dense(self.encoder.pool_padded(hidden, mask, self.pool))[:, : self.dim])
        logits = [
            self.heads[name](self.encoder.pool_padded(hidden, mask, pool)) for name, pool in self.classifiers.items()
        ]
        hidden = hidden[:, own]
        return hidden, embeddings, *logits, *(self.heads[name](hidden) for name in self.of_tokens)


def pad_texts(
    config: TextConfig, ids: Tensor, mask: Tensor, types: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad texts (B, T) of any length to the encoder's `pad_to`, where it has one.

    Tokenizers mask their padding, to which an encoder with `pad_to` attends. So the graph itself pads, for any caller.
    """
    if config.pad_to is None:
        return ids, mask, types
    # The width is a constant: an exporter cannot compare a known size with an unknown one.
    rest = ids.new_zeros(1, config.context_length).expand(ids.shape[0], -1)
    mask, ids = (torch.cat([x, rest], 1)[:, : config.context_length] for x in (mask, ids))
    types = None if types is None else torch.cat([types * mask[:, : types.shape[1]], rest], 1)[:, : ids.shape[1]]
    ids = ids.masked_fill(mask == 0, config.pad_id)
    return ids, mask.bool() | (torch.arange(config.context_length, device=ids.device) < config.pad_to), types


def write_onnx(embedder: Embedder, folder: Path) -> None:
    """Write both towers with their projections, in eval mode and float32.

    `image.onnx` takes `pixels` (batch, 3, S, S) float32, normalized; `text.onnx` takes `ids` and `mask` (batch, length)
    int64, padded on the right. Both give `embeddings` (batch, E) float32 of unit length. Batch and length are free, up
    to the encoder's positions. Weights of more than 1.5 GB are written to `image.onnx.data`.

    With `tokenizer.json` the tokenizers library alone makes ids and mask, truncated and padded. The file cannot express
    that the name of a special token in a text is text: set `encode_special_tokens`. `preprocess.json` is that of a
    model directory. `onnx.json` has the opset, inputs and outputs, and the scale and bias of the logits.

    Args:
        embedder: a dual encoder of dualenc, which does not change.
        folder: an empty folder.

    Raises:
        ModelError: If the model is one of open_clip or cannot be exported, or if onnx, onnxscript or onnxruntime is
            missing.
    """
    model = embedder.dual_encoder
    check_installed()
    with evaluating(model):
        scale, bias = model.logits()
    config, own = model.config, _exportable(model)
    size, (tokenizer, preprocess) = config.image.img_size, parts_of(embedder)
    files = {
        "image.onnx": _write(
            ImagePart(own), {"pixels": (torch.zeros(3, 3, size, size), {0: Dim("batch")})}, ["embeddings"],
            folder / "image.onnx", embedder.name,
        ),
        "text.onnx": _write(
            TextPart(own), _texts(config.text, ("ids", "mask")), ["embeddings"], folder / "text.onnx", embedder.name
        ),
    }  # fmt: skip
    _save_tokenizer(tokenizer, folder / "tokenizer.json")
    write_json(folder / "preprocess.json", asdict(preprocess))
    about = {
        "embed_dim": config.embed_dim,
        "logit_scale": float(scale.float()),
        "logit_bias": None if bias is None else float(bias.float()),
        "context_length": config.text.context_length,
        "image_size": size,
    }
    write_json(folder / ONNX, {"opset": OPSET, "files": files, **about, "dualenc": version("dualenc")})


def write_text_onnx(predictor: TextPredictor, folder: Path) -> list[str]:
    """Write a text model, in eval mode and float32.

    `text.onnx` takes `ids` and `mask` (batch, length) int64, padded on the right, and `types` where the encoder has
    more than one segment. It gives `hidden` (batch, length, D), `embeddings` (batch, E) of unit length, those of an
    embedding head or by the pooling of the encoder, `logits_NAME` (batch, C) of each classification head,
    `logits_NAME` (batch, length, C) of each head for named entities, and `logits_NAME` (batch, length, 2) of each head
    that answers questions, for the first and the last token of an answer. The rest is as in `write_onnx`; `onnx.json`
    has the labels of the heads, and the prompts that the caller puts before texts.

    Args:
        predictor: a text model, which does not change.
        folder: an empty folder.

    Returns:
        One note for each head that is not written.

    Raises:
        ModelError: See `write_onnx`.
    """
    check_installed()
    text, heads = predictor.model.config, predictor.model.head_configs
    part = WholeText(_exportable(predictor.model))
    named = [*part.classifiers, *part.of_tokens]
    outputs = ["hidden", "embeddings", *(f"logits_{name}" for name in named)]
    inputs = _texts(text, ("ids", "mask", "types") if text.types > 1 else ("ids", "mask"))
    files = {"text.onnx": _write(part, inputs, outputs, folder / "text.onnx", predictor.name)}
    _save_tokenizer(predictor.tokenizer, folder / "tokenizer.json")
    about = {
        "width": text.width,
        "context_length": text.context_length,
        "heads": {name: {"labels": heads[name].labels, "problem": heads[name].problem} for name in named},
    }
    if (vectors := predictor.model.vectors).prompts:
        about |= {"prompts": vectors.prompts, "default_prompt": vectors.default_prompt}
    write_json(folder / ONNX, {"opset": OPSET, "files": files, **about, "dualenc": version("dualenc")})
    kept = (*named, predictor.model.embedding_head)
    return [f"head {name}: text.onnx does not compute it" for name in heads if name not in kept]


def check_installed() -> None:
    """Raise if a package that writes or checks ONNX is missing.

    Raises:
        ModelError: If one is missing; the message names it.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ModelError(f"ONNX needs {', '.join(missing)}: pip install 'dualenc[onnx]'")


Model = TypeVar("Model", DualEncoder, TextModel)


def _exportable(model: Model) -> Model:
    """Return a copy on the CPU, in float32 and eval mode."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _texts(text: TextConfig, names: Sequence[str]) -> dict[str, tuple[Tensor, dict[int, Any]]]:
    """Return example texts, with the axes that may have any length."""
    axes = {0: Dim("batch"), 1: Dim("length", max=text.context_length)}
    return {name: (torch.ones(3, min(5, text.context_length), dtype=torch.int64), axes) for name in names}


def _write(
    part: nn.Module,
    inputs: Mapping[str, tuple[Tensor, dict[int, Any]]],
    outputs: Sequence[str],
    path: Path,
    name: str,
) -> dict[str, Shapes]:
    """Write one file, and return the shapes of its inputs and outputs."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    examples, axes = zip(*inputs.values())
    try:
        with _quiet(), torch.no_grad():
            # Exported separately: torch.onnx, given a module, falls back to methods that fix the size of all axes.
            exported = torch.export.export(part, tuple(examples), dynamic_shapes=tuple(axes))
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple(axes),
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
            assert program is not None
            ClearMetadataAndDocStringPass()(program.model)  # They name source files of this machine.
            large = sum(x.numel() * x.element_size() for x in exported.state_dict.values()) > ONE_FILE
            program.save(path, external_data=large)
    except Exception as error:  # torch, onnxscript and onnx raise many types, and do not share a base class
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = one_line((str(first).strip() or type(first).__name__).splitlines()[0])
        raise ModelError(f"{name} cannot be written as {path.name} ({reason})") from error
    graph = program.model.graph
    return {
        side: {
            str(value.name): [size if isinstance(size, int) else str(size) for size in value.shape or ()]
            for value in values
        }
        for side, values in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the exporters about their own code; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Save a `tokenizer.json` that truncates texts, and pads them to `pad_to` or to the longest of a batch."""
    backend = Backend.from_str(tokenizer.backend.to_str())  # This copy keeps the truncation.
    pad_id = (tokenizer.id_of("pad_token") or 0) if tokenizer.pad_to is None else tokenizer.pad_id
    # If texts may be longer than pad_to, padding to a fixed length leaves a batch ragged; the graph pads the rest.
    length = tokenizer.pad_to if tokenizer.pad_to == tokenizer.context_length else None
    backend.enable_padding(length=length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id) or "[PAD]")
    backend.save(str(path))


def describe_onnx(folder: Path) -> str:
    """Return what the card says about the files, in Markdown."""
    about = read_json(folder / ONNX)
    lines = [
        f"The graphs have opset {about['opset']} and compute in float32. Batch and length are free; texts are padded "
        "on the right.\n",
        "| file | inputs | outputs |\n|---|---|---|",
    ]
    for file, sides in about["files"].items():
        cells = [", ".join(f"`{key}` ({', '.join(map(str, x))})" for key, x in sides[side].items()) for side in sides]
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    lines.append(
        "\n`encode_batch` of the tokenizer gives `ids` and `mask` (its `attention_mask`), truncated to the longest "
        "text and padded."
    )
    if "prompts" in about:
        lines.append(
            "`onnx.json` has the texts of `prompts`, to put before each text that is to be embedded: "
            + (f"`{about['default_prompt']}` by default." if about["default_prompt"] else "none by default.")
        )
    if "image.onnx" in about["files"]:
        lines.append(
            "`preprocess.json` has the resizing of images, and the mean and standard deviation by channel that "
            "normalize `pixels`. Images are upright, and on white where they are transparent. Both embeddings have "
            "unit length. The probabilities of texts for an image are the softmax of `logit_scale` times the dot "
            "products. With a `logit_bias`, they are the sigmoid of the scaled products plus `logit_bias`. Both "
            "numbers are in `onnx.json`."
        )
    return "\n".join(lines)
