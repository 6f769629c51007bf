"""From a number back to its run, and to the command that gives it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gddlab.cli import main
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.evaluation import Record, append_records, evaluate, load_records, real_split
from gddlab.evaluation.records import sampler_settings
from gddlab.files import data_dir, read_json
from gddlab.runs import load_run
from tests.conftest import tiny_config
from tests.evaluation.test_records import record


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_teacher) -> Path:
    """A tiny run with two snapshots."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    config = tiny_config(folder, tiny_teacher, snapshot_kimg=0.024)
    config.write()
    assert Trainer(config, World(0, 1, torch.device("cpu"))).train() == "done"
    return folder


def repeated(command: str, out: Path) -> Record:
    """The record of the same name that the command gives."""
    words = shlex.split(command)
    assert words[:2] == ["gddlab", "evaluate"]
    main([*words[1:], "--out", str(out), "--overwrite"])
    return [Record.from_dict(d) for d in json.loads(out.read_text())][-1]


def test_a_student_is_traced_and_its_score_repeated(run, cache, counter, tmp_path):
    snapshots = load_run(run).snapshots()
    for name, about in ((snapshots[0].stem, {"steps": 2}), (None, {"blocks": 2})):
        net = load_run(run).student(name)
        made = list(evaluate(net, metrics="mind", n=6, seed=3, **about))[-1]
        append_records(run, [made])
        got = load_records(run)[-1].trace()
        assert got.run_dir == run and got.file is not None
        assert (got.file.parent.name == "snapshots") == (name is not None)
        assert got.config[0].startswith("teacher = ") and len(got.config_sha256) == 64
        assert f"{made.metric} = " in str(got) and made.images_sha256[:16] in str(got)
        for file in (cache / "generated").iterdir():
            file.unlink()
        again = repeated(got.repeated_by, tmp_path / "again.json")
        assert (again.metric, again.value, again.seeds) == (made.metric, made.value, made.seeds)
        assert again.images_sha256 == made.images_sha256
    other = dataclasses.replace(made, model_sha256="0" * 64, run_dir=run).trace()
    assert other.file is None and other.repeated_by.startswith("train again, then: gddlab evaluate")
    assert f"--snapshot {snapshots[-1].stem} " in other.repeated_by  # a file that the run has


@pytest.mark.slow
def test_a_training_is_repeated(run, cache):
    made = evaluate(run, metrics="kid", n=6).records[0]
    command = shlex.split(made.trace().trained_by)
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=300)
    again = evaluate(f"{run}-again", metrics="kid", n=6).records[0]
    assert again.model_sha256 == made.model_sha256 and again.value == made.value


def test_scores_that_ship_are_traced():
    teacher = Record.from_dict(read_json(data_dir() / "teachers" / "digits" / "scores.json")[-3])
    got = teacher.trace()
    assert got.subject == "teacher digits" and got.file.name == "teacher.safetensors"
    assert got.repeated_by == ("gddlab evaluate digits --metrics kid --n 1797 --seed 0 --steps 18 --extractor lite2")
    assert "train_teacher" in got.trained_by
    runs = sorted((data_dir() / "runs").rglob("evaluation.jsonl"))
    for path in (runs[0], runs[-1]):
        got = load_records(path.parent)[0].trace()
        assert got.repeated_by and "scor" in str(got)


def test_images_and_data(some, counter, tmp_path):
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert evaluate(x, data=some, metrics="kid").records[0].trace().repeated_by is None
    made = evaluate("data:digits", data="digits", metrics="kid", n=9, seed=2).records[0]
    again = repeated(made.trace().repeated_by, tmp_path / "again.json")
    assert (again.value, again.images_sha256) == (made.value, made.images_sha256)
    half = real_split("digits", metrics="kid").records[0].trace()
    assert "one half" in str(half)
    code = shlex.split(half.repeated_by)[2]
    assert 'real_split("digits", metrics="kid", n=None, seed=0' in code
    network = dataclasses.replace(record(), model_sha256="1" * 64).trace()
    assert network.repeated_by is None and "given in memory" in str(network)


def test_names_of_samplers_are_read_back():
    assert sampler_settings("one-step") == {}
    assert sampler_settings("heun-18") == {"steps": "18"}
    assert sampler_settings("euler-3 sigma_max=20 S_churn=1.5") == {
        "steps": "3",
        "solver": "euler",
        "sigma_max": "20",
        "S_churn": "1.5",
    }
    assert sampler_settings("consistency-2 sigmas=80,0.8") == {"sigmas": "80,0.8"}
    assert np.isfinite(float(sampler_settings("one-step sigmas=40")["sigmas"]))
