"""The card: one fixture, `cuda`; without a card each test is skipped.

`GDDLAB_GPU_TESTS=cpu` runs the tests with the CPU in the card's place, with the tolerances of a card. It is there to
write them, and shows nothing about CUDA. On a card, where pytest's plugins of `addopts` may be missing:

    python -m pytest -o addopts= -m gpu tests/gpu
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The first card."""
    if os.environ.get("GDDLAB_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def card(cuda: torch.device) -> torch.device:
    """`cuda`, for what a CPU cannot stand for: NCCL, CUDA graphs, memory of a card."""
    if cuda.type != "cuda":
        pytest.skip("needs a card itself: GDDLAB_GPU_TESTS=cpu puts the CPU in its place")
    return cuda


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allows TF32 in matrix products and convolutions, or forbids it; the old settings also set the new ones."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the new settings
        products.allow_tf32 = convolutions.allow_tf32 = allowed
        try:
            yield
        finally:
            products.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 is float32 in each test that does not allow TF32; cuDNN's convolutions use TF32 by default."""
    with tf32(False):
        yield


@contextlib.contextmanager
def deterministic(*, warn_only: bool = False) -> Iterator[None]:
    """Deterministic kernels; where there is none, an error, or a warning."""
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(scope="session")
def pictures() -> ImageDataset:
    """48 random images of 16 x 16 pixels, brighter by class; of three classes."""
    random = np.random.default_rng(0)
    classes = np.arange(48) % 3
    images = random.integers(0, 200, (48, 16, 16, 1)) + 25 * classes[:, None, None, None]
    return ImageDataset(images.astype(np.uint8), classes, classes=3, name="pictures", source="random")
