"""Masks of a share of the parameters, and the factorial over groups of layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.experiments.experiment import MaskInputs
from gddlab.experiments.factorial import (
    MOST,
    RUNS,
    best_frozen,
    design,
    effects,
    explained,
    foretold,
    groups,
    row_mask,
    shares,
)
from gddlab.experiments.masks import at_share, by_rule, measure
from gddlab.freezing import select_freeze
from gddlab.probing import probe
from gddlab.probing.layers import owner_of
from gddlab.teachers import load_teacher


@pytest.fixture(scope="module")
def measured() -> MaskInputs:
    net = load_teacher("digits")
    return MaskInputs(probe(net, [80.0], n=2, progress=False))


def test_what_is_measured_of_a_teacher(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(str(tiny_teacher), "digits")
    assert {"rel_update", "cosine", "ablation_output_mean"} <= set(found.stats)
    assert MaskInputs(found).rule == select_freeze(found, strategy="gdd-i")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_random_masks_have_their_share(measured: MaskInputs, share: float) -> None:
    masks = [at_share(share)(measured, seed) for seed in (0, 1)]
    assert masks[0] != masks[1] and masks[0] == at_share(share)(measured, 0)
    for mask in masks:
        assert mask is not None
        # the largest layer has 7 % of the parameters; what is left of the share may be smaller than every layer
        assert share - 0.04 < mask.fraction <= share + 1e-6
    convolutions = select_freeze(measured.result, strategy="all-conv")
    frozen = {owner_of(p) for mask in masks if mask for p in mask.frozen}
    inside = {owner_of(p) for p in convolutions.frozen}
    assert frozen <= inside if share < convolutions.fraction else inside < frozen


def test_the_rules_order_contains_the_rules(measured: MaskInputs) -> None:
    rules = [by_rule(s)(measured, 0) for s in ("gdd-i", "gdd-i-2", "gdd-i-3")]
    for mask in rules:
        assert mask is not None
        exact = at_share(mask.fraction, ordered=True)(measured, 3)
        assert exact is not None and set(exact.frozen) == set(mask.frozen)
    half, most = (at_share(s, ordered=True)(measured, 0) for s in (0.5, 0.95))
    assert half is not None and most is not None and rules[2] is not None
    assert set(half.frozen) < set(measured.rule.frozen)
    assert set(rules[2].frozen) < set(most.frozen)


def test_groups_hold_almost_all_parameters(measured: MaskInputs) -> None:
    found = groups(measured.result)
    assert len(found) == 17 and "dec 8x8 conv0" in found
    layers = [layer for group in found.values() for layer in group]
    assert len(set(layers)) == len(layers)
    assert 0.96 < sum(shares(measured.result).values()) < 1


def test_too_many_groups_are_refused(measured: MaskInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.experiments.factorial.GROUPS", 16)
    with pytest.raises(GddlabError, match="17 groups of layers: all sets of at most 16"):
        shares(measured.result)


def test_the_design_estimates_every_group(measured: MaskInputs) -> None:
    sizes = shares(measured.result)
    rows = design(sizes)
    assert rows.shape == (RUNS, len(sizes)) and (rows == design(sizes)).all()
    assert len({tuple(row) for row in rows.tolist()}) == RUNS
    share = rows @ np.array(list(sizes.values()))
    assert share.max() <= MOST and share.min() >= sum(sizes.values()) - MOST - 1e-9
    x = np.hstack([np.ones((RUNS, 1)), 2.0 * rows - 1])
    # no main effect holds a part of an interaction of two groups
    pairs = np.stack([x[:, i] * x[:, j] for i in range(1, x.shape[1]) for j in range(1, i)], 1)
    assert abs((np.linalg.pinv(x) @ pairs)[1:]).max() < 1e-9
    errors = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * RUNS)  # 1 for orthogonal columns
    assert errors.max() < 2
    drawn = np.random.default_rng(1).random((RUNS, len(sizes))) < 0.5
    z = np.hstack([np.ones((RUNS, 1)), 2.0 * drawn - 1])
    assert np.linalg.slogdet(x.T @ x)[1] > np.linalg.slogdet(z.T @ z)[1] - 3  # though shares are bound
    # a linear truth is found again
    effects = np.linspace(-1, 1, len(sizes))
    found = np.linalg.lstsq(x, x[:, 1:] @ effects + 5, rcond=None)[0]
    np.testing.assert_allclose(found, [5, *effects], atol=1e-9)
    mask = row_mask(measured.result, 3)
    expected = {n for n, on in zip(groups(measured.result), rows[3], strict=True) if on}
    inside = {n for n, group in groups(measured.result).items() if {*group} <= {owner_of(p) for p in mask.frozen}}
    assert inside == expected


def test_effects_of_training_a_group(measured: MaskInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = shares(measured.result)
    frozen, draw = design(sizes), np.random.default_rng(0)
    truth = np.zeros(len(sizes))
    truth[[2, 5]] = -6.0, 4.0
    values = 60 + (~frozen) @ truth + draw.normal(0, 0.5, RUNS)
    done = RUNS

    def table(runs: object, metric: str, *, rows: tuple[str, ...], at: float | None) -> pd.DataFrame:
        assert at == 12 and [*rows][:2] == ["layers-00", "layers-01"]
        return pd.DataFrame({"experiment": [*rows][:done], "value": values[:done]})

    monkeypatch.setattr("gddlab.reporting.tables.run_table", table)
    found = effects([], measured.result, ["fd-lite2", "kd-lite2"], at=12)
    assert len(found) == 2 * len(sizes) and found["seeds"].unique().tolist() == [RUNS]
    one = found[found["metric"] == "fd-lite2"].reset_index()
    np.testing.assert_allclose(one["difference"], truth, atol=0.8)
    assert one.loc[2, "g"] == pytest.approx(-6 / 0.5, rel=0.4)  # over the residual spread
    assert one.index[one["p_holm"] < 0.001].tolist() == [2, 5]
    assert ((one["low"] < truth) & (truth < one["high"])).mean() > 0.8
    assert one["experiment"].tolist() == list(sizes) and (one["frozen"] == list(sizes.values())).all()
    frozen_groups = best_frozen(found)  # what harms is not trained, what helps is
    names = list(sizes)
    assert names[5] in frozen_groups and names[2] not in frozen_groups
    assert 0.45 <= sum(sizes[name] for name in frozen_groups) <= 0.55
    inverse = best_frozen(found.assign(g=-found["g"]), low=0.4, high=0.6)
    assert names[2] in inverse and names[5] not in inverse
    with pytest.raises(GddlabError, match=r"low=0.001, high=0.0011: no set of these groups"):
        best_frozen(found, low=0.001, high=0.0011)
    done = 12
    with pytest.raises(GddlabError, match="12 of 48 runs have a score 'fd-lite2': too few for 17 groups"):
        effects([], measured.result, ["fd-lite2"], at=12)


@pytest.mark.parametrize("matters", [True, False])
def test_how_much_the_masks_explain(measured: MaskInputs, monkeypatch: pytest.MonkeyPatch, matters: bool) -> None:
    from scipy.stats import f_oneway

    sizes, draw = shares(measured.result), np.random.default_rng(3)
    truth = np.linspace(-4, 4, len(sizes)) * matters
    rows = 60 + (~design(sizes)) @ truth + draw.normal(0, 1, RUNS)
    seeds = {"a": 50 + draw.normal(0, 1, 10), "b": 70 + draw.normal(0, 1, 6)}  # means of masks do not count

    def table(runs: object, metric: str, *, rows: tuple[str, ...], at: float | None) -> pd.DataFrame:
        values = {e: v for e, v in seeds.items() if e in rows} or dict(zip(rows, values_of_rows[:, None], strict=True))
        return pd.DataFrame([{"experiment": e, "value": v} for e, own in values.items() for v in own])

    values_of_rows = rows
    monkeypatch.setattr("gddlab.reporting.tables.run_table", table)
    found = explained([], measured.result, ["fd-lite2"], ["a", "b"], at=12).loc["fd-lite2"]
    assert found["runs"] == RUNS and found["spread"] == pytest.approx(rows.std(ddof=1))
    pooled = (9 * seeds["a"].var(ddof=1) + 5 * seeds["b"].var(ddof=1)) / 14
    assert found["spread_alike"] == pytest.approx(pooled**0.5)
    assert found["by_chance"] == pytest.approx(17 / 47)
    if matters:
        assert found["explained"] > 0.9 and max(found["p_groups"], found["p_masks"]) < 0.001
    else:
        assert found["explained"] < 0.6 and min(found["p_groups"], found["p_masks"]) > 0.05
    # of one group alone, the F test of all rows is that of an analysis of variance of two samples
    one = {"dec 8x8 conv0": sizes["dec 8x8 conv0"]}
    halves = np.arange(RUNS) % 2 == 0
    monkeypatch.setattr("gddlab.experiments.factorial.shares", lambda result: one)
    monkeypatch.setattr("gddlab.experiments.factorial.design", lambda sizes: halves[:, None])
    alone = explained([], measured.result, ["fd-lite2"], ["a"], at=12).loc["fd-lite2"]
    assert alone["p_groups"] == pytest.approx(f_oneway(rows[halves], rows[~halves]).pvalue)
    seeds = {"a": np.array([50.0])}
    with pytest.raises(GddlabError, match="alike=a: none has two runs with a score 'fd-lite2'"):
        explained([], measured.result, ["fd-lite2"], ["a"], at=12)


def test_what_foretells_an_effect() -> None:
    """Spearman's correlation, without what size explains, and p for the largest of several measures."""
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0)
    names, size = [f"g{i}" for i in range(17)], draw.random(17)
    effect = -2 * size + 0.3 * draw.normal(size=17)  # the larger, the more a group lowers the score
    found = pd.DataFrame({"metric": "fd", "experiment": names, "difference": effect, "frozen": size})
    values = {"size again": size**3, "the effect": -effect, "chance": draw.random(17)}
    rows = [(name, g, v) for name, own in values.items() for g, v in zip(names, own, strict=True)]
    pulls = pd.DataFrame([*rows, *rows], columns=["measure", "group", "value"])  # two layers a group
    table = foretold(found, pulls, "fd")
    assert table.loc["the effect", "rho"] == pytest.approx(1) and table.loc["the effect", "p"] < 0.001
    for name, own in values.items():
        assert table.loc[name, "rho"] == pytest.approx(spearmanr(own, -effect).statistic)
    assert table.loc["size again", "rho"] > 0.8 and abs(table.loc["size again", "rho_share"]) < 1e-4
    assert table.loc["chance", "p"] > 0.05
    part = pulls.assign(value=pulls["value"].where(pulls["measure"] != "chance"))
    for lacking in (part, part.dropna()[lambda t: ~((t["measure"] == "size again") & (t["group"] == "g3"))]):
        with pytest.raises(GddlabError, match=r"measure '(chance|size again)' has no value in a group"):
            foretold(found, lacking, "fd")
    with pytest.raises(GddlabError, match="group 'g0' has no effect by 'kd'"):
        foretold(found, pulls, "kd")
