"""Presets: functions that return a configuration; any field can be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gddlab.distill.config import TrainConfig

__all__ = ["digits"]


def digits(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on the embedded digits, on a CPU.

    Args:
        run_dir: Folder of the run.
        **fields: Any field of TrainConfig, in place of the preset's.

    Returns:
        A frozen configuration.
    """
    settings: dict[str, Any] = {
        "teacher": "digits",
        "data": "digits",
        "total_kimg": 20,
        "batch": 64,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "adversarial_weight": 64,
        "r1_gamma": 1e-4,
        "ema_halflife_kimg": 1,
        "input_size": 64,
        "cout": 32,
        "head_width": 128,
        "reuse_fakes": True,
        "cache_real": True,
        "tick_kimg": 0.512,
        "snapshot_kimg": 5.12,
        "checkpoint_kimg": 5.12,
    }
    return TrainConfig(run_dir=Path(run_dir), **(settings | fields))
