"""Spectral normalisation under autocast, in both memory formats, against autograd's own rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gddlab.distill.projected import SNConv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalisation_is_the_formula(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = SNConv2d(6, 8, 4).double().to(memory_format=layout)
    w, u, v = (t.detach().clone().contiguous() for t in (conv.weight_orig, conv.weight_u, conv.weight_v))
    rows = w.flatten(1).requires_grad_(True)
    with torch.no_grad():
        v = F.normalize(rows.t() @ u, dim=0)
        u = F.normalize(rows @ v, dim=0)
    expected = (rows / torch.dot(u, rows @ v)).view(8, 6, 4, 4)
    slope = torch.randn(8, 6, 4, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(expected, rows, slope)
    got = conv.weight()
    got.backward(slope)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_close(conv.weight_orig.grad, grad.view(8, 6, 4, 4), rtol=1e-12, atol=1e-12)
    assert_close((conv.weight_u, conv.weight_v), (u, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_stay_float32_under_autocast(layout: torch.memory_format) -> None:
    """So that R1's pass without autocast can follow one with it, and a checkpoint's buffers keep their dtype."""
    torch.manual_seed(0)
    conv = SNConv2d(6, 8, 4).to(memory_format=layout)
    x = torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.weight_u.dtype == conv.weight_v.dtype == torch.float32
    assert conv(x).dtype == torch.float32
