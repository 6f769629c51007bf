"""Tables to look at, in notebooks and as text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from gddlab.reporting.run_summary import NOT_RUN

HEADS = {
    "frozen": "frozen parameters",
    "kimg": "thousand images seen",
    "value": "distance",
    "sd": "sd over seeds",
    "nfe": "network calls per image",
    "images": "distinct images",
    "trained": "parameters trained",
    "discriminator": "discriminator's, trained",
    "sec_per_kimg": "seconds per thousand images",
    "minutes": "training, minutes",
    "peak_mem_mib": "peak memory, MiB",
    "clip-fid": "CLIP-FID",
    "fid": "FID",
}
"""Column -> head with its unit; a column that is not here is its own head."""
FORMATS = (
    dict.fromkeys(("mean", "sd", "min", "max", "value", "sec_per_kimg", "minutes", "fd-"), "{:.1f}")
    | dict.fromkeys(("frozen", "share trained"), "{:.1%}")
    | dict.fromkeys(("kd-", "precision", "recall", "confidence", "class-chi2", "copying"), "{:.3f}")
    | {"fd-digits": "{:.2f}"}
    | dict.fromkeys(("fid", "clip-fid"), "{:.2f}")
    | {"kid": "{:.4f}", "kimg": "{:g}", "peak_mem_mib": "{:,.0f}"}
)
"""Column, or how its name begins -> format of its numbers; otherwise commas or three digits."""
STYLES: Any = [
    {"selector": "", "props": "border-collapse:collapse;font-size:.85rem"},
    {"selector": "caption", "props": "caption-side:top;text-align:left;max-width:46rem;padding:0 0 .5rem"},
    {"selector": "th, td", "props": "padding:.15rem .4rem;vertical-align:top"},
    {"selector": "th.col_heading", "props": "text-align:right;max-width:5.5rem;border-bottom:1px solid #888"},
    {"selector": "th.row_heading", "props": "text-align:left;font-weight:normal;white-space:nowrap"},
    {"selector": "th.index_name", "props": "text-align:left;border-bottom:1px solid #888"},
    {"selector": "td", "props": "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"},
]
WRAPPED = ";white-space:normal;max-width:16rem"


def styled(
    table: pd.DataFrame,
    caption: str = "",
    *,
    heads: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
) -> Styler:
    """A table to look at; its HTML and its text are the same each time, so that a notebook's output can be compared.

    Args:
        table: Numbers and text. Where it has a column `state`, empty cells of a row that was not run say so; the column
            itself is shown where it says more than that.
        caption: What is seen: n, extractor, seeds, unit.
        heads: Column -> head, beside `HEADS`.
        formats: Column, or how its name begins -> format, beside `FORMATS`.
    """
    state = table.get("state")
    told = state is None or not state.isin(["done", NOT_RUN]).all()
    shown = table if told else table.drop(columns="state")
    states = [NOT_RUN] * len(table) if state is None else list(state)
    heads, formats = HEADS | dict(heads or {}), FORMATS | dict(formats or {})
    columns: dict[str, list[str]] = {}
    text: dict[str, Any] = {}
    for name in shown.columns:
        head = heads.get(name, str(name))
        form = format_of(str(name), formats)
        columns[head] = [_written(v, form, s) for v, s in zip(shown[name], states, strict=True)]
        if not pd.api.types.is_numeric_dtype(shown[name].dtype):
            long = max(map(len, columns[head]), default=0) > 24
            text[head] = [{"selector": "th, td", "props": "text-align:left" + (WRAPPED if long else "")}]
    frame = pd.DataFrame(columns, index=shown.index)

    class Table(Styler):
        def __repr__(self) -> str:  # a Styler shows its address in memory
            return str(frame.to_string())

    out = Table(frame, uuid=hashlib.sha256(caption.encode()).hexdigest()[:8], cell_ids=False)
    out.format(escape="html").format_index(escape="html", axis=1).format_index(escape="html", axis=0)
    if caption:
        out.set_caption(escape(caption))
    out.set_table_styles(STYLES)
    out.set_table_styles(text, axis=0, overwrite=False)
    if isinstance(shown.index, pd.RangeIndex):
        out.hide(axis="index")
    return out


def format_of(name: str, formats: Mapping[str, str] = FORMATS) -> str:
    """The format of a column's numbers, or of a score's."""
    start = next((start for start in formats if name.startswith(start)), "")
    return formats.get(name) or formats.get(start, "{:.3g}")


def _written(value: Any, form: str, state: str) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOT_RUN if state == NOT_RUN else "–"
    if hasattr(value, "__index__"):  # whole numbers, numpy's too
        return f"{value:,d}"
    return form.format(value)
