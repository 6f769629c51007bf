"""The projected discriminator: R1 on every kind of backbone, several backbones, adapters, class embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from gddlab.distill.losses import d_loss_real, r1_penalty
from gddlab.distill.projected import Head, Projected, ProjectedDiscriminator, SNConv2d, load_embedding
from gddlab.errors import GddlabError, NotFound

LITE, VIT = "tf_efficientnet_lite0", "deit_tiny_distilled_patch16_224"


def small(*names: str, size: int = 32, classes: int = 0, fold: bool = True, **fields: Any) -> ProjectedDiscriminator:
    given = {"cout": 4, "head_width": 8, "weights": dict.fromkeys(names, "random"), **fields}
    return ProjectedDiscriminator(Projected(backbones=names, input_size=size, **given), classes=classes, fold=fold)


def images(n: int = 3, channels: int = 3, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def heads(d: nn.Module) -> list[Head]:
    return [m for m in d.modules() if isinstance(m, Head)]


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(
    "names", [("vgg16_bn",), (VIT,), ("resnet18",), (LITE,), ("swin_tiny_patch4_window7_224", LITE)]
)
def test_r1_is_that_of_a_plain_double_backward(names: tuple[str, ...], classes: int) -> None:
    torch.manual_seed(0)
    d = small(*names, classes=classes).double().train()
    x, labels = images(), F.one_hot(torch.tensor([2, 0, 1]), 3) if classes else None
    params = [p for p in d.parameters() if p.requires_grad]
    state = {k: v.clone() for k, v in d.state_dict().items()}
    penalty, surrogate = r1_penalty(d, x, labels)
    found = torch.autograd.grad(surrogate, params, allow_unused=True)
    d.load_state_dict(state)  # the power iteration of a training-mode pass moved u and v
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are differentiable once
        leaf = x.clone().requires_grad_(True)
        total = torch.stack([y.sum() for y in d(leaf, labels)]).sum()
        (g,) = torch.autograd.grad(total, leaf, create_graph=True)
        expected = g.square().sum((1, 2, 3)).mean()
        wanted = torch.autograd.grad(expected, params, allow_unused=True)
    assert penalty > 0
    assert_close(penalty, expected.detach(), rtol=1e-8, atol=0)
    scale = max(float(w.abs().max()) for w in wanted if w is not None)
    assert scale > 0
    for p, a, b in zip(params, found, wanted, strict=True):
        none = torch.zeros_like(p)  # a parameter on which the penalty does not depend
        assert_close(none if a is None else a, none if b is None else b, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize(
    ("name", "size", "logits"),
    [
        ("vgg16_bn", 32, 64),
        ("vgg16_bn", 64, 196),
        ("vgg16_bn", 224, 484),
        (LITE, 32, 16),
        (LITE, 64, 36),
        (LITE, 96, 64),
        (LITE, 224, 64),
        (VIT, 32, 16),
        (VIT, 224, 64),
        ("resnet18.a1_in1k", 160, 16),
        ("vit_tiny_patch16_224", 512, 100),
    ],
)
def test_logits_of_every_size(name: str, size: int, logits: int) -> None:
    d = small(name, size=size)
    with torch.no_grad():
        (y,) = d.eval()(images(1).float())
    assert y.shape == (1, logits)
    assert y.isfinite().all()


def test_the_published_width_and_depth() -> None:
    d = small(LITE, size=224, cout=2, head_width=512)
    widths = [[m.weight_orig.shape[0] for m in h.modules() if hasattr(m, "weight_orig")] for h in heads(d)]
    assert widths == [[64, 128, 256, 512, 1], [128, 256, 512, 1], [256, 512, 1], [512, 1]]


def test_several_backbones_are_each_by_itself() -> None:
    torch.manual_seed(0)
    d = small("vgg16_bn", LITE, VIT).eval()
    x = images().float()
    with torch.no_grad():
        features = d.features(x)
        both = d(x)
        assert [y.shape[1] for y in both] == [64, 16, 16]
        assert len(features) == 12
        for i, (name, net) in enumerate(d.backbones.items()):
            assert_close(features[4 * i], d.projections[name](net(x))[0])
            alone = [
                h(f) for h, f in zip(d.discriminators[name]["mini_discs"], features[4 * i : 4 * i + 4], strict=True)
            ]
            assert_close(torch.cat(alone, 1), both[i])
    d.train()
    assert not any(m.training for net in d.backbones.values() for m in net.modules())
    d_loss_real(d(x)).backward()
    for name, p in d.named_parameters():
        assert (p.grad is not None) == name.startswith("discriminators."), name


def test_state_dicts_hold_what_is_random() -> None:
    torch.manual_seed(0)
    a = small(VIT, "resnet18.a1_in1k").eval()
    torch.manual_seed(1)
    b = small(VIT, "resnet18.a1_in1k").eval()
    for name, net in b.backbones.items():
        net.net.load_state_dict(a.backbones[name].net.state_dict())  # as if pretrained
    x = images().float()
    with torch.no_grad():
        assert not torch.equal(a.features(x)[0], b.features(x)[0])
        b.load_state_dict(a.state_dict())
        for u, v in zip(a(x), b(x), strict=True):
            assert_close(u, v)
    assert {k.split(".")[0] for k in a.state_dict()} == {"adapters", "projections", "discriminators"}
    assert f"adapters.{VIT}.resize.3.weight" in a.state_dict()
    assert "projections.resnet18_a1_in1k.layer3_csm.out_conv.weight" in a.state_dict()
    assert not any(p.requires_grad for p in a.adapters.parameters())
    assert not any(k.startswith("adapters") for k in small(LITE).state_dict())


def test_moving_reaches_backbones_and_adapters() -> None:
    d = small(VIT, LITE).double()
    assert {p.dtype for net in d.backbones.values() for p in net.parameters()} == {torch.float64}
    assert d.adapters[VIT] is d.backbones[VIT].adapter
    assert {f.dtype for f in d.features(images())} == {torch.float64}


@pytest.mark.parametrize("name", ["vgg16_bn", VIT, "resnet18"])
def test_bfloat16_features(name: str) -> None:
    d, x = small(name).eval(), images().float()
    with torch.no_grad():
        exact = d.features(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = d.features(x)
    for a, b in zip(exact, rough, strict=True):
        assert (a - b).norm() < 0.1 * a.norm()


@pytest.mark.parametrize("name", ["vgg16_bn", VIT, "resnet18"])
def test_image_gradients_in_both_modes_agree(name: str) -> None:
    """Folded and unfolded backbones have the same derivative: in-place activations keep what it needs."""
    torch.manual_seed(0)
    a = small(name).double().eval()
    torch.manual_seed(0)
    b = small(name, fold=False).double().eval()
    b.load_state_dict(a.state_dict())
    grads = []
    for d in (a, b):
        x = images().requires_grad_(True)
        grads.append(torch.autograd.grad(torch.stack([y.square().sum() for y in d(x)]).sum(), x)[0])
    assert grads[0].abs().sum() > 0
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))


# Class embeddings.


def write(path: Path, table: np.ndarray | dict[str, np.ndarray]) -> Path:
    named = table if isinstance(table, dict) else {"embed": table}
    if path.suffix == ".npy":
        np.save(path, next(iter(named.values())))
    elif path.suffix == ".npz":
        np.savez(path, **named)
    elif path.suffix == ".safetensors":
        save_file({k: torch.from_numpy(v) for k, v in named.items()}, path)
    elif path.suffix == ".pth":
        torch.save(torch.from_numpy(next(iter(named.values()))), path)
    else:
        torch.save({k: torch.from_numpy(v) for k, v in named.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".pth"])
def test_an_embedding_from_a_file(suffix: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(5, 320)).astype(np.float32)
    path = write(tmp_path / f"e{suffix}", table)
    d = small(LITE, classes=3, embedding_file=str(path))
    assert len(heads(d)) == 4
    for head in heads(d):
        assert torch.equal(head.embed.weight, torch.from_numpy(table[:3]))
        assert head.embed.weight.requires_grad


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    good = np.zeros((5, 320), dtype=np.float32)
    for name, table, match in (
        ("few.npy", good[:2], r"few\.npy holds \(2, 320\): give one array of \(3, 320\)"),
        ("narrow.pt", good[:, :300].copy(), r"holds \(5, 300\)"),
        ("flat.npz", good[0], r"holds \(320,\)"),
        ("two.npz", {"a": good, "b": good}, r"holds \(5, 320\), \(5, 320\)"),
        ("whole.npy", good.astype(int), "not finite floating point"),
        ("nan.npy", good + np.nan, "not finite floating point"),
    ):
        with pytest.raises(GddlabError, match=match):
            load_embedding(write(tmp_path / name, table), 3)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(GddlabError, match="cannot be read"):
        load_embedding(tmp_path / "objects.npy", 3)
    with pytest.raises(NotFound, match="no such file"):
        load_embedding(tmp_path / "absent.npy", 3)
    with pytest.raises(GddlabError, match=r"give one of \.npy"):
        load_embedding(tmp_path / "e.csv", 3)


def test_arguments() -> None:
    with pytest.raises(GddlabError, match="takes multiples of 32"):
        small(LITE, size=40)


# Spectral normalisation under autocast, in both memory formats, against autograd's own rule.

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalisation_is_the_formula(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = SNConv2d(6, 8, 4).double().to(memory_format=layout)
    w, u, v = (t.detach().clone().contiguous() for t in (conv.weight_orig, conv.weight_u, conv.weight_v))
    rows = w.flatten(1).requires_grad_(True)
    with torch.no_grad():
        v = F.normalize(rows.t() @ u, dim=0)
        u = F.normalize(rows @ v, dim=0)
    expected = (rows / torch.dot(u, rows @ v)).view(8, 6, 4, 4)
    slope = torch.randn(8, 6, 4, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(expected, rows, slope)
    got = conv.weight()
    got.backward(slope)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_close(conv.weight_orig.grad, grad.view(8, 6, 4, 4), rtol=1e-12, atol=1e-12)
    assert_close((conv.weight_u, conv.weight_v), (u, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_stay_float32_under_autocast(layout: torch.memory_format) -> None:
    """So that R1's pass without autocast can follow one with it, and a checkpoint's buffers keep their dtype."""
    torch.manual_seed(0)
    conv = SNConv2d(6, 8, 4).to(memory_format=layout)
    x = torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.weight_u.dtype == conv.weight_v.dtype == torch.float32
    assert conv(x).dtype == torch.float32
