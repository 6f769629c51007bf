"""Declared experiments and studies: what is run for the figures and tables."""

from gddlab.experiments.experiment import Experiment, ExperimentList, Question, Study, TeacherRun
from gddlab.experiments.factorial import best_frozen, effects, explained, foretold
from gddlab.experiments.runner import LISTS, Planned, plan, question, reproduce, ship

__all__ = [
    "LISTS",
    "Experiment",
    "ExperimentList",
    "Planned",
    "Question",
    "Study",
    "TeacherRun",
    "best_frozen",
    "effects",
    "explained",
    "foretold",
    "plan",
    "question",
    "reproduce",
    "ship",
]
