"""Importing gddlab is cheap and touches nothing heavy; every public name resolves."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gddlab
from gddlab import reporting


def test_public_names_resolve() -> None:
    for name in gddlab.__all__:
        assert getattr(gddlab, name) is not None
    assert {"probe", "train", "evaluate", "nets"} <= set(gddlab.__all__) <= set(dir(gddlab))
    for name in reporting.__all__:
        assert getattr(reporting, name) is not None
    with pytest.raises(AttributeError, match="module 'gddlab' has no attribute 'prob'"):
        _ = gddlab.prob


def test_import_is_lazy() -> None:
    code = (
        "import sys, gddlab, gddlab.reporting; "
        "heavy = {'torch', 'pandas', 'matplotlib', 'seaborn', 'timm', 'torch_fidelity', 'sklearn', 'scipy'}; "
        "heavy |= {'tyro', 'pydantic'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_runs_are_listed_and_agents_start_without_torch() -> None:
    """The agent of several ranks imports torch's launcher when it starts them; a list of runs needs none."""
    code = (
        "import sys, gddlab.launch.agent; from gddlab.runs import listing; print(len(listing('data/runs')) > 100); "
        "print(sorted({'torch', 'pydantic', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["True", "[]"]


@pytest.mark.parametrize(
    ("what", "without"),
    [
        (
            "from gddlab.teachers import load_teacher; load_teacher('digits')",
            {"pandas", "matplotlib", "timm", "torch_fidelity", "sklearn", "captum"},
        ),
        (
            "import gddlab; [getattr(gddlab, n) for n in ('wrap', 'probe', 'sample', 'load_teacher', 'Conditioning')]",
            {"diffusers", "transformers", "accelerate"},
        ),
        # nor the parts of torch that take seconds
        ("import gddlab.diagnosis", {"pandas", "timm", "sympy", "torch.distributed.fsdp"}),
    ],
    ids=["a teacher", "what wraps networks", "the doctor"],
)
def test_what_needs_torch_comes_without_the_rest(what: str, without: set[str]) -> None:
    code = f"import sys; {what}; print(sorted({without} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["gddlab", "gddlab.reporting"])
def test_no_module_stands_in_the_place_of_a_function(package: str) -> None:
    """A submodule that is imported becomes an attribute of its package: no lazy name may be called as it is."""
    stub = ast.parse(Path(importlib.import_module(package).__file__ or "").with_suffix(".pyi").read_text())
    homes = {n.name: str(i.module) for i in stub.body if isinstance(i, ast.ImportFrom) for n in i.names}
    submodules = {m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    clash = {name for name in submodules & homes.keys() if homes[name] != package}
    assert not clash
