"""What `watch` shows, by who looks."""

from __future__ import annotations

import gc
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gddlab.cli import main
from gddlab.distill.status import mark, progress_of, write_status
from gddlab.launch import attach
from gddlab.launch.handle import _picture, audience, follow, line
from gddlab.lock import take
from gddlab.runs import list_runs
from tests.conftest import tiny_config

TICK = {
    "nimg": 16,
    "kimg": 0.016,
    "loss/g": 0.7,
    "loss/d": 1.4,
    "logits/fake": -0.1,
    "logits/real": 0.1,
    "sec_per_kimg": 10.0,
}


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: Path):  # type: ignore[no-untyped-def]
    config = tiny_config(tmp_path / "a", tiny_teacher)
    config.write()
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(TICK) + "\n")
    write_status(config.run_dir, "done", nimg=16, total_nimg=48)
    return attach(config.run_dir)


def test_line_says_progress_and_time_left(run) -> None:  # type: ignore[no-untyped-def]
    text = line(run)
    assert text.startswith("a: done  0.016 of 0.048 kimg  loss G 0.700  D 1.400  10.0 s/kimg")


def test_plain_in_a_log(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert audience() == "log"
    follow(run, 0.1)
    assert capsys.readouterr().err == line(run) + "\n"


def test_interrupting_the_shell_says_how_to_end_the_run(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gddlab.launch.handle.follow", interrupted)
    monkeypatch.setattr("gddlab.demo.demo", interrupted)
    (run.run_dir.parent / "run").symlink_to(run.run_dir)
    for words in (["watch", str(run.run_dir)], ["demo", "--out", str(run.run_dir.parent)]):
        fd = take(run.run_dir)
        with pytest.raises(SystemExit) as e:
            main(words)
        os.close(fd)
        assert e.value.code == 130
        assert "is still running: gddlab watch, stop or kill " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["watch", str(run.run_dir)])
    assert capsys.readouterr().err == f"\ngddlab: nothing runs in {run.run_dir}\n"


def test_one_number_says_how_far_a_run_is(run) -> None:  # type: ignore[no-untyped-def]
    """Everywhere the same, in thousands of images, and kept when a run is started again and ended at once."""
    write_status(run.run_dir, "running", nimg=24, total_nimg=48)
    fd = take(run.run_dir)
    assert line(run).startswith("a: running  0.024 of 0.048 kimg  loss G 0.700  D 1.400  10.0 s/kimg  0 s left")
    os.close(fd)
    for state in ("starting", "failed", "stopped"):
        mark(run.run_dir, state)
    assert line(run) == "a: stopped  0.024 of 0.048 kimg  loss G 0.700  D 1.400  10.0 s/kimg"
    assert repr(run) == "<run a: stopped, 0.024 of 0.048 kimg>"
    assert list_runs(run.run_dir)[0]["kimg"] == "0.024 of 0.048"
    assert progress_of({"nimg": 123_456, "total_nimg": 200_000_000}) == "123.456 of 200000"


def test_a_terminal_is_not_filled(run, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """The live line is cut to the width, for it to be written again; an alarm is shown once, on its own line."""
    monkeypatch.setattr("gddlab.launch.handle.audience", lambda: "terminal")
    monkeypatch.setenv("COLUMNS", "40")
    alarm = "the discriminator wins: " + "lower lr_d " * 20
    states = iter(["running"] * 3 + ["done"])
    monkeypatch.setattr("gddlab.launch.handle.RunHandle.status", property(lambda self: next(states)))
    monkeypatch.setattr("gddlab.launch.handle.brief_line", lambda run: "a: running  " + "x" * 200)
    write_status(run.run_dir, "running", nimg=16, total_nimg=48, alarm=alarm)
    follow(run, 0.01)
    *shown, end = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert shown == [f"a: ALARM {alarm}\n", *["a: running  " + "x" * 27] * 3]
    assert end == "a: running  " + "x" * 200 + "\n"


def test_a_long_log_costs_nothing(run) -> None:  # type: ignore[no-untyped-def]
    """A log of 1 GiB and a line a step for days: the end is read, in no time and little memory."""
    (run.run_dir / "log").mkdir()
    with (run.run_dir / "log" / "rank0.txt").open("wb") as f:
        f.truncate(1 << 30)  # a hole, which reads as zeros
        f.seek(0, 2)
        f.write(b"".join(b"line %d\n" % i for i in range(100)))
    with (run.run_dir / "metrics.jsonl").open("a") as f:
        f.writelines(json.dumps(TICK | {"nimg": i, "kimg": i / 1000}) + "\n" for i in range(32, 50_000))
        f.write('{"nimg": 50')  # being written
    gc.collect()
    tracemalloc.start()
    try:
        assert run.tail(lines=2) == "line 98\nline 99"
        assert "0.016 of 0.048 kimg" in line(run)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    x = _picture(run).axes[0].lines[0].get_xdata()
    assert 1000 <= len(x) <= 1002
    assert (x[0], x[-1]) == (0.016, 49.999)
    assert (np.diff(x) > 0).all() and np.diff(x).max() < 0.07


def test_memory_does_not_grow_with_watching(run) -> None:  # type: ignore[no-untyped-def]
    (run.run_dir / "samples").mkdir()
    Image.new("L", (260, 260)).save(run.run_dir / "samples" / "000000.016.png")

    def look() -> int:
        for _ in range(2):
            buffer = io.BytesIO()
            _picture(run).savefig(buffer, format="png")
            assert line(run)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        look()
        first = look()
        assert look() - first < 200_000
    finally:
        tracemalloc.stop()


def test_picture_has_losses_logits_and_grid(run) -> None:  # type: ignore[no-untyped-def]
    titles = [ax.get_title() for ax in _picture(run).axes]
    assert titles[:2] == ["loss", "mean logit"]
