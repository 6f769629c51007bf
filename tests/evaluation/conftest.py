from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset, digits
from gddlab.evaluation import EXTRACTORS, features

WIDTH = 48


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache a test, in memory and on disk."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GDDLAB_CACHE", str(folder))
    monkeypatch.setattr(features, "_kept", {})
    return folder


def small_features(monkeypatch, resolution: int = 16) -> list[int]:
    """Replaces the networks by a fixed random projection and lists how many images each extraction saw.

    It has few features: a Frechet distance takes the eigenvalues of a matrix of features by features, seconds at 1280.
    """
    seen: list[int] = []
    projection = torch.randn(3 * resolution**2, WIDTH, generator=torch.Generator().manual_seed(0)) / 100

    class Projection(torch.nn.Module):
        def forward(self, x):
            return (x.float().flatten(1) / 255 @ projection,)

    real = features.extract_part

    def counted(images, extractor, start, stop, **kwargs):
        seen.append(stop - start)
        return real(images, extractor, start, stop, **kwargs)

    monkeypatch.setattr(features, "extract_part", counted)
    monkeypatch.setattr("gddlab.evaluation.extractors.Extractor.build", lambda self: Projection())
    for name in ("lite2", "lite0"):
        monkeypatch.setitem(EXTRACTORS, name, dataclasses.replace(EXTRACTORS[name], dims=WIDTH))
    return seen


@pytest.fixture
def counter(monkeypatch):
    return small_features(monkeypatch)


def subset(start: int, stop: int, name: str = "some-digits") -> ImageDataset:
    d = digits()
    return ImageDataset(d.uint8[start:stop], d.class_ids[start:stop], classes=10, name=name, source="digits")


@pytest.fixture
def some() -> ImageDataset:
    return subset(0, 64)


@pytest.fixture
def others() -> ImageDataset:
    return subset(64, 128, "other-digits")


def as_float(data: ImageDataset) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data.uint8.transpose(0, 3, 1, 2))).float() / 127.5 - 1
