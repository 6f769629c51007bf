"""Runs of masks as a table: means over seeds, nothing unfinished dropped, nothing mixed."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from gddlab.distill.recording import write_status
from gddlab.errors import GddlabError
from gddlab.evaluation import append_records
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.reporting.freezing import draw_runs, experiment_table, run_table
from gddlab.runs import Run, load_runs
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config
from tests.evaluation.test_records import record


def made(
    folder: Path,
    teacher: Path,
    name: str,
    seed: int,
    value: float | None,
    mask: FreezeMask | None = None,
    **changes: object,
) -> Run:
    config = tiny_config(folder / name / f"seed-{seed}", teacher, seed=seed, mask=mask)
    config.write()
    write_status(config.run_dir, "done" if value is not None else "running")
    if value is not None:
        early = record(value=500.0, kimg=config.total_kimg / 2)
        append_records(config.run_dir, [early, record(**{"value": value, "kimg": config.total_kimg, **changes})])
    return Run(config.run_dir)


@pytest.fixture
def runs(tmp_path: Path, tiny_teacher: Path) -> list[Run]:
    mask = select_freeze(load_teacher(tiny_teacher), strategy="random", budget=0.5, seed=1)
    made(tmp_path, tiny_teacher, "all", 0, 90.0)
    made(tmp_path, tiny_teacher, "all", 1, 70.0)
    made(tmp_path, tiny_teacher, "masked", 0, 60.0, mask)
    made(tmp_path, tiny_teacher, "masked", 1, None, mask)
    return load_runs(tmp_path)


def test_a_row_a_run_and_a_row_an_experiment(runs: list[Run]) -> None:
    table = run_table(runs)
    assert table["experiment"].tolist() == ["all", "all", "masked", "masked"]
    assert table["value"].tolist()[:3] == [90.0, 70.0, 60.0]
    assert math.isnan(table["value"][3])
    assert table["state"].tolist() == ["done", "done", "done", "running"]
    assert table["strategy"].tolist() == ["none", "none", "random", "random"]
    found = experiment_table(table)
    assert found.index.tolist() == ["masked", "all"]
    assert found.loc["all", ["mean", "min", "max", "seeds", "unfinished"]].tolist() == [80.0, 70.0, 90.0, 2, 0]
    assert found.loc["all", "sd"] == pytest.approx(14.1421, rel=1e-4)
    assert found.loc["masked", ["mean", "seeds", "unfinished"]].tolist() == [60.0, 1, 1]
    assert math.isnan(found.loc["masked", "sd"])
    assert found.loc["all", "frozen"] == 0


def test_a_picture_of_them(runs: list[Run]) -> None:
    ax = draw_runs(run_table(runs), lines={"teacher": 63.0})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["masked", "all"]
    assert sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == "o") == 3
    assert "fd-lite2@64" in ax.get_xlabel()
    _, own = plt.subplots()
    assert draw_runs(run_table(runs), ax=own) is own
    plt.close("all")


def test_scores_that_cannot_be_compared_are_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    made(tmp_path, tiny_teacher, "a", 0, 1.0)
    made(tmp_path, tiny_teacher, "a", 1, 2.0, metric="fd-lite2@32", n=32)
    with pytest.raises(GddlabError, match="differ in metric"):
        run_table(load_runs(tmp_path))
    with pytest.raises(GddlabError, match="no runs given"):
        run_table([])


def test_a_finished_run_without_its_score_says_so(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "a" / "seed-0", tiny_teacher)
    config.write()
    write_status(config.run_dir, "done")
    assert run_table(load_runs(tmp_path))["state"].tolist() == ["no fd-lite2 at the end"]
