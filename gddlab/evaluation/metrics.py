"""Scores of one set of features against another, or of a set of class logits.

The inception score and precision and recall are computed by torch-fidelity's own functions. Frechet and kernel distance are the same formulas with the same
subsets in float64 sums, several times faster, and equal to torch-fidelity's up to rounding; MIND it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gddlab.errors import GddlabError, unknown

__all__ = [
    "DISTANCES",
    "METRICS",
    "Statistics",
    "Value",
    "check_metrics",
    "frechet",
    "inception_score",
    "kernel",
    "mind",
    "precision_recall",
    "statistics",
]

KID_SUBSETS = 20  # torch-fidelity's 100 take five times as long, for a smaller error of the mean
KID_SUBSET_SIZE = 1000
PRC_NEIGHBORHOOD = 3
IS_SPLITS = 10
MIND_PROJECTIONS = 1000
SEED = 2020  # torch-fidelity's default
_CHUNK = 1 << 22
"""Numbers in one piece of work."""


class Value(NamedTuple):
    """A number, which metric it is, the settings behind it, and its spread over subsets where there are any."""

    kind: str
    value: float
    settings: dict[str, Any]
    std: float | None = None


class Statistics(NamedTuple):
    """Mean, (D,), and covariance, (D, D), of features, float64."""

    mu: Tensor
    sigma: Tensor


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features, (N, D), N at least 2."""
    x = features.double()
    return Statistics(x.mean(0), torch.cov(x.T))


def frechet(generated: Tensor | Statistics, real: Tensor | Statistics) -> list[Value]:
    """Frechet distance of two Gaussians (Heusel et al. 2017, equation 6).

    |mu_1 - mu_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2)). The last trace is the sum of the roots of the eigenvalues of R S_2 R^T, a symmetric matrix,
    where R^T R = S_1; the set of lower rank is taken for S_1, so that few eigenvalues are zero, whose rounding a root would enlarge.

    Args:
        generated, real: Features, (N, D) and (M, D), or their mean and covariance.
    """
    a, b = (x if isinstance(x, Statistics) else statistics(x) for x in (generated, real))
    roots = _root(a.sigma), _root(b.sigma)
    root, other = (roots[0], b.sigma) if len(roots[0]) <= len(roots[1]) else (roots[1], a.sigma)
    product = root @ other @ root.T
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    value = (a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * cross
    return [Value("fid", value.item(), {})]


def _root(sigma: Tensor) -> Tensor:
    """R with R^T R = sigma, (rank, D), by a Cholesky decomposition with pivots; sigma may be singular."""
    from scipy.linalg.lapack import dpstrf

    factor, pivots, rank, info = dpstrf(sigma.numpy())
    if info < 0 or not np.isfinite(factor).all():
        raise GddlabError(
            "the covariance of the features is not finite: look at the images, the model may have diverged"
        )
    root = np.zeros((max(rank, 1), len(sigma)))
    root[:, pivots - 1] = np.triu(factor)[: max(rank, 1)]
    return torch.from_numpy(root)


def kernel(generated: Tensor, real: Tensor) -> list[Value]:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets (Binkowski et al. 2018, section 4).

    Args:
        generated, real: Features, (N, D) and (M, D), float32.
    """
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    rng = np.random.RandomState(SEED)
    chosen = [
        tuple(torch.from_numpy(rng.choice(len(x), size, replace=False)) for x in (generated, real))
        for _ in range(KID_SUBSETS)
    ]
    if max(len(generated), len(real)) ** 2 <= KID_SUBSETS * size**2:  # then all pairs are fewer than the subsets' pairs
        groups = [(torch.arange(len(generated)), torch.arange(len(real)), chosen)]
    else:
        groups = [(i, j, [(torch.arange(size), torch.arange(size))]) for i, j in chosen]
    distances: list[float] = []
    for rows, columns, subsets in groups:
        x, y = generated[rows], real[columns]
        in_x, in_y = (_membership(len(z), [s[k] for s in subsets]) for k, z in ((0, x), (1, y)))
        within = [_pair_sums(z, z, m, m) - _own_sums(z, m) for z, m in ((x, in_x), (y, in_y))]
        between = _pair_sums(x, y, in_x, in_y)
        distances += ((within[0] + within[1]) / (size * (size - 1)) - 2 * between / size**2).tolist()
    settings = {"subsets": KID_SUBSETS, "subset_size": size, "rng_seed": SEED}
    return [Value("kid", float(np.mean(distances)), settings, float(np.std(distances)))]


def _membership(n: int, subsets: Sequence[Tensor]) -> Tensor:
    """(n, subsets), 1 where an image is in a subset."""
    out = torch.zeros(n, len(subsets), dtype=torch.float64)
    for k, index in enumerate(subsets):
        out[index, k] = 1
    return out


def _pair_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """Sum of the kernel over the pairs of each subset, (subsets,), float64."""
    total = torch.zeros(in_x.shape[1], dtype=torch.float64)
    step = max(1, _CHUNK // len(y))
    for i in range(0, len(x), step):
        k = (x[i : i + step] @ y.T).div_(x.shape[1]).add_(1)
        total += (in_x[i : i + step] * ((k * k * k).double() @ in_y)).sum(0)
    return total


def _own_sums(x: Tensor, in_x: Tensor) -> Tensor:
    """Sum of the kernel of each image with itself over each subset, (subsets,), float64."""
    return (x.double().square().sum(1) / x.shape[1] + 1).pow(3) @ in_x


def precision_recall(generated: Tensor, real: Tensor) -> list[Value]:
    """Improved precision and recall, 3 neighbours (Kynkaanniemi et al. 2019, section 2), by torch-fidelity; (N, D) and (M, D) float32."""
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


def inception_score(logits: Tensor) -> list[Value]:
    """exp of the mean divergence of an image's classes from those of its tenth of the set (Salimans et al. 2016, section 4), by torch-fidelity.

    Args:
        logits: (N, classes), N at least 10; shuffled before they are split.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < IS_SPLITS:
        raise GddlabError(f"inception score of {len(logits)} images: give at least {IS_SPLITS}")
    out = isc_features_to_metric(logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    settings = {"splits": IS_SPLITS, "rng_seed": SEED}
    return [Value("is", out[KEY_METRIC_ISC_MEAN], settings, out[KEY_METRIC_ISC_STD])]


def mind(generated: Tensor, real: Tensor) -> list[Value]:
    """Monge inception distance: squared sliced 2-Wasserstein distance times 3 D (arXiv:2605.06797).

    Features are projected on random unit directions; on each, sorted projections are paired, which is optimal transport in one dimension. Of the larger set as
    many as the smaller has are drawn, without replacement. Memory holds some directions at a time.

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
    for part in directions.split(max(1, _CHUNK // n)):
        a, b = ((part @ z.T).sort(1).values for z in (x, y))  # (directions, n)
        total += (a - b).square_().sum().item()
    settings = {"projections": MIND_PROJECTIONS, "rng_seed": SEED}
    return [Value("mind", 3 * d * total / (n * MIND_PROJECTIONS), settings)]


METRICS: dict[str, Callable[..., list[Value]]] = {
    "fid": frechet,
    "kid": kernel,
    "prc": precision_recall,
    "is": inception_score,
    "mind": mind,
}
DISTANCES = ("fid", "kid", "mind")
"""Kinds of which less is better."""


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics named, refused with near matches where one is unknown or none is given."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise GddlabError(f"no metrics: give some of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return tuple(dict.fromkeys(names))
