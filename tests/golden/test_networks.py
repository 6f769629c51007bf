"""Networks against the numbers of the reference implementation: names, shapes, outputs, and the RMS of every layer."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from gddlab.nets import from_edm
from gddlab.nets.precond import Precond
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
    rms: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
            rms[name] = out.square().mean((1, 2, 3)).sqrt()

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in net.named_modules() if n in case.meta["rms"]]
    with torch.no_grad():
        y = net(case["x"], case["sigma"], case.get("class_labels"), case.get("augment_labels"))
    for h in handles:
        h.remove()
    assert (y - case["y"]).abs().max() <= 1e-4 * case["y"].abs().max()
    for name, expected in case.meta["rms"].items():
        assert_close(rms[name], torch.tensor(expected), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
