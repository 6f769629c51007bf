"""Freezing: which parameters of the student stay the teacher's."""

from gddlab.freezing.compare import MaskComparison, compare
from gddlab.freezing.controls import controls
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.options import STRATEGIES
from gddlab.freezing.strategies import select_freeze

__all__ = ["STRATEGIES", "FreezeMask", "MaskComparison", "compare", "controls", "select_freeze"]
