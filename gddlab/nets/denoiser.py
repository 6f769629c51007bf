"""`Denoiser`: what is called as D(x; sigma); `Wrapped`: any network as one."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown, warn
from gddlab.files import hash_json
from gddlab.nets.bare import number_type, unwrap
from gddlab.nets.calls import Call
from gddlab.nets.codec import Codec
from gddlab.nets.conditioning import Conditioning, nested
from gddlab.nets.path import Path

EMBEDDED_GUIDANCE = 3.5
"""The guidance scale that a distilled network is told where its conditioning holds none: diffusers' for FLUX."""


class Denoiser(nn.Module):
    """A denoiser, called as `net(x, sigma, class_labels)`: gddlab's own (`Precond`), or any other made one by `wrap`.

    Attributes:
        img_channels, img_resolution: Shape of what it denoises, channels and side; None where it is not known.
        label_dim: Number of classes, or of rows of `cond`; 0 for an unconditional network.
        sigma_min, sigma_max: Range of sigma, standard deviation on the scale of the data.
        card: What is known about it; None where nothing is.
        path: How noise, time and answer go together inside; None where the network does not say.
        branches: Guidance branches, in the order in which their rows come in one call, or their calls come one after
            the other.
        sample_argument: Name of the bare network's argument that takes the rows; "" for the first one.
        cond: Conditioning, of which a one-hot row of `class_labels` chooses one; None where there is none.
        guidance: Scale of classifier-free guidance, D = D_uncond + guidance (D_cond - D_uncond) (Ho & Salimans 2021).
        codec: Makes latents of images; None where the network works on images, or no autoencoder is known.
        latent: Whether it works on latents.
    """

    img_channels: int
    img_resolution: int
    label_dim: int
    sigma_min: float
    sigma_max: float
    card: Any
    path: Path | None = None
    branches: tuple[str, ...] = ("cond",)
    sample_argument: str = ""
    cond: Conditioning | None = None
    guidance: float | None = None
    codec: Codec | None = None
    latent: bool = False

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest sigma that the network was trained at; the identity for most."""
        return sigma

    def settings(self) -> dict[str, Any]:
        """What its images depend on besides weights and architecture, as JSON."""
        return {} if self.codec is None else {"codec": self.codec.hash}


def data_std(net: nn.Module) -> float:
    """Standard deviation of the data that a network denoises, which weighs its loss at each noise level.

    It is the network's own `sigma_data`, or that of its path; else 1 for latents, which are scaled to that, and 0.5 for
    images in [-1, 1].
    """
    path = getattr(net, "path", None)
    if path is not None and path.kind == "edm":
        return float(path.sigma_data)
    default = 1.0 if getattr(net, "latent", False) else 0.5
    own = getattr(unwrap(net) if isinstance(net, Wrapped) and net.whole else net, "sigma_data", default)
    return float(own)


def levels_of(sigma: Tensor | float, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 1 1"]:
    """Noise levels, a number, (1,) or (B,), as numbers of `x`'s kind, (B, 1, 1, 1)."""
    if isinstance(sigma, int | float):  # filled on the device: a copy from the host would wait for it
        return torch.full((x.shape[0], 1, 1, 1), float(sigma), dtype=x.dtype, device=x.device)
    if not isinstance(sigma, Tensor):  # a list, or an array
        try:
            sigma = torch.as_tensor(sigma)
        except (TypeError, ValueError, RuntimeError):
            raise GddlabError(f"sigma={shown(sigma)}: give a number above 0, or one for each image") from None
    if sigma.numel() not in (1, x.shape[0]):
        raise GddlabError(f"sigma has shape {tuple(sigma.shape)} for {x.shape[0]} images: give a number, or one each")
    return sigma.to(x.device, x.dtype).reshape(-1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)


class Wrapped(Denoiser):
    """A network as a denoiser, whatever its own signature; made by `gddlab.wrap`.

    Either `denoise` says how it is called, or `call` and `path` do.

    Attributes:
        gddlab_bare: The network itself, whose names of layers and parameters are kept.
        denoise: Function of (model, x, sigma, labels); None where `call` says it.
        call: Names of arguments and form of guidance.
        whole: Whether the network is a denoiser itself, called with x and sigma.
    """

    gddlab_bare: nn.Module

    def __init__(
        self,
        model: nn.Module,
        denoise: Callable[..., Tensor] | None = None,
        *,
        call: Call | None = None,
        path: Path | None = None,
        whole: bool = False,
        shape: tuple[Any, Any, int],
        sigmas: tuple[float, float],
        cond: Conditioning | None = None,
        guidance: float | None = None,
        codec: Codec | None = None,
        latent: bool = False,
        branches: tuple[str, ...] = ("cond",),
        card: Any = None,
    ):
        super().__init__()
        self.gddlab_bare, self.denoise, self.call, self.path, self.whole = model, denoise, call, path, whole
        self._takes_told = denoise is None or takes_told(denoise)
        self.img_channels, self.img_resolution, self.label_dim = shape
        self.sigma_min, self.sigma_max = sigmas
        self.cond, self.guidance, self.codec, self.latent = cond, guidance, codec, latent
        self.branches, self.card = branches, card
        self.sample_argument = "" if call is None else call.sample
        self.training = model.training

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Tensor | float,
        class_labels: Tensor | Conditioning | None = None,
        told: Tensor | float | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoises.

        Args:
            x: Image plus sigma times noise; float64 stays float64, anything else becomes float32.
            sigma: Scalar, (1,) or (B,), within `sigma_min` and `sigma_max`.
            class_labels: (B, label_dim) or (1, label_dim) one-hot: classes, or rows of `cond`. Or a conditioning of 1
                or B images. Without any, image i has row i of `cond`, modulo its length. An unconditional network
                ignores them.
            told: The noise level that the network is told, where that is not `sigma`; scalar, (1,) or (B,).

        Returns:
            The denoised image, in the type of `x`.

        Raises:
            GddlabError: A sigma outside of the range; labels or an answer of the network of another shape; conditioning
                that the network needs is missing; `told` for a `denoise` without that argument.
        """
        if told is not None and not self._takes_told:
            raise GddlabError(
                "told= is for a network that can be told another noise level than its input's: give wrap a denoise= "
                "with an argument told, a function of (model, x, sigma, class_labels, told)"
            )
        if not isinstance(x, Tensor) or x.ndim != 4 or self.img_channels not in (None, x.shape[1]):
            what = f"x is {tuple(x.shape)}" if isinstance(x, Tensor) else f"x={shown(x)}"
            raise GddlabError(f"{what}: this network takes a tensor, (n, {self.img_channels or 'C'}, height, width)")
        x = x if x.dtype == torch.float64 else x.float()
        sigma = levels_of(sigma, x).flatten()
        self._check_range(sigma)
        given = self._given(class_labels, x)
        level = sigma
        if told is not None:
            level = levels_of(told, x).flatten()
            self._check_range(level)
        if self.denoise is None:
            return self._denoised(x, sigma, level, given)
        extra = {"told": level} if self._takes_told else {}
        out = self.denoise(self.gddlab_bare, x, sigma, given, **extra)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise GddlabError(f"denoise= gave {found}: return the denoised images, {tuple(x.shape)}")
        return out.to(x.dtype)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        bare = unwrap(self)
        return bare.round_sigma(sigma) if self.whole and isinstance(bare, Denoiser) else sigma

    def settings(self) -> dict[str, Any]:
        bare, about = unwrap(self), super().settings()
        config = getattr(bare, "init_kwargs", None) or dict(getattr(bare, "config", None) or {})
        about |= {"class": type(bare).__name__, "config": hash_json({str(k): repr(v) for k, v in config.items()})}
        about["sigmas"] = [self.sigma_min, None if self.sigma_max == math.inf else self.sigma_max]
        if self.denoise is not None:
            about["denoise"] = getattr(self.denoise, "__qualname__", type(self.denoise).__name__)
        if self.path is not None:
            about["path"] = hash_json(self.path.to_dict())
        if self.call is not None:
            about["call"] = dataclasses.asdict(self.call)
        if self.cond is not None:
            about["cond"] = self.cond.hash
        if self.guidance is not None:
            about["guidance"] = self.guidance
        return about

    def check_conditioning(self) -> None:
        """Refuses a network that lacks conditioning which it needs."""
        if self.cond is None and self.call is not None and self.call.needs:
            raise self._lacks(self.call.needs)

    def check_times(self, sigmas: Sequence[float]) -> None:
        """Warns of noise levels that the network cannot tell apart, since it rounds their times."""
        kind = number_type(self)
        if self.path is None or self.call is None or not self.call.casts_time or kind is None or kind.itemsize > 2:
            return
        times = self.path.time(torch.tensor(sigmas, dtype=torch.float64)).to(kind).tolist()
        for (a, s), (b, t) in itertools.pairwise(zip(times, sigmas, strict=True)):
            if a == b:
                name = type(unwrap(self)).__name__
                warn(
                    f"a {name} in {str(kind).removeprefix('torch.')} rounds the times of sigma {s:g} and {t:g} to one: "
                    "it is told the same at both"
                )
                return

    def _lacks(self, names: Sequence[str]) -> GddlabError:
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return GddlabError(
            f"a {type(unwrap(self)).__name__} needs {listed}: give wrap cond=, which "
            "gddlab.Conditioning.record(pipe, prompts) makes"
        )

    def _check_range(self, sigma: Tensor) -> None:
        low, high = self.sigma_min, self.sigma_max
        if low == 0 and high == math.inf:
            return  # without waiting for an accelerator
        slack = 1e-6  # the ends, rounded to float32
        for s in (sigma.min().item(), sigma.max().item()):
            if not low * (1 - slack) <= s <= high * (1 + slack):
                raise GddlabError(f"sigma {s:g}: this network accepts {low:g} to {high:g}, give one of these")

    def _given(self, class_labels: Tensor | Conditioning | None, x: Tensor) -> Tensor | Conditioning | None:
        """The conditioning of each row of x; one-hot where there are classes alone."""
        b = len(x)
        if isinstance(class_labels, Conditioning):
            if len(class_labels) not in (1, b):
                raise GddlabError(f"conditioning of {len(class_labels)} for {b} images: give one, or one each")
            return class_labels if len(class_labels) == b else class_labels[[0] * b]
        if class_labels is None or not self.label_dim:
            return None if self.cond is None else self.cond[[i % len(self.cond) for i in range(b)]]
        if not isinstance(class_labels, Tensor):
            raise GddlabError(f"class_labels={shown(class_labels)}: give one-hot rows, ({b}, {self.label_dim})")
        if class_labels.ndim != 2 or len(class_labels) not in (1, b) or class_labels.shape[1] != self.label_dim:
            shape = tuple(class_labels.shape)
            raise GddlabError(f"class_labels are {shape}: give one-hot rows, ({b}, {self.label_dim})")
        labels = class_labels.to(x.device, x.dtype).expand(b, -1)
        return labels if self.cond is None else self.cond[_ids(labels)]

    def _denoised(
        self, x: Tensor, sigma: Tensor, level: Tensor, given: Tensor | Conditioning | None
    ) -> Float[Tensor, "b c h w"]:
        """By `call` and `path`; in x and sigma where the network itself is a denoiser."""
        assert self.call is not None
        kind = x.dtype if self.whole else number_type(self) or x.dtype
        rows, shared = self._arguments(given, x, kind)
        if self.path is None or self.whole:
            if level is not sigma:
                rows = {branch: {**named, "told": level} for branch, named in rows.items()}
            return self._guided(self._answers(x, sigma, rows, shared, x))
        c = self.path.coefficients(sigma[:, None, None, None])
        time = c.c_noise if level is sigma else self.path.time(level)
        seen = self.call.pack((c.c_in * x).to(kind))
        return c.c_skip * x + c.c_out * self._guided(self._answers(seen, time, rows, shared, x))

    def _arguments(
        self, given: Tensor | Conditioning | None, x: Tensor, kind: torch.dtype
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Further arguments of each branch, and those that are one for all images; numbers are of this kind."""
        assert self.call is not None
        call, b = self.call, len(x)
        shared: dict[str, Any] = {}
        rows: dict[str, Mapping[str, Tensor]] = {branch: {} for branch in self.branches}
        if isinstance(given, Conditioning):
            rows = {"cond": given.rows, "uncond": given.negative or {}}
            shared = dict(given.shared)
        elif call.labels and self.label_dim:
            rows = self._classes(given, x)
        if missing := [n for n in call.needs if n not in rows["cond"] and n not in shared]:
            raise self._lacks(missing)
        filled: dict[str, Tensor] = {}
        if call.scale and call.scale not in rows["cond"] and call.scale not in shared:
            filled[call.scale] = torch.full((b,), EMBEDDED_GUIDANCE, device=x.device)
        h, w = (n // call.patch for n in x.shape[2:])
        if call.patch > 1 and call.places == "img_shapes":
            shared["img_shapes"] = [[(1, h, w)]] * (b * len(self.branches) if call.doubled else b)
        elif call.patch > 1:
            places = torch.zeros(h, w, 3)
            places[..., 1], places[..., 2] = torch.arange(h)[:, None], torch.arange(w)
            shared["img_ids"] = places.flatten(0, 1)
            shared.setdefault("txt_ids", torch.zeros(rows["cond"]["encoder_hidden_states"].shape[1], 3))
        found = {
            branch: {
                name: t.to(x.device, kind if t.is_floating_point() else None)
                for name, t in (*rows[branch].items(), *filled.items())
            }
            for branch in self.branches
        }
        return found, {k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in shared.items()}

    def _classes(self, labels: Tensor | Conditioning | None, x: Tensor) -> dict[str, Mapping[str, Tensor]]:
        """Class ids, or one-hot rows of a network that takes these; of "uncond" the null class."""
        assert self.call is not None and not isinstance(labels, Conditioning)
        name, null = self.call.labels, self.call.null
        if self.whole:
            none = x.new_zeros(len(x), self.label_dim)
            return {"cond": {name: none if labels is None else labels}, "uncond": {name: none}}
        if labels is None and null is None:
            raise GddlabError(f"this network has {self.label_dim} classes and none for no class: give class_labels")
        ids = torch.full((len(x),), null or 0) if labels is None else _ids(labels)
        return {"cond": {name: ids}, "uncond": {name: torch.full_like(ids, null or 0)}}

    def _answers(
        self, seen: Tensor, time: Tensor, rows: dict[str, dict[str, Tensor]], shared: dict[str, Any], x: Tensor
    ) -> dict[str, Tensor]:
        """The network's answer in each branch, in the shape and type of x."""
        assert self.call is not None
        if len(self.branches) > 1 and not self.call.doubled:
            return {branch: self._answer(seen, time, rows[branch] | shared, x) for branch in self.branches}
        k = len(self.branches)
        together = rows["cond"]
        try:
            if k > 1:
                together = {n: torch.cat([rows[b][n] for b in self.branches]) for n in together}
        except RuntimeError:
            raise GddlabError(
                "the conditioning of the two branches has different lengths: give wrap call=, one with doubled=False"
            ) from None
        both = seen.repeat(k, *[1] * (seen.ndim - 1)) if k > 1 else seen
        out = self._answer(both, time.repeat(k), together | shared, x)
        return dict(zip(self.branches, out.chunk(k), strict=True))

    def _answer(self, seen: Tensor, time: Tensor, arguments: dict[str, Any], x: Tensor) -> Tensor:
        """By keyword: a network with others' hooks may have lost its signature."""
        assert self.call is not None
        call, c, h, w = self.call, *x.shape[1:]
        given = {call.sample: seen, call.time: time, **arguments}
        try:
            out = self.gddlab_bare(**nested(given))
        except (TypeError, ValueError, IndexError, RuntimeError) as e:
            if isinstance(e, GddlabError | torch.OutOfMemoryError) or "CUDA" in str(e):
                raise
            rows = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if isinstance(v, Tensor))
            why = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise GddlabError(
                f"a {type(unwrap(self)).__name__} cannot be called with {rows} ({why}): give wrap the cond= of this "
                "network, its call=, and the img_resolution= that it takes"
            ) from e
        if not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple | list) and out else getattr(out, "sample", None)
        if isinstance(out, Tensor) and out.ndim == seen.ndim and len(out) == len(seen):
            tokens = call.patch > 1
            if out.shape[1:] == seen.shape[1:] if tokens else out.shape[2:] == x.shape[2:] and out.shape[1] >= c:
                return call.unpack(out, (c, h, w)).to(x.device, x.dtype)
        found = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise GddlabError(f"the network gave {found} for {tuple(seen.shape)}: give denoise= in place of call=")

    def _guided(self, answers: dict[str, Tensor]) -> Tensor:
        cond = answers["cond"]
        if self.guidance is None:
            return cond
        assert self.call is not None
        out = answers["uncond"] + self.guidance * (cond - answers["uncond"])
        if self.call.rescale:
            packed = self.call.pack(out)
            norms = [self.call.pack(x).norm(dim=-1, keepdim=True) for x in (cond, out)]
            out = self.call.unpack(packed * (norms[0] / norms[1]), (out.shape[1], out.shape[2], out.shape[3]))
        k = self.call.guide_channels
        return out if k is None else torch.cat([out[:, :k], cond[:, k:]], 1)


def _ids(labels: Float[Tensor, "b classes"]) -> Tensor:
    """The classes of one-hot rows, (B,) int64."""
    ids = labels.argmax(1)
    if not torch.equal(nn.functional.one_hot(ids, labels.shape[1]).to(labels.dtype), labels):
        raise GddlabError("class_labels hold rows that are not one-hot: this network takes one class per image")
    return ids


def takes_told(denoise: Callable[..., Any]) -> bool:
    """Whether a function has an argument of that name."""
    try:
        return "told" in inspect.signature(denoise).parameters
    except ValueError:  # one that is built in, without a signature
        return False
