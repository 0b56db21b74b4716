"""Checkpoints that can be trusted: whole or not there, with a checksum in the file, read as data and never as code.

A checkpoint is a file of `torch.save`, a ZIP archive, whose comment says the format and the BLAKE2b-128 of all that
stands before it and of the format: `torch.load` reads it as any other, and a copy takes its checksum along.
"""

import errno
import hashlib
import math
import re
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from dualenc.formats import format_1
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write

FORMAT = 2
NORMS = 100  # gradient norms that are kept
_COMMENT = "dualenc checkpoint {} blake2b {}\n"
_WRITTEN = re.compile(_COMMENT.format(r"(\d{1,4})", "([0-9a-f]{32})").encode() + rb"\Z")
_NAME = "step-{:08d}.ckpt"


class CheckpointError(DataError):
    """A checkpoint that cannot be had, or must not be."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written."""


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / _NAME.format(step)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, by step, newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a folder that is what was written; None where there is none.

    Args:
        folder: where they are.
        tell: hears of those that are passed over.

    Raises:
        CheckpointError: a newer version of this package wrote one, or one cannot be read: going on from an older one
            would be a mistake.
    """
    for path in checkpoints(folder):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            tell(f"{error}; passed over")
            continue
        return path
    return None


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint: there is the old file of this name, or none, until the new one is whole and on the disk.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(".checkpoint.part")  # one process writes; what a killed one left is overwritten
    with atomic_write(path, beside), open(beside, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]
        except RuntimeError as error:  # of an archive that is shorter than it should be
            raise hashed.error or error from None
        hashed.digest.update(b"%d" % FORMAT)
        comment = _COMMENT.format(FORMAT, hashed.digest.hexdigest()).encode()
        file.write(struct.pack("<H", len(comment)) + comment)  # in place of the length of none


class _Hashed:
    """Writes on, and hashes, all but the last two bytes: an archive ends with the length of its comment."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.held = file, hashlib.blake2b(digest_size=16), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            self.held, view = b"", memoryview(self.held + bytes(view))
        for piece in (self.held, view[:-2]):
            try:
                self.file.write(piece)
            except OSError as error:
                self.error = error
                raise
            self.digest.update(piece)
        self.held = bytes(view[-2:])
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back but what is not written."""


def verify(path: Path) -> int:
    """Compare a checkpoint with its checksum, and return its format; an unchanged file is not read twice.

    Raises:
        DamagedCheckpoint: it is cut short, changed, or no checkpoint of this package.
        CheckpointError: there is none, it cannot be read, or a newer version of this package wrote it.
    """
    try:
        status = path.stat()
        return _verify(path, status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError as error:
        kind = DamagedCheckpoint if error.errno == errno.EIO else CheckpointError  # a bad sector
        raise kind(f"{path} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=16)
def _verify(path: Path, inode: int, time: int, size: int) -> int:
    with open(path, "rb") as file:
        file.seek(max(0, size - 200))
        found = _WRITTEN.search(file.read())
        if not found:
            raise DamagedCheckpoint(f"{path} is cut short, or no checkpoint of dualenc")
        file.seek(0)
        digest, left = hashlib.blake2b(digest_size=16), size - len(found[0]) - 2
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            digest.update(piece)
            left -= len(piece)
        length = file.read(2)
    digest.update(found[1])
    if left or length != struct.pack("<H", len(found[0])) or digest.hexdigest().encode() != found[2]:
        raise DamagedCheckpoint(f"{path} is damaged: its content does not match its checksum")
    written = int(found[1])
    if written > FORMAT:
        raise CheckpointError(f"{path} has format {written}, newer than {FORMAT}, which this dualenc knows: upgrade it")
    return written


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        CheckpointError: see `verify`; or it holds more than data.
    """
    written = verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over
        raise CheckpointError(f"{path} holds what is no data, and is not read: {type(error).__name__}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is no checkpoint of a run")
    return format_1.checkpoint(content) if written == 1 else content


class VerifiedIO(CheckpointIO):
    """Lightning's way to `write` and `read`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `write`."""
        write(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `read`; it is data whatever is asked."""
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the file."""
        Path(path).unlink(missing_ok=True)


@dataclass
class RunState:
    """Everything of a run that a checkpoint holds besides what Lightning keeps (weights, optimizer, schedule, loops).

    Attributes:
        loss: sum since the last log, on the device; the skipped steps count nothing.
        steps, skipped, spikes: steps since the last log; of these the skipped ones, and those with a gradient spike.
        counts: samples, real tokens, tokens if padded and bad samples since the last log, of this rank.
        seconds: of training since the last log.
        in_a_row: steps that were skipped one after the other.
        norms: the last gradient norms.
        best_value: largest value of the monitored metric.
        samples: seen since the beginning, of all ranks.
        metrics: the last value of each metric, for callbacks.
    """

    loss: Tensor | float = 0.0
    steps: int = 0
    skipped: int = 0
    spikes: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * 4)
    seconds: float = 0.0
    in_a_row: int = 0
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    best_value: float = -math.inf
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def logged(self) -> None:
        """Begin anew after a log."""
        self.loss, self.counts = 0.0, [0] * 4
        self.steps = self.skipped = self.spikes = 0

    def write(self, checkpoint: dict[str, Any], counts: list[int]) -> None:
        """Put what the task knows into a checkpoint.

        Args:
            checkpoint: the content.
            counts: of all ranks together.
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

    def read(self, checkpoint: dict[str, Any], first: bool) -> None:
        """Take up what `write` put there; `first` is true on the first rank, which has the counts of all."""
        running = checkpoint["running"]
        for name in ("loss", "steps", "skipped", "spikes", "in_a_row", "seconds"):
            setattr(self, name, running[name])
        self.norms = deque(running["norms"], maxlen=NORMS)
        self.counts = list(running["counts"]) if first else [0] * 4
