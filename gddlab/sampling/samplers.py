"""Samplers: EDM's deterministic Heun sampler and the one-step student."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond, Precond
from gddlab.progress import progress_bar

__all__ = ["heun", "karras_sigmas", "latents", "sample"]


def karras_sigmas(n: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, float64, (n,) (Karras et al. 2022, equation 5)."""
    if n < 1:
        raise GddlabError(f"{n} noise levels: give at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise GddlabError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: give 0 < sigma_min <= sigma_max")
    if n == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
    hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (hi + ramp * (lo - hi)) ** rho


def latents(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one seed an image, so that an image does not depend on its batch.  -> (n, *shape), float32"""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def heun(
    net: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Integrates the probability flow ODE from noise to images with Heun's method (Karras et al. 2022, algorithm 1).

    Args:
        net: Denoiser.
        z: Standard normal noise, (B, C, H, W).
        class_labels: One-hot, (B, label_dim).
        num_steps: Steps; 2 * num_steps - 1 network calls.
        sigma_min, sigma_max, rho: Noise levels, clipped to the network's range.

    Returns:
        (B, C, H, W), float64: the state is kept in float64, the network runs in its own precision.
    """
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    sigmas = karras_sigmas(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).to(z.device)
    sigmas = torch.cat([net.round_sigma(sigmas), sigmas.new_zeros(1)])
    dtype = next(net.parameters()).dtype

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - net(x.to(dtype), sigma.to(dtype), class_labels).double()) / sigma

    x = z.double() * sigmas[0]
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        d = slope(x, s)
        x_next = x + (s_next - s) * d
        if i < num_steps - 1:
            x_next = x + (s_next - s) * (d + slope(x_next, s_next)) / 2
        x = x_next
    return x


def sample(
    net: Precond,
    n: int = 64,
    *,
    steps: int | None = None,
    seed: int = 0,
    class_labels: Tensor | Sequence[int] | int | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> Tensor:
    """Draws images; image i comes from seed + i, whatever the batch size.

    Args:
        net: Student or teacher.
        n: Images.
        steps: None for a student (one step); for a teacher the number of Heun steps, 18 if None.
        seed: First seed.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim);
            None deals classes in turn, image i having class (seed + i) mod label_dim.
        batch_size: Images at once.
        progress: Shows a bar when at a terminal or in a notebook.

    Returns:
        float32 in [-1, 1], (n, C, H, W), on the CPU.

    Raises:
        GddlabError: n or steps below 1, steps given to a student, labels that do not fit.
    """
    if n < 1:
        raise GddlabError(f"n={n} images: give at least 1")
    if isinstance(net, OneStepPrecond):
        if steps not in (None, 1):
            raise GddlabError(f"steps={steps}: a one-step student takes one step, leave steps away")
    elif steps is not None and steps < 1:
        raise GddlabError(f"steps={steps}: give at least 1")
    labels = one_hot(net.label_dim, n, seed, class_labels)
    device = next(net.parameters()).device
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    out = torch.empty(n, *shape)
    was_training = net.training
    net.eval()
    try:
        with torch.inference_mode(), progress_bar(total=n, desc="sampling", unit="img", enabled=progress) as bar:
            for i in range(0, n, batch_size):
                j = min(i + batch_size, n)
                z = latents(range(seed + i, seed + j), shape).to(device)
                c = None if labels is None else labels[i:j].to(device)
                if isinstance(net, OneStepPrecond):
                    x = net.generate(z.to(next(net.parameters()).dtype), c)
                else:
                    x = heun(net, z, c, num_steps=18 if steps is None else steps)
                out[i:j] = x.float().clamp(-1, 1).cpu()
                bar.update(j - i)
    finally:
        net.train(was_training)
    return out


def one_hot(label_dim: int, n: int, seed: int, labels: Tensor | Sequence[int] | int | None) -> Tensor | None:
    if not label_dim:
        if labels is not None:
            raise GddlabError("class_labels given to an unconditional network: leave them away")
        return None
    if labels is None:
        ids = (torch.arange(n) + seed) % label_dim
    else:
        ids = torch.as_tensor(labels)
        if ids.ndim == 2:
            if ids.shape != (n, label_dim):
                raise GddlabError(f"class_labels are {tuple(ids.shape)}: give ({n}, {label_dim})")
            return ids.float()
        ids = ids.expand(n) if ids.ndim == 0 else ids
        if ids.shape != (n,) or ids.min() < 0 or ids.max() >= label_dim:
            raise GddlabError(f"class_labels {ids.tolist()[:4]}: give {n} ids in 0..{label_dim - 1}")
    return torch.nn.functional.one_hot(ids.long(), label_dim).float()
