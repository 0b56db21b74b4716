"""Functions that run a model with another library, in a process of their own that knows nothing of dualenc.

    python -I references.py FUNCTION MODEL INPUTS OUTPUTS [PATH ...]

`verify.run` starts this program in a fresh process. FUNCTION is a function of this file, or `module:function` for one
of another module, which is imported with PATH as `sys.path`. MODEL is what the library loads; INPUTS and OUTPUTS are
folders:

- `INPUTS/inputs.npz`: `pixels` (N, 3, S, S) float32, normalized; `ids`, `mask` and `types` (M, L) int64, padded on the
  right, where `types` are the segments, all 0 except for a text model with segments.
- `INPUTS/inputs.json`: `texts`; `prompts`, names of prompts of a text model; `pictures`, names of image files of S x S
  pixels in INPUTS; and `photos`, the same of other sizes.
- `OUTPUTS/outputs.npz`: the embeddings (., E) of each input that the library has a tower for, under its name, where
  `prompts` stands for all texts with the first prompt, then with the second one, and so on; `pictures_pixels` and
  `photos_pixels` (., 3, S, S), the input of the image tower; `scale` and `bias`; and `text_ids` with `text_mask`, which
  the library's tokenizer makes of the texts.

`pixels` and `ids` are given to the model unchanged; pictures, photos and texts pass through the library's own
preprocessing.
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SHORT = 64  # tokens; logits over a large vocabulary for longer texts would not fit into memory
# Ends of the names of the classes whose logits are compared.
COMPARED_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
Arguments = dict[str, Any]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """A function or a program that loads a model with another library, run in a process of its own.

    Args:
        library: name of the library in messages.
        program: function `(model, inputs) -> outputs` at the top level of a module, or a command, such as
            `["node", "/path/of/reference.mjs"]`, to which MODEL INPUTS OUTPUTS are appended. The function gets the
            content of INPUTS as a dict, with the path of INPUTS under "folder", and returns the arrays of OUTPUTS.

    Raises:
        ValueError: If the function cannot be imported by its name: a method, a lambda or a function in a function.
    """

    library: str
    program: Callable[[str, Arguments], Outputs] | Sequence[str]

    def __post_init__(self) -> None:
        if callable(self.program) and (inspect.ismethod(self.program) or "<" in self.program.__qualname__):
            raise ValueError(f"the reference of {self.library} must be a function at the top level of a module")

    def command(self, model: str, folder: str) -> list[str]:
        """Return the command that reads inputs from a folder and writes outputs into it.

        Args:
            model: what the library loads.
            folder: INPUTS and OUTPUTS.
        """
        if not callable(self.program):
            return [*self.program, model, folder, folder]
        module, name = self.program.__module__, self.program.__qualname__
        if module == __name__:
            return [sys.executable, "-I", __file__, name, model, folder, folder]
        return [sys.executable, "-I", __file__, f"{module}:{name}", model, folder, folder, *sys.path]


def unit(x: Any) -> np.ndarray:
    """Return the rows of a tensor or an array scaled to unit length, in float32."""
    x = np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def images_of(inputs: Arguments, name: str) -> list[Any]:
    """Return the images that an entry of the inputs lists, as RGB."""
    from PIL import Image

    return [Image.open(Path(inputs["folder"]) / file).convert("RGB") for file in inputs[name]]


def open_clip(model: str, inputs: Arguments) -> Outputs:
    """Load what `open_clip.create_model_and_transforms` takes: `local-dir:FOLDER`, or `ARCH/WEIGHTS`."""
    import open_clip
    import torch

    architecture, _, weights = (model, "", "") if ":" in model else model.partition("/")
    torch.manual_seed(0)  # for the random weights of an architecture without a checkpoint
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
    """Return the scale and the bias of the logits."""
    bias = getattr(net, "logit_bias", None)
    parts = {"scale": net.logit_scale.detach().exp(), **({} if bias is None else {"bias": bias.detach()})}
    return {name: x.float().reshape(1, 1).numpy() for name, x in parts.items()}


def transformers(model: str, inputs: Arguments) -> Outputs:
    """Load a folder of Hugging Face with an image and a text tower."""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    net: Any = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = AutoImageProcessor.from_pretrained(model)
    pixels: Outputs = {}
    padded = net.config.model_type == "siglip"  # SigLIP attends to its padding
    longest = min(tokenizer.model_max_length, inputs["ids"].shape[1])
    texts: Any = tokenizer(
        inputs["texts"],
        padding="max_length" if padded else True,
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    )

    def of(images: Any = None, ids: Any = None, mask: Any = None) -> Any:
        images = torch.from_numpy(inputs["pixels"][:1]) if images is None else images
        ids, mask = (texts["input_ids"][:1], texts["attention_mask"][:1]) if ids is None else (ids, mask)
        more = {} if padded else {"attention_mask": mask}
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
    masks = {} if padded else {"text_mask": texts["attention_mask"].numpy()}
    return {**made, **pixels, **logits_of(net), "text_ids": texts["input_ids"].numpy(), **masks}


def transformers_text(model: str, inputs: Arguments) -> Outputs:
    """Load a folder of Hugging Face with a text encoder, alone or with the head that its config names.

    Hidden states, and the head's logits for the first `SHORT` tokens of each text, are given as their asinh.
    """
    import torch
    import transformers as library

    config: Any = library.AutoConfig.from_pretrained(model)
    tokenizer = library.AutoTokenizer.from_pretrained(model)
    ids, mask = torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"])
    # AutoModel does not know SigLIP's text encoder alone, and loads both towers for CLIP.
    nested = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip_text_model": "SiglipTextModel"}
    encoder: Any = getattr(library, nested.get(config.model_type, "AutoModel"))
    net: Any = encoder.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        given: dict[str, Any] = {
            "input_ids": ids,
            **({} if "siglip" in config.model_type else {"attention_mask": mask}),
        }
        if has_segments(config):
            given["token_type_ids"] = torch.from_numpy(inputs["types"])
        outputs = {"hidden": (net(**given)[0] * mask[..., None]).asinh()}
        for name in config.architectures or ():
            if name.endswith(COMPARED_HEADS):
                head: Any = getattr(library, name).from_pretrained(model, dtype=torch.float32).eval()
                found: Any = head(**{key: x[:, :SHORT] for key, x in given.items()})
                spans = "start_logits" in found
                logits = torch.stack([found.start_logits, found.end_logits], -1) if spans else found.logits
                outputs["logits"] = (logits * mask[:, :SHORT, None] if logits.dim() == 3 else logits).asinh()
    texts: Any = tokenizer(inputs["texts"], truncation=True, padding="max_length", max_length=ids.shape[1])
    made = {name: x.numpy() for name, x in outputs.items()}
    return {**made, "text_ids": np.array(texts["input_ids"]), "text_mask": np.array(texts["attention_mask"])}


def has_segments(config: Any) -> bool:
    """Return whether a config of Hugging Face is of an encoder with segments."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def timm(model: str, inputs: Arguments) -> Outputs:
    """Load `NAME` or `NAME/FILE` of timm; return the features of images before any projection."""
    import timm
    import torch

    name, _, file = model.partition("/")
    more: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    net: Any = timm.create_model(name, pretrained=True, num_classes=0, **more).eval()
    with torch.no_grad():
        return {"features": unit(net(torch.from_numpy(inputs["pixels"])))}


def onnx(model: str, inputs: Arguments) -> Outputs:
    """Load a folder that `dualenc.interop.onnx` wrote with onnxruntime, Pillow and tokenizers, without torch.

    The hidden states and logits of a text model are given as their asinh, under `hidden` and `logits_NAME`.
    """
    import onnxruntime
    from tokenizers import Tokenizer

    folder = Path(model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    about = json.loads((folder / "onnx.json").read_text("utf-8"))

    def encoded(prompt: str = "") -> dict[str, np.ndarray]:
        encodings = tokenizer.encode_batch([prompt + text for text in inputs["texts"]])
        names = {"ids": "ids", "mask": "attention_mask", "types": "type_ids"}
        return {name: np.array([getattr(one, theirs) for one in encodings], np.int64) for name, theirs in names.items()}

    def run(name: str, **values: np.ndarray) -> Outputs:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        wanted = {value.name: values[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        found: list[Any] = list(session.run(None, wanted))
        return dict(zip(names, found))

    mask = inputs["mask"]
    of_ids = run("text", ids=inputs["ids"], mask=mask, types=inputs["types"])
    outputs = {"ids": of_ids.pop("embeddings")}
    # What has a value for each token has none for padding.
    outputs |= {name: np.arcsinh(x * mask[..., None] if x.ndim == 3 else x) for name, x in of_ids.items()}
    prompts = about.get("prompts", {})
    outputs["texts"] = run("text", **encoded(prompts.get(about.get("default_prompt"), "")))["embeddings"]
    if inputs["prompts"]:
        outputs["prompts"] = np.concatenate(
            [run("text", **encoded(prompts[name]))["embeddings"] for name in inputs["prompts"]]
        )
    if (folder / "image.onnx").exists():
        outputs["pixels"] = run("image", pixels=inputs["pixels"])["embeddings"]
        how = json.loads((folder / "preprocess.json").read_text("utf-8"))
        for name in ("pictures", "photos"):
            if inputs[name]:
                pixels = np.stack([resized(image, how) for image in images_of(inputs, name)])
                outputs[name], outputs[f"{name}_pixels"] = run("image", pixels=pixels)["embeddings"], pixels
        numbers = {"scale": about["logit_scale"], "bias": about["logit_bias"]}
        outputs |= {name: np.full((1, 1), x, np.float32) for name, x in numbers.items() if x is not None}
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported: the check must run without it")
    plain = encoded()
    return {**outputs, "text_ids": plain["ids"], "text_mask": plain["mask"]}


def resized(image: Any, how: dict[str, Any]) -> np.ndarray:
    """Preprocess an RGB image to (3, S, S) float32 as `preprocess.json` says, with Pillow's resizing."""
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


def sentence_transformers(model: str, inputs: Arguments) -> Outputs:
    """Load a folder of sentence-transformers; return embeddings of texts, of texts with prompts, and of ids only."""
    import torch
    from sentence_transformers import SentenceTransformer

    net = SentenceTransformer(model, device="cpu").eval()
    given = {"input_ids": torch.from_numpy(inputs["ids"]), "attention_mask": torch.from_numpy(inputs["mask"])}
    encoder: Any = net[0]
    if has_segments(encoder.config):
        given["token_type_ids"] = torch.from_numpy(inputs["types"])
    made = net.preprocess(inputs["texts"])
    with torch.no_grad():
        of_ids = net(given)["sentence_embedding"][:, : net.truncate_dim]
    outputs = {"ids": unit(of_ids), "texts": unit(net.encode(inputs["texts"]))}
    if inputs["prompts"]:
        with_prompts = [net.encode(inputs["texts"], prompt_name=name) for name in inputs["prompts"]]
        outputs["prompts"] = unit(np.concatenate(with_prompts))
    return {**outputs, "text_ids": made["input_ids"].numpy(), "text_mask": made["attention_mask"].numpy()}


OPEN_CLIP = Reference("open_clip", open_clip)
TRANSFORMERS = Reference("transformers", transformers)
TRANSFORMERS_TEXT = Reference("transformers (text tower alone)", transformers_text)
SENTENCE_TRANSFORMERS = Reference("sentence-transformers", sentence_transformers)
TIMM = Reference("timm", timm)
ONNXRUNTIME = Reference("onnxruntime", onnx)


def main(function: str, model: str, folder: str, out: str, *path: str) -> None:
    """Read inputs, call a function on them and write its outputs.

    Args:
        function: name of a function of this file, or `module:function`.
        model: what the function loads.
        folder: INPUTS.
        out: OUTPUTS.
        *path: the `sys.path` with which another module is imported.
    """
    module, _, name = function.rpartition(":")
    if module:
        sys.path[:] = path
    found: Any = import_module(module) if module else sys.modules[__name__]
    for part in name.split("."):
        found = getattr(found, part)
    inputs: Arguments = json.loads((Path(folder) / "inputs.json").read_text("utf-8"))
    with np.load(Path(folder) / "inputs.npz", allow_pickle=False) as arrays:
        inputs |= dict(arrays)
    outputs = found(model, {**inputs, "folder": folder})
    np.savez(Path(out) / "outputs.npz", **outputs)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
