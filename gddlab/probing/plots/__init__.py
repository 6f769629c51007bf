"""Figures of a probe: layers by noise level, along depth, between noise levels, teacher and student, over training."""

from gddlab.probing.plots.heatmaps import draw_heatmap, draw_over_training, draw_similarities, draw_similarity
from gddlab.probing.plots.lines import draw_lines, draw_pair, draw_stem

__all__ = [
    "draw_heatmap",
    "draw_lines",
    "draw_over_training",
    "draw_pair",
    "draw_similarities",
    "draw_similarity",
    "draw_stem",
]
