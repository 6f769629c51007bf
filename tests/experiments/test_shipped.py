"""The runs of the digits that ship are those of the list: masks chosen anew are equal, students score as recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from gddlab.evaluation import evaluate, load_records
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import MaskInputs
from gddlab.files import data_dir
from gddlab.probing import ProbeResult
from gddlab.runs import Run, load_runs

FOLDER = data_dir() / "runs" / "digits"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path))
    return load_runs(FOLDER)


def test_shipped_masks_are_those_chosen_anew(runs: list[Run]) -> None:
    result = ProbeResult.load(FOLDER / "measured")
    measured = MaskInputs(result, runs)
    declared = {experiment.name: experiment for experiment in DIGITS.experiments}
    for run in runs:
        experiment, config = declared[run.run_dir.parent.name], run.config
        assert run.status == "done" and config.seed in experiment.seeds
        assert config.teacher == (experiment.teacher or DIGITS.teacher)
        assert config.mask == experiment.mask(measured, config.seed)
        for kimg in experiment.at:
            assert kimg > config.total_kimg or any(r.kimg == kimg for r in load_records(run.run_dir))


@pytest.mark.slow
def test_shipped_students_score_as_recorded(runs: list[Run]) -> None:
    """In half precision, as they ship, within 1 % of what they scored in full."""
    shipped = [run for run in runs if (run.run_dir / "student.safetensors").exists()]
    assert shipped
    for run in shipped:
        (record,) = (r for r in load_records(run.run_dir) if r.label == "fd-lite2" and r.kimg == run.config.end_kimg)
        found = evaluate(run.student(), data=DIGITS.data, metrics="fid", n=record.n, progress=False)["fd-lite2"]
        assert found == pytest.approx(record.value, rel=0.01), run.run_dir
