"""Layers of StyleGAN2's networks: equalised convolutions and linear layers, low-pass filter, minibatch standard deviation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conv", "Linear", "group_size", "low_pass", "minibatch_std"]

TAPS = (1.0, 3.0, 3.0, 1.0)
"""Low-pass filter before down-sampling, in each direction."""


def group_size(batch: int, group: int) -> int:
    """Images in a group of the minibatch deviation: `group`, or the largest divisor of the batch below."""
    return max(n for n in range(1, min(group, batch) + 1) if batch % n == 0)


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Appends the minibatch standard deviation as one channel (Karras et al. 2018, section 3).

    Each group is of CONSECUTIVE images (StyleGAN2 strides them over the batch), so that the split of a batch over processes, or over
    the pieces of gradient accumulation, changes nothing while the group divides each part. It has `group` images, or where that is no divisor
    of the batch, the largest divisor below.

    Args:
        x: (B, C, H, W).
        group: Images in a group.

    Returns:
        (B, C + 1, H, W): the deviation over the group, its mean over channels and pixels, the same for the group's images.
    """
    b, _, h, w = x.shape
    size = group_size(b, group)
    var = x.unflatten(0, (-1, size)).var(1, correction=0)  # (B / size, C, H, W)
    std = (var + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(size)
    return torch.cat([x, std[:, None, None, None].expand(-1, 1, h, w)], 1)


class Conv(nn.Module):
    """Equalised convolution: weights are N(0, 1), divided by sqrt(fan-in) at run time (Karras et al. 2018, section 4.1).

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
    """Equalised linear layer; `lr` multiplies its learning rate (Karras et al. 2019, appendix C).  (B, in) -> (B, out)"""

    def __init__(self, cin: int, cout: int, *, act: bool = True, lr: float = 1.0):
        super().__init__()
        self.act, self.lr = act, lr
        self.weight = nn.Parameter(torch.randn(cout, cin) / lr)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight * (self.lr / math.sqrt(self.weight.shape[1])), self.bias * self.lr)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.act else y
