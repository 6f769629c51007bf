"""DiT and SiT against the numbers of their authors' code: names, shapes, outputs, guidance, the RMS of every layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gddlab.nets import Precond, from_edm
from tests.golden.conftest import Case, fill

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


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_model(case: Case) -> None:
    if "cls" in case.meta:
        check_transformer(case)


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
        guided = net.model.guided(x, t, case["y_cfg"], case.meta["cfg_scale"])
        near(guided, case["out_with_cfg"][: len(x)])
        assert not torch.allclose(guided[:, :3], case["out"][:, :3])

        # the same as a denoiser, told the noise level and one-hot classes
        sigma = torch.tensor([net.path.sigma(s) for s in t.tolist()], dtype=torch.float64)
        c = net.coefficients(sigma.reshape(-1, 1, 1, 1))
        labels = F.one_hot(y, net.label_dim + 1)[:, :-1].float()  # a row of zeros is of no class
        noisy = (x / c.c_in).float()
        near(net(noisy, sigma, labels), (c.c_skip * noisy + c.c_out * case["out"][:, :4]).float())
