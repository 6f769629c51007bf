"""The table of costs, from the study of that name."""

from __future__ import annotations

import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.reporting.tables import cost_table, styled


def study() -> pd.DataFrame:
    rows = [
        {"experiment": "gdd", "sec_per_kimg": 6.0, "peak_mem_mib": 1000.0, "trained": 1_000_000, "discriminator": 50},
        {"experiment": "gdd-i", "sec_per_kimg": 3.0, "peak_mem_mib": 900.0, "trained": 200_000, "discriminator": 50},
        {"experiment": "lpips", "state": "no weights of VGG16"},
    ]
    return pd.DataFrame([{"kimg": 12.0, "parameters": 1_000_000, "state": "done", **r} for r in rows])


def test_what_a_step_costs() -> None:
    table = cost_table(study())
    assert table.index.tolist() == ["gdd", "gdd-i", "lpips"]
    assert table["share trained"].tolist()[:2] == [1.0, 0.2]
    assert table["minutes"].tolist()[:2] == [1.2, 0.6]
    assert table.loc["lpips"].drop("state").isna().all()
    text = repr(styled(table, "Cost"))
    assert "20.0%" in text and "1,000,000" in text and "no weights of VGG16" in text


def test_another_table_is_refused() -> None:
    with pytest.raises(GddlabError, match="no column 'trained': give the study costs"):
        cost_table(study().drop(columns="trained"))
