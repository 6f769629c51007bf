"""DiT and SiT as denoisers: preconditioning, the null class, files, refusals. Numbers are in tests/golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets import Precond, architecture, from_edm, load_network, save_network
from gddlab.nets.io import make_student, refusal
from gddlab.nets.path import PURE

TINY_DIT: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 5,
    "patch_size": 2,
    "model_channels": 16,
    "num_blocks": 2,
    "num_heads": 2,
}
KINDS = ("dit", "sit", "flow")


def tiny_dit(kind: str = "flow", **changes: Any) -> Precond:
    """A small transformer that is not the identity, as a fresh one is."""
    torch.manual_seed(0)
    net = from_edm("DiTPrecond", **(TINY_DIT | {"kind": kind} | changes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return net


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_is_the_formula_of_its_path(kind: str) -> None:
    net = tiny_dit(kind).double()
    x, ids = images(dtype=torch.float64), torch.tensor([0, 4, 2])
    level = 0.7
    with torch.no_grad():
        got = net(x, level, torch.eye(5)[ids])
        if kind == "dit":
            t = net.path.time(torch.tensor([level]))
            assert net.path.sigma(t.item()) == pytest.approx(level, rel=1e-4)
            expected = x - level * net.model(x / (1 + level**2) ** 0.5, t.expand(3), ids)
        else:
            share = level / (1 + level)
            xt, noise_to_image = x * (1 - share), kind == "sit"
            t = torch.full((3,), 1 - share if noise_to_image else 1000 * share)
            v = net.model(xt, t, ids)
            expected = xt + share * v if noise_to_image else xt - share * v
    assert_close(got, expected, rtol=1e-6, atol=1e-6)
    low, high = net.sigma_min, net.sigma_max
    assert (low, high) == pytest.approx((0.01, 157.4) if kind == "dit" else (0, PURE), abs=0.05)


def test_no_class_is_a_class_of_its_own() -> None:
    """None, rows of zeros and the id behind the last class are the same; an unconditional network has that alone."""
    net, x = tiny_dit(), images()
    with torch.no_grad():
        none = net(x, 1.0)
        assert torch.equal(none, net(x, 1.0, torch.zeros(3, 5))) and torch.equal(none, net(x, 1.0, torch.zeros(1, 5)))
        mixed = net(x, 1.0, torch.eye(6)[[5, 0, 5]][:, :5])
        assert torch.equal(mixed[[0, 2]], none[[0, 2]])
        assert (mixed[1] - none[1]).abs().max() > 1e-3
        assert torch.equal(net(x, 1.0, torch.eye(5)[:1]), net(x, 1.0, torch.eye(5)[[0, 0, 0]]))
    free = tiny_dit(label_dim=0)
    assert free.model.y_embedder.embedding_table.num_embeddings == 1
    with torch.no_grad():
        assert torch.equal(free(x, 1.0), free(x, 1.0, torch.eye(5)[:3]))


def test_labels_are_dropped_in_training_only() -> None:
    net, x, labels = tiny_dit(label_dropout=0.5), images(1).expand(200, -1, -1, -1), torch.eye(5)[[1]]
    with torch.no_grad():
        none, one = net(x[:1], 1.0)[0], net(x[:1], 1.0, labels)[0]
        out = net.train()(x, 1.0, labels)
    dropped = (out - none).abs().amax((1, 2, 3)) < 1e-5
    kept = (out - one).abs().amax((1, 2, 3)) < 1e-5
    assert (dropped ^ kept).all()
    assert 70 < dropped.sum() < 130


def test_a_fresh_network_begins_as_the_identity() -> None:
    net = from_edm("DiTPrecond", **TINY_DIT)
    x = images()
    with torch.no_grad():
        assert torch.equal(net.model(x, torch.ones(3), torch.tensor([0, 1, 5])), torch.zeros_like(x))
        assert torch.equal(net(x, 3.0), x * 0.25)  # the input of the network, 1 / (1 + sigma) of x
    assert net.model.x_embedder.proj.weight.std() > 0.05
    assert not net.model.pos_embed.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_file_round_trip(kind: str, tmp_path: Path) -> None:
    net = tiny_dit(kind, learn_sigma=kind == "dit", label_dropout=0.1)
    save_network(net, tmp_path / "net.safetensors", kimg=1)
    again, _ = load_network(tmp_path / "net.safetensors")
    assert architecture(again) == architecture(net)
    assert again.init_kwargs["kind"] == kind and again.path == net.path
    with torch.no_grad():
        assert torch.equal(again(images(), 2.0), net(images(), 2.0))
    assert not again.model.pos_embed.requires_grad


def test_low_precision_keeps_the_embeddings_exact() -> None:
    net, x = tiny_dit(), images()
    seen: list[Tensor] = []
    net.model.t_embedder.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        exact = net(x, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x, 1.0)
    assert torch.equal(seen[0], seen[1])
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    assert_close(low, exact, rtol=0.05, atol=0.05)
    with pytest.raises(GddlabError, match="this network's weights are bfloat16"):
        net.bfloat16()(x, 1.0)


def test_places_do_not_depend_on_where_a_network_is_made() -> None:
    with torch.device("meta"):
        assert from_edm("DiTPrecond", **(TINY_DIT | {"kind": "dit"})).model.pos_embed.is_meta


def test_refusals() -> None:
    for changes, message in (
        ({"patch_size": 3}, "8 pixels, patches of 3: give a patch_size that divides them"),
        ({"num_heads": 3}, "model_channels=16 with num_heads=3: give a multiple of num_heads and of 4"),
        ({"kind": "dits"}, "kind 'dits'.*did you mean 'dit'"),
        ({"channel_mult": [1]}, r"DiTPrecond cannot be built from .*channel_mult"),
    ):
        with pytest.raises(GddlabError, match=message) as e:
            from_edm("DiTPrecond", **(TINY_DIT | changes))
        assert "\n" not in str(e.value)
    net = tiny_dit()
    with pytest.raises(GddlabError, match=r"x has shape \(2, 2, 16, 16\): this network takes \(B, 2, 8, 8\)"):
        net(torch.randn(2, 2, 16, 16), 1.0)
    with pytest.raises(GddlabError, match=r"class_labels are \(3, 4\): give one-hot rows, \(3, 5\)"):
        net(images(), 1.0, torch.eye(4)[:3])
    with pytest.raises(GddlabError, match="this network takes no target"):
        net(images(), 1.0, target=0.5)
    with pytest.raises(GddlabError, match="a DiTPrecond teacher has no one-step student"):
        make_student(net)
    assert refusal(TINY_DIT | {"num_blocks": 60}, 40) == "60 blocks in 1 levels, but only 40 tensors"
    assert refusal(TINY_DIT | {"kind": "sit", "learn_sigma": True, "label_dropout": 0.1}, 40) is None
