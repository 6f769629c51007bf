import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.nets import from_edm
from gddlab.probing import ProbeResult, probe
from gddlab.probing.layers import inventory
from tests.probing.networks import tiny

NCSNPP = {
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 128,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
STUDENTS = {
    "cifar10": ({**NCSNPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}, 56_395_523, (84.40, 86.50, 90.46)),
    "ffhq64": ({**NCSNPP, "img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 62_758_787, (83.84, 85.72, 89.70)),
    "imagenet64": (
        {
            "img_resolution": 64,
            "img_channels": 3,
            "label_dim": 1000,
            "model_type": "DhariwalUNet",
            "model_channels": 192,
            "channel_mult": [1, 2, 3, 4],
        },
        295_899_267,
        (78.77, 86.96, 90.17),
    ),
}


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    return probe(tiny(), [80.0, 1.0, 0.01], states="prior", n=3)


@pytest.fixture(scope="module")
def net():
    return tiny()


def layers_of(mask: FreezeMask) -> list[str]:
    return list(dict.fromkeys(n.rpartition(".")[0] for n in mask.frozen))


def candidates(net):
    return {n: layer for n, layer in inventory(net).items() if layer.candidate}


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
    assert select_freeze(result, strategy="gdd-i") == select_freeze(net, strategy="gdd-i")
    assert select_freeze(net, strategy="none").frozen == ()


@pytest.mark.parametrize("freeze", ["low", "high"])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.7])
def test_budget_takes_whole_layers_in_order_of_the_score(net, result, freeze, budget):
    mask = select_freeze(result, strategy="budget", score="rms", freeze=freeze, budget=budget)
    known = candidates(net)
    frozen = layers_of(mask)
    assert set(frozen) <= set(known)
    assert set(mask.frozen) == {f"{n}.{p}" for n in frozen for p in ("weight", "bias")}
    assert mask.fraction <= budget
    assert mask.arguments["budget"] == budget
    assert mask.arguments["reached"] == mask.fraction
    room = budget * mask.n_params - mask.n_frozen
    left = [n for n in known if n not in frozen]
    assert all(known[n].n_params > room for n in left)  # nothing more fits
    column = result.pivot("rms")[80.0]
    assert mask.scores == {n: column[n] for n in known}
    first = min(known, key=lambda n: column[n] if freeze == "low" else -column[n])
    assert first in frozen
    assert mask.probe_hash == result.hash
    mask.apply(net)


def test_low_and_high_differ(result):
    low, high = (select_freeze(result, strategy="budget", score="rms", budget=0.3, freeze=f) for f in ("low", "high"))
    assert not set(low.frozen) & set(high.frozen)


def test_scores_are_read_at_the_nearest_sigma(result):
    mask = select_freeze(result, strategy="budget", score="cosine", at=0.5, budget=0.3)
    assert mask.arguments["sigma"] == 1.0
    column = result.pivot("cosine")[1.0]
    assert all(mask.scores[n] == column[n] for n in mask.scores)


def test_a_blocks_score_counts_for_its_convolutions(net, result):
    mask = select_freeze(result, strategy="budget", score="rel_update", budget=0.5)
    column = result.pivot("rel_update")[80.0]
    assert mask.scores == {n: column[layer.block] for n, layer in candidates(net).items()}
    assert mask.arguments["unscored"] == 0


def test_layers_without_a_score_are_trained_and_counted(net, result):
    mask = select_freeze(result, strategy="budget", score="active_fraction", budget=0.3)
    assert {n.rpartition(".")[2] for n in layers_of(mask)} <= {"conv0", "conv1"}
    assert mask.arguments["unscored"] == len([n for n in candidates(net) if not n.endswith(("conv0", "conv1"))])


def test_ties_go_by_depth(net, result):
    frame = result.frame.copy()
    rms = frame["stat"] == "rms"
    last = list(candidates(net))[-1]
    frame.loc[rms, "value"] = (frame.loc[rms, "layer"] == last).astype(float)
    mask = select_freeze(ProbeResult(frame, result.gram, result.meta), strategy="budget", score="rms", budget=0.02)
    assert layers_of(mask)[0] == next(iter(candidates(net)))


def test_a_mask_comes_from_a_saved_probe_alone(result, tmp_path):
    result.save(tmp_path)
    again = ProbeResult.load(tmp_path)
    for kwargs in ({"strategy": "budget", "score": "rms", "budget": 0.5}, {"strategy": "random", "budget": 0.5}):
        assert select_freeze(again, **kwargs) == select_freeze(result, **kwargs)


def test_random(net):
    a, b = (select_freeze(net, strategy="random", budget=0.5, seed=s) for s in (0, 1))
    assert a.frozen != b.frozen
    assert a == select_freeze(net, strategy="random", budget=0.5, seed=0)
    assert set(layers_of(a)) <= set(candidates(net))
    assert all(0.45 < m.fraction <= 0.5 for m in (a, b))
    rule = select_freeze(net, strategy="gdd-i")
    same = select_freeze(net, strategy="random", mask=rule, seed=3)
    assert same.arguments["budget"] == rule.fraction
    assert same.fraction <= rule.fraction


def test_invert(net, result):
    mask = select_freeze(result, strategy="budget", score="rms", budget=0.4)
    turned = select_freeze(net, strategy="invert", mask=mask)
    assert set(layers_of(turned)) == set(candidates(net)) - set(layers_of(mask))
    assert select_freeze(net, strategy="invert", mask=turned).frozen == mask.frozen


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"strategy": "gdd"}, "did you mean 'gdd-i'"),
        ({"strategy": "budget"}, "needs score=: accepted are rms"),
        ({"strategy": "budget", "score": "rsm"}, "did you mean 'rms'"),
        ({"strategy": "budget", "score": "rms", "budget": 0.0}, "budget=0.0"),
        ({"strategy": "budget", "score": "rms", "budget": 1.0}, "budget=1.0"),
        ({"strategy": "budget", "score": "rms", "budget": 0.99}, r"hold 0\.\d+ of all parameters, give at most 0\.\d+"),
        ({"strategy": "random", "budget": float("nan")}, "budget=nan"),
        ({"strategy": "budget", "score": "rms", "at": 0.0}, "at=0.0"),
        ({"strategy": "budget", "score": "rms", "freeze": "lo"}, "did you mean 'low'"),
        ({"strategy": "budget", "score": "cosine"}, "'cosine' is 1 for every layer at sigma 80"),
        ({"strategy": "invert"}, "give mask="),
        ({"strategy": "gdd-i", "score": "rms"}, "no meaning"),
    ],
)
def test_bad_input_is_refused(result, kwargs, says):
    with pytest.raises(GddlabError, match=says):
        select_freeze(result, **kwargs)


def test_other_refusals(net, result):
    with pytest.raises(GddlabError, match="give the ProbeResult"):
        select_freeze(net, strategy="budget", score="rms")
    with pytest.raises(GddlabError, match="source is a str"):
        select_freeze("digits", strategy="gdd-i")
    mask = select_freeze(net, strategy="gdd-i")
    with pytest.raises(GddlabError, match="no meaning"):
        select_freeze(net, strategy="none", mask=mask)
    with pytest.raises(GddlabError, match="another network"):
        select_freeze(tiny(num_blocks=2), strategy="invert", mask=mask)
    few = probe(net, [1.0], states="prior", n=2, layers="model.enc.16x16_conv", stats="rms")
    with pytest.raises(GddlabError, match="no layer that may be frozen"):
        select_freeze(few, strategy="budget", score="rms")
    bad = result.frame.copy()
    bad["value"] = float("nan")
    with pytest.raises(GddlabError, match="is nan for"):
        select_freeze(ProbeResult(bad, {}, result.meta), strategy="budget", score="rms")
