"""The runs that ship are those of their list: masks chosen anew are equal, students score as recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from gddlab.evaluation import evaluate, load_records
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.emoji import EMOJI
from gddlab.experiments.experiment import MaskInputs
from gddlab.files import data_dir
from gddlab.probing import ProbeResult
from gddlab.runs import Run, load_runs
from gddlab.teachers import load_precond

LISTS = {"digits": DIGITS, "emoji": EMOJI}


@pytest.fixture(params=LISTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path))
    return load_runs(data_dir() / "runs" / name)


def test_shipped_masks_are_those_chosen_anew(name: str, runs: list[Run]) -> None:
    result = ProbeResult.load(data_dir() / "runs" / name / "measured")
    measured = MaskInputs(result, runs)
    declared = {experiment.name: experiment for experiment in LISTS[name].experiments}
    for run in runs:
        experiment, config = declared[run.run_dir.parent.name], run.config
        seed = int(run.run_dir.name.removeprefix("seed-"))
        assert run.status == "done" and seed in experiment.seeds
        assert config.seed == experiment.configure(run.run_dir, seed, None).seed
        assert config.teacher == (experiment.teacher or LISTS[name].teacher)
        assert config.mask == experiment.mask(measured, seed)
        for kimg in experiment.at:
            assert kimg > config.total_kimg or any(r.kimg == kimg for r in load_records(run.run_dir))


def test_what_a_shipped_student_has_frozen_is_its_teachers(name: str, runs: list[Run]) -> None:
    """Its file holds the rest alone."""
    frozen = [r for r in runs if r.config.mask is not None and (r.run_dir / "student.safetensors").exists()]
    assert frozen
    for run in frozen:
        assert run.config.mask is not None
        run.config.mask.verify(run.student(), load_precond(run.config.teacher))
        with safe_open(run.run_dir / "student.safetensors", framework="pt") as f:
            assert not {*f.keys()} & {*run.config.mask.frozen}


@pytest.mark.slow
def test_shipped_students_score_as_recorded(name: str, runs: list[Run]) -> None:
    """In half precision, as they ship, within 1 % of what they scored in full."""
    shipped = [run for run in runs if (run.run_dir / "student.safetensors").exists()]
    assert shipped
    for run in shipped:
        (record,) = (r for r in load_records(run.run_dir) if r.label == "fd-lite2" and r.kimg == run.config.end_kimg)
        found = evaluate(run.student(), data=LISTS[name].data, metrics="fid", n=record.n, progress=False)["fd-lite2"]
        assert found == pytest.approx(record.value, rel=0.01), run.run_dir
