"""Ablation against hooks by hand, and against networks that lack what is ablated."""

import json
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gddlab.datasets import order
from gddlab.errors import GddlabError
from gddlab.probing import ProbeResult
from gddlab.probing.ablate import MODES, ablate
from gddlab.sampling import latents
from tests.probing.networks import tiny
from tests.teachers.attacks import small_edm2

SIGMAS = [80.0, 1.0, 0.01]
CONV = "model.enc.8x8_block0.conv0"
DOWN = "model.dec.16x16_up"
ATTENTION = "model.enc.8x8_block0"


@pytest.fixture(scope="module")
def by_hand(pictures):
    """Loss and change of the output, (n, S), with outputs changed by `replace`, for 4 images in one pass."""
    clean = pictures.images(order(12, 0, 0, 4)).repeat_interleave(3, 0)
    sigma = torch.tensor(SIGMAS).repeat(4)
    x = clean + sigma.reshape(-1, 1, 1, 1) * latents(range(4), (1, 16, 16)).repeat_interleave(3, 0)
    weight = ((sigma**2 + 0.25) / (0.25 * sigma**2)).double()

    def error(a, b):
        return (weight * (a.double() - b.double()).square().mean((1, 2, 3))).reshape(4, 3)

    @torch.no_grad()
    def run(net, replace):
        intact = net(x, sigma)
        handles = [net.get_submodule(n).register_forward_hook(lambda m, a, y, f=f: f(y)) for n, f in replace.items()]
        ablated = net(x, sigma)
        for handle in handles:
            handle.remove()
        return error(intact, clean), error(ablated, clean), error(ablated, intact).sqrt()

    return run


def own(mode):
    if mode == "zero":
        return lambda y: 0 * y
    if mode == "resample":
        return lambda y: torch.cat([y[3:6], y[:3], y[9:12], y[6:9]])
    return lambda y: y.reshape(4, 3, *y.shape[1:]).mean((0, 3, 4)).repeat(4, 1)[:, :, None, None] + 0 * y


def values(result, stat, layer, column="value"):
    return torch.from_numpy(result.pivot(stat, column).loc[layer].to_numpy(copy=True))


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_what_a_hook_by_hand_does(net, pictures, by_hand, mode):
    before, after, change = by_hand(net, {CONV: own(mode)})
    result = ablate(net, SIGMAS, [CONV], mode, data=pictures, n=4)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(values(result, f"ablation_loss_{mode}", CONV), (after - before).mean(0), **close)
    torch.testing.assert_close(
        values(result, f"ablation_loss_{mode}", CONV, "sem"), (after - before).std(0) / 2, **close
    )
    ratio = values(result, f"ablation_loss_ratio_{mode}", CONV)
    torch.testing.assert_close(ratio, after.mean(0) / before.mean(0), **close)
    torch.testing.assert_close(values(result, f"ablation_output_{mode}", CONV), change.mean(0), **close)
    assert (change > 1e-4).all()
    assert set(result.stats) == {f"ablation_{s}_{mode}" for s in ("loss", "loss_ratio", "output")}
    assert result.meta["settings"] == {"tier": "ablation", "mode": mode, "dtype": "float32"}
    assert MODES[mode] in result.meta["stats"][f"ablation_loss_{mode}"]["definition"]
    assert set(result.frame["n_images"]) == {4}


@pytest.mark.parametrize("block", [DOWN, ATTENTION])
def test_a_block_without_its_branch_is_its_skip_path(net, pictures, by_hand, block):
    result = ablate(net, SIGMAS, block, "zero", data=pictures, n=4)
    *_, change = by_hand(net, {f"{block}.{p}": own("zero") for p in ("conv1", "proj") if f"{block}.{p}" in names(net)})
    torch.testing.assert_close(values(result, "ablation_output_zero", block), change.mean(0), rtol=1e-5, atol=1e-7)
    bare = tiny()
    with torch.no_grad():
        for part in ("conv1", "proj"):
            if f"{block}.{part}" in names(net):
                for p in bare.get_submodule(f"{block}.{part}").parameters():
                    p.zero_()
    lost = ablate(bare, SIGMAS, block, "zero", data=pictures, n=4)
    assert (lost.pivot("ablation_output_zero") == 0).all(axis=None)
    assert (lost.pivot("ablation_loss_ratio_zero") == 1).all(axis=None)


def names(net):
    return dict(net.named_modules())


def test_a_blocks_branches_come_from_another_image_as_it_is(net, pictures, by_hand):
    kept = {}
    handles = [
        net.get_submodule(f"{ATTENTION}.{p}").register_forward_hook(lambda m, a, y, p=p: kept.update({p: y.clone()}))
        for p in ("conv1", "proj")
    ]
    by_hand(net, {})
    for handle in handles:
        handle.remove()
    swap = own("resample")
    *_, change = by_hand(net, {f"{ATTENTION}.{p}": lambda y, p=p: swap(kept[p]) for p in ("conv1", "proj")})
    result = ablate(net, SIGMAS, ATTENTION, "resample", data=pictures, n=4, batch_size=6)
    torch.testing.assert_close(values(result, "ablation_output_resample", ATTENTION), change.mean(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_do_not_depend_on_the_batch_size(net, pictures, mode):
    whole = ablate(net, SIGMAS, [CONV, ATTENTION], mode, data=pictures, n=6, batch_size=100)
    for batch_size in (1, 4, 7, 13):
        other = ablate(net, SIGMAS, [CONV, ATTENTION], mode, data=pictures, n=6, batch_size=batch_size)
        numbers = ["value", "sem"]
        pd.testing.assert_frame_equal(other.frame.drop(columns=numbers), whole.frame.drop(columns=numbers))
        np.testing.assert_allclose(other.frame[numbers], whole.frame[numbers], rtol=1e-4, atol=1e-6)


def test_numbers_of_one_type_merge_however_it_is_given(net, pictures):
    parts = [
        ablate(net, [1.0], [CONV], "zero", data=pictures, n=2, start=start, dtype=dtype)
        for start, dtype in ((0, None), (2, "float32"))
    ]
    assert parts[0].merge(parts[1]).meta["n_images"] == 4


@pytest.mark.parametrize("mode", ["zero", "resample"])
def test_two_halves_merge_to_the_whole(net, pictures, mode, tmp_path):
    def run(**which):
        return ablate(net, SIGMAS, [CONV, DOWN], mode, data=pictures, **which)

    run(n=4).save(tmp_path)
    merged = ProbeResult.load(tmp_path).merge(run(n=2, start=4))
    whole = run(n=6)
    numbers = ["value", "sem"]
    pd.testing.assert_frame_equal(merged.frame.drop(columns=numbers), whole.frame.drop(columns=numbers))
    np.testing.assert_allclose(merged.frame[numbers], whole.frame[numbers], rtol=1e-4, atol=1e-6)


def test_means_of_other_images_do_not_merge(net, pictures):
    halves = [ablate(net, [1.0], CONV, data=pictures, n=2, start=s) for s in (0, 2)]
    with pytest.raises(GddlabError, match="does not merge: measure it with all images at once"):
        halves[0].merge(halves[1])


def test_modes_and_a_probe_join(net, pictures, result):
    found = result.join(*(ablate(net, [80.0, 1.0, 0.01], "conv", m, data=pictures, n=2) for m in ("zero", "mean")))
    assert {"rms", "ablation_loss_zero", "ablation_loss_mean"} <= set(found.stats)
    assert found.pivot("ablation_output_mean").shape == found.pivot("rms").shape


@pytest.mark.parametrize("states", ["prior", "trajectory"])
@pytest.mark.parametrize("mode", MODES)
def test_without_images_only_the_output_is_compared(net, states, mode):
    result = ablate(net, [80.0, 1.0], CONV, mode, states=states, n=2)
    assert result.stats == [f"ablation_output_{mode}"]
    assert (result.frame["value"] > 0).all()


def test_a_student_at_its_own_sigma():
    net = tiny("OneStepPrecond")
    result = ablate(net, layers=CONV, mode="zero", states="student", n=3)
    z = latents(range(3), (1, 16, 16))
    with torch.no_grad():
        intact = net.generate(z)
        handle = net.get_submodule(CONV).register_forward_hook(lambda m, a, y: 0 * y)
        change = (net.generate(z) - intact).double()
        handle.remove()
    weight = (80**2 + 0.25) / 40**2
    expected = (weight * change.square().mean((1, 2, 3))).sqrt().mean()
    assert result.sigmas == [80.0]
    torch.testing.assert_close(values(result, "ablation_output_zero", CONV)[0], expected, rtol=1e-5, atol=0)


class Mine(nn.Module):
    """Writes into its first layer's output, as users' networks do."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 1)
        self.tokens, self.embed, self.never = nn.Linear(16, 16), nn.Linear(1, 4), nn.Conv2d(1, 1, 1)
        self.pair, self.table = nn.RNN(16, 16, batch_first=True), nn.Embedding(1, 4)

    def forward(self, x, sigma, class_labels=None):
        self.pair(x[:, 0])
        h = self.first(x) + self.embed(sigma[:, None].log())[:, :, None, None]
        h = h + self.table(torch.zeros(1, dtype=torch.long, device=x.device))[:, :, None, None]
        return self.last(self.act(h).add_(1)) + self.tokens(x[:, 0])[:, None]


@pytest.mark.parametrize("mode", MODES)
def test_a_network_of_ones_own(pictures, mode):
    net = Mine()
    result = ablate(net, [2.0, 1.0], ["first", "tokens", "embed", "act"], mode, data=pictures, n=4, batch_size=4)
    assert result.frame["value"].notna().all()
    assert result.pivot(f"ablation_output_{mode}").loc["first"].min() > 0
    assert dict(zip(result.frame["layer"], result.frame["resolution"].isna(), strict=True)) == {
        "first": False,
        "act": False,
        "tokens": True,
        "embed": True,
    }
    tokens = ablate(net, [2.0, 1.0], "tokens", "mean", data=pictures, n=4)
    with torch.no_grad():
        x = torch.cat([pictures.images(order(12, 0, 0, 4))[:, None]] * 2, 1)
        x = x + torch.tensor([2.0, 1.0])[:, None, None, None] * latents(range(4), (1, 16, 16))[:, None]
        y = net.tokens(x[:, :, 0])  # (4, 2, 16, 16): the last dimension is the channel
        change = (y - y.mean((0, 2), keepdim=True)).square().mean((2, 3)).sqrt().mean(0).double()
    sigma = torch.tensor([2.0, 1.0], dtype=torch.float64)
    expected = ((sigma**2 + 0.25).sqrt() / (0.5 * sigma)) * change
    torch.testing.assert_close(values(tokens, "ablation_output_mean", "tokens"), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ("never", "'never' did not run"),
        ("pair", "'pair' is a tuple, no tensor"),
        ("table", r"'table' is \(1, 4\), but this pass has 4 rows"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_cannot_be_ablated_is_named(pictures, layer, says, mode):
    if mode == "mean" and layer == "table":
        says = "'table' is"
    with pytest.raises(GddlabError, match=says):
        ablate(Mine(), [2.0, 1.0], [layer], mode, data=pictures, n=2)


def test_a_layer_that_runs_twice_is_replaced_in_each_run_or_in_one(net, pictures):
    conv = net.model.enc["16x16_conv"]
    inner = conv.forward
    conv.forward = lambda x: inner(x)
    block = net.model.enc["16x16_block0"]
    seen = []
    block.register_forward_pre_hook(lambda m, a: seen.append(conv(torch.ones(len(a[0]), 1, 16, 16)).abs().max()))
    name = "model.enc.16x16_conv"
    found = ablate(net, [1.0], [name, f"{name}@1", f"{name}@2"], "zero", data=pictures, n=2)
    effect = found.pivot("ablation_output_zero")[1.0]
    assert effect[name] == effect[f"{name}@1"] > 0 == effect[f"{name}@2"]  # nothing depends on the second
    assert [x > 0 for x in seen[-3:]] == [False, True, False]


def test_bad_input_is_refused(net, pictures):
    for kwargs, says in (
        ({"mode": "means"}, "did you mean 'mean'"),
        ({"mode": "resample", "n": 3}, "n=3: .* give an even n"),
        ({"n": 13}, "'pictures' has 12"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": "model.enc.16x16_con"}, "did you mean"),
    ):
        with pytest.raises(GddlabError, match=says):
            ablate(net, **({"timesteps": [1.0], "data": pictures, "n": 2} | kwargs))

    class Narrow(Mine):
        def forward(self, x, sigma, class_labels=None):
            return self.first(x)[..., 1:-1]

    with pytest.raises(GddlabError, match=r"gave \(2, 4, 16, 14\) for states \(2, 1, 16, 16\)"):
        ablate(Narrow(), [1.0], "first", "zero", data=pictures, n=2)


def test_the_network_is_left_as_it_was(net, pictures):
    calls = []
    net.train()
    net.model.map_layer0.eval()
    net.get_submodule(CONV).register_forward_hook(lambda *a: calls.append(1))
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    ablate(net, [2.0, 1.0], [CONV, DOWN], data=pictures, n=2)
    assert len(calls) == 4  # means, intact, two ablations
    broken = net.model.dec["16x16_aux_conv"]
    count = []

    def fail(module, args):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("no memory")

    handle = broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        ablate(net, [2.0, 1.0], [CONV, DOWN], "zero", data=pictures, n=2)
    handle.remove()
    assert modes == [m.training for m in net.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.is_grad_enabled()


def test_values_that_are_not_finite_are_not_averaged_away(net, pictures, tmp_path):
    def spoil(module, args):
        """Makes the first row infinite, the larger sigma of the first image, where all before is ablated to zeros."""
        x = args[0].clone()
        x[:1] = torch.where(x.abs().amax() == 0, torch.inf, x[:1])
        return x, *args[1:]

    net.model.enc["16x16_block0"].register_forward_pre_hook(spoil)
    with pytest.warns(RuntimeWarning, match=r"model.enc.16x16_conv \(ablated\) at sigma 2"):
        result = ablate(net, [2.0, 1.0], ["model.enc.16x16_conv", CONV], "zero", data=pictures, n=2)
    assert result.meta["nonfinite"] == [{"layer": "model.enc.16x16_conv", "side": "ablated", "sigma": 2.0, "images": 1}]
    for stat in result.stats:
        assert result.pivot(stat).isna().to_numpy().tolist() == [[True, False], [False, False]]
        assert result.pivot(stat, "sem").isna().to_numpy().tolist() == [[True, False], [False, False]]
    result.save(tmp_path)
    json.loads((tmp_path / "meta.json").read_text())


def test_low_precision_gives_nearly_the_same(net, pictures):
    full = ablate(net, SIGMAS, [CONV, DOWN], data=pictures, n=4)
    low = ablate(net, SIGMAS, [CONV, DOWN], data=pictures, n=4, dtype="bfloat16")
    assert low.meta["settings"]["dtype"] == "bfloat16"
    stat = "ablation_output_mean"
    np.testing.assert_allclose(low.pivot(stat), full.pivot(stat), rtol=0.1)
    assert not np.array_equal(low.pivot(stat), full.pivot(stat))


def test_a_compiled_network_is_ablated_too(net, pictures):
    plain = ablate(net, SIGMAS, [CONV], "zero", data=pictures, n=2)
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(torch.zeros(1, 1, 16, 16), torch.ones(1))
    pd.testing.assert_frame_equal(ablate(compiled, SIGMAS, [CONV], "zero", data=pictures, n=2).frame, plain.frame)


def test_memory_does_not_grow_with_layers(net, pictures):
    """No output outlives its pass but the intact one."""
    seen = []

    def hook(module, args, output):
        seen.append(weakref.ref(output))

    for block in net.model.enc.values():
        block.register_forward_hook(hook)
    alive = []

    def count(module, args):
        alive.append(sum(r() is not None for r in seen))

    net.register_forward_pre_hook(count)
    ablate(net, SIGMAS, "conv", data=pictures, n=4, batch_size=6)
    assert len(alive) > 50
    assert max(alive) == 0


def test_layers_of_a_preset_that_do_not_run_are_left_out():
    """EDM2 computes the variance of its loss beside a pass."""
    net = small_edm2(img_channels=1)
    with pytest.warns(UserWarning, match="layers that cannot be measured are left out: 'logvar_linear' did not run"):
        result = ablate(net, [5.0, 1.0], "linear", n=2, states="prior", progress=False)
    assert result.meta["not_run"] == {"logvar_linear": "did not run"}
    assert "unet.emb_noise" in set(result.frame["layer"])
    with pytest.raises(GddlabError, match="'logvar_linear' did not run"):
        ablate(net, [5.0, 1.0], "logvar_linear", n=2, states="prior", progress=False)
