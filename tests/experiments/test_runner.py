"""A list of experiments runs once, goes on where it was, and ships what is light."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.evaluation import load_records
from gddlab.experiments import Experiment, ExperimentList, Study, feeding, plan, reproduce, ship
from gddlab.experiments import runner as module
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import Found, Judge, Measured, Subjects
from gddlab.experiments.full import FULL
from gddlab.experiments.masks import SCORE_OF, SCORES, measured_mask
from gddlab.experiments.runner import RUN_FILES
from gddlab.files import data_dir, read_jsonl
from gddlab.freezing import select_freeze
from gddlab.launch import train
from gddlab.lock import held
from gddlab.probing import ProbeResult, probe, weight_change
from gddlab.reporting.run_summary import Summary
from gddlab.runs import load_run, load_runs, load_study
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config
from tests.evaluation.conftest import small_features


@pytest.fixture
def tiny_list(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two experiments on the tiny teacher; the list counts how often it was measured."""
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    small_features(monkeypatch)
    measured: list[int] = []

    def measure(teacher: str, data: str) -> Measured:
        measured.append(1)
        result = probe(load_teacher(tiny_teacher), [80.0, 1.0], n=2, progress=False)
        return Measured(result, select_freeze(result, strategy="gdd-i"))

    def configure(run_dir: Path, seed: int, mask: object) -> object:
        fast = {"kind": "stylegan2", "channel_max": 8}  # its processes do without timm
        fields = {"seed": seed, "mask": mask, "total_kimg": 0.016, "snapshot_kimg": 0.008, "discriminator": fast}
        return tiny_config(run_dir, tiny_teacher, **fields)

    experiments = (
        Experiment("rule", "by name", ("n",), lambda m, s: m.rule, configure, seconds=60.0),  # type: ignore[arg-type]
        Experiment("all", "everything", ("n",), lambda m, s: None, configure, seconds=60.0),  # type: ignore[arg-type]
    )

    def moved(s: Subjects) -> Found:
        """One row a student."""
        shares = {n: weight_change(net, s.teacher, "conv").frame["value"].mean() for n, net in s.students.items()}
        return Found(pd.DataFrame({"network": shares.keys(), "value": shares.values()}), {"seed": 0})

    study = Study("moved", "how far", ("n",), ("rule", "all"), moved)
    tiny = ExperimentList(str(tiny_teacher), "digits", experiments, (study,), Judge(n=48))
    monkeypatch.setattr(module, "LISTS", {"tiny": tiny})
    monkeypatch.setattr(module, "measure", measure)
    return measured


def test_a_list_runs_once_and_ships_what_is_light(tiny_list: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = plan("tiny", out=out, seeds=2)
    assert [(p.item.name, p.seed, p.state) for p in before] == [
        ("rule", 0, "to do"),
        ("all", 0, "to do"),
        ("rule", 1, "to do"),
        ("all", 1, "to do"),
        ("moved", None, "to do"),
    ]
    said: list[str] = []
    after = reproduce("tiny", out=out, only=["rule"], seeds=1, say=said.append)
    assert [p.state for p in after] == ["done"]
    assert len(said) == 1 and "rule seed 0: fd-lite2@48" in said[0]
    run = load_run(out / "tiny" / "rule" / "seed-0")
    assert run.config.mask is not None and run.config.mask.strategy == "gdd-i"
    records = load_records(run.run_dir)
    assert [(r.name, r.kimg) for r in records if r.name == "fd-lite2"] == [("fd-lite2", 0.008), ("fd-lite2", 0.016)]
    at_end = {r.name for r in records if r.kimg == 0.016}
    assert at_end == {"fd-lite2", "kd-lite2", "precision-lite2", "recall-lite2", "fd-lite0"}
    lines = read_jsonl(run.run_dir / "metrics.jsonl")
    again = reproduce("tiny", out=out, only=["rule"], seeds=1, say=said.append)
    assert [p.state for p in again] == ["done"]
    assert len(said) == 1
    assert read_jsonl(run.run_dir / "metrics.jsonl") == lines
    assert tiny_list == [1]

    folders = ship("tiny", out, tmp_path / "data", seeds=1)
    assert {f.relative_to(tmp_path / "data").as_posix() for f in folders} == {"tiny/rule/seed-0", "tiny/measured"}
    files = {p.relative_to(folders[0]).as_posix() for p in folders[0].rglob("*") if p.is_file()}
    assert files | {"alarms.jsonl"} == {*RUN_FILES, "samples/000000.016.png"}
    (shipped,) = load_runs(tmp_path / "data")
    assert shipped.config.mask == run.config.mask
    assert shipped.metrics["nimg"].tolist() == run.metrics["nimg"].tolist()
    assert ProbeResult.load(tmp_path / "data" / "tiny" / "measured").stats


def test_a_run_that_outlives_its_reproduction_is_waited_for(tiny_list: list[int], tmp_path: Path) -> None:
    """A run goes on when the process that started it is killed; the same call again takes it up, and then the next."""
    experiment = module.LISTS["tiny"].experiments[1]
    config = experiment.configure(tmp_path / "tiny" / "all" / "seed-0", 0, None)
    run = train(config)
    assert held(run.run_dir)
    after = reproduce("tiny", out=tmp_path, only=["all"], seeds=1)
    assert [p.state for p in after] == ["done"]
    assert run.status == "done"


def test_nothing_finished_is_nothing_to_ship(tiny_list: list[int], tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="no run of 'tiny' below"):
        ship("tiny", tmp_path, tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(GddlabError, match="is a file: give a folder"):
        reproduce("tiny", out=tmp_path / "file")


def test_what_another_process_works_on_is_left_to_it(tiny_list: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "rule" / "seed-0"
    folder.mkdir(parents=True)
    fd = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    said: list[str] = []
    reproduce("tiny", out=tmp_path, only=["rule"], seeds=1, say=said.append)
    os.close(fd)
    assert said == ["rule seed 0: another process works on it"]
    assert tiny_list == []


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="unknown list of experiments 'digit': did you mean 'digits'"):
        plan("digit", out=tmp_path)
    with pytest.raises(GddlabError, match="unknown experiment 'gdd-1': did you mean 'gdd-i'"):
        plan("digits", out=tmp_path, only=["gdd-1"])
    with pytest.raises(GddlabError, match="seeds=0"):
        plan("digits", out=tmp_path, seeds=0)


def test_the_digits_masks_are_those_that_were_trained() -> None:
    """Masks chosen anew from the shipped measurement equal the masks of the shipped runs, bit for bit."""
    folder = data_dir() / "runs" / "digits"
    result = ProbeResult.load(folder / "measured")
    measured = Measured(result, select_freeze(result, strategy="gdd-i"))
    experiments = {e.name: e for e in DIGITS.experiments}
    assert SCORE_OF.keys() == SCORES.keys()
    seen = set()
    for run in load_runs(folder):
        name = run.run_dir.parent.name
        mask = experiments[name].mask(measured, run.config.seed)
        assert (mask and mask.hash) == (run.config.mask and run.config.mask.hash), run.run_dir
        seen.add(name)
    assert {"gdd-i", "gdd", "random"} <= seen
    low, high = (measured_mask(measured, "rel_update", inverse=i) for i in (False, True))
    assert abs(low.fraction - high.fraction) < 0.02
    trained = {n for n, _ in low.parameters} - set(low.frozen)
    inside = {n for n in trained if "block" in n or "_in" in n or "_up" in n or "_down" in n}
    assert len({n for n in inside if n.endswith(("conv0.weight", "conv1.weight"))} - set(high.frozen)) == 0


def test_a_study_is_made_anew_when_another_student_is_there(tiny_list: list[int], tmp_path: Path) -> None:
    reproduce("tiny", out=tmp_path, only=["rule", "moved"], seeds=1)
    folder = tmp_path / "tiny" / "moved"
    frame = load_study(folder)
    assert frame["network"].tolist() == ["rule"]
    assert frame.attrs["command"] == "gddlab reproduce tiny --only moved"
    run = load_run(tmp_path / "tiny" / "rule" / "seed-0")
    assert frame.attrs["inputs"] == {"rule": run.student().card.sha256}
    written = (folder / "meta.json").stat().st_mtime_ns
    assert [p.state for p in reproduce("tiny", out=tmp_path, only=["moved"], seeds=1)] == ["done"]
    assert (folder / "meta.json").stat().st_mtime_ns == written
    after = reproduce("tiny", out=tmp_path, seeds=1)
    assert [p.state for p in after] == ["done"] * 3
    assert load_study(folder)["network"].tolist() == ["rule", "all"]
    shipped = {f.name for f in ship("tiny", tmp_path, tmp_path / "data", only=["moved"], seeds=1)}
    assert shipped == {"moved", "measured"}
    assert load_study(tmp_path / "data" / "tiny" / "moved").equals(load_study(folder))


def test_a_run_that_lacks_a_score_at_its_end_is_scored_and_not_trained(tiny_list: list[int], tmp_path: Path) -> None:
    reproduce("tiny", out=tmp_path, only=["all"], seeds=1)
    run_dir = tmp_path / "tiny" / "all" / "seed-0"
    lines = (run_dir / "evaluation.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kd-lite2' not in line]
    (run_dir / "evaluation.jsonl").write_text("".join(kept))
    assert [p.state for p in plan("tiny", out=tmp_path, only=["all"], seeds=1)] == ["to evaluate"]
    metrics = (run_dir / "metrics.jsonl").read_text()
    reproduce("tiny", out=tmp_path, only=["all"], seeds=1)
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    assert len((run_dir / "evaluation.jsonl").read_text().splitlines()) == len(lines)


def test_blocks_of_seeds_are_scored_at_the_end_alone(
    tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce("tiny", out=tmp_path, only=["all"], seeds=1)
    thrice = replace(module.LISTS["tiny"], judge=Judge(n=48, blocks=3))
    monkeypatch.setattr(module, "LISTS", {"tiny": thrice})
    assert [p.state for p in plan("tiny", out=tmp_path, only=["all"], seeds=1)] == ["to evaluate"]
    reproduce("tiny", out=tmp_path, only=["all"], seeds=1)
    assert [p.state for p in plan("tiny", out=tmp_path, only=["all"], seeds=1)] == ["done"]
    run = load_run(tmp_path / "tiny" / "all" / "seed-0")
    records = [r for r in load_records(run.run_dir) if r.kimg == 0.016 and r.name.startswith("fd-lite2")]
    firsts = {r.seeds[0]: r.value for r in records if r.seeds and r.name == "fd-lite2"}
    assert sorted(firsts) == [0, 48, 96]
    least = Summary(run).at_end("fd-lite2-min3")
    assert least is not None and least.value == min(firsts.values())
    first = Summary(run).at_end("fd-lite2")
    assert first is not None and first.seeds is not None and first.seeds[0] == 0 and first.value == firsts[0]


@pytest.mark.parametrize("name", ["digits", *FULL])
def test_every_run_of_a_list_can_be_configured(name: str, tmp_path: Path) -> None:
    chosen = module.LISTS[name]
    assert len(set(chosen.names)) == len(chosen.names)
    for experiment in chosen.experiments:
        config = experiment.configure(tmp_path / experiment.name, 1, None)
        assert config.teacher == chosen.teacher and config.data == chosen.data
        assert config.seed == (1 if name == "digits" else 43)
        assert config.total_kimg % config.snapshot_kimg == 0
    for study in chosen.studies:
        assert set(study.needs) < set(chosen.names)


def test_notebooks_know_their_experiments() -> None:
    assert feeding("20_initialisation") == ("gdd-i", "gdd", "scratch")
    assert feeding("20_initialisation", "cifar10") == ("gdd-i", "gdd", "scratch")
    with pytest.raises(GddlabError, match="unknown notebook '20_initialization': did you mean '20_initialisation'"):
        feeding("20_initialization")
