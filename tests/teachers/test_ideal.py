"""The ideal denoiser against sums written out, and at the ends of the noise levels."""

import numpy as np
import pytest
import torch

import gddlab
from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.nets import ideal as module
from gddlab.nets import save_network
from gddlab.probing.inputs import Inputs
from gddlab.teachers import ideal_denoiser


@pytest.fixture(scope="module")
def pictures():
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    return ImageDataset(images, np.arange(30) % 3, classes=4, name="pictures", source="random")  # class 3 has none


def by_hand(x, sigma, images):
    """Equation 57 in float64, all at once."""
    x, y = x.double().flatten(1), images.double().flatten(1)
    squares = (x[:, None] - y[None]).square().sum(2)
    weights = (-squares / (2 * sigma.double()[:, None] ** 2)).softmax(1)
    return (weights @ y).reshape(len(x), *images.shape[1:])


def noised(pictures, sigma):
    clean = pictures.images()[:6]
    return clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))


SIGMAS = torch.tensor([80.0, 10.0, 3.0, 1.0, 0.1, 0.002])


@pytest.mark.parametrize("chunk", [1 << 21, 7 * 192, 1])
def test_equals_the_sum(pictures, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    net, x = ideal_denoiser(pictures), noised(pictures, SIGMAS)
    expected = by_hand(x, SIGMAS, pictures.images())
    found = net(x, SIGMAS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    exact = net(x.double(), SIGMAS.double())
    torch.testing.assert_close(exact, by_hand(x, SIGMAS, pictures.images()), rtol=1e-11, atol=1e-11)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, SIGMAS), found)


def test_of_a_class(pictures):
    net, x = ideal_denoiser(pictures, conditional=True), noised(pictures, SIGMAS)
    ids = torch.tensor([0, 1, 2, 2, 1, 0])
    found = net(x, SIGMAS, torch.eye(4)[ids])
    for i, k in enumerate(ids):
        expected = by_hand(x[i : i + 1], SIGMAS[i : i + 1], pictures.images(pictures.class_ids == int(k)))
        torch.testing.assert_close(found[i : i + 1].double(), expected, rtol=1e-5, atol=1e-6)
    every = ideal_denoiser(pictures)(x, SIGMAS)
    torch.testing.assert_close(net(x, SIGMAS), every, rtol=0, atol=0)  # no class
    torch.testing.assert_close(net(x, SIGMAS, torch.full((1, 4), 0.0)), every, rtol=0, atol=0)
    mean = pictures.images(pictures.class_ids == 1).mean(0)
    torch.testing.assert_close(net(x[:1], torch.tensor(1e6), torch.eye(4)[1:2])[0], mean, rtol=1e-3, atol=1e-4)
    with pytest.raises(GddlabError, match="class 3: these data have no image of it"):
        net(x, SIGMAS, torch.eye(4)[[0, 1, 2, 3, 0, 0]])


def test_the_ends_of_the_noise_levels(pictures):
    net, images = ideal_denoiser(pictures), pictures.images()
    x = torch.randn(5, 3, 8, 8)
    nearest = images[torch.cdist(x.flatten(1), images.flatten(1)).argmin(1)]
    torch.testing.assert_close(net(x, 1e-6), nearest, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net(x, 1e6), images.mean(0).expand(5, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_samples_are_images_of_the_set(pictures):
    images = pictures.images()
    made = gddlab.sample(ideal_denoiser(pictures), 6)
    assert (made[:, None] - images[None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-5
    made = gddlab.sample(ideal_denoiser(pictures, conditional=True), 6, class_labels=2)
    assert (made[:, None] - images[pictures.class_ids == 2][None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-5


def test_other_calls_take_it(pictures, tmp_path):
    net = ideal_denoiser(pictures)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (3, 8, 0)
    assert (net.sigma_min, net.sigma_max) == (0.0, float("inf"))
    inputs = Inputs(net, 4, n=5)
    assert inputs.dataset is pictures
    rows = inputs.rows(0, 5, device=torch.device("cpu"))
    assert net(*rows).shape == (20, 3, 8, 8)
    scores = gddlab.evaluate(net, n=8, extractor="lite0", metrics="fid", progress=False)
    assert "pictures" in str(scores)
    assert list(net.state_dict()) == ["model.images"]
    assert {*ideal_denoiser(pictures, conditional=True).state_dict()} == {"model.images", "model.class_ids"}
    assert not any(p.requires_grad for p in net.parameters())
    double = ideal_denoiser(pictures).double()
    assert double(torch.zeros(1, 3, 8, 8, dtype=torch.float64), 1.0).dtype == torch.float64
    with pytest.raises(GddlabError, match="IdealPrecond has no file format"):
        save_network(net, tmp_path / "ideal.safetensors")
    assert ideal_denoiser(pictures).to("meta").model.images.device.type == "meta"


def test_at_sigma_80_the_teacher_varies_with_the_noise_more_than_it_should():
    """One step, 256 seeds: spread over noise over that of the data about their mean, root mean squares of pixels."""
    images = gddlab.open_dataset("digits:train").images()
    z = torch.randn(256, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def spread(x):
        return float((x - x.mean(0)).square().mean().sqrt())

    with torch.no_grad():
        shares = [
            spread(net(80 * z, 80.0)) / spread(images)
            for net in (ideal_denoiser("digits:train"), gddlab.load_teacher("digits"))
        ]
    assert shares[0] == pytest.approx(0.025, abs=0.002)
    assert shares[1] == pytest.approx(0.36, abs=0.02)


def test_bad_input_is_refused():
    with pytest.raises(GddlabError, match=r"conditional=True: .* has no classes"):
        ideal_denoiser(np.zeros((3, 8, 8, 1), np.uint8), conditional=True)
    with pytest.raises(GddlabError, match="did you mean 'digits'"):
        ideal_denoiser("digts")
    net = ideal_denoiser("digits")
    with pytest.raises(GddlabError, match=r"x has shape \(1, 3, 16, 16\)"):
        net(torch.zeros(1, 3, 16, 16), 1.0)
