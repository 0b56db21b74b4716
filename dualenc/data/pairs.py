"""Index and plan to batches of image-text pairs."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.images import IMAGE_EXTENSIONS, ImageError, decode_image
from dualenc.data.loading.bad_samples import BadRecord, SampleReader
from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.data.loading.loader import Request
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.shards.shard import content_hash, piece_hash
from dualenc.data.text.masking import Masked, Masking
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.tokens import Tokens
from dualenc.utils.errors import BadSample, DataError

if TYPE_CHECKING:
    from dualenc.data.image_features import Features


class Pairs(NamedTuple):
    """A batch: pair i is images[i] and the tokenizer's text i."""

    images: Tensor  # (B, 3, S, S) uint8, stored channels last; or features (B, D) fp32
    tokens: Tokens
    rows: Tensor  # (B,) int64, number of each sample in the index; -1 for a bad one, with another in its place
    ids: Tensor  # (B, 2) int64, hashes: equal where images are equal, and where texts are the same tokens
    masked: Masked | None = None  # the texts with some words hidden, where they are to be guessed
    bad: Sequence[BadRecord] = ()  # samples that were met and could not be used


def check_captions(source: str) -> None:
    """Check where captions are read from.

    Raises:
        DataError: `source` is neither "txt" nor "json.FIELD".
    """
    if source != "txt" and not source.startswith("json."):
        raise DataError(f"captions {source!r} must be 'txt' or 'json.FIELD'")


def captions_of(sample: Sample, source: str) -> list[str]:
    """The captions of a sample.

    Args:
        sample: where to read.
        source: "txt" for the text file, or "json.FIELD" for a string or a list of strings in the `.json`.

    Raises:
        BadSample: none, an empty one, or no UTF-8.
    """
    if source == "txt":
        try:
            found: Any = sample.read("txt").decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(sample, ".txt is not UTF-8", str(error)) from None
    else:
        fields = sample.read_json()
        field = source.removeprefix("json.")
        if not isinstance(fields, dict) or field not in fields:
            raise BadSample(sample, f"its .json has no field {field!r}")
        found = fields[field]
    captions = found if isinstance(found, list) else [found]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise BadSample(sample, f"{source} holds no caption, or an empty one")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise BadSample(sample, f"{source} holds what is no Unicode", error.reason) from None
    return captions


def all_captions(index: ShardIndex, source: str, bad: list[str] | None = None) -> Iterator[str]:
    """Every caption of an index; samples without a readable one are passed over, and `bad` takes why."""
    for sample in index:
        try:
            yield from captions_of(sample, source)
        except BadSample as error:
            if bad is not None:
                bad.append(str(error))


def only_pairs(index: ShardIndex, source: str) -> tuple[ShardIndex, list[str]]:
    """The samples that have an image and a caption file, and the keys of those that have not.

    Raises:
        DataError: `source` is neither "txt" nor "json.FIELD"; or no sample has both.
    """
    check_captions(source)
    where = f"{index.shards[0]}{f' and {len(index.shards) - 1} more shards' if len(index.shards) > 1 else ''}"
    image, text = index.having(IMAGE_EXTENSIONS), index.having([source.partition(".")[0]])
    if not image.any():
        raise DataError(f"{where}: no images among {len(index)} samples; wanted: .{', .'.join(IMAGE_EXTENSIONS)}")
    if not text.any():
        raise DataError(f"{where}: no captions among {len(index)} samples; wanted: .{source.partition('.')[0]} members")
    both = image & text
    if not both.any():
        raise DataError(f"{where}: no sample of {len(index)} has an image and a caption")
    if both.all():
        return index, []
    return index.take(np.flatnonzero(both)), [index.key(int(i)) for i in np.flatnonzero(~both)]


class PairDataset(Dataset[Pairs]):
    """Batches of image-text pairs, by request; see `dualenc.data.loading.loader.BatchDataset`.

    Args:
        index: samples that all have an image and captions.
        captions: see `captions_of`.
        tokenizer: texts to `Tokens`.
        transform: uint8 (3, H, W) to uint8 (3, S, S); may draw from torch's default generator and from `random`.
        seed: of augmentation and caption choice; None for the first caption.
        features: in place of the images, which are then neither read nor transformed.
        masking: hides words, to be guessed.
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
        self.current_sample, self.locate = self.samples.current_sample, self.samples.locate
        self.captions, self.features, self.masking = captions, features, masking
        self.tokenizer, self.transform = tokenizer, transform

    def __getitem__(self, request: Request) -> Pairs:
        """The batch of an epoch's samples `rows` (B,), the first of which has place `position` in the epoch.

        Raises:
            DataError: If `MAX_CONSECUTIVE` consecutive samples are bad.
        """
        epoch, position, rows = request
        images, texts, used, ids = [], [], [], []
        bad: list[BadRecord] = []
        with _own_generators():
            for place, row in enumerate(rows.tolist(), position):
                number, (picture, captions, piece) = self.samples.first_good(row, bad)
                choice = 0
                if self.seed is not None:
                    key = derive_seed(self.seed, epoch, place)
                    torch.default_generator.manual_seed(key)
                    random.seed(key)
                    choice = key % len(captions)
                images.append(picture if self.features else self.transform(picture))
                texts.append(captions[choice])
                used.append(number)
                ids.append(piece)
        if self.features:
            batch = torch.stack(images)
        else:  # stored channels last, as the pictures are: no time for turning them around
            batch = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        tokens = self.tokenizer(texts)
        hashes = torch.from_numpy(np.array([ids, token_hashes(tokens)], np.uint64).view(np.int64).T.copy())
        masked = None
        if self.masking is not None and self.seed is not None:
            masked = self.masking(tokens, (self.seed, epoch), position)
        self.current_sample.finish()
        return Pairs(batch, tokens, torch.tensor(used), hashes, masked, bad)

    def _read(self, row: int, sample: Sample) -> tuple[Tensor, list[str], int]:
        """Picture or features, captions, and a hash of the image."""
        if self.features is not None:
            picture, piece = self.features.row(*self.index.find(row), sample)
        else:
            extension, data = image_of(sample)
            with _naming(sample, extension):
                picture, piece = decode_image(data), piece_hash(data)
        return picture, captions_of(sample, self.captions), piece

    def facts(self) -> dict[str, Any]:
        """See `BatchDataset.facts`."""
        return {
            "captions": self.captions,
            "tokenizer": self.tokenizer.fingerprint,
            "fingerprint": self.index.fingerprint,
            "features": self.features.made_by if self.features else None,
        }


class _own_generators:
    """Leaves the process's generators as they were: with 0 workers they are the training loop's."""

    def __enter__(self) -> None:
        self.state = torch.default_generator.get_state(), random.getstate()

    def __exit__(self, *exc: object) -> None:
        torch.default_generator.set_state(self.state[0])
        random.setstate(self.state[1])


def decode_sample(sample: Sample) -> Tensor:
    """The picture of a sample, uint8 (3, H, W).

    Raises:
        BadSample: there is none, or it cannot be decoded; names shard, key and cause.
    """
    return read_picture(sample)[0]


def read_picture(sample: Sample) -> tuple[Tensor, int]:
    """Like `decode_sample`, and the hash `piece_hash` of the image's bytes."""
    extension, data = image_of(sample)
    with _naming(sample, extension):
        return decode_image(data), piece_hash(data)


def image_of(sample: Sample) -> tuple[str, bytes]:
    """Extension and bytes of a sample's image.

    Raises:
        BadSample: there is none.
    """
    extension = sample.image
    if extension is None:
        raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
    return extension, sample.read(extension)


@contextmanager
def _naming(sample: Sample, extension: str) -> Iterator[None]:
    """Turns an error of a picture into one of its sample."""
    try:
        yield
    except ImageError as error:
        raise BadSample(sample, f".{extension} {error.cause}", error.detail) from None


def token_hashes(tokens: Tokens) -> list[int]:
    """A hash of the ids of each text, in the caller's order."""
    ids, offsets = tokens.ids.numpy(), tokens.offsets.tolist()
    return [content_hash(ids[offsets[row] : offsets[row + 1]].tobytes()) for row in tokens.rows.tolist()]
