"""The Python on the guide's pages runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[1] / "notebooks" / "guide").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, f"{page.name}: {block[:40]!r}", "exec"), names)


def test_a_statistic_of_ones_own_is_about_twenty_lines() -> None:
    page = next(p for p in PAGES if p.stem == "probing").read_text()
    block = re.search(r"^class Kurtosis.*?(?=\n\n\n)", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert len(block[0].splitlines()) <= 20
