"""Preconditioned denoisers D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, table 1).

EDM's, those that it compares with, and the student's, with its steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gddlab.errors import GddlabError, numbers_in, shown, unknown
from gddlab.nets.denoiser import Denoiser, levels_of
from gddlab.nets.path import Coefficients
from gddlab.nets.unets import UNETS

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
"""EDM's range of noise levels and standard deviation of the data, images in [-1, 1] (Karras et al. 2022, table 1)."""


class Precond(Denoiser):
    """A denoiser D(x; sigma) around a U-Net, `self.model`; subclasses give the four coefficients.

    Args:
        img_resolution, img_channels: Shape of an image, pixels and channels.
        label_dim: Number of classes; 0 for an unconditional network.
        sigma_min, sigma_max: Range of sigma that the network was made for.
        sigma_data: Standard deviation of the data, image scale [-1, 1].
        model_type: "SongUNet" or "DhariwalUNet".
        model_kwargs: Arguments of the U-Net.
    """

    default_unet = "SongUNet"
    outputs_per_channel = 1
    default_target: float | None = None
    """The target noise level of a student that takes one, where none is given."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        *,
        model_type: str | None = None,
        **model_kwargs: Any,
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        model_type = model_type or self.default_unet
        if model_type not in UNETS:
            raise unknown("model_type", model_type, UNETS)
        self.model = UNETS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=self.outputs_per_channel * img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )
        self.init_kwargs: dict[str, Any] = {}
        self.card = None

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at `sigma`, (B, 1, 1, 1)."""
        raise AssertionError("a preconditioning defines its coefficients")

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Float[Tensor, "b k"] | None = None,
        target: Tensor | float | None = None,
        told: Tensor | float | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoises.

        Args:
            x: (B, C, H, W), image plus sigma times noise; float64 stays float64, anything else becomes float32.
            sigma: Scalar, (1,) or (B,), > 0.
            class_labels: (B, label_dim) or (1, label_dim) one-hot; None for no class; ignored if unconditional.
            augment_labels: (B, augment_dim).
            target: Of a student with `target_time`: the target noise level, scalar, (1,) or (B,), > 0; by default eps.
            told: The noise level that the U-Net is told, c_noise, where that is not `sigma`, whose c_in, c_skip and
                c_out remain; scalar, (1,) or (B,), > 0.

        Returns:
            (B, C, H, W), the denoised image.

        Under autocast the U-Net runs in low precision, except its embeddings of sigma and labels, the coefficients and
        the sum.

        Raises:
            GddlabError: Class labels of another shape; weights of less than 32 bits, which autocast serves better; a
                target for a network that takes none.
        """
        if target is None:
            target = self.default_target
        elif self.default_target is None:
            raise GddlabError("this network takes no target: omit it, or make it with target_time=True")
        weight = next(self.model.parameters()).dtype
        if weight.itemsize < 4:
            raise GddlabError(
                f"this network's weights are {str(weight).removeprefix('torch.')}, too coarse for its noise embedding: "
                'use net.float(), and dtype="bfloat16" or torch.autocast to run it in low precision'
            )
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            raise GddlabError(f"x has shape {tuple(x.shape)}: this network takes (B, {self.img_channels}, H, W)")
        x = x if x.dtype == torch.float64 else x.float()
        b = x.shape[0]
        sigma = levels_of(sigma, x)
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        elif not self.label_dim:
            class_labels = None
        if class_labels is not None:
            if class_labels.ndim != 2 or class_labels.shape[1] != self.label_dim or class_labels.shape[0] not in (b, 1):
                raise GddlabError(
                    f"class_labels are {tuple(class_labels.shape)}: give one-hot rows, ({b}, {self.label_dim})"
                )
            class_labels = class_labels.to(x.dtype)
        if augment_labels is not None:
            augment_labels = augment_labels.to(x.dtype)
        c = self.coefficients(sigma)
        c_target = None if target is None else self.coefficients(levels_of(target, x)).c_noise
        c_noise = c.c_noise if told is None else self.coefficients(levels_of(told, x)).c_noise
        f = self.run(c.c_in * x, c_noise, class_labels, augment_labels, c_target)
        return c.c_skip * x + c.c_out * f[:, : self.img_channels].to(x.dtype)

    def run(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        target: Tensor | None,
    ) -> Float[Tensor, "b cout h w"]:
        """F, the network itself: `time` and `target` are c_noise, `x` is scaled by c_in, class labels are one-hot."""
        out: Tensor = self.model(x, time, class_labels, augment_labels, target)
        return out


class EDMPrecond(Precond):
    """EDM (Karras et al. 2022, table 1, last column)."""

    default_unet = "DhariwalUNet"

    def __init__(
        self,
        *args: Any,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sd = self.sigma_data
        norm = (sigma**2 + sd**2).sqrt()
        return Coefficients(sd**2 / norm**2, sigma * sd / norm, 1 / norm, sigma.flatten().log() / 4)


class VPPrecond(Precond):
    """Variance preserving SDE (Song et al. 2021), EDM's table 1, first column."""

    def __init__(
        self,
        *args: Any,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = self.sigma(epsilon_t), self.sigma(1.0)

    def sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def t(self, sigma: Tensor) -> Tensor:
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = (self.M - 1) * self.t(sigma).flatten()
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


class VEPrecond(Precond):
    """Variance exploding SDE (Song et al. 2021), EDM's table 1, second column."""

    def __init__(self, *args: Any, sigma_min: float = 0.02, sigma_max: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, one, (sigma.flatten() / 2).log())


class iDDPMPrecond(Precond):
    """Improved DDPM (Nichol & Dhariwal 2021), EDM's table 1, third column; sigma is rounded to M noise levels."""

    default_unet = "DhariwalUNet"
    outputs_per_channel = 2  # the second half is the variance

    def __init__(self, *args: Any, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        j = torch.arange(M + 1, device="cpu")  # all in float32, as the published networks hold it
        alpha_bar = (0.5 * math.pi * j / M / (C_2 + 1)).sin() ** 2
        ratio = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)
        u = torch.zeros(M + 1, device="cpu")
        for i in range(M, 0, -1):  # EDM's appendix C.3.1
            u[i - 1] = ((u[i] ** 2 + 1) / ratio[i - 1] - 1).sqrt()
        self.register_buffer("u", u)
        self.u: Tensor
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def index(self, sigma: Tensor) -> Tensor:
        u = self.u.to(sigma.device, torch.float32)
        return (sigma.float().reshape(-1, 1) - u).abs().argmin(1).reshape(sigma.shape)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u.to(sigma.device)[self.index(sigma)].to(sigma.dtype)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = (self.M - 1 - self.index(sigma).flatten()).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


class OneStepPrecond(EDMPrecond):
    """The one-step student: a consistency model's coefficients, the identity at sigma = eps.

    Method of GDD; Song et al. 2023, appendix C:
    c_skip = sd^2 / ((sigma - eps)^2 + sd^2); c_out = (sigma - eps) sd / sqrt(sigma^2 + sd^2); the rest as EDM.

    With a target time the network is g(x; sigma, s), the image at the end of the straight line from x at sigma via
    the state at noise level s (Kim et al. 2023). Its U-Net also sees c_noise of s (`map_target0`, `map_target1`, zero
    at first). `jump` gives the state at s.

    Args:
        eps: Lowest noise level.
        sigma_g: Noise level that images are made from.
        target_time: Whether the network takes a target noise level.
        mid_sigmas: Further noise levels of a few-step student, descending between `sigma_g` and `eps`; () for one step.

    Raises:
        GddlabError: `mid_sigmas` do not descend between `sigma_g` and `eps`.
    """

    default_unet = "SongUNet"

    def __init__(
        self,
        *args: Any,
        eps: float = SIGMA_MIN,
        sigma_g: float = SIGMA_MAX,
        target_time: bool = False,
        mid_sigmas: Sequence[float] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.eps, self.sigma_g, self.target_time = eps, sigma_g, target_time
        self.mid_sigmas = descending("mid_sigmas", mid_sigmas, low=eps, high=sigma_g)
        if target_time:
            self.default_target = eps
            self.model.add_target()

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student's steps: the one it starts from, and `mid_sigmas`."""
        return (self.sigma_g, *self.mid_sigmas)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sd, s = self.sigma_data, sigma - self.eps
        c = super().coefficients(sigma)
        return c._replace(c_skip=sd**2 / (s**2 + sd**2), c_out=s * sd / (sigma**2 + sd**2).sqrt())

    def jump(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        target: Tensor | float,
        class_labels: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """From noise level t = sigma to s = target on a straight line: (s / t) x + (1 - s / t) g(x; t, s).

        Kim et al. 2023, "Consistency trajectory models", section 3. Arguments and errors as of `Precond.forward`.
        """
        image = self(x, sigma, class_labels, target=target)
        share = levels_of(target, image) / levels_of(sigma, image)
        return share * x.to(image.dtype) + (1 - share) * image

    def generate(self, z: Float[Tensor, "b c h w"], class_labels: Tensor | None = None) -> Float[Tensor, "b c h w"]:
        """One step from noise to image: G(z) = D(80 z; 80), z ~ N(0, I)."""
        out: Tensor = self(self.sigma_g * z, self.sigma_g, class_labels)
        return out

    def generate_steps(
        self, z: Float[Tensor, "b c h w"], class_labels: Tensor | None, noise: Sequence[Tensor], exit: int
    ) -> Float[Tensor, "b c h w"]:
        """The image after step `exit` of `sigmas`, from the student's own earlier steps, which get no gradient.

        Training at random exits gives each step the inputs it has in sampling (backward simulation; Yin et al. 2024,
        "Improved distribution matching distillation", section 4.5). The steps are those of `multistep` (Song et al.
        2023, algorithm 1). `noise` holds standard normal noise of the later steps, (B, C, H, W); `exit` are used.

        Raises:
            GddlabError: No such step, or too little noise.
        """
        if not 0 <= exit < len(self.sigmas):
            raise GddlabError(
                f"exit={exit} of a student with {len(self.sigmas)} steps: give 0 to {len(self.mid_sigmas)}"
            )
        if len(noise) < exit:
            raise GddlabError(f"exit={exit} with {len(noise)} noise tensors: give one for each step but the first")
        x = self.sigma_g * z
        with torch.no_grad():
            for fresh, (sigma, lower) in zip(noise[:exit], itertools.pairwise(self.sigmas), strict=False):
                x = self(x, sigma, class_labels) + math.sqrt(lower**2 - self.eps**2) * fresh
        out: Tensor = self(x, self.sigmas[exit], class_labels)
        return out


SLACK = 1e-6
"""How far a noise level may lie outside of a range: ends are rounded to float32."""


def check_level(what: str, net: Any, sigma: float) -> None:
    """Refuses a noise level outside of a network's range, which is that of its training where its card says it."""
    card = getattr(net, "card", None)
    low = max(float(getattr(net, "sigma_min", 0.0)), getattr(card, "sigma_min", 0.0))
    high = min(float(getattr(net, "sigma_max", math.inf)), getattr(card, "sigma_max", math.inf))
    if not (0 < sigma < math.inf and low * (1 - SLACK) <= sigma <= high * (1 + SLACK)):
        accepted = f"{low:g} to {high:g}" if math.isfinite(high) else "above 0 and finite"
        raise GddlabError(f"{what}: this network accepts {accepted}")


def descending(name: str, sigmas: Any, *, low: float, high: float = math.inf) -> tuple[float, ...]:
    """Noise levels as numbers; refuses those that do not descend between `high` and `low`, under this name."""
    try:
        levels = tuple(float(s) for s in numbers_in(sigmas))
    except (TypeError, ValueError):
        raise GddlabError(f"{name}={shown(sigmas)}: give a list of noise levels, such as (80.0, 0.8)") from None
    if not all(a > b for a, b in itertools.pairwise((high, *levels, low))):
        below = "" if high == math.inf else f"below {high:g} and "
        raise GddlabError(f"{name}={levels}: give descending noise levels {below}above {low:g}")
    return levels


def edm_weight(sigma: Float[Tensor, "*shape"], sigma_data: float = SIGMA_DATA) -> Float[Tensor, "*shape"]:
    """Weight of the denoising loss at each noise level (Karras et al. 2022, table 1, lambda)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm_loss(
    denoised: Float[Tensor, "b c h w"],
    images: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    sigma_data: float = SIGMA_DATA,
) -> Float[Tensor, " b"]:
    """EDM's weighted denoising loss of each image (Karras et al. 2022, equations 2 and 108).

    The mean over channels and pixels of edm_weight(sigma) (D(images + sigma noise; sigma) - images)^2.
    """
    return edm_weight(sigma, sigma_data) * (denoised - images).square().mean((1, 2, 3))
