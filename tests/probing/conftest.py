import matplotlib
import numpy as np
import pytest

from gddlab.datasets import ImageDataset
from gddlab.nets import Precond
from gddlab.probing import ProbeResult, probe
from tests.probing.networks import tiny

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def pictures() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
    return ImageDataset(images, np.arange(12) % 3, classes=3, name="pictures", source="random")


@pytest.fixture
def net() -> Precond:
    return tiny()


@pytest.fixture(scope="session")
def result(pictures: ImageDataset) -> ProbeResult:
    return probe(tiny(), [80.0, 1.0, 0.01], data=pictures, n=6)
