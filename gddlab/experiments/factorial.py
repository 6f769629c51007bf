"""A two-level factorial over groups of layers: which groups, when trained, bring a student nearer to the data?"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.freezing.candidates import Network
from gddlab.probing import ProbeResult
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd

RUNS = 48
SHARES = (0.4, 0.6)
"""Least and greatest frozen share of the parameters of a run."""
ROUNDS = 20
CANDIDATES = 4096
"""Rows among which a design is searched."""
_LAYER = re.compile(r"\.(enc|dec)\.(\d+)x\d+_\w+\.(conv0|conv1|qkv|proj|skip|affine)$")
_KINDS = {"qkv": "attention", "proj": "attention", "affine": "embedding"}


def groups(source: ProbeResult | nn.Module) -> dict[str, list[str]]:
    """Layers in blocks of a U-Net by stage, resolution and kind, such as "dec 8x8 conv0".

    Kinds are the two convolutions, attention, the convolution of the skip path, and the embedding of the noise level.
    Norms and what is outside of blocks are in no group: they are always trained.
    """
    out: dict[str, list[str]] = {}
    for layer in Network(source).own:
        if found := _LAYER.search(layer):
            stage, side, kind = found.groups()
            out.setdefault(f"{stage} {side}x{side} {_KINDS.get(kind, kind)}", []).append(layer)
    return out


def design(sizes: Mapping[str, float], *, runs: int = RUNS, seed: int = 0) -> np.ndarray:
    """Which groups each run freezes, so that all main effects are estimated as well as possible.

    Rows are drawn among those that freeze between 40 and 60 % of the parameters, then exchanged one by one while that
    raises the determinant of the information matrix (D-optimal; Fedorov 1972; Atkinson & Donev 1992, section 15).

    Args:
        sizes: Share of all parameters of each group.
        runs: Number of rows.
        seed: Of the first rows.

    Returns:
        bool, (runs, groups); True is frozen.
    """
    return _design(tuple(sizes.values()), runs, seed)


@functools.cache
def _design(sizes: tuple[float, ...], runs: int, seed: int) -> np.ndarray:
    n, draw = len(sizes), np.random.default_rng(seed)
    levels = (np.arange(2**n)[:, None] >> np.arange(n)) & 1  # every choice of groups, (2^n, n)
    share = levels @ np.asarray(sizes)
    levels = levels[(share >= SHARES[0]) & (share <= SHARES[1])]
    levels = levels[np.sort(draw.choice(len(levels), min(CANDIDATES, len(levels)), replace=False))]
    x = np.hstack([np.ones((len(levels), 1)), 2.0 * levels - 1])  # (candidates, 1 + n)
    rows = draw.choice(len(x), runs, replace=False)
    for _ in range(ROUNDS):
        before = rows.copy()
        for i in range(runs):
            others = np.delete(rows, i)
            inverse = np.linalg.inv(x[others].T @ x[others])
            gain = np.einsum("ij,jk,ik->i", x, inverse, x)  # det(X'X + xx') = det(X'X) (1 + x' (X'X)^-1 x)
            gain[others] = -1  # each row once
            rows[i] = int(gain.argmax()) if gain.max() > gain[rows[i]] * (1 + 1e-9) else rows[i]
        if (rows == before).all():
            break
    return levels[np.sort(rows)].astype(bool)


def shares(result: ProbeResult) -> dict[str, float]:
    """Share of all parameters of each group."""
    network = Network(result)
    sizes = {name: sum(sum(network.own[m].values()) for m in layers) for name, layers in groups(result).items()}
    return {name: size / network.n_params for name, size in sizes.items()}


def effects(
    runs: Sequence[Run], result: ProbeResult, metrics: Sequence[str], *, at: float | None = None
) -> pd.DataFrame:
    """Main effects of training each group rather than freezing it, by least squares over the rows of the design.

    Args:
        runs: Those of the experiments "layers-00" and so on; others are omitted.
        result: The probe that masks were chosen from.
        metrics, at: As for `contrast_table`.

    Returns:
        As `contrast_table` gives it: a row per score and group, `mean` and `difference` the effect, `frozen` the share
        of the parameters that the group has, `seeds` the runs, intervals of 95 % and p of Student's t with
        runs - groups - 1 degrees of freedom, `p_holm` corrected for the table.

    Raises:
        GddlabError: Too few of the runs have a score to tell the groups apart.
    """
    import pandas as pd
    from scipy.stats import t

    from gddlab.reporting.contrasts import holm
    from gddlab.reporting.tables import run_table

    sizes, names = shares(result), [f"layers-{i:02}" for i in range(RUNS)]
    trained = 1.0 - 2.0 * design(sizes)  # (runs, groups): 1 is trained, -1 frozen
    tables = []
    for metric in metrics:
        values = run_table(runs, metric, rows=names, at=at).set_index("experiment")["value"].reindex(names)
        there = values.notna().to_numpy()
        x, y = np.hstack([np.ones((there.sum(), 1)), trained[there]]), values[there].to_numpy(float)
        freedom = len(y) - x.shape[1]
        if freedom < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
            raise GddlabError(f"{len(y)} of {RUNS} runs have a score {metric!r}: too few for {len(sizes)} groups")
        inverse = np.linalg.inv(x.T @ x)
        found = inverse @ x.T @ y
        error = np.sqrt(((y - x @ found) ** 2).sum() / freedom * np.diag(inverse))[1:]
        effect, half = 2 * found[1:], 2 * error * t.ppf(0.975, freedom)  # from frozen to trained are two units
        columns = {"metric": metric, "experiment": list(sizes), "frozen": list(sizes.values()), "seeds": len(y)}
        columns |= {"mean": effect, "low": effect - half, "high": effect + half}
        columns |= {"difference": effect, "difference_low": effect - half, "difference_high": effect + half}
        tables.append(
            pd.DataFrame(columns).assign(g=effect / y.std(ddof=1), p=2 * t.sf(abs(effect) / (2 * error), freedom))
        )
    out = pd.concat(tables, ignore_index=True)
    return out.assign(p_holm=holm(out["p"].to_numpy(float)), state="done")


def mask_of(result: ProbeResult, row: int) -> FreezeMask:
    """The mask of a row of the design."""
    frozen = [
        layer
        for layers, on in zip(groups(result).values(), design(shares(result))[row], strict=True)
        if on
        for layer in layers
    ]

    def factorial(source: object) -> list[str]:
        return frozen

    return select_freeze(result, strategy=factorial)
