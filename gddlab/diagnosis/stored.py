"""Weights, data and folders as findings: where they lie, or where to put them. Nothing is loaded or downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from gddlab.datasets.readers import find_cifar10
from gddlab.diagnosis.devices import GIB, gib
from gddlab.diagnosis.findings import Finding
from gddlab.distill.presets import PRESETS
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import EXTRACTORS
from gddlab.files import cache_dir, data_dir
from gddlab.pretrained.files import SUFFIXES, find_weights
from gddlab.pretrained.lite import LITE_WHEELS, lite_weights
from gddlab.teachers import PUBLISHED, bundled_teachers
from gddlab.teachers.catalog import locate

__all__ = ["data_findings", "folder_findings", "storage_problems", "weight_findings"]

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
