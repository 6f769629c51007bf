"""Two GDD iterations against the reference in float64: losses, R1, norms of gradients and parameters, images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close

from gddlab.distill.config import DTYPES, TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.projected import Projected, ProjectedDiscriminator
from gddlab.distill.step import GanStep
from gddlab.nets import OneStepPrecond, from_edm
from tests.golden.conftest import Case, fill

RTOL = 1e-6
Close = Callable[..., None]
"""Compares as `torch.testing.assert_close`: found, expected, rtol, atol, msg."""
BACKBONE = "tf_efficientnet_lite0"


def before_batchnorm(name: str) -> bool:
    """A convolution's bias before BatchNorm: its true gradient is 0."""
    return name.endswith(".main.0.bias")


CPU = torch.device("cpu")


def build(case: Case, device: torch.device = CPU, **fields: Any) -> GanStep:
    """The step of a case, in float64 unless `fields` of the configuration say otherwise."""
    m, dtype = case.meta, DTYPES[fields.get("precision", "float64")]
    g = from_edm("OneStepPrecond", **m["init_kwargs"]).double().eval()
    assert isinstance(g, OneStepPrecond)
    params = {k: fill(m["seed_g"], k, tuple(s)).double() for k, s in m["shapes"]["g"].items()}
    g.load_state_dict(params | case.prefixed("g_buffer/"), strict=True)
    classes = 1000 if m["cond"] else 0  # the reference's class embedding is ImageNet's
    d = ProjectedDiscriminator(Projected(cout=m["cout"]), classes=classes, fold=False).double()
    state = {}
    for k, s in m["shapes"]["d"].items():
        if "running" not in k and "num_batches" not in k:
            state[k] = fill(m["seed_d"], k, tuple(s)).double()
    for k, s in m["shapes"]["proj"].items():
        state[f"projections.{BACKBONE}.{k}"] = fill(m["seed_proj"], k, tuple(s)).double()
    missing, unexpected = d.load_state_dict(state, strict=False)
    assert not unexpected and all("running" in k or "num_batches" in k for k in missing)
    frozen = set(m["frozen"])
    for name, p in g.named_parameters():
        p.requires_grad_(name not in frozen)
    fields = {"lr_g": 1e-4, "lr_d": 1e-4, "adversarial_weight": 4, "r1_gamma": m["r1_gamma"], **fields}
    config = TrainConfig(run_dir=Path("unused"), loss=m["loss_type"], **fields)
    return GanStep(config, g.to(device, dtype), d.train().to(device, dtype), World(0, 1, device))


def check_grads(
    module: torch.nn.Module, expected: dict[str, float], frozen: set[str], close: Close = assert_close
) -> None:
    seen = 0
    for name, p in module.named_parameters():
        if name in expected and name not in frozen and not before_batchnorm(name):
            grad = torch.zeros(()) if p.grad is None else p.grad.norm()
            close(grad.item(), expected[name], rtol=RTOL, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            seen += 1
    assert seen > 30


def test_training(case: Case) -> None:
    check_training(case, CPU)


def check_training(case: Case, device: torch.device, close: Close = assert_close) -> None:
    """Compares two iterations on a device with the case."""
    s, m = build(case, device), case.meta
    case = case.to(device)
    frozen = set(m["frozen"])
    records = iter(m["records"])

    def check(stats: dict[str, torch.Tensor], names: dict[str, str], module: torch.nn.Module) -> None:
        record = next(records)
        for theirs, ours in names.items():
            close(stats[ours].item(), record["stats"][theirs], rtol=RTOL, atol=1e-12)
        check_grads(module, record["grad_norm"], frozen, close)

    for it in range(2):
        images, labels = case[f"img{it}"], case[f"lab{it}"] if m["cond"] else None
        out, _ = s.g_step(case[f"z{it}_0"], labels)
        check(out, {"Loss/logits/fake": "logits/g"}, s.g)
        out = s.d_step(s.fake_features(case[f"z{it}_1"], labels), s.real_features(images), labels)
        check(out, {"Loss/logits/real": "logits/real", "Loss/signs/real": "signs/real"}, s.d)
        if it == 1:
            out = s.r1_step(images, labels)
            check(out, {"Loss/r1_penalty": "r1", "Loss/D/r1_loss": "loss/r1"}, s.d)

    for module, key in ((s.g, "g"), (s.d, "d")):
        state = module.state_dict()
        for name, norm in m["norms_after"][key].items():
            if name in state and not before_batchnorm(name):
                close(
                    state[name].double().norm().item(), norm, rtol=RTOL, atol=1e-12, msg=lambda e, n=name: f"{n}: {e}"
                )
    with torch.no_grad():
        labels = torch.eye(s.g.label_dim, dtype=torch.float64, device=device)[:2] if m["cond"] else None
        close(s.g.generate(case["gen_z"], labels), case["gen_x"], rtol=1e-5, atol=1e-6)
        last = m["records"][-1]
        features = s.d.features(case["feat_in"])
        for i, f in enumerate(features):
            assert list(f.shape) == last["feature_shape"][0][str(i)]
            close(f.square().mean().sqrt().item(), last["feature_rms"][0][str(i)], rtol=RTOL, atol=0)
