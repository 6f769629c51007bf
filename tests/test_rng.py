"""Seeds beyond 32 bits of shift are not lost."""

from __future__ import annotations

import torch

from gddlab.rng import generator


def test_seeds_and_positions_differ() -> None:
    draws = {float(torch.rand((), generator=generator(s, p))) for s in range(20) for p in range(20)}
    assert len(draws) == 400
    assert torch.equal(torch.rand(3, generator=generator(7, 5)), torch.rand(3, generator=generator(7, 5)))
