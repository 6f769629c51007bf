"""Networks of pipelines: what they are shown, in which numbers, and where."""

import copy
import inspect
import itertools
import re

import diffusers
import numpy as np
import pytest
import torch

import gddlab
from gddlab import lens, patch, sample, trace
from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.nets import PURE, Codec, Conditioning, Path
from gddlab.nets.denoiser import Wrapped, data_std
from gddlab.nets.io import make_student
from gddlab.probing import estimate, probe
from gddlab.probing.inputs import Inputs
from gddlab.probing.result import network_meta
from gddlab.teachers import wrap
from tests.models import CHANNELS, NETWORKS, NEWER, SIDE, network, pipeline, vae
from tests.probing.networks import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos():
    images = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    return ImageDataset(images, None, classes=0, name="photos", source="random")


def wrapped(name, n=2, **options):
    if name == "unet2d":
        return wrap(network(name), scheduler=diffusers.DDPMScheduler(), **options)
    pipe, call = pipeline(name, n)
    return wrap(pipe, cond=Conditioning.record(pipe, **call), img_resolution=SIDE, **options)


def values(result):
    return torch.tensor(result.frame.value.to_numpy(copy=True))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "dit"])
def test_images_are_shown_as_latents(name, photos):
    net = wrapped(name)
    inputs = Inputs(net, [5.0, 1.0], data=photos, n=4)
    x, sigma, labels = inputs.rows(0, 4, device=CPU)
    with torch.no_grad():
        latents = net.codec.encode(photos.images(inputs._index))
    noise = inputs.noise(0, 4)
    torch.testing.assert_close(x.unflatten(0, (4, 2))[:, 1], latents + noise)
    assert inputs.shape == (CHANNELS, SIDE, SIDE) and sigma.tolist() == [5.0, 1.0] * 4
    assert labels.argmax(1).unflatten(0, (4, 2)).tolist() == [[0, 0], [1, 1]] * 2  # prompts in turn
    result = probe(
        net,
        [5.0, 1.0],
        data=photos,
        layers="re:.*(conv_in|x_embedder|pos_embed.proj)$",
        n=4,
        stats="rms",
        progress=False,
    )
    assert result.meta["codec"].startswith("Autoencoder") and len(result.meta["t"]) == 2
    assert result.meta["cond"] == {"hash": net.cond.hash, "names": ["0", "1"]} and result.meta["labels"] == "in turn"


def test_images_of_another_size_are_refused(photos, pictures):
    net = wrapped("sd")
    with pytest.raises(GddlabError, match=re.escape("has images (1, 16, 16), this network takes (3, 16, 16)")):
        Inputs(net, data=pictures, n=2)
    bare = wrap(net.gddlab_bare, path=net.path, cond=net.cond)
    assert bare.codec is None
    with pytest.raises(GddlabError, match="works on latents: give gddlab"):
        Inputs(bare, data=photos, n=2)
    assert Inputs(bare, states="prior", n=2).shape == (CHANNELS, SIDE, SIDE)


def test_a_prompt_can_be_chosen(photos):
    net = wrapped("sd3", 3)
    for given, ids in ((2, [2, 2]), ([1, 0], [1, 0]), (None, [1, 2])):
        labels = Inputs(net, 2, data=photos, n=2, start=1, class_labels=given).labels
        assert labels.argmax(1).tolist() == ids
    with pytest.raises(GddlabError, match=r"give 2 ids in 0\.\.2"):
        Inputs(net, 2, data=photos, n=2, class_labels=3)


def test_noise_levels_may_be_times():
    sd, flow = wrapped("sd"), wrapped("sd3")
    assert Inputs(sd, [999, 500, 1], unit="t", states="prior", n=1).sigmas == [sd.path.sigma(t) for t in (999, 500, 1)]
    found = Inputs(flow, [1000, 500, 100], unit="t", states="prior", n=1).sigmas
    assert found == pytest.approx([PURE, 1.0, 1 / 9])
    even = Inputs(flow, 5, unit="t", states="prior", n=1)
    times = np.array(even.describe()["t"])
    np.testing.assert_allclose(np.diff(times), np.diff(times)[0], rtol=1e-3)
    assert even.sigmas[0] == pytest.approx(80, rel=1e-4) and even.sigmas[-1] == pytest.approx(0.002, rel=1e-3)
    crossed = Inputs(sd, [900, 100], unit="t", told=[500], states="prior", n=1)
    assert crossed.told == [sd.path.sigma(500)]
    result = probe(sd, [999, 1], unit="t", states="prior", layers="conv_in", n=1, stats="rms", progress=False)
    assert result.meta["t"] == pytest.approx([999, 1], abs=1e-3)
    assert estimate(sd, [999, 1], unit="t", states="prior", layers="conv_in", n=1).sigmas == 2
    own = tiny()
    own.path = Path.edm()
    assert Inputs(own, [0.0], unit="t", states="prior", n=1).sigmas == [1.0]


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([1000.5], "takes steps 0 to 999"),
        ([-1], "takes steps 0 to 999"),
        ("99", "give a whole number, or a list of times"),
    ],
)
def test_times_outside_of_the_path_are_refused(times, says):
    with pytest.raises(GddlabError, match=says):
        Inputs(wrapped("sd"), times, unit="t", states="prior", n=1)
    with pytest.raises(GddlabError, match="this network has no time of its own"):
        Inputs(tiny(), [1.0], unit="t", states="prior", n=1)


def test_pure_noise_is_a_noise_level(photos):
    net = wrapped("sd3")
    x, sigma, labels = Inputs(net, [1000, 500], unit="t", data=photos, n=1).rows(0, 1, device=CPU)
    seen = []
    net.gddlab_bare.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    net(x, sigma, labels)
    assert seen[0]["timestep"].tolist() == [1000.0, 500.0]
    torch.testing.assert_close(seen[0]["hidden_states"][0], x[0] / PURE)
    assert seen[0]["hidden_states"][0].std().item() == pytest.approx(1, abs=0.2)
    walk = Inputs(net, [PURE, 1.0, 0.1], states="trajectory", n=2)
    states = walk.rows(0, 2, device=CPU)[0].unflatten(0, (2, 3))
    assert states[:, 1:].isfinite().all()
    with torch.no_grad():
        first = net(states[:, 0], PURE, walk.labels)
    short = Inputs(net, [PURE, 80.0], states="trajectory", n=2).rows(0, 2, device=CPU)[0].unflatten(0, (2, 2))
    torch.testing.assert_close(short[:, 1], first + 80 / PURE * short[:, 0])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_probed(name):
    net = wrapped(name)
    layers = "re:.*(conv_in|x_embedder|pos_embed.proj|patch_embed.proj|conv_out|proj_out(_2)?)$"
    result = probe(net, [3.0, 0.5], states="prior", layers=layers, n=2, stats="rms", progress=False)
    assert np.isfinite(result.frame.value).all() and len(result.frame) >= 4
    one = probe(net, [3.0, 0.5], states="prior", layers=layers, n=2, stats="rms", batch_size=1, progress=False)
    torch.testing.assert_close(values(one), values(result), rtol=1e-4, atol=0)


LINEAR = {
    "layers": "re:transformer_blocks.*(to_q|net.2)$",
    "stats": "rms",
    "n": 2,
    "progress": False,
    "states": "prior",
}


def test_weights_in_8_bits_are_computed_in_more():
    pipe, call = pipeline("sd3", 2)
    cond = Conditioning.record(pipe, **call)
    exact = probe(wrap(pipe, cond=cond), [3.0, 0.5], **LINEAR)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(p.dtype == torch.float8_e4m3fn for p in pipe.transformer.parameters())
    stored = probe(wrap(pipe, cond=cond), [3.0, 0.5], **LINEAR)
    torch.testing.assert_close(values(stored), values(exact), rtol=0.1, atol=0)
    assert not torch.equal(values(stored), values(exact))
    made = sample(wrap(pipe, cond=cond), 2, steps=2)
    assert made.isfinite().all()


def test_an_offloaded_network_is_the_network():
    accelerate = pytest.importorskip("accelerate")
    pipe, call = pipeline("sd3", 2)
    cond = Conditioning.record(pipe, **call)
    plain = probe(wrap(pipe, cond=cond), [3.0, 0.5], **LINEAR)
    images = sample(wrap(pipe, cond=cond), 2, steps=2)
    net = copy.deepcopy(pipe.transformer)
    accelerate.cpu_offload(net, CPU)
    assert all(p.is_meta for p in net.parameters())
    offloaded = wrap(net, path=wrap(pipe, cond=cond).path, cond=cond, vae=pipe.vae)
    found = probe(offloaded, [3.0, 0.5], **LINEAR)
    assert found.frame.equals(plain.frame)
    assert found.meta["model"] == plain.meta["model"]
    assert torch.equal(sample(offloaded, 2, steps=2), images)
    assert network_meta(offloaded)["model"]["fingerprint"] == plain.meta["model"]["fingerprint"]
    with pytest.raises(GddlabError, match="this network is offloaded and runs on cpu, omit device="):
        probe(offloaded, [3.0], device="cuda" if torch.cuda.is_available() else "mps:0", **LINEAR)


def test_a_network_offloaded_in_groups_is_the_network():
    pipe, call = pipeline("pixart", 2)
    cond = Conditioning.record(pipe, **call)
    plain = probe(wrap(pipe, cond=cond), [3.0, 0.5], **LINEAR)
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert probe(wrap(pipe, cond=cond), [3.0, 0.5], **LINEAR).frame.equals(plain.frame)


def test_a_network_compiled_block_by_block_is_the_network():
    net = wrapped("pixart")
    plain = probe(net, [3.0, 0.5], **LINEAR)
    for block in net.gddlab_bare.transformer_blocks:
        block.compile(backend="eager")
    assert probe(net, [3.0, 0.5], **LINEAR).frame.equals(plain.frame)


def test_quantised_networks_are_refused_in_one_line():
    net = torch.ao.quantization.quantize_dynamic(network("sd3"), {torch.nn.Linear}, dtype=torch.qint8)
    cond = Conditioning({"encoder_hidden_states": torch.zeros(1, 7, 12), "pooled_projections": torch.zeros(1, 10)})
    with pytest.raises(GddlabError, match="the network is quantised"):
        probe(wrap(net, path=Path.flow(1000.0), cond=cond), [1.0], states="prior", n=1)


def test_samples_are_decoded():
    net = wrapped("sd3", guidance=2.0)
    latents = sample(net, 3, steps=3, decode=False, solver="euler")
    images = sample(net, 3, steps=3, solver="euler", batch_size=2)
    assert images.shape == (3, 3, 16, 16) and latents.shape == (3, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(images, net.codec.decode(latents).clamp(-1, 1), rtol=1e-3, atol=1e-4)
    again = sample(net, 1, steps=3, solver="euler", decode=False, seed=1, class_labels=1)
    torch.testing.assert_close(again, latents[1:2], rtol=1e-3, atol=1e-4)  # prompts in turn
    assert not net.training and all(not m.training for m in net.modules())
    top = sample(net, 1, steps=3, solver="euler", decode=False, sigma_max=PURE)
    x = sample_by_hand(net, top.shape)
    torch.testing.assert_close(top, x.float(), rtol=1e-3, atol=1e-4)


def sample_by_hand(net, shape):
    from gddlab.sampling import karras_sigmas, latents

    x = latents([0], shape[1:]).double() * PURE
    sigmas = [*karras_sigmas(3, sigma_min=0.002, sigma_max=PURE).tolist(), 0.0]
    with torch.no_grad():
        for k, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
            image = net(x.float(), sigma, torch.eye(2)[:1]).double()
            x = image + lower / sigma * (x if k == 0 else x - image)
    return x


def test_what_cannot_be_sampled_is_refused():
    net = wrapped("sd")
    bare = wrap(net.gddlab_bare, path=net.path, cond=net.cond)
    with pytest.raises(GddlabError, match="no autoencoder is known: give gddlab"):
        sample(bare, 1)
    assert sample(bare, 1, steps=2, decode=False).shape == (1, CHANNELS, SIDE, SIDE)
    with pytest.raises(GddlabError, match="this network makes images, omit it"):
        sample(tiny(), 1, decode=False)
    with pytest.raises(GddlabError, match="does not say img_channels"):
        sample(wrap(torch.nn.Conv2d(1, 1, 1), lambda m, x, s, c: m(x)), 1)


def test_a_low_precision_network_is_sampled_in_float32():
    pipe, call = pipeline("sd3", 1)
    cond = Conditioning.record(pipe, **call)
    exact = sample(wrap(pipe, cond=cond), 1, steps=3, decode=False)
    pipe.transformer.bfloat16()
    seen = []
    net = wrap(pipe, cond=cond)
    net.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    low = sample(net, 1, steps=3, decode=False)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_copies_share_what_is_not_changed():
    net = wrapped("sd")
    twin = copy.deepcopy(net)
    assert isinstance(twin, Wrapped) and twin.cond is net.cond and twin.codec is net.codec
    assert isinstance(net.codec, Codec) and not any("vae" in n for n, _ in net.named_parameters())
    assert vae() is not None


@pytest.mark.parametrize("mode", ["bypass", "readout"])
def test_the_lens_shows_images(photos, mode, tmp_path):
    net = wrapped("sd")
    options = {"layers": "re:mid_block.resnets.\\d$", "data": photos, "n": 2, "mode": mode, "progress": False}
    seen = lens(net, [5.0, 1.0], **options, **({"fit": 4, "dims": 4} if mode == "readout" else {}))
    assert seen.images.shape[1:] == (2, 2, 3, 16, 16) and seen.clean.shape == (2, 3, 16, 16)
    inputs = Inputs(net, [5.0, 1.0], data=photos, n=2)
    x, sigma, labels = inputs.rows(0, 2, device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(seen.clean, net.codec.decode(net.codec.encode(photos.images(inputs._index))))
        out = net.codec.decode(net(x, sigma, labels)).unflatten(0, (2, 2)).transpose(0, 1)
    torch.testing.assert_close(seen.images[-1], out, rtol=1e-3, atol=1e-3)
    seen.grid().savefig(tmp_path / "lens.png")


def test_a_trace_compares_images():
    net = wrapped("sd")
    found = trace(net, 2, layers="conv_out", n=2, mode="resample", extractor=None, progress=False)
    assert np.isfinite(found.frame.value).all()
    bare = wrap(net.gddlab_bare, path=net.path, cond=net.cond)
    with pytest.raises(GddlabError, match="makes latents, and images are compared here"):
        trace(bare, 2, layers="conv_out", n=2, mode="resample", extractor=None, progress=False)


TIMED = {
    "probe": {"layers": "conv_in", "stats": "rms"},
    "ablate": {"layers": "conv_in", "mode": "zero"},
    "attribute": {"layers": "conv_in", "method": "LayerActivation"},
    "grad_probe": {"layers": "conv_in", "batch_size": 2},
    "decode": {"layers": "conv_in", "n": 3, "held_out": 2, "dims": 2, "targets": "noise"},
    "lens": {"layers": "conv_in"},
    "trace": {"layers": "conv_in", "mode": "zero", "extractor": None},
}
LEVELS = {"probe", "estimate", "patch", *TIMED}
"""The public calls that take noise levels."""


def test_every_call_that_takes_noise_levels_takes_times():
    public = {name: getattr(gddlab, name) for name in gddlab.__all__}
    taking = {
        name
        for name, call in public.items()
        if inspect.isfunction(call)
        and any(p.annotation == "Timesteps" for p in inspect.signature(call).parameters.values())
    }
    assert taking == LEVELS
    assert all("unit" in inspect.signature(public[name]).parameters for name in LEVELS)


@pytest.mark.filterwarnings("ignore:.*readouts")
@pytest.mark.parametrize("name", TIMED)
def test_noise_levels_are_times_in_every_call(name, photos):
    net, options = wrapped("sd"), {"n": 2, "progress": False} | TIMED[name]
    how = {"steps" if name == "trace" else "timesteps": [900, 500, 100], "unit": "t"}
    options |= {} if name == "trace" else {"data": photos}
    found = getattr(gddlab, name)(net, **how, **options)
    assert list(found.sigmas) == [net.path.sigma(t) for t in (900, 500, 100)]
    own = {"img_channels": CHANNELS, "img_resolution": SIDE, "vae": net.codec}
    without = wrap(net.gddlab_bare, lambda model, x, sigma, labels: x, **own)
    with pytest.raises(GddlabError, match="this network has no time of its own"):
        getattr(gddlab, name)(without, **how, **options)


def test_the_lens_shows_default_levels_within_the_range(photos):
    net = wrapped("sd")
    for unit in ("sigma", "t"):
        found = lens(net, unit=unit, data=photos, layers="conv_in", n=1, progress=False)
        assert list(found.sigmas) == pytest.approx([net.sigma_max, 5.0, 1.0, 0.2], rel=1e-6)


def test_times_have_no_use_without_noise_levels():
    net = tiny()
    with pytest.raises(GddlabError, match="unit= has no use with a loss of your own"):
        gddlab.grad_probe(net, lambda net: 0, [], unit="t")
    with pytest.raises(GddlabError, match="this network has no time of its own"):
        trace(make_student(net), unit="t", n=2, progress=False)


def test_patches_take_times():
    teacher = tiny()
    student = make_student(teacher)
    teacher.path = Path.edm()
    how = {"layers": "model.enc.8x8_block0.conv0", "n": 2, "data": "digits", "progress": False}
    assert patch(student, teacher, into="teacher", timesteps=[0.0], unit="t", **how).sigmas == [1.0]


def test_losses_are_weighted_by_the_data_of_the_network(photos):
    how = {"data": photos, "layers": "conv_in", "n": 2, "progress": False}
    latent, shown = wrapped("sd"), {"img_channels": CHANNELS, "img_resolution": SIDE}
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
    stretched = wrap(latent.gddlab_bare, path=Path.of(scheduler), cond=latent.cond, vae=latent.codec)
    assert [data_std(net) for net in (latent, stretched, tiny(), tiny(sigma_data=0.25))] == [1.0, 0.7, 0.5, 0.25]
    assert data_std(wrap(tiny(sigma_data=0.25, label_dim=2), guidance=2.0)) == 0.25
    assert data_std(wrap(torch.nn.Identity(), lambda m, x, s, c: x, **shown)) == 0.5
    for net, s in ((latent, 1.0), (stretched, 0.7)):
        found = gddlab.ablate(net, [2.0, 0.5], mode="zero", **how)
        assert found.meta["sigma_data"] == s
        inputs = Inputs(net, [2.0, 0.5], data=photos, n=2)
        x, sigma, labels = inputs.rows(0, 2, device=CPU)
        with torch.no_grad():
            intact = net(x, sigma, labels)
            handle = net.gddlab_bare.conv_in.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            changed = (net(x, sigma, labels) - intact).square().mean((1, 2, 3))
            handle.remove()
        weight = (sigma**2 + s**2) / (s * sigma) ** 2
        want = (weight * changed).sqrt().reshape(2, 2).mean(0)
        np.testing.assert_allclose(found.pivot("ablation_output_zero").to_numpy()[0], want.numpy(), rtol=1e-4)
        gradients = gddlab.grad_probe(net, timesteps=[2.0, 0.5], batch_size=2, **how).pivot("fisher").to_numpy()[0]
        with torch.enable_grad():
            clean = inputs.clean(0, 2).repeat_interleave(2, 0)
            weights = [*net.gddlab_bare.conv_in.parameters()]
            for k in range(2):
                error = (net(x, sigma, labels) - clean).square().mean((1, 2, 3))
                parts = torch.autograd.grad((weight * error)[k::2].mean(), weights)
                squares = sum(g.double().square().sum() for g in parts) / sum(w.numel() for w in weights)
                assert gradients[k] == pytest.approx(squares.item(), rel=1e-3)
        attributed = gddlab.attribute(net, [2.0, 0.5], method="LayerConductance", steps=2, **how)
        assert attributed.meta["sigma_data"] == s


def test_attention_may_be_fused_between_two_probes():
    net = wrapped("sd")
    how = LINEAR | {"layers": "attention"}
    apart = probe(net, [3.0, 0.5], **how)
    outputs = {name: frame for name, frame in apart.frame.groupby("layer") if name.endswith("to_out.0")}
    net.gddlab_bare.fuse_qkv_projections()
    fused = probe(net, [3.0, 0.5], **how)
    names = {*fused.frame.layer}
    assert any(n.endswith("attn1.to_qkv") for n in names) and any(n.endswith("attn2.to_kv") for n in names)
    assert not any(n.endswith(("attn1.to_q", "attn2.to_k")) for n in names) and "not_run" not in fused.meta
    for name, frame in outputs.items():
        after = fused.frame[fused.frame.layer == name]
        np.testing.assert_allclose(after.value, frame.value, rtol=1e-4)
    with pytest.raises(GddlabError, match="did not run"):
        probe(net, [3.0], **how | {"layers": next(n for n in names if n.endswith("to_qkv")).replace("to_qkv", "to_q")})


def test_attention_processors_do_not_change_what_is_measured():
    from diffusers.models import attention_processor

    net = wrapped("sd")
    found = []
    for kind in ("AttnProcessor2_0", "AttnProcessor"):
        net.gddlab_bare.set_attn_processor(getattr(attention_processor, kind)())
        found.append(probe(net, [3.0, 0.5], **LINEAR | {"layers": "all"}))
    assert list(found[0].frame.layer) == list(found[1].frame.layer)
    torch.testing.assert_close(values(found[0]), values(found[1]), rtol=1e-4, atol=0)


def test_checkpointed_blocks_have_the_same_gradients(photos):
    net = wrapped("sd3")
    how = {"data": photos, "layers": "attention", "n": 2, "batch_size": 2, "progress": False}
    plain = gddlab.grad_probe(net, timesteps=[3.0, 0.5], **how)
    net.gddlab_bare.enable_gradient_checkpointing()
    again = gddlab.grad_probe(net, timesteps=[3.0, 0.5], **how)
    assert list(again.frame.layer) == list(plain.frame.layer)
    keep = plain.frame.stat.isin(["fisher", "taylor"]).to_numpy()
    torch.testing.assert_close(values(again)[keep], values(plain)[keep], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", NEWER)
def test_newer_networks_are_measured_with_every_preset(name):
    pipe, call = pipeline(name, 2)
    net = wrap(pipe, cond=Conditioning.record(pipe, **call), guidance=4.0)
    assert net.latent and data_std(net) == 1.0
    for preset in ("block", "attention", "mlp", "modulation", "norm", "linear", "all"):
        how = {"states": "prior", "layers": preset, "n": 2, "progress": False}
        found = probe(net, [3.0, 0.5], branch="all", stream="all", stats="rms", **how)
        assert {*found.frame.branch} == {"cond", "uncond"} and np.isfinite(found.frame.value).all()
    ablated = gddlab.ablate(net, [3.0], mode="zero", **how | {"layers": "block"})
    assert (ablated.frame.value > 0).all()
