"""Folding BatchNorm: outputs stay, and nothing is folded that something else reads."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.pretrained.folding import fold_batchnorm, probe_image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm


def lively(net: nn.Module) -> nn.Module:
    """Eval mode, and BatchNorm with statistics that matter."""
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.3)
    return net.eval()


def norms(net: nn.Module) -> list[str]:
    return [n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "hrnet_w18_small"])
def test_timm_networks_keep_their_outputs(name: str) -> None:
    net = lively(timm.create_model(name, num_classes=4))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        folded = fold_batchnorm(net, probe_image(64, like=x))
        assert not norms(folded)
        assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_norms_before_convolutions_stay() -> None:
    """resnetv2 normalises sums before it convolves; only norms after a block's first convolution can go."""
    net = lively(timm.create_model("resnetv2_18", num_classes=4))
    before, x = norms(net), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        fold_batchnorm(net, probe_image(64, like=x))
        left = norms(net)
        assert 0 < len(left) < len(before)
        assert "stages.0.blocks.0.norm1" in left
        assert "stages.0.blocks.0.norm2" not in left
        assert_close(net(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Net(nn.Module):
    """A convolution and a BatchNorm in the order that a fold by names would take."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=kind != "biasless")
        self.bn = nn.BatchNorm2d(3, affine=kind != "plain")

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.kind == "between":
            return self.bn(F.leaky_relu(self.conv(x)))
        y = self.conv(x)
        out: Tensor = self.bn(y)
        match self.kind:
            case "two readers":
                return out + y
            case "returned":
                return [y, out]
            case "twice":
                return out + self.conv(x.flip(0))
            case "shared norm":
                return out + self.bn(x)
            case "shared weight":
                return out + F.conv2d(x, self.conv.weight.transpose(0, 1), padding=1)
        return out


@pytest.mark.parametrize("kind", ["", "biasless", "plain"])
def test_a_pair_is_folded(kind: str) -> None:
    net = lively(Net(kind)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = net(x)
    fold_batchnorm(net, x)
    assert not norms(net)
    assert_close(net(x), expected)


@pytest.mark.parametrize("kind", ["two readers", "returned", "twice", "between", "shared norm", "shared weight"])
def test_what_something_else_reads_is_not_folded(kind: str) -> None:
    net = lively(Net(kind))
    x, before = torch.randn(2, 3, 8, 8), copy.deepcopy(net.state_dict())
    expected = net(x)
    fold_batchnorm(net, x)
    assert norms(net) == ["bn"]
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert before.keys() == after.keys()
    assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["two readers", "twice", "between", "shared norm"])
def test_one_pair_that_must_stay_does_not_hold_back_the_others(kind: str) -> None:
    net = lively(nn.Sequential(Net(""), Net(kind))).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = net(x)
    fold_batchnorm(net, x)
    assert norms(net) == ["1.bn"]
    assert_close(net(x), expected)


def test_activations_inside_a_norm_and_shared_modules() -> None:
    """A norm that two containers hold is replaced in both; timm's BatchNormAct2d leaves its activation behind."""
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.ReLU6)
    conv = nn.Conv2d(3, 4, 1)
    net = nn.ModuleDict({"used": nn.Sequential(conv, norm), "again": nn.ModuleList([norm])})
    lively(net)
    x = torch.randn(2, 3, 8, 8) * 5
    expected = net["used"](x)
    fold_batchnorm(net, x, run=net["used"])
    assert not norms(net)
    assert_close(net["used"](x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(net["used"][1], nn.ReLU6)  # type: ignore[index]


def test_the_global_generator_is_not_touched() -> None:
    net, before = Net("").eval(), torch.get_rng_state()
    fold_batchnorm(net, probe_image(8, like=torch.zeros(1)))
    assert torch.equal(torch.get_rng_state(), before)
