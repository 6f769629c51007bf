"""`wrap`: any network as a denoiser that can be probed; compiled networks run eagerly under hooks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.probing.diffusers import UNet2D, is_unet2d
from gddlab.probing.layers import denoiser_of
from gddlab.sampling.samplers import positive

__all__ = ["Denoise", "Denoiser", "eager", "wrap"]

Denoise = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
"""(network, x (B, C, H, W), sigma (B,), one-hot labels (B, label_dim) or None) -> denoised images (B, C, H, W)."""


@dataclass(frozen=True)
class _Card:
    """What a denoiser's card says of its data: a dataset or its name."""

    data: str | ImageDataset | None


class Denoiser(nn.Module):
    """A network that is called as `denoiser(x, sigma, class_labels)`, however it is called itself; made by `wrap`.

    Attributes:
        gddlab_bare: The network itself: layers and parameters keep the names that they have in there.
        img_channels, img_resolution: Shape of an image, channels and pixels; None where it is not known.
        label_dim: Number of classes; 0 for an unconditional network.
        sigma_min, sigma_max: Range of sigma, standard deviation on the scale of images in [-1, 1].
        card: `card.data` is the dataset, or its name, that it is probed with; None where there is none.
    """

    gddlab_bare: nn.Module

    def __init__(
        self,
        model: nn.Module,
        denoise: Denoise,
        *,
        img_channels: int | None,
        img_resolution: int | None,
        label_dim: int,
        sigma_min: float,
        sigma_max: float,
        data: str | ImageDataset | None,
    ):
        super().__init__()
        self.gddlab_bare = model
        self.denoise = denoise
        self.img_channels, self.img_resolution, self.label_dim = img_channels, img_resolution, label_dim
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.card = None if data is None else _Card(data)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Denoises.

        Args:
            x: (B, C, H, W), image plus sigma times noise; float64 stays float64, anything else becomes float32.
            sigma: Scalar, (1,) or (B,), within `sigma_min` and `sigma_max`.
            class_labels: (B, label_dim) or (1, label_dim) one-hot, or None; an unconditional network ignores them.

        Returns:
            (B, C, H, W), the denoised image, in the type of `x`.

        Raises:
            GddlabError: A sigma outside of the range; labels or an answer of the network of another shape.
        """
        x = x if x.dtype == torch.float64 else x.float()
        b = len(x)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1)
        if len(sigma) not in (1, b):
            raise GddlabError(f"sigma is ({len(sigma)},) for {b} images: give one number, or one an image")
        self._check_range(sigma)
        if not self.label_dim:
            class_labels = None
        elif class_labels is not None:
            if class_labels.ndim != 2 or len(class_labels) not in (1, b) or class_labels.shape[1] != self.label_dim:
                shape = tuple(class_labels.shape)
                raise GddlabError(f"class_labels are {shape}: give one-hot rows, ({b}, {self.label_dim})")
            class_labels = class_labels.to(x.device, x.dtype).expand(b, -1)
        out = self.denoise(self.gddlab_bare, x, sigma.expand(b), class_labels)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise GddlabError(f"denoise= gave {found}: return the denoised images, {tuple(x.shape)}")
        return out.to(x.dtype)

    def _check_range(self, sigma: Tensor) -> None:
        low, high = self.sigma_min, self.sigma_max
        if low == 0 and high == math.inf:
            return  # spares an accelerator the wait
        slack = 1e-6  # the ends in float32
        for s in (sigma.min().item(), sigma.max().item()):
            if not low * (1 - slack) <= s <= high * (1 + slack):
                raise GddlabError(f"sigma {s:g}: this network accepts {low:g} to {high:g}, give one of these")


def wrap(
    model: nn.Module,
    denoise: Denoise | None = None,
    *,
    prediction: str | None = None,
    alphas_cumprod: Any = None,
    scheduler: Any = None,
    img_channels: int | None = None,
    img_resolution: int | None = None,
    label_dim: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    data: str | ImageDataset | None = None,
) -> Denoiser:
    """Makes any network a denoiser D(x; sigma) on the scale of images in [-1, 1], as `probe` and its relatives take it.

        wrap(net, lambda net, x, sigma, labels: net(x, sigma.log() / 4), img_channels=3, img_resolution=32)
        wrap(unet, scheduler=pipeline.scheduler)                    # a diffusers UNet2DModel

    Args:
        model: The network; in DistributedDataParallel or compiled if you like.
        denoise: How it is called, see `Denoise`: x is image + sigma * noise, float32 whatever the network's own precision. Not needed for a
            diffusers `UNet2DModel`: see `gddlab.probing.diffusers.UNet2D` for what is done.
        prediction: What a `UNet2DModel` predicts: "epsilon", "v_prediction" or "sample".
        alphas_cumprod: Its schedule, (T,), falling: `scheduler.alphas_cumprod`.
        scheduler: Its diffusers scheduler, which knows both; what is given besides takes precedence.
        img_channels, img_resolution, label_dim: Shape of an image and number of classes; a `UNet2DModel` knows its own. Without a
            shape the network can be probed with images only.
        sigma_min, sigma_max: Range of sigma; others are refused. None means any, for a `UNet2DModel` its schedule's.
        data: Dataset, or its name, that `probe` takes unless told otherwise.

    Raises:
        GddlabError: A network that is called in an unknown way, without `denoise`; something missing, or given that has no use.
    """
    if not isinstance(model, nn.Module):
        raise GddlabError(f"model is a {type(model).__name__}: give an nn.Module")
    for name, value in (("img_channels", img_channels), ("img_resolution", img_resolution), ("label_dim", label_dim)):
        if value is not None and (name != "label_dim" or value != 0):
            positive(name, value)
    low, high = 0.0, math.inf
    if denoise is not None:
        unused = {"prediction": prediction, "alphas_cumprod": alphas_cumprod, "scheduler": scheduler}
        if names := [n for n, value in unused.items() if value is not None]:
            raise GddlabError(f"{names[0]}= has no use with denoise=: give one of them")
        if not callable(denoise):
            raise GddlabError(f"denoise={denoise!r}: give a function of (model, x, sigma, class_labels)")
    else:
        network = denoiser_of(model)
        if not is_unet2d(network):
            raise GddlabError(
                f"how a {type(network).__name__} is called is not known: give denoise=, a function of "
                "(model, x, sigma, class_labels) that returns the denoised image"
            )
        denoise = UNet2D.of(network, prediction=prediction, alphas_cumprod=alphas_cumprod, scheduler=scheduler)
        low, high = denoise.sigma_min, denoise.sigma_max
        img_channels = img_channels or denoise.channels
        img_resolution = img_resolution or denoise.resolution
        label_dim = label_dim or denoise.classes
    sigma_min = low if sigma_min is None else float(sigma_min)
    sigma_max = high if sigma_max is None else float(sigma_max)
    if not low <= sigma_min < sigma_max <= high:
        within = f"{low:g} to {high:g}" if high < math.inf else "0 and above"
        raise GddlabError(f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: give a range within {within}")
    return Denoiser(
        model,
        denoise,
        img_channels=img_channels,
        img_resolution=img_resolution,
        label_dim=label_dim,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        data=data,
    )


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Runs a compiled network, or its compiled parts, as Python inside: compiled code does not call hooks that came later.

    Nothing is compiled anew afterwards, and the compiler's stance before comes back. The stance is the process's: other compiled
    networks run as Python inside, too. Where nothing in `model` is compiled, nothing is changed.
    """
    if not any(_is_compiled(m) for m in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, `module.compile()`, or `torch.compile` of its forward or denoise function; told without importing
    the compiler, which takes a second."""
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    functions = (module.forward, getattr(module, "denoise", None))
    return any(hasattr(f, "_torchdynamo_orig_callable") for f in functions)
