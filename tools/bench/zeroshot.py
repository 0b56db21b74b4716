"""Benchmark of building a zero-shot classifier of ImageNet's classes.

Our builder and that of open_clip, the peer, use the same text tower.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F

from tools.bench.runner import Side, compare


def zeroshot(
    tower: Literal["open_clip", "dualenc"] = "open_clip",
    classes: int = 1000,
    width: int = 256,
    layers: int = 2,
    rounds: int = 3,
    cores: int = 2,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the prompts per second from strings to the classifier, in fp32 on the CPU with random weights.

    Args:
        tower: "open_clip" for open_clip's text tower of CLIP; "dualenc" for our BERT-style one, padded to 77 for
            open_clip's builder.
        classes: how many of ImageNet's 1,000 classes, each with 80 templates.
        width: width of the tower.
        layers: layers of the tower.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for zeroshot.json and zeroshot.md.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(name, partial(_side, make_builder, tower, classes, width, layers, Path(folder) / name))
            for name, make_builder in (("dualenc", _ours), ("open_clip", _peer))
        ]
        # A round embeds 80,000 prompts, so a warm-up round would cost much and change little.
        result = compare("zeroshot", "prompts", sides, "open_clip", rounds, warmup=0, cores=cores)
        ours, theirs = (torch.load(Path(folder) / side.name, weights_only=True) for side in sides)
    result.settings = {"tower": tower, "classes": classes, "width": width, "layers": layers}
    difference = float((ours - theirs).abs().max())
    result.facts["difference"] = difference
    result.notes = [
        f"{classes:,} classes x 80 templates of ImageNet in open_clip's wording; tower of {tower}, {layers} layers of "
        f"width {width}; open_clip embeds 10 classes at a time, its default.",
        f"dualenc is {median(result.ratios('dualenc')):.1f} times as fast; the entries of the two classifiers differ "
        f"by at most {difference:.1e}.",
    ]
    result.write(out)


def _side(make_builder: Callable[..., Any], tower: str, classes: int, width: int, layers: int, path: Path) -> Any:
    """Return a function that builds a classifier, saves it to `path`, and returns the number of prompts."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    # The templates of open_clip are functions of a class name; `{c}` is the place of the name in ours.
    names = list(IMAGENET_CLASSNAMES[:classes])
    templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    models = _open_clip(width, layers) if tower == "open_clip" else _dualenc(names, templates, width, layers)
    build = make_builder(*models)

    def run() -> float:
        torch.save(build(names, templates), path)
        return float(len(names) * len(templates))

    return run


def _open_clip(width: int, layers: int) -> tuple[Any, Any, Any]:
    """Return a model for our side, the same model for the peer, and the peer's tokenizer."""
    from open_clip import CLIP, SimpleTokenizer

    from dualenc.inference.embedder import Embedder
    from dualenc.inference.open_clip import OpenClip, OpenClipTokenizer, OpenClipTransform

    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": layers}
    model = CLIP(width, vision, text).eval()
    wrapped, tokenizer = OpenClip(model, "CLIP"), SimpleTokenizer()
    transform = OpenClipTransform(16, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0)
    return Embedder(wrapped, OpenClipTokenizer(tokenizer, wrapped.trims), transform), model, tokenizer


def _dualenc(names: list[str], templates: list[str], width: int, layers: int) -> tuple[Any, Any, Any]:
    """Return the same as `_open_clip` for a model of dualenc; only the peer pads its texts."""
    from dualenc import DualEncoder, Embedder, ImageConfig, Preprocess, TextConfig, Tokenizer

    # Every sixteenth template is enough text to train a vocabulary.
    tokenizer = Tokenizer.train([t.replace("{c}", name) for name in names for t in templates[::16]], 8000, 77)
    image = ImageConfig("vit_tiny_patch16_224", 16, overrides={"depth": 1, "embed_dim": 64, "num_heads": 1})
    text = TextConfig(tokenizer.vocab_size, width=width, layers=layers, heads=width // 64, context_length=77)
    model = DualEncoder(image, text, width).eval()

    class Padded:
        """The text tower behind the method that open_clip's builder calls, on padded ids."""

        @staticmethod
        def encode_text(ids: torch.Tensor, normalize: bool) -> torch.Tensor:
            hidden = model.text.forward_padded(ids, ids != 0)
            return F.normalize(model.text_projection(hidden[:, 0]), dim=-1)

    def padded(texts: list[str]) -> torch.Tensor:
        """Tokenize texts as open_clip's tokenizers do: ids (B, 77), padded with 0."""
        ids = torch.zeros(len(texts), 77, dtype=torch.long)
        for row, tokens in zip(ids, tokenizer.encode(texts)):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    return Embedder(model, tokenizer, Preprocess(16)), Padded(), padded


def _ours(embedder: Any, model: Any, tokenizer: Any) -> Any:
    """Return the function of dualenc that builds a classifier from names and templates."""
    from dualenc import zero_shot_classifier

    return partial(zero_shot_classifier, embedder)


def _peer(embedder: Any, model: Any, tokenizer: Any) -> Any:
    """Return a function that builds a classifier with open_clip, transposed to the (C, E) of dualenc."""
    from open_clip import build_zero_shot_classifier

    def build(names: list[str], templates: list[str]) -> torch.Tensor:
        functions = [lambda name, t=template: t.replace("{c}", name) for template in templates]
        return build_zero_shot_classifier(model, tokenizer, names, functions).T.contiguous()

    return build
