"""Runs in archives are read as if they were folders."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import copytree

import pytest

from gddlab.errors import GddlabError, NotFound
from gddlab.runs import listing, load_run, load_runs, write_archive


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "runs" / "digits"
    for name in ("b", "a"):
        files = {f"{name}/seed-{s}/config.json": b'{"total_kimg": 12}' for s in (1, 0)}
        files |= {f"{name}/seed-{s}/status.json": b'{"state": "done", "nimg": 12000}' for s in (1, 0)}
        write_archive(folder / f"{name}.tar.xz", files)
    return folder


def test_a_folder_of_archives_is_a_folder_of_runs(shipped: Path) -> None:
    names = [f"{r.run_dir.parent.name}/{r.run_dir.name}" for r in load_runs(shipped)]
    assert names == ["a/seed-0", "a/seed-1", "b/seed-0", "b/seed-1"]
    assert [r.run_dir for r in load_runs(shipped.parent)] == [r.run_dir for r in load_runs(shipped)]
    assert [r.run_dir.name for r in load_runs(shipped / "a")] == ["seed-0", "seed-1"]
    run = load_run(shipped / "b" / "seed-1")
    assert run.written_status["state"] == "done"
    assert listing(shipped)["run"].tolist() == names
    beside = shipped / "aa" / "seed-3"
    beside.mkdir(parents=True)
    for name in ("config", "status"):
        (beside / f"{name}.json").write_text("{}")
    assert [r.run_dir.parent.name for r in load_runs(shipped)] == ["a", "a", "aa", "b", "b"]
    for missing in (shipped / "c" / "seed-0", shipped / "a" / "seed-7"):
        with pytest.raises(NotFound):
            load_run(missing)


def test_a_run_in_a_folder_and_in_an_archive_is_one(shipped: Path) -> None:
    (shipped / "a").mkdir()
    copytree(load_run(shipped / "b" / "seed-1").run_dir, shipped / "b" / "seed-1")
    found = load_runs(shipped.parent)
    assert [f"{r.run_dir.parent.name}/{r.run_dir.name}" for r in found] == [
        *("a/seed-0", "a/seed-1", "b/seed-0", "b/seed-1")
    ]
    assert found[3].run_dir == shipped / "b" / "seed-1"


def test_a_name_that_is_nowhere_is_refused(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped)
    assert len(load_runs("a")) == 2 and len(load_runs(".")) == 4
    for name in ("nope", "nope/seed-0", "../nope"):
        with pytest.raises(NotFound, match="no such folder"):
            load_runs(name)


def test_folders_that_vanish_while_they_are_read(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process unpacks an archive into a folder beside, and moves it; a run that trains removes checkpoints."""
    top = load_runs(shipped)[0].run_dir.parents[1]
    (top / ".half" / "a" / "seed-0").mkdir(parents=True)
    for path in (shipped / "c" / "seed-0" / "checkpoints", top / "gone"):
        path.mkdir(parents=True)
    for name in ("config", "status"):
        (shipped / "c" / "seed-0" / f"{name}.json").write_text("{}")
    scan = os.scandir

    def vanishing(path: str | Path = ".") -> object:
        if Path(path).name in (".half", "checkpoints", "gone"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [r.run_dir.parent.name for r in load_runs(shipped)] == ["a", "a", "b", "b", "c"]


def test_a_changed_archive_is_unpacked_anew(shipped: Path) -> None:
    before = load_runs(shipped)[0].run_dir
    write_archive(shipped / "a.tar.xz", {f"a/seed-0/{n}.json": b'{"total_kimg": 6}' for n in ("config", "status")})
    after = load_runs(shipped)
    assert [r.run_dir.parent.name for r in after] == ["a", "b", "b"]
    assert after[0].run_dir != before and after[0].written_config["total_kimg"] == 6


def test_archives_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    files = {"x/seed-1/a": b"1", "x/seed-0/a": b"2"}
    write_archive(tmp_path / "1.tar.xz", files)
    write_archive(tmp_path / "2.tar.xz", dict(reversed(files.items())))
    assert (tmp_path / "1.tar.xz").read_bytes() == (tmp_path / "2.tar.xz").read_bytes()


def test_what_is_no_archive_is_refused(shipped: Path) -> None:
    (shipped / "a.tar.xz").write_bytes(b"\xfd7zXZ\x00 cut off")
    with pytest.raises(GddlabError, match=r"a\.tar\.xz cannot be read as an archive of runs"):
        load_runs(shipped)
    write_archive(shipped / "a.tar.xz", {"other/seed-0/config.json": b"{}"})
    with pytest.raises(GddlabError, match="has no folder 'a'"):
        load_runs(shipped)
    write_archive(shipped / "a.tar.xz", {"../a/seed-0/config.json": b"{}"})
    with pytest.raises(GddlabError, match="cannot be read as an archive"):
        load_runs(shipped)
