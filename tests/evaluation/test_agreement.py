"""The same folders of PNG files through torch-fidelity's own command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from gddlab.evaluation import EXTRACTORS, evaluate
from gddlab.evaluation.metrics import KID_SUBSETS
from gddlab.sampling import sample_files
from tests.conftest import tiny_net
from tests.evaluation.networks import save_inception

N = 12


def test_equal_to_the_command_line_of_torch_fidelity(tmp_path, monkeypatch):
    weights = save_inception(tmp_path / "inception.pth")
    monkeypatch.setenv("GDDLAB_INCEPTION", str(weights))
    folders = [
        sample_files(tiny_net(seed=s), tmp_path / f"images-{s}", N, steps=2, seed=9 * s, progress=False) for s in (0, 1)
    ]
    words = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent", "--no-cache"]
    words += ["--isc", "--fid", "--kid", "--prc", "--feature-extractor", "inception-v3-compat"]
    words += ["--feature-extractor-weights-path", str(weights), "--save-cpu-ram"]
    for metric in ("fid", "kid", "prc"):  # of 768 features; the Frechet distance of 2048 takes 10 s on each side
        words += [f"--feature-layer-{metric}", "768"]
    spec = dataclasses.replace(EXTRACTORS["inception"], layer="768", dims=768)
    monkeypatch.setitem(EXTRACTORS, "inception", spec)
    words += ["--kid-subsets", str(KID_SUBSETS), "--kid-subset-size", str(N)]
    words += ["--input1", str(folders[0]), "--input2", str(folders[1])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)
    ours = evaluate(folders[0], data=folders[1], metrics=("fid", "kid", "prc", "is"), extractor="inception")
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours.record("is").std == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    assert ours["fid"] > 1e-3 and ours["kid"] != 0 and ours["is"] > 1
