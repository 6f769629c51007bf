"""The shapes in the signatures of public tensor functions, checked while tests of their numbers run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The hook comes before the first import of gddlab, hence a process of its own.
SCRIPT = """
import sys
import jaxtyping, pytest
import tests.shapes
packages = ["gddlab.nets", "gddlab.sampling", "gddlab.probing", "gddlab.evaluation"]
jaxtyping.install_import_hook(packages, "tests.shapes.check")
sys.exit(pytest.main(["-q", "-x", "-n0", "-p", "no:cacheprovider", "-k", "not refusals", *sys.argv[1:]]))
"""
FILES = (
    "tests/golden/test_models.py",
    "tests/golden/test_samplers.py",
    "tests/sampling/test_solvers.py",
    "tests/probing/test_effects.py",
    "tests/evaluation/test_metrics.py",
)


def test_shapes_are_those_of_the_signatures() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT, *FILES], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout
