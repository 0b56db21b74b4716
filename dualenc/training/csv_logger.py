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

from dualenc.training.task import rank_zero_print
from dualenc.utils.files import append_lines, write_text

HEADER = "step,metric,value"


class MetricsFile(Logger):
    """Logger that appends `step,metric,value` lines to `metrics.csv`.

    With one number a line, new metrics need no new header. Lines that cannot be written (full disk) are kept in memory
    and written with the next ones.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._unwritten: list[str] = []

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
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The path of the file."""
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the metrics of a step."""
        lines = io.StringIO()
        rows = ((step, name, repr(float(x))) for name, x in metrics.items() if name != "epoch")
        csv.writer(lines, lineterminator="\n").writerows(rows)
        already_warned = bool(self._unwritten)
        self._unwritten += lines.getvalue().splitlines()
        try:
            has_header = self.path.exists() and self.path.stat().st_size
            append_lines(self.path, [*([] if has_header else [HEADER]), *self._unwritten])
            self._unwritten = []
        except OSError as error:
            if not already_warned:
                rank_zero_print(f"{self.path} cannot be written, its lines are kept in memory: {error.strerror}")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignore the hyperparameters: the configuration is in `config.yaml`."""


def truncate_log(path: Path, step: int) -> None:
    """Remove lines of `metrics.csv` or `skipped_steps.jsonl` that are of later steps, unreadable or incomplete.

    Args:
        path: log file; a missing one is left alone.
        step: last step whose lines stay.
    """

    def step_of(line: str) -> int:
        try:
            return json.loads(line)["step"] if path.suffix == ".jsonl" else int(line.split(",")[0])
        except (ValueError, KeyError, TypeError):
            return step + 1

    if path.exists():
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        header = [line for line in lines[:1] if path.suffix == ".csv" and line == f"{HEADER}\n"]
        write_text(path, "".join([*header, *(x for x in lines if x.endswith("\n") and step_of(x) <= step)]))
