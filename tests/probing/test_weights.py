import math

import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import weight_change
from tests.probing.networks import tiny


def values(result):
    return result.pivot("weight_change").iloc[:, 0]


def test_the_change_is_relative_and_per_layer():
    teacher, student = tiny(), tiny("OneStepPrecond")
    conv = student.model.enc["8x8_block0"].conv0
    before = torch.cat([p.detach().flatten() for p in conv.parameters()])
    with torch.no_grad():
        conv.weight.add_(0.3)
        conv.bias.mul_(1.5)
    after = torch.cat([p.detach().flatten() for p in conv.parameters()])
    result = weight_change(student, teacher)
    found = values(result)
    assert found["model.enc.8x8_block0.conv0"] == pytest.approx(
        float((after - before).norm() / before.norm()), rel=1e-6
    )
    assert found["model.enc.8x8_block0"] > 0
    untouched = [n for n in found.index if not n.startswith("model.enc.8x8_block0")]
    assert (found[untouched] == 0).all()
    assert {"model.enc.16x16_block0.norm0", "model.map_layer0"} <= set(untouched)
    assert result.sigmas == [student.sigma_g]
    assert result.frame["sem"].isna().all()
    assert result.meta["stats"]["weight_change"]["unit"] == "ratio"
    assert result.statistics == {}


def test_layers_that_were_zero():
    a, b = tiny(), tiny()
    for net in (a, b):
        net.model.map_layer0.weight.data.zero_()
        net.model.map_layer0.bias.data.zero_()
    assert values(weight_change(a, b, "linear"))["model.map_layer0"] == 0
    a.model.map_layer0.bias.data[0] = 1
    assert math.isnan(values(weight_change(a, b, "linear"))["model.map_layer0"])


def test_what_a_student_drops_does_not_count():
    teacher = tiny(augment_dim=9)
    student = tiny("OneStepPrecond")
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if "map_augment" not in k})
    assert (values(weight_change(student, teacher)) == 0).all()


def test_parameters_are_paired_by_name():
    pair = {"a": nn.Conv2d(2, 2, 1), "b": nn.Conv2d(2, 2, 1)}
    ours, theirs = (nn.Sequential(nn.ModuleDict({n: pair[n] for n in order})) for order in ("ab", "ba"))
    assert values(weight_change(ours, theirs, lambda name, module: name == "0"))["0"] == 0


def test_other_layers_and_buffers_do_not_count():
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, k, 1)) for k in (2, 3))
    theirs.register_buffer("u", torch.zeros(1))
    theirs[0].load_state_dict(ours[0].state_dict())
    assert list(values(weight_change(ours, theirs, "0"))) == [0]
    with pytest.raises(GddlabError, match=r"'1.weight' is \(2, 4, 1, 1\) in the network, \(3, 4, 1, 1\)"):
        weight_change(ours, theirs)


def test_other_networks_are_refused():
    with pytest.raises(GddlabError, match=r"map_layer0.weight' is \(32, 16\) in the network, \(64, 32\)"):
        weight_change(tiny(), tiny(model_channels=16))
    with pytest.raises(GddlabError, match=r"8x8_aux_residual.weight' is .*, missing in the reference"):
        weight_change(tiny(), tiny(encoder_type="standard"))
    with pytest.raises(GddlabError, match="sigma=nan: this network accepts"):
        weight_change(tiny(), tiny(), sigma=math.nan)
    with pytest.raises(GddlabError, match="none of these has parameters"):
        weight_change(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()), "0")
