"""The demo, shortened: it goes the whole way, writes page and numbers, and continues instead of repeating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gddlab
from gddlab import demo as demo_module
from gddlab.distill import presets
from gddlab.errors import GddlabError
from gddlab.files import read_json
from tests.evaluation.conftest import small_features


@pytest.mark.parametrize("data", ["digits", pytest.param("emoji", marks=pytest.mark.slow)])
def test_demo_writes_page_and_numbers_and_continues(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = presets.PRESETS[data]

    def short(**fields: Any) -> Any:
        return preset(
            **fields, total_kimg=0.064, snapshot_kimg=0.032, tick_kimg=0.032, discriminator={"cache_real": False}
        )

    monkeypatch.setitem(presets.PRESETS, data, short)
    evaluate = gddlab.evaluate

    def few(*args: Any, **given: Any) -> Any:
        return evaluate(*args, **(given | {"n": 16}))

    monkeypatch.setattr("gddlab.evaluation.run_scores.evaluate", few)
    monkeypatch.setattr(gddlab, "evaluate", few)
    monkeypatch.setattr(demo_module, "PROBED", 2)
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    small_features(monkeypatch, gddlab.load_teacher(data).card.resolution)
    numbers = demo_module.demo(tmp_path, data=data, seed=3, recompute=True)
    asked = {"fd_teacher_1", "fd_teacher_18", "fd_student", "fd_real_split", "frozen_fraction", "kimg", "seconds"}
    assert asked <= set(numbers)
    assert read_json(tmp_path / "demo.json") == numbers
    assert numbers["metric"] == "fd-lite2@16"
    assert numbers["fd_teacher_18"] < numbers["fd_teacher_1"]
    assert (numbers["kimg"], numbers["seed"], numbers["continued"]) == (0.064, 3, False)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") >= 10 and "upper halves" in page
    assert f"presets.{data}(" in page and demo_module.SHOWN[data] in page
    assert "student, 0.064 kimg" in page
    for file in ("images.png", "mask.json", "mask-measured.json", "probe/frame.parquet", "run/student.safetensors"):
        assert (tmp_path / file).exists(), file

    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = demo_module.demo(tmp_path, data=data, seed=3, recompute=True)
    assert again["continued"]
    assert again["fd_student"] == numbers["fd_student"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_demo_names_the_data_it_knows(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="'emojis': did you mean 'emoji'"):
        demo_module.demo(tmp_path / "out", data="emojis")
    assert not (tmp_path / "out").exists()
