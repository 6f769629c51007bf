"""`Codec`: latents of images and back, by a pipeline's autoencoder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown
from gddlab.files import hash_json, hash_tensors
from gddlab.nets.bare import device_of, is_offloaded, number_type, weights_of

PIXELS = 1 << 20
"""Pixels that are encoded or decoded at once."""
VIDEO = ("AutoencoderKLQwenImage",)
"""Autoencoders of videos, (B, C, frames, H, W), of which an image is one frame."""
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel", *VIDEO)
EDM2 = ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5)
"""Mean and standard deviation of the latents that EDM2's networks were trained on, and the one they were given."""


@dataclass(frozen=True, eq=False)
class Codec:
    """latent = (E(image) - shift) * scale, image = D(latent / scale + shift); made by `of` or `edm2`.

    Attributes:
        vae: The autoencoder, float32, in eval mode.
        channels, factor: Channels of latents; pixels per latent along a side.
        shift, scale: (C, 1, 1) or (1, 1, 1).
        low: The darkest value that the autoencoder takes: -1, or 0.
        frames: Whether it takes videos; an image is one frame.
    """

    vae: nn.Module
    channels: int
    factor: int
    shift: Tensor
    scale: Tensor
    low: float = -1.0
    frames: bool = False

    @classmethod
    def of(cls, vae: Any) -> Codec:
        """Of an autoencoder of diffusers, with the factors of its configuration. One in low precision is copied.

        Raises:
            GddlabError: Another class.
        """
        kind = next((c.__name__ for c in type(vae).__mro__ if c.__name__ in VAES), None)
        if kind is None:
            raise GddlabError(f"vae= is a {type(vae).__name__}: accepted are {', '.join(VAES)} of diffusers")
        try:
            return cls._of(vae, kind)
        except (TypeError, ValueError, AttributeError) as e:
            raise GddlabError(f"vae= is a {kind} whose configuration is damaged ({e}): save it again") from None

    @classmethod
    def _of(cls, vae: Any, kind: str) -> Codec:
        config = vae.config
        scale = torch.tensor(float(getattr(config, "scaling_factor", None) or 1.0)).view(1, 1, 1)
        shift = torch.tensor(float(getattr(config, "shift_factor", None) or 0.0)).view(1, 1, 1)
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and std is not None:
            shift, scale = torch.tensor(mean).view(-1, 1, 1), scale / torch.tensor(std).view(-1, 1, 1)
        factor = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(config.block_out_channels) - 1)
        channels = config.z_dim if kind in VIDEO else config.latent_channels
        return cls(_exact(vae), int(channels), int(factor), shift, scale, frames=kind in VIDEO)

    @classmethod
    def edm2(
        cls, vae: Any, mean: Sequence[float] = EDM2[0], std: Sequence[float] = EDM2[1], final_std: float = EDM2[2]
    ) -> Codec:
        """As EDM2 uses Stable Diffusion's autoencoder: images in [0, 1], latents of standard deviation 0.5 per channel.

        Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models". `mean` and `std` are
        those of the autoencoder's own latents by channel; a network's file says them.
        """
        plain = cls.of(vae)
        if plain.channels != len(mean):
            raise GddlabError(f"vae= makes {plain.channels} channels: EDM2's latents have {len(mean)}")
        middle, spread = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
        return cls(plain.vae, plain.channels, plain.factor, middle, final_std / spread, low=0.0)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        """Latents of images in [-1, 1], float32: the mean where the autoencoder gives a distribution.

        (B, 3, H, W) -> (B, C, H / factor, W / factor)

        Raises:
            GddlabError: Images of other channels, or with a side that is no multiple of `factor`.
        """
        _check(images, "images", 3)
        side = images.shape[-2:]
        if any(n % self.factor for n in side):
            raise GddlabError(f"images of {side[0]} x {side[1]}: this codec takes multiples of {self.factor}")
        return self._in_parts(self._encoded, images, images[0, 0].numel())

    def decode(self, latents: Float[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
        """Images of latents, float32, on the scale of [-1, 1]; not clipped.

        Raises:
            GddlabError: Latents of other channels.
        """
        _check(latents, "latents", self.channels)
        return self._in_parts(self._decoded, latents, latents[0, 0].numel() * self.factor**2)

    def image_shape(self, latent: Sequence[Any]) -> tuple[int, Any, Any]:
        """Shape of the images of latents (C, H, W); sides None where they are not known."""
        h, w = (None if n is None else n * self.factor for n in latent[1:])
        return 3, h, w

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Shape of the latents of square images."""
        return self.channels, side // self.factor, side // self.factor

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of all that its images depend on."""
        weights = {f"vae.{name}": t for name, t in weights_of(self.vae).items()}
        return hash_json([hash_tensors(weights | {"shift": self.shift, "scale": self.scale}), self.low, str(self)])

    def __deepcopy__(self, memo: Any) -> Codec:
        return self  # it is not changed

    def __str__(self) -> str:
        return f"{type(self.vae).__name__}, {self.channels} channels, {self.factor} pixels per latent"

    def _encoded(self, images: Tensor) -> Tensor:
        images = (images + 1) / 2 if self.low == 0 else images
        found: Any = self.vae.encode(images[:, :, None] if self.frames else images)  # type: ignore[operator]
        if (posterior := getattr(found, "latent_dist", None)) is not None:
            latents = posterior.mode()
        else:
            latents = found.latent if hasattr(found, "latent") else found.latents
        latents = latents[:, :, 0] if self.frames else latents
        return (latents - self.shift.to(latents)) * self.scale.to(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        decode: Any = self.vae.decode
        latents = latents / self.scale.to(latents) + self.shift.to(latents)
        images: Tensor = decode(latents[:, :, None] if self.frames else latents).sample
        images = images[:, :, 0] if self.frames else images
        return 2 * images - 1 if self.low == 0 else images

    def _in_parts(self, change: Any, x: Tensor, pixels: int) -> Tensor:
        step = max(1, PIXELS // pixels)
        with self._at(x.device) as device, torch.autocast(x.device.type, enabled=False):
            parts = [change(x[i : i + step].to(device, torch.float32)).to(x.device) for i in range(0, len(x), step)]
        return torch.cat(parts)

    @contextlib.contextmanager
    def _at(self, device: torch.device) -> Iterator[torch.device]:
        """The autoencoder there for a while."""
        origin = device_of(self.vae)
        if origin == device:
            yield origin
            return
        try:
            with torch.inference_mode(False):  # whose tensors could never have gradients again
                self.vae.to(device)
            yield device
        finally:
            with torch.inference_mode(False):
                self.vae.to(origin)


def _check(x: Any, what: str, channels: int) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not len(x):
        found = f"{what} are {tuple(x.shape)}" if isinstance(x, Tensor) else f"{what}={shown(x)}"
        raise GddlabError(f"{found}: this codec takes a tensor, (n, {channels}, height, width)")


def _exact(vae: Any) -> nn.Module:
    """In float32, since half precision overflows in SDXL's: a copy, where it is not, or its weights are elsewhere."""
    if number_type(vae) == torch.float32 and not vae.training and not is_offloaded(vae):
        own: nn.Module = vae
        return own
    with torch.random.fork_rng(devices=[]):
        fresh: nn.Module = type(vae).from_config(vae.config)
    fresh.load_state_dict(weights_of(vae))
    return fresh.float().eval().requires_grad_(False)
