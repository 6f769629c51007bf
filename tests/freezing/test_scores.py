import math

import numpy as np
import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.freezing import select_freeze
from gddlab.freezing.candidates import Network, choose
from gddlab.freezing.select import score_units
from tests.freezing.conftest import convs, with_values


def scores_of(result, score, at=80.0, candidates="conv", granularity="layer"):
    network = Network(result)
    units = choose(network, candidates, ("first", "last"), granularity)
    return score_units(result, network, units, score, at)[0]


def test_a_statistic_at_the_nearest_sigma(net, result):
    for at, sigma in ((80.0, 80.0), (9.0, 80.0), (8.0, 1.0), (1e-9, 0.01)):
        column = result.pivot("rms")[sigma]
        assert scores_of(result, "rms", at) == {n: column[n] for n in convs(net)}


def test_sigmas_without_the_statistic_are_passed_over(result):
    frame = result.frame[(result.frame["stat"] != "rms") | (result.frame["sigma"] != 80.0)]
    assert scores_of(result.copy(frame=frame), "rms") == scores_of(result, "rms", at=1.0)


def test_a_blocks_statistic_counts_for_its_layers(net, result):
    column = result.pivot("rel_update")[80.0]
    expected = {n: column[layer.block] for n, layer in convs(net).items() if layer.block in column.index}
    assert scores_of(result, "rel_update") == expected
    assert expected


def test_a_block_takes_its_own_value_or_the_mean_of_its_layers(net, result):
    scores = scores_of(result, "rel_update", granularity="block")
    column = result.pivot("rel_update")[80.0]
    assert scores == {n: column[n] for n in column.index}
    means = scores_of(result, "rms", granularity="block")
    column = result.pivot("rms")[80.0]
    inside = {n: layer for n, layer in convs(net).items() if layer.block == "model.enc.8x8_block0"}
    expected = np.average([column[n] for n in inside], weights=[layer.n_params for layer in inside.values()])
    assert means["model.enc.8x8_block0"] == pytest.approx(expected)
    assert means["model.enc.8x8_aux_residual"] == column["model.enc.8x8_aux_residual"]


def test_combinations_are_weighted_means_of_ranks(net, result):
    names = list(convs(net))
    x = {n: float(i) for i, n in enumerate(names)}
    y = {n: float((7 * i) % len(names)) ** 3 for i, n in enumerate(names)}
    made = with_values(with_values(result, "rms", x), "std", y)
    scores = scores_of(made, {"rms": 3, "std": -1})
    ranks = pd.DataFrame({"x": x, "y": y}).rank().sub(1) / (len(names) - 1)
    expected = 0.75 * ranks["x"] + 0.25 * (1 - ranks["y"])
    assert scores == pytest.approx(expected.to_dict())
    assert min(scores_of(made, {"rms": 1}).values()) == 0
    assert max(scores_of(made, {"rms": 1}).values()) == 1


def test_a_combination_is_of_layers_that_have_all(net, result):
    scores = scores_of(result, {"rms": 1, "active_fraction": 1})
    assert set(scores) == set(scores_of(result, "active_fraction"))
    assert set(scores) < set(convs(net))
    half = with_values(result, "std", {n: i for i, n in enumerate(convs(net)) if n.endswith("qkv")})
    with pytest.raises(GddlabError, match="no layer that may be frozen has all of std, active_fraction"):
        scores_of(half, {"std": 1, "active_fraction": 1})


def test_a_function_of_the_result(net, result):
    assert scores_of(result, lambda r: dict.fromkeys(convs(net), 1)) == dict.fromkeys(convs(net), 1.0)
    assert scores_of(result, lambda r: r.pivot("rms")[1.0]) == scores_of(result, "rms", at=1.0)  # a Series
    block = scores_of(result, lambda r: {"model.enc.8x8_block0": 2.0})
    assert {n.rpartition(".")[0] for n in block} == {"model.enc.8x8_block0"}


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ("rsm", "unknown statistic of this result 'rsm': did you mean 'rms'"),
        ({"rsm": 1}, "did you mean 'rms'"),
        ({}, "empty mapping: give weights of rms"),
        ({"rms": 0}, "weight 0 of score 'rms'"),
        ({"rms": math.nan}, "weight nan of score 'rms'"),
        (3, "score=3: give a statistic's name"),
        ("correlation", "score 'correlation' at sigma 80 is 1 for every layer"),
        (lambda r: [1], "returned a list: return {layer: number}"),
        (lambda r: {"model.enc.8x8_block": 1}, "did you mean 'model.enc.8x8_block0'"),
        (lambda r: {"model.enc.8x8_block0": "1"}, "returned '1' for model.enc.8x8_block0"),
        (
            lambda r: {"model.enc.8x8_block0.conv0": math.inf},
            "the function's score is inf for model.enc.8x8_block0.conv0",
        ),
        (lambda r: {"model.enc.16x16_conv": 1}, "says nothing of the 34 layers that may be frozen"),
    ],
)
def test_bad_scores(result, score, says):
    with pytest.raises(GddlabError, match=says):
        select_freeze(result, strategy="budget", score=score)


def test_scores_that_are_not_finite_are_refused_by_name(net, result):
    values = dict.fromkeys(convs(net), 1.0) | {"model.enc.8x8_block0.qkv": math.nan}
    for score in ("rms", {"rms": 1}):
        with pytest.raises(
            GddlabError, match=r"'rms' at sigma 80 is nan for model.enc.8x8_block0.qkv: .* always_train"
        ):
            select_freeze(with_values(result, "rms", values), strategy="budget", score=score)
    values = {n: float(i) for i, n in enumerate(convs(net))} | {"model.enc.8x8_block0.qkv": math.inf}
    made = with_values(result, "rms", values)
    mask = select_freeze(made, strategy="budget", score="rms", budget=0.5, always_train=["first", "last", "*.qkv"])
    assert mask.fraction > 0.4


@pytest.mark.parametrize("at", [0.0, -1.0, math.nan, math.inf, True, "80"])
def test_bad_sigma(result, at):
    with pytest.raises(GddlabError, match=r"at=.*: give a noise level above 0"):
        scores_of(result, "rms", at)
