"""The log of a run in CSV: written line by line, and cut back when a run resumes."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dualenc.utils.files import LineLog, write_bytes

HEADER = "step,metric,value"


class MetricsFile(Logger):
    """Logger that appends `step,metric,value` lines to `metrics.csv`.

    With one number a line, new metrics need no new header.

    Attributes:
        log: the file, which loses no line without a message.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.log = LineLog(Path(folder) / "metrics.csv", HEADER)

    @property
    def name(self) -> str:
        """The empty string: the file lies in the run directory itself, not in a folder of the logger."""
        return ""

    @property
    def version(self) -> str:
        """The empty string, see `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.log.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The path of the file."""
        return self.log.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the metrics of a step."""
        lines = io.StringIO()
        rows = ((step, name, repr(float(x))) for name, x in metrics.items() if name != "epoch")
        csv.writer(lines, lineterminator="\n").writerows(rows)
        self.log.append(lines.getvalue().splitlines())

    def finalize(self, status: str) -> None:
        """Write the lines that are left. Only the first rank has any."""
        self.log.close()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignore the hyperparameters: the configuration is in `config.yaml`."""


def truncate_log(path: Path, step: int) -> None:
    """Remove lines of `metrics.csv` or `skipped_steps.jsonl` that are of later steps, unreadable or incomplete.

    Args:
        path: log file; a missing one is left alone.
        step: last step whose lines stay.

    Raises:
        OSError: If the file cannot be written.
    """

    def step_of(line: bytes) -> int:
        try:
            return json.loads(line)["step"] if path.suffix == ".jsonl" else int(line.split(b",")[0])
        except (ValueError, KeyError, TypeError):
            return step + 1

    if path.exists():
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        header = [line for line in lines[:1] if path.suffix == ".csv" and line == f"{HEADER}\n".encode()]
        kept = b"".join([*header, *(x for x in lines if x.endswith(b"\n") and step_of(x) <= step)])
        if whole.startswith(kept):
            os.truncate(path, len(kept))  # a full disk has room for this
        else:
            write_bytes(path, kept)
