"""The record of a run, `run.json`, and its report."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from dualenc.report import write_report
from dualenc.training.evaluation_callback import Measurement
from dualenc.training.task import Task
from dualenc.utils.files import write_json, write_text
from dualenc.utils.text import millions
from dualenc.utils.urls import redact


class RunRecord:
    """Record of a run: its command, versions, data, progress, starts and configuration.

    Args:
        root: the run directory.
        config_yaml: configuration of the run; None for a run without one.
        resumed: whether this process resumes the run.

    Attributes:
        last_step: step of the model in `last/`; -1 if there is none.
    """

    def __init__(self, root: Path, config_yaml: str | None, resumed: bool) -> None:
        self.path = root / "run.json"
        self._config_yaml = redact(config_yaml) if config_yaml is not None else None
        self._config = _redacted(yaml.safe_load(config_yaml)) if config_yaml is not None else None
        self._config_is_written = False
        self._start_time = time.time()
        try:
            before = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            before = {}
        self._starts: list[dict[str, Any]] = before.get("starts", [])
        self.last_step: int = before.get("last_step", -1)
        self._seconds_before = before.get("seconds", 0.0) if resumed else 0.0

    def add_start(self, trainer: Trainer) -> None:
        """Add the start of this process."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        start = {
            "step": trainer.global_step,
            "at": now,
            "ranks": trainer.world_size,
            "threads": torch.get_num_threads(),
        }
        self._starts.append(start)

    def write(self, trainer: Trainer, task: Task) -> None:
        """Write `config.yaml`, once, and `run.json`.

        Raises:
            OSError: If a file cannot be written.
        """
        if self._config_yaml is not None and not self._config_is_written:
            write_text(self.path.with_name("config.yaml"), self._config_yaml)
            self._config_is_written = True
        data, state = trainer.datamodule, task.run_state  # type: ignore[attr-defined]
        record = {
            "command": redact(shlex.join(sys.argv)),
            "versions": {name: version(name) for name in ("dualenc", "torch", "timm", "lightning", "tokenizers")},
            "python": platform.python_version(),
            "git": _revision(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "machine": f"{platform.node()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores",
            "ranks": trainer.world_size,
            "seed": data.seed,
            f"train_{task.noun}": len(data.train_index),
            f"held_out_{task.noun}": len(data.val_index) if data.val_index else 0,
            "fingerprint": data.train_index.fingerprint,
            "selection": data.selection.digest if data.selection else None,
            "step": trainer.global_step,
            "samples_seen": state.samples,
            "best": state.best,
            "last_step": self.last_step,
            "bad_samples": len(data.bad_sample_log),
            "seconds": round(self._seconds_before + time.time() - self._start_time, 1),
            "restarts": len(self._starts) - 1,
            "starts": self._starts,
            "changes": state.changes,
            "config": self._config,
        }
        write_json(self.path, record)


def write_run_report(root: Path, trainer: Trainer, task: Task) -> None:
    """Write `report.html`: the curves, and the last results of each evaluation that this process has run.

    Args:
        root: the run directory, with `run.json` and `metrics.csv`.
        trainer: trainer.
        task: task.
    """
    record = json.loads((root / "run.json").read_text("utf-8"))
    sections = [
        section for callback in trainer.callbacks if isinstance(callback, Measurement)  # type: ignore[attr-defined]
        for section in callback.sections
    ]  # fmt: skip
    sections += task.sections()
    noun = task.noun
    minutes, seconds = divmod(round(record["seconds"]), 60)
    about = {
        "command": redact(shlex.join(["dualenc", *sys.argv[1:]])),
        "model": root,
        **task.about(),
        "parameters": millions(sum(p.numel() for p in task.model.parameters())),
        "data": "; ".join(map(_describe_source, trainer.datamodule.sources)),  # type: ignore[attr-defined]
        noun: f"{record[f'train_{noun}']:,} to train on, {record[f'held_out_{noun}']:,} held out; "
        f"fingerprint {record['fingerprint']}",
        "training": f"{record['step']:,} steps, {record['samples_seen']:,} samples seen in {minutes} min "
        f"{seconds} s on {record['ranks']} x {record['device']}",
    }
    write_report(root, f"Training of {root.name}", sections, about, root / "metrics.csv")


def _describe_source(source: Mapping[str, Any]) -> str:
    shards, weight = source.get("shards") or source["files"], source.get("weight", 1.0)
    text = redact(shards if isinstance(shards, str) else " ".join(shards))
    return text if weight == 1 else f"{text}, weight {weight:g}"


def _redacted(value: Any) -> Any:
    """Return a configuration without the secrets of its URLs."""
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


@cache
def _revision() -> str | None:
    """Return the git revision of the working folder, marked "-dirty" if files differ from it; None without one."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    return found.stdout.strip() or None
