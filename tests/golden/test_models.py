"""Networks other than EDM's against the numbers of their authors' code: a check for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.nets import Call, EDM2Precond, Precond, from_edm
from gddlab.probing import Probe
from gddlab.teachers import wrap
from tests.golden.conftest import Case, fill


def near(got: Tensor, expected: Tensor, what: str = "") -> None:
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
    near(y, case["y"], "y")
    for name, expected in rms.items():
        found = measure.statistics[name]["rms"].result()[0].float()
        assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if "y_no_label" in case.arrays:
        near(net(x, sigma), case["y_no_label"], "y_no_label")
    logvar = net.logvar(sigma)
    near(logvar.flatten(), case["logvar"].flatten(), "logvar")
    assert_close(logvar.abs().flatten(), logvar_rms.flatten(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())  # eval mode rewrites nothing

    net = edm2(case, dropout=0.0).train()
    near(net(x, sigma, labels), case["y_train_no_dropout"], "y_train_no_dropout")
    changed = [k for k, t in net.state_dict().items() if not torch.equal(t, before[k])]
    assert sorted(changed) == sorted(case.meta["rewritten_by_a_train_forward"])
    near(net.unet.out_conv.weight, case["out_conv_after_train_forward"], "out_conv")


# DiT and SiT.

ARGUMENTS = {  # in our words
    "input_size": "img_resolution",
    "in_channels": "img_channels",
    "num_classes": "label_dim",
    "class_dropout_prob": "label_dropout",
    "hidden_size": "model_channels",
    "depth": "num_blocks",
}


def transformer(case: Case) -> Precond:
    kwargs = {ARGUMENTS.get(k, k): v for k, v in case.meta["init_kwargs"].items()}
    net = from_edm("DiTPrecond", kind=case.meta["cls"].lower(), **kwargs).eval()
    assert [(k, list(p.shape)) for k, p in sorted(net.model.named_parameters())] == sorted(
        (k, s) for k, s in case.meta["params"].items()
    )
    places = case.prefixed("buffer/")["pos_embed"].reshape(net.model.pos_embed.shape)
    assert_close(net.model.pos_embed.data, places)
    params = {k: fill(case.meta["seed"], k, tuple(s)) for k, s in case.meta["params"].items()}
    net.model.load_state_dict(params | {"pos_embed": places}, strict=True)
    return net


def guided_answer(net: Precond, case: Case) -> Tensor:
    """F of a doubled batch as `wrap` makes it of the first three channels, from D = c_skip x + c_out F."""
    x, t, y = case["x"], case["t"], case["y_cfg"][: len(case["x"])]
    sigma = torch.tensor([net.path.sigma(s) for s in t.tolist()], dtype=torch.float64)
    c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    noisy = x.double() / c.c_in
    labels = F.one_hot(y, net.label_dim + 1)[:, :-1].double()
    wrapped = wrap(net.double(), guidance=case.meta["cfg_scale"], call=Call(order=("cond", "uncond"), guide_channels=3))
    out: Tensor = ((wrapped(noisy, sigma, labels) - c.c_skip * noisy) / c.c_out).float()
    net.float()
    return out


def check_transformer(case: Case) -> None:
    net = transformer(case)
    x, t, y = case["x"], case["t"], case["y"]
    rms: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        rms[name] = out.square().flatten(1).mean(1).sqrt()

    with torch.no_grad():
        for name in case.meta["rms"]:
            part: nn.Module = net.model.get_submodule(name)
            part.register_forward_hook(lambda module, args, out, name=name: keep(name, out))
        near(net.model(x, t, y), case["out"])
        for name, expected in case.meta["rms"].items():
            assert_close(rms[name], torch.tensor(expected), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        # in their doubled batch the first rows stand for both halves, and both come back guided
        variance = net.model(x, t, case["y_cfg"][: len(x)])[:, 4:]  # that of the class
        guided = torch.cat([guided_answer(net, case), variance], 1)
        near(guided, case["out_with_cfg"][: len(x)])
        assert not torch.allclose(guided[:, :3], case["out"][:, :3])

        # the same as a denoiser, told the noise level and one-hot classes
        sigma = torch.tensor([net.path.sigma(s) for s in t.tolist()], dtype=torch.float64)
        c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
        labels = F.one_hot(y, net.label_dim + 1)[:, :-1].float()  # a row of zeros is of no class
        noisy = (x / c.c_in).float()
        near(net(noisy, sigma, labels), (c.c_skip * noisy + c.c_out * case["out"][:, :4]).float())


CHECKS: dict[str, Callable[[Case], None]] = {"Precond": check_edm2, "DiT": check_transformer, "SiT": check_transformer}


def test_model(case: Case) -> None:
    CHECKS[case.meta.get("precond") or case.meta["cls"]](case)
