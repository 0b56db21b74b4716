"""Benchmark of the loader against open_clip's, from shards on disk to batches of images and tokens."""

import io
import multiprocessing
import os
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from dualenc.data import Augment, Loader, PairDataset, Preprocess, ShardIndex, Tokenizer, decode_image
from dualenc.data.images import resized_crop
from dualenc.data.pairs import captions_of, only_pairs
from dualenc.data.shards.patterns import expand_shards
from tools.bench.runner import Side, compare, fork_workers, process_memory, process_tree

CONTEXT = 77
PEER, FLOAT, UINT8 = "open_clip", "dualenc, float32", "dualenc, uint8"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's defaults.
MOST_PIXELS = 0.05  # Largest mean difference of pixels allowed, in units of 1/255.
MOST_GROWTH = 0.05  # Largest growth of memory allowed, as a share.


def loader(
    shards: str,
    peer_shards: str | None = None,
    size: int = 224,
    batch: int = 32,
    rounds: int = 5,
    workers: int = 0,
    memory: int = 0,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the images loaded per second by our loader and by open_clip's, with their texts.

    Both read all samples with an image and a `.txt`, crop 90 to 100% of the area, resize by antialiased bicubic
    interpolation and tokenize. The pixels of the same crops are then compared.

    Args:
        shards: a path, a glob, a brace pattern or a folder.
        peer_shards: other shards for open_clip, such as the originals of shards made by `dualenc shrink`.
        size: height and width of the output in pixels.
        batch: images in a batch.
        rounds: timed epochs of each side.
        workers: worker processes, on as many cores; 0 to decode in the main process on one core.
        memory: epochs after which the memory of our loader with 2 workers is measured; 0 for no measurement.
        out: folder for loader.json and loader.md.
    """
    index, _ = only_pairs(ShardIndex.build(shards), "txt")
    peer_index, _ = only_pairs(ShardIndex.build(peer_shards or shards), "txt")
    tokenizer = Tokenizer.train((captions_of(sample, "txt")[0] for sample in index), 10_000, CONTEXT)
    ours = partial(_ours, shards, tokenizer, size, batch, workers)
    sides = [
        Side(PEER, partial(_peer, expand_shards(peer_shards or shards), len(peer_index), size, batch, workers)),
        Side(FLOAT, partial(ours, True)),
        Side(UINT8, partial(ours, False)),
    ]
    result = compare("loader", "images", sides, PEER, rounds, cores=max(1, workers))
    result.settings = {"size": size, "batch": batch, "workers": workers, "context_length": CONTEXT}
    result.notes = [
        f"{size} x {size} pixels, batches of {batch}, {workers} workers; captions tokenized on both sides.",
        "open_clip and dualenc, float32: normalized float32 batches. dualenc, uint8: batches as its trainer takes "
        "them, which are normalized on the device.",
        f"dualenc read {_described(index)}; open_clip read {_described(peer_index)}.",
    ]
    pixels = result.facts["pixels"] = _pixel_difference(index, size)
    result.notes.append(
        f"Pixels of the same crops, in units of 1/255: mean absolute difference {pixels['mean']:.4f} (at most "
        f"{MOST_PIXELS}), {pixels['largest_mean']:.4f} in the image with the largest; {pixels['images']} images, "
        f"{pixels['turned']} left out since open_clip does not rotate them upright."
    )
    growth = 0.0
    if memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            epochs = executor.submit(_memory, shards, tokenizer, size, batch, memory).result()
        total = [main + work for main, work in epochs]
        growth = max(total) / total[0] - 1
        result.facts["memory"] = {"main_mib": [m for m, _ in epochs], "workers_mib": [w for _, w in epochs]}
        result.notes.append(
            f"Memory of the main process and 2 workers of our loader after each of {memory} epochs, after one more for "
            f"warm-up: first {total[0]:.0f} MiB, last {total[-1]:.0f}, largest {max(total):.0f}: {growth:+.1%} "
            f"(at most {MOST_GROWTH:+.0%})."
        )
    result.write(out)
    if pixels["mean"] > MOST_PIXELS:
        sys.exit(f"the pixels differ by {pixels['mean']:.4f} on average, more than {MOST_PIXELS}")
    if growth > MOST_GROWTH:
        sys.exit(f"the memory grows by {growth:.1%}, more than {MOST_GROWTH:.0%}")


def _ours(
    shards: str, tokenizer: Tokenizer, size: int, batch: int, workers: int, normalize: bool
) -> Callable[[], float]:
    torch.set_num_threads(1)
    preprocess = Preprocess(size, MEAN, STD)
    pairs = _pair_loader(shards, tokenizer, size, batch, workers)

    def epoch() -> float:
        count = 0
        for loaded in pairs:
            images = preprocess.normalize(loaded.images) if normalize else loaded.images
            assert images.dtype == (torch.float32 if normalize else torch.uint8)
            assert images.shape[1:] == (3, size, size)
            assert len(loaded.tokens.rows) == len(images)
            count += len(images)
        return count

    return epoch


def _pair_loader(shards: str, tokenizer: Tokenizer, size: int, batch: int, workers: int) -> Loader:
    index, _ = only_pairs(ShardIndex.build(shards), "txt")
    return Loader(PairDataset(index, "txt", tokenizer, Augment(size), seed=0), batch, seed=0, workers=workers)


def _peer(shards: list[str], samples: int, size: int, batch: int, workers: int) -> Callable[[], float]:
    """Build open_clip's loader with its own functions and return an epoch of it."""
    torch.set_num_threads(1)
    import open_clip

    # open_clip imports pandas for CSV files only; it need not be installed.
    sys.modules.setdefault("pandas", types.ModuleType("pandas"))
    from open_clip_train import data as theirs

    # webdataset marks the end of each shard since 0.2.87, and open_clip's grouping does not know the mark.
    theirs.tar_file_expander = partial(theirs.tar_file_expander, eof_value=None)
    args = Namespace(
        train_data="::".join(shards),
        train_data_upsampling_factors=None,
        train_num_samples=samples,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(size, is_train=True, mean=MEAN, std=STD)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT)
    # With floor, an epoch ends with the last full batch, as ours does; otherwise it is filled up from a second pass.
    data = theirs.get_wds_dataset(args, transform, is_train=True, floor=True, tokenizer=tokenizer)
    numbers = iter(range(sys.maxsize))

    def epoch() -> float:
        data.set_epoch(next(numbers))
        count = 0
        for images, texts in data.dataloader:
            assert images.dtype == torch.float32
            assert images.shape[1:] == (3, size, size)
            assert texts.shape == (len(images), CONTEXT)
            count += len(images)
        return count

    return epoch


def _described(index: ShardIndex) -> str:
    sizes = [len(sample.read(sample.image)) for sample in index if sample.image]
    return f"{len(index)} images of {mean(sizes) / 1000:.0f} kB on average"


def _pixel_difference(index: ShardIndex, size: int) -> dict[str, float]:
    """Compare our decoded, cropped and resized pixels (uint8) with Pillow's for the same boxes, in units of 1/255."""
    torch.manual_seed(0)
    means, turned = [], 0
    for sample in index:
        assert sample.image
        data = sample.read(sample.image)
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(0x0112, 1) != 1:
                turned += 1
                continue
            image = image.convert("RGB")
            box = RandomResizedCrop.get_params(cast(Any, image), [0.9, 1.0], [3 / 4, 4 / 3])
            theirs = np.asarray(F.resized_crop(cast(Any, image), *box, [size, size], InterpolationMode.BICUBIC))
        ours = resized_crop(decode_image(data), box, size).permute(1, 2, 0).numpy()
        means.append(float(np.abs(ours.astype(int) - theirs.astype(int)).mean()))
    return {"mean": mean(means), "largest_mean": max(means), "images": len(means), "turned": turned}


def _memory(shards: str, tokenizer: Tokenizer, size: int, batch: int, epochs: int) -> list[tuple[float, float]]:
    """Return the MiB of the main process and of its 2 workers at the end of each epoch after the first."""
    torch.set_num_threads(1)
    fork_workers()
    pairs = _pair_loader(shards, tokenizer, size, batch, workers=2)
    found = []
    for _ in range(epochs + 1):
        for number, _ in enumerate(pairs, 1):
            if number == len(pairs):  # The workers end after the last batch.
                main, *others = (process_memory(pid, "VmRSS") / 2**20 for pid in process_tree(os.getpid()))
                found.append((main, sum(others)))
    return found[1:]
