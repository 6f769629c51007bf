"""Readouts against scikit-learn on features taken by hand, and on networks that hold what is known."""

import dataclasses
import warnings
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from gddlab.datasets import ImageDataset, order
from gddlab.errors import GddlabError
from gddlab.probing import ProbeResult, probe
from gddlab.probing.decode import INVERSE_STRENGTHS, STRENGTHS, Explained, Reader, decode
from gddlab.probing.decode import Ridge as Sums
from gddlab.probing.layers import select_layers
from gddlab.sampling import latents
from tests.probing.networks import tiny

SIGMAS = [80.0, 0.02]
N, HELD_OUT = 240, 80
FEW = {"timesteps": SIGMAS, "n": N, "held_out": HELD_OUT, "dims": 64}


@pytest.fixture(scope="module")
def spots() -> ImageDataset:
    """Images of 16 independent pixels, brighter by class."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 400)
    images = random.integers(0, 200, (400, 4, 4, 1)) + 25 * classes[:, None, None, None]
    return ImageDataset(images.astype(np.uint8), classes, classes=3, name="spots", source="random")


class Known(nn.Module):
    """One layer sees the state whole, another only what it is told, and one writes into what the first gave."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.told, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(1, 8), nn.ReLU(inplace=True)
        self.wide = nn.Conv2d(4, 8, 1)
        self.img_channels, self.img_resolution = 1, 4

    def forward(self, x, sigma, class_labels=None):
        told = self.told(sigma[:, None].log())
        return x + 0 * self.wide(self.act(self.seen(x))).mean(1, keepdim=True) + 0 * told.mean()


def value(result, stat, layer, sigma, column="value"):
    return result.pivot(stat, column).loc[layer, sigma]


@pytest.fixture(scope="module")
def found(spots):
    return decode(Known(), layers=["seen", "told"], data=spots, **FEW)


def test_what_is_there_is_found_and_what_is_not_is_not(found):
    for stat, sigma in (("decode_image", 0.02), ("decode_noise", 80.0)):
        other = {80.0: 0.02, 0.02: 80.0}[sigma]
        assert value(found, stat, "seen", sigma) > 0.99
        assert abs(value(found, stat, "seen", other)) < 0.05
        assert abs(found.pivot(stat).loc["told"]).max() < 0.05
        assert abs(found.pivot(f"{stat}_chance")).max(axis=None) < 0.05
    assert value(found, "decode_class", "seen", 0.02) > 0.6
    for stat, layer, sigma in (
        ("decode_class", "told", 0.02),
        ("decode_class", "seen", 80.0),
        ("decode_class_chance", "seen", 0.02),
        ("decode_class_chance", "told", 80.0),
    ):
        assert abs(value(found, stat, layer, sigma) - 1 / 3) < 0.2
    assert found.pivot("decode_sigma").loc["told"].min() > 0.99
    assert found.pivot("decode_sigma").loc["seen"].mean() < 0.5
    assert abs(found.pivot("decode_sigma_chance").mean(axis=1)).max() < 0.1


def test_the_result_says_what_it_is(found, spots, tmp_path):
    assert set(found.stats) == {f"decode_{t}{c}" for t in ("image", "noise", "class", "sigma") for c in ("", "_chance")}
    assert set(found.frame["n_images"]) == {HELD_OUT}
    assert found.meta["settings"] == {"tier": "decode", "dims": 64, "n": N, "held_out": HELD_OUT, "dtype": "float32"}
    assert found.meta["images"] == [[0, 0, N + HELD_OUT]]
    about = found.meta["stats"]
    assert "the mean over them is the usual R²" in about["decode_sigma"]["definition"]
    assert about["decode_class_chance"]["unit"] == "share"
    found.save(tmp_path)
    pd.testing.assert_frame_equal(ProbeResult.load(tmp_path).frame, found.frame)
    joined = found.join(probe(Known(), SIGMAS, data=spots, layers=["seen", "told"], n=4, stats="rms"))
    assert {"rms", "decode_image"} <= set(joined.stats)
    with pytest.raises(GddlabError, match="does not merge"):
        found.merge(found)


@pytest.fixture(scope="module")
def by_hand(spots):
    """Features of "seen" at each sigma, (images, 64), clean images, noise and classes."""
    which = order(400, 0, 0, N + HELD_OUT)
    clean, noise = spots.images(which), latents(range(N + HELD_OUT), (1, 4, 4))
    net = Known()
    with torch.no_grad():
        features = {s: net.seen(clean + s * noise).flatten(1).double().numpy() for s in SIGMAS}
    return features, clean.flatten(1).double().numpy(), noise.flatten(1).double().numpy(), spots.class_ids[which]


def best_ridge(x, y):
    """scikit-learn's ridge with the strength whose generalised cross-validation score, from its hat matrix, is best."""
    xc, yc, n = x - x.mean(0), y - y.mean(0), len(x)
    largest = np.linalg.eigvalsh(xc.T @ xc)[-1]
    scores = {}
    for share in STRENGTHS.tolist()[10:]:  # weaker ones are too close to singular for this way of computing
        hat = xc @ np.linalg.solve(xc.T @ xc + share * largest * np.eye(x.shape[1]), xc.T) + 1 / n
        scores[share] = n * ((yc - hat @ yc) ** 2).sum() / (n - np.trace(hat)) ** 2
    return Ridge(alpha=min(scores, key=scores.get) * largest, solver="cholesky").fit(x, y)


@pytest.mark.parametrize(("stat", "sigma"), [("image", 80.0), ("image", 0.02), ("noise", 80.0), ("noise", 0.02)])
def test_pixels_are_read_as_scikit_learn_does(found, by_hand, stat, sigma):
    x, y = by_hand[0][sigma], by_hand[1 if stat == "image" else 2]
    fitted = best_ridge(x[:N], y[:N])
    error = ((y[N:] - fitted.predict(x[N:])) ** 2).sum(1)
    spread = ((y[N:] - y[:N].mean(0)) ** 2).sum(1)
    expected = 1 - error.mean() / spread.mean()
    assert value(found, f"decode_{stat}", "seen", sigma) == pytest.approx(expected, abs=2e-4)
    ratio = error.mean() / spread.mean()
    sem = (error - ratio * spread).std(ddof=1) / spread.mean() / HELD_OUT**0.5
    assert value(found, f"decode_{stat}", "seen", sigma, "sem") == pytest.approx(sem, rel=0.02)


def test_classes_are_read_as_scikit_learn_does(found, by_hand):
    x, ids = by_hand[0][0.02].astype(np.float32), by_hand[3]
    few = N * 4 // 5
    losses = {}
    for c in INVERSE_STRENGTHS:
        scale = StandardScaler().fit(x[:few])
        model = LogisticRegression(C=c, max_iter=1000).fit(scale.transform(x[:few]), ids[:few])
        losses[c] = log_loss(ids[few:N], model.predict_proba(scale.transform(x[few:N])))
    scale = StandardScaler().fit(x[:N])
    model = LogisticRegression(C=min(losses, key=losses.get), max_iter=1000).fit(scale.transform(x[:N]), ids[:N])
    right = model.predict(scale.transform(x[N:])) == ids[N:]
    assert value(found, "decode_class", "seen", 0.02) == pytest.approx(right.mean(), abs=1.5 / HELD_OUT)
    sem = value(found, "decode_class", "seen", 0.02, "sem")
    assert sem == pytest.approx((right.mean() * (1 - right.mean()) / HELD_OUT) ** 0.5, rel=0.1)


def test_the_mean_over_levels_is_the_r2_of_sigma(found, by_hand):
    x = np.concatenate([by_hand[0][s] for s in SIGMAS])
    y = np.repeat(np.log(SIGMAS), N + HELD_OUT)[:, None]
    fit = np.tile(np.arange(N + HELD_OUT) < N, 2)
    said = best_ridge(x[fit], y[fit]).predict(x[~fit])
    assert found.pivot("decode_sigma").loc["seen"].mean() == pytest.approx(r2_score(y[~fit], said), abs=1e-3)
    alone = 1 - ((said[:HELD_OUT] - np.log(80)) ** 2).mean() / np.log(SIGMAS).var()
    assert value(found, "decode_sigma", "seen", 80.0) == pytest.approx(alone, abs=1e-3)


def test_sums_give_the_ridge_of_all_rows_whatever_their_order():
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64) + 1000
    y = x[:, :2] * 3 + torch.randn(50, 2, dtype=torch.float64)
    sums = Sums()
    for i in range(0, 50, 7):
        sums.add(x[i : i + 7], {"y": y[i : i + 7]})
    expected = best_ridge(x.numpy(), y.numpy()).predict(x.numpy())
    np.testing.assert_allclose(sums.readout("y")(x).numpy(), expected, rtol=1e-6)
    constant = Sums()
    constant.add(torch.ones(9, 3, dtype=torch.float64), {"y": y[:9]})
    torch.testing.assert_close(constant.readout("y")(torch.ones(2, 3).double()), y[:9].mean(0).expand(2, -1))


def test_numbers_do_not_depend_on_the_batch_size_or_the_other_layers(found, spots):
    for batch_size, layers in ((13, ["seen", "told"]), (1000, ["seen"])):
        other = decode(Known(), layers=layers, data=spots, batch_size=batch_size, **FEW)
        expected = found.frame[found.frame["layer"].isin(layers)].reset_index(drop=True)
        numbers = ["value", "sem"]
        pd.testing.assert_frame_equal(other.frame.drop(columns=numbers), expected.drop(columns=numbers))
        np.testing.assert_allclose(other.frame[numbers], expected[numbers], rtol=1e-4, atol=1e-5)


def test_another_seed_reads_other_images(found, spots):
    other = decode(Known(), targets="image", layers="seen", data=spots, seed=1, **FEW)
    assert other.stats == ["decode_image", "decode_image_chance"]
    assert value(other, "decode_image", "seen", 0.02) == pytest.approx(
        value(found, "decode_image", "seen", 0.02), abs=0.01
    )
    assert value(other, "decode_image", "seen", 0.02) != value(found, "decode_image", "seen", 0.02)


def test_a_projection_is_a_product_with_one_gaussian_matrix():
    net = Known()
    wide, narrow = torch.randn(5, 40_000), torch.randn(5, 20)
    reader = Reader(net, net, select_layers(net, "seen"), 32, seed=3)
    first = reader.features(wide[:, :20_000])  # its pieces are made before those of the larger one
    found = reader.features(wide)
    matrix = torch.cat(reader._pieces)[:40_000].double()
    assert abs(matrix.std() - 1) < 0.01
    torch.testing.assert_close(found, wide.double() @ matrix / 32**0.5, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first, wide[:, :20_000].double() @ matrix[:20_000] / 32**0.5, rtol=1e-4, atol=1e-3)
    assert torch.equal(Reader(net, net, select_layers(net, "seen"), 32, seed=3).features(wide), found)
    assert not torch.equal(Reader(net, net, select_layers(net, "seen"), 32, seed=4).features(wide), found)
    assert torch.equal(reader.features(narrow), narrow.double())
    lengths = found.square().sum(1) / wide.double().square().sum(1)
    assert (lengths - 1).abs().max() < 1  # kept on average (Johnson and Lindenstrauss 1984)


def test_a_layer_wider_than_the_projection_is_read(spots):
    result = decode(Known(), [0.02], ["image"], layers=["seen", "wide"], data=spots, n=N, held_out=HELD_OUT, dims=40)
    assert value(result, "decode_image", "seen", 0.02) > 0.99  # 40 numbers of 64, which are functions of 16 pixels
    assert 0.2 < value(result, "decode_image", "wide", 0.02) < 0.99  # of what is left behind the activation


def test_an_output_is_read_before_the_network_writes_into_it(found, spots):
    """The activation works in place; had it been read afterwards, the pixels would not be found whole."""
    assert value(found, "decode_image", "seen", 0.02) > 0.99
    after = decode(Known(), [0.02], "image", layers="act", data=spots, n=N, held_out=HELD_OUT, dims=64)
    assert value(after, "decode_image", "act", 0.02) < 0.98


def test_fewer_images_than_features_are_announced(spots):
    few = {"targets": "image", "layers": "seen", "data": spots, "dims": 64}
    with pytest.warns(UserWarning, match=r"64 features are read from n=100 and held_out=20 images: .* dims=19 or less"):
        result = decode(Known(), [1.0], n=100, held_out=20, **few)
    assert abs(result.frame["value"]).max() < 1
    with pytest.warns(UserWarning, match="n=50 and held_out=70"):
        decode(Known(), [1.0], n=50, held_out=70, **few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(Known(), [1.0], n=64, held_out=64, **few)
        decode(Known(), [1.0], "image", layers="told", data=spots, n=8, held_out=8)  # it has 8 numbers


def test_bad_input_is_refused_in_one_line(spots):
    plain = ImageDataset(spots.uint8, name="plain", source="random")
    same = ImageDataset(spots.uint8, np.zeros(400, int), classes=1, name="same", source="random")
    for kwargs, says in (
        ({"targets": "imge"}, "unknown targets 'imge': did you mean 'image'"),
        ({"targets": ["image", "labels"]}, "targets="),
        ({"targets": ()}, "targets is empty: accepted are image, noise, class, sigma"),
        ({"data": plain}, r"target \"class\": 'plain' has no labels, give targets=\(\"image\", \"noise\", \"sigma\"\)"),
        ({"data": same}, "the first 192 of n=240 images are of one class"),
        (
            {"timesteps": [1.0], "targets": ["sigma", "image"]},
            r"noise level 1 alone: give several, or targets=\(\"image\",\)",
        ),
        ({"n": 390}, "n=390 and held_out=80 different images, but 'spots' has 400: give fewer"),
        ({"dims": 0}, "dims=0"),
        ({"held_out": 0}, "held_out=0"),
        ({"layers": "sen"}, "did you mean 'seen'"),
        ({"timesteps": [-1.0]}, "sigma -1"),
    ):
        with pytest.raises(GddlabError, match=says) as e:
            decode(Known(), **({"data": spots, "layers": ["seen"]} | FEW | kwargs))
        assert "\n" not in str(e.value)
    net = Known()
    net.never = nn.Conv2d(1, 1, 1)
    with pytest.raises(GddlabError, match="'never' did not run"):
        decode(net, layers="never", data=spots, **FEW)


def test_values_that_are_not_finite_are_named(spots):
    net = Known()
    net.seen.register_forward_hook(
        lambda m, a, y: torch.where(a[0].abs().amax((1, 2, 3), keepdim=True) > 9, torch.inf, y)
    )
    with pytest.warns(RuntimeWarning, match=r"seen \(output\) at sigma 80"):
        result = decode(net, layers=["seen", "told"], data=spots, **FEW)
    (bad,) = result.meta["nonfinite"]
    assert bad == {"layer": "seen", "side": "output", "sigma": 80.0, "images": N + HELD_OUT}
    for stat in ("decode_image", "decode_class"):
        assert result.pivot(stat).isna().to_numpy().tolist() == [[True, False], [False, False]]
    assert result.pivot("decode_sigma").isna().to_numpy().tolist() == [[True, True], [False, False]]


def test_a_conditional_network_is_read_under_any_label(pictures):
    net = tiny(label_dim=3)
    result = decode(net, [1.0], ["image", "class"], layers="model.enc.*_block0", data=pictures, n=8, held_out=4, dims=2)
    assert result.meta["labels"] == "images"
    assert set(result.frame["resolution"]) == {8, 16}
    other = decode(
        net, [1.0], ["image"], layers="model.enc.*_block0", data=pictures, n=8, held_out=4, dims=2, class_labels=1
    )
    assert other.meta["labels"] == "class 1"


def test_the_network_is_left_as_it_was_and_no_output_outlives_its_pass(spots):
    net = Known().train()
    seen, alive = [], []
    net.seen.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    net.register_forward_pre_hook(lambda m, a: alive.append(sum(r() is not None for r in seen)))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    decode(net, SIGMAS, ["image", "sigma"], layers=["seen", "wide"], data=spots, n=32, held_out=32, dims=16)
    assert len(alive) == 6 and max(alive) == 0  # fitted, scored, and scored for sigma, at two levels
    assert net.training
    del alive[:]
    decode(net, SIGMAS, "sigma", layers="seen", data=spots, n=32, held_out=32, dims=16)
    assert len(alive) == 4  # held-out images are passed once where no level has readouts of its own
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_low_precision_gives_nearly_the_same(found, spots):
    low = decode(Known(), targets=["image"], layers=["seen"], data=spots, dtype="bfloat16", **FEW)
    assert low.meta["settings"]["dtype"] == "bfloat16"
    assert value(low, "decode_image", "seen", 0.02) == pytest.approx(
        value(found, "decode_image", "seen", 0.02), abs=0.02
    )
    assert not low.frame["value"].equals(found.frame["value"][: len(low.frame)])


def test_shares_are_one_minus_a_ratio():
    stat = type("S", (Explained,), {"name": "s", "__module__": "gddlab.x"})()
    stat.update(x=torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]], dtype=torch.float64))
    assert stat.result()[0].item() == 0.5


def test_readouts_are_drawn_with_chance_behind(found, result):
    figure = found.readouts()
    panels = figure.axes[:4]
    assert [ax.get_title(loc="left") for ax in panels] == ["clean image", "noise", "class", "ln σ"]
    for ax, target in zip(panels, ("image", "noise", "class", "sigma"), strict=True):
        table = found.pivot(f"decode_{target}").iloc[:, ::-1]
        drawn = [line.get_ydata() for line in ax.lines]
        np.testing.assert_array_equal(drawn, table.to_numpy())
        chance = found.pivot(f"decode_{target}_chance")
        heights = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(chance.min(axis=None))
        assert heights.max() == pytest.approx(chance.max(axis=None))
    assert "chance: shuffled targets" in [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(found.readouts("seen").axes[0].lines) == 1
    plt.close("all")
    with pytest.raises(GddlabError, match="nothing was read out"):
        result.readouts()
    with pytest.raises(GddlabError, match="did you mean 'seen'"):
        found.readouts("sen")
    assert dataclasses.is_dataclass(found)
