"""Lightning: tasks, data modules, optimization, and what a run writes."""

from dualenc.training.callbacks import Evaluation, RunDirectory
from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.data import PairData
from dualenc.training.optim import WarmupCosine, parameter_groups

__all__ = ["ContrastiveTask", "Evaluation", "PairData", "RunDirectory", "WarmupCosine", "parameter_groups"]
