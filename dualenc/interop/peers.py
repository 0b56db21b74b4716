"""What another library makes of a model: a program of its own, which knows nothing of dualenc.

    python -I peers.py LIBRARY MODEL INPUTS OUTPUTS

`verify.run` starts it in a fresh process. MODEL is what the library loads, INPUTS and OUTPUTS are folders:

- `INPUTS/inputs.npz`: `pixels` (N, 3, S, S) float32, normalised; `ids` and `mask` (M, L) int64, padded on the right;
- `INPUTS/inputs.json`: `pictures`, names of files of S x S pixels beside it, `photos`, of other sizes, and `texts`;
- `OUTPUTS/outputs.npz`: for each of these that the library has a tower for, the embeddings (., E) under its name, and
  `text_ids` with `text_mask`, what the library's tokenizer makes of the texts.

`pixels` and `ids` go into the model as they are; pictures, photos and texts through the library's own preprocessing.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Inputs = dict[str, Any]
Outputs = dict[str, np.ndarray]


def unit(x: Any) -> np.ndarray:
    """Rows of unit length, float32, of a tensor or an array."""
    x = np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def images_of(inputs: Inputs, name: str) -> list[Any]:
    """The files of this name, as RGB."""
    from PIL import Image

    return [Image.open(Path(inputs["folder"]) / file).convert("RGB") for file in inputs[name]]


def open_clip(model: str, inputs: Inputs) -> Outputs:
    """MODEL is what `open_clip.create_model_and_transforms` takes: `local-dir:FOLDER`, or `ARCH/WEIGHTS`."""
    import open_clip
    import torch

    architecture, _, weights = (model, "", "") if ":" in model else model.partition("/")
    torch.manual_seed(0)  # of an architecture without weights
    net, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
    tokenizer = open_clip.get_tokenizer(architecture)
    net.eval()
    with torch.no_grad():
        text_ids = tokenizer(inputs["texts"])
        ids = torch.from_numpy(inputs["ids"])
        length = getattr(getattr(net, "text", net), "context_length", ids.shape[1])
        whole = torch.zeros(len(ids), min(length, text_ids.shape[1]), dtype=ids.dtype)
        whole[:] = text_ids[0, -1] if text_ids[0, -1] != text_ids[0].max() else 0  # as the tokenizer pads
        whole[:, : ids.shape[1]] = torch.where(torch.from_numpy(inputs["mask"]).bool(), ids, whole[:, : ids.shape[1]])
        outputs = {
            "pixels": net.encode_image(torch.from_numpy(inputs["pixels"])),
            "ids": net.encode_text(whole),
            "texts": net.encode_text(text_ids),
        }
        for name in ("pictures", "photos"):
            if inputs[name]:
                batch = torch.stack([preprocess(image) for image in images_of(inputs, name)])
                outputs[name] = net.encode_image(batch)
    return {**{name: unit(x) for name, x in outputs.items()}, "text_ids": text_ids.numpy()}


LIBRARIES: dict[str, Callable[[str, Inputs], Outputs]] = {"open_clip": open_clip}


def main(library: str, model: str, folder: str, out: str) -> None:
    """See the module."""
    inputs: Inputs = json.loads((Path(folder) / "inputs.json").read_text("utf-8"))
    with np.load(Path(folder) / "inputs.npz", allow_pickle=False) as arrays:
        inputs |= dict(arrays)
    outputs = LIBRARIES[library](model, {**inputs, "folder": folder})
    np.savez(Path(out) / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
