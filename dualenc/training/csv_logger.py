"""What a run writes line by line."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dualenc.training.task import say
from dualenc.utils.files import append_lines, write_text

HEAD = "step,metric,value"


class MetricsFile(Logger):
    """Appends `step,metric,value` lines to `metrics.csv`: one number a line, so that new metrics need no new header.

    What cannot be written (a full disk) is kept, and written with what comes next.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._unwritten: list[str] = []

    @property
    def name(self) -> str:
        """No folder of its own: the run directory is the logger's."""
        return ""

    @property
    def version(self) -> str:
        """See `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the numbers of a step."""
        lines = io.StringIO()
        rows = ((step, name, repr(float(x))) for name, x in metrics.items() if name != "epoch")
        csv.writer(lines, lineterminator="\n").writerows(rows)
        told = bool(self._unwritten)
        self._unwritten += lines.getvalue().splitlines()
        try:
            begun = self.path.exists() and self.path.stat().st_size
            append_lines(self.path, [*([] if begun else [HEAD]), *self._unwritten])
            self._unwritten = []
        except OSError as error:
            if not told:
                say(f"{self.path} cannot be written, its lines are kept: {error.strerror}")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in `config.yaml`."""


def cut_back(path: Path, step: int) -> None:
    """Remove the lines of `metrics.csv` or `skipped_steps.jsonl` after a step, and a line that a kill cut off."""

    def of(line: str) -> int:
        try:
            return json.loads(line)["step"] if path.suffix == ".jsonl" else int(line.split(",")[0])
        except (ValueError, KeyError, TypeError):
            return step + 1

    if path.exists():
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        head = [line for line in lines[:1] if path.suffix == ".csv" and line == f"{HEAD}\n"]
        write_text(path, "".join([*head, *(line for line in lines if line.endswith("\n") and of(line) <= step)]))
