"""Conversion: equal outputs, nothing lost, nothing half-written; the bundled teachers give the numbers of before."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from gddlab.errors import GddlabError
from gddlab.files import data_dir
from gddlab.nets import OneStepPrecond, from_edm
from gddlab.probing import probe
from gddlab.sampling import image_grid, sample
from gddlab.teachers import convert, load_teacher
from tests.conftest import TINY, tiny_net
from tests.teachers.pickles import write_snapshot


@pytest.mark.parametrize("name", ["digits", "digits-cond"])
def test_bundled_teachers_through_a_pickle_give_the_numbers_of_before(name: str, tmp_path: Path) -> None:
    bundled = load_teacher(name)
    pickled = write_snapshot(tmp_path / "network-snapshot.pkl", bundled)
    done = convert(pickled, tmp_path / "teacher.safetensors")
    assert done.outputs == (10 if bundled.label_dim else 5)
    teacher = load_teacher(tmp_path / "teacher.safetensors")
    assert teacher.card.sha256 == done.card.sha256 == bundled.card.sha256
    assert "bit for bit" in str(done)

    settings = {"timesteps": [80.0, 1.0], "data": "digits", "n": 8, "stats": ("rms", "rel_update"), "progress": False}
    before, after = (probe(t, **settings).frame for t in (bundled, teacher))  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(before, after)
    for steps in (1, 5):  # the samples that ship were drawn when the teacher was trained
        grid = image_grid(sample(teacher, 64, steps=steps), columns=8)
        shipped = np.asarray(Image.open(data_dir() / "teachers" / name / f"samples-{steps}.png")).astype(int)
        assert np.abs(grid.astype(int) - shipped).max() <= 2


def test_metadata_keeps_what_the_network_does_not_say(tmp_path: Path) -> None:
    net = tiny_net(label_dim=10)
    path = write_snapshot(tmp_path / "x.pkl", net)
    card = convert(path, tmp_path / "y.safetensors").card
    assert card.original is not None
    assert card.original["file"] == "x.pkl"
    assert card.original["class"] == "EDMPrecond"
    assert card.original["data"] == "digits-16x16.zip"
    assert len(card.original["sha256"]) == 64
    assert (card.classes, card.sigma_min, card.sigma_max) == (10, 0.002, 80.0)
    assert card.init_kwargs == load_teacher(path).init_kwargs
    assert "x.pkl" in str(card)
    with safe_open(tmp_path / "y.safetensors", framework="pt") as f:
        assert {"format", "precond", "init_kwargs", "meta"} <= set(f.metadata())
    again = convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors")
    assert again.card.original == card.original


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "GDDPrecond"])
def test_every_preconditioning(precond: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = from_edm("OneStepPrecond" if precond == "GDDPrecond" else precond, **TINY)
    path = write_snapshot(tmp_path / "x.pkl", net, cls=precond)
    card = convert(path, tmp_path / "y.safetensors").card
    again = load_teacher(tmp_path / "y.safetensors")
    assert type(again) is type(net)
    assert isinstance(again, OneStepPrecond) == (precond == "GDDPrecond")
    expected = {"VEPrecond": (0.02, 100.0), "GDDPrecond": (0.002, 80.0)}
    if precond in expected:
        assert (card.sigma_min, card.sigma_max) == expected[precond]
    assert 0 < card.sigma_min < card.sigma_max < float("inf")


def test_refusals(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path / "x.pkl", tiny_net())
    with pytest.raises(GddlabError, match=r"y\.pt does not end in \.safetensors"):
        convert(path, tmp_path / "y.pt")
    (tmp_path / "y.safetensors").write_bytes(b"precious")
    with pytest.raises(GddlabError, match="exists"):
        convert(path, tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == b"precious"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GddlabError, match="is below a file"):
        convert(path, tmp_path / "file" / "y.safetensors")


def test_a_converted_network_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["gddlab.teachers.convert"]  # the package has a function of that name

    load = module.load_network

    def damaged(path: Path) -> tuple[torch.nn.Module, dict[str, object]]:
        net, meta = load(path)
        next(net.parameters()).data.add_(1e-3)
        return net, meta

    monkeypatch.setattr(module, "load_network", damaged)
    path = write_snapshot(tmp_path / "x.pkl", tiny_net())
    with pytest.raises(GddlabError, match="differs"):
        convert(path, tmp_path / "y.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


def test_the_card_keeps_how_noise_levels_were_drawn(tmp_path: Path) -> None:
    for name in ("digits", "digits-dit"):
        copy = load_teacher(convert(name, tmp_path / f"{name}.safetensors").path)
        assert copy.card.levels == load_teacher(name).card.levels and "ln sigma" in str(copy.card)
