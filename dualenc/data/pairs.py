"""Index and plan to batches of image-text pairs."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.errors import BadSample, DataError
from dualenc.data.images import IMAGE_EXTENSIONS, ImageError, decode_image
from dualenc.data.plan import EpochPlan, draw
from dualenc.data.prefetch import Prefetch
from dualenc.data.quarantine import IN_A_ROW, Bad, Quarantine, causes
from dualenc.data.shards import Sample, ShardIndex
from dualenc.data.tokenizer import Tokenizer
from dualenc.data.workers import Noting, PatientLoader
from dualenc.tokens import Tokens


class Pairs(NamedTuple):
    """A batch: pair i is images[i] and the tokenizer's text i."""

    images: Tensor  # (B, 3, S, S) uint8, stored channels last
    tokens: Tokens
    rows: Tensor  # (B,) int64, number of each sample in the index; -1 for a bad one, with another in its place
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
    """

    def __init__(
        self,
        index: ShardIndex,
        captions: str,
        tokenizer: Tokenizer,
        transform: Callable[[Tensor], Tensor],
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.index, self.captions = index, captions
        self.tokenizer, self.transform, self.seed = tokenizer, transform, seed

    def __getitem__(self, request: tuple[int, int, np.ndarray]) -> Pairs:
        """The batch of an epoch's samples `rows` (B,), the first of which has place `position` in the epoch.

        Raises:
            DataError: `IN_A_ROW` samples one after the other are bad.
        """
        epoch, position, rows = request
        images, texts, used = [], [], []
        bad: list[Bad] = []
        with _own_generators():
            for place, row in enumerate(rows.tolist(), position):
                good, picture, captions = self._next_good(row, bad)
                choice = 0
                if self.seed is not None:
                    key = draw(self.seed, epoch, place)
                    torch.default_generator.manual_seed(key)
                    random.seed(key)
                    choice = key % len(captions)
                images.append(self.transform(picture))
                texts.append(captions[choice])
                used.append(good if good == row or self.seed is not None else -1)
        # Stored channels last, as the pictures are: no time for turning them around.
        batch = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        pairs = Pairs(batch, self.tokenizer(texts), torch.tensor(used), bad)
        self.done()
        return pairs

    def where(self, row: int) -> tuple[str, str]:
        """A sample's shard, and its shard and key, for people."""
        sample = self.index[row]
        return sample.shard, str(sample)

    def _next_good(self, row: int, bad: list[Bad]) -> tuple[int, Tensor, list[str]]:
        """The first sample from `row` on that can be used: its number, picture and captions. Notes those before it."""
        for step in range(IN_A_ROW):
            near = (row + step) % len(self.index)
            self.begin(near)
            sample = self.index[near]
            try:
                return near, decode_sample(sample), captions_of(sample, self.captions)
            except BadSample as error:
                bad.append(Bad(near, sample.shard, sample.key, error.cause, error.detail))
        raise DataError(f"{IN_A_ROW} samples in a row are bad: {causes(bad[-IN_A_ROW:])}")


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
    extension = sample.image
    if extension is None:
        raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
    try:
        return decode_image(sample.read(extension))
    except ImageError as error:
        raise BadSample(sample, f".{extension} {error.cause}", error.detail) from None


class PairLoader:
    """Batches for one rank, in an order that depends on (seed, epoch) alone, resumable at any batch.

    Each pass of `for batch in loader` is one epoch, from where the state stands (unshuffled: always the start) to its
    end. Every rank has the same number of batches; rank r gets its part of each global batch.

    Args:
        dataset: what the plan's numbers mean.
        batch_size: global, over all ranks; a multiple of `world`.
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
        self._length = len(self._plan(0))
        self._requests = _Requests(rank, world, batch_size)
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

    def __iter__(self) -> Iterator[Pairs]:
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
            batches = iter(self._loader)  # starts the workers in the first epoch, before there are threads
            with Prefetch(plan, self.dataset.index, self.batch) as prefetch:
                for batch in batches:
                    self.quarantine.add(batch.bad)
                    prefetch.reached(self.batch)
                    self.batch += 1  # counted when handed over, not when a worker reads ahead
                    if self.batch == self._length:
                        self.epoch, self.batch = self.epoch + 1, 0
                    yield batch
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another loader stood.

        Raises:
            DataError: that loader read other data, or in another order; names the field.
        """
        mine = self.state_dict()
        for name in mine:
            if name not in ("epoch", "batch") and state[name] != mine[name]:
                raise DataError(f"the checkpoint's data loader had {name} {state[name]}, this run has {mine[name]}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Requests:
    """What `PairDataset` is asked for, from some batch to the epoch's end, for one rank."""

    def __init__(self, rank: int, world: int, size: int) -> None:
        self.rank, self.world, self.size = rank, world, size

    def begin(self, plan: Sequence[np.ndarray], epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start

    def __len__(self) -> int:
        return len(self.plan) - self.start

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for k in range(self.start, len(self.plan)):
            parts = np.array_split(self.plan[k], self.world)  # equal, but for unshuffled pairs
            yield self.epoch, k * self.size + sum(map(len, parts[: self.rank])), parts[self.rank]
