"""prepare: equal zips however it ran, honest manifests, and a report that names every bad file."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from gddlab.cli import main
from gddlab.datasets import PrepareReport, digits, open_dataset, prepare
from gddlab.datasets.packing import Entry, in_workers
from gddlab.errors import GddlabError, NotFound
from tests.datasets.conftest import bad_images, file_of, picture

making = sys.modules["gddlab.datasets.prepare"]  # the package has a function of that name
Zip = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images of two classes, of all shapes."""
    root = tmp_path / "photos"
    for i in range(40):
        folder = root / ("cat" if i % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        kind = ("jpg", "JPEG") if i % 2 else ("png", "PNG")
        (folder / f"{i:03d}.{kind[0]}").write_bytes(file_of(picture(20 + i % 7, 30 - i % 5, seed=i), kind[1]))
    return root


def expected(path: Path, side: int) -> np.ndarray:
    """The centre square, resampled, by the definition."""
    im = Image.open(path)
    a = np.asarray(im)
    s = min(a.shape[:2])
    y, x = (a.shape[0] - s) // 2, (a.shape[1] - s) // 2
    return np.asarray(Image.fromarray(a[y : y + s, x : x + s]).resize((side, side), Image.Resampling.LANCZOS))


def test_zip_is_what_the_manifest_says(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "pets.zip"
    report = prepare(photos, out, resolution=16, crop="center", workers=1)
    assert [p.name for p in out.parent.iterdir()] == ["pets.zip"]
    with zipfile.ZipFile(out) as z:
        names = [f"00000/img{i:08d}.png" for i in range(40)]
        assert z.namelist() == [*names, "dataset.json", "manifest.json"]
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(z.read("manifest.json"))
        labels = json.loads(z.read("dataset.json"))["labels"]
    data = open_dataset(out)
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))
    assert np.array_equal(data.uint8, np.stack([expected(photos / f, 16) for f in files]))
    assert labels == [[n, int(f.startswith("dog"))] for n, f in zip(names, files, strict=True)]
    opened = data.manifest.to_dict()
    assert opened.pop("source") == str(out)
    assert opened["extra"].pop("from") == manifest.pop("source") == str(photos)
    assert manifest == opened
    assert report.sha256 == data.manifest.sha256
    assert (manifest["crop"], manifest["filter"], manifest["classes"]) == ("center", "lanczos", 2)
    assert manifest["codec"].startswith("jpg+png to png by Pillow ")
    assert manifest["extra"]["class_names"] == ["cat", "dog"]
    assert manifest["extra"]["changed"]["reduced"] == 40
    assert str(report).startswith(f"{out}: 40 images, 16x16, RGB, 2 classes, sha256 {report.sha256[:16]}\n")


def test_processes_make_the_same_zip(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, two = tmp_path / "a.zip", tmp_path / "b" / "a.zip"
    prepare(photos, one, resolution=16, crop="center", workers=1)
    prepare(photos, two, resolution=16, crop="center", workers=2)
    assert one.read_bytes() == two.read_bytes()


def test_relative_paths_and_hugging_face(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare("photos", "o.zip", resolution=16, crop="center", workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.zip", "photos"]
    hf = pytest.importorskip("datasets")
    rows = {"image": [picture(seed=i) for i in range(9)]}
    hf.Dataset.from_dict(rows, features=hf.Features({"image": hf.Image()})).save_to_disk("rows")
    prepare("hf:rows", "hf.zip", workers=2)
    assert np.array_equal(open_dataset("hf.zip").uint8, np.stack([np.asarray(im) for im in rows["image"]]))


def test_nothing_done_is_recorded_as_nothing(make_zip: Zip, pictures: dict[str, bytes], tmp_path: Path) -> None:
    first, again = tmp_path / "first.zip", tmp_path / "again.zip"
    prepare(make_zip(pictures), first, crop="center", filter="box", workers=1)
    m = open_dataset(first).manifest
    assert (m.crop, m.filter) == ("unknown", "unknown")  # what was done before is not known
    prepare("digits", again, workers=1)
    data = open_dataset(again)
    assert data.manifest.sha256 == digits().manifest.sha256
    assert (data.manifest.crop, data.manifest.filter) == ("none", "bilinear")
    small = tmp_path / "small.zip"
    report = prepare(again, small, resolution=8, filter="box", classes=[1, 2], max_images=20, seed=3, workers=1)
    data = open_dataset(small)
    assert data.manifest.filter == "bilinear, box"
    assert (len(data), data.classes, data.channels, report.classes) == (20, 10, 1, 10)
    assert data.class_ids is not None
    assert set(data.class_ids.tolist()) <= {1, 2}
    assert data.manifest.extra["options"] == {"classes": [1, 2], "max_images": 20, "seed": 3}


def test_grey_among_colour_and_transparency(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "a.png").write_bytes(file_of(picture(channels=1)))
    (root / "b.png").write_bytes(file_of(picture().convert("RGBA")))
    with pytest.raises(GddlabError, match=r"b\.png: alpha channel \(mode RGBA\): give alpha='white'"):
        prepare(root, tmp_path / "o.zip", workers=1)
    report = prepare(root, tmp_path / "o.zip", alpha="white", workers=1)
    data = open_dataset(tmp_path / "o.zip")
    assert np.array_equal(data.uint8[0], np.asarray(picture(channels=1).convert("RGB")))
    assert np.array_equal(data.uint8[1], np.asarray(picture()))
    assert any("repeated to RGB: 1" in n for n in report.notes)
    assert any("composed: 1" in n for n in report.notes)


def test_dry_run_names_every_bad_file_and_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for i in range(30):
        (root / f"{i:03d}.png").write_bytes(file_of(picture(seed=i)))
    bad = bad_images()
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    (root / "notes.txt").write_text("")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    report = prepare(root, dry_run=True, workers=2)
    assert sorted(tmp_path.rglob("*")) == before
    found = {p.name: p.kind for p in report.problems}
    assert found == {name: kind for name, (_, kind) in bad.items()} | {"gone.png": "cannot be read"}
    assert len(report.problems) == len(found) + 1  # half.jpg is of another size, too
    text = str(report)
    assert all(name in text for name in found)
    assert "files skipped, no images by name (.txt): 1" in text
    assert not report.ok
    with pytest.raises(GddlabError) as e:
        prepare(root, tmp_path / "o.zip", workers=2)
    assert "phone.heic: format not read" in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_that_only_decoding_shows_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    content = file_of(picture(64, 64), "JPEG")
    (photos / "cat" / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(GddlabError, match=r"cat/x\.jpg: damaged \(image file is truncated"):
        prepare(photos, tmp_path / "o.zip", resolution=16, crop="center", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    (photos / "cat" / "x.jpg").unlink()
    assert prepare(photos, tmp_path / "o.zip", resolution=16, crop="center", workers=1).images == 40


def test_labels_missing_in_a_zip_are_reported(make_zip: Zip, pictures: dict[str, bytes], tmp_path: Path) -> None:
    path = make_zip(pictures, labels=[[n, 12 if i == 1 else 0.5] for i, n in enumerate(pictures) if i])
    report = prepare(path, dry_run=True, workers=1)
    kinds = [p.kind for p in report.problems]
    assert kinds.count("class id is no integer") == 10
    assert kinds.count("no label") == 1
    with pytest.raises(GddlabError, match=r"has 11 problems: 00000/img00000000\.png: no label"):
        prepare(path, tmp_path / "o.zip", workers=1)


def test_many_problems_are_grouped(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for i in range(50):
        (root / f"{i:03d}.png").write_bytes(b"")
    report = prepare(root, dry_run=True, workers=1)
    assert len(report.problems) == 50
    assert "empty file: 50\n" in str(report)
    assert "and 30 more" in str(report)
    assert report.resolution is None


def test_refusals(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.zip"
    for fields, words in (
        ({"crop": "centre"}, "unknown crop 'centre': did you mean 'center'"),
        ({"filter": "cubic"}, "unknown filter 'cubic'"),
        ({"alpha": "red"}, "unknown alpha 'red'"),
        ({"resolution": 0}, "resolution=0: input should be greater"),
        ({"resolution": 99999}, "resolution=99999: input should be less than or equal to 8192"),
        ({"workers": 0}, "workers=0"),
        ({"max_images": 0}, "max_images=0"),
        ({"classes": [2]}, r"classes=\[2\]: give some of 0\.\.1"),
    ):
        with pytest.raises(GddlabError, match=words):
            prepare(photos, out, **({"workers": 1} | fields))  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match="give the zip to make, or dry_run=True"):
        prepare(photos)
    with pytest.raises(GddlabError, match=r"give a file named \.zip"):
        prepare(photos, tmp_path / "o.tar")
    with pytest.raises(GddlabError, match="is inside the source"):
        prepare(photos, photos / "o.zip")
    with pytest.raises(NotFound, match="no such file or folder"):
        prepare(tmp_path / "nothing", out)
    out.write_bytes(b"old")
    with pytest.raises(GddlabError, match="exists: give another name, or replace it"):
        prepare(photos, out, resolution=16, crop="center", workers=1)
    assert out.read_bytes() == b"old"
    assert prepare(photos, out, resolution=16, crop="center", workers=1, overwrite=True).images == 40
    assert len(open_dataset(out)) == 40


def test_begun_with_other_options_is_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.zip"
    with monkeypatch.context() as m:
        m.setattr(making, "assemble", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(photos, out, resolution=16, crop="center", workers=1)
    with pytest.raises(
        GddlabError, match=r"o\.zip\.parts was started with resolution=16, now it is 8: continue with the former"
    ):
        prepare(photos, out, resolution=8, crop="center", workers=1)
    changed = photos / "cat" / "001.jpg"
    before = changed.stat()
    os.utime(changed, (0, 0))
    with pytest.raises(GddlabError, match=r"was started with files='\w+', now it is"):
        prepare(photos, out, resolution=16, crop="center", workers=1)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    with monkeypatch.context() as m:
        m.setattr(making, "fit", None)  # nothing is made again
        prepare(photos, out, resolution=16, crop="center", workers=1)
    assert len(open_dataset(out)) == 40


def test_a_full_disk_leaves_the_parts(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, out = making.write_part, tmp_path / "o.zip"

    def full(folder: Path, k: int, entries: list[Entry]) -> None:
        if k == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, k, entries)

    with monkeypatch.context() as m:
        m.setattr(making, "write_part", full)
        with pytest.raises(GddlabError, match=r"o\.zip cannot be made .*No space left on device.*: make room"):
            prepare(photos, out, resolution=16, crop="center", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.zip.parts", "photos"]
    prepare(photos, out, resolution=16, crop="center", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.zip", "photos"]


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from gddlab.datasets import prepare
making = sys.modules["gddlab.datasets.prepare"]
if {end}:
    real = making.assemble
    import os, signal
    making.assemble = lambda f, n, out, m: real(f, n, out, lambda z: os.kill(os.getpid(), signal.SIGKILL))
prepare(sys.argv[1], sys.argv[2], resolution=16, crop="center", workers=2)
"""


def start(source: Path, out: Path, *, end: bool = False) -> subprocess.Popen[str]:
    """prepare in a process group of its own, without a guard around the main module."""
    script = out.parent / "script.py"
    script.write_text(SCRIPT.format(end=end))
    env = os.environ | {"PYTHONPATH": os.getcwd(), "GDDLAB_TEST_MARK": str(out)}
    command = [sys.executable, str(script), str(source), str(out)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def left(out: Path) -> list[int]:
    """Processes that `start` began and that still run."""
    mark = f"GDDLAB_TEST_MARK={out}".encode()
    found = []
    for p in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in p.read_bytes().split(b"\0"):
                found.append(int(p.parent.name))
        except OSError:
            continue
    return found


def gone(out: Path) -> bool:
    until = time.monotonic() + 20
    while left(out) and time.monotonic() < until:
        time.sleep(0.05)
    return not left(out)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Images that take a second, by links to a few files; and the zip of an undisturbed run."""
    top = tmp_path_factory.mktemp("large")
    root = top / "large"
    root.mkdir()
    for i in range(4):
        (top / f"{i}.jpg").write_bytes(file_of(picture(420, 400, seed=i), "JPEG"))
    for i in range(256):
        (root / f"{i:04d}.jpg").symlink_to(top / f"{i % 4}.jpg")
    prepare(root, top / "o.zip", resolution=16, crop="center", workers=1)
    return root, (top / "o.zip").read_bytes()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["kill", "interrupt", "kill at the end"])
def test_killed_and_called_again_equals_undisturbed(large: tuple[Path, bytes], tmp_path: Path, how: str) -> None:
    source, undisturbed = large
    (tmp_path / "made").mkdir()
    out = tmp_path / "made" / "o.zip"
    parts = out.with_name("o.zip.parts")
    run = start(source, out, end=how == "kill at the end")
    if how != "kill at the end":
        while run.poll() is None and len(list(parts.glob("part-*.zip"))) < 2:
            time.sleep(0.01)
        if how == "kill":
            run.kill()
        else:
            os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C at a terminal: to all of the group
    text = run.communicate(timeout=60)[1]
    if how == "interrupt":
        assert run.returncode in (-signal.SIGINT, 1) and "ForkProcess" not in text  # one answer, not one per worker
    else:
        assert run.returncode == -signal.SIGKILL
    assert gone(out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["o.zip.parts", "script.py"]
    made = {p: p.stat().st_mtime_ns for p in parts.glob("part-*.zip")}
    assert len(made) == 16 if how == "kill at the end" else 2 <= len(made) < 16
    prepare(source, out, resolution=16, crop="center", workers=1)
    assert sorted(p.name for p in out.parent.iterdir()) == ["o.zip", "script.py"]
    assert out.read_bytes() == undisturbed


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(GddlabError, match="one of 2 worker processes was killed"):
        list(in_workers(os._exit, [1], 2))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_workers_keep_the_order(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are processes on Linux, threads elsewhere."""
    monkeypatch.setattr(sys, "platform", platform)
    met = multiprocessing.get_context("fork").Barrier(2) if platform == "linux" else threading.Barrier(2)

    def seven_times(i: int) -> tuple[int, bool]:
        met.wait(60)  # for a second worker
        return 7 * i, os.getpid() == parent

    parent = os.getpid()
    assert list(in_workers(seven_times, range(50), 2)) == [(7 * i, platform != "linux") for i in range(50)]


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_bar_ends_at_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool) -> None:
    bars = []

    def progress_bar(**about: Any) -> Any:
        bars.append(tqdm(total=about["total"], file=io.StringIO()))
        return bars[-1]

    for module in ("prepare", "store"):
        monkeypatch.setattr(sys.modules[f"gddlab.datasets.{module}"], "progress_bar", progress_bar)
    prepare(digits(), tmp_path / "x.zip", max_images=300, workers=1, dry_run=dry_run)
    assert [(bar.n, bar.total) for bar in bars] == [(300, 300), (300, 300)]
    if not dry_run:
        open_dataset(tmp_path / "x.zip")
        assert (bars[-1].n, bars[-1].total) == (300, 300)


def test_a_second_prepare_waits_not(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.zip"
    seen: list[str] = []

    def second(*args: object) -> None:
        with pytest.raises(GddlabError, match="is being made by another process") as e:
            prepare(photos, out, resolution=16, crop="center", workers=1)
        seen.append(str(e.value))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(making, "assemble", second)
        with pytest.raises(KeyboardInterrupt):
            prepare(photos, out, resolution=16, crop="center", workers=1)
    assert seen


def test_report_reads_well() -> None:
    report = PrepareReport(source="x", out=None, images=1200, classes=0, resolution=64, channels=3)
    assert str(report) == "x: 1,200 images, 64x64, RGB, no labels, nothing wrong"


def test_the_same_call_on_a_finished_zip_returns_its_report(tmp_path: Path) -> None:
    data = digits()
    for i in range(6):
        Image.fromarray(data.uint8[i, :, :, 0]).save(tmp_path / f"{i}.png")
    out = tmp_path.parent / f"{tmp_path.name}.zip"
    first = prepare(tmp_path, out, progress=False)
    before = out.stat()
    assert prepare(tmp_path, out, progress=False) == first
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    for other in ({"max_images": 5}, {"resolution": 8}):
        with pytest.raises(GddlabError, match=r"zip exists: give another name, or replace it"):
            prepare(tmp_path, out, progress=False, **other)
    Image.fromarray(data.uint8[6, :, :, 0]).save(tmp_path / "5.png")
    with pytest.raises(GddlabError, match=r"zip exists: give another name, or replace it"):
        prepare(tmp_path, out, progress=False)
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert prepare(tmp_path, out, progress=False, overwrite=True).sha256 != first.sha256


def test_unusable_images_are_counted_and_each_has_its_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits()
    for i in range(4):
        Image.fromarray(data.uint8[i, :, :, 0]).save(tmp_path / f"{i}.png")
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    Image.new("L", (16, 12)).save(tmp_path / "wide.png")
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path), "--dry-run"])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: 6 files, 4 usable, 16x16, ")
    assert "(give --alpha white or --alpha black)" in said and "(give --crop center)" in said
    with pytest.raises(GddlabError) as e:
        prepare(tmp_path, tmp_path.parent / "x.zip", progress=False)
    assert "(mode RGBA): give alpha='white' or alpha='black'; wide.png: not square" in str(e.value)
    assert str(e.value).endswith("give crop='center'")
