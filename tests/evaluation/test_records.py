from __future__ import annotations

import dataclasses
import json
from multiprocessing import get_context
from pathlib import Path

import pytest

from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import Record, Scores, append_records, compare, load_records, scores_of
from gddlab.files import data_dir, read_json
from gddlab.runs import load_runs
from gddlab.teachers.catalog import bundled_file, bundled_teachers, load_teacher
from tests.conftest import tiny_config

LATER = ("kimg", "preprocessing", "source", "data", "interval")
"""Fields that records had not from the start."""


def record(**changes) -> Record:
    base = Record(
        metric="fd-lite2@64",
        value=120.0,
        std=None,
        n=64,
        seeds=(0, 63),
        extractor="lite2",
        extractor_sha256="a" * 64,
        extractor_input_size=96,
        reference="digits",
        reference_sha256="b" * 64,
        reference_n=64,
        sampler="one-step",
        model_sha256="c" * 64,
        images_sha256="d" * 64,
        settings={},
        versions={"torch": "2"},
        seconds=1.5,
    )
    return dataclasses.replace(base, **changes)


def test_json_round_trip():
    for r in (
        record(interval=(100.0, 140.0)),
        record(seeds=None, model_sha256=None, std=0.5, settings={"subsets": 20}),
    ):
        assert Record.from_dict(json.loads(json.dumps(r.to_dict(), allow_nan=False))) == r
    with pytest.raises(GddlabError, match="nimg"):
        Record.from_dict(record().to_dict() | {"nimg": 3})


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(GddlabError, match="nan"):
        record(value=float("nan"))


@pytest.mark.parametrize("name", bundled_teachers())
def test_a_bundled_teachers_scores_name_its_file(name: str) -> None:
    """Weights that ship in half precision too: they were scored as they are loaded."""
    card = load_teacher(name).card
    scored = [s for s in card.scores if s["model_sha256"] == card.sha256]
    assert scored or name == "digits-all", "digits-all was rounded after it was scored"
    for score in scored:
        trace = Record.from_dict(score).trace()
        assert trace.file == bundled_file(name) and f"of             teacher {name}, " in str(trace)
        assert f'run_dir="{bundled_file(name).parent.name}-again"' in trace.trained_by and name in trace.repeated_by


def test_compare():
    assert compare(record(value=150.0), record(value=100.0)) == (50.0, 1.5)
    assert compare(record(), record(value=-0.1)).ratio is None
    assert compare(record(), record(model_sha256="e" * 64, sampler="heun-18", seeds=None)) == (0.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "fd-lite2@32", "n": 32},
        {"metric": "kd-lite2@64"},
        {"extractor": "lite0", "metric": "fd-lite0@64"},
        {"extractor_sha256": "f" * 64},
        {"extractor_input_size": 128},
        {"reference": "cifar10"},
        {"reference_sha256": "f" * 64},
        {"reference_n": 32},
        {"settings": {"subset_size": 10}},
    ],
)
def test_compare_refuses_what_is_not_alike(changes):
    with pytest.raises(
        GddlabError, match=f"differ in {next(iter(changes)) if 'extractor' not in changes else 'metric'}"
    ):
        compare(record(), record(**changes))


@pytest.mark.parametrize(
    ("across", "changes"),
    [
        ("n", {"metric": "fd-lite2@32", "n": 32, "settings": {"subset_size": 32}}),
        ("extractor", {"extractor": "lite0", "metric": "fd-lite0@64", "extractor_sha256": "f" * 64}),
        ("extractor", {"extractor": "inception-v3-compat", "metric": "fid@64", "extractor_input_size": 299}),
        ("extractor", {"extractor": "clip-vit-b-32", "metric": "clip-fid@64"}),
        ("reference", {"reference": "cifar10", "reference_sha256": "f" * 64, "reference_n": None}),
        ("preprocessing", {"preprocessing": "bicubic"}),
        (("n", "reference"), {"metric": "fd-lite2@32", "n": 32, "reference": "cifar10"}),
    ],
)
def test_compare_across_what_is_named(across, changes):
    one, other = record(preprocessing="bilinear"), record(**changes, value=60.0)
    if changes.get("preprocessing") is None:
        other = dataclasses.replace(other, preprocessing="bilinear")
    assert compare(one, other, across=across).ratio == 2
    for fewer in ((), "preprocessing" if across != "preprocessing" else "n"):
        with pytest.raises(GddlabError, match="differ in"):
            compare(one, other, across=fewer)


def test_across_does_not_excuse_another_kind_of_score():
    with pytest.raises(GddlabError, match="differ in metric"):
        compare(record(), record(metric="kd-lite0@64", extractor="lite0"), across="extractor")
    with pytest.raises(GddlabError, match="did you mean 'extractor'"):
        compare(record(), record(), across="extractors")


def test_older_records_load_and_compare():
    old = {k: v for k, v in record().to_dict().items() if k not in LATER}
    read = Record.from_dict(old)
    assert [getattr(read, k) for k in LATER] == [None] * len(LATER)
    assert compare(read, record(preprocessing="bilinear", value=60.0)).difference == 60


def test_records_that_ship_can_be_read():
    folder = data_dir()
    runs = [r for run in load_runs(folder / "runs") for r in load_records(run.run_dir)]
    teachers = [Record.from_dict(d) for p in (folder / "teachers").glob("*/scores.json") for d in read_json(p)]
    assert len(runs) > 20 and len(teachers) > 8
    assert all(r.run_dir is not None and "run_dir" not in r.to_dict() for r in runs)


def test_scores():
    assert "120 [100, 140.5] " in str(Scores((record(interval=(100.0, 140.5)),)))
    scores = Scores((record(), record(metric="kd-lite2@64", value=0.1, std=0.01)))
    assert scores["fd-lite2"] == scores["fd-lite2@64"] == 120.0
    assert "kd-lite2" in scores and "fid" not in scores and len(scores) == 2
    frame = scores.to_frame()
    assert list(frame.metric) == ["fd-lite2@64", "kd-lite2@64"] and frame.value[1] == 0.1
    assert "fd-lite2@64" in str(scores)
    with pytest.raises(GddlabError, match="did you mean 'fd-lite2'"):
        scores["fd-lite"]


def test_append_records(tmp_path):
    assert load_records(tmp_path) == []
    append_records(tmp_path, [record()])
    path = append_records(tmp_path, [record(value=1.0), record(value=2.0)])
    assert [r.value for r in load_records(tmp_path)] == [120.0, 1.0, 2.0]
    assert path.read_text().count("\n") == 3
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["evaluation.jsonl"]
    with pytest.raises(NotFound):
        append_records(tmp_path / "absent", [record()])


def _append_many(folder: Path, value: float) -> None:
    for _ in range(20):
        append_records(folder, [record(value=value)])


def test_processes_that_append_at_once_lose_no_record(tmp_path: Path) -> None:
    others = [get_context("spawn").Process(target=_append_many, args=(tmp_path, value)) for value in (1.0, 2.0)]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
    values = [r.value for r in load_records(tmp_path)]
    assert (values.count(1.0), values.count(2.0)) == (20, 20)


def test_scores_that_count(tmp_path: Path, tiny_teacher: Path) -> None:
    """By the student's own steps, of the first block, the newest; each reference apart."""
    config = tiny_config(tmp_path / "run", tiny_teacher)
    first, newer = record(kimg=0.048), record(kimg=0.048, value=60.0)
    others = (
        record(kimg=0.048, value=1.0, sampler="consistency-2 sigmas=80,0.8"),
        record(kimg=0.048, value=2.0, seeds=(64, 127)),
        record(value=3.0),  # of no age
    )
    held_out, early = record(kimg=0.048, reference="digits:held-out"), record(kimg=0.024)
    assert scores_of([first, newer, *others, held_out, early], config) == [newer, held_out, early]
    # other real images, or fewer generated ones, stand beside what counts and do not replace it
    few = dataclasses.replace(first, n=first.n // 2, value=5.0)
    other = dataclasses.replace(first, data="cifar10", reference="cifar10", reference_sha256="cd", value=6.0)
    assert first.n == first.reference_n
    assert scores_of([first, few, other], config) == [first] == scores_of([few, other, first], config)
    assert scores_of([first, few], config, n=few.n) == [few]
    assert scores_of([first, other], config, data="cifar10") == [other]
    assert scores_of([other], config) == [other] and scores_of([other], config, data="digits") == []
    named = dataclasses.replace(first, data="digits:held-out", value=7.0)
    assert scores_of([first, named], config, data=config.data) == [named]  # the part is in the label
    two = tiny_config(tmp_path / "two", tiny_teacher, mid_sigmas=(0.8,))
    assert scores_of([first, *others], two) == [others[0]]
