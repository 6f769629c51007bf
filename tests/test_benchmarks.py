"""The script for a card runs on a CPU, with what a bare machine has and what its docstring says to bring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.benchmarks import gpu

CLONE = Path(__file__).resolve().parents[1]
WITHOUT = """
import importlib.machinery, os, sys

class Finder(importlib.machinery.PathFinder):
    absent = frozenset(os.environ["GDDLAB_TEST_ABSENT"].split(","))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in cls.absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
"""A sitecustomize.py that hides packages from this process and those that it starts."""
TINY = """
import dataclasses, sys
from tests.benchmarks.gpu import SMALL, main

changes = {"seconds": 0.01, "product": 64, "copied": 1, "probed": (16,), "sampled": (2,), "heun": 1, "kimg": 0.032}
sys.exit(main(["--device", "cpu", "--small", *sys.argv[1:]], dataclasses.replace(SMALL, **changes)))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_needs(names: set[str]) -> set[str]:
    """Distributions and, of those that are installed here, all that they need."""
    found: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        found.add(name)
        try:
            wanted = [Requirement(r) for r in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        left |= {normal(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})} - found
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes long in a process of tests."""
    monkeypatch.setattr(gpu, "clean_up", lambda: None)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds only what the script's docstring names."""
    text = " ".join((gpu.__doc__ or "").split())
    there = re.search(r"network that has ([^.]*), bring the clone", text)
    wheels = re.search(r"--dest wheels \\ ([a-z0-9 \\-]*) \(pydantic-core", text)
    assert there is not None and wheels is not None
    has, brought = {normal(n) for n in re.findall(r"[\w-]+", there[1])} - {"and"}, set(wheels[1].split()) - {"\\"}
    assert {"torch", "pytest"} <= has and {"pandas", "tyro"} <= brought and not has & brought
    allowed = with_needs(has) | brought
    absent = {top for top, of in metadata.packages_distributions().items() if not {normal(n) for n in of} & allowed}
    absent -= {"gddlab", "tests"}  # some packages install their tests
    assert {"torch_fidelity", "lpips", "pooch", "diffusers"} <= absent
    assert not {"torch", "numpy", "scipy", "PIL", "pandas", "jinja2"} & absent
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(folder), str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"GDDLAB_TEST_ABSENT": ",".join(sorted(absent)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return os.environ | {"PYTHONPATH": path} | hidden


SOME = ("card", "rates", "golden network", "agreement", "training: fast*", "training: plain", "[ps]*: *", "demo")
"""All kinds of steps, without the golden training case, which tests/golden runs too."""


@pytest.mark.parametrize("only", [SOME, pytest.param(("*",), id="all", marks=pytest.mark.slow)])
def test_the_script_for_a_card_on_a_cpu(only: tuple[str, ...], bare: dict[str, str], tmp_path: Path) -> None:
    """Every step is done, or skipped since it needs a card; lines and file say the same."""
    out = tmp_path / "gpu.json"
    words = [sys.executable, "-c", TINY, "--out", str(out), "--limit", "900", "--only", *only]
    ran = subprocess.run(words, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    found = json.loads(out.read_text())
    assert "CPU" in found["device"] and found["goal_images_per_s"] == 463
    steps = found["steps"]
    lines = ran.stdout.splitlines()
    assert len(lines) == len(steps) and all(line.startswith(name) for line, name in zip(lines, steps, strict=True))
    modes = gpu.MODES | gpu.COMPILED
    card = {f"training: {n}" for n, m in modes.items() if m.card}
    card |= {f"sampling: {n}" for n, (tf32, _) in gpu.SAMPLING.items() if tf32}
    assert {s["state"] for n, s in steps.items() if n not in card} == {"done"}
    assert {s["state"] for n, s in steps.items() if n in card} == {"skipped"}
    assert 0 <= steps["golden network"]["largest_difference"] < 1e-4
    assert max(steps["agreement"]["differences"].values()) < 1e-2
    timed = [n for n in steps if n.startswith("training: ") and n not in card]
    for name in timed:
        mode = steps[name]
        cycle = 16 * mode["iteration_s"] + mode["r1_s"]
        assert mode["images_per_s"] == pytest.approx(16 * 2 / cycle, rel=1e-2)
        assert mode["of_goal"] == pytest.approx(mode["images_per_s"] / 463, rel=1e-2)
        gflop = mode["work"]["gflop_per_image"] + mode["work"]["gflop_per_image_r1"] / 16
        assert mode["tflops"] == pytest.approx(gflop * mode["images_per_s"] / 1e3, rel=1e-2)
        assert mode["share_of_rate"]["float32"] == pytest.approx(
            mode["tflops"] / steps["rates"]["tflops"]["float32"], rel=1e-2
        )
        assert mode["rise_mib"] >= 0 and len(mode["operations"]["most"]) == 10
        assert isinstance(mode["waits"], dict) and mode["images_at_once"] == 2
    # fast mode makes its generated images once, and never waits for its device
    works = {n.removeprefix("training: "): steps[n]["work"]["gflop_per_image"] for n in timed}
    assert works["fast"] < works["plain"]
    assert sum(steps["training: fast"]["waits"].values()) == 0
    assert steps["probe: 16 channels"]["ratio"] > 0.5 and steps["probe: DiT of width 64"]["layers"] > 8
    assert steps["sampling: bfloat16"]["images"]["2"]["network_images_per_s"] > 0
    assert steps["demo"] | {"scored": False, "state": "done", "kimg": 0.032} == steps["demo"]
    if only == ("*",):
        assert len(timed) == len([m for m in modes.values() if not m.card])
        assert 0 < steps["golden training"]["largest_difference"] < 2e-6
        assert works["fast"] < works["reference"] == works["the preset"] < works["plain"] * 1.01


def test_the_tests_for_a_card_are_found_there(bare: dict[str, str]) -> None:
    """`pytest -m gpu tests/gpu` imports all that it needs."""
    words = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "tests/gpu", "--collect-only", "-q"]
    ran = subprocess.run(words, env=bare, cwd=CLONE, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert int(re.findall(r"(\d+) tests collected", ran.stdout)[0]) >= 20


def test_a_wrong_device_stops_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where golden numbers differ, only --anyway continues; what was found is in the file, errors by their place."""

    def wrong(b: gpu.Bench, found: gpu.Found) -> str:
        found["largest_difference"] = 0.5
        raise AssertionError("off by 0.5")

    def fine(b: gpu.Bench, found: gpu.Found, *given: object) -> str:
        return "fine"

    steps = ("card", "rates", "agreement", "training", "probing", "sampling", "heun", "demo")
    for name in ("about" if s == "card" else s for s in (*steps, "golden_training")):
        monkeypatch.setattr(gpu, name, fine)
    monkeypatch.setattr(gpu, "golden_network", wrong)
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--small", "--out", str(out)]
    assert gpu.main(words) == 1
    found = json.loads(out.read_text())["steps"]
    assert list(found) == ["card", "rates", "golden network", "golden training"]
    network = found["golden network"]
    assert network | {"state": "failed", "error": "AssertionError: off by 0.5", "largest_difference": 0.5} == network
    assert re.fullmatch(r"tests/test_benchmarks\.py:\d+", network["at"])
    assert gpu.main([*words, "--anyway"]) == 1
    found = json.loads(out.read_text())["steps"]
    assert len(found) > 20 and sum(s["state"] == "failed" for s in found.values()) == 1


def test_all_golden_numbers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of all numbers is reported, also where several differ; nearly 0 counts by the absolute tolerance."""

    def numbers(case: object, device: object, close: Callable[..., None]) -> None:
        close(1.0 + 4e-7, 1.0, rtol=1e-6, atol=1e-12)
        close(torch.tensor([1e-13, 2.0]), torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-12)
        for off in differences:
            close(1.0 + off, 1.0, rtol=1e-6, atol=1e-12, msg=lambda m: f"this one: {m}")

    monkeypatch.setattr(gpu.test_training, "check_training", numbers)
    bench, found = gpu.Bench(gpu.chosen_device("cpu"), gpu.SMALL), {}
    differences: tuple[float, ...] = ()
    assert gpu.golden_training(bench, found).startswith("off by 4e-07")
    differences = (1e-3, 1e-2)
    with pytest.raises(AssertionError, match=r"2 numbers differ, the worst by 0\.01 of itself: this one"):
        gpu.golden_training(bench, found)
    assert found["differ"] == 2


def test_waits_are_found_by_their_line() -> None:
    """On a CPU: an item, an index by a mask, each once; nothing in what stays on the device."""
    x, device = torch.randn(8), gpu.chosen_device("cpu")
    assert gpu.waits(lambda: (x * 2).sum() + x[1:].mean(), device) == {}
    found = gpu.waits(lambda: x[x > 0].sum().item(), device)
    assert sum(found.values()) == 2 and all(k.startswith("tests/test_benchmarks.py:") for k in found)


def test_memory_that_does_not_suffice_halves_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode is tried again with parts of the batch, the plain loop with a smaller one; the file says so."""
    held = []

    def timed(b: gpu.Bench, found: gpu.Found, name: str, mode: gpu.Mode, make: Callable[[], object]) -> None:
        held.append(make())
        if len(held) % 3:
            raise torch.OutOfMemoryError("no memory")
        found.update({"images_per_s": 1.0, "of_goal": 0.1, "peak_mib": 1.0, "waits": {}})

    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(gpu, "Ours", lambda setting, **fields: (setting.batch, fields.get("batch_per_device")))
    monkeypatch.setattr(gpu, "Plain", lambda setting: setting.batch)
    bench = gpu.Bench(gpu.chosen_device("cpu"), gpu.Sizes())
    for name, expected in (("fast", [(256, None), (256, 128), (256, 64)]), ("plain", [256, 128, 64])):
        held.clear()
        found: gpu.Found = {}
        assert gpu.training(bench, found, name, gpu.MODES[name]).endswith("64 images at once")
        assert held == expected and found["images_at_once"] == 64 and found["out_of_memory_with"] == [256, 128]


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """A step has a limit, and one for which no time is left is skipped."""
    report = gpu.Report(gpu.Bench(gpu.chosen_device("cpu"), gpu.SMALL), tmp_path / "gpu.json", {}, limit=100)

    def endless(b: gpu.Bench, found: gpu.Found) -> str:
        found["begun"] = True
        while True:
            sum(range(1000))

    assert not report.step("slow", endless, most=0.1)
    report.limit = 0
    assert report.step("late", endless)
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert steps["slow"]["begun"] and steps["slow"]["error"].startswith("TimeoutError: took more than")
    assert steps["late"]["why"] == "no time left"
