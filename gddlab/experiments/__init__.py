"""Declared experiments and studies: what is run for the figures and tables."""

from gddlab.experiments.experiment import Experiment, ExperimentList, Study
from gddlab.experiments.runner import LISTS, Planned, feeding, plan, reproduce, ship

__all__ = ["LISTS", "Experiment", "ExperimentList", "Planned", "Study", "feeding", "plan", "reproduce", "ship"]
