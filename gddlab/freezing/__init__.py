"""Freezing: which parameters of the student stay the teacher's."""

from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.strategies import STRATEGIES, select_freeze

__all__ = ["STRATEGIES", "FreezeMask", "select_freeze"]
