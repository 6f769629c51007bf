import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.probing import PerImage, Statistic, select_layers
from gddlab.probing.ablate import spread, swapped
from gddlab.probing.effects import Effects, denoised, tapped, weighted_error
from gddlab.probing.inputs import Inputs
from gddlab.probing.patch import activations_of, equal_weights, weights_of
from gddlab.probing.statistics import declare
from tests.probing.networks import tiny


class OneNumber(PerImage):
    name, definition, axes, unit = "first", "a number", "images", "1"


class OneRatio(PerImage):
    name, definition, axes, unit = "share", "a ratio of means", "images", "1"

    def value(self, means):
        return means[:, 0] / means[:, 1]


@pytest.fixture(scope="module")
def layer():
    return select_layers(tiny(), "model.enc.16x16_conv")[0]


def effects_of(layer, sigmas):
    net = tiny()
    return Effects(net, Inputs(net, sigmas, states="prior", n=2), [layer], [OneNumber, OneRatio])


def test_a_declared_statistic_is_found_by_its_name():
    own = declare(PerImage, "declared", "a number", axes="images", unit="1")
    assert own.describe() == {
        "definition": "a number",
        "axes": "images",
        "unit": "1",
        "target": "layer",
        "class": "declared",
    }
    assert Statistic.registry["declared"] is own
    del Statistic.registry["declared"]


def test_the_weight_is_edms():
    a, b = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    found = weighted_error(a, b, [2.0, 0.5])
    mean = (a - b).double().square().mean((1, 2, 3)).reshape(3, 2)
    torch.testing.assert_close(found, mean * torch.tensor([4.25, 8.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_small_differences_of_large_images_are_exact():
    a = torch.full((1, 1, 4, 4), 1.0)
    assert weighted_error(a + 2**-20, a, [0.5]).item() == 8 * 2.0**-40


def test_noise_levels_that_come_in_parts_are_put_together(layer):
    effects = effects_of(layer, [3.0, 2.0, 1.0])
    numbers = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 9.0]])
    pair = torch.stack([numbers, torch.ones(2, 3)], -1)
    for part, sigmas in ((slice(0, 2), [3.0, 2.0]), (slice(2, 3), [1.0])):
        for image in (0, 1):
            effects.add(layer.name, sigmas, numbers[image : image + 1, part], pair[image : image + 1, part])
    found = effects.result(side="ablated", settings={})
    assert found.pivot("first").loc[layer.name].tolist() == [2.0, 3.0, 6.0]
    assert found.pivot("share").loc[layer.name].tolist() == [2.0, 3.0, 6.0]
    assert found.pivot("first", "sem").loc[layer.name].tolist() == pytest.approx([1.0, 1.0, 3.0])
    assert (found.frame["n_images"] == 2).all()
    assert found.meta["nonfinite"] == []


def test_what_is_not_finite_is_counted_and_spoils_its_noise_level_alone(layer):
    effects = effects_of(layer, [2.0, 1.0])
    numbers = torch.tensor([[1.0, torch.inf], [3.0, torch.nan], [1.0, 1.0]])
    effects.add(layer.name, [2.0, 1.0], numbers, torch.stack([numbers, torch.ones(3, 2)], -1))
    with pytest.warns(RuntimeWarning, match=r"1 places: model.enc.16x16_conv \(ablated\) at sigma 1") as caught:
        found = effects.result(side="ablated", settings={})
    assert caught[0].filename == __file__
    assert found.meta["nonfinite"] == [{"layer": layer.name, "side": "ablated", "sigma": 1.0, "images": 2}]
    for stat in ("first", "share"):
        for column in ("value", "sem"):
            assert found.pivot(stat, column).loc[layer.name].isna().tolist() == [False, True]


def test_answers_that_are_no_images_are_refused():
    x = torch.zeros(2, 1, 4, 4)
    assert denoised(lambda x, sigma, labels: x, (x, torch.ones(2), None)) is x
    for answer, says in ((x[:, :, 1:], r"\(2, 1, 3, 4\)"), ((x, x), "a tuple")):
        with pytest.raises(GddlabError, match=f"gave {says} for states .*: give a denoiser"):
            denoised(lambda *_, y=answer: y, (x, torch.ones(2), None))


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
