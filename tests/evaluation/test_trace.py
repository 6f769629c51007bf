"""Tracing against sampling with a hook by hand, and on networks of which the answer is known."""

import contextlib
import dataclasses
import importlib
import itertools
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

import gddlab
from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation import find_extractor
from gddlab.evaluation.features import image_features, real_features
from gddlab.evaluation.metrics import frechet
from gddlab.evaluation.references import Reference
from gddlab.evaluation.trace import MODES, Compared, trace
from gddlab.probing import ProbeResult
from gddlab.sampling import latents, sample
from gddlab.sampling.grid import to_uint8
from tests.probing.networks import tiny

BLOCK = "model.enc.8x8_block0"  # with attention
PARTS = [f"{BLOCK}.conv1", f"{BLOCK}.proj"]
UP = "model.dec.16x16_up"
CONV = "model.dec.16x16_aux_conv"
LEVELS = [80.0, 5.0, 0.5]
QUICK = {"n": 4, "extractor": None, "progress": False}
SWAP = [1, 0, 3, 2]


@pytest.fixture
def net():
    return tiny()


@pytest.fixture(scope="module")
def pictures():
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
    return ImageDataset(images, name="pictures", source="random")


MODULE = importlib.import_module("gddlab.evaluation.trace")  # the package has the function under this name


def pooled(images, *args, **kwargs):
    """Stands for an extractor: 16 numbers per image."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


@pytest.fixture
def quick(monkeypatch):
    """Features that cost nothing, and torch-fidelity's distance of which costs little; `real` of 40 images."""
    real = pooled(torch.randint(0, 256, (40, 1, 16, 16), generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(MODULE, "find_extractor", lambda name: dataclasses.replace(find_extractor(name), dims=16))
    monkeypatch.setattr(MODULE, "image_features", pooled)
    monkeypatch.setattr(Reference, "against", lambda *args, **kwargs: real)
    return real


def sampled(net, levels, disturb=None, n=4, seed=0, labels=None):
    """Heun's method written out; `disturb(step, call, args)` gives what changes the outputs of layers in a call."""
    x = latents(range(seed, seed + n), (1, 16, 16)).double() * levels[0]
    for k, (s, t) in enumerate(itertools.pairwise([*levels, 0.0])):

        def slope(x, sigma, call, k=k):
            args = (x.float(), torch.full((n,), sigma), labels)
            with torch.no_grad(), hooked(net, (disturb and disturb(k, call, args)) or {}):
                return (x - net(*args).double()) / sigma

        d = slope(x, s, 0)
        y = x + (t - s) * d
        x = y if t == 0 else x + (t - s) * (d + slope(y, t, 1)) / 2
    return x.float().clamp(-1, 1)


@contextlib.contextmanager
def hooked(net, changes):
    handles = [net.get_submodule(n).register_forward_hook(lambda m, a, y, f=f: f(y)) for n, f in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rms(a, b):
    return (a.double() - b.double()).square().mean((1, 2, 3)).sqrt()


def brute(net, mode, parts, at, donor=None):
    """Final images with `parts` changed at step `at`: another whole sampling from noise, hooks written out."""
    calls = {}
    whole = sampled(net, LEVELS, lambda k, call, args: calls.update({(k, call): args}))

    def disturb(k, call, args):
        if k != at:
            return {}
        if mode == "zero":
            return dict.fromkeys(parts, lambda y: 0 * y)
        if mode == "mean":
            means = {p: y.mean((0, 2, 3)) for p, y in outputs(net, calls[k, call], parts).items()}
            return {p: (lambda y, m=m: m[:, None, None] + 0 * y) for p, m in means.items()}
        rows = SWAP if donor is None else [0, 1, 2, 3]
        return {p: (lambda y, z=z: z[rows]) for p, z in outputs(donor or net, args, parts).items()}

    return whole, sampled(net, LEVELS, disturb)


def outputs(net, args, parts):
    """The outputs of some layers in one call."""
    found = {}
    with hooked(net, {p: (lambda y, p=p: found.update({p: y.clone()})) for p in parts}):
        net(*args)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layer", "parts"), [(CONV, [CONV]), (BLOCK, PARTS)])
def test_equal_to_a_whole_sampling_with_hooks(net, mode, layer, parts):
    donor = tiny(seed=1) if mode == "donor" else None
    result = trace(net, LEVELS, layer, mode, donor=donor, **QUICK)
    table, sem = (result.pivot(f"trace_pixels_{mode}", c).loc[layer] for c in ("value", "sem"))
    assert list(table.index) == LEVELS
    for k, sigma in enumerate(LEVELS):
        whole, other = brute(net, mode, parts, k, donor)
        distance = rms(whole, other)
        assert distance.min() > 1e-3
        torch.testing.assert_close(torch.tensor(table[sigma]), distance.mean(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(torch.tensor(sem[sigma]), distance.std() / 2, rtol=1e-3, atol=1e-7)
    assert MODES[mode] in result.meta["stats"][f"trace_pixels_{mode}"]["definition"]


def test_undisturbed_images_are_those_of_sample(net, pictures):
    result = trace(net, 3, CONV, "zero", n=4, seed=5, data=pictures, progress=False)
    spec = find_extractor("lite0")
    images = sample(net, 4, seed=5, steps=3)
    expected = frechet(image_features(to_uint8(images), spec).double(), real_features(pictures, spec))[0].value
    assert result.meta["settings"]["distance"] == pytest.approx(expected, rel=1e-4)
    assert result.meta["settings"]["sampler"] == "heun-3"


def test_the_last_step_is_one_ablated_denoising(net):
    """x - sigma (x - D) / sigma = D: the images of the last step are the network's answer there."""
    last = trace(net, LEVELS, CONV, "zero", **QUICK).pivot("trace_pixels_zero").loc[CONV, 0.5]
    seen = []
    handle = net.register_forward_pre_hook(lambda m, a: seen.append(a))
    sampled(net, LEVELS)
    handle.remove()
    with torch.no_grad():
        intact = net(*seen[-1])
        with hooked(net, {CONV: lambda y: 0 * y}):
            ablated = net(*seen[-1])
    expected = rms(intact.clamp(-1, 1), ablated.clamp(-1, 1)).mean()
    torch.testing.assert_close(torch.tensor(last), expected, rtol=1e-5, atol=0)


def test_a_layer_that_adds_nothing_is_not_needed(net, pictures, quick):
    with torch.no_grad():
        for part in PARTS:
            for p in net.get_submodule(part).parameters():
                p.zero_()
    for mode in ("mean", "zero", "resample"):
        result = trace(net, LEVELS, [BLOCK, UP], mode, n=4, data=pictures, progress=False)
        assert result.stats == [f"trace_{s}_{mode}" for s in ("pixels", "lite0", "fd_lite0")]
        for stat in result.stats:
            for column in ("value", "sem"):
                assert (result.pivot(stat, column).loc[BLOCK] == 0).all()
            assert (result.pivot(stat).loc[UP] != 0).all()


class Late(torch.nn.Module):
    """Below sigma 1 an image is half the state, whatever the layer does; above it is the layer's output."""

    img_channels, img_resolution = 1, 16

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, sigma, class_labels=None):
        found = self.layer(x)
        return torch.where(sigma[:, None, None, None] >= 1, found, x / 2)


def test_a_step_beyond_which_a_layer_does_nothing():
    table = trace(Late(), [9.0, 3.0, 0.9, 0.3], "layer", "zero", **QUICK).pivot("trace_pixels_zero").loc["layer"]
    assert (table[[9.0, 3.0]] > 0).all()
    assert (table[[0.9, 0.3]] == 0).all()
    half = trace(Late(), [3.0, 0.9], "layer", "zero", **QUICK).pivot("trace_pixels_zero").loc["layer", 3.0]
    assert half > 0  # its first call, at 3, is disturbed; the second, at 0.9, does not see the layer


def test_features_and_distances(net, pictures, quick):
    result = trace(net, LEVELS, CONV, "zero", n=6, data=pictures, progress=False)
    before = pooled(to_uint8(sampled(net, LEVELS, n=6))).double()
    for k, sigma in enumerate(LEVELS):
        images = sampled(net, LEVELS, lambda step, call, args, k=k: {CONV: lambda y: 0 * y} if step == k else {}, n=6)
        after = pooled(to_uint8(images)).double()
        distance = (after - before).norm(dim=1)
        rows = result.frame[result.frame["sigma"] == sigma].set_index("stat")
        assert rows.loc["trace_lite0_zero", "value"] == pytest.approx(float(distance.mean()), rel=1e-3)
        assert rows.loc["trace_lite0_zero", "sem"] == pytest.approx(float(distance.std() / 6**0.5), rel=1e-3)

        def farther(keep, after=after):
            return frechet(after[keep], quick)[0].value - frechet(before[keep], quick)[0].value

        value, sem = (rows.loc["trace_fd_lite0_zero", c] for c in ("value", "sem"))
        assert value == pytest.approx(farther(slice(None)), rel=1e-3, abs=0.1)
        each = torch.tensor([farther([i for i in range(6) if i != left]) for left in range(6)])
        assert sem == pytest.approx(float(((each - each.mean()).square().sum() * 5 / 6).sqrt()), rel=1e-2)
        assert abs(value) > 1
        assert set(rows["n_images"]) == {6}
    assert "final images of 6 seeds to pictures" in result.meta["stats"]["trace_fd_lite0_zero"]["definition"]


def test_a_distance_of_many_images_equals_torch_fidelitys(monkeypatch):
    """More images than directions: the Gram matrix is that of features; and groups of several images are left out."""
    spec = find_extractor("lite0")
    g = torch.Generator().manual_seed(0)
    real = Reference("real", "", 50, features=torch.randn(50, spec.dims, generator=g))
    features = torch.randn(90, spec.dims, generator=g).double() + 0.1
    monkeypatch.setattr(MODULE, "image_features", lambda images, *a, **k: features[: len(images)])
    compared = Compared(torch.rand(90, 1, 8, 8), spec, real, torch.device("cpu"))
    found = compared._distances
    assert len(found) == 33
    kept = features[torch.arange(90) % 32 != 4]
    for value, some in ((found[0], features), (found[5], kept)):
        assert float(value) == pytest.approx(frechet(some, real.features)[0].value, rel=1e-5)


@pytest.mark.parametrize("mode", ["mean", "zero", "resample", "donor"])
def test_numbers_do_not_depend_on_the_batch_size(net, mode, pictures, quick):
    donor = tiny(seed=1) if mode == "donor" else None
    how = {"donor": donor, "n": 6, "data": pictures, "progress": False}
    whole = trace(net, LEVELS[1:], [CONV, BLOCK], mode, **how)
    for batch_size in (1, 4):
        other = trace(net, LEVELS[1:], [CONV, BLOCK], mode, batch_size=batch_size, **how)
        numbers = ["value", "sem"]
        pd.testing.assert_frame_equal(other.frame.drop(columns=numbers), whole.frame.drop(columns=numbers))
        for stat, close in (("pixels", 1e-5), ("lite0", 0.1), ("fd_lite0", 20)):  # a pixel may round to another byte
            a, b = (r.frame[r.frame["stat"] == f"trace_{stat}_{mode}"][numbers] for r in (other, whole))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=close)


def test_classes_are_those_of_sample():
    net = tiny(label_dim=3)
    result = trace(net, LEVELS, CONV, "zero", **QUICK)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    whole = sampled(net, LEVELS, labels=labels)
    other = sampled(net, LEVELS, lambda k, call, args: {CONV: lambda y: 0 * y} if k == 0 else {}, labels=labels)
    table = result.pivot("trace_pixels_zero").loc[CONV]
    assert table[80.0] == pytest.approx(float(rms(whole, other).mean()), rel=1e-4)
    assert trace(net, LEVELS, CONV, "zero", class_labels=1, **QUICK).pivot("trace_pixels_zero").loc[CONV, 80.0] != (
        pytest.approx(table[80.0], rel=1e-3)
    )


def test_a_one_step_student_is_one_column(net):
    student = tiny("OneStepPrecond")
    result = trace(student, layers=CONV, mode="zero", **QUICK)
    assert result.sigmas == [80.0]
    assert result.meta["settings"]["sampler"] == "one-step"
    z = latents(range(4), (1, 16, 16))
    with torch.no_grad():
        whole = student.generate(z).clamp(-1, 1)
        with hooked(student, {CONV: lambda y: 0 * y}):
            other = student.generate(z).clamp(-1, 1)
    expected = rms(whole, other).mean()
    torch.testing.assert_close(torch.tensor(result.frame["value"][0]), expected, rtol=1e-5, atol=0)
    taken = trace(student, layers=BLOCK, mode="donor", donor=net, **QUICK)
    assert taken.frame["value"][0] == 0  # the same weights
    assert trace(student, layers=BLOCK, mode="donor", donor=tiny(seed=1), **QUICK).frame["value"][0] > 1e-3


@pytest.mark.parametrize("steps", [None, 3, [80.0, 2.0]])
def test_a_student_of_several_steps(steps):
    student = tiny("OneStepPrecond", mid_sigmas=[5.0, 0.5])
    result = trace(student, steps, CONV, "zero", batch_size=3, **QUICK)
    how = {"sigmas": steps} if isinstance(steps, list) else {"steps": steps}
    whole = sample(student, 4, **how)
    calls = itertools.count()
    table = result.pivot("trace_pixels_zero").loc[CONV]
    assert len(table) == (2 if isinstance(steps, list) else 3)
    for k, sigma in enumerate(table.index):
        calls = itertools.count()
        with hooked(student, {CONV: lambda y, calls=calls, k=k: 0 * y if next(calls) == k else None}):
            other = sample(student, 4, **how)
        assert table[sigma] == pytest.approx(float(rms(whole, other).mean()), rel=1e-5)
        assert table[sigma] > 1e-4


@pytest.mark.parametrize(("mode", "expected"), [("mean", 2 * 3**2 + 9), ("resample", 2 * 3**2 + 9 + 5)])
def test_network_calls_are_as_many_as_the_docstring_says(net, mode, expected):
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    trace(net, LEVELS, [CONV, BLOCK], mode, **QUICK)
    assert len(calls) == expected
    student, calls = tiny("OneStepPrecond", mid_sigmas=[5.0, 0.5]), []
    student.register_forward_pre_hook(lambda *_: calls.append(1))
    trace(student, None, [CONV, UP], "zero", **QUICK)
    assert len(calls) == 2 * 3 * 4 // 2 + 5


def test_memory_does_not_grow_with_layers_or_steps(net):
    """Of what a network returns nothing outlives the next calls."""
    seen, alive = [], []
    net.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    for block in net.model.enc.values():
        block.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    net.register_forward_pre_hook(lambda m, a: alive.append(sum(r() is not None for r in seen)))
    trace(net, 5, "block", n=2, batch_size=1, extractor=None, progress=False)
    assert len(alive) > 200
    assert max(alive) <= 2


def test_the_network_is_left_as_it_was(net):
    net.train()
    net.model.map_layer0.eval()
    donor = tiny(seed=1).train()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for mode in MODES:
        trace(net, [5.0, 0.5], [CONV, BLOCK], mode, donor=donor if mode == "donor" else None, **QUICK)
    count = itertools.count()
    handle = net.model.dec["16x16_aux_conv"].register_forward_pre_hook(lambda *_: 1 / (7 - next(count)) and None)
    with pytest.raises(ZeroDivisionError):
        trace(net, [5.0, 0.5], [CONV, BLOCK], **QUICK)
    handle.remove()
    assert modes == [m.training for m in net.modules()]
    assert all(m.training for m in donor.modules())
    for model in (net, donor):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_what_is_not_finite_is_named(net, pictures, quick):
    spoiled = net.model.enc["16x16_block0"]

    def spoil(module, args):
        """Where all before is ablated to zeros, the first image is not a number."""
        x = args[0].clone()
        x[:1] = torch.where(x.abs().amax() == 0, torch.nan, x[:1])
        return x, *args[1:]

    spoiled.register_forward_pre_hook(spoil)
    with pytest.warns(RuntimeWarning, match=r"model.enc.16x16_conv \(disturbed\) at sigma 5"):
        result = trace(net, [5.0, 0.5], ["model.enc.16x16_conv", CONV], "zero", n=4, data=pictures, progress=False)
    table = result.frame.set_index("layer")["value"]
    assert table.loc["model.enc.16x16_conv"].isna().all()
    assert table.loc[CONV].notna().all()
    assert math.isfinite(result.meta["settings"]["distance"])


def test_saved_loaded_joined(net, pictures, tmp_path, quick):
    result = trace(net, LEVELS, [CONV, UP], "zero", n=4, data=pictures, progress=False)
    result.save(tmp_path)
    again = ProbeResult.load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    both = again.join(trace(net, LEVELS, [CONV, UP], "mean", **QUICK))
    assert set(both.stats) == {*result.stats, "trace_pixels_mean"}
    halves = [trace(net, LEVELS, CONV, "zero", **(QUICK | {"n": 2, "seed": s})) for s in (0, 2)]
    whole = trace(net, LEVELS, CONV, "zero", **QUICK)
    merged = halves[0].merge(halves[1])
    np.testing.assert_allclose(merged.frame[["value", "sem"]], whole.frame[["value", "sem"]], rtol=1e-4)
    with pytest.raises(GddlabError, match="does not merge"):
        trace(net, LEVELS, CONV, "mean", **QUICK).merge(whole)


def test_without_data_and_features(net):
    assert trace(net, LEVELS, CONV, "zero", n=2, progress=False).stats == ["trace_pixels_zero", "trace_lite0_zero"]
    assert trace(net, LEVELS, CONV, "zero", **QUICK).stats == ["trace_pixels_zero"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "means"}, "did you mean 'mean'"),
        ({"mode": "resample", "n": 3}, "n=3: .* give an even n"),
        ({"mode": "donor"}, "give donor="),
        ({"donor": tiny(seed=1)}, 'donor= has no use with mode="mean"'),
        ({"mode": "donor", "donor": tiny(model_channels=16)}, "give two networks of the same architecture"),
        ({"mode": "donor", "donor": 3}, "type int: give a torch.nn.Module"),
        ({"n": 1}, "n=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": "model.enc.16x16_con"}, "did you mean"),
        ({"steps": [90.0, 1.0], "model": "bounded"}, "sigma 90 in steps: this network accepts"),
        ({"steps": "18"}, "steps="),
        ({"extractor": "lite1"}, "did you mean 'lite0'|did you mean 'lite2'"),
        ({"extractor": None, "data": "digits"}, "give an extractor, or omit data="),
        ({"extractor": "lite0", "data": np.zeros((4, 8, 8, 1), np.uint8)}, "the network's images: 16x16"),
    ],
)
def test_bad_input_is_refused_in_one_line(net, given, says):
    model = tiny(sigma_max=80.0) if given.pop("model", None) else net
    how = {"steps": [5.0, 0.5], "layers": CONV, "n": 2, "extractor": None, "progress": False} | given
    with pytest.raises(GddlabError, match=says) as e:
        trace(model, **how)
    assert "\n" not in str(e.value)


def test_a_students_steps_and_the_network_itself_are_refused(net):
    with pytest.raises(GddlabError, match="the donor is the network itself"):
        trace(net, mode="donor", donor=net)
    with pytest.raises(GddlabError, match="give descending noise levels"):
        trace(tiny("OneStepPrecond"), [1.0, 80.0], CONV, **QUICK)


def test_it_is_public():
    assert gddlab.trace is trace
