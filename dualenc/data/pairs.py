"""Index and plan to batches of image-text pairs."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.errors import BadSample, DataError
from dualenc.data.images import IMAGE_EXTENSIONS, ImageError, decode_image
from dualenc.data.index import content_hash, piece_hash
from dualenc.data.masking import Masked, Masking
from dualenc.data.plan import EpochPlan, draw
from dualenc.data.prefetch import Prefetch
from dualenc.data.quarantine import IN_A_ROW, Bad, Quarantine, causes
from dualenc.data.shards import Sample, ShardIndex
from dualenc.data.tokenizer import Tokenizer
from dualenc.data.workers import Noting, PatientLoader
from dualenc.tokens import Tokens

if TYPE_CHECKING:
    from dualenc.data.features import Features


class Pairs(NamedTuple):
    """A batch: pair i is images[i] and the tokenizer's text i."""

    images: Tensor  # (B, 3, S, S) uint8, stored channels last; or features (B, D) fp32
    tokens: Tokens
    rows: Tensor  # (B,) int64, number of each sample in the index; -1 for a bad one, with another in its place
    ids: Tensor  # (B, 2) int64, hashes: equal where images are equal, and where texts are the same tokens
    masked: Masked | None = None  # the texts with some words hidden, where they are to be guessed
    bad: Sequence[Bad] = ()  # samples that were met and could not be used


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
    if source != "txt" and not source.startswith("json."):
        raise DataError(f"captions {source!r} must be 'txt' or 'json.FIELD'")
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


class PairDataset(Noting):
    """Whole batches by request, in a worker or in the main process.

    A bad sample is replaced by the next good one of the index in training; otherwise its row is -1, and whoever
    measures leaves it out.

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
        super().__init__()
        self.index, self.captions, self.features, self.masking = index, captions, features, masking
        self.tokenizer, self.transform, self.seed = tokenizer, transform, seed

    def __getitem__(self, request: tuple[int, int, np.ndarray]) -> Pairs:
        """The batch of an epoch's samples `rows` (B,), the first of which has place `position` in the epoch.

        Raises:
            DataError: `IN_A_ROW` samples one after the other are bad.
        """
        epoch, position, rows = request
        images, texts, used, ids = [], [], [], []
        bad: list[Bad] = []
        with _own_generators():
            for place, row in enumerate(rows.tolist(), position):
                good, picture, captions, piece = self._next_good(row, bad)
                choice = 0
                if self.seed is not None:
                    key = draw(self.seed, epoch, place)
                    torch.default_generator.manual_seed(key)
                    random.seed(key)
                    choice = key % len(captions)
                images.append(picture if self.features else self.transform(picture))
                texts.append(captions[choice])
                used.append(good if good == row or self.seed is not None else -1)
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
        self.done()
        return Pairs(batch, tokens, torch.tensor(used), hashes, masked, bad)

    def where(self, row: int) -> tuple[str, str]:
        """A sample's shard, and its shard and key, for people."""
        sample = self.index[row]
        return sample.shard, str(sample)

    def _next_good(self, row: int, bad: list[Bad]) -> tuple[int, Tensor, list[str], int]:
        """The first sample from `row` on that can be used: its number, picture, captions and a hash of its image.

        Notes those before it.
        """
        for step in range(IN_A_ROW):
            near = (row + step) % len(self.index)
            self.begin(near)
            sample = self.index[near]
            try:
                picture, piece = self._picture(near, sample)
                return near, picture, captions_of(sample, self.captions), piece
            except BadSample as error:
                bad.append(Bad(near, sample.shard, sample.key, error.cause, error.detail))
        raise DataError(f"{IN_A_ROW} samples in a row are bad: {causes(bad[-IN_A_ROW:])}")

    def _picture(self, row: int, sample: Sample) -> tuple[Tensor, int]:
        if self.features is None:
            return read_picture(sample)
        return self.features.row(*self.index.find(row), sample)


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
    return _decoded(sample, *_image_of(sample))


def read_picture(sample: Sample) -> tuple[Tensor, int]:
    """Like `decode_sample`, and the hash `piece_hash` of the image's bytes."""
    extension, data = _image_of(sample)
    return _decoded(sample, extension, data), piece_hash(data)


def _image_of(sample: Sample) -> tuple[str, bytes]:
    """Extension and bytes."""
    extension = sample.image
    if extension is None:
        raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
    return extension, sample.read(extension)


def _decoded(sample: Sample, extension: str, data: bytes) -> Tensor:
    try:
        return decode_image(data)
    except ImageError as error:
        raise BadSample(sample, f".{extension} {error.cause}", error.detail) from None


def token_hashes(tokens: Tokens) -> list[int]:
    """A hash of the ids of each text, in the caller's order."""
    ids, offsets = tokens.ids.numpy(), tokens.offsets.tolist()
    return [content_hash(ids[offsets[row] : offsets[row + 1]].tobytes()) for row in tokens.rows.tolist()]


class PairLoader:
    """Batches for one rank, in an order that depends on (seed, epoch) alone, resumable at any batch.

    Each pass of `for batch in loader` is one epoch, from where the state stands (unshuffled: always the start) to its
    end. Every rank has the same number of batches; rank r gets its part of each global batch.

    Args:
        dataset: what the plan's numbers mean.
        batch_size: global, over all ranks; a multiple of `world`.
        micro_batch_size: the most pairs of a piece; each batch is then a list of pieces, that workers make one by one.
        seed: of the order.
        window: shards shuffled together; see `EpochPlan`.
        sources: (number of shards, weight) of each source; see `EpochPlan`.
        shuffle: false for the order of the shards in batches of nearly `batch_size`, nothing left out (validation);
            no rank goes without a part of any batch, since the others would wait for it.
        rank, world: this process and how many there are.
        workers: processes that decode; 0 for none.
        timeout: seconds that the next batch may take, with workers.
        pin_memory: for a fast copy to a GPU.
        quarantine: where bad samples are written down and counted; absent, nowhere but in memory.

    Raises:
        DataError: the batch is larger than the data, or no multiple of `world`; fewer unshuffled pairs than ranks; no
            time for a batch. From the iteration: a worker hangs, or was killed.
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch_size: int,
        *,
        micro_batch_size: int | None = None,
        seed: int = 0,
        window: int = 64,
        sources: Sequence[tuple[int, float]] | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        timeout: float = 300.0,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.window = dataset, batch_size, seed, window
        self.sources = [(len(dataset.index.parts), 1.0)] if sources is None else list(sources)
        self.quarantine = Quarantine(len(dataset.index)) if quarantine is None else quarantine  # an empty one is false
        self.shuffle, self.rank, self.world = shuffle, rank, world
        self.workers, self.timeout, self.pin_memory = workers, timeout, pin_memory
        self.epoch, self.batch = 0, 0
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} (over all ranks) is no multiple of the {world} ranks")
        if not timeout > 0:
            raise DataError(f"data.timeout {timeout} must be more than 0 seconds")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise DataError(f"micro_batch_size {micro_batch_size} must be 1 at least")
        self.micro_batch_size = micro_batch_size
        self._length = len(self._plan(0))
        self._requests = _Requests(rank, world, batch_size, micro_batch_size)
        self._loader: PatientLoader | None = None  # kept from epoch to epoch with its workers

    def _plan(self, epoch: int) -> Sequence[np.ndarray]:
        if not self.shuffle:
            rows = np.arange(len(self.dataset.index))
            if len(rows) < self.world:
                raise DataError(f"{len(rows)} held-out pairs are fewer than the {self.world} ranks")
            # As many batches as it takes, but none smaller than the ranks that share it.
            return np.array_split(rows, min(-(-len(rows) // self.batch_size), len(rows) // self.world))
        try:
            counts = self.dataset.index.counts()
            return EpochPlan(counts, self.seed, epoch, self.batch_size, self.window, self.sources)  # type: ignore[return-value]
        except ValueError as error:
            raise DataError(str(error)) from None

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the state stands."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Batches, `Pairs`; or, of micro-batches, lists of them."""
        if not self.shuffle:
            self.batch = 0  # a trainer's sanity check or limit may have left the last pass early
        plan = self._plan(self.epoch)
        if self._loader is None:
            self._loader = PatientLoader(
                self.dataset,
                workers=self.workers,
                timeout=self.timeout,
                sampler=self._requests,
                pin_memory=self.pin_memory,
                prefetch_factor=4 if self.workers else None,
            )
        self._requests.begin(plan, self.epoch, self.batch)
        try:
            pieces = iter(self._loader)  # starts the workers in the first epoch, before there are threads
            with Prefetch(plan, self.dataset.index, self.batch) as prefetch:
                for count in self._requests.pieces():
                    batch = list(islice(pieces, count))
                    for piece in batch:
                        self.quarantine.add(piece.bad)
                    prefetch.reached(self.batch)
                    self.batch += 1  # counted when handed over, not when a worker reads ahead
                    if self.batch == self._length:
                        self.epoch, self.batch = self.epoch + 1, 0
                    yield batch if self.micro_batch_size else batch[0]
        except BaseException:  # an epoch that is left, too: what the workers read ahead is of no use
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch; it may still come."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, equal on all ranks."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "window": self.window,
            "sources": [[number, weight] for number, weight in self.sources],
            "captions": self.dataset.captions,
            "tokenizer": self.dataset.tokenizer.fingerprint,
            "fingerprint": self.dataset.index.fingerprint,
            "features": self.dataset.features.made_by if self.dataset.features else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another loader stood.

        Raises:
            DataError: that loader read other data, or in another order; names the field.
        """
        mine = self.state_dict()
        for name in mine:
            if name not in ("epoch", "batch") and state.get(name) != mine[name]:
                raise DataError(f"the checkpoint's data loader had {name} {state.get(name)}, this run has {mine[name]}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Requests:
    """What `PairDataset` is asked for, from some batch to the epoch's end, for one rank."""

    def __init__(self, rank: int, world: int, size: int, most: int | None) -> None:
        self.rank, self.world, self.size, self.most = rank, world, size, most

    def begin(self, plan: Sequence[np.ndarray], epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start

    def pieces(self) -> Iterator[int]:
        """How many each batch is asked for in."""
        for k in range(self.start, len(self.plan)):
            yield self._number(self._own(k)[0])

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for k in range(self.start, len(self.plan)):
            own, place = self._own(k)
            for piece in np.array_split(own, self._number(own)):  # as equal as can be
                yield self.epoch, place, piece
                place += len(piece)

    def _number(self, own: np.ndarray) -> int:
        return -(-len(own) // self.most) if self.most else 1

    def _own(self, k: int) -> tuple[np.ndarray, int]:
        """This rank's rows of a batch, and the place of the first of them in the epoch."""
        parts = np.array_split(self.plan[k], self.world)  # equal, but for unshuffled pairs
        return parts[self.rank], k * self.size + sum(map(len, parts[: self.rank]))
