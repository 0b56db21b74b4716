"""The data set of image-text pairs: from requested samples of an index to batches."""

import os
import random
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.images import ImageError, decode_image
from dualenc.data.loading.bad_samples import BadRecord, SampleReader
from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.data.loading.loader import Request
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.shards.select import describe_fields, find_field
from dualenc.data.shards.shard import partial_hash
from dualenc.data.text.dataset import token_hashes
from dualenc.data.text.masking import Masked, Masking
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.workers import tensor_bytes
from dualenc.tokens import Tokens
from dualenc.utils.decoding import text_problem, trimmed
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import quoted
from dualenc.utils.urls import folder_of

if TYPE_CHECKING:
    from dualenc.data.image_features import Features

AUTO = "auto"  # captions of whatever source a sample has; see `captions_of`


class Pairs(NamedTuple):
    """A batch of B pairs: `images[i]` with text i of `tokens`."""

    images: Tensor  # (B, 3, S, S) uint8, stored channels last; or features (B, D) fp32
    tokens: Tokens
    rows: Tensor  # (B,) int64, number of each sample in the index; -1 in an evaluation for a replacement of a bad one
    ids: Tensor  # (B, 2) int64 hashes of images and texts, which show duplicates; texts are hashed as tokens
    masked: Masked | None = None  # the texts with masked tokens, for masked language modeling
    bad: Sequence[BadRecord] = ()  # samples that could not be used, and were replaced


def caption_members(source: str) -> list[str]:
    """Return the members that may hold the captions, one of which a sample must have.

    Args:
        source: see `captions_of`.

    Raises:
        DataError: If `source` is not understood.
    """
    return ["json", "txt"] if source == AUTO else [_caption_member(source)[0]]


def _caption_member(source: str) -> tuple[str, str | None]:
    """Return the member that holds the captions, and the field in it for a JSON."""
    parts = source.split(".")
    if "json" in parts[:-1]:
        end = parts.index("json") + 1
        member, name = ".".join(parts[:end]), ".".join(parts[end:])
        if name:
            return member.lower(), name
    if parts[-1] == "txt" and all(parts):
        return source.lower(), None
    raise DataError(
        f"captions {source!r} must be 'auto', 'txt' or 'json.FIELD', where FIELD may be nested as in meta.caption"
    )


def captions_of(sample: Sample, source: str) -> list[str]:
    """Read the captions of a sample without white space around them; empty ones are left out.

    Args:
        sample: the sample.
        source: "txt" for the text file, or "json.FIELD" for a string or a list of strings in the `.json`, which may be
            nested as in "json.meta.caption"; a member of another name comes before, as in "long.txt" or
            "meta.json.FIELD". Or "auto": the field `captions` of the `.json`, as `dualenc make-shards` writes it, or
            else the `.txt`, or else the field `caption` of the `.json`.

    Raises:
        BadSample: If there is no caption or only empty ones, or one is not a text, not UTF-8, or has NULs.
    """
    return captions_with_source(sample, source)[0]


def captions_with_source(sample: Sample, source: str) -> tuple[list[str], str]:
    """Read the captions of a sample; see `captions_of`. Also return the source, which says what "auto" found."""
    source, found = _read_any(sample) if source == AUTO else (source, _read_member(sample, *_caption_member(source)))
    captions = []
    for caption in found if isinstance(found, list) else [found]:
        problem = text_problem(caption)
        if problem is None:
            captions.append(trimmed(caption))
        elif problem != "empty":
            detail = quoted(caption) if isinstance(caption, str) else type(caption).__name__
            raise BadSample(sample, f"{source} holds a caption {problem}", detail)
    if not captions:
        raise BadSample(sample, f"{source} holds no caption, or only empty ones")
    return captions, source


def _read_any(sample: Sample) -> tuple[str, Any]:
    """Return the source of captions that "auto" stands for in a sample, and what it holds."""
    fields = sample.read_json() if "json" in sample else {}
    names = fields if isinstance(fields, dict) else {}
    if "captions" in names:
        return "json.captions", names["captions"]
    if "txt" in sample or "json" not in sample:
        return "txt", sample.read_text("txt")
    if "caption" in names:
        return "json.caption", names["caption"]
    cause = "no .txt, and its .json has no field 'captions' or 'caption'"
    raise BadSample(sample, cause, f"it has {describe_fields(fields)}")


def _read_member(sample: Sample, member: str, name: str | None) -> Any:
    """Return the text of a member, or the value of a field of its JSON."""
    if name is None:
        return sample.read_text(member)
    fields = sample.read_json(member)
    try:
        return find_field(fields, name)
    except KeyError:
        raise BadSample(sample, f"its .{member} has no field {name!r}", f"it has {describe_fields(fields)}") from None


def all_captions(samples: Iterable[Sample], source: str, bad: list[str] | None = None) -> Iterator[str]:
    """Yield all captions of samples; those without readable captions are skipped.

    Args:
        samples: the samples, such as a `ShardIndex`.
        source: see `captions_of`.
        bad: a list that takes the reason for each skipped sample.
    """
    for sample in samples:
        try:
            yield from captions_of(sample, source)
        except BadSample as error:
            if bad is not None:
                bad.append(str(error))


def only_pairs(index: ShardIndex, source: str) -> tuple[ShardIndex, list[str]]:
    """Return the samples that have an image and a caption file, and the keys of all other samples.

    Raises:
        DataError: If `source` is not understood, or no sample has both.
    """
    members = caption_members(source)
    where = _where(index)
    image, text = index.having(index.images), index.having(members)
    if not image.any():
        raise no_images(index)
    if not text.any():
        raise DataError(
            f"{where}: no captions among {len(index)} samples; expected .{' or .'.join(members)}{member_names(index)}: "
            "name the source of captions with data.captions"
        )
    both = image & text
    if not both.any():
        way_out = join_command(index, image, text) or (
            "give them the same key, or name the source of captions with data.captions"
        )
        raise DataError(f"{where}: no sample of {len(index)} has an image and a caption: {way_out}")
    if both.all():
        return index, []
    return index.take(np.flatnonzero(both)), [index.key(int(i)) for i in np.flatnonzero(~both)]


def no_images(index: ShardIndex) -> DataError:
    """Return the error of shards without an image; it names the members that are there."""
    return DataError(
        f"{_where(index)}: no images among {len(index)} samples; expected .{', .'.join(index.images)}"
        f"{member_names(index)}: name the member of the image with data.image, or --image of other commands"
    )


def _where(index: ShardIndex) -> str:
    """Return the shards of an index as text, for a message."""
    more = f" and {len(index.shards) - 1} more shards" if len(index.shards) > 1 else ""
    return f"{index.shards[0]}{more}"


def member_names(index: ShardIndex) -> str:
    """Return the extensions of the members that some samples have as text, for a message."""
    found = dict.fromkeys(name for part in index.parts for name in part.facts["extensions"])
    names = [quoted(f".{name}", 40)[1:-1] for name in list(found)[:10] if index.having([name]).any()]
    return f", but they have {', '.join(names)}" if names else ""


def join_command(index: ShardIndex, image: np.ndarray, text: np.ndarray) -> str | None:
    """Return the way out if images and captions are in different shards under the same keys, else None.

    Args:
        index: the samples.
        image: mask (S,) of the samples with an image.
        text: mask (S,) of the samples with captions.
    """
    names = {os.path.basename(index.key(int(i))) for i in np.flatnonzero(image & ~text)}
    if not any(os.path.basename(index.key(int(i))) in names for i in np.flatnonzero(text & ~image)):
        return None
    folders = dict.fromkeys(shlex.quote(folder_of(shard) or ".") for shard in index.shards)
    command = f"dualenc make-shards {' '.join(folders)} OUT"
    return f"they are in different shards, under the same keys: join them with `{command}`"


class PairDataset(Dataset[Pairs]):
    """Data set of batches of image-text pairs, by request; see `dualenc.data.loading.loader.BatchDataset`.

    Args:
        index: samples that all have an image and captions.
        captions: source of the captions, such as "auto"; see `captions_of`.
        tokenizer: tokenizer of the captions.
        transform: transform from uint8 (3, H, W) to uint8 (3, S, S); may draw from torch's default generator and from
            `random`.
        seed: seed of augmentation and caption choice; None for evaluation, with the first caption of each sample.
        features: image features to use in place of the images, which are then neither read nor transformed.
        masking: masking of tokens, for masked language modeling.
    """

    def __init__(
        self,
        index: ShardIndex,
        captions: str,
        tokenizer: Tokenizer,
        transform: Callable[[Tensor], Tensor],
        seed: int | None = None,
        features: "Features | None" = None,
        masking: Masking | None = None,
    ) -> None:
        self.index, self.seed = index, seed
        self.samples = SampleReader(index, self._read, evaluation=seed is None)
        # The loader reads both, to name the sample at which a worker stalls.
        self.current_sample, self.locate = self.samples.current_sample, self.samples.locate
        self.captions, self.features, self.masking = captions, features, masking
        self.tokenizer, self.transform = tokenizer, transform

    def __repr__(self) -> str:
        return f"PairDataset({self.index!r}, captions {self.captions})"

    def __getitem__(self, request: Request) -> Pairs:
        """Read a batch.

        Args:
            request: epoch, position of the first sample in the epoch, and the samples' numbers (B,).

        Raises:
            DataError: If `dualenc.data.loading.bad_samples.MAX_CONSECUTIVE` consecutive samples are bad.
        """
        epoch, start, rows = request
        images, texts, used_rows, image_hashes = [], [], [], []
        bad: list[BadRecord] = []
        with _preserve_rng_state():
            for position, row in enumerate(rows.tolist(), start):
                used_row, (image, captions, image_hash) = self.samples.read_next_good(row, bad)
                choice = 0
                if self.seed is not None:
                    # Each position has a seed of its own, so that augmentation does not depend on workers and ranks.
                    sample_seed = derive_seed(self.seed, epoch, position)
                    torch.default_generator.manual_seed(sample_seed)
                    random.seed(sample_seed)
                    choice = sample_seed % len(captions)
                images.append(image if self.features else self.transform(image))
                texts.append(captions[choice])
                used_rows.append(used_row)
                image_hashes.append(image_hash)
        if self.features:
            batch = torch.stack(images)
        else:  # The batch is stored channels last like the images, which saves a transposition.
            batch = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        tokens = self.tokenizer(texts)
        of_images = torch.from_numpy(np.array(image_hashes, np.uint64).view(np.int64))
        ids = torch.stack([of_images, token_hashes(tokens)], 1)
        masked = None
        if self.masking is not None and self.seed is not None:
            masked = self.masking(tokens, (self.seed, epoch), start)
        self.current_sample.finish()
        return Pairs(batch, tokens, torch.tensor(used_rows), ids, masked, bad)

    def _read(self, row: int, sample: Sample) -> tuple[Tensor, list[str], int]:
        """Read the image or its features, the captions, and a hash of the image."""
        if self.features is not None:
            image, image_hash = self.features.read(*self.index.find(row), sample)
        else:
            extension, data = read_image_bytes(sample)
            with _as_bad_sample(sample, extension):
                image, image_hash = decode_image(data), partial_hash(data)
        return image, captions_of(sample, self.captions), image_hash

    def sample_bytes(self) -> int:
        """See `BatchDataset.sample_bytes`."""
        return 0 if self.features else tensor_bytes(self.transform)

    def facts(self) -> dict[str, Any]:
        """See `BatchDataset.facts`."""
        return {
            "captions": self.captions,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": self.index.fingerprint,
            "features": self.features.made_by if self.features else None,
        }


@contextmanager
def _preserve_rng_state() -> Iterator[None]:
    """Restore the random generators at the end, which the training loop uses too if there are no workers."""
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)


def decode_sample(sample: Sample) -> Tensor:
    """Decode the image of a sample to uint8 (3, H, W).

    Raises:
        BadSample: If the sample has no image, or it cannot be decoded; the message names shard, key and cause.
    """
    return decode_and_hash(sample)[0]


def decode_and_hash(sample: Sample) -> tuple[Tensor, int]:
    """Decode the image of a sample, and hash its bytes by `partial_hash`; see `decode_sample`."""
    extension, data = read_image_bytes(sample)
    with _as_bad_sample(sample, extension):
        return decode_image(data), partial_hash(data)


def read_image_bytes(sample: Sample) -> tuple[str, bytes]:
    """Read the extension and the bytes of a sample's image.

    Raises:
        BadSample: If the sample has no image.
    """
    extension = sample.image
    if extension is None:
        raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
    return extension, sample.read(extension)


@contextmanager
def _as_bad_sample(sample: Sample, extension: str) -> Iterator[None]:
    """Translate an `ImageError` of a sample's image into a `BadSample`."""
    try:
        yield
    except ImageError as error:
        raise BadSample(sample, f".{extension} {error.cause}", error.detail) from None
