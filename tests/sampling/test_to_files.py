"""`sample_files`: folders and zips, continued, shared between processes, refused when something else is there."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gddlab.datasets import open_dataset
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors, read_json
from gddlab.nets import Conditioning, save_network
from gddlab.nets.io import make_student
from gddlab.sampling import sample, sample_files
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.to_files import FolderTarget, ZipTarget, encode
from gddlab.teachers import load_teacher, wrap
from gddlab.workers import run_workers
from tests.conftest import tiny_net
from tests.models import SIDE, pipeline, vae

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    return make_student(tiny_net())


@pytest.fixture(scope="module")
def classy() -> torch.nn.Module:
    return make_student(tiny_net(label_dim=4))


def pixels(images: torch.Tensor) -> np.ndarray:
    return to_uint8(images)[:, 0].numpy()


def folder_pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def test_folder(student, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = sample_files(student, tmp_path / "a", 5, seed=8, batch_size=2, sigmas=(80.0, 1.0))
    assert sorted(p.name for p in out.iterdir()) == [*(f"{s:06d}.png" for s in range(8, 13)), "manifest.json"]
    expected = pixels(sample(student, 5, seed=8, batch_size=2, sigmas=(80.0, 1.0)))
    assert np.array_equal(folder_pixels(out), expected)
    about = read_json(out / "manifest.json")["extra"]
    assert about["seeds"] == "8-12" and about["sampler"] == "consistency-2 sigmas=80,1"
    assert about["model"] == hash_tensors(student.state_dict()) and "torch" in about["versions"]


def test_colour() -> None:
    """Red stays red, and the pixels are those of `to_uint8`."""
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    images[0] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    red, other = encode(images, [(3, None), (70000, 5)], FolderTarget.name)
    assert Image.open(io.BytesIO(red.png)).getpixel((1, 2)) == (255, 0, 0)
    assert (red.name, other.name, red.label, other.label) == ("000003.png", "070000.png", None, 5)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(other.png))).transpose(2, 0, 1), to_uint8(images)[1].numpy())


def test_zip_is_a_dataset(classy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """EDM's layout; `open_dataset` reads it, with all classes though some have no image, and checks the hash."""
    out = sample_files(classy, tmp_path / "b.zip", seeds=[2001, 5, 6], class_labels=[2, 0, 2], batch_size=2)
    with zipfile.ZipFile(out) as z:
        names = ["00002/img00002001.png", "00000/img00000005.png", "00000/img00000006.png"]
        assert z.namelist() == [*names, "dataset.json", "manifest.json"]
        assert json.loads(z.read("dataset.json"))["labels"] == [list(p) for p in zip(names, [2, 0, 2], strict=True)]
    data = open_dataset(out)
    assert data.class_ids is not None and data.class_ids.tolist() == [0, 2, 2] and data.classes == 4
    assert np.array_equal(
        data.uint8[..., 0], pixels(sample(classy, seeds=[5, 6, 2001], class_labels=[0, 2, 2], batch_size=2))
    )
    assert not (tmp_path / "b.zip.parts").exists()


def test_folder_with_classes(classy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = sample_files(classy, tmp_path / "c", 6)
    assert read_json(out / "dataset.json")["labels"] == [[f"{s:06d}.png", s % 4] for s in range(6)]
    assert open_dataset(out).class_ids.tolist() == [0, 1, 2, 3, 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["d", "d.zip"])
def test_killed_and_continued(name: str, tmp_path: Path) -> None:
    """After kill -9 in the middle, parts are kept, not made again; the result equals an undisturbed one."""
    net = make_student(tiny_net())
    save_network(net, tmp_path / "s.safetensors")
    code = f"""
import os, signal, torch
from gddlab.nets import load_network
from gddlab.sampling import to_files as targets
from gddlab.sampling import sample_files
def write(self, k, entries, write=targets.{"ZipTarget" if name.endswith("zip") else "FolderTarget"}.write):
    if k == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, k, entries)
targets.ZipTarget.write = targets.FolderTarget.write = write
torch.set_num_threads({torch.get_num_threads()})
sample_files(load_network({str(tmp_path / "s.safetensors")!r})[0], {str(tmp_path / "x" / name)!r}, 10, batch_size=2)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    out = tmp_path / "x" / name
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*.png" if name == "d" else "part-*.zip")}
    assert len(made) == (4 if name == "d" else 2) and out.exists() == (name == "d")
    if name == "d":  # half an image, as a crash of the machine leaves it, is made again
        half = out / "000003.png"
        half.write_bytes(half.read_bytes()[:60])
        del made[half]
        jpeg = out / "000002.png"  # so is a file that only has the name of one
        Image.new("L", (net.img_resolution, net.img_resolution)).save(jpeg, format="JPEG")
        del made[jpeg]
        (out / ".000004.png.x7.tmp").write_bytes(b"")
    written = []
    target = ZipTarget if name.endswith("zip") else FolderTarget
    with pytest.MonkeyPatch.context() as m:
        write = target.write
        m.setattr(target, "write", lambda self, k, e: (written.append(k), write(self, k, e)))
        assert sample_files(net, out, 10, batch_size=2) == out
    assert written == ([1, 2, 3, 4] if name == "d" else [2, 3, 4])
    plain = sample_files(net, tmp_path / "y" / name, 10, batch_size=2)
    if name == "d":
        assert all(p.stat().st_mtime_ns == t for p, t in made.items())
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in plain.iterdir()}
    else:
        assert out.read_bytes() == plain.read_bytes()
    before = out.stat().st_mtime_ns
    sample_files(net, out, 10, batch_size=2)  # done: nothing happens
    assert out.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "t.safetensors"
    save_network(tiny_net(), path, name="tiny")
    return path


def test_processes(teacher_file: Path, tmp_path: Path) -> None:
    """Two fresh processes make the images of one."""
    options = {"steps": 2, "S_churn": 1.0, "batch_size": 2}
    two = sample_files(teacher_file, tmp_path / "2" / "e.zip", 7, nproc=2, **options)
    one = sample_files(str(teacher_file), tmp_path / "1" / "e.zip", 7, **options)
    with zipfile.ZipFile(two) as a, zipfile.ZipFile(one) as b:
        assert a.namelist() == b.namelist()
        for name in a.namelist()[:7]:
            x, y = (np.asarray(Image.open(z.open(name)), dtype=int) for z in (a, b))
            assert np.abs(x - y).max() <= 1


@contextlib.contextmanager
def worker(job: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker as `run_workers` starts it; its standard input stays open."""
    rest = {"seed": 0, "seeds": None, "class_labels": None, "batch_size": 1, "dtype": "float32", "channels_last": False}
    command = [sys.executable, "-m", "gddlab.workers"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(rest | {"device": "cpu", "timeout_s": 1.0} | job).encode() + b"\n")
        process.stdin.flush()
        yield process
        process.kill()


def test_a_worker_refuses() -> None:
    """Its class and text, and exit code 2, as `run_workers` reads them."""
    with worker({"model": "digit", "out": "x", "n": 1}) as process:
        assert process.wait(60) == 2
        assert process.stdout is not None
        module, name, text = json.loads(process.stdout.read())["refused"]
    assert (module, name) == ("gddlab.errors", "GddlabError") and "'digit'" in text


def test_a_worker_ends_with_its_parent(teacher_file: Path, tmp_path: Path) -> None:
    """The end of the parent, however it comes, closes the worker's standard input."""
    with worker({"model": str(teacher_file), "out": str(tmp_path / "g"), "n": 10**5, "steps": 1}) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.stdin.close()
        assert process.wait(10) == 1
    assert 0 < len(list((tmp_path / "g").glob("*.png"))) < 10**5


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            """echo '{"refused": ["gddlab.errors", "GddlabError", "n is odd"]}'; echo warning >&2; exit 2""",
            "^n is odd$",
        ),
        ("kill -9 $$", "^process 1 of 2 was ended by signal 9; what is written stays, the same call continues$"),
        ("echo MemoryError >&2; exit 1", "^process 1 of 2 failed: MemoryError; what is written stays"),
    ],
)
def test_a_process_that_dies(end: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word is the error, and the others are ended."""
    script = tmp_path / "python"
    lines = ["#!/bin/sh", "read job", f"echo $$ > {tmp_path}/pid$RANK", "echo 2", "[ $RANK = 0 ] && exec sleep 600"]
    lines += [f"while [ ! -e {tmp_path}/pid0 ]; do sleep 0.01; done", end, ""]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    done: list[int] = []
    with pytest.raises(GddlabError, match=message):
        run_workers({}, 2, done.append)
    assert 2 in done
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid0").read_text()), 0)


def test_under_torchrun(student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Ranks share the parts; the first waits for the others, a bounded time, then assembles."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "h.zip"
    with pytest.raises(
        GddlabError, match=r"2 of 5 parts are missing after \d+ s, the first is due from process 1 of 2"
    ):
        sample_files(student, out, 10, batch_size=2, timeout_s=0.01)
    monkeypatch.setenv("RANK", "1")
    sample_files(student, out, 10, batch_size=2)
    assert not out.exists()
    monkeypatch.setenv("RANK", "0")
    sample_files(student, out, 10, batch_size=2)
    monkeypatch.delenv("WORLD_SIZE")
    assert out.read_bytes() == sample_files(student, tmp_path / "i" / "h.zip", 10, batch_size=2).read_bytes()
    with pytest.raises(GddlabError, match="nproc=2 with a network"):
        sample_files(student, out, 10, nproc=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GddlabError, match="nproc=2 under torchrun"):
        sample_files("digits", out, 10, nproc=2)


def test_a_late_process_finds_the_zip(student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """One that looked for the zip before the first process put it there makes nothing again."""
    out = sample_files(student, tmp_path / "j.zip", 4, batch_size=2)
    exists = Path.exists
    looks: list[Path] = []

    def blind_once(self: Path, **kwargs: bool) -> bool:
        if self == out:
            looks.append(self)
            return len(looks) > 1 and exists(self)
        return exists(self, **kwargs)

    monkeypatch.setattr(Path, "exists", blind_once)
    monkeypatch.setattr(ZipTarget, "write", lambda *_: pytest.fail("made again"))
    sample_files(student, out, 4, batch_size=2)
    assert len(looks) == 2 and not (tmp_path / "j.zip.parts").exists()


def test_refusals(student, classy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def refused(message: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(GddlabError, match=message) as e:
            sample_files(*args, **kwargs)
        assert "\n" not in str(e.value)

    out = tmp_path / "k"
    sample_files(student, out, 2)
    refused("k was made with seeds='0-1', not '0-2'", student, out, 3)
    refused("was made with model=", make_student(tiny_net(seed=1)), out, 2)
    refused("was made with dtype='float32', not 'bfloat16'", student, out, 2, dtype=torch.bfloat16)
    sample_files(student, tmp_path / "k.zip", 2)
    refused("was made with sampler='one-step'", student, tmp_path / "k.zip", 2, sigmas=(80, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refused("other holds 'thesis.txt' and no samples", student, tmp_path / "other", 2)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as z:
        z.writestr("manifest.json", "{}")
    refused("holds no samples of gddlab", student, tmp_path / "other.zip", 2)
    (tmp_path / "file").write_text("")
    refused("cannot write .*Not a directory", student, tmp_path / "file" / "x.zip", 2)
    refused("file' is a file: give a folder, a name that ends in .zip", student, tmp_path / "file", 2)
    refused("seed 4 is given twice", student, tmp_path / "l", seeds=[4, 5, 4])
    refused("batch_size=0", student, tmp_path / "l", 2, batch_size=0)
    refused("nproc=0", "digits", tmp_path / "l", 2, nproc=0)
    refused("n=0", student, tmp_path / "l", 0)
    refused("steps=0", student, tmp_path / "l", 2, steps=0)
    refused("class_labels mix classes", classy, tmp_path / "l", 2, class_labels=torch.full((2, 4), 0.25))
    refused("unconditional", student, tmp_path / "l", 2, class_labels=1)
    refused("device='tpu'", "digits", tmp_path / "l", 2, device="tpu")
    assert not (tmp_path / "l").exists()


def test_disk_full_and_broken_weights(student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    broken = make_student(tiny_net())
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(GddlabError, match="image of seed 7 is not finite"):
        sample_files(broken, tmp_path / "m", 2, seed=7)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "n.zip.parts/part-000000.zip")

    with monkeypatch.context() as m:
        m.setattr("gddlab.sampling.to_files.write_part", full)
        with pytest.raises(GddlabError, match=r"cannot write n.zip.parts/part-000000.zip \(No space left on device\)"):
            sample_files(student, tmp_path / "n.zip", 2)
    assert sample_files(student, tmp_path / "n.zip", 2).exists()


def test_latents_of_a_pipeline_are_decoded(tmp_path: Path) -> None:
    pipe, call = pipeline("sd", 2)
    net = wrap(pipe, cond=Conditioning.record(pipe, **call), img_resolution=SIDE)
    out = sample_files(net, tmp_path / "a", 3, steps=2, batch_size=2)
    images = sample(net, 3, steps=2, batch_size=2)
    assert images.shape[1:] == (3, 2 * SIDE, 2 * SIDE)
    assert np.array_equal(folder_pixels(out), to_uint8(images).permute(0, 2, 3, 1).numpy())
    manifest = read_json(out / "manifest.json")
    assert (manifest["channels"], manifest["resolution"], manifest["classes"]) == (3, 2 * SIDE, 2)
    assert manifest["extra"]["cond"] == net.cond.hash and "architecture" not in manifest["extra"]
    assert read_json(out / "dataset.json")["labels"][2] == ["000002.png", 0]  # prompts in turn
    sample_files(net, out, 3, steps=2, batch_size=2)  # continues
    for other in (wrap(net, guidance=2.0), wrap(net, cond=net.cond[[1, 0]]), wrap(net, vae=vae(0.2))):
        with pytest.raises(GddlabError, match="was made with"):
            sample_files(other, out, 3, steps=2, batch_size=2)
    bare = wrap(net.gddlab_bare, path=net.path, cond=net.cond)
    with pytest.raises(GddlabError, match="no autoencoder is known: give gddlab"):
        sample_files(bare, tmp_path / "b", 1)


def test_a_folder_of_diffusers_is_sampled(tmp_path: Path) -> None:
    pipe, _ = pipeline("dit")
    pipe.save_pretrained(tmp_path / "dit")
    out = sample_files(tmp_path / "dit", tmp_path / "b.zip", seeds=[5, 1003], steps=2)
    found = open_dataset(out)
    assert (found.channels, found.resolution, found.classes) == (3, 2 * SIDE, 1000)
    assert sorted(found.class_ids.tolist()) == [3, 5]
    images = to_uint8(sample(load_teacher(tmp_path / "dit"), seeds=[1003, 5], steps=2, batch_size=1))
    for made in found.uint8:
        nearest = min(np.abs(made.astype(int) - x.permute(1, 2, 0).numpy()).max() for x in images)
        assert nearest <= 1
    text, _ = pipeline("sd")
    text.save_pretrained(tmp_path / "sd")
    with pytest.raises(GddlabError, match="give wrap cond="):
        sample_files(tmp_path / "sd", tmp_path / "c", 1)
