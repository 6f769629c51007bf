import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gddlab.errors import GddlabError
from gddlab.nets.layers import UNetBlock
from gddlab.probing import select_layers
from gddlab.probing.layers import PRESETS, inventory, named_layers
from tests.probing.networks import tiny, tiny_adm


def names(net, layers):
    return [layer.name for layer in select_layers(net, layers)]


def of_type(net, *types):
    return [n for n, m in net.named_modules() if isinstance(m, types)]


def test_presets(net):
    assert names(net, "conv") == of_type(net, nn.Conv2d)
    assert names(net, "block") == of_type(net, UNetBlock)
    assert names(net, "linear") == of_type(net, nn.Linear)
    assert names(net, "norm") == of_type(net, nn.GroupNorm)
    assert names(net, "all") == of_type(net, nn.Conv2d, UNetBlock, nn.Linear, nn.GroupNorm)
    with_attention = [n for n, m in net.named_modules() if isinstance(m, UNetBlock) and m.num_heads]
    assert names(net, "attention") == [f"{n}.{leaf}" for n in with_attention for leaf in ("qkv", "proj")]


def test_attention_is_told_by_what_lies_side_by_side():
    net = nn.ModuleDict(
        {
            "patch": nn.ModuleDict({"proj": nn.Conv2d(1, 4, 2)}),
            "time_emb_proj": nn.Linear(4, 4),
            "mixer": nn.ModuleDict(
                {"qkv": nn.Conv1d(4, 12, 1), "norm": nn.LayerNorm(4), "proj_out": nn.Conv1d(4, 4, 1)}
            ),
        }
    )
    assert names(net, "attention") == ["mixer.qkv", "mixer.proj_out"]


def test_patterns_lists_and_functions(net):
    convs = names(net, "conv")
    assert names(net, "model.dec.*.conv1") == [n for n in convs if re.fullmatch(r"model\.dec\..*\.conv1", n)]
    assert names(net, "re:qkv|proj$") == [n for n in convs if n.endswith(("qkv", "proj"))]
    assert names(net, ["model.enc.16x16_conv", "*.qkv"]) == [n for n in convs if n.endswith(("16x16_conv", "qkv"))]
    assert names(net, ["attention", "model.map_layer0"]) == ["model.map_layer0", *names(net, "attention")]
    assert names(net, lambda n, m: isinstance(m, nn.Linear) and "map" in n) == ["model.map_layer0", "model.map_layer1"]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("model.enc.16x16_con", "did you mean 'model.enc.16x16_conv'"),
        (["model.enc.16x16_conv", "model.enc.8x8_block0.conv9"], "unknown layer 'model.enc.8x8_block0.conv9': did you"),
        ("re:(", "no regular expression"),
        (lambda n, m: False, "accepts none"),
        ([], "empty list"),
        ([3], "layers: 3 is no name"),
        (3, "layers=3"),
    ],
)
def test_what_matches_nothing_is_refused(net, layers, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        select_layers(net, layers)


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"conv", "all"}))
def test_a_preset_that_a_network_has_none_of_is_refused(preset):
    with pytest.raises(GddlabError, match="has none"):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), preset)


def test_what_is_known_of_a_layer(net):
    layers = inventory(net)
    conv = layers["model.enc.8x8_block0.conv0"]
    assert (conv.block, conv.kind, conv.stage, conv.resolution) == ("model.enc.8x8_block0", "conv0", "enc", 8)
    assert (conv.type, conv.n_params, conv.activated_input) == ("conv", 8 * 16 * 9 + 16, True)
    first, last = layers["model.enc.16x16_conv"], layers["model.dec.16x16_aux_conv"]
    assert (first.kind, first.depth, first.block, first.activated_input) == ("conv", 0, "", False)
    assert (last.depth, last.activated_input) == (len(names(net, "conv")) - 1, True)
    block = layers["model.enc.8x8_block0"]
    assert (block.type, block.kind, block.block) == ("block", "block", block.name)
    assert layers["model.map_layer0"].resolution is None
    assert inventory(tiny_adm())["model.out_conv"].activated_input


class _OwnConv(nn.Module):
    """A convolution without `nn.Conv2d`, as in EDM's own code."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels_in, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


class _StandardizedConv(nn.Module):
    """Its weight is computed each time."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(channels, channels_in, 3, 3))

    @property
    def weight(self):
        return self.raw - self.raw.mean()

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


def test_convolutions_of_other_classes_are_found():
    net = nn.Sequential(_OwnConv(1, 2), _StandardizedConv(2, 2), nn.Embedding(3, 4), nn.Linear(2, 2), nn.Identity())
    assert names(net, "conv") == ["0", "1"]
    assert names(net, "linear") == ["3"]


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_parametrized_convolution_is_one_layer(parametrize):
    net = nn.Sequential(parametrize(nn.Conv2d(1, 4, 3)), nn.SiLU(), nn.Sequential(parametrize(nn.Linear(4, 4))))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    layers = inventory(net)
    assert list(layers) == ["0", "1", "2", "2.0"]
    assert [layer.type for layer in layers.values()] == ["conv", "", "", "linear"]
    assert layers["0"].n_params == sum(p.numel() for p in net[0].parameters())
    assert names(net, "all") == ["0", "2.0"]
    assert "0.parametrizations.weight" in named_layers(net)
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]), k  # spectral norm's power iteration stands still


def test_names_as_a_wrapped_network_gives_them_are_understood():
    net = tiny()
    compiled = torch.compile(net, backend="eager")
    wanted = [n for n, _ in compiled.named_modules() if n.endswith("conv1")]
    assert all(n.startswith("_orig_mod.") for n in wanted)
    assert names(compiled, wanted) == names(net, "*.conv1")
