"""`Path`: one noise coordinate, sigma, for networks that know noise as a time step, a share or a standard deviation."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gddlab.errors import GddlabError, shown, unknown

PURE = 1e4
"""The noise level that stands for noise without an image, where a path ends in that: sigma itself would be infinite.

At and above it a network sees x / sigma and its last time step.
"""

Kind = Literal["vp", "flow", "edm"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Clock = Literal["index", "share", "log"]


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in: (B, 1, 1, 1); c_noise: (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class Path:
    """How a network's input, time and output follow from x = image + sigma * noise: made by `vp`, `flow`, `edm`, `of`.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, equation 7), with the coefficients of

        vp    x_t = alpha image + sqrt(1 - alpha^2) noise, alpha^2 = abar_t, sigma^2 = (1 - abar_t) / abar_t (Song et
              al. 2021); F is the noise ("epsilon"), alpha noise - sqrt(1 - alpha^2) image ("v_prediction"; Salimans &
              Ho 2022) or the image ("sample")
        flow  x_t = (1 - t) image + t noise, sigma = t / (1 - t); F is noise - image (Lipman et al. 2023)
        edm   c_in outside of the network, time ln(sigma) / 4 (Karras et al. 2022, table 1)

    Attributes:
        kind, prediction: See above.
        alphas_cumprod: abar of each step of a vp path, falling.
        clock: Unit of the network's time: "index" of the step, linear in ln sigma between two; the "share" of noise t;
            or "log", ln(sigma) / 4.
        time_scale: Factor of the share: 1000 where the network takes 0 to 1000.
        reversed: Whether time and output run from noise to image: 1 - t, image - noise.
        sigma_data: Standard deviation of the data of an edm path.
    """

    kind: Kind
    prediction: Prediction
    alphas_cumprod: tuple[float, ...] = ()
    clock: Clock = "index"
    time_scale: float = 1.0
    reversed: bool = False
    sigma_data: float = 0.5

    @classmethod
    def vp(cls, alphas_cumprod: Any, prediction: str = "epsilon", *, clock: Clock = "index") -> Path:
        """Of a variance preserving schedule, `scheduler.alphas_cumprod`; a last abar of 0 is pure noise.

        Raises:
            GddlabError: No numbers that fall between 1 and 0; an unknown prediction, or one that says nothing of the
                image where abar is 0.
        """
        if prediction not in (known := ("epsilon", "v_prediction", "sample")):
            raise unknown("prediction", prediction, known)
        try:
            abar = torch.as_tensor(alphas_cumprod, device="cpu").detach().double()
        except (TypeError, ValueError, RuntimeError):
            raise GddlabError(
                f"alphas_cumprod={shown(alphas_cumprod)}: give numbers, scheduler.alphas_cumprod"
            ) from None
        falling = abar.ndim == 1 and len(abar) > 1 and bool((abar.diff() < 0).all() and abar[0] < 1 and abar[-1] >= 0)
        if not falling:
            ends = f"{float(abar.flatten()[0]):g} ... {float(abar.flatten()[-1]):g}" if abar.numel() else "empty"
            raise GddlabError(
                f"alphas_cumprod is {tuple(abar.shape)}, {ends}: give two or more numbers that fall between 1 and 0"
            )
        if prediction == "epsilon" and abar[-1] == 0:
            abar = abar[:-1]  # noise without an image says nothing of one
        return cls("vp", prediction, tuple(abar.tolist()), clock)  # type: ignore[arg-type]

    @classmethod
    def flow(cls, time_scale: float = 1.0, *, reversed: bool = False) -> Path:
        """Of flow matching; `time_scale` is the network's time at pure noise, 1000 in most of diffusers."""
        return cls("flow", "flow", clock="share", time_scale=time_scale, reversed=reversed)

    @classmethod
    def edm(cls, sigma_data: float = 0.5, prediction: str = "epsilon") -> Path:
        """Of EDM's preconditioning; with "v_prediction", as in diffusers' schedulers, the sign of c_out is reversed."""
        if prediction not in (known := ("epsilon", "v_prediction")):
            raise unknown("prediction", prediction, known)
        return cls("edm", prediction, clock="log", sigma_data=sigma_data)  # type: ignore[arg-type]

    @classmethod
    def of(cls, scheduler: Any, prediction: str | None = None) -> Path:
        """The path that a diffusers scheduler walks along; where it stops on the way plays no role.

        `prediction` takes precedence over the scheduler's own.

        Raises:
            GddlabError: A scheduler of another kind, or a prediction that its schedule does not allow.
        """
        config, name = getattr(scheduler, "config", None), type(scheduler).__name__
        own = getattr(config, "prediction_type", None)
        said = prediction or own
        flow = "FlowMatch" in name or getattr(config, "use_flow_sigmas", False) or own == "flow_prediction"
        if said == "flow_prediction" and not flow:
            raise GddlabError(
                f"prediction={said!r}: a {name} does not walk along a flow, give path=gddlab.Path.flow(1000.0)"
            )
        if flow:  # asked first: some of them have betas that they do not use
            if said not in (None, "flow", "flow_prediction"):
                raise GddlabError(f"prediction={said!r}: a {name} along a flow predicts noise - image, omit prediction")
            return cls.flow(float(getattr(config, "num_train_timesteps", 1000)))
        if name.startswith("EDM"):
            return cls.edm(getattr(config, "sigma_data", 0.5), said or "epsilon")
        abar = getattr(scheduler, "alphas_cumprod", None)
        odd = [w for w in ("SCM", "KarrasVe", "ScoreSde", "CMStochastic", "VQ") if w in name]
        if abar is None or odd:
            raise GddlabError(
                f"the schedule of a {name} is not known here: give path=, such as gddlab.Path.flow(1000.0), or denoise="
            )
        continuous = getattr(config, "timestep_type", None) == "continuous" and said == "v_prediction"
        return cls.vp(abar, said or "epsilon", clock="log" if continuous else "index")

    @property
    def ends_in_noise(self) -> bool:
        """Whether its last step is noise without an image, `PURE`."""
        return self.kind == "flow" or (self.kind == "vp" and self.alphas_cumprod[-1] == 0)

    @property
    def sigma_min(self) -> float:
        return self._sigmas[0].exp().item() if self.kind == "vp" and self.clock == "index" else 0.0

    @property
    def sigma_max(self) -> float:
        if self.ends_in_noise:
            return PURE
        return self._sigmas[-1].exp().item() if self.kind == "vp" and self.clock == "index" else math.inf

    @functools.cached_property
    def _sigmas(self) -> Float[Tensor, " t"]:
        """ln sigma of each step that has an image, rising, float64."""
        abar = torch.tensor([a for a in self.alphas_cumprod if a > 0], dtype=torch.float64, device="cpu")
        log = ((1 - abar) / abar).sqrt().log()
        return log[log < math.log(PURE)] if self.ends_in_noise else log  # what is beyond would be taken for pure noise

    def time(self, sigma: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The network's time at sigma, float32: bfloat16 would merge steps."""
        if self.clock == "log":
            return (sigma.double().log() / 4 if sigma.device.type != "mps" else sigma.log() / 4).float()
        pure = sigma >= PURE
        if self.clock == "share":
            t = torch.where(pure, torch.ones_like(sigma), sigma / (1 + sigma))
            return (self.time_scale * (1 - t if self.reversed else t)).float()
        steps, log = self._sigmas, sigma.detach().cpu().double().log()  # MPS has no float64
        step = torch.searchsorted(steps, log).clamp(1, len(steps) - 1)
        below, above = steps[step - 1], steps[step]
        t = step - 1 + ((log - below) / (above - below)).clamp(0, 1)
        t = t.to(sigma.device, torch.float32)
        return torch.where(pure, float(len(self.alphas_cumprod) - 1), t) if self.ends_in_noise else t

    def sigma(self, t: float) -> float:
        """The noise level at the network's time t; `PURE` at the end of a path that ends in noise.

        Raises:
            GddlabError: A time outside of the path.
        """
        t = _number("t", t)
        if self.clock == "log":
            return math.exp(min(4 * t, 700.0))  # beyond is infinite, and refused where noise levels are checked
        if self.clock == "share":
            share = t / self.time_scale
            share = 1 - share if self.reversed else share
            if not 0 < share <= 1:
                raise GddlabError(f"t={t:g}: this network takes times within 0 and {self.time_scale:g}")
            return min(PURE, share / (1 - share)) if share < 1 else PURE
        steps, last = self._sigmas, len(self.alphas_cumprod) - 1
        if not 0 <= t <= last:
            raise GddlabError(f"t={t:g}: this network takes steps 0 to {last}")
        if t > len(steps) - 1:
            if t == last:
                return PURE
            raise GddlabError(f"t={t:g}: between step {len(steps) - 1} and pure noise there is none, give one of these")
        i = min(int(t), len(steps) - 2)
        return math.exp(steps[i].item() + (t - i) * (steps[i + 1] - steps[i]).item())

    def coefficients(self, sigma: Float[Tensor, "b 1 1 1"]) -> Coefficients:
        """Coefficients at `sigma`, in its precision."""
        time = self.time(sigma.flatten())
        if self.kind == "edm":
            sd, norm = self.sigma_data, (sigma**2 + self.sigma_data**2).sqrt()
            sign = -1.0 if self.prediction == "v_prediction" else 1.0
            return Coefficients(sd**2 / norm**2, sign * sigma * sd / norm, 1 / norm, time)
        pure = sigma >= PURE if self.ends_in_noise else torch.zeros_like(sigma, dtype=torch.bool)
        image, noise = (1 + sigma).reciprocal(), sigma / (1 + sigma)  # shares in x_t
        if self.kind == "vp":
            image = (1 + sigma**2).rsqrt()
            noise = sigma * image
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        c_in = torch.where(pure, 1 / sigma, image)
        image, noise = torch.where(pure, zero, image), torch.where(pure, one, noise)
        if self.kind == "flow":
            return Coefficients(c_in, noise if self.reversed else -noise, c_in, time)
        if self.prediction == "epsilon":
            return Coefficients(one, -sigma, c_in, time)
        if self.prediction == "v_prediction":
            return Coefficients(image * c_in, -noise, c_in, time)
        return Coefficients(zero, one, c_in, time)

    def __str__(self) -> str:
        """What a network predicts, along which path, and the times that it is told."""
        if self.kind == "edm":
            return f"EDM, sigma_data {self.sigma_data:g}"
        if self.kind == "vp":
            predicts = {"epsilon": "the noise", "v_prediction": "the velocity v", "sample": "the image"}
            clock = "told ln(sigma) / 4" if self.clock == "log" else f"{len(self.alphas_cumprod):,} steps"
            end = ", the last pure noise" if self.ends_in_noise else ""
            return f"variance preserving, {clock}{end}; predicts {predicts[self.prediction]}"
        start, end = ("noise", "image") if self.reversed else ("image", "noise")
        return f"flow matching, time 0 ({start}) to {self.time_scale:g} ({end}); predicts {end} - {start}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `Path(**path.to_dict())` is the same path."""
        return asdict(self) | {"alphas_cumprod": list(self.alphas_cumprod)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", tuple(self.alphas_cumprod))
        for name, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("prediction", self.prediction, get_args(Prediction)),
            ("clock", self.clock, get_args(Clock)),
        ):
            if value not in known:
                raise unknown(name, value, known)
        for name in ("time_scale", "sigma_data"):
            object.__setattr__(self, name, _number(name, getattr(self, name), above=0.0))


def _number(name: str, value: Any, above: float = -math.inf) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor) and value.ndim == 0:
        value, number = value.item(), True
    if not number or not above < value < math.inf:
        wanted = "a number" if above == -math.inf else f"a number above {above:g}"
        raise GddlabError(f"{name}={shown(value)}: give {wanted}")
    return float(value)
