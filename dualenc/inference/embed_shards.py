"""The function that embeds shards, for programs that divide the work themselves."""

import os
from functools import partial
from typing import Any

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

    Processes on any machines may each write a part into one folder, at once, again, or overlapping. The files are those
    of a single call; whoever finds all of them writes the totals.

    Args:
        model: a model, or a spec of `dualenc.load`.
        shards: patterns of shards; see `ShardIndex.build`.
        out: folder for a `.safetensors` of each shard with unit vectors `image` (n, E) and `text` (m, E).
        part: (i, n) to embed only the shards whose number is i modulo n.
        captions: source of the captions; see `dualenc.data.pairs.captions_of`.
        image: member that is the image; see `dualenc.data.shards.sample.image_members`.
        precision: precision of the towers, if `model` is a spec.
        workers, batch_size, track: see `dualenc.inference.embed_files.write_embeddings`.

    Returns:
        What was written; `missing` names the shards that other parts still have to write.

    Raises:
        DataError: If a shard is unreadable, the part is out of range, or the folder was begun with other options.
        ModelError: If the model cannot be read.

    Example:
        >>> import tempfile
        >>> import dualenc
        >>> from dualenc.data.prepare.scenes import write_scenes
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> image = dualenc.ImageConfig("vit_tiny_patch16_224", 32, {"patch_size": 8, "depth": 1})
        >>> text = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = dualenc.DualEncoder(image, text, embed_dim=8).eval()
        >>> embedder = dualenc.Embedder(model, tokenizer, dualenc.Preprocess(32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_scenes(folder, train=4, held_out=1, shard=2)
        ...     shards, out = f"{folder}/train-{{000000..000001}}.tar", f"{folder}/out"
        ...     made = [dualenc.embed_shards(embedder, shards, out, part=(i, 2), workers=0) for i in (0, 1)]
        >>> made[0].missing, made[1].missing, made[1].samples
        (('train-000001.tar',), (), 4)
    """
    embedder, about = _facts(model, precision)
    index = ShardIndex.build(shards, image=image, workers=workers)
    of_images = partial(embedder.embed_images, batch_size=batch_size)
    options: dict[str, Any] = {"part": part, "workers": workers, "batch_size": batch_size, "track": track}
    about |= {"captions": captions}
    return write_embeddings(index, out, about, embedder.preprocess, of_images, embedder.embed_texts, **options)


def _facts(model: str | os.PathLike[str] | Embedder, precision: Precision) -> tuple[Embedder, dict[str, Any]]:
    """Return the model, and what `embed.json` says of it."""
    embedder = model if isinstance(model, Embedder) else load(model, precision=precision)
    name = f"a model in memory ({embedder.fingerprint[:8]})" if embedder is model else os.fspath(model)  # type: ignore[arg-type]
    return embedder, {
        "model": name,
        "what": "embeddings",
        "precision": embedder.precision,
        "made_by": embedder.fingerprint,
        "dims": embedder.model.embed_dim,
    }
