"""StyleGAN2's discriminator, trained from the first layer (Karras et al. 2020a), sized as StyleGAN2-ADA's (2020b)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tyro.conf import Suppress

from gddlab.distill.parts import Discriminator, DiscriminatorPart
from gddlab.errors import GddlabError
from gddlab.nets import Precond
from gddlab.pretrained.files import SUFFIXES, fit_state, read_state

TAPS = (1.0, 3.0, 3.0, 1.0)
"""Low-pass filter before down-sampling, in each direction."""


def group_size(batch: int, group: int) -> int:
    """Images in a group of the minibatch deviation: `group`, or the largest divisor of the batch below it."""
    return max(n for n in range(1, min(group, batch) + 1) if batch % n == 0)


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Appends the minibatch standard deviation as one channel (Karras et al. 2018, section 3).

    Each group is of CONSECUTIVE images (StyleGAN2 strides them over the batch), so that dividing a batch over
    processes, or over micro-batches, changes nothing while the group divides each part. It has `group_size` images.

    Args:
        x: (B, C, H, W).
        group: Images in a group.

    Returns:
        (B, C + 1, H, W): the deviation over the group, mean over channels and pixels, the same for the group's images.
    """
    b, _, h, w = x.shape
    size = group_size(b, group)
    var = x.unflatten(0, (-1, size)).var(1, correction=0)  # (B / size, C, H, W)
    std = (var + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(size)
    return torch.cat([x, std[:, None, None, None].expand(-1, 1, h, w)], 1)


class Conv(nn.Module):
    """Equalised convolution: weights N(0, 1), divided by sqrt(fan-in) at run time (Karras et al. 2018, section 4.1).

    `down` low-passes and halves; `act` is a leaky ReLU 0.2 with gain sqrt 2; `gain` multiplies the result.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        *,
        down: bool = False,
        act: bool = True,
        bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.down, self.act, self.kernel = down, act, kernel
        self.gain = gain * (math.sqrt(2) if act else 1.0)
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None
        self.register_buffer("resample_filter", low_pass())  # in every layer of published state dicts, used or not
        self.resample_filter: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # The leaky ReLU is positively homogeneous: its gain is cheaper on weights than on activations.
        w = self.weight * (self.gain / math.sqrt(self.weight[0].numel()))
        b = None if self.bias is None else self.bias * self.gain
        if not self.down:
            y = F.conv2d(x, w, b, padding=self.kernel // 2)
        elif self.kernel == 1:  # low-passed only where it is sampled
            y = F.conv2d(self._filtered(x, 2), w, b)
        else:
            y = F.conv2d(self._filtered(x, 1), w, b, stride=2)
        return F.leaky_relu(y, 0.2) if self.act else y

    def _filtered(self, x: Tensor, stride: int) -> Tensor:
        c = x.shape[1]
        taps = self.resample_filter.flip(0, 1).expand(c, 1, -1, -1)
        return F.conv2d(x, taps, stride=stride, padding=1 + self.kernel // 2, groups=c)


def low_pass() -> Tensor:
    """The low-pass filter of published state dicts, (4, 4), sum 1."""
    taps = torch.tensor(TAPS)
    return torch.outer(taps, taps) / taps.sum() ** 2


class Linear(nn.Module):
    """Equalised linear layer; `lr` scales its learning rate (Karras et al. 2019, appendix C).  (B, in) -> (B, out)"""

    def __init__(self, cin: int, cout: int, *, act: bool = True, lr: float = 1.0):
        super().__init__()
        self.act, self.lr = act, lr
        self.weight = nn.Parameter(torch.randn(cout, cin) / lr)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight * (self.lr / math.sqrt(self.weight.shape[1])), self.bias * self.lr)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.act else y


GROUP = 4
"""Images in a group of the minibatch standard deviation."""


class _Block(nn.Module):
    """Halves the resolution; `residual` adds a down-sampled skip with unit variance (Karras et al. 2020a, figure 7)."""

    def __init__(self, rgb: int, cin: int, cout: int, *, residual: bool):
        super().__init__()
        self.register_buffer("resample_filter", low_pass())
        self.fromrgb = Conv(rgb, cin, 1) if rgb else None
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv0 = Conv(cin, cin, 3)
        self.conv1 = Conv(cin, cout, 3, down=True, gain=gain)
        self.skip = Conv(cin, cout, 1, down=True, act=False, bias=False, gain=gain) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        y: Tensor = self.conv1(self.conv0(x))
        return y if self.skip is None else y + self.skip(x)


class _Epilogue(nn.Module):
    """4x4 maps -> (B, 1), or (B, out) to be multiplied by a class embedding."""

    def __init__(self, channels: int, out: int, group: int):
        super().__init__()
        self.group = group
        self.conv = Conv(channels + 1, channels, 3)
        self.fc = Linear(16 * channels, channels)
        self.out = Linear(channels, out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.fc(self.conv(minibatch_std(x, self.group)).flatten(1)))
        return y


class _Mapping(nn.Module):
    """One-hot labels -> embedding: a linear layer, normalised, then eight layers at 1/100 of the learning rate."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embed = Linear(classes, width, act=False)
        for i in range(8):
            self.add_module(f"fc{i}", Linear(width, width, lr=0.01))

    def forward(self, labels: Tensor) -> Tensor:
        x: Tensor = self.embed(labels.to(self.embed.weight.dtype))
        x = x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(8):
            x = self.get_submodule(f"fc{i}")(x)
        return x


class StyleGAN2Discriminator(Discriminator):
    """The residual discriminator of StyleGAN2; its state dict has the names of StyleGAN2-ADA's PyTorch release.

    Activations are not clamped, which only half precision needs. Conditional logits are inner products with a mapped
    class embedding (Miyato & Koyama 2018), / sqrt(width).

    Args:
        resolution: Side of the images, pixels: a power of two from 8 to 1024.
        channels: Of the images, 1 or 3.
        classes: Number of classes; 0 for an unconditional discriminator.
        channel_base: Width times resolution: layers at r x r have min(channel_base / r, channel_max) channels. None is
            StyleGAN2-ADA's automatic choice: 16384 below 512 pixels, else 32768.
        channel_max: Bound of the widths.
        mbstd_group_size: Images in a group of the minibatch standard deviation, see `minibatch_std`.
        weights: Path of a state dict (.safetensors, .pt, .pth) or of a StyleGAN2-ADA .pkl, read as data; None starts
            from scratch. Weights without skips (architecture "orig", as in the published CIFAR-10 networks) make a
            discriminator without them.

    Raises:
        GddlabError: Sizes that are not possible, or weights of another network.
    """

    def __init__(
        self,
        resolution: int,
        channels: int,
        *,
        classes: int = 0,
        channel_base: int | None = None,
        channel_max: int = 512,
        mbstd_group_size: int = GROUP,
        weights: str | Path | None = None,
    ):
        super().__init__()
        if not 8 <= resolution <= 1024 or resolution & (resolution - 1):
            raise GddlabError(
                f"resolution={resolution}: the StyleGAN2 discriminator takes powers of two from 8 to 1024"
            )
        if mbstd_group_size < 1:
            raise GddlabError(f"mbstd_group_size={mbstd_group_size}: give at least 1")
        self.resolution, self.channels, self.classes = resolution, channels, classes
        base = channel_base or (16384 if resolution < 512 else 32768)
        sizes = [resolution >> i for i in range(resolution.bit_length() - 2)]  # resolution, ..., 8, 4
        width = {r: max(1, min(base // r, channel_max)) for r in sizes}
        with torch.device("cpu"):  # also where the network itself is made on the meta device
            given = None if weights is None else _read(weights)
        if given is not None:
            self._check_images(given, weights)
        residual = given is None or any(name.endswith("skip.weight") for name in given)
        for r in sizes[:-1]:
            block = _Block(channels if r == resolution else 0, width[r], width[r // 2], residual=residual)
            self.add_module(f"b{r}", block)
        if classes:
            self.mapping = _Mapping(classes, width[4])
        self.b4 = _Epilogue(width[4], width[4] if classes else 1, mbstd_group_size)
        self._blocks = [f"b{r}" for r in sizes[:-1]]
        if given is not None:
            fit_state(self.state_dict(), given, weights, optional=("resample_filter",))
            if not self.b4.out.weight.is_meta:
                self.load_state_dict({**self.state_dict(), **given})

    def _check_images(self, given: dict[str, Tensor], weights: object) -> None:
        """Refuses weights for other images, the one mismatch that a name would not explain."""
        name = f"b{self.resolution}.fromrgb.weight"
        first = next((k for k in given if k.endswith("fromrgb.weight")), None)
        if first is None:
            raise GddlabError(f"{weights} holds no StyleGAN2 discriminator: it lacks {name}")
        if name not in given:
            raise GddlabError(f"{weights} is for other images: it has {first}, images of {self.resolution} need {name}")
        shape = tuple(given[name].shape)
        if len(shape) != 4 or shape[1] != self.channels:
            raise GddlabError(
                f"{weights} does not fit: {name} is {shape}, the images have {self.channels} channels; "
                "train from scratch"
            )

    def features(self, images: Tensor) -> list[Tensor]:
        """The images themselves, since everything is trained.

        Args:
            images: (B, channels, resolution, resolution) in [-1, 1].
        """
        expected = (self.channels, self.resolution, self.resolution)
        if images.shape[1:] != expected:
            raise GddlabError(f"images of {tuple(images.shape[1:])}: this discriminator takes {expected}")
        return [images]

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """One tensor (B, 1); labels are one-hot, (B, classes)."""
        x = features[0]
        for name in self._blocks:
            x = self.get_submodule(name)(x)
        y: Tensor = self.b4(x)
        if self.classes:
            assert labels is not None
            y = (y * self.mapping(labels)).sum(1, keepdim=True) / math.sqrt(y.shape[1])
        return [y]


def _read(weights: str | Path) -> dict[str, Tensor]:
    """The state dict of a file; of a StyleGAN2-ADA pickle, its D, over the file's own bytes."""
    path = Path(weights)
    if path.suffix != ".pkl":
        if path.is_file() and path.suffix not in SUFFIXES:
            raise GddlabError(f"{path}: give a state dict ({', '.join(SUFFIXES)}) or a StyleGAN2-ADA .pkl")
        return read_state(path)
    from gddlab.pickles import Record, Refused, printable
    from gddlab.teachers.edm import read_pickle, tensors_of

    content = read_pickle(path)
    net = content.get("D") if isinstance(content, dict) else None
    if not isinstance(net, Record):
        raise GddlabError(
            printable(f"{path} holds no discriminator (D): give a network-snapshot .pkl of StyleGAN2-ADA")
        )
    try:
        return {k: t.view() for k, t in tensors_of(net).items()}
    except (Refused, ValueError, RuntimeError) as e:
        raise GddlabError(printable(f"{path} is refused: {str(e).splitlines()[0][:200]}")) from None


class StyleGAN2(DiscriminatorPart):
    """StyleGAN2's residual discriminator, trained from its first layer; images of 8 to 1,024 pixels, a power of two."""

    kind: Suppress[Literal["stylegan2"]] = "stylegan2"
    """Name of this kind."""
    channel_max: int = Field(default=512, ge=1)
    """Bound of the layers' widths, channels."""
    weights: str | None = None
    """Initial weights: the path of a state dict or of a StyleGAN2-ADA .pkl; None starts from scratch."""

    def build(self, teacher: Precond, *, exact: bool = False) -> StyleGAN2Discriminator:
        return StyleGAN2Discriminator(
            teacher.img_resolution,
            teacher.img_channels,
            classes=teacher.label_dim,
            channel_max=self.channel_max,
            weights=self.weights,
        )

    def find(self) -> str:
        return f"stylegan2 discriminator ({self.weights or 'from scratch'})"

    def check(self, teacher: Precond, *, batch: int, held: int) -> None:
        size = group_size(batch, GROUP)
        if held % size:  # else the result would depend on how the batch is divided
            raise GddlabError(
                f"{held} of {batch} images at once with a StyleGAN2 discriminator, whose minibatch deviation is of "
                f"{size} images: give a multiple of {size}"
            )
        with torch.device("meta"):  # reads the weights and fits them to the images
            self.build(teacher)

    def stand_in(self) -> StyleGAN2:
        return self.model_copy(update={"weights": None})
