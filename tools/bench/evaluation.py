"""Benchmark of embedding an evaluation set, from its shards to the embeddings, next to CLIP_benchmark's loop."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench.runner import Side, compare

BATCH = 64  # images of a batch, the default of both
IMAGES = ["webp", "png", "jpg", "jpeg"]  # members that CLIP_benchmark takes for the image, in this order


def evaluation(
    data: Path,
    model: str = "ViT-B-32",
    images: int = 128,
    workers: int = 0,
    rounds: int = 3,
    cores: int = 1,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the images per second on a set for classification, or with all of their captions on one for retrieval.

    All sides have the same model of open_clip with random weights. The peer reads, transforms and embeds as
    CLIP_benchmark 1.6.2 does: webdataset, Pillow, open_clip's transform, captions padded to the context length, fp32.
    "dualenc" is the default, "dualenc bf16" is `--precision bf16`.

    Args:
        data: set in the layout of CLIP_benchmark, split test.
        model: architecture of open_clip.
        images: number of images, the first ones.
        workers: worker processes that decode, of each side; 0 for none.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for evaluation.json and evaluation.md.
    """
    makers: dict[str, Callable[..., Any]] = {
        "dualenc": partial(_ours, precision="fp32"),
        "dualenc bf16": partial(_ours, precision="bf16"),
        "clip_benchmark": _peer,
    }
    sides = [Side(name, partial(_side, make, data.resolve(), model, images, workers)) for name, make in makers.items()]
    result = compare("evaluation", "images", sides, "clip_benchmark", rounds, cores=cores)
    result.settings = {"data": data.name, "model": model, "images": images, "workers": workers}
    own = {name: result.ratios(name, cpu=True) for name in makers if name != "clip_benchmark"}
    result.notes = [
        f"{data.name}, the first {images:,} images, {model} with random weights, {workers} workers.",
        "In the same CPU time dualenc embeds "
        + ", ".join(f"{median(ratios):.2f} times as much ({name})" for name, ratios in own.items()),
    ]
    result.write(out)


def _side(make: Callable[..., Callable[[], Any]], *settings: Any) -> Callable[[], float]:
    """Return a function that embeds the set once, for `Side.make`."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    embed = make(*settings)

    def run() -> float:
        image, _ = embed()
        return float(len(image))

    return run


def _ours(data: Path, model: str, images: int, workers: int, precision: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that embeds the images, and the captions where there are any, as the commands do."""
    from dualenc import BenchmarkSet, load

    embedder, opened = load(f"open_clip:{model}", "cpu", precision), BenchmarkSet.open(data)
    rows = range(min(images, len(opened)))
    texts, owner = opened.captions
    captions = [text for text, image in zip(texts, owner.tolist()) if image in rows]

    def run() -> tuple[Tensor, Tensor]:
        text = embedder.embed_texts(captions) if captions else torch.empty(0)
        batches = opened.images(embedder.preprocess, rows, BATCH, workers)
        parts = [embedder.embed_images(batch.images, BATCH) for batch in batches if batch.images is not None]
        return torch.cat(parts), text

    return run


def _peer(data: Path, model: str, images: int, workers: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that reads and embeds the set as CLIP_benchmark's data set and loops of evaluation do."""
    import open_clip
    import webdataset as wds
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    tower, _, transform = open_clip.create_model_and_transforms(model)
    tower, tokenizer = tower.eval(), open_clip.get_tokenizer(model)
    retrieval = (data / "dataset_type.txt").exists()
    shards = [str(data / "test" / f"{i}.tar") for i in range(int((data / "test" / "nshards.txt").read_text()))]
    decoded = wds.WebDataset(shards, shardshuffle=False).decode(wds.autodecode.ImageHandler("pil", extensions=IMAGES))
    samples = decoded.to_tuple(IMAGES, "txt" if retrieval else "cls").map_tuple(transform, None).slice(images)

    def collate(batch: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
        return torch.stack([image for image, _ in batch]), [label for _, label in batch]

    def run() -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        text: list[Tensor] = [torch.empty(0)]
        with torch.no_grad():
            for batch, labels in DataLoader(samples, BATCH, num_workers=workers, collate_fn=collate):
                if retrieval:
                    tokens = tokenizer([line for label in labels for line in label.splitlines()])
                    text.append(F.normalize(tower.encode_text(tokens), dim=-1))
                found.append(F.normalize(tower.encode_image(batch), dim=-1))
        return torch.cat(found), torch.cat(text[1:] or text)

    return run
