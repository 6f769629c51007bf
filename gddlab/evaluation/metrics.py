"""Distances between two sets of features, each computed by torch-fidelity's own function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gddlab.errors import GddlabError, unknown

__all__ = ["METRICS", "Value", "check_metrics", "frechet", "kernel", "precision_recall"]

KID_SUBSETS = 20  # torch-fidelity's 100 take 10 s a score on one core
KID_SUBSET_SIZE = 1000
KID_SEED = 2020  # torch-fidelity's default
PRC_NEIGHBORHOOD = 3


class Value(NamedTuple):
    """A number, which metric it is, the settings behind it, and its spread over subsets where there are any."""

    kind: str
    value: float
    settings: dict[str, Any]
    std: float | None = None


def frechet(generated: Tensor, real: Tensor) -> list[Value]:
    """Frechet distance of two Gaussians, (N, D) and (M, D) float32 (Heusel et al. 2017, equation 6)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = fid_features_to_statistics(generated), fid_features_to_statistics(real)
    return [Value("fid", fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID], {})]


def kernel(generated: Tensor, real: Tensor) -> list[Value]:
    """Kernel distance, cubic kernel, mean over random subsets (Binkowski et al. 2018, section 4)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    out = kid_features_to_metric(
        generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=KID_SEED, verbose=False
    )
    settings = {"subsets": KID_SUBSETS, "subset_size": size, "rng_seed": KID_SEED}
    return [Value("kid", out[KEY_METRIC_KID_MEAN], settings, out[KEY_METRIC_KID_STD])]


def precision_recall(generated: Tensor, real: Tensor) -> list[Value]:
    """Improved precision and recall, 3 neighbours (Kynkaanniemi et al. 2019, section 2)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    k = PRC_NEIGHBORHOOD
    if min(len(generated), len(real)) <= k:
        raise GddlabError(f"precision and recall of {len(generated)} and {len(real)} images: give at least {k + 1}")
    out = prc_features_to_metric(generated, real, prc_neighborhood=k, verbose=False)
    settings = {"neighborhood": k}
    return [
        Value("precision", out[KEY_METRIC_PRECISION], settings),
        Value("recall", out[KEY_METRIC_RECALL], settings),
    ]


METRICS = {"fid": frechet, "kid": kernel, "prc": precision_recall}


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics named, refused with near matches where one is unknown or none is given."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise GddlabError(f"no metrics: give some of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return tuple(dict.fromkeys(names))
