"""Versions as findings: what is installed, against what gddlab asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

from gddlab.diagnosis.findings import Finding
from gddlab.provenance import commit, versions

__all__ = ["package_findings", "requirements", "torch_pair"]

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

    from gddlab import __version__

    python, wanted = requirements()
    required = {r.name: r.specifier for r in map(Requirement, wanted)}
    there = versions()
    for name in {*required, *SHOWN}:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there[name] = "not installed"
    own = commit()
    about = {"version": __version__, "commit": own}
    text = f"{there['python']}, {platform.python_implementation()} on {platform.system()} {platform.machine()}"
    out = [
        Finding("versions", "python", True, text, details={"version": there["python"]}),
        Finding("versions", "gddlab", True, f"{__version__}, commit {own[:12]}" if own else __version__, details=about),
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
