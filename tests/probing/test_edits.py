import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing.edits import activations_of, equal_weights, spread, swapped, tapped, weights_of


def test_a_changed_output_is_a_tensor_of_its_own_in_the_layout_of_the_layers():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True)).to(memory_format=torch.channels_last)
    x = torch.randn(3, 1, 4, 4).to(memory_format=torch.channels_last)
    mine = torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1)
    with torch.no_grad(), tapped(net, {"0": lambda y: mine}) as ran:
        out = net(x)
    assert ran == {"0": (3, 2, 4, 4)}
    assert mine.flatten().tolist() == [-1.0, 2.0]  # the in-place ReLU wrote into a copy
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, mine.relu().expand_as(out), rtol=0, atol=0)


def test_what_is_left_alone_is_the_same_tensor():
    net, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    net[1].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with tapped(net, {"0": lambda y: seen.append(y), "1": None}):
        net(torch.ones(1, 2))
    assert seen[0] is seen[1]


def test_hooks_go_when_a_change_raises():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), tapped(net, {"0": lambda y: 1 / 0}):
        net(torch.ones(1, 2))
    assert not net[0]._forward_hooks


def test_layers_that_do_not_fit_are_named():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(GddlabError, match="'0' did not run"), tapped(net, {"0": None}):
        pass
    with pytest.raises(GddlabError, match="'0' ran twice"), tapped(net, {"0": None}):
        net(net(torch.ones(1, 2)))
    with pytest.raises(GddlabError, match=r"'0' is \(1, 2\), but this pass has 3 rows"), tapped(net, {"0": None}, 3):
        net(torch.ones(1, 2))


def test_rows_of_pairs_are_swapped_at_each_noise_level():
    rows = torch.arange(12.0).reshape(12, 1)  # four images at three noise levels
    assert swapped(4, rows).flatten().tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]


def test_means_are_spread_over_pixels_or_tokens():
    mean = torch.arange(6.0).reshape(2, 3)
    assert spread(mean, torch.empty(2, 3, 4, 5)).shape == (2, 3, 1, 1)
    assert spread(mean, torch.empty(2, 7, 3)).shape == (2, 1, 3)
    assert spread(mean, torch.empty(2, 3)).shape == (2, 3)


def test_weights_come_back_and_graphs_stay_valid():
    ours, theirs = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    before = ours[0].weight.clone()
    loss = ours(torch.ones(1, 2)).square().sum()
    assert not equal_weights(theirs, ours, "0")
    with weights_of(theirs, ours, "0"):
        assert torch.equal(ours[0].weight, theirs[0].weight)
        assert equal_weights(theirs, ours, "0")
    assert torch.equal(ours[0].weight, before)
    loss.backward()


def test_activations_of_another_network_in_several_passes():
    ours, theirs = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad(), activations_of(theirs, ours, "0"):
        for x in (torch.randn(1, 2), torch.randn(5, 2)):
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert not (ours._forward_pre_hooks or ours[0]._forward_hooks or theirs[0]._forward_hooks)
