"""Tables and figures of runs and studies, and pages of runs; all that a notebook draws with, in one namespace."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gddlab.probing.plots.axes import STAGES
    from gddlab.reporting.frequencies import draw_bands, draw_denoised, draw_spectra, spectrum_table
    from gddlab.reporting.layers import (
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

# Where each name is; a module is imported when one of its names is first used.
_HOME = {
    "SETTINGS": "gddlab.reporting.tables",
    "STAGES": "gddlab.probing.plots.axes",
    "activation_ratio": "gddlab.reporting.layers",
    "between": "gddlab.reporting.local_minima",
    "cost_table": "gddlab.reporting.tables",
    "curve_table": "gddlab.reporting.training_curves",
    "cut_grid": "gddlab.reporting.samples",
    "draw_activations": "gddlab.reporting.layers",
    "draw_bands": "gddlab.reporting.frequencies",
    "draw_between": "gddlab.reporting.local_minima",
    "draw_curves": "gddlab.reporting.training_curves",
    "draw_denoised": "gddlab.reporting.frequencies",
    "draw_depth": "gddlab.reporting.layers",
    "draw_efficiency": "gddlab.reporting.training_curves",
    "draw_images": "gddlab.reporting.training_curves",
    "draw_metrics": "gddlab.reporting.training_curves",
    "draw_minima": "gddlab.reporting.local_minima",
    "draw_moved": "gddlab.reporting.layers",
    "draw_published": "gddlab.reporting.tables",
    "draw_runs": "gddlab.reporting.training_curves",
    "draw_same_noise": "gddlab.reporting.samples",
    "draw_spectra": "gddlab.reporting.frequencies",
    "experiment_table": "gddlab.reporting.tables",
    "frechet_name": "gddlab.reporting.local_minima",
    "look": "gddlab.reporting.style",
    "main_table": "gddlab.reporting.tables",
    "minima_table": "gddlab.reporting.local_minima",
    "moved_layers": "gddlab.reporting.layers",
    "moved_table": "gddlab.reporting.layers",
    "published": "gddlab.reporting.tables",
    "run_table": "gddlab.reporting.tables",
    "runs_folder": "gddlab.reporting.run_summary",
    "score_table": "gddlab.reporting.tables",
    "spectrum_table": "gddlab.reporting.frequencies",
    "squared_norms": "gddlab.reporting.layers",
    "styled": "gddlab.reporting.tables",
    "teacher_levels": "gddlab.reporting.run_summary",
    "teacher_scores": "gddlab.reporting.run_summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gddlab.reporting' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
