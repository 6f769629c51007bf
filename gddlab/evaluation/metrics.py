"""Scores of one set of features against another, or of a set of class logits.

Each is computed by torch-fidelity's own function, except MIND, which torch-fidelity does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
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
SEED = 2020  # torch-fidelity's default
REVISION = 1
"""Part of the cache key; to be raised when a change of code changes a value."""
CHUNK = 1 << 22
"""Numbers held at once."""


class Value(NamedTuple):
    """A number, its kind, the settings behind it, and its spread over subsets if there are any."""

    kind: str
    value: float
    settings: dict[str, Any]
    std: float | None = None


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

    Args:
        generated, real: Features, (N, D) and (M, D), float32.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    out = kid_features_to_metric(
        generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    settings = {"subsets": KID_SUBSETS, "subset_size": size, "rng_seed": SEED}
    return [Value("kid", out[KEY_METRIC_KID_MEAN], settings, out[KEY_METRIC_KID_STD])]


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


METRICS: dict[str, Callable[..., list[Value]]] = {
    "fid": frechet,
    "kid": kernel,
    "prc": precision_recall,
    "is": inception_score,
    "mind": mind,
}
_SEVERAL = {"prc": ("precision", "recall")}
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
        read=lambda path: [Value(**v) for v in json.loads(path.read_text())],
        write=lambda path, values: write_json(path, [v._asdict() for v in values]),
    )


def names_of(metric: str) -> tuple[str, ...]:
    """The kinds of values that a metric gives."""
    return _SEVERAL.get(metric, (metric,))


def metric_of(kind: str) -> str:
    """The metric that gives a kind of value."""
    return next((m for m, kinds in _SEVERAL.items() if kind in kinds), kind)


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics named; an unknown one is refused with near matches, and so are none."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise GddlabError(f"no metrics: give some of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return tuple(dict.fromkeys(names))
