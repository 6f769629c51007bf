"""The student's network: its preconditioning, its steps, and a target noise level for the baselines that need one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gddlab.errors import GddlabError
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN, Coefficients, EDMPrecond, levels_of


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
        self.mid_sigmas = _descending(mid_sigmas, sigma_g, eps)
        if target_time:
            self.model.add_target()

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student's steps: the one it starts from, and `mid_sigmas`."""
        return (self.sigma_g, *self.mid_sigmas)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sd, s = self.sigma_data, sigma - self.eps
        c = super().coefficients(sigma)
        return c._replace(c_skip=sd**2 / (s**2 + sd**2), c_out=s * sd / (sigma**2 + sd**2).sqrt())

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Float[Tensor, "b k"] | None = None,
        target: Tensor | float | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """As `Precond.forward`; `target` is the target noise level, a number, (1,) or (B,), > 0; by default eps.

        Raises:
            GddlabError: As there; a target for a network without target time.
        """
        if self.target_time and target is None:
            target = self.eps
        elif not self.target_time and target is not None:
            raise GddlabError("this student takes no target: omit it, or make it with target_time=True")
        return self._denoise(x, sigma, class_labels, augment_labels, target)

    def jump(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        target: Tensor | float,
        class_labels: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """From noise level t = sigma to s = target on a straight line: (s / t) x + (1 - s / t) g(x; t, s).

        Kim et al. 2023, "Consistency trajectory models", section 3.

        Args:
            x: State at sigma, (B, C, H, W).
            sigma, target: Noise levels, a number, (1,) or (B,), > 0.
            class_labels: One-hot, (B, label_dim).

        Raises:
            GddlabError: A network without target time.
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
        2023, algorithm 1).

        Args:
            z: Standard normal noise, (B, C, H, W).
            class_labels: One-hot, (B, label_dim), or None.
            noise: Standard normal noise of each later step, (B, C, H, W); the first `exit` are used.
            exit: The last step made, from 0 to len(mid_sigmas).

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


def _descending(mid_sigmas: Sequence[float], high: float, low: float) -> tuple[float, ...]:
    try:
        levels = tuple(float(s) for s in mid_sigmas)
    except (TypeError, ValueError):
        raise GddlabError(f"mid_sigmas={mid_sigmas!r}: give a list of noise levels, such as (0.8,)") from None
    if not all(a > b for a, b in itertools.pairwise((high, *levels, low))):
        raise GddlabError(f"mid_sigmas={levels}: give descending noise levels below {high:g} and above {low:g}")
    return levels
