"""`probe`: statistics of a network's layers over noise levels."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset, open_dataset, order
from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_tensors
from gddlab.nets import Precond, architecture
from gddlab.probing.hooks import Probe
from gddlab.probing.layers import LayerSelection, inventory, is_conv, parameter_table
from gddlab.probing.result import ProbeResult
from gddlab.probing.statistics import DEFAULT, STATISTICS
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.sampling import karras_sigmas, latents
from gddlab.sampling.samplers import one_hot

__all__ = ["STATES", "probe"]

STATES = ("noised", "prior", "student")
SIGMA_STUDENT = 80.0


def probe(
    model: nn.Module,
    timesteps: int | Sequence[float] | None = 18,
    *,
    data: str | ImageDataset | None = None,
    states: str = "noised",
    layers: LayerSelection = "conv",
    stats: str | Iterable[str] = DEFAULT,
    n: int = 256,
    batch_size: int = 64,
    class_labels: Tensor | Sequence[int] | int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Measures how active each layer of a network is at each noise level.

    The same images with the same noise are seen at every noise level. Numbers do not depend on `batch_size` beyond
    float32 rounding. The network is run in eval mode without gradients and left as it was.

    Args:
        model: A denoiser called as `model(x, sigma, class_labels)`: teacher, student, or one of yours.
        timesteps: A number of noise levels, 80 to 0.002 with rho = 7 (Karras et al. 2022, equation 5) within the
            network's range; or the levels themselves, standard deviations on the scale of images in [-1, 1].
        data: Dataset or its name, for "noised" states; None takes the one on the teacher's card.
        states: What the network sees: "noised", image + sigma * noise; "prior", sigma * noise;
            "student", the one-step generator's input, 80 * noise at sigma 80 and nothing else.
        layers: "conv" (4-d weights), "block" (U-Net blocks), "all", a glob, "re:..." , a list, or a function of name and module.
        stats: Names of statistics, see `gddlab.probing.STATISTICS`.
        n: Images; image i is at position i of the dataset's order under `seed`, its noise has seed `seed` + i.
        batch_size: Rows of one forward pass, images times noise levels; an image's noise levels stay together.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim). None takes
            the images' labels, or deals classes in turn where there are no images.
        seed: Of the images' order and the noise.
        device: Where to run; None means where the network is. The network returns to where it was.
        progress: Shows a bar at a terminal.

    Returns:
        The table of values with standard errors over images, and sigma x sigma cosines.

    Raises:
        GddlabError: Unknown dataset, states, layers or statistics; noise levels outside of the network's range; more
            images than there are; labels or images that do not fit the network; a layer that cannot be measured.
    """
    if states not in STATES:
        raise unknown("states", states, STATES)
    for name, value in (("n", n), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GddlabError(f"{name}={value!r}: give a whole number of at least 1")
    sigmas = _noise_levels(model, timesteps, states)
    dataset = _dataset(model, data, states)
    images, labels = _inputs(model, dataset, n, seed, class_labels)
    measure = Probe(model, sigmas, layers=layers, stats=stats)
    origin = _device_of(model)
    target = origin if device is None else torch.device(device)
    levels = torch.tensor(sigmas, dtype=torch.float32, device=target)
    step = max(1, batch_size // len(sigmas))
    with (
        _as_it_was(model, target, origin),
        torch.no_grad(),
        measure,
        progress_bar(total=n, desc="probing", unit="img", enabled=progress) as bar,
    ):
        for i in range(0, n, step):
            j = min(i + step, n)
            clean = images(i, j).to(target)  # (b, C, R, R)
            noise = latents(range(seed + i, seed + j), clean.shape[1:]).to(target)
            x = clean[:, None] + levels[:, None, None, None] * noise[:, None]  # (b, S, C, R, R)
            c = None if labels is None else labels[i:j].to(target).repeat_interleave(len(sigmas), 0)
            with measure.images(j - i):
                model(x.flatten(0, 1), levels.repeat(j - i), c)
            bar.update(j - i)
    result = ProbeResult.of(measure, _meta(model, measure, dataset, states, n, seed))
    if bad := result.meta["nonfinite"]:
        places = ", ".join(f"{b['layer']} ({b['side']}) at sigma {b['sigma']:g}" for b in bad[:3])
        warnings.warn(f"activations are not finite in {len(bad)} places: {places}", RuntimeWarning, stacklevel=2)
    return result


def _noise_levels(model: nn.Module, timesteps: int | Sequence[float] | None, states: str) -> list[float]:
    low, high = float(getattr(model, "sigma_min", 0.0)), float(getattr(model, "sigma_max", math.inf))
    if states == "student":
        if timesteps is not None and not (isinstance(timesteps, int) and timesteps == 18):
            raise GddlabError(f"timesteps={timesteps!r}: a student sees sigma 80 alone, leave timesteps away")
        return [float(getattr(model, "sigma_g", SIGMA_STUDENT))]
    if timesteps is None:
        timesteps = 18
    if isinstance(timesteps, bool):
        raise GddlabError(f"timesteps={timesteps}: give a whole number, or a list of sigmas")
    if isinstance(timesteps, int):
        grid = karras_sigmas(timesteps, sigma_min=max(0.002, low), sigma_max=min(80.0, high)).tolist()
    else:
        try:
            grid = [float(s) for s in timesteps]
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
    return open_dataset(data)


def _inputs(
    model: nn.Module,
    dataset: ImageDataset | None,
    n: int,
    seed: int,
    class_labels: Tensor | Sequence[int] | int | None,
) -> tuple[Any, Tensor | None]:
    """A function of first and last index that gives images, zeros without a dataset; and labels, (n, label_dim)."""
    label_dim = int(getattr(model, "label_dim", 0))
    shape = tuple(getattr(model, a, None) for a in ("img_channels", "img_resolution", "img_resolution"))
    if dataset is None:
        if None in shape:
            raise GddlabError(
                "this network does not say img_channels and img_resolution: set them, or probe noised data"
            )
        return lambda i, j: torch.zeros(j - i, *shape), one_hot(label_dim, n, seed, class_labels)
    if n > len(dataset):
        raise GddlabError(f"n={n} images, but {dataset.name!r} has {len(dataset)}: give n={len(dataset)} or less")
    have = (dataset.channels, dataset.resolution, dataset.resolution)
    if None not in shape and shape != have:
        raise GddlabError(f"{dataset.name!r} has images {have}, this network takes {shape}: give another data=")
    index = order(len(dataset), seed, 0, n)
    if class_labels is None and label_dim:
        if dataset.classes != label_dim:
            raise GddlabError(
                f"{dataset.name!r} has {dataset.classes} classes, this network {label_dim}: give class_labels="
            )
        labels: Tensor | None = dataset.labels(index)
    else:
        labels = one_hot(label_dim, n, seed, class_labels)
    return lambda i, j: dataset.images(index[i:j]), labels


def _device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextlib.contextmanager
def _as_it_was(model: nn.Module, device: torch.device, origin: torch.device) -> Iterator[None]:
    """Eval mode on `device` inside; every module's mode and the network's device come back."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        if device != origin:
            model.to(device)
        yield
    finally:
        if device != origin:
            model.to(origin)
        for module, mode in modes.items():
            module.training = mode


def _meta(
    model: nn.Module, measure: Probe, dataset: ImageDataset | None, states: str, n: int, seed: int
) -> dict[str, Any]:
    named = {m.name for m in measure.layers} | {name for name, m in model.named_modules() if is_conv(m)}
    return {
        "model": {
            "class": type(model).__name__,
            "fingerprint": hash_tensors(model.state_dict()),
            **(architecture(model) if isinstance(model, Precond) else {}),
        },
        "parameters": [[name, list(shape)] for name, shape in parameter_table(model)],
        "layers": [layer.to_dict() for name, layer in inventory(model).items() if name in named],
        "data": None if dataset is None else dataset.manifest.to_dict(),
        "states": states,
        "sigmas": measure.sigmas,
        "n_images": n,
        "seed": seed,
        "stats": {name: STATISTICS[name].describe() for name in measure.stats},
        "nonfinite": measure.nonfinite(),
        "versions": versions(),
    }
