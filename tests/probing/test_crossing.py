"""Crossing inputs with levels told: rows, parts of the result, shares of variation, refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import DEFAULT, ProbeResult, estimate, probe, wrap
from gddlab.probing.crossing import jackknife, shares
from tests.probing.networks import tiny

SIGMAS = [80.0, 1.0, 0.01]
STATS = (*DEFAULT, "cosine")


class TwoSided(nn.Module):
    """A convolution that sees the image only, and one that sees the level told only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.of_input = nn.Conv2d(1, 4, 3, padding=1)
        self.of_level = nn.Conv2d(1, 4, 1)
        self.of_both = nn.Conv2d(8, 1, 1)

    def forward(self, x, level):
        level = level[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.of_both(torch.cat([self.of_input(x), self.of_level(level)], 1))


def denoise(net, x, sigma, labels, told):
    return x - sigma[:, None, None, None] * net(x / (sigma**2 + 1).sqrt()[:, None, None, None], told.log() / 4)


@pytest.fixture(scope="module")
def crossed(pictures) -> ProbeResult:
    return probe(tiny(), SIGMAS, told="cross", data=pictures, n=6, batch_size=18, stats=STATS)


def test_rows_are_each_input_told_each_level(net, pictures):
    seen, labels = [], []
    net.register_forward_pre_hook(lambda m, a, k: seen.append((*a, k)), with_kwargs=True)
    net.model.register_forward_pre_hook(lambda m, a: labels.append(a[:2]))
    probe(net, [3.0, 1.0], told=[2.0, 0.5], data=pictures, n=1, stats="rms")
    probe(net, [3.0, 1.0], data=pictures, n=1, stats="rms")
    (x, sigma, _, keyword), (plain, _, _, nothing) = seen
    assert sigma.tolist() == [3.0, 3.0, 1.0, 1.0] and keyword["told"].tolist() == [2.0, 0.5] * 2 and not nothing
    torch.testing.assert_close(x, plain.repeat_interleave(2, 0), rtol=0, atol=0)
    scaled, noise = labels[0]
    torch.testing.assert_close(
        scaled, labels[1][0].repeat_interleave(2, 0), rtol=0, atol=0
    )  # c_in of the input's level
    torch.testing.assert_close(noise, keyword["told"].log() / 4)


def test_the_diagonal_is_the_probe_without(net, crossed, pictures):
    plain = probe(net, SIGMAS, data=pictures, n=6, stats=STATS)
    part = crossed.diagonal()
    assert list(part.frame) == list(plain.frame) and part.sigmas == SIGMAS and not part.told
    keys = ["layer", "sigma", "stat", "n_images"]
    pd.testing.assert_frame_equal(part.frame[keys], plain.frame[keys])
    share = plain.frame["stat"] == "active_fraction"  # counts: rounding may move a value across 0
    np.testing.assert_allclose(part.frame["value"][~share], plain.frame["value"][~share], rtol=1e-5, atol=1e-6)
    same = ~plain.frame["stat"].isin(["active_fraction", "cosine", "correlation"])  # likeness: another estimate
    np.testing.assert_allclose(part.frame["sem"][same], plain.frame["sem"][same], rtol=1e-3, atol=1e-5)


def test_told_its_own_level_is_the_probe_without_to_the_bit(net, pictures):
    for sigma in SIGMAS:  # the same rows in every pass; with more rows, kernels round in another order
        plain = probe(net, [sigma], data=pictures, n=6, batch_size=3, stats=STATS)
        part = probe(net, [sigma], told="cross", data=pictures, n=6, batch_size=3, stats=STATS).diagonal()
        np.testing.assert_array_equal(part.frame["value"], plain.frame["value"])
        for kind, matrices in plain.matrices.items():
            assert all(np.array_equal(part.matrices[kind][layer], matrix) for layer, matrix in matrices.items())


def test_a_level_told_throughout_is_a_line_of_all_pairs(crossed, pictures):
    alone = probe(tiny(), SIGMAS, told=1.0, data=pictures, n=6, batch_size=18, stats=STATS)
    assert alone.told == [1.0] and list(alone.frame["told"].unique()) == [1.0]
    for part in (alone.fixed(told=1.0), crossed.fixed(told=1.2)):
        pd.testing.assert_series_equal(part.pivot("rms").stack(), crossed_at(crossed, told=1.0), rtol=1e-5)
        assert part.meta["fixed"] == {"told": 1.0}
    other = crossed.fixed(sigma=80.0)
    pd.testing.assert_series_equal(other.pivot("rms").stack(), crossed_at(crossed, sigma=80.0), rtol=1e-12)
    cosine = alone.fixed(told=1.0).pivot("cosine")
    np.testing.assert_allclose(cosine, crossed.fixed(told=1.0).pivot("cosine"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cosine[80.0], 1)
    assert cosine[0.01].max() < 1


def crossed_at(result: ProbeResult, **where: float) -> pd.Series:
    ((column, level),) = where.items()
    frame = result.frame[(result.frame["stat"] == "rms") & (result.frame[column] == level)]
    across = "sigma" if column == "told" else "told"
    order = list(dict.fromkeys(frame["layer"]))
    table = frame.pivot(index="layer", columns=across, values="value").loc[order]
    return table.iloc[:, ::-1].rename_axis(columns="sigma").stack()


def test_effects_of_a_network_that_ignores_one_of_them(pictures):
    result = probe(
        wrap(TwoSided(), denoise),
        SIGMAS,
        told="cross",
        data=pictures,
        layers="all",
        n=8,
        stats=("rms", "mean_abs", "cosine"),
    )
    for stat in ("rms", "mean_abs", "cosine"):
        table = result.effects(stat)
        assert table.loc["of_input", "input"] == pytest.approx(1, abs=1e-9)
        assert table.loc["of_level", "told"] == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(table[["input", "told", "both"]].sum(axis=1), 1)
        assert (table.loc["of_both", ["input", "told"]] > 0.001).all()
        assert table["sem_input"].between(0, 0.2).all() and table["spread"].gt(0).all()


def test_shares_are_the_analysis_of_variance_of_vectors():
    a = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = shares(torch.einsum("std,uvd->stuv", a, a))
    mean = a.mean((0, 1))
    total = (a - mean).square().sum(-1).mean()
    rows, columns = (a.mean(d) - mean for d in (1, 0))
    both = a - a.mean(1, keepdim=True) - a.mean(0) + mean
    wanted = [rows.square().sum(-1).mean(), columns.square().sum(-1).mean(), both.square().sum(-1).mean()]
    torch.testing.assert_close(got[:3], torch.stack(wanted) / total)
    torch.testing.assert_close(got[3], (total / a.square().sum(-1).mean()).sqrt())
    still = torch.ones(2, 2, 3, dtype=torch.float64)
    assert shares(torch.einsum("std,uvd->stuv", still, still))[:3].isnan().all()


def test_the_jackknife_gives_the_standard_error_of_a_mean():
    x = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = [(x.sum() - v) / 15 for v in x]
    torch.testing.assert_close(jackknife(left, x.mean(), [1] * 16), x.std() / 4)
    assert jackknife(left[:1], x.mean(), [1]).isnan()


def test_the_jackknife_takes_parts_of_any_size():
    """Of the mean the spread over many data sets is known; parts treated as equal would be far off."""
    x = torch.randn(4000, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = [1, 2, 3, 4, 5, 6]
    parts = x.split(sizes, 1)
    left = [(x.sum(1) - p.sum(1)) / (21 - p.shape[1]) for p in parts]
    errors = jackknife(left, x.mean(1), sizes)
    torch.testing.assert_close(errors.square().mean().sqrt(), torch.tensor(21**-0.5).double(), rtol=0.05, atol=0)


def test_errors_do_not_depend_on_the_batch_size(pictures):
    a, b = (
        probe(tiny(), SIGMAS, told="cross", data=pictures, n=12, batch_size=size, stats=("rms", "correlation"))
        for size in (9, 500)
    )
    assert len(a.blocks) == len(b.blocks) == 6
    for stat in ("rms", "correlation"):
        np.testing.assert_allclose(a.effects(stat), b.effects(stat), rtol=1e-2, atol=1e-6)
    assert a.effects("correlation")["sem_input"].gt(0).all()


def test_responses_name_what_varied(crossed):
    table = crossed.responses("cosine", at=80)
    assert list(table["network"]) == ["trained"] * 3
    line = crossed.fixed(told=80.0)
    assert table.loc[1, "cosine"] == pytest.approx(line.pivot("cosine")[0.01].median())
    sizes = line.pivot("rel_update")
    octaves = np.log2(sizes.max(axis=1) / sizes.min(axis=1))
    assert octaves.min() <= table.loc[1, "rel_update"] <= octaves.max()
    assert table["cosine_sem"].gt(0).all()
    assert "told 80" in table.loc[1, "varied"] and "staying at 80" in table.loc[2, "varied"]
    assert "told 1" in crossed.responses(at=2)["varied"][1]  # the nearest one measured
    with pytest.raises(GddlabError, match="'rms' compares no noise levels"):
        crossed.responses("rms")


def test_pictures_say_which_part_they_are_of(crossed):
    of_input, of_level = crossed.fixed(told=80), crossed.fixed(sigma=1)
    assert "told σ = 80" in of_input.heatmap("rms").get_title("left")
    for ax in (of_level.heatmap("rms"), of_level.lines("rms")):
        assert "input at σ = 1" in ax.get_title("left") and ax.get_xlabel() == "noise level σ told"
    assert of_input.lines("rms").get_xlabel() == "noise level σ"


def test_crossed_results_merge_and_come_back(crossed, pictures, tmp_path):
    halves = [probe(tiny(), SIGMAS, told="cross", data=pictures, n=4, start=s, batch_size=18) for s in (0, 4)]
    whole = halves[0].merge(halves[1])
    assert len(whole.blocks) == 4 and whole.meta["n_images"] == 8
    once = probe(tiny(), SIGMAS, told="cross", data=pictures, n=8, batch_size=18)
    share = once.frame["stat"] == "active_fraction"
    np.testing.assert_allclose(whole.frame["value"][~share], once.frame["value"][~share], rtol=1e-5, atol=1e-6)
    whole.save(tmp_path / "r")
    back = ProbeResult.load(tmp_path / "r")
    pd.testing.assert_frame_equal(back.effects("correlation"), whole.effects("correlation"))
    pd.testing.assert_frame_equal(back.frame, whole.frame)


def test_levels_in_parts_give_the_same(crossed, pictures):
    stats = ["rms", "rel_update"]
    split = probe(tiny(), SIGMAS, told="cross", data=pictures, n=6, batch_size=3, stats=stats)
    wanted = crossed.frame[crossed.frame["stat"].isin(stats)].reset_index(drop=True)
    np.testing.assert_allclose(split.frame["value"], wanted["value"], rtol=1e-5)
    np.testing.assert_allclose(split.effects("rms")["input"], crossed.effects("rms")["input"], rtol=1e-4)


def test_six_levels_are_crossed_unless_given(pictures):
    net = tiny()
    assert estimate(net, told="cross", data=pictures, n=2, stats="rms").rows == 64 // 36 * 36
    assert len(probe(net, told="cross", data=pictures, n=1, stats="rms").sigmas) == 6
    assert len(probe(net, data=pictures, n=1, stats="rms").sigmas) == 18


def test_refusals(net, crossed, result, pictures):
    with pytest.raises(GddlabError, match=r"sigma 500 in told: this network accepts"):
        probe(tiny(sigma_max=80.0), SIGMAS, told=[500.0], data=pictures, n=1)
    with pytest.raises(GddlabError, match=r"told='crossed': give \"cross\", a sigma, or a list"):
        probe(net, SIGMAS, told="crossed", data=pictures, n=1)
    with pytest.raises(GddlabError, match=r"told=True: give"):
        probe(net, SIGMAS, told=True, data=pictures, n=1)
    silent = wrap(TwoSided(), lambda model, x, sigma, labels: model(x, sigma))
    with pytest.raises(GddlabError, match="a denoise= with an argument told"):
        probe(silent, SIGMAS, told="cross", data=pictures, n=1, layers="all")
    for ask in (lambda: crossed.heatmap("rms"), lambda: crossed.pivot("rms"), crossed.similarities):
        with pytest.raises(GddlabError, match=r"choose a part, fixed\(told=80\)"):
            ask()
    with pytest.raises(GddlabError, match=r'not crossed: probe with told="cross"'):
        result.effects("rms")
    with pytest.raises(GddlabError, match="give one of them"):
        crossed.fixed()
    with pytest.raises(GddlabError, match="no input's level is told"):
        probe(net, SIGMAS, told=[2.0], data=pictures, n=1, stats="rms").diagonal()
    with pytest.raises(GddlabError, match="did you mean"):
        crossed.effects("rmss")
    with pytest.raises(GddlabError, match="told=-1: give a noise level"):
        crossed.fixed(told=-1)
    for part in (crossed.fixed(told=80), crossed.diagonal()):
        with pytest.raises(GddlabError, match="merge the crossed results, then take the part"):
            part.merge(part)
    with pytest.raises(GddlabError, match="crossed differently"):
        crossed.fixed(told=80).join(crossed.fixed(told=1))
    joined = probe(net, [1.0], told="cross", data=pictures, n=1, stats="rms").join(
        probe(net, [1.0], told="cross", data=pictures, n=1, stats="mean")
    )
    with pytest.raises(GddlabError, match="ask before results are joined"):
        joined.diagonal()
    plain = torch.nn.Module()
    plain.layer, plain.forward = nn.Conv2d(1, 1, 1), lambda x, sigma, labels=None: plain.layer(x)
    for told in ("cross", 1.0):
        with pytest.raises(GddlabError, match="give its forward an argument told"):
            probe(plain, SIGMAS, told=told, data=pictures, n=1)


def test_kinds_of_numbers_and_iterators(net, pictures):
    wanted = probe(net, SIGMAS, told=[1.0], data=pictures, n=1, stats="rms").frame
    for told in (np.float32(1), torch.tensor(1.0), np.ones(1), iter([1.0])):
        found = probe(net, iter(SIGMAS), told=told, data=pictures, n=1, stats=iter(["rms"])).frame
        pd.testing.assert_frame_equal(found, wanted)


def test_a_part_lists_its_own_failures(pictures):
    """Values that are not finite at one level told alone are no business of the others."""

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)

        def forward(self, x, level):
            return self.layer(torch.where(level[:, None, None, None] == 1.0, torch.nan, x))[:, :1]

    net = wrap(Fails(), lambda model, x, sigma, labels, told: model(x, told))
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = probe(net, SIGMAS, told="cross", data=pictures, n=4, layers="all", stats="rms")
    assert {b["sigma"] for b in result.fixed(told=1).meta["nonfinite"]} == set(SIGMAS)
    assert result.fixed(told=80).meta["nonfinite"] == []


def test_the_heat_map_of_effects_shows_three_shares(crossed):
    ax = crossed.effects_heatmap("rms")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["input", "level told", "both"]
    mesh = ax.collections[0]
    table = crossed.effects("rms")[["input", "told", "both"]]
    np.testing.assert_allclose(mesh.get_array().reshape(table.shape), table)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
