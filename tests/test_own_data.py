"""README's ten lines with a teacher trained on a folder of PNGs, from one working folder and from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gddlab
from gddlab.datasets import digits
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation.run_scores import score_student


def write_pngs(folder: Path, first: int, classes: tuple[int, ...] = (0, 1), each: int = 12) -> None:
    """`each` digits of a class per folder, from position `first` among those of the class."""
    data = digits()
    for label in classes:
        (folder / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(data.class_ids == label)[first : first + each]:
            Image.fromarray(data.uint8[i, :, :, 0]).save(folder / str(label) / f"{i}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of a user: images, a teacher and a student that were made from them by relative paths."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_pngs(Path("own/digits"), first=0)
        sizes = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
        config = gddlab.TeacherConfig(data="own/digits", run_dir="t", total_kimg=0.064, batch=16, **sizes)
        path = gddlab.train_teacher(config, progress=False)
        part = {"input_size": 32, "cout": 4, "head_width": 8}
        student = gddlab.presets.digits(
            run_dir="r", teacher=path, data="own/digits", classes=(1,), batch=4, total_kimg=0.008, discriminator=part
        )
        gddlab.train(student).wait()
    return home


@pytest.fixture(params=["where it was made", "elsewhere, beside other digits"])
def here(request: pytest.FixtureRequest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home if request.param == "where it was made" else tmp_path)
    if request.param != "where it was made":
        write_pngs(tmp_path / "own/digits", first=40)
        (tmp_path / "digits").symlink_to("own/digits")
    return home


def test_a_teacher_knows_its_images(here: Path) -> None:
    teacher = gddlab.load_teacher(here / "t")
    assert teacher.card.data == str(here / "own/digits")
    result = gddlab.probe(teacher, 2, n=2, progress=False)
    assert result.meta["data"]["sha256"] == gddlab.open_dataset(here / "own/digits").manifest.sha256
    score = gddlab.evaluate(teacher, metrics="fid", n=4, steps=2, progress=False).record("fd-lite2")
    assert (score.reference, score.reference_n) == ("digits", 24)


def test_a_student_is_scored_against_the_classes_it_learnt(here: Path) -> None:
    run = gddlab.load_run(here / "r")
    assert (run.config.teacher, run.config.data) == (str(here / "t/teacher.safetensors"), str(here / "own/digits"))
    scores = gddlab.evaluate(run.student(), metrics="fid", n=4, progress=False)
    record = scores.record("fd-lite2")
    assert (record.reference, record.reference_n) == ("digits, classes 1", 12)
    assert str(scores).endswith("against 12 images of digits, classes 1")
    by_path = gddlab.evaluate(str(here / "r"), metrics="fid", n=4, progress=False).record("fd-lite2")
    by_handle = gddlab.evaluate(run, metrics="fid", n=4, progress=False).record("fd-lite2")
    assert (by_handle.value, by_handle.run_dir) == (by_path.value, by_path.run_dir)
    assert by_path.value == record.value and by_path.reference_sha256 == record.reference_sha256
    again = score_student(run, ("fid",))
    assert all(r.reference_sha256 == record.reference_sha256 for r in again)


def test_a_finished_run_is_given_back_from_anywhere(here: Path) -> None:
    config = gddlab.load_run(here / "r").config
    assert gddlab.train(config).status == "done"


def test_other_images_at_the_same_place_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    net = gddlab.load_teacher(home / "t")
    student = gddlab.load_run(home / "r").student()
    moved = home / "own/elsewhere"
    (home / "own/digits").rename(moved)
    try:
        with pytest.raises(NotFound, match=r"own/digits, the data of this network, is no longer there: give data="):
            gddlab.probe(net, 2, n=2)
        write_pngs(home / "own/digits", first=20)
        for call in (lambda: gddlab.probe(net, 2, n=2), lambda: gddlab.evaluate(student, n=4)):
            with pytest.raises(GddlabError, match=r"holds other images than this network was trained on"):
                call()
        config = gddlab.load_run(home / "r").config
        with pytest.raises(GddlabError, match=r"holds another run: .*own/digits holds other images now; use a new"):
            gddlab.train(config)
        with pytest.warns(UserWarning, match=r"data has moved from .*own/digits to .*own/elsewhere; its hash is"):
            assert gddlab.train(config.model_copy(update={"data": moved})).status == "done"
        assert gddlab.load_run(home / "r").config.data == str(moved)
    finally:
        shutil.rmtree(home / "own")
        shutil.copytree(tmp_path / "copy/own", home / "own")
        shutil.copy(tmp_path / "copy/r/config.json", home / "r/config.json")
