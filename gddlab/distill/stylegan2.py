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

from gddlab.distill.parts import Discriminator, DiscriminatorPart, FileName
from gddlab.errors import GddlabError
from gddlab.nets import Precond
from gddlab.pretrained.published import fit_state, read_state

GROUP = 4
"""Images in a group of the minibatch standard deviation."""


def group_size(batch: int) -> int:
    """Images in a group of the minibatch deviation: `GROUP`, or the largest divisor of the batch below it."""
    return max(n for n in range(1, min(GROUP, batch) + 1) if batch % n == 0)


def minibatch_std(x: Tensor) -> Tensor:
    """Appends the minibatch standard deviation as one channel (Karras et al. 2018, section 3).

    It is the deviation over a group, mean over channels and pixels. Each group is of CONSECUTIVE images (StyleGAN2
    strides them over the batch), so that dividing a batch over processes, or over micro-batches, changes nothing while
    the group divides each part.  (B, C, H, W) -> (B, C + 1, H, W)
    """
    b, _, h, w = x.shape
    size = group_size(b)
    var = x.unflatten(0, (-1, size)).var(1, correction=0)  # (B / size, C, H, W)
    std = (var + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(size)
    return torch.cat([x, std[:, None, None, None].expand(-1, 1, h, w)], 1)


def low_pass() -> Tensor:
    """The low-pass filter of published state dicts, (4, 4), sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / taps.sum() ** 2


class Conv(nn.Module):
    """Equalised convolution: weights N(0, 1), divided by sqrt(fan-in) at run time (Karras et al. 2018, section 4.1).

    `down` low-passes and halves; `act` adds a bias and a leaky ReLU 0.2 with gain sqrt 2; `gain` multiplies the result.
    """

    def __init__(self, cin: int, cout: int, kernel: int, *, down: bool = False, act: bool = True, gain: float = 1.0):
        super().__init__()
        self.down, self.act, self.kernel = down, act, kernel
        self.gain = gain * (math.sqrt(2) if act else 1.0)
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout)) if act else None
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


class _Block(nn.Module):
    """Halves the resolution; `residual` adds a down-sampled skip with unit variance (Karras et al. 2020a, figure 7)."""

    def __init__(self, rgb: int, cin: int, cout: int, *, residual: bool):
        super().__init__()
        self.register_buffer("resample_filter", low_pass())
        self.fromrgb = Conv(rgb, cin, 1) if rgb else None
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv0 = Conv(cin, cin, 3)
        self.conv1 = Conv(cin, cout, 3, down=True, gain=gain)
        self.skip = Conv(cin, cout, 1, down=True, act=False, gain=gain) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        y: Tensor = self.conv1(self.conv0(x))
        return y if self.skip is None else y + self.skip(x)


class _Epilogue(nn.Module):
    """4x4 maps -> (B, 1), or (B, out) to be multiplied by a class embedding."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = Conv(channels + 1, channels, 3)
        self.fc = Linear(16 * channels, channels)
        self.out = Linear(channels, out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.fc(self.conv(minibatch_std(x)).flatten(1)))
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

    Layers at r x r have min(16384 / r, channel_max) channels, from 512 pixels 32768 / r (StyleGAN2-ADA's automatic
    choice). Activations are not clamped, which only half precision needs. Conditional logits are inner products with a
    mapped class embedding (Miyato & Koyama 2018), / sqrt(width). Weights without skips (architecture "orig", as in the
    published CIFAR-10 networks) make a discriminator without them.

    Args:
        part: Widths and weights.
        resolution: Side of the images, pixels: a power of two from 8 to 1024.
        channels: Of the images, 1 or 3.
        classes: Number of classes; 0 for an unconditional discriminator.

    Raises:
        GddlabError: Sizes that are not possible, or weights of another network.
    """

    def __init__(self, part: StyleGAN2, resolution: int, channels: int, *, classes: int = 0):
        super().__init__()
        if not 8 <= resolution <= 1024 or resolution & (resolution - 1):
            raise GddlabError(
                f"resolution={resolution}: the StyleGAN2 discriminator takes powers of two from 8 to 1024"
            )
        self.classes = classes
        base = 16384 if resolution < 512 else 32768
        sizes = [resolution >> i for i in range(resolution.bit_length() - 2)]  # resolution, ..., 8, 4
        width = {r: min(base // r, part.channel_max) for r in sizes}
        with torch.device("cpu"):  # also where the network itself is made on the meta device
            given = None if part.weights is None else _read(part.weights)
        residual = given is None or any(name.endswith("skip.weight") for name in given)
        for r in sizes[:-1]:
            block = _Block(channels if r == resolution else 0, width[r], width[r // 2], residual=residual)
            self.add_module(f"b{r}", block)
        if classes:
            self.mapping = _Mapping(classes, width[4])
        self.b4 = _Epilogue(width[4], width[4] if classes else 1)
        self._blocks = [f"b{r}" for r in sizes[:-1]]
        if given is not None:
            fit_state(self.state_dict(), given, part.weights, optional=("resample_filter",))
            if not self.b4.out.weight.is_meta:
                self.load_state_dict({**self.state_dict(), **given})

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
    weights: FileName | None = None
    """Initial weights: the path of a state dict or of a StyleGAN2-ADA .pkl; None starts from scratch."""

    def build(self, teacher: Precond, *, exact: bool = False) -> StyleGAN2Discriminator:
        return StyleGAN2Discriminator(self, teacher.img_resolution, teacher.img_channels, classes=teacher.label_dim)

    def find(self) -> str:
        return f"stylegan2 discriminator ({self.weights or 'from scratch'})"

    def check(self, teacher: Precond, *, batch: int, held: int) -> None:
        size = group_size(batch)
        if held % size:  # else the result would depend on how the batch is divided
            raise GddlabError(
                f"{held} of {batch} images at once with a StyleGAN2 discriminator, whose minibatch deviation is of "
                f"{size} images: give a multiple of {size}"
            )
        with torch.device("meta"):  # reads the weights and fits them to the images
            self.build(teacher)

    def stand_in(self) -> StyleGAN2:
        return self.model_copy(update={"weights": None})
