"""Linear measurements of images, with their adjoints: known pixels, fewer pixels, blur, grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from gddlab.editing.search import owned
from gddlab.errors import GddlabError, unknown, validated
from gddlab.probing.reductions import double

ADJOINT_ERROR = 1e-4
"""Relative error of the dot-product test above which an adjoint is refused."""
SOLVED, ITERATIONS = 1e-6, 50
"""Where conjugate gradients end: the gradient over the first one, and how many there are at most."""
IN_RANGE, TURNS = 1e-5, 30
"""How far out of [-1, 1] an image may be; how often one is brought into range and to its measurement in turn."""


class Operator:
    """A linear measurement y = A x of images.

    Args:
        apply: x, float (B, C, H, W), to y, (B, ...); differentiable. It gets a copy, and runs without autocast.
        adjoint: y to A^T y, of the shape of x: spreads a measurement back over the pixels that it is of. Likewise.
        name: For tables.
        exact: Whether results are brought to measure as given, as far as images in [-1, 1] can. Noise in a measurement
            would then be in the results, and more of it where A damps much, as a blur does.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        name: str = "operator",
        *,
        exact: bool = False,
    ):
        self.apply, self.adjoint, self.name, self.exact = _alone(apply), _alone(adjoint), name, exact

    def __repr__(self) -> str:
        return f"Operator({self.name!r})"

    def at(self, rows: Tensor) -> Operator:
        """The operator of some of the images; most treat all alike."""
        return self

    def check(self, shape: Sequence[int], device: torch.device | str = "cpu") -> tuple[int, ...]:
        """The dot-product test: <A x, y> = <x, A^T y> for two random images and measurements.

        Returns:
            The shape of the measurement of one image.

        Raises:
            GddlabError: They differ by more than 1e-4 of |A x| |y|, or shapes do not fit.
        """
        draw = torch.Generator().manual_seed(0)
        x = torch.randn((2, *shape), generator=draw).to(device)
        try:
            with torch.enable_grad():
                ax = self.apply(x.clone().requires_grad_())
                first = self.apply(x[:1])
            y = torch.randn(ax.shape, generator=draw).to(device)
        except Exception as e:  # a user's function may raise anything
            raise GddlabError(f"{self.name!r} does not take images {tuple(x.shape)}: {e}") from None
        if not ax.is_floating_point() or ax.ndim < 2 or len(ax) != 2:
            raise GddlabError(f"{self.name!r} gives {ax.dtype} {tuple(ax.shape)} of 2 images: give floats (2, ...)")
        try:
            aty = self.adjoint(y)
            fits = aty.shape == x.shape
        except Exception as e:
            raise GddlabError(f"the adjoint of {self.name!r} does not take {tuple(y.shape)}: {e}") from None
        if not fits:
            raise GddlabError(f"the adjoint of {self.name!r} gives {tuple(aty.shape)}: give {tuple(x.shape)}")
        if not ax.requires_grad:
            raise GddlabError(f"{self.name!r} has no gradient: build it of differentiable operations of torch")
        ax, aty, first = ax.detach(), aty.detach(), first.detach()
        inside, outside = (ax.double() * y.double()).sum().item(), (x.double() * aty.double()).sum().item()
        size = ax.double().norm().item() * y.double().norm().item()
        if not math.isfinite(size) or size == 0:
            raise GddlabError(f"{self.name!r} measures nothing: A x has length {ax.norm().item():g}")
        if first.shape != ax[:1].shape or (first - ax[:1]).norm() > ADJOINT_ERROR * ax[:1].norm():
            raise GddlabError(f"{self.name!r} measures an image otherwise beside another: treat each row alone")
        if not abs(inside - outside) <= ADJOINT_ERROR * size:
            raise GddlabError(
                f"the adjoint of {self.name!r} is none: <A x, y> = {inside:.5g}, <x, A^T y> = {outside:.5g}; give A^T"
            )
        return tuple(ax.shape[1:])

    def error(self, x: Float[Tensor, "b c h w"], y: Tensor) -> Float[Tensor, " b"]:
        """Mean square of A x - y over what was measured."""
        return (self.apply(x) - y).square().flatten(1).mean(1)

    def put_back(self, x: Float[Tensor, "b c h w"], y: Tensor) -> Float[Tensor, "b c h w"]:
        """The image nearest to x that measures as y, or as nearly as any: x + A^+ (y - A x).

        By conjugate gradients on the least squares, whose residual cannot grow (CGLS; Hestenes & Stiefel 1952), so that
        measurements may depend on each other or contradict themselves.
        """
        change, residual = torch.zeros_like(x), y - self.apply(x)
        p = s = self.adjoint(residual)
        left = first = _square(s)
        for _ in range(ITERATIONS):
            q = self.apply(p)
            going = (left > SOLVED**2 * first) & (_square(q) > 0)
            if not going.any():
                break
            step = torch.where(going, left / _square(q), 0.0)
            change, residual = change + _each(step, p) * p, residual - _each(step, q) * q
            s = self.adjoint(residual)
            before, left = left, torch.where(going, _square(s), 0.0)
            p = s + _each(torch.where(going, left / before, 0.0), p) * p
        return x + change

    def agreeing(self, x: Float[Tensor, "b c h w"], y: Tensor) -> Float[Tensor, "b c h w"]:
        """An image in [-1, 1] near x that measures as y, by projections onto the one and the other in turn."""
        for _ in range(TURNS):
            x = self.put_back(x, y)
            if x.abs().max() <= 1 + IN_RANGE:
                break
            x = x.clamp(-1, 1)
        return x.clamp(-1, 1)


def _alone(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A user's function on a copy, since it may write into what it is given, and in its own precision."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x.clone())

    return call


def _square(x: Tensor) -> Tensor:
    """Squared length of each row, (B,); in double precision, for an operator of any scale."""
    return double(x).square().flatten(1).sum(1)


def _each(row: Tensor, of: Tensor) -> Tensor:
    """One number per row, to multiply rows of `of` with."""
    return row.to(of).view(-1, *[1] * (of.ndim - 1))


class Pixels(Operator):
    """Some pixels of each image are known; `keep` is bool, (B, 1 or C, H, W). Exact to the bit."""

    def __init__(self, keep: Tensor):
        super().__init__(self._masked, self._masked, "pixels", exact=True)
        self.keep = keep

    def _masked(self, x: Tensor) -> Tensor:
        return x * self.keep.to(x)  # unknown pixels measure as 0

    def at(self, rows: Tensor) -> Pixels:
        return Pixels(self.keep[rows.to(self.keep.device)] if len(self.keep) > 1 else self.keep)

    def check(self, shape: Sequence[int], device: torch.device | str = "cpu") -> tuple[int, ...]:
        return tuple(shape)  # its own adjoint; the mask has a row for each image, not for two random ones

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        keep = self.keep.to(x.device).expand_as(x).flatten(1)
        return ((x - y).flatten(1) * keep).square().sum(1) / keep.sum(1)

    def put_back(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.keep.to(x.device), y, x)


@validated
def downscale(factor: PositiveInt) -> Operator:
    """Means of squares of factor x factor pixels: super-resolution takes the way back. Exact."""

    def apply(x: Tensor) -> Tensor:
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise GddlabError(f"downscale {factor} of images {tuple(x.shape[2:])}: give a factor of both sides")
        return functional.avg_pool2d(x, factor)

    def adjoint(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2) / factor**2

    return Operator(apply, adjoint, f"downscale {factor}", exact=True)


@validated
def blur(std: Annotated[float, Field(gt=0, le=1000)]) -> Operator:
    """Gaussian blur of standard deviation `std`, pixels; black outside of the image."""
    half = math.ceil(3 * std)
    line = torch.exp(-0.5 * (torch.arange(-half, half + 1) / std) ** 2)
    line = line / line.sum()

    def apply(x: Tensor) -> Tensor:
        kernel = line.to(x).repeat(x.shape[1], 1, 1, 1)  # (C, 1, 1, K), symmetric: its own adjoint
        x = functional.conv2d(x, kernel, padding=(0, half), groups=x.shape[1])
        return functional.conv2d(x, kernel.transpose(-1, -2), padding=(half, 0), groups=x.shape[1])

    return Operator(apply, apply, f"blur {std:g}")


@validated
def greyscale(channels: PositiveInt = 3) -> Operator:
    """The mean of the channels: colouring takes the way back. Exact."""

    def apply(x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def adjoint(y: Tensor) -> Tensor:
        return y.expand(-1, channels, -1, -1) / channels

    return Operator(apply, adjoint, "greyscale", exact=True)


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "top": lambda y, x: y < 0.5,
    "bottom": lambda y, x: y >= 0.5,
    "left": lambda y, x: x < 0.5,
    "right": lambda y, x: x >= 0.5,
    "border": lambda y, x: torch.maximum((y - 0.5).abs(), (x - 0.5).abs()) > 0.25,
}
"""Masks by name: which pixels are known, from their places between 0 (top, left) and 1."""


def check_keep(keep: Any, n: int, shape: Sequence[int]) -> Tensor:
    """A mask of known pixels as bool (1 or n, 1 or C, H, W), from a tensor or one of the names of `KEPT`.

    Raises:
        GddlabError: An unknown name; another shape or other values than 0 and 1; an image of which nothing is known or
            nothing missing.
    """
    c, h, w = shape
    if isinstance(keep, str):
        if keep not in KEPT:
            raise unknown("keep", keep, KEPT)
        keep = KEPT[keep]((torch.arange(h)[:, None] + 0.5) / h, (torch.arange(w)[None] + 0.5) / w).expand(1, 1, h, w)
    if not isinstance(keep, Tensor):
        raise GddlabError(
            f"keep is a {type(keep).__name__}: give a tensor, True or 1 where a pixel is known, or a name"
        )
    mask = owned(keep).cpu()
    mask = mask[None, None] if mask.ndim == 2 else mask
    if mask.ndim != 4 or mask.shape[0] not in (1, n) or mask.shape[1] not in (1, c) or tuple(mask.shape[2:]) != (h, w):
        raise GddlabError(
            f"keep is {tuple(keep.shape)}: give ({h}, {w}), ({n}, 1, {h}, {w}) or ({n}, {c}, {h}, {w}) for {n} images"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise GddlabError("keep has other values than 0 and 1: give a mask, 1 where a pixel is known")
    known = mask.bool().flatten(1)
    for what, found in (("known", known.any(1)), ("missing", (~known).any(1))):
        if not found.all():
            raise GddlabError(f"nothing is {what} of image {int((~found).nonzero()[0])}: give another keep")
    return mask.bool()
