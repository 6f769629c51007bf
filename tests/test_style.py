"""Lint, format, types and the order of the packages, as part of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"], ["-c", IMPORTS]],
    ids=["lint", "format", "types", "imports"],
)
def test_style(command: list[str]) -> None:
    out = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
