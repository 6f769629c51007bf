"""Measured places: layer x call x stream x guidance branch, in transformers as in U-Nets."""

import hashlib
import re
from collections import Counter, OrderedDict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gddlab.errors import GddlabError
from gddlab.evaluation.trace import trace
from gddlab.probing import Probe, ProbeResult, ablate, attribute, decode, estimate, grad_probe, lens, patch, probe
from gddlab.probing.attention import entropies
from gddlab.probing.layers import branches_in, points_of
from gddlab.probing.reductions import band_share
from gddlab.probing.result import COLUMNS, SITE
from gddlab.probing.sites import Site, grid_of, layer_of
from tests.models import TOKENS as TEXT
from tests.models import network
from tests.probing.networks import peak_bytes, tiny

SIGMAS = [8.0, 0.5]


class Denoiser(nn.Module):
    """A network with its conditioning, as `gddlab.wrap` makes one: one branch, both in one call, or in two calls."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 4, 8, 0, 0.0, 1e4

    def __init__(self, net, branches=("cond",), *, two_calls=False):
        super().__init__()
        self.gddlab_bare = net.eval()
        self.branches, self.two_calls = branches, two_calls
        self.sample_argument = "sample" if hasattr(net, "conv_in") else "hidden_states"

    def forward(self, x, sigma, class_labels=None):
        groups = [(b,) for b in self.branches] if self.two_calls else [self.branches]
        found = {}
        for group in groups:
            out = self.call(x, sigma, group)
            found |= dict(zip(group, out.chunk(len(group)), strict=True))
        out = found["cond"]
        if "uncond" in found:
            out = found["uncond"] + 2 * (out - found["uncond"])
        return x - 0.1 * sigma[:, None, None, None] * out[:, :4]

    def call(self, x, sigma, group):
        n, k = len(x), len(group)
        x = torch.cat([x / (1 + sigma[:, None, None, None])] * k)
        time = torch.cat([100 * sigma] * k)
        return self.network(x, time, n, group)

    def text(self, n, group, width):
        tokens = torch.randn(len(self.branches) + 1, TEXT, width, generator=torch.Generator().manual_seed(1))
        return torch.cat([tokens[{"cond": 0, "uncond": 1}[b]].expand(n, -1, -1) for b in group])

    def network(self, x, time, n, group):
        labels = torch.cat([torch.full((n,), {"cond": 3, "uncond": 10}[b]) for b in group])
        return self.gddlab_bare(hidden_states=x, timestep=time, class_labels=labels).sample


class PixArt(Denoiser):
    def network(self, x, time, n, group):
        sizes = {"resolution": None, "aspect_ratio": None}
        text, mask = self.text(n, group, 12), torch.ones(len(x), TEXT)
        more = {"encoder_attention_mask": mask} | ({} if isinstance(self, Sana) else {"added_cond_kwargs": sizes})
        return self.gddlab_bare(hidden_states=x, encoder_hidden_states=text, timestep=time, **more).sample


class Sana(PixArt):
    pass


class SD(Denoiser):
    def network(self, x, time, n, group):
        return self.gddlab_bare(x, time, encoder_hidden_states=self.text(n, group, 16)).sample


class SDXL(Denoiser):
    def network(self, x, time, n, group):
        more = {"text_embeds": torch.ones(len(x), 32), "time_ids": torch.ones(len(x), 6)}
        text = self.text(n, group, 16)
        return self.gddlab_bare(x, time, encoder_hidden_states=text, added_cond_kwargs=more).sample


class SD3(Denoiser):
    def network(self, x, time, n, group):
        text = self.text(n, group, 12)
        pooled = text[:, 0, :10]
        more = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time}
        return self.gddlab_bare(hidden_states=x, **more).sample


class Flux(Denoiser):
    def network(self, x, time, n, group):
        text = self.text(n, group, 12)
        packed = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.zeros(4, 4, 3)
        places[..., 1], places[..., 2] = torch.arange(4.0)[:, None], torch.arange(4.0)
        more = {"pooled_projections": text[:, 0, :10], "txt_ids": torch.zeros(TEXT, 3)}
        more |= {"img_ids": places.flatten(0, 1), "guidance": torch.full((len(x),), 3.5)}
        out = self.gddlab_bare(hidden_states=packed, encoder_hidden_states=text, timestep=time / 1000, **more).sample
        return out.unflatten(1, (4, 4)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


dit, pixart, sana, sd3, flux, unet, sdxl = (
    partial(network, name) for name in ("dit", "pixart", "sana", "sd3", "flux", "sd", "sdxl")
)

NETWORKS = {
    "dit": (Denoiser, dit),
    "pixart": (PixArt, pixart),
    "sana": (Sana, sana),
    "sd3": (SD3, sd3),
    "flux": (Flux, flux),
    "sd": (SD, unet),
    "sdxl": (SDXL, sdxl),
}


def made(kind, branches=("cond",), **how):
    wrapper, network = NETWORKS[kind]
    return wrapper(network(), branches, **how)


def measured(model, layers, **more):
    return probe(model, SIGMAS, **({"states": "prior", "n": 2, "layers": layers, "progress": False} | more))


def first_block(model):
    kinds = ((n, type(m).__name__) for n, m in model.gddlab_bare.named_modules())
    return next(n for n, kind in kinds if kind.endswith("TransformerBlock") and "Single" not in kind)


def by_key(result, stat):
    return result.pivot(stat)


EMBEDDER = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
ORDER = ("uncond", "cond")

# Keys.


def test_the_key_of_a_site_is_its_layers_name_with_what_differs():
    assert Site("a.b").key == "a.b"
    assert Site("a.b", 2, "context", "uncond").key == "a.b@2:context:uncond"
    assert Site("a.b", 0, "image").key == "a.b"
    known = {"a.b", "odd@2:name"}
    assert layer_of("a.b@2:context:uncond", known) == layer_of("a.b:uncond", known) == layer_of("a.b", known) == "a.b"
    assert layer_of("odd@2:name", known) == "odd@2:name"


# Guidance branches.


@pytest.mark.parametrize("order", [ORDER, ORDER[::-1]])
@pytest.mark.parametrize("kind", ["dit", "sd3", "sd"])
def test_one_doubled_call_two_calls_and_no_guidance_give_the_same_numbers(kind, order):
    layers = [n for n, m in NETWORKS[kind][1]().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers = [n for n in layers if not n.endswith(("to_out.1",))]
    doubled = measured(made(kind, order), layers, branch="all", stream="all")
    two = measured(made(kind, order, two_calls=True), layers, branch="all", stream="all")
    alone = measured(made(kind), layers, stream="all")
    assert doubled.layers == two.layers
    assert {*doubled.frame["branch"]} == {"cond", "uncond"}
    for stat in ("rms", "std", "correlation"):
        a, b, c = (by_key(r, stat) for r in (doubled, two, alone))
        assert list(a.index) == list(b.index)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(a.loc[c.index], c, rtol=2e-6, atol=1e-6)
    uncond = doubled.frame[doubled.frame["branch"] == "uncond"]
    assert uncond["layer"].str.endswith(":uncond").all()
    other = [key for key in by_key(doubled, "rms").index if key in {*uncond["layer"]}]
    assert len(other) == len(by_key(alone, "rms"))
    assert not np.allclose(by_key(doubled, "rms").loc[other], by_key(alone, "rms"), rtol=1e-3)
    default = measured(made(kind, order), layers, stream="all")
    pd.testing.assert_frame_equal(default.frame[[*SITE, "layer"]], alone.frame[[*SITE, "layer"]])


def test_a_branch_that_is_not_there_is_refused():
    with pytest.raises(GddlabError, match="unknown branch 'uncon': did you mean 'uncond'"):
        measured(made("dit", ORDER), "linear", branch="uncon")
    with pytest.raises(GddlabError, match="unknown branch 'uncond'"):
        measured(made("dit"), "linear", branch="uncond")
    with pytest.raises(GddlabError, match="unknown stream 'imag': did you mean 'image'"):
        measured(made("dit"), "linear", stream="imag")


def test_rows_that_no_branch_is_named_for_are_refused():
    model = made("dit", ORDER)
    model.branches = ("cond",)
    model.call = lambda x, sigma, group: Denoiser.call(model, x, sigma, ORDER)[: len(x)]
    with pytest.raises(GddlabError, match=r"'transformer_blocks.1' is \(8, .*2 images at 2 noise levels are 4"):
        measured(model, ["transformer_blocks.1.ff.net.2"])


# Calls.


def test_a_layer_that_runs_twice_is_numbered_or_averaged():
    model = made("dit")
    each = measured(model, [EMBEDDER, "proj_out_1"], stats="rms")
    assert each.layers == [EMBEDDER, f"{EMBEDDER}@2", "proj_out_1"]
    assert each.frame.groupby("layer", sort=False)["call"].first().to_dict() == {
        EMBEDDER: 1,
        f"{EMBEDDER}@2": 2,
        "proj_out_1": 1,
    }
    for calls, layers, numbers in (
        ("first", [EMBEDDER], [1]),
        ("last", [f"{EMBEDDER}@2"], [2]),
        ("mean", [EMBEDDER], [0]),
    ):
        found = measured(model, [EMBEDDER], calls=calls, stats="rms")
        assert found.layers == layers
        assert sorted({*found.frame["call"]}) == numbers


class Repeats(nn.Module):
    """Runs one layer on its input, then on twice and three times that."""

    img_channels, img_resolution, label_dim = 1, 4, 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.idle = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x, sigma, class_labels=None):
        return sum(self.layer(k * x)[:, :1] for k in (1, 2, 3))


def test_the_mean_over_calls_is_that_of_outputs_side_by_side():
    net, seen = Repeats(), []
    net.layer.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    found = measured(net, "layer", calls="mean", stats=("rms", "std", "mean_abs"), batch_size=100, per_channel=True)
    each = torch.stack(seen, 1).double().movedim(2, 0).flatten(2).unflatten(1, (2, 2)).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(found.channels["layer"]["var"], each.var(2, correction=0).T, rtol=1e-5)
    together = torch.stack(seen, 1).double().unflatten(0, (2, 2)).transpose(0, 1).flatten(1)  # (S, everything)
    expected = {
        "rms": together.square().mean(1).sqrt(),
        "std": together.std(1, correction=0),
        "mean_abs": together.abs().mean(1),
    }
    for stat, values in expected.items():
        np.testing.assert_allclose(found.pivot(stat).loc["layer"], values, rtol=1e-6)


def test_recomputation_of_checkpointed_blocks_is_not_seen():
    layers = [EMBEDDER, "transformer_blocks.1.ff.net.2", "transformer_blocks.1"]
    found = []
    for checkpointed in (False, True):
        model = made("dit")
        if checkpointed:
            model.gddlab_bare.enable_gradient_checkpointing()
        model.train()
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sums = []
        torch.manual_seed(1)  # labels are dropped at random
        with Probe(model, SIGMAS, layers=layers) as p, p.images(2):
            out = model(x, torch.tensor(SIGMAS * 2))
            sums.append(Counter(p._window._runs))
            out.sum().backward()
            sums.append(Counter(p._window._runs))
        assert sums[0] == sums[1]
        found.append({k: by["rms"].result()[0] for k, by in p.statistics.items() if "rms" in by})
    assert found[0].keys() == found[1].keys()
    for key, values in found[0].items():
        torch.testing.assert_close(found[1][key], values, rtol=0, atol=0)


def test_where_the_network_itself_is_never_called_its_parts_are_seen():
    net = Repeats()

    class Around(nn.Module):
        img_channels, img_resolution, label_dim = 1, 4, 0

        def __init__(self):
            super().__init__()
            self.gddlab_bare = net

        def forward(self, x, sigma, class_labels=None):
            return self.gddlab_bare.forward(x, sigma)

    pd.testing.assert_frame_equal(measured(Around(), "layer").frame, measured(net, "layer").frame)


class Part(nn.Module):
    """Gives a tensor, or a tuple of one."""

    def __init__(self, several):
        super().__init__()
        self.several = several

    def forward(self, x):
        return (x * 2, None) if self.several else x * 2


class Joint(Part):
    def forward(self, x):
        return (x * 3, x * 5) if self.several else (None, x * 5)


Joint.__name__ = "JointTransformerBlock"


class Plays(nn.Module):
    img_channels, img_resolution, label_dim = 1, 4, 0

    def __init__(self, kinds, order):
        super().__init__()
        self.parts = nn.ModuleList([(Joint if joint else Part)(several) for joint, several in kinds])
        self.order = order

    def forward(self, x, sigma, class_labels=None):
        for i in self.order:
            self.parts[i](x)
        return x


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    calls=st.sampled_from(["each", "mean", "first", "last"]),
    stream=st.sampled_from(["image", "context", "all"]),
)
def test_any_order_of_runs_and_tuples_has_its_sites(kinds, order, calls, stream):
    order = [i % len(kinds) for i in order]
    names = [f"parts.{i}" for i in sorted({*order})]
    expected = {}
    for i in sorted({*order}):
        joint, several = kinds[i]
        streams = {"image": 5.0} | ({"context": 3.0} if several else {}) if joint else {"": 2.0}
        if stream == "context" and joint and several:
            streams = {"context": 3.0}
        elif stream == "context":
            streams = {}
        elif stream == "image":
            streams.pop("context", None)
        runs = order.count(i)
        numbers = {"each": range(1, runs + 1), "first": [1], "last": [runs], "mean": [0 if runs > 1 else 1]}[calls]
        expected |= {Site(f"parts.{i}", c, s).key: (c, s, v) for s, v in streams.items() for c in numbers}
    net = Plays(kinds, order)
    ask = {"stats": "rms", "calls": calls, "stream": stream}
    if not expected:
        with pytest.raises(GddlabError, match="has a stream 'context'"):
            measured(net, names, **ask)
        return
    found = measured(net, names, **ask)
    assert {*found.layers} == {*expected}
    rms = found.pivot("rms")
    plain = measured(Plays([(False, False)], [0]), "parts.0", stats="rms").pivot("rms").loc["parts.0"] / 2
    for key, (call, s, factor) in expected.items():
        row = found.frame[found.frame["layer"] == key].iloc[0]
        assert (row["call"], row["stream"], row["branch"]) == (call, s, "cond")
        np.testing.assert_allclose(rms.loc[key], factor * plain, rtol=1e-6)


# Streams.


def test_joint_blocks_have_streams_by_their_class():
    model, seen = made("sd3"), {}
    for name in ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.0.attn"):
        module = model.gddlab_bare.get_submodule(name)
        module.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y}))
    names = [*["transformer_blocks.0", "transformer_blocks.0.attn", "transformer_blocks.1"], "transformer_blocks.0.ff"]
    found = measured(model, names, stream="all", stats="rms", batch_size=100)
    assert found.layers == [
        *("transformer_blocks.0", "transformer_blocks.0:context"),
        *("transformer_blocks.0.attn", "transformer_blocks.0.attn:context", "transformer_blocks.0.ff"),
        "transformer_blocks.1",  # the last has no context
    ]
    columns = found.frame.groupby("layer", sort=False)["stream"].first()
    assert columns.tolist() == ["image", "context", "image", "context", "", "image"]
    context, image = seen["transformer_blocks.0"]
    attended, other = seen["transformer_blocks.0.attn"]
    for key, x in {
        "transformer_blocks.0": image,
        "transformer_blocks.0:context": context,
        "transformer_blocks.0.attn": attended,
        "transformer_blocks.0.attn:context": other,
        "transformer_blocks.1": seen["transformer_blocks.1"][1],
    }.items():
        expected = x.double().unflatten(0, (2, 2)).square().mean((0, 2, 3)).sqrt()
        np.testing.assert_allclose(found.pivot("rms").loc[key], expected.detach(), rtol=1e-6)
    assert measured(model, names, stats="rms").layers == [n for n in found.layers if ":" not in n]
    assert measured(model, names, stats="rms", stream="context").layers == [n for n in found.layers if ":" in n]


def test_tokens_of_both_streams_in_one_tensor_are_cut():
    model, seen = made("flux"), []
    name = "single_transformer_blocks.0.proj_out"
    model.gddlab_bare.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    found = measured(model, name, stream="all", stats=("rms", "spectral_share"), batch_size=100)
    assert seen[0].shape[1] == TEXT + 16
    assert found.layers == [name, f"{name}:context"]
    for key, x in {name: seen[0][:, TEXT:], f"{name}:context": seen[0][:, :TEXT]}.items():
        expected = x.double().unflatten(0, (2, 2)).square().mean((0, 2, 3)).sqrt()
        np.testing.assert_allclose(found.pivot("rms").loc[key], expected, rtol=1e-6)
    assert found.frame.set_index("layer")["resolution"].to_dict()[name] == 4
    shares = found.frame[found.frame["stat"].str.startswith("spectral_share")]
    assert {*shares["layer"]} == {name}  # the context has no places in the image
    both = measured(model, ["single_transformer_blocks.0", "transformer_blocks.1"], stream="all")
    assert len(both.layers) == 4


def test_rows_merged_with_another_axis_are_refused_by_name():
    with pytest.raises(GddlabError, match=r"'add_time_proj' is \(24, 8\), but 2 images at 2 noise levels are 4 rows"):
        measured(made("sdxl"), "add_time_proj")


# Layout and grid.


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (16, (8, 8), (4, 4)),
        (256, (32, 32), (16, 16)),
        (1536, (64, 96), (32, 48)),
        (64, (8, 8), (8, 8)),
        (77, (64, 64), None),
        (300, (128, 128), None),
        (333, (128, 128), None),
        (512, (128, 128), None),
        (0, (8, 8), None),
    ],
)
def test_tokens_have_a_grid_where_they_are_patches(tokens, size, grid):
    assert grid_of(tokens, *size) == grid


@pytest.mark.parametrize("kind", ["dit", "pixart", "sana", "sd3", "flux", "sd"])
def test_the_spectral_share_of_tokens_is_that_of_the_same_map(kind):
    model, seen = made(kind), []
    name = first_block(model)
    module = model.gddlab_bare.get_submodule(name)
    module.register_forward_hook(lambda m, a, y: seen.append((y[1] if isinstance(y, tuple) else y).detach()))
    found = measured(model, name, stats=("rms", "spectral_share"), batch_size=100)
    tokens = seen[0]
    side = round(tokens.shape[1] ** 0.5)
    image = tokens.reshape(len(tokens), side, side, -1).movedim(-1, 1).contiguous()
    expected = band_share(image, 2).mean(0)
    for i in range(4):
        np.testing.assert_allclose(found.pivot(f"spectral_share_{i}").loc[name, SIGMAS], expected[:, i], rtol=1e-6)
    assert found.frame["resolution"].dropna().unique().tolist() == [side]


class Layouts(nn.Module):
    img_channels, img_resolution, label_dim = 3, 4, 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.rms = nn.Linear(4, 5), nn.LayerNorm(4), nn.RMSNorm(4)
        self.along, self.group = nn.Conv1d(3, 6, 1), nn.GroupNorm(3, 3)
        self.conv = nn.Conv2d(3, 7, 1)

    def forward(self, x, sigma, class_labels=None):
        self.linear(x), self.norm(x), self.rms(x), self.conv(x)  # (B, 3, 4, 4): heads, tokens, numbers of each
        self.along(x.flatten(2)), self.group(x.flatten(2))
        return x


def test_channels_are_where_the_module_has_them():
    net, seen = Layouts(), {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y.detach()}))
    names = [n for n, _ in net.named_children()]
    found = measured(net, names, per_channel=True, batch_size=100)
    for name in names:
        last = name in ("linear", "norm", "rms")
        x = (seen[name].movedim(-1, 1) if last else seen[name]).double().flatten(2).unflatten(0, (2, 2))
        x = x.permute(1, 2, 0, 3).flatten(2)  # (S, C, images and pixels)
        np.testing.assert_allclose(found.channels[name]["mean"], x.mean(2), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.channels[name]["var"], x.var(2, correction=0), rtol=1e-5, atol=1e-6)
    sizes = found.frame.drop_duplicates("layer").set_index("layer")["resolution"]
    assert sizes["conv"] == 4
    assert sizes[["linear", "norm", "rms"]].isna().all()  # tokens in rows of a head are no pixels
    replaced = ablate(net, SIGMAS, names, "mean", states="prior", n=2, progress=False)
    assert replaced.frame["value"].abs().max() == 0  # nothing depends on them


# The residual stream.


def of_stream(x):
    return x.detach().double().flatten(1).norm(dim=1).unflatten(0, (2, 2))


def test_updates_of_a_block_are_its_gated_branches():
    model, seen = made("dit"), {}
    block = model.gddlab_bare.transformer_blocks[1]
    block.norm1.register_forward_hook(lambda m, a, y: seen.update(gates=(y[1], y[4]), x=a[0]))
    block.attn1.register_forward_hook(lambda m, a, y: seen.update(attn=y))
    block.norm3.register_forward_hook(lambda m, a, y: seen.update(middle=a[0]))
    block.ff.register_forward_hook(lambda m, a, y: seen.update(ff=y))
    found = measured(model, "transformer_blocks.1.ff.net.2", batch_size=100)
    (attention, mlp), x, middle = seen["gates"], seen["x"], seen["middle"]
    first, second = attention[:, None] * seen["attn"], mlp[:, None] * seen["ff"]
    expected = {
        "rel_update_attn": of_stream(first) / of_stream(x),
        "rel_update_mlp": of_stream(second) / of_stream(middle),
        "rel_update": of_stream(first + second) / of_stream(x),
    }
    for stat, each in expected.items():
        np.testing.assert_allclose(found.pivot(stat).loc["transformer_blocks.1", SIGMAS], each.mean(0), rtol=1e-4)
    assert "rel_update_cross" not in found.stats


@pytest.mark.parametrize("kind", ["pixart", "sana", "sd3", "flux", "sd", "sdxl"])
def test_updates_are_read_from_the_points_of_every_kind_of_block(kind):
    """Against the branches themselves: with one of them zeroed, the stream moves by the others alone."""
    model = made(kind)
    name = first_block(model)
    block = model.gddlab_bare.get_submodule(name)
    parts = {p.part for p in points_of(block)} - {""}
    found = measured(model, name, stream="all")
    assert {f"rel_update_{p}" for p in parts} <= {*found.stats}
    for part in parts:
        assert (found.pivot(f"rel_update_{part}") > 0).all(axis=None)
    silent = {"attn": [c for c in ("attn", "attn1", "attn2") if c in branches_in(block)], "mlp": ["ff", "ff_context"]}
    if "cross" in parts:
        silent |= {"attn": ["attn1"], "cross": ["attn2"]}
    for part in parts:
        handles = []
        for child in silent[part]:
            if isinstance(getattr(block, child, None), nn.Module):
                zero = lambda m, a, y: tuple(map(torch.zeros_like, y)) if isinstance(y, tuple) else torch.zeros_like(y)  # noqa: E731
                handles.append(getattr(block, child).register_forward_hook(zero))
        without = measured(model, name, stream="all")
        assert (without.pivot(f"rel_update_{part}") == 0).all(axis=None)
        for other in parts - {part}:
            assert (without.pivot(f"rel_update_{other}") > 0).all(axis=None)
        for h in handles:
            h.remove()


def test_a_single_block_of_flux_has_its_whole_update():
    model, seen = made("flux"), {}
    block = model.gddlab_bare.single_transformer_blocks[1]
    block.register_forward_pre_hook(
        lambda m, a, k: seen.update(before=(k["encoder_hidden_states"], k["hidden_states"])), with_kwargs=True
    )
    block.register_forward_hook(lambda m, a, y: seen.update(after=y))
    found = measured(model, "single_transformer_blocks.1", stream="all", batch_size=100)
    for key, i in (("single_transformer_blocks.1:context", 0), ("single_transformer_blocks.1", 1)):
        before, after = seen["before"][i], seen["after"][i]
        expected = (of_stream(after - before) / of_stream(before)).mean(0)
        np.testing.assert_allclose(found.pivot("rel_update").loc[key, SIGMAS], expected, rtol=1e-4)


class Clips(nn.Module):
    """A transformer block that writes into its own input."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 4), "proj": nn.Linear(4, 4)})
        self.norm2, self.mlp = nn.LayerNorm(4), nn.Sequential(OrderedDict(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4)))

    def forward(self, x):
        x.clip_(-1, 1)
        x = x + self.attn["proj"](self.attn["qkv"](x))
        return x + self.mlp(self.norm2(x))


Clips.__name__ = "DiTBlock"


def test_a_stream_that_is_changed_in_place_is_refused_by_name():
    class Net(nn.Module):
        img_channels, img_resolution, label_dim = 1, 4, 0

        def __init__(self):
            super().__init__()
            self.inner = Clips()

        def forward(self, x, sigma, class_labels=None):
            return self.inner(x.flatten(2).mT.reshape(len(x), 4, 4).clone()).reshape(x.shape)

    with pytest.raises(GddlabError, match=r"writes into the input of 'inner' before 'inner.norm2' has run"):
        measured(Net(), "inner")
    assert measured(Net(), "inner", stats="rms").layers == ["inner"]


def test_held_streams_are_released_as_soon_as_they_are_compared():
    model, most = made("sd3"), []
    layers = ["transformer_blocks.0", "transformer_blocks.1"]
    with Probe(model, SIGMAS, layers=layers, stream="all") as p:
        for block in model.gddlab_bare.transformer_blocks:
            block.register_forward_hook(lambda m, a, y: most.append(len(p._held)))
            block.norm2.register_forward_pre_hook(lambda m, a: most.append(len(p._held)))
        with torch.no_grad(), p.images(2):
            model(torch.randn(4, 4, 8, 8), torch.tensor(SIGMAS * 2))
    assert max(most) <= 4  # the block's inputs and the middles of both streams
    assert most[1] == most[3] == 0


# Attention.


def test_entropies_are_those_of_the_softmax():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, generator=g), torch.randn(2, 3, 7, 4, generator=g)
    for mask, scale in (
        (None, None),
        (torch.randn(5, 7, generator=g), 0.3),
        (torch.rand(2, 1, 1, 7, generator=g) > 0.4, 1.0),
    ):
        scores = q.double() @ k.double().mT * (0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        expected = torch.distributions.Categorical(logits=scores).entropy()
        torch.testing.assert_close(entropies(q, k, k, mask, scale=scale).double(), expected, rtol=1e-5, atol=1e-6)
    causal = torch.distributions.Categorical(
        logits=(q @ q.mT / 2).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    )
    torch.testing.assert_close(entropies(q, q, q, is_causal=True), causal.entropy(), rtol=1e-4, atol=1e-5)
    shared = entropies(q[:, :2], k[:, :1], k[:, :1], enable_gqa=True)
    torch.testing.assert_close(shared, entropies(q[:, :2], k[:, [0, 0]], k), rtol=0, atol=0)


def test_the_entropy_of_an_attention_is_there_on_request_by_head():
    model, seen = made("dit"), {}
    attention = model.gddlab_bare.transformer_blocks[1].attn1
    attention.to_q.register_forward_hook(lambda m, a, y: seen.update(q=y.detach()))
    attention.to_k.register_forward_hook(lambda m, a, y: seen.update(k=y.detach()))
    assert "attention_entropy" not in measured(model, "transformer_blocks.1.attn1.to_q").stats
    found = measured(model, "transformer_blocks.1.attn1.to_q", stats=("rms", "attention_entropy"), batch_size=100)
    q, k = (x.double().unflatten(-1, (2, 8)).transpose(1, 2) for x in (seen["q"], seen["k"]))
    each = (
        torch.distributions.Categorical(logits=q @ k.mT / 8**0.5).entropy().mean(-1).unflatten(0, (2, 2))
    )  # (n, S, heads)
    name = "transformer_blocks.1.attn1"
    np.testing.assert_allclose(found.pivot("attention_entropy").loc[name, SIGMAS], each.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.channels[name]["attention_entropy"], each.mean(0), rtol=1e-5)
    sem = each.std(0) / 2**0.5
    np.testing.assert_allclose(found.channels[name]["attention_entropy_sem"], sem, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_the_entropy_does_not_depend_on_the_processor(processor):
    from diffusers.models import attention_processor

    model = made("pixart")
    name = "transformer_blocks.0.attn2"
    plain = measured(model, name, stats="attention_entropy").pivot("attention_entropy")
    model.gddlab_bare.set_attn_processor(getattr(attention_processor, processor)())
    other = measured(model, name, stats="attention_entropy").pivot("attention_entropy")
    np.testing.assert_allclose(other, plain, rtol=1e-4)


def test_queries_of_a_joint_attention_are_cut_by_its_order():
    for kind, name in (("sd3", "transformer_blocks.0.attn"), ("flux", "transformer_blocks.0.attn")):
        model, seen = made(kind), {}
        from gddlab.probing import attention

        plain = attention.entropies

        def spy(*a, plain=plain, seen=seen, **k):
            seen.setdefault("all", plain(*a, **k))
            return plain(*a, **k)

        attention.entropies = spy
        try:
            found = measured(model, name, stats="attention_entropy", stream="all", batch_size=100)
        finally:
            attention.entropies = plain
        whole = seen["all"].unflatten(0, (2, 2))  # (n, S, heads, queries)
        image, context = (whole[..., :16], whole[..., 16:]) if kind == "sd3" else (whole[..., TEXT:], whole[..., :TEXT])
        for key, x in ((name, image), (f"{name}:context", context)):
            expected = x.double().mean((0, 2, 3))
            np.testing.assert_allclose(found.pivot("attention_entropy").loc[key, SIGMAS], expected, rtol=1e-5)


def test_attention_without_softmax_is_refused_or_left_out():
    with pytest.raises(GddlabError, match=r"'transformer_blocks.0.attn1' computes no softmax attention"):
        measured(made("sana"), "transformer_blocks.0.attn1", stats="attention_entropy")
    with pytest.warns(UserWarning, match=r"'transformer_blocks.0.attn1' computes no softmax attention"):
        found = measured(made("sana"), "transformer_blocks.0.attn*", stats=("rms", "attention_entropy"))
    assert {*found.frame.loc[found.frame["stat"] == "attention_entropy", "layer"]} == {"transformer_blocks.0.attn2"}


def test_the_entropy_of_a_u_nets_attention():
    net = tiny(attn_resolutions=[8])
    block = next(n for n, m in net.named_modules() if n.endswith("qkv")).rpartition(".")[0]
    found = probe(net, SIGMAS, states="prior", n=2, layers=block, stats="attention_entropy")
    values = found.pivot("attention_entropy").loc[block]
    assert ((values > 0) & (values <= np.log(64) + 1e-6)).all()


# Layers that do not run.


class Idle(Repeats):
    def __init__(self):
        super().__init__()
        self.pair = nn.GRU(4, 4, batch_first=True)

    def forward(self, x, sigma, class_labels=None):
        self.pair(x[:, 0])
        return self.layer(x)[:, :1]


def test_layers_that_a_preset_brought_and_that_do_not_run_are_left_out():
    with pytest.warns(UserWarning, match="'idle' did not run; see") as warned:
        found = measured(Idle(), "conv")
    assert len(warned) == 1
    assert found.layers == ["layer"]
    assert found.meta["not_run"] == {"idle": "did not run"}
    with pytest.warns(UserWarning, match="and 1 more"):
        both = measured(Idle(), "re:.")
    assert both.meta["not_run"]["idle"] == "did not run"
    assert both.meta["not_run"]["pair"] == "has a tuple as its output, no tensor"
    for named, says in (("idle", "'idle' did not run"), ("pair", "'pair' is a tuple, no tensor")):
        with pytest.raises(GddlabError, match=says):
            measured(Idle(), [named, "layer"])
    with pytest.raises(GddlabError, match="'idle' did not run"):
        measured(Idle(), "i*")  # nothing is left
    assert "not_run" not in measured(Repeats(), "layer").meta


@pytest.mark.parametrize("what", [ablate, decode, attribute, grad_probe, lens, trace, patch])
def test_every_measure_leaves_them_out(what, pictures):
    class Square(Idle):
        img_resolution = 16

        def forward(self, x, sigma, class_labels=None):
            return self.layer(x)[:, :1]

    arguments = {
        ablate: (SIGMAS, "conv", "mean"),
        decode: (SIGMAS, ("image",)),
        attribute: (SIGMAS, "conv"),
        grad_probe: (),
        lens: (SIGMAS,),
        trace: (2, "conv"),
        patch: (Square(), "conv"),
    }[what]
    more = {
        decode: {"layers": "conv", "n": 6, "held_out": 4, "dims": 3},
        lens: {"layers": "conv", "n": 2},
        grad_probe: {"layers": "conv", "timesteps": SIGMAS, "n": 2, "batch_size": 1},
        trace: {"n": 2, "extractor": None},
        patch: {"what": "activations", "into": "teacher", "timesteps": SIGMAS, "n": 2},
    }.get(what, {"n": 2})
    data = {} if what is trace else {"data": pictures}
    with pytest.warns(UserWarning, match="'idle' "):
        found = what(Square(), *arguments, **data, **more, progress=False)
    assert "idle" in found.meta["not_run"]
    if isinstance(found, ProbeResult):
        assert found.layers == ["layer"]


# All measures, on all networks.

LAYERS = ("linear", "norm", "conv", "all", "attention")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_measured_with_every_preset(kind, guided):
    model = made(kind, ORDER if guided else ("cond",))
    for layers in LAYERS:
        if kind == "flux" and layers == "conv":
            continue
        found = measured(model, layers, branch="all", stream="all", stats=("rms", "std", "correlation"), n=2)
        assert found.frame["value"].notna().any()
        assert len(found.layers) == len({*found.layers})
    assert estimate(model, SIGMAS, states="prior", n=2, layers="linear").layers


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_layers_are_changed_by_the_same_keys(kind, guided):
    model = made(kind, ORDER if guided else ("cond",))
    block = "transformer_blocks.0"
    keys = [
        block,
        f"{block}.attn1.to_q" if kind == "dit" else f"{block}.attn",
        "proj_out" if kind != "dit" else EMBEDDER,
    ]
    if guided:
        keys.append(f"{keys[1]}:uncond")
    if kind != "dit":
        keys.append(f"{block}.attn:context")
    if kind == "dit":
        keys.append(f"{EMBEDDER}@2")
    ask = {"states": "prior", "n": 2, "progress": False}
    for mode in ("zero", "mean", "resample"):
        found = ablate(model, SIGMAS, keys, mode, **ask)
        assert {*found.layers} == {*keys}
        changes = found.pivot(f"ablation_output_{mode}")
        alike = [key for key in keys if mode != "zero" and EMBEDDER in key]  # all images are told one level
        assert (changes.loc[alike] == 0).all(axis=None)
        assert (changes.drop(alike) > 0).all(axis=None), mode
    zero = ablate(model, SIGMAS, keys, "zero", **ask).pivot("ablation_output_zero")
    if guided:
        assert not np.allclose(zero.loc[keys[1]], zero.loc[f"{keys[1]}:uncond"])


def test_a_zeroed_block_leaves_its_stream():
    model, seen = made("dit"), {}
    block = model.gddlab_bare.transformer_blocks[0]
    rows = (torch.randn(4, 4, 8, 8), torch.tensor(SIGMAS * 2), None)
    from gddlab.probing.ablate import outputs_of
    from gddlab.probing.effects import tapped
    from gddlab.probing.layers import inventory, named_layers

    outputs = outputs_of(inventory(model)["transformer_blocks.0"], named_layers(model))
    assert outputs == ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    block.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    with torch.no_grad(), tapped(model, dict.fromkeys(outputs, torch.zeros_like)):
        model(*rows)
    assert torch.equal(seen["x"], seen["y"])


def test_patched_activations_of_every_site_are_the_donors():
    teacher, student = (made("dit", ORDER) for _ in range(2))
    with torch.no_grad():
        for p in student.gddlab_bare.transformer_blocks[1].parameters():
            p.mul_(1.3)
    ask = {"what": "activations", "into": "teacher", "timesteps": SIGMAS, "n": 2, "progress": False}
    from gddlab.probing.effects import denoised
    from gddlab.probing.patch import activations_of

    rows = (torch.randn(4, 4, 8, 8), torch.tensor(SIGMAS * 2), None)
    with torch.no_grad(), activations_of(student, teacher, "transformer_blocks.1"):
        patched = denoised(teacher, rows)
    with torch.no_grad():
        torch.testing.assert_close(patched, denoised(student, rows), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(patched, denoised(teacher, rows))
    assert ask


def test_attributions_refuse_what_captum_would_misread():
    model = made("dit")
    ask = {"states": "prior", "n": 1, "steps": 2, "progress": False}
    with pytest.raises(GddlabError, match=f"'{re.escape(EMBEDDER)}' ran twice"):
        attribute(model, SIGMAS, EMBEDDER, **ask)
    with pytest.warns(UserWarning, match="ran twice in one pass and"):
        found = attribute(model, SIGMAS, "linear", **ask)
    assert EMBEDDER in found.meta["not_run"] and EMBEDDER not in found.layers and "proj_out_2" in found.layers
    with pytest.raises(GddlabError, match="this denoiser has uncond, cond: wrap it without guidance="):
        attribute(made("dit", ORDER), SIGMAS, "proj_out_2", **ask)
    with pytest.raises(GddlabError, match=r"'transformer_blocks.0' gives several streams"):
        attribute(made("sd3"), SIGMAS, "transformer_blocks.0", **ask)


# Results.


def test_results_of_sites_are_saved_merged_and_joined(tmp_path):
    model, layers = made("sd3", ORDER), ["transformer_blocks.0", "transformer_blocks.0.attn", "proj_out"]
    ask = {"branch": "all", "stream": "all"}
    whole = measured(model, layers, n=4, **ask)
    assert list(whole.frame.columns) == list(COLUMNS)
    whole.save(tmp_path / "whole")
    loaded = ProbeResult.load(tmp_path / "whole")
    pd.testing.assert_frame_equal(loaded.frame, whole.frame)
    assert loaded.hash == whole.hash and loaded.meta["sites"] == whole.meta["sites"]
    parts = [measured(model, layers, n=2, start=i, **ask) for i in (0, 2)]
    merged = parts[0].merge(parts[1])
    assert merged.layers == whole.layers
    np.testing.assert_allclose(merged.pivot("rms"), whole.pivot("rms"), rtol=1e-6)
    pd.testing.assert_frame_equal(merged.frame[[*SITE, "layer"]], whole.frame[[*SITE, "layer"]])
    again = ProbeResult.load(tmp_path / "whole").merge(measured(model, layers, n=2, start=4, **ask))
    assert again.meta["n_images"] == 6
    with pytest.raises(GddlabError, match="sites is"):
        whole.merge(measured(model, layers, n=2, start=4))
    other = measured(model, ["transformer_blocks.1", "transformer_blocks.1.attn"], n=4, **ask)
    joined = whole.join(other)
    assert (
        joined.layers == measured(model, [*layers, *other.layers[:1], "transformer_blocks.1.attn"], n=4, **ask).layers
    )
    assert {*joined.meta["sites"]} == {*whole.meta["sites"], *other.meta["sites"]}
    with pytest.raises(GddlabError, match="is in both results"):
        whole.join(whole)
    assert whole.heatmap("rms").figure and whole.lines("rms", over="depth").figure and whole.similarities()
    assert whole.lines("rms", layers="proj_out").figure


def test_older_results_have_the_columns_of_one_place(result, tmp_path, monkeypatch):
    assert (result.frame[[*SITE]] == pd.Series(SITE)).all(axis=None)
    table = result.frame.drop(columns=[*SITE]).to_csv(index=False, float_format="%.17g")
    before = hashlib.sha256((result.meta["model"]["fingerprint"] + table).encode()).hexdigest()
    assert result.hash == before
    assert "sites" not in result.meta and "not_run" not in result.meta
    older = result.copy(frame=result.frame.drop(columns=[*SITE]))
    older.save(tmp_path)
    pd.testing.assert_frame_equal(ProbeResult.load(tmp_path).frame, result.frame)


def test_later_passes_have_the_same_sites():
    net = Repeats()
    passes = iter([(1, 2), (1, 2, 3)])
    net.forward = lambda x, sigma, class_labels=None: sum(net.layer(k * x)[:, :1] for k in next(passes))
    with pytest.raises(GddlabError, match="'layer@3' was not there in the first pass"):
        measured(net, "layer", n=2, batch_size=2, stats="rms")


def test_a_null_model_leaves_out_the_same_layers():
    with pytest.warns(UserWarning, match="'idle' did not run") as warned:
        found = measured(Idle(), "conv", nulls="shuffled", null_draws=2, n=4)
    assert len([w for w in warned if "idle" in str(w.message)]) == 1
    assert found.nulls["shuffled"][0].layers == found.layers == ["layer"]


def test_memory_of_a_transformer_does_not_grow_with_images_blocks_or_branches():
    """A call of 16 rows takes the same memory for few and many images, blocks and guidance branches."""
    rows, tokens, width = 16, 256, 48
    stream, widest = (4 * rows * tokens * k * width for k in (1, 4))

    def made(blocks=4, branches=("cond",)):
        model = Denoiser(dit(num_layers=blocks, sample_size=32, attention_head_dim=width // 2), branches)
        model.img_resolution = 32
        return model

    def used(n=8, **how):
        model = made(**how)
        more = {"n": n, "batch_size": rows // len(model.branches), "layers": "linear", "branch": "all"}
        return peak_bytes(lambda: probe(model, 2, states="prior", progress=False, **more))

    model = made()
    with torch.no_grad():
        bare = peak_bytes(lambda: model(torch.zeros(rows, 4, 32, 32), torch.ones(rows)))
    few = used()
    assert widest < bare  # the count counts
    assert few < bare + 2 * widest + stream
    for many in (used(n=256), used(blocks=64), used(branches=("cond", "uncond"))):
        assert many == pytest.approx(few, rel=0.05)
