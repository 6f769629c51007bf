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
        "total_kimg": 12,
        "batch": 16,
        "lr_g": 4e-4,
        "lr_d": 4e-4,
        "adversarial_weight": 64,
        "r1_gamma": 1e-4,
        "ema_halflife_kimg": 2,
        "ema_rampup": 0.2,
        "input_size": 64,
        "cout": 16,
        "head_width": 64,
        "reuse_fakes": True,
        "cache_real": True,
        "tick_kimg": 0.256,
        "snapshot_kimg": 4,
        "checkpoint_kimg": 2,
    }
    return TrainConfig(run_dir=Path(run_dir), **(settings | fields))
