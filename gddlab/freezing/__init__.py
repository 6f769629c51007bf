"""Freezing: which parameters of the student stay the teacher's."""

from gddlab.freezing.compare import MaskComparison, compare, controls
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.select import select_freeze
from gddlab.freezing.strategies import STRATEGIES

__all__ = ["STRATEGIES", "FreezeMask", "MaskComparison", "compare", "controls", "select_freeze"]
