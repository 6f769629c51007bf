"""Exported students: used in a process without gddlab, checked, whole or absent."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.files import hash_tensors
from gddlab.nets import Precond, from_edm
from gddlab.nets import export as module
from gddlab.nets.export import export
from gddlab.nets.io import make_student
from tests.conftest import tiny_net
from tests.nets.test_unets import NETS, SMALL, shaken
from tests.teachers.attacks import small_net

FRESH = """
import json, sys
import numpy as np, torch
case = np.load("case.npz")
z, labels = case["z"], case["labels"]
extra = {"gddlab.json": ""}
program = torch.export.load("student.pt2", extra_files=extra)
with torch.no_grad():
    a = program.module()(torch.from_numpy(z), torch.from_numpy(labels)).numpy()
import onnxruntime
session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
shapes = {i.name: i.shape for i in session.get_inputs()}
b = session.run(["images"], {"z": z, "class_labels": labels})[0]
assert "gddlab" not in sys.modules
print(json.dumps({
    "pt2": float(abs(a - case["images"]).max()),
    "onnx": float(abs(b - case["images"]).max()),
    "shapes": shapes,
    "metadata": [json.loads(extra["gddlab.json"]), session.get_modelmeta().custom_metadata_map],
}))
"""


@pytest.fixture(scope="module")
def student() -> Precond:
    precond, kwargs = NETS["ncsnpp"]
    return make_student(shaken(precond, kwargs)).eval()


def test_files_work_without_gddlab(student: Precond, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from gddlab.sampling import latents

    before = hash_tensors(student.state_dict())
    for suffix, tolerance in ((".pt2", 1e-6), (".onnx", 1e-4)):
        made = export(student, tmp_path / f"student{suffix}", progress=False)
        assert made.path.stat().st_size == made.size
        assert made.max_difference <= tolerance and made.batches == (1, 3)
        assert "pixels differ by at most" in str(made)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0
    assert hash_tensors(student.state_dict()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.onnx", "student.pt2"]

    z, labels = latents(range(5), (3, 16, 16)), torch.eye(10)[:5]
    with torch.no_grad():
        images = student.generate(z, labels).clamp(-1, 1)
    np.savez(tmp_path / "case.npz", z=z, labels=labels, images=images)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found["pt2"] <= 1e-6 and found["onnx"] <= 1e-4
    assert [s[1:] for s in found["shapes"].values()] == [[3, 16, 16], [10]]
    assert all(isinstance(s[0], str) for s in found["shapes"].values())  # a free batch size
    for metadata in found["metadata"]:
        assert metadata["sha256"] == before and metadata["sigma"] == "80.0"
        spec = json.loads(metadata["architecture"])
        assert from_edm(spec["precond"], **spec["init_kwargs"]).state_dict().keys() == student.state_dict().keys()


def test_other_networks_need_a_sigma(tmp_path: Path) -> None:
    """As SiD's students: EDM's preconditioning at a fixed sigma; ADM; float64 becomes float32; unconditional."""
    net = shaken("EDMPrecond", SMALL | {"model_channels": 32}).double()
    with pytest.raises(GddlabError, match="EDMPrecond is no one-step student: give sigma="):
        export(net, tmp_path / "a.pt2")
    made = export(net, tmp_path / "a.pt2", sigma=2.5)
    assert made.metadata["sigma"] == "2.5" and made.metadata["class_labels"] == "none"
    z = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        y = torch.export.load(tmp_path / "a.pt2").module()(z)
        assert (y - net.float()(2.5 * z, 2.5).clamp(-1, 1)).abs().max() <= 1e-5


def test_refusals(student: Precond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GddlabError, match=r"student.pth'.*give .onnx or .pt2"):
        export(student, tmp_path / "student.pth")
    with pytest.raises(GddlabError, match="Linear cannot be exported"):
        export(torch.nn.Linear(2, 2), tmp_path / "student.pt2")  # type: ignore[arg-type]
    with pytest.raises(GddlabError, match="sigma=0: this network accepts above 0 and finite"):
        export(student, tmp_path / "student.pt2", sigma=0)
    two = make_student(tiny_net(), mid_sigmas=(0.8,))
    with pytest.raises(GddlabError, match="takes 2 steps, an exported one takes one: give sigma=80"):
        export(two, tmp_path / "student.pt2")
    with pytest.raises(GddlabError, match="opset=3: give 18 to 23"):
        export(student, tmp_path / "student.onnx", opset=3)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else find(n, *a))
    with pytest.raises(GddlabError, match=r"needs onnxscript: pip install 'gddlab\[export\]'"):
        export(student, tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_the_check_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, out = make_student(small_net(label_dim=2)), tmp_path / "student.pt2"
    out.write_bytes(b"older")
    monkeypatch.setattr(module, "_open_pt2", lambda _: lambda z, labels: torch.zeros_like(z))
    with pytest.raises(GddlabError, match=r"is not written: its images differ by \d"):
        export(student, out, overwrite=True)
    monkeypatch.setattr(module, "_open_pt2", lambda _: lambda z, labels: z if len(z) == 1 else z * float("nan"))
    with pytest.raises(GddlabError, match="differ by nan"):
        export(student, out, overwrite=True)

    def fails(_: Path) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(module, "_open_pt2", fails)
    with pytest.raises(GddlabError, match=r"student.pt2 cannot be exported: RuntimeError: no such operator$"):
        export(student, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["student.pt2"] and out.read_bytes() == b"older"
