"""The embedded dataset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset, digits, open_dataset
from gddlab.errors import GddlabError


def test_digits_are_what_the_manifest_says() -> None:
    data = open_dataset("digits")
    assert data is digits()  # read once
    assert (len(data), data.resolution, data.channels, data.classes) == (1797, 16, 1, 10)
    x, labels = data.images(), data.labels()
    assert x.shape == (1797, 1, 16, 16)
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() <= 1
    assert labels.shape == (1797, 10)
    assert labels.sum(1).eq(1).all()
    assert labels.sum(0).min() > 170
    # Pinned: another value means other images, and scores that cannot be compared.
    assert data.manifest.sha256 == "5d7c4425d34ed5ad534917cb08de7ca52d3272a0844a35f80760ff20f4249bbf"
    assert data.manifest.count == 1797


def test_parts_equal_the_whole() -> None:
    data = digits()
    index = torch.tensor([5, 0, 1796])
    assert torch.equal(data.images(index), data.images()[index])
    assert torch.equal(data.labels(index), data.labels()[index])
    assert torch.equal(data.images(slice(3, 7)), data.images()[3:7])


def test_refusals() -> None:
    with pytest.raises(GddlabError, match="did you mean 'digits'"):
        open_dataset("digit")
    about = {"name": "x", "source": "test"}
    with pytest.raises(GddlabError, match="give uint8"):
        ImageDataset(np.zeros((2, 4, 4, 1), dtype=np.float32), **about)
    with pytest.raises(GddlabError, match="empty"):
        ImageDataset(np.zeros((0, 4, 4, 1), dtype=np.uint8), **about)
    with pytest.raises(GddlabError, match=r"class ids span 0\.\.7: accepted are 0\.\.4"):
        ImageDataset(np.zeros((2, 4, 4, 1), dtype=np.uint8), [0, 7], classes=5, **about)
