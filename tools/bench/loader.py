"""The loader beside open_clip's, from shards on disk to batches of images and tokens."""

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
from dualenc.data.shards.index import expand_shards
from tools.bench.runner import Side, compare, family, process_memory, workers_fork

CONTEXT = 77
PEER, FLOAT, UINT8 = "open_clip", "dualenc, float32", "dualenc, uint8"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's
MOST_PIXELS = 0.05  # of 255: what the mean difference may be
MOST_GROWTH = 0.05


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
    """Images a second of our loader and of open_clip's, with text on both sides.

    Both read all samples with an image and a `.txt`, crop 90 to 100% of the area, resize by antialiased bicubic
    interpolation and tokenize. Then how far the pixels of the same crops are apart.

    Args:
        shards: a path, a glob, a brace pattern or a folder.
        peer_shards: others for open_clip, such as the originals of shards made by `dualenc shrink`.
        size: height and width of the output in pixels.
        batch: images in a batch.
        rounds: epochs that are timed, on each side.
        workers: processes that decode; 0 to decode in the one process on one core, else as many cores.
        memory: epochs after which the memory of our loader with 2 workers is measured; 0 for none.
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
        "open_clip and dualenc, float32: normalized float32 batches. dualenc, uint8: as its trainer takes them, to "
        "be normalized on the device.",
        f"dualenc read {_described(index)}; open_clip read {_described(peer_index)}.",
    ]
    pixels = result.facts["pixels"] = _pixel_difference(index, size)
    result.notes.append(
        f"The same crops by both, in units of 1/255: mean absolute difference {pixels['mean']:.4f} (at most "
        f"{MOST_PIXELS}), {pixels['largest_mean']:.4f} in the image where it is largest; {pixels['images']} images, "
        f"{pixels['turned']} left out since open_clip does not turn them upright."
    )
    growth = 0.0
    if memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            epochs = executor.submit(_memory, shards, tokenizer, size, batch, memory).result()
        total = [main + work for main, work in epochs]
        growth = max(total) / total[0] - 1
        result.facts["memory"] = {"main_mib": [m for m, _ in epochs], "workers_mib": [w for _, w in epochs]}
        result.notes.append(
            f"Memory of our loader with 2 workers after each of {memory} epochs, first epoch not counted, main process "
            f"and workers: first {total[0]:.0f} MiB, last {total[-1]:.0f}, largest {max(total):.0f}: {growth:+.1%} "
            f"(at most {MOST_GROWTH:+.0%})."
        )
    result.write(out)
    if pixels["mean"] > MOST_PIXELS:
        sys.exit("the pixels differ by more than they may")
    if growth > MOST_GROWTH:
        sys.exit("the memory grows by more than it may")


def _ours(
    shards: str, tokenizer: Tokenizer, size: int, batch: int, workers: int, normalize: bool
) -> Callable[[], float]:
    torch.set_num_threads(1)
    preprocess = Preprocess(size, MEAN, STD)
    pairs = _pair_loader(shards, tokenizer, size, batch, workers)

    def epoch() -> float:
        count = 0
        for found in pairs:
            images = preprocess.normalize(found.images) if normalize else found.images
            assert images.dtype == (torch.float32 if normalize else torch.uint8)
            assert images.shape[1:] == (3, size, size)
            assert len(found.tokens.rows) == len(images)
            count += len(images)
        return count

    return epoch


def _pair_loader(shards: str, tokenizer: Tokenizer, size: int, batch: int, workers: int) -> Loader:
    index, _ = only_pairs(ShardIndex.build(shards), "txt")
    return Loader(PairDataset(index, "txt", tokenizer, Augment(size), seed=0), batch, seed=0, workers=workers)


def _peer(shards: list[str], samples: int, size: int, batch: int, workers: int) -> Callable[[], float]:
    """open_clip's own functions build it all."""
    torch.set_num_threads(1)
    import open_clip

    sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # for its CSV files only, and not installed
    from open_clip_train import data as theirs

    # webdataset marks the end of each shard since 0.2.87, which open_clip's grouping does not know
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
    # floor: an epoch ends with the last full batch, as ours does; else samples of a second pass would be in it
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
    """Between our decoded, cropped and resized uint8 and what Pillow makes of the same boxes, in units of 1/255."""
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
    """MiB of the main process and of its 2 workers at the end of each epoch but the first."""
    torch.set_num_threads(1)
    workers_fork()
    pairs = _pair_loader(shards, tokenizer, size, batch, workers=2)
    found = []
    for _ in range(epochs + 1):
        for number, _ in enumerate(pairs, 1):
            if number == len(pairs):  # the workers are still there
                main, *others = (process_memory(pid, "VmRSS") / 2**20 for pid in family(os.getpid()))
                found.append((main, sum(others)))
    return found[1:]
