"""ONNX files of both towers, or of a text model: for programs that have no torch."""

import copy
import logging
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.export import Dim

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.model_folder import ONNX
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.interop.verify import TEXTS, Inputs, Verified, random_ids, verify
from dualenc.models.dual_encoder import DualEncoder, unit
from dualenc.models.heads import TextModel
from dualenc.models.text_encoder import Pool, TextConfig
from dualenc.models.tower import evaluating
from dualenc.tokens import Tokens, padding_index
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, write_json
from dualenc.utils.text import one_line

OPSET = 20  # the first that has GELU as one operator; onnxruntime reads it since 1.17
TOLERANCE = 1e-4  # fp32, beside onnxruntime
FILES = ("image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data", "tokenizer.json", "preprocess.json", ONNX)
ONE_FILE = 1_500_000_000  # bytes of weights: more lie in a file beside, since a protobuf ends at 2 GB

Shapes = dict[str, list[int | str]]  # by name; a string names an axis of any length


class ImagePart(nn.Module):
    """The image tower of a dual encoder and its projection."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.projection = model.image, model.image_projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) to embeddings (B, E) of unit length."""
        return unit(self.projection(self.tower(pixels)))


class TextPart(nn.Module):
    """The text tower of a dual encoder and its projection."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.encoder, self.projection = model.text, model.text_projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask (B, T) to embeddings (B, E) of unit length."""
        ids, mask, _ = filled(self.encoder.config, ids, mask)
        return unit(self.projection(self.encoder.pool_padded(self.encoder.forward_padded(ids, mask), mask)))


class WholeText(nn.Module):
    """A text model: its encoder and the heads that classify."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.encoder, self.heads = model.encoder, model.heads
        self.pool: Pool | None = model.embedding_pool
        self.shown: dict[str, Pool | None] = {
            name: model.head_configs[name].pool for name in model.heads_for("text-classification")
        }

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, ...]:
        """Hidden states (B, T, D), vectors (B, D) of unit length, and logits (B, C) of each head."""
        own = torch.arange(ids.shape[1], device=ids.device)
        ids, mask, types = filled(self.encoder.config, ids, mask, types)
        hidden = self.encoder.forward_padded(ids, mask, types)
        vectors = unit(self.encoder.pool_padded(hidden, mask, self.pool))
        logits = [self.heads[name](self.encoder.pool_padded(hidden, mask, how)) for name, how in self.shown.items()]
        return hidden[:, own], vectors, *logits


def filled(
    config: TextConfig, ids: Tensor, mask: Tensor, types: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Texts (B, T) as their encoder sees them: filled up to `pad_to`, where there is one, in whatever length they come.

    Tokenizers mask their filling, which an encoder with `pad_to` does not: it is put in here, for any caller.
    """
    if config.pad_to is None:
        return ids, mask, types
    # A constant width, and not the larger of two: sizes of which only one is known are no matter for an exporter.
    rest = ids.new_zeros(1, config.context_length).expand(ids.shape[0], -1)
    mask, ids = (torch.cat([x, rest], 1)[:, : config.context_length] for x in (mask, ids))
    types = None if types is None else torch.cat([types * mask[:, : types.shape[1]], rest], 1)[:, : ids.shape[1]]
    ids = ids.masked_fill(mask == 0, config.pad_id)
    return ids, mask.bool() | (torch.arange(config.context_length, device=ids.device) < config.pad_to), types


def write_onnx(embedder: Embedder, folder: Path) -> None:
    """Writes both towers, each with its projection, as they are in eval mode in fp32.

    `image.onnx` takes `pixels` (batch, 3, S, S) float32, normalized; `text.onnx` takes `ids` and `mask` (batch, length)
    int64, padded on the right. Both give `embeddings` (batch, E) float32 of unit length. Batch and length may be any,
    up to the encoder's positions. Weights of more than 1.5 GB lie beside, in `image.onnx.data`.

    With `tokenizer.json` the tokenizers library alone makes ids and mask: it cuts texts and fills them up. What it
    cannot say is that a special token's name in a text is text: set `encode_special_tokens`. `preprocess.json` is that
    of a model directory, `onnx.json` says the opset, inputs and outputs, the factor and the bias of the products.

    Args:
        embedder: whose model is one of ours; it stays as it is.
        folder: that is empty.

    Raises:
        ModelError: the model is open_clip's, or cannot be exported; or onnx, onnxscript or onnxruntime is missing.
    """
    model = embedder.dual_encoder
    check_installed()
    with evaluating(model):
        scale, bias = model.logits()
    config, own = model.config, _exportable(model)
    size, tokenizer = config.image.img_size, typing.cast(Tokenizer, embedder.tokenizer)
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
    write_json(folder / "preprocess.json", asdict(typing.cast(Any, embedder.preprocess)))
    about = {
        "embed_dim": config.embed_dim,
        "logit_scale": float(scale.float()),
        "logit_bias": None if bias is None else float(bias.float()),
        "context_length": config.text.context_length,
        "image_size": size,
    }
    write_json(folder / ONNX, {"opset": OPSET, "files": files, **about, "dualenc": version("dualenc")})


def write_text_onnx(predictor: TextPredictor, folder: Path) -> None:
    """Writes a text model, as it is in eval mode in fp32.

    `text.onnx` takes `ids` and `mask` (batch, length) int64, padded on the right, and `types` where the encoder knows
    more than one segment. It gives `hidden` (batch, length, D), `embeddings` (batch, D) of unit length, by the
    encoder's pool or that of an embedding head, and for each classification head `logits_NAME` (batch, C). The rest is
    as in `write_onnx`; `onnx.json` has the labels of the heads.

    Args:
        predictor: whose model stays as it is.
        folder: that is empty.

    Raises:
        ModelError: see `write_onnx`.
    """
    check_installed()
    text, heads = predictor.model.config, predictor.model.head_configs
    part = WholeText(_exportable(predictor.model))
    outputs = ["hidden", "embeddings", *(f"logits_{name}" for name in part.shown)]
    inputs = _texts(text, ("ids", "mask", "types") if text.types > 1 else ("ids", "mask"))
    files = {"text.onnx": _write(part, inputs, outputs, folder / "text.onnx", predictor.name)}
    _save_tokenizer(predictor.tokenizer, folder / "tokenizer.json")
    about = {
        "width": text.width,
        "context_length": text.context_length,
        "heads": {name: {"labels": heads[name].labels, "problem": heads[name].problem} for name in part.shown},
    }
    write_json(folder / ONNX, {"opset": OPSET, "files": files, **about, "dualenc": version("dualenc")})


def verify_text_onnx(predictor: TextPredictor, folder: Path, seed: int = 0) -> Verified:
    """Compares what `write_text_onnx` has written with the model, by onnxruntime in a process without torch.

    Hidden states and logits are compared by their asinh: to 1e-4 where they are small, to a share of 1e-4 where not.

    Args:
        predictor: the model.
        folder: what was written.
        seed: of random inputs.

    Raises:
        ModelError: a difference is above 1e-4; see `verify`.
    """
    rng = np.random.default_rng(seed)
    tokenizer = predictor.tokenizer
    inputs = Inputs(random_ids(tokenizer, predictor.model.config, rng), list(TEXTS))
    ours = text_outputs(TextPredictor(_exportable(predictor.model), tokenizer), inputs)
    return verify("onnx", str(folder), inputs, ours, TOLERANCE, tokenizer=tokenizer)


def text_outputs(predictor: TextPredictor, inputs: Inputs) -> dict[str, np.ndarray]:
    """What a text model makes of inputs, by the names of `dualenc.interop.references`: packed, without any padding."""
    model, part = predictor.model, WholeText(predictor.model)
    types = None
    if model.config.types > 1:  # as the peer has it: a text's second half is its second segment
        types = [[int(2 * i >= len(ids)) for i in range(len(ids))] for ids in inputs.ids]
    tokens = Tokens.pack(inputs.ids, types).to(predictor.device)
    with evaluating(model):
        packed = model.encoder(tokens)
        outputs = {f"logits_{name}": model.head(name, packed, tokens).asinh() for name in part.shown}
        outputs["ids"] = unit(model.encoder.pool(packed, tokens, part.pool))
    index, mask = padding_index(tokens.offsets, tokens.max_len)
    outputs["hidden"] = (packed[index] * mask[..., None])[tokens.rows].asinh()  # (M, L, D)
    outputs["texts"] = predictor.embed(inputs.texts)
    return {name: x.float().cpu().numpy() for name, x in outputs.items()}


def check_installed() -> None:
    """Looks for what writes ONNX, and for what checks it.

    Raises:
        ModelError: it is not there.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ModelError(f"ONNX needs {', '.join(missing)}: pip install 'dualenc[onnx]'")


Model = TypeVar("Model", DualEncoder, TextModel)


def _exportable(model: Model) -> Model:
    """A copy on the CPU, in fp32 and eval mode."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _texts(text: TextConfig, names: Sequence[str]) -> dict[str, tuple[Tensor, dict[int, Any]]]:
    """Examples of texts, with the axes that may have any length."""
    axes = {0: Dim("batch"), 1: Dim("length", max=text.context_length)}
    return {name: (torch.ones(3, min(5, text.context_length), dtype=torch.int64), axes) for name in names}


def _write(
    part: nn.Module,
    inputs: Mapping[str, tuple[Tensor, dict[int, Any]]],
    outputs: Sequence[str],
    path: Path,
    name: str,
) -> dict[str, Shapes]:
    """Writes one file, and says what goes in and comes out."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    examples, axes = zip(*inputs.values())
    try:
        with _quiet(), torch.no_grad():
            # By itself: given a module, torch.onnx tries other ways where this one fails, and those fix the axes.
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
            ClearMetadataAndDocStringPass()(program.model)  # names of this machine's files, line by line
            large = sum(x.numel() * x.element_size() for x in exported.state_dict.values()) > ONE_FILE
            program.save(path, external_data=large)
    except Exception as error:  # torch, onnxscript and onnx have each their own, and those plain ones
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
    """Without the exporters' warnings, which are about themselves; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """`tokenizer.json` that cuts texts, and fills them up to `pad_to` or to the longest of a batch."""
    backend = Backend.from_str(tokenizer.backend.to_str())  # with its truncation
    special = tokenizer.special
    pad_id = special.get("[PAD]", special.get("<pad>", 0)) if tokenizer.pad_to is None else tokenizer.pad_id
    # Where texts may be longer than pad_to, a fixed length would leave a batch ragged; the graph fills the rest.
    length = tokenizer.pad_to if tokenizer.pad_to == tokenizer.context_length else None
    backend.enable_padding(length=length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id) or "[PAD]")
    backend.save(str(path))


def describe_onnx(folder: Path) -> str:
    """Return what the card says of the files, in Markdown."""
    about = read_json(folder / ONNX)
    lines = [
        f"Graphs of opset {about['opset']} in fp32; batch and length may be any, texts are padded on the right.\n",
        "| file | in | out |\n|---|---|---|",
    ]
    for file, sides in about["files"].items():
        cells = [", ".join(f"`{key}` ({', '.join(map(str, x))})" for key, x in sides[side].items()) for side in sides]
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    lines.append(
        "\n`encode_batch` of the tokenizer makes `ids` and `mask` (`attention_mask`): it cuts texts at their longest "
        "and fills them up."
    )
    if "image.onnx" in about["files"]:
        lines.append(
            "`preprocess.json` says how pictures are resized, and the mean and deviation by channel that `pixels` are "
            "normalized with. Both embeddings have unit length; the probabilities of texts for an image are the "
            "softmax of `logit_scale` times the products, or, where there is a `logit_bias`, the sigmoid of that plus "
            "`logit_bias`; both numbers are in `onnx.json`."
        )
    return "\n".join(lines)
