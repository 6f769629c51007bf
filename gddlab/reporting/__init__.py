"""Tables and figures of runs and studies, and pages of runs; all that a notebook draws with, in one namespace.

Where a figure takes `ax`, it is drawn there; None makes a figure.
"""

from gddlab.probing.plots.axes import STAGES
from gddlab.reporting.frequencies import draw_bands, draw_denoised, draw_spectra, spectrum_table
from gddlab.reporting.layer_changes import (
    activation_ratio,
    draw_activations,
    draw_depth,
    draw_moved,
    moved_layers,
    moved_table,
    squared_norms,
)
from gddlab.reporting.local_minima import between, draw_between, draw_minima, frechet_name, minima_table
from gddlab.reporting.run_summary import runs_folder, teacher_levels, teacher_scores
from gddlab.reporting.samples import cut_grid, draw_same_noise
from gddlab.reporting.style import look
from gddlab.reporting.tables import (
    SETTINGS,
    cost_table,
    draw_published,
    experiment_table,
    main_table,
    published,
    run_table,
    score_table,
    styled,
)
from gddlab.reporting.training_curves import (
    curve_table,
    draw_curves,
    draw_efficiency,
    draw_images,
    draw_metrics,
    draw_runs,
)

__all__ = [
    "SETTINGS",
    "STAGES",
    "activation_ratio",
    "between",
    "cost_table",
    "curve_table",
    "cut_grid",
    "draw_activations",
    "draw_bands",
    "draw_between",
    "draw_curves",
    "draw_denoised",
    "draw_depth",
    "draw_efficiency",
    "draw_images",
    "draw_metrics",
    "draw_minima",
    "draw_moved",
    "draw_published",
    "draw_runs",
    "draw_same_noise",
    "draw_spectra",
    "experiment_table",
    "frechet_name",
    "look",
    "main_table",
    "minima_table",
    "moved_layers",
    "moved_table",
    "published",
    "run_table",
    "runs_folder",
    "score_table",
    "spectrum_table",
    "squared_norms",
    "styled",
    "teacher_levels",
    "teacher_scores",
]
