"""What another library makes of a model: a program of its own, which knows nothing of dualenc.

    python -I references.py LIBRARY MODEL INPUTS OUTPUTS

`verify.run` starts it in a fresh process. MODEL is what the library loads, INPUTS and OUTPUTS are folders:

- `INPUTS/inputs.npz`: `pixels` (N, 3, S, S) float32, normalized; `ids` and `mask` (M, L) int64, padded on the right;
- `INPUTS/inputs.json`: `pictures`, names of files of S x S pixels beside it, `photos`, of other sizes, and `texts`;
- `OUTPUTS/outputs.npz`: for each of these that the library has a tower for, the embeddings (., E) under its name;
  `pictures_pixels` and `photos_pixels` (., 3, S, S), what goes into the image tower; `scale` and `bias`; and
  `text_ids` with `text_mask`, what the library's tokenizer makes of the texts.

`pixels` and `ids` go into the model as they are; pictures, photos and texts through the library's own preprocessing.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHORT = 64  # tokens: of more, the logits of a large vocabulary would not fit into memory
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
    made: Any = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
    net, _, preprocess = made
    pixels: Outputs = {}
    tokenizer = open_clip.get_tokenizer(architecture)
    net.eval()
    with torch.no_grad():
        text_ids = tokenizer(inputs["texts"])
        ids = torch.from_numpy(inputs["ids"])
        length = getattr(getattr(net, "text", net), "context_length", ids.shape[1])
        whole = torch.zeros(len(ids), min(length, text_ids.shape[1]), dtype=ids.dtype)
        whole[:] = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        whole[:, : ids.shape[1]] = torch.where(torch.from_numpy(inputs["mask"]).bool(), ids, whole[:, : ids.shape[1]])
        outputs = {
            "pixels": net.encode_image(torch.from_numpy(inputs["pixels"])),
            "ids": net.encode_text(whole),
            "texts": net.encode_text(text_ids),
        }
        for name in ("pictures", "photos"):
            if inputs[name]:
                batch = torch.stack([preprocess(image) for image in images_of(inputs, name)])
                outputs[name], pixels[f"{name}_pixels"] = net.encode_image(batch), batch.numpy()
        made = {name: unit(x) for name, x in outputs.items()}
        return {**made, **pixels, **logits_of(net), "text_ids": text_ids.numpy()}


def logits_of(net: Any) -> Outputs:
    """What scales and shifts the products of embeddings."""
    bias = getattr(net, "logit_bias", None)
    parts = {"scale": net.logit_scale.detach().exp(), **({} if bias is None else {"bias": bias.detach()})}
    return {name: x.float().reshape(1, 1).numpy() for name, x in parts.items()}


def transformers(model: str, inputs: Inputs) -> Outputs:
    """MODEL is a folder of Hugging Face's with images and texts."""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    net: Any = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = AutoImageProcessor.from_pretrained(model)
    pixels: Outputs = {}
    filled = net.config.model_type == "siglip"  # which sees its padding
    longest = min(tokenizer.model_max_length, inputs["ids"].shape[1])
    texts: Any = tokenizer(
        inputs["texts"],
        padding="max_length" if filled else True,
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    )

    def of(images: Any = None, ids: Any = None, mask: Any = None) -> Any:
        images = torch.from_numpy(inputs["pixels"][:1]) if images is None else images
        ids, mask = (texts["input_ids"][:1], texts["attention_mask"][:1]) if ids is None else (ids, mask)
        more = {} if filled else {"attention_mask": mask}
        return net(pixel_values=images, input_ids=ids, **more)

    with torch.no_grad():
        outputs = {
            "pixels": of(torch.from_numpy(inputs["pixels"])).image_embeds,
            "ids": of(ids=torch.from_numpy(inputs["ids"]), mask=torch.from_numpy(inputs["mask"])).text_embeds,
            "texts": of(ids=texts["input_ids"], mask=texts["attention_mask"]).text_embeds,
        }
        for name in ("pictures", "photos"):
            if inputs[name]:
                batch: Any = processor(images=images_of(inputs, name), return_tensors="pt")
                outputs[name] = of(batch["pixel_values"]).image_embeds
                pixels[f"{name}_pixels"] = batch["pixel_values"].numpy()
    made = {name: unit(x) for name, x in outputs.items()}
    masks = {} if filled else {"text_mask": texts["attention_mask"].numpy()}
    return {**made, **pixels, **logits_of(net), "text_ids": texts["input_ids"].numpy(), **masks}


def transformers_text(model: str, inputs: Inputs) -> Outputs:
    """MODEL is a folder of Hugging Face's with a text encoder, alone or under the head that its config names.

    `ids` as in `onnx`; hidden states, and the head's logits of the first `SHORT` tokens of each text as a text, come by
    their asinh.
    """
    import torch
    import transformers as library

    config: Any = library.AutoConfig.from_pretrained(model)
    tokenizer = library.AutoTokenizer.from_pretrained(model)
    ids, mask = torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"])
    # AutoModel has no name for SigLIP's text encoder alone, and takes CLIP for both towers.
    nested = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip_text_model": "SiglipTextModel"}
    encoder: Any = getattr(library, nested.get(config.model_type, "AutoModel"))
    net: Any = encoder.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        given: dict[str, Any] = {
            "input_ids": ids,
            **({} if "siglip" in config.model_type else {"attention_mask": mask}),
        }
        if (getattr(config, "type_vocab_size", None) or 0) > 1:
            given["token_type_ids"] = (mask * (2 * torch.arange(ids.shape[1]) >= mask.sum(1, keepdim=True))).long()
        outputs = {"hidden": (net(**given)[0] * mask[..., None]).asinh()}
        heads = ("ForMaskedLM", "ForSequenceClassification")
        for name in config.architectures or ():
            if name.endswith(heads):
                head: Any = getattr(library, name).from_pretrained(model, dtype=torch.float32).eval()
                logits = head(**{key: x[:, :SHORT] for key, x in given.items()}).logits
                outputs["logits"] = (logits * mask[:, :SHORT, None] if logits.dim() == 3 else logits).asinh()
    texts: Any = tokenizer(inputs["texts"], truncation=True, padding="max_length", max_length=ids.shape[1])
    found = {name: x.numpy() for name, x in outputs.items()}
    return {**found, "text_ids": np.array(texts["input_ids"]), "text_mask": np.array(texts["attention_mask"])}


def timm(model: str, inputs: Inputs) -> Outputs:
    """MODEL is `NAME` or `NAME/FILE` of timm's; gives the features of images, before any projection."""
    import timm
    import torch

    name, _, file = model.partition("/")
    more: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    net: Any = timm.create_model(name, pretrained=True, num_classes=0, **more).eval()
    with torch.no_grad():
        return {"features": unit(net(torch.from_numpy(inputs["pixels"])))}


def onnx(model: str, inputs: Inputs) -> Outputs:
    """MODEL is a folder that `dualenc.interop.onnx` wrote; by onnxruntime, Pillow and tokenizers, without torch.

    Of a text model alone `ids` has a second segment from the middle of each text on, where there are segments, and its
    hidden states and logits come by their asinh, `hidden` and `logits_NAME`.
    """
    import onnxruntime
    from tokenizers import Tokenizer

    folder = Path(model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(inputs["texts"])
    text_ids, text_mask, text_types = (
        np.array([getattr(one, name) for one in encodings], np.int64) for name in ("ids", "attention_mask", "type_ids")
    )
    mask = inputs["mask"]
    halves = mask * (2 * np.arange(mask.shape[1]) >= mask.sum(1, keepdims=True))

    def run(name: str, **values: np.ndarray) -> Outputs:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        wanted = {value.name: values[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        found: list[Any] = list(session.run(None, wanted))
        return dict(zip(names, found))

    of_ids = run("text", ids=inputs["ids"], mask=mask, types=halves)
    outputs = {"ids": of_ids.pop("embeddings")}
    if "hidden" in of_ids:
        of_ids["hidden"] = of_ids["hidden"] * mask[..., None]
    outputs |= {name: np.arcsinh(x) for name, x in of_ids.items()}
    outputs["texts"] = run("text", ids=text_ids, mask=text_mask, types=text_types)["embeddings"]
    if (folder / "image.onnx").exists():
        outputs["pixels"] = run("image", pixels=inputs["pixels"])["embeddings"]
        how = json.loads((folder / "preprocess.json").read_text("utf-8"))
        for name in ("pictures", "photos"):
            if inputs[name]:
                pixels = np.stack([resized(image, how) for image in images_of(inputs, name)])
                outputs[name], outputs[f"{name}_pixels"] = run("image", pixels=pixels)["embeddings"], pixels
        about = json.loads((folder / "onnx.json").read_text("utf-8"))
        numbers = {"scale": about["logit_scale"], "bias": about["logit_bias"]}
        outputs |= {name: np.full((1, 1), x, np.float32) for name, x in numbers.items() if x is not None}
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported: nothing is shown of programs that have none")
    return {**outputs, "text_ids": text_ids, "text_mask": text_mask}


def resized(image: Any, how: dict[str, Any]) -> np.ndarray:
    """An RGB image (3, S, S) float32 as `preprocess.json` says, with Pillow's resizing."""
    from PIL import Image, ImageOps

    size, method = how["size"], Image.Resampling[how["interpolation"].upper()]
    if how["resize"] == "squash":
        image = image.resize((size, size), method)
    elif how["resize"] == "longest":
        image = ImageOps.pad(image, (size, size), method)
    else:
        share = size / min(image.size)
        width, height = (max(size, int(side * share)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), method).crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32) / 255
    return ((pixels - np.array(how["mean"])) / np.array(how["std"])).transpose(2, 0, 1).astype(np.float32)


def sentence_transformers(model: str, inputs: Inputs) -> Outputs:
    """MODEL is a folder that `SentenceTransformer` loads; texts and ids only."""
    import torch
    from sentence_transformers import SentenceTransformer

    net = SentenceTransformer(model, device="cpu").eval()
    ids, mask = (torch.from_numpy(inputs[name]) for name in ("ids", "mask"))
    made = net.preprocess(inputs["texts"])
    with torch.no_grad():
        of_ids = net({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
    outputs = {"ids": unit(of_ids), "texts": unit(net.encode(inputs["texts"]))}
    return {**outputs, "text_ids": made["input_ids"].numpy(), "text_mask": made["attention_mask"].numpy()}


LIBRARIES: dict[str, Callable[[str, Inputs], Outputs]] = {
    "open_clip": open_clip,
    "transformers": transformers,
    "transformers_text": transformers_text,
    "sentence_transformers": sentence_transformers,
    "timm": timm,
    "onnx": onnx,
}


def main(library: str, model: str, folder: str, out: str) -> None:
    """See the module."""
    inputs: Inputs = json.loads((Path(folder) / "inputs.json").read_text("utf-8"))
    with np.load(Path(folder) / "inputs.npz", allow_pickle=False) as arrays:
        inputs |= dict(arrays)
    outputs = LIBRARIES[library](model, {**inputs, "folder": folder})
    np.savez(Path(out) / "outputs.npz", **outputs)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
