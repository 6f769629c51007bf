"""What a mask does to a network: gradients, buffers, wrappers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.probing.layers import parameter_table
from tests.probing.networks import tiny


class Normed(nn.Module):
    """A user's network: two blocks with BatchNorm, and in each one without weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.b(self.a(x).relu()).relu())


def mask_of(net: nn.Module, *layers: str) -> FreezeMask:
    names = [n for n, _ in net.named_parameters() if n.startswith(layers)]
    return FreezeMask(tuple(names), parameter_table(net))


def train(net: nn.Module, steps: int = 3) -> None:
    net.train()
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for seed in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        optimiser.zero_grad()
        net(x + 1).square().mean().backward()
        optimiser.step()


def test_buffers_of_frozen_modules_stay_through_training():
    net = Normed()
    before = copy.deepcopy(net.state_dict())
    teacher = copy.deepcopy(net)
    mask = mask_of(net, "a.")
    mask.apply(net)
    assert net.state_dict().keys() == before.keys()
    train(net)
    after = net.state_dict()
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert {k for k in before if k.startswith("a.")} <= same  # the norm without weights included
    assert not {k for k in before if k.startswith("b.")} & same
    assert not net.a[1].training and net.a[0].training and net.b[1].training
    mask.verify(net, teacher)


def test_buffers_move_without_a_mask():
    net = Normed()
    before = net.a[1].running_mean.clone()
    train(net)
    assert not torch.equal(before, net.a[1].running_mean)


def test_half_frozen_modules_are_not_held():
    net = Normed()
    FreezeMask(("a.0.weight", "a.0.bias", "a.1.weight"), parameter_table(net)).apply(net)
    net.train()
    assert net.a[1].training  # its bias is trained
    assert net.a[2].training  # not all that surrounds it is frozen


@pytest.mark.parametrize("mode", [True, False])
def test_a_later_mask_lets_go(mode):
    net = Normed().train(mode)
    mask_of(net, "a.").apply(net)
    net.train(mode)
    assert not net.a[1].training
    mask_of(net, "b.").apply(net)
    assert net.a[1].training is mode
    net.train()
    assert [m.training for m in (net.a[1], net.a[2], net.b[1], net.b[2])] == [True, True, False, False]
    mask_of(net, "none").apply(net)
    assert all(m.training for m in net.train().modules())


def test_apply_twice_is_apply_once():
    net = Normed()
    mask = mask_of(net, "a.")
    for _ in range(2):
        mask.apply(net)
        assert {n for n, p in net.named_parameters() if not p.requires_grad} == set(mask.frozen)
        assert not net.train().a[1].training
    assert net.eval() is net
    mask_of(net, "none").apply(net)
    assert not net.a[1].training  # the network is in eval mode


def test_children_of_a_held_module_follow_train():
    net = Normed()
    net.a.register_parameter("scale", nn.Parameter(torch.ones(1)))
    net.a.register_buffer("seen", torch.zeros(1))
    FreezeMask(("a.scale",), parameter_table(net)).apply(net)
    assert [m.training for m in (net.train().a, net.a[1])] == [False, True]
    assert [m.training for m in (net.eval().a, net.a[1])] == [False, False]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_hold_their_own_modules(way):
    net = Normed()
    mask_of(net, "a.").apply(net)
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = copy.deepcopy(other.a.state_dict())
    train(other)
    assert all(torch.equal(v, before[k]) for k, v in other.a.state_dict().items())
    mask_of(other, "none").apply(other)
    assert other.train().a[1].training
    assert not net.train().a[1].training  # the original is still held


def test_spectral_norm_does_not_iterate_on_a_frozen_layer():
    net = Normed()
    nn.utils.parametrizations.spectral_norm(net.a[0])
    nn.utils.spectral_norm(net.b[0])
    before = copy.deepcopy(net.state_dict())
    mask_of(net, "a.0", "b.0").apply(net)
    train(net)
    kept = [k for k in before if k.startswith(("a.0", "b.0"))]
    assert len(kept) == 8
    assert all(torch.equal(before[k], net.state_dict()[k]) for k in kept)


def test_tied_parameters_count_as_one():
    net = Normed()
    net.b[1].weight = net.a[1].weight
    mask_of(net, "a.", "b.1.bias").apply(net)
    assert not net.train().b[1].training


def test_wrapped_networks(rule, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrap in (lambda n: nn.parallel.DistributedDataParallel(n), torch.compile, _Wrapped):
            net = tiny()
            wrapped = wrap(net)
            rule.apply(wrapped)
            assert {n for n, p in net.named_parameters() if not p.requires_grad} == set(rule.frozen)
            assert [n for n, _ in rule.trainable(wrapped)] == [n for n, p in net.named_parameters() if p.requires_grad]
            rule.verify(wrapped, tiny())
            held = net.model.enc["8x8_down"].conv0
            assert not held.training and net.train().training and not held.training
            assert select_freeze(wrapped, strategy="gdd-i") == rule
    finally:
        torch.distributed.destroy_process_group()


class _Wrapped(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.gddlab_bare = net


def test_compiled_parts_of_a_network(net, rule):
    net.model = torch.compile(net.model)
    rule.apply(net)
    assert {n.replace("_orig_mod.", "") for n, p in net.named_parameters() if not p.requires_grad} == set(rule.frozen)
    rule.verify(net, tiny())


def test_another_network_by_force(rule):
    other = tiny(num_blocks=2, label_dim=3).requires_grad_(False)
    mine, theirs = (dict(net.named_parameters()) for net in (tiny(), other))
    shared = mine.keys() & theirs.keys()
    changed = [n for n in shared if mine[n].shape != theirs[n].shape]
    assert changed
    with pytest.warns(UserWarning, match=r"parameters match the mask, \d+ do not: .* and \d+ more"):
        rest = rule.apply(other, force=True)
    frozen = {n for n, p in other.named_parameters() if not p.requires_grad}
    assert frozen == shared.intersection(rule.frozen) - set(changed)
    assert "model.map_label.weight" in rest and set(changed) <= set(rest)
    assert not set(rest) & frozen
    assert rule.apply(tiny(), force=True) == rule.apply(tiny()) == ()
    with pytest.raises(GddlabError, match=r"none of the 10 parameters .* use mask.transfer"):
        rule.apply(Normed(), force=True)
    with pytest.raises(GddlabError, match="the network is of type str: give"):
        rule.apply("digits")
