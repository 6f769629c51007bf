"""Perceptual distances: LPIPS as its package computes it, the stand-in by its formula, gradients, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.distill.distances import Lite0Distance, LPIPSDistance, SquaredDistance
from gddlab.distill.instance import Consistency
from gddlab.errors import GddlabError
from gddlab.pretrained.backbones import lite_backbone
from gddlab.pretrained.trunks import LPIPSTrunk

DISTANCES: dict[str, Callable[[], nn.Module]] = {
    "lpips": lambda: LPIPSDistance("random", input_size=32),
    "l2": SquaredDistance,
    "lite0": Lite0Distance,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return DISTANCES[name]().double()


def pair(n: int = 3, size: int = 16, channels: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2 * n, channels, size, size, generator=generator, dtype=dtype) * 2 - 1
    return x[:n], x[n:]


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_the_packages(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = build("lpips")
    trunk = ours.get_submodule("trunk")
    assert isinstance(trunk, LPIPSTrunk)
    model = SimpleNamespace(features=copy.deepcopy(trunk.features))
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda pretrained: model)
    theirs = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False).double()
    a, b = pair(channels=channels)
    resized = [F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) for x in (a, b)]
    expected = theirs(*resized).flatten()
    assert expected.min() > 1e-3
    assert_close(ours(a, b), expected)


def test_lite0_is_its_formula() -> None:
    a, b = pair(channels=3)
    net = lite_backbone("tf_efficientnet_lite0", fold=False).double()
    levels: list[list[Tensor]] = []
    for x in (a, b):
        seen: list[Tensor] = []
        hooks = [net.blocks[i].register_forward_hook(lambda m, i, o, s=seen: s.append(o)) for i in (1, 2, 4, 6)]  # type: ignore[index, union-attr, misc, operator]
        net(F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False))
        levels.append(seen)
        for h in hooks:
            h.remove()
    expected = torch.zeros(3, dtype=torch.float64)
    for f, g in zip(*levels, strict=True):
        cos = F.cosine_similarity(f, g, dim=1)  # |u - v|^2 = 2 - 2 cos for unit vectors
        expected += (2 - 2 * cos).mean((1, 2)) / f.shape[1] / 4
    assert [f.shape[2] for f in levels[0]] == [16, 8, 4, 2]
    assert_close(build("lite0")(a, b), expected, rtol=1e-4, atol=0)  # folding rounds in float32


def test_l2_is_the_mean_squared_difference() -> None:
    a, b = pair(channels=3)
    assert_close(build("l2")(a, b), torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance(name: str) -> None:
    d = build(name)
    a, b = pair()
    assert d(a, b).shape == (3,)
    assert d(a, b).dtype == torch.float64
    assert (d(a, b) > 0).all()
    assert_close(d(a, b), d(b, a))
    assert (d(a, a) == 0).all()
    assert (d(a, a + 0.1 * (b - a)) < d(a, b)).all()
    assert_close(d(a, b)[1:2], d(a[1:2], b[1:2]))
    assert_close(d(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)), d(a, b))


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_is_the_images_and_nothing_else_moves(name: str) -> None:
    d = build(name)
    assert not any(p.requires_grad for p in d.parameters())
    a, b = pair(n=1)
    a = a.clone().requires_grad_(True)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    (g,) = torch.autograd.grad(d(a, b).sum(), a)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    h = 1e-6
    with torch.no_grad():
        slope = (d(a + h * direction, b) - d(a - h * direction, b)) / (2 * h)
    assert_close((g * direction).sum(), slope.sum(), rtol=1e-4, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())


def test_dead_pixels_leave_the_gradient_finite() -> None:
    d = LPIPSDistance("random", input_size=16)
    with torch.no_grad():
        d.get_submodule("trunk.features.0").bias.fill_(-1e3)  # type: ignore[union-attr, operator]
    a, b = pair(dtype=torch.float32)
    a = a.clone().requires_grad_(True)
    distance = d(a, b)
    (g,) = torch.autograd.grad(distance.sum(), a)
    assert (distance == 0).all()
    assert (g == 0).all()


def test_lpips_takes_weights_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = build("lpips").float().get_submodule("trunk")
    assert isinstance(trunk, LPIPSTrunk)
    state = {f"features.{k}": v for k, v in trunk.features.state_dict().items()}
    (tmp_path / "backbones").mkdir()
    save_file(state, tmp_path / "backbones" / "vgg16.safetensors")
    monkeypatch.setenv("GDDLAB_HOME", str(tmp_path))
    Consistency().find()
    torch.manual_seed(9)
    a, b = pair()
    assert_close(LPIPSDistance(input_size=32).double()(a, b), build("lpips")(a, b))
    save_file(state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "other.pt.safetensors")
    with pytest.raises(GddlabError, match=r"does not fit: 0\.weight is \(64, 1, 3, 3\), not \(64, 3, 3, 3\)"):
        Consistency(distance_weights=str(tmp_path / "other.pt.safetensors")).find()


def test_what_cannot_work_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("l2", "lite0"):
        assert Consistency(distance=name).find() == f"cd by {name}"  # type: ignore[arg-type]
    Consistency(distance_weights="random").find()
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("GDDLAB_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GddlabError, match=r"no weights of vgg16 \(GDDLAB_OFFLINE is set\): put"):
        Consistency().find()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GddlabError, match="LPIPS's linear layers are missing: pip install lpips"):
        Consistency(distance_weights="random").find()
