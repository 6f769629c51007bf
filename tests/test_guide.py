"""The Python on the guide's pages runs, from top to bottom, and what they take from the code is up to date."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from gddlab.experiments import LISTS

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PAGES = sorted((NOTEBOOKS / "guide").glob("*.md"))


@pytest.fixture
def lists() -> Iterator[None]:
    """Lists of experiments that a page declares are forgotten afterwards."""
    kept = dict(LISTS)
    yield
    LISTS.clear()
    LISTS.update(kept)


@pytest.fixture(scope="module")
def from_code() -> Any:
    """The script that writes parts of pages."""
    path = NOTEBOOKS / "assets" / "from_code.py"
    spec = importlib.util.spec_from_file_location("from_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        code = compile(block, f"{page.name}: {block[:40]!r}", "exec", dont_inherit=True)  # as in a notebook
        exec(code, names)


def test_parts_of_pages_are_as_the_code_is(from_code: Any) -> None:
    for path, text in from_code.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: run python notebooks/assets/from_code.py"


class Round(BaseModel):
    """Has no corners."""

    kind: Literal["round"] = "round"
    radius: float = Field(default=1.5, gt=0)
    """From the centre
    to the border."""


class Square(BaseModel):
    """Has four corners."""

    side: tuple[int, ...] = ()
    """Each of them."""


class Sheet(BaseModel):
    """A sheet of paper.

    With more to say.
    """

    name: str
    """What it is called."""
    shape: Round | Square | None = Field(default=Round())
    """What is cut out."""
    paper: Literal["thin", "thick"] = "thin"
    """How it feels."""


def test_options_are_listed_with_bounds_defaults_and_parts(from_code: Any) -> None:
    assert from_code.options(Sheet).split("\n\n") == [
        "### Sheet",
        "A sheet of paper.",
        "- `name`: text; required. What it is called.\n"
        "- `shape`: [Round](#round) or [Square](#square) or `None`; default `Round()`. What is cut out.\n"
        '- `paper`: `"thin"` or `"thick"`; default `"thin"`. How it feels.',
        "### Round",
        'Has no corners. In a dict its kind is `"round"`.',
        "- `radius`: number, above 0; default `1.5`. From the centre to the border.",
        "### Square",
        "Has four corners.",
        "- `side`: list of integer; default `()`. Each of them.",
    ]
