"""The Lightning data module of texts, which trains and measures the heads of a text encoder on files of lines."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from dualenc.data import BadSampleLog, Loader
from dualenc.data.eval_sets.beir import is_document_folder
from dualenc.data.loading.loader import Mix
from dualenc.data.text.dataset import TextDataset, Texts, Use, all_labels, all_texts, texts_of
from dualenc.data.text.files import TextIndex
from dualenc.data.text.masking import Masking
from dualenc.models import TextConfig
from dualenc.models.heads import HeadConfig, make_head
from dualenc.training.pair_data import Source, TokenData, stage_name
from dualenc.training.task import rank_zero_print
from dualenc.training.transfer import copy_beside
from dualenc.utils.errors import DataError
from dualenc.utils.text import did_you_mean

Split = Literal["train", "val", "test", "predict"]


class TextSource(TypedDict):
    """Files of texts for one head.

    Attributes:
        files: a path, glob, brace pattern, or a list of these: `.txt`, `.tsv`, `.csv`, `.jsonl`. For named entities
            `.conll` with a word and its tag on each line and a blank line after each sentence, or `.jsonl` with
            `tokens` and `tags`, or with `text` and `entities`, a list of [start, end, label] by characters. For
            questions `.json` as SQuAD, or `.jsonl` with its fields.
        text: column of the text; default "text", which is the column of plain text.
        pair: column of the second text of a pair.
        label: column of the label; default "label" where the head needs one. For "multi_label" a list in a `.jsonl`,
            or labels joined by `|`.
        weight: number of times that an epoch reads the files, which may be a fraction; default 1.
        negatives: column of further texts that are negatives of all first texts of a batch, for an embedding head
            whose pairs belong together: a list of texts in a `.jsonl`, or one text. Only training reads it.
    """

    files: str | list[str]
    text: NotRequired[str]
    pair: NotRequired[str | None]
    label: NotRequired[str]
    weight: NotRequired[float]
    negatives: NotRequired[str | None]


class TextData(TokenData):
    """Texts for the heads of a text encoder, from files of lines.

    Args:
        train: files by head.
        text: architecture of the encoder; the command line takes it from the task.
        heads: configurations of the heads; the command line takes them from the task.
        val: files by head, with the columns of `train` unless they name others; or the share of the training lines that
            is held out, chosen by a hash of their content; or null for none. The files of an embedding head may be a
            folder of documents, as for `dualenc retrieval`, which is measured after each epoch.
        test: files by head for `test`; null for those of `val`.
        predict: files by head for `predict`; their labels are not read.
        tokenizer: `tokenizer.json`, `vocab.txt` or a folder with one; null for the tokenizer of the task's text
            checkpoint, or else one of `text.vocab_size` entries is trained on the training texts and kept in the run
            directory.
        batch_size: number of samples, over all ranks together.
        mix: for several heads, "together" for batches with lines of all of them, in proportion to their weights, or
            "round_robin" for batches of one head each.
        mask: share of the tokens to mask for a head that guesses them.
        whole_words: mask all tokens of a word, or none.
        workers: number of processes a rank that read and tokenize.
        timeout: seconds that the next batch may take with workers; then the run ends and names what the workers do.
        bad_samples: share of the lines that may be bad, 10 at least; they are replaced and named in
            `bad_samples.jsonl`. More end the run.
        seed: seed of order and masked tokens; the command line passes `seed_everything`.
    """

    def __init__(
        self,
        train: dict[str, TextSource],
        text: TextConfig,
        heads: dict[str, HeadConfig],
        val: dict[str, TextSource] | float | None = None,
        test: dict[str, TextSource] | None = None,
        predict: dict[str, TextSource] | None = None,
        tokenizer: str | None = None,
        batch_size: int = 32,
        mix: Mix = "together",
        mask: float = 0.15,
        whole_words: bool = False,
        workers: int = 2,
        timeout: float = 300.0,
        bad_samples: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__(text, tokenizer)
        if not 0 <= bad_samples <= 1:
            raise DataError(f"data.bad_samples {bad_samples} must lie between 0 and 1")
        if isinstance(val, float | int) and not 0 < val < 1:
            raise DataError(f"data.val {val} must lie between 0 and 1, or be files, or null")
        if mix not in ("together", "round_robin"):
            raise DataError(f"data.mix {mix!r} must be together or round_robin")
        if not train:
            raise DataError("data.train is empty: name files for a head")
        self.heads = {name: make_head(head) for name, head in heads.items()}
        if len(masking := [name for name, head in self.heads.items() if head.masking is not None]) > 1:
            raise DataError(f"heads {' and '.join(masking)} read masked tokens: keep one of them")
        if batch_size < 2 and (comparing := [name for name, head in self.heads.items() if head.compares_ranks]):
            raise DataError(
                f"data.batch_size {batch_size} must be at least 2: model.heads.{comparing[0]} compares the pairs of a "
                "batch, and one pair teaches it nothing"
            )
        self.batch_size, self.seed = batch_size, seed
        self.mix: Mix = mix
        self.mask, self.whole_words = mask, whole_words
        self.workers, self.timeout, self.bad_samples = workers, timeout, bad_samples
        self.share = float(val) if isinstance(val, float | int) else None
        files = val if isinstance(val, dict) else train if self.share else {}
        self.documents = {name: folder for name, one in files.items() if (folder := self._documents(name, one))}
        self.given: dict[Split, Mapping[str, TextSource]] = {
            "train": train,
            "val": {name: one for name, one in files.items() if name not in self.documents},
            "test": test or {},
            "predict": predict or {},
        }
        self.uses: dict[Split, dict[str, Use]] = {}
        for part, sources in self.given.items():
            self.uses[part] = {name: self._use(part, name, source) for name, source in sources.items()}
        self.sources = [Source(shards=source["files"], weight=source.get("weight", 1.0)) for source in train.values()]
        self._raw: dict[Split, dict[str, TextIndex]] = {}  # lines of the files, by head
        self._pieces: dict[Split, dict[str, TextIndex]] = {}  # the same, but plain text in pieces that fit the encoder
        self._joined_index: dict[Split, TextIndex] = {}  # the pieces of all heads, one head after the other
        self._labels: dict[str, list[Any]] = {}

    def _documents(self, name: str, source: TextSource) -> str:
        """Return the folder of documents that `val` names for a head; empty if it names files.

        Raises:
            DataError: If the head does not embed texts, or other keys are given.
        """
        folder = source["files"]
        if not isinstance(folder, str) or not is_document_folder(folder):
            return ""
        if name not in self.heads or self.heads[name].task != "sentence-similarity":
            raise DataError(f"data.val.{name}.files {folder} is a folder of documents, which only embedding heads rank")
        if more := [key for key in source if key != "files"]:
            raise DataError(f"data.val.{name}.{more[0]} has no use for the folder of documents {folder}: leave it out")
        return folder

    def _use(self, part: Split, name: str, source: TextSource) -> Use:
        """Return how a head uses the lines of a source.

        Raises:
            DataError: If the source does not fit the head.
        """
        where = f"data.{part}.{name}"
        if name not in self.heads:
            hint = did_you_mean(name, self.heads, f"model.heads has {', '.join(self.heads) or 'none'}")
            raise DataError(f"{where} names an unknown head: {hint}")
        head, needs = self.heads[name], self.heads[name].needs
        if head.trained_by is None:
            raise DataError(f"{where}: a head of kind {head.config.kind} cannot be trained or measured: name another")
        # Sources of other splits inherit the columns of the training source.
        columns: dict[str, Any] = {**self.given["train"].get(name, {}), **source}
        pair = columns.get("pair")
        if part in ("val", "test") and name not in self.given["train"] and head.needs_training_data:
            raise DataError(
                f"{where}: data.train has no files for this head: add them, since its metrics are compared with "
                "baselines that learn from them"
            )
        if needs.pairs == "apart" and pair is None:
            raise DataError(f"{where} has no pair: name the column of the second text, {where}.pair")
        if needs.pairs == "none" and pair is not None:
            raise DataError(f"{where}.pair {pair!r}: {head.config.kind} heads read single texts; leave it out")
        if needs.windows is not None and (given := [key for key in ("text", "pair", "label") if columns.get(key)]):
            raise DataError(
                f"{where}.{given[0]}: the columns that {head.config.kind} heads read have fixed names; leave it out"
            )
        negatives = columns.get("negatives") if part == "train" else None
        if source.get("negatives") and part != "train" and source is not self.given["train"].get(name):
            raise DataError(f"{where}.negatives: only training reads negatives; leave it out")
        if negatives and not needs.negatives:
            raise DataError(
                f"{where}.negatives {negatives!r}: only embedding heads with problem negatives read them; leave it out"
            )
        labeled = (needs.labels is not None or needs.windows is not None) and part != "predict"
        label = columns.get("label", "label") if labeled else None
        return Use(name, columns.get("text", "text"), pair, label, needs, negatives)

    # Data

    @property
    def train_index(self) -> TextIndex | None:
        """The training lines of all heads, one head after the other."""
        return self._joined("train")

    @property
    def val_index(self) -> TextIndex | None:
        """The held-out lines."""
        return self._joined("val")

    @property
    def test_index(self) -> TextIndex | None:
        """The lines for `test`."""
        return self._joined("test") if self.given["test"] else self.val_index

    @property
    def predict_index(self) -> TextIndex | None:
        """The lines for `predict`."""
        return self._joined("predict")

    def _joined(self, part: Split) -> TextIndex | None:
        """Return the index of a split over all heads; None if the split has no files."""
        found = self._pieces.get(part)
        if not found:
            return None
        if part not in self._joined_index:
            self._joined_index[part] = TextIndex.join(list(found.values()))
        return self._joined_index[part]

    def labels(self, head: str) -> Tensor:
        """Return the training labels of a head, in the shape and dtype of `dualenc.data.text.dataset.Part.labels`."""
        if head not in self._labels:
            self._read("train")
            self._labels[head] = all_labels(self._raw["train"][head], self.uses["train"][head])
        reader = self.uses["train"][head].needs.labels
        assert reader is not None
        return torch.tensor(self._labels[head], dtype=reader.dtype)

    def all_texts(self, bad: list[str]) -> Iterable[str]:
        """Return the training texts; see `TokenData.all_texts`."""
        found = self._raw["train"]
        return chain.from_iterable(all_texts(index, self.uses["train"][name], bad) for name, index in found.items())

    def prepare_data(self) -> None:
        """Index the lines and train the tokenizer, in one process of each machine."""
        if self.trainer.state.fn == "fit":
            self._read("train")
            self._train_tokenizer("texts")

    def setup(self, stage: str) -> None:
        """Index and split the lines, read the tokenizer, cut plain text into pieces, check the labels.

        Raises:
            DataError: If files, columns, labels or tokenizer are missing or do not fit.
        """
        part: Split = "test" if stage == "test" and self.given["test"] else "val" if stage != "predict" else "predict"
        if stage != "fit" and not self.given[part]:
            if self.documents and part == "val":
                raise DataError(
                    f"data.val names documents only: dualenc retrieval measures them, not {stage_name(stage)}"
                )
            raise DataError(f"data.{part} is null: there is nothing to {stage_name(stage)}")
        parts: list[Split] = ["train", "val"] if stage == "fit" else [part]
        self.tokenizer = self._read_tokenizer()
        for part in parts:
            self._read(part)
            self._check_labels(part)
            self._cut_into_pieces(part)
        indexes: dict[Split, TextIndex] = {part: index for part in parts if (index := self._joined(part)) is not None}
        self._check_ranks([index.fingerprint for index in indexes.values()], "files")
        if stage == "fit" and "val" not in indexes:
            self.trainer.limit_val_batches = 0  # Without held-out lines there is no loader for it.
        root = Path(self.trainer.default_root_dir)
        path = root / "bad_samples.jsonl" if stage == "fit" else None
        self.bad_sample_log = BadSampleLog(sum(map(len, indexes.values())), path, self.bad_samples)
        purposes: dict[Split, str] = {
            "train": "to train on",
            "val": "held out",
            "test": "to test on",
            "predict": "to predict",
        }
        counts = []
        for one, index in indexes.items():
            heads = ", ".join(f"{len(own):,} for {head}" for head, own in self._pieces[one].items())
            counts.append(f"{len(index):,} {purposes[one]} ({heads})")
        rank_zero_print(f"samples: {'; '.join(counts)}")

    def _read(self, part: Split) -> None:
        """Index the lines of a split, once."""
        if part in self._raw:
            return
        if part == "val" and self.share is not None:  # Reading the training lines sets some apart as "val".
            self._read("train")
            return
        found = {}
        for name, source in self.given[part].items():
            use = self.uses[part][name]
            try:
                found[name] = TextIndex.build(source["files"], use.columns)
            except DataError as error:
                raise DataError(f"data.{part}.{name}: {error}") from None
        if part == "train" and self.share is not None:
            divided = {name: index.split(self.share) for name, index in found.items()}
            self._raw["val"] = {name: held_out for name, (_, held_out) in divided.items()}
            found = {name: rest for name, (rest, _) in divided.items()}
        self._raw[part] = found

    def _cut_into_pieces(self, part: Split) -> None:
        """Cut plain text into pieces that fit the encoder, once."""
        assert self.tokenizer is not None
        if part not in self._pieces:
            self._pieces[part] = {
                name: index.cut(self.tokenizer) if self.heads[name].masking is not None else index
                for name, index in self._raw[part].items()
            }

    def texts(self, part: Split, head: str) -> Iterable[str]:
        """Return the texts of one head, plain text in pieces."""
        self._read(part)
        self._cut_into_pieces(part)
        return all_texts(self._pieces[part][head], self.uses[part][head])

    def texts_of_row(self, part: Split, head: str, row: int) -> list[str]:
        """Return the text, or both texts of a pair, of one sample of a head.

        Args:
            part: split.
            head: name of the head.
            row: row of the sample in the index of the split, as in `dualenc.data.text.dataset.Texts.rows`.
        """
        index = self._joined(part)
        assert index is not None  # A row comes from the index.
        return texts_of(index[row], self.uses[part][head])

    def _check_labels(self, part: Split) -> None:
        """Read all labels of a split, so that a bad label raises before training starts."""
        for name, index in self._raw[part].items():
            use = self.uses[part][name]
            if use.label is not None and use.needs.windows is not None:
                use.needs.windows.check(index, name)
            elif use.label is not None:
                labels = all_labels(index, use)
                if part == "train":
                    self._labels[name] = labels

    # Loaders

    def train_dataloader(self) -> Loader:
        """Return the loader of this rank's part of each training batch."""
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the held-out lines."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the test lines, which default to the held-out lines."""
        return self._loader("test" if self.given["test"] else "val")

    def predict_dataloader(self) -> Loader:
        """Return the loader of this rank's part of the lines to predict."""
        return self._loader("predict")

    def transfer_batch_to_device(self, batch: Texts, device: torch.device, dataloader_idx: int) -> Texts:
        """Copy a batch to a device while it computes; rows and bad samples stay on the host."""
        return copy_beside(partial(batch.to, device, non_blocking=True), device)

    def _loader(self, part: Split) -> Loader:
        train, index = part == "train", self._joined(part)
        assert index is not None  # since `setup` refuses splits without files
        assert self.tokenizer is not None
        own = self._pieces[part]
        uses = [(len(found.parts), self.uses[part][name]) for name, found in own.items()]
        weights = [(len(found.parts), self.given[part][name].get("weight", 1.0)) for name, found in own.items()]
        for (number, weight), head in zip(weights, own) if train and self.mix == "round_robin" else ():
            lines = round(weight * sum(own[head].counts()))
            if number and lines < self.batch_size:
                raise DataError(
                    f"data.train.{head} gives {lines:,} lines an epoch, fewer than data.batch_size {self.batch_size}: "
                    "lower data.batch_size, raise the weight, or set data.mix to together"
                )
        # At most one head reads masked tokens, see `__init__`.
        shares = [use.needs.masking for _, use in uses if use.needs.masking is not None and part != "predict"]
        masking = Masking(self.tokenizer, self.mask, *shares[0]) if shares else None
        return self._make_loader(
            TextDataset(index, uses, self.tokenizer, self.seed if train else None, masking, self.whole_words),
            self.batch_size,
            train,
            sources=weights if train else None,
            mix=self.mix if train else "together",
        )
