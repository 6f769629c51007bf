"""Networks against the numbers of the reference implementation: names, shapes, outputs, and the RMS of every layer."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from gddlab.nets import from_edm
from gddlab.nets.precond import Precond
from gddlab.probing import Probe
from tests.golden.conftest import Case, fill


def build(case: Case) -> Precond:
    net = from_edm(case.meta["precond"], **case.meta["init_kwargs"]).eval()
    params = {k: fill(case.meta["seed"], k, tuple(s)) for k, s in case.meta["params"].items()}
    assert [(k, list(p.shape)) for k, p in sorted(net.named_parameters())] == sorted(
        (k, s) for k, s in case.meta["params"].items()
    )
    net.load_state_dict(params | case.prefixed("buffer/"), strict=True)
    return net


def test_network(case: Case) -> None:
    net = build(case)
    names = list(case.meta["rms"])
    # The two images have noise levels of their own; for the probe they are rows of one image, so that each keeps its
    # value.
    with torch.no_grad(), Probe(net, [2.0, 1.0], layers=names, stats="rms") as measure, measure.images(1):
        y = net(case["x"], case["sigma"], case.get("class_labels"), case.get("augment_labels"))
    assert (y - case["y"]).abs().max() <= 1e-4 * case["y"].abs().max()
    for name, expected in case.meta["rms"].items():
        rms = measure.statistics[name]["rms"].result()[0].float()
        assert_close(rms, torch.tensor(expected), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
