"""The engine of a folder that `dualenc export --format onnx` wrote, run by onnxruntime, without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer as Backend

from dualenc.data.image_pixels import center_start, decode_pixels, resize_plan
from dualenc.search.service.engine import Engine, Scores, softmax
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json
from dualenc.utils.text import reason

AT_ONCE = 64  # texts or pictures of a call of a graph


class OnnxEngine(Engine):
    """A dual encoder or a text model as graphs of ONNX; see `Engine`.

    Args:
        folder: the folder.
        name: name of the model in answers.

    Raises:
        ModelError: If a file is missing or broken, or onnxruntime is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        about = read_json(folder / "onnx.json")
        self.fingerprint = str(read_json(folder / "export.json").get("fingerprint", ""))
        try:
            self.tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # The library raises a plain Exception.
            raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {reason(error)}") from None
        # The file cannot express that the name of a special token in a text is text.
        self.tokenizer.encode_special_tokens = True
        self.text = _session(folder / "text.onnx")
        self.inputs = [one.name for one in self.text.get_inputs()]
        self.images = (folder / "image.onnx").is_file()
        self.image = _session(folder / "image.onnx") if self.images else None
        self.preprocess = read_json(folder / "preprocess.json") if self.images else {}
        self.scale, self.bias = about.get("logit_scale"), about.get("logit_bias")
        self.prompt = about.get("prompts", {}).get(about.get("default_prompt"), "")
        outputs = {one.name: one.shape for one in self.text.get_outputs()}
        self.dims = int(outputs["embeddings"][-1])
        heads = [one for one in about.get("heads", {}) if len(outputs[f"logits_{one}"]) == 2]
        self.head, self.problem = "", ""
        if len(heads) == 1 and about["heads"][heads[0]]["problem"] != "regression":
            self.head, self.problem = heads[0], about["heads"][heads[0]]["problem"]
            self.labels = tuple(about["heads"][self.head]["labels"])

    def prepare(self, data: bytes) -> np.ndarray:
        """Return uint8 (S, S, 3); see `Engine.prepare`."""
        return preprocessed(decode_pixels(data), self.preprocess)

    def embed_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        """See `Engine.embed_pictures`."""
        assert self.image is not None
        mean, std = (np.float32(255) * np.array(self.preprocess[name], np.float32) for name in ("mean", "std"))
        parts = []
        for start in range(0, len(pictures), AT_ONCE):
            pixels = (np.stack(pictures[start : start + AT_ONCE]).astype(np.float32) - mean) / std  # (B, S, S, 3)
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            parts.append(self.image.run(["embeddings"], {"pixels": pixels})[0])
        return np.concatenate(parts)

    def embed_texts(self, texts: Sequence[str], prompt: str | None = None) -> np.ndarray:
        """See `Engine.embed_texts`."""
        before = self.prompt if prompt is None else prompt
        return self._run([before + text for text in texts], "embeddings")

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See `Engine.count_tokens`."""
        return sum(
            sum(one.attention_mask) for one in self.tokenizer.encode_batch([self.prompt + text for text in texts])
        )

    def label(self, texts: Sequence[str]) -> list[Scores]:
        """See `Engine.label`."""
        logits = self._run(texts, f"logits_{self.head}")
        scores = softmax(logits) if self.problem == "single_label" else 1 / (1 + np.exp(-logits))
        return [list(zip(self.labels, row, strict=True)) for row in scores.tolist()]

    def _run(self, texts: Sequence[str], output: str) -> np.ndarray:
        """Compute an output of the text graph for N texts, those of similar lengths together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), AT_ONCE):
            part = order[start : start + AT_ONCE]
            encodings = self.tokenizer.encode_batch([texts[i] for i in part])
            values = {"ids": "ids", "mask": "attention_mask", "types": "type_ids"}
            given = {
                name: np.array([getattr(one, values[name]) for one in encodings], np.int64) for name in self.inputs
            }
            for i, row in zip(part, self.text.run([output], given)[0]):
                rows[i] = row
        return np.stack(rows)


def preprocessed(pixels: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """Resize and crop an image as `dualenc.Preprocess` does, with Pillow's resizing.

    Args:
        pixels: uint8 (H, W, 3).
        how: the content of `preprocess.json`.

    Returns:
        uint8 (S, S, 3). Pixels of photos differ by at most 2 of 255 from those of `Preprocess`, which rounds elsewhere.
    """
    size, method = how["size"], Image.Resampling[how["interpolation"].upper()]
    height, width = pixels.shape[:2]
    center, target = resize_plan(height, width, size, how["resize"])
    image = _center(Image.fromarray(pixels), *center)
    height, width = target
    if image.size != (width, height):
        image = image.resize((width, height), method)
    return np.asarray(_center(image, size, size))


def _center(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the center of an image; a smaller one is padded with black."""
    left, top = center_start(image.width, width), center_start(image.height, height)
    if (image.height, image.width) == (height, width):
        return image
    return image.crop((left, top, left + width, top + height))


def _session(path: Path) -> Any:
    """Open a graph.

    Raises:
        ModelError: If it cannot be opened, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ModelError("a folder of ONNX needs onnxruntime: pip install 'dualenc[onnx]'") from None
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # The library has many exceptions, which do not share a base class.
        raise ModelError(f"{path} cannot be opened: {reason(error)}") from None
