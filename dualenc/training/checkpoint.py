"""Checkpoints of a run: written whole or not at all, verified by a checksum, and read as data, never as code.

A checkpoint is a file of `torch.save`, a ZIP archive. The archive's comment holds the format and a BLAKE2b-128 checksum
of all bytes before the comment and of the format: `torch.load` reads the file like any other, and a copy keeps its
checksum.
"""

import errno
import hashlib
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from dualenc.formats import format_1
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write

FORMAT = 2
NORMS = 100  # gradient norms that are kept
_COMMENT = "dualenc checkpoint {} blake2b {}\n"
_WRITTEN = re.compile(_COMMENT.format(r"(\d{1,4})", "([0-9a-f]{32})").encode() + rb"\Z")
_NAME = "step-{:08d}.ckpt"


class CheckpointError(DataError):
    """A checkpoint that cannot be read or must not be used."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content is not what was written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / _NAME.format(step)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint from its file name."""
    return int(path.stem.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, damaged ones included, newest step first."""
    found = [path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint of a folder, or None if there is none.

    Args:
        folder: folder of the checkpoints.
        warn: function that takes a message about each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: If a newer version of this package wrote a checkpoint, or one cannot be read. Resuming from an
            older one would lose work.
    """
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint as error:
            warn(f"{error}; skipped")
            continue
        return path
    return None


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. An older file of this name stays until the new one is whole and on the disk.

    Raises:
        OSError: If the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only one process writes here, so a file that a killed process left is simply overwritten.
    temporary = path.with_name(".checkpoint.part")
    with atomic_write(path, temporary), open(temporary, "wb") as file:
        hashed = _HashingWriter(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's own, about an archive that is shorter than it should be
            raise hashed.error or error from None
        hashed.digest.update(b"%d" % FORMAT)
        comment = _COMMENT.format(FORMAT, hashed.digest.hexdigest()).encode()
        file.write(struct.pack("<H", len(comment)) + comment)  # replaces the two bytes that say "no comment"


class _HashingWriter:
    """Writer that hashes what it writes, and holds back the last two bytes: a ZIP archive's length of its comment."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.held_back = file, hashlib.blake2b(digest_size=16), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            self.held_back, view = b"", memoryview(self.held_back + bytes(view))
        for part in (self.held_back, view[:-2]):
            try:
                self.file.write(part)
            except OSError as error:
                self.error = error
                raise
            self.digest.update(part)
        self.held_back = bytes(view[-2:])
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Ignore the call: the only bytes held back must not be written."""


def verify_checkpoint(path: Path) -> int:
    """Compare a checkpoint with its checksum, and return its format. An unchanged file is not read twice.

    Raises:
        DamagedCheckpoint: If the file is truncated, changed, or not a checkpoint of this package.
        CheckpointError: If the file is missing, cannot be read, or was written by a newer version of this package.
    """
    try:
        status = path.stat()
        return _verify(path, status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError as error:
        kind = DamagedCheckpoint if error.errno == errno.EIO else CheckpointError  # EIO: a bad sector
        raise kind(f"{path} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=16)
def _verify(path: Path, inode: int, mtime: int, size: int) -> int:
    with open(path, "rb") as file:
        file.seek(max(0, size - 200))
        found = _WRITTEN.search(file.read())
        if not found:
            raise DamagedCheckpoint(f"{path} is truncated, or is not a checkpoint of dualenc")
        file.seek(0)
        digest, left = hashlib.blake2b(digest_size=16), size - len(found[0]) - 2
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
        length = file.read(2)
    digest.update(found[1])
    if left or length != struct.pack("<H", len(found[0])) or digest.hexdigest().encode() != found[2]:
        raise DamagedCheckpoint(f"{path} is damaged: its content does not match its checksum")
    written = int(found[1])
    if written > FORMAT:
        raise CheckpointError(f"{path} has format {written}, this dualenc reads up to format {FORMAT}: upgrade dualenc")
    return written


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        CheckpointError: If `verify_checkpoint` refuses the file, or the file holds objects other than data.
    """
    written = verify_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        raise CheckpointError(f"{path} holds more than data and is not loaded: {type(error).__name__}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not the checkpoint of a run")
    return format_1.checkpoint(content) if written == 1 else content


def check_finite(weights: Mapping[str, Any]) -> None:
    """Refuse non-finite weights: a run that has lost its weights must resume from an older checkpoint.

    Raises:
        ValueError: If a weight is non-finite; names it.
    """
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} is not finite")


def misfit(content: dict[str, Any], module: nn.Module) -> str:
    """Return why the weights of a checkpoint do not fit a module, by the first tensor; empty if they do.

    Nothing is compared if the strategy has already loaded the weights and removed them, as ModelParallelStrategy does.
    """
    if "state_dict" not in content:
        return ""
    own, weights = module.state_dict(), content["state_dict"]
    for name, tensor in own.items():
        if name not in weights:
            return f"the checkpoint lacks {name}"
        if isinstance(tensor, Tensor) and tensor.shape != weights[name].shape:
            return f"{name} has the shape {list(weights[name].shape)} there and {list(tensor.shape)} here"
    return next((f"the model lacks {name}" for name in weights if name not in own), "")


class VerifiedIO(CheckpointIO):
    """Lightning plugin that reads and writes checkpoints with the functions of this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `write_checkpoint`."""
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `read_checkpoint`. Objects other than data are refused whatever `weights_only` says."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


@dataclass
class RunState:
    """State of a run that checkpoints hold in addition to Lightning's (weights, optimizer, schedule, loops).

    Attributes:
        loss: sum of the losses since the last log, on the device; skipped steps do not count.
        steps: steps since the last log.
        skipped: skipped steps since the last log.
        spikes: steps with a gradient norm spike since the last log.
        counts: samples, real tokens, tokens if padded and bad samples of this rank since the last log.
        seconds: training time since the last log.
        in_a_row: number of consecutive skipped steps up to now.
        norms: the last gradient norms.
        monitor: name of the metric that selects `best/`.
        best_value: value of the monitored metric of the model in `best/`; -inf if there is none.
        best_step: step of the model in `best/`.
        changes: settings that have changed since the start of the run: from which step on, and their values.
        samples: samples of all ranks since the start of the run.
        metrics: last value of each metric, for callbacks.
    """

    loss: Tensor | float = 0.0
    steps: int = 0
    skipped: int = 0
    spikes: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * 4)
    seconds: float = 0.0
    in_a_row: int = 0
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    monitor: str = ""
    best_value: float = -math.inf
    best_step: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any] | None:
        """Metric, value and step of the model in `best/`; None if there is none."""
        if self.best_value == -math.inf:
            return None
        return {"metric": self.monitor, "value": self.best_value, "step": self.best_step}

    def is_better(self, value: float) -> bool:
        """Return whether a value of the monitored metric is better than that of `best/`; a non-finite one never is."""
        return math.isfinite(value) and value > self.best_value

    def reset_sums(self) -> None:
        """Reset what is summed between two logs."""
        self.loss, self.counts = 0.0, [0] * 4
        self.steps = self.skipped = self.spikes = 0

    def save_to(self, checkpoint: dict[str, Any], counts: list[int]) -> None:
        """Add the state that the task owns to a checkpoint.

        Args:
            checkpoint: content of the checkpoint, changed in place.
            counts: counts summed over all ranks.
        """
        checkpoint["running"] = {
            "loss": float(self.loss),
            "steps": self.steps,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
            "norms": list(self.norms),
            "counts": counts,
            "seconds": self.seconds,
        }

    def load_from(self, checkpoint: dict[str, Any], is_rank_zero: bool) -> None:
        """Restore what `save_to` has added. Rank 0 takes the counts of all ranks, the others start from zero."""
        running = checkpoint["running"]
        for name in ("loss", "steps", "skipped", "spikes", "in_a_row", "seconds"):
            setattr(self, name, running[name])
        self.norms = deque(running["norms"], maxlen=NORMS)
        self.counts = list(running["counts"]) if is_rank_zero else [0] * 4
