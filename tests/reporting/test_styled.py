"""Tables for people: rounded, escaped, the same each time."""

from __future__ import annotations

import re

import pandas as pd

from gddlab.reporting.tables import styled


def table(state: str = "not run") -> pd.DataFrame:
    columns = {
        "frozen": [0.79965, None],
        "trained": pd.array([207713, None], dtype="Int64"),
        "mean": [59.2677, None],
        "sd": [None, None],
        "kd-lite2@64": [0.01234567, None],
        "state": ["done", state],
    }
    return pd.DataFrame(columns, index=pd.Index(["gdd-i", "a<b"], name="experiment")).astype({"sd": "float64"})


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html.split("<tbody>")[1], re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_numbers_are_rounded_and_empty_cells_say_why() -> None:
    html = styled(table(), "n = 64 & <b>").to_html()
    assert cells(html) == [
        ["gdd-i", "80.0%", "207,713", "59.3", "–", "0.012"],
        ["a&lt;b", "not run", "not run", "not run", "not run", "not run"],
    ]
    assert "n = 64 &amp; &lt;b&gt;" in html and "parameters trained" in html and "state" not in html
    stopped = cells(styled(table("stopped at 3 of 12 kimg")).to_html())
    assert stopped[1] == ["a&lt;b", "–", "–", "–", "–", "–", "stopped at 3 of 12 kimg"]
    assert stopped[0][-1] == "done"
    own = styled(table(), heads={"mean": "FID"}, formats={"mean": "{:.3f}"}).to_html()
    assert "59.268" in own and "FID" in own


def test_numbers_stand_right_and_text_left() -> None:
    html = styled(table("failed")).to_html()
    assert re.search(r"td \{[^}]*text-align: right", html)
    left = re.findall(r"(\S+) \{\s*text-align: left;\s*\}", html)
    assert any("col5" in selector for selector in left) and not any("col2" in selector for selector in left)


def test_output_does_not_change_between_runs() -> None:
    first, second = styled(table(), "a caption"), styled(table(), "a caption")
    assert first.to_html() == second.to_html()
    assert repr(first) == repr(second) and "59.3" in repr(first) and "0x" not in repr(first)


def test_a_table_without_names_shows_no_index() -> None:
    assert cells(styled(table().reset_index(drop=True)).to_html())[0][0] == "80.0%"
