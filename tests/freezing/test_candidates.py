"""Layers from a network, its probe and a parameter table, and what is chosen among them."""

import re

import pytest
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.freezing.candidates import Network, choose, describe, recorded, split
from gddlab.probing.layers import inventory, parameter_table, select_layers
from tests.freezing.conftest import convs

ENDS = ("first", "last")


def parameters(units) -> list[str]:
    return [p for u in units for p in u.parameters]


def layers_of(names: list[str]) -> set[str]:
    return {n.rpartition(".")[0] for n in names}


def test_default_is_every_convolution_but_the_ends(net, result):
    for source in (net, result):
        units = choose(Network(source), "conv", ENDS, "layer")
        assert [u.name for u in units] == list(convs(net))
        assert all(u.cost("params") == convs(net)[u.name].n_params for u in units)
        assert any(u.name.endswith("aux_residual") for u in units)


def test_blocks_are_groups_and_other_layers_their_own(net):
    units = {u.name: u for u in choose(Network(net), "conv", ENDS, "block")}
    attended = units["model.enc.8x8_block0"].layers
    assert [n.rpartition(".")[2] for n in attended] == ["conv0", "conv1", "skip", "qkv", "proj"]
    assert units["model.enc.8x8_aux_residual"].layers == ("model.enc.8x8_aux_residual",)
    assert set(parameters(units.values())) == set(parameters(choose(Network(net), "conv", ENDS, "layer")))
    assert units["model.enc.8x8_block0"].resolution == 8


def test_a_block_or_container_stands_for_what_is_inside(net):
    network = Network(net)
    inside = [n for n, _ in net.named_parameters() if n.startswith("model.dec.")]
    assert parameters(choose(network, "model.dec", (), "layer")) == inside
    blocks = choose(network, "block", (), "layer")
    assert [u.name for u in blocks] == network.select("block", "candidates")
    some = choose(network, ["model.dec", "model.dec.8x8_in0.conv0"], (), "layer")
    assert {u.name: len(u.layers) for u in some} == {
        "model.dec": len(layers_of(inside)) - 1,
        "model.dec.8x8_in0.conv0": 1,
    }
    assert sorted(parameters(some)) == sorted(inside)
    kept = choose(network, "block", ["*.norm*", "model.enc.16x16_block0"], "layer")
    assert not [p for p in parameters(kept) if ".norm" in p or "enc.16x16_block0" in p]


def test_split(net):
    units = choose(Network(net), "conv", ENDS, "tensor")
    assert split(units, "layer") == units
    parts = split(units, "tensor")
    assert parameters(parts) == parameters(units)
    assert all(len(u.parameters) == 1 for u in parts)


def test_a_mask_knows_its_candidates(net, result, rule):
    for granularity in ("layer", "block", "tensor"):
        mask = select_freeze(result, strategy="budget", score="rms", budget=0.4, granularity=granularity)
        units = choose(Network(net), "conv", ENDS, granularity)
        assert [(u.name, u.parameters) for u in recorded(mask)] == [(u.name, u.parameters) for u in units]
    assert [u.name for u in recorded(rule)] == list(convs(net))
    custom = FreezeMask(("model.map_layer0.weight",), rule.parameters)
    assert [u.name for u in recorded(custom)] == ["model.map_layer0", *convs(net)]


def test_nothing_left(net):
    with pytest.raises(GddlabError, match=r"candidates='\*.skip' without always_train=\['conv'\] leaves no layer"):
        choose(Network(net), "*.skip", ["conv"], "layer")


def test_descriptions_are_json():
    assert describe({8: 0.5}) == {"8": 0.5}
    assert describe(("first", "last")) == ["first", "last"]
    assert describe(parameters) == "parameters"


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
