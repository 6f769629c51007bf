"""`Path` against the schedulers of diffusers: inputs, times and predictions at each of their noise levels."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.nets.path import PURE, Path

diffusers = pytest.importorskip("diffusers")

VP = {"timestep_spacing": "trailing"}
UNCLIPPED = {"clip_sample": False, "thresholding": False}
SCALED: dict[str, dict[str, Any]] = {  # those whose sample is alpha image + ... noise
    "DDPMScheduler": VP | UNCLIPPED,
    "DDIMScheduler": VP | UNCLIPPED,
    "DPMSolverMultistepScheduler": VP,
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": VP,
}
NOISED: dict[str, dict[str, Any]] = {  # those whose sample is image + sigma noise
    "EulerDiscreteScheduler": VP,
    "EulerAncestralDiscreteScheduler": VP,
    "HeunDiscreteScheduler": VP,
    "LMSDiscreteScheduler": VP,
    "KDPM2DiscreteScheduler": VP,
}
BETAS = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
]
VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEVELS = 5


def made(name: str, **settings: Any) -> Any:
    return getattr(diffusers, name)(**settings)


def denoised(path: Path, f: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    c = path.coefficients(sigma.reshape(-1, 1, 1, 1))
    return c.c_skip * x + c.c_out * f


def check(
    path: Path, sigma: Tensor, *, t: float, x: Tensor, f: Tensor, input: Tensor, clean: Tensor, off: float = 1e-6
) -> None:
    """Compares at one noise level: float32 on their side, float64 on ours."""
    c = path.coefficients(sigma.reshape(1, 1, 1, 1))
    assert_close(c.c_in * x, input.double(), rtol=1e-6, atol=1e-6 * input.abs().max().item())
    assert c.c_noise.item() == pytest.approx(t, abs=2e-3)
    assert_close(denoised(path, f, x, sigma), clean.double(), rtol=0, atol=off * clean.abs().max().item())


def chosen(scheduler: Any) -> list[int]:
    """Positions of five noise levels, the first and the last too; of two calls per step, the first one's."""
    scheduler.set_timesteps(10)
    t = scheduler.timesteps
    own = [i for i in range(len(t)) if t[i] != t[i - 1] and (len(t) == 10 or t[i] == t[i].round())]
    return [own[round(k)] for k in torch.linspace(0, len(own) - 1, LEVELS).tolist()]


def drawn() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, f = torch.randn(2, 1, 4, 8, 8, generator=g, dtype=torch.float64)
    return x, f


@pytest.mark.parametrize("betas", BETAS, ids=lambda b: b["beta_schedule"])
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("name", SCALED)
def test_schedulers_that_scale_their_sample(name: str, prediction: str, betas: dict[str, Any]) -> None:
    scheduler = made(name, prediction_type=prediction, **SCALED[name], **betas)
    path = Path.of(scheduler)
    assert path.prediction == prediction and path.kind == "vp"
    x, f = drawn()
    for i in chosen(scheduler):
        t = int(scheduler.timesteps[i])
        abar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - abar) / abar).sqrt()
        xt = x * abar.sqrt()
        if name in ("DDPMScheduler", "DDIMScheduler"):
            clean = scheduler.step(f.float(), t, xt.float()).pred_original_sample
        else:
            scheduler._step_index = i
            clean = scheduler.convert_model_output(f.float(), sample=xt.float())
        check(path, sigma, t=t, x=x, f=f, input=xt, clean=clean)


@pytest.mark.parametrize("betas", BETAS, ids=lambda b: b["beta_schedule"])
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("name", NOISED)
def test_schedulers_that_add_noise_to_their_sample(name: str, prediction: str, betas: dict[str, Any]) -> None:
    if name in ("EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler") and prediction == "sample":
        pytest.skip("not implemented there")
    path = Path.of(made(name, prediction_type=prediction, **NOISED[name], **betas))
    x, f = drawn()
    for i in chosen(made(name, prediction_type=prediction, **NOISED[name], **betas)):
        scheduler = made(name, prediction_type=prediction, **NOISED[name], **betas)
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[i]
        input = scheduler.scale_model_input(x.float(), t)
        sigma = scheduler.sigmas[i].double()
        clean = scheduler.step(f.float(), t, x.float()).pred_original_sample
        check(path, sigma, t=t.item(), x=x, f=f, input=input, clean=clean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_flow_schedulers(name: str, shift: float) -> None:
    """At each level, pure noise the first, as they step; a shift changes which levels are visited, not what t means."""
    solver = "FlowMatch" not in name
    own = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    scheduler = made(name, **own if solver else {"shift": shift})
    path = Path.of(scheduler)
    assert path == Path.flow(1000.0)
    x, f = drawn()
    for i in chosen(scheduler):
        share = scheduler.sigmas[i].double()
        image = share < 1 - 1e-5  # UniPC stops at a share of 1 - 1e-6, which is pure noise here
        sigma = share / (1 - share) if image else torch.tensor(PURE, dtype=torch.float64)
        xt = x * (1 - share) if image else x / PURE
        scheduler._step_index = i
        if solver:
            clean = scheduler.convert_model_output(f.float(), sample=xt.float())
        else:  # their step to no noise
            clean = (xt - share * f).float()
            step = scheduler.step(f.float(), scheduler.timesteps[i], xt.float()).prev_sample
            assert_close(step.double(), xt + (scheduler.sigmas[i + 1].double() - share) * f, rtol=1e-5, atol=1e-5)
        t = 1000 * share.item()  # solvers cut their own times to integers
        assert abs(scheduler.timesteps[i].item() - t) < (1 if solver else 1e-3)
        check(path, sigma, t=t, x=x, f=f, input=xt, clean=clean, off=1e-6 if image else 2e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_schedulers(prediction: str) -> None:
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        scheduler = made(name, prediction_type=prediction, sigma_data=0.7)
        path = Path.of(scheduler)
        x, f = drawn()
        for i in chosen(scheduler):
            sigma = scheduler.sigmas[i]
            input = scheduler.precondition_inputs(x.float(), sigma)
            clean = scheduler.precondition_outputs(x.float(), f.float(), sigma)
            check(path, sigma.double(), t=scheduler.timesteps[i].item(), x=x, f=f, input=input, clean=clean)


def test_the_time_of_euler_with_continuous_v_is_that_of_edm() -> None:
    scheduler = made("EulerDiscreteScheduler", prediction_type="v_prediction", timestep_type="continuous")
    scheduler.set_timesteps(5)
    path = Path.of(scheduler)
    assert_close(path.time(scheduler.sigmas[:-1]), scheduler.timesteps, rtol=1e-5, atol=1e-6)
    assert (path.sigma_min, path.sigma_max) == (0.0, float("inf"))


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    """There the network sees the noise alone, and what it says is the image alone."""
    for prediction in ("v_prediction", "sample"):
        settings = {"prediction_type": prediction, "rescale_betas_zero_snr": True, "clip_sample": False} | BETAS[1]
        scheduler = made("DDIMScheduler", timestep_spacing="trailing", **settings)
        scheduler.set_timesteps(10)
        path = Path.of(scheduler)
        assert path.ends_in_noise and path.sigma_max == PURE and path.sigma(999) == PURE
        z, f = drawn()
        sigma = torch.tensor([PURE], dtype=torch.float64)
        clean = scheduler.step(f, 999, z).pred_original_sample
        check(path, sigma, t=999, x=PURE * z, f=f, input=z, clean=clean)
        below = path.sigma(998)
        assert 2000 < below < 2500 and path.time(torch.tensor([below])).item() == pytest.approx(998, abs=0.01)
        with pytest.raises(GddlabError, match="between step 998 and pure noise there is none"):
            path.sigma(998.5)
    epsilon = made("DDIMScheduler", prediction_type="epsilon", rescale_betas_zero_snr=True, **BETAS[1])
    assert not Path.of(epsilon).ends_in_noise and Path.of(epsilon).sigma_max == pytest.approx(below, rel=1e-4)


PATHS = {
    "steps": Path.vp((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0), "epsilon"),
    "shares": Path.flow(1000.0),
    "shares, reversed": Path.flow(reversed=True),
    "logarithms": Path.edm(),
}


@pytest.mark.parametrize("name", PATHS)
def test_times_and_levels_are_each_others_inverse(name: str) -> None:
    path = PATHS[name]
    sigmas = [0.02, 0.3, 1.0, 7.0, 80.0]
    times = path.time(torch.tensor(sigmas, dtype=torch.float64))
    assert times.dtype == torch.float32
    assert [path.sigma(t) for t in times.tolist()] == pytest.approx(sigmas, rel=1e-4)
    assert (times.diff() > 0).all() if name != "shares, reversed" else (times.diff() < 0).all()


def test_the_largest_noise_of_published_schedules() -> None:
    assert PATHS["steps"].sigma(999) == pytest.approx(157.4, abs=0.05)
    assert PATHS["steps"].sigma(400) == pytest.approx(2.04, abs=0.005)
    sd = Path.of(made("DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    assert [sd.sigma(t) for t in (999, 625, 399)] == pytest.approx([14.61, 2.50, 1.16], abs=0.005)


@pytest.mark.parametrize("reversed", [False, True])
def test_pure_noise_of_a_flow(reversed: bool) -> None:
    """PURE and above are the same: noise of unit variance, the last time, an image that owes nothing to the input."""
    path = Path.flow(1000.0, reversed=reversed)
    z, f = drawn()
    for sigma in (PURE, 10 * PURE):
        level = torch.tensor([sigma], dtype=torch.float64)
        assert path.time(level).item() == (0 if reversed else 1000)
        c = path.coefficients(level.reshape(1, 1, 1, 1))
        assert_close(c.c_in * (sigma * z), z)
        assert_close(denoised(path, f, sigma * z, level), z + f if reversed else z - f)
    assert path.sigma(0.0 if reversed else 1000.0) == PURE
    # just below, nothing jumps
    near = torch.tensor([0.999 * PURE], dtype=torch.float64)
    assert_close(denoised(path, f, near * z, near), denoised(path, f, PURE * z, level * 0 + PURE), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_json(name: str) -> None:
    path = PATHS[name]
    again = Path(**json.loads(json.dumps(path.to_dict(), allow_nan=False)))
    assert again == path and hash(again) == hash(path)


def test_refusals() -> None:
    for name in ("SCMScheduler", "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler"):
        with pytest.raises(GddlabError, match=f"the schedule of a {name} is not known here: give path=") as e:
            Path.of(made(name))
        assert "\n" not in str(e.value)
    flow = made("DPMSolverMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(GddlabError, match=r"prediction='v_prediction': a DPMSolverMultistepScheduler along a flow"):
        Path.of(flow, "v_prediction")
    with pytest.raises(GddlabError, match=r"prediction='epsilon'.*omit prediction"):
        Path.of(made("FlowMatchEulerDiscreteScheduler"), "epsilon")
    with pytest.raises(GddlabError, match="prediction 'eps"):
        Path.vp([0.9, 0.5], "eps")
    for wrong in ([0.5, 0.9], [0.9], [], [1.0, 0.5], [0.5, -0.1]):
        with pytest.raises(GddlabError, match="give two or more numbers that fall between 1 and 0"):
            Path.vp(wrong)
    with pytest.raises(GddlabError, match=r"alphas_cumprod='abc'"):
        Path.vp("abc")
    with pytest.raises(GddlabError, match="this network takes steps 0 to 999"):
        PATHS["steps"].sigma(1000)
    for t in (0.0, 1000.5, -1):
        with pytest.raises(GddlabError, match="this network takes times within 0 and 1000"):
            PATHS["shares"].sigma(t)
    with pytest.raises(GddlabError, match="kind 'vq"):
        Path("vq", "flow")  # type: ignore[arg-type]


def test_steps_beyond_pure_noise_are_none() -> None:
    """With linear betas and no signal at the end, sigma of the last step but one is 15,406."""
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    path = Path.of(scheduler)
    abar = scheduler.alphas_cumprod.double()
    assert float(((1 - abar[998]) / abar[998]).sqrt()) > PURE
    assert (path.sigma_max, path.sigma(999)) == (PURE, PURE)
    with pytest.raises(GddlabError, match="t=998: between step 997 and pure noise there is none"):
        path.sigma(998)
    sigma = torch.tensor([path.sigma(997), PURE], dtype=torch.float64)
    assert path.time(sigma).tolist() == pytest.approx([997, 999], abs=1e-3)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (Path.edm(0.5), "EDM, sigma_data 0.5"),
        (Path.vp([0.9, 0.5], "epsilon"), "variance preserving, 2 steps; predicts the noise"),
        (
            Path.vp([0.9, 0.5, 0.0], "v_prediction"),
            "variance preserving, 3 steps, the last pure noise; predicts the velocity v",
        ),
        (Path.flow(1000.0), "flow matching, time 0 (image) to 1000 (noise); predicts noise - image"),
        (Path.flow(reversed=True), "flow matching, time 0 (noise) to 1 (image); predicts image - noise"),
    ],
)
def test_a_path_in_words(path: Path, says: str) -> None:
    assert str(path) == says


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), math.inf, "a", None, True])
def test_numbers_of_a_path_are_checked(scale):
    with pytest.raises(GddlabError, match=r"time_scale=.*: give a number above 0"):
        Path.flow(scale)
    with pytest.raises(GddlabError, match=r"sigma_data=.*: give a number above 0"):
        Path.edm(scale)


@pytest.mark.parametrize("t", ["a", None, float("nan"), math.inf])
def test_times_are_numbers(t):
    for path in (Path.flow(1000.0), Path.edm(), Path.vp([0.9, 0.5])):
        with pytest.raises(GddlabError, match=r"t=.*: give a number"):
            path.sigma(t)
    assert Path.edm().sigma(1e6) > 1e300
    assert Path.edm().sigma(torch.tensor(0.0)) == 1.0
