"""Golden cases: the folder named by GDDLAB_GOLDEN when set, else the copies beside this file."""

from __future__ import annotations

import copy
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(os.environ.get("GDDLAB_GOLDEN") or Path(__file__).parent)


def fill(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The rule that gives every parameter of a golden case from the case's seed and the parameter's name."""
    w = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    if len(shape) >= 2:
        w *= 0.6 / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("weight", "gain")):
        w = 1 + 0.2 * w
    elif name.endswith(("weight_u", "weight_v")):
        w /= np.linalg.norm(w)
    else:
        w *= 0.1
    return torch.from_numpy(np.asarray(w, dtype=np.float32))


class Case:
    """Arrays and meta of one .npz file."""

    def __init__(self, path: Path):
        with np.load(path) as z:
            self.arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}
            self.meta: dict[str, Any] = json.loads(str(z["meta"]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    def get(self, name: str) -> torch.Tensor | None:
        return self.arrays.get(name)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """The same case with its arrays on a device, of their own type or another."""
        out = copy.copy(self)
        out.arrays = {k: v.to(device, dtype) for k, v in self.arrays.items()}
        return out

    def prefixed(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = metafunc.module.__name__.rpartition("test_")[2]
    if "case" in metafunc.fixturenames:
        paths = sorted((ROOT / kind).glob("*.npz"))
        metafunc.parametrize("case", paths, ids=[p.stem for p in paths], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)
