"""The image after each block against hooks by hand, and readouts of networks that hold what is known."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from gddlab.datasets import ImageDataset, order
from gddlab.errors import GddlabError, NotFound
from gddlab.probing import Lens, lens, select_layers
from gddlab.probing.decode import Reader, Ridge
from gddlab.sampling import latents
from tests.probing.networks import tiny

SIGMAS = [5.0, 0.5]


@pytest.fixture(scope="module")
def crowd() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 1), dtype=np.uint8)
    return ImageDataset(images, name="crowd", source="random")


def states(data, sigma, first=0, last=3, side=16):
    clean = data.images(order(len(data), 0, 0, last))[first:]
    return clean, clean + sigma * latents(range(first, last), (1, side, side)), torch.full((last - first,), sigma)


def parts_of(net, block):
    """Outputs of a block that are added to what passes through it."""
    return [f"{block}.{p}" for p in ("conv1", "proj") if f"{block}.{p}" in dict(net.named_modules())]


@torch.no_grad()
def without(net, blocks, x, sigma, replace):
    hooks = [
        net.get_submodule(part).register_forward_hook(lambda m, a, y, part=part: replace(part, y))
        for block in blocks
        for part in parts_of(net, block)
    ]
    out = net(x, sigma)
    for hook in hooks:
        hook.remove()
    return out


def test_after_each_block_the_rest_adds_nothing(net, crowd):
    found = lens(net, SIGMAS, data=crowd, n=3)
    names = [layer.name for layer in select_layers(net, "block")]
    assert len(names) == 10
    assert found.layers == ("none", *names)
    assert found.images.shape == (11, 2, 3, 1, 16, 16)
    for s, sigma in enumerate(SIGMAS):
        clean, x, level = states(crowd, sigma)
        torch.testing.assert_close(found.clean, clean)
        torch.testing.assert_close(found.noisy[s], x)
        for k in range(11):
            expected = without(net, names[k:], x, level, lambda part, y: 0 * y)
            torch.testing.assert_close(found.images[k, s], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.images[-1, s], without(net, [], x, level, None))
    assert (found.images[1:] - found.images[:-1]).abs().amax((1, 2, 3, 4, 5)).min() > 1e-3


def test_some_layers_alone_are_bypassed(net, crowd):
    chosen = ["model.dec.16x16_block0", "model.dec.16x16_aux_conv"]
    found = lens(net, [0.5], data=crowd, layers=chosen, n=3)
    assert found.layers == ("none", *chosen)
    _, x, level = states(crowd, 0.5)
    skip = float(1 / (0.5**2 / 0.25 + 1))  # c_skip: without its last convolution the network gives c_skip x
    torch.testing.assert_close(found.images[0, 0], skip * x)
    torch.testing.assert_close(found.images[1, 0], skip * x)
    with torch.no_grad():
        assert torch.equal(found.images[2, 0], net(x, level))


def test_means_are_those_of_the_fitting_images(net, crowd):
    block = "model.enc.8x8_block0"
    found = lens(net, SIGMAS, data=crowd, layers=block, mode="mean", n=3, fit=20, batch_size=8)
    for s, sigma in enumerate(SIGMAS):
        kept = {}

        def keep(part, y, kept=kept):
            kept[part] = y.mean((0, 2, 3))[:, None, None].clone()

        without(net, [block], *states(crowd, sigma, 3, 23)[1:], keep)
        _, x, level = states(crowd, sigma)
        expected = without(net, [block], x, level, lambda part, y, kept=kept: kept[part] + 0 * y)
        torch.testing.assert_close(found.images[0, s], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(found.images[1, s], net(x, level))
    assert found.meta["settings"] == {"mode": "mean", "n": 3, "dtype": "float32", "fit": 20}


class Known(nn.Module):
    """One layer sees the image whole, the other nothing of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.told = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(1, 8)

    def forward(self, x, sigma, class_labels=None):
        return x / 2 + 0 * self.seen(x).mean(1, keepdim=True) + 0 * self.told(sigma[:, None]).mean()


def test_a_readout_shows_what_the_layer_holds():
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1), dtype=np.uint8)
    data = ImageDataset(images, name="spots", source="random")
    net = Known()
    found = lens(net, [20.0, 0.001], data=data, layers=["seen", "told"], mode="readout", n=3, fit=150, dims=64)
    assert found.layers == ("seen", "told", "output")
    torch.testing.assert_close(found.images[0, 1], found.clean, rtol=0, atol=0.01)
    mean = data.images(order(200, 0, 0, 153))[3:].mean(0)
    for s in range(2):
        torch.testing.assert_close(found.images[1, s], mean.expand(3, -1, -1, -1), rtol=0, atol=1e-3)
        assert torch.equal(found.images[2, s], found.noisy[s] / 2)
    away = (found.images[0, 0] - found.clean).square().mean().sqrt()
    assert away > 0.3
    reader, ridge = Reader(net, net, select_layers(net, "seen"), 64, 0), Ridge()
    clean, x, level = states(data, 20.0, 3, 153, side=4)
    with torch.no_grad():
        ridge.add(reader((x, level, None))["seen"], {"image": clean.flatten(1).double()})
        expected = ridge.readout("image")(reader((found.noisy[0], level[:3], None))["seen"]).reshape(3, 1, 4, 4)
    torch.testing.assert_close(found.images[0, 0], expected.float(), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="64 features are read from fit=40 images"):
        lens(net, [1.0], data=data, layers="seen", mode="readout", n=3, fit=40, dims=64)


@pytest.mark.parametrize("mode", ["bypass", "mean", "readout"])
def test_images_do_not_depend_on_the_batch_size(net, crowd, mode):
    how = {"data": crowd, "layers": "model.*_block0", "mode": mode, "n": 5, "fit": 40, "dims": 16}
    whole = lens(net, SIGMAS, **how)
    other = lens(net, SIGMAS, batch_size=3, **how)
    torch.testing.assert_close(other.images, whole.images, rtol=1e-3, atol=1e-4)
    assert other.layers == whole.layers


def test_distances_are_in_a_frame(net, crowd):
    found = lens(net, SIGMAS, data=crowd, layers="model.*_block0", n=3)
    frame = found.to_frame()
    assert len(frame) == len(found.layers) * 2 * 2
    for stat, other in (("to_output", found.images[-1, 1]), ("to_clean", found.clean)):
        away = (found.images[1, 1] - other).double().square().mean((1, 2, 3)).sqrt()
        row = frame[(frame["stat"] == stat) & (frame["sigma"] == 0.5) & (frame["layer"] == found.layers[1])].iloc[0]
        assert row["value"] == pytest.approx(away.mean().item(), rel=1e-5)
        assert row["sem"] == pytest.approx(away.std().item() / 3**0.5, rel=1e-5)
        assert row["n_images"] == 3
    last = frame[(frame["layer"] == found.layers[-1]) & (frame["stat"] == "to_output")]
    assert (last["value"] == 0).all()
    assert lens(net, [1.0], data=crowd, layers="model.*_block0", n=1).to_frame()["sem"].isna().all()


def test_a_lens_is_saved_and_loaded(net, crowd, tmp_path):
    found = lens(net, SIGMAS, data=crowd, layers="model.*_block0", n=2)
    found.save(tmp_path / "a")
    again = Lens.load(tmp_path / "a")
    for name in ("images", "clean", "noisy"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert (again.layers, again.sigmas, again.meta) == (found.layers, found.sigmas, found.meta)
    assert json.loads((tmp_path / "a" / "lens.json").read_text())["settings"]["mode"] == "bypass"
    assert repr(again) == "<Lens: bypass, 4 layers at 2 noise levels, 2 images>"
    with pytest.raises(NotFound):
        Lens.load(tmp_path / "b")
    (tmp_path / "a" / "lens.npz").write_bytes(b"other")
    with pytest.raises(GddlabError, match=r"lens.npz is not the file that lens.json names"):
        Lens.load(tmp_path / "a")
    (tmp_path / "a" / "lens.json").write_text("{}")
    with pytest.raises(GddlabError, match="holds no lens"):
        Lens.load(tmp_path / "a")


def test_a_grid_has_layers_down_and_levels_across(net, crowd):
    found = lens(net, SIGMAS, data=crowd, layers="model.*_block0", n=6)
    figure = found.grid()
    assert [ax.get_title() for ax in figure.axes] == ["σ = 5", "σ = 0.5"]
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names[:3] == ["clean image", "input", "none"]
    assert names[3] == "enc.16x16_block0"
    drawn = figure.axes[1].images[0].get_array()
    assert drawn.shape[1] == 4 * 17 - 1
    pixels = ((found.images[2, 1, 3, 0].clamp(-1, 1) + 1) * 127.5).round().numpy()
    middle = figure.axes[1].get_yticks()[4]
    top = round(middle - 8.5)
    np.testing.assert_array_equal(drawn[top : top + 16, 51:67, 0], pixels)
    assert found.grid([5, 0]).axes[0].images[0].get_array().shape[1] == 2 * 17 - 1
    for images in ([6], [], [-1], ["a"]):
        with pytest.raises(GddlabError, match=r"give a list of positions in 0\.\.5"):
            found.grid(images)
    plt.close("all")


def test_the_network_is_left_as_it_was(net, crowd):
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    for mode in ("bypass", "mean", "readout"):
        lens(net, [1.0], data=crowd, layers="model.*_block0", mode=mode, n=2, fit=20, dims=8)
    assert net.training
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_bad_input_is_refused_in_one_line(net, crowd):
    for kwargs, says in (
        ({"mode": "bypas"}, "did you mean 'bypass'"),
        ({"n": 61}, "n=61 different images, but 'crowd' has 60"),
        ({"mode": "mean", "n": 3, "fit": 58}, "n=3 and fit=58 different images, but 'crowd' has 60"),
        ({"n": 0}, "n=0"),
        ({"layers": "model.enc.16x16_blok0"}, "did you mean"),
        ({"timesteps": [0.0]}, "sigma 0"),
    ):
        with pytest.raises(GddlabError, match=says) as e:
            lens(net, **({"timesteps": [1.0], "data": crowd} | kwargs))
        assert "\n" not in str(e.value)
    broken = tiny()
    broken.forward = lambda x, sigma, class_labels=None: x[..., 1:]
    with pytest.raises(GddlabError, match=r"the network gave \(4, 1, 16, 15\)"):
        lens(broken, [1.0], data=crowd, layers="model.*_block0")
