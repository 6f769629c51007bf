"""Values against torch-fidelity's own entry point, and against the formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.evaluation import evaluate, find_extractor, metrics, register
from gddlab.evaluation.features import image_features
from gddlab.evaluation.metrics import (
    KID_SUBSETS,
    METRICS,
    SEED,
    check_metrics,
    classes,
    computed,
    copying,
    frechet,
    inception_score,
    kernel,
    mind,
    precision_recall,
    statistics,
)


def pixels(data):
    return torch.from_numpy(data.uint8).permute(0, 3, 1, 2)


class Rgb(torch.utils.data.Dataset):
    def __init__(self, data):
        self.x = pixels(data).expand(-1, 3, -1, -1)

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
        rng_seed=SEED,
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
    from gddlab.pretrained.backbones import lite_backbone

    x = pixels(some)[:3]
    got = image_features(x, find_extractor(name))
    y = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1) / 127.5 - 1, size=96, mode="bilinear")
    with torch.inference_mode():
        want = lite_backbone(f"tf_efficientnet_{name}", fold=False).forward_features(y).mean((2, 3))
    assert got.shape == (3, 1280)
    assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_batch(some):
    spec, x = find_extractor("lite0"), pixels(some)[:40]
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


def test_kernel_is_unbiased_and_its_spread_that_of_the_value():
    """Sets of a few images: each subset is all of them."""
    g = torch.Generator().manual_seed(5)
    found = [kernel(torch.randn(24, 3, generator=g), torch.randn(24, 3, generator=g))[0] for _ in range(150)]
    values, stds = (torch.tensor([getattr(v, name) for v in found]) for name in ("value", "std"))
    assert abs(values.mean()) < 3 * values.std() / 150**0.5
    assert 0.5 < stds.mean() / values.std() < 2
    assert kernel(torch.randn(3, 2, generator=g), torch.randn(9, 2, generator=g))[0].std is None
    some = kernel(*two_sets())[0]
    assert some.settings["subset_size"] == 300 and some.std > 0.01 * abs(some.value)


def test_frechet_of_few_images_and_of_statistics():
    """Fewer images than features: the covariance is singular."""
    a, b = two_sets(64)
    few = a[:20]
    x, y = few.double(), b.double()
    root = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / ((len(x) - 1) * (len(y) - 1)) ** 0.5
    want = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * root
    for got in (frechet(few, b), frechet(b, few), frechet(few, statistics(b))):
        assert_close(got[0].value, want.item(), rtol=1e-6, atol=0)
    assert abs(frechet(b, b.clone())[0].value) < 1e-8 * statistics(b).sigma.trace().item()


def test_a_value_is_computed_once_for_the_same_content(monkeypatch, tmp_path):
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path))
    a, b = two_sets()
    first = [computed(m, a, b) for m in ("fid", "kid", "prc", "mind")]
    assert first == [METRICS[m](a, b) for m in ("fid", "kid", "prc", "mind")]
    against = computed("fid", a, statistics(b))
    for m in METRICS:
        monkeypatch.setitem(METRICS, m, lambda *_: pytest.fail("computed again"))
    assert [computed(m, a.clone(), b.clone()) for m in ("fid", "kid", "prc", "mind")] == first
    assert computed("fid", a, statistics(b)) == against
    monkeypatch.setitem(METRICS, "fid", lambda *_: [metrics.Value("fid", 7.0, {})])
    assert computed("fid", a, b + 1)[0].value == 7.0
    for file in (tmp_path / "scores").glob("fid-*"):
        file.write_text("damaged")
    assert computed("fid", a, b)[0].value == 7.0
    for file in (tmp_path / "scores").glob("fid-*"):
        file.write_text("[1]")
    assert computed("fid", a, b)[0].value == 7.0


def test_mind_is_the_formula_in_plain_loops(monkeypatch):
    monkeypatch.setattr(metrics, "MIND_PROJECTIONS", 20)
    a, b = two_sets()
    a = a[:300]
    (got,) = mind(a, b)
    g = torch.Generator().manual_seed(SEED)
    directions = torch.randn(20, 16, generator=g, dtype=torch.float64).tolist()
    total = 0.0
    for direction in directions:
        length = sum(u * u for u in direction) ** 0.5
        x, y = (
            sorted(sum(u * v for u, v in zip(direction, row, strict=True)) / length for row in f.double().tolist())
            for f in (a, b)
        )
        total += sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / len(x)
    assert_close(got.value, 3 * 16 * total / 20, rtol=1e-9, atol=0)
    assert got.settings == {"projections": 20, "rng_seed": SEED}


def test_mind_in_pieces_and_of_a_shift(monkeypatch):
    a, b = two_sets()
    (whole,) = mind(a, b)  # 400 against 300: 300 of the 400 are drawn
    monkeypatch.setattr(metrics, "CHUNK", 700)
    assert_close(mind(a, b)[0].value, whole.value, rtol=1e-12, atol=0)
    assert mind(a, a)[0].value == 0
    # a shift s is moved on a direction u by (u.s)^2, which is |s|^2 / D in the mean
    assert_close(mind(a, a + 0.5)[0].value, 3 * 16 * 0.25, rtol=0.1, atol=0)


def test_inception_score_is_the_formula():
    logits = 3 * torch.randn(200, 7, generator=torch.Generator().manual_seed(3))
    (got,) = inception_score(logits)
    p = logits.double().softmax(1)[torch.from_numpy(np.random.RandomState(SEED).permutation(200))]
    tenths = [
        sum((q * (q / part.mean(0)).log()).sum() for q in part).div(len(part)).exp().item() for part in p.split(20)
    ]
    assert_close(got.value, float(np.mean(tenths)), rtol=1e-9, atol=0)
    assert_close(got.std, float(np.std(tenths)), rtol=1e-9, atol=0)
    with pytest.raises(GddlabError, match="at least 10"):
        inception_score(logits[:9])


def test_precision_and_recall_of_nested_sets():
    g = torch.Generator().manual_seed(2)
    wide = torch.rand(400, 2, generator=g)
    narrow = 0.4 + 0.1 * torch.rand(400, 2, generator=g)
    precision, recall = precision_recall(narrow, wide)
    assert precision.value > 0.9
    assert recall.value < 0.1


def logits_of(labels: torch.Tensor, k: int, sure: float = 5.0) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(labels, k).float()


def test_class_chi2_is_the_formula():
    from scipy.stats import chisquare

    g = torch.Generator().manual_seed(4)
    seen, wanted = torch.randint(7, (300,), generator=g), torch.randint(7, (500,), generator=g)
    chi2, confidence = classes(logits_of(seen, 7), logits_of(wanted, 7))
    counts = [np.bincount(x, minlength=7) for x in (seen, wanted)]
    want = chisquare(counts[0], counts[1] * 300 / 500).statistic
    assert_close(chi2.value, (want - 6) / 300, rtol=1e-9, atol=0)
    p = float(np.exp(5) / (np.exp(5) + 6))
    assert_close(confidence.value, p, rtol=1e-6, atol=0)
    mixed = torch.cat([logits_of(seen, 7), logits_of(seen, 7, 0.0)])
    low, high = classes(mixed, logits_of(wanted, 7))[1].interval
    error = 1.96 * (p - 1 / 7) / 2 / 600**0.5
    assert_close((low, high), ((p + 1 / 7) / 2 - error, (p + 1 / 7) / 2 + error), rtol=1e-2, atol=0)


@pytest.mark.parametrize("n", [100, 800])
def test_class_chi2_does_not_depend_on_the_number_of_images(n):
    """0 of an honest generator, 1 / (K - 1) without one of K classes, in the mean."""
    g = torch.Generator().manual_seed(6)
    real = logits_of(torch.arange(1000) % 5, 5)
    honest, lacks = (
        torch.tensor([classes(logits_of(torch.randint(k, (n,), generator=g), 5), real)[0].value for _ in range(200)])
        for k in (5, 4)
    )
    assert abs(honest.mean()) < 3 * honest.std() / 200**0.5
    assert abs(lacks.mean() - 1 / 4) < 3 * lacks.std() / 200**0.5
    assert_close(honest.std().item(), 8**0.5 / n, rtol=0.2, atol=0)


def test_class_chi2_where_real_images_are_counted_and_where_classes_are_given():
    """Shares from M real images add (K - 1) / M; classes as often as in the real images take it to -(K - 1) / N."""
    g, k, n, m = torch.Generator().manual_seed(8), 5, 400, 200
    pairs = [(torch.randint(k, (n,), generator=g), torch.randint(k, (m,), generator=g)) for _ in range(200)]
    found = torch.tensor([classes(logits_of(a, k), logits_of(b, k))[0].value for a, b in pairs])
    assert abs(found.mean() - (k - 1) / m) < 3 * found.std() / 200**0.5
    assert_close(found.std().item(), (2 * (k - 1)) ** 0.5 * (1 / n + 1 / m), rtol=0.2, atol=0)
    real = torch.arange(n) % k
    assert_close(classes(logits_of(real, k), logits_of(real, k))[0].value, -(k - 1) / n, rtol=1e-9, atol=0)


def test_classes_without_real_images():
    """Real images of two classes of ten: an image of another class counts much, and nothing is infinite."""
    real = logits_of(torch.arange(100) % 2, 10)
    same, other = (classes(logits_of(x, 10), real)[0].value for x in (torch.arange(50) % 2, torch.arange(50) % 3))
    assert abs(same) < 0.1 and 5 < other < np.inf


def brute(x, train, held_out, own=None):
    """Share and ratio by plain loops over the images."""
    x, train, held_out = x.double(), train.double(), held_out.double()
    first = [min((row - t).norm().item() for t in train) for row in x]
    second = [
        min((row - h).norm().item() for j, h in enumerate(held_out) if own is None or j != own[i])
        for i, row in enumerate(x)
    ]
    wins = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in zip(first, second, strict=True))
    t, h, share = len(train), len(held_out) - (own is not None), wins / len(x)
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return share * h / (share * h + (1 - share) * t), float(np.quantile(ratios, t / (t + h)))


def test_copying_is_the_formula_in_plain_loops(monkeypatch):
    g = torch.Generator().manual_seed(7)
    x, train, held_out = (torch.randn(n, 3, generator=g) for n in (40, 30, 20))
    for chunk in (metrics.CHUNK, 50):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        share, ratio = copying(x, train, held_out)
        assert_close((share.value, ratio.value), brute(x, train, held_out), rtol=1e-6, atol=0)
        own = torch.arange(20).flip(0)
        found = tuple(v.value for v in copying(held_out[own], train, held_out, own))
        assert_close(found, brute(held_out[own], train, held_out, own), rtol=1e-6, atol=0)
    assert share.settings == ratio.settings == {"train": 30, "held_out": 20}
    assert share.interval[0] < share.value < share.interval[1]
    assert ratio.interval[0] <= ratio.value <= ratio.interval[1]


@pytest.mark.parametrize("sizes", [(400, 400), (900, 300), (50, 600)])
def test_copying_of_an_honest_generator_and_of_a_copier(sizes):
    """Whatever the sizes of the two sets: 0.5 and 1 of the one, 1 and 0 of the other."""
    g = torch.Generator().manual_seed(8)
    inside = [0, 0]
    found = []
    for _ in range(60):
        x, train, held_out = (torch.randn(n, 4, generator=g) for n in (300, *sizes))
        share, ratio = copying(x, train, held_out)
        inside[0] += share.interval[0] <= 0.5 <= share.interval[1]
        inside[1] += ratio.interval[0] <= 1 <= ratio.interval[1]
        found.append((share.value, ratio.value))
    shares, ratios = (torch.tensor(column) for column in zip(*found, strict=True))
    assert abs(shares.mean() - 0.5) < 0.02 and abs(ratios.mean() - 1) < 0.03
    assert min(inside) >= 52  # of 60, at 95 %
    copies = train[torch.randint(len(train), (300,), generator=g)]
    share, ratio = copying(copies, train, held_out)
    assert (share.value, ratio.value) == (1, 0)
    assert share.interval[0] > 0.5 and share.interval[1] == pytest.approx(1) and ratio.interval == (0, 0)
    far = copying(100 + 0.1 * torch.randn(300, 4, generator=g), train, held_out)
    low, high = far[0].interval
    assert high - low > 0.5  # all are near one real image, which says nothing


def test_copying_of_parts_and_ties():
    g = torch.Generator().manual_seed(9)
    train, held_out = torch.randn(300, 4, generator=g), torch.randn(300, 4, generator=g)
    half = torch.cat([train[:150], torch.randn(150, 4, generator=g)])
    share, ratio = copying(half, train, held_out)
    assert 0.7 < share.value < 0.8 and ratio.value < 0.5
    assert [v.value for v in copying(train, train, train)] == [0.5, 1]
    share, ratio = copying(held_out, train, held_out)  # not told that they are what was held out
    assert (share.value, ratio.value) == (0, metrics.MOST_RATIO)


def test_values_come_back_from_the_cache_with_their_intervals(tmp_path, monkeypatch):
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path))
    g = torch.Generator().manual_seed(10)
    x, train, held_out = (torch.randn(n, 3, generator=g) for n in (40, 30, 20))
    first = computed("copying", x, train, held_out)
    monkeypatch.setitem(METRICS, "copying", lambda *_: pytest.fail("computed again"))
    assert computed("copying", x, train, held_out) == first and first[0].interval is not None


def test_refusals():
    with pytest.raises(GddlabError, match="did you mean 'fid'"):
        check_metrics(("fids",))
    with pytest.raises(GddlabError, match="no metrics"):
        check_metrics(())
    with pytest.raises(GddlabError, match="at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
