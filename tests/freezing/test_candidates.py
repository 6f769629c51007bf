import pytest

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.freezing.candidates import Network, choose, describe, recorded, split
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
