"""A two-level factorial over groups of layers: which groups, when trained, bring a student nearer to the data?"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
FACTORIAL = tuple(f"layers-{i:02}" for i in range(RUNS))
"""Experiments that run the rows of the design."""
GROUPS = 20
"""Most groups of which all sets are looked through."""
MOST = 0.6
"""Greatest frozen share of the parameters of a run, and of its complement."""
ROUNDS = 20
PERMUTED = 10_000
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
    """Which groups each run freezes: half of the rows, and for each of them the row that freezes the other groups.

    With its complement in the design, a row's pairs of groups cancel: no main effect holds any part of an interaction
    of two groups (a foldover; Box & Wilson 1951). The first half are rows that freeze about half of the parameters,
    exchanged one by one while that raises the determinant of the information matrix (D-optimal; Fedorov 1972; Atkinson
    & Donev 1992, section 15).

    Args:
        sizes: Share of all parameters of each group.
        runs: Number of rows, even.
        seed: Of the first rows.

    Returns:
        bool, (runs, groups); True is frozen. Row i + runs / 2 is the complement of row i.
    """
    return _design(tuple(sizes.values()), runs, seed)


@functools.cache
def _design(sizes: tuple[float, ...], runs: int, seed: int) -> np.ndarray:
    n, draw = len(sizes), np.random.default_rng(seed)
    levels = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1  # without the last group: its complement has it
    share = levels @ np.asarray(sizes)
    levels = levels[(share <= MOST) & (sum(sizes) - share <= MOST)]
    levels = levels[np.sort(draw.choice(len(levels), min(CANDIDATES, len(levels)), replace=False))]
    x = 2.0 * levels - 1  # a row and its complement say as much about the effects, and together nothing about the mean
    rows = draw.choice(len(x), runs // 2, replace=False)
    for _ in range(ROUNDS):
        before = rows.copy()
        for i in range(len(rows)):
            others = np.delete(rows, i)
            inverse = np.linalg.inv(x[others].T @ x[others])
            gain = np.einsum("ij,jk,ik->i", x, inverse, x)  # det(X'X + xx') = det(X'X) (1 + x' (X'X)^-1 x)
            gain[others] = -1  # each row once
            rows[i] = int(gain.argmax()) if gain.max() > gain[rows[i]] * (1 + 1e-9) else rows[i]
        if (rows == before).all():
            break
    half = levels[np.sort(rows)].astype(bool)
    return np.concatenate([half, ~half])


def shares(result: ProbeResult) -> dict[str, float]:
    """Share of all parameters of each group.

    Raises:
        GddlabError: More groups than a design is searched for, as of a U-Net with four resolutions.
    """
    network = Network(result)
    if len(found := groups(result)) > GROUPS:
        raise GddlabError(f"{len(found)} groups of layers: all sets of at most {GROUPS} can be looked through")
    sizes = {name: sum(sum(network.own[m].values()) for m in layers) for name, layers in found.items()}
    return {name: size / network.n_params for name, size in sizes.items()}


def effects(
    runs: Sequence[Run], result: ProbeResult, metrics: Sequence[str], *, at: float | None = None
) -> pd.DataFrame:
    """Main effects of training each group rather than freezing it, by least squares over the rows of the design.

    Args:
        runs: Those of the experiments `FACTORIAL`; others are omitted.
        result: The probe that masks were chosen from.
        metrics, at: As for `contrast_table`.

    Returns:
        As `contrast_table` gives it: a row per score and group, with `against` empty, `difference` the effect, `seeds`
        the runs, `g` the effect over the residual standard deviation, intervals of 95 % and p of Student's t with
        runs - groups - 1 degrees of freedom, `p_holm` corrected for all groups; and `frozen`, the group's share of the
        parameters.

    Raises:
        GddlabError: Too few of the runs have a score to tell the groups apart.
    """
    import pandas as pd
    from scipy.stats import t

    from gddlab.reporting.statistics import LEVEL, corrected

    sizes = shares(result)
    tables = []
    for metric in metrics:
        x, y, found, left = _fit(runs, sizes, metric, at)
        freedom = len(y) - x.shape[1]
        spread = np.sqrt(left / freedom)
        # from frozen to trained are two units
        effect, error = 2 * found[1:], 2 * spread * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))[1:]
        half = error * t.ppf(0.5 + LEVEL / 2, freedom)
        columns: dict[str, Any] = {"metric": metric, "experiment": list(sizes), "against": "", "seeds": len(y)}
        columns |= {"difference": effect, "low": effect - half, "high": effect + half, "g": effect / spread}
        columns |= {"p": 2 * t.sf(abs(effect) / error, freedom), "frozen": list(sizes.values()), "state": "done"}
        tables.append(pd.DataFrame(columns))
    return corrected(pd.concat(tables, ignore_index=True))


def explained(
    runs: Sequence[Run], result: ProbeResult, metrics: Sequence[str], alike: Sequence[str], *, at: float | None = None
) -> pd.DataFrame:
    """How much of what the rows of the design differ in is due to their masks.

    Args:
        runs, result, metrics, at: As for `effects`.
        alike: Experiments whose runs have one mask each and differ in the training seed alone.

    Returns:
        Indexed by score: runs; spread (standard deviation over the rows, whose masks and seeds differ), spread_alike
        (over the seeds of one mask, pooled over `alike`), p_masks (one-sided F test that the first is larger);
        explained (share of the variance that main effects of all groups fit, R squared), by_chance (what as many groups
        fit on average where none matters), p_groups (F test of all main effects together). Not corrected.

    Raises:
        GddlabError: As for `effects`; none of `alike` has two runs with the score.
    """
    import pandas as pd
    from scipy.stats import f

    from gddlab.reporting.tables import run_table

    out = {}
    for metric in metrics:
        x, y, _, left = _fit(runs, shares(result), metric, at)
        n, k = len(y), x.shape[1] - 1
        rows = y.var(ddof=1)
        share = 1 - left / (rows * (n - 1))
        same = run_table(runs, metric, rows=alike, at=at).dropna(subset="value").groupby("experiment")["value"]
        if not (freedom := int((same.size() - 1).sum())):
            raise GddlabError(f"alike={', '.join(alike)}: none has two runs with a score {metric!r}")
        within = float((same.var().fillna(0) * (same.size() - 1)).sum() / freedom)
        out[metric] = {
            "runs": n,
            "spread": np.sqrt(rows),
            "spread_alike": np.sqrt(within),
            "p_masks": f.sf(rows / within, n - 1, freedom),
            "explained": share,
            "by_chance": k / (n - 1),
            "p_groups": f.sf(share / k / ((1 - share) / (n - 1 - k)), k, n - 1 - k),
        }
    return pd.DataFrame.from_dict(out, orient="index").rename_axis("metric")


def _fit(
    runs: Sequence[Run], sizes: Mapping[str, float], metric: str, at: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Least squares over the rows of the design that have the score.

    Returns:
        x (rows, 1 + groups), 1 and then 1 if trained or -1 if frozen; the scores (rows,); coefficients (1 + groups,);
        the sum of squares that they leave.
    """
    from gddlab.reporting.tables import run_table

    values = run_table(runs, metric, rows=FACTORIAL, at=at).set_index("experiment")["value"].reindex([*FACTORIAL])
    there = values.notna().to_numpy()
    x = np.hstack([np.ones((RUNS, 1)), 1.0 - 2.0 * design(sizes)])[there]
    if len(x) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        raise GddlabError(f"{len(x)} of {RUNS} runs have a score {metric!r}: too few for {len(sizes)} groups")
    y = values[there].to_numpy(float)
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    return x, y, found, float(((y - x @ found) ** 2).sum())


def foretold(found: pd.DataFrame, pulls: pd.DataFrame, metric: str = "fd-lite2", *, seed: int = 0) -> pd.DataFrame:
    """Which measurements foretell the effect of training a group: rank correlations over the groups.

    Args:
        found: From `effects`.
        pulls: The study "pulls": group, measure, value; a group has the mean of its layers.
        metric: Whose effect is foretold.
        seed: Of the permutations.

    Returns:
        Indexed by measure: rho (Spearman's, with how far training the group lowers the score), rho_share (the same with
        the group's share of the parameters held constant: of what ranks of both do not owe to it), p (of rho, corrected
        for all measures: how often the largest |rho| of any of them is as large when effects are permuted; Westfall &
        Young 1993).

    Raises:
        GddlabError: A group has no effect, or a measure no value in a group.
    """
    import pandas as pd
    from scipy.stats import rankdata

    own = found[found["metric"] == metric].set_index("experiment")
    table = pulls.groupby(["measure", "group"], sort=False, observed=True)["value"].mean().unstack("group")
    if lacking := [group for group in table.columns if group not in own.index]:
        raise GddlabError(f"group {lacking[0]!r} has no effect by {metric!r}: give the table of effects of this list")
    for measure in table.index[~np.isfinite(table.to_numpy(float)).all(axis=-1)]:
        raise GddlabError(f"measure {measure!r} has no value in a group, or one that is not finite: leave it out")
    measures = _unit(rankdata(table.to_numpy(float), axis=-1))  # (measures, groups)
    gain = _unit(rankdata(-own.loc[table.columns, "difference"].to_numpy(float)))
    share = _unit(rankdata(own.loc[table.columns, "frozen"].to_numpy(float)))
    rho = measures @ gain
    partial = _unit(measures - (measures @ share)[:, None] * share) @ _unit(gain - (gain @ share) * share)
    draw = np.random.default_rng(seed)
    largest = np.array([abs(measures @ draw.permutation(gain)).max() for _ in range(PERMUTED)])
    p = [(1 + int((largest >= abs(r) - 1e-12).sum())) / (1 + PERMUTED) for r in rho]
    return pd.DataFrame({"rho": rho, "rho_share": partial, "p": p}, index=table.index)


def _unit(x: np.ndarray) -> np.ndarray:
    """Centred and of length 1 along the last axis, so that products are correlations; 0 where nothing is left."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def best_frozen(found: pd.DataFrame, *, low: float = 0.45, high: float = 0.55) -> list[str]:
    """The groups to freeze that the main effects foretell as best, among all sets of groups of about one share.

    Best is where the effects of training the frozen groups add up to the most, each over the residual standard
    deviation of its score and averaged over the scores: what would harm most is not trained.

    Args:
        found: From `effects`.
        low, high: Accepted frozen share of the parameters.

    Raises:
        GddlabError: No set of groups has such a share.
    """
    table = found.groupby("experiment", sort=False)[["g", "frozen"]].mean()
    n = len(table)
    frozen = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    share = frozen @ table["frozen"].to_numpy()
    harm = np.where((share >= low) & (share <= high), frozen @ table["g"].to_numpy(), -np.inf)
    if not np.isfinite(harm.max()):
        raise GddlabError(f"low={low}, high={high}: no set of these groups freezes such a share of the parameters")
    return [group for group, on in zip(table.index, frozen[harm.argmax()], strict=True) if on]


def mask_of(result: ProbeResult, frozen: Collection[str]) -> FreezeMask:
    """The mask that freezes these groups."""
    layers = [layer for group, own in groups(result).items() if group in frozen for layer in own]

    def by_group(source: object) -> list[str]:
        return layers

    return select_freeze(result, strategy=by_group)


def row_mask(result: ProbeResult, row: int) -> FreezeMask:
    """The mask of a row of the design."""
    sizes = shares(result)
    return mask_of(result, [group for group, on in zip(sizes, design(sizes)[row], strict=True) if on])
