"""The CIFAR-10 GDD-I iteration: reference and fast mode against the plainest correct float32 loop, in pairs; JSON.

python tests/benchmarks/train_step.py [PAIRS] [BATCH]

Random weights of teacher and VGG16 (times do not depend on them). An iteration is the generator's and the
discriminator's step and the average of the parameters; R1 is timed separately, and a cycle is 16 iterations and one R1
step. Before anything is timed, the reference mode's losses, R1 and gradients are compared with the plain loop's.
Memory is measured in one process per mode, which runs one iteration and one R1 step: the system's peak for the process
(VmHWM), networks and their construction included, and the rise of resident memory during each of the two, every 2 ms.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from gddlab.distill.build import build_step
from gddlab.distill.distributed import World
from gddlab.distill.presets import FAST, cifar10
from gddlab.distill.projected import Projected, ProjectedDiscriminator
from gddlab.ema import ema_beta, ema_update
from gddlab.freezing import select_freeze
from gddlab.nets import build
from gddlab.nets.io import make_student
from gddlab.probing.probe import peak_memory
from gddlab.provenance import hardware, versions

Batch = tuple[Tensor, Tensor, Tensor]
"""Real images in [-1, 1] and the latents of both steps, each (B, 3, 32, 32)."""
BACKBONES = {"vgg16_bn": "random"}
MODES = {
    "reference": {"precision": "float32"},
    "reference, channels last": {"precision": "float32", "channels_last": True},
    "fast": FAST,
}
INTERVAL, WEIGHT, GAMMA, LR = 16, 64, 1e-4, 1e-4


class PlainDiscriminator(nn.Module):
    """Written from the papers, nothing saved: BatchNorm unfolded, projection last, torch's spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        part = Projected(backbones=("vgg16_bn", "tf_efficientnet_lite0"), weights=BACKBONES)
        ours = ProjectedDiscriminator(part, fold=False)
        self.frozen = [(n, b.net.eval(), ours.projections[n]) for n, b in ours.backbones.items()]
        self.heads = nn.ModuleList(
            nn.ModuleList(self.head(c, start) for c, start in zip((64, 64, 128, 256), (128, 64, 32, 16), strict=True))
            for _ in self.frozen
        )
        state = {k: v for k, v in ours.state_dict().items() if k.startswith("discriminators.")}
        own = self.heads.state_dict()
        assert [v.shape for v in own.values()] == [v.shape for v in state.values()]
        self.heads.load_state_dict(dict(zip(own, state.values(), strict=True)))
        self.train()

    @staticmethod
    def head(channels: int, res: int) -> nn.Sequential:
        widths = {64: 64, 32: 128, 16: 256, 8: 512}
        layers: list[nn.Module] = []
        while res > 8:
            res //= 2
            conv = spectral_norm(nn.Conv2d(channels, widths[res], 4, stride=2, padding=1))
            layers += [conv, nn.BatchNorm2d(widths[res]), nn.LeakyReLU(0.2)]
            channels = widths[res]
        return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 4, bias=False)))

    def forward(self, images: Tensor) -> list[Tensor]:
        logits = []
        for (name, net, projection), heads in zip(self.frozen, self.heads, strict=True):
            vgg = name == "vgg16_bn"
            mean = torch.tensor([0.485, 0.456, 0.406] if vgg else [0.5] * 3)[:, None, None]
            std = torch.tensor([0.229, 0.224, 0.225] if vgg else [0.5] * 3)[:, None, None]
            x = F.interpolate(((images + 1) / 2 - mean) / std, size=(224, 224), mode="bilinear", align_corners=False)
            maps = []
            if vgg:
                for i, layer in enumerate(net):
                    x = layer(x)
                    if i in (12, 22, 32, 42):
                        maps.append(x)
            else:
                maps = [m for m in net.forward_intermediates(x, intermediates_only=True) if m.shape[-1] < 112]
            above: Tensor | None = None
            mixed: list[Tensor] = []
            for i in (3, 2, 1, 0):
                h = projection.get_submodule(f"layer{i}_ccm")(maps[i])
                h = h if above is None else h + above
                h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
                above = projection.get_submodule(f"layer{i}_csm.out_conv")(h)
                mixed.insert(0, above)
            logits.append(torch.cat([head(m).flatten(1) for head, m in zip(heads, mixed, strict=True)], 1))
        return logits


class Plain:
    """The plainest correct loop: everything afresh, one parameter after the other."""

    def __init__(self, g: nn.Module, d: PlainDiscriminator):
        self.g, self.d, self.ema, self.nimg = g, d, copy.deepcopy(g), 0
        self.g_params, self.d_params = [p for p in g.parameters() if p.requires_grad], list(d.parameters())
        c = INTERVAL / (INTERVAL + 1)
        self.opt_g = torch.optim.Adam(self.g_params, lr=LR, betas=(0.0, 0.99), eps=1e-8)
        self.opt_d = torch.optim.Adam(self.d_params, lr=LR * c, betas=(0.0, 0.99**c), eps=1e-8)

    def update(self, opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is not None:
                p.grad = torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
        opt.step()

    def iteration(self, batch: Batch) -> dict[str, Tensor]:
        real, z_g, z_d = batch
        self.d.requires_grad_(False)
        self.opt_g.zero_grad()
        loss_g = torch.stack([F.softplus(-x).mean() for x in self.d(self.g.generate(z_g))]).sum()
        (WEIGHT * loss_g).backward()
        self.update(self.opt_g, self.g_params)
        self.d.requires_grad_(True)
        self.opt_d.zero_grad()
        with torch.no_grad():
            fake = self.g.generate(z_d)
        loss_fake = torch.stack([F.softplus(x).mean() for x in self.d(fake)]).sum()
        (WEIGHT * loss_fake).backward()
        loss_real = torch.stack([F.softplus(-x).mean() for x in self.d(real)]).sum()
        (WEIGHT * loss_real).backward()
        self.update(self.opt_d, self.d_params)
        self.nimg += len(real)
        beta = ema_beta(len(real), 500, 0.05, self.nimg)
        with torch.no_grad():
            for a, b in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                a.copy_(b.lerp(a, beta))
        return {"loss/g": loss_g.detach(), "loss/d": (loss_fake + loss_real).detach()}

    def r1(self, batch: Batch) -> dict[str, Tensor]:
        x = batch[0].clone().requires_grad_(True)
        self.opt_d.zero_grad()
        (grad,) = torch.autograd.grad(torch.stack([y.sum() for y in self.d(x)]).sum(), x, create_graph=True)
        penalty = grad.square().sum((1, 2, 3)).mean()
        (GAMMA / 2 * INTERVAL * penalty).backward()
        self.update(self.opt_d, self.d_params)
        return {"r1": penalty.detach()}


class Ours:
    """The trainer's iteration, in the same order, on a GanStep built from the preset."""

    def __init__(self, mode: str, teacher: nn.Module, mask: object):
        self.config = cifar10(
            run_dir="unused",
            mask=mask,
            batch=8,
            r1_gamma=GAMMA,
            discriminator={"weights": BACKBONES},
            **MODES[mode],
        )
        self.step, _ = build_step(self.config, teacher, World(0, 1, torch.device("cpu")))
        self.g_params, self.d_params = self.step.g_params, self.step.d_params
        self.ema, self.nimg = copy.deepcopy(self.step.g), 0

    def iteration(self, batch: Batch) -> dict[str, Tensor]:
        real, z_g, z_d = batch
        stats, features = self.step.g_step(z_g, None)
        if not self.config.reuse_fakes:
            del features
            features = self.step.fake_features(z_d, None)
        stats |= self.step.d_step(features, self.step.real_features(real), None)
        self.nimg += len(real)
        ema_update(self.ema, self.step.g, ema_beta(len(real), 500, 0.05, self.nimg))
        return stats

    def r1(self, batch: Batch) -> dict[str, Tensor]:
        return self.step.r1_step(batch[0], None)


Loop = Plain | Ours


def make(mode: str) -> Loop:
    torch.manual_seed(0)
    teacher = build("ncsnpp-cifar10")
    mask = select_freeze(teacher, strategy="gdd-i")
    if mode != "plain":
        return Ours(mode, teacher, mask)
    g = make_student(teacher).eval()
    mask.apply(g)
    torch.manual_seed(cifar10(run_dir="unused").seed)  # as build_step does before it makes its discriminator
    return Plain(g, PlainDiscriminator())


def batch_of(n: int) -> Batch:
    x = torch.randn(3, n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x[0].clamp(-1, 1), x[1], x[2]


def check(plain: Loop, ours: Loop, batch: Batch) -> dict[str, float]:
    """Both from the same weights: relative differences of the losses, R1, and the norms of all gradients."""
    out = {}
    for step in ("iteration", "r1"):
        a, b = getattr(plain, step)(batch), getattr(ours, step)(batch)
        out |= {k: abs(a[k].item() / b[k].item() - 1) for k in a}
        for net in ("g_params", "d_params"):
            norms = [
                torch.stack([p.grad.norm() for p in getattr(x, net) if p.grad is not None]).norm()
                for x in (plain, ours)
            ]
            out[f"gradient of {net[0]} after {step}"] = abs(norms[0].item() / norms[1].item() - 1)
        # Adam's first step is all but a sign: it makes rounding visible in what follows it.
        assert all(v < (1e-3 if step == "iteration" else 1e-2) for v in out.values()), out
    return out


def gflop(run: Callable[[], object]) -> float | None:
    """Of convolutions and matrix products, forward and backward, as torch counts them; None where it cannot."""
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    except (NotImplementedError, RuntimeError):
        return None
    return counter.get_total_flops() / 1e9


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def memory(mode: str, n: int) -> dict[str, float | None]:
    loop, batch = make(mode), batch_of(n)
    out: dict[str, float | None] = {}
    for name, run in (("iteration", loop.iteration), ("R1 step", loop.r1)):
        with peak_memory(torch.device("cpu")) as rise:
            run(batch)
        out[f"rise in the {name}, MiB"] = rise[0] and round(rise[0])
    status = Path(
        "/proc/self/status"
    ).read_text()  # not ru_maxrss, which a process inherits from the one that started it
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]
    return {"peak of the process, MiB": round(int(peak) / 1024)} | out


def main(pairs: int, n: int) -> None:
    loops = {mode: make(mode) for mode in ("plain", *MODES)}
    batch = batch_of(n)
    agreement = check(loops["plain"], loops["reference"], batch)
    times: dict[str, list[float]] = {f"{m} {s}": [] for m in loops for s in ("iteration", "r1")}
    for i in range(pairs + 1):
        for mode, loop in list(loops.items())[:: 1 if i % 2 else -1]:  # each is first as often as it is last
            took = {
                "iteration": seconds(lambda loop=loop: loop.iteration(batch)),
                "r1": seconds(lambda loop=loop: loop.r1(batch)),
            }
            if i:  # the first round warms up
                for name, t in took.items():
                    times[f"{mode} {name}"].append(t)
    cycles = {
        m: [a + b / INTERVAL for a, b in zip(times[f"{m} iteration"], times[f"{m} r1"], strict=True)] for m in loops
    }
    work = {
        m: {"iteration": gflop(lambda m=m: loops[m].iteration(batch)), "r1": gflop(lambda m=m: loops[m].r1(batch))}
        for m in loops
    }
    results: dict[str, dict[str, object]] = {}
    for m in loops:
        median = {s: statistics.median(times[f"{m} {s}"]) for s in ("iteration", "r1")}
        ratios = [p / t for p, t in zip(cycles["plain"], cycles[m], strict=True)]
        results[m] = {
            "seconds an iteration": round(median["iteration"], 3),
            "seconds an R1 step": round(median["r1"], 3),
            "seconds an iteration and 1/16 of an R1 step": round(statistics.median(cycles[m]), 3),
            "times as fast as plain": round(statistics.median(ratios), 2),
            "times as fast as plain, each pair": [round(r, 2) for r in ratios],
        }
        for s, flop in work[m].items():
            if flop is not None:
                results[m] |= {f"GFLOP an image, {s}": round(flop / n), f"GFLOP/s, {s}": round(flop / median[s])}
    here = [sys.executable, str(Path(__file__).resolve()), "--memory"]
    for m in loops:
        out = subprocess.run([*here, m, str(n)], capture_output=True, text=True, check=True).stdout
        results[m]["memory"] = json.loads(out)
    print(
        json.dumps(
            {
                "what": f"CIFAR-10 GDD-I, batch {n}; medians, ratios from pairs within a round",
                "pairs": pairs,
                "results": results,
                "relative differences of the first reference iteration from plain": {
                    k: float(f"{v:.1e}") for k, v in agreement.items()
                },
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(memory(sys.argv[2], int(sys.argv[3]))))
    else:
        given = dict(enumerate(sys.argv))
        main(int(given.get(1, 7)), int(given.get(2, 8)))
