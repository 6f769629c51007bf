"""Freezing: which parameters of the student stay the teacher's."""

from gddlab.freezing.compare import MaskComparison, compare, controls
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.select import STRATEGIES, select_freeze

__all__ = ["STRATEGIES", "FreezeMask", "MaskComparison", "compare", "controls", "select_freeze"]
