"""What a network is shown: images, noise, noise levels and labels, as rows of a batch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset, open_dataset, order
from gddlab.errors import GddlabError, unknown
from gddlab.nets import Precond
from gddlab.probing.layers import denoiser_of
from gddlab.sampling import karras_sigmas, latents
from gddlab.sampling.samplers import one_hot, positive, precision, seed_list

__all__ = ["STATES", "Inputs", "Rows", "as_it_was", "device_of"]

STATES = ("noised", "prior", "trajectory", "student")
SIGMA_STUDENT = 80.0
TRAJECTORY_STEPS = 18

Rows = tuple[Tensor, Tensor, Tensor | None]
"""States (n * S, C, H, W), their sigmas (n * S,), one-hot labels (n * S, label_dim) or None; row i * S + s is image i at sigma s."""


class Inputs:
    """Images `start` to `start + n` of a seeded order, at every noise level the same images with the same noise.

    Args:
        model: The denoiser that will see them: its range, shape, labels and card are read.
        timesteps, data, states, n, start, seed, class_labels: As in `probe`.

    Attributes:
        sigmas: Noise levels, descending.
        dataset: Where images come from; None where there are none.

    Raises:
        GddlabError: Whatever in these does not fit the network or each other.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: int | Sequence[float] | None = 18,
        *,
        data: str | ImageDataset | None = None,
        states: str = "noised",
        n: int = 256,
        start: int = 0,
        seed: int = 0,
        class_labels: Tensor | Sequence[int] | int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise GddlabError(
                f"the network is a {type(model).__name__}: give a torch.nn.Module, such as load_teacher(...)"
            )
        if states not in STATES:
            raise unknown("states", states, STATES)
        positive("n", n)
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise GddlabError(f"start={start!r}: give the position of the first image, from 0 up")
        seed_list(n, seed, None)
        seed = int(seed)
        seed_list(n, seed + start, None)
        self.denoiser = denoiser_of(model)
        self.states, self.n, self.start, self.seed = states, n, start, seed
        self.sigmas = _noise_levels(self.denoiser, timesteps, states)
        self.dataset = _dataset(self.denoiser, data, states)
        label_dim = int(getattr(self.denoiser, "label_dim", 0))
        names = ("img_channels", "img_resolution", "img_resolution")
        shape = tuple(getattr(self.denoiser, a, None) for a in names)
        self.index: Tensor | None = None
        self.float64 = any(p.dtype == torch.float64 for p in self.denoiser.parameters())
        self.labels_of = "images" if class_labels is None else "given"
        if isinstance(class_labels, int):
            self.labels_of = f"class {class_labels}"
        if self.dataset is None:
            if None in shape:
                raise GddlabError(
                    "this network does not say img_channels and img_resolution: set them, or probe noised data"
                )
            self.shape: tuple[int, ...] = shape  # type: ignore[assignment]
            self.labels = one_hot(label_dim, n, seed + start, class_labels)
            return
        self.shape = (self.dataset.channels, self.dataset.resolution, self.dataset.resolution)
        if start + n > len(self.dataset):
            where = f"n={n} images" if not start else f"start={start}, n={n}"
            left = len(self.dataset) - start
            hint = f"give n={left} or less" if left > 0 else "give a smaller start"
            raise GddlabError(f"{where}, but {self.dataset.name!r} has {len(self.dataset)}: {hint}")
        if None not in shape and shape != self.shape:
            raise GddlabError(
                f"{self.dataset.name!r} has images {self.shape}, this network takes {shape}: give another data="
            )
        self.index = order(len(self.dataset), seed, start, n)
        if class_labels is None and label_dim:
            if self.dataset.classes != label_dim:
                raise GddlabError(
                    f"{self.dataset.name!r} has {self.dataset.classes} classes, this network {label_dim}: give class_labels="
                )
            self.labels = self.dataset.labels(self.index)
        else:
            self.labels = one_hot(label_dim, n, seed, class_labels)

    def split(
        self, batch_size: int, group: int = 1, *, together: bool = False, images: tuple[int, int] | None = None
    ) -> tuple[list[list[float]], list[tuple[int, int]]]:
        """Parts of the noise levels, and first and last image of each pass, at most `batch_size` rows where that can be.

        Args:
            batch_size: Rows of a pass.
            group: Images that stay in one pass.
            together: All noise levels stay in one pass.
            images: First and last image; None for all.
        """
        first, last = (0, self.n) if images is None else images
        width = len(self.sigmas) if together else min(len(self.sigmas), max(1, batch_size // group))
        levels = [self.sigmas[i : i + width] for i in range(0, len(self.sigmas), width)]
        step = max(1, batch_size // width // group) * group
        return levels, [(i, min(i + step, last)) for i in range(first, last, step)]

    def clean(self, i: int, j: int) -> Tensor:
        """The images themselves, (j - i, C, H, W) in [-1, 1]; zeros where there are none."""
        if self.dataset is None or self.index is None:
            return torch.zeros(j - i, *self.shape)
        return self.dataset.images(self.index[i:j])

    def noise(self, i: int, j: int) -> Tensor:
        """Standard normal noise of seeds `seed + start + i` and so on, (j - i, C, H, W)."""
        first = self.seed + self.start
        return latents(range(first + i, first + j), self.shape)

    def rows(self, i: int, j: int, *, device: torch.device, sigmas: Sequence[float] | None = None) -> Rows:
        """Images i to j at all noise levels, or at some, on `device`; float64 where the network is."""
        wanted = self.sigmas if sigmas is None else list(sigmas)
        dtype = torch.float64 if self.float64 else torch.float32
        levels = torch.tensor(wanted, dtype=dtype, device=device)
        labels = None if self.labels is None else self.labels[i:j].to(device)
        noise = self.noise(i, j).to(device, dtype)
        if self.states == "trajectory":
            x = self._trajectory(noise, labels, wanted)
        else:
            clean = self.clean(i, j).to(device, dtype)
            x = clean[:, None] + levels[:, None, None, None] * noise[:, None]  # (b, S, C, H, W)
        c = None if labels is None else labels.repeat_interleave(len(levels), 0)
        return x.flatten(0, 1), levels.repeat(j - i), c

    def _trajectory(self, noise: Tensor, labels: Tensor | None, wanted: list[float]) -> Tensor:
        """States at `wanted` of Heun's method through EDM's 18 noise levels and all of `sigmas` (Karras et al. 2022, algorithm 1)."""
        grid = _noise_levels(self.denoiser, TRAJECTORY_STEPS, "noised")
        visited = sorted({*grid, *self.sigmas}, reverse=True)
        x = (noise * visited[0]).double()
        found: dict[float, Tensor] = {}

        def slope(x: Tensor, sigma: float) -> Tensor:
            level = torch.full((len(x),), sigma, dtype=noise.dtype, device=noise.device)
            return (x - self.denoiser(x.to(noise.dtype), level, labels).double()) / sigma

        with torch.no_grad():
            for sigma, following in itertools.pairwise([*visited, None]):
                assert sigma is not None
                found[sigma] = x.to(noise.dtype)
                if following is None or following < min(wanted):
                    break
                d = slope(x, sigma)
                euler = x + (following - sigma) * d
                x = x + (following - sigma) * (d + slope(euler, following)) / 2
        return torch.stack([found[s] for s in wanted], 1)

    def describe(self) -> dict[str, Any]:
        """For the meta data of a result."""
        return {
            "data": None if self.dataset is None else self.dataset.manifest.to_dict(),
            "states": self.states,
            "sigmas": self.sigmas,
            "n_images": self.n,
            "seed": self.seed,
            "images": [[self.seed, self.start, self.start + self.n]],
            "labels": None
            if self.labels is None
            else self.labels_of
            if self.dataset or self.labels_of != "images"
            else "in turn",
        }


def _noise_levels(model: nn.Module, timesteps: int | Sequence[float] | None, states: str) -> list[float]:
    low, high = float(getattr(model, "sigma_min", 0.0)), float(getattr(model, "sigma_max", math.inf))
    if states == "student":
        if timesteps is not None and not (isinstance(timesteps, Integral) and timesteps == 18):
            raise GddlabError(
                f"timesteps={timesteps!r}: a student sees sigma 80 alone, leave timesteps (or --sigmas) away"
            )
        return [float(getattr(model, "sigma_g", SIGMA_STUDENT))]
    if timesteps is None:
        timesteps = 18
    listed: list[Any] = list(timesteps) if isinstance(timesteps, Iterable) else [timesteps]
    if any(isinstance(s, bool) for s in listed):
        raise GddlabError(f"timesteps={timesteps}: give a whole number, or a list of sigmas")
    if isinstance(timesteps, Integral):
        grid = karras_sigmas(int(timesteps), sigma_min=max(0.002, low), sigma_max=min(80.0, high)).tolist()
    else:
        try:
            if not isinstance(timesteps, Iterable):
                raise TypeError
            grid = [float(s) for s in listed]
        except (TypeError, ValueError):
            raise GddlabError(f"timesteps={timesteps!r}: give a whole number, or a list of sigmas") from None
        wrong = [s for s in grid if not (math.isfinite(s) and s > 0 and low <= s <= high)]
        if wrong:
            accepted = f"{low:g} to {high:g}" if math.isfinite(high) else "above 0 and finite"
            raise GddlabError(f"sigma {wrong[0]:g} in timesteps: this network accepts {accepted}")
        if not grid or len(set(grid)) < len(grid):
            raise GddlabError(f"timesteps={grid}: give at least one sigma, each once")
    if isinstance(model, Precond):  # iDDPM knows certain levels only
        grid = model.round_sigma(torch.tensor(grid, dtype=torch.float64)).tolist()
    return sorted(set(grid), reverse=True)


def _dataset(model: nn.Module, data: str | ImageDataset | None, states: str) -> ImageDataset | None:
    if states != "noised":
        if data is not None:
            raise GddlabError(f'states="{states}" needs no images: leave data= away')
        return None
    if data is None:
        data = getattr(getattr(model, "card", None), "data", None)
    if data is None:
        raise GddlabError('this network names no dataset: give data=, or states="prior" to probe pure noise')
    if not isinstance(data, str | Path | ImageDataset):
        raise GddlabError(f"data={data!r}: give a dataset, or its name or path")
    return open_dataset(data)


def device_of(model: nn.Module) -> torch.device:
    """Where a network's first tensor lies."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0].rstrip(".")
        raise GddlabError(f"device={str(name)!r} cannot be used here ({reason}): give another, such as cpu") from None
    return device


@contextlib.contextmanager
def as_it_was(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Iterator[torch.device]:
    """Eval mode, autocast to `dtype`, on `device`, which is yielded; every module's mode and the network's device come back.

    Args:
        model: The network that is run.
        device: None leaves it where it is.
        dtype: "bfloat16" or "float16", or their torch dtypes, for autocast; None runs it in its own precision.
    """
    origin = device_of(model)
    target = origin if device is None else _device(device)
    name = precision(dtype)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        if target != origin:
            model.to(target)
        with torch.autocast(target.type, getattr(torch, name)) if name != "float32" else contextlib.nullcontext():
            yield target
    finally:
        if target != origin:
            model.to(origin)
        for module, mode in modes.items():
            module.training = mode
