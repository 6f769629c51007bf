"""Statistics of scores over training seeds: intervals, differences, and p corrected for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
FEWEST = 3
"""Seeds from which a mean has an interval."""
LEAST = 5
"""Seeds of both arms from which a difference has a p: with fewer, Welch's errs up to eight times as often in its tail
as it says."""
DIFFERENCE = ("difference", "low", "high", "g", "p")


def interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t; NaN for fewer than three values, whose interval says nothing."""
    from scipy.stats import t

    if len(x) < FEWEST:
        return np.nan, np.nan
    half = t.ppf(0.5 + LEVEL / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def difference(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Difference of two means with Welch's interval and p, and Hedges' g; NaN for what too few values allow."""
    from scipy.stats import ttest_ind

    out = dict.fromkeys(DIFFERENCE, np.nan)
    if min(len(x), len(y)) < 1:
        return out
    out["difference"] = gap = float(x.mean() - y.mean())
    if min(len(x), len(y)) < FEWEST:
        return out
    found = ttest_ind(x, y, equal_var=False)
    bounds = found.confidence_interval(LEVEL)
    n = len(x) + len(y) - 2
    pooled = np.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / n)
    out |= {"low": float(bounds.low), "high": float(bounds.high)}
    out["g"] = float(gap / pooled * (1 - 3 / (4 * n - 1))) if pooled > 0 else np.nan
    return out | ({"p": float(found.pvalue)} if min(len(x), len(y)) >= LEAST else {})


def corrected(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Adds `p_holm` to rows by score and pair: p of a pair over all its scores, corrected for all pairs."""
    p: dict[Any, float] = {}
    for pair, own in contrasts.groupby(["experiment", "against"], sort=False):
        agree = own["difference"].gt(0).all() or own["difference"].lt(0).all()
        p[pair] = own["p"].max(skipna=False) if agree or own["p"].isna().any() else 1.0
    of_pair = dict(zip(p, holm(np.array([*p.values()], float)), strict=True))
    keys = zip(contrasts["experiment"], contrasts["against"], strict=True)
    return contrasts.assign(p_holm=[of_pair[k] for k in keys])


def holm(p: np.ndarray) -> np.ndarray:
    """p corrected for all that are not NaN, step-down (Holm 1979)."""
    out = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p) if np.isfinite(p[i])]
    least = 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * p[i]))
        out[i] = least
    return out
