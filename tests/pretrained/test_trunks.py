"""The trunks of LPIPS against the package's own slices, and where their weights are found."""

from __future__ import annotations

import copy
import hashlib
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from torchvision import models

from gddlab.distill.lpips import LPIPS, LPIPSDiscriminator
from gddlab.errors import GddlabError, NotFound
from gddlab.pretrained.trunks import LPIPS_LAYERS, TRUNKS, LPIPSTrunk, check_trunk, unit

SMALL = {"vgg": 16, "alex": 31, "squeeze": 17}
THEIRS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet"}


def batch(n: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def state_of(trunk: LPIPSTrunk, **more: Tensor) -> dict[str, Tensor]:
    """As torchvision names it."""
    return {f"features.{k}": v for k, v in trunk.features.state_dict().items()} | more


@pytest.mark.parametrize("net", TRUNKS)
def test_levels_are_those_of_the_package(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trunk = LPIPSTrunk(net, input_size=SMALL[net] + 16, weights="random").double()
    model = SimpleNamespace(features=copy.deepcopy(trunk.features))
    name = TRUNKS[net].model
    monkeypatch.setattr(lpips.pretrained_networks.tv, name, lambda pretrained: model)
    theirs = getattr(lpips.pretrained_networks, THEIRS[net])(pretrained=False).double()
    scaling = lpips.ScalingLayer().double()
    x = batch(size=SMALL[net] + 16)
    levels, expected = trunk(x), theirs(scaling(x))
    assert [f.shape[1] for f in levels] == list(trunk.channels)
    assert len(levels) == len(expected)
    for a, b in zip(levels, expected, strict=True):
        assert a.std() > 0.01
        assert_close(a, b)


@pytest.mark.parametrize("net", TRUNKS)
def test_the_smallest_size_works_and_a_smaller_one_is_refused(net: str) -> None:
    assert LPIPSTrunk(net, input_size=SMALL[net], weights="random")(batch().float())[-1].shape[2:] == (1, 1)
    for build in (lambda **k: LPIPSTrunk(net, **k), lambda **k: check_trunk(net, **k)):
        with pytest.raises(GddlabError, match=f"input_size={SMALL[net] - 1}: .* takes {SMALL[net]} pixels at least"):
            build(input_size=SMALL[net] - 1, weights="random")


def test_images_are_resized_and_grey_is_repeated() -> None:
    trunk = LPIPSTrunk("squeeze", input_size=24, weights="random").double()
    grey = batch(channels=1, size=16)
    expected = trunk(F.interpolate(grey, size=(24, 24), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1))
    for a, b in zip(trunk(grey), expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "place",
    [
        "alexnet.safetensors",
        "home/alexnet.pth",
        "home/backbones/alexnet.pt",
        "cache/backbones/alexnet.safetensors",
        "cache/backbones/alexnet-owt-HASH.pth",
        "torch/hub/checkpoints/alexnet-owt-HASH.pth",
    ],
)
def test_weights_are_found(place: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trunk = LPIPSTrunk("alex", input_size=32, weights="random")
    state = state_of(trunk, **{"classifier.1.weight": torch.zeros(2, 2)})
    file = nowhere / "saved"
    if place.endswith(".safetensors"):
        save_file(state, file)
    else:
        torch.save(state, file)
    path = nowhere / place.replace("HASH", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.rename(path)
    monkeypatch.setattr(models.AlexNet_Weights.IMAGENET1K_V1.value, "url", f"https://example.org/{path.stem}.pth")
    check_trunk("alex")
    for weights in (None, path):
        again = LPIPSTrunk("alex", input_size=32, weights=weights)
        for name, p in trunk.state_dict().items():
            assert torch.equal(again.state_dict()[name], p)


def test_weights_come_from_the_hub(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = LPIPSTrunk("alex", weights="random")
    asked = []

    def retrieve(url: str, known_hash: str | None, fname: str, path: Path, downloader: Any) -> None:
        asked.append(url)
        torch.save(state_of(trunk), path / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(GddlabError, match="its sha256 is not the one in its name"):
        LPIPSTrunk("alex")
    monkeypatch.setattr(models.AlexNet_Weights.IMAGENET1K_V1.value, "url", "https://example.org/alexnet.pth")
    assert torch.equal(next(LPIPSTrunk("alex").parameters()), next(trunk.parameters()))
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "https://example.org/alexnet.pth"]
    (nowhere / "cache" / "backbones" / "alexnet.pth").unlink()
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: SimpleNamespace(close=lambda: None))
    check_trunk("alex")


def test_missing_weights_are_refused_in_one_line(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(nowhere / "cache" / "backbones" / "vgg16.pth")
    with pytest.raises(GddlabError, match="URLError") as e:
        check_trunk("vgg")
    assert where in str(e.value)
    with pytest.raises(GddlabError, match=r"no weights of vgg16 \(URLError") as e:
        LPIPSDiscriminator(LPIPS())
    assert where in str(e.value)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    for build in (check_trunk, LPIPSTrunk):
        with pytest.raises(GddlabError, match="GDDLAB_OFFLINE is set") as e:
            build("vgg")
        assert where in str(e.value)
        assert "vgg16-397923af.pth" in str(e.value)
        assert "\n" not in str(e.value)
    with pytest.raises(NotFound, match=r"no weights of vgg16 at absent\.pth"):
        check_trunk("vgg", "absent.pth")
    with pytest.raises(GddlabError, match="unknown LPIPS network 'vgg19'"):
        check_trunk("vgg19")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(state_of(LPIPSTrunk("squeeze", weights="random")), tmp_path / "squeeze.safetensors")
    for build in (check_trunk, LPIPSTrunk):
        with pytest.raises(GddlabError, match=r"does not fit: 0\.weight is \(64, 3, 3, 3\), not \(64, 3, 11, 11\)"):
            build("alex", tmp_path / "squeeze.safetensors") if build is check_trunk else build(
                "alex", weights=tmp_path / "squeeze.safetensors"
            )


def test_unit_normalisation_is_twice_differentiable_at_zero() -> None:
    x = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: unit(v, 1e-2), x)
    y = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    assert_close(unit(y).norm(dim=1), torch.ones(2, 2, 2, dtype=torch.float64))


def test_a_given_path_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.pth").write_bytes(b"x")
    assert LPIPS_LAYERS.find("~/own.pth") == tmp_path / "own.pth"
    with pytest.raises(NotFound, match=r"at ~/other\.pth: give a path"):
        LPIPS_LAYERS.find("~/other.pth")
