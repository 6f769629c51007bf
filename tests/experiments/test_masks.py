from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gddlab.experiments import masks
from gddlab.probing import ProbeResult


def test_what_is_measured_of_a_teacher_has_every_score(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(call: Callable[..., ProbeResult]) -> Callable[..., ProbeResult]:
        return lambda net, steps, **options: call(net, [80.0, 1.0], **{**options, "n": 2}, progress=False)

    for name in ("probe", "ablate"):
        called: Any = getattr(masks, name)
        monkeypatch.setattr(masks, name, few(called))
    measured = masks.measure(str(tiny_teacher), "digits")
    assert {"cosine", "correlation"} <= set(measured.result.stats)
    for name in masks.SCORES:
        mask = masks.measured_mask(measured, name)
        assert 0 < mask.fraction <= measured.rule.fraction, name
