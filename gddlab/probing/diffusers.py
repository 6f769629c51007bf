"""Networks of the diffusers library as denoisers; the library itself is not needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown

__all__ = ["PREDICTIONS", "UNet2D", "is_unet2d"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def is_unet2d(model: nn.Module) -> bool:
    """A diffusers `UNet2DModel`, or a subclass."""
    return any(c.__name__ == "UNet2DModel" for c in type(model).__mro__)


@dataclass(frozen=True, eq=False)
class UNet2D:
    """Calls a diffusers `UNet2DModel` as a denoiser D(x; sigma).

    With abar = alphas_cumprod[t], sigma(t) = sqrt((1 - abar) / abar) (Karras et al. 2022, table 1; Song et al. 2021), and the network sees
    x / sqrt(1 + sigma^2) and t. Between the schedule's steps, t is interpolated linearly in log sigma; fractional timesteps are meaningful
    since their embedding is sinusoidal. Learned variances are left out. Clipping and thresholding of a scheduler are not done.

    Attributes:
        prediction: "epsilon", the noise; "v_prediction", alpha noise - sqrt(1 - abar) image, alpha = sqrt(abar) (Salimans & Ho 2022);
            "sample", the image.
        log_sigma: log sigma of each step, (T,) float64, rising, on the CPU. No buffer: `.to(torch.bfloat16)` would round it.
        channels, resolution, classes: Of the network's configuration; resolution None where it does not say, classes 0 where there are none.
    """

    prediction: str
    log_sigma: Tensor
    channels: int
    resolution: int | None
    classes: int

    @classmethod
    def of(cls, network: nn.Module, *, prediction: str | None, alphas_cumprod: Any, scheduler: Any) -> UNet2D:
        """Arguments as for `wrap`; `network` is the `UNet2DModel` itself.

        Raises:
            GddlabError: No prediction or schedule, or wrong ones; a configuration that is called in another way.
        """
        if prediction is None:
            prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if alphas_cumprod is None:
            alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise GddlabError("a UNet2DModel does not know its noise schedule: give alphas_cumprod= or scheduler=")
        if prediction is None:
            raise GddlabError(
                f"a UNet2DModel does not know what it predicts: give prediction=, one of {', '.join(PREDICTIONS)}"
            )
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        config: Any = network.config
        channels = config.in_channels
        if config.time_embedding_type != "positional":
            raise GddlabError(
                f"time_embedding_type={config.time_embedding_type!r} takes no fractional timesteps: give denoise="
            )
        if config.class_embed_type is not None:
            raise GddlabError(f"class_embed_type={config.class_embed_type!r} takes no class ids: give denoise=")
        if config.out_channels not in (channels, 2 * channels):
            raise GddlabError(
                f"out_channels={config.out_channels} with in_channels={channels}: neither an image nor an image and a "
                "variance, give denoise="
            )
        return cls(
            prediction=prediction,
            log_sigma=_log_sigma(alphas_cumprod),
            channels=channels,
            resolution=_side(config.sample_size),
            classes=config.num_class_embeds or 0,
        )

    @property
    def sigma_min(self) -> float:
        return float(self.log_sigma[0].exp())

    @property
    def sigma_max(self) -> float:
        return float(self.log_sigma[-1].exp())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Fractional steps of the schedule, float32, on the device of `sigma`.  (B,) -> (B,)"""
        log = sigma.detach().cpu().double().log()  # MPS has no float64
        step = torch.searchsorted(self.log_sigma, log).clamp(1, len(self.log_sigma) - 1)
        below, above = self.log_sigma[step - 1], self.log_sigma[step]
        t = step - 1 + ((log - below) / (above - below)).clamp(0, 1)
        return t.to(sigma.device, torch.float32)

    def __call__(self, model: nn.Module, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """Denoised images; arguments as for `Denoise`."""
        s = sigma[:, None, None, None]  # (B, 1, 1, 1)
        alpha = (1 + s**2).rsqrt()
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        ids = self._class_ids(class_labels)
        out = model((alpha * x).to(dtype), self.timestep(sigma), class_labels=ids, return_dict=False)[0]
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
            raise GddlabError("class_labels hold rows that are not one-hot: this network takes one class an image")
        return ids


def _side(sample_size: Any) -> int | None:
    """Pixels of a side."""
    sides = {int(s) for s in sample_size} if isinstance(sample_size, list | tuple) else {sample_size}
    if len(sides) > 1:
        raise GddlabError(
            f"sample_size={tuple(sample_size)}: images here are square, give denoise= and img_resolution="
        )
    return sides.pop()


def _log_sigma(alphas_cumprod: Any) -> Tensor:
    """log sqrt((1 - abar) / abar), rising, (T,) float64; a last step of pure noise (abar = 0) has no sigma and is left out."""
    try:
        abar = torch.as_tensor(alphas_cumprod).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise GddlabError(f"alphas_cumprod={alphas_cumprod!r}: give numbers, scheduler.alphas_cumprod") from None
    if abar.ndim == 1 and len(abar) and abar[-1] == 0:
        abar = abar[:-1]
    falling = abar.ndim == 1 and len(abar) > 1 and bool((abar.diff() < 0).all() and abar[0] < 1 and abar[-1] > 0)
    if not falling:
        ends = f"{float(abar.flatten()[0]):g} ... {float(abar.flatten()[-1]):g}" if abar.numel() else "empty"
        raise GddlabError(
            f"alphas_cumprod is {tuple(abar.shape)}, {ends}: give two or more numbers that fall between 1 and 0"
        )
    return ((1 - abar) / abar).sqrt().log()
