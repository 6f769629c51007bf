"""Noise, and styles, from which a one-step generator makes what is wanted: Adam on many rows at once."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond
from gddlab.nets.bare import check_weights, device_of
from gddlab.probing.guard import as_it_was, differentiable
from gddlab.sampling.samplers import ImageNoise, denoiser_in, image_shape, input_type, multistep, one_hot

LR = 0.5
"""Adam's learning rate at its highest; noise has unit variance."""
BETAS = (0.6, 0.9)
"""A search of tens of steps has no use for the memory of a thousand."""
RAMP = 5
"""Steps over which the learning rate rises."""


class Generator:
    """A student as a function of the noise that it starts from.

    The noise of later steps, if it has any, is fixed by each row's seed, as `gddlab.sample` draws it.

    Args:
        net: The student, also one that torch.compile has wrapped.

    Attributes:
        shape: Of an image and its noise, (C, H, W).
        label_dim: Classes; 0 for an unconditional student.
        calls: Calls of the network per image.

    Raises:
        GddlabError: No student.
    """

    def __init__(self, net: Any):
        self.net, self.module = net, student_in(net)
        self.shape, self.label_dim = image_shape(net), self.module.label_dim
        self.calls, self.device = len(self.module.sigmas), device_of(net)

    def noise(self, seeds: Sequence[int] | ImageNoise) -> tuple[Tensor, list[Tensor]]:
        """Starting noise of some seeds, and that of each later step: what `sample` uses.  -> (B, C, H, W), [...]

        Given an `ImageNoise`, what comes next from it.
        """
        drawn = seeds if isinstance(seeds, ImageNoise) else ImageNoise(seeds, self.shape)
        z = drawn(torch.float32).to(self.device)
        return z, [drawn().float().to(self.device) for _ in self.module.mid_sigmas]

    def __call__(
        self,
        z: Float[Tensor, "b c h w"],
        labels: Tensor | None = None,
        later: Sequence[Tensor] = (),
        within: Iterable[contextlib.AbstractContextManager[Any]] = (),
    ) -> Float[Tensor, "b c h w"]:
        """Images, not clipped, so that gradients reach all pixels; `within` as for `multistep`."""
        net, noise = cast(OneStepPrecond, self.net), iter(later).__next__
        z = z.to(input_type(self.module))
        return multistep(net, z, labels, sigmas=self.module.sigmas, noise=noise, within=within).float()

    def one_hot(self, ids: Tensor | None) -> Tensor | None:
        """One-hot labels of class ids, on the network's device."""
        labels = None if ids is None else one_hot(self.label_dim, range(len(ids)), ids)
        return None if labels is None else labels.to(self.device)


def student_in(net: Any) -> OneStepPrecond:
    """The student itself, also when torch.compile has wrapped it."""
    module = denoiser_in(net)
    if not isinstance(module, OneStepPrecond):
        raise GddlabError(f"{type(module).__name__} is no one-step student: give load_run(...).student()")
    check_weights(net)
    return module


def class_ids_of(net: Any, labels: Any, n: int) -> Tensor | None:
    """Class ids of n images, on the CPU, from what a user gave; None where nothing was given.

    Raises:
        GddlabError: Labels that do not fit, or any for an unconditional network.
    """
    if labels is None:
        return None
    rows = one_hot(denoiser_in(net).label_dim, range(n), labels)
    if rows is None:
        return None
    ids = rows.argmax(1).cpu()
    if not torch.equal(rows.cpu(), torch.nn.functional.one_hot(ids, rows.shape[1]).float()):
        raise GddlabError("class_labels has rows that are not one-hot: give one class an image")
    return ids


P = ParamSpec("P")
R = TypeVar("R")


def searching(call: Callable[P, R]) -> Callable[P, R]:
    """A call that needs gradients, and so makes no tensors of inference mode, also where the caller is in it."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return call(*args, **kwargs)

    return wrapped


def owned(x: Tensor) -> Tensor:
    """A tensor that autograd may keep; one of inference mode is copied."""
    return x.detach().clone() if x.is_inference() else x.detach()


@contextlib.contextmanager
def running(net: Any, dtype: torch.dtype | str | None = None) -> Iterator[None]:
    """Eval mode, gradients of the noise alone, autocast to `dtype`; afterwards as before."""
    with as_it_was(net, dtype=dtype), differentiable(net):
        yield


def on_shell(z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scaled to length sqrt(d), near which almost all of a standard Gaussian of d dimensions lies."""
    return z * (math.sqrt(z[0].numel()) / z.flatten(1).norm(dim=1).clamp(min=1e-12)).view(-1, 1, 1, 1)


def colour(z: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """How far noise is from white: squared correlations of neighbours, down and across, at each scale from 4 pixels on.

    Near 0 for Gaussian noise. A search that is free in most pixels leaves it (Karras et al. 2020, "Analyzing and
    improving the image quality of StyleGAN", appendix D).
    """
    out = z.new_zeros(len(z))
    while True:
        out = out + sum((z * z.roll(1, axis)).mean((1, 2, 3)).square() for axis in (2, 3))
        if min(z.shape[2:]) <= 4:
            return out
        z = 2 * avg_pool2d(z, 2)  # of unit variance again


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along the great circle, lengths interpolated; rows of (B, C, H, W)."""
    length = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b)]
    unit = [x / n.clamp(min=1e-12) for x, n in zip((a, b), length, strict=True)]
    cos = (unit[0] * unit[1]).flatten(1).sum(1).clamp(-1, 1).view(-1, 1, 1, 1)
    angle = cos.acos()
    near = angle.sin().abs() < 1e-4  # the circle is a straight line there
    wa, wb = (torch.where(near, u, (angle * u).sin() / angle.sin()) for u in (torch.tensor(1 - t), torch.tensor(t)))
    return (wa * unit[0] + wb * unit[1]) * ((1 - t) * length[0] + t * length[1])


class Search:
    """Adam on noise, row by row: what a row becomes does not depend on the others.

    Args:
        z: Where rows begin, (B, C, H, W).
        free: What moves with the noise, but on no shell: (B, ...) each.
        steps: Of the whole search; the learning rate rises for the first and falls over the second half.
        lr: Its highest value.

    Attributes:
        rows: z, and what moves with it.
    """

    def __init__(self, z: Float[Tensor, "b c h w"], *free: Tensor, steps: int, lr: float = LR):
        self.rows, self.steps, self.lr, self.step = [z.clone(), *(x.clone() for x in free)], steps, lr, 0
        self.m, self.v = ([torch.zeros_like(x) for x in self.rows] for _ in range(2))

    @property
    def z(self) -> Float[Tensor, "b c h w"]:
        return self.rows[0]

    def run(self, loss: Callable[..., Tensor], steps: int) -> None:
        """Takes some of the steps; `loss` maps noise on the shell, and what is free, to one number per row, (B,)."""
        b1, b2 = BETAS
        for _ in range(steps):
            z, *free = given = [x.detach().requires_grad_() for x in self.rows]
            grads = torch.autograd.grad(loss(on_shell(z), *free).sum(), given)
            self.step += 1
            rate = self.lr * min(1.0, self.step / RAMP, 2 * (1 - (self.step - 1) / self.steps))
            for i, (g, m, v) in enumerate(zip(grads, self.m, self.v, strict=True)):
                m.lerp_(g, 1 - b1)
                v.lerp_(g.square(), 1 - b2)
                change = m / (1 - b1**self.step) / ((v / (1 - b2**self.step)).sqrt() + 1e-12)
                self.rows[i] = self.rows[i] - rate * change
            self.rows[0] = on_shell(self.z)  # the length of z says nothing, but scales its gradient

    def keep(self, rows: Tensor) -> None:
        """Goes on with some rows alone."""
        self.rows, self.m, self.v = ([x[rows] for x in kind] for kind in (self.rows, self.m, self.v))


class Styles:
    """Vectors of its own for each row, added to those that a student's layers make of the noise level and the class.

    A one-step student is told one noise level, so its embedding, and the scale and shift that each block takes from it,
    are the same for all images. They are outputs of linear layers, one vector a row; what is added to each is counted
    in standard deviations of that output over its channels. GAN inversions move such vectors beside the noise, as W+
    (Abdal et al. 2019, "Image2StyleGAN").

    Args:
        net: A student, called eagerly.
    """

    def __init__(self, net: Any):
        self.layers = [m for m in denoiser_in(net).modules() if isinstance(m, nn.Linear)]
        self.units: dict[nn.Linear, Tensor] = {}

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """In the calls inside, finds the layers that give one vector a row, and the unit of each row, (rows, 1)."""

        def see(layer: nn.Module, args: Any, output: Tensor) -> None:
            if output.ndim == 2:
                self.units[cast(nn.Linear, layer)] = output.detach().float().std(1, keepdim=True)

        with hooked(self.layers, see):
            yield

    def zeros(self, z: Tensor) -> Float[Tensor, "b d"]:
        """What adds nothing, for rows of noise."""
        return z.new_zeros(len(z), sum(layer.out_features for layer in self.units))

    @contextlib.contextmanager
    def added(self, styles: Float[Tensor, "b d"]) -> Iterator[None]:
        """In the calls inside, rows have these."""
        parts = styles.split([layer.out_features for layer in self.units], 1)
        own: dict[nn.Module, Tensor] = {
            layer: part * unit for (layer, unit), part in zip(self.units.items(), parts, strict=True)
        }
        with hooked(own, lambda layer, args, output: output + own[layer].to(output)):
            yield


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Tensor], Tensor | None]) -> Iterator[None]:
    """A forward hook of each, inside."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_images(name: str, images: Any, shape: Sequence[int]) -> Tensor:
    """Images of a student's shape in [-1, 1], float32; a single one, (C, H, W), becomes a batch.

    What rounding has brought a ten-thousandth out of range is brought back.

    Raises:
        GddlabError: Another shape or type, or values out of range.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise GddlabError(f"{name} is a {kind}: give a float tensor (B, C, H, W) in [-1, 1]")
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape) or not len(images):
        raise GddlabError(f"{name} is {tuple(images.shape)}: give (B, {', '.join(map(str, shape))})")
    images = owned(images).float()
    if not images.isfinite().all() or images.abs().max() > 1 + 1e-4:
        low, high = images.min().item(), images.max().item()
        raise GddlabError(f"{name} has values from {low:.3g} to {high:.3g}: give images in [-1, 1]")
    return images.clamp(-1, 1)
