"""A list of experiments runs once, goes on where it was, and ships what is light."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from gddlab.distill.teacher import TeacherConfig
from gddlab.errors import GddlabError
from gddlab.evaluation import load_records
from gddlab.experiments import (
    Experiment,
    ExperimentList,
    Question,
    Study,
    TeacherRun,
    plan,
    question,
    reproduce,
    ship,
)
from gddlab.experiments import runner as module
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import Judge, MaskInputs, StudyInputs, StudyResult
from gddlab.experiments.full import FULL
from gddlab.experiments.questions import OWN_RATE
from gddlab.experiments.rows import Rows
from gddlab.experiments.runner import RUN_FILES
from gddlab.files import read_json, read_jsonl, write_json
from gddlab.freezing import FreezeMask
from gddlab.launch import train
from gddlab.lock import held
from gddlab.probing import ProbeResult, probe, weight_change
from gddlab.reporting.run_summary import Summary
from gddlab.runs import load_run, load_runs, load_study
from gddlab.teachers import load_precond, load_teacher
from tests.conftest import tiny_config
from tests.evaluation.conftest import small_features


@pytest.fixture
def tiny_list(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two experiments on the tiny teacher; the list counts how often it was measured."""
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    small_features(monkeypatch)
    measured: list[int] = []

    def measure(teacher: str, data: str) -> ProbeResult:
        measured.append(1)
        return probe(load_teacher(tiny_teacher), [80.0, 1.0], n=2, progress=False)

    def configure(run_dir: Path, seed: int, mask: object) -> object:
        fast = {"kind": "stylegan2", "channel_max": 8}  # its processes do without timm
        fields = {"seed": seed, "mask": mask, "total_kimg": 0.016, "snapshot_kimg": 0.008, "discriminator": fast}
        return tiny_config(run_dir, tiny_teacher, **fields)

    experiments = (
        Experiment("rule", "by name", lambda m, s: m.rule, configure, (0, 1), (0.008,), seconds=60.0),  # type: ignore[arg-type]
        Experiment("all", "everything", lambda m, s: None, configure, (0, 1, 2), seconds=60.0),  # type: ignore[arg-type]
    )

    def moved(s: StudyInputs) -> StudyResult:
        """One row a student."""
        shares = {n: weight_change(net, s.teacher, "conv").frame["value"].mean() for n, net in s.students.items()}
        return StudyResult(pd.DataFrame({"network": shares.keys(), "value": shares.values()}), {"seed": 0})

    study = Study("moved", "how far", ("rule", "all"), moved)
    asked = Question(
        "02_n", "Does the rule differ?", ("rule", "all", "no such arm"), also=("fd-lite0",), studies=("moved",)
    )
    shown = Question("11_samples", "How do they look?", ("rule",))
    tiny = ExperimentList(str(tiny_teacher), "digits", experiments, (study,), (asked, shown), judge=Judge(n=48))
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
    assert {r.name for r in records if r.kimg == 0.008} == at_end
    lines = read_jsonl(run.run_dir / "metrics.jsonl")
    again = reproduce("tiny", out=out, only=["rule"], seeds=1, say=said.append)
    assert [p.state for p in again] == ["done"]
    assert len(said) == 1
    assert read_jsonl(run.run_dir / "metrics.jsonl") == lines
    assert tiny_list == [1]

    written = ship("tiny", out, tmp_path / "data")
    assert {f.relative_to(tmp_path / "data").as_posix() for f in written} == {"tiny/rule.tar.xz", "tiny/measured"}
    before_again = written[0].read_bytes()
    assert ship("tiny", out, tmp_path / "data")[0].read_bytes() == before_again
    (shipped,) = load_runs(tmp_path / "data")
    assert shipped.run_dir.parent.name == "rule"
    files = {p.relative_to(shipped.run_dir).as_posix() for p in shipped.run_dir.rglob("*") if p.is_file()}
    looked_at = {"samples/000000.016.png", "student.safetensors"}
    assert files | {"alarms.jsonl"} == {*RUN_FILES, "metrics.jsonl", *looked_at}
    for own, theirs in zip(shipped.student().parameters(), run.student().parameters(), strict=True):
        assert torch.equal(own, theirs.half().float())
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


def test_jobs_share_the_runs(tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers take each run once, with the threads that the list says; studies come after all runs."""
    calls: list[tuple[str, int, object]] = []

    def threads(job: dict[str, Any], nproc: int, report: Any, *, threads: object, **how: Any) -> None:
        calls.append((job["stage"], nproc, threads))
        with ThreadPoolExecutor(nproc) as pool:
            for done in [pool.submit(module.work, **json.loads(json.dumps(job)), report=report) for _ in range(nproc)]:
                done.result()

    monkeypatch.setattr(module, "run_workers", threads)
    monkeypatch.setattr(module, "WAIT_S", 0.05)
    monkeypatch.setattr(module, "LISTS", {"tiny": replace(module.LISTS["tiny"], threads=1)})
    said: list[str] = []
    after = reproduce("tiny", out=tmp_path, seeds=1, jobs=2, say=said.append)
    assert [p.state for p in after] == ["done"] * 3
    assert calls == [("experiments", 2, 1), ("studies", 1, 1)]
    assert sorted(line.partition(":")[0] for line in said) == ["all seed 0", "moved", "rule seed 0"]
    with pytest.raises(GddlabError, match="jobs=0"):
        reproduce("tiny", out=tmp_path, jobs=0)


def test_teachers_and_starts(tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment with a teacher of the list, and one that begins where another of the same seed ended."""
    tiny = module.LISTS["tiny"]

    def own(run_dir: Path) -> TeacherConfig:
        small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "batch": 8}
        return TeacherConfig(run_dir=run_dir, total_kimg=0.016, keep_kimg=(0.008,), half=True, **small)

    first, everything = tiny.experiments
    other = replace(everything, name="other", teacher="teachers/young/snapshots/0.008.safetensors", seeds=(0,))
    then = replace(everything, name="then", start=("other", 0.016), teacher=other.teacher, seeds=(0,))
    more = replace(tiny, teachers=(TeacherRun("young", "a small one", own),), experiments=(first, other, then))
    monkeypatch.setattr(module, "LISTS", {"tiny": more})
    done = reproduce("tiny", out=tmp_path, only=["then"])  # with what it begins with
    assert [(p.item.name, p.state) for p in done] == [("young", "done"), ("other", "done"), ("then", "done")]
    teacher, before, after = (load_run(tmp_path / "tiny" / name / "seed-0") for name in ("other", "other", "then"))
    assert teacher.config.teacher == str(tmp_path / "tiny" / "teachers" / "young" / "snapshots" / "0.008.safetensors")
    assert after.config.student == str(before.run_dir / "snapshots" / "000000.016.safetensors")
    assert after.provenance["student_sha256"] == before.student(0.016).card.sha256
    changed = weight_change(after.student(), before.student(), "conv").frame["value"]
    far = weight_change(after.student(), load_precond(teacher.config.teacher), "conv").frame["value"]
    assert 0 < changed.mean() < far.mean()
    with pytest.raises(GddlabError, match="is where the runs are: give another folder"):
        ship("tiny", tmp_path, tmp_path)
    ship("tiny", tmp_path, tmp_path / "data")
    shipped = {r.run_dir.parent.name: r for r in load_runs(tmp_path / "data")}
    assert shipped["then"].written_config["student"] == "other/seed-0/snapshots/000000.016.safetensors"
    assert shipped["then"].written_config["teacher"] == "teachers/young/snapshots/0.008.safetensors"
    shutil.rmtree(after.run_dir)
    (before.run_dir / "snapshots" / "000000.016.safetensors").unlink()
    with pytest.raises(GddlabError, match=r"then begins with .*000000.016.safetensors, which is gone: remove .*other"):
        reproduce("tiny", out=tmp_path, only=["then"])


def test_a_mask_chosen_from_runs(tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for all that it is chosen from, whatever the order, and sees no other run."""
    tiny = module.LISTS["tiny"]
    rule, everything = tiny.experiments
    seen: list[list[str]] = []

    def chosen(measured: MaskInputs, seed: int) -> FreezeMask:
        seen.append([f"{run.run_dir.parent.name}/{run.run_dir.name}: {run.status}" for run in measured.runs])
        return measured.rule

    last = replace(everything, name="chosen", mask=chosen, after=("all",), seeds=(7,))
    monkeypatch.setattr(module, "LISTS", {"tiny": replace(tiny, experiments=(rule, everything, last))})
    assert [str(p) for p in plan("tiny", out=tmp_path, only=["chosen"], seeds=2)] == [
        *("all seed 0", "chosen seed 7", "all seed 1")
    ]
    done = reproduce("tiny", out=tmp_path, only=["rule", "chosen"], seeds=2)
    assert {p.state for p in done} == {"done"}
    assert seen == [["all/seed-0: done", "all/seed-1: done"]]


def test_only_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="only='gdd': give a list of names"):
        plan("digits", out=tmp_path, only="gdd")
    with pytest.raises(GddlabError, match=r"only=\['24_editing'\]: the list 'cifar10' has none of what it reads"):
        plan("cifar10", out=tmp_path, only=["24_editing"])


def test_a_stopped_run_is_told(tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.launch.handle.RunHandle.wait", lambda run: None)
    monkeypatch.setattr("gddlab.launch.handle.RunHandle.status", "stopped")
    with pytest.raises(GddlabError, match="all seed 0 was stopped: the same call continues it"):
        reproduce("tiny", out=tmp_path, only=["all"], seeds=1)


def test_copying_is_scored_where_images_are_held_out() -> None:
    asked = ("copying-pixels", "copying-lite2")
    metrics = [m for names, _ in Judge().scores("cifar10", asked=asked) for m in names]
    assert "copying" not in metrics
    apart = Judge(held_out="digits:held-out").scores("digits:train", asked=asked)
    assert [how["extractor"] for names, how in apart if "copying" in names] == ["lite2", "pixels"]
    asked = ("fd-open-nsfw", "fd-lite0")
    assert [h["extractor"] for _, h in Judge().scores("cifar10", asked=asked)] == ["lite2", "lite0", "open-nsfw"]


def test_only_takes_a_notebook(tiny_list: list[int], tmp_path: Path) -> None:
    named = plan("tiny", out=tmp_path, only=["02_n"], seeds=1)
    assert [p.item.name for p in named] == ["rule", "all", "moved"]
    assert [p.seed for p in plan("tiny", out=tmp_path, only=["all"])] == [0, 1, 2]
    text = str(question("02_n", "tiny"))
    assert "Does the rule differ?" in text and "rule; all." in text


def test_a_study_is_made_anew_when_another_student_is_there(
    tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    shipped = {f.name for f in ship("tiny", tmp_path, tmp_path / "data", only=["moved"])}
    assert shipped == {"moved", "measured"}
    assert load_study(tmp_path / "data" / "tiny" / "moved").equals(load_study(folder))
    for student in (tmp_path / "tiny" / "all" / "seed-0").rglob("*.safetensors"):
        student.unlink()  # most runs ship without
    assert [p.state for p in plan("tiny", out=tmp_path, only=["moved"])] == ["done"]
    (folder / "meta.json").unlink()
    reproduce("tiny", out=tmp_path, only=["moved"])
    assert load_study(folder)["network"].tolist() == ["rule"]
    tiny = module.LISTS["tiny"]
    more = replace(tiny.questions[0], also=("fd-lite0", "recall-lite2"))
    monkeypatch.setattr(module, "LISTS", {"tiny": replace(tiny, questions=(more,))})
    assert [p.state for p in plan("tiny", out=tmp_path, only=["moved"])] == ["done"]  # it makes no scores
    meta = folder / "meta.json"
    write_json(meta, read_json(meta) | {"asked": ["fd-lite2", "kd-lite2", "fd-lite0"]})  # as of one that does
    assert [p.state for p in plan("tiny", out=tmp_path, only=["moved"])] == ["to do"]
    write_json(meta, read_json(meta) | {"asked": [*read_json(meta)["asked"], "recall-lite2"]})
    assert [p.state for p in plan("tiny", out=tmp_path, only=["moved"])] == ["done"]
    monkeypatch.setattr(module, "_bundled_sha256", lambda name: "another")
    assert [p.state for p in plan("tiny", out=tmp_path, only=["moved"])] == ["to do"]


def test_a_missing_extractor_is_told_before_anything_is_trained(
    tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = module.LISTS["tiny"]
    asked = replace(tiny.questions[0], also=("fd-open-nsfw",))
    monkeypatch.setattr(module, "LISTS", {"tiny": replace(tiny, questions=(asked,))})
    monkeypatch.setattr("gddlab.evaluation.extractors.find_spec", lambda name: None)
    with pytest.raises(GddlabError, match="extractor 'open-nsfw' needs onnx and onnxruntime: pip install"):
        reproduce("tiny", out=tmp_path, only=["all"])
    assert not (tmp_path / "tiny").exists()


def test_a_study_can_measure_another_seed(
    tiny_list: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = module.LISTS["tiny"]
    study = replace(chosen.studies[0], needs=("rule/seed-1", "all"))
    monkeypatch.setattr(module, "LISTS", {"tiny": replace(chosen, studies=(study,))})
    reproduce("tiny", out=tmp_path, only=["rule", "moved"])
    frame = load_study(tmp_path / "tiny" / "moved")
    run = load_run(tmp_path / "tiny" / "rule" / "seed-1")
    assert frame.attrs["inputs"] == {"rule/seed-1": run.student().card.sha256}
    assert frame["network"].tolist() == ["rule/seed-1"]


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
    made = {t.name for t in chosen.teachers}
    for experiment in chosen.experiments:
        seed = experiment.seeds[0]
        config = experiment.configure(tmp_path / experiment.name, seed, None)
        assert config.teacher == chosen.teacher
        assert config.data == chosen.data or experiment.name.endswith("other-images")
        assert config.seed == seed + (42 if name in FULL else 0)
        for kimg in module._points(experiment, config)[:-1]:  # a snapshot is there when scores are made
            assert kimg is not None and kimg * 1000 % config.batch == 0 and kimg % config.snapshot_kimg == 0
        assert not (own := module._own_teacher(experiment)) or own in made
        name_of = [e.name for e in chosen.experiments]
        for need in experiment.needs:  # before it in the list, where only= looks for it
            assert name_of.index(need) < name_of.index(experiment.name)
        if experiment.start is not None:
            before = chosen.experiments[name_of.index(experiment.start[0])]
            assert {*experiment.seeds} <= {*before.seeds} and experiment.start[1] % config.snapshot_kimg == 0
    for study in chosen.studies:
        needs = {need.partition("/")[0] for need in study.needs}
        assert not needs or needs & set(chosen.names)  # a list may lack some
    for run in chosen.teachers:
        assert run.configure(tmp_path / run.name).data == chosen.data


def test_the_first_seeds_train_longer_whatever_their_numbers(tmp_path: Path) -> None:
    row = Rows("digits", at=(6.0,), long=(24.0,), sec_per_kimg=1.0)
    fresh = row("fresh", "of new seeds", seeds=(100, 101, 102), longer=1)
    assert [fresh.configure(tmp_path, s, None).total_kimg for s in fresh.seeds] == [24, 12, 12]
    assert fresh.seconds == pytest.approx((24 + 12 + 12) / 3)


def test_gdd_is_varied_at_its_own_rate(tmp_path: Path) -> None:
    rates = {e.name: e.configure(tmp_path, 0, None).lr_g for e in DIGITS.experiments}
    varied = [n for n in rates if re.match(r"age-|from-|shuffled|rcd-then-gdd|gdd-(images|teacher|other)-", n)]
    assert len(varied) == 14 and {rates[n] for n in varied} == {rates[OWN_RATE]} != {rates["gdd"]}


@pytest.mark.parametrize("name", module.LISTS)
def test_each_experiment_answers_a_question(name: str) -> None:
    chosen = module.LISTS[name]
    questions = [question(q.notebook, name) for q in chosen.questions]  # with what the list has
    needed = {need.partition("/")[0] for s in chosen.studies for need in s.needs}
    needed |= {need for e in chosen.experiments for need in e.needs}
    assert {e.name for e in chosen.experiments} <= {arm for q in questions for arm in q.arms} | needed
    for q in questions:
        digits = DIGITS.asked_by(q.notebook) or question("26_emoji", "emoji")
        assert bool(q.contrasts) == bool(digits.contrasts), q.notebook


def test_questions_ask_for_what_there_is() -> None:
    """Each arm of a question is in one of the lists."""
    asked = {arm for q in DIGITS.questions for arm in q.arms}
    assert {"warm", "layers-47"} <= {str(p.item.name) for p in plan("digits", only=["02_choosing_a_mask"], seeds=1)}
    assert DIGITS.notebooks_of("layers-47") == ("02_choosing_a_mask",)
    assert asked <= {e.name for chosen in (DIGITS, *FULL.values()) for e in chosen.experiments}
    studies = {s for q in DIGITS.questions for s in q.studies}
    assert studies == {s.name for s in DIGITS.studies}
    assert {arm for q in DIGITS.questions for pair in q.contrasts for arm in pair} <= asked
    assert "scratch" in question("20_initialisation").arms
    assert "scratch" in question("20_initialisation", "cifar10").arms
    assert "from-low" not in question("20_initialisation", "cifar10").arms
    runs: list[Any] = [SimpleNamespace(run_dir=Path("runs") / "gdd" / f"seed-{seed}") for seed in (0, 1, 10)]
    assert [r.run_dir.name for r in question("12_main_results").counted(runs)] == ["seed-1", "seed-10"]
    assert "Not counted in what is compared: seed 0." in str(question("17_freezing"))
    full = question("13_second_extractor", "cifar10")
    assert full.counted(runs) == runs
    assert ("scratch", "gdd") in question("20_initialisation", "cifar10").contrasts  # the digits' own rate is theirs
    assert full.primary == ("fid-min3", "clip-fid", "kid", "precision", "recall") and full.at is None
    few = question("21_data_efficiency", "cifar10")
    assert ("gdd-i-images-1000", "gdd-images-1000") in few.contrasts and (
        "gdd-i-images-25000",
        "gdd-i",
    ) in few.contrasts
    assert ("gdd-i", "random-80") not in few.contrasts and "gdd-images-50" not in few.arms
    assert "random-10" in question("17_freezing", "cifar10").arms
    with pytest.raises(GddlabError, match="unknown notebook '02_choosing_a_mask'"):  # its mask is the digits'
        question("02_choosing_a_mask", "cifar10")
    assert "clip-fid" in FULL["cifar10"].asked_of("gdd-i")
    with pytest.raises(GddlabError, match="unknown notebook '20_initialization': did you mean '20_initialisation'"):
        question("20_initialization")
