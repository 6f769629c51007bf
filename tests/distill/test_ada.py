"""ADA's controller: its speed, its bounds, where it settles, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gddlab.distill.augment import AdaController
from gddlab.errors import GddlabError


def signs(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def run(c: AdaController, values: list[float], batch: int = 256) -> list[float]:
    seen = []
    for v in values:
        c.observe(signs(v))
        c.update(batch)
        seen.append(c.p.item())
    return seen


def test_p_goes_from_zero_to_one_in_the_given_number_of_images_and_back() -> None:
    c = AdaController(0.6, speed_kimg=500)
    up = run(c, [1.0] * 500, batch=1000)
    assert_close(up[3::4], [(i + 1) * 0.008 for i in range(125)])
    assert_close(up[249], 0.496)  # 248 of the 250 iterations were counted by a step
    assert up[498] < 1 and up[499] == 1
    assert run(c, [1.0] * 8, batch=1000)[-1] == 1
    down = run(c, [0.0] * 504, batch=1000)
    assert down[0] == 1 and down[3] == pytest.approx(0.992) and down[-1] == 0


def test_a_step_every_interval_by_the_mean_of_the_signs() -> None:
    c = AdaController(0.6, interval=4, speed_kimg=1.024)
    assert run(c, [1.0, 1.0, 0.3, 0.2], 64) == [0, 0, 0, 0.25]  # mean 0.625
    assert run(c, [1.0, 1.0, 0.3, 0.0], 64) == [0.25, 0.25, 0.25, 0]  # mean 0.575: the last interval is forgotten
    assert run(AdaController(0.5, interval=1), [0.5, 0.5]) == [0, 0]


def test_p_settles_where_the_signs_meet_the_target() -> None:
    c = AdaController(0.6, interval=4, speed_kimg=500)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.05
    seen = []
    for n in noise:
        c.observe(0.9 - 0.75 * c.p + n)  # meets 0.6 at p = 0.4
        c.update(1000)
        seen.append(c.p.item())
    assert all(abs(p - 0.4) < 0.06 for p in seen[400:])
    assert sum(seen[400:]) / 1600 == pytest.approx(0.4, abs=0.01)


def test_state_in_mid_interval_continues_bit_for_bit() -> None:
    values = torch.rand(203, generator=torch.Generator().manual_seed(1)).tolist()
    whole, first, second = (AdaController(0.5, interval=4, speed_kimg=20) for _ in range(3))
    expected = run(whole, values)
    run(first, values[:102])
    assert first.count.item() == 2
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert sorted(state) == ["count", "p", "sum"]
    second.load_state_dict(state)
    assert run(second, values[102:]) == expected[102:]
    assert len(set(expected)) > 5
    for k, v in AdaController().state_dict().items():  # the same form at every step
        assert v.shape == state[k].shape == () and v.dtype == state[k].dtype == torch.float64


def test_the_same_tensor_holds_p_throughout() -> None:
    c = AdaController()
    p = c.p
    run(c, [1.0] * 8)
    assert p is c.p and p.item() > 0


def test_means_over_processes_are_taken_by_the_given_function() -> None:
    c = AdaController(0.6, interval=1, speed_kimg=1, mean=lambda t: (t + 0.0) / 2)  # the other process saw zeros
    assert run(c, [1.0], 100) == [0]
    c = AdaController(0.4, interval=1, speed_kimg=1, mean=lambda t: (t + 0.0) / 2)
    assert run(c, [1.0], 100) == [0.1]


def test_signs_that_are_no_number_leave_p_as_it_stands() -> None:
    c = AdaController(interval=1, speed_kimg=1)
    assert run(c, [1.0, float("nan"), 1.0], 100) == [0.1, 0.1, 0.2]


def test_the_host_never_waits() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        c = AdaController()
        c.observe(torch.empty(()))
        c.update(64)


def test_bad_input_is_refused() -> None:
    with pytest.raises(GddlabError, match=r"target=1\.0"):
        AdaController(1.0)
    with pytest.raises(GddlabError, match="interval=0"):
        AdaController(interval=0)
    with pytest.raises(GddlabError, match=r"speed_kimg=0"):
        AdaController(speed_kimg=0)
