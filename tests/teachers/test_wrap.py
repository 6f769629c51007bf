import dataclasses
import math
import re

import diffusers
import pytest
import torch
from torch import nn

import gddlab
from gddlab.errors import GddlabError
from gddlab.nets import PURE, Call, Conditioning, Path
from gddlab.nets.denoiser import Denoiser
from gddlab.nets.io import make_student
from gddlab.teachers import wrap
from tests.conftest import tiny_net
from tests.models import CHANNELS, PIPELINES, SIDE, network, pipeline, vae

FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
DDPM = diffusers.DDPMScheduler()
DPM_FLOW = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


def conditioned(name, n=2, **changes):
    pipe, call = pipeline(name, n, **changes)
    return pipe, Conditioning.record(pipe, **call)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_knows_its_shape_path_and_codec(name):
    pipe, cond = conditioned(name)
    net = wrap(pipe, cond=cond)
    side = 16 if name == "sana" else SIDE
    assert (net.img_channels, net.img_resolution, net.label_dim) == (CHANNELS, side, 2)
    assert net.latent and net.codec.vae is pipe.vae and net.codec.channels == CHANNELS
    assert net.path.kind == ("flow" if name in ("sd3", "flux", "sana") else "vp")
    assert net.sigma_max == PURE if net.path.kind == "flow" else net.sigma_max == net.path.sigma_max
    assert net.training is False and not any(m.training for m in net.modules())
    text = repr(net.card)
    for said in (
        net.card.network,
        "AutoencoderDC" if name == "sana" else "AutoencoderKL",
        net.path.prediction,
        "2 rec",
    ):
        assert said in text


def test_prompts_go_to_the_pipeline(tmp_path):
    from tests.models import with_text

    net = wrap(with_text(tmp_path), cond=["a b", "c"], guidance=4.0, img_resolution=8)
    assert net.cond.names == ("a b", "c") and net.branches == ("uncond", "cond") and net.label_dim == 2
    assert "a b, c" in repr(net.card) and "4, uncond and cond in one call" in repr(net.card)


def test_rows_of_the_conditioning_count_as_classes():
    pipe, cond = conditioned("sd3", 3)
    net = wrap(pipe, cond=cond)
    x, sigma = torch.randn(4, CHANNELS, SIDE, SIDE), torch.tensor([10.0, 5.0, 1.0, 0.5])
    with torch.no_grad():
        by_rows = net(x, sigma, torch.eye(3)[[2, 0, 1, 2]])
        by_hand = torch.cat(
            [wrap(pipe, cond=cond[[i]])(x[k : k + 1], sigma[k : k + 1]) for k, i in enumerate((2, 0, 1, 2))]
        )
        torch.testing.assert_close(by_rows, by_hand)
        torch.testing.assert_close(net(x, sigma, cond[[2, 0, 1, 2]]), by_rows, rtol=0, atol=0)
        in_turn = net(x, sigma)
        torch.testing.assert_close(in_turn, net(x, sigma, torch.eye(3)[[0, 1, 2, 0]]), rtol=0, atol=0)
        torch.testing.assert_close(net(x, sigma, cond[1]), net(x, sigma, cond[[1, 1, 1, 1]]), rtol=0, atol=0)
    assert not torch.allclose(by_rows, in_turn)
    with pytest.raises(GddlabError, match="conditioning of 3 for 4 images"):
        net(x, sigma, cond)
    with pytest.raises(GddlabError, match="not one-hot"):
        net(x, sigma, torch.zeros(4, 3))


def test_a_function_gets_the_conditioning_of_its_rows():
    cond, seen = Conditioning({"words": torch.arange(3.0)[:, None]}), []

    def denoise(model, x, sigma, given):
        seen.append(given)
        return x

    net = wrap(nn.Identity(), denoise, cond=cond, img_channels=1, img_resolution=4, branches=("uncond", "cond"))
    net(torch.zeros(2, 1, 4, 4), 1.0, torch.eye(3)[[2, 1]])
    assert seen[0].rows["words"].flatten().tolist() == [2, 1]
    assert net.branches == ("uncond", "cond") and net.label_dim == 3 and net.cond is cond


def test_conditioning_and_guidance_are_added_later():
    pipe, cond = conditioned("pixart")
    first = wrap(pipe, cond=cond[[0]])
    guided = wrap(first, guidance=3.0)
    other = wrap(guided, cond=cond)
    assert (guided.guidance, guided.label_dim, other.guidance, other.label_dim) == (3.0, 1, 3.0, 2)
    assert guided.gddlab_bare is first.gddlab_bare is pipe.transformer
    assert guided.codec is first.codec and guided.path == first.path and guided.card.name == first.card.name
    with pytest.raises(GddlabError, match="wrapped with denoise= already"):
        wrap(wrap(nn.Identity(), lambda m, x, s, c: x))


def test_gddlabs_own_networks_are_guided_too():
    net = tiny_net(label_dim=3)
    guided = wrap(net, guidance=2.5)
    x, sigma, labels = torch.randn(2, 1, 16, 16), torch.tensor([5.0, 0.5]), torch.eye(3)[[1, 2]]
    with torch.no_grad():
        c, u = net(x, sigma, labels), net(x, sigma, torch.zeros(2, 3))
        torch.testing.assert_close(guided(x, sigma, labels), u + 2.5 * (c - u))
        told = u * 0 + net(x, sigma, labels, told=2.0)
        low = net(x, sigma, torch.zeros(2, 3), told=2.0)
        torch.testing.assert_close(guided(x, sigma, labels, told=2.0), low + 2.5 * (told - low))
        form = Call(order=("cond", "uncond"), doubled=False, guide_channels=0)
        torch.testing.assert_close(wrap(net, guidance=2.5, call=form)(x, sigma, labels), c)
    for field, value in (("sample", "nonsense"), ("rescale", True), ("null", 3)):
        with pytest.raises(GddlabError, match=f"call= with {field}={value!r}: a network with its own preconditioning"):
            wrap(net, guidance=2.5, call=dataclasses.replace(form, **{field: value}))
    with pytest.raises(GddlabError, match="a one-step student is sampled and probed as it is: omit wrap"):
        wrap(make_student(net), guidance=2.5)
    assert guided.branches == ("cond", "uncond") and (guided.img_channels, guided.label_dim) == (1, 3)
    with pytest.raises(GddlabError, match="without conditioning has one branch"):
        wrap(tiny_net(), guidance=2.0)
    with pytest.raises(GddlabError, match="path= has no use with a EDMPrecond"):
        wrap(tiny_net(), path=Path.edm())
    with pytest.raises(GddlabError, match="give class_labels= where it is probed"):
        wrap(net, cond=Conditioning({"a": torch.zeros(1)}))


def test_no_class_is_the_last_of_the_table():
    net = network("dit")
    model = wrap(net, scheduler=DDPM, guidance=2.0)
    x, labels = torch.randn(2, CHANNELS, SIDE, SIDE), torch.eye(10)[[1, 9]]
    seen = []
    net.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"].tolist()), with_kwargs=True)
    model(x, 1.0, labels)
    model(x, 1.0)
    assert seen == [[1, 9, 10, 10], [10, 10, 10, 10]]
    assert model.label_dim == 10
    ids = wrap(net, scheduler=DDPM, cond=[3, 4])
    assert ids.cond.rows["class_labels"].tolist() == [3, 4]


NEEDS = {
    "sd": "encoder_hidden_states:",
    "sdxl": "encoder_hidden_states, added_cond_kwargs.text_embeds and added_cond_kwargs.time_ids:",
    "pixart": "encoder_hidden_states:",
    "sana": "encoder_hidden_states:",
    "sd3": "encoder_hidden_states and pooled_projections:",
    "flux": "encoder_hidden_states and pooled_projections:",
}


@pytest.mark.parametrize("name", NEEDS)
def test_missing_conditioning_says_what_to_record(name):
    net = network(name)
    says = (
        f"a {type(net).__name__} needs {NEEDS[name]} give wrap cond=, which gddlab.Conditioning.record(pipe, prompts)"
    )
    with pytest.raises(GddlabError, match=re.escape(says)):
        wrap(net, scheduler=FLOW)
    with pytest.raises(GddlabError, match="needs encoder_hidden_states"):
        wrap(net, scheduler=FLOW, cond=Conditioning({"other": torch.zeros(1)}))(torch.zeros(1, 4, 8, 8), 1.0)


TEXT = Conditioning({"encoder_hidden_states": torch.zeros(1, 7, 12), "pooled_projections": torch.zeros(1, 10)})


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("unet2d", {"scheduler": DPM_FLOW, "prediction": "v_prediction"}, "along a flow predicts noise - image"),
        ("sd3", {"scheduler": DPM_FLOW, "prediction": "epsilon", "cond": TEXT}, "along a flow predicts noise - image"),
        ("sana", {"scheduler": diffusers.SCMScheduler(), "cond": TEXT}, "the schedule of a SCMScheduler is not known"),
        ("sd3", {"cond": TEXT}, "does not know its noise schedule: give alphas_cumprod= or scheduler=, or path="),
        ("sd3", {"cond": TEXT, "path": "flow"}, "path='flow': give a gddlab.Path"),
        ("sd3", {"cond": TEXT, "path": Path.flow(), "scheduler": FLOW}, "scheduler= has no use with path="),
        ("sd3", {"cond": TEXT, "call": "x", "path": Path.flow()}, "call='x': give a gddlab.Call"),
        ("sd3", {"cond": ["a"], "scheduler": FLOW}, "cond=['a'] of a SD3Transformer2DModel alone"),
        ("sd3", {"cond": TEXT, "scheduler": FLOW, "guidance": 3.0}, "the conditioning has no negative rows"),
        ("sd3", {"cond": TEXT, "scheduler": FLOW, "branches": ("a", "b")}, "branches= is for a denoise="),
        ("sd3", {"cond": TEXT, "scheduler": FLOW, "guidance": math.nan}, "guidance=nan"),
        ("flux", {"cond": TEXT, "scheduler": FLOW, "guidance": 3.0}, "takes its guidance as an input (guidance)"),
        ("unet2d", {"scheduler": DDPM, "guidance": 3.0}, "a UNet2DModel without conditioning has one branch"),
        ("sd3", {"cond": TEXT, "scheduler": FLOW, "vae": nn.Identity()}, "vae= is a Identity: accepted are"),
        (
            "sd3",
            {"cond": TEXT, "scheduler": FLOW, "vae": vae(latent_channels=8)},
            "vae= makes 8 channels, this network",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, arguments, says):
    with pytest.raises(GddlabError, match=re.escape(says)) as e:
        wrap(network(name), **arguments)
    assert "\n" not in str(e.value)


def test_guidance_needs_a_class_for_none():
    with pytest.raises(GddlabError, match="a UNet2DModel has no class that stands for no class"):
        wrap(network("unet2d", num_class_embeds=3), scheduler=DDPM, guidance=2.0)


def test_an_unknown_class_has_two_ways_out():
    with pytest.raises(GddlabError) as e:
        wrap(nn.Identity())
    for part in (
        "how a Identity is called is not known",
        "path=gddlab.Path.flow()",
        'gddlab.Call(sample="x"',
        "denoise=",
    ):
        assert part in str(e.value)


def test_distilled_networks_are_told_their_scale():
    pipe, cond = conditioned("flux")
    recorded = wrap(pipe, cond=cond)
    assert "an input, 4" in recorded.card.guidance and "distilled with guidance" in recorded.card.notes[0]
    without = Conditioning({k: v for k, v in cond.rows.items() if k != "guidance"}, cond.shared, names=cond.names)
    filled = wrap(pipe, cond=without, img_resolution=SIDE)
    assert "told 3.5" in filled.card.notes[-1] and "an input, 3.5" in filled.card.guidance
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    as_recorded = Conditioning({**cond.rows, "guidance": torch.full((2,), 3.5)}, cond.shared)
    with torch.no_grad():
        torch.testing.assert_close(filled(x, 1.0), wrap(pipe, cond=as_recorded)(x, 1.0))
        assert not torch.allclose(filled(x, 1.0), recorded(x, 1.0))
    schnell, call = pipeline("flux", guidance_embeds=False)
    plain = wrap(schnell, cond=Conditioning.record(schnell, **call))
    assert plain.card.guidance == "none" and "guidance" not in plain.cond.rows


def test_latent_consistency_models_are_told_their_scale_and_named():
    net = network("sd", time_cond_proj_dim=8)
    words = {"encoder_hidden_states": torch.randn(1, 7, 16)}
    with pytest.raises(GddlabError, match="needs encoder_hidden_states and timestep_cond"):
        wrap(net, scheduler=diffusers.LCMScheduler())
    cond = Conditioning(words | {"timestep_cond": torch.randn(1, 8)})
    model = wrap(net, scheduler=diffusers.LCMScheduler(), cond=cond)
    assert "a student that makes images in few steps" in model.card.notes[0]
    assert model(torch.randn(1, 4, 8, 8), 1.0).isfinite().all()


@pytest.mark.parametrize("name", ["sdxl-turbo", "SDXL-Lightning", "Hyper-SD", "FLUX.1-schnell", "sd-4step"])
def test_students_posing_as_teachers_are_named(name):
    net = network("sd")
    net.register_to_config(_name_or_path=f"somebody/{name}")
    cond = Conditioning({"encoder_hidden_states": torch.randn(1, 7, 16)})
    assert "few steps" in wrap(net, scheduler=DDPM, cond=cond).card.notes[0]
    net.register_to_config(_name_or_path="somebody/stable-diffusion-2-1")
    assert wrap(net, scheduler=DDPM, cond=cond).card.notes == ()


def test_a_network_with_others_hooks_is_called_by_keyword():
    accelerate = pytest.importorskip("accelerate")
    pipe, cond = conditioned("sd3")
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        plain = wrap(pipe, cond=cond)(x, 1.0)
        accelerate.hooks.add_hook_to_module(pipe.transformer, accelerate.hooks.ModelHook())
        assert torch.equal(wrap(pipe, cond=cond)(x, 1.0), plain)


def test_a_prompt_that_is_longer_than_its_negative_one_needs_two_calls():
    pipe, cond = conditioned("sd")
    short = {"encoder_hidden_states": cond.negative["encoder_hidden_states"][:, :5]}
    uneven = Conditioning(cond.rows, cond.shared, short, shape=cond.shape)
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    with pytest.raises(GddlabError, match="different lengths: give wrap call="):
        wrap(pipe, cond=uneven, guidance=2.0)(x, 1.0)
    form = dataclasses.replace(Call.of(pipe.unet), doubled=False)
    assert wrap(pipe, cond=uneven, guidance=2.0, call=form)(x, 1.0).shape == x.shape


def test_names_are_public():
    assert (gddlab.Call, gddlab.Conditioning, gddlab.Path, gddlab.wrap) == (Call, Conditioning, Path, wrap)
    assert isinstance(tiny_net(), Denoiser) and isinstance(wrap(nn.Identity(), lambda m, x, s, c: x), Denoiser)


CLUMSY = {
    "a flow of a scheduler without": (
        lambda pipe, cond: wrap(pipe, cond=cond, prediction="flow_prediction"),
        "DDIMScheduler does not walk along a flow",
    ),
    "embeddings as prompts": (lambda pipe, cond: wrap(pipe, cond=torch.zeros(1, 7, 16)), "cond=<Tensor>: give prompts"),
    "a number as prompts": (lambda pipe, cond: wrap(pipe, cond=3), "cond=3: give prompts"),
    "prompts without a tokenizer": (
        lambda pipe, cond: wrap(pipe, cond=["a cat"]),
        "has no tokenizer for prompts",
    ),
    "conditioning of another network": (
        lambda pipe, cond: wrap(pipe, cond=Conditioning({**cond.rows, "pooled": torch.zeros(2, 3)}))(X, 1.0),
        r"cannot be called with sample \(2, 4, 8, 8\).*unexpected keyword argument 'pooled'",
    ),
    "conditioning of another width": (
        lambda pipe, cond: wrap(pipe, cond=Conditioning({"encoder_hidden_states": torch.zeros(2, 7, 9)}))(X, 1.0),
        r"encoder_hidden_states \(2, 7, 9\) \(.*shapes.*\): give wrap the cond= of this network",
    ),
    "another name of the rows": (
        lambda pipe, cond: wrap(pipe, cond=cond, call=Call(sample="x"))(X, 1.0),
        "unexpected keyword argument 'x'",
    ),
    "rows of other channels": (
        lambda pipe, cond: wrap(pipe, cond=cond)(X[:, :3], 1.0),
        r"x is \(2, 3, 8, 8\): this network",
    ),
    "rows as a list": (lambda pipe, cond: wrap(pipe, cond=cond)([1], 1.0), r"x=\[1\]: this network takes a tensor"),
    "labels as a list": (
        lambda pipe, cond: wrap(pipe, cond=cond)(X, 1.0, [0, 1]),
        r"class_labels=\[0, 1\]: give one-hot",
    ),
    "branches twice": (
        lambda pipe, cond: wrap(nn.Identity(), lambda model, x, sigma, class_labels: x, branches=("cond", "cond")),
        "give each name once",
    ),
    "no weights to measure": (
        lambda pipe, cond: gddlab.probe(
            wrap(network("sd").to("meta"), scheduler=DDPM, cond=cond), [1.0], states="prior", layers="conv_in", n=1
        ),
        'the network is on "meta", it has no weights',
    ),
    "no weights to sample": (
        lambda pipe, cond: gddlab.sample(wrap(network("sd").to("meta"), scheduler=DDPM, cond=cond), 1, decode=False),
        'the network is on "meta", it has no weights',
    ),
    "no times": (
        lambda pipe, cond: gddlab.probe(wrap(pipe, cond=cond), 0, unit="t", states="prior", layers="conv_in", n=1),
        "timesteps=0: give at least 1",
    ),
}
X = torch.zeros(2, CHANNELS, SIDE, SIDE)


@pytest.mark.parametrize("what", CLUMSY)
def test_clumsy_input_is_refused_in_one_line(what):
    run, says = CLUMSY[what]
    with pytest.raises(GddlabError, match=says) as caught:
        run(*conditioned("sd"))
    assert "\n" not in str(caught.value)


def test_running_out_of_memory_is_not_bad_input():
    net = wrap(*conditioned("sd")[:1], cond=conditioned("sd")[1])

    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    net.gddlab_bare.conv_in.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        net(X, 1.0)


def test_a_wrapped_network_is_given_another_path():
    pipe, cond = conditioned("sd")
    net = wrap(pipe, cond=cond)
    assert wrap(net, scheduler=FLOW).path == Path.flow(1000.0)
    assert wrap(net, prediction="v_prediction").path == dataclasses.replace(net.path, prediction="v_prediction")
    assert wrap(net, alphas_cumprod=[0.9, 0.1], prediction="sample").path == Path.vp([0.9, 0.1], "sample")
    assert wrap(net, scheduler=FLOW).sigma_max == PURE and wrap(net, sigma_max=5.0, prediction="sample").sigma_max == 5
    assert wrap(wrap(net, sigma_max=5.0), prediction="sample").sigma_max == 5
    assert wrap(net).path == net.path
    with pytest.raises(GddlabError, match="with a vp path: give path="):
        wrap(net, prediction="flow_prediction")
    with pytest.raises(GddlabError, match="scheduler= has no use with path="):
        wrap(net, scheduler=DDPM, path=Path.flow())


@pytest.mark.parametrize("kind", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_networks_inside_of_others_are_the_same(kind):
    pipe, cond = conditioned("sd")
    how = {"states": "prior", "layers": "conv_in", "stats": "rms", "n": 2, "progress": False}
    other = wrap(kind(pipe.unet), scheduler=pipe.scheduler, cond=cond)
    wanted = gddlab.probe(wrap(pipe, cond=cond), [1.0], **how)
    assert gddlab.probe(other, [1.0], **how).frame.equals(wanted.frame)
    pipe.unet.train()
    trained = wrap(pipe, cond=cond)
    assert gddlab.probe(trained, [1.0], **how).frame.equals(wanted.frame) and pipe.unet.training
