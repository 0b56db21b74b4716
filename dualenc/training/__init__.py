"""Lightning: tasks, data modules, optimization, and what a run writes."""

from dualenc.training.callbacks import Evaluation
from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.data import PairData
from dualenc.training.ema import EMA
from dualenc.training.optim import Tuning, WarmupCosine, parameter_groups
from dualenc.training.replaced import ReplacedTokenTask
from dualenc.training.run import RunDirectory
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
