"""Samplers against the numbers of the reference implementation, on the networks of the network cases."""

from __future__ import annotations

import torch

from gddlab.sampling import ImageNoise, Sampler, integrate
from tests.golden.conftest import ROOT, Case
from tests.golden.test_networks import build


def test_sampler(case: Case) -> None:
    net = build(Case(ROOT / "networks" / case.meta["network"]))
    for name, call in case.meta["cases"].items():
        arguments = {"steps" if k == "num_steps" else k: v for k, v in call["arguments"].items()}
        assert call["function"] in ("edm_sampler", "ablation_sampler")
        noise = ImageNoise(case["seeds"].tolist(), case["latents"].shape[1:])
        z = noise(torch.float32)
        assert torch.equal(z, case["latents"])
        with torch.inference_mode():
            y = integrate(net, z, case.get("class_labels"), Sampler(**arguments), noise=noise)
        expected = case[f"y/{name}"]
        assert y.dtype == expected.dtype == torch.float64
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max(), name
