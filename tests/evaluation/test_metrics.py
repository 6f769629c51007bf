"""Values against torch-fidelity's own entry point, and against the formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.evaluation import evaluate, find_extractor, register
from gddlab.evaluation.features import image_features, real_images
from gddlab.evaluation.metrics import KID_SEED, KID_SUBSETS, check_metrics, frechet, kernel, precision_recall


class Rgb(torch.utils.data.Dataset):
    def __init__(self, data):
        self.x = real_images(data).expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


def test_equal_to_calculate_metrics(some, others):
    import torch_fidelity

    register()
    register()
    theirs = torch_fidelity.calculate_metrics(
        input1=Rgb(some),
        input2=Rgb(others),
        feature_extractor="lite2",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=64,
        kid_subsets=KID_SUBSETS,
        rng_seed=KID_SEED,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
    )
    ours = evaluate(some, data=others, metrics=("fid", "kid", "prc"))
    assert_close(ours["fd-lite2"], theirs["frechet_inception_distance"], rtol=1e-4, atol=0)
    assert_close(ours["kd-lite2"], theirs["kernel_inception_distance_mean"], rtol=1e-4, atol=1e-8)
    assert ours["precision-lite2"] == theirs["precision"]
    assert ours["recall-lite2"] == theirs["recall"]
    assert ours["fd-lite2"] > 1


@pytest.mark.parametrize("name", ["lite2", "lite0"])
def test_extractor_is_the_unfolded_network_on_a_resized_image(name, some):
    from gddlab.nets.lite import lite_backbone

    x = real_images(some)[:3]
    got = image_features(x, find_extractor(name))
    y = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1) / 127.5 - 1, size=96, mode="bilinear")
    with torch.inference_mode():
        want = lite_backbone(f"tf_efficientnet_{name}", fold=False).forward_features(y).mean((2, 3))
    assert got.shape == (3, 1280)
    assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch(some):
    spec, x = find_extractor("lite0"), real_images(some)[:40]
    assert_close(image_features(x, spec)[33:], image_features(x[33:], spec), rtol=1e-4, atol=1e-5)


def two_sets(d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(400, d, generator=g) @ torch.randn(d, d, generator=g)
    b = torch.randn(300, d, generator=g) @ torch.randn(d, d, generator=g) + 1
    return a, b


def test_frechet_is_the_formula_in_float64():
    from scipy.linalg import sqrtm

    a, b = two_sets()
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    root = sqrtm(s)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(root @ t @ root).real)
    (got,) = frechet(a, b)
    assert_close(got.value, float(want), rtol=1e-4, atol=0)


def test_frechet_of_shifted_features_is_the_squared_shift():
    a, _ = two_sets()
    (got,) = frechet(a, a + 0.5)
    assert_close(got.value, 16 * 0.25, rtol=1e-4, atol=0)


def test_kernel_is_the_formula_in_float64():
    a, b = two_sets()
    a = a[:300]  # the subset is then the whole set, and its order does not matter
    (got,) = kernel(a, b)
    x, y = a.double(), b.double()
    k = lambda u, v: (u @ v.T / 16 + 1) ** 3  # noqa: E731
    xx, yy, n = k(x, x), k(y, y), 300
    want = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * k(x, y).mean()
    assert_close(got.value, want.item(), rtol=1e-4, atol=0)
    assert got.settings["subset_size"] == 300


def test_precision_and_recall_of_nested_sets():
    g = torch.Generator().manual_seed(2)
    wide = torch.rand(400, 2, generator=g)
    narrow = 0.4 + 0.1 * torch.rand(400, 2, generator=g)
    precision, recall = precision_recall(narrow, wide)
    assert precision.value > 0.9
    assert recall.value < 0.1


def test_refusals():
    with pytest.raises(GddlabError, match="did you mean 'fid'"):
        check_metrics(("fids",))
    with pytest.raises(GddlabError, match="no metrics"):
        check_metrics(())
    with pytest.raises(GddlabError, match="at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(GddlabError, match="give uint8"):
        image_features(torch.zeros(2, 1, 16, 16), find_extractor("lite2"))
