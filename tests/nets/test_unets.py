"""U-Nets: memory formats, precisions, compilation, dropout, labels, every encoder and decoder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets import Precond, from_edm, without_labels

SMALL: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
}
SONG = SMALL | {"model_type": "SongUNet"}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("EDMPrecond", SONG | {"label_dim": 10, "augment_dim": 9}),
    "ncsnpp": (
        "EDMPrecond",
        SONG
        | {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": [1, 3, 3, 1],
            "label_dim": 10,
            "augment_dim": 9,
        },
    ),
    "skip": (
        "VEPrecond",
        SONG | {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1], "label_dim": 10},
    ),
    "adm": ("iDDPMPrecond", SMALL | {"model_channels": 32, "label_dim": 10, "augment_dim": 9}),
}


def shaken(precond: str, kwargs: dict[str, Any]) -> Precond:
    """A network whose branches all contribute; fresh ones start near zero."""
    torch.manual_seed(0)
    net = from_edm(precond, **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Precond:
    return shaken(*NETS[request.param])


def inputs(net: Precond, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=g)
    augment = torch.randn(batch, 9, generator=g) if net.init_kwargs.get("augment_dim") else None
    return x, torch.tensor([0.05, 1.0, 40.0])[:batch], torch.eye(10)[:batch], augment


def watch(net: Precond) -> dict[str, torch.Tensor]:
    """Outputs of all leaf modules by name, filled in the next pass."""
    seen: dict[str, torch.Tensor] = {}
    for name, m in net.named_modules():
        if not list(m.children()):
            m.register_forward_hook(lambda _m, _a, out, n=name: seen.__setitem__(n, out))
    return seen


def test_channels_last_is_kept_and_changes_nothing(net: Precond) -> None:
    x, *rest = inputs(net)
    with torch.no_grad():
        y = net(x, *rest)
        net.to(memory_format=torch.channels_last)
        seen = watch(net)
        z = net(x.to(memory_format=torch.channels_last), *rest)
    assert_close(z, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert z.is_contiguous(memory_format=torch.channels_last)
    maps = {n: t for n, t in seen.items() if t.ndim == 4}
    assert len(maps) > 30
    assert not [n for n, t in maps.items() if not t.is_contiguous(memory_format=torch.channels_last)]


def test_contiguous_stays_contiguous(net: Precond) -> None:
    seen = watch(net)
    with torch.no_grad():
        net(*inputs(net))
    assert not [
        n for n, t in seen.items() if not t.is_contiguous() and not n.endswith(".proj")
    ]  # attention is channels last


def test_bfloat16_autocast(net: Precond) -> None:
    """Within 3 % of the largest value of U-Net's output; embeddings, coefficients and the sum in float32, exactly."""
    x, sigma, *labels = inputs(net)
    seen = watch(net)
    raw: list[torch.Tensor] = []
    net.model.register_forward_hook(lambda _m, _a, out: raw.append(out))
    with torch.no_grad():
        net(x, sigma, *labels)
        full = dict(seen)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x, sigma, *labels)
    assert y.dtype == torch.float32
    assert raw[1].dtype == torch.bfloat16
    assert (raw[1] - raw[0]).abs().max() < 0.03 * raw[0].abs().max()
    embeddings = [n for n in full if n.startswith("model.map_")]
    assert len(embeddings) >= 4
    for n in embeddings:
        assert torch.equal(seen[n], full[n]), n
    convolutions = [n for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert {seen[n].dtype for n in convolutions} == {torch.bfloat16}
    c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    assert_close(y, c.c_skip * x + c.c_out * raw[1][:, :3].float(), rtol=0, atol=0)


def test_float64_is_float64_everywhere(net: Precond) -> None:
    net.double()
    seen = watch(net)
    x, sigma, labels, augment = inputs(net)
    with torch.no_grad():
        y = net(x.double(), sigma, labels, augment)  # labels may come in float32
    assert y.dtype == torch.float64
    assert {t.dtype for t in seen.values()} == {torch.float64}


@pytest.mark.parametrize(("name", "bf16"), [("ncsnpp", True), ("skip", False), ("adm", False)])
def test_compiles_without_a_graph_break(name: str, bf16: bool) -> None:
    net = shaken(*NETS[name])
    torch._dynamo.reset()
    args = inputs(net, 2)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = net(*args)
        assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["ncsnpp", "adm"])
def test_a_target_time_compiles_without_a_graph_break(name: str) -> None:
    kwargs = {k: v for k, v in NETS[name][1].items() if k != "augment_dim"}
    net = shaken(
        "OneStepPrecond", kwargs | {"model_type": type(shaken(*NETS[name]).model).__name__, "target_time": True}
    )
    x, sigma, labels, _ = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = net(x, sigma, labels, target=sigma / 2)
        assert_close(compiled(x, sigma, labels, target=sigma / 2), expected, rtol=1e-5, atol=1e-4)
        assert (expected - net(x, sigma, labels)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("encoder", "decoder"), list(itertools.product(["standard", "skip", "residual"], ["standard", "skip"]))
)
def test_every_encoder_and_decoder(encoder: str, decoder: str) -> None:
    kwargs = SONG | {"encoder_type": encoder, "decoder_type": decoder, "resample_filter": [1, 3, 3, 1]}
    net = shaken("EDMPrecond", kwargs).train()
    x, sigma, *_ = inputs(net)
    net(x, sigma).square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    names = [n.removeprefix("model.") for n in net.state_dict()]
    side = {n.rpartition(".")[0] for n in names if "aux" in n}
    expected = {
        "standard": set(),
        "skip": {"enc.8x8_aux_down", "enc.8x8_aux_skip"},
        "residual": {"enc.8x8_aux_residual"},
    }[encoder] | {"dec.16x16_aux_norm", "dec.16x16_aux_conv"}
    if decoder == "skip":
        expected |= {"dec.8x8_aux_norm", "dec.8x8_aux_conv", "dec.16x16_aux_up"}
    assert side == expected
    if encoder == decoder == "skip":  # in the order in which they run
        assert [n for n in net.model.dec if "16x16" in n][-3:] == ["16x16_aux_up", "16x16_aux_norm", "16x16_aux_conv"]
        assert "dec.16x16_aux_up.resample_filter" in names and "enc.8x8_aux_down.resample_filter" in names
        assert net.model.enc["8x8_aux_skip"].weight.shape == (16, 3, 1, 1)


def test_dropout_only_in_training(net: Precond) -> None:
    for m in net.modules():
        if hasattr(m, "dropout"):
            m.dropout = 0.5
    args = inputs(net)
    with torch.no_grad():
        assert torch.equal(net(*args), net(*args))
        net.train()
        assert not torch.allclose(net(*args), net(*args))


def test_label_dropout(net: Precond) -> None:
    """In training each image loses its label with the given probability, also when one label serves all."""
    x, *_ = inputs(net, 1)
    x = x.expand(64, -1, -1, -1)
    label = torch.eye(10)[:1]
    net.model.label_dropout = 0.5
    with torch.no_grad():
        with_label, without = net(x[:1], 1.0, label), net(x[:1], 1.0)
        assert torch.equal(net(x[:1], 1.0, label), with_label)  # not in eval mode
        for m in net.modules():
            if hasattr(m, "dropout"):
                m.dropout = 0.0
        net.train()
        torch.manual_seed(0)
        y = net(x, 1.0, label)
    kept = (y - with_label).abs().amax((1, 2, 3)) < 1e-4
    dropped = (y - without).abs().amax((1, 2, 3)) < 1e-4
    assert bool((kept ^ dropped).all()) and 16 <= int(dropped.sum()) <= 48


def test_labels_matter_and_are_checked(net: Precond) -> None:
    x, sigma, labels, augment = inputs(net)
    with torch.no_grad():
        y = net(x, sigma, labels, augment)
        assert not torch.allclose(y, net(x, sigma, labels.flip(0), augment))
        if augment is not None:
            assert not torch.allclose(y, net(x, sigma, labels))
            assert_close(net(x, sigma, labels), net(x, sigma, labels, torch.zeros_like(augment)))
    with pytest.raises(GddlabError, match=r"class_labels are \(3,\): give one-hot rows, \(3, 10\)"):
        net(x, sigma, torch.arange(3))
    with pytest.raises(GddlabError, match=r"\(2, 10\)"):
        net(x, sigma, labels[:2])


def test_iddpm_rounds_sigma_to_its_levels() -> None:
    net = shaken(*NETS["adm"])
    u = net.u
    assert u.shape == (1001,) and float(u[-1]) == 0 and net.sigma_max == float(u[0])
    sigma = torch.tensor([1e-9, float(u[500]), (float(u[300]) * 0.51 + float(u[301]) * 0.49), 1e9], dtype=torch.float64)
    rounded = net.round_sigma(sigma)
    assert rounded.dtype == torch.float64
    assert_close(rounded, u[[1000, 500, 300, 0]].double())
    assert_close(net.round_sigma(rounded), rounded)
    assert_close(net.coefficients(u[[0, 500, 999]].reshape(-1, 1, 1, 1)).c_noise, torch.tensor([999.0, 499.0, 0.0]))
    other = from_edm("EDMPrecond", **SONG)
    assert torch.equal(other.round_sigma(sigma), sigma)


def test_a_network_without_its_labels_is_the_conditional_one_without_a_label(net: Precond) -> None:
    own = without_labels(net.double())
    assert own.label_dim == 0 and not own.training and without_labels(net.train()).training
    assert not any("map_label" in name for name, _ in own.named_parameters())
    x, sigma = torch.randn(2, 3, 16, 16).double(), torch.tensor([80.0, 0.1])
    with torch.no_grad():
        assert_close(own(x, sigma), net.eval()(x, sigma), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(own(x, sigma), net(x, sigma, torch.eye(10)[:2].double()), atol=1e-3)
    with pytest.raises(GddlabError, match="this network is unconditional: give a conditional U-Net"):
        without_labels(own)


def test_a_transformer_keeps_its_labels() -> None:
    net = from_edm("DiTPrecond", img_resolution=8, img_channels=1, label_dim=3, model_channels=16, num_blocks=1)
    with pytest.raises(GddlabError, match="this network is a SiT: give a conditional U-Net"):
        without_labels(net)


def test_odd_filters_are_refused() -> None:
    with pytest.raises(GddlabError, match=r"resample_filter=\[1, 2, 1\]: give an even number of taps"):
        from_edm("EDMPrecond", **SONG, resample_filter=[1, 2, 1])


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
def test_a_size_that_cannot_be_halved_is_refused(kind: str) -> None:
    changes: dict[str, Any] = SMALL | {"model_type": kind, "img_resolution": 30, "channel_mult": [1, 1, 1]}
    with pytest.raises(
        GddlabError, match=r"30 pixels with 3 levels \(channel_mult\), .* give a multiple of 4, or fewer"
    ):
        from_edm("EDMPrecond", **changes)


@pytest.mark.parametrize("channels", [3, 14, 132])
def test_channels_are_whole_groups(channels: int) -> None:
    with pytest.raises(GddlabError, match=r"\d+ channels in \d+ groups: give model_channels in steps of 4"):
        from_edm("EDMPrecond", **SONG | {"model_channels": channels})


def test_a_network_has_levels() -> None:
    for mult in ([0], [1, -1]):
        with pytest.raises(GddlabError, match=r"channel_mult gives widths .*: give at least one, all above 0"):
            from_edm("EDMPrecond", **SONG | {"channel_mult": mult})
    with pytest.raises(GddlabError, match=r"channel_mult gives widths \[\]: give at least one"):
        from_edm("EDMPrecond", **SONG | {"channel_mult": []})
