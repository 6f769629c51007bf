"""The same run on several machines (agents on this one stand for them), by torchrun by hand, and by a batch script."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gddlab.cli import main
from gddlab.distill.config import TrainConfig
from gddlab.distill.status import OUT_OF_TIME, write_status
from gddlab.errors import GddlabError, NotFound
from gddlab.files import read_json
from gddlab.launch import attach, train
from gddlab.launch.plan import HEAD, Launch, prepared
from gddlab.lock import Job, held, owners, sign, take
from gddlab.runs import listing
from tests.conftest import tiny_config
from tests.launch.conftest import Quick, assert_same
from tests.launch.faults import kill, processes, ranks, reached, until

pytestmark = pytest.mark.usefixtures("one_thread")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def shell(command: str, **environment: str) -> subprocess.Popen[bytes]:
    """A command line as a user's shell runs it, with this interpreter's programs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(["bash", "-c", command], env=os.environ | environment, start_new_session=True)


def test_two_machines(tmp_path: Path, quick: Quick, undisturbed: TrainConfig) -> None:
    """Stopped on one, continued, a rank killed and restarted: the end is that of two processes on one machine."""
    config = quick(tmp_path / "run")
    where = f"127.0.0.1:{free_port()}"

    def start(**more: Any) -> list[Any]:
        return [train(config, nnodes=2, rdzv_endpoint=where, **more) for _ in range(2)]

    first, second = start()
    until(reached(first, 32))
    assert train(config, nproc=2).process is None  # a handle on what runs
    with pytest.raises(GddlabError, match="being run by another process"):
        train(config, nnodes=2, rdzv_endpoint=f"127.0.0.1:{free_port()}")
    assert second.process is not None
    kill(second.process.pid, signal.SIGTERM)  # as one machine's system does when it goes down
    assert first.wait(120).status == second.wait(120).status == "stopped"
    assert not processes(config.run_dir)
    seen = first.written_status["nimg"]
    assert 0 < seen < 320

    first, second = start(max_restarts=2)
    until(reached(first, seen + 16))
    kill(ranks(config.run_dir)[1])
    assert first.wait(300).status == second.wait(300).status == "done"
    assert not processes(config.run_dir)
    assert_same(config, undisturbed)
    assert len(read_json(config.run_dir / "provenance.json")["starts"]) == 3


@pytest.mark.parametrize("how", ["SIGUSR1", *(pytest.param(how, marks=pytest.mark.slow) for how in ("stop", "SIGINT"))])
def test_torchrun_by_hand(how: str, tmp_path: Path, quick: Quick, undisturbed: TrainConfig) -> None:
    """The printed line trains and continues; the directory is locked meanwhile; SIGUSR1, as clusters send it,
    Ctrl-C and `stop` end it with a checkpoint.
    """
    config = quick(tmp_path / "run")
    command = prepared(config, Launch(nproc=2), "torchrun")
    assert re.search(r"torchrun --nnodes=1 --nproc-per-node=2 --standalone .* -m gddlab.launch.rank /", command)
    job = shell(command)
    until(lambda: attach(config.run_dir).written_status.get("nimg", 0) >= 32)
    assert train(config).process is None
    if how == "stop":
        attach(config.run_dir).stop(60)
        assert job.wait(60) == 0
    else:
        kill(job.pid, getattr(signal, how))  # bash became torchrun, which hands it on
        until(lambda: not held(config.run_dir), 60)
        job.wait(60)
    assert attach(config.run_dir).status == "stopped"
    # a job of a cluster that was stopped by hand, or by an alarm, is not put into the queue again
    assert (attach(config.run_dir).written_status.get("cause") == OUT_OF_TIME) == (how == "SIGUSR1")
    assert 0 < attach(config.run_dir).written_status["nimg"] < 320

    job = shell(command)
    assert job.wait(300) == 0
    assert attach(config.run_dir).status == "done"
    assert_same(config, undisturbed)


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
trap 'kill -USR1 $(jobs -p)' USR1
for node in 0 1; do SLURM_NODEID=$node "$@" & done
until wait; do :; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> {queue}; else echo 127.0.0.1; fi
"""


@pytest.mark.slow
def test_a_batch_script(tmp_path: Path, quick: Quick, undisturbed: TrainConfig) -> None:
    """Two machines through `srun`; the cluster's SIGUSR1 stops the job, which is requeued; the second job ends the
    run.
    """
    config = quick(tmp_path / "run")
    script = prepared(config, Launch(nnodes=2, rdzv_endpoint=HEAD), "slurm")
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in script
    for line in ("#SBATCH --nodes=2", "#SBATCH --signal=USR1@120", "#SBATCH --requeue"):
        assert line in script
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL.format(queue=tmp_path / "queue"))):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = script.replace("29500", str(free_port()))
    (tmp_path / "job.sh").write_text(script)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PATH": path, "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[0-1]"}
    job = shell(f"bash {tmp_path / 'job.sh'}", **more)
    until(lambda: attach(config.run_dir).written_status.get("nimg", 0) >= 32)
    for pid in processes_of("srun"):
        kill(pid, signal.SIGUSR1)
    assert job.wait(120) == 0
    assert attach(config.run_dir).status == "stopped"
    assert (tmp_path / "queue").read_text() == "17\n"
    job = shell(f"bash {tmp_path / 'job.sh'}", **more | {"SLURM_JOB_ID": "18"})
    assert job.wait(300) == 0
    assert attach(config.run_dir).status == "done"
    assert (tmp_path / "queue").read_text() == "17\n"
    assert_same(config, undisturbed)


def processes_of(name: str) -> list[int]:
    out = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if words[0].endswith("bash") and len(words) > 1 and words[1].endswith(f"/{name}"):
            out.append(int(path.parent.name))
    return out


def test_the_command_line_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "a run"
    words = ["train", "digits", "--run-dir", str(run_dir), "--nproc", "2", "--nnodes", "2", "--print-launch"]
    main([*words, "slurm", "--max-restarts", "3"])
    script = capsys.readouterr().out
    assert (
        "srun --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d "
        '--rdzv-endpoint="$head:29500"' in script
    )
    assert f"--max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m gddlab.launch.rank '{run_dir}'" in script
    assert "#SBATCH --job-name=a-run" in script and "#SBATCH --gpus-per-node=2" in script
    assert read_json(run_dir / "config.json")["batch"] > 0
    main([*words, "torchrun", "--rdzv-endpoint", "node0:29500", "--timeout-s", "90"])
    line = capsys.readouterr().out.strip()
    assert (
        line.startswith(
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 GDDLAB_TIMEOUT=90 torchrun "
        )
        and "\n" not in line
    )
    with pytest.raises(SystemExit):
        main([*words, "torchrun"])
    assert "give HOST:PORT of one of the machines" in capsys.readouterr().err


def test_refusals() -> None:
    for given, words in (
        ({"nnodes": 2}, "nnodes=2 without rdzv_endpoint"),
        ({"nnodes": 0}, "nnodes=0: give at least 1"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"rdzv_endpoint": "node0"}, "rdzv_endpoint='node0': give HOST:PORT"),
        ({"rdzv_endpoint": "node0:99999"}, "HOST:PORT"),
    ):
        with pytest.raises(GddlabError, match=words):
            Launch(**given)  # type: ignore[arg-type]


def test_the_lock_is_shared_by_one_job_only(tmp_path: Path) -> None:
    job = Job("node0:1", 2)
    a = take(tmp_path, job)
    b = take(tmp_path, job)
    for other in (Job("node0:2", 2), Job()):
        with pytest.raises(GddlabError, match="being run by another process"):
            take(tmp_path, other)
    assert held(tmp_path) and owners(tmp_path) is None
    sign(a, 11)
    sign(b, 12)
    assert owners(tmp_path) == [11, 12]
    os.close(a)
    assert held(tmp_path)
    os.close(b)
    assert not held(tmp_path) and owners(tmp_path) is None
    c = take(tmp_path, Job())
    assert owners(tmp_path) is None  # those that are gone are forgotten
    with pytest.raises(GddlabError, match="being run by another process"):
        take(tmp_path, job)
    os.close(c)


def test_a_lock_without_a_name_is_not_waited_for(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    monkeypatch.setattr("gddlab.launch.handle.UNSIGNED", 0.1)
    fd = take(config.run_dir)
    with pytest.raises(GddlabError, match="is locked by a process that has not said which one"):
        attach(config.run_dir).stop(5)
    sign(fd, os.getpid())
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND  # two that sign at once do not write over each other
    assert owners(config.run_dir) == [os.getpid()]
    os.close(fd)


def test_a_run_on_another_machine(tmp_path: Path, tiny_teacher: Path) -> None:
    """Its lock may not be visible here; its heartbeat is."""
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    write_status(config.run_dir, "running", nimg=16, total_nimg=48, host="elsewhere")
    run = attach(config.run_dir)
    assert run.status == "running"
    about = read_json(config.run_dir / "status.json")
    (config.run_dir / "status.json").write_text(str(about | {"heartbeat": about["heartbeat"] - 300}).replace("'", '"'))
    assert run.status == "failed"


def test_the_runs_below_a_folder(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state, more in (("b", "done", {"alarm": "collapse"}), ("c", "failed", {"message": "no\nspace"})):
        config = tiny_config(tmp_path / "runs" / name, tiny_teacher)
        config.write()
        write_status(config.run_dir, state, nimg=48, total_nimg=48, world_size=2, **more)
    found = listing(tmp_path / "runs")
    assert found.to_dict("list") == {
        "run": ["b", "c"],
        "state": ["done", "failed"],
        "kimg": ["0.048 of 0.048"] * 2,
        "processes": ["2", "2"],
        "heard": ["", ""],
        "note": ["collapse", "no"],
    }
    main(["runs", str(tmp_path / "runs"), "--state"])
    assert capsys.readouterr().out == "done\nfailed\n"
    main(["runs", str(tmp_path / "runs"), "--json"])
    assert json.loads(capsys.readouterr().out) == found.to_dict("records")
    main(["runs", str(tmp_path / "runs" / "b")])
    assert "0.048 of 0.048" in capsys.readouterr().out
    with pytest.raises(NotFound, match="no such folder"):
        listing(tmp_path / "nowhere")


def test_a_damaged_run_does_not_end_the_list(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a config.json of something else; the folder may be relative."""
    for name in ("a", "b", "c", "d"):
        config = tiny_config(tmp_path / "runs" / name, tiny_teacher)
        config.write()
        write_status(config.run_dir, "done", nimg=48, total_nimg=48, world_size=1)
    (tmp_path / "runs" / "b" / "status.json").write_text("{")
    (tmp_path / "runs" / "c" / "status.json").write_text('{"state": "done", "total_nimg": 48}')
    (tmp_path / "runs" / "d" / "config.json").write_text("no JSON")
    for name, text in (("bert", '{"hidden_size": 768}'), ("other", "no JSON")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = listing("runs").set_index("run")
    assert found["state"].to_dict() == {"a": "done", "b": "damaged", "c": "damaged", "d": "damaged"}
    assert "status.json is not JSON" in found.loc["b", "note"] and "config.json is not JSON" in found.loc["d", "note"]
    assert listing("runs/a")["run"].tolist() == ["a"]
