"""Pickles of EDM2 in the form of its authors: networks, half precision, codec, card, conversion, damage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.nets import EDM2Precond, Precond, load_network
from gddlab.teachers import PUBLISHED, catalog, convert, edm, load_teacher
from gddlab.teachers.edm import read_edm
from tests.models import vae
from tests.teachers.attacks import load, small_edm2
from tests.teachers.pickles import RAW_MEAN, RAW_STD, dumps, easy, encoder, network, persistent, snapshot2


def rounded(net: Precond) -> Precond:
    """The network with weights as 16 bits hold them."""
    return copy.deepcopy(net).half().float()


def assert_same(net: Precond, loaded: Precond) -> None:
    a, b = net.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and b[k].dtype == torch.float32 for k in a)
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    with torch.no_grad():
        y = net(x, 0.7, labels)
        assert torch.equal(y, loaded(x, 0.7, labels)) and (y - x).abs().max() > 0.1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_snapshots(channels: int, protocol: int, zipped: bool, tmp_path: Path) -> None:
    net = small_edm2(img_channels=channels)
    path = tmp_path / "x.pkl"
    path.write_bytes(snapshot2(net, protocol=protocol, zipped=zipped))
    assert load(path)[1] == ""  # under watch: nothing is imported or run
    loaded, meta = read_edm(path)
    assert isinstance(loaded, EDM2Precond) and not loaded.training
    assert meta["original"] | {"class": "Precond", "key": "ema", "data": "img512-sd.zip"} == meta["original"]
    assert meta["training"] == {"p_mean": -0.4, "p_std": 1.0}
    assert ("codec" in meta) == (channels == 4)
    assert_same(rounded(net), loaded)


WRITTEN: dict[str, Any] = {
    "arguments by position": {"args": (4, 4, 3, True)},
    "defaults named": {"init": {"clip_act": 256, "resample_filter": [1, 1], "channel_mult_noise": None}},
    "an expected deviation": {"init": {"sigma_data": 0.5}},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ways_of_writing(name: str, tmp_path: Path) -> None:
    net = small_edm2(label_dim=3)
    (tmp_path / "x.pkl").write_bytes(snapshot2(net, **WRITTEN[name]))
    assert_same(rounded(net), read_edm(tmp_path / "x.pkl")[0])


def test_the_card_says_path_and_codec(tmp_path: Path) -> None:
    net = small_edm2(label_dim=3)
    path = tmp_path / "edm2-img512-s-2147483-0.130.pkl"
    path.write_bytes(snapshot2(net))
    card = load_teacher(path).card
    assert card.codec == {
        "vae": "stabilityai/sd-vae-ft-mse",
        "factor": 8,
        "range": [0, 1],
        "mean": list(RAW_MEAN),
        "std": list(RAW_STD),
        "final_std": 0.5,
    }
    assert (card.path, card.levels) == ("EDM, sigma_data 0.5", "ln sigma ~ N(-0.4, 1²)")
    assert (card.precond, card.unet, card.classes, card.sigma_min, card.sigma_max) == (
        "EDM2Precond",
        "EDM2UNet",
        3,
        0.002,
        80.0,
    )
    text = str(card)
    for line in (
        "network          EDM2UNet, 8 x [1], 1 block per level",
        "latents          4x4, 4 channels",
        "path             EDM, sigma_data 0.5",
        "raw mean 5.81 3.25 0.12 -2.15; raw std 4.17 4.62 3.71 3.28, then 0.5",
        "original         Precond in edm2-img512-s-2147483-0.130.pkl",
        "data, it says    img512-sd.zip",
    ):
        assert line in text, text
    # the codec is the encoder's: latents of the same raw numbers are the same
    raw = np.float32([1.5, -2.0, 0.3, 4.0])
    codec = card.codec
    theirs = raw * (np.float32(0.5) / np.float32(RAW_STD)) - np.float32(RAW_MEAN) * (
        np.float32(0.5) / np.float32(RAW_STD)
    )
    np.testing.assert_allclose(
        (raw - np.array(codec["mean"])) / codec["std"] * codec["final_std"], theirs, rtol=1e-5, atol=1e-6
    )


def test_pixels_have_no_codec_and_strange_encoders_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(snapshot2(small_edm2(img_channels=3)))
    card = load_teacher(path).card
    assert card.codec is None and "images           4x4, 3 channels" in str(card) and "\ncodec " not in str(card)
    path.write_bytes(snapshot2(small_edm2(), content={"encoder": persistent("MyEncoder", {})}))
    assert "codec            MyEncoder, not known here" in str(load_teacher(path).card)
    path.write_bytes(dumps(easy(ema=network(small_edm2()))))  # without an encoder, or a loss
    card = load_teacher(path).card
    assert card.codec is None and card.levels is None


def test_it_converts_and_keeps_the_card(tmp_path: Path) -> None:
    net = small_edm2(label_dim=3)
    (tmp_path / "x.pkl").write_bytes(snapshot2(net))
    done = convert(tmp_path / "x.pkl", tmp_path / "y.safetensors")
    assert done.outputs == 10
    before, after = load_teacher(tmp_path / "x.pkl").card, load_teacher(tmp_path / "y.safetensors").card
    assert (after.codec, after.levels, after.path, after.sha256) == (
        before.codec,
        before.levels,
        before.path,
        before.sha256,
    )
    assert_same(rounded(net), load_network(tmp_path / "y.safetensors")[0])


@pytest.mark.parametrize("key", [None, "ema"])
def test_ours_pickled_by_torch(key: str | None, tmp_path: Path) -> None:
    net = small_edm2(label_dim=3)
    torch.save(net if key is None else {key: net}, tmp_path / "net.pt")
    loaded = load_teacher(tmp_path / "net.pt")
    assert isinstance(loaded, EDM2Precond)
    assert_same(net, loaded)


def test_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = small_edm2(label_dim=3), small_edm2(label_dim=2)
    monkeypatch.setattr(edm, "ARCHITECTURES", {"one": ("EDM2Precond", net.init_kwargs)})
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert_same(net, load_teacher(tmp_path / "x.pt"))
    torch.save(other.state_dict(), tmp_path / "x.pt")
    with pytest.raises(GddlabError, match=r"holds weights alone, .* of no network that gddlab knows"):
        load_teacher(tmp_path / "x.pt")


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "a scale of three": (
        {"content": {"encoder": encoder(3)}},
        r"the scale of its StabilityVAEEncoder is an array of shape \(3,\): no 4 finite numbers, one per channel",
    ),
    "a scale of NaN": (
        {"content": {"encoder": encoder(scale=np.float32([1, 1, 1, np.nan]))}},
        "the scale of its StabilityVAEEncoder is",
    ),
    "a scale of 0": ({"content": {"encoder": encoder(scale=np.zeros(4, "f4"))}}, "no positive numbers"),
    "a bias that is a text": (
        {"content": {"encoder": encoder(bias="x")}},
        "the bias of its StabilityVAEEncoder is a str",
    ),
    "a VAE without a name": ({"content": {"encoder": encoder(vae_name=7)}}, "names no VAE"),
    "an argument of EDM": ({"init": {"label_dropout": 0.1}}, "Precond cannot be built from its arguments"),
    "heads that do not divide": ({"init": {"channels_per_head": 3}}, "8 channels in heads of 3"),
    "no heads": ({"init": {"channels_per_head": 0}}, "channels_per_head=0: accepted are whole numbers"),
    "64 blocks": ({"init": {"num_blocks": 64}}, "64 blocks in 1 levels, but only"),
    "wider": ({"init": {"model_channels": 16}}, r"unet.emb_fourier.freqs is \(8,\), where Precond has \(16,\)"),
    "no clipping by a text": ({"init": {"clip_act": "no"}}, "clip_act='no': accepted are numbers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_with_the_byte(name: str, tmp_path: Path) -> None:
    changes, message = DAMAGED[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(content := snapshot2(small_edm2(), **changes))
    with pytest.raises(GddlabError, match=rf"x\.pkl is refused at byte ([\d,]+): .*{message}") as e:
        load_teacher(path)
    assert "\n" not in str(e.value)
    at = int(str(e.value).split("byte ")[1].split(":")[0].replace(",", ""))
    assert 0 < at < len(content)


def test_levels_that_are_no_numbers_are_not_told(tmp_path: Path) -> None:
    for p_mean in ("x", float("nan"), 10**400, True, None):
        loss = persistent("EDM2Loss", {"P_mean": p_mean, "P_std": 1.0})
        (tmp_path / "x.pkl").write_bytes(snapshot2(small_edm2(), content={"loss_fn": loss}))
        assert load_teacher(tmp_path / "x.pkl").card.levels is None


def test_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By name, from a copy in the working folder; another network under its name is refused."""
    name = "edm2-img512-s-2147483-0.130"
    known = PUBLISHED[name]
    assert known.url == f"https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/{name}.pkl"
    assert (known.architecture, known.data, known.kimg, known.verified) == (
        "edm2-img512-s",
        "imagenet-512",
        2147483,
        True,
    )
    assert len([n for n in PUBLISHED if n.startswith("edm2-")]) == 51
    monkeypatch.chdir(tmp_path)
    net = small_edm2()
    (tmp_path / f"{name}.pkl").write_bytes(snapshot2(net))
    with pytest.raises(GddlabError, match=rf"is another network than {name}: EDM2Precond with [\d,]+ parameters, not"):
        load_teacher(name)
    size = sum(p.numel() for p in net.parameters())
    monkeypatch.setitem(PUBLISHED, name, catalog.PublishedTeacher(**vars(known) | {"parameters": size}))
    card = load_teacher(name).card
    assert (card.name, card.data, card.kimg) == (name, "imagenet-512", 2147483)
    assert "trained on       2,147,483 thousand images" in str(card)
    with pytest.raises(
        GddlabError, match=r"unknown teacher 'edm2-img64-s-1073741-0.07': did you mean 'edm2-img64-s-107"
    ):
        load_teacher("edm2-img64-s-1073741-0.07")


def test_images_become_latents_by_the_numbers_of_the_file(tmp_path: Path) -> None:
    """The encoder that a file holds counts, not that of the published networks."""
    path = tmp_path / "x.pkl"
    path.write_bytes(snapshot2(small_edm2(), content={"encoder": encoder(scale=np.full(4, 0.25, np.float32))}))
    plain, net = load_teacher(path), load_teacher(path, vae=vae())
    assert (plain.latent, plain.codec) == (True, None)
    assert plain.card.codec is not None and net.codec is not None
    assert net.codec.shift.flatten().tolist() == pytest.approx(plain.card.codec["mean"])
    assert net.codec.scale.flatten().tolist() == pytest.approx([0.25] * 4, rel=1e-5)
    path.write_bytes(snapshot2(small_edm2(img_channels=3)))
    assert not load_teacher(path).latent
