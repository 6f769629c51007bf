import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.nets import from_edm
from gddlab.probing.layers import parameter_table
from tests.freezing.students import STUDENTS
from tests.probing.networks import tiny, tiny_adm


def student(name: str) -> nn.Module:
    with torch.device("meta"):
        return from_edm("OneStepPrecond", **STUDENTS[name][0])


def groups(mask: FreezeMask, by: str) -> list[str]:
    """Stage, resolution or level, and kind of each parameter."""
    frame = mask.to_frame()
    top = int(frame["resolution"].max())
    label = {0: "-"} | {top >> k: str(top >> k if by == "resolution" else k) for k in range(4)}
    where = [label[r] for r in frame["resolution"].fillna(0)]
    return [f"{stage}/{w}/{kind}" for stage, w, kind in zip(frame["stage"], where, frame["kind"], strict=True)]


@pytest.mark.parametrize(("by", "missing"), [("resolution", "64"), ("level", "3")])
@pytest.mark.parametrize("strategy", ["gdd-i", "gdd-i-3"])
def test_from_cifar10_to_ffhq(by, missing, strategy):
    """A rule's mask, transferred, is the rule's own where the first network has such layers."""
    target = student("ffhq64")
    source = select_freeze(student("cifar10"), strategy=strategy)
    own = select_freeze(target, strategy=strategy)
    mask = source.transfer(target, by=by)
    known = set(groups(source, by))
    lost = {name: group for (name, _), group in zip(own.parameters, groups(own, by), strict=True) if group not in known}
    assert set(mask.frozen) == set(own.frozen) - lost.keys()
    a = mask.arguments
    assert a["unmapped"] == list(dict.fromkeys(lost.values()))
    assert {f"dec/{missing}/conv0", f"enc/{missing}/conv1"} <= set(a["unmapped"])
    assert a["n_unmapped"] == len(lost)
    sizes = own.to_frame().set_index("parameter")["size"]
    assert a["mapped"] == pytest.approx(1 - sizes[list(lost)].sum() / own.n_params)
    assert a["by"] == by and a["strategy"] == strategy and a["reached"] == mask.fraction
    mask.apply(target)


def test_to_the_same_network_nothing_changes(net, result):
    mask = select_freeze(result, strategy="budget", score="rms", budget=0.4, granularity="tensor")
    for by in ("resolution", "level"):
        same = mask.transfer(net, by=by)
        assert same.frozen == mask.frozen
        assert same.arguments["mapped"] == 1 and same.arguments["unmapped"] == []


def test_decisions_go_to_the_nearest_relative_position(net):
    names = [f"model.dec.8x8_{b}.conv0.weight" for b in ("in0", "in1", "block0", "block1")]
    mask = FreezeMask((names[0], names[3]), parameter_table(net))
    longer = mask.transfer(tiny(num_blocks=4))
    kept = [n.split("_")[1].split(".")[0] for n in longer.frozen]
    assert kept == ["in0", "in1", "block4"]  # in1 lies half way between in0 and in1 there: the earlier
    assert all(n.endswith("conv0.weight") for n in longer.frozen)


def row(n: int) -> nn.Module:
    """`n` layers of one stage, resolution and kind."""
    blocks = {f"8x8_block{i}": nn.ModuleDict({"conv0": nn.Linear(1, 1, bias=False)}) for i in range(n)}
    return nn.ModuleDict({"enc": nn.ModuleDict(blocks)})


@pytest.mark.parametrize(
    ("n", "m", "twins"),
    [(5, 5, [0, 1, 2, 3, 4]), (3, 5, [0, 2, 4]), (5, 2, [0, 0, 0, 1, 1]), (1, 5, [2]), (4, 1, [0, 0, 0, 0])],
)
def test_layers_take_the_decision_at_the_nearest_relative_position(n, m, twins):
    for frozen in range(m):
        mask = FreezeMask((f"enc.8x8_block{frozen}.conv0.weight",), parameter_table(row(m)))
        expected = [f"enc.8x8_block{i}.conv0.weight" for i, twin in enumerate(twins) if twin == frozen]
        assert list(mask.transfer(row(n)).frozen) == expected


def test_a_missing_tensor_is_listed_alone(net):
    parameters = tuple(p for p in parameter_table(net) if p[0] != "model.enc.16x16_conv.bias")
    mask = FreezeMask(("model.enc.16x16_conv.weight",), parameters)
    out = mask.transfer(net)
    assert out.frozen == mask.frozen
    assert out.arguments["unmapped"] == ["enc/16/conv/bias"] and out.arguments["n_unmapped"] == 1


def test_refusals(net, rule):
    with pytest.raises(GddlabError, match="unknown by 'size': accepted: resolution, level"):
        rule.transfer(net, by="size")
    with pytest.raises(GddlabError, match="no parameter of this network has a counterpart by level"):
        rule.transfer(nn.Sequential(nn.Linear(2, 2)), by="level")
    with pytest.raises(GddlabError, match="the network is of type str: give"):
        rule.transfer("digits")
    assert 0 < rule.transfer(tiny_adm(), by="level").arguments["mapped"] < 1
