import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from torch import nn

from gddlab.errors import GddlabError
from gddlab.nets import PURE
from gddlab.probing import probe
from gddlab.probing.inputs import Inputs
from gddlab.probing.layers import inventory, named_layers
from gddlab.teachers.wrap import wrap

ABAR = DDPMScheduler().alphas_cumprod


def unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(config | changes)).eval()


class Answer(nn.Module):
    """In place of a UNet2DModel: gives what it is told and keeps what it saw."""

    def __init__(self, answer, **config):
        super().__init__()
        known = {"in_channels": answer.shape[1], "out_channels": answer.shape[1], "sample_size": answer.shape[-1]}
        known |= {"time_embedding_type": "positional", "class_embed_type": None, "num_class_embeds": None}
        self.config = SimpleNamespace(**(known | config))
        self.answer = answer

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.sample, self.timestep, self.class_labels = sample, timestep, class_labels
        return (self.answer,)


Answer.__name__ = "UNet2DModel"


def sigma_at(t, abar=ABAR):
    return ((1 - abar[t].double()) / abar[t].double()).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_image_is_found_exactly(prediction):
    image, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 500, 999])
    abar = ABAR.double()[t][:, None, None, None]
    alpha, rest = abar.sqrt(), (1 - abar).sqrt()
    answer = {"epsilon": noise, "v_prediction": alpha * noise - rest * image, "sample": image}[prediction]
    network = Answer(answer)
    x = image + rest / alpha * noise
    out = wrap(network, prediction=prediction, alphas_cumprod=ABAR)(x, sigma_at(t))
    torch.testing.assert_close(out, image)
    torch.testing.assert_close(network.sample, alpha * image + rest * noise)
    torch.testing.assert_close(network.timestep, t.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_the_image_is_that_of_diffusers_schedulers(cls, prediction):
    scheduler = cls(prediction_type=prediction, clip_sample=False)
    network, t = unet(), 300
    model = wrap(network, scheduler=scheduler)
    seen = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        scheduler.set_timesteps(1000)
        wanted = scheduler.step(network(seen, t).sample, t, seen).pred_original_sample
        found = model(seen / ABAR[t].sqrt(), sigma_at(t))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_timesteps_are_interpolated_in_log_sigma():
    schedule = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    network = Answer(torch.zeros(6, 1, 2, 2))
    model = wrap(network, scheduler=schedule)
    levels = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().double().numpy()
    sigma = torch.tensor([levels[0], levels[-1], 0.1, 1.0, 5.0, 10.0])
    model(torch.zeros(6, 1, 2, 2), sigma)
    wanted = np.interp(sigma.log().numpy(), np.log(levels), np.arange(1000))
    np.testing.assert_allclose(network.timestep.numpy(), wanted, rtol=1e-4, atol=1e-3)
    assert network.timestep.dtype == torch.float32
    assert (model.sigma_min, model.sigma_max) == pytest.approx((levels[0], levels[-1]), rel=1e-5)
    with pytest.raises(GddlabError, match="sigma 80: this network accepts"):
        model(torch.zeros(6, 1, 2, 2), 80.0)


def test_shape_and_classes_are_those_of_the_configuration():
    model = wrap(unet(num_class_embeds=4, sample_size=(16, 16)), scheduler=DDPMScheduler(), data="digits")
    assert (model.img_channels, model.img_resolution, model.label_dim, model.card.data) == (1, 16, 4, "digits")
    assert wrap(unet(sample_size=None), scheduler=DDPMScheduler()).img_resolution is None


def test_classes_and_learned_variances():
    network = unet(num_class_embeds=4, out_channels=2)
    model = wrap(network, prediction="epsilon", alphas_cumprod=ABAR)
    x, t = torch.randn(2, 1, 16, 16), 200
    s, alpha = sigma_at(t).float(), ABAR[t].sqrt()
    with torch.no_grad():
        wanted = x - s * network(alpha * x, t, class_labels=torch.tensor([3, 1])).sample[:, :1]
        torch.testing.assert_close(model(x, s, torch.eye(4)[[3, 1]]), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(GddlabError, match="4 classes and none for no class: give class_labels"):
        model(x, s)
    for labels in (torch.zeros(2, 4), torch.full((2, 4), 0.25)):
        with pytest.raises(GddlabError, match="not one-hot"):
            model(x, s, labels)


def test_a_last_step_of_pure_noise_is_one():
    schedule = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert schedule.alphas_cumprod[-1] == 0
    network = Answer(torch.ones(2, 1, 4, 4))
    model = wrap(network, scheduler=schedule)
    assert model.sigma_max == PURE
    x = torch.randn(2, 1, 4, 4)
    out = model(x * torch.tensor([PURE, 1.0])[:, None, None, None], torch.tensor([PURE, 1.0]))
    torch.testing.assert_close(network.sample[0], x[0])
    assert network.timestep[0] == 999
    torch.testing.assert_close(out[0], -torch.ones(1, 4, 4))  # v is -image there


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        ({}, {}, "does not know its noise schedule: give alphas_cumprod= or scheduler="),
        ({}, {"prediction": "epsilon"}, "does not know its noise schedule: give alphas_cumprod= or scheduler="),
        ({}, {"alphas_cumprod": ABAR}, "give prediction=, one of epsilon, v_prediction, sample"),
        ({}, {"scheduler": DDPMScheduler(), "prediction": "eps"}, "unknown prediction 'eps'"),
        ({}, {"scheduler": DDPMScheduler(), "sigma_max": 500}, "sigma_max=500: give a range within 0.01"),
        ({}, {"prediction": "epsilon", "alphas_cumprod": ABAR.flip(0)}, "numbers that fall between 1 and 0"),
        ({}, {"prediction": "epsilon", "alphas_cumprod": []}, "alphas_cumprod is (0,), empty"),
        ({}, {"prediction": "epsilon", "alphas_cumprod": "linear"}, "alphas_cumprod='linear': give numbers"),
        ({"time_embedding_type": "fourier"}, {"scheduler": DDPMScheduler()}, "time_embedding_type='fourier'"),
        ({"class_embed_type": "timestep"}, {"scheduler": DDPMScheduler()}, "class_embed_type='timestep'"),
        ({"out_channels": 3}, {"scheduler": DDPMScheduler()}, "out_channels=3 with in_channels=1"),
        ({"sample_size": (16, 32)}, {"scheduler": DDPMScheduler()}, "sample_size=(16, 32): images here are square"),
    ],
)
def test_what_is_not_known_is_refused(config, arguments, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        wrap(unet(**config), **arguments)


@pytest.fixture(scope="module")
def probed():
    """A network, its denoiser, sigmas at whole timesteps, and everything measured of it."""
    network = unet()
    model = wrap(network, scheduler=DDPMScheduler())
    sigmas = [float(sigma_at(t)) for t in (900, 400, 10)]
    return network, model, sigmas, probe(model, sigmas, states="prior", layers="all", n=3, progress=False)


def value(result, layer, stat):
    frame = result.frame
    return torch.tensor(frame[(frame.layer == layer) & (frame.stat == stat)].value.to_numpy())


def watched(probed, *names):
    """Outputs and inputs of modules when the network is called in its own way; float64, (3, 3, ...), images first."""
    network, model, sigmas, _ = probed
    modules = named_layers(model)
    inputs, outputs, handles = {}, {}, []
    for name in names:

        def hook(_, x, y, name=name):
            inputs[name], outputs[name] = x[0].clone(), y.clone()

        handles.append(modules[name].register_forward_hook(hook))
    x, _, _ = Inputs(model, sigmas, states="prior", n=3).rows(0, 3, device=torch.device("cpu"))
    t = torch.tensor([900, 400, 10]).repeat(3)
    with torch.no_grad():
        network(x * ABAR[t].sqrt()[:, None, None, None], t)
    for h in handles:
        h.remove()
    return [{k: v.double().unflatten(0, (3, 3)) for k, v in d.items()} for d in (inputs, outputs)]


def norm(x):
    return x.flatten(2).norm(dim=-1)


@pytest.mark.parametrize("layer", ["conv_in", "mid_block.resnets.0.conv1", "up_blocks.0.attentions.1.to_k", "conv_out"])
def test_rms_is_that_of_a_hook_of_ones_own(probed, layer):
    _, outputs = watched(probed, layer)
    by_hand = outputs[layer].flatten(2).square().mean((0, 2)).sqrt()
    torch.testing.assert_close(value(probed[3], layer, "rms"), by_hand, rtol=1e-4, atol=0)


@pytest.mark.parametrize("block", ["down_blocks.0.resnets.0", "up_blocks.1.resnets.0"])
def test_the_update_of_a_block_is_that_of_hooks_of_ones_own(probed, block):
    names = [block, f"{block}.conv2"]
    shortcut = f"{block}.conv_shortcut"
    if shortcut in named_layers(probed[1]):
        names.append(shortcut)
    inputs, outputs = watched(probed, *names)
    skip = outputs.get(shortcut, inputs[block])
    by_hand = (norm(outputs[names[1]]) / norm(skip)).mean(0)
    torch.testing.assert_close(value(probed[3], block, "rel_update"), by_hand, rtol=1e-4, atol=0)


def test_the_update_of_attention_is_that_of_hooks_of_ones_own(probed):
    block = "mid_block.attentions.0"
    inputs, outputs = watched(probed, block, f"{block}.to_out.0")
    by_hand = (norm(outputs[f"{block}.to_out.0"]) / norm(inputs[block])).mean(0)
    torch.testing.assert_close(value(probed[3], block, "rel_update"), by_hand, rtol=1e-4, atol=0)


def test_active_fractions_are_of_activations(probed):
    layer = "up_blocks.0.resnets.0.conv1"
    inputs, _ = watched(probed, layer)
    by_hand = (inputs[layer] > 0).double().flatten(2).mean((0, 2))
    torch.testing.assert_close(value(probed[3], layer, "active_fraction"), by_hand, rtol=1e-3, atol=0)
    assert not len(value(probed[3], "conv_in", "active_fraction"))


def test_layers_know_their_place(probed):
    frame = probed[3].frame.drop_duplicates("layer").set_index("layer")
    places = {
        "down_blocks.0.resnets.0.conv1": ("enc", 16),
        "down_blocks.1.resnets.0.conv1": ("enc", 8),
        "mid_block.resnets.1": ("mid", 8),
        "up_blocks.0.resnets.0.conv_shortcut": ("dec", 8),
        "up_blocks.1.resnets.1.conv2": ("dec", 16),
    }
    for name, where in places.items():
        assert (frame.stage[name], frame.resolution[name]) == where
    assert frame.block["mid_block.attentions.0.to_q"] == "mid_block.attentions.0"


def test_networks_that_resample_in_blocks(pictures):
    network = unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=3,
    )
    result = probe(wrap(network, scheduler=DDPMScheduler()), 3, data=pictures, layers="all", n=4, progress=False)
    down, up = "down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"
    assert len(value(result, up, "rel_update")) == 3
    assert not len(value(result, down, "rel_update"))  # its skip path is pooled inside, where no hook sees it
    assert not len(value(result, f"{down}.conv1", "active_fraction"))
    assert len(value(result, f"{down}.conv2", "active_fraction")) == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_in_low_precision_is_probed_as_it_is(pictures, compiled):
    def rms(network, **options):
        model = wrap(network, scheduler=DDPMScheduler())
        result = probe(model, [50.0, 0.5], data=pictures, n=4, progress=False, **options)
        return torch.tensor(result.frame[result.frame.stat == "rms"].value.to_numpy())

    exact = rms(unet())
    network = unet().bfloat16()
    if compiled:
        network = torch.compile(network, backend="eager")
    for found in (rms(network), rms(unet(), dtype="bfloat16")):
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
        assert not torch.equal(found, exact)


def test_the_middle_stands_before_the_decoder():
    names = list(inventory(unet()))
    first = {
        part: next(i for i, n in enumerate(names) if n.startswith(part))
        for part in ("down_blocks", "mid_block", "up_blocks")
    }
    assert first["down_blocks"] < first["mid_block"] < first["up_blocks"]
    assert sorted(names) == sorted(n for n, _ in unet().named_modules() if n)
    depths = [layer.depth for layer in inventory(unet()).values()]
    assert depths == sorted(depths)


def test_it_is_told_another_level_and_the_input_stays(pictures):
    network = Answer(torch.zeros(2, 1, 4, 4))
    x, sigma, told = torch.randn(2, 1, 4, 4), sigma_at(torch.tensor([100, 900])), sigma_at(torch.tensor([500, 500]))
    model = wrap(network, prediction="epsilon", alphas_cumprod=ABAR)
    plain = model(x, sigma), network.sample
    crossed = model(x, sigma, told=told), network.sample
    for a, b in zip(plain, crossed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(network.timestep, torch.tensor([500.0, 500.0]), rtol=0, atol=1e-3)
    net = wrap(unet(), prediction="epsilon", alphas_cumprod=ABAR)
    effects = probe(net, [10.0, 0.1], told="cross", data=pictures, n=4, stats="rms").effects("rms")
    assert effects.loc["conv_in", "input"] == pytest.approx(1)  # before anything is told
    assert effects["told"].max() > 0.001
    with pytest.raises(GddlabError, match=r"sigma 500 in told: this network accepts"):
        probe(net, [10.0], told=500.0, data=pictures, n=1)
