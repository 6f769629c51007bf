"""Scores of one set of features against another, or of class logits.

Each is computed by torch-fidelity's own function where it has one: not MIND, classes and copying.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.evaluation.features import cached
from gddlab.files import hash_json, hash_tensors, write_json
from gddlab.provenance import versions

KID_SUBSETS = 20  # torch-fidelity's 100 take five times as long, for a smaller error of the mean
KID_SUBSET_SIZE = 1000
PRC_NEIGHBORHOOD = 3
IS_SPLITS = 10
MIND_PROJECTIONS = 1000
MOST_RATIO = 1000.0
"""Ratios of distances above it count as it: the denominator may be 0."""
Z = 1.959964
"""Standard deviations to either side that hold 95 % of a normal distribution."""
SEED = 2020  # torch-fidelity's default
REVISION = 2
"""Part of the cache key; to be raised when a change of code changes a value."""
CHUNK = 1 << 22
"""Numbers held at once."""


class Value(NamedTuple):
    """A number, its kind, the settings behind it; its spread over subsets, and its 95 % interval, if there are any."""

    kind: str
    value: float
    settings: dict[str, Any]
    std: float | None = None
    interval: tuple[float, float] | None = None


class Statistics(NamedTuple):
    """Mean, (D,), and covariance, (D, D), of features, float64."""

    mu: Tensor
    sigma: Tensor


def statistics(features: Float[Tensor, "n d"]) -> Statistics:
    """Mean and unbiased covariance of features, (N, D), N at least 2."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features.double())
    return Statistics(torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"]))


def frechet(generated: Float[Tensor, "n d"] | Statistics, real: Float[Tensor, "m d"] | Statistics) -> list[Value]:
    """Frechet distance of two Gaussians (Heusel et al. 2017, equation 6).

    Args:
        generated, real: Features, (N, D) and (M, D), or their mean and covariance.

    Returns:
        A distance of at least 0; of equal statistics exactly 0.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    x, y = (s if isinstance(s, Statistics) else statistics(s) for s in (generated, real))
    if torch.equal(x.mu, y.mu) and torch.equal(x.sigma, y.sigma):  # rounding would make up to 1e-4 of it, of any sign
        return [Value("fid", 0.0, {})]
    a, b = ({"mu": s.mu.numpy(), "sigma": s.sigma.numpy()} for s in (x, y))
    return [Value("fid", max(fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID], 0.0), {})]


def kernel(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> list[Value]:
    """Kernel distance: unbiased squared MMD, kernel (x.y / D + 1)^3, over subsets (Binkowski et al. 2018, section 4).

    A subset has 1,000 images or, where a set has fewer, as many as that set. Such subsets hardly differ; the spread is
    therefore that of subsets of at most half a set: where sets have up to 2,000 images, about the value's standard
    error.

    Args:
        generated, real: Features, (N, D) and (M, D), float32.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    def found(size: int) -> dict[str, float]:
        how: dict[str, Any] = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
        return kid_features_to_metric(generated, real, **how)

    least = min(len(generated), len(real))
    size, half = min(KID_SUBSET_SIZE, least), min(KID_SUBSET_SIZE, least // 2)
    out = found(size)
    std = None if half < 2 else (out if half == size else found(half))[KEY_METRIC_KID_STD]
    settings = {"subsets": KID_SUBSETS, "subset_size": size, "rng_seed": SEED}
    return [Value("kid", out[KEY_METRIC_KID_MEAN], settings, std)]


def precision_recall(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> list[Value]:
    """Improved precision and recall, 3 neighbours (Kynkaanniemi et al. 2019, section 2).

    Args:
        generated, real: Features, (N, D) and (M, D), float32.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    k = PRC_NEIGHBORHOOD
    if min(len(generated), len(real)) <= k:
        raise GddlabError(f"precision and recall of {len(generated)} and {len(real)} images: give at least {k + 1}")
    part = len(generated) > 10000 or len(real) > 10000  # all distances of 50,000 images at once take 40 GB
    out = prc_features_to_metric(
        generated, real, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=part, verbose=False
    )
    settings = {"neighborhood": k}
    return [
        Value("precision", out[KEY_METRIC_PRECISION], settings),
        Value("recall", out[KEY_METRIC_RECALL], settings),
    ]


def inception_score(logits: Float[Tensor, "n classes"]) -> list[Value]:
    """exp of the mean divergence of an image's classes from those of its tenth (Salimans et al. 2016, section 4).

    Args:
        logits: (N, classes), N at least 10; shuffled before they are split.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < IS_SPLITS:
        raise GddlabError(f"inception score of {len(logits)} images: give at least {IS_SPLITS}")
    out = isc_features_to_metric(logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    settings = {"splits": IS_SPLITS, "rng_seed": SEED}
    return [Value("is", out[KEY_METRIC_ISC_MEAN], settings, out[KEY_METRIC_ISC_STD])]


def mind(generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> list[Value]:
    """Monge inception distance: squared sliced 2-Wasserstein distance times 3 D (arXiv:2605.06797).

    Features are projected on random unit directions; on each, sorted projections are paired, which is optimal transport
    in one dimension. The larger set is reduced to the size of the smaller one by drawing without replacement.

    Args:
        generated, real: Features, (N, D) and (M, D).
    """
    n, d = min(len(generated), len(real)), generated.shape[1]
    g = torch.Generator().manual_seed(SEED)
    x, y = (
        (f if len(f) == n else f[torch.randperm(len(f), generator=g)[:n]]).double() for f in (generated, real)
    )  # (n, D)
    directions = torch.nn.functional.normalize(torch.randn(MIND_PROJECTIONS, d, generator=g, dtype=torch.float64))
    total = 0.0
    for part in directions.split(max(1, CHUNK // n)):
        a, b = ((part @ z.T).sort(1).values for z in (x, y))  # (directions, n)
        total += (a - b).square_().sum().item()
    settings = {"projections": MIND_PROJECTIONS, "rng_seed": SEED}
    return [Value("mind", 3 * d * total / (n * MIND_PROJECTIONS), settings)]


def classes(generated: Float[Tensor, "n classes"], real: Float[Tensor, "m classes"]) -> list[Value]:
    """How often a judge sees each class, and how sure it is.

    "class-chi2" is (X - (K - 1)) / N: X is Pearson's chi-squared of the counts of N images to the shares p that the
    judge sees in the real images, of which K > 0. It estimates sum of (q - p)^2 / p, where q are the generator's own
    shares, with no bias that grows with N, as X / (K - 1) has: about 1 / (K - 1) where one of K equal classes is
    missing. Of an honest generator it is 0 on average, and spreads by sqrt(2 (K - 1)) / N, where p are the true shares;
    shares counted in M real images add (K - 1) / M, and sqrt(2 (K - 1)) / M to the spread. Classes that are given to a
    model, as often as they are in the real images, and that the judge sees in its images take it to -(K - 1) / N. A
    class without real images counts as half a one.

    "confidence" is the mean of the largest class probability; its interval that of the mean.

    Args:
        generated, real: Logits, (N, classes) and (M, classes).
    """
    n, width = len(generated), generated.shape[1]
    seen, wanted = (torch.bincount(x.argmax(1), minlength=width).double() for x in (generated, real))
    expected = n * wanted.clamp(min=0.5) / wanted.clamp(min=0.5).sum()
    freedom = int((wanted > 0).sum()) - 1
    chi2 = ((seen - expected).square() / expected).sum().item()
    sure = generated.double().softmax(1).amax(1)
    mean, error = sure.mean().item(), Z * sure.std().item() / n**0.5
    return [
        Value("class-chi2", (chi2 - freedom) / n, {}),
        Value("confidence", mean, {}, interval=(mean - error, mean + error)),
    ]


def copying(
    generated: Float[Tensor, "n d"],
    train: Float[Tensor, "t d"],
    held_out: Float[Tensor, "h d"],
    own: Int[Tensor, " n"] | None = None,
) -> list[Value]:
    """Whether images are nearer to those that were trained on than to those held out.

    Of a generator that knows the distribution alone, the nearest of all T + H real images is one of the T training
    images with probability T / (T + H). "copying" is the share of images whose nearest one is, where each training
    image counts H / T of a held-out one, so that honest images have 0.5 and copies of training images 1; a tie counts
    half. "copying-ratio" is the ratio of the distances to the nearest training image and the nearest held-out one, at
    the quantile T / (T + H), the median where T = H: honest images have 1, copies 0. It is at most 1,000.

    That is so of features that have seen neither set, such as pixels: to a judge, which has seen the training images,
    images that are unlike both are nearer to those held out.

    Intervals are Wilson's (1927), of the share and of the quantile's level. Images that share their nearest real image
    stand or fall together, so N counts as N^2 / sum of squares of the numbers of images at each real one.

    Args:
        generated, train, held_out: Features, (N, D), (T, D) and (H, D).
        own: Where held-out images are scored: which each of them is; it is not compared with itself.
    """
    near, first = _nearest(generated, train)
    far, second = _nearest(generated, held_out, own)
    t, h = len(train), len(held_out) - (own is not None)
    level = t / (t + h)
    share = ((near < far).double() + 0.5 * (near == far).double()).mean().item()
    sizes = torch.bincount(torch.where(near < far, first, t + second)).double()
    n = (sizes.sum().square() / sizes.square().sum()).item()

    def weighted(s: float) -> float:
        return s * h / (s * h + (1 - s) * t)

    ratio = torch.where(near == far, 1.0, near / far).clamp(max=MOST_RATIO)

    def quantile(q: float) -> float:
        return ratio.quantile(q).item()

    low, high = _wilson(share, n)
    below, above = _wilson(level, n)
    settings = {"train": t, "held_out": h}
    return [
        Value("copying", weighted(share), settings, interval=(weighted(low), weighted(high))),
        Value("copying-ratio", quantile(level), settings, interval=(quantile(below), quantile(above))),
    ]


def _nearest(x: Tensor, others: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance of each row to the nearest of the others, float64, and which that is; not the one that `own` names."""
    found = []
    for rows in torch.arange(len(x)).split(max(1, CHUNK // len(others))):
        distance = torch.cdist(x[rows], others)
        if own is not None:
            distance[torch.arange(len(rows)), own[rows]] = torch.inf
        found.append(distance.argmin(1))
    index = torch.cat(found)
    return (x.double() - others[index].double()).norm(dim=1), index  # cdist is inexact where the distance is small


def _wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n."""
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


METRICS: dict[str, Callable[..., list[Value]]] = {
    "fid": frechet,
    "kid": kernel,
    "prc": precision_recall,
    "is": inception_score,
    "mind": mind,
    "classes": classes,
    "copying": copying,
}
OF_LOGITS = ("is", "classes")
"""Metrics of class logits; the others are of features."""
_SEVERAL = {
    "prc": ("precision", "recall"),
    "classes": ("class-chi2", "confidence"),
    "copying": ("copying", "copying-ratio"),
}
"""Metrics that give more than one number."""
DISTANCES = ("fid", "kid", "mind")
"""Kinds for which less is better."""


def computed(metric: str, *inputs: Tensor | Statistics) -> list[Value]:
    """The values of a metric, cached by the content of its inputs, since large sets take minutes."""
    tensors = [t for x in inputs for t in (x if isinstance(x, Statistics) else (x,))]
    settings = [KID_SUBSETS, KID_SUBSET_SIZE, PRC_NEIGHBORHOOD, IS_SPLITS, MIND_PROJECTIONS, SEED, REVISION]
    digest = hash_tensors({str(i): t for i, t in enumerate(tensors)})
    key = hash_json([metric, digest, settings, versions()])[:32]

    return cached(
        f"scores/{metric}-{key}.json",
        lambda: METRICS[metric](*inputs),
        read=lambda path: [_value(**v) for v in json.loads(path.read_text())],
        write=lambda path, values: write_json(path, [v._asdict() for v in values]),
    )


def _value(interval: Sequence[float] | None, **about: Any) -> Value:
    return Value(**about, interval=None if interval is None else (interval[0], interval[1]))


def names_of(metric: str) -> tuple[str, ...]:
    """The kinds of values that a metric gives."""
    return _SEVERAL.get(metric, (metric,))


def metric_of(kind: str) -> str:
    """The metric that gives a kind of value."""
    return next((m for m in METRICS if kind in names_of(m)), kind)


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics named; an unknown one is refused with near matches, and so are none."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise GddlabError(f"no metrics: give some of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return tuple(dict.fromkeys(names))
