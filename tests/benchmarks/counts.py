"""Operations and kernels of an iteration of each preset, per image, with random weights and images; prints JSON.

python tests/benchmarks/counts.py > tests/benchmarks/counts.json

notebooks/guide/scaling.ipynb reads them; `pytest -m slow tests/test_scaling.py` counts again and compares.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import gddlab
from gddlab.diagnosis.preflight import stand_ins
from gddlab.diagnosis.scaling import counted
from gddlab.distill.config import TrainConfig

PRESETS = ("cifar10", "cifar10_cond", "afhqv2", "ffhq", "imagenet64")


def configured(name: str) -> TrainConfig:
    """GDD-I by the authors' rule; GDD for AFHQv2, where it is the paper's best."""
    config = gddlab.presets.preset(name, run_dir="unused")
    if name == "afhqv2":
        return config
    mask = gddlab.select_freeze(stand_ins(config)[0], strategy="gdd-i")
    return gddlab.presets.preset(name, run_dir="unused", mask=mask)


if __name__ == "__main__":
    print(json.dumps({name: asdict(counted(configured(name), batch=1)) for name in PRESETS}, indent=2))
