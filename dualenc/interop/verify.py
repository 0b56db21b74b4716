"""Whether another library makes the same of a model as we do, seen in a process of its own."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
from dualenc.interop import references
from dualenc.models.text_encoder import TextConfig
from dualenc.models.tower import evaluating
from dualenc.tokens import Tokens
from dualenc.utils.errors import ModelError

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
# Curly quotes, entities and full-width letters, which some libraries replace before they look at a text.
UNCLEAN = ("the dog\u2019s \u201cbed\u201d", "cats &amp; dogs", "a fine \uff34\uff36")
NOT_COUNTED = ("photos",)  # their own resizing, of other arithmetic than ours; their pixels are
PIXELS = 0.1  # mean difference of normalized pixels: above it, an image is resized or cut in another way
LONG = 1024  # tokens of a random text, of an encoder that takes more


@dataclass(frozen=True)
class Inputs:
    """What both sides are given; see `dualenc.interop.references`.

    Attributes:
        pixels: (N, 3, S, S) float32, normalized noise.
        ids: of random tokens between those that open and close a text.
        pictures: of S x S pixels: no side has to resize them.
        photos: of other sizes.
        texts: strings.
    """

    ids: list[list[int]]
    texts: list[str]
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    pictures: list[Image.Image] = field(default_factory=list)
    photos: list[Image.Image] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Into a folder, for a peer."""
        longest = max(map(len, self.ids))
        ids, mask = np.zeros((2, len(self.ids), longest), np.int64)
        for row, one in enumerate(self.ids):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        np.savez(folder / "inputs.npz", pixels=self.pixels.numpy(), ids=ids, mask=mask)
        names: dict[str, list[str]] = {}
        for kind, images in (("pictures", self.pictures), ("photos", self.photos)):
            names[kind] = [f"{kind}-{i}.png" for i in range(len(images))]
            for name, image in zip(names[kind], images):
                image.save(folder / name)
        (folder / "inputs.json").write_text(json.dumps({**names, "texts": self.texts}), "utf-8")


def random_ids(tokenizer: Tokenizer, text: TextConfig, rng: np.random.Generator, count: int = 6) -> list[list[int]]:
    """Ids of texts of random tokens, of all lengths up to the longest, opened and closed as the tokenizer does it."""
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
    """Random and real inputs of a dual encoder: noise, drawn scenes, sentences of many scripts, and what is given.

    Args:
        embedder: for whose towers, of ours.
        images, texts: further real ones.
        seed: of what is random.
    """
    rng = np.random.default_rng(seed)
    size = embedder.dual_encoder.config.image.img_size
    generator = torch.Generator().manual_seed(seed)
    # Wide and tall: of squares all ways to make one are the same.
    photos = [
        draw_scene(rng, pixels=2 * size).image.crop((0, 0, *sides))
        for sides in ((2 * size, int(1.2 * size)), (int(0.7 * size), 2 * size))
    ]
    photos += [image.convert("RGB") for image in images]
    preprocess = embedder.preprocess
    assert isinstance(preprocess, Preprocess)
    square = [preprocess(to_tensor(photo)).permute(1, 2, 0).numpy() for photo in photos]
    assert isinstance(embedder.tokenizer, Tokenizer)
    return Inputs(
        ids=random_ids(embedder.tokenizer, embedder.dual_encoder.config.text, rng),
        texts=[*TEXTS, *texts],
        pixels=torch.randn(4, 3, size, size, generator=generator),
        pictures=[Image.fromarray(np.ascontiguousarray(pixels)) for pixels in square],
        photos=photos,
    )


def outputs_of(embedder: Embedder, inputs: Inputs) -> dict[str, np.ndarray]:
    """What we make of the inputs: embeddings by the names of `dualenc.interop.references`."""
    with evaluating(embedder.model):
        tokens = Tokens.pack(inputs.ids).to(embedder.device)
        of_ids = embedder.dual_encoder.encode_text(tokens).float().cpu()
    preprocess = embedder.preprocess
    assert isinstance(preprocess, Preprocess)
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


@dataclass(frozen=True)
class Verified:
    """The largest difference between two libraries, by name of the inputs.

    Attributes:
        library: the peer.
        tolerance: that none of those that count is above.
        differences: by name.
        counts: how many inputs of each there were.
    """

    library: str
    tolerance: float
    differences: dict[str, float]
    counts: dict[str, int]

    @property
    def largest(self) -> float:
        """Of those that count."""
        return max(x for name, x in self.differences.items() if name not in NOT_COUNTED)

    def lines(self) -> list[str]:
        """For the screen."""
        parts = [
            f"{self.counts[name]} {WORDS.get(name, name)} {x:.1e}"
            for name, x in self.differences.items()
            if name not in NOT_COUNTED
        ]
        library = NAMES.get(self.library, self.library)
        lines = [
            f"beside {library}: largest difference {self.largest:.1e}, {self.tolerance:.0e} allowed "
            f"({', '.join(parts)})"
        ]
        lines += [
            f"{self.counts[name]} {name} that {library} resizes itself: {self.differences[name]:.1e}, not counted"
            for name in NOT_COUNTED
            if name in self.differences
        ]
        return lines


NAMES = {
    "onnx": "onnxruntime",
    "sentence_transformers": "sentence-transformers",
    "transformers_text": "transformers, text tower alone",
}
WORDS = {"pixels": "images of noise", "ids": "texts of random tokens", "scale": "temperature", "bias": "logit bias"}


def verify(
    library: str,
    model: str,
    inputs: Inputs,
    ours: Mapping[str, np.ndarray],
    tolerance: float,
    *,
    tokenizer: Tokenizer | None = None,
) -> Verified:
    """Compares what we make of inputs with what another library makes of them, in a fresh process.

    Args:
        library: one of `references.LIBRARIES`.
        model: what it loads.
        inputs: of both.
        ours: what we made of them, by name; the other must have all of it.
        tolerance: largest difference.
        tokenizer: ours, whose ids of the texts must be the other's too.

    Raises:
        ModelError: a difference is above the tolerance, no number, or of a tokenizer; or the other library is not
            installed or cannot load the model.
    """
    theirs = run(library, model, inputs)
    missing = [name for name in (*ours, *(["text_ids"] if tokenizer is not None else [])) if name not in theirs]
    if missing or ("bias" in theirs and "scale" in ours and "bias" not in ours):
        raise ModelError(f"{library} and dualenc have not the same parts of {model}: {', '.join(missing) or 'bias'}")
    if tokenizer is not None:
        _same_ids(library, model, inputs.texts, tokenizer, theirs)
    differences = {}
    for name in ours:
        if ours[name].shape != theirs[name].shape:
            raise ModelError(f"{library} makes {theirs[name].shape} of the {name} of {model}, we {ours[name].shape}")
        if name.endswith("_pixels"):
            apart = float(np.abs(ours[name] - theirs[name]).mean())
            if not apart <= PIXELS:
                raise ModelError(
                    f"{library} resizes or cuts the images of {model} in another way: normalized pixels differ by "
                    f"{apart:.2f} in the mean"
                )
            continue
        largest = max(1.0, float(np.abs(ours[name]).max()))  # embeddings are of unit length; a temperature is not
        differences[name] = float(np.abs(ours[name] - theirs[name]).max()) / largest
        if name not in NOT_COUNTED and not differences[name] <= tolerance:  # also where it is no number
            raise ModelError(
                f"{library} and dualenc differ by {differences[name]:.1e} on {WORDS.get(name, name)} of {model}, "
                f"{tolerance:.0e} is allowed: nothing was written"
            )
    return Verified(library, tolerance, differences, {name: len(ours[name]) for name in differences})


def _same_ids(
    library: str, model: str, texts: Sequence[str], tokenizer: Tokenizer, theirs: Mapping[str, np.ndarray]
) -> None:
    """Ids of each text are alike, but for the padding after them."""
    for row, (text, own) in enumerate(zip(texts, tokenizer.encode(texts), strict=True)):
        other = theirs["text_ids"][row]
        rest = theirs["text_mask"][row, len(own) :] if "text_mask" in theirs else other[len(own) :] != other[-1]
        if other[: len(own)].tolist() != own or rest.any():
            raise ModelError(f"the tokenizer does not match: of {text[:50]!r} {library} makes other ids from {model}")


def run(library: str, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
    """What another library makes of inputs, in a fresh process.

    Raises:
        ModelError: it is not installed, or fails; has its last line.
    """
    with tempfile.TemporaryDirectory(prefix="dualenc-verify-") as name:
        folder = Path(name)
        inputs.write(folder)
        done = subprocess.run(
            [sys.executable, "-I", str(references.__file__), library, model, name, name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode < 0:
            raise ModelError(
                f"{library} was stopped by signal {-done.returncode} while it had {model}: short of memory?"
            )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
            last = (lines or done.stderr.strip().splitlines() or ["no word of why"])[-1]
            if last.startswith("ModuleNotFoundError"):
                last = f"{last.partition(': ')[2]}: install it, what cannot be checked is not written"
            raise ModelError(f"{library} does not take {model} ({last})")
        with np.load(folder / "outputs.npz", allow_pickle=False) as arrays:
            return dict(arrays)
