"""Faults cost minutes at most: killed and hanging ranks, agents that die, other numbers of processes, full disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.testing import assert_close

from gddlab.distill.checkpoints import checkpoints
from gddlab.distill.config import TrainConfig
from gddlab.distill.status import write_status
from gddlab.distill.trainer import Trainer
from gddlab.errors import Unwritable
from gddlab.files import read_json
from gddlab.launch import RunFailed, attach, train
from gddlab.lock import held, take
from gddlab.runs import listing
from tests.conftest import tiny_config
from tests.launch.conftest import Quick, assert_same
from tests.launch.faults import ALONE, ended_with, kill, lines, processes, ranks, reached, until


def saving(run_dir: Path) -> int:
    """How many checkpoints are being written."""
    return len(list((run_dir / "checkpoints").glob(".*.tmp")))


def saved(run_dir: Path) -> int:
    """Images that the newest checkpoint has seen."""
    return max((round(1000 * float(p.name)) for p in checkpoints(run_dir)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(3, 40), (24, 400)])
def test_ranks_killed_at_random(
    kills: int, steps: int, tmp_path: Path, quick: Quick, undisturbed: TrainConfig, one_thread: None
) -> None:
    """Ranks of two are killed while they start, train and save; the end is that of a run that nobody touched, to the
    bit.
    """
    whole = undisturbed
    if steps != 40:
        whole = quick(tmp_path / "whole", total_kimg=0.008 * steps)
        assert train(whole, nproc=2).wait(600).status == "done"
    config = quick(tmp_path / "killed", total_kimg=0.008 * steps, checkpoint_kimg=0.008)
    run = train(config, nproc=2, max_restarts=2 * kills)  # a start that is killed may fail in more than one way
    rng, seen, told = random.Random(kills), 0, []
    for _ in range(kills):
        there = until(lambda: len(found := ranks(run.run_dir)) == 2 and found, 300)
        moment = rng.choice(("starting", "training", "saving"))
        if moment == "starting":
            time.sleep(rng.uniform(0, 4))
        else:
            goal = seen + 8 * rng.randint(1, steps // (4 * kills))
            until(lambda goal=goal: saved(run.run_dir) >= goal, 300)
            if moment == "saving":
                until(lambda: saving(run.run_dir), 60)
            else:
                time.sleep(rng.uniform(0, 0.5))
        assert run.status in ("starting", "running"), run.written_status
        rank, seen = rng.randrange(2), saved(run.run_dir)
        told.append((rank, moment, seen, saving(run.run_dir)))
        kill(there[rank])
        until(lambda pids=there: not set(pids.values()) & set(ranks(run.run_dir).values()), 120)
    assert run.wait(600).status == "done"
    print(f"killed (rank, moment, images seen, saves under way): {told}")  # noqa: T201 (read in the long form)
    assert_same(config, whole)
    assert [m["nimg"] for m in lines(config.run_dir)] == [16 * i for i in range(1, steps // 2 + 1)]
    assert len(read_json(config.run_dir / "provenance.json")["starts"]) <= 2 * kills + 1
    assert not processes(config.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_other_numbers_of_processes(shard: bool, tmp_path: Path, tiny_teacher: Path) -> None:
    """1 process stopped, 2 killed, 1 to the end: in float64 with synchronised BatchNorm, parameters agree to 1e-9."""
    fields: dict[str, Any] = {"precision": "float64", "discriminator": {"sync_batchnorm": True}}
    fields |= {"total_kimg": 0.096, "shard": shard}
    fields |= {"checkpoint_kimg": 0.016, "snapshot_kimg": 0.096}
    whole = tiny_config(tmp_path / "whole", tiny_teacher, **fields)
    config = tiny_config(tmp_path / "changing", tiny_teacher, **fields)
    for c in (whole, config):
        c.write()
    assert Trainer(whole, ALONE).train() == "done"
    first = Trainer(config, ALONE)
    first.stop_asked = True
    assert first.train() == "stopped"
    run = train(config, nproc=2)
    until(reached(run, 48), 300)
    assert run.kill().status == "stopped"
    last = Trainer(config, ALONE)
    assert last.train() == "done"
    starts = read_json(config.run_dir / "provenance.json")["starts"]
    assert [s["world_size"] for s in starts] == [1, 2, 1]
    assert starts[0]["nimg"] < starts[1]["nimg"] < starts[2]["nimg"] < 96
    assert "on 2 processes, before 1" in (config.run_dir / "log" / "rank0.txt").read_text()
    a, b = ended_with(whole), ended_with(config)
    for name in a:
        if not name.endswith(".main.0.bias"):  # a bias before BatchNorm: its true gradient is 0
            assert_close(a[name], b[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert [m["nimg"] for m in lines(config.run_dir)] == [16 * i for i in range(1, 7)]


@pytest.mark.parametrize("hanging", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["killed", "hanging too"])
def test_killed_and_hanging_ranks_are_named_and_none_outlives_its_agent(
    hanging: bool, tmp_path: Path, quick: Quick, undisturbed: TrainConfig, one_thread: None
) -> None:
    """Each fault ends the whole run; the same call continues it as if nothing had been."""
    config = quick(tmp_path / "run", total_kimg=100)
    run = train(config, nproc=2)
    until(reached(run, 48))
    kill(ranks(run.run_dir)[1])
    with pytest.raises(RunFailed, match="rank 1 was ended by SIGKILL, as the system does when memory is short"):
        run.wait(120)
    assert run.written_status["rank"] == 1
    assert not processes(run.run_dir)

    seen = saved(config.run_dir)
    assert seen >= 32
    if hanging:
        run = train(config, nproc=2, timeout_s=8)
        until(reached(run, seen + 16))
        hang(run, 1)
        assert not processes(run.run_dir)

    run, seen = train(config, nproc=2), saved(config.run_dir)
    until(reached(run, seen + 16))
    assert run.process is not None
    run.process.kill()
    until(lambda: not processes(run.run_dir) and not held(run.run_dir), 30)
    assert attach(run.run_dir).status == "failed"

    run, seen = train(config, nproc=2), saved(config.run_dir)
    until(reached(run, seen + 48))
    assert run.stop(60).status == "stopped"
    starts = [s["nimg"] for s in read_json(config.run_dir / "provenance.json")["starts"]]
    assert len(starts) == 3 + hanging and starts[0] == 0 < starts[1] and starts == sorted(starts)
    own, whole = lines(config.run_dir), lines(undisturbed.run_dir)
    assert own[: len(whole)] == whole[: len(own)]
    assert 16 * len(own) > starts[-1]


def hang(run: Any, rank: int) -> None:
    """Stops a rank; the others end the run, and name it."""
    there = ranks(run.run_dir)
    kill(there[rank], signal.SIGSTOP)
    until(lambda: run.written_status["state"] == "failed", 60)
    kill(there[rank])  # torchrun would do so after a while
    with pytest.raises(RunFailed, match=f"rank {rank} has not answered for 8 s"):
        run.wait(120)


@pytest.mark.slow
def test_a_hanging_rank_0_is_named(tmp_path: Path, quick: Quick) -> None:
    run = train(quick(tmp_path / "run", total_kimg=100), nproc=2, timeout_s=8)
    until(reached(run, 16))
    hang(run, 0)
    assert not processes(run.run_dir)


@pytest.mark.slow
def test_a_hanging_rank_is_replaced(tmp_path: Path, quick: Quick) -> None:
    """With restarts left, the ranks that waited start again from the last checkpoint; torchrun kills and replaces the
    other.
    """
    run = train(quick(tmp_path / "run", total_kimg=0.32), nproc=2, timeout_s=8, max_restarts=1)
    until(reached(run, 48))
    kill(ranks(run.run_dir)[1], signal.SIGSTOP)
    assert run.wait(240).status == "done"
    assert len(read_json(run.run_dir / "provenance.json")["starts"]) == 2
    assert [m["nimg"] for m in lines(run.run_dir)] == [16 * i for i in range(1, 21)]
    assert not processes(run.run_dir)


def test_a_process_ends_with_its_parent() -> None:
    """Also one whose parent has ended already, and where the system does not see to it."""
    parents = {}
    for platform in (sys.platform, "darwin"):
        child = (
            f"import os, sys, time; from gddlab.launch.rank import end_with; sys.platform = {platform!r}; "
            "end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
        )
        code = (
            f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]).wait()"
        )
        parents[child] = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    late = {}
    for child, process in parents.items():
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        until(lambda p=pid: not psutil.pid_exists(p) or psutil.Process(p).status() == psutil.STATUS_ZOMBIE, 10)
        process.stdout.close()
        late[child] = subprocess.Popen([sys.executable, "-c", child, str(process.pid)], stdout=subprocess.PIPE)
    for process in late.values():
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, b"")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, tiny_teacher: Path) -> None:
    """Reported in one line; what was written is intact; with free space, the same call continues."""
    config = tiny_config(small_disk / "run", tiny_teacher, total_kimg=0.16, checkpoint_kimg=0.016, snapshot_kimg=0.16)
    run = train(config)
    until(lambda: len(checkpoints(run.run_dir)) >= 1 or run.status == "failed")
    fill = small_disk / "fill"
    with fill.open("wb", buffering=0) as f, suppress(OSError):
        while True:
            f.write(bytes(1 << 12))
    with pytest.raises(RunFailed):
        run.wait(120)
    assert "No space left on device" in run.tail(lines=60)
    assert checkpoints(run.run_dir)
    fill.unlink()
    assert train(config).wait(240).status == "done"
    assert [m["nimg"] for m in lines(run.run_dir)] == [16 * i for i in range(1, 11)]


def test_a_directory_that_can_only_be_read(small_disk: Path, tiny_teacher: Path) -> None:
    """Its runs are listed and read; none starts there, and the error says why."""
    config = tiny_config(small_disk / "run", tiny_teacher)
    config.write()
    os.close(take(config.run_dir))
    write_status(config.run_dir, "running")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert attach(config.run_dir).status == "failed"
    assert listing(small_disk)["state"].tolist() == ["failed"]
    for there in (config, config.model_copy(update={"run_dir": small_disk / "new"})):
        with pytest.raises(Unwritable, match=f"^{there.run_dir} cannot be written: Read-only file system$"):
            train(there)


def test_a_directory_that_is_removed(tmp_path: Path, quick: Quick) -> None:
    run = train(quick(tmp_path / "run", total_kimg=100))
    until(reached(run, 16))
    shutil.rmtree(run.run_dir, ignore_errors=True)
    assert run.process is not None
    assert run.process.wait(60) == 1
    shutil.rmtree(run.run_dir, ignore_errors=True)  # what was being written at that moment
    with pytest.raises(RunFailed, match="is gone: somebody removed it"):
        run.wait(60)
