"""The experiments on the embedded digits, in the order that the notebooks need them."""

from __future__ import annotations

from gddlab.experiments.experiment import Experiment
from gddlab.experiments.masks import MASKS
from gddlab.experiments.training import TRAINING

__all__ = ["DIGITS"]

DIGITS: tuple[Experiment, ...] = MASKS + TRAINING
