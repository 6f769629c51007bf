"""Folders, zips, Hugging Face: which images and classes a source has, and what it is refused for."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset, digits, open_dataset, prepare, readers
from gddlab.datasets.base import content_hash
from gddlab.datasets.listing import classes_of_table, image_files
from gddlab.datasets.readers import of_zip
from gddlab.errors import GddlabError, NotFound
from tests.datasets.conftest import bad_images, file_of, picture

Zip = Callable[..., Path]


def pixels(n: int) -> np.ndarray:
    return np.stack([np.asarray(picture(seed=i)) for i in range(n)])


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def named(*names: str) -> dict[str, bytes]:
    return {n: file_of(picture(seed=i)) for i, n in enumerate(names)}


def test_zip_with_labels(make_zip: Zip, pictures: dict[str, bytes]) -> None:
    path = make_zip(pictures, labels=[[n, i % 3] for i, n in reversed(list(enumerate(pictures)))])
    data = open_dataset(path)
    assert np.array_equal(data.uint8, pixels(12))
    assert data.class_ids is not None
    assert data.class_ids.tolist() == [i % 3 for i in range(12)]
    m = data.manifest
    assert (m.name, m.count, m.classes, m.resolution, m.channels) == ("set", 12, 3, 8, 3)
    assert (m.crop, m.filter, m.codec) == ("unknown", "unknown", "png")
    assert m.sha256 == content_hash(data.uint8, data.class_ids)
    assert data.images([1]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("tables", [{}, {"labels": None}])
def test_zip_without_labels(make_zip: Zip, pictures: dict[str, bytes], tables: dict[str, Any]) -> None:
    data = open_dataset(make_zip(pictures, **tables))
    assert data.class_ids is None
    assert data.classes == 0
    assert data.labels([0, 1]).shape == (2, 0)


def test_members_are_read_in_order_of_name(make_zip: Zip, pictures: dict[str, bytes]) -> None:
    path = make_zip(dict(reversed(list(pictures.items()))))
    assert np.array_equal(open_dataset(path).uint8, pixels(12))


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["a.png", "b.png"], None, None),
        (["cat/1.png", "cat/2.png", "dog/0.png"], [0, 0, 1], ["cat", "dog"]),
        (["cat/deep/1.png", "dog/0.png"], [0, 1], ["cat", "dog"]),
        (["10/a.png", "9/a.png", "9/b.png"], [1, 0, 0], ["9", "10"]),
        (["images/a.png", "images/b.png"], None, None),
        (["00000/img00000000.png", "00001/img00001000.png"], None, None),
        (["000000/000001.png", "001000/001234.png"], None, None),
        (["00000/00002.png", "01000/01007.png"], None, None),
        (["00000/00002.png", "00001/00007.png"], [0, 1], ["00000", "00001"]),  # no shards: 7 is not of folder 1
    ],
)
def test_folders_are_classes_or_shards(
    tmp_path: Path, make_zip: Zip, names: list[str], labels: list[int] | None, classes: list[str] | None
) -> None:
    files = named(*names)
    for source in (write(tmp_path / "set", files), make_zip(files)):
        data = open_dataset(source)
        assert (None if data.class_ids is None else data.class_ids.tolist()) == labels
        assert data.manifest.extra.get("class_names") == classes
        assert np.array_equal(data.uint8, pixels(len(names)))
        assert data.name == "set"


def test_dataset_json_in_a_folder_goes_before_its_folders(tmp_path: Path) -> None:
    root = write(tmp_path / "set", named("a/1.png", "b/1.png"))
    (root / "dataset.json").write_text(json.dumps({"labels": [["b\\1.png", 7], ["a/1.png", 0]]}))
    data = open_dataset(str(root))
    assert data.class_ids is not None
    assert data.class_ids.tolist() == [0, 7]
    assert data.classes == 8


def test_files_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    root = write(tmp_path / "set", named("a.png", ".hidden.png", ".git/b.png", "__MACOSX/a.png"))
    write(root, {"README.txt": b"", "Thumbs.db": b""})
    (root / "loop").symlink_to(root)
    assert len(open_dataset(root)) == 1


def refused(source: Path, *words: str) -> None:
    with pytest.raises(GddlabError) as e:
        open_dataset(source, progress=False)
    text = str(e.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_labels_that_do_not_fit_are_refused_by_name(make_zip: Zip, pictures: dict[str, bytes]) -> None:
    names = list(pictures)
    good = [[n, 0] for n in names]
    path = make_zip(pictures, labels=good[:-1])
    refused(path, f"{names[-1]}: no label", "1 problem")
    with pytest.raises(GddlabError, match="no label"):
        open_dataset(path, classes=[0])
    refused(make_zip(pictures, labels=[*good[1:], [names[0], -1]]), f"{names[0]}: class id out of range (-1")
    refused(make_zip(pictures, labels=[*good[1:], [names[0], 10**9]]), f"{names[0]}: class id out of range (1000000000")
    for y in (0.5, "0", None, True, [0]):
        refused(make_zip(pictures, labels=[*good[1:], [names[0], y]]), f"{names[0]}: class id is no integer ({y}")
    refused(make_zip(pictures, labels=[*good, good[0]]), f"{names[0]}: labelled twice")
    refused(make_zip(pictures, labels=[*good, ["x.png", 0]]), "x.png: no such image")
    refused(make_zip(pictures, labels={"a": 0}), "dataset.json: damaged labels")
    refused(make_zip(pictures, labels=[["a"], *good]), "entry 0 is ['a']")
    for content in (b"{", b""):
        refused(make_zip(pictures | {"dataset.json": content}), "dataset.json: damaged labels (no JSON")
    refused(make_zip(pictures | {"dataset.json": b"[" * 100_000}), "dataset.json: damaged labels (no JSON")
    about = {"crop": "none", "filter": "none", "codec": "png", "sha256": "0" * 64, "classes": 3}
    last = [*good[1:], [names[0], 3]]
    refused(
        make_zip(pictures, labels=last, manifest=about), f"{names[0]}: class id out of range (3, accepted are 0..2)"
    )


def test_folders_with_gaps_are_refused_by_name(tmp_path: Path) -> None:
    root = write(tmp_path / "set", named("a/1.png", "b/1.png", "lost.png"))
    refused(root, "lost.png: no label (it is in no class folder)")
    (root / "lost.png").unlink()
    (root / "c").mkdir()
    refused(root, "c: class folder without images")


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, kind = bad_images()[name]
    root = write(tmp_path / "set", named("000.png", "001.png") | {name: content})
    refused(root, f"{name}: {kind}", "(2 images)" if kind == "format not read" else "(3 images)")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_zips_are_refused(make_zip: Zip, pictures: dict[str, bytes], tmp_path: Path) -> None:
    png = pictures["00000/img00000000.png"]
    for name in ("../x.png", "/x.png", "C:/x.png", "a/../../x.png", "a\\x.png"):
        refused(make_zip(pictures | {name: png}), "path not accepted")
    path = make_zip(pictures)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("00000/img00000003.png", png)
    refused(path, "00000/img00000003.png: name used twice")
    content = bytearray(make_zip(pictures).read_bytes())
    path.write_bytes(content[:-400])
    refused(path, "a zip without its end")
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    refused(path, "damaged (Bad CRC-32", "img0000000")
    refused(make_zip({"readme.txt": b""}), "has no images (it has 1 .txt)")
    refused(make_zip({}), "has no images (it has nothing)")


def test_tables_may_be_larger_than_images(
    make_zip: Zip, pictures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"dataset.json": json.dumps({"labels": [[n, 0] for n in pictures]}).encode()}
    largest = max(map(len, pictures.values()))
    monkeypatch.setattr(readers, "_MAX_FILE", largest)
    assert len(table["dataset.json"]) > largest
    for source in make_zip(pictures | table), write(tmp_path / "folder", pictures | table):
        monkeypatch.setattr(readers, "_MAX_TABLE", 1 << 30)
        assert open_dataset(source).classes == 1
        monkeypatch.setattr(readers, "_MAX_TABLE", largest)
        refused(source, "dataset.json: too large", f"accepted are {largest}")


@pytest.mark.parametrize("name", ["dataset.json", "manifest.json"])
def test_a_broken_link_to_a_table_is_refused(tmp_path: Path, pictures: dict[str, bytes], name: str) -> None:
    (write(tmp_path / "folder", pictures) / name).symlink_to(tmp_path / "gone.json")
    refused(tmp_path / "folder", f"{name}: cannot be read (No such file or directory)")


def test_other_files_say_what_they_are(tmp_path: Path) -> None:
    for content, what in (
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page (HTML)"),
        (b"", "empty"),
        (b"\0\1\2\3", "of no known kind"),
    ):
        (tmp_path / "x.zip").write_bytes(content)
        refused(tmp_path / "x.zip", what)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no images")
    with pytest.raises(NotFound, match="no such file or folder"):
        open_dataset("nothing/here.zip")
    with pytest.raises(NotFound, match="no such file or folder"):
        open_dataset("photos/")
    with pytest.raises(GddlabError, match="unknown memory 'disk'"):
        open_dataset("digits", memory="disk")


def test_manifest_of_another_content_is_refused(make_zip: Zip, pictures: dict[str, bytes]) -> None:
    about = {"name": "n", "crop": "center", "filter": "box", "codec": "c", "classes": 0, "extra": {"class_names": None}}
    right = content_hash(pixels(12), None)
    data = open_dataset(make_zip(pictures, manifest=about | {"sha256": right}))
    m = data.manifest
    assert (m.name, m.crop, m.filter, m.codec, m.sha256) == ("n", "center", "box", "c", right)
    refused(
        make_zip(pictures, manifest=about | {"sha256": "0" * 64}), "not those of its manifest", "prepare the data again"
    )
    refused(make_zip(pictures | {"manifest.json": b"{"}), "manifest.json is damaged")
    assert len(open_dataset(make_zip(pictures, manifest=about | {"sha256": "0" * 64}), max_images=3)) == 3


@pytest.mark.parametrize("memory", ["ram", "mapped"])
def test_options_choose_and_mirror(make_zip: Zip, pictures: dict[str, bytes], memory: str) -> None:
    path = make_zip(pictures, labels=[[n, i % 3] for i, n in enumerate(pictures)])
    whole = open_dataset(path)
    assert whole.class_ids is not None
    some = open_dataset(path, classes=[0, 2], memory=memory)
    keep = whole.class_ids != 1
    assert np.array_equal(some.uint8, whole.uint8[keep])
    assert some.class_ids is not None
    assert np.array_equal(some.class_ids, whole.class_ids[keep])
    for same in {0, 2}, {0: "a", 2: "c"}.keys(), np.array([0, 2]):
        assert open_dataset(path, classes=same).manifest == open_dataset(path, classes=[0, 2]).manifest
    assert some.classes == 3  # ids keep their meaning
    twice = open_dataset(path, xflip=True, memory=memory)
    assert len(twice) == 24
    assert torch.equal(twice.images(slice(12, 24)), whole.images().flip(3))
    assert torch.equal(twice.labels(slice(12, 24)), whole.labels())
    assert twice.manifest.extra["options"] == {"xflip": True}
    drawn = [open_dataset(path, max_images=5, seed=s, memory=memory) for s in (0, 0, 1)]
    assert np.array_equal(drawn[0].uint8, drawn[1].uint8)
    assert not np.array_equal(drawn[0].uint8, drawn[2].uint8)
    at = [next(i for i in range(12) if np.array_equal(whole.uint8[i], x)) for x in drawn[0].uint8]
    assert at == sorted(set(at))
    assert drawn[0].manifest.extra["options"] == {"max_images": 5, "seed": 0}
    assert drawn[0].manifest.sha256 == content_hash(drawn[0].uint8, drawn[0].class_ids)
    assert len(open_dataset(path, max_images=99)) == 12
    for bad in (
        {"classes": [3]},
        {"classes": []},
        {"classes": 1},
        {"max_images": 0},
        {"max_images": 1.5},
        {"seed": 0.5},
    ):
        with pytest.raises(GddlabError, match=r"give some|max_images=|classes=|seed="):
            open_dataset(path, **({"max_images": 2} | bad))  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match="has no labels"):
        open_dataset(make_zip(pictures), classes=[0])


def test_datasets_are_taken_as_they_are() -> None:
    data = open_dataset("digits")
    assert open_dataset(data) is data is digits()
    ones = open_dataset(data, classes=[1])
    assert ones.class_ids is not None
    assert set(ones.class_ids.tolist()) == {1}
    assert ones.classes == 10
    assert ones.manifest.filter == "bilinear"


def test_mapped_images_are_decoded_once_and_shared(
    make_zip: Zip, pictures: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(pictures)
    monkeypatch.setattr("gddlab.datasets.store.usable_memory", lambda: (0, 12 * 8 * 8 * 3 * 4))
    assert not mapped(open_dataset(path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two copies would not fit
    first = open_dataset(path)
    assert mapped(first)
    assert np.array_equal(first.uint8, pixels(12))
    (array,) = (cache / "datasets").glob("*.npy")
    before = array.stat().st_mtime_ns
    monkeypatch.setattr("gddlab.datasets.store._fill", None)  # a second decoding would fail
    again = open_dataset(path)
    assert again.manifest == first.manifest
    again.uint8[0] = 0  # private: neither the file nor others see it
    assert first.uint8[0].any()
    assert open_dataset(path).uint8[0].any()
    assert array.stat().st_mtime_ns == before


def mapped(data: ImageDataset) -> bool:
    base: Any = data.uint8
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    return base is not None


def test_changed_sources_are_decoded_again(tmp_path: Path) -> None:
    root = write(tmp_path / "set", named("a.png", "b.png"))
    first = open_dataset(root, memory="mapped")
    write(root, {"b.png": file_of(picture(seed=77))})
    second = open_dataset(root, memory="mapped")
    assert np.array_equal(second.uint8[1], np.asarray(picture(seed=77)))
    assert first.manifest.sha256 != second.manifest.sha256


def test_a_failed_decoding_leaves_no_array(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "set", named("a.png") | {"b.png": b""})
    with pytest.raises(GddlabError, match=r"b\.png: empty file"):
        open_dataset(root, memory="mapped")
    assert [p.suffix for p in (cache / "datasets").iterdir()] == [".lock"]


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(GddlabError, match="set GDDLAB_CACHE to a folder that can be written"):
        open_dataset("digits", memory="mapped")


READ = """
import sys, time
from gddlab.datasets import open_dataset, store
fill = store._fill
def slow(*args):
    time.sleep(1)
    print("decoded")
    fill(*args)
store._fill = slow
print(open_dataset(sys.argv[1], memory="mapped").manifest.sha256)
"""


def test_processes_decode_once_between_them(make_zip: Zip, pictures: dict[str, bytes], cache: Path) -> None:
    command = [sys.executable, "-c", READ, str(make_zip(pictures))]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    words = " ".join(r.communicate(timeout=60)[0] for r in ranks).split()
    digest = content_hash(pixels(12), None)
    assert sorted(words) == sorted(["decoded", digest, digest])
    assert len(list((cache / "datasets").glob("*.npy"))) == 1


def test_a_forked_process_opens_the_zip_for_itself(make_zip: Zip) -> None:
    files = {f"{i:03d}.png": bytes([i]) * 50_000 for i in range(100)}
    reader = of_zip(make_zip(files))
    assert reader.read("000.png") == files["000.png"]
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)

    def read_all() -> None:
        ready.wait(30)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if not all(reader.read(n) == content for n, content in files.items()):
                os._exit(1)

    child = context.Process(target=read_all)
    child.start()
    ready.wait(30)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:  # both at once: one file position for two would mix their images
        assert all(reader.read(n) == content for n, content in files.items())
    child.join(30)
    assert child.exitcode == 0


def test_listing_is_linear() -> None:
    def seconds(n: int) -> float:
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(n)]
        labels = json.dumps({"labels": [[m, i % 10] for i, m in enumerate(names)]}).encode()
        began = time.process_time()
        images, problems, _ = image_files(names)
        found = classes_of_table(images, labels)
        assert (len(images), found.count, problems, found.problems) == (n, 10, [], ())
        assert found.ids is not None
        return time.process_time() - began

    gc.disable()  # it walks through whatever other tests left
    few, many = (min(seconds(n) for _ in range(3)) for n in (3_000, 60_000))
    gc.enable()
    assert many < 80 * few  # 20 if linear, 400 if quadratic


def test_all_names_of_jpegs_and_pngs_are_read(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "JFIF": "JPEG", "png": "PNG", "apng": "PNG"}
    for suffix, kind in kinds.items():
        (tmp_path / f"x.{suffix}").write_bytes(file_of(picture(), kind))
    assert len(open_dataset(tmp_path)) == 6


def test_grey_among_colour_names_the_mode(tmp_path: Path) -> None:
    files = named("a.png", "b.png") | {
        "c.png": file_of(picture().convert("1")),
        "d.png": file_of(picture().convert("L")),
    }
    write(tmp_path / "set", files)
    with pytest.raises(GddlabError, match=r"c.png: colours differ \(mode 1, the first has RGB\); d.png: .*mode L") as e:
        open_dataset(tmp_path / "set")
    assert str(e.value).endswith(": run gddlab.prepare, which makes all of them RGB")
    prepare(tmp_path / "set", tmp_path / "set.zip", workers=1, progress=False)
    assert open_dataset(tmp_path / "set.zip").channels == 3


def test_a_name_of_the_hub_without_hf_gets_the_hint() -> None:
    with pytest.raises(NotFound, match="no such file or folder: huggan/AFHQv2; of the Hugging Face hub, give 'hf:hug"):
        open_dataset("huggan/AFHQv2")


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was touched")

    before = constants.HF_HUB_OFFLINE
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    began = time.monotonic()
    with pytest.raises(GddlabError, match=r"'hf:cifar10' is not on this machine, and GDDLAB_OFFLINE is set .*: unset"):
        open_dataset("hf:cifar10")
    assert time.monotonic() - began < 10  # a request and its repetitions take 23 s
    assert before == constants.HF_HUB_OFFLINE


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"img": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [picture(seed=i) for i in range(4)], "label": [0, 1, 1, 0]}
    hf.DatasetDict({"test": hf.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "disk")
    data = open_dataset(f"hf:{tmp_path / 'disk'}:test")
    assert np.array_equal(data.uint8, pixels(4))
    assert data.class_ids is not None
    assert data.class_ids.tolist() == [0, 1, 1, 0]
    assert data.manifest.extra["class_names"] == ["cat", "dog"]
    with pytest.raises(GddlabError, match="cannot be loaded"):
        open_dataset(f"hf:{tmp_path / 'disk'}:train")
    plain = hf.Dataset.from_dict({"text": ["a"]})
    plain.save_to_disk(tmp_path / "text")
    with pytest.raises(GddlabError, match=r"0 columns of images \(columns: text\)"):
        open_dataset(f"hf:{tmp_path / 'text'}")
    for address in ("hf:", "hf:a:b:c:d", "hf:a::b"):
        with pytest.raises(GddlabError, match="give hf:NAME"):
            open_dataset(address)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GddlabError, match="needs the package datasets: run pip install datasets"):
        open_dataset("hf:other")


def test_a_choice_of_a_choice_is_refused() -> None:
    """Its card would know the second alone, and others could not find the images again."""
    some = open_dataset("digits", classes=[3, 5])
    assert len(open_dataset(some)) == len(some)
    with pytest.raises(GddlabError, match=r"chosen by {'classes': \[3, 5\]} already: give all options at once"):
        open_dataset(some, max_images=10)
