import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import select_freeze
from gddlab.nets import from_edm
from tests.freezing.conftest import convs, frozen_layers
from tests.freezing.students import STUDENTS


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
