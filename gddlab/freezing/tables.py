"""A mask in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError
from gddlab.freezing.places import numel, shares

if TYPE_CHECKING:
    import pandas as pd

    from gddlab.freezing.mask import FreezeMask

__all__ = ["diff", "html_rows", "mask_html", "mask_line", "same_network", "share_text", "summary"]


def share_text(value: Any) -> str:
    """A share, or one a resolution, in per cent; "" for None; masks of one's own may say anything else."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {share_text(v)}" for name, v in value.items())
    if isinstance(value, int | float):
        return f"{value:.2%}"
    return "" if value is None else str(value)


def mask_line(mask: FreezeMask) -> str:
    details = [f"{len(mask.frozen)} of {len(mask.parameters)} tensors"]
    if (asked := mask.arguments.get("budget")) is not None:
        details.append(f"budget {share_text(asked)}{_of(mask)}, reached {share_text(mask.arguments.get('reached'))}")
    frozen = f"{mask.fraction:.2%} of {mask.n_params:,} parameters frozen"
    return f"{mask.strategy}: {frozen} ({'; '.join(details)})"


def mask_html(mask: FreezeMask) -> str:
    a = mask.arguments
    rows = {
        "strategy": mask.strategy,
        "frozen": f"{mask.n_frozen:,} of {mask.n_params:,} parameters, {mask.fraction:.2%}; "
        f"{len(mask.frozen)} of {len(mask.parameters)} tensors",
    }
    if "budget" in a:
        rows["budget asked"] = share_text(a["budget"]) + _of(mask)
        rows["budget reached"] = share_text(a.get("reached"))
    others = {k: v for k, v in a.items() if k not in ("budget", "reached") and v is not None}
    rows["arguments"] = ", ".join(f"{k}={v}" for k, v in others.items())
    rows["hash"] = mask.hash[:12]
    by_kind = shares(mask.to_frame(), ["kind", "stage"]).unstack(sort=False)
    text = by_kind.to_html(float_format="{:.0%}".format, na_rep="")
    return f"{html_rows('FreezeMask', rows)}<p>Frozen share of the parameters, by kind of layer and stage</p>{text}"


def _of(mask: FreezeMask) -> str:
    if mask.strategy == "per-resolution":
        return " of the candidates at each resolution"
    return " of the candidates' number" if mask.arguments.get("unit") == "layers" else ""


def html_rows(caption: str, rows: Mapping[str, str]) -> str:
    """A table of two columns; rows without text are left out."""
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items() if v)
    return f"<table><caption>{escape(caption)}</caption>{cells}</table>"


def summary(mask: FreezeMask) -> pd.DataFrame:
    frame = mask.to_frame().rename(columns={"size": "parameters", "frozen": "still"})
    frame["frozen"] = frame["parameters"].where(frame["still"], 0)
    table = frame.groupby(["stage", "kind"], sort=False)[["parameters", "frozen"]].sum()
    table.loc[("total", ""), :] = table.sum()
    table = table.astype("int64")
    table["share"] = table["frozen"] / table["parameters"]
    return table


def same_network(mask: FreezeMask, other: FreezeMask) -> None:
    if not hasattr(other, "fingerprint"):
        raise GddlabError(f"{other!r} is no FreezeMask: give what select_freeze or FreezeMask.load returns")
    if mask.fingerprint != other.fingerprint:
        raise GddlabError(f"masks of {mask.n_params:,} and {other.n_params:,} parameters are for different networks")


def diff(mask: FreezeMask, other: FreezeMask) -> pd.DataFrame:
    import pandas as pd

    same_network(mask, other)
    mine, theirs = set(mask.frozen), set(other.frozen)
    words = {True: "frozen", False: "trained"}
    rows = [
        (name, numel(shape), words[name in mine], words[name in theirs])
        for name, shape in mask.parameters
        if (name in mine) != (name in theirs)
    ]
    return pd.DataFrame(rows, columns=["parameter", "size", "self", "other"])
