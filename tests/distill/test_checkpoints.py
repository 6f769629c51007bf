"""Checkpoints are complete or absent: named last, checked when read; a damaged one gives way to the one before."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gddlab.distill.checkpoints import Checkpoints, checkpoints
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from gddlab.files import read_json, read_jsonl
from tests.conftest import tiny_config

ALONE = World(0, 1, torch.device("cpu"))
State = dict[str, dict[str, Tensor]]


def state(value: float = 0.0) -> State:
    return {"g": {"w": torch.full((1000,), value)}, "opt_g": {"w/step": torch.tensor(value)}}


def saved(run_dir: Path, *values: int, keep: int = 2, best: tuple[int, ...] = ()) -> Checkpoints:
    """A checkpoint of each value, which is its kimg too."""
    kept = Checkpoints(run_dir, ALONE, keep=keep)
    for v in values:
        kept.save(state(v), {"nimg": 1000 * v}, best=v in best)
    kept.wait()
    return kept


def read(run_dir: Path) -> tuple[float, list[str]]:
    """Value of what is read, and what was damaged."""
    into = state(-1)
    loaded = Checkpoints(run_dir, ALONE, keep=2).load(into)
    assert loaded is not None
    value = into["g"]["w"].unique().item()
    assert into["opt_g"]["w/step"] == value == loaded.meta["nimg"] / 1000
    return value, loaded.damaged


def names(run_dir: Path) -> list[str]:
    return [f"{float(p.name):g}" for p in checkpoints(run_dir)]


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, ALONE, keep=2).load(state()) is None
    saved(tmp_path, 1, 2, 3, 4, 5, best=(2, 3))
    assert names(tmp_path) == ["3", "4", "5"]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "000003.000"
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "000005.000"
    assert read(tmp_path) == (5, [])


def test_the_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, own = threading.Event(), dcp.save

    def slow(*args: Any, **more: Any) -> Any:
        assert gate.wait(60)
        return own(*args, **more)

    monkeypatch.setattr(dcp, "save", slow)
    kept, trained = Checkpoints(tmp_path, ALONE, keep=2), state(7)
    kept.save(trained, {"nimg": 7000})
    trained["g"]["w"].zero_()  # the next steps
    trained["opt_g"]["w/step"].zero_()
    assert names(tmp_path) == []
    gate.set()
    kept.close()
    assert read(tmp_path) == (7, [])


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing", "meta"])
def test_a_damaged_one_is_passed_over(harm: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    newest = checkpoints(tmp_path)[-1]
    file = next(newest.glob("*.distcp"))
    content = file.read_bytes()
    if harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "altered":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif harm == "missing":
        file.unlink()
    else:
        (newest / "meta.json").write_text('{"nimg": 20')
    value, damaged = read(tmp_path)
    assert value == 1 and len(damaged) == 1
    why = {"truncated": "bytes of", "altered": "is not what was written", "missing": "is missing", "meta": "not JSON"}
    assert why[harm] in damaged[0] and damaged[0].startswith("000002.000")
    assert newest.is_dir()  # reading changes nothing

    kept = Checkpoints(tmp_path, ALONE, keep=2)
    kept.clean_up(kept.load(state()))
    assert names(tmp_path) == ["1"] and newest.is_dir()
    kept.save(state(3), {"nimg": 3000})
    kept.wait()
    assert names(tmp_path) == ["1", "3"] and read(tmp_path) == (3, [])
    assert not newest.exists()


def test_where_none_is_whole_nothing_begins_anew(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for path in checkpoints(tmp_path):
        next(path.glob("*.distcp")).unlink()
    with pytest.raises(
        GddlabError, match=r"no checkpoint is complete \(000002.000: .* is missing; 000001.000: .* missing"
    ):
        Checkpoints(tmp_path, ALONE, keep=2).load(state())
    assert len(checkpoints(tmp_path)) == 2


def test_what_was_killed_on_the_way_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while files are written, or after the rename and before the name: both leave the first checkpoint."""
    saved(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    half = folder / ".000002.000.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert read(tmp_path) == (1, [])

    def killed(*args: Any) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr("gddlab.distill.checkpoints.write_text", killed)
    with pytest.raises(SystemExit):
        saved(tmp_path, 3)
    monkeypatch.undo()
    assert (folder / "000003.000" / "meta.json").exists()
    assert names(tmp_path) == ["1"] and read(tmp_path) == (1, [])
    kept = Checkpoints(tmp_path, ALONE, keep=2)
    kept.clean_up(kept.load(state()))
    assert not half.exists()
    kept.save(state(3), {"nimg": 3000})
    kept.wait()
    assert names(tmp_path) == ["1", "3"] and read(tmp_path) == (3, [])


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only")])
def test_a_write_that_fails_is_told_and_the_older_ones_stand(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)

    def full(*args: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(dcp, "save", full)
    kept = Checkpoints(tmp_path, ALONE, keep=2)
    kept.save(state(3), {"nimg": 3000})
    with pytest.raises(GddlabError, match=words) as e:
        kept.save(state(4), {"nimg": 4000})
    assert "continues from the checkpoint of 2 kimg" in str(e.value) and "\n" not in str(e.value)
    assert read(tmp_path) == (2, [])


def test_a_run_says_that_it_goes_on_from_the_one_before(tmp_path: Path, tiny_teacher: Path) -> None:
    """And its end is that of a run without damage, line for line."""
    fields = {"checkpoint_kimg": 0.016, "keep_checkpoints": 3}
    whole = Trainer(tiny_config(tmp_path / "a", tiny_teacher, **fields), ALONE)
    whole.train()
    first = Trainer(tiny_config(tmp_path / "b", tiny_teacher, **fields), ALONE)
    own = first.iterate

    def iterate() -> None:
        own()
        first.stop_asked = first.iteration == 4

    first.iterate = iterate  # type: ignore[method-assign]
    assert first.train() == "stopped"
    newest = checkpoints(tmp_path / "b")[-1]
    next(newest.glob("*.distcp")).write_bytes(b"")
    second = Trainer(tiny_config(tmp_path / "b", tiny_teacher, **fields), ALONE)
    assert second.train() == "done"
    for name, tensor in whole.step.g.state_dict().items():
        assert torch.equal(tensor, second.step.g.state_dict()[name]), name
    assert [m["nimg"] for m in read_jsonl(tmp_path / "b" / "metrics.jsonl")] == [16, 32, 48]
    (alarm,) = [a for a in read_jsonl(tmp_path / "b" / "alarms.jsonl") if a["kind"] == "checkpoint"]
    assert "has 0 bytes of" in alarm["message"] and "the one of 0.016 kimg is used instead" in alarm["message"]
    starts = read_json(tmp_path / "b" / "provenance.json")["starts"]
    assert [(s["nimg"], s["world_size"]) for s in starts] == [(0, 1), (16, 1)]
