"""Scores of a teacher by number of steps, kept beside its weights and shown on its card."""

from __future__ import annotations

from pathlib import Path

from gddlab.evaluation.run_scores import score_teacher
from gddlab.nets import save_network
from gddlab.teachers import load_teacher
from tests.conftest import tiny_net


def test_scores_are_kept_and_shown(tmp_path: Path, counter, monkeypatch) -> None:
    monkeypatch.setattr("gddlab.evaluation.run_scores.STEPS", (2,))
    save_network(tiny_net(), tmp_path / "teacher.safetensors", name="tiny", data="digits")
    records = score_teacher(tmp_path, n=16, progress=False)
    assert {r.sampler for r in records} == {"heun-2", "data"}
    card = load_teacher(tmp_path).card
    assert [s["value"] for s in card.scores] == [r.value for r in records]
    assert "fd-lite2@16" in str(card)
    assert (tmp_path / "samples-2.png").exists()
