import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from gddlab.datasets import ImageDataset, order
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors
from gddlab.probing import DEFAULT, Estimate, Probe, estimate, probe
from gddlab.probing.inputs import Inputs
from gddlab.probing.probe import _How, _plan, _Where, _with_rows
from gddlab.sampling import karras_sigmas, latents, sample
from tests.probing.networks import peak_bytes, tiny


def test_numbers_do_not_depend_on_the_batch_size(net, pictures, result):
    for batch_size in (1, 7, 100):
        other = probe(net, [80.0, 1.0, 0.01], data=pictures, n=6, batch_size=batch_size)
        numbers = ["value", "sem"]
        pd.testing.assert_frame_equal(other.frame.drop(columns=numbers), result.frame.drop(columns=numbers))
        share = result.frame["stat"] == "active_fraction"  # counts: rounding may move a value across 0
        for column in numbers:
            a, b = other.frame[column], result.frame[column]
            np.testing.assert_allclose(a[~share], b[~share], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(a[share], b[share], rtol=0, atol=1e-3)
        for layer, matrix in result.matrices["correlation"].items():
            np.testing.assert_allclose(other.matrices["correlation"][layer], matrix, rtol=0, atol=1e-5)


def test_a_pass_holds_whole_images_within_the_batch(net, pictures):
    rows = []
    net.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=5, batch_size=8, stats="rms")
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=2, batch_size=1, stats="cosine")
    assert rows == [6, 6, 3, 3, 3]
    rows.clear()
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=5, batch_size=9, stats=["rms", "correlation"])
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=3, batch_size=1, stats="correlation")
    assert rows == [6, 6, 3, 6, 3]
    rows.clear()
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=9, batch_size=6, stats=["rms", "cka"])
    assert rows == [24, 3]


def test_one_image_has_all_default_statistics_but_a_correlation(net, pictures):
    one, more = (probe(net, [2.0, 1.0], data=pictures, n=n, start=s) for n, s in ((1, 0), (4, 1)))
    part = one.frame[one.frame["stat"] == "correlation"]
    assert len(part) and part["value"].isna().all() and (part["n_images"] == 0).all()
    assert one.frame.loc[one.frame["stat"] != "correlation", "value"].notna().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.heatmap("correlation").figure and one.similarities()
    merged = one.merge(more)
    assert merged.frame["value"].notna().all()
    pairs = merged.frame["stat"] == "correlation"
    assert set(merged.frame.loc[pairs, "n_images"]) == {4} and set(merged.frame.loc[~pairs, "n_images"]) == {5}


def test_rows_of_a_pass_are_timed_where_none_are_given(net, pictures, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    rows = []

    def runs(module, args):  # 32 rows are fastest
        rows.append(len(args[0]))
        clock["now"] += len(args[0]) * (1 if len(args[0]) == 32 else 2)

    net.register_forward_pre_hook(runs)
    sigmas = [2.0 ** (i / 100) for i in range(500)]
    auto = probe(net, sigmas, data=pictures, n=12, batch_size=None, stats="rms")
    assert rows[:8] == [16, 16, 32, 32, 64, 64, 128, 128] and set(rows[8:-12]) == {32}
    given = probe(net, sigmas, data=pictures, n=12, batch_size=32, stats="rms")
    np.testing.assert_array_equal(auto.frame["value"], given.frame["value"])
    rows.clear()
    assert estimate(net, [2.0, 1.0], data=pictures, n=2, batch_size=None, stats="rms").rows == 4
    assert rows == [4] * 3  # too few to be worth a try


def test_noise_levels_share_passes_only_where_they_fit_or_must(net, pictures):
    """Without a statistic that compares noise levels no pass has more rows than asked, and the numbers are the same."""
    rows = []
    own = net.register_forward_pre_hook(lambda m, a: rows.append((len(a[0]), sorted(set(a[1].tolist()), reverse=True))))
    stats = ["rms", "std", "spectral_share", "active_fraction"]
    sigmas = [4.0, 3.0, 2.0, 1.0, 0.5]
    split = probe(net, sigmas, data=pictures, n=3, batch_size=2, stats=stats, per_channel=True)
    assert rows == [(2, [4.0, 3.0])] * 3 + [(2, [2.0, 1.0])] * 3 + [(1, [0.5])] * 3
    own.remove()
    whole = probe(net, sigmas, data=pictures, n=3, batch_size=100, stats=stats, per_channel=True)
    keys = ["layer", "sigma", "stat"]
    a, b = (r.frame.set_index(keys)["value"] for r in (split, whole))
    np.testing.assert_allclose(a[b.index], b, rtol=1e-5, atol=1e-3)
    for layer, found in whole.channels.items():
        np.testing.assert_allclose(split.channels[layer]["mean"], found["mean"], rtol=1e-4, atol=1e-5)


def test_what_the_network_sees(net, pictures):
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append(a))
    probe(net, [3.0, 1.0], data=pictures, n=4, seed=7, stats="rms")
    x, sigma, labels = seen[0]
    clean = pictures.images(order(12, 7, 0, 4))
    noise = latents(range(7, 11), (1, 16, 16))
    assert sigma.tolist() == [3.0, 1.0] * 4
    torch.testing.assert_close(x[0::2], clean + 3 * noise)
    torch.testing.assert_close(x[1::2], clean + noise)
    assert labels is None
    probe(net, [3.0, 1.0], states="prior", n=4, seed=7, stats="rms")
    torch.testing.assert_close(seen[1][0][0::2], 3 * noise)


def test_a_student_is_probed_at_its_sigma():
    net = tiny("OneStepPrecond")
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append(a))
    for timesteps in (18, None):
        result = probe(net, timesteps, states="student", n=2)
    torch.testing.assert_close(seen[0][0], 80 * latents(range(2), (1, 16, 16)))
    assert result.sigmas == [80.0]
    with pytest.raises(GddlabError, match=r"timesteps=\[80.0\]: a student sees sigma 80 alone"):
        probe(net, [80.0], states="student")
    with pytest.raises(GddlabError, match="unit='t' with states=\"student\": a student sees sigma 80 alone, omit unit"):
        probe(net, states="student", unit="t")


def test_labels(pictures):
    net = tiny(label_dim=3)
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append(a[2]))
    probe(net, [2.0, 1.0], data=pictures, n=4, stats="rms")
    assert torch.equal(seen[-1], pictures.labels(order(12, 0, 0, 4)).repeat_interleave(2, 0))
    probe(net, [2.0, 1.0], states="prior", n=4, seed=1, stats="rms")
    assert seen[-1].argmax(1).tolist() == [1, 1, 2, 2, 0, 0, 1, 1]
    probe(net, [2.0, 1.0], data=pictures, n=2, class_labels=[2, 0], stats="rms")
    assert seen[-1].argmax(1).tolist() == [2, 2, 0, 0]
    with pytest.raises(GddlabError, match="3 classes, this network 5: give class_labels="):
        probe(tiny(label_dim=5), data=pictures, n=2)
    with pytest.raises(GddlabError, match="unconditional"):
        probe(tiny(), data=pictures, n=2, class_labels=1)


def test_the_grid_is_edms_within_the_networks_range(net, pictures):
    result = probe(net, 5, data=pictures, n=1, stats="rms")
    assert result.sigmas == karras_sigmas(5).tolist()
    narrow = probe(tiny(sigma_min=0.5, sigma_max=20.0), 3, data=pictures, n=1, stats="rms")
    assert (narrow.sigmas[0], narrow.sigmas[-1]) == pytest.approx((20.0, 0.5))
    unordered = probe(net, [0.1, 5, 1], data=pictures, n=1, stats="rms")
    assert unordered.sigmas == [5.0, 1.0, 0.1]
    steps = probe(tiny("iDDPMPrecond"), 4, data=pictures, n=1, stats="rms").sigmas
    known = tiny("iDDPMPrecond").u.tolist()
    assert all(min(abs(s - u) for u in known) == 0 for s in steps)


def test_the_card_names_the_data(net):
    net.card = type("Card", (), {"data": "digits"})()
    result = probe(net, [1.0], n=3)
    assert result.meta["data"]["name"] == "digits"
    net.card = None
    with pytest.raises(GddlabError, match=r'names no dataset: give data=, or states="trajectory"'):
        probe(net, [1.0], n=3)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"timesteps": [1.0, -1.0]}, "sigma -1"),
        ({"timesteps": [float("nan")]}, "sigma nan"),
        ({"timesteps": [float("inf")]}, "sigma inf"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [1.0, 1.0]}, "each once"),
        ({"timesteps": 0}, "0 noise levels"),
        ({"timesteps": True}, "timesteps=True"),
        ({"timesteps": b"18"}, "timesteps=b'18'"),
        ({"timesteps": memoryview(b"18")}, "timesteps=<memory"),
        ({"timesteps": ["80"]}, "timesteps=.'80'.: give a whole number, or a list of sigmas"),
        ({"timesteps": [True, 2.0]}, r"timesteps=\[True, 2.0\]: give a whole number, or a list"),
        ({"timesteps": "18"}, "timesteps='18': give a whole number, or a list"),
        ({"timesteps": 100_000}, "timesteps: 100000 noise levels, give at most 1000"),
        ({"timesteps": range(1, 2000)}, "timesteps: 1999 noise levels, give at most 1000"),
        ({"timesteps": [[1.0]] * 500}, "timesteps=<list>: give a whole number, or a list"),
        ({"states": "noise"}, "did you mean 'noised'"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"states": "prior"}, "needs no images: omit data="),
        ({"n": 13}, "'pictures' has 12: give n=12 or less"),
        ({"n": 0}, "n=0"),
        ({"n": 4, "start": 9}, "start=9, n=4, but 'pictures' has 12: give n=3 or less"),
        ({"start": -1}, "start=-1"),
        ({"seed": 1.5}, "seed"),
        ({"seed": -1}, "seeds are 0"),
        ({"seed": 2**32}, "seeds are 0"),
        ({"timesteps": torch.tensor(2)}, r"timesteps=tensor\(2\): give a whole number, or a list"),
        ({"timesteps": np.array(2)}, r"timesteps=array\(2\): give a whole number, or a list"),
        ({"device": "meta"}, "device='meta' holds no values: give another, such as cpu"),
        ({"device": "nope"}, "device='nope' cannot be used here"),
        ({"data": 5}, "data=5: give a name"),
        ({"layers": 5}, "layers=5: give a name"),
        ({"n": 1, "stats": "correlation"}, "'correlation' compares 2 with each other, give n=2 or more"),
        ({"n": 7, "stats": "cka"}, "'cka' compares 8 with each other, give n=8 or more"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": "model.enc.16x16_con"}, "did you mean"),
        ({"stats": "rm"}, "did you mean 'rms'"),
    ],
)
def test_bad_input_is_refused(net, pictures, kwargs, says):
    with pytest.raises(GddlabError, match=says):
        probe(net, **({"data": pictures, "n": 2, "timesteps": [1.0]} | kwargs))
    assert next(net.parameters()).device.type == "cpu"


def test_sigma_outside_of_the_range_and_images_that_do_not_fit(pictures):
    with pytest.raises(GddlabError, match=r"sigma 80 in timesteps: this network accepts 0.5 to 20"):
        probe(tiny(sigma_min=0.5, sigma_max=20.0), [80.0], data=pictures)
    net = tiny()
    net.card = type("Card", (), {"sigma_min": 0.002, "sigma_max": 80.0})()
    with pytest.raises(GddlabError, match=r"sigma 999 in timesteps: this network accepts 0.002 to 80"):
        probe(net, [999, 1.0], data=pictures, n=1)
    large = ImageDataset(np.zeros((3, 32, 32, 1), dtype=np.uint8), name="large", source="zeros")
    with pytest.raises(GddlabError, match=r"\(1, 32, 32\), this network takes \(1, 16, 16\)"):
        probe(tiny(), [1.0], data=large, n=1)


def test_any_module_that_takes_x_and_sigma_can_be_probed(pictures):
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 1, 3)

        def forward(self, x, sigma, class_labels=None):
            return self.b(self.a(x).relu())

    result = probe(Mine(), [2.0, 1.0], data=pictures, n=3)
    assert set(result.stats) == {"rms", "mean_abs", "mean", "std", "correlation"}
    both = probe(Mine(), [2.0, 1.0], data=pictures, n=3, per_channel=True, stats=(s for s in ("rms", "std")))
    assert set(both.stats) == {"rms", "std"}
    assert probe(Mine(), [2.0, 1.0], data=pictures, n=3, per_channel=True).channels["a"]["mean"].shape == (2, 4)
    with pytest.raises(GddlabError, match="img_channels"):
        probe(Mine(), [1.0], states="prior", n=3)


def test_meta_says_where_numbers_come_from(net, pictures, result):
    meta = result.meta
    assert meta["model"]["fingerprint"] == hash_tensors(net.state_dict())
    assert meta["model"]["precond"] == "EDMPrecond"
    assert meta["data"] == pictures.manifest.to_dict()
    assert [(n, tuple(s)) for n, s in meta["parameters"]] == [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    assert set(meta["stats"]) == set(DEFAULT) - {"rel_update_cross", "rel_update_mlp"}  # of transformer blocks
    assert meta["nonfinite"] == []
    assert torch.__version__.startswith(meta["versions"]["torch"])


def test_no_activation_is_kept(net):
    with torch.no_grad(), Probe(net, [2.0, 1.0], layers="all") as p, p.images(3):
        net(torch.ones(6, 1, 16, 16), torch.tensor([2.0, 1.0] * 3))
        kept = [t for found in p._reduced.values() for t in found.values()]
        assert kept
        assert all(t.untyped_storage().nbytes() <= 8 * 3 * 2 * (1 + 32) for t in kept)  # a number a row and a channel


def test_trajectory_states_are_those_of_heuns_sampler(net):
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append((a[0].clone(), a[1].clone())))
    probe(net, 18, states="trajectory", n=2, seed=3, stats="rms")
    x, sigma = seen[-1]
    grid = karras_sigmas(18).tolist()
    visited = []
    net._forward_pre_hooks.clear()
    net.register_forward_pre_hook(lambda m, a: visited.append((float(a[1].flatten()[0]), a[0].clone())))
    sample(net, 2, steps=18, seed=3)
    states = {}
    for level, state in visited:
        states.setdefault(level, []).append(state)
    # Heun calls the network at each level but the first twice: the corrector's second slope, then the state itself
    for s, level in enumerate(sigma[:18].tolist()):
        key = min(states, key=lambda k: abs(k - level))
        torch.testing.assert_close(x[s::18], states[key][-1], rtol=1e-4, atol=1e-4)
    assert np.allclose(sigma[:18].tolist(), grid)
    for few in ([80.0, 0.5], [5.0]):
        seen.clear()
        net._forward_pre_hooks.clear()
        net.register_forward_pre_hook(lambda m, a: seen.append((a[0].clone(), a[1].clone())))
        probe(net, few, states="trajectory", n=2, seed=3, stats="rms")
        assert seen[-1][1].tolist() == few * 2
    with pytest.raises(GddlabError, match="needs no images"):
        probe(net, states="trajectory", data="digits")


def test_results_of_other_images_merge(net, pictures):
    options = {"data": pictures, "stats": ["rms", "cosine", "correlation", "rel_update"], "per_channel": True}
    whole = probe(net, [80.0, 1.0], n=9, **options)
    parts = [probe(net, [80.0, 1.0], n=n, start=start, **options) for n, start in ((4, 0), (2, 4), (3, 6))]
    assert [set(p.frame["n_images"]) for p in parts] == [{4}, {2}, {3, 2}]  # the last image has no partner
    merged = parts[0].merge(*parts[1:])
    pd.testing.assert_frame_equal(merged.frame, whole.frame, rtol=1e-5, atol=1e-6)
    assert merged.meta["n_images"] == 9
    for kind in ("cosine", "correlation"):
        for layer, matrix in whole.matrices[kind].items():
            np.testing.assert_allclose(merged.matrices[kind][layer], matrix, rtol=0, atol=1e-5)
    assert all(np.allclose(merged.channels[k]["var"], whole.channels[k]["var"], rtol=1e-4) for k in whole.channels)
    assert (parts[0].frame["n_images"] == 4).all()
    with pytest.raises(GddlabError, match="both results saw images 0 to 4 of seed 0"):
        merged.merge(parts[0])
    with pytest.raises(GddlabError, match="different networks"):
        merged.merge(probe(tiny(seed=1), [80.0, 1.0], n=2, start=9, **options))
    with pytest.raises(GddlabError, match=r"sigmas is \[80.0, 1.0\] here, \[1.0\] there"):
        merged.merge(probe(net, [1.0], n=2, start=9, **options))
    with pytest.raises(GddlabError, match="is in one result alone"):
        merged.merge(probe(net, [80.0, 1.0], n=2, start=9, **(options | {"layers": "model.enc.*"})))


def test_measurements_of_one_network_join(net, pictures):
    a = probe(net, [80.0, 1.0], n=3, data=pictures, stats=["rms", "cosine"])
    b = probe(net, [80.0, 1.0], n=3, data=pictures, stats="mean_abs", layers="block")
    c = probe(net, [5.0], n=2, states="prior", stats="rms")
    joined = a.join(b, c)
    assert joined.sigmas == [80.0, 5.0, 1.0]
    assert set(joined.stats) == {"rms", "cosine", "mean_abs"}
    assert len(joined.frame) == len(a.frame) + len(b.frame) + len(c.frame)
    assert joined.pivot("rms").shape[1] == 3
    order = [d["name"] for d in joined.meta["layers"]]
    assert [order.index(n) for n in joined.layers] == sorted(order.index(n) for n in joined.layers)
    assert joined.matrices.get("cosine", {}) == {}  # it would have to have noise levels that it has not
    assert a.join(b).matrices.get("cosine", {}).keys() == a.matrices.get("cosine", {}).keys()
    with pytest.raises(GddlabError, match="'cosine' compares the noise levels of one measurement"):
        a.join(probe(net, [5.0, 1.0], n=3, data=pictures, stats="cosine"))
    assert [part["states"] for part in joined.meta["joined"]] == ["noised", "noised", "prior"]
    with pytest.raises(GddlabError, match=r"'rms' of layer .* at sigma 80 is in both"):
        a.join(a)
    with pytest.raises(GddlabError, match="does not merge"):
        joined.merge(a)
    with pytest.raises(GddlabError, match="different networks"):
        a.join(probe(tiny(seed=1), [3.0], n=2, states="prior", stats="rms"))


def test_an_estimate_says_what_the_whole_would_cost(net, pictures):
    calls = []
    net.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    cost = estimate(net, [80.0, 1.0, 0.1], data=pictures, n=12, batch_size=6)
    assert isinstance(cost, Estimate)
    assert calls == [6, 6, 6]
    assert (cost.passes, cost.rows, cost.sigmas, cost.n_images) == (6, 6, 3, 12)
    assert cost.seconds > 0
    assert "12 images, 6 passes of 6 rows" in str(cost)
    assert not any(m._forward_hooks for m in net.modules())


def test_low_precision_runs_under_autocast(net, pictures):
    kinds = []
    net.model.enc["16x16_conv"].register_forward_hook(lambda m, a, y: kinds.append(y.dtype))
    low = probe(net, [80.0, 1.0], data=pictures, n=4, dtype="bfloat16", stats="rms")
    full = probe(net, [80.0, 1.0], data=pictures, n=4, stats="rms")
    assert kinds == [torch.bfloat16, torch.float32]
    np.testing.assert_allclose(low.frame["value"], full.frame["value"], rtol=0.05)
    assert low.meta["settings"]["dtype"] == "bfloat16"


def test_autocast_around_a_probe_changes_nothing(net, pictures):
    with torch.autocast("cpu", torch.bfloat16):
        inside = probe(net, [80.0, 1.0], data=pictures, n=2)
    outside = probe(net, [80.0, 1.0], data=pictures, n=2)
    assert inside.hash == outside.hash
    assert inside.meta["settings"] == outside.meta["settings"] == {"dtype": "float32"}


def test_layers_inside_a_container_are_measured(net, pictures):
    found = probe(net, [1.0], data=pictures, n=2, layers="model.enc")
    assert found.layers and all(name.startswith("model.enc.") for name in found.layers)


def test_a_quantised_network_is_refused_at_once(net, pictures):
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    net.register_buffer("packed", torch.zeros(1))
    net.register_state_dict_post_hook(lambda module, state, *_: state.update(packed=torch.qint8))
    with pytest.raises(GddlabError, match=r"the network is quantised \('packed' is no tensor\)"):
        probe(net, [1.0], data=pictures, n=2)
    assert not passes


def test_a_float64_network_is_measured_in_float64(pictures):
    net = tiny().double()
    seen = {}
    conv = net.model.enc["16x16_block0"].conv1
    conv.register_forward_hook(lambda m, a, y: seen.update(y=y.clone()))
    result = probe(net, [80.0, 1.0], data=pictures, n=4, batch_size=100, stats="rms")
    exact = seen["y"].square().flatten(1).mean(1).reshape(4, 2).mean(0).sqrt()
    assert result.pivot("rms").loc["model.enc.16x16_block0.conv1"].tolist() == pytest.approx(exact.tolist(), rel=1e-12)


def test_memory_does_not_grow_with_noise_levels_images_or_layers():
    """A pass of 32 rows takes the same memory for few and many noise levels, images and layers."""
    net = tiny(model_channels=32)
    widest = []
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_pre_hook(lambda m, a: widest.append(a[0].nbytes))

    def used(sigmas, n, **options):
        return peak_bytes(lambda: probe(net, sigmas, states="prior", n=n, batch_size=32, **options))

    with torch.no_grad():
        bare = peak_bytes(lambda: net(torch.zeros(32, 1, 16, 16), torch.ones(32)))
    assert bare > max(widest)  # the count counts
    few = used(4, 8, layers="model.enc.*")
    assert few < bare + max(widest)
    for many in (used(32, 1), used(16, 3), used(4, 24), used(4, 8, layers="all")):
        assert abs(many - few) < max(widest)


def test_presets_leave_out_what_runs_in_training_alone(pictures):
    net = tiny(augment_dim=9)
    for preset in ("all", "linear"):
        result = probe(net, [1.0], data=pictures, n=2, layers=preset, stats="rms")
        assert "model.map_layer0" in result.layers
        assert not any("map_augment" in n for n in result.layers)
    with pytest.raises(GddlabError, match=r"'model\.map_augment' did not run"):
        probe(net, [1.0], data=pictures, n=2, layers="model.map_augment", stats="rms")


def test_inference_mode_is_no_obstacle(net, pictures):
    plain = probe(net, [2.0, 1.0], data=pictures, n=3)
    with torch.inference_mode():
        inside = probe(net, [2.0, 1.0], data=pictures, n=3)
    pd.testing.assert_frame_equal(plain.frame, inside.frame, rtol=1e-6)


def test_trajectories_visit_levels_that_float32_does_not_hold(net):
    assert probe(net, [80.0, 0.2], states="trajectory", n=1, stats="rms").sigmas == [80.0, 0.2]


def test_what_is_no_network_is_refused():
    for thing in ("digits", None):
        with pytest.raises(GddlabError, match=r"the network is of type (str|NoneType): give a torch.nn.Module"):
            probe(thing)


def test_the_same_noise_on_other_images_is_not_other_noise(pictures):
    """The noise of image i is of seed + i: those of two near seeds are the same but for the ends."""
    options = {"data": pictures, "stats": "rms", "n": 4}
    first = probe(tiny(), [80.0], **options)
    with pytest.raises(GddlabError, match=r"images 1 to 4 of seed 0, or the same noise with seed 1: .* further away"):
        first.merge(probe(tiny(), [80.0], seed=1, **options))
    assert first.merge(probe(tiny(), [80.0], seed=4, **options)).meta["n_images"] == 8


@pytest.mark.parametrize("key", ["t", "cond", "guidance", "codec"])
def test_what_was_measured_otherwise_is_not_merged(pictures, key):
    first, second = (probe(tiny(), [80.0], data=pictures, stats="rms", n=4, start=i) for i in (0, 4))
    with pytest.raises(GddlabError, match=f"{key} is None here, 2 there: merge equal measurements"):
        first.merge(second.copy(meta=second.meta | {key: 2}))


def test_a_process_without_images_of_the_first_block_leaves_the_rows_to_another(pictures, monkeypatch):
    class Second:
        rank, size = 1, 2

        def gather_objects(self, value):
            return [64, value]

    monkeypatch.setattr(sys.modules["gddlab.probing.probe"], "present_ranks", Second)
    monkeypatch.setattr(sys.modules["gddlab.probing.probe"], "SIZES", (1, 2))
    how = _How("conv", "rms", False, None, None, None, False, _Where("cond", "image", "each"), blocks=4)
    inputs = Inputs(tiny(), 8, data=pictures, n=12)
    assert not _plan(inputs.denoiser, inputs, how._replace(batch_size=2))[1][0]  # it has none
    assert _with_rows(inputs.denoiser, inputs, how).batch_size == 64


def test_noise_counts_once(pictures):
    """Without a dataset an image is its noise, of seed + position, whatever the two are."""
    options = {"states": "prior", "stats": "rms"}
    first = probe(tiny(), [80.0], n=8, **options)
    for other in ({"seed": 4}, {"seed": 2, "start": 3}):
        with pytest.raises(GddlabError, match="both results saw images"):
            first.merge(probe(tiny(), [80.0], n=8, **options, **other))
    assert first.merge(probe(tiny(), [80.0], n=8, seed=8, **options)).meta["n_images"] == 16


def test_results_of_other_classes_do_not_merge(pictures):
    net = tiny(label_dim=3)
    options = {"data": pictures, "n": 4, "stats": "rms"}
    third = probe(net, [80.0], class_labels=2, **options)
    assert third.meta["labels"] == "class 2"
    with pytest.raises(GddlabError, match="labels is class 2 here, class 1 there"):
        third.merge(probe(net, [80.0], class_labels=1, start=4, **options))
    assert probe(net, [80.0], **options).meta["labels"] == "images"
    assert probe(net, [80.0], states="prior", n=2, stats="rms").meta["labels"] == "in turn"
    assert third.merge(probe(net, [80.0], class_labels=2, start=4, **options)).meta["n_images"] == 8


def test_layers_may_be_any_iterable_and_results_merge_however_they_were_named(net, pictures):
    names = ["model.enc.16x16_conv", "model.dec.16x16_aux_conv"]
    options = {"data": pictures, "stats": "rms", "batch_size": 2}
    made = probe(net, [80.0, 1.0, 0.5], n=2, layers=(n for n in names), **options)
    assert made.layers == names
    other = probe(net, [80.0, 1.0, 0.5], n=2, start=2, layers={*names}, dtype="float32", **options)
    assert made.merge(other).meta["n_images"] == 4


def test_contrast_of_joined_results_takes_a_level_that_was_measured(net, pictures):
    joined = probe(net, [80.0, 1.0], data=pictures, n=2, stats="mean").join(
        probe(net, [10.0, 0.1], data=pictures, n=2, stats="rms")
    )
    assert joined.contrast("rms", at=80.0)["at"].tolist() == joined.pivot("rms")[10.0].tolist()
    with pytest.raises(GddlabError, match="unknown column 'x'"):
        joined.pivot("rms", values="x")
    for call in (joined.join, joined.merge):
        with pytest.raises(GddlabError, match="3 is no ProbeResult"):
            call(3)


def test_numpy_numbers_are_numbers(net, pictures):
    assert len(probe(net, np.int64(3), data=pictures, n=1, stats="rms").sigmas) == 3
    assert probe(net, np.array([2.0, 1.0]), data=pictures, n=1, seed=np.int64(3), stats="rms").sigmas == [2.0, 1.0]


def test_float64_networks_see_float64(pictures):
    net = tiny().double()
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append((a[0].dtype, a[1].dtype)))
    result = probe(net, [2.0, 1.0], data=pictures, n=2)
    assert seen == [(torch.float64, torch.float64)]
    plain = probe(tiny(), [2.0, 1.0], data=pictures, n=2)
    np.testing.assert_allclose(result.frame["value"], plain.frame["value"], rtol=1e-3, atol=1e-4)
