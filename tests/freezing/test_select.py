import math
import re
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import controls, select_freeze
from gddlab.nets import from_edm
from gddlab.probing import ProbeResult
from tests.freezing.conftest import convs, frozen_layers, with_values
from tests.freezing.students import STUDENTS
from tests.probing.networks import tiny


def spread(net) -> dict[str, float]:
    """Distinct values in an order that is not that of the network."""
    names = list(convs(net))
    return {n: float((5 * i) % len(names)) for i, n in enumerate(names)}


@pytest.mark.parametrize("freeze", ["low", "high"])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.7])
def test_budget_takes_whole_layers_in_order_of_the_score(net, result, freeze, budget):
    mask = select_freeze(result, strategy="budget", score="rms", freeze=freeze, budget=budget)
    known = convs(net)
    frozen = frozen_layers(mask)
    assert set(frozen) <= set(known)
    assert set(mask.frozen) == {f"{n}.{p}" for n in frozen for p in ("weight", "bias")}
    assert mask.fraction <= budget
    assert mask.arguments["budget"] == budget
    assert mask.arguments["reached"] == mask.fraction
    column = result.pivot("rms")[80.0]
    assert mask.scores == {n: column[n] for n in known}
    room, expected = math.floor(budget * mask.n_params), []
    for n in sorted(known, key=lambda n: column[n], reverse=freeze == "high"):
        if known[n].n_params <= room:
            expected.append(n)
            room -= known[n].n_params
    assert set(frozen) == set(expected)
    assert mask.probe_hash == result.hash
    mask.apply(net)


def test_what_freezes_nothing_is_refused(net, result):
    for source, options in (
        (result, {"strategy": "budget", "score": "rms", "budget": 1e-5}),
        (result, {"strategy": "per-resolution", "score": "rms", "budget": 1e-5}),
        (net, {"strategy": "random", "budget": 1e-5}),
    ):
        with pytest.raises(GddlabError, match=r"budget=1e-05 freezes nothing: the smallest candidate takes 0\."):
            select_freeze(source, **options)
    with pytest.raises(GddlabError, match=r'strategy="gdd-i" goes by what layers are there for, known of 0.0%'):
        select_freeze(torch.nn.Linear(2, 2), strategy="gdd-i")
    none = select_freeze(result, strategy="per-resolution", score="rms", budget={16: 0})
    assert none.frozen == ()


def test_low_and_high_differ(result):
    low, high = (select_freeze(result, strategy="budget", score="rms", budget=0.3, freeze=f) for f in ("low", "high"))
    assert not set(low.frozen) & set(high.frozen)


def test_layers_without_a_score_are_trained_and_counted(net, result):
    mask = select_freeze(result, strategy="budget", score="active_fraction", budget=0.3)
    assert {n.rpartition(".")[2] for n in frozen_layers(mask)} <= {"conv0", "conv1"}
    assert mask.arguments["unscored"] == len([n for n in convs(net) if not n.endswith(("conv0", "conv1"))])


@pytest.mark.parametrize(("freeze", "order"), [("low", (0, 1, 2)), ("high", (2, 1, 0))])
def test_ties_go_by_depth(net, result, freeze, order):
    names = list(convs(net))
    made = with_values(result, "rms", {n: float(i % 3) for i, n in enumerate(names)})
    expected = [n for k in order for n in names[k::3]]
    for count in (1, 5, len(names) // 2):
        budget = (count + 0.5) / len(names)
        mask = select_freeze(made, strategy="budget", score="rms", budget=budget, unit="layers", freeze=freeze)
        assert set(frozen_layers(mask)) == set(expected[:count])


def test_a_share_of_the_layers(net, result):
    made = with_values(result, "rms", values := spread(net))
    mask = select_freeze(made, strategy="budget", score="rms", budget=0.5, unit="layers")
    n = len(values)
    assert {values[name] for name in frozen_layers(mask)} == set(range(n // 2))
    assert mask.arguments["reached"] == (n // 2) / n
    assert mask.arguments["reached"] != mask.fraction
    some = select_freeze(net, strategy="random", budget=0.25, unit="layers")
    assert len(frozen_layers(some)) == n // 4


def test_blocks_are_frozen_together(net, result):
    mask = select_freeze(result, strategy="budget", score="rel_update", budget=0.5, granularity="block")
    frozen = set(frozen_layers(mask))
    for block in {layer.block for layer in convs(net).values()} - {""}:
        inside = {n for n, layer in convs(net).items() if layer.block == block}
        assert inside <= frozen or not inside & frozen
    assert mask.arguments["unscored"] == 1  # aux_residual lies in no block
    assert set(mask.scores) == {layer.block for layer in convs(net).values()} - {""}


def test_tensors_are_frozen_apart(net, result):
    layer = "model.enc.8x8_block0.conv0"
    made = with_values(result, "rms", {n: float(n != layer) for n in convs(net)})
    sizes = {n: p.numel() for n, p in net.get_submodule(layer).named_parameters()}
    budget = (sizes["bias"] + 1) / sum(p.numel() for p in net.parameters())
    assert sizes["weight"] > sizes["bias"] + 1
    mask = select_freeze(made, strategy="budget", score="rms", budget=budget, granularity="tensor")
    assert mask.frozen == (f"{layer}.bias",)


def test_candidates_and_always_train(net, result):
    options = {"strategy": "random", "budget": 0.05, "candidates": "linear", "always_train": ["*.map_layer*"]}
    mask = select_freeze(net, **options)
    assert {n.rpartition(".")[2] for n in frozen_layers(mask)} == {"affine"}
    assert select_freeze(result, **options) == mask
    assert mask.arguments["candidates"] == "linear"
    named = select_freeze(net, strategy="random", budget=0.01, candidates=lambda n, m: isinstance(m, nn.GroupNorm))
    assert {n.rpartition(".")[2] for n in frozen_layers(named)} <= {"norm0", "norm1", "norm2", "16x16_aux_norm"}
    one_shot = (n for n in ("first", "last"))
    assert select_freeze(net, strategy="random", budget=0.3, always_train=one_shot) == select_freeze(
        net, strategy="random", budget=0.3
    )


@pytest.mark.parametrize("freeze", ["low", "high"])
def test_threshold(net, result, freeze):
    made = with_values(result, "rms", values := spread(net))
    mask = select_freeze(made, strategy="threshold", score="rms", threshold=10, freeze=freeze)
    chosen = {n for n, v in values.items() if (v <= 10 if freeze == "low" else v >= 10)}
    assert set(frozen_layers(mask)) == chosen
    assert mask.arguments["threshold"] == 10
    assert mask.arguments["reached"] == mask.fraction
    with pytest.raises(GddlabError, match=r"threshold=.* freezes nothing: scores are 0 to .*, give one among them"):
        select_freeze(made, strategy="threshold", score="rms", threshold=-1 if freeze == "low" else 1e9, freeze=freeze)


def test_each_resolution_has_its_budget(net, result):
    made = with_values(result, "rms", values := spread(net))
    with pytest.raises(GddlabError, match="at least one resolution"):
        select_freeze(made, strategy="per-resolution", score="rms", budget={})
    mask = select_freeze(made, strategy="per-resolution", score="rms", budget=0.5)
    frozen = set(frozen_layers(mask))
    assert set(mask.arguments["reached"]) == {"16", "8"}
    for resolution in (16, 8):
        here = {n: layer.n_params for n, layer in convs(net).items() if layer.resolution == resolution}
        room, expected = sum(here.values()) // 2, set()
        for n in sorted(here, key=lambda n: values[n]):
            if here[n] <= room:
                expected.add(n)
                room -= here[n]
        assert frozen & set(here) == expected
        share = sum(here[n] for n in expected) / sum(here.values())
        assert mask.arguments["reached"][str(resolution)] == pytest.approx(share)
    one = select_freeze(made, strategy="per-resolution", score="rms", budget={8: 1.0}, freeze="high")
    assert set(frozen_layers(one)) == {n for n, layer in convs(net).items() if layer.resolution == 8}
    assert one.arguments["reached"] == {"16": 0.0, "8": 1.0}
    assert one.arguments["unplaced"] == 0
    again = select_freeze(made, strategy="per-resolution", score="rms", budget=one.arguments["budget"], freeze="high")
    assert again == one
    count = select_freeze(made, strategy="per-resolution", score="rms", budget=0.5, unit="layers")
    assert all(0.4 < v <= 0.5 for v in count.arguments["reached"].values())


def test_resolutions_that_only_the_probe_knows(result):
    meta = {**result.meta, "layers": [{**layer, "resolution": None} for layer in result.meta["layers"]]}
    renamed = ProbeResult(result.frame, _renamed(meta))
    with pytest.raises(GddlabError, match="no candidate has a resolution"):
        select_freeze(renamed, strategy="per-resolution", score=_by_order)
    for layer in renamed.meta["layers"]:
        layer["resolution"] = 4 if ".enc" in layer["name"] else None
    mask = select_freeze(renamed, strategy="per-resolution", score=_by_order, budget=1.0)
    assert mask.frozen and all(".enc" in n for n in mask.frozen)
    assert mask.arguments["unplaced"] == len([n for n in mask.candidates if ".enc" not in n])


def _renamed(meta: dict) -> dict:
    """Names without resolutions."""

    def plain(name: str) -> str:
        return re.sub(r"(\d+)x\d+_", r"r\1_", name)

    layers = [{**layer, "name": plain(layer["name"]), "block": plain(layer["block"])} for layer in meta["layers"]]
    return {**meta, "layers": layers, "parameters": [[plain(n), shape] for n, shape in meta["parameters"]]}


def _by_order(result: ProbeResult) -> dict[str, float]:
    return {layer["name"]: i for i, layer in enumerate(result.meta["layers"])}


def test_a_mask_comes_from_a_saved_probe_alone(result, tmp_path):
    result.save(tmp_path)
    again = ProbeResult.load(tmp_path)
    for kwargs in ({"strategy": "budget", "score": "rms", "budget": 0.5}, {"strategy": "random", "budget": 0.5}):
        assert select_freeze(again, **kwargs) == select_freeze(result, **kwargs)


def test_random(net, rule):
    a, b = (select_freeze(net, strategy="random", budget=0.5, seed=s) for s in (0, 1))
    assert a.frozen != b.frozen
    assert a == select_freeze(net, strategy="random", budget=0.5, seed=0)
    assert set(frozen_layers(a)) <= set(convs(net))
    assert all(0.45 < m.fraction <= 0.5 for m in (a, b))
    same = select_freeze(net, strategy="random", mask=rule, seed=3)
    assert same.arguments["budget"] == rule.fraction
    assert same.fraction <= rule.fraction


def test_random_keeps_what_the_mask_was_chosen_among(net):
    linear = select_freeze(net, strategy="random", budget=0.05, candidates="linear", granularity="tensor")
    other = select_freeze(net, strategy="random", mask=linear, seed=1)
    assert other.candidates == linear.candidates
    assert any(n.endswith(".bias") and n.replace(".bias", ".weight") not in other.frozen for n in other.frozen)
    moved = select_freeze(net, strategy="random", mask=linear, candidates="conv")
    assert set(frozen_layers(moved)) <= set(convs(net))


def test_invert(net, result, rule):
    for granularity in ("layer", "tensor"):
        mask = select_freeze(result, strategy="budget", score="rms", budget=0.4, granularity=granularity)
        turned = select_freeze(net, strategy="invert", mask=mask)
        among = [f"{n}.{p}" for n in convs(net) for p in ("weight", "bias")]
        assert set(turned.frozen) == set(among) - set(mask.frozen)
        assert select_freeze(net, strategy="invert", mask=turned).frozen == mask.frozen
    assert {n.rpartition(".")[2] for n in frozen_layers(select_freeze(net, strategy="invert", mask=rule))} == {
        "skip",
        "qkv",
        "8x8_aux_residual",
    }
    blocks = select_freeze(net, strategy="invert", mask=rule, candidates="block")
    assert {n.rpartition(".")[2] for n in frozen_layers(blocks)} >= {"norm0", "affine", "skip"}
    assert not set(blocks.frozen) & set(rule.frozen)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"strategy": "gdd"}, "did you mean 'gdd-i'"),
        ({"strategy": 3}, "unknown strategy 3: accepted: gdd-i, "),
        ({"strategy": "budget"}, "needs score=: accepted are rms"),
        ({"strategy": "budget", "score": "rms", "budget": 0.0}, "budget=0.0"),
        ({"strategy": "budget", "score": "rms", "budget": 1.0}, "budget=1.0"),
        ({"strategy": "budget", "score": "rms", "budget": {8: 0.5}}, "budget={8: 0.5}: give a share of all parameters"),
        ({"strategy": "budget", "score": "rms", "budget": 0.99}, r"hold 0\.\d+ of all parameters, give at most 0\.\d+"),
        ({"strategy": "budget", "score": "active_fraction", "unit": "layers"}, "of all candidates, give at most"),
        ({"strategy": "random", "budget": float("nan")}, "budget=nan"),
        ({"strategy": "random", "unit": "layer"}, "unknown unit 'layer': did you mean 'layers'"),
        ({"strategy": "random", "seed": 0.5}, "seed=0.5: input should be a valid integer"),
        ({"strategy": "budget", "score": "rms", "at": 0.0}, "at=0.0"),
        ({"strategy": "budget", "score": len, "at": 1.0}, "at=1.0 has no meaning for a score function"),
        ({"strategy": "budget", "score": "rms", "freeze": "lo"}, "did you mean 'low'"),
        ({"strategy": "budget", "score": "rms", "granularity": "layers"}, "did you mean 'layer'"),
        (
            {"strategy": "per-resolution", "score": "rms", "budget": {32: 0.5}},
            "unknown resolution in budget 32: accepted: 16, 8",
        ),
        ({"strategy": "per-resolution", "score": "rms", "budget": {8: 1.5}}, "budget 1.5 at resolution 8"),
        (
            {"strategy": "per-resolution", "score": "active_fraction", "budget": 0.999},
            "of the candidates at resolution 16",
        ),
        ({"strategy": "threshold", "score": "rms"}, "threshold=None: give a number"),
        (
            {"strategy": "budget", "score": "rms", "at": 1e9},
            r"at=1e\+09: the probe measured sigma .* to .*, give",
        ),
        ({"strategy": "threshold", "score": "rms", "threshold": float("nan")}, "threshold=nan"),
        ({"strategy": "invert"}, "give mask="),
        ({"strategy": "invert", "mask": "mask.json"}, "mask is a str: give a FreezeMask"),
    ],
)
def test_bad_input_is_refused(result, kwargs, says):
    with pytest.raises(GddlabError, match=says):
        select_freeze(result, **kwargs)


@pytest.mark.parametrize(
    ("strategy", "option", "says"),
    [
        (
            "gdd-i",
            {"score": "rms"},
            'score=\'rms\' has no meaning for strategy="gdd-i": omit it, or take "budget" or',
        ),
        ("none", {"budget": 0.85}, "budget=0.85 has no meaning"),
        ("gdd-i", {"candidates": "linear"}, "candidates='linear' has no meaning"),
        ("norms-only", {"always_train": ()}, r"always_train=\[\] has no meaning"),
        ("all-conv", {"granularity": "block"}, "granularity='block' has no meaning"),
        ("budget", {"threshold": 1.0}, 'threshold=1.0 has no meaning .* take "threshold"'),
        ("threshold", {"budget": 0.5}, "budget=0.5 has no meaning"),
        ("threshold", {"unit": "layers"}, "unit='layers' has no meaning"),
        ("random", {"freeze": "high"}, "freeze='high' has no meaning"),
        ("invert", {"seed": 1}, "seed=1 has no meaning"),
        (lambda r: [], {"budget": 0.5}, "budget=0.5 has no meaning for a function as strategy"),
    ],
)
def test_options_that_a_strategy_does_not_use_are_refused(result, strategy, option, says):
    with pytest.raises(GddlabError, match=says):
        select_freeze(result, strategy=strategy, **option)


def test_none_counts_as_not_given(net, rule):
    assert select_freeze(net, strategy="gdd-i", score=None, candidates=None, mask=None, threshold=None) == rule
    nothing = dict.fromkeys(("at", "freeze", "budget", "unit", "granularity", "always_train", "seed"))
    kwargs = {"strategy": "random", "budget": 0.5}
    assert select_freeze(net, **nothing | kwargs) == select_freeze(net, **kwargs)


def test_other_refusals(net, rule):
    for strategy in ("budget", "threshold", "per-resolution"):
        with pytest.raises(GddlabError, match="give the result of a probe"):
            select_freeze(net, strategy=strategy, score="rms")
    with pytest.raises(GddlabError, match="source is a str"):
        select_freeze("digits", strategy="gdd-i")
    with pytest.raises(GddlabError, match="no meaning"):
        select_freeze(net, strategy="none", mask=rule)
    with pytest.raises(GddlabError, match="another network"):
        select_freeze(tiny(num_blocks=2), strategy="invert", mask=rule)
    for option in ({"budget": 0.5}, {"unit": "layers"}, {"granularity": "block"}):
        with pytest.raises(GddlabError, match=r"and mask=: the mask's"):
            select_freeze(net, strategy="random", mask=rule, **option)
    for option in ({"budget": 0.85}, {"always_train": ("first", "last")}):  # the defaults, but given
        with pytest.raises(GddlabError, match=r"and mask=: the mask's"):
            select_freeze(net, strategy="random", mask=rule, **option)
    with pytest.raises(TypeError, match="strategy"):
        select_freeze(net)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.floats(0.001, 0.7),
    freeze=st.sampled_from(["low", "high"]),
    unit=st.sampled_from(["params", "layers"]),
    granularity=st.sampled_from(["layer", "block", "tensor"]),
)
def test_budgets_are_never_exceeded(result, seed, budget, freeze, unit, granularity):
    def score(_):
        return {n: float(zlib.crc32(f"{seed} {n}".encode()) % 7) for n in convs(tiny())}

    options = {"budget": budget, "unit": unit, "granularity": granularity}
    refused = ""
    try:
        masks = [
            select_freeze(result, strategy="budget", score=score, freeze=freeze, **options),
            select_freeze(result, strategy="random", seed=seed, **options),
        ]
        each = select_freeze(result, strategy="per-resolution", score=score, freeze=freeze, **options)
    except GddlabError as e:  # all candidates are larger
        refused = str(e)
    if refused:
        assert float(re.search(r"the smallest candidate takes ([\d.e-]+),", refused)[1]) >= budget * 0.99
        return
    for mask in masks:
        assert 0 <= mask.arguments["reached"] <= budget
        assert unit == "layers" or mask.arguments["reached"] == mask.fraction
        for other in controls(mask, seeds=[seed]).values() if mask.frozen else ():
            assert other.n_frozen <= mask.n_frozen
    assert all(share <= budget for share in each.arguments["reached"].values())


@pytest.mark.parametrize("name", STUDENTS)
def test_published_shares(name):
    kwargs, total, shares = STUDENTS[name]
    with torch.device("meta"):
        student = from_edm("OneStepPrecond", **kwargs)
    masks = [select_freeze(student, strategy=s) for s in ("gdd-i", "gdd-i-2", "gdd-i-3")]
    assert masks[0].n_params == total
    assert [round(100 * m.fraction, 2) for m in masks] == list(shares)
    trained = {n.rpartition(".")[0] for n, _ in masks[0].trainable(student)}
    kinds = {n.rpartition(".")[2] for n in trained}
    assert {"skip", "qkv", "affine", "norm0", "norm1", "norm2", "map_layer0", "map_layer1"} <= kinds
    assert not kinds & {"conv0", "conv1", "proj"}
    ends = [n for n in trained if n.endswith(("_conv", "aux_residual"))]  # first, last, auxiliary
    assert len(ends) == len([n for n, _ in student.named_modules() if n.endswith(("_conv", "aux_residual"))])


def test_rules_need_names_only(net, result):
    for strategy in ("gdd-i", "norms-only", "all-conv", "none"):
        assert select_freeze(result, strategy=strategy) == select_freeze(net, strategy=strategy)
    assert select_freeze(net, strategy="none").frozen == ()


def test_all_conv(net, result):
    assert frozen_layers(select_freeze(net, strategy="all-conv")) == list(convs(net))
    every = select_freeze(net, strategy="all-conv", always_train=())
    assert len(frozen_layers(every)) == len(convs(net)) + 2
    inside = select_freeze(result, strategy="all-conv", candidates="model.enc.8x8_block0")
    assert [n.rpartition(".")[2] for n in frozen_layers(inside)] == ["conv0", "conv1", "skip", "qkv", "proj"]
    with pytest.raises(GddlabError, match="no candidate is a convolution"):
        select_freeze(net, strategy="all-conv", candidates="linear")


def test_norms_only(net):
    mask = select_freeze(net, strategy="norms-only")
    trained = {n.rpartition(".")[0] for n, _ in mask.trainable(net)}
    assert trained == {n for n, m in net.named_modules() if isinstance(m, nn.GroupNorm)}
    with pytest.raises(GddlabError, match="no norm layer with parameters"):
        select_freeze(nn.Conv2d(1, 1, 1), strategy="norms-only")


def test_a_function_names_parameters_or_layers(net, result):
    def decoder(source):
        return ["model.map_layer0.bias", "model.dec.16x16_block0", "model.enc.16x16_conv"]

    for source in (net, result):
        mask = select_freeze(source, strategy=decoder)
        starts = ("model.map_layer0.bias", "model.dec.16x16_block0.", "model.enc.16x16_conv.")
        assert list(mask.frozen) == [n for n, _ in net.named_parameters() if n.startswith(starts)]
        assert mask.strategy == "decoder"
    strong = select_freeze(result, strategy=lambda r: r.pivot("rms")[80.0].nlargest(3).index)
    assert len(frozen_layers(strong)) == 3
    assert select_freeze(net, strategy=lambda _: "model.dec").n_frozen == sum(
        p.numel() for p in net.model.dec.parameters()
    )
    assert select_freeze(net, strategy=lambda _: []).frozen == ()


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (
            ["model.dec.16x16_blok0"],
            "unknown parameter or layer of the strategy 'model.dec.16x16_blok0': did you mean 'model.dec.16x16_block0'",
        ),
        (["model.map_layer0.weigh"], "'model.map_layer0.weight'"),
        ([3], "unknown parameter or layer of the strategy 3"),
        (None, "the strategy returned a NoneType: return names"),
    ],
)
def test_bad_functions(net, returned, says):
    with pytest.raises(GddlabError, match=says):
        select_freeze(net, strategy=lambda _: returned)
