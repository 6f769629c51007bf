"""Runs in fresh processes: two equal one, stop and kill, continue, failures are told."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from gddlab.cli import main
from gddlab.distill import presets
from gddlab.distill.checkpoints import checkpoints
from gddlab.distill.config import TrainConfig
from gddlab.distill.recorder import write_status
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import evaluate, load_records
from gddlab.files import read_json
from gddlab.freezing import select_freeze
from gddlab.launch import RunFailed, attach, train
from gddlab.launch.rank import report_failure
from gddlab.lock import held, take
from gddlab.runs import list_runs, load_run
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config, tiny_net
from tests.launch.conftest import Quick
from tests.launch.faults import ALONE, reached, until


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),  # what the others are, too
        pytest.param(
            {"batch_per_device": 2, "instance": {"kind": "ctm", "distance": "l2", "steps": 4}}, marks=pytest.mark.slow
        ),
        {
            "augment": {"ops": ("blit", "color"), "ada_target": 0.1, "ada_kimg": 0.1},
            "batch_per_device": 2,
            "mid_sigmas": (0.8,),
            "shard": True,
            "snapshot_raw": True,
        },
    ],
    ids=["plain", "accumulation, instance loss", "sharded, ada, accumulation, two steps"],
)
def test_two_processes_equal_one(tmp_path: Path, tiny_teacher: Path, more: dict[str, Any]) -> None:
    """Same global batch and noise, float64, synchronised BatchNorm: parameters after 3 steps agree to 1e-9."""
    mask = select_freeze(load_teacher(tiny_teacher), strategy="gdd-i")
    fields = {"mask": mask, "precision": "float64", "discriminator": {"sync_batchnorm": True}, **more}
    fields |= {"total_kimg": 0.024, "checkpoint_kimg": 0.024, "probe_kimg": 0.024}
    config = tiny_config(tmp_path / "one", tiny_teacher, **fields)
    config.write()
    one = Trainer(config, ALONE)
    one.train()
    config = tiny_config(tmp_path / "two", tiny_teacher, **fields)
    run = train(config, nproc=2).wait(240)
    assert run.status == "done"
    assert read_json(run.run_dir / "provenance.json")["world_size"] == 2
    alone, shared = (load_run(tmp_path / name).probes for name in ("one", "two"))
    assert sorted(set(shared["kimg"])) == [0.0, 0.024]
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-6, atol=1e-6)
    two = Trainer(config, ALONE)
    assert two.restore()
    assert one.iteration == two.iteration == 3
    seen = 0
    for a, b in ((one.step.g, two.step.g), (one.ema, two.ema), (one.step.d, two.step.d)):
        for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            if not name.endswith(".main.0.bias"):  # a bias before BatchNorm: its true gradient is 0
                assert_close(p, q, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "sharded"])
def test_two_processes_score_together(shard: bool, tmp_path: Path, tiny_teacher: Path) -> None:
    """Each score is one record, and what one process says of the same student; the best one's checkpoint stays beside
    the newest.
    """
    fields = {"total_kimg": 0.048, "metric_kimg": 0.016, "metric_n": 16, "keep_checkpoints": 1, "shard": shard}
    run = train(tiny_config(tmp_path / "run", tiny_teacher, **fields), nproc=2).wait(240)
    records = load_records(run.run_dir)
    assert [r.kimg for r in records] == [0.016, 0.032, 0.048]
    assert run.best is not None
    assert run.best["value"] == min(r.value for r in records)
    alone = evaluate(run.student("best"), data="digits:train", metrics=("fid",), n=16, progress=False)
    assert_close(alone["fd-lite2"], run.best["value"], rtol=1e-4, atol=0)
    best = float((run.run_dir / "checkpoints" / "best").read_text())
    assert best == run.best["kimg"]
    assert {float(p.name) for p in checkpoints(run.run_dir)} == {best, 0.048}


def test_the_same_call_returns_a_run_that_is_done(undisturbed: TrainConfig) -> None:
    run = train(undisturbed, nproc=2)
    assert run.status == "done" and run.process is None
    assert not held(run.run_dir)
    assert "kimg" in run.tail()
    assert run.metrics["nimg"].tolist() == [16 * i for i in range(1, 21)]
    assert run.student().card.kimg == pytest.approx(0.32)
    assert "Warning" not in (run.run_dir / "log" / "launch.txt").read_text()  # such as runpy's
    with pytest.raises(GddlabError, match="batch is 8 there, 16 here"):
        train(undisturbed.model_copy(update={"batch": 16}), nproc=2)


def test_stop_kill_and_continue(tmp_path: Path, quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    config = quick(tmp_path / "run", total_kimg=100)
    run = train(config)
    until(reached(run, 16))
    again = train(config)  # as of a cell that is executed twice
    assert again.process is None and again.status == "running"
    with pytest.raises(GddlabError, match="batch is 8 there, 16 here"):
        train(config.model_copy(update={"batch": 16}))
    main(["stop", str(tmp_path / "run")])  # as from another shell
    assert "run: stopped" in capsys.readouterr().out
    assert run.status == attach(tmp_path / "run").status == "stopped"
    stopped_at = run.written_status["nimg"]
    assert stopped_at > 0
    run = train(config)
    until(reached(run, stopped_at + 8))
    began = time.monotonic()
    main(["kill", str(tmp_path / "run")])
    assert time.monotonic() - began < 10
    assert run.status == "stopped"
    assert not held(run.run_dir)
    assert run.written_status["nimg"] >= stopped_at


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_while_it_starts_continues(nproc: int, tmp_path: Path, quick: Quick) -> None:
    config = quick(tmp_path / "run", total_kimg=0.032)
    assert train(config, nproc=nproc).stop(120).status == "stopped"
    assert not held(config.run_dir)
    run = train(config, nproc=nproc).wait(240)
    assert run.status == "done"
    assert run.metrics["nimg"].tolist() == [16, 32]


def test_a_run_that_diverges_says_so_in_one_line(tmp_path: Path, quick: Quick) -> None:
    run = train(quick(tmp_path / "run", lr_g=1e30))
    with pytest.raises(RunFailed, match=r"the loss was not finite .* continue from the start, as no checkpoint") as e:
        run.wait(120)
    assert "\n" not in str(e.value)
    assert run.status == "failed"
    assert "Traceback" in run.tail()


def test_an_error_comes_with_the_traceback_of_its_rank(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    try:
        raise RuntimeError("no such thing")
    except RuntimeError as e:
        report_failure(config.run_dir, e, rank=1)
    with pytest.raises(RunFailed, match=r"failed on rank 1:\nTraceback(.|\n)*RuntimeError: no such thing"):
        attach(config.run_dir).wait()


def test_dead_run_reads_failed(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    write_status(config.run_dir, "running")
    assert attach(config.run_dir).status == "failed"
    with pytest.raises(RunFailed, match=r"ended without a word.*the same call continues from the start.*\n.*: empty"):
        attach(config.run_dir).wait()
    (config.run_dir / "log").mkdir()
    (config.run_dir / "log" / "rank0.txt").write_text("one\ntwo\n")
    (config.run_dir / "checkpoints" / "000000.016").mkdir(parents=True)
    (config.run_dir / "checkpoints" / "000000.016" / "meta.json").write_text("{}")
    with pytest.raises(RunFailed, match=r"continues from the checkpoint of 0.016 kimg.*\n.*: two$"):
        attach(config.run_dir).wait()
    (row,) = list_runs(config.run_dir)
    assert row["state"] == "failed" and "continues from the checkpoint of 0.016 kimg" in row["note"]
    fd = take(config.run_dir)
    assert attach(config.run_dir).status == "running"
    os.close(fd)


def test_refusals(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(NotFound, match="no such run directory"):
        attach(tmp_path / "nowhere")
    with pytest.raises(GddlabError, match="batch=8 on 3 processes"):
        train(tiny_config(tmp_path / "run", tiny_teacher), nproc=3)
    with pytest.raises(GddlabError, match="nproc=0"):
        train(tiny_config(tmp_path / "run", tiny_teacher), nproc=0)
    with pytest.raises(GddlabError, match=r"nproc=2\.0: give an integer"):
        train(tiny_config(tmp_path / "run", tiny_teacher), nproc=2.0)  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match="unknown extractor 'lite3': did you mean"):
        train(tiny_config(tmp_path / "run", tiny_teacher, metric_kimg=0.016, metric_extractor="lite3"))
    if not torch.cuda.is_available():
        with pytest.raises(GddlabError, match="torch sees no CUDA device"):
            train(tiny_config(tmp_path / "run", tiny_teacher, device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_mask_that_was_edited_is_refused_at_the_call(tmp_path: Path, tiny_teacher: Path) -> None:
    mask = select_freeze(load_teacher(tiny_teacher), strategy="gdd-i")
    config = tiny_config(tmp_path / "run", tiny_teacher, mask=mask)
    config.write()
    path = tmp_path / "run" / "mask.json"
    path.write_text(path.read_text().replace("gdd-i", "gdd-j"))
    config.write()  # its name decides nothing
    path.write_text(path.read_text().replace(mask.frozen[0], "model.nothing", 1))
    with pytest.raises(GddlabError, match=r"mask\.json: "):
        train(config)


def test_a_file_called_as_a_module_of_pythons_is_not_imported(tmp_path: Path, quick: Quick) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert train(quick(tmp_path / "run", total_kimg=0.016)).wait(120).status == "done"


def test_objects_of_the_calling_process_are_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    class Own(TrainConfig):
        """As it would be defined in a cell."""

    own = Own(**tiny_config(tmp_path / "run", tiny_teacher).model_dump())
    with pytest.raises(
        GddlabError, match=r"config is a .*Own, which the processes of a run do not know: give a TrainC"
    ):
        train(own)
    with pytest.raises(GddlabError, match=r"config is a builtins.str"):
        train("digits")  # type: ignore[arg-type]
    advice = {
        "teacher": (
            tiny_net(),
            r"nets.precond.EDMPrecond\), .* save it with gddlab.nets.save_network and give the path",
        ),
        "data": (object(), r"builtins.object\), .* with gddlab.prepare and give the path"),
        "seed": (object(), r"builtins.object\), .* give a name, a number or a path"),
        "mask": (
            lambda name: True,
            r"<lambda>\), .* choose it with gddlab.select_freeze, or save it and give the path",
        ),
    }
    for field, (value, words) in advice.items():
        with pytest.raises(GddlabError, match=f"^{field} is an object of this process .*{words}$"):
            presets.digits(run_dir=tmp_path / "run", **{field: value})
    assert not (tmp_path / "run").exists()
