"""Inputs that dualenc and another library are both given, and the outputs of dualenc for them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualenc.data.images import Preprocess, to_tensor
from dualenc.data.prepare.scenes import draw_scene
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.models.heads.vectors import shortened
from dualenc.models.text_encoder import TextConfig
from dualenc.models.tower import evaluating
from dualenc.tokens import Tokens, padding_index

TEXTS = (
    "a photo of a dog",
    "Two dogs on a beach, one of them WET; the other isn't.",
    "",
    "an espresso (3.50 €) & a croissant -- 20% off #breakfast @home",
    "Ünïcödé naïve café, Straße, Ærøskøbing",
    "漢字とかな 한국어 русский العربية ελληνικά हिन्दी",
    "\ta  line\nwith   blanks, 1234567890 numbers  ",
    "👍🏽 emoji 🐕‍🦺 and flags 🇳🇱",
    "word " * 100,
)
# Curly quotes, entities and full-width letters, which some libraries replace before they tokenize a text.
UNCLEAN = ("the dog\u2019s \u201cbed\u201d", "cats &amp; dogs", "a fine \uff34\uff36")
OF_TOKENS = ("token-classification", "question-answering")  # tasks of heads with logits for each token
LONG = 1024  # tokens of the longest random text, for an encoder that takes more


@dataclass(frozen=True)
class Inputs:
    """Inputs of both libraries; see `dualenc.interop.references`.

    Attributes:
        pixels: (N, 3, S, S) float32, normalized noise.
        ids: texts of random tokens, with the tokens that open and close a text.
        types: segment of each of these tokens, for a text model with segments; empty for the first segment throughout.
        pictures: images of S x S pixels, which neither library has to resize.
        photos: images of other sizes.
        texts: strings.
        prompts: names of prompts that the model puts before the strings.
    """

    ids: list[list[int]]
    texts: list[str]
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    pictures: list[Image.Image] = field(default_factory=list)
    photos: list[Image.Image] = field(default_factory=list)
    types: list[list[int]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the inputs into a folder, for a reference to read."""
        longest = max(map(len, self.ids))
        ids, mask, types = np.zeros((3, len(self.ids), longest), np.int64)
        for row, one in enumerate(self.ids):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        for row, one in enumerate(self.types):
            types[row, : len(one)] = one
        np.savez(folder / "inputs.npz", pixels=self.pixels.numpy(), ids=ids, mask=mask, types=types)
        names: dict[str, list[str]] = {}
        for kind, images in (("pictures", self.pictures), ("photos", self.photos)):
            names[kind] = [f"{kind}-{i}.png" for i in range(len(images))]
            for name, image in zip(names[kind], images):
                image.save(folder / name)
        (folder / "inputs.json").write_text(
            json.dumps({**names, "texts": self.texts, "prompts": self.prompts}), "utf-8"
        )

    def pack(self) -> Tokens:
        """Return the texts of random tokens as a packed batch."""
        return Tokens.pack(self.ids, self.types or None)


def random_ids(tokenizer: Tokenizer, text: TextConfig, rng: np.random.Generator, count: int = 6) -> list[list[int]]:
    """Draw texts of random tokens, of all lengths up to the longest, opened and closed as the tokenizer does it.

    Args:
        tokenizer: the tokenizer, whose special tokens are not drawn.
        text: architecture of the text encoder.
        rng: the generator.
        count: number of texts.
    """
    (whole,) = tokenizer.backend.encode_batch(["a"])
    special = whole.special_tokens_mask
    opening = special.index(0) if 0 in special else 0
    closing = special[::-1].index(0) if 0 in special else len(special)
    before, after = whole.ids[:opening], whole.ids[len(whole.ids) - closing :]
    taken = {*tokenizer.special.values(), *whole.ids, text.pad_id}
    ordinary = np.array([i for i in sorted(tokenizer.backend.get_vocab().values()) if i not in taken])
    room = min(tokenizer.context_length, LONG) - len(before) - len(after)
    out = []
    for length in np.linspace(1, room, count).round().astype(int):
        ids = [*before, *map(int, rng.choice(ordinary, length)), *after]
        out.append(ids + [tokenizer.pad_id] * ((tokenizer.pad_to or 0) - len(ids)))
    return out


def make_inputs(
    embedder: Embedder, images: Sequence[Image.Image] = (), texts: Sequence[str] = (), seed: int = 0
) -> Inputs:
    """Draw inputs for a dual encoder: noise, drawn scenes, sentences of many scripts, and given images and texts.

    Args:
        embedder: the dual encoder.
        images, texts: real images and texts to add.
        seed: seed of the random inputs.
    """
    rng = np.random.default_rng(seed)
    size = embedder.dual_encoder.config.image.img_size
    generator = torch.Generator().manual_seed(seed)
    # Wide and tall photos: all ways to crop give the same square for a square photo.
    photos = [
        draw_scene(rng, pixels=2 * size).image.crop((0, 0, *sides))
        for sides in ((2 * size, int(1.2 * size)), (int(0.7 * size), 2 * size))
    ]
    photos += [image.convert("RGB") for image in images]
    tokenizer, preprocess = parts_of(embedder)
    square = [preprocess(to_tensor(photo)).permute(1, 2, 0).numpy() for photo in photos]
    return Inputs(
        ids=random_ids(tokenizer, embedder.dual_encoder.config.text, rng),
        texts=[*TEXTS, *texts],
        pixels=torch.randn(4, 3, size, size, generator=generator),
        pictures=[Image.fromarray(np.ascontiguousarray(pixels)) for pixels in square],
        photos=photos,
    )


def make_text_inputs(predictor: TextPredictor, seed: int = 0) -> Inputs:
    """Draw inputs for a text model: random tokens, and sentences of many scripts, with each prompt of the model.

    The second half of the random tokens is the second segment, for a model that has segments.

    Args:
        predictor: the text model.
        seed: seed of the random tokens.
    """
    text = predictor.model.config
    ids = random_ids(predictor.tokenizer, text, np.random.default_rng(seed))
    types = [[int(2 * i >= len(one)) for i in range(len(one))] for one in ids] if text.types > 1 else []
    return Inputs(ids, list(TEXTS), types=types, prompts=list(predictor.model.vectors.prompts))


def parts_of(embedder: Embedder) -> tuple[Tokenizer, Preprocess]:
    """Return the tokenizer and the preprocessing of a dual encoder of dualenc."""
    assert isinstance(embedder.tokenizer, Tokenizer)
    assert isinstance(embedder.preprocess, Preprocess)
    return embedder.tokenizer, embedder.preprocess


def outputs_of(model: Embedder | TextPredictor, inputs: Inputs) -> dict[str, np.ndarray]:
    """Compute the outputs of dualenc, under the names of `dualenc.interop.references`.

    Args:
        model: a dual encoder or a text model.
        inputs: the inputs.
    """
    return _dual_outputs(model, inputs) if isinstance(model, Embedder) else _text_outputs(model, inputs)


def _dual_outputs(embedder: Embedder, inputs: Inputs) -> dict[str, np.ndarray]:
    """Compute embeddings, normalized photos, and the scale and bias of the logits."""
    with evaluating(embedder.model):
        tokens = inputs.pack().to(embedder.device)
        of_ids = embedder.dual_encoder.encode_text(tokens).float().cpu()
    _, preprocess = parts_of(embedder)
    square = [preprocess(to_tensor(photo)) for photo in inputs.photos]
    scale, bias = embedder.model.logits()
    parts = {"scale": scale, **({} if bias is None else {"bias": bias})}
    return {
        **{name: x.detach().float().reshape(1, 1).cpu().numpy() for name, x in parts.items()},
        "pixels": embedder.embed_images(inputs.pixels).numpy(),
        "ids": of_ids.numpy(),
        "pictures": embedder.embed_images(inputs.pictures).numpy(),
        "photos": embedder.embed_images(inputs.photos).numpy(),
        "texts": embedder.embed_texts(inputs.texts).numpy(),
        "photos_pixels": preprocess.normalize(torch.stack(square)).numpy(),
    }


def _text_outputs(predictor: TextPredictor, inputs: Inputs) -> dict[str, np.ndarray]:
    """Compute embeddings, and hidden states and logits as their asinh, from packed texts without any padding.

    A difference of two asinh is absolute where the values are small, and relative where they are large.
    """
    model, tokens = predictor.model, inputs.pack().to(predictor.device)
    dim = model.vectors.dim or model.embedding_width
    with evaluating(model):
        packed = model.encoder(tokens)
        outputs = {
            f"logits_{name}": model.head(name, packed, tokens).asinh()
            for name in model.heads_for("text-classification")
        }
        outputs["ids"] = shortened(model.embed(packed, tokens), dim)
        of_tokens = {
            f"logits_{name}": model.head(name, packed, tokens) for task in OF_TOKENS for name in model.heads_for(task)
        }
    index, mask = padding_index(tokens.offsets, tokens.max_len)
    for name, x in {"hidden": packed, **of_tokens}.items():
        outputs[name] = (x[index] * mask[..., None])[tokens.rows].asinh()  # (M, L, D)
    outputs["texts"] = predictor.embed(inputs.texts)
    if inputs.prompts:
        outputs["prompts"] = torch.cat([predictor.embed(inputs.texts, prompt=name) for name in inputs.prompts])
    return {name: x.float().cpu().numpy() for name, x in outputs.items()}
