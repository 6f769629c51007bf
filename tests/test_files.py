"""Paths, folders and files that people give: which are taken, which are refused in one line, and what stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import gddlab
from gddlab.errors import GddlabError, NotFound, Unwritable
from gddlab.evaluation.images import open_source
from gddlab.files import (
    atomic_path,
    by_number,
    check_free,
    data_dir,
    folder_of,
    path_of,
    read_jsonl,
    thin_jsonl,
    write_text,
)
from gddlab.nets import Precond
from gddlab.runs import list_runs
from tests.conftest import tiny_config


@pytest.mark.parametrize("url", ["https://x/y.pkl", Path("https://x/y.pkl"), "s3://bucket/y"])
def test_a_url_is_no_path(url: object) -> None:
    with pytest.raises(GddlabError, match=r"^source='(https://x|s3://bucket)/y.* is a URL: give a path on "):
        path_of("source", url)
    for call in (gddlab.load_teacher, gddlab.open_dataset):
        with pytest.raises(GddlabError, match=r"://.* is a URL: give a path"):
            call(url)  # type: ignore[arg-type]


def test_a_bare_word_may_be_a_name_and_all_else_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "cifar10"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((16, 16), 100 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    assert len(gddlab.open_dataset("digits")) == 1797
    for path in (Path("digits"), "./digits", "digits/", "./cifar10", Path("cifar10")):
        assert len(gddlab.open_dataset(path)) == len(open_source(path)) == 2
        assert gddlab.presets.digits(run_dir="r", data=path).data == str(tmp_path / path)
    assert isinstance(open_source("digits"), Precond)
    gddlab.convert("digits", "digits/teacher.safetensors")
    for path in (Path("digits"), "./digits", "digits/"):
        assert gddlab.load_teacher(path).card.source == "digits/teacher.safetensors"
        assert gddlab.presets.digits(run_dir="r", teacher=path).teacher == str(tmp_path / "digits")
    assert gddlab.load_teacher("digits").card.source == "teachers/digits, ships with gddlab"
    for call in (gddlab.load_teacher, gddlab.open_dataset):
        for path in (Path("digits-cond"), "./digits-cond", "digits-cond/"):
            with pytest.raises(NotFound, match="no such file"):
                call(path)


@pytest.mark.parametrize(
    ("path", "why"),
    [("x\0y", "embedded null"), ("~nobody-there/x", "could not determine"), ("a" * 300, "file name too long")],
)
def test_a_name_that_the_system_does_not_take(path: str, why: str) -> None:
    for call in (
        gddlab.open_dataset,
        gddlab.load_teacher,
        gddlab.evaluate,
        lambda path: gddlab.presets.digits(run_dir=path),
    ):
        with pytest.raises(GddlabError, match=f"{why}.*, give another path$") as refused:
            call(path)
        assert len(str(refused.value)) < 250


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    tiny_config(tmp_path / "r", tmp_path / "teacher").write()
    run = gddlab.load_run(tmp_path / "r")
    write_text(run.run_dir / "status.json", '{"nimg": "a", "total_nimg": "b"}')
    write_text(run.run_dir / "metrics.jsonl", '{"kimg": 1}\n3\n')
    assert "status.json holds nimg='a', no number: it is damaged" in repr(run)
    assert list_runs(tmp_path)[0]["state"] == "damaged"
    with pytest.raises(GddlabError, match=r"metrics.jsonl is damaged: the line that begins '3'"):
        run.last_metrics  # noqa: B018
    with pytest.raises(GddlabError, match=r"status.json is a file: give a folder"):
        gddlab.load_runs(run.run_dir / "status.json")


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    gddlab.convert(str(tiny_teacher), "~/t/teacher.safetensors")
    assert gddlab.load_teacher("~/t").card.source == str(tmp_path / "t/teacher.safetensors")
    assert gddlab.presets.digits(run_dir="~/r").run_dir == tmp_path / "r"
    assert open_source("~/t").card.source == str(tmp_path / "t/teacher.safetensors")


def test_a_folder_is_told_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old.zip").mkdir()
    for wrong, why in {"file": "is a file", "file/run": "is below a file", "s.JPG": "is the name of a file"}.items():
        for call in (
            lambda path: folder_of("out", path),
            lambda path: gddlab.presets.digits(run_dir=path),
            lambda path: gddlab.sample_files("digits", path, n=1),
        ):
            with pytest.raises(GddlabError, match=f"={str(tmp_path / wrong)!r} {why}: give a folder"):
                call(tmp_path / wrong)
    assert folder_of("out", tmp_path / "run-0.5") == tmp_path / "run-0.5"
    assert folder_of("out", tmp_path / "old.zip").is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"file", "old.zip"}


def test_the_one_rule_for_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "full" / "a", "")
    for there in ("full", "full/a"):
        with pytest.raises(GddlabError, match=f"{there} exists: give another name, or replace it"):
            check_free(tmp_path / there, overwrite=False)
        check_free(tmp_path / there, overwrite=True)
    (tmp_path / "empty/.frame.parquet.x.tmp").touch()  # of a killed process
    for free in ("empty", "new"):
        check_free(tmp_path / free, overwrite=False)
    with pytest.raises(GddlabError, match="full/a/b is below a file"):
        check_free(tmp_path / "full/a/b", overwrite=False)


def test_a_mask_and_a_result_replace_their_own_kind_alone(tmp_path: Path) -> None:
    mask = gddlab.FreezeMask((), (("w", (1,)),))
    result = gddlab.weight_change(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), "linear")
    for _ in range(2):
        mask.save(tmp_path / "mask.json")
        result.save(tmp_path / "result")
    write_text(tmp_path / "run/config.json", '{"seed": 0}')
    with pytest.raises(GddlabError, match=r"config.json is there and no freeze mask: give another name"):
        mask.save(tmp_path / "run/config.json")
    with pytest.raises(GddlabError, match=r"run holds other files and no probe result: give another name"):
        result.save(tmp_path / "run")
    assert [(p.name, p.read_text()) for p in (tmp_path / "run").iterdir()] == [("config.json", '{"seed": 0}')]


def test_functions_that_write_follow_it(tmp_path: Path) -> None:
    calls: dict[str, Callable[[Path], object]] = {
        "t.safetensors": lambda out: gddlab.convert("digits", out),
        "r.npz": lambda out: gddlab.reference("digits", out),
        "d.zip": lambda out: gddlab.prepare("digits", out),
        "e.onnx": lambda out: gddlab.export(gddlab.load_teacher("digits"), out, sigma=1.0),
    }
    for name, call in calls.items():
        (tmp_path / name).write_text("other")
        with pytest.raises(GddlabError, match=f"{name} exists: give another name, or replace it"):
            call(tmp_path / name)
        assert (tmp_path / name).read_text() == "other"


def test_files_have_the_rights_of_the_users_files(tmp_path: Path) -> None:
    """safetensors puts a file of its own in the place of the one that it is given."""
    (tmp_path / "mine").touch()
    with atomic_path(tmp_path / "ours.safetensors") as tmp:
        save_file({"x": torch.zeros(1)}, tmp)
    assert (tmp_path / "ours.safetensors").stat().st_mode == (tmp_path / "mine").stat().st_mode


def test_a_run_that_ships_without_weights_says_so() -> None:
    with pytest.raises(NotFound, match=r"has no student: it holds no weights \(most runs ship without"):
        gddlab.load_run(data_dir() / "runs" / "digits" / "rcd-4" / "seed-0").student()


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(Unwritable, match=f"^{tmp_path}/file/m.json cannot be written: ") as refused:
        gddlab.FreezeMask((), (("w", (1,)),)).save(tmp_path / "file" / "m.json")
    assert isinstance(refused.value, OSError)

    def read_only(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{tmp_path}/.m.json.x8q.tmp")

    monkeypatch.setattr(Path, "touch", read_only)
    with (
        pytest.raises(Unwritable, match=f"^{tmp_path}/m.json cannot be written: Read-only file system$"),
        atomic_path(tmp_path / "m.json"),
    ):
        pass
    config = gddlab.TeacherConfig(run_dir=tmp_path / "run")
    with pytest.raises(Unwritable, match=r"^.*/run/config.json cannot be written: Read-only file system$"):
        config.write()


def test_a_run_does_not_start_among_other_files(tmp_path: Path, tiny_teacher: Path) -> None:
    write_text(tmp_path / "thesis.tex", "")
    for call in (
        lambda: gddlab.train(tiny_config(tmp_path, tiny_teacher)),
        lambda: gddlab.train_teacher(gddlab.TeacherConfig(run_dir=tmp_path)),
    ):
        with pytest.raises(GddlabError, match=r"holds 'thesis.tex' and no run: give an empty or new folder"):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in ("oops", "[1]", '{"kimg": '):
        write_text(path, f'{{"kimg": 1}}\n{line}\n{{"kimg": 2}}\n')
        for read in (read_jsonl, thin_jsonl):
            with pytest.raises(GddlabError, match=r"metrics.jsonl is damaged: the line that begins .* remove it"):
                read(path)
    write_text(path, '{"kimg": 1}\n{"kimg": ')
    assert read_jsonl(path) == [{"kimg": 1}]  # the last line is being written


def test_other_files_beside_ours(tmp_path: Path) -> None:
    for name in ("000002.500.png", "000010.000.png", "000001.000.png", "holiday.png", "nan.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in by_number(tmp_path, ".png")] == ["000001.000.png", "000002.500.png", "000010.000.png"]
