import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.probing import PerImage, Statistic, select_layers
from gddlab.probing.effects import Effects, denoised, weighted_error
from gddlab.probing.inputs import Inputs
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


def result(effects, layer, sigmas):
    inputs = Inputs(tiny(), sigmas, states="prior", n=2)
    return effects.result(tiny(), [layer], inputs, side="ablated", settings={})


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
    effects = Effects([layer], [OneNumber, OneRatio])
    numbers = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 9.0]])
    pair = torch.stack([numbers, torch.ones(2, 3)], -1)
    for part, sigmas in ((slice(0, 2), [3.0, 2.0]), (slice(2, 3), [1.0])):
        for image in (0, 1):
            effects.add(layer.name, sigmas, numbers[image : image + 1, part], pair[image : image + 1, part])
    found = result(effects, layer, [3.0, 2.0, 1.0])
    assert found.pivot("first").loc[layer.name].tolist() == [2.0, 3.0, 6.0]
    assert found.pivot("share").loc[layer.name].tolist() == [2.0, 3.0, 6.0]
    assert found.pivot("first", "sem").loc[layer.name].tolist() == pytest.approx([1.0, 1.0, 3.0])
    assert (found.frame["n_images"] == 2).all()
    assert found.meta["nonfinite"] == []


def test_what_is_not_finite_is_counted_and_spoils_its_noise_level_alone(layer):
    effects = Effects([layer], [OneNumber, OneRatio])
    numbers = torch.tensor([[1.0, torch.inf], [3.0, torch.nan], [1.0, 1.0]])
    effects.add(layer.name, [2.0, 1.0], numbers, torch.stack([numbers, torch.ones(3, 2)], -1))
    with pytest.warns(RuntimeWarning, match=r"1 places: model.enc.16x16_conv \(ablated\) at sigma 1") as caught:
        found = result(effects, layer, [2.0, 1.0])
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
