"""The image tower that a run would begin with."""

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningModule, seed_everything
from lightning.pytorch.cli import LightningArgumentParser

from dualenc.data import DataError, Preprocess
from dualenc.inference.embedder import load
from dualenc.models import ImageEncoder
from dualenc.training.contrastive import ContrastiveTask, is_model


class _Parser(LightningArgumentParser):
    """Errors are for the command line to print."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        raise DataError(message)


def image_tower(config: str | os.PathLike[str]) -> tuple[ImageEncoder, Preprocess]:
    """The image tower of the run that `dualenc fit --config CONFIG` would begin, with its weights, and its transform.

    Raises:
        DataError: the file is no such configuration.
    """
    try:
        given = yaml.safe_load(Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{config} cannot be read as YAML: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(given, dict) or "model" not in given:
        raise DataError(f"{config} has no section model: it is no configuration of dualenc fit")
    seed = given.get("seed_everything", 0)
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)  # as in `fit`
    parser = _Parser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)  # type: ignore[type-abstract]
    try:
        section = parser.parse_object({"model": given["model"]})
        if isinstance(seed, int) and not isinstance(seed, bool):
            seed_everything(seed, workers=True, verbose=False)
        task = parser.instantiate_classes(section)["model"]
    except ValueError as error:
        raise DataError(f"{config}: {error}") from None
    if not isinstance(task, ContrastiveTask):
        raise DataError(f"{config}: model is a {type(task).__name__}, which has no image tower")
    source = task.pretrained
    tower = task.model.image
    if isinstance(source, str) and is_model(source):
        tower.load_pretrained(load(source, "cpu").dual_encoder.image.vit.state_dict())
    elif source:
        tower.load_pretrained(source if isinstance(source, str) else None)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"{config}: seed_everything {seed} gives another random tower each time; set it to a number")
    return tower.eval(), task.preprocess
