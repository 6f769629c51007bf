"""`gddlab doctor`: what it finds, what it says is wrong, and that it touches nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gddlab
from gddlab.cli import main
from gddlab.diagnosis import SECTIONS, machine
from gddlab.diagnosis.doctor import NETWORKS, device_findings, package_findings, requirements, torch_pair
from gddlab.diagnosis.machine import CPU, GPU, device_problems
from gddlab.limits import Limits
from gddlab.pretrained.backbones import DEIT, VGG, backbone_file
from gddlab.pretrained.trunks import TRUNKS

packages = examine = sys.modules["gddlab.diagnosis.doctor"]  # the package has a function of that name
GIB = 1 << 30
PROCESSOR = CPU("Epyc", 8, 4.0, 4, 16 * GIB, 12 * GIB, ("avx512_bf16",))
CARD = GPU("H100", 80 * GIB, 78 * GIB, (9, 0), bf16=True, built_for=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no cache, no GDDLAB_HOME, nothing in the working folder or in other caches."""
    monkeypatch.chdir(tmp_path)
    for name in ("GDDLAB_HOME", "GDDLAB_OFFLINE", "GDDLAB_INCEPTION", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(machine, "cpu", lambda: PROCESSOR)
    monkeypatch.setattr(machine, "cuda_devices", list)
    monkeypatch.setattr(machine, "driver_without_cuda", lambda: False)
    return tmp_path


def put(path: Path, size: int = 1 << 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


# The machine.


def test_cpu_is_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: ram)
    monkeypatch.setattr("gddlab.limits.container_limits", lambda: Limits(0.5, 2 * GIB, GIB))
    monkeypatch.setattr(machine, "cpuinfo", lambda: {"model name": "Epyc", "flags": "sse avx512_bf16 amx_bf16"})
    found = machine.cpu()
    assert (found.model, found.usable_cores, found.memory, found.available) == ("Epyc", 0.5, 2 * GIB, GIB)
    assert found.bf16 == ("amx_bf16", "avx512_bf16")
    monkeypatch.setattr(machine, "cpuinfo", lambda: {"Features": "fp asimd bf16"})  # ARM says it in another way
    assert machine.cpu().bf16 == ("bf16",)


def test_cpu_of_this_machine() -> None:
    found = machine.cpu()
    assert found.logical_cores == os.cpu_count()
    assert 0 < found.usable_cores <= found.logical_cores
    assert found.threads == torch.get_num_threads()
    assert found.memory > GIB // 4
    assert 0 <= found.available <= found.memory


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a", "sm_100"], False),
    ],
)
def test_cuda_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: list[str], fits: bool
) -> None:
    class Properties:
        name = "card"
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    (gpu,) = machine.cuda_devices()
    assert gpu == GPU("card", 8 * GIB, 3 * GIB, capability, bf16=capability[0] >= 8, built_for=fits)


def test_devices_and_what_is_wrong_with_them() -> None:
    assert device_problems(PROCESSOR, []) == []
    assert device_problems(PROCESSOR, [CARD]) == []
    for cpu, gpus, words in (
        (replace(PROCESSOR, bf16=()), [], "no bfloat16 instructions"),
        (replace(PROCESSOR, available=GIB), [], "1.0 GiB of memory are free, training wants 4.0 GiB"),
        (replace(PROCESSOR, threads=8), [], "8 threads on 4 usable cores: set OMP_NUM_THREADS=4"),
        (replace(PROCESSOR, threads=2, usable_cores=0.5), [], "on 0.5 usable cores: set OMP_NUM_THREADS=1"),
        (PROCESSOR, [CARD, replace(CARD, bf16=False)], "cuda:1 has no bfloat16"),
        (PROCESSOR, [replace(CARD, free=GIB)], "cuda:0 has 1.0 GiB free"),
        (PROCESSOR, [replace(CARD, built_for=False)], "no code for cuda:0, capability 9.0"),
    ):
        (problem,) = device_problems(cpu, gpus)
        assert words in problem and "\n" not in problem
    assert device_problems(replace(PROCESSOR, bf16=()), [CARD]) == []  # training takes the card
    assert "sees no device" in device_problems(PROCESSOR, [], driver_unused=True)[0]
    names = [(f.name, f.found) for f in device_findings(PROCESSOR, [CARD, CARD])]
    assert names[:3] == [("cpu", True), ("cuda:0", True), ("cuda:1", True)]
    assert (
        "Epyc, 4 of 8 cores usable, 4 threads in torch, 12.0 GiB of 16.0 GiB free"
        in device_findings(PROCESSOR, [])[0].value
    )


# Packages.


@pytest.mark.parametrize(
    ("torch_version", "vision", "words"),
    [
        ("2.14.1", "0.29.1", None),
        ("2.9.0+cu130", "0.24.0+cu130", None),
        ("2.9.0", "0.24.0+cpu", None),
        ("2.14.0a0+git12", "0.29.0a0+git12", None),
        ("2.14.1", "0.24.0", "torchvision==0.29.*"),
        ("2.9.0+cu130", "0.24.0+cpu", "from one index"),
        ("2.9.0", "not installed", None),
    ],
)
def test_torch_and_torchvision(torch_version: str, vision: str, words: str | None) -> None:
    found = torch_pair(torch_version, vision)
    assert found == [] if words is None else words in found[0]


def test_packages_that_are_missing_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("timm", "lpips"):
            raise importlib.metadata.PackageNotFoundError(name)
        return {"numpy": "3.0.1"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(packages, "requirements", lambda: (">=4", ["timm>=1.0.12,<1.1", "numpy<3", "torch"]))
    findings, missing, unfit = package_findings()
    assert missing == ["timm is not installed: pip install 'timm<1.1,>=1.0.12'"]
    assert [u.split(",")[0] for u in unfit] == [f"this is Python {sys.version.split()[0]}", "numpy 3.0.1 is installed"]
    by_name = {f.name: f for f in findings}
    assert not by_name["timm"].found and by_name["timm"].remedy == "pip install timm"
    assert not by_name["lpips"].found and by_name["lpips"].remedy == "pip install lpips, if wanted"
    assert by_name["torch"].value == real("torch")
    assert by_name["gddlab"].value.startswith(gddlab.__version__)


def test_requirements_are_the_projects() -> None:
    python, wanted = requirements()
    assert python.startswith(">=3.11")
    assert any(w.startswith("torch>=") for w in wanted) and not any("nbval" in w for w in wanted)


# Weights, data, folders.


def test_an_empty_machine(home: Path) -> None:
    found = gddlab.doctor()
    assert found["teacher digits"].found and Path(found["teacher digits"].value).is_file()
    assert found["backbone tf_efficientnet_lite0"].found and found["extractor lite2"].found and found["digits"].found
    for name in ("backbone vgg16_bn", "backbone deit_base_distilled_patch16_224", "LPIPS network vgg16"):
        assert not found[name].found
        assert f"{home / 'cache' / 'backbones'}/" in found[name].remedy and "https://" in found[name].remedy
    assert "GDDLAB_INCEPTION" in found["extractor inception"].remedy
    assert "170 MB" in found["cifar10"].remedy
    assert found["preset digits"].found and found["preset digits"].value == "yes"
    assert found["preset cifar10"].value == "lacks teacher edm-cifar10-32x32-uncond-ve, cifar10, backbone vgg16_bn"
    assert found["bfloat16 training"].found
    assert found["training"].value == "on 4 cores, nproc up to 4"
    assert list(home.iterdir()) == []  # it made nothing


def test_networks_are_looked_for_where_they_are_loaded_from() -> None:
    loaded = {f"backbone {name}": backbone_file(name) for name in (VGG, DEIT)}
    assert loaded | {"LPIPS network vgg16": TRUNKS["vgg"].file} == NETWORKS


def test_what_is_put_where_it_says_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, hub = home / "own", home / "cache/backbones/models--timm--deit_base_distilled_patch16_224.fb_in1k"
    put(hub / "refs" / "main").write_text("0")
    monkeypatch.setenv("GDDLAB_HOME", str(own))
    placed = {
        "teacher edm-cifar10-32x32-uncond-ve": put(own / "teachers" / "edm-cifar10-32x32-uncond-ve.pkl"),
        "backbone vgg16_bn": put(home / "hub" / "checkpoints" / "vgg16_bn-6c64b313.pth"),
        "backbone deit_base_distilled_patch16_224": put(hub / "snapshots" / "0" / "model.safetensors"),
        "LPIPS network vgg16": put(home / "cache" / "backbones" / "vgg16.pth"),
        "cifar10": put(own / "cifar-10-python.tar.gz"),
        "extractor inception": put(home / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"),
        "ffhq-64x64.zip": put(home / "ffhq-64x64.zip"),
    }
    found = gddlab.doctor()
    for name, path in placed.items():
        assert found[name].found and Path(found[name].value) == path, name
        assert found[name].details["bytes"] == 1 << 20
    assert found["preset cifar10"].found and found["FID and KID"].found
    assert found["preset ffhq"].value == "lacks teacher edm-ffhq-64x64-uncond-ve"
    assert "68 published teachers" in str(found)
    assert found.problems == ()


def test_problems_of_storage(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = put(home / "vgg16_bn.pth", 133)
    put(home / "cache")  # a file where the folder belongs
    monkeypatch.setenv("GDDLAB_HOME", str(home / "nowhere"))
    found = gddlab.doctor()
    assert not found["cache"].found
    assert [p.partition(":")[0] for p in found.problems] == [
        f"the cache {home / 'cache'} is not writable",
        f"GDDLAB_HOME={home / 'nowhere'} is no folder",
        f"{pointer} has 133 bytes and so holds no weights",
    ]


def test_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("usage", (), {"free": GIB // 2}))
    assert "0.5 GiB are free on the disk of" in gddlab.doctor().problems[0]


# What comes out.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_forms(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda_devices", lambda: [CARD])
    found = gddlab.doctor()
    d = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(d) == [*SECTIONS, "problems", "broken"]
    assert d["devices"]["cuda:0"]["details"]["memory"] == 80 * GIB
    assert d["able"]["training"]["details"] == {"device": "cuda", "nproc": 1}
    frame = found.to_frame()
    assert list(frame.columns) == ["section", "name", "found", "value", "remedy"]
    assert len(frame) == len(found.findings) == sum(len(d[s]) for s in SECTIONS)  # no name twice in a section
    assert (frame["section"].drop_duplicates() == list(SECTIONS)).all()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as terminal:
        main(["doctor"])
    for text in (str(found), terminal.getvalue()):
        for word in (*SECTIONS, "H100, capability 9.0", "69 published teachers", "downloaded when asked for", "none"):
            assert word in text
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    assert "downloaded when asked for" not in str(gddlab.doctor())
    with pytest.raises(KeyError, match="vgg19"):
        found["vgg19"]


def test_command(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["doctor"])
    assert "  + teacher digits " in capsys.readouterr().out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["broken"] is False
    problem = "timm is not installed: pip install timm"
    monkeypatch.setattr(examine, "package_findings", lambda: ([], [problem], []))
    with pytest.raises(SystemExit) as e:
        main(["doctor"])
    assert e.value.code == 2
    assert f"  ! {problem}" in capsys.readouterr().out


def test_imports_nothing_heavy() -> None:
    """Nor is the function hidden by a module of its name."""
    code = (
        "import sys, gddlab.cli, gddlab; found = gddlab.doctor(); assert len(found.findings) > 40; "
        "heavy = {'timm', 'torchvision', 'lpips', 'kornia', 'pandas', 'scipy', 'sklearn', 'captum', 'torch_fidelity'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
