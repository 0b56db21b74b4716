"""The function that embeds shards, for programs that divide the work themselves."""

import os
from functools import partial

from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.patterns import Patterns
from dualenc.inference.embed_files import Embedded, Track, write_embeddings
from dualenc.inference.embedder import Embedder, load
from dualenc.utils.arguments import Precision


def embed_shards(
    model: str | os.PathLike[str] | Embedder,
    shards: Patterns,
    out: str | os.PathLike[str],
    *,
    part: tuple[int, int] = (0, 1),
    captions: str = "auto",
    image: str | None = None,
    precision: Precision = "fp32",
    workers: int = 2,
    batch_size: int = 64,
    track: Track = lambda items, total: items,
) -> Embedded:
    """Write the embeddings of the images and captions of shards, as `dualenc embed` does, or those of a part of them.

    Processes on any machines may each write a part into one folder, at once, again, or overlapping: they share nothing
    but the folder. The files are those of a single call, and whoever finds all of them writes the totals.

    Args:
        model: a model, or a spec of `dualenc.load`.
        shards: patterns of shards; see `ShardIndex.build`.
        out: folder for a `.safetensors` of each shard, with the unit vectors `image` (n, E) and `text` (m, E) in fp32,
            `embed.json` and `bad.jsonl`. The same call continues a stopped one.
        part: (i, n) to embed only the shards whose number is i modulo n.
        captions: source of the captions; see `dualenc.data.pairs.captions_of`.
        image: member that is the image; see `dualenc.data.shards.sample.image_members`.
        precision: precision of the towers, if `model` is a spec.
        workers: processes that decode images; 0 to decode in this process.
        batch_size: images embedded at once.
        track: wraps the batches, whose number is `total`, for a progress bar.

    Returns:
        What was written; `missing` names the shards that other parts have not written yet.

    Raises:
        DataError: If a shard cannot be read, the part is out of range, or the folder was begun with another model,
            other shards or options.
        ModelError: If the model cannot be read.

    Example:
        >>> import tempfile
        >>> from io import BytesIO
        >>> from PIL import Image
        >>> from webdataset import TarWriter
        >>> import dualenc
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> tower = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        >>> image = dualenc.ImageConfig("vit_tiny_patch16_224", 32, tower)
        >>> text = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = dualenc.DualEncoder(image, text, embed_dim=8)
        >>> embedder = dualenc.Embedder(model.eval(), tokenizer, dualenc.Preprocess(32))
        >>> picture = BytesIO()
        >>> Image.new("RGB", (40, 30), "red").save(picture, "png")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("0", "1"):
        ...         with TarWriter(f"{folder}/{name}.tar") as tar:
        ...             _ = tar.write({"__key__": "cat", "txt": "a cat", "png": picture.getvalue()})
        ...     first = dualenc.embed_shards(embedder, folder, f"{folder}/out", part=(0, 2), workers=0)
        ...     second = dualenc.embed_shards(embedder, folder, f"{folder}/out", part=(1, 2), workers=0)
        >>> first.missing, second.missing, second.samples, second.dims
        (('1.tar',), (), 2, 8)
    """
    if isinstance(model, Embedder):
        embedder, name = model, f"a model in memory ({model.fingerprint[:8]})"
    else:
        embedder, name = load(model, precision=precision), os.fspath(model)
    about = {
        "model": name,
        "what": "embeddings",
        "precision": embedder.precision,
        "made_by": embedder.fingerprint,
        "captions": captions,
        "dims": embedder.model.embed_dim,
    }
    return write_embeddings(
        ShardIndex.build(shards, image=image, workers=workers),
        out,
        about,
        embedder.preprocess,
        partial(embedder.embed_images, batch_size=batch_size),
        embedder.embed_texts,
        part=part,
        workers=workers,
        batch_size=batch_size,
        track=track,
    )
