"""What a network is shown: images, noise, noise levels and labels, as rows of a batch."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence, Sized
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import SkipValidation
from torch import Tensor, nn

from gddlab.datasets import ImageDataset, Source, data_of, open_dataset, order
from gddlab.errors import GddlabError, numbers_in, positive, shown
from gddlab.nets import Codec, Denoiser, Path, Precond
from gddlab.nets.bare import denoiser_of
from gddlab.nets.denoiser import Wrapped, data_std
from gddlab.nets.precond import check_level
from gddlab.sampling import karras_sigmas, latents
from gddlab.sampling.samplers import from_pure, heun_step, is_pure, one_hot, seed_list

# Arguments that all measurements share.
Timesteps = SkipValidation[int | Sequence[float] | None]
Told = SkipValidation[Literal["cross"] | float | Sequence[float] | None]
Data = Source | None
States = Literal["noised", "prior", "trajectory", "student"]
Unit = Literal["sigma", "t"]
Labels = SkipValidation[Tensor | Sequence[int] | int | None]
Precision = Literal["float32", "bfloat16", "float16"] | torch.dtype | None

LEVELS, CROSSED = 18, 6
"""How many noise levels are measured by default; the second where each is told each."""
SIGMA_STUDENT = 80.0
TRAJECTORY_STEPS = 18
MOST_LEVELS = 1000
"""Memory grows with the square of their number, where statistics compare them."""

Rows = tuple[Tensor, Tensor, Tensor | None]
"""States (n * S, C, H, W), their sigmas (n * S,), one-hot labels (n * S, label_dim) or None: what a denoiser is called
with. Row i * S + s is image i at noise level s; where the network is told T levels, row (i * S + s) * T + t."""


class Noised(NamedTuple):
    """`Rows`, and what they are made of, on the scale of images in [-1, 1].

    Attributes:
        x: States.
        sigma: Their noise levels.
        labels: One-hot, or None.
        clean: Images; None where states are made without any.
        origin: The states without the image: sigma * noise, or zeros where there is no image.
    """

    x: Float[Tensor, "rows c h w"]
    sigma: Float[Tensor, " rows"]
    labels: Float[Tensor, "rows classes"] | None
    clean: Float[Tensor, "rows c h w"] | None
    origin: Float[Tensor, "rows c h w"]


class Inputs:
    """Images `start` to `start + n` of a seeded order: at every noise level the same images with the same noise.

    Args:
        model: The denoiser that will see them: its range, shape, labels and card are read.
        timesteps, unit, told, data, states, n, start, seed, class_labels: As in `probe`.

    Attributes:
        sigmas: Noise levels, descending.
        told: Noise levels that the network is told for each of `sigmas`, descending; None where it is told its input's.
        dataset: Where images come from; None where there are none.
        sigma_data: Standard deviation of the data, by which losses are weighted.

    Raises:
        GddlabError: An argument does not fit the network or another argument.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Timesteps = None,
        *,
        unit: Unit = "sigma",
        told: Told = None,
        data: Data = None,
        states: States = "noised",
        n: int = 256,
        start: int = 0,
        seed: int = 0,
        class_labels: Labels = None,
    ):
        self.denoiser = denoiser_of(model)
        if isinstance(self.denoiser, Wrapped):
            self.denoiser.check_conditioning()
        for name, value in self.denoiser.state_dict().items():
            if not isinstance(value, Tensor):  # of a quantised network
                raise GddlabError(f"the network is quantised ({name!r} is no tensor): give it as it was before")
        seed_list(n, seed, None)
        seed_list(n, seed + start, None)
        self.states, self.n, self.start, self.seed = states, n, start, seed
        if told is not None:
            _check_told(self.denoiser, told)
        crossed = isinstance(told, str) and told == "cross"
        if states == "student" and unit != "sigma":
            raise GddlabError(f'unit={unit!r} with states="student": a student sees sigma 80 alone, omit unit')
        if timesteps is None:
            timesteps = CROSSED if crossed and states != "student" else LEVELS
        if unit == "t":
            timesteps = _from_times(self.denoiser, "timesteps", timesteps)
            told = told if crossed else _from_times(self.denoiser, "told", told)
        self.sigmas = _noise_levels(self.denoiser, timesteps, states)
        self.told = self.sigmas if crossed else _told_levels(self.denoiser, told)
        if isinstance(self.denoiser, Wrapped):
            self.denoiser.check_times(self.told or self.sigmas)
        self.dataset = dataset_of(self.denoiser, data, states)
        self.sigma_data = data_std(self.denoiser)
        self.float64 = any(p.dtype == torch.float64 for p in self.denoiser.parameters())
        label_dim = int(getattr(self.denoiser, "label_dim", 0))
        names = ("img_channels", "img_resolution", "img_resolution")
        shape = tuple(getattr(self.denoiser, a, None) for a in names)
        self.codec: Codec | None = getattr(self.denoiser, "codec", None)
        self._index: Tensor | None = None
        if self.dataset is None:
            if None in shape:
                raise GddlabError(
                    "this network does not say img_channels and img_resolution: set them, or probe noised data"
                )
            self.shape: tuple[int, ...] = shape  # type: ignore[assignment]
            self.labels = one_hot(label_dim, range(seed + start, seed + start + n), class_labels)
        else:
            self.shape = (self.dataset.channels, self.dataset.resolution, self.dataset.resolution)
            self._index = self._images(shape)
            if self.codec is not None:
                self.shape = self.codec.latent_shape(self.dataset.resolution)
            if getattr(self.denoiser, "cond", None) is not None:
                self.labels = one_hot(label_dim, range(seed + start, seed + start + n), class_labels)
            elif class_labels is None and label_dim:
                if self.dataset.classes != label_dim:
                    raise GddlabError(
                        f"{self.dataset.name!r} has {self.dataset.classes} classes, this network {label_dim}: "
                        "give class_labels="
                    )
                self.labels = self.dataset.labels(self._index)
            else:
                self.labels = one_hot(label_dim, range(seed, seed + n), class_labels)
        labels_of = f"class {class_labels}" if isinstance(class_labels, int) else "given"
        if class_labels is None:
            in_turn = self.dataset is None or getattr(self.denoiser, "cond", None) is not None
            labels_of = "in turn" if in_turn else "images"
        self._labels_of = None if self.labels is None else labels_of

    def _images(self, shape: tuple[int | None, ...]) -> Tensor:
        """Indices of the images in the dataset, whose shape is checked against the network's."""
        assert self.dataset is not None
        if self.start + self.n > len(self.dataset):
            where = f"n={self.n} images" if not self.start else f"start={self.start}, n={self.n}"
            left = len(self.dataset) - self.start
            hint = f"give n={left} or less" if left > 0 else "give a smaller start"
            raise GddlabError(f"{where}, but {self.dataset.name!r} has {len(self.dataset)}: {hint}")
        if self.codec is not None:
            shape = self.codec.image_shape(shape)
        elif getattr(self.denoiser, "latent", False):
            raise GddlabError(
                'this network works on latents: give gddlab.wrap vae=, its autoencoder, or states="prior" to probe it '
                "without images"
            )
        if any(a is not None and a != b for a, b in zip(shape, self.shape, strict=True)):
            raise GddlabError(
                f"{self.dataset.name!r} has images {self.shape}, this network takes {shape}: give another data="
            )
        return order(len(self.dataset), self.seed, self.start, self.n)

    @property
    def rows_per_level(self) -> int:
        """Rows of an image at one noise level: one for each level that the network is told."""
        return len(self.told or [0])

    def split(
        self, batch_size: int, group: int = 1, *, together: bool = False, images: tuple[int, int] | None = None
    ) -> tuple[list[list[float]], list[tuple[int, int]]]:
        """Parts of the noise levels, and first and last image of each pass, of at most `batch_size` rows if possible.

        A pass holds groups of `group` images, among `images` (first, last) or all, and with `together` all levels.
        """
        first, last = (0, self.n) if images is None else images
        each = self.rows_per_level
        width = len(self.sigmas) if together else min(len(self.sigmas), max(1, batch_size // group // each))
        levels = [self.sigmas[i : i + width] for i in range(0, len(self.sigmas), width)]
        step = max(1, batch_size // (width * each) // group) * group
        return levels, [(i, min(i + step, last)) for i in range(first, last, step)]

    def clean(self, i: int, j: int, device: torch.device | None = None) -> Float[Tensor, "n c h w"]:
        """What the network is to denoise to: images in [-1, 1], or their latents; zeros where there are none."""
        if self.dataset is None or self._index is None:
            return torch.zeros(j - i, *self.shape)
        images = self.dataset.images(self._index[i:j])
        if self.codec is None:
            return images
        with torch.no_grad():
            return self.codec.encode(images.to(device or images.device)).to(images.device)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of what `shown` gives."""
        return self.shape if self.codec is None else self.codec.image_shape(self.shape)

    def shown(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """What the network denoises as images on the scale of [-1, 1]: latents are decoded."""
        return x if self.codec is None else self.codec.decode(x)

    def class_ids(self) -> np.ndarray | None:
        """The class of each image in its dataset, (n,) int64; None without labels."""
        ids = None if self.dataset is None else self.dataset.class_ids
        return None if ids is None or self._index is None else ids[self._index.numpy()]

    def noise(self, i: int, j: int) -> Float[Tensor, "n c h w"]:
        """Standard normal noise of seeds `seed + start + i` and so on."""
        first = self.seed + self.start
        return latents(range(first + i, first + j), self.shape)

    def rows(self, i: int, j: int, *, device: torch.device, sigmas: Sequence[float] | None = None) -> Rows:
        """Images i to j at all noise levels, or at `sigmas`, on `device`; float64 where the network is."""
        return self.noised(i, j, device=device, sigmas=sigmas)[:3]

    def told_rows(
        self, i: int, j: int, *, device: torch.device, sigmas: Sequence[float]
    ) -> tuple[Rows, dict[str, Tensor]]:
        """`rows` at each level that the network is told, and the keyword argument that tells it, if any."""
        x, sigma, labels = self.rows(i, j, device=device, sigmas=sigmas)
        if self.told is None:
            return (x, sigma, labels), {}
        each = len(self.told)
        told = torch.tensor(self.told, dtype=x.dtype, device=device).repeat(len(x))
        x, sigma = x.repeat_interleave(each, 0), sigma.repeat_interleave(each, 0)
        return (x, sigma, None if labels is None else labels.repeat_interleave(each, 0)), {"told": told}

    def noised(self, i: int, j: int, *, device: torch.device, sigmas: Sequence[float] | None = None) -> Noised:
        """`rows`, and what they are made of."""
        wanted = self.sigmas if sigmas is None else list(sigmas)
        dtype = torch.float64 if self.float64 else torch.float32
        levels = torch.tensor(wanted, dtype=dtype, device=device)
        labels = None if self.labels is None else self.labels[i:j].to(device)
        noise = self.noise(i, j).to(device, dtype)
        clean = None
        if self.states == "trajectory":
            x = self._trajectory(noise, labels, wanted).flatten(0, 1)
            origin = torch.zeros_like(x)
        else:
            x = (levels[:, None, None, None] * noise[:, None]).flatten(0, 1)  # (b, S, C, H, W) -> (B, C, H, W)
            origin = torch.zeros_like(x) if self.dataset is None else x
        if self.dataset is not None:
            clean = self.clean(i, j, device).to(device, dtype).repeat_interleave(len(levels), 0)
            x = clean + x
        labels = None if labels is None else labels.repeat_interleave(len(levels), 0)
        return Noised(x, levels.repeat(j - i), labels, clean, origin)

    @torch.no_grad()
    def _trajectory(self, noise: Tensor, labels: Tensor | None, wanted: list[float]) -> Float[Tensor, "n s c h w"]:
        """States at `wanted` of Heun's method (Karras et al. 2022, algorithm 1) on EDM's 18 levels and all `sigmas`."""
        grid = _noise_levels(self.denoiser, TRAJECTORY_STEPS, "noised")
        visited = sorted({*grid, *self.sigmas}, reverse=True)
        x = (noise * visited[0]).double()
        found = {visited[0]: x.to(noise.dtype)}

        def denoised(x: Tensor, sigma: float) -> Tensor:
            level = torch.full((len(x),), sigma, dtype=noise.dtype, device=noise.device)
            out: Tensor = self.denoiser(x.to(noise.dtype), level, labels).double()
            return out

        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - denoised(x, sigma)) / sigma

        for sigma, following in itertools.pairwise(visited):
            if following < min(wanted):
                break
            if is_pure(self.denoiser, sigma):
                x = from_pure(denoised(x, sigma), x, sigma, following)
            else:
                x = heun_step(slope, x, sigma, following)
            found[following] = x.to(noise.dtype)
        return torch.stack([found[s] for s in wanted], 1)

    def describe(self) -> dict[str, Any]:
        """For the meta data of a result."""
        return {
            "data": None if self.dataset is None else self.dataset.manifest.to_dict(),
            "states": self.states,
            "sigmas": self.sigmas,
            "sigma_data": self.sigma_data,
            **({} if self.told is None else {"told": self.told}),
            "n_images": self.n,
            "seed": self.seed,
            "images": [[self.seed, self.start, self.start + self.n]],
            "labels": self._labels_of,
            **self._told_besides(),
        }

    def _told_besides(self) -> dict[str, Any]:
        """Times, conditioning, guidance and codec, of a network that has them."""
        net, about = self.denoiser, {}
        if (path := getattr(net, "path", None)) is not None:
            about["t"] = path.time(torch.tensor(self.sigmas, dtype=torch.float64)).tolist()
        if (cond := getattr(net, "cond", None)) is not None:
            about["cond"] = {"hash": cond.hash, "names": list(cond.names)}
        if (guidance := getattr(net, "guidance", None)) is not None:
            about["guidance"] = guidance
        if self.codec is not None:
            about["codec"] = str(self.codec)
        return about


def within_range(model: nn.Module, sigmas: Sequence[float]) -> list[float]:
    """Noise levels, those beyond the network's range at its ends; each once."""
    low, high = _ends(model)
    return sorted({min(max(s, low), high) for s in sigmas}, reverse=True)


def _ends(model: nn.Module) -> tuple[float, float]:
    """The lowest and highest noise level by default: EDM's, within the network's range."""
    low, high = float(getattr(model, "sigma_min", 0.0)), float(getattr(model, "sigma_max", math.inf))
    return max(0.002, low), min(80.0, high)


def _noise_levels(model: nn.Module, timesteps: Timesteps, states: str) -> list[float]:
    if states == "student":
        if not (isinstance(timesteps, Integral) and timesteps == LEVELS):
            raise GddlabError(f"timesteps={timesteps!r}: a student sees sigma 80 alone, omit timesteps (or --sigmas)")
        return [float(getattr(model, "sigma_g", SIGMA_STUDENT))]
    steps: Any = timesteps
    _check_count("timesteps", steps)
    if isinstance(steps, Integral) and not isinstance(steps, bool):
        low, high = _ends(model)
        grid = karras_sigmas(int(steps), sigma_min=low, sigma_max=high).tolist()
    else:
        grid = _listed_levels(model, "timesteps", steps, "a whole number, or a list of sigmas")
    return _descending(model, grid)


def _from_times(model: nn.Module, name: str, times: Any) -> Any:
    """Noise levels at a network's own times; as a number of levels, equally spaced in time."""
    path: Path | None = getattr(model, "path", None)
    if path is None:
        raise GddlabError('unit="t": this network has no time of its own, give noise levels as sigma')
    if times is None:
        return None
    _check_count(name, times)
    low, high = _ends(model)
    if name == "timesteps" and isinstance(times, Integral) and not isinstance(times, bool):
        first, last = path.time(torch.tensor([high, low], dtype=torch.float64)).tolist()
        grid = torch.linspace(first, last, positive(name, times), dtype=torch.float64).tolist()
        return [min(max(path.sigma(t), low), high) for t in grid]
    single = isinstance(times, Real) and not isinstance(times, bool)
    try:
        listed = [float(t) for t in numbers_in([times] if single else times)]
    except (TypeError, ValueError):
        raise GddlabError(f"{name}={shown(times)}: give a whole number, or a list of times") from None
    return [path.sigma(t) for t in listed]


def _told_levels(model: nn.Module, told: Any) -> list[float] | None:
    if told is None:
        return None
    number = (isinstance(told, Real) and not isinstance(told, bool)) or getattr(told, "ndim", None) == 0
    levels = [told] if number else told
    return _descending(model, _listed_levels(model, "told", levels, '"cross", a sigma, or a list of sigmas'))


def _check_told(model: nn.Module, told: Any) -> None:
    """Refuses a network that cannot be told another noise level than its input's."""
    if not isinstance(model, Precond) and "told" not in inspect.signature(model.forward).parameters:
        raise GddlabError(
            f"told={shown(told)}: this network takes no level but its input's; give its forward an argument told, or "
            "gddlab.wrap a denoise= with one"
        )


def _listed_levels(model: nn.Module, name: str, steps: Any, accepted: str) -> list[float]:
    """Noise levels within the range of the network and of its training, each once; refuses others."""
    _check_count(name, steps)
    try:
        grid = [float(s) for s in numbers_in(steps)]  # "18" is not sigmas 1 and 8
    except (TypeError, ValueError):
        raise GddlabError(f"{name}={shown(steps)}: give {accepted}") from None
    for sigma in grid:
        check_level(f"sigma {sigma:g} in {name}", model, sigma)
    if not grid or len(set(grid)) < len(grid):
        raise GddlabError(f"{name}={shown(grid)}: give at least one sigma, each once")
    return grid


def _check_count(name: str, steps: Any) -> None:
    count = len(steps) if isinstance(steps, Sized) and getattr(steps, "ndim", None) != 0 else steps
    if isinstance(count, Integral) and int(count) > MOST_LEVELS:
        raise GddlabError(f"{name}: {count} noise levels, give at most {MOST_LEVELS}")


def _descending(model: nn.Module, grid: list[float]) -> list[float]:
    if isinstance(model, Denoiser):  # iDDPM knows certain levels only
        grid = model.round_sigma(torch.tensor(grid, dtype=torch.float64)).tolist()
    return sorted(set(grid), reverse=True)


def dataset_of(model: nn.Module, data: Data, states: str) -> ImageDataset | None:
    """The images that `data` means, or the network's card; None for states without images."""
    if states != "noised":
        if data is not None:
            raise GddlabError(f'states="{states}" needs no images: omit data=')
        return None
    if data is None:
        data = data_of(getattr(model, "card", None))
    if data is None:
        raise GddlabError(
            'this network names no dataset: give data=, or states="trajectory" for its own sampling, "prior" for pure '
            "noise"
        )
    return open_dataset(data)
