"""Names of layers, from a network, from its probe and from a parameter table."""

import re

import pytest
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing.candidates import Network
from gddlab.probing.layers import inventory, parameter_table, select_layers
from tests.freezing.conftest import convs


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.body = nn.ModuleDict({"norm": nn.LayerNorm(4), "to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})
        self.scale = nn.Parameter(nn.init.ones_(self.embed.weight.new_empty(1)))
        self.head = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    "selection",
    [
        "conv",
        "block",
        "attention",
        "norm",
        "linear",
        "all",
        "*.conv0",
        "re:dec.*norm",
        ["conv", "*.affine"],
        "model.enc",
    ],
)
def test_the_same_layers_as_in_probing(net, result, selection):
    expected = [layer.name for layer in select_layers(net, selection)]
    own = [n for n in expected if any(True for _ in net.get_submodule(n).parameters())]
    for source in (net, result):
        assert Network(source).select(selection, "candidates") == own


def test_functions_need_the_network(net, result):
    def small(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    assert Network(net).select(small, "candidates") == [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    with pytest.raises(GddlabError, match="candidates is a function of modules: give the network as source"):
        Network(result).select(small, "candidates")


def test_types_blocks_and_resolutions(net, result):
    for source in (net, result):
        network = Network(source)
        for name, layer in inventory(net).items():
            if name in network.names and layer.type:
                seen = (network.type(name), network.block(name), network.resolution(name))
                assert seen == (layer.type, layer.block, layer.resolution)
    table = Network(parameter_table(net))
    ends = ["model.enc.16x16_conv", "model.dec.16x16_aux_conv"]
    assert [n for n in table.own if table.type(n) == "conv"] == [ends[0], *convs(net), ends[1]]


def test_other_networks():
    net = Mixer()
    network = Network(net)
    assert network.n_params == sum(p.numel() for p in net.parameters())
    assert network.names == ["embed", "body", "body.norm", "body.to_q", "body.to_v", "head"]
    assert [network.type(n) for n in network.names] == ["", "", "norm", "linear", "linear", "conv"]
    assert network.select("attention", "candidates") == ["body.to_q", "body.to_v"]
    assert len(network.own["head"]) == 3  # bias, and what the weight is made of
    assert network.own[""] == {"scale": 1}
    assert Network(parameter_table(net)).type("head") == "conv"


def test_ends(net, result):
    for source in (net, result):
        network = Network(source)
        assert network.ends(("first", "last")) == {"model.enc.16x16_conv", "model.dec.16x16_aux_conv"}
        assert network.ends("first") == {"model.enc.16x16_conv"}
        assert network.ends(["*.qkv", "last"]) >= {"model.enc.8x8_block0.qkv", "model.dec.16x16_aux_conv"}
        assert network.ends(()) == set()


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ("model.enc.16x16_con", "unknown layer 'model.enc.16x16_con': did you mean 'model.enc.16x16_conv'"),
        ("re:(", "candidates='re:(' is no regular expression"),
        (["conv", 3], "candidates: 3 is no name of a layer"),
        (7, "candidates=7: give a name, a glob"),
        (["conv", "*.nothing"], "unknown layer '*.nothing'"),
    ],
)
def test_bad_selections(result, selection, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        Network(result).select(selection, "candidates")


def test_a_preset_that_the_network_has_none_of():
    with pytest.raises(GddlabError, match="candidates='block': this network has none"):
        Network(Mixer()).select("block", "candidates")
