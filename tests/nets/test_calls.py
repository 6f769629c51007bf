import dataclasses
import itertools
import re
import warnings

import diffusers
import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.nets import PURE, Call, Conditioning, Path
from gddlab.teachers import wrap
from tests.models import CHANNELS, FACTOR, NETWORKS, NEWER, PIPELINES, SIDE, STABLE_DIFFUSION, network, pipeline

ABAR = diffusers.DDPMScheduler().alphas_cumprod


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def latents_of(pipe, call):
    """The pipeline's final latents, and what its network saw in each call: rows and times."""
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    names = [n for n in type(net).forward.__code__.co_varnames if n in ("sample", "hidden_states")]
    seen, last = [], []

    def hook(module, args, kwargs):
        rows = kwargs.get("hidden_states", args[0] if args else None)
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append((rows.clone(), time.clone().double().flatten()[0].item()))

    step = pipe.scheduler.step

    def kept(*args, **kwargs):
        out = step(*args, **kwargs)
        last.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    handle = net.register_forward_pre_hook(hook, with_kwargs=True)
    pipe.scheduler.step = kept
    try:
        with torch.no_grad():
            pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **call)
    finally:
        handle.remove()
        del pipe.scheduler.step
    assert len(names) <= 1
    return last[-1], seen


WAYS = [(name, doubled) for name in PIPELINES for doubled in (None, True, False)]


@pytest.mark.parametrize(("name", "doubled"), [w for w in WAYS if w[0] != "flux" or w[1] is None])
def test_eulers_method_over_the_wrapped_network_makes_the_pipelines_latents(name, doubled):
    pipe, call = pipeline(name)
    wanted, seen = latents_of(pipe, call)
    cond = Conditioning.record(pipe, **call)
    form = None
    if doubled is not None:
        form = dataclasses.replace(Call.of(pipe.unet if hasattr(pipe, "unet") else pipe.transformer), doubled=doubled)
    if name == "flux":  # its guidance is an input
        net = wrap(pipe, cond=cond)
    else:
        net = wrap(pipe, cond=cond, guidance=4.0, call=form)
    times = [time for _, time in seen]
    sigmas = [net.path.sigma(t) for t in times]
    first = net.call.unpack(seen[0][0][:1], cond.shape).double()  # both rows begin with the same noise
    x = first / net.path.coefficients(torch.tensor(sigmas[0]).double().view(1, 1, 1, 1)).c_in
    watched = []
    handle = net.gddlab_bare.register_forward_pre_hook(
        lambda m, a, k: watched.append((k[net.call.sample].clone(), k[net.call.time].double()[0].item())),
        with_kwargs=True,
    )
    with torch.no_grad():
        for sigma, lower in itertools.pairwise([*sigmas, 0.0]):
            image = net(x, sigma)
            x = image + lower / PURE * x if sigma >= PURE else image + lower / sigma * (x - image)
    handle.remove()
    final = wanted if wanted.ndim == 3 else wanted[:1]
    assert relative(net.call.pack(x), final.double()) < 1e-5
    if doubled is not False:  # and on the way the network was given the same
        for (rows, time), (theirs, when) in zip(watched, seen, strict=True):
            assert rows.shape == theirs.shape
            assert relative(rows, theirs) < 1e-5
            assert time == pytest.approx(when, rel=1e-6)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("unet2d", "flux")])
def test_a_doubled_call_is_two_calls_and_each_branch_is_the_network_without_guidance(name):
    pipe, call = pipeline(name, n=2)
    cond = Conditioning.record(pipe, **call)
    assert len(cond) == 2
    x, sigma = torch.randn(2, CHANNELS, SIDE, SIDE).double(), torch.tensor([5.0, 0.5])
    net = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).double()  # float32 rounds by the size of the batch
    form = Call.of(net)
    alone = wrap(pipe, cond=cond)
    opposite = wrap(pipe, cond=Conditioning(cond.negative, cond.shared, cond.negative))
    with torch.no_grad():
        both = [wrap(pipe, cond=cond, guidance=3.0, call=dataclasses.replace(form, doubled=d)) for d in (True, False)]
        found = [guided(x, sigma) for guided in both]
        wanted = opposite(x, sigma) + 3 * (alone(x, sigma) - opposite(x, sigma))
    assert relative(found[0], found[1]) < 1e-6
    assert relative(found[0], wanted) < 2e-6
    assert relative(alone(x, sigma), wanted) > 1e-3
    assert both[0].branches == (("cond", "uncond") if name == "dit" else ("uncond", "cond"))


def test_true_guidance_of_flux_is_two_calls():
    pipe, call = pipeline("flux")
    _, guided = pipeline("sd3")  # its embeddings have the same sizes
    negative = {k: v for k, v in guided.items() if k.startswith("negative")} | {"true_cfg_scale": 4.0}
    wanted, seen = latents_of(pipe, call | negative)
    assert len(seen) == 8
    cond = Conditioning.record(pipe, **call, **negative)
    net = wrap(pipe, cond=cond, guidance=4.0)
    assert net.branches == ("cond", "uncond")
    sigmas = [net.path.sigma(t) for _, t in seen[::2]]
    x = net.call.unpack(seen[0][0], cond.shape).double() * PURE
    with torch.no_grad():
        for sigma, lower in itertools.pairwise([*sigmas, 0.0]):
            image = net(x, sigma)
            x = image + lower / PURE * x if sigma >= PURE else image + lower / sigma * (x - image)
    assert relative(net.call.pack(x), wanted.double()) < 1e-5


@pytest.mark.parametrize("guidance", [None, 4.0])
@pytest.mark.parametrize("name", NEWER)
def test_newer_pipelines_are_walked_too(name, guidance):
    pipe, call = pipeline(name)
    if guidance is None:
        call |= {"true_cfg_scale": 1.0} if name == "qwen" else {"guidance_scale": 1.0}
    wanted, seen = latents_of(pipe, call)
    cond = Conditioning.record(pipe, **call)
    assert (cond.negative is None) == (guidance is None) and cond.shape == (CHANNELS, SIDE, SIDE)
    net = wrap(pipe, cond=cond, guidance=guidance)
    sigmas = [net.path.sigma(t) for _, t in seen[:: 2 if guidance and not net.call.doubled else 1]]
    x = net.call.unpack(seen[0][0][:1], cond.shape).double() * PURE
    with torch.no_grad():
        for sigma, lower in itertools.pairwise([*sigmas, 0.0]):
            image = net(x, sigma)
            x = image + lower / PURE * x if sigma >= PURE else image + lower / sigma * (x - image)
    assert relative(net.call.pack(x), wanted.double()) < 1e-5
    if guidance:
        assert net.branches == net.call.order and (", rescaled" in repr(net.card)) == (name != "auraflow")
        plain = dataclasses.replace(net.call, rescale=False)
        assert (relative(wrap(net, call=plain)(x, 1.0), net(x, 1.0)) > 1e-3) == (name != "auraflow")


def test_a_mask_of_one_branch_is_all_ones_in_the_other():
    pipe, call = pipeline("qwen")
    shorter = call["negative_prompt_embeds"][:, :5]
    cond = Conditioning.record(pipe, **call | {"negative_prompt_embeds": shorter, "negative_prompt_embeds_mask": None})
    assert cond.negative["encoder_hidden_states_mask"].tolist() == [[1] * 5]
    assert cond.rows["encoder_hidden_states_mask"].tolist() == [[1] * 5 + [0] * 2]
    x = torch.randn(1, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        found = wrap(pipe, cond=cond, guidance=2.0)(x, 1.0)
        without = {"encoder_hidden_states": shorter}
        net = wrap(pipe, cond=Conditioning(without))
        c = net.path.coefficients(torch.ones(1, 1, 1, 1))
        parts = [(wrap(pipe, cond=w)(x, 1.0) - c.c_skip * x) / c.c_out for w in (cond, Conditioning(without))]
        guided = net.call.pack(parts[1] + 2 * (parts[0] - parts[1]))
        guided *= net.call.pack(parts[0]).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        assert relative(found, c.c_skip * x + c.c_out * net.call.unpack(guided, (CHANNELS, SIDE, SIDE))) < 1e-5


def test_qwen_networks_for_several_images_are_refused():
    with pytest.raises(GddlabError, match="with zero_cond_t is given more than one image: give denoise="):
        Call.of(network("qwen", zero_cond_t=True))
    with pytest.raises(GddlabError, match=r"unknown places 'ids'"):
        Call(places="ids")


PREDICTIONS = [
    (diffusers.DDPMScheduler, {"prediction_type": p, "clip_sample": False})
    for p in ("epsilon", "v_prediction", "sample")
]
PREDICTIONS += [
    (diffusers.DDIMScheduler, {"prediction_type": p, "clip_sample": False, **STABLE_DIFFUSION})
    for p in ("epsilon", "v_prediction", "sample")
]


@pytest.mark.parametrize("t", [0, 1, 300, 700, 999])
@pytest.mark.parametrize(("kind", "config"), PREDICTIONS)
def test_the_image_is_that_of_schedulers_with_steps(kind, config, t):
    scheduler, net = kind(**config), network("sd").double()
    cond = Conditioning({"encoder_hidden_states": torch.randn(1, 7, 16)})
    model = wrap(net, scheduler=scheduler, cond=cond)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(1000)
    seen = torch.randn(1, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    abar = model.path.alphas_cumprod[t]
    with torch.no_grad():
        answer = net(seen, t, encoder_hidden_states=cond.rows["encoder_hidden_states"].double()).sample
        wanted = scheduler.step(answer, t, seen).pred_original_sample
        found = model(seen / abar**0.5, ((1 - abar) / abar) ** 0.5)
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
        ),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_image_is_that_of_flow_schedulers(scheduler):
    net = network("sana").double()
    cond = Conditioning({"encoder_hidden_states": torch.randn(1, 7, 12)})
    model = wrap(net, scheduler=scheduler, cond=cond)
    scheduler.set_timesteps(5)
    seen = torch.randn(1, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    words = cond.rows["encoder_hidden_states"].double()
    for share in scheduler.sigmas[:-1].double().tolist():
        share = 1.0 if share > 1 - 1 / PURE else share  # UniPC's first
        if share == 1:
            sigma, x = PURE, seen * PURE
        else:
            sigma, x = share / (1 - share), seen / (1 - share)
        time = model.path.time(torch.tensor([sigma], dtype=torch.float64))
        with torch.no_grad():
            wanted = seen - share * net(seen, encoder_hidden_states=words, timestep=time).sample
            assert relative(model(x, sigma), wanted) < 1e-6
        assert time.item() == pytest.approx(1000 * share, rel=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_image_is_that_of_edms_scheduler(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    net = network("unet2d").double()
    model = wrap(net, scheduler=scheduler)
    scheduler.set_timesteps(5)
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    for i, sigma in enumerate(scheduler.sigmas[:-1].double()):
        time = model.path.time(sigma[None])
        # the scheduler takes the logarithm in float32: near sigma 1, where it is 0, that is absolute, not relative
        assert time.item() == pytest.approx(scheduler.timesteps[i].item(), rel=1e-6, abs=1e-7)
        with torch.no_grad():
            answer = net(scheduler.precondition_inputs(x * sigma, sigma), time).sample
            wanted = scheduler.precondition_outputs(x * sigma, answer, sigma)
            assert relative(model(x * sigma, sigma), wanted) < 1e-6


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 4, 6)])
def test_tokens_are_those_of_the_pipeline(shape):
    call = Call(patch=2)
    x = torch.randn(2, *shape)
    wanted = diffusers.FluxPipeline._pack_latents(x, 2, *shape)
    assert torch.equal(call.pack(x), wanted)
    assert torch.equal(call.unpack(wanted, shape), x)
    with pytest.raises(GddlabError, match="multiples of 2"):
        call.pack(torch.zeros(1, 4, 5, 4))


def test_times_stay_exact_where_the_network_is_not():
    net = network("sd3").bfloat16()
    cond = Conditioning({"encoder_hidden_states": torch.randn(1, 7, 12), "pooled_projections": torch.randn(1, 10)})
    seen = []
    net.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    model = wrap(net, path=Path.flow(1000.0), cond=cond)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([160.0, 320.0]))
    assert seen[0]["timestep"].dtype == torch.float32 and out.dtype == torch.float32
    assert seen[0]["hidden_states"].dtype == seen[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen[0]["timestep"][0] != seen[0]["timestep"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.check_times([320.0, 160.0])


def test_levels_that_a_network_rounds_to_one_time_are_named():
    pipe, call = pipeline("flux")
    pipe.transformer.bfloat16()
    net = wrap(pipe, cond=Conditioning.record(pipe, **call))
    with pytest.warns(UserWarning, match="rounds the times of sigma 320 and 300 to one"):
        net.check_times([320.0, 300.0, 1.0])


class Own(nn.Module):
    """Of a class that nobody knows: names of its own, two channels for one."""

    def __init__(self, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.classes = nn.Embedding(classes + 1, 4) if classes else None

    def forward(self, t, x, y=None):
        level = t.to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        out = self.conv(torch.cat([x, level], 1))
        if y is not None:
            out = out + self.classes(y)[:, :, None, None]
        return (out,)


def test_an_unknown_class_is_called_as_it_says():
    net = Own(classes=3)
    model = wrap(
        net,
        path=Path.flow(reversed=True),
        call=Call(sample="x", time="t", labels="y", null=3),
        img_channels=1,
        img_resolution=8,
        label_dim=3,
        guidance=2.0,
    )
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 3.0]), torch.eye(3)[[2, 0]]
    t = sigma / (1 + sigma)
    seen = (1 - t)[:, None, None, None] * x
    with torch.no_grad():
        c, u = (net(1 - t, seen, y)[0][:, :1] for y in (torch.tensor([2, 0]), torch.tensor([3, 3])))
        wanted = seen + t[:, None, None, None] * (u + 2 * (c - u))  # it predicts image - noise
        torch.testing.assert_close(model(x, sigma, labels), wanted)
    assert model.branches == ("uncond", "cond") and model.sample_argument == "x"


def test_guided_channels_are_the_first():
    net, x = Own(classes=3), torch.randn(1, 1, 8, 8)
    about = {"path": Path.flow(), "label_dim": 3, "img_channels": 1, "guidance": 2.0}
    form = Call(sample="x", time="t", labels="y", null=3)
    all_, none = (
        wrap(net, call=dataclasses.replace(form, guide_channels=k), **about)(x, 1.0, torch.eye(3)[:1]) for k in (1, 0)
    )
    plain = wrap(net, call=form, **about | {"guidance": None})(x, 1.0, torch.eye(3)[:1])
    torch.testing.assert_close(none, plain)
    assert not torch.allclose(all_, plain)


def test_an_answer_of_another_shape_is_refused():
    model = wrap(Own(), path=Path.flow(), call=Call(sample="x", time="t"), img_channels=1)
    x = torch.zeros(1, 1, 4, 4)
    for answer, found in (
        ({"a": x}, "a NoneType"),
        (x[:, :, :2], "(1, 1, 2, 4)"),
        (x[0], "(1, 4, 4)"),
        ((), "a NoneType"),
    ):
        model.gddlab_bare.forward = lambda t, x, answer=answer: answer
        with pytest.raises(GddlabError, match=re.escape(f"the network gave {found} for (1, 1, 4, 4): give denoise=")):
            model(x, 1.0)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("sd", {"in_channels": 9}, "out_channels=4 with in_channels=9"),
        ("flux", {"in_channels": 32, "out_channels": 16}, "out_channels=16 with in_channels=32"),
        ("sana", {"guidance_embeds": True}, "TrigFlow"),
        ("sd3", {"sample_size": (8, 16)}, "images here are square"),
    ],
)
def test_networks_that_take_more_are_refused(name, changes, says):
    if name == "sd3":
        net = network(name)
        net.register_to_config(**changes)
    else:
        net = network(name, **changes)
    with pytest.raises(GddlabError, match=re.escape(says)):
        wrap(net, path=Path.flow(1000.0))


def test_the_table_speaks_of_pixels_and_latents():
    assert FACTOR * SIDE == 16
    with pytest.raises(GddlabError, match="order="):
        Call(order=("cond", "cond"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sample": 3}, "sample=3: give the name of an argument"),
        ({"time": ""}, "time='': give the name of an argument"),
        ({"needs": (1,)}, "needs=1: give the name"),
        ({"patch": 2.5}, "patch=2.5: give a whole number"),
        ({"null": -1}, "null=-1: give a whole number"),
        ({"time_scale": float("nan")}, "time_scale=nan: give a number above 0"),
        ({"time_scale": 0}, "time_scale=0: give a number above 0"),
    ],
)
def test_calls_are_checked_when_they_are_made(given, says):
    with pytest.raises(GddlabError, match=says):
        Call(**given)
    assert Call(needs="words").needs == ("words",)
