"""Tables for people: rounded, right-aligned, with a caption and readable heads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from gddlab.reporting.reading import NOT_RUN

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

__all__ = ["styled"]

HEADS = {
    "frozen": "frozen parameters",
    "kimg": "thousand images seen",
    "value": "distance",
    "sd": "sd over seeds",
    "nfe": "network calls an image",
    "images": "distinct images",
    "trained": "parameters trained",
    "discriminator": "discriminator's, trained",
    "sec_per_kimg": "seconds a thousand images",
    "minutes": "training, minutes",
    "peak_mem_mib": "peak memory, MiB",
    "clip-fid": "CLIP-FID",
    "fid": "FID",
}
"""Column -> head with its unit; a column that is not here is its own head."""
FORMATS = {
    "frozen": "{:.1%}",
    "mean": "{:.1f}",
    "sd": "{:.1f}",
    "min": "{:.1f}",
    "max": "{:.1f}",
    "value": "{:.1f}",
    "kimg": "{:g}",
    "share trained": "{:.1%}",
    "sec_per_kimg": "{:.1f}",
    "minutes": "{:.1f}",
    "peak_mem_mib": "{:,.0f}",
    "fd-": "{:.1f}",
    "kd-": "{:.3f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "fid": "{:.2f}",
    "kid": "{:.4f}",
    "clip-fid": "{:.2f}",
}
"""Column, or how its name begins -> how its numbers are written; whole numbers with commas, others with three digits."""
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
        table: Numbers and text. Where it has a column `state`, empty cells of a row that was not run say so; the column itself is shown
            where there is more to say than that.
        caption: What is seen: n, extractor, seeds, unit.
        heads: Column -> head, beside `HEADS`.
        formats: Column, or how its name begins -> format, beside `FORMATS`.
    """
    import pandas as pd
    from pandas.io.formats.style import Styler

    state = table.get("state")
    told = state is None or not state.isin(["done", NOT_RUN]).all()
    shown = table if told else table.drop(columns="state")
    states = [NOT_RUN] * len(table) if state is None else list(state)
    heads, formats = HEADS | dict(heads or {}), FORMATS | dict(formats or {})
    columns: dict[str, list[str]] = {}
    text: dict[str, Any] = {}
    for name in map(str, shown.columns):
        head = heads.get(name, name)
        form = _format(name, formats)
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


def _format(name: str, known: Mapping[str, str]) -> str:
    return known.get(name) or next((f for start, f in known.items() if name.startswith(start)), "{:.3g}")


def _written(value: Any, form: str, state: str) -> str:
    import pandas as pd

    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOT_RUN if state == NOT_RUN else "–"
    if hasattr(value, "__index__"):  # whole numbers, numpy's too
        return f"{value:,d}"
    return form.format(value)
