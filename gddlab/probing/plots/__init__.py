"""Pictures of a probe: layers by noise level, along depth, noise level by noise level, teacher by student, over training."""

from gddlab.probing.plots.depth import draw_pair, draw_stem
from gddlab.probing.plots.heatmap import draw_course, draw_heatmap
from gddlab.probing.plots.lines import draw_lines
from gddlab.probing.plots.similarity import draw_similarities, draw_similarity

__all__ = [
    "draw_course",
    "draw_heatmap",
    "draw_lines",
    "draw_pair",
    "draw_similarities",
    "draw_similarity",
    "draw_stem",
]
