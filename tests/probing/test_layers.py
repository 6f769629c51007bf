import re

import pytest
from torch import nn

from gddlab.errors import GddlabError
from gddlab.nets.layers import UNetBlock
from gddlab.probing import select_layers
from gddlab.probing.layers import inventory, parameter_table, plain_name
from tests.probing.networks import tiny


def names(net, layers):
    return [layer.name for layer in select_layers(net, layers)]


def test_presets(net):
    convs = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    blocks = [n for n, m in net.named_modules() if isinstance(m, UNetBlock)]
    assert names(net, "conv") == convs
    assert names(net, "block") == blocks
    assert set(names(net, "all")) == {*convs, *blocks}


def test_patterns_lists_and_functions(net):
    convs = names(net, "conv")
    assert names(net, "model.dec.*.conv1") == [n for n in convs if re.fullmatch(r"model\.dec\..*\.conv1", n)]
    assert names(net, "re:qkv|proj$") == [n for n in convs if n.endswith(("qkv", "proj"))]
    assert names(net, ["model.enc.16x16_conv", "*.qkv"]) == [n for n in convs if n.endswith(("16x16_conv", "qkv"))]
    assert names(net, lambda n, m: isinstance(m, nn.Linear) and "map" in n) == ["model.map_layer0", "model.map_layer1"]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("model.enc.16x16_con", "did you mean 'model.enc.16x16_conv'"),
        (["model.enc.16x16_conv", "model.enc.8x8_block0.conv9"], "unknown layer 'model.enc.8x8_block0.conv9': did you"),
        ("re:(", "no regular expression"),
        (lambda n, m: False, "accepts none"),
        ([], "empty list"),
        ([3], "layer 3 is no name"),
        (3, "layers=3"),
    ],
)
def test_what_matches_nothing_is_refused(net, layers, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        select_layers(net, layers)


def test_a_network_without_blocks_has_none():
    with pytest.raises(GddlabError, match="has none"):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), "block")


def test_what_is_known_of_a_layer(net):
    layers = inventory(net)
    conv = layers["model.enc.8x8_block0.conv0"]
    assert (conv.block, conv.kind, conv.stage, conv.resolution) == ("model.enc.8x8_block0", "conv0", "enc", 8)
    assert conv.n_params == 8 * 16 * 9 + 16
    assert conv.candidate
    first, last = layers["model.enc.16x16_conv"], layers["model.dec.16x16_aux_conv"]
    assert (first.kind, first.depth, first.block) == ("conv", 0, "")
    assert last.depth == len(names(net, "conv")) - 1
    assert not any(layers[n].candidate for n in layers if "aux" in n or n == first.name)
    assert layers["model.map_layer0"].resolution is None


def test_of_an_unknown_network_all_but_first_and_last_convolution_may_be_frozen():
    net = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(4)))
    assert [n for n, layer in inventory(net).items() if layer.candidate] == ["1", "2"]


def test_wrappers_do_not_change_names():
    assert plain_name("module._orig_mod.model.enc.a.weight") == "model.enc.a.weight"
    assert plain_name("_orig_mod.module.model._orig_mod.b") == "model.b"
    net = tiny(augment_dim=9)
    assert not any("map_augment" in n for n, _ in parameter_table(net))
    assert parameter_table(nn.ModuleDict({"module": net})) == parameter_table(tiny())
