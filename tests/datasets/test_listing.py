"""Parts of data sets: which images are held out, of every kind of source; groups; where names of parts are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gddlab
from gddlab.datasets import HELD_OUT, TRAIN, ImageDataset, data_of, digits, name_and_part, open_dataset, prepare
from gddlab.datasets.listing import classes_of_table
from gddlab.datasets.open import find_source
from gddlab.distill.presets import PRESETS
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation.images import open_source
from tests.datasets.conftest import file_of, picture

Zip = Callable[..., Path]


def both(path: object, **options: Any) -> tuple[ImageDataset, ImageDataset]:
    return open_dataset(f"{path}:train", **options), open_dataset(f"{path}:held-out", **options)


def rows(data: ImageDataset) -> list[bytes]:
    return [image.tobytes() for image in data.uint8]


def names_of(source: str) -> Sequence[str]:
    found = find_source(source)
    assert not isinstance(found, ImageDataset)
    return found.names


@pytest.fixture
def faces() -> dict[str, bytes]:
    """Thirty pictures of ten people, three of each."""
    return {f"00000/img{i:08d}.png": file_of(picture(seed=i)) for i in range(30)}


def people(faces: dict[str, bytes]) -> list[list[str]]:
    return [[name, f"person {i % 10}"] for i, name in enumerate(faces)]


def test_parts_of_the_digits() -> None:
    train, rest = both("digits")
    assert (len(train), len(rest)) == (1198, 599)
    assert (train.name, rest.name) == ("digits:train", "digits:held-out")
    assert train.manifest.source == f"{digits().manifest.source}:train"
    # Pinned: other values mean other images, and runs and scores that cannot be compared.
    assert train.manifest.sha256 == "ab40b11a27e578571c43073d492054a7c153078c0a6fb8c935644b9aeecdb79e"
    assert rest.manifest.sha256 == "3e4040062f8f52ab2147fe34991d57f0793704c5a35023f94308bd3ec6f4f5ba"
    whole = sorted(zip(rows(digits()), digits().class_ids.tolist(), strict=True))  # type: ignore[union-attr]
    parts = [(x, y) for d in (train, rest) for x, y in zip(rows(d), d.class_ids.tolist(), strict=True)]  # type: ignore[union-attr]
    assert sorted(parts) == whole  # every image is in one of the parts, once
    assert train.classes == rest.classes == 10
    held, of = (np.bincount(d.class_ids) for d in (rest, digits()))  # type: ignore[arg-type]
    assert np.array_equal(held, np.round(of / 3))
    assert [i for i, n in enumerate(names_of("digits:train")) if int(n) < i] == []  # the order stays


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("digits", "digits", None),
        ("digits:train", "digits", TRAIN),
        ("a:b/faces.zip:held-out", "a:b/faces.zip", HELD_OUT),
        ("digits:test", "digits:test", None),
        (":train", ":train", None),
        ("hf:cifar10:train", "hf:cifar10:train", None),
        ("digits:train:held-out", "digits:train", HELD_OUT),
        ("digits:train/", "digits:train/", None),  # a folder of that name
    ],
)
def test_names_of_parts(text: str, name: str, part: str | None) -> None:
    assert name_and_part(text) == (name, part)


def test_every_kind_of_source_is_divided_alike(make_zip: Zip, faces: dict[str, bytes], tmp_path: Path) -> None:
    path = make_zip(faces, labels=[[name, i % 2] for i, name in enumerate(faces)])
    for name, content in faces.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder" / "dataset.json").write_text(
        json.dumps({"labels": [[name, i % 2] for i, name in enumerate(faces)]})
    )
    whole = open_dataset(path)
    assert whole.class_ids is not None
    np.savez(tmp_path / "set.npz", arr_0=whole.uint8, arr_1=whole.class_ids)
    np.save(tmp_path / "plain.npy", whole.uint8)
    train, rest = both(path)
    assert (len(train), len(rest)) == (20, 10)
    assert np.bincount(rest.class_ids).tolist() == [5, 5]  # type: ignore[arg-type]
    assert sorted(rows(train) + rows(rest)) == sorted(rows(whole))
    assert train.name == "set:train" and train.manifest.source == f"{path}:train"
    for other in (tmp_path / "folder", tmp_path / "set.npz"):
        assert [d.manifest.sha256 for d in both(other)] == [d.manifest.sha256 for d in (train, rest)], other
    unlabelled = both(tmp_path / "plain.npy")
    assert [len(d) for d in unlabelled] == [20, 10] and unlabelled[0].class_ids is None
    assert sorted(rows(unlabelled[0]) + rows(unlabelled[1])) == sorted(rows(whole))


def test_an_existing_folder_named_like_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits:train").mkdir()
    picture().save("digits:train/a.png")
    assert len(open_dataset("digits:train")) == 1198
    assert len(open_dataset("./digits:train/")) == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_a_group_is_in_one_part(make_zip: Zip, faces: dict[str, bytes], labelled: bool) -> None:
    labels = [[name, i % 2] for i, name in enumerate(faces)] if labelled else None
    path = make_zip(faces, labels=labels, groups=people(faces))
    person = dict(people(faces))
    parts = [{person[name] for name in names_of(f"{path}:{part}")} for part in (TRAIN, HELD_OUT)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 10
    train, rest = both(path)
    assert len(train) + len(rest) == 30 and len(rest) == 3 * len(parts[1])
    assert open_dataset(path).manifest.sha256 == open_dataset(make_zip(faces, labels=labels)).manifest.sha256


def test_images_without_a_group_are_alone(make_zip: Zip, faces: dict[str, bytes]) -> None:
    path = make_zip(faces, labels=None, groups=people(faces)[:2] + [[list(faces)[2], "person 0"]])
    found = find_source(path)
    assert not isinstance(found, ImageDataset) and found.groups is not None
    assert list(found.groups) == ["person 0", "person 1", "person 0", *list(faces)[3:]]


def test_a_group_of_two_classes_is_in_one_part(make_zip: Zip, faces: dict[str, bytes]) -> None:
    """Held out for either class, it is held out in both."""
    labels = [[name, i // 15] for i, name in enumerate(faces)]
    pairs = [[name, str(i % 15)] for i, name in enumerate(faces)]  # one of each class
    train, rest = both(make_zip(faces, labels=labels, groups=pairs))
    counts = [np.bincount(d.class_ids).tolist() for d in (train, rest)]  # type: ignore[arg-type]
    assert all(a == b for a, b in counts) and sum(map(sum, counts)) == 30


def test_options_of_a_part() -> None:
    rest = open_dataset("digits:held-out", classes=[3, 8])
    assert set(rest.class_ids.tolist()) == {3, 8} and rest.classes == 10  # type: ignore[union-attr]
    assert set(rows(rest)) <= set(rows(open_dataset("digits:held-out")))
    few = open_dataset("digits:train", max_images=7, seed=2)
    assert len(few) == 7 and set(rows(few)) <= set(rows(open_dataset("digits:train")))
    assert few.manifest.what == "digits:train, 7 at most, seed 2"
    twice = open_dataset("digits:train", xflip=True)
    assert len(twice) == 2 * 1198
    assert np.array_equal(twice.uint8[1198:], open_dataset("digits:train").uint8[:, :, ::-1])
    mapped = open_dataset("digits:train", memory="mapped")
    assert mapped.manifest.sha256 == open_dataset("digits:train").manifest.sha256


def test_a_part_of_a_part() -> None:
    inner = open_dataset("digits:train:train")
    assert inner.name == "digits:train:train" and 790 < len(inner) < 810
    assert set(rows(inner)) < set(rows(open_dataset("digits:train")))


def test_a_run_finds_its_part_from_any_folder(
    make_zip: Zip, faces: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(faces, name="faces.zip")
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, want in (
        ("faces.zip:train", f"{path}:train"),
        (Path("faces.zip:held-out"), f"{path}:held-out"),
        ("faces.zip:train:held-out", f"{path}:train:held-out"),
        ("digits:train", "digits:train"),  # the built-in set, though a folder is called so
        ("./digits:train", f"{tmp_path / 'digits'}:train"),
        ("emoji:held-out", "emoji:held-out"),
        ("hf:faces:train", "hf:faces:train"),
        ("nowhere.zip:train", "nowhere.zip:train"),
    ):
        assert gddlab.presets.digits(run_dir="r", data=given).data == want
        assert gddlab.TeacherConfig(run_dir="t", data=given).data == want  # type: ignore[arg-type]
    config = gddlab.presets.digits(run_dir="r", data="faces.zip:train")
    config.write()
    assert json.loads(Path("r/config.json").read_text())["data"] == f"{path}:train"
    monkeypatch.chdir("r")
    assert len(open_dataset(gddlab.TrainConfig.load(tmp_path / "r").data)) == 20


def test_prepare_of_a_part_keeps_groups(make_zip: Zip, faces: dict[str, bytes], tmp_path: Path) -> None:
    labels = [[name, i % 2] for i, name in enumerate(faces)]
    path = make_zip(faces, labels=labels, groups=people(faces))
    part = tmp_path / "part.zip"
    report = prepare(f"{path}:train", part, progress=False)
    assert report.sha256 == open_dataset(f"{path}:train").manifest.sha256 == open_dataset(part).manifest.sha256
    assert open_dataset(part).manifest.extra["from"] == f"{path}:train"
    whole = tmp_path / "whole.zip"
    prepare(path, whole, progress=False)
    assert [d.manifest.sha256 for d in both(whole)] == [d.manifest.sha256 for d in both(path)]
    found = [find_source(p) for p in (path, whole)]
    assert found[0].groups == found[1].groups == [g for _, g in people(faces)]  # type: ignore[union-attr]


def test_prepare_of_a_part_does_not_write_into_its_folder(tmp_path: Path) -> None:
    for i in range(6):
        picture(seed=i).save(tmp_path / f"{i}.png")
    with pytest.raises(GddlabError, match="is inside the source"):
        prepare(f"{tmp_path}:train", tmp_path / "out.zip", progress=False)


def test_the_data_of_a_card_are_found_again() -> None:
    for name, options in (("digits:train", {}), ("digits:held-out", {"classes": [1, 2]})):
        used = open_dataset(name, **options)  # type: ignore[arg-type]
        card = SimpleNamespace(data=name, manifest=used.manifest.to_dict())
        found = data_of(card)
        assert found is not None and found.manifest == used.manifest
        card.data = "digits"
        with pytest.raises(GddlabError, match="holds other images than this network was trained on"):
            data_of(card)


def test_doctor_looks_for_the_set_that_a_part_is_of(
    make_zip: Zip, faces: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("own", "digits:train"), ("faces", "faces.zip:train"), ("rest", "faces.zip:held-out")):
        monkeypatch.setitem(PRESETS, name, partial(gddlab.presets.digits, data=data))
    found = gddlab.doctor()
    assert found["preset own"].found
    assert found["preset faces"].value == "lacks faces.zip"
    assert [f.name for f in found.findings if f.section == "data" and ("faces" in f.name or "digits" in f.name)] == [
        "digits",
        "faces.zip",
    ]
    path = make_zip(faces, name="faces.zip")
    found = gddlab.doctor()
    assert found["preset faces"].found and found["preset rest"].found and found["faces.zip"].value == str(path)


def test_a_part_is_scored_by_its_name() -> None:
    found = open_source("digits:held-out")
    assert isinstance(found, ImageDataset) and len(found) == 599
    found = open_source("data:digits:train")
    assert isinstance(found, ImageDataset) and len(found) == 1198


def test_refusals_of_parts(make_zip: Zip, faces: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="unknown part of a data set 'test': accepted: train, held-out"):
        open_dataset("digits:test")
    with pytest.raises(GddlabError, match=r"unknown part of a data set 'held_out': did you mean 'held-out'\?"):
        open_dataset(f"{make_zip(faces)}:held_out")
    with pytest.raises(NotFound, match=r"no such file or folder: .*nowhere\.zip"):
        open_dataset("nowhere.zip:train")
    with pytest.raises(GddlabError, match="unknown dataset 'digit': did you mean 'digits'"):
        open_dataset("digit:train")
    one = make_zip(dict(list(faces.items())[:1]), name="one.zip")
    assert len(open_dataset(f"{one}:train")) == 1
    with pytest.raises(GddlabError, match="has 1 images, none of them is in the part 'held-out'"):
        open_dataset(f"{one}:held-out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with pytest.raises(GddlabError, match=r"a\.png: empty file"):
        open_dataset(f"{tmp_path / 'bad'}:train")


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ("anna", r"its groups are anna, accepted is \[\[name, group\], \.\.\.\]"),
        (["a.png"], r"entry 0 is a\.png, accepted is \[name, group\]"),
        ([["a.png", 3]], r"the group of a\.png is 3, accepted is text"),
        ([["a.png", "x"], ["a.png", "y"]], r"a\.png: labelled twice"),
        ([["c.png", "x"]], r"c\.png: no such image \(it has a group in dataset\.json\)"),
    ],
)
@pytest.mark.parametrize("labels", [None, [["a.png", 0], ["b.png", 1]]])
def test_refusals_of_groups(make_zip: Zip, groups: object, why: str, labels: object) -> None:
    files = {name: file_of(picture(seed=i)) for i, name in enumerate(("a.png", "b.png"))}
    path = make_zip(files, labels=labels, groups=groups)
    for name in (path, f"{path}:train"):
        with pytest.raises(GddlabError, match=why):
            open_dataset(name)


def test_groups_of_a_table() -> None:
    content = json.dumps({"labels": None, "groups": [["./b", "g"], ["a", "g"]]}).encode()
    found = classes_of_table(["a", "b", "c"], content)
    assert found.ids is None and found.groups == ["g", "g", "c"] and not found.problems
    assert classes_of_table(["a"], b'{"labels": null, "groups": []}').groups is None
