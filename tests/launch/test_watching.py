"""What `watch` shows, by who looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gddlab.distill.recording import write_status
from gddlab.launch import attach
from gddlab.launch.watching import _picture, audience, follow, line
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
    assert text.startswith("a: done  0.0 of 0.0 kimg  loss G 0.700  D 1.400  10.0 s/kimg")


def test_quiet_under_test_and_plain_in_a_log(
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    assert audience() == "nobody"
    follow(run, 0.1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("PYTEST_VERSION")
    assert audience() == "log"
    follow(run, 0.1)
    assert capsys.readouterr().err == line(run) + "\n"


def test_picture_has_losses_logits_and_grid(run) -> None:  # type: ignore[no-untyped-def]
    titles = [ax.get_title() for ax in _picture(run).axes]
    assert titles[:2] == ["loss", "logits"]
