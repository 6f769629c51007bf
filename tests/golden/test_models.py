"""Networks other than EDM's against the numbers of their authors' code: a check for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.testing import assert_close

from gddlab.nets import EDM2Precond, from_edm
from gddlab.probing import Probe
from tests.golden.conftest import Case, fill


def assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), what


# EDM2.


def edm2(case: Case, **changes: Any) -> EDM2Precond:
    net = from_edm(case.meta["precond"], **case.meta["init_kwargs"] | changes).eval()
    assert isinstance(net, EDM2Precond)
    params = {k: fill(case.meta["seed"], k, tuple(s)) for k, s in case.meta["params"].items()}
    assert {k: list(p.shape) for k, p in net.named_parameters()} == case.meta["params"]
    net.load_state_dict(params | case.prefixed("buffer/"), strict=True)
    return net


@torch.no_grad()
def check_edm2(case: Case) -> None:
    net = edm2(case)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    x, sigma, labels = case["x"], case["sigma"], case.get("class_labels")
    rms = dict(case.meta["rms"])
    logvar_rms = torch.tensor(rms.pop("logvar_linear"))  # of one number; it is no part of a pass
    # The two images have noise levels of their own; for the probe they are rows of one image.
    with Probe(net, [2.0, 1.0], layers=list(rms), stats="rms") as measure, measure.images(1):
        y = net(x, sigma, labels)
    assert_equal(y, case["y"], "y")
    for name, expected in rms.items():
        found = measure.statistics[name]["rms"].result()[0].float()
        assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if "y_no_label" in case.arrays:
        assert_equal(net(x, sigma), case["y_no_label"], "y_no_label")
    logvar = net.logvar(sigma)
    assert_equal(logvar.flatten(), case["logvar"].flatten(), "logvar")
    assert_close(logvar.abs().flatten(), logvar_rms.flatten(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())  # eval mode rewrites nothing

    net = edm2(case, dropout=0.0).train()
    assert_equal(net(x, sigma, labels), case["y_train_no_dropout"], "y_train_no_dropout")
    changed = [k for k, t in net.state_dict().items() if not torch.equal(t, before[k])]
    assert sorted(changed) == sorted(case.meta["rewritten_by_a_train_forward"])
    assert_equal(net.unet.out_conv.weight, case["out_conv_after_train_forward"], "out_conv")


CHECKS: dict[str, Callable[[Case], None]] = {"Precond": check_edm2}


def test_model(case: Case) -> None:
    CHECKS[case.meta.get("precond") or case.meta["cls"]](case)
