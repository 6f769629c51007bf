"""Declared experiments: what is run for the figures and tables, each a run directory."""

from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import Experiment
from gddlab.experiments.runner import Planned, plan, reproduce, ship

__all__ = ["DIGITS", "Experiment", "Planned", "plan", "reproduce", "ship"]
