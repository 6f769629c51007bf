"""EDM2's network: magnitudes, weights that training rewrites, precisions, compilation, arguments, files, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets import EDM2Precond, from_edm, load_network, save_network
from gddlab.nets.edm2 import MPConv, MPFourier, PixelNorm, mp_cat, mp_silu, mp_sum, unit
from gddlab.nets.io import make_student
from gddlab.nets.precond import EDMPrecond
from gddlab.probing import probe
from gddlab.probing.layers import inventory
from tests.nets.test_unets import watch

SMALL: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 10,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 16,
}


def made(**changes: Any) -> EDM2Precond:
    """A network whose gains are not 0, as fresh ones are."""
    torch.manual_seed(0)
    net = from_edm("Precond", **SMALL | changes)
    assert isinstance(net, EDM2Precond)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.fill_(1.0)
    return net.eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.05, 1.0, 40.0])[:batch]
    return torch.randn(batch, 3, 16, 16, generator=g) * (1 + sigma.reshape(-1, 1, 1, 1)), sigma, torch.eye(10)[:batch]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_every_part_keeps_magnitudes() -> None:
    """Unit magnitude in, unit magnitude out, for random numbers."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, c, 16, 16, generator=g) for c in (32, 96))
    torch.manual_seed(0)
    conv, linear, waves = MPConv(32, 64, 3), MPConv(96, 64), MPFourier(4096)
    with torch.no_grad():
        conv.weight.mul_(7)  # the magnitude of weights plays no role
        found = {
            "silu": rms(mp_silu(a)),
            "sum": rms(mp_sum(a, b[:, :32], 0.3)),
            "cat": rms(mp_cat(a, b, 0.5)),
            "first of cat": rms(mp_cat(a, b, 0.5)[:, :32]) * math.sqrt(32 * 2 / 128),
            "conv": rms(conv(a)[..., 1:-1, 1:-1]),
            "linear": rms(linear(b[:, :, 0, 0])),
            "waves": rms(waves(torch.linspace(-2, 2, 50))),
            "norm": rms(PixelNorm()(5 * a)),
        }
    for name, value in found.items():
        assert value == pytest.approx(1, abs=0.03), name
    assert unit(torch.zeros(2, 3), 1).abs().max() == 0  # no division by zero


def test_gain_and_zero_gain() -> None:
    """A fresh network gives c_skip x: its last gain is 0; the gain multiplies, whatever the weights."""
    x, sigma, labels = inputs()
    fresh = from_edm("Precond", **SMALL).eval()
    with torch.no_grad():
        c = fresh.coefficients(sigma.reshape(-1, 1, 1, 1))
        assert torch.equal(fresh(x, sigma, labels), c.c_skip * x)
        net = made()
        once = net(x, sigma, labels) - c.c_skip * x
        net.unet.out_gain.fill_(3.0)
        assert_close(net(x, sigma, labels) - c.c_skip * x, 3 * once, rtol=1e-4, atol=1e-4)


def test_coefficients_are_those_of_edm() -> None:
    net = made(sigma_data=0.7).double()
    edm = EDMPrecond(16, 3, sigma_data=0.7, model_channels=16, channel_mult=[1], num_blocks=1, model_type="SongUNet")
    sigma = torch.tensor([0.002, 0.7, 80.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    for ours, theirs in zip(net.coefficients(sigma), edm.coefficients(sigma), strict=True):
        assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert net.path.to_dict()["sigma_data"] == net.sigma_data == 0.7


@torch.no_grad()
def test_training_rewrites_weights_and_eval_does_not() -> None:
    net = made(dropout=0.0)
    x, sigma, labels = inputs()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    y = net(x, sigma, labels)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    net.requires_grad_(False).train()  # frozen ones are rewritten too
    assert_close(net(x, sigma, labels), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
    for name, m in net.named_modules():
        if isinstance(m, MPConv) and name != "logvar_linear":
            assert not torch.equal(m.weight, before[f"{name}.weight"]), name
            assert_close(m.weight.square().flatten(1).mean(1), torch.ones(len(m.weight)), rtol=1e-3, atol=0)
    assert torch.equal(net.logvar_linear.weight, before["logvar_linear.weight"])
    net.logvar(sigma)
    assert not torch.equal(net.logvar_linear.weight, before["logvar_linear.weight"])


def test_every_parameter_gets_a_gradient() -> None:
    net = made(dropout=0.1).train()
    x, sigma, labels = inputs()
    loss = net(x, sigma, labels).square().mean() + net.logvar(sigma).sum()
    loss.backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    for name, m in net.named_modules():  # normalised weights have no gradient along themselves
        if isinstance(m, MPConv):
            assert m.weight.grad is not None
            along = (m.weight.grad * m.weight).flatten(1).sum(1).abs()
            size = m.weight.grad.flatten(1).norm(dim=1) * m.weight.flatten(1).norm(dim=1)
            assert (along <= 1e-3 * size + 1e-9).all(), name


def test_logvar_is_one_number_a_level() -> None:
    net = made()
    assert net.logvar(2.0).shape == (1, 1, 1, 1)
    both = net.logvar(torch.tensor([2.0, 0.1]))
    assert both.shape == (2, 1, 1, 1)
    assert_close(both[:1], net.logvar(2.0))
    assert not torch.allclose(both[0], both[1])


@torch.no_grad()
def test_channels_last_is_kept_and_changes_nothing() -> None:
    net = made()
    x, *rest = inputs()
    y = net(x, *rest)
    net.to(memory_format=torch.channels_last)
    seen = watch(net)
    z = net(x.to(memory_format=torch.channels_last), *rest)
    assert_close(z, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert z.is_contiguous(memory_format=torch.channels_last)
    maps = {n: t for n, t in seen.items() if t.ndim == 4}
    assert len(maps) > 20
    assert not [n for n, t in maps.items() if not t.is_contiguous(memory_format=torch.channels_last)]


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    """Within 3 % of the largest value; embeddings, coefficients and the sum in float32."""
    net = made()
    x, sigma, labels = inputs()
    seen = watch(net)
    raw: list[Tensor] = []
    net.model.register_forward_hook(lambda _m, _a, out: raw.append(out))
    net(x, sigma, labels)
    full = dict(seen)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, sigma, labels)
        assert net.logvar(sigma).dtype == torch.float32
    assert y.dtype == torch.float32 and raw[1].dtype == torch.bfloat16
    assert (raw[1] - raw[0]).abs().max() < 0.03 * raw[0].abs().max()
    for n in ("unet.emb_fourier", "unet.emb_noise", "unet.emb_label"):
        assert torch.equal(seen[n], full[n]), n
    assert {t.dtype for n, t in seen.items() if "conv" in n or "attn" in n or n.endswith("norm")} == {torch.bfloat16}
    c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    assert_close(y, c.c_skip * x + c.c_out * raw[1].float(), rtol=0, atol=0)


@torch.no_grad()
def test_float64_is_float64_everywhere() -> None:
    net = made().double()
    seen = watch(net)
    x, sigma, labels = inputs()
    assert net(x.double(), sigma, labels).dtype == torch.float64
    assert {t.dtype for t in seen.values()} == {torch.float64}
    assert net.logvar(sigma).dtype == torch.float64


@pytest.mark.parametrize("bf16", [False, True])
def test_compiles_without_a_graph_break(bf16: bool) -> None:
    net, args = made(), inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = net(*args)
        assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_arguments_do_what_they_say() -> None:
    x, sigma, labels = inputs()
    y = made()(x, sigma, labels)
    for changes in (
        {"label_balance": 0.1},
        {"concat_balance": 0.8},
        {"res_balance": 0.6},
        {"attn_balance": 0.6},
        {"channels_per_head": 8},
        {"clip_act": 0.5},
        {"resample_filter": [1, 3, 3, 1]},
    ):
        net = made(**changes)
        assert {k: t.shape for k, t in net.state_dict().items()} == {k: t.shape for k, t in made().state_dict().items()}
        assert not torch.allclose(net(x, sigma, labels), y, rtol=1e-3, atol=1e-3), changes
    assert_close(made(clip_act=None)(x, sigma, labels), y)
    wide = made(channel_mult_noise=3, channel_mult_emb=5, logvar_channels=32)
    assert wide.unet.emb_noise.weight.shape == (80, 48) and wide.logvar_linear.weight.shape == (1, 32)
    plain = made(label_dim=0)
    assert plain.unet.emb_label is None and plain(x, sigma).shape == x.shape


@torch.no_grad()
def test_dropout_only_in_training_and_labels_matter() -> None:
    net = made(dropout=0.5)
    x, sigma, labels = inputs()
    y = net(x, sigma, labels)
    assert torch.equal(net(x, sigma, labels), y)
    assert not torch.allclose(net(x, sigma, labels.flip(0)), y)
    assert_close(net(x, sigma), net(x, sigma, torch.zeros_like(labels)))  # no label is a row of zeros
    assert_close(net(x, sigma, labels[:1]), net(x, sigma, labels[:1].expand(3, -1)))
    net.train()
    assert not torch.allclose(net(x, sigma, labels), net(x, sigma, labels))


def test_it_saves_and_loads(tmp_path: Path) -> None:
    net = made(clip_act=None, dropout=0.1, channel_mult_emb=None)
    save_network(net, tmp_path / "x.safetensors", kimg=3)
    again, meta = load_network(tmp_path / "x.safetensors")
    assert isinstance(again, EDM2Precond) and meta == {"kimg": 3} and again.init_kwargs == net.init_kwargs
    x, sigma, labels = inputs()
    with torch.no_grad():
        assert torch.equal(net(x, sigma, labels), again(x, sigma, labels))
        assert torch.equal(net.logvar(sigma), again.logvar(sigma))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))


def test_building_on_meta_is_free() -> None:
    with torch.device("meta"):
        net = from_edm("EDM2Precond", **SMALL)
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))


def test_the_probe_finds_its_layers() -> None:
    """Convolutions, linear layers, stages and resolutions, from EDM's names; the skip path is a layer's output."""
    result = probe(made(img_channels=1), [10.0, 0.1], data="digits", layers="unet.*", n=2, stats="rms", progress=False)
    frame = result.frame.drop_duplicates("layer").set_index("layer")
    conv = frame.loc["unet.dec.8x8_block0.conv_res1"]
    assert (conv["kind"], conv["stage"], conv["resolution"]) == ("conv_res1", "dec", 8)
    types = {layer: about.type for layer, about in inventory(made()).items()}
    assert types["unet.dec.8x8_block0.conv_res1"] == "conv" and types["unet.emb_noise"] == "linear"
    norms = result.frame[result.frame.kind == "norm"]
    assert (norms.value.sub(1).abs() < 1e-2).all() and all(types[n] == "norm" for n in norms.layer)
    assert set(norms.layer) == {f"unet.enc.{n}.norm" for n in ("16x16_block0", "8x8_down", "8x8_block0")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels_per_head": 12}, "32 channels in heads of 12: give model_channels in steps of channels_per_head"),
        ({"channels_per_head": 64}, "32 channels in heads of 64"),
        ({"channel_mult": []}, r"channel_mult gives widths \[\]: give at least one"),
        ({"img_resolution": 15}, r"15 pixels with 2 levels \(channel_mult\), each half as large: give a multiple of 2"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter=\[1, 2, 1\]: give an even number of taps"),
        ({"model_type": "SongUNet"}, "Precond cannot be built from .*model_type"),
        ({"label_dropout": 0.1}, "Precond cannot be built from .*label_dropout"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GddlabError, match=message) as e:
        from_edm("Precond", **SMALL | changes)
    assert "\n" not in str(e.value)


def test_it_has_no_student_yet() -> None:
    with pytest.raises(GddlabError, match="EDM2Precond teacher has no one-step student: give an EDMPrecond") as e:
        make_student(made())
    assert "\n" not in str(e.value)


def test_calls_that_do_not_fit_are_refused() -> None:
    net, (x, sigma, labels) = made(), inputs()
    for call, message in (
        (lambda: net(x[:, :2], sigma), r"x has shape \(3, 2, 16, 16\): this network takes \(B, 3, H, W\)"),
        (lambda: net(x, sigma, labels[:2]), r"give one-hot rows, \(3, 10\)"),
        (lambda: net(x, sigma, labels, target=0.1), "takes no target"),
        (lambda: made().half()(x, sigma), "weights are float16, too coarse"),
    ):
        with pytest.raises(GddlabError, match=message):
            call()
