"""`Call`: what the arguments of a network are called, and in which form it takes rows, time, conditioning and guidance.

The table `CALLS` knows classes of diffusers by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, shown, unknown
from gddlab.nets.path import Path

Branch = Literal["cond", "uncond"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a network is called, by keyword, as `network(sample=..., timestep=..., **conditioning)`.

    Its answer is a tensor, a tuple that begins with one, or an object that holds one as `sample`. Channels beyond those
    of the input, a learned variance, are ignored.

    Attributes:
        sample: Argument of the noisy images, (B, C, H, W).
        time: Argument of the time, (B,) float32.
        labels: Argument of class ids, (B,) int64; "" where there are no classes.
        null: Class id that stands for no class; None where there is none.
        order: Guidance branches in the order of their rows in one call, or of their calls.
        doubled: Whether guidance is one call of both branches' rows; otherwise each branch has its own.
        guide_channels: How many channels are guided, the first ones; the others are those of "cond". None means all.
        rescale: Whether the guided answer is given the norm of that of "cond", along the last axis of what the network
            answers, as the pipelines of Qwen-Image and Lumina 2 do.
        needs: Arguments without which it does not run, dotted where they are entries of a dictionary.
        shared: Arguments that are one for all images, whatever their shape.
        patch: Side of the square that is one token, where images come as tokens (B, H/p W/p, C p p); 1 where they come
            as images.
        places: Argument that says where such tokens are: "img_ids", rows and columns of each, with `txt_ids` for the
            text; or "img_shapes", [(1, H/p, W/p)] for each image.
        scale: Argument of the guidance scale, (B,), of a network that was distilled with guidance; "" otherwise.
        time_scale: Factor of the time that a flow scheduler gives.
        reversed: Whether time and answer run from noise to image, see `Path`.
        casts_time: Whether it rounds the time to its own precision before it is embedded.
    """

    sample: str = "sample"
    time: str = "timestep"
    labels: str = ""
    null: int | None = None
    order: tuple[Branch, Branch] = ("uncond", "cond")
    doubled: bool = True
    guide_channels: int | None = None
    rescale: bool = False
    needs: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    patch: int = 1
    places: Literal["img_ids", "img_shapes"] = "img_ids"
    scale: str = ""
    time_scale: float = 1.0
    reversed: bool = False
    casts_time: bool = False

    def __post_init__(self) -> None:
        for name in ("needs", "shared"):
            names = getattr(self, name)
            object.__setattr__(self, name, (names,) if isinstance(names, str) else tuple(names))
        single = {name: (getattr(self, name),) for name in ("sample", "time", "labels", "scale")}
        for name, arguments in {**single, "needs": self.needs, "shared": self.shared}.items():
            for value in arguments:
                if not isinstance(value, str) or (name in ("sample", "time") and not value):
                    raise GddlabError(f"{name}={shown(value)}: give the name of an argument")
        whole = {"patch": self.patch, "null": self.null, "guide_channels": self.guide_channels}
        for name, number in whole.items():
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
                raise GddlabError(f"{name}={shown(number)}: give a whole number")
        if not isinstance(self.time_scale, int | float) or not 0 < self.time_scale < math.inf:
            raise GddlabError(f"time_scale={shown(self.time_scale)}: give a number above 0")
        if sorted(self.order) != ["cond", "uncond"]:
            raise GddlabError(f'order={self.order}: give ("uncond", "cond") or ("cond", "uncond")')
        if self.places not in (known := ("img_ids", "img_shapes")):
            raise unknown("places", self.places, known)
        if self.patch < 1:
            raise GddlabError(f"patch={self.patch}: give at least 1")

    @classmethod
    def of(cls, network: nn.Module) -> Call | None:
        """That of a class of `CALLS`, by its name and configuration; None for others.

        Raises:
            GddlabError: A configuration that is called in another way.
        """
        known = _known(network)
        return None if known is None else known.call(network.config)

    def path(self, path: Path) -> Path:
        """A scheduler's path in this network's own time."""
        if path.kind != "flow":
            return path
        return dataclasses.replace(path, time_scale=path.time_scale * self.time_scale, reversed=self.reversed)

    def pack(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Images as the network takes them.  (B, C, H, W) -> itself or (B, H/p W/p, C p p)"""
        if self.patch == 1:
            return x
        b, c, h, w = x.shape
        if h % self.patch or w % self.patch:
            raise GddlabError(f"images of {h} x {w}: this network takes multiples of {self.patch}")
        return (
            x.unflatten(3, (-1, self.patch))
            .unflatten(2, (-1, self.patch))
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(b, -1, c * self.patch**2)
        )

    def unpack(self, tokens: Tensor, shape: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
        """The inverse of `pack` for images (C, H, W); without channels beyond C."""
        c, h, w = shape
        if self.patch == 1:
            return tokens[:, :c]
        p = self.patch
        squares = tokens.reshape(len(tokens), h // p, w // p, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(len(tokens), -1, h, w)[:, :c]


@dataclass(frozen=True)
class Known:
    """A class of `CALLS`: its call and shapes, from its configuration, and whether it works on latents."""

    call: Callable[[Any], Call]
    latent: bool = True


@dataclass(frozen=True)
class Shape:
    """Channels, side in pixels or latents (None where it is not known) and classes of a known network."""

    channels: int
    side: int | None
    classes: int


def _known(network: nn.Module) -> Known | None:
    return next((CALLS[c.__name__] for c in type(network).__mro__ if c.__name__ in CALLS), None)


def is_known(network: nn.Module) -> bool:
    """Whether it is of a class of `CALLS`."""
    return _known(network) is not None


def is_latent(network: nn.Module) -> bool:
    """Whether it is of a known class that works on latents."""
    known = _known(network)
    return known is not None and known.latent


def shape_of(network: nn.Module, call: Call) -> Shape:
    """Shape of the images of a class of `CALLS`.

    Raises:
        GddlabError: A network that takes more than noisy images, or oblong ones.
    """
    config: Any = network.config
    taken = config.in_channels
    given = getattr(config, "out_channels", None) or taken
    if call.places == "img_shapes":  # where channels in are those of a token, and channels out those of an image
        given *= config.patch_size**2
    if given not in (taken, 2 * taken):
        raise GddlabError(
            f"out_channels={given} with in_channels={taken}: neither an image nor an image and a variance, "
            "give denoise="
        )
    size: Any = getattr(config, "sample_size", None) if call.patch == 1 else None
    sides = sorted(set(size)) if isinstance(size, list | tuple) else [size or None]
    if len(sides) > 1:
        raise GddlabError(f"sample_size={tuple(size)}: images here are square, give denoise= and img_resolution=")
    return Shape(taken // call.patch**2, sides[0], class_count(network) if call.labels else 0)


def class_count(network: nn.Module) -> int:
    """Number of classes that a diffusers network's configuration says; 0 where it says none."""
    config = getattr(network, "config", None)
    return int(getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None) or 0)


# The classes. `needs` and refusals follow from their configurations.


def _unet2d(config: Any) -> Call:
    if config.time_embedding_type != "positional":
        raise GddlabError(
            f"time_embedding_type={config.time_embedding_type!r} takes no fractional timesteps: give denoise="
        )
    if config.class_embed_type is not None:
        raise GddlabError(f"class_embed_type={config.class_embed_type!r} takes no class ids: give denoise=")
    return Call(labels="class_labels" if config.num_class_embeds else "")


def _unet2d_condition(config: Any) -> Call:
    needs = ["encoder_hidden_states"]
    if config.addition_embed_type == "text_time":
        needs += ["added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"]
    if config.class_embed_type is not None or config.num_class_embeds:
        needs.append("class_labels")
    distilled = config.time_cond_proj_dim is not None  # latent consistency models: the scale's embedding is an input
    if distilled:
        needs.append("timestep_cond")
    return Call(needs=tuple(needs), scale="timestep_cond" if distilled else "")


def _dit(config: Any) -> Call:
    return Call(
        sample="hidden_states", labels="class_labels", null=config.num_embeds_ada_norm, order=("cond", "uncond")
    )


def _pixart(config: Any) -> Call:
    sizes = ("added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio")
    adds = config.use_additional_conditions
    if adds is None:  # the network's own rule
        adds = config.sample_size == 128
    return Call(sample="hidden_states", needs=("encoder_hidden_states", *(sizes if adds else ())))


def _sana(config: Any) -> Call:
    if getattr(config, "guidance_embeds", False):
        raise GddlabError(
            "a Sana network with guidance_embeds (Sprint) is of TrigFlow, whose path is not known here: give denoise="
        )
    return Call(sample="hidden_states", needs=("encoder_hidden_states",), time_scale=float(config.timestep_scale))


def _sd3(config: Any) -> Call:
    return Call(sample="hidden_states", needs=("encoder_hidden_states", "pooled_projections"))


def _flux(config: Any) -> Call:
    return Call(
        sample="hidden_states",
        needs=("encoder_hidden_states", "pooled_projections"),
        shared=("img_ids", "txt_ids"),
        order=("cond", "uncond"),
        doubled=False,
        patch=2,
        scale="guidance" if config.guidance_embeds else "",
        time_scale=1e-3,
        casts_time=True,
    )


def _auraflow(config: Any) -> Call:
    return Call(sample="hidden_states", needs=("encoder_hidden_states",), time_scale=1e-3)


def _lumina2(config: Any) -> Call:
    return Call(
        sample="hidden_states",
        needs=("encoder_hidden_states", "encoder_attention_mask"),
        order=("cond", "uncond"),
        doubled=False,
        rescale=True,
        time_scale=1e-3,
        reversed=True,
    )


def _qwen(config: Any) -> Call:
    if odd := [n for n in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope") if getattr(config, n, False)]:
        raise GddlabError(f"a Qwen-Image network with {odd[0]} is given more than one image: give denoise=")
    return Call(
        sample="hidden_states",
        needs=("encoder_hidden_states",),
        order=("cond", "uncond"),
        doubled=False,
        rescale=True,
        patch=config.patch_size,
        places="img_shapes",
        scale="guidance" if config.guidance_embeds else "",
        time_scale=1e-3,
        casts_time=True,
    )


def _zimage(config: Any) -> Call:
    raise GddlabError(
        'a ZImageTransformer2DModel takes lists of tensors: give denoise= and cond=, as under "Z-Image" on the page '
        '"Your model" of the guide'
    )


CALLS: Mapping[str, Known] = {
    "UNet2DModel": Known(_unet2d, latent=False),
    "UNet2DConditionModel": Known(_unet2d_condition),
    "DiTTransformer2DModel": Known(_dit),
    "PixArtTransformer2DModel": Known(_pixart),
    "SanaTransformer2DModel": Known(_sana),
    "SD3Transformer2DModel": Known(_sd3),
    "FluxTransformer2DModel": Known(_flux),
    "AuraFlowTransformer2DModel": Known(_auraflow),
    "Lumina2Transformer2DModel": Known(_lumina2),
    "QwenImageTransformer2DModel": Known(_qwen),
    "ZImageTransformer2DModel": Known(_zimage),
}
"""Networks of diffusers by class name."""
