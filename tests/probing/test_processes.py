"""Processes share the images and all have the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gddlab.probing import ProbeResult, probe
from gddlab.teachers import load_teacher

RANK = """
import sys, torch
from gddlab.probing import ProbeResult, probe
from gddlab.teachers import load_teacher
rank, size, store, teacher, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
for n in (13, 1):
    stats = ("rms", "cosine", "correlation", "cka", "rel_update") if n > 8 else ("rms", "cosine")
    result = probe(load_teacher(teacher), [80.0, 1.0, 0.1], n=n, batch_size=6, stats=stats, per_channel=True)
    result.save(f"{out}/{n}-{rank}")
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path, tiny_teacher: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    args = ["2", str(tmp_path / "store"), str(tiny_teacher), str(tmp_path)]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(r), *args], env=env) for r in range(2)]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    most = ("rms", "cosine", "correlation", "cka", "rel_update")
    for n, stats in ((13, most), (1, ("rms", "cosine"))):
        one = probe(load_teacher(tiny_teacher), [80.0, 1.0, 0.1], n=n, batch_size=6, stats=stats, per_channel=True)
        both = [ProbeResult.load(tmp_path / f"{n}-{r}") for r in range(2)]
        pd.testing.assert_frame_equal(both[0].frame, both[1].frame, check_exact=True)
        pd.testing.assert_frame_equal(both[0].frame, one.frame, rtol=1e-5, atol=1e-6)
        for kind, matrices in one.matrices.items():
            assert all(np.allclose(both[0].matrices[kind][k], m, atol=1e-6) for k, m in matrices.items())
        assert both[0].meta["n_images"] == n
        for layer, found in one.channels.items():
            np.testing.assert_allclose(both[0].channels[layer]["mean"], found["mean"], rtol=1e-4, atol=1e-5)
    assert one.frame["n_images"].eq(1).all()


@pytest.mark.parametrize("n", [8, 17])
def test_cka_counts_whole_groups(tiny_teacher: Path, n: int) -> None:
    result = probe(load_teacher(tiny_teacher), [80.0, 1.0], n=n, stats="cka")
    assert result.frame["n_images"].eq(n // 8 * 8).all()
