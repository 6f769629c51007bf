"""The theme holds inside a drawing function and nowhere else."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from gddlab.theme import OWN, PALETTE, axes_of, columns_over_kimg, save_figure, themed


@themed
def drawn(ax: Axes | None = None, fail: bool = False) -> Axes:
    ax = axes_of(ax, 3, 2)
    if fail:
        raise ValueError("no")
    ax.plot([0, 1], [0, 1])
    return ax


def test_settings_do_not_outlive_a_figure_and_its_late_ticks_keep_them() -> None:
    before = dict(mpl.rcParams)
    ax = drawn()
    assert dict(mpl.rcParams) == before
    with pytest.raises(ValueError, match="no"):
        drawn(fail=True)
    assert dict(mpl.rcParams) == before
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.figure.canvas.draw()
    assert {t.get_size() for t in ax.get_xticklabels()} == {OWN["xtick.labelsize"]}
    own, mine = plt.subplots()
    assert drawn(mine) is mine and own.get_layout_engine() is not None
    plt.close("all")


def test_a_figure_is_saved_and_freed(tmp_path: Path) -> None:
    ax = drawn()
    save_figure(ax, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(ax.figure.number)  # type: ignore[union-attr]


def test_a_line_for_each_column_that_is_there() -> None:
    _, ax = plt.subplots()
    columns_over_kimg(ax, pd.DataFrame({"kimg": [0, 1], "loss/g": [2.0, 1.0]}), {"loss/g": "G", "loss/d": "D"}, "loss")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["G"]
    assert list(ax.lines[0].get_ydata()) == [2.0, 1.0] and to_rgb(ax.lines[0].get_color()) == to_rgb(PALETTE[0])
    plt.close("all")
