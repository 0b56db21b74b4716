"""Training with Lightning: tasks, data modules, optimization, and the files of a run."""

from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.electra import ReplacedTokenTask
from dualenc.training.ema import EMA
from dualenc.training.evaluation_callback import Evaluation
from dualenc.training.optim import Tuning, WarmupCosine, parameter_groups
from dualenc.training.pair_data import PairData
from dualenc.training.run_directory import RunDirectory
from dualenc.training.text import TextTask
from dualenc.training.text_data import TextData

__all__ = [
    "EMA",
    "ContrastiveTask",
    "Evaluation",
    "PairData",
    "ReplacedTokenTask",
    "RunDirectory",
    "TextData",
    "TextTask",
    "Tuning",
    "WarmupCosine",
    "parameter_groups",
]
