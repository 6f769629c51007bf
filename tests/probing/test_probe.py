import numpy as np
import pandas as pd
import pytest
import torch

from gddlab.datasets import ImageDataset, order
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors
from gddlab.probing import DEFAULT, Probe, probe
from gddlab.sampling import karras_sigmas, latents
from tests.probing.networks import tiny


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
        assert all(np.allclose(other.gram[k], result.gram[k], rtol=0, atol=1e-6) for k in result.gram)


def test_a_pass_holds_whole_images_within_the_batch(net, pictures):
    rows = []
    net.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=5, batch_size=8, stats="rms")
    probe(net, [3.0, 2.0, 1.0], data=pictures, n=2, batch_size=1, stats="rms")
    assert rows == [6, 6, 3, 3, 3]


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
    with pytest.raises(GddlabError, match=r'names no dataset: give data=, or states="prior"'):
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
        ({"timesteps": "abc"}, "timesteps='abc'"),
        ({"states": "noise"}, "did you mean 'noised'"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"states": "prior"}, "leave data= away"),
        ({"n": 13}, "'pictures' has 12: give n=12 or less"),
        ({"n": 0}, "n=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": "model.enc.16x16_con"}, "did you mean"),
        ({"stats": "rm"}, "did you mean 'rms'"),
    ],
)
def test_bad_input_is_refused(net, pictures, kwargs, says):
    with pytest.raises(GddlabError, match=says):
        probe(net, **({"data": pictures, "n": 2, "timesteps": [1.0]} | kwargs))


def test_sigma_outside_of_the_range_and_images_that_do_not_fit(pictures):
    with pytest.raises(GddlabError, match=r"sigma 80 in timesteps: this network accepts 0.5 to 20"):
        probe(tiny(sigma_min=0.5, sigma_max=20.0), [80.0], data=pictures)
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
    assert set(result.stats) == {"rms", "mean_abs", "cosine"}
    with pytest.raises(GddlabError, match="img_channels"):
        probe(Mine(), [1.0], states="prior", n=3)


def test_meta_says_where_numbers_come_from(net, pictures, result):
    meta = result.meta
    assert meta["model"]["fingerprint"] == hash_tensors(net.state_dict())
    assert meta["model"]["precond"] == "EDMPrecond"
    assert meta["data"] == pictures.manifest.to_dict()
    assert [(n, tuple(s)) for n, s in meta["parameters"]] == [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    assert set(meta["stats"]) == set(DEFAULT)
    assert meta["nonfinite"] == []
    assert torch.__version__.startswith(meta["versions"]["torch"])


def test_no_activation_is_kept(net):
    with torch.no_grad(), Probe(net, [2.0, 1.0], layers="all") as p, p.images(3):
        net(torch.ones(6, 1, 16, 16), torch.tensor([2.0, 1.0] * 3))
        kept = [t for found in p._reduced.values() for t in found.values()]
        assert kept
        assert all(t.untyped_storage().nbytes() <= 8 * 3 * 2 * 2 for t in kept)
