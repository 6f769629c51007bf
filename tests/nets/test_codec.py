import copy
import re

import diffusers
import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.nets import Codec
from gddlab.nets.codec import EDM2
from tests.models import deep_vae, network, vae, video_vae


def made(**changes):
    torch.manual_seed(0)
    return vae(**changes)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5305, 0.0609)])
def test_latents_are_shifted_and_scaled_as_the_pipelines_do_it(scale, shift):
    net = made(scale=scale, shift=shift)
    codec, images = Codec.of(net), torch.rand(3, 3, 16, 16) * 2 - 1
    assert (codec.channels, codec.factor) == (4, 2)
    with torch.no_grad():
        latents = codec.encode(images)
        mean = net.encode(images).latent_dist.mean
        torch.testing.assert_close(latents, (mean - (shift or 0)) * scale)
        torch.testing.assert_close(codec.decode(latents), net.decode(latents / scale + (shift or 0)).sample)
        torch.testing.assert_close(codec.encode(images), latents, rtol=0, atol=0)  # no sample of the posterior


def test_factors_of_each_channel():
    mean, std = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
    net = made(scale=0.5, latents_mean=mean, latents_std=std)
    codec, images = Codec.of(net), torch.rand(1, 3, 16, 16) * 2 - 1
    m, s = (torch.tensor(x).view(1, 4, 1, 1) for x in (mean, std))
    with torch.no_grad():
        latents = codec.encode(images)
        torch.testing.assert_close(latents, (net.encode(images).latent_dist.mean - m) * 0.5 / s)
        torch.testing.assert_close(codec.decode(latents), net.decode(latents * s / 0.5 + m).sample)


def test_other_autoencoders():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    deep = deep_vae()
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with torch.no_grad():
        torch.testing.assert_close(Codec.of(deep).encode(images), deep.encode(images).latent * 0.41407)
        torch.testing.assert_close(Codec.of(tiny.eval()).encode(images), tiny.encode(images).latents)
        for net in (deep, tiny):
            codec = Codec.of(net)
            latents = codec.encode(images)
            assert codec.image_shape(tuple(latents.shape[1:])) == (3, 16, 16) == tuple(codec.decode(latents).shape[1:])
            assert codec.latent_shape(16) == tuple(latents.shape[1:])
    with pytest.raises(GddlabError, match="vae= is a UNet2DModel: accepted are AutoencoderKL"):
        Codec.of(network("unet2d"))
    with pytest.raises(GddlabError, match=re.escape("images of 15 x 16: this codec takes multiples of 2")):
        Codec.of(deep).encode(torch.zeros(1, 3, 15, 16))


def test_half_precision_is_not_computed_in():
    exact = made()
    exact.decoder.conv_in.weight.data *= 3e4  # overflows in float16, as SDXL's does
    half = copy.deepcopy(exact).half()
    codec, latents = Codec.of(half), torch.randn(1, 4, 8, 8) * 10
    assert next(half.parameters()).dtype == torch.float16  # the pipeline's own stays as it was
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = codec.decode(latents)
    assert out.dtype == torch.float32 and out.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(out, Codec.of(exact).decode(latents), rtol=0.05, atol=0.05)
    state = torch.get_rng_state()
    Codec.of(half)
    assert torch.equal(torch.get_rng_state(), state)


def test_edm2_takes_images_of_0_to_1():
    net = made()
    codec, images = Codec.edm2(net), torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in EDM2[:2])
    with torch.no_grad():
        latents = codec.encode(images)
        raw = net.encode((images + 1) / 2).latent_dist.mean
        torch.testing.assert_close(latents, (raw - mean) / std * 0.5)
        torch.testing.assert_close(codec.decode(latents), 2 * net.decode(latents / 0.5 * std + mean).sample - 1)
    with pytest.raises(GddlabError, match="makes 8 channels"):
        Codec.edm2(vae(latent_channels=8))


def test_parts_do_not_change_the_latents(monkeypatch):
    codec, images = Codec.of(made()), torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        whole = codec.encode(images), codec.decode(codec.encode(images))
        monkeypatch.setattr("gddlab.nets.codec.PIXELS", 2 * 16 * 16)
        parts = codec.encode(images), codec.decode(codec.encode(images))
    torch.testing.assert_close(parts, whole)


def test_an_autoencoder_that_is_brought_to_the_images_can_be_trained_afterwards(monkeypatch):
    own, modes = made(), []
    codec, to = Codec.of(own), own.to
    monkeypatch.setattr(own, "to", lambda device: (modes.append(torch.is_inference_mode_enabled()), to("cpu"))[1])
    with torch.inference_mode(), codec._at(torch.device("meta")):
        assert torch.is_inference_mode_enabled()
    assert modes == [False, False] and not any(p.is_inference() for p in own.parameters())


def test_an_image_is_one_frame_of_a_video():
    own = video_vae()
    codec = Codec.of(own)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (own.config.latents_mean, own.config.latents_std))
    with torch.no_grad():
        latents = codec.encode(images)
        want = (own.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
        torch.testing.assert_close(latents, want)
        torch.testing.assert_close(codec.decode(latents), own.decode((want * std + mean)[:, :, None]).sample[:, :, 0])
    assert (codec.channels, codec.factor) == (4, 2) and codec.decode(latents).shape == images.shape


@pytest.mark.parametrize("x", [torch.zeros(3, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(0, 3, 16, 16), [1], None])
def test_what_is_no_image_is_refused(x):
    codec = Codec.of(vae())
    with pytest.raises(GddlabError, match=r"images.*: this codec takes a tensor, \(n, 3, height, width\)"):
        codec.encode(x)
    with pytest.raises(GddlabError, match=r"latents.*: this codec takes a tensor, \(n, 4, height, width\)"):
        codec.decode(x)


def test_a_damaged_configuration_is_refused():
    own = vae()
    own.register_to_config(scaling_factor="x")
    with pytest.raises(GddlabError, match="AutoencoderKL whose configuration is damaged"):
        Codec.of(own)
