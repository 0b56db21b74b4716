"""Pairs for a trainer: shards, split, tokenizer and loaders from one set of arguments."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from dualenc.data import Augment, DataError, PairDataset, PairLoader, Pairs, Preprocess, ShardIndex, Tokenizer
from dualenc.data.pairs import captions_of, only_pairs
from dualenc.models import TextConfig
from dualenc.training.contrastive import say


class PairData(LightningDataModule):
    """Image-text pairs from webdataset shards.

    Args:
        train: shards: a path, glob, brace pattern, folder, or a list of these.
        preprocess: evaluation transform; the command line takes it from the task.
        text: architecture that the tokens are for; the command line takes it from the task.
        val: share of the pairs held out, by image content; or shards of their own; or null for none.
        captions: "txt" for the `.txt` member, or "json.FIELD" for a string or list of strings in the `.json`; of
            several captions one is drawn at each step.
        select: keys or an expression over `.json` fields; see `ShardIndex.select`.
        tokenizer: `tokenizer.json`, `vocab.txt` or a folder with one; absent, one of `text.vocab_size` entries is
            trained on the training captions and kept in the run directory.
        batch_size: over all ranks together.
        window: shards shuffled together.
        augment: class of a transform of uint8 (3, H, W) tensors whose first argument is the output size.
        workers: processes a rank that decode.
        seed: of order, augmentation and choice of captions; the command line gives it `seed_everything`.
    """

    trainer: Any  # Lightning declares less than its Trainer has

    def __init__(
        self,
        train: str | list[str],
        preprocess: Preprocess,
        text: TextConfig,
        val: float | str | list[str] | None = 0.01,
        captions: str = "txt",
        select: str | list[str] | None = None,
        tokenizer: str | None = None,
        batch_size: int = 256,
        window: int = 64,
        augment: Callable[[int], nn.Module] = Augment,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_shards, self.val_shards = train, val
        self.preprocess, self.text = preprocess, text
        self.captions, self.selection, self.tokenizer_path = captions, select, tokenizer
        self.batch_size, self.window, self.workers, self.seed = batch_size, window, workers, seed
        self.augment = augment(preprocess.size)
        self.train_index: ShardIndex | None = None
        self.val_index: ShardIndex | None = None
        self.tokenizer: Tokenizer | None = None

    def prepare_data(self) -> None:
        """Trains the tokenizer, on one process of each machine, unless the folder holds a run that has one."""
        taken = self._own_tokenizer.with_name("run.json").exists()
        if self.tokenizer_path is None and self.trainer.state.fn == "fit" and not taken:
            self._build_indexes()
            assert self.train_index is not None
            say(f"training a tokenizer of {self.text.vocab_size:,} entries on the captions")
            captions = (caption for sample in self.train_index for caption in captions_of(sample, self.captions))
            tokenizer = Tokenizer.train(captions, self.text.vocab_size, self.text.context_length)
            self._own_tokenizer.parent.mkdir(parents=True, exist_ok=True)
            beside = self._own_tokenizer.with_name(f".tokenizer-{os.getpid()}.json")
            tokenizer.save(beside)
            beside.replace(self._own_tokenizer)

    def setup(self, stage: str) -> None:
        """Finds the shards, splits them, reads the tokenizer.

        Raises:
            DataError: shards, captions or tokenizer are missing or do not fit.
        """
        self._build_indexes()
        assert self.train_index is not None
        path = self.tokenizer_path or self._own_tokenizer
        self.tokenizer = Tokenizer.from_file(path, self.text.context_length)
        if self.tokenizer.vocab_size > self.text.vocab_size:
            raise DataError(
                f"tokenizer {path} has {self.tokenizer.vocab_size} entries: set model.text.vocab_size to at least "
                f"that, not {self.text.vocab_size}"
            )
        held = len(self.val_index) if self.val_index else 0
        if not held and stage == "fit":
            self.trainer.limit_val_batches = 0  # no validation at all, rather than one without data
        elif not held:
            raise DataError(f"data.val is null: there is nothing to {stage}")
        say(f"{len(self.train_index):,} pairs to train on, {held:,} held out; shards: {len(self.train_index.shards):,}")

    @property
    def _own_tokenizer(self) -> Path:
        return Path(self.trainer.default_root_dir) / "tokenizer.json"

    def _build_indexes(self) -> None:
        if self.train_index is not None:
            return
        train = self._index(self.train_shards)
        if isinstance(self.val_shards, float | int):
            if not 0 < self.val_shards < 1:
                raise DataError(f"data.val {self.val_shards} must lie between 0 and 1, or be shards, or null")
            train, self.val_index = train.split(self.val_shards)
        elif self.val_shards is not None:
            self.val_index = self._index(self.val_shards)
        self.train_index = train

    def _index(self, shards: str | list[str]) -> ShardIndex:
        index = ShardIndex.build(shards)
        if not len(index):
            raise DataError(f"{shards}: no samples in {len(index.shards)} shards")
        index, left_out = only_pairs(index, self.captions)
        if left_out:
            say(
                f"{len(left_out):,} samples have no image or no caption and are left out, such as "
                f"{', '.join(map(repr, left_out[:3]))}"
            )
        return index.select(self.selection) if self.selection is not None else index

    def train_dataloader(self) -> PairLoader:
        """This rank's part of each training batch."""
        return self._loader(self.train_index, train=True)

    def val_dataloader(self) -> PairLoader:
        """This rank's part of the held-out pairs."""
        return self._loader(self.val_index, train=False)

    def test_dataloader(self) -> PairLoader:
        """The held-out pairs."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Pairs, device: torch.device, dataloader_idx: int) -> Pairs:
        """Without waiting for the copies; what only names the samples stays on the host."""
        images = batch.images.to(device, non_blocking=True)
        return Pairs(images, batch.tokens.to(device, non_blocking=True), batch.rows)

    def _loader(self, index: ShardIndex | None, train: bool) -> PairLoader:
        assert index is not None
        assert self.tokenizer is not None
        transform = self.augment if train else self.preprocess
        return PairLoader(
            PairDataset(index, self.captions, self.tokenizer, transform, seed=self.seed if train else None),
            self.batch_size,
            seed=self.seed,
            window=self.window,
            shuffle=train,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
