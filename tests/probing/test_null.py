"""Null models: what stays, what is drawn anew, and how a result is compared with them."""

import numpy as np
import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.files import hash_tensors
from gddlab.nets import from_edm
from gddlab.probing import ProbeResult, null, probe, wrap
from gddlab.probing.null import Kind
from tests.conftest import TINY
from tests.probing.networks import tiny
from tests.probing.test_wrap import Convolutions, denoise

KINDS: tuple[Kind, ...] = ("init", "shuffled", "spectrum")


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_model_keeps_the_architecture_and_is_seeded(kind):
    net = tiny().train()
    net.card = "its card"
    before = hash_tensors(net.state_dict())
    state = torch.random.get_rng_state()
    first, again, other = (null(net, kind, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hash_tensors(net.state_dict()) == before and first.training and first.card == net.card
    for a, b in zip(net.state_dict().items(), first.state_dict().items(), strict=True):
        assert a[0] == b[0] and a[1].shape == b[1].shape and a[1].dtype == b[1].dtype
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), first.buffers(), strict=True))
    assert hash_tensors(first.state_dict()) == hash_tensors(again.state_dict())
    assert len({before, *(hash_tensors(m.state_dict()) for m in (first, other))}) == 3


def test_shuffled_weights_are_the_same_numbers():
    net = tiny()
    for p, q in zip(net.parameters(), null(net, "shuffled").parameters(), strict=True):
        assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)
    assert not torch.equal(net.model.enc["16x16_conv"].weight, null(net).model.enc["16x16_conv"].weight)


def test_a_spectrum_keeps_singular_values_and_nothing_else():
    net = tiny()
    other = null(net, "spectrum", seed=3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        if p.ndim < 2:
            assert torch.equal(p, q)
            continue
        a, b = p.flatten(1), q.flatten(1)
        torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b), rtol=1e-4, atol=1e-5)
        if a.numel() > 100:
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs() < 0.4


def test_layers_that_start_at_zero_get_the_trained_spread():
    torch.manual_seed(0)
    fresh = from_edm("EDMPrecond", **TINY)  # its last convolutions are near zero
    block = "16x16_block0"
    assert fresh.model.enc[block].conv1.weight.square().mean().sqrt() < 1e-4
    net = tiny()
    size = net.model.enc[block].conv1.weight.square().mean().sqrt()
    drawn = null(net, "init").model.enc[block]
    torch.testing.assert_close(drawn.conv1.weight.square().mean().sqrt(), size, rtol=0.2, atol=0)
    assert drawn.conv0.weight.abs().max() < 1  # of its own initialisation, which is bounded


def test_any_network_has_null_models(pictures):
    net = wrap(Convolutions(), denoise)
    for kind in KINDS:
        probe(null(net, kind), [1.0], data=pictures, layers="all", n=2)
    net.gddlab_bare.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(GddlabError, match="'scale' has no reset_parameters"):
        null(net, "init")
    with pytest.raises(GddlabError, match="did you mean 'shuffled'"):
        null(net, "shufled")


def test_hooks_and_running_means_are_not_drawn_anew(pictures):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    net.eval()[1].running_mean.fill_(3)
    seen = []
    net.register_forward_hook(lambda *_: seen.append(1))
    other = null(wrap(net, lambda model, x, sigma, labels: model(x)), "init")
    other(torch.zeros(1, 1, 16, 16), 1.0)
    assert not seen and other.gddlab_bare[1].running_mean.tolist() == [3, 3]


@pytest.fixture(scope="module")
def compared(pictures) -> ProbeResult:
    draws = {"nulls": ("shuffled", "init"), "null_draws": 2}
    return probe(tiny(), [80.0, 1.0, 0.01], data=pictures, n=12, batch_size=9, **draws)


def test_nulls_see_the_same_inputs(compared, pictures):
    assert {k: len(v) for k, v in compared.nulls.items()} == {"shuffled": 2, "init": 2}
    own = probe(null(tiny(), "init", seed=1), [80.0, 1.0, 0.01], data=pictures, n=12)
    np.testing.assert_allclose(compared.nulls["init"][1].frame["value"], own.frame["value"], rtol=1e-5, atol=1e-6)
    table = compared.responses()
    assert list(table["network"]) == ["trained", "shuffled", "init"]
    assert table["correlation_sem"].gt(0).all()


def test_a_network_does_not_differ_from_itself_and_differs_from_another(compared):
    same = compared.copy(nulls={"itself": (compared, compared)})
    assert not same.above_null("rms")["differs"].any()
    table = compared.above_null("rms")
    assert table["differs"].any() and len(table) == 2 * len(compared.pivot("rms").stack())
    found = table[table["differs"]]
    assert ((found["value"] < found["null_low"]) | (found["value"] > found["null_high"])).all()
    assert (table["p_corrected"] >= table["p"]).all()
    row = table[(table["kind"] == "init") & (table["sigma"] == 1.0)].iloc[0]
    assert row["value"] == compared.pivot("rms").loc[row["layer"], 1.0]
    draws = [r.pivot("rms").loc[row["layer"], 1.0] for r in compared.nulls["init"]]
    assert (row["null_low"], row["null_high"]) == (min(draws), max(draws))


def test_nulls_are_saved_merged_and_refused(compared, pictures, tmp_path):
    compared.save(tmp_path / "r")
    back = ProbeResult.load(tmp_path / "r")
    assert back.above_null("rms").equals(compared.above_null("rms"))
    halves = [
        probe(tiny(), [80.0, 1.0], nulls="init", null_draws=1, data=pictures, n=4, start=s, stats="rms") for s in (0, 4)
    ]
    whole = halves[0].merge(halves[1])
    assert whole.nulls["init"][0].meta["n_images"] == 8
    with pytest.raises(GddlabError, match="different null models"):
        halves[0].merge(probe(tiny(), [80.0, 1.0], data=pictures, n=4, start=4, stats="rms"))
    with pytest.raises(GddlabError, match="probe with nulls="):
        back.nulls["init"][0].above_null("rms")
    with pytest.raises(GddlabError, match="different null models"):
        halves[0].merge(
            probe(tiny(), [80.0, 1.0], nulls="init", null_draws=2, data=pictures, n=4, start=4, stats="rms")
        )
    joined = back.join(probe(tiny(), back.sigmas, data=pictures, n=4, stats="spectral_share"))
    assert joined.above_null("rms")["differs"].equals(back.above_null("rms")["differs"])
    joined.heatmap("spectral_share_0")  # which has no null models
    back.copy(nulls={}).save(tmp_path / "r")
    assert not list((tmp_path / "r").glob("null-*"))
    compared.save(tmp_path / "s")
    back.nulls["init"][0].save(tmp_path / "s" / "null-init-1")
    with pytest.raises(GddlabError, match=r"null-init-1 is not the null model that meta\.json names"):
        ProbeResult.load(tmp_path / "s")
    with pytest.raises(GddlabError, match="unknown kind of null model 5"):
        probe(tiny(), [1.0], nulls=5, data=pictures, n=1)
    assert not probe(tiny(), [1.0], nulls=None, data=pictures, n=1).nulls
    with pytest.raises(GddlabError, match="kind of null model"):
        probe(tiny(), [1.0], nulls=("shuffled", "permuted"), data=pictures, n=1)


def test_pictures_show_null_models(compared):
    heat = compared.heatmap("rms")
    strips = [ax for ax in heat.child_axes if ax.get_images()]
    assert [ax.get_xlabel() for ax in strips] == ["shuffled", "init"]
    shown = strips[1].get_images()[0].get_array()
    draws = [r.pivot("rms").iloc[:, ::-1] for r in compared.nulls["init"]]
    np.testing.assert_allclose(shown, sum(d.to_numpy() for d in draws) / 2)
    assert strips[0].get_images()[0].norm is not heat.collections[0].norm  # equal, not shared
    assert strips[0].get_images()[0].norm.vmax == heat.collections[0].norm.vmax

    def named(legend):
        return [t.get_text() for t in legend.get_texts()]

    assert {"shuffled: 90 % of layers", "init: 90 % of layers"} <= {*named(compared.lines("rms").get_legend())}
    assert {"shuffled: range", "init: range"} <= {*named(compared.lines("rms", over="depth").get_legend())}
    assert named(compared.stem("rms").get_legend()) == ["shuffled", "init"]
    assert "init: 90 % of layers" in named(compared.similarities().legends[0])
    plain = compared.copy(nulls={})
    assert not [ax for ax in plain.heatmap("rms").child_axes if ax.get_images()]
    assert plain.stem("rms").get_legend() is None
