"""`.pt` files of DiT and SiT: weights alone, checkpoints of their train.py, and what such a file cannot tell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.nets import Precond
from gddlab.sampling import sample
from gddlab.teachers import convert, load_teacher
from tests.nets.test_dit import tiny_dit

HEADS = 2
"""Of `tiny_dit`, whose width is no published one."""


def checkpoint(net: Precond, **args: Any) -> dict[str, Any]:
    """As DiT's train.py saves: the average beside the network in training, Adam's state and the options."""
    model = {k: v.clone() for k, v in net.model.state_dict().items()}
    trained = [p for p in net.model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    sum(p.sum() for p in trained).backward()  # type: ignore[union-attr]
    opt.step()
    return {
        "model": net.model.state_dict(),
        "ema": model,
        "opt": opt.state_dict(),
        "args": argparse.Namespace(image_size=64, num_classes=5, global_batch_size=256, results_dir="results", **args),
    }


def assert_same(net: Precond, loaded: Precond) -> None:
    a, b = net.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    x = torch.randn(2, net.img_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(x, 0.7, torch.eye(5)[:2]), loaded(x, 0.7, torch.eye(5)[:2]))
    assert loaded.init_kwargs == {k: v for k, v in net.init_kwargs.items() if k != "label_dropout"} | {
        "learn_sigma": net.init_kwargs.get("learn_sigma", False)
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_weights_alone(kind: str, zipped: bool, tmp_path: Path) -> None:
    net = tiny_dit(kind, learn_sigma=True)
    named = tmp_path / f"{'DiT' if kind == 'dit' else 'SiT'}-XL-2-256x256.pt"
    torch.save(net.model.state_dict(), named, _use_new_zipfile_serialization=zipped)
    loaded = load_teacher(named, heads=HEADS)
    assert_same(net, loaded)
    assert not any(p.requires_grad for p in loaded.parameters())
    text = str(loaded.card)
    assert f"{type(net.model).__name__}, patches of 2x2, width 16, 2 blocks, 2 heads" in text
    assert ("variance preserving, 1,000 steps; predicts the noise" in text) == (kind == "dit")
    assert ("time 0 (noise) to 1 (image); predicts image - noise" in text) == (kind == "sit")
    assert loaded.card.classes == 5 and loaded.card.original["file"] == named.name
    assert loaded.latent  # four channels are no image, though no autoencoder is known
    with pytest.raises(GddlabError, match="this network makes latents, and no autoencoder is known"):
        sample(loaded, 1, steps=1)
    assert sample(loaded, 2, steps=2, decode=False).abs().max() != 1  # not clamped as an image


def test_the_family_is_asked_for_where_the_file_does_not_say(tmp_path: Path) -> None:
    net = tiny_dit("sit")
    path = tmp_path / "transit.pt"
    torch.save(net.model.state_dict(), path)
    with pytest.raises(GddlabError, match=r'may be a DiT or a SiT.*give family="dit" or family="sit"') as e:
        load_teacher(path, heads=HEADS)
    assert "\n" not in str(e.value)
    assert_same(net, load_teacher(path, family="sit", heads=HEADS))
    other = load_teacher(path, family="dit", heads=HEADS)
    assert other.path.kind == "vp" and other.init_kwargs["kind"] == "dit"
    done = convert(path, tmp_path / "sit.safetensors", family="sit", heads=HEADS)
    assert_same(net, load_teacher(done.path))
    with pytest.raises(GddlabError, match=r"sit\.safetensors says what network it holds: omit family and heads"):
        load_teacher(done.path, family="sit")


def test_a_checkpoint_of_train_py(tmp_path: Path) -> None:
    """The average is taken; its options tell the family, whatever the file is called."""
    net = tiny_dit("sit", learn_sigma=True)
    content = checkpoint(net, model="SiT-XL/2", path_type="Linear", prediction="velocity")
    torch.save(content, tmp_path / "0400000.pt")
    loaded = load_teacher(tmp_path / "0400000.pt", heads=HEADS)
    net.model.load_state_dict(content["ema"])
    assert_same(net, loaded)
    assert loaded.card.original["key"] == "ema"
    with pytest.raises(GddlabError, match=r"family='dit': .* says that it is a SiT-XL/2; omit family"):
        load_teacher(tmp_path / "0400000.pt", family="dit", heads=HEADS)
    content["args"].path_type = "GVP"
    torch.save(content, tmp_path / "gvp.pt")
    with pytest.raises(GddlabError, match=r"a SiT with path_type='GVP': known here is 'Linear'"):
        load_teacher(tmp_path / "gvp.pt", heads=HEADS)
    torch.save(checkpoint(tiny_dit("dit"), model="DiT-S/2"), tmp_path / "sit.pt")  # a misleading name
    assert load_teacher(tmp_path / "sit.pt", heads=HEADS).init_kwargs["kind"] == "dit"


def test_heads_follow_from_published_widths_alone(tmp_path: Path) -> None:
    torch.save(tiny_dit().model.state_dict(), tmp_path / "dit.pt")
    with pytest.raises(GddlabError, match="a transformer of width 16, whose number of attention heads is not known"):
        load_teacher(tmp_path / "dit.pt")
    small = tiny_dit("dit", model_channels=384, num_heads=6, num_blocks=1)
    torch.save(small.model.state_dict(), tmp_path / "dit.pt")
    assert_same(small, load_teacher(tmp_path / "dit.pt"))
    assert load_teacher(tmp_path / "dit.pt", heads=12).init_kwargs["num_heads"] == 12
    with pytest.raises(GddlabError, match="model_channels=384 with num_heads=5"):
        load_teacher(tmp_path / "dit.pt", heads=5)


def test_refusals(tmp_path: Path) -> None:
    for options, message in (
        ({"family": "di"}, "family 'di'.*did you mean 'dit'"),
        ({"heads": 0}, "heads=0: give at least 1"),
    ):
        with pytest.raises(GddlabError, match=message):
            load_teacher("digits", **options)
    with pytest.raises(GddlabError, match="omit family and heads"):
        load_teacher("digits", family="dit")
    path = tmp_path / "dit.pt"
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(GddlabError, match=r"is no \.pt file of a DiT or SiT: omit family and heads"):
        load_teacher(path, family="dit")
    state = dict(tiny_dit("dit").model.state_dict())
    for changed, message in (
        ({"pos_embed": torch.ones(1, 15, 16)}, r"pos_embed is \(1, 15, 16\), no weights of a DiT or SiT"),
        ({"x_embedder.proj.weight": torch.ones(16, 8)}, r"x_embedder\.proj\.weight is \(16, 8\), no weights"),
        ({"blocks.0.attn.qkv.weight": torch.ones(4, 16)}, r"model\.blocks\.0\.attn\.qkv\.weight is \(4, 16\), where"),
        ({"blocks.9.extra": torch.ones(4)}, "lacks 10 of its tensors"),
        ({"pos_embed": torch.full((1, 16, 16), torch.inf)}, r"model\.pos_embed holds numbers that are not finite"),
    ):
        torch.save(state | changed, path)
        with pytest.raises(GddlabError, match=message) as e:
            load_teacher(path, heads=HEADS)
        assert "\n" not in str(e.value)


def test_a_pickled_network_of_ours(tmp_path: Path) -> None:
    net = tiny_dit("dit")
    torch.save({"ema": net}, tmp_path / "ours.pt")
    assert torch.equal(load_teacher(tmp_path / "ours.pt").model.pos_embed, net.model.pos_embed)
