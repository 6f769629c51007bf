"""`wrap`: any network as a denoiser that can be probed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, SkipValidation
from torch import Tensor, nn

from gddlab.errors import GddlabError, check_takes, shown, unknown, validated
from gddlab.nets.precond import levels_of
from gddlab.probing.inputs import Data
from gddlab.probing.layers import denoiser_of

Prediction = Literal["epsilon", "v_prediction", "sample"]


class UNet2D:
    """Calls a diffusers `UNet2DModel` as a denoiser D(x; sigma).

    With abar = alphas_cumprod[t], sigma(t) = sqrt((1 - abar) / abar) (Karras et al. 2022, table 1; Song et al. 2021),
    and the network sees x / sqrt(1 + sigma^2) and t. Between the schedule's steps, t is interpolated linearly in log
    sigma; fractional timesteps are meaningful since their embedding is sinusoidal. Learned variances are ignored;
    clipping and thresholding of a scheduler are not done.

    Args:
        network: The `UNet2DModel` itself.
        prediction: "epsilon", the noise; "v_prediction", alpha noise - sqrt(1 - abar) image, alpha = sqrt(abar)
            (Salimans & Ho 2022); "sample", the image.
        alphas_cumprod, scheduler: As for `wrap`.

    Attributes:
        log_sigma: log sigma of each step, (T,) float64, rising, on the CPU. No buffer: `.to(torch.bfloat16)` would
            round it.
        channels, resolution, classes: From the network's configuration; resolution is None where it does not say,
            classes 0 where there are none.

    Raises:
        GddlabError: No prediction or schedule, or wrong ones; a configuration that must be called in another way.
    """

    def __init__(self, network: nn.Module, *, prediction: str | None, alphas_cumprod: Any, scheduler: Any):
        if prediction is None:
            prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if alphas_cumprod is None:
            alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise GddlabError("a UNet2DModel does not know its noise schedule: give alphas_cumprod= or scheduler=")
        if prediction is None:
            raise GddlabError(
                "a UNet2DModel does not know what it predicts: give prediction=, one of "
                f"{', '.join(get_args(Prediction))}"
            )
        if prediction not in get_args(Prediction):  # a scheduler may name another
            raise unknown("prediction", prediction, get_args(Prediction))
        config: Any = network.config
        self.prediction, self.channels, self.classes = prediction, config.in_channels, config.num_class_embeds or 0
        if config.time_embedding_type != "positional":
            raise GddlabError(
                f"time_embedding_type={config.time_embedding_type!r} takes no fractional timesteps: give denoise="
            )
        if config.class_embed_type is not None:
            raise GddlabError(f"class_embed_type={config.class_embed_type!r} takes no class ids: give denoise=")
        if config.out_channels not in (self.channels, 2 * self.channels):
            raise GddlabError(
                f"out_channels={config.out_channels} with in_channels={self.channels}: neither an image nor an image "
                "and a variance, give denoise="
            )
        sides = np.unique(config.sample_size).tolist() if config.sample_size else [None]
        if len(sides) > 1:
            raise GddlabError(
                f"sample_size={tuple(config.sample_size)}: images here are square, give denoise= and img_resolution="
            )
        self.resolution: int | None = sides[0]
        self.log_sigma = _log_sigma(alphas_cumprod)
        self.sigma_min, self.sigma_max = (float(self.log_sigma[i].exp()) for i in (0, -1))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Fractional steps of the schedule, float32, on the device of `sigma`.  (B,) -> (B,)"""
        log = sigma.detach().cpu().double().log()  # MPS has no float64
        step = torch.searchsorted(self.log_sigma, log).clamp(1, len(self.log_sigma) - 1)
        below, above = self.log_sigma[step - 1], self.log_sigma[step]
        t = step - 1 + ((log - below) / (above - below)).clamp(0, 1)
        return t.to(sigma.device, torch.float32)

    def __call__(self, model: nn.Module, x: Tensor, sigma: Tensor, class_labels: Tensor | None, told: Tensor) -> Tensor:
        """Denoised images; arguments as for `Denoise`."""
        s = sigma[:, None, None, None]  # (B, 1, 1, 1)
        alpha = (1 + s**2).rsqrt()
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        ids = self._class_ids(class_labels)
        out = model((alpha * x).to(dtype), self.timestep(told), class_labels=ids, return_dict=False)[0]
        f = out[:, : self.channels].to(x.dtype)
        if self.prediction == "epsilon":
            return x - s * f
        if self.prediction == "v_prediction":
            return alpha**2 * x - s * alpha * f
        return f

    def _class_ids(self, class_labels: Tensor | None) -> Tensor | None:
        if not self.classes:
            return None
        if class_labels is None:
            raise GddlabError(f"this network has {self.classes} classes and none for no class: give class_labels")
        ids = class_labels.argmax(1)
        if not torch.equal(nn.functional.one_hot(ids, class_labels.shape[1]).to(class_labels.dtype), class_labels):
            raise GddlabError("class_labels hold rows that are not one-hot: this network takes one class per image")
        return ids


def _log_sigma(alphas_cumprod: Any) -> Tensor:
    """log sqrt((1 - abar) / abar), rising, (T,) float64; a last step with abar = 0 has no sigma and is dropped."""
    try:
        abar = torch.as_tensor(alphas_cumprod).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise GddlabError(f"alphas_cumprod={shown(alphas_cumprod)}: give numbers, scheduler.alphas_cumprod") from None
    if abar.ndim == 1 and len(abar) and abar[-1] == 0:
        abar = abar[:-1]
    falling = abar.ndim == 1 and len(abar) > 1 and bool((abar.diff() < 0).all() and abar[0] < 1 and abar[-1] > 0)
    if not falling:
        ends = f"{float(abar.flatten()[0]):g} ... {float(abar.flatten()[-1]):g}" if abar.numel() else "empty"
        raise GddlabError(
            f"alphas_cumprod is {tuple(abar.shape)}, {ends}: give two or more numbers that fall between 1 and 0"
        )
    return ((1 - abar) / abar).sqrt().log()


Denoise = SkipValidation[Callable[..., Tensor]]
"""(network, x (B, C, H, W), sigma (B,), one-hot labels (B, label_dim) or None) -> denoised images (B, C, H, W).

A function that has an argument `told` also gets the noise level that the network is to be told, (B,): sigma itself,
except where `probe(told=...)` crosses the two.
"""


class Denoiser(nn.Module):
    """A network that is called as `denoiser(x, sigma, class_labels)`, whatever its own signature; made by `wrap`.

    Attributes:
        gddlab_bare: The network itself, whose names of layers and parameters are kept.
        img_channels, img_resolution: Shape of an image, channels and pixels; None where it is not known.
        label_dim: Number of classes; 0 for an unconditional network.
        sigma_min, sigma_max: Range of sigma, standard deviation on the scale of images in [-1, 1].
        card: `card.data` is the dataset, or its name, that it is probed with; None where there is none.
    """

    gddlab_bare: nn.Module

    def __init__(
        self, model: nn.Module, denoise: Denoise, shape: tuple[Any, Any, int], sigmas: tuple[float, float], data: Data
    ):
        super().__init__()
        self.gddlab_bare = model
        self.denoise = denoise
        self._takes_told = _takes_told(denoise)
        self.img_channels, self.img_resolution, self.label_dim = shape
        self.sigma_min, self.sigma_max = sigmas
        self.card = None if data is None else SimpleNamespace(data=data)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        told: Tensor | float | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoises.

        Args:
            x: Image plus sigma times noise; float64 stays float64, anything else becomes float32.
            sigma: Scalar, (1,) or (B,), within `sigma_min` and `sigma_max`.
            class_labels: (B, label_dim) or (1, label_dim) one-hot, or None; an unconditional network ignores them.
            told: The noise level that the network is told, where that is not `sigma`; scalar, (1,) or (B,).

        Returns:
            The denoised image, in the type of `x`.

        Raises:
            GddlabError: A sigma outside of the range; labels or an answer of the network of another shape; `told` for a
                `denoise` without that argument.
        """
        if told is not None and not self._takes_told:
            raise GddlabError(
                "told= is for a network that can be told another noise level than its input's: give wrap a denoise= "
                "with an argument told, a function of (model, x, sigma, class_labels, told)"
            )
        x = x if x.dtype == torch.float64 else x.float()
        b = len(x)
        sigma = levels_of(sigma, x).flatten()
        self._check_range(sigma)
        if not self.label_dim:
            class_labels = None
        elif class_labels is not None:
            if class_labels.ndim != 2 or len(class_labels) not in (1, b) or class_labels.shape[1] != self.label_dim:
                shape = tuple(class_labels.shape)
                raise GddlabError(f"class_labels are {shape}: give one-hot rows, ({b}, {self.label_dim})")
            class_labels = class_labels.to(x.device, x.dtype).expand(b, -1)
        extra: dict[str, Tensor] = {}
        if self._takes_told:
            extra["told"] = sigma if told is None else levels_of(told, x).flatten()
            self._check_range(extra["told"])
        out = self.denoise(self.gddlab_bare, x, sigma, class_labels, **extra)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise GddlabError(f"denoise= gave {found}: return the denoised images, {tuple(x.shape)}")
        return out.to(x.dtype)

    def _check_range(self, sigma: Tensor) -> None:
        low, high = self.sigma_min, self.sigma_max
        if low == 0 and high == math.inf:
            return  # without waiting for an accelerator
        slack = 1e-6  # the ends, rounded to float32
        for s in (sigma.min().item(), sigma.max().item()):
            if not low * (1 - slack) <= s <= high * (1 + slack):
                raise GddlabError(f"sigma {s:g}: this network accepts {low:g} to {high:g}, give one of these")


def _takes_told(denoise: Callable[..., Any]) -> bool:
    try:
        return "told" in inspect.signature(denoise).parameters
    except ValueError:  # one that is built in, without a signature
        return False


@validated
def wrap(
    model: Any,
    denoise: Denoise | None = None,
    *,
    prediction: Prediction | None = None,
    alphas_cumprod: Any = None,
    scheduler: Any = None,
    img_channels: PositiveInt | None = None,
    img_resolution: PositiveInt | None = None,
    label_dim: Annotated[int, Field(ge=0)] = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    data: Data = None,
) -> Denoiser:
    """Makes any network a denoiser D(x; sigma) on the scale of images in [-1, 1], as `probe` and the like take it.

        wrap(net, lambda net, x, sigma, labels: net(x, sigma.log() / 4), img_channels=3, img_resolution=32)
        wrap(unet, scheduler=pipeline.scheduler)                    # a diffusers UNet2DModel

    Args:
        model: The network; also in DistributedDataParallel or compiled.
        denoise: How it is called, see `Denoise`: x is image + sigma * noise, float32 whatever the network's own
            precision. Not needed for a diffusers `UNet2DModel`, which is called as `gddlab.probing.wrap.UNet2D` says.
        prediction: What a `UNet2DModel` predicts: "epsilon", "v_prediction" or "sample".
        alphas_cumprod: Its schedule, (T,), falling: `scheduler.alphas_cumprod`.
        scheduler: Its diffusers scheduler, which knows both; `prediction` and `alphas_cumprod` take precedence.
        img_channels, img_resolution, label_dim: Shape of an image and number of classes; a `UNet2DModel` knows its own.
            Without a shape the network can be probed with images only.
        sigma_min, sigma_max: Range of sigma; others are refused. None means any, for a `UNet2DModel` its schedule's.
        data: Dataset, or its name, that `probe` takes by default.

    Raises:
        GddlabError: No `denoise` for a network that is no `UNet2DModel`; an argument is missing, or has no use.
    """
    network, low, high = denoiser_of(model), 0.0, math.inf
    if denoise is not None:
        unused = {"prediction": prediction, "alphas_cumprod": alphas_cumprod, "scheduler": scheduler}
        if names := [n for n, value in unused.items() if value is not None]:
            raise GddlabError(f"{names[0]}= has no use with denoise=: give one of them")
        if not callable(denoise):
            raise GddlabError(f"denoise={shown(denoise)}: give a function of (model, x, sigma, class_labels)")
        told = ("told",) if _takes_told(denoise) else ()
        check_takes("denoise", denoise, "model", "x", "sigma", "class_labels", *told)
    else:
        if not any(c.__name__ == "UNet2DModel" for c in type(network).__mro__):
            raise GddlabError(
                f"how a {type(network).__name__} is called is not known: give denoise=, a function of "
                "(model, x, sigma, class_labels) that returns the denoised image"
            )
        denoise = UNet2D(network, prediction=prediction, alphas_cumprod=alphas_cumprod, scheduler=scheduler)
        low, high = denoise.sigma_min, denoise.sigma_max
        img_channels = img_channels or denoise.channels
        img_resolution = img_resolution or denoise.resolution
        label_dim = label_dim or denoise.classes
    sigma_min = low if sigma_min is None else sigma_min
    sigma_max = high if sigma_max is None else sigma_max
    if not low <= sigma_min < sigma_max <= high:
        within = f"{low:g} to {high:g}" if high < math.inf else "0 and above"
        raise GddlabError(f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: give a range within {within}")
    shape = (img_channels, img_resolution, label_dim)
    return Denoiser(model, denoise, shape, (sigma_min, sigma_max), data)
