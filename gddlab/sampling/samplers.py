"""Samplers: `sample` draws images of a student or a teacher, each from its own seed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, integer, numbers_in, positive, shown, unknown
from gddlab.files import hash_tensors
from gddlab.nets import PURE, SIGMA_MAX, SIGMA_MIN, Denoiser, OneStepPrecond, Precond
from gddlab.nets.bare import check_weights, device_of, unwrap, weights_of
from gddlab.nets.codec import Codec
from gddlab.nets.denoiser import Wrapped
from gddlab.nets.precond import check_level, descending
from gddlab.progress import progress_bar
from gddlab.runtime import MAX_SEED, beside_runs
from gddlab.sampling.schedules import (
    Schedule,
    fit_vp,
    iddpm_sigmas,
    karras_sigmas,
    schedule,
    vp_schedule,
)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a diffusion teacher is sampled (Karras et al. 2022, table 1); the defaults are EDM's own choices.

    Raises:
        GddlabError: An unknown choice (near matches are given) or a number out of range.
    """

    steps: int = 18
    """Noise levels above 0; Heun makes 2 * steps - 1 network calls, Euler `steps`."""
    solver: Literal["heun", "euler"] = "heun"
    """Second or first order: Heun's steps or Euler's."""
    discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    """Which noise levels are visited."""
    schedule: Literal["linear", "vp", "ve"] = "linear"
    """sigma(t)."""
    scaling: Literal["none", "vp"] = "none"
    """s(t): 1, or 1 / sqrt(1 + sigma^2)."""
    sigma_min: float | None = None
    """Lowest noise level above 0; None: that of the discretisation. Clipped to the network's range, like sigma_max."""
    sigma_max: float | None = None
    """Highest noise level; None: that of the discretisation."""
    rho: float = 7.0
    """Exponent of discretisation edm."""
    alpha: float = 1.0
    """Position of Heun's second slope, as a share of the step; 1 is Heun's, 1/2 the midpoint method."""
    epsilon_s: float = 1e-3
    """Lowest time of the VP process."""
    C_1: float = 0.001
    """Bound in iDDPM's noise levels."""
    C_2: float = 0.008
    """Offset in iDDPM's noise levels."""
    M: int = 1000
    """Number of iDDPM's noise levels."""
    S_churn: float = 0.0
    """Noise added over all steps; 0 is the deterministic sampler."""
    S_min: float = 0.0
    """Lowest sigma at which noise is added."""
    S_max: float = math.inf
    """Highest sigma at which noise is added."""
    S_noise: float = 1.0
    """Standard deviation of the added noise; slightly above 1 counteracts a loss of detail."""

    def __post_init__(self) -> None:
        for name, accepted in (
            ("solver", ("heun", "euler")),
            ("discretization", ("edm", "vp", "ve", "iddpm")),
            ("schedule", ("vp", "ve", "linear")),
            ("scaling", ("vp", "none")),
        ):
            if getattr(self, name) not in accepted:
                raise unknown(name, getattr(self, name), accepted)
        for name in ("steps", "M"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))  # numpy's integers are no JSON
        ranges: list[tuple[str, Callable[[float], bool], str]] = [
            ("sigma_min sigma_max rho C_1 C_2 S_noise", lambda x: 0 < x < math.inf, "a number above 0"),
            ("alpha", lambda x: 0 < x <= 1, "a number above 0, at most 1"),
            ("epsilon_s", lambda x: 0 < x < 1, "a number above 0, below 1"),
            ("S_churn S_min", lambda x: 0 <= x < math.inf, "a number, at least 0"),
            ("S_max", lambda x: x >= self.S_min, f"a number, at least S_min={self.S_min}"),
        ]
        for names, fits, wanted in ranges:
            for name in names.split():
                value = getattr(self, name)
                if value is None and name in ("sigma_min", "sigma_max"):
                    continue
                if not isinstance(value, int | float) or not fits(value):
                    raise GddlabError(f"{name}={shown(value)}: give {wanted}")

    def sigma_range(self, net: Denoiser) -> tuple[float, float]:
        """sigma_min and sigma_max for a network: as given, or the discretisation's, clipped to the network's range."""
        vp = vp_schedule()
        lo, hi = {
            "vp": (vp.sigma(self.epsilon_s), vp.sigma(1.0)),
            "ve": (0.02, 100.0),
            "iddpm": (SIGMA_MIN, 81.0),
            "edm": (SIGMA_MIN, SIGMA_MAX),
        }[self.discretization]
        lo = max(lo if self.sigma_min is None else self.sigma_min, net.sigma_min)
        hi = min(hi if self.sigma_max is None else self.sigma_max, net.sigma_max)
        if lo > hi:
            raise GddlabError(
                f"noise levels from {hi:g} down to {lo:g}: the network takes {net.sigma_min:g} to {net.sigma_max:g}, "
                "give sigma_min and sigma_max inside that range"
            )
        for name, level in (("sigma_min", lo), ("sigma_max", hi)):
            if (given := getattr(self, name)) is not None:
                check_level(f"{name}={given:g}", net, level)
        return lo, hi

    def noise_levels(self, lo: float, hi: float) -> Float[Tensor, " steps"]:
        """Descending noise levels in lo..hi, float64; a single one is the highest.

        For "edm" equation 5; for "vp" equal steps of VP's time; for "ve" equal ratios; for "iddpm" equally spaced among
        iDDPM's own levels in that range.
        """
        if self.discretization == "edm":
            return karras_sigmas(self.steps, sigma_min=lo, sigma_max=hi, rho=self.rho)
        ramp = torch.arange(self.steps, dtype=torch.float64) / max(self.steps - 1, 1)
        if self.discretization == "vp":
            sigma = fit_vp(lo, hi, self.epsilon_s).sigma
            return torch.tensor([sigma(1 + r * (self.epsilon_s - 1)) for r in ramp.tolist()], dtype=torch.float64)
        if self.discretization == "ve":
            return (hi**2 * (lo**2 / hi**2) ** ramp).sqrt()
        u = iddpm_sigmas(C_1=self.C_1, C_2=self.C_2, M=self.M)
        u = u[(u >= lo) & (u <= hi)]
        if not len(u):
            raise GddlabError(f"no iDDPM noise level in {lo:g}..{hi:g}: widen sigma_min and sigma_max")
        return u[((len(u) - 1) * ramp).round().long()]

    def time_steps(self, net: Denoiser) -> tuple[Schedule, list[float]]:
        """sigma(t), and the times t_0 > ... > t_N = 0 of the steps with a network.

        Raises:
            GddlabError: The noise levels do not fit the network or each other.
        """
        lo, hi = self.sigma_range(net)
        process = schedule(self.schedule, lo, hi, epsilon_s=self.epsilon_s)
        sigmas = self.noise_levels(lo, hi).tolist()
        return process, [process.time(_rounded(net, sigma)) for sigma in sigmas] + [0.0]

    def to_dict(self) -> dict[str, Any]:
        """The settings as strict JSON knows them; an infinite S_max is None."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}


T = TypeVar("T", float, Tensor)


def heun_step(slope: Callable[[Tensor, T], Tensor], x: Tensor, t: T, t_next: T, *, alpha: float = 1.0) -> Tensor:
    """A step of Heun's method for dx/dt = slope(x, t) (Karras et al. 2022, algorithms 1 and 3).

    Args:
        slope: The right-hand side; for EDM's ODE, where t is sigma, (x - D(x; sigma)) / sigma.
        x: State at t, (B, C, H, W).
        t, t_next: Numbers, or tensors that broadcast with x.
        alpha: Position of the second slope, as a share of the step; 1 is Heun's method.
    """
    h = t_next - t
    d = slope(x, t)
    d_prime = slope(x + alpha * h * d, t_next if alpha == 1 else t + alpha * h)
    weight = 1 / (2 * alpha)
    return x + h * ((1 - weight) * d + weight * d_prime)


def integrate(
    net: Denoiser,
    z: Float[Tensor, "b c h w"],
    class_labels: Float[Tensor, "b k"] | None = None,
    sampler: Sampler = Sampler(),
    *,
    noise: Callable[[], Tensor] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Solves the probability flow ODE, or its stochastic variant, from noise to images.

    Algorithms 1 and 2 of Karras et al. 2022 in one: a step leads from t to t_next; with S_churn > 0, added noise first
    raises the state from t to t_hat > t. With s(t) = 1 and sigma(t) = t this is EDM's own sampler.

    Args:
        net: Denoiser.
        z: Standard normal noise, (B, C, H, W).
        class_labels: One-hot, (B, label_dim).
        sampler: How.
        noise: Gives standard normal noise, (B, C, H, W), per step if S_churn > 0; an `ImageNoise` after its latents.

    Returns:
        (B, C, H, W), float64: the state is kept in float64, the network runs in its own precision.

    Raises:
        GddlabError: The noise levels do not fit the network; S_churn without `noise`.
    """
    if sampler.S_churn and noise is None:
        raise GddlabError(f"S_churn={sampler.S_churn:g} needs noise: give noise=ImageNoise(seeds, shape)")
    process, times = sampler.time_steps(net)
    dtype = input_type(net)

    def scale(t: float) -> float:
        return 1.0 if sampler.scaling == "none" else 1 / math.sqrt(1 + process.sigma(t) ** 2)

    def denoised(image: Tensor, sigma: float) -> Tensor:
        out: Tensor = net(image.to(dtype), torch.tensor(sigma, dtype=dtype), class_labels).double()
        return out

    def slope(x: Tensor, t: float) -> Tensor:
        """dx/dt (equation 4, with the score as (D - x) / sigma^2)."""
        sigma, dsigma, s = process.sigma(t), process.slope(t), scale(t)
        ds_s = 0.0 if sampler.scaling == "none" else -sigma * dsigma * s**2
        image = x / s
        return ds_s * x + dsigma * s * ((image - denoised(image, sigma)) / sigma)

    x = z.double() * (process.sigma(times[0]) * scale(times[0]))
    for t, t_next in itertools.pairwise(times):
        sigma = process.sigma(t)
        if noise is not None and sampler.S_churn:
            fresh = noise().to(x)  # drawn at every step, so that S_min and S_max do not change which noise a step gets
            if sampler.S_min <= sigma <= sampler.S_max:
                raised = _rounded(net, sigma * (1 + min(sampler.S_churn / sampler.steps, math.sqrt(2) - 1)))
                if isinstance(denoiser_in(net), Wrapped):  # which refuses what is beyond its range
                    raised = min(raised, float(net.sigma_max))
                t_hat = process.time(raised)
                added = sampler.S_noise * math.sqrt(max(raised**2 - sigma**2, 0))
                x = scale(t_hat) / scale(t) * x + scale(t_hat) * added * fresh
                t, sigma = t_hat, raised
        if is_pure(net, sigma):
            image = x / scale(t)
            lower = process.sigma(t_next)
            x = scale(t_next) * from_pure(denoised(image, sigma), image, sigma, lower)
        elif sampler.solver == "euler" or t_next == 0:
            x = x + (t_next - t) * slope(x, t)
        else:
            x = heun_step(slope, x, t, t_next, alpha=sampler.alpha)
    return x


def is_pure(net: Any, sigma: float) -> bool:
    """Whether a network sees noise without an image there."""
    path = getattr(net, "path", None)
    return path is not None and path.ends_in_noise and sigma >= PURE


def from_pure(image: Tensor, x: Tensor, sigma: float, lower: float) -> Tensor:
    """The state at a lower noise level: the noise of x = sigma * noise, and the image that the network makes of it.

    Euler's step would take part of the image away, since it takes x for image + sigma * noise.
    """
    return image + lower / sigma * x


def input_type(net: nn.Module) -> torch.dtype:
    """The type of the states that a network is given: its own; `wrap`'s cast them themselves."""
    if isinstance(net, Precond):
        return next(net.parameters()).dtype
    exact = any(p.dtype == torch.float64 for p in net.parameters())
    return torch.float64 if exact else torch.float32


def _rounded(net: Denoiser, sigma: float) -> float:
    return float(net.round_sigma(torch.tensor(sigma, dtype=torch.float64)))


def heun(
    net: Denoiser,
    z: Float[Tensor, "b c h w"],
    class_labels: Float[Tensor, "b k"] | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = 7.0,
) -> Float[Tensor, "b c h w"]:
    """EDM's deterministic sampler, `integrate` with its defaults; 2 * num_steps - 1 network calls."""
    return integrate(net, z, class_labels, Sampler(steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho))


def multistep(
    net: OneStepPrecond,
    z: Float[Tensor, "b c h w"],
    class_labels: Float[Tensor, "b k"] | None = None,
    *,
    sigmas: Sequence[float],
    noise: Callable[[], Tensor],
    within: Iterable[contextlib.AbstractContextManager[Any]] = (),
) -> Float[Tensor, "b c h w"]:
    """n-step sampling of a student: G, then noise and G in turn (Song et al. 2023, algorithm 1).

    Args:
        net: Student.
        z: Standard normal noise, (B, C, H, W).
        class_labels: One-hot, (B, label_dim).
        sigmas: Descending noise levels above eps, one per step; the student starts from the first, 80.
        noise: Gives standard normal noise, (B, C, H, W), for each later step; an `ImageNoise` after its latents.
        within: Contexts in which the network is called, first step first; none for steps beyond them.

    Returns:
        (B, C, H, W), float32.

    Raises:
        GddlabError: Noise levels that do not descend, or not above eps.
    """
    sigmas, contexts = _student_levels(net, sigmas), iter(within)
    with next(contexts, contextlib.nullcontext()):
        x: Tensor = net(sigmas[0] * z, sigmas[0], class_labels)
    for sigma in sigmas[1:]:
        with next(contexts, contextlib.nullcontext()):
            x = net(noised_again(net, x, sigma, noise()), sigma, class_labels)
    return x


def noised_again(net: OneStepPrecond, x: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """An image of a student, which has noise of eps, at a noise level above."""
    return x + math.sqrt(sigma**2 - net.eps**2) * noise.to(x)


def _student_levels(net: OneStepPrecond, sigmas: Any) -> tuple[float, ...]:
    levels = descending("sigmas", sigmas, low=net.eps)
    if levels and levels[0] > net.sigma_g:
        raise GddlabError(f"sigmas={levels}: give descending noise levels from {net.sigma_g:g} at most")
    if not levels:
        raise GddlabError("sigmas=(): give descending noise levels, at least one, such as (80.0, 0.8)")
    return levels


class ImageNoise:
    """Standard normal noise for a batch; image i's comes from its own CPU generator, seeded with seeds[i].

    Each call continues the sequence of every image. Neither batch size nor number of processes changes an image.
    """

    def __init__(self, seeds: Iterable[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(n, *shape), on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=g, dtype=dtype) for g in self.generators])


def latents(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """The noise that images start from, the first that `ImageNoise` gives.  -> (n, *shape), float32"""
    return ImageNoise(seeds, shape)(torch.float32)


PRECISIONS = ("float32", "bfloat16", "float16")


def precision(dtype: torch.dtype | str | None) -> str:
    """Name of the precision: "float32" (the network's own, no autocast), "bfloat16" or "float16"."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise unknown("dtype", name, PRECISIONS)
    return name


def seed_list(n: int | None, seed: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """One seed per image; arguments as for `sample`."""
    if seeds is None:
        first, count = integer("seed", seed), positive("n", 64 if n is None else n, "images")
        if not 0 <= first <= MAX_SEED - count + 1:
            raise GddlabError(f"seed={seed} for {count} images: seeds are 0..{MAX_SEED}")
        return range(first, first + count)
    try:
        listed = [integer("seeds", s) for s in numbers_in(seeds)]
    except TypeError:
        raise GddlabError(
            f"seeds={shown(seeds)}: give a list of integers, or seed={shown(seeds)} for the first"
        ) from None
    if not listed:
        raise GddlabError("seeds=[]: give one seed per image")
    if n is not None and n != len(listed):
        raise GddlabError(f"n={n} with {len(listed)} seeds: give one seed per image, or omit n")
    for s in listed:
        if not 0 <= s <= MAX_SEED:
            raise GddlabError(f"seeds hold {s}: seeds are 0..{MAX_SEED}")
    return listed


def one_hot(label_dim: int, seeds: Sequence[int], labels: Tensor | Sequence[int] | int | None) -> Tensor | None:
    """Class labels of images, one-hot float32; None for an unconditional network; `labels` as in `sample`."""
    n = len(seeds)
    if not label_dim:
        if labels is not None:
            raise GddlabError(f"class_labels={shown(labels)} with an unconditional network: omit it")
        return None
    if labels is None:
        ids = torch.tensor(list(seeds)) % label_dim
    else:
        try:
            ids = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise GddlabError(f"class_labels={shown(labels)}: give class ids or one-hot labels") from None
        if ids.ndim == 2:
            if ids.shape != (n, label_dim):
                raise GddlabError(f"class_labels are {tuple(ids.shape)}: give ({n}, {label_dim})")
            if not ids.float().isfinite().all():
                raise GddlabError("class_labels are not finite: give one-hot labels")
            return ids.float()
        ids = ids.expand(n) if ids.ndim == 0 else ids
        if ids.shape != (n,) or ids.min() < 0 or ids.max() >= label_dim or (ids != ids.long()).any():
            raise GddlabError(f"class_labels {ids.tolist()[:4]}: give {n} ids in 0..{label_dim - 1}")
    return torch.nn.functional.one_hot(ids.long(), label_dim).float()


def denoiser_in(net: Any) -> Denoiser:
    """The network itself, also when torch.compile has wrapped it."""
    module = getattr(net, "_orig_mod", net)
    if not isinstance(module, Denoiser):
        raise GddlabError(
            f"{type(net).__name__} is no network: give gddlab.load_teacher(...) or load_run(...).student()"
        )
    return module


def weights_hash(net: Denoiser) -> str:
    """sha256 of its weights, by their own names."""
    return hash_tensors(weights_of(unwrap(net)))


Method = Sampler | tuple[float, ...]
"""A teacher's sampler, or the noise levels of a student."""


@beside_runs()
def sample(
    net: Denoiser,
    n: int | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    sigmas: Sequence[float] | None = None,
    batch_size: int = 128,
    dtype: torch.dtype | str | None = None,
    channels_last: bool = False,
    decode: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Float[Tensor, "n c h w"]:
    """Draws images; an image depends on its seed, not on the batch size.

    A student takes the steps it was made for, usually one, or others: `sample(student, sigmas=(80.0, 0.8))`. A teacher
    is sampled with EDM's deterministic Heun sampler, or with other fields of `Sampler`: `sample(teacher, steps=32,
    S_churn=40)`. A SiD student is a plain EDMPrecond network that is run once at sigma 2.5: `sample(net, steps=1,
    sigma_max=2.5)` is D(2.5 z; 2.5).

    Args:
        net: Student or teacher, or what `wrap` made of another network; it stays on its device.
        n: Number of images; by default 64, or one per seed.
        steps: For a student the number of steps, by default its own, on the Karras grid from 80 to eps. For a teacher
            the number of noise levels, by default 18.
        seed: First seed; image i comes from seed + i.
        seeds: Explicit seeds instead, one per image, 0 to 2^32 - 1.
        class_labels: For a conditional network: class ids, (n,), one id for all, or one-hot, (n, label_dim); by default
            an image has the class seed mod label_dim. Where `wrap` was given `cond`, rows of it count as classes.
        sigmas: For a student: the noise levels of its steps, descending from 80; by default its own.
        batch_size: Images at once.
        dtype: torch.bfloat16 or torch.float16, or their names: runs the network under autocast.
        channels_last: Runs the network in that memory format, faster for convolutions with bfloat16 and on GPUs.
        decode: Of a network that works on latents: makes images of them, by its `codec`.
        progress: Shows a bar at a terminal.
        **settings: Fields of `Sampler`, for a teacher: solver, discretization, schedule, scaling, sigma_min, sigma_max,
            rho, S_churn, S_min, S_max, S_noise, ...

    Returns:
        float32 in [-1, 1], (n, C, H, W), on the CPU; latents, not clipped, where they are not decoded.

    Raises:
        GddlabError: Numbers out of range, labels that do not fit, settings of a teacher given to a student or of a
            student given to a teacher.
    """
    how = resolve(net, steps=steps, sigmas=sigmas, **settings)
    image_seeds = seed_list(n, seed, seeds)
    n = len(image_seeds)
    batch_size = positive("batch_size", batch_size)
    labels = one_hot(net.label_dim, image_seeds, class_labels)
    codec = codec_of(net, decode)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    out = torch.empty(n, *(shape if codec is None else codec.image_shape(shape)))
    bar = progress_bar(total=n, desc="sampling", unit="img", enabled=progress)
    with bar, prepared(net, dtype=dtype, channels_last=channels_last):
        for i in range(0, n, batch_size):
            j = min(i + batch_size, n)
            c = None if labels is None else labels[i:j]
            out[i:j] = draw(net, how, image_seeds[i:j], c, codec=codec, channels_last=channels_last)
            bar.update(j - i)
    return out


def codec_of(net: Denoiser, decode: bool = True) -> Codec | None:
    """What makes images of a network's latents; None where it makes images, or latents are wanted.

    Raises:
        GddlabError: A network without a shape, without conditioning that it needs, or without an autoencoder.
    """
    module = denoiser_in(net)
    if None in (module.img_channels, module.img_resolution):
        raise GddlabError("this network does not say img_channels and img_resolution: give them to gddlab.wrap")
    if isinstance(module, Wrapped):
        module.check_conditioning()
    if not decode and not module.latent:
        raise GddlabError("decode=False: this network makes images, omit it")
    if decode and module.latent and module.codec is None:
        raise GddlabError(
            "this network makes latents, and no autoencoder is known: give gddlab.wrap or load_teacher vae=, or "
            "gddlab.sample decode=False"
        )
    return module.codec if decode else None


def image_shape(net: Denoiser) -> tuple[int, int, int]:
    """Shape of a network's images, decoded ones where it works on latents and a codec is known."""
    module = denoiser_in(net)
    shape = (module.img_channels, module.img_resolution, module.img_resolution)
    return shape if module.codec is None else module.codec.image_shape(shape)


def resolve(
    net: Denoiser, *, steps: int | None = None, sigmas: Sequence[float] | None = None, **settings: Any
) -> Method:
    """What `sample` does with a network: the noise levels of a student, or the sampler of a teacher."""
    module = denoiser_in(net)
    if isinstance(module, OneStepPrecond):
        for name, value in settings.items():
            raise GddlabError(f"{name}={shown(value)} with a one-step student: it takes steps=N or sigmas=(80.0, ...)")
        if sigmas is not None:
            if steps is not None:
                raise GddlabError(f"steps={steps} and sigmas={sigmas}: give one of them")
            return _student_levels(module, sigmas)
        if steps is None:
            return module.sigmas
        k = positive("steps", steps)
        between = karras_sigmas(k + 1, sigma_min=module.eps, sigma_max=module.sigma_g)[1:-1]
        return (module.sigma_g, *between.tolist())
    if sigmas is not None:
        raise GddlabError(
            f"sigmas={sigmas} with {type(module).__name__}: only a one-step student takes sigmas; "
            "give steps, sigma_min, sigma_max"
        )
    fields = [f.name for f in dataclasses.fields(Sampler)]
    for name in settings:
        if name not in fields:
            raise unknown("option of sample", name, fields)
    sampler = Sampler(**settings if steps is None else {"steps": steps, **settings})
    sampler.time_steps(module)
    return sampler


def sampler_name(how: Method) -> str:
    """A short name: "one-step" (from sigma 80), "consistency-2" or "heun-18", followed by what is not EDM's default.

    Different samplers have different names.
    """
    if isinstance(how, tuple):
        if how == (SIGMA_MAX,):
            return "one-step"
        kind = "one-step" if len(how) == 1 else f"consistency-{len(how)}"
        return f"{kind} sigmas=" + ",".join(f"{s:.17g}" if float(f"{s:.6g}") != s else f"{s:.6g}" for s in how)
    default = Sampler().to_dict()
    rest = {k: v for k, v in how.to_dict().items() if k not in ("steps", "solver") and v != default[k]}
    return " ".join([f"{how.solver}-{how.steps}", *(f"{k}={v}" for k, v in rest.items())])


@contextlib.contextmanager
def prepared(net: Denoiser, *, dtype: torch.dtype | str | None = None, channels_last: bool = False) -> Iterator[None]:
    """Inference: eval mode, no gradients, autocast, memory format of the weights; restores the network afterwards."""
    check_weights(net)
    first = next(net.parameters(), torch.empty(0))
    name = precision(dtype)
    whole = isinstance(denoiser_in(net), Precond)
    if not whole and channels_last:
        raise GddlabError("channels_last=True with what gddlab.wrap made: set it on the network itself")
    if name != "float32" and whole and first.dtype != torch.float32:
        raise GddlabError(f"dtype={name} with a {first.dtype} network: autocast wants float32 weights, use net.float()")
    modes = {module: module.training for module in net.modules()}  # a part may be frozen in another mode
    number = first.dtype if name == "float32" else getattr(torch, name)
    layout = torch.channels_last if channels_last else torch.preserve_format
    # Kernels are converted here once; autocast would cast them again in every call.
    weights = [(p, p.data) for p in net.parameters() if whole and p.ndim == 4 and p is not first]
    try:
        for p, data in weights:
            p.data = data.to(number, memory_format=layout)
        net.eval()
        autocast = torch.autocast(device_of(net).type, dtype=getattr(torch, name), enabled=name != "float32")
        with torch.inference_mode(), autocast:
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, data in weights:
            p.data = data


def draw(
    net: Denoiser,
    how: Method,
    seeds: Sequence[int],
    labels: Tensor | None,
    *,
    codec: Codec | None = None,
    channels_last: bool = False,
) -> Tensor:
    """One batch, inside `prepared`.  -> (len(seeds), C, H, W), float32 in [-1, 1], or latents, on the CPU

    `codec` makes images of latents, see `codec_of`.
    """
    module, device = denoiser_in(net), device_of(net)
    noise = ImageNoise(seeds, (net.img_channels, net.img_resolution, net.img_resolution))
    z = noise(torch.float32).to(device)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    c = None if labels is None else labels.to(device)
    if isinstance(how, tuple):
        x = multistep(cast(OneStepPrecond, net), z.to(input_type(module)), c, sigmas=how, noise=noise)
    else:
        x = integrate(net, z, c, how, noise=noise)
    x = x.float()
    if module.latent and codec is None:
        return x.cpu()
    return (x if codec is None else codec.decode(x)).clamp(-1, 1).cpu()
