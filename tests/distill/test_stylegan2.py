"""StyleGAN2's discriminator against a plain formulation, its minibatch statistics, and weights that others trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from gddlab.distill.losses import d_loss_real, r1_penalty
from gddlab.distill.stylegan2 import StyleGAN2, StyleGAN2Discriminator, minibatch_std
from gddlab.errors import GddlabError, NotFound
from tests.teachers.pickles import dumps, pickled


def tiny(resolution: int = 16, channels: int = 1, *, classes: int = 0, **fields: object) -> StyleGAN2Discriminator:
    """A narrow one in float64 whose biases are not zero."""
    torch.manual_seed(0)
    part = StyleGAN2(**({"channel_max": 6} | fields))
    d = StyleGAN2Discriminator(part, resolution, channels, classes=classes)
    with torch.no_grad():
        for name, p in d.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
    return d.double()


def batch(n: int = 4, resolution: int = 16, channels: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, resolution, resolution, generator=generator, dtype=torch.float64) * 2 - 1


def plain(d: StyleGAN2Discriminator, x: Tensor, labels: Tensor | None, *, skips: bool) -> Tensor:
    """The forward pass as the papers describe it, from the state dict alone, one step at a time."""
    s = d.state_dict()

    def lrelu(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)

    def conv(y: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        w = s[f"{name}.weight"]
        y = F.conv2d(y, w / math.sqrt(w.shape[1] * w.shape[2] * w.shape[3]), stride=stride, padding=padding)
        return y + s[f"{name}.bias"][:, None, None] if f"{name}.bias" in s else y

    def fir(y: Tensor, pad: int) -> Tensor:
        y = F.pad(y, (pad,) * 4)
        h, w = y.shape[2] - 3, y.shape[3] - 3
        taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
        rows = sum(t * y[:, :, i : i + h] for i, t in enumerate(taps))
        return sum(t * rows[:, :, :, i : i + w] for i, t in enumerate(taps))  # type: ignore[index, return-value]

    def linear(y: Tensor, name: str, lr: float = 1.0) -> Tensor:
        w = s[f"{name}.weight"]
        return y @ w.t() * lr / math.sqrt(w.shape[1]) + lr * s[f"{name}.bias"]

    r = x.shape[2]
    x = lrelu(conv(x, f"b{r}.fromrgb"))
    while r > 4:
        y = lrelu(conv(x, f"b{r}.conv0", padding=1))
        y = lrelu(conv(fir(y, 2), f"b{r}.conv1", stride=2))
        x = (y + conv(fir(x, 1)[:, :, ::2, ::2], f"b{r}.skip")) / math.sqrt(2) if skips else y
        r //= 2
    std = torch.cat([(g.var(0, correction=0) + 1e-8).sqrt().mean().expand(len(g), 1, 4, 4) for g in x.split(4)])
    x = lrelu(conv(torch.cat([x, std], 1), "b4.conv", padding=1))
    x = linear(lrelu(linear(x.flatten(1), "b4.fc")), "b4.out")
    if labels is None:
        return x
    e = linear(labels, "mapping.embed")
    e = e / (e.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(8):
        e = lrelu(linear(e, f"mapping.fc{i}", lr=0.01))
    return (x * e).sum(1, keepdim=True) / math.sqrt(x.shape[1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [0, 3])
def test_agrees_with_a_plain_formulation(channels: int, classes: int) -> None:
    d, x = tiny(channels=channels, classes=classes), batch(8, channels=channels)
    labels = F.one_hot(torch.arange(8) % 3, 3).double() if classes else None
    (logits,) = d(x, labels)
    assert logits.shape == (8, 1)
    assert_close(logits, plain(d, x, labels, skips=True), rtol=1e-6, atol=1e-8)  # taps are exact, gains are float64
    if labels is not None:
        assert not torch.allclose(logits, d(x, labels.roll(1, 0))[0])


def test_size_is_that_of_the_published_architecture() -> None:
    d = StyleGAN2Discriminator(StyleGAN2(), 32, 3)
    w = 512
    block = 2 * (9 * w * w + w) + w * w
    expected = (3 * w + w) + 3 * block + (9 * (w + 1) * w + w) + (16 * w * w + w) + (w + 1)
    assert sum(p.numel() for p in d.parameters()) == expected == 21_507_073
    wide = StyleGAN2Discriminator(StyleGAN2(channel_max=256), 64, 3).state_dict()
    assert [wide[f"b{r}.conv0.weight"].shape[0] for r in (64, 32, 16, 8)] == [256] * 4
    assert StyleGAN2Discriminator(StyleGAN2(), 64, 1).state_dict()["b64.conv1.weight"].shape == (512, 256, 3, 3)


def test_names_are_those_of_the_release() -> None:
    layers = ["b8.fromrgb", "b8.conv0", "b8.conv1", "b4.conv"]
    expected = {f"{n}.{p}" for n in layers for p in ("weight", "bias", "resample_filter")}
    expected |= {"b8.skip.weight", "b8.skip.resample_filter", "b8.resample_filter"}
    linear = ["b4.fc", "b4.out", "mapping.embed", *(f"mapping.fc{i}" for i in range(8))]
    expected |= {f"{n}.{p}" for n in linear for p in ("weight", "bias")}
    d = tiny(8, classes=2)
    assert set(d.state_dict()) == expected
    assert d.state_dict()["b8.resample_filter"].sum() == 1
    assert d.state_dict()["mapping.fc0.weight"].std() > 50  # a hundredth of the learning rate


def test_minibatch_std_does_not_see_how_a_batch_is_split() -> None:
    x = batch(8, 4, 5)
    whole = minibatch_std(x)
    assert_close(whole, torch.cat([minibatch_std(part) for part in x.split(4)]))
    assert not torch.allclose(whole, torch.cat([minibatch_std(part) for part in x.split(2)]))
    assert_close(whole[:, :5], x)
    by_hand = x[4:].double().std(0, correction=0).mean()
    assert_close(whole[4:, 5], by_hand.expand(4, 4, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("images", "size"), [(6, 3), (3, 3), (5, 1), (8, 4), (2, 2)])
def test_minibatch_std_takes_the_largest_group_that_divides(images: int, size: int) -> None:
    x = batch(images, 4, 2)
    assert_close(minibatch_std(x), torch.cat([minibatch_std(part) for part in x.split(size)]))
    alone = size == 1  # no deviation
    assert len(minibatch_std(x)[:, 2, 0, 0].unique()) == (1 if alone else images // size)


def test_twice_differentiable() -> None:
    d, x = tiny(8, channel_max=3), batch(2, 8).requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda v: d(v)[0], x, fast_mode=True)
    weight = d.get_parameter("b8.conv1.weight").detach().clone().requires_grad_(True)

    def loss(w: Tensor) -> Tensor:
        return torch.func.functional_call(d, {"b8.conv1.weight": w}, (x.detach(),))[0]

    assert torch.autograd.gradgradcheck(loss, weight, fast_mode=True)


def test_r1_is_that_of_plain_double_backward() -> None:
    d, x = tiny(classes=3), batch()
    labels = F.one_hot(torch.arange(4) % 3, 3).double()
    penalty, surrogate = r1_penalty(d, x, labels)  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(d(leaf, labels)[0].sum(), leaf, create_graph=True)
    expected = g.square().sum((1, 2, 3)).mean()
    assert_close(penalty, expected.detach())
    params = list(d.parameters())
    found = torch.autograd.grad(surrogate, params, allow_unused=True)
    wanted = torch.autograd.grad(expected, params, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            assert_close(a, b)


def test_every_parameter_is_trained() -> None:
    d = tiny(classes=3)
    d_loss_real(d(batch(), F.one_hot(torch.arange(4) % 3, 3).double())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in d.parameters())
    x = batch()
    assert d.features(x)[0] is x


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".pkl"])
def test_starts_from_weights(suffix: str, tmp_path: Path) -> None:
    d = tiny(classes=2).float()
    path = tmp_path / f"d{suffix}"
    if suffix == ".safetensors":
        save_file(d.state_dict(), path)
    elif suffix == ".pkl":
        path.write_bytes(dumps({"G": None, "D": pickled(d), "G_ema": None}))
    else:
        torch.save(d.state_dict(), path)
    again = tiny(classes=2, weights=str(path)).float()
    assert again.state_dict().keys() == d.state_dict().keys()
    for name, p in again.named_parameters():
        if not name.endswith("bias"):  # `tiny` draws them anew
            assert torch.equal(p, d.get_parameter(name))
        assert p.requires_grad


def test_weights_without_skips_and_filters_make_a_discriminator_without_skips(tmp_path: Path) -> None:
    state = {k: v for k, v in tiny().state_dict().items() if "skip" not in k and "resample_filter" not in k}
    save_file(state, tmp_path / "orig.safetensors")
    d = tiny(weights=str(tmp_path / "orig.safetensors"))
    assert not any("skip" in name for name in d.state_dict())
    x = batch()
    expected = plain(d, x, None, skips=False)
    assert_close(d(x)[0], expected, rtol=1e-6, atol=1e-8)


def _changed(path: Path, **changes: Tensor | None) -> Path:
    state = {k: v.contiguous() for k, v in tiny(16, 3).state_dict().items()}
    for name, value in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b8__conv0__weight": None}, r"does not fit: it lacks b8\.conv0\.weight, \(6, 6, 3, 3\)"),
        ({"b8__conv0__weight": torch.zeros(6, 5, 3, 3)}, r"b8\.conv0\.weight is \(6, 5, 3, 3\), not \(6, 6, 3, 3\)"),
        ({"mapping__embed__weight": torch.zeros(6, 2)}, r"it holds mapping\.embed\.weight, which"),
        ({"b4__out__bias": torch.full((1,), math.nan)}, r"b4\.out\.bias holds something else than finite"),
        (
            {"b16__fromrgb__weight": torch.zeros(6, 1, 1, 1)},
            r"b16\.fromrgb\.weight is \(6, 1, 1, 1\), not \(6, 3, 1, 1\)",
        ),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    path = _changed(tmp_path / "d.safetensors", **changes)
    with pytest.raises(GddlabError, match=message) as e:
        tiny(16, 3, weights=str(path))
    assert "\n" not in str(e.value)


def test_weights_of_other_images(tmp_path: Path) -> None:
    path = _changed(tmp_path / "d.safetensors")
    with pytest.raises(GddlabError, match=r"b16\.fromrgb\.weight is \(6, 3, 1, 1\), not \(6, 1, 1, 1\)"):
        tiny(16, 1, weights=str(path))
    with pytest.raises(GddlabError, match=r"it lacks b32\.fromrgb\.weight"):
        tiny(32, 3, weights=str(path))
    with pytest.raises(NotFound, match="no such file"):
        tiny(weights="absent.pt")


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "d.pkl").write_bytes(dumps({"G_ema": None}))
    with pytest.raises(GddlabError, match=r"holds no discriminator \(D\)"):
        tiny(weights=str(tmp_path / "d.pkl"))
    torch.save({"D": tiny(), "x": 1}, tmp_path / "whole.pt")
    with pytest.raises(GddlabError, match="no state dict of tensors alone, or is damaged"):
        tiny(weights=str(tmp_path / "whole.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(GddlabError, match="holds no state dict"):
        tiny(weights=str(tmp_path / "list.pt"))
    for name, message in (("cut.safetensors", "cannot be read"), ("cut.pt", "damaged"), ("cut.pth", "damaged")):
        (tmp_path / name).write_bytes(b"\x08\0\0\0")
        with pytest.raises(GddlabError, match=message) as e:
            tiny(weights=str(tmp_path / name))
        assert "\n" not in str(e.value)
    (tmp_path / "d.onnx").write_bytes(b"x")
    with pytest.raises(GddlabError, match=r"give a state dict as"):
        tiny(weights=str(tmp_path / "d.onnx"))


@pytest.mark.parametrize("resolution", [4, 24, 2048])
def test_sizes_that_are_refused(resolution: int) -> None:
    with pytest.raises(GddlabError, match=f"resolution={resolution}: .* powers of two from 8"):
        tiny(resolution)
