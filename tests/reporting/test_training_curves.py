"""Scores over the training, dots of seeds: what is drawn is what the tables hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gddlab.errors import GddlabError
from gddlab.reporting.tables import run_table
from gddlab.reporting.training_curves import curve_table, draw_curves, draw_runs
from gddlab.runs import Run, load_runs
from tests.reporting.made import made


@pytest.fixture
def runs(tmp_path: Path, tiny_teacher: Path) -> list[Run]:
    made(tmp_path, tiny_teacher, "few", 0, {0.024: 95.0, 0.048: 90.0}, max_images=20)
    made(tmp_path, tiny_teacher, "few", 1, {0.024: 85.0, 0.048: 70.0}, max_images=20)
    made(tmp_path, tiny_teacher, "whole", 0, {0.024: 75.0, 0.048: 60.0})
    made(tmp_path, tiny_teacher, "whole", 1, {0.024: 65.0}, state="stopped")
    return load_runs(tmp_path)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def names(ax: plt.Axes) -> list[str]:
    """Entries of the legend."""
    return ax.get_legend_handles_labels()[1]


def lines(ax: plt.Axes) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.lines if line.get_marker() in "os" and len(line.get_xdata())]


def test_every_score_on_the_way(runs: list[Run], tmp_path: Path, tiny_teacher: Path) -> None:
    table = curve_table(runs, rows=("whole", "few", "never"))
    assert table["experiment"].tolist() == ["whole"] * 3 + ["few"] * 4 + ["never"]
    assert table["kimg"].tolist()[:3] == [0.024, 0.048, 0.024]
    assert table["value"].tolist()[:3] == [75.0, 60.0, 65.0]
    assert table["state"].tolist()[2] == "stopped at 0.024 of 0.048 kimg"
    assert table["state"].tolist()[-1] == "not run" and math.isnan(table["value"].tolist()[-1])
    assert set(curve_table(runs, "kd-lite2")["state"]) == {"no kd-lite2 at the end", "stopped at 0.024 of 0.048 kimg"}
    other = made(tmp_path / "other", tiny_teacher, "a", 0, {0.048: 1.0}, scored={"n": 3})
    with pytest.raises(GddlabError, match="differ in n"):
        curve_table([*runs, other])


def test_curves_show_means_and_their_intervals(runs: list[Run]) -> None:
    ax = draw_curves(curve_table(runs, rows=("whole", "few", "never")), levels={"teacher": 50.0})
    assert lines(ax) == [[70.0, 60.0], [90.0, 80.0]]
    assert names(ax) == ["whole", "few", "teacher: 50"]
    assert len({line.get_color() for line in ax.get_lines()[:2]}) == 2  # also of names that no experiment has
    assert ax.get_title(loc="left") == "mean over 1 to 2 seeds; thin: each seed\nnot run: never"
    assert ax.get_yscale() == "linear" and ax.get_ylabel() == "fd-lite2@64"
    wide = draw_curves(curve_table(runs), levels={"teacher": 900.0})
    assert wide.get_yscale() == "log"
    _, own = plt.subplots(figsize=(3.2, 2.8), layout="constrained")
    assert draw_curves(curve_table(runs), ax=own) is own


def test_a_band_is_the_interval_of_six_seeds_and_fewer_are_lines(tmp_path: Path, tiny_teacher: Path) -> None:
    values = (70.0, 66.0, 78.0, 71.0, 69.0, 75.0)
    for seed, value in enumerate(values):
        made(tmp_path, tiny_teacher, "six", seed, {0.024: 2 * value, 0.048: value})
    runs = load_runs(tmp_path)
    ax = draw_curves(curve_table(runs))
    heights = {float(y) for x, y in ax.collections[0].get_paths()[0].vertices.tolist() if x == 0.048}
    half = 2.570582 * np.std(values, ddof=1) / np.sqrt(6)  # Student's t, 5 degrees of freedom
    np.testing.assert_allclose(sorted(heights), [71.5 - half, 71.5 + half], rtol=1e-6)
    ax = draw_curves(curve_table(runs[:3]))
    assert not ax.collections and ax.get_title(loc="left") == "mean over 3 seeds; thin: each seed"
    thin = [list(line.get_ydata()) for line in ax.lines if line.get_linewidth() < 1]
    assert thin == [[2 * value, value] for value in values[:3]]


def test_nothing_to_draw_is_drawn_as_such() -> None:
    ax = draw_curves(curve_table([], rows=["never"]))
    assert ax.get_title(loc="left") == "not run: never" and not lines(ax)


def test_a_row_an_experiment_a_dot_a_seed(runs: list[Run]) -> None:
    ax = draw_runs(run_table(runs, rows=("few", "whole", "never")), levels={"teacher": 63.0})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["few", "whole", "never"]
    assert sum(len(dots.get_offsets()) for dots in ax.collections) == 3
    assert [float(x) for line in ax.lines if line.get_marker() == "|" for x in line.get_xdata()][:2] == [80.0, 60.0]
    assert ax.get_title(loc="left") == "dots: 1 to 2 seeds, bar: mean"
    assert "fd-lite2@64" in ax.get_xlabel()
    assert [t.get_text() for t in ax.texts] == ["not run"] and "teacher: 63" in names(ax)
    by_mean = draw_runs(run_table(runs), sort=True)
    assert [t.get_text() for t in by_mean.get_yticklabels()] == ["whole", "few"]
    _, own = plt.subplots()
    assert draw_runs(run_table(runs), ax=own) is own
