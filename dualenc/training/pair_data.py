"""The data module of image-text pairs: shards, split, tokenizer and loaders."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from dualenc.data import Augment, BadSampleLog, Cache, Loader, PairDataset, Preprocess, ShardIndex, Tokenizer
from dualenc.data.image_features import Features
from dualenc.data.loading.loader import BatchDataset
from dualenc.data.pairs import AUTO, all_captions, only_pairs
from dualenc.data.shards.patterns import distinct
from dualenc.data.shards.selection import Selection, read_selection
from dualenc.data.text.masking import Masking
from dualenc.data.text.training_texts import MAX_TEXTS, draw_texts, spread_samples
from dualenc.models import TextConfig
from dualenc.training.ranks import all_gather_object
from dualenc.training.task import rank_zero_print
from dualenc.training.transfer import copy_beside
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write


class Source(TypedDict):
    """Shards with a weight.

    This is a dict and not a dataclass, for which jsonargparse would read the path of a shard as a configuration file.

    Attributes:
        shards: path, URL, glob, brace pattern, folder, or a list of these.
        weight: number of passes over the samples in an epoch, 1 if absent; with 0.5, an epoch has half of the samples
            and the next epoch the other half.
    """

    shards: str | list[str]
    weight: NotRequired[float]


def stage_name(stage: str) -> str:
    """Return "fit", "validate", "test" or "predict"; Lightning passes some of them as members of an enumeration."""
    return str(getattr(stage, "value", stage))


class TokenData(LightningDataModule):
    """Base class of the data modules: the tokenizer of a run, and loaders whose workers are ended after it.

    Args:
        text: architecture of the text encoder.
        tokenizer: path of a tokenizer; absent, that of the task's text checkpoint is used, or one is trained.

    Attributes:
        selection: list that the training samples were chosen by; None for all of them, or for an expression.
    """

    selection: Selection | None = None
    trainer: Any  # Lightning declares fewer attributes than its Trainer has
    seed: int
    workers: int
    timeout: float
    bad_sample_log: BadSampleLog

    def __init__(self, text: TextConfig, tokenizer: str | None) -> None:
        super().__init__()
        self.text, self.tokenizer_path = text, tokenizer
        self.tokenizer: Tokenizer | None = None
        self._loaders: list[Loader] = []

    def training_texts(self, bad: list[str]) -> Iterable[str]:
        """Return the texts to train a tokenizer on, from at most `MAX_TEXTS` samples.

        Args:
            bad: list that takes the reason for each sample without a readable text.
        """
        raise NotImplementedError

    @property
    def _trained_tokenizer_path(self) -> Path:
        return Path(self.trainer.default_root_dir) / "tokenizer.json"

    @property
    def _text_checkpoint(self) -> Any:
        return getattr(self.trainer.lightning_module, "text_checkpoint", None)

    def _train_tokenizer(self, what: str) -> None:
        """Train a tokenizer, unless one is given or the folder holds a run, which has one.

        Args:
            what: noun for the texts, for messages.
        """
        run_exists = self._trained_tokenizer_path.with_name("run.json").exists()
        given = self.tokenizer_path is not None or self._text_checkpoint is not None
        if given or run_exists or self.trainer.state.fn != "fit":
            return
        rank_zero_print(f"training a tokenizer of {self.text.vocab_size:,} entries on the {what}")
        unreadable: list[str] = []
        texts = draw_texts(self.training_texts(unreadable), MAX_TEXTS, self.seed)
        if not texts:
            example = f" ({unreadable[0]})" if unreadable else ""
            raise DataError(f"none of the {what} can be read{example}: there is nothing to train a tokenizer on")
        tokenizer = Tokenizer.train(texts, self.text.vocab_size, self.text.context_length)
        self._trained_tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._trained_tokenizer_path) as temporary:
            tokenizer.save(temporary)

    def _read_tokenizer(self) -> Tokenizer:
        text = self.text
        if self.tokenizer_path is None and self._text_checkpoint is not None:
            found = self._text_checkpoint.tokenizer()
            length = min(found.context_length, text.context_length)
            tokenizer = found.replace(context_length=length, pad_to=text.pad_to, pad_id=text.pad_id)
            path = self._text_checkpoint.spec
        else:
            path = self.tokenizer_path or self._trained_tokenizer_path
            tokenizer = Tokenizer.from_file(path, text.context_length, text.pad_to, text.pad_id)
        if tokenizer.vocab_size > text.vocab_size:
            raise DataError(
                f"tokenizer {path} has {tokenizer.vocab_size} entries, the text encoder {text.vocab_size}: set "
                "model.text.vocab_size, or leave data.tokenizer out for that of the pretrained text encoder"
            )
        if (unused := text.vocab_size - tokenizer.vocab_size) and self._text_checkpoint is None:
            rank_zero_print(
                f"{path} has {tokenizer.vocab_size:,} entries: {unused:,} of the {text.vocab_size:,} token embeddings "
                "are not used"
            )
        return tokenizer

    def _check_ranks(self, fingerprints: list[str], what: str) -> None:
        """Refuse to start if another rank has found other data.

        Args:
            fingerprints: fingerprints of the data that this rank has found.
            what: noun for the data, for the message.
        """
        everywhere = all_gather_object(fingerprints, self.trainer.world_size)
        if different := [rank for rank, other in enumerate(everywhere) if other != everywhere[0]]:
            raise DataError(f"rank {different[0]} finds other {what} than rank 0: give all machines the same data")

    def _make_loader(self, dataset: BatchDataset, size: int, train: bool, **options: Any) -> Loader:
        """Return a loader of this rank's part of the batches of a data set.

        Args:
            dataset: data set that makes the batches.
            size: batch size, over all ranks.
            train: whether to shuffle.
            **options: more arguments of `Loader`.
        """
        loader = Loader(
            dataset,
            size,
            seed=self.seed,
            shuffle=train,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            workers=self.workers,
            timeout=self.timeout,
            pin_memory=torch.cuda.is_available(),
            bad_sample_log=self.bad_sample_log,
            **options,
        )
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """End the workers of the loaders."""
        for loader in self._loaders:
            loader.close()


class PairData(TokenData):
    """Data module of image-text pairs in webdataset shards.

    Args:
        train: shards as a path, URL, glob, brace pattern, folder, or a list of these; or a list of sources, each with
            `shards` and `weight`.
        preprocess: evaluation transform; the command line takes it from the task.
        text: architecture of the text encoder; the command line takes it from the task.
        val: share of the pairs to hold out, by image content; or shards of held-out pairs; or null for none.
        captions: "auto" for the field `captions` of the `.json`, as `dualenc make-shards` writes it, or else the
            `.txt`; or "txt"; or "json.FIELD" for a string or list of strings in the `.json`, which may be nested as in
            "json.meta.caption". One of several captions is drawn at each step.
        image: member that is the image, such as "input.jpg" where samples have several images; several names are
            separated by ";"; null for the `.jpg`, `.jpeg`, `.png` or `.webp`.
        select: a list of the training samples: keys, or the path of a `.select`, `.npy` or text file; or an expression
            over `.json` fields, which applies to held-out shards too. See `ShardIndex.select`.
        tokenizer: `tokenizer.json`, `vocab.txt` or a folder with one of them; absent, that of the checkpoint from which
            the task takes its text tower; without one, a tokenizer of `text.vocab_size` entries is trained on the
            training captions, at most a million of them, and written to the run directory.
        batch_size: pairs in a batch, over all ranks.
        micro_batch_size: maximum number of pairs that a rank embeds at a time; a larger batch is split into
            micro-batches, whose embeddings alone are kept and which are embedded again for the gradient.
        window: number of shards that are shuffled together.
        augment: class of a transform of uint8 (3, H, W) tensors whose first argument is the output size; null for the
            evaluation transform.
        features: folder of `dualenc embed --features`, whose rows replace images in `fit`, for a locked image tower;
            absent, images are decoded.
        mask: share of the tokens to mask in training, for `model.mlm_weight`; the command line takes it from the task.
        workers: number of worker processes of each rank, at most the cores that the process may use.
        timeout: seconds to wait for the next batch of the workers; after that the run ends and names the samples that
            the workers are processing.
        bad_samples: share of the samples that may be bad, at least 10 samples; they are replaced and listed in
            `bad_samples.jsonl`. More bad samples end the run.
        cache_gb: gigabytes of local disk for shards from remote storage.
        seed: seed of order, augmentation and choice of captions; the command line sets it to `seed_everything`.
    """

    def __init__(
        self,
        train: str | list[str] | list[Source],
        preprocess: Preprocess,
        text: TextConfig,
        val: float | str | list[str] | None = 0.01,
        captions: str = AUTO,
        image: str | None = None,
        select: str | list[str] | None = None,
        tokenizer: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        window: int = 64,
        augment: Callable[[int], nn.Module] | None = Augment,
        features: str | None = None,
        mask: float = 0.0,
        workers: int = 2,
        timeout: float = 300.0,
        bad_samples: float = 0.001,
        cache_gb: float = 100.0,
        seed: int = 0,
    ) -> None:
        super().__init__(text, tokenizer)
        if batch_size < 2:
            raise DataError(
                f"data.batch_size {batch_size} must be at least 2: a contrastive loss compares pairs, and the loss of "
                "one pair teaches nothing"
            )
        if not 0 <= bad_samples <= 1 or cache_gb <= 0:
            raise DataError(
                f"data.bad_samples {bad_samples} must lie between 0 and 1, data.cache_gb {cache_gb} above 0"
            )
        several = isinstance(train, list) and any(isinstance(item, dict) for item in train)
        items: list[Any] = train if isinstance(train, list) and several else [train]
        self.sources: list[Source] = [
            Source(**item) if isinstance(item, dict) else Source(shards=item) for item in items
        ]
        self.val_shards, self.bad_samples, self.cache = val, bad_samples, Cache(int(cache_gb * 1e9))
        self.preprocess, self.captions, self.image = preprocess, captions, image
        self.select = select
        self.batch_size, self.window, self.workers, self.seed = batch_size, window, workers, seed
        self.micro_batch_size, self.timeout, self.mask = micro_batch_size, timeout, mask
        self.augment = augment(preprocess.size) if augment else preprocess
        self.features_path = features
        self.features: Features | None = None
        self.train_index: ShardIndex | None = None
        self.val_index: ShardIndex | None = None

    def prepare_data(self) -> None:
        """Index the shards and train the tokenizer, in one process of each machine.

        No tokenizer is trained if the folder holds a run, which has one.
        """
        self._build_indexes()
        self._train_tokenizer("captions")

    def training_texts(self, bad: list[str]) -> Iterable[str]:
        """Return captions of the training pairs; see `TokenData.training_texts`."""
        assert self.train_index is not None
        return all_captions(spread_samples(self.train_index, MAX_TEXTS, self.seed), self.captions, bad)

    def setup(self, stage: str) -> None:
        """Index the shards, split off the held-out pairs, and read the tokenizer.

        Raises:
            DataError: If shards, captions or tokenizer are missing or do not fit.
        """
        self._build_indexes()
        assert self.train_index is not None
        fingerprints = [self.train_index.fingerprint, self.val_index.fingerprint if self.val_index else ""]
        self._check_ranks(fingerprints, "shards")
        self.tokenizer = self._read_tokenizer()
        held_out = len(self.val_index) if self.val_index else 0
        if not held_out and stage == "fit":
            self.trainer.limit_val_batches = 0  # skips validation, which would have no data
        elif not held_out:
            raise DataError(f"data.val is null: there is nothing to {stage_name(stage)}")
        rank_zero_print(
            f"{len(self.train_index):,} pairs to train on, {held_out:,} held out; "
            f"shards: {len(self.train_index.shards):,}"
        )

    def _build_indexes(self) -> None:
        if self.train_index is not None:
            return
        held_out = isinstance(self.val_shards, float | int)
        choice = None if self.select is None else read_selection(self.select)
        self.selection = choice if isinstance(choice, Selection) else None
        shards = [source["shards"] for source in self.sources]
        train, sizes = self._index(shards, choice, ("piece",) if held_out else ())
        self._weights = list(zip(sizes, (source.get("weight", 1.0) for source in self.sources)))
        if held_out:
            assert isinstance(self.val_shards, float | int)
            if not 0 < self.val_shards < 1:
                raise DataError(f"data.val {self.val_shards} must lie between 0 and 1, or be shards, or null")
            train, self.val_index = train.split(self.val_shards)
        elif self.val_shards is not None:
            # A list names training samples; an expression says which pairs are wanted, of the held-out ones too.
            self.val_index, _ = self._index([self.val_shards], None if self.selection else choice)
        # Validation outside of `fit` decodes images: its checkpoint may have another image tower than the features.
        if self.features_path is not None and self.trainer.state.fn == "fit":
            self.features = Features(self.features_path, self.image)
            self.features.check([*train.parts, *(self.val_index.parts if self.val_index else [])])
        self.train_index = train
        total = len(train) + (len(self.val_index) if self.val_index else 0)
        root = Path(self.trainer.default_root_dir)
        path = root / "bad_samples.jsonl" if self.trainer.state.fn == "fit" else None
        self.bad_sample_log = BadSampleLog(total, path, self.bad_samples)

    def _index(
        self, shards: list[Any], choice: str | Selection | None, hashes: tuple[str, ...] = ()
    ) -> tuple[ShardIndex, list[int]]:
        """Return one index of the chosen pairs in several lists of shards, and the number of shards in each list."""
        options: dict[str, Any] = {"hashes": hashes, "workers": self.workers, "cache": self.cache}
        parts = [ShardIndex.build(urls, image=self.image, **options) for urls in shards]
        index = ShardIndex.join(parts)
        if repeated := distinct([part.url for part in index.parts])[1]:
            raise DataError(f"{repeated[0]} is in two sources: name it in one, with the sum of their weights")
        if not len(index):
            raise DataError(f"{index.shards[0]}: no samples in {len(index.shards)} shards")
        index, left_out = only_pairs(index, self.captions)
        if left_out:
            rank_zero_print(
                f"{len(left_out):,} samples have no image or no caption and are left out, such as "
                f"{', '.join(map(repr, left_out[:3]))}"
            )
        index = index.select(choice) if choice is not None else index
        return index, [len(part.parts) for part in parts]

    def train_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the training batches."""
        return self._loader(self.train_index, train=True)

    def val_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the held-out pairs."""
        return self._loader(self.val_index, train=False)

    def test_dataloader(self) -> Loader:
        """Return the loader of the held-out pairs."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device while it computes. The names of the samples stay on the host."""
        return copy_beside(partial(self._copied, batch, device), device)

    def _copied(self, batch: Any, device: torch.device) -> Any:
        if isinstance(batch, list):
            return [self._copied(micro_batch, device) for micro_batch in batch]
        images, tokens, ids = (x.to(device, non_blocking=True) for x in (batch.images, batch.tokens, batch.ids))
        masked = batch.masked and batch.masked.to(device, non_blocking=True)
        return batch._replace(images=images, tokens=tokens, ids=ids, masked=masked)

    def _loader(self, index: ShardIndex | None, train: bool) -> Loader:
        assert index is not None
        assert self.tokenizer is not None
        micro, size, world = self.micro_batch_size, self.batch_size, self.trainer.world_size
        if not train and micro:  # embeddings of held-out pairs do not depend on the batch
            micro, size = None, min(size, micro * world)
        transform = self.augment if train else self.preprocess
        return self._make_loader(
            PairDataset(
                index,
                self.captions,
                self.tokenizer,
                transform,
                self.seed if train else None,
                self.features,
                Masking(self.tokenizer, self.mask) if train and self.mask else None,
            ),
            size,
            train,
            micro_batch_size=micro,
            window=self.window,
            sources=self._weights if train else None,
        )
