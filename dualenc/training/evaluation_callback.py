"""Evaluation sets during training."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dualenc.data.eval_sets.base import NO_OPTIONS, SetOptions
from dualenc.data.eval_sets.beir import DocumentSet, is_document_folder, open_documents
from dualenc.evaluation import DocumentRetrieval, SetEmbedder, SetEmbeddings, find_kind, open_sets
from dualenc.evaluation.kinds import OpenSet
from dualenc.inference.text_tower import TextTower
from dualenc.metrics.documents import METRICS
from dualenc.report import Section
from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.ema import averaged
from dualenc.training.progress import primary_metrics
from dualenc.training.ranks import all_gather_object, raise_together
from dualenc.training.sharding import whole_weights
from dualenc.training.task import Task, rank_zero_print
from dualenc.utils.errors import DataError
from dualenc.utils.text import did_you_mean

DEFAULT_MONITOR = "val/mrr"


class Measurement(Callback):
    """Base of the measurement of evaluation sets and documents on a schedule.

    Args:
        every_n_epochs: see `Evaluation`.
        every_n_steps: see `Evaluation`.
        workers: see `Evaluation`.
        at_start: see `Evaluation`.
    """

    def __init__(
        self, every_n_epochs: int = 1, every_n_steps: int = 0, workers: int = 0, at_start: bool = False
    ) -> None:
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.workers, self.at_start = workers, at_start
        self.sets: list[OpenSet] = []
        self.documents: dict[str, DocumentSet] = {}  # by the beginning of the names of their metrics
        self.sections: list[Section] = []  # sections of the last measurement, on the first rank
        self._measured = False  # if this process has measured
        self._reported: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, if `at_start` is set."""
        if self.at_start and trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the number of steps is due."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if the number of epochs is due and this step has not been measured."""
        done = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and not done:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if validation runs outside of training."""
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module)

    def metric_names(self, pl_module: Task, monitor: str) -> list[str]:
        """Return the names of the metrics, for the set that the monitored metric belongs to, or else for all sets."""
        by_epochs = bool(self.every_n_epochs) and _comes(self.every_n_epochs, pl_module.trainer)
        if not (by_epochs or self.every_n_steps or self.at_start):
            return []
        names = [f"{name}/{metric}" for name in self.documents for metric in METRICS]
        if self.sets:
            own = [one for one in self.sets if monitor.startswith(f"{one.data.name}/")]
            embedder = pl_module.embedder()
            names += [f"{data.name}/{x}" for kind, data in own or self.sets for x in kind.metric_names(data, embedder)]
        return names

    def complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure for the report, if the run measured before it was stopped and not since."""
        assert isinstance(pl_module, Task)
        measured = {name.rpartition("/")[0] for name in trainer.callback_metrics}
        if not self._measured and measured & self._names():
            with averaged(trainer), whole_weights(pl_module):
                self._metrics(trainer, pl_module)

    def _names(self) -> set[str]:
        return {data.name for _, data in self.sets} | set(self.documents)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)  # `setup` has checked it.
        pl_module.pause_clock()
        with averaged(trainer), whole_weights(pl_module):
            metrics = self._metrics(trainer, pl_module)
        pl_module.publish(trainer.strategy.broadcast(metrics), printed=primary_metrics(self.sections))
        pl_module.start_clock()

    def _metrics(self, trainer: Trainer, pl_module: Task) -> dict[str, float]:
        embedder = pl_module.embedder()
        rank, world = trainer.global_rank, trainer.world_size
        share = SetEmbedder(embedder, self.workers, rank=rank, world=world)
        sections, error = {}, ""
        for kind, data in self.sets:
            embedded: SetEmbeddings | None = None
            try:
                embedded = kind.embed(data, share)
            except (ValueError, OSError) as raised:
                error = str(raised) if isinstance(raised, DataError) else f"{data.name}: {raised}"
            raise_together(error, world)  # Otherwise the other ranks would wait for the embeddings of this one.
            assert embedded is not None
            whole = SetEmbeddings.join(all_gather_object(embedded, world))
            if trainer.is_global_zero:
                try:
                    sections[data.name] = kind.evaluated(data, whole, embedder).section
                except (ValueError, OSError) as raised:
                    error = f"{data.name}: {raised}"
            raise_together(error, world)
        if self.documents and trainer.is_global_zero:
            try:
                for name, data in self.documents.items():
                    sections[name] = DocumentRetrieval().evaluate(TextTower(embedder), data).section
            except (ValueError, OSError) as raised:
                error = str(raised)
        raise_together(error, world)
        self.sections, self._measured = list(sections.values()), True
        for result in (section.result for section in self.sections):
            for problem in result["problems"]:
                line = f"{result['dataset']} is not complete: {problem['what']}: {problem['count']}, such as "
                if line not in self._reported:  # One report per run suffices.
                    self._reported.add(line)
                    rank_zero_print(line + problem["names"][0])
        return {
            f"{start}/{name}": value
            for start, section in sections.items()
            for name, value in section.result["metrics"].items()
        }


class Evaluation(Measurement):
    """Measurement of evaluation sets during training.

    Args:
        data: evaluation sets: folders, plain shards, tables, URLs, or names of `dualenc sets`; or folders of documents
            (see `dualenc retrieval`), which a text model measures, too.
        every_n_epochs: measure at the end of every N-th epoch; 0 for never.
        every_n_steps: measure after every N-th step, too; 0 for never.
        workers: number of worker processes per rank that decode images.
        at_start: measure before the first step, too: the metrics of a pretrained model.
        kind: evaluation kind of all sets: a key of `dualenc.evaluation.KINDS`, or the import path of a subclass of
            `dualenc.evaluation.EvaluationKind`; None for the kind of each set.
        options: class names, templates, captions and images, where the sets do not say them.

    The metrics equal those of `dualenc evaluate`, logged as `SET/METRIC`. Each rank embeds its share of the images and
    texts of a set; the first rank embeds documents. Missing or unreadable parts of a set are reported once. `dualenc
    validate` and `test` measure the sets besides the held-out pairs.
    """

    def __init__(
        self,
        data: Sequence[str],
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        workers: int = 0,
        at_start: bool = False,
        kind: str | None = None,
        options: SetOptions = NO_OPTIONS,
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps, workers, at_start)
        self.folders, self.kind, self.options = list(data), kind, options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the sets, so that a wrong one stops the run before it begins."""
        folders = [path for path in self.folders if is_document_folder(path)]
        self.documents = {one.name: one for one in map(open_documents, folders)}
        if len(self.documents) < len(folders):
            raise DataError(f"two folders of documents have one name, among {', '.join(folders)}: rename one")
        images = [path for path in self.folders if not is_document_folder(path)]
        if images and not isinstance(pl_module, ContrastiveTask):
            raise DataError(
                f"Evaluation of {images[0]} needs a model of images and texts: remove it from trainer.callbacks, since "
                f"the model is a {type(pl_module).__name__}"
            )
        if self.documents and (not isinstance(pl_module, Task) or not pl_module.embeds_texts):
            raise DataError(
                f"Evaluation of documents needs a model with an embedding head, or of images and texts: the model is a "
                f"{type(pl_module).__name__} without one"
            )
        kinds = None if self.kind is None else [find_kind(self.kind)]
        self.sets = open_sets(images, kinds, options=self.options)
        if taken := {"train", "val", "test"} & self._names():
            raise DataError(
                f"evaluation set {taken.pop()!r} has the name of a group of the run's metrics: rename its folder"
            )


class HeldOutDocuments(Measurement):
    """Measurement of the folders of documents that `data.val` names for heads, logged as `val/HEAD/METRIC`.

    Args:
        folders: folder by head.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        super().__init__()
        self.folders = folders

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the folders, so that a wrong one stops the run before it begins."""
        self.documents = {f"val/{head}": open_documents(folder) for head, folder in self.folders.items()}


def check_monitor(monitor: str | None, trainer: Trainer, task: Task) -> None:
    """Refuse a monitored metric that the run never measures.

    Nothing is refused if a task, head or callback of the user's own may measure more, if the default metric has no
    held-out data, or of the metrics of training.

    Raises:
        ValueError: If the metric is never measured; the message names the metrics that are.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    measures = trainer.limit_val_batches and _comes(trainer.check_val_every_n_epoch, trainer)
    own = task.metric_names() if measures else []
    parts = [task, *getattr(task, "kinds", {}).values(), *callbacks]
    known = all(type(one).__module__.split(".")[0] in ("dualenc", "lightning") for one in parts)
    if monitor is None or own is None or not known or monitor in own or monitor.startswith("train/"):
        return
    names = list(own)
    for callback in callbacks:
        if isinstance(callback, Measurement):
            names += callback.metric_names(task, monitor)
    if monitor in names or (monitor == DEFAULT_MONITOR and not names):
        return
    measured = f"this run measures {', '.join(names)}: name one of them that is best when largest" if names else (
        "this run measures nothing: set data.val, or add dualenc.training.Evaluation to trainer.callbacks"
    )  # fmt: skip
    hint = did_you_mean(monitor, names, "")
    raise ValueError(f"run.monitor {monitor} is never measured{hint and f': {hint}'}; {measured}")


def _comes(every_n_epochs: int | None, trainer: Trainer) -> bool:
    """Return whether a run has at least a number of epochs, as far as its settings tell."""
    epochs = trainer.max_epochs
    return every_n_epochs is None or epochs is None or epochs < 1 or every_n_epochs <= epochs
