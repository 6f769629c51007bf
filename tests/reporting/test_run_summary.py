"""Where notebooks read, and that a misspelt parameter is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from gddlab.errors import GddlabError, NotFound
from gddlab.files import data_dir
from gddlab.reporting.run_summary import known_levels, runs_folder


def test_the_shipped_runs_or_those_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of a notebook has numbers of the shipped runs, so that others are announced."""
    assert runs_folder({"runs": ""}) == data_dir() / "runs"
    assert capsys.readouterr().out == ""
    assert runs_folder({"runs": str(tmp_path), "In": ["", "runs = ''", "other = 3"]}) == tmp_path
    assert f"show {tmp_path}. Numbers in the text are those of the shipped runs." in capsys.readouterr().out
    with pytest.raises(NotFound, match="no such folder"):
        runs_folder({"runs": str(tmp_path / "absent")})


def test_a_wheel_has_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.reporting.run_summary.data_dir", lambda: tmp_path)
    with pytest.raises(NotFound, match="come with a clone of gddlab, not with its wheel"):
        runs_folder({"runs": ""})


def test_the_folder_of_one_list_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "digits" / "gdd" / "seed-0" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    assert runs_folder({"runs": str(tmp_path)}) == tmp_path
    with pytest.raises(GddlabError, match="folder of one list"):
        runs_folder({"runs": str(tmp_path / "digits")})


def test_names_that_papermill_wrote_are_checked(tmp_path: Path) -> None:
    cell = f"# Parameters\nruns = {str(tmp_path)!r}\n"
    assert runs_folder({"runs": str(tmp_path), "In": ["", cell]}) == tmp_path
    with pytest.raises(GddlabError, match="unknown parameter 'run': did you mean 'runs'"):
        runs_folder({"runs": "", "run": "x", "In": ["", "# Parameters\nrun = 'x'\n"]})


def test_what_scores_are_held_against(tmp_path: Path) -> None:
    """The teacher at its most steps, a copier and a missing class; a study that is not there adds nothing."""
    rows = [(1, "fd-lite2", 900.0), (18, "fd-lite2", 65.0), (18, "fd-lite0", 32.0)]
    tables = {
        "teacher-steps": pd.DataFrame(rows, columns=["steps", "label", "value"]),
        "known-cases": pd.DataFrame(
            [("copier", "fd-lite2", 19.0), ("held-out", "fd-lite2", 59.0), ("missing class", "fd-lite2", 35.0)],
            columns=["case", "label", "value"],
        ),
    }
    assert known_levels(tmp_path, ["fd-lite2"]) == {"fd-lite2": {}}
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "frame.parquet")
        (tmp_path / name / "meta.json").write_text("{}")
    found = known_levels(tmp_path, ["fd-lite2", "fd-digits"])
    assert found["fd-lite2"] == {"teacher, 18 steps": 65.0, "copier": 19.0, "missing class": 35.0}
    assert found["fd-digits"] == {}
    with pytest.raises(GddlabError, match="metrics='fd-lite2': give a list of scores"):
        known_levels(tmp_path, "fd-lite2")
