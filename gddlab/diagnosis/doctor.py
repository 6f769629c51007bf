"""`gddlab.doctor()`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from gddlab.datasets.readers import find_cifar10
from gddlab.diagnosis import findings as machine
from gddlab.diagnosis.findings import CPU, GIB, GPU, Doctor, Finding, device_findings, device_problems, gib
from gddlab.distill.presets import PRESETS
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import EXTRACTORS
from gddlab.files import cache_dir, data_dir
from gddlab.pretrained.files import SUFFIXES, find_weights
from gddlab.pretrained.lite import LITE_WHEELS, lite_weights
from gddlab.provenance import commit, versions
from gddlab.teachers import PUBLISHED, bundled_teachers
from gddlab.teachers.catalog import locate

__all__ = [
    "abilities",
    "data_findings",
    "doctor",
    "folder_findings",
    "needs",
    "package_findings",
    "requirements",
    "storage_problems",
    "torch_pair",
    "weight_findings",
]

SHOWN = ("torch", "torchvision", "timm", "torch-fidelity", "captum", "lpips", "kornia", "numpy", "pandas")
"""Others are listed where they are missing."""


def requirements() -> tuple[str, list[str]]:
    """Versions of Python and packages that gddlab asks for, as in pyproject.toml: from the clone, or from the installed wheel."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text()).get("project", {})
        if about.get("name") == "gddlab":  # an installed wheel may lie beside another project's
            return about["requires-python"], about["dependencies"]
    found = importlib.metadata.metadata("gddlab")
    wanted = importlib.metadata.requires("gddlab") or []
    return found["Requires-Python"] or "", [r for r in wanted if "extra ==" not in r]


def package_findings() -> tuple[list[Finding], list[str], list[str]]:
    """Versions, from the packages' metadata: nothing is imported.

    Returns:
        Findings; problems that stop gddlab (a package that it needs is missing); other problems.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    own_version = versions()["gddlab"]

    python, wanted = requirements()
    required = {r.name: r.specifier for r in map(Requirement, wanted)}
    there = versions()
    for name in {*required, *SHOWN}:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there[name] = "not installed"
    own = commit()
    about = {"version": own_version, "commit": own}
    text = f"{there['python']}, {platform.python_implementation()} on {platform.system()} {platform.machine()}"
    out = [
        Finding("versions", "python", True, text, details={"version": there["python"]}),
        Finding("versions", "gddlab", True, f"{own_version}, commit {own[:12]}" if own else own_version, details=about),
    ]
    missing, unfit = [], []
    if not SpecifierSet(python).contains(there["python"], prereleases=True):
        unfit.append(f"this is Python {there['python']}, gddlab wants {python}: make an environment with one of those")
    for name in (*SHOWN, *(r for r in required if r not in SHOWN and there[r] == "not installed")):
        version, need = there[name], f"{name}{required.get(name, '')}"
        found = version != "not installed"
        remedy = "" if found else f"pip install {name}" + ("" if name in required else ", if wanted")
        out.append(Finding("versions", name, found, version, remedy, {"required": name in required}))
    for name, specifier in required.items():
        version, need = there[name], f"pip install '{name}{specifier}'"
        if version == "not installed":
            missing.append(f"{name} is not installed: {need}")
        elif not specifier.contains(version, prereleases=True):
            unfit.append(f"{name} {version} is installed, gddlab wants {specifier}: {need}")
    return out, missing, [*unfit, *torch_pair(there["torch"], there["torchvision"])]


def torch_pair(torch: str, torchvision: str) -> list[str]:
    """The problem of two versions that do not fit each other: torchvision 0.(n + 15) is built against torch 2.n, for one kind of device."""
    a = re.match(r"2\.(\d+)[^+]*(?:\+(.*))?$", torch)
    b = re.match(r"0\.(\d+)[^+]*(?:\+(.*))?$", torchvision)
    if a is None or b is None:
        return []
    if int(b[1]) != int(a[1]) + 15:
        return [
            f"torchvision {torchvision} is not built for torch {torch}: pip install 'torchvision==0.{int(a[1]) + 15}.*'"
        ]
    if a[2] and b[2] and a[2] != b[2]:
        return [
            f"torch {torch} and torchvision {torchvision} are builds for different devices: install both from one index"
        ]
    return []


SMALLEST = 1 << 20
"""Bytes; a file of weights below is a Git LFS pointer, a web page, or was cut off."""
MIN_DISK = GIB

# Name, patterns of the copies that torch.hub and Hugging Face keep, address.
DOWNLOADS = {
    "vgg16_bn": (
        ("hub/vgg16_bn-*.pth", "hf/models--timm--vgg16_bn.*/snapshots/*/model.safetensors"),
        "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth",
    ),
    "deit_base_distilled_patch16_224": (
        (
            "hub/deit_base_distilled_patch16_224-*.pth",
            "hf/models--timm--deit_base_distilled_patch16_224.*/snapshots/*/model.safetensors",
        ),
        "https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth",
    ),
    "vgg16": (("hub/vgg16-*.pth",), "https://download.pytorch.org/models/vgg16-397923af.pth"),
}


def weight_findings() -> list[Finding]:
    """Teachers, backbones, LPIPS, feature extractors."""
    out = [
        _file("weights", f"teacher {name}", data_dir() / "teachers" / name / "teacher.safetensors", "")
        for name in bundled_teachers()
    ]
    places = " or ".join(str(p) for p in _folders("teachers"))
    for entry in PUBLISHED.values():
        finding = _file("weights", f"teacher {entry.name}", locate(entry.name), f"put {entry.url} into {places}")
        finding.details.update(published=True, places=places, offline=_offline())
        out.append(finding)
    out += [_asked("weights", f"backbone {name}", partial(lite_weights, name)) for name in LITE_WHEELS]
    out += [_backbone(name, f"backbone {name}") for name in ("vgg16_bn", "deit_base_distilled_patch16_224")]
    out.append(_backbone("vgg16", "LPIPS network vgg16"))
    spec = importlib.util.find_spec("lpips")
    folder = next(iter(spec.submodule_search_locations or ()), "") if spec else ""
    linear = Path(folder) / "weights" / "v0.1" / "vgg.pth"
    finding = _file(
        "weights", "LPIPS linear layers", linear if folder and linear.is_file() else None, "pip install lpips"
    )
    out.append(finding)
    return out + [
        _asked("weights", f"extractor {name}", partial(getattr, e, "weights")) for name, e in EXTRACTORS.items()
    ]


def data_findings() -> list[Finding]:
    """Datasets that are known by name, and the files that presets name."""
    try:
        text = f"with scikit-learn {importlib.metadata.version('scikit-learn')}"
        digits = Finding("data", "digits", True, text)
    except importlib.metadata.PackageNotFoundError:
        digits = Finding("data", "digits", False, "missing", "pip install scikit-learn")
    out = [digits, _asked("data", "cifar10", find_cifar10)]
    for name in dict.fromkeys(str(make(run_dir="runs").data) for make in PRESETS.values()):
        if name not in ("digits", "cifar10"):
            path = Path(name).expanduser()
            remedy = f"gddlab prepare FOLDER {name} --resolution 64, or give another file as --data"
            out.append(_file("data", name, path.absolute() if path.exists() else None, remedy))
    return out


def folder_findings() -> list[Finding]:
    """The cache, and what the environment says."""
    cache = cache_dir()
    writable, free = _writable(cache), _free(cache)
    text = f"{cache}, {'writable' if writable else 'not writable'}, {gib(free)} free on its disk"
    about = {"path": str(cache), "exists": cache.is_dir(), "writable": writable, "free": free}
    out = [Finding("folders", "cache", writable, text, "" if writable else "set GDDLAB_CACHE", about)]
    for name, meaning in (
        ("GDDLAB_HOME", "a folder of your own for teachers, backbones and data"),
        ("GDDLAB_OFFLINE", "1 forbids downloads"),
    ):
        value = os.environ.get(name, "")
        out.append(
            Finding("folders", name, bool(value), value or f"not set ({meaning})", details={"value": value or None})
        )
    return out


def storage_problems(weights: Iterable[Finding]) -> list[str]:
    """Folders that cannot be written, full disks, files that hold no weights."""
    out, cache, home = [], cache_dir(), os.environ.get("GDDLAB_HOME")
    if not _writable(cache):
        out.append(f"the cache {cache} is not writable: set GDDLAB_CACHE to a folder that is")
    elif (free := _free(cache)) < MIN_DISK:
        out.append(f"{gib(free)} are free on the disk of {cache}: make room, or set GDDLAB_CACHE to another folder")
    if home and not Path(home).expanduser().is_dir():
        out.append(f"GDDLAB_HOME={home} is no folder: make it, or unset GDDLAB_HOME")
    for f in weights:
        # The bundled teachers are small; what is downloaded is not, except LPIPS's linear layers.
        size = f.details.get("bytes", SMALLEST)
        if size < SMALLEST and f.name != "LPIPS linear layers" and data_dir() not in Path(f.value).parents:
            out.append(f"{f.value} has {size:,} bytes and so holds no weights: fetch it again")
    return out


def _offline() -> bool:
    return os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0")


def _folders(kind: str) -> list[Path]:
    """Where files may be put so that they are found from everywhere."""
    home = os.environ.get("GDDLAB_HOME")
    return [*([Path(home).expanduser() / kind] if home else []), cache_dir() / kind]


def _file(section: str, name: str, path: Path | None, remedy: str) -> Finding:
    if path is None:
        return Finding(section, name, False, "missing", remedy)
    about = {"path": str(path)} | ({"bytes": path.stat().st_size} if path.is_file() else {})
    return Finding(section, name, True, str(path), details=about)


def _asked(section: str, name: str, find: Callable[[], Path]) -> Finding:
    """What `find` finds; its refusal says what to do."""
    try:
        return _file(section, name, find(), "")
    except GddlabError as e:
        return Finding(section, name, False, "missing", str(e))


def _backbone(name: str, title: str) -> Finding:
    patterns, url = DOWNLOADS[name]
    places = " or ".join(str(p / f"{name}{SUFFIXES[1]}") for p in _folders("backbones"))
    path = find_weights(name, url.rpartition("/")[2].removesuffix(".pth")) or _kept(patterns)
    return _file("weights", title, path, f"put {url} at {places}")


def _kept(patterns: Sequence[str]) -> Path | None:
    """A copy that torch.hub or Hugging Face keeps."""
    hf = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    roots = {"hub": Path(torch.hub.get_dir()) / "checkpoints", "hf": Path(hf).expanduser()}
    for pattern in patterns:
        kind, _, rest = pattern.partition("/")
        if found := sorted(roots[kind].glob(rest)):
            return found[0]
    return None


def _standing(folder: Path) -> Path:
    """The folder, or what exists of the way to it."""
    return next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))


def _writable(folder: Path) -> bool:
    """Whether files can be put there; nothing is made to find out."""
    place = _standing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _free(folder: Path) -> int:
    return shutil.disk_usage(_standing(folder)).free


def needs() -> dict[str, list[str]]:
    """What each ability needs, by the names of findings: the presets as they are, and what they do not use."""
    out = {}
    for name, make in PRESETS.items():
        config = make(run_dir="runs")
        backbones = [f"backbone {b}" for b in config.discriminator.networks()] if config.discriminator else []
        out[f"preset {name}"] = [f"teacher {config.teacher}", str(config.data), *backbones]
    return out | {
        "LPIPS": ["LPIPS network vgg16", "LPIPS linear layers"],
        "fd and kd on lite2": ["extractor lite2"],
        "FID and KID": ["extractor inception"],
    }


def doctor() -> Doctor:
    """Looks at this machine: devices, versions, weights, data, folders, and what gddlab can therefore do.

    Downloads nothing, loads no weights, makes no folder.

    Returns:
        Findings and problems; `print` it, or see `to_frame` and `to_dict`.
    """
    cpu, gpus = machine.cpu(), machine.cuda_devices()
    packages, missing, unfit = package_findings()
    weights, data = weight_findings(), data_findings()
    findings = (
        *device_findings(cpu, gpus),
        *packages,
        *weights,
        *data,
        *folder_findings(),
        *abilities([*weights, *data], cpu, gpus),
    )
    problems = (
        *missing,
        *unfit,
        *device_problems(cpu, gpus, driver_unused=machine.driver_without_cuda()),
        *storage_problems(weights),
    )
    return Doctor(findings, problems, broken=bool(missing))


def abilities(there: Iterable[Finding], cpu: CPU, gpus: Sequence[GPU]) -> list[Finding]:
    """What can be done with what is there, and on which device."""
    found = {f.name for f in there if f.found}
    out = []
    for name, wanted in needs().items():
        lacks = [w for w in wanted if w not in found]
        value = "lacks " + ", ".join(lacks) if lacks else "yes"
        out.append(Finding("able", name, not lacks, value, details={"lacks": lacks}))
    bf16 = all(g.bf16 for g in gpus) if gpus else bool(cpu.bf16)
    value = "yes" if bf16 else "no: float32 is faster"
    out.append(Finding("able", "bfloat16 training", bf16, value))
    n = len(gpus) if gpus else max(1, int(cpu.usable_cores))
    value = f"on {n} {'CUDA device' if gpus else 'core'}{'s' if n > 1 else ''}, nproc up to {n}"
    out.append(Finding("able", "training", True, value, details={"device": "cuda" if gpus else "cpu", "nproc": n}))
    return out
